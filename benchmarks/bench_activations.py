"""Every activation of the registry, and its gradient."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_activations(run: Callable[[Case, str], None], case: Case, side: str) -> None:
    run(case, side)
