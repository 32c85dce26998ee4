"""The reference executor: a training plan, phase by phase, with the kernels of any backend.

It gives the bits of the same step written with the public functions of `gemmlet.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import singledispatchmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formulas.activations import ACTIVATIONS
from ..formulas.dropout import places, scale
from ..formulas.losses import LOSSES, ROW_LOSSES, smoothing
from ..formulas.optimizers import OPTIMIZER_RULES, moving_average
from . import plan as training
from .plan import (
    NO_LIMITS,
    NOISE,
    SAMPLES,
    Activation,
    AllReduce,
    Array,
    Backward,
    DenseLayer,
    Forward,
    Gather,
    Loss,
    Penalty,
    TrainingPlan,
    Update,
)


def train(backend: Any, plan: TrainingPlan, batches: training.Batches) -> training.Outcome:
    """See `Backend.train`."""
    given, plan, losses, correct = plan, _on_cpu(backend, plan), list(batches.losses), 0
    given.is_torn = False
    for number in range(batches.steps):
        rows = slice(number * batches.size, (number + 1) * batches.size)
        noise = None if batches.noise is None else batches.noise[rows]
        step = Step(backend, plan, batches.order[rows], noise, batches.first_step + number)
        tables = iter(batches.hyperparameters)
        for phase in plan.phases:
            if isinstance(phase, Update):
                given.is_torn = True
                table = next(tables)
                decay = 0.0 if batches.decay is None else float(batches.decay[number])
                step.update(phase, [t[number] for t in table] if isinstance(table, list) else table[number], decay)
            else:
                step.run(phase)
        losses = [total + loss * step.rows for total, loss in zip(losses, step.losses, strict=True)]
        correct += step.correct
    given.is_torn = False
    return training.Outcome(tuple(losses), correct)


def gradients(backend: Any, plan: TrainingPlan, rows: int, noise: Array | None = None, number: int = 0) -> Step:
    """The step of this number of a plan without updates, the first `rows` samples being the mini-batch."""
    step = Step(backend, _on_cpu(backend, plan), np.arange(rows), noise, number)
    for phase in plan.phases:
        step.run(phase)
    return step


def _on_cpu(backend: Any, plan: TrainingPlan) -> TrainingPlan:
    """The plan with its samples on the CPU."""
    gather = plan.gather
    dataset = gather.dataset._replace(x=backend.to_cpu(gather.dataset.x))
    return replace(plan, phases=(gather._replace(dataset=dataset), *plan.phases[1:]))


class _Record(NamedTuple):
    """What the backward pass of a layer needs of its forward pass.

    `x` is the input without what was dropped, `factors` what it was multiplied by, `saved` the activation's input or
    output.
    """

    x: Array
    saved: Array
    factors: Array | None


class Operation(NamedTuple):
    """How a layer operation is computed that is no part of a dense layer.

    ``forward(backend, operation, x)`` returns y and what backward needs of it; ``backward(backend, operation, kept,
    grad_y)`` the gradients of x and, in order, of the operation's parameters.
    """

    forward: Callable[[Any, Any, Array], tuple[Array, Any]]
    backward: Callable[[Any, Any, Any, Array], tuple[Array, list[Array]]]


def _activate(backend: Any, activation: Activation, x: Array) -> tuple[Array, Array]:
    entry, y = ACTIVATIONS[activation.name], np.empty_like(x)
    backend.activation(entry, x, activation.parameter, y)
    return y, x if entry.needs_x else y


def _deactivate(backend: Any, activation: Activation, saved: Array, grad_y: Array) -> tuple[Array, list[Array]]:
    grad_x = np.empty_like(grad_y)
    backend.activation_backward(ACTIVATIONS[activation.name], grad_y, saved, activation.parameter, grad_x)
    return grad_x, []


OPERATIONS: dict[type, Operation] = {Activation: Operation(_activate, _deactivate)}


class Step:
    """One step, and what its phases leave behind; `rows` is the size of the mini-batch, `correct` as in `Outcome`.

    `number` is that of the step, which random numbers depend on.
    """

    def __init__(
        self, backend: Any, plan: TrainingPlan, where: NDArray[np.int64], noise: Array | None = None, number: int = 0
    ) -> None:
        self._backend, self._plan, self._where, self._noise = backend, plan, where, noise
        self._number = number
        self._layers = [[self._rounded(layer) for layer in training.layers(network)] for network in plan.networks]
        self._values: dict[training.Source, Array] = {}
        self._records: dict[int, list[Any]] = {}  # of each dense layer a _Record
        self._grad: dict[int, Array] = {}  # of a network's outputs
        self.rows, self.correct = len(where), 0
        dataset = plan.gather.dataset
        self._weights = None if dataset.weights is None else dataset.weights[where]
        # What the sum of the rows' losses is divided by.
        self._weight_sum = float(self.rows)
        if self._weights is not None:
            total = float(self._weights.sum())
            if not ((self._weights >= 0).all() and (total > 0 or dataset.divides_by_rows) and total < math.inf):
                raise ValueError("weights: expected finite numbers, none of them negative, of a positive sum")
            if not dataset.divides_by_rows:
                self._weight_sum = total
        # Of each `Loss` and `Penalty`, divided by the size of the mini-batch, or the sum of its weights.
        self.losses: list[float] = []
        # One-hot rows of the samples' classes.
        self._classes = None
        if (labels := dataset.labels) is not None:
            self._classes = one_hot(labels.values[where], (self.rows, labels.classes), plan.dtype)
        self.gradients: dict[int, list[Array]] = {}  # by network, of all parameters; what `Backward` gives

    def _rounded(self, layer: Any) -> Any:
        """The public kernels round an activation's parameter to the dtype."""
        if not isinstance(layer, DenseLayer | Activation):
            return layer
        return layer._replace(parameter=float(self._plan.dtype.type(layer.parameter)))

    @singledispatchmethod
    def run(self, phase: Any) -> None:
        """Do a phase: any but `Update`, which needs hyperparameters."""
        raise TypeError(f"no phase of a plan: {phase}")

    @run.register
    def _(self, phase: Gather) -> None:
        dataset, where, dtype = phase.dataset, self._where, self._plan.dtype
        if dataset.indptr is None:
            rows = dataset.x[where] if dataset.value_of_byte is None else dataset.value_of_byte[dataset.x[where]]
            self._values[SAMPLES] = self._backend.scaled(rows, dtype, phase.scale, phase.shift)
        else:
            assert dataset.indices is not None
            reader = next(p for p in self._plan.phases if isinstance(p, Forward) and SAMPLES in p.inputs)
            features = len(self._layers[reader.network][0].weight.value)
            if dataset.labels is not None:
                features -= dataset.labels.classes
            rows = np.zeros((len(where), features), dtype)
            for row, sample in zip(rows, where, strict=True):
                numbers = slice(dataset.indptr[sample], dataset.indptr[sample + 1])
                try:
                    # As unsigned numbers, negative ones are out of range.
                    row[dataset.indices[numbers].astype(np.uint32)] = dataset.x[numbers]
                except IndexError as error:
                    raise ValueError(f"indices: {error}") from error
            self._values[SAMPLES] = rows
        if self._noise is not None:
            self._values[NOISE] = self._noise

    @run.register
    def _(self, phase: Forward) -> None:
        inputs = [self._values[source] for source in phase.inputs]
        x = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        if self._classes is not None:
            x = np.hstack([x, np.tile(self._classes, (len(inputs), 1))])
        records = self._records[phase.network] = []
        for layer in self._layers[phase.network]:
            if not isinstance(layer, DenseLayer):
                x, kept = OPERATIONS[type(layer)].forward(self._backend, layer, x)
                records.append(kept)
                continue
            entry, factors = None if layer.activation is None else ACTIVATIONS[layer.activation], None
            # Those of the samples' classes are neither noisy nor dropped.
            units = x.shape[1] if records or self._classes is None else x.shape[1] - self._classes.shape[1]
            if layer.noise is not None:
                where, x = places(len(x), self.rows), x.copy()
                with np.errstate(all="ignore"):
                    x[:, :units] += layer.noise.drawn(phase.stream, self._number, where, units, x.dtype)
            if layer.dropout is not None:
                decisions = layer.dropout.kept(phase.stream, self._number, places(len(x), self.rows), units)
                factors = np.ones_like(x)
                factors[:, :units] = decisions * x.dtype.type(scale(layer.dropout.keep))
                x = _times(x, factors)
            y = np.empty((len(x), layer.bias.value.size), x.dtype)
            z = np.empty_like(y) if entry is not None and entry.needs_x else None
            self._backend.linear(x, layer.weight.value, layer.bias.value, entry, layer.parameter, y, z)
            records.append(_Record(x, y if z is None else z, factors))
            x = y
        self._values[phase.network] = x

    @run.register
    def _(self, phase: Loss) -> None:
        outputs = self._values[phase.network]
        grad = np.empty_like(outputs)
        # The kernels' mean is over all rows, and of elementwise losses over the outputs; the objective's is not.
        factor = phase.sign * len(outputs) / self.rows
        wanted = targets_of(phase, self._where, outputs)
        if wanted.ndim == 1 and not self.losses:
            self.correct = int(np.count_nonzero(predicted_classes(outputs) == wanted))
        if phase.name in ROW_LOSSES:
            loss = self._backend.row_loss(ROW_LOSSES[phase.name], outputs, wanted, phase.value, grad)
        else:
            entry = LOSSES[phase.name]
            if phase.reduction == "sum":
                factor *= outputs.shape[1]
            wanted = one_hot(wanted, outputs.shape, outputs.dtype)
            loss = self._backend.elementwise_loss(entry, outputs, wanted, phase.value, grad)
        weights = None
        if self._weights is not None:
            # In units of their mean. The share of the sum comes first: no product of small or large ones overflows.
            weights = np.tile(self._weights / self._weight_sum * self.rows, len(outputs) // self.rows)
        if phase.limits != NO_LIMITS or weights is not None:
            loss = limited_loss(phase, outputs, wanted, weights)
        grad *= factor
        if weights is not None:
            grad *= weights[:, np.newaxis].astype(grad.dtype)
        self._grad[phase.network] = grad
        self.losses.append(loss * factor)

    @run.register
    def _(self, phase: Backward) -> None:
        backend, grad, gradients = self._backend, self._grad[phase.network], list[Array]()
        layers, records = self._layers[phase.network], self._records[phase.network]
        for i in range(len(layers) - 1, -1, -1):
            if not isinstance(layers[i], DenseLayer):
                grad, own = OPERATIONS[type(layers[i])].backward(backend, layers[i], records[i], grad)
                gradients += own[::-1]
                continue
            weight, record, grad_z = layers[i].weight.value, records[i], grad
            if layers[i].activation is not None:
                grad_z, entry = np.empty_like(grad), ACTIVATIONS[str(layers[i].activation)]
                backend.activation_backward(entry, grad, record.saved, layers[i].parameter, grad_z)
            if i > 0 or phase.to is not None:
                grad = np.empty((len(grad_z), len(weight)), grad_z.dtype)
                backend.matmul(grad_z, weight.T, grad)
                if record.factors is not None:
                    grad = _times(grad, record.factors)
            if phase.to is None:
                grad_weight, grad_bias = np.empty_like(weight), np.empty_like(layers[i].bias.value)
                backend.matmul(record.x.T, grad_z, grad_weight)
                backend.column_sum(grad_z, grad_bias)
                gradients += grad_bias, grad_weight
        if phase.to is None:
            self.gradients[phase.network] = gradients[::-1]
        else:
            self._grad[phase.to] = np.ascontiguousarray(grad[:, : self._values[phase.to].shape[1]])

    @run.register
    def _(self, phase: Penalty) -> None:
        share, loss = self._weight_sum if phase.of_sum else 1.0, 0.0
        for p, grad in zip(self._plan.parameters(phase.network), self.gradients[phase.network], strict=True):
            if p.is_weight:
                penalty, slope = penalty_of(p.value, phase.l2 / share, phase.l1 / share)
                grad += slope
                loss += penalty
        self.losses.append(loss)

    @run.register
    def _(self, phase: training.GradientPenalty) -> None:
        backend, rows = self._backend, slice(0, phase.rows(self.rows))
        layers, records, gradients = self._layers[phase.network], self._records[phase.network], []
        weights, features = [layer.weight.value for layer in layers], self._values[SAMPLES].shape[1]

        def times_slopes(i: int, numbers: Array) -> Array:
            """By the derivative of layer i's activation."""
            if layers[i].activation is None:
                return numbers
            saved, result = np.ascontiguousarray(records[i].saved[rows]), np.empty_like(numbers)
            entry = ACTIVATIONS[str(layers[i].activation)]
            backend.activation_backward(entry, numbers, saved, layers[i].parameter, result)
            return result

        def times_factors(i: int, numbers: Array) -> Array:
            """By those of the dropout of layer i's inputs."""
            factors = records[i].factors
            return numbers if factors is None else _times(numbers, factors[rows])

        # Backward from 1: the derivatives by each layer's preactivations, and by the samples.
        grad = np.ones((rows.stop, 1), self._plan.dtype)
        grads = [grad]
        for i in range(len(layers) - 1, -1, -1):
            grads[0] = times_slopes(i, grads[0])
            grads.insert(0, np.empty((rows.stop, len(weights[i])), grad.dtype))
            backend.matmul(grads[1], weights[i].T, grads[0])
            grads[0] = times_factors(i, grads[0])
        # Forward from those, by the slopes that the samples have: the linear map of which the penalty is a square.
        x = np.zeros_like(grads[0])
        x[:, :features] = grads[0][:, :features]
        for i, weight in enumerate(weights):
            x = times_factors(i, x)
            backend.matmul(x.T, grads[i + 1], penalty := np.empty_like(weight))
            gradients.append(penalty)
            backend.matmul(x, weight, y := np.empty((rows.stop, weight.shape[1]), grad.dtype))
            x = times_slopes(i, y)
        for grad, penalty in zip(self.gradients[phase.network][::2], gradients, strict=True):
            grad += penalty * (phase.factor / rows.stop)

    @run.register
    def _(self, phase: AllReduce) -> None:
        phase.reduce(self.gradients[phase.network])

    def update(self, phase: Update, hyperparameters: Any, decay: float) -> None:
        """Do an update; `hyperparameters` are numbers, or a list of as many for each parameter."""
        gradients = self.gradients[phase.network]
        if phase.max_norm is not None:
            clip_by_norm(gradients, phase.max_norm)
        if phase.clip_value is not None:
            clip_by_value(gradients, phase.clip_value)
        rule = OPTIMIZER_RULES[phase.rule]
        for i, (p, grad) in enumerate(zip(self._plan.parameters(phase.network), gradients, strict=True)):
            numbers = hyperparameters[i] if isinstance(hyperparameters, list) else hyperparameters
            if not (phase.decays_biases or p.is_weight):
                numbers = rule.without_decay(numbers)
            self._backend.update(rule, p.value, grad, p.state, tuple(numbers.tolist()))
            if (average := p.average) is not None:
                average[...] = moving_average(average, p.value, decay, 1.0 - decay)


def _times(x: Array, factors: Array) -> Array:
    """The product; 0 where a factor is, whatever x is."""
    with np.errstate(all="ignore"):
        return np.asarray(np.multiply(x, factors, out=np.zeros_like(x), where=factors != 0))


def predicted_classes(outputs: Array) -> NDArray[np.int64]:
    """The class of each row: its largest output, NaN counting as the largest; of a single one whether it is above 0."""
    return (outputs[:, 0] > 0).astype(np.int64) if outputs.shape[1] == 1 else np.argmax(outputs, axis=1)


def targets_of(phase: Loss, where: NDArray[np.int64], outputs: Array) -> Array:
    """The targets of a mini-batch's outputs, of the samples at `where`."""
    if not isinstance(phase.targets, tuple):
        return phase.targets[where]  # type: ignore[no-any-return]
    return np.repeat(np.array(phase.targets, outputs.dtype), len(outputs) // len(phase.targets))[:, np.newaxis]


def limited_loss(phase: Loss, outputs: Array, targets: Array, weights: Array | None) -> float:
    """The mean loss, as the kernels have it, of a loss with limits, or of rows with weights."""
    z = outputs.astype(np.float64)
    if phase.name in ROW_LOSSES:
        keep, spread = smoothing(phase.value, z.shape[1])
        wanted = keep * one_hot(targets, z.shape, z.dtype) + spread
        losses, _ = ROW_LOSSES[phase.name].evaluate(z, wanted)
    else:
        losses, _ = LOSSES[phase.name].evaluate(z, targets.astype(np.float64), phase.value, 1.0)
    of_rows = np.clip(losses, *phase.limits).reshape(len(z), -1).mean(axis=1)
    return float(np.mean(of_rows if weights is None else of_rows * weights))


def one_hot(targets: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Targets of an elementwise loss, in the shape of the outputs: class indices as one-hot rows, see `Loss`."""
    if targets.ndim == 2:
        return targets
    rows = np.zeros(shape, dtype)
    if shape[1] == 1:
        rows[:, 0] = targets
    else:
        rows[np.arange(len(targets)), targets] = 1.0
    return rows


def penalty_of(weight: Array, l2: float, l1: float) -> tuple[float, Array]:
    """``l2 / 2 * sum(w**2) + l1 * sum(|w|)``, in float64, and its gradient; that of ``|0|`` is 0."""
    loss, slope = 0.0, l2 * weight
    if l2:  # squares may overflow
        loss = 0.5 * l2 * float(np.sum(np.square(weight, dtype=np.float64)))
    if l1:
        loss += l1 * float(np.sum(np.abs(weight), dtype=np.float64))
        slope += l1 * np.sign(weight)
    return loss, slope


def clip_by_value(gradients: Sequence[Array], clip_value: float) -> None:
    """Limit each number of the arrays to ±`clip_value` in place; NaN stays NaN."""
    with np.errstate(over="ignore"):  # a limit beyond the dtype is none
        for grad in gradients:
            np.clip(grad, -clip_value, clip_value, out=grad)


def clip_by_norm(gradients: Sequence[Array], max_norm: float) -> None:
    """Scale arrays in place so that the Euclidean norm of all of them together is at most `max_norm`.

    Computed in float64. Where the norm is not finite, nothing is scaled. Source: Pascanu et al., 2013.
    """
    norm = math.sqrt(sum(float(np.sum(np.square(grad, dtype=np.float64))) for grad in gradients))
    if max_norm < norm < math.inf:
        for grad in gradients:
            grad *= max_norm / norm
