"""Checkpoints: what `fit` writes while it trains, and goes on from."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .._signals import deferred_signals
from . import _checks as checks
from . import files
from .dataset import copy_of
from .optimizers import Optimizer, ParameterGroup

Array = NDArray[Any]

# The least time between two checkpoints: these seconds, unless an epoch ends; and this multiple of the time that one
# takes to write, so that writing is at most 2 % of a training.
_SECONDS = 30.0
_WRITES = 50


@dataclass
class Position:
    """Where a `fit` is.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    seen : int
        Samples of the epoch that were trained on.
    sums : tuple of float
        Of their losses, one for each `Loss` of the plan.
    correct : int
        How many of them were correct.
    order : dict, optional
        The state of the stream that the epoch's order of samples is drawn from, before that.
    """

    epoch: int = 1
    seen: int = 0
    sums: tuple[float, ...] = ()
    correct: int = 0
    order: dict[str, Any] | None = None

    def copy(self) -> Position:
        """Return another one; `dataclasses.replace` takes four times as long."""
        return Position(self.epoch, self.seen, self.sums, self.correct, self.order)

    def check(self, losses: int, samples: int, batch_size: int) -> None:
        """Raise ValueError or TypeError unless a fit of `samples` samples can be here; `sums` become floats."""
        checks.whole_number(self.epoch, "epoch", 1)
        self.sums = tuple(map(float, self.sums))
        seen = checks.whole_number(self.seen, "seen", 0)
        is_inside = checks.whole_number(self.correct, "correct", 0) <= seen <= samples
        is_between = seen % batch_size == 0 or seen == samples
        if not (is_inside and is_between and len(self.sums) == losses and all(map(math.isfinite, self.sums))):
            raise ValueError(f"no fit is at {self}")


def lists_of(history: Any) -> dict[str, list[float]]:
    """The lists of a history, one number for each epoch, by the names that monitors have."""
    lists = {name: values for name, values in vars(history).items() if isinstance(values, list)}
    return lists | getattr(history, "metrics", {})


class Checkpoints:
    """The checkpoints of one `fit`: files of its network that have all it needs to go on.

    Parameters
    ----------
    path : Path or None
        Where they are written; with None there are none.
    model : Saved
    optimizers : mapping
        By the arguments of `fit`.
    groups : sequence of ParameterGroup
        What they update, and the states.
    facts : mapping
        What must be the same where the fit goes on: ``samples``, ``batch_size`` and others.
    history : History or GANHistory
    start : Position
    """

    def __init__(
        self,
        path: Path | None,
        model: files.Saved,
        optimizers: Mapping[str, Optimizer],
        groups: Sequence[ParameterGroup],
        facts: dict[str, Any],
        history: Any,
        start: Position,
    ) -> None:
        self._path, self._model, self._optimizers, self._groups, self._facts = path, model, optimizers, groups, facts
        self._history = history
        # As they were given: a callback may change them.
        self._given = {} if path is None else self._settings()
        self._written = start.copy()
        # The parameters of the best epoch so far, by name, where they are kept.
        self.best: dict[str, Array] = {}
        self._started = self._last = time.perf_counter()
        self._took = 0.0

    @property
    def _epochs(self) -> dict[str, list[float]]:
        return lists_of(self._history)

    @property
    def seconds(self) -> float:
        """How long the fit has taken, with that before the checkpoint which it went on from."""
        return time.perf_counter() - self._started

    def is_due(self, at: Position, *, epoch_done: bool) -> bool:
        """Whether it is time to write one."""
        least = max(0.0 if epoch_done else _SECONDS, _WRITES * self._took)
        return self.is_missing(at) and time.perf_counter() - self._last >= least

    def is_missing(self, at: Position) -> bool:
        """Whether there are checkpoints, but none of this position or a later one, which nothing older replaces."""
        return self._path is not None and (at.epoch, at.seen) > (self._written.epoch, self._written.seen)

    def write(self, at: Position) -> None:
        """Write one, whole or not at all; of the epoch that is under way the history says nothing."""
        assert self._path is not None
        begun = time.perf_counter()
        # JSON has no NaN: numbers that are not finite are strings there, which `float` reads.
        history = {
            name: [value if math.isfinite(value) else str(value) for value in values[: at.epoch - 1]]
            for name, values in self._epochs.items()
        }
        fit = {"position": asdict(at), "history": history, "seconds": self.seconds}
        try:
            fit |= {"facts": self._facts, "optimizers": self._given}
            self._model._write(self._path, self._optimizers, fit, self.best)
            self._written = at.copy()
        finally:
            self._last = time.perf_counter()
            self._took = self._last - begun

    def try_to_write(self, at: Position) -> None:
        """Write one in the midst of a fit, or warn: the disk may have room again before the last one."""
        try:
            self.write(at)
        except OSError as error:
            message = f"a checkpoint could not be written, training goes on without: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def resume(self, path: Path, epochs: int) -> Position:
        """Make network, optimizers and history what they were, all or nothing of it, and return the position.

        Raises
        ------
        OSError
            The file is missing or cannot be read.
        ValueError
            It is corrupt, or of another fit; the message says what differs.
        """
        model, kind, self._given = self._model, type(self._model), self._settings()
        content = files.read(path, kind.__name__)
        if (fit := content[2].get("fit")) is None:
            raise ValueError(f"{path} is no checkpoint of a fit: it has a network alone")
        saved = kind._made(path, *content)
        with files.errors_name(path, kind.__name__):
            at, optimizers = Position(**fit["position"]), files.optimizers_of(*content[1:])
            now = {argument: settings for argument, (settings, _) in optimizers.items()}
            here, there, changed = _flat(self._given), _flat(fit["optimizers"]), _flat(now)
            # In an older file settings are missing, which `files.optimizer_of` knows.
            is_older = not changed.keys() <= there.keys()
            there = changed if here == changed else {n: v for n, v in changed.items() if n in here} | there
            here, there = here | model._identity() | self._facts, there | saved._identity() | fit["facts"]
        for name in [*here, *there]:
            if (is_now := here.get(name)) != (was := there.get(name)):
                hint = ""
                if is_older and was and name.endswith("decay_biases"):
                    hint = "; older versions decayed biases too: with decay_biases=True it goes on"
                raise ValueError(f"{path} is a checkpoint of another fit: {name} was {was!r}, is {is_now!r}{hint}")
        with files.errors_name(path, kind.__name__):
            at.check(len(self._written.sums), self._facts["samples"], self._facts["batch_size"])
            history = {name: list(map(float, fit["history"][name])) for name in self._epochs}
            for name, values in history.items():
                is_validation = name.startswith("validation_")
                epochs_done = 0 if is_validation and not self._facts["validation_data"] else at.epoch - 1
                # The accuracy is NaN without classes, and a validation may overflow.
                odd = [v for v in values if not (math.isfinite(v) or is_validation)]
                if len(values) != epochs_done or (odd if "loss" in name else any(map(math.isinf, odd))):
                    raise ValueError(f"{name} in the history has {values}, expected {epochs_done} finite numbers")
            for argument, given in self._given.items():
                settings = now[argument]
                if settings.keys() != given.keys() or settings["name"] != given["name"]:
                    raise ValueError(f"the settings of {argument} are those of another one: {settings}")
            seconds = arguments.number(fit["seconds"], "seconds", low=0.0)
            for name, tensor in content[1].items():
                # A moment may have overflowed: its parameter no longer changes.
                if (np.isnan(tensor) if name.startswith(files.OPTIMIZER) else ~np.isfinite(tensor)).any():
                    raise ValueError(f"tensor {name!r} is not finite")
            states = list(self._states(optimizers))
            best = {n.removeprefix(files.BEST): t for n, t in content[1].items() if n.startswith(files.BEST)}
            if best:
                own = {n: t for n, t in content[1].items() if not n.startswith((files.OPTIMIZER, files.BEST))}
                files.check_tensors(best, {name: tensor.shape for name, tensor in own.items()}, model.dtype)
            if at.order is not None:
                copy_of(model._streams()["shuffle"]).bit_generator.state = at.order
        if (begun := at.epoch - (at.seen == 0)) > epochs:
            raise ValueError(f"epochs must be at least {begun}, which the fit of {path} has begun, got {epochs}")
        # Nothing can fail any more.
        with deferred_signals():
            for target, source in zip(model._parts().values(), saved._parts().values(), strict=True):
                for array, value in zip(target.parameters, source.parameters, strict=True):
                    array[...] = value
            for group in self._groups:
                group.keep()
            for mine, theirs in states:
                mine.steps = theirs.steps
                for array, value in zip(mine.arrays, theirs.arrays, strict=True):
                    array[...] = value
            for argument, optimizer in self._optimizers.items():
                optimizer._take(now[argument])
            for name, rng in model._streams().items():
                rng.bit_generator.state = saved._streams()[name].bit_generator.state
            if at.order is not None:
                model._streams()["shuffle"].bit_generator.state = at.order
            for name, values in history.items():
                self._epochs[name][:] = values
            model.steps, self.best = saved.steps, best
            self._started -= seconds
            if path == self._path:
                self._written = at.copy()
        return at

    def _settings(self) -> dict[str, dict[str, Any]]:
        return {argument: optimizer.settings() for argument, optimizer in self._optimizers.items()}

    def _states(self, optimizers: Mapping[str, files.Described]) -> Any:
        """The state of each parameter, and the one of the file."""
        pairs = (pair for group in self._groups for pair in zip(group.params, group.states, strict=True))
        here = {id(param): state for param, state in pairs}
        for argument, networks in self._model._trained(self._optimizers).items():
            for name, param in (item for params in networks for item in params.items()):
                mine, theirs = here[id(param)], optimizers[argument][1][name]
                if not theirs.fits(param) or len(mine.arrays) != len(theirs.arrays):
                    raise ValueError(f"the state of {name} in {argument} does not fit")
                yield mine, theirs


def _flat(optimizers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Their settings, by names like ``optimizer.lr``."""
    return {
        f"{argument}.{name}": value for argument, settings in optimizers.items() for name, value in settings.items()
    }
