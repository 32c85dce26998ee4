"""What accelerated NumPy costs where it gains nothing: the installation, and calls that are handed on to NumPy.

    python benchmarks/numpy_overhead.py

The installation is timed in new processes, after `import numpy` and after `import gemmlet`, of modules that are
compiled to bytecode, as installed ones are. A call is timed plain and accelerated in turns, in one process; what is
printed are the least times of both, in nanoseconds.
"""

from __future__ import annotations

import operator
import os
import statistics
import subprocess
import sys
import tempfile
import timeit

import numpy as np

import gemmlet
from gemmlet.integrations import numpy as integration

PROCESSES, ROUNDS, CALLS = 11, 25, 2000

INSTALL = """
import time, numpy
begin = time.perf_counter()
import gemmlet
imported = time.perf_counter()
gemmlet.accelerate_numpy()
print(imported - begin, time.perf_counter() - imported)
"""

# A call of each replaced function that is none of its usual ones: of int64, or complex where there is no loop for it.
OPERATORS = {
    "+": "i + i", "-": "i - i", "*": "i * i", "/": "c / c", "**": "i ** 3", "@": "i @ i", "-x": "-i",
    "+=": "iadd(j, i)", "-=": "isub(j, i)", "*=": "imul(j, i)", "/=": "itruediv(c, c)",
    "<": "i < i", "x[2]": "i[2]", "x[2:4]": "i[2:4]", "x[2] = 1": "j[2] = 1",
    "x[2:4] = 1": "j[2:4] = 1",
}  # fmt: skip
ARGUMENTS = {
    "where": "(m, i, i)", "clip": "(i, 1, 5)", "power": "(i, 3)", "zeros_like": "(i)", "ones_like": "(i)",
    "linalg.norm": "(c)",
    **dict.fromkeys(("exp", "log", "tanh", "sqrt"), "(c)"),
    **dict.fromkeys(("sign", "square", "absolute", "negative", "sum", "mean", "max", "min", "argmax", "argmin"), "(i)"),
}  # fmt: skip


def calls() -> dict[str, str]:
    """Return an expression for each function that is replaced."""
    found = dict(OPERATORS)
    for name in integration.replaced():
        path = name.partition(".")[2]
        if name.startswith("numpy."):
            found[name] = f"np.{path}{ARGUMENTS.get(path, '(c, c)')}"
        elif "__" not in name and " " not in name:
            found[name] = f"i.{path}({'i' if path == 'dot' else ''})"
    return found


def installation() -> tuple[float, float]:
    """Return the seconds of `import gemmlet` and of `accelerate_numpy`, medians over new processes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-X", f"pycache_prefix={folder}", "-c", INSTALL]
        runs = [
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
            for _ in range(1 + PROCESSES)  # the first one compiles
        ]
    imported, installed = (statistics.median(float(run[index]) for run in runs[1:]) for index in range(2))
    return imported, installed


def main() -> None:
    imported, installed = installation()
    print(f"import gemmlet {imported * 1e3:.1f} ms, accelerate_numpy {installed * 1e3:.1f} ms")
    with gemmlet.accelerate_numpy():
        expressions = calls()
    names = {"np": np, "i": np.arange(8), "j": np.arange(8), "c": np.ones(8, complex)}
    names |= {"m": names["i"] > 3, **{name: getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv")}}
    timers = {name: timeit.Timer(expression, globals=names) for name, expression in expressions.items()}
    least = {name: [float("inf")] * 2 for name in timers}
    for _ in range(ROUNDS):
        for accelerated in (False, True):
            if accelerated:
                gemmlet.accelerate_numpy()
            for name, timer in timers.items():
                least[name][accelerated] = min(least[name][accelerated], timer.timeit(CALLS) / CALLS * 1e9)
            gemmlet.restore_numpy()
    print(f"{'handed on':24}{'plain':>8}{'accelerated':>14}{'difference':>12}  ns")
    for name, (plain, accelerated) in least.items():
        print(f"{name:24}{plain:8.0f}{accelerated:14.0f}{accelerated - plain:+12.0f}")
    differences = [accelerated - plain for plain, accelerated in least.values()]
    print(f"median {statistics.median(differences):+.0f}, most {max(differences):+.0f} ns")


if __name__ == "__main__":
    main()
