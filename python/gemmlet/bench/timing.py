"""How a case is timed: results checked, then implementations alternating in one process, in a new order each round."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, Prepared
from .implementations import IMPLEMENTATIONS

Clock = Callable[[], float]


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    seconds: float = 1.0  # for a case, all implementations together; more if `min_rounds` take longer
    # Each round times each implementation once.
    min_rounds: int = 5
    max_rounds: int = 200
    # A sample is as many calls as take about this long, so that the clock's own cost does not count.
    sample_seconds: float = 2e-3
    # Before each sample the implementation runs untimed: for this time, and until a call takes at most twice as long as
    # its fastest so far.
    warm_seconds: float = 6e-3
    max_warm_seconds: float = 0.25
    # The least before the first sample, so that a fastest call is known that none of this has spoilt.
    first_warm_seconds: float = 0.1
    # Before that, the longest wait for the threads of the previous implementation to stop spinning on processors that
    # this one needs. Those of OpenBLAS, NumPy's BLAS, do so for up to 0.1 s after a matmul, and PyTorch or this
    # library, called meanwhile, has one processor of two.
    max_quiet_seconds: float = 0.3


@dataclass(frozen=True)
class Timed:
    """What came out for one implementation: seconds for one unit of work, one number a round; or why there are none."""

    samples: tuple[float, ...] = ()
    failed: str | None = None


def run(case: Case, names: Sequence[str], plan: Plan, seed: int = 0) -> dict[str, Timed]:
    """Check and time the implementations `names` of a case, an entry for each.

    One that cannot be run, or whose result is wrong, has `failed` and no samples.
    """
    inputs = case.inputs()
    exact = case.exact(inputs)
    results: dict[str, Timed] = {}
    ready: dict[str, Prepared] = {}
    for name in names:
        try:
            with IMPLEMENTATIONS[name].entered():
                prepared = case.prepare(name, inputs)
                error = case.error(prepared.result(), exact)
        except Exception as problem:  # a peer may fail in any way, and the other implementations are still to be timed
            results[name] = Timed(failed=f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
            continue
        if not error <= 1.0:
            results[name] = Timed(failed=f"wrong result: {error:.3g} times the tolerance")
        else:
            ready[name] = prepared
    for name, samples in alternate(ready, plan, random.Random(seed)).items():
        results[name] = Timed(tuple(seconds / case.units for seconds in samples))
    return {name: results[name] for name in names}


def check(case: Case, name: str) -> Prepared:
    """Return the implementation `name` of a case, ready to be called; AssertionError if its result is wrong."""
    inputs = case.inputs()
    with IMPLEMENTATIONS[name].entered():
        prepared = case.prepare(name, inputs)
        error = case.error(prepared.result(), case.exact(inputs))
    if not error <= 1.0:
        raise AssertionError(f"{name}, {case.key}: {error:.3g} times the tolerance")
    return prepared


def calls_per_sample(call: Callable[[], Any], seconds: float, clock: Clock = time.perf_counter) -> int:
    """How many calls take about `seconds`: doubled until they take half of it."""
    count = 1
    while True:
        start = clock()
        for _ in range(count):
            call()
        took = clock() - start
        if took >= seconds / 2:
            return max(1, round(count * seconds / took))
        count *= 2


_TASKS = Path("/proc/self/task")


def _others_run() -> bool:
    """Whether any other thread of this process runs, or waits for a processor. It takes some milliseconds.

    Linux says so for each thread. Elsewhere the time that the process has used tells, over no less than some ticks of
    the system's clock: what a running thread has used is added at ticks alone.
    """
    if _TASKS.is_dir():
        time.sleep(2e-3)
        me = str(threading.get_native_id())
        return any(_state(task) == "R" for task in _TASKS.iterdir() if task.name != me)
    start, used = time.perf_counter(), time.process_time()
    time.sleep(2e-2)
    return time.process_time() - used >= 0.25 * (time.perf_counter() - start)


def _state(task: Path) -> str:
    """The state of a thread, as in proc(5); nothing if it has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _wait_until_quiet(max_seconds: float) -> None:
    """Sleep until no other thread of this process runs any more."""
    end = time.perf_counter() + max_seconds
    while time.perf_counter() < end and _others_run():
        pass


def _warm_up(call: Callable[[], Any], plan: Plan, fastest: float, clock: Clock) -> float:
    """Run untimed, as the plan says; returns the seconds of the fastest call, here or before."""
    start = before = clock()
    while True:
        call()
        now = clock()
        took, before = now - before, now
        fastest = min(fastest, took)
        enough = plan.warm_seconds if took <= 2 * fastest else plan.max_warm_seconds
        if now - start >= enough:
            return fastest


def alternate(
    ready: Mapping[str, Prepared], plan: Plan, rng: random.Random, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call, a sample for each round and implementation."""
    counts: dict[str, int] = {}
    fastest: dict[str, float] = {}  # of the implementations that are warmed up
    round_seconds = 0.0
    for name, prepared in ready.items():
        with IMPLEMENTATIONS[name].entered():
            prepared.call()  # the first one may still compile or allocate
            _wait_until_quiet(plan.max_quiet_seconds)
            start = clock()
            prepared.call()
            once = clock() - start
            # What takes long itself is not spoilt by some milliseconds at its start.
            slow = prepared.own_clock or once > 10 * plan.warm_seconds
            if slow:
                counts[name] = 1
                round_seconds += once
            else:
                first = replace(plan, warm_seconds=plan.first_warm_seconds)
                fastest[name] = _warm_up(prepared.call, first, once, clock)
                counts[name] = calls_per_sample(prepared.call, plan.sample_seconds, clock)
                round_seconds += plan.warm_seconds + max(fastest[name], plan.sample_seconds)
    rounds = 0
    if ready:
        rounds = min(max(int(plan.seconds / round_seconds), plan.min_rounds), plan.max_rounds)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in rng.sample(list(ready), len(ready)):
                with IMPLEMENTATIONS[name].entered():
                    _wait_until_quiet(plan.max_quiet_seconds)
                    if name in fastest:
                        fastest[name] = _warm_up(ready[name].call, plan, fastest[name], clock)
                    samples[name].append(_sample(ready[name], counts[name], clock))
    finally:
        if collecting:
            gc.enable()
    return samples


def _sample(prepared: Prepared, count: int, clock: Clock) -> float:
    """Seconds of one call, the mean over `count` of them."""
    if prepared.own_clock:
        return float(prepared.call())
    start = clock()
    for _ in range(count):
        prepared.call()
    return (clock() - start) / count


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly."""
    return float(np.percentile(np.asarray(samples), percent))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as long `theirs` took: the median over the rounds of the ratio within a round.

    The two samples of a round were taken shortly one after the other. What slows down a whole round, such as a
    neighbour on the same machine, cancels out, which it does not in the ratio of two medians.
    """
    return float(np.median(np.asarray(theirs) / np.asarray(ours)))


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1.0:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
