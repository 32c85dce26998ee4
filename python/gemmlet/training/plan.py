"""A training step as data: networks as lists of layer operations, and the phases that a step runs in order.

`gemmlet.nn` makes one `TrainingPlan` for each `fit`; `Backend.train` executes it for the mini-batches of a call, which
are its `Batches`. The executor of `reference.py` runs any plan, phase by phase. Those of the backends fuse phases where
a plan allows it (`Backend.supports_fused`) and leave the rest to the reference.

An executor may compute phases in another order, or several at a time, where the results agree to rounding. Every
executor gives the same bits for any number of threads, and however mini-batches are divided among calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..formulas import dropout, input_noise
from ..formulas.losses import LOSSES, ROW_LOSSES
from ..formulas.random import SECOND_PASS as SECOND_PASS

Array = NDArray[Any]

# Inputs of a `Forward`, besides the outputs of other networks: rows of the dataset, and rows of noise.
SAMPLES, NOISE = "samples", "noise"
Source = str | int


class Labels(NamedTuple):
    """The classes of all samples: `values` (n,), int64 and contiguous, each of them at least 0 and below `classes`."""

    values: NDArray[np.int64]
    classes: int


class Dataset(NamedTuple):
    """Samples: rows (n, features) of uint8 or of the networks' dtype, or the three arrays of a CSR matrix.

    uint8 counts as value/255, or as `value_of_byte[value]`, of 256 numbers, the first of which is 0: a few different
    numbers, in less memory. Rows may be on a GPU, for a backend that computes there. `skip_zeros` says that enough
    numbers are 0 for skipping them to pay; the result is the same. `weights` (n,), float64 and contiguous, make the
    objective their weighted mean over the mini-batch: finite, not negative, and of a positive sum in each mini-batch.
    With `divides_by_rows` it is the weighted sum divided by the size of the mini-batch instead, and the sum may be 0.
    With `labels` the inputs of every network end in the one-hot row of the sample's class: noise, and what another
    network has made of it, belong to the samples in their order, too.
    Another thread may change all but `indptr`.
    """

    x: Array
    indptr: NDArray[np.int64] | None = None
    indices: NDArray[np.int32] | None = None
    skip_zeros: bool = False
    value_of_byte: Array | None = None
    weights: NDArray[np.float64] | None = None
    divides_by_rows: bool = False
    labels: Labels | None = None


# Layer operations.


class Parameter(NamedTuple):
    """An array that training changes in place, the optimizer's state for it, and its moving average, if wanted.

    One of several dimensions is a weight, which penalties and decay are for; one of a single one is a bias.
    """

    value: Array
    state: tuple[Array, ...] = ()
    average: Array | None = None

    @property
    def is_weight(self) -> bool:
        """Whether it is no bias."""
        return self.value.ndim > 1

    def arrays(self) -> tuple[Array | None, ...]:
        """All of them."""
        return self.value, *self.state, self.average


class Linear(NamedTuple):
    """``x @ weight + bias``: weight (in_features, out_features), bias (out_features,)."""

    weight: Parameter
    bias: Parameter


class Activation(NamedTuple):
    """An activation of the registry, and its parameter, 0 if it takes none."""

    name: str
    parameter: float


class Dropout(NamedTuple):
    """Drop the inputs of the `Linear` that follows at random, and scale those that are kept.

    ``gemmlet.formulas.dropout`` has the formula: `rate` is within [0, 1), `stream` below 2**14, `seed` below 2**64. The
    step is counted from `Batches.first_step`, a row is its place in the mini-batch.
    """

    rate: float
    stream: int
    seed: int

    @property
    def keep(self) -> int:
        """The threshold of a decision."""
        return dropout.threshold(self.rate)

    def kept(self, stream: int, step: int, rows: Any, units: int) -> NDArray[np.bool_]:
        """Which units rows at these places keep, (rows, units); `stream` is that of the `Forward`."""
        return dropout.kept(self.seed, self.stream + stream, step, rows, units, self.keep)


class InputNoise(NamedTuple):
    """Add noise to the inputs of the network, of this standard deviation; it is the first operation.

    ``gemmlet.formulas.input_noise`` has the formula; `stream`, `seed`, steps and rows are as in `Dropout`.
    """

    deviation: float
    stream: int
    seed: int

    def drawn(self, stream: int, step: int, rows: Any, units: int, dtype: np.dtype[Any]) -> Array:
        """The noise of rows at these places, (rows, units); `stream` is that of the `Forward`."""
        integers = input_noise.noise(self.seed, self.stream + stream, step, rows, units)
        with np.errstate(over="ignore"):
            return np.asarray(dtype.type(self.deviation / input_noise.DEVIATION) * integers.astype(dtype))


Network = tuple[Linear | Activation | Dropout | InputNoise, ...]


class DenseLayer(NamedTuple):
    """A `Linear`, with the `Activation` that follows it and the `Dropout` of its inputs, which executors fuse."""

    weight: Parameter
    bias: Parameter
    activation: str | None
    parameter: float
    dropout: Dropout | None = None
    noise: InputNoise | None = None


class UnsupportedError(Exception):
    """An executor does not know something of a plan; a backend leaves it to the reference then."""


def dense_layers(network: Network) -> list[DenseLayer]:
    """The network as dense layers; `UnsupportedError` if it has other operations."""
    layers: list[DenseLayer] = []
    dropped: Dropout | None = None
    noise: InputNoise | None = None
    for i, operation in enumerate(network):
        if isinstance(operation, Linear):
            layers.append(DenseLayer(*operation, None, 0.0, dropped, noise))
            dropped = noise = None
        elif isinstance(operation, InputNoise) and i == 0:
            noise = operation
        elif dropped is not None:
            raise UnsupportedError(dropped)
        elif isinstance(operation, Dropout):
            dropped = operation
        elif isinstance(operation, Activation) and layers and layers[-1].activation is None:
            layers[-1] = DenseLayer(*layers[-1][:2], *operation, *layers[-1][4:])
        else:
            raise UnsupportedError(operation)
    if dropped is not None or noise is not None:
        raise UnsupportedError(dropped or noise)
    return layers


def layers(network: Network) -> list[Any]:
    """The network as dense layers, as far as it is that, and its other operations between them."""
    found: list[Any] = []
    while network:
        for end in range(len(network), 0, -1):
            try:
                found += dense_layers(network[:end])
                break
            except UnsupportedError:
                pass
        else:
            end = 1
            found.append(network[0])
        network = network[end:]
    return found


# Phases; `network` is a position in `TrainingPlan.networks`.

NO_LIMITS = -math.inf, math.inf


class Gather(NamedTuple):
    """Gather the mini-batch's rows of the dataset, as ``scale * x + shift``, and its rows of noise, if there is any.

    A CSR matrix is not scaled.
    """

    dataset: Dataset
    scale: float = 1.0
    shift: float = 0.0


class Forward(NamedTuple):
    """Compute a network's outputs for the rows of its inputs; those of several inputs follow each other.

    `stream` is added to those of the network's dropout.
    """

    network: int
    inputs: tuple[Source, ...]
    stream: int = 0


class Loss(NamedTuple):
    """Evaluate a loss of a network's outputs, and its gradient with respect to them.

    Attributes
    ----------
    network : int
    name : str
        A row loss of the registry, or an elementwise loss with its default parameter.
    targets : ndarray or tuple of float
        For all samples of the dataset: class indices, int64 of shape (n,), in range and changed by nobody, or numbers
        (n, outputs); an elementwise loss takes class indices as one-hot rows, or as the number itself if there is one
        output. A tuple has one target for each input of the network's `Forward`.
    parameter : float, optional
        The kernel's: label smoothing of a row loss, `delta` of huber. By default what the registry says.
    reduction : {"sum", "mean"}
        Over the outputs of a row, for elementwise losses. The objective is the sum over the rows, divided by the size
        of the mini-batch; where samples have weights, the sum times these, divided by their sum.
    sign : {1.0, -1.0}
        -1 maximises.
    limits : (float, float)
        The least and the most that the loss of an element counts, of a row loss that of a row; gradients have no limit.
    """

    network: int
    name: str
    targets: Any
    parameter: float | None = None
    reduction: str = "sum"
    sign: float = 1.0
    limits: tuple[float, float] = NO_LIMITS

    @property
    def has_classes(self) -> bool:
        """Whether the targets are class indices."""
        return not isinstance(self.targets, tuple) and self.targets.ndim == 1

    @property
    def value(self) -> float:
        """`parameter`, or its default."""
        if self.parameter is not None:
            return self.parameter
        return (ROW_LOSSES.get(self.name) or LOSSES[self.name]).default


class Backward(NamedTuple):
    """Turn the gradient of a network's outputs into those of its parameters; or, with `to`, of that network's outputs.

    The parameters' gradients are left out in the second case.
    """

    network: int
    to: int | None = None


class Penalty(NamedTuple):
    """Add ``l2 / 2 * sum(w**2) + l1 * sum(|w|)`` over a network's weights to the objective.

    With `of_sum` it is added to the objective's sum over the rows, and so divided by the size of the mini-batch. Its
    gradient, 0 where a weight is 0 for L1, is added to the weights', which `Backward` has left. Biases are left out.
    """

    network: int
    l2: float
    l1: float = 0.0
    of_sum: bool = True


class GradientPenalty(NamedTuple):
    """Add ``factor / 2`` times the mean of ``|d output / d x|²`` over samples x to the objective (R1).

    Its gradient is added to the weights', which `Backward` has left; it counts in no loss. The mean is over the first
    ``ceil(rows / share)`` samples of the mini-batch. The network has one output, reads samples first, and has
    activations that are linear in pieces, whose second derivative is 0. Mescheder et al., 2018.
    """

    network: int
    factor: float
    share: int = 1

    def rows(self, batch_rows: int) -> int:
        """How many samples the mean is over."""
        return -(-batch_rows // self.share)


class AllReduce(NamedTuple):
    """Call `reduce` with the gradients of a network's parameters, to be changed in place.

    Where training is distributed, it replaces them by their mean over all processes.
    """

    network: int
    reduce: Callable[[Sequence[Array]], None]


class Update(NamedTuple):
    """Update a network's parameters by an optimizer rule, and their moving averages, if they have some.

    With `max_norm`, gradients are scaled so that the Euclidean norm of all of them together is at most this; then, with
    `clip_value`, each number of them is limited to ±`clip_value`. Both come before the weight decay of the rule, which
    biases have with `decays_biases` alone.
    """

    network: int
    rule: str
    max_norm: float | None = None
    clip_value: float | None = None
    decays_biases: bool = True


Phase = Gather | Forward | Loss | Backward | Penalty | GradientPenalty | AllReduce | Update


@dataclass(eq=False)
class TrainingPlan:
    """What a step does: `Gather`, and then phases of which each finds what it reads.

    `executors` is the backends': what each keeps of the plan from one call to the next. `is_torn` says that a call of
    `Backend.train` may have changed parameters, and has not ended.
    """

    networks: tuple[Network, ...]
    phases: tuple[Phase, ...]
    executors: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    is_torn: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        dataset = self.gather.dataset
        if dataset.weights is None and dataset.labels is None:
            return
        n = len(dataset.x) if dataset.indptr is None else len(dataset.indptr) - 1
        if dataset.weights is not None:
            _check_column(dataset.weights, n, np.float64, "weights")
        if dataset.labels is not None:
            _check_column(dataset.labels.values, n, np.int64, "labels")

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingPlan, (self.networks, self.phases)  # a copy has executors of its own

    @property
    def gather(self) -> Gather:
        """The first phase."""
        first = self.phases[0]
        assert isinstance(first, Gather)
        return first

    @property
    def losses(self) -> list[Loss]:
        """In the order of the sums that `Backend.train` returns, penalties left out."""
        return [phase for phase in self.phases if isinstance(phase, Loss)]

    def forwards(self, network: int) -> list[Forward]:
        """The forward passes of a network."""
        return [phase for phase in self.phases if isinstance(phase, Forward) and phase.network == network]

    @property
    def has_extras(self) -> bool:
        """Whether it has what not every executor knows to look for: limits of losses and the like.

        Classes among the inputs, weights of samples, dropout, noise, clipping and penalties are asked for one by one.
        """
        dataset = self.gather.dataset
        return any(loss.limits != NO_LIMITS for loss in self.losses) or dataset.value_of_byte is not None

    @property
    def gradient_penalties(self) -> list[GradientPenalty]:
        """In order."""
        return [phase for phase in self.phases if isinstance(phase, GradientPenalty)]

    @property
    def updates(self) -> list[Update]:
        """In the order of `Batches.hyperparameters`."""
        return [phase for phase in self.phases if isinstance(phase, Update)]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all parameters."""
        return next(p.value.dtype for p in self.parameters(0))

    def parameters(self, network: int) -> Iterator[Parameter]:
        """Those of a network, in order."""
        operation: Any
        for operation in self.networks[network]:
            if isinstance(operation, Linear):
                yield from operation
            elif not isinstance(operation, Activation):
                yield from (field for field in operation if isinstance(field, Parameter))

    def weight(self, loss: Loss) -> float:
        """What the sum of a row's losses counts in the objective, before that is divided by the size of the batch."""
        return loss.sign if loss.reduction == "sum" else loss.sign / self.outputs(loss.network)

    def outputs(self, network: int) -> int:
        """The number of a network's outputs."""
        return next(len(o.bias.value) for o in reversed(self.networks[network]) if isinstance(o, Linear))

    def hides_weights(self) -> bool:
        """Whether to skip zeros of the samples would hide weights: 0 times one that is not finite is NaN."""
        weight = next(self.parameters(0)).value
        return self.gather.dataset.skip_zeros and not np.isfinite(weight).all()

    @property
    def has_noise(self) -> bool:
        """Whether a network has `InputNoise`."""
        return any(isinstance(o, InputNoise) for network in self.networks for o in network)

    def activations(self) -> set[str]:
        """The names of all activations."""
        return {o.name for network in self.networks for o in network if isinstance(o, Activation)}


def _check_column(array: Array, n: int, dtype: Any, name: str) -> None:
    if array.shape != (n,) or array.dtype != dtype or not array.flags.c_contiguous:
        expected, found = f"({n},) and {np.dtype(dtype)}", f"shape {array.shape} and {array.dtype}"
        raise ValueError(f"{name}: expected a contiguous array of shape {expected}, not one of {found}")


class Batches(NamedTuple):
    """The mini-batches of one call of `Backend.train`.

    Attributes
    ----------
    order : ndarray of int64
        Which samples; `size` of them make a mini-batch, the last of which may be smaller.
    size : int
    hyperparameters : tuple of ndarray
        Of each `Update`, the hyperparameters of its rule at each step, shape (steps, count). Where they differ between
        parameters, a list of one array for each, which only the reference takes.
    losses : tuple of float
        What the losses of the rows are added to, one for each `Loss`, and the penalties of the mini-batches, one for
        each `Penalty`, in the order of the phases.
    decay : ndarray of float64, shape (steps,), optional
        Of the moving averages.
    noise : ndarray, shape (len(order), columns), optional
    meanwhile : callable, optional
        An executor whose processor would only wait for a GPU calls it while it does: it prepares the next call, and
        raises nothing.
    first_step : int, optional
        The number of the first step, from which those of the others are counted: random numbers depend on it.
    """

    order: NDArray[np.int64]
    size: int
    hyperparameters: tuple[Any, ...]
    losses: tuple[float, ...]
    decay: NDArray[np.float64] | None = None
    noise: Array | None = None
    meanwhile: Callable[[], None] | None = None
    first_step: int = 0

    @property
    def steps(self) -> int:
        """The number of mini-batches."""
        return -(-len(self.order) // self.size)

    @property
    def varies(self) -> bool:
        """Whether hyperparameters differ between the parameters of an update."""
        return list in map(type, self.hyperparameters)


class Outcome(NamedTuple):
    """What `Backend.train` returns: `Batches.losses` with the rows' losses added, and how many rows were correct.

    A row is correct if its largest output (of a single one the sign) is its class; counted where the targets of the
    first loss are class indices, else 0.
    """

    losses: tuple[float, ...]
    correct: int
