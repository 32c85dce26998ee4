"""Every kernel against the reference in float64, on awkward shapes, strides and sizes.

Bounds: activations in float32 keep the registry's accuracy. In float64 the reference errs itself, so that a bound of
1e-13 only shows that no element is missed; `test_accuracy` measures what is left. Sums carry Higham's ``n * eps``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES, adam_hyperparameters
from support import (
    LENGTHS,
    SHAPES,
    assert_within,
    f64,
    reference_backward,
    reference_forward,
    row_bounds,
    same_bits,
    ulp_error,
    worst,
)

ACTIVATION_NAMES = list(ACTIVATIONS)


def check_activation(result: Any, exact: Any, accuracy: Any) -> None:
    assert result.shape == exact.shape
    if result.dtype == np.float32:
        error = ulp_error(result, exact, floor=accuracy.floor)
        assert np.all(error <= accuracy.float32), worst(error, result, exact)
    else:
        assert_within(result, exact, 1e-13 * np.maximum(np.abs(exact), accuracy.floor))


# Activations.


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_on_awkward_shapes(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    entry = ACTIVATIONS[name]
    forward, backward = getattr(kernels, name), getattr(kernels, f"{name}_backward")
    for shape in [*SHAPES, *((n,) for n in LENGTHS), (100_003,)]:
        x = np.asarray(rng.normal(scale=3, size=shape)).astype(dtype)
        grad = np.asarray(rng.normal(size=shape)).astype(dtype)
        y = forward(x)
        assert y.dtype == dtype
        check_activation(y, reference_forward(entry, x), entry.forward_accuracy)
        result = backward(grad, x, y)
        assert result.dtype == dtype
        exact = reference_backward(entry, grad, x if entry.needs_x else y)
        limit = entry.backward_accuracy
        # The product with grad_y is rounded once more.
        unit = getattr(limit, dtype.name) + 1.0 if limit.float32 > 0.5 else 1.0
        size = np.maximum(np.abs(exact), limit.floor * np.abs(f64(grad)))
        assert_within(result, exact, max(unit * np.finfo(dtype).eps, 1e-13) * size)


def test_activation_of_a_million(backend: Any, dtype: Any, rng: Any) -> None:
    x = rng.normal(scale=3, size=1_000_001).astype(dtype)
    check_activation(kernels.tanh(x), np.tanh(f64(x)), ACTIVATIONS["tanh"].forward_accuracy)


@pytest.mark.parametrize("name", [name for name, entry in ACTIVATIONS.items() if entry.parameter])
def test_activation_parameter(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    entry = ACTIVATIONS[name]
    x, grad = rng.normal(scale=3, size=(2, 333)).astype(dtype)
    for value in (0.2, 1.0, 1.7):
        y = getattr(kernels, name)(x, value)
        check_activation(y, reference_forward(entry, x, value), entry.forward_accuracy)
        exact = reference_backward(entry, grad, x if entry.needs_x else y, value)
        result = getattr(kernels, f"{name}_backward")(grad, x, y, **{entry.parameter: value})
        assert_within(result, exact, 4 * np.finfo(dtype).eps * np.abs(exact))
        fused = kernels.linear(x[:, np.newaxis], np.ones((1, 1), dtype), activation=name, activation_parameter=value)
        check_activation(fused[:, 0], reference_forward(entry, x, value), entry.forward_accuracy)


@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 17, 40])
def test_a_matmul_of_few_steps_wherever_it_lies(columns: int, backend: Any, dtype: Any, rng: Any) -> None:
    """The compiled matmul goes by where the result lies: the bits are the same, and nothing beside it changes."""
    for rows, steps in itertools.product([1, 5], [1, 2, 7, 10, 11]):
        x, w, b = (rng.normal(size=shape).astype(dtype) for shape in ((rows, steps), (steps, columns), columns))
        exact = f64(x) @ f64(w)
        for weights, bias in itertools.product([w, np.asfortranarray(w)], [None, b]):
            wanted = exact if bias is None else exact + f64(bias)
            bound = (steps + 1) * np.finfo(dtype).eps * (np.abs(f64(x)) @ np.abs(f64(w)) + np.abs(wanted))
            results = []
            for start in range(1, 18):
                memory = np.full(start + rows * columns + 16, -7, dtype)
                out = memory[start : start + rows * columns].reshape(rows, columns)
                kernels.linear(x, weights, bias, out=out)
                assert_within(out, wanted, bound)
                assert (memory[:start] == -7).all()
                assert (memory[start + out.size :] == -7).all()
                results.append(out)
            if backend.name == "cpu":  # the others have NumPy's matmul
                assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_gives_one_value_wherever_it_lies(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """The bits do not depend on position, length, strides or alignment of the array."""
    forward = getattr(kernels, name)
    x = rng.normal(scale=3, size=67).astype(dtype)
    y = forward(x)
    for start, stop in itertools.product(range(9), (10, 17, 40, 67)):
        assert same_bits(forward(x[start:stop]), y[start:stop])
    assert same_bits(forward(x[::-1]), y[::-1])
    assert same_bits(forward(np.repeat(x, 3)[::3]), y)
    grid = np.asfortranarray(x[:66].reshape(6, 11))
    assert same_bits(forward(grid), y[:66].reshape(6, 11))
    assert same_bits(forward(np.broadcast_to(x, (3, 67))), np.broadcast_to(y, (3, 67)))


# Row functions.


@pytest.mark.parametrize("name", list(ROW_FUNCTIONS))
def test_row_function(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    entry = ROW_FUNCTIONS[name]
    eps = np.finfo(dtype).eps
    shapes = [
        (1,),
        (5,),
        (0, 3),
        (3, 0),
        (1, 1),
        (1, 10),
        (10, 1),
        (2, 3, 5),
        (13, 17),
        (64, 10),
        (101, 257),
        (20_011, 10),
    ]
    for shape in [*shapes, *((3, n) for n in LENGTHS)]:
        x = rng.normal(scale=5, size=shape).astype(dtype)
        grad = rng.normal(size=shape).astype(dtype)
        y = getattr(kernels, name)(x)
        result = getattr(kernels, f"{name}_backward")(grad, x, y)
        assert y.shape == result.shape == shape
        assert y.dtype == result.dtype == dtype
        if not x.size:
            continue
        relative, absolute = row_bounds(x, eps)
        exact = entry.forward(f64(x))
        assert_within(y, exact, absolute if name == "log_softmax" else relative * np.abs(exact))
        size = np.sum(np.abs(f64(grad)) * (1.0 if name == "log_softmax" else np.abs(f64(y))), axis=-1, keepdims=True)
        factor = np.exp(f64(y)) if name == "log_softmax" else np.abs(f64(y))
        bound = (shape[-1] + 8) * eps * (factor * (np.abs(f64(grad)) + size) + np.abs(f64(grad)))
        assert_within(result, entry.backward(f64(grad), f64(y)), bound)


# Losses.


@pytest.mark.parametrize("name", list(LOSSES))
def test_elementwise_loss(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    entry = LOSSES[name]
    eps = np.finfo(dtype).eps
    for shape in [*SHAPES, *((n,) for n in LENGTHS), (100_003,)]:
        drawn = rng.uniform(size=shape) if entry.unit_interval else rng.normal(scale=4, size=shape)
        p = np.asarray(drawn).astype(dtype)
        t = np.asarray(rng.uniform(size=shape)).astype(dtype)
        loss, grad = getattr(kernels, name)(p, t)
        assert isinstance(loss, float)
        assert grad.shape == shape
        assert grad.dtype == dtype
        if not p.size:
            assert math.isnan(loss)
            continue
        value, exact = entry.evaluate(f64(p), f64(t), entry.default, 1.0 / p.size)
        bound = 16 * eps + p.size * np.finfo(np.float64).eps
        assert_within(loss, np.mean(value), np.mean(np.abs(value)) * bound)
        # With logits the gradient is a difference of two numbers up to 1.
        size = np.maximum(np.abs(exact), 1.0 / p.size if name == "binary_cross_entropy_with_logits" else 0.0)
        assert_within(grad, exact, 6 * eps * size)


def test_huber_delta(backend: Any, dtype: Any, rng: Any) -> None:
    p, t = rng.normal(scale=4, size=(2, 501)).astype(dtype)
    for delta in (0.3, 1.0, 2.5):
        loss, grad = kernels.huber(p, t, delta)
        value, exact = LOSSES["huber"].evaluate(f64(p), f64(t), delta, 1.0 / p.size)
        assert_within(loss, np.mean(value), 16 * np.finfo(dtype).eps * np.mean(value))
        assert_within(grad, exact, 4 * np.finfo(dtype).eps * np.abs(exact))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint8", "uint64", "soft", "one-hot", "unnormalised"])
@pytest.mark.parametrize("name", list(ROW_LOSSES))
def test_row_loss(name: str, kind: str, smoothing: float, backend: Any, dtype: Any, rng: Any) -> None:
    eps = np.finfo(dtype).eps
    shapes = [
        (1, 1),
        (1, 10),
        (7, 1),
        (13, 17),
        (64, 10),
        (101, 120),
        *((5, n) for n in (2, 3, 4, 7, 8, 9, 16, 31, 33)),
    ]
    for rows, classes in [*shapes, (20_011, 10)] if kind == "int64" else shapes:
        logits = rng.normal(scale=5, size=(rows, classes)).astype(dtype)
        indices = rng.integers(0, classes, size=rows)
        targets = np.eye(classes)[indices]
        if kind == "soft":
            targets = rng.dirichlet(np.ones(classes), size=rows)
        elif kind == "unnormalised":
            targets = rng.uniform(size=(rows, classes))
        labels = indices.astype(kind) if "int" in kind else targets.astype(dtype)
        targets = targets if "int" in kind else f64(labels)
        targets = (1 - smoothing) * targets + smoothing / classes
        loss, grad = getattr(kernels, name)(logits, labels, label_smoothing=smoothing)
        value, slope = ROW_LOSSES[name].evaluate(f64(logits), targets)
        relative, absolute = row_bounds(logits, eps)
        log_p = -ROW_FUNCTIONS["log_softmax"].forward(f64(logits))
        terms = np.sum(targets * (absolute + 4 * eps * log_p), axis=-1)
        assert_within(loss, np.mean(value), np.mean(terms) + rows * np.finfo(np.float64).eps * abs(np.mean(value)))
        total = np.sum(targets, axis=-1, keepdims=True)
        bound = ((relative + (classes + 8) * eps) * np.exp(-log_p) * total + 4 * eps * targets) / rows
        assert grad.dtype == dtype
        assert_within(grad, slope / rows, bound)


@pytest.mark.parametrize("name", list(ROW_LOSSES))
def test_row_loss_of_no_rows(name: str, backend: Any, dtype: Any) -> None:
    loss, grad = getattr(kernels, name)(np.zeros((0, 3), dtype), np.zeros(0, np.int64))
    assert math.isnan(loss)
    assert grad.shape == (0, 3)


# Optimizer updates.


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (13, 17), (70,), (100_003,)], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(shape: Any, momentum: float | None, nesterov: bool, backend: Any, dtype: Any, rng: Any) -> None:
    param, grad, velocity = (np.asarray(rng.normal(size=shape)).astype(dtype) for _ in range(3))
    p, g, v = f64(param), f64(grad), f64(velocity)
    eps = np.finfo(dtype).eps
    if momentum is None:
        kernels.sgd_update(param, grad, lr=0.1, weight_decay=0.03)
        (exact,) = OPTIMIZER_RULES["sgd"].apply(p, g, 0.1, 0.03)
        assert_within(param, exact, 4 * eps * (np.abs(p) + 0.1 * np.abs(g)))
        return
    kernels.sgd_update(param, grad, velocity, lr=0.1, weight_decay=0.03, momentum=momentum, nesterov=nesterov)
    exact, exact_v = OPTIMIZER_RULES["momentum"].apply(p, g, v, 0.1, 0.03, momentum, float(nesterov))
    size = momentum * np.abs(v) + np.abs(g) + 0.03 * np.abs(p)
    assert_within(velocity, exact_v, 4 * eps * size)
    assert_within(param, exact, 4 * eps * (np.abs(p) + 0.1 * (1 + momentum) * size))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (13, 17), (70,), (100_003,)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_adam(shape: Any, decoupled: bool, step: int, backend: Any, dtype: Any, rng: Any) -> None:
    param, grad, m = (np.asarray(rng.normal(size=shape)).astype(dtype) for _ in range(3))
    v = np.asarray(rng.uniform(size=shape)).astype(dtype)
    p0, g0, m0, v0 = f64(param), f64(grad), f64(m), f64(v)
    numbers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.03}
    (kernels.adamw_update if decoupled else kernels.adam_update)(param, grad, m, v, step=step, **numbers)
    exact, exact_m, exact_v = OPTIMIZER_RULES["adam"].apply(
        p0, g0, m0, v0, *adam_hyperparameters(step, **numbers, decoupled=decoupled)
    )
    eps = np.finfo(dtype).eps
    g_size = np.abs(g0) + 0.03 * np.abs(p0)
    m_size = 0.9 * np.abs(m0) + 0.1 * g_size
    assert_within(m, exact_m, 4 * eps * m_size)
    assert_within(v, exact_v, 8 * eps * (0.999 * v0 + 0.001 * g_size**2))
    step_size, correction = 0.01 / (1 - 0.9**step), 1 / math.sqrt(1 - 0.999**step)
    change = step_size * m_size / (np.sqrt(exact_v) * correction + 1e-8)
    assert_within(param, exact, 4 * eps * np.abs(p0) + 16 * eps * change)


def test_adam_from_zero_moves_by_the_learning_rate(backend: Any, dtype: Any) -> None:
    """The first step of Adam is the learning rate against the gradient's sign, whatever its size; 0 stays."""
    grad = np.array([1e-3, -5.0, 1e10, 0.0], dtype)
    param, m, v = np.zeros((3, 4), dtype)
    kernels.adam_update(param, grad, m, v, step=1, lr=0.25)
    assert_within(param, [-0.25, 0.25, -0.25, 0.0], [1e-5, 1e-5, 1e-5, 0.0])


# Matmuls. With small integers every product and sum is exact, in any order.

SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 64, 65, 130, 257]


def integers(rng: Any, shape: Any, dtype: Any) -> Any:
    return rng.integers(-8, 9, size=shape).astype(dtype)


def layouts(rng: Any, rows: int, columns: int, dtype: Any) -> dict[str, Any]:
    """(rows, columns) matrices of small integers in every layout that strides allow."""
    big = integers(rng, (2 * rows + 3, 3 * columns + 2), dtype)
    return {
        "C": integers(rng, (rows, columns), dtype),
        "F": np.asfortranarray(integers(rng, (rows, columns), dtype)),
        "transposed": integers(rng, (columns, rows), dtype).T,
        "slice": big[1 : 1 + rows, 1 : 1 + columns],
        "strided": big[:, 2:][: 2 * rows : 2, : 3 * columns : 3],
        "reversed": integers(rng, (rows, columns), dtype)[::-1, ::-1],
        "reversed transposed": integers(rng, (columns, rows), dtype)[::-1].T,
        "one row": np.broadcast_to(integers(rng, (1, columns), dtype), (rows, columns)),
        "one column": np.broadcast_to(integers(rng, (rows, 1), dtype), (rows, columns)),
    }


@pytest.mark.parametrize("m", SIZES)
def test_matmul_is_exact_on_integers(m: int, backend: Any, dtype: Any, rng: Any) -> None:
    for k, n in itertools.product(SIZES, SIZES):
        if m * n * k > 257 * 65 * 65 and (m, n, k) != (257, 257, 257):
            continue
        a, b = integers(rng, (m, k), dtype), integers(rng, (k, n), dtype)
        result = kernels.matmul(a, b)
        assert result.dtype == dtype
        assert np.array_equal(result, f64(a) @ f64(b)), (m, k, n)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (7, 5, 9), (33, 70, 18), (1, 99, 37), (99, 1, 3), (130, 64, 65), (29, 37, 133)]
)
def test_matmul_takes_any_strides(m: int, k: int, n: int, backend: Any, dtype: Any, rng: Any) -> None:
    for (how_a, a), (how_b, b) in itertools.product(
        layouts(rng, m, k, dtype).items(), layouts(rng, k, n, dtype).items()
    ):
        assert np.array_equal(kernels.matmul(a, b), f64(a) @ f64(b)), (how_a, how_b)
    a, b = integers(rng, (m, k), dtype), integers(rng, (k, n), dtype)
    exact = f64(a) @ f64(b)
    for out in (np.empty((n, m), dtype).T, np.empty((m, 2 * n), dtype)[:, ::2], np.empty((m, n), dtype)[::-1, ::-1]):
        out.fill(np.nan)
        assert kernels.matmul(a, b, out=out) is out
        assert np.array_equal(out, exact)


def test_matmul_of_large_integers(backend: Any, dtype: Any, rng: Any) -> None:
    """Large enough for every blocking and for threads, in shapes that no tile divides."""
    for m, k, n in [(1031, 67, 259), (67, 1031, 259), (64, 784, 128), (259, 67, 1031), (1, 4099, 517), (4099, 3, 1)]:
        a, b = integers(rng, (m, k), dtype), integers(rng, (k, n), dtype)
        assert np.array_equal(kernels.matmul(a, b), f64(a) @ f64(b)), (m, k, n)
        assert np.array_equal(kernels.matmul(np.asfortranarray(a), b.T.copy().T), f64(a) @ f64(b)), (m, k, n)


@given(m=st.integers(0, 90), k=st.integers(0, 90), n=st.integers(0, 90), seed=st.integers(0, 2**32 - 1))
def test_matmul_of_drawn_shapes(m: int, k: int, n: int, seed: int, backend: Any, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    a = rng.choice(list(layouts(rng, m, k, dtype)))
    left, right = layouts(rng, m, k, dtype)[a], layouts(rng, k, n, dtype)[rng.choice(list(layouts(rng, k, n, dtype)))]
    assert np.array_equal(kernels.matmul(left, right), f64(left) @ f64(right))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (17, 13, 11), (64, 784, 128), (100, 257, 33), (5, 3000, 7)])
def test_matmul_of_floats(m: int, k: int, n: int, backend: Any, dtype: Any, rng: Any) -> None:
    a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
    result = kernels.matmul(a, b)
    bound = k * np.finfo(dtype).eps * (np.abs(f64(a)) @ np.abs(f64(b)))
    if dtype == np.float32:
        assert_within(result, f64(a) @ f64(b), bound)
    else:
        for i, j in itertools.product(range(0, m, max(1, m // 5)), range(0, n, max(1, n // 5))):
            assert abs(result[i, j] - math.fsum(a[i] * b[:, j])) <= 2 * bound[i, j]


def test_matmul_of_no_products(backend: Any, dtype: Any) -> None:
    """An empty sum is 0, whatever lies in memory where its terms would be."""
    for m, n in ((1, 1), (1, 9), (5, 9), (40, 40)):
        x, w = np.ones((m, 4), dtype), np.ones((4, n), dtype)
        for a, b in ((x[:, :0], w[:0]), (x.T.copy().T[:, :0], w.T.copy().T[:0])):
            assert np.array_equal(kernels.matmul(a, b), np.zeros((m, n))), (m, n)
            assert np.array_equal(kernels.linear(a, b, np.full(n, 2, dtype)), np.full((m, n), 2.0)), (m, n)


def test_matmul_propagates_nan_and_infinity(backend: Any, dtype: Any) -> None:
    a, b = np.zeros((9, 17), dtype), np.ones((17, 20), dtype)
    a[3, 5], a[6, 16] = np.nan, np.inf
    result = kernels.matmul(a, b)
    assert np.all(np.isnan(result[3]))
    assert np.all(result[6] == np.inf)
    assert np.all(np.delete(result, [3, 6], axis=0) == 0)
    b[16, 2] = 0.0
    assert np.isnan(kernels.matmul(a, b)[6, 2])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *[((3,), (3,)), ((3,), (3, 4)), ((5, 3), (3,)), ((0,), (0,)), ((2, 5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4))],
        *[((5, 3), (2, 3, 4)), ((2, 1, 5, 3), (7, 3, 4)), ((3,), (2, 3, 4)), ((2, 5, 3), (3,)), ((0, 5, 3), (3, 4))],
    ],
    ids=str,
)
def test_matmul_of_vectors_and_stacks(a: Any, b: Any, backend: Any, dtype: Any, rng: Any) -> None:
    left, right = integers(rng, a, dtype), integers(rng, b, dtype)
    exact = np.matmul(f64(left), f64(right))
    result = kernels.matmul(left, right)
    assert np.shape(result) == np.shape(exact)
    assert np.array_equal(result, exact)


# Linear layers.


@pytest.mark.parametrize("name", [None, *ACTIVATION_NAMES])
def test_linear(name: str | None, backend: Any, dtype: Any, rng: Any) -> None:
    shapes = [((), 3, 4), ((1,), 1, 1), ((0,), 3, 4), ((5,), 0, 4), ((5,), 3, 0), ((7,), 5, 3), ((64,), 70, 10)]
    for lead, inputs, outputs in [*shapes, ((13,), 17, 31), ((2, 3), 5, 130), ((1,), 100, 257), ((300,), 257, 129)]:
        x = rng.normal(size=(*lead, inputs)).astype(dtype)
        w = rng.normal(scale=0.3, size=(inputs, outputs)).astype(dtype)
        for bias in (None, rng.normal(size=outputs).astype(dtype)):
            y, z = kernels.linear(x, w, bias, name, return_preactivation=True)
            assert y.shape == z.shape == (*lead, outputs)
            assert y.dtype == z.dtype == dtype
            added = 0.0 if bias is None else f64(bias)
            size = np.abs(f64(x)) @ np.abs(f64(w)) + np.abs(added)
            assert_within(z, f64(x) @ f64(w) + added, (inputs + 1) * np.finfo(dtype).eps * size)
            if name is None:
                assert same_bits(y, z)
            else:
                entry = ACTIVATIONS[name]
                check_activation(y, reference_forward(entry, z), entry.forward_accuracy)
            out = np.full_like(y, np.nan)
            assert kernels.linear(x, w, bias, name, out=out) is out
            assert same_bits(out, y)


def test_linear_takes_any_strides(backend: Any, dtype: Any, rng: Any) -> None:
    exact_bias = integers(rng, 66, dtype)
    for (how_x, x), (how_w, w) in itertools.product(
        layouts(rng, 21, 35, dtype).items(), layouts(rng, 35, 33, dtype).items()
    ):
        exact = np.maximum(f64(x) @ f64(w) + f64(exact_bias[::-2]), 0)
        out = np.empty((33, 21), dtype).T
        assert np.array_equal(kernels.linear(x, w, exact_bias[::-2], "relu", out=out), exact), (how_x, how_w)


@pytest.mark.parametrize("name", [None, *ACTIVATION_NAMES])
def test_linear_backward(name: str | None, backend: Any, dtype: Any, rng: Any) -> None:
    eps = np.finfo(dtype).eps
    sizes = [((), 3, 4), ((0,), 3, 4), ((5,), 0, 4), ((5,), 3, 0), ((2, 3), 5, 33), ((101,), 70, 37)]
    for lead, inputs, outputs in sizes:
        x = rng.normal(size=(*lead, inputs)).astype(dtype)
        w = rng.normal(scale=0.3, size=(inputs, outputs)).astype(dtype)
        grad = rng.normal(size=(*lead, outputs)).astype(dtype)
        y, z = kernels.linear(x, w, None, name, return_preactivation=True)
        grad_x, grad_w, grad_b = kernels.linear_backward(grad, x, w, y, name, z=z)
        exact, size = f64(grad), np.abs(f64(grad))
        if name is not None:
            entry = ACTIVATIONS[name]
            exact = reference_backward(entry, grad, z if entry.needs_x else y)
            size = np.abs(exact) + entry.backward_accuracy.floor * size
        rows, rows_x = exact.reshape(-1, outputs) if exact.size else np.zeros((math.prod(lead), outputs)), None
        size = size.reshape(rows.shape)
        rows_x = f64(x).reshape(rows.shape[0], inputs)
        assert (grad_x.shape, grad_w.shape, grad_b.shape) == (x.shape, w.shape, (outputs,))
        assert grad_x.dtype == grad_w.dtype == grad_b.dtype == dtype
        # Five roundings in the activation's gradient and the product, before the sum.
        assert_within(
            grad_x.reshape(-1, inputs) if x.size else np.zeros_like(rows_x),
            rows @ f64(w).T,
            (outputs + 5) * eps * (size @ np.abs(f64(w)).T),
        )
        assert_within(grad_w, rows_x.T @ rows, (len(rows) + 5) * eps * (np.abs(rows_x).T @ size))
        assert_within(grad_b, rows.sum(axis=0), (len(rows) + 5) * eps * size.sum(axis=0))
        for need in itertools.product((False, True), repeat=3):
            parts = kernels.linear_backward(
                grad,
                x if need[1] else None,
                w if need[0] else None,
                y,
                name,
                z=z,
                **dict(zip(("need_x", "need_w", "need_b"), need, strict=True)),
            )
            for wanted, part, whole in zip(need, parts, (grad_x, grad_w, grad_b), strict=True):
                assert (part is not None and same_bits(part, whole)) if wanted else part is None


def test_bias_gradient_of_many_rows(backend: Any, dtype: Any, rng: Any) -> None:
    """Column sums of integers are exact, in any layout."""
    for rows, columns in [(1, 1), (1, 300), (4099, 1), (1031, 67), (100_003, 10)]:
        for grad in (integers(rng, (rows, columns), dtype), integers(rng, (columns, rows), dtype).T):
            result = kernels.linear_backward(grad, None, None, need_x=False, need_w=False)[2]
            assert np.array_equal(result, f64(grad).sum(axis=0))


@pytest.mark.parametrize("left", [(3,), (1, 3), (4, 3), (2, 4, 3), (5, 1, 4, 3)], ids=str)
@pytest.mark.parametrize("right", [(3,), (3, 1), (3, 2), (2, 3, 2)], ids=str)
def test_matmul_of_all_dimensions_is_as_numpys(left: Any, right: Any, backend: Any, dtype: Any) -> None:
    """The result's shape, and its type: of two vectors a scalar."""
    a = np.arange(math.prod(left), dtype=dtype).reshape(left)
    b = np.arange(math.prod(right), dtype=dtype).reshape(right)
    result, expected = kernels.matmul(a, b), np.matmul(a, b)
    if not hasattr(result, "__cuda_array_interface__"):
        assert type(result) is type(expected)
    assert np.shape(result) == np.shape(expected)
    assert np.array_equal(result, expected)
