"""What `gpu_report.py` times on a GPU, family by family, in a process of its own for each.

    python benchmarks/gpu_cases.py FAMILY ROWS [--seconds-per-row X] [--seconds X] [--data-dir DIR]

ROWS is a file of JSON, one object a line, to which results are added as they come. Rows that it knows already are left
out, so that after an error which no process survives another one goes on with the rest.

Matmuls are launched as CUDA graphs of several calls, with other operands in each until they exceed the L2 cache, so
that neither Python nor a launch is what is timed; `cupy` and `jax` are not, as neither can. `cuBLAS` is called by
PyTorch, as CuPy records no call of it; in `linear` one kernel of CuPy adds the bias and applies the activation. Arrays
of 100 million elements are larger than any L2 cache. Launches for them queue up.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_timing import Case, Gpu, Implementation, LostError, run

from gemmlet import kernels
from gemmlet.bench.results import Results, Row
from gemmlet.bench.timing import duration
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES

LOST_STATUS = 3  # of a process that lost the GPU

ELEMENTS = 100_000_000
# Rows whose results are compared one by one, at the start and at the end.
_COMPARED = 1000

# Relative errors, in the norm of a whole result, and of single elements.
_MATMUL_ERROR = {"float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}
_ELEMENT_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


#
# Matmuls
#


@dataclass
class Operands:
    """Of one call: ``y = activation(x @ w + b)``."""

    x: Any
    w: Any
    b: Any
    y: Any


@dataclass
class Matmul:
    """What the implementations of a matmul compute: `calls` calls, over the sets of operands in turn."""

    sets: list[Operands]
    calls: int
    activation: str | None
    kind: str
    exact: Any = None  # of the first set, in float64

    @property
    def operands(self) -> Iterator[Operands]:
        """The operands of each call."""
        return itertools.islice(itertools.cycle(self.sets), self.calls)

    def result(self, gpu: Gpu, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that runs a call and returns the first result."""

        def run_once() -> Any:
            gpu.poison(self.sets[0].y)
            call()
            gpu.synchronize()
            return self.sets[0].y

        return run_once


def make_matmul(gpu: Gpu, m: int, k: int, n: int, kind: str, activation: str | None, calls: int) -> Matmul:
    """Make the operands: enough sets to exceed the L2 cache, but no more than there are calls."""
    dtype = "float32" if kind == "tf32" else kind
    size = 2 if dtype in ("float16", "bfloat16") else 4
    sets = max(1, min(calls, math.ceil(3 * gpu.l2_bytes / (size * (m * k + k * n + m * n)))))

    def operands(seed: int) -> Operands:
        x = gpu.normal((m, k), dtype, seed=4 * seed)
        w = gpu.normal((k, n), dtype, seed=4 * seed + 1, scale=k**-0.5)
        b = None if activation is None else gpu.normal((n,), dtype, seed=4 * seed + 2)
        return Operands(x, w, b, gpu.empty((m, n), dtype))

    return Matmul([operands(seed) for seed in range(sets)], calls, activation, kind)


def matmul_error(gpu: Gpu, p: Matmul, result: Any) -> float:
    """The error in the norm, over the tolerance; an element that was not written makes it NaN."""
    if p.exact is None:
        first = p.sets[0]
        p.exact = gpu.wide(first.x) @ gpu.wide(first.w)
        if first.b is not None:
            p.exact += gpu.wide(first.b)
        if p.activation is not None:
            p.exact = gpu.xp.tanh(p.exact) if p.activation == "tanh" else gpu.xp.maximum(p.exact, 0)
    difference = gpu.wide(result) - p.exact
    error = math.sqrt(float((difference * difference).sum()) / float((p.exact * p.exact).sum()))
    return error / _MATMUL_ERROR[p.kind]


def linear_ours(gpu: Gpu, p: Matmul) -> Implementation:
    """Return `kernels.linear`."""

    def calls() -> None:
        for o in p.operands:
            kernels.linear(o.x, o.w, o.b, p.activation, out=o.y)

    call = gpu.graph(calls)
    return Implementation(call, p.result(gpu, call), p.calls)


def linear_cublas(gpu: Gpu, p: Matmul) -> Implementation:
    """Return cuBLAS and one kernel."""
    finish = gpu.bias_activation(str(p.activation))
    operands = [(gpu.tensor(o.x), gpu.tensor(o.w), gpu.tensor(o.y), o) for o in p.sets]

    def calls() -> None:
        for x, w, y, o in itertools.islice(itertools.cycle(operands), p.calls):
            gpu.torch.mm(x, w, out=y)
            finish(o.y, o.b)

    call = gpu.torch_graph(calls)
    return Implementation(call, p.result(gpu, call), p.calls)


def linear_cupy(gpu: Gpu, p: Matmul) -> Implementation:
    """Return the same with CuPy's own call of cuBLAS, not in a graph."""
    finish = gpu.bias_activation(str(p.activation))

    def call() -> None:
        for o in p.operands:
            gpu.xp.dot(o.x, o.w, out=o.y)
            finish(o.y, o.b)

    return Implementation(call, p.result(gpu, call), p.calls)


def linear_torch(gpu: Gpu, p: Matmul) -> Implementation:
    """Return a layer of PyTorch's and its activation."""
    torch = gpu.torch
    activation = {"tanh": torch.tanh, "relu": torch.relu}[str(p.activation)]
    operands = [(gpu.tensor(o.x), gpu.tensor(o.w).t().contiguous(), gpu.tensor(o.b)) for o in p.sets]
    first: list[Any] = [None]

    def calls() -> None:
        for number, (x, w, b) in enumerate(itertools.islice(itertools.cycle(operands), p.calls)):
            y = activation(torch.nn.functional.linear(x, w, b))
            if not number:
                first[0] = y

    call = gpu.torch_graph(calls)

    def result() -> Any:
        call()
        gpu.synchronize()
        return gpu.array(first[0])

    return Implementation(call, result, p.calls)


def linear_jax(gpu: Gpu, p: Matmul) -> Implementation:
    """Return all calls as one program of JAX's."""
    jax = gpu.jax
    activation = {"tanh": jax.numpy.tanh, "relu": jax.nn.relu}[str(p.activation)]
    operands = [tuple(gpu.jax_array(a) for a in (o.x, o.w, o.b)) for o in p.operands]

    @jax.jit
    def program(operands: Any) -> Any:
        return [activation(x @ w + b) for x, w, b in operands]

    def call() -> Any:
        return program(operands)

    def result() -> Any:
        return gpu.upload(np.asarray(jax.block_until_ready(call())[0]))

    return Implementation(call, result, p.calls, "host", jax.block_until_ready)


LINEAR_IMPLEMENTATIONS: dict[str, Callable[[Gpu, Matmul], Implementation]] = {
    "gemmlet": linear_ours,
    "cuBLAS": linear_cublas,
    "cupy": linear_cupy,
    "pytorch": linear_torch,
    "jax": linear_jax,
}


def linear_case(m: int, k: int, n: int, activation: str, of: str, names: Sequence[str]) -> Case:
    """Return the case of a layer."""
    flops = 2.0 * m * k * n
    # Enough calls that a graph takes much longer than its launch.
    calls = 20 if flops < 2e9 else 4 if flops < 2e10 else 2
    return Case(
        "linear",
        f"{m}x{k}->{n} {activation}",
        lambda gpu: make_matmul(gpu, m, k, n, "float32", activation, calls),
        {name: LINEAR_IMPLEMENTATIONS[name] for name in names},
        matmul_error,
        flops,
        4.0 * (m * k + k * n + n + m * n),
        "float32",
        labels={"set": of, "activation": activation, "rows": m, "width": max(k, n)},
    )


def matmul_ours(gpu: Gpu, p: Matmul) -> Implementation:
    """Return `kernels.matmul`."""

    def calls() -> None:
        for o in p.operands:
            kernels.matmul(o.x, o.w, out=o.y)

    with gpu.tf32(p.kind == "tf32"):
        call = gpu.graph(calls)
    return Implementation(call, p.result(gpu, call), p.calls)


def matmul_cublas(gpu: Gpu, p: Matmul) -> Implementation:
    """Return `torch.mm`."""
    operands = [tuple(gpu.tensor(a) for a in (o.x, o.w, o.y)) for o in p.sets]

    def calls() -> None:
        for x, w, y in itertools.islice(itertools.cycle(operands), p.calls):
            gpu.torch.mm(x, w, out=y)

    with gpu.tf32(p.kind == "tf32"):
        call = gpu.torch_graph(calls)
    return Implementation(call, p.result(gpu, call), p.calls)


def matmul_case(side: int, kind: str) -> Case:
    """Return the case of a square matmul."""
    flops = 2.0 * side**3
    calls = 10 if flops < 1e11 else 3
    return Case(
        "matmul",
        f"{side}³ {kind}",
        lambda gpu: make_matmul(gpu, side, side, side, kind, None, calls),
        {"gemmlet": matmul_ours, "cuBLAS": matmul_cublas},
        matmul_error,
        flops,
        3.0 * side * side * (4 if kind == "tf32" else 2),
        kind,
        labels={"side": side, "dtype": kind},
    )


# Rows, inputs, outputs; squares are a set of their own.
LAYERS = [
    (rows, k, n)
    for k, n in ((784, 128), (784, 256), (256, 784), (1024, 1024), (4096, 4096))
    for rows in (64, 256, 1024, 4096)
    if not rows == k == n
]
_COMPILED = ("gemmlet", "cuBLAS", "pytorch")


def matmul() -> Iterator[Case]:
    """Layers in float32, and matmuls on tensor cores; first what there are targets for."""

    def jax(m: int, k: int, n: int) -> tuple[str, ...]:
        # Of few, as it compiles for seconds.
        chosen = ((1024, 1024, 1024), (4096, 4096, 4096), (64, 784, 128), (4096, 1024, 1024))
        return ("jax",) if (m, k, n) in chosen else ()

    for side in (1024, 2048, 4096):
        names = (*_COMPILED, "cupy", *jax(side, side, side))
        yield linear_case(side, side, side, "tanh", "squares", names)
    for kind in ("bfloat16", "float16", "tf32"):
        yield matmul_case(4096, kind)
    for m, k, n in LAYERS:
        yield linear_case(m, k, n, "tanh", "layers", (*_COMPILED, *jax(m, k, n)))
    for side in (1024, 2048, 8192):
        yield matmul_case(side, "bfloat16")
    for side in (1024, 2048, 4096):
        yield linear_case(side, side, side, "relu", "squares", _COMPILED)
    for m, k, n in LAYERS:
        yield linear_case(m, k, n, "relu", "layers", _COMPILED)
    for side, kind in itertools.product((1024, 2048, 8192), ("float16", "tf32")):
        yield matmul_case(side, kind)


#
# Overheads: the CPU's time for a call
#


@dataclass
class Small:
    """Small arrays: logits, or what is computed with, an output, class indices; and a layer."""

    x: Any
    y: Any
    labels: Any
    images: Any
    w: Any
    b: Any


# Calls of all implementations.
_Calls = dict[str, Callable[[], Any]]


def overhead_case(name: str, make: Callable[[Gpu, Small], _Calls], names: Sequence[str]) -> Case:
    """Return the case of a small call; `make` returns each implementation's, whose results are not checked here."""

    def implementation(name: str) -> Callable[[Gpu, Any], Implementation]:
        def prepare(gpu: Gpu, inputs: Small) -> Implementation:
            call = make(gpu, inputs)[name]
            wait = gpu.jax.block_until_ready if name == "jax" else None
            return Implementation(call, call, clock="host", wait=wait)

        return prepare

    def inputs(gpu: Gpu) -> Small:
        shapes = (64, 128), (64, 784), (784, 128), (128,)
        x, images, w, b = (gpu.normal(shape, seed=seed, scale=0.1) for seed, shape in enumerate(shapes))
        labels = gpu.upload(np.random.default_rng(0).integers(0, 128, 64))
        return Small(x, gpu.empty((64, 128)), labels, images, w, b)

    return Case(
        "overhead",
        name,
        inputs,
        {each: implementation(each) for each in names},
        lambda gpu, inputs, result: 0.0,
        labels={"call": name},
    )


def overheads() -> Iterator[Case]:
    """What a call costs before anything is computed."""

    def tanh(gpu: Gpu, given: Small) -> _Calls:
        x, y = given.x, given.y
        calls: _Calls = {"gemmlet": lambda: kernels.tanh(x, out=y)}
        calls["cupy"] = lambda: gpu.xp.tanh(x, out=y)
        if gpu.torch is not None:
            tensor = gpu.tensor(x)
            calls["pytorch"] = lambda: gpu.torch.tanh(tensor)
        if gpu.jax is not None:
            array, jitted = gpu.jax_array(x), gpu.jax.jit(gpu.jax.numpy.tanh)
            calls["jax"] = lambda: jitted(array)
        return calls

    def softmax(gpu: Gpu, given: Small) -> _Calls:
        x, y = given.x, given.y
        calls: _Calls = {"gemmlet": lambda: kernels.softmax(x, out=y)}

        def cupy() -> None:
            gpu.xp.exp(x - x.max(axis=1, keepdims=True), out=y)
            gpu.xp.divide(y, y.sum(axis=1, keepdims=True), out=y)

        calls["cupy"] = cupy
        if gpu.torch is not None:
            tensor = gpu.tensor(x)
            calls["pytorch"] = lambda: gpu.torch.softmax(tensor, 1)
        return calls

    def linear(gpu: Gpu, given: Small) -> _Calls:
        x, w, b, y = given.images, given.w, given.b, given.y
        calls: _Calls = {"gemmlet": lambda: kernels.linear(x, w, b, "tanh", out=y)}
        finish = gpu.bias_activation("tanh")

        def cupy() -> None:
            gpu.xp.dot(x, w, out=y)
            finish(y, b)

        calls["cupy"] = cupy
        if gpu.torch is not None:
            torch = gpu.torch
            x_, w_, b_ = gpu.tensor(x), gpu.tensor(w).t().contiguous(), gpu.tensor(b)
            calls["pytorch"] = lambda: torch.tanh(torch.nn.functional.linear(x_, w_, b_))
        if gpu.jax is not None:
            arrays = [gpu.jax_array(a) for a in (x, w, b)]
            jitted = gpu.jax.jit(lambda x, w, b: gpu.jax.numpy.tanh(x @ w + b))
            calls["jax"] = lambda: jitted(*arrays)
        return calls

    def cross_entropy(gpu: Gpu, given: Small) -> _Calls:
        x, labels, grad = given.x, given.labels, given.y
        calls: _Calls = {"gemmlet": lambda: kernels.softmax_cross_entropy(x, labels, out=grad)}
        if gpu.torch is not None:
            torch = gpu.torch
            z, t = gpu.tensor(x).clone().requires_grad_(), gpu.tensor(labels)

            def call() -> float:
                loss = torch.nn.functional.cross_entropy(z, t)
                torch.autograd.grad(loss, z)
                return float(loss.detach())

            calls["pytorch"] = call
        return calls

    yield overhead_case("tanh 64x128", tanh, ("gemmlet", "cupy", "pytorch", "jax"))
    yield overhead_case("softmax 64x128", softmax, ("gemmlet", "cupy", "pytorch"))
    yield overhead_case("linear 64x784->128 tanh", linear, ("gemmlet", "cupy", "pytorch", "jax"))
    yield overhead_case("softmax_cross_entropy 64x128, waited for", cross_entropy, ("gemmlet", "pytorch"))


#
# Elements
#


@dataclass
class Elements:
    """Inputs, and where results go."""

    inputs: tuple[Any, ...]
    out: Any
    dtype: str


def _ends(gpu: Gpu, array: Any) -> np.ndarray:
    """Some elements, or rows, in float64: the first and the last."""
    return np.concatenate([gpu.numpy(gpu.wide(array[:_COMPARED])), gpu.numpy(gpu.wide(array[-_COMPARED:]))])


def _elements_error(gpu: Gpu, result: Any, exact: np.ndarray, dtype: str, floor: float) -> float:
    """The largest error of what is compared; NaN if an element was not written."""
    if bool(gpu.xp.isnan(_for_ufuncs(gpu, result)).any()):
        return math.nan
    return float(np.max(np.abs(_ends(gpu, result) - exact) / (np.abs(exact) + floor))) / _ELEMENT_ERROR[dtype]


def _for_ufuncs(gpu: Gpu, array: Any) -> Any:
    """An array that is NaN where this one is, of a type that CuPy computes with."""
    if array.dtype.name != "bfloat16":
        return array
    bits = array.view(np.uint16)
    return gpu.xp.where((bits & np.uint16(0x7FFF)) > np.uint16(0x7F80), np.float32(np.nan), np.float32(0))


def _torch_elementwise(name: str) -> Callable[[Any], Callable[..., Any]]:
    """PyTorch's kernel itself, without autograd."""
    functional = ("relu", "gelu", "silu", "softmax", "log_softmax")

    def find(torch: Any) -> Callable[..., Any]:
        if name.endswith("_backward"):
            return getattr(torch.ops.aten, name)
        return getattr(torch.nn.functional if name in functional else torch, name)

    return find


def elementwise_case(name: str, dtype: str) -> Case:
    """Return the case of an activation, or of its gradient."""
    entry = ACTIVATIONS[name.removesuffix("_backward")]
    backward = name.endswith("_backward")
    size = 4 if dtype == "float32" else 2

    def inputs(gpu: Gpu) -> Elements:
        arrays = [gpu.normal((ELEMENTS,), dtype, seed=seed) for seed in range(1 + backward)]
        return Elements(tuple(arrays), gpu.empty((ELEMENTS,), dtype), dtype)

    def ours(gpu: Gpu, e: Elements) -> Implementation:
        kernel = getattr(kernels, name)

        def call() -> Any:
            if backward:
                grad, saved = e.inputs
                kernel(grad, saved if entry.needs_x else None, None if entry.needs_x else saved, out=e.out)
            else:
                kernel(*e.inputs, out=e.out)
            return e.out

        return Implementation(call, call)

    def torch(gpu: Gpu, e: Elements) -> Implementation:
        kernel, tensors = _torch_elementwise(name)(gpu.torch), [gpu.tensor(a) for a in e.inputs]
        return Implementation(lambda: kernel(*tensors), lambda: gpu.array(kernel(*tensors)))

    def error(gpu: Gpu, e: Elements, result: Any) -> float:
        parts = [_ends(gpu, a) for a in e.inputs]
        parameter = entry.default if entry.parameter else 0.0
        if backward:
            exact = entry.backward(parts[0], parts[1], parts[1], parameter)
        else:
            exact = entry.forward(parts[0], parameter)
        return _elements_error(gpu, result, np.asarray(exact), dtype, 0.1)

    return Case(
        "elementwise",
        f"{name} {dtype}",
        inputs,
        {"gemmlet": ours, "pytorch": torch},
        error,
        bytes=float(size * ELEMENTS * (2 + backward)),
        labels={"kernel": name, "dtype": dtype},
    )


def elementwise() -> Iterator[Case]:
    """Activations of 100 million elements."""
    for name in ("relu", "tanh", "gelu", "sigmoid", "silu", "tanh_backward", "gelu_backward"):
        yield elementwise_case(name, "float32")
    for name in ("relu", "tanh", "gelu"):
        yield elementwise_case(name, "bfloat16")


def row_case(name: str, columns: int, dtype: str) -> Case:
    """Return the case of a function of rows."""
    shape = ELEMENTS // columns, columns
    size = 4 if dtype == "float32" else 2

    def inputs(gpu: Gpu) -> Elements:
        return Elements((gpu.normal(shape, dtype, seed=1, scale=3.0),), gpu.empty(shape, dtype), dtype)

    def ours(gpu: Gpu, e: Elements) -> Implementation:
        kernel = getattr(kernels, name)

        def call() -> Any:
            kernel(*e.inputs, out=e.out)
            return e.out

        return Implementation(call, call)

    def torch(gpu: Gpu, e: Elements) -> Implementation:
        kernel, x = getattr(gpu.torch, name), gpu.tensor(e.inputs[0])
        return Implementation(lambda: kernel(x, dim=1), lambda: gpu.array(kernel(x, dim=1)))

    def error(gpu: Gpu, e: Elements, result: Any) -> float:
        exact = np.asarray(ROW_FUNCTIONS[name].forward(_ends(gpu, e.inputs[0])))
        return _elements_error(gpu, result, exact, dtype, 1.0 / columns)

    return Case(
        "losses",
        f"{name} {shape[0]}x{columns} {dtype}",
        inputs,
        {"gemmlet": ours, "pytorch": torch},
        error,
        bytes=float(2 * size * shape[0] * columns),
        labels={"kernel": name, "columns": columns, "dtype": dtype},
    )


#
# Losses
#


@dataclass
class Loss:
    """Predictions, targets, where the gradient goes, and the loss in float64."""

    z: Any
    t: Any
    grad: Any
    exact: float


def _chunks(z: Any) -> Iterator[slice]:
    step = max(1, 10_000_000 // math.prod(z.shape[1:]))
    return (slice(start, start + step) for start in range(0, len(z), step))


def _exact_loss(gpu: Gpu, name: str, z: Any, t: Any) -> float:
    xp, total = gpu.xp, 0.0
    for where in _chunks(z):
        a = gpu.wide(z[where])
        if name == "softmax_cross_entropy":
            a -= a.max(axis=1, keepdims=True)
            wanted = xp.take_along_axis(a, t[where][:, None], axis=1)[:, 0]
            total += float((xp.log(xp.exp(a).sum(axis=1)) - wanted).sum())
        elif name == "mean_squared_error":
            total += float(((a - gpu.wide(t[where])) ** 2).sum())
        else:
            total += float((xp.maximum(a, 0) - a * gpu.wide(t[where]) + xp.log1p(xp.exp(-abs(a)))).sum())
    return total / (len(z) if name == "softmax_cross_entropy" else z.size)


def _exact_gradient(gpu: Gpu, name: str, loss: Loss) -> np.ndarray:
    """Of the first and the last rows."""
    z = _ends(gpu, loss.z)
    if name == "softmax_cross_entropy":
        labels = np.concatenate([gpu.numpy(loss.t[:_COMPARED]), gpu.numpy(loss.t[-_COMPARED:])])
        exact: np.ndarray = np.asarray(ROW_FUNCTIONS["softmax"].forward(z))
        exact[np.arange(len(z)), labels] -= 1
        return exact / len(loss.z)
    return LOSSES[name].evaluate(z, _ends(gpu, loss.t), 0.0, 1.0 / loss.z.size)[1]


def loss_case(name: str, columns: int | None, dtype: str, waited: bool = False) -> Case:
    """Return the case of a loss and its gradient; `waited`: by the public function, which returns a Python float."""
    shape = (ELEMENTS,) if columns is None else (ELEMENTS // columns, columns)
    count, size = math.prod(shape), 4 if dtype == "float32" else 2

    def inputs(gpu: Gpu) -> Loss:
        z = gpu.normal(shape, dtype, seed=1, scale=3.0)
        if columns is None:
            t = gpu.normal(shape, dtype, seed=2)
        else:
            t = gpu.upload(np.random.default_rng(0).integers(0, columns, shape[0]))
        return Loss(z, t, gpu.empty(shape, dtype), _exact_loss(gpu, name, z, t))

    def public(x: Loss) -> tuple[float, Any]:
        if columns is None:
            return getattr(kernels, name)(x.z, x.t, out=x.grad)
        return kernels.softmax_cross_entropy(x.z, x.t, out=x.grad)

    def ours(gpu: Gpu, x: Loss) -> Implementation:
        if waited:
            return Implementation(lambda: public(x), lambda: public(x))
        backend = gpu.unwaited
        if columns is None:
            call = functools.partial(backend.elementwise_loss, LOSSES[name], x.z, x.t, 0.0, x.grad)
        else:
            call = functools.partial(backend.row_loss, ROW_LOSSES[name], x.z, x.t, 0.0, x.grad)

        def result() -> tuple[float, Any]:
            loss, _ = public(x)
            gpu.poison(x.grad)
            call()
            return loss, x.grad

        return Implementation(call, result)

    def torch(gpu: Gpu, x: Loss) -> Implementation:
        functional = gpu.torch.nn.functional
        function = {
            "softmax_cross_entropy": functional.cross_entropy,
            "mean_squared_error": functional.mse_loss,
            "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
        }[name]
        z, t = gpu.tensor(x.z).detach().requires_grad_(), gpu.tensor(x.t)

        def call() -> tuple[Any, Any]:
            loss = function(z, t)
            (grad,) = gpu.torch.autograd.grad(loss, z)
            return loss, grad

        def result() -> tuple[float, Any]:
            loss, grad = call()
            return float(loss.detach()), gpu.array(grad)

        return Implementation(call, result)

    def error(gpu: Gpu, x: Loss, result: tuple[float, Any]) -> float:
        loss, grad = result
        exact = _exact_gradient(gpu, name, x)
        floor = 0.1 / (shape[0] if columns else count)
        of_grad = _elements_error(gpu, grad, exact, dtype, floor)
        # PyTorch adds in float32, and returns the loss in the type of the logits.
        of_loss = abs(loss - x.exact) / abs(x.exact) / (1e-2 if dtype == "bfloat16" else 1e-4)
        return max(of_grad, of_loss) if not math.isnan(of_grad) else of_grad

    text = "x".join(map(str, shape)) if columns else f"{count}"
    labels_bytes = 8 * shape[0] if columns else size * count
    return Case(
        "losses",
        f"{name} {text} {dtype}" + (", waited for" if waited else ""),
        inputs,
        {"gemmlet": ours, "pytorch": torch},
        error,
        bytes=float(2 * size * count + labels_bytes),
        labels={"kernel": name, "columns": columns or 1, "dtype": dtype, "waited": waited},
    )


def losses() -> Iterator[Case]:
    """Losses with their gradients, and functions of rows, of 100 million elements."""
    yield loss_case("softmax_cross_entropy", 10, "float32")
    yield loss_case("softmax_cross_entropy", 1000, "float32")
    yield loss_case("binary_cross_entropy_with_logits", None, "float32")
    yield loss_case("mean_squared_error", None, "float32")
    for name, columns in itertools.product(("softmax", "log_softmax"), (10, 128, 1000, 10000)):
        yield row_case(name, columns, "float32")
    yield loss_case("softmax_cross_entropy", 1000, "bfloat16")
    yield row_case("softmax", 1000, "bfloat16")
    yield loss_case("softmax_cross_entropy", 1000, "float32", waited=True)


#
# Optimizers
#


@dataclass
class Update:
    """A parameter, its gradient, and its state."""

    param: Any
    grad: Any
    state: tuple[Any, ...]
    before: np.ndarray  # of the parameter, what is compared


def optimizer_case(rule: str) -> Case:
    """Return the case of an update of 100 million parameters."""
    lr, states = {"sgd": (0.1, 0), "momentum": (0.1, 1), "adam": (1e-3, 2)}[rule]

    def inputs(gpu: Gpu) -> Update:
        param, grad = (gpu.normal((ELEMENTS,), seed=seed) for seed in (1, 2))
        state = tuple(gpu.upload(np.zeros(ELEMENTS, np.float32)) for _ in range(states))
        return Update(param, grad, state, _ends(gpu, param))

    def ours(gpu: Gpu, u: Update) -> Implementation:
        steps = itertools.count(1)

        def call() -> Any:
            if rule == "adam":
                kernels.adam_update(u.param, u.grad, *u.state, step=next(steps), lr=lr)
            else:
                kernels.sgd_update(u.param, u.grad, *u.state, lr=lr, momentum=0.9 * states)
            return u.param

        return Implementation(call, call)

    def torch(gpu: Gpu, u: Update) -> Implementation:
        # A copy: both start from the same numbers, whichever comes first.
        param = gpu.tensor(gpu.normal((ELEMENTS,), seed=1)).detach().requires_grad_()
        param.grad = gpu.tensor(u.grad)
        optim = gpu.torch.optim
        if rule == "adam":
            optimizer = optim.Adam([param], lr=lr, fused=True)
        else:
            optimizer = optim.SGD([param], lr=lr, momentum=0.9 * states, fused=True)

        def result() -> Any:
            optimizer.step()
            return gpu.array(param)

        return Implementation(optimizer.step, result)

    def error(gpu: Gpu, u: Update, result: Any) -> float:
        grad = _ends(gpu, u.grad)
        # The first step: Adam's corrected moments are the gradient and its square.
        exact = u.before - lr * (grad / (np.abs(grad) + 1e-8) if rule == "adam" else grad)
        return _elements_error(gpu, result, exact, "float32", 0.1)

    return Case(
        "optimizers",
        f"{rule} {ELEMENTS} float32",
        inputs,
        {"gemmlet": ours, "pytorch": torch},
        error,
        bytes=float(4 * ELEMENTS * (3 + 2 * states)),
        labels={"kernel": rule, "dtype": "float32"},
    )


def optimizers() -> Iterator[Case]:
    """Updates of 100 million parameters."""
    for rule in ("adam", "sgd", "momentum"):
        yield optimizer_case(rule)


#
# The process
#


FAMILIES: dict[str, tuple[str, ...]] = {
    "calls": ("torch", "jax"),
    "matmul": ("torch", "jax"),
    "elementwise": ("torch",),
    "losses": ("torch",),
    "optimizers": ("torch",),
    "training": ("torch", "jax"),
    "fit": (),
}
_CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "calls": overheads,
    "matmul": matmul,
    "elementwise": elementwise,
    "losses": losses,
    "optimizers": optimizers,
}


def cases(family: str, data_dir: Path | None = None) -> list[Case]:
    """Return the cases of a family, those first that matter most."""
    if family in _CASES:
        return list(_CASES[family]())
    import gpu_training

    return list(gpu_training.FAMILIES[family](data_dir))


def summary(row: Row) -> str:
    """One line: times, the percentage of the roofline, and how many times as long the peers take."""
    parts = []
    for name, timed in row.timed.items():
        if timed.failed is not None:
            parts.append(f"{name} FAILED {timed.failed}")
            continue
        ratio = row.ratio(name) if name != "gemmlet" else None
        parts.append(f"{name} {duration(row.percentile(name, 50))}" + (f" ({ratio:.2f})" if ratio else ""))
    share = row.roofline_share()
    roofline = "" if share is None else f"  {share:.0%} of roofline"
    return f"{row.key}: {', '.join(parts)}{roofline}"


def rows_as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as results of `gemmlet bench` are kept."""
    kept: list[dict[str, Any]] = Results("seconds", rows, {}, {}, {}).as_json()["rows"]
    return kept


def measure(
    gpu: Gpu, chosen: Sequence[Case], write: Callable[[dict[str, Any]], None], per_row: float, end: float
) -> None:
    """Time the cases one by one, until `end`, and write what comes out."""
    for number, case in enumerate(chosen):
        if time.monotonic() > end:
            left = len(chosen) - number
            print(f"  the time is over: {left} rows are left out", flush=True)
            write({"note": f"{left} rows left out for lack of time: {case.key} and after"})
            return
        # Before, so that another process does not try it again.
        write({"tried": case.key})
        try:
            row = run(gpu, case, per_row)
        except LostError as error:
            write({"note": f"the GPU was lost in {error}"})
            raise
        except Exception as error:  # one case fails, and the others are still to be timed
            write({"note": f"{case.key} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            print(f"  {case.key} FAILED: {type(error).__name__}: {error}", flush=True)
            if not gpu.alive():
                raise LostError(case.key) from error
            continue
        write({"row": rows_as_json([row])[0]})
        print(f"  {summary(row)}", flush=True)
        gpu.free()


def known(path: Path) -> set[str]:
    """The rows that a file of results has, or that lost the GPU."""
    if not path.exists():
        return set()
    return {line["tried"] for line in map(json.loads, path.read_text().splitlines()) if "tried" in line}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seconds-per-row", type=float, default=0.3)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    done = known(options.rows)
    with options.rows.open("a") as file:

        def write(entry: dict[str, Any]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        gpu = Gpu(FAMILIES[options.family])
        for note in gpu.notes:
            write({"note": note})
            print(f"  {note}", flush=True)
        facts: dict[str, Any] = {"copy": gpu.copy_rate}
        if options.family == "matmul":
            facts["products"] = {kind: gpu.matmul_rate(kind) for kind in ("float32", "bfloat16", "float16", "tf32")}
        write({"roof": facts})
        print(f"  roofline: {facts}", flush=True)
        gpu.free()
        chosen = [case for case in cases(options.family, options.data_dir) if case.key not in done]
        try:
            measure(gpu, chosen, write, options.seconds_per_row, end)
        except LostError as error:
            print(f"  the GPU was lost: {error}", flush=True)
            return LOST_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
