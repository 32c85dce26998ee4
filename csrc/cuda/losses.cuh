// Losses: the mean and its gradient in one pass over the inputs.
//
// Contract
//   Contiguous arrays of at least one element; the gradient may be one of the inputs, element by element. Elements are
//   computed in Compute<T>. Losses are summed in double, by thread, block and grid in an order that the grid fixes:
//   `partial` takes one number for each block, and the last block adds them and writes the mean to *loss.
//   counter: 0 before the launch, and again after it. Blocks have `row_threads` threads; grids of any size.
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
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += partial[i];
  total = reduce_block(total, Sum{}, of_warps);
  if (threadIdx.x == 0) *mean = total / n;
}

template <class F, class T>
__global__ void __launch_bounds__(row_threads)
    elementwise_loss(const T* prediction, const T* target, Compute<T> parameter, T* gradient, Index n, double* partial,
                     double* loss, unsigned* counter) {
  using V = Compute<T>;
  constexpr int N = pack_size<T>;
  const V share = static_cast<V>(1.0 / static_cast<double>(n));
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index threads = static_cast<Index>(gridDim.x) * blockDim.x;
  double total = 0;
  const auto one = [&](T p, T t, T& to) {
    V value, slope;
    F::evaluate(widen(p), widen(t), parameter, share, value, slope);
    to = narrow<T>(slope);
    return value;
  };
  const bool aligned = is_aligned(prediction) && is_aligned(target) && is_aligned(gradient);
  const Index packed = aligned ? n / N * N : 0;
  // The main loop:
  for (Index i = thread * N; i < packed; i += threads * N) {
    const Pack<T, N> p = load_pack<N>(prediction + i), t = load_pack<N>(target + i);
    Pack<T, N> slope;
    V sum = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += one(p.value[j], t.value[j], slope.value[j]);
    store_pack(gradient + i, slope);
    total += sum;
  }
  // The tail, or everything:
  for (Index i = packed + thread; i < n; i += threads) {
    T slope;
    total += one(prediction[i], target[i], slope);
    gradient[i] = slope;
  }
  write_mean(total, static_cast<double>(n), partial, loss, counter);
}

// Cross-entropy of softmax(z) with the targets t, for one row: the loss, -sum_j t_j log_softmax(z)_j, and its gradient,
// softmax(z) sum_j t_j - t times `share`, by store(column, gradient), or into `gradient`.
template <class R>
class CrossEntropy {
  using V = typename R::V;
  using Team = typename R::Threads;

 public:
  __device__ CrossEntropy(const R& z, V share) : z_(z), e_(z.exponentials()), share_(share) {}

  // t is 0 but for the class `label`, whose logit is z_label: there it is `keep`. write(f): f(column, number, slot) is
  // the gradient, but for that class.
  template <class Write, class Store>
  __device__ double of_class(int label, V z_label, double keep, Write write, Store store) const {
    const double scale = keep / static_cast<double>(e_.total);
    const V factor = static_cast<V>(scale) * share_;
    write([=, largest = e_.largest](int, V v, int) { return decay(v - largest) * factor; });
    store_label(label, z_label, scale, keep, store);
    return loss(keep, keep == 0 ? V(0) : static_cast<V>(keep) * (z_label - e_.largest));
  }

  // t = target(column, slot), and `keep` more for the class `label`, if that is not negative.
  template <class Target, class Write, class Store>
  __device__ double of_targets(Target target, int label, V z_label, double keep, Write write, Store store) const {
    V targets = 0, product = 0;
    z_.each([&](int i, V v, int slot) {
      const V t = target(i, slot);
      targets += t;
      // A class of no weight costs nothing, even at -inf.
      product += t == V(0) ? V(0) : t * (v - e_.largest);
    });
    targets = Team::reduce(targets, Sum{});
    product = Team::reduce(product, Sum{});
    const bool labelled = label >= 0 && keep != 0;
    if (labelled) product += static_cast<V>(keep) * (z_label - e_.largest);
    const double weight = static_cast<double>(targets) + (labelled ? keep : 0.0);
    const double scale = weight / static_cast<double>(e_.total);
    const V factor = static_cast<V>(scale);
    write([=, largest = e_.largest, share = share_](int i, V v, int slot) {
      return fma(decay(v - largest), factor, -target(i, slot)) * share;
    });
    if (labelled) store_label(label, z_label, scale, keep + static_cast<double>(target(label, 0)), store);
    return loss(weight, product);
  }

 private:
  // In double: where softmax is close to 1, the difference close to 0 is all there is.
  template <class Store>
  __device__ void store_label(int label, V z_label, double scale, double target, Store store) const {
    if (!z_.has(label)) return;
    const double difference = static_cast<double>(decay(z_label - e_.largest)) * scale - target;
    store(label, static_cast<V>(difference * static_cast<double>(share_)));
  }
  __device__ double loss(double weight, V product) const {
    return weight * static_cast<double>(log(e_.total)) - static_cast<double>(product);
  }

  const R& z_;
  typename R::Exponentials e_;
  V share_;
};

// labels: class indices, or null; then targets (rows, columns) count, times `keep`. `spread` is added to each.
template <class T, int Threads, int Values, int N>
__global__ void __launch_bounds__(row_threads)
    softmax_cross_entropy(const T* logits, const Index* labels, const T* targets, double keep, double spread,
                          T* gradient, Index rows, int columns, double* partial, double* loss, unsigned* counter) {
  using V = Compute<T>;
  using Team = gemmlet::Team<Threads>;
  const V share = static_cast<V>(1.0 / static_cast<double>(rows)), k = static_cast<V>(keep), s = static_cast<V>(spread);
  double total = 0;
  for (Index r = Team::index(); r - threadIdx.x / Threads < rows; r += Team::count()) {
    const bool present = r < rows;
    const Index at = present ? r * columns : 0;
    const int label = labels == nullptr ? -1 : present ? static_cast<int>(labels[r]) : 0;
    // Before the gradient is written, which may be in its place.
    const V z_label = label < 0 ? V(0) : widen(logits[at + label]);
    const Row<T, Team, Values, N> z(logits + at, columns, present);
    const CrossEntropy<Row<T, Team, Values, N>> entropy(z, share);
    const auto write = [&](auto f) { z.map(gradient + at, f); };
    const auto store = [=](int i, V v) { gradient[at + i] = narrow<T>(v); };
    double value;
    if (label < 0) {
      const Row<T, Team, Values, N> t(targets + at, columns, present);
      value = entropy.of_targets([&](int i, int slot) { return fma(k, t.at(i, slot), s); }, -1, z_label, keep, write,
                                 store);
    } else if (spread == 0) {
      value = entropy.of_class(label, z_label, keep, write, store);
    } else {
      value = entropy.of_targets([=](int, int) { return s; }, label, z_label, keep, write, store);
    }
    if (present && Team::thread() == 0) total += value;
  }
  write_mean(total, static_cast<double>(rows), partial, loss, counter);
}

}  // namespace gemmlet
