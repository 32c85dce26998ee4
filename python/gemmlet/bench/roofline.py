"""The roofline: what this machine can do at most, measured in the same run as everything that is held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from gemmlet.backends import cpu as cpu_backend

from .case import Case

# Bytes read and written by one copy: from what fits into a first-level cache to what fits into none.
COPY_BYTES = tuple(2**power for power in range(14, 29, 2))
_REPEATS = 10
# Of the target against a page, in elements: some processors copy at a tenth of their speed where the addresses of both
# implementations agree in their last twelve bits.
_OFFSETS = (0, 528)


@dataclass(frozen=True)
class Roofline:
    """The most that this machine does, with the threads that every implementation has.

    Attributes
    ----------
    flops
        Floating-point operations per second, by dtype: of a loop of fused multiply-adds that stays in the registers.
        Empty where there is no compiled module to run it.
    copy
        Bytes per second, read and written, of NumPy's copy, by the bytes of the copy: small ones lie in a cache.
    """

    flops: dict[str, float]
    copy: dict[int, float]

    def seconds(self, case: Case) -> float | None:
        """Return the least time for one unit of the work; None where it is not known."""
        bounds = []
        if case.flops and (peak := self.flops.get(str(case.labels.get("dtype")))):
            bounds.append(case.flops / peak)
        if case.bytes and self.copy:
            fitting = [rate for size, rate in self.copy.items() if size >= case.bytes]
            bounds.append(case.bytes / (fitting[0] if fitting else list(self.copy.values())[-1]))
        return max(bounds, default=None)

    def as_json(self) -> dict[str, Any]:
        """Return it for a JSON file, whose keys are text."""
        return asdict(self) | {"copy": {str(size): rate for size, rate in self.copy.items()}}


def _best(call: Callable[[], object], seconds: float = 0.004) -> float:
    """Seconds of the fastest sample, of those that take about `seconds` each."""
    count = 1
    while True:
        samples = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples.append(time.perf_counter() - start)
        if min(samples) >= seconds / 2:
            return min(samples) / count
        count *= 4


def _copy_rate(size: int, threads: int, pool: ThreadPoolExecutor) -> float:
    """Bytes per second, on one thread or on all, whichever is faster."""
    source = np.ones(size // 8, np.float32)
    rates = []
    for offset in _OFFSETS:
        target = np.zeros(source.size + offset, np.float32)[offset:]
        rates.append(size / _best(partial(np.copyto, target, source)))
        # NumPy copies without the GIL; handing over to threads costs more than a small copy.
        if threads > 1 and size >= 2**20:
            parts = np.array_split(target, threads), np.array_split(source, threads)
            rates.append(size / _best(lambda p=parts: list(pool.map(np.copyto, *p))))  # type: ignore[misc]
    return max(rates)


def measure(threads: int, copies: tuple[int, ...] = COPY_BYTES) -> Roofline:
    """Measure the roofline for this many threads."""
    flops = {}
    try:
        module = cpu_backend.CpuBackend()._module
    except RuntimeError:  # nothing is compiled here
        module = None
    if module is not None:
        steps = 100_000
        for dtype, is_double in (("float32", False), ("float64", True)):
            done = module.fma_loop(is_double, steps)
            flops[dtype] = done / _best(lambda d=is_double: module.fma_loop(d, steps))  # type: ignore[misc]
    with ThreadPoolExecutor(threads) as pool:
        return Roofline(flops, {size: _copy_rate(size, threads, pool) for size in copies})
