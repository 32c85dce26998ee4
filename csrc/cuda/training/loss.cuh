// Fused training: losses, and the gradients of the last preactivations. Contract: step.cuh.
#pragma once

#include "cuda/losses.cuh"
#include "cuda/training/formulas.cuh"
#include "cuda/training/step.cuh"

namespace gemmlet {

// The loss, and the targets of rows of outputs.
template <class T>
struct Objective {
  int loss;
  T parameter, scale;    // of a row in the gradient
  T keep, spread;        // of row losses: targets are taken times `keep`, and `spread` is added
  const int* labels;     // classes of the rows; or
  const T* values;       // (all samples, out), with no space between the rows,
  const Index* samples;  // and which of them the rows are; or null all:
  T first, second;       // each target of the first `boundary` rows, and of those after them
  int boundary;
  const T* weights;  // what each row counts, in its loss and its gradient; null is 1
  double* losses;    // of each row
  int* correct;      // whether each row's largest output (of a single one, its sign) is the class; or null
};

// Whether output a at place i is predicted before b at place j: NaN counts as the largest.
template <class T>
__device__ __forceinline__ bool comes_first(T a, int i, T b, int j) {
  const bool a_is_nan = a != a, b_is_nan = b != b;
  if (a_is_nan != b_is_nan) return a_is_nan;
  return a > b || (!(a < b) && i < j);
}

// By a warp: whether `label` is the predicted class.
template <class T>
__device__ inline bool is_correct(const T* y, int out, int label) {
  if (out == 1) return (y[0] > T(0)) == label;
  bool other = false;
  for (int j = static_cast<int>(threadIdx.x % 32); j < out; j += 32) other |= comes_first(y[j], j, y[label], label);
  return !__any_sync(0xffffffffu, other);
}

// The targets of a row.
template <class T>
struct Target {
  int label;        // or -1
  const T* values;  // or null
  T all, weight;

  __device__ __forceinline__ Target(const Objective<T>& p, int i, int out)
      : label(p.labels == nullptr ? -1 : p.labels[i]),
        values(p.values == nullptr ? nullptr : p.values + p.samples[i] * out),
        all(i < p.boundary ? p.first : p.second),
        weight(p.weights == nullptr ? T(1) : p.weights[i]) {}

  __device__ __forceinline__ T of_output(int j, int out) const {
    if (values != nullptr) return values[j];
    if (label < 0) return all;
    return out == 1 ? static_cast<T>(label) : static_cast<T>(j == label);
  }
};

// The loss of a row; store(j, gradient) takes each gradient, those beyond the row too.
template <class L, int lanes, class T, class Store, class Stored>
__device__ __forceinline__ T evaluate_row_loss(const Objective<T>& p, const Target<T>& target, const T* y, int out,
                                               Store store, Stored stored) {
  using Lanes = Row<T, Team<lanes>, lanes == 32 ? 0 : 1>;
  if constexpr (L::has_label_form) {
    if (target.values == nullptr && p.spread == T(0)) {
      Lanes row(y, out, true, -infinity<T>(), target.label);
      const typename L::template OfLabel<Lanes> of_row(row, y[target.label], p.scale);
      row.each([&](int j, T v, int) { store(j, j == target.label ? of_row.at_label : of_row.of_other(v)); });
      stored();
      return of_row.loss();
    }
  }
  Lanes row(y, out, true, -infinity<T>());
  const auto write = [&](const auto& of, auto f) {
    of.each([&](int j, T v, int slot) { store(j, f(j, v, slot)); });
    stored();
  };
  const row_losses::Smoothing<T> smoothing{p.keep, p.spread};
  const auto of_output = [&](int j, int) { return j < out ? smoothing.of_target(target.of_output(j, out)) : T(0); };
  return L::of_targets(Operands(row, of_output, write), p.scale);
}

// Row i of the mini-batch, by a warp: y its `out` results, z their preactivations. Its gradient goes through the
// activation to store(j, the gradient of preactivation j); when all of them have, the warp calls stored(). lanes: 16 where
// there are at most as many results, which stay in registers then; else 32.
template <int lanes, class T, class Store, class Stored>
__device__ __forceinline__ void evaluate_row(const Objective<T>& p, const Target<T>& target,
                                             const Activation<T>& activation, int i, const T* y, const T* z, int out,
                                             Store store, Stored stored) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto end = [&](int j, T gradient) {
    T grad[1] = {gradient * target.weight};
    activation.with([&](auto formula) {
      grad[0] = formula.backward(grad[0], formula.needs_x ? z[j] : y[j], activation.parameter);
    });
    store(j, grad[0]);
  };

  double loss = 0;
  if (is_row_loss(p.loss)) {
    const auto end_of = [&](int j, T gradient) {
      if (lane < lanes && j < out) end(j, gradient);
    };
    switch (static_cast<RowLossNumber>(~p.loss)) {
#define GEMMLET_ENTRY(name)                                                               \
  case RowLossNumber::name:                                                               \
    loss = evaluate_row_loss<row_losses::name, lanes>(p, target, y, out, end_of, stored); \
    break;
      GEMMLET_ROW_LOSSES(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
    }
  } else {
    for (int j = lane; j < out; j += 32) {
      T of_output = 0, gradient = 0;
      switch (static_cast<LossNumber>(p.loss)) {
#define GEMMLET_ENTRY(name)                                                                            \
  case LossNumber::name:                                                                               \
    losses::name::evaluate(y[j], target.of_output(j, out), p.parameter, p.scale, of_output, gradient); \
    break;
        GEMMLET_LOSSES(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
      }
      loss += static_cast<double>(of_output);
      end(j, gradient);
    }
    stored();
    loss = reduce_lanes<32>(loss, Sum{});
  }
  const bool correct = p.correct != nullptr && target.label >= 0 && is_correct(y, out, target.label);
  if (lane == 0) {
    p.losses[i] = loss * static_cast<double>(target.weight);
    if (p.correct != nullptr) p.correct[i] = correct;
  }
}

// The gradient of a gradient penalty's only preactivation, of a row's result y or its preactivation z.
template <class T>
__device__ __forceinline__ T gradient_of(const GradientPenalty<T>& p, const Activation<T>& activation, const T* y,
                                         const T* z) {
  T grad[1] = {p.scale};
  activation.with(
      [&](auto formula) { grad[0] = formula.backward(grad[0], formula.needs_x ? *z : *y, activation.parameter); });
  return grad[0];
}

template <class T>
struct Loss {
  const T *y, *z;
  int out;
  Activation<T> activation;
  Objective<T> objective;
  T* grad;
  int rows;
  GradientPenalty<T> penalty;
};

inline constexpr int loss_threads = 128;

// A warp for each row.
template <class T, bool penalized = false>
__global__ void __launch_bounds__(loss_threads, 1) loss(const __grid_constant__ Loss<T> p) {
  const int i = static_cast<int>(blockIdx.x * (loss_threads / 32) + threadIdx.x / 32);
  if (i >= p.rows) return;
  const Index at = static_cast<Index>(i) * row_stride(p.out);
  T* const grad = p.grad + at;
  const T *const y = p.y + at, *const z = p.z == nullptr ? nullptr : p.z + at;
  evaluate_row<32>(
      p.objective, Target<T>(p.objective, i, p.out), p.activation, i, y, z, p.out,
      [=](int j, T gradient) { grad[j] = gradient; }, [] {});
  if constexpr (penalized)
    if (p.penalty.has(i) && threadIdx.x % 32 == 0)
      grad[static_cast<Index>(p.penalty.offset) * row_stride(p.out)] = gradient_of(p.penalty, p.activation, y, z);
}

}  // namespace gemmlet
