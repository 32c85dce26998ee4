"""Matmuls and linear layers, in the shapes of the networks, and square."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_matmul(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)


def bench_linear(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
