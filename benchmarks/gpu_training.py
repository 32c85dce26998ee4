"""Training on a GPU, and the same in PyTorch and JAX; and what `gpu_report.py` checks of it.

    python benchmarks/gpu_training.py ROWS [--data-dir DIR]

trains both networks with gemmlet and adds what came out to ROWS, as `gpu_cases.py` does. The cases are what that file
times in the families `training`, an epoch of an MLP and a step of a GAN, and `fit`, an epoch with dropout, label
smoothing, or augmentation beside one without. A fit's first epoch also uploads the samples and
records the graphs, which PyTorch's loops have behind them; so an epoch of gemmlet is what more of them cost.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu_timing import Case, Gpu, Implementation, constants

import gemmlet
from gemmlet import nn
from gemmlet.backends import select
from gemmlet.backends.cuda import training as cuda_training
from gemmlet.bench import training as bench
from gemmlet.bench.training import BATCH, BETA1, BETA2, EPS, GAN_LR, GENERATOR, LATENT, LAYERS, LR, GanTask, Task
from gemmlet.data import Mnist, load_mnist

BACKEND = "cuda"
SAMPLES, GAN_STEPS = 60_000, 200
# An epoch is a difference: of a fit of one, and of one of MORE_EPOCHS more; of one more, where it takes LONG_SECONDS.
MORE_EPOCHS, LONG_SECONDS = 8, 0.5
CHECKED_STEPS = 100
EPOCHS = 10

# Of all weights after the steps that are checked, in the norm. Adam divides by the size of gradients, of which the
# smallest are rounding errors and little else.
_WEIGHT_ERROR = {"sgd": 1e-5, "adam": 1e-4}


def optimizer(rule: str) -> nn.SGD | nn.Adam:
    """Return gemmlet's; PyTorch's has the same numbers."""
    return nn.SGD(LR) if rule == "sgd" else nn.Adam()


def more_epochs(fit: Callable[[int], Any], units: int) -> Callable[[], float]:
    """Return a function that times an epoch, divided by `units`, by its own clock."""

    def seconds() -> float:
        def clocked(epochs: int) -> float:
            start = time.perf_counter()
            fit(epochs)
            return time.perf_counter() - start

        first = clocked(1)
        more = MORE_EPOCHS if first < LONG_SECONDS else 1
        return (clocked(1 + more) - first) / (more * units)

    return seconds


def _clocked(gpu: Gpu, call: Callable[[], Any], units: int = 1) -> Callable[[], float]:
    """Return a function that times a call by its own clock."""

    def seconds() -> float:
        gpu.synchronize()
        start = time.perf_counter()
        call()
        gpu.synchronize()
        return (time.perf_counter() - start) / units

    return seconds


#
# PyTorch
#


class TorchTraining:
    """What a loop in PyTorch needs to run as one graph a step: where it is, on the device, and how to start anew."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.torch, self.device = gpu, gpu.torch, gpu.torch_device
        self.position = self.torch.zeros((), dtype=self.torch.int64, device=self.device)
        self.every = self.torch.arange(BATCH, device=self.device)
        self._first: list[Any] = []

    def tensor(self, array: np.ndarray) -> Any:
        """Return a copy on the device."""
        return self.torch.from_numpy(array).to(self.device)

    def adam(self, parameters: Any, **numbers: Any) -> Any:
        """Return the fastest Adam that a graph can hold."""
        settings = {**numbers, "fused": True, "capturable": self.device == "cuda"}
        return self.torch.optim.Adam(parameters, **settings)

    def _tensors(self) -> Iterator[Any]:
        """Everything that a step changes but where it is."""
        for each in self.optimizers():
            for group in each.param_groups:
                for parameter in group["params"]:
                    yield parameter.data
                    yield from (v for v in each.state.get(parameter, {}).values() if self.torch.is_tensor(v))

    def optimizers(self) -> list[Any]:
        """Return the optimizers."""
        raise NotImplementedError

    def recorded(self, steps: Sequence[Callable[[], Any]]) -> list[Callable[[], Any]]:
        """Return each step as a graph; the parameters are as before, and the optimizers as new."""
        parameters = [p for each in self.optimizers() for group in each.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        graphs = []
        for step in steps:
            self.position.zero_()
            graphs.append(self.gpu.torch_graph(step))
        for tensor in self._tensors():
            tensor.zero_()
        with self.torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        self.position.zero_()
        return graphs


class TorchMlp(TorchTraining):
    """The MLP: the usual loop, and each step as a graph that gathers its samples itself."""

    def __init__(self, gpu: Gpu, t: Task, rule: str, graph: bool) -> None:
        super().__init__(gpu)
        torch = self.torch
        self.model = bench.torch_layers(t.layers, t.parameters).to(self.device)
        self.x, self.labels = self.tensor(t.x), self.tensor(t.labels)
        # Longer than an epoch by what is done to record a step.
        self.order = torch.arange(len(t.labels) + 4 * BATCH, device=self.device) % len(t.labels)
        parameters = list(self.model.parameters())
        self.optimizer = self.adam(parameters) if rule == "adam" else torch.optim.SGD(parameters, lr=LR, fused=True)
        self.graphs: dict[int, Callable[[], Any]] = {}
        if graph:
            sizes = [BATCH] + [len(t.labels) % BATCH] * (len(t.labels) % BATCH > 0)
            recorded = self.recorded([functools.partial(self._step_at_position, size) for size in sizes])
            self.graphs = dict(zip(sizes, recorded, strict=True))

    def optimizers(self) -> list[Any]:
        """See `TorchTraining`."""
        return [self.optimizer]

    def step(self, where: Any) -> None:
        """One mini-batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.torch.nn.functional.cross_entropy(self.model(self.x[where]), self.labels[where])
        loss.backward()
        self.optimizer.step()

    def _step_at_position(self, size: int) -> None:
        self.step(self.order[self.position + self.every[:size]])
        self.position.add_(size)

    def epoch(self, order: Any) -> None:
        """Train on samples in this order."""
        if not self.graphs:
            for where in order.split(BATCH):
                self.step(where)
            return
        self.order[: len(order)].copy_(order)
        self.position.zero_()
        for _ in range(len(order) // BATCH):
            self.graphs[BATCH]()
        if len(order) % BATCH:
            self.graphs[len(order) % BATCH]()

    def parameters(self) -> list[np.ndarray]:
        """Return them as gemmlet has them: weights are (inputs, outputs)."""
        return [p.detach().cpu().numpy().T for p in self.model.parameters()]


class TorchGan(TorchTraining):
    """The GAN, likewise; samples come in their order."""

    def __init__(self, gpu: Gpu, t: GanTask, graph: bool) -> None:
        super().__init__(gpu)
        torch = self.torch
        torch.manual_seed(0)
        self.generator = bench.torch_layers((LATENT, *GENERATOR), t.generator, torch.nn.Tanh()).to(self.device)
        self.discriminator = bench.torch_layers((GENERATOR[-1], *bench.DISCRIMINATOR), t.discriminator).to(self.device)
        numbers: dict[str, Any] = {"lr": GAN_LR, "betas": (BETA1, BETA2), "eps": EPS}
        self.generator_optimizer = self.adam(self.generator.parameters(), **numbers)
        self.discriminator_optimizer = self.adam(self.discriminator.parameters(), **numbers)
        self.samples = self.tensor(t.real)
        self.sums = torch.zeros(2, device=self.device)
        self.graph = self.recorded([self._step_at_position])[0] if graph else None

    def optimizers(self) -> list[Any]:
        """See `TorchTraining`."""
        return [self.generator_optimizer, self.discriminator_optimizer]

    def step(self, real: Any) -> None:
        """One mini-batch."""
        torch, entropy = self.torch, self.torch.nn.functional.binary_cross_entropy_with_logits
        m = len(real)
        ones, zeros = torch.ones(m, 1, device=self.device), torch.zeros(m, 1, device=self.device)
        fake = self.generator(torch.randn(m, LATENT, device=self.device))
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        logits = self.discriminator(torch.cat([real, fake.detach()]))
        loss = entropy(logits[:m], ones) + entropy(logits[m:], zeros)
        loss.backward()
        self.discriminator_optimizer.step()

        self.generator_optimizer.zero_grad(set_to_none=True)
        # Its gradients in the discriminator are not needed.
        self.discriminator.requires_grad_(False)
        generator_loss = entropy(self.discriminator(fake), ones)
        generator_loss.backward()
        self.discriminator.requires_grad_(True)
        self.generator_optimizer.step()
        self.sums += torch.stack([generator_loss.detach(), loss.detach()])

    def _step_at_position(self) -> None:
        self.step(self.samples[self.position + self.every])
        self.position.add_(BATCH)

    def epoch(self, n: int) -> Any:
        """Train on the first n samples, whole mini-batches; the sums of the losses stay on the device."""
        self.sums.zero_()
        self.position.zero_()
        for start in range(0, n, BATCH):
            if self.graph is None:
                self.step(self.samples[start : start + BATCH])
            else:
                self.graph()

    def losses(self, n: int) -> np.ndarray:
        """Train, and return the mean losses of the generator and the discriminator."""
        self.epoch(n)
        return self.sums.cpu().numpy() / (n // BATCH)


#
# Cases
#


def _data(data_dir: Path | None) -> Mnist:
    return load_mnist(data_dir, download=False)


def mlp_task(images: np.ndarray, labels: np.ndarray, count: int | None = None) -> Task:
    """Return the task of an epoch of `count` samples (all that MNIST has), repeated where there are fewer."""
    count = SAMPLES if count is None else count
    where = np.arange(count) % len(labels)
    return bench.task(LAYERS, images[where], labels[where], BATCH, "float32", min(count, CHECKED_STEPS * BATCH))


def model_of(t: Task, dtype: Any = np.float32, **settings: Any) -> nn.MLP:
    """Return the task's network with its first weights."""
    model = nn.MLP(list(t.layers), "tanh", dtype=dtype, seed=0, **settings)
    for parameter, first in zip(model.parameters, t.parameters, strict=True):
        parameter[...] = first
    return model


def exact_weights(t: Task, rule: str, augment: nn.Augment | None = None, **settings: Any) -> list[np.ndarray]:
    """Return the weights after the checked samples, trained in float64 on the CPU; `settings` are the network's."""
    try:
        backend = select.load("cpu")
    except (RuntimeError, ImportError):
        backend = select.load("numpy")
    model, more = model_of(t, np.float64, **settings), {} if augment is None else {"augment": augment}
    with gemmlet.use_backend(backend):
        x, y = _images(t.given[: t.checked], augment), t.labels[: t.checked]
        model.fit(x, y, epochs=1, batch_size=t.batch, optimizer=optimizer(rule), shuffle=False, **more)
    return model.parameters


def _images(x: np.ndarray, augment: nn.Augment | None) -> np.ndarray:
    """What is augmented has a height and a width."""
    return x if augment is None else x.reshape(len(x), 28, 28)


def _difference(got: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """In the norm of all weights."""
    wrong = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in zip(got, exact, strict=True))
    return math.sqrt(wrong / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for b in exact))


def epochs_of_gemmlet(
    rule: str, augment: nn.Augment | None = None, ways: dict[str, Any] | None = None, **settings: Any
) -> Callable[[Gpu, tuple[Task, Any]], Implementation]:
    """Return what prepares `fit`; `ways` are how constants of `cuda_training` are set, `settings` the network's."""

    def prepare(gpu: Gpu, inputs: tuple[Task, Any]) -> Implementation:
        t, _ = inputs
        model = model_of(t, **settings)
        more = {} if augment is None else {"augment": augment}

        def fit(count: int | None, **each: Any) -> None:
            x, y = _images(t.given[:count], augment), t.labels[:count]
            with gemmlet.use_backend(BACKEND), constants(cuda_training, ways or {}):
                model.fit(x, y, batch_size=t.batch, optimizer=optimizer(rule), **more, **each)

        def result() -> list[np.ndarray]:
            fit(t.checked, epochs=1, shuffle=False)
            return [p.copy() for p in model.parameters]

        return Implementation(more_epochs(lambda epochs: fit(None, epochs=epochs), 1), result, clock="own")

    return prepare


def mlp_case(rule: str, task: Callable[[], Task]) -> Case:
    """Return the case of an epoch of the MLP with SGD or Adam."""

    def torch(graph: bool) -> Callable[[Gpu, tuple[Task, Any]], Implementation]:
        def prepare(gpu: Gpu, inputs: tuple[Task, Any]) -> Implementation:
            t, _ = inputs
            model = TorchMlp(gpu, t, rule, graph)

            def call() -> None:
                model.epoch(gpu.torch.randperm(len(t.labels), device=gpu.torch_device))

            def result() -> list[np.ndarray]:
                model.epoch(gpu.torch.arange(t.checked, device=gpu.torch_device))
                return model.parameters()

            return Implementation(_clocked(gpu, call), result, clock="own")

        return prepare

    def jax(gpu: Gpu, inputs: tuple[Task, Any]) -> Implementation:
        prepared = bench.jax_mlp(inputs[0])
        return Implementation(_clocked(gpu, prepared.call), prepared.result, clock="own")

    # Besides what fit does here, what it does on other GPUs.
    implementations = {
        "gemmlet": epochs_of_gemmlet(rule),
        "graphs": epochs_of_gemmlet(rule, ways={"CLUSTER_SIZES": ()}),
        "pytorch": torch(False),
        "pytorch graph": torch(True),
    }
    if rule == "sgd":
        implementations["jax"] = jax

    def inputs(gpu: Gpu) -> tuple[Task, Any]:
        t = task()
        return t, exact_weights(t, rule)

    return Case(
        "epoch",
        f"784-128-10 tanh, batch {BATCH}, {SAMPLES:,} images, {rule}",
        inputs,
        implementations,
        lambda gpu, inputs, result: _difference(result, inputs[1]) / _WEIGHT_ERROR[rule],
        unit="epoch",
        labels={"rule": rule},
    )


# What `fit` may do besides, by name: the network's settings and `fit`'s.
EXTRAS: dict[str, dict[str, Any]] = {
    "dropout=0.2": {"dropout": 0.2},
    "label_smoothing=0.1": {"label_smoothing": 0.1},
    "augment=Augment()": {"augment": nn.Augment()},
    "all of them": {"dropout": 0.2, "label_smoothing": 0.1, "augment": nn.Augment()},
}


def extra_case(rule: str, name: str, task: Callable[[], Task]) -> Case:
    """Return the case of an epoch with one of `EXTRAS`, beside one without."""

    def inputs(gpu: Gpu) -> tuple[Task, dict[str, Any]]:
        t = task()
        return t, {"gemmlet": exact_weights(t, rule, **EXTRAS[name]), "plain": exact_weights(t, rule)}

    def checked(name: str, **extras: Any) -> Callable[[Gpu, tuple[Task, dict[str, Any]]], Implementation]:
        def prepare(gpu: Gpu, inputs: tuple[Task, dict[str, Any]]) -> Implementation:
            found = epochs_of_gemmlet(rule, **extras)(gpu, inputs)
            return replace(found, result=lambda: _difference(found.result(), inputs[1][name]))

        return prepare

    return Case(
        "fit",
        f"784-128-10 tanh, batch {BATCH}, {SAMPLES:,} images, {rule}, {name}",
        inputs,
        {"gemmlet": checked("gemmlet", **EXTRAS[name]), "plain": checked("plain")},
        # Another mask, or other images, would show in the first digit.
        lambda gpu, inputs, result: result / 1e-3,
        unit="epoch",
        labels={"rule": rule, "with": name},
    )


def gan_case(images: Callable[[], np.ndarray]) -> Case:
    """Return the case of a step of the GAN."""
    count = GAN_STEPS * BATCH

    def ours(gpu: Gpu, inputs: tuple[GanTask, Any]) -> Implementation:
        t, _ = inputs
        model, rule = nn.GAN.classic(), nn.Adam(GAN_LR, beta1=BETA1)

        def fit(epochs: int, n: int = count) -> Any:
            with gemmlet.use_backend(BACKEND):
                return model.fit(t.given[:n], epochs=epochs, batch_size=BATCH, optimizer=rule, shuffle=False)

        def losses(n: int) -> tuple[float, float]:
            history = fit(1, n)
            return history.generator_loss[0], history.discriminator_loss[0]

        return Implementation(more_epochs(fit, GAN_STEPS), bench._checked(losses, BATCH), clock="own")

    def torch(graph: bool) -> Callable[[Gpu, tuple[GanTask, Any]], Implementation]:
        def prepare(gpu: Gpu, inputs: tuple[GanTask, Any]) -> Implementation:
            model = TorchGan(gpu, inputs[0], graph)
            call = _clocked(gpu, lambda: model.epoch(count), GAN_STEPS)
            return Implementation(call, bench._checked(model.losses, BATCH), clock="own")

        return prepare

    def jax(gpu: Gpu, inputs: tuple[GanTask, Any]) -> Implementation:
        prepared = bench.jax_gan(inputs[0])
        return Implementation(_clocked(gpu, prepared.call, GAN_STEPS), prepared.result, clock="own")

    def inputs(gpu: Gpu) -> tuple[GanTask, Any]:
        digits = images()
        t = bench.gan_task(digits[np.arange(count) % len(digits)])
        return t, bench.exact_gan(replace(t, real=t.real[: bench.CHECKED_STEPS * BATCH]))

    def error(gpu: Gpu, inputs: tuple[GanTask, Any], result: Any) -> float:
        # Each implementation has noise of its own; the mean losses over some steps are close.
        return float(np.max(np.abs(np.asarray(result) - inputs[1]))) / 0.05

    return Case(
        "gan",
        f"step 100-256-784 and 784-256-1, batch {BATCH}, adam",
        inputs,
        {"gemmlet": ours, "pytorch": torch(False), "pytorch graph": torch(True), "jax": jax},
        error,
        unit="step",
    )


def _task_of(data: Callable[[], Mnist]) -> Callable[[], Task]:
    return lambda: mlp_task(data().x_train, data().y_train)


def training(data_dir: Path | None) -> Iterator[Case]:
    """Epochs of the MLP, and a step of the GAN."""
    data = functools.cache(functools.partial(_data, data_dir))
    yield mlp_case("sgd", _task_of(data))
    yield gan_case(lambda: data().x_train)
    yield mlp_case("adam", _task_of(data))


def extras(data_dir: Path | None) -> Iterator[Case]:
    """Epochs of the MLP with what `fit` may do besides."""
    task = functools.cache(_task_of(functools.cache(functools.partial(_data, data_dir))))
    for rule in ("sgd", "adam"):
        for name in EXTRAS:
            yield extra_case(rule, name, task)


FAMILIES = {"training": training, "fit": extras}


#
# Does it train?
#


def weight_difference(other: str, t: Task, rule: str) -> float:
    """The largest difference of a weight after the checked steps, relative to the largest weight of its array."""
    trained = []
    for name in (BACKEND, other):
        model = nn.MLP(list(t.layers), "tanh")
        with gemmlet.use_backend(name):
            x, y = t.given[: t.checked], t.labels[: t.checked]
            model.fit(x, y, epochs=1, batch_size=t.batch, optimizer=optimizer(rule), shuffle=False)
        trained.append([p.astype(np.float64) for p in model.parameters])
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in zip(*trained, strict=True))


def check(data_dir: Path | None, other: str) -> Iterator[tuple[str, Any]]:
    """Train both networks; yield what came out, by name."""
    data = _data(data_dir)
    yield "data", data.source if data.is_sample else "MNIST from the folder that was given"
    yield "full", len(data.y_train) == SAMPLES
    with gemmlet.use_backend(BACKEND):
        model = nn.MLP(list(LAYERS), "tanh", seed=0)
        history = model.fit(data.x_train, data.y_train, epochs=EPOCHS)
        yield "mlp_epochs", EPOCHS
        yield "mlp_seconds", history.seconds
        yield "mlp_loss", history.loss[-1]
        yield "mlp_accuracy", float(np.mean(model.predict(data.x_test) == data.y_test))
        again = nn.MLP(list(LAYERS), "tanh", seed=0)
        again.fit(data.x_train, data.y_train, epochs=EPOCHS)
        pairs = zip(model.parameters, again.parameters, strict=True)
        yield "same_bits", all(np.array_equal(a, b) for a, b in pairs)
        gan = nn.GAN(seed=0)
        gan_history = gan.fit(data.x_train, epochs=2)
        yield "gan_seconds", gan_history.seconds
        yield "gan_losses", [gan_history.generator_loss[-1], gan_history.discriminator_loss[-1]]
        yield "gan_finite", bool(np.isfinite(gan.sample(64)).all() and np.isfinite(gan_history.generator_loss).all())
    t = mlp_task(data.x_train, data.y_train, CHECKED_STEPS * BATCH)
    for rule in ("sgd", "adam"):
        yield f"weights_{rule}", weight_difference(other, t, rule)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    other = "cpu"
    try:
        select.load("cpu")
    except (RuntimeError, ImportError) as error:
        other = "numpy"
        print(f"  compared with the backend numpy, as cpu does not load: {error}", flush=True)
    with options.rows.open("a") as file:
        for name, value in check(options.data_dir, other):
            print(f"  {name}: {value}", flush=True)
            file.write(json.dumps({"trained": {name: value}}) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
