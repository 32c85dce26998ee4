// The loss and its gradient for rows of outputs, and how many rows are classified correctly.
//
// Contract
//   Each row is evaluated by itself; the gradient is multiplied by a scale, 1 / rows of the mini-batch for a mean.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/training/network.h"

namespace gemmlet {
namespace {

// The class that a row of outputs stands for; NaN counts as the largest, as in NumPy.
template <class T>
Index predicted_class(const T* row, Index columns) {
  if (columns == 1) return row[0] > T(0);
  Index best = 0;
  for (Index j = 1; j < columns; ++j)
    if (row[j] > row[best] || (row[j] != row[j] && row[best] == row[best])) best = j;
  return best;
}

// The loss of a network's outputs.
template <class T>
struct Objective {
  const Loss<T>& loss;
  const Network<T>& network;
  Index inputs, out;
  Rows<T> wanted;
  std::vector<double> losses;
  std::vector<Index> correct, indices;
  std::vector<const T*> values;

  // For max_rows of each of the network's inputs.
  Objective(const Loss<T>& of, const Network<T>& outputs, KeptMemory& memory, Index input_count, Index max_rows)
      : loss(of),
        network(outputs),
        inputs(input_count),
        out(outputs.output_width()),
        wanted(memory, is_row_loss(of.loss) || of.targets.values != nullptr ? 0 : inputs * max_rows, out),
        losses(static_cast<std::size_t>(inputs * max_rows)),
        correct(losses.size()),
        indices(losses.size()),
        values(losses.size()) {}

  // Evaluates rows of the network's input number `input`; its first row is `base`, which belongs to samples[0].
  void evaluate(const Index* samples, Index base, std::size_t input, Range rows, Index slot, T scale) {
    const Rows<T>& gradients = network.output_gradients();
    const Targets<T>& targets = loss.targets;
    for (Index i = rows.first; i < rows.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const Index sample = samples[i - base];
      indices[at] = targets.indices == nullptr ? 0 : targets.indices[sample];
      correct[at] = targets.indices != nullptr && predicted_class(network.outputs(slot, i), out) == indices[at];
      if (targets.values != nullptr) {
        values[at] = targets.values + sample * out;
      } else if (!is_row_loss(loss.loss)) {
        T* row = wanted.row(i);
        std::fill_n(row, out, targets.indices == nullptr ? targets.constants[input] : T(0));
        if (targets.indices != nullptr) row[out == 1 ? 0 : indices[at]] = out == 1 ? static_cast<T>(indices[at]) : T(1);
        values[at] = row;
      }
    }
    const auto first = static_cast<std::size_t>(rows.first);
    if (is_row_loss(loss.loss)) {
      row_loss_each(~loss.loss, network.outputs(slot, rows.first),
                    targets.values != nullptr ? nullptr : &indices[first],
                    targets.values != nullptr ? &values[first] : nullptr, loss.parameter, scale,
                    gradients.row(rows.first), gradients.stride, rows.size(), out, &losses[first]);
      for (std::size_t i = first; i < static_cast<std::size_t>(rows.end); ++i)
        losses[i] = losses[i] < loss.least ? loss.least : losses[i] > loss.most ? loss.most : losses[i];
      return;
    }
    for (Index i = rows.first; i < rows.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      losses[at] =
          elementwise_loss_row(loss.loss, network.outputs(slot, i), values[at], static_cast<T>(loss.parameter), scale,
                               static_cast<T>(loss.least), static_cast<T>(loss.most), gradients.row(i), out);
    }
  }

  // Multiplies the losses and gradients of rows that have been evaluated by their weights, in units of the mini-batch's
  // mean weight. The share of the sum comes first: it is at most 1, however small or large the weights are.
  void weigh(const Index* samples, Index base, Range rows, const double* weights, double weight_sum, Index batch_rows) {
    const Rows<T>& gradients = network.output_gradients();
    for (Index i = rows.first; i < rows.end; ++i) {
      const double weight = weights[samples[i - base]] / weight_sum * static_cast<double>(batch_rows);
      losses[static_cast<std::size_t>(i)] *= weight;
      for (Index j = 0; j < out; ++j) gradients.row(i)[j] *= static_cast<T>(weight);
    }
  }
};

}  // namespace
}  // namespace gemmlet
