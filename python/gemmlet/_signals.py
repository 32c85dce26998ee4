"""Ctrl-C while steps are trained whose number has to be known."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def whole_steps() -> Iterator[None]:
    """Ctrl-C within takes effect at the end: the optimizer has to know how many steps were done.

    What a first call raised while it compiles would be no KeyboardInterrupt, either.
    """
    caught: list[tuple[int, FrameType | None]] = []
    handler = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread alone, and cannot put back one that it did not set.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    for number, frame in caught[:1]:
        handler(number, frame)
