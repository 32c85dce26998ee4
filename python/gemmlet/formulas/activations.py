"""Activations: one entry each, with the reference expression, its gradient, and how accurate every backend must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Accuracy(NamedTuple):
    """The largest error a backend may make, in ULP of ``max(abs(exact), floor)``; ``floor = 0`` is the plain ULP.

    ``floor = 1`` is for gradients that cross zero somewhere in the middle, where no relative bound can hold.
    """

    float32: float
    float64: float
    floor: float = 0.0

    def __str__(self) -> str:
        unit = "ULP" if self.floor == 0.0 else f"ULP of max(|y|, {self.floor:g})"
        return f"{self.float32:g} {unit} in float32, {self.float64:g} in float64"


class Activation(NamedTuple):
    """One activation."""

    name: str  # of the kernel; its gradient is ``<name>_backward``
    formula: str  # for people, in plain text
    # ``forward(x, parameter) -> y``, on float64.
    forward: Callable[[Array, float], Array]
    # ``backward(grad_y, x, y, parameter) -> grad_x``, on float64. It reads `x` if `needs_x`, else `y`; never both.
    backward: Callable[[Array, Any, Any, float], Array]
    # What every backend keeps to. `backward` counts as a function of the array that it reads.
    forward_accuracy: Accuracy
    backward_accuracy: Accuracy
    source: str  # where the formula comes from
    needs_x: bool = False  # whether the gradient cannot be had from `y` alone
    # The name of the one number it takes, if it takes one, and its default.
    parameter: str | None = None
    default: float = 0.0
    # Of the weights in front of it: Xavier (Glorot and Bengio, 2010) or He (He et al., 2015).
    initialization: Literal["xavier", "he"] = "he"


_erfc = np.frompyfunc(math.erfc, 1, 1)


def _sigmoid(x: Array) -> Array:
    t = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, t) / (1.0 + t)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * np.asarray(_erfc(-x * math.sqrt(0.5)), dtype=np.float64)


def _gelu_tanh_slope(x: Array) -> tuple[Array, Array]:
    """The argument 2u of the sigmoid in ``gelu_tanh(x) = x sigmoid(2u)``, and its derivative."""
    c = 2.0 * math.sqrt(2.0 / math.pi)
    return c * x * (1.0 + 0.044715 * x * x), c * (1.0 + 3.0 * 0.044715 * x * x)


def _finite(x: Array) -> Array:
    """Keep `x` where products with a vanishing exponential are still finite: 0 * inf becomes its limit, 0."""
    return np.clip(x, -1e4, 1e4)


def _finite_below(x: Array) -> Array:
    """The same for factors that vanish at -inf alone."""
    return np.maximum(x, -1e4)


def _silu_backward(grad_y: Array, x: Array, y: Any, parameter: float) -> Array:
    return grad_y * (_sigmoid(x) * (1.0 + _finite(x) * _sigmoid(-x)))


def _gelu_backward(grad_y: Array, x: Array, y: Any, parameter: float) -> Array:
    density = np.exp(-0.5 * x * x) * math.sqrt(0.5 / math.pi)
    return grad_y * (_normal_cdf(x) + _finite(x) * density)


def _gelu_tanh_backward(grad_y: Array, x: Array, y: Any, parameter: float) -> Array:
    x = _finite(x)
    u, slope = _gelu_tanh_slope(x)
    return grad_y * (_sigmoid(u) * (1.0 + x * slope * _sigmoid(-u)))


_EXACT = Accuracy(0.5, 0.5)

ACTIVATIONS: dict[str, Activation] = {
    entry.name: entry
    for entry in (
        Activation(
            name="identity",
            formula="x",
            forward=lambda x, parameter: +x,
            backward=lambda grad_y, x, y, parameter: +grad_y,
            forward_accuracy=_EXACT,
            backward_accuracy=_EXACT,
            initialization="xavier",
            source="the linear layer without an activation",
        ),
        Activation(
            name="relu",
            formula="max(x, 0)",
            forward=lambda x, parameter: np.where(x <= 0, 0.0, x),
            backward=lambda grad_y, x, y, parameter: np.where(y > 0, grad_y, 0.0 * y),
            forward_accuracy=_EXACT,
            backward_accuracy=_EXACT,
            source="Nair and Hinton, 2010",
        ),
        Activation(
            name="leaky_relu",
            formula="x if x > 0 else negative_slope * x",
            forward=lambda x, parameter: np.where(x > 0, x, parameter * x),
            backward=lambda grad_y, x, y, parameter: np.where(y > 0, 1.0, np.where(y <= 0, parameter, y)) * grad_y,
            forward_accuracy=_EXACT,
            backward_accuracy=_EXACT,
            parameter="negative_slope",
            default=0.01,
            source="Maas, Hannun and Ng, 2013",
        ),
        Activation(
            name="elu",
            formula="x if x > 0 else alpha * (exp(x) - 1)",
            forward=lambda x, parameter: np.where(x > 0, x, parameter * np.expm1(np.where(x > 0, 0.0, x))),
            backward=lambda grad_y, x, y, parameter: grad_y * np.where(y > 0, 1.0, y + parameter),
            forward_accuracy=Accuracy(2.5, 2.5),
            backward_accuracy=Accuracy(1.5, 1.5),
            parameter="alpha",
            default=1.0,
            source="Clevert, Unterthiner and Hochreiter, 2016",
        ),
        Activation(
            name="gelu",
            formula="x * Phi(x), Phi the normal distribution function",
            forward=lambda x, parameter: _finite_below(x) * _normal_cdf(x),
            backward=_gelu_backward,
            forward_accuracy=Accuracy(7, 7),
            backward_accuracy=Accuracy(3, 3, floor=1.0),
            needs_x=True,
            source="Hendrycks and Gimpel, 2016",
        ),
        Activation(
            name="gelu_tanh",
            formula="x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2",
            forward=lambda x, parameter: _finite_below(x) * _sigmoid(_gelu_tanh_slope(x)[0]),
            backward=_gelu_tanh_backward,
            forward_accuracy=Accuracy(4, 4, floor=1.0),
            backward_accuracy=Accuracy(4, 4, floor=1.0),
            needs_x=True,
            source="Hendrycks and Gimpel, 2016, the approximation",
        ),
        Activation(
            name="silu",
            formula="x / (1 + exp(-x))",
            forward=lambda x, parameter: _finite_below(x) * _sigmoid(x),
            backward=_silu_backward,
            forward_accuracy=Accuracy(3, 3),
            backward_accuracy=Accuracy(3, 3, floor=1.0),
            needs_x=True,
            source="Hendrycks and Gimpel, 2016; Ramachandran, Zoph and Le, 2017 (swish)",
        ),
        Activation(
            name="softplus",
            formula="log(1 + exp(x))",
            forward=lambda x, parameter: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))),
            backward=lambda grad_y, x, y, parameter: grad_y * -np.expm1(-y),
            forward_accuracy=Accuracy(2.5, 2.5),
            backward_accuracy=Accuracy(2, 2),
            source="Dugas et al., 2001",
        ),
        Activation(
            name="tanh",
            formula="(exp(x) - exp(-x)) / (exp(x) + exp(-x))",
            forward=lambda x, parameter: np.tanh(x),
            backward=lambda grad_y, x, y, parameter: grad_y * ((1.0 - y) * (1.0 + y)),
            forward_accuracy=Accuracy(2, 2),
            backward_accuracy=Accuracy(2, 2),
            initialization="xavier",
            source="LeCun et al., 1998, Efficient BackProp",
        ),
        Activation(
            name="sigmoid",
            formula="1 / (1 + exp(-x))",
            forward=lambda x, parameter: _sigmoid(x),
            backward=lambda grad_y, x, y, parameter: grad_y * (y * (1.0 - y)),
            forward_accuracy=Accuracy(2.5, 2.5),
            backward_accuracy=Accuracy(2.5, 2.5),
            initialization="xavier",
            source="the logistic function",
        ),
        Activation(
            name="exp",
            formula="exp(x)",
            forward=lambda x, parameter: np.exp(x),
            backward=lambda grad_y, x, y, parameter: grad_y * y,
            forward_accuracy=Accuracy(1.5, 1.5),
            backward_accuracy=_EXACT,
            initialization="xavier",
            source="the exponential function",
        ),
    )
}
