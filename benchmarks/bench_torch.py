"""Under PyTorch: steps, gradients and updates of its networks."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_torch(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
