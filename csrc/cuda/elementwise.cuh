// Activations and their gradients, element by element; copies of arrays of any layout.
//
// Contract
//   activation_forward, activation_backward: contiguous arrays of n elements, any alignment; where all begin at a
//   multiple of 16 bytes, a thread moves 16 bytes at a time. An output may be one of the inputs. Any grid that has a
//   thread for every pack (`elements_per_block`).
//   strided_copy: arrays of up to 8 dimensions, strides in elements; converts between types as narrow() rounds. The
//   arrays do not overlap.
//   Accuracy and special values: formulas/activations.h, which computes in Compute<T>; 16-bit types round once more.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/value.cuh"

namespace gemmlet {

// out[i] = f(in[i]...) for this thread's share of the n elements.
template <class T, class F, class... In>
__device__ __forceinline__ void map(Index n, F f, T* out, const In*... in) {
  constexpr int N = pack_size<T>;
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (is_aligned(out) && (is_aligned(in) && ...)) {
    const Index whole = n / N;
    if (thread < whole) {
      Pack<T, N> result;
      [&](const Pack<In, N>&... pack) {
#pragma unroll
        for (int i = 0; i < N; ++i) result.value[i] = narrow<T>(f(widen(pack.value[i])...));
      }(load_pack<N>(in + thread * N)...);
      store_pack(out + thread * N, result);
    } else if (thread == whole) {
      // The tail:
      for (Index i = whole * N; i < n; ++i) out[i] = narrow<T>(f(widen(in[i])...));
    }
    return;
  }
  // The same elements for the block, but one by one, neighbours by neighbouring threads.
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x * N + threadIdx.x;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Index i = first + j * static_cast<Index>(blockDim.x);
    if (i < n) out[i] = narrow<T>(f(widen(in[i])...));
  }
}

template <class F, class T>
__global__ void __launch_bounds__(256) activation_forward(const T* x, T* y, Compute<T> parameter, Index n) {
  map(n, [=](Compute<T> v) { return F::forward(v, parameter); }, y, x);
}

// saved: x where the formula needs it, else y.
template <class F, class T>
__global__ void __launch_bounds__(256)
    activation_backward(const T* grad_y, const T* saved, T* grad_x, Compute<T> parameter, Index n) {
  map(n, [=](Compute<T> g, Compute<T> s) { return F::backward(g, s, parameter); }, grad_x, grad_y, saved);
}

struct Layout {
  static constexpr int most = 8;
  Index shape[most], from[most], to[most];  // strides; the last dimension runs fastest
};

template <class To, class From>
__device__ __forceinline__ To converted(From x) {
  if constexpr (same_type<To, From>)
    return x;
  else if constexpr (same_type<To, float16> || same_type<To, bfloat16>)
    return narrow<To>(static_cast<float>(x));
  else if constexpr (same_type<From, float16> || same_type<From, bfloat16>)
    return static_cast<To>(widen(x));
  else
    return static_cast<To>(x);
}

template <class To, class From>
__global__ void __launch_bounds__(256) strided_copy(const From* from, To* to, Layout layout, int dimensions, Index n) {
  const Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  Index rest = i, source = 0, target = 0;
  for (int d = dimensions - 1; d >= 0; --d) {
    const Index at = rest % layout.shape[d];
    rest /= layout.shape[d];
    source += at * layout.from[d];
    target += at * layout.to[d];
  }
  to[target] = converted<To>(from[source]);
}

}  // namespace gemmlet
