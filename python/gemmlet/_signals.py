"""Signals while something is done that has to be whole: steps whose number has to be known, or the last write."""

from __future__ import annotations

import contextlib
import signal
import threading

# What the module `signal` wraps in conversions to enums, which take ten times as long: a step may be shorter.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = tuple(map(int, signal.valid_signals()))


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Signals that Python handles, Ctrl-C first of all, take effect at the end of the block.

    What a first call raised while it compiles would be no KeyboardInterrupt, either.
    """
    # Python runs handlers in the main thread alone, and cannot put back one that it did not set.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred = _Deferred()
    try:
        for number in deferred.handlers:
            set_handler(number, deferred)
        yield
    finally:
        deferred.is_over = True
        try:
            for number, handler in deferred.handlers.items():
                set_handler(number, handler)
        finally:
            with contextlib.ExitStack() as handled:  # each of them, whatever the others raise
                for number, frame in deferred.came.items():
                    handled.callback(deferred.handlers[number], number, frame)


class _Deferred:
    """A handler that keeps signals until it is over, and passes them on from then on."""

    def __init__(self) -> None:
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for number in _NUMBERS:
            if callable(handler := getsignal(number)):
                self.handlers[number] = handler
        # One of each, as the system keeps them.
        self.came: dict[int, FrameType | None] = {}
        self.is_over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_over:
            self.handlers[number](number, frame)
        else:
            self.came[number] = frame
