"""The Numba backend: the fallback where no compiled module loads.

The matrix product is NumPy's BLAS; everything else is one pass, compiled at its first use for each function and dtype
(a fraction of a second each, nothing is cached on disk). The formulas are those of `numba_formulas`; an entry without a
twin there is computed by the reference.

Threads: Numba's own (``parallel=True``) abort the process when two Python threads call at once, or hang after a fork.
So large arrays are split over a small pool of Python threads, as compiled code runs without the GIL. Work is split over
whole elements, rows, or blocks whose partial sums are added in one order: results do not depend on the number of
threads.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from llvmlite import binding
from numba import njit, types

from ..formulas.activations import ACTIVATIONS, Activation
from ..formulas.losses import Loss, RowFunction
from ..formulas.optimizers import OptimizerRule, Scalars
from .numba_formulas import twins
from .numpy_backend import Array, NumpyBackend

# Elements in one block: a few arrays of that many fit into the first-level cache. A power of two.
_BLOCK = 1024
# The least work worth a thread, in elements: handing over a task costs about as much as 20,000 elements of the cheapest
# pass.
_ELEMENTS_PER_THREAD = 65_536

_compile = njit(error_model="numpy", nogil=True)
# Sums in any order that makes SIMD of them: one order, that of the compiled code.
_compile_sum = njit(error_model="numpy", nogil=True, fastmath={"reassoc"}, forceinline=True)


# Loops. Each factory compiles one, for a scalar formula. All arrays are flat; only those that a loop writes may be
# written. LLVM makes SIMD of a loop over one array, or over arrays that turn out not to overlap; else it is right, but
# slow.


def _array(dtype: np.dtype[Any], *, written: bool = False) -> Any:
    return types.Array(numba.from_dtype(dtype), 1, "C", readonly=not written)


_SUMS = types.Array(types.float64, 1, "C")


def _compiled(loop: Callable[..., Any], *signature: Any) -> Callable[..., Any]:
    return njit([types.void(*signature)], error_model="numpy", nogil=True)(loop)  # type: ignore[no-any-return]


@functools.cache
def _forward_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    f = twins(dtype)[name]

    def loop(x, parameter, out):
        for i in range(x.size):
            out[i] = f(x[i], parameter)

    return _compiled(loop, _array(dtype), types.float64, _array(dtype, written=True))


@functools.cache
def _backward_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    f = twins(dtype)[f"{name}_backward"]

    def loop(grad_y, saved, parameter, out):
        for i in range(grad_y.size):
            out[i] = f(grad_y[i], saved[i], parameter)

    return _compiled(loop, _array(dtype), _array(dtype), types.float64, _array(dtype, written=True))


@functools.cache
def _epilogue_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """Bias and activation over whole rows, in place; `z` takes what stands between them. Empty arrays are left out."""
    f = twins(dtype)[name]

    def loop(y, columns, bias, parameter, z):
        step = max(1, _BLOCK // columns) * columns
        for start in range(0, y.size, step):
            block = y[start : start + step]
            if bias.size:
                for first in range(0, block.size, columns):
                    row = block[first : first + columns]
                    for j in range(columns):
                        row[j] += bias[j]
            if z.size:
                kept = z[start : start + step]
                for i in range(block.size):
                    kept[i] = block[i]
            for i in range(block.size):
                block[i] = f(block[i], parameter)

    written = _array(dtype, written=True)
    return _compiled(loop, written, types.intp, _array(dtype), types.float64, written)


@_compile
def _tree_sum(values):
    """The sum of `_BLOCK` numbers, which are overwritten: half is added to half, until one is left."""
    width = values.size // 2
    while width > 0:
        low, high = values[:width], values[width : 2 * width]
        for i in range(width):
            low[i] += high[i]
        width //= 2
    return values[0]


@functools.cache
def _loss_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """Gradients of the mean, and the sum of each block of losses."""
    F = dtype.type
    f = twins(dtype)[name]

    def loop(prediction, target, parameter, share, sums, out):
        losses = np.empty(_BLOCK)
        for block in range(sums.size):
            first = block * _BLOCK
            p = prediction[first : first + _BLOCK]
            t = target[first : first + _BLOCK]
            gradient = out[first : first + _BLOCK]
            losses[p.size :] = 0.0
            for i in range(p.size):
                losses[i], slope = f(p[i], t[i], parameter, share)
                gradient[i] = F(slope)
            sums[block] = _tree_sum(losses)

    read, written = _array(dtype), _array(dtype, written=True)
    return _compiled(loop, read, read, types.float64, types.float64, _SUMS, written)


@functools.cache
def _update_loop(name: str, dtype: np.dtype[Any], states: int, scalars: int) -> Callable[..., Any]:
    f = twins(dtype)[name]

    def without_state(param, grad, scalars):
        for i in range(param.size):
            (param[i],) = f(param[i], grad[i], *scalars)

    def with_one(param, grad, state, scalars):
        for i in range(param.size):
            param[i], state[i] = f(param[i], grad[i], state[i], *scalars)

    def with_two(param, grad, state, state2, scalars):
        for i in range(param.size):
            param[i], state[i], state2[i] = f(param[i], grad[i], state[i], state2[i], *scalars)

    loop: Callable[..., None] = (without_state, with_one, with_two)[states]
    written = _array(dtype, written=True)
    return _compiled(loop, written, _array(dtype), *[written] * states, types.UniTuple(types.float64, scalars))


# Rows: exp over a block of them at once, as one row may be shorter than a SIMD register.


@_compile
def _largest(row):
    """The largest element, NaN aside. Four chains, as one would wait for itself."""
    a = b = c = d = row[0]
    whole = row.size - row.size % 4
    for i in range(0, whole, 4):
        a, b = max(a, row[i]), max(b, row[i + 1])
        c, d = max(c, row[i + 2]), max(d, row[i + 3])
    for i in range(whole, row.size):
        a = max(a, row[i])
    return max(max(a, b), max(c, d))


@_compile_sum
def _sum(row):
    total = 0.0
    for i in range(row.size):
        total += np.float64(row[i])
    return total


@_compile_sum
def _dot(a, b):
    total = 0.0
    for i in range(a.size):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@functools.cache
def _shifted_loop(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """For a block of rows: each minus its largest element, and the exponentials of that."""
    exponential = twins(dtype)["exponential"]

    @_compile
    def shifted(x, columns, difference, e):
        for first in range(0, x.size, columns):
            row, target = x[first : first + columns], difference[first : first + columns]
            largest = _largest(row)
            for j in range(columns):
                target[j] = row[j] - largest
        for i in range(x.size):
            e[i] = exponential(difference[i])

    return shifted  # type: ignore[no-any-return]


@functools.cache
def _row_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    F = dtype.type
    shifted = _shifted_loop(dtype)
    logarithm = name == "log_softmax"

    def loop(x, columns, out):
        step = max(1, _BLOCK // columns) * columns
        differences, exponentials = np.empty(step, x.dtype), np.empty(step, x.dtype)
        for start in range(0, x.size, step):
            block, result = x[start : start + step], out[start : start + step]
            difference, e = differences[: block.size], exponentials[: block.size]
            shifted(block, columns, difference, e)
            for first in range(0, block.size, columns):
                row, e_row = result[first : first + columns], e[first : first + columns]
                total = _sum(e_row)
                if logarithm:
                    d_row, log_total = difference[first : first + columns], F(math.log(total))
                    for j in range(columns):
                        row[j] = d_row[j] - log_total
                else:
                    for j in range(columns):
                        row[j] = e_row[j] / F(total)

    return _compiled(loop, _array(dtype), types.intp, _array(dtype, written=True))


@functools.cache
def _row_backward_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    F = dtype.type
    exponential = twins(dtype)["exponential"]

    if name == "softmax":

        def loop(grad_y, y, columns, out):
            for first in range(0, y.size, columns):
                g, s, row = grad_y[first : first + columns], y[first : first + columns], out[first : first + columns]
                mean = F(_dot(g, s))
                for j in range(columns):
                    row[j] = s[j] * (g[j] - mean)

    else:

        def loop(grad_y, y, columns, out):
            step = max(1, _BLOCK // columns) * columns
            exponentials = np.empty(step, y.dtype)
            for start in range(0, y.size, step):
                block = y[start : start + step]
                e = exponentials[: block.size]
                for i in range(block.size):
                    e[i] = exponential(block[i])
                for first in range(0, block.size, columns):
                    g = grad_y[start + first : start + first + columns]
                    row, e_row = out[start + first : start + first + columns], e[first : first + columns]
                    total = F(_sum(g))
                    for j in range(columns):
                        row[j] = g[j] - e_row[j] * total

    return _compiled(loop, _array(dtype), _array(dtype), types.intp, _array(dtype, written=True))


@functools.cache
def _cross_entropy_loop(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """Of softmax: class indices, else `soft` labels; the loss of each row, and gradients times `scale`."""
    F = dtype.type
    shifted = _shifted_loop(dtype)

    def loop(logits, columns, indices, soft, smoothing, scale, losses, out):
        step = max(1, _BLOCK // columns) * columns
        differences, exponentials = np.empty(step, logits.dtype), np.empty(step, logits.dtype)
        share, kept = smoothing / columns, 1.0 - smoothing
        for start in range(0, logits.size, step):
            block, result = logits[start : start + step], out[start : start + step]
            difference, e = differences[: block.size], exponentials[: block.size]
            shifted(block, columns, difference, e)
            for first in range(0, block.size, columns):
                d, p, row = (
                    difference[first : first + columns], e[first : first + columns], result[first : first + columns]
                )  # fmt: skip
                i = (start + first) // columns
                total = _sum(p)
                log_total, loss = math.log(total), 0.0
                if indices.size:
                    label = indices[i]
                    # Weights of zero leave out what may be infinite.
                    if kept != 0.0:
                        loss = kept * (log_total - d[label])
                    if share != 0.0:
                        loss += share * (columns * log_total - _sum(d))
                    for j in range(columns):
                        row[j] = (p[j] / F(total) - F(share)) * scale
                    row[label] = (p[label] / F(total) - F(share) - F(kept)) * scale
                else:
                    t = soft[start + first : start + first + columns]
                    weight = F(kept * _sum(t) + smoothing)
                    for j in range(columns):
                        target = kept * t[j] + share
                        if target != 0.0:
                            loss += target * (log_total - d[j])
                    for j in range(columns):
                        row[j] = (p[j] / F(total) * weight - F(kept * t[j] + share)) * scale
                losses[i] = loss

    read = _array(dtype)
    return _compiled(
        loop,
        read,
        types.intp,
        types.Array(types.int64, 1, "C", readonly=True),
        read,
        types.float64,
        numba.from_dtype(dtype),
        _SUMS,
        _array(dtype, written=True),
    )


# Threads.


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gemmlet")


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork: the child starts its own.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _apart(array: Array, out: Array) -> Array:
    """`array` flat, and copied if `out` is the same memory."""
    return (array.copy() if np.may_share_memory(array, out) else array).reshape(-1)


# The usual call, which is answered without the checks of `gemmlet.kernels`: C-contiguous arrays that behave, too small
# for a second thread.


def _quick_result(out: Any, like: Array, *inputs: Array) -> Any:
    """A new array, or `out` if it needs no care: None else."""
    if out is None:
        return np.empty_like(like)
    if type(out) is not np.ndarray or out.dtype != like.dtype or out.shape != like.shape or not out.flags.carray:
        return None
    return None if any(np.may_share_memory(out, array) for array in inputs) else out


def _quick_forward(entry: Activation) -> Callable[..., Any]:
    loops: dict[Any, Any] = {}  # by dtypes that may be asked for, as they come

    def quick(x: Any, parameter: Any, out: Any) -> Any:
        if type(x) is not np.ndarray or x.size >= _ELEMENTS_PER_THREAD or not x.flags.carray:
            return None
        if x.dtype not in loops:
            loops[x.dtype] = _quick_loop(_forward_loop, entry.name, entry.name, x.dtype, entry)
        loop, number, default = loops[x.dtype]
        if loop is None or type(parameter) is not type(default) or parameter != default:
            return None
        y = _quick_result(out, x, x)
        if y is not None:
            loop(x.reshape(-1), number, y.reshape(-1))
        return y

    return quick


def _quick_backward(entry: Activation) -> Callable[..., Any]:
    loops: dict[Any, Any] = {}

    def quick(grad_y: Any, x: Any, y: Any, parameter: Any, out: Any) -> Any:
        saved, other = (x, y) if entry.needs_x else (y, x)
        if not type(grad_y) is type(saved) is np.ndarray or grad_y.size >= _ELEMENTS_PER_THREAD:
            return None
        dtype, shape = grad_y.dtype, grad_y.shape
        if saved.dtype != dtype or saved.shape != shape or not (grad_y.flags.carray and saved.flags.carray):
            return None
        if other is not None and (type(other) is not np.ndarray or other.dtype != dtype or other.shape != shape):
            return None
        if dtype not in loops:
            loops[dtype] = _quick_loop(_backward_loop, entry.name, f"{entry.name}_backward", dtype, entry)
        loop, number, default = loops[dtype]
        if loop is None or type(parameter) is not type(default) or parameter != default:
            return None
        grad_x = _quick_result(out, grad_y, grad_y, saved)
        if grad_x is not None:
            loop(grad_y.reshape(-1), saved.reshape(-1), number, grad_x.reshape(-1))
        return grad_x

    return quick


def _quick_loop(factory: Any, name: str, twin: str, dtype: np.dtype[Any], entry: Activation) -> tuple[Any, Any, Any]:
    """The loop, if there is one for the dtype, the formula's number, and the argument that stands for it."""
    if dtype not in (np.float32, np.float64) or twin not in twins(dtype):
        return None, None, None
    number = float(dtype.type(entry.default))
    return factory(name, dtype), number, None if entry.parameter is None else entry.default


class NumbaBackend(NumpyBackend):
    """Fused passes compiled by Numba around NumPy's matrix product."""

    name = "numba"

    def __init__(self) -> None:
        self._threads = 1
        self.quick = {name: _quick_forward(entry) for name, entry in ACTIVATIONS.items()}
        self.quick |= {f"{name}_backward": _quick_backward(entry) for name, entry in ACTIVATIONS.items()}

    def describe(self) -> dict[str, str]:
        """What `gemmlet.show_config` prints about this backend."""
        return {
            "backend": self.name,
            "isa": f"{binding.get_host_cpu_name()} (compiled by Numba {numba.__version__})",
            "threads": f"{self._threads} (the matrix product: NumPy's BLAS)",
        }

    def set_num_threads(self, count: int) -> None:
        """Split large arrays into so many parts; the BLAS is the caller's to set."""
        self._threads = count

    def _split(self, size: int, unit: int, run: Callable[[slice], None]) -> None:
        """Call `run` on slices that cover `size` elements, each of whole units, at the same time."""
        parts = min(self._threads, size // _ELEMENTS_PER_THREAD)
        if parts < 2:
            run(slice(0, size))
            return
        length = -(-size // (parts * unit)) * unit
        slices = [slice(start, min(start + length, size)) for start in range(0, size, length)]
        futures = [_pool().submit(run, part) for part in slices[1:]]
        run(slices[0])
        for future in futures:
            future.result()

    def linear(
        self,
        x: Array,
        w: Array,
        b: Array | None,
        activation: Activation | None,
        parameter: float,
        out: Array,
        preactivation: Array | None,
    ) -> None:
        """``out = activation(x @ w + b)``; `preactivation`, if given, takes ``x @ w + b``."""
        name = "identity" if activation is None else activation.name
        if name not in twins(out.dtype) or not out.size:
            super().linear(x, w, b, activation, parameter, out, preactivation)
            return
        self.matmul(x, w, out)
        loop = _epilogue_loop(name, out.dtype)
        none = np.empty(0, out.dtype)
        y, z = out.reshape(-1), none if preactivation is None else preactivation.reshape(-1)
        bias, columns = none if b is None else b, out.shape[1]
        self._split(y.size, columns, lambda part: loop(y[part], columns, bias, parameter, z[part]))

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        """``out = activation(x)``."""
        if activation.name not in twins(out.dtype):
            super().activation(activation, x, parameter, out)
            return
        y = out.reshape(-1)
        if np.may_share_memory(x, out):
            in_place = _epilogue_loop(activation.name, out.dtype)
            none = np.empty(0, out.dtype)
            self._split(y.size, 1, lambda part: in_place(y[part], 1, none, parameter, none))
            return
        flat, loop = x.reshape(-1), _forward_loop(activation.name, out.dtype)
        self._split(y.size, 1, lambda part: loop(flat[part], parameter, y[part]))

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        """``out = grad_y * activation'``, `saved` being the `x` or the `y` that the formula reads."""
        if f"{activation.name}_backward" not in twins(out.dtype):
            super().activation_backward(activation, grad_y, saved, parameter, out)
            return
        loop = _backward_loop(activation.name, out.dtype)
        grad, grad_x = _apart(grad_y, out), out.reshape(-1)
        kept = _apart(saved, out)
        self._split(grad_x.size, 1, lambda part: loop(grad[part], kept[part], parameter, grad_x[part]))

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        """``out = function(x)``, (rows, columns), columns > 0."""
        if function.name not in ("softmax", "log_softmax"):
            super().row_function(function, x, out)
            return
        loop, columns = _row_loop(function.name, out.dtype), out.shape[1]
        flat, y = x.reshape(-1), out.reshape(-1)
        self._split(y.size, columns, lambda part: loop(flat[part], columns, y[part]))

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        """``out`` = the gradient with respect to the function's input."""
        if function.name not in ("softmax", "log_softmax"):
            super().row_function_backward(function, grad_y, y, out)
            return
        loop, columns = _row_backward_loop(function.name, out.dtype), out.shape[1]
        grad, kept, grad_x = grad_y.reshape(-1), y.reshape(-1), out.reshape(-1)
        self._split(grad_x.size, columns, lambda part: loop(grad[part], kept[part], columns, grad_x[part]))

    def softmax_cross_entropy(self, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        """Labels are int64 indices (rows,), in range, or floating point (rows, classes)."""
        rows, columns = logits.shape
        loop, dtype = _cross_entropy_loop(out.dtype), out.dtype
        z, gradient, losses = logits.reshape(-1), out.reshape(-1), np.empty(rows)
        indices = labels if labels.ndim == 1 else np.empty(0, np.int64)
        soft = labels.reshape(-1) if labels.ndim == 2 else np.empty(0, dtype)
        scale = dtype.type(1.0 / rows)

        def run(part: slice) -> None:
            lines = slice(part.start // columns, part.stop // columns)
            loop(
                z[part], columns, indices[lines], soft[part], label_smoothing, scale, losses[lines], gradient[part]
            )  # fmt: skip

        self._split(z.size, columns, run)
        return float(np.sum(losses) / rows)

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        """Mean over all elements."""
        if loss.name not in twins(out.dtype):
            return super().elementwise_loss(loss, prediction, target, parameter, out)
        loop = _loss_loop(loss.name, out.dtype)
        p, t, gradient = _apart(prediction, out), _apart(target, out), out.reshape(-1)
        sums, share = np.empty(-(-p.size // _BLOCK)), 1.0 / p.size

        def run(part: slice) -> None:
            blocks = slice(part.start // _BLOCK, -(-part.stop // _BLOCK))
            loop(p[part], t[part], parameter, share, sums[blocks], gradient[part])

        self._split(p.size, _BLOCK, run)
        return float(np.sum(sums) / p.size)

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], scalars: Scalars
    ) -> None:
        """Update `param` and its state in place."""
        if rule.name not in twins(param.dtype) or len(state) > 2:
            super().update(rule, param, grad, state, scalars)
            return
        loop = _update_loop(rule.name, param.dtype, len(state), len(scalars))
        p, g, states = param.reshape(-1), grad.reshape(-1), [s.reshape(-1) for s in state]
        self._split(p.size, 1, lambda part: loop(p[part], g[part], *(s[part] for s in states), scalars))
