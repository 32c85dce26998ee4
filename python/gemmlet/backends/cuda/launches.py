"""Which kernel a call launches, and how: its name, its threads, what it is given. Matmuls and training have their own.

A `Launcher` has the GPUs, and what was prepared on each; the backend and its fast paths launch by it.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..._arrays import computed_in, name_of
from ...formulas.activations import ACTIVATIONS
from ...formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from ...formulas.optimizers import OPTIMIZER_RULES
from .device import CudaDevice, Device, Launch
from .types import COMPUTED, CPP_TYPES, FLOATS, INTEGERS, RULE_HYPERPARAMETERS, RULE_STATES, SIZES, address

# Threads of the blocks of all kernels here; csrc/cuda says the same (row_threads, __launch_bounds__).
THREADS = 256

# Packs of 16 bytes that a thread of an activation's kernel takes; csrc/cuda/elementwise.cuh says the same.
MAP_PACKS = 2

# By the largest number of columns, the team that takes a row: threads, and numbers of each in registers. 0: any number
# of columns, read from memory in every pass. Few threads with many numbers each have more of them on their way from
# memory at a time, and fewer exchanges; 10 is the usual number of classes, whose rows a thread alone would read too far
# from its neighbours'. Measured on an H100 and an H200, at 10, 128, 1,000 and 10,000 columns.
ROW_TEAMS = (
    (4, 1, 4),
    (8, 2, 4),
    (16, 2, 8),
    (32, 4, 8),
    (64, 4, 16),
    (128, 8, 16),
    (256, 16, 16),
    (512, 32, 16),
    (1024, 32, 32),
    (4096, THREADS, 16),
    (10240, 512, 20),
    (2**31 - 1, THREADS, 0),
)

# How `Device.prepare` calls a number of Compute<T>, and what a loss's kernel ends with: range, partial sums, mean, and
# counter.
_CODES = {name: "d" if computed == "double" else "f" for name, computed in COMPUTED.items()}
_MEAN = ("Q", "Q", "Q", "Q")

# Blocks whose sums the last one adds: enough for two rounds of the largest GPUs. It is part of the result, whose bits
# shall not depend on the GPU.
MAX_PARTS = 2048

# Blocks of a grid-stride loop: of elementwise losses many short ones, so that none is waited for long; of
# cross-entropy, whose blocks begin with a chain of loads, whole rounds of 132 multiprocessors (on an H200 1,024 blocks
# reach 0.89 of the copy bandwidth at 1,000 columns, 8,192 reach 0.75). Functions of rows add nothing up.
MAX_BLOCKS = {"elements": 8192, "row_loss": 1056, "rows": 32768}


# The bytes of an array that a block of an activation's kernel takes, and one of an optimizer's or a loss's.
MAP_BYTES = 16 * MAP_PACKS * THREADS
PACK_BYTES = 16 * THREADS


class Team(NamedTuple):
    """Template arguments of kernels that go by rows: threads, numbers of each, and how many at an access of memory."""

    threads: int
    values: int
    at_once: int


def _held(dtype: str, threads: int, values: int) -> tuple[int, int]:
    """Threads and numbers of an entry of `ROW_TEAMS`; for more than 16 of float64 there are too few registers."""
    if dtype != "float64" or values <= 16:
        return threads, values
    return THREADS, 16 if threads < THREADS else 0


def _pack(dtype: str, values: int) -> int:
    """How many numbers of a row are moved at once, where all rows begin at multiples of as many."""
    whole = 16 // SIZES[dtype]
    return min(whole, values & -values) if values else whole


def _team(dtype: str, columns: int, *addresses: int) -> Team:
    """Who takes the rows of matrices at these addresses."""
    threads, values = next(_held(dtype, threads, values) for most, threads, values in ROW_TEAMS if columns <= most)
    together = _pack(dtype, values)
    bytes_ = together * SIZES[dtype]
    if columns % together or any(at % bytes_ for at in addresses):
        together = 1
    return Team(threads, values, together)


def _teams(dtype: str) -> list[Team]:
    """All that `_team` may return."""
    held = dict.fromkeys(_held(dtype, threads, values) for _, threads, values in ROW_TEAMS)
    return [Team(threads, values, n) for threads, values in held for n in (1, _pack(dtype, values))]


@functools.cache
def _kernel(function: str, formula: str, dtype: str, *more: str | int) -> str:
    """Which kernel goes over arrays of `dtype` by a formula of csrc/formulas; `more` are template arguments."""
    return f"gemmlet::{function}<gemmlet::{formula}, {', '.join(map(str, (CPP_TYPES[dtype], *more)))}>"


@functools.cache
def scaled_kernel(given: np.dtype[Any], dtype: np.dtype[Any]) -> str:
    """Which kernel makes `dtype` of `given`."""
    return f"gemmlet::scaled<{CPP_TYPES[dtype.name]}, {CPP_TYPES[given.name]}>"


@functools.cache
def _column_sum_kernel(dtype: str, down: bool) -> str:
    return f"gemmlet::column_sum<{CPP_TYPES[dtype]}, {str(down).lower()}>"


def expressions() -> dict[str, list[str]]:
    """Every kernel that is launched here, by source file."""
    elementwise, rows, losses, optimizers, reductions = [], [], [], [], []
    for dtype, cpp in FLOATS.items():
        for direction in ("forward", "backward"):
            elementwise += [_kernel(f"activation_{direction}", f"activations::{name}", dtype) for name in ACTIVATIONS]
            functions = itertools.product(ROW_FUNCTIONS, _teams(dtype))
            rows += [_kernel(f"row_{direction}", f"row_functions::{name}", dtype, *team) for name, team in functions]
        elementwise.append(f"gemmlet::strided_copy<{cpp}, {cpp}>")
        losses += [_kernel("elementwise_loss", f"losses::{name}", dtype) for name in LOSSES]
        teams = [(whole, *team) for whole in ("true", "false") for team in _teams(dtype)]
        losses += [_kernel("row_loss", f"row_losses::{name}", dtype, *team) for name in ROW_LOSSES for team in teams]
        optimizers += [_kernel("optimizer_update", f"optimizers::{name}", dtype) for name in OPTIMIZER_RULES]
        reductions += [_column_sum_kernel(dtype, down) for down in (True, False)]
        reductions.append(f"gemmlet::value_range<{cpp}, double>")
    elementwise += [f"gemmlet::strided_copy<long long, {cpp}>" for cpp in INTEGERS.values()]
    for kind in (np.dtype(np.float32), np.dtype(np.float64)):
        elementwise += [scaled_kernel(given, kind) for given in (kind, np.dtype(np.uint8))]
    reductions += [f"gemmlet::value_range<{cpp}, long long>" for cpp in INTEGERS.values()]
    return {
        "elementwise.cuh": elementwise,
        "rows.cuh": rows,
        "losses.cuh": losses,
        "optimizers.cuh": optimizers,
        "column_sum.cuh": reductions,
    }


class Scratch(NamedTuple):
    """What kernels of a stream use one after the other: a counter, left at 0, partial results, and a range of values.

    These are addresses; `memory` is what is there. `partial_bytes` at `partial` may hold other things in between.
    """

    counter: int
    partial: int
    range: int
    partial_bytes: int
    memory: tuple[Any, ...]


class Result(NamedTuple):
    """Two numbers that kernels write to memory of the CPU: its address, and what is there as floats and as integers."""

    place: int
    floats: Any
    integers: Any


class Prepared(NamedTuple):
    """What launches a kernel, and how many elements or rows a block takes, at a time in a grid-stride loop.

    kind: of `MAX_BLOCKS`, for a grid-stride loop.
    """

    launch: Launch
    per_block: int
    kind: str = "rows"

    def blocks(self, count: int) -> int:
        """The blocks of a grid-stride loop over `count` elements or rows."""
        return min(MAX_BLOCKS[self.kind], -(-count // self.per_block))


class Launcher:
    """The GPUs, opened at their first use, and what was prepared on each; `devices` are as the backend takes them."""

    def __init__(self, devices: Sequence[Device] = ()) -> None:
        self._devices: dict[int, Device] = {device.id: device for device in devices}
        first = devices[0] if devices else CudaDevice(0)
        self._devices.setdefault(first.id, first)
        self._first = first
        # What `scratch` and `_result` return: by device, and stream, and for each thread of the CPU, as the default
        # streams of several may be told apart by their thread alone.
        self._own = threading.local()
        # What is prepared, by the number of the device and the kernel.
        self._launches: dict[tuple[int, str], Launch] = {}

    def device_of(self, array: Any) -> Device:
        """The GPU that an array is on."""
        return self.device(array.data.device_id)

    def device(self, number: int) -> Device:
        """The GPU of this number."""
        if (found := self._devices.get(number)) is None:
            found = self._devices[number] = CudaDevice(number)
        return found

    def scratch(self, device: Device) -> Scratch:
        """The memory of the current stream."""
        scratches: dict[tuple[int, int], Scratch] = self._own.__dict__.setdefault("scratches", {})
        where = device.id, device.stream()
        found = scratches.get(where)
        if found is None:
            counter = device.empty((1,), np.dtype(np.uint32))
            device.zero(counter)
            most = max(MAX_BLOCKS["elements"], MAX_BLOCKS["row_loss"], 2 * MAX_PARTS)
            partial, range_ = device.empty((most,), np.float64), device.empty((2,), np.float64)
            memory = counter, partial, range_
            found = Scratch(address(counter), address(partial), address(range_), partial.nbytes, memory)
            scratches[where] = found
        return found

    def _result(self, device: Device) -> Result:
        """The calling thread's result; the thread waits for a kernel before it launches the next that writes there."""
        results: dict[int, Result] = self._own.__dict__.setdefault("results", {})
        found = results.get(device.id)
        if found is None:
            numbers = device.pinned()
            found = results[device.id] = Result(numbers.ctypes.data, numbers.view(np.float64).data, numbers.data)
        return found

    def prepared(
        self, device: Device, source: str, expression: str, parameters: Sequence[str], block: int = THREADS
    ) -> Launch:
        """What launches a kernel, made at its first use."""
        found = self._launches.get((device.id, expression))
        if found is None:
            found = self._launches[device.id, expression] = device.prepare(source, expression, parameters, block)
        return found

    def find_range(
        self, device: Device, dtype: np.dtype[Any], to: str, at: int, size: int, result: int = 0, copy: int = 0
    ) -> None:
        """Launch what finds the smallest and the largest of `size` numbers at an address, NaN passed over.

        to: the C++ type of both, ``"double"`` or ``"long long"``, which go to the address `result`, else to `Scratch`;
        at `copy`, if it is not 0, all numbers are stored in that type.
        """
        kernel = f"gemmlet::value_range<{CPP_TYPES[name_of(dtype)]}, {to}>"
        launch = self.prepared(device, "column_sum.cuh", kernel, ("Q", "Q", "q", "Q", "Q", "Q"))
        scratch = self.scratch(device)
        blocks = min(MAX_PARTS, -(-size // (4 * THREADS)))
        launch(blocks, 1, at, copy, size, scratch.partial, result or scratch.range, scratch.counter)

    def column_sums(
        self, device: Device, dtype: np.dtype[Any], shape: tuple[int, int], strides: tuple[int, int]
    ) -> Callable[[int, int, int], None]:
        """Return ``run(x, out, counter)``, of addresses, which does it; strides are in elements, no dimension is 0."""
        (rows, columns), (row_stride, column_stride) = shape, strides
        down = abs(row_stride) < abs(column_stride)
        blocks = -(-columns // (8 if down else 32))
        # Shares of the rows: enough to occupy all multiprocessors, with some hundred rows at least in each.
        shares = max(1, min(MAX_PARTS // blocks, rows // 512, 65535))
        kernel = _column_sum_kernel(name_of(dtype), down)
        launch = self.prepared(device, "column_sum.cuh", kernel, ("Q", "q", "q", "q", "q", "Q", "Q", "Q"))

        def run(x: int, out: int, counter: int) -> None:
            partial = device.empty((shares, columns), computed_in(dtype)) if shares > 1 else None
            launch(blocks, shares, x, row_stride, column_stride, rows, columns, out, address(partial), counter)

        return run

    def activation_launch(self, device: Device, direction: str, name: str, dtype: np.dtype[Any]) -> Prepared:
        """The launch of an activation: the addresses of two arrays (backward three), the parameter, the size."""
        kind = name_of(dtype)
        parameters = (*("QQ" if direction == "forward" else "QQQ"), _CODES[kind], "q")
        kernel = _kernel(f"activation_{direction}", f"activations::{name}", kind)
        launch = self.prepared(device, "elementwise.cuh", kernel, parameters)
        return Prepared(launch, MAP_BYTES // dtype.itemsize)

    def row_launch(
        self, device: Device, direction: str, name: str, dtype: np.dtype[Any], columns: int, *addresses: int
    ) -> Prepared:
        """The launch of a row function: the addresses of two matrices (backward three), rows, columns."""
        kind = name_of(dtype)
        team = _team(kind, columns, *addresses)
        parameters = (*("QQ" if direction == "forward" else "QQQ"), "q", "i")
        threads = max(THREADS, team.threads)
        kernel = _kernel(f"row_{direction}", f"row_functions::{name}", kind, *team)
        launch = self.prepared(device, "rows.cuh", kernel, parameters, threads)
        return Prepared(launch, threads // team.threads)

    def mean(self, device: Device, launch: Launch, blocks: int, *values: Any, check: bool = False) -> float | None:
        """Launch a loss's kernel, wait for it, and return the mean.

        check: None, with nothing written, if the range that `find_range` has left in `Scratch` is not what it must be.
        """
        scratch, result = self.scratch(device), self._result(device)
        result.floats[1] = 0.0
        launch(blocks, 1, *values, scratch.range if check else 0, scratch.partial, result.place, scratch.counter)
        device.synchronize()
        mean, refused = result.floats
        return None if refused else mean

    def row_loss_launch(
        self, device: Device, name: str, dtype: np.dtype[Any], columns: int, whole: bool, *addresses: int
    ) -> Prepared:
        """The launch of a row loss; `whole`: of class indices, not smoothed.

        It takes the addresses of logits, indices and targets, two numbers, and the gradient's address, rows, columns.
        """
        kind = name_of(dtype)
        team = _team(kind, columns, *addresses)
        parameters = (*"QQQddQqi", *_MEAN)
        threads = max(THREADS, team.threads)
        kernel = _kernel("row_loss", f"row_losses::{name}", kind, str(whole).lower(), *team)
        launch = self.prepared(device, "losses.cuh", kernel, parameters, threads)
        return Prepared(launch, threads // team.threads, "row_loss")

    def loss_launch(self, device: Device, name: str, dtype: np.dtype[Any]) -> Prepared:
        """The launch of a loss: the addresses of prediction and target, the parameter, the gradient's, the size."""
        kind = name_of(dtype)
        parameters = ("Q", "Q", _CODES[kind], "Q", "q", *_MEAN)
        launch = self.prepared(device, "losses.cuh", _kernel("elementwise_loss", f"losses::{name}", kind), parameters)
        return Prepared(launch, PACK_BYTES // dtype.itemsize, "elements")

    def update_launch(self, device: Device, name: str, dtype: np.dtype[Any]) -> Prepared:
        """The launch of a rule: the addresses of param, grad and two states, nine hyperparameters, the size."""
        kind = name_of(dtype)
        parameters = ("Q", "Q", *["Q"] * RULE_STATES, f"{RULE_HYPERPARAMETERS}d", "q")
        kernel = _kernel("optimizer_update", f"optimizers::{name}", kind)
        launch = self.prepared(device, "optimizers.cuh", kernel, parameters)
        return Prepared(launch, PACK_BYTES // dtype.itemsize)
