"""The CUDA backend: our own kernels (``csrc/cuda``) on CuPy's arrays.

Arrays on a GPU are computed where they are, on the stream that is current in CuPy. NumPy arrays, which come when this
backend was chosen by name, are copied to the first GPU and back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _arrays as arrays
from .. import _threads
from ..formulas.activations import ACTIVATIONS, Activation
from ..formulas.losses import LOSSES, ROW_FUNCTIONS, Loss, RowFunction
from ..formulas.optimizers import OPTIMIZER_RULES, OptimizerRule, Scalars
from . import cuda_compile, cuda_matmul, cuda_training
from .cuda_device import CudaDevice, Device
from .cuda_types import CPP_TYPES, FLOATS, INTEGERS, SIZES, number, pointer
from .numpy_backend import Feed, FusedLayer, NumpyBackend

Array = NDArray[Any]

# Threads of the blocks of all kernels here; csrc/cuda says the same (row_threads, __launch_bounds__).
THREADS = 256

# Who takes a row of so many columns at most: how many threads, with how many numbers each in registers. 0: any number
# of columns, read from memory in every pass. Ten columns, the usual number of classes, leave no lane idle.
ROW_TEAMS = (
    (4, 2, 2),
    (10, 2, 5),
    (16, 4, 4),
    (32, 8, 4),
    (64, 16, 4),
    (128, 32, 4),
    (256, 32, 8),
    (512, 32, 16),
    (1024, 32, 32),
    (4096, THREADS, 16),
    (8192, THREADS, 32),
    (2**31 - 1, THREADS, 0),
)

# Blocks whose sums the last one adds: enough for two rounds of the largest GPUs. It is part of the result, whose bits
# shall not depend on the GPU.
MOST_PARTS = 2048


class Team(NamedTuple):
    """Template arguments of kernels that go by rows: threads, numbers of each, and how many at an access of memory."""

    threads: int
    values: int
    at_once: int


def _pack(dtype: str, values: int) -> int:
    """How many numbers of a row are moved at once, where all rows begin at multiples of as many."""
    whole = 16 // SIZES[dtype]
    return min(whole, values) if values else whole


def _team(columns: int, *matrices: Any) -> Team:
    """Who takes the rows of these matrices; None among them is none."""
    threads, values = next((threads, values) for most, threads, values in ROW_TEAMS if columns <= most)
    together = _pack(matrices[0].dtype.name, values)
    bytes_ = together * matrices[0].itemsize
    # Short rows are read by few threads, whose accesses are one as they are.
    fits = threads >= 32 and columns % together == 0
    if not fits or any(matrix is not None and matrix.data.ptr % bytes_ for matrix in matrices):
        together = 1
    return Team(threads, values, together)


def _teams(dtype: str) -> list[Team]:
    """All that `_team` may return."""
    found = [Team(threads, values, 1) for _, threads, values in ROW_TEAMS]
    return found + [Team(t, v, _pack(dtype, v)) for _, t, v in ROW_TEAMS if t >= 32]


def _activation_kernel(direction: str, name: str, dtype: str) -> str:
    return f"gemmlet::activation_{direction}<gemmlet::activations::{name}, {CPP_TYPES[dtype]}>"


def _row_kernel(direction: str, name: str, dtype: str, team: Team) -> str:
    return f"gemmlet::row_{direction}<gemmlet::{name}, {CPP_TYPES[dtype]}, {', '.join(map(str, team))}>"


def _cross_entropy_kernel(dtype: str, team: Team) -> str:
    return f"gemmlet::softmax_cross_entropy<{CPP_TYPES[dtype]}, {', '.join(map(str, team))}>"


def _loss_kernel(name: str, dtype: str) -> str:
    return f"gemmlet::elementwise_loss<gemmlet::losses::{name}, {CPP_TYPES[dtype]}>"


def _update_kernel(name: str, dtype: str) -> str:
    return f"gemmlet::optimizer_update<gemmlet::optimizers::{name}, {CPP_TYPES[dtype]}>"


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
        losses += [_cross_entropy_kernel(dtype, team) for team in _teams(dtype)]
        optimizers += [_update_kernel(name, dtype) for name in OPTIMIZER_RULES]
        reductions += [f"gemmlet::column_sum<{cpp}, {down}>" for down in ("true", "false")]
        reductions.append(f"gemmlet::value_range<{cpp}, double>")
    elementwise += [f"gemmlet::strided_copy<long long, {cpp}>" for cpp in INTEGERS.values()]
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
        # Counters that kernels leave at 0: by device and stream, and for each thread of the CPU, as the default streams
        # of several may be told apart by their thread alone.
        self._own = threading.local()

    def describe(self) -> dict[str, str]:
        """What `gemmlet.show_config` prints about this backend."""
        return {
            "backend": self.name,
            "isa": f"{self._first.arch}, {self._first.name}",
            "cupy": sys.modules["cupy"].__version__,
            "nvrtc": cuda_compile.nvrtc_version(),
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

    @contextmanager
    def _placed(self, *given: Array | None, writes: int) -> Iterator[tuple[Any, ...]]:
        """A device and the arrays on it; of NumPy arrays, copies, of which the last `writes` come back in the end."""
        if not isinstance(given[-1], np.ndarray):
            yield (self.device_of(given[-1]), *given)
            return
        device = self._first
        placed = tuple(None if array is None else self._upload(device, array) for array in given)
        yield (device, *placed)
        for target, array in zip(given[-writes:], placed[-writes:], strict=True):
            if target is None:
                continue
            buffer = target if target.flags.c_contiguous else np.empty_like(target, order="C")
            device.download(array, buffer)
            if buffer is not target:
                target[...] = buffer

    @staticmethod
    def _upload(device: Device, array: Array) -> Any:
        """A copy on the device; a transposed array stays one, so that the same kernels run as for one already there."""
        if array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous:
            return device.upload(array.T).T
        return device.upload(np.ascontiguousarray(array).reshape(array.shape))

    def _counter(self, device: Device) -> Any:
        """One unsigned integer, 0."""
        counters: dict[tuple[int, int], Any] = self._own.__dict__.setdefault("counters", {})
        where = device.id, device.stream()
        if where not in counters:
            counter = device.empty((1,), np.dtype(np.uint32))
            device.zero(counter)
            counters[where] = counter
        return counters[where]

    def _map(
        self, device: Device, source: str, expression: str, n: int, itemsize: int, arguments: Sequence[Any]
    ) -> None:
        """Launch a kernel in which a thread takes 16 bytes of n elements."""
        if n:
            (kernel,) = device.kernels(source, [expression])
            device.launch(kernel, (-(-n * itemsize // (16 * THREADS)), 1, 1), THREADS, arguments)

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
        cpp = CPP_TYPES[source.dtype.name]
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
        cpp = CPP_TYPES[array.dtype.name]
        to = "double" if dtype == np.float64 else "long long"
        blocks = min(MOST_PARTS, -(-array.size // (4 * THREADS)))
        found = device.empty((2, blocks + 1), dtype)
        (kernel,) = device.kernels("reductions.cuh", [f"gemmlet::value_range<{cpp}, {to}>"])
        arguments = (
            pointer(array),
            pointer(copy),
            np.int64(array.size),
            pointer(found),
            pointer(self._counter(device)),
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
                cuda_matmul.linear(device, x_, w_, b_, activation, parameter, y, z)

    def column_sum(self, x: Array, out: Array) -> None:
        """``out[j] = sum_i x[i, j]``."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            rows, columns = x_.shape
            if not rows:
                device.zero(y)
                return
            if not columns:
                return
            down = abs(x_.strides[0]) < abs(x_.strides[1])
            blocks = -(-columns // (8 if down else 32))
            # So many shares of the rows that there is work for all multiprocessors; some hundred rows at least in each.
            shares = max(1, min(MOST_PARTS // blocks, rows // 512, 65535))
            partial = device.empty((shares, columns), number(0, x_.dtype).dtype) if shares > 1 else None
            cpp = CPP_TYPES[x_.dtype.name]
            (kernel,) = device.kernels("reductions.cuh", [f"gemmlet::column_sum<{cpp}, {str(down).lower()}>"])
            strides = (np.int64(stride // x_.itemsize) for stride in x_.strides)
            sizes = np.int64(rows), np.int64(columns)
            arguments = (pointer(x_), *strides, *sizes, pointer(y), pointer(partial), pointer(self._counter(device)))
            device.launch(kernel, (blocks, shares, 1), THREADS, arguments)

    # Elementwise and row functions.

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        """``out = activation(x)``."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            kernel = _activation_kernel("forward", activation.name, y.dtype.name)
            arguments = pointer(x_), pointer(y), number(parameter, y.dtype), np.int64(y.size)
            self._map(device, "elementwise.cuh", kernel, y.size, y.itemsize, arguments)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        """``out = grad_y * activation'``."""
        with self._placed(grad_y, saved, out, writes=1) as (device, g, s, y):
            kernel = _activation_kernel("backward", activation.name, y.dtype.name)
            arguments = pointer(g), pointer(s), pointer(y), number(parameter, y.dtype), np.int64(y.size)
            self._map(device, "elementwise.cuh", kernel, y.size, y.itemsize, arguments)

    def _rows(self, device: Device, source: str, kernel: str, rows: int, arguments: Sequence[Any], team: int) -> int:
        """Launch a kernel in which teams of so many threads take rows; return the number of blocks."""
        blocks = min(MOST_PARTS, -(-rows // (THREADS // team)))
        (loaded,) = device.kernels(source, [kernel])
        device.launch(loaded, (blocks, 1, 1), THREADS, arguments)
        return blocks

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        """``out = function(x)``, over the rows."""
        with self._placed(x, out, writes=1) as (device, x_, y):
            rows, columns = y.shape
            team = _team(columns, x_, y)
            kernel = _row_kernel("forward", function.name, y.dtype.name, team)
            arguments = pointer(x_), pointer(y), np.int64(rows), np.int32(columns)
            self._rows(device, "rows.cuh", kernel, rows, arguments, team.threads)

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        """``out`` = the gradient with respect to the function's input."""
        with self._placed(grad_y, y, out, writes=1) as (device, g, y_, grad_x):
            rows, columns = grad_x.shape
            team = _team(columns, g, y_, grad_x)
            kernel = _row_kernel("backward", function.name, g.dtype.name, team)
            arguments = pointer(g), pointer(y_), pointer(grad_x), np.int64(rows), np.int32(columns)
            self._rows(device, "rows.cuh", kernel, rows, arguments, team.threads)

    # Losses.

    def softmax_cross_entropy(self, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        """Labels are int64 indices (rows,), in range, or floating point (rows, classes)."""
        with self._placed(logits, labels, out, writes=1) as (device, z, t, grad):
            rows, columns = z.shape
            indices, targets = (t, None) if t.ndim == 1 else (None, t)
            team = _team(columns, z, targets, grad)
            numbers = np.float64(1.0 - label_smoothing), np.float64(label_smoothing / columns)
            arguments = (pointer(z), pointer(indices), pointer(targets), *numbers, pointer(grad), np.int64(rows))
            partial, mean = device.empty((MOST_PARTS,), np.float64), device.empty((1,), np.float64)
            outputs = pointer(partial), pointer(mean), pointer(self._counter(device))
            kernel = _cross_entropy_kernel(z.dtype.name, team)
            self._rows(device, "losses.cuh", kernel, rows, (*arguments, np.int32(columns), *outputs), team.threads)
            return self._mean(device, mean)

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        """Mean over all elements."""
        with self._placed(prediction, target, out, writes=1) as (device, p, t, grad):
            blocks = min(MOST_PARTS, -(-p.nbytes // (16 * THREADS)))
            partial, mean = device.empty((MOST_PARTS,), np.float64), device.empty((1,), np.float64)
            outputs = pointer(partial), pointer(mean), pointer(self._counter(device))
            inputs = pointer(p), pointer(t), number(parameter, p.dtype), pointer(grad), np.int64(p.size)
            (kernel,) = device.kernels("losses.cuh", [_loss_kernel(loss.name, p.dtype.name)])
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
            numbers = np.zeros(9)
            numbers[: len(scalars)] = scalars
            places = [pointer(s) for s in (*states, None, None)][:2]
            arguments = pointer(p), pointer(g), *places, np.void(numbers.tobytes()), np.int64(p.size)
            kernel = _update_kernel(rule.name, p.dtype.name)
            self._map(device, "optimizers.cuh", kernel, p.size, p.itemsize, arguments)

    # Fused training.

    def fuses(self, network: str, activations: Iterable[str], losses: Iterable[str], rule: str) -> bool:
        """Whether whole steps of a network of these can be done on the GPU."""
        return cuda_training.fuses(activations, losses, rule)

    def hold(self, feed: Feed, targets: Array | None) -> tuple[Feed, Any]:
        """Samples and targets on the GPU where the samples are, else on the first."""
        return cuda_training.hold(self._trains(feed), feed, targets)

    def _trains(self, feed: Feed) -> Device:
        return self.device_of(feed.x) if arrays.is_on_gpu(feed.x) else self._first

    def train_mlp(
        self,
        layers: Sequence[FusedLayer],
        feed: Feed,
        targets: Any,
        loss: str,
        row_weight: float,
        order: NDArray[np.int64],
        batch: int,
        rule: str,
        scalars: NDArray[np.float64],
        loss_sum: float,
    ) -> tuple[float, int]:
        """Train a stack of layers."""
        return cuda_training.train_mlp(
            self._trains(feed), layers, feed, targets, loss, row_weight, order, batch, rule, scalars, loss_sum
        )

    def train_gan(
        self,
        generator: Sequence[FusedLayer],
        discriminator: Sequence[FusedLayer],
        feed: Feed,
        scale: float,
        shift: float,
        noise: Array,
        real_target: float,
        non_saturating: bool,
        order: NDArray[np.int64],
        batch: int,
        generator_rule: str,
        generator_scalars: NDArray[np.float64],
        discriminator_rule: str,
        discriminator_scalars: NDArray[np.float64],
        decay: NDArray[np.float64],
        loss_sums: tuple[float, float],
    ) -> tuple[float, float]:
        """Train two adversarial stacks of layers."""
        return cuda_training.train_gan(
            self._trains(feed), generator, discriminator, feed, scale, shift, noise, real_target, non_saturating,
            order, batch, generator_rule, generator_scalars, discriminator_rule, discriminator_scalars, decay,
            loss_sums,
        )  # fmt: skip


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
