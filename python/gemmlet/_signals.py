"""Signals while something is done that has to be whole: steps whose number has to be known, or the last write."""

from __future__ import annotations

import contextlib
import signal
import threading

# What the module `signal` wraps in conversions to enums, which take ten times as long: a step may be shorter.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from types import FrameType
from typing import Any

# All but the real-time ones: to ask for these too would take twice as long.
_NUMBERS = tuple(int(number) for number in signal.valid_signals() if number < getattr(signal, "SIGRTMIN", signal.NSIG))

_Handlers = dict[int, Callable[[int, FrameType | None], Any]]

# The handlers of these that were found last, which change seldom, and those of them that Python calls, by number. One
# object, as a handler may run between any two lines and come here too.
_found: tuple[tuple[Any, ...], _Handlers] = (None,) * len(_NUMBERS), {}


def _python_handlers() -> _Handlers:
    """A new dict of the handlers that Python calls."""
    global _found
    now, (before, handlers) = tuple(map(getsignal, _NUMBERS)), _found
    if now != before:
        handlers = {number: handler for number, handler in zip(_NUMBERS, now, strict=True) if callable(handler)}
        _found = now, handlers
    return handlers.copy()


class deferred_signals:  # noqa: N801 - it is used as a function
    """Signals that Python handles, Ctrl-C first of all, take effect at the end of the block.

    What a first call raised while it compiles would be no KeyboardInterrupt, either.
    """

    def __enter__(self) -> None:
        self._handlers: _Handlers = {}
        # One of each, as the system keeps them.
        self._came: dict[int, FrameType | None] = {}
        self._is_over = False
        # Python runs handlers in the main thread alone, and cannot put back one that it did not set.
        if threading.current_thread() is threading.main_thread():
            self._handlers = _python_handlers()
            try:
                for number in self._handlers:
                    set_handler(number, self._handle)
            except BaseException as error:
                mine = (number for number in self._handlers if getsignal(number) == self._handle)
                if isinstance(error, ValueError) and next(mine, None) is None:
                    self._handlers = {}  # in a sub-interpreter, which has no signals
                    return
                # What another handler has raised meanwhile.
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        try:
            for number, handler in self._handlers.items():
                set_handler(number, handler)
        finally:
            if self._came:
                with contextlib.ExitStack() as handled:  # each of them, whatever the others raise
                    for number, frame in self._came.items():
                        handled.callback(self._handlers[number], number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Keep the signal, or pass it on once the block is over."""
        if self._is_over:
            self._handlers[number](number, frame)
        else:
            self._came[number] = frame
