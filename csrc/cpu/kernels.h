// The entry points below the bindings: pointers, sizes and strides, for T = float and double.
//
// Contract
//   Pointers without strides are contiguous. An output of an elementwise or row function may be one of its inputs;
//   beyond that nothing overlaps. Sizes may be 0, except the columns of a row function or loss.
//   Results do not depend on the number of threads. Names are looked up in the lists of csrc/formulas/ (see the *_names
//   functions).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gemmlet {

using Index = std::int64_t;

constexpr Index ceil_div(Index n, Index size) { return (n + size - 1) / size; }

// Element (i, j) stands at data[i * row_stride + j * column_stride]; strides count elements, and may be 0 or negative.
template <class T>
struct View {
  const T* data;
  Index rows, columns, row_stride, column_stride;

  View transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  // Some of its rows, and of its columns.
  View block(Index row, Index row_count, Index column, Index column_count) const {
    return {data + row * row_stride + column * column_stride, row_count, column_count, row_stride, column_stride};
  }
};

// matmul/matmul.cpp. z, if not null, takes the value before the activation; activation -1 is none.
template <class T>
void linear(View<T> x, View<T> w, const T* bias, int activation, T parameter, T* y, T* z);

// elementwise.cpp. Up to tuning::costly_chunk elements run on the calling thread, so that tasks of parallel_for may call them.
template <class T>
void activation_forward(int activation, const T* x, T parameter, T* y, Index n);
template <class T>
void activation_backward(int activation, const T* grad_y, const T* saved, T parameter, T* grad_x, Index n);
template <class T>
void row_function_forward(int function, const T* x, T* y, Index rows, Index columns);
template <class T>
void row_function_backward(int function, const T* grad_y, const T* y, T* grad_x, Index rows, Index columns);
template <class T>
void column_sum(View<T> x, T* sum);
template <class T>
bool is_finite(const T* x, Index n);  // all of them; on the calling thread

// losses.cpp: the gradient of the mean goes to `gradient`, the mean is returned. Either indices or targets is null.
template <class T>
double row_loss(int loss, const T* logits, const Index* indices, const T* targets, double smoothing, T* gradient,
                Index rows, Index columns);
template <class T>
double elementwise_loss(int loss, const T* prediction, const T* target, T parameter, T* gradient, Index n);
template <class T>
bool within_unit_interval(const T* x, Index n);  // NaN passes
// Rows of a mini-batch, on the calling thread: the loss of each row (elementwise: its sum) goes to losses; the gradient
// is multiplied by `scale`. Rows of logits and gradient are `stride` apart. Either indices, or targets by row, is null.
template <class T>
void row_loss_each(int loss, const T* logits, const Index* indices, const T* const* targets, double smoothing, T scale,
                   T* gradient, Index stride, Index rows, Index columns, double* losses);
// The loss of each element counts as at least `least`, and at most `most`.
template <class T>
double elementwise_loss_row(int loss, const T* prediction, const T* target, T parameter, T scale, T least, T most,
                            T* gradient, Index n);

// optimizers.cpp: the rule's state_count arrays and hyperparameter_count hyperparameters.
template <class T>
void optimizer_update(int rule, T* param, const T* grad, T* const* state, const double* hyperparameters, Index n);
int optimizer_state_count(int rule);
int optimizer_hyperparameter_count(int rule);

std::vector<std::string> activation_names();
std::vector<std::string> row_function_names();
std::vector<std::string> loss_names();
std::vector<std::string> row_loss_names();
std::vector<std::string> optimizer_rule_names();

}  // namespace gemmlet
