"""Training plans: each executor against the reference, also for plans that no network makes; and the reference itself.

What that computes is written out here with the public functions of `gemmlet.kernels`.
"""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.optimizers import OPTIMIZER_RULES
from gemmlet.nn import GAN, MLP, SGD, Adam, AdamW, ClipNorm
from gemmlet.nn.fit import Training
from gemmlet.training import reference
from gemmlet.training.plan import (
    NOISE,
    SAMPLES,
    SECOND_PASS,
    Activation,
    AllReduce,
    Backward,
    Batches,
    Dataset,
    Dropout,
    Forward,
    Gather,
    GradientPenalty,
    InputNoise,
    Labels,
    Linear,
    Loss,
    Network,
    Outcome,
    Parameter,
    Penalty,
    TrainingPlan,
    Update,
)
from support import assert_within, same_bits

N, BATCH, FEATURES, LATENT = 37, 8, 11, 5
STEPS = math.ceil(N / BATCH)
# Of parameters after a few steps, relative to the largest: rounding, as training carries it on.
BOUNDS = {"float64": 1e-11, "float32": 1e-4}
BCE, MSE, SOFTMAX = "binary_cross_entropy_with_logits", "mean_squared_error", "softmax_cross_entropy"
# Rules of a plan: how many arrays of state, and hyperparameters that differ at each step.
STATES = {"sgd": 0, "momentum": 1, "adam": 2}


def optimizer(rule: str) -> Any:
    return {"sgd": SGD(0.1), "momentum": SGD(0.05, momentum=0.8), "adam": Adam(0.01, eps=1e-3)}[rule]


def network(
    widths: Sequence[int], activation: str, dtype: Any, rule: str = "sgd", *, averaged: bool = False
) -> Network:
    rng = np.random.default_rng(widths[0])
    operations: list[Any] = []
    for before, after in pairwise(widths):
        values = rng.normal(size=(before, after)) / math.sqrt(before), rng.normal(size=after) / 4
        parameters = [
            Parameter(
                value := array.astype(dtype),
                tuple(np.zeros_like(value) for _ in range(STATES[rule])),
                value.copy() if averaged else None,
            )
            for array in values
        ]
        operations += Linear(*parameters), Activation(activation, ACTIVATIONS[activation].default)
    return tuple(operations[:-1])


def plan_and_batches(networks: Sequence[Network], phases: Sequence[Any], **changes: Any) -> tuple[Any, Batches]:
    """Mini-batches for a plan: each update has hyperparameters of its own, at each step others."""
    plan, rng = TrainingPlan(tuple(networks), tuple(phases)), np.random.default_rng(0)
    tables = []
    for i, update in enumerate(plan.updates):
        values = [p.value for p in plan.parameters(update.network)]
        group = next(g for name in STATES if (g := optimizer(name).group(values)).rule == update.rule)
        tables.append(group.hyperparameters(np.linspace(1.0, 0.5, STEPS) / (i + 1)))
    batches = Batches(
        rng.permutation(N),
        BATCH,
        tuple(tables),
        tuple(float(i) for i, phase in enumerate(plan.phases) if isinstance(phase, Loss | Penalty)),
        np.linspace(0.5, 0.9, STEPS),
        rng.normal(size=(N, LATENT)).astype(plan.dtype),
        first_step=(1 << 40) - 2,  # the steps go round meanwhile
    )
    return plan, batches._replace(**changes)


def rule_name(rule: str) -> str:
    return optimizer(rule).group([np.zeros(1)]).rule


def samples(dtype: Any, kind: str = "dense") -> Dataset:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, FEATURES)).astype(dtype)
    if kind == "bytes":
        return Dataset(rng.integers(0, 256, (N, FEATURES), np.uint8))
    if kind == "dense":
        return Dataset(x)
    x[rng.uniform(size=x.shape) < 0.7] = 0
    if kind == "zeros":
        return Dataset(x, skip_zeros=True)
    if kind.startswith("few values"):
        values = np.concatenate([[0], rng.normal(size=255)]).astype(dtype)
        codes = rng.integers(0, 256, x.shape, np.uint8) * (x != 0)
        return Dataset(codes, skip_zeros=kind == "few values", value_of_byte=values)
    rows, columns = np.nonzero(x)
    indptr = np.searchsorted(rows, np.arange(N + 1))
    return Dataset(x[rows, columns], indptr.astype(np.int64), columns.astype(np.int32), skip_zeros=True)


CLASSES = np.random.default_rng(2).integers(0, 3, N)


def numbers(width: int, dtype: Any) -> Any:
    return np.random.default_rng(3).normal(size=(N, width)).astype(dtype)


# Plans.


def of_fit(model: Any, *data: Any, **arguments: Any) -> tuple[Any, Batches]:
    """The plan that `fit` makes."""
    made: list[Any] = []

    def training(self: Training, model: Any, history: Any, given: Any, plan: Any, *rest: Any, **settings: Any) -> None:
        made.append(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "__init__", training)
        patch.setattr(Training, "run", lambda self: None)
        model.fit(*data, **arguments)
    (plan,) = made
    return plan_and_batches(plan.networks, plan.phases)


def mlp(dtype: Any, **arguments: Any) -> tuple[Any, Batches]:
    model = MLP([FEATURES, 13, 3], dtype=dtype, label_smoothing=0.1, ema_decay=0.9)
    return of_fit(model, samples(dtype).x, CLASSES, **{"optimizer": optimizer("adam")} | arguments)


def gan(dtype: Any, **arguments: Any) -> tuple[Any, Batches]:
    x = samples(dtype, "bytes").x
    return of_fit(GAN(LATENT, [13, FEATURES], [9, 1], dtype=dtype), x, **{"optimizer": optimizer("adam")} | arguments)


def single(dtype: Any, dataset: Dataset, *losses: Loss, rule: str = "momentum", widths: Any = (FEATURES, 9, 3)) -> Any:
    """One network that sees samples."""
    phases = Forward(0, (SAMPLES,)), *losses, Backward(0), Update(0, rule_name(rule))
    return plan_and_batches([network(widths, "tanh", dtype, rule)], [Gather(dataset), *phases])


def generator_alone(dtype: Any) -> tuple[Any, Batches]:
    phases = Forward(0, (NOISE,)), Loss(0, MSE, numbers(4, dtype)), Backward(0), Update(0, rule_name("momentum"))
    networks = [network((LATENT, 9, 4), "tanh", dtype, "momentum", averaged=True)]
    return plan_and_batches(networks, [Gather(samples(dtype)), *phases])


def discriminator_alone(dtype: Any, dataset: Dataset) -> tuple[Any, Batches]:
    phases = Forward(0, (SAMPLES,)), Loss(0, BCE, (0.9,), sign=-1.0), Backward(0), Update(0, "sgd")
    networks = [network((FEATURES, 7, 1), "leaky_relu", dtype)]
    return plan_and_batches(networks, [Gather(dataset, 2.0, -1.0), *phases])


def three_sources(dtype: Any) -> tuple[Any, Batches]:
    """A network sees samples twice and noise: rows that follow each other."""
    phases = Forward(0, (SAMPLES, NOISE, SAMPLES)), Loss(0, BCE, (0.9, 0.0, 0.5)), Backward(0), Update(0, "sgd")
    noise = np.random.default_rng(4).normal(size=(N, FEATURES)).astype(dtype)
    networks = [network((FEATURES, 7, 1), "tanh", dtype)]
    return plan_and_batches(networks, [Gather(samples(dtype)), *phases], noise=noise)


def two_networks(dtype: Any, dataset: Dataset) -> tuple[Any, Batches]:
    """They see the same samples; one learns classes, the other one numbers."""
    networks = [network((FEATURES, 9, 3), "tanh", dtype, "adam"), network((FEATURES, 4), "tanh", dtype, "momentum")]
    targets = CLASSES, numbers(4, dtype)
    phases: list[Any] = [Gather(dataset)]
    for i, (loss, rule) in enumerate(((SOFTMAX, "adam"), (MSE, "momentum"))):
        reduction = "mean" if i else "sum"
        phases += Forward(i, (SAMPLES,)), Loss(i, loss, targets[i], reduction=reduction), Backward(i)
        phases.append(Update(i, rule_name(rule)))
    return plan_and_batches(networks, phases)


def penalized(dtype: Any, dataset: Dataset, rule: str) -> tuple[Any, Batches]:
    """Two networks, the weights of one are penalized twice, once in vain; of the rows some losses are limited."""
    networks = [network((FEATURES, 70, 3), "tanh", dtype, rule), network((FEATURES, 4), "tanh", dtype, "momentum")]
    phases: list[Any] = [Gather(dataset), Forward(0, (SAMPLES,)), Loss(0, SOFTMAX, CLASSES, 0.1), Backward(0)]
    phases += Penalty(0, 9.0), Loss(0, SOFTMAX, CLASSES, 0.1, limits=(0.8, 1.2)), Backward(0), Penalty(0, 0.3)
    others = Forward(1, (SAMPLES,)), Loss(1, MSE, numbers(4, dtype)), Backward(1), Update(1, "momentum")
    return plan_and_batches(networks, [*phases, *others, Penalty(0, 0.2), Update(0, rule_name(rule))])


def penalized_once(dtype: Any, dataset: Dataset) -> tuple[Any, Batches]:
    plan, _ = single(dtype, dataset, Loss(0, SOFTMAX, CLASSES, limits=(0.8, 1.2)), widths=(FEATURES, 70, 3))
    return plan_and_batches(plan.networks, [*plan.phases[:-1], Penalty(0, 0.5), plan.phases[-1]])


def adjusted(dtype: Any, dataset: Dataset, rule: str, **update: Any) -> tuple[Any, Batches]:
    """Penalties of both kinds, of weights some of which are 0, and an update that decays; by default weights alone."""
    plan, _ = single(dtype, dataset, Loss(0, SOFTMAX, CLASSES), rule=rule, widths=(FEATURES, 70, 3))
    *phases, last = plan.phases
    for p in plan.parameters(0):
        p.value[..., ::5] = 0
    phases += Penalty(0, 0.3, 0.7), Penalty(0, 0.01, 0.02, of_sum=False), Penalty(0, 0.0, 0.004, of_sum=False)
    plan, batches = plan_and_batches(plan.networks, [*phases, last._replace(**({"decays_biases": False} | update))])
    (table,), columns = batches.hyperparameters, OPTIMIZER_RULES[plan.updates[0].rule].hyperparameters
    for name in OPTIMIZER_RULES[plan.updates[0].rule].no_decay:
        table[:, columns.index(name)] = 0.9 if name == "shrink" else 0.2
    return plan, batches


def chained(dtype: Any, *, head: bool) -> tuple[Any, Batches]:
    """Two networks that make one, each with a rule of its own; or only the first one learns."""
    networks = [
        network((FEATURES, 9, 7), "leaky_relu", dtype, "momentum"),
        network((7, 3), "tanh", dtype, "adam" if head else "sgd"),
    ]
    phases = [Gather(samples(dtype)), Forward(0, (SAMPLES,)), Forward(1, (0,)), Loss(1, SOFTMAX, CLASSES, 0.2)]
    phases += [Backward(1)] * head + [Backward(1, to=0), Backward(0), Update(0, rule_name("momentum"))]
    return plan_and_batches(networks, [*phases, *[Update(1, rule_name("adam"))] * head])


def two_steps_of_the_discriminator(dtype: Any, max_norm: float | None = None) -> tuple[Any, Batches]:
    """For one of the generator; their updates are equal, or one of them may be clipped."""
    plan, _ = gan(dtype)
    gather, forward, *others = plan.phases
    end = next(i for i, phase in enumerate(others) if isinstance(phase, Update))
    first = *others[:end], others[end]._replace(max_norm=max_norm)
    return plan_and_batches(plan.networks, [gather, forward, *first, *others])


def with_reduction(dtype: Any) -> tuple[Any, Batches]:
    def halve(gradients: Sequence[Any]) -> None:
        for gradient in gradients:
            gradient *= 0.5

    plan, _ = mlp(dtype)
    return plan_and_batches(plan.networks, [*plan.phases[:-1], AllReduce(0, halve), plan.phases[-1]])


def with_weights(plan: TrainingPlan, weights: Any) -> TrainingPlan:
    gather = plan.gather._replace(dataset=plan.gather.dataset._replace(weights=weights))
    return TrainingPlan(plan.networks, (gather, *plan.phases[1:]))


def weighted(plan: TrainingPlan, batches: Batches) -> tuple[Any, Batches]:
    """Each sample counts something else, some of them nothing."""
    weights = np.random.default_rng(5).uniform(0, 3, N) * (np.arange(N) % 4 != 0)
    plan = with_weights(plan, weights)
    return plan_and_batches(plan.networks, plan.phases, noise=batches.noise)


def by_rows(plan: TrainingPlan, batches: Batches) -> tuple[Any, Batches]:
    """The weighted sum is divided by the number of rows; the first mini-batch has no weight at all."""
    dataset = plan.gather.dataset
    assert dataset.weights is not None
    weights = dataset.weights.copy()
    weights[batches.order[: batches.size]] = 0
    gather = plan.gather._replace(dataset=dataset._replace(weights=weights, divides_by_rows=True))
    return plan_and_batches(plan.networks, [gather, *plan.phases[1:]], noise=batches.noise)


def labelled(dtype: Any, dataset: Dataset) -> tuple[Any, Batches]:
    """Each network is given the classes of the samples beside its inputs, of noise and generated rows too."""
    networks = [
        network((LATENT + 3, 40, FEATURES), "tanh", dtype, "adam", averaged=True),
        network((FEATURES + 3, 70, 9, 1), "leaky_relu", dtype, "momentum"),
    ]
    phases: list[Any] = [Gather(dataset._replace(labels=Labels(CLASSES, 3)), 2.0, -1.0), Forward(0, (NOISE,))]
    phases += Forward(1, (SAMPLES, 0)), Loss(1, BCE, (0.9, 0.0)), Backward(1), Penalty(1, 0.5), Update(1, "momentum")
    phases += Forward(1, (0,)), Loss(1, BCE, (1.0,)), Backward(1, to=0), Backward(0), Update(0, rule_name("adam"))
    return plan_and_batches(networks, phases)


def with_gradient_penalty(
    dtype: Any, dataset: Dataset, share: int, widths: Any = (FEATURES, 70, 9, 1)
) -> tuple[Any, Batches]:
    """A discriminator whose gradient by samples is penalized; its weights are so, too."""
    plan, _ = gan(dtype)
    phases = list(plan.phases)
    gather = plan.gather._replace(dataset=dataset)
    networks = [network((LATENT, 40, FEATURES), "tanh", dtype, "adam", averaged=True)]
    networks.append(network(widths, "leaky_relu", dtype, "momentum"))
    phases[0] = gather
    at = next(i for i, phase in enumerate(phases) if isinstance(phase, Update))
    phases[at : at + 1] = GradientPenalty(1, 5.0, share), Penalty(1, 0.5), Update(1, "momentum")
    return plan_and_batches(networks, phases)


def in_large_batches(plan: TrainingPlan, batches: Batches) -> tuple[Any, Batches]:
    """Of a size with which C++ trains wide networks layer by layer."""
    steps = -(-N // 20)
    assert batches.decay is not None
    tables = tuple(table[:steps] for table in batches.hyperparameters)
    return plan, batches._replace(size=20, hyperparameters=tables, decay=batches.decay[:steps])


def labelled_and_penalized(dtype: Any) -> tuple[Any, Batches]:
    plan, _ = labelled(dtype, samples(dtype, "bytes"))
    phases = list(plan.phases)
    phases.insert(5, GradientPenalty(1, 3.0, 2))
    return plan_and_batches(plan.networks, phases)


def labelled_alone(dtype: Any, dataset: Dataset) -> tuple[Any, Batches]:
    dataset = dataset._replace(labels=Labels(CLASSES, 3))
    return single(dtype, dataset, Loss(0, SOFTMAX, CLASSES[::-1].copy()), widths=(FEATURES + 3, 9, 3))


def activations_alone(dtype: Any) -> tuple[Any, Batches]:
    """Activations that follow no linear layer."""
    plan, _ = single(dtype, samples(dtype), Loss(0, SOFTMAX, CLASSES))
    first, _, last = plan.networks[0]
    operations = Activation("gelu", 0.0), first, Activation("leaky_relu", 0.1), Activation("silu", 0.0), last
    return plan_and_batches([(*operations, Activation("tanh", 0.0))], plan.phases)


def with_dropout(plan: TrainingPlan, batches: Batches) -> tuple[Any, Batches]:
    """All layers drop some of their inputs, each with a rate of its own."""
    networks = []
    for n, operations in enumerate(plan.networks):
        dropped: list[Any] = []
        for operation in operations:
            if isinstance(operation, Linear):
                i = len(dropped)
                dropped.append(Dropout(0.2 + 0.1 * (i % 4), 256 + 32 * n + i, 2**64 - 1 - n))
            dropped.append(operation)
        networks.append(tuple(dropped))
    return plan_and_batches(networks, with_streams(plan.phases), noise=batches.noise)


def with_streams(phases: Sequence[Any]) -> list[Any]:
    """Each pass of a network but the first has another stream."""
    passes: dict[int, int] = {}
    changed = []
    for phase in phases:
        if isinstance(phase, Forward):
            passes[phase.network] = passes.get(phase.network, -1) + 1
            phase = phase._replace(stream=passes[phase.network] * SECOND_PASS // 4)
        changed.append(phase)
    return changed


PLANS: dict[str, Callable[[Any], tuple[Any, Batches]]] = {
    "mlp": mlp,
    "mlp, clipped": lambda dtype: mlp(dtype, optimizer=ClipNorm(optimizer("momentum"), 0.1)),
    "mlp, reduced": with_reduction,
    "gan": gan,
    "gan, one clipped": lambda dtype: gan(dtype, discriminator_optimizer=ClipNorm(optimizer("momentum"), 0.1)),
    "bytes": lambda dtype: single(dtype, samples(dtype, "bytes"), Loss(0, SOFTMAX, CLASSES)),
    "zeros": lambda dtype: single(dtype, samples(dtype, "zeros"), Loss(0, SOFTMAX, CLASSES)),
    "few values": lambda dtype: single(dtype, samples(dtype, "few values"), Loss(0, SOFTMAX, CLASSES)),
    "few values, dense": lambda dtype: discriminator_alone(dtype, samples(dtype, "few values, dense")),
    "csr": lambda dtype: single(dtype, samples(dtype, "csr"), Loss(0, SOFTMAX, CLASSES)),
    "classes as numbers": lambda dtype: single(dtype, samples(dtype), Loss(0, MSE, CLASSES, reduction="mean")),
    "numbers as classes": lambda dtype: single(
        dtype, samples(dtype), Loss(0, SOFTMAX, np.eye(3, dtype=dtype)[CLASSES], 0.1)
    ),
    "activations alone": activations_alone,
    "one layer": lambda dtype: single(dtype, samples(dtype), Loss(0, SOFTMAX, CLASSES), widths=(FEATURES, 3)),
    # The gradient is the last one's.
    "two losses": lambda dtype: single(
        dtype, samples(dtype), Loss(0, SOFTMAX, CLASSES), Loss(0, BCE, CLASSES, sign=-1.0)
    ),
    "one penalty": lambda dtype: penalized_once(dtype, samples(dtype)),
    "one penalty of zeros": lambda dtype: penalized_once(dtype, samples(dtype, "zeros")),
    "penalty": lambda dtype: penalized(dtype, samples(dtype), "adam"),
    "penalty of zeros": lambda dtype: penalized(dtype, samples(dtype, "zeros"), "sgd"),
    "l1": lambda dtype: adjusted(dtype, samples(dtype), "momentum"),
    "l1 of zeros": lambda dtype: adjusted(dtype, samples(dtype, "zeros"), "sgd"),
    "l1, csr": lambda dtype: adjusted(dtype, samples(dtype, "csr"), "adam"),
    "clipped by value": lambda dtype: adjusted(dtype, samples(dtype), "adam", clip_value=0.01, decays_biases=True),
    "clipped by value, of zeros": lambda dtype: adjusted(dtype, samples(dtype, "zeros"), "sgd", clip_value=0.01),
    "clipped by norm and value": lambda dtype: adjusted(
        dtype, samples(dtype), "momentum", max_norm=0.1, clip_value=0.01
    ),
    "gan, clipped by value": lambda dtype: gan(
        dtype, optimizer=SGD(0.05, 0.8, clip_value=1e-3), discriminator_optimizer=optimizer("adam")
    ),
    "decay of weights alone": lambda dtype: mlp(dtype, optimizer=AdamW(0.01, eps=1e-3)),
    "weighted l1": lambda dtype: weighted(*adjusted(dtype, samples(dtype), "sgd", clip_value=0.02)),
    "limits of elements": lambda dtype: single(dtype, samples(dtype), Loss(0, BCE, CLASSES, limits=(0.5, 0.9))),
    "weights": lambda dtype: weighted(*penalized_once(dtype, samples(dtype))),
    "weights by rows": lambda dtype: by_rows(*weighted(*penalized_once(dtype, samples(dtype)))),
    "weights of zeros": lambda dtype: weighted(*penalized(dtype, samples(dtype, "zeros"), "adam")),
    "weights, csr": lambda dtype: weighted(*single(dtype, samples(dtype, "csr"), Loss(0, BCE, CLASSES))),
    "weights of three sources": lambda dtype: weighted(*three_sources(dtype)),
    "gradient penalty": lambda dtype: with_gradient_penalty(dtype, samples(dtype), 1),
    "gradient penalty for some": lambda dtype: with_gradient_penalty(dtype, samples(dtype, "bytes"), 3),
    "gradient penalty, one layer": lambda dtype: with_gradient_penalty(dtype, samples(dtype), 2, (FEATURES, 1)),
    "gradient penalty, layer by layer": lambda dtype: in_large_batches(
        *with_gradient_penalty(dtype, samples(dtype), 2, (FEATURES, 550, 520, 1))
    ),
    "gradient penalty and labels": labelled_and_penalized,
    "labels": lambda dtype: labelled(dtype, samples(dtype)),
    "labels of bytes": lambda dtype: labelled(dtype, samples(dtype, "bytes")),
    "labels of zeros": lambda dtype: labelled(dtype, samples(dtype, "zeros")),
    "labels, one network": lambda dtype: labelled_alone(dtype, samples(dtype)),
    "labels, one network of zeros": lambda dtype: labelled_alone(dtype, samples(dtype, "zeros")),
    "labels, csr": lambda dtype: labelled_alone(dtype, samples(dtype, "csr")),
    "generator alone": generator_alone,
    "discriminator alone": lambda dtype: discriminator_alone(dtype, samples(dtype)),
    "discriminator of zeros": lambda dtype: discriminator_alone(dtype, samples(dtype, "zeros")),
    "three sources": three_sources,
    "two networks": lambda dtype: two_networks(dtype, samples(dtype)),
    "two networks of zeros": lambda dtype: two_networks(dtype, samples(dtype, "zeros")),
    "two networks, csr": lambda dtype: two_networks(dtype, samples(dtype, "csr")),
    "chained": lambda dtype: chained(dtype, head=True),
    "chained, the first learns": lambda dtype: chained(dtype, head=False),
    "two steps of the discriminator": two_steps_of_the_discriminator,
}
DROPPED = (
    "mlp", "mlp, clipped", "gan", "bytes", "zeros", "few values", "few values, dense", "csr", "one layer",
    "three sources", "two networks", "two networks, csr", "chained", "two steps of the discriminator",
    "labels", "labels of bytes", "labels, one network", "labels, csr", "gradient penalty and labels",
)  # fmt: skip
PLANS |= {f"dropout, {name}": lambda dtype, name=name: with_dropout(*PLANS[name](dtype)) for name in DROPPED}
# So wide that layers are computed one by one; activations that need their input, too.
PLANS["dropout, wide"] = lambda dtype: with_dropout(
    *single(dtype, samples(dtype, "zeros"), Loss(0, SOFTMAX, CLASSES), widths=(FEATURES, 600, 450, 3))
)
PLANS["dropout, wide gan"] = lambda dtype: with_dropout(
    *of_fit(
        GAN(LATENT, [300, FEATURES], [700, 400, 1], dtype=dtype, discriminator_activation="gelu"),
        samples(dtype, "bytes").x,
        optimizer=optimizer("adam"),
    )
)


def with_noise(plan: TrainingPlan, batches: Batches) -> tuple[Any, Batches]:
    """Each network has noise on its inputs."""
    networks = [(InputNoise(0.3 + n, 255 - n, 2**64 - 1 - n), *network) for n, network in enumerate(plan.networks)]
    return TrainingPlan(tuple(networks), tuple(with_streams(plan.phases))), batches


NOISY = (
    "mlp", "gan", "bytes", "zeros", "few values", "few values, dense", "csr", "one layer", "three sources", "chained",
    "labels of bytes", "labels, one network", "gradient penalty for some", "gradient penalty, layer by layer",
    "gradient penalty and labels", "dropout, gan", "dropout, wide", "dropout, wide gan",
)  # fmt: skip
PLANS |= {f"noise, {name}": lambda dtype, name=name: with_noise(*PLANS[name](dtype)) for name in NOISY}


def arrays_of(plan: TrainingPlan) -> list[Any]:
    parameters = [p for i in range(len(plan.networks)) for p in plan.parameters(i)]
    return [array for p in parameters for array in p.arrays() if array is not None]


def copied(plan: TrainingPlan) -> TrainingPlan:
    return TrainingPlan(copy.deepcopy(plan.networks), plan.phases)


def staged(backend: Any, plan: TrainingPlan, *calls: Batches) -> tuple[list[Outcome], list[Any]]:
    """What calls of `train` return, and the arrays they leave behind."""
    there = backend.stage(mine := copied(plan))
    outcomes = [backend.train(there, batches) for batches in calls]
    backend.write_back(there)
    return outcomes, arrays_of(mine)


@pytest.mark.parametrize("name", PLANS)
def test_every_executor_agrees_with_the_reference(name: str, backend: Any, dtype: Any) -> None:
    plan, batches = PLANS[name](dtype)
    if name.startswith("noise") and not backend.supports_fused(plan):
        pytest.skip("the reference trains")
    expected = copied(plan)
    wanted = reference.train(backend, expected, batches)
    (outcome,), arrays = staged(backend, plan, batches)
    assert outcome.correct == wanted.correct
    bound = BOUNDS[str(dtype)]
    np.testing.assert_allclose(outcome.losses, wanted.losses, rtol=bound)
    scale = max(1.0, *(float(np.abs(array).max()) for array in arrays_of(expected)))
    for array, correct, before in zip(arrays, arrays_of(expected), arrays_of(plan), strict=True):
        assert_within(array, correct, bound * scale)
        assert not same_bits(array, before) or name == "chained, the first learns"


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_fused(name: str, any_threads_backend: Any) -> None:
    """Wherever the plan is without it; but of `cpu` sparse matrices become dense in the reference.

    Of `cuda` no noise of a generator's inputs, which no model of `gemmlet.nn` has; of `numba` none.
    """
    plan, _ = PLANS[f"noise, {name}"](np.float32)
    fuses, knows = any_threads_backend.supports_fused, {"cpu": name != "csr", "cuda": "gan" not in name}
    assert fuses(plan) == (knows.get(any_threads_backend.name, False) and fuses(PLANS[name](np.float32)[0]))


def test_activations_alone_agree_with_pytorch(backend: Any) -> None:
    torch = pytest.importorskip("torch")
    plan, _ = activations_alone(np.float64)
    functional, x = torch.nn.functional, torch.tensor(samples(np.float64).x)
    tensors = [torch.tensor(p.value, requires_grad=True) for p in plan.parameters(0)]
    hidden = functional.leaky_relu(functional.gelu(x) @ tensors[0] + tensors[1], 0.1)
    outputs = torch.tanh(functional.silu(hidden) @ tensors[2] + tensors[3])
    wanted = functional.cross_entropy(outputs, torch.tensor(CLASSES))
    wanted.backward()
    step = reference.gradients(backend, TrainingPlan(plan.networks, plan.phases[:-1]), N)
    assert step.losses == pytest.approx([wanted.item()], rel=1e-12)
    for gradient, tensor in zip(step.gradients[0], tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "mlp, clipped",
        "gan",
        "labels",
        "chained",
        "two networks",
        "one penalty",
        "weights",
        "l1",
        "dropout, mlp",
        "dropout, gan",
        "noise, mlp",
        "noise, gan",
    ],
)
def test_calls_leave_the_bits(name: str, backend: Any, dtype: Any) -> None:
    """However mini-batches are divided among calls; and a mini-batch may be larger than what there is."""
    plan, batches = PLANS[name](dtype)

    def part(first: int, end: int) -> Batches:
        rows = slice(first * BATCH, end * BATCH)
        tables = tuple(table[first:end] for table in batches.hyperparameters)
        return batches._replace(
            order=batches.order[rows],
            size=BATCH if end < STEPS else 1000 if end == first + 1 else BATCH,
            hyperparameters=tables,
            losses=(0.0,) * len(batches.losses),
            decay=batches.decay[first:end],
            noise=batches.noise[rows],
            first_step=batches.first_step + first,
        )

    (whole,), expected = staged(backend, plan, part(0, STEPS))
    outcomes, arrays = staged(backend, plan, part(0, 1), part(1, STEPS - 1), part(STEPS - 1, STEPS))
    assert all(map(same_bits, arrays, expected))
    assert sum(outcome.correct for outcome in outcomes) == whole.correct
    np.testing.assert_allclose(np.sum([outcome.losses for outcome in outcomes], axis=0), whole.losses, rtol=1e-12)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (-1.0, 2.0)], ids=str)
def test_weights_out_of_their_domain(weights: tuple[float, float], backend: Any, dtype: Any) -> None:
    """Those of the last mini-batch; an executor of the backend's own has taken no step before, the reference has."""
    plan, batches = PLANS["weights"](dtype)
    last, numbers = batches.order[-BATCH:], np.ones(N)
    numbers[last] = np.resize(weights, BATCH)
    plan = with_weights(plan, numbers)
    before = [array.copy() for array in arrays_of(plan)]
    with pytest.raises(ValueError, match="weights: "):
        backend.train(backend.stage(plan), batches if backend.supports_fused(plan) else batches._replace(order=last))
    assert all(map(same_bits, arrays_of(plan), before))


@pytest.mark.parametrize(
    "weights",
    [np.ones(N - 1), np.ones((N, 1)), np.ones(N, np.float32), np.ones(2 * N)[::2]],
    ids=lambda w: str(w.shape),
)
@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_weights_of_another_form(kind: str, weights: Any, dtype: Any) -> None:
    plan, _ = single(dtype, samples(dtype, kind), Loss(0, SOFTMAX, CLASSES))
    with pytest.raises(ValueError, match=rf"weights: expected a contiguous array of shape \({N},\) and float64, not"):
        with_weights(plan, weights)


@pytest.mark.parametrize("labels", [CLASSES[1:], CLASSES.astype(np.int32), np.repeat(CLASSES, 2)[::2]], ids=len)
def test_labels_of_another_form(labels: Any, dtype: Any) -> None:
    dataset = samples(dtype)._replace(labels=Labels(labels, 3))
    with pytest.raises(ValueError, match=rf"labels: expected a contiguous array of shape \({N},\) and int64, not"):
        single(dtype, dataset, Loss(0, SOFTMAX, CLASSES), widths=(FEATURES + 3, 9, 3))


@pytest.mark.parametrize("factor", [2.0**-1060, 2.0**-130, 2.0**130, 2.0**1015])
def test_the_size_of_weights_changes_no_bit(factor: float, backend: Any, dtype: Any) -> None:
    """Their ratio is what counts, also where neither they nor what they are multiplied by would fit float32."""
    plan, batches = single(dtype, samples(dtype), Loss(0, MSE, 1e4 * numbers(3, dtype)))
    plan, batches = plan_and_batches(plan.networks, [*plan.phases[:-1], Penalty(0, 0.0), plan.phases[-1]])
    weights = np.arange(N) % 5.0
    wanted, expected = staged(backend, with_weights(plan, weights), batches)
    outcomes, arrays = staged(backend, with_weights(plan, factor * weights), batches)
    assert outcomes == wanted
    assert all(map(same_bits, arrays, expected))
    assert all(np.isfinite(array).all() for array in arrays)


def test_weights_whose_mean_is_below_the_smallest_number(backend: Any, dtype: Any) -> None:
    plan, _ = single(dtype, samples(dtype), Loss(0, MSE, numbers(3, dtype)))
    plan, batches = plan_and_batches(plan.networks, [*plan.phases[:-1], Penalty(0, 0.0), plan.phases[-1]])
    weights = np.zeros(N)
    weights[batches.order[::BATCH]] = 1.0
    wanted, expected = staged(backend, with_weights(plan, weights), batches)
    outcomes, arrays = staged(backend, with_weights(plan, 5e-324 * weights), batches)
    assert outcomes == wanted
    assert all(map(same_bits, arrays, expected))


def test_averages_without_a_decay_are_the_parameters(backend: Any, dtype: Any) -> None:
    plan, batches = mlp(dtype)
    there = backend.stage(plan)
    backend.train(there, batches._replace(decay=None))
    backend.write_back(there)
    for parameter in plan.parameters(0):
        assert same_bits(parameter.average, parameter.value)


# Reduction of gradients.


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_of_a_plan_has_executors_of_its_own(copy_of: Any, backend: Any, dtype: Any) -> None:
    plan, batches = mlp(dtype)
    backend.train(plan, batches)
    other = copy_of(plan)
    assert not other.executors
    assert [type(phase) for phase in other.phases] == [type(phase) for phase in plan.phases]


def test_what_is_reduced(backend: Any, dtype: Any) -> None:
    """The gradients of the parameters, in order; what they are changed to is what the update takes."""
    seen: list[Any] = []

    def reduce(gradients: Sequence[Any]) -> None:
        seen.append([gradient.copy() for gradient in gradients])
        for i, gradient in enumerate(gradients):
            gradient[...] = i + 1

    model, x = MLP([FEATURES, 9, 3], dtype=dtype), samples(dtype).x
    plan = model._plan(model._samples(x), CLASSES, SGD(0.5).group(model.parameters))
    *phases, update = plan.phases
    plan = TrainingPlan(plan.networks, (*phases, AllReduce(0, reduce), update))
    before, (_, gradients) = copied(plan), model.loss_and_gradients(x, CLASSES)
    there = backend.stage(plan)
    backend.train(there, Batches(np.arange(N), N, (np.array([[0.5, 0.0]]),), (0.0,)))
    backend.write_back(there)
    assert len(seen) == 1
    for gradient, correct in zip(seen[0], gradients, strict=True):
        assert_within(gradient, correct, BOUNDS[str(dtype)])
    for i, (param, old) in enumerate(zip(model.parameters, arrays_of(before), strict=True)):
        assert_within(param, old - dtype.type(0.5 * (i + 1)), BOUNDS[str(dtype)])


@pytest.mark.parametrize("max_norm", [None, 0.2])
def test_two_processes_take_the_step_of_the_whole_mini_batch(max_norm: float | None, backend: Any, dtype: Any) -> None:
    """Each has one half of it, and the mean of the gradients of both, which are clipped after that."""
    model, half = MLP([FEATURES, 9, 3], dtype=dtype), BATCH // 2
    group = optimizer("adam").group(model.parameters)
    alone = model._plan(model._samples(samples(dtype).x), CLASSES, group)
    *phases, update = alone.phases
    clipped = update._replace(max_norm=max_norm)
    steps = N // BATCH
    order = np.random.default_rng(5).permutation(N)[: steps * BATCH]
    tables = (group.hyperparameters(np.ones(steps)),)
    barrier, sent = threading.Barrier(2, timeout=60), [[], []]

    def process(rank: int) -> tuple[Outcome, list[Any]]:
        def mean(gradients: Sequence[Any]) -> None:
            sent[rank] = [gradient.copy() for gradient in gradients]
            barrier.wait()
            for gradient, *others in zip(gradients, *sent, strict=True):
                gradient[...] = (others[0] + others[1]) / 2
            barrier.wait()

        plan = TrainingPlan(copy.deepcopy(alone.networks), (*phases, AllReduce(0, mean), clipped))
        rows = order.reshape(steps, 2, half)[:, rank].reshape(-1)
        outcomes, arrays = staged(backend, plan, Batches(rows, half, tables, (0.0,)))
        return outcomes[0], arrays

    with ThreadPoolExecutor(2) as pool:
        (first, arrays), (second, others) = pool.map(process, range(2))
    expected = TrainingPlan(copy.deepcopy(alone.networks), (*phases, clipped))
    wanted = reference.train(backend, expected, Batches(order, BATCH, tables, (0.0,)))
    assert first.correct + second.correct == wanted.correct
    assert first.losses[0] + second.losses[0] == pytest.approx(wanted.losses[0], rel=BOUNDS[str(dtype)])
    assert all(map(same_bits, arrays, others))
    for array, correct in zip(arrays, arrays_of(expected), strict=True):
        assert_within(array, correct, BOUNDS[str(dtype)])


# The reference.


def test_equal_updates_have_hyperparameters_of_their_own(backend: Any, dtype: Any) -> None:
    """As updates that are told apart by a limit that no norm reaches."""
    results = []
    for max_norm in (None, 1e9):
        plan, batches = two_steps_of_the_discriminator(dtype, max_norm)
        results.append((reference.train(backend, plan, batches).losses, arrays_of(plan)))
    assert results[0][0] == results[1][0]
    assert all(map(same_bits, results[0][1], results[1][1]))


def test_a_sparse_matrix_for_the_second_network(backend: Any, dtype: Any) -> None:
    results = []
    for kind in ("zeros", "csr"):
        plan, batches = two_networks(dtype, samples(dtype, kind))
        noise = np.ones((N, 9), dtype)
        phases = plan.phases[0], Forward(0, (NOISE,)), *plan.phases[5:]
        plan = TrainingPlan((network((9, 4), "tanh", dtype), *plan.networks[1:]), phases)
        (table,) = batches.hyperparameters[1:]
        batches = batches._replace(noise=noise, hyperparameters=(table,), losses=(0.0,))
        reference.train(backend, plan, batches)
        results.append(arrays_of(plan))
    assert all(map(same_bits, *results))


# The reference, with public functions.


def forward(layers: list[tuple[Any, ...]], x: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    """Outputs, and of each layer its input, its output and its preactivation."""
    saved = []
    for weight, bias, activation, parameter in layers:
        if activation is None:
            y = z = kernels.linear(x, weight, bias)
        else:
            y, z = kernels.linear(
                x, weight, bias, activation, activation_parameter=parameter, return_preactivation=True
            )
        saved.append((x, y, z))
        x = y
    return x, saved


def backward(layers: list[tuple[Any, ...]], saved: list[tuple[Any, ...]], grad: Any) -> tuple[Any, list[Any]]:
    """The gradient of the inputs, and those of the parameters."""
    gradients: list[Any] = []
    for (weight, _, activation, parameter), (x, y, z) in zip(reversed(layers), reversed(saved), strict=True):
        grad, *both = kernels.linear_backward(grad, x, weight, y, activation, z=z, activation_parameter=parameter)
        gradients = [*both, *gradients]
    return grad, gradients


def layers_of(parameters: list[Any], activation: str, output: str | None = None, number: Any = None) -> list[Any]:
    count = len(parameters) // 2
    names = [activation] * (count - 1) + [output]
    return [(*parameters[2 * i : 2 * i + 2], names[i], number if i < count - 1 else None) for i in range(count)]


def adam(parameters: list[Any], gradients: list[Any], states: list[Any], step: int, rate: float) -> None:
    for param, grad, (m, v) in zip(parameters, gradients, states, strict=True):
        kernels.adam_update(param, grad, m, v, step=step, lr=rate, beta1=0.9, beta2=0.999, eps=1e-3)


def zeros_for(parameters: list[Any]) -> list[Any]:
    return [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]


@pytest.fixture
def by_reference(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each backend, whose `fit` trains with the reference executor."""
    monkeypatch.setattr(type(backend), "supports_fused", lambda self, plan: False)
    return backend


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize(("activation", "number"), [("tanh", None), ("gelu", None), ("leaky_relu", 0.3)])
def test_a_step_of_an_mlp_written_out(
    activation: str, number: float | None, output: str, by_reference: Any, dtype: Any
) -> None:
    model = MLP([FEATURES, 9, 7, 3], activation, output, dtype=dtype, activation_parameter=number, ema_decay=0.9,
                label_smoothing=0.1 if output == "softmax" else 0.0)  # fmt: skip
    parameters = [p.copy() for p in model.parameters]
    averages, states = [p.copy() for p in parameters], zeros_for(parameters)
    x, y = samples(dtype).x, numbers(3, dtype) if output == "identity" else CLASSES
    total = 0.0
    for step in range(1, STEPS + 1):
        rows = slice((step - 1) * BATCH, step * BATCH)
        outputs, saved = forward(layers := layers_of(parameters, activation, number=number), x[rows])
        if output == "softmax":
            loss, grad = kernels.softmax_cross_entropy(outputs, y[rows], label_smoothing=0.1)
        elif output == "sigmoid":
            loss, grad = kernels.binary_cross_entropy_with_logits(outputs, np.eye(3, dtype=dtype)[y[rows]])
            loss, grad = loss * 3, grad * 3
        else:
            loss, grad = kernels.mean_squared_error(outputs, y[rows])
        adam(parameters, backward(layers, saved, grad)[1], states, step, 0.01)
        total += loss * len(outputs)
        decay = min(0.9, (1 + step) / (10 + step))
        averages = [average * decay + (1 - decay) * p for average, p in zip(averages, parameters, strict=True)]
    history = model.fit(x, y, 1, BATCH, Adam(0.01, eps=1e-3), shuffle=False)
    assert all(map(same_bits, model.parameters, parameters))
    assert all(map(same_bits, model._average.parameters, averages))
    assert history.loss == [total / N]


@pytest.mark.parametrize("loss", ["non_saturating", "minimax"])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_a_step_of_a_gan_written_out(activation: str, loss: str, by_reference: Any, dtype: Any) -> None:
    def make() -> GAN:
        return GAN(LATENT, [9, FEATURES], [7, 1], loss=loss, dtype=dtype, discriminator_activation=activation,
                   generator_activation=activation)  # fmt: skip

    model, twin = make(), make()
    images, slope = samples(dtype, "bytes").x, 0.2 if activation == "leaky_relu" else None
    made, judging = twin.generator_parameters, twin.discriminator_parameters
    states, others, averages = zeros_for(made), zeros_for(judging), [p.copy() for p in made]
    totals, noise = [0.0, 0.0], twin._draw(twin._training_noise, N)
    for step in range(1, STEPS + 1):
        rows = slice((step - 1) * BATCH, step * BATCH)
        real = by_reference.scaled(images[rows], dtype, 2.0, -1.0)
        fake, of_generator = forward(layers_of(made, activation, "tanh", slope), noise[rows])
        # The kernels' mean is over both kinds of rows, each network's objective has the mean over each kind.
        wanted = np.repeat(np.array([0.9, 0.0], dtype), len(fake))[:, np.newaxis]
        outputs, saved = forward(layers := layers_of(judging, activation, number=slope), np.concatenate([real, fake]))
        value, grad = kernels.binary_cross_entropy_with_logits(outputs, wanted)
        adam(judging, backward(layers, saved, 2 * grad)[1], others, step, 0.01)
        totals[1] += 2 * value * len(fake)
        outputs, saved = forward(layers, fake)
        sign = 1.0 if loss == "non_saturating" else -1.0
        target = np.full_like(outputs, 1.0 if loss == "non_saturating" else 0.0)
        value, grad = kernels.binary_cross_entropy_with_logits(outputs, target)
        grad, _ = backward(layers, saved, dtype.type(sign) * grad)
        adam(made, backward(layers_of(made, activation, "tanh", slope), of_generator, grad)[1], states, step, 0.01)
        totals[0] += sign * value * len(fake)
        decay = min(0.999, (1 + step) / (10 + step))
        averages = [average * decay + (1 - decay) * p for average, p in zip(averages, made, strict=True)]
    history = model.fit(images, 1, BATCH, Adam(0.01, eps=1e-3), shuffle=False)
    assert all(map(same_bits, model.generator_parameters, made))
    assert all(map(same_bits, model.discriminator_parameters, judging))
    assert all(map(same_bits, model._average.parameters, averages))
    assert [history.generator_loss, history.discriminator_loss] == [[total / N] for total in totals]
