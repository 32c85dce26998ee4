// Optimizer rules, in place, for one parameter.
//
// Contract
//   Contiguous arrays of n elements that do not overlap; those states that the rule does not have are null. The
//   hyperparameters are in the order of formulas/optimizers.h, and are rounded to Compute<T>. A grid as for map().
#pragma once

#include "cuda/pack.cuh"
#include "cuda/scalar.cuh"

namespace gemmlet {

struct Hyperparameters {
  double value[9];
};

template <class Rule, class T>
__global__ void __launch_bounds__(256)
    optimizer_update(T* param, const T* grad, T* state0, T* state1, Hyperparameters given, Index n) {
  using V = Compute<T>;
  constexpr int N = pack_size<T>, states = Rule::state_count;
  T* const state[2] = {state0, state1};
  static_assert(Rule::hyperparameter_count <= 9 && states <= 2);
  V h[Rule::hyperparameter_count];
#pragma unroll
  for (int i = 0; i < Rule::hyperparameter_count; ++i) h[i] = static_cast<V>(given.value[i]);
  const auto one = [&](T& p, T g, T* const(&s)[2]) {
    V value = widen(p), kept[2];
#pragma unroll
    for (int j = 0; j < states; ++j) kept[j] = widen(*s[j]);
    Rule::apply(value, widen(g), kept, h);
    p = narrow<T>(value);
#pragma unroll
    for (int j = 0; j < states; ++j) *s[j] = narrow<T>(kept[j]);
  };
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (is_aligned(param) && is_aligned(grad) && is_aligned(state0) && is_aligned(state1)) {
    const Index whole = n / N;
    if (thread < whole) {
      Pack<T, N> p = load_pack<N>(param + thread * N), s[2];
      const Pack<T, N> g = load_pack<N>(grad + thread * N);
#pragma unroll
      for (int j = 0; j < states; ++j) s[j] = load_pack<N>(state[j] + thread * N);
#pragma unroll
      for (int i = 0; i < N; ++i) one(p.value[i], g.value[i], {&s[0].value[i], &s[1].value[i]});
      store_pack(param + thread * N, p);
#pragma unroll
      for (int j = 0; j < states; ++j) store_pack(state[j] + thread * N, s[j]);
    } else if (thread == whole) {
      // The tail:
      for (Index i = whole * N; i < n; ++i) one(param[i], grad[i], {state0 + i, state1 + i});
    }
    return;
  }
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x * N + threadIdx.x;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Index i = first + j * static_cast<Index>(blockDim.x);
    if (i < n) one(param[i], grad[i], {state0 + i, state1 + i});
  }
}

}  // namespace gemmlet
