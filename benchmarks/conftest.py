"""The benchmarks for pytest: the cases of `gemmlet bench`, each implementation a test, grouped by case.

    python -m pytest benchmarks
    python -m pytest benchmarks/bench_activations.py -k "tanh and float32" --benchmark-columns=min,median

Each result is checked against a float64 reference before it is timed. All implementations get the threads that
`gemmlet.get_num_threads` says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import gemmlet
from gemmlet.bench import timing
from gemmlet.bench.case import Case, Settings
from gemmlet.bench.cases import GROUPS
from gemmlet.bench.implementations import IMPLEMENTATIONS, same_threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="fewer shapes, and no implementations that compile for seconds"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give ``bench_<group>`` every case of the group and every implementation that is installed."""
    settings = Settings(quick=metafunc.config.getoption("--quick"))
    metafunc.parametrize(
        ("case", "implementation"),
        [
            pytest.param(case, implementation, id=f"{case.name}-{implementation}")
            for case in GROUPS[metafunc.function.__name__.removeprefix("bench_")](settings)
            for implementation in case.implementations
            if IMPLEMENTATIONS[implementation].available()
            and not (settings.quick and IMPLEMENTATIONS[implementation].compiles)
        ],
    )


@pytest.fixture(scope="session", autouse=True)
def threads() -> Iterator[None]:
    available = [each.name for each in IMPLEMENTATIONS.values() if each.available()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers warn of when they are imported is theirs
        with same_threads(gemmlet.get_num_threads(), available):
            yield


@pytest.fixture
def run(benchmark: Any) -> Callable[[Case, str], None]:
    """Check one implementation of a case, then time it."""

    def check_and_time(case: Case, implementation: str) -> None:
        benchmark.group = case.key
        benchmark.extra_info.update(case.labels, units=case.units, unit=case.unit)
        prepared = timing.check(case, implementation)
        with IMPLEMENTATIONS[implementation].entered():
            benchmark(prepared.call)

    return check_and_time
