// Optimizer rules: each once, for every value type.
//
// Contract
//   V as in activations.h, with sqrt besides. `h` holds the hyperparameters in the order of the rule's entry
//   in python/gemmlet/formulas/optimizers.py, which is the reference; `state` holds state_count values, zero at first.
//   apply(param, grad, state, h) changes param and state. h[l2] times the parameter is added to the gradient.
//   idle_without_gradient(h): whether apply changes nothing where the gradient is 0.
#pragma once

namespace gemmlet::optimizers {

struct sgd {
  static constexpr int state_count = 0, hyperparameter_count = 2, l2 = 1;
  static constexpr bool idle_without_gradient(const double* h) { return h[l2] == 0; }
  template <class V>
  static constexpr void apply(V& param, V grad, V*, const V* h) {
    const V lr = h[0], weight_decay = h[l2];
    param = fma(-lr, fma(weight_decay, param, grad), param);
  }
};

struct momentum {
  static constexpr int state_count = 1, hyperparameter_count = 4, l2 = 1;
  static constexpr bool idle_without_gradient(const double*) { return false; }
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
  static constexpr int state_count = 2, hyperparameter_count = 9, l2 = 7;
  static constexpr bool idle_without_gradient(const double*) { return false; }
  template <class V>
  static constexpr void apply(V& param, V grad, V* state, const V* h) {
    const V step_size = h[0], beta1 = h[1], beta2 = h[2], gain1 = h[3], gain2 = h[4];
    const V eps = h[5], correction = h[6], weight_decay = h[l2], shrink = h[8];
    const V g = fma(weight_decay, param, grad);
    state[0] = fma(beta1, state[0], gain1 * g);
    state[1] = fma(beta2, state[1], (gain2 * g) * g);  // in this order: g * g may overflow
    param = shrink * param - step_size * state[0] / fma(sqrt(state[1]), correction, eps);
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
