// The SIMD value type: GCC and Clang vector extensions, one register wide, the same source for every instruction set.
//
// Contract
//   Vec<T>           T = float or double; GEMMLET_VECTOR_BYTES wide (cmake/isa_variants.cmake).
//   load, store      any alignment. load_part and store_part touch the first n lanes alone, 0 <= n <= lanes.
//   select(m, a, b)  m is what a comparison of vectors gives. NaN compares false: `select(x <= 0, 0, x)` keeps NaN.
//   fma(a, b, c)     one rounding where the instruction set has it, else two. Nothing else is ever contracted
//                    (-ffp-contract=off), so that a value does not depend on what the compiler inlined around it.
// Everything is always inlined: left to itself, GCC calls fma as a function where much else was inlined already.
// A result depends on its own lane alone: the tail of an array goes through the same code as its body, same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace gemmlet {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(GEMMLET_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
inline constexpr int lanes = GEMMLET_VECTOR_BYTES / static_cast<int>(sizeof(T));

// The type of one lane, and the integer and the vector of integers as wide as it.
template <class V>
using ScalarOf = std::remove_cvref_t<decltype(V{}[0])>;
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
template <class V>
using IntVecOf = Vec<IntOf<ScalarOf<V>>>;

// Every lane `value`. (Taking 0 off keeps -0.0, and compiles to nothing; adding it does neither.)
template <class V>
[[gnu::always_inline]] inline V constant(double value) {
  return static_cast<ScalarOf<V>>(value) - V{};
}
template <class T>
[[gnu::always_inline]] inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <class T>
[[gnu::always_inline]] inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
[[gnu::always_inline]] inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
[[gnu::always_inline]] inline Vec<T> load_part(const T* p, int n, T fill = 0) {
  alignas(GEMMLET_VECTOR_BYTES) T buffer[lanes<T>];
  for (int i = 0; i < lanes<T>; ++i) buffer[i] = i < n ? p[i] : fill;
  return load(buffer);
}

template <class T>
[[gnu::always_inline]] inline void store_part(T* p, Vec<T> v, int n) {
  alignas(GEMMLET_VECTOR_BYTES) T buffer[lanes<T>];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class M, class V>
[[gnu::always_inline]] inline V select(M mask, V a, V b) {
  return mask ? a : b;
}

// These loops over lanes become single instructions.
template <class V>
[[gnu::always_inline]] inline V fma(V a, V b, V c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  V r;
  for (int i = 0; i < lanes<ScalarOf<V>>; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
template <>
[[gnu::always_inline]] inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  Vec<float> r;
  for (int i = 0; i < lanes<float>; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
#endif

template <class V>
[[gnu::always_inline]] inline V sqrt(V a) {
  V r;
  for (int i = 0; i < lanes<ScalarOf<V>>; ++i) {
    if constexpr (sizeof(ScalarOf<V>) == 4)
      r[i] = __builtin_sqrtf(a[i]);
    else
      r[i] = __builtin_sqrt(a[i]);
  }
  return r;
}

template <class V>
[[gnu::always_inline]] inline IntVecOf<V> bits(V a) {
  return std::bit_cast<IntVecOf<V>>(a);
}

template <class V>
[[gnu::always_inline]] inline V from_bits(IntVecOf<V> a) {
  return std::bit_cast<V>(a);
}

template <class V>
[[gnu::always_inline]] inline V abs(V a) {
  return from_bits<V>(bits(a) & std::numeric_limits<IntOf<ScalarOf<V>>>::max());
}

template <class V>
[[gnu::always_inline]] inline V copysign(V magnitude, V sign) {
  constexpr auto mask = std::numeric_limits<IntOf<ScalarOf<V>>>::min();
  return from_bits<V>((bits(magnitude) & ~mask) | (bits(sign) & mask));
}

// Both keep NaN in `a`.
template <class V>
[[gnu::always_inline]] inline V at_least(V a, V low) {
  return select(a < low, low, a);
}
template <class V>
[[gnu::always_inline]] inline V at_most(V a, V high) {
  return select(a > high, high, a);
}

// The rounding error of p = a * b, exactly: a * b = p + error. |a|, |b| below 2^100 (float), 2^900 (double).
template <class V>
[[gnu::always_inline]] inline V product_error(V a, V b, V p) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, -p);
#else
  // Dekker, 1971: split each factor into halves whose products are exact.
  using T = ScalarOf<V>;
  constexpr T splitter = sizeof(T) == 4 ? T(4097) : T(134217729);
  const V as = a * splitter, bs = b * splitter;
  const V ah = as - (as - a), bh = bs - (bs - b);
  const V al = a - ah, bl = b - bh;
  return ((ah * bh - p) + ah * bl + al * bh) + al * bl;
#endif
}

// Sums of float or double vectors, lane by lane, in double; the lanes are added first to last, which is part of the
// result.
template <class T>
struct DoubleSum {
  alignas(GEMMLET_VECTOR_BYTES) double lane[lanes<T>] = {};
  void add(Vec<T> v, int n) {
    if (n == lanes<T>)
      for (int i = 0; i < lanes<T>; ++i) lane[i] += static_cast<double>(v[i]);
    else
      for (int i = 0; i < n; ++i) lane[i] += static_cast<double>(v[i]);
  }
  void add_product(Vec<T> v, Vec<T> w) {
    for (int i = 0; i < lanes<T>; ++i) lane[i] += static_cast<double>(v[i]) * static_cast<double>(w[i]);
  }
  double total() const {
    double sum = 0;
    for (double value : lane) sum += value;
    return sum;
  }
};

}  // namespace gemmlet
