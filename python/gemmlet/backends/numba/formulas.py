"""Scalar kernels for the registry's formulas, written so that LLVM turns loops over them into SIMD code.

Without Intel's SVML Numba calls the C library for each exp or tanh. So the functions below are polynomials without a
branch: both sides are computed and one is selected. Sums of products are marked as contractible in the few places where
a fused multiply-add may help; everything else is rounded as written. Accuracy: as the registry demands, see
``formulas/activations.py``. float32 is computed in float32, except where its bound asks for more.

``scalar_kernels(dtype)`` returns the functions under the registry's names: ``tanh(x, parameter)``,
``tanh_backward(grad_y, saved, parameter)``, a loss ``huber(prediction, target, parameter, scale) -> (loss in float64,
gradient)``, an optimizer rule ``adam(param, grad, *state, *hyperparameters) -> (param, *state)``. `parameter`, `scale`
and the hyperparameters are float64. An entry without one is computed by the reference.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# What LLVM can do and Python cannot say. All work on float32 and float64.


def _bits(value: Any) -> tuple[Any, int, int]:
    """The integer type as wide as a float, the number of its mantissa bits and the bias of its exponent."""
    return (ir.IntType(32), 23, 127) if value.type == ir.FloatType() else (ir.IntType(64), 52, 1023)


@intrinsic
def select(typing_context, condition, a, b):
    """``a if condition else b``, without a branch."""
    return a(condition, a, a), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def muladd(typing_context, a, b, c):
    """``a * b + c``, with one rounding where the processor can."""

    def generate(context, builder, signature, args):
        product = builder.fmul(args[0], args[1], flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return a(a, a, a), generate


@intrinsic
def copysign(typing_context, size, sign):
    """`size`, which is not negative, with the sign of `sign`."""

    def generate(context, builder, signature, args):
        integer, _, _ = _bits(args[0])
        top = ir.Constant(integer, 1 << (integer.width - 1))
        negative = builder.and_(builder.bitcast(args[1], integer), top)
        return builder.bitcast(builder.or_(builder.bitcast(args[0], integer), negative), args[0].type)

    return size(size, size), generate


@intrinsic
def square_root(typing_context, x):
    """The square root, as an instruction."""

    def generate(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [args[0].type]), args)

    return x(x), generate


@intrinsic
def power_of_two(typing_context, n):
    """``2**n`` for a whole number `n` that the exponent of a normal number can hold.

    Added to 1.5 * 2**mantissa, a whole number stands in the lowest bits; from there it is shifted into the exponent.
    """

    def generate(context, builder, signature, args):
        integer, mantissa, bias = _bits(args[0])
        shifted = builder.fadd(args[0], ir.Constant(args[0].type, 1.5 * 2.0**mantissa + bias))
        bits = builder.shl(builder.bitcast(shifted, integer), ir.Constant(integer, mantissa))
        return builder.bitcast(bits, args[0].type)

    return n(n), generate


@intrinsic
def mantissa_and_exponent(typing_context, x):
    """``(m, k)`` with ``x = m * 2**k`` and m within [sqrt(1/2), sqrt(2)), for a positive normal number."""

    def generate(context, builder, signature, args):
        integer, mantissa, _ = _bits(args[0])
        root = 0x3F3504F3 if mantissa == 23 else 0x3FE6A09E667F3BCD
        bits = builder.bitcast(args[0], integer)
        above = builder.sub(bits, ir.Constant(integer, root))
        power = builder.and_(above, ir.Constant(integer, -1 << mantissa))
        m = builder.bitcast(builder.sub(bits, power), args[0].type)
        # By way of 32 bits, which every SIMD set can shift and convert.
        high = above if mantissa == 23 else builder.trunc(builder.lshr(above, ir.Constant(integer, 32)), ir.IntType(32))
        exponent = builder.ashr(high, ir.Constant(ir.IntType(32), mantissa % 32))
        return context.make_tuple(builder, signature.return_type, (m, builder.sitofp(exponent, args[0].type)))

    return types.UniTuple(x, 2)(x), generate


def polynomial(*coefficients: float) -> Callable[..., Any]:
    """A function that evaluates ``sum_i coefficients[i] * x**i`` by Horner's rule."""

    @intrinsic
    def evaluate(typing_context, x):
        def generate(context, builder, signature, args):
            total = ir.Constant(args[0].type, coefficients[-1])
            for coefficient in reversed(coefficients[:-1]):
                product = builder.fmul(total, args[0], flags=("contract",))
                total = builder.fadd(product, ir.Constant(args[0].type, coefficient), flags=("contract",))
            return total

        return x(x), generate

    return evaluate  # type: ignore[no-any-return]


_inline = njit(error_model="numpy", forceinline=True)

# Polynomials. exp: ``(exp(r) - 1 - r) / r**2`` on abs(r) <= log(2) / 2, minimax, by Sollya's fpminimax (error 2e-17,
# and 3e-10 in float32). tanh: ``(tanh(x) / x - 1) / x**2`` in z = x**2 up to 0.625, interpolated in Chebyshev's points
# (1e-17, 5e-9). log: fdlibm's e_log.c, and musl's logf.c.

_EXP = {
    "float32": (0.5, 0.16666667163372040, 0.041666511446237564, 0.008333177305757999, 0.0013930501881986856,
                0.00019972327572759241),
    "float64": (0.5, 0.16666666666666674, 0.041666666666623164, 0.008333333333322580, 0.0013888888917497598,
                0.00019841269885653984, 2.4801520986491404e-05, 2.7557243266768955e-06, 2.7620200807272093e-07,
                2.5109731579309406e-08),
}  # fmt: skip
_TANH = {
    "float32": (-0.333333331712397, 0.13333303420387607, -0.05395922726196833, 0.021768655803763217,
                -0.008343085218832483, 0.002291770456256263),
    "float64": (-0.3333333333333333, 0.1333333333333304, -0.05396825396789371, 0.02186948851886792,
                -0.008863235100174033, 0.0035921217122266407, -0.0014557751050964238, 0.0005896591083635056,
                -0.00023758563980884253, 9.256112886604006e-05, -3.118977434431334e-05, 6.479652583909459e-06),
}  # fmt: skip
_LOG = {
    "float32": (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
    "float64": (6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
                1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01),
}  # fmt: skip
# ``(1 + a) * Phi(-a) * exp(a**2 / 2)`` in t = (a - 5) / (a + 5), for a within [0, 38.7]: interpolated in Chebyshev's
# points (1e-17), after Shepherd and Laframboise, 1981.
_NORMAL_TAIL = (
    0.46151582985003775, -0.09155228183400882, 0.031030368425963187, 0.010002352385205339, -0.026401042966292542,
    0.024536963244452856, -0.015170415402539756, 0.006522000656320855, -0.0016760723482432765, 7.791690844271931e-06,
    0.00018233419859308241, -5.360803796862406e-05, -9.896453646201561e-06, 9.061211055012739e-06,
    -6.899272279517922e-08, -1.3100326669859615e-06, 1.2476274575233402e-07, 1.990096892644478e-07,
    -2.198924620677515e-08, -3.213248613793193e-08, 3.53881848400613e-10, 4.056131186466617e-09, 7.780373546506896e-10,
)  # fmt: skip


@functools.cache
def scalar_kernels(dtype: np.dtype[Any]) -> dict[str, Callable[..., Any]]:
    """Return the compiled scalar functions for `dtype`, float32 or float64, under the registry's names."""
    F = dtype.type
    single = F is np.float32
    name = dtype.name
    limits = np.finfo(dtype)
    found: dict[str, Callable[..., Any]] = {}

    def scalar_kernel(function: Callable[..., Any]) -> Any:
        found[function.__name__] = _inline(function)
        return found[function.__name__]

    # Constants have a type, as Numba would compute in float64 with Python's own.
    zero, half, one, two = F(0), F(0.5), F(1), F(2)
    infinity = F(np.inf)
    magic = F(1.5 * 2.0**limits.nmant)
    log2_e = F(1.4426950408889634)
    # log(2) in two parts; the first has zeros at its end, so that its product with a small whole number is exact.
    log_2_high = F(0.693359375) if single else F(6.93147180369123816490e-01)
    log_2_low = F(-2.12194440e-4) if single else F(1.90821492927058770002e-10)
    log_lowest, log_highest = (F(-150), F(89.5)) if single else (F(-800), F(710.5))
    n_lowest, n_highest = (F(-100), F(127)) if single else (F(-1000), F(1023))
    expm1_lowest, expm1_highest = F(-50), F(88) if single else F(709)
    exp_polynomial, tanh_polynomial, log_polynomial = (polynomial(*table[name]) for table in (_EXP, _TANH, _LOG))
    tail_polynomial = polynomial(*_NORMAL_TAIL)

    @_inline
    def clip(x, low, high):
        """`x` within [low, high]; NaN stays."""
        return select(x < low, low, select(x > high, high, x))

    @_inline
    def reduced(x):
        """Whole n and small r with ``x = n * log(2) + r`` (Cody and Waite, 1980)."""
        n = muladd(x, log2_e, magic) - magic
        return n, muladd(n, -log_2_low, muladd(n, -log_2_high, x))

    @_inline
    def exp_parts(x):
        """``(p, scale)`` whose product is exp(x), and may be subnormal; `p` itself is a normal number."""
        n, r = reduced(clip(x, log_lowest, log_highest))
        p = muladd(r * r, exp_polynomial(r), r) + one
        normal = clip(n, n_lowest, n_highest)
        return p * power_of_two(normal), power_of_two(n - normal)

    @_inline
    def exponential(x):
        p, scale = exp_parts(x)
        return p * scale

    @_inline
    def expm1(x):
        n, r = reduced(clip(x, expm1_lowest, expm1_highest))
        power = power_of_two(n)
        return muladd(power, muladd(r * r, exp_polynomial(r), r), power - one)

    log_2_high_k, log_2_low_k = (F(6.9313812256e-01), F(9.0580006145e-06)) if single else (log_2_high, log_2_low)

    @_inline
    def log_near_one(f, k):
        """``log(1 + f) + k * log(2)`` for 1 + f within [sqrt(1/2), sqrt(2)] (fdlibm)."""
        s = f / (two + f)
        z = s * s
        square = half * f * f
        return s * (square + z * log_polynomial(z)) + k * log_2_low_k - square + f + k * log_2_high_k

    @_inline
    def log1p(x):
        """``log(1 + x)`` for x within [-1, 1]; what ``1 + x`` loses in rounding is put back."""
        u = one + x
        m, k = mantissa_and_exponent(u)
        y = log_near_one(m - one + (x - (u - one)) * power_of_two(-k), k)
        return select(u == zero, -infinity, y)

    tiny, scale_up, scale_up_log2 = F(limits.tiny), F(2.0**54), F(54)

    @_inline
    def logarithm(x):
        """log(x) for x within [0, 2**900]."""
        small = x < tiny
        m, k = mantissa_and_exponent(select(small, x * scale_up, x))
        y = log_near_one(m - one, select(small, k - scale_up_log2, k))
        return select(x == zero, -infinity, select(x == x, y, x))

    @_inline
    def logistic_pair(x):
        """sigmoid(x) and sigmoid(-x)."""
        e = exponential(-abs(x))
        high = one / (one + e)
        low = e / (one + e)
        return select(x >= zero, high, low), select(x >= zero, low, high)

    largest_factor = F(1e4)

    # Activations.

    @scalar_kernel
    def identity(x, parameter):
        return x

    @scalar_kernel
    def identity_backward(grad_y, saved, parameter):
        return grad_y

    @scalar_kernel
    def relu(x, parameter):
        return select(x <= zero, zero, x)

    @scalar_kernel
    def relu_backward(grad_y, saved, parameter):
        return select(saved > zero, grad_y, zero * saved)

    @scalar_kernel
    def leaky_relu(x, parameter):
        return select(x > zero, x, F(parameter * x))

    @scalar_kernel
    def leaky_relu_backward(grad_y, saved, parameter):
        return select(saved > zero, grad_y, select(saved <= zero, F(parameter * grad_y), saved * grad_y))

    @scalar_kernel
    def elu(x, parameter):
        return select(x < zero, F(parameter * expm1(x)), x)

    @scalar_kernel
    def elu_backward(grad_y, saved, parameter):
        return select(saved > zero, grad_y, F(grad_y * (saved + parameter)))

    tanh_highest, tanh_branch = F(10) if single else F(22), F(0.625)

    @scalar_kernel
    def tanh(x, parameter):
        a = select(abs(x) > tanh_highest, tanh_highest, abs(x))
        z = a * a
        small = muladd(a * z, tanh_polynomial(z), a)
        large = one - two / (exponential(two * a) + one)
        return copysign(select(a < tanh_branch, small, large), x)

    @scalar_kernel
    def tanh_backward(grad_y, saved, parameter):
        return grad_y * ((one - saved) * (one + saved))

    @scalar_kernel
    def sigmoid(x, parameter):
        e = exponential(-abs(x))
        return select(x >= zero, one, e) / (one + e)

    @scalar_kernel
    def sigmoid_backward(grad_y, saved, parameter):
        return grad_y * (saved * (one - saved))

    @scalar_kernel
    def exp(x, parameter):
        return exponential(x)

    @scalar_kernel
    def exp_backward(grad_y, saved, parameter):
        return grad_y * saved

    @scalar_kernel
    def silu(x, parameter):
        # Times x before the scale: exp(x) may be subnormal where the product is not.
        p, scale = exp_parts(-abs(x))
        below = select(x < -largest_factor, -largest_factor, x) * p * scale
        return select(x >= zero, x, below) / (one + p * scale)

    @scalar_kernel
    def silu_backward(grad_y, saved, parameter):
        s, other = logistic_pair(saved)
        return grad_y * (s * (one + clip(saved, -largest_factor, largest_factor) * other))

    gelu_linear, gelu_cubic, gelu_slope = F(1.5957691216057308), F(0.044715), F(3 * 0.044715)

    @scalar_kernel
    def gelu_tanh(x, parameter):
        u = gelu_linear * x * (one + gelu_cubic * x * x)
        s, _ = logistic_pair(u)
        return select(x < -largest_factor, -largest_factor, x) * s

    @scalar_kernel
    def gelu_tanh_backward(grad_y, saved, parameter):
        x = clip(saved, -largest_factor, largest_factor)
        s, other = logistic_pair(gelu_linear * x * (one + gelu_cubic * x * x))
        return grad_y * (s * (one + x * (gelu_linear * (one + gelu_slope * x * x)) * other))

    @scalar_kernel
    def softplus(x, parameter):
        return select(x > zero, x, zero) + log1p(exponential(-abs(x)))

    @scalar_kernel
    def softplus_backward(grad_y, saved, parameter):
        return grad_y * -expm1(-saved)

    if single:
        # Relative accuracy far out in the tail asks for more than float32.
        wide = scalar_kernels(np.dtype(np.float64))
        gelu64, gelu_backward64 = wide["gelu"], wide["gelu_backward"]

        @scalar_kernel
        def gelu(x, parameter):
            return F(gelu64(np.float64(x), parameter))

        @scalar_kernel
        def gelu_backward(grad_y, saved, parameter):
            return F(gelu_backward64(np.float64(grad_y), np.float64(saved), parameter))

    else:
        furthest, five, splitter, density = F(40), F(5), F(2.0**27 + 1), F(0.3989422804014327)

        @_inline
        def normal_tail(a):
            """``exp(-a**2 / 2)`` in two parts as in `exp_parts`, and the factor to Phi(-a), for a within [0, 40]."""
            # a**2 to twice the precision (Dekker, 1971): its rounding error would grow with a**2.
            square = a * a
            shifted = splitter * a
            high = shifted - (shifted - a)
            low = a - high
            rest = ((high * high - square) + two * high * low) + low * low
            p, scale = exp_parts(-half * square)
            return muladd(-half * rest, p, p), scale, tail_polynomial((a - five) / (a + five)) / (one + a)

        @scalar_kernel
        def gelu(x, parameter):
            a = select(abs(x) > furthest, furthest, abs(x))
            p, scale, ratio = normal_tail(a)
            return select(x < zero, -a * ratio * p * scale, x * (one - ratio * (p * scale)))

        @scalar_kernel
        def gelu_backward(grad_y, saved, parameter):
            a = select(abs(saved) > furthest, furthest, abs(saved))
            p, scale, ratio = normal_tail(a)
            e = p * scale
            below = ratio * e
            return grad_y * (select(saved < zero, below, one - below) + copysign(a * density * e, saved))

    # Losses: the value in float64, and the slope, in float64 as well where it may overflow in float32.

    @_inline
    def times(weight, value):
        return select(weight == zero, zero, weight * value)

    @scalar_kernel
    def binary_cross_entropy_with_logits(z, t, parameter, scale):
        e = exponential(-abs(z))
        positive, negative = select(z > zero, z, zero), select(z < zero, -z, zero)
        loss = times(one - t, positive) + times(t, negative) + log1p(e)
        return np.float64(loss), (select(z >= zero, one, e) / (one + e) - t) * scale

    lowest_log, smallest_product = F(-100), F(1e-12)

    @scalar_kernel
    def binary_cross_entropy(p, t, parameter, scale):
        log_p, log_q = logarithm(p), log1p(-p)
        log_p = select(log_p < lowest_log, lowest_log, log_p)
        log_q = select(log_q < lowest_log, lowest_log, log_q)
        product = p * (one - p)
        slope = (p - t) / select(product < smallest_product, smallest_product, product)
        return np.float64(-(t * log_p + (one - t) * log_q)), slope * scale

    @scalar_kernel
    def mean_squared_error(p, t, parameter, scale):
        d = np.float64(p) - np.float64(t)
        return d * d, d * (2.0 * scale)

    @scalar_kernel
    def huber(p, t, delta, scale):
        d = np.float64(p) - np.float64(t)
        size = abs(d)
        loss = select(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))
        return loss, select(d < -delta, -delta, select(d > delta, delta, d)) * scale

    @scalar_kernel
    def hinge(p, t, parameter, scale):
        margin = 1.0 - np.float64(t) * np.float64(p)
        loss = select(margin <= 0.0, 0.0, margin)
        return loss, select(margin > 0.0, -np.float64(t), loss) * scale

    @scalar_kernel
    def wasserstein(p, t, parameter, scale):
        return -(np.float64(t) * np.float64(p)), -np.float64(t) * scale

    # Optimizer rules.

    @scalar_kernel
    def sgd(p, g, lr, weight_decay):
        return (p - F(lr) * (g + F(weight_decay) * p),)

    @scalar_kernel
    def momentum(p, g, velocity, lr, weight_decay, mu, nesterov):
        g = g + F(weight_decay) * p
        velocity = F(mu) * velocity + g
        return p - F(lr) * select(nesterov != 0.0, g + F(mu) * velocity, velocity), velocity

    @scalar_kernel
    def adam(p, g, m, v, step_size, beta1, beta2, gain1, gain2, eps, correction, l2, shrink):
        g = g + F(l2) * p
        m = F(beta1) * m + F(gain1) * g
        v = F(beta2) * v + (F(gain2) * g) * g
        return F(shrink) * p - F(step_size) * m / (square_root(v) * F(correction) + F(eps)), m, v

    # What rows need: they have loops of their own in the backend.
    found["exponential"] = exponential
    return found
