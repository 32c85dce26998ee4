// A float of which 16 bits will be kept, with short forms of what formulas/math.h has.
//
// Contract
//   Included by scalar.cuh alone, behind formulas/math.h. Coarse is a float with float's arithmetic, but that divisors lie
//   within [2^-60, 2^60], or are NaN; so the formulas can be written on it as they are. (Quotients and square roots are off
//   by some ULP for all normal divisors: training's updates take them, see training/formulas.cuh.)
//   The functions take what those of math.h take, NaN, infinities and zeros of both signs included. Relative errors are
//   2^-15 at most, also of results that become subnormal bfloat16 numbers. tests/test_cuda.py tries all numbers of 16 bits
//   in all activations, with instructions that err as much as they may. Where a formula has a difference, as
//   gelu's slope near its zero, the error comes from cancellation.
// Polynomials as in math.h.
#pragma once

namespace gemmlet {

struct Coarse {
  float value = 0;

  constexpr Coarse() = default;
  GEMMLET_INLINE constexpr explicit Coarse(float x) : value(x) {}
  GEMMLET_INLINE constexpr explicit Coarse(double x) : value(static_cast<float>(x)) {}
  GEMMLET_INLINE constexpr explicit operator float() const { return value; }
};

GEMMLET_INLINE Coarse operator-(Coarse a) { return Coarse(-a.value); }
GEMMLET_INLINE Coarse operator+(Coarse a, Coarse b) { return Coarse(a.value + b.value); }
GEMMLET_INLINE Coarse operator-(Coarse a, Coarse b) { return Coarse(a.value - b.value); }
GEMMLET_INLINE Coarse operator*(Coarse a, Coarse b) { return Coarse(a.value * b.value); }
GEMMLET_INLINE Coarse operator/(Coarse a, Coarse b) { return Coarse(a.value * ptx::reciprocal(b.value)); }
GEMMLET_INLINE bool operator<(Coarse a, Coarse b) { return a.value < b.value; }
GEMMLET_INLINE bool operator>(Coarse a, Coarse b) { return a.value > b.value; }
GEMMLET_INLINE bool operator<=(Coarse a, Coarse b) { return a.value <= b.value; }
GEMMLET_INLINE bool operator>=(Coarse a, Coarse b) { return a.value >= b.value; }
GEMMLET_INLINE bool operator==(Coarse a, Coarse b) { return a.value == b.value; }
GEMMLET_INLINE bool operator!=(Coarse a, Coarse b) { return a.value != b.value; }

GEMMLET_INLINE Coarse fma(Coarse a, Coarse b, Coarse c) { return Coarse(fma(a.value, b.value, c.value)); }
GEMMLET_INLINE Coarse quotient(Coarse a, Coarse b) { return a / b; }
GEMMLET_INLINE Coarse sqrt(Coarse a) { return Coarse(ptx::square_root(a.value)); }
GEMMLET_INLINE Coarse abs(Coarse a) { return Coarse(abs(a.value)); }
GEMMLET_INLINE Coarse copysign(Coarse a, Coarse sign) { return Coarse(copysign(a.value, sign.value)); }
// An error of a product is too little to be seen, and so is half of it.
struct Nothing {};
GEMMLET_INLINE Nothing product_error(Coarse, Coarse, Coarse) { return {}; }
GEMMLET_INLINE Coarse one_less_half(Nothing) { return Coarse(1.0f); }

inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.69314718055994531f;

GEMMLET_INLINE Coarse exp(Coarse x) { return Coarse(ptx::exp2(x.value * log2_e)); }

// The exponent is raised while subnormal numbers are flushed, by as much as factors of 1e4 and half of 2^-133 need.
inline constexpr float raised_decay_times = 0x1p24f;
GEMMLET_INLINE Coarse raised_decay(Coarse x) { return Coarse(ptx::exp2_flushed(fma(x.value, log2_e, 24.0f))); }
GEMMLET_INLINE Coarse unsigned_decay_times(Coarse x, Coarse factor) {
  return raised_decay(x) * factor * Coarse(1 / raised_decay_times);
}
GEMMLET_INLINE Coarse decay_times(Coarse x, Coarse factor) { return unsigned_decay_times(x, factor); }
GEMMLET_INLINE Coarse decay(Coarse x) { return unsigned_decay_times(x, Coarse(1.0f)); }

// Below this the first terms of a power series are closer than a difference, which errs by 2^-22.
inline constexpr float series_end = 0x1p-7f;

GEMMLET_INLINE Coarse expm1(Coarse x) {
  const float series = x.value * fma(0.5f, x.value, 1.0f);
  const float difference = ptx::exp2_flushed(x.value * log2_e) - 1.0f;
  return Coarse(abs(x.value) < series_end ? series : difference);
}

GEMMLET_INLINE Coarse log1p_unit(Coarse x) {
  const float series = x.value * fma(-0.5f, x.value, 1.0f);
  return Coarse(x.value < series_end ? series : ptx::log2_flushed(1.0f + x.value) * ln_2);
}

GEMMLET_INLINE Coarse tanh(Coarse x) {
  const float a = abs(x.value);
  const float difference = fma(-2.0f, ptx::reciprocal(ptx::exp2_flushed(a * (2.0f * log2_e)) + 1.0f), 1.0f);
  return Coarse(copysign(a < series_end ? a : difference, x.value));
}

GEMMLET_INLINE Coarse scaled_normal_tail(Coarse a) {
  // (1 - Phi(a)) exp(a^2 / 2) / t where t = k / (k + a), k = 3.25, degree 5, [3.25 / 16.75; 1], beyond which the Gaussian
  // is 0: relative error 4e-6
  const Coarse t = Coarse(3.25f) / (Coarse(3.25f) + a);
  return t * polynomial(t, 0.123014487326145172119140625, 0.118583939969539642333984375, 0.13724124431610107421875,
                        5.5348728783428668975830078125e-3, 0.19140838086605072021484375, -7.57847726345062255859375e-2);
}

}  // namespace gemmlet
