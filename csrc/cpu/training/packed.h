// Dense layers for all rows of a mini-batch at once: matmuls with packed panels, a group of which fits the third-level cache.
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

// Where a thread packs: a group of panels of at most max_k steps, and packed_kc steps of a tile of x; and the sums of all
// tiles of a group.
template <class T>
struct Workspace {
  T *panels, *tile, *sums;

  Workspace(KeptMemory& memory, Index max_k)
      : panels(memory.take<T>(std::max<Index>(tuning::packed_bytes / sizeof(T), max_k * nr<T>))),
        tile(memory.take<T>(tuning::packed_kc * PackedRows<T>::step)),
        sums(memory.take<T>(tuning::mr * ceil_div(max_k, nr<T>) * nr<T>)) {}
};

// f(first, columns) for groups of columns of w whose panels fit the workspace.
template <class T, class F>
void for_groups(const View<T>& w, F&& f) {
  const Index panel = w.rows * nr<T> * static_cast<Index>(sizeof(T));
  const Index group = std::max<Index>(1, tuning::packed_bytes / panel) * nr<T>;
  for (Index first = 0; first < w.columns; first += group) f(first, std::min(group, w.columns - first));
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

// y = x w + bias, or without bias. finish(row, rows, column, columns) follows while these results are in the cache.
template <class T, class Finish>
void multiply_packed(const Strided<T>& x, Index rows, const View<T>& w, const T* bias, T* y, Index y_stride,
                     const Workspace<T>& workspace, const Finish& finish) {
  constexpr int n = lanes<T>;
  const Index kc = w.rows;
  T* const packed = workspace.panels;
  for_groups(w, [&](Index first, Index columns) {
    // The first tile packs the panels that it reads, unless w is transposed or its rows are on a page each; what is left
    // of a row is packed before.
    const bool near = w.column_stride == 1 && w.row_stride * static_cast<Index>(sizeof(T)) < tuning::pack_min_stride;
    const Index on_the_way = near ? columns / nr<T> * nr<T> : 0;
    pack(w.block(0, kc, first + on_the_way, columns - on_the_way), packed + on_the_way * kc);
    for_tiles(rows, [&]<int height>(Index row, Constant<height>) {
      const Strided<T> x_tile{x.data + row * x.row_stride, x.row_stride, x.step_stride};
      for_packed_panels(packed, kc, columns, [&]<int vectors>(Index j, const Panel<T>& panel, Constant<vectors>) {
        T* const to = y + row * y_stride + first + j;
        for (int r = 0; r < height; ++r)
          for (Index v = 0; v < vectors; ++v) __builtin_prefetch(to + r * y_stride + v * n, 1);
        Vec<T> sum[height][vectors];
        if (vectors == 2 && row == 0 && j < on_the_way)
          accumulate(x_tile, PackingPanel<T>{w.data + first + j, w.row_stride, packed + j * kc}, kc, sum);
        else
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

// y^T = w^T x^T for few rows of x: w^T is contiguous along K and read in place, once for two vectors of rows.
template <class T>
void multiply_transposed(const Strided<T>& x, Index rows, const View<T>& w, T* y, Index y_stride,
                         const Workspace<T>& workspace) {
  constexpr int n = lanes<T>;
  const Index kc = w.rows;
  const T* const packed = workspace.panels;
  const View<T> x_transposed{x.data, kc, rows, 1, x.row_stride};
  for_groups(x_transposed, [&](Index first, Index group) {
    pack(x_transposed.block(0, kc, first, group), workspace.panels);
    for_tiles(w.columns, [&]<int height>(Index column, Constant<height>) {
      const Strided<T> w_tile{w.data + column * w.column_stride, w.column_stride, 1};
      for_packed_panels(packed, kc, group, [&]<int vectors>(Index j, const Panel<T>& panel, Constant<vectors>) {
        Vec<T> sum[height][vectors];
        accumulate(w_tile, panel, kc, sum);
        for (int v = 0; v < vectors; ++v)
          for (int c = 0; c < height; c += n) {
            Vec<T> square[n] = {};
            const int count = std::min(n, height - c);
            for (int i = 0; i < count; ++i) square[i] = sum[c + i][v];
            gemmlet::transpose(square);
            const Index i = first + j + v * n, there = std::min<Index>(n, rows - i);
            for (Index r = 0; r < there; ++r) store_lanes(y + (i + r) * y_stride + column + c, square[r], count);
          }
      });
    });
  });
}

template <class T, class UpdateRule>
void prefetch_tile(const Layer<T>& layer, Index row, int rows, Index column, Index columns,
                   const UpdateEpilogue<T, UpdateRule>& update) {
  for (int r = 0; r < rows; ++r)
    for (Index j = 0; j < columns; j += 64 / static_cast<Index>(sizeof(T)))
      update.prefetch(layer.weight, (row + r) * layer.stride + column + j);
}

// update_dense with packed operands.
template <class T, class UpdateRule>
void update_packed(const Layer<T>& layer, const T* const* x, const Rows<T>& grad, Index rows, Range inputs,
                   Range columns, const Workspace<T>& workspace, const UpdateEpilogue<T, UpdateRule>& update) {
  constexpr Index n = lanes<T>, step = PackedRows<T>::step;
  T *const packed = workspace.panels, *const tile = workspace.tile;
  const View<T> grad_y{grad.row(0) + columns.first, rows, columns.size(), grad.stride, 1};
  for_groups(grad_y, [&](Index first, Index group) {
    pack(grad_y.block(0, rows, first, group), packed);
    for_blocks(inputs.size(), tuning::mr, [&](Index at, int height) {
      const Index k = inputs.first + at;
      const auto sums = [&](Index j) { return workspace.sums + j * tuning::mr; };
      for_blocks(rows, tuning::packed_kc, [&](Index row, Index kc) {
        for (Index i = 0; i < kc; ++i) {
          for (Index v = 0; v < step; v += n)
            store(tile + i * step + v,
                  load_lanes(x[row + i] + k + v, static_cast<int>(std::clamp<Index>(layer.in - k - v, 0, n))));
        }
        // What is packed next, the next K block or the next inputs, comes from memory while this is reduced: each row is on
        // a page of its own, which the hardware prefetcher does not follow.
        const bool last = row + kc == rows;
        const Index next_row = last ? 0 : row + kc, count = std::min(kc, rows - next_row);
        const Index next_k = std::min(k + (last ? height : 0) + step, layer.in) - 1;
        const Index share = ceil_div(count, ceil_div(group, nr<T>));  // of a panel
        for_packed_panels(packed, rows, group, [&]<int vectors>(Index j, Panel<T> panel, Constant<vectors>) {
          const Index next = j / nr<T> * share, next_end = std::min(count, next + share);
          for (Index i = next; i < next_end; ++i) __builtin_prefetch(x[next_row + i] + next_k);
          panel.w += row * nr<T>;
          const Index column = columns.first + first + j;
          if (last) prefetch_tile(layer, k, height, column, std::min<Index>(group - j, nr<T>), update);
          with_constant<tuning::mr>(height, [&]<int rows_at_once>(Constant<rows_at_once>) {
            auto& total = reinterpret_cast<Vec<T>(&)[rows_at_once][vectors]>(*sums(j));
            row == 0 ? accumulate(PackedRows<T>{tile}, panel, kc, total)
                     : accumulate<true>(PackedRows<T>{tile}, panel, kc, total);
          });
        });
      });
      // Row by row, along parameters and states: the hardware prefetcher follows these.
      for (int r = 0; r < height; ++r)
        for_packed_panels(packed, rows, group, [&]<int vectors>(Index j, const Panel<T>&, Constant<vectors>) {
          const auto* const sum = reinterpret_cast<const Vec<T>*>(sums(j)) + r * vectors;
          const Index to = (k + r) * layer.stride + columns.first + first + j, rest = group - j;
          if (rest >= vectors * n)
            update(layer.weight, to, n, static_cast<int>(n), reinterpret_cast<const Vec<T>(&)[vectors]>(*sum));
          else
            for (Index v = 0; v < vectors; ++v)
              update(layer.weight, to + v * n, n, static_cast<int>(std::min(n, rest - v * n)),
                     reinterpret_cast<const Vec<T>(&)[1]>(sum[v]));
        });
    });
  });
}

}  // namespace
}  // namespace gemmlet
