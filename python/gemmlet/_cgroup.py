"""What the control group of this process, a container's for example, leaves to it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

ROOT, MEMBERSHIP = "/sys/fs/cgroup", "/proc/self/cgroup"


def _folders(controller: str, root: str, membership: str) -> Iterator[tuple[int, str]]:
    """The version (2 or 1) and a folder, of the group and of each of its ancestors: every one may hold a limit."""
    try:
        with open(membership) as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, top = 2, root
        elif controller in controllers.split(","):
            version, top = 1, os.path.join(root, controller)
        else:
            continue
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for depth in range(len(steps) + 1):
            yield version, os.path.join(top, *steps[:depth])


def _numbers(folder: str, files: list[str]) -> list[float]:
    """The numbers in some files; none where one is missing or says "max"."""
    try:
        texts = []
        for name in files:
            with open(os.path.join(folder, name)) as file:
                texts.append(file.read())
        return [float(word) for word in " ".join(texts).split()]
    except (OSError, ValueError):
        return []


def processors(root: str = ROOT, membership: str = MEMBERSHIP) -> float:
    """Return the processors that it grants; infinity where there is no limit."""
    limits = [math.inf]
    for version, folder in _folders("cpu", root, membership):
        found = _numbers(folder, ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"])
        if len(found) == 2 and min(found) > 0:
            limits.append(found[0] / found[1])
    return min(limits)


def memory(root: str = ROOT, membership: str = MEMBERSHIP) -> float:
    """Return the bytes that it grants; infinity where there is no limit."""
    limits = [math.inf]
    for version, folder in _folders("memory", root, membership):
        limits += _numbers(folder, ["memory.max" if version == 2 else "memory.limit_in_bytes"])
    return min(limits)
