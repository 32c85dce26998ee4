// The scalar value types of a GPU: what csrc/formulas/ asks for, on float and double; and the types that are stored.
//
// Contract
//   Compiled by NVRTC (the product), nvcc (a second opinion) and g++ (the tests, on the CPU); no header of theirs.
//   Numbers are stored as float, double, float16 or bfloat16, and computed in Compute<T>: float for the last two; or in
//   Sufficient<T> (reduced_precision.cuh) where a result is rounded to them at once.
//   Nothing is contracted but what is written as fma (-fmad=false), and nothing is flushed to zero: an elementwise
//   result in float or double has the bits of the CPU's.
#pragma once

#if defined(__CUDACC__)
#define GEMMLET_INLINE __host__ __device__ __forceinline__
#else
#define GEMMLET_INLINE [[gnu::always_inline]] inline
#endif
#define GEMMLET_INLINE_LAMBDA

namespace gemmlet {

using Index = long long;

struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <class A, class B>
inline constexpr bool same_type = false;
template <class A>
inline constexpr bool same_type<A, A> = true;

template <class V>
struct Scalar;
template <>
struct Scalar<float> {
  using Int = int;
  using Unsigned = unsigned;
};
template <>
struct Scalar<double> {
  using Int = long long;
  using Unsigned = unsigned long long;
};
template <>
struct Scalar<int> {
  using Unsigned = unsigned;
};
template <>
struct Scalar<long long> {
  using Unsigned = unsigned long long;
};

// As cpu/simd.h has them for vectors; a scalar is a vector of one.
template <class V>
using ScalarOf = V;
template <class T>
using IntOf = typename Scalar<T>::Int;
template <class V>
using IntVecOf = typename Scalar<V>::Int;

template <class V>
GEMMLET_INLINE constexpr V constant(double value) {
  return static_cast<V>(value);
}

template <class V>
GEMMLET_INLINE V select(bool mask, V a, V b) {
  return mask ? a : b;
}

GEMMLET_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
GEMMLET_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
GEMMLET_INLINE float sqrt(float a) { return ::sqrtf(a); }
GEMMLET_INLINE double sqrt(double a) { return ::sqrt(a); }

// The same bytes as another type.
template <class To, class From>
GEMMLET_INLINE To reinterpreted(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
GEMMLET_INLINE IntVecOf<V> bits(V a) {
  return reinterpreted<IntVecOf<V>>(a);
}
template <class V>
GEMMLET_INLINE V from_bits(IntVecOf<V> a) {
  return reinterpreted<V>(a);
}

// (a + b) >> count, all unsigned: sums wrap round, and zeros come in at the top.
template <class I>
GEMMLET_INLINE I sum_shifted_right(I a, I b, int count) {
  using U = typename Scalar<I>::Unsigned;
  return static_cast<I>((static_cast<U>(a) + static_cast<U>(b)) >> count);
}

// The rounding error of p = a * b, exactly.
template <class V>
GEMMLET_INLINE V product_error(V a, V b, V p) {
  return fma(a, b, -p);
}

}  // namespace gemmlet

#include "cuda/ptx.cuh"

namespace gemmlet {

// One instruction each, where math.h has some for any type.
GEMMLET_INLINE float abs(float a) { return ptx::abs(a); }
GEMMLET_INLINE float copysign(float magnitude, float sign) { return ptx::copysign(magnitude, sign); }

// a / b to the last bit, by the steps that the operator takes when it has found no number that they are not for (Markstein,
// 1990: from a reciprocal and a rest a - q b that are correctly rounded comes a quotient that is). |b| is within
// [2^-60, 2^60], or NaN; a is finite, or NaN; and the result is 0 or not below 2^-100, or b is a power of 2.
GEMMLET_INLINE float quotient(float a, float b) {
  const float guess = ptx::reciprocal(b), r = fma(guess, fma(-b, guess, 1.0f), guess), q = a * r;
  return fma(r, fma(-b, q, a), q);
}
GEMMLET_INLINE double quotient(double a, double b) { return a / b; }

}  // namespace gemmlet

// Each after the functions that it is written on.
#include "formulas/math.h"

#include "cuda/reduced_precision.cuh"

#include "formulas/activations.h"
#include "formulas/optimizers.h"
#include "formulas/rows.h"

namespace gemmlet {

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
// What numbers of type T are computed in.
template <class T>
using Compute = typename ComputeType<T>::type;

template <class T, class Computed = Compute<T>>
struct SufficientType {
  using type = Coarse;
};
template <class T>
struct SufficientType<T, T> {
  using type = T;
};
// What is enough for a formula whose result is kept as T.
template <class T>
using Sufficient = typename SufficientType<T>::type;

GEMMLET_INLINE float widen(float x) { return x; }
GEMMLET_INLINE double widen(double x) { return x; }
GEMMLET_INLINE float widen(float16 x) { return ptx::float_of_half(x.bits); }
GEMMLET_INLINE float widen(bfloat16 x) { return reinterpreted<float>(static_cast<unsigned>(x.bits) << 16); }

// Rounds to nearest, ties to even.
template <class T>
GEMMLET_INLINE T narrow(Compute<T> x) {
  if constexpr (same_type<T, float16>)
    return {ptx::half_of_float(x)};
  else if constexpr (same_type<T, bfloat16>)
    return {ptx::bfloat_of_float(x)};
  else
    return x;
}

// A sample's number, of which a byte stands for value / 255.
template <class T>
GEMMLET_INLINE T number(T x) {
  return x;
}
template <class T>
GEMMLET_INLINE T number(unsigned char byte) {
  // Rounded as the division is, for each of the 256: a quotient, and its error added (Markstein, 1990).
  const T of = T(255), reciprocal = T(1) / of, x = static_cast<T>(byte), quotient = x * reciprocal;
  return fma(fma(-quotient, of, x), reciprocal, quotient);
}

// The values of a row of numbers of type T, as formulas/rows.h asks for them.
template <class T>
struct RowValues {
  using V = Compute<T>;
  // Terms are taken times this, which subnormal bfloat16 numbers need, and which would cost an instruction to take off each.
  static constexpr float raise = same_type<T, V> ? 1.0f : raised_decay_times;

  // The error of a float, 2^-22 and |x| 2^-23 of it, is less than that of a difference and a sum.
  GEMMLET_INLINE static V term(V x) {
    if constexpr (same_type<T, double>)
      return decay(x);
    else if constexpr (same_type<T, float>)
      return static_cast<float>(gemmlet::exp(Coarse(x)));
    else
      return static_cast<float>(raised_decay(Coarse(x)));
  }
  // term(x - largest) for x <= largest, which may be -inf for both: that of 0.
  GEMMLET_INLINE static V term_of(V x, V largest) { return x == largest ? V(raise) : term(x - largest); }
  // A sum of terms without what they are raised by.
  GEMMLET_INLINE static V lowered(V total) { return total * V(1 / raise); }

  GEMMLET_INLINE static V quotient(V a, V b) {
    return static_cast<V>(gemmlet::quotient(Sufficient<T>(a), Sufficient<T>(b)));
  }
  GEMMLET_INLINE static V exp(V x) { return static_cast<V>(gemmlet::exp(Sufficient<T>(x))); }
  GEMMLET_INLINE static V log(V total) { return gemmlet::log(lowered(total)); }
  GEMMLET_INLINE static V vector(V statistic) { return statistic; }

  struct Divisor {
    V reciprocal;
    GEMMLET_INLINE friend V operator/(V v, Divisor d) { return v * d.reciprocal; }
  };
  GEMMLET_INLINE static Divisor divisor(V total) { return {quotient(V(1), total)}; }
};

}  // namespace gemmlet
