// Activations over arrays, functions of rows, and column sums. Bound by memory when arrays are large, by exp when not.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "formulas/activations.h"
// After the functions that it is written on.
#include "formulas/rows.h"

namespace gemmlet {
namespace {

template <class F>
constexpr bool cheap_forward = false;
template <>
constexpr bool cheap_forward<activations::identity> = true;
template <>
constexpr bool cheap_forward<activations::relu> = true;
template <>
constexpr bool cheap_forward<activations::leaky_relu> = true;

// Gradients in terms of y are polynomials, except softplus.
template <class F>
constexpr bool cheap_backward = !F::needs_x;
template <>
constexpr bool cheap_backward<activations::softplus> = false;

// One loop for body and tail, so that the formula is inlined once.
template <class T, class F>
[[gnu::flatten]] void forward_range(const T* x, Vec<T> parameter, T* y, Index i, Index end) {
  for (; i < end; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, end - i));
    store_lanes(y + i, F::forward(load_lanes(x + i, n), parameter), n);
  }
}

template <class T, class F>
[[gnu::flatten]] void backward_range(const T* grad_y, const T* saved, Vec<T> parameter, T* grad_x, Index i, Index end) {
  for (; i < end; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, end - i));
    store_lanes(grad_x + i, F::backward(load_lanes(grad_y + i, n), load_lanes(saved + i, n), parameter), n);
  }
}

template <class T, class F>
void forward(const T* x, T parameter, T* y, Index n) {
  parallel_chunks(
      n, [&](Index i, Index end) { forward_range<T, F>(x, splat(parameter), y, i, end); },
      cheap_forward<F> ? tuning::cheap_chunk : tuning::costly_chunk);
}

template <class T, class F>
void backward(const T* grad_y, const T* saved, T parameter, T* grad_x, Index n) {
  parallel_chunks(
      n, [&](Index i, Index end) { backward_range<T, F>(grad_y, saved, splat(parameter), grad_x, i, end); },
      cheap_backward<F> ? tuning::cheap_chunk : tuning::costly_chunk);
}

template <class T, class F, class Layout>
[[gnu::flatten]] void row_forward(const Layout& layout, T* y, const T* x) {
  F::forward(Operands<Layout>{layout, y, x});
}

template <class T, class F, class Layout>
[[gnu::flatten]] void row_backward(const Layout& layout, T* grad_x, const T* grad_y, const T* y) {
  F::backward(Operands<Layout, std::identity>{layout, grad_x, grad_y, y});
}

template <class T, class F>
void rows_forward(const T* x, T* y, Index rows, Index columns) {
  const auto call = [](const auto& layout, Index, int, T* to, const T* from) { row_forward<T, F>(layout, to, from); };
  parallel_chunks(
      rows, [&](Index begin, Index end) { for_rows(begin, end, columns, call, y, x); }, rows_per_chunk<T>(columns));
}

template <class T, class F>
void rows_backward(const T* grad_y, const T* y, T* grad_x, Index rows, Index columns) {
  const auto call = [](const auto& layout, Index, int, T* to, const T* g, const T* p) {
    row_backward<T, F>(layout, to, g, p);
  };
  parallel_chunks(
      rows, [&](Index begin, Index end) { for_rows(begin, end, columns, call, grad_x, grad_y, y); },
      rows_per_chunk<T>(columns));
}

}  // namespace

template <class T>
void activation_forward(int activation, const T* x, T parameter, T* y, Index n) {
  using Function = void (*)(const T*, T, T*, Index);
#define GEMMLET_ENTRY(name) &forward<T, activations::name>,
  static constexpr Function table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[activation](x, parameter, y, n);
}

template <class T>
void activation_backward(int activation, const T* grad_y, const T* saved, T parameter, T* grad_x, Index n) {
  using Function = void (*)(const T*, const T*, T, T*, Index);
#define GEMMLET_ENTRY(name) &backward<T, activations::name>,
  static constexpr Function table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[activation](grad_y, saved, parameter, grad_x, n);
}

template <class T>
void row_function_forward(int function, const T* x, T* y, Index rows, Index columns) {
  using Function = void (*)(const T*, T*, Index, Index);
#define GEMMLET_ENTRY(name) &rows_forward<T, row_functions::name>,
  static constexpr Function table[] = {GEMMLET_ROW_FUNCTIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[function](x, y, rows, columns);
}

template <class T>
void row_function_backward(int function, const T* grad_y, const T* y, T* grad_x, Index rows, Index columns) {
  using Function = void (*)(const T*, const T*, T*, Index, Index);
#define GEMMLET_ENTRY(name) &rows_backward<T, row_functions::name>,
  static constexpr Function table[] = {GEMMLET_ROW_FUNCTIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[function](grad_y, y, grad_x, rows, columns);
}

template <class T>
void column_sum(View<T> x, T* sum) {
  // Each column is reduced sequentially, in double; threads divide the columns.
  const bool large = x.rows * x.columns > 4 * tuning::chunk_elements;
  parallel_chunks(
      x.columns,
      [&](Index begin, Index end) {
        for (Index j = begin; j < end; j += tuning::column_sum_block) {
          const Index width = end - j < tuning::column_sum_block ? end - j : tuning::column_sum_block;
          double total[tuning::column_sum_block] = {};
          for (Index i = 0; i < x.rows; ++i) {
            const T* row = x.data + i * x.row_stride + j * x.column_stride;
            if (x.column_stride == 1)
              for (Index c = 0; c < width; ++c) total[c] += static_cast<double>(row[c]);
            else
              for (Index c = 0; c < width; ++c) total[c] += static_cast<double>(row[c * x.column_stride]);
          }
          for (Index c = 0; c < width; ++c) sum[j + c] = static_cast<T>(total[c]);
        }
      },
      large ? tuning::column_sum_block : x.columns + 1);
}

template <class T>
bool is_finite(const T* x, Index n) {
  // x * 0 is NaN unless x is finite. Several accumulators, to hide the latency of the additions.
  constexpr Index chains = 8, step = chains * lanes<T>;
  Vec<T> sum[chains] = {};
  Index i = 0;
  for (; i + step <= n; i += step)
#pragma GCC unroll 8
    for (Index c = 0; c < chains; ++c) sum[c] = fma(load(x + i + c * lanes<T>), Vec<T>{}, sum[c]);
  T total = 0;
  for (; i < n; ++i) total += x[i] * T(0);
  for (const Vec<T>& of_chain : sum)
    for (int lane = 0; lane < lanes<T>; ++lane) total += of_chain[lane];
  return total == 0;
}

std::vector<std::string> activation_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
}

std::vector<std::string> row_function_names() {
  return {GEMMLET_ROW_FUNCTIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

#define GEMMLET_INSTANTIATE(T)                                                    \
  template void activation_forward(int, const T*, T, T*, Index);                  \
  template void activation_backward(int, const T*, const T*, T, T*, Index);       \
  template void row_function_forward(int, const T*, T*, Index, Index);            \
  template void row_function_backward(int, const T*, const T*, T*, Index, Index); \
  template void column_sum(View<T>, T*);                                          \
  template bool is_finite(const T*, Index);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
