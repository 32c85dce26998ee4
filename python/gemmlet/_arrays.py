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
    """Where it is, in words: the CPU, or one of the GPUs."""
    return f"GPU {array.data.device_id}" if is_on_gpu(array) else "the CPU"


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Its name, which NumPy puts together anew each time, in a microsecond."""
    return dtype.name


def addresses(array: Any) -> Array:
    """A NumPy array at the same addresses, to ask NumPy what overlaps; on a GPU it must not be read."""
    return np.asarray(_Addresses(array)) if is_on_gpu(array) else array


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
