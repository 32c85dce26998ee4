// Functions of rows and losses of rows: each formula once, for every kind of row.
//
// Contract
//   A row `r` holds the numbers of one sample, x or the logits z; on a CPU, also of several samples side by side. A
//   second operand is y for grad_y, the targets t for z. V is its value type, as in activations.h; a statistic is one
//   number for each sample. How a row is loaded, reduced and stored belongs to the device: cpu/rows.h, cuda/rows.cuh.
//     r.largest()              max_j z_j, as V; NaN is passed over
//     r.terms()                {largest, total}: replaces each z_j by its term exp(z_j - largest); total is their sum
//     r.term_sum()             the same, but every z_j stays
//     r.transform<n>(f)        replaces each z_j by f(z_j[, second_j], summand), which sets summand[0 ... n - 1]; of[i]
//                              is the sum of summand[i], a statistic
//     r.transformed(v, f)      f(z_j) for the v that map passes after transform(f), which some rows put off until here
//     r.sum(), r.dot()         statistics: sum_j z_j and sum_j z_j second_j
//     r.map(f)                 the result at j is f(z_j[, second_j])
//     r.term(v), r.exp(v)      exp(v): as a term, v <= 0; as a result
//     r.log(total)             a statistic, of a sum of terms
//     r.vector(s)              a statistic as V; r.divisor(s): as what a V is divided by
//   F::forward(r): from x to y. F::backward(r): from grad_y and y to grad_x.
//   L::of_targets(r, scale): from z and t to the gradient times `scale`; returns the loss, a statistic.
//   Special values: a row that holds NaN or +inf, or only -inf, gives NaN. The reference: python/gemmlet/formulas/losses.py.
// To add one: a struct here, its name in GEMMLET_ROW_FUNCTIONS or GEMMLET_ROW_LOSSES, and its entry in Python.
#pragma once

#include "formulas/losses.h"

namespace gemmlet::row_functions {

struct softmax {
  template <class R>
  GEMMLET_INLINE static void forward(R r) {
    const auto of_row = r.terms();
    const auto total = r.divisor(of_row.total);
    const auto term = [=](auto x) GEMMLET_INLINE_LAMBDA { return R::term(x - of_row.largest); };
    r.map([=](auto v) GEMMLET_INLINE_LAMBDA { return R::transformed(v, term) / total; });
  }
  template <class R>
  GEMMLET_INLINE static void backward(R r) {
    const auto dot = r.vector(r.dot());
    r.map([=](auto grad_y, auto y) GEMMLET_INLINE_LAMBDA { return y * (grad_y - dot); });
  }
};

struct log_softmax {
  template <class R>
  GEMMLET_INLINE static void forward(R r) {
    const auto of_row = r.term_sum();
    const auto log_total = r.vector(r.log(of_row.total));
    r.map([=](auto x) GEMMLET_INLINE_LAMBDA { return (x - of_row.largest) - log_total; });
  }
  template <class R>
  GEMMLET_INLINE static void backward(R r) {
    const auto total = r.vector(r.sum());
    r.map([=](auto grad_y, auto y) GEMMLET_INLINE_LAMBDA { return fma(-R::exp(y), total, grad_y); });
  }
};

#define GEMMLET_ROW_FUNCTIONS(X) \
  X(softmax)                     \
  X(log_softmax)

}  // namespace gemmlet::row_functions

namespace gemmlet::row_losses {

// Label smoothing of targets.
template <class V>
struct Smoothing {
  V keep, spread;

  GEMMLET_INLINE V of_target(V t) const { return fma(keep, t, spread); }
  // Where the target is 1 for a label and 0 for the other classes.
  GEMMLET_INLINE V of_class(bool is_label) const { return is_label ? keep + spread : spread; }
};

GEMMLET_INLINE Smoothing<double> label_smoothing(double smoothing, double classes) {
  return {1.0 - smoothing, smoothing / classes};
}

// loss = -sum_j t_j log_softmax(z)_j, gradient = softmax(z) sum_j t_j - t
struct softmax_cross_entropy {
  template <class R, class V>
  GEMMLET_INLINE static auto of_targets(R r, V scale) {
    const V largest = r.largest();
    const auto term = [=](V z) GEMMLET_INLINE_LAMBDA { return R::term(z - largest); };
    const auto sums = r.template transform<3>([=](V z, V t, V* summand) GEMMLET_INLINE_LAMBDA {
      weigh(z - largest, t, summand + 1);
      return *summand = term(z);
    });
    const V factor = r.vector(sums.of[1] / sums.of[0]);
    r.map([=](V v, V t) GEMMLET_INLINE_LAMBDA { return fma(R::transformed(v, term), factor, -t) * scale; });
    return sums.of[1] * r.log(sums.of[0]) - sums.of[2];
  }

  // Where the target is that of a label, in two shorter forms. The gradient at a label whose softmax is close to 1 is a
  // difference that V does not hold.
  static constexpr bool has_label_form = true;

  // For a row that gives and takes the number at its label as a statistic (at_label, set_label), in double. Smoothing has
  // a pass of its own (sums): with the terms' it would need more registers than there are.
  template <class R, class V>
  GEMMLET_INLINE static auto of_label(R r, Smoothing<double> smoothing, V scale) {
    const double keep = smoothing.keep, spread = smoothing.spread;
    const V t = constant<V>(spread), largest = r.largest();
    const auto difference = r.at_label() - r.statistic(largest);
    typename R::template Sums<2> spread_sums;
    if (spread != 0)
      spread_sums = r.template sums<2>([=](V z, V* summand) GEMMLET_INLINE_LAMBDA { weigh(z - largest, t, summand); });
    const auto total = r.template transform<1>([=](V z, V* summand) GEMMLET_INLINE_LAMBDA {
                          return *summand = R::term(z - largest);
                        }).of[0];
    const auto weight = spread_sums.of[0] + keep;
    const auto product = keep != 0 ? spread_sums.of[1] + keep * difference : spread_sums.of[1];
    const auto factor = weight / total;
    const auto at_label = (r.at_label() * factor - smoothing.of_class(true)) * r.statistic(scale);
    r.map([=, f = r.vector(factor)](V v) GEMMLET_INLINE_LAMBDA { return fma(v, f, -t) * scale; });
    r.set_label(at_label);
    return weight * r.log(total) - product;
  }

  // For a row that has -inf at its label, whose logit is z_label, without smoothing: the label's gradient is what the others
  // sum up to.
  template <class R>
  struct OfLabel {
    using V = typename R::V;
    V total, difference, largest, factor;
    V at_label;  // the gradient there

    GEMMLET_INLINE OfLabel(R& r, V z_label, V scale) {
      const auto others = r.terms(z_label);
      largest = others.largest;
      difference = z_label - largest;
      const V all = others.total + R::term(difference);
      total = R::lowered(all);
      factor = R::quotient(scale, all);
      at_label = -others.total * factor;
    }
    GEMMLET_INLINE V loss() const { return log(total) - difference; }
    // The gradient at another class, of what map gives as v.
    GEMMLET_INLINE V of_other(V v) const {
      const V most = largest;
      return R::transformed(v, [=](V z) GEMMLET_INLINE_LAMBDA { return R::term(z - most); }) * factor;
    }
  };

 private:
  template <class V>
  GEMMLET_INLINE static void weigh(V shifted, V t, V* summand) {
    summand[0] = t;
    summand[1] = losses::times(t, shifted);  // a class of no weight costs nothing, even at -inf
  }
};

#define GEMMLET_ROW_LOSSES(X) X(softmax_cross_entropy)

}  // namespace gemmlet::row_losses
