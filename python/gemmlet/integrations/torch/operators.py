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

from collections.abc import Callable
from typing import Any

import torch

from ... import kernels
from ...formulas.activations import ACTIVATIONS, Activation
from ...formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from .extension import DTYPES

_NAMESPACE = "gemmlet"


def _check_dtype(dtype: torch.dtype, **others: torch.Tensor | None) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"tensors must be torch.float32 or torch.float64, got {dtype}")
    for name, each in others.items():
        if each is not None and each.dtype != dtype:
            raise TypeError(f"{name} has dtype {each.dtype}, the first argument {dtype}; all must agree")


def _array(x: torch.Tensor | None) -> Any:
    if x is None:
        return None
    if x.is_floating_point():
        _check_dtype(x.dtype)
    return x.detach().contiguous().numpy()


def _like(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _register(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None,
) -> None:
    """Register an operator; `keep` takes a context, the inputs and the result, `backward` that context."""
    name, _, rest = schema.partition("(")
    operator = torch.library.custom_op(
        f"{_NAMESPACE}::{name}", compute, mutates_args=(), device_types="cpu", schema=f"({rest}"
    )
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=keep)


def _ops(name: str) -> Any:
    return getattr(getattr(torch.ops, _NAMESPACE), name)


# Matmuls.


def _check_matmul(a: torch.Tensor, b: torch.Tensor) -> None:
    _check_dtype(a.dtype, b=b)
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]):
        raise ValueError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}; expected (rows, k) and (k, columns)")


def _matmul_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    _check_matmul(a, b)
    return a.new_empty((a.shape[0], b.shape[1]))


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    _check_matmul(a, b)
    return torch.from_numpy(kernels.matmul(a.detach().numpy(), b.detach().numpy()))


def _matmul_keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: torch.Tensor) -> Any:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    matmul = _ops("matmul")
    return matmul(grad, b.t()) if need_a else None, matmul(a.t(), grad) if need_b else None


def _linear_arguments(activation: str, parameter: float | None) -> dict[str, Any]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; the choices are {', '.join(ACTIVATIONS)}")
    return {"activation": None if activation == "identity" else activation, "activation_parameter": parameter}


def _check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    _check_dtype(x.dtype, weight=weight, bias=bias)
    if not (x.ndim > 0 and weight.ndim == 2 and x.shape[-1] == weight.shape[1]):
        shapes = f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; expected (..., features) and (out, features)")
    if bias is not None and not (bias.ndim == 1 and bias.shape[0] == weight.shape[0]):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


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
    _check_linear(x, weight, bias)
    y = kernels.linear(_rows(x), weight.detach().numpy().T, _array(bias), **_linear_arguments(activation, parameter))
    return torch.from_numpy(y).reshape(*x.shape[:-1], weight.shape[0])


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *_: Any) -> torch.Tensor:
    _check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_keep(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    x, weight, bias, ctx.activation, ctx.parameter = inputs
    ctx.save_for_backward(x, weight, bias, output)


def _linear_grad(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, bias, y = ctx.saved_tensors
    needed = [*ctx.needs_input_grad, False][:3]  # a bias that was left out is not there
    found = _ops("linear_backward")(grad, x, weight, bias, y, ctx.activation, ctx.parameter, needed)
    return (*(each if need else None for each, need in zip(found, needed, strict=True)), None, None)


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
    arguments = _linear_arguments(activation, parameter)
    z = kernels.linear(rows, w, _array(bias)) if ACTIVATIONS[activation].needs_x else None
    arguments |= dict(zip(("need_x", "need_w", "need_b"), needed, strict=True))
    grad_x, grad_w, grad_b = kernels.linear_backward(grad, rows, w, outputs, z=z, **arguments)
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


_register("matmul(Tensor a, Tensor b) -> Tensor", _matmul, _matmul_fake, _matmul_backward, _matmul_keep)
_register(
    'linear(Tensor x, Tensor weight, Tensor? bias=None, str activation="identity", float? parameter=None) -> Tensor',
    _linear,
    _linear_fake,
    _linear_grad,
    _linear_keep,
)
_register(
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor y, str activation, float? parameter, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)",
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

    _register(f"{name}(Tensor x{parameter}) -> Tensor", compute, _like, backward, keep)
    schema = f"{name}_backward(Tensor grad_y, Tensor x, Tensor y{parameter}) -> Tensor"
    _register(schema, compute_gradient, _like)


# Losses.


def _register_loss(name: str, arguments: tuple[str, str], parameter: str | None, default: float) -> None:
    number_argument = "" if parameter is None else f", float {parameter}={default}"
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

    first, second = arguments
    schema = f"{name}(Tensor {first}, Tensor {second}{number_argument}) -> (Tensor, Tensor)"
    _register(schema, compute, fake, backward, keep)


for _name, _entry in ACTIVATIONS.items():
    _register_function(_name, _entry)
for _name in ROW_FUNCTIONS:
    _register_function(_name, None)
for _name, _loss in LOSSES.items():
    _register_loss(_name, (_loss.prediction, "targets"), _loss.parameter, _loss.default)
for _name, _row_loss in ROW_LOSSES.items():
    _register_loss(_name, ("logits", "labels"), "label_smoothing", _row_loss.default)
