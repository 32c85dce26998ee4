// Fused training: the samples of a mini-batch as rows of a matrix. Contract: step.cuh.
#pragma once

#include "cuda/training/dense.cuh"

namespace gemmlet {

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
__global__ void __launch_bounds__(Tile::max_threads, 1)
    first_forward_and_gather(const __grid_constant__ Forward<T, T> p, const __grid_constant__ Staged<T> staged,
                             const __grid_constant__ Gather<T, N> gather, int tile_columns) {
  const int row = static_cast<int>(blockIdx.x), column = static_cast<int>(blockIdx.y);
  const Progress* const progress = staged.progress;
  if (column < tile_columns) {
    forward_tile<Tile, true>(p, p.input.at_opening(progress), row, column, dynamic_shared<T>());
    return;
  }
  const int i = (column - tile_columns) * static_cast<int>(gridDim.x) + row;
  if (i < p.rows)
    gather_row(gather, progress->order[progress->next * progress->batch + i], i);
  else if (i == p.rows)
    open_step(staged);
}

inline constexpr int gather_threads = 256;

// Opens a step of a network whose inputs are noisy, or dropped: the samples. Grid: a block for each row, and one besides.
template <class T, class N>
__global__ void __launch_bounds__(gather_threads)
    gather(const __grid_constant__ Gather<T, N> p, const __grid_constant__ Staged<T> staged,
           const __grid_constant__ Changes<T> changes) {
  const int i = static_cast<int>(blockIdx.x);
  if (i == staged.rows) {
    open_step(staged);
    return;
  }
  const Progress* const progress = staged.progress;
  const N* const from = p.samples + progress->order[progress->next * progress->batch + i] * p.features;
  const auto read = [=](int k, T(&x)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = k + c < p.features ? number<T>(from[k + c]) * p.scale + p.shift : T(0);
  };
  const Index step = progress->first_step + progress->next;
  changes.of_row(i, step, p.features, read, p.rows + static_cast<Index>(i) * row_stride(p.features));
}

// The rows of a network that reads what another one gives: copies, as those are needed as they were. What is `generated`
// has the changes of the second pass; behind it, it and the samples have those of the first.
template <class T>
struct ChangeInputs {
  const T* from;
  T* rows;
  int features, generated;
  Changes<T> first, second;
};

// Grid: a block for each row.
template <class T>
__global__ void __launch_bounds__(gather_threads) change_inputs(const __grid_constant__ ChangeInputs<T> p) {
  const int i = static_cast<int>(blockIdx.x), stride = row_stride(p.features);
  const bool is_second = i < p.generated;
  const int row = is_second ? i : i - p.generated;
  const Changes<T>& changes = is_second ? p.second : p.first;
  const T* const from = p.from + static_cast<Index>(row) * stride;
  const auto read = [=](int k, T(&x)[4]) { load_numbers<4>(from + k, x); };
  const Draw& draw = changes.drops.keep != 0 ? changes.drops.draw : changes.noise.draw;
  changes.of_row(row, draw.step(), p.features, read, p.rows + static_cast<Index>(i) * stride);
}

// Rows of a sparse matrix (CSR) as those of a dense one. A column that is out of range, as another thread may have made it
// while the matrix was copied, is left out.
template <class T>
struct Expand {
  const T* values;
  const Index* indptr;
  const int* indices;
  int features;
  T* rows;
};

inline constexpr int expand_threads = 256;

// Opens a step. Grid: a block for each row, and one besides.
template <class T>
__global__ void __launch_bounds__(expand_threads)
    expand(const __grid_constant__ Expand<T> p, const __grid_constant__ Staged<T> staged,
           const __grid_constant__ Changes<T> changes) {
  const int i = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  if (i == staged.rows) {
    open_step(staged);
    return;
  }
  const Progress* const progress = staged.progress;
  const Index sample = progress->order[progress->next * progress->batch + i], end = p.indptr[sample + 1];
  T* const to = p.rows + static_cast<Index>(i) * row_stride(p.features);
  for (int k = thread; k < p.features; k += expand_threads) to[k] = T(0);
  __syncthreads();
  for (Index e = p.indptr[sample] + thread; e < end; e += expand_threads)
    if (const auto column = static_cast<unsigned>(p.indices[e]); column < static_cast<unsigned>(p.features))
      to[column] = p.values[e];
  if (changes.any()) {
    __syncthreads();
    const auto read = [=](int k, T(&x)[4]) { load_numbers<4>(to + k, x); };
    changes.of_row(i, progress->first_step + progress->next, p.features, read, to);
  }
}

}  // namespace gemmlet
