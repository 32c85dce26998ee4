"""Checks of what callers pass: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _arrays as arrays
from .backends import select
from .backends.base import Backend
from .formulas import optimizers

Array = NDArray[Any]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_GPU_FLOATS = ("float32", "float64", "float16", "bfloat16")

_CUDA_DEVICES = (2, 13)  # DLPack's numbers: memory of a GPU, and managed memory


def as_array(value: Any, name: str) -> Array:
    """Return `value` as an ndarray, on the same memory for ``__array_interface__``, the buffer protocol and DLPack.

    What is on a GPU becomes a `cupy.ndarray`, on the same memory too. A NumPy array is no caller's, so that no other
    thread can set its shape or dtype once it was checked.
    """
    if type(value) is np.ndarray:
        return value.view()
    if value is None:
        raise TypeError(f"{name} is None; expected an array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it first: {name}.filled(...)")
    on_gpu = _from_gpu_object(value, name)
    if on_gpu is not None:
        if on_gpu.data.ptr % on_gpu.itemsize:
            raise TypeError(f"{name} is not aligned to its dtype")
        return on_gpu  # type: ignore[no-any-return]
    try:
        if not _has_numpy_protocol(value) and hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise TypeError(f"{name} ({type(value).__name__}) cannot be read as an array: {error}") from error


def _from_gpu_object(value: Any, name: str) -> Any:
    """`value` as a CuPy array on the same memory, for DLPack and ``__cuda_array_interface__``; None if on no GPU."""
    if arrays.is_on_gpu(value):
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


def _has_numpy_protocol(value: Any) -> bool:
    return any(hasattr(value, p) for p in ("__array_interface__", "__array_struct__", "__array__", "__buffer__"))


def as_floats(value: Any, name: str, like: Array | np.dtype[Any] | None = None) -> Array:
    """Return `value` as a floating-point array: float32 or float64, and on a GPU float16 or bfloat16 too.

    `like` is a dtype that it must have, or an array whose dtype and place it must have.
    """
    array = as_array(value, name)
    dtype = like if like is None or isinstance(like, np.dtype) else like.dtype
    on_gpu = arrays.is_on_gpu(array)
    if (
        (arrays.name_of(array.dtype) not in _GPU_FLOATS)
        if on_gpu
        else (array.dtype not in _FLOATS or not array.dtype.isnative)
    ):
        swapped = array.dtype.kind == "f" and not array.dtype.isnative
        found = f"byte order {array.dtype.str}" if swapped else f"dtype {array.dtype}"
        wanted = np.dtype(np.float32) if dtype is None else dtype
        known = ", ".join(_GPU_FLOATS[:-1]) + " or bfloat16" if on_gpu else "float32 or float64"
        raise TypeError(f"{name} has {found}; expected {known}: convert with {name}.astype(np.{wanted})")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {array.dtype}, the other arguments {dtype}; all must agree: "
            f"convert with {name}.astype(np.{dtype})"
        )
    check_place(array, name, like)
    if not on_gpu and not array.flags.aligned:
        array = array.copy()
    return array


def check_place(array: Array, name: str, like: Array | np.dtype[Any] | None) -> None:
    """Raise unless `array` is on the CPU, or the GPU, where `like` is."""
    if like is None or type(array) is type(like) is np.ndarray or isinstance(like, np.dtype):
        return
    here, there = arrays.place(array), arrays.place(like)
    if here != there:
        raise ValueError(f"{name} is on {here}, the other arguments on {there}; all must be in one place")


def on_cpu(array: Array) -> Array:
    """Return the array if it is NumPy's, else a copy that is."""
    return select.of(array).to_cpu(array)


def is_aligned(array: Array) -> bool:
    """Whether every element stands at a multiple of its size."""
    return bool(array.flags.aligned)


def check_shape(array: Array, name: str, shape: tuple[int, ...], why: str) -> None:
    """Raise unless `array` has `shape`."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape} ({why})")


def output(backend: Backend, out: Any, name: str, shape: tuple[int, ...], like: Array) -> Array:
    """Return the memory of `out` after checking it, or a new array, of the dtype and in the place of `like`."""
    if out is None:
        return backend.empty(shape, like.dtype, like)
    array = as_array(out, name)
    if array.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {like.dtype}")
    check_place(array, name, like)
    check_shape(array, name, shape, "the shape of the result")
    check_written(array, out, name)
    return array


def updated(value: Any, name: str, like: Array | None = None) -> Array:
    """Return the memory of `value`, an array as `as_floats` takes it, to be written to."""
    array = as_array(value, name)
    as_floats(array, name, like)
    check_written(array, value, name)
    return array


def check_written(array: Array, given: Any, name: str) -> None:
    """Raise if `array`, which was made of `given`, cannot be written to so that `given` has it."""
    if not arrays.is_on_gpu(array):
        if type(given) is not np.ndarray and array.size and not np.may_share_memory(array, as_array(given, name)):
            raise TypeError(f"{name} ({type(given).__name__}) does not give access to its memory")
        if not array.flags.writeable:
            raise ValueError(f"{name} is read-only")
        if not array.flags.aligned:
            raise ValueError(f"{name} is not aligned to its dtype")
    if array.flags.c_contiguous or not array.size:
        return
    if any(stride == 0 and n > 1 for stride, n in zip(array.strides, array.shape, strict=True)):
        raise ValueError(f"{name} is a broadcast view: several of its elements share one place in memory")


def overlaps(a: Array, b: Array) -> bool:
    """Whether two arrays share an element; where that is too hard to decide, whether their bounds overlap."""
    if arrays.is_on_gpu(a):
        a, b = arrays.addresses(a), arrays.addresses(b)
    if not np.may_share_memory(a, b):
        return False
    try:
        # The stubs know the two named values of max_work alone.
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same_view(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are the same elements in the same order."""
    a, b = arrays.addresses(a), arrays.addresses(b)
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
        finite = "" if math.isfinite(result) else "finite and "
        if high < math.inf:
            expected = f"within {'(' if open_low else '['}{low:g}, {high:g}]"
        elif low > -math.inf:
            expected = f"{finite}{'above' if open_low else 'at least'} {low:g}"
        else:
            expected = "finite"
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return result


def shown(value: Any) -> str:
    """A number in a message; Python writes no integers of thousands of digits."""
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >> 999 else repr(value)


def rounded(number: float, name: str, dtype: np.dtype[Any], value: Any) -> float:
    """Return a positive number, which came as `value`, rounded to what `dtype` is computed in, where it is finite."""
    computed = arrays.computed_in(dtype)
    if number > float(np.finfo(computed).max):
        raise ValueError(f"{name} must be finite in {computed}, got {value!r}")
    return float(computed.type(number))


def check_unit_interval(low: float, high: float, name: str) -> None:
    """Raise unless the smallest and the largest element of `name` lie within [0, 1]."""
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie within [0, 1], got {low} to {high}")  # all digits: 1.0000001


def flag(value: Any, name: str) -> bool:
    """Return `value`, a bool."""
    if value is True or value is False:  # the usual case
        return value
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return bool(value)


def sgd_hyperparameters(
    has_velocity: bool, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> tuple[str, tuple[float, ...]]:
    """The rule that `sgd_update` follows, and its hyperparameters, checked."""
    nesterov = flag(nesterov, "nesterov")
    rate = number(lr, "lr", low=0.0)
    mu = number(momentum, "momentum", low=0.0, high=1.0)
    decay = number(weight_decay, "weight_decay", low=0.0)
    if has_velocity:
        return "momentum", (rate, decay, mu, float(nesterov))
    if mu or nesterov:
        raise ValueError("velocity is missing: momentum and nesterov need it")
    return "sgd", (rate, decay)


def adam_hyperparameters(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool
) -> tuple[float, ...]:
    """The hyperparameters of Adam's rule (AdamW's, if `decoupled`) at one step, checked."""
    if type(step) is not int and (not isinstance(step, np.integer | int) or isinstance(step, bool)):
        raise TypeError(f"step must be an integer, got {type(step).__name__}")
    if step < 1:
        raise ValueError(f"step must be at least 1 (the first update), got {step}")
    settings = (
        number(lr, "lr", low=0.0),
        number(beta1, "beta1", low=0.0, high=1.0),
        number(beta2, "beta2", low=0.0, high=1.0),
        number(eps, "eps", low=0.0),
        number(weight_decay, "weight_decay", low=0.0),
    )
    for name, beta in (("beta1", settings[1]), ("beta2", settings[2])):
        if beta == 1.0:
            raise ValueError(f"{name} must be below 1, got 1")
    # Beyond 2**53 not every integer is a float; the corrections have long come to their limit.
    return optimizers.adam_hyperparameters(min(int(step), 2**53), *settings, decoupled)
