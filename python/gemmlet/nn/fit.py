"""The loop of `fit`, which all networks share: epochs, calls of the backend, callbacks, and the history."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .. import _arguments as arguments
from .._memory import held
from .._threads import get_num_threads
from ..formulas.activations import ACTIVATIONS
from ..training import plan as training
from . import _checks as checks
from .dataset import Ahead, Array, Samples, sample_order
from .dense import Dense
from .normals import fill_normal
from .optimizers import Optimizer, ParameterGroup, Schedule, as_optimizer, lr_factors

# Between calls Python sees Ctrl-C: the seconds that one should take.
_CALL_SECONDS = 0.1

# Threads that draw noise while a GPU trains: enough to be done earlier.
_DRAWING_THREADS = 4

# What `Backend.train` raises that has taken no step.
_REFUSALS = (TypeError, ValueError, MemoryError)

# When `fit` calls its callback.
CALLBACK_EVERY = ("batch", "call", "epoch")


class StopTraining(Exception):  # noqa: N818 - it is a request, not an error
    """A callback raises it to end `fit` at once; `fit` then returns the history so far."""


@dataclass
class History:
    """How training an `MLP` went: one number per epoch, and the seconds it took.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the epoch, each mini-batch counted as it was before its update. The accuracy of a network with
        outputs "identity" is NaN. An epoch that was stopped counts with the mini-batches it had.
    validation_loss, validation_accuracy : list of float
        After the epoch; empty without validation data, NaN for an epoch that was stopped.
    seconds : float
        Wall-clock time of `fit`.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class GANHistory:
    """How training a `GAN` went: the mean losses of each epoch, and the seconds it took.

    Attributes
    ----------
    generator_loss, discriminator_loss : list of float
        Means over the epoch, each mini-batch counted as it was before its update. An epoch that was stopped counts with
        the mini-batches it had.
    seconds : float
        Wall-clock time of `fit`.
    """

    generator_loss: list[float] = field(default_factory=list)
    discriminator_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """What a callback of `MLP.fit` is told.

    Attributes
    ----------
    epoch, epochs, batch, batches : int
        Which one of how many was the last, counted from 1.
    loss, accuracy : float
        Means over the epoch so far.
    epoch_done : bool
        Whether this was the last mini-batch of the epoch.
    validation_loss, validation_accuracy : float or None
        After the epoch, if there is validation data.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    accuracy: float
    epoch_done: bool = False
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class GANProgress:
    """What a callback of `GAN.fit` is told.

    Attributes
    ----------
    epoch, epochs, batch, batches : int
        Which one of how many was the last, counted from 1.
    generator_loss, discriminator_loss : float
        Means over the epoch so far.
    epoch_done : bool
        Whether this was the last mini-batch of the epoch.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    generator_loss: float
    discriminator_loss: float
    epoch_done: bool = False


class CallBudget:
    """How many steps the backend takes in a call, from how long the calls before it took.

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
        """It has ended after `done` steps: fewer than it might have, at the end of an epoch."""
        seconds = max(time.perf_counter() - self._started, 1e-6)
        estimated = max(1, min(int(done * _CALL_SECONDS / seconds), 4 * self._following))
        self.steps, self._following = self._following if self._is_fixed else estimated, estimated
        self._is_fixed = False


@dataclass
class Settings:
    """The arguments of `fit` that any network takes; they are checked."""

    epochs: int
    batch_size: int
    lr_schedule: Schedule | None
    shuffle: bool
    verbose: bool
    callback: Callable[[Any], object] | None
    callback_every: str

    def __post_init__(self) -> None:
        self.epochs = checks.whole_number(self.epochs, "epochs", 1)
        self.batch_size = checks.whole_number(self.batch_size, "batch_size", 1)
        self.shuffle = arguments.flag(self.shuffle, "shuffle")
        self.verbose = arguments.flag(self.verbose, "verbose")
        checks.optional_callable(self.lr_schedule, "lr_schedule")
        checks.optional_callable(self.callback, "callback")
        checks.choice(self.callback_every, "callback_every", CALLBACK_EVERY)


class Trainable(ABC):
    """Base of the networks that have a `fit`.

    Attributes
    ----------
    steps : int
        How many steps `fit` has taken.
    """

    dtype: np.dtype[Any]
    ema_decay: float
    default_optimizer: Optimizer
    default_batch_size: int
    steps: int
    _progress: Callable[..., object]  # makes what the callback is told
    _shuffle: np.random.Generator
    # Of a network that is trained on noise: its generator, and the columns of a row.
    _training_noise: np.random.Generator | None = None
    latent_dim = 0

    @abstractmethod
    def _metrics(self, sums: Sequence[float], correct: int, seen: int) -> dict[str, float]:
        """What history and callback are told, by the names there, from the sums of the plan's losses over samples."""

    @property
    @abstractmethod
    def _trained(self) -> dict[str, list[Array]]:
        """The parameters that `fit` changes, by the names of the attributes that have them."""

    def _settings(self, epochs: int, batch_size: int | None, *others: Any) -> Settings:
        return Settings(epochs, self.default_batch_size if batch_size is None else batch_size, *others)

    def _optimizer(self, optimizer: str | Optimizer | None) -> Optimizer:
        return self.default_optimizer.fresh() if optimizer is None else as_optimizer(optimizer)

    def _decay(self, steps: Any) -> Any:
        """The moving average's decay after `steps` steps, a number or an array: at first it follows closely."""
        return np.minimum(self.ema_decay, (1 + steps) / (10 + steps))

    def _draw(self, rng: np.random.Generator, n: int) -> Array:
        # Drawn in float64 for either dtype, so that both get the same numbers.
        return rng.standard_normal((n, self.latent_dim)).astype(self.dtype, copy=False)

    def _train(
        self,
        history: Any,
        samples: Samples,
        plan: training.TrainingPlan,
        groups: Sequence[ParameterGroup],
        settings: Settings,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Take all steps of a `fit`; `groups`: one for each of `plan.updates`, in their order."""
        parameters = [array for arrays in self._trained.values() for array in arrays]

        def check_trained() -> None:
            """Raise ValueError if a parameter is read-only: before a step, which might else stop halfway."""
            if not all([array.flags.writeable for array in parameters]):  # noqa: C419 - a list is faster
                named = [(name, i, a) for name, arrays in self._trained.items() for i, a in enumerate(arrays)]
                wrong = next(f"{name}[{i}]" for name, i, array in named if not array.flags.writeable)
                raise ValueError(f"{wrong} is read-only")

        check_trained()
        started, n = time.perf_counter(), len(samples)
        _held = held(*parameters)  # nobody can resize them until the end
        epochs, size, callback, every = settings.epochs, settings.batch_size, settings.callback, settings.callback_every
        batches = math.ceil(n / size)
        backend = samples.backend
        plan = backend.stage(plan)
        # The reference takes a step a call: it may raise in the midst of several.
        one_by_one = (callback is not None and every == "batch") or not backend.supports_fused(plan)
        budget, orders = CallBudget(), Ahead(self._shuffle if settings.shuffle else None, sample_order)

        def draw_by_threads(rng: np.random.Generator, n: int) -> Array:
            noise = backend.empty_pinned((n, self.latent_dim), self.dtype)
            fill_normal(rng, noise.reshape(-1), min(get_num_threads(), _DRAWING_THREADS))
            return noise

        noises = Ahead(self._training_noise, self._draw, draw_by_threads)

        def prepare(epoch: int, rest: int) -> None:
            """Draw what the next call takes, if the one that runs leaves `rest` samples of its epoch."""
            if not rest and epoch < epochs:
                rest = n
                orders.prepare(rest)
            if rest and self._training_noise is not None:
                noises.prepare(min(rest, size * (1 if one_by_one else budget.following())))

        def call(epoch: int, first: int, order: Array, sums: tuple[float, ...]) -> training.Outcome:
            """Train on samples of the epoch, from `first` on."""
            noise = None if self._training_noise is None else noises.take(len(order))
            steps = math.ceil(len(order) / size)
            factors = lr_factors(settings.lr_schedule, (epoch - 1) * batches + first // size, steps, epochs * batches)
            batch = training.Batches(
                order,
                min(size, len(order)),
                tuple([group.hyperparameters(factors) for group in groups]),
                sums,
                self._decay(self.steps + np.arange(1, steps + 1)) if self.ema_decay else None,
                noise,
                partial(prepare, epoch, n - first - len(order)),
            )
            check_trained()  # a callback or the schedule may have changed them
            budget.start()
            trained = True
            try:
                return backend.train(plan, batch)
            except _REFUSALS:
                trained = False
                raise
            finally:
                # After Ctrl-C too: it comes as the call returns.
                if trained:
                    budget.stop(steps)
                    self.steps += steps
                    for group in groups:
                        group.advance(steps)

        def log(epoch: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                getattr(history, name).append(value)
            if settings.verbose:
                shown = "  ".join(f"{_LABELS.get(k, k.replace('_', ' '))} {v:.4f}" for k, v in metrics.items())
                print(f"epoch {epoch}/{epochs}  {shown}", flush=True)

        try:
            for epoch in range(1, epochs + 1):
                sums, correct, seen, done = (0.0,) * len(plan.losses), 0, 0, False
                order = orders.take(n)
                try:
                    while not done:
                        where = order[seen : seen + size * (1 if one_by_one else budget.steps)]
                        sums, more = call(epoch, seen, where, sums)
                        seen, correct = seen + len(where), correct + more
                        done = seen == n
                        if done or callback is not None:
                            metrics = self._metrics(sums, correct, seen)
                        if done:
                            if validate is not None:
                                backend.write_back(plan)
                                metrics |= validate()
                            log(epoch, metrics)
                        if callback is not None and (done or every != "epoch"):
                            backend.write_back(plan)
                            batch = math.ceil(seen / size)
                            callback(
                                self._progress(
                                    epoch=epoch, epochs=epochs, batch=batch, batches=batches, epoch_done=done, **metrics
                                )
                            )
                except StopTraining:
                    if not done and seen:
                        unknown = {} if validate is None else dict.fromkeys(VALIDATION, math.nan)
                        log(epoch, self._metrics(sums, correct, seen) | unknown)
                    break
        finally:
            backend.write_back(plan)
        history.seconds = time.perf_counter() - started


# What is said of validation data, and how it is printed.
VALIDATION = ("validation_loss", "validation_accuracy")
_LABELS = {"validation_accuracy": "accuracy"}


def network_of(dense: Dense, group: ParameterGroup | None = None, average: Dense | None = None) -> training.Network:
    """A stack of layers as a plan has it, with an optimizer's state for each parameter, and moving averages.

    The parameters are views, whose shape nobody can change.
    """
    states = [()] * len(dense.parameters) if group is None else [state.arrays for state in group.states]
    averages = [None] * len(states) if average is None else average.parameters
    parameters = map(training.Parameter, [array.view() for array in dense.parameters], states, averages)
    operations: list[training.Linear | training.Activation] = []
    for layer, weight in zip(dense.layers, parameters, strict=False):
        operations.append(training.Linear(weight, next(parameters)))
        if layer.activation is not None:
            number = ACTIVATIONS[layer.activation].default
            if layer.activation_parameter is not None:
                number = layer.activation_parameter
            operations.append(training.Activation(layer.activation, float(number)))
    return tuple(operations)
