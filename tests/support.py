"""What several test files share: how errors are measured, awkward shapes, and one call of every kernel."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemmlet import kernels
from gemmlet._arguments import as_array
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.nn import StopTraining

# Seconds for a process that takes few: the machine may be busy, and its disk slow.
PATIENCE = 600

# Scalars, empty arrays, single elements, primes, and more dimensions than two.
SHAPES = [(), (0,), (1,), (0, 3), (3, 0), (7,), (13, 17), (101,), (1, 1), (2, 3, 5), (257, 1), (1, 257)]
# Every length around the widths of SIMD registers and their unrolled loops.
LENGTHS = list(range(1, 71))


def ulp_error(result: Any, exact: Any, low: Any = 0.0, *, floor: float = 0.0) -> Any:
    """Errors in ULP of ``max(abs(exact), floor)``, element by element; infinite where only one of the two is NaN.

    `exact` is float64, and ``exact + low`` the true value where float64 is not enough. Infinity counts as the number
    after the largest finite one, so that a result may overflow early or late only by as many ULP as any other error.
    """
    result = np.asarray(result)
    limits = np.finfo(result.dtype)
    first_infinite = 2.0 ** (limits.maxexp - 1) * 2.0  # infinity in float64, which is told apart below
    got, exact = result.astype(np.float64), np.asarray(exact, dtype=np.float64)
    low = np.broadcast_to(np.asarray(low, dtype=np.float64), exact.shape)
    with np.errstate(all="ignore"):
        if result.dtype == np.float32:
            got = np.where(np.isinf(got), np.copysign(first_infinite, got), got)
            exact = np.clip(exact, -first_infinite, first_infinite)
            size = np.maximum(np.abs(exact), floor)
        else:
            size = np.maximum(np.abs(np.where(np.isinf(exact), limits.max, exact)), floor)
        _, exponent = np.frexp(size)
        exponent = np.where(size == 0, limits.minexp + 1, np.clip(exponent, limits.minexp + 1, limits.maxexp))
        unit = np.ldexp(1.0, exponent - 1 - limits.nmant)
        error = np.abs((got - exact) - low) / unit
        if result.dtype == np.float64:
            one_overflowed = np.isinf(got) ^ np.isinf(exact)
            largest = np.where(np.isinf(got), exact, got)
            shy = (limits.max - np.abs(largest)) / np.ldexp(1.0, limits.maxexp - 1 - limits.nmant) + 1.0
            error = np.where(one_overflowed, shy, error)
            error = np.where(np.isinf(got) & (got == exact), 0.0, error)
    error = np.where(np.isnan(got) & np.isnan(exact), 0.0, error)
    return np.where(np.isnan(error), np.inf, error)


def worst(error: Any, *where: Any) -> str:
    """For messages: the largest error, and the values of the arrays `where` at its place."""
    flat = np.ravel(error)
    if not flat.size:
        return "no elements"
    at = int(np.argmax(flat))
    return f"{flat[at]:.4g} at index {at}: " + ", ".join(repr(np.ravel(a)[at]) for a in where)


def assert_within(result: Any, exact: Any, bound: Any) -> None:
    """Assert ``abs(result - exact) <= bound`` everywhere, in float64; NaN matches NaN, and infinity itself."""
    result, exact = np.asarray(result, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    assert result.shape == exact.shape
    bound = np.broadcast_to(np.asarray(bound, dtype=np.float64), exact.shape)
    with np.errstate(all="ignore"):
        same = (result == exact) | (np.isnan(result) & np.isnan(exact))
        excess = np.where(same, 0.0, np.abs(result - exact) / np.where(bound > 0, bound, np.finfo(np.float64).tiny))
    excess = np.where(np.isnan(excess), np.inf, excess)
    assert np.all(excess <= 1.0), f"error over bound: {worst(excess, result, exact, bound)}"


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results are the same to the last bit (any NaN is the same as any other)."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(np.all((a == b) & (np.signbit(a) == np.signbit(b)) | (np.isnan(a) & np.isnan(b))))


def f64(array: Any) -> Any:
    return np.asarray(array).astype(np.float64)


def reference_backward(entry: Any, grad_y: Any, saved: Any, parameter: float | None = None) -> Any:
    """The registry's gradient in float64, from the array that the formula reads."""
    value = float(np.asarray(saved).dtype.type(entry.default if parameter is None else parameter))
    with np.errstate(all="ignore"):
        return np.asarray(entry.backward(f64(grad_y), f64(saved), f64(saved), value))


def reference_forward(entry: Any, x: Any, parameter: float | None = None) -> Any:
    """The registry's expression in float64."""
    value = float(np.asarray(x).dtype.type(entry.default if parameter is None else parameter))
    with np.errstate(all="ignore"):
        return np.asarray(entry.forward(f64(x), value))


def row_bounds(x: Any, eps: float) -> tuple[Any, Any]:
    """Relative error of softmax, and absolute error of log_softmax, to first order.

    The error of exp(x - max) is that of the difference; the sum adds one rounding per column at most.
    """
    shifted = np.abs(f64(x) - np.max(f64(x), axis=-1, keepdims=True))
    relative = (shifted + x.shape[-1] + 8) * eps
    return relative, (2 * shifted + x.shape[-1] + 8 + math.log(x.shape[-1] + 1)) * eps


def one_call_of_each(rng: np.random.Generator, dtype: Any, rows: int, columns: int) -> dict[str, Callable[[], tuple]]:
    """For each name in ``kernels.__all__`` a call on (rows, columns) arrays, which returns what it computed.

    The inputs are drawn once: calling twice computes the same thing twice. Updates work on copies.
    """

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(dtype)

    shape = (rows, columns)
    x, grad, inner = 3 * normal(*shape), normal(*shape), normal(columns, 33)
    unit = rng.uniform(size=shape).astype(dtype)
    labels = rng.integers(0, columns, size=rows)
    bias, grad_inner = normal(33), normal(rows, 33)
    calls: dict[str, Callable[[], tuple]] = {}

    def activation(name: str) -> None:
        forward, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
        calls[name] = lambda: (forward(x),)
        y = f64(x) if ACTIVATIONS[name].needs_x else reference_forward(ACTIVATIONS[name], x)
        y = y.astype(dtype)
        calls[f"{name}_backward"] = lambda: (backward(grad, x, y),)

    def row_function(name: str) -> None:
        forward, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
        calls[name] = lambda: (forward(x),)
        with np.errstate(all="ignore"):
            y = np.asarray(ROW_FUNCTIONS[name].forward(f64(x)) if x.size else f64(x)).astype(dtype)
        calls[f"{name}_backward"] = lambda: (backward(grad, x, y),)

    def loss(name: str) -> None:
        prediction = unit if LOSSES[name].unit_interval else x
        calls[name] = lambda: getattr(kernels, name)(prediction, unit[::-1].copy())

    def row_loss(name: str) -> None:
        calls[name] = lambda: getattr(kernels, name)(x, labels, label_smoothing=0.1)

    def update(name: str, states: int, **numbers: Any) -> None:
        def call() -> tuple:
            arrays = [x.copy(), *(unit.copy() for _ in range(states))]
            getattr(kernels, name)(arrays[0], grad, *arrays[1:], **numbers)
            return tuple(arrays)

        calls[name] = call

    for name in ACTIVATIONS:
        activation(name)
    for name in ROW_FUNCTIONS:
        row_function(name)
    for name in LOSSES:
        loss(name)
    for name in ROW_LOSSES:
        row_loss(name)
    update("sgd_update", 1, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    update("adam_update", 2, step=3, weight_decay=0.01)
    update("adamw_update", 2, step=3)
    calls["matmul"] = lambda: (kernels.matmul(x, inner),)
    calls["linear"] = lambda: kernels.linear(x, inner, bias, "gelu", return_preactivation=True)
    calls["linear_backward"] = lambda: kernels.linear_backward(grad_inner, x, inner, grad_inner, "tanh")
    missing = set(kernels.__all__) ^ set(calls)
    assert not missing, f"no call here for {sorted(missing)}"
    return calls


# Arguments of the optimizer updates that are written.
UPDATED = ("param", "velocity", "m", "v")


def arguments_of(name: str, rng: np.random.Generator, dtype: Any, rows: int, columns: int) -> dict[str, Any]:
    """Keyword arguments with which a kernel can be called, every array in its own memory.

    Elementwise arrays are (rows, columns). In matmuls w is (columns, 7): x (rows, columns), and the result (rows, 7).
    """
    shape = (rows, columns)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(dtype)

    def unit() -> Any:
        return rng.uniform(size=shape).astype(dtype)

    base = name.removesuffix("_backward")
    if base in ACTIVATIONS or base in ROW_FUNCTIONS:
        x = 3 * normal(*shape)
        if base == name:
            return {"x": x}
        y = x.copy()
        if base in ROW_FUNCTIONS and x.size:
            y = ROW_FUNCTIONS[base].forward(f64(x)).astype(dtype)
        elif base in ACTIVATIONS and not ACTIVATIONS[base].needs_x:
            y = reference_forward(ACTIVATIONS[base], x).astype(dtype)
        return {"grad_y": normal(*shape), "x": x, "y": y}
    if name in LOSSES:
        return {
            LOSSES[name].prediction: unit() if LOSSES[name].unit_interval else 3 * normal(*shape),
            "targets": unit(),
        }
    if name in ROW_LOSSES:
        labels = rng.integers(0, max(columns, 1), size=rows)
        return {"logits": 3 * normal(*shape), "labels": labels, "label_smoothing": 0.1}
    if name == "matmul":
        return {"a": normal(*shape), "b": normal(columns, 7)}
    if name == "linear":
        return {"x": normal(*shape), "w": normal(columns, 7), "b": normal(7), "activation": "gelu"}
    if name == "linear_backward":
        arrays = {
            "grad_y": normal(rows, 7),
            "x": normal(*shape),
            "w": normal(columns, 7),
            "y": np.tanh(normal(rows, 7)),
        }
        return {**arrays, "activation": "tanh"}
    if name == "sgd_update":
        arrays = {"param": normal(*shape), "grad": normal(*shape), "velocity": normal(*shape)}
        return {**arrays, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    if name in ("adam_update", "adamw_update"):
        return {"param": normal(*shape), "grad": normal(*shape), "m": normal(*shape), "v": unit(), "step": 3}
    raise NotImplementedError(f"{name} is new, and has no arguments here")


def outcome(name: str, arguments: dict[str, Any]) -> list[Any]:
    """What a call computes: the results that are not None, and the arrays that it updates, as NumPy arrays."""
    returned = getattr(kernels, name)(**arguments)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    results += [arguments.get(argument) for argument in UPDATED]
    return [r if isinstance(r, np.ndarray) else as_array(r, "result") for r in results if r is not None]


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, every array a contiguous copy."""
    return {k: v.copy(order="C") if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


# The fast path behind each kernel.
FAST_PATHS = {name: name for name in kernels.__all__} | {"matmul": "linear", "sgd_update": "momentum_update"}
FAST_PATHS["adamw_update"] = "adam_update"


class Watched:
    """Calls of a fast path: how many it answered, and how many it left to the general path."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.answered, self.left = function, 0, 0

    def __call__(self, *arguments: Any) -> Any:
        result = self.function(*arguments)
        if result is None:
            self.left += 1
        else:
            self.answered += 1
        return result


def complaint(call: Callable[[], Any]) -> Any:
    """What it returns, or the type and the words of its error."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def run_on(backend: Any, script: str, *, timeout: float = PATIENCE, **environment: str) -> str:
    """Run a script on this backend in a process of its own, which must end well and in time; return what it prints."""
    chosen = {"GEMMLET_BACKEND": backend.name, "GEMMLET_ISA": getattr(backend, "isa", "")}
    if backend.name == "cuda":  # or what stands in for a GPU
        script = f"import cuda_on_host.backend\ncuda_on_host.backend.load()\n{script}"
    # The package may be where this process was told to look.
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **chosen, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert child.returncode == 0, f"exit status {child.returncode}: {child.stderr[-3000:]}"
    return child.stdout


def stop_after(steps: int) -> Callable[[Any], None]:
    """A callback that ends a training after so many calls of it."""
    left = [steps]

    def callback(progress: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise StopTraining

    return callback


def frechet_by_eigenvalues(a: Any, b: Any) -> float:
    """The Fréchet distance, for covariances that are singular, where `scipy.linalg.sqrtm` warns."""
    import scipy.linalg

    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(axis=0) - b.mean(axis=0)
    # Those that are 0 may come out as complex or negative, by rounding errors.
    roots = np.sqrt(np.maximum(scipy.linalg.eigvals(cov_a @ cov_b).real, 0))
    return shift @ shift + np.trace(cov_a + cov_b) - 2 * roots.sum()
