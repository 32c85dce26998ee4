// Fused training: the gradients of weights, and one step of the optimizer. Contract: step.cuh.
#pragma once

#include "cuda/training/formulas.cuh"
#include "cuda/training/step.cuh"
#include "cuda/warp_reduce.cuh"

namespace gemmlet {

// A layer of the network: its first block in the grid, what went into it, and the gradients of its preactivations.
template <class T>
struct UpdatedLayer {
  int first_block;
  int in, out;
  T* parameters;
  const T* x;  // without what is dropped; of the network's first layer, Update::input counts
  const T* grad;
};

template <class T, class N>
struct Update {
  static constexpr int max_layers = 8;
  UpdatedLayer<T> layers[max_layers];
  int layer_count, blocks;
  bool has_first;  // whether layers[0] is the network's first
  Input<N> input;
  Classes classes;  // among those of the first layer
  int rows;         // those of a gradient penalty, too
  int bias_rows;    // those before them: of the others biases have no gradient
  Index plane;
  bool averages;
  const T* hyperparameters;  // that are staged
  int network;               // whose loss in Progress
  const double* losses;      // of the rows, `loss_rows`, which are to be added up; none where it is 0
  const int* correct;        // or null
  int loss_rows;
  double weight;  // of each
  double limit;   // each number of the gradient is limited to [-limit, limit]
  bool decays_biases;
  bool closes;
  Progress* progress;
};

// One step of the rule for some weights.
template <class T, class Rule>
struct UpdateEpilogue {
  T* parameters;
  Index plane;
  int rows, out;  // with the bias
  bool averages;
  const T* hyperparameters;
  T limit;
  bool decays_biases;

  template <int n>
  struct Loaded {
    T value[n], state[Rule::state_count > 0 ? Rule::state_count : 1][n], average[n];
    T hyperparameters[Rule::hyperparameter_count], decay, gain;
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
    for (int s = 0; s < Rule::hyperparameter_count; ++s) loaded.hyperparameters[s] = hyperparameters[s];
    if (!decays_biases && i == rows - 1) Rule::without_decay(loaded.hyperparameters);
    if (averages) {
      load_numbers<n>(at(i, j) + (1 + Rule::state_count) * plane, loaded.average);
      loaded.decay = hyperparameters[Staged<T>::max_hyperparameters - 2];
      loaded.gain = hyperparameters[Staged<T>::max_hyperparameters - 1];
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
      apply_rule<Rule>(value[c], optimizers::clipped(gradient[c], limit), of_one, loaded.hyperparameters);
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
  double loss = 0, correct = 0;
  for (int i = static_cast<int>(threadIdx.x); i < p.loss_rows; i += static_cast<int>(blockDim.x)) {
    loss += p.losses[i];
    if (p.correct != nullptr) correct += p.correct[i];
  }
  loss = reduce_block(loss, Sum{}, memory);
  correct = reduce_block(correct, Sum{}, memory);
  if (threadIdx.x != 0) return;
  p.progress->loss[p.network] += p.weight * loss;
  p.progress->correct += static_cast<Index>(correct);
  if (p.closes) ++p.progress->next;
}

// Lines of a matrix of inputs, and those that it does not have: of each class, 1 for the samples of that class; then the ones
// of the bias. They are 0 for the rows of a gradient penalty.
template <class T, class N>
struct LinesOfInputs {
  static constexpr bool along = false;
  LinesOfPicked<T, N> matrix;
  Classes classes;
  int rows;  // of the mini-batch

  template <int n>
  struct Lines {
    typename LinesOfPicked<T, N>::template Lines<n> matrix;
    Classes classes;
    int rows;
    int further;  // beyond the matrix: which class, or after the last one the bias; or negative
    __device__ __forceinline__ void load(int k, T (&v)[n]) const {
      if (further < 0)
        matrix.load(k, v);
      else
        v[0] = static_cast<T>(k < rows && (further >= classes.count || classes.template of_row<false>(k) == further));
    }
  };
  template <int n>
  __device__ __forceinline__ Lines<n> lines(int at) const {
    return {matrix.template lines<n>(at), classes, rows, at - matrix.count};
  }
};

template <bool further, class T, class N>
__device__ __forceinline__ auto lines_of(const Rows<N>& rows, int inputs, const Classes& classes, int batch_rows) {
  const LinesOfPicked<T, N> matrix{rows, inputs - (further ? classes.count : 0)};
  if constexpr (further)
    return LinesOfInputs<T, N>{matrix, classes, batch_rows};
  else
    return matrix;
}

// The gradient of some weights, and their update: block `block` of p.blocks.
template <class Rule, bool further, class T, class N>
__device__ __forceinline__ void update_tile(const Update<T, N>& p, int block, T* memory) {
  int l = p.layer_count - 1;
  while (block < p.layers[l].first_block) --l;
  const UpdatedLayer<T>& layer = p.layers[l];
  const int tile = block - layer.first_block, tiles_across = (layer.out + WideTile::columns - 1) / WideTile::columns;
  const int row = tile / tiles_across * WideTile::rows, column = tile % tiles_across * WideTile::columns;

  const UpdateEpilogue<T, Rule> epilogue{
      layer.parameters,        p.plane,        layer.in + 1, layer.out, p.averages, p.hyperparameters,
      static_cast<T>(p.limit), p.decays_biases};
  const LinesOfColumns<T> grad{layer.grad, row_stride(layer.out)};
  if (p.has_first && l == 0) {
    const auto x = lines_of<further, T>(p.input.in_step(p.progress), layer.in, p.classes, p.bias_rows);
    WideTile::multiply(x, grad, p.rows, row, column, epilogue, memory);
  } else {
    const Rows<T> rows{layer.x, row_stride(layer.in), nullptr};
    WideTile::multiply(lines_of<further, T>(rows, layer.in, Classes{}, p.bias_rows), grad, p.rows, row, column,
                       epilogue, memory);
  }
}

// All weights of a network, or up to max_layers layers of it. `further`: there are classes among the inputs, or rows of a
// gradient penalty. Grid: p.blocks, and one that adds up the losses.
template <class T, class N, class Rule, bool further = false>
__global__ void __launch_bounds__(WideTile::max_threads, 1) update(const __grid_constant__ Update<T, N> p) {
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.blocks)
    update_tile<Rule, further>(p, block, dynamic_shared<T>());
  else
    add_losses(p, dynamic_shared<double>());
}

}  // namespace gemmlet
