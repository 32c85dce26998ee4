"""Compiled matmul, activation and loss kernels for small dense networks, and an MLP and a GAN built on them."""

from __future__ import annotations

import importlib
from typing import Any

from ._precision import get_float32_matmul_precision, set_float32_matmul_precision
from ._version import __version__
from .backends.select import get_num_threads, set_num_threads, show_config, use_backend

__all__ = [
    "__version__",
    "accelerate_numpy",
    "data",
    "get_float32_matmul_precision",
    "get_num_threads",
    "kernels",
    "metrics",
    "nn",
    "restore_numpy",
    "set_float32_matmul_precision",
    "set_num_threads",
    "show_config",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Submodules load on first use.
    if name in {"accelerate_numpy", "restore_numpy"}:
        return getattr(importlib.import_module(".integrations.numpy", __name__), name)
    if name in {"data", "kernels", "metrics", "nn"}:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
