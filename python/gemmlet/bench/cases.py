"""Every case, declared once: `gemmlet bench` and ``pytest benchmarks`` both run over `cases`.

A group is a function that yields its cases. The elementwise ones follow from the registries, so that a new activation,
loss or function of rows is timed without an edit here; its peers are those that the tables below know.

What the peers do: NumPy what one would write with care (``out=``, in place, no needless temporaries), PyTorch and JAX
their own functions, JAX always jitted, numexpr one expression.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS, Activation
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, Loss, softmax_cross_entropy
from gemmlet.formulas.optimizers import OPTIMIZER_RULES, adam_hyperparameters

from . import augmentation, estimators, torch, training
from .case import Array, Call, Case, Factory, Prepared, Settings
from .implementations import OURS
from .programs import programs
from .thinc import thinc

FLOATS = ("float32", "float64")
# What single kernels may be off by; matmuls get what their K allows.
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _normal(rng: np.random.Generator, shape: int | tuple[int, ...], dtype: str) -> Array:
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def _gemmlet(factory: Factory) -> dict[str, Factory]:
    """gemmlet, on the backend in use and on Numba's."""
    return {OURS: factory, "gemmlet-numba": factory}


def _torch_result(call: Call) -> Prepared:
    def result() -> Any:
        out = call()
        return [tensor.detach().numpy() for tensor in (out if isinstance(out, tuple | list) else (out,))]

    return Prepared(call, result)


def _tensors(*arrays: Array) -> list[Any]:
    import torch

    return [torch.from_numpy(array) for array in arrays]


def _in_place(call: Call, param: Array) -> Prepared:
    """A call that changes `param`, which is its result."""

    def result() -> Array:
        call()
        return param

    return Prepared(call, result)


def _torch_loss(name: str, pair: tuple[Array, Array]) -> Prepared:
    """A loss of `torch.nn.functional` and its gradient."""
    import torch

    function = getattr(torch.nn.functional, name)
    prediction, targets = _tensors(*pair)
    prediction.requires_grad_()

    def call() -> tuple[Any, Any]:
        loss = function(prediction, targets)
        return loss, *torch.autograd.grad(loss, prediction)

    return _torch_result(call)


def _jitted(function: Callable[..., Any], *arrays: Any) -> Call:
    """A call of a jitted function that waits for its result; the arguments are JAX's already."""
    import jax

    compiled = jax.jit(function)
    on_device = jax.device_put(arrays)
    return lambda: jax.block_until_ready(compiled(*on_device))


# Matmuls.

# (in_features, out_features) of the layers of the MLP and the GAN that the library is made for.
LAYERS = ((784, 128), (128, 10), (100, 256), (256, 784), (784, 256), (256, 1))
BATCHES = (1, 8, 64, 256, 1024)


def _matmul(role: str, m: int, k: int, n: int, dtype: str, **labels: Any) -> Case:
    def inputs() -> tuple[Array, Array]:
        rng = _rng()
        # A transposed operand is the view that a backward pass has, not a copy of it.
        left = _normal(rng, (k, m), dtype).T if role == "x.T@g" else _normal(rng, (m, k), dtype)
        right = _normal(rng, (n, k), dtype).T if role == "g@w.T" else _normal(rng, (k, n), dtype)
        return left, right

    def by(matmul: Callable[..., Array]) -> Factory:
        return lambda pair: partial(matmul, *pair, out=np.empty((m, n), dtype))

    def pytorch(pair: tuple[Array, Array]) -> Prepared:
        import torch

        a, b = _tensors(*pair)
        return _torch_result(partial(torch.matmul, a, b, out=torch.empty((m, n), dtype=a.dtype)))

    def jax(pair: tuple[Array, Array]) -> Call:
        # What is transposed stays a view inside the jitted function, as it would in a program.
        flip = tuple(not array.flags.c_contiguous for array in pair)
        plain = [array.T if flipped else array for array, flipped in zip(pair, flip, strict=True)]
        return _jitted(lambda a, b: (a.T if flip[0] else a) @ (b.T if flip[1] else b), *plain)

    item = np.dtype(dtype).itemsize
    eps = float(np.finfo(dtype).eps)
    return Case(
        "matmul",
        f"{role} {m}x{k}x{n} {dtype}",
        inputs,
        {OURS: by(kernels.matmul), "numpy": by(np.matmul), "pytorch": pytorch, "jax": jax},
        lambda pair: pair[0].astype(np.float64) @ pair[1].astype(np.float64),
        # The error of a sum of k products is at most k * eps * sum |a| |b| (Higham, 3.5). Errors of either sign leave
        # about its root; no |a| |b| is much above 16.
        rtol=4 * eps,
        atol=8 * k * eps,
        flops=2.0 * m * k * n,
        bytes=float(item * (m * k + k * n + m * n)),
        labels={"kernel": "matmul", "role": role, "m": m, "k": k, "n": n, "dtype": dtype, **labels},
    )


def matmul(settings: Settings) -> Iterator[Case]:
    """Matmuls of the layers, forward and backward, and square ones."""
    layers = LAYERS[:3] if settings.quick else LAYERS
    batches = (1, 64) if settings.quick else BATCHES
    for dtype, (inner, outer), batch in itertools.product(FLOATS, layers, batches):
        yield _matmul("x@w", batch, inner, outer, dtype, set="layers")
        yield _matmul("x.T@g", inner, batch, outer, dtype, set="layers")
        yield _matmul("g@w.T", batch, outer, inner, dtype, set="layers")
    for size in (512, 1024) if settings.quick else (512, 1024, 2048, 4096):
        yield _matmul("x@w", size, size, size, "float32", set="squares")


# Linear layers.


def _linear(activation: str, batch: int, width: int) -> Case:
    entry = ACTIVATIONS[activation]
    plain = _numpy_activation(entry)

    def inputs() -> tuple[Array, Array, Array]:
        rng = _rng()
        x = _normal(rng, (batch, width), "float32")
        w = _normal(rng, (width, width), "float32") / np.float32(np.sqrt(width))
        return x, w, _normal(rng, width, "float32")

    def ours(arrays: Sequence[Array]) -> Call:
        x, w, b = arrays
        return partial(kernels.linear, x, w, b, activation, out=np.empty((batch, width), "float32"))

    def numpy(arrays: Sequence[Array]) -> Call:
        x, w, b = arrays
        y = np.empty((batch, width), "float32")

        def call() -> Array:
            np.matmul(x, w, out=y)
            np.add(y, b, out=y)
            return plain(y, y)

        return call

    def pytorch(arrays: Sequence[Array], compiled: bool = False) -> Prepared:
        import torch

        x, w, b = _tensors(*arrays)
        w = w.T.contiguous()  # PyTorch's layout of weights
        function = _torch_function(activation)

        def layer(x: Any) -> Any:
            return function(torch.nn.functional.linear(x, w, b))

        run = torch.compile(layer, dynamic=False) if compiled else layer

        def call() -> Any:
            with torch.inference_mode():
                return run(x)

        return _torch_result(call)

    def jax(arrays: Sequence[Array]) -> Call:
        function = _jax_function(activation)
        return _jitted(lambda x, w, b: function(x @ w + b), *arrays)

    peers: dict[str, Factory] = {"numpy": numpy, "pytorch": pytorch, "jax": jax}
    peers["pytorch compiled"] = partial(pytorch, compiled=True)
    return Case(
        "linear",
        f"{activation} {batch}x{width}x{width} float32",
        inputs,
        {**_gemmlet(ours), **peers},
        lambda arrays: entry.forward(
            arrays[0].astype(np.float64) @ arrays[1].astype(np.float64) + arrays[2], entry.default
        ),
        rtol=TOLERANCES["float32"],
        atol=width * float(np.finfo("float32").eps),
        flops=2.0 * batch * width * width,
        bytes=4.0 * (2 * batch * width + width * width + width),
        labels={"kernel": "linear", "activation": activation, "batch": batch, "width": width, "dtype": "float32"},
    )


def linear(settings: Settings) -> Iterator[Case]:
    """Matmul, bias and activation."""
    batches, widths = ((64,), (128, 512)) if settings.quick else ((64, 256, 1024), (128, 512, 1024))
    for activation, batch, width in itertools.product(("tanh", "gelu", "sigmoid"), batches, widths):
        yield _linear(activation, batch, width)


# Activations.

# How one writes it in NumPy with care, as f(x, out); where nothing is given, the registry's expression is evaluated in
# the array's own dtype.
_NUMPY_FORWARD: dict[str, Callable[[Array, Array], Any]] = {
    "identity": lambda x, out: np.copyto(out, x),
    "relu": lambda x, out: np.maximum(x, 0, out=out),
    "leaky_relu": lambda x, out: np.maximum(x, x.dtype.type(0.01) * x, out=out),
    "tanh": lambda x, out: np.tanh(x, out=out),
    "exp": lambda x, out: np.exp(x, out=out),
    "sigmoid": lambda x, out: _numpy_sigmoid(x, out),
    "silu": lambda x, out: np.multiply(x, _numpy_sigmoid(x, np.empty_like(x)), out=out),
    "softplus": lambda x, out: np.logaddexp(0, x, out=out),
    "gelu": lambda x, out: _numpy_gelu(x, out),
}
_NUMPY_BACKWARD: dict[str, Callable[[Array, Array, Array], Any]] = {
    "identity": lambda grad_y, saved, out: np.copyto(out, grad_y),
    "relu": lambda grad_y, saved, out: np.multiply(grad_y, saved > 0, out=out),
    "tanh": lambda grad_y, saved, out: np.multiply(grad_y, 1 - saved * saved, out=out),
    "sigmoid": lambda grad_y, saved, out: np.multiply(grad_y, saved * (1 - saved), out=out),
    "exp": lambda grad_y, saved, out: np.multiply(grad_y, saved, out=out),
}


def _numpy_sigmoid(x: Array, out: Array) -> Array:
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)


def _numpy_gelu(x: Array, out: Array) -> Array:
    """NumPy has no erf: this takes SciPy's, or without it the registry's, which calls `math.erfc` for each element."""
    try:
        from scipy.special import erf
    except ImportError:
        out[...] = ACTIVATIONS["gelu"].forward(x, 0.0)
        return out
    half = x.dtype.type(0.5)
    factor = erf(x * x.dtype.type(np.sqrt(0.5)))
    factor += 1
    factor *= half
    np.multiply(x, factor, out=out)
    return out


def _evaluate(entry: Activation, backward: bool, arrays: Sequence[Array]) -> Any:
    """The registry's expression of `x`, or of the gradient and what is saved for the backward pass."""
    parameter = arrays[0].dtype.type(entry.default)
    if not backward:
        return entry.forward(arrays[0], parameter)
    grad_y, saved = arrays
    return entry.backward(grad_y, saved, saved, parameter)


def _numpy_activation(entry: Activation, backward: bool = False) -> Callable[..., Array]:
    """An activation or its gradient in NumPy: a function of the operands and `out`, which it returns."""
    table: Mapping[str, Callable[..., Any]] = _NUMPY_BACKWARD if backward else _NUMPY_FORWARD
    write = table.get(entry.name)

    def plain(*arrays: Array) -> Array:
        if write is None:
            arrays[-1][...] = _evaluate(entry, backward, arrays[:-1])
        else:
            write(*arrays)
        return arrays[-1]

    return plain


def _torch_function(name: str) -> Any:
    """PyTorch's function for an activation; None where it has none."""
    import torch

    special = {"identity": torch.clone, "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh")}
    return special.get(name) or getattr(torch, name, None) or getattr(torch.nn.functional, name, None)


def _jax_function(name: str) -> Any:
    import jax

    special = {
        "identity": lambda x: x + 0,  # else no copy is made
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    }
    return special.get(name) or getattr(jax.nn, name, None) or getattr(jax.numpy, name, None)


# The kernels that PyTorch's autograd calls, without autograd around them.
_TORCH_BACKWARD: dict[str, Callable[[Any, Any, Any], Any]] = {
    "relu": lambda aten, grad_y, saved: aten.threshold_backward(grad_y, saved, 0),
    "leaky_relu": lambda aten, grad_y, saved: aten.leaky_relu_backward(grad_y, saved, 0.01, True),
    "elu": lambda aten, grad_y, saved: aten.elu_backward(grad_y, 1.0, 1, 1, True, saved),
    "gelu": lambda aten, grad_y, saved: aten.gelu_backward(grad_y, saved),
    "gelu_tanh": lambda aten, grad_y, saved: aten.gelu_backward(grad_y, saved, approximate="tanh"),
    "silu": lambda aten, grad_y, saved: aten.silu_backward(grad_y, saved),
    "tanh": lambda aten, grad_y, saved: aten.tanh_backward(grad_y, saved),
    "sigmoid": lambda aten, grad_y, saved: aten.sigmoid_backward(grad_y, saved),
    "exp": lambda aten, grad_y, saved: grad_y * saved,
}
_NUMEXPR = {
    "identity": "x",
    "relu": "where(x > 0, x, 0)",
    "elu": "where(x > 0, x, expm1(x))",
    "silu": "x / (1 + exp(-x))",
    "softplus": "log1p(exp(x))",
    "tanh": "tanh(x)",
    "sigmoid": "1 / (1 + exp(-x))",
    "exp": "exp(x)",
}
# Names that a peer has; a test compares them with what is installed.
TORCH_ACTIVATIONS = {*_TORCH_BACKWARD, "identity", "softplus"}
JAX_ACTIVATIONS = {*TORCH_ACTIVATIONS}


def _activation(entry: Activation, backward: bool, size: int, dtype: str) -> Case:
    name = entry.name
    kernel = f"{name}_backward" if backward else name
    plain = _numpy_activation(entry, backward)

    def inputs() -> tuple[Array, ...]:
        rng = _rng()
        x = np.asarray(2 * _normal(rng, size, dtype))
        if not backward:
            return (x,)
        saved = x if entry.needs_x else entry.forward(x.astype(np.float64), entry.default).astype(dtype)
        return _normal(rng, size, dtype), saved

    def ours(arrays: tuple[Array, ...]) -> Call:
        # The gradient takes x and y, and reads the one of them that it needs.
        return partial(getattr(kernels, kernel), *arrays, *arrays[1:], out=np.empty_like(arrays[0]))

    def pytorch(arrays: tuple[Array, ...]) -> Prepared:
        import torch

        function = partial(_TORCH_BACKWARD[name], torch.ops.aten) if backward else _torch_function(name)
        return _torch_result(partial(function, *_tensors(*arrays)))

    def numexpr(arrays: tuple[Array, ...]) -> Call:
        import numexpr

        (x,) = arrays
        expression, out = _NUMEXPR[name], np.empty_like(x)
        return lambda: numexpr.evaluate(expression, {"x": x}, out=out, casting="same_kind")

    implementations = _gemmlet(ours)
    implementations["numpy"] = lambda arrays: partial(plain, *arrays, np.empty_like(arrays[0]))
    if name in (_TORCH_BACKWARD if backward else TORCH_ACTIVATIONS):
        implementations["pytorch"] = pytorch
    if name in JAX_ACTIVATIONS and not backward:
        implementations["jax"] = lambda arrays: _jitted(_jax_function(name), *arrays)
    if name in _NUMEXPR and not backward:
        implementations["numexpr"] = numexpr
    return Case(
        "activations",
        f"{kernel} {size:,} {dtype}",
        inputs,
        implementations,
        lambda arrays: _evaluate(entry, backward, [a.astype(np.float64) for a in arrays]),
        rtol=TOLERANCES[dtype],
        atol=TOLERANCES[dtype],
        bytes=(3.0 if backward else 2.0) * size * np.dtype(dtype).itemsize,
        labels={"kernel": kernel, "size": size, "dtype": dtype, "elementwise": True},
    )


def activations(settings: Settings) -> Iterator[Case]:
    """Every activation of the registry and its gradient."""
    sizes = (16_384,) if settings.quick else (16_384, 1_000_000)
    for entry, size, dtype, backward in itertools.product(ACTIVATIONS.values(), sizes, FLOATS, (False, True)):
        yield _activation(entry, backward, size, dtype)


# Losses and functions of rows.


def _softmax_cross_entropy(rows: int, classes: int, dtype: str) -> Case:
    def inputs() -> tuple[Array, Array]:
        rng = _rng()
        return _normal(rng, (rows, classes), dtype), rng.integers(0, classes, rows)

    def exact(pair: tuple[Array, Array]) -> tuple[Any, Array]:
        targets = np.zeros((rows, classes))
        targets[np.arange(rows), pair[1]] = 1.0
        loss, grad = softmax_cross_entropy(pair[0].astype(np.float64), targets)
        return np.mean(loss), grad / rows

    def ours(pair: tuple[Array, Array]) -> Call:
        return partial(kernels.softmax_cross_entropy, *pair, out=np.empty_like(pair[0]))

    def numpy(pair: tuple[Array, Array]) -> Call:
        z, labels = pair
        every = np.arange(rows)
        p = np.empty_like(z)

        def call() -> tuple[Any, Array]:
            np.subtract(z, z.max(axis=1, keepdims=True), out=p)
            np.exp(p, out=p)
            np.divide(p, p.sum(axis=1, keepdims=True), out=p)
            loss = -np.log(p[every, labels]).mean()
            p[every, labels] -= 1
            np.divide(p, rows, out=p)
            return loss, p

        return call

    def jax(pair: tuple[Array, Array]) -> Call:
        import jax

        def loss(z: Any, labels: Any) -> Any:
            return -jax.nn.log_softmax(z)[jax.numpy.arange(rows), labels].mean()

        return _jitted(jax.value_and_grad(loss), *pair)

    return Case(
        "losses",
        f"softmax_cross_entropy {rows}x{classes} {dtype}",
        inputs,
        {**_gemmlet(ours), "numpy": numpy, "pytorch": partial(_torch_loss, "cross_entropy"), "jax": jax},
        exact,
        rtol=10 * TOLERANCES[dtype],
        atol=TOLERANCES[dtype] / rows,
        bytes=2.0 * rows * classes * np.dtype(dtype).itemsize + 8.0 * rows,
        labels={"kernel": "softmax_cross_entropy", "rows": rows, "classes": classes, "dtype": dtype},
    )


_TORCH_LOSSES = {
    "binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "binary_cross_entropy": "binary_cross_entropy",
    "mean_squared_error": "mse_loss",
    "huber": "huber_loss",
}


def _loss(entry: Loss, size: int, dtype: str) -> Case:
    def inputs() -> tuple[Array, Array]:
        rng = _rng()
        prediction = rng.uniform(0.01, 0.99, size) if entry.unit_interval else 2 * rng.standard_normal(size)
        return prediction.astype(dtype), rng.uniform(size=size).astype(dtype)

    def exact(pair: tuple[Array, Array]) -> tuple[Any, Array]:
        prediction, targets = (a.astype(np.float64) for a in pair)
        loss, grad = entry.evaluate(prediction, targets, entry.default, 1.0 / size)
        return np.mean(loss), grad

    def ours(pair: tuple[Array, Array]) -> Call:
        return partial(getattr(kernels, entry.name), *pair, out=np.empty_like(pair[0]))

    def numpy(pair: tuple[Array, Array]) -> Call:
        scalar = pair[0].dtype.type

        def call() -> tuple[Any, Array]:
            loss, grad = entry.evaluate(*pair, scalar(entry.default), scalar(1.0 / size))
            return loss.mean(), grad

        return call

    implementations = {**_gemmlet(ours), "numpy": numpy}
    if entry.name in _TORCH_LOSSES:
        implementations["pytorch"] = partial(_torch_loss, _TORCH_LOSSES[entry.name])
    return Case(
        "losses",
        f"{entry.name} {size:,} {dtype}",
        inputs,
        implementations,
        exact,
        rtol=10 * TOLERANCES[dtype],
        atol=TOLERANCES[dtype] / size,
        bytes=3.0 * size * np.dtype(dtype).itemsize,
        labels={"kernel": entry.name, "size": size, "dtype": dtype, "elementwise": True},
    )


def _row_function(name: str, backward: bool, rows: int, columns: int, dtype: str) -> Case:
    entry = ROW_FUNCTIONS[name]
    kernel = f"{name}_backward" if backward else name

    def inputs() -> tuple[Array, ...]:
        rng = _rng()
        x = _normal(rng, (rows, columns), dtype)
        if not backward:
            return (x,)
        return _normal(rng, (rows, columns), dtype), entry.forward(x.astype(np.float64)).astype(dtype)

    def ours(arrays: tuple[Array, ...]) -> Call:
        given = (arrays[0], None, arrays[1]) if backward else arrays
        return partial(getattr(kernels, kernel), *given, out=np.empty_like(arrays[0]))

    def pytorch(arrays: tuple[Array, ...]) -> Prepared:
        import torch

        if not backward:
            return _torch_result(partial(getattr(torch, name), *_tensors(*arrays), dim=1))
        function = getattr(torch.ops.aten, f"_{name}_backward_data")
        grad_y, y = _tensors(*arrays)
        return _torch_result(lambda: function(grad_y, y, 1, y.dtype))

    function: Callable[..., Array] = entry.backward if backward else entry.forward
    implementations = {**_gemmlet(ours), "numpy": lambda arrays: partial(function, *arrays), "pytorch": pytorch}
    if not backward:
        implementations["jax"] = lambda arrays: _jitted(_jax_function(name), *arrays)
    return Case(
        "losses",
        f"{kernel} {rows}x{columns} {dtype}",
        inputs,
        implementations,
        lambda arrays: function(*(a.astype(np.float64) for a in arrays)),
        rtol=10 * TOLERANCES[dtype],
        atol=TOLERANCES[dtype] * (np.sqrt(columns) if backward else 1.0),
        bytes=(3.0 if backward else 2.0) * rows * columns * np.dtype(dtype).itemsize,
        labels={"kernel": kernel, "rows": rows, "columns": columns, "dtype": dtype, "elementwise": True},
    )


def losses(settings: Settings) -> Iterator[Case]:
    """Losses with their gradients, and functions of rows."""
    shapes = ((64, 10), (1024, 10)) if settings.quick else ((64, 10), (1024, 10), (1024, 1000), (4096, 1000))
    for dtype, (rows, classes) in itertools.product(FLOATS, shapes):
        yield _softmax_cross_entropy(rows, classes, dtype)
    for entry, dtype in itertools.product(LOSSES.values(), FLOATS):
        yield _loss(entry, 16_384 if settings.quick else 1_000_000, dtype)
    for name, backward, dtype in itertools.product(ROW_FUNCTIONS, (False, True), FLOATS):
        yield _row_function(name, backward, 1024, 10 if settings.quick else 1000, dtype)


# Optimizer updates.

# What each update is given, the rule of the registry behind it, the rule's hyperparameters, and PyTorch's class.
_LR = 1e-3
_ADAM = partial(adam_hyperparameters, 1, _LR, 0.9, 0.999, 1e-8)
_UPDATES: dict[str, tuple[str, str, dict[str, float], tuple[float, ...], str]] = {
    "sgd": ("sgd_update", "sgd", {}, (_LR, 0.0), "SGD"),
    "sgd with momentum": ("sgd_update", "momentum", {"momentum": 0.9}, (_LR, 0.0, 0.9, 0.0), "SGD"),
    "adam": ("adam_update", "adam", {}, _ADAM(0.0, False), "Adam"),
    "adamw": ("adamw_update", "adam", {"weight_decay": 0.01}, _ADAM(0.01, True), "AdamW"),
}


def _update(title: str, size: int, dtype: str) -> Case:
    kernel, rule_name, options, hyperparameters, torch_class = _UPDATES[title]
    rule = OPTIMIZER_RULES[rule_name]

    def inputs() -> tuple[Array, Array]:
        rng = _rng()
        return _normal(rng, size, dtype), _normal(rng, size, dtype)

    def exact(pair: tuple[Array, Array]) -> Array:
        param, grad = (a.astype(np.float64) for a in pair)
        return rule.apply(param, grad, *(np.zeros(size) for _ in rule.state), *hyperparameters)[0]

    # Every call is the first step once more, from where the last one ended: the work does not depend on the values.

    def ours(pair: tuple[Array, Array]) -> Prepared:
        param, grad = pair[0].copy(), pair[1]
        state = [np.zeros(size, dtype) for _ in rule.state]
        step = {} if rule_name in ("sgd", "momentum") else {"step": 1}
        return _in_place(partial(getattr(kernels, kernel), param, grad, *state, lr=_LR, **options, **step), param)

    def numpy(pair: tuple[Array, Array]) -> Prepared:
        param, grad = pair[0].copy(), pair[1]
        return _in_place(partial(training.numpy_rule(rule_name, param), grad, hyperparameters), param)

    def pytorch(pair: tuple[Array, Array], fused: bool = False) -> Prepared:
        import torch

        param = pair[0].copy()
        tensor, grad = _tensors(param, pair[1])  # the tensor is a view of `param`
        tensor.requires_grad_()
        tensor.grad = grad
        optimizer = getattr(torch.optim, torch_class)([tensor], lr=_LR, fused=fused, **options)
        return _in_place(optimizer.step, param)

    return Case(
        "optimizers",
        f"{title} {size:,} {dtype}",
        inputs,
        {**_gemmlet(ours), "numpy": numpy, "pytorch": pytorch, "pytorch fused": partial(pytorch, fused=True)},
        exact,
        rtol=TOLERANCES[dtype],
        atol=TOLERANCES[dtype],
        bytes=float(np.dtype(dtype).itemsize * size * (3 + 2 * len(rule.state))),
        labels={"kernel": kernel, "update": title, "size": size, "dtype": dtype, "elementwise": True},
    )


def optimizers(settings: Settings) -> Iterator[Case]:
    """Optimizer updates of one large parameter."""
    for title, dtype in itertools.product(_UPDATES, FLOATS):
        yield _update(title, 100_000 if settings.quick else 1_000_000, dtype)


# The cost of a call.


def _overhead(name: str, ours: Factory, numpy: Factory, *shapes: tuple[int, ...]) -> Case:
    def exact(given: list[Array]) -> Any:
        made = numpy(given)
        return made.result() if isinstance(made, Prepared) else made()

    return Case(
        "overhead",
        name,
        lambda: [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)],
        {OURS: ours, "numpy": numpy},
        exact,
        rtol=1e-5,
        atol=1e-5,
        labels={"kernel": name.split()[0]},
    )


def overhead(settings: Settings) -> Iterator[Case]:
    """The smallest calls, where nothing but the cost of a call counts; float64, and results allocated."""

    def given_to(function: Callable[..., Any], *more: Any) -> Factory:
        return lambda given: partial(function, *given, *more)

    def updated(step: Callable[[Array, Array], Any]) -> Factory:
        def factory(given: list[Array]) -> Prepared:
            param, grad = given[0].copy(), given[1]
            return _in_place(partial(step, param, grad), param)

        return factory

    def numpy_sgd(param: Array, grad: Array) -> None:
        param -= 0.1 * grad

    def numpy_linear(given: list[Array]) -> Call:
        return lambda: np.tanh(given[0] @ given[1] + given[2])

    for size in (1, 10):
        yield _overhead(f"tanh {size}", given_to(kernels.tanh), given_to(np.tanh), (size,))
    yield _overhead("matmul 4x4x4", given_to(kernels.matmul), given_to(np.matmul), (4, 4), (4, 4))
    yield _overhead("linear tanh 1x16x4", given_to(kernels.linear, "tanh"), numpy_linear, (1, 16), (16, 4), (4,))
    yield _overhead("sgd_update 10", updated(partial(kernels.sgd_update, lr=0.1)), updated(numpy_sgd), (10,), (10,))


# Importing.

# With its first kernel, which loads the backend.
_FIRST_KERNEL = "import gemmlet, gemmlet.kernels as k; k.tanh(numpy.ones(3))"


def _imported(before: str, code: str, _: Any) -> Prepared:
    timed = f"start = time.perf_counter(); {code}; print(json.dumps(time.perf_counter() - start))"
    command = [sys.executable, "-c", f"import json, time; {before}; {timed}"]
    # Python may keep what it compiles, as pip does for a package that it installs.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def call() -> float:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return float(json.loads(done.stdout))

    return Prepared(call, call, own_clock=True)


def imports(settings: Settings) -> Iterator[Case]:
    """Importing, each time in a new process: gemmlet where NumPy is there already, and each library by itself."""
    alone = {
        OURS: partial(_imported, "pass", f"import numpy; {_FIRST_KERNEL}"),
        "numpy": partial(_imported, "pass", "import numpy"),
        "pytorch": partial(_imported, "pass", "import torch"),
        "jax": partial(_imported, "pass", "import jax.numpy"),
        "scikit-learn": partial(_imported, "pass", "import sklearn.neural_network"),
        "numexpr": partial(_imported, "pass", "import numexpr"),
    }
    for name, implementations in (
        ("import gemmlet after numpy", {OURS: partial(_imported, "import numpy", _FIRST_KERNEL)}),
        ("import a library and what it needs", alone),
    ):
        yield Case(
            "import",
            name,
            lambda: None,
            implementations,
            lambda _: 0.0,
            rtol=0.0,
            atol=60.0,  # it has ended: there is no result to compare
            labels={"kernel": "import", "after_numpy": implementations is not alone},
        )


# The groups, in the order of the tables.

_NAMED = (
    training.epoch, training.wide, training.gan, matmul, linear, activations, losses, optimizers, thinc,
    overhead, programs, estimators.sklearn, augmentation.augment,
)  # fmt: skip
GROUPS: dict[str, Callable[[Settings], Iterator[Case]]] = {group.__name__: group for group in _NAMED}
GROUPS["import"] = imports  # a name that no function can have
GROUPS["torch"] = torch.cases
