// grad_w and grad_b with the optimizer in the epilogue: no weight gradient is written to memory.
//
// Contract
//   Gradients are reduced in registers, sequentially over the rows of the mini-batch; the optimizer then updates values,
//   states and averages in place. Nothing outside the given rows and columns of a parameter is written.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>

#include "cpu/rows.h"
#include "cpu/training/sparse.h"
#include "formulas/math.h"
// After the functions that it is written on.
#include "formulas/optimizers.h"

namespace gemmlet {
namespace {

template <class UpdateRule>
inline constexpr bool is_adjusted = requires { UpdateRule::limit; };

// What changes gradients before the rule has them, and which parameters decay.
struct Adjustment {
  double l2, l1;  // of the penalty: of weights alone
  double limit;
  bool decays_biases;

  // Whether it takes optimizers::adjusted, instead of a larger weight decay at most.
  bool needs_rule() const { return l1 != 0 || limit < std::numeric_limits<double>::infinity(); }

  // The hyperparameters of a rule, with all this.
  template <class UpdateRule>
  void fill(const double* hyperparameters, double* of_weights, double* of_biases) const {
    constexpr int count = UpdateRule::hyperparameter_count - (is_adjusted<UpdateRule> ? 3 : 0);
    std::copy_n(hyperparameters, count, of_weights);
    std::copy_n(hyperparameters, count, of_biases);
    if constexpr (is_adjusted<UpdateRule>) {
      for (double* const h : {of_weights, of_biases}) {
        h[UpdateRule::l2_of_penalty] = h == of_weights ? l2 : 0.0;
        h[UpdateRule::l1] = h == of_weights ? l1 : 0.0;
        h[UpdateRule::limit] = limit;
      }
    } else {
      of_weights[UpdateRule::l2] += l2;
    }
    if (!decays_biases) UpdateRule::without_decay(of_biases);
  }
};

// The optimizer update of some columns of one row of a parameter, its states and its average; the gradient is in registers.
template <class T, class UpdateRule>
struct UpdateEpilogue {
  Vec<T> hyperparameters[UpdateRule::hyperparameter_count];
  Vec<T> decay, gain;
  bool idle_without_gradient;  // an average moves always

  UpdateEpilogue(const double* values, double average_decay, bool has_average)
      : decay(constant<Vec<T>>(average_decay)),
        gain(constant<Vec<T>>(1.0 - average_decay)),
        idle_without_gradient(!has_average && UpdateRule::idle_without_gradient(values)) {
    for (int s = 0; s < UpdateRule::hyperparameter_count; ++s) hyperparameters[s] = constant<Vec<T>>(values[s]);
  }

  // Prefetches element `at` of the parameter, its states and its average.
  [[gnu::always_inline]] void prefetch(const Parameter<T>& p, Index at) const {
    __builtin_prefetch(p.value + at, 1);
    for (int s = 0; s < UpdateRule::state_count; ++s) __builtin_prefetch(p.state[s] + at, 1);
    if (p.average != nullptr) __builtin_prefetch(p.average + at, 1);
  }

  // Vector v begins at `at + v * second` and has n lanes. All loads precede all stores: the vectors may overlap.
  template <int vectors>
  [[gnu::always_inline]] void operator()(const Parameter<T>& p, Index at, Index second, int n,
                                         const Vec<T> (&gradient)[vectors]) const {
    if constexpr (is_adjusted<UpdateRule>)
      update_by_call(p, at, second, n, gradient);
    else
      update(p, at, second, n, gradient);
  }

 private:
  // Adjusted rules are rare, and would double the code.
  template <int vectors>
  [[gnu::noinline]] void update_by_call(const Parameter<T>& p, Index at, Index second, int n,
                                        const Vec<T> (&gradient)[vectors]) const {
    n == lanes<T> ? update(p, at, second, lanes<T>, gradient) : update(p, at, second, n, gradient);
  }

  template <int vectors>
  [[gnu::always_inline]] void update(const Parameter<T>& p, Index at, Index second, int n,
                                     const Vec<T> (&gradient)[vectors]) const {
    constexpr int states = UpdateRule::state_count;
    Vec<T> value[vectors], state[vectors][std::max(states, 1)];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      value[v] = load_lanes(p.value + at + v * second, n);
      for (int s = 0; s < states; ++s) state[v][s] = load_lanes(p.state[s] + at + v * second, n);
      UpdateRule::apply(value[v], gradient[v], state[v], hyperparameters);
    }
    if (p.average != nullptr) {
      Vec<T> average[vectors];
      for (int v = 0; v < vectors; ++v)
        average[v] = optimizers::moving_average(load_lanes(p.average + at + v * second, n), value[v], decay, gain);
      for (int v = 0; v < vectors; ++v) store_lanes(p.average + at + v * second, average[v], n);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      store_lanes(p.value + at + v * second, value[v], n);
      for (int s = 0; s < states; ++s) store_lanes(p.state[s] + at + v * second, state[v][s], n);
    }
  }
};

template <class T, class UpdateRule>
void update_bias(const Layer<T>& layer, const Rows<T>& grad, Index rows, Range columns,
                 const UpdateEpilogue<T, UpdateRule>& update) {
  for_panels<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
    Vec<T> sum[vectors] = {};
    for (Index i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + load(grad.row(i) + j + v * second);
    update(layer.bias, j, second, n, sum);
  });
}

// The weights of a range of inputs and columns, from the rows x of the mini-batch and the gradients of the preactivations.
template <class T, class UpdateRule>
void update_dense(const Layer<T>& layer, const T* const* x, const Rows<T>& grad, Index rows, Range inputs,
                  Range columns, const UpdateEpilogue<T, UpdateRule>& update) {
  for_blocks(inputs.size(), tuning::mr, [&](Index first, int height) {
    const Index k = inputs.first + first;
    for_panels<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
      // The next panel of the parameter and its states comes from memory while this panel is reduced. Its first line may be
      // in the cache already, so the prefetch covers its end: one or two lines of each row.
      constexpr Index panel_size = 2 * lanes<T>, line = 64 / static_cast<Index>(sizeof(T));
      const Index next = j + panel_size, last = std::min(next + panel_size, columns.end) - 1;
      for (int r = 0; r < height && next <= last; ++r) {
        const Index row = (k + r) * layer.stride;
        update.prefetch(layer.weight, row + last);
        if constexpr (panel_size > line) update.prefetch(layer.weight, row + std::max(next, last - line));
      }
      Sums<T> sums;
      const ColumnsOfRowPointers<T> x_at{x, k};
      const Panel<T> panel{grad.row(0) + j, grad.stride, second};
      with_constant<tuning::mr>(height, [&]<int rows_at_once>(Constant<rows_at_once>) {
        accumulate(x_at, panel, rows, reinterpret_cast<Vec<T>(&)[rows_at_once][vectors]>(sums));
      });
      for (int r = 0; r < height; ++r)
        update(layer.weight, (k + r) * layer.stride + j, second, n,
               reinterpret_cast<const Vec<T>(&)[vectors]>(sums[r * vectors]));
    });
  });
}

// update_dense for the rows of the weights of some classes: the inputs are one-hot rows.
template <class T, class UpdateRule>
void update_class_rows(const Layer<T>& layer, const Index* labels, const Rows<T>& grad, Index rows, Range classes,
                       Range columns, const UpdateEpilogue<T, UpdateRule>& update) {
  for (Index c = classes.first; c < classes.end; ++c)
    for_panels<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
      Vec<T> sum[vectors] = {};
      for (Index i = 0; i < rows; ++i)
        if (labels[i] == c)
          for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + load(grad.row(i) + j + v * second);
      update(layer.weight, (layer.in + c) * layer.stride + j, second, n, sum);
    });
}

// update_dense for one input: gradient(v) is that of vector v of the columns from j on, the last of which may extend beyond
// the end.
template <int vectors, class T, class UpdateRule, class F>
[[gnu::always_inline]] inline void update_row(const Layer<T>& layer, Index k, Index j, Index end,
                                              const UpdateEpilogue<T, UpdateRule>& update, F&& gradient) {
  constexpr int n = lanes<T>, whole = (vectors - 1) / 2 * 2;
  const Index at = k * layer.stride + j;
  const auto update_two = [&](int v) GEMMLET_INLINE_LAMBDA {
    const Vec<T> two[2] = {gradient(v), gradient(v + 1)};
    update(layer.weight, at + v * n, n, n, two);
  };
#pragma GCC unroll 4
  for (int v = 0; v < whole; v += 2) update_two(v);
  if (vectors - whole == 2 && j + vectors * n <= end) return update_two(whole);
#pragma GCC unroll 2
  for (int v = whole; v < vectors; ++v) {
    const Vec<T> one[1] = {gradient(v)};
    update(layer.weight, at + v * n, n, static_cast<int>(std::clamp<Index>(end - j - v * n, 0, n)), one);
  }
}

// update_dense for features that are listed by the rows of the mini-batch in which they are not 0.
template <class T, class Features, class UpdateRule>
void update_sparse(const Layer<T>& layer, const Features& features, const Rows<T>& grad, Range inputs, Range columns,
                   const UpdateEpilogue<T, UpdateRule>& update) {
  constexpr Index n = lanes<T>;
  for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
    alignas(64) T sum[vectors * n];
    for (Index k = inputs.first; k < inputs.end; ++k) {
      prefetch_row(layer.weight.value + std::min(k + 4, layer.in - 1) * layer.stride + j, vectors * n);
      const auto rows = features.feature(k);
      if (rows.empty() && update.idle_without_gradient) continue;
      add_sparse<vectors>(rows, grad.row(0) + j, grad.stride, (vectors - 1) * n, sum, true, static_cast<T*>(nullptr));
      update_row<vectors>(layer, k, j, columns.end, update, [&](int v) { return load(sum + v * n); });
    }
  });
}

// update_sparse for a mini-batch of one row, where nothing changes without a gradient.
template <class T, class Row, class UpdateRule>
void update_from_row(const Layer<T>& layer, const Row& x, const Rows<T>& grad, Range columns,
                     const UpdateEpilogue<T, UpdateRule>& update) {
  constexpr Index n = lanes<T>;
  for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
    x.blocks(0, ceil_div(layer.in, block_features)).for_each([&](Index k, T value) {
      update_row<vectors>(layer, k, j, columns.end, update,
                          [&](int v) { return fma(splat<T>(value), load(grad.row(0) + j + v * n), Vec<T>{}); });
    });
  });
}

// A layer with a thread's columns of the weights, states and average in memory of the thread's own: no cache line, and no
// line that the hardware prefetcher fetches, is shared with the owner of the other columns. Offsets keep their meaning,
// only `stride` differs. If the allocation fails it is the layer itself.
template <class T>
class ThreadColumns {
 public:
  ThreadColumns(const Layer<T>& layer, Range columns, bool wanted) : whole_(layer), layer_(layer), columns_(columns) {
    const std::size_t count = static_cast<std::size_t>(columns.first + layer.in * columns.size());
    if (!wanted) return;
    for_arrays([&](Buffer<T>& own, T*, T*&) {
      own.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64}, std::nothrow)));
    });
    bool there = true;
    for_arrays([&](Buffer<T>& own, T*, T*&) { there = there && own != nullptr; });
    if (!there) return;
    layer_.stride = columns.size();
    for_arrays([&](Buffer<T>& own, T* from, T*& used) {
      used = own.get();
      for_rows([&](Index there_at, Index here_at) { std::copy_n(from + there_at, columns_.size(), used + here_at); });
    });
  }
  ThreadColumns(const ThreadColumns&) = delete;
  ThreadColumns& operator=(const ThreadColumns&) = delete;
  ~ThreadColumns() {
    if (layer_.stride == whole_.stride) return;
    for_arrays([&](Buffer<T>&, T* to, T*& used) {
      for_rows([&](Index there_at, Index here_at) { std::copy_n(used + here_at, columns_.size(), to + there_at); });
    });
  }
  const Layer<T>& layer() const { return layer_; }

 private:
  // f(buffer, the layer's array, the array in use) for the weights and what exists of their states and average.
  template <class F>
  void for_arrays(F&& f) {
    f(own_[0], whole_.weight.value, layer_.weight.value);
    for (int s = 0; s < max_states; ++s)
      if (whole_.weight.state[s] != nullptr) f(own_[1 + s], whole_.weight.state[s], layer_.weight.state[s]);
    if (whole_.weight.average != nullptr) f(own_[1 + max_states], whole_.weight.average, layer_.weight.average);
  }
  template <class F>
  void for_rows(F&& f) const {
    for (Index k = 0; k < whole_.in; ++k) f(k * whole_.stride + columns_.first, k * columns_.size() + columns_.first);
  }

  const Layer<T>& whole_;
  Layer<T> layer_;
  Range columns_;
  Buffer<T> own_[2 + max_states];
};

}  // namespace
}  // namespace gemmlet
