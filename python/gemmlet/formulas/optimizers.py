"""Optimizer rules, one entry each: how a parameter and its state change, given the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Hyperparameters = tuple[float, ...]


class OptimizerRule(NamedTuple):
    """One optimizer rule."""

    name: str  # the kernel is ``<name>_update``
    formula: str
    state: tuple[str, ...]  # the names of the arrays it keeps for each parameter; they start at zero
    hyperparameters: tuple[str, ...]  # their names, in the order in which `apply` takes them
    # ``apply(param, grad, *state, *hyperparameters) -> (param, *state)``, on float64.
    apply: Callable[..., tuple[Array, ...]]
    no_decay: Mapping[str, float]  # those hyperparameters of parameters that do not decay
    source: str

    def without_decay(self, hyperparameters: Any) -> Any:
        """The hyperparameters of parameters that do not decay, in an array of one step, or of a row for each."""
        result = hyperparameters.copy()
        for name, value in self.no_decay.items():
            result[..., self.hyperparameters.index(name)] = value
        return result


def _sgd(p: Array, g: Array, lr: float, weight_decay: float) -> tuple[Array, ...]:
    return (p - lr * (g + weight_decay * p),)


def _momentum(
    p: Array, g: Array, velocity: Array, lr: float, weight_decay: float, momentum: float, nesterov: float
) -> tuple[Array, ...]:
    g = g + weight_decay * p
    velocity = momentum * velocity + g
    return p - lr * (g + momentum * velocity if nesterov else velocity), velocity


def _adam(p: Array, g: Array, m: Array, v: Array, *hyperparameters: float) -> tuple[Array, ...]:
    step_size, beta1, beta2, gain1, gain2, eps, correction, l2, shrink = hyperparameters
    g = g + l2 * p
    m = beta1 * m + gain1 * g
    v = beta2 * v + (gain2 * g) * g  # in this order: g * g may overflow
    return shrink * p - step_size * m / (np.sqrt(v) * correction + eps), m, v


def adam_hyperparameters(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool
) -> Hyperparameters:
    """Adam's hyperparameters at one step (Kingma and Ba, 2015); `decoupled` is AdamW (Loshchilov and Hutter, 2019).

    ``step_size = lr / (1 - beta1**step)`` and ``correction = 1 / sqrt(1 - beta2**step)`` undo the bias of moments that
    start at zero. ``gain = 1 - beta`` is formed here, in float64: float32 would lose half of it. The weight decay goes
    into the gradient (Adam) or shrinks the parameter itself (AdamW).
    """
    step_size = lr / (1.0 - beta1**step)
    correction = 1.0 / math.sqrt(1.0 - beta2**step)
    l2, shrink = (0.0, 1.0 - lr * weight_decay) if decoupled else (weight_decay, 1.0)
    return step_size, beta1, beta2, 1.0 - beta1, 1.0 - beta2, eps, correction, l2, shrink


def adam_table(
    step: int, rates: NDArray[np.float64], beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool
) -> NDArray[np.float64]:
    """The same at the steps from `step` on, a row for each of `rates`: the same bits, and sooner."""
    # Powers are Python's: NumPy's own are others in the last place.
    powers = [np.array([beta**s for s in range(step, step + len(rates))]) for beta in (beta1, beta2)]
    column = OPTIMIZER_RULES["adam"].hyperparameters.index
    table = np.empty((len(rates), len(OPTIMIZER_RULES["adam"].hyperparameters)))
    table[:] = adam_hyperparameters(step, float(rates[0]), beta1, beta2, eps, weight_decay, decoupled)
    table[:, column("step_size")] = rates / (1.0 - powers[0])
    table[:, column("correction")] = 1.0 / np.sqrt(1.0 - powers[1])
    if decoupled:
        table[:, column("shrink")] = 1.0 - rates * weight_decay
    return table


def moving_average(average: Any, value: Any, decay: float, gain: float) -> Any:
    """The next value of an exponential moving average; ``gain = 1 - decay``."""
    return decay * average + gain * value


OPTIMIZER_RULES: dict[str, OptimizerRule] = {
    entry.name: entry
    for entry in (
        OptimizerRule(
            name="sgd",
            formula="p -= lr * (g + weight_decay * p)",
            state=(),
            hyperparameters=("lr", "weight_decay"),
            apply=_sgd,
            no_decay={"weight_decay": 0.0},
            source="Robbins and Monro, 1951",
        ),
        OptimizerRule(
            name="momentum",
            formula="g += weight_decay * p; v = momentum * v + g; p -= lr * (g + momentum * v if nesterov else v)",
            state=("velocity",),
            hyperparameters=("lr", "weight_decay", "momentum", "nesterov"),
            apply=_momentum,
            no_decay={"weight_decay": 0.0},
            source="Sutskever et al., 2013, in PyTorch's form",
        ),
        OptimizerRule(
            name="adam",
            formula="g += l2 * p; m = beta1 * m + gain1 * g; v = beta2 * v + gain2 * g**2; "
            "p = shrink * p - step_size * m / (sqrt(v) * correction + eps)",
            state=("m", "v"),
            hyperparameters=("step_size", "beta1", "beta2", "gain1", "gain2", "eps", "correction", "l2", "shrink"),
            apply=_adam,
            no_decay={"l2": 0.0, "shrink": 1.0},
            source="Kingma and Ba, 2015; Loshchilov and Hutter, 2019",
        ),
    )
}
