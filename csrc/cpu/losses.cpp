// Losses: the mean and its gradient in one pass. Reductions in double, over chunks of a fixed size, in a fixed order.
#include <algorithm>

#include "cpu/rows.h"
#include "cpu/threads.h"
// After the functions that it is written on.
#include "formulas/losses.h"

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
[[gnu::flatten]] double evaluate_range(const T* prediction, const T* target, Vec<T> parameter, Vec<T> scale,
                                       T* gradient, Index i, Index end) {
  DoubleSum<T> total;
  for (; i < end; i += lanes<T>) {
    const int n = static_cast<int>(std::min<Index>(lanes<T>, end - i));
    Vec<T> loss, slope;
    F::evaluate(load_lanes(prediction + i, n), load_lanes(target + i, n), parameter, scale, loss, slope);
    total.add(n == lanes<T> ? loss : keep_lanes<T>(loss, 0, n));
    store_lanes(gradient + i, slope, n);
  }
  return total.total();
}

template <class T, class F>
double evaluate(const T* prediction, const T* target, T parameter, T* gradient, Index n) {
  const T scale = static_cast<T>(1.0 / static_cast<double>(n));
  const double sum = sum_chunks(n, tuning::chunk_elements, [&](Index begin, Index end) {
    return evaluate_range<T, F>(prediction, target, splat(parameter), splat(scale), gradient, begin, end);
  });
  return sum / static_cast<double>(n);
}

// For each row: -sum_j t_j log_softmax(z)_j, and softmax(z) sum_j t_j - t times `scale`, with t_j = keep * target_j +
// spread. The target is one-hot at the row's index where `target` is null. The losses of the first n rows.
template <class T, class Rows>
[[gnu::flatten]] void cross_entropy(const Rows& rows, int n, T* gradient, const T* z, const Index* indices,
                                    const T* target, double keep, double spread, T scale, double* losses) {
  using V = Vec<T>;
  const V largest = rows.largest(z), k = splat(static_cast<T>(keep)), s = splat(static_cast<T>(spread));
  double at_index[Rows::count] = {};  // the logit first, then its exponential
  if (target == nullptr)
    for (int r = 0; r < n; ++r)
      at_index[r] = static_cast<double>(z[rows.at(r, indices[r])]) - static_cast<double>(rows.number(largest, r));
  DoubleSum<T> exp_sum, target_sum, product_sum;
  const auto power = [&](int first, V v) {
    const V e = decay(v - largest);
    exp_sum.add(part<T>(e, first));
    return e;
  };
  const auto weigh = [&](int first, V v, V t) {
    target_sum.add(part<T>(t, first));
    // A class of weight 0 adds no loss, even at -inf.
    product_sum.add(part<T>(select(t == V{}, V{}, t * (v - largest)), first));
  };
  if (target != nullptr)
    rows.each([&](int first, V v, V t) { weigh(first, v, fma(k, t, s)); }, z, target);
  else if (spread != 0)
    rows.each([&](int first, V v) { weigh(first, v, s); }, z);
  rows.map(gradient, power, z);
  double total[Rows::count], log_total[Rows::count], weight[Rows::count], product[Rows::count], exp_scale[Rows::count];
  rows.totals(exp_sum, total);
  rows.totals(exp_sum, log_total);
  rows.logs(log_total);
  rows.totals(target_sum, weight);
  rows.totals(product_sum, product);
  for (int r = 0; r < Rows::count; ++r) {
    if (target == nullptr) {
      weight[r] += keep;
      if (keep != 0) product[r] += keep * at_index[r];
    }
    exp_scale[r] = weight[r] / total[r];
    if (r < n) losses[r] = weight[r] * log_total[r] - product[r];
  }
  const V factor = rows.vector(exp_scale), mean_scale = splat(scale);
  if (target != nullptr) {
    rows.map(gradient, [&](int, V e, V t) { return fma(e, factor, -fma(k, t, s)) * mean_scale; }, gradient, target);
    return;
  }
  for (int r = 0; r < n; ++r) at_index[r] = static_cast<double>(gradient[rows.at(r, indices[r])]);
  rows.map(gradient, [&](int, V e) { return fma(e, factor, -s) * mean_scale; }, gradient);
  for (int r = 0; r < n; ++r) {
    // In double: where softmax is close to 1, this difference is close to 0.
    const double difference = at_index[r] * exp_scale[r] - (keep + spread);
    gradient[rows.at(r, indices[r])] = static_cast<T>(difference * static_cast<double>(scale));
  }
}

}  // namespace

template <class T>
double softmax_cross_entropy(const T* logits, const Index* indices, const T* targets, double smoothing, T* gradient,
                             Index rows, Index columns) {
  const double spread = smoothing / static_cast<double>(columns);
  const T scale = static_cast<T>(1.0 / static_cast<double>(rows));
  const double keep = 1.0 - smoothing;
  const double sum = sum_chunks(rows, rows_per_chunk<T>(columns), [&](Index begin, Index end) {
    double total = 0, losses[lanes<T>];
    const auto add = [&](int n) {
      for (int r = 0; r < n; ++r) total += losses[r];
    };
    if (targets == nullptr)
      for_rows(
          begin, end, columns,
          [&](const auto& layout, Index i, int n, T* to, const T* z) {
            cross_entropy<T>(layout, n, to, z, indices + i, nullptr, keep, spread, scale, losses);
            add(n);
          },
          gradient, logits);
    else
      for_rows(
          begin, end, columns,
          [&](const auto& layout, Index, int n, T* to, const T* z, const T* t) {
            cross_entropy<T>(layout, n, to, z, nullptr, t, keep, spread, scale, losses);
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
void softmax_cross_entropy_rows(const T* logits, const Index* indices, const T* const* targets, double smoothing,
                                T scale, T* gradient, Index stride, Index rows, Index columns, double* losses) {
  const double keep = 1.0 - smoothing, spread = smoothing / static_cast<double>(columns);
  if (columns > tuning::across_max_columns) {
    for (Index i = 0; i < rows; ++i)
      cross_entropy<T>(Along<T>{columns}, 1, gradient + i * stride, logits + i * stride,
                       indices == nullptr ? nullptr : indices + i, targets == nullptr ? nullptr : targets[i], keep,
                       spread, scale, losses + i);
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
    cross_entropy<T>(layout, n, z, z, indices == nullptr ? nullptr : indices + i, targets == nullptr ? nullptr : t,
                     keep, spread, scale, losses + i);
    layout.transpose_out(z, n, gradient + i * stride, stride);
  }
}

template <class T>
double elementwise_loss_row(int loss, const T* prediction, const T* target, T parameter, T scale, T* gradient,
                            Index n) {
  using Function = double (*)(const T*, const T*, Vec<T>, Vec<T>, T*, Index, Index);
#define GEMMLET_ENTRY(name) &evaluate_range<T, losses::name>,
  static constexpr Function table[] = {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return table[loss](prediction, target, splat(parameter), splat(scale), gradient, 0, n);
}

std::vector<std::string> loss_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

#define GEMMLET_INSTANTIATE(T)                                                                                   \
  template double softmax_cross_entropy(const T*, const Index*, const T*, double, T*, Index, Index);             \
  template double elementwise_loss(int, const T*, const T*, T, T*, Index);                                       \
  template bool within_unit_interval(const T*, Index);                                                           \
  template void softmax_cross_entropy_rows(const T*, const Index*, const T* const*, double, T, T*, Index, Index, \
                                           Index, double*);                                                      \
  template double elementwise_loss_row(int, const T*, const T*, T, T, T*, Index);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
