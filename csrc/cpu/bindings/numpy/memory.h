// Memory of NumPy's arrays: its default handler (NEP 49) with functions that keep the blocks of freed arrays for new ones.
// Temporaries of 16 KiB and more are otherwise mapped, faulted in and unmapped by each operation.
#pragma once

#include <cstdint>

namespace gemmlet::numpy {

// Puts our functions into NumPy's default handler, for all threads, and keeps up to so many bytes of large blocks that are
// freed; 0: puts back NumPy's functions, and gives back what is kept. A handler that somebody has set stays in use, and so
// do NumPy's functions where the process may have only so much memory.
void keep_memory(std::int64_t bytes);

// Frees what is kept.
void give_back_memory();

}  // namespace gemmlet::numpy
