"""Scaling curves: the throughput and the peak memory of training an MLP, over one parameter at a time.

Each point is a process of its own, as only so its peak of memory is its own. It is kept to as many processors as it has
threads, which is the one way to limit JAX.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import training
from .implementations import IMPLEMENTATIONS, OURS, processors, same_threads

LINES = (OURS, "numpy", "pytorch", "jax")


@dataclass(frozen=True)
class Point:
    """One training: ``784-width-...-width-10``, tanh, SGD, float32, on dense random input."""

    batch: int = 64
    width: int = 256
    depth: int = 2
    threads: int = 1
    seconds: float = 1.0


def axes(threads: int, quick: bool) -> dict[str, tuple[int, ...]]:
    """Return the values of each parameter; the others keep the values of `Point`."""
    counts = tuple(sorted({*(2**i for i in range(threads.bit_length())), threads}))
    if quick:
        return {"batch": (1, 64, 1024), "width": (32, 256), "depth": (1, 4), "threads": counts}
    return {
        "batch": (1, 4, 16, 64, 256, 1024, 4096),
        "width": (32, 64, 128, 256, 512, 1024, 2048, 4096),
        "depth": (1, 2, 4, 8, 16),
        "threads": counts,
    }


def measure(implementation: str, point: Point) -> dict[str, float]:
    """Train in this process: images per second (median), and MB of memory, with the packages loaded and at the peak."""
    if hasattr(os, "sched_setaffinity") and point.threads < processors():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: point.threads])
    with same_threads(point.threads, [implementation]), IMPLEMENTATIONS[implementation].entered():
        loaded = peak_memory()
        rng = np.random.default_rng(0)
        count = max(1024, 4 * point.batch) // point.batch * point.batch
        layers = (training.LAYERS[0], *[point.width] * point.depth, training.LAYERS[-1])
        x = rng.random((count, layers[0]), "float32")
        task = training.task(layers, x, rng.integers(0, layers[-1], count), point.batch, "float32")
        call = training.MLP_IMPLEMENTATIONS[implementation](task).call
        call()
        samples: list[float] = []
        end = time.perf_counter() + point.seconds
        while len(samples) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return {"images_per_second": count / float(np.median(samples)), "loaded_mb": loaded, "peak_mb": peak_memory()}


def peak_memory() -> float:
    """The most memory that this process had, in MB."""
    try:
        # ru_maxrss is, on Linux, at least what the parent had when it started this process.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e6 if sys.platform == "darwin" else 1e3)


def _in_a_process(implementation: str, point: Point) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, implementation, json.dumps(asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": " ".join(done.stderr.split())[-200:] or f"exit status {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(
    threads: int,
    seconds: float,
    quick: bool,
    implementations: tuple[str, ...],
    progress: Callable[[str, int, int], None] = lambda text, number, count: None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure all points; for each parameter a list of ``{"value": ..., "sides": {name: measured}}``."""
    base = Point(threads=threads, seconds=seconds)
    values = axes(threads, quick)
    count, number = sum(map(len, values.values())) * len(implementations), 0
    curves: dict[str, list[dict[str, Any]]] = {}
    for parameter, points in values.items():
        curves[parameter] = []
        for value in points:
            measured: dict[str, Any] = {}
            for name in random.Random(number).sample(implementations, len(implementations)):
                progress(f"{parameter} {value}, {name}", number, count)
                measured[name] = _in_a_process(name, replace(base, **{parameter: value}))
                number += 1
            curves[parameter].append({"value": value, "sides": {name: measured[name] for name in implementations}})
    return curves


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Point(**json.loads(sys.argv[2])))))
