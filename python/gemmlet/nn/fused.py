"""Whole mini-batches in one call, on backends that can: what the networks' own steps do, without writing gradients.

The weights are those of the networks' own steps, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend
from ..formulas.activations import ACTIVATIONS
from ..training.plan import FusedLayer, FusedNetwork, GanRun, MlpRun
from .dense import Dense
from .optimizers import Optimizer, Plan
from .training import Samples

Array = NDArray[Any]
Order = NDArray[np.int64]
Factors = NDArray[np.float64]

# Below this share of numbers that are not 0, to skip zeros is faster (measured by `gemmlet bench epoch` on inputs of
# several densities: docs/performance.md).
SPARSE_BELOW = 0.5

# Between calls Python sees Ctrl-C: so long, in seconds, one should take.
_CALL_SECONDS = 0.1


# What a call raises that has trained nothing.
_REFUSALS = (TypeError, ValueError, MemoryError)


class Pace:
    """How many steps to take in a call, from how long those before it took.

    Attributes
    ----------
    steps : int
        In the next call.
    """

    def __init__(self) -> None:
        self.steps = self._following = 1
        self._is_fixed = False
        self._started = 0.0

    def start(self) -> None:
        """The call begins."""
        self._started = time.perf_counter()

    def following(self) -> int:
        """Steps in the call after the one that runs. To ask, while it runs, fixes them: they are prepared then."""
        self._is_fixed = True
        return self._following

    def stop(self, done: int) -> None:
        """It has ended, and took so many steps: fewer than it might have, at the end of an epoch."""
        seconds = max(time.perf_counter() - self._started, 1e-6)
        estimated = max(1, min(int(done * _CALL_SECONDS / seconds), 4 * self._following))
        self.steps, self._following = self._following if self._is_fixed else estimated, estimated
        self._is_fixed = False


Meanwhile = Callable[[], None]


class Steps(NamedTuple):
    """Fused training of the networks of one `fit`.

    Attributes
    ----------
    take : callable
        Takes some steps; what it takes and gives, `mlp_steps` and `gan_steps` say.
    write_back : callable
        Brings weights, optimizer states and averages up to date, which `take` may leave on a GPU: before anybody looks
        at them, and when `fit` ends, however it does.
    empty_pinned : callable
        As of backends.
    """

    take: Callable[..., Any]
    write_back: Callable[[], None]
    empty_pinned: Callable[[tuple[int, ...], np.dtype[Any]], Array]


def _network(dense: Dense, plan: Plan, average: Dense | None = None) -> FusedNetwork:
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
    return FusedNetwork(layers, plan.rule, plan.scalars)


def _can(
    backend: Backend, network: str, denses: Sequence[Dense], losses: Sequence[str], rules: Sequence[Optimizer]
) -> bool:
    names = [layer.activation for dense in denses for layer in dense.layers if layer.activation is not None]
    plans = [rule.plan(dense.parameters, np.ones(1)) for dense, rule in zip(denses, rules, strict=True)]
    return all(plan is not None and backend.fuses(network, names, losses, plan.rule) for plan in plans)


def mlp_steps(
    dense: Dense, loss: str, row_weight: float, samples: Samples, targets: Array, rule: Optimizer
) -> Steps | None:
    """Return ``take(order, batch_size, lr_factors, loss_sum, meanwhile) -> (loss_sum, right)``; or None.

    None if the backend has no such. `take` itself returns None, and does nothing, where a callback has given some
    parameters more updates than others. `lr_factors` has one for each mini-batch, see `Optimizer.plan`; what
    `meanwhile` is, see `MlpRun`.

    `loss` is ``"softmax_cross_entropy"`` or an elementwise one, whose sum over a row counts `row_weight` times.
    """
    backend = samples.backend
    if not _can(backend, "mlp", [dense], [loss], [rule]):
        return None
    feed, wanted = backend.hold(samples.feed(SPARSE_BELOW), np.ascontiguousarray(targets))

    def take(
        order: Order, batch: int, lr_factors: Factors, loss_sum: float, meanwhile: Meanwhile
    ) -> tuple[float, int] | None:
        plan = rule.plan(dense.parameters, lr_factors)
        if plan is None:
            return None
        network = _network(dense, plan)
        run = MlpRun(network, feed, wanted, loss, row_weight, order, min(batch, len(order)), loss_sum, meanwhile)
        trained = True
        try:
            return backend.train_mlp(run)
        except _REFUSALS:
            trained = False
            raise
        finally:
            # After Ctrl-C too: it comes as the call returns.
            if trained:
                rule.planned(dense.parameters, len(lr_factors))

    return Steps(take, partial(backend.write_back, feed), backend.empty_pinned)


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
) -> Steps | None:
    """Return ``take(order, batch_size, lr_factors, noise, decay, loss_sums, meanwhile) -> loss_sums``; or None.

    `decay` has a number for each step; losses are the generator's and the discriminator's.
    """
    generator, discriminator = networks.generator, networks.discriminator
    both = [generator, discriminator]
    backend = samples.backend
    if not _can(backend, "gan", both, ["binary_cross_entropy_with_logits"], [generator_rule, discriminator_rule]):
        return None
    feed, _ = backend.hold(samples.feed(0.0), None)

    def take(
        order: Order,
        batch: int,
        lr_factors: Factors,
        noise: Array,
        decay: Array,
        loss_sums: tuple[float, float],
        meanwhile: Meanwhile,
    ) -> tuple[float, float] | None:
        g = generator_rule.plan(generator.parameters, lr_factors)
        d = discriminator_rule.plan(discriminator.parameters, lr_factors)
        if g is None or d is None:
            return None
        run = GanRun(
            _network(generator, g, networks.average), _network(discriminator, d), feed, scale, shift, noise,
            real_target, non_saturating, order, min(batch, len(order)), decay, loss_sums, meanwhile,
        )  # fmt: skip
        trained = True
        try:
            return backend.train_gan(run)
        except _REFUSALS:
            trained = False
            raise
        finally:
            if trained:
                generator_rule.planned(generator.parameters, len(lr_factors))
                discriminator_rule.planned(discriminator.parameters, len(lr_factors))

    return Steps(take, partial(backend.write_back, feed), backend.empty_pinned)
