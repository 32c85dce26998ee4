"""Whole programs in NumPy, ``benchmarks/programs``, which know nothing of gemmlet: plain, and with NumPy accelerated.

Both run in new processes by the same few lines, which begin to count when NumPy is imported, and accelerated.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gemmlet

from .case import Array, Case, Prepared, Settings
from .implementations import OURS

# In an installed package, and in a clone.
_FOLDERS = (Path(__file__).parent / "_programs", Path(__file__).parents[3] / "benchmarks" / "programs")

_RUN = """
import json, runpy, sys, time
import numpy
if sys.argv.pop(1) == "accelerated":
    import gemmlet
    gemmlet.accelerate_numpy()
del sys.argv[0]
start = time.perf_counter()
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps(time.perf_counter() - start))
"""


def run(path: Path, how: str) -> tuple[float, Array]:
    """Run a program "plain" or "accelerated"; its seconds, and the numbers in its last line, which are its result.

    RuntimeError, with the last line of what it said, if it fails.
    """
    threads = str(gemmlet.get_num_threads())
    names = ("GEMMLET_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, threads)
    command = [sys.executable, "-c", _RUN, how, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{path.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    *_, result, seconds = done.stdout.splitlines()
    numbers = re.findall(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)(?![\w.])", result)
    return float(json.loads(seconds)), np.array(numbers, dtype=np.float64)


def case(path: Path) -> Case:
    """Return the case of a program."""

    def prepared(how: str, _: Any) -> Prepared:
        return Prepared(lambda: run(path, how)[0], lambda: run(path, how)[1], own_clock=True)

    return Case(
        "programs",
        path.stem,
        lambda: None,
        {OURS: partial(prepared, "accelerated"), "numpy": partial(prepared, "plain")},
        functools.cache(lambda _: run(path, "plain")[1]),
        # Rounding errors of 1e-16 grow by the steps of a training: the results agree to 1e-13 between the kernels that
        # NumPy's BLAS has for different processors. A wrong kernel shows in the first digits.
        rtol=1e-9,
        atol=1e-9,
        unit="run",
        labels={"kernel": path.stem},
    )


def programs(settings: Settings) -> Iterator[Case]:
    """Networks, GANs and other programs in NumPy as beginners and teachers write them, plain and accelerated."""
    paths = sorted(path for folder in _FOLDERS for path in folder.glob("*.py"))
    for path in paths[:: 6 if settings.quick else 1]:
        yield case(path)
