"""Augmentation of images."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_augment(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
