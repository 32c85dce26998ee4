"""Try all 2**32 float32 values: the largest error of each activation and of its gradient, in ULP.

    python tools/sweep_float32.py                      # exp, tanh and sigmoid, on every backend here
    python tools/sweep_float32.py --names silu elu     # others
    python tools/sweep_float32.py --step 1009          # a sample: one in 1,009

The gradient is taken for ``grad_y = 1``, as a function of the array that it reads. The reference is the registry's
expression in float64. The exit status is 1 if an error is above the registry's bound. A full sweep takes some
minutes for each name, direction and backend.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gemmlet
from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.backends.cpu import CpuBackend, available_isas
from gemmlet.formulas.activations import ACTIVATIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import reference_backward, reference_forward, ulp_error

CHUNK = 2**20


def backends(prefix: str) -> dict[str, Any]:
    """The backends of this machine whose name begins with `prefix`; the reference needs no sweep."""
    found: dict[str, Any] = {f"cpu-{isa}": CpuBackend(isa) for isa in available_isas()}
    try:
        found["numba"] = select.load("numba")
    except RuntimeError as error:
        print(error)
    return {name: backend for name, backend in found.items() if name.startswith(prefix)}


def chunks(step: int) -> Iterator[Any]:
    """Every `step`-th bit pattern that is a number."""
    for first in range(0, 2**32, CHUNK * step):
        bits = np.arange(first, min(first + CHUNK * step, 2**32), step, dtype=np.uint64).astype(np.uint32)
        x = bits.view(np.float32)
        x = x[~np.isnan(x)]
        if x.size:
            yield x


def sweep(name: str, backward: bool, chosen: dict[str, Any], step: int) -> bool:
    """Print the largest error on each backend; whether all keep the bound."""
    entry = ACTIVATIONS[name]
    accuracy = entry.backward_accuracy if backward else entry.forward_accuracy
    worst = {key: (0.0, np.float32(0)) for key in chosen}
    start = time.perf_counter()
    for x in chunks(step):
        if backward and not entry.needs_x:
            # Only values that the forward function can give.
            low, high = entry.forward(np.array([-np.inf, np.inf]), entry.default)
            x = x[(x >= low) & (x <= high)]
            if not x.size:
                continue
        ones = np.ones_like(x)
        exact = reference_backward(entry, ones, x) if backward else reference_forward(entry, x)
        for key, backend in chosen.items():
            with gemmlet.use_backend(backend):
                y = getattr(kernels, f"{name}_backward")(ones, x, x) if backward else getattr(kernels, name)(x)
            error = ulp_error(y, exact, floor=accuracy.floor)
            at = int(np.argmax(error))
            if error[at] > worst[key][0]:
                worst[key] = float(error[at]), x[at]
    for key, (error, where) in worst.items():
        verdict = "ok" if error <= accuracy.float32 else "TOO LARGE"
        label = name + ("_backward" if backward else "")
        print(f"{label:<18} {key:<14} {error:7.4f} ULP at {where!s:<15} bound {accuracy.float32:g}  {verdict}")
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return all(error <= accuracy.float32 for error, _ in worst.values())


def main() -> None:
    """Read the command line and sweep."""
    parser = argparse.ArgumentParser(description="Largest errors over all float32 values.")
    parser.add_argument("--names", nargs="+", default=["exp", "tanh", "sigmoid"], choices=list(ACTIVATIONS))
    parser.add_argument("--step", type=int, default=1, help="try one in STEP (default: all)")
    parser.add_argument("--backend", default="", help="a prefix: cpu-x86-64-v3, numba (default: all)")
    arguments = parser.parse_args()
    chosen = backends(arguments.backend)
    results = [sweep(name, backward, chosen, arguments.step) for name in arguments.names for backward in (False, True)]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
