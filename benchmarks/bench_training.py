"""Whole trainings: the epoch of an MLP, the step of a wide one, the step of a GAN, scikit-learn's estimators."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_epoch(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)


def bench_wide(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)


def bench_gan(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)


def bench_sklearn(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
