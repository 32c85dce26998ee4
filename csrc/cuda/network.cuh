// Fused training: the kernels that the steps of a network are made of. What a step computes: cpu/network.h.
//
// Contract
//   float and double. A matrix of w columns has rows that are row_stride(w) numbers apart, and begins at a multiple of
//   16 bytes; what stands in its columns from w on is of no meaning, here and in every kernel.
//   A layer's parameters are such a matrix of in + 1 rows: the weights, and the bias as the last. Behind it, `plane`
//   numbers further on each, are matrices like it: the states of the optimizer's rule, then the moving average.
//   All that kernels are given is the same in every step of so many rows, so that a step can be recorded once: which one
//   it is they learn from Progress. The first kernel of a step opens it, the last is told that it `closes` it. Each
//   kernel needs what those before it have written.
//   Activations and losses are called by their places in the lists of csrc/formulas; a loss may be softmax_loss, too.
//   Sizes are at least 1, indices in range.
//   Gradients are sums over the mini-batch, of rows in their order within each quarter of a stage (small_product.cuh);
//   losses are added up in double. No float atomics: the same bits on every run.
// Dynamic shared memory: what the tile takes, which is a WideTile in updates; see top; none for the others.
#pragma once

#include "cuda/losses.cuh"
#include "cuda/small_product.cuh"

namespace gemmlet {

// From one row to the next: they begin at multiples of 16 bytes.
__device__ __forceinline__ constexpr int row_stride(int width) { return (width + 3) / 4 * 4; }

// How far a call has come, and where that is which belongs to the call alone.
struct Progress {
  const Index* order;        // the samples of the mini-batches
  const double* numbers[2];  // the rules' numbers of up to two networks, step by step
  const double* decay;       // of the moving averages, one number a step
  const void* noise;         // a row for each of `order`
  Index batch;
  Index next, step;  // the step that is opened next, and the one that has been opened
  double loss[2];
  Index right;
};

// What belongs to a step, where its kernels find it at once: they would have to read one address after another. The
// block that opens the step brings it.
template <class T>
struct Brought {
  static constexpr int most_numbers = 11;  // of a rule, and at the end the average's decay and 1 - decay
  Progress* progress;
  int rows;
  Index* samples;        // those of the mini-batch
  const Index* indices;  // the classes of all samples, or null
  int* labels;           // those of the mini-batch
  T* numbers;            // of both networks
  int number_counts[2];  // in Progress
  bool averages;         // of the first network
};

// By one block of the kernel that opens the step. There, nothing else reads `step`, or what is brought; in the one that
// closes it, nothing else reads `next`.
template <class T>
__device__ inline void open_step(const Brought<T>& p) {
  const Progress& progress = *p.progress;
  const Index step = progress.next;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < p.rows; i += threads) {
    const Index sample = progress.order[step * progress.batch + i];
    p.samples[i] = sample;
    if (p.indices != nullptr) p.labels[i] = static_cast<int>(p.indices[sample]);
  }
  for (int network = 0; network < 2; ++network) {
    const int count = p.number_counts[network];
    for (int s = thread; s < count; s += threads)
      p.numbers[network * Brought<T>::most_numbers + s] = static_cast<T>(progress.numbers[network][step * count + s]);
  }
  if (thread != 0) return;
  p.progress->step = step;
  if (p.averages) {
    p.numbers[Brought<T>::most_numbers - 2] = static_cast<T>(progress.decay[step]);
    p.numbers[Brought<T>::most_numbers - 1] = static_cast<T>(1.0 - progress.decay[step]);
  }
}

//
// Formulas by their numbers
//

enum class ActivationNumber : int {
#define GEMMLET_ENTRY(name) name,
  GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
};

enum class LossNumber : int {
#define GEMMLET_ENTRY(name) name,
  GEMMLET_LOSSES(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
};
inline constexpr int softmax_loss = -1;

template <class T>
struct Activation {
  ActivationNumber number;
  T parameter;

  // f(the formula): one kernel serves all of them, as they take little of its time.
  template <class F>
  __device__ __forceinline__ void with(F f) const {
    switch (number) {
#define GEMMLET_ENTRY(name)    \
  case ActivationNumber::name: \
    return f(activations::name{});
      GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
    }
  }
  template <int n>
  __device__ __forceinline__ void forward(const T (&x)[n], T (&y)[n]) const {
    with([&](auto formula) {
#pragma unroll
      for (int i = 0; i < n; ++i) y[i] = formula.forward(x[i], parameter);
    });
  }
  // `saved` is the preactivation where the formula needs it, else the result.
  template <int n>
  __device__ __forceinline__ void backward(T (&grad)[n], const T (&saved)[n]) const {
    with([&](auto formula) {
#pragma unroll
      for (int i = 0; i < n; ++i) grad[i] = formula.backward(grad[i], saved[i], parameter);
    });
  }
};

//
// Forward and backward
//

template <class T>
struct Layer {
  const T* parameters;
  int in, out;
};

// What a layer's inputs are: rows of a matrix, or samples, or rows of noise.
template <class N>
struct Input {
  const N* rows;  // null: noise
  Index stride;
  const Index* samples;  // of the mini-batch, once they are brought; null: the rows are the mini-batch

  __device__ __forceinline__ Rows<N> in_step(const Progress* progress) const {
    return rows != nullptr ? Rows<N>{rows, stride, samples} : noise(progress, progress->step);
  }
  // Where they are the mini-batch.
  __device__ __forceinline__ Rows<N> all() const { return {rows, stride, nullptr}; }
  // In the kernel that opens the step.
  __device__ __forceinline__ Rows<N> at_opening(const Progress* progress) const {
    const Index step = progress->next;
    return rows != nullptr ? Rows<N>{rows, stride, progress->order + step * progress->batch} : noise(progress, step);
  }

 private:
  __device__ __forceinline__ Rows<N> noise(const Progress* progress, Index step) const {
    return {static_cast<const N*>(progress->noise) + step * progress->batch * stride, stride, nullptr};
  }
};

// y = activation(x w + b); z, unless null, takes the preactivation.
template <class T>
struct ForwardEnd {
  const T* bias;
  Activation<T> activation;
  T *y, *z;
  int rows, out;

  template <int n>
  struct Loaded {
    T bias[n];
  };
  __device__ __forceinline__ bool inside(int i, int j) const { return i < rows && j < out; }
  template <int n>
  __device__ __forceinline__ Loaded<n> load(int, int j) const {
    Loaded<n> loaded;
    load_numbers<n>(bias + j, loaded.bias);
    return loaded;
  }
  template <int n>
  __device__ __forceinline__ void store(int i, int j, const Loaded<n>& loaded, T (&sum)[n]) const {
    const Index at = static_cast<Index>(i) * row_stride(out) + j;
#pragma unroll
    for (int c = 0; c < n; ++c) sum[c] += loaded.bias[c];
    if (z != nullptr) store_numbers<n>(z + at, sum);
    T result[n];
    activation.forward(sum, result);
    store_numbers<n>(y + at, result);
  }
};

template <class T, class N>
struct Forward {
  Input<N> input;
  Layer<T> layer;
  Activation<T> activation;
  T *y, *z;
  int rows;
};

// The tile at (tile_row, tile_column), both counted in tiles.
template <class Tile, class T, class N>
__device__ __forceinline__ void forward_tile(const Forward<T, N>& p, const Rows<N>& rows, int tile_row, int tile_column,
                                             T* memory) {
  const Layer<T>& layer = p.layer;
  const LinesOfRows<T, N> x{rows, p.rows};
  const LinesOfColumns<T> w{layer.parameters, row_stride(layer.out)};
  const T* const bias = layer.parameters + static_cast<Index>(layer.in) * row_stride(layer.out);
  const ForwardEnd<T> end{bias, p.activation, p.y, p.z, p.rows, layer.out};
  Tile::multiply(x, w, layer.in, tile_row * Tile::rows, tile_column * Tile::columns, end, memory);
}

// A layer whose inputs are the mini-batch. Grid: tiles of rows, tiles of columns.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::most_threads, 1) forward(const __grid_constant__ Forward<T, T> p) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y);
  forward_tile<Tile>(p, p.input.all(), row, column, dynamic_shared<T>());
}

// A first layer whose inputs are samples; opens a step. Grid: the same, and one column more.
template <class T, class N, class Tile>
__global__ void __launch_bounds__(Tile::most_threads, 1)
    first_forward(const __grid_constant__ Forward<T, N> p, const __grid_constant__ Brought<T> brought) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y);
  if (blockIdx.y < gridDim.y - 1)
    forward_tile<Tile>(p, p.input.at_opening(brought.progress), row, column, dynamic_shared<T>());
  else if (row == 0)
    open_step(brought);
}

// What a layer gave that has another above it: its gradient goes on through its activation.
template <class T>
struct Below {
  Activation<T> activation;
  const T* saved;  // its preactivations where the activation needs them, else its results
  T* grad;         // of its preactivations
};

template <class T>
struct BackwardEnd {
  Below<T> below;
  int rows, width;

  template <int n>
  struct Loaded {
    T saved[n];
  };
  __device__ __forceinline__ bool inside(int i, int j) const { return i < rows && j < width; }
  __device__ __forceinline__ Index at(int i, int j) const { return static_cast<Index>(i) * row_stride(width) + j; }
  template <int n>
  __device__ __forceinline__ Loaded<n> load(int i, int j) const {
    Loaded<n> loaded;
    load_numbers<n>(below.saved + at(i, j), loaded.saved);
    return loaded;
  }
  template <int n>
  __device__ __forceinline__ void store(int i, int j, const Loaded<n>& loaded, T (&sum)[n]) const {
    below.activation.backward(sum, loaded.saved);
    store_numbers<n>(below.grad + at(i, j), sum);
  }
};

template <class T>
struct Backward {
  const T* grad;  // of the layer's preactivations
  Layer<T> layer;
  Below<T> below;
  int rows;
};

// The same grid, for layer.in columns.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::most_threads, 1) backward(const __grid_constant__ Backward<T> p) {
  const Layer<T>& layer = p.layer;
  const int stride = row_stride(layer.out);
  const LinesOfRows<T, T> grad{{p.grad, stride, nullptr}, p.rows}, w{{layer.parameters, stride, nullptr}, layer.in};
  const BackwardEnd<T> end{p.below, p.rows, layer.in};
  const int row = static_cast<int>(blockIdx.x) * Tile::rows, column = static_cast<int>(blockIdx.y) * Tile::columns;
  Tile::multiply(grad, w, layer.out, row, column, end, dynamic_shared<T>());
}

//
// Losses
//

// What rows of outputs are compared with, and how.
template <class T>
struct Objective {
  int loss;
  T parameter, share;    // of a row in the gradient
  const int* labels;     // classes of the rows; or
  const T* values;       // (all samples, out), with no space between the rows,
  const Index* samples;  // and which of them the rows are; or null all:
  T first, second;       // each target of the first `boundary` rows, and of those after them
  int boundary;
  double* losses;  // of each row
  int* right;      // whether each row's largest output (of a single one, its sign) is the class; or null
};

// Whether output a at place i comes before b at place j as the class that is meant: NaN counts as the largest.
template <class T>
__device__ __forceinline__ bool comes_first(T a, int i, T b, int j) {
  const bool a_is_nan = a != a, b_is_nan = b != b;
  if (a_is_nan != b_is_nan) return a_is_nan;
  return a > b || (!(a < b) && i < j);
}

// By a warp: whether `label` is the class that is meant.
template <class T>
__device__ inline bool is_right(const T* y, int out, int label) {
  if (out == 1) return (y[0] > T(0)) == label;
  bool other = false;
  for (int j = static_cast<int>(threadIdx.x % 32); j < out; j += 32) other |= comes_first(y[j], j, y[label], label);
  return !__any_sync(0xffffffffu, other);
}

// The targets of a row.
template <class T>
struct Target {
  int label;        // or -1
  const T* values;  // or null
  T all;

  __device__ __forceinline__ Target(const Objective<T>& p, int i, int out)
      : label(p.labels == nullptr ? -1 : p.labels[i]),
        values(p.values == nullptr ? nullptr : p.values + p.samples[i] * out),
        all(i < p.boundary ? p.first : p.second) {}

  __device__ __forceinline__ T of_output(int j, int out) const {
    if (values != nullptr) return values[j];
    if (label < 0) return all;
    return out == 1 ? static_cast<T>(label) : static_cast<T>(j == label);
  }
};

// Row i of the mini-batch, by a warp: y its `out` results, z their preactivations. Its gradient goes through the
// activation to store(j, the gradient of preactivation j); when all of them have, the warp calls stored(). lanes: 16 where
// there are at most as many results, which stay in registers then; else 32.
template <int lanes, class T, class Store, class Stored>
__device__ __forceinline__ void evaluate_row(const Objective<T>& p, const Target<T>& target,
                                             const Activation<T>& activation, int i, const T* y, const T* z, int out,
                                             Store store, Stored stored) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto end = [&](int j, T gradient) {
    T grad[1] = {gradient};
    activation.with([&](auto formula) {
      grad[0] = formula.backward(grad[0], formula.needs_x ? z[j] : y[j], activation.parameter);
    });
    store(j, grad[0]);
  };

  double loss = 0;
  if (p.loss == softmax_loss) {
    using Lanes = Row<T, Team<lanes>, lanes == 32 ? 0 : 1>;
    const auto end_of = [&](int j, T gradient) {
      if (lane < lanes && j < out) end(j, gradient);
    };
    if (target.values != nullptr) {
      Lanes row(y, out, true, -infinity<T>());
      const auto write = [&](const auto& of, auto f) {
        of.each([&](int j, T v, int slot) { end_of(j, f(j, v, slot)); });
        stored();
      };
      const auto of_output = [&](int j, int) { return j < out ? target.values[j] : T(0); };
      loss = row_losses::softmax_cross_entropy::of_targets(Operands(row, of_output, write), p.share);
    } else {
      Lanes row(y, out, true, -infinity<T>(), target.label);
      const row_losses::softmax_cross_entropy::OfLabel<Lanes> entropy(row, y[target.label], p.share);
      row.each([&](int j, T v, int) { end_of(j, j == target.label ? entropy.at_label : entropy.of_other(v)); });
      stored();
      loss = entropy.loss();
    }
  } else {
    for (int j = lane; j < out; j += 32) {
      T of_output = 0, gradient = 0;
      switch (static_cast<LossNumber>(p.loss)) {
#define GEMMLET_ENTRY(name)                                                                            \
  case LossNumber::name:                                                                               \
    losses::name::evaluate(y[j], target.of_output(j, out), p.parameter, p.share, of_output, gradient); \
    break;
        GEMMLET_LOSSES(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
      }
      loss += static_cast<double>(of_output);
      end(j, gradient);
    }
    stored();
    loss = reduce_lanes<32>(loss, Sum{});
  }
  const bool right = p.right != nullptr && target.label >= 0 && is_right(y, out, target.label);
  if (lane == 0) {
    p.losses[i] = loss;
    if (p.right != nullptr) p.right[i] = right;
  }
}

template <class T>
struct Loss {
  const T *y, *z;
  int out;
  Activation<T> activation;
  Objective<T> objective;
  T* grad;
  int rows;
};

inline constexpr int loss_threads = 128;

// A warp for each row.
template <class T>
__global__ void __launch_bounds__(loss_threads, 1) loss(const __grid_constant__ Loss<T> p) {
  const int i = static_cast<int>(blockIdx.x * (loss_threads / 32) + threadIdx.x / 32);
  if (i >= p.rows) return;
  const Index at = static_cast<Index>(i) * row_stride(p.out);
  T* const grad = p.grad + at;
  evaluate_row<32>(
      p.objective, Target<T>(p.objective, i, p.out), p.activation, i, p.y + at, p.z == nullptr ? nullptr : p.z + at,
      p.out, [=](int j, T gradient) { grad[j] = gradient; }, [] {});
}

// The last layer of several, where it is small: forward, the loss, and back to the layer below.
template <class T>
struct Top {
  const T* x;  // what the layer below gave
  Layer<T> layer;
  Activation<T> activation;
  Objective<T> objective;
  T* grad;
  Below<T> below;
};

inline constexpr int most_top_threads = 256;
// Columns that go through the inputs together.
inline constexpr int top_columns = 16;

// A block of whole warps for each row. Shared memory: for each warp, and three times besides, a number for each of the
// outputs, rounded up to top_columns.
template <class T>
__global__ void __launch_bounds__(most_top_threads, 1) top(const __grid_constant__ Top<T> p) {
  const Layer<T>& layer = p.layer;
  const int i = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, threads = static_cast<int>(blockDim.x);
  const int out = layer.out, stride = row_stride(out), width = (out + top_columns - 1) / top_columns * top_columns;
  const T* const x = p.x + static_cast<Index>(i) * row_stride(layer.in);
  const Target<T> target(p.objective, i, out);
  T *const z = dynamic_shared<T>(), *const y = z + width, *const grad = y + width, *const of_warps = grad + width;
  for (int first = 0; first < out; first += top_columns) {
    T sum[top_columns] = {};
    for (int k = thread; k < layer.in; k += threads) {
      const T* const w = layer.parameters + static_cast<Index>(k) * stride + first;
      const T value = x[k];
#pragma unroll
      for (int c = 0; c < top_columns; c += 4) {
        if (first + c >= out) break;
        T some[4];
        load_numbers<4>(w + c, some);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[c + j] = fma(value, some[j], sum[c + j]);
      }
    }
    // Lanes 2 c and 2 c + 1 get column c.
    exchange_sums<16, 2, top_columns>(sum, lane);
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 1);
    if (lane % 2 == 0) of_warps[thread / 32 * width + first + lane / 2] = sum[0];
  }
  __syncthreads();
  for (int j = thread; j < out; j += threads) {
    T sum[1] = {of_warps[j]}, result[1];
    for (int warp = 1; warp < threads / 32; ++warp) sum[0] += of_warps[warp * width + j];
    sum[0] += layer.parameters[static_cast<Index>(layer.in) * stride + j];
    z[j] = sum[0];
    p.activation.forward(sum, result);
    y[j] = result[0];
  }
  __syncthreads();
  T* const grad_row = p.grad + static_cast<Index>(i) * stride;
  if (thread < 32)
    evaluate_row<32>(
        p.objective, target, p.activation, i, y, z, out,
        [=](int j, T gradient) {
          grad[j] = gradient;
          grad_row[j] = gradient;
        },
        [] {});
  __syncthreads();
  const Index below_row = static_cast<Index>(i) * row_stride(layer.in);
  for (int k = thread; k < layer.in; k += threads) {
    const T* const w = layer.parameters + static_cast<Index>(k) * stride;
    T sum[1] = {}, saved[1] = {p.below.saved[below_row + k]};
    for (int first = 0; first < out; first += 4) {
      T some[4];
      load_numbers<4>(w + first, some);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < out) sum[0] = fma(grad[first + j], some[j], sum[0]);
    }
    p.below.activation.backward(sum, saved);
    p.below.grad[below_row + k] = sum[0];
  }
}

//
// Samples
//

// The samples of a mini-batch as rows of a matrix, scale * number + shift each.
template <class T, class N>
struct Gather {
  const N* samples;
  int features;
  T scale, shift;
  T* rows;
};

template <class T, class N>
__device__ __forceinline__ void gather_row(const Gather<T, N>& p, Index sample, int i) {
  const N* const from = p.samples + sample * p.features;
  T* const to = p.rows + static_cast<Index>(i) * row_stride(p.features);
  for (int k = static_cast<int>(threadIdx.x); k < p.features; k += static_cast<int>(blockDim.x))
    to[k] = number<T>(from[k]) * p.scale + p.shift;
}

// Opens a step of two adversarial networks: the generator's first layer, and the samples. Grid: what forward takes, and
// beyond its columns more of them, until there is a block for each sample and one besides.
template <class T, class N, class Tile>
__global__ void __launch_bounds__(Tile::most_threads, 1)
    first_forward_and_gather(const __grid_constant__ Forward<T, T> p, const __grid_constant__ Brought<T> brought,
                             const __grid_constant__ Gather<T, N> gather, int tile_columns) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y);
  const Progress* const progress = brought.progress;
  if (column < tile_columns) {
    forward_tile<Tile>(p, p.input.at_opening(progress), row, column, dynamic_shared<T>());
    return;
  }
  const int i = (column - tile_columns) * static_cast<int>(gridDim.x) + row;
  if (i < p.rows)
    gather_row(gather, progress->order[progress->next * progress->batch + i], i);
  else if (i == p.rows)
    open_step(brought);
}

// The rows of a sparse matrix as those of a dense one.
template <class T>
struct Expand {
  const T* values;
  const Index* row_start;
  const int* columns;
  int features;
  T* rows;
};

inline constexpr int expand_threads = 256;

// Opens a step. Grid: a block for each row, and one besides.
template <class T>
__global__ void __launch_bounds__(expand_threads)
    expand(const __grid_constant__ Expand<T> p, const __grid_constant__ Brought<T> brought) {
  const int i = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  if (i == brought.rows) {
    open_step(brought);
    return;
  }
  const Progress* const progress = brought.progress;
  const Index sample = progress->order[progress->next * progress->batch + i], end = p.row_start[sample + 1];
  T* const to = p.rows + static_cast<Index>(i) * row_stride(p.features);
  for (int k = thread; k < p.features; k += expand_threads) to[k] = T(0);
  __syncthreads();
  for (Index e = p.row_start[sample] + thread; e < end; e += expand_threads) to[p.columns[e]] = p.values[e];
}

//
// Updates
//

// A layer of the network: its first block in the grid, what went into it, and the gradients of its preactivations.
template <class T>
struct UpdatedLayer {
  int first_block;
  int in, out;
  T* parameters;
  const T* x;  // of the network's first layer, Update::input counts
  const T* grad;
};

template <class T, class N>
struct Update {
  static constexpr int most_layers = 8;
  UpdatedLayer<T> layers[most_layers];
  int layer_count, blocks;
  bool has_first;  // whether layers[0] is the network's first
  Input<N> input;
  int rows;
  Index plane;
  bool averages;
  const T* numbers;      // that are brought
  int network;           // whose loss in Progress
  const double* losses;  // of the rows, `loss_rows`, which are to be added up; none where it is 0
  const int* right;      // or null
  int loss_rows;
  double weight;  // of each
  bool closes;
  Progress* progress;
};

// One step of the rule for some weights.
template <class T, class Rule>
struct UpdateEnd {
  T* parameters;
  Index plane;
  int rows, out;  // with the bias
  bool averages;
  const T* numbers;

  template <int n>
  struct Loaded {
    T value[n], state[Rule::state_count > 0 ? Rule::state_count : 1][n], average[n];
    T numbers[Rule::scalar_count], decay, gain;
  };
  __device__ __forceinline__ bool inside(int i, int j) const { return i < rows && j < out; }
  __device__ __forceinline__ T* at(int i, int j) const {
    return parameters + static_cast<Index>(i) * row_stride(out) + j;
  }
  template <int n>
  __device__ __forceinline__ Loaded<n> load(int i, int j) const {
    Loaded<n> loaded;
    load_numbers<n>(at(i, j), loaded.value);
#pragma unroll
    for (int s = 0; s < Rule::state_count; ++s) load_numbers<n>(at(i, j) + (1 + s) * plane, loaded.state[s]);
#pragma unroll
    for (int s = 0; s < Rule::scalar_count; ++s) loaded.numbers[s] = numbers[s];
    if (averages) {
      load_numbers<n>(at(i, j) + (1 + Rule::state_count) * plane, loaded.average);
      loaded.decay = numbers[Brought<T>::most_numbers - 2];
      loaded.gain = numbers[Brought<T>::most_numbers - 1];
    }
    return loaded;
  }
  template <int n>
  __device__ __forceinline__ void store(int i, int j, const Loaded<n>& loaded, T (&gradient)[n]) const {
    constexpr int states = Rule::state_count;
    T value[n], state[states > 0 ? states : 1][n];
#pragma unroll
    for (int c = 0; c < n; ++c) {
      T of_one[states > 0 ? states : 1];
#pragma unroll
      for (int s = 0; s < states; ++s) of_one[s] = loaded.state[s][c];
      value[c] = loaded.value[c];
      Rule::apply(value[c], gradient[c], of_one, loaded.numbers);
#pragma unroll
      for (int s = 0; s < states; ++s) state[s][c] = of_one[s];
    }
    store_numbers<n>(at(i, j), value);
#pragma unroll
    for (int s = 0; s < states; ++s) store_numbers<n>(at(i, j) + (1 + s) * plane, state[s]);
    if (averages) {
      T average[n];
#pragma unroll
      for (int c = 0; c < n; ++c)
        average[c] = optimizers::moving_average(loaded.average[c], value[c], loaded.decay, loaded.gain);
      store_numbers<n>(at(i, j) + (1 + states) * plane, average);
    }
  }
};

// The mini-batch's losses into Progress, by a block.
template <class T, class N>
__device__ __forceinline__ void add_losses(const Update<T, N>& p, double* memory) {
  double loss = 0, right = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.loss_rows; i += static_cast<int>(blockDim.x)) {
    loss += p.losses[i];
    if (p.right != nullptr) right += p.right[i];
  }
  loss = reduce_block(loss, Sum{}, memory);
  right = reduce_block(right, Sum{}, memory);
  if (threadIdx.x != 0) return;
  p.progress->loss[p.network] += p.weight * loss;
  p.progress->right += static_cast<Index>(right);
  if (p.closes) ++p.progress->next;
}

// The gradient of some weights, and their update: block `block` of p.blocks.
template <class Rule, class T, class N>
__device__ __forceinline__ void update_tile(const Update<T, N>& p, int block, T* memory) {
  int l = p.layer_count - 1;
  while (block < p.layers[l].first_block) --l;
  const UpdatedLayer<T>& layer = p.layers[l];
  const int tile = block - layer.first_block, tiles_across = (layer.out + WideTile::columns - 1) / WideTile::columns;
  const int row = tile / tiles_across * WideTile::rows, column = tile % tiles_across * WideTile::columns;

  const UpdateEnd<T, Rule> end{layer.parameters, p.plane, layer.in + 1, layer.out, p.averages, p.numbers};
  const LinesOfColumns<T> grad{layer.grad, row_stride(layer.out)};
  if (p.has_first && l == 0) {
    const LinesOfPicked<T, N> x{p.input.in_step(p.progress), layer.in};
    WideTile::multiply(x, grad, p.rows, row, column, end, memory);
  } else {
    const LinesOfPicked<T, T> x{{layer.x, row_stride(layer.in), nullptr}, layer.in};
    WideTile::multiply(x, grad, p.rows, row, column, end, memory);
  }
}

// All weights of a network, or up to most_layers layers of it. Grid: p.blocks, and one that adds up the losses.
template <class T, class N, class Rule>
__global__ void __launch_bounds__(WideTile::most_threads, 1) update(const __grid_constant__ Update<T, N> p) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.blocks)
    update_tile<Rule>(p, block, dynamic_shared<T>());
  else
    add_losses(p, dynamic_shared<double>());
}

}  // namespace gemmlet
