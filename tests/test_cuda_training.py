"""Fused training by CUDA kernels gives the CPU's weights, whatever kernels a step is made of.

Also: the same bits on every run, in every order of threads, and however the steps are divided into calls. What
`gemmlet.nn` makes of it is in test_fused.py.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import pytest

pytest.importorskip("cupy")

import cuda_on_host.backend
from cuda_on_host.device import COMPILER, HERE, ROOT, SANITIZERS, THREAD_ORDERS, HostDevice
from gemmlet import use_backend
from gemmlet.backends import select
from gemmlet.backends.cuda import declarations
from gemmlet.backends.cuda import training as cuda_training
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.backends.cuda.training import Session
from gemmlet.formulas import dropout
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES, adam_hyperparameters
from gemmlet.formulas.random import STREAMS
from gemmlet.nn import GAN, MLP
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

if shutil.which(COMPILER) is None:
    pytest.skip(f"there is no {COMPILER}", allow_module_level=True)

# Of weights after some steps, and losses, relative to the largest: rounding, as training carries it on.
BOUNDS = {"float64": 1e-11, "float32": 2e-5}

# Of random numbers: the seed, which is beyond a signed number, and the first step, after which words carry over.
KEY, FIRST_STEP = 2**64 - 5, 2**32 - 2

# What steps are made of: tiles of one kind; whether the last layer goes with the loss in one kernel; and of how many
# blocks the cluster may be that trains perceptrons with one hidden layer.
PLANS: dict[str, tuple[str, bool, tuple[int, ...]]] = {
    "small": ("SmallTile<8>", True, ()),
    "medium": ("SmallTile<16>", False, ()),
    "wide": ("WideTile", True, ()),
    "cluster": ("SmallTile<8>", True, (2, 4)),
}


@pytest.fixture(scope="module")
def cpu() -> Any:
    try:
        return select.load("cpu")
    except (RuntimeError, ImportError) as error:
        pytest.skip(str(error))


@pytest.fixture
def device() -> Any:
    return cuda_on_host.backend.load()._first


def use_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, top, clusters = PLANS[name]
    monkeypatch.setattr(cuda_training, "_kind_of_tile", lambda rows, columns: kind)
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", clusters)
    if not top:
        monkeypatch.setattr(cuda_training, "MAX_TOP_BYTES", 0)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as no plan says otherwise."""
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", ())


@pytest.fixture(params=[name for name in PLANS if name != "cluster"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_plan(request.param, monkeypatch)
    return str(request.param)


def network(
    widths: Sequence[int],
    dtype: Any,
    rule: str = "sgd",
    *,
    hidden: str = "tanh",
    output: str | None = None,
    averaged: bool = False,
    rates: Sequence[float] = (),
    noise: float = 0.0,
    seed: int = 0,
) -> Network:
    """A network in the middle of its training: states are not 0. `rates` are those of the dropout of layers' inputs."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Any:
        return (0.6 * rng.normal(size=shape)).astype(dtype)

    operations: list[Any] = [InputNoise(noise, STREAMS["input noise"], KEY)] if noise else []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        shapes, parameters = ((before, after), (after,)), []
        states = [tuple(0.1 * draw(*shape) ** 2 for _ in OPTIMIZER_RULES[rule].state) for shape in shapes]
        averages = [draw(*shape) if averaged else None for shape in shapes]
        values = draw(before, after) / np.sqrt(before, dtype=dtype), draw(after)
        parameters = list(map(Parameter, values, states, averages))
        if rates and rates[i]:
            operations.append(Dropout(rates[i], STREAMS["dropout"] + i, KEY))
        operations.append(Linear(*parameters))
        if activation := hidden if i + 2 < len(widths) else output:
            operations.append(Activation(activation, ACTIVATIONS[activation].default))
    return tuple(operations)


def numbers(rule: str, steps: int, lr: float = 0.05) -> Any:
    """The rule's numbers, other ones in each step."""
    rates = lr * (1 - 0.05 * np.arange(steps))
    if rule == "adam":
        return np.array(
            [adam_hyperparameters(7 + s, r / 5, 0.8, 0.95, 1e-3, 0.1, s % 2 == 0) for s, r in enumerate(rates)]
        )
    rest = {"sgd": (0.03,), "momentum": (0.03, 0.8)}[rule]
    return np.array([(r, *rest, *([float(s % 2)] if rule == "momentum" else [])) for s, r in enumerate(rates)])


def arrays_of(plan: TrainingPlan) -> list[Any]:
    parameters = [p for number in range(len(plan.networks)) for p in plan.parameters(number)]
    return [array for p in parameters for array in p.arrays() if array is not None]


def assert_close(results: Sequence[Any], expected: Sequence[Any], dtype: Any) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert np.isfinite(wanted).all()
        assert_within(result, wanted, BOUNDS[str(dtype)] * max(1.0, float(np.abs(wanted).max())))


def samples(n: int, features: int, dtype: Any, kind: str = "floats") -> Dataset:
    rng = np.random.default_rng(n)
    if kind == "bytes":
        return Dataset(rng.integers(0, 256, (n, features), np.uint8))
    x = rng.normal(size=(n, features)).astype(dtype)
    if kind == "floats":
        return Dataset(x)
    there = rng.uniform(size=x.shape) < 0.3
    there[1] = False
    indptr = np.concatenate([[0], np.cumsum(there.sum(1))])
    return Dataset(x[there], indptr, np.nonzero(there)[1].astype(np.int32), True)


def some_order(n: int, count: int) -> Any:
    return np.random.default_rng(count).integers(0, n, count)


def by_session(device: Any) -> Callable[[TrainingPlan, Batches], Outcome]:
    """Train in one call, on a device."""

    def train(plan: TrainingPlan, batches: Batches) -> Outcome:
        session = Session(device, plan)
        outcome = session.train(batches)
        session.write_back()
        return outcome

    return train


def part(batches: Batches, steps: slice, losses: Sequence[float]) -> Batches:
    """Some steps of a call, whose losses are added to `losses`."""
    rows = slice(steps.start * batches.size, steps.stop * batches.size)
    return batches._replace(
        order=batches.order[rows],
        hyperparameters=tuple(table[steps] for table in batches.hyperparameters),
        losses=tuple(losses),
        decay=None if batches.decay is None else batches.decay[steps],
        noise=None if batches.noise is None else batches.noise[rows],
        first_step=batches.first_step + steps.start,
    )


class Problem:
    """A plan and a call of `train`, which can be done again from the same start."""

    plan: TrainingPlan
    batches: Batches

    def call(self) -> TrainingPlan:
        """The plan, with networks of its own."""
        return replace(self.plan, networks=copy.deepcopy(self.plan.networks))

    def run(self, train: Any) -> list[Any]:
        """All arrays, the losses, and how many rows were correct. `train` is that of a backend."""
        plan = self.call()
        outcome = train(plan, self.batches)
        return [*arrays_of(plan), *map(np.array, outcome.losses), np.array(outcome.correct)]

    def on(self, device: Any) -> list[Any]:
        return self.run(by_session(device))

    def check(self, device: Any, cpu: Any) -> None:
        result, expected = self.on(device), self.run(cpu.train)
        assert_close(result, expected, self.plan.dtype)
        assert result[-1] == expected[-1]
        assert not same_bits(result[0], arrays_of(self.plan)[0])


class Mlp(Problem):
    """That of one network."""

    def __init__(
        self,
        widths: Sequence[int],
        dtype: Any,
        *,
        loss: str = "softmax_cross_entropy",
        classes: bool = True,
        smoothing: float = 0.0,
        sign: float = 1.0,
        rule: str = "sgd",
        n: int = 50,
        count: int = 43,
        batch: int = 16,
        kind: str = "floats",
        weights: str | None = None,
        **settings: Any,
    ) -> None:
        rng, out = np.random.default_rng(5), widths[-1]
        targets = rng.integers(0, 2 if out == 1 else out, n) if classes else rng.uniform(size=(n, out)).astype(dtype)
        dataset = samples(n, widths[0], dtype, kind)
        if weights is not None:
            counts = rng.uniform(0, 3, n) * (np.arange(n) % 5 != 0)
            dataset = dataset._replace(weights=counts, divides_by_rows=weights == "by rows")
        phases = (
            Gather(dataset),
            Forward(0, (SAMPLES,)),
            Loss(0, loss, targets, smoothing, "sum" if loss == "softmax_cross_entropy" else "mean", sign),
            Backward(0),
            Update(0, rule),
        )
        self.plan = TrainingPlan((network(widths, dtype, rule, **settings),), phases)
        steps = -(-count // batch)
        decay = np.linspace(0.2, 0.7, steps) if settings.get("averaged") else None
        self.batches = Batches(
            some_order(n, count), batch, (numbers(rule, steps),), (2.5,), decay, first_step=FIRST_STEP
        )

    @property
    def layers(self) -> list[Linear]:
        return [operation for operation in self.plan.networks[0] if isinstance(operation, Linear)]

    @property
    def x(self) -> Any:
        return self.plan.gather.dataset.x

    def use(self, dataset: Dataset) -> None:
        self.plan = replace(self.plan, phases=(Gather(dataset), *self.plan.phases[1:]))

    def adjusted(self, **update: Any) -> Self:
        """With another update."""
        *phases, last = self.plan.phases
        self.plan = replace(self.plan, phases=(*phases, last._replace(**update)))
        return self


class Gan(Problem):
    """That of two adversarial networks."""

    def __init__(
        self,
        dtype: Any,
        *,
        generator: Sequence[int] = (7, 20, 33),
        discriminator: Sequence[int] = (33, 24, 1),
        output: str = "tanh",
        averaged: tuple[bool, bool] = (True, False),
        non_saturating: bool = True,
        rules: tuple[str, str] = ("adam", "adam"),
        count: int = 43,
        batch: int = 16,
        kind: str = "bytes",
        hidden: str = "leaky_relu",
        penalty: tuple[float, int] | None = None,
        classes: int = 0,
        rates: Sequence[float] = (),
        noise: float = 0.0,
    ) -> None:
        loss, dataset = "binary_cross_entropy_with_logits", samples(50, generator[-1], dtype, kind)
        latent = generator[0]
        if classes:
            labels = Labels(np.random.default_rng(7).integers(0, classes, 50), classes)
            dataset = dataset._replace(labels=labels)
            generator, discriminator = ((n + classes, *widths) for n, *widths in (generator, discriminator))
        phases = (
            Gather(dataset, 2.0, -1.0),
            Forward(0, (NOISE,)),
            *(Forward(1, (SAMPLES, 0)), Loss(1, loss, (0.9, 0.0)), Backward(1)),
            *([] if penalty is None else [GradientPenalty(1, *penalty)]),
            Update(1, rules[1]),
            Forward(1, (0,), SECOND_PASS),
            Loss(1, loss, (1.0 if non_saturating else 0.0,), sign=1.0 if non_saturating else -1.0),
            *(Backward(1, 0), Backward(0), Update(0, rules[0])),
        )
        networks = (
            network(generator, dtype, rules[0], hidden="relu", output=output, averaged=averaged[0]),
            network(
                discriminator, dtype, rules[1], hidden=hidden, averaged=averaged[1], rates=rates, noise=noise, seed=1
            ),
        )
        self.plan = TrainingPlan(networks, phases)
        steps = -(-count // batch)
        tables = numbers(rules[1], steps, 0.02), numbers(rules[0], steps)
        drawn = np.random.default_rng(6).normal(size=(count, latent)).astype(dtype)
        decay = np.linspace(0.2, 0.7, steps)
        order = some_order(50, count)
        self.batches = Batches(order, batch, tables, (2.0, 1.0), decay, drawn, first_step=FIRST_STEP)


def same(results: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(results) == len(expected) and all(map(same_bits, results, expected))


# The weights of the CPU.


@pytest.mark.parametrize("widths", [(37, 45, 19, 5), (5, 3), (70, 65, 1), (1, 1, 1, 1), (9, 8, 100)], ids=str)
def test_mlp(widths: Sequence[int], plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    """Also widths of one, a last layer too wide to go with the loss, a last mini-batch that is smaller."""
    loss = "softmax_cross_entropy" if widths[-1] > 1 else "binary_cross_entropy_with_logits"
    for kind, count, batch in (("bytes", 43, 16), ("floats", 7, 7), ("floats", 5, 1), ("sparse", 43, 21)):
        Mlp(widths, dtype, loss=loss, kind=kind, count=count, batch=batch, rule="momentum").check(device, cpu)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hidden layers and of the last one, which networks of gemmlet.nn have without."""
    Mlp([9, 17, 8, 3], dtype, hidden=activation, output=activation).check(device, cpu)
    use_plan("medium", monkeypatch)
    Mlp([9, 17, 8, 3], dtype, hidden=activation, output=activation).check(device, cpu)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("loss", [*ROW_LOSSES, *LOSSES])
def test_every_loss(loss: str, top: bool, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not top:
        monkeypatch.setattr(cuda_training, "MAX_TOP_BYTES", 0)
    for out, classes in itertools.product((1, 2, 10, 40), (True, False)):
        if loss in ROW_LOSSES and out == 1:
            continue
        output = "sigmoid" if loss == "binary_cross_entropy" else None
        Mlp([6, 9, out], dtype, loss=loss, classes=classes, output=output, batch=11).check(device, cpu)


@pytest.mark.parametrize("top", [True, False])
def test_label_smoothing(top: bool, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not top:
        monkeypatch.setattr(cuda_training, "MAX_TOP_BYTES", 0)
    for out, classes in itertools.product((2, 10, 40), (True, False)):
        Mlp([6, 9, out], dtype, classes=classes, smoothing=0.3, batch=11).check(device, cpu)


@pytest.mark.parametrize("weights", ["", "by rows"])
@pytest.mark.parametrize("name", PLANS)
def test_weights_of_samples(
    name: str, weights: str, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of row losses and of others, in one kernel with the last layer and alone; some samples count nothing."""
    use_plan(name, monkeypatch)
    for loss, classes in itertools.product(("softmax_cross_entropy", "huber"), (True, False)):
        for widths in ((9, 13, 3), (9, 70)):
            Mlp(widths, dtype, loss=loss, classes=classes, kind="bytes", weights=weights).check(device, cpu)
    counting = Counting(device)
    mlp = Mlp((9, 13, 3), dtype, kind="bytes", count=140, batch=50, weights=weights, rule="adam", hidden="gelu")
    mlp.check(counting, cpu)
    assert ("train_in_cluster" in counting.launched) == (name == "cluster" and dtype == np.float32)


@pytest.mark.parametrize("rule", OPTIMIZER_RULES)
def test_averages(rule: str, plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    Mlp([37, 45, 19, 5], dtype, rule=rule, averaged=True, kind="bytes").check(device, cpu)


@pytest.mark.parametrize("clip_value", [None, 1e-3])
@pytest.mark.parametrize("rule", OPTIMIZER_RULES)
def test_decay_of_weights_alone(rule: str, clip_value: float | None, device: Any, cpu: Any, dtype: Any) -> None:
    update = {"decays_biases": False, "clip_value": clip_value}
    for kind in ("floats", "bytes", "sparse"):
        Mlp([70, 40, 3], dtype, rule=rule, kind=kind).adjusted(**update).check(device, cpu)


@pytest.mark.parametrize("rule", OPTIMIZER_RULES)
def test_every_rule(rule: str, device: Any, cpu: Any, dtype: Any) -> None:
    for kind in ("floats", "bytes", "sparse"):
        Mlp([70, 40, 3], dtype, rule=rule, kind=kind, count=60, batch=7).check(device, cpu)


def test_many_layers(plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    """More than an update, or a kernel for all steps, takes at once."""
    for depth in (8, 9, 17):
        Mlp([5] * depth + [3], dtype, batch=9, rule="momentum").check(device, cpu)


def test_long_sums(plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    """Of more numbers than a block takes at once: many inputs, and many rows."""
    Mlp([700, 9, 3], dtype, kind="bytes", count=9, batch=5).check(device, cpu)
    Mlp([4, 9, 300, 3], dtype, count=300, batch=150, rule="adam").check(device, cpu)


@pytest.mark.parametrize("top", [True, False])
def test_which_answers_are_right(top: bool, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NumPy: of equal outputs the first counts, and what is not a number as the largest."""
    if not top:
        monkeypatch.setattr(cuda_training, "MAX_TOP_BYTES", 0)
    for out in (1, 3, 40):
        mlp = Mlp([2, 4, out], dtype, loss="mean_squared_error", n=120, count=120, batch=120)
        mlp.batches = mlp.batches._replace(order=np.arange(120))
        targets = mlp.plan.losses[0].targets
        targets[:80], targets[80:] = 7 % max(out, 2), 0
        mlp.x[::3, 0] = np.nan
        mlp.layers[-1].weight.value[:] = 0  # whose product with NaN is NaN, too
        mlp.layers[-1].bias.value[:] = 0
        mlp.layers[-1].bias.value[[7 % out, 32 % out]] = 1  # (the second is the first lane's)
        correct = [mlp.run(train)[-1] for train in (by_session(device), cpu.train)]
        assert correct[0] == correct[1] > 0


GANS: dict[str, dict[str, Any]] = {
    "averaged": {},
    "both averaged": {"averaged": (True, True), "rules": ("sgd", "momentum")},
    "minimax": {"non_saturating": False, "averaged": (False, False)},
    "floats": {"kind": "floats", "rules": ("momentum", "sgd"), "output": "sigmoid"},
    "deep": {"generator": (3, 17, 5, 33), "discriminator": (33, 9, 16, 1), "output": "silu"},
    "shallow": {"generator": (4, 33), "discriminator": (33, 1), "batch": 7},
    "one by one": {"generator": (1, 1), "discriminator": (1, 2, 1), "batch": 1, "count": 5},
}


@pytest.mark.parametrize("variant", GANS)
def test_gan(variant: str, plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    Gan(dtype, **GANS[variant]).check(device, cpu)


PENALIZED: dict[str, dict[str, Any]] = {
    "of all": {"penalty": (3.0, 1)},
    "relu": {"penalty": (3.0, 4), "hidden": "relu", "rules": ("adam", "momentum"), "averaged": (True, True)},
    # A last mini-batch of two, one of which has the penalty.
    "deep": {"penalty": (3.0, 4), "discriminator": (33, 19, 14, 9, 1), "batch": 41, "kind": "floats"},
    "dropped": {"penalty": (3.0, 2), "discriminator": (33, 19, 14, 1), "rates": (0.0, 0.5, 0.4), "batch": 15},
    "all dropped": {"penalty": (3.0, 2), "rates": (0.2, 0.3), "noise": 0.4},
    "wide": {"penalty": (1.0, 2), "discriminator": (33, 300, 1), "generator": (7, 33), "count": 66, "batch": 65},
    "shallow": {"penalty": (3.0, 3), "discriminator": (33, 1), "batch": 7},
    "one by one": {**GANS["one by one"], "penalty": (3.0, 4)},
}


# Classes.

CONDITIONAL: dict[str, dict[str, Any]] = {
    "two": {"classes": 2},
    "penalized": {"classes": 10, "penalty": (3.0, 4), "discriminator": (33, 19, 14, 1), "batch": 41},
    "random": {"classes": 3, "penalty": (3.0, 4), "rates": (0.2, 0.5), "noise": 0.4, "rules": ("adam", "momentum")},
    "shallow": {"classes": 70, "generator": (7, 33), "discriminator": (33, 1), "batch": 7},
    "one by one": {**GANS["one by one"], "classes": 3},
}


@pytest.mark.parametrize("variant", [*PENALIZED.values(), *CONDITIONAL.values()], ids=[*PENALIZED, *CONDITIONAL])
def test_gradient_penalty_and_classes(variant: dict[str, Any], plan: str, device: Any, dtype: Any) -> None:
    """As the reference, in which the penalty is no further rows, and classes are one-hot rows."""
    gan = Gan(dtype, **variant)
    assert cuda_training.supports_fused(gan.plan)
    gan.check(device, select.load("numpy"))


# Dropout and noise.

RANDOM: dict[str, dict[str, Any]] = {
    "hidden layers": {"widths": (37, 45, 19, 5), "rates": (0.0, 0.5, 0.3)},
    "inputs": {"widths": (70, 24, 66, 3), "rates": (0.4, 0.0, 0.0)},
    "all": {"widths": (35, 66, 9, 40), "rates": (0.2, 0.5, 0.7), "noise": 0.3, "rule": "momentum"},
    "of one layer": {"widths": (131, 3), "rates": (0.3,), "noise": 0.2, "rule": "adam"},
    "noise alone": {"widths": (18, 7, 2), "noise": 0.5},
    "one by one": {"widths": (1, 1, 1, 2), "rates": (0.5, 0.5, 0.5), "noise": 1.0, "count": 9, "batch": 1},
    "all and none": {"widths": (9, 8, 3), "rates": (2.0**-18, 1.0), "noise": 1e-30},
}


@pytest.mark.parametrize("variant", RANDOM)
def test_dropout_and_noise(variant: str, plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    for kind in ("bytes", "floats", "sparse"):
        Mlp(dtype=dtype, kind=kind, **RANDOM[variant]).check(device, cpu)


@pytest.mark.parametrize("hidden", ["gelu", "silu", "softplus"])
def test_dropout_after_any_activation(
    hidden: str, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where backward takes preactivations."""
    for name in PLANS:
        use_plan(name, monkeypatch)
        for widths in ((21, 13, 8, 3), (21, 13, 3)):
            Mlp(widths, dtype, hidden=hidden, kind="bytes", rates=(0.2, 0.5, 0.3)).check(device, cpu)


@pytest.mark.parametrize("variant", ["averaged", "deep", "shallow", "one by one"])
def test_dropout_and_noise_of_a_gan(variant: str, plan: str, device: Any, cpu: Any, dtype: Any) -> None:
    for rates, noise in (((0.2, 0.5, 0.3), 0.4), ((0.0, 0.5, 0.3), 0.0), ((0.3, 0.0, 0.0), 0.0), ((), 0.4)):
        Gan(dtype, **GANS[variant], rates=rates, noise=noise).check(device, cpu)


@pytest.mark.parametrize("name", PLANS)
def test_what_is_dropped_need_not_be_finite(
    name: str, device: Any, cpu: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, and results of hidden units."""
    use_plan(name, monkeypatch)
    mlp = Mlp((40, 16, 3), dtype, hidden="relu", kind="bytes", rates=(0.4, 0.5), n=1, count=1)
    inputs, units = (
        dropout.kept(KEY, STREAMS["dropout"] + i, FIRST_STEP, [0], width, dropout.threshold(rate))[0]
        for i, (width, rate) in enumerate(((40, 0.4), (16, 0.5)))
    )
    mlp.x[:] = 255
    mlp.layers[0].weight.value[np.ix_(inputs, ~units)] = np.finfo(dtype).max / 3
    if name != "cluster":
        mlp.use(Dataset(np.where(inputs, mlp.x / 255, np.nan).astype(dtype)))
    got, expected = mlp.on(device), mlp.run(cpu.train)
    for result, wanted in zip(got, expected, strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(result, wanted, BOUNDS[str(dtype)], BOUNDS[str(dtype)])


def test_fit_is_no_work_of_the_reference(device: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> Outcome:
        raise AssertionError("the reference trains")

    monkeypatch.setattr(reference, "train", train)
    x = np.random.default_rng(0).integers(0, 256, (20, 9), np.uint8)
    with use_backend(cuda_on_host.backend.load()):
        mlp = MLP([9, 6, 3], dtype=dtype, dropout=0.5, input_dropout=0.2, input_noise=0.1)
        gan = GAN(4, [6, 9], [6, 1], dtype=dtype, discriminator_dropout=0.5, discriminator_input_dropout=0.2,
                  discriminator_input_noise=0.1, gradient_penalty=0.1)  # fmt: skip
        assert mlp.fit(x, np.arange(20) % 3, 2, 8).loss[1] > 0
        assert gan.fit(x, 2, 8).generator_loss[1] > 0
        penalized = GAN(4, [6, 9], [6, 1], n_classes=3, dtype=dtype, gradient_penalty=0.1)
        assert penalized.fit(x, 2, 8, y=np.arange(20) % 3).generator_loss[1] > 0


# In a cluster.


def in_cluster(widths: Sequence[int], **settings: Any) -> Mlp:
    """A call that a cluster does."""
    return Mlp(widths, np.dtype(np.float32), **{"kind": "bytes", **settings})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan("cluster", monkeypatch)


CLUSTERS: dict[str, dict[str, Any]] = {
    "small": {"widths": (5, 3, 2), "batch": 9},
    "one by one": {"widths": (1, 1, 1), "batch": 1, "count": 5, "loss": "mean_squared_error"},
    "full": {"widths": (130, 16, 16), "batch": 64, "count": 64},
    "parts of blocks": {"widths": (37, 21, 10), "batch": 43},
    "many inputs": {"widths": (800, 9, 5), "batch": 33, "count": 70},
    "unaligned inputs": {"widths": (257, 8, 13), "batch": 50, "count": 70},
}


@pytest.mark.parametrize("rule", OPTIMIZER_RULES)
@pytest.mark.parametrize("variant", CLUSTERS)
def test_cluster(variant: str, rule: str, device: Any, cpu: Any, cluster: None) -> None:
    mlp, counting = in_cluster(**CLUSTERS[variant], rule=rule), Counting(device)
    mlp.check(counting, cpu)
    assert set(counting.launched) == {"arrange_samples", "train_in_cluster", "close_steps"}


@pytest.mark.parametrize("rule", OPTIMIZER_RULES)
@pytest.mark.parametrize("variant", ["small", "full", "unaligned inputs"])
def test_decay_of_weights_alone_in_a_cluster(variant: str, rule: str, device: Any, cpu: Any, cluster: None) -> None:
    in_cluster(**CLUSTERS[variant], rule=rule).adjusted(decays_biases=False).check(device, cpu)


@pytest.mark.parametrize("size", [8, 16])
def test_large_cluster(size: int, device: Any, cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if "thread" in SANITIZERS:
        pytest.skip("ThreadSanitizer takes no more than 8,128 threads in all")
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", (size,))
    in_cluster((70, 8 * size - 3, 10), batch=64, count=140, rule="adam").check(device, cpu)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_a_cluster(activation: str, device: Any, cpu: Any, cluster: None) -> None:
    in_cluster((9, 13, 3), hidden=activation, output=activation).check(device, cpu)


@pytest.mark.parametrize("loss", [*ROW_LOSSES, *LOSSES])
def test_every_loss_in_a_cluster(loss: str, device: Any, cpu: Any, cluster: None) -> None:
    for out, classes in itertools.product((1, 2, 10, 16), (True, False)):
        if loss in ROW_LOSSES and out == 1:
            continue
        output = "sigmoid" if loss == "binary_cross_entropy" else None
        in_cluster((6, 9, out), loss=loss, classes=classes, output=output, batch=11).check(device, cpu)


def test_label_smoothing_in_a_cluster(device: Any, cpu: Any, cluster: None) -> None:
    for out, classes in itertools.product((2, 10, 16), (True, False)):
        in_cluster((6, 9, out), classes=classes, smoothing=0.3, batch=11).check(device, cpu)


@pytest.mark.parametrize("rates", [(0.0, 0.5), (0.3, 0.0), (0.2, 0.7)], ids=str)
def test_dropout_in_a_cluster(rates: tuple[float, float], device: Any, cpu: Any, cluster: None) -> None:
    for variant, settings in CLUSTERS.items():
        counting, settings = Counting(device), {"count": 140} | settings
        in_cluster(**settings, rates=rates, rule="momentum").check(counting, cpu)
        assert "train_in_cluster" in counting.launched, variant


def test_weights_of_any_size_in_a_cluster(device: Any, cpu: Any, cluster: None) -> None:
    """Their parts in bfloat16 have the exponents of float."""
    for size in (1e-30, 1e-10, 1e10, 1e30):
        mlp = in_cluster((9, 5, 3), hidden="identity", loss="mean_squared_error", classes=False)
        mlp.layers[0].weight.value[:] *= np.float32(size)
        mlp.layers[1].weight.value[:] /= np.float32(size)
        mlp.layers[0].bias.value[:] *= np.float32(size)
        mlp.batches.hyperparameters[0][:] = 0  # which keeps them
        got, expected = mlp.on(device), mlp.run(cpu.train)
        assert same(got[:-2], expected[:-2])
        np.testing.assert_allclose(got[-2], expected[-2], rtol=1e-6)


def test_rows_that_are_not_there_in_a_cluster(device: Any, cpu: Any, cluster: None) -> None:
    """Of them the units give exp(100), which is infinite."""
    mlp = in_cluster((9, 5, 3), hidden="exp", batch=3, count=9)
    mlp.x[:] = 255
    mlp.layers[0].weight.value[:] = -100 / 9
    mlp.layers[0].bias.value[:] = 100
    mlp.batches.hyperparameters[0][:, 0] = 1e-3
    mlp.check(device, cpu)


def test_what_a_cluster_does_not(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", (2,))

    def launched(
        widths: Sequence[int], dtype: Any = np.float32, arch: str = device.arch, update: Any = None, **settings: Any
    ) -> bool:
        counting = Counting(device, arch=arch)
        mlp = Mlp(widths, np.dtype(dtype), **{"kind": "bytes", "count": 65, **settings})
        mlp.adjusted(**(update or {})).on(counting)
        return "train_in_cluster" in counting.launched

    assert launched((9, 16, 16), batch=64)
    for widths in ((9, 17, 16), (9, 16, 17), (801, 16, 16), (9, 16), (9, 8, 8, 3)):
        assert not launched(widths)
    assert not launched((9, 8, 3), batch=65)
    assert not launched((9, 8, 3), np.float64)
    assert not launched((9, 8, 3), kind="floats")
    assert not launched((9, 8, 3), kind="sparse")
    assert not launched((9, 8, 3), averaged=True)
    assert not launched((9, 8, 3), noise=0.1)
    assert not launched((9, 8, 3), arch="sm_80")
    assert not launched((9, 8, 3), update={"clip_value": 1.0})


def test_a_cluster_of_16_takes_a_whole_gpu(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", (8, 16))
    for arch, multiprocessors, size in (("host", 4, 16), ("sm_90a", 132, 16), ("sm_90a", 60, 0)):
        counting = Counting(device, arch=arch, multiprocessors=multiprocessors)
        assert Session(counting, in_cluster((9, 100, 3)).plan)._cluster_size(16) == size


def test_a_cluster_without_memory_has_none_reserved(
    device: Any, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a call that fails for lack of it, a shorter one finds the memory that the first one had."""
    mlp = in_cluster((9, 8, 3), count=40, batch=4)
    first, second = mlp.call(), mlp.call()
    session, other = Session(device, first), Session(device, second)

    def train(session: Session, steps: int) -> Outcome:
        return session.train(part(mlp.batches, slice(0, steps), (0.0,)))

    train(session, 2)
    empty = type(device).empty

    def limited(_: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if shape[0] == 10:
            raise MemoryError("no more")
        return empty(device, shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(type(device), "empty", limited)
        with pytest.raises(MemoryError):
            train(session, 10)
    train(other, 2)
    assert train(session, 2) == train(other, 2)
    session.write_back()
    other.write_back()
    assert same(arrays_of(first), arrays_of(second))


# The same bits.


@pytest.mark.parametrize("name", PLANS)
def test_the_order_of_threads_changes_no_bit(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_plan(name, monkeypatch)
    mlp = Mlp([37, 12, 5] if name == "cluster" else [37, 45, 19, 5], dtype, kind="bytes", rule="adam")
    random: dict[str, Any] = {"rates": (0.2, 0.5, 0.3), "noise": 0.3}
    problems: list[Problem] = [mlp, in_cluster([37, 12, 5], rates=(0.2, 0.5))]
    if name != "cluster":
        problems = [mlp, Gan(dtype), Gan(dtype, **random), Gan(dtype, **PENALIZED["deep"])]
        problems += Mlp([37, 12, 9, 5], dtype, kind="sparse", **random), Gan(dtype, **CONDITIONAL["penalized"])
    expected = [problem.on(HostDevice()) for problem in problems]
    for order in THREAD_ORDERS:
        device = HostDevice(thread_order=order)
        for problem, wanted in zip(problems, expected, strict=True):
            assert same(problem.on(device), wanted), order


def test_a_sparse_matrix_gives_the_bits_of_the_dense_one(device: Any, dtype: Any) -> None:
    mlp = Mlp([37, 19, 5], dtype, kind="sparse")
    expected = mlp.on(device)
    x, indptr, indices, *_ = mlp.plan.gather.dataset
    assert indptr is not None
    dense = np.zeros((len(indptr) - 1, 37), dtype)
    dense[np.repeat(np.arange(len(dense)), np.diff(indptr)), indices] = x
    mlp.use(Dataset(dense))
    assert same(mlp.on(device), expected)


def test_every_byte_is_its_255th(device: Any, dtype: Any) -> None:
    """Rounded as NumPy's division is."""
    mlp = Mlp([256, 4], dtype, kind="bytes")
    mlp.x[:] = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (50, 1)), axis=1)
    expected = mlp.on(device)
    mlp.use(Dataset(mlp.x.astype(dtype) / dtype.type(255)))
    assert same(mlp.on(device), expected)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("network", ["mlp", "mlp in a cluster", "gan", "penalized gan"])
def test_calls_may_be_divided(
    network: str, random: bool, device: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into single steps, which are recorded once and find what the last call left; losses are added up all the same.
    With dropout and weights of samples, too.

    The networks go to the GPU with the first call and after `write_back` alone.
    """
    monkeypatch.setattr(cuda_training, "STEPS_TOGETHER", 3)
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", (2,) if "cluster" in network else ())
    if "cluster" in network and dtype != np.float32:
        pytest.skip("float32 alone")
    count, batch, is_mlp = 75, 8, "gan" not in network
    kind = "bytes" if "cluster" in network else "floats"
    settings: Any = {"count": count, "batch": batch, "rates": (0.2, 0.5) if random else ()}
    if is_mlp:
        settings |= {"rule": "adam", "kind": kind, "weights": "" if random else None}
    elif "penalized" in network:
        settings["penalty"] = 3.0, 4
    problem: Any = Mlp([9, 8, 3], dtype, **settings) if is_mlp else Gan(dtype, **settings)
    expected = problem.on(device)
    monkeypatch.setattr(cuda_training, "MAX_ARRANGED_BYTES", 3 * 2048)
    recorded, sent = Counter[str](), list[int]()
    record, upload = type(device).record, type(device).upload
    monkeypatch.setattr(type(device), "record", lambda *a: recorded.update(["record"]) or record(*a))
    monkeypatch.setattr(type(device), "upload", lambda d, a, *out: sent.append(a.nbytes) or upload(d, a, *out))

    plan = problem.call()
    session = Session(device, plan)
    assert len(sent) == (2 if is_mlp else 1)
    sent.clear()
    pieces = [slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 9), slice(9, 10)]
    losses, correct = problem.batches.losses, 0
    for steps in pieces:
        if steps.start == 6:
            session.write_back()
        losses, more = session.train(part(problem.batches, steps, losses))
        correct += more
    session.write_back()

    assert same([*arrays_of(plan), *map(np.array, losses), np.array(correct)], expected)
    # For mini-batches alone and in threes, and for the last one.
    assert recorded == ({} if "cluster" in network else {"record": 3})
    per_call = len(sent) // len(pieces)
    assert per_call == (2 if is_mlp else 3)
    states = [session._state.nbytes if call in (0, 3) else cuda_training._PROGRESS.itemsize for call in range(5)]
    assert sent[::per_call] == states


def test_what_is_looked_at_after_write_back(device: Any, dtype: Any) -> None:
    """Changes to arrays count then; each plan has networks of its own."""
    mlp, backend = Mlp([9, 8, 3], dtype, rule="adam"), CudaBackend([device])

    def train(plan: TrainingPlan) -> None:
        backend.train(plan, mlp.batches)

    once, changed, other = (backend.stage(mlp.call()) for _ in range(3))
    train(once)
    assert same(arrays_of(once), arrays_of(mlp.plan))
    train(other)
    backend.write_back(once)
    expected = arrays_of(once)
    assert same(expected, mlp.on(device)[:-2])
    train(other)
    backend.write_back(other)
    twice = arrays_of(other)
    train(once)
    backend.write_back(once)
    backend.write_back(once)
    assert same(arrays_of(once), twice)

    train(changed)
    backend.write_back(changed)
    for array in arrays_of(changed):
        array *= 0.5
    halved = replace(mlp.plan, networks=copy.deepcopy(changed.networks))
    train(changed)
    backend.write_back(changed)
    train(halved)  # which is not staged
    assert same(arrays_of(changed), arrays_of(halved))


def test_what_the_kernels_cannot_is_left_to_the_reference(device: Any, dtype: Any) -> None:
    """A plan of its own is not staged then; and a call in between others finds the networks, and leaves them."""
    mlp, backend = Mlp([9, 8, 3], dtype, rule="momentum"), CudaBackend([device])
    clipped = mlp.call()
    clipped = replace(clipped, phases=(*clipped.phases[:-1], Update(0, "momentum", 1e9)))
    assert not backend.supports_fused(clipped)
    assert backend.stage(clipped) is clipped
    assert not clipped.executors
    dataset = Dataset(cuda_on_host.backend.to_gpu(mlp.x, device))
    on_gpu = replace(clipped, networks=mlp.call().networks, phases=(Gather(dataset), *clipped.phases[1:]))
    varied = backend.stage(mlp.call())
    tables = ([mlp.batches.hyperparameters[0]] * 4,)
    for plan in (clipped, on_gpu, varied):
        for hyperparameters in (mlp.batches.hyperparameters, tables, mlp.batches.hyperparameters):
            outcome = backend.train(plan, mlp.batches._replace(hyperparameters=hyperparameters))
        backend.write_back(plan)
        assert outcome.correct
    assert same(arrays_of(on_gpu), arrays_of(clipped))
    assert_close(arrays_of(varied), arrays_of(clipped), dtype)


def test_a_plan_that_is_gone_leaves_nothing(device: Any, dtype: Any) -> None:
    backend = CudaBackend([device])
    plan = backend.stage(Mlp([9, 8, 3], dtype).plan)
    session = weakref.ref(plan.executors[backend])
    del plan
    assert session() is None


def test_larger_mini_batches_find_the_networks(device: Any, dtype: Any) -> None:
    """A session makes more space, and what it knows is not lost."""
    mlp = Mlp([9, 8, 3], dtype, count=40, batch=40)
    staged, plain = mlp.call(), mlp.call()
    session = Session(device, staged)
    for rows in (5, 40, 7):
        for train in (session.train, lambda batches: by_session(device)(plain, batches)):
            train(mlp.batches._replace(order=mlp.batches.order[:rows]))
    session.write_back()
    assert same(arrays_of(staged), arrays_of(plain))


def test_the_next_call_is_prepared_meanwhile(device: Any, dtype: Any) -> None:
    """Once, after all launches and before the host waits: noise for the next call may be written to another array."""
    gan, events = Gan(dtype), list[str]()

    class Watched(Counting):
        def launch(self, *arguments: Any, **how: Any) -> None:
            events.append("launch")
            super().launch(*arguments, **how)

        def download(self, *arguments: Any) -> None:
            events.append("download")
            self._device.download(*arguments)

    watched = Watched(device)
    batches = gan.batches._replace(meanwhile=lambda: events.append("meanwhile"))
    by_session(watched)(gan.call(), batches)
    assert events.count("meanwhile") == 1
    assert [e for e in events if e != "launch"] == ["meanwhile", "download", "download"]
    assert events.index("meanwhile") > max(place for place, e in enumerate(events) if e == "launch")


def test_noise_that_is_written_too_early_is_found(device: Any, dtype: Any) -> None:
    """By the stand-in: a GPU might still be copying it."""
    if not hasattr(device, "view"):
        pytest.skip("a GPU does not notice")
    gan = Gan(dtype)
    assert gan.batches.noise is not None
    noise = device.empty_pinned(gan.batches.noise.shape, dtype)
    noise[...] = gan.batches.noise
    train, batches = by_session(device), gan.batches._replace(noise=noise)
    train(gan.call(), batches)
    with pytest.raises(RuntimeError, match="page-locked memory was written"):
        train(gan.call(), batches._replace(meanwhile=lambda: noise.fill(0)))


# What is launched.


class Counting:
    """A device that takes note of the kernels that it launches, and that may say of itself what is not so."""

    def __init__(self, device: Any, **said: Any) -> None:
        self._device, self._names, self.launched = device, {}, list[str]()
        vars(self).update(said)

    def kernels(self, source: str, names: Sequence[str]) -> list[Any]:
        found: list[Any] = self._device.kernels(source, names)
        self._names |= dict(zip(map(id, found), names, strict=True))
        assert set(names) <= set(cuda_training.expressions()[source])
        return found

    def launch(self, kernel: Any, *arguments: Any, **how: Any) -> None:
        self.launched.append(self._names[id(kernel)].removeprefix("gemmlet::").partition("<")[0])
        self._device.launch(kernel, *arguments, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


def test_steps_are_few_launches(device: Any) -> None:
    dtype = np.dtype(np.float32)
    counting = Counting(device)
    Mlp([20, 12, 3], dtype, count=4, batch=4).on(counting)
    assert counting.launched == ["first_forward", "top", "update"]
    counting = Counting(device)
    Mlp([20, 12, 9, 3], dtype, count=4, batch=4, kind="sparse").on(counting)
    assert counting.launched == ["expand", "forward", "forward", "top", "backward", "update"]
    # The rows of a penalty go backward with the others, but to the samples.
    for penalty, extra in ((None, ()), ((1.0, 4), ("backward", "forward_penalty"))):
        counting = Counting(device)
        Gan(dtype, count=4, batch=4, penalty=penalty).on(counting)
        assert counting.launched == [
            *("first_forward_and_gather", "forward"),
            *("forward", "top", *extra, "update"),
            *("forward", "top", "backward", "backward", "update"),
        ]


def test_dropout_and_noise_are_few_launches(device: Any) -> None:
    """None of hidden layers; one that changes inputs, of a GAN those of both passes."""
    dtype = np.dtype(np.float32)
    plain, random = [], {"rates": (0.2, 0.5, 0.3), "noise": 0.3}
    for settings in ({}, {"rates": (0.0, 0.5, 0.3)}):
        plain.append(counting := Counting(device))
        Mlp([20, 12, 9, 3], dtype, count=4, batch=4, **settings).on(counting)
        Gan(dtype, count=4, batch=4, **settings).on(counting)
    assert plain[0].launched == plain[1].launched
    for kind, opens in (("bytes", "gather"), ("sparse", "expand")):
        counting = Counting(device)
        Mlp([20, 12, 9, 3], dtype, count=4, batch=4, kind=kind, **random).on(counting)
        assert counting.launched == [opens, "forward", "forward", "top", "backward", "update"]
    counting = Counting(device)
    Gan(dtype, count=4, batch=4, **random).on(counting)
    assert counting.launched == [
        *("first_forward_and_gather", "forward", "change_inputs"),
        *("forward", "top", "update"),
        *("forward", "top", "backward", "backward", "update"),
    ]


def test_large_matmuls_have_large_tiles() -> None:
    kinds = [cuda_training._kind_of_tile(*size) for size in ((64, 128), (128, 256), (64, 784), (1024, 128))]
    assert kinds == ["SmallTile<8>", "SmallTile<16>", "SmallTile<16>", "WideTile"]


def test_blocks_of_small_tiles() -> None:
    """The passes that the largest block needs, and no more warps; half as large where two blocks share a processor."""

    def block(rows: int, columns: int, k: int, dtype: Any = np.float32, **least: int) -> tuple[str, int, int]:
        tiles = cuda_training._tiles(np.dtype(dtype), rows, columns, k, **least)
        return tiles.kind.removeprefix("gemmlet::"), tiles.block // 32, tiles.shared

    assert block(64, 128, 784) == ("SmallTile<8>", 13, 13 * 64 * 4)
    assert block(64, 128, 784, np.float64) == ("SmallTile<8>", 13, 13 * 64 * 8)
    assert block(64, 256, 784) == ("SmallTile<8>", 7, 7 * 64 * 4)
    assert block(64, 256, 100) == ("SmallTile<8>", 2, 2 * 64 * 4)
    assert block(64, 256, 100, min_warps=8) == ("SmallTile<8>", 8, 8 * 64 * 4)
    assert block(128, 256, 784) == ("SmallTile<16>", 13, 13 * 256 * 4)
    assert block(64, 784, 256) == ("SmallTile<16>", 8, 8 * 256 * 4)


# Names, and what goes wrong.


def test_fuses_what_there_is() -> None:
    supports, dtype = cuda_training.supports_fused, np.dtype(np.float32)

    def fuses(activation: str = "tanh", loss: str = "mean_squared_error", rule: str = "sgd") -> bool:
        plan = Mlp([3, 2, 2], dtype, loss=loss).plan
        linear, *rest = plan.networks[0]
        phases = (*plan.phases[:-1], Update(0, rule))
        return supports(TrainingPlan(((linear, Activation(activation, 0.0), *rest[1:]),), phases))

    assert all(fuses(activation=name) for name in ACTIVATIONS)
    assert all(fuses(loss=name) for name in (*ROW_LOSSES, *LOSSES))
    assert all(fuses(rule=name) for name in OPTIMIZER_RULES)
    assert not fuses(activation="hardtanh")
    assert not fuses(loss="quantile")
    assert not fuses(rule="lion")

    plan, gan = Mlp([3, 2, 2], dtype).plan, Gan(dtype).plan
    assert supports(gan)
    for source in (Dropout(0.5, 256, KEY), InputNoise(0.1, 255, KEY)):
        generator, discriminator = gan.networks
        assert supports(replace(plan, networks=((source, *plan.networks[0]),)))
        assert supports(replace(gan, networks=(generator, (source, *discriminator))))
        assert not supports(replace(gan, networks=((source, *generator), discriminator)))
        assert not supports(replace(plan, networks=((*plan.networks[0], source),)))
    labels = Labels(np.zeros(len(gan.gather.dataset.x), np.int64), 2)
    conditional = gan.gather._replace(dataset=gan.gather.dataset._replace(labels=labels))
    assert supports(TrainingPlan(gan.networks, (conditional, *gan.phases[1:])))
    labels = Labels(np.zeros(len(plan.gather.dataset.x), np.int64), 2)
    conditional = plan.gather._replace(dataset=plan.gather.dataset._replace(labels=labels))
    assert not supports(TrainingPlan(plan.networks, (conditional, *plan.phases[1:])))
    counts = {"weights": np.ones(len(gan.gather.dataset.x))}
    assert supports(replace(plan, phases=(Gather(plan.gather.dataset._replace(**counts)), *plan.phases[1:])))
    weighted = gan.gather._replace(dataset=gan.gather.dataset._replace(**counts))
    assert not supports(replace(gan, phases=(weighted, *gan.phases[1:])))
    at = next(i for i, phase in enumerate(gan.phases) if isinstance(phase, Update))
    for penalties, supported in (([0.5], True), ([-0.5], False), ([0.5, 0.5], False)):
        penalized = [GradientPenalty(1, factor) for factor in penalties]
        assert supports(TrainingPlan(gan.networks, (*gan.phases[:at], *penalized, *gan.phases[at:]))) == supported
    two = Gan(dtype, penalty=(1.0, 1), discriminator=(33, 9, 2))
    assert not supports(two.plan)
    gather, forward, loss, backward, update = plan.phases
    for phases in (
        (gather, forward, loss, backward, AllReduce(0, lambda gradients: None), update),
        (gather, forward, loss, backward, Update(0, "sgd", 1.0)),
        (gather, forward, loss, backward, Penalty(0, 1.0), update),
        (Gather(plan.gather.dataset, 2.0), forward, loss, backward, update),
        plan.phases[:-1],
    ):
        assert not supports(replace(plan, phases=phases))
    assert not supports(replace(plan, networks=((*plan.networks[0], *[Activation("tanh", 0.0)] * 2),)))
    assert not supports(replace(gan, phases=(Gather(samples(5, 33, dtype, "sparse")), *gan.phases[1:])))
    assert not supports(replace(gan, phases=gan.phases[:6]))


@pytest.mark.parametrize("name", ["small", "cluster"])
def test_without_memory_nothing_is_written(name: str, device: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ends."""
    use_plan(name, monkeypatch)
    mlp, calls = Mlp([9, 8, 3], dtype, kind="bytes"), itertools.count()
    fails_at = 0
    for name in ("empty", "upload"):
        method = getattr(type(device), name)

        def limited(*arguments: Any, method: Any = method) -> Any:
            if next(calls) == fails_at:
                raise MemoryError("no more")
            return method(*arguments)

        monkeypatch.setattr(type(device), name, limited)
    plan = mlp.call()
    for fails_at in range(50):  # noqa: B007 - `limited` reads it
        calls = itertools.count()
        try:
            by_session(device)(plan, mlp.batches)
        except MemoryError:
            assert same(arrays_of(plan), arrays_of(mlp.plan))
        else:
            break
    assert fails_at > 5
    assert not same(arrays_of(plan), arrays_of(mlp.plan))


def test_no_mini_batches(device: Any, dtype: Any) -> None:
    mlp = Mlp([9, 8, 3], dtype, count=0)
    assert mlp.on(device)[-2:] == [2.5, 0]


def test_python_and_cpp_agree_on_structs(dtype: Any) -> None:
    """What is read from the sources has the compiler's sizes and offsets."""
    t = {"float32": "float", "float64": "double"}[np.dtype(dtype).name]
    names = {"Progress": "Progress", "ArrangeSamples": "ArrangeSamples", "CloseSteps": "CloseSteps"}
    names |= {"Draw": "Draw", "Classes": "Classes"}
    for name in ("Drops", "Noise", "Changes", "ChangeInputs"):
        names[name] = f"{name}<{t}>"
    for name in ("Input", "Layer", "Staged", "Expand", "UpdatedLayer", "Activation", "Below", "Objective", "Backward"):
        names[name] = f"{name}<{t}>"
    names |= {name: f"{name}<{t}>" for name in ("Loss", "Top", "GradientPenalty")}
    for name in ("Forward", "Gather", "Update"):
        names[name] = f"{name}<{t}, unsigned char>"
    names |= {"ClusterTraining": "ClusterTraining"} if t == "float" else {}
    lines = ['#include "cuda_host.h"', '#include "cuda/training/cluster.cuh"', '#include "cuda/training/gather.cuh"']
    lines += ['#include "cuda/training/top.cuh"', '#include "cuda/training/update.cuh"', "namespace gemmlet {"]
    for name, cpp in names.items():
        struct = declarations.struct(name, np.dtype(dtype))
        lines += [f"using {name}Type = {cpp};", f"static_assert(sizeof({cpp}) == {struct.itemsize});"]
        assert struct.fields is not None
        for member, (_, offset, *_) in struct.fields.items():
            lines.append(f"static_assert(__builtin_offsetof({name}Type, {member}) == {offset});")
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-x", "c++", f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-"]
    done = subprocess.run(command, input="\n".join([*lines, "}"]), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
