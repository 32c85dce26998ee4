// A training step as data: networks, and the phases that a step runs in order (python/gemmlet/training/plan.py).
//
// Contract
//   Weights, biases and optimizer states are contiguous and change in place; nothing of them overlaps anything else.
//   Sizes are at least 1, indices in range. The weights are those of the same steps written with the functions of
//   kernels.h, to rounding, and have the same bits for any number of threads.
//   Zeros are skipped where `skip_zeros` says so: the bits stay the same, as long as all weights are finite.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "formulas/dropout.h"
#include "formulas/input_noise.h"

namespace gemmlet {

inline constexpr int max_states = 2;

template <class T>
struct Parameter {
  T* value;
  T* state[max_states];  // as many as the optimizer's rule has
  T* average;            // a moving average of the value, or null
};

// Of the inputs of a layer; with dropout::all none.
struct Dropout {
  unsigned keep = dropout::all, stream = 0;
  std::uint64_t seed = 0;

  explicit operator bool() const { return keep < dropout::all; }
};

// On the inputs of a network, before their dropout; of deviation 0 it is none.
struct InputNoise {
  double deviation = 0;
  unsigned stream = 0;
  std::uint64_t seed = 0;

  explicit operator bool() const { return deviation > 0; }
};

template <class T>
struct Layer {
  Index in, out;
  Parameter<T> weight, bias;  // (in, out), (out)
  Index stride;               // from one row of the weights, and of all that belongs to them, to the next
  int activation;             // -1 is none
  T activation_parameter;
  Index classes = 0;      // that many rows of weights follow those of the inputs: of each class of the samples one
  Dropout dropout = {};   // of the inputs
  InputNoise noise = {};  // of a first layer alone

  bool changes_inputs() const { return dropout || noise; }
};

// Rows of numbers, in one of three forms; x is scale * number + shift.
template <class T>
struct Samples {
  Index features;
  const T* values;            // (rows, features); or the numbers of a sparse matrix
  const std::uint8_t* bytes;  // (rows, features), instead of values: the number is byte / 255
  const T* value_of_byte;     // or this, 256 numbers, unless null
  // A sparse matrix by rows: row i has the numbers indptr[i] ... indptr[i + 1], their column indices ascending; else null.
  const Index* indptr;
  const std::int32_t* indices;
  T scale, shift;
  bool skip_zeros;                  // with bytes or values; needs shift 0, and fewer than 2^31 numbers in a mini-batch
  const double* weights = nullptr;  // of each row, its gradient and its loss; null is 1
  // The class of each row, which every network is given beside its inputs; null where first layers have no classes.
  const Index* labels = nullptr;
};

// What the outputs are compared with: class indices, numbers (rows, out), or one number for each input of the network; the
// others are null or empty. Class indices stand for one-hot rows of an elementwise loss, of one output for 0 and 1.
template <class T>
struct Targets {
  const Index* indices;
  const T* values;
  std::vector<T> constants;
};

// A loss is the index of an elementwise loss in its list, or ~index of a row loss in its.
constexpr bool is_row_loss(int loss) { return loss < 0; }

template <class T>
struct Loss {
  int loss;
  double parameter;  // the kernel's: label smoothing of a row loss
  double weight;     // of the sum over a row in the objective, divided by that of the rows' weights or their number
  Targets<T> targets;
  double least, most;  // what the loss of an element, or of a row, counts; the gradient is not limited
};

// What a network's first layer reads: the samples, the noise, or the outputs of a network (its number).
inline constexpr int samples_source = -1, noise_source = -2;

struct Phase {
  enum Kind { forward, loss, backward, penalty, gradient_penalty, update } kind;
  int network;
  std::vector<int> inputs;  // forward: the rows of these sources follow each other
  int to;                   // backward: the network whose outputs get the gradient; -1 is none
  int rule;                 // update
  // penalty: l2 / 2 times the sum of the squared weights and l1 times that of their sizes, of the network. It is added to the
  // objective, or to the sum over the rows that the objective divides by the size of the mini-batch.
  double l2 = 0, l1 = 0;
  bool of_sum = true;
  // update: each number of the gradient, with that of penalties, is limited to [-limit, limit] first
  double limit = std::numeric_limits<double>::infinity();
  bool decays_biases = true;
  // gradient_penalty: half the factor times the mean square of the gradient by a sample, over the first ceil(rows / share)
  // of the mini-batch. The network has one output, samples come first, and all activations are linear in pieces.
  double factor = 0;
  Index share = 0;
  unsigned stream = 0;  // forward: what is added to the streams of the dropout and the noise
};

// Phases are in an order in which each finds what it reads; the last is an update. Only where the plan is_pipelined may
// samples be sparse, and their zeros be skipped; and not where the network has noise on its inputs.
template <class T>
struct Plan {
  std::vector<std::vector<Layer<T>>> networks;
  std::vector<Phase> phases;
  std::vector<Loss<T>> losses;  // in the order of the phases
  Samples<T> samples;
};

// Whether samples go through one network alone, which is updated once: then the executor prepares a mini-batch ahead.
template <class T>
bool is_pipelined(const Plan<T>& plan) {
  int forwards = 0, updates = 0, gradient_penalties = 0;
  for (const Phase& phase : plan.phases) {
    forwards += phase.kind == Phase::forward;
    updates += phase.kind == Phase::update;
    gradient_penalties += phase.kind == Phase::gradient_penalty;
  }
  return gradient_penalties == 0 && forwards == 1 && updates == 1 && plan.samples.labels == nullptr &&
         plan.phases[0].inputs == std::vector<int>{samples_source};
}

// The mini-batches: rows order[0] ... order[count - 1], `batch` at a time.
struct Steps {
  const Index* order;
  Index count, batch;
};

template <class T>
struct Batches : Steps {
  // Of each update: those of step s begin at s * optimizer_hyperparameter_count(rule).
  std::vector<const double*> hyperparameters;
  // Of each step's samples, positive and finite; empty if samples have no weights, or their number counts instead.
  std::vector<double> weight_sums;
  const double* decay;           // of the averages, one for each step; or null
  const T* noise;                // `count` rows, or null
  std::uint64_t first_step = 0;  // what the steps are counted from, by which random numbers are drawn
};

struct Outcome {
  // Those given, and each row's loss and each mini-batch's penalty, as they were before its updates.
  std::vector<double> losses;
  // Rows whose largest output (of a single one: its sign) is the class that the first loss has as an index.
  Index correct;
};

// The outputs of a network for `count` samples, a row each, without what their activation needs: no parameter is written.
// Zeros are skipped as in a plan.
template <class T>
void forward(const std::vector<Layer<T>>& layers, const Samples<T>& samples, Index count, T* outputs);

// Writes n numbers as bytes, with the number that each byte stands for, 256 of them; zeros are the byte 0, and the bits of
// every number are kept. Returns false, and leaves both half written, if there are too many different ones.
template <class T>
bool encode(const T* x, Index n, std::uint8_t* bytes, T* value_of_byte);

// `memory` is the same one for the calls of a training.
template <class T>
Outcome train(const Plan<T>& plan, const Batches<T>& batches, std::vector<double> losses, KeptMemory& memory);

}  // namespace gemmlet
