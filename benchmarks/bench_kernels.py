"""Every elementwise kernel, loss, row function and update of the registry on every backend, beside plain NumPy.

    python -m pytest benchmarks --benchmark-columns=min,median --benchmark-group-by=group
    python -m pytest benchmarks -k "tanh and float32"

"numpy-plain" is the registry's expression evaluated in the arrays' own dtype: what people write. Each result is checked
against the reference before it is timed. Sizes: 16,384 and a million elements. The backends use the threads that
`gemmlet.get_num_threads` says; NumPy's expressions have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gemmlet
from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.formulas.activations import ACTIVATIONS

SIZES = (16_384, 1_000_000)
# (rows, inner, columns): the layers of the networks that gemmlet is made for, and a square.
PRODUCTS = ((64, 784, 128), (64, 128, 10), (1, 784, 128), (1024, 784, 128), (512, 512, 512))


def _sides() -> list[str]:
    sides = ["numpy-plain"]
    for name in select.CHOICES:
        try:
            select.load(name)
        except (ImportError, RuntimeError):
            continue
        sides.append(name)
    return sides


side = pytest.mark.parametrize("side", _sides())
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def _check(result: Any, exact: Any, tolerance: float) -> None:
    np.testing.assert_allclose(result, exact, rtol=tolerance, atol=tolerance)


def _time(
    benchmark: Any, side: str, plain: Callable[[], Any], ours: Callable[[], Any], exact: Any, limit: float
) -> None:
    if side == "numpy-plain":
        _check(plain(), exact, limit)
        benchmark(plain)
        return
    with gemmlet.use_backend(side):
        _check(ours(), exact, limit)
        benchmark(ours)


@side
@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def bench_activation(benchmark: Any, name: str, size: int, dtype: Any, side: str) -> None:
    entry = ACTIVATIONS[name]
    if name == "gelu" and side in ("numpy-plain", "numpy"):
        pytest.skip("NumPy has no erf: the reference calls math.erfc for each element")
    x = np.random.default_rng(0).normal(size=size).astype(dtype)
    out = np.empty_like(x)
    kernel = getattr(kernels, name)
    benchmark.group = f"{name} {np.dtype(dtype)} {size:,}"
    exact = entry.forward(x.astype(np.float64), entry.default)
    _time(
        benchmark,
        side,
        lambda: entry.forward(x, dtype(entry.default)),
        lambda: kernel(x, out=out),
        exact,
        100 * np.finfo(dtype).eps,
    )


@side
@dtypes
@pytest.mark.parametrize("shape", PRODUCTS, ids=lambda shape: "x".join(map(str, shape)))
def bench_linear_tanh(benchmark: Any, shape: tuple[int, int, int], dtype: Any, side: str) -> None:
    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inner)).astype(dtype)
    w = (rng.normal(size=(inner, columns)) / np.sqrt(inner)).astype(dtype)
    b = rng.normal(size=columns).astype(dtype)
    out = np.empty((rows, columns), dtype)
    benchmark.group = f"linear with tanh {np.dtype(dtype)} {rows}x{inner}x{columns}"
    exact = np.tanh(x.astype(np.float64) @ w.astype(np.float64) + b)
    _time(
        benchmark,
        side,
        lambda: np.tanh(x @ w + b),
        lambda: kernels.linear(x, w, b, "tanh", out=out),
        exact,
        inner * np.finfo(dtype).eps,
    )


@side
@dtypes
@pytest.mark.parametrize("shape", [(64, 10), (1024, 10)], ids=lambda shape: "x".join(map(str, shape)))
def bench_softmax_cross_entropy(benchmark: Any, shape: tuple[int, int], dtype: Any, side: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=shape).astype(dtype)
    labels = rng.integers(0, shape[1], size=shape[0])
    rows = np.arange(shape[0])
    benchmark.group = f"softmax_cross_entropy {np.dtype(dtype)} {shape[0]}x{shape[1]}"

    def plain(z: Any = logits) -> Any:
        e = np.exp(z - z.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
        loss = -np.log(p[rows, labels]).mean()
        p[rows, labels] -= 1
        return np.append(p / len(z), loss)

    def ours() -> Any:
        loss, gradient = kernels.softmax_cross_entropy(logits, labels)
        return np.append(gradient, loss)

    if side != "numpy-plain":
        with gemmlet.use_backend(side):
            _check(ours(), plain(logits.astype(np.float64)), 100 * np.finfo(dtype).eps)
            benchmark(kernels.softmax_cross_entropy, logits, labels)
    else:
        benchmark(plain)


@side
@dtypes
def bench_adam_update(benchmark: Any, dtype: Any, side: str) -> None:
    rng = np.random.default_rng(0)
    param, grad = rng.normal(size=(2, 1_000_000)).astype(dtype)
    m, v = np.zeros((2, param.size), dtype)
    benchmark.group = f"adam_update {np.dtype(dtype)} {param.size:,}"

    def plain() -> None:
        m[...] = dtype(0.9) * m + dtype(0.1) * grad
        v[...] = dtype(0.999) * v + dtype(0.001) * grad * grad
        param[...] -= dtype(1e-3) * (m / dtype(0.1)) / (np.sqrt(v / dtype(0.001)) + dtype(1e-8))

    def ours() -> None:
        kernels.adam_update(param, grad, m, v, step=1)

    before = param.astype(np.float64)
    if side == "numpy-plain":
        plain()
    else:
        with gemmlet.use_backend(side):
            ours()
    # From moments of zero the first step is lr against the sign of the gradient.
    _check(param, before - 1e-3 * np.sign(grad), 1e-5)
    if side == "numpy-plain":
        benchmark(plain)
    else:
        with gemmlet.use_backend(side):
            benchmark(ours)
