// Dense layers: forward y = x w + b, and backward grad_x = grad_y w^T.
//
// Contract
//   Rows of x lie anywhere; rows of y and of the gradients are padded to whole vectors, and their padding is set to 0.
//   Every sum of forward runs over the input features in order; every sum of backward as micro_kernel.h's dots does, or,
//   by tiles, over the outputs in order. Results do not depend on how rows and columns are divided among threads.
#pragma once

#include <algorithm>

#include "cpu/matmul/micro_kernel.h"
#include "cpu/training/buffers.h"
#include "cpu/training/plan.h"

namespace gemmlet {
namespace {

// Rows of the mini-batch that go through the layers together: their activations stay in the second-level cache.
constexpr Index most_task_rows = 48;

// Weights whose rows are further apart than this many bytes are packed before several rows use them: each row is on a
// page of its own, and too many of them share a set of the cache.
constexpr Index packed_from_stride = 4096;
constexpr Index packed_depth = 256;
// Mini-batches of fewer rows go back through a layer by dots: to turn its weights round would cost more.
constexpr Index tiles_from_rows = 16;

// Calls f(first, second, vectors) for the strips of two vectors that cover some columns, at least one vector: the second
// vector begins `second` after the first. At the end they overlap.
template <class T, class F>
inline void for_strips(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  Index j = columns.first;
  for (; j + 2 * n <= columns.end; j += 2 * n) f(j, n, Constant<2>{});
  if (columns.end - j > n)
    f(j, columns.end - n - j, Constant<2>{});
  else if (columns.end > j)
    f(columns.end - n, n, Constant<1>{});
}

// f(first, count) for tiles of nearly equal height that cover `rows`, none higher than the micro-kernel's.
template <class T, class F>
inline void for_tiles(Index rows, F&& f) {
  constexpr int most = TileSizes<T>::rows;
  const Index tiles = pieces(rows, most);
  Index first = 0;
  for (Index t = 0; t < tiles; ++t) {
    const int count = static_cast<int>((rows - first) / (tiles - t));
    with_constant<most>(count, [&](auto height) { f(first, height); });
    first += count;
  }
}

template <class T>
struct Packed {
  alignas(64) T w[packed_depth * 2 * lanes<T>];
  alignas(64) Vec<T> sums[most_task_rows][2];
};

// Some columns of y = x w + b for rows that lie anywhere; after the last column each row of y is set to 0.
template <class T>
void forward_dense(const T* const* x, Index rows, const Layer<T>& layer, Range columns, T* y, Index y_stride) {
  constexpr int n = lanes<T>;
  const Index out = layer.out, stride = layer.stride;
  const T *w = layer.weight.value, *bias = layer.bias.value;
  const bool narrow = out < n;
  thread_local Packed<T> packed;

  const auto finish = [&]<int height, int vectors>(const Vec<T>(&sum)[height][vectors], Index row, Index j,
                                                   Index second) {
    for (int r = 0; r < height; ++r) {
      T* y_r = y + (row + r) * y_stride;
      for (int v = 0; v < vectors; ++v) {
        const Index at = j + v * second;
        store(y_r + at, sum[r][v] + (narrow ? load_part(bias, static_cast<int>(out)) : load(bias + at)));
      }
    }
  };

  const auto strip = [&]<int vectors>(Index j, Index second, Constant<vectors>) {
    if (!narrow && (stride * static_cast<Index>(sizeof(T)) < packed_from_stride || rows < 2 * TileSizes<T>::rows)) {
      for_tiles<T>(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][vectors];
        accumulate(RowsAnywhere<T>{x + row}, Strip<T>{w + j, stride, second}, layer.in, true, sum);
        finish(sum, row, j, second);
      });
      return;
    }
    for (Index k = 0; k < layer.in; k += packed_depth) {
      const Index depth = std::min(packed_depth, layer.in - k);
      for (Index i = 0; i < depth; ++i)
        for (int v = 0; v < vectors; ++v) {
          const T* source = w + (k + i) * stride + j + v * second;
          store(packed.w + (i * vectors + v) * n, narrow ? load_part(source, static_cast<int>(out)) : load(source));
        }
      for_tiles<T>(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][vectors];
        const T* rows_at_k[height];
        for (int r = 0; r < height; ++r) {
          rows_at_k[r] = x[row + r] + k;
          for (int v = 0; v < vectors; ++v) sum[r][v] = packed.sums[row + r][v];
        }
        accumulate(RowsAnywhere<T>{rows_at_k}, Strip<T>{packed.w, vectors * n, n}, depth, k == 0, sum);
        for (int r = 0; r < height; ++r)
          for (int v = 0; v < vectors; ++v) packed.sums[row + r][v] = sum[r][v];
        if (k + depth == layer.in) finish(sum, row, j, second);
      });
    }
  };

  if (narrow)
    strip(0, n, Constant<1>{});
  else
    for_strips<T>(columns, strip);
  if (columns.end == out)
    for (Index r = 0; r < rows; ++r) std::fill(y + r * y_stride + out, y + (r + 1) * y_stride, T(0));
}

// grad_x = grad_y w^T for some rows: by dots, or, if the mini-batch has many rows, by tiles with w turned round.
template <class T>
void backward_by_dots(const T* grad_y, Index y_stride, Index rows, const Layer<T>& layer, T* grad_x, Index x_stride) {
  constexpr int n = lanes<T>, height = std::max(1, TileSizes<T>::rows * TileSizes<T>::vectors * 2 / 3 / n);
  const T *w = layer.weight.value, *end = w + layer.in * layer.stride, *grad_end = grad_y + rows * y_stride;
  for (Index k = 0; k < layer.in; k += n) {
    const int count = static_cast<int>(std::min<Index>(n, layer.in - k));
    const auto some = [&]<int rows_at_once>(Index row, Constant<rows_at_once>) {
      Vec<T> result[rows_at_once];
      dots<rows_at_once>(grad_y + row * y_stride, y_stride, grad_end, w + k * layer.stride, layer.stride, end, count,
                         layer.out, result);
      for (int r = 0; r < rows_at_once; ++r) store(grad_x + (row + r) * x_stride + k, result[r]);
    };
    Index row = 0;
    for (; row + height <= rows; row += height) some(row, Constant<height>{});
    for (; row < rows; ++row) some(row, Constant<1>{});
  }
}

template <class T>
void backward_by_tiles(const T* grad_y, Index y_stride, Index rows, const Layer<T>& layer, T* grad_x, Index x_stride) {
  constexpr int n = lanes<T>;
  thread_local Packed<T> packed;
  for (Index k = 0; k < layer.in; k += 2 * n) {
    const Index inputs = std::min<Index>(2 * n, layer.in - k);
    for (Index j = 0; j < layer.out; j += packed_depth) {
      const Index depth = std::min(packed_depth, layer.out - j);
      pack_strip<T>({layer.weight.value + k * layer.stride + j, depth, inputs, 1, layer.stride}, packed.w);
      for_tiles<T>(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][2];
        T* to = grad_x + row * x_stride + k;
        const auto place = [&](int r, int v) { return to + r * x_stride + v * n; };
        if (j > 0)
          for (int r = 0; r < height; ++r)
            for (int v = 0; v < 2; ++v) sum[r][v] = v * n < inputs ? load(place(r, v)) : Vec<T>{};
        accumulate(Strided<T>{grad_y + row * y_stride + j, y_stride, 1}, Strip<T>{packed.w, 2 * n, n}, depth, j == 0,
                   sum);
        for (int r = 0; r < height; ++r)
          for (int v = 0; v < 2; ++v)
            if (v * n < inputs) store(place(r, v), sum[r][v]);
      });
    }
  }
}

}  // namespace
}  // namespace gemmlet
