"""How many threads kernels may use."""

from __future__ import annotations

import math
import operator
import os

_LARGEST = 1024
_count: int | None = None


def _from_environment(name: str) -> int | None:
    """The first number of a variable such as ``OMP_NUM_THREADS=4,2``; None if unset or no positive number."""
    text = os.environ.get(name, "").split(",")[0].strip()
    return min(int(text), _LARGEST) if text.isdecimal() and int(text) > 0 else None


def processors() -> int:
    """Return how many processors are in this process's affinity mask."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _cgroup_quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> float:
    """Processors that the cgroup (version 2 or 1) grants; infinity where there is no limit."""
    limits = [math.inf]
    try:
        with open(membership) as file:
            lines = file.read().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, files = root, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, files = os.path.join(root, "cpu"), ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # Every ancestor may hold a limit.
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for depth in range(len(steps) + 1):
            limits.append(_read_quota(os.path.join(top, *steps[:depth]), files))
    return min(limits)


def _read_quota(folder: str, files: list[str]) -> float:
    try:
        texts = []
        for name in files:
            with open(os.path.join(folder, name)) as file:
                texts.append(file.read())
        quota, period = " ".join(texts).split()
        return float(quota) / float(period) if float(quota) > 0 and float(period) > 0 else math.inf
    except (OSError, ValueError):  # no file, or "max"
        return math.inf


def get_num_threads() -> int:
    """Return the number set, else what the environment, the affinity mask and the cgroup give."""
    global _count
    if _count is None:
        wanted = _from_environment("GEMMLET_NUM_THREADS") or _from_environment("OMP_NUM_THREADS")
        _count = wanted or max(1, min(processors(), math.ceil(min(_cgroup_quota(), 1e6))))
    return _count


def set_num_threads(count: int) -> None:
    """Keep `count`; `gemmlet.set_num_threads` passes it to the backends."""
    global _count
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"count must be an integer, got {type(count).__name__}") from None
    if number < 1:
        raise ValueError(f"count must be at least 1, got {number}")
    _count = min(number, _LARGEST)
