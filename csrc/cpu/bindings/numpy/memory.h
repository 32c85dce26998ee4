// A memory handler of NumPy (NEP 49) that keeps the blocks of freed arrays for new ones: temporaries of 16 KiB and more are
// otherwise mapped, faulted in and unmapped by each operation.
#pragma once

#include <cstdint>

namespace gemmlet::numpy {

// Takes new arrays' memory from here, in the calling thread's context, and keeps up to so many bytes of what is freed; 0:
// gives back what is kept, and sets the handler that was there before. False with an error set.
void keep_memory(std::int64_t bytes);

}  // namespace gemmlet::numpy
