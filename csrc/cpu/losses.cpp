// Losses: the mean and its gradient in one pass. Sums in double, over chunks of a fixed size, in a fixed order.
#include <algorithm>

#include "cpu/rows.h"
#include "cpu/threads.h"
// After the functions that it is written on.
#include "formulas/rows.h"

namespace gemmlet {
namespace {

// The sum of f(begin, end) over fixed chunks of n, the chunks in their order.
template <class F>
double sum_chunks(Index n, Index chunk, F&& f) {
  std::vector<double> partial(static_cast<std::size_t>((n + chunk - 1) / chunk));
  parallel_chunks(
      n, [&](Index begin, Index end) { partial[static_cast<std::size_t>(begin / chunk)] = f(begin, end); }, chunk);
  double total = 0;
  for (double p : partial) total += p;
  return total;
}

// The sum of the losses from `i` to `end`.
template <class T, class F>
[[gnu::flatten]] double evaluate_range(const T* prediction, const T* target, Vec<T> parameter, Vec<T> share,
                                       T* gradient, Index i, Index end) {
  DoubleSum<T> total;
  for (; i < end; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, end - i));
    Vec<T> loss, slope;
    F::evaluate(load_lanes(prediction + i, n), load_lanes(target + i, n), parameter, share, loss, slope);
    total.add(n == lanes<T> ? loss : keep_lanes<T>(loss, 0, n));
    store_lanes(gradient + i, slope, n);
  }
  return total.total();
}

template <class T, class F>
double evaluate(const T* prediction, const T* target, T parameter, T* gradient, Index n) {
  const T share = static_cast<T>(1.0 / static_cast<double>(n));
  const double sum = sum_chunks(n, tuning::chunk_elements, [&](Index begin, Index end) {
    return evaluate_range<T, F>(prediction, target, splat(parameter), splat(share), gradient, begin, end);
  });
  return sum / static_cast<double>(n);
}

// The losses of the first n rows, against class indices or targets, one of them null.
template <class L, class T, class Layout>
[[gnu::flatten]] void evaluate_rows(const Layout& layout, int n, T* gradient, const T* z, const Index* indices,
                                    const T* target, row_losses::Smoothing<double> smoothing, T scale,
                                    double* losses) {
  double of_row[Layout::count];
  if (target == nullptr) {
    const Operands<Layout> rows{layout, gradient, z, nullptr, {}, indices, n};
    Layout::store_statistic(of_row, L::of_label(rows, smoothing, splat(scale)));
  } else {
    const row_losses::Smoothing<Vec<T>> s{constant<Vec<T>>(smoothing.keep), constant<Vec<T>>(smoothing.spread)};
    const auto smoothed = [=](Vec<T> t) { return s.of_target(t); };
    const Operands<Layout, decltype(smoothed)> rows{layout, gradient, z, target, smoothed};
    Layout::store_statistic(of_row, L::of_targets(rows, splat(scale)));
  }
  std::copy_n(of_row, n, losses);
}

using L = row_losses::softmax_cross_entropy;
}  // namespace

template <class T>
double softmax_cross_entropy(const T* logits, const Index* indices, const T* targets, double smoothing, T* gradient,
                             Index rows, Index columns) {
  const row_losses::Smoothing<double> targets_are{1.0 - smoothing, smoothing / static_cast<double>(columns)};
  const T scale = static_cast<T>(1.0 / static_cast<double>(rows));
  const double sum = sum_chunks(rows, rows_per_chunk<T>(columns), [&](Index begin, Index end) {
    double total = 0, losses[lanes<T>];
    const auto add = [&](int n) {
      for (int r = 0; r < n; ++r) total += losses[r];
    };
    if (targets == nullptr)
      for_rows(
          begin, end, columns,
          [&](const auto& layout, Index i, int n, T* to, const T* z) {
            evaluate_rows<L, T>(layout, n, to, z, indices + i, nullptr, targets_are, scale, losses);
            add(n);
          },
          gradient, logits);
    else
      for_rows(
          begin, end, columns,
          [&](const auto& layout, Index, int n, T* to, const T* z, const T* t) {
            evaluate_rows<L, T>(layout, n, to, z, nullptr, t, targets_are, scale, losses);
            add(n);
          },
          gradient, logits, targets);
    return total;
  });
  return sum / static_cast<double>(rows);
}

template <class T>
double elementwise_loss(int loss, const T* prediction, const T* target, T parameter, T* gradient, Index n) {
  using Function = double (*)(const T*, const T*, T, T*, Index);
#define GEMMLET_ENTRY(name) &evaluate<T, losses::name>,
  static constexpr Function table[] = {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[loss](prediction, target, parameter, gradient, n);
}

template <class T>
bool within_unit_interval(const T* x, Index n) {
  int outside = 0;
  for (Index i = 0; i < n; ++i) outside |= (x[i] < T(0)) | (x[i] > T(1));
  return outside == 0;
}

template <class T>
void softmax_cross_entropy_rows(const T* logits, const Index* indices, const T* const* targets, T share, T* gradient,
                                Index stride, Index rows, Index columns, double* losses) {
  if (columns > tuning::across_max_columns) {
    for (Index i = 0; i < rows; ++i)
      evaluate_rows<L, T>(Along<T>{columns}, 1, gradient + i * stride, logits + i * stride,
                       indices == nullptr ? nullptr : indices + i, targets == nullptr ? nullptr : targets[i], {1.0, 0.0},
                       share, losses + i);
    return;
  }
  const Across<T> layout{columns};
  alignas(64) T z[tuning::across_max_columns * lanes<T>], t[tuning::across_max_columns * lanes<T>];
  for (Index i = 0; i < rows; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, rows - i));
    layout.bring(logits + i * stride, n, z, stride);
    if (targets != nullptr)
      for (int r = 0; r < n; ++r)
        for (Index j = 0; j < columns; ++j) t[layout.at(r, j)] = targets[i + r][j];
    evaluate_rows<L, T>(layout, n, z, z, indices == nullptr ? nullptr : indices + i, targets == nullptr ? nullptr : t, {1.0,
                     0.0}, share, losses + i);
    layout.take_back(z, n, gradient + i * stride, stride);
  }
}

template <class T>
double elementwise_loss_row(int loss, const T* prediction, const T* target, T parameter, T share, T* gradient,
                            Index n) {
  using Function = double (*)(const T*, const T*, Vec<T>, Vec<T>, T*, Index, Index);
#define GEMMLET_ENTRY(name) &evaluate_range<T, losses::name>,
  static constexpr Function table[] = {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[loss](prediction, target, splat(parameter), splat(share), gradient, 0, n);
}

int elementwise_loss_number(const std::string& name) {
  const std::vector<std::string> names = loss_names();
  return static_cast<int>(std::find(names.begin(), names.end(), name) - names.begin());
}

std::vector<std::string> loss_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

#define GEMMLET_INSTANTIATE(T)                                                                                  \
  template double softmax_cross_entropy(const T*, const Index*, const T*, double, T*, Index, Index);            \
  template double elementwise_loss(int, const T*, const T*, T, T*, Index);                                      \
  template bool within_unit_interval(const T*, Index);                                                          \
  template void softmax_cross_entropy_rows(const T*, const Index*, const T* const*, T, T*, Index, Index, Index, \
                                           double*);                                                            \
  template double elementwise_loss_row(int, const T*, const T*, T, T, T*, Index);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
