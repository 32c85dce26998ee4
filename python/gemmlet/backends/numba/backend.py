"""The Numba backend: the fallback where no compiled module loads.

Matmul is NumPy's BLAS; everything else is one pass, compiled at its first use for each function and dtype
(a fraction of a second each, nothing is cached on disk). The formulas are the scalar kernels of `.formulas`; what has
none is computed by the reference.

Threads: Numba's own (``parallel=True``) abort the process when two Python threads call at once, or hang after a fork.
So large arrays are split over a small pool of Python threads, as compiled code runs without the GIL. Work is split over
whole elements, rows, or blocks whose partial sums are added in one order: results do not depend on the number of
threads.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numba
import numpy as np
from llvmlite import binding

from ..._signals import deferred_signals
from ...formulas import augmentation
from ...formulas.activations import ACTIVATIONS, Activation
from ...formulas.augmentation import Draw, Settings
from ...formulas.losses import Loss, RowFunction, RowLoss
from ...formulas.optimizers import Hyperparameters, OptimizerRule
from ...training.plan import SAMPLES, Batches, Forward, Gather, Outcome, TrainingPlan, UnsupportedError, dense_layers
from ..base import Array
from ..numpy import NumpyBackend
from . import loops, training
from .formulas import scalar_kernels

# The least work worth a thread, in elements: handing over a task costs about as much as 20,000 elements of the cheapest
# pass.
_ELEMENTS_PER_THREAD = 65_536

# Threads.


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gemmlet")


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork: the child starts its own.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _apart(array: Array, out: Array) -> Array:
    """`array` flat, and copied if `out` is the same memory."""
    return (array.copy() if np.may_share_memory(array, out) else array).reshape(-1)


# The usual call, which is answered without the checks of `gemmlet.kernels`: C-contiguous arrays that behave, too small
# for a second thread.


def _fast_result(out: Any, like: Array, *inputs: Array) -> Any:
    """A new array, or `out` if it needs no care: None else."""
    if out is None:
        return np.empty_like(like)
    if type(out) is not np.ndarray or out.dtype != like.dtype or out.shape != like.shape or not out.flags.carray:
        return None
    return None if any(np.may_share_memory(out, array) for array in inputs) else out


def _fast_forward(entry: Activation) -> Callable[..., Any]:
    known: dict[Any, Any] = {}  # by dtypes that may be asked for, as they come

    def fast_path(x: Any, parameter: Any, out: Any) -> Any:
        if type(x) is not np.ndarray or x.size >= _ELEMENTS_PER_THREAD or not x.flags.carray:
            return None
        if x.dtype not in known:
            known[x.dtype] = _fast_loop(loops.forward_loop, entry.name, entry.name, x.dtype, entry)
        loop, number, default = known[x.dtype]
        if loop is None or type(parameter) is not type(default) or parameter != default:
            return None
        y = _fast_result(out, x, x)
        if y is not None:
            loop(x.reshape(-1), number, y.reshape(-1))
        return y

    return fast_path


def _fast_backward(entry: Activation) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def fast_path(grad_y: Any, x: Any, y: Any, parameter: Any, out: Any) -> Any:
        saved, other = (x, y) if entry.needs_x else (y, x)
        if not type(grad_y) is type(saved) is np.ndarray or grad_y.size >= _ELEMENTS_PER_THREAD:
            return None
        dtype, shape = grad_y.dtype, grad_y.shape
        if saved.dtype != dtype or saved.shape != shape or not (grad_y.flags.carray and saved.flags.carray):
            return None
        if other is not None and (type(other) is not np.ndarray or other.dtype != dtype or other.shape != shape):
            return None
        if dtype not in known:
            known[dtype] = _fast_loop(loops.backward_loop, entry.name, f"{entry.name}_backward", dtype, entry)
        loop, number, default = known[dtype]
        if loop is None or type(parameter) is not type(default) or parameter != default:
            return None
        grad_x = _fast_result(out, grad_y, grad_y, saved)
        if grad_x is not None:
            loop(grad_y.reshape(-1), saved.reshape(-1), number, grad_x.reshape(-1))
        return grad_x

    return fast_path


def _fast_loop(factory: Any, name: str, key: str, dtype: np.dtype[Any], entry: Activation) -> tuple[Any, Any, Any]:
    """The loop, if there is one for the dtype, the formula's number, and the argument that stands for it."""
    if dtype not in (np.float32, np.float64) or key not in scalar_kernels(dtype):
        return None, None, None
    number = float(dtype.type(entry.default))
    return factory(name, dtype), number, None if entry.parameter is None else entry.default


class NumbaBackend(NumpyBackend):
    """Fused passes compiled by Numba around NumPy's matmul."""

    name = "numba"

    def __init__(self) -> None:
        self._threads = 1
        self.fast_paths = {name: _fast_forward(entry) for name, entry in ACTIVATIONS.items()}
        self.fast_paths |= {f"{name}_backward": _fast_backward(entry) for name, entry in ACTIVATIONS.items()}

    def describe(self) -> dict[str, str]:
        return {
            "backend": self.name,
            "isa": f"{binding.get_host_cpu_name()} (compiled by Numba {numba.__version__})",
            "threads": f"{self._threads} (matmul: NumPy's BLAS)",
        }

    def set_num_threads(self, count: int) -> None:
        """Split large arrays into `count` parts; the BLAS is the caller's to set."""
        self._threads = count

    def _split(self, size: int, unit: int, run: Callable[[slice], None]) -> None:
        """Call `run` on slices that cover `size` elements, each of whole units, at the same time."""
        parts = min(self._threads, size // _ELEMENTS_PER_THREAD)
        if parts < 2:
            run(slice(0, size))
            return
        length = -(-size // (parts * unit)) * unit
        slices = [slice(start, min(start + length, size)) for start in range(0, size, length)]
        futures: list[Future[None]] = []
        try:
            for part in slices[1:]:
                futures.append(_pool().submit(run, part))
            run(slices[0])
            for future in futures:
                future.result()
        except BaseException:
            # No thread may write to the arrays of a call that has ended.
            with deferred_signals():
                wait([future for future in futures if not future.cancel()])
            raise

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
        name = "identity" if activation is None else activation.name
        if name not in scalar_kernels(out.dtype) or not out.size:
            super().linear(x, w, b, activation, parameter, out, preactivation)
            return
        self.matmul(x, w, out)
        loop = loops.epilogue_loop(name, out.dtype)
        none = np.empty(0, out.dtype)
        y, z = out.reshape(-1), none if preactivation is None else preactivation.reshape(-1)
        bias, columns = none if b is None else b, out.shape[1]
        self._split(y.size, columns, lambda part: loop(y[part], columns, bias, parameter, z[part]))

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        if activation.name not in scalar_kernels(out.dtype):
            super().activation(activation, x, parameter, out)
            return
        y = out.reshape(-1)
        if np.may_share_memory(x, out):
            in_place = loops.epilogue_loop(activation.name, out.dtype)
            none = np.empty(0, out.dtype)
            self._split(y.size, 1, lambda part: in_place(y[part], 1, none, parameter, none))
            return
        flat, loop = x.reshape(-1), loops.forward_loop(activation.name, out.dtype)
        self._split(y.size, 1, lambda part: loop(flat[part], parameter, y[part]))

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        if f"{activation.name}_backward" not in scalar_kernels(out.dtype):
            super().activation_backward(activation, grad_y, saved, parameter, out)
            return
        loop = loops.backward_loop(activation.name, out.dtype)
        grad, grad_x = _apart(grad_y, out), out.reshape(-1)
        kept = _apart(saved, out)
        self._split(grad_x.size, 1, lambda part: loop(grad[part], kept[part], parameter, grad_x[part]))

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        if function.name not in ("softmax", "log_softmax"):
            super().row_function(function, x, out)
            return
        loop, columns = loops.row_loop(function.name, out.dtype), out.shape[1]
        flat, y = x.reshape(-1), out.reshape(-1)
        self._split(y.size, columns, lambda part: loop(flat[part], columns, y[part]))

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        if function.name not in ("softmax", "log_softmax"):
            super().row_function_backward(function, grad_y, y, out)
            return
        loop, columns = loops.row_backward_loop(function.name, out.dtype), out.shape[1]
        grad, kept, grad_x = grad_y.reshape(-1), y.reshape(-1), out.reshape(-1)
        self._split(grad_x.size, columns, lambda part: loop(grad[part], kept[part], columns, grad_x[part]))

    def row_loss(self, loss: RowLoss, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        if loss.name != "softmax_cross_entropy":
            return super().row_loss(loss, logits, labels, label_smoothing, out)
        rows, columns = logits.shape
        loop, dtype = loops.cross_entropy_loop(out.dtype), out.dtype
        z, gradient, losses = logits.reshape(-1), out.reshape(-1), np.empty(rows)
        indices = labels if labels.ndim == 1 else np.empty(0, np.int64)
        soft = labels.reshape(-1) if labels.ndim == 2 else np.empty(0, dtype)
        scale = dtype.type(1.0 / rows)

        def run(part: slice) -> None:
            lines = slice(part.start // columns, part.stop // columns)
            loop(
                z[part], columns, indices[lines], soft[part], label_smoothing, scale, losses[lines], gradient[part]
            )  # fmt: skip

        self._split(z.size, columns, run)
        return float(np.sum(losses) / rows)

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        if loss.name not in scalar_kernels(out.dtype):
            return super().elementwise_loss(loss, prediction, target, parameter, out)
        loop = loops.loss_loop(loss.name, out.dtype)
        p, t, gradient = _apart(prediction, out), _apart(target, out), out.reshape(-1)
        sums, scale = np.empty(-(-p.size // loops.BLOCK)), 1.0 / p.size

        def run(part: slice) -> None:
            blocks = slice(part.start // loops.BLOCK, -(-part.stop // loops.BLOCK))
            loop(p[part], t[part], parameter, scale, sums[blocks], gradient[part])

        self._split(p.size, loops.BLOCK, run)
        return float(np.sum(sums) / p.size)

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], hyperparameters: Hyperparameters
    ) -> None:
        if rule.name not in scalar_kernels(param.dtype) or len(state) > 2:
            super().update(rule, param, grad, state, hyperparameters)
            return
        loop = loops.update_loop(rule.name, param.dtype, len(state), len(hyperparameters))
        p, g, states = param.reshape(-1), grad.reshape(-1), [s.reshape(-1) for s in state]
        self._split(p.size, 1, lambda part: loop(p[part], g[part], *(s[part] for s in states), hyperparameters))

    # Images.

    def augment(self, images: Array, settings: Settings, draw: Draw, out: Array, rows: Array | None = None) -> None:
        count, height, width = out.shape
        loop, pixels = loops.augment_loop(), height * width
        of_row, of_column = augmentation.grid_weights(height, width)
        spacing = augmentation.grid_spacing(height, width)

        def run(part: slice) -> None:
            begin, end = part.start // pixels, part.stop // pixels
            for block in augmentation.blocks(end - begin, pixels):
                chosen = slice(begin + block.start, begin + block.stop)
                numbers = augmentation.numbers(settings, height, width, draw.of(chosen))
                given = images[chosen if rows is None else rows[chosen]]
                loop(given, numbers.maps, numbers.points, of_row, of_column, spacing, *numbers[2:], out[chosen])

        self._split(count * pixels, pixels, run)

    # Training.

    def supports_fused(self, plan: TrainingPlan) -> bool:
        """Dense layers of formulas that have scalar kernels; zeros are skipped in the input of a single network."""
        activations, dataset = plan.activations(), plan.gather.dataset
        names = activations | {f"{name}_backward" for name in activations}
        names |= {loss.name for loss in plan.losses} | {update.rule for update in plan.updates}
        forwards = [phase for phase in plan.phases if isinstance(phase, Forward)]
        try:
            stacks = [dense_layers(network) for network in plan.networks]
        except UnsupportedError:
            return False
        if dataset.labels is not None and any(stack[0].dropout is not None for stack in stacks):
            return False  # the classes among the inputs are not dropped
        return (
            not (plan.has_extras or plan.has_noise or plan.gradient_penalties)
            and dataset.weights is None
            and names - {"softmax_cross_entropy"} <= scalar_kernels(plan.dtype).keys()
            and (dataset.labels is None or not dataset.skip_zeros)
            and (not dataset.skip_zeros or (plan.gather, forwards) == (Gather(dataset), [Forward(0, (SAMPLES,))]))
        )

    def train(self, plan: TrainingPlan, batches: Batches) -> Outcome:
        """Matmuls by NumPy's BLAS, everything between them compiled."""
        if not self.supports_fused(plan) or batches.varies or plan.hides_weights():
            return super().train(plan, batches)
        return training.train(plan, batches, self._split)
