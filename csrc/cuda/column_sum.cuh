// Sums of columns, and the range of values.
//
// Contract
//   column_sum: out[j] = sum_i x[i, j], any strides, rows and columns >= 1. Each block adds up the rows of one share,
//   gridDim.y shares in all; with more than one, `partial` takes (gridDim.y, columns) sums, which the last block adds.
//   Down: whether neighbouring threads take neighbouring rows, else columns: so as they lie in memory.
//   value_range: the smallest and the largest of n >= 1 elements, NaN passed over, to result[0] and result[1], which may be
//   memory of the CPU; and a copy of all as `To`, unless that is null. `partial` takes (2, gridDim.x) numbers.
//   counter: 0 before the launch, and again after it. Blocks have 256 threads.
#pragma once

#include "cuda/elementwise.cuh"
#include "cuda/warp_reduce.cuh"

namespace gemmlet {

template <class T, bool Down>
__global__ void __launch_bounds__(256) column_sum(const T* x, Index row_stride, Index column_stride, Index rows,
                                                  Index columns, T* out, Compute<T>* partial, unsigned* counter) {
  using V = Compute<T>;
  constexpr int warps = 8, per_block = Down ? warps : 32;
  __shared__ V of_warps[warps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Index column = static_cast<Index>(blockIdx.x) * per_block + (Down ? warp : lane);
  const Index share = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * share;
  const Index end = begin + share < rows ? begin + share : rows;
  V sum = 0;
  if (column < columns)
    for (Index i = begin + (Down ? lane : warp); i < end; i += Down ? 32 : warps)
      sum += widen(x[i * row_stride + column * column_stride]);
  if constexpr (Down) {
    sum = reduce_lanes<32>(sum, Sum{});
  } else {
    of_warps[warp][lane] = sum;
    __syncthreads();
    sum = of_warps[0][lane];
    for (int w = 1; w < warps; ++w) sum += of_warps[w][lane];
  }
  const bool writes = column < columns && (Down ? lane : warp) == 0;
  if (gridDim.y == 1) {
    if (writes) out[column] = narrow<T>(sum);
    return;
  }
  if (writes) partial[blockIdx.y * columns + column] = sum;
  if (!is_last_block(counter)) return;
  for (Index j = threadIdx.x; j < columns; j += blockDim.x) {
    sum = partial[j];
    for (unsigned part = 1; part < gridDim.y; ++part) sum += partial[part * columns + j];
    out[j] = narrow<T>(sum);
  }
}

template <class T, class To>
__global__ void __launch_bounds__(256)
    value_range(const T* x, To* copy, Index n, To* partial, To* result, unsigned* counter) {
  __shared__ To of_warps[32];
  To* const lows = partial;
  To* const highs = partial + gridDim.x;
  // All start with an element that is there.
  To low = converted<To>(x[0]), high = low;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<Index>(gridDim.x) * blockDim.x) {
    const To v = converted<To>(x[i]);
    low = Smallest{}(low, v);
    high = Largest{}(high, v);
    if (copy != nullptr) copy[i] = v;
  }
  low = reduce_block(low, Smallest{}, of_warps);
  high = reduce_block(high, Largest{}, of_warps);
  if (threadIdx.x == 0) {
    lows[blockIdx.x] = low;
    highs[blockIdx.x] = high;
  }
  if (!is_last_block(counter)) return;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    low = Smallest{}(low, lows[i]);
    high = Largest{}(high, highs[i]);
  }
  low = reduce_block(low, Smallest{}, of_warps);
  high = reduce_block(high, Largest{}, of_warps);
  if (threadIdx.x == 0) {
    result[0] = low;
    result[1] = high;
  }
}

}  // namespace gemmlet
