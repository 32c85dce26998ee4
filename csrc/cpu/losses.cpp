// Losses: the mean and its gradient in one pass. Sums in double, over chunks of a fixed size, in a fixed order.
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

template <class T, class F>
double evaluate(const T* prediction, const T* target, T parameter, T* gradient, Index n) {
  using V = Vec<T>;
  const V p = splat<T>(parameter), share = splat<T>(static_cast<T>(1.0 / static_cast<double>(n)));
  const double sum = sum_chunks(n, chunk_elements, [&](Index begin, Index end) {
    DoubleSum<T> total;
    for_lanes<T>(end - begin, [&](Index j, int lane_count) {
      const Index i = begin + j;
      V loss, grad;
      F::evaluate(load_lanes(prediction + i, lane_count), load_lanes(target + i, lane_count), p, share, loss, grad);
      total.add(loss, lane_count);
      store_lanes(gradient + i, grad, lane_count);
    });
    return total.total();
  });
  return sum / static_cast<double>(n);
}

// One row: -sum_j t_j log_softmax(z)_j, and softmax(z) sum_j t_j - t times `share`, with t_j = keep * target_j +
// spread. The target is one-hot at `index` where `target` is null.
template <class T>
double cross_entropy_row(const T* z, Index index, const T* target, double keep, double spread, T share, T* gradient,
                         Index columns) {
  using V = Vec<T>;
  const V largest = splat<T>(row_max(z, columns)), k = splat<T>(static_cast<T>(keep)),
          s = splat<T>(static_cast<T>(spread));
  const double logit_at_index =
      target == nullptr ? static_cast<double>(z[index]) - static_cast<double>(largest[0]) : 0.0;
  DoubleSum<T> exp_sum, target_sum, product_sum;
  for_lanes<T>(columns, [&](Index j, int n) {
    const V shifted = load_lanes(z + j, n) - largest;
    const V e = decay(shifted);
    exp_sum.add(e, n);
    if (target != nullptr || spread != 0) {
      const V t = target == nullptr ? s : fma(k, load_lanes(target + j, n), s);
      target_sum.add(t, n);
      product_sum.add(select(t == V{}, V{}, t * shifted), n);  // a class of no weight costs nothing, even at -inf
    }
    store_lanes(gradient + j, e, n);
  });
  const double total = exp_sum.total(), log_total = std::log(total);
  double weight = target_sum.total(), product = product_sum.total();
  if (target == nullptr) {
    weight += keep;
    if (keep != 0) product += keep * logit_at_index;
  }
  const V scale = splat<T>(static_cast<T>(weight / total));
  const double exp_at_index = target == nullptr ? static_cast<double>(gradient[index]) : 0.0;
  for_lanes<T>(columns, [&](Index j, int n) {
    const V t = target == nullptr ? s : fma(k, load_lanes(target + j, n), s);
    store_lanes(gradient + j, fma(load_lanes(gradient + j, n), scale, -t) * share, n);
  });
  if (target == nullptr) {
    // In double: close to 0, where softmax is close to 1, this difference is all there is.
    const double difference = exp_at_index * (weight / total) - (keep + spread);
    gradient[index] = static_cast<T>(difference * static_cast<double>(share));
  }
  return weight * log_total - product;
}

}  // namespace

template <class T>
double softmax_cross_entropy(const T* logits, const Index* indices, const T* targets, double smoothing, T* gradient,
                             Index rows, Index columns) {
  const double spread = smoothing / static_cast<double>(columns);
  const T share = static_cast<T>(1.0 / static_cast<double>(rows));
  const double sum = sum_chunks(rows, chunk_elements / columns + 1, [&](Index begin, Index end) {
    double total = 0;
    for (Index i = begin; i < end; ++i)
      total +=
          cross_entropy_row(logits + i * columns, indices ? indices[i] : 0, targets ? targets + i * columns : nullptr,
                            1.0 - smoothing, spread, share, gradient + i * columns, columns);
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

std::vector<std::string> loss_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_LOSSES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

#define GEMMLET_INSTANTIATE(T)                                                                       \
  template double softmax_cross_entropy(const T*, const Index*, const T*, double, T*, Index, Index); \
  template double elementwise_loss(int, const T*, const T*, T, T*, Index);                           \
  template bool within_unit_interval(const T*, Index);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
