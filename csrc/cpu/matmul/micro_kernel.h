// The micro-kernels of every matmul: tiles of results that stay in registers, and the packing of panels for them.
//
// Contract
//   accumulate         sum += x w for rows x vectors results over kc steps, sequentially: one fused multiply-add for each
//                      element and step where the instruction set has it. x and w are types, so that one loop serves packed
//                      panels, strided matrices and rows given by pointers.
//   accumulate_sparse  the same for one sparse row of x.
//   dot_products       the dot-product kernel: a vector of results, each the dot product of two contiguous rows; `lanes`
//                      interleaved partial sums, added pairwise.
//   Nothing is read outside of the arrays. load_masked reads lanes that it then drops.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "cpu/tuning.h"

namespace gemmlet {

// Columns of a panel of w, and of a register tile.
template <class T>
constexpr int nr = tuning::nr_vectors * lanes<T>;
static_assert(tuning::kc % nr<float> == 0 && tuning::nc % nr<float> == 0);

// f(first, count) for blocks of nearly equal size, at most `size`, that cover n: none is left with a single row.
template <class F>
inline void for_blocks(Index n, Index size, F&& f) {
  if (n == 0) return;
  const Index blocks = ceil_div(n, size), smallest = n / blocks, larger = n % blocks;
  Index first = 0;
  for (Index block = 0; block < blocks; ++block) {
    const Index count = smallest + (block < larger);
    f(first, count);
    first += count;
  }
}

template <int n>
using Constant = std::integral_constant<int, n>;

// f(Constant<n>{}) for an n at run time, 1 <= n <= max.
template <int max, class F>
[[gnu::always_inline]] inline void with_constant(int n, F&& f) {
  if constexpr (max == 1) {
    f(Constant<1>{});
  } else {
    if (n == max)
      f(Constant<max>{});
    else
      with_constant<max - 1>(n, std::forward<F>(f));
  }
}

// Makes p opaque: the compiler neither derives it from another pointer nor keeps sums of it and an offset. Otherwise GCC keeps
// a pointer for each row of a tile and spills those that do not fit to vector registers, which costs a sixth of the time.
template <class T>
[[gnu::always_inline]] inline void keep(const T*& p) {
  asm("" : "+r"(p));
}

// Layouts of x. steps<rows>() iterates over K: enter() a step, at(row) an element of it, next().
template <class T>
struct Strided {
  const T* data;
  Index row_stride, step_stride;

  template <int rows>
  struct Steps {
    // Rows that share a pointer: their offsets fit the registers.
    static constexpr int together = rows <= 6 ? rows : 3, groups = (rows + together - 1) / together;
    const T* group[groups];
    Index row_stride, step_stride;

    void enter() {}
    T at(int row) const { return group[row / together][row % together * row_stride]; }
    void next() {
#pragma GCC unroll 16
      for (const T*& p : group) {
        p += step_stride;
        if constexpr (groups > 1) keep(p);
      }
    }
  };
  template <int rows>
  Steps<rows> steps() const {
    Steps<rows> first{{}, row_stride, step_stride};
    for (int g = 0; g < first.groups; ++g) first.group[g] = data + g * first.together * row_stride;
    return first;
  }
};
template <class T>
struct RowPointers {
  const T* const* rows;

  template <int count>
  struct Steps {
    // Where the pointers do not all fit the registers, each is loaded when it is used: volatile. A tile of 6 rows would then
    // need 14 loads for 12 fused multiply-adds, of which a processor does as many at a time.
    static constexpr bool fit = count <= tuning::max_row_pointers;
    std::conditional_t<fit, const T* [count], const T* const volatile*> row_at;
    Index step;
    void enter() {}
    T at(int row) const { return row_at[row][step]; }
    void next() { ++step; }
  };
  template <int count>
  Steps<count> steps() const {
    Steps<count> first{};
    if constexpr (Steps<count>::fit)
      for (int r = 0; r < count; ++r) first.row_at[r] = rows[r];
    else
      first.row_at = rows;
    return first;
  }
};
// The transpose: row r of the tile is column first + r of the rows.
template <class T>
struct ColumnsOfRowPointers {
  const T* const* rows;
  Index first;

  struct Steps {
    const T* const* rows;
    Index first;
    const T* now;
    void enter() {
      now = *rows + first;
      keep(now);
    }
    T at(int row) const { return now[row]; }
    void next() { ++rows; }
  };
  template <int>
  Steps steps() const {
    return {rows, first, nullptr};
  }
};

// Layouts of w. The vectors of step k begin at w + k * stride, `apart` from each other.
template <class T>
struct Panel {
  using Number = T;
  const T* w;
  Index stride, apart;
  Vec<T> vector(const T* w_k, int v) const { return load(w_k + v * apart); }
};
// Adjacent vectors, `whole` full ones and one of `count` lanes.
template <class T, int whole>
struct PartialPanel {
  using Number = T;
  const T* w;
  Index stride;
  int count;
  Vec<T> vector(const T* w_k, int v) const {
    const T* at = w_k + v * lanes<T>;
    return v < whole ? load(at) : load_part(at, count);
  }
};

// Panel of whole width, packed on the way: its vectors are stored to `packed` as they are loaded.
template <class T>
struct PackingPanel {
  using Number = T;
  const T* w;
  Index stride;
  T* packed;
  Vec<T> vector(const T* w_k, int v) {
    __builtin_prefetch(w_k + tuning::pack_prefetch_rows * stride + v * lanes<T>);
    const Vec<T> loaded = load(w_k + v * lanes<T>);
    store(packed, loaded);
    packed += lanes<T>;
    return loaded;
  }
};

// total = x w, or total += x w. Not inlined, so that its loop has all registers.
template <bool adds = false, int rows, int vectors, class X, class W, class T = typename W::Number>
[[gnu::noinline]] void accumulate(const X& x, const W& layout, Index kc,
                                  Vec<typename W::Number> (&total)[rows][vectors]) {
  W panel = layout;
  Vec<T> sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = adds ? total[r][v] : Vec<T>{};
  const T* w = panel.w;
  auto x_k = x.template steps<rows>();
  // The main loop. It counts down, which takes an instruction less; with 12 accumulators a processor that starts four at a
  // time has none to spare.
  for (Index left = kc; left > 0; --left) {
    x_k.enter();
    Vec<T> w_k[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w_k[v] = panel.vector(w, v);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<T> x_rk = splat<T>(x_k.at(r));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x_rk, w_k[v], sum[r][v]);
    }
    w += panel.stride;
    x_k.next();
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[r][v] = sum[r][v];
}

// Vectors of w in a tile of `rows` rows: as many as there are registers for, with the accumulators.
template <class T>
constexpr int max_vectors(int rows) {
  return rows == 1 ? 8 : rows <= 3 ? 4 : tuning::nr_vectors;
}

// The accumulators of a tile of any height and width, row by row.
template <class T>
using Sums = Vec<T>[tuning::mr * tuning::nr_vectors * 2];

// Width of a tile: one vector, nr_vectors, or as many as the registers allow.
enum class Width { one, usual, wide };

template <class T>
constexpr int vectors_in(Width width, int rows) {
  return width == Width::one ? 1 : width == Width::usual ? tuning::nr_vectors : max_vectors<T>(rows);
}

template <Width width, class T, class X, class W>
inline void compute_tile(int rows, const X& x, const W& panel, Index kc, Sums<T>& sums) {
  with_constant<tuning::mr>(rows, [&]<int height>(Constant<height>) {
    constexpr int vectors = vectors_in<T>(width, height);
    accumulate(x, panel, kc, reinterpret_cast<Vec<T>(&)[height][vectors]>(sums));
  });
}

// A sparse row: nonzeros and their indices.
template <class T>
struct SparseRow {
  const std::int32_t* indices;
  const T* values;
  Index count;

  bool empty() const { return count == 0; }
  // f(index, value), in order.
  template <class F>
  [[gnu::always_inline]] void for_each(F&& f) const {
    for (Index i = 0; i < count; ++i) f(Index{indices[i]}, values[i]);
  }
};

// A sparse row of bytes: byte i counts if bit i % 64 of mask i / 64 is set, and has the value value_of_byte[byte]. Masks
// `first` to `end`.
template <class T>
struct MaskedBytes {
  const std::uint8_t* bytes;
  const std::uint64_t* masks;
  Index first, end;
  const T* value_of_byte;

  bool empty() const {
    std::uint64_t any = 0;
    for (Index word = first; word < end; ++word) any |= masks[word];
    return any == 0;
  }
  template <class F>
  [[gnu::always_inline]] void for_each(F&& f) const {
    for (Index word = first; word < end; ++word)
      for (std::uint64_t rest = masks[word]; rest != 0; rest &= rest - 1) {
        const Index i = word * 64 + std::countr_zero(rest);
        f(i, value_of_byte[bytes[i]]);
      }
  }
};

// total += x w. Row k of w begins at w + k * stride; its vectors are adjacent but for the last, which begins at `last`.
template <int vectors, class T, class Sparse>
[[gnu::always_inline]] inline void accumulate_sparse(const Sparse& x, const T* w, Index stride, Index last,
                                                     Vec<T> (&total)[vectors]) {
  // The main loop:
  x.for_each([&](Index i, T number) GEMMLET_INLINE_LAMBDA {
    const Vec<T> x_i = splat<T>(number);
    const T* w_i = w + i * stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors - 1; ++v) total[v] = fma(x_i, load(w_i + v * lanes<T>), total[v]);
    total[vectors - 1] = fma(x_i, load(w_i + last), total[vectors - 1]);
  });
}

// The first n lanes at p, the others 0. Reads a whole vector where that ends before `end`.
template <class T>
inline Vec<T> load_masked(const T* p, int n, const T* end) {
  if (n == lanes<T>) return load(p);
  if (masks_are_cheap || end - p < lanes<T>) return load_part(p, n);
  return keep_lanes<T>(load(p), 0, n);
}

namespace detail {

// Each block of `block` lanes of the result: the sum of the halves of that block of a, then of b.
template <int block, class V, std::size_t... i>
inline V fold(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i), half = block / 2;
  constexpr auto low = [](int lane) { return lane % block < half ? lane : n + lane - half; };
  constexpr auto high = [](int lane) { return lane % block < half ? lane + half : n + lane; };
  return __builtin_shufflevector(a, b, low(static_cast<int>(i))...) +
         __builtin_shufflevector(a, b, high(static_cast<int>(i))...);
}

template <int count, class V>
inline V totals(V* v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    for (int i = 0; i < count / 2; ++i)
      v[i] = fold<count>(v[i], v[i + count / 2], std::make_index_sequence<sizeof(V) / sizeof(ScalarOf<V>)>{});
    return totals<count / 2>(v);
  }
}
}  // namespace detail

// The sum of the lanes of each of `lanes` vectors.
template <class V>
inline V lane_totals(V (&v)[sizeof(V) / sizeof(ScalarOf<V>)]) {
  return detail::totals<sizeof(V) / sizeof(ScalarOf<V>)>(v);
}

// result[r][i] = a_r . b_i for `rows` rows of a and `count` <= lanes rows of b; the other lanes are 0. a_end and b_end are the
// ends of the arrays.
template <int rows, class T>
[[gnu::always_inline]] inline void dot_products(const T* a, Index a_stride, const T* a_end, const T* b, Index b_stride,
                                                const T* b_end, int count, Index length, Vec<T> (&result)[rows]) {
  constexpr int n = lanes<T>;
  Vec<T> sum[rows][n];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < n; ++i) sum[r][i] = Vec<T>{};
  Index k = 0;
  if (count == n) {
    // The main loop:
    for (; k + n <= length; k += n) {
      Vec<T> a_k[rows];
      for (int r = 0; r < rows; ++r) a_k[r] = load(a + r * a_stride + k);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        const Vec<T> b_ik = load(b + i * b_stride + k);
        for (int r = 0; r < rows; ++r) sum[r][i] = fma(a_k[r], b_ik, sum[r][i]);
      }
    }
  }
  // The tail:
  for (; k < length; k += n) {
    const int part = static_cast<int>(length - k < n ? length - k : n);
    Vec<T> a_k[rows];
    for (int r = 0; r < rows; ++r) a_k[r] = load_masked(a + r * a_stride + k, part, a_end);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i >= count) break;
      const Vec<T> b_ik = load_masked(b + i * b_stride + k, part, b_end);
      for (int r = 0; r < rows; ++r) sum[r][i] = fma(a_k[r], b_ik, sum[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r) result[r] = lane_totals(sum[r]);
}

// result[r * columns + c] = a_r . b_c, reduced in the same order, with fewer loads than dot_products. rows * columns is a
// multiple of `lanes`.
template <int rows, int columns, class T>
[[gnu::noinline]] void dot_product_tile(const T* a, Index a_stride, const T* a_end, const T* b, Index b_stride,
                                        const T* b_end, Index length, T (&result)[rows * columns]) {
  constexpr int n = lanes<T>;
  static_assert(rows * columns % n == 0);
  Vec<T> sum[rows * columns];
#pragma GCC unroll 16
  for (int i = 0; i < rows * columns; ++i) sum[i] = Vec<T>{};
  // The main loop; its last iteration may be a partial vector.
  for (Index k = 0; k < length; k += n) {
    Vec<T> a_k[rows], b_k[columns];
    if (const Index part = length - k; part >= n) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) a_k[r] = load(a + r * a_stride + k);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) b_k[c] = load(b + c * b_stride + k);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) a_k[r] = load_masked(a + r * a_stride + k, static_cast<int>(part), a_end);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) b_k[c] = load_masked(b + c * b_stride + k, static_cast<int>(part), b_end);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sum[r * columns + c] = fma(a_k[r], b_k[c], sum[r * columns + c]);
  }
#pragma GCC unroll 8
  for (int first = 0; first < rows * columns; first += n) {
    Vec<T> group[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) group[i] = sum[first + i];
    store(result + first, lane_totals(group));
  }
}

namespace detail {
// Each block of 2 `unit` lanes: the first (or second) half of that block of a, then of b.
template <int unit, bool second, class V, std::size_t... i>
inline V interleave(V a, V b, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
  constexpr auto from = [](int lane) {
    const int block = lane / (2 * unit) * 2 * unit, within = lane % (2 * unit);
    const int place = block + (second ? unit : 0) + within % unit;
    return within < unit ? place : n + place;
  };
  return __builtin_shufflevector(a, b, from(static_cast<int>(i))...);
}

template <int unit, class V>
inline void transpose_from(V* v) {
  constexpr int n = sizeof(V) / sizeof(ScalarOf<V>);
  if constexpr (unit < n) {
    constexpr auto all = std::make_index_sequence<n>{};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if ((i & unit) == 0) {
        const V a = v[i], b = v[i + unit];
        v[i] = interleave<unit, false>(a, b, all);
        v[i + unit] = interleave<unit, true>(a, b, all);
      }
    transpose_from<2 * unit>(v);
  }
}
}  // namespace detail

// Transposes `lanes` vectors: blocks of 1, 2, 4, ... lanes swap across the diagonal.
template <class V>
inline void transpose(V (&v)[sizeof(V) / sizeof(ScalarOf<V>)]) {
  detail::transpose_from<1>(v);
}

// Packs w, at most nr columns, into a panel: the nr elements of a row are adjacent, missing columns are 0.
template <class T>
inline void pack_panel(const View<T>& w, T* packed) {
  constexpr int n = lanes<T>, columns = nr<T>;
  for (int j = 0; j < columns; j += n, packed += n) {
    const int count = static_cast<int>(w.columns - j < n ? (w.columns > j ? w.columns - j : 0) : n);
    const T* from = w.data + j * w.column_stride;
    Index k = 0;
    if (w.column_stride == 1 && count == n) {
      for (; k < w.rows; ++k) {
        __builtin_prefetch(from + (k + tuning::pack_prefetch_rows) * w.row_stride);
        store(packed + k * columns, load(from + k * w.row_stride));
      }
    } else if (w.row_stride == 1) {
      for (; k + n <= w.rows; k += n) {
        Vec<T> square[n] = {};
        for (int i = 0; i < count; ++i) square[i] = load(from + i * w.column_stride + k);
        transpose(square);
        for (int i = 0; i < n; ++i) store(packed + (k + i) * columns, square[i]);
      }
    }
    for (; k < w.rows; ++k) {
      T row[n] = {};
      for (int i = 0; i < count; ++i) row[i] = from[i * w.column_stride + k * w.row_stride];
      store(packed + k * columns, load(row));
    }
  }
}

// Packs any number of columns, panel after panel.
template <class T>
[[gnu::noinline]] void pack(const View<T>& w, T* packed) {
  constexpr Index columns = nr<T>;
  const Index panel_size = w.rows * columns;
  Index j = 0;
  if (w.column_stride == 1) {
    // Row by row: each row of w is on a page of its own.
    const Index whole = w.columns / columns;
    for (Index k = 0; k < w.rows; ++k) {
      const T* from = w.data + k * w.row_stride;
      T* to = packed + k * columns;
      for (Index panel = 0; panel < whole; ++panel, from += columns, to += panel_size) {
        __builtin_prefetch(from + tuning::pack_prefetch_rows * w.row_stride);
#pragma GCC unroll 4
        for (int v = 0; v < columns; v += lanes<T>) store(to + v, load(from + v));
      }
    }
    j = whole * columns;
  }
  for (; j < w.columns; j += columns)
    pack_panel(w.block(0, w.rows, j, w.columns - j < columns ? w.columns - j : columns),
               packed + j / columns * panel_size);
}

}  // namespace gemmlet
