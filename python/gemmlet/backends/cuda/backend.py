"""The CUDA backend: our own kernels (``csrc/cuda``) on CuPy's arrays.

Arrays on a GPU are computed where they are, on the stream that is current in CuPy. NumPy arrays, which come when this
backend was chosen by name, are copied to the first GPU and back.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ... import _precision, _threads
from ..._arrays import computed_in, is_on_gpu, name_of
from ...formulas.activations import ACTIVATIONS, Activation
from ...formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES, Loss, RowFunction, RowLoss
from ...formulas.optimizers import OPTIMIZER_RULES, OptimizerRule, Scalars
from ...training.old_plan import Feed, GanRun, MlpRun
from ..base import Array
from ..numpy import NumpyBackend
from . import compiler, fast_path, matmul, training
from .device import CudaDevice, Device, Launch
from .types import COMPUTED, CPP_TYPES, FLOATS, INTEGERS, RULE_NUMBERS, RULE_STATES, SIZES, address, number, pointer

# Threads of the blocks of all kernels here; csrc/cuda says the same (row_threads, __launch_bounds__).
THREADS = 256

# Packs of 16 bytes that a thread of an activation's kernel takes; csrc/cuda/elementwise.cuh says the same.
MAP_PACKS = 2

# Who takes a row of so many columns at most: how many threads, with how many numbers each in registers. 0: any number
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
MOST_PARTS = 2048

# The same of kernels that go round: of elementwise losses many short ones, so that none is waited for long; of
# cross-entropy, whose blocks begin with a chain of loads, whole rounds of 132 multiprocessors (on an H200 1,024 blocks
# reach 0.89 of the copy bandwidth at 1,000 columns, 8,192 reach 0.75). Functions of rows add nothing up.
MOST_BLOCKS = {"elements": 8192, "row_loss": 1056, "rows": 32768}


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
def _activation_kernel(direction: str, name: str, dtype: str) -> str:
    return f"gemmlet::activation_{direction}<gemmlet::activations::{name}, {CPP_TYPES[dtype]}>"


@functools.cache
def _scaled_kernel(given: np.dtype[Any], dtype: np.dtype[Any]) -> str:
    return f"gemmlet::scaled<{CPP_TYPES[dtype.name]}, {CPP_TYPES[given.name]}>"


@functools.cache
def _row_kernel(direction: str, name: str, dtype: str, team: Team) -> str:
    return f"gemmlet::row_{direction}<gemmlet::row_functions::{name}, {CPP_TYPES[dtype]}, {', '.join(map(str, team))}>"


@functools.cache
def _row_loss_kernel(name: str, dtype: str, whole: bool, team: Team) -> str:
    values = CPP_TYPES[dtype], str(whole).lower(), *map(str, team)
    return f"gemmlet::row_loss<gemmlet::row_losses::{name}, {', '.join(values)}>"


@functools.cache
def _loss_kernel(name: str, dtype: str) -> str:
    return f"gemmlet::elementwise_loss<gemmlet::losses::{name}, {CPP_TYPES[dtype]}>"


@functools.cache
def _update_kernel(name: str, dtype: str) -> str:
    return f"gemmlet::optimizer_update<gemmlet::optimizers::{name}, {CPP_TYPES[dtype]}>"


@functools.cache
def _range_kernel(dtype: str, to: str) -> str:
    return f"gemmlet::value_range<{CPP_TYPES[dtype]}, {to}>"


@functools.cache
def _column_sum_kernel(dtype: str, down: bool) -> str:
    return f"gemmlet::column_sum<{CPP_TYPES[dtype]}, {str(down).lower()}>"


# Sources that not every architecture compiles, and those that do.
ARCHITECTURES = {**matmul.ARCHITECTURES, **training.ARCHITECTURES}


def expressions(fused: Iterable[str] = ACTIVATIONS) -> dict[str, list[str]]:
    """Every kernel that the backend launches, by source file: for compiling ahead of time, and for tests.

    Products have the activations of `fused`; of the kernels of `fit`, those of usual networks are there.
    """
    elementwise, rows, losses, optimizers, reductions = [], [], [], [], []
    for dtype, cpp in FLOATS.items():
        for direction in ("forward", "backward"):
            elementwise += [_activation_kernel(direction, name, dtype) for name in ACTIVATIONS]
            rows += [_row_kernel(direction, name, dtype, team) for name in ROW_FUNCTIONS for team in _teams(dtype)]
        elementwise.append(f"gemmlet::strided_copy<{cpp}, {cpp}>")
        losses += [_loss_kernel(name, dtype) for name in LOSSES]
        teams = [(whole, team) for whole in (True, False) for team in _teams(dtype)]
        losses += [_row_loss_kernel(name, dtype, *team) for name in ROW_LOSSES for team in teams]
        optimizers += [_update_kernel(name, dtype) for name in OPTIMIZER_RULES]
        reductions += [_column_sum_kernel(dtype, down) for down in (True, False)]
        reductions.append(f"gemmlet::value_range<{cpp}, double>")
    elementwise += [f"gemmlet::strided_copy<long long, {cpp}>" for cpp in INTEGERS.values()]
    for kind in (np.dtype(np.float32), np.dtype(np.float64)):
        elementwise += [_scaled_kernel(given, kind) for given in (kind, np.dtype(np.uint8))]
    reductions += [f"gemmlet::value_range<{cpp}, long long>" for cpp in INTEGERS.values()]
    return {
        "elementwise.cuh": elementwise,
        "rows.cuh": rows,
        "losses.cuh": losses,
        "optimizers.cuh": optimizers,
        "column_sum.cuh": reductions,
        **matmul.expressions(fused),
        **training.expressions(),
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
    """What launches a kernel, and how many elements or rows a block takes, at a time if it goes round.

    kind: of `MOST_BLOCKS`, for a grid that goes round.
    """

    launch: Launch
    per_block: int
    kind: str = "rows"

    def blocks(self, count: int) -> int:
        """Of a grid that goes round, for so many elements or rows."""
        return min(MOST_BLOCKS[self.kind], -(-count // self.per_block))


class _InPlace(tuple[Any, ...]):
    """A device and arrays that are on it, to be used by ``with``. A generator would cost as much as a small launch."""

    __slots__ = ()

    def __enter__(self) -> tuple[Any, ...]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is to be done."""


class _Copies(_InPlace):
    """The same of copies of NumPy arrays, whose last ones come back in the end."""

    written: tuple[Array | None, ...]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Copy them back, unless something went wrong."""
        if kind is not None:
            return
        device = self[0]
        for target, array in zip(self.written, self[-len(self.written) :], strict=True):
            if target is None:
                continue
            buffer = target if target.flags.c_contiguous else np.empty_like(target, order="C")
            device.download(array, buffer)
            if buffer is not target:
                target[...] = buffer


class CudaBackend(NumpyBackend):
    """The CUDA kernels.

    Parameters
    ----------
    devices : sequence of Device, optional
        The GPUs by CUDA's numbers, the first of which computes what comes from the CPU. By default all of this machine,
        each opened at its first use.

    Raises
    ------
    RuntimeError
        CuPy or NVRTC is missing, or there is no driver or GPU; the message says which.
    """

    name = "cuda"

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
        self.quick = fast_path.fast_paths(self)

    def describe(self) -> dict[str, str]:
        """What `gemmlet.show_config` prints about this backend."""
        return {
            "backend": self.name,
            "isa": f"{self._first.arch}, {self._first.name}",
            "cupy": sys.modules["cupy"].__version__,
            "nvrtc": compiler.nvrtc_version(),
            "float32 products": _precision.get_float32_matmul_precision(),
            "threads": f"{_threads.get_num_threads()} (of the CPU)",
        }

    # Devices.

    def device_of(self, array: Any) -> Device:
        """The GPU that an array is on."""
        return self.device(array.data.device_id)

    def _placed(self, *given: Any, writes: int) -> _InPlace:
        """A device and the arrays on it; of NumPy arrays, copies, of which the last `writes` come back in the end."""
        if not isinstance(given[-1], np.ndarray):
            return _InPlace((self.device_of(given[-1]), *given))
        device = self._first
        placed = _Copies((device, *(None if array is None else self._upload(device, array) for array in given)))
        placed.written = given[-writes:]
        return placed

    @staticmethod
    def _upload(device: Device, array: Array) -> Any:
        """A copy on the device; a transposed array stays one, so that the same kernels run as for one already there."""
        if array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous:
            return device.upload(array.T).T
        return device.upload(np.ascontiguousarray(array).reshape(array.shape))

    def device(self, number: int) -> Device:
        """The GPU of this number."""
        found = self._devices.get(number)
        if found is None:
            found = self._devices[number] = CudaDevice(number)
        return found

    def scratch(self, device: Device) -> Scratch:
        """That of the current stream."""
        scratches: dict[tuple[int, int], Scratch] = self._own.__dict__.setdefault("scratches", {})
        where = device.id, device.stream()
        found = scratches.get(where)
        if found is None:
            counter = device.empty((1,), np.dtype(np.uint32))
            device.zero(counter)
            partial, range_ = (
                device.empty((max(MOST_BLOCKS["elements"], MOST_BLOCKS["row_loss"], 2 * MOST_PARTS),), np.float64),
                device.empty((2,), np.float64),
            )
            memory = counter, partial, range_
            found = Scratch(address(counter), address(partial), address(range_), partial.nbytes, memory)
            scratches[where] = found
        return found

    def _result(self, device: Device) -> Result:
        """That of the calling thread, which waits for a kernel before it launches the next one that writes there."""
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
        kernel = _range_kernel(name_of(dtype), to)
        launch = self.prepared(device, "column_sum.cuh", kernel, ("Q", "Q", "q", "Q", "Q", "Q"))
        scratch = self.scratch(device)
        blocks = min(MOST_PARTS, -(-size // (4 * THREADS)))
        launch(blocks, 1, at, copy, size, scratch.partial, result or scratch.range, scratch.counter)

    # Arrays. NumPy's, which come when this backend was chosen by name, stay on the CPU.

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: Any) -> Any:
        if not is_on_gpu(like):
            return super().empty(shape, dtype, like)
        return self.device_of(like).empty(shape, dtype)

    def empty_like(self, array: Any, order: Literal["K", "C"] = "K") -> Any:
        if not is_on_gpu(array):
            return super().empty_like(array, order)
        if order == "K" and array.flags.f_contiguous and not array.flags.c_contiguous:
            return self.empty(array.shape[::-1], array.dtype, array).T
        return self.empty(array.shape, array.dtype, array)

    def as_matrix(self, array: Any) -> Any:
        # CuPy's `reshape` would copy by a kernel of its own.
        return super().as_matrix(self.contiguous(array) if array.ndim != 2 and is_on_gpu(array) else array)

    def assign(self, target: Any, source: Any) -> None:
        """On a GPU they are on the same one, and do not overlap."""
        if not is_on_gpu(target):
            super().assign(target, self.to_cpu(source))
            return
        device = self.device_of(target)
        if source.nbytes == 0:
            return
        layout = np.zeros((3, 8), np.int64)
        # Dimensions that lie as one in both arrays are taken as one.
        merged = _merged(target.shape, source.strides, target.strides)
        if len(merged) > layout.shape[1]:
            raise ValueError(f"an array of {target.ndim} dimensions is not supported on a GPU, at most 8 are")
        for d, (length, from_stride, to_stride) in enumerate(merged):
            layout[:, d] = length, from_stride // source.itemsize, to_stride // target.itemsize
        cpp = CPP_TYPES[name_of(source.dtype)]
        (kernel,) = device.kernels("elementwise.cuh", [f"gemmlet::strided_copy<{cpp}, {cpp}>"])
        arguments = (pointer(source), pointer(target), np.void(layout.tobytes()), np.int32(len(merged)))
        device.launch(kernel, (-(-source.size // THREADS), 1, 1), THREADS, (*arguments, np.int64(source.size)))

    def to_cpu(self, array: Any) -> Array:
        if not is_on_gpu(array):
            return super().to_cpu(array)
        result = np.empty(array.shape, array.dtype)
        self.device_of(array).download(self.contiguous(array), result)
        return result

    def bring(self, array: Any, beside: Any = None) -> Any:
        """Without `beside` the first GPU is meant."""
        if is_on_gpu(array):
            return array
        return self._upload(self.device_of(beside) if is_on_gpu(beside) else self._first, array)

    def placed_like(self, array: Any, like: Any) -> Any:
        return self.bring(array, like) if is_on_gpu(like) else array

    def scaled(self, array: Any, dtype: np.dtype[Any], scale: float = 1.0, shift: float = 0.0) -> Any:
        if not is_on_gpu(array):
            return super().scaled(array, dtype, scale, shift)
        x, device = self.contiguous(array), self.device_of(array)
        result = device.empty(x.shape, dtype)
        if x.size:
            (kernel,) = device.kernels("elementwise.cuh", [_scaled_kernel(x.dtype, dtype)])
            arguments = pointer(x), pointer(result), number(scale, dtype), number(shift, dtype), np.int64(x.size)
            device.launch(kernel, (-(-x.size // THREADS), 1, 1), THREADS, arguments)
        return result

    def value_range(self, array: Any) -> tuple[float, float]:
        if not is_on_gpu(array):
            return super().value_range(array)
        array, device = self.contiguous(array), self.device_of(array)
        found = self._result(device)
        self.find_range(device, array.dtype, "double", address(array), array.size, found.place)
        device.synchronize()
        low, high = found.floats
        return low, high

    def extremes(self, array: Any) -> tuple[float, float]:
        if not is_on_gpu(array):
            return super().extremes(array)
        low, high = self.value_range(array)
        # There a NaN is not passed over.
        numbers = self.contiguous(array).reshape(len(array), -1)
        sums = self.empty(numbers.shape[1:], array.dtype, array)
        self.column_sum(numbers, sums)
        return (math.nan, math.nan) if np.isnan(self.to_cpu(sums)).any() else (low, high)

    def as_indices(self, array: Any) -> tuple[Any, int, int]:
        if not is_on_gpu(array):
            return super().as_indices(array)
        device = self.device_of(array)
        result = device.empty(array.shape, np.dtype(np.int64))
        if not array.size:
            return result, 0, 0
        array = self.contiguous(array)
        found = self._result(device)
        self.find_range(device, array.dtype, "long long", address(array), array.size, found.place, address(result))
        device.synchronize()
        low, high = found.integers
        return result, low, high

    # Matrix products.

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """``out = a @ b``."""
        self.linear(a, b, None, None, 0.0, out, None)

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
        """``out = activation(x @ w + b)`` in one pass."""
        with self._placed(x, w, b, preactivation, out, writes=2) as (device, x_, w_, b_, z, y):
            if y.size:
                tf32 = _precision.allows_tf32()
                matmul.linear(device, x_, w_, b_, activation, parameter, y, z, tf32=tf32)

    def column_sum(self, x: Array, out: Array) -> None:
        """``out[j] = sum_i x[i, j]``."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            if not x_.shape[0]:
                device.zero(y)
            elif y.size:
                row_stride, column_stride = (stride // x_.itemsize for stride in x_.strides)
                run = self.column_sums(device, x_.dtype, x_.shape, (row_stride, column_stride))
                run(address(x_), address(y), self.scratch(device).counter)

    def column_sums(
        self, device: Device, dtype: np.dtype[Any], shape: tuple[int, int], strides: tuple[int, int]
    ) -> Callable[[int, int, int], None]:
        """Return ``run(x, out, counter)``, of addresses, which does it; strides are in elements, no dimension is 0."""
        (rows, columns), (row_stride, column_stride) = shape, strides
        down = abs(row_stride) < abs(column_stride)
        blocks = -(-columns // (8 if down else 32))
        # So many shares of the rows that there is work for all multiprocessors; some hundred rows at least in each.
        shares = max(1, min(MOST_PARTS // blocks, rows // 512, 65535))
        kernel = _column_sum_kernel(name_of(dtype), down)
        launch = self.prepared(device, "column_sum.cuh", kernel, ("Q", "q", "q", "q", "q", "Q", "Q", "Q"))

        def run(x: int, out: int, counter: int) -> None:
            partial = device.empty((shares, columns), computed_in(dtype)) if shares > 1 else None
            launch(blocks, shares, x, row_stride, column_stride, rows, columns, out, address(partial), counter)

        return run

    # Elementwise and row functions.

    def activation_launch(self, device: Device, direction: str, name: str, dtype: np.dtype[Any]) -> Prepared:
        """That of an activation's kernel: the addresses of two arrays (backward three), the parameter, the size."""
        kind = name_of(dtype)
        parameters = (*("QQ" if direction == "forward" else "QQQ"), _CODES[kind], "q")
        launch = self.prepared(device, "elementwise.cuh", _activation_kernel(direction, name, kind), parameters)
        return Prepared(launch, MAP_BYTES // dtype.itemsize)

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        """``out = activation(x)``."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            if y.size:
                launch, per_block, _ = self.activation_launch(device, "forward", activation.name, y.dtype)
                launch(-(-y.size // per_block), 1, address(x_), address(y), parameter, y.size)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        """``out = grad_y * activation'``."""
        with self._placed(grad_y, saved, out, writes=1) as (device, g, s, y):
            if y.size:
                launch, per_block, _ = self.activation_launch(device, "backward", activation.name, y.dtype)
                launch(-(-y.size // per_block), 1, address(g), address(s), address(y), parameter, y.size)

    def row_launch(
        self, device: Device, direction: str, name: str, dtype: np.dtype[Any], columns: int, *addresses: int
    ) -> Prepared:
        """That of a row function's kernel: the addresses of two matrices (backward three), rows, columns."""
        kind = name_of(dtype)
        team = _team(kind, columns, *addresses)
        parameters = (*("QQ" if direction == "forward" else "QQQ"), "q", "i")
        threads = max(THREADS, team.threads)
        launch = self.prepared(device, "rows.cuh", _row_kernel(direction, name, kind, team), parameters, threads)
        return Prepared(launch, threads // team.threads)

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        """``out = function(x)``, over the rows."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            rows, columns = y.shape
            places = address(x_), address(y)
            kernel = self.row_launch(device, "forward", function.name, y.dtype, columns, *places)
            kernel.launch(kernel.blocks(rows), 1, *places, rows, columns)

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        """``out`` = the gradient with respect to the function's input."""
        with self._placed(grad_y, y, out, writes=1) as (device, g, y_, grad_x):
            rows, columns = grad_x.shape
            places = address(g), address(y_), address(grad_x)
            kernel = self.row_launch(device, "backward", function.name, g.dtype, columns, *places)
            kernel.launch(kernel.blocks(rows), 1, *places, rows, columns)

    # Losses.

    def mean(self, device: Device, launch: Launch, blocks: int, *values: Any, check: bool = False) -> float | None:
        """Launch a loss's kernel, wait for it, and return the mean.

        check: None, with nothing written, if the range that `find_range` has left in `Scratch` is not what it must be.
        """
        scratch, result = self.scratch(device), self._result(device)
        result.floats[1] = 0.0
        launch(blocks, 1, *values, scratch.range if check else 0, scratch.partial, result.place, scratch.counter)
        return self._waited_for(device, result)

    def _waited_for(self, device: Device, result: Result) -> float | None:
        device.synchronize()
        mean, refused = result.floats
        return None if refused else mean

    def row_loss_launch(
        self, device: Device, name: str, dtype: np.dtype[Any], columns: int, whole: bool, *addresses: int
    ) -> Prepared:
        """That of a row loss's kernel; `whole`: of class indices, not smoothed.

        It takes the addresses of logits, indices and targets, two numbers, and the gradient's address, rows, columns.
        """
        kind = name_of(dtype)
        team = _team(kind, columns, *addresses)
        parameters = (*"QQQddQqi", *_MEAN)
        threads = max(THREADS, team.threads)
        launch = self.prepared(device, "losses.cuh", _row_loss_kernel(name, kind, whole, team), parameters, threads)
        return Prepared(launch, threads // team.threads, "row_loss")

    def row_loss(self, loss: RowLoss, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        """Labels are int64 indices (rows,), in range, or floating point (rows, classes)."""
        with self._placed(logits, labels, out, writes=1) as (device, z, t, grad):
            rows, columns = z.shape
            indices, targets = (address(t), 0) if t.ndim == 1 else (0, address(t))
            whole = t.ndim == 1 and label_smoothing == 0
            places = address(z), targets, address(grad)
            kernel = self.row_loss_launch(device, loss.name, z.dtype, columns, whole, *places)
            numbers = 1.0 - label_smoothing, label_smoothing / columns
            values = address(z), indices, targets, *numbers, address(grad), rows, columns
            mean = self.mean(device, kernel.launch, kernel.blocks(rows), *values)
            assert mean is not None
            return mean

    def loss_launch(self, device: Device, name: str, dtype: np.dtype[Any]) -> Prepared:
        """That of a loss's kernel: the addresses of prediction and target, the parameter, the gradient's, the size."""
        kind = name_of(dtype)
        parameters = ("Q", "Q", _CODES[kind], "Q", "q", *_MEAN)
        launch = self.prepared(device, "losses.cuh", _loss_kernel(name, kind), parameters)
        return Prepared(launch, PACK_BYTES // dtype.itemsize, "elements")

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        """Mean over all elements."""
        with self._placed(prediction, target, out, writes=1) as (device, p, t, grad):
            kernel = self.loss_launch(device, loss.name, p.dtype)
            values = address(p), address(t), float(number(parameter, p.dtype)), address(grad), p.size
            mean = self.mean(device, kernel.launch, kernel.blocks(p.size), *values)
            assert mean is not None
            return mean

    # Optimizers.

    def update_launch(self, device: Device, name: str, dtype: np.dtype[Any]) -> Prepared:
        """That of a rule's kernel: the addresses of param, grad and two states, nine numbers, the size."""
        kind = name_of(dtype)
        parameters = ("Q", "Q", *["Q"] * RULE_STATES, f"{RULE_NUMBERS}d", "q")
        launch = self.prepared(device, "optimizers.cuh", _update_kernel(name, kind), parameters)
        return Prepared(launch, PACK_BYTES // dtype.itemsize)

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], scalars: Scalars
    ) -> None:
        """Update `param` and its state in place."""
        with self._placed(grad, *state, param, writes=1 + len(state)) as (device, g, *rest):
            *states, p = rest
            if p.size:
                launch, per_block, _ = self.update_launch(device, rule.name, p.dtype)
                places = *map(address, states), *[0] * (RULE_STATES - len(states))
                numbers = *scalars, *[0.0] * (RULE_NUMBERS - len(scalars))
                launch(-(-p.size // per_block), 1, address(p), address(g), *places, *numbers, p.size)

    # Fused training.

    def fuses(self, network: str, activations: Iterable[str], losses: Iterable[str], rule: str) -> bool:
        """Whether whole steps of a network of these can be done on the GPU."""
        return training.fuses(activations, losses, rule)

    def hold(self, feed: Feed, targets: Array | None) -> tuple[Feed, Any]:
        """Samples and targets on the GPU where the samples are, else on the first."""
        return training.hold(self._trains(feed), feed, targets)

    def write_back(self, feed: Feed) -> None:
        """Copy what is newer on the GPU into the networks' arrays."""
        training.write_back(feed)

    def empty_pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new page-locked array, which every GPU copies from."""
        return self._first.empty_pinned(shape, dtype)

    def _trains(self, feed: Feed) -> Device:
        return self.device_of(feed.x) if is_on_gpu(feed.x) else self._first

    def train_mlp(self, run: MlpRun) -> tuple[float, int]:
        """Train a stack of layers."""
        return training.train_mlp(self._trains(run.feed), run)

    def train_gan(self, run: GanRun) -> tuple[float, float]:
        """Train two adversarial stacks of layers."""
        return training.train_gan(self._trains(run.feed), run)


def _merged(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int, int]]:
    """Lengths and both strides of as few dimensions as walk through two arrays in C order, the last the fastest."""
    merged: list[tuple[int, int, int]] = []
    for length, a, b in zip(shape, first, second, strict=True):
        if length == 1:
            continue
        if merged and merged[-1][1] == a * length and merged[-1][2] == b * length:
            merged[-1] = (merged[-1][0] * length, a, b)
        else:
            merged.append((length, a, b))
    return merged
