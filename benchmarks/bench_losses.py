"""Losses with their gradients, and functions of rows."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_losses(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
