// The SIMD value type: GCC and Clang vector extensions, one register wide, the same source for every instruction set.
//
// Contract
//   Vec<T>           T = float or double; GEMMLET_VECTOR_BYTES wide (cmake/isa_variants.cmake).
//   load, store      any alignment. load_part and store_part touch the first n lanes alone, 0 <= n <= lanes.
//   select(m, a, b)  m is what a comparison of vectors gives. NaN compares false: `select(x <= 0, 0, x)` keeps NaN.
//   fma(a, b, c)     one rounding where the instruction set has it, else two. Nothing else is ever contracted
//                    (-ffp-contract=off), so that a value does not depend on what the compiler inlined around it.
// A result depends on its own lane alone: the tail of an array goes through the same code as its body, same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Left to itself, GCC stops inlining where a formula is long, and calls a function for each of its instructions.
#define GEMMLET_INLINE [[gnu::always_inline]] inline
#define GEMMLET_INLINE_LAMBDA __attribute__((always_inline))

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
GEMMLET_INLINE V constant(double value) {
  return static_cast<ScalarOf<V>>(value) - V{};
}
template <class T>
GEMMLET_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <class T>
GEMMLET_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
GEMMLET_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// v in the lanes from `first` to before `end`, zero in the others.
template <class T>
GEMMLET_INLINE Vec<T> keep_lanes(Vec<T> v, int first, int end) {
  using I = IntOf<T>;
  Vec<I> lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = I(i);
  return (lane >= I(first) - Vec<I>{}) & (lane < I(end) - Vec<I>{}) ? v : Vec<T>{};
}

// Whether a part of a vector is loaded as fast as all of it.
#if defined(__AVX2__)
inline constexpr bool masks_are_cheap = true;
#else
inline constexpr bool masks_are_cheap = false;
#endif

#if defined(__AVX512F__)
// The first n lanes.
template <class T>
GEMMLET_INLINE auto first_lanes(int n) {
  return static_cast<std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>>((1u << n) - 1);
}
GEMMLET_INLINE Vec<float> load_part(const float* p, int n, float fill = 0) {
  return _mm512_mask_loadu_ps(splat(fill), first_lanes<float>(n), p);
}
GEMMLET_INLINE Vec<double> load_part(const double* p, int n, double fill = 0) {
  return _mm512_mask_loadu_pd(splat(fill), first_lanes<double>(n), p);
}
GEMMLET_INLINE void store_part(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, first_lanes<float>(n), v); }
GEMMLET_INLINE void store_part(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, first_lanes<double>(n), v); }
#else
template <class T>
GEMMLET_INLINE Vec<T> load_part(const T* p, int n, T fill = 0) {
#if defined(__AVX2__)
  Vec<IntOf<T>> lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = static_cast<IntOf<T>>(i);
  const auto wanted = lane < static_cast<IntOf<T>>(n) - Vec<IntOf<T>>{};
  if constexpr (sizeof(T) == 4)
    return wanted ? Vec<T>(_mm256_maskload_ps(p, std::bit_cast<__m256i>(wanted))) : splat(fill);
  else
    return wanted ? Vec<T>(_mm256_maskload_pd(p, std::bit_cast<__m256i>(wanted))) : splat(fill);
#else
  alignas(GEMMLET_VECTOR_BYTES) T buffer[lanes<T>];
  for (int i = 0; i < lanes<T>; ++i) buffer[i] = i < n ? p[i] : fill;
  return load(buffer);
#endif
}

// Masked stores of AVX2 take longer than these on AMD's processors.
template <class T>
GEMMLET_INLINE void store_part(T* p, Vec<T> v, int n) {
  alignas(GEMMLET_VECTOR_BYTES) T buffer[lanes<T>];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

template <class M, class V>
GEMMLET_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

// These loops over lanes become single instructions.
template <class V>
GEMMLET_INLINE V fma(V a, V b, V c) {
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
GEMMLET_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  Vec<float> r;
  for (int i = 0; i < lanes<float>; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
#endif

// a / b; a GPU takes a shorter way, and asks for more: cuda/scalar.cuh.
template <class V>
GEMMLET_INLINE V quotient(V a, V b) {
  return a / b;
}

template <class V>
GEMMLET_INLINE V sqrt(V a) {
  V r;
  for (int i = 0; i < lanes<ScalarOf<V>>; ++i) {
    if constexpr (sizeof(ScalarOf<V>) == 4)
      r[i] = __builtin_sqrtf(a[i]);
    else
      r[i] = __builtin_sqrt(a[i]);
  }
  return r;
}

GEMMLET_INLINE double sqrt(double a) { return __builtin_sqrt(a); }

// Writes the numbers of x that are not 0, and their places, counted from `first`; returns how many. At most n are written.
template <class T>
GEMMLET_INLINE std::int64_t list_nonzeros(const T* x, std::int64_t n, std::int32_t first, std::int32_t* places,
                                          T* values) {
  std::int64_t count = 0;
#if defined(__AVX512F__)
  for (std::int64_t i = 0; i < n; i += 16) {
    const auto there = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffffu);
    __mmask16 mask;
    if constexpr (sizeof(T) == 4) {
      const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
      mask = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const auto listed = static_cast<__mmask16>((1u << __builtin_popcount(mask)) - 1);
      _mm512_mask_storeu_ps(values + count, listed, _mm512_maskz_compress_ps(mask, v));
    } else {
      unsigned masks = 0;
      std::int64_t at = count;
      for (int half = 0; half < 2; ++half) {
        const __m512d v = _mm512_maskz_loadu_pd(static_cast<__mmask8>(there >> (8 * half)), x + i + 8 * half);
        const __mmask8 part = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ);
        const int listed = __builtin_popcount(part);
        _mm512_mask_storeu_pd(values + at, static_cast<__mmask8>((1u << listed) - 1),
                              _mm512_maskz_compress_pd(part, v));
        masks |= static_cast<unsigned>(part) << (8 * half);
        at += listed;
      }
      mask = static_cast<__mmask16>(masks);
    }
    const __m512i lanes16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_add_epi32(lanes16, _mm512_set1_epi32(first + static_cast<std::int32_t>(i)));
    const int listed = __builtin_popcount(mask);
    _mm512_mask_storeu_epi32(places + count, static_cast<__mmask16>((1u << listed) - 1),
                             _mm512_maskz_compress_epi32(mask, place));
    count += listed;
  }
#else
  for (std::int64_t i = 0; i < n; ++i) {
    // Branch-free: every number is written, and counted if it is not 0.
    places[count] = first + static_cast<std::int32_t>(i);
    values[count] = x[i];
    count += x[i] != T(0);
  }
#endif
  return count;
}

// One bit for each of 64 bytes: whether it is not 0.
GEMMLET_INLINE std::uint64_t mask_of_bytes(const std::uint8_t* bytes) {
  std::uint64_t mask = 0;
#if defined(__AVX512BW__)
  const __m512i all = _mm512_loadu_si512(bytes);
  mask = _mm512_test_epi8_mask(all, all);
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    const int zero = _mm_movemask_epi8(_mm_cmpeq_epi8(some, _mm_setzero_si128()));
    mask |= static_cast<std::uint64_t>(~zero & 0xffff) << i;
  }
#else
  constexpr std::uint64_t low = 0x7f7f7f7f7f7f7f7f, top = ~low;
  for (int i = 0; i < 64; i += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    // The top bit of each byte that is not 0; these eight bits, side by side.
    const std::uint64_t set = (eight | ((eight & low) + low)) & top;
    mask |= ((set >> 7) * 0x0102040810204080 >> 56) << i;
  }
#endif
  return mask;
}

// v in the lanes whose bit is set, zero in the others.
template <class T>
GEMMLET_INLINE Vec<T> keep_set_lanes(Vec<T> v, std::uint64_t set) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(set), v);
  else
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(set), v);
#else
  using I = IntOf<T>;
  Vec<I> bit;
  for (int i = 0; i < lanes<T>; ++i) bit[i] = I(1) << i;
  return (splat(static_cast<I>(set & ((1u << lanes<T>)-1))) & bit) != Vec<I>{} ? v : Vec<T>{};
#endif
}

// Writes 64 bytes: those whose bit is set, zero for the others. They may be written to where they are read from.
GEMMLET_INLINE void keep_set_bytes(const std::uint8_t* from, std::uint64_t set, std::uint8_t* to) {
#if defined(__AVX512BW__)
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi8(set, from));
#else
  for (int i = 0; i < 64; i += 8) {
    constexpr std::uint64_t low = 0x7f7f7f7f7f7f7f7f, each = 0x0101010101010101;
    std::uint64_t eight;
    std::memcpy(&eight, from + i, 8);
    // One bit in each byte that is kept, then all of it.
    const std::uint64_t spread = ((set >> i & 0xff) * each) & 0x8040201008040201;
    eight &= ((spread | ((spread & low) + low)) >> 7 & each) * 0xff;
    std::memcpy(to + i, &eight, 8);
  }
#endif
}

// One bit for each half of the lanes, the lower one first: whether it is below `bound`.
GEMMLET_INLINE std::uint64_t mask_of_halves_below(Vec<std::uint32_t> v, std::uint16_t bound) {
#if defined(__AVX512BW__)
  return _mm512_cmplt_epu16_mask(std::bit_cast<__m512i>(v), _mm512_set1_epi16(static_cast<short>(bound)));
#else
  const Vec<std::uint16_t> halves = std::bit_cast<Vec<std::uint16_t>>(v);
  const auto below = halves < bound - Vec<std::uint16_t>{};
#if defined(__AVX2__)
  const __m256i bytes = _mm256_packs_epi16(std::bit_cast<__m256i>(below), _mm256_setzero_si256());
  const auto mask = static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes));
  return (mask & 0xff) | (mask >> 8 & 0xff00);
#elif defined(__SSE2__)
  const __m128i bytes = _mm_packs_epi16(std::bit_cast<__m128i>(below), _mm_setzero_si128());
  return static_cast<std::uint64_t>(_mm_movemask_epi8(bytes));
#else
  std::uint64_t mask = 0;
  for (int i = 0; i < lanes<std::uint16_t>; ++i) mask |= static_cast<std::uint64_t>(below[i] & 1) << i;
  return mask;
#endif
#endif
}

template <class V>
GEMMLET_INLINE IntVecOf<V> bits(V a) {
  return std::bit_cast<IntVecOf<V>>(a);
}

template <class V>
GEMMLET_INLINE V from_bits(IntVecOf<V> a) {
  return std::bit_cast<V>(a);
}

// (a + b) >> count, all unsigned: sums wrap round, and zeros come in at the top.
template <class I>
GEMMLET_INLINE I sum_shifted_right(I a, ScalarOf<I> b, int count) {
  using U = Vec<std::make_unsigned_t<ScalarOf<I>>>;
  return std::bit_cast<I>((std::bit_cast<U>(a) + static_cast<ScalarOf<U>>(b)) >> count);
}

// The products of the low halves of a's lanes with b: GCC finds the instruction neither in a product of masked lanes nor in
// a loop, and takes three times as long.
GEMMLET_INLINE Vec<std::uint64_t> multiply_low_halves(Vec<std::uint64_t> a, std::uint32_t b) {
#if defined(__AVX512F__)
  // Without a mask it is the same instruction, and GCC warns of its own header.
  const __m512i product = _mm512_maskz_mul_epu32(0xff, std::bit_cast<__m512i>(a), _mm512_set1_epi64(b));
  return std::bit_cast<Vec<std::uint64_t>>(product);
#elif defined(__AVX2__)
  return std::bit_cast<Vec<std::uint64_t>>(_mm256_mul_epu32(std::bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return std::bit_cast<Vec<std::uint64_t>>(_mm_mul_epu32(std::bit_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  for (int i = 0; i < lanes<std::uint64_t>; ++i)
    a[i] = static_cast<std::uint64_t>(static_cast<std::uint32_t>(a[i])) * b;
  return a;
#endif
}

// Each lane holds two integers of 16 bits: the sum of the products of both. The sum must fit.
GEMMLET_INLINE Vec<std::int32_t> multiply_pairs(Vec<std::int32_t> a, Vec<std::int32_t> b) {
#if defined(__AVX512BW__)
  return std::bit_cast<Vec<std::int32_t>>(_mm512_madd_epi16(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return std::bit_cast<Vec<std::int32_t>>(_mm256_madd_epi16(std::bit_cast<__m256i>(a), std::bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return std::bit_cast<Vec<std::int32_t>>(_mm_madd_epi16(std::bit_cast<__m128i>(a), std::bit_cast<__m128i>(b)));
#else
  using U = Vec<std::uint32_t>;  // whose shifts to the left are defined for any number
  const auto low = [](Vec<std::int32_t> v) {
    return std::bit_cast<Vec<std::int32_t>>(std::bit_cast<U>(v) << 16) >> 16;
  };
  return low(a) * low(b) + (a >> 16) * (b >> 16);
#endif
}

// Bytes as integers of 32 bits, and back: lanes that are not within [0, 255] have no defined byte.
GEMMLET_INLINE Vec<std::int32_t> load_bytes(const std::uint8_t* p) {
  typedef std::uint8_t Bytes __attribute__((vector_size(lanes<std::int32_t>)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec<std::int32_t>);
}
GEMMLET_INLINE void store_bytes(std::uint8_t* p, Vec<std::int32_t> v) {
  // Where no single instruction does it, GCC takes the lanes one by one.
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i first = _mm256_shuffle_epi8(std::bit_cast<__m256i>(v), _mm256_set1_epi32(0x0c080400));
  _mm_storeu_si64(p, _mm_unpacklo_epi32(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1)));
#elif defined(__SSE2__) && !defined(__AVX512F__)
  const __m128i shorts = _mm_packs_epi32(std::bit_cast<__m128i>(v), std::bit_cast<__m128i>(v));
  const int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
  std::memcpy(p, &bytes, sizeof bytes);
#else
  typedef std::uint8_t Bytes __attribute__((vector_size(lanes<std::int32_t>)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

#if defined(__AVX512BW__)
// Whether one instruction looks up integers of 16 bits in a table of two registers.
inline constexpr bool lookups_are_cheap = true;

// The upper (half = 1) or lower (0) halves of the lanes of a, then of b.
template <int half>
GEMMLET_INLINE Vec<std::int16_t> halves(Vec<std::int32_t> a, Vec<std::int32_t> b) {
  Vec<std::int16_t> order;
  for (int i = 0; i < lanes<std::int16_t>; ++i) order[i] = static_cast<std::int16_t>(2 * i + half);
  return std::bit_cast<Vec<std::int16_t>>(
      _mm512_permutex2var_epi16(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(order), std::bit_cast<__m512i>(b)));
}

// `index`; but where place == wanted, the integer at (index % 64) of the table, which is aligned to 64 bytes.
GEMMLET_INLINE Vec<std::int16_t> look_up_where(Vec<std::int16_t> place, Vec<std::int16_t> wanted,
                                               const std::uint16_t* table, Vec<std::int16_t> index) {
  const __mmask32 there = _mm512_cmpeq_epi16_mask(std::bit_cast<__m512i>(place), std::bit_cast<__m512i>(wanted));
  return std::bit_cast<Vec<std::int16_t>>(_mm512_mask2_permutex2var_epi16(
      _mm512_load_si512(table), std::bit_cast<__m512i>(index), there, _mm512_load_si512(table + 32)));
}

// Each lane of `a` holds two bytes, each of b two signed ones: the sum of the products of both, which must fit.
GEMMLET_INLINE Vec<std::int16_t> multiply_byte_pairs(Vec<std::int16_t> a, Vec<std::int16_t> b) {
  return std::bit_cast<Vec<std::int16_t>>(_mm512_maddubs_epi16(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
}
// a b / 2^16, rounded down; and a b / 2^15, rounded to the nearest integer, halves up.
GEMMLET_INLINE Vec<std::int16_t> multiply_high(Vec<std::int16_t> a, Vec<std::int16_t> b) {
  return std::bit_cast<Vec<std::int16_t>>(_mm512_mulhi_epi16(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
}
GEMMLET_INLINE Vec<std::int16_t> multiply_high_rounded(Vec<std::int16_t> a, Vec<std::int16_t> b) {
  return std::bit_cast<Vec<std::int16_t>>(_mm512_mulhrs_epi16(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
}

// The least of the lanes.
GEMMLET_INLINE int reduce_min(Vec<std::int16_t> v) {
  const __m512i all = _mm512_xor_si512(std::bit_cast<__m512i>(v), _mm512_set1_epi16(-0x8000));
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return (_mm_cvtsi128_si32(_mm_minpos_epu16(quarter)) & 0xffff) - 0x8000;
}

// The first n bytes as integers of 16 bits, 0 <= n <= 32, the other lanes 0; and 32 lanes as bytes.
GEMMLET_INLINE Vec<std::int16_t> load_bytes_as_shorts(const std::uint8_t* p, int n) {
  const auto there = static_cast<__mmask32>((std::uint64_t{1} << n) - 1);
  return std::bit_cast<Vec<std::int16_t>>(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, p)));
}
GEMMLET_INLINE void store_bytes(std::uint8_t* p, Vec<std::int16_t> v) {
  const __m256i bytes = _mm512_cvtepi16_epi8(std::bit_cast<__m512i>(v));
  std::memcpy(p, &bytes, sizeof bytes);
}
GEMMLET_INLINE bool has_nonzero(Vec<std::int16_t> v) {
  return _mm512_test_epi16_mask(std::bit_cast<__m512i>(v), std::bit_cast<__m512i>(v)) != 0;
}
#else
inline constexpr bool lookups_are_cheap = false;
#endif

// The rounding error of p = a * b, exactly: a * b = p + error. |a|, |b| below 2^100 (float), 2^900 (double).
template <class V>
GEMMLET_INLINE V product_error(V a, V b, V p) {
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

// The lanes of a vector in double, in one or two vectors, and back.
template <class T>
struct Doubles {
  static constexpr int parts = 8 / static_cast<int>(sizeof(T));
  Vec<double> part[parts] = {};
};

// Loops over lanes, as above: GCC makes more of them than of __builtin_convertvector.
template <class T>
GEMMLET_INLINE Doubles<T> to_double(Vec<T> v) {
  Doubles<T> d;
  for (int p = 0; p < d.parts; ++p)
    for (int i = 0; i < lanes<double>; ++i) d.part[p][i] = static_cast<double>(v[p * lanes<double> + i]);
  return d;
}

template <class T>
GEMMLET_INLINE Vec<T> from_double(const Doubles<T>& d) {
  Vec<T> v;
  for (int p = 0; p < d.parts; ++p)
    for (int i = 0; i < lanes<double>; ++i) v[p * lanes<double> + i] = static_cast<T>(d.part[p][i]);
  return v;
}

// Sums of float or double vectors, lane by lane, in double; the lanes are added first to last, which is part of the
// result.
template <class T>
struct DoubleSum {
  Doubles<T> sum;
  GEMMLET_INLINE void add(Vec<T> v) {
    const Doubles<T> d = to_double<T>(v);
    for (int i = 0; i < d.parts; ++i) sum.part[i] += d.part[i];
  }
  GEMMLET_INLINE void add_product(Vec<T> v, Vec<T> w) {
    const Doubles<T> a = to_double<T>(v), b = to_double<T>(w);
    for (int i = 0; i < a.parts; ++i) sum.part[i] += a.part[i] * b.part[i];
  }
  double lane(int i) const { return sum.part[i / lanes<double>][i % lanes<double>]; }
  double total() const {
    double t = 0;
    for (int i = 0; i < lanes<T>; ++i) t += lane(i);
    return t;
  }
};

}  // namespace gemmlet
