#include "cpu/ufuncs.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/threads.h"
#include "formulas/math.h"

namespace gemmlet::ufuncs {
namespace {

// Functions of vectors, named as in the lists. A tail goes through the same code. Its other lanes raise no flags of their own:
// they repeat its first elements, or hold 1 where there is one operand.

// Of vectors or numbers: the first operand where it is NaN, the second where both are equal, as zeros have signs.
template <class V>
GEMMLET_INLINE V either(V a, V b, bool larger) {
  if constexpr (std::is_floating_point_v<V>)
    return (larger ? a > b : a < b) || a != a ? a : b;
  else
    return larger ? select((a > b) | (a != a), a, b) : select((a < b) | (a != a), a, b);
}

// Whether a mask is true in all lanes.
template <class M>
GEMMLET_INLINE bool all_lanes(M mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(mask[0]) == 4)
    return _mm512_movepi32_mask(std::bit_cast<__m512i>(mask)) == 0xffff;
  else
    return _mm512_movepi64_mask(std::bit_cast<__m512i>(mask)) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(std::bit_cast<__m256i>(mask)) == -1;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(std::bit_cast<__m128i>(mask)) == 0xffff;
#else
  bool all = true;
  for (int i = 0; i < GEMMLET_VECTOR_BYTES / static_cast<int>(sizeof(mask[0])); ++i) all &= mask[i] != 0;
  return all;
#endif
}

// Lanes of -1 for bytes that are not 0, 0 for others.
template <class T>
GEMMLET_INLINE Vec<IntOf<T>> mask_of(const std::uint8_t* bytes) {
  typedef signed char Bytes __attribute__((vector_size(lanes<T>)));
  Bytes b;
  std::memcpy(&b, bytes, sizeof b);
  return __builtin_convertvector(b != 0, Vec<IntOf<T>>);
}

#define GEMMLET_BINARY(name, raises, expression) \
  struct name {                                  \
    static constexpr bool raises_flags = raises; \
    template <class V>                           \
    GEMMLET_INLINE static V call(V a, V b) {     \
      return expression;                         \
    }                                            \
  };
namespace functions {
GEMMLET_BINARY(add, true, a + b)
GEMMLET_BINARY(subtract, true, a - b)
GEMMLET_BINARY(multiply, true, a* b)
GEMMLET_BINARY(sum_of_one, true, a* b + V{})  // no -0
GEMMLET_BINARY(divide, true, a / b)
GEMMLET_BINARY(maximum, false, either(a, b, true))
GEMMLET_BINARY(minimum, false, either(a, b, false))
}  // namespace functions
#undef GEMMLET_BINARY

// What a function raises is either what the processor says, or found from its arguments: the branch-free exp, log and tanh
// raise flags of their own.
enum class Flags { none, of_processor, of_arguments };

#define GEMMLET_UNARY(name, cheap, flags, expression) \
  struct name {                                       \
    static constexpr bool is_cheap = cheap;           \
    static constexpr Flags raises = Flags::flags;     \
    template <class V>                                \
    GEMMLET_INLINE static V call(V x) {               \
      return expression;                              \
    }                                                 \
  };
namespace functions {
GEMMLET_UNARY(negative, true, none, -x)
GEMMLET_UNARY(absolute, true, none, abs(x))
GEMMLET_UNARY(square, true, of_processor, x* x)
GEMMLET_UNARY(sqrt, false, of_processor, gemmlet::sqrt(x))
GEMMLET_UNARY(sign, true, none,
              select(x > V{}, constant<V>(1), select(x < V{}, constant<V>(-1), select(x == V{}, V{}, x))))
GEMMLET_UNARY(exp, false, of_arguments, gemmlet::exp(x))
GEMMLET_UNARY(log, false, of_arguments, gemmlet::log(x))
GEMMLET_UNARY(tanh, false, none, gemmlet::tanh(x))
}  // namespace functions
#undef GEMMLET_UNARY

// What the arguments of exp and log raise: nothing, where all are within [lowest, highest] or NaN, as most are.
template <class T>
struct ExpFlags {
  static constexpr bool single = sizeof(T) == 4;
  // The logarithms of the smallest normal number, and of the largest one.
  static constexpr T lowest = single ? -0x1.5d589ep+6 : -0x1.6232bdd7abcd2p+9,
                     highest = single ? 0x1.62e42ep+6 : 0x1.62e42fefa39efp+9;
  static unsigned of(T x) {
    if (x > highest) return x < std::numeric_limits<T>::infinity() ? overflow : 0;
    return x < lowest && x > -std::numeric_limits<T>::infinity() ? underflow : 0;
  }
};
template <class T>
struct LogFlags {
  static constexpr T lowest = std::numeric_limits<T>::denorm_min(), highest = std::numeric_limits<T>::infinity();
  static unsigned of(T x) { return x == 0 ? divide_by_zero : x < 0 ? invalid : 0; }
};
template <class Find, class T>
unsigned flags_of(const T* x, Index n) {
  Vec<T> least = splat(T(1)), most = least;  // 1 is within both intervals; NaN compares false
  for_lanes<T>(n, [&](Index j, int count) GEMMLET_INLINE_LAMBDA {
    const Vec<T> v = load_lanes(x + j, count, T(1));
    least = select(v < least, v, least);
    most = select(v > most, v, most);
  });
  bool ordinary = true;
  for (int lane = 0; lane < lanes<T>; ++lane) ordinary &= least[lane] >= Find::lowest && most[lane] <= Find::highest;
  unsigned flags = 0;
  for (Index j = 0; !ordinary && j < n; ++j) flags |= Find::of(x[j]);
  return flags;
}

template <class T, class F>
[[gnu::flatten]] unsigned unary_range(const T* x, T* y, Index i, Index end) {
  // Flags are found a block ahead, as y may be x.
  constexpr Index block = 512;
  unsigned flags = 0;
  while (i < end) {
    const Index n = std::min<Index>(end - i, F::raises == Flags::of_arguments ? block : end - i);
    if constexpr (F::raises == Flags::of_arguments)
      flags |= flags_of<std::conditional_t<std::is_same_v<F, functions::exp>, ExpFlags<T>, LogFlags<T>>>(x + i, n);
    for_lanes<T>(n, [&](Index j, int count) GEMMLET_INLINE_LAMBDA {
      store_lanes(y + i + j, F::call(load_lanes(x + i + j, count, T(1))), count);
    });
    i += n;
  }
  return flags;
}

template <class T, class F>
unsigned unary_chunks(const T* x, T* y, Index n) {
  constexpr Index chunk = F::raises == Flags::none && !std::is_same_v<F, functions::tanh> ? tuning::ufunc_cheap_chunk
                                                                                          : tuning::ufunc_costly_chunk;
  if (n <= chunk) return unary_range<T, F>(x, y, 0, n);
  std::atomic<unsigned> raised{0};
  parallel_chunks(
      n,
      [&](Index begin, Index end) {
        if (const unsigned some = unary_range<T, F>(x, y, begin, end)) raised.fetch_or(some, std::memory_order_relaxed);
      },
      chunk);
  return raised.load();
}

template <class T, class F>
unsigned unary_all(const T* x, T* y, Index n) {
  if constexpr (F::raises == Flags::of_processor) {
    clear_float_status();
    unary_chunks<T, F>(x, y, n);
    return float_status();
  } else {
    unsigned raised;
    {
      const FloatStatusGuard none(0);
      raised = unary_chunks<T, F>(x, y, n);
    }
    if (raised != 0) raise_float_status(raised);
    return raised;
  }
}

// One operand of a row: its elements one after the other, or one for all of them.
template <class T, bool broadcasts>
struct Elements {
  const T* data;
  Vec<T> all = {};
  GEMMLET_INLINE explicit Elements(const T* d) : data(d) {
    if constexpr (broadcasts) all = splat(*d);
  }
  GEMMLET_INLINE Vec<T> at(Index j, int n) const {
    if constexpr (broadcasts)
      return all;
    else
      return load_lanes(data + j, n, data[j]);
  }
};

template <class T, class F, bool a_broadcasts, bool b_broadcasts>
GEMMLET_INLINE void binary_row(const T* a, const T* b, T* y, Index n) {
  const Elements<T, a_broadcasts> as(a);
  const Elements<T, b_broadcasts> bs(b);
  for_lanes<T>(n, [&](Index j, int count)
                      GEMMLET_INLINE_LAMBDA { store_lanes(y + j, F::call(as.at(j, count), bs.at(j, count)), count); });
}

// A function of scalars by way of the vectors, so that a formula stands once.
template <class F, class T>
GEMMLET_INLINE T scalar(T a, T b) {
  return F::call(splat(a), splat(b))[0];
}

template <class T, class F>
[[gnu::flatten]] void binary_block(const T* a, const T* b, T* y, const Grid& g, Index row, Index rows, Index column,
                                   Index columns) {
  const bool contiguous = g.a_column <= 1 && g.a_column >= 0 && g.b_column <= 1 && g.b_column >= 0;
  for (Index i = row; i < row + rows; ++i) {
    const T *ai = a + i * g.a_row + column * g.a_column, *bi = b + i * g.b_row + column * g.b_column;
    T* yi = y + i * g.y_row + column;
    if (contiguous && g.a_column == 1 && g.b_column == 1) {
      binary_row<T, F, false, false>(ai, bi, yi, columns);
    } else if (contiguous && g.a_column == 1) {
      binary_row<T, F, false, true>(ai, bi, yi, columns);
    } else if (contiguous && g.b_column == 1) {
      binary_row<T, F, true, false>(ai, bi, yi, columns);
    } else {
      for (Index j = 0; j < columns; ++j) yi[j] = scalar<F>(ai[j * g.a_column], bi[j * g.b_column]);
    }
  }
}

// Rows too narrow for the vectors, beside one row for all of them, which is repeated: a wide row then is several of them.
constexpr Index narrow_columns = 32, repeated_elements = 256;

template <class T, class F>
void binary_narrow(const T* a, const T* b, T* y, const Grid& g) {
  const bool a_repeats = g.a_row == 0;
  const T* const row = a_repeats ? a : b;
  const Index step = repeated_elements / g.columns;
  T repeated[repeated_elements];
  for (Index r = 0; r < std::min(step, g.rows); ++r)
    std::memcpy(repeated + r * g.columns, row, static_cast<std::size_t>(g.columns) * sizeof(T));
  for (Index i = 0; i < g.rows; i += step) {
    const Index n = std::min(step, g.rows - i) * g.columns, at = i * g.columns;
    binary_block<T, F>(a_repeats ? repeated : a + at, a_repeats ? b + at : repeated, y + at, {1, n, 0, 1, 0, 1, n}, 0,
                       1, 0, n);
  }
}

// f(row, rows, column, columns), by several threads where the grid is large.
template <class F>
void for_blocks_of(const Grid& g, F&& f) {
  if (g.rows * g.columns <= tuning::ufunc_cheap_chunk) return f(Index{0}, g.rows, Index{0}, g.columns);
  if (g.rows == 1)
    return parallel_chunks(
        g.columns, [&](Index begin, Index end) { f(Index{0}, Index{1}, begin, end - begin); },
        tuning::ufunc_cheap_chunk);
  parallel_chunks(
      g.rows, [&](Index begin, Index end) { f(begin, end - begin, Index{0}, g.columns); },
      std::max<Index>(1, tuning::ufunc_cheap_chunk / g.columns));
}

template <class T, class F>
void binary_grid(const T* a, const T* b, T* y, const Grid& g) {
  const bool a_flat = g.a_row == g.columns, b_flat = g.b_row == g.columns;
  if (g.rows > 4 && g.columns > 1 && g.columns <= narrow_columns && g.a_column == 1 && g.b_column == 1 &&
      g.y_row == g.columns && ((a_flat && g.b_row == 0) || (b_flat && g.a_row == 0)) &&
      g.rows * g.columns <= tuning::ufunc_cheap_chunk) {
    return binary_narrow<T, F>(a, b, y, g);
  }
  for_blocks_of(g, [&](Index row, Index rows, Index column, Index columns) {
    binary_block<T, F>(a, b, y, g, row, rows, column, columns);
  });
}

template <class T, class F>
unsigned binary_all(const T* a, const T* b, T* y, const Grid& g) {
  if constexpr (F::raises_flags) {
    clear_float_status();
    binary_grid<T, F>(a, b, y, g);
    return float_status();
  } else {
    const FloatStatusGuard none(0);
    binary_grid<T, F>(a, b, y, g);
    return 0;
  }
}

template <class T, class F>
void compare_all(const T* a, const T* b, bool* y, const Grid& g) {
  const FloatStatusGuard none(0);
  const F f;
  for_blocks_of(g, [&](Index row, Index rows, Index column, Index columns) {
    for (Index i = row; i < row + rows; ++i) {
      const T* __restrict ai = a + i * g.a_row + column * g.a_column, * __restrict bi =
                                                                          b + i * g.b_row + column * g.b_column;
      bool* __restrict yi = y + i * g.y_row + column;
      // Loops that the compiler makes vectors of.
      if (g.a_column == 1 && g.b_column == 1)
        for (Index j = 0; j < columns; ++j) yi[j] = f(ai[j], bi[j]);
      else if (g.a_column == 1 && g.b_column == 0)
        for (Index j = 0; j < columns; ++j) yi[j] = f(ai[j], *bi);
      else
        for (Index j = 0; j < columns; ++j) yi[j] = f(ai[j * g.a_column], bi[j * g.b_column]);
    }
  });
}

// Reductions.

// NumPy's pairwise sum.
template <class T>
T pairwise_sum(const T* x, Index n) {
  if (n < 8) {
    T sum = T(-0.0);  // which changes nothing
    for (Index i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  if (n <= 128) {
    T r[8];
    for (int j = 0; j < 8; ++j) r[j] = x[j];
    Index i = 8;
    for (; i + 8 <= n; i += 8)
      for (int j = 0; j < 8; ++j) r[j] += x[i + j];
    T sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    for (; i < n; ++i) sum += x[i];
    return sum;
  }
  const Index half = n / 2 - n / 2 % 8;
  return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
}

template <class T>
T extreme_of_row(const T* x, Index n, bool larger) {
  const auto more = [larger](auto a, auto b) GEMMLET_INLINE_LAMBDA { return either(a, b, larger); };
  T result = x[0];
  if (n < 2 * lanes<T>) {
    for (Index i = 1; i < n; ++i) result = either(result, x[i], larger);
    return result;
  }
  // The last vector overlaps the one before.
  Vec<T> best = load(x), other = best;
  Index i = lanes<T>;
  for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
    best = more(best, load(x + i));
    other = more(other, load(x + i + lanes<T>));
  }
  for (; i < n; i += lanes<T>) best = more(best, load(x + std::min(i, n - lanes<T>)));
  best = more(best, other);
  result = best[0];
  for (int lane = 1; lane < lanes<T>; ++lane) result = either(result, best[lane], larger);
  return result;
}

template <class T>
T mean_of(T sum, Index n) {
  return static_cast<T>(static_cast<double>(sum) / static_cast<double>(n));  // float32 too: n is an int64 there
}

template <class T, class F>
[[gnu::flatten]] void fold_rows(const T* x, T* y, Index n, Index stride, Index columns) {
  std::memcpy(y, x, static_cast<std::size_t>(columns) * sizeof(T));
  for (Index k = 1; k < n; ++k) binary_row<T, F, false, false>(y, x + k * stride, y, columns);
}

}  // namespace

template <class T>
unsigned binary(Binary function, const T* a, const T* b, T* y, const Grid& grid) {
  using Function = unsigned (*)(const T*, const T*, T*, const Grid&);
#define GEMMLET_ENTRY(name) &binary_all<T, functions::name>,
  static constexpr Function table[] = {GEMMLET_BINARY_UFUNCS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[static_cast<int>(function)](a, b, y, grid);
}

template <class T>
void compare(Comparison comparison, const T* a, const T* b, bool* y, const Grid& grid) {
  using Function = void (*)(const T*, const T*, bool*, const Grid&);
  // In the order of Comparison.
  static constexpr Function table[] = {&compare_all<T, std::less<T>>,     &compare_all<T, std::less_equal<T>>,
                                       &compare_all<T, std::equal_to<T>>, &compare_all<T, std::not_equal_to<T>>,
                                       &compare_all<T, std::greater<T>>,  &compare_all<T, std::greater_equal<T>>};
  table[static_cast<int>(comparison)](a, b, y, grid);
}

template <class T>
unsigned unary(Unary function, const T* x, T* y, Index n) {
  using Function = unsigned (*)(const T*, T*, Index);
#define GEMMLET_ENTRY(name) &unary_all<T, functions::name>,
  static constexpr Function table[] = {GEMMLET_UNARY_UFUNCS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[static_cast<int>(function)](x, y, n);
}

template <class T>
void clip(const T* x, T low, T high, T* y, Index n) {
  const FloatStatusGuard none(0);
  const Vec<T> lows = splat(low), highs = splat(high);
  parallel_chunks(
      n,
      [&](Index begin, Index end) {
        for_lanes<T>(end - begin, [&](Index j, int count) {
          const Vec<T> v = load_lanes(x + begin + j, count);
          store_lanes(y + begin + j, at_most(at_least(v, lows), highs), count);
        });
      },
      tuning::ufunc_cheap_chunk);
}

template <class T>
void where(const std::uint8_t* mask, const T* a, Index a_step, const T* b, Index b_step, T* y, Index n) {
  const Vec<T> first = splat(*a), second = splat(*b);
  parallel_chunks(
      n,
      [&](Index begin, Index end) {
        Index i = begin;
        for (; i + lanes<T> <= end; i += lanes<T>)
          store(y + i,
                select(mask_of<T>(mask + i), a_step == 1 ? load(a + i) : first, b_step == 1 ? load(b + i) : second));
        for (; i < end; ++i) y[i] = mask[i] != 0 ? a[i * a_step] : b[i * b_step];
      },
      tuning::ufunc_cheap_chunk);
}

namespace {

template <class From, class F>
void convert_each(const From* x, double* y, Index n, F f) {
  parallel_chunks(
      n,
      [&](Index begin, Index end) {
        for (Index i = begin; i < end; ++i) y[i] = f(x[i]);
      },
      tuning::ufunc_cheap_chunk);
}

}  // namespace

template <class From>
void convert(const From* x, double* y, Index n) {
  convert_each(x, y, n, [](From value) { return static_cast<double>(value); });
}
void convert_bools(const std::uint8_t* x, double* y, Index n) {
  convert_each(x, y, n, [](std::uint8_t value) { return value != 0 ? 1.0 : 0.0; });
}
template void convert(const std::uint8_t*, double*, Index);
template void convert(const std::int8_t*, double*, Index);
template void convert(const std::int32_t*, double*, Index);
template void convert(const std::int64_t*, double*, Index);
template void convert(const float*, double*, Index);

template <class T>
void fill(T value, T* y, Index n) {
  parallel_chunks(n, [&](Index begin, Index end) { std::fill(y + begin, y + end, value); }, tuning::ufunc_cheap_chunk);
}

template <class T>
void fill_where(const std::uint8_t* mask, T value, T* y, Index n) {
  parallel_chunks(
      n,
      [&](Index begin, Index end) {
        Index i = begin;
#if defined(__AVX512F__)
        for (; i + lanes<T> <= end; i += lanes<T>) {
          const auto lanes_set = mask_of<T>(mask + i);
          if constexpr (sizeof(T) == 4)
            _mm512_mask_storeu_ps(y + i, _mm512_movepi32_mask(std::bit_cast<__m512i>(lanes_set)), splat(value));
          else
            _mm512_mask_storeu_pd(y + i, _mm512_movepi64_mask(std::bit_cast<__m512i>(lanes_set)), splat(value));
        }
#endif
        // Without a branch, which random masks would mispredict: what is not to be written goes elsewhere.
        T elsewhere;
        for (; i < end; ++i) *(mask[i] != 0 ? y + i : &elsewhere) = value;
      },
      tuning::ufunc_cheap_chunk);
}

template <class T>
unsigned reduce(Reduction reduction, T zero, const T* x, T* y, Index outer, Index n, Index inner) {
  const bool adds = reduction == Reduction::sum || reduction == Reduction::mean;
  const bool larger = reduction == Reduction::max;
  const auto finish = [&](T* of, Index count) {
    if (reduction == Reduction::mean)
      for (Index j = 0; j < count; ++j) of[j] = mean_of(of[j], n);
  };
  std::optional<FloatStatusGuard> none;
  if (adds)
    clear_float_status();
  else
    none.emplace(0);
  if (inner == 1) {
    const auto row = [&](Index i) {
      const T* of_row = x + i * n;
      y[i] = adds ? pairwise_sum(of_row, n) + zero : extreme_of_row(of_row, n, larger);
    };
    parallel_chunks(
        outer,
        [&](Index begin, Index end) {
          for (Index i = begin; i < end; ++i) row(i);
          finish(y + begin, end - begin);
        },
        std::max<Index>(1, tuning::ufunc_cheap_chunk / n));
  } else {
    // Threads divide the columns: whole cache lines of them.
    const bool large = outer == 1 && n * inner > 2 * tuning::ufunc_cheap_chunk;
    const Index width = large ? std::max<Index>(64, tuning::ufunc_cheap_chunk / n / 64 * 64) : inner;
    for (Index o = 0; o < outer; ++o)
      parallel_chunks(
          inner,
          [&](Index begin, Index end) {
            const T* from = x + o * n * inner + begin;
            T* to = y + o * inner + begin;
            if (adds)
              fold_rows<T, functions::add>(from, to, n, inner, end - begin);
            else if (larger)
              fold_rows<T, functions::maximum>(from, to, n, inner, end - begin);
            else
              fold_rows<T, functions::minimum>(from, to, n, inner, end - begin);
            for (Index j = 0; adds && j < end - begin; ++j) to[j] += zero;
            finish(to, end - begin);
          },
          width);
  }
  return adds ? float_status() : 0;
}

template <class T>
void arg_extreme(const T* x, bool smallest, Index* y, Index rows, Index columns) {
  const FloatStatusGuard as_before(float_status());
  for (Index i = 0; i < rows; ++i) {
    const T* row = x + i * columns;
    const T extreme = extreme_of_row(row, columns, !smallest);
    Index j = 0;
    const bool is_nan = extreme != extreme;
    const Vec<T> wanted = splat(extreme);
    for (; j + lanes<T> <= columns; j += lanes<T>) {
      const Vec<T> v = load(row + j);
      if (!all_lanes(is_nan ? v == v : v != wanted)) break;
    }
    // Another thread may have written over it meanwhile.
    while (j + 1 < columns && (is_nan ? row[j] == row[j] : row[j] != extreme)) ++j;
    y[i] = std::min(j, columns - 1);
  }
}

namespace {

template <class T>
double dot_of_strided(const T* x, Index x_stride, const T* y, Index y_stride, Index n) {
  double sum[4] = {};
  Index i = 0;
  for (; i + 4 <= n; i += 4)
    for (int c = 0; c < 4; ++c)
      sum[c] += static_cast<double>(x[(i + c) * x_stride]) * static_cast<double>(y[(i + c) * y_stride]);
  for (; i < n; ++i) sum[0] += static_cast<double>(x[i * x_stride]) * static_cast<double>(y[i * y_stride]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T>
T dot_of_contiguous(const T* x, const T* y, Index n) {
  // Several accumulators, to hide the latency of the additions.
  Vec<T> sum[4] = {};
  Index i = 0;
  for (; i + 4 * lanes<T> <= n; i += 4 * lanes<T>)
    for (int c = 0; c < 4; ++c) sum[c] = fma(load(x + i + c * lanes<T>), load(y + i + c * lanes<T>), sum[c]);
  for (; i < n; i += lanes<T>) {
    const int count = static_cast<int>(std::min<Index>(lanes<T>, n - i));
    sum[0] = fma(load_lanes(x + i, count), load_lanes(y + i, count), sum[0]);
  }
  const Vec<T> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  T result = 0;
  for (int lane = 0; lane < lanes<T>; ++lane) result += total[lane];
  return result;
}

}  // namespace

template <class T>
T dot(const T* x, Index x_stride, const T* y, Index y_stride, Index n) {
  if (x_stride == 1 && y_stride == 1 && n <= tuning::dot_block) return dot_of_contiguous(x, y, n);
  double total = 0;
  for (Index begin = 0; begin < n; begin += tuning::dot_block) {
    const Index count = std::min(tuning::dot_block, n - begin);
    const T *xb = x + begin * x_stride, *yb = y + begin * y_stride;
    total += x_stride == 1 && y_stride == 1 ? static_cast<double>(dot_of_contiguous(xb, yb, count))
                                            : dot_of_strided(xb, x_stride, yb, y_stride, count);
  }
  return static_cast<T>(total);
}

namespace {

// y = a b for a vector b, few rows, and columns of a that are contiguous: as sums of columns.
template <class T, int vectors>
void sum_of_columns(View<T> a, const T* b, Index b_stride, T* y) {
  Vec<T> sum[2][vectors], total[vectors] = {};
  const int rest = static_cast<int>(a.rows - (vectors - 1) * lanes<T>);
  const auto add = [&](Index k, int chain) GEMMLET_INLINE_LAMBDA {
    const T* column = a.data + k * a.column_stride;
    const Vec<T> factor = splat(b[k * b_stride]);
    for (int v = 0; v < vectors; ++v)
      sum[chain][v] = fma(v < vectors - 1 ? load(column + v * lanes<T>) : load_part(column + v * lanes<T>, rest),
                          factor, sum[chain][v]);
  };
  for (Index k = 0; k < a.columns;) {
    const Index end = std::min(a.columns, k + tuning::dot_block);
    for (int v = 0; v < vectors; ++v) sum[0][v] = sum[1][v] = Vec<T>{};
    for (; k + 2 <= end; k += 2) {
      add(k, 0);
      add(k + 1, 1);
    }
    if (k < end) add(k++, 0);
    for (int v = 0; v < vectors; ++v) total[v] += sum[0][v] + sum[1][v];
  }
  for (int v = 0; v < vectors; ++v) store_lanes(y + v * lanes<T>, total[v], v < vectors - 1 ? lanes<T> : rest);
}

}  // namespace

template <class T>
void matmul(View<T> a, View<T> b, T* y) {
  if (b.columns == 1 && a.row_stride == 1 && a.columns > 1 && a.rows <= 4 * lanes<T> &&
      (masks_are_cheap || a.rows % lanes<T> == 0)) {
    using Function = void (*)(View<T>, const T*, Index, T*);
    static constexpr Function table[] = {&sum_of_columns<T, 1>, &sum_of_columns<T, 2>, &sum_of_columns<T, 3>,
                                         &sum_of_columns<T, 4>};
    return table[(a.rows - 1) / lanes<T>](a, b.data, b.row_stride, y);
  }
  if (a.columns == 1 && (b.column_stride == 1 || b.columns == 1)) {
    // An outer product.
    binary_grid<T, functions::sum_of_one>(a.data, b.data, y, {a.rows, b.columns, a.row_stride, 0, 0, 1, b.columns});
  } else if (a.rows * b.columns * a.columns <= 64) {
    for (Index i = 0; i < a.rows; ++i)
      for (Index j = 0; j < b.columns; ++j) {
        T sum = 0;
        for (Index k = 0; k < a.columns; ++k)
          sum += a.data[i * a.row_stride + k * a.column_stride] * b.data[k * b.row_stride + j * b.column_stride];
        y[i * b.columns + j] = sum;
      }
  } else {
    linear<T>(a, b, nullptr, -1, T(0), y, nullptr);
  }
}

#define GEMMLET_INSTANTIATE(T)                                                           \
  template unsigned binary(Binary, const T*, const T*, T*, const Grid&);                 \
  template void compare(Comparison, const T*, const T*, bool*, const Grid&);             \
  template unsigned unary(Unary, const T*, T*, Index);                                   \
  template void clip(const T*, T, T, T*, Index);                                         \
  template void where(const std::uint8_t*, const T*, Index, const T*, Index, T*, Index); \
  template void fill(T, T*, Index);                                                      \
  template void fill_where(const std::uint8_t*, T, T*, Index);                           \
  template unsigned reduce(Reduction, T, const T*, T*, Index, Index, Index);             \
  template void arg_extreme(const T*, bool, Index*, Index, Index);                       \
  template T dot(const T*, Index, const T*, Index, Index);                               \
  template void matmul(View<T>, View<T>, T*);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet::ufuncs
