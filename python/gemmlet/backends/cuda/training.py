"""Mini-batches of a multilayer perceptron, and of two adversarial networks, in one call on the GPU.

At the start of a call all that it needs goes to the GPU: the order of the samples, the rules' numbers, noise. At its
end the losses come back. In between, a step is a handful of launches (csrc/cuda/training), recorded once for each
number of rows as a graph that knows from a counter on the GPU which step it is; or a cluster of blocks does hundreds of
steps in one launch (csrc/cuda/training/cluster.cuh). What the next call needs is prepared meanwhile.

The samples stay on the GPU from call to call, in what `hold` returns; so do the graphs; and so do parameters and
optimizer states, which go there with the first call and come back by `write_back`.

Results depend on the GPU only by whether a cluster trains (`_Session._cluster_size`): otherwise which kernels compute a
step follows from its sizes alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..._signals import whole_steps
from ...formulas.activations import ACTIVATIONS
from ...formulas.losses import LOSSES
from ...formulas.optimizers import OPTIMIZER_RULES
from ...training.old_plan import Array, Feed, FusedLayer, FusedNetwork, GanRun, MlpRun
from . import compiler
from .device import Device, Graph
from .types import CPP_TYPES, address

CLUSTER_SOURCE = "training/cluster.cuh"

# The files of csrc/cuda/training by the kernels of a step.
_SOURCES = {
    "first_forward": "dense",
    "first_forward_and_gather": "gather",
    "expand": "gather",
    "forward": "dense",
    "backward": "dense",
    "loss": "loss",
    "top": "top",
    "update": "update",
}

# Sources that not every architecture compiles, and those that do.
ARCHITECTURES = {CLUSTER_SOURCE: ("sm_90a", "host")}

# So many tiles keep a GPU busy: then larger ones, which read less, are faster. By occupancy arithmetic: the
# multiprocessors of a large GPU, not all of which need work. (On an H100 48 and 200 made no difference to a step of the
# perceptron for MNIST.)
ENOUGH_TILES = 96

# Up to so many tiles a multiprocessor has one block, which may be a large one; of more tiles two blocks share one.
MOST_LARGE_BLOCKS = 128

# The last layer goes with the loss in one kernel if it has so few outputs, and if reading its weights anew for each row
# comes to no more bytes than that: some microseconds of the L2 cache, as long as the launches that are saved. By
# arithmetic; not measured yet.
MOST_TOP_OUTPUTS = 64
MOST_TOP_BYTES = 8 << 20

# Steps in a graph, where there are as many: between graphs a GPU waits longer than within one. (32 were not faster.)
STEPS_TOGETHER = 8

# The blocks of the cluster that does all steps of a call of a perceptron with one hidden layer where it can
# (training/cluster.cuh): the smallest size that has enough of them. On an H200 an epoch of MNIST, batch 64, took half
# as long as by graphs with SGD, and two thirds with Adam; benchmarks/gpu_training.py times both.
CLUSTER_SIZES: tuple[int, ...] = (8, 16)

# A cluster of 16 needs as many multiprocessors of one part of the GPU: a whole one, and not a share of it.
_CLUSTER_MULTIPROCESSORS = 100

# Mini-batches are arranged for the cluster before a launch of it, as many as have so many bytes.
MOST_ARRANGED_BYTES = 128 << 20

# As in training/cluster.cuh.
_CLUSTER_THREADS = 256
_CLUSTER_ROWS, _CLUSTER_UNITS, _CLUSTER_OUTPUTS = 64, 8, 16
_CLUSTER_FEATURES = 800

# As in csrc/cuda/training and matmul/small.cuh.
_MOST_LAYERS = 8
_TOP_COLUMNS = 16
_LOSS_THREADS = 128
_EXPAND_THREADS = 256
_WIDE_THREADS, _WIDE_NUMBERS = 256, 128 * 36
_WIDE_SIDE = 32
_MOST_NUMBERS = 11


#
# What the kernels take, as csrc/cuda/training declares it
#


def _struct(*fields: tuple[Any, ...]) -> np.dtype[Any]:
    return np.dtype(list(fields), align=True)


def _filled(dtype: np.dtype[Any], **values: Any) -> np.void:
    """A struct with these members; 0 what is not named."""
    record = np.zeros(1, dtype)
    for name, value in values.items():
        record[name] = value
    result: np.void = record[0]
    return result


_PROGRESS = _struct(
    ("order", "u8"),
    ("numbers", "u8", (2,)),
    ("decay", "u8"),
    ("noise", "u8"),
    ("batch", "i8"),
    ("next", "i8"),
    ("step", "i8"),
    ("loss", "f8", (2,)),
    ("right", "i8"),
)
_INPUT = _struct(("rows", "u8"), ("stride", "i8"), ("samples", "u8"))
_LAYER = _struct(("parameters", "u8"), ("in", "i4"), ("out", "i4"))
_BROUGHT = _struct(
    ("progress", "u8"),
    ("rows", "i4"),
    ("samples", "u8"),
    ("indices", "u8"),
    ("labels", "u8"),
    ("numbers", "u8"),
    ("number_counts", "i4", (2,)),
    ("averages", "?"),
)
_EXPAND = _struct(("values", "u8"), ("row_start", "u8"), ("columns", "u8"), ("features", "i4"), ("rows", "u8"))
_UPDATED_LAYER = _struct(
    ("first_block", "i4"), ("in", "i4"), ("out", "i4"), ("parameters", "u8"), ("x", "u8"), ("grad", "u8")
)
_UPDATE = _struct(
    ("layers", _UPDATED_LAYER, (_MOST_LAYERS,)),
    ("layer_count", "i4"),
    ("blocks", "i4"),
    ("has_first", "?"),
    ("input", _INPUT),
    ("rows", "i4"),
    ("plane", "i8"),
    ("averages", "?"),
    ("numbers", "u8"),
    ("network", "i4"),
    ("losses", "u8"),
    ("right", "u8"),
    ("loss_rows", "i4"),
    ("weight", "f8"),
    ("closes", "?"),
    ("progress", "u8"),
)


_ARRANGE = _struct(
    ("samples", "u8"),
    ("features", "i4"),
    ("indices", "u8"),
    ("progress", "u8"),
    ("rows", "i4"),
    ("tiles", "u8"),
    ("labels", "u8"),
)
_CLOSE = _struct(("losses", "u8"), ("right", "u8"), ("rows", "i4"), ("weight", "f8"), ("progress", "u8"))


class _Structs:
    """Those that hold numbers of the network's type."""

    def __init__(self, t: np.dtype[Any]) -> None:
        self.activation = _struct(("number", "i4"), ("parameter", t))
        self.below = _struct(("activation", self.activation), ("saved", "u8"), ("grad", "u8"))
        self.objective = _struct(
            ("loss", "i4"),
            ("parameter", t),
            ("share", t),
            ("labels", "u8"),
            ("values", "u8"),
            ("samples", "u8"),
            ("first", t),
            ("second", t),
            ("boundary", "i4"),
            ("losses", "u8"),
            ("right", "u8"),
        )
        self.forward = _struct(
            ("input", _INPUT),
            ("layer", _LAYER),
            ("activation", self.activation),
            ("y", "u8"),
            ("z", "u8"),
            ("rows", "i4"),
        )
        self.backward = _struct(("grad", "u8"), ("layer", _LAYER), ("below", self.below), ("rows", "i4"))
        self.loss = _struct(
            ("y", "u8"),
            ("z", "u8"),
            ("out", "i4"),
            ("activation", self.activation),
            ("objective", self.objective),
            ("grad", "u8"),
            ("rows", "i4"),
        )
        self.top = _struct(
            ("x", "u8"),
            ("layer", _LAYER),
            ("activation", self.activation),
            ("objective", self.objective),
            ("grad", "u8"),
            ("below", self.below),
        )
        self.cluster = _struct(
            ("progress", "u8"),
            ("tiles", "u8"),
            ("rows", "i4"),
            ("features", "i4"),
            ("hidden", "i4"),
            ("out", "i4"),
            ("first", "u8"),
            ("last", "u8"),
            ("plane", "i8"),
            ("hidden_activation", self.activation),
            ("activation", self.activation),
            ("objective", self.objective),
        )
        self.gather = _struct(("samples", "u8"), ("features", "i4"), ("scale", t), ("shift", t), ("rows", "u8"))


_structs = functools.cache(_Structs)

# The tiles of matmul/small.cuh, and the rows and columns of each.
_TILES = {"SmallTile<8>": 8, "SmallTile<16>": 16, "WideTile": 32}


@functools.cache
def _places(kind: str) -> dict[str, int]:
    """The numbers by which kernels know activations, losses or row losses: their places in C++'s list."""
    text = "".join(text for name, text in compiler.sources().items() if name.startswith("formulas/"))
    declared = re.search(rf"#define GEMMLET_{kind.upper()}\(X\)((?:.*\\\n)*.*)", text)
    assert declared is not None
    return {name: place for place, name in enumerate(re.findall(r"X\((\w+)\)", declared[1]))}


def _loss_number(name: str) -> int:
    rows = _places("row_losses")
    return ~rows[name] if name in rows else _places("losses")[name]


def expressions() -> dict[str, list[str]]:
    """Every kernel that this module launches, by source file: for compiling ahead of time, and for tests."""
    names = list[str]()
    for t in ("float", "double"):
        names += [f"loss<{t}>", f"top<{t}>", f"expand<{t}>"]
        names += [f"backward<{t}, gemmlet::{tile}>" for tile in _TILES]
        names += [f"forward<{t}, gemmlet::{tile}>" for tile in _TILES]
        for n in (t, "unsigned char"):
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
    return f"training/{_SOURCES[kernel.partition('<')[0]]}.cuh"


def fuses(activations: Iterable[str], losses: Iterable[str], rule: str) -> bool:
    """Whether C++ has all of these formulas."""
    known_losses = {*_places("row_losses"), *_places("losses")}
    return (
        all(name in _places("activations") for name in activations)
        and all(name in known_losses for name in losses)
        and rule in OPTIMIZER_RULES
    )


#
# What stays on the GPU between calls
#


class ResidentFeed(Feed):
    """A feed whose arrays are on a GPU, and what training on it has made there."""

    sessions: dict[Any, _Session]


def hold(device: Device, feed: Feed, targets: Any = None) -> tuple[ResidentFeed, Any]:
    """Return samples and targets as they are on the GPU: copies, or themselves where they are there already."""
    if isinstance(feed, ResidentFeed):
        return feed, targets

    def resident(array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        return device.upload(np.ascontiguousarray(array))

    held = ResidentFeed(resident(feed.x), resident(feed.row_start), resident(feed.columns), feed.skip_zeros)
    held.sessions = {}
    return held, resident(targets)


@whole_steps()
def write_back(feed: Feed) -> None:
    """See `NumpyBackend.write_back`."""
    for session in getattr(feed, "sessions", {}).values():
        session.write_back()


class _Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    block: int
    arguments: tuple[Any, ...]
    shared: int

    @property
    def name(self) -> str:
        """The kernel's, without its types."""
        return self.kernel.removeprefix("gemmlet::").partition("<")[0]


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
    """How a product is launched."""

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


class _Stack:
    """One network on the GPU: its parameters' place in the state, and its matrices of so many rows."""

    def __init__(
        self, device: Device, network: FusedNetwork, rows: int, state_offset: int, *, output: Any = None
    ) -> None:
        layers, rule, _ = network
        self.rule, self.averages = rule, _has_averages(network)
        self.dtype = dtype = layers[0].weight.dtype
        self.widths = [layers[0].weight.shape[0], *(layer.weight.shape[1] for layer in layers)]
        self.activations = [_filled(_structs(dtype).activation, **_activation(layer)) for layer in layers]
        self.planes = 1 + len(OPTIMIZER_RULES[rule].state) + self.averages
        self._sizes = [(layer.weight.shape[0] + 1) * _stride(layer.weight.shape[1]) for layer in layers]
        self.plane = sum(self._sizes)
        self.state_offset, self.state_bytes = state_offset, self.planes * self.plane * dtype.itemsize

        def matrix(width: int, wanted: bool = True) -> Any:
            return device.empty((rows, _stride(width)), dtype) if wanted else None

        needs_x = [layer.activation is not None and ACTIVATIONS[layer.activation].needs_x for layer in layers]
        self.y = [matrix(width) for width in self.widths[1:-1]] + [
            matrix(self.widths[-1]) if output is None else output
        ]
        self.z = [matrix(width, needed) for width, needed in zip(self.widths[1:], needs_x, strict=True)]
        self.grad = [matrix(width) for width in self.widths[1:]]

    def parameters(self, state: int, layer: int) -> int:
        """The address of a layer's parameters, the state's being `state`."""
        return state + self.state_offset + int(sum(self._sizes[:layer])) * self.dtype.itemsize

    def layer(self, state: int, layer: int) -> np.void:
        """A layer, as kernels take it."""
        parameters = self.parameters(state, layer)
        return _filled(_LAYER, **{"parameters": parameters, "in": self.widths[layer], "out": self.widths[layer + 1]})

    def below(self, layer: int) -> np.void:
        """A layer as the one below another."""
        saved = self.y[layer] if self.z[layer] is None else self.z[layer]
        return _filled(
            _structs(self.dtype).below,
            activation=self.activations[layer],
            saved=address(saved),
            grad=address(self.grad[layer]),
        )

    def copies(self, network: FusedNetwork, state: NDArray[np.uint8]) -> Iterator[tuple[Array, Array]]:
        """Each array of `network`, and the view of a copy of the state on the CPU that belongs to it."""
        own = state[self.state_offset : self.state_offset + self.state_bytes].view(self.dtype)
        for p, plane in enumerate(own.reshape(self.planes, self.plane)):
            start = 0
            for layer, size in zip(network.layers, self._sizes, strict=True):
                inputs, outputs = layer.weight.shape
                matrix = plane[start : start + size].reshape(inputs + 1, -1)[:, :outputs]
                weights: list[Any] = [layer.weight, *layer.weight_state, layer.weight_average]
                biases: list[Any] = [layer.bias, *layer.bias_state, layer.bias_average]
                yield weights[p], matrix[:inputs]
                yield biases[p], matrix[inputs]
                start += size


def _activation(layer: FusedLayer) -> dict[str, Any]:
    name = "identity" if layer.activation is None else layer.activation
    return {"number": _places("activations")[name], "parameter": layer.activation_parameter}


class _Session:
    """Networks on the GPU, which share one state behind a `_PROGRESS`, and the steps that are recorded for them."""

    def __init__(self, device: Device, dtype: np.dtype[Any], rows: int) -> None:
        self.device, self.dtype, self.capacity = device, dtype, rows
        self.structs, self.type = _structs(dtype), CPP_TYPES[dtype.name]
        self.stacks: list[_Stack] = []
        self._state_bytes = _pieces(_PROGRESS.itemsize, 256) * 256
        self._steps: dict[int, list[_Launch]] = {}
        self._graphs: dict[tuple[int, int], Any] = {}
        self._launches: list[_Launch] = []

    # Putting it together.

    def stack(self, network: FusedNetwork, rows: int, **settings: Any) -> _Stack:
        """Add a network."""
        stack = _Stack(self.device, network, rows, self._state_bytes, **settings)
        self.stacks.append(stack)
        self._state_bytes += _pieces(stack.state_bytes, 256) * 256
        return stack

    def complete(self) -> None:
        """Make the state, when all networks are there."""
        empty = self.device.empty
        self._state = empty((self._state_bytes,), np.dtype(np.uint8))
        self.state = self.progress = address(self._state)
        # The same on the CPU.
        self._host = self.device.empty_pinned((self._state_bytes,), np.uint8)
        self._host[:] = 0
        # What belongs to a call alone, there and here; longer ones take their place where a call needs that.
        self._own, self._own_host = empty((0,), np.uint8), self.device.empty_pinned((0,), np.uint8)
        # The networks whose arrays are older than the state.
        self._ahead: Sequence[FusedNetwork] = ()
        # What is brought for a step.
        self.samples = empty((self.capacity,), np.dtype(np.int64))
        self.labels = empty((self.capacity,), np.dtype(np.int32))
        self._numbers = empty((2, _MOST_NUMBERS), self.dtype)

    def launches(self, rows: int) -> None:
        """Those of a step of so many rows, by `add` and what calls it."""
        raise NotImplementedError

    def add(self, kernel: str, grid: tuple[int, int], block: int, *arguments: np.generic, shared: int = 0) -> None:
        self._launches.append(_Launch(f"gemmlet::{kernel}", (*grid, 1), block, arguments, shared))

    def _tiles(self, rows: int, columns: int, depth: int, least_warps: int = 1) -> _Tiles:
        """The tiles of a product."""
        kind = _kind_of_tile(rows, columns)
        side = _TILES[kind]
        threads, numbers = _WIDE_THREADS, _WIDE_NUMBERS
        grid = _pieces(rows, side), _pieces(columns, side)
        if kind != "WideTile":
            # Each warp takes so many numbers of the depth at a time: as few turns as the largest block allows, and no
            # more warps than that. One for each of its results a block must have.
            at_a_time = (16 if side == 8 else 4) * (16 // self.dtype.itemsize)
            most_warps = 16 if grid[0] * grid[1] <= MOST_LARGE_BLOCKS else 8
            turns = _pieces(depth, at_a_time * most_warps)
            warps = max(side * side // 32, _pieces(_pieces(depth, at_a_time), turns), least_warps)
            threads, numbers = 32 * warps, warps * side * side
        return _Tiles(f"gemmlet::{kind}", grid, threads, numbers * self.dtype.itemsize)

    def input_of_samples(self, x: Any) -> _Input:
        """Rows of x, those of the mini-batch."""
        rows, stride, samples = address(x), x.shape[1], address(self.samples)
        return _Input(CPP_TYPES[x.dtype.name], _filled(_INPUT, rows=rows, stride=stride, samples=samples))

    def input_of_rows(self, matrix: Any) -> _Input:
        """Rows of a matrix, all of them."""
        return _Input(self.type, _filled(_INPUT, rows=address(matrix), stride=matrix.shape[1]))

    def input_of_noise(self, width: int) -> _Input:
        """Rows of the call's noise, those of the mini-batch."""
        return _Input(self.type, _filled(_INPUT, stride=width))

    def brought(self, rows: int, indices: Any = None) -> np.void:
        """What the kernel that opens a step brings; of class indices, the mini-batch's."""
        counts = [len(OPTIMIZER_RULES[stack.rule].scalars) for stack in self.stacks]
        return _filled(
            _BROUGHT,
            progress=self.progress,
            rows=rows,
            samples=address(self.samples),
            indices=address(indices),
            labels=address(self.labels),
            numbers=address(self._numbers),
            number_counts=[*counts, 0][:2],
            averages=self.stacks[0].averages,
        )

    def forward_arguments(
        self, stack: _Stack, layer: int, given: _Input, rows: int, least_warps: int = 1
    ) -> tuple[_Tiles, np.void]:
        """How one layer is launched, and what of itself it is told."""
        inputs, outputs = stack.widths[layer : layer + 2]
        return self._tiles(rows, outputs, inputs, least_warps), _filled(
            self.structs.forward,
            input=given.value,
            layer=stack.layer(self.state, layer),
            activation=stack.activations[layer],
            y=address(stack.y[layer]),
            z=address(stack.z[layer]),
            rows=rows,
        )

    def forward(self, stack: _Stack, layer: int, given: Any, rows: int) -> None:
        """One layer, from a matrix."""
        tiles, p = self.forward_arguments(stack, layer, self.input_of_rows(given), rows)
        self.add(f"forward<{self.type}, {tiles.kind}>", tiles.grid, tiles.block, p, shared=tiles.shared)

    def backward(self, stack: _Stack, layer: int, below: np.void, rows: int) -> None:
        """The gradient of one layer's preactivations becomes that of those below."""
        inputs, outputs = stack.widths[layer : layer + 2]
        tiles = self._tiles(rows, inputs, outputs)
        p = _filled(
            self.structs.backward,
            grad=address(stack.grad[layer]),
            layer=stack.layer(self.state, layer),
            below=below,
            rows=rows,
        )
        self.add(f"backward<{self.type}, {tiles.kind}>", tiles.grid, tiles.block, p, shared=tiles.shared)

    def has_top(self, stack: _Stack, rows: int) -> bool:
        """Whether the last layer goes with the loss in one kernel."""
        inputs, outputs = stack.widths[-2:]
        size = rows * inputs * _stride(outputs) * self.dtype.itemsize
        return len(stack.y) > 1 and outputs <= MOST_TOP_OUTPUTS and size <= MOST_TOP_BYTES

    def rest_and_back(self, stack: _Stack, rows: int, objective: np.void) -> None:
        """From the results of the first layer to the loss, and to the gradients of all preactivations."""
        last, top = len(stack.y) - 1, self.has_top(stack, rows)
        for layer in range(1, last + 1 - top):
            self.forward(stack, layer, stack.y[layer - 1], rows)
        common = {"activation": stack.activations[last], "objective": objective, "grad": address(stack.grad[last])}
        outputs = stack.widths[-1]
        if top:
            inputs = stack.widths[-2]
            block = min(256, _pieces(inputs, 32) * 32)
            numbers = (block // 32 + 3) * _pieces(outputs, _TOP_COLUMNS) * _TOP_COLUMNS
            p = _filled(
                self.structs.top,
                x=address(stack.y[last - 1]),
                layer=stack.layer(self.state, last),
                below=stack.below(last - 1),
                **common,
            )
            self.add(f"top<{self.type}>", (rows, 1), block, p, shared=numbers * self.dtype.itemsize)
        else:
            y, z = address(stack.y[last]), address(stack.z[last])
            p = _filled(self.structs.loss, y=y, z=z, out=outputs, rows=rows, **common)
            self.add(f"loss<{self.type}>", (_pieces(rows, _LOSS_THREADS // 32), 1), _LOSS_THREADS, p)
        for layer in range(last - top, 0, -1):
            self.backward(stack, layer, stack.below(layer - 1), rows)

    def update(
        self,
        stack: _Stack,
        given: _Input,
        rows: int,
        *,
        losses: Any,
        right: Any = None,
        weight: float = 1.0,
        closes: bool = False,
    ) -> None:
        """All weights of a network, and the sums of the losses."""
        number = self.stacks.index(stack)
        count = len(stack.y)
        for first in range(0, count, _MOST_LAYERS):
            end = min(first + _MOST_LAYERS, count)
            updated = np.zeros(_MOST_LAYERS, _UPDATED_LAYER)
            blocks = 0
            for place, layer in enumerate(range(first, end)):
                inputs, outputs = stack.widths[layer : layer + 2]
                updated[place] = (
                    blocks,
                    inputs,
                    outputs,
                    stack.parameters(self.state, layer),
                    address(stack.y[layer - 1]) if layer else 0,
                    address(stack.grad[layer]),
                )
                blocks += _pieces(inputs + 1, _WIDE_SIDE) * _pieces(outputs, _WIDE_SIDE)
            last = end == count
            p = _filled(
                _UPDATE,
                layers=updated,
                layer_count=end - first,
                blocks=blocks,
                has_first=first == 0,
                input=given.value,
                rows=rows,
                plane=stack.plane,
                averages=stack.averages,
                numbers=address(self._numbers) + number * _MOST_NUMBERS * self.dtype.itemsize,
                network=number,
                losses=address(losses),
                right=address(right),
                loss_rows=rows if last else 0,
                weight=weight,
                closes=closes and last,
                progress=self.progress,
            )
            kernel = f"update<{self.type}, {given.type}, gemmlet::optimizers::{stack.rule}>"
            self.add(kernel, (blocks + 1, 1), _WIDE_THREADS, p, shared=_WIDE_NUMBERS * self.dtype.itemsize)

    # Using it.

    def train(
        self,
        networks: Sequence[FusedNetwork],
        order: NDArray[np.int64],
        batch: int,
        losses: Sequence[float],
        noise: Array | None = None,
        decay: NDArray[np.float64] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[list[float], int]:
        """All steps of a call; the sums of the losses, those given included, and how many rows were right.

        The networks' arrays are older than the state then, until `write_back`.
        """
        full, rest = divmod(len(order), batch)
        # Before anything is sent, as it takes time, and may fail.
        runs = self._runs(batch, full) + self._runs(rest, 1 if rest else 0)
        numbers = [network.scalars for network in networks]
        places, own_bytes = self._place(order, *numbers, *(() if decay is None else (decay,)))
        there = None if noise is None else self.device.empty(noise.shape, noise.dtype)
        if self._ahead and not _same_arrays(self._ahead, networks):
            self.write_back()
        sent = self._host[: _PROGRESS.itemsize] if self._ahead else self._host
        if not self._ahead:
            for array, copy in self._copies(networks):
                copy[...] = array
        progress = self._host[: _PROGRESS.itemsize].view(_PROGRESS)
        progress["order"], progress["batch"], progress["next"], progress["right"] = places[0], batch, 0, 0
        progress["numbers"][0, : len(networks)] = places[1 : 1 + len(networks)]
        if noise is not None:
            progress["noise"], progress["decay"] = address(there), places[-1]
        progress["loss"][0, : len(losses)] = losses

        try:
            self.device.upload(sent, self._state[: len(sent)])
            self.device.upload(self._own_host[:own_bytes], self._own[:own_bytes])
            if noise is not None:
                self.device.upload(np.ascontiguousarray(noise), there)
            self._ahead = networks
            for graph, times in runs:
                graph.replay(times)
            if meanwhile is not None:
                meanwhile()
        except BaseException:
            # What is sent from must not change, or go, before it has been sent.
            self.device.synchronize()
            raise
        self.device.download(self._state[: _PROGRESS.itemsize], self._host[: _PROGRESS.itemsize])
        return [float(value) for value in progress["loss"][0, : len(losses)]], int(progress["right"][0])

    def _place(self, *arrays: Array) -> tuple[list[int], int]:
        """Copy what belongs to a call to where it is sent from: its addresses on the GPU, and how many bytes it is."""
        places, end = [], 0
        for array in arrays:
            places.append(end)
            end += _pieces(array.nbytes, 16) * 16
        if len(self._own_host) < end:
            self._own = self.device.empty((end,), np.uint8)
            self._own_host = self.device.empty_pinned((end,), np.uint8)
        for array, place in zip(arrays, places, strict=True):
            self._own_host[place : place + array.nbytes].view(array.dtype)[...] = array.reshape(-1)
        return [address(self._own) + place for place in places], end

    def _copies(self, networks: Sequence[FusedNetwork]) -> Iterator[tuple[Array, Array]]:
        """Each array of the networks, and the view of the state on the CPU that belongs to it."""
        for stack, network in zip(self.stacks, networks, strict=True):
            yield from stack.copies(network, self._host)

    def write_back(self) -> None:
        """Copy the state into the networks' arrays, if it is newer than they are."""
        if self._ahead:
            self.device.download(self._state, self._host)
            for array, copy in self._copies(self._ahead):
                array[...] = copy
            self._ahead = ()

    def _runs(self, rows: int, steps: int) -> list[tuple[Graph, int]]:
        """What does so many steps of so many rows, and how often."""
        if not steps:
            return []
        if rows not in self._steps:
            self._launches = []
            self.launches(rows)
            self._steps[rows] = self._launches
        launches = self._steps[rows]
        if size := self._cluster_size(launches, rows):
            if (rows, 0) not in self._graphs:
                self._graphs[rows, 0] = _Cluster(self.device, self.structs, launches, size, rows)
            self._graphs[rows, 0].reserve(steps)
            return [(self._graphs[rows, 0], steps)]
        runs = []
        for together, times in ((STEPS_TOGETHER, steps // STEPS_TOGETHER), (1, steps % STEPS_TOGETHER)):
            if times and (rows, together) not in self._graphs:
                self._graphs[rows, together] = self._recorded(launches, together)
            if times:
                runs.append((self._graphs[rows, together], times))
        return runs

    def _cluster_size(self, launches: Sequence[_Launch], rows: int) -> int:
        """Of the cluster that can do these launches; 0 if none can."""
        names = [launch.name for launch in launches]
        if self.device.arch not in ARCHITECTURES[CLUSTER_SOURCE] or names != ["first_forward", "top", "update"]:
            return 0
        if self.type != "float" or not launches[0].kernel.startswith("gemmlet::first_forward<float, unsigned char,"):
            return 0
        features, hidden, out = self.stacks[0].widths
        if features > _CLUSTER_FEATURES or out > _CLUSTER_OUTPUTS or rows > _CLUSTER_ROWS or self.stacks[0].averages:
            return 0
        few = self.device.multiprocessors < _CLUSTER_MULTIPROCESSORS and self.device.arch != "host"
        sizes = [size for size in CLUSTER_SIZES if size * _CLUSTER_UNITS >= hidden and not (size > 8 and few)]
        return min(sizes, default=0)

    def _recorded(self, launches: Sequence[_Launch], times: int) -> Graph:
        device = self.device
        # They are compiled first: not while a stream is recorded. Each on its own, as many networks share it.
        kernels = [device.kernels(_source(launch.name), [launch.kernel])[0] for launch in launches]

        def record() -> None:
            for _ in range(times):
                for kernel, launch in zip(kernels, launches, strict=True):
                    device.launch(kernel, launch.grid, launch.block, launch.arguments, launch.shared)

        return device.record(record)


class _Cluster:
    """Steps of so many rows in a cluster, some hundreds in each launch of it."""

    def __init__(self, device: Device, structs: _Structs, launches: Sequence[_Launch], size: int, rows: int) -> None:
        self._device, self._size, self._rows = device, size, rows
        first, top, update = (launch.arguments[0] for launch in launches)
        brought = launches[0].arguments[1]
        given, layers = first["input"], update["layers"]
        features, hidden = int(layers[0]["in"]), int(layers[0]["out"])
        self._step_numbers = _pieces(features, 16) * 16 * _CLUSTER_ROWS
        # (Steps are the second number of a grid.)
        self._most_steps = min(max(1, MOST_ARRANGED_BYTES // (2 * self._step_numbers)), 65535)
        progress = brought["progress"]
        self._arrange = _filled(
            _ARRANGE, samples=given["rows"], features=features, indices=brought["indices"], progress=progress, rows=rows
        )
        self._train = _filled(
            structs.cluster,
            progress=progress,
            rows=rows,
            features=features,
            hidden=hidden,
            out=layers[1]["out"],
            first=layers[0]["parameters"],
            last=layers[1]["parameters"],
            plane=update["plane"],
            hidden_activation=first["activation"],
            activation=top["activation"],
            objective=top["objective"],
        )
        self._close = _filled(_CLOSE, rows=rows, weight=update["weight"], progress=progress)
        rule = launches[2].kernel.rpartition("::")[2].rstrip(">")
        names = [
            f"arrange_samples<{_CLUSTER_THREADS}>",
            f"train_in_cluster<{size}, gemmlet::optimizers::{rule}>",
            f"close_steps<{_CLUSTER_THREADS}>",
        ]
        # Each on its own, as rules share the others.
        self._kernels = [device.kernels(CLUSTER_SOURCE, [f"gemmlet::{name}"])[0] for name in names]
        self._shared = _cluster_bytes(size) + 2 * 2 * self._step_numbers
        self._reserved = 0

    def reserve(self, steps: int) -> None:
        """Have space for so many steps."""
        steps = min(steps, self._most_steps)
        if steps <= self._reserved:
            return
        empty, rows = self._device.empty, self._rows
        # First of all the old memory is given back; there may be none then.
        self._reserved, self._memory = 0, list[Any]()
        self._memory = [
            empty((steps, self._step_numbers), np.dtype(np.uint16)),
            empty((steps, rows), np.dtype(np.int32)),
            empty((steps, rows), np.dtype(np.float64)),
            empty((steps, rows), np.dtype(np.int32)),
        ]
        self._reserved = steps
        tiles, labels, losses, right = map(address, self._memory)
        for p in (self._arrange, self._train):
            p["tiles"] = tiles
        self._arrange["labels"] = labels
        objective = self._train["objective"]
        if objective["labels"]:
            objective["labels"] = labels
        for p in (objective, self._close):
            p["losses"] = losses
            p["right"] = right

    def replay(self, count: int = 1) -> None:
        """Do so many steps."""
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


def _cluster_bytes(size: int) -> int:
    """Of ClusterMemory."""
    sums, matrices = 8 * 8 * 64, (_CLUSTER_ROWS + _CLUSTER_UNITS) * 20
    biases, parts = _CLUSTER_UNITS + _CLUSTER_OUTPUTS, _CLUSTER_ROWS * _CLUSTER_OUTPUTS
    numbers = sums + matrices + biases + parts + 2 * (_MOST_NUMBERS + 1) + 2 * _CLUSTER_ROWS
    return 4 * numbers + 8 * (_CLUSTER_ROWS // size + 8)


def _session(feed: ResidentFeed, key: tuple[Any, ...], rows: int, make: Callable[[], _Session]) -> _Session:
    """The session for these settings on this feed, if it has space for so many rows; else a new one."""
    session = feed.sessions.get(key)
    for other in feed.sessions.values():
        if other is not session or session.capacity < rows:
            other.write_back()
    if session is None or session.capacity < rows:
        # First of all the old one's memory is given back.
        feed.sessions.pop(key, None)
        session = feed.sessions[key] = make()
    return session


def _same_arrays(networks: Sequence[FusedNetwork], others: Sequence[FusedNetwork]) -> bool:
    """Whether networks of one shape have the very same arrays, and not only equal ones."""

    def arrays(networks: Sequence[FusedNetwork]) -> Iterator[Any]:
        for network in networks:
            for layer in network.layers:
                yield from (layer.weight, *layer.weight_state, layer.weight_average)
                yield from (layer.bias, *layer.bias_state, layer.bias_average)

    return all(a is b for a, b in zip(arrays(networks), arrays(others), strict=True))


def _shape(network: FusedNetwork) -> tuple[Any, ...]:
    """What kernels are told of a network."""
    layers = tuple(
        (layer.weight.shape, layer.weight.dtype, layer.activation, layer.activation_parameter)
        for layer in network.layers
    )
    return layers, network.rule, _has_averages(network)


def _has_averages(network: FusedNetwork) -> bool:
    return network.layers[0].weight_average is not None


class _MlpSession(_Session):
    def __init__(self, device: Device, run: MlpRun, rows: int) -> None:
        super().__init__(device, run.network.layers[0].weight.dtype, rows)
        # (Not what holds this session: it would hold itself.)
        self.feed, self.targets, self.loss, self.row_weight = Feed(*run.feed), run.targets, run.loss, run.row_weight
        self.network = self.stack(run.network, rows)
        features = self.network.widths[0]
        self.dense = None if self.feed.row_start is None else device.empty((rows, _stride(features)), self.dtype)
        self.losses, self.right = device.empty((rows,), np.dtype(np.float64)), device.empty((rows,), np.dtype(np.int32))
        self.complete()

    def launches(self, rows: int) -> None:
        feed, network = self.feed, self.network
        classes = self.targets.dtype == np.int64
        brought = self.brought(rows, self.targets if classes else None)
        if self.dense is None:
            given = self.input_of_samples(feed.x)
            tiles, p = self.forward_arguments(network, 0, given, rows)
            kernel, grid = f"first_forward<{self.type}, {given.type}, {tiles.kind}>", (tiles.grid[0], tiles.grid[1] + 1)
            self.add(kernel, grid, tiles.block, p, brought, shared=tiles.shared)
        else:
            given = self.input_of_rows(self.dense)
            p = _filled(
                _EXPAND,
                values=address(feed.x),
                row_start=address(feed.row_start),
                columns=address(feed.columns),
                features=network.widths[0],
                rows=address(self.dense),
            )
            self.add(f"expand<{self.type}>", (rows + 1, 1), _EXPAND_THREADS, p, brought)
            self.forward(network, 0, self.dense, rows)
        objective = _filled(
            self.structs.objective,
            loss=_loss_number(self.loss),
            parameter=LOSSES[self.loss].default if self.loss in LOSSES else 0.0,
            share=self.row_weight / rows,
            labels=address(self.labels) if classes else 0,
            values=0 if classes else address(self.targets),
            samples=address(self.samples),
            losses=address(self.losses),
            right=address(self.right),
        )
        self.rest_and_back(network, rows, objective)
        losses = {"losses": self.losses, "right": self.right, "weight": self.row_weight}
        self.update(network, given, rows, **losses, closes=True)


@whole_steps()
def train_mlp(device: Device, run: MlpRun) -> tuple[float, int]:
    """See `NumpyBackend.train_mlp`."""
    if not len(run.order):
        return run.loss_sum, 0
    held = isinstance(run.feed, ResidentFeed)
    feed, targets = hold(device, run.feed, run.targets)
    run, batch = run._replace(feed=feed, targets=targets), min(run.batch, len(run.order))
    session = _session(
        feed,
        (_shape(run.network), address(targets), run.loss, run.row_weight),
        batch,
        lambda: _MlpSession(device, run, batch),
    )
    losses, right = session.train([run.network], run.order, batch, [run.loss_sum], meanwhile=run.meanwhile)
    if not held:
        session.write_back()
    return losses[0], right


class _GanSession(_Session):
    def __init__(self, device: Device, run: GanRun, rows: int) -> None:
        super().__init__(device, run.generator.layers[0].weight.dtype, rows)
        self.x, self.scale, self.shift = run.feed.x, run.scale, run.shift
        self.real_target, self.non_saturating = run.real_target, run.non_saturating
        features = run.discriminator.layers[0].weight.shape[0]
        # What the discriminator sees: first what is generated, then as many samples.
        self.seen = device.empty((2 * rows, _stride(features)), self.dtype)
        self.generator = self.stack(run.generator, rows, output=self.seen)
        self.discriminator = self.stack(run.discriminator, 2 * rows)
        self.losses = device.empty((2 * rows,), np.dtype(np.float64))
        self.complete()

    def _objective(self, share: float, targets: tuple[float, float], boundary: int) -> np.void:
        return _filled(
            self.structs.objective,
            loss=_loss_number("binary_cross_entropy_with_logits"),
            share=share,
            first=targets[0],
            second=targets[1],
            boundary=boundary,
            losses=address(self.losses),
        )

    def launches(self, rows: int) -> None:
        g, d = self.generator, self.discriminator
        noise, seen = self.input_of_noise(g.widths[0]), self.input_of_rows(self.seen)
        samples = _filled(
            self.structs.gather,
            samples=address(self.x),
            features=d.widths[0],
            scale=self.scale,
            shift=self.shift,
            rows=address(self.seen[rows:]),
        )
        # (Samples are gathered by blocks of that size, too.)
        tiles, p = self.forward_arguments(g, 0, noise, rows, least_warps=8)
        tile_rows, tile_columns = tiles.grid
        grid = tile_rows, tile_columns + _pieces(rows + 1, tile_rows)
        kernel = f"first_forward_and_gather<{self.type}, {CPP_TYPES[self.x.dtype.name]}, {tiles.kind}>"
        arguments = p, self.brought(rows), samples, np.int32(tile_columns)
        self.add(kernel, grid, tiles.block, *arguments, shared=tiles.shared)
        for layer in range(1, len(g.y)):
            self.forward(g, layer, g.y[layer - 1], rows)

        # A step of the discriminator.
        self.forward(d, 0, self.seen, 2 * rows)
        self.rest_and_back(d, 2 * rows, self._objective(1.0 / rows, (0.0, self.real_target), rows))
        self.update(d, seen, 2 * rows, losses=self.losses)

        # One of the generator, whose loss goes through the discriminator as it is now. minimax: log(1 - D) shall become
        # small, so that loss and gradient of the target 0 change their sign.
        sign, target = (1.0, 1.0) if self.non_saturating else (-1.0, 0.0)
        self.forward(d, 0, self.seen, rows)
        self.rest_and_back(d, rows, self._objective(sign / rows, (target, target), 0))
        last = len(g.y) - 1
        self.backward(d, 0, g.below(last), rows)
        for layer in range(last, 0, -1):
            self.backward(g, layer, g.below(layer - 1), rows)
        self.update(g, noise, rows, losses=self.losses, weight=sign, closes=True)


@whole_steps()
def train_gan(device: Device, run: GanRun) -> tuple[float, float]:
    """See `NumpyBackend.train_gan`."""
    if not len(run.order):
        return run.loss_sums
    held = isinstance(run.feed, ResidentFeed)
    feed, _ = hold(device, run.feed)
    run, batch = run._replace(feed=feed), min(run.batch, len(run.order))
    networks = run.generator, run.discriminator
    session = _session(
        feed,
        (*map(_shape, networks), run.scale, run.shift, run.real_target, run.non_saturating),
        batch,
        lambda: _GanSession(device, run, batch),
    )
    losses, _ = session.train(networks, run.order, batch, run.loss_sums, run.noise, run.decay, run.meanwhile)
    if not held:
        session.write_back()
    return losses[0], losses[1]
