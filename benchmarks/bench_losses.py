"""Losses with their gradients, and functions of rows."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_losses(run: Callable[[Case, str], None], case: Case, side: str) -> None:
    run(case, side)
