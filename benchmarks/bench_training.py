"""Whole trainings: the epoch of an MLP, the step of a GAN."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_epoch(run: Callable[[Case, str], None], case: Case, side: str) -> None:
    run(case, side)


def bench_gan(run: Callable[[Case, str], None], case: Case, side: str) -> None:
    run(case, side)
