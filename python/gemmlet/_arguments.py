"""Checks of what callers pass: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def as_array(value: Any, name: str) -> Array:
    """Return `value` as an ndarray, on the same memory for ``__array_interface__``, the buffer protocol and DLPack."""
    if type(value) is np.ndarray:
        return value
    if value is None:
        raise TypeError(f"{name} is None; expected an array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it first: {name}.filled(...)")
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{name} is an array on a GPU; this backend computes on the CPU: bring it there first")
    try:
        if not _has_numpy_protocol(value) and hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise TypeError(f"{name} ({type(value).__name__}) cannot be read as an array: {error}") from error


def _has_numpy_protocol(value: Any) -> bool:
    return any(hasattr(value, p) for p in ("__array_interface__", "__array_struct__", "__array__", "__buffer__"))


def as_floats(value: Any, name: str, dtype: np.dtype[Any] | None = None) -> Array:
    """Return `value` as a float32 or float64 ndarray, of just `dtype` if that is given."""
    array = as_array(value, name)
    if array.dtype not in _FLOATS or not array.dtype.isnative:
        swapped = array.dtype.kind == "f" and not array.dtype.isnative
        found = f"byte order {array.dtype.str}" if swapped else f"dtype {array.dtype}"
        wanted = np.dtype(np.float32) if dtype is None else dtype
        raise TypeError(f"{name} has {found}; expected float32 or float64: convert with {name}.astype(np.{wanted})")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {array.dtype}, the other arguments {dtype}; all must agree: "
            f"convert with {name}.astype(np.{dtype})"
        )
    if not array.flags.aligned:
        array = array.copy()
    return array


def is_aligned(array: Array) -> bool:
    """Whether every element stands at a multiple of its size."""
    return bool(array.flags.aligned)


def check_shape(array: Array, name: str, shape: tuple[int, ...], why: str) -> None:
    """Raise unless `array` has `shape`."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} ({why})")


def output(out: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the memory of `out` after checking it, or a new array."""
    if out is None:
        return np.empty(shape, dtype)
    array = as_array(out, name)
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {dtype}")
    check_shape(array, name, shape, "the shape of the result")
    check_written(array, out, name)
    return array


def updated(value: Any, name: str, dtype: np.dtype[Any] | None = None) -> Array:
    """Return the memory of `value`, a float32 or float64 array, of just `dtype` if that is given, to be written to."""
    array = as_array(value, name)
    as_floats(array, name, dtype)
    check_written(array, value, name)
    return array


def check_written(array: Array, given: Any, name: str) -> None:
    """Raise if `array`, which was made of `given`, cannot be written to so that `given` has it."""
    if array is not given and array.size and not np.may_share_memory(array, as_array(given, name)):
        raise TypeError(f"{name} ({type(given).__name__}) does not give access to its memory")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    if not array.flags.aligned:
        raise ValueError(f"{name} is not aligned to its dtype")
    if array.size and any(stride == 0 and n > 1 for stride, n in zip(array.strides, array.shape, strict=True)):
        raise ValueError(f"{name} is a broadcast view: several of its elements share one place in memory")


def overlaps(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; where that is too hard to decide, whether their bounds overlap."""
    if not np.may_share_memory(a, b):
        return False
    try:
        # The stubs know the two named values of max_work alone.
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same_view(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are the same elements in the same order."""
    return a.ctypes.data == b.ctypes.data and a.strides == b.strides


def number(value: Any, name: str, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> float:
    """Return a finite real number within ``[low, high]``, or ``(low, high]`` if `open_low`."""
    if type(value) is float:  # the usual case
        if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
            return value
    elif isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not low <= result <= high or (open_low and result == low):
        if high < math.inf:
            expected = f"within {'(' if open_low else '['}{low:g}, {high:g}]"
        elif low > -math.inf:
            expected = f"{'above' if open_low else 'at least'} {low:g}"
        else:
            expected = "finite"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return result


def flag(value: Any, name: str) -> bool:
    """Return `value`, a bool."""
    if value is True or value is False:  # the usual case
        return value
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)
