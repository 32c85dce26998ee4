"""Instructions instead of seconds: a few cases under callgrind, whose counts are the same on a busy machine.

One thread, and an instruction set that every x86-64 machine of the last ten years has. What is counted is a whole call,
Python's part included, between two calls of `gemmlet_mark`, a function of the extension for this purpose. Results are
not checked here: `timing` does that, and the tests.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gemmlet
from gemmlet.backends import cpu as cpu_backend
from gemmlet.backends import select

from . import machine, training
from .case import Call, Case, Settings
from .cases import GROUPS
from .implementations import OURS
from .results import INSTRUCTIONS, Results, Row
from .timing import Timed

ISAS = ("x86-64-v3", "baseline")
SETTINGS = Settings(quick=True)
# One of each kind of code. Words that name one case each of the quick suite.
CASES = (
    ("matmul", "x@w 64x784x128 float32"),
    ("matmul", "x.T@g 784x64x128 float32"),
    ("matmul", "g@w.T 64x10x128 float32"),
    ("matmul", "x@w 1x784x128 float32"),
    ("matmul", "x@w 64x784x128 float64"),
    ("linear", "tanh 64x128x128 float32"),
    ("activations", "tanh 16,384 float32"),
    ("activations", "tanh 16,384 float64"),
    ("activations", "sigmoid 16,384 float32"),
    ("activations", "gelu 16,384 float32"),
    ("activations", "tanh_backward 16,384 float32"),
    ("losses", "softmax_cross_entropy 64x10 float32"),
    ("losses", "softmax_cross_entropy 1024x10 float64"),
    ("losses", "binary_cross_entropy_with_logits 16,384 float32"),
    ("optimizers", "adam 100,000 float32"),
    ("optimizers", "sgd 100,000 float32"),
    ("overhead", "tanh 10"),
    ("overhead", "matmul 4x4x4"),
    ("overhead", "linear tanh 1x16x4"),
    ("overhead", "sgd_update 10"),
)
# Trainings, smaller than those of the suite: valgrind takes a thousand times as long for a fused multiply-add.
# An epoch of two mini-batches is two calls, however slow the machine is.
TRAININGS = (
    training.digits_case(SETTINGS, (784, 32, 10), 128, 64, "float32", (OURS,)),
    training.digits_case(SETTINGS, (784, 32, 10), 32, 1, "float64", (OURS,)),
    training.gan_case(SETTINGS, 8),
)
# Calls before the one that counts. The first allocates, and fills what is cached. Python adapts its bytecode during
# some more, which counts where much of a call is Python.
WARM_UPS = {"overhead": 30, "epoch": 10, "gan": 10}


class CannotCountError(Exception):
    """Instructions cannot be counted here; the message says why."""


def cases() -> list[Case]:
    """Return the cases that are counted."""
    found = {(case.group, case.name): case for group in dict(CASES) for case in GROUPS[group](SETTINGS)}
    return [*(found[chosen] for chosen in CASES), *TRAININGS]


def isa() -> str:
    """Return the instruction set that is counted."""
    available = cpu_backend.available_isas()
    for name in ISAS:
        if name in available:
            return name
    raise CannotCountError(
        f"it needs an extension module for {' or '.join(ISAS)}: pip install . -C cmake.define.GEMMLET_ISAS=all"
    )


def run() -> Results:
    """Count the instructions of the cases; `CannotCountError` if there is no valgrind, or it fails."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CannotCountError("it needs valgrind, as in apt install valgrind")
    chosen = isa()
    with gemmlet.use_backend(cpu_backend.CpuBackend(chosen)):
        versions = machine.versions()
    with tempfile.TemporaryDirectory() as folder:
        counts = _count(valgrind, chosen, Path(folder))
    rows = [
        Row(case.group, case.name, case.unit, {OURS: Timed((count / case.units,))}, case.labels)
        for case, count in zip(cases(), counts, strict=True)
    ]
    return Results(INSTRUCTIONS, rows, machine.machine(), versions, {"threads": 1, "isa": chosen})


def _count(valgrind: str, isa: str, folder: Path) -> list[int]:
    command = [valgrind, "--tool=callgrind", "--dump-before=gemmlet_mark", f"--callgrind-out-file={folder}/counts"]
    environment = os.environ | {
        "GEMMLET_BACKEND": "cpu",
        "GEMMLET_ISA": isa,
        # Threads would make the counts depend on who waits how long.
        "GEMMLET_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        # glibc copies by one instruction that valgrind counts for every byte, on processors where that is fast.
        "GLIBC_TUNABLES": "glibc.cpu.x86_rep_movsb_threshold=0x10000000:glibc.cpu.x86_rep_stosb_threshold=0x10000000",
    }
    environment.pop("GEMMLET_DATA_DIR", None)  # the sample is the same everywhere
    done = subprocess.run([*command, sys.executable, "-m", __name__], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise CannotCountError(f"valgrind ends with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    # The part before each mark is a file. Marks come in pairs, around nothing first, then around each case.
    parts = sorted(folder.glob("counts.*"), key=lambda path: int(path.suffix[1:]))
    expected = 2 * (len(cases()) + 1)
    if len(parts) != expected:
        raise CannotCountError(f"valgrind left {len(parts)} parts, expected {expected}")
    totals = [_total(part) for part in parts[1::2]]
    return [total - totals[0] for total in totals[1:]]


def _total(part: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", part.read_text(), re.MULTILINE)
    if found is None:
        raise CannotCountError(f"{part.name} of valgrind has no total")
    return int(found[1])


def _run_marked() -> None:
    """What runs under valgrind."""
    backend = select.current()
    assert isinstance(backend, cpu_backend.CpuBackend)
    mark = backend._module.mark

    def marked(call: Call, warm_ups: int = 1) -> None:
        for _ in range(warm_ups):
            call()
        gc.collect()
        gc.disable()
        mark()
        call()
        mark()
        gc.enable()

    marked(lambda: None)
    for case in cases():
        marked(case.prepare(OURS, case.inputs()).call, WARM_UPS.get(case.group, 1))


if __name__ == "__main__":
    _run_marked()
