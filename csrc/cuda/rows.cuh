// Softmax and its logarithm over the rows of a matrix, and their gradients.
//
// Contract
//   Rows are contiguous, one after the other; columns >= 1. An output may be one of the inputs, element by element.
//   A team of threads takes a row: some lanes of a warp, each holding `Values` numbers of the row in registers; or a
//   block; or, where the row is too long for that (Values = 0), a block that reads the row again in every pass.
//   N neighbouring numbers are one access of memory: columns is a multiple of N, and rows begin at multiples of their N
//   numbers' size.
//   Teams go over the rows in strides of the grid, of any size. Blocks have `row_threads` threads, or one team.
//   Accuracy: the largest number is taken off first; sums of n numbers have an error of n ULP at most, and less with
//   every thread that shares them. A row that holds NaN or +inf, or only -inf, gives NaN.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/scalar.cuh"
#include "cuda/warp_reduce.cuh"

namespace gemmlet {

// Threads of a block whose teams have `Threads`.
template <int Threads>
inline constexpr int row_threads = Threads > 256 ? Threads : 256;

// `Threads` neighbouring threads that share a row, a power of two up to a warp, or the whole block.
template <int Threads>
struct Team {
  static constexpr int size = Threads, per_block = row_threads<Threads> / Threads;

  __device__ static int thread() { return threadIdx.x % Threads; }
  // Which of the grid's teams this is, and how many there are.
  __device__ static Index index() { return static_cast<Index>(blockIdx.x) * per_block + threadIdx.x / Threads; }
  __device__ static Index count() { return static_cast<Index>(gridDim.x) * per_block; }

  template <class V, class Op>
  __device__ static V reduce(V v, Op op) {
    if constexpr (Threads <= 32) {
      return reduce_lanes<Threads>(v, op);
    } else {
      __shared__ V partial[32];
      return reduce_block<Threads>(v, op, partial);
    }
  }
};

// A thread's share of a row, N neighbouring numbers at a time.
template <class T, class Team, int Values, int N = 1>
class Row : public RowValues<T> {
  static_assert(Values % N == 0);
  // Numbers of 16 bits are loaded in pairs: what stands for absent ones would cost instructions for each else.
  static constexpr int in_word = sizeof(T) == 2 && N % 2 == 0 ? 2 : 1, words = N / in_word;
  using Word = RegisterOf<T, in_word>;

 public:
  using RowValues<T>::lowered, RowValues<T>::term, RowValues<T>::term_of;
  using V = Compute<T>;
  using Number = T;
  using Threads = Team;
  static constexpr bool held = Values > 0;

  // The numbers to be held, as they come from memory: where there is nothing, `absent`. `present` is false for a team that
  // has no row left.
  struct Loaded {
    Pack<Word, words> pack[held ? Values / N : 1];

    __device__ __forceinline__ void load(const T* row, int width, bool present, V absent) {
      if constexpr (held) {
        const int end = present ? width : 0;
#pragma unroll
        for (int j = 0; j < Values / N; ++j) {
#pragma unroll
          for (int w = 0; w < words; ++w) pack[j].value[w] = word_of(absent);
          if (column(j * N) < end) pack[j] = load_pack<words>(reinterpret_cast<const Word*>(row + column(j * N)));
        }
      }
    }
  };

  // width: of the matrix. A team that is not `present` only takes part in the reductions. absent: what stands for the
  // number of column `without`, too.
  __device__ __forceinline__ Row(Loaded loaded, const T* row, int width, bool present, V absent, int without = -1)
      : row_(row), width_(width), end_(present ? width : 0), without_(without), absent_(absent) {
    if constexpr (held) {
      const int slot = slot_of(without);
#pragma unroll
      for (int i = 0; i < Values; i += in_word) {
        Word word = loaded.pack[i / N].value[i % N / in_word];
        if constexpr (in_word == 2) {
          const unsigned taken = (slot & 1) == 0 ? 0xffffu : 0xffff0000u;
          if (slot >> 1 == i / 2) word = (word & ~taken) | (word_of(absent) & taken);
          value_[i] = low(word), value_[i + 1] = high(word);
        } else {
          value_[i] = slot == i ? absent : widen(word);
        }
      }
    }
  }
  __device__ __forceinline__ Row(const T* row, int width, bool present, V absent, int without = -1)
      : Row(loaded(row, width, present, absent), row, width, present, absent, without) {}

  // f(column, number, slot) for each, `absent` ones included; `at` has the number of another row in that column and slot.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if constexpr (held) {
      each_slot([&](int j) {
#pragma unroll
        for (int k = 0; k < N; ++k) f(column(j) + k, value_[j + k], j + k);
      });
    } else {
      for (int i = Team::thread() * N; i < end_; i += Team::size * N) {
        const Pack<T, N> pack = load_pack<N>(row_ + i);
#pragma unroll
        for (int k = 0; k < N; ++k) f(i + k, i + k == without_ ? absent_ : widen(pack, k), 0);
      }
    }
  }

  // to[column] = f(column, number, slot) for each. `to` may be the row itself. Of held rows all is computed before it is
  // written, so that what a warp writes to one place comes at one time.
  template <class F>
  __device__ __forceinline__ void map(T* to, F f) const {
    if constexpr (held) {
      Pack<T, N> result[Values / N];
      each_slot([&](int j) {
        V numbers[N];
#pragma unroll
        for (int k = 0; k < N; ++k) numbers[k] = f(column(j) + k, value_[j + k], j + k);
        result[j / N] = narrowed<T>(numbers);
      });
      each_slot([&](int j) {
        if (column(j) < end_) store_pack(to + column(j), result[j / N]);
      });
    } else {
      for (int i = Team::thread() * N; i < end_; i += Team::size * N) {
        const Pack<T, N> pack = load_pack<N>(row_ + i);
        V numbers[N];
#pragma unroll
        for (int k = 0; k < N; ++k) numbers[k] = f(i + k, i + k == without_ ? absent_ : widen(pack, k), 0);
        store_pack(to + i, narrowed<T>(numbers));
      }
    }
  }

  __device__ __forceinline__ V at(int column, int slot) const {
    if constexpr (held)
      return value_[slot];
    else
      return widen(row_[column]);
  }

  // Where the thread holds the number of a column; -1 if it is another's.
  __device__ static int slot_of(int column) {
    const unsigned at = column;
    const bool own = at / N % Team::size == Team::thread();
    return own ? static_cast<int>(held ? at / (N * Team::size) * N + at % N : 0) : -1;
  }

  // The sum of f(column, number, slot) over the row, `absent` numbers included.
  template <class F>
  __device__ __forceinline__ V sum(F f) const {
    V s = 0;
    each([&](int i, V v, int slot) { s += f(i, v, slot); });
    return Team::reduce(s, Sum{});
  }

  // The largest number, at least `least`.
  __device__ __forceinline__ V largest(V least) const {
    each([&](int, V v, int) { least = Largest{}(least, v); });
    return Team::reduce(least, Largest{});
  }

  // f(column, number, slot) for each, which replaces held numbers.
  template <class F>
  __device__ __forceinline__ void transform(F f) {
    if constexpr (held)
      each_slot([&](int j) {
#pragma unroll
        for (int k = 0; k < N; ++k) value_[j + k] = f(column(j) + k, value_[j + k], j + k);
      });
    else
      each(f);
  }

  // The largest number, as above, and the sum of the terms of number - largest. These terms replace held
  // numbers, of which `absent` ones must be -inf.
  struct Terms {
    V largest, total;
  };
  __device__ __forceinline__ Terms terms(V least = -infinity<V>()) {
    V total = 0;
    if constexpr (held) {
      const V most = largest(least);
      transform([&](int, V v, int) {
        const V e = term(v - most);
        total += e;
        return e;
      });
      return {most, Team::reduce(total, Sum{})};
    } else {
      // One pass: what was added up is scaled down wherever a larger number comes.
      V most = least;
      for (int i = Team::thread() * N; i < end_; i += Team::size * N) {
        const Pack<T, N> pack = load_pack<N>(row_ + i);
        V number[N], larger = most;
#pragma unroll
        for (int k = 0; k < N; ++k) {
          number[k] = i + k == without_ ? absent_ : widen(pack, k);
          larger = Largest{}(larger, number[k]);
        }
        total *= lowered(term_of(most, larger));
#pragma unroll
        for (int k = 0; k < N; ++k) total += term_of(number[k], larger);
        most = larger;
      }
      const V of_thread = most;
      most = Team::reduce(most, Largest{});
      // A thread without any number has the sum 0; where the largest is infinite comes NaN, as of held rows.
      total *= lowered(term_of(of_thread, most));
      if (!(abs(most) < infinity<V>())) total = not_a_number<V>();
      return {most, Team::reduce(total, Sum{})};
    }
  }

  // f(number) for the v that `map` or `each` passes after transform(f), which has replaced held numbers only.
  template <class F>
  __device__ __forceinline__ static V transformed(V v, F f) {
    if constexpr (held)
      return v;
    else
      return f(v);
  }

 private:
  // The column of a slot, the first of a pack.
  __device__ static constexpr int column(int slot) { return (slot / N * Team::size + Team::thread()) * N; }

  __device__ static Loaded loaded(const T* row, int width, bool present, V absent) {
    Loaded result;
    result.load(row, width, present, absent);
    return result;
  }

  __device__ static Word word_of(V x) {
    if constexpr (in_word == 2) {
      unsigned short half;
      const T number = narrow<T>(x);
      memcpy(&half, &number, sizeof half);
      return half * 0x10001u;
    } else {
      return narrow<T>(x);
    }
  }
  __device__ static V low(unsigned word) { return widen(T{static_cast<unsigned short>(word)}); }
  __device__ static V high(unsigned word) {
    if constexpr (same_type<T, bfloat16>)
      return reinterpreted<float>(word & 0xffff0000u);
    else
      return widen(T{static_cast<unsigned short>(word >> 16)});
  }

  // f(slot) for the first slot of each pack. Slots go in groups, which all threads of the grid leave out where they are
  // beyond the width; a group is worth a branch.
  template <class F>
  __device__ __forceinline__ void each_slot(F f) const {
    constexpr int group = Values % 8 == 0 ? 8 : Values;
#pragma unroll
    for (int j = 0; j < Values; j += N) {
      if (j > 0 && j % group == 0 && j / N * N * Team::size >= width_) break;
      f(j);
    }
  }

  const T* row_;
  int width_, end_, without_;
  V absent_, value_[held ? Values : 1];
};

// A row as formulas/rows.h asks for it. second(column, slot) is the second operand; Alone: there is none.
// write(row, f) makes results f(column, number, slot), as row.map and row.each do.
struct Alone {};
template <class R, class Second, class Write>
class Operands : public RowValues<typename R::Number> {
 public:
  using V = typename R::V;
  template <int n>
  struct Sums {
    V of[n];
  };

  __device__ __forceinline__ Operands(R& row, Second second, Write write) : row_(row), second_(second), write_(write) {}

  template <class F>
  __device__ __forceinline__ static V transformed(V v, F f) {
    return R::transformed(v, f);
  }

  __device__ __forceinline__ V largest() const { return row_.largest(-infinity<V>()); }
  __device__ __forceinline__ auto terms() const { return row_.terms(); }
  __device__ __forceinline__ auto term_sum() const {
    R copy = row_;
    return copy.terms();
  }
  __device__ __forceinline__ V sum() const {
    return row_.sum([](int, V v, int) { return v; });
  }
  __device__ __forceinline__ V dot() const {
    return row_.sum([&](int i, V v, int slot) { return v * second_(i, slot); });
  }
  template <class F>
  __device__ __forceinline__ void map(F f) const {
    write_(row_, [=, second = second_](int i, V v, int slot) {
      if constexpr (same_type<Second, Alone>)
        return f(v);
      else
        return f(v, second(i, slot));
    });
  }
  template <int n, class F>
  __device__ __forceinline__ Sums<n> transform(F f) const {
    Sums<n> sums{};
    row_.transform([&](int i, V v, int slot) {
      V summand[n];
      const V result = f(v, second_(i, slot), summand);
#pragma unroll
      for (int k = 0; k < n; ++k) sums.of[k] += summand[k];
      return result;
    });
#pragma unroll
    for (int k = 0; k < n; ++k) sums.of[k] = R::Threads::reduce(sums.of[k], Sum{});
    return sums;
  }

 private:
  R& row_;
  Second second_;
  Write write_;
};

// What a thread needs besides the numbers that it holds, as found by compiling for each architecture.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int other_numbers = 72;
#else
inline constexpr int other_numbers = 40;
#endif

// Blocks for whose threads a multiprocessor has registers: for `Values` numbers of `rows` rows, and for the others.
template <class T, int Threads, int Values, int rows>
inline constexpr int row_blocks = [] {
  constexpr int numbers = rows * Values + other_numbers, words = numbers * static_cast<int>(sizeof(Compute<T>)) / 4;
  constexpr int blocks = 65536 / row_threads<Threads> / words;
  return Values > 0 && blocks > 0 ? blocks : 1;
}();

template <class F, class T, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads<Threads>, (row_blocks<T, Threads, Values, 1>))
    row_forward(const T* x, T* y, Index rows, int columns) {
  using Team = gemmlet::Team<Threads>;
  // Every team takes as many steps as the first of its block: reductions take all threads.
  for (Index r = Team::index(); r - threadIdx.x / Threads < rows; r += Team::count()) {
    const bool present = r < rows;
    const Index at = present ? r * columns : 0;
    Row<T, Team, Values, N> row(x + at, columns, present, -infinity<Compute<T>>());
    F::forward(Operands(row, Alone{}, [=](const auto& of, auto f) { of.map(y + at, f); }));
  }
}

template <class F, class T, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads<Threads>, (row_blocks<T, Threads, Values, 2>))
    row_backward(const T* grad_y, const T* y, T* grad_x, Index rows, int columns) {
  using Team = gemmlet::Team<Threads>;
  for (Index r = Team::index(); r - threadIdx.x / Threads < rows; r += Team::count()) {
    const bool present = r < rows;
    const Index at = present ? r * columns : 0;
    const Row<T, Team, Values, N> grad(grad_y + at, columns, present, 0), result(y + at, columns, present, 0);
    const auto second = [&](int i, int slot) { return result.at(i, slot); };
    F::backward(Operands(grad, second, [=](const auto& of, auto f) { of.map(grad_x + at, f); }));
  }
}

}  // namespace gemmlet
