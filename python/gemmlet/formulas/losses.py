"""Elementwise losses, row functions and row losses, one entry each, with the reference expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Loss(NamedTuple):
    """A loss that is the mean of a function of one prediction and its target; most is as for an activation."""

    name: str
    formula: str
    prediction: str  # the name of the first argument
    # ``evaluate(prediction, target, parameter, scale) -> (loss, gradient)``, on float64: the loss of each element, and
    # its gradient times `scale`, 1 / n for a mean.
    evaluate: Callable[[Array, Array, float, float], tuple[Array, Array]]
    source: str
    parameter: str | None = None
    default: float = 0.0
    unit_interval: bool = False  # whether a prediction outside [0, 1] is an error
    has_minimum: bool = True  # whether it is bounded below, for targets that it is for


def _times(weight: Array, value: Array) -> Array:
    """``weight * value``, and 0 where `weight` is 0, but for NaN: a sure prediction that is correct costs nothing."""
    return np.where((weight == 0) & ~np.isnan(value), 0.0, weight * value)


def _binary_cross_entropy_with_logits(z: Array, t: Array, parameter: float, scale: float) -> tuple[Array, Array]:
    e = np.exp(-np.abs(z))
    loss = _times(1.0 - t, np.maximum(z, 0.0)) + _times(t, np.maximum(-z, 0.0)) + np.log1p(e)
    return loss, (np.where(z >= 0, 1.0, e) / (1.0 + e) - t) * scale


def _binary_cross_entropy(p: Array, t: Array, parameter: float, scale: float) -> tuple[Array, Array]:
    loss = -(t * np.maximum(np.log(p), -100.0) + (1.0 - t) * np.maximum(np.log1p(-p), -100.0))
    return loss, (p - t) / np.maximum(p * (1.0 - p), 1e-12) * scale


def _mean_squared_error(p: Array, t: Array, parameter: float, scale: float) -> tuple[Array, Array]:
    d = p - t
    return d * d, d * (2.0 * scale)  # in this order: 2 * d may overflow


def _huber(p: Array, t: Array, delta: float, scale: float) -> tuple[Array, Array]:
    d = p - t
    size = np.abs(d)
    loss = np.where(size <= delta, 0.5 * d * d, delta * (size - 0.5 * delta))
    return loss, np.clip(d, -delta, delta) * scale


def _hinge(p: Array, t: Array, parameter: float, scale: float) -> tuple[Array, Array]:
    margin = 1.0 - t * p
    loss = np.where(margin <= 0, 0.0, margin)
    return loss, np.where(margin > 0, -t, loss) * scale  # else 0, or NaN


def _wasserstein(p: Array, t: Array, parameter: float, scale: float) -> tuple[Array, Array]:
    return -(t * p), -t * scale


LOSSES: dict[str, Loss] = {
    entry.name: entry
    for entry in (
        Loss(
            name="binary_cross_entropy_with_logits",
            formula="(1 - t) * max(z, 0) + t * max(-z, 0) + log(1 + exp(-|z|))",
            prediction="logits",
            evaluate=_binary_cross_entropy_with_logits,
            source="the negative log-likelihood of a Bernoulli variable, in the form that is stable for any logit",
        ),
        Loss(
            name="binary_cross_entropy",
            formula="-(t * log(p) + (1 - t) * log(1 - p)), each log at least -100, p * (1 - p) at least 1e-12",
            prediction="p",
            evaluate=_binary_cross_entropy,
            source="the same of the probability; the limits are PyTorch's",
            unit_interval=True,
        ),
        Loss(
            name="mean_squared_error",
            formula="(p - t)**2",
            prediction="p",
            evaluate=_mean_squared_error,
            source="least squares",
        ),
        Loss(
            name="huber",
            formula="(p - t)**2 / 2 if |p - t| <= delta else delta * (|p - t| - delta / 2)",
            prediction="p",
            evaluate=_huber,
            parameter="delta",
            default=1.0,
            source="Huber, 1964",
        ),
        Loss(
            name="hinge",
            formula="max(1 - t * p, 0)",
            prediction="p",
            evaluate=_hinge,
            source="the hinge loss of support vector machines, for targets of 1 and -1; of a GAN: Lim and Ye, 2017",
        ),
        Loss(
            name="wasserstein",
            formula="-t * p",
            prediction="p",
            evaluate=_wasserstein,
            source="Arjovsky et al., 2017: a critic's, for targets of 1 and -1",
            has_minimum=False,
        ),
    )
}


class RowFunction(NamedTuple):
    """A function of each row of a matrix; its gradient needs the result alone."""

    name: str
    formula: str
    forward: Callable[[Array], Array]  # ``forward(x) -> y``, over the last axis, on float64
    backward: Callable[[Array, Array], Array]  # ``backward(grad_y, y) -> grad_x``
    source: str


def _log_softmax(x: Array) -> Array:
    shifted: Array = x - np.max(x, axis=-1, keepdims=True)
    total: Array = np.sum(np.exp(shifted), axis=-1, keepdims=True)
    return shifted - np.log(total)


def _softmax_backward(grad_y: Array, y: Array) -> Array:
    dot: Array = np.sum(grad_y * y, axis=-1, keepdims=True)
    return y * (grad_y - dot)


def _log_softmax_backward(grad_y: Array, y: Array) -> Array:
    total: Array = np.sum(grad_y, axis=-1, keepdims=True)
    return grad_y - np.exp(y) * total


def _softmax(x: Array) -> Array:
    e: Array = np.exp(x - np.max(x, axis=-1, keepdims=True))
    total: Array = np.sum(e, axis=-1, keepdims=True)
    return e / total


ROW_FUNCTIONS: dict[str, RowFunction] = {
    entry.name: entry
    for entry in (
        RowFunction(
            name="softmax",
            formula="exp(x_i) / sum_j exp(x_j)",
            forward=_softmax,
            backward=_softmax_backward,
            source="Bridle, 1990",
        ),
        RowFunction(
            name="log_softmax",
            formula="x_i - log(sum_j exp(x_j))",
            forward=_log_softmax,
            backward=_log_softmax_backward,
            source="the logarithm of softmax, without its overflow",
        ),
    )
}


def softmax_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Loss ``-sum_j t_j log_softmax(z)_j`` of each row, and its gradient ``softmax(z) * sum_j t_j - t``."""
    log_p = _log_softmax(logits)
    loss = -np.sum(_times(targets, log_p), axis=-1)
    return loss, np.exp(log_p) * np.sum(targets, axis=-1, keepdims=True) - targets


def smoothing(label_smoothing: float, classes: int) -> tuple[float, float]:
    """``(keep, spread)``: label smoothing makes targets t ``keep * t + spread``."""
    return 1.0 - label_smoothing, label_smoothing / classes


class RowLoss(NamedTuple):
    """A loss that is the mean of a function of one row of logits and its targets.

    Attributes
    ----------
    formula, gradient
        Of a row, in terms of logits z and targets t.
    evaluate
        ``evaluate(logits, targets) -> (loss of each row, its gradient)``, on float64.
    """

    name: str
    formula: str
    gradient: str
    evaluate: Callable[[Array, Array], tuple[Array, Array]]
    source: str
    default: float = 0.0  # of the label smoothing, which every one takes


ROW_LOSSES: dict[str, RowLoss] = {
    entry.name: entry
    for entry in (
        RowLoss(
            name="softmax_cross_entropy",
            formula="-sum_j t_j * log_softmax(z)_j",
            gradient="softmax(z) * sum_j t_j - t",
            evaluate=softmax_cross_entropy,
            source="the negative log-likelihood of a categorical variable",
        ),
    )
}
