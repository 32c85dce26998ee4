"""The signals that end the command: Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import CodeType, FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What a signal raises goes its way undisturbed by others for so many seconds: cleaning up takes less.
_PATIENCE = 1.0


class Interrupted(BaseException):
    """A signal ends the command.

    It is no KeyboardInterrupt: if one has passed through `exec`, by which modules make classes while they are imported,
    CPython ends by SIGINT, whatever the exit status should be.
    """


class Stops:
    """What `STOPS` do, while a function runs: each raises `Interrupted` in it, or is only noted.

    Attributes
    ----------
    first : int or None
        The signal that came first, which decides about the exit status.
    are_noted : bool
        Whether one is only noted.
    message : str
        What the command says when it ends by one.
    """

    def __init__(self) -> None:
        self._reset(None)

    def _reset(self, code: CodeType | None) -> None:
        self.first: int | None = None
        self.are_noted, self.message = False, "interrupted"
        self._code, self._raised, self._arrivals = code, -math.inf, -1

    @property
    def have_raised(self) -> bool:
        """Whether one has raised `Interrupted`."""
        return self._raised > -math.inf

    @contextlib.contextmanager
    def handled(self, code: CodeType, *, ends_process: bool) -> Iterator[None]:
        """Handle them in this block, which calls the function with this code.

        From then on they do nothing if it ends the process, else what they did before. A program that was started with
        a signal ignored, by nohup for one, keeps ignoring it.
        """
        self._reset(code)
        if threading.current_thread() is not threading.main_thread():  # where Python handles none
            yield
            return
        # Python calls handlers in the order of the numbers; a pipe knows who came first.
        self._arrivals, end = os.pipe()
        for descriptor in (self._arrivals, end):
            os.set_blocking(descriptor, False)
        before = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPS}
        self._handled = [number for number in STOPS if handlers[number] is not signal.SIG_IGN]
        for number in self._handled:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number in self._handled:
                signal.signal(number, signal.SIG_IGN if ends_process else handlers[number])
            signal.set_wakeup_fd(before)
            os.close(end)
            os.close(self._arrivals)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            arrived = b""
            with contextlib.suppress(BlockingIOError):  # another thread, which got the signal, is about to write it
                arrived = os.read(self._arrivals, 4096)
            self.first = next((each for each in arrived if each in self._handled), number)
        # Elsewhere, where the command ends already, nobody would catch it.
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back
        now = time.monotonic()
        if frame is None or self.are_noted or now - self._raised < _PATIENCE:
            return
        self._raised = now
        raise Interrupted

    def check(self) -> None:
        """Raise `Interrupted` if one has come."""
        if self.first is not None:
            raise Interrupted


stops = Stops()
