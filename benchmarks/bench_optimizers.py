"""Optimizer updates, in place."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_optimizers(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
