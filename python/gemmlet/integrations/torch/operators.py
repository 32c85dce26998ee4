"""The kernels as operators of PyTorch: ``torch.ops.gemmlet``, once this module is imported.

Each takes float32 or float64 tensors on the CPU, and has a fake and a gradient, so that `torch.compile`, `torch.export`
and autograd know it:

- ``linear(x, weight, bias=None, activation="identity", parameter=None)``, with weights (out, in) and any dimensions
  before the last one of `x`, and ``matmul(a, b)``;
- the activations, ``gelu(x)`` and ``leaky_relu(x, negative_slope=0.01)`` for example;
- ``softmax(x)`` and ``log_softmax(x)``, over the last dimension;
- the losses, ``huber(prediction, targets, delta=1.0)`` and ``softmax_cross_entropy(logits, labels,
  label_smoothing=0.0)`` for example, which return the mean and its gradient with respect to the first argument.

The gradients are operators as well, ``gelu_backward(grad_y, x, y)`` for example, without gradients of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ... import kernels
from ...formulas.activations import ACTIVATIONS, Activation
from ...formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES, Loss, RowLoss
from .extension import DTYPES

_NAMESPACE = "gemmlet"

_LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}


# Checks of what kernels and fakes are given: of all but the values of tensors, which fakes do not have.


def _check_dtypes(**tensors: torch.Tensor | None) -> None:
    (first, x), *others = tensors.items()
    assert x is not None
    if x.dtype not in DTYPES:
        raise TypeError(f"{first} must be torch.float32 or torch.float64, got {x.dtype}")
    for name, each in others:
        if each is not None and each.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {each.dtype}, {first} {x.dtype}; all must agree")


def _check_shapes(shape: Sequence[int], why: str, **tensors: torch.Tensor) -> None:
    for name, each in tensors.items():
        if each.shape != shape:
            raise ValueError(f"{name} has shape {tuple(each.shape)}, expected {tuple(shape)} ({why})")


def _check_number(value: Any, name: str, dtype: torch.dtype = torch.float64) -> None:
    """That it is above 0, and finite in `dtype`; a compiler may not know yet."""
    if not isinstance(value, torch.SymFloat) and not 0 < value <= _LARGEST[dtype]:
        raise ValueError(f"{name} must be above 0, and finite in {dtype}, got {value}")


def _array(x: torch.Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()


def _like(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _register(
    schema: str,
    check: Callable[..., None],
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None,
) -> None:
    """Register an operator.

    `check`, `compute` and `fake` take the arguments, `keep` a context, the arguments and the result, `backward` that
    context.
    """

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            check(*given)
            return function(*given)

        return run

    name, _, rest = schema.partition("(")
    operator = torch.library.custom_op(
        f"{_NAMESPACE}::{name}", checked(compute), mutates_args=(), device_types="cpu", schema=f"({rest}"
    )
    operator.register_fake(checked(fake))
    if backward is not None:
        operator.register_autograd(backward, setup_context=keep)


def _ops(name: str) -> Any:
    return getattr(getattr(torch.ops, _NAMESPACE), name)


# Matmuls.


def _check_matmul(a: torch.Tensor, b: torch.Tensor) -> None:
    _check_dtypes(a=a, b=b)
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]):
        raise ValueError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}; expected (rows, k) and (k, columns)")


def _matmul_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(kernels.matmul(a.detach().numpy(), b.detach().numpy()))


def _matmul_keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: torch.Tensor) -> Any:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    matmul = _ops("matmul")
    return matmul(grad, b.t()) if need_a else None, matmul(a.t(), grad) if need_b else None


def _linear_arguments(activation: str, parameter: float | None) -> dict[str, Any]:
    return {"activation": None if activation == "identity" else activation, "activation_parameter": parameter}


def _check_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    parameter: float | None = None,
) -> None:
    _check_dtypes(x=x, weight=weight, bias=bias)
    if not (x.ndim > 0 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]):
        shapes = f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; expected (..., features) and (out, features)")
    if bias is not None and not (bias.ndim == 1 and bias.shape[0] == weight.shape[0]):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; the choices are {', '.join(ACTIVATIONS)}")
    if parameter is not None:
        if ACTIVATIONS[activation].parameter is None:
            raise ValueError(f"parameter was given, but the activation {activation!r} takes none")
        _check_number(parameter, "parameter", x.dtype)


def _rows(x: torch.Tensor) -> Any:
    """All dimensions but the last as one."""
    x = x.detach()
    return (x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)).numpy()


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    parameter: float | None = None,
) -> torch.Tensor:
    y = kernels.linear(_rows(x), weight.detach().numpy().T, _array(bias), **_linear_arguments(activation, parameter))
    return torch.from_numpy(y).reshape(*x.shape[:-1], weight.shape[0])


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    x, weight, bias, ctx.activation, ctx.parameter = inputs
    ctx.save_for_backward(x, weight, bias, output)


def _linear_grad(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, bias, y = ctx.saved_tensors
    needed = [*ctx.needs_input_grad, False][:3]  # a bias that was left out is not there
    found = _ops("linear_backward")(grad, x, weight, bias, y, ctx.activation, ctx.parameter, needed)
    return (*(each if need else None for each, need in zip(found, needed, strict=True)), None, None)


def _check_linear_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
    parameter: float | None,
    needed: list[bool],
) -> None:
    _check_linear(x, weight, bias, activation, parameter)
    _check_dtypes(x=x, grad_y=grad_y, y=y)
    _check_shapes((*x.shape[:-1], weight.shape[0]), "the shape of the result", grad_y=grad_y, y=y)
    if len(needed) != 3:
        raise ValueError(f"needed has {len(needed)} elements, expected 3: of x, weight and bias")


def _linear_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
    parameter: float | None,
    needed: list[bool],
) -> tuple[torch.Tensor, ...]:
    rows, w, grad, outputs = _rows(x), weight.detach().numpy().T, _rows(grad_y), _rows(y)
    settings = _linear_arguments(activation, parameter)
    z = kernels.linear(rows, w, _array(bias)) if ACTIVATIONS[activation].needs_x else None
    settings |= dict(zip(("need_x", "need_w", "need_b"), needed, strict=True))
    grad_x, grad_w, grad_b = kernels.linear_backward(grad, rows, w, outputs, z=z, **settings)
    empty = x.new_empty(0)
    return (
        empty if grad_x is None else torch.from_numpy(grad_x).reshape(x.shape),
        empty.clone() if grad_w is None else torch.from_numpy(grad_w.T.copy()),
        empty.clone() if grad_b is None else torch.from_numpy(grad_b),
    )


def _linear_backward_fake(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, rest[-1], strict=True))


_register("matmul(Tensor a, Tensor b) -> Tensor", _check_matmul, _matmul, _matmul_fake, _matmul_backward, _matmul_keep)
_register(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, str activation="identity", float? parameter=None) -> Tensor',
    _check_linear,
    _linear,
    _linear_fake,
    _linear_grad,
    _linear_keep,
)
_register(
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor y, str activation, float? parameter, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)",
    _check_linear_backward,
    _linear_backward,
    _linear_backward_fake,
)


# Functions of one tensor.


def _register_function(name: str, entry: Activation | None) -> None:
    """An activation, or a function of rows, and its gradient."""
    # PyTorch leaves out an argument that is the default.
    named = None if entry is None else entry.parameter
    parameter = f", float {named}={entry.default}" if entry is not None and named else ""
    forward, gradient = getattr(kernels, name), getattr(kernels, f"{name}_backward")

    def arguments(number: tuple[float, ...]) -> dict[str, float]:
        return dict(zip((named,) if named else (), number, strict=False))

    def check(x: torch.Tensor, *number: float, name: str = "x") -> None:
        _check_dtypes(**{name: x})
        if entry is None and x.ndim == 0:
            raise ValueError(f"{name} is a scalar; expected at least one dimension")
        for each in number:
            _check_number(each, str(named), x.dtype)

    def check_gradient(grad_y: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *number: float) -> None:
        check(grad_y, *number, name="grad_y")
        _check_dtypes(grad_y=grad_y, x=x, y=y)
        _check_shapes(grad_y.shape, "the shape of grad_y", x=x, y=y)

    def compute(x: torch.Tensor, *number: float) -> torch.Tensor:
        return torch.from_numpy(forward(_array(x), **arguments(number))).reshape(x.shape)

    def compute_gradient(grad_y: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *number: float) -> torch.Tensor:
        found = gradient(_array(grad_y), _array(x), _array(y), **arguments(number))
        return torch.from_numpy(found).reshape(x.shape)

    def keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        x, *ctx.number = inputs
        ctx.save_for_backward(x, output)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        found = _ops(f"{name}_backward")(grad, x, y, *ctx.number)
        return (found, None) if named else found

    _register(f"{name}(Tensor x{parameter}) -> Tensor", check, compute, _like, backward, keep)
    schema = f"{name}_backward(Tensor grad_y, Tensor x, Tensor y{parameter}) -> Tensor"
    _register(schema, check_gradient, compute_gradient, _like)


# Losses.


def _check_loss(entry: Loss, prediction: torch.Tensor, targets: torch.Tensor, *number: float) -> None:
    _check_dtypes(**{entry.prediction: prediction}, targets=targets)
    _check_shapes(prediction.shape, f"the shape of {entry.prediction}", targets=targets)
    for each in number:
        _check_number(each, str(entry.parameter))


def _check_row_loss(entry: RowLoss, logits: torch.Tensor, labels: torch.Tensor, *number: float) -> None:
    _check_dtypes(logits=logits)
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (rows, classes)")
    if labels.ndim == 1:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels has dtype {labels.dtype}; class indices must be integers")
        _check_shapes(logits.shape[:1], "one index per row of logits", labels=labels)
    else:
        _check_dtypes(logits=logits, labels=labels)
        _check_shapes(logits.shape, "one probability per class", labels=labels)
    for each in number:
        if not isinstance(each, torch.SymFloat) and not 0 <= each <= 1:
            raise ValueError(f"label_smoothing must be within [0, 1], got {each}")


def _register_loss(entry: Loss | RowLoss) -> None:
    if isinstance(entry, Loss):
        check: Callable[..., None] = functools.partial(_check_loss, entry)
        first, second, parameter = entry.prediction, "targets", entry.parameter
    else:
        check = functools.partial(_check_row_loss, entry)
        first, second, parameter = "logits", "labels", "label_smoothing"
    name = entry.name
    number_argument = "" if parameter is None else f", float {parameter}={entry.default}"
    evaluate = getattr(kernels, name)

    def compute(prediction: torch.Tensor, targets: torch.Tensor, *number: float) -> Any:
        named = dict(zip(() if parameter is None else (parameter,), number, strict=False))
        loss, gradient = evaluate(_array(prediction), _array(targets), **named)
        return prediction.new_tensor(loss), torch.from_numpy(gradient)

    def fake(prediction: torch.Tensor, *_: Any) -> Any:
        return prediction.new_empty(()), prediction.new_empty(prediction.shape)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.count = len(inputs)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> Any:
        if ctx.needs_input_grad[1]:
            raise NotImplementedError(f"{_NAMESPACE}::{name} has no gradient with respect to its targets")
        (gradient,) = ctx.saved_tensors
        return (None if grad is None else grad * gradient, *(None,) * (ctx.count - 1))

    schema = f"{name}(Tensor {first}, Tensor {second}{number_argument}) -> (Tensor, Tensor)"
    _register(schema, check, compute, fake, backward, keep)


for _name, _entry in ACTIVATIONS.items():
    _register_function(_name, _entry)
for _name in ROW_FUNCTIONS:
    _register_function(_name, None)
for _loss in LOSSES.values():
    _register_loss(_loss)
for _row_loss in ROW_LOSSES.values():
    _register_loss(_row_loss)
