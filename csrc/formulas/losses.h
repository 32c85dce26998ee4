// Losses of one prediction and its target: each formula once, for every value type.
//
// Contract
//   V as in activations.h, with log and log1p besides.
//   evaluate(prediction, target, parameter, scale, loss, gradient): the loss per element, and its gradient times `scale`,
//   1 / n for a mean. The scale is applied before a factor of 2 could overflow.
//   Special values: a sure prediction that is correct costs 0. The reference: python/gemmlet/formulas/losses.py.
#pragma once

namespace gemmlet::losses {

// weight * value, and 0 where weight is 0, whatever value is.
template <class V>
constexpr V times(V weight, V value) {
  return select(weight == V{}, V{}, weight * value);
}

struct binary_cross_entropy_with_logits {
  template <class V>
  static constexpr void evaluate(V z, V t, V, V scale, V& loss, V& gradient) {
    const V one = constant<V>(1);
    const V e = decay(-abs(z));
    loss = times(one - t, select(z < V{}, V{}, z)) + times(t, select(z > V{}, V{}, -z)) + log1p_unit(e);
    gradient = (quotient(select(z >= V{}, one, e), one + e) - t) * scale;
  }
};

struct binary_cross_entropy {
  template <class V>
  static constexpr void evaluate(V p, V t, V, V scale, V& loss, V& gradient) {
    const V one = constant<V>(1), floor = constant<V>(-100);
    loss = -(t * at_least(log(p), floor) + (one - t) * at_least(log1p(-p), floor));
    gradient = (p - t) / at_least(p * (one - p), constant<V>(1e-12)) * scale;
  }
};

struct mean_squared_error {
  template <class V>
  static constexpr void evaluate(V p, V t, V, V scale, V& loss, V& gradient) {
    const V d = p - t;
    loss = d * d;
    gradient = d * (scale + scale);
  }
};

struct huber {
  template <class V>
  static constexpr void evaluate(V p, V t, V delta, V scale, V& loss, V& gradient) {
    const V d = p - t, size = abs(d);
    loss = select(size <= delta, constant<V>(0.5) * d * d, delta * (size - constant<V>(0.5) * delta));
    gradient = at_most(at_least(d, -delta), delta) * scale;
  }
};

struct hinge {
  template <class V>
  static constexpr void evaluate(V p, V t, V, V scale, V& loss, V& gradient) {
    const V margin = constant<V>(1) - t * p;
    loss = select(margin <= V{}, V{}, margin);
    gradient = select(margin > V{}, -t, select(margin <= V{}, V{}, margin)) * scale;
  }
};

struct wasserstein {
  template <class V>
  static constexpr void evaluate(V p, V t, V, V scale, V& loss, V& gradient) {
    loss = -(t * p);
    gradient = -t * scale;
  }
};

#define GEMMLET_LOSSES(X)             \
  X(binary_cross_entropy_with_logits) \
  X(binary_cross_entropy)             \
  X(mean_squared_error)               \
  X(huber)                            \
  X(hinge)                            \
  X(wasserstein)

}  // namespace gemmlet::losses
