"""Every activation of the registry, and its gradient."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_activations(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
