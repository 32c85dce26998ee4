// Fused training: formulas by their places in the lists of csrc/formulas.
#pragma once

#include "cuda/scalar.cuh"

namespace gemmlet {

enum class ActivationNumber : int {
#define GEMMLET_ENTRY(name) name,
  GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
};

enum class LossNumber : int {
#define GEMMLET_ENTRY(name) name,
  GEMMLET_LOSSES(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
};
enum class RowLossNumber : int {
#define GEMMLET_ENTRY(name) name,
  GEMMLET_ROW_LOSSES(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
};
// A loss is the place of an elementwise one in its list, or ~place of a row loss in its.
__device__ __forceinline__ constexpr bool is_row_loss(int loss) { return loss < 0; }

template <class T>
struct Activation {
  ActivationNumber number;
  T parameter;

  // f(the formula): one kernel serves all of them, as they take little of its time.
  template <class F>
  __device__ __forceinline__ void with(F f) const {
    switch (number) {
#define GEMMLET_ENTRY(name)    \
  case ActivationNumber::name: \
    return f(activations::name{});
      GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
    }
  }
  template <int n>
  __device__ __forceinline__ void forward(const T (&x)[n], T (&y)[n]) const {
    with([&](auto formula) {
#pragma unroll
      for (int i = 0; i < n; ++i) y[i] = formula.forward(x[i], parameter);
    });
  }
  // `saved` is the preactivation where the formula needs it, else the result.
  template <int n>
  __device__ __forceinline__ void backward(T (&grad)[n], const T (&saved)[n]) const {
    with([&](auto formula) {
#pragma unroll
      for (int i = 0; i < n; ++i) grad[i] = formula.backward(grad[i], saved[i], parameter);
    });
  }
};

// One step of a rule. In float, quotients and square roots are off by some ULP, and take no branch, as exact ones do for
// zeros and small numbers: so the steps of several parameters overlap. What is off is far below the rounding of the parameter.
// A divisor below 2^-126, as an eps of Adam may be, is 0.
template <class Rule, class T>
__device__ __forceinline__ void apply_rule(T& param, T grad, T* state, const T* hyperparameters) {
  if constexpr (same_type<T, float>) {
    constexpr int states = Rule::state_count;
    Coarse value(param), kept[states > 0 ? states : 1], h[Rule::hyperparameter_count];
#pragma unroll
    for (int s = 0; s < states; ++s) kept[s] = Coarse(state[s]);
#pragma unroll
    for (int s = 0; s < Rule::hyperparameter_count; ++s) h[s] = Coarse(hyperparameters[s]);
    Rule::apply(value, Coarse(grad), kept, h);
    param = value.value;
#pragma unroll
    for (int s = 0; s < states; ++s) state[s] = kept[s].value;
  } else {
    Rule::apply(param, grad, state, hyperparameters);
  }
}

}  // namespace gemmlet
