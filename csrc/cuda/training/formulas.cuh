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

}  // namespace gemmlet
