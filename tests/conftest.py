"""Fixtures that run a test on every backend, instruction set and thread count of this machine, and in both dtypes.

`GEMMLET_TEST_BACKENDS`, prefixes separated by commas ("cpu", "numba,cpu-x86-64-v3"), restricts the backends. What it
names must load: a test fails where it would otherwise be skipped.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest

import cuda_on_host.backend
import gemmlet
from gemmlet.backends import select
from gemmlet.backends.numpy import NumpyBackend

hypothesis.settings.register_profile(
    "gemmlet",
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    # The backend is the same for every example of a test, so that it need not be set up anew.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("gemmlet")


@dataclass(frozen=True)
class Spec:
    """A backend, as the tests name it: ``cpu-x86-64-v3-2t``, say."""

    backend: str
    isa: str | None = None
    threads: int | None = None

    def __str__(self) -> str:
        parts = [self.backend, self.isa, f"{self.threads}t" if self.threads else None]
        return "-".join(part for part in parts if part)

    @functools.cached_property
    def loaded(self) -> NumpyBackend:
        return _load(self.backend, self.isa)


@functools.cache
def _load(backend: str, isa: str | None) -> NumpyBackend:
    if backend == "cuda":
        return cuda_on_host.backend.load()
    if backend != "cpu":
        return select.load(backend)
    from gemmlet.backends.cpu import CpuBackend

    return CpuBackend(isa)


def _isas() -> list[str]:
    try:
        from gemmlet.backends.cpu import available_isas
    except ImportError:
        return []
    return available_isas()


def _specs() -> list[Spec]:
    specs = [Spec("numpy"), Spec("numba", threads=1), Spec("numba", threads=2)]
    specs += [Spec("cpu", isa, threads) for isa in _isas() for threads in (1, 2)]
    if specs[-1].backend != "cpu":
        specs.append(Spec("cpu"))
    specs.append(Spec("cuda"))
    wanted = [prefix for prefix in os.environ.get("GEMMLET_TEST_BACKENDS", "").split(",") if prefix]
    if wanted:
        chosen = [spec for spec in specs if any(str(spec).startswith(prefix) for prefix in wanted)]
        if not chosen:
            raise pytest.UsageError(f"GEMMLET_TEST_BACKENDS selects none of {', '.join(map(str, specs))}")
        return chosen
    return specs


SPECS = _specs()


def pytest_report_header() -> str:
    """A build from source is for the instruction set of this machine; the tests iterate over what was built."""
    tested = {spec.isa for spec in SPECS if spec.isa is not None}
    return f"instruction sets tested: {', '.join(sorted(tested)) or 'none'} (those that were built and can run here)"


def _loaded_or_skipped(spec: Spec) -> NumpyBackend:
    try:
        return spec.loaded
    except (ImportError, RuntimeError) as error:
        reason = f"backend {spec} cannot be loaded here: {error}"
        if os.environ.get("GEMMLET_TEST_BACKENDS"):
            pytest.fail(reason)
        pytest.skip(reason)


# Files that take long, though they have few tests, the longest first; then come those with many. A process takes a file
# at a time, and none shall be left with a long one at the end.
LONGEST = [
    "cuda_compile", "fused", "cli", "integrations_numpy_peers", "cuda_mutants", "documents", "cuda_matmul", "fit_bits",
    "broken_indices", "integrations_torch", "cuda_training", "integrations_sklearn", "gpu_report", "soak",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    count = collections.Counter(item.path for item in items)
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(place)), -count[item.path], item.path))


@pytest.fixture(params=SPECS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[NumpyBackend]:
    """Each backend in turn, in use and with its number of threads."""
    spec: Spec = request.param
    loaded = _loaded_or_skipped(spec)
    before = gemmlet.get_num_threads()
    try:
        with gemmlet.use_backend(loaded):
            gemmlet.set_num_threads(spec.threads or 1)
            loaded.set_num_threads(spec.threads or 1)
            yield loaded
    finally:
        gemmlet.set_num_threads(before)
        loaded.set_num_threads(before)


@pytest.fixture(
    params=list({(spec.backend, spec.isa): spec for spec in SPECS}.values()), ids=lambda s: s.isa or s.backend
)
def any_threads_backend(request: pytest.FixtureRequest) -> Iterator[NumpyBackend]:
    """Each backend once, for tests that set the number of threads themselves; it is restored after them."""
    spec: Spec = request.param
    loaded = _loaded_or_skipped(spec)
    before = gemmlet.get_num_threads()
    try:
        with gemmlet.use_backend(loaded):
            yield loaded
    finally:
        gemmlet.set_num_threads(before)
        loaded.set_num_threads(before)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)


@pytest.fixture
def training(any_threads_backend: NumpyBackend) -> NumpyBackend:
    """Each backend: `fit` is the same wherever the reference trains."""
    cuda_on_host.backend.skip_long(any_threads_backend)
    return any_threads_backend


@pytest.fixture(params=["mlp", "gan"])
def network(request: pytest.FixtureRequest) -> str:
    """Each kind of network."""
    return str(request.param)
