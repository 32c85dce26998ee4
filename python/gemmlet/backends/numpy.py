"""The reference backend: the registry's NumPy expressions, evaluated in float64, and NumPy's own matmul.

Other backends derive from this one and override what they do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _threads
from ..formulas import augmentation
from ..formulas.activations import Activation
from ..formulas.augmentation import Draw, Settings
from ..formulas.losses import Loss, RowFunction, RowLoss, smoothing
from ..formulas.optimizers import Hyperparameters, OptimizerRule
from .base import Array, Backend

if TYPE_CHECKING:
    from ..training.plan import Batches, Outcome, TrainingPlan


def _f64(array: Array) -> NDArray[np.float64]:
    return array.astype(np.float64, copy=False)


class NumpyBackend(Backend):
    """Computes everything with NumPy alone."""

    name = "numpy"
    fast_paths: Mapping[str, Callable[..., Any]] = MappingProxyType({})

    def describe(self) -> dict[str, str]:
        return {"backend": self.name, "isa": "NumPy's own", "threads": "1 (matmul: NumPy's BLAS)"}

    def set_num_threads(self, count: int) -> None:
        """Elementwise NumPy has one thread, and the BLAS is the caller's to set."""

    def get_num_threads(self) -> int:
        return _threads.get_num_threads()

    # Arrays.

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: Any) -> Array:
        return np.empty(shape, dtype)

    def empty_like(self, array: Array, order: Literal["K", "C"] = "K") -> Array:
        return np.empty_like(array, order=order)

    def copy(self, array: Array) -> Array:
        result = self.empty(array.shape, array.dtype, array)
        self.assign(result, array)
        return result

    def contiguous(self, array: Array) -> Array:
        return array if array.flags.c_contiguous else self.copy(array)

    def as_matrix(self, array: Array) -> Array:
        return array if array.ndim == 2 else array.reshape(math.prod(array.shape[:-1]), array.shape[-1])

    def assign(self, target: Any, source: Any) -> None:
        target[...] = source

    def to_cpu(self, array: Array) -> Array:
        return array

    def to_device(self, array: Array, like: Any = None) -> Array:
        return array

    def placed_like(self, array: Array, like: Any) -> Array:
        return array

    def scaled(self, array: Array, dtype: np.dtype[Any], scale: float = 1.0, shift: float = 0.0) -> Array:
        numbers = array.astype(dtype, order="C")
        if array.dtype == np.uint8:
            numbers /= 255.0
        if (scale, shift) != (1.0, 0.0):
            numbers *= scale
            numbers += shift
        return numbers

    def value_range(self, array: Array) -> tuple[float, float]:
        return np.fmin.reduce(array, None), np.fmax.reduce(array, None)

    def extremes(self, array: Array) -> tuple[float, float]:
        return float(array.min()), float(array.max())

    def as_indices(self, array: Array) -> tuple[Array, int, int]:
        indices = array.copy()  # which nobody can change after the check
        low, high = (int(indices.min()), int(indices.max())) if indices.size else (0, 0)
        return indices.astype(np.int64, copy=False), low, high

    # Matmuls.

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        with np.errstate(all="ignore"):
            np.matmul(a, b, out=out)

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
        self.matmul(x, w, out)
        if b is not None:
            with np.errstate(all="ignore"):
                out += b
        if preactivation is not None:
            preactivation[...] = out
        if activation is not None:
            self.activation(activation, out, parameter, out)

    def column_sum(self, x: Array, out: Array) -> None:
        out[...] = np.sum(_f64(x), axis=0)

    # Elementwise and row functions.

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        with np.errstate(all="ignore"):
            out[...] = activation.forward(_f64(x), parameter)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        with np.errstate(all="ignore"):
            kept = _f64(saved)
            out[...] = activation.backward(_f64(grad_y), kept, kept, parameter)

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        with np.errstate(all="ignore"):
            out[...] = function.forward(_f64(x))

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        with np.errstate(all="ignore"):
            out[...] = function.backward(_f64(grad_y), _f64(y))

    # Losses: the gradient into `out`, the mean is returned.

    def row_loss(self, loss: RowLoss, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        rows, classes = logits.shape
        targets = np.zeros(logits.shape) if labels.ndim == 1 else _f64(labels)
        if labels.ndim == 1:
            targets[np.arange(rows), labels] = 1.0
        keep, spread = smoothing(label_smoothing, classes)
        with np.errstate(all="ignore"):
            losses, gradient = loss.evaluate(_f64(logits), keep * targets + spread)
            out[...] = gradient / rows
        return float(np.mean(losses))

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        with np.errstate(all="ignore"):
            value, out[...] = loss.evaluate(_f64(prediction), _f64(target), parameter, 1.0 / prediction.size)
            return float(np.mean(value))

    # Optimizers.

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], hyperparameters: Hyperparameters
    ) -> None:
        with np.errstate(all="ignore"):
            results = rule.apply(_f64(param), _f64(grad), *(_f64(s) for s in state), *hyperparameters)
            for target, result in zip((param, *state), results, strict=True):
                target[...] = result

    # Images.

    def augment(self, images: Array, settings: Settings, draw: Draw, out: Array, rows: Array | None = None) -> None:
        count, height, width = out.shape
        for part in augmentation.blocks(count, height * width):
            chosen = images[part if rows is None else rows[part]]
            out[part] = augmentation.augmented(chosen, settings, draw.of(part))

    # Training.

    def supports_fused(self, plan: TrainingPlan) -> bool:
        return False

    def forward(
        self, layers: Sequence[tuple[Array, Array, Activation | None]], x: Array, out: Array, *, skip_zeros: bool
    ) -> bool:
        return False

    def encoded(self, x: Array) -> tuple[Array, Array] | None:
        return None

    def stage(self, plan: TrainingPlan) -> TrainingPlan:
        return plan

    def restage(self, plan: TrainingPlan) -> None:
        """Everything is where it belongs."""

    def write_back(self, plan: TrainingPlan) -> None:
        """Everything is where it belongs."""

    def empty_pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.empty(shape, dtype)

    def train(self, plan: TrainingPlan, batches: Batches) -> Outcome:
        from ..training import reference  # here, as kernels alone do not need it

        return reference.train(self, plan, batches)
