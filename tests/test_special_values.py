"""NaN, infinities, zeros of both signs, subnormal and huge numbers: the limits, for every kernel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.losses import smoothing as smoothing_of
from support import assert_within, f64, reference_backward, reference_forward, same_bits, ulp_error, worst

INF, NAN = math.inf, math.nan

#                 f(-inf)  f(-0.0)        f(0.0)         f(inf)
FORWARD_LIMITS = {
    "identity":   (-INF,   -0.0,          0.0,           INF),
    "relu":       (0.0,    0.0,           0.0,           INF),
    "leaky_relu": (-INF,   -0.0,          0.0,           INF),
    "elu":        (-1.0,   -0.0,          0.0,           INF),
    "gelu":       (-0.0,   -0.0,          0.0,           INF),
    "gelu_tanh":  (-0.0,   -0.0,          0.0,           INF),
    "silu":       (-0.0,   -0.0,          0.0,           INF),
    "softplus":   (0.0,    math.log(2.0), math.log(2.0), INF),
    "tanh":       (-1.0,   -0.0,          0.0,           1.0),
    "sigmoid":    (0.0,    0.5,           0.5,           1.0),
    "exp":        (0.0,    1.0,           1.0,           INF),
}  # fmt: skip

#                 f'(-inf) f'(0.0)        f'(inf)
SLOPE_LIMITS = {
    "identity":   (1.0,    1.0,           1.0),
    "relu":       (0.0,    0.0,           1.0),
    "leaky_relu": (0.01,   0.01,          1.0),
    "elu":        (0.0,    1.0,           1.0),
    "gelu":       (0.0,    0.5,           1.0),
    "gelu_tanh":  (0.0,    0.5,           1.0),
    "silu":       (0.0,    0.5,           1.0),
    "softplus":   (0.0,    0.5,           1.0),
    "tanh":       (0.0,    1.0,           0.0),
    "sigmoid":    (0.0,    0.25,          0.0),
    "exp":        (0.0,    1.0,           INF),
}  # fmt: skip

NAMES = list(ACTIVATIONS)


def lanes(value: Any, dtype: Any, length: int) -> Any:
    """`value` at the last place of `length` numbers: in the main loop or the tail of a SIMD kernel."""
    x = np.linspace(-2, 2, length).astype(dtype)
    x[-1] = value
    return x


def specials(dtype: Any) -> Any:
    limits = np.finfo(dtype)
    numbers = [0.0, limits.smallest_subnormal, 3 * limits.smallest_subnormal, limits.tiny / 2, limits.tiny, limits.eps]
    numbers += [1.0, limits.max / 2, limits.max, INF]
    both = np.array(numbers).astype(dtype)
    return np.concatenate([both, -both, [dtype.type(NAN)]])


@pytest.mark.parametrize("length", [1, 8, 33])
@pytest.mark.parametrize("name", [name for name in NAMES if name in FORWARD_LIMITS])
def test_limits(name: str, length: int, backend: Any, dtype: Any) -> None:
    for x, limit in zip((-INF, -0.0, 0.0, INF), FORWARD_LIMITS[name], strict=True):
        y = getattr(kernels, name)(lanes(x, dtype, length))[-1]
        assert abs(y - limit) <= np.finfo(dtype).eps if 0 < abs(limit) < 1 else y == limit, (x, y)
        assert np.signbit(y) == np.signbit(limit), (x, y)
        fused = kernels.linear(lanes(x, dtype, length)[:, None], np.ones((1, 1), dtype), activation=name)[-1, 0]
        # The product starts from +0.0, and so loses the sign of -0.0.
        assert fused == y
    for x, limit in zip((-INF, 0.0, INF), SLOPE_LIMITS[name], strict=True):
        saved = lanes(x, dtype, length)
        saved = saved if ACTIVATIONS[name].needs_x else getattr(kernels, name)(saved)
        slope = getattr(kernels, f"{name}_backward")(np.ones(length, dtype), saved, saved)[-1]
        assert slope == dtype.type(limit), (x, slope)


@pytest.mark.parametrize("name", NAMES)
def test_special_values(name: str, backend: Any, dtype: Any) -> None:
    """Every special value agrees with the reference, also in its sign, in every lane."""
    entry = ACTIVATIONS[name]
    for value in specials(dtype):
        for length in (1, 8, 33):
            x = lanes(value, dtype, length)
            with np.errstate(over="ignore"):
                exact = reference_forward(entry, x)
            y = getattr(kernels, name)(x)
            error = ulp_error(y, exact, floor=entry.forward_accuracy.floor)
            limit = getattr(entry.forward_accuracy, dtype.name) * (2 if dtype == np.float64 else 1)
            assert np.all(error <= limit), worst(error, x, y, exact)
            assert np.isnan(exact[-1]) or np.signbit(y[-1]) == np.signbit(exact[-1])
            assert np.isinf(y[-1]) == np.isinf(exact[-1].astype(dtype))
            if not entry.needs_x:
                with np.errstate(over="ignore"):
                    x = exact.astype(dtype)
            slope = getattr(kernels, f"{name}_backward")(np.ones_like(x), x, x)
            exact = reference_backward(entry, np.ones_like(x), x)
            error = ulp_error(slope, exact, floor=entry.backward_accuracy.floor)
            limit = getattr(entry.backward_accuracy, dtype.name) * (2 if dtype == np.float64 else 1)
            assert np.all(error <= limit), worst(error, x, slope, exact)


@pytest.mark.parametrize("name", NAMES)
def test_nan_propagates(name: str, backend: Any, dtype: Any) -> None:
    for length in (1, 2, 3, 8, 16, 33, 100):
        x = lanes(NAN, dtype, length)
        ones = np.ones_like(x)
        y = getattr(kernels, name)(x)
        assert np.isnan(y[-1])
        assert not np.isnan(y[:-1]).any()
        if name != "identity":
            slope = getattr(kernels, f"{name}_backward")(ones, x, x)
            assert np.isnan(slope[-1])
        slope = getattr(kernels, f"{name}_backward")(x, ones, ones)
        assert np.isnan(slope[-1])
        assert not np.isnan(slope[:-1]).any()
        fused = kernels.linear(x[:, np.newaxis], np.ones((1, 1), dtype), activation=name)
        assert np.isnan(fused[-1, 0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_vanishing_slope_times_infinity_is_nan(sign: float, backend: Any, dtype: Any) -> None:
    """Only the formula's own inf * 0 has a limit; a gradient that is infinite itself does not."""
    grad = np.full(9, sign * INF, dtype)
    assert np.isnan(kernels.tanh_backward(grad, None, np.ones(9, dtype))).all()
    assert np.all(kernels.relu_backward(grad, None, np.zeros(9, dtype)) == 0)
    assert np.all(kernels.relu_backward(grad, None, np.ones(9, dtype)) == sign * INF)


def test_subnormal_results(backend: Any, dtype: Any) -> None:
    """Results below the smallest normal number are not flushed to zero."""
    limits = np.finfo(dtype)
    x = np.linspace(math.log(float(limits.smallest_subnormal)) + 0.5, math.log(float(limits.tiny)), 1001).astype(dtype)
    for name in ("exp", "sigmoid", "softplus"):
        y = getattr(kernels, name)(x)
        assert np.all(y > 0), name
        assert np.all(y <= limits.tiny * 1.0001), name
    assert np.all(kernels.silu(x) < 0)
    small = (limits.smallest_subnormal * np.arange(1, 100)).astype(dtype)
    for name in ("identity", "relu", "elu", "tanh", "leaky_relu"):
        assert same_bits(getattr(kernels, name)(small), small), name
        assert same_bits(getattr(kernels, f"{name}_backward")(small, small, small), small), name
    assert same_bits(kernels.tanh(-small), -small)
    assert same_bits(kernels.matmul(small[:, None], np.ones((1, 1), dtype)), small[:, None])


# Row functions.


@pytest.mark.parametrize("columns", [2, 8, 9, 33])
def test_rows_with_special_values(columns: int, backend: Any, dtype: Any) -> None:
    limits = np.finfo(dtype)
    rows = np.zeros((7, columns), dtype)
    rows[0, 0] = NAN
    rows[1, -1] = INF
    rows[2] = -INF
    rows[3, 0] = -INF
    rows[4] = limits.max
    rows[5, :-1], rows[5, -1] = -limits.max, limits.max
    rows[6] = -limits.max
    softmax, log_softmax = kernels.softmax(rows), kernels.log_softmax(rows)
    for y in (softmax, log_softmax):
        assert np.isnan(y[:3]).all()
    share, eps = 1 / np.arange(1, columns + 1), limits.eps
    assert softmax[3, 0] == 0
    assert log_softmax[3, 0] == -INF
    assert_within(softmax[3, 1:], np.full(columns - 1, share[-2]), 4 * eps)
    assert_within(softmax[[4, 6]], np.full((2, columns), share[-1]), 4 * eps)
    assert_within(log_softmax[[4, 6]], np.full((2, columns), math.log(share[-1])), 8 * eps * math.log(columns))
    assert softmax[5].tolist() == [0.0] * (columns - 1) + [1.0]
    assert log_softmax[5, -1] == 0
    assert np.all(log_softmax[5, :-1] == -INF)
    for name, entry in ROW_FUNCTIONS.items():
        y = getattr(kernels, name)(rows)
        grad = np.linspace(-1, 1, rows.size).reshape(rows.shape).astype(dtype)
        with np.errstate(all="ignore"):
            exact = entry.backward(grad.astype(np.float64), y.astype(np.float64))
        assert_within(getattr(kernels, f"{name}_backward")(grad, None, y), exact, 4 * columns * eps)


# Losses.


def loss_of(name: str, prediction: float, target: float, dtype: Any, length: int) -> tuple[float, float]:
    p, t = np.full(length, 0.5, dtype), np.full(length, 0.5, dtype)
    base, _ = getattr(kernels, name)(p[:-1], t[:-1]) if length > 1 else (0.0, None)
    p[-1], t[-1] = prediction, target
    loss, grad = getattr(kernels, name)(p, t)
    return loss * length - base * (length - 1), float(grad[-1]) * length


@pytest.mark.parametrize("length", [1, 16, 33])
@pytest.mark.parametrize(
    ("name", "prediction", "target", "loss", "slope"),
    [
        ("binary_cross_entropy_with_logits", INF, 1.0, 0.0, 0.0),
        ("binary_cross_entropy_with_logits", -INF, 0.0, 0.0, 0.0),
        ("binary_cross_entropy_with_logits", INF, 0.0, INF, 1.0),
        ("binary_cross_entropy_with_logits", -INF, 1.0, INF, -1.0),
        ("binary_cross_entropy_with_logits", INF, 0.25, INF, 0.75),
        ("binary_cross_entropy_with_logits", 1e30, 0.0, 1e30, 1.0),
        ("binary_cross_entropy_with_logits", -1e30, 0.0, 0.0, 0.0),
        ("binary_cross_entropy_with_logits", NAN, 0.0, NAN, NAN),
        ("binary_cross_entropy_with_logits", 0.0, NAN, NAN, NAN),
        ("binary_cross_entropy", 0.0, 0.0, 0.0, 0.0),
        ("binary_cross_entropy", 1.0, 1.0, 0.0, 0.0),
        ("binary_cross_entropy", 0.0, 1.0, 100.0, -1e12),
        ("binary_cross_entropy", 1.0, 0.0, 100.0, 1e12),
        ("binary_cross_entropy", NAN, 0.0, NAN, NAN),
        ("binary_cross_entropy", 0.5, NAN, NAN, NAN),
        ("mean_squared_error", INF, 0.0, INF, INF),
        ("mean_squared_error", INF, INF, NAN, NAN),
        ("mean_squared_error", NAN, 0.0, NAN, NAN),
        ("huber", INF, 0.0, INF, 1.0),
        ("huber", -INF, 0.0, INF, -1.0),
        ("huber", 1e30, 0.0, 1e30, 1.0),
        ("huber", NAN, 0.0, NAN, NAN),
        ("huber", 0.0, NAN, NAN, NAN),
        ("hinge", INF, 1.0, 0.0, 0.0),
        ("hinge", -INF, 1.0, INF, -1.0),
        ("hinge", INF, -1.0, INF, 1.0),
        ("hinge", 1.0, 1.0, 0.0, 0.0),
        ("hinge", NAN, 1.0, NAN, NAN),
        ("hinge", 0.0, NAN, NAN, NAN),
        ("wasserstein", INF, 1.0, -INF, -1.0),
        ("wasserstein", INF, -1.0, INF, 1.0),
        ("wasserstein", NAN, 1.0, NAN, -1.0),
        ("wasserstein", 0.0, NAN, NAN, NAN),
    ],
)
def test_loss_limits(
    name: str, prediction: float, target: float, loss: float, slope: float, length: int, backend: Any, dtype: Any
) -> None:
    value, grad = loss_of(name, prediction, target, dtype, length)
    eps = np.finfo(dtype).eps
    assert_within(value, loss, 64 * eps * max(abs(loss), 1.0) if math.isfinite(loss) else 0.0)
    assert_within(grad, slope, 4 * eps * abs(slope) if math.isfinite(slope) else 0.0)


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_of_specials_agree_with_the_reference(name: str, backend: Any, dtype: Any) -> None:
    entry = LOSSES[name]
    values = specials(dtype)
    if entry.unit_interval:
        values = values[np.isnan(values) | ((values >= 0) & (values <= 1))]
    for target in (0.0, 0.3, 1.0):
        t = np.full_like(values, target)
        _, grad = getattr(kernels, name)(values, t)
        with np.errstate(all="ignore"):
            _, exact = entry.evaluate(f64(values), f64(t), entry.default, 1.0 / values.size)
            exact = exact.astype(dtype)
            assert_within(grad, exact, 8 * np.finfo(dtype).eps * np.maximum(np.abs(exact), 1.0 / values.size))


@pytest.mark.parametrize("classes", [2, 8, 9, 33])
def test_softmax_cross_entropy_limits(classes: int, backend: Any, dtype: Any) -> None:
    z = np.zeros((1, classes), dtype)
    z[0, 0] = -INF
    loss, grad = kernels.softmax_cross_entropy(z, np.array([1]))
    assert loss == pytest.approx(math.log(classes - 1), rel=1e-6, abs=1e-7)
    assert grad[0, 0] == 0
    # A class that cannot be, asked for: infinite loss. Not asked for (weight 0): it costs nothing.
    loss, grad = kernels.softmax_cross_entropy(z, np.array([0]))
    assert loss == INF
    assert grad[0, 0] == -1
    loss, _ = kernels.softmax_cross_entropy(z, np.eye(classes, dtype=dtype)[[1]])
    assert loss == pytest.approx(math.log(classes - 1), rel=1e-6, abs=1e-7)
    for value in (NAN, INF):
        z[0, -1] = value
        loss, grad = kernels.softmax_cross_entropy(z, np.array([1]))
        assert math.isnan(loss)
        assert np.isnan(grad).all()
    huge = np.full((1, classes), np.finfo(dtype).max)
    huge[0, 0] *= -1
    loss, grad = kernels.softmax_cross_entropy(huge, np.array([1]))
    assert loss == pytest.approx(math.log(classes - 1), rel=1e-6, abs=1e-7)
    assert grad[0, 0] == 0


# Updates.


def test_updates_with_special_values(backend: Any, dtype: Any) -> None:
    grad = np.array([NAN, INF, -INF, 0.0, np.finfo(dtype).max], dtype)
    param = np.ones(5, dtype)
    kernels.sgd_update(param, grad, lr=0.0)
    assert np.isnan(param[:3]).all()  # 0 * inf
    assert param[3:].tolist() == [1.0, 1.0]
    param, m, v = np.ones((3, 5), dtype)
    kernels.adam_update(param, grad, m, v, step=1)
    assert np.isnan(param[:3]).all()
    assert v[1] == v[2] == INF
    assert np.isnan(v[0])
    assert np.isfinite(param[3])


# Near saturation, and far beyond.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [0.0, 5.0, 15.0, 20.0, 30.0, 60.0])
def test_row_loss_near_saturation(margin: float, smoothing: float, backend: Any, dtype: Any) -> None:
    """The gradient at the label is what is left of softmax - 1; the reference has it, in float64."""
    z = np.array([[margin, 0, 0], [0, 0, margin], [-margin, margin / 2, 0]], dtype)
    labels = np.array([0, 2, 1])
    _, exact = kernels_in_float64(z, labels, smoothing)
    _, gradient = kernels.softmax_cross_entropy(z, labels, label_smoothing=smoothing)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    rounding = 3e-16  # what float64 holds of 1 - p
    if smoothing and backend.name == "cuda":
        rounding = np.finfo(dtype).eps / len(z)  # it subtracts the smoothed target, which is below 1, in the dtype
    assert (np.abs(f64(gradient) - exact) <= 1e-6 * largest + rounding).all()


def kernels_in_float64(z: Any, labels: Any, label_smoothing: float) -> tuple[Any, Any]:
    entry, classes = ROW_LOSSES["softmax_cross_entropy"], z.shape[1]
    keep, spread = smoothing_of(label_smoothing, classes)
    loss, gradient = entry.evaluate(f64(z), keep * np.eye(classes)[labels] + spread)
    # At a label without smoothing the sum of the others, which float64 holds where 1 - p loses it.
    if label_smoothing == 0:
        for row, label in zip(gradient, labels, strict=True):
            row[label] = -(row.sum() - row[label])
    return loss, gradient / len(z)


def test_row_loss_without_targets_passes_nan_on(backend: Any, dtype: Any) -> None:
    """Targets of 0 leave out what is infinite, but not NaN."""
    for logits in ([1.0, NAN, 2.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]):
        loss, gradient = kernels.softmax_cross_entropy(np.array([logits], dtype), np.zeros((1, 3), dtype))
        assert math.isnan(loss)
        assert np.isnan(f64(gradient)).all()
    loss, gradient = kernels.softmax_cross_entropy(np.array([[1.0, -INF, 2.0]], dtype), np.zeros((1, 3), dtype))
    assert loss == 0
    assert (f64(gradient) == 0).all()


def test_adam_survives_a_gradient_whose_square_overflows(backend: Any, dtype: Any) -> None:
    """(1 - beta2) * g * g is finite; a v of inf would never let the parameter move again."""
    large = float(math.sqrt(np.finfo(dtype).max)) * 4
    param, m, v = np.ones(9, dtype), np.zeros(9, dtype), np.zeros(9, dtype)
    kernels.adam_update(param, np.full(9, large, dtype), m, v, step=1)
    assert np.isfinite(f64(v)).all()
    assert np.abs(f64(param) - 0.999).max() < 1e-6
    for step in range(2, 5):
        before = f64(param).copy()
        kernels.adam_update(param, np.ones(9, dtype), m, v, step=step)
        assert (f64(param) < before).all()
