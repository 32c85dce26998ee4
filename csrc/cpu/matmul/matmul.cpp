// y = activation(x @ w + bias), any strides, with the activation applied to each tile while it is in registers.
//
// Contract
//   y and z are contiguous (rows of x by columns of w) and overlap nothing. k = 0 gives activation(bias).
//   y is cut into tasks, each some rows by some columns. Which way a product is computed, and in which order a sum is
//   taken, follows from shapes and strides alone, never from the number of threads or from where an element stands:
//   - tiles: runs of at most TileSizes::depth, each summed from its first to its last product, then added up in order.
//     A product of few columns, whose x lies column by column, is computed turned round, in the same order.
//   - dots: where x or w has few lines and both are contiguous along k, so that nothing need be turned round first.
//     The order is that of micro_kernel.h.
//   - thin: where k is so short that y is most of the work. The order is that of tiles.
//   w is packed, run by run, unless a tile or two of rows is all that uses it. x is read where it lies, but for products
//   of many columns, each of which would read it again.
#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/matmul/micro_kernel.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "formulas/activations.h"
#include "formulas/math.h"

namespace gemmlet {
namespace {

// What a tile becomes on its way out.
template <class T>
struct Plain {
  Vec<T> operator()(Vec<T> v) const { return v; }
};

template <class T, class F>
struct Activated {
  Vec<T> parameter;
  Vec<T> operator()(Vec<T> v) const { return F::forward(v, parameter); }
};

// Where results go; a block of columns begins at column 0 here. z and bias may be null.
template <class T, class Epilogue>
struct Output {
  T *y, *z;
  const T* bias;
  Index row_stride;
  Epilogue epilogue;

  Output at(Index row, Index column) const {
    const Index offset = row * row_stride + column;
    return {y + offset, z == nullptr ? nullptr : z + offset, bias == nullptr ? nullptr : bias + column, row_stride,
            epilogue};
  }

  // Whether nothing is left to do with a sum.
  bool plain() const { return std::is_same_v<Epilogue, Plain<T>> && bias == nullptr && z == nullptr; }

  // n lanes of a row: added to what earlier runs of k left there; the last run adds the bias, keeps z, and applies the
  // epilogue.
  // A function of its own: with a formula in it, it is long.
  [[gnu::noinline]] void put(Index row, Index column, Vec<T> value, int n, bool first, bool last) const {
    const Index offset = row * row_stride + column;
    if (!first) value = load_lanes(y + offset, n) + value;
    if (last) {
      if (bias != nullptr) value = value + load_lanes(bias + column, n);
      if (z != nullptr) store_lanes(z + offset, value, n);
      value = epilogue(value);
    }
    store_lanes(y + offset, value, n);
  }
};

Index blocks(Index n, Index size) { return (n + size - 1) / size; }

// The largest multiple of `unit`, up to `limit`, that cuts n into at least `pieces`.
Index block_size(Index n, Index unit, Index limit, Index pieces) {
  const Index even = blocks(blocks(n, pieces), unit) * unit;
  return std::clamp(even, unit, limit);
}

// f(first, count) for blocks of nearly equal size, at most `size`.
template <class F>
inline void for_blocks(Index n, Index size, F&& f) {
  const Index count = blocks(n, size);
  for (Index i = 0; i < count; ++i) f(n * i / count, n * (i + 1) / count - n * i / count);
}

// f(first, count) for tiles of nearly equal height, so that none is left with a single row.
template <class T, class F>
inline void for_tiles(Index rows, F&& f) {
  if (rows == 0) return;
  const Index count = (rows + TileSizes<T>::rows - 1) / TileSizes<T>::rows, height = rows / count,
              taller = rows % count;
  Index first = 0;
  for (Index t = 0; t < taller; ++t, first += height + 1) f(first, static_cast<int>(height + 1));
  for (; first < rows; first += height) f(first, static_cast<int>(height));
}

// Made when first needed, and kept by the thread. Rows of x are an odd number of cache lines apart: not all in one set.
template <class T>
struct Buffers {
  using Sizes = TileSizes<T>;
  static constexpr Index x_stride = Sizes::depth + 64 / sizeof(T);
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  using Memory = std::unique_ptr<T[], Free>;
  Memory w, wide_w, x, turned;

  static T* get(Memory& memory, Index count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (memory == nullptr) memory = Memory(static_cast<T*>(::operator new[](bytes, std::align_val_t{64})));
    return memory.get();
  }
};

// Copies x to contiguous rows.
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

// Whole vectors of a tile that is not finished: added to y, or stored there.
template <class T>
void add_tile(const Vec<T>* sums, int rows, int vectors, T* y, Index row_stride, bool first) {
  for (int r = 0; r < rows; ++r, y += row_stride, sums += vectors)
    for (int v = 0; v < vectors; ++v) {
      T* to = y + v * lanes<T>;
      store(to, first ? sums[v] : load(to) + sums[v]);
    }
}

// Whole vectors of a tile that is: as Output::put, the formula being here once.
template <class T, class O>
void finish_tile(const Vec<T>* sums, int rows, int vectors, const O& out, Index row, Index column, bool first) {
  const Index at = row * out.row_stride + column;
  T* y = out.y + at;
  T* z = out.z == nullptr ? nullptr : out.z + at;
  const T* bias = out.bias == nullptr ? nullptr : out.bias + column;
  for (int r = 0; r < rows; ++r, y += out.row_stride)
#pragma GCC unroll 1
    for (int v = 0; v < vectors; ++v) {
      const int j = v * lanes<T>;
      Vec<T> value = *sums++;
      if (!first) value = load(y + j) + value;
      if (bias != nullptr) value = value + load(bias + j);
      if (z != nullptr) store(z + r * out.row_stride + j, value);
      store(y + j, out.epilogue(value));
    }
}

template <class T, class O>
void store_tile(const Vec<T>* sums, int rows, int vectors, const O& out, Index row, Index column, Index columns,
                bool first, bool last) {
  if (columns - column >= vectors * lanes<T>) {
    if (last && !out.plain())
      finish_tile<T>(sums, rows, vectors, out, row, column, first);
    else
      add_tile<T>(sums, rows, vectors, out.y + row * out.row_stride + column, out.row_stride, first);
    return;
  }
  const bool plain = !last || out.plain();
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
        out.put(row + r, j, sum, n, first, last);
    }
}

// What a tile will be added to or stored at is on its way while the tile is computed. Its rows rarely begin with a cache
// line: NumPy aligns arrays to 16 bytes.
template <class T, class O>
void prefetch_tile(const O& out, Index row, int rows, Index column) {
  for (int r = 0; r < rows; ++r) {
    const T* y = out.y + (row + r) * out.row_stride + column;
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + TileSizes<T>::columns - 1, 1);
  }
}

// How many elements p stands after the place of a whole vector.
template <class T>
Index misplaced(const T* p) {
  return static_cast<Index>(reinterpret_cast<std::uintptr_t>(p) % sizeof(Vec<T>) / sizeof(T));
}

// Some rows of sums of so few products that to store them is most of the work: vector after vector, as y lies. Vectors of
// its first row begin at multiples of their size, so that none lies in two cache lines, but the first and the last of
// a row, which overlap their neighbours.
template <int depth, int rows, class T>
[[gnu::always_inline]] inline void thin_rows(const View<T>& x, Index row, const View<T>& w, T* y, Index row_stride) {
  constexpr int n = lanes<T>;
  Vec<T> x_r[rows][depth];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int k = 0; k < depth; ++k) x_r[r][k] = splat<T>(x.data[(row + r) * x.row_stride + k * x.column_stride]);
  const auto put = [&] [[gnu::always_inline]] (Index j, int count) {
    Vec<T> sum[rows] = {};
#pragma GCC unroll 16
    for (int k = 0; k < depth; ++k) {
      const Vec<T> w_k = load_lanes(w.data + k * w.row_stride + j, count);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r] = fma(x_r[r][k], w_k, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) store_lanes(y + r * row_stride + j, sum[r], count);
  };
  if (w.columns < n) return put(0, static_cast<int>(w.columns));
  put(0, n);
  for (Index j = n - misplaced(y); j + n <= w.columns; j += n) put(j, n);
  put(w.columns - n, n);
}

template <class T>
void thin_sums(View<T> x, View<T> w, T* y, Index row_stride) {
  with_constant<TileSizes<T>::thin_depth>(static_cast<int>(x.columns), [&]<int depth>(Constant<depth>) {
    constexpr Index block = TileSizes<T>::thin_block;
    Index row = 0;
    for (; row + block <= x.rows; row += block)
      thin_rows<depth, static_cast<int>(block)>(x, row, w, y + row * row_stride, row_stride);
    for (; row < x.rows; ++row) thin_rows<depth, 1>(x, row, w, y + row * row_stride, row_stride);
  });
}

template <class T, class O>
void compute_thin(View<T> x, View<T> w, const O& out) {
  if (out.plain()) return thin_sums(x, w, out.y, out.row_stride);
  for (Index i = 0; i < x.rows; ++i) {
    T* const y = out.y + i * out.row_stride;
    thin_sums({x.data + i * x.row_stride, 1, x.columns, x.row_stride, x.column_stride}, w, y, out.row_stride);
    for (Index j = 0; j < w.columns; j += lanes<T>) {
      const int n = static_cast<int>(std::min<Index>(lanes<T>, w.columns - j));
      out.put(i, j, load_lanes(y + j, n), n, true, true);
    }
  }
}

template <class T>
View<T> turned(View<T> a) {
  return {a.data, a.columns, a.rows, a.column_stride, a.row_stride};
}

// Columns of out are the rows of y, which are contiguous.
template <class T, class O>
void store_turned(const T* y, Index columns, Index rows, const O& out) {
  constexpr Index n = lanes<T>;
  for (Index j = 0; j < columns; j += n) {
    const int count = static_cast<int>(std::min(n, columns - j));
    for (Index i = 0; i < rows; i += n) {
      const int height = static_cast<int>(std::min(n, rows - i));
      Vec<T> square[n] = {};
      for (int c = 0; c < count; ++c) square[c] = load_lanes(y + (j + c) * rows + i, height);
      transpose(square);
      for (int r = 0; r < height; ++r) out.put(i + r, j, square[r], count, true, true);
    }
  }
}

template <class T, class O>
void compute_by_tiles(View<T> x, View<T> w, const O& out) {
  using Sizes = TileSizes<T>;
  thread_local Buffers<T> buffers;
  if (x.columns > 0 && x.columns <= Sizes::thin_depth) {
    if (w.column_stride == 1) return compute_thin(x, w, out);
    constexpr Index n = lanes<T>, most = Sizes::block_columns * Sizes::depth / Sizes::thin_depth / n * n - n;
    for_blocks(w.columns, most, [&](Index first, Index columns) {
      const O part = out.at(0, first);
      // Vectors of it begin where those of y do.
      T* const rows = Buffers<T>::get(buffers.w, Sizes::block_columns * Sizes::depth) + misplaced(part.y);
      const Index stride = blocks(columns, n) * n;
      copy_rows<T>({w.data + first * w.column_stride, w.rows, columns, w.row_stride, w.column_stride}, rows, stride);
      compute_thin<T>(x, {rows, w.rows, columns, stride, 1}, part);
    });
    return;
  }
  if (x.row_stride == 1 && x.column_stride != 1 && x.rows >= Sizes::columns && w.columns < Sizes::columns &&
      w.columns % lanes<T> != 0) {
    // The product turned round: its vectors run along x's columns, and are full.
    T* const y = Buffers<T>::get(buffers.turned, Sizes::task_rows * Sizes::columns);
    compute_by_tiles<T>(turned(w), turned(x), Output<T, Plain<T>>{y, nullptr, nullptr, x.rows, {}});
    return store_turned(y, w.columns, x.rows, out);
  }
  Sums<T> sums;
  // Whole vectors of w are used where they lie if few rows need them; parts, too, where that costs no more.
  const bool direct =
      w.column_stride == 1 && (x.rows < 2 * Sizes::rows || (masks_are_cheap && w.columns <= Sizes::columns));
  const Index direct_columns = !direct ? 0 : masks_are_cheap ? w.columns : w.columns / lanes<T> * lanes<T>;
  // Where a copy of x is used often enough, it pays: x may be turned round, or its rows share few sets of the cache.
  const bool copied =
      !direct && w.columns >= (x.column_stride == 1 ? Sizes::copied_from_columns : Sizes::turned_from_columns);
  const Index block_columns = copied ? Sizes::wide_columns : Sizes::block_columns;
  T* const x_copy = copied ? Buffers<T>::get(buffers.x, Sizes::block_rows * Buffers<T>::x_stride) : nullptr;
  T* const packed = Buffers<T>::get(copied ? buffers.wide_w : buffers.w, block_columns * Sizes::depth);
  // Runs of nearly equal depth.
  const Index run =
      block_size(x.columns, Sizes::columns, Sizes::depth, std::max<Index>(1, blocks(x.columns, Sizes::depth)));
  Index k = 0;
  do {
    const Index depth = std::min(run, x.columns - k);
    const bool first = k == 0, last = k + depth >= x.columns;
    const auto x_at = [&](Index row) {
      return Strided<T>{x.data + row * x.row_stride + k * x.column_stride, x.row_stride, x.column_stride};
    };
    for_tiles<T>(direct ? x.rows : 0, [&](Index row, int height) {
      Index j = 0;
      const auto tile = [&]<Width width>(const auto& strip) {
        const int vectors = vectors_in<T>(width, height);
        prefetch_tile<T>(out, row, height, j);
        compute_tile<width, T>(height, x_at(row), strip, depth, sums);
        store_tile<T>(sums, height, vectors, out, row, j, w.columns, first, last);
        j += vectors * lanes<T>;
      };
      const T* const w_k = w.data + k * w.row_stride;
      const auto whole_strips = [&]<Width width>() {
        while (direct_columns - j >= vectors_in<T>(width, height) * lanes<T>)
          tile.template operator()<width>(Strip<T>{w_k + j, w.row_stride, lanes<T>});
      };
      whole_strips.template operator()<Width::wide>();
      whole_strips.template operator()<Width::usual>();
      if constexpr (masks_are_cheap) {
        const int rest = static_cast<int>(direct_columns - j), count = rest % lanes<T>;
        if (rest > lanes<T>)
          tile.template operator()<Width::usual>(PartOfStrip<T, 1>{w_k + j, w.row_stride, count});
        else if (count > 0)
          tile.template operator()<Width::one>(PartOfStrip<T, 0>{w_k + j, w.row_stride, count});
        else if (rest > 0)
          tile.template operator()<Width::one>(Strip<T>{w_k + j, w.row_stride, lanes<T>});
      } else {
        whole_strips.template operator()<Width::one>();
      }
    });
    for (Index block = direct_columns; block < w.columns; block += block_columns) {
      const Index columns = std::min<Index>(block_columns, w.columns - block);
      pack<T>({w.data + k * w.row_stride + block * w.column_stride, depth, columns, w.row_stride, w.column_stride},
              packed);
      for_blocks(x.rows, Sizes::block_rows, [&](Index first_row, Index rows) {
        Strided<T> x_block = x_at(first_row);
        if (copied) {
          copy_rows<T>({x_block.data, rows, depth, x.row_stride, x.column_stride}, x_copy, Buffers<T>::x_stride);
          x_block = {x_copy, Buffers<T>::x_stride, 1};
        }
        for_tiles<T>(rows, [&](Index tile, int height) {
          const Index row = first_row + tile;
          const Strided<T> x_tile{x_block.data + tile * x_block.row_stride, x_block.row_stride, x_block.step_stride};
          for (Index j = 0; j < columns; j += Sizes::columns) {
            prefetch_tile<T>(out, row, height, block + j);
            const Strip<T> strip{packed + j * depth, Sizes::columns, lanes<T>};
            const bool one = columns - j <= lanes<T>;
            one ? compute_tile<Width::one, T>(height, x_tile, strip, depth, sums)
                : compute_tile<Width::usual, T>(height, x_tile, strip, depth, sums);
            store_tile<T>(sums, height, one ? 1 : Sizes::vectors, out, row, block + j, w.columns, first, last);
          }
        });
      });
    }
    k += depth;
  } while (k < x.columns);
}

// The end of the memory that a view with column_stride (or row_stride) 1 reaches to.
template <class T>
const T* end_of(const T* data, Index lines, Index stride, Index depth) {
  return data + std::max<Index>(0, (lines - 1) * stride) + depth;
}

// Compiled once for all epilogues.
template <int rows, class T>
[[gnu::noinline]] void some_dots(const T* a, Index a_stride, const T* a_end, const T* b, Index b_stride, const T* b_end,
                                 int count, Index depth, Vec<T> (&result)[rows]) {
  dots<rows>(a, a_stride, a_end, b, b_stride, b_end, count, depth, result);
}

// Rows of x and columns of w are contiguous. Vectors of results run along w's columns, or, if there is one only, along
// x's rows.
template <class T, class O>
void compute_by_dots(View<T> x, View<T> w, const O& out) {
  using Sizes = TileSizes<T>;
  constexpr int n = lanes<T>;
  const T *x_end = end_of(x.data, x.rows, x.row_stride, x.columns),
          *w_end = end_of(w.data, w.columns, w.column_stride, w.rows);
  if (w.columns == 1) {
    for (Index i = 0; i < x.rows; i += n) {
      const int count = static_cast<int>(std::min<Index>(n, x.rows - i));
      Vec<T> result[1];
      some_dots<1>(w.data, Index{0}, w_end, x.data + i * x.row_stride, x.row_stride, x_end, count, x.columns, result);
      // y is one column: its rows are contiguous; each has the same bias.
      const O column{out.y + i, out.z == nullptr ? nullptr : out.z + i, nullptr, 1, out.epilogue};
      if (out.bias != nullptr) result[0] = result[0] + splat<T>(*out.bias);
      column.put(0, 0, result[0], count, true, true);
    }
    return;
  }
  const auto row_by_row = [&](Index first_row, Index end_row, Index first_column) {
    for (Index j = first_column; j < w.columns; j += n) {
      const int count = static_cast<int>(std::min<Index>(n, w.columns - j));
      for (Index i = first_row; i < end_row; ++i) {
        Vec<T> result[1];
        some_dots<1>(x.data + i * x.row_stride, Index{0}, x_end, w.data + j * w.column_stride, w.column_stride, w_end,
                     count, x.columns, result);
        out.put(i, j, result[0], count, true, true);
      }
    }
  };
  // Blocks of results, and the columns beside them that are left.
  Index row = 0;
  const auto by_blocks = [&]<int block_rows>(Constant<block_rows>) {
    constexpr int block_columns = std::min(Sizes::dot_block / block_rows, n);
    const Index first_row = row, whole = w.columns / block_columns * block_columns;
    if (whole > 0) row += (x.rows - row) / block_rows * block_rows;
    for (Index j = 0; j < whole; j += block_columns)
      for (Index i = first_row; i < row; i += block_rows) {
        T block[block_rows * block_columns];
        dot_block<block_rows, block_columns>(x.data + i * x.row_stride, x.row_stride, x_end,
                                             w.data + j * w.column_stride, w.column_stride, w_end, x.columns, block);
        for (int r = 0; r < block_rows; ++r)
          out.put(i + r, j, load_lanes(block + r * block_columns, block_columns), block_columns, true, true);
      }
    if (whole < w.columns) row_by_row(first_row, row, whole);
  };
  by_blocks(Constant<4>{});
  by_blocks(Constant<2>{});
  row_by_row(row, x.rows, 0);
}

template <class T, class Epilogue>
void run(View<T> x, View<T> w, const T* bias, const Epilogue& epilogue, T* y, T* z) {
  using Sizes = TileSizes<T>;
  const double work = static_cast<double>(x.rows) * static_cast<double>(w.columns) * static_cast<double>(x.columns);
  const Index threads = work < Sizes::parallel_work ? 1 : get_num_threads();
  const bool by_dots = x.column_stride == 1 && w.row_stride == 1 && x.columns > 1 &&
                       (w.columns == 1 || (x.rows <= Sizes::dot_rows && w.column_stride != 1 &&
                                           (x.columns > Sizes::thin_depth || x.rows < Sizes::thin_rows)));
  // Rows are cut for the threads where there are many, as each task packs the w that it uses.
  const bool tall = x.rows >= 2 * w.columns || w.columns < 2 * threads * Sizes::columns;
  const Index task_rows = block_size(x.rows, Sizes::rows, Sizes::task_rows, tall ? threads : 1);
  const Index task_columns = block_size(w.columns, Sizes::columns, w.columns + Sizes::columns, tall ? 1 : threads);
  const Index across = blocks(w.columns, task_columns);
  const Output<T, Epilogue> out{y, z, bias, w.columns, epilogue};
  if (w.columns == 1 && x.row_stride == 1 && bias == nullptr && z == nullptr && x.rows >= lanes<T>) {
    // The transposed product: x lies as the w of one row does best.
    run<T>({w.data, 1, w.rows, 0, w.row_stride}, {x.data, x.columns, x.rows, x.column_stride, 1}, nullptr, epilogue, y,
           nullptr);
    return;
  }
  const auto task = [&](Index index) {
    const Index i = index / across * task_rows, j = index % across * task_columns;
    const View<T> x_part{x.data + i * x.row_stride, std::min(task_rows, x.rows - i), x.columns, x.row_stride,
                         x.column_stride};
    const View<T> w_part{w.data + j * w.column_stride, w.rows, std::min(task_columns, w.columns - j), w.row_stride,
                         w.column_stride};
    if (by_dots)
      compute_by_dots(x_part, w_part, out.at(i, j));
    else
      compute_by_tiles(x_part, w_part, out.at(i, j));
  };
  const Index tasks = blocks(x.rows, task_rows) * across;
  if (threads > 1)
    parallel_for(tasks, task);
  else
    for (Index t = 0; t < tasks; ++t) task(t);
}

template <class T, class F>
void run_activated(View<T> x, View<T> w, const T* bias, T parameter, T* y, T* z) {
  run(x, w, bias, Activated<T, F>{splat<T>(parameter)}, y, z);
}

}  // namespace

template <class T>
void linear(View<T> x, View<T> w, const T* bias, int activation, T parameter, T* y, T* z) {
  if (x.rows == 0 || w.columns == 0) return;
  if (activation < 0) return run(x, w, bias, Plain<T>{}, y, z);
  using Function = void (*)(View<T>, View<T>, const T*, T, T*, T*);
#define GEMMLET_ENTRY(name) &run_activated<T, activations::name>,
  static constexpr Function table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[activation](x, w, bias, parameter, y, z);
}

template void linear(View<float>, View<float>, const float*, int, float, float*, float*);
template void linear(View<double>, View<double>, const double*, int, double, double*, double*);

}  // namespace gemmlet
