"""The contract of a backend: what `gemmlet.kernels` and `gemmlet.nn` ask of whatever computes.

A backend gets arrays that `gemmlet.kernels` has checked: one floating-point dtype, shapes that fit, `out` allocated and
free of overlap except where it is an input itself. Elementwise and row functions get C-contiguous arrays; matmuls
get any strides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..formulas.activations import Activation
from ..formulas.augmentation import Draw, Settings
from ..formulas.losses import Loss, RowFunction, RowLoss
from ..formulas.optimizers import Hyperparameters, OptimizerRule

if TYPE_CHECKING:
    from ..training.plan import Batches, Outcome, TrainingPlan

Array = NDArray[Any]


class Backend(Protocol):
    """Computes the kernels; the reference is `NumpyBackend`, and what a backend leaves out is computed by that."""

    name: str

    # By the names of kernels: functions that take the kernel's arguments as the caller gave them, in the order of its
    # signature, and return its result, or None where anything about the arguments is unusual, with nothing written.
    # Of `<rule>_update` the arguments are `param`, `grad`, tuples of states and hyperparameters; the result is True.
    fast_paths: Mapping[str, Callable[..., Any]]

    def describe(self) -> dict[str, str]:
        """What `gemmlet.show_config` prints about this backend."""

    def set_num_threads(self, count: int) -> None:
        """Set how many threads the kernels may use."""

    def get_num_threads(self) -> int:
        """Return what `gemmlet.get_num_threads` does."""

    # Arrays. They are where this backend computes, or NumPy's; of what `like` is in the place of, nothing else is used.

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: Any) -> Array:
        """A new C-contiguous array in the place of `like`."""

    def empty_like(self, array: Array, order: Literal["K", "C"] = "K") -> Array:
        """A new array of the same shape, dtype and place; with "K" in the same layout too, if that has no gaps."""

    def copy(self, array: Array) -> Array:
        """A C-contiguous copy in the same place."""

    def contiguous(self, array: Array) -> Array:
        """The array if it is C-contiguous, else a copy that is."""

    def as_matrix(self, array: Array) -> Array:
        """The array with its leading dimensions merged into one; a view wherever there is one."""

    def assign(self, target: Any, source: Any) -> None:
        """``target[...] = source``, of one shape and dtype; a `target` on the CPU takes a `source` from anywhere."""

    def to_cpu(self, array: Array) -> Array:
        """The array if it is NumPy's, else a copy that is."""

    def to_device(self, array: Array, like: Any = None) -> Array:
        """The array where this backend computes: itself, or a copy on a GPU: that of `like`, if it is on one."""

    def placed_like(self, array: Array, like: Any) -> Array:
        """The array, or a copy of it on the GPU where `like` is."""

    def scaled(self, array: Array, dtype: np.dtype[Any], scale: float = 1.0, shift: float = 0.0) -> Array:
        """``scale * array + shift``: numbers of `dtype`, or bytes, which count as value/255; C-contiguous."""

    def value_range(self, array: Array) -> tuple[float, float]:
        """The smallest and the largest of at least one element, NaN passed over."""

    def extremes(self, array: Array) -> tuple[float, float]:
        """The smallest and the largest of at least one number of an array (n, ...); NaN where there is one."""

    def as_indices(self, array: Array) -> tuple[Array, int, int]:
        """A copy of integers as int64, C-contiguous, and their smallest and largest; (0, 0) if there are none."""

    # Matmuls.

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """``out = a @ b``: (m, k) by (k, n)."""

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
        """``out = activation(x @ w + b)``; `preactivation`, if given, takes ``x @ w + b``."""

    def column_sum(self, x: Array, out: Array) -> None:
        """``out[j] = sum_i x[i, j]``, any strides."""

    # Elementwise and row functions.

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        """``out = activation(x)``."""

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        """``out = grad_y * activation'``, `saved` being the `x` or the `y` that the formula reads."""

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        """``out = function(x)``, (rows, columns), columns > 0."""

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        """``out`` = the gradient with respect to the function's input."""

    # Losses: the gradient into `out`, the mean is returned.

    def row_loss(self, loss: RowLoss, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        """Labels are int64 indices (rows,), in range, or floating point (rows, classes)."""

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        """Mean over all elements."""

    # Optimizers.

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], hyperparameters: Hyperparameters
    ) -> None:
        """Update `param` and its state in place."""

    # Images.

    def augment(self, images: Array, settings: Settings, draw: Draw, out: Array, rows: Array | None = None) -> None:
        """``out`` = the images (n, h, w), bytes, transformed; it is `images` itself, or overlaps it nowhere.

        With `rows`, int64, `out` has ``images[rows]`` transformed, and overlaps `images` nowhere. All are C-contiguous
        and in one place; of images on a GPU, `rows` and the samples of `draw` may be on the CPU. Every backend gives
        the same bytes.
        """

    # Training.

    def supports_fused(self, plan: TrainingPlan) -> bool:
        """Whether this backend has an executor of its own for the plan."""

    def forward(
        self, layers: Sequence[tuple[Array, Array, Activation | None]], x: Array, out: Array, *, skip_zeros: bool
    ) -> bool:
        """Layers of weight, bias and activation, all in one call; False, and nothing done, where there is none.

        Arrays are C-contiguous, and activations have their default parameter. Skipping zeros of x changes no result.
        """

    def encoded(self, x: Array) -> tuple[Array, Array] | None:
        """C-contiguous numbers as bytes, with `Dataset.value_of_byte`; None if they are many, or it is no use."""

    def stage(self, plan: TrainingPlan) -> TrainingPlan:
        """Move what the calls of one `fit` read to where this backend computes: the plan that `train` gets.

        What these calls change may stay on a GPU from one to the next: until `write_back` the arrays of the networks
        must be neither read nor changed.
        """

    def restage(self, plan: TrainingPlan) -> None:
        """Do so again with dataset and targets of a plan that `stage` has returned: their numbers have changed."""

    def write_back(self, plan: TrainingPlan) -> None:
        """Update the arrays of the networks of a plan that `stage` has returned."""

    def empty_pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array on the CPU: page-locked, where a GPU copies from it faster and by itself.

        Once it is given to a call, it is not to be changed before the call has returned.
        """

    def train(self, plan: TrainingPlan, batches: Batches) -> Outcome:
        """Take the steps of a plan on mini-batches; a plan that is not supported is left to the reference.

        Where it raises anything, `plan.is_torn` says whether parameters may have been changed. The caller sees to it
        that no signal's handler does.
        """
