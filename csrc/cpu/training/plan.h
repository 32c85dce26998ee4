// Fused training: whole mini-batches in one call, for a multilayer perceptron and for a pair of adversarial networks.
//
// Contract
//   Weights, biases and optimizer states are contiguous and change in place; nothing of them overlaps anything else.
//   Sizes are at least 1, indices in range. The weights are those of the same steps written with the functions of
//   kernels.h, to rounding, and have the same bits for any number of threads.
//   Zeros are skipped where `skip_zeros` says so: the bits stay the same, as long as all weights are finite.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace gemmlet {

inline constexpr int most_states = 2, most_scalars = 9;

template <class T>
struct Parameter {
  T* value;
  T* state[most_states];  // as many as the optimizer's rule has
  T* average;             // a moving average of the value, or null
};

template <class T>
struct Layer {
  Index in, out;
  Parameter<T> weight, bias;  // (in, out), (out)
  Index stride;               // from one row of the weights, and of all that belongs to them, to the next
  int activation;             // -1 is none
  T activation_parameter;
};

// Rows of numbers, in one of three forms; x is scale * number + shift.
template <class T>
struct Samples {
  Index features;
  const T* values;            // (rows, features); or the numbers of a sparse matrix
  const std::uint8_t* bytes;  // (rows, features), instead of values: the number is byte / 255
  // A sparse matrix by rows: row i has the numbers row_start[i] ... row_start[i + 1], their columns ascending; else null.
  const Index* row_start;
  const std::int32_t* columns;
  T scale, shift;
  bool skip_zeros;  // with bytes or values; needs shift 0, and fewer than 2^31 numbers in a mini-batch
};

// What the rows are compared with: class indices or numbers (rows, out), one of them null.
template <class T>
struct Targets {
  const Index* indices;
  const T* values;
};

// The mini-batches: rows order[0] ... order[count - 1], `batch` at a time. The rule's numbers of step s begin at
// scalars + s * optimizer_scalar_count(rule).
struct Steps {
  const Index* order;
  Index count, batch;
};
struct Rule {
  int rule;
  const double* scalars;
};

inline constexpr int softmax_loss = -1;

struct MlpOutcome {
  double loss;  // loss_sum, and each row's loss, as it was before its mini-batch's update
  Index right;  // rows whose largest output (with one output: its sign) is the class
};

// loss: softmax_loss, or an elementwise one, whose sum over a row is multiplied by row_weight. Class indices stand for
// targets of 0 and 1 there.
template <class T>
MlpOutcome train_mlp(const std::vector<Layer<T>>& layers, const Samples<T>& samples, const Targets<T>& targets,
                     int loss, T loss_parameter, double row_weight, const Steps& steps, const Rule& rule,
                     double loss_sum);

struct GanOutcome {
  double generator_loss, discriminator_loss;  // sums over the rows
};

// Each mini-batch: a step of the discriminator, whose last width is 1, then one of the generator, on the same noise (one
// row for each of the samples in their order). The discriminator shall say real_target for samples and 0 for what is
// generated. decay: of the generator's averages, one number a step.
template <class T>
GanOutcome train_gan(const std::vector<Layer<T>>& generator, const std::vector<Layer<T>>& discriminator,
                     const Samples<T>& samples, const T* noise, T real_target, bool non_saturating, const Steps& steps,
                     const Rule& generator_rule, const Rule& discriminator_rule, const double* decay,
                     GanOutcome loss_sums);

}  // namespace gemmlet
