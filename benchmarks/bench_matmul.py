"""Matrix products and linear layers, in the shapes of the networks, and square."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_matmul(run: Callable[[Case, str], None], case: Case, side: str) -> None:
    run(case, side)


def bench_linear(run: Callable[[Case, str], None], case: Case, side: str) -> None:
    run(case, side)
