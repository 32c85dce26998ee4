// The loss and its gradient for rows of outputs, and the number of correctly classified rows.
//
// Contract
//   Rows are independent. The gradient is multiplied by `scale`: row_weight / rows of the mini-batch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/training/buffers.h"
#include "cpu/training/network.h"
#include "cpu/training/plan.h"

namespace gemmlet {
namespace {

// The predicted class: the largest output, or the sign of a single one. NaN counts as the largest, as in NumPy.
template <class T>
Index predicted_class(const T* row, Index columns) {
  if (columns == 1) return row[0] > T(0);
  Index best = 0;
  for (Index j = 1; j < columns; ++j)
    if (row[j] > row[best] || (row[j] != row[j] && row[best] == row[best])) best = j;
  return best;
}

// The loss of a mini-batch, row by row.
template <class T>
struct Objective {
  Targets<T> targets;
  int loss;
  T parameter;
  double row_weight;
  Index out;
  Rows<T> one_hot;
  std::vector<double> losses;
  std::vector<Index> correct, indices;
  std::vector<const T*> values;

  Objective(const Targets<T>& wanted, int loss_number, T loss_parameter, double weight, Index outputs, Index max_rows)
      : targets(wanted),
        loss(loss_number),
        parameter(loss_parameter),
        row_weight(weight),
        out(outputs),
        one_hot(max_rows, outputs),
        losses(static_cast<std::size_t>(max_rows)),
        correct(static_cast<std::size_t>(max_rows)),
        indices(static_cast<std::size_t>(max_rows)),
        values(static_cast<std::size_t>(max_rows)) {}

  // Rows of the mini-batch; row i is samples[i].
  void evaluate(const Index* samples, Range rows, const Network<T>& network, Index slot, T scale) {
    const Rows<T>& gradients = network.output_gradients();
    for (Index i = rows.first; i < rows.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      indices[at] = targets.indices == nullptr ? 0 : targets.indices[samples[i]];
      values[at] = targets.values == nullptr ? nullptr : targets.values + samples[i] * out;
      correct[at] = targets.indices != nullptr && predicted_class(network.outputs(slot, i), out) == indices[at];
    }
    const auto first = static_cast<std::size_t>(rows.first);
    if (is_row_loss(loss)) {
      row_loss_each(~loss, network.outputs(slot, rows.first), targets.values != nullptr ? nullptr : &indices[first],
                    targets.values != nullptr ? &values[first] : nullptr, 0.0, scale, gradients.row(rows.first),
                    gradients.stride, rows.size(), out, &losses[first]);
      return;
    }
    for (Index i = rows.first; i < rows.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const T* wanted = values[at];
      if (wanted == nullptr) {
        std::fill_n(one_hot.row(i), out, T(0));
        if (out == 1)
          one_hot.row(i)[0] = static_cast<T>(indices[at]);
        else
          one_hot.row(i)[indices[at]] = T(1);
        wanted = one_hot.row(i);
      }
      losses[at] =
          elementwise_loss_row(loss, network.outputs(slot, i), wanted, parameter, scale, gradients.row(i), out);
    }
  }
};

}  // namespace
}  // namespace gemmlet
