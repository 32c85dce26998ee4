// Activations and their gradients, element by element; samples as networks take them; copies of arrays of any layout.
//
// Contract
//   activation_forward, activation_backward: contiguous arrays of n elements, any alignment; where all begin at a
//   multiple of 16 bytes, whole blocks move 16 bytes at a time. An output may be one of the inputs. A thread for every
//   `map_numbers` elements.
//   strided_copy: arrays of up to 8 dimensions, strides in elements; converts between types as narrow() rounds. The
//   arrays do not overlap.
//   Accuracy and special values: formulas/activations.h, computed in Sufficient<T>; 16-bit types round once more.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/scalar.cuh"

namespace gemmlet {

inline constexpr int map_threads = 256;

// How many numbers a thread of map() takes: two packs, so that it pays for the addresses.
template <class T>
inline constexpr int map_numbers = 2 * pack_size<T>;

// A thread's numbers, as packs of N that are `apart` from each other.
template <class T, int N>
struct Share {
  Pack<T, N> pack[map_numbers<T> / N];
};

// out[i] = f(in[i]...) from `first` on for this block's share, all of which is there unless N = 1.
template <int N, class T, class F, class... In>
__device__ __forceinline__ void map_share(Index first, Index n, F f, T* out, const In*... in) {
  constexpr int packs = map_numbers<T> / N;
  const Index at = first + threadIdx.x * N;
  constexpr int apart = map_threads * N;
  const auto load = [=](const T* p) {
    Share<T, N> x;
#pragma unroll
    for (int j = 0; j < packs; ++j) {
      const Index i = at + j * apart;
      x.pack[j] = N > 1 || i < n ? load_pack<N>(p + i) : Pack<T, N>{};
    }
    return x;
  };
  [&](const Share<In, N>&... x) {
#pragma unroll
    for (int j = 0; j < packs; ++j) {
      Compute<T> result[N];
#pragma unroll
      for (int k = 0; k < N; ++k) result[k] = f(widen(x.pack[j], k)...);
      const Index i = at + j * apart;
      if (N > 1 || i < n) store_pack(out + i, narrowed<T>(result));
    }
  }(load(in)...);
}

// out[i] = f(in[i]...) for this block's share of the n elements.
template <class T, class F, class... In>
__device__ __forceinline__ void map(Index n, F f, T* out, const In*... in) {
  constexpr Index share = map_threads * map_numbers<T>;
  const Index first = blockIdx.x * share;
  if (first + share <= n && is_aligned(out) && (is_aligned(in) && ...))
    map_share<pack_size<T>>(first, n, f, out, in...);
  else
    map_share<1>(first, n, f, out, in...);
}

template <class F, class T>
__global__ void __launch_bounds__(map_threads) activation_forward(const T* x, T* y, Compute<T> parameter, Index n) {
  using V = Sufficient<T>;
  map(n, [=](Compute<T> v) { return static_cast<Compute<T>>(F::forward(V(v), V(parameter))); }, y, x);
}

// saved: x where the formula needs it, else y.
template <class F, class T>
__global__ void __launch_bounds__(map_threads)
    activation_backward(const T* grad_y, const T* saved, T* grad_x, Compute<T> parameter, Index n) {
  using V = Sufficient<T>;
  map(
      n, [=](Compute<T> g, Compute<T> s) { return static_cast<Compute<T>>(F::backward(V(g), V(s), V(parameter))); },
      grad_x, grad_y, saved);
}

// to[i] = from[i] * scale + shift, of n numbers, or bytes that count as value/255. A thread for each.
template <class T, class N>
__global__ void __launch_bounds__(map_threads) scaled(const N* from, T* to, T scale, T shift, Index n) {
  const Index i = static_cast<Index>(blockIdx.x) * map_threads + threadIdx.x;
  if (i < n) to[i] = number<T>(from[i]) * scale + shift;
}

struct Layout {
  static constexpr int max_dimensions = 8;
  Index shape[max_dimensions], from[max_dimensions], to[max_dimensions];  // strides; the last dimension runs fastest
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
