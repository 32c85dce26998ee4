// Losses: the mean and its gradient in one pass over the inputs.
//
// Contract
//   Contiguous arrays of at least one element; the gradient may be one of the inputs, element by element. Elements are
//   computed in Compute<T>. Losses are summed in double, by thread, block and grid in an order that the grid fixes:
//   `partial` takes one number for each block, and the last block adds them and writes the mean to *loss.
//   `range`, if it is not null, holds the smallest and the largest prediction, or class index, as a launch before this one
//   has found them (value_range of column_sum.cuh): outside [0, 1], or of the classes, loss[1] becomes 1, and nothing else is
//   read or written. So a check costs no wait of its own. The loss may be memory of the CPU.
//   counter: 0 before the launch, and again after it. Blocks have `elements_threads` threads, or those of rows.cuh; grids
//   of any size.
//   Class indices are in range, unless that is checked so. Memory is safe whatever they are: another stream may change them.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/rows.cuh"
#include "cuda/warp_reduce.cuh"

namespace gemmlet {

// Adds up what each thread has, over the grid, and writes the sum divided by n.
__device__ inline void write_mean(double total, double n, double* partial, double* mean, unsigned* counter) {
  __shared__ double of_warps[32];
  total = reduce_block(total, Sum{}, of_warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
  if (!is_last_block(counter)) return;
  total = 0;
  // Many loads at a time, as all others are done.
#pragma unroll 16
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += partial[i];
  total = reduce_block(total, Sum{}, of_warps);
  if (threadIdx.x == 0) *mean = total / n;
}

// Whether there is a range that is not within [low, high]. (NaN, which has passed over all numbers, is within all.)
template <class V>
__device__ inline bool is_refused(const V* range, V low, V high, double* loss) {
  if (range == nullptr || !(range[0] < low || range[1] > high)) return false;
  if (blockIdx.x == 0 && threadIdx.x == 0) loss[1] = 1;
  return true;
}

inline constexpr int elements_threads = 256;

template <class F, class T>
__global__ void __launch_bounds__(elements_threads)
    elementwise_loss(const T* prediction, const T* target, Compute<T> parameter, T* gradient, Index n,
                     const double* range, double* partial, double* loss, unsigned* counter) {
  using V = Compute<T>;
  if (is_refused(range, 0.0, 1.0, loss)) return;
  constexpr int N = pack_size<T>;
  const V scale = static_cast<V>(1.0 / static_cast<double>(n));
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index threads = static_cast<Index>(gridDim.x) * blockDim.x;
  double total = 0;
  const bool aligned = is_aligned(prediction) && is_aligned(target) && is_aligned(gradient);
  const Index packed = aligned ? n / N * N : 0;
  // The main loop:
  for (Index i = thread * N; i < packed; i += threads * N) {
    const Pack<T, N> p = load_pack<N>(prediction + i), t = load_pack<N>(target + i);
    V value, slope[N], sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      F::evaluate(widen(p, j), widen(t, j), parameter, scale, value, slope[j]);
      sum += value;
    }
    store_pack(gradient + i, narrowed<T>(slope));
    total += static_cast<double>(sum);
  }
  // The tail, or everything:
  for (Index i = packed + thread; i < n; i += threads) {
    V value, slope;
    F::evaluate(widen(prediction[i]), widen(target[i]), parameter, scale, value, slope);
    gradient[i] = narrow<T>(slope);
    total += static_cast<double>(value);
  }
  write_mean(total, static_cast<double>(n), partial, loss, counter);
}

// A sum of logarithms of numbers that are not below 1, or hardly: of their product, whose exponent is kept in range.
class LogSum {
 public:
  __device__ __forceinline__ void add(double x) {
    product_ *= x;
    if (product_ > limit) {
      product_ *= 1 / limit;
      ++times_;
    }
  }
  __device__ __forceinline__ double value() const { return fma(times_, 600 * 0.69314718055994530942, log(product_)); }

 private:
  static constexpr double limit = 0x1p600;
  double product_ = 1, times_ = 0;
};

// labels: class indices, or null; then `targets` (rows, columns) count, smoothed by `keep` and `spread`. whole: labels are
// there, keep is 1, spread 0.
template <class L, class T, bool whole, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads<Threads>, (row_blocks<T, Threads, Values, 2>))
    row_loss(const T* logits, const Index* labels, const T* targets, double keep, double spread, T* gradient,
             Index rows, int columns, const Index* range, double* partial, double* loss, unsigned* counter) {
  using V = Compute<T>;
  if (is_refused(range, Index(0), Index(columns - 1), loss)) return;
  using Team = gemmlet::Team<Threads>;
  using Row = gemmlet::Row<T, Team, Values, N>;
  const V scale = static_cast<V>(1.0 / static_cast<double>(rows));
  const row_losses::Smoothing<V> smoothing{static_cast<V>(keep), static_cast<V>(spread)};
  double total = 0;
  const Index apart = Team::count(), first = Team::index();
  if constexpr (whole && L::has_label_form) {
    // A label is loaded a round before its logit; and that together with the row, before the gradient is written, which may
    // be in its place. Teams within a warp, which wait for nobody else, load a row while they compute the one before, as
    // far as registers last.
    constexpr bool ahead = Threads <= 32 && Values > 0 && (N > 1 || Values <= 16);
    const T* from = logits + first * columns;
    T* to = gradient + first * columns;
    const Index step = apart * columns;
    typename Row::Loaded row;
    V next_logit = 0;
    const auto label_of = [&](Index r) {
      return r < rows ? static_cast<int>(min(static_cast<unsigned>(labels[r]), static_cast<unsigned>(columns - 1))) : 0;
    };
    const auto load = [&](bool present, int label) {
      row.load(from, columns, present, -infinity<V>());
      if (present) next_logit = widen(from[label]);
    };
    int next_label = label_of(first), later_label = 0;
    if constexpr (ahead) {
      load(first < rows, next_label);
      later_label = label_of(first + apart);
    }
    LogSum totals;
    for (Index r = first; r - threadIdx.x / Threads < rows; r += apart) {
      const bool present = r < rows;
      const int label = next_label;
      if constexpr (!ahead) {
        load(present, label);
        next_label = label_of(r + apart);
      }
      Row z(row, from, columns, present, -infinity<V>(), label);
      const V z_label = next_logit;
      from += step;
      if constexpr (ahead) {
        next_label = later_label;
        load(r + apart < rows, next_label);
        later_label = label_of(r + 2 * apart);
      }
      const typename L::template OfLabel<Row> of_row(z, z_label, scale);
      // Of a long row the label's number is written once more, by the thread that has just written there: a choice for each
      // number would take longer.
      constexpr bool once = Row::held && Threads < 32;
      const int label_slot = Row::slot_of(label);
      z.map(to, [=](int, V v, int slot) { return once && slot == label_slot ? of_row.at_label : of_row.of_other(v); });
      if (!once && present && label_slot >= 0) to[label] = narrow<T>(of_row.at_label);
      to += step;
      totals.add(present ? static_cast<double>(of_row.total) : 1);
      total -= present ? static_cast<double>(of_row.difference) : 0;
    }
    total = Team::thread() == 0 ? total + totals.value() : 0;
  } else {
    for (Index r = first; r - threadIdx.x / Threads < rows; r += apart) {
      const bool present = r < rows;
      const Index at = present ? r * columns : 0;
      Row z(logits + at, columns, present, -infinity<V>());
      const auto write = [&](const Row& row, auto f) { row.map(gradient + at, f); };
      V value;
      if (labels != nullptr) {
        const int label = present ? static_cast<int>(labels[r]) : 0;
        const auto target = [=](int i, int) { return i < columns ? smoothing.of_class(i == label) : V(0); };
        value = L::of_targets(Operands(z, target, write), scale);
      } else {
        const Row t(targets + at, columns, present, 0);
        const auto target = [&](int i, int slot) { return i < columns ? smoothing.of_target(t.at(i, slot)) : V(0); };
        value = L::of_targets(Operands(z, target, write), scale);
      }
      if (present && Team::thread() == 0) total += static_cast<double>(value);
    }
  }
  write_mean(total, static_cast<double>(rows), partial, loss, counter);
}

}  // namespace gemmlet
