"""The soak command: each of its parts finds nothing in a second, and a fault is said."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent / "tools" / "soak.py"


def run(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SOAK, *words], capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_each_part_finds_nothing() -> None:
    pytest.importorskip("numba")
    code, output = run("--minutes", "0.1", "--seed", "5")
    assert code == 0, output
    assert output.count(" ok ") >= 7
    assert "0 faults in " in output


def test_a_fault_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    assert soak.run_child("files", 0.1, 1)[1] == ""
    monkeypatch.setattr(soak, "PATIENCE", -0.9)  # as if it hung
    counts, fault = soak.run_child("files", 1.0, 1)
    assert counts == {}
    assert "FAULT: files hangs; again: python tools/soak.py --part files --seconds 1 --seed 1" in fault
    code, output = run("--only", "nothing")
    assert code == 2
    assert "--only takes some of kernels, threads" in output
