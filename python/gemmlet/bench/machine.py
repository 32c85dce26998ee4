"""What the numbers were measured on: processor, caches, system and versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import gemmlet
from gemmlet._threads import processors
from gemmlet.backends import select

from .implementations import IMPLEMENTATIONS

# Where the name of a distribution is not that of its package.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "cv2": "opencv-python"}


def machine() -> dict[str, Any]:
    """Return facts about this machine."""
    return {
        "cpu": _cpu_model(),
        "processors": processors(),
        "caches": _caches(),
        "system": platform.platform(),
        "architecture": platform.machine(),
    }


def versions() -> dict[str, str]:
    """Return the versions of gemmlet, of what computes in it, and of the peers that are installed."""
    facts = select.current().describe()
    found = {
        "gemmlet": gemmlet.__version__,
        "backend": facts["backend"],
        "isa": facts["isa"],
        "compiler": facts.get("compiler", ""),
        "python": platform.python_version(),
    }
    packages = ["numpy", *(each.package for each in IMPLEMENTATIONS.values() if each.package and each.available())]
    for package in dict.fromkeys(packages):
        distribution = _DISTRIBUTIONS.get(package, package)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    found["blas"] = _blas()
    return {name: value for name, value in found.items() if value}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> list[str]:
    """Caches of the first processor, such as "L2 Unified 512K"; empty where the system does not tell."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found.append(f"L{level} {kind} {size}")
    return found


def _blas() -> str:
    """The BLAS of NumPy, and the kernels that it chose."""
    import threadpoolctl

    where = os.path.dirname(os.path.dirname(str(importlib.import_module("numpy").__file__)))
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas" and str(library["filepath"]).startswith(os.path.join(where, "numpy")):
            return f"{library['internal_api']} {library['version']} {library.get('architecture', '')}".strip()
    return ""
