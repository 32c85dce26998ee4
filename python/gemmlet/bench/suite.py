"""A run of the suite: the chosen cases, each checked and timed, and everything a reader needs to judge the numbers."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _environment
from . import machine, roofline, timing, training
from .case import Case, Settings
from .cases import GROUPS
from .implementations import IMPLEMENTATIONS, missing_packages, same_threads
from .results import TIME, Results, Row

# They change which kernels NumPy's BLAS takes, or how it blocks them: a peer is measured as its users have it.
BLAS_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

# NumPy's module that lists the instruction sets which it dispatches to; its name since NumPy 2, and before.
_CORE: Any = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]

# What holds each peer to the instruction set that GEMMLET_ISA names, as on a processor that has no better one.
PEERS_ISA = {
    "x86-64-v3": {
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": " ".join(
            name for name in _CORE.__cpu_dispatch__ if name.startswith(("AVX512", "X86_V4"))
        ),
        "NUMBA_CPU_NAME": "haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    }
}


def peers_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return the environment in which peers are as they are to be measured; None if it is this one."""
    wanted = {name: value for name, value in environment.items() if name not in BLAS_VARIABLES}
    wanted |= PEERS_ISA.get(environment.get("GEMMLET_ISA", ""), {})
    return None if wanted == environment else wanted


@dataclass(frozen=True)
class Choice:
    """What to run; groups and implementations that are empty are all."""

    groups: Sequence[str] = ()
    words: str = ""  # only cases whose key has all of them, in any case of letters
    implementations: Sequence[str] = ()


def chosen_cases(settings: Settings, choice: Choice) -> list[Case]:
    """Return the cases that are chosen, in the order of the groups."""
    found = [case for name in choice.groups or GROUPS for case in GROUPS[name](settings)]
    words = choice.words.lower().split()
    return [case for case in found if all(word in case.key.lower() for word in words)]


def chosen_implementations(case: Case, settings: Settings, choice: Choice) -> list[str]:
    """Return the implementations of a case that are chosen and can be run here."""
    return [
        name
        for name in case.implementations
        if IMPLEMENTATIONS[name].available()
        and not (settings.quick and IMPLEMENTATIONS[name].compiles and name not in choice.implementations)
        and (not choice.implementations or name in choice.implementations)
    ]


def run(
    settings: Settings,
    choice: Choice,
    plan: timing.Plan,
    threads: int,
    progress: Callable[[str, int, int], None] = lambda key, number, count: None,
) -> Results:
    """Check and time the chosen cases, each implementation with `threads`.

    `progress` is told the key of each case before it runs, its number from 0 and how many there are.
    """
    cases = chosen_cases(settings, choice)
    names = {case.key: chosen_implementations(case, settings, choice) for case in cases}
    used = {name for implementations in names.values() for name in implementations}
    notes = []
    if held := PEERS_ISA.get(_environment.read("GEMMLET_ISA")):
        notes.append(f"GEMMLET_ISA holds the peers to the instruction set, too: {', '.join(held)}")
    if missing := missing_packages():
        notes.append(f"Left out, as they are not installed: {', '.join(missing)} (pip install 'gemmlet[bench]')")
    if settings.quick:
        left_out = [
            each.name for each in IMPLEMENTATIONS.values() if each.compiles and each.name not in choice.implementations
        ]
        notes.append(f"--quick: fewer shapes and rounds, and without {' and '.join(left_out)}")
    if any(case.group in ("epoch", "gan", "sklearn") or case.labels.get("data") == "MNIST" for case in cases):
        notes.append(f"Images: {training.data_source(settings)}")
    rows = []
    with same_threads(threads, used) as complaints:
        notes += complaints
        top = roofline.measure(threads)
        for number, case in enumerate(cases):
            progress(case.key, number, len(cases))
            timed = timing.run(case, names[case.key], plan, seed=number)
            work = case.flops, case.bytes, top.seconds(case)
            labels = {**case.labels, "threads": threads}
            rows.append(Row(case.group, case.name, case.unit, timed, labels, *work))
        facts = machine.versions()
    ran_with = {
        "threads": threads,
        "quick": settings.quick,
        "seconds_per_case": plan.seconds,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": list(os.getloadavg()),
    }
    return Results(TIME, rows, machine.machine(), facts, ran_with, notes, top.as_json())
