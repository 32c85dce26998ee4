"""The loop of `fit`, which all networks share: epochs, calls of the backend, callbacks, and the history."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import numpy as np

from .. import _arguments as arguments
from .._files import check_replaceable
from .._memory import held
from .._signals import deferred_signals
from .._threads import get_num_threads
from ..backends.base import Backend
from ..formulas.activations import ACTIVATIONS
from ..formulas.dropout import ALL
from ..formulas.random import STREAMS
from ..training import plan as training
from . import _checks as checks
from . import display
from .augment import Augmented
from .bar import Bar, printer
from .checkpoints import Checkpoints, Position, lists_of
from .dataset import Ahead, Array, Samples, checksum, not_finite, sample_order
from .dense import Dense
from .files import Saved, copy_into, named_tensors
from .normals import fill_normal
from .optimizers import Optimizer, ParameterGroup, as_optimizer
from .schedules import EarlyStopping, ReduceOnPlateau, Schedule, lr_factors

# Between calls Python sees Ctrl-C: the seconds that one should take.
_CALL_SECONDS = 0.1

# Phases that add to the sums of an epoch.
_SUMMED = training.Loss, training.Penalty

# Threads that draw noise while a GPU trains: enough to be done earlier.
_DRAWING_THREADS = 4

# Between two copies of the state, which training goes back to if it diverges: this multiple of the time a copy takes.
_COPY_EVERY = 200

# When `fit` calls its callback.
CALLBACK_EVERY = ("batch", "call", "epoch")


class StopTraining(Exception):  # noqa: N818 - it is a request, not an error
    """A callback raises it to end `fit` at once; `fit` then returns the history so far."""


class DivergedError(ArithmeticError):
    """`fit` raises it when a loss or a parameter is no longer finite.

    The message names epoch and mini-batches, to the call of the backend. Parameters, moving averages, state of the
    optimizer, random streams and `steps` are those of one moment shortly before, when all parameters were finite.

    Attributes
    ----------
    history : History or GANHistory
        What `fit` would have returned, of the epochs that were complete by then.
    """

    def __init__(self, message: str, history: Any) -> None:
        super().__init__(message)
        self.history = history

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.history)


class CheckpointError(OSError):
    """`fit` raises it at its end, when all is learnt, if its last checkpoint cannot be written: the disk is full, say.

    Attributes
    ----------
    history : History or GANHistory
        What `fit` would have returned, of the epochs that are complete.
    """

    def __init__(self, number: int | None, message: str | None, filename: Any, history: Any = None) -> None:
        super().__init__(number, message, filename)
        self.history = history


class _Shown:
    """What histories look like."""

    seconds: float

    def _repr_html_(self) -> str:
        return display.history_html(lists_of(self), self.seconds)

    def plot(self, ax: Any = None, names: Sequence[str] | None = None) -> Any:
        """Draw curves over the epochs with matplotlib, and return the axes.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where; by default a new figure.
        names : list of str, optional
            What: lists of the history, ``["accuracy", "validation_accuracy"]`` say. By default all losses.

        Raises
        ------
        ImportError
            The package matplotlib is missing.
        ValueError
            There is no list of a name.
        """
        return display.plot(lists_of(self), names, ax)


@dataclass
class History(_Shown):
    """How training an `MLP` went: one number per epoch, and the seconds it took.

    Attributes
    ----------
    loss, accuracy : list of float
        Means over the epoch, each mini-batch counted as it was before its update. The accuracy is NaN where the targets
        are no classes: numbers, soft labels, several labels a sample. The loss has the penalties `l1` and `l2` of the
        network. An epoch that was stopped counts with the mini-batches it had.
    validation_loss, validation_accuracy : list of float
        After the epoch; empty without validation data, NaN for an epoch that was stopped.
    metrics : dict of lists of float
        Likewise of the `metrics` that `fit` was given, by their names: ``metrics["validation_macro_f1"]``, say.
    seconds : float
        Wall-clock time of `fit`, with that before the checkpoint which it went on from.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def __getitem__(self, name: str) -> list[float]:
        """The list of this name, ``history["validation_macro_f1"]`` say, a monitor's."""
        return lists_of(self)[name]


@dataclass
class GANHistory(_Shown):
    """How training a `GAN` went: the mean losses of each epoch, and the seconds it took.

    Attributes
    ----------
    generator_loss, discriminator_loss : list of float
        Means over the epoch, each mini-batch counted as it was before its update. An epoch that was stopped counts with
        the mini-batches it had.
    seconds : float
        Wall-clock time of `fit`, with that before the checkpoint which it went on from.
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
    metrics : mapping, optional
        Likewise of the `metrics` that `fit` was given, by their names in the history.
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
    metrics: Mapping[str, float] | None = None


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
        In the next call: at most `most`.
    """

    def __init__(self, most: int = sys.maxsize) -> None:
        self.steps = self._following = 1
        self._most = most
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
        estimated = max(1, min(int(done * _CALL_SECONDS / seconds), 4 * self._following, self._most))
        self.steps, self._following = self._following if self._is_fixed else estimated, estimated
        self._is_fixed = False


@dataclass
class Settings:
    """The arguments of `fit` that any network takes; they are checked."""

    epochs: int
    batch_size: int
    lr_schedule: Schedule | ReduceOnPlateau | None
    shuffle: bool
    verbose: int
    callback: Callable[[Any], object] | None
    callback_every: str
    checkpoint: Any = None  # a path becomes a Path
    resume: Any = False  # likewise
    early_stopping: EarlyStopping | None = None

    def __post_init__(self) -> None:
        self.epochs = checks.whole_number(self.epochs, "epochs", 1)
        self.batch_size = checks.batch_size(self.batch_size, "batch_size")
        self.shuffle = arguments.flag(self.shuffle, "shuffle")
        self.verbose = checks.verbosity(self.verbose, "verbose")
        if not isinstance(self.lr_schedule, ReduceOnPlateau):
            checks.optional_callable(self.lr_schedule, "lr_schedule")
        if self.early_stopping is not None and not isinstance(self.early_stopping, EarlyStopping):
            raise TypeError(f"early_stopping must be an EarlyStopping, got {type(self.early_stopping).__name__}")
        checks.optional_callable(self.callback, "callback")
        checks.choice(self.callback_every, "callback_every", CALLBACK_EVERY)
        if self.checkpoint is not None:
            self.checkpoint = checks.path(self.checkpoint, "checkpoint")
            folder = Path(os.path.realpath(self.checkpoint)).parent
            if not folder.is_dir():
                raise FileNotFoundError(f"checkpoint is to be in {folder}, which is no folder")
            check_replaceable(self.checkpoint)
        if isinstance(self.resume, bool | np.bool_):
            if self.resume and self.checkpoint is None:
                raise ValueError("resume=True needs checkpoint, or give resume the path")
            exists = self.checkpoint is not None and self.checkpoint.exists()
            self.resume = self.checkpoint if self.resume and exists else None
        else:
            self.resume = checks.path(self.resume, "resume", "True, False or a path")


# Takes the network, a value and its name, and returns what is to be the network's attribute.
Check = Callable[[Any, Any, str], Any]


def check_fixed(model: Trainable, value: Any, name: str) -> Any:
    """Return the value of an attribute that a network has from its beginning."""
    if name in vars(model):
        raise AttributeError(f"{name} cannot be changed: a network has it from its beginning")
    return value


class Trainable(Saved):
    """Base of the networks that have a `fit`.

    Attributes
    ----------
    steps : int
        How many steps `fit` has taken.
    """

    _progress: Callable[..., object]  # makes what the callback is told
    # Checks of attributes, wherever they are set; numbers become Python's, which files have.
    _checks: ClassVar[dict[str, Check]] = {
        "steps": lambda _, value, name: checks.whole_number(value, name, 0),
        "default_batch_size": lambda _, value, name: checks.batch_size(value, name),
        "default_optimizer": lambda _, value, name: as_optimizer(value, name),
        "label_smoothing": lambda _, value, name: checks.fraction(value, name),
    }
    _shuffle: np.random.Generator
    # Of a network that is trained on noise: its generator, and the columns of a row.
    _training_noise: np.random.Generator | None = None
    latent_dim = 0
    # Whether the first `fit`, which is still to come, sets the dtype.
    _follows_samples = False
    # What stands for arguments of the constructor that were left open, by their names. It is replaced, never changed.
    _found: Mapping[str, Any] = MappingProxyType({})
    # Of the last `fit`.
    _history: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._checks.get(name)
        super().__setattr__(name, value if check is None else check(self, value, name))

    @property
    def ema_decay(self) -> float:
        """The decay of the moving average per step; 0 if there is none, from the beginning."""
        return self._ema_decay

    @ema_decay.setter
    def ema_decay(self, value: float) -> None:
        decay = checks.fraction(value, "ema_decay")
        if bool(decay) != bool(getattr(self, "_ema_decay", decay)):
            raise ValueError(f"ema_decay cannot become {decay:g}: a network has averages from its beginning, or never")
        self._ema_decay = decay

    @abstractmethod
    def _draw_layers(self, dtype: np.dtype[Any]) -> None:
        """Set `dtype`, and draw the first parameters, all from `seed`."""

    @abstractmethod
    def _parts(self) -> dict[str, Dense]:
        """All stacks of layers, by name."""

    @abstractmethod
    def _metrics(self, sums: Sequence[float], correct: float, seen: int) -> dict[str, float]:
        """What history and callback are told, by the names there, from the sums of the plan's losses over samples."""

    @property
    @abstractmethod
    def _parameters(self) -> dict[str, list[Array]]:
        """The parameters that `fit` changes, by the names of the attributes that have them."""

    @property
    def _key(self) -> int:
        """The key of random numbers that are counted (`gemmlet.formulas.random`): 64 bits, by any seed."""
        return int(np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0])

    def _settings(self, epochs: int, batch_size: int | None, *others: Any) -> Settings:
        return Settings(epochs, self.default_batch_size if batch_size is None else batch_size, *others)

    def _optimizer(self, optimizer: str | Optimizer | None) -> Optimizer:
        return self.default_optimizer.fresh() if optimizer is None else as_optimizer(optimizer)

    def _settle(self, dtype: np.dtype[Any]) -> None:
        """Take the dtype of the first `fit`'s samples: parameters are as if the network had been made with it."""
        self._follows_samples = False
        if dtype != self.dtype:
            before = self._parts()
            self._draw_layers(dtype)
            self._found = {**self._found, "dtype": self.dtype}
            for name, dense in self._parts().items():
                dense.keep_changes(before[name])

    def _decay(self, steps: Any) -> Any:
        """The moving average's decay after `steps` steps, a number or an array: at first it follows closely."""
        return np.minimum(self.ema_decay, (1 + steps) / (10 + steps))

    @property
    def augment_seed(self) -> int:
        """The seed that `fit` gives `gemmlet.data.augment`: below 2**64, made of `seed`, which may be of any size."""
        return int(np.random.SeedSequence(self.seed, spawn_key=(256,)).generate_state(1, np.uint64)[0])

    def _draw(self, rng: np.random.Generator, n: int) -> Array:
        # Drawn in float64 for either dtype, so that both get the same numbers.
        return rng.standard_normal((n, self.latent_dim)).astype(self.dtype, copy=False)


class fitting:  # noqa: N801 - it is used as a function
    """A fit of a network, which must be in no other thread's; what it sets is set back if it takes no step."""

    _under_way: ClassVar[dict[int, fitting]] = {}  # by the id of the network

    def __init__(self, model: Trainable) -> None:
        self._model, self._thread = model, threading.get_ident()

    def __enter__(self) -> None:
        # A callback may call `fit`.
        if self._under_way.setdefault(id(self._model), self)._thread != self._thread:
            raise RuntimeError("this network is in a fit of another thread: wait until that ends, or take a copy")
        self._before = dict(vars(self._model))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._under_way.get(id(self._model)) is self:
            del self._under_way[id(self._model)]
        if error is not None and self._model.steps == self._before["steps"]:
            attributes = vars(self._model)
            for name in attributes.keys() - self._before:
                del attributes[name]
            attributes.update(self._before)

    @classmethod
    def is_under_way(cls, model: Trainable) -> bool:
        """Whether a network is in a fit, of any thread."""
        return id(model) in cls._under_way


os.register_at_fork(after_in_child=fitting._under_way.clear)  # the other threads are not in the child


class Training:
    """The loop of one `fit`; `groups`: one for each of `plan.updates`, in their order; `data`: its arrays, by argument.

    Steps are taken, and counted, in whole calls: signals wait for the end of one, and a call that fails in the midst of
    its steps, or diverges, is undone, back to the last copy.
    """

    def __init__(
        self,
        model: Trainable,
        history: Any,
        samples: Samples,
        plan: training.TrainingPlan,
        optimizers: dict[str, Optimizer],
        groups: Sequence[ParameterGroup],
        settings: Settings,
        data: Mapping[str, Any],
        validate: Callable[[], dict[str, float]] | None = None,
        more_facts: dict[str, Any] | None = None,
        augmented: Augmented | None = None,
    ) -> None:
        self.model, self.history, self.groups = model, history, groups
        self._samples, self._settings, self._validate = samples, settings, validate
        self._augmented = augmented  # the samples, if each epoch has others
        self._n, self._size = len(samples), settings.batch_size
        self._batches = math.ceil(self._n / self._size)
        # Samples and mini-batches of the epoch before those that `_call` is given.
        self._skipped = self._first_batch = 0
        self._backend = samples.backend
        self._plan = self._backend.stage(plan)
        # The reference takes a step a call: it may raise in the midst of several.
        self._every_batch = settings.callback is not None and settings.callback_every == "batch"
        self._one_by_one = self._every_batch or not self._backend.supports_fused(self._plan)
        self._budget = CallBudget() if augmented is None else CallBudget(augmented.steps)
        self._lines = printer(settings.verbose, settings.epochs) if settings.verbose else None
        self._bar = self._lines if isinstance(self._lines, Bar) else None
        self._orders = Ahead(model._shuffle if settings.shuffle else None, sample_order)
        by_threads = partial(_draw_by_threads, self._backend, model.latent_dim, model.dtype)
        self._noises = Ahead(model._training_noise, model._draw, by_threads)
        self._arrays = [array for arrays in model._parameters.values() for array in arrays]
        self._layouts = [(array.shape, array.dtype) for array in self._arrays]
        self._check_writeable()
        losses = plan.losses
        self._has_classes = losses[0].has_classes
        self.at = self._start_of(1, len([p for p in plan.phases if isinstance(p, _SUMMED)]))
        self._validated = [] if validate is None else [n for n in lists_of(history) if n.startswith("validation_")]
        if settings.early_stopping is not None:
            self._check_monitor(settings.early_stopping, "early_stopping")
        if settings.lr_schedule is not None:
            self._check_monitor(settings.lr_schedule, "lr_schedule")
        facts: dict[str, Any] = {}
        if settings.checkpoint is not None or settings.resume is not None:
            facts = (more_facts or {}) | {"samples": self._n, "batch_size": self._size, "shuffle": settings.shuffle}
            facts |= {"validation_data": validate is not None, "lr_schedule": settings.lr_schedule is not None}
            facts["augment"] = None if augmented is None else repr(augmented.settings)
            facts["early_stopping"] = None if settings.early_stopping is None else repr(settings.early_stopping)
            facts |= {f"checksum of {name}": checksum(rows) for name, rows in data.items()}
        self._checkpoints = Checkpoints(settings.checkpoint, model, optimizers, groups, facts, history, self.at)
        if settings.resume is not None:
            self.at = self._checkpoints.resume(settings.resume, settings.epochs)
        self.parameters = [p for network in range(len(plan.networks)) for p in plan.parameters(network)]
        self._held = held(*self._arrays)  # nobody can resize them until the end
        started = time.perf_counter()
        # The first state is kept until all samples have been used once: one that is not finite undoes the whole fit.
        self._start = self._good = _Copy(self)
        self._first_epoch, self._is_undone = self.at.epoch, False
        self._copy_at = _next_copy(started)

    def run(self) -> None:
        """Train."""
        object.__setattr__(self.model, "_history", self.history)  # it has no check
        try:
            with contextlib.suppress(StopTraining):
                while self.at.epoch <= self._settings.epochs and not self._is_over():
                    self._epoch(self._order())
            self._warn_of_nan()
            self._check()
            if self._checkpoints.is_missing(self.at):
                with deferred_signals():
                    self._write_last()
            if self.at.seen:
                unknown = {} if self._validate is None else dict.fromkeys(self._validated, math.nan)
                self._log(self._metrics() | unknown)
            if self._checkpoints.best:
                with deferred_signals():
                    self._restore_best()
        except BaseException as error:
            if self._bar is not None:
                with contextlib.suppress(OSError):
                    self._bar.close()
            with deferred_signals():
                with contextlib.suppress(ValueError):
                    self._check_layouts()
                if not self._is_undone:
                    try:
                        self._backend.write_back(self._plan)
                    except Exception:  # it may be the GPU that failed
                        self._undo(self._good)
                    if not self._is_finite():  # and something else went wrong before that was noticed
                        self._good.restore(self)
                if self._checkpoints.is_missing(self.at) and not isinstance(error, CheckpointError):
                    try:
                        self._checkpoints.write(self.at)
                    except Exception as failed:
                        error.add_note(f"The last checkpoint could not be written: {failed}")
            raise
        self.history.seconds = self._checkpoints.seconds

    def _write_last(self) -> None:
        try:
            self._checkpoints.write(self.at)
        except OSError as error:
            self.history.seconds = self._checkpoints.seconds
            raise CheckpointError(error.errno, error.strerror, error.filename, self.history) from error

    def _order(self) -> Any:
        """The order of the samples in the next epoch."""
        return self._orders.take(self._n)

    def _epoch(self, order: Any) -> None:
        """The rest of an epoch, which takes the samples in this order."""
        at, n, done = self.at, self._n, False
        while not done:
            if at.seen < n:
                self._call(order)
            done = at.seen == n
            self._report(done=done)

    def _report(self, *, done: bool) -> None:
        """What follows a call, the last one of its epoch or not: validation, history, callback, checkpoint."""
        settings, at = self._settings, self.at
        if self._bar is not None and self._bar.is_due:
            self._bar.advance(at.epoch, self._batch(), self._batches, self._metrics())
        if done or settings.callback is not None:
            metrics, batch = self._metrics(), self._batch()
        if done:
            if self._validate is not None:
                self._backend.write_back(self._plan)
                metrics |= self._validate()
            self._log(metrics)
        if settings.callback is not None and (done or settings.callback_every != "epoch"):
            self._backend.write_back(self._plan)
            told = {"epoch": at.epoch, "epochs": settings.epochs, "batch": batch}
            if extra := {name: metrics.pop(name) for name in self._validated if name not in VALIDATION and done}:
                metrics["metrics"] = extra  # type: ignore[assignment]
            settings.callback(self.model._progress(**told, batches=self._batches, epoch_done=done, **metrics))
        if self._checkpoints.is_due(self.at, epoch_done=done):
            with deferred_signals():
                self._keep()  # so that what is gone back to is never older than the checkpoint
            self._checkpoints.try_to_write(self.at)

    def _batch(self) -> int:
        """The mini-batches of the epoch that are done."""
        return self._first_batch + math.ceil((self.at.seen - self._skipped) / self._size)

    def _of_batches(self) -> str:
        return f" of {self._batches}" if self._batches else ""

    def _call(self, order: Array) -> None:
        """Take the steps of one call of the backend, on the next samples of the epoch."""
        at, size, model = self.at, self._size, self.model
        begin = at.seen - self._skipped
        where = order[begin : begin + size * (1 if self._one_by_one else self._budget.steps)]
        steps, first = math.ceil(len(where) / size), self._first_batch + begin // size
        factors = self._factors(first, steps)
        with deferred_signals():
            # A callback or the schedule may have changed them.
            self._check_layouts()
            self._check_writeable()
            if time.perf_counter() >= self._copy_at:
                self._keep()
            hyperparameters = tuple([group.hyperparameters(factors) for group in self.groups])
            rows = where
            if self._augmented is not None:
                # An epoch counts as the steps before it, over all fits, so that none has the images of another.
                rows = self._augmented.take(where, model.steps - first)
                if not self._augmented.on_gpu:
                    self._backend.restage(self._plan)
            noise, stream = None, model._training_noise
            if stream is not None:
                before, noise = stream.bit_generator.state, self._noises.take(len(where))
            decay = model._decay(model.steps + np.arange(1, steps + 1)) if model.ema_decay else None
            rest = self._n - at.seen - len(where)
            batches = training.Batches(
                rows,
                min(size, len(rows)),
                hyperparameters,
                at.sums,
                decay,
                noise,
                lambda: self._prepare(rest),
                model.steps,
            )
            self._budget.start()
            try:
                sums, correct = self._backend.train(self._plan, batches)
            except BaseException:
                if self._plan.is_torn:
                    self._undo(self._good)
                elif stream is not None:
                    stream.bit_generator.state = before
                raise
            self._budget.stop(steps)
            if not all(map(math.isfinite, sums)):
                last = first + steps
                which = f"batch {last}" if steps == 1 else f"batches {first + 1} to {last}"
                self._diverge(f"in epoch {at.epoch}, {which}{self._of_batches()}: the loss is no longer finite")
            at.seen, at.sums, at.correct = at.seen + len(where), sums, at.correct + correct
            model.steps += steps
            for group in self.groups:
                group.advance(steps)

    # What follows the history.

    def _check_monitor(self, follower: Any, argument: str) -> None:
        """Raise ValueError unless the history has what `follower` monitors."""
        if not isinstance(follower, EarlyStopping | ReduceOnPlateau):
            return
        lists = list(lists_of(self.history))
        known = lists if self._validate is not None else [n for n in lists if not n.startswith("validation_")]
        if follower.monitor not in known:
            hint = "; there is no validation data" if known != lists else ""
            raise ValueError(f"{argument} monitors {follower.monitor!r}, this fit has {', '.join(known)}{hint}")

    def _monitored(self, follower: EarlyStopping | ReduceOnPlateau) -> list[float]:
        return lists_of(self.history)[follower.monitor][: self.at.epoch - 1]

    def _factors(self, first: int, steps: int) -> Array:
        """What the learning rate is multiplied by in the next steps, from mini-batch `first` of the epoch on."""
        schedule = self._settings.lr_schedule
        if isinstance(schedule, ReduceOnPlateau):
            return np.full(steps, schedule.factor_after(self._monitored(schedule)))
        if schedule is None:
            return lr_factors(None, first, steps, 0)
        done, total = (self.at.epoch - 1) * self._batches + first, self._settings.epochs * self._batches
        return lr_factors(schedule, done, steps, total)

    def _is_over(self) -> bool:
        early = self._settings.early_stopping
        return early is not None and early.is_over(self._monitored(early))

    def _warn_of_nan(self) -> None:
        """Say so if numbers that are NaN, and so never better, have ended `fit` or lowered the learning rate."""
        for follower, done in (
            (self._settings.early_stopping, "early_stopping has ended fit"),
            (self._settings.lr_schedule, "lr_schedule has lowered the learning rate"),
        ):
            if isinstance(follower, EarlyStopping | ReduceOnPlateau):
                values = self._monitored(follower)
                if len(values) > follower.patience and np.isnan(values).all():
                    message = f"{done}, as {follower.monitor} was NaN after each epoch"
                    warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _keep_best(self) -> None:
        """Keep the parameters of an epoch that was the best so far; signals are deferred."""
        early = self._settings.early_stopping
        if early is None or not early.restore_best or not early.is_best(self._monitored(early)):
            return
        self._backend.write_back(self._plan)
        self._checkpoints.best = {
            f"{prefix}{name}": array.copy()
            for prefix, dense in self.model._parts().items()
            for name, array in named_tensors(dense).items()
        }

    def _restore_best(self) -> None:
        for prefix, dense in self.model._parts().items():
            copy_into(dense, self._checkpoints.best, prefix)

    def _prepare(self, rest: int) -> None:
        """Draw what the next call takes, if the one that runs leaves `rest` samples of its epoch."""
        if not rest and self.at.epoch < self._settings.epochs:
            rest = self._n
            self._orders.prepare(rest)
        if rest and self.model._training_noise is not None:
            self._noises.prepare(min(rest, self._size * (1 if self._one_by_one else self._budget.following())))

    def _start_of(self, epoch: int, losses: int) -> Position:
        # Checkpoints alone need the order.
        is_kept = self._settings.shuffle and self._settings.checkpoint is not None
        order = dict(self.model._shuffle.bit_generator.state) if is_kept else None
        return Position(epoch, sums=(0.0,) * losses, order=order)

    def _metrics(self) -> dict[str, float]:
        # Without classes no row is correct: what is said of it is NaN.
        correct = self.at.correct if self._has_classes else math.nan
        return self.model._metrics(self.at.sums, correct, self.at.seen)

    def _log(self, metrics: dict[str, float]) -> None:
        """Add the epoch to the history, and begin the next one."""
        epoch = self.at.epoch
        with deferred_signals():
            for name, value in metrics.items():
                values = getattr(self.history, name, None)
                (self.history.metrics[name] if values is None else values).append(value)
            is_whole = self.at.seen == self._n
            self.at = self._start_of(epoch + 1, len(self.at.sums))
            self._skipped = self._first_batch = 0
            if is_whole:
                self._keep_best()
        if self._lines is not None:
            self._lines.end_epoch(epoch, metrics)

    def _check_writeable(self) -> None:
        """Raise ValueError if a parameter is read-only: before a step, which might else stop halfway."""
        if not all([array.flags.writeable for array in self._arrays]):  # noqa: C419 - a list is faster
            named = [(name, i, a) for name, arrays in self.model._parameters.items() for i, a in enumerate(arrays)]
            wrong = next(f"{name}[{i}]" for name, i, array in named if not array.flags.writeable)
            raise ValueError(f"{wrong} is read-only")

    def _check_layouts(self) -> None:
        """Raise ValueError if a parameter has got another shape or dtype, which are set back: files need them."""
        # Asked for once: another thread may change them meanwhile.
        found = [(array.shape, array.dtype) for array in self._arrays]
        if found == self._layouts:
            return
        for array, (shape, dtype) in zip(self._arrays, self._layouts, strict=True):
            array.dtype = dtype  # type: ignore[misc]
            array.shape = shape
        (shape, dtype), (old_shape, old_dtype) = next(
            (a, b) for a, b in zip(found, self._layouts, strict=True) if a != b
        )
        raise ValueError(
            f"a parameter was made {dtype} of shape {shape} while fit ran; expected {old_dtype} of shape {old_shape}, "
            "which it is again"
        )

    # What to go back to.

    def _check(self) -> None:
        """Raise if parameters are not finite."""
        self._check_layouts()
        self._backend.write_back(self._plan)
        if not self._is_finite():
            epoch, batch = self.at.epoch, self._batch()
            where = f"epoch {epoch}, batch {batch}{self._of_batches()}" if batch else f"epoch {epoch - 1}"
            self._diverge(f"after {where}: parameters are no longer finite")

    def _is_finite(self) -> bool:
        return all([np.isfinite(p.value).all() for p in self.parameters])  # noqa: C419 - a list is faster

    def _keep(self) -> None:
        """Copy what was learnt, or raise if it is not finite; signals are deferred."""
        started = time.perf_counter()
        self._check()
        if self.at.epoch == self._first_epoch and self._good is self._start:
            self._good = _Copy(self)
        else:
            self._good.take(self)
        if self.at.epoch > self._first_epoch:
            self._start = self._good
        self._copy_at = _next_copy(started)

    def _diverge(self, where: str) -> NoReturn:
        """Go back, and say why: because of samples or targets that are not finite, if there are some."""
        targets = [loss.targets for loss in self._plan.losses if isinstance(loss.targets, np.ndarray)]
        if self._augmented is not None and targets:
            targets = [self._augmented.all_targets]
        spoilt = self._samples.not_finite() or next(filter(None, (not_finite(t, "y") for t in targets)), None)
        with deferred_signals():
            self._undo(self._start if spoilt else self._good)
        if spoilt:
            raise ValueError(spoilt)
        if not self._is_finite():  # from the beginning
            raise ValueError("the network has parameters that are not finite")
        back = f"the network is as it was after {self.model.steps} steps, when it was finite"
        self.history.seconds = self._checkpoints.seconds
        raise DivergedError(f"the training diverged {where}; {back}. A smaller learning rate may help", self.history)

    def _undo(self, copy: _Copy) -> None:
        """Go back to a copy. Parameters on a GPU are written back before, which would else overwrite it later."""
        with contextlib.suppress(Exception):  # it may be the GPU that failed
            self._backend.write_back(self._plan)
        copy.restore(self)
        self._is_undone = True


def _draw_by_threads(backend: Backend, columns: int, dtype: np.dtype[Any], rng: np.random.Generator, n: int) -> Array:
    noise = backend.empty_pinned((n, columns), dtype)
    fill_normal(rng, noise.reshape(-1), min(get_num_threads(), _DRAWING_THREADS))
    return noise


def _next_copy(started: float) -> float:
    """Return when to copy the state again, after a copy that began at `started`."""
    now = time.perf_counter()
    return now + _COPY_EVERY * (now - started)


class _Copy:
    """All that a training changes, as it was at a moment when all parameters were finite."""

    def __init__(self, training: Training) -> None:
        arrays = (array for p in training.parameters for array in p.arrays() if array is not None)
        self._pairs = [(array, array.copy()) for array in arrays]
        self._note(training)

    def take(self, source: Training) -> None:
        """Copy it anew."""
        for array, copy in self._pairs:
            copy[...] = array
        self._note(source)

    def _note(self, source: Training) -> None:
        self._position, self._steps = source.at.copy(), source.model.steps
        self._updates = [(group.is_kept, [state.steps for state in group.states]) for group in source.groups]
        self._streams = {name: rng.bit_generator.state for name, rng in source.model._streams().items()}
        self._best = source._checkpoints.best

    def restore(self, to: Training) -> None:
        """Go back to it."""
        at = self._position
        for array, copy in self._pairs:
            array[...] = copy
        to.at, to.model.steps = at.copy(), self._steps
        for group, (was_kept, steps) in zip(to.groups, self._updates, strict=True):
            if group.is_kept and not was_kept:
                group.release()
            for state, count in zip(group.states, steps, strict=True):
                state.steps = count
        for name, rng in to.model._streams().items():
            rng.bit_generator.state = self._streams[name]
        for values in lists_of(to.history).values():
            del values[at.epoch - 1 :]
        to._checkpoints.best = self._best


# What is said of validation data.
VALIDATION = ("validation_loss", "validation_accuracy")


def randomness_of(
    model: Trainable, noise: float, inputs: float, hidden: float | list[float], layers: int
) -> list[list[Any]]:
    """What is done at random to the inputs of each layer of a network: noise on the first ones, and dropout."""
    rates = [inputs, *(hidden if isinstance(hidden, list) else [hidden] * (layers - 1))]
    if not (noise or any(rates)):
        return []
    key = model._key
    drops = [training.Dropout(rate, STREAMS["dropout"] + i, key) for i, rate in enumerate(rates)]
    operations: list[list[Any]] = [[drop] if drop.keep < ALL else [] for drop in drops]
    if noise:
        operations[0].insert(0, training.InputNoise(noise, STREAMS["input noise"], key))
    return operations


def network_of(
    dense: Dense,
    group: ParameterGroup | None = None,
    average: Dense | None = None,
    randomness: Sequence[Sequence[Any]] = (),
) -> training.Network:
    """A stack of layers as a plan has it, with an optimizer's state for each parameter, and moving averages.

    The parameters are views, whose shape nobody can change. `randomness` has the operations before each layer.
    """
    states = [()] * len(dense.parameters) if group is None else [state.arrays for state in group.states]
    averages = [None] * len(states) if average is None else average.parameters
    parameters = map(training.Parameter, [array.view() for array in dense.parameters], states, averages)
    operations: list[Any] = []
    before = iter(randomness)
    for layer, weight in zip(dense.layers, parameters, strict=False):
        operations.extend(next(before, ()))
        operations.append(training.Linear(weight, next(parameters)))
        if layer.activation is not None:
            number = ACTIVATIONS[layer.activation].default
            if layer.activation_parameter is not None:
                number = layer.activation_parameter
                arguments.rounded(number, "activation_parameter", layer.weight.dtype, number)  # or it raises
            operations.append(training.Activation(layer.activation, float(number)))
    return tuple(operations)
