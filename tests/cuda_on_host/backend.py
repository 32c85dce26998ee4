"""The CUDA backend for tests: on a GPU if there is one, else with its kernels compiled for the CPU."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemmlet.backends import select

if TYPE_CHECKING:
    from gemmlet.backends.cuda.backend import CudaBackend


def load() -> CudaBackend:
    """Return it; it is also where arrays on a GPU look for their backend."""
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError("CuPy is not installed")
    # Which imports CuPy, without its warning that no CUDA is found.
    from cuda_on_host.device import HostDevice
    from gemmlet.backends.cuda.backend import CudaBackend

    try:
        return select.load("cuda")
    except RuntimeError:
        return select._loaded.setdefault("cuda", CudaBackend([HostDevice()]))


def skip_long(backend: Any) -> None:
    """Skip a test that would take long where there is no GPU, unless the environment asks for the backend by name."""
    if hasattr(getattr(backend, "_first", None), "view") and not os.environ.get("GEMMLET_TEST_BACKENDS"):
        pytest.skip("it takes long without a GPU: GEMMLET_TEST_BACKENDS=cuda asks for it")


def to_gpu(array: Any, device: Any = None) -> Any:
    """A `cupy.ndarray` with the values and the strides of a NumPy array."""
    import cupy

    device = device or load()._first
    if hasattr(device, "array"):  # the stand-in
        return device.array(array)
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)] if array.size else []
    before = -sum(r for r in reach if r < 0)
    after = sum(r for r in reach if r > 0) + array.itemsize
    memory = cupy.cuda.alloc(before + after)
    copy = cupy.ndarray(array.shape, array.dtype, memptr=memory + before, strides=array.strides)
    copy[...] = cupy.asarray(np.ascontiguousarray(array))
    return copy


def to_cpu(array: Any, device: Any = None) -> Any:
    """A NumPy array with the values of a `cupy.ndarray`."""
    device = device or load()._first
    return np.array(device.view(array)) if hasattr(device, "view") else array.get()
