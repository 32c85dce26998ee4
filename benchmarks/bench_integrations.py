"""gemmlet under other packages' code, beside what they compute with themselves."""

from collections.abc import Callable

from gemmlet.bench.case import Case


def bench_thinc(run: Callable[[Case, str], None], case: Case, implementation: str) -> None:
    run(case, implementation)
