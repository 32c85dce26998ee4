"""Mini-batches of a multilayer perceptron in one call, for the Numba backend.

The matrix products are NumPy's BLAS, into arrays that are made once; everything between them is compiled. Inputs that
are mostly 0 go without products: the first layer adds up rows of its weights for the numbers that are not 0, and its
update goes through the features, each with the rows of the mini-batch in which it is not 0. That sums in another order
than a product.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..._memory import aligned_zeros
from ...formulas.activations import ACTIVATIONS
from ...formulas.losses import LOSSES
from ...training.old_plan import Array, Feed, FusedLayer, MlpRun
from .loops import BLOCK, backward_loop, cross_entropy_loop, epilogue_loop, loss_loop, update_loop

Split = Callable[[int, int, Callable[[slice], None]], None]

# Sums of products may be fused, as the BLAS does.
_compile = njit(error_model="numpy", nogil=True, fastmath={"contract"})


# Samples.


@_compile
def _values(samples, where, of_byte, out):
    """Rows of bytes, as what they stand for."""
    for i in range(where.size):
        row, to = samples[where[i]], out[i]
        for k in range(row.size):
            to[k] = of_byte[row[k]]


def _values_of_bytes(dtype: np.dtype[Any]) -> Array:
    values: Array = np.arange(256, dtype=dtype) / dtype.type(255)
    return values


# Numbers that are looked at together, as most are 0.
_TOGETHER = 16


def _numbers_loop(value_of: Callable[..., Any]) -> Callable[..., Any]:
    """The numbers that are not 0 and their columns, row after row; row i has number begin[i] to begin[i + 1]."""
    value_of = njit(forceinline=True)(value_of)

    @_compile
    def loop(samples, where, table, columns, numbers, begin):
        count = 0
        for i in range(where.size):
            begin[i] = count
            row = samples[where[i]]
            for first in range(0, row.size, _TOGETHER):
                some = row[first : first + _TOGETHER]
                any_number = False
                for k in range(some.size):
                    any_number |= some[k] != 0
                if any_number:
                    for k in range(some.size):
                        # Each is written, and counts if it is not 0.
                        columns[count] = first + k
                        numbers[count] = value_of(some[k], table)
                        count += some[k] != 0
        begin[where.size] = count

    return loop  # type: ignore[no-any-return]


_numbers_of_bytes = _numbers_loop(lambda value, table: table[value])
_numbers_of_floats = _numbers_loop(lambda value, table: value)


@_compile
def _numbers_of_sparse_rows(values, row_start, all_columns, where, columns, numbers, begin):
    count = 0
    for i in range(where.size):
        begin[i] = count
        for e in range(row_start[where[i]], row_start[where[i] + 1]):
            columns[count], numbers[count] = all_columns[e], values[e]
            count += 1
    begin[where.size] = count


@_compile
def _by_feature(columns, numbers, begin, rows, feature_begin, feature_rows, feature_numbers):
    """The same, feature after feature."""
    feature_begin[:] = 0
    for e in range(begin[rows]):
        feature_begin[columns[e] + 1] += 1
    for k in range(1, feature_begin.size):
        feature_begin[k] += feature_begin[k - 1]
    for i in range(rows):
        for e in range(begin[i], begin[i + 1]):
            k = columns[e]
            place = feature_begin[k]
            feature_rows[place], feature_numbers[place] = i, numbers[e]
            feature_begin[k] = place + 1
    # Each has moved on to where the next one begins.
    for k in range(feature_begin.size - 1, 0, -1):
        feature_begin[k] = feature_begin[k - 1]
    feature_begin[0] = 0


@_compile
def _add_rows(rows, which, numbers, first, end, total):
    """``total += sum_e numbers[e] * rows[which[e]]``: four at a time, so that `total` is read and written less."""
    whole = first + (end - first) // 4 * 4
    for e in range(first, whole, 4):
        a, b, c, d = rows[which[e]], rows[which[e + 1]], rows[which[e + 2]], rows[which[e + 3]]
        p, q, r, s = numbers[e], numbers[e + 1], numbers[e + 2], numbers[e + 3]
        for j in range(total.size):
            total[j] = total[j] + p * a[j] + q * b[j] + r * c[j] + s * d[j]
    for e in range(whole, end):
        row, number = rows[which[e]], numbers[e]
        for j in range(total.size):
            total[j] += number * row[j]


@_compile
def _sparse_product(columns, numbers, begin, w, out):
    for i in range(out.shape[0]):
        out[i] = 0
        _add_rows(w, columns, numbers, begin[i], begin[i + 1], out[i])


@functools.cache
def _sparse_update_loop(name: str, dtype: np.dtype[Any], states: int, scalars: int) -> Callable[..., Any]:
    """The gradient of each feature's weights, and their update."""
    update = update_loop(name, dtype, states, scalars)

    def without_state(begin, which, numbers, grad, gradient, scalars, param):
        for k in range(param.shape[0]):
            gradient[:] = 0
            _add_rows(grad, which, numbers, begin[k], begin[k + 1], gradient)
            update(param[k], gradient, scalars)

    def with_one(begin, which, numbers, grad, gradient, scalars, param, state):
        for k in range(param.shape[0]):
            gradient[:] = 0
            _add_rows(grad, which, numbers, begin[k], begin[k + 1], gradient)
            update(param[k], gradient, state[k], scalars)

    def with_two(begin, which, numbers, grad, gradient, scalars, param, state, state2):
        for k in range(param.shape[0]):
            gradient[:] = 0
            _add_rows(grad, which, numbers, begin[k], begin[k + 1], gradient)
            update(param[k], gradient, state[k], state2[k], scalars)

    return _compile((without_state, with_one, with_two)[states])  # type: ignore[no-any-return]


@_compile
def _column_sums(rows, sums, out):
    """`sums` is float64 space for them."""
    sums[:] = 0
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            sums[j] += row[j]
    for j in range(out.size):
        out[j] = sums[j]


@_compile
def _count_right(outputs, classes):
    """Rows whose largest output, or the sign of the only one, is the class; NaN counts as the largest."""
    right = 0
    for i in range(classes.size):
        row, best = outputs[i], 0
        if row.size == 1:
            best = int(row[0] > 0)
        for j in range(1, row.size):
            if row[j] > row[best] or (row[j] != row[j] and row[best] == row[best]):
                best = j
        right += best == classes[i]
    return right


class _Sparse:
    """The numbers of a mini-batch that are not 0, by rows and by features."""

    def __init__(self, feed: Feed, features: int, batch: int, order: NDArray[np.int64], dtype: np.dtype[Any]) -> None:
        self.feed = feed
        if feed.row_start is None:
            # A group is written whole before it is counted.
            most = batch * features + _TOGETHER
        else:
            lengths = (feed.row_start[1:] - feed.row_start[:-1])[order]
            most = int(max(lengths[i : i + batch].sum() for i in range(0, len(order), batch)))
        self.columns, self.feature_rows = np.empty(most, np.int32), np.empty(most, np.int32)
        self.numbers, self.feature_numbers = np.empty(most, dtype), np.empty(most, dtype)
        self.begin, self.feature_begin = np.empty(batch + 1, np.int64), np.empty(features + 1, np.int64)
        self.of_byte = _values_of_bytes(dtype)

    def bring(self, where: NDArray[np.int64]) -> None:
        """Take the samples at `where`."""
        feed, numbers = self.feed, (self.columns, self.numbers, self.begin)
        if feed.row_start is not None:
            _numbers_of_sparse_rows(feed.x, feed.row_start, feed.columns, where, *numbers)
        elif feed.x.dtype == np.uint8:
            _numbers_of_bytes(feed.x, where, self.of_byte, *numbers)
        else:
            _numbers_of_floats(feed.x, where, self.of_byte, *numbers)

    def product(self, w: Array, out: Array) -> None:
        """``out`` = the mini-batch's rows @ w."""
        _sparse_product(self.columns, self.numbers, self.begin, w, out)

    def by_feature(self, rows: int) -> tuple[Array, ...]:
        """Where each feature's numbers begin, and their rows and values."""
        feature_lists = self.feature_begin, self.feature_rows, self.feature_numbers
        _by_feature(self.columns, self.numbers, self.begin, rows, *feature_lists)
        return feature_lists


class _Layer:
    """The arrays of a layer: its parameters, and space for a mini-batch."""

    def __init__(self, layer: FusedLayer, batch: int, split: Split) -> None:
        self.split = split
        dtype, out = layer.weight.dtype, layer.weight.shape[1]
        activation = ACTIVATIONS["identity" if layer.activation is None else layer.activation]
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_state, self.bias_state = layer.weight_state, layer.bias_state
        self.parameter = layer.activation_parameter
        self.epilogue = epilogue_loop(activation.name, dtype)
        self.backward = None if layer.activation is None else backward_loop(activation.name, dtype)
        self.y, self.grad_y = (aligned_zeros((batch, out), dtype) for _ in range(2))
        self.z = aligned_zeros((batch if activation.needs_x else 0, out), dtype)
        self.saved = self.z if activation.needs_x else self.y
        self.grad_z = self.grad_y if self.backward is None else aligned_zeros((batch, out), dtype)
        self.grad_weight, self.grad_bias = np.empty_like(layer.weight), aligned_zeros((out,), dtype)
        self.sums = np.empty(out)

    def finish_forward(self, rows: int) -> None:
        """Bias and activation, in place."""
        y, z, columns = self.y[:rows].reshape(-1), self.z[:rows].reshape(-1), self.y.shape[1]
        self.split(
            y.size, columns, lambda part: self.epilogue(y[part], columns, self.bias, self.parameter, z[part])
        )  # fmt: skip

    def begin_backward(self, rows: int) -> Array:
        """The gradient of the preactivation."""
        backward = self.backward
        if backward is not None:
            grad_y, saved, grad_z = (a[:rows].reshape(-1) for a in (self.grad_y, self.saved, self.grad_z))
            self.split(
                grad_z.size, 1, lambda part: backward(grad_y[part], saved[part], self.parameter, grad_z[part])
            )  # fmt: skip
        return self.grad_z[:rows]

    def update_weight(self, update: Callable[..., None], numbers: tuple[float, ...]) -> None:
        """A step of the rule with `grad_weight`."""
        arrays = [a.reshape(-1) for a in (self.weight, self.grad_weight, *self.weight_state)]
        self.split(arrays[0].size, 1, lambda part: update(*(a[part] for a in arrays), numbers))


def train_mlp(run: MlpRun, split: Split) -> tuple[float, int]:
    """See `NumpyBackend.train_mlp`.

    ``split(size, unit, run)`` calls `run` on slices of whole units that cover `size` elements, in several threads if
    there are many.
    """
    layers, rule, scalars = run.network
    feed, targets, loss, row_weight, order = run.feed, run.targets, run.loss, run.row_weight, run.order
    batch, loss_sum = min(run.batch, len(order)), run.loss_sum
    dtype, features = layers[0].weight.dtype, layers[0].weight.shape[0]
    stack = [_Layer(layer, batch, split) for layer in layers]
    first, last, width = stack[0], stack[-1], stack[-1].y.shape[1]
    sparse = _Sparse(feed, features, batch, order, dtype) if feed.skip_zeros else None
    x = np.empty((0 if sparse else batch, features), dtype)
    of_byte = _values_of_bytes(dtype)
    settings = dtype, len(first.weight_state), scalars.shape[1]
    update, sparse_update = update_loop(rule, *settings), _sparse_update_loop(rule, *settings)
    losses, wanted = np.empty(max(batch, -(-batch * width // BLOCK))), np.empty((batch, width), dtype)
    no_indices, no_labels = np.empty(0, np.int64), np.empty(0, dtype)
    classes = targets.ndim == 1
    if loss == "softmax_cross_entropy":
        cross_entropy = cross_entropy_loop(dtype)
    else:
        elementwise, parameter = loss_loop(loss, dtype), LOSSES[loss].default
    right = 0

    def evaluate(where: NDArray[np.int64], rows: int) -> float:
        """The sum of the losses; the last layer's gradient."""
        outputs, grad, some = last.y[:rows], last.grad_y[:rows].reshape(-1), targets[where]
        share = row_weight / rows
        if loss == "softmax_cross_entropy":
            indices, labels = (some, no_labels) if classes else (no_indices, some.reshape(-1))
            cross_entropy(
                outputs.reshape(-1), width, indices, labels, 0.0, dtype.type(share), losses[:rows], grad
            )  # fmt: skip
            return float(losses[:rows].sum())
        if classes:
            one_hot = wanted[:rows]
            one_hot[...] = 0
            if width == 1:
                one_hot[:, 0] = some
            else:
                one_hot[np.arange(rows), some] = 1
            some = one_hot
        sums = losses[: -(-outputs.size // BLOCK)]
        elementwise(outputs.reshape(-1), some.reshape(-1), parameter, share, sums, grad)
        return float(sums.sum())

    with np.errstate(all="ignore"):
        for step, start in enumerate(range(0, len(order), batch)):
            where, numbers = order[start : start + batch], tuple(scalars[step].tolist())
            rows = len(where)
            inputs = x[:rows]
            if sparse is not None:
                sparse.bring(where)
                sparse.product(first.weight, first.y[:rows])
            else:
                if feed.x.dtype == np.uint8:
                    _values(feed.x, where, of_byte, inputs)
                else:
                    np.take(feed.x, where, axis=0, out=inputs, mode="clip")
                np.matmul(inputs, first.weight, out=first.y[:rows])
            first.finish_forward(rows)
            for below, layer in itertools.pairwise(stack):
                np.matmul(below.y[:rows], layer.weight, out=layer.y[:rows])
                layer.finish_forward(rows)
            loss_sum += evaluate(where, rows) * row_weight
            if classes:
                right += _count_right(last.y[:rows], targets[where])

            for i in range(len(stack) - 1, -1, -1):
                layer, grad = stack[i], stack[i].begin_backward(rows)
                if i > 0:
                    np.matmul(grad, layer.weight.T, out=stack[i - 1].grad_y[:rows])
                _column_sums(grad, layer.sums, layer.grad_bias)
                update(layer.bias, layer.grad_bias, *layer.bias_state, numbers)
                if i == 0 and sparse is not None:
                    sparse_update(
                        *sparse.by_feature(rows), grad, layer.grad_bias, numbers, layer.weight, *layer.weight_state
                    )  # fmt: skip
                    continue
                np.matmul((inputs if i == 0 else stack[i - 1].y[:rows]).T, grad, out=layer.grad_weight)
                layer.update_weight(update, numbers)
    return loss_sum, int(right)
