// Vector loops: over an array, along one row of a matrix, across several short rows.
//
// Contract
//   Along and Across are layouts with the same members: Along one row of at least lanes<T> columns as it is, Across
//   lanes<T> rows of any length, transposed: element (row r, column j) at [j * lanes<T> + r] (for_rows transposes them).
//   map(out, f, in...) stores f(first, vectors of in...) throughout `out`, which may be one of the inputs;
//   each(f, in...) does not store. The lanes below `first` are not part of the vector: sums must leave them out (part).
//   A Statistic is a double for each row of the layout.
//   Operands is what formulas/rows.h asks for, in either layout.
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

// A double for each of lanes<T> rows.
template <class T>
struct RowNumbers : Doubles<T> {
  RowNumbers(double all = 0) : RowNumbers([=](int) { return splat(all); }) {}
  RowNumbers(const Doubles<T>& d) : Doubles<T>(d) {}
  template <class F>
    requires std::invocable<F, int>
  explicit RowNumbers(F part_of) {
    for (int i = 0; i < this->parts; ++i) this->part[i] = part_of(i);
  }
  using Ref = const RowNumbers&;
  friend RowNumbers operator+(Ref a, Ref b) {
    return RowNumbers([&](int i) { return a.part[i] + b.part[i]; });
  }
  friend RowNumbers operator-(Ref a, Ref b) {
    return RowNumbers([&](int i) { return a.part[i] - b.part[i]; });
  }
  friend RowNumbers operator*(Ref a, Ref b) {
    return RowNumbers([&](int i) { return a.part[i] * b.part[i]; });
  }
  friend RowNumbers operator/(Ref a, Ref b) {
    return RowNumbers([&](int i) { return a.part[i] / b.part[i]; });
  }
};

template <class T>
struct Along {
  static constexpr int count = 1;
  using Number = T;
  using Statistic = double;
  Index columns;

  Index at(int, Index column) const { return column; }

  template <class F, class... In>
  GEMMLET_INLINE void each(F&& f, const In*... in) const {
    run([&](Index, int first, Vec<In>... v) GEMMLET_INLINE_LAMBDA { f(first, v...); }, in...);
  }
  template <class F, class... In>
  GEMMLET_INLINE void map(T* out, F&& f, const In*... in) const {
    run([&](Index j, int first, Vec<In>... v) GEMMLET_INLINE_LAMBDA { store(out + j, f(first, v...)); }, in...);
  }

  // NaN may be passed over: exp(NaN - max) brings it back.
  GEMMLET_INLINE Vec<T> largest(const T* x) const {
    Vec<T> most = load(x);
    each([&](int, Vec<T> v) GEMMLET_INLINE_LAMBDA { most = select(v > most, v, most); }, x);
    T result = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < lanes<T>; ++i) result = most[i] > result ? most[i] : result;
    return splat(result);
  }

  static Statistic total(const DoubleSum<T>& sum) { return sum.total(); }
  static Statistic statistic(Vec<T> v) { return static_cast<double>(v[0]); }
  static Vec<T> vector(Statistic s) { return splat(static_cast<T>(s)); }
  static Statistic log(Statistic s) { return std::log(s); }
  template <class F>
  GEMMLET_INLINE static Statistic statistic_of(F f) {
    return f(0);
  }
  static void store_statistic(double* of_row, Statistic s) { *of_row = s; }

 private:
  // The last vector ends with the row, and overlaps the one before it. It is read before anything is written, as `out`
  // may be an input.
  template <class F, class... In>
  GEMMLET_INLINE void run(F&& f, const In*... in) const {
    const Index last = columns - lanes<T>;
    const int rest = static_cast<int>(columns % lanes<T>);
    [&](Vec<In>... end) GEMMLET_INLINE_LAMBDA {
      for (Index j = 0; j <= last; j += lanes<T>) f(j, 0, load(in + j)...);
      if (rest > 0) f(last, lanes<T> - rest, end...);
    }(load(in + last)...);
  }
};

template <class T>
struct Across {
  static constexpr int count = lanes<T>;
  using Number = T;
  using Statistic = RowNumbers<T>;
  Index columns;

  Index at(int row, Index column) const { return column * lanes<T> + row; }

  template <class F, class... In>
  GEMMLET_INLINE void each(F&& f, const In*... in) const {
    for (Index j = 0; j < columns * lanes<T>; j += lanes<T>) f(0, load(in + j)...);
  }
  template <class F, class... In>
  GEMMLET_INLINE void map(T* out, F&& f, const In*... in) const {
    for (Index j = 0; j < columns * lanes<T>; j += lanes<T>) store(out + j, f(0, load(in + j)...));
  }

  GEMMLET_INLINE Vec<T> largest(const T* x) const {
    Vec<T> most = splat(-std::numeric_limits<T>::infinity());
    each([&](int, Vec<T> v) GEMMLET_INLINE_LAMBDA { most = select(v > most, v, most); }, x);
    return most;
  }

  static Statistic total(const DoubleSum<T>& sum) { return sum.sum; }
  static Statistic statistic(Vec<T> v) { return to_double<T>(v); }
  static Vec<T> vector(const Statistic& s) { return from_double<T>(s); }
  static Statistic log(const Statistic& s) {
    return Statistic([&](int i) { return gemmlet::log(s.part[i]); });
  }
  // f(row) for each row, in registers: a vector load of numbers just stored would wait for the stores. The lambdas are
  // inlined late: early, GCC inserts lane by lane.
  template <class F>
  GEMMLET_INLINE static Statistic statistic_of(F f) {
    return Statistic([&](int part) {
      return [&]<int... i>(std::integer_sequence<int, i...>) {
        return Vec<double>{f(part * lanes<double> + i)...};
      }(std::make_integer_sequence<int, lanes<double>>{});
    });
  }
  static void store_statistic(double* of_row, const Statistic& s) {
    for (int i = 0; i < s.parts; ++i) store(of_row + i * lanes<double>, s.part[i]);
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

// Rows in a layout, as formulas/rows.h asks for them. Second is a function of the second operand's elements, or Alone.
// `out` may be either operand, but not `second` where numbers are transformed.
struct Alone {};
template <class Layout, class Second = Alone>
struct Operands {
  using T = typename Layout::Number;
  using V = Vec<T>;
  using Statistic = typename Layout::Statistic;
  template <int n>
  struct Sums {
    Statistic of[n] = {};
  };
  struct Terms {
    V largest;
    Statistic total;
  };

  Layout layout;
  T* out;
  const T* x;  // out, once the numbers are transformed
  const T* second = nullptr;
  Second of_second{};
  const Index* labels = nullptr;  // of the first label_count rows
  int label_count = 0;

  GEMMLET_INLINE static V term(V v) { return decay(v); }
  template <class F>
  GEMMLET_INLINE static V transformed(V v, F) {
    return v;
  }
  GEMMLET_INLINE static V exp(V v) { return gemmlet::exp(v); }
  GEMMLET_INLINE static Statistic log(const Statistic& s) { return Layout::log(s); }
  GEMMLET_INLINE static Statistic statistic(V v) { return Layout::statistic(v); }
  GEMMLET_INLINE static V vector(const Statistic& s) { return Layout::vector(s); }
  GEMMLET_INLINE static V divisor(const Statistic& s) { return Layout::vector(s); }

  GEMMLET_INLINE V largest() const { return layout.largest(x); }
  template <class F>
  GEMMLET_INLINE void map(F f) const {
    map_lanes([&](int, auto... v) GEMMLET_INLINE_LAMBDA { return f(v...); });
  }
  template <int n, class F>
  GEMMLET_INLINE Sums<n> transform(F f) {
    DoubleSum<T> sum[n];
    map_lanes([&](int first, auto... v) GEMMLET_INLINE_LAMBDA {
      V summand[n];
      const V result = f(v..., summand);
      for (int k = 0; k < n; ++k) sum[k].add(part<T>(summand[k], first));
      return result;
    });
    x = out;
    return totals(sum);
  }
  GEMMLET_INLINE Terms terms() {
    const V most = largest();
    return {most, transform<1>([=](V v, V* summand) GEMMLET_INLINE_LAMBDA { return *summand = term(v - most); }).of[0]};
  }
  GEMMLET_INLINE Terms term_sum() const {
    const V most = largest();
    return {most, sums<1>([=](V v, V* summand) GEMMLET_INLINE_LAMBDA { *summand = term(v - most); }).of[0]};
  }
  GEMMLET_INLINE Statistic sum() const {
    return sums<1>([](V v, V* summand) GEMMLET_INLINE_LAMBDA { *summand = v; }).of[0];
  }
  // Sums of what f(v, summand) sets, as of transform; the numbers stay.
  template <int n, class F>
  GEMMLET_INLINE Sums<n> sums(F f) const {
    DoubleSum<T> sum[n];
    layout.each(
        [&](int first, V v) GEMMLET_INLINE_LAMBDA {
          V summand[n];
          f(v, summand);
          for (int k = 0; k < n; ++k) sum[k].add(part<T>(summand[k], first));
        },
        x);
    return totals(sum);
  }
  GEMMLET_INLINE Statistic dot() const {
    DoubleSum<T> sum;
    layout.each([&](int first, V v, V w)
                    GEMMLET_INLINE_LAMBDA { sum.add_product(part<T>(v, first), part<T>(w, first)); },
                x, second);
    return Layout::total(sum);
  }

  GEMMLET_INLINE Statistic at_label() const {
    const auto of_row = [&](int r) GEMMLET_INLINE_LAMBDA { return static_cast<double>(x[layout.at(r, labels[r])]); };
    if (label_count == Layout::count) [[likely]]
      return Layout::statistic_of(of_row);
    return Layout::statistic_of([&](int r) GEMMLET_INLINE_LAMBDA { return r < label_count ? of_row(r) : 0.0; });
  }
  GEMMLET_INLINE void set_label(const Statistic& s) const {
    double of_row[Layout::count];
    Layout::store_statistic(of_row, s);
    for (int r = 0; r < label_count; ++r) out[layout.at(r, labels[r])] = static_cast<T>(of_row[r]);
  }

 private:
  template <int n>
  GEMMLET_INLINE static Sums<n> totals(const DoubleSum<T> (&sum)[n]) {
    Sums<n> totals;
    for (int k = 0; k < n; ++k) totals.of[k] = Layout::total(sum[k]);
    return totals;
  }
  template <class F>
  GEMMLET_INLINE void map_lanes(F f) const {
    if constexpr (std::is_same_v<Second, Alone>)
      layout.map(out, f, x);
    else
      layout.map(out, [&](int first, V v, V w) GEMMLET_INLINE_LAMBDA { return f(first, v, of_second(w)); }, x, second);
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

// Rows in one task: some `chunk_elements`, whole groups of those that are computed at once.
template <class T>
Index rows_per_chunk(Index columns) {
  return (tuning::chunk_elements / columns / lanes<T> + 1) * lanes<T>;
}

}  // namespace gemmlet
