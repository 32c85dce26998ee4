// Activations: each formula once, for every value type.
//
// Contract
//   V is a value type with arithmetic and comparisons: a SIMD vector (cpu/simd.h), or a scalar on a GPU. Whoever
//   includes this file has declared for V: constant<V>(c), select, abs, copysign, at_least, at_most, fma, quotient,
//   product_error, one_less_half, exp, decay, decay_times, unsigned_decay_times, expm1, log1p_unit, tanh,
//   scaled_normal_tail.
//   forward(x, parameter) -> y
//   backward(grad_y, saved, parameter) -> grad_x; saved is x where needs_x, else y. With needs_sign_alone it may be y times
//   anything positive, and where grad_y is 0 also 0.
//   Special values: NaN propagates; where the formula would give inf * 0, the limit. The reference, and how accurate
//   each must be: python/gemmlet/formulas/activations.py.
// To add one: a struct here, its name in GEMMLET_ACTIVATIONS, and its entry in Python.
#pragma once

namespace gemmlet::activations {

struct identity {
  static constexpr bool needs_x = false;
  template <class V>
  static constexpr V forward(V x, V) {
    return x;
  }
  template <class V>
  static constexpr V backward(V grad_y, V, V) {
    return grad_y;
  }
};

struct relu {
  static constexpr bool needs_x = false, needs_sign_alone = true;
  template <class V>
  static constexpr V forward(V x, V) {
    return select(x <= V{}, V{}, x);
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V) {
    return select(y > V{}, grad_y, V{} * y);
  }
};

struct leaky_relu {
  static constexpr bool needs_x = false, needs_sign_alone = true;
  template <class V>
  static constexpr V forward(V x, V slope) {
    return select(x > V{}, x, slope * x);
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V slope) {
    return grad_y * select(y > V{}, constant<V>(1), select(y <= V{}, slope, y));
  }
};

struct elu {
  static constexpr bool needs_x = false;
  template <class V>
  static constexpr V forward(V x, V alpha) {
    return select(x > V{}, x, alpha * expm1(at_most(x, V{})));
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V alpha) {
    return grad_y * select(y > V{}, constant<V>(1), y + alpha);
  }
};

// exp(-a^2 / 2) = exp(exponent) * factor, a^2 taken exactly: its rounding error would be multiplied by the exponent.
template <class V>
struct Gaussian {
  V exponent, factor;
  constexpr explicit Gaussian(V a) {
    const V square = a * a;
    exponent = constant<V>(-0.5) * square;
    factor = one_less_half(product_error(a, a, square));
  }
};

struct gelu {
  static constexpr bool needs_x = true;
  // x Phi(x) = max(x, 0) - |x| (1 - Phi(|x|))
  template <class V>
  static constexpr V forward(V x, V) {
    const V a = at_most(abs(x), constant<V>(60));
    const Gaussian<V> g(a);
    // A factor of -0.0 keeps its sign, as the exponent is 0 then.
    const V below = unsigned_decay_times(g.exponent, -a * g.factor * scaled_normal_tail(a));
    return select(x < V{}, below, x + below);
  }
  // Phi(x) + x phi(x)
  template <class V>
  static constexpr V backward(V grad_y, V x, V) {
    const V a = at_most(abs(x), constant<V>(60));
    const Gaussian<V> g(a);
    const V e = unsigned_decay_times(g.exponent, g.factor);
    const V tail = e * scaled_normal_tail(a);
    const V slope = copysign(a, x) * (e * constant<V>(0.398942280401432677940));  // 1 / sqrt(2 pi)
    return grad_y * (select(x < V{}, tail, constant<V>(1) - tail) + slope);
  }
};

// sigmoid(w) and sigmoid(-w), neither from a difference.
template <class V>
struct SigmoidPair {
  V of_w, of_minus_w;
  constexpr explicit SigmoidPair(V w) {
    const V t = decay(-abs(w));
    const V larger = quotient(constant<V>(1), constant<V>(1) + t), smaller = t * larger;
    of_w = select(w >= V{}, larger, smaller);
    of_minus_w = select(w >= V{}, smaller, larger);
  }
};

// x sigmoid(w), where w has the sign of x. Where sigmoid(w) is 0, so is the product.
template <class V>
constexpr V times_sigmoid(V x, V w) {
  const V minus_size = -abs(w);
  const V quotient = at_least(x, constant<V>(-1e4)) / (constant<V>(1) + decay(minus_size));
  return select(w >= V{}, quotient, decay_times(minus_size, quotient));
}

// Keeps products with an exponential that has vanished finite.
template <class V>
constexpr V finite(V x) {
  return at_most(at_least(x, constant<V>(-1e4)), constant<V>(1e4));
}

struct gelu_tanh {
  static constexpr bool needs_x = true;
  static constexpr double two_root = 1.59576912160573071176, cubic = 0.044715;  // 2 sqrt(2 / pi)
  // (1 + tanh(u)) / 2 = sigmoid(2 u)
  template <class V>
  static constexpr V forward(V x, V) {
    const V w = constant<V>(two_root) * x * fma(constant<V>(cubic) * x, x, constant<V>(1));
    return times_sigmoid(x, w);
  }
  template <class V>
  static constexpr V backward(V grad_y, V x, V) {
    const V xf = finite(x);
    const V square = constant<V>(cubic) * xf * xf;
    const SigmoidPair<V> s(constant<V>(two_root) * xf * (constant<V>(1) + square));
    const V slope = constant<V>(two_root) * fma(constant<V>(3), square, constant<V>(1));
    return grad_y * (s.of_w * fma(xf * slope, s.of_minus_w, constant<V>(1)));
  }
};

struct silu {
  static constexpr bool needs_x = true;
  template <class V>
  static constexpr V forward(V x, V) {
    return times_sigmoid(x, x);
  }
  template <class V>
  static constexpr V backward(V grad_y, V x, V) {
    const SigmoidPair<V> s(x);
    return grad_y * (s.of_w * fma(finite(x), s.of_minus_w, constant<V>(1)));
  }
};

struct softplus {
  static constexpr bool needs_x = false;
  template <class V>
  static constexpr V forward(V x, V) {
    return select(x > V{}, x, V{}) + log1p_unit(decay(-abs(x)));
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V) {
    return grad_y * -expm1(-y);
  }
};

struct tanh {
  static constexpr bool needs_x = false;
  template <class V>
  static constexpr V forward(V x, V) {
    return gemmlet::tanh(x);
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V) {
    return grad_y * ((constant<V>(1) - y) * (constant<V>(1) + y));
  }
};

struct sigmoid {
  static constexpr bool needs_x = false;
  template <class V>
  static constexpr V forward(V x, V) {
    const V t = decay(-abs(x));
    return quotient(select(x >= V{}, constant<V>(1), t), constant<V>(1) + t);
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V) {
    return grad_y * (y * (constant<V>(1) - y));
  }
};

struct exp {
  static constexpr bool needs_x = false;
  template <class V>
  static constexpr V forward(V x, V) {
    return gemmlet::exp(x);
  }
  template <class V>
  static constexpr V backward(V grad_y, V y, V) {
    return grad_y * y;
  }
};

// The list. Its order is of no meaning outside one build.
#define GEMMLET_ACTIVATIONS(X) \
  X(identity)                  \
  X(relu)                      \
  X(leaky_relu)                \
  X(elu)                       \
  X(gelu)                      \
  X(gelu_tanh)                 \
  X(silu)                      \
  X(softplus)                  \
  X(tanh)                      \
  X(sigmoid)                   \
  X(exp)

}  // namespace gemmlet::activations
