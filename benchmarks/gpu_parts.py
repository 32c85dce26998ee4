"""Where the time of small work on a GPU goes: launches, the gaps between them, the host. A stage of `gpu_report.py`.

    python benchmarks/gpu_parts.py TABLES [--data-dir DIR] [--seconds X]

Of a training step each launch, by itself, as one of many in a graph; all of them in order, as the graph that `fit`
replays; and what a step costs `fit`. Of a small call what Python, the launch and a new array take. Of the cluster's
kernel the cycles of each phase. Tables are added to TABLES, one a line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from gpu_timing import Gpu, compile_together, constants, write_table
from gpu_training import BETA1, GAN_LR, more_epochs, optimizer

import gemmlet
from gemmlet import kernels, nn
from gemmlet.backends import select
from gemmlet.backends.cuda import augmentation as cuda_augmentation
from gemmlet.backends.cuda import matmul as cuda_matmul
from gemmlet.backends.cuda import training as cuda_training
from gemmlet.backends.cuda.types import address
from gemmlet.bench.training import BATCH, LAYERS
from gemmlet.data import load_mnist
from gemmlet.nn import fit as nn_fit

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import cluster_phases

# ``fit(steps, epochs)`` trains a model.
Fit = Callable[[int, int], Any]

# Steps that are taken down, and steps that `fit` does in an epoch when that is timed.
STEPS, FIT_STEPS = 256, 400
# Of one launch in a row, and of a small call.
REPEATS, CALLS = 50, 200

STEP_HEAD = ("work", "launch", "grid", "block", "shared", "µs a step")
PHASE_HEAD = ("optimizer", "phase", "median", "least of all warps", "most")
CALL_HEAD = ("call", "µs", "with a new array", "launch alone", "Python before it", "on the GPU, in a graph")


#
# Training
#


def mlp(
    images: np.ndarray,
    rule: str,
    layers: Sequence[int] = LAYERS,
    batch: int = BATCH,
    augment: nn.Augment | None = None,
    **settings: Any,
) -> Fit:
    """Return what trains a perceptron; `settings` are the model's."""
    model, labels = nn.MLP(list(layers), "tanh", seed=0, **settings), np.arange(len(images)) % layers[-1]
    more = {} if augment is None else {"augment": augment}

    def fit(steps: int, epochs: int = 1) -> Any:
        where = np.arange(steps * batch) % len(images)
        x = np.ascontiguousarray(images[where, : layers[0]])
        if augment is not None:
            x = x.reshape(len(x), -1, math.isqrt(layers[0]))
        rule_ = optimizer(rule)
        return model.fit(x, labels[where], epochs=epochs, batch_size=batch, optimizer=rule_, shuffle=False, **more)

    return fit


def gan(images: np.ndarray, batch: int = BATCH, **settings: Any) -> Fit:
    """Return what trains the classic GAN; with `settings` one of as many units, which has them."""
    model, rule = nn.GAN.classic(), nn.Adam(GAN_LR, beta1=BETA1)
    if settings:
        model = nn.GAN(100, [256, images.shape[1]], [256, 1], **settings)

    def fit(steps: int, epochs: int = 1) -> Any:
        x = images[np.arange(steps * batch) % len(images)]
        y = np.arange(len(x)) % model.n_classes if model.n_classes else None
        return model.fit(x, epochs=epochs, batch_size=batch, optimizer=rule, shuffle=False, y=y)

    return fit


class OneCall(nn_fit.CallBudget):
    """Of an epoch, which `fit` would begin with a call of one step, and one of four, to learn how long they take."""

    def __init__(self, most: int = sys.maxsize) -> None:
        super().__init__(most)
        self.steps = self._following = most

    def stop(self, done: int) -> None:
        """It stays so."""


class Launch:
    """One launch, as it was made: the kernel's name, and what `Device.launch` was given."""

    def __init__(self, name: str, kernel: Any, *how: Any, **more: Any) -> None:
        self.name, self.kernel, self.how, self.more = name, kernel, how, more

    def facts(self) -> list[str]:
        """The name without namespaces; grid, threads of a block, and bytes of dynamic shared memory."""
        grid, block, _, *rest = self.how
        shared = rest[0] if rest else self.more.get("shared", 0)
        return [re.sub(r"\w+::", "", self.name), "x".join(map(str, grid[:2])), str(block), str(shared)]


class Steps:
    """The launches that fused training makes of `steps` steps, to be done again, together or one by one.

    ``launches`` are those of one step; where a cluster does all steps, those of all of them. ``others`` are made once
    an epoch, before.

    Raises
    ------
    RuntimeError
        There are none: the plan is not fused.
    """

    def __init__(self, gpu: Gpu, backend: Any, fit: Fit, steps: int = 0) -> None:
        self.gpu, self.device, self.steps = gpu, backend._first, steps or STEPS
        device, names = self.device, dict[int, str]()
        made, sessions, training = list[Launch](), list[Any](), list[Any]()
        self.others = list[Launch]()
        self._kept = list[Any]()  # what a call gives back when it is done
        kernels, launch, empty, session = device.kernels, device.launch, device.empty, cuda_training.Session

        def named(source: str, expressions: Sequence[str]) -> list[Any]:
            found: list[Any] = kernels(source, expressions)
            names.update(zip(map(id, found), expressions, strict=True))
            return found

        def taken_down(kernel: Any, *how: Any, **more: Any) -> None:
            if id(kernel) in names:  # else a call of the reference made it
                (made if training else self.others).append(Launch(names[id(kernel)], kernel, *how, **more))
            launch(kernel, *how, **more)

        def kept(*given: Any) -> Any:
            self._kept.append(empty(*given))
            return self._kept[-1]

        def opened(*given: Any) -> Any:
            sessions.append(session(*given))
            train = sessions[-1].train

            def trained(batches: Any) -> Any:
                training.append(batches)
                try:
                    return train(batches)
                finally:
                    training.clear()

            sessions[-1].train = trained
            return sessions[-1]

        with (
            gemmlet.use_backend(backend),
            mock.patch.object(nn_fit, "CallBudget", OneCall),
            mock.patch.multiple(device, kernels=named, launch=taken_down, empty=kept),
            mock.patch.object(cuda_training, "Session", opened),
        ):
            fit(self.steps, 1)
        if not made or not sessions:
            raise RuntimeError("the backend cuda has no kernels for this plan")
        self.session = sessions[-1]
        # As at the begin of a call.
        self._before = np.empty(self.session._state.shape, np.uint8)
        device.download(self.session._state, self._before)
        progress = self._before[: cuda_training._PROGRESS.itemsize].view(cuda_training._PROGRESS)
        progress["next"] = progress["step"] = 0
        self.in_cluster = any(each.more.get("cluster", 1) > 1 for each in made)
        self._together = 1 if self.in_cluster else min(cuda_training.STEPS_TOGETHER, self.steps)
        self._all, self.launches = made, made[: len(made) // self._together]

    def _recorded(self, launches: Sequence[Launch], repeats: int = 1) -> Callable[[], None]:
        def record() -> None:
            for _ in range(repeats):
                for each in launches:
                    self.device.launch(each.kernel, *each.how, **each.more)

        graph = self.device.record(record)
        self._begin()
        return graph.replay

    def _begin(self) -> None:
        """Let the next step be the first."""
        self.device.upload(self._before, self.session._state)

    def alone(self, launch: Launch) -> float:
        """Seconds a step of one launch, as one of many in a row."""
        repeats = 1 if self.in_cluster else REPEATS
        call = self._recorded([launch], repeats)
        seconds = statistics.median(self.gpu.seconds(call, 2) for _ in range(3)) / repeats
        self._begin()
        return seconds / self.steps if self.in_cluster else seconds

    def whole(self) -> float:
        """Seconds a step of all launches in order."""
        if self.in_cluster:
            return sum(map(self.alone, self.launches))
        # It is called once more than that, and no step is done twice, as there are no more samples.
        times, replays = list[float](), self.steps // self._together
        for _ in range(3):
            call = self._recorded(self._all)
            times.append(self.gpu.seconds(call, replays - 1) / self._together)
        return statistics.median(times)


def host(backend: Any, fit: Fit, steps: int) -> dict[str, float]:
    """What a step costs the host in an epoch of many, in seconds, by what it does."""
    device, train = backend._first, cuda_training.Session.train
    calls = list[dict[str, float]]()

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*given, **more)
            finally:
                if calls:
                    calls[-1][name] = calls[-1].get(name, 0.0) + time.perf_counter() - start

        return timed

    timed_train = clocked("train", train)

    def trained(*given: Any) -> Any:
        calls.append({})
        return timed_train(*given)

    counts = list[int]()

    def run(epochs: int) -> None:
        calls.clear()
        fit(steps, epochs)
        counts.append(epochs)

    with (
        gemmlet.use_backend(backend),
        mock.patch.object(nn_fit, "CallBudget", OneCall),
        mock.patch.multiple(device, upload=clocked("send", device.upload), download=clocked("wait", device.download)),
        mock.patch.object(cuda_training.Session, "train", trained),
    ):
        epoch = more_epochs(run, steps)()
    # Of the last fit but its first epoch, which records graphs.
    more = counts[-1] - 1
    last = calls[len(calls) // counts[-1] :]
    total = {name: sum(c.get(name, 0.0) for c in last) / (more * steps) for name in ("train", "send", "wait")}
    return {
        "fit: a step of one more epoch": epoch,
        "fit: outside its call of the backend": epoch - total["train"],
        "fit: sending": total["send"],
        "fit: preparing and launching": total["train"] - total["send"] - total["wait"],
        "fit: waiting for the GPU at the end": total["wait"],
    }


def step_rows(gpu: Gpu, backend: Any, work: str, fit: Fit, steps: int = 0, fit_steps: int = 0) -> Iterator[list[str]]:
    """Rows of the table of steps."""
    found, rows, total = Steps(gpu, backend, fit, steps), list[list[str]](), 0.0
    for launch in found.launches:
        seconds = found.alone(launch)
        total += seconds
        rows.append([work, *launch.facts(), f"{seconds * 1e6:.2f}"])
    for launch in found.others:
        seconds = found.alone(launch) / (1 if found.in_cluster else found.steps)
        rows.append([work, *launch.facts(), f"{seconds * 1e6:.2f}"])
    whole, count = found.whole(), len(found.launches)
    del found
    yield from rows
    sums = {f"sum of {count} launches": total, "all of them in order": whole}
    for name, seconds in {**sums, **host(backend, fit, fit_steps or FIT_STEPS)}.items():
        yield [work, name, "", "", "", f"{seconds * 1e6:.2f}"]


def works(images: np.ndarray) -> Iterator[tuple[str, Fit, dict[str, Any]]]:
    """Yield what is taken apart, the most telling first, and how constants of `cuda_training` are set for it."""
    graphs: dict[str, Any] = {"CLUSTER_SIZES": ()}
    yield "GAN", gan(images), {}
    yield "MLP adam, graphs", mlp(images, "adam"), graphs
    yield "MLP sgd, cluster", mlp(images, "sgd"), {}
    yield "MLP adam, cluster", mlp(images, "adam"), {}
    yield "MLP sgd, graphs", mlp(images, "sgd"), graphs
    yield "MLP sgd, dropout 0.2", mlp(images, "sgd", dropout=0.2), {}
    yield "MLP sgd, augmentation", mlp(images, "sgd", augment=nn.Augment()), {}
    yield "MLP sgd, label smoothing 0.1", mlp(images, "sgd", label_smoothing=0.1), {}
    penalized = {"n_classes": 10, "gradient_penalty": 0.1, "discriminator_activation": "leaky_relu"}
    yield "GAN with classes and a gradient penalty", gan(images, **penalized), {}


#
# Small calls
#


def small_calls(backend: Any, arrays: Callable[[np.ndarray], Any]) -> dict[str, tuple[Callable[[], Any], ...]]:
    """By name: the call with an output that is there, with a new one, and the launch alone."""
    device, rng = backend._first, np.random.default_rng(0)
    x, images, w, b = (
        arrays(rng.normal(size=shape).astype(np.float32)) for shape in ((64, 128), (64, 784), (784, 128), (128,))
    )
    y, at = arrays(np.empty((64, 128), np.float32)), address
    tanh = backend.activation_launch(device, "forward", "tanh", x.dtype)
    softmax = backend.row_launch(device, "forward", "softmax", x.dtype, 128, at(x), at(y))
    layouts = images.shape, w.shape, images.strides, w.strides, x.dtype
    linear = cuda_matmul.prepared(device, device.multiprocessors, layouts, (True, True, True), "tanh", 0.0, False, None)
    return {
        "tanh 64x128": (
            lambda: kernels.tanh(x, out=y),
            lambda: kernels.tanh(x),
            functools.partial(tanh.launch, -(-x.size // tanh.per_block), 1, at(x), at(y), 0.0, x.size),
        ),
        "softmax 64x128": (
            lambda: kernels.softmax(x, out=y),
            lambda: kernels.softmax(x),
            functools.partial(softmax.launch, softmax.blocks(64), 1, at(x), at(y), 64, 128),
        ),
        "linear 64x784->128 tanh": (
            lambda: kernels.linear(images, w, b, "tanh", out=y),
            lambda: kernels.linear(images, w, b, "tanh"),
            functools.partial(linear, at(images), at(w), at(y), 0, at(b)),
        ),
    }


def call_rows(gpu: Gpu, backend: Any, arrays: Callable[[np.ndarray], Any]) -> Iterator[list[str]]:
    """Rows of the table of small calls."""
    device = backend._first

    def microseconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            device.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times) / CALLS

    def repeated(call: Callable[[], Any]) -> None:
        for _ in range(REPEATS):
            call()

    for name, (whole, new, launch) in small_calls(backend, arrays).items():
        whole()  # compiles
        times = [microseconds(call) for call in (whole, new, launch)]
        graph = device.record(functools.partial(repeated, launch))
        in_graph = 1e6 * gpu.seconds(graph.replay, 4) / REPEATS
        yield [name, *(f"{t:.2f}" for t in (*times, times[0] - times[2], in_graph))]


#
# The command
#


def compile_kernels(backend: Any, rules: Sequence[str] = ("sgd", "adam")) -> None:
    """Compile on all processors what training in float32 may launch: one after another they would take a minute."""
    pairs = []
    for source, names in {**cuda_training.expressions(), **cuda_augmentation.expressions()}.items():
        if backend._first.arch not in cuda_training.ARCHITECTURES.get(source, (backend._first.arch,)):
            continue
        for name in names:
            of_rule = re.search(r"optimizers::(\w+)", name)
            if "<double" not in name and (of_rule is None or of_rule[1] in rules):
                pairs.append((source, name))
    compile_together(backend._first.arch, pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no work after this time")
    options = parser.parse_args(arguments)
    end, failed = time.monotonic() + options.seconds, False
    backend: Any = select.load("cuda")
    gpu = Gpu(())
    compile_kernels(backend)
    write_table(options.tables, "calls on small arrays", CALL_HEAD, list(call_rows(gpu, backend, gpu.upload)))
    images = load_mnist(options.data_dir, download=False).x_train[:60_000]
    for work, fit, values in works(images):
        if time.monotonic() > end:
            print(f"  no time left for {work}", flush=True)
            continue
        try:
            with constants(cuda_training, values):
                rows = list(step_rows(gpu, backend, work, fit))
        except Exception as error:  # the others are still to come
            failed = True
            rows = [[work, f"{type(error).__name__}: {error}", "", "", "", ""]]
        write_table(options.tables, f"a step of {work}", STEP_HEAD, rows)
    if backend._first.arch == "sm_90a" and time.monotonic() < end:
        write_table(options.tables, "cycles of the cluster", PHASE_HEAD, list(cluster_phases.rows()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
