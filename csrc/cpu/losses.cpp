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

// The sum of the losses from `i` to `end`, of each what `limited` makes of it.
template <class T, class F, class Limited>
[[gnu::flatten]] double evaluate_range(const T* prediction, const T* target, Vec<T> parameter, Vec<T> scale,
                                       T* gradient, Index i, Index end, const Limited& limited) {
  DoubleSum<T> total;
  for (; i < end; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, end - i));
    Vec<T> loss, slope;
    F::evaluate(load_lanes(prediction + i, n), load_lanes(target + i, n), parameter, scale, loss, slope);
    loss = limited(loss);
    total.add(n == lanes<T> ? loss : keep_lanes<T>(loss, 0, n));
    store_lanes(gradient + i, slope, n);
  }
  return total.total();
}

template <class T, class F>
double evaluate(const T* prediction, const T* target, T parameter, T* gradient, Index n) {
  const T scale = static_cast<T>(1.0 / static_cast<double>(n));
  const double sum = sum_chunks(n, tuning::chunk_elements, [&](Index begin, Index end) {
    return evaluate_range<T, F>(prediction, target, splat(parameter), splat(scale), gradient, begin, end,
                                [](Vec<T> loss) { return loss; });
  });
  return sum / static_cast<double>(n);
}

using row_losses::Smoothing;

// The losses of the first n rows, against targets; and against class indices.
template <class L, class T, class Layout>
[[gnu::flatten]] void evaluate_rows(const Layout& layout, int n, T* gradient, const T* z, const T* target,
                                    Smoothing<double> smoothing, T scale, double* losses) {
  double of_row[Layout::count];
  const Smoothing<Vec<T>> lanes_of{constant<Vec<T>>(smoothing.keep), constant<Vec<T>>(smoothing.spread)};
  const auto smoothed = [=](Vec<T> t) { return lanes_of.of_target(t); };
  const Operands<Layout, decltype(smoothed)> rows{layout, gradient, z, target, smoothed};
  Layout::store_statistic(of_row, L::of_targets(rows, splat(scale)));
  std::copy_n(of_row, n, losses);
}

template <class L, class T, class Layout>
[[gnu::flatten]] void evaluate_rows(const Layout& layout, int n, T* gradient, const T* z, const Index* indices,
                                    Smoothing<double> smoothing, T scale, double* losses) {
  if constexpr (L::has_label_form) {
    double of_row[Layout::count];
    const Operands<Layout> rows{layout, gradient, z, nullptr, {}, indices, n};
    Layout::store_statistic(of_row, L::of_label(rows, smoothing, splat(scale)));
    std::copy_n(of_row, n, losses);
  } else {
    std::vector<T> one_hot(static_cast<std::size_t>(layout.columns * Layout::count));
    for (int r = 0; r < n; ++r) one_hot[static_cast<std::size_t>(layout.at(r, indices[r]))] = T(1);
    evaluate_rows<L, T>(layout, n, gradient, z, one_hot.data(), smoothing, scale, losses);
  }
}

template <class T, class L>
double evaluate_mean(const T* logits, const Index* indices, const T* targets, Smoothing<double> smoothing, T* gradient,
                     Index rows, Index columns) {
  const T scale = static_cast<T>(1.0 / static_cast<double>(rows));
  const double sum = sum_chunks(rows, rows_per_chunk<T>(columns), [&](Index begin, Index end) {
    double total = 0;
    const auto evaluate = [&](const auto& layout, Index, int n, T* to, const T* z, const auto* wanted) {
      double losses[lanes<T>];
      evaluate_rows<L, T>(layout, n, to, z, wanted, smoothing, scale, losses);
      for (int r = 0; r < n; ++r) total += losses[r];
    };
    if (targets == nullptr)
      for_rows(
          begin, end, columns,
          [&](const auto& layout, Index i, int n, T* to, const T* z) { evaluate(layout, i, n, to, z, indices + i); },
          gradient, logits);
    else
      for_rows(begin, end, columns, evaluate, gradient, logits, targets);
    return total;
  });
  return sum / static_cast<double>(rows);
}

template <class T, class L>
void evaluate_each(const T* logits, const Index* indices, const T* const* targets, Smoothing<double> smoothing, T scale,
                   T* gradient, Index stride, Index rows, Index columns, double* losses) {
  const auto evaluate = [&](const auto& layout, Index i, int n, T* to, const T* from, const T* target) {
    if (targets == nullptr)
      evaluate_rows<L, T>(layout, n, to, from, indices + i, smoothing, scale, losses + i);
    else
      evaluate_rows<L, T>(layout, n, to, from, target, smoothing, scale, losses + i);
  };
  if (columns > tuning::across_max_columns) {
    for (Index i = 0; i < rows; ++i)
      evaluate(Along<T>{columns}, i, 1, gradient + i * stride, logits + i * stride,
               targets == nullptr ? nullptr : targets[i]);
    return;
  }
  const Across<T> layout{columns};
  alignas(64) T z[tuning::across_max_columns * lanes<T>], t[tuning::across_max_columns * lanes<T>];
  for (Index i = 0; i < rows; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, rows - i));
    layout.transpose_in(logits + i * stride, n, z, stride);
    if (targets != nullptr)
      for (int r = 0; r < n; ++r)
        for (Index j = 0; j < columns; ++j) t[layout.at(r, j)] = targets[i + r][j];
    evaluate(layout, i, n, z, z, t);
    layout.transpose_out(z, n, gradient + i * stride, stride);
  }
}

}  // namespace

template <class T>
double row_loss(int loss, const T* logits, const Index* indices, const T* targets, double smoothing, T* gradient,
                Index rows, Index columns) {
  using Function = double (*)(const T*, const Index*, const T*, Smoothing<double>, T*, Index, Index);
#define GEMMLET_ENTRY(name) &evaluate_mean<T, row_losses::name>,
  static constexpr Function table[] = {GEMMLET_ROW_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[loss](logits, indices, targets, row_losses::label_smoothing(smoothing, columns), gradient, rows,
                     columns);
}

template <class T>
void row_loss_each(int loss, const T* logits, const Index* indices, const T* const* targets, double smoothing, T scale,
                   T* gradient, Index stride, Index rows, Index columns, double* losses) {
  using Function =
      void (*)(const T*, const Index*, const T* const*, Smoothing<double>, T, T*, Index, Index, Index, double*);
#define GEMMLET_ENTRY(name) &evaluate_each<T, row_losses::name>,
  static constexpr Function table[] = {GEMMLET_ROW_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[loss](logits, indices, targets, row_losses::label_smoothing(smoothing, columns), scale, gradient, stride, rows,
              columns, losses);
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
struct Limits {
  Vec<T> least, most;
  Vec<T> operator()(Vec<T> loss) const { return at_most(at_least(loss, least), most); }
};

template <class T>
double elementwise_loss_row(int loss, const T* prediction, const T* target, T parameter, T scale, T least, T most,
                            T* gradient, Index n) {
  using Function = double (*)(const T*, const T*, Vec<T>, Vec<T>, T*, Index, Index, const Limits<T>&);
#define GEMMLET_ENTRY(name) &evaluate_range<T, losses::name, Limits<T>>,
  static constexpr Function table[] = {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[loss](prediction, target, splat(parameter), splat(scale), gradient, 0, n, {splat(least), splat(most)});
}

std::vector<std::string> loss_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_LOSSES(GEMMLET_ENTRY)};
}

std::vector<std::string> row_loss_names() {
  return {GEMMLET_ROW_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

#define GEMMLET_INSTANTIATE(T)                                                                                  \
  template double row_loss(int, const T*, const Index*, const T*, double, T*, Index, Index);                    \
  template void row_loss_each(int, const T*, const Index*, const T* const*, double, T, T*, Index, Index, Index, \
                              double*);                                                                         \
  template double elementwise_loss(int, const T*, const T*, T, T*, Index);                                      \
  template bool within_unit_interval(const T*, Index);                                                          \
  template double elementwise_loss_row(int, const T*, const T*, T, T, T, T, T*, Index);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
