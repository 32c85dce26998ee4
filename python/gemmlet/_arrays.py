"""Arrays wherever they are: what kernels.py asks of NumPy's, and of CuPy's on a GPU.

NumPy's are the usual case, and told apart by their type alone; CuPy is not imported until an array on a GPU comes.
CuPy computes nothing here: what moves on a GPU is moved by the CUDA backend's own kernels.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .backends import select

if TYPE_CHECKING:
    from .backends.cuda.backend import CudaBackend

Array = NDArray[Any]

_CUDA_DEVICES = (2, 13)  # DLPack's numbers: memory of a GPU, and managed memory


def is_on_gpu(array: Any) -> bool:
    """Whether it is one of CuPy's."""
    if type(array) is np.ndarray:
        return False
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def from_gpu_object(value: Any, name: str) -> Any:
    """`value` as a CuPy array on the same memory, for DLPack and ``__cuda_array_interface__``; None if on no GPU."""
    if is_on_gpu(value):
        return value
    device = getattr(value, "__dlpack_device__", None)
    by_dlpack = device is not None and device()[0] in _CUDA_DEVICES
    if not by_dlpack and not _has_cuda_interface(value):
        return None
    from .backends.cuda import compiler

    try:
        cupy = compiler.import_cupy()
        return cupy.from_dlpack(value) if by_dlpack else cupy.asarray(value)
    except Exception as error:  # whatever a foreign library raises
        message = f"{name} ({type(value).__name__}), an array on a GPU, cannot be read: {error}"
        raise TypeError(message) from error


def _has_cuda_interface(value: Any) -> bool:
    try:
        return hasattr(value, "__cuda_array_interface__")
    except RuntimeError:  # PyTorch's, of a tensor that requires a gradient
        return True


def place(array: Any) -> str:
    """Where it is, for messages."""
    return f"GPU {array.data.device_id}" if is_on_gpu(array) else "the CPU"


def in_one_place(array: Any, other: Any) -> bool:
    """Whether both are on the CPU, or on one GPU."""
    if not is_on_gpu(array):
        return not is_on_gpu(other)
    return is_on_gpu(other) and array.data.device_id == other.data.device_id


def _gpu() -> CudaBackend:
    """The CUDA backend."""
    return cast("CudaBackend", select.load("cuda"))


@functools.cache
def name_of(dtype: np.dtype[Any]) -> str:
    """Its name, which NumPy puts together anew each time, in a microsecond."""
    return dtype.name


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], beside: Any) -> Array:
    """Return a new C-contiguous array in the same place as `beside`."""
    return _gpu().empty(shape, dtype, beside) if is_on_gpu(beside) else np.empty(shape, dtype)


def empty_like(array: Any, order: str = "K") -> Array:
    """Return a new array of the same shape, dtype and place; in the same layout too, if there is one without gaps."""
    if not is_on_gpu(array):
        return np.empty_like(array, order=cast(Any, order))
    if order == "K" and array.flags.f_contiguous and not array.flags.c_contiguous:
        return empty(array.shape[::-1], array.dtype, array).T
    return _gpu().empty(array.shape, array.dtype, array)  # type: ignore[no-any-return]


def to_cpu(array: Any) -> Array:
    """Return the array if it is NumPy's, else a copy that is."""
    return _gpu().to_cpu(contiguous(array)) if is_on_gpu(array) else array


def contiguous(array: Any) -> Array:
    """Return the array if it is C-contiguous, else a copy that is."""
    if not is_on_gpu(array):
        return np.ascontiguousarray(array)
    return array if array.flags.c_contiguous else copy(array)


def copy(array: Any) -> Array:
    """Return a C-contiguous copy."""
    if not is_on_gpu(array):
        return np.array(array, order="C")
    result = empty(array.shape, array.dtype, array)
    assign(result, array)
    return result


def assign(target: Any, source: Any) -> None:
    """``target[...] = source``, of one shape and dtype; what is on a GPU may be assigned to an array on the CPU."""
    if is_on_gpu(target):
        _gpu().assign(target, source)
    else:
        target[...] = to_cpu(source)


def beside(array: Any, other: Any) -> Array:
    """Return the array, or a copy of it on the GPU where `other` is."""
    return _gpu().bring(array, other) if is_on_gpu(other) else array  # type: ignore[no-any-return]


def scaled(array: Any, dtype: np.dtype[Any], scale: float = 1.0, shift: float = 0.0) -> Array:
    """Return ``scale * array + shift``: numbers of `dtype`, or bytes, which count as value/255; C-contiguous."""
    if is_on_gpu(array):
        return _gpu().scaled(contiguous(array), dtype, scale, shift)  # type: ignore[no-any-return]
    numbers: Array = array.astype(dtype, order="C")
    if array.dtype == np.uint8:
        numbers /= 255.0
    if (scale, shift) != (1.0, 0.0):
        numbers *= scale
        numbers += shift
    return numbers


def value_range(array: Any) -> tuple[float, float]:
    """The smallest and the largest of at least one element, NaN passed over."""
    return _gpu().value_range(array) if is_on_gpu(array) else (np.fmin.reduce(array, None), np.fmax.reduce(array, None))


def extremes(array: Any) -> tuple[float, float]:
    """The smallest and the largest of at least one number of an array (n, ...); NaN where there is one."""
    if not is_on_gpu(array):
        return float(array.min()), float(array.max())
    low, high = value_range(array)
    # There a NaN is not passed over.
    numbers = contiguous(array).reshape(len(array), -1)
    sums = empty(numbers.shape[1:], array.dtype, array)
    _gpu().column_sum(numbers, sums)
    return (math.nan, math.nan) if np.isnan(to_cpu(sums)).any() else (low, high)


def as_indices(array: Any) -> tuple[Array, int, int]:
    """Integers as int64, C-contiguous, and the smallest and the largest of them; (0, 0) if there are none."""
    if is_on_gpu(array):
        return _gpu().as_indices(array)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    return np.require(array, np.int64, ["C_CONTIGUOUS", "ALIGNED"]), low, high


def rows(array: Any) -> Array:
    """The array as a matrix, its leading dimensions run together; a view wherever there is one."""
    if array.ndim == 2:
        return array  # type: ignore[no-any-return]
    count = 1
    for n in array.shape[:-1]:
        count *= n
    if is_on_gpu(array):
        array = contiguous(array)
    return array.reshape(count, array.shape[-1])  # type: ignore[no-any-return]


def broadcast_to(array: Any, shape: tuple[int, ...]) -> Array:
    """Return the array with more dimensions, a view."""
    if is_on_gpu(array):
        return sys.modules["cupy"].broadcast_to(array, shape)  # type: ignore[no-any-return]
    return np.broadcast_to(array, shape)


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
