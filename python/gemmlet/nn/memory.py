"""Memory for parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# A cache line, and the widest vector: no load of a whole vector crosses a line then.
_ALIGNMENT = 64


def aligned_zeros(like: Array) -> Array:
    """Return zeros of the shape and dtype of `like`, C-contiguous, aligned to a cache line."""
    memory = np.zeros(like.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


def aligned_copy(array: Array) -> Array:
    """Return a copy, C-contiguous, aligned to a cache line."""
    copy = aligned_zeros(array)
    copy[...] = array
    return copy
