// Gradients of weights and biases, with the optimizer in the epilogue: no gradient of a weight is written to memory.
//
// Contract
//   Gradients are summed over the rows of the mini-batch in order, in registers; the optimizer's rule then updates value,
//   states and average in place. Rows of weights are contiguous, `stride` apart; nothing beyond the columns is written.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "cpu/matmul/micro_kernel.h"
#include "cpu/rows.h"
#include "cpu/training/buffers.h"
#include "cpu/training/plan.h"
#include "cpu/training/sparse.h"
#include "formulas/math.h"
// After the functions that it is written on.
#include "formulas/optimizers.h"

namespace gemmlet {
namespace {

// One optimizer update of some columns of one row of a parameter, its gradient being in registers; what of its state and
// average there is, too.
template <class T, class OptimizerRule>
struct Updating {
  Vec<T> numbers[OptimizerRule::scalar_count];
  Vec<T> decay, gain;
  bool idle_without_gradient;

  Updating(const double* scalars, double average_decay)
      : decay(constant<Vec<T>>(average_decay)),
        gain(constant<Vec<T>>(1.0 - average_decay)),
        idle_without_gradient(OptimizerRule::idle_without_gradient(scalars)) {
    for (int s = 0; s < OptimizerRule::scalar_count; ++s) numbers[s] = constant<Vec<T>>(scalars[s]);
  }

  // Has the cache fetch what holds element `at`.
  [[gnu::always_inline]] void prefetch(const Parameter<T>& p, Index at) const {
    __builtin_prefetch(p.value + at, 1);
    for (int s = 0; s < OptimizerRule::state_count; ++s) __builtin_prefetch(p.state[s] + at, 1);
    if (p.average != nullptr) __builtin_prefetch(p.average + at, 1);
  }

  // Vector v begins at `at + v * second` and has n lanes. All is loaded before any is stored, as the vectors may overlap.
  template <int vectors>
  [[gnu::always_inline]] void operator()(const Parameter<T>& p, Index at, Index second, int n,
                                         const Vec<T> (&gradient)[vectors]) const {
    constexpr int states = OptimizerRule::state_count;
    Vec<T> value[vectors], state[vectors][std::max(states, 1)];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      value[v] = load_lanes(p.value + at + v * second, n);
      for (int s = 0; s < states; ++s) state[v][s] = load_lanes(p.state[s] + at + v * second, n);
      OptimizerRule::apply(value[v], gradient[v], state[v], numbers);
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

// As for_strips, for arrays that are read and written: a single vector at the end has n lanes, and overlaps nothing.
template <class T, class F>
inline void for_written_strips(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  Index j = columns.first;
  for (; j + 2 * n <= columns.end; j += 2 * n) f(j, n, lanes<T>, Constant<2>{});
  if (columns.end - j > n)
    f(j, columns.end - n - j, lanes<T>, Constant<2>{});
  else if (columns.end > j)
    f(j, n, static_cast<int>(columns.end - j), Constant<1>{});
}

template <class T, class OptimizerRule>
void update_bias(const Layer<T>& layer, const Rows<T>& grad, Index rows, Range columns,
                 const Updating<T, OptimizerRule>& update) {
  for_written_strips<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
    Vec<T> sum[vectors] = {};
    for (Index i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + load(grad.row(i) + j + v * second);
    update(layer.bias, j, second, n, sum);
  });
}

// Some inputs' weights, in some columns, from the rows x of the mini-batch and the gradients of their preactivations.
template <class T, class OptimizerRule>
void update_dense(const Layer<T>& layer, const T* const* x, const Rows<T>& grad, Index rows, Range inputs,
                  Range columns, const Updating<T, OptimizerRule>& update) {
  constexpr int most = TileSizes<T>::rows;
  const Index tiles = pieces(inputs.size(), most);
  for (Index tile = 0; tile < tiles; ++tile) {
    const Range part = part_of(inputs.size(), tile, tiles);
    const Index k = inputs.first + part.first;
    const int height = static_cast<int>(part.size());
    for_written_strips<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
      // The next strip of the parameter and its state comes from far away, but has the time of this strip's sums.
      // Its first line may be here already, so that it is fetched from its end, a line or two of a row.
      constexpr Index strip_size = 2 * lanes<T>, line = 64 / static_cast<Index>(sizeof(T));
      const Index next = j + strip_size, last = std::min(next + strip_size, columns.end) - 1;
      for (int r = 0; r < height && next <= last; ++r) {
        const Index row = (k + r) * layer.stride;
        update.prefetch(layer.weight, row + last);
        if constexpr (strip_size > line) update.prefetch(layer.weight, row + std::max(next, last - line));
      }
      Sums<T> sums;
      const ColumnsOfRowsAnywhere<T> x_at{x, k};
      const Strip<T> strip{grad.row(0) + j, grad.stride, second};
      with_constant<most>(height, [&]<int rows_at_once>(Constant<rows_at_once>) {
        accumulate(x_at, strip, rows, true, reinterpret_cast<Vec<T>(&)[rows_at_once][vectors]>(sums));
      });
      for (int r = 0; r < height; ++r)
        update(layer.weight, (k + r) * layer.stride + j, second, n,
               reinterpret_cast<const Vec<T>(&)[vectors]>(sums[r * vectors]));
    });
  }
}

// As update_dense, for one input, from the rows of the mini-batch in which it is not 0.
template <int vectors, class T, class Sparse, class OptimizerRule>
[[gnu::always_inline]] inline void update_from(const Sparse& rows, const Layer<T>& layer, Index k, const Rows<T>& grad,
                                               Index j, Index end, const Updating<T, OptimizerRule>& update) {
  constexpr int n = lanes<T>;
  Vec<T> sum[vectors] = {};
  accumulate_sparse(rows, grad.row(0) + j, grad.stride, (vectors - 1) * n, sum);
  const Index at = k * layer.stride + j;
  if (j + vectors * n <= end) {
    constexpr int together = std::min(vectors, 2);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v += together)
      update(layer.weight, at + v * n, n, n, reinterpret_cast<const Vec<T>(&)[together]>(sum[v]));
    return;
  }
  for (int v = 0; v < vectors; ++v) {
    const Vec<T> one[1] = {sum[v]};
    update(layer.weight, at + v * n, n, static_cast<int>(std::clamp<Index>(end - j - v * n, 0, n)), one);
  }
}

template <class T, class Features, class OptimizerRule>
void update_sparse(const Layer<T>& layer, const Features& features, const Rows<T>& grad, Range inputs, Range columns,
                   const Updating<T, OptimizerRule>& update) {
  constexpr Index n = lanes<T>;
  for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
    for (Index k = inputs.first; k < inputs.end; ++k) {
      prefetch_row(layer.weight.value + std::min(k + 4, layer.in - 1) * layer.stride + j, vectors * n);
      const auto rows = features.feature(k);
      if (!rows.empty() || !update.idle_without_gradient)
        update_from<vectors>(rows, layer, k, grad, j, columns.end, update);
    }
  });
}

// The same from a single row, for a rule that is idle without gradient.
template <class T, class Row, class OptimizerRule>
void update_from_row(const Layer<T>& layer, const Row& x, const Rows<T>& grad, Range columns,
                     const Updating<T, OptimizerRule>& update) {
  static constexpr std::int32_t first_row = 0;
  for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
    x.blocks(0, pieces(layer.in, block_features)).for_each([&](Index k, T number) {
      update_from<vectors>(SparseRow<T>{&first_row, &number, 1}, layer, k, grad, j, columns.end, update);
    });
  });
}

// A layer of which some columns of the weights, and of what belongs to them, stand in memory of their own, so that no
// cache line and no guess of a processor's prefetching is shared with who has the other columns. All offsets stay as
// they are but for `stride`. Where there is no memory it is the layer itself.
template <class T>
class OwnColumns {
 public:
  OwnColumns(const Layer<T>& layer, Range columns, bool wanted) : whole_(layer), layer_(layer), columns_(columns) {
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
  OwnColumns(const OwnColumns&) = delete;
  OwnColumns& operator=(const OwnColumns&) = delete;
  ~OwnColumns() {
    if (layer_.stride == whole_.stride) return;
    for_arrays([&](Buffer<T>&, T* to, T*& used) {
      for_rows([&](Index there_at, Index here_at) { std::copy_n(used + here_at, columns_.size(), to + there_at); });
    });
  }
  const Layer<T>& layer() const { return layer_; }

 private:
  // f(memory, the layer's array, what is used) for the weights, their states and their average, as far as they are there.
  template <class F>
  void for_arrays(F&& f) {
    f(own_[0], whole_.weight.value, layer_.weight.value);
    for (int s = 0; s < most_states; ++s)
      if (whole_.weight.state[s] != nullptr) f(own_[1 + s], whole_.weight.state[s], layer_.weight.state[s]);
    if (whole_.weight.average != nullptr) f(own_[1 + most_states], whole_.weight.average, layer_.weight.average);
  }
  template <class F>
  void for_rows(F&& f) const {
    for (Index k = 0; k < whole_.in; ++k) f(k * whole_.stride + columns_.first, k * columns_.size() + columns_.first);
  }

  const Layer<T>& whole_;
  Layer<T> layer_;
  Range columns_;
  Buffer<T> own_[2 + most_states];
};

}  // namespace
}  // namespace gemmlet
