// exp, decay (exp of what is not above 0), expm1, log, log1p, tanh and the tail of the normal distribution, for vectors
// and scalars of float and of double.
//
// Contract
//   Whoever includes this file has declared for V (a SIMD vector: cpu/simd.h; a scalar on a GPU: cuda/scalar.cuh) the
//   types ScalarOf<V> and IntVecOf<V>, and constant, select, fma, quotient, product_error, bits, from_bits,
//   sum_shifted_right.
//   Any input, NaN, infinities and subnormals included; results that are subnormal are rounded once. Errors, in ULP,
//   from tools/sweep_float32.py (all floats) and tests/test_accuracy.py (double, against mpmath): what
//   formulas/activations.py promises. Branch-free. expm1 ends at the largest finite exp; scaled_normal_tail takes no
//   negative number; log1p_unit takes [0, 1].
// Polynomials are minimax, from Sollya: fpminimax(f, degree, [|SG...|] or [|D...|], interval, relative); the command
// is above each.
#pragma once

namespace gemmlet {

// 1 in the sign's place alone.
template <class V>
inline constexpr auto sign_bit =
    static_cast<IntOf<ScalarOf<V>>>(sizeof(ScalarOf<V>) == 4 ? 0x80000000u : 0x8000000000000000u);

template <class V>
GEMMLET_INLINE V abs(V a) {
  return from_bits<V>(bits(a) & ~sign_bit<V>);
}

template <class V>
GEMMLET_INLINE V copysign(V magnitude, V sign) {
  return from_bits<V>((bits(magnitude) & ~sign_bit<V>) | (bits(sign) & sign_bit<V>));
}

// Both keep NaN in `a`.
template <class V>
GEMMLET_INLINE V at_least(V a, V low) {
  return select(a < low, low, a);
}
template <class V>
GEMMLET_INLINE V at_most(V a, V high) {
  return select(a > high, high, a);
}

template <class V>
GEMMLET_INLINE V infinity() {
  return from_bits<V>(bits(constant<V>(0)) |
                      static_cast<IntOf<ScalarOf<V>>>(sizeof(ScalarOf<V>) == 4 ? 0x7f800000 : 0x7ff0000000000000));
}
template <class V>
GEMMLET_INLINE V not_a_number() {
  return from_bits<V>(bits(constant<V>(0)) |
                      static_cast<IntOf<ScalarOf<V>>>(sizeof(ScalarOf<V>) == 4 ? 0x7fc00000 : 0x7ff8000000000000));
}

// 1 - a / 2.
template <class V>
GEMMLET_INLINE V one_less_half(V a) {
  return fma(constant<V>(-0.5), a, constant<V>(1));
}

// Horner's rule; the coefficients from the lowest power up.
template <class V, class... Higher>
GEMMLET_INLINE V polynomial(V x, double lowest, Higher... higher) {
  if constexpr (sizeof...(higher) == 0)
    return constant<V>(lowest);
  else
    return fma(x, polynomial<V>(x, higher...), constant<V>(lowest));
}

// x = n ln 2 + r with |r| <= ln(2) / 2: expm1(r) in relative precision, and 2^(n + shift).
template <class V>
struct ExpParts {
  V expm1_r, power;
};

template <class V>
inline constexpr int exponent_bias = sizeof(ScalarOf<V>) == 4 ? 127 : 1023;
template <class V>
inline constexpr int mantissa_bits = sizeof(ScalarOf<V>) == 4 ? 23 : 52;

// Adding this leaves the nearest integer, plus the bias of a number's exponent and `shift`, in the low bits of the sum;
// moved up past the mantissa they are the power of two, and the rest is gone. (NaN gives any power; expm1_r is NaN.)
template <class V>
inline constexpr double rounding_number(int shift) {
  return (sizeof(ScalarOf<V>) == 4 ? 0x1.8p23 : 0x1.8p52) + exponent_bias<V> + shift;
}

// n + shift within the exponents of normal numbers.
template <class V>
GEMMLET_INLINE ExpParts<V> exp_parts(V x, V magic) {
  using T = ScalarOf<V>;
  constexpr bool single = sizeof(T) == 4;
  const V shifted = fma(x, constant<V>(1.4426950408889634074), magic);
  const V n = shifted - magic;
  // ln 2 in two parts, the first so short that its product with n is exact even without fma (Cody and Waite, 1980).
  V r, q;
  if constexpr (single) {
    r = fma(n, constant<V>(-0.693359375), x);
    r = fma(n, constant<V>(2.12194440e-4), r);
    // (expm1(x) - x) / x^2, degree 5, [-0.3475; 0.3475]: relative error 7e-10
    q = polynomial(r, 0.5, 0.16666667163372039794921875, 4.1666507720947265625e-2, 8.333199657499790191650390625e-3,
                   1.393091748468577861785888671875e-3, 1.995105412788689136505126953125e-4);
  } else {
    r = fma(n, constant<V>(-6.93147180369123816490e-01), x);
    r = fma(n, constant<V>(-1.90821492927058770002e-10), r);
    // (expm1(x) - x) / x^2, degree 9, [-0.3475; 0.3475]: relative error 4e-17
    q = polynomial(r, 0.50000000000000011102230246251565404236316680908203125,
                   0.1666666666666664353702032030920873874117434024810791015625,
                   4.1666666666622671766351260203009587712585926055908203125e-2,
                   8.33333333335637034544607359975998406298458576202392578125e-3,
                   1.388888891780340993642450797551646246574819087982177734375e-3,
                   1.9841269784802721860839103129592331242747604846954345703125e-4,
                   2.4801520465341379329850257651202127817668952047824859619140625e-5,
                   2.7557354694067481395481668260407427872683503665030002593994140625e-6,
                   2.7620462130001534325766574494431804254190865322016179561614990234375e-7,
                   2.5068704410706059125944319596578091502436791415675543248653411865234375e-8);
  }
  return {fma(r * r, q, r), from_bits<V>(bits(shifted) << mantissa_bits<V>)};
}

// factor * exp(x) for x <= 0, rounded to a subnormal once, with no underflow on the way. factor: at most 1e4 in size; a
// factor of -0.0 may lose its sign in the sum.
template <class V>
GEMMLET_INLINE V unsigned_decay_times(V x, V factor) {
  constexpr bool single = sizeof(ScalarOf<V>) == 4;
  constexpr int shift = single ? 64 : 256;  // so that the power is a normal number down to exp(low)
  constexpr double low = single ? -125 : -800, back = single ? 0x1p-64 : 0x1p-256;  // 1e4 exp(low) rounds to 0
  const ExpParts<V> e = exp_parts(at_least(x, constant<V>(low)), constant<V>(rounding_number<V>(shift)));
  const V scale = factor * e.power;
  return fma(scale, e.expm1_r, scale) * constant<V>(back);
}

template <class V>
GEMMLET_INLINE V decay_times(V x, V factor) {
  return copysign(unsigned_decay_times(x, factor), factor);
}

template <class V>
GEMMLET_INLINE V decay(V x) {
  return unsigned_decay_times(x, constant<V>(1));
}

template <class V>
GEMMLET_INLINE V exp(V x) {
  constexpr bool single = sizeof(ScalarOf<V>) == 4;
  constexpr int shift = single ? 64 : 256;
  constexpr double limit = single ? 125 : 800, up = single ? 0x1p64 : 0x1p256;
  // As above, and for x > 0 the same towards the largest numbers.
  const auto below = x < V{};
  const V magic = select(below, constant<V>(rounding_number<V>(shift)), constant<V>(rounding_number<V>(-shift)));
  const ExpParts<V> e = exp_parts(at_most(at_least(x, constant<V>(-limit)), constant<V>(limit)), magic);
  return fma(e.power, e.expm1_r, e.power) * select(below, constant<V>(1 / up), constant<V>(up));
}

// exp(x) - 1. x up to 88 (float), 709 (double).
template <class V>
GEMMLET_INLINE V expm1(V x) {
  constexpr double low = sizeof(ScalarOf<V>) == 4 ? -30 : -50;  // from there on the result is -1
  const ExpParts<V> e = exp_parts(at_least(x, constant<V>(low)), constant<V>(rounding_number<V>(0)));
  const V result = fma(e.power, e.expm1_r, e.power - constant<V>(1));
  return select(x == V{}, x, result);  // keeps -0.0
}

template <class V>
GEMMLET_INLINE V log(V x) {
  using T = ScalarOf<V>;
  using I = IntOf<T>;
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52;
  // Subnormal numbers are scaled up to normal ones first. (Below 0 the result is NaN, at last; the size keeps the
  // subtraction of integers from overflowing.)
  const V size = abs(x);
  const auto tiny = size < constant<V>(single ? 0x1p-126 : 0x1p-1022);
  const V scaled = select(tiny, size * constant<V>(single ? 0x1p24 : 0x1p54), size);
  // scaled = 2^n m with m within [sqrt(1/2), sqrt(2)): sqrt(1/2) in the units of the bits is taken off, and put back.
  const I root_half = single ? I(0x3f3504f3) : I(0x3fe6a09e667f3bcdLL);
  const IntVecOf<V> offset = bits(scaled) - root_half;
  const V m = from_bits<V>((offset & ((I(1) << mantissa) - 1)) + root_half);
  // n + bias, which is above 0, becomes the mantissa of a large number: AVX2 can neither shift 64 bits with their sign
  // nor convert them.
  const V large = constant<V>(single ? 0x1p23 : 0x1p52);
  const IntVecOf<V> n_biased = sum_shifted_right(offset, I(exponent_bias<V>) << mantissa, mantissa);
  const V n = (from_bits<V>(n_biased | bits(large)) - large) -
              select(tiny, constant<V>(exponent_bias<V> + (single ? 24 : 54)), constant<V>(exponent_bias<V>));
  // log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)), s = f / (2 + f) (Sun's fdlibm, e_log.c).
  const V f = m - constant<V>(1);
  const V s = quotient(f, f + constant<V>(2));
  const V z = s * s;
  // (log((1+sqrt(x))/(1-sqrt(x))) - 2 sqrt(x)) / (x sqrt(x)), degrees 3 and 6, [0; 0.0296], absolute: 1e-10, 9e-18
  V r;
  if constexpr (single)
    r = polynomial(z, 0.666666686534881591796875, 0.3999955654144287109375, 0.2858889400959014892578125,
                   0.2259767949581146240234375);
  else
    r = polynomial(z, 0.66666666666666696272613990004174411296844482421875,
                   0.399999999998971345060994053710601292550563812255859375,
                   0.28571428627369888086917626424110494554042816162109375,
                   0.22222210888726079414112746235332451760768890380859375,
                   0.1818290763894824524360416262425033127136325836181640625,
                   0.1533109717674429328670981931281858123838901519775390625,
                   0.146242173172030347311080134886651649139821529388427734375);
  const V half_square = constant<V>(0.5) * f * f;
  const V tail = fma(s, fma(z, r, half_square), n * constant<V>(single ? -2.12194440e-4 : 1.90821492927058770002e-10));
  const V result = fma(n, constant<V>(single ? 0.693359375 : 6.93147180369123816490e-01), f - (half_square - tail));
  V special = select(x == V{}, -infinity<V>(), not_a_number<V>());
  special = select(x == infinity<V>(), x, special);
  return select((x > V{}) & (x < infinity<V>()), result, special);
}

// log(1 + x), in relative precision near 0. x within [-1, inf).
template <class V>
GEMMLET_INLINE V log1p(V x) {
  const V u = constant<V>(1) + x;
  const V lost = x - (u - constant<V>(1));  // what the sum rounded away
  const V result = log(u) + select(lost == V{}, V{}, lost / u);
  return select(u == infinity<V>(), u, result);
}

// log(1 + x), likewise, for x within the unit interval [0, 1].
template <class V>
GEMMLET_INLINE V log1p_unit(V x) {
  if constexpr (sizeof(ScalarOf<V>) == 4) {
    // (log1p(x) - x) / x^2, degree 8, [0; 1], by fpminimax(log1p(x), [|2,...,10|], [|SG...|], [0; 1], relative, x): 5e-9
    const V q = polynomial(x, -0.4999993145465850830078125, 0.3333047926425933837890625, -0.24958293139934539794921875,
                           0.196940243244171142578125, -0.15351717174053192138671875, 0.1067469418048858642578125,
                           -5.760939419269561767578125e-2, 2.017644606530666351318359375e-2,
                           -3.31243476830422878265380859375e-3);
    return fma(x * x, q, x);
  } else {
    return log1p(x);
  }
}

// An odd polynomial below 0.35, where the quotient's three roundings are too many; else e / (e + 2), e = expm1(2|x|).
template <class V>
GEMMLET_INLINE V tanh(V x) {
  constexpr bool single = sizeof(ScalarOf<V>) == 4;
  constexpr double saturation = single ? 20 : 44;  // of 2|x|: the quotient rounds to 1
  const V a = abs(x);
  const V e = expm1(at_most(a + a, constant<V>(saturation)));
  const V z = a * a;
  // (tanh(sqrt(x)) / sqrt(x) - 1) / x, degrees 3 and 8, [0; 0.1226], absolute: errors 2e-9, 4e-19 of tanh(x) / x
  V p;
  if constexpr (single)
    p = polynomial(z, -0.333333313465118408203125, 0.13332928717136383056640625, -5.381052196025848388671875e-2,
                   1.981321536004543304443359375e-2);
  else
    p = polynomial(z, -0.333333333333333314829616256247390992939472198486328125,
                   0.133333333333322701097500839750864543020725250244140625,
                   -5.3968253966536559873556910815750597976148128509521484375e-2,
                   2.18694884133326487851700647979669156484305858612060546875e-2,
                   -8.86323085133817155367719209380084066651761531829833984375e-3,
                   3.5920244391885610378556403787797535187564790248870849609375e-3,
                   -1.4544549452122530752706808243601699359714984893798828125e-3,
                   5.790926388751726351182346768467823494574986398220062255859375e-4,
                   -1.9093008996974448056131723472361727544921450316905975341796875e-4);
  const V result = select(a < constant<V>(0.35), fma(a, z * p, a), quotient(e, e + constant<V>(2)));
  return copysign(result, x);
}

// 0.5 erfcx(a / sqrt(2)) = (1 - Phi(a)) exp(a^2 / 2): the tail of the normal distribution without its Gaussian.
// a within [0, 60]. A polynomial in u = 2t - 1, t = k / (k + a), times t: tools/fit_normal_tail.py; relative errors
// 1.3e-8 on [0, 14.5] (float), 1.2e-17 on [0, 39] (double); beyond, the Gaussian is 0.
template <class V>
GEMMLET_INLINE V scaled_normal_tail(V a) {
  constexpr bool single = sizeof(ScalarOf<V>) == 4;
  const V k = constant<V>(single ? 4 : 5);
  const V t = quotient(k, k + a);
  const V u = t + t - constant<V>(1);
  if constexpr (single)
    return t * polynomial(u, 0.188821284627592637, 0.151974151518452288, 0.0967841699486766563, 0.0466307514743469125,
                          0.0151016174370759103, 0.00188180322791996365, -0.000880893514087976451,
                          -0.000392328411273061587, 0.0000487004627856163606, 0.0000307457892513165205);
  else
    return t * polynomial(u, 0.153838609950012592, 0.13307650057801134, 0.0990611231939952827, 0.0627066313342609089,
                          0.0330040732340769436, 0.0138237277412620327, 0.00415901335997663593, 0.000598675354101708488,
                          -0.000159573879693214021, -0.000108979812954625979, -0.0000118751456019831727,
                          9.95256285411716103e-6, 3.33624274840841229e-6, -7.96180431573608224e-7,
                          -5.53853419199486049e-7, 6.73230736202494234e-8, 8.66282071372516991e-8,
                          -8.45499874801306968e-9, -1.31884433249544461e-8, 1.86271219886521183e-9,
                          1.53261436015200821e-9, -3.50609680281646396e-10, -3.17549376549467308e-11);
}

}  // namespace gemmlet
