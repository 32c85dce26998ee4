"""The reference backend: the registry's NumPy expressions, evaluated in float64, and NumPy's own matrix product.

A backend gets arrays that `gemmlet.kernels` has checked: one floating-point dtype, shapes that fit, `out` allocated and
free of overlap except where it is an input itself. Elementwise and row functions get C-contiguous arrays; matrix
products get any strides. Other backends derive from this one and override what they do better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _threads
from ..formulas.activations import Activation
from ..formulas.losses import Loss, RowFunction, softmax_cross_entropy
from ..formulas.optimizers import OptimizerRule, Scalars

Array = NDArray[Any]


def _f64(array: Array) -> NDArray[np.float64]:
    return array.astype(np.float64, copy=False)


class FusedLayer(NamedTuple):
    """One layer as fused training takes it: parameters, optimizer state of each, and moving averages or None."""

    weight: Array
    bias: Array
    activation: str | None
    activation_parameter: float
    weight_state: tuple[Array, ...]
    bias_state: tuple[Array, ...]
    weight_average: Array | None = None
    bias_average: Array | None = None


class Feed(NamedTuple):
    """Samples as fused training takes them: rows (n, features), uint8 or float; or a sparse matrix's three arrays.

    Rows may be on a GPU, for a backend that computes there.
    """

    x: Array
    row_start: NDArray[np.int64] | None
    columns: NDArray[np.int32] | None
    skip_zeros: bool


class FusedNetwork(NamedTuple):
    """A stack of layers, and how it is updated: an optimizer's rule, and its numbers at each step, (steps, numbers)."""

    layers: Sequence[FusedLayer]
    rule: str
    scalars: NDArray[np.float64]


class MlpRun(NamedTuple):
    """What `train_mlp` does in one call: a step for each mini-batch of `order`.

    Attributes
    ----------
    network : FusedNetwork
        Its arrays are updated in place.
    feed : Feed
    targets : ndarray
        Of all samples: class indices, int64 of shape (n,), or numbers (n, outputs).
    loss : str
        ``"softmax_cross_entropy"`` or an elementwise one, whose sum over a row counts `row_weight` times.
    row_weight : float
    order : ndarray of int64
        Which samples; `batch` of them make a mini-batch, the last of which may be smaller.
    batch : int
    loss_sum : float
        What the losses of the samples are added to.
    meanwhile : callable or None
        A backend whose processor would only wait for a GPU calls it while it does: it prepares the next call, and
        raises nothing.
    """

    network: FusedNetwork
    feed: Feed
    targets: Any
    loss: str
    row_weight: float
    order: NDArray[np.int64]
    batch: int
    loss_sum: float
    meanwhile: Callable[[], None] | None = None


class GanRun(NamedTuple):
    """What `train_gan` does in one call: a step of each network, first the discriminator, for each batch of `order`.

    Attributes
    ----------
    generator, discriminator : FusedNetwork
        Their arrays, the generator's moving averages among them, are updated in place.
    feed : Feed
        Samples within [0, 1], which the discriminator sees as ``scale * x + shift``.
    scale, shift : float
    noise : ndarray, shape (len(order), latent_dim)
    real_target : float
        The discriminator's target for samples; for what is generated it is 0.
    non_saturating : bool
        Which of the two losses the generator has.
    order, batch
        As in `MlpRun`.
    decay : ndarray of float64, shape (steps,)
        Of the moving averages.
    loss_sums : (float, float)
        What the losses of generator and discriminator are added to.
    meanwhile
        As in `MlpRun`.
    """

    generator: FusedNetwork
    discriminator: FusedNetwork
    feed: Feed
    scale: float
    shift: float
    noise: Array
    real_target: float
    non_saturating: bool
    order: NDArray[np.int64]
    batch: int
    decay: NDArray[np.float64]
    loss_sums: tuple[float, float]
    meanwhile: Callable[[], None] | None = None


class NumpyBackend:
    """Computes everything with NumPy alone."""

    name = "numpy"

    # By the names of kernels: functions that take the kernel's arguments as the caller gave them, in the order of its
    # signature, and return its result, or None where anything about the arguments is unusual, with nothing written.
    # Of `<rule>_update` the arguments are `param`, `grad`, the tuples of states and of numbers, and the result is True.
    quick: Mapping[str, Callable[..., Any]] = MappingProxyType({})

    def describe(self) -> dict[str, str]:
        """What `gemmlet.show_config` prints about this backend."""
        return {"backend": self.name, "isa": "NumPy's own", "threads": "1 (the matrix product: NumPy's BLAS)"}

    def set_num_threads(self, count: int) -> None:
        """Take note of the number of threads; elementwise NumPy has one, and the BLAS is the caller's to set."""

    def get_num_threads(self) -> int:
        """Return what `gemmlet.get_num_threads` does."""
        return _threads.get_num_threads()

    # Matrix products.

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """``out = a @ b``: (m, k) by (k, n)."""
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
        """``out = activation(x @ w + b)``; `preactivation`, if given, takes ``x @ w + b``."""
        self.matmul(x, w, out)
        if b is not None:
            with np.errstate(all="ignore"):
                out += b
        if preactivation is not None:
            preactivation[...] = out
        if activation is not None:
            self.activation(activation, out, parameter, out)

    def column_sum(self, x: Array, out: Array) -> None:
        """``out[j] = sum_i x[i, j]``, any strides."""
        out[...] = np.sum(_f64(x), axis=0)

    # Elementwise and row functions.

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        """``out = activation(x)``."""
        with np.errstate(all="ignore"):
            out[...] = activation.forward(_f64(x), parameter)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        """``out = grad_y * activation'``, `saved` being the `x` or the `y` that the formula reads."""
        with np.errstate(all="ignore"):
            kept = _f64(saved)
            out[...] = activation.backward(_f64(grad_y), kept, kept, parameter)

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        """``out = function(x)``, (rows, columns), columns > 0."""
        with np.errstate(all="ignore"):
            out[...] = function.forward(_f64(x))

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        """``out`` = the gradient with respect to the function's input."""
        with np.errstate(all="ignore"):
            out[...] = function.backward(_f64(grad_y), _f64(y))

    # Losses: the gradient into `out`, the mean is returned.

    def softmax_cross_entropy(self, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        """Labels are int64 indices (rows,), in range, or floating point (rows, classes)."""
        rows, classes = logits.shape
        targets = np.zeros(logits.shape) if labels.ndim == 1 else _f64(labels)
        if labels.ndim == 1:
            targets[np.arange(rows), labels] = 1.0
        targets = (1.0 - label_smoothing) * targets + label_smoothing / classes
        with np.errstate(all="ignore"):
            loss, gradient = softmax_cross_entropy(_f64(logits), targets)
            out[...] = gradient / rows
        return float(np.mean(loss))

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        """Mean over all elements."""
        with np.errstate(all="ignore"):
            value, out[...] = loss.evaluate(_f64(prediction), _f64(target), parameter, 1.0 / prediction.size)
            return float(np.mean(value))

    # Optimizers.

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], scalars: Scalars
    ) -> None:
        """Update `param` and its state in place."""
        with np.errstate(all="ignore"):
            results = rule.apply(_f64(param), _f64(grad), *(_f64(s) for s in state), *scalars)
            for target, result in zip((param, *state), results, strict=True):
                target[...] = result

    # Fused training: steps of a network in one call, for a backend that has it.

    def fuses(self, network: str, activations: Iterable[str], losses: Iterable[str], rule: str) -> bool:
        """Whether ``train_<network>`` is there, ``"mlp"`` or ``"gan"``, and knows these names."""
        return False

    def bring(self, array: Any, beside: Any = None) -> Any:
        """The array where this backend computes: itself, or a copy on a GPU, on that of `beside` if it is on one."""
        return array

    def hold(self, feed: Feed, targets: Array | None) -> tuple[Feed, Any]:
        """Samples, and their targets if there are any, as the calls to come want them.

        What these calls change may stay on a GPU from one to the next: until `write_back` the arrays of their networks
        are not to be looked at, and not to be changed.
        """
        return feed, targets

    def write_back(self, feed: Feed) -> None:
        """Bring the arrays of the networks up to date that were trained on `feed`, which is `hold`'s."""

    def empty_pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A new array on the CPU: page-locked, where a GPU copies from it faster and by itself.

        Once it is given to a call, it is not to be changed before the call has returned.
        """
        return np.empty(shape, dtype)

    def train_mlp(self, run: MlpRun) -> tuple[float, int]:
        """Train on mini-batches; return `run.loss_sum` with their losses added, and how many answers were right."""
        raise NotImplementedError("ask `fuses` first")

    def train_gan(self, run: GanRun) -> tuple[float, float]:
        """The same for two adversarial networks; return the losses of generator and discriminator."""
        raise NotImplementedError("ask `fuses` first")
