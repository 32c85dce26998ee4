// Vector loops: over an array, along one row of a matrix, across several short rows.
//
// Contract
//   Along and Across have the same members, so that a function of rows is written once, for `rows` of either type. Both
//   read and write arrays in their own layout: Along one row of at least lanes<T> columns as it is, Across lanes<T> rows
//   of any length, transposed: element (row r, column j) at [j * lanes<T> + r] (for_rows transposes them).
//   map(out, f, in...) stores f(first, vectors of in...) throughout `out`, which may be one of the inputs;
//   each(f, in...) does not store. The lanes below `first` are not part of the vector: sums must leave them out (part).
//   Results of a row do not depend on the other rows.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"
#include "formulas/math.h"

namespace gemmlet {

template <class T>
GEMMLET_INLINE Vec<T> load_lanes(const T* p, int n, T fill = 0) {
  if (n == lanes<T>) [[likely]]
    return load(p);
  return load_part(p, n, fill);
}

template <class T>
GEMMLET_INLINE void store_lanes(T* p, Vec<T> v, int n) {
  if (n == lanes<T>) [[likely]]
    store(p, v);
  else
    store_part(p, v, n);
}

// f(column, n): a vector of n lanes begins at each column; n is below lanes<T> at most once, at the end.
template <class T, class F>
GEMMLET_INLINE void for_lanes(Index columns, F&& f) {
  Index j = 0;
  for (; j + lanes<T> <= columns; j += lanes<T>) f(j, lanes<T>);
  if (j < columns) f(j, static_cast<int>(columns - j));
}

// v, but for zeros in the lanes below `first`.
template <class T>
GEMMLET_INLINE Vec<T> part(Vec<T> v, int first) {
  if (first == 0) return v;
  return keep_lanes<T>(v, first, lanes<T>);
}

template <class T>
struct Along {
  static constexpr int count = 1;
  Index columns;

  Index at(int, Index column) const { return column; }

  template <class F, class... In>
  void each(F&& f, const In*... in) const {
    run([&](Index, int first, Vec<In>... v) { f(first, v...); }, in...);
  }
  template <class F, class... In>
  void map(T* out, F&& f, const In*... in) const {
    run([&](Index j, int first, Vec<In>... v) { store(out + j, f(first, v...)); }, in...);
  }

  // A NaN may be skipped: exp(NaN - max) restores it.
  Vec<T> largest(const T* x) const {
    Vec<T> most = load(x);
    each([&](int, Vec<T> v) { most = select(v > most, v, most); }, x);
    T result = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < lanes<T>; ++i) result = most[i] > result ? most[i] : result;
    return splat(result);
  }

  // One value for each row: from a sum, from a vector with it in every lane; and a vector from those values.
  void totals(const DoubleSum<T>& sum, double* of_row) const { of_row[0] = sum.total(); }
  void logs(double* of_row) const { of_row[0] = std::log(of_row[0]); }
  T number(Vec<T> v, int) const { return v[0]; }
  Vec<T> vector(const double* of_row) const { return splat(static_cast<T>(of_row[0])); }

 private:
  // The last vector ends with the row, and overlaps the one before it. It is read before anything is written, as `out`
  // may be an input.
  template <class F, class... In>
  void run(F&& f, const In*... in) const {
    const Index last = columns - lanes<T>;
    const int rest = static_cast<int>(columns % lanes<T>);
    [&](Vec<In>... end) {
      for (Index j = 0; j <= last; j += lanes<T>) f(j, 0, load(in + j)...);
      if (rest > 0) f(last, lanes<T> - rest, end...);
    }(load(in + last)...);
  }
};

template <class T>
struct Across {
  static constexpr int count = lanes<T>;
  Index columns;

  Index at(int row, Index column) const { return column * lanes<T> + row; }

  template <class F, class... In>
  void each(F&& f, const In*... in) const {
    for (Index j = 0; j < columns * lanes<T>; j += lanes<T>) f(0, load(in + j)...);
  }
  template <class F, class... In>
  void map(T* out, F&& f, const In*... in) const {
    for (Index j = 0; j < columns * lanes<T>; j += lanes<T>) store(out + j, f(0, load(in + j)...));
  }

  Vec<T> largest(const T* x) const {
    Vec<T> most = splat(-std::numeric_limits<T>::infinity());
    each([&](int, Vec<T> v) { most = select(v > most, v, most); }, x);
    return most;
  }

  void totals(const DoubleSum<T>& sum, double* of_row) const {
    for (int i = 0; i < sum.sum.parts; ++i) store(of_row + i * lanes<double>, sum.sum.part[i]);
  }
  void logs(double* of_row) const {
    for (int i = 0; i < lanes<T>; i += lanes<double>) store(of_row + i, log(load(of_row + i)));
  }
  T number(Vec<T> v, int row) const { return v[row]; }
  Vec<T> vector(const double* of_row) const {
    Doubles<T> d;
    for (int i = 0; i < d.parts; ++i) d.part[i] = load(of_row + i * lanes<double>);
    return from_double<T>(d);
  }

  // Transposes rows of a matrix into this layout, missing rows as zeros; and back.
  void transpose_in(const T* x, Index rows, T* to, Index stride) const {
    if (rows < lanes<T>) std::fill_n(to, columns * lanes<T>, T(0));
    for (Index r = 0; r < rows; ++r)
      for (Index j = 0; j < columns; ++j) to[j * lanes<T> + r] = x[r * stride + j];
  }
  void transpose_out(const T* from, Index rows, T* x, Index stride) const {
    for (Index r = 0; r < rows; ++r)
      for (Index j = 0; j < columns; ++j) x[r * stride + j] = from[j * lanes<T> + r];
  }
};

// f(rows, i, n, out, in...) for the rows from `begin` to `end` of matrices of one shape, n of them at a time from row i
// on, `rows` being the layout.
template <class T, class F, class... In>
void for_rows(Index begin, Index end, Index columns, F&& f, T* out, const In*... in) {
  if (columns > tuning::across_max_columns) {
    for (Index i = begin; i < end; ++i) f(Along<T>{columns}, i, 1, out + i * columns, in + i * columns...);
    return;
  }
  const Across<T> rows{columns};
  alignas(GEMMLET_VECTOR_BYTES) T buffers[sizeof...(In)][tuning::across_max_columns * lanes<T>];
  for (Index i = begin; i < end; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, end - i));
    int b = 0;
    (rows.transpose_in(in + i * columns, n, buffers[b++], columns), ...);
    [&]<std::size_t... k>(std::index_sequence<k...>) {
      f(rows, i, n, buffers[0], static_cast<const In*>(buffers[k])...);
    }(std::index_sequence_for<In...>{});
    rows.transpose_out(buffers[0], n, out + i * columns, columns);
  }
}

// Rows of a task: about `chunk_elements` elements, in whole vectors of rows.
template <class T>
Index rows_per_chunk(Index columns) {
  return (tuning::chunk_elements / columns / lanes<T> + 1) * lanes<T>;
}

}  // namespace gemmlet
