// Fused training: the last layer of several in one kernel with the loss, where it is small. Contract: step.cuh.
#pragma once

#include "cuda/training/dense.cuh"
#include "cuda/training/loss.cuh"

namespace gemmlet {

// The last layer of several, where it is small: forward, the loss, and back to the layer below.
template <class T>
struct Top {
  const T* x;  // what the layer below gave, without what is dropped of it
  Layer<T> layer;
  Activation<T> activation;
  Objective<T> objective;
  T* grad;
  Below<T> below;
  GradientPenalty<T> penalty;
};

inline constexpr int max_top_threads = 256;
// Columns that go through the inputs together.
inline constexpr int top_columns = 16;

// A block of whole warps for each row. Shared memory: for each warp, and three times besides, a number for each of the
// outputs, rounded up to top_columns.
template <class T, bool penalized = false>
__global__ void __launch_bounds__(max_top_threads, 1) top(const __grid_constant__ Top<T> p) {
  const Layer<T>& layer = p.layer;
  const int i = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, threads = static_cast<int>(blockDim.x);
  const int out = layer.out, stride = row_stride(out), width = (out + top_columns - 1) / top_columns * top_columns;
  const T* const x = p.x + static_cast<Index>(i) * row_stride(layer.in);
  const Target<T> target(p.objective, i, out);
  T *const z = dynamic_shared<T>(), *const y = z + width, *const grad = y + width, *const of_warps = grad + width;
  for (int first = 0; first < out; first += top_columns) {
    T sum[top_columns] = {};
    for (int k = thread; k < layer.in; k += threads) {
      const T* const w = layer.parameters + static_cast<Index>(k) * stride + first;
      const T value = x[k];
#pragma unroll
      for (int c = 0; c < top_columns; c += 4) {
        if (first + c >= out) break;
        T some[4];
        load_numbers<4>(w + c, some);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[c + j] = fma(value, some[j], sum[c + j]);
      }
    }
    // Lanes 2 c and 2 c + 1 get column c.
    exchange_sums<16, 2, top_columns>(sum, lane);
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
    if (lane % 2 == 0) of_warps[thread / 32 * width + first + lane / 2] = sum[0];
  }
  __syncthreads();
  for (int j = thread; j < out; j += threads) {
    T sum[1] = {of_warps[j]}, result[1];
    for (int warp = 1; warp < threads / 32; ++warp) sum[0] += of_warps[warp * width + j];
    sum[0] += layer.parameters[static_cast<Index>(layer.in) * stride + j];
    z[j] = sum[0];
    p.activation.forward(sum, result);
    y[j] = result[0];
  }
  __syncthreads();
  T* const grad_row = p.grad + static_cast<Index>(i) * stride;
  if (thread < 32)
    evaluate_row<32>(
        p.objective, target, p.activation, i, y, z, out,
        [=](int j, T gradient) {
          grad[j] = gradient;
          grad_row[j] = gradient;
        },
        [] {});
  const Index step = p.below.drops.keep != 0 ? p.below.drops.draw.step() : 0;
  __syncthreads();
  const Index below_row = static_cast<Index>(i) * row_stride(layer.in);
  const bool has_penalty = penalized && p.penalty.has(i);
  T penalty = 0;
  if (has_penalty) {
    penalty = gradient_of(p.penalty, p.activation, y, z);
    if (thread == 0) grad_row[static_cast<Index>(p.penalty.offset) * stride] = penalty;
  }
  for (int k = thread; k < layer.in; k += threads) {
    const T* const w = layer.parameters + static_cast<Index>(k) * stride;
    T sum[1] = {}, saved[1] = {p.below.saved[below_row + k]};
    for (int first = 0; first < out; first += 4) {
      T some[4];
      load_numbers<4>(w + first, some);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < out) sum[0] = fma(grad[first + j], some[j], sum[0]);
    }
    unsigned kept = 1;
    if (p.below.drops.keep != 0) p.below.drops.apply(kept = p.below.drops.template kept<1>(i, k, step), sum);
    p.below.activation.backward(sum, saved);
    p.below.grad[below_row + k] = sum[0];
    if (has_penalty) {
      sum[0] = penalty * *w;
      if (p.below.drops.keep != 0) p.below.drops.apply(kept, sum);
      p.below.activation.backward(sum, saved);
      p.below.grad[below_row + static_cast<Index>(p.penalty.offset) * row_stride(layer.in) + k] = sum[0];
    }
  }
}

}  // namespace gemmlet
