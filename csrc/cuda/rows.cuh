// Softmax and its logarithm over the rows of a matrix, and their gradients.
//
// Contract
//   Rows are contiguous, one after the other; columns >= 1. An output may be one of the inputs, element by element.
//   A team of threads takes a row: some lanes of a warp, each holding `Values` numbers of the row in registers; or a
//   block; or, where the row is too long for that (Values = 0), a block that reads the row again in every pass.
//   N neighbouring numbers are one access of memory: columns is a multiple of N, and rows begin at multiples of their N
//   numbers' size.
//   Teams go over the rows in strides of the grid, of any size. Blocks have `row_threads` threads.
//   Accuracy: the largest number is taken off first; sums of n numbers have an error of n ULP at most, and less with
//   every thread that shares them. A row that holds NaN or +inf, or only -inf, gives NaN.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "cuda/value.cuh"

namespace gemmlet {

inline constexpr int row_threads = 256;

// `Threads` neighbouring threads that share a row, a power of two up to a warp, or the whole block.
template <int Threads>
struct Team {
  static constexpr int size = Threads, per_block = row_threads / Threads;

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
      return reduce_block(v, op, partial);
    }
  }
};

// exp(x - largest) for x <= largest, which may be -inf for both: 1.
template <class V>
__device__ __forceinline__ V share_of(V x, V largest) {
  return x == largest ? V(1) : decay(x - largest);
}

// A thread's share of a row, N neighbouring numbers at a time.
template <class T, class Team, int Values, int N = 1>
class Row {
  static_assert(Values % N == 0);

 public:
  using V = Compute<T>;
  using Threads = Team;

  // `present` is false for a team that has no row left, and only takes part in the reductions.
  __device__ Row(const T* row, int columns, bool present) : row_(row), columns_(present ? columns : 0) {
#pragma unroll
    for (int j = 0; j < Values; j += N) {
      const int i = column(j);
      if (i >= columns_) continue;
      const Pack<T, N> pack = load_pack<N>(row + i);
#pragma unroll
      for (int k = 0; k < N; ++k) value_[j + k] = widen(pack.value[k]);
    }
  }

  // f(column, number, slot) for each; `at` has the number of another row in that column and slot.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if constexpr (Values > 0) {
#pragma unroll
      for (int j = 0; j < Values; j += N) {
        const int i = column(j);
        if (i >= columns_) continue;
#pragma unroll
        for (int k = 0; k < N; ++k) f(i + k, value_[j + k], j + k);
      }
    } else {
      for (int i = Team::thread() * N; i < columns_; i += Team::size * N) {
        const Pack<T, N> pack = load_pack<N>(row_ + i);
#pragma unroll
        for (int k = 0; k < N; ++k) f(i + k, widen(pack.value[k]), 0);
      }
    }
  }

  // to[column] = f(column, number, slot) for each. `to` may be the row itself.
  template <class F>
  __device__ __forceinline__ void map(T* to, F f) const {
    if constexpr (Values > 0) {
#pragma unroll
      for (int j = 0; j < Values; j += N) {
        const int i = column(j);
        if (i >= columns_) continue;
        Pack<T, N> result;
#pragma unroll
        for (int k = 0; k < N; ++k) result.value[k] = narrow<T>(f(i + k, value_[j + k], j + k));
        store_pack(to + i, result);
      }
    } else {
      for (int i = Team::thread() * N; i < columns_; i += Team::size * N) {
        Pack<T, N> pack = load_pack<N>(row_ + i);
#pragma unroll
        for (int k = 0; k < N; ++k) pack.value[k] = narrow<T>(f(i + k, widen(pack.value[k]), 0));
        store_pack(to + i, pack);
      }
    }
  }

  __device__ __forceinline__ V at(int column, int slot) const {
    if constexpr (Values > 0)
      return value_[slot];
    else
      return widen(row_[column]);
  }

  // Whether the thread has this column.
  __device__ __forceinline__ bool has(int column) const {
    return column < columns_ && column / N % Team::size == Team::thread();
  }

  // The sum of f(column, number, slot) over the row.
  template <class F>
  __device__ __forceinline__ V sum(F f) const {
    V s = 0;
    each([&](int i, V v, int slot) { s += f(i, v, slot); });
    return Team::reduce(s, Sum{});
  }

  // The largest number, and the sum of exp(number - largest).
  struct Exponentials {
    V largest, total;
  };
  __device__ __forceinline__ Exponentials exponentials() const {
    V largest = -infinity<V>(), total = 0;
    if constexpr (Values > 0) {
      each([&](int, V v, int) { largest = Largest{}(largest, v); });
      largest = Team::reduce(largest, Largest{});
      each([&](int, V v, int) { total += decay(v - largest); });
    } else {
      // One pass: what was added up is scaled down wherever a larger number comes.
      for (int i = Team::thread() * N; i < columns_; i += Team::size * N) {
        const Pack<T, N> pack = load_pack<N>(row_ + i);
        V larger = largest;
#pragma unroll
        for (int k = 0; k < N; ++k) larger = Largest{}(larger, widen(pack.value[k]));
        total *= share_of(largest, larger);
#pragma unroll
        for (int k = 0; k < N; ++k) total += share_of(widen(pack.value[k]), larger);
        largest = larger;
      }
      const V of_thread = largest;
      largest = Team::reduce(largest, Largest{});
      // A thread without any number has the sum 0; where the largest is infinite comes NaN, as of held rows.
      total *= share_of(of_thread, largest);
      if (!(abs(largest) < infinity<V>())) total = not_a_number<V>();
    }
    return {largest, Team::reduce(total, Sum{})};
  }

 private:
  __device__ static constexpr int column(int slot) { return (slot / N * Team::size + Team::thread()) * N; }

  const T* row_;
  int columns_;
  V value_[Values > 0 ? Values : 1];
};

struct softmax {
  template <class V, class R, class T>
  __device__ static void forward(const R& x, T* y) {
    const auto e = x.exponentials();
    const V scale = V(1) / e.total;
    x.map(y, [=](int, V v, int) { return decay(v - e.largest) * scale; });
  }
  template <class V, class R, class T>
  __device__ static void backward(const R& grad_y, const R& y, T* grad_x) {
    const V dot = grad_y.sum([&](int i, V g, int slot) { return g * y.at(i, slot); });
    grad_y.map(grad_x, [&](int i, V g, int slot) { return y.at(i, slot) * (g - dot); });
  }
};

struct log_softmax {
  template <class V, class R, class T>
  __device__ static void forward(const R& x, T* y) {
    const auto e = x.exponentials();
    const V log_total = log(e.total);
    x.map(y, [=](int, V v, int) { return (v - e.largest) - log_total; });
  }
  template <class V, class R, class T>
  __device__ static void backward(const R& grad_y, const R& y, T* grad_x) {
    const V total = grad_y.sum([](int, V g, int) { return g; });
    grad_y.map(grad_x, [&](int i, V g, int slot) { return fma(-exp(y.at(i, slot)), total, g); });
  }
};

template <class F, class T, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads) row_forward(const T* x, T* y, Index rows, int columns) {
  using Team = gemmlet::Team<Threads>;
  // Every team goes round as often as the first of its block: reductions take all threads.
  for (Index r = Team::index(); r - threadIdx.x / Threads < rows; r += Team::count()) {
    const bool present = r < rows;
    const Index at = present ? r * columns : 0;
    const Row<T, Team, Values, N> row(x + at, columns, present);
    F::template forward<Compute<T>>(row, y + at);
  }
}

template <class F, class T, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads)
    row_backward(const T* grad_y, const T* y, T* grad_x, Index rows, int columns) {
  using Team = gemmlet::Team<Threads>;
  for (Index r = Team::index(); r - threadIdx.x / Threads < rows; r += Team::count()) {
    const bool present = r < rows;
    const Index at = present ? r * columns : 0;
    const Row<T, Team, Values, N> grad(grad_y + at, columns, present), result(y + at, columns, present);
    F::template backward<Compute<T>>(grad, result, grad_x + at);
  }
}

}  // namespace gemmlet
