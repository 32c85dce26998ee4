"""The usual call of a kernel on a GPU, from the caller's arguments to the launch.

A launch costs some microseconds, and the general path of `gemmlet.kernels`, which finds the words for every error,
costs more than that. The functions here are what `Backend.fast_paths` describes: for anything unusual they return None,
with nothing written, and the general path computes the same bits or raises.

Usual are arrays of the type `cupy.ndarray` itself, not empty, of one dtype and on one GPU, that are C-contiguous and
start at multiples of 16 bytes (matrices that are multiplied: of any strides), and an output that lies on an input
exactly or apart from all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ... import _precision
from ...formulas.activations import ACTIVATIONS, Activation
from ...formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES, Loss, RowFunction, smoothing
from ...formulas.optimizers import OPTIMIZER_RULES, OptimizerRule
from . import compiler, matmul
from .device import Device
from .launches import Launcher
from .types import FLOATS, RULE_HYPERPARAMETERS, RULE_STATES

FastPath = Callable[..., Any]

# The dtypes that there are, and what the number of an activation or a loss may be at most.
_LARGEST = {name: float(np.finfo(np.float64 if name == "float64" else np.float32).max) for name in FLOATS}

_INT64 = np.dtype(np.int64)


def fast_paths(launcher: Launcher) -> dict[str, FastPath]:
    """Return the fast path of each kernel, by its name; those of updates by the rule's."""
    made = _FastPaths(launcher)
    found: dict[str, FastPath] = {}
    for name, activation in ACTIVATIONS.items():
        found[name], found[f"{name}_backward"] = made.activation(activation), made.activation_backward(activation)
    for name, function in ROW_FUNCTIONS.items():
        found[name], found[f"{name}_backward"] = made.row_function(function), made.row_function_backward(function)
    for name, loss in LOSSES.items():
        found[name] = made.loss(loss)
    for name in ROW_LOSSES:
        found[name] = made.row_loss(name)
    for name, rule in OPTIMIZER_RULES.items():
        found[f"{name}_update"] = made.update(rule)
    found["linear"], found["linear_backward"] = made.linear(), made.linear_backward()
    return found


def _apart(at: int, size: int, other: int, other_size: int) -> bool:
    """Whether two pieces of memory share no byte."""
    return at + size <= other or other + other_size <= at


class _FastPaths:
    """What makes them: closures, as attributes of an object would cost as much as the checks."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.array_type = array_type = compiler.import_cupy().ndarray

        def first(array: Any) -> tuple[int, tuple[int, ...], np.dtype[Any], int, int] | None:
            """Address, shape, dtype, GPU and bytes of a usual array, or None."""
            if type(array) is not array_type or not array._c_contiguous:
                return None
            data, nbytes = array.data, array.nbytes
            at = data.ptr
            return None if at & 15 or not nbytes else (at, array.shape, array.dtype, data.device_id, nbytes)

        def another(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], gpu: int) -> int:
            """The address of a usual array like the first; 0 if it is none."""
            if type(array) is array_type and array._c_contiguous and array.shape == shape and array.dtype == dtype:
                data = array.data
                if data.device_id == gpu and not data.ptr & 15:
                    return data.ptr  # type: ignore[no-any-return]
            return 0

        def output(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], gpu: int, nbytes: int, *inputs: int) -> int:
            """The address of a usual output of elementwise inputs at these addresses; 0 if it is none."""
            at = another(out, shape, dtype, gpu)
            for other in inputs:
                if at != other and at + nbytes > other and other + nbytes > at:
                    return 0
            return at

        self.first, self.another, self.output = first, another, output

    def _remembered(self, make: Callable[..., tuple[Any, ...]]) -> tuple[dict[Any, Any], Callable[..., Any]]:
        """A dictionary by GPU, dtype and what else there is, and what fills it: with ``make(device, dtype, *rest)``.

        The device and the largest number of the dtype go before; () stands for a dtype that kernels do not take.
        """
        found: dict[Any, Any] = {}

        def fill(gpu: int, dtype: np.dtype[Any], *rest: Any) -> Any:
            made: tuple[Any, ...] = ()
            if dtype.name in _LARGEST and dtype.isnative:
                device = self.launcher.device(gpu)
                made = device, _LARGEST[dtype.name], *make(device, dtype, *rest)
            found[gpu, dtype, *rest] = made
            return made

        return found, fill

    def activation(self, entry: Activation) -> FastPath:
        """``call(x, parameter, out)``."""
        launcher, first, output, takes_number = self.launcher, self.first, self.output, entry.parameter is not None
        known, fill = self._remembered(lambda d, dtype: launcher.activation_launch(d, "forward", entry.name, dtype))

        def call(x: Any, parameter: Any, out: Any) -> Any:
            given = first(x)
            if given is None:
                return None
            at, shape, dtype, gpu, nbytes = given
            prepared = known.get((gpu, dtype)) or fill(gpu, dtype)
            if not prepared:
                return None
            device, largest, launch, per_block, _ = prepared
            if not takes_number:
                parameter = 0.0
            elif type(parameter) is not float or not 0.0 < parameter <= largest:
                return None
            if out is None:
                out = device.empty(shape, dtype)
                y = out.data.ptr
            elif not (y := output(out, shape, dtype, gpu, nbytes, at)):
                return None
            size = x.size
            launch(-(-size // per_block), 1, at, y, parameter, size)
            return out

        return call

    def activation_backward(self, entry: Activation) -> FastPath:
        """``call(grad_y, x, y, parameter, out)``."""
        launcher, first, another, output = self.launcher, self.first, self.another, self.output
        takes_number, needs_x = entry.parameter is not None, entry.needs_x
        known, fill = self._remembered(lambda d, dtype: launcher.activation_launch(d, "backward", entry.name, dtype))

        def call(grad_y: Any, x: Any, y: Any, parameter: Any, out: Any) -> Any:
            given = first(grad_y)
            if given is None:
                return None
            at, shape, dtype, gpu, nbytes = given
            saved, other = (x, y) if needs_x else (y, x)
            saved_at = another(saved, shape, dtype, gpu)
            if not saved_at or (other is not None and not another(other, shape, dtype, gpu)):
                return None
            prepared = known.get((gpu, dtype)) or fill(gpu, dtype)
            if not prepared:
                return None
            device, largest, launch, per_block, _ = prepared
            if not takes_number:
                parameter = 0.0
            elif type(parameter) is not float or not 0.0 < parameter <= largest:
                return None
            if out is None:
                out = device.empty(shape, dtype)
                result = out.data.ptr
            elif not (result := output(out, shape, dtype, gpu, nbytes, at, saved_at)):
                return None
            size = grad_y.size
            launch(-(-size // per_block), 1, at, saved_at, result, parameter, size)
            return out

        return call

    def row_function(self, entry: RowFunction) -> FastPath:
        """``call(x, None, out)``."""
        launcher, first, output = self.launcher, self.first, self.output
        known, fill = self._remembered(lambda d, *rest: (launcher.row_launch(d, "forward", entry.name, *rest),))

        def call(x: Any, _: Any, out: Any) -> Any:
            given = first(x)
            if given is None or not given[1]:
                return None
            at, shape, dtype, gpu, nbytes = given
            columns = shape[-1]
            prepared = known.get((gpu, dtype, columns)) or fill(gpu, dtype, columns)
            if not prepared:
                return None
            device, _, kernel = prepared
            if out is None:
                out = device.empty(shape, dtype)
                y = out.data.ptr
            elif not (y := output(out, shape, dtype, gpu, nbytes, at)):
                return None
            rows = x.size // columns
            kernel.launch(kernel.blocks(rows), 1, at, y, rows, columns)
            return out

        return call

    def row_function_backward(self, entry: RowFunction) -> FastPath:
        """``call(grad_y, x, y, None, out)``."""
        launcher, first, another, output = self.launcher, self.first, self.another, self.output
        known, fill = self._remembered(lambda d, *rest: (launcher.row_launch(d, "backward", entry.name, *rest),))

        def call(grad_y: Any, x: Any, y: Any, _: Any, out: Any) -> Any:
            given = first(grad_y)
            if given is None or not given[1]:
                return None
            at, shape, dtype, gpu, nbytes = given
            y_at, columns = another(y, shape, dtype, gpu), shape[-1]
            if not y_at or (x is not None and not another(x, shape, dtype, gpu)):
                return None
            prepared = known.get((gpu, dtype, columns)) or fill(gpu, dtype, columns)
            if not prepared:
                return None
            device, _, kernel = prepared
            if out is None:
                out = device.empty(shape, dtype)
                result = out.data.ptr
            elif not (result := output(out, shape, dtype, gpu, nbytes, at, y_at)):
                return None
            rows = grad_y.size // columns
            kernel.launch(kernel.blocks(rows), 1, at, y_at, result, rows, columns)
            return out

        return call

    def loss(self, entry: Loss) -> FastPath:
        """``call(prediction, targets, parameter, out)``."""
        launcher, first, another, output = self.launcher, self.first, self.another, self.output
        takes_number, unit_interval = entry.parameter is not None, entry.unit_interval
        known, fill = self._remembered(lambda d, dtype: (launcher.loss_launch(d, entry.name, dtype),))

        def call(prediction: Any, targets: Any, parameter: Any, out: Any) -> Any:
            given = first(prediction)
            if given is None:
                return None
            at, shape, dtype, gpu, nbytes = given
            target = another(targets, shape, dtype, gpu)
            prepared = target and (known.get((gpu, dtype)) or fill(gpu, dtype))
            if not prepared:
                return None
            device, largest, kernel = prepared
            if not takes_number:
                parameter = 0.0
            elif type(parameter) is not float or not 0.0 < parameter <= largest:
                return None
            if out is not None and not (gradient := output(out, shape, dtype, gpu, nbytes, at, target)):
                return None
            size = prediction.size
            if unit_interval:
                launcher.find_range(device, dtype, "double", at, size)
            if out is None:
                out = device.empty(shape, dtype)
                gradient = out.data.ptr
            values = at, target, parameter, gradient, size
            mean = launcher.mean(device, kernel.launch, kernel.blocks(size), *values, check=unit_interval)
            return None if mean is None else (mean, out)

        return call

    def row_loss(self, name: str) -> FastPath:
        """``call(logits, labels, label_smoothing, out)``."""
        launcher, first, another, output = self.launcher, self.first, self.another, self.output
        array_type = self.array_type
        known, fill = self._remembered(lambda d, *rest: (launcher.row_loss_launch(d, name, *rest),))

        def call(logits: Any, labels: Any, label_smoothing: Any, out: Any) -> Any:
            given = first(logits)
            if given is None or len(given[1]) != 2 or type(labels) is not array_type:
                return None
            at, shape, dtype, gpu, nbytes = given
            rows, columns = shape
            if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
                return None
            of_classes = labels.ndim == 1
            indices = another(labels, shape[:1], _INT64, gpu) if of_classes else 0
            targets = 0 if of_classes else another(labels, shape, dtype, gpu)
            key = gpu, dtype, columns, of_classes and label_smoothing == 0.0
            prepared = (indices or targets) and (known.get(key) or fill(*key))
            if not prepared:
                return None
            device, _, kernel = prepared
            if out is None:
                gradient = 0
            else:
                gradient = output(out, shape, dtype, gpu, nbytes, at, *((targets,) if targets else ()))
                if not gradient or (indices and not _apart(gradient, nbytes, indices, 8 * rows)):
                    return None
            if indices:
                launcher.find_range(device, _INT64, "long long", indices, rows)
            if out is None:
                out = device.empty(shape, dtype)
                gradient = out.data.ptr
            values = at, indices, targets, *smoothing(label_smoothing, columns), gradient, rows, columns
            mean = launcher.mean(device, kernel.launch, kernel.blocks(rows), *values, check=of_classes)
            return None if mean is None else (mean, out)

        return call

    def update(self, entry: OptimizerRule) -> FastPath:
        """``call(param, grad, states, hyperparameters)``; True when done."""
        launcher, first, another, count = self.launcher, self.first, self.another, len(entry.state)
        known, fill = self._remembered(lambda d, dtype: launcher.update_launch(d, entry.name, dtype))
        no_states = (0,) * (RULE_STATES - count)
        absent = (0.0,) * (RULE_HYPERPARAMETERS - len(entry.hyperparameters))

        def call(param: Any, grad: Any, states: tuple[Any, ...], hyperparameters: tuple[float, ...]) -> Any:
            given = first(param)
            if given is None or len(states) != count:
                return None
            at, shape, dtype, gpu, nbytes = given
            others = [another(array, shape, dtype, gpu) for array in (grad, *states)]
            prepared = 0 not in others and (known.get((gpu, dtype)) or fill(gpu, dtype))
            if not prepared:
                return None
            addresses = sorted((at, *others))
            if any(after - before < nbytes for before, after in itertools.pairwise(addresses)):
                return None
            _, _, launch, per_block, _ = prepared
            size = param.size
            launch(-(-size // per_block), 1, at, *others, *no_states, *hyperparameters, *absent, size)
            return True

        return call

    def linear(self) -> FastPath:
        """``call(x, w, b, activation, return_preactivation, out)``."""
        another, array_type = self.another, self.array_type
        known, fill = self._remembered(lambda _, dtype: (dtype.itemsize,))

        def call(x: Any, w: Any, b: Any, activation: Any, return_preactivation: Any, out: Any) -> Any:
            if type(x) is not array_type or type(w) is not array_type or x.ndim != 2 or w.ndim != 2:
                return None
            dtype, x_shape, w_shape, x_data, w_data = x.dtype, x.shape, w.shape, x.data, w.data
            gpu, x_at, w_at, shape = x_data.device_id, x_data.ptr, w_data.ptr, (x_shape[0], w_shape[1])
            if x_shape[1] != w_shape[0] or w.dtype != dtype or w_data.device_id != gpu:
                return None
            if not x.size or not w.size or type(return_preactivation) is not bool:
                return None
            if activation is None:
                name, parameter = "identity", 0.0
            elif type(activation) is not str or (entry := ACTIVATIONS.get(activation)) is None:
                return None
            else:
                name, parameter = activation, entry.default
            b_at = 0
            if b is not None and not (b_at := another(b, w_shape[1:], dtype, gpu)):
                return None
            found = known.get((gpu, dtype)) or fill(gpu, dtype)
            if not found:
                return None
            device, _, itemsize = found
            if (x_at | w_at) % itemsize:
                return None
            if out is None:
                y = device.empty(shape, dtype)
                y_at = y.data.ptr
            else:
                # Of inputs with gaps the memory is not known here.
                packed = (x._c_contiguous or x._f_contiguous) and (w._c_contiguous or w._f_contiguous)
                if not packed or not (y_at := another(out, shape, dtype, gpu)):
                    return None
                nbytes = out.nbytes
                if not _apart(y_at, nbytes, x_at, x.nbytes) or not _apart(y_at, nbytes, w_at, w.nbytes):
                    return None
                if b_at and not _apart(y_at, nbytes, b_at, b.nbytes):
                    return None
                y = out
            z = device.empty(shape, dtype) if return_preactivation else None
            layouts, aligned = (x_shape, w_shape, x.strides, w.strides, dtype), (not x_at & 15, not w_at & 15, True)
            tf32 = itemsize == 4 and _precision.allows_tf32()
            run = matmul.prepared(device, device.multiprocessors, layouts, aligned, name, parameter, tf32, None)
            run(x_at, w_at, y_at, 0 if z is None else z.data.ptr, b_at)
            return y if z is None else (y, z)

        return call

    def linear_backward(self) -> FastPath:
        """``call(grad_y, x, w, y, activation, z, need_x, need_w, need_b)``."""
        launcher, first, another, array_type = self.launcher, self.first, self.another, self.array_type
        known, fill = self._remembered(lambda _, dtype: (dtype.itemsize,))

        def matrix(array: Any, dtype: np.dtype[Any], gpu: int) -> tuple[int, tuple[int, int], tuple[int, int]] | None:
            """Address, shape and strides of a matrix with elements, of any strides."""
            if type(array) is not array_type or array.dtype != dtype or not array.size:
                return None
            data, shape = array.data, array.shape
            at = data.ptr
            fits = len(shape) == 2 and data.device_id == gpu and not at % dtype.itemsize
            return (at, shape, array.strides) if fits else None

        @functools.lru_cache(maxsize=4096)
        def plan(
            device: Device,
            dtype: np.dtype[Any],
            shape: tuple[int, int],
            strides: tuple[int, int],
            activation: str | None,
            w_layout: tuple[tuple[int, int], tuple[int, int], bool] | None,
            x_layout: tuple[tuple[int, int], tuple[int, int], bool] | None,
            need_b: bool,
            tf32: bool,
        ) -> tuple[Any, ...]:
            """What is launched: the activation's gradient, both matmuls, the sums; None for each that is not needed.

            Of w and x there are shape, strides and whether the address is a multiple of 16; they are multiplied
            transposed, without an array for it.
            """
            backward = to_x = to_w = to_b = None
            if activation is not None:
                backward = launcher.activation_launch(device, "backward", activation, dtype)
                strides = shape[1] * dtype.itemsize, dtype.itemsize

            def prepared(a: tuple[Any, ...], b: tuple[Any, ...]) -> Any:
                layouts, aligned = (a[0], b[0], a[1], b[1], dtype), (a[2], b[2], True)
                return matmul.prepared(device, device.multiprocessors, layouts, aligned, "identity", 0.0, tf32, None)

            grad = shape, strides, True
            if w_layout is not None:
                to_x = prepared(grad, (w_layout[0][::-1], w_layout[1][::-1], w_layout[2]))
            if x_layout is not None:
                to_w = prepared((x_layout[0][::-1], x_layout[1][::-1], x_layout[2]), grad)
            if need_b:
                row, column = (stride // dtype.itemsize for stride in strides)
                to_b = launcher.column_sums(device, dtype, shape, (row, column))
            return backward, to_x, to_w, to_b

        def call(
            grad_y: Any, x: Any, w: Any, y: Any, activation: Any, z: Any, need_x: Any, need_w: Any, need_b: Any
        ) -> Any:
            given = first(grad_y)
            if given is None or len(given[1]) != 2 or not type(need_x) is type(need_w) is type(need_b) is bool:
                return None
            at, shape, dtype, gpu, nbytes = given
            rows, columns = shape
            # x and w are checked even if they are not needed.
            x_is = None if x is None else matrix(x, dtype, gpu)
            w_is = None if w is None else matrix(w, dtype, gpu)
            if x_is is None:
                if need_w or x is not None:
                    return None
            elif x_is[1][0] != rows:
                return None
            if w_is is None:
                if need_x or w is not None:
                    return None
            elif w_is[1][1] != columns or (x_is is not None and x_is[1][1] != w_is[1][0]):
                return None
            y_at = z_at = saved_at = 0
            parameter = 0.0
            if y is not None and not (y_at := another(y, shape, dtype, gpu)):
                return None
            if z is not None and not (z_at := another(z, shape, dtype, gpu)):
                return None
            if activation is not None:
                if type(activation) is not str or (entry := ACTIVATIONS.get(activation)) is None:
                    return None
                saved_at, parameter = z_at if entry.needs_x else y_at, entry.default
                if not saved_at:
                    return None
            found = known.get((gpu, dtype)) or fill(gpu, dtype)
            if not found:
                return None
            device, _, itemsize = found
            w_layout = (w_is[1], w_is[2], not w_is[0] & 15) if need_x and w_is is not None else None
            x_layout = (x_is[1], x_is[2], not x_is[0] & 15) if need_w and x_is is not None else None
            tf32 = itemsize == 4 and _precision.allows_tf32()
            backward, to_x, to_w, to_b = plan(
                device, dtype, shape, grad_y.strides, activation, w_layout, x_layout, need_b, tf32
            )
            scratch = launcher.scratch(device)
            grad_x = grad_w = grad_b = None
            if backward is not None:
                grad_at = at
                if nbytes <= scratch.partial_bytes:
                    at = scratch.partial
                else:
                    grad_z = device.empty(shape, dtype)
                    at = grad_z.data.ptr
                size = grad_y.size
                backward.launch(-(-size // backward.per_block), 1, grad_at, saved_at, at, parameter, size)
            if to_x is not None:
                grad_x = device.empty((rows, w_is[1][0]), dtype)  # type: ignore[index]
                to_x(at, w_is[0], grad_x.data.ptr, 0, 0)  # type: ignore[index]
            if to_w is not None:
                grad_w = device.empty((x_is[1][1], columns), dtype)  # type: ignore[index]
                to_w(x_is[0], at, grad_w.data.ptr, 0, 0)  # type: ignore[index]
            if to_b is not None:
                grad_b = device.empty((columns,), dtype)
                to_b(at, grad_b.data.ptr, scratch.counter)
            return grad_x, grad_w, grad_b

        return call
