"""The executor of training plans for the Numba backend.

Matmuls are NumPy's BLAS, into arrays that are allocated once per call; everything between them is compiled. Where most
inputs are 0, the first layer has no matmul: its output sums the rows of its weight for the nonzeros of a sample, its
weight gradient those of the output's gradient for the nonzeros of a feature. That sums in another order than the BLAS.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from functools import singledispatchmethod
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..._memory import aligned_zeros
from ...formulas.activations import ACTIVATIONS
from ...formulas.dropout import GROUP_UNITS, places, scale
from ...formulas.optimizers import OPTIMIZER_RULES, moving_average
from ...formulas.random import GROUP_BLOCKS, STEP_BITS
from ...training import plan as training
from ...training.plan import (
    NOISE,
    SAMPLES,
    AllReduce,
    Array,
    Backward,
    Forward,
    Gather,
    Loss,
    Penalty,
    TrainingPlan,
    Update,
)
from ...training.reference import clip_by_norm, clip_by_value, one_hot, targets_of
from .loops import BLOCK, backward_loop, cross_entropy_loop, epilogue_loop, loss_loop, update_loop

Split = Callable[[int, int, Callable[[slice], None]], None]

# Sums of products may be fused, as the BLAS does.
_compile = njit(error_model="numpy", nogil=True, fastmath={"contract"})


# Samples. Nonzeros are the three arrays of a CSR matrix: those of row i stand from indptr[i] to indptr[i + 1].


@_compile
def _decode(samples, where, table, out):
    """Rows of bytes, each replaced by its number in the table."""
    for i in range(where.size):
        row, to = samples[where[i]], out[i]
        for k in range(row.size):
            to[k] = table[row[k]]


# Elements that are skipped together if all are 0.
_GROUP = 16


def _nonzeros_loop(value_of: Callable[..., Any]) -> Callable[..., Any]:
    value_of = njit(forceinline=True)(value_of)

    @_compile
    def loop(samples, where, table, indptr, indices, values):
        count = 0
        for i in range(where.size):
            indptr[i] = count
            row = samples[where[i]]
            for first in range(0, row.size, _GROUP):
                group = row[first : first + _GROUP]
                nonzero = False
                for k in range(group.size):
                    nonzero |= group[k] != 0
                if nonzero:
                    for k in range(group.size):
                        # Without a branch: a 0 is overwritten by the next element.
                        indices[count] = first + k
                        values[count] = value_of(group[k], table)
                        count += group[k] != 0
        indptr[where.size] = count

    return loop  # type: ignore[no-any-return]


_nonzeros_of_bytes = _nonzeros_loop(lambda value, table: table[value])
_nonzeros_of_floats = _nonzeros_loop(lambda value, table: value)


@_compile
def _rows_of_csr(all_values, all_indptr, all_indices, features, where, indptr, indices, values):
    """Columns are in range, but for those that another thread has just changed: they become 0."""
    count = 0
    for i in range(where.size):
        indptr[i] = count
        for e in range(all_indptr[where[i]], all_indptr[where[i] + 1]):
            column = all_indices[e]
            if not 0 <= column < features:
                column = 0
            indices[count], values[count] = column, all_values[e]
            count += 1
    indptr[where.size] = count


@_compile
def _columns_fit(indptr, indices, features, where):
    for i in where:
        for e in range(indptr[i], indptr[i + 1]):
            if not 0 <= indices[e] < features:
                return False
    return True


@_compile
def _transpose(indptr, indices, values, rows, feature_indptr, feature_rows, feature_values):
    feature_indptr[:] = 0
    for e in range(indptr[rows]):
        feature_indptr[indices[e] + 1] += 1
    for k in range(1, feature_indptr.size):
        feature_indptr[k] += feature_indptr[k - 1]
    for i in range(rows):
        for e in range(indptr[i], indptr[i + 1]):
            k = indices[e]
            place = feature_indptr[k]
            feature_rows[place], feature_values[place] = i, values[e]
            feature_indptr[k] = place + 1
    # Each has advanced to the beginning of the next.
    for k in range(feature_indptr.size - 1, 0, -1):
        feature_indptr[k] = feature_indptr[k - 1]
    feature_indptr[0] = 0


@_compile
def _sum_rows(rows, which, values, first, end, total):
    """``total = sum_e values[e] * rows[which[e]]``: four rows at a time, so that `total` is read and written less."""
    total[:] = 0
    whole = first + (end - first) // 4 * 4
    for e in range(first, whole, 4):
        a, b, c, d = rows[which[e]], rows[which[e + 1]], rows[which[e + 2]], rows[which[e + 3]]
        p, q, r, s = values[e], values[e + 1], values[e + 2], values[e + 3]
        for j in range(total.size):
            total[j] = total[j] + p * a[j] + q * b[j] + r * c[j] + s * d[j]
    for e in range(whole, end):
        row, value = rows[which[e]], values[e]
        for j in range(total.size):
            total[j] += value * row[j]


@_compile
def _sparse_matmul(indptr, indices, values, b, out):
    for i in range(out.shape[0]):
        _sum_rows(b, indices, values, indptr[i], indptr[i + 1], out[i])


@functools.cache
def _sparse_update_loop(name: str, dtype: np.dtype[Any], states: int, count: int) -> Callable[..., Any]:
    """A step of the rule, each row of the gradient computed where it is used."""
    update = update_loop(name, dtype, states, count)

    @_compile
    def loop(indptr, rows, values, grad, hyperparameters, param, gradient, *state):
        for k in range(param.shape[0]):
            _sum_rows(grad, rows, values, indptr[k], indptr[k + 1], gradient)
            # Numba compiles the branch of this many states alone.
            if len(state) == 0:
                update(param[k], gradient, hyperparameters)
            elif len(state) == 1:
                update(param[k], gradient, state[0][k], hyperparameters)
            else:
                update(param[k], gradient, state[0][k], state[1][k], hyperparameters)

    return loop  # type: ignore[no-any-return]


# Dropout.


@njit(forceinline=True)
def _words(block, row, step, stream, key):
    """The four random words of a block: `formulas.random`, on 64-bit words."""
    low, half, key0, key1 = np.uint64(0xFFFFFFFF), np.uint64(32), key & np.uint64(0xFFFFFFFF), key >> np.uint64(32)
    a, b, c = block, row & low, step & low
    d = stream + ((row >> half) << np.uint64(16)) + ((step >> half) << np.uint64(24))
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (second >> half) ^ b ^ key0, second & low
        c, d = (first >> half) ^ d ^ key1, first & low
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & low, (key1 + np.uint64(0xBB67AE85)) & low
    return a, b, c, d


@_compile
def _draw_kept(kept, keep, places, step, stream, key):
    """`kept`, of bytes, becomes ``formulas.dropout.kept``; its rows have whole groups of units."""
    ones, half = np.uint64(0xFFFF), np.uint64(16)
    for i in range(kept.shape[0]):
        row = kept[i]
        for block in range(row.size // 8):
            # Words 0 and 1 are for the first half of a group, 2 and 3 for the second.
            at = block // GROUP_BLOCKS * GROUP_UNITS + block % GROUP_BLOCKS * 4
            a, b, c, d = _words(np.uint64(block), places[i], step, stream, key)
            for place, word in ((at, a), (at + 2, b), (at + 32, c), (at + 34, d)):
                row[place] = (word & ones) < keep
                row[place + 1] = (word >> half) < keep


@_compile
def _keep(x, kept, factor, out):
    """Rows with what is dropped 0, and the others scaled."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * factor if kept[i, j] else 0


@_compile
def _keep_nonzeros(indptr, indices, values, kept, factor):
    """The same for the nonzeros of as many rows as there are in `kept`, in place."""
    count, e = 0, 0
    for i in range(kept.shape[0]):
        indptr[i], end = count, indptr[i + 1]
        while e < end:
            indices[count], values[count] = indices[e], values[e] * factor
            count += kept[i, indices[e]]
            e += 1
    indptr[kept.shape[0]] = count


class _Dropout:
    """The dropout of the inputs of a layer: which units of `rows` rows are kept."""

    def __init__(self, dropout: training.Dropout, rows: int, units: int, dtype: np.dtype[Any], split: Split) -> None:
        self.units, self.factor, self.split = units, dtype.type(scale(dropout.keep)), split
        self._stream, self._numbers = dropout.stream, (np.uint64(dropout.keep), np.uint64(dropout.seed))
        self._kept = np.empty((rows, -(-units // GROUP_UNITS) * GROUP_UNITS), np.uint8)
        self.left = aligned_zeros((rows, units), dtype)

    def draw(self, places: NDArray[np.uint64], step: int, stream: int) -> None:
        """Draw for rows at these places."""
        (keep, key), kept = self._numbers, self._kept[: len(places)]
        width, number = kept.shape[1], np.uint64(step % (1 << STEP_BITS))

        def run(part: slice) -> None:
            rows = slice(part.start // width, part.stop // width)
            _draw_kept(kept[rows], keep, places[rows], number, np.uint64(self._stream + stream), key)

        self.split(kept.size, width, run)

    def keep(self, x: Array | _Sparse, out: Array) -> Array | _Sparse:
        """What is left of the rows that were drawn for: in `out`, or of sparse ones in themselves."""
        kept = self._kept[: len(x), : self.units]
        if isinstance(x, _Sparse):
            _keep_nonzeros(*x.by_row, kept, self.factor)
            return x
        _keep(x, kept, self.factor, out)
        return out


# Layers, losses and updates.


@_compile
def _column_sum(rows, sums, out):
    """`sums` is scratch space of float64."""
    sums[:] = 0
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            sums[j] += row[j]
    for j in range(out.size):
        out[j] = sums[j]


@_compile
def _count_correct(outputs, classes):
    """Rows whose largest output, or the sign of a single one, is the class; NaN counts as the largest."""
    correct = 0
    for i in range(classes.size):
        row, best = outputs[i], 0
        if row.size == 1:
            best = int(row[0] > 0)
        for j in range(1, row.size):
            if row[j] > row[best] or (row[j] != row[j] and row[best] == row[best]):
                best = j
        correct += best == classes[i]
    return correct


_next_average = njit(forceinline=True)(moving_average)


@njit(error_model="numpy", nogil=True)
def _move_average(average, value, decay, gain):
    """Without fused multiply-adds: the bits of the reference."""
    for i in range(average.size):
        average[i] = _next_average(average[i], value[i], decay, gain)


# Sums in any order: the same one for all numbers of threads, as a single one adds.
@njit(error_model="numpy", nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _add_penalty(weight, grad, l2, l1, has_squares):
    """Add the gradient of ``l2 / 2 * w**2 + l1 * |w|`` to `grad`; the sums of squares, if wanted, and of sizes."""
    squares, sizes = 0.0, 0.0
    for i in range(weight.size):
        w = weight[i]
        if has_squares:
            squares += np.float64(w) * np.float64(w)
        sizes += np.float64(abs(w))
        slope = -l1 if w < 0 else (l1 if w > 0 else l1 * w)
        grad[i] += l2 * w + slope
    return squares, sizes


class _Sparse:
    """The nonzeros of a mini-batch, by rows and by features."""

    def __init__(self, dataset: training.Dataset, features: int, size: int, order: Array, table: Array) -> None:
        self.dataset, self.features, self.table, self.rows = dataset, features, table, 0
        if dataset.indptr is None:
            # A group is written whole before it is counted.
            most = size * features + _GROUP
        else:
            if not _columns_fit(dataset.indptr, dataset.indices, features, order):
                raise ValueError("indices: out of range")
            lengths = np.diff(dataset.indptr)[order]
            most = int(max(lengths[i : i + size].sum() for i in range(0, len(order), size)))
        self.by_row, self.by_feature = (
            (np.empty(lists + 1, np.int64), np.empty(most, np.int32), np.empty(most, table.dtype))
            for lists in (size, features)
        )

    def gather(self, where: NDArray[np.int64]) -> None:
        """Take the samples at `where`."""
        x, indptr, indices, *_ = self.dataset
        self.rows = len(where)
        if indptr is not None:
            _rows_of_csr(x, indptr, indices, self.features, where, *self.by_row)
        else:
            gather = _nonzeros_of_bytes if x.dtype == np.uint8 else _nonzeros_of_floats
            gather(x, where, self.table, *self.by_row)

    def __len__(self) -> int:
        return self.rows

    def transpose(self) -> None:
        """Compute `by_feature`."""
        _transpose(*self.by_row, self.rows, *self.by_feature)


class _Layer:
    """The arrays of a layer: its parameters, and space for `rows` rows."""

    def __init__(self, layer: training.DenseLayer, rows: int, split: Split) -> None:
        self.split, self.parameter = split, layer.parameter
        self.weight, self.bias = layer.weight.value, layer.bias.value
        dtype, out = self.weight.dtype, self.bias.size
        activation = ACTIVATIONS[layer.activation or "identity"]
        self.epilogue = epilogue_loop(activation.name, dtype)
        self.backward = None if layer.activation is None else backward_loop(activation.name, dtype)
        self.y, self.grad_y = (aligned_zeros((rows, out), dtype) for _ in range(2))
        self.z = aligned_zeros((rows if activation.needs_x else 0, out), dtype)
        self.saved = self.z if activation.needs_x else self.y
        self.grad_z = self.grad_y if self.backward is None else aligned_zeros((rows, out), dtype)
        self.dropout = None
        if layer.dropout is not None:
            self.dropout = _Dropout(layer.dropout, rows, len(self.weight), dtype, split)
        self.x: Array | _Sparse = np.empty(0)  # the input, after dropout
        self.grad_weight, self.grad_bias = np.empty_like(self.weight), aligned_zeros((out,), dtype)
        self.sums = np.empty(out)

    def forward(self, x: Array | _Sparse) -> Array:
        """The layer's output."""
        rows, columns = len(x), self.bias.size
        if self.dropout is not None:
            x = self.dropout.keep(x, self.dropout.left[:rows])
        self.x = x
        if isinstance(x, _Sparse):
            _sparse_matmul(*x.by_row, self.weight, self.y[:rows])
        else:
            np.matmul(x, self.weight, out=self.y[:rows])
        y, z = self.y[:rows].reshape(-1), self.z[:rows].reshape(-1)
        self.split(
            y.size, columns, lambda part: self.epilogue(y[part], columns, self.bias, self.parameter, z[part])
        )  # fmt: skip
        return self.y[:rows]

    def backward_activation(self, rows: int) -> Array:
        """The gradient of the preactivation."""
        backward = self.backward
        if backward is not None:
            grad_y, saved, grad_z = (a[:rows].reshape(-1) for a in (self.grad_y, self.saved, self.grad_z))
            self.split(
                grad_z.size, 1, lambda part: backward(grad_y[part], saved[part], self.parameter, grad_z[part])
            )  # fmt: skip
        return self.grad_z[:rows]


def _loss_function(phase: Loss, rows: int, width: int, dtype: np.dtype[Any]) -> Callable[..., float]:
    """``evaluate(outputs, targets, scale, grad)``: the sum of the losses; gradients times `scale`."""
    if phase.name == "softmax_cross_entropy":
        cross_entropy, losses = cross_entropy_loop(dtype), np.empty(rows)
        no_indices, no_soft = np.empty(0, np.int64), np.empty(0, dtype)

        def evaluate(outputs: Array, targets: Array, scale: float, grad: Array) -> float:
            labels = (targets, no_soft) if targets.ndim == 1 else (no_indices, targets.reshape(-1))
            numbers = phase.value, dtype.type(scale), losses[: len(outputs)]
            cross_entropy(outputs.reshape(-1), width, *labels, *numbers, grad.reshape(-1))
            return float(losses[: len(outputs)].sum())

    else:
        elementwise, parameter = loss_loop(phase.name, dtype), phase.value
        sums = np.empty(-(-rows * width // BLOCK))

        def evaluate(outputs: Array, targets: Array, scale: float, grad: Array) -> float:
            targets, blocks = one_hot(targets, outputs.shape, dtype), sums[: -(-outputs.size // BLOCK)]
            elementwise(outputs.reshape(-1), targets.reshape(-1), parameter, scale, blocks, grad.reshape(-1))
            return float(blocks.sum())

    return evaluate


class _Executor:
    """A call of `train`: `prepare` gives what each phase does in a step; the memory for it is allocated once.

    `where` are the samples of the mini-batch of a `step`; `losses` and `correct` are those of `Outcome`.
    """

    def __init__(self, plan: TrainingPlan, batches: training.Batches, split: Split) -> None:
        self._plan, self._batches, self._split, self._dtype = plan, batches, split, plan.dtype
        self.size, self.losses, self.correct = min(batches.size, len(batches.order)), list(batches.losses), 0
        self.step, self.where = 0, batches.order
        # Of the losses and the updates, in the order of the phases, which may be equal.
        self._numbers, self._tables = itertools.count(), iter(batches.hyperparameters)
        # The rows of each source, and of each network at most, in mini-batches.
        multiples: dict[training.Source, int] = {SAMPLES: 1, NOISE: 1}
        most = [0] * len(plan.networks)
        for phase in plan.phases:
            if isinstance(phase, Forward):
                multiples[phase.network] = sum(multiples[source] for source in phase.inputs)
                most[phase.network] = max(most[phase.network], multiples[phase.network])
        self._layers = [
            [_Layer(layer, self.size * multiple, split) for layer in training.dense_layers(network)]
            for network, multiple in zip(plan.networks, most, strict=True)
        ]
        self._sparse: _Sparse | None = None
        # The input's weight gradient is not written, unless it is needed as a whole.
        self._whole_gradients = any(
            isinstance(p, AllReduce | Penalty) or (isinstance(p, Update) and (p.max_norm, p.clip_value) != (None, None))
            for p in plan.phases
        )
        self._values: dict[training.Source, Any] = {}

    def _places(self, rows: int) -> NDArray[np.uint64]:
        """Those of so many rows in the mini-batch."""
        return places(rows, len(self.where)).astype(np.uint64)

    def _inputs_of(self, network: int) -> int:
        """How many inputs a network has, but for the classes."""
        labels = self._plan.gather.dataset.labels
        return len(self._layers[network][0].weight) - (0 if labels is None else labels.classes)

    def _gradients(self, network: int) -> list[Array]:
        return [grad for layer in self._layers[network] for grad in (layer.grad_weight, layer.grad_bias)]

    @singledispatchmethod
    def prepare(self, phase: Any) -> Callable[[], None]:
        """What the phase does in a step."""
        raise TypeError(f"no phase of a plan: {phase}")

    @prepare.register
    def _(self, phase: Gather) -> Callable[[], None]:
        dataset, noise, size = phase.dataset, self._batches.noise, self.size

        def scale(numbers: Array) -> Array:
            if (phase.scale, phase.shift) != (1.0, 0.0):
                numbers *= phase.scale
                numbers += phase.shift
            return numbers

        table = scale(np.arange(256, dtype=self._dtype) / self._dtype.type(255))
        if dataset.skip_zeros:
            features = len(self._layers[0][0].weight)
            self._sparse = _Sparse(dataset, features, size, self._batches.order, table)
        samples = np.empty((0 if self._sparse else size, dataset.x.shape[-1]), self._dtype)
        sparse = self._sparse

        def run() -> None:
            if sparse is not None:
                sparse.gather(self.where)
                self._values[SAMPLES] = sparse
            else:
                x = self._values[SAMPLES] = samples[: len(self.where)]
                if dataset.x.dtype == np.uint8:
                    _decode(dataset.x, self.where, table, x)
                else:
                    scale(np.take(dataset.x, self.where, axis=0, out=x, mode="clip"))
            if noise is not None:
                self._values[NOISE] = noise[self.step * size :][: len(self.where)]

        return run

    @prepare.register
    def _(self, phase: Forward) -> Callable[[], None]:
        layers, several = self._layers[phase.network], len(phase.inputs) > 1
        labels = self._plan.gather.dataset.labels
        joined = np.empty((len(layers[0].y) if several or labels else 0, len(layers[0].weight)), self._dtype)
        columns = slice(0, self._inputs_of(phase.network))

        def run() -> None:
            inputs = [self._values[source] for source in phase.inputs]
            if labels is not None:
                x = joined[: sum(map(len, inputs))]
                np.concatenate(inputs, out=x[:, columns])
                x[:, columns.stop :] = (
                    np.arange(labels.classes) == np.tile(labels.values[self.where], len(inputs))[:, None]
                )
            else:
                x = np.concatenate(inputs, out=joined[: sum(map(len, inputs))]) if several else inputs[0]
            for layer in layers:
                if layer.dropout is not None:
                    layer.dropout.draw(self._places(len(x)), self._batches.first_step + self.step, phase.stream)
                x = layer.forward(x)
            self._values[phase.network] = x

        return run

    @prepare.register
    def _(self, phase: Loss) -> Callable[[], None]:
        number = next(self._numbers)
        last = self._layers[phase.network][-1]
        evaluate = _loss_function(phase, len(last.y), last.bias.size, self._dtype)
        weight = self._plan.weight(phase)

        def run() -> None:
            outputs, rows = self._values[phase.network], len(self.where)
            wanted = targets_of(phase, self.where, outputs)
            if wanted.ndim == 1 and number == 0:
                self.correct += int(_count_correct(outputs, wanted))
            total = evaluate(outputs, wanted, weight / rows, last.grad_y[: len(outputs)])
            self.losses[number] += total * weight

        return run

    @prepare.register
    def _(self, phase: Backward) -> Callable[[], None]:
        layers = self._layers[phase.network]
        below = None if phase.to is None else self._layers[phase.to][-1]
        weights = [layer.weight for layer in layers]
        weights[0] = weights[0][: self._inputs_of(phase.network)]

        def run() -> None:
            rows = len(self._values[phase.network])
            for i in range(len(layers) - 1, -1, -1):
                grad, previous = layers[i].backward_activation(rows), layers[i - 1] if i > 0 else below
                if previous is not None:
                    grad_x = previous.grad_y[:rows]
                    np.matmul(grad, weights[i].T, out=grad_x)
                    if (dropout := layers[i].dropout) is not None:
                        dropout.keep(grad_x, grad_x)
                if phase.to is None:
                    x = layers[i].x
                    _column_sum(grad, layers[i].sums, layers[i].grad_bias)
                    if not isinstance(x, _Sparse):
                        np.matmul(x.T, grad, out=layers[i].grad_weight)
                        continue
                    x.transpose()
                    if self._whole_gradients:
                        _sparse_matmul(*x.by_feature, grad, layers[i].grad_weight)

        return run

    @prepare.register
    def _(self, phase: Penalty) -> Callable[[], None]:
        number, F = next(self._numbers), self._dtype.type
        weights = [
            (p.value.reshape(-1), grad.reshape(-1))
            for p, grad in zip(self._plan.parameters(phase.network), self._gradients(phase.network), strict=True)
            if p.is_weight
        ]

        def run() -> None:
            rows = len(self.where)
            share = rows if phase.of_sum else 1
            l2, l1, has_squares = F(phase.l2 / share), F(phase.l1 / share), phase.l2 != 0
            for weight, grad in weights:
                squares, sizes = _add_penalty(weight, grad, l2, l1, has_squares)
                self.losses[number] += (0.5 * phase.l2 * squares + phase.l1 * sizes) * (rows / share)

        return run

    @prepare.register
    def _(self, phase: AllReduce) -> Callable[[], None]:
        return lambda: phase.reduce(self._gradients(phase.network))

    @prepare.register
    def _(self, phase: Update) -> Callable[[], None]:
        gradients, decays, F = self._gradients(phase.network), self._batches.decay, self._dtype.type
        table = table_of_biases = next(self._tables)
        if not phase.decays_biases:
            table_of_biases = OPTIMIZER_RULES[phase.rule].without_decay(table)
        parameters, first = list(self._plan.parameters(phase.network)), self._layers[phase.network][0]
        kind = phase.rule, self._dtype, len(parameters[0].state), table.shape[1]
        update, sparse = update_loop(*kind), None if self._whole_gradients else self._sparse
        flat = [
            [array.reshape(-1) for array in (p.value, grad, *p.state)]
            for p, grad in zip(parameters, gradients, strict=True)
        ]
        weights, biases = flat[::2], flat[1::2]
        if phase.network == 0 and sparse is not None:
            sparse_update = _sparse_update_loop(*kind)
            del weights[0]
        averages = [[p.average.reshape(-1), p.value.reshape(-1)] for p in parameters if p.average is not None]

        def in_parts(loop: Callable[..., None], arrays: list[Array], *numbers: Any) -> None:
            self._split(arrays[0].size, 1, lambda part: loop(*(a[part] for a in arrays), *numbers))

        def run() -> None:
            hyperparameters, decay = tuple(table[self.step].tolist()), 0.0 if decays is None else decays[self.step]
            if phase.max_norm is not None:
                clip_by_norm(gradients, phase.max_norm)
            if phase.clip_value is not None:
                clip_by_value(gradients, phase.clip_value)
            of_biases = tuple(table_of_biases[self.step].tolist())
            for arrays in biases:
                update(*arrays, of_biases)
            for arrays in weights:
                in_parts(update, arrays, hyperparameters)
            if phase.network == 0 and sparse is not None:
                # The bias gradient is done with, and aligned space for a row.
                grad = first.grad_z[: len(self.where)]
                value, state = parameters[0].value, parameters[0].state
                sparse_update(*sparse.by_feature, grad, hyperparameters, value, first.grad_bias, *state)
            for arrays in averages:
                in_parts(_move_average, arrays, F(decay), F(1.0 - decay))

        return run


def train(plan: TrainingPlan, batches: training.Batches, split: Split) -> training.Outcome:
    """See `Backend.train`; the plan is one that `NumbaBackend.supports_fused`, each update has one table.

    ``split(size, unit, run)`` calls `run` on slices of whole units that cover `size` elements, in several threads if
    there are many.
    """
    executor = _Executor(plan, batches, split)
    actions = [executor.prepare(phase) for phase in plan.phases]
    plan.is_torn = True
    with np.errstate(all="ignore"):
        for executor.step in range(batches.steps):
            executor.where = batches.order[executor.step * executor.size :][: executor.size]
            for action in actions:
                action()
    plan.is_torn = False
    return training.Outcome(tuple(executor.losses), executor.correct)
