"""The compiled loops of the Numba backend: one pass each, made for a formula and a dtype when first asked for."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import njit, types

from ...formulas.augmentation import CONTROL_POINTS, WEIGHT_BITS
from ...formulas.losses import smoothing
from .formulas import scalar_kernels

# Elements in one block: a few arrays of that many fit into the first-level cache. A power of two.
BLOCK = 1024

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
def forward_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """``loop(x, parameter, out)``: ``out = activation(x)``."""
    if name == "identity":
        return lambda x, parameter, out: np.copyto(out, x)
    f = scalar_kernels(dtype)[name]

    def loop(x, parameter, out):
        for i in range(x.size):
            out[i] = f(x[i], parameter)

    return _compiled(loop, _array(dtype), types.float64, _array(dtype, written=True))


@functools.cache
def backward_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """``loop(grad_y, saved, parameter, out)``: ``out = grad_y * activation'``."""
    if name == "identity":
        return lambda grad_y, saved, parameter, out: np.copyto(out, grad_y)
    f = scalar_kernels(dtype)[f"{name}_backward"]

    def loop(grad_y, saved, parameter, out):
        for i in range(grad_y.size):
            out[i] = f(grad_y[i], saved[i], parameter)

    return _compiled(loop, _array(dtype), _array(dtype), types.float64, _array(dtype, written=True))


@functools.cache
def epilogue_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """Bias and activation over whole rows, in place; `z` takes what stands between them. Empty arrays are left out."""
    f = scalar_kernels(dtype)[name]

    def loop(y, columns, bias, parameter, z):
        step = max(1, BLOCK // columns) * columns
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
    """The sum of `BLOCK` numbers, which are overwritten: half is added to half, until one is left."""
    width = values.size // 2
    while width > 0:
        low, high = values[:width], values[width : 2 * width]
        for i in range(width):
            low[i] += high[i]
        width //= 2
    return values[0]


@functools.cache
def loss_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """Gradients of the mean, and the sum of each block of losses."""
    F = dtype.type
    f = scalar_kernels(dtype)[name]

    def loop(prediction, target, parameter, scale, sums, out):
        losses = np.empty(BLOCK)
        for block in range(sums.size):
            first = block * BLOCK
            p = prediction[first : first + BLOCK]
            t = target[first : first + BLOCK]
            gradient = out[first : first + BLOCK]
            losses[p.size :] = 0.0
            for i in range(p.size):
                losses[i], slope = f(p[i], t[i], parameter, scale)
                gradient[i] = F(slope)
            sums[block] = _tree_sum(losses)

    read, written = _array(dtype), _array(dtype, written=True)
    return _compiled(loop, read, read, types.float64, types.float64, _SUMS, written)


@functools.cache
def update_loop(name: str, dtype: np.dtype[Any], states: int, hyperparameters: int) -> Callable[..., Any]:
    """``loop(param, grad, *state, hyperparameters)``: a step of an optimizer's rule, in place."""
    f = scalar_kernels(dtype)[name]

    def without_state(param, grad, hyperparameters):
        for i in range(param.size):
            (param[i],) = f(param[i], grad[i], *hyperparameters)

    def with_one(param, grad, state, hyperparameters):
        for i in range(param.size):
            param[i], state[i] = f(param[i], grad[i], state[i], *hyperparameters)

    def with_two(param, grad, state, state2, hyperparameters):
        for i in range(param.size):
            param[i], state[i], state2[i] = f(param[i], grad[i], state[i], state2[i], *hyperparameters)

    loop: Callable[..., None] = (without_state, with_one, with_two)[states]
    written = _array(dtype, written=True)
    return _compiled(loop, written, _array(dtype), *[written] * states, types.UniTuple(types.float64, hyperparameters))


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
    exponential = scalar_kernels(dtype)["exponential"]

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
def row_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """``loop(x, columns, out)``: softmax or log_softmax of rows."""
    F = dtype.type
    shifted = _shifted_loop(dtype)
    logarithm = name == "log_softmax"

    def loop(x, columns, out):
        step = max(1, BLOCK // columns) * columns
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
def row_backward_loop(name: str, dtype: np.dtype[Any]) -> Callable[..., Any]:
    """``loop(grad_y, y, columns, out)``: the gradient with respect to its input."""
    F = dtype.type
    exponential = scalar_kernels(dtype)["exponential"]

    if name == "softmax":

        def loop(grad_y, y, columns, out):
            for first in range(0, y.size, columns):
                g, s, row = grad_y[first : first + columns], y[first : first + columns], out[first : first + columns]
                mean = F(_dot(g, s))
                for j in range(columns):
                    row[j] = s[j] * (g[j] - mean)

    else:

        def loop(grad_y, y, columns, out):
            step = max(1, BLOCK // columns) * columns
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
def cross_entropy_loop(dtype: np.dtype[Any]) -> Callable[..., Any]:
    """Of softmax: class indices, else `soft` labels; the loss of each row, and gradients times `scale`."""
    F = dtype.type
    shifted, weights = _shifted_loop(dtype), njit(forceinline=True)(smoothing)

    def loop(logits, columns, indices, soft, label_smoothing, scale, losses, out):
        step = max(1, BLOCK // columns) * columns
        differences, exponentials = np.empty(step, logits.dtype), np.empty(step, logits.dtype)
        keep, spread = weights(label_smoothing, columns)
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
                    if keep != 0.0:
                        loss = keep * (log_total - d[label])
                    if spread != 0.0:
                        loss += spread * (columns * log_total - _sum(d))
                    for j in range(columns):
                        row[j] = (p[j] / F(total) - F(spread)) * scale
                    # In float64: where the softmax is close to 1, float32 does not hold the difference.
                    row[label] = F((p[label] / total - (keep + spread)) * scale)
                else:
                    t = soft[start + first : start + first + columns]
                    weight = keep * _sum(t) + label_smoothing
                    loss = 0.0 * log_total  # NaN, if it is
                    for j in range(columns):
                        target = keep * t[j] + spread
                        if target != 0.0:
                            loss += target * (log_total - d[j])
                    for j in range(columns):
                        row[j] = F((p[j] / total * weight - (keep * t[j] + spread)) * scale)
                losses[i] = loss

    read, labels = _array(dtype), _array(np.dtype(np.int64))
    numbers = types.float64, numba.from_dtype(dtype), _SUMS
    return _compiled(loop, read, types.intp, labels, read, *numbers, _array(dtype, written=True))


# Images. The formulas of `formulas.augmentation` pixel by pixel, in integers.


@_compile
def _pixel(image, row, column):
    """A pixel, or 0 beyond the image."""
    inside = 0 <= row < image.shape[0] and 0 <= column < image.shape[1]
    return np.int64(image[row, column]) if inside else np.int64(0)


@_compile
def _warp(image, affine, points, of_row, of_column, spacing, result):
    height, width = image.shape
    by_column = np.empty((2, CONTROL_POINTS, width), np.int64)
    for axis in range(2):
        for i in range(CONTROL_POINTS):
            for x in range(width):
                total = np.int64(1 << (WEIGHT_BITS - 1))
                for j in range(x // spacing, x // spacing + 4):
                    total += points[axis, i, j] * of_column[x, j]
                by_column[axis, i, x] = total >> WEIGHT_BITS
    for y in range(height):
        for x in range(width):
            shift_x, shift_y = np.int64(2), np.int64(2)
            for i in range(y // spacing, y // spacing + 4):
                shift_x += of_row[y, i] * by_column[0, i, x]
                shift_y += of_row[y, i] * by_column[1, i, x]
            from_x = affine[0, 0] * x + affine[0, 1] * y + affine[0, 2] + (shift_x >> 2)
            from_y = affine[1, 0] * x + affine[1, 1] * y + affine[1, 2] + (shift_y >> 2)
            column, row, right, down = from_x >> 16, from_y >> 16, from_x >> 10 & 63, from_y >> 10 & 63
            first = _pixel(image, row, column) * (64 - down) + _pixel(image, row + 1, column) * down
            second = _pixel(image, row, column + 1) * (64 - down) + _pixel(image, row + 1, column + 1) * down
            result[y, x] = (first * (64 - right) + second * right + 2048) >> 12


@functools.cache
def augment_loop() -> Callable[..., Any]:
    """``loop(images, maps, points, of_row, of_column, spacing, noise, corners, out)``; what is empty is left out."""

    def loop(images, maps, points, of_row, of_column, spacing, noise, corners, out):
        result = np.empty(images.shape[1:], np.int64)
        for k in range(images.shape[0]):
            if maps.size:
                _warp(images[k], maps[k], points[k], of_row, of_column, spacing, result)
            else:
                result[:] = images[k]
            if noise.size:
                for y in range(result.shape[0]):
                    for x in range(result.shape[1]):
                        result[y, x] = min(max(result[y, x] + noise[k, y, x], 0), 255)
            if corners.size:
                result[corners[k, 0] : corners[k, 1], corners[k, 2] : corners[k, 3]] = 0
            for y in range(result.shape[0]):
                for x in range(result.shape[1]):
                    out[k, y, x] = result[y, x]

    def integers(dimensions: int) -> Any:
        return types.Array(types.int64, dimensions, "C", readonly=True)

    def images(*, written: bool) -> Any:
        return types.Array(types.uint8, 3, "C", readonly=not written)

    numbers = integers(3), integers(4), integers(2), integers(2), types.int64, integers(3), integers(2)
    return _compiled(loop, images(written=False), *numbers, images(written=True))
