// Dense layers for all rows of a mini-batch at once: matmuls with packed panels, a group of which fits the second-level cache.
//
// Contract
//   Rows of x, y and of the gradients are padded. Every reduction is one sequential chain, over all of K: the order, and so
//   the bits, of dense.h and update.h. Any part of the results may be computed alone.
#pragma once

#include <algorithm>

#include "cpu/training/dense.h"
#include "cpu/training/update.h"

namespace gemmlet {
namespace {

// Rows of a tile packed step by step: `step` elements each, of which a tile uses the first.
template <class T>
struct PackedRows {
  static constexpr Index step = ceil_div(tuning::mr, lanes<T>) * lanes<T>;
  const T* data;

  struct Steps {
    const T* now;
    void enter() {}
    T at(int row) const { return now[row]; }
    void next() { now += step; }
  };
  template <int>
  Steps steps() const {
    return {data};
  }
};

// Where a thread packs: a group of panels of at most max_k steps, and a tile of x of as many.
template <class T>
struct Workspace {
  Buffer<T> panels, tile;

  explicit Workspace(Index max_k)
      : panels(space<T>(std::max<Index>(tuning::packed_bytes / sizeof(T), max_k * nr<T>))),
        tile(space<T>(max_k * PackedRows<T>::step)) {}
};

// f(first, columns) for groups of columns of w, which are in the workspace's panels then.
template <class T, class F>
void for_packed_groups(const View<T>& w, const Workspace<T>& workspace, F&& f) {
  const Index panel = w.rows * nr<T> * static_cast<Index>(sizeof(T));
  const Index group = std::max<Index>(1, tuning::packed_bytes / panel) * nr<T>;
  for (Index first = 0; first < w.columns; first += group) {
    const Index columns = std::min(group, w.columns - first);
    pack(w.block(0, w.rows, first, columns), workspace.panels.get());
    f(first, columns);
  }
}

// f(j, panel, vectors) for the panels of a group: a last one of at most `lanes` columns has one vector.
template <class T, class F>
[[gnu::always_inline]] inline void for_packed_panels(const T* packed, Index kc, Index columns, F&& f) {
  for (Index j = 0; j < columns; j += nr<T>) {
    const Panel<T> panel{packed + j * kc, nr<T>, lanes<T>};
    if (columns - j > lanes<T>)
      f(j, panel, Constant<2>{});
    else
      f(j, panel, Constant<1>{});
  }
}

// y = x w + bias, or without bias. finish(row, rows, column, columns) follows while these results are in the first-level
// cache.
template <class T, class Finish>
void multiply_packed(const Strided<T>& x, Index rows, const View<T>& w, const T* bias, T* y, Index y_stride,
                     const Workspace<T>& workspace, const Finish& finish) {
  constexpr int n = lanes<T>;
  const Index kc = w.rows;
  const T* const packed = workspace.panels.get();
  for_packed_groups(w, workspace, [&](Index first, Index columns) {
    for_tiles(rows, [&]<int height>(Index row, Constant<height>) {
      const Strided<T> x_tile{x.data + row * x.row_stride, x.row_stride, x.step_stride};
      for_packed_panels(packed, kc, columns, [&]<int vectors>(Index j, const Panel<T>& panel, Constant<vectors>) {
        T* const to = y + row * y_stride + first + j;
        for (int r = 0; r < height; ++r)
          for (Index v = 0; v < vectors; ++v) __builtin_prefetch(to + r * y_stride + v * n, 1);
        Vec<T> sum[height][vectors];
        accumulate(x_tile, panel, kc, sum);
        for (int v = 0; v < vectors; ++v) {
          const int part = static_cast<int>(std::min<Index>(n, columns - j - v * n));
          const Vec<T> added = bias == nullptr ? Vec<T>{} : load_lanes(bias + first + j + v * n, part);
          for (int r = 0; r < height; ++r)
            store(to + r * y_stride + v * n, bias == nullptr ? sum[r][v] : sum[r][v] + added);
        }
      });
      finish(row, Index{height}, first, columns);
    });
  });
}

// update_dense with packed operands.
template <class T, class UpdateRule>
void update_packed(const Layer<T>& layer, const T* const* x, const Rows<T>& grad, Index rows, Range inputs,
                   Range columns, const Workspace<T>& workspace, const UpdateEpilogue<T, UpdateRule>& update) {
  constexpr Index n = lanes<T>, step = PackedRows<T>::step;
  T *const packed = workspace.panels.get(), *const x_tile = workspace.tile.get();
  const View<T> grad_y{grad.row(0) + columns.first, rows, columns.size(), grad.stride, 1};
  for_packed_groups(grad_y, workspace, [&](Index first, Index group) {
    for_blocks(inputs.size(), tuning::mr, [&](Index at, int height) {
      const Index k = inputs.first + at;
      for (Index i = 0; i < rows; ++i)
        for (Index v = 0; v < step; v += n)
          store(x_tile + i * step + v,
                load_lanes(x[i] + k + v, static_cast<int>(std::clamp<Index>(layer.in - k - v, 0, n))));
      for_packed_panels(packed, rows, group, [&]<int vectors>(Index j, const Panel<T>& panel, Constant<vectors>) {
        const Index column = columns.first + first + j, rest = group - j;
        for (int r = 0; r < height; ++r)
          for (Index v = 0; v < std::min(rest, nr<T> + Index{0}); v += 64 / static_cast<Index>(sizeof(T)))
            update.prefetch(layer.weight, (k + r) * layer.stride + column + v);
        Sums<T> sums;
        with_constant<tuning::mr>(height, [&]<int rows_at_once>(Constant<rows_at_once>) {
          accumulate(PackedRows<T>{x_tile}, panel, rows, reinterpret_cast<Vec<T>(&)[rows_at_once][vectors]>(sums));
        });
        for (int r = 0; r < height; ++r) {
          const Index to = (k + r) * layer.stride + column;
          const Vec<T>* sum = sums + r * vectors;
          if (rest >= vectors * n) {
            update(layer.weight, to, n, static_cast<int>(n), reinterpret_cast<const Vec<T>(&)[vectors]>(*sum));
          } else {
            for (Index v = 0; v < vectors; ++v)
              update(layer.weight, to + v * n, n, static_cast<int>(std::min(n, rest - v * n)),
                     reinterpret_cast<const Vec<T>(&)[1]>(sum[v]));
          }
        }
      });
    });
  });
}

}  // namespace
}  // namespace gemmlet
