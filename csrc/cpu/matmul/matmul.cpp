// y = activation(x @ w + bias), any strides, with the activation applied to each tile while it is in registers.
//
// Contract
//   y and z are contiguous (rows of x by columns of w) and overlap nothing. K = 0 gives activation(bias).
//   y is divided into tasks of rows and columns. Shapes and strides alone choose the kernel and with it the order of the
//   reduction, never the number of threads or the position of an element:
//   - tiles: K blocks of at most tuning::kc, each reduced sequentially, then added up in order. With few columns and an x
//     that lies column by column, y^T = w^T x^T is computed, in the same order.
//   - dot products: few rows of x or a single column of w, both contiguous along K, so that nothing need be transposed.
//     Sums in the order of the dot-product kernel.
//   - small K: writing y dominates. Sums in the order of tiles.
//   w is packed, one K block at a time, unless fewer than 2 * mr rows use it. x is packed only for many columns, which
//   would each read it again.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/matmul/micro_kernel.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "formulas/activations.h"
#include "formulas/math.h"

namespace gemmlet {
namespace {

template <class T>
struct Output;

// How final results are stored: two functions of an activation, called with a vector and with a tile. They alone are compiled
// for each activation; the rest of this file once.
template <class T>
struct Epilogue {
  // n lanes of a row: added to the earlier K blocks, unless first, plus the bias, copied to z, through the activation.
  void (*put)(const Output<T>& out, Index row, Index column, Vec<T> value, int n, bool first);
  // Whole vectors of a tile: `put` for all of them, with the formula inlined once.
  void (*finish_tile)(const Output<T>& out, Index row, Index column, const Vec<T>* sums, int rows, int vectors,
                      bool first);
};

// The output of a task, from its first row and column on. z and bias may be null.
template <class T>
struct Output {
  T *y, *z;
  const T* bias;
  Index row_stride;
  Epilogue<T> epilogue;
  T parameter;
  bool plain;  // no activation, bias or z: results are stored as they are

  Output at(Index row, Index column) const {
    Output part = *this;
    const Index offset = row * row_stride + column;
    part.y += offset;
    if (z != nullptr) part.z += offset;
    if (bias != nullptr) part.bias += column;
    return part;
  }
  void put(Index row, Index column, Vec<T> value, int n, bool first) const {
    epilogue.put(*this, row, column, value, n, first);
  }
};

template <class T, class F>
void put(const Output<T>& out, Index row, Index column, Vec<T> value, int n, bool first) {
  const Index offset = row * out.row_stride + column;
  if (!first) value = load_lanes(out.y + offset, n) + value;
  if (out.bias != nullptr) value = value + load_lanes(out.bias + column, n);
  if (out.z != nullptr) store_lanes(out.z + offset, value, n);
  store_lanes(out.y + offset, F::forward(value, splat<T>(out.parameter)), n);
}

template <class T, class F>
void finish_tile(const Output<T>& out, Index row, Index column, const Vec<T>* sums, int rows, int vectors, bool first) {
  const Index row_stride = out.row_stride, at = row * row_stride + column;
  T* y = out.y + at;
  T* z = out.z == nullptr ? nullptr : out.z + at;
  const T* bias = out.bias == nullptr ? nullptr : out.bias + column;
  const Vec<T> parameter = splat<T>(out.parameter);
  for (int r = 0; r < rows; ++r, y += row_stride)
#pragma GCC unroll 1
    for (int v = 0; v < vectors; ++v) {
      const int j = v * lanes<T>;
      Vec<T> value = *sums++;
      if (!first) value = load(y + j) + value;
      if (bias != nullptr) value = value + load(bias + j);
      if (z != nullptr) store(z + r * row_stride + j, value);
      store(y + j, F::forward(value, parameter));
    }
}

// The largest multiple of `unit`, up to `limit`, that divides n into at least `pieces`.
Index block_size(Index n, Index unit, Index limit, Index pieces) {
  const Index even = ceil_div(ceil_div(n, pieces), unit) * unit;
  return std::clamp(even, unit, limit);
}

// Packing buffers of a thread, allocated at first use. The row stride of x is an odd number of cache lines: no shared sets.
template <class T>
struct Buffers {
  static constexpr Index x_stride = tuning::kc + 64 / sizeof(T);
  Buffer<T> w, x, transposed;

  static T* get(Buffer<T>& memory, Index count) {
    if (memory == nullptr) memory = space<T>(count);
    return memory.get();
  }
};

// Packs x into contiguous rows.
template <class T>
[[gnu::noinline]] void copy_rows(const View<T>& x, T* copy, Index stride) {
  constexpr int n = lanes<T>;
  Index row = 0;
  if (x.row_stride == 1)
    for (; row + n <= x.rows; row += n) {
      Index k = 0;
      for (; k + n <= x.columns; k += n) {
        Vec<T> square[n];
        for (int i = 0; i < n; ++i) {
          const T* from = x.data + row + (k + i) * x.column_stride;
          square[i] = load(from);
          __builtin_prefetch(from + 2 * n * x.column_stride + n - 1);
        }
        transpose(square);
        for (int i = 0; i < n; ++i) store(copy + (row + i) * stride + k, square[i]);
      }
      for (; k < x.columns; ++k)
        for (int i = 0; i < n; ++i) copy[(row + i) * stride + k] = x.data[row + i + k * x.column_stride];
    }
  for (; row < x.rows; ++row) {
    const T* from = x.data + row * x.row_stride;
    T* to = copy + row * stride;
    if (x.column_stride == 1)
      std::copy_n(from, x.columns, to);
    else
      for (Index k = 0; k < x.columns; ++k) to[k] = from[k * x.column_stride];
  }
}

// Whole vectors of a tile between K blocks, or without an epilogue: added to y, or stored.
template <class T>
void add_tile(const Vec<T>* sums, int rows, int vectors, T* y, Index row_stride, bool first) {
  for (int r = 0; r < rows; ++r, y += row_stride, sums += vectors)
    for (int v = 0; v < vectors; ++v) {
      T* to = y + v * lanes<T>;
      store(to, first ? sums[v] : load(to) + sums[v]);
    }
}

template <class T>
void store_tile(const Vec<T>* sums, int rows, int vectors, const Output<T>& out, Index row, Index column, Index columns,
                bool first, bool last) {
  if (columns - column >= vectors * lanes<T>) {
    if (last && !out.plain)
      out.epilogue.finish_tile(out, row, column, sums, rows, vectors, first);
    else
      add_tile<T>(sums, rows, vectors, out.y + row * out.row_stride + column, out.row_stride, first);
    return;
  }
  const bool plain = !last || out.plain;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      const Index j = column + v * lanes<T>;
      if (j >= columns) break;
      const Vec<T> sum = sums[r * vectors + v];
      const int n = static_cast<int>(std::min<Index>(lanes<T>, columns - j));
      T* const y = out.y + (row + r) * out.row_stride + j;
      if (plain)
        store_lanes(y, first ? sum : load_lanes(y, n) + sum, n);
      else
        out.put(row + r, j, sum, n, first);
    }
}

// Prefetches where a tile will be stored while it is computed. Its rows rarely begin with a cache line: NumPy aligns arrays
// to 16 bytes.
template <class T>
void prefetch_tile(const Output<T>& out, Index row, int rows, Index column) {
  for (int r = 0; r < rows; ++r) {
    const T* y = out.y + (row + r) * out.row_stride + column;
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + nr<T> - 1, 1);
  }
}

// Elements from the last vector-aligned address to p.
template <class T>
Index misalignment(const T* p) {
  return static_cast<Index>(reinterpret_cast<std::uintptr_t>(p) % sizeof(Vec<T>) / sizeof(T));
}

// Some rows of a small-K matmul, vector by vector along y. Vectors of the first row are aligned, so that only the first and
// the last, which overlap their neighbours, lie in two cache lines.
template <int small_k, int rows, class T>
[[gnu::always_inline]] inline void small_k_rows(const View<T>& x, Index row, const View<T>& w, T* y, Index row_stride) {
  constexpr int n = lanes<T>;
  Vec<T> x_r[rows][small_k];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int k = 0; k < small_k; ++k) x_r[r][k] = splat<T>(x.data[(row + r) * x.row_stride + k * x.column_stride]);
  const auto put = [&](Index j, int count) GEMMLET_INLINE_LAMBDA {
    Vec<T> sum[rows] = {};
#pragma GCC unroll 16
    for (int k = 0; k < small_k; ++k) {
      const Vec<T> w_k = load_lanes(w.data + k * w.row_stride + j, count);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r] = fma(x_r[r][k], w_k, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) store_lanes(y + r * row_stride + j, sum[r], count);
  };
  if (w.columns < n) return put(0, static_cast<int>(w.columns));
  put(0, n);
  for (Index j = n - misalignment(y); j + n <= w.columns; j += n) put(j, n);
  put(w.columns - n, n);
}

template <class T>
void small_k_sums(View<T> x, View<T> w, T* y, Index row_stride) {
  with_constant<tuning::small_k_max>(static_cast<int>(x.columns), [&]<int small_k>(Constant<small_k>) {
    constexpr Index block = tuning::small_k_block;
    Index row = 0;
    for (; row + block <= x.rows; row += block)
      small_k_rows<small_k, static_cast<int>(block)>(x, row, w, y + row * row_stride, row_stride);
    for (; row < x.rows; ++row) small_k_rows<small_k, 1>(x, row, w, y + row * row_stride, row_stride);
  });
}

template <class T>
void compute_small_k(View<T> x, View<T> w, const Output<T>& out) {
  if (out.plain) return small_k_sums(x, w, out.y, out.row_stride);
  for (Index i = 0; i < x.rows; ++i) {
    T* const y = out.y + i * out.row_stride;
    small_k_sums(x.block(i, 1, 0, x.columns), w, y, out.row_stride);
    for (Index j = 0; j < w.columns; j += lanes<T>) {
      const int n = static_cast<int>(std::min<Index>(lanes<T>, w.columns - j));
      out.put(i, j, load_lanes(y + j, n), n, true);
    }
  }
}

// Stores y, whose contiguous rows are the columns of out.
template <class T>
void store_transposed(const T* y, Index columns, Index rows, const Output<T>& out) {
  constexpr Index n = lanes<T>;
  for (Index j = 0; j < columns; j += n) {
    const int count = static_cast<int>(std::min(n, columns - j));
    for (Index i = 0; i < rows; i += n) {
      const int height = static_cast<int>(std::min(n, rows - i));
      Vec<T> square[n] = {};
      for (int c = 0; c < count; ++c) square[c] = load_lanes(y + (j + c) * rows + i, height);
      transpose(square);
      for (int r = 0; r < height; ++r) out.put(i + r, j, square[r], count, true);
    }
  }
}

template <class T>
void compute_tiles(View<T> x, View<T> w, const Output<T>& out) {
  Buffers<T>& buffers = of_this_thread<Buffers<T>>();
  if (x.columns > 0 && x.columns <= tuning::small_k_max) {
    if (w.column_stride == 1) return compute_small_k(x, w, out);
    constexpr Index n = lanes<T>, most = tuning::nc * tuning::kc / tuning::small_k_max / n * n - n;
    for_blocks(w.columns, most, [&](Index first, Index columns) {
      const Output<T> part = out.at(0, first);
      // Aligned as y is.
      T* const rows = Buffers<T>::get(buffers.w, tuning::nc * tuning::kc) + misalignment(part.y);
      const Index stride = ceil_div(columns, n) * n;
      copy_rows(w.block(0, w.rows, first, columns), rows, stride);
      compute_small_k<T>(x, {rows, w.rows, columns, stride, 1}, part);
    });
    return;
  }
  if (x.row_stride == 1 && x.column_stride != 1 && x.rows >= nr<T> && w.columns < nr<T> && w.columns % lanes<T> != 0) {
    // y^T = w^T x^T: vectors run along the rows of x, and are full.
    T* const y = Buffers<T>::get(buffers.transposed, tuning::task_mc * nr<T>);
    compute_tiles<T>(w.transposed(), x.transposed(), {y, nullptr, nullptr, x.rows, {}, 0, true});
    return store_transposed(y, w.columns, x.rows, out);
  }
  Sums<T> sums;
  // w is not packed if few rows use it, and not up to nr columns either where partial vectors are as fast.
  const bool direct = w.column_stride == 1 && (x.rows < 2 * tuning::mr || (masks_are_cheap && w.columns <= nr<T>));
  const Index direct_columns = !direct ? 0 : masks_are_cheap ? w.columns : w.columns / lanes<T> * lanes<T>;
  // x is packed where enough columns use it: it may need transposing, or its rows share few cache sets.
  const bool copied = !direct && w.columns >= (x.column_stride == 1 ? tuning::pack_x_min_columns
                                                                    : tuning::pack_transposed_x_min_columns);
  constexpr Index nc = tuning::nc;
  T* const packed = Buffers<T>::get(buffers.w, nc * tuning::kc);
  // K blocks of nearly equal size.
  const Index max_kc = block_size(x.columns, nr<T>, tuning::kc, std::max<Index>(1, ceil_div(x.columns, tuning::kc)));
  Index k = 0;
  do {
    const Index kc = std::min(max_kc, x.columns - k);
    const bool first = k == 0, last = k + kc >= x.columns;
    const auto x_at = [&](Index row) {
      return Strided<T>{x.data + row * x.row_stride + k * x.column_stride, x.row_stride, x.column_stride};
    };
    for_blocks(direct ? x.rows : 0, tuning::mr, [&](Index row, int height) {
      Index j = 0;
      const auto tile = [&]<Width width>(const auto& panel) {
        const int vectors = vectors_in<T>(width, height);
        prefetch_tile(out, row, height, j);
        compute_tile<width, T>(height, x_at(row), panel, kc, sums);
        store_tile<T>(sums, height, vectors, out, row, j, w.columns, first, last);
        j += vectors * lanes<T>;
      };
      const T* const w_k = w.data + k * w.row_stride;
      const auto whole_panels = [&]<Width width>() {
        while (direct_columns - j >= vectors_in<T>(width, height) * lanes<T>)
          tile.template operator()<width>(Panel<T>{w_k + j, w.row_stride, lanes<T>});
      };
      whole_panels.template operator()<Width::wide>();
      whole_panels.template operator()<Width::usual>();
      if constexpr (masks_are_cheap) {
        const int rest = static_cast<int>(direct_columns - j), count = rest % lanes<T>;
        if (rest > lanes<T>)
          tile.template operator()<Width::usual>(PartialPanel<T, 1>{w_k + j, w.row_stride, count});
        else if (count > 0)
          tile.template operator()<Width::one>(PartialPanel<T, 0>{w_k + j, w.row_stride, count});
        else if (rest > 0)
          tile.template operator()<Width::one>(Panel<T>{w_k + j, w.row_stride, lanes<T>});
      } else {
        whole_panels.template operator()<Width::one>();
      }
    });
    Strided<T> x_block = x_at(0);
    if (copied) {
      T* const x_copy = Buffers<T>::get(buffers.x, tuning::task_mc * Buffers<T>::x_stride);
      copy_rows(x.block(0, x.rows, k, kc), x_copy, Buffers<T>::x_stride);
      x_block = {x_copy, Buffers<T>::x_stride, 1};
    }
    for (Index block = direct_columns; block < w.columns; block += nc) {
      const Index columns = std::min<Index>(nc, w.columns - block);
      pack(w.block(k, kc, block, columns), packed);
      for_blocks(x.rows, tuning::mr, [&](Index row, int height) {
        const Strided<T> x_tile{x_block.data + row * x_block.row_stride, x_block.row_stride, x_block.step_stride};
        for (Index j = 0; j < columns; j += nr<T>) {
          prefetch_tile(out, row, height, block + j);
          const Panel<T> panel{packed + j * kc, nr<T>, lanes<T>};
          const bool one = columns - j <= lanes<T>;
          one ? compute_tile<Width::one, T>(height, x_tile, panel, kc, sums)
              : compute_tile<Width::usual, T>(height, x_tile, panel, kc, sums);
          store_tile<T>(sums, height, one ? 1 : tuning::nr_vectors, out, row, block + j, w.columns, first, last);
        }
      });
    }
    k += kc;
  } while (k < x.columns);
}

// The end of the memory of a view whose column_stride (or row_stride) is 1.
template <class T>
const T* end_of(const T* data, Index lines, Index stride, Index kc) {
  return data + std::max<Index>(0, (lines - 1) * stride) + kc;
}

// Not inlined: one copy for all epilogues.
template <int rows, class T>
[[gnu::noinline]] void dot_products_call(const T* a, Index a_stride, const T* a_end, const T* b, Index b_stride,
                                         const T* b_end, int count, Index kc, Vec<T> (&result)[rows]) {
  dot_products<rows>(a, a_stride, a_end, b, b_stride, b_end, count, kc, result);
}

// Rows of x and columns of w are contiguous. Vectors of results run along the columns of w; along the rows of x if y has a
// single column. (A task may have a single column of a wider y.)
template <class T>
void compute_dot_products(View<T> x, View<T> w, const Output<T>& out) {
  constexpr int n = lanes<T>;
  const T *x_end = end_of(x.data, x.rows, x.row_stride, x.columns),
          *w_end = end_of(w.data, w.columns, w.column_stride, w.rows);
  if (out.row_stride == 1) {
    Output<T> column = out;
    column.bias = nullptr;
    for (Index i = 0; i < x.rows; i += n) {
      const int count = static_cast<int>(std::min<Index>(n, x.rows - i));
      Vec<T> result[1];
      dot_products_call<1>(w.data, Index{0}, w_end, x.data + i * x.row_stride, x.row_stride, x_end, count, x.columns,
                           result);
      // All rows have the same bias.
      if (out.bias != nullptr) result[0] = result[0] + splat<T>(*out.bias);
      column.put(i, 0, result[0], count, true);
    }
    return;
  }
  const auto row_by_row = [&](Index first_row, Index end_row, Index first_column) {
    for (Index j = first_column; j < w.columns; j += n) {
      const int count = static_cast<int>(std::min<Index>(n, w.columns - j));
      for (Index i = first_row; i < end_row; ++i) {
        Vec<T> result[1];
        dot_products_call<1>(x.data + i * x.row_stride, Index{0}, x_end, w.data + j * w.column_stride, w.column_stride,
                             w_end, count, x.columns, result);
        out.put(i, j, result[0], count, true);
      }
    }
  };
  // Tiles of dot products, then the remaining columns.
  Index row = 0;
  const auto by_dot_product_tiles = [&]<int tile_rows>(Constant<tile_rows>) {
    constexpr int tile_columns = std::min(tuning::dot_product_block / tile_rows, n);
    const Index first_row = row, whole = w.columns / tile_columns * tile_columns;
    if (whole > 0) row += (x.rows - row) / tile_rows * tile_rows;
    for (Index j = 0; j < whole; j += tile_columns)
      for (Index i = first_row; i < row; i += tile_rows) {
        T block[tile_rows * tile_columns];
        dot_product_tile<tile_rows, tile_columns>(x.data + i * x.row_stride, x.row_stride, x_end,
                                                  w.data + j * w.column_stride, w.column_stride, w_end, x.columns,
                                                  block);
        for (int r = 0; r < tile_rows; ++r)
          out.put(i + r, j, load_lanes(block + r * tile_columns, tile_columns), tile_columns, true);
      }
    if (whole < w.columns) row_by_row(first_row, row, whole);
  };
  by_dot_product_tiles(Constant<4>{});
  by_dot_product_tiles(Constant<2>{});
  row_by_row(row, x.rows, 0);
}

template <class T>
void dispatch(View<T> x, View<T> w, const Output<T>& out) {
  const double work = static_cast<double>(x.rows) * static_cast<double>(w.columns) * static_cast<double>(x.columns);
  const Index threads = work < tuning::matmul_parallel_work ? 1 : get_num_threads();
  const bool use_dot_products =
      x.column_stride == 1 && w.row_stride == 1 && x.columns > 1 &&
      (w.columns == 1 || (x.rows <= tuning::dot_product_max_rows && w.column_stride != 1 &&
                          (x.columns > tuning::small_k_max || x.rows < tuning::small_k_min_rows)));
  // Tall outputs are divided by rows: each task packs the part of w that it uses.
  const bool tall = x.rows >= 2 * w.columns || w.columns < 2 * threads * nr<T>;
  const Index task_m = block_size(x.rows, tuning::mr, tuning::task_mc, tall ? threads : 1);
  const Index task_n = block_size(w.columns, nr<T>, w.columns + nr<T>, tall ? 1 : threads);
  const Index across = ceil_div(w.columns, task_n);
  if (w.columns == 1 && x.row_stride == 1 && out.bias == nullptr && out.z == nullptr && x.rows >= lanes<T>) {
    // y^T = w^T x^T: the columns of x are contiguous.
    Output<T> row = out;
    row.row_stride = x.rows;
    return dispatch<T>({w.data, 1, w.rows, 0, w.row_stride}, {x.data, x.columns, x.rows, x.column_stride, 1}, row);
  }
  const auto task = [&](Index index) {
    const Index i = index / across * task_m, j = index % across * task_n;
    const View<T> x_part = x.block(i, std::min(task_m, x.rows - i), 0, x.columns);
    const View<T> w_part = w.block(0, w.rows, j, std::min(task_n, w.columns - j));
    if (use_dot_products)
      compute_dot_products(x_part, w_part, out.at(i, j));
    else
      compute_tiles(x_part, w_part, out.at(i, j));
  };
  const Index tasks = ceil_div(x.rows, task_m) * across;
  if (threads > 1)
    parallel_for(tasks, task);
  else
    for (Index t = 0; t < tasks; ++t) task(t);
}

}  // namespace

template <class T>
void linear(View<T> x, View<T> w, const T* bias, int activation, T parameter, T* y, T* z) {
  if (x.rows == 0 || w.columns == 0) return;
#define GEMMLET_ENTRY(name) {&put<T, activations::name>, &finish_tile<T, activations::name>},
  static constexpr Epilogue<T> epilogues[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
  static constexpr Epilogue<T> none = {&put<T, activations::identity>, &finish_tile<T, activations::identity>};
#undef GEMMLET_ENTRY
  const bool plain = activation < 0 && bias == nullptr && z == nullptr;
  dispatch<T>(x, w, {y, z, bias, w.columns, activation < 0 ? none : epilogues[activation], parameter, plain});
}

template void linear(View<float>, View<float>, const float*, int, float, float*, float*);
template void linear(View<double>, View<double>, const double*, int, double, double*, double*);

}  // namespace gemmlet
