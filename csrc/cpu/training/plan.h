// The types of fused training below the bindings, and its entry points: whole mini-batches in one call, for a multilayer
// perceptron and for a GAN.
//
// Contract
//   Weights, biases and optimizer states are contiguous, are updated in place, and overlap nothing. Sizes are at least 1,
//   indices in range. The weights equal those of the same steps written with the functions of kernels.h up to rounding,
//   and have the same bits for any number of threads.
//   `skip_zeros` skips zeros of the samples: the bits stay the same as long as all weights are finite.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace gemmlet {

inline constexpr int max_states = 2;

template <class T>
struct Parameter {
  T* value;
  T* state[max_states];  // the state_count arrays of the optimizer's rule
  T* average;            // the moving average of the value, or null
};

template <class T>
struct Layer {
  Index in, out;
  Parameter<T> weight, bias;  // (in, out), (out)
  Index stride;               // between rows of the weights, their states and their average
  int activation;             // -1 is none
  T activation_parameter;
};

// The dataset: dense values, bytes, or a CSR matrix; x = scale * value + shift.
template <class T>
struct Samples {
  Index features;
  const T* values;            // (rows, features), or the nonzeros of a CSR matrix
  const std::uint8_t* bytes;  // (rows, features), instead of values: value = byte / 255
  // CSR: row i has the nonzeros indptr[i] to indptr[i + 1], their column indices ascending; null for dense samples.
  const Index* indptr;
  const std::int32_t* indices;
  T scale, shift;
  bool skip_zeros;  // of bytes or values; needs shift 0, and fewer than 2^31 values in a mini-batch
};

// Class indices, or values (rows, out); the other is null.
template <class T>
struct Targets {
  const Index* indices;
  const T* values;
};

// The mini-batches: samples order[0] to order[count - 1], `batch` at a time.
struct Steps {
  const Index* order;
  Index count, batch;
};
// The optimizer. The hyperparameters of step s begin at hyperparameters + s * optimizer_scalar_count(rule).
struct Rule {
  int rule;
  const double* hyperparameters;
};

// A loss is the index of an elementwise loss in its list, or ~index of a row loss in its.
constexpr bool is_row_loss(int loss) { return loss < 0; }

struct MlpOutcome {
  double loss;    // loss_sum plus the loss of each row before the update of its mini-batch
  Index correct;  // rows whose predicted class, the largest output or the sign of a single one, is the target
};

// The sum of an elementwise loss over a row is multiplied by row_weight; class indices stand for one-hot targets there.
template <class T>
MlpOutcome train_mlp(const std::vector<Layer<T>>& layers, const Samples<T>& samples, const Targets<T>& targets,
                     int loss, T loss_parameter, double row_weight, const Steps& steps, const Rule& rule,
                     double loss_sum);

struct GanOutcome {
  double generator_loss, discriminator_loss;  // sums over the rows
};

// Each mini-batch is a step of the discriminator, whose last width is 1, then one of the generator, on the same noise (one
// row for each sample, in order). The discriminator's targets are real_target for samples and 0 for generated rows.
// decay: of the generator's moving averages, one for each step.
template <class T>
GanOutcome train_gan(const std::vector<Layer<T>>& generator, const std::vector<Layer<T>>& discriminator,
                     const Samples<T>& samples, const T* noise, T real_target, bool non_saturating, const Steps& steps,
                     const Rule& generator_rule, const Rule& discriminator_rule, const double* decay,
                     GanOutcome loss_sums);

}  // namespace gemmlet
