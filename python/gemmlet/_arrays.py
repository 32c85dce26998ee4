"""Arrays wherever they are: what kernels.py asks of NumPy's, and of CuPy's on a GPU.

NumPy's are the usual case, and told apart by their type alone; CuPy is not imported until an array on a GPU comes.
CuPy computes nothing here: what moves on a GPU is moved by the CUDA backend's own kernels.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .backends.cuda_backend import CudaBackend

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
    from .backends import cuda_compile

    try:
        cupy = cuda_compile.import_cupy()
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


def _gpu() -> CudaBackend:
    """The CUDA backend."""
    from .backends import select

    return cast("CudaBackend", select.load("cuda"))


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], beside: Any) -> Array:
    """Return a new C-contiguous array in the same place as `beside`."""
    return _gpu().empty(shape, dtype, beside) if is_on_gpu(beside) else np.empty(shape, dtype)


def empty_like(array: Any, order: str = "K") -> Array:
    """Return a new array of the same shape, dtype and place; in the same layout too, if there is one without gaps."""
    if not is_on_gpu(array):
        return np.empty_like(array, order=cast(Any, order))
    if order == "K" and array.flags.f_contiguous and not array.flags.c_contiguous:
        return empty(array.shape[::-1], array.dtype, array).T
    return empty(array.shape, array.dtype, array)


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
    """``target[...] = source``, of one shape and dtype."""
    if is_on_gpu(target):
        _gpu().assign(target, source)
    else:
        target[...] = source


def value_range(array: Any) -> tuple[float, float]:
    """The smallest and the largest of at least one element, NaN passed over."""
    return _gpu().value_range(array) if is_on_gpu(array) else (np.fmin.reduce(array, None), np.fmax.reduce(array, None))


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
