"""Memory for arrays that compiled loops go through again and again, and memory that must not go meanwhile."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _cgroup

Array = NDArray[Any]

# A cache line, and the widest vector: no load of a whole vector crosses a line then.
_ALIGNMENT = 64


def available() -> float:
    """Return the bytes that may still be allocated without swapping, or are granted at all; infinity if not known."""
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        free = 1024.0 * int(facts["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        free = math.inf
    return min(free, _cgroup.memory())


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return zeros, C-contiguous, aligned to a cache line."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def held(*arrays: Any) -> list[weakref.ref[Array]]:
    """Return references to what owns the memory of arrays: while they live, NumPy does not resize it.

    ``ndarray.resize(refcheck=False)``, by a callback say, would free memory that a view still points to. What is no
    array of NumPy is passed over.
    """
    owners = []
    for array in arrays:
        if isinstance(array, np.ndarray):
            while isinstance(array.base, np.ndarray):
                array = array.base
            owners.append(weakref.ref(array))
    return owners


def aligned_copy(array: Array) -> Array:
    """Return a copy, C-contiguous, aligned to a cache line."""
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy
