// Sums, maxima and the like over the threads of a warp, of a block, of a grid.
//
// Contract
//   Who is added to whom depends on the numbers of threads and blocks alone, so that results are the same bits on every
//   run. Every thread of the warp, or block, calls.
#pragma once

#include "cuda/scalar.cuh"

namespace gemmlet {

struct Sum {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

// NaN is passed over as long as there is anything else.
struct Largest {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a > b || b != b ? a : b;
  }
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::larger(a, b); }
};
struct Smallest {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a < b || b != b ? a : b;
  }
};

// Over groups of `Lanes` neighbouring lanes, a power of two; each of the group gets the result.
template <int Lanes, class V, class Op>
__device__ __forceinline__ V reduce_lanes(V v, Op op) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, distance));
  return v;
}

// Over a block of whole warps, at most 32; each thread gets the result. `partial`: shared memory for 32 values, which
// may be used again at once.
template <class V, class Op>
__device__ __forceinline__ V reduce_block(V v, Op op, V* partial) {
  v = reduce_lanes<32>(v, op);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) v = op(v, partial[warp]);
  __syncthreads();
  return v;
}

// The same for a block of `Threads` threads, a power of two, in fewer steps.
template <int Threads, class V, class Op>
__device__ __forceinline__ V reduce_block(V v, Op op, V* partial) {
  v = reduce_lanes<32>(v, op);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = reduce_lanes<Threads / 32>(partial[threadIdx.x % (Threads / 32)], op);
  __syncthreads();
  return v;
}

// Whether this block is the last of the grid to come here: what all the others wrote to global memory before is there
// for it to read. `counter` is 0 before the launch, and again after it.
__device__ inline bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    // After the barrier it counts for what the whole block has written.
    __threadfence();
    last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace gemmlet
