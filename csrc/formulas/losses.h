// Losses of one prediction and its target: each formula once, for every value type.
//
// Contract
//   V as in activations.h, with log and log1p besides.
//   evaluate(prediction, target, parameter, share, loss, gradient): the loss per element; the gradient of the mean,
//   which is `share` = 1 / n of the element's, so that a product in between does not overflow before its share is
//   taken.
//   Special values: a sure prediction that is right costs 0. The reference: python/gemmlet/formulas/losses.py.
#pragma once

namespace gemmlet::losses {

// weight * value, and 0 where weight is 0, whatever value is.
template <class V>
constexpr V times(V weight, V value) {
  return select(weight == V{}, V{}, weight * value);
}

struct binary_cross_entropy_with_logits {
  template <class V>
  static constexpr void evaluate(V z, V t, V, V share, V& loss, V& gradient) {
    const V one = constant<V>(1);
    const V e = decay(-abs(z));
    loss = times(one - t, select(z < V{}, V{}, z)) + times(t, select(z > V{}, V{}, -z)) + log1p_of_share(e);
    gradient = (quotient(select(z >= V{}, one, e), one + e) - t) * share;
  }
};

struct binary_cross_entropy {
  template <class V>
  static constexpr void evaluate(V p, V t, V, V share, V& loss, V& gradient) {
    const V one = constant<V>(1), floor = constant<V>(-100);
    loss = -(t * at_least(log(p), floor) + (one - t) * at_least(log1p(-p), floor));
    gradient = (p - t) / at_least(p * (one - p), constant<V>(1e-12)) * share;
  }
};

struct mean_squared_error {
  template <class V>
  static constexpr void evaluate(V p, V t, V, V share, V& loss, V& gradient) {
    const V d = p - t;
    loss = d * d;
    gradient = d * (share + share);
  }
};

struct huber {
  template <class V>
  static constexpr void evaluate(V p, V t, V delta, V share, V& loss, V& gradient) {
    const V d = p - t, size = abs(d);
    loss = select(size <= delta, constant<V>(0.5) * d * d, delta * (size - constant<V>(0.5) * delta));
    gradient = at_most(at_least(d, -delta), delta) * share;
  }
};

#define GEMMLET_LOSSES(X)             \
  X(binary_cross_entropy_with_logits) \
  X(binary_cross_entropy)             \
  X(mean_squared_error)               \
  X(huber)

}  // namespace gemmlet::losses
