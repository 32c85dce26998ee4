// Fused training: what the kernels of a step share, and where a call of them has come to. What a step computes:
// cpu/training/plan.h. The kernels: gather.cuh, dense.cuh, loss.cuh, top.cuh, update.cuh; and what they draw: draw.cuh.
//
// Contract
//   float and double. A matrix of w columns has rows that are row_stride(w) numbers apart, and begins at a multiple of
//   16 bytes; what stands in its columns from w on is of no meaning, here and in every kernel.
//   A layer's parameters are such a matrix of in + 1 rows: the weights, and the bias as the last. Behind it, `plane`
//   numbers further on each, are matrices like it: the states of the optimizer's rule, then the moving average.
//   What kernels are given depends on the rows of a step alone, so that a step can be recorded once: which one it is
//   they learn from Progress. The first kernel of a step opens it, the last is told that it `closes` it. Each
//   kernel needs what those before it have written.
//   Activations and losses are called by their places in the lists of csrc/formulas.
//   Sizes are at least 1, indices in range.
//   Gradients are sums over the mini-batch, of rows in their order within each quarter of a stage (matmul/small.cuh);
//   losses are added up in double. No float atomics: the same bits on every run.
//   A gradient penalty is further rows: GradientPenalty.
// Dynamic shared memory: what the tile takes, which is a WideTile in updates; see top; none for the others.
#pragma once

#include "cuda/matmul/small.cuh"

namespace gemmlet {

// The distance from row to row: rows begin at multiples of 16 bytes.
__device__ __forceinline__ constexpr int row_stride(int width) { return (width + 3) / 4 * 4; }

// The step that a call has come to, and the addresses of what belongs to the call alone.
struct Progress {
  const Index* order;                // the samples of the mini-batches
  const double* hyperparameters[2];  // of up to two networks, step by step
  const double* decay;               // of the moving averages, one number a step
  const void* noise;                 // a row for each of `order`
  const double* weights;             // of each of `order`, in units of the mean of its mini-batch; or null
  Index batch;
  Index next, step;  // the step that is opened next, and the one that has been opened
  Index first_step;  // what the first step of the call is in the training: random numbers depend on it
  double loss[2];
  Index correct;
};

// The data of a step, which the block that opens it stages: its kernels would have to follow one address after another.
template <class T>
struct Staged {
  static constexpr int max_hyperparameters = 11;  // of a rule, and at the end the average's decay and 1 - decay
  Progress* progress;
  int rows;
  Index* samples;                // those of the mini-batch
  const Index* indices;          // the classes of all samples, or null
  int* labels;                   // those of the mini-batch
  T* weights;                    // those of the mini-batch, or null
  T* hyperparameters;            // of both networks
  int hyperparameter_counts[2];  // in Progress
  bool averages;                 // of any network
};

// The gradient penalty (R1) of a network with one output D, of rows `first` to `end` - 1, which are samples x. Its gradient by a
// layer's weights is a sum of products of two rows for each of them, which the update adds to those of the rows of the
// mini-batch. They stand `offset` rows further on:
//   gradients  scale * dD/dz of the layer's preactivations z
//   inputs     what the layers below make of scale * dD/dx without biases, by the slopes at the sample
template <class T>
struct GradientPenalty {
  int first, end, offset;
  T scale;  // squared it is the factor of the mean over these rows

  __device__ __forceinline__ bool has(int i) const { return i >= first && i < end; }
  // Of a row, which may be one of those further on, its own or the sample's.
  __device__ __forceinline__ int sample(int i) const { return i < first + offset ? i : i - offset; }
};

// By one block of the kernel that opens the step. There, nothing else reads `step`, or what is staged; in the one that
// closes it, nothing else reads `next`.
template <class T>
__device__ inline void open_step(const Staged<T>& p) {
  const Progress& progress = *p.progress;
  const Index step = progress.next;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < p.rows; i += threads) {
    const Index sample = progress.order[step * progress.batch + i];
    p.samples[i] = sample;
    if (p.indices != nullptr) p.labels[i] = static_cast<int>(p.indices[sample]);
    if (p.weights != nullptr) p.weights[i] = static_cast<T>(progress.weights[step * progress.batch + i]);
  }
  for (int network = 0; network < 2; ++network) {
    const int count = p.hyperparameter_counts[network];
    T* const hyperparameters = p.hyperparameters + network * Staged<T>::max_hyperparameters;
    for (int s = thread; s < count; s += threads)
      hyperparameters[s] = static_cast<T>(progress.hyperparameters[network][step * count + s]);
    if (thread == 0 && p.averages) {
      hyperparameters[Staged<T>::max_hyperparameters - 2] = static_cast<T>(progress.decay[step]);
      hyperparameters[Staged<T>::max_hyperparameters - 1] = static_cast<T>(1.0 - progress.decay[step]);
    }
  }
  if (thread == 0) p.progress->step = step;
}

// The inputs of a layer: rows of a matrix, samples, or rows of noise.
template <class N>
struct Input {
  const N* rows;  // null: noise
  Index stride;
  const Index* samples;  // of the mini-batch, once they are staged; null: the rows are the mini-batch

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

}  // namespace gemmlet
