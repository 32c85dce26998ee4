// The tiles that every matrix product here is made of: small blocks of results that live in registers.
//
// Contract
//   accumulate   rows x vectors results, sum += x w over `depth` steps, first to last: one fused multiply-add for an
//                element and a step where the instruction set has it. Where x and w stand is for the caller to say, so
//                that the same loop runs on packed panels, on matrices as they are, and on rows that lie anywhere.
//   accumulate_sparse  the same for one row of x, of which only the numbers that are not 0 are there.
//   dots         a vector of results, each the dot product of two contiguous rows; the sum runs in `lanes` interleaved
//                parts, which are then added pairwise.
//   Nothing is read outside of the arrays; load_masked reads lanes that it then drops.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/tuning.h"

namespace gemmlet {

template <int n>
using Constant = std::integral_constant<int, n>;

// f(Constant<n>{}) for the n at run time, 1 <= n <= most.
template <int most, class F>
[[gnu::always_inline]] inline void with_constant(int n, F&& f) {
  if constexpr (most == 1) {
    f(Constant<1>{});
  } else {
    if (n == most)
      f(Constant<most>{});
    else
      with_constant<most - 1>(n, std::forward<F>(f));
  }
}

// The compiler takes p as it is: it does not compute it from another pointer, nor keep sums of it and an offset. Left to
// itself, GCC has a register for each row of a tile, and fetches those that do not fit from vector registers, which costs
// a sixth of the time.
template <class T>
[[gnu::always_inline]] inline void keep(const T*& p) {
  asm("" : "+r"(p));
}

// Where x stands. steps<rows>() goes through the steps of the sum: enter() one, at(row) is a number of it, next().
template <class T>
struct Strided {
  const T* data;
  Index row_stride, step_stride;

  template <int rows>
  struct Steps {
    // So many rows share a pointer: for their offsets there are registers.
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
struct RowsAnywhere {
  const T* const* rows;

  struct Steps {
    // Each is loaded when it is needed: there are not registers enough.
    const T* const volatile* rows;
    Index step;
    void enter() {}
    T at(int row) const { return rows[row][step]; }
    void next() { ++step; }
  };
  template <int>
  Steps steps() const {
    return {rows, 0};
  }
};
// The transpose: the tile's rows are columns `first` and on of rows that lie anywhere.
template <class T>
struct ColumnsOfRowsAnywhere {
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

// The vectors of w of one step begin at w + step * stride; from one to the next it is `apart`.
template <class T>
struct Strip {
  using Number = T;
  const T* w;
  Index stride, apart;
  Vec<T> vector(const T* w_k, int v) const { return load(w_k + v * apart); }
};
// The same side by side, so many whole ones and then one of which w has the first `count` lanes.
template <class T, int whole>
struct PartOfStrip {
  using Number = T;
  const T* w;
  Index stride;
  int count;
  Vec<T> vector(const T* w_k, int v) const {
    const T* at = w_k + v * lanes<T>;
    return v < whole ? load(at) : load_part(at, count);
  }
};

// From 0 if `begin`, else from what is there. A function of its own, so that its loop has all registers for itself.
template <int rows, int vectors, class X, class W, class T = typename W::Number>
[[gnu::noinline]] void accumulate(const X& x, const W& strip, Index depth, bool begin,
                                  Vec<typename W::Number> (&total)[rows][vectors]) {
  Vec<T> sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = begin ? Vec<T>{} : total[r][v];
  const T* w = strip.w;
  auto x_k = x.template steps<rows>();
  // The main loop:
  for (Index k = 0; k < depth; ++k) {
    x_k.enter();
    Vec<T> w_k[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w_k[v] = strip.vector(w, v);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<T> x_rk = splat<T>(x_k.at(r));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x_rk, w_k[v], sum[r][v]);
    }
    w += strip.stride;
    x_k.next();
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[r][v] = sum[r][v];
}

// How many vectors of w go with so many rows of x: their accumulators fit the registers.
template <class T>
constexpr int vectors_beside(int rows) {
  return rows == 1 ? 8 : rows <= 3 ? 4 : TileSizes<T>::vectors;
}

// The sums of a tile, row after row: any height and width.
template <class T>
using Sums = Vec<T>[TileSizes<T>::rows * TileSizes<T>::vectors * 2];

// One vector, as wide as TileSizes says, or as registers allow.
enum class Width { one, usual, wide };

template <class T>
constexpr int vectors_in(Width width, int rows) {
  return width == Width::one ? 1 : width == Width::usual ? TileSizes<T>::vectors : vectors_beside<T>(rows);
}

template <Width width, class T, class X, class W>
inline void compute_tile(int rows, const X& x, const W& strip, Index depth, Sums<T>& sums) {
  with_constant<TileSizes<T>::rows>(rows, [&]<int height>(Constant<height>) {
    constexpr int vectors = vectors_in<T>(width, height);
    accumulate(x, strip, depth, true, reinterpret_cast<Vec<T>(&)[height][vectors]>(sums));
  });
}

// Numbers and where in their row they stand.
template <class T>
struct SparseRow {
  const std::int32_t* columns;
  const T* values;
  Index count;

  bool empty() const { return count == 0; }
  // f(place, number), first to last.
  template <class F>
  [[gnu::always_inline]] void for_each(F&& f) const {
    for (Index i = 0; i < count; ++i) f(Index{columns[i]}, values[i]);
  }
};

// Bytes, of which those count whose bits are set in 64-bit words; byte i, which is bit i % 64 of word i / 64, stands for
// the number numbers[byte]. The words are number `first` to `end`.
template <class T>
struct MaskedBytes {
  const std::uint8_t* bytes;
  const std::uint64_t* masks;
  Index first, end;
  const T* numbers;

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
        f(i, numbers[bytes[i]]);
      }
  }
};

// sum += x w: row k of w begins at w + k * stride; its vectors stand one after the other, but for the last.
template <int vectors, class T, class Sparse>
[[gnu::always_inline]] inline void accumulate_sparse(const Sparse& x, const T* w, Index stride, Index last,
                                                     Vec<T> (&total)[vectors]) {
  // The main loop:
  x.for_each([&] [[gnu::always_inline]] (Index i, T number) {
    const Vec<T> x_i = splat<T>(number);
    const T* w_i = w + i * stride;
#pragma GCC unroll 8
    for (int v = 0; v < vectors - 1; ++v) total[v] = fma(x_i, load(w_i + v * lanes<T>), total[v]);
    total[vectors - 1] = fma(x_i, load(w_i + last), total[vectors - 1]);
  });
}

// The first n lanes at p, the others 0. It reads a whole vector where that ends before `end`.
template <class T>
inline Vec<T> load_masked(const T* p, int n, const T* end) {
  if (n == lanes<T>) return load(p);
  if (masks_are_cheap || end - p < lanes<T>) return load_part(p, n);
  IntVecOf<Vec<T>> lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = static_cast<IntOf<T>>(i);
  return select(lane < static_cast<IntOf<T>>(n), load(p), Vec<T>{});
}

namespace detail {

// Each block of `block` lanes of the result: the halves of the block of `a` added, then those of the block of `b`.
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

// result[r][i] = a_r . b_i for `rows` rows of a and `count` <= lanes rows of b, the rest of the lanes 0. The arrays that
// they are in end at a_end and b_end.
template <int rows, class T>
[[gnu::always_inline]] inline void dots(const T* a, Index a_stride, const T* a_end, const T* b, Index b_stride,
                                        const T* b_end, int count, Index depth, Vec<T> (&result)[rows]) {
  constexpr int n = lanes<T>;
  Vec<T> sum[rows][n];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < n; ++i) sum[r][i] = Vec<T>{};
  Index k = 0;
  if (count == n) {
    // The main loop:
    for (; k + n <= depth; k += n) {
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
  for (; k < depth; k += n) {
    const int part = static_cast<int>(depth - k < n ? depth - k : n);
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

// result[r * columns + c] = a_r . b_c, summed in the same order: a block of both needs fewer loads than rows of results do.
// rows * columns is a multiple of `lanes`.
template <int rows, int columns, class T>
[[gnu::noinline]] void dot_block(const T* a, Index a_stride, const T* a_end, const T* b, Index b_stride, const T* b_end,
                                 Index depth, T (&result)[rows * columns]) {
  constexpr int n = lanes<T>;
  static_assert(rows * columns % n == 0);
  Vec<T> sum[rows * columns];
#pragma GCC unroll 16
  for (int i = 0; i < rows * columns; ++i) sum[i] = Vec<T>{};
  // The main loop; the last round may be a part of a vector.
  for (Index k = 0; k < depth; k += n) {
    Vec<T> a_k[rows], b_k[columns];
    if (const Index part = depth - k; part >= n) {
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
// In each block of 2 `unit` lanes: the first half (or the second) of the block of a, then that of b.
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

// Rows become columns, for `lanes` vectors: blocks of 1, 2, 4, ... lanes across the diagonal change places.
template <class V>
inline void transpose(V (&v)[sizeof(V) / sizeof(ScalarOf<V>)]) {
  detail::transpose_from<1>(v);
}

// While a row of w is packed, the one so many rows on is fetched: its page is another, which the processor does not guess.
inline constexpr Index prefetched_rows = 8;

// Copies w to a strip: TileSizes::columns columns of a row stand together, those that w has not are 0. w.columns is at
// most that.
template <class T>
inline void pack_strip(const View<T>& w, T* packed) {
  constexpr int n = lanes<T>, columns = TileSizes<T>::columns;
  for (int j = 0; j < columns; j += n, packed += n) {
    const int count = static_cast<int>(w.columns - j < n ? (w.columns > j ? w.columns - j : 0) : n);
    const T* from = w.data + j * w.column_stride;
    Index k = 0;
    if (w.column_stride == 1 && count == n) {
      for (; k < w.rows; ++k) {
        __builtin_prefetch(from + (k + prefetched_rows) * w.row_stride);
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

// The same for any number of columns, strip after strip.
template <class T>
[[gnu::noinline]] void pack(const View<T>& w, T* packed) {
  constexpr Index columns = TileSizes<T>::columns;
  const Index strip_size = w.rows * columns;
  Index j = 0;
  if (w.column_stride == 1) {
    // Row by row, as w lies: each row is on a page of its own.
    const Index whole = w.columns / columns;
    for (Index k = 0; k < w.rows; ++k) {
      const T* from = w.data + k * w.row_stride;
      T* to = packed + k * columns;
      for (Index strip = 0; strip < whole; ++strip, from += columns, to += strip_size) {
        __builtin_prefetch(from + prefetched_rows * w.row_stride);
#pragma GCC unroll 4
        for (int v = 0; v < columns; v += lanes<T>) store(to + v, load(from + v));
      }
    }
    j = whole * columns;
  }
  for (; j < w.columns; j += columns)
    pack_strip<T>({w.data + j * w.column_stride, w.rows, w.columns - j < columns ? w.columns - j : columns,
                   w.row_stride, w.column_stride},
                  packed + j / columns * strip_size);
}

}  // namespace gemmlet
