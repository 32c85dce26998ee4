// Losses: the mean and its gradient in one pass over the inputs.
//
// Contract
//   Contiguous arrays of at least one element; the gradient may be one of the inputs, element by element. Elements are
//   computed in Compute<T>. Losses are summed in double, by thread, block and grid in an order that the grid fixes:
//   `partial` takes one number for each block, and the last block adds them and writes the mean to *loss.
//   counter: 0 before the launch, and again after it. Blocks have `elements_threads` threads, or those of rows.cuh; grids
//   of any size.
//   Class indices are in range.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

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

inline constexpr int elements_threads = 256;

template <class F, class T>
__global__ void __launch_bounds__(elements_threads)
    elementwise_loss(const T* prediction, const T* target, Compute<T> parameter, T* gradient, Index n, double* partial,
                     double* loss, unsigned* counter) {
  using V = Compute<T>;
  constexpr int N = pack_size<T>;
  const V share = static_cast<V>(1.0 / static_cast<double>(n));
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
      F::evaluate(widen(p, j), widen(t, j), parameter, share, value, slope[j]);
      sum += value;
    }
    store_pack(gradient + i, narrowed<T>(slope));
    total += static_cast<double>(sum);
  }
  // The tail, or everything:
  for (Index i = packed + thread; i < n; i += threads) {
    V value, slope;
    F::evaluate(widen(prediction[i]), widen(target[i]), parameter, share, value, slope);
    gradient[i] = narrow<T>(slope);
    total += static_cast<double>(value);
  }
  write_mean(total, static_cast<double>(n), partial, loss, counter);
}

// Cross-entropy of softmax(z) with the targets t, for one row: returns the loss, -sum_j t_j log_softmax(z)_j. Its gradient,
// softmax(z) sum_j t_j - t times `share`, is f(column, number, slot) for write(row, f), row.map or row.each of it.
//
// The target is 1 for the class `label`, whose logit is z_label, and 0 for the others.
template <class R, class Write>
__device__ __forceinline__ typename R::V cross_entropy_of_class(R& z, int label, typename R::V z_label,
                                                                typename R::V share, Write write) {
  using V = typename R::V;
  // The label's gradient is what the others sum up to: where its softmax is close to 1, that is all there is.
  const auto is_label = z.is(label);
  const auto others =
      z.exponentials(z_label, [=](int i, V v, int slot) { return is_label(i, slot) ? -infinity<V>() : v; });
  const V total = others.total + decay(z_label - others.largest), factor = share / total;
  write(z, [=](int i, V v, int slot) {
    return (is_label(i, slot) ? -others.total : R::exponential(v, others.largest)) * factor;
  });
  return log(total) - (z_label - others.largest);
}

// t = target(column, slot), 0 beyond the row.
template <class R, class Target, class Write>
__device__ __forceinline__ typename R::V cross_entropy_of_targets(R& z, Target target, typename R::V share,
                                                                  Write write) {
  using V = typename R::V;
  const V largest = z.largest(-infinity<V>(), [](int, V v, int) { return v; });
  V total = 0, weight = 0, product = 0;
  z.turn_into([&](int i, V v, int slot) {
    const V t = target(i, slot), shifted = v - largest, e = term<typename R::Number>(shifted);
    total += e;
    weight += t;
    // A class of no weight costs nothing, even at -inf.
    product += t == V(0) ? V(0) : t * shifted;
    return e;
  });
  total = R::Threads::reduce(total, Sum{});
  weight = R::Threads::reduce(weight, Sum{});
  product = R::Threads::reduce(product, Sum{});
  const V factor = weight / total;
  write(z, [=](int i, V v, int slot) { return fma(R::exponential(v, largest), factor, -target(i, slot)) * share; });
  return weight * log(total) - product;
}

// labels: class indices, or null; then `targets` (rows, columns) count. They are taken times `keep`, and `spread` is added to
// each; whole: labels are there, keep is 1, spread 0.
template <class T, bool whole, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads<Threads>, (row_blocks < T, Threads, Values, whole ? 1 : 2 >))
    softmax_cross_entropy(const T* logits, const Index* labels, const T* targets, double keep, double spread,
                          T* gradient, Index rows, int columns, double* partial, double* loss, unsigned* counter) {
  using V = Compute<T>;
  using Team = gemmlet::Team<Threads>;
  using Row = gemmlet::Row<T, Team, Values, N>;
  const V share = static_cast<V>(1.0 / static_cast<double>(rows)), k = static_cast<V>(keep), s = static_cast<V>(spread);
  double total = 0;
  for (Index r = Team::index(); r - threadIdx.x / Threads < rows; r += Team::count()) {
    const bool present = r < rows;
    const Index at = present ? r * columns : 0;
    Row z(logits + at, columns, present, -infinity<V>());
    const int label = present && labels != nullptr ? static_cast<int>(labels[r]) : 0;
    const auto write = [&](const Row& row, auto f) { row.map(gradient + at, f); };
    V value;
    if constexpr (whole) {
      // Before the gradient is written, which may be in its place.
      const V z_label = widen(logits[at + label]);
      value = cross_entropy_of_class(z, label, z_label, share, write);
    } else if (labels != nullptr) {
      const auto target = [=](int i, int) { return i < columns ? (i == label ? k + s : s) : V(0); };
      value = cross_entropy_of_targets(z, target, share, write);
    } else {
      const Row t(targets + at, columns, present, 0);
      const auto target = [&](int i, int slot) { return i < columns ? fma(k, t.at(i, slot), s) : V(0); };
      value = cross_entropy_of_targets(z, target, share, write);
    }
    if (present && Team::thread() == 0) total += static_cast<double>(value);
  }
  write_mean(total, static_cast<double>(rows), partial, loss, counter);
}

}  // namespace gemmlet
