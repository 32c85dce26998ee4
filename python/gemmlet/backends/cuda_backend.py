"""The CUDA backend: our own kernels (``csrc/cuda``) on CuPy's arrays.

Arrays on a GPU are computed where they are, on the stream that is current in CuPy. NumPy arrays, which come when this
backend was chosen by name, are copied to the first GPU and back.
"""

from __future__ import annotations

import functools
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _arrays as arrays
from .. import _precision, _threads
from ..formulas.activations import ACTIVATIONS, Activation
from ..formulas.losses import LOSSES, ROW_FUNCTIONS, Loss, RowFunction
from ..formulas.optimizers import OPTIMIZER_RULES, OptimizerRule, Scalars
from . import cuda_compile, cuda_matmul, cuda_training
from .cuda_device import CudaDevice, Device
from .cuda_types import CPP_TYPES, FLOATS, INTEGERS, SIZES, number, pointer
from .numpy_backend import Feed, GanRun, MlpRun, NumpyBackend

Array = NDArray[Any]

# Threads of the blocks of all kernels here; csrc/cuda says the same (row_threads, __launch_bounds__).
THREADS = 256

# Packs of 16 bytes that a thread of an activation's kernel takes; csrc/cuda/elementwise.cuh says the same.
MAP_PACKS = 2

# Who takes a row of so many columns at most: how many threads, with how many numbers each in registers. 0: any number
# of columns, read from memory in every pass. Few threads with many numbers each have more of them on their way from
# memory at a time, and fewer exchanges; 10 is the usual number of classes, whose rows a thread alone would read too far
# from its neighbours'.
ROW_TEAMS = (
    (4, 1, 4),
    (8, 2, 4),
    (12, 2, 6),
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

# As many numbers as an optimizer's rule may have.
_NUMBERS = struct.Struct("9d")

# Blocks whose sums the last one adds: enough for two rounds of the largest GPUs. It is part of the result, whose bits
# shall not depend on the GPU.
MOST_PARTS = 2048

# The same of those that go over rows and the elements of a loss: many short ones, so that none is waited for long.
MOST_BLOCKS = 8192

# Blocks of functions of rows, which add nothing up.
ROW_BLOCKS = 32768


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


def _team(columns: int, *matrices: Any) -> Team:
    """Who takes the rows of these matrices; None among them is none."""
    dtype = arrays.name_of(matrices[0].dtype)
    threads, values = next(_held(dtype, threads, values) for most, threads, values in ROW_TEAMS if columns <= most)
    together = _pack(dtype, values)
    bytes_ = together * matrices[0].itemsize
    if columns % together or any(matrix is not None and matrix.data.ptr % bytes_ for matrix in matrices):
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
    return f"gemmlet::row_{direction}<gemmlet::{name}, {CPP_TYPES[dtype]}, {', '.join(map(str, team))}>"


@functools.cache
def _cross_entropy_kernel(dtype: str, whole: bool, team: Team) -> str:
    return f"gemmlet::softmax_cross_entropy<{CPP_TYPES[dtype]}, {str(whole).lower()}, {', '.join(map(str, team))}>"


@functools.cache
def _loss_kernel(name: str, dtype: str) -> str:
    return f"gemmlet::elementwise_loss<gemmlet::losses::{name}, {CPP_TYPES[dtype]}>"


@functools.cache
def _update_kernel(name: str, dtype: str) -> str:
    return f"gemmlet::optimizer_update<gemmlet::optimizers::{name}, {CPP_TYPES[dtype]}>"


@functools.cache
def _column_sum_kernel(dtype: str, down: bool) -> str:
    return f"gemmlet::column_sum<{CPP_TYPES[dtype]}, {str(down).lower()}>"


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
        losses += [_cross_entropy_kernel(dtype, whole, team) for whole in (True, False) for team in _teams(dtype)]
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
        "reductions.cuh": reductions,
        **cuda_matmul.expressions(fused),
        **cuda_training.expressions(),
    }


class _Scratch(NamedTuple):
    """What kernels of a stream use one after the other: a counter, which they leave at 0; partial sums; their sum."""

    counter: Any
    partial: Any
    total: Any


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
        # What `_scratch` returns: by device and stream, and for each thread of the CPU, as the default streams of
        # several may be told apart by their thread alone.
        self._own = threading.local()

    def describe(self) -> dict[str, str]:
        """What `gemmlet.show_config` prints about this backend."""
        return {
            "backend": self.name,
            "isa": f"{self._first.arch}, {self._first.name}",
            "cupy": sys.modules["cupy"].__version__,
            "nvrtc": cuda_compile.nvrtc_version(),
            "float32 products": _precision.get_float32_matmul_precision(),
            "threads": f"{_threads.get_num_threads()} (of the CPU)",
        }

    # Devices and arrays.

    def device_of(self, array: Any) -> Device:
        """The GPU that an array is on."""
        id_ = int(array.data.device_id)
        if id_ not in self._devices:
            self._devices[id_] = CudaDevice(id_)
        return self._devices[id_]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], beside: Any) -> Any:
        """Return a new array on the GPU where `beside` is."""
        return self.device_of(beside).empty(shape, dtype)

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

    def bring(self, array: Any, beside: Any = None) -> Any:
        """A copy on the GPU where `beside` is, else on the first one; itself if it is on a GPU."""
        if arrays.is_on_gpu(array):
            return array
        return self._upload(self.device_of(beside) if arrays.is_on_gpu(beside) else self._first, array)

    def scaled(self, x: Any, dtype: np.dtype[Any], scale: float, shift: float) -> Any:
        """``scale * x + shift`` of a C-contiguous array on a GPU, whose bytes count as value/255."""
        device = self.device_of(x)
        result = device.empty(x.shape, dtype)
        if x.size:
            (kernel,) = device.kernels("elementwise.cuh", [_scaled_kernel(x.dtype, dtype)])
            arguments = pointer(x), pointer(result), number(scale, dtype), number(shift, dtype), np.int64(x.size)
            device.launch(kernel, (-(-x.size // THREADS), 1, 1), THREADS, arguments)
        return result

    def _scratch(self, device: Device) -> _Scratch:
        """That of the current stream."""
        scratches: dict[tuple[int, int], _Scratch] = self._own.__dict__.setdefault("scratches", {})
        where = device.id, device.stream()
        if where not in scratches:
            counter = device.empty((1,), np.dtype(np.uint32))
            device.zero(counter)
            partial, total = device.empty((MOST_BLOCKS,), np.float64), device.empty((1,), np.float64)
            scratches[where] = _Scratch(counter, partial, total)
        return scratches[where]

    def _map(
        self, device: Device, source: str, expression: str, array: Any, arguments: Sequence[Any], packs: int = 1
    ) -> None:
        """Launch a kernel in which a thread takes so many packs of 16 bytes of an array."""
        if array.size:
            (kernel,) = device.kernels(source, [expression])
            device.launch(kernel, (-(-array.nbytes // (16 * packs * THREADS)), 1, 1), THREADS, arguments)

    def assign(self, target: Any, source: Any) -> None:
        """``target[...] = source``: arrays of one shape and dtype on a GPU, any strides, that do not overlap."""
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
        cpp = CPP_TYPES[arrays.name_of(source.dtype)]
        (kernel,) = device.kernels("elementwise.cuh", [f"gemmlet::strided_copy<{cpp}, {cpp}>"])
        arguments = (pointer(source), pointer(target), np.void(layout.tobytes()), np.int32(len(merged)))
        device.launch(kernel, (-(-source.size // THREADS), 1, 1), THREADS, (*arguments, np.int64(source.size)))

    def to_cpu(self, array: Any) -> Array:
        """A NumPy array with the values of a C-contiguous one on a GPU."""
        result = np.empty(array.shape, array.dtype)
        self.device_of(array).download(array, result)
        return result

    def value_range(self, array: Any) -> tuple[float, float]:
        """The smallest and the largest of at least one element, NaN passed over."""
        low, high = self._range(arrays.contiguous(array), np.dtype(np.float64), None)
        return float(low), float(high)

    def as_indices(self, array: Any) -> tuple[Any, int, int]:
        """Integers as int64, C-contiguous, and the smallest and the largest of them; (0, 0) if there are none."""
        result = self.device_of(array).empty(array.shape, np.dtype(np.int64))
        if not array.size:
            return result, 0, 0
        low, high = self._range(arrays.contiguous(array), np.dtype(np.int64), result)
        return result, int(low), int(high)

    def _range(self, array: Any, dtype: np.dtype[Any], copy: Any) -> tuple[Any, Any]:
        device = self.device_of(array)
        cpp = CPP_TYPES[arrays.name_of(array.dtype)]
        to = "double" if dtype == np.float64 else "long long"
        blocks = min(MOST_PARTS, -(-array.size // (4 * THREADS)))
        found = device.empty((2, blocks + 1), dtype)
        (kernel,) = device.kernels("reductions.cuh", [f"gemmlet::value_range<{cpp}, {to}>"])
        arguments = (
            pointer(array),
            pointer(copy),
            np.int64(array.size),
            pointer(found),
            pointer(self._scratch(device).counter),
        )
        device.launch(kernel, (blocks, 1, 1), THREADS, arguments)
        result = np.empty((2, blocks + 1), dtype)
        device.download(found, result)
        return result[0, -1], result[1, -1]

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
                cuda_matmul.linear(device, x_, w_, b_, activation, parameter, y, z, tf32=tf32)

    def column_sum(self, x: Array, out: Array) -> None:
        """``out[j] = sum_i x[i, j]``."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            rows, columns = x_.shape
            if not rows:
                device.zero(y)
                return
            if not columns:
                return
            row_stride, column_stride = (stride // x_.itemsize for stride in x_.strides)
            down = abs(row_stride) < abs(column_stride)
            blocks = -(-columns // (8 if down else 32))
            # So many shares of the rows that there is work for all multiprocessors; some hundred rows at least in each.
            shares = max(1, min(MOST_PARTS // blocks, rows // 512, 65535))
            partial = device.empty((shares, columns), arrays.computed_in(x_.dtype)) if shares > 1 else None
            (kernel,) = device.kernels("reductions.cuh", [_column_sum_kernel(arrays.name_of(x_.dtype), down)])
            sizes = np.int64(row_stride), np.int64(column_stride), np.int64(rows), np.int64(columns)
            outputs = pointer(y), pointer(partial), pointer(self._scratch(device).counter)
            device.launch(kernel, (blocks, shares, 1), THREADS, (pointer(x_), *sizes, *outputs))

    # Elementwise and row functions.

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        """``out = activation(x)``."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            kernel = _activation_kernel("forward", activation.name, arrays.name_of(y.dtype))
            arguments = pointer(x_), pointer(y), number(parameter, y.dtype), np.int64(y.size)
            self._map(device, "elementwise.cuh", kernel, y, arguments, MAP_PACKS)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        """``out = grad_y * activation'``."""
        with self._placed(grad_y, saved, out, writes=1) as (device, g, s, y):
            kernel = _activation_kernel("backward", activation.name, arrays.name_of(y.dtype))
            arguments = pointer(g), pointer(s), pointer(y), number(parameter, y.dtype), np.int64(y.size)
            self._map(device, "elementwise.cuh", kernel, y, arguments, MAP_PACKS)

    def _rows(
        self, device: Device, source: str, kernel: str, rows: int, arguments: Sequence[Any], team: int, most: int
    ) -> None:
        """Launch a kernel in which teams of so many threads take rows, in so many blocks at most."""
        threads = max(THREADS, team)
        blocks = min(most, -(-rows // (threads // team)))
        (loaded,) = device.kernels(source, [kernel])
        device.launch(loaded, (blocks, 1, 1), threads, arguments)

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        """``out = function(x)``, over the rows."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            rows, columns = y.shape
            team = _team(columns, x_, y)
            kernel = _row_kernel("forward", function.name, arrays.name_of(y.dtype), team)
            arguments = pointer(x_), pointer(y), np.int64(rows), np.int32(columns)
            self._rows(device, "rows.cuh", kernel, rows, arguments, team.threads, ROW_BLOCKS)

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        """``out`` = the gradient with respect to the function's input."""
        with self._placed(grad_y, y, out, writes=1) as (device, g, y_, grad_x):
            rows, columns = grad_x.shape
            team = _team(columns, g, y_, grad_x)
            kernel = _row_kernel("backward", function.name, arrays.name_of(g.dtype), team)
            arguments = pointer(g), pointer(y_), pointer(grad_x), np.int64(rows), np.int32(columns)
            self._rows(device, "rows.cuh", kernel, rows, arguments, team.threads, ROW_BLOCKS)

    # Losses.

    def softmax_cross_entropy(self, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        """Labels are int64 indices (rows,), in range, or floating point (rows, classes)."""
        with self._placed(logits, labels, out, writes=1) as (device, z, t, grad):
            rows, columns = z.shape
            indices, targets = (t, None) if t.ndim == 1 else (None, t)
            team = _team(columns, z, targets, grad)
            numbers = np.float64(1.0 - label_smoothing), np.float64(label_smoothing / columns)
            arguments = (pointer(z), pointer(indices), pointer(targets), *numbers, pointer(grad), np.int64(rows))
            counter, partial, mean = self._scratch(device)
            outputs = pointer(partial), pointer(mean), pointer(counter)
            kernel = _cross_entropy_kernel(arrays.name_of(z.dtype), indices is not None and label_smoothing == 0, team)
            all_arguments = (*arguments, np.int32(columns), *outputs)
            self._rows(device, "losses.cuh", kernel, rows, all_arguments, team.threads, MOST_BLOCKS)
            return self._mean(device, mean)

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        """Mean over all elements."""
        with self._placed(prediction, target, out, writes=1) as (device, p, t, grad):
            blocks = min(MOST_BLOCKS, -(-p.nbytes // (16 * THREADS)))
            counter, partial, mean = self._scratch(device)
            outputs = pointer(partial), pointer(mean), pointer(counter)
            inputs = pointer(p), pointer(t), number(parameter, p.dtype), pointer(grad), np.int64(p.size)
            (kernel,) = device.kernels("losses.cuh", [_loss_kernel(loss.name, arrays.name_of(p.dtype))])
            device.launch(kernel, (blocks, 1, 1), THREADS, (*inputs, *outputs))
            return self._mean(device, mean)

    @staticmethod
    def _mean(device: Device, mean: Any) -> float:
        value = np.empty(1, np.float64)
        device.download(mean, value)
        return float(value[0])

    # Optimizers.

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], scalars: Scalars
    ) -> None:
        """Update `param` and its state in place."""
        with self._placed(grad, *state, param, writes=1 + len(state)) as (device, g, *rest):
            *states, p = rest
            numbers = _NUMBERS.pack(*scalars, *[0.0] * (9 - len(scalars)))
            places = [pointer(s) for s in (*states, None, None)][:2]
            arguments = pointer(p), pointer(g), *places, np.void(numbers), np.int64(p.size)
            kernel = _update_kernel(rule.name, arrays.name_of(p.dtype))
            self._map(device, "optimizers.cuh", kernel, p, arguments)

    # Fused training.

    def fuses(self, network: str, activations: Iterable[str], losses: Iterable[str], rule: str) -> bool:
        """Whether whole steps of a network of these can be done on the GPU."""
        return cuda_training.fuses(activations, losses, rule)

    def hold(self, feed: Feed, targets: Array | None) -> tuple[Feed, Any]:
        """Samples and targets on the GPU where the samples are, else on the first."""
        return cuda_training.hold(self._trains(feed), feed, targets)

    def _trains(self, feed: Feed) -> Device:
        return self.device_of(feed.x) if arrays.is_on_gpu(feed.x) else self._first

    def train_mlp(self, run: MlpRun) -> tuple[float, int]:
        """Train a stack of layers."""
        return cuda_training.train_mlp(self._trains(run.feed), run)

    def train_gan(self, run: GanRun) -> tuple[float, float]:
        """Train two adversarial stacks of layers."""
        return cuda_training.train_gan(self._trains(run.feed), run)


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
