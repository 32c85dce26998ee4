"""How the learning rate changes over a `fit`, and when a `fit` ends.

A schedule is a function of the fraction of all mini-batches that is done, which returns what the learning rate is
multiplied by: `linear_decay`, `cosine_decay`, `StepDecay`, `WarmUp`, or any other one. `ReduceOnPlateau` and
`EarlyStopping` follow a number of the history instead, epoch by epoch; they keep nothing themselves, so that a `fit`
which goes on from a checkpoint decides as if nothing had come between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from . import _checks as checks

# What the learning rate is multiplied by, once this fraction of all mini-batches is done: from 0 to below 1.
Schedule = Callable[[float], float]

# The factor of one step without a schedule.
ONE = np.ones(1)


def linear_decay(done: float) -> float:
    """An `lr_schedule` for `fit` that lowers the learning rate to 0, in equal steps over all mini-batches.

    ``model.fit(x, y, optimizer=Adam(3e-3), lr_schedule=linear_decay)``.

    Parameters
    ----------
    done : float
        The fraction of all mini-batches that is done.

    Returns
    -------
    float
        What the learning rate is multiplied by: 1 at the beginning.
    """
    return 1.0 - done


def cosine_decay(done: float) -> float:
    """An `lr_schedule` for `fit` that lowers the learning rate to 0 along half a cosine (Loshchilov and Hutter, 2017).

    Parameters
    ----------
    done : float
        The fraction of all mini-batches that is done.

    Returns
    -------
    float
        ``(1 + cos(π done)) / 2``.
    """
    return 0.5 + 0.5 * math.cos(math.pi * done)


class _Checked:
    """A frozen dataclass whose fields are checked by the functions in `_CHECKS`."""

    _CHECKS: dict[str, Callable[[Any, str], Any]]

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            if field.name in self._CHECKS:
                value = self._CHECKS[field.name](getattr(self, field.name), field.name)
                object.__setattr__(self, field.name, value)


def _share(value: Any, name: str) -> float:
    return arguments.number(value, name, low=0.0, high=1.0)


def _positive(value: Any, name: str) -> float:
    return arguments.number(value, name, low=0.0, open_low=True)


def _not_negative(value: Any, name: str) -> float:
    return arguments.number(value, name, low=0.0)


def _shares(value: Any, name: str) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of fractions, got {type(value).__name__}")
    shares = tuple(_share(each, f"{name}[{i}]") for i, each in enumerate(value))
    if list(shares) != sorted(set(shares)):
        raise ValueError(f"{name} must ascend, got {list(shares)}")
    return shares


def _optional_schedule(value: Any, name: str) -> Any:
    checks.optional_callable(value, name)
    return value


def _count(low: int) -> Callable[[Any, str], int]:
    return lambda value, name: checks.whole_number(value, name, low)


@dataclass(frozen=True)
class StepDecay(_Checked):
    """An `lr_schedule` for `fit` that multiplies the learning rate by `factor` at some fractions of all mini-batches.

    Parameters
    ----------
    factor : float, above 0
    at : list of float, within [0, 1], ascending

    Examples
    --------
    >>> from gemmlet.nn import StepDecay
    >>> [StepDecay(0.1, at=[0.5, 0.75])(done) for done in (0.0, 0.5, 0.8)]
    [1.0, 0.1, 0.010000000000000002]
    """

    factor: float = 0.1
    at: Sequence[float] = (0.5, 0.75)

    _CHECKS = {"factor": _positive, "at": _shares}  # noqa: RUF012 - no field

    def __call__(self, done: float) -> float:
        """What the learning rate is multiplied by."""
        return float(self.factor ** sum(done >= place for place in self.at))


@dataclass(frozen=True)
class WarmUp(_Checked):
    """An `lr_schedule` for `fit` that raises the learning rate from near 0 over the first mini-batches.

    Parameters
    ----------
    fraction : float, within [0, 1]
        Of all mini-batches.
    then : callable, optional
        The schedule of the rest, which sees fractions of the rest: `cosine_decay`, say. By default the rate stays.
    """

    fraction: float = 0.05
    then: Schedule | None = None

    _CHECKS = {"fraction": _share, "then": _optional_schedule}  # noqa: RUF012 - no field

    def __call__(self, done: float) -> float:
        """What the learning rate is multiplied by."""
        if done < self.fraction:
            # At the very first mini-batch it is not 0, which would change nothing.
            return (done + 0.01 * self.fraction) / (1.01 * self.fraction)
        if self.then is None:
            return 1.0
        return self.then((done - self.fraction) / (1.0 - self.fraction))


# What follows the history.

# Of these names smaller is better; of all others, accuracies and scores, larger.
_SMALLER = ("loss", "error", "brier_score")


def is_better_smaller(monitor: str) -> bool:
    """Whether a smaller number of this name in the history is better."""
    return monitor.endswith(_SMALLER)


@dataclass(frozen=True)
class _Monitor(_Checked):
    """What follows a number of the history; see `EarlyStopping`."""

    monitor: str = "validation_loss"
    patience: int = 5
    min_delta: float = 0.0
    mode: str | None = None

    def gains(self, values: Sequence[float]) -> NDArray[np.bool_]:
        """After which epochs the number was better, by more than `min_delta`, than after all before; not NaN."""
        smaller = is_better_smaller(self.monitor) if self.mode is None else self.mode == "min"
        signed, best, gains = (-1 if smaller else 1) * np.asarray(values, np.float64), -math.inf, []
        for value in signed.tolist():
            gains.append(value > best + self.min_delta if math.isfinite(best) else value > best)
            best = max(best, value) if gains[-1] else best
        return np.array(gains, bool)


def _mode(value: Any, name: str) -> str | None:
    return None if value is None else checks.choice(value, name, ("min", "max"))


def _name(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


_OF_MONITOR = {"monitor": _name, "patience": _count(0), "min_delta": _not_negative, "mode": _mode}


@dataclass(frozen=True)
class EarlyStopping(_Monitor):
    """When `fit` ends before its epochs do: once a number has not become better for some epochs.

    ``model.fit(x, y, epochs=100, validation_split=0.1, early_stopping=EarlyStopping(patience=3))``.

    Parameters
    ----------
    monitor : str
        A list of the history: ``"validation_loss"``, ``"validation_accuracy"``, ``"loss"``, or one of `metrics`, as in
        ``"validation_macro_f1"``.
    patience : int, at least 0
        How many epochs in a row may bring nothing better before `fit` ends.
    min_delta : float, at least 0
        By how much a number must be better than the best so far to count.
    restore_best : bool
        Whether the network gets the parameters of its best epoch back at the end, moving averages included, also where
        all epochs were trained; `steps` and the state of the optimizer stay those of the last. (Keras has this off.)
    mode : {"min", "max"}, optional
        Whether smaller or larger is better. By default smaller for names that end in loss, error or brier_score: say it
        for functions of your own. NaN is never better. If every value was NaN, `fit` ends with a RuntimeWarning.
    """

    restore_best: bool = True

    _CHECKS = {**_OF_MONITOR, "restore_best": arguments.flag}  # noqa: RUF012 - no field

    def is_over(self, values: Sequence[float]) -> bool:
        """Whether it is time to end after epochs with these numbers."""
        gains = np.flatnonzero(self.gains(values))
        return len(values) - (int(gains[-1]) + 1 if len(gains) else 0) > self.patience

    def is_best(self, values: Sequence[float]) -> bool:
        """Whether the last of these numbers is the best."""
        return bool(self.gains(values)[-1])


@dataclass(frozen=True)
class ReduceOnPlateau(_Monitor):
    """An `lr_schedule` for `fit` that lowers the learning rate whenever a number has not become better for some epochs.

    Parameters
    ----------
    monitor, patience, min_delta, mode
        As in `EarlyStopping`. If every value was NaN, and has lowered the learning rate, `fit` warns at its end.
    factor : float, above 0
        What the learning rate is multiplied by each time.
    minimum : float, at least 0
        The least that the factors together may be.
    """

    factor: float = 0.1
    minimum: float = 0.0

    _CHECKS = {**_OF_MONITOR, "factor": _positive, "minimum": _not_negative}  # noqa: RUF012 - no field

    def factor_after(self, values: Sequence[float]) -> float:
        """What the learning rate is multiplied by after epochs with these numbers."""
        reductions = waited = 0
        for gained in self.gains(values):
            waited = 0 if gained else waited + 1
            if waited > self.patience:
                reductions, waited = reductions + 1, 0
        return float(max(self.factor**reductions, min(self.minimum, 1.0)))


def lr_factors(schedule: Schedule | None, first: int, count: int, total: int) -> NDArray[np.float64]:
    """What the learning rate is multiplied by at `count` steps from `first` on, counted from 0, of `total`."""
    if schedule is None:
        return ONE if count == 1 else np.ones(count)
    factors = (schedule(step / total) for step in range(first, first + count))
    return np.array([arguments.number(factor, "what lr_schedule returns", low=0.0) for factor in factors])
