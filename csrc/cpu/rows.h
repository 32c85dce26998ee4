// Loops over one row of a matrix, in vectors.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vector_math.h"

namespace gemmlet {

template <class T>
inline Vec<T> load_lanes(const T* p, int n, T fill = 0) {
  return n == lanes<T> ? load(p) : load_part(p, n, fill);
}

template <class T>
inline void store_lanes(T* p, Vec<T> v, int n) {
  if (n == lanes<T>)
    store(p, v);
  else
    store_part(p, v, n);
}

// f(column, n): a vector of n lanes begins at each column; n is below lanes<T> at most once, at the end.
template <class T, class F>
inline void for_lanes(Index columns, F&& f) {
  Index j = 0;
  for (; j + lanes<T> <= columns; j += lanes<T>) f(j, lanes<T>);
  if (j < columns) f(j, static_cast<int>(columns - j));
}

// NaN may be passed over: exp(NaN - max) brings it back.
template <class T>
inline T row_max(const T* row, Index columns) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  Vec<T> largest = splat<T>(lowest);
  for_lanes<T>(columns, [&](Index j, int n) {
    const Vec<T> v = load_lanes(row + j, n, lowest);
    largest = select(v > largest, v, largest);
  });
  T result = lowest;
  for (int i = 0; i < lanes<T>; ++i) result = largest[i] > result ? largest[i] : result;
  return result;
}

}  // namespace gemmlet
