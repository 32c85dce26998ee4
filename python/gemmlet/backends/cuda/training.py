"""The CUDA executor of training plans: the mini-batches of a call, from one wait for the GPU to the next.

At the start of a call all that it needs goes to the GPU: the order of the samples, the rules' hyperparameters, noise.
At its end the losses come back. In between, a step is a handful of launches (csrc/cuda/training), made from the plan's
phases and recorded once for each number of rows as a graph that knows from a counter on the GPU which step it is; or a
cluster of blocks takes hundreds of steps in one launch (csrc/cuda/training/cluster.cuh). What the next call needs is
prepared meanwhile.

A plan's `Session` keeps on the GPU what calls share: dataset and targets, the graphs, and parameters and optimizer
states, which go there with the first call and come back by `write_back`.

Results depend on the GPU only by whether a cluster trains (`Session._cluster_size`): otherwise which kernels compute a
step follows from its sizes alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...formulas import dropout, input_noise
from ...formulas.activations import ACTIVATIONS
from ...formulas.losses import smoothing
from ...formulas.optimizers import OPTIMIZER_RULES
from ...training import plan as training
from ...training.plan import (
    NOISE,
    SAMPLES,
    Array,
    Backward,
    Forward,
    Gather,
    GradientPenalty,
    Loss,
    TrainingPlan,
    Update,
)
from .declarations import constant, places, struct
from .device import Device, Graph
from .types import CPP_TYPES, address

CLUSTER_SOURCE = "training/cluster.cuh"

# The files of csrc/cuda/training by the kernels of a step, but for kernels that have a file of their own name.
_SOURCES = dict.fromkeys(("first_forward", "forward", "backward", "forward_penalty"), "dense")
_SOURCES |= dict.fromkeys(("first_forward_and_gather", "expand", "change_inputs"), "gather")

# Sources that not every architecture compiles, and those that do.
ARCHITECTURES = {CLUSTER_SOURCE: ("sm_90a", "host")}

# This many tiles keep a GPU busy: then larger ones, which read less, are faster. By occupancy arithmetic: the
# multiprocessors of a large GPU, not all of which need work. (On an H100 48 and 200 made no difference to a step of the
# perceptron for MNIST.)
ENOUGH_TILES = 96

# Up to this many tiles a multiprocessor has one block, which may be a large one; of more tiles two blocks share one.
MAX_LARGE_BLOCKS = 128

# The last layer goes with the loss in one kernel if it has at most these outputs, and if reading its weights anew for
# each row comes to at most these bytes: some microseconds of the L2 cache, as long as the launches that are saved. By
# arithmetic; not measured yet.
MAX_TOP_OUTPUTS = 64
MAX_TOP_BYTES = 8 << 20

# Steps in a graph, where there are as many: between graphs a GPU waits longer than within one. (32 were not faster.)
STEPS_TOGETHER = 8

# The blocks of the cluster that does all steps of a call of a perceptron with one hidden layer where it can
# (training/cluster.cuh): the smallest size that has enough of them. On an H200 an epoch of MNIST, batch 64, took half
# as long as by graphs with SGD, and two thirds with Adam; benchmarks/gpu_training.py times both.
CLUSTER_SIZES: tuple[int, ...] = (8, 16)

# A cluster of 16 needs as many multiprocessors of one part of the GPU: a whole one, and not a part of it.
_CLUSTER_MULTIPROCESSORS = 100

# Mini-batches are arranged for the cluster before a launch of it, at most this many bytes.
MAX_ARRANGED_BYTES = 128 << 20

# Of training/cluster.cuh.
_CLUSTER_THREADS, _CLUSTER_BYTES = constant("cluster_threads"), constant("cluster_memory_bytes")
_CLUSTER_ROWS, _CLUSTER_UNITS = constant("cluster_rows"), constant("cluster_units")
_CLUSTER_OUTPUTS = constant("max_cluster_outputs")
_CLUSTER_FEATURES = 800

# Of the other files of csrc/cuda/training, and of matmul/small.cuh.
_MAX_LAYERS = constant("Update::max_layers")
_TOP_COLUMNS = constant("top_columns")
_LOSS_THREADS = constant("loss_threads")
_EXPAND_THREADS, _GATHER_THREADS = constant("expand_threads"), constant("gather_threads")
_WIDE_THREADS, _WIDE_NUMBERS = constant("WideTile::max_threads"), 128 * constant("WideTile::stride")
_WIDE_SIDE = constant("WideTile::rows")
_MAX_HYPERPARAMETERS = constant("Staged::max_hyperparameters")


#
# What the kernels take
#


def _filled(name: str, t: np.dtype[Any] | None = None, /, **values: Any) -> np.void:
    """A struct with these members, 0 what is not named; `t` is the network's type, where it holds numbers of that."""
    record = np.zeros(1, struct(name, t))
    for name, value in values.items():
        record[name] = value
    result: np.void = record[0]
    return result


_PROGRESS = struct("Progress")
_UPDATED_LAYER = struct("UpdatedLayer")

# The tiles of matmul/small.cuh, and the rows and columns of each.
_TILES = {"SmallTile<8>": 8, "SmallTile<16>": 16, "WideTile": 32}


def expressions() -> dict[str, list[str]]:
    """Every kernel that this module launches, by source file: for compiling ahead of time, and for tests."""
    names = list[str]()
    for t in ("float", "double"):
        names += [f"loss<{t}>", f"loss<{t}, true>", f"top<{t}>", f"top<{t}, true>"]
        names += [f"expand<{t}>", f"change_inputs<{t}>"]
        for kernel in ("forward", "backward", "forward_penalty"):
            names += [f"{kernel}<{t}, gemmlet::{tile}>" for tile in _TILES]
        names += [f"backward<{t}, gemmlet::{tile}, true>" for tile in _TILES]
        names += [f"update<{t}, {t}, gemmlet::optimizers::{rule}, true>" for rule in OPTIMIZER_RULES]
        for n in (t, "unsigned char"):
            names.append(f"gather<{t}, {n}>")
            for kernel in ("first_forward", "first_forward_and_gather"):
                names += [f"{kernel}<{t}, {n}, gemmlet::{tile}>" for tile in _TILES]
            for rule in OPTIMIZER_RULES:
                names.append(f"update<{t}, {n}, gemmlet::optimizers::{rule}>")
    in_cluster = [f"{kernel}<{_CLUSTER_THREADS}>" for kernel in ("arrange_samples", "close_steps")]
    for size in CLUSTER_SIZES:
        in_cluster += [f"train_in_cluster<{size}, gemmlet::optimizers::{rule}>" for rule in OPTIMIZER_RULES]
    found: dict[str, list[str]] = {CLUSTER_SOURCE: [f"gemmlet::{name}" for name in in_cluster]}
    for name in names:
        found.setdefault(_source(name), []).append(f"gemmlet::{name}")
    return found


def _source(kernel: str) -> str:
    """The file of a step's kernel."""
    name = kernel.partition("<")[0]
    return f"training/{_SOURCES.get(name, name)}.cuh"


def supports_fused(plan: TrainingPlan) -> bool:
    """Whether the kernels of csrc/cuda/training can take the plan's steps."""
    alone = (Loss, GradientPenalty, Update)  # whose network says enough
    phases = tuple((type(phase), *phase[: 1 if isinstance(phase, alone) else 2]) for phase in plan.phases[1:])
    is_gan, (dataset, *scaling) = len(plan.networks) == 2, plan.gather
    losses = places("losses").keys() | (set() if is_gan else places("row_losses").keys())
    with contextlib.suppress(training.UnsupportedError):
        # (What changes inputs is for samples.)
        first_layers = [training.dense_layers(network)[0] for network in plan.networks]
        return (
            phases in _STEPS
            and not plan.has_extras
            and (is_gan or dataset.labels is None)
            and (dataset.weights is None or not is_gan)
            and (dataset.indptr is None if is_gan else scaling == [1.0, 0.0])
            and not any(map(_changes_inputs, first_layers[:-1]))
            and plan.activations() <= places("activations").keys()
            and all(loss.name in losses and isinstance(loss.targets, tuple) == is_gan for loss in plan.losses)
            and all(penalty.factor >= 0 and plan.outputs(penalty.network) == 1 for penalty in plan.gradient_penalties)
            and all(update.rule in OPTIMIZER_RULES and update.max_norm is None for update in plan.updates)
        )
    return False


# The phases after `Gather` of the plans that there are kernels for: what these plans have in common.
_STEPS = (
    # One network.
    ((Forward, 0, (SAMPLES,)), (Loss, 0), (Backward, 0, None), (Update, 0)),
    # A generator and a discriminator.
    *(
        (
            *((Forward, 0, (NOISE,)), (Forward, 1, (SAMPLES, 0)), (Loss, 1), (Backward, 1, None)),
            *(*penalty, (Update, 1)),
            *((Forward, 1, (0,)), (Loss, 1), (Backward, 1, 0), (Backward, 0, None), (Update, 0)),
        )
        for penalty in ((), ((GradientPenalty, 1),))
    ),
)


def _changes_inputs(first_layer: training.DenseLayer) -> bool:
    """Whether a network's inputs are noisy, or dropped."""
    return first_layer.dropout is not None or first_layer.noise is not None


def _stride(width: int) -> int:
    """From one row of a matrix to the next."""
    return -(-width // 4) * 4


def _pieces(n: int, size: int) -> int:
    return -(-n // size)


class _Input(NamedTuple):
    """The inputs of a layer."""

    type: str  # of their numbers, in C++
    value: np.void


class _Tiles(NamedTuple):
    """How a matmul is launched."""

    kind: str  # in C++
    grid: tuple[int, int]
    block: int
    shared: int


def _kind_of_tile(rows: int, columns: int) -> str:
    """The largest kind of tile of which there are enough, or the smallest."""
    for kind in ("WideTile", "SmallTile<16>"):
        if _pieces(rows, _TILES[kind]) * _pieces(columns, _TILES[kind]) >= ENOUGH_TILES:
            return kind
    return "SmallTile<8>"


def _tiles(dtype: np.dtype[Any], rows: int, columns: int, k: int, min_warps: int = 1) -> _Tiles:
    """The tiles of a matmul."""
    kind = _kind_of_tile(rows, columns)
    side = _TILES[kind]
    threads, numbers = _WIDE_THREADS, _WIDE_NUMBERS
    grid = _pieces(rows, side), _pieces(columns, side)
    if kind != "WideTile":
        # Each warp takes `at_a_time` steps of k at a time: as few passes as the largest block allows, and no more
        # warps than that. A block must have a thread for each of its results.
        at_a_time = (16 if side == 8 else 4) * (16 // dtype.itemsize)
        max_warps = 16 if grid[0] * grid[1] <= MAX_LARGE_BLOCKS else 8
        passes = _pieces(k, at_a_time * max_warps)
        warps = max(side * side // 32, _pieces(_pieces(k, at_a_time), passes), min_warps)
        threads, numbers = 32 * warps, warps * side * side
    return _Tiles(f"gemmlet::{kind}", grid, threads, numbers * dtype.itemsize)


class _Network:
    """A network on the GPU: parameters, optimizer state and averages from byte `start` on of the state, to `end`.

    Attributes
    ----------
    inputs : list of int
        Columns of the matrix of each layer's inputs, which classes are left out of.
    x, y, z, grad : list
        Matrices of each layer, for the rows of a mini-batch: inputs without what is dropped, those of the first layer
        excepted; outputs; preactivations where backward needs them; and gradients of the preactivations.
    """

    def __init__(self, network: training.Network, rule: str, start: int, classes: int) -> None:
        layers = training.dense_layers(network)
        self.layers, self.rule, self.start = layers, rule, _pieces(start, 256) * 256
        self.dtype = layers[0].weight.value.dtype
        self.widths = [len(layers[0].weight.value), *(layer.bias.value.size for layer in layers)]
        self.inputs = [self.widths[0] - classes, *self.widths[1:-1]]
        self.averages = layers[0].weight.average is not None
        # Where each layer begins in a plane, one of which has all parameters, one each state of the optimizer, and one
        # the averages.
        sizes = [(inputs + 1) * _stride(outputs) for inputs, outputs in pairwise(self.widths)]
        *self._starts, self.plane = map(int, np.cumsum([0, *sizes]))
        self.planes = 1 + len(layers[0].weight.state) + self.averages
        self.end = self.start + self.planes * self.plane * self.dtype.itemsize
        numbers = places("activations")
        self.activations = [
            _filled("Activation", self.dtype, number=numbers[layer.activation or "identity"], parameter=layer.parameter)
            for layer in layers
        ]

    def reserve(self, device: Device, rows: int, output: Any = None) -> None:
        """Make the matrices, of which `output` may be the last outputs."""

        def matrix(width: int) -> Any:
            return device.empty((rows, _stride(width)), self.dtype)

        needs_x = [layer.activation is not None and ACTIVATIONS[layer.activation].needs_x for layer in self.layers]
        self.y = [matrix(width) for width in self.widths[1:-1]]
        self.y.append(matrix(self.widths[-1]) if output is None else output)
        self.x: list[Any] = [None]
        for layer, y in zip(self.layers[1:], self.y, strict=False):
            self.x.append(y if layer.dropout is None else matrix(len(layer.weight.value)))
        self.z = [matrix(width) if needed else None for width, needed in zip(self.widths[1:], needs_x, strict=True)]
        self.grad = [matrix(width) for width in self.widths[1:]]

    def layer(self, state: int, layer: int) -> np.void:
        """A layer, as kernels take it; `state` is the address of the state."""
        parameters = state + self.start + self._starts[layer] * self.dtype.itemsize
        return _filled("Layer", **{"parameters": parameters, "in": self.widths[layer], "out": self.widths[layer + 1]})

    def below(self, layer: int, drops: np.void, rows: slice = slice(None), grad: Any = None) -> np.void:
        """A layer as the one below another, whose inputs are dropped so; or some rows of it, and their `grad`."""
        saved: Any = self.y[layer] if self.z[layer] is None else self.z[layer]
        matrices = {"saved": address(saved[rows]), "grad": address(self.grad[layer] if grad is None else grad)}
        return _filled("Below", self.dtype, activation=self.activations[layer], drops=drops, **matrices)

    def has_top(self, rows: int) -> bool:
        """Whether the last layer goes with the loss in one kernel."""
        inputs, outputs = self.widths[-2:]
        size = rows * inputs * _stride(outputs) * self.dtype.itemsize
        return len(self.layers) > 1 and outputs <= MAX_TOP_OUTPUTS and size <= MAX_TOP_BYTES

    def copies(self, state: NDArray[np.uint8]) -> Iterator[tuple[Array, Array]]:
        """Each array of the network, and the view of a copy of the state on the CPU that belongs to it."""
        planes = state[self.start : self.end].view(self.dtype).reshape(self.planes, self.plane)
        for layer, start in zip(self.layers, self._starts, strict=True):
            inputs, outputs = layer.weight.value.shape
            stride = _stride(outputs)
            # (Without averages, there are as many planes as arrays before None.)
            for plane, *arrays in zip(planes, layer.weight.arrays(), layer.bias.arrays(), strict=False):
                matrix = plane[start : start + (inputs + 1) * stride].reshape(inputs + 1, stride)[:, :outputs]
                yield from zip(arrays, (matrix[:inputs], matrix[inputs]), strict=True)


class _Draw(NamedTuple):
    """What a forward pass draws with."""

    stream: int
    boundary: int  # rows before this one are of a second input


class _Pass(NamedTuple):
    """A forward pass through a network."""

    given: _Input
    rows: int  # of all inputs
    top: bool  # whether the last layer is left to the loss
    draw: _Draw
    penalty: np.void  # of the gradient; its rows come after those of all inputs

    @property
    def penalty_rows(self) -> int:
        return int(self.penalty["end"] - self.penalty["first"])

    @property
    def suffix(self) -> str:
        """Of the names of kernels, by their template, that take those rows too."""
        return ", true" if self.penalty_rows else ""


class Session:
    """A plan on the GPU: its dataset and targets, its networks in one state behind a `_PROGRESS`, and recorded steps.

    Where a `Forward` takes samples and what a network generates, these are rows of one matrix, the latter first. Noisy
    inputs, and dropped ones, are rows of a matrix too, of which GANs have one besides.
    """

    def __init__(self, device: Device, plan: TrainingPlan) -> None:
        # What calls read, here and there.
        self._residents = list[tuple[Array, Any]]()

        def resident(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            self._residents.append((value, device.upload(np.ascontiguousarray(value))))
            return self._residents[-1][1]

        def staged(phase: training.Phase) -> training.Phase:
            if isinstance(phase, Gather):
                labels, dataset = phase.dataset.labels, phase.dataset._replace(weights=None)
                if labels is not None:
                    labels = labels._replace(values=resident(labels.values))
                return phase._replace(dataset=training.Dataset(*map(resident, dataset))._replace(labels=labels))
            return phase._replace(targets=resident(phase.targets)) if isinstance(phase, Loss) else phase

        self.dataset = plan.gather.dataset  # whose weights are not needed there
        self.device, self.dtype, self.type = device, plan.dtype, CPP_TYPES[plan.dtype.name]
        self.plan = replace(plan, phases=tuple(map(staged, plan.phases)))
        rules, end = {update.network: update.rule for update in plan.updates}, _PROGRESS.itemsize
        self.networks, labels = list[_Network](), plan.gather.dataset.labels
        for number, network in enumerate(plan.networks):
            self.networks.append(_Network(network, rules[number], end, 0 if labels is None else labels.classes))
            end = self.networks[-1].end
        self._state = device.empty((end,), np.uint8)
        self.state = address(self._state)
        # The same on the CPU.
        self._host = device.empty_pinned((end,), np.uint8)
        self._host[:] = 0
        self.is_torn = False  # as `TrainingPlan.is_torn`
        self._is_newer = False  # whether the state is newer than the networks' arrays
        # What belongs to a call alone, there and here; longer ones take their place where a call needs that.
        self._own, self._own_host = device.empty((0,), np.uint8), device.empty_pinned((0,), np.uint8)
        # The size of the largest mini-batch that there is space for; and the graphs by the rows of a step and
        # the number of steps, 0 for any number.
        self._capacity, self._graphs = 0, dict[tuple[int, int], Any]()
        self._gathered: Any = None  # the matrix of samples, if they are gathered before a kernel reads them
        self._changed: Any = None  # and of a GAN's noisy or dropped inputs

    # Calls.

    def train(self, batches: training.Batches) -> training.Outcome:
        """See `Backend.train`; the networks' arrays are older than the state then, until `write_back`."""
        order, noise, updates = batches.order, batches.noise, len(batches.hyperparameters)
        if not len(order):
            return training.Outcome(batches.losses, 0)
        size = min(batches.size, len(order))
        full, rest = divmod(len(order), size)
        # Before anything is sent, as it takes time, and may fail.
        shares = self._shares(order, size)
        self._reserve(size)
        runs = self._runs(size, full) + self._runs(rest, 1 if rest else 0)
        decay = np.zeros(batches.steps) if batches.decay is None else batches.decay
        addresses, own_bytes = self._place(order, shares, *batches.hyperparameters, decay)
        there = None if noise is None else self.device.empty(noise.shape, noise.dtype)
        sent = self._host[: _PROGRESS.itemsize] if self._is_newer else self._host
        if not self._is_newer:
            for array, copy in self._copies():
                copy[...] = array
        progress = self._host[: _PROGRESS.itemsize].view(_PROGRESS)
        progress["order"], progress["batch"], progress["next"], progress["correct"] = addresses[0], size, 0, 0
        progress["weights"] = addresses[1]
        progress["hyperparameters"][0, :updates], progress["decay"] = addresses[2:-1], addresses[-1]
        progress["first_step"] = batches.first_step
        progress["noise"], progress["loss"][0, :updates] = address(there), batches.losses

        self.is_torn = True
        try:
            self.device.upload(sent, self._state[: len(sent)])
            self.device.upload(self._own_host[:own_bytes], self._own[:own_bytes])
            if noise is not None:
                self.device.upload(np.ascontiguousarray(noise), there)
            self._is_newer = True
            for graph, times in runs:
                graph.replay(times)
            if batches.meanwhile is not None:
                batches.meanwhile()
        except BaseException:
            # What is sent from must not change, or go, before it has been sent.
            self.device.synchronize()
            raise
        self.device.download(self._state[: _PROGRESS.itemsize], self._host[: _PROGRESS.itemsize])
        self.is_torn = False
        return training.Outcome(tuple(progress["loss"][0, :updates].tolist()), int(progress["correct"][0]))

    def _shares(self, order: NDArray[np.int64], size: int) -> NDArray[np.float64]:
        """What samples count, in units of the mean of their mini-batch; nothing where they have no weights."""
        weights, by_rows = self.dataset.weights, self.dataset.divides_by_rows
        if weights is None:
            return np.empty(0)
        weights, starts = weights[order], np.arange(0, len(order), size)
        sums, rows = np.add.reduceat(weights, starts), np.diff(starts, append=len(order))
        if not ((weights >= 0).all() and (by_rows or (sums > 0).all()) and (sums < math.inf).all()):
            raise ValueError("weights: expected finite numbers, none of them negative, of a positive sum")
        return weights if by_rows else weights / np.repeat(sums, rows) * np.repeat(rows, rows)

    def restage(self) -> None:
        """See `Backend.restage`."""
        for here, there in self._residents:
            self.device.upload(np.ascontiguousarray(here), there)

    def write_back(self) -> None:
        """Copy the state into the networks' arrays, if it is newer than they are."""
        if self._is_newer:
            self.device.download(self._state, self._host)
            for array, copy in self._copies():
                array[...] = copy
            self._is_newer = False

    def _copies(self) -> Iterator[tuple[Array, Array]]:
        """Each array of the networks, and the view of the state on the CPU that belongs to it."""
        for network in self.networks:
            yield from network.copies(self._host)

    def _place(self, *arrays: Array) -> tuple[list[int], int]:
        """Copy what belongs to a call to where it is sent from: its addresses on the GPU, and how many bytes it is."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += _pieces(array.nbytes, 16) * 16
        if len(self._own_host) < end:
            self._own = self.device.empty((end,), np.uint8)
            self._own_host = self.device.empty_pinned((end,), np.uint8)
        for array, offset in zip(arrays, offsets, strict=True):
            self._own_host[offset : offset + array.nbytes].view(array.dtype)[...] = array.reshape(-1)
        return [address(self._own) + offset for offset in offsets], end

    def _reserve(self, rows: int) -> None:
        """Make the matrices for mini-batches of `rows`, if there are none as large."""
        if rows <= self._capacity:
            return
        device, networks = self.device, self.networks
        # First of all the old memory is given back; there may be none then.
        self._capacity, self._gathered, self._changed = 0, None, None
        self._graphs.clear()
        for network in networks:
            network.x = network.y = network.z = network.grad = []
        most = [0] * len(networks)  # rows
        for phase in self.plan.phases:
            if isinstance(phase, Forward):
                most[phase.network] = max(most[phase.network], rows * len(phase.inputs))
            elif isinstance(phase, GradientPenalty):
                most[phase.network] += phase.rows(rows)
        changes, stride = _changes_inputs(networks[-1].layers[0]), _stride(networks[-1].inputs[0])
        if len(networks) > 1 or changes or self.plan.gather.dataset.indptr is not None:
            self._gathered = device.empty((most[-1], stride), self.dtype)
        if len(networks) > 1 and changes:
            self._changed = device.empty((most[-1] + rows, stride), self.dtype)
        for network, count in zip(networks, most, strict=True):
            network.reserve(device, count, None if network is networks[-1] else self._gathered)
        self._losses = device.empty((max(most),), np.dtype(np.float64))
        self._correct = device.empty((rows,), np.dtype(np.int32))
        # What is staged for a step.
        self._samples = device.empty((rows,), np.dtype(np.int64))
        self._labels = device.empty((rows,), np.dtype(np.int32))
        self._weights = None if self.dataset.weights is None else device.empty((rows,), self.dtype)
        self._hyperparameters = device.empty((2, _MAX_HYPERPARAMETERS), self.dtype)
        self._capacity = rows

    def _runs(self, rows: int, steps: int) -> list[tuple[Graph, int]]:
        """What takes `steps` steps of `rows` rows, and how often."""
        if not steps:
            return []
        if size := self._cluster_size(rows):
            if (rows, 0) not in self._graphs:
                self._graphs[rows, 0] = _Cluster(self, size, rows)
            self._graphs[rows, 0].reserve(steps)
            return [(self._graphs[rows, 0], steps)]
        runs = []
        for together, times in ((STEPS_TOGETHER, steps // STEPS_TOGETHER), (1, steps % STEPS_TOGETHER)):
            if times and (rows, together) not in self._graphs:
                self._graphs[rows, together] = self._recorded(rows, together)
            if times:
                runs.append((self._graphs[rows, together], times))
        return runs

    def _cluster_size(self, rows: int) -> int:
        """The size of the cluster that can take steps of `rows` rows; 0 if none can."""
        network, dataset = self.networks[0], self.plan.gather.dataset
        if self.device.arch not in ARCHITECTURES[CLUSTER_SOURCE] or len(self.networks) > 1 or len(network.layers) != 2:
            return 0
        if self.plan.updates[0].clip_value is not None or network.layers[0].noise is not None:
            return 0
        if self.type != "float" or dataset.x.dtype != np.uint8 or dataset.indptr is not None or network.averages:
            return 0
        features, hidden, out = network.widths
        if features > _CLUSTER_FEATURES or out > _CLUSTER_OUTPUTS or rows > _CLUSTER_ROWS:
            return 0
        few = self.device.multiprocessors < _CLUSTER_MULTIPROCESSORS and self.device.arch != "host"
        sizes = [size for size in CLUSTER_SIZES if size * _CLUSTER_UNITS >= hidden and not (size > 8 and few)]
        return min(sizes, default=0)

    def _recorded(self, rows: int, times: int) -> Graph:
        """A graph of `times` steps of `rows` rows."""
        # Launches: the name of a kernel, and what `Device.launch` takes with it.
        self._rows, self._launches, self._passes = rows, list[tuple[str, *tuple[Any, ...]]](), dict[int, _Pass]()
        for phase in self.plan.phases:
            self._add(phase)
        device, launches = self.device, self._launches
        # They are compiled first: not while a stream is recorded. Each on its own, as many networks share it.
        kernels = [device.kernels(_source(name), [f"gemmlet::{name}"])[0] for name, *_ in launches]

        def record() -> None:
            for _ in range(times):
                for kernel, (_, *how) in zip(kernels, launches, strict=True):
                    device.launch(kernel, *how)

        return device.record(record)

    # Phases.

    @functools.singledispatchmethod
    def _add(self, phase: Any) -> None:
        """Add the launches of a phase; of all phases, the first one opens the step, the last one closes it."""
        raise TypeError(f"no phase of a plan: {phase}")

    @_add.register
    def _(self, phase: Gather) -> None:
        """Of a CSR matrix, and rows that are noisy or dropped; others are gathered by the kernel of the first layer."""
        (x, indptr, indices, *_), network = phase.dataset, self.networks[0]
        if len(self.networks) > 1 or (indptr is None and not _changes_inputs(network.layers[0])):
            return
        changes = self._changes(network.layers[0], _Draw(self.plan.forwards(0)[0].stream, 0))
        rows = {"features": network.widths[0], "rows": address(self._gathered)}
        if indptr is None:
            p = _filled("Gather", self.dtype, samples=address(x), scale=phase.scale, shift=phase.shift, **rows)
            kernel, block = f"gather<{self.type}, {CPP_TYPES[x.dtype.name]}>", _GATHER_THREADS
        else:
            matrix = {"values": address(x), "indptr": address(indptr), "indices": address(indices)}
            p = _filled("Expand", **matrix, **rows)
            kernel, block = f"expand<{self.type}>", _EXPAND_THREADS
        self._launch(kernel, (self._rows + 1, 1), block, p, self._staged(), changes)

    @_add.register
    def _(self, phase: Forward) -> None:
        network, rows = self.networks[phase.network], self._rows * len(phase.inputs)
        has_loss = any(loss.network == phase.network for loss in self.plan.losses)
        top = has_loss and network.has_top(rows)
        x, kernel = self.plan.gather.dataset.x, "forward"
        if phase.inputs == (NOISE,):
            given, kernel = _Input(self.type, _filled("Input", stride=network.inputs[0])), "first_forward_and_gather"
        elif self._gathered is None:
            samples = _filled("Input", rows=address(x), stride=x.shape[1], samples=address(self._samples))
            given, kernel = _Input(CPP_TYPES[x.dtype.name], samples), "first_forward"
        elif self._changed is None:
            given = self._input_of(self._gathered)
        else:
            given = self._input_of(self._changed[self._rows :] if SAMPLES in phase.inputs else self._changed)
            if SAMPLES in phase.inputs:
                self._change_inputs(phase)
        draw = _Draw(phase.stream, rows - self._rows)
        self._passes[phase.network] = _Pass(given, rows, top, draw, self._penalty_of(phase))
        self._forward(network, 0, given, rows, draw, kernel)
        for layer in range(1, len(network.layers) - top):
            self._forward(network, layer, self._input_of(network.x[layer]), rows, draw)

    @_add.register
    def _(self, phase: Loss) -> None:
        network, forward = self.networks[phase.network], self._passes[phase.network]
        last, outputs, rows = len(network.layers) - 1, network.widths[-1], forward.rows
        common = {"activation": network.activations[last], "grad": address(network.grad[last])}
        common["penalty"] = forward.penalty
        common["objective"] = self.objective(phase, self._rows)
        if forward.top:
            inputs = network.widths[-2]
            block = min(256, _pieces(inputs, 32) * 32)
            numbers = (block // 32 + 3) * _pieces(outputs, _TOP_COLUMNS) * _TOP_COLUMNS
            below = network.below(last - 1, self.drops(network.layers[last], forward.draw))
            common |= {"x": address(network.x[last]), "layer": network.layer(self.state, last), "below": below}
            p, shared = _filled("Top", self.dtype, **common), numbers * self.dtype.itemsize
            self._launch(f"top<{self.type}{forward.suffix}>", (rows, 1), block, p, shared=shared)
        else:
            y, z = address(network.y[last]), address(network.z[last])
            p = _filled("Loss", self.dtype, y=y, z=z, out=outputs, rows=rows, **common)
            grid = _pieces(rows, _LOSS_THREADS // 32), 1
            self._launch(f"loss<{self.type}{forward.suffix}>", grid, _LOSS_THREADS, p)

    @_add.register
    def _(self, phase: Backward) -> None:
        network, forward = self.networks[phase.network], self._passes[phase.network]
        to = None if phase.to is None else self.networks[phase.to]
        # The gradient of each layer's preactivations becomes the gradient of the layer below.
        for layer in range(len(network.layers) - 1 - forward.top, 0 if to is None else -1, -1):
            drops = self.drops(network.layers[layer], forward.draw)
            below = network.below(layer - 1, drops) if layer or to is None else to.below(-1, drops)
            self._backward(network, layer, network.grad[layer], below, forward.rows, forward)

    @_add.register
    def _(self, phase: GradientPenalty) -> None:
        """Its gradients of preactivations have come with the others'."""
        network, forward = self.networks[phase.network], self._passes[phase.network]
        samples, rows = slice(self._rows, None), slice(forward.rows, None)
        matrix = self._gathered if self._changed is None else self._changed[self._rows :]
        # Its own rows are those of the samples from the first on.
        first, *others = (self.drops(layer, forward.draw._replace(boundary=0)) for layer in network.layers)
        # Back to the samples, whose dropout is on the way forward, too.
        first["factor"] *= first["factor"]
        identity = _filled("Activation", self.dtype, number=places("activations")["identity"])
        inputs, saved = matrix[rows], address(matrix[samples])
        below = _filled("Below", self.dtype, activation=identity, saved=saved, grad=address(inputs), drops=first)
        self._backward(network, 0, network.grad[0][rows], below, forward.penalty_rows)
        # Forward, as far as there are inputs of a layer.
        for layer, drops in enumerate(others):
            x = network.x[layer + 1][rows]
            below = network.below(layer, drops, samples, x)
            self._backward(network, layer, inputs, below, forward.penalty_rows, kernel="forward_penalty")
            inputs = x

    @_add.register
    def _(self, phase: Update) -> None:
        """Updates add up the losses too: the first update those of the first `Loss`, and so on."""
        network, forward = self.networks[phase.network], self._passes[phase.network]
        given, rows = forward.given, forward.rows
        number, count = self.plan.updates.index(phase), len(network.layers)
        loss, classes = self.plan.losses[number], self._classes()
        suffix = ", true" if forward.penalty_rows or classes["count"] else ""
        for first in range(0, count, _MAX_LAYERS):
            end = min(first + _MAX_LAYERS, count)
            updated = np.zeros(_MAX_LAYERS, _UPDATED_LAYER)
            blocks = 0
            for place, layer in enumerate(range(first, end)):
                inputs, outputs = network.widths[layer : layer + 2]
                x, grad = address(network.x[layer]), address(network.grad[layer])
                parameters = network.layer(self.state, layer)["parameters"]
                updated[place] = blocks, inputs, outputs, parameters, x, grad
                blocks += _pieces(inputs + 1, _WIDE_SIDE) * _pieces(outputs, _WIDE_SIDE)
            p = _filled(
                "Update",
                layers=updated,
                layer_count=end - first,
                blocks=blocks,
                has_first=first == 0,
                input=given.value,
                classes=classes,
                rows=rows + forward.penalty_rows,
                bias_rows=rows,
                plane=network.plane,
                averages=network.averages,
                hyperparameters=address(self._hyperparameters) + number * _MAX_HYPERPARAMETERS * self.dtype.itemsize,
                network=number,
                losses=address(self._losses),
                correct=address(self._correct) if loss.has_classes else 0,
                loss_rows=rows if end == count else 0,
                weight=self.plan.weight(loss),
                limit=math.inf if phase.clip_value is None else phase.clip_value,
                decays_biases=phase.decays_biases,
                closes=end == count and phase is self.plan.phases[-1],
                progress=self.state,
            )
            kernel = f"update<{self.type}, {given.type}, gemmlet::optimizers::{phase.rule}{suffix}>"
            self._launch(kernel, (blocks + 1, 1), _WIDE_THREADS, p, shared=_WIDE_NUMBERS * self.dtype.itemsize)

    # Launches.

    def _launch(self, kernel: str, grid: tuple[int, int], block: int, *arguments: np.generic, shared: int = 0) -> None:
        self._launches.append((kernel, (*grid, 1), block, arguments, shared))

    def _input_of(self, matrix: Any) -> _Input:
        """All rows of a matrix."""
        return _Input(self.type, _filled("Input", rows=address(matrix), stride=matrix.shape[1]))

    def _staged(self) -> np.void:
        """What the kernel that opens a step stages; of class indices, the mini-batch's."""
        (loss, *_), counts = self.plan.losses, [len(OPTIMIZER_RULES[u.rule].hyperparameters) for u in self.plan.updates]
        labels = self.plan.gather.dataset.labels
        indices = labels.values if labels is not None else loss.targets if loss.has_classes else None
        return _filled(
            "Staged",
            progress=self.state,
            rows=self._rows,
            samples=address(self._samples),
            indices=address(indices),
            labels=address(self._labels),
            weights=address(self._weights),
            hyperparameters=address(self._hyperparameters),
            hyperparameter_counts=[*counts, 0][:2],
            averages=any(network.averages for network in self.networks),
        )

    def _classes(self) -> np.void:
        """The classes among the inputs of each network."""
        values, count = self.plan.gather.dataset.labels or (None, 0)
        addresses = {"indices": address(values), "labels": address(self._labels), "progress": self.state}
        return _filled("Classes", rows=self._rows, count=count, **addresses)

    # What is drawn.

    def _draw(self, source: training.Dropout | training.InputNoise, draw: _Draw) -> np.void:
        # (Seeds are unsigned, what the kernels are given is not.)
        seed, stream = int(np.uint64(source.seed).astype(np.int64)), source.stream + draw.stream
        return _filled("Draw", progress=self.state, seed=seed, stream=stream, boundary=draw.boundary)

    def drops(self, layer: training.DenseLayer, draw: _Draw) -> np.void:
        """The dropout of a layer's inputs."""
        if layer.dropout is None:
            return _filled("Drops", self.dtype)
        keep = layer.dropout.keep
        return _filled("Drops", self.dtype, draw=self._draw(layer.dropout, draw), keep=keep, factor=dropout.scale(keep))

    def _changes(self, layer: training.DenseLayer, draw: _Draw) -> np.void:
        """What becomes of the inputs of a first layer."""
        noise = _filled("Noise", self.dtype)
        if layer.noise is not None:
            factor = layer.noise.deviation / input_noise.DEVIATION
            noise = _filled("Noise", self.dtype, draw=self._draw(layer.noise, draw), factor=factor)
        return _filled("Changes", self.dtype, noise=noise, drops=self.drops(layer, draw))

    def _change_inputs(self, phase: Forward) -> None:
        """The discriminator's inputs, in both of its passes, of which `phase` is the first."""
        network, rows = self.networks[phase.network], self._rows
        draws = [_Draw(f.stream, (len(f.inputs) - 1) * rows) for f in self.plan.forwards(phase.network)]
        first, second = (self._changes(network.layers[0], draw) for draw in draws)
        matrices = {"from": address(self._gathered), "rows": address(self._changed)}
        size = {"features": network.inputs[0], "generated": rows}
        p = _filled("ChangeInputs", self.dtype, first=first, second=second, **matrices, **size)
        self._launch(f"change_inputs<{self.type}>", (3 * rows, 1), _GATHER_THREADS, p)

    def _forward(
        self, network: _Network, layer: int, given: _Input, rows: int, draw: _Draw, kernel: str = "forward"
    ) -> None:
        """One layer; the kernel that opens the step gathers, too: its own samples, or those that others will need."""
        gather, inputs, outputs = self.plan.gather, network.inputs[layer], network.widths[layer + 1]
        x, gathers = gather.dataset.x, kernel == "first_forward_and_gather"
        # (Samples are gathered by blocks of that size, too.)
        tiles = _tiles(self.dtype, rows, outputs, inputs, min_warps=8 if gathers else 1)
        tile_rows, columns = tiles.grid
        y, z = address(network.y[layer]), address(network.z[layer])
        common = {"layer": network.layer(self.state, layer), "activation": network.activations[layer], "rows": rows}
        if layer == 0:
            common["classes"] = self._classes()
        above = network.layers[layer + 1 :]
        if above and above[0].dropout is not None:
            common |= {"drops": self.drops(above[0], draw), "dropped": address(network.x[layer + 1])}
        p = _filled("Forward", self.dtype, input=given.value, y=y, z=z, **common)
        arguments, types = list[np.generic]([p]), [self.type]
        if kernel != "forward":
            arguments.append(self._staged())
            types.append(CPP_TYPES[x.dtype.name])
            columns += 1
        if gathers:
            scaling, to = {"scale": gather.scale, "shift": gather.shift}, address(self._gathered[rows:])
            samples = _filled("Gather", self.dtype, samples=address(x), features=x.shape[1], rows=to, **scaling)
            arguments += samples, np.int32(tiles.grid[1])
            columns = tiles.grid[1] + _pieces(rows + 1, tile_rows)
        kernel = f"{kernel}<{', '.join([*types, tiles.kind])}>"
        self._launch(kernel, (tile_rows, columns), tiles.block, *arguments, shared=tiles.shared)

    def _backward(
        self,
        network: _Network,
        layer: int,
        grad: Any,
        below: np.void,
        rows: int,
        forward: _Pass | None = None,
        kernel: str = "backward",
    ) -> None:
        """Through one layer; the rows of the gradient penalty of a pass go with the others."""
        inputs, outputs, of_layer = network.inputs[layer], network.widths[layer + 1], network.layer(self.state, layer)
        columns, k = (outputs, inputs) if kernel == "forward_penalty" else (inputs, outputs)
        of_layer["in"] = inputs  # the weights of classes are of no use here
        common = {"grad": address(grad), "layer": of_layer, "below": below}
        suffix = ""
        if forward is not None:
            rows += forward.penalty_rows
            common["penalty"], suffix = forward.penalty, forward.suffix
        tiles = _tiles(self.dtype, rows, columns, k)
        p = _filled("Backward", self.dtype, rows=rows, **common)
        self._launch(f"{kernel}<{self.type}, {tiles.kind}{suffix}>", tiles.grid, tiles.block, p, shared=tiles.shared)

    def _penalty_of(self, forward: Forward) -> np.void:
        """The gradient penalty of a pass, of no rows if it has none."""
        penalty = next((p for p in self.plan.gradient_penalties if p.network == forward.network), None)
        if penalty is None or SAMPLES not in forward.inputs:
            return _filled("GradientPenalty", self.dtype)
        first, rows = self._rows, penalty.rows(self._rows)
        where, scale = {"first": first, "end": first + rows, "offset": self._rows}, math.sqrt(penalty.factor / rows)
        return _filled("GradientPenalty", self.dtype, scale=scale, **where)

    def objective(self, loss: Loss, rows: int) -> np.void:
        """A loss as kernels take it, in a step of `rows` rows."""
        classes, of_rows = loss.has_classes, places("row_losses")
        # Of each input: what is generated comes first here.
        first, second = (*loss.targets[::-1], 0.0)[:2] if isinstance(loss.targets, tuple) else (0.0, 0.0)
        keep, spread = smoothing(loss.value, self.networks[loss.network].widths[-1])
        return _filled(
            "Objective",
            self.dtype,
            loss=~of_rows[loss.name] if loss.name in of_rows else places("losses")[loss.name],
            parameter=loss.value,
            scale=self.plan.weight(loss) / rows,
            keep=keep,
            spread=spread,
            labels=address(self._labels) if classes else 0,
            values=0 if classes or isinstance(loss.targets, tuple) else address(loss.targets),
            samples=address(self._samples),
            first=first,
            second=second,
            boundary=rows,
            weights=address(self._weights),
            losses=address(self._losses),
            correct=address(self._correct) if classes else 0,
        )


class _Cluster:
    """Steps of `rows` rows in a cluster, some hundreds in each launch of it."""

    def __init__(self, session: Session, size: int, rows: int) -> None:
        self._device, self._size, self._rows = session.device, size, rows
        (network,), (loss,), (update,) = session.networks, session.plan.losses, session.plan.updates
        dataset = session.plan.gather.dataset
        features, hidden, out = network.widths
        self._step_numbers = _pieces(features, 16) * 16 * _CLUSTER_ROWS
        # (Steps are the second number of a grid.)
        self._max_steps = min(max(1, MAX_ARRANGED_BYTES // (2 * self._step_numbers)), 65535)
        common, samples = {"progress": session.state, "rows": rows}, address(dataset.x)
        indices = address(loss.targets) if loss.has_classes else 0
        draw = _Draw(session.plan.forwards(0)[0].stream, 0)
        of_samples, of_units = (session.drops(layer, draw) for layer in network.layers)
        self._arrange = _filled(
            "ArrangeSamples", samples=samples, features=features, indices=indices, drops=of_samples, **common
        )
        first, last = (network.layer(session.state, layer)["parameters"] for layer in (0, 1))
        self._train = _filled(
            "ClusterTraining",
            session.dtype,
            features=features,
            hidden=hidden,
            out=out,
            first=first,
            last=last,
            plane=network.plane,
            hidden_activation=network.activations[0],
            activation=network.activations[1],
            scale=(dropout.scale(of_samples["keep"]) if of_samples["keep"] else 1.0) / 255,
            drops=of_units,
            objective=session.objective(loss, rows),
            decays_biases=update.decays_biases,
            **common,
        )
        self._close = _filled("CloseSteps", weight=session.plan.weight(loss), **common)
        names = [
            f"arrange_samples<{_CLUSTER_THREADS}>",
            f"train_in_cluster<{size}, gemmlet::optimizers::{network.rule}>",
            f"close_steps<{_CLUSTER_THREADS}>",
        ]
        # Each on its own, as rules share the others.
        self._kernels = [self._device.kernels(CLUSTER_SOURCE, [f"gemmlet::{name}"])[0] for name in names]
        self._shared = _CLUSTER_BYTES + 2 * 2 * self._step_numbers
        self._reserved = 0
        numbers = np.float64, np.int32, np.int32  # of each row: losses, correct, labels
        self._of_rows = numbers if session.dataset.weights is None else (*numbers, np.float32)

    def reserve(self, steps: int) -> None:
        """Have space for `steps` steps."""
        steps = min(steps, self._max_steps)
        if steps <= self._reserved:
            return
        # First of all the old memory is given back; there may be none then.
        self._reserved, self._memory = 0, list[Any]()
        each = (self._step_numbers, np.uint16), *((self._rows, kind) for kind in self._of_rows)
        self._memory = [self._device.empty((steps, columns), np.dtype(kind)) for columns, kind in each]
        self._reserved = steps
        tiles, losses, correct, labels, *weights = map(address, self._memory)
        for p in (self._arrange, self._train):
            p["tiles"] = tiles
        objective = self._train["objective"]
        self._arrange["labels"], objective["labels"] = labels, labels if self._arrange["indices"] else 0
        self._arrange["weights"] = objective["weights"] = weights[0] if weights else 0
        for p in (objective, self._close):
            p["losses"], p["correct"] = losses, correct

    def replay(self, count: int = 1) -> None:
        """Do `count` steps."""
        arrange, train, close = self._kernels
        threads, launch = _CLUSTER_THREADS, self._device.launch
        while count:
            steps = min(count, self._reserved)
            launch(arrange, (_pieces(self._step_numbers // 8, threads), steps, 1), threads, (self._arrange,))
            launch(
                train, (self._size, 1, 1), threads, (self._train, np.int64(steps)), self._shared, cluster=self._size
            )  # fmt: skip
            launch(close, (1, 1, 1), threads, (self._close, np.int64(steps)))
            count -= steps
