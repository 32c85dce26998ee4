"""Numba's executor of training plans: what the plans of `fit` do not reach, and what only Numba has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import gemmlet.backends.numba.backend
from gemmlet.backends import select
from gemmlet.nn import MLP, SGD
from gemmlet.nn.dataset import Samples
from gemmlet.training import reference
from gemmlet.training.plan import SAMPLES, AllReduce, Batches, Dataset, Forward, Outcome, TrainingPlan, Update
from support import assert_within, same_bits

N, BATCH = 75, 16


def problem(
    max_norm: float | None = None, reduce: Callable[[Sequence[Any]], None] | None = None
) -> tuple[Any, Any, Any]:
    """A network, a plan that trains it on samples that are mostly 0, and the mini-batches."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(N, 40)) * (rng.uniform(size=(N, 40)) < 0.2)
    model = MLP([40, 37, 5], "gelu", dtype="float64", seed=4)
    group = SGD(0.1, momentum=0.9).group(model.parameters)
    plan = model._plan(Samples(x, 40, model.dtype), rng.integers(0, 5, N), group)
    *phases, update = plan.phases
    assert isinstance(update, Update)
    if reduce is not None:
        phases.append(AllReduce(0, reduce))
    plan = TrainingPlan(plan.networks, (*phases, update._replace(max_norm=max_norm)))
    order = rng.permutation(N)
    factors = np.linspace(1.0, 0.5, -(-N // BATCH))
    return model, plan, Batches(order, BATCH, (group.hyperparameters(factors),), (0.0,))


def assert_agree(train: Callable[..., Outcome], other: Callable[..., Outcome], **changes: Any) -> None:
    """Two executors agree to rounding."""
    (model, *call), (expected, *same_call) = problem(**changes), problem(**changes)
    found, wanted = train(*call), other(*same_call)
    assert found.correct == wanted.correct
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-12)
    for array, correct in zip(model.parameters, expected.parameters, strict=True):
        assert_within(array, correct, 1e-13)


@pytest.fixture
def numba() -> Any:
    return select.load("numba")


@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_gradients_as_a_whole_agree_with_the_reference(numba: Any, max_norm: float | None) -> None:
    """Where zeros are skipped, the weight gradient is written if it is clipped or reduced, and else is not."""
    assert problem()[1].gather.dataset.skip_zeros

    def halve(gradients: Sequence[Any]) -> None:
        for gradient in gradients:
            gradient *= 0.5

    for reduce in (None, halve):
        plan = problem(max_norm, reduce)[1]
        assert numba.supports_fused(plan)
        assert_agree(numba.train, lambda *call: reference.train(numba, *call), max_norm=max_norm, reduce=reduce)


def test_threads_leave_the_bits(numba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of this size are split only where less work is worth a thread."""
    results = []
    for elements in (10**9, 50):
        monkeypatch.setattr(gemmlet.backends.numba.backend, "_ELEMENTS_PER_THREAD", elements)
        monkeypatch.setattr(numba, "_threads", 3)
        model, plan, batches = problem(max_norm=1.0)
        numba.train(plan, batches)
        results.append(model.parameters)
    assert all(map(same_bits, *results))


def test_what_is_left_to_the_reference(numba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are skipped only in the input of a single network; hyperparameters are one table for each update."""
    model, plan, batches = problem()
    gather, forward, *rest = plan.phases
    scaled, twice = gather._replace(scale=2.0), Forward(0, (SAMPLES, SAMPLES))
    assert numba.supports_fused(plan)
    assert not numba.supports_fused(TrainingPlan(plan.networks, (scaled, forward, *rest)))
    assert not numba.supports_fused(TrainingPlan(plan.networks, (gather, twice, *rest)))
    dense = gather._replace(dataset=Dataset(gather.dataset.x), scale=2.0)
    assert numba.supports_fused(TrainingPlan(plan.networks, (dense, forward, *rest)))

    calls = []
    monkeypatch.setattr(reference, "train", lambda *call: calls.append(call) or Outcome((0.0,), 0))
    tables = [batches.hyperparameters[0]] * len(model.parameters)
    numba.train(plan, Batches(batches.order, BATCH, (tables,), (0.0,)))
    numba.train(plan, batches)
    assert len(calls) == 1
