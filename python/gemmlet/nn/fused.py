"""Whole mini-batches in one call, on backends that can: what the networks' own steps do, without writing gradients.

The weights are those of the networks' own steps, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import select
from ..backends.numpy_backend import FusedLayer, NumpyBackend
from ..formulas.activations import ACTIVATIONS
from .dense import Dense
from .optimizers import Optimizer, Plan
from .training import Samples

Array = NDArray[Any]
Order = NDArray[np.int64]

# Below this share of numbers that are not 0, to skip zeros is faster (measured by `gemmlet bench epoch` on inputs of
# several densities: docs/performance.md).
SPARSE_BELOW = 0.5

# Between calls Python sees Ctrl-C: so long, in seconds, one should take.
_CALL_SECONDS = 0.1


# What a call raises that has trained nothing.
_REFUSALS = (TypeError, ValueError, MemoryError)


class Pace:
    """How many steps to take in a call, from how long the last one took."""

    def __init__(self) -> None:
        self.steps = 1
        self._started = 0.0

    def start(self) -> None:
        """The call begins."""
        self._started = time.perf_counter()

    def stop(self, done: int) -> None:
        """It has ended, and took so many steps: fewer than it might have, at the end of an epoch."""
        seconds = max(time.perf_counter() - self._started, 1e-6)
        self.steps = max(1, min(int(done * _CALL_SECONDS / seconds), 4 * self.steps))


def _layers(dense: Dense, plan: Plan, average: Dense | None = None) -> list[FusedLayer]:
    layers = []
    for i, layer in enumerate(dense.layers):
        parameter = layer.activation_parameter
        if parameter is None:
            parameter = 0.0 if layer.activation is None else ACTIVATIONS[layer.activation].default
        layers.append(
            FusedLayer(
                layer.weight,
                layer.bias,
                layer.activation,
                parameter,
                plan.states[2 * i],
                plan.states[2 * i + 1],
                None if average is None else average.layers[i].weight,
                None if average is None else average.layers[i].bias,
            )
        )
    return layers


def _can(
    backend: NumpyBackend, network: str, denses: Sequence[Dense], losses: Sequence[str], rules: Sequence[Optimizer]
) -> bool:
    names = [layer.activation for dense in denses for layer in dense.layers if layer.activation is not None]
    plans = [rule.plan(dense.parameters, 1) for dense, rule in zip(denses, rules, strict=True)]
    return all(plan is not None and backend.fuses(network, names, losses, plan.rule) for plan in plans)


def mlp_steps(
    dense: Dense, loss: str, row_weight: float, samples: Samples, targets: Array, rule: Optimizer
) -> Callable[[Order, int, float], tuple[float, int] | None] | None:
    """Return ``steps(order, batch_size, loss_sum) -> (loss_sum, right)``, or None if the backend has no such thing.

    `steps` itself returns None, and does nothing, where a callback has given some parameters more updates than others.

    `loss` is ``"softmax_cross_entropy"`` or an elementwise one, whose sum over a row counts `row_weight` times.
    """
    backend = select.of(samples.array) if samples.on_gpu else select.current()
    if not _can(backend, "mlp", [dense], [loss], [rule]):
        return None
    feed, wanted = backend.hold(samples.feed(SPARSE_BELOW), np.ascontiguousarray(targets))

    def steps(order: Order, batch: int, loss_sum: float) -> tuple[float, int] | None:
        batch = min(batch, len(order))
        count = -(-len(order) // batch)
        plan = rule.plan(dense.parameters, count)
        if plan is None:
            return None
        layers, trained = _layers(dense, plan), True
        try:
            return backend.train_mlp(
                layers, feed, wanted, loss, row_weight, order, batch, plan.rule, plan.scalars, loss_sum
            )
        except _REFUSALS:
            trained = False
            raise
        finally:
            # After Ctrl-C too: it comes as the call returns.
            if trained:
                rule.planned(dense.parameters, count)

    return steps


@dataclass(frozen=True)
class GanNetworks:
    """The networks of a `GAN`; `average` is the generator's moving average, if there is one."""

    generator: Dense
    discriminator: Dense
    average: Dense | None


def gan_steps(
    networks: GanNetworks,
    samples: Samples,
    scale: float,
    shift: float,
    real_target: float,
    non_saturating: bool,
    generator_rule: Optimizer,
    discriminator_rule: Optimizer,
) -> Callable[[Order, int, Array, NDArray[np.float64], tuple[float, float]], tuple[float, float] | None] | None:
    """Return ``steps(order, batch_size, noise, decay, loss_sums) -> loss_sums``, or None as above.

    `decay` has a number for each step; losses are the generator's and the discriminator's.
    """
    generator, discriminator = networks.generator, networks.discriminator
    both = [generator, discriminator]
    backend = select.of(samples.array) if samples.on_gpu else select.current()
    if not _can(backend, "gan", both, ["binary_cross_entropy_with_logits"], [generator_rule, discriminator_rule]):
        return None
    feed, _ = backend.hold(samples.feed(0.0), None)

    def steps(
        order: Order, batch: int, noise: Array, decay: NDArray[np.float64], loss_sums: tuple[float, float]
    ) -> tuple[float, float] | None:
        batch = min(batch, len(order))
        count = -(-len(order) // batch)
        g = generator_rule.plan(generator.parameters, count)
        d = discriminator_rule.plan(discriminator.parameters, count)
        if g is None or d is None:
            return None
        layers, trained = (_layers(generator, g, networks.average), _layers(discriminator, d)), True
        try:
            return backend.train_gan(
                *layers, feed, scale, shift, noise, real_target, non_saturating, order, batch, g.rule, g.scalars,
                d.rule, d.scalars, decay, loss_sums,
            )  # fmt: skip
        except _REFUSALS:
            trained = False
            raise
        finally:
            if trained:
                generator_rule.planned(generator.parameters, count)
                discriminator_rule.planned(discriminator.parameters, count)

    return steps
