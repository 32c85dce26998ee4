"""NumPy itself made faster: its operators, functions and methods compute their usual case by gemmlet's kernels.

What is replaced are pointers inside NumPy (csrc/cpu/bindings/numpy/replace.cpp has the list), for the whole process: no
name, type or docstring changes, and code that is unaware of it gets faster. The usual case are arrays of float64 or
float32 as they are, beside each other or beside numbers. Whatever else, subclasses, other dtypes, ``where=`` and so on,
is computed by the function that stood there before.
"""

from __future__ import annotations

import contextvars
import operator
import os
import sys
from collections.abc import Callable, Iterator
from threading import get_ident
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._locks import fork_safe_lock
from ..backends import select
from ..backends.cpu import CpuBackend

Array = NDArray[Any]

__all__ = ["accelerate_numpy", "counts", "replaced", "restore_numpy"]

# Versions of NumPy whose own tests have passed while accelerated: 2.0.2, 2.1.3, 2.2.6, 2.3.5, 2.4.6 and 2.5.5.
KNOWN = ((2, 0), (2, 5))
# Bytes of freed arrays that are kept for new ones.
KEPT_BYTES = 256 << 20


class _State:
    """What is replaced now, and by whom."""

    def __init__(self) -> None:
        self.lock = fork_safe_lock()
        self.replaced: tuple[str, ...] = ()
        self.counts_before: dict[str, tuple[int, int]] = {}
        self.blocks: list[int] = []  # that have begun, and not ended: the threads of them
        self.ends_with_blocks = False  # whether the one that replaced NumPy's functions has ended
        os.register_at_fork(after_in_child=self._forget_other_threads)

    def _forget_other_threads(self) -> None:
        self.blocks = [thread for thread in self.blocks if thread == get_ident()]


_state: _State = globals().get("_state") or _State()  # it stays where this module is loaded again


class Acceleration:
    """What `accelerate_numpy` returns: a context manager, at whose end NumPy is as it was before that call.

    Where other blocks have begun meanwhile, in other threads, it is as it was once the last of them has ended.
    """

    def __init__(self, began: bool) -> None:
        self._began = began

    def __enter__(self) -> Acceleration:
        with _state.lock:
            if not _state.replaced:  # another block has ended since this was made
                self._began = accelerate_numpy()._began
            _state.blocks.append(get_ident())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _state.lock:
            thread = get_ident()
            if _state.blocks:  # in a forked child a block that another thread has begun is forgotten
                _state.blocks.remove(thread if thread in _state.blocks else _state.blocks[0])
            _state.ends_with_blocks |= self._began
            if _state.ends_with_blocks and not _state.blocks:
                restore_numpy()

    def __repr__(self) -> str:
        return f"<NumPy {np.__version__}: {len(_state.replaced)} of its functions computed by gemmlet>"


def accelerate_numpy() -> Acceleration:
    """Compute the usual cases of NumPy's operators, functions and methods by gemmlet's kernels, in the whole process.

    Operators (``+ - * / ** @``, in place, comparisons, assignment by a mask), functions as ``np.dot``, ``np.exp`` and
    ``np.sum``, and the methods of those names: `replaced` lists them. Results, dtypes, warnings and errors under
    ``np.errstate`` are NumPy's; so are the bits, but of ``exp``, ``log``, ``tanh``, ``dot``, ``@`` and ``norm``, which
    are as accurate, and round differently, and the sign of a ``max`` or ``min`` that is zero. Threads
    are gemmlet's (`gemmlet.set_num_threads`). Memory of freed arrays, 256 MiB at most, is kept for new ones.

    Each function is tried before it is replaced, on a small battery. One that differs from NumPy's is left as it is.

    Returns
    -------
    Acceleration
        A context manager: ``with gemmlet.accelerate_numpy(): ...`` ends with NumPy as it was before the block, or, of
        blocks that overlap, before the first of them. A call while NumPy is accelerated changes nothing.

    Raises
    ------
    RuntimeError
        This NumPy or Python is none that is known, or nothing was compiled for this platform; the message says which.

    Examples
    --------
    >>> import gemmlet, numpy as np
    >>> with gemmlet.accelerate_numpy():
    ...     y = np.tanh(np.ones((64, 784)) @ np.ones((784, 128)))
    """
    with _state.lock:
        if _state.replaced:
            return Acceleration(False)
        extension = _extension()
        names = extension.numpy_prepare()
        # In a context of its own: one in which np.errstate has been set once makes each call of a ufunc some ns longer.
        good = contextvars.Context().run(_good, extension, names)
        _state.counts_before = _all_counts(extension)
        extension.numpy_keep_memory(KEPT_BYTES)
        extension.numpy_replace(good)
        _state.replaced = tuple(names[index] for index in good)
        return Acceleration(True)


def restore_numpy() -> None:
    """Put NumPy's own functions back, and give back the memory that was kept; nothing, where nothing is replaced."""
    with _state.lock:
        if _state.replaced:
            extension = _extension()
            extension.numpy_restore()
            extension.numpy_keep_memory(0)
            _state.replaced = ()
        _state.ends_with_blocks = False


def replaced() -> tuple[str, ...]:
    """Return the names of what is replaced now, as ``"ndarray.__add__"`` and ``"numpy.exp"``."""
    return _state.replaced


def counts() -> dict[str, tuple[int, int]]:
    """Return the calls taken and those handed on to NumPy, of each name, since the last `accelerate_numpy`.

    An operator that is handed on ends in NumPy's function, which counts it again. Items by an index or a slice are not
    counted.
    """
    return {
        name: (taken - _state.counts_before[name][0], handed_on - _state.counts_before[name][1])
        for name, (taken, handed_on) in _all_counts(_extension()).items()
        if name in _state.counts_before
    }


def _extension() -> Any:
    version = tuple(int(part) for part in np.__version__.split(".")[:2])
    first, last = (".".join(map(str, known)) for known in KNOWN)
    if not KNOWN[0] <= version <= KNOWN[1]:
        raise RuntimeError(f"NumPy {np.__version__} cannot be accelerated: NumPy {first} to {last} can")
    if "t" in sys.abiflags or sys.implementation.name != "cpython":  # t: free-threaded
        raise RuntimeError("NumPy cannot be accelerated in this Python: CPython with the GIL is needed")
    try:
        backend = select.load("cpu")
    except (ImportError, RuntimeError, ValueError) as error:  # the last: of GEMMLET_ISA
        raise RuntimeError(f"NumPy cannot be accelerated: {error}") from error
    assert isinstance(backend, CpuBackend)
    return backend.extension


def _all_counts(extension: Any) -> dict[str, tuple[int, int]]:
    return {name: pair for name, pair in zip(extension.numpy_prepare(), extension.numpy_counts(), strict=True) if name}


# The battery.

_OPERATORS: dict[str, Callable[..., Any]] = {
    "ndarray.__add__": operator.add,
    "ndarray.__sub__": operator.sub,
    "ndarray.__mul__": operator.mul,
    "ndarray.__truediv__": operator.truediv,
    "ndarray.__matmul__": operator.matmul,
    "ndarray.__iadd__": operator.iadd,
    "ndarray.__isub__": operator.isub,
    "ndarray.__imul__": operator.imul,
    "ndarray.__itruediv__": operator.itruediv,
    "ndarray.__neg__": operator.neg,
    "ndarray.__getitem__": operator.getitem,
}
# Those that round in their own way, to within so many units of the result's precision.
_ROUNDED = {"exp": 8, "log": 8, "tanh": 8, "dot": 64, "matmul": 64, "__matmul__": 64, "norm": 64}


def _cases(name: str, x: Array, y: Array) -> Iterator[tuple[Any, ...]]:
    """Arguments for an entry, of two matrices; x has zeros of both signs. Operators in place change the first one."""
    last = name.rpartition(".")[2]
    if last in {"dot", "matmul", "__matmul__"}:
        yield from ((x, np.ascontiguousarray(y.T)), (x, y.T), (x[:, 1], y[:, 2]))
    elif last == "outer":
        yield x[0], y[1]
    elif last in {"power", "__pow__"}:
        yield from ((x, 2), (y, 0.5), (y, 3))
    elif last == "clip":
        yield x, -1, 0.5
    elif last == "where":
        yield from ((x > 0, x, 0.0), (x > 0, x, y), (x > 0, 1, 0))
    elif name == "ndarray comparisons":
        yield from ((x, x[::-1].copy()), (x, 0), (x, 1.5), (x, x[0]))
    elif last == "__setitem__":
        yield from ((x.copy(), x > 0, 0), (x.copy(), (range(2), np.array([1, 2])), 0))
    elif last == "__getitem__":
        yield from ((x, 1), (x, np.array([2, -1])), (x, (range(2), np.array([1, 2]))))
    elif last in {"sum", "mean", "max", "min"}:
        yield from ((x,), (x, 0), (x, 1), (y.T, 0), (x, -1), (x[2:3, 3], 0))
    elif last in {"zeros_like", "ones_like"}:
        yield from ((x,), (x.T,), (x[:, ::2],))
    elif last in {"argmax", "argmin"}:
        yield from ((x,), (x, 1))
    elif last in {"exp", "log", "tanh", "sqrt", "sign", "square", "absolute", "negative", "__neg__", "norm"}:
        yield (y if last in {"log", "sqrt"} else x,)
        if x.dtype == np.float64:
            yield (np.float64(0.75),)
    else:
        others = (y, y[0], y[:, :1], 2, np.float32(3), *(() if "div" in last else (-x, 0.0)))
        yield from ((x.copy(), other) for other in others)
        if not last.startswith("__i"):
            yield from ((x.T, y.T), (2.5, y), (y[0], y))


def _plain(name: str) -> Callable[..., Any]:
    """The function of NumPy that an entry stands for."""
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name == "ndarray.__pow__":
        return pow
    if name == "ndarray comparisons":
        return lambda x, y, index: (operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge)[
            index
        ](x, y)
    if name == "ndarray.__setitem__":
        return lambda x, key, value: (operator.setitem(x, key, value), x)[1]
    if name.startswith("ndarray."):
        return lambda x, *arguments: getattr(x, name.removeprefix("ndarray."))(*arguments)
    found: Any = np
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _good(extension: Any, names: list[str | None]) -> list[int]:
    """Indices of the entries that compute what NumPy does."""
    with np.errstate(all="ignore"):
        return [index for index, name in enumerate(names) if name is not None and _agrees(extension, index, name)]


def _agrees(extension: Any, index: int, name: str) -> bool:
    """Whether an entry computes what NumPy does."""
    try:
        return _computes_the_same(extension, index, name)
    except Exception:  # of whatever stands in NumPy's place
        return False


def _computes_the_same(extension: Any, index: int, name: str) -> bool:
    plain = _plain(name)
    last = name.rpartition(".")[2]
    extras: list[tuple[Any, ...]] = [()]
    if name == "ndarray comparisons":
        extras = [(comparison,) for comparison in range(6)]
    elif last == "__pow__":
        extras = [(None,)]
    for dtype in (np.float64, np.float32):
        x = (np.arange(-21, 21).reshape(6, 7) / 7).astype(dtype)
        x[3, 3] = -0.0
        y = (np.arange(42).reshape(6, 7) / 9 + 1).astype(dtype)
        for case, again in zip(_cases(name, x, y), _cases(name, x, y), strict=True):
            for extra in extras:
                wanted = plain(*case, *extra)
                if not _alike(wanted, extension.numpy_call(index, (*again, *extra)), _ROUNDED.get(last, 0)):
                    return False
    return True


def _alike(wanted: Any, got: Any, units: int) -> bool:
    if type(wanted) is not type(got) or wanted.dtype != got.dtype or wanted.shape != got.shape:
        return False
    if isinstance(wanted, np.ndarray) and wanted.strides != got.strides:
        return False
    if not units:
        return bool(wanted.tobytes() == got.tobytes())
    return bool(np.max(np.abs(wanted - got)) <= np.finfo(wanted.dtype).eps * units * np.max(np.abs(wanted)))
