"""What `fit` prints: a line for each epoch, and on a terminal a bar within it."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

# Seconds between two pictures of the bar: more often nobody can read it.
_EVERY = 0.1
_BAR = 20

# Of the names that are printed.
_LABELS = {"validation_accuracy": "accuracy"}


def shown(metrics: Mapping[str, float]) -> str:
    """Numbers with their names; NaN, an accuracy of targets without classes, is left out."""
    known = [(_LABELS.get(k, k.replace("_", " ")), v) for k, v in metrics.items() if not math.isnan(v)]
    return "  ".join(f"{label} {value:.4f}" for label, value in known)


def can_redraw(stream: Any) -> bool:
    """Whether a carriage return brings a line of a stream back: on a terminal, and in a notebook."""
    if type(stream).__module__.startswith("ipykernel"):
        return True
    isatty = getattr(stream, "isatty", None)
    return callable(isatty) and bool(isatty()) and os.environ.get("TERM") != "dumb"


class Lines:
    """A line for each epoch.

    Parameters
    ----------
    epochs : int
        How many there will be.
    """

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def _head(self, epoch: int) -> str:
        return f"epoch {epoch}/{self._epochs}"

    def end_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Print the line of an epoch."""
        print(f"{self._head(epoch)}  {shown(metrics)}", flush=True)


class Bar(Lines):
    """The same, with a bar in the line of the epoch that is under way."""

    def __init__(self, epochs: int) -> None:
        super().__init__(epochs)
        self._began = time.perf_counter()
        self._next, self._drawn = self._began, 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to move it."""
        return time.perf_counter() >= self._next

    def advance(self, epoch: int, batch: int, batches: int, metrics: Mapping[str, float]) -> None:
        """Show how far the epoch is: after `batch` of `batches` mini-batches, 0 if their number is not known."""
        now = time.perf_counter()
        self._next = now + _EVERY
        if batches:
            done = batch / batches
            left = _time((now - self._began) * (1 - done) / done)
            bar = "=" * int(_BAR * done)
            place = f"[{bar}{'>' if len(bar) < _BAR else ''}".ljust(_BAR + 1, ".") + f"] {batch}/{batches}  {left} left"
        else:
            place = f"batch {batch}  {_time(now - self._began)}"
        # A line that is folded could not be drawn over: numbers that it has no room for are left out.
        line, room = f"{self._head(epoch)}  {place}  {shown(metrics)}", shutil.get_terminal_size().columns - 1
        while len(line) > room and "  " in line:
            line = line.rpartition("  ")[0]
        self._draw(line[:room])

    def end_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Put the line of an epoch in the place of the bar."""
        now = time.perf_counter()
        self._draw(f"{self._head(epoch)}  {_time(now - self._began)}  {shown(metrics)}", is_last=True)
        self._began, self._next = now, now + _EVERY

    def close(self) -> None:
        """Leave a line that was begun."""
        if self._drawn:
            self._drawn = 0
            print(flush=True)

    def _draw(self, line: str, *, is_last: bool = False) -> None:
        before, self._drawn = self._drawn, 0 if is_last else len(line)
        print(f"\r{line.ljust(before)}", end="\n" if is_last else "", flush=True)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printer(verbose: int, epochs: int) -> Lines | None:
    """What prints for the argument `verbose` of `fit`."""
    if not verbose:
        return None
    return Bar(epochs) if verbose == 1 and can_redraw(sys.stdout) else Lines(epochs)
