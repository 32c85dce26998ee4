"""Constants of the backend cuda, and lines of its kernels, that wait for a measurement. A stage of `gpu_report.py`.

    python benchmarks/gpu_variants.py TABLES [--data-dir DIR] [--seconds X]

Of each constant a table is added to TABLES, one a line of JSON: microseconds by its values, the first of which is what
it is now, and what the fastest would save. Some percent are noise. Kernels are timed as they are and with some lines
changed (`SOURCES`). The tiles of matmuls have a script of their own, `gpu_matmul.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from gpu_parts import Fit, Steps, compile_kernels, gan, mlp
from gpu_timing import Gpu, compile_together, constants, write_table

from gemmlet import nn
from gemmlet.backends import select
from gemmlet.backends.cuda import augmentation as cuda_augmentation
from gemmlet.backends.cuda import compiler, launches
from gemmlet.backends.cuda import training as cuda_training
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.data import load_mnist
from gemmlet.formulas.augmentation import Draw
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES

ELEMENTS = 100_000_000

# By columns, who may take a row: threads and numbers of each (`launches.ROW_TEAMS`), what takes it now first.
TEAMS: dict[int, tuple[tuple[int, int], ...]] = {
    10: ((2, 8), (4, 4), (1, 16), (2, 6)),
    128: ((8, 16), (4, 32), (16, 8), (32, 4)),
    1000: ((32, 32), (64, 16), (128, 8)),
    10000: ((512, 20), (256, 40), (1024, 10), (256, 0)),
}

# What is timed, by name: a function that returns seconds.
Works = Mapping[str, Callable[[], float]]


class Sources(NamedTuple):
    """Sources of the kernels with one line changed: what `compiler.sources` is replaced by."""

    title: str
    file: str
    line: str
    instead: str

    def __call__(self) -> Mapping[str, str]:
        sources = dict(_SOURCES())
        if sources[self.file].count(self.line) != 1:
            raise ValueError(f"{self.file} has no single line {self.line!r}")
        return {**sources, self.file: sources[self.file].replace(self.line, self.instead)}


_SOURCES = compiler.sources

# The cluster finds activations and the loss by tables of jumps, each time: a kernel for each network has none, and two
# thirds of the instructions. And exact quotients and roots of Adam branch, where `apply_rule` has short ones.
SOURCES = (
    Sources(
        "network compiled in",
        "cuda/training/cluster.cuh",
        "train_in_cluster(const __grid_constant__ ClusterTraining p, Index steps) {",
        """train_in_cluster(const __grid_constant__ ClusterTraining given, Index steps) {
  ClusterTraining p = given;
  p.hidden_activation.number = ActivationNumber::tanh;
  p.activation.number = ActivationNumber::identity;
  p.objective.loss = ~static_cast<int>(RowLossNumber::softmax_cross_entropy);""",
    ),
    Sources(
        "exact rules",
        "cuda/training/formulas.cuh",
        "if constexpr (same_type<T, float>) {",
        "if constexpr (same_type<T, void>) {",
    ),
)


class Constant(NamedTuple):
    """A constant, what is tried for it, what it is now first, and what that is timed by."""

    module: ModuleType
    name: str
    values: tuple[Any, ...]
    works: Works


def of_training(gpu: Gpu, backend: Any, images: np.ndarray) -> list[Constant]:
    """Constants of fused training."""

    def step(fit: Fit, **values: Any) -> Callable[[], float]:
        def seconds() -> float:
            with constants(cuda_training, values):
                return Steps(gpu, backend, fit).whole()

        return seconds

    graphs = {
        "GAN": step(gan(images)),
        "MLP": step(mlp(images, "adam"), CLUSTER_SIZES=()),
        "784-512-512-10, batch 256": step(mlp(images, "adam", (784, 512, 512, 10), 256), CLUSTER_SIZES=()),
    }
    clusters = {
        f"784-{hidden}-10 {rule}": step(mlp(images, rule, (784, hidden, 10)))
        for hidden in (64, 128)
        for rule in ("sgd", "adam")
    }

    def anew(fit: Fit) -> Callable[[], float]:
        """By a device of its own, which has no kernels of other sources."""
        return lambda: Steps(gpu, type(backend)([type(backend._first)()]), fit).whole()

    networks = {f"784-128-10 {rule}": anew(mlp(images, rule)) for rule in ("sgd", "adam")} | {"GAN": anew(gan(images))}

    def augmented() -> float:
        x, more = gpu.upload(images.reshape(len(images), -1, math.isqrt(images.shape[1]))), nn.Augment().settings
        numbers, out = gpu.upload(np.arange(len(x))), gpu.upload(np.zeros(x.shape, np.uint8))
        return gpu.seconds(lambda: backend.augment(x, more, Draw(0, 0, numbers), out), 5)

    return [
        Constant(cuda_augmentation, "MAX_STAGED_BYTES", (40 << 10, 0), {f"{len(images):,} images": augmented}),
        Constant(cuda_training, "STEPS_TOGETHER", (8, 1, 16, 32), graphs),
        Constant(cuda_training, "MAX_TOP_BYTES", (8 << 20, 0, 64 << 20), graphs),
        Constant(cuda_training, "ENOUGH_TILES", (96, 48, 132, 264), graphs),
        Constant(cuda_training, "MAX_LARGE_BLOCKS", (128, 32, 264), graphs),
        Constant(cuda_training, "CLUSTER_SIZES", ((8, 16), (16,), ()), clusters),
        Constant(compiler, "sources", (compiler.sources, *SOURCES), networks),
    ]


def of_rows(gpu: Gpu, device: Any) -> list[Constant]:
    """Constants of kernels that go by rows, and of losses; arrays of 100 million elements."""

    def backend() -> CudaBackend:
        """Another one, which has no memory of the sizes that were."""
        made: CudaBackend = type(gpu.unwaited)([device])
        return made

    def median(call: Callable[[], Any]) -> float:
        return statistics.median(gpu.seconds(call, 10) for _ in range(5))

    def rows(name: str, columns: int, dtype: str) -> Callable[[], float]:
        def seconds() -> float:
            x = gpu.normal((ELEMENTS // columns, columns), dtype, seed=1)
            out, ours = gpu.empty(x.shape, dtype), backend()
            if name in ROW_FUNCTIONS:
                return median(lambda: ours.row_function(ROW_FUNCTIONS[name], x, out))
            labels = gpu.upload(np.random.default_rng(0).integers(0, columns, len(x)))
            return median(lambda: ours.row_loss(ROW_LOSSES[name], x, labels, 0.0, out))

        return seconds

    def loss(name: str) -> Callable[[], float]:
        def seconds() -> float:
            p, t, out = gpu.normal((ELEMENTS,), seed=1), gpu.normal((ELEMENTS,), seed=2), gpu.empty((ELEMENTS,))
            ours = backend()
            return median(lambda: ours.elementwise_loss(LOSSES[name], p, t, 0.0, out))

        return seconds

    def of_columns(columns: int) -> dict[str, Callable[[], float]]:
        return {
            f"{name} {columns} {dtype}": rows(name, columns, dtype)
            for name in ("softmax", "softmax_cross_entropy")
            for dtype in ("float32", "bfloat16")
        }

    everything = 2**31 - 1
    found = [
        Constant(launches, "ROW_TEAMS", tuple(((everything, *team),) for team in teams), of_columns(columns))
        for columns, teams in TEAMS.items()
    ]

    def blocks(kind: str, values: Iterable[int], works: Works) -> Constant:
        return Constant(launches, "MAX_BLOCKS", tuple({**launches.MAX_BLOCKS, kind: n} for n in values), works)

    names = ("mean_squared_error", "binary_cross_entropy_with_logits")
    found.append(blocks("row_loss", (1056, 528, 2112, 8192), of_columns(10) | of_columns(1000)))
    found.append(blocks("elements", (8192, 1056, 2112, 32768), {name: loss(name) for name in names}))
    found.append(blocks("rows", (32768, 2112, 8192, 131072), of_columns(10) | of_columns(1000)))
    return found


def _words(constant: Constant, value: Any) -> str:
    """A value, as short as the others of the constant let it be."""
    if isinstance(value, dict):
        (kind,) = {kind for other in constant.values for kind in other if other[kind] != constant.values[0][kind]}
        return f"{kind} {value[kind]}"
    if constant.name == "sources":
        return getattr(value, "title", "as they are")
    return "x".join(map(str, value[0][1:])) if constant.name == "ROW_TEAMS" else str(value)


def timed(constant: Constant) -> list[list[str]]:
    """The rows of a constant's table."""
    times, failed = dict[str, dict[str, float]](), dict[str, str]()
    names = [_words(constant, value) for value in constant.values]
    for name, value in zip(names, constant.values, strict=True):
        with mock.patch.object(constant.module, constant.name, value):
            for work, seconds in constant.works.items():
                try:
                    took = seconds()
                except Exception as error:  # other values, and other works, are still to come
                    failed[work] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
                    continue
                times.setdefault(work, {})[name] = took
    rows = []
    for work, of_work in times.items():
        best, now = min(of_work, key=of_work.__getitem__), of_work.get(names[0])
        gain = "" if now is None else f"{1 - of_work[best] / now:.0%}"
        cells = [f"{1e6 * of_work[each]:.2f}" if each in of_work else "failed" for each in names]
        rows.append([work, *cells, best, gain])
    return rows + [[work, *[""] * len(names), message, ""] for work, message in failed.items()]


def measure(path: Path, chosen: Sequence[Constant], end: float) -> None:
    """Time constants one by one, until `end`, and write what comes out."""
    for constant in chosen:
        if time.monotonic() > end:
            print(f"  no time left for {constant.name}", flush=True)
            continue
        values = [_words(constant, value) for value in constant.values]
        title = f"µs by {constant.name}: {next(iter(constant.works))} and others"
        write_table(path, title, ["work", *values, "best", "less than the first"], timed(constant))


def kernels_of_teams() -> list[tuple[str, str]]:
    """The kernels of all teams that are timed, by source and name."""
    found = []
    number = "(float|gemmlet::bfloat16),"
    kept = re.compile(rf"row_forward<\S+::softmax, {number}|row_loss<\S+, {number} true")
    for team in itertools.chain(*TEAMS.values()):
        with mock.patch.object(launches, "ROW_TEAMS", ((2**31 - 1, *team),)):
            for source, names in launches.expressions().items():
                found += [(source, name) for name in names if kept.search(name)]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no constant after this time")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    gpu, backend = Gpu(()), select.load("cuda")
    device: Any = backend._first  # type: ignore[attr-defined]
    images = load_mnist(options.data_dir, download=False).x_train
    compile_kernels(backend)
    compile_together(device.arch, kernels_of_teams())
    measure(options.tables, [*of_training(gpu, backend, images), *of_rows(gpu, device)], end)
    return 0


if __name__ == "__main__":
    sys.exit(main())
