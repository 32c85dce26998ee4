// Dense layers: forward y = x w + b, and backward grad_x = grad_y w^T.
//
// Contract
//   Rows of x are given by pointers. Rows of y and of the gradients are padded; forward zeroes the padding of y.
//   Every forward reduction is sequential over the input features. A backward reduction has the order of the
//   dot-product kernel, or is sequential over the outputs, by the size of the mini-batch alone.
#pragma once

#include <algorithm>

#include "cpu/matmul/micro_kernel.h"
#include "cpu/threads.h"
#include "cpu/training/buffers.h"
#include "cpu/training/plan.h"

namespace gemmlet {
namespace {

// f(first, height) for tiles of nearly equal height, at most mr, that cover the rows.
template <class F>
inline void for_tiles(Index rows, F&& f) {
  for_blocks(rows, tuning::mr,
             [&](Index first, int count) { with_constant<tuning::mr>(count, [&](auto height) { f(first, height); }); });
}

// Of a thread; the executor makes it before the members of a team wait for each other.
template <class T>
struct PackedPanel {
  alignas(64) T w[tuning::packed_kc * 2 * lanes<T>];
  alignas(64) Vec<T> sums[tuning::row_block][2];
};

// A range of columns of y = x w + b; with the last column, the padding of y.
template <class T>
void forward_dense(const T* const* x, Index rows, const Layer<T>& layer, Range columns, T* y, Index y_stride) {
  constexpr int n = lanes<T>;
  const Index out = layer.out, stride = layer.stride;
  const T *w = layer.weight.value, *bias = layer.bias.value;
  const bool narrow = out < n;
  PackedPanel<T>& packed = of_this_thread<PackedPanel<T>>();

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

  for_panels<T>(columns, [&]<int vectors>(Index first, Index second, int part, Constant<vectors>) {
    // Nothing of y is updated in place: a single vector overlaps the one before, if there is one.
    const Index j = narrow ? first : first - (n - part);
    if (!narrow && (stride * static_cast<Index>(sizeof(T)) < tuning::pack_min_stride || rows < 2 * tuning::mr)) {
      for_tiles(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][vectors];
        accumulate(RowPointers<T>{x + row}, Panel<T>{w + j, stride, second}, layer.in, sum);
        finish(sum, row, j, second);
      });
      return;
    }
    for (Index k = 0; k < layer.in; k += tuning::packed_kc) {
      const Index kc = std::min(tuning::packed_kc, layer.in - k);
      for (Index i = 0; i < kc; ++i)
        for (int v = 0; v < vectors; ++v) {
          const T* source = w + (k + i) * stride + j + v * second;
          store(packed.w + (i * vectors + v) * n, narrow ? load_part(source, static_cast<int>(out)) : load(source));
        }
      for_tiles(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][vectors];
        const T* rows_at_k[height];
        for (int r = 0; r < height; ++r) {
          rows_at_k[r] = x[row + r] + k;
          for (int v = 0; v < vectors; ++v) sum[r][v] = packed.sums[row + r][v];
        }
        const RowPointers<T> x_k{rows_at_k};
        const Panel<T> panel{packed.w, vectors * n, n};
        k == 0 ? accumulate(x_k, panel, kc, sum) : accumulate<true>(x_k, panel, kc, sum);
        for (int r = 0; r < height; ++r)
          for (int v = 0; v < vectors; ++v) packed.sums[row + r][v] = sum[r][v];
        if (k + kc == layer.in) finish(sum, row, j, second);
      });
    }
  });
  if (columns.end == out)
    for (Index r = 0; r < rows; ++r) std::fill(y + r * y_stride + out, y + (r + 1) * y_stride, T(0));
}

// y += one-hot rows times the rows of w of the classes. Few plans have them: inlined, they made others slower.
template <class T>
[[gnu::noinline]] void add_class_rows(const Index* labels, Index rows, const Layer<T>& layer, Range columns, T* y,
                                      Index y_stride) {
  for (Index r = 0; r < rows; ++r) {
    const T* const w = layer.weight.value + (layer.in + labels[r]) * layer.stride;
    for (Index j = columns.first; j < columns.end; ++j) y[r * y_stride + j] += w[j];
  }
}

// grad_x = grad_y w^T for some rows: by the dot-product kernel, or by tiles with packed panels of w^T.
template <class T>
void backward_dot_products(const T* grad_y, Index y_stride, Index rows, const Layer<T>& layer, T* grad_x,
                           Index x_stride) {
  constexpr int n = lanes<T>, height = std::max(1, tuning::mr * tuning::nr_vectors * 2 / 3 / n);
  const T *w = layer.weight.value, *end = w + layer.in * layer.stride, *grad_end = grad_y + rows * y_stride;
  for (Index k = 0; k < layer.in; k += n) {
    const int count = static_cast<int>(std::min<Index>(n, layer.in - k));
    const auto some = [&]<int rows_at_once>(Index row, Constant<rows_at_once>) {
      Vec<T> result[rows_at_once];
      dot_products<rows_at_once>(grad_y + row * y_stride, y_stride, grad_end, w + k * layer.stride, layer.stride, end,
                                 count, layer.out, result);
      for (int r = 0; r < rows_at_once; ++r) store(grad_x + (row + r) * x_stride + k, result[r]);
    };
    Index row = 0;
    for (; row + height <= rows; row += height) some(row, Constant<height>{});
    for (; row < rows; ++row) some(row, Constant<1>{});
  }
}

template <class T>
void backward_tiles(const T* grad_y, Index y_stride, Index rows, const Layer<T>& layer, T* grad_x, Index x_stride) {
  constexpr int n = lanes<T>;
  PackedPanel<T>& packed = of_this_thread<PackedPanel<T>>();
  for (Index k = 0; k < layer.in; k += 2 * n) {
    const Index inputs = std::min<Index>(2 * n, layer.in - k);
    for (Index j = 0; j < layer.out; j += tuning::packed_kc) {
      const Index kc = std::min(tuning::packed_kc, layer.out - j);
      pack_panel<T>({layer.weight.value + k * layer.stride + j, kc, inputs, 1, layer.stride}, packed.w);
      for_tiles(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][2];
        T* to = grad_x + row * x_stride + k;
        const auto place = [&](int r, int v) { return to + r * x_stride + v * n; };
        const Strided<T> grad_j{grad_y + row * y_stride + j, y_stride, 1};
        const Panel<T> panel{packed.w, 2 * n, n};
        if (j == 0) {
          accumulate(grad_j, panel, kc, sum);
        } else {
          for (int r = 0; r < height; ++r)
            for (int v = 0; v < 2; ++v) sum[r][v] = v * n < inputs ? load(place(r, v)) : Vec<T>{};
          accumulate<true>(grad_j, panel, kc, sum);
        }
        for (int r = 0; r < height; ++r)
          for (int v = 0; v < 2; ++v)
            if (v * n < inputs) store(place(r, v), sum[r][v]);
      });
    }
  }
}

}  // namespace
}  // namespace gemmlet
