"""The CUDA backend: our own kernels (``csrc/cuda``) on CuPy's arrays.

Arrays on a GPU are computed where they are, on the stream that is current in CuPy. NumPy arrays, which come when this
backend was chosen by name, are copied to the first GPU and back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ... import _precision, _threads
from ..._arrays import is_on_gpu, name_of
from ...formulas.activations import ACTIVATIONS, Activation
from ...formulas.augmentation import Draw, Settings
from ...formulas.losses import Loss, RowFunction, RowLoss, smoothing
from ...formulas.optimizers import Hyperparameters, OptimizerRule
from ...training.plan import Batches, Outcome, TrainingPlan
from ..base import Array
from ..numpy import NumpyBackend
from . import augmentation, compiler, fast_path, launches, matmul, training
from .device import Device
from .launches import THREADS, Launcher, scaled_kernel
from .types import CPP_TYPES, RULE_HYPERPARAMETERS, RULE_STATES, address, number, pointer

# Sources that not every architecture compiles, and those that do.
ARCHITECTURES = {**matmul.ARCHITECTURES, **training.ARCHITECTURES}


def expressions(fused: Iterable[str] = ACTIVATIONS) -> dict[str, list[str]]:
    """Every kernel that the backend launches, by source file: for compiling ahead of time, and for tests.

    Matmuls have the activations of `fused`; of the kernels of `fit`, those of usual networks are there.
    """
    others = augmentation.expressions() | training.expressions()
    return {**launches.expressions(), **matmul.expressions(fused), **others}


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


class CudaBackend(Launcher, NumpyBackend):
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
        super().__init__(devices)
        self.fast_paths = fast_path.fast_paths(self)

    def describe(self) -> dict[str, str]:
        return {
            "backend": self.name,
            "isa": f"{self._first.arch}, {self._first.name}",
            "cupy": sys.modules["cupy"].__version__,
            "nvrtc": compiler.nvrtc_version(),
            "float32 matmuls": _precision.get_float32_matmul_precision(),
            "threads": f"{_threads.get_num_threads()} (of the CPU)",
        }

    # Copies of NumPy arrays.

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

    def to_device(self, array: Any, like: Any = None) -> Any:
        """Without `like`, the first GPU."""
        if is_on_gpu(array):
            return array
        return self._upload(self.device_of(like) if is_on_gpu(like) else self._first, array)

    def placed_like(self, array: Any, like: Any) -> Any:
        return self.to_device(array, like) if is_on_gpu(like) else array

    def scaled(self, array: Any, dtype: np.dtype[Any], scale: float = 1.0, shift: float = 0.0) -> Any:
        if not is_on_gpu(array):
            return super().scaled(array, dtype, scale, shift)
        x, device = self.contiguous(array), self.device_of(array)
        result = device.empty(x.shape, dtype)
        if x.size:
            (kernel,) = device.kernels("elementwise.cuh", [scaled_kernel(x.dtype, dtype)])
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

    # Matmuls.

    def matmul(self, a: Array, b: Array, out: Array) -> None:
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
        with self._placed(x, w, b, preactivation, out, writes=2) as (device, x_, w_, b_, z, y):
            if y.size:
                tf32 = _precision.allows_tf32()
                matmul.linear(device, x_, w_, b_, activation, parameter, y, z, tf32=tf32)

    def column_sum(self, x: Array, out: Array) -> None:
        with self._placed(x, out, writes=1) as (device, x_, y):
            if not x_.shape[0]:
                device.zero(y)
            elif y.size:
                row_stride, column_stride = (stride // x_.itemsize for stride in x_.strides)
                run = self.column_sums(device, x_.dtype, x_.shape, (row_stride, column_stride))
                run(address(x_), address(y), self.scratch(device).counter)

    # Elementwise and row functions.

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        with self._placed(x, out, writes=1) as (device, x_, y):
            if y.size:
                launch, per_block, _ = self.activation_launch(device, "forward", activation.name, y.dtype)
                launch(-(-y.size // per_block), 1, address(x_), address(y), parameter, y.size)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        with self._placed(grad_y, saved, out, writes=1) as (device, g, s, y):
            if y.size:
                launch, per_block, _ = self.activation_launch(device, "backward", activation.name, y.dtype)
                launch(-(-y.size // per_block), 1, address(g), address(s), address(y), parameter, y.size)

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        with self._placed(x, out, writes=1) as (device, x_, y):
            rows, columns = y.shape
            addresses = address(x_), address(y)
            kernel = self.row_launch(device, "forward", function.name, y.dtype, columns, *addresses)
            kernel.launch(kernel.blocks(rows), 1, *addresses, rows, columns)

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        with self._placed(grad_y, y, out, writes=1) as (device, g, y_, grad_x):
            rows, columns = grad_x.shape
            addresses = address(g), address(y_), address(grad_x)
            kernel = self.row_launch(device, "backward", function.name, g.dtype, columns, *addresses)
            kernel.launch(kernel.blocks(rows), 1, *addresses, rows, columns)

    # Losses.

    def row_loss(self, loss: RowLoss, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        with self._placed(logits, labels, out, writes=1) as (device, z, t, grad):
            rows, columns = z.shape
            indices, targets = (address(t), 0) if t.ndim == 1 else (0, address(t))
            whole = t.ndim == 1 and label_smoothing == 0
            addresses = address(z), targets, address(grad)
            kernel = self.row_loss_launch(device, loss.name, z.dtype, columns, whole, *addresses)
            values = address(z), indices, targets, *smoothing(label_smoothing, columns), address(grad), rows, columns
            mean = self.mean(device, kernel.launch, kernel.blocks(rows), *values)
            assert mean is not None
            return mean

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        with self._placed(prediction, target, out, writes=1) as (device, p, t, grad):
            kernel = self.loss_launch(device, loss.name, p.dtype)
            values = address(p), address(t), float(number(parameter, p.dtype)), address(grad), p.size
            mean = self.mean(device, kernel.launch, kernel.blocks(p.size), *values)
            assert mean is not None
            return mean

    # Optimizers.

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], hyperparameters: Hyperparameters
    ) -> None:
        with self._placed(grad, *state, param, writes=1 + len(state)) as (device, g, *rest):
            *states, p = rest
            if p.size:
                launch, per_block, _ = self.update_launch(device, rule.name, p.dtype)
                addresses = *map(address, states), *[0] * (RULE_STATES - len(states))
                numbers = *hyperparameters, *[0.0] * (RULE_HYPERPARAMETERS - len(hyperparameters))
                launch(-(-p.size // per_block), 1, address(p), address(g), *addresses, *numbers, p.size)

    # Images.

    def augment(self, images: Array, settings: Settings, draw: Draw, out: Array, rows: Array | None = None) -> None:
        if not out.size:
            return
        if not is_on_gpu(images):
            device = self._first
            there = device.upload(np.ascontiguousarray(images if rows is None else images[rows]))
            result = device.empty(out.shape, out.dtype)
            self.augment(there, settings, draw, result)
            device.download(result, out)
            return
        device, numbers = self.device_of(images), draw.samples
        if not is_on_gpu(numbers):
            numbers = device.upload(np.ascontiguousarray(numbers))
        if rows is not None and not is_on_gpu(rows):
            rows = device.upload(np.ascontiguousarray(rows))
        if address(out) == address(images) and not augmentation.is_staged(*out.shape[1:]):
            images = self.copy(images)
        augmentation.augment(device, images, settings, draw._replace(samples=numbers), out, rows)

    # Training.

    def supports_fused(self, plan: TrainingPlan) -> bool:
        return training.supports_fused(plan)

    def stage(self, plan: TrainingPlan) -> TrainingPlan:
        """Dataset and targets go to the GPU where the samples are, else to the first; the plan stays as it is."""
        if self.supports_fused(plan):
            plan.executors[self] = self._session(plan)
        return plan

    def _session(self, plan: TrainingPlan) -> training.Session:
        x = plan.gather.dataset.x
        return training.Session(self.device_of(x) if is_on_gpu(x) else self._first, plan)

    def restage(self, plan: TrainingPlan) -> None:
        if (session := plan.executors.get(self)) is not None:
            session.restage()

    def write_back(self, plan: TrainingPlan) -> None:
        if (session := plan.executors.get(self)) is not None:
            session.write_back()

    def empty_pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new page-locked array, which every GPU copies from."""
        return self._first.empty_pinned(shape, dtype)

    def train(self, plan: TrainingPlan, batches: Batches) -> Outcome:
        session: training.Session | None = plan.executors.get(self)
        if batches.varies or (session is None and not self.supports_fused(plan)):
            self.write_back(plan)
            return super().train(plan, batches)
        is_staged = session is not None
        session = session or self._session(plan)
        try:
            outcome = session.train(batches)
        finally:
            plan.is_torn = session.is_torn
        if not is_staged:
            session.write_back()
        return outcome


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
