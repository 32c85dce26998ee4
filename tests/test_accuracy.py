"""Accuracy in ULP, forward and backward: float32 on a sample of all floats, float64 against mpmath.

The bounds stand in the registry, and so in each docstring. `tools/sweep_float32.py` tries all 2**32 floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS
from support import f64, reference_backward, reference_forward, ulp_error, worst

mpmath = pytest.importorskip("mpmath")
mp = mpmath.mp.clone()
mp.dps = 50

# Where formulas change branch, overflow, underflow, saturate or cross zero.
THRESHOLDS = [
    0.0, 1e-45, 1.17549435e-38, 1e-20, 2.0**-24, 2.0**-12, 0.01, 0.1, 0.3465736, 0.35, 0.5, 0.55, 0.625, 0.6931472,
    0.7517916, 1.0, 1.2784645, 2.0, 4.0, 5.0, 7.0, 8.66434, 9.010913, 10.0, 13.0, 14.4, 16.63553, 17.32868, 18.0, 20.0,
    26.5, 37.0, 38.5, 44.0, 64.0, 80.0, 86.6434, 87.33654, 88.02969, 88.37626, 88.72284, 89.0, 100.0, 103.27893,
    103.97208, 104.0, 150.0, 354.9, 708.3964, 709.78271, 745.13322, 746.0, 1e4, 1e10, 1.8446743e19, 3.4028235e38,
]  # fmt: skip


def floats32(step: int = 40_009) -> Any:
    """Every `step`-th float32 that is a number, and the neighbours of every threshold."""
    sample = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = np.array(THRESHOLDS, np.float32).view(np.uint32)[:, np.newaxis].astype(np.int64) + np.arange(-40, 41)
    near = near[(near >= 0) & (near <= 0x7F800000)].astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        points = np.concatenate([sample, near, -near])
    return points[~np.isnan(points)]


@functools.cache
def floats64() -> Any:
    """Every order of magnitude, an even grid where functions bend, and the neighbours of every threshold."""
    rng = np.random.default_rng(7)
    sizes = 10.0 ** rng.uniform(-323, 308, size=150)
    grid = np.concatenate([rng.uniform(0, top, size=n) for top, n in ((1, 250), (8, 250), (40, 250), (800, 250))])
    near = np.array(THRESHOLDS)
    near = np.concatenate([near, np.nextafter(near, 0), np.nextafter(near, np.inf)])
    points = np.concatenate([sizes, grid, near])
    return np.unique(np.concatenate([points, -points]))


def saved_points(entry: Any, points: Any) -> Any:
    """What a gradient can be asked for: inputs, or results of the forward function."""
    if entry.needs_x:
        return points
    with np.errstate(over="ignore"):
        y = reference_forward(entry, points).astype(points.dtype)
    inside = points[(points >= np.nanmin(y)) & (points <= np.nanmax(y))]
    return np.unique(np.concatenate([y, inside]))


@functools.cache
def exact32(name: str) -> tuple[Any, Any, Any, Any]:
    entry = ACTIVATIONS[name]
    x = floats32()
    saved = saved_points(entry, x)
    return x, reference_forward(entry, x), saved, reference_backward(entry, np.ones_like(saved), saved)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_float32(name: str, backend: Any) -> None:
    entry = ACTIVATIONS[name]
    x, forward, saved, backward = exact32(name)
    y = getattr(kernels, name)(x)
    error = ulp_error(y, forward, floor=entry.forward_accuracy.floor)
    assert np.max(error) <= entry.forward_accuracy.float32, worst(error, x, y, forward)
    slope = getattr(kernels, f"{name}_backward")(np.ones_like(saved), saved, saved)
    error = ulp_error(slope, backward, floor=entry.backward_accuracy.floor)
    assert np.max(error) <= entry.backward_accuracy.float32, worst(error, saved, slope, backward)


# float64: the true values. Each backward is a function of the array that the registry's reads.


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def _cdf(x: Any) -> Any:
    # Beyond 50 it is 0 or 1 in float64, and mpmath takes its time.
    return mp.ncdf(x) if abs(x) < 50 else mp.mpf(x > 0)


def _gelu_tanh_argument(x: Any) -> Any:
    return 2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)


def _gelu_tanh_slope(x: Any) -> Any:
    s = _sigmoid(_gelu_tanh_argument(x))
    return s + x * s * (1 - s) * 2 * mp.sqrt(2 / mp.pi) * (1 + 3 * mp.mpf("0.044715") * x**2)


EXACT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "identity": (lambda x: x, lambda y: mp.mpf(1)),
    "relu": (lambda x: max(x, mp.mpf(0)), lambda y: mp.mpf(y > 0)),
    "leaky_relu": (lambda x: x if x > 0 else mp.mpf(0.01) * x, lambda y: mp.mpf(1) if y > 0 else mp.mpf(0.01)),
    "elu": (lambda x: x if x > 0 else mp.expm1(x), lambda y: mp.mpf(1) if y > 0 else y + 1),
    "gelu": (lambda x: x * _cdf(x), lambda x: _cdf(x) + x * mp.npdf(x)),
    "gelu_tanh": (lambda x: x * _sigmoid(_gelu_tanh_argument(x)), _gelu_tanh_slope),
    "silu": (lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x))),
    "softplus": (lambda x: max(x, mp.mpf(0)) + mp.log1p(mp.exp(-abs(x))), lambda y: -mp.expm1(-y)),
    "tanh": (lambda x: mp.expm1(2 * x) / (mp.expm1(2 * x) + 2) if x < 0 else -mp.expm1(-2 * x) / (mp.expm1(-2 * x) + 2),
             lambda y: (1 - y) * (1 + y)),
    "sigmoid": (_sigmoid, lambda y: y * (1 - y)),
    "exp": (mp.exp, lambda y: y),
}  # fmt: skip


def _evaluated(function: Callable[[Any], Any], points: Any) -> tuple[Any, Any]:
    """The true values as float64, and what is missing from them."""
    high, low = np.empty(points.shape), np.empty(points.shape)
    for index, point in enumerate(points):
        value = function(mp.mpf(float(point)))
        high[index] = float(value)
        low[index] = float(value - mp.mpf(high[index])) if np.isfinite(high[index]) else 0.0
    return high, low


@functools.cache
def exact64(name: str) -> tuple[Any, ...]:
    entry = ACTIVATIONS[name]
    x = floats64()
    saved = saved_points(entry, x)
    saved = saved[np.isfinite(saved)]
    if name in EXACT:
        return (x, *_evaluated(EXACT[name][0], x), saved, *_evaluated(EXACT[name][1], saved))
    # An entry without a line above: the reference stands in, though it errs itself.
    zero = np.zeros(1)
    return x, reference_forward(entry, x), zero, saved, reference_backward(entry, np.ones_like(saved), saved), zero


def reference_allowance(name: str, x: Any, high: Any) -> Any:
    """What the NumPy reference errs in float64 beyond the bound, in the far tail, for being short.

    ``x * sigmoid(x)`` and ``x * cdf(x)`` round the second factor where it is subnormal: `x` units. And the argument of
    erfc, -x / sqrt(2), is rounded: erfc falls by ``2 z**2`` times its relative change.
    """
    tail = (x < 0) & (x > -760)
    allowance = np.where(tail & (np.abs(high) < 1000 * np.finfo(np.float64).tiny), np.abs(x), 0.0)
    return allowance + (1.5 * np.where(tail, x, 0.0) ** 2 if name == "gelu" else 0.0)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_float64(name: str, backend: Any) -> None:
    entry = ACTIVATIONS[name]
    x, high, low, saved, slope_high, slope_low = exact64(name)
    y = getattr(kernels, name)(x)
    error = ulp_error(y, high, low, floor=entry.forward_accuracy.floor)
    if backend.name == "numpy" and name in ("gelu", "silu"):
        error -= reference_allowance(name, x, high)
    assert np.max(error) <= entry.forward_accuracy.float64, worst(error, x, y, high)
    slope = getattr(kernels, f"{name}_backward")(np.ones_like(saved), saved, saved)
    error = ulp_error(slope, slope_high, slope_low, floor=entry.backward_accuracy.floor)
    assert np.max(error) <= entry.backward_accuracy.float64, worst(error, saved, slope, slope_high)


def test_the_measure_itself() -> None:
    one = np.float32(1)
    assert ulp_error(one, 1.0) == 0
    assert ulp_error(np.nextafter(one, np.float32(2)), 1.0) == 1
    assert ulp_error(one, 1 + 2.0**-25) == 0.25
    assert ulp_error(np.float32(1e-45), 0.0) == 1
    assert ulp_error(np.float32(np.inf), float(np.finfo(np.float32).max)) == 1
    assert ulp_error(np.float32(np.inf), 1e300) == 0
    assert ulp_error(np.float64(np.inf), np.finfo(np.float64).max) == 1
    assert ulp_error(np.float64(5e-324), 0.0) == 1
    assert ulp_error(np.float32(np.nan), 1.0) == np.inf
    assert ulp_error(np.float32(1e-20), 0.0, floor=1.0) == pytest.approx(1e-20 * 2**23)
    assert ulp_error(np.float32(np.nan), np.nan) == 0
    assert np.all(ulp_error(f64([1, 2]), [1, 2], [2.0**-53, 0]) == [0.5, 0])
