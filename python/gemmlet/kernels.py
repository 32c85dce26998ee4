"""The kernels: matmul, activations, losses and optimizer updates, on whichever backend is in use.

All take float32 or float64 arrays: NumPy's, or anything with ``__array_interface__``, the buffer protocol or DLPack on
the CPU (a PyTorch tensor, say), which is read where it lies, without a copy. Every array of one call has one dtype; the
result has it too. Nothing is cast silently, and a call that raises has written nothing.

Arrays on a GPU, CuPy's or anything with ``__cuda_array_interface__`` or DLPack, are computed there by the CUDA kernels,
on CuPy's current stream; results are CuPy's. They may be float16 or bfloat16 too, which are computed in float32,
exponentials and the like to 14 bits at least, and rounded once. All arrays of a call are in one place. A loss is waited
for, as it is a Python float, and so are class indices, to be checked; everything else returns at once.

Errors common to all: `TypeError` for a dtype that is none of these, or that differs from the other arguments';
`ValueError` for a shape that does not fit, for a number out of its range, for arrays in different places, for an `out`
that is read-only or overlaps what a matmul reads, and for updated arrays that overlap. Each names the argument.

Special values are as in NumPy: NaN propagates, infinities and subnormal numbers are computed correctly. Where the
formula would give inf times 0, the result is its limit. The same input gives the same bits for any number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _arguments as arguments
from ._arguments import adam_hyperparameters, sgd_hyperparameters
from ._arrays import computed_in
from .backends import select
from .backends.base import Backend
from .formulas.activations import ACTIVATIONS, Activation
from .formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES, Loss, RowFunction, RowLoss
from .formulas.optimizers import OPTIMIZER_RULES

Array = NDArray[Any]

_MATMULS = ["linear", "linear_backward", "matmul"]
_UPDATES = ["adam_update", "adamw_update", "sgd_update"]
_FORWARD = [*ACTIVATIONS, *ROW_FUNCTIONS]

__all__ = sorted([*_MATMULS, *_UPDATES, *_FORWARD, *(f"{name}_backward" for name in _FORWARD), *LOSSES, *ROW_LOSSES])


# Arguments in the layout that backends want.


def _refuse_overlap(out: Array, **inputs: Array | None) -> None:
    for name, array in inputs.items():
        if array is not None and arguments.overlaps(out, array):
            raise ValueError(f"out overlaps {name}: a matmul cannot write where it reads")


def _elementwise(
    backend: Backend,
    call: Callable[..., Any],
    inputs: tuple[Array | None, ...],
    outputs: tuple[Array, ...],
    *,
    rows: bool = False,
    new: bool = False,
) -> Any:
    """``call(*inputs, *outputs)`` with every array C-contiguous and no partial overlap.

    All arrays have one shape. A layout that all share is used as it is (a transposed array by its transpose, unless the
    function goes by `rows`); else inputs are copied, and outputs written through a buffer. `new` outputs are known to
    overlap nothing.
    """
    all_of_them = [a for a in (*inputs, *outputs) if a is not None]
    if all([a.flags.c_contiguous for a in all_of_them]):  # noqa: C419 - a list is faster
        if new:
            return call(*inputs, *outputs)
    else:
        if not rows and all(a.flags.f_contiguous for a in all_of_them):
            inputs = tuple(None if a is None else a.T for a in inputs)
            outputs = tuple(a.T for a in outputs)
        else:
            inputs = tuple(None if a is None else backend.contiguous(a) for a in inputs)
    buffers = tuple(o if o.flags.c_contiguous else backend.copy(o) for o in outputs)
    inputs = tuple(
        backend.copy(a)
        if a is not None and any(arguments.overlaps(a, o) and not arguments.same_view(a, o) for o in buffers)
        else a
        for a in inputs
    )
    result = call(*inputs, *buffers)
    for target, buffer in zip(outputs, buffers, strict=True):
        if buffer is not target:
            backend.assign(target, buffer)
    return result


def _like(backend: Backend, x: Array, out: Any) -> Array:
    """`out` after its checks, or a new array in the layout of `x`."""
    return backend.empty_like(x) if out is None else arguments.output(backend, out, "out", x.shape, x)


def _returned(out: Any, array: Array) -> Any:
    """What a function returns: the caller's own `out`, or the new array."""
    return array if out is None else out


# Matmuls.


def matmul(a: Any, b: Any, *, out: Any = None) -> Any:
    """Matrix multiplication ``a @ b``.

    Parameters
    ----------
    a : array_like, shape (..., m, k) or (k,)
        Any strides: a transposed or sliced view is not copied.
    b : array_like, shape (..., k, n) or (k,)
        Any strides, the dtype of `a`. Vectors and stacks of matrices are treated as by `numpy.matmul`.
    out : array_like, optional
        Takes the result. It must not overlap `a` or `b`.

    Returns
    -------
    ndarray, shape (..., m, n)
        `out` if it was given. Of two vectors without `out` it is a scalar, as NumPy's; on a GPU an array.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or `out` does not fit.

    Notes
    -----
    Each element is a sum over k in an order that the backend fixes, whatever the number of threads. Its error is at
    most ``k * eps * (abs(a) @ abs(b))`` (Higham, Accuracy and Stability of Numerical Algorithms, 3.5).
    """
    fast_path = select.current().fast_paths.get("linear")
    if fast_path is not None and (result := fast_path(a, b, None, None, False, out)) is not None:
        return result
    if (result := select.fast_path_on_gpu("linear")(a, b, None, None, False, out)) is not None:
        return result
    left = arguments.as_floats(a, "a")
    right = arguments.as_floats(b, "b", left)
    if left.ndim == 0 or right.ndim == 0:
        raise ValueError(f"{'a' if left.ndim == 0 else 'b'} is a scalar; expected at least one dimension")
    matrices = left[np.newaxis, :] if left.ndim == 1 else left, right[:, np.newaxis] if right.ndim == 1 else right
    if matrices[0].shape[-1] != matrices[1].shape[-2]:
        raise ValueError(
            f"b has shape {right.shape}, which does not fit a of shape {left.shape}: "
            f"{matrices[0].shape[-1]} columns against {matrices[1].shape[-2]} rows"
        )
    try:
        stack = np.broadcast_shapes(matrices[0].shape[:-2], matrices[1].shape[:-2])
    except ValueError:
        raise ValueError(f"the stacks of a {left.shape} and b {right.shape} do not broadcast") from None
    full = (*stack, matrices[0].shape[-2], matrices[1].shape[-1])
    shape = full[:-2] + full[-2:-1] * (left.ndim > 1) + full[-1:] * (right.ndim > 1)
    backend = select.of(left)
    result = arguments.output(backend, out, "out", shape, left)
    if out is not None:
        _refuse_overlap(result, a=left, b=right)
    buffer = result if result.flags.c_contiguous else backend.empty(shape, left.dtype, left)
    if not stack:
        backend.matmul(*matrices, buffer.reshape(full))
    else:
        lefts = np.broadcast_to(matrices[0], (*stack, *matrices[0].shape[-2:]))
        rights = np.broadcast_to(matrices[1], (*stack, *matrices[1].shape[-2:]))
        outs = buffer.reshape(full)
        for index in np.ndindex(stack):
            backend.matmul(lefts[index], rights[index], outs[index])
    if buffer is not result:
        backend.assign(result, buffer)
    return _returned(out, result if shape or out is not None else result[()])


def _activation_named(activation: Any) -> Activation | None:
    if activation is None:
        return None
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; the choices are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[activation]


def _activation_parameter(entry: Activation | None, value: Any, name: str, dtype: np.dtype[Any]) -> float:
    """The activation's number, rounded to the dtype that it computes in; its default where none was given."""
    if value is None:
        return 0.0 if entry is None else float(computed_in(dtype).type(entry.default))
    if entry is None or entry.parameter is None:
        raise ValueError(f"{name} was given, but the activation {entry.name if entry else None!r} takes none")
    return arguments.rounded(arguments.number(value, name, low=0.0, open_low=True), name, dtype, value)


def linear(
    x: Any,
    w: Any,
    b: Any = None,
    activation: str | None = None,
    *,
    activation_parameter: float | None = None,
    return_preactivation: bool = False,
    out: Any = None,
) -> Any:
    """Linear layer ``y = activation(x @ w + b)`` in one pass.

    Parameters
    ----------
    x : array_like, shape (..., in_features)
        One-dimensional, it is one sample. Any strides.
    w : array_like, shape (in_features, out_features)
        Any strides.
    b : array_like, shape (out_features,), optional
    activation : str, optional
        The name of an activation in this module, fused with the matmul.
    activation_parameter : float, optional
        Its number, where it takes one (`negative_slope` of leaky_relu, `alpha` of elu).
    return_preactivation : bool
        Whether to return ``z = x @ w + b`` as well, for activations whose gradient needs it (gelu, silu).
    out : array_like, optional
        Takes `y`. It must not overlap the other arrays.

    Returns
    -------
    y : ndarray, shape (..., out_features)
    z : ndarray, shape (..., out_features)
        Only with `return_preactivation`.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape, the activation or `out` does not fit.
    """
    if activation_parameter is None:
        fast_path = select.current().fast_paths.get("linear")
        if fast_path is not None and (result := fast_path(x, w, b, activation, return_preactivation, out)) is not None:
            return result
        if (result := select.fast_path_on_gpu("linear")(x, w, b, activation, return_preactivation, out)) is not None:
            return result
    x_ = arguments.as_floats(x, "x")
    w_ = arguments.as_floats(w, "w", x_)
    b_ = None if b is None else arguments.as_floats(b, "b", x_)
    entry = _activation_named(activation)
    parameter = _activation_parameter(entry, activation_parameter, "activation_parameter", x_.dtype)
    keep_z = arguments.flag(return_preactivation, "return_preactivation")
    if x_.ndim == 0:
        raise ValueError("x is a scalar; expected shape (..., in_features)")
    if w_.ndim != 2 or w_.shape[0] != x_.shape[-1]:
        raise ValueError(f"w has shape {w_.shape}, expected ({x_.shape[-1]}, out_features), as x has shape {x_.shape}")
    if b_ is not None:
        arguments.check_shape(b_, "b", w_.shape[1:], "out_features of w")
    shape = (*x_.shape[:-1], w_.shape[1])
    backend = select.of(x_)
    y = arguments.output(backend, out, "out", shape, x_)
    if out is not None:
        _refuse_overlap(y, x=x_, w=w_, b=b_)
    if b_ is not None:
        b_ = backend.contiguous(b_)
    z = backend.empty(shape, x_.dtype, x_) if keep_z else None
    buffer = y if y.flags.c_contiguous else backend.empty(shape, x_.dtype, x_)
    as_matrix = backend.as_matrix
    backend.linear(as_matrix(x_), w_, b_, entry, parameter, as_matrix(buffer), None if z is None else as_matrix(z))
    if buffer is not y:
        backend.assign(y, buffer)
    return _returned(out, y) if z is None else (_returned(out, y), z)


def linear_backward(
    grad_y: Any,
    x: Any,
    w: Any,
    y: Any = None,
    activation: str | None = None,
    *,
    z: Any = None,
    activation_parameter: float | None = None,
    need_x: bool = True,
    need_w: bool = True,
    need_b: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of `linear`: ``grad_x, grad_w, grad_b`` from the gradient of its result.

    Parameters
    ----------
    grad_y : array_like, shape (..., out_features)
    x : array_like, shape (..., in_features)
        The layer's input; None if `need_w` is false.
    w : array_like, shape (in_features, out_features)
        The layer's weights; None if `need_x` is false.
    y : array_like, shape (..., out_features), optional
        The layer's result, from which most activations' gradients follow.
    activation, activation_parameter
        As given to `linear`.
    z : array_like, shape (..., out_features), optional
        ``x @ w + b``, which gelu, gelu_tanh and silu need: their result does not determine their input.
    need_x, need_w, need_b : bool
        Leave a gradient out, and its cost: None stands in its place.

    Returns
    -------
    grad_x : ndarray, shape (..., in_features), or None
    grad_w : ndarray, shape (in_features, out_features), or None
    grad_b : ndarray, shape (out_features,), or None

    Raises
    ------
    TypeError, ValueError
        A dtype or a shape does not fit, or `y` or `z` is missing where the activation needs it.
    """
    if activation_parameter is None:
        fast_path = select.current().fast_paths.get("linear_backward")
        result = None if fast_path is None else fast_path(grad_y, x, w, y, activation, z, need_x, need_w, need_b)
        if result is None:
            result = select.fast_path_on_gpu("linear_backward")(grad_y, x, w, y, activation, z, need_x, need_w, need_b)
        if result is not None:
            return result  # type: ignore[no-any-return]
    grad = arguments.as_floats(grad_y, "grad_y")
    if grad.ndim == 0:
        raise ValueError("grad_y is a scalar; expected shape (..., out_features)")
    entry = _activation_named(activation)
    parameter = _activation_parameter(entry, activation_parameter, "activation_parameter", grad.dtype)
    need_x, need_w = arguments.flag(need_x, "need_x"), arguments.flag(need_w, "need_w")
    need_b = arguments.flag(need_b, "need_b")
    for needed, needed_by, array, name in ((need_x, "need_x", w, "w"), (need_w, "need_w", x, "x")):
        if needed and array is None:
            raise ValueError(f"{name} is missing: only with {needed_by}=False may it be None")
    w_ = None if w is None else arguments.as_floats(w, "w", grad)
    x_ = None if x is None else arguments.as_floats(x, "x", grad)
    if w_ is not None and (w_.ndim != 2 or w_.shape[1] != grad.shape[-1]):
        raise ValueError(
            f"w has shape {w_.shape}, expected (in_features, {grad.shape[-1]}), as grad_y has {grad.shape}"
        )
    if x_ is not None and (
        x_.ndim == 0 or x_.shape[:-1] != grad.shape[:-1] or (w_ is not None and x_.shape[-1] != w_.shape[0])
    ):
        features = "in_features" if w_ is None else w_.shape[0]
        expected = ", ".join(map(str, (*grad.shape[:-1], features)))
        raise ValueError(f"x has shape {x_.shape}, expected ({expected}), as grad_y has {grad.shape}")
    used = "z" if entry is not None and entry.needs_x else "y"
    hint = "; linear(..., return_preactivation=True) returns it" if used == "z" else ""
    saved = _saved(entry, used, {"y": y, "z": z}, grad, hint)
    backend = select.of(grad)
    if entry is not None:
        grad_z, backward = backend.empty_like(grad, "C"), partial(backend.activation_backward, entry)
        _elementwise(backend, lambda g, s, o: backward(g, s, parameter, o), (grad, saved), (grad_z,), new=True)
    else:
        grad_z = grad
    rows = backend.as_matrix(grad_z)
    grad_x = grad_w = grad_b = None
    if need_x:
        assert w_ is not None
        grad_x = backend.empty((*grad.shape[:-1], w_.shape[0]), grad.dtype, grad)
        backend.matmul(rows, w_.T, backend.as_matrix(grad_x))
    if need_w:
        assert x_ is not None
        grad_w = backend.empty((x_.shape[-1], grad.shape[-1]), grad.dtype, grad)
        backend.matmul(backend.as_matrix(x_).T, rows, grad_w)
    if need_b:
        grad_b = backend.empty(grad.shape[-1:], grad.dtype, grad)
        backend.column_sum(rows, grad_b)
    return grad_x, grad_w, grad_b


def _saved(
    entry: Activation | RowFunction | None, used: str, given: dict[str, Any], grad: Array, hint: str = ""
) -> Array | None:
    """What the gradient of a function reads, of the arrays that may be given; all of them are checked."""
    checked: dict[str, Array] = {}
    for name, value in given.items():
        if value is not None:
            checked[name] = arguments.as_floats(value, name, grad)
            arguments.check_shape(checked[name], name, grad.shape, "the shape of grad_y")
    if entry is not None and used not in checked:
        raise ValueError(f"{used} is missing: the gradient of {entry.name} is computed from it{hint}")
    return checked.get(used)


# Activations, generated from the registry.


def _own_number(entry: Activation | Loss, value: Any, dtype: np.dtype[Any] | None = None) -> float:
    """The number of a kernel that takes one, rounded to the dtype if one is given."""
    if entry.parameter is None:
        return 0.0
    number = arguments.number(value, entry.parameter, low=0.0, open_low=True)
    return number if dtype is None else arguments.rounded(number, entry.parameter, dtype, value)


def _activation_forward(entry: Activation, x: Any, parameter: Any, out: Any) -> Any:
    x_ = arguments.as_floats(x, "x")
    value = _own_number(entry, parameter, x_.dtype)
    backend = select.of(x_)
    y = _like(backend, x_, out)
    _elementwise(backend, lambda a, o: backend.activation(entry, a, value, o), (x_,), (y,), new=out is None)
    return _returned(out, y)


def _activation_backward(entry: Activation, grad_y: Any, x: Any, y: Any, parameter: Any, out: Any) -> Any:
    grad = arguments.as_floats(grad_y, "grad_y")
    value = _own_number(entry, parameter, grad.dtype)
    saved = _saved(entry, "x" if entry.needs_x else "y", {"x": x, "y": y}, grad)
    backend = select.of(grad)
    grad_x, backward = _like(backend, grad, out), partial(backend.activation_backward, entry)
    _elementwise(backend, lambda g, s, o: backward(g, s, value, o), (grad, saved), (grad_x,), new=out is None)
    return _returned(out, grad_x)


_KERNEL = """
def {name}({parameters}, out=None):
    fast_path = current().fast_paths.get("{name}")
    result = None if fast_path is None else fast_path({arguments}, out)
    if result is None:
        result = fast_path_on_gpu("{name}")({arguments}, out)
    return general({arguments}, out) if result is None else result
"""


def _publish(name: str, general: Callable[..., Any], arrays: tuple[str, ...], entry: Any, doc: str) -> None:
    """Make the kernel `name`: the backend's fast path, else ``general(entry, *arrays, number, out)``.

    It is compiled from text, so that it has the argument names of its own that the registry gives, and the cost of a
    plain function: the binding of ``*args, **kwargs`` by hand costs more than a small kernel.
    """
    if isinstance(entry, RowLoss):
        parameter: str | None = "label_smoothing"
        parameters = ", ".join([*arrays, "*", "label_smoothing=0.0"])
    else:
        parameter = getattr(entry, "parameter", None)
        parameters = ", ".join([*arrays, *([f"{parameter}={entry.default!r}"] if parameter else []), "*"])
    arguments = ", ".join([*arrays, parameter or "None"])
    scope: dict[str, Any] = {
        "__name__": __name__,
        "current": select.current,
        "fast_path_on_gpu": select.fast_path_on_gpu,
        "general": partial(general, entry),
    }
    exec(_KERNEL.format(name=name, parameters=parameters, arguments=arguments), scope)
    scope[name].__doc__ = doc
    globals()[name] = scope[name]


_OUT = """out : array_like, optional
    Takes the result; it may be one of the inputs."""


def _number_section(entry: Activation | Loss) -> str:
    return "" if entry.parameter is None else f"\n{entry.parameter} : float, default {entry.default:g}\n    Above 0."


def _publish_activation(entry: Activation) -> None:
    forward = f"""Activation {entry.name}: ``{entry.formula}``.

Parameters
----------
x : array_like, any shape{_number_section(entry)}
{_OUT}

Returns
-------
ndarray, the shape and dtype of `x`

Notes
-----
Error at most {entry.forward_accuracy}. Source: {entry.source}.
"""
    used, other = ("x", "y") if entry.needs_x else ("y", "x")
    backward = f"""Gradient of {entry.name}: ``grad_y`` times its derivative.

Parameters
----------
grad_y : array_like, any shape
x, y : array_like, the shape of `grad_y`
    The input and the result of {entry.name}. The gradient is computed from `{used}`; `{other}` may be None.{
        _number_section(entry)
    }
{_OUT}

Returns
-------
ndarray, the shape and dtype of `grad_y`

Notes
-----
Error at most {entry.backward_accuracy} of the derivative, as a function of `{used}`. Source: {entry.source}.
"""
    _publish(entry.name, _activation_forward, ("x",), entry, forward)
    _publish(f"{entry.name}_backward", _activation_backward, ("grad_y", "x", "y"), entry, backward)


# Functions of rows.


def _by_rows(backend: Backend, call: Callable[..., None], inputs: tuple[Array, ...], out: Any) -> Any:
    """``call(*inputs, output)`` with all arrays as matrices, unless there are no elements; returns the output."""
    like = inputs[0]
    array = arguments.output(backend, out, "out", like.shape, like)
    if like.size:

        def call_on_matrices(*arrays: Array) -> None:
            call(*map(backend.as_matrix, arrays))

        _elementwise(backend, call_on_matrices, inputs, (array,), rows=True, new=out is None)
    return _returned(out, array)


def _row_forward(entry: RowFunction, x: Any, _: None, out: Any) -> Any:
    x_ = arguments.as_floats(x, "x")
    if x_.ndim == 0:
        raise ValueError("x is a scalar; expected at least one dimension")
    backend = select.of(x_)
    return _by_rows(backend, partial(backend.row_function, entry), (x_,), out)


def _row_backward(entry: RowFunction, grad_y: Any, x: Any, y: Any, _: None, out: Any) -> Any:
    grad = arguments.as_floats(grad_y, "grad_y")
    if grad.ndim == 0:
        raise ValueError("grad_y is a scalar; expected at least one dimension")
    saved = _saved(entry, "y", {"x": x, "y": y}, grad)
    assert saved is not None
    backend = select.of(grad)
    return _by_rows(backend, partial(backend.row_function_backward, entry), (grad, saved), out)


def _publish_row_function(entry: RowFunction) -> None:
    forward = f"""Function {entry.name} over the last axis: ``{entry.formula}``.

Parameters
----------
x : array_like, shape (..., n)
{_OUT}

Returns
-------
ndarray, the shape and dtype of `x`

Notes
-----
The largest element is taken off first, so that nothing overflows. A row that holds NaN or +inf, or only -inf, gives
NaN. Source: {entry.source}.
"""
    backward = f"""Gradient of {entry.name}, over the last axis.

Parameters
----------
grad_y : array_like, shape (..., n)
x, y : array_like, the shape of `grad_y`
    The input and the result of {entry.name}. The gradient is computed from `y`; `x` may be None.
{_OUT}

Returns
-------
ndarray, the shape and dtype of `grad_y`
"""
    _publish(entry.name, _row_forward, ("x",), entry, forward)
    _publish(f"{entry.name}_backward", _row_backward, ("grad_y", "x", "y"), entry, backward)


# Losses.


def _elementwise_loss(entry: Loss, prediction: Any, targets: Any, parameter: Any, out: Any) -> tuple[float, Any]:
    p = arguments.as_floats(prediction, entry.prediction)
    t = arguments.as_floats(targets, "targets", p)
    arguments.check_shape(t, "targets", p.shape, f"the shape of {entry.prediction}")
    value = _own_number(entry, parameter)
    backend = select.of(p)
    if entry.unit_interval and p.size:
        arguments.check_unit_interval(*backend.value_range(p), entry.prediction)
    grad = _like(backend, p, out)
    if not p.size:
        return float("nan"), _returned(out, grad)
    evaluate = partial(backend.elementwise_loss, entry)
    # `rows`: the sum is in the order of the elements, which shall not depend on the layout.
    loss = _elementwise(backend, lambda a, b, o: evaluate(a, b, value, o), (p, t), (grad,), rows=True, new=out is None)
    return float(loss), _returned(out, grad)


def _publish_loss(entry: Loss) -> None:
    doc = f"""Loss {entry.name}, the mean over all elements, and its gradient, in one pass.

Element by element it is ``{entry.formula}``, with {entry.prediction} = {entry.prediction[0]} and targets = t.

Parameters
----------
{entry.prediction} : array_like, any shape{" within [0, 1]" if entry.unit_interval else ""}
targets : array_like, the shape of `{entry.prediction}`{_number_section(entry)}
out : array_like, optional
    Takes the gradient; it may be one of the inputs.

Returns
-------
loss : float
    Summed in float64. NaN if there are no elements.
gradient : ndarray, the shape and dtype of `{entry.prediction}`
    With respect to `{entry.prediction}`.

Notes
-----
Source: {entry.source}.
"""
    _publish(entry.name, _elementwise_loss, (entry.prediction, "targets"), entry, doc)


def _row_loss(entry: RowLoss, logits: Any, labels: Any, label_smoothing: Any, out: Any) -> tuple[float, Any]:
    z = arguments.as_floats(logits, "logits")
    if z.ndim != 2:
        raise ValueError(f"logits has shape {z.shape}, expected (rows, classes)")
    smoothing = arguments.number(label_smoothing, "label_smoothing", low=0.0, high=1.0)
    t = arguments.as_array(labels, "labels")
    backend = select.of(z)
    if t.ndim == 1:
        if t.dtype.kind not in "iu":
            raise TypeError(
                f"labels has dtype {t.dtype}; class indices must be integers: convert with labels.astype(np.int64)"
            )
        arguments.check_shape(t, "labels", z.shape[:1], "one index per row of logits")
        arguments.check_place(t, "labels", z)
        t, low, high = backend.as_indices(t)
        if t.size and (low < 0 or high >= z.shape[1]):
            raise ValueError(f"labels must lie within [0, {z.shape[1]}), got {low} to {high}")
    elif t.ndim == 0:
        raise ValueError("labels is a scalar; expected one class index, or one probability per class, for each row")
    else:
        t = arguments.as_floats(t, "labels", z)
        arguments.check_shape(t, "labels", z.shape, "one probability per class")
    grad = arguments.output(backend, out, "out", z.shape, z)
    if not z.size:
        return float("nan"), _returned(out, grad)

    def evaluate(z: Array, *rest: Array) -> float:
        return backend.row_loss(entry, z, t if t.ndim == 1 else rest[0], smoothing, rest[-1])

    inputs = (z,) if t.ndim == 1 else (z, t)
    loss = _elementwise(backend, evaluate, inputs, (grad,), rows=True, new=out is None)
    return float(loss), _returned(out, grad)


def _publish_row_loss(entry: RowLoss) -> None:
    doc = f"""Loss {entry.name}, the mean over the rows, and its gradient, in one pass.

Of one row it is ``{entry.formula}``, with logits z and targets t.

Parameters
----------
logits : array_like, shape (rows, classes)
labels : array_like, shape (rows,) of any integer dtype, or (rows, classes) of the dtype of `logits`
    Class indices, or one probability per class (one-hot or soft).
label_smoothing : float, within [0, 1]
    Targets become ``(1 - label_smoothing) * t + label_smoothing / classes`` (Szegedy et al., 2016).
out : array_like, optional
    Takes the gradient; it may be `logits`.

Returns
-------
loss : float
    Summed in float64. NaN if there are no rows.
gradient : ndarray, shape (rows, classes)
    ``({entry.gradient}) / rows``.

Raises
------
TypeError, ValueError
    A dtype or a shape does not fit, or a class index is out of range.

Notes
-----
Source: {entry.source}.
"""
    _publish(entry.name, _row_loss, ("logits", "labels"), entry, doc)


# Optimizer updates.


def _update(rule_name: str, param: Any, grad: Any, state: dict[str, Any], hyperparameters: tuple[float, ...]) -> None:
    kernel, states = f"{rule_name}_update", tuple(state.values())
    fast_path = select.current().fast_paths.get(kernel)
    if fast_path is not None and fast_path(param, grad, states, hyperparameters) is not None:
        return
    if select.fast_path_on_gpu(kernel)(param, grad, states, hyperparameters) is not None:
        return
    rule = OPTIMIZER_RULES[rule_name]
    p = arguments.updated(param, "param")
    g = arguments.as_floats(grad, "grad", p)
    arguments.check_shape(g, "grad", p.shape, "the shape of param")
    written = {"param": p}
    for name, array in state.items():
        written[name] = arguments.updated(array, name, p)
        arguments.check_shape(written[name], name, p.shape, "the shape of param")
    for (name, array), (other, array2) in itertools.combinations([*written.items(), ("grad", g)], 2):
        if arguments.overlaps(array, array2):
            raise ValueError(f"{name} overlaps {other}: each needs memory of its own")
    outputs = tuple(written.values())
    backend = select.of(p)
    _elementwise(
        backend, lambda gradient, q, *s: backend.update(rule, q, gradient, s, hyperparameters), (g,), outputs, new=True
    )


def sgd_update(
    param: Any,
    grad: Any,
    velocity: Any = None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> None:
    """Stochastic gradient descent, in place: ``param -= lr * step``.

    Parameters
    ----------
    param, grad : array_like, one shape
        `param` is updated; `grad` is read.
    velocity : array_like, the shape of `param`, optional
        Updated as well; zeros before the first step. Needed with `momentum`.
    lr : float
        Learning rate, at least 0.
    momentum : float, within [0, 1]
        ``velocity = momentum * velocity + grad``, and the step is the velocity (Sutskever et al., 2013).
    nesterov : bool
        The step is ``grad + momentum * velocity`` instead.
    weight_decay : float
        Added to the gradient as ``weight_decay * param``.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or a number does not fit, arrays overlap, or `velocity` is missing.
    """
    rule, hyperparameters = sgd_hyperparameters(velocity is not None, lr, momentum, nesterov, weight_decay)
    _update(rule, param, grad, {} if velocity is None else {"velocity": velocity}, hyperparameters)


def adam_update(
    param: Any,
    grad: Any,
    m: Any,
    v: Any,
    *,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Adam (Kingma and Ba, 2015), in place.

    Parameters
    ----------
    param, grad, m, v : array_like, one shape
        `param` and the moments `m` and `v` are updated; `grad` is read. The moments are zeros before the first step.
    step : int
        1 at the first update.
    lr, beta1, beta2, eps : float
        Learning rate, decay of the two moments (within [0, 1)), and what is added to the root.
    weight_decay : float
        Added to the gradient as ``weight_decay * param``.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or a number does not fit, or arrays overlap.
    """
    hyperparameters = adam_hyperparameters(step, lr, beta1, beta2, eps, weight_decay, False)
    _update("adam", param, grad, {"m": m, "v": v}, hyperparameters)


def adamw_update(
    param: Any,
    grad: Any,
    m: Any,
    v: Any,
    *,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """AdamW (Loshchilov and Hutter, 2019), in place: Adam whose weight decay shrinks the parameter itself.

    Parameters
    ----------
    param, grad, m, v, step, lr, beta1, beta2, eps
        As in `adam_update`.
    weight_decay : float
        The parameter is multiplied by ``1 - lr * weight_decay``.

    Raises
    ------
    TypeError, ValueError
        A dtype, a shape or a number does not fit, or arrays overlap.
    """
    hyperparameters = adam_hyperparameters(step, lr, beta1, beta2, eps, weight_decay, True)
    _update("adam", param, grad, {"m": m, "v": v}, hyperparameters)


for _entry in ACTIVATIONS.values():
    _publish_activation(_entry)
for _row_entry in ROW_FUNCTIONS.values():
    _publish_row_function(_row_entry)
for _loss_entry in LOSSES.values():
    _publish_loss(_loss_entry)
for _row_loss_entry in ROW_LOSSES.values():
    _publish_row_loss(_row_loss_entry)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]:
        """The kernels generated from the registry."""
