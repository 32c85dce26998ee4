"""An epoch of the MNIST perceptron by graphs and by the cluster, one kernel for many steps: results, times, phases.

    timeout 120 python benchmarks/gpu_one_kernel.py

Each part runs in a process of its own that is killed after some seconds. On a machine with a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from gemmlet.backends import cuda_compile, cuda_training, select
from gemmlet.backends.numpy_backend import Feed, FusedLayer, FusedNetwork, MlpRun, NumpyBackend
from gemmlet.formulas.optimizers import OPTIMIZER_RULES, adam_scalars

SAMPLES, BATCH = 60_000, 64
# The sizes of clusters that training may choose among.
WAYS: dict[str, tuple[int, ...]] = {"graphs": (), "cluster 16": (16,)}


def layers_of(widths: tuple[int, ...], rule: str) -> list[FusedLayer]:
    rng = np.random.default_rng(0)
    made = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        weight = (rng.normal(size=(before, after)) / np.sqrt(before)).astype(np.float32)
        bias = np.zeros(after, np.float32)
        states = [tuple(np.zeros_like(a) for _ in OPTIMIZER_RULES[rule].state) for a in (weight, bias)]
        made.append(FusedLayer(weight, bias, "tanh" if i == 0 else None, 0.0, *states, None, None))
    return made


def numbers(rule: str, steps: int) -> np.ndarray:
    if rule == "adam":
        return np.array([adam_scalars(1 + s, 1e-3, 0.9, 0.999, 1e-8, 0.0, False) for s in range(steps)])
    return np.tile(np.array({"sgd": [0.1, 0.0], "momentum": [0.05, 0.0, 0.9, 0.0]}[rule]), (steps, 1))


def data() -> tuple[np.ndarray, np.ndarray]:
    """Images like MNIST's: four of five numbers are 0."""
    rng = np.random.default_rng(1)
    x = rng.integers(1, 256, (SAMPLES, 784), np.uint8) * (rng.random((SAMPLES, 784), np.float32) < 0.2)
    return x.astype(np.uint8), rng.integers(0, 10, SAMPLES)


@contextlib.contextmanager
def way(name: str) -> Any:
    cuda_training.CLUSTER_SIZES = WAYS[name]
    yield


def run_of(widths: tuple[int, ...], rule: str, feed: Any, y: Any, order: np.ndarray) -> MlpRun:
    steps = -(-len(order) // BATCH)
    network = FusedNetwork(layers_of(widths, rule), rule, numbers(rule, steps))
    return MlpRun(network, feed, y, "softmax_cross_entropy", 1.0, order, BATCH, 0.0)


def arrays(run: MlpRun) -> list[np.ndarray]:
    return [a for layer in run.network.layers for a in (layer.weight, layer.bias, *layer.weight_state)]


def results() -> None:
    device = select.load("cuda")._first
    x, y = data()
    order = np.random.default_rng(2).permutation(SAMPLES)[: 100 * BATCH + 17]
    for rule in ("sgd", "momentum", "adam"):
        exact = run_of((784, 128, 10), rule, Feed(x, None, None, False), y, order)
        # The reference: in float64, step by step.
        reference = reference_of(exact, x, y, order)
        for name in WAYS:
            with way(name):
                feed, targets = cuda_training.hold(device, Feed(x, None, None, False), y)
                first = run_of((784, 128, 10), rule, feed, targets, order)
                loss = cuda_training.train_mlp(device, first)
                again = run_of((784, 128, 10), rule, feed, targets, order)
                loss_again = cuda_training.train_mlp(device, again)
            same = loss == loss_again and all(
                a.tobytes() == b.tobytes() for a, b in zip(arrays(first), arrays(again), strict=True)
            )
            off = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(arrays(first), reference, strict=True)]
            print(f"{rule:9}{name:13} loss {loss[0] / len(order):.7f} right {loss[1]}  off by {max(off):.1e}  "
                  f"{'same bits again' if same else 'OTHER BITS AGAIN'}", flush=True)  # fmt: skip


def reference_of(run: MlpRun, x: np.ndarray, y: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """The steps in NumPy, in float64."""
    layers = [
        (layer.weight.astype(np.float64), layer.bias.astype(np.float64), *(np.zeros(a.shape) for _ in range(1)))
        for layer in run.network.layers
        for a in (layer.weight,)
    ]
    (w1, b1, _), (w2, b2, _) = layers
    rule = OPTIMIZER_RULES[run.network.rule]
    params = [w1, b1, w2, b2]
    states = [tuple(np.zeros_like(p) for _ in rule.state) for p in params]
    update = NumpyBackend().update
    for s, first in enumerate(range(0, len(order), BATCH)):
        rows = order[first : first + BATCH]
        given = x[rows] / 255.0
        h = np.tanh(given @ w1 + b1)
        z = h @ w2 + b2
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), y[rows]] -= 1
        dz = p / len(rows)
        dh = dz @ w2.T * (1 - h * h)
        grads = [given.T @ dh, dh.sum(0), h.T @ dz, dz.sum(0)]
        for param, grad, state in zip(params, grads, states, strict=True):
            update(rule, param, grad, state, tuple(run.network.scalars[s]))
    return [w1, b1, *states[0], w2, b2, *states[2]]


def times() -> None:
    device = select.load("cuda")._first
    print(device.name)
    x, y = data()
    order = np.random.default_rng(3).permutation(SAMPLES)
    for widths in ((784, 128, 10), (784, 64, 10)):
        for rule in ("sgd", "momentum", "adam"):
            for name in (*WAYS, "cluster 8"):
                if (name == "cluster 16") == (widths[1] == 64) and "cluster" in name:
                    continue
                WAYS["cluster 8"] = (8,)
                with way(name):
                    feed, targets = cuda_training.hold(device, Feed(x, None, None, False), y)
                    run = run_of(widths, rule, feed, targets, order)
                    took = []
                    for _ in range(7):
                        device.synchronize()
                        start = time.perf_counter()
                        cuda_training.train_mlp(device, run)
                        took.append(1e3 * (time.perf_counter() - start))
                    print(f"{widths[1]:4} hidden {rule:9}{name:13} {min(took):7.3f} ms an epoch at best, median "
                          f"{statistics.median(took[1:]):7.3f}", flush=True)  # fmt: skip
            if widths[1] == 64:
                break


# Where phases end: texts of cluster_training.cuh, each once in there, and what the phase before is.
PHASES = [
    ("    // Forward: each warp's part", "start"),
    ("    // What lay here is of no use", "forward products"),
    ("    // The sums of a warp's 8 rows", "two barriers"),
    ("    // What the units add to", "activation"),
    ("    // The loss of this block's rows;", "parts of outputs"),
    ("      const int j = lane % 16, first_rank", "wait for parts (warps with rows)"),
    ("    const int rows_of_warp", "loss (warps with rows)"),
    ("    // Back to the units.", "wait for gradients"),
    ("    float numbers[Rule::scalar_count];", "gradients of units, barrier"),
    ("    // The gradient of the first layer's weights: units", "small sums"),
    ("    // The warp needs this mini-batch no more.", "gradient products, update"),
]


def phases() -> None:
    sources = dict(cuda_compile.sources())
    text = sources["cuda/cluster_training.cuh"]
    steps, marks = 64, len(PHASES)
    for n, (anchor, _) in enumerate(PHASES):
        assert text.count(anchor) == 1, anchor
        place = f"((rank * 8 + warp) * {steps} + step) * {marks} + {n}"
        text = text.replace(
            anchor, f"    if (lane == 0 && step < {steps}) gemmlet_clocks[{place}] = clock64();\n{anchor}"
        )
    array = f'extern "C" {{ __device__ long long gemmlet_clocks[{16 * 8 * steps * marks}]; }}\n'
    text = text.replace("namespace gemmlet {", f"{array}namespace gemmlet {{", 1)
    sources["cuda/cluster_training.cuh"] = text
    cuda_compile.sources = lambda: sources  # type: ignore[assignment]
    device = select.load("cuda")._first
    cupy = cuda_compile.import_cupy()
    x, y = data()
    order = np.random.default_rng(3).permutation(SAMPLES)[: 200 * BATCH]
    for rule in ("sgd", "adam"):
        modules = len(device._modules)
        with way("cluster 16"):
            feed, targets = cuda_training.hold(device, Feed(x, None, None, False), y)
            cuda_training.train_mlp(device, run_of((784, 128, 10), rule, feed, targets, order))
        # Each module has its own; that of the kernel that trains is the one that was written to.
        for module in device._modules[modules:]:
            try:
                pointer = module.get_global_var("gemmlet_clocks")
            except Exception:
                continue
            memory = cupy.cuda.UnownedMemory(int(getattr(pointer, "ptr", pointer)), 16 * 8 * steps * marks * 8, device)
            clocks = cupy.ndarray((16, 8, steps, marks), np.int64, cupy.cuda.MemoryPointer(memory, 0)).get()
            if clocks.any():
                break
        clocks = clocks[:, :, 16:]
        whole = np.diff(clocks[:, :, :, 0], axis=2)
        print(f"{rule}: {np.median(whole):.0f} clocks a step; by phase the medians, of all warps (least to most)")
        for n in range(1, marks):
            some = clocks[:, :4] if "with rows" in PHASES[n][1] else clocks
            took = np.median(some[:, :, :, n] - some[:, :, :, n - 1], axis=2)
            of_first = took[0].astype(int)
            print(f"  {PHASES[n][1]:34}{np.median(took):7.0f}  ({took.min():.0f} to {took.max():.0f}); {of_first}")
        rest = np.median(clocks[:, :, 1:, 0] - clocks[:, :, :-1, -1], axis=2)
        print(f"  {'copies, start':34}{np.median(rest):7.0f}  ({rest.min():.0f} to {rest.max():.0f})", flush=True)


def compile_all() -> None:
    """Into the cache, all at once: the parts after it have little time."""
    device = select.load("cuda")._first
    names = {
        cuda_training.SOURCE: ["begin<256>", "top<float>"]
        + [f"first_forward<float, unsigned char, gemmlet::{tile}>" for tile in ("SmallTile<8>", "SmallTile<16>")]
        + [
            f"{kernel}<float, unsigned char, gemmlet::optimizers::{rule}>"
            for kernel in ("update", "train")
            for rule in OPTIMIZER_RULES
        ],
        cuda_training.CLUSTER_SOURCE: ["arrange_samples<256>", "close_steps<256>"]
        + [f"train_in_cluster<{n}, gemmlet::optimizers::{rule}>" for n in (8, 16) for rule in OPTIMIZER_RULES],
    }
    with ThreadPoolExecutor() as pool:
        wanted = [(source, name) for source, some in names.items() for name in some]
        list(pool.map(lambda w: cuda_compile.cubin(w[0], [f"gemmlet::{w[1]}"], device.arch), wanted))


def main() -> None:
    if len(sys.argv) > 1:
        signal.alarm(40)
        {"compile": compile_all, "results": results, "times": times, "phases": phases}[sys.argv[1]]()
        return
    for part in ("compile", "results", "times", "phases"):
        started = time.perf_counter()
        print(f"--- {part}", flush=True)
        try:
            subprocess.run([sys.executable, __file__, part], timeout=45, check=False)
        except subprocess.TimeoutExpired:
            print("was killed: it took too long", flush=True)
        print(f"({time.perf_counter() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
