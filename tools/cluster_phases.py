"""Clock cycles of each phase of a step of fused training by a cluster (csrc/cuda/training/cluster.cuh).

    python tools/cluster_phases.py        # on a machine with a Hopper GPU

The kernel is compiled with a reading of the clock before each phase, by each warp of each block; what is printed are
medians over the steps, and over all warps, of cycles from one reading to the next.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

import gemmlet
from gemmlet import nn
from gemmlet.backends.cuda import compiler
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.backends.cuda.device import CudaDevice
from gemmlet.backends.cuda.training import ARCHITECTURES, CLUSTER_SOURCE

STEPS, BATCH, RANKS, WARPS = 64, 64, 16, 8
# How a phase begins in the source, and what comes before it.
PHASES = [
    ("    // Forward: each warp's part", "start"),
    ("    // What lay here is of no use", "forward matmul"),
    ("    // The sums of a warp's 8 rows", "two barriers"),
    ("    // What the units add to", "activation"),
    ("    // The loss of this block's rows;", "parts of outputs"),
    ("    // Back to the units.", "loss, other blocks' gradients"),
    ("    float hyperparameters[Rule::hyperparameter_count];", "gradients of units, barrier"),
    ("    // The gradient of the first layer's weights: units", "small sums"),
    ("    // The warp needs this mini-batch no more.", "gradient matmuls, update"),
]
FILE = "cuda/training/cluster.cuh"


def with_clocks(sources: dict[str, str]) -> dict[str, str]:
    """Return the sources with the readings.

    Raises
    ------
    ValueError
        The kernel has no such phases any more.
    """
    text = sources[FILE]
    for n, (begin, name) in enumerate(PHASES):
        if text.count(begin) != 1:
            raise ValueError(f"{FILE} has no single place where {name!r} ends: {begin!r}")
        place = f"((rank * {WARPS} + warp) * {STEPS} + step) * {len(PHASES)} + {n}"
        text = text.replace(
            begin, f"    if (lane == 0 && step < {STEPS}) gemmlet_clocks[{place}] = clock64();\n{begin}"
        )
    array = f'extern "C" {{ __device__ long long gemmlet_clocks[{RANKS * WARPS * STEPS * len(PHASES)}]; }}\n'
    return {**sources, FILE: text.replace("namespace gemmlet {", f"{array}namespace gemmlet {{", 1)}


def clocks_of(device: Any, cupy: Any, modules: int) -> np.ndarray:
    """Return the readings, (ranks, warps, steps, phases), of what has been loaded after `modules` modules."""
    shape = RANKS, WARPS, STEPS, len(PHASES)
    for module in device._modules[modules:]:
        try:
            pointer = module.get_global_var("gemmlet_clocks")
        except Exception:  # another source's
            continue
        memory = cupy.cuda.UnownedMemory(int(getattr(pointer, "ptr", pointer)), 8 * int(np.prod(shape)), device)
        clocks: np.ndarray = cupy.ndarray(shape, np.int64, cupy.cuda.MemoryPointer(memory, 0)).get()
        # Each module of the source has the array; the one that trains has written to it.
        if clocks.any():
            return clocks
    raise RuntimeError("no kernel of the cluster ran: is it a Hopper GPU?")


def rows() -> Iterator[list[str]]:
    """Yield optimizer, phase, median cycles, and the least and the most of all warps."""
    sources = with_clocks(dict(compiler.sources()))
    cupy = compiler.import_cupy()
    rng = np.random.default_rng(0)
    x = (rng.integers(1, 256, (2 * STEPS * BATCH, 784)) * (rng.random((2 * STEPS * BATCH, 784)) < 0.2)).astype(np.uint8)
    labels = rng.integers(0, 10, len(x))
    # A device of its own, which has no kernel of other sources.
    device: Any = CudaDevice()
    backend = CudaBackend([device])
    for name, rule in (("sgd", nn.SGD(0.1)), ("adam", nn.Adam())):
        modules = len(device._modules)
        with gemmlet.use_backend(backend), mock.patch.object(compiler, "sources", return_value=sources):
            # The last epoch is one call.
            nn.MLP([784, 128, 10], "tanh", seed=0).fit(x, labels, epochs=4, batch_size=BATCH, optimizer=rule)
        clocks = clocks_of(device, cupy, modules)[:, :, STEPS // 4 :]  # once everything is warm
        whole = np.median(np.diff(clocks[..., 0], axis=2))
        yield [name, "a step", f"{whole:.0f}", "", ""]
        spans = [clocks[..., n] - clocks[..., n - 1] for n in range(1, len(PHASES))]
        spans.append(clocks[:, :, 1:, 0] - clocks[:, :, :-1, -1])
        for span, phase in zip(spans, [*(of for _, of in PHASES[1:]), "copies, start"], strict=True):
            took = np.median(span, axis=2)
            yield [name, phase, f"{np.median(took):.0f}", f"{took.min():.0f}", f"{took.max():.0f}"]


def main() -> None:
    """Print the table of both optimizers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        device = CudaDevice()
    except RuntimeError as error:
        parser.exit(2, f"no GPU: {error}\n")
    if device.arch not in ARCHITECTURES[CLUSTER_SOURCE]:
        parser.exit(2, f"no cluster trains on {device.name}\n")
    for row in rows():
        print("{:6}{:32}{:>7}{:>7}{:>7}".format(*row), flush=True)


if __name__ == "__main__":
    main()
