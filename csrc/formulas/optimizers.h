// Optimizer rules: each once, for every value type.
//
// Contract
//   V as in activations.h, with sqrt besides. `h` holds the hyperparameters in the order of the rule's entry
//   in python/gemmlet/formulas/optimizers.py, which is the reference; `state` holds state_count values, zero at first.
//   apply(param, grad, state, h) changes param and state. h[l2] times the parameter is added to the gradient.
//   idle_without_gradient(h): whether apply changes nothing where the gradient is 0.
//   without_decay(h) makes h that of parameters which do not decay.
#pragma once

namespace gemmlet::optimizers {

struct sgd {
  static constexpr int state_count = 0, hyperparameter_count = 2, l2 = 1;
  static constexpr bool idle_without_gradient(const double* h) { return h[l2] == 0; }
  template <class N>
  static constexpr void without_decay(N* h) {
    h[l2] = 0;
  }
  template <class V>
  static constexpr void apply(V& param, V grad, V*, const V* h) {
    const V lr = h[0], weight_decay = h[l2];
    param = fma(-lr, fma(weight_decay, param, grad), param);
  }
};

struct momentum {
  static constexpr int state_count = 1, hyperparameter_count = 4, l2 = 1;
  static constexpr bool idle_without_gradient(const double*) { return false; }
  template <class N>
  static constexpr void without_decay(N* h) {
    h[l2] = 0;
  }
  template <class V>
  static constexpr void apply(V& param, V grad, V* state, const V* h) {
    const V lr = h[0], weight_decay = h[l2], mu = h[2], nesterov = h[3];
    const V g = fma(weight_decay, param, grad);
    state[0] = fma(mu, state[0], g);
    const V step = select(nesterov != V{}, fma(mu, state[0], g), state[0]);
    param = fma(-lr, step, param);
  }
};

struct adam {
  static constexpr int state_count = 2, hyperparameter_count = 9, l2 = 7, shrink = 8;
  static constexpr bool idle_without_gradient(const double*) { return false; }
  template <class N>
  static constexpr void without_decay(N* h) {
    h[l2] = 0;
    h[shrink] = 1;
  }
  template <class V>
  static constexpr void apply(V& param, V grad, V* state, const V* h) {
    const V step_size = h[0], beta1 = h[1], beta2 = h[2], gain1 = h[3], gain2 = h[4];
    const V eps = h[5], correction = h[6], weight_decay = h[l2];
    const V g = fma(weight_decay, param, grad);
    state[0] = fma(beta1, state[0], gain1 * g);
    state[1] = fma(beta2, state[1], (gain2 * g) * g);  // in this order: g * g may overflow
    param = h[shrink] * param - step_size * state[0] / fma(sqrt(state[1]), correction, eps);
  }
};

// Limits a gradient to [-limit, limit]; NaN stays NaN.
template <class V>
constexpr V clipped(V grad, V limit) {
  return select(grad < -limit, -limit, select(grad > limit, limit, grad));
}

// A rule whose gradient first gets that of the penalty l2 / 2 * param^2 + l1 * |param|, and then is clipped; these three
// follow the rule's own hyperparameters.
template <class Rule>
struct adjusted : Rule {
  static constexpr int l2_of_penalty = Rule::hyperparameter_count, l1 = l2_of_penalty + 1, limit = l1 + 1;
  static constexpr int hyperparameter_count = limit + 1;
  static constexpr bool idle_without_gradient(const double* h) {
    return Rule::idle_without_gradient(h) && h[l2_of_penalty] == 0 && h[l1] == 0;
  }
  template <class V>
  static constexpr void apply(V& param, V grad, V* state, const V* h) {
    const V slope = select(param > V{}, h[l1], select(param < V{}, -h[l1], V{}));
    Rule::apply(param, clipped(fma(h[l2_of_penalty], param, grad) + slope, h[limit]), state, h);
  }
};

// Exponential moving average; gain = 1 - decay.
template <class V>
constexpr V moving_average(V average, V value, V decay, V gain) {
  return decay * average + gain * value;
}

#define GEMMLET_OPTIMIZER_RULES(X) \
  X(sgd)                           \
  X(momentum)                      \
  X(adam)

}  // namespace gemmlet::optimizers
