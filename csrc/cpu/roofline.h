// The compute roofline of this processor, for the benchmarks.
#pragma once

#include <cstdint>

namespace gemmlet {

// Runs `steps` steps of a loop of fused multiply-adds that stays in the registers, eight times on each thread; returns the
// floating-point operations done, two for each multiply-add.
template <class T>
double fma_loop(std::int64_t steps);

}  // namespace gemmlet

// Counts its own calls. `gemmlet bench --instructions` calls it between kernels, and has callgrind count from call to call.
extern "C" __attribute__((visibility("default"))) int gemmlet_mark();
