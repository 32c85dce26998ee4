// Fused training: a layer, forward and backward. Contract: step.cuh.
#pragma once

#include "cuda/training/draw.cuh"
#include "cuda/training/formulas.cuh"

namespace gemmlet {

template <class T>
struct Layer {
  const T* parameters;
  int in, out;
};

// Whether a tile's epilogue has the number of the step before the main loop: there are registers to keep it in.
template <class T>
inline constexpr bool early_step = sizeof(T) == 4;

// y = activation(x w + b); z, unless null, takes the preactivation, and `dropped` what dropout leaves of y. `opens`: in the
// kernel that opens a step.
template <class T, bool opens>
struct ForwardEpilogue {
  const T* bias;
  Activation<T> activation;
  T *y, *z, *dropped;
  Drops<T> drops;
  Classes classes;
  const T* class_weights;
  int rows, out;

  template <int n>
  struct Loaded {
    T bias[n];
    Index step;
  };
  __device__ __forceinline__ bool inside(int i, int j) const { return i < rows && j < out; }
  template <int n>
  __device__ __forceinline__ Loaded<n> load(int i, int j) const {
    Loaded<n> loaded;
    load_numbers<n>(bias + j, loaded.bias);
    if (classes.count != 0) {
      T weight[n];
      load_numbers<n>(class_weights + static_cast<Index>(classes.of_row<opens>(i)) * row_stride(out) + j, weight);
#pragma unroll
      for (int c = 0; c < n; ++c) loaded.bias[c] += weight[c];
    }
    if (early_step<T> && dropped != nullptr) loaded.step = drops.draw.template step<opens>();
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
    if (dropped != nullptr) {
      const Index step = early_step<T> ? loaded.step : drops.draw.template step<opens>();
      drops.apply(drops.template kept<n>(i, j, step), result);
      store_numbers<n>(dropped + at, result);
    }
  }
};

template <class T, class N>
struct Forward {
  Input<N> input;
  Layer<T> layer;
  Activation<T> activation;
  T *y, *z, *dropped;
  Drops<T> drops;  // of the layer above
  Classes classes;
  int rows;
};

// The tile at (tile_row, tile_column), both counted in tiles.
template <class Tile, bool opens = false, class T, class N>
__device__ __forceinline__ void forward_tile(const Forward<T, N>& p, const Rows<N>& rows, int tile_row, int tile_column,
                                             T* memory) {
  const Layer<T>& layer = p.layer;
  const LinesOfRows<T, N> x{rows, p.rows};
  const LinesOfColumns<T> w{layer.parameters, row_stride(layer.out)};
  const int k = layer.in - p.classes.count, stride = row_stride(layer.out);
  const T *const class_weights = layer.parameters + static_cast<Index>(k) * stride, *const bias =
                                                                                        layer.parameters +
                                                                                        static_cast<Index>(layer.in) *
                                                                                            stride;
  const ForwardEpilogue<T, opens> epilogue{bias,    p.activation, p.y,           p.z,    p.dropped,
                                           p.drops, p.classes,    class_weights, p.rows, layer.out};
  Tile::multiply(x, w, k, tile_row * Tile::rows, tile_column * Tile::columns, epilogue, memory);
}

// A layer whose inputs are the mini-batch. Grid: tiles of rows, tiles of columns.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::max_threads, 1) forward(const __grid_constant__ Forward<T, T> p) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y);
  forward_tile<Tile>(p, p.input.all(), row, column, dynamic_shared<T>());
}

// A first layer whose inputs are samples; opens a step. Grid: the same, and one column more.
template <class T, class N, class Tile>
__global__ void __launch_bounds__(Tile::max_threads, 1)
    first_forward(const __grid_constant__ Forward<T, N> p, const __grid_constant__ Staged<T> staged) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y);
  if (blockIdx.y < gridDim.y - 1)
    forward_tile<Tile, true>(p, p.input.at_opening(staged.progress), row, column, dynamic_shared<T>());
  else if (row == 0)
    open_step(staged);
}

// The results of a layer that has another above it: the gradient goes back through the dropout of that one's inputs, and
// through this one's activation.
template <class T>
struct Below {
  Activation<T> activation;
  const T* saved;  // its preactivations where the activation needs them, else its results
  T* grad;         // of its preactivations
  Drops<T> drops;
};

// `penalized`: the rows have those of a gradient penalty after them.
template <class T, bool penalized = false>
struct BackwardEpilogue {
  Below<T> below;
  int rows, width;
  GradientPenalty<T> penalty;

  template <int n>
  struct Loaded {
    T saved[n];
    Index step;
  };
  __device__ __forceinline__ bool inside(int i, int j) const { return i < rows && j < width; }
  __device__ __forceinline__ Index at(int i, int j) const { return static_cast<Index>(i) * row_stride(width) + j; }
  template <int n>
  __device__ __forceinline__ Loaded<n> load(int i, int j) const {
    Loaded<n> loaded;
    load_numbers<n>(below.saved + at(penalized ? penalty.sample(i) : i, j), loaded.saved);
    if (early_step<T> && below.drops.keep != 0) loaded.step = below.drops.draw.step();
    return loaded;
  }
  template <int n>
  __device__ __forceinline__ void store(int i, int j, const Loaded<n>& loaded, T (&sum)[n]) const {
    if (below.drops.keep != 0) {
      const Index step = early_step<T> ? loaded.step : below.drops.draw.step();
      below.drops.apply(below.drops.template kept<n>(penalized ? penalty.sample(i) : i, j, step), sum);
    }
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
  GradientPenalty<T> penalty;
};

// The same grid, for layer.in columns.
template <class T, class Tile, bool penalized = false>
__global__ void __launch_bounds__(Tile::max_threads, 1) backward(const __grid_constant__ Backward<T> p) {
  const Layer<T>& layer = p.layer;
  const int stride = row_stride(layer.out);
  const LinesOfRows<T, T> grad{{p.grad, stride, nullptr}, p.rows}, w{{layer.parameters, stride, nullptr}, layer.in};
  const BackwardEpilogue<T, penalized> epilogue{p.below, p.rows, layer.in, p.penalty};
  const int row = static_cast<int>(blockIdx.x) * Tile::rows, column = static_cast<int>(blockIdx.y) * Tile::columns;
  Tile::multiply(grad, w, layer.out, row, column, epilogue, dynamic_shared<T>());
}

// The rows of a gradient penalty, forward: p.grad are a layer's inputs, p.below is the layer itself. The same grid, for
// layer.out columns.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::max_threads, 1) forward_penalty(const __grid_constant__ Backward<T> p) {
  const Layer<T>& layer = p.layer;
  const LinesOfRows<T, T> x{{p.grad, row_stride(layer.in), nullptr}, p.rows};
  const LinesOfColumns<T> w{layer.parameters, row_stride(layer.out)};
  const BackwardEpilogue<T> epilogue{p.below, p.rows, layer.out, p.penalty};
  const int row = static_cast<int>(blockIdx.x) * Tile::rows, column = static_cast<int>(blockIdx.y) * Tile::columns;
  Tile::multiply(x, w, layer.in, row, column, epilogue, dynamic_shared<T>());
}

}  // namespace gemmlet
