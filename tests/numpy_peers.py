"""A plugin of pytest, for tests of others: they run while NumPy is accelerated, and what failed is written to a file.

``--wrong NAME`` breaks a function of NumPy: what a kernel of gemmlet computed for it is off by a thousandth.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmlet
from gemmlet.integrations import numpy as accelerated

_VECTORCALL = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_VECTORCALL_OFFSET = 56  # of tp_vectorcall_offset, in a type: CPython, 64 bits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerated", action="store_true", help="accelerate NumPy")
    parser.addoption("--wrong", default="", help="the entry that is to compute wrongly, as numpy.exp")
    parser.addoption("--outcome", type=Path, help="the file for what came out")


class Outcome:
    """What came out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        counts = accelerated.counts() if accelerated.replaced() else {}
        self.path.write_text(json.dumps({"passed": self.passed, "failed": self.failed, "counts": counts}))


def _break(name: str) -> Any:
    """Let a function of NumPy compute wrongly; what is returned must be kept."""
    function: Any = np
    for part in name.split(".")[1:]:
        function = getattr(function, part)
    offset = ctypes.c_ssize_t.from_address(id(type(function)) + _VECTORCALL_OFFSET).value
    entry = ctypes.c_void_p.from_address(id(function) + offset)
    accelerated_entry = _VECTORCALL(entry.value)

    def wrong(function: Any, arguments: int, count: int, names: int) -> Any:
        before = accelerated.counts()[name][0]
        try:
            result = accelerated_entry(function, arguments, count, names)
        except Exception as error:  # which cannot be passed on from here
            return error
        if accelerated.counts()[name][0] > before:
            result *= result.dtype.type(1.001)
        return result

    broken = _VECTORCALL(wrong)
    entry.value = ctypes.cast(broken, ctypes.c_void_p).value
    return broken


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcome(config.getoption("--outcome")))
    if config.getoption("--accelerated"):
        gemmlet.accelerate_numpy()
    if config.getoption("--wrong"):
        config.stash[pytest.StashKey[Any]()] = _break(config.getoption("--wrong"))
