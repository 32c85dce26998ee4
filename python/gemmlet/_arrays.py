"""What the attributes of an array tell, NumPy's or CuPy's on a GPU: nothing is moved or computed here.

NumPy's are the usual case, and told apart by their type alone; CuPy is not imported until an array on a GPU comes.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def is_on_gpu(array: Any) -> bool:
    """Whether it is one of CuPy's."""
    if type(array) is np.ndarray:
        return False
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def place(array: Any) -> str:
    """Where it is, for messages."""
    return f"GPU {array.data.device_id}" if is_on_gpu(array) else "the CPU"


def in_one_place(array: Any, other: Any) -> bool:
    """Whether both are on the CPU, or on one GPU."""
    if not is_on_gpu(array):
        return not is_on_gpu(other)
    return is_on_gpu(other) and array.data.device_id == other.data.device_id


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Its name, which NumPy puts together anew each time, in a microsecond."""
    return dtype.name


def addresses(array: Any) -> Array:
    """A NumPy array at the same addresses, to ask NumPy what overlaps; on a GPU it must not be read."""
    return np.asarray(_Addresses(array)) if is_on_gpu(array) else array


def bounds(array: Any) -> tuple[int, int]:
    """The addresses of an array's first byte on a GPU, and of the one behind its last."""
    first = array.data.ptr
    if array.flags.c_contiguous:
        return first, first + array.nbytes
    reach = [(length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True)]
    return first + sum(r for r in reach if r < 0), first + sum(r for r in reach if r > 0) + array.itemsize


class _Addresses:
    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": f"|V{array.itemsize}",
            "strides": array.strides,
            "data": (array.data.ptr, False),
        }


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What numbers of a floating-point dtype are computed in: float32 for 16 bits."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
