"""How many threads kernels may use."""

from __future__ import annotations

import math
import operator
import os

from . import _cgroup, _environment

_count: int | None = None


def _positive(text: str) -> int | None:
    """The first number of a text such as ``4,2``; None if that is no positive number."""
    first = text.split(",")[0].strip()
    return int(first[:18]) or None if first.isascii() and first.isdecimal() else None


def _from_environment() -> int | None:
    """The number in ``GEMMLET_NUM_THREADS``; else in ``OMP_NUM_THREADS``, if it is one: others check that variable."""
    own = _environment.read("GEMMLET_NUM_THREADS")
    if not own.strip():
        return _positive(os.environ.get("OMP_NUM_THREADS", ""))
    count = _positive(own)
    if count is None:
        raise ValueError(f"GEMMLET_NUM_THREADS must be an integer of at least 1, got {own!r}")
    return count


def processors() -> int:
    """Return how many processors are in this process's affinity mask."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def get_num_threads() -> int:
    """Return the number set, else what the environment or the cgroup gives: at most as many as there are processors.

    ValueError if ``GEMMLET_NUM_THREADS`` is no number.
    """
    global _count
    if _count is None:
        set_num_threads(_from_environment() or max(1, math.ceil(min(_cgroup.processors(), 1e6))))
        assert _count is not None
    return _count


def set_num_threads(count: int) -> None:
    """Keep `count`, at most the number of processors; `gemmlet.set_num_threads` passes it to the backends."""
    global _count
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"count must be an integer, got {type(count).__name__}") from None
    if number < 1:
        raise ValueError(f"count must be at least 1, got {number}")
    _count = min(number, processors())  # with more, threads would wait for each other to get a processor
