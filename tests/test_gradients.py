"""PyTorch as a second opinion, in float64: values, gradients by its autograd, and its optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES

torch = pytest.importorskip("torch")
functional = torch.nn.functional

TOLERANCE = 1e-10

# PyTorch's activations whose name or default differs; else its function of the same name is the counterpart.
TORCH_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "identity": lambda x: x * 1.0,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus": lambda x: functional.softplus(x, threshold=1e6),  # above its threshold PyTorch's is the identity
}


def torch_activation(name: str) -> Callable[..., Any]:
    found = TORCH_ACTIVATIONS.get(name) or getattr(torch, name, None) or getattr(functional, name, None)
    assert found is not None, f"PyTorch has no {name}: say in TORCH_ACTIVATIONS what it is made of there"
    return found


TORCH_ROW_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": functional.softmax,
    "log_softmax": functional.log_softmax,
}
TORCH_ROW_LOSSES: dict[str, Callable[..., Any]] = {
    "softmax_cross_entropy": functional.cross_entropy  # of logits, labels, label_smoothing
}
# As for activations.
TORCH_LOSSES: dict[str, Callable[..., Any]] = {
    "mean_squared_error": functional.mse_loss,
    "huber": lambda p, t, delta=1.0: functional.huber_loss(p, t, delta=delta),
    "hinge": lambda p, t: functional.relu(1 - t * p).mean(),
    "wasserstein": lambda p, t: -(t * p).mean(),
}


def counterpart(of_torch: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    found = of_torch.get(name) or getattr(functional, name, None) or getattr(functional, f"{name}_loss", None)
    assert found is not None, f"PyTorch has no {name}: say above what it is made of there"
    return partial(found, dim=-1) if of_torch is TORCH_ROW_FUNCTIONS else found


# For each update the optimizer, with what its state calls the arrays.
TORCH_OPTIMIZERS: dict[str, tuple[Any, dict[str, str]]] = {
    "sgd_update": (torch.optim.SGD, {"velocity": "momentum_buffer"}),
    "adam_update": (torch.optim.Adam, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "adamw_update": (torch.optim.AdamW, {"m": "exp_avg", "v": "exp_avg_sq"}),
}


def test_everything_has_its_counterpart() -> None:
    assert all(torch_activation(name) for name in ACTIVATIONS)
    for of_torch, entries in (
        (TORCH_ROW_FUNCTIONS, ROW_FUNCTIONS),
        (TORCH_LOSSES, LOSSES),
        (TORCH_ROW_LOSSES, ROW_LOSSES),
    ):
        assert all(counterpart(of_torch, name) for name in entries)
    assert set(TORCH_OPTIMIZERS) == {name for name in kernels.__all__ if name.endswith("_update")}
    assert {name.removesuffix("_update") for name in TORCH_OPTIMIZERS} >= set(OPTIMIZER_RULES) - {"momentum"}


def assert_close(result: Any, expected: Any, elementwise: bool = False) -> None:
    """The error is at most `TOLERANCE` of the largest element, or of each."""
    result, expected = np.asarray(result), np.asarray(expected.detach() if torch.is_tensor(expected) else expected)
    assert result.shape == expected.shape
    assert np.isfinite(expected).all()
    if expected.size:
        size = np.abs(expected) if elementwise else np.max(np.abs(expected))
        assert np.all(np.abs(result - expected) <= TOLERANCE * size)


def leaf(values: Any) -> Any:
    return torch.tensor(values, requires_grad=True)


# Activations and functions of rows.


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation(name: str, backend: Any, rng: Any) -> None:
    """With its default, and with other parameters; element by element, where nothing cancels."""
    entry = ACTIVATIONS[name]
    x = np.concatenate([rng.normal(scale=2, size=300), [0.0, -0.0, 1e-5, -1e-5, 1e-100, 20.0, -20.0]])
    x = x[x != 0] if name in ("relu", "leaky_relu", "elu") else x  # at the kink any slope between the two is right
    grad = rng.normal(size=x.shape)
    # Where PyTorch's own formula loses digits (1 + erf for gelu, tanh near -1), only the largest element is a measure.
    elementwise = name in ("identity", "relu", "leaky_relu", "elu", "tanh", "sigmoid", "exp", "softplus")
    for arguments in [(), *([(0.3,), (1.7,)] if entry.parameter else [])]:
        leaf_x = leaf(x)
        expected = torch_activation(name)(leaf_x, *arguments)
        expected.backward(torch.tensor(grad))
        y = getattr(kernels, name)(x, *arguments)
        assert_close(y, expected, elementwise)
        assert_close(getattr(kernels, f"{name}_backward")(grad, x, y, *arguments), leaf_x.grad)
        inner = np.abs(x) < 5  # beyond that 1 - y has too few digits left, here and there
        result = getattr(kernels, f"{name}_backward")(grad[inner], x[inner], y[inner], *arguments)
        assert_close(result, leaf_x.grad[torch.tensor(inner)], elementwise)


@given(shape=st.lists(st.integers(1, 12), min_size=0, max_size=4), scale=st.sampled_from([1e-8, 1e-3, 1.0, 10.0]))
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_of_drawn_shapes(name: str, shape: list[int], scale: float, backend: Any) -> None:
    numbers = np.random.default_rng(len(shape))
    x, grad = scale * (0.01 + numbers.normal(size=shape)), np.asarray(numbers.normal(size=shape))
    x = np.asarray(x)
    leaf_x = leaf(x)
    expected = torch_activation(name)(leaf_x)
    expected.backward(torch.tensor(grad))
    y = getattr(kernels, name)(x)
    assert_close(y, expected)
    assert_close(getattr(kernels, f"{name}_backward")(grad, x, y), leaf_x.grad)


SHAPES = [(1,), (7,), (1, 1), (5, 10), (33, 17), (2, 3, 5), (300, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(ROW_FUNCTIONS))
def test_row_function(name: str, shape: tuple[int, ...], backend: Any, rng: Any) -> None:
    for scale in (0.01, 3.0, 30.0):
        x, grad = rng.normal(scale=scale, size=shape), rng.normal(size=shape)
        leaf_x = leaf(x)
        expected = counterpart(TORCH_ROW_FUNCTIONS, name)(leaf_x)
        expected.backward(torch.tensor(grad))
        y = getattr(kernels, name)(x)
        assert_close(y, expected, elementwise=name == "softmax")
        result = getattr(kernels, f"{name}_backward")(grad, x, y)
        if shape[-1] == 1:  # one class is sure: all gradients cancel
            assert np.max(np.abs(result)) <= TOLERANCE
        else:
            assert_close(result, leaf_x.grad)


# Losses.


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 10), (2, 3, 5), (300, 40)], ids=str)
@pytest.mark.parametrize("name", list(LOSSES))
def test_loss(name: str, shape: tuple[int, ...], backend: Any, rng: Any) -> None:
    entry = LOSSES[name]
    # At the limits of [0, 1] PyTorch's gradient and ours are bounded in one way; in between nothing is.
    p = rng.uniform(1e-6, 1 - 1e-6, size=shape) if entry.unit_interval else rng.normal(scale=3, size=shape)
    targets = [np.asarray(rng.uniform(size=shape)), np.asarray(rng.integers(0, 2, size=shape).astype(np.float64))]
    for t, arguments in itertools.product(targets, [(), *([(0.3,), (2.5,)] if entry.parameter else [])]):
        leaf_p = leaf(np.asarray(p))
        expected = counterpart(TORCH_LOSSES, name)(leaf_p, torch.tensor(t), *arguments)
        expected.backward()
        loss, gradient = getattr(kernels, name)(np.asarray(p), t, *arguments)
        assert_close(loss, expected)
        assert_close(gradient, leaf_p.grad, elementwise=name in ("mean_squared_error", "huber"))


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if entry.unit_interval])
def test_loss_at_the_limits(name: str, backend: Any) -> None:
    p, t = (np.ravel(a) for a in np.meshgrid([0.0, 1e-14, 1e-300, 0.5, 1 - 1e-14, 1.0], [0.0, 0.3, 1.0]))
    for i in range(p.size):
        leaf_p = leaf(p[i : i + 1])
        expected = counterpart(TORCH_LOSSES, name)(leaf_p, torch.tensor(t[i : i + 1]))
        expected.backward()
        loss, gradient = getattr(kernels, name)(p[i : i + 1], t[i : i + 1])
        assert_close(loss, expected)
        # The least p * (1 - p) that PyTorch divides by is 1e-12 in float32, also for float64.
        limited = p[i] * (1 - p[i]) < 1e-12
        assert_close(gradient, leaf_p.grad * (float(np.float32(1e-12)) / 1e-12 if limited else 1.0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["indices", "one-hot", "soft"])
@pytest.mark.parametrize("name", list(ROW_LOSSES))
def test_row_loss(name: str, kind: str, smoothing: float, backend: Any, rng: Any) -> None:
    for rows, classes in [(1, 2), (1, 10), (7, 3), (64, 10), (33, 101), (2000, 10)]:
        logits, indices = rng.normal(scale=4, size=(rows, classes)), rng.integers(0, classes, size=rows)
        labels = {
            "indices": indices,
            "one-hot": np.eye(classes)[indices],
            "soft": rng.dirichlet(np.ones(classes), size=rows),
        }[kind]
        leaf_z = leaf(logits)
        expected = counterpart(TORCH_ROW_LOSSES, name)(leaf_z, torch.tensor(labels), label_smoothing=smoothing)
        expected.backward()
        loss, gradient = getattr(kernels, name)(logits, labels, label_smoothing=smoothing)
        assert_close(loss, expected)
        assert_close(gradient, leaf_z.grad)


@given(
    rows=st.integers(1, 40),
    classes=st.integers(2, 40),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_softmax_cross_entropy_of_drawn_shapes(rows: int, classes: int, scale: float, seed: int, backend: Any) -> None:
    numbers = np.random.default_rng(seed)
    logits, labels = numbers.normal(scale=scale, size=(rows, classes)), numbers.integers(0, classes, size=rows)
    leaf_z = leaf(logits)
    expected = functional.cross_entropy(leaf_z, torch.tensor(labels), label_smoothing=0.05)
    expected.backward()
    loss, gradient = kernels.softmax_cross_entropy(logits, labels, label_smoothing=0.05)
    assert_close(loss, expected)
    assert_close(gradient, leaf_z.grad)


# Linear layers.


def check_linear(lead: tuple[int, ...], inputs: int, outputs: int, name: str | None, parameter: Any, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    x, grad = numbers.normal(size=(*lead, inputs)), numbers.normal(size=(*lead, outputs))
    w, b = numbers.normal(size=(inputs, outputs)) / np.sqrt(inputs), numbers.normal(size=outputs)
    leaves = leaf(x), leaf(w), leaf(b)
    z = leaves[0] @ leaves[1] + leaves[2]
    arguments = () if parameter is None else (parameter,)
    expected = z if name is None else torch_activation(name)(z, *arguments)
    expected.backward(torch.tensor(grad))
    y, z_ = kernels.linear(x, w, b, name, activation_parameter=parameter, return_preactivation=True)
    assert_close(y, expected)
    assert_close(z_, z)
    needs_z = name is not None and ACTIVATIONS[name].needs_x
    saved = {"z": z_} if needs_z else {"y": y}
    results = kernels.linear_backward(grad, x, w, activation=name, activation_parameter=parameter, **saved)
    for result, tensor in zip(results, leaves, strict=True):
        assert_close(result, tensor.grad)


@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
def test_linear(name: str | None, backend: Any) -> None:
    takes_one = name is not None and ACTIVATIONS[name].parameter is not None
    for parameter in (None, 0.3) if takes_one else (None,):
        for lead, inputs, outputs in [((), 3, 4), ((1,), 1, 2), ((64,), 70, 10), ((2, 3), 5, 33), ((101,), 257, 37)]:
            check_linear(lead, inputs, outputs, name, parameter, seed=inputs)


@given(
    lead=st.lists(st.integers(1, 9), max_size=3),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    name=st.sampled_from([None, *ACTIVATIONS]),
    seed=st.integers(0, 99),
)
def test_linear_of_drawn_shapes(
    lead: list[int], inputs: int, outputs: int, name: str | None, seed: int, backend: Any
) -> None:
    check_linear(tuple(lead), inputs, outputs, name, None, seed)


@pytest.mark.parametrize(
    ("a", "b"),
    [((3,), (3,)), ((5, 3), (3, 4)), ((3,), (3, 4)), ((2, 5, 3), (3, 4)), ((2, 1, 5, 3), (4, 3, 6))],
    ids=str,
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...], backend: Any, rng: Any) -> None:
    left, right = rng.normal(size=a), rng.normal(size=b)
    assert_close(kernels.matmul(left, right), torch.matmul(torch.tensor(left), torch.tensor(right)))


def test_two_layers(backend: Any, rng: Any) -> None:
    """The gradients chain: a network of two layers and a loss, by hand here and by autograd there."""
    x, labels = rng.normal(size=(50, 20)), rng.integers(0, 5, size=50)
    w1, b1, w2, b2 = (rng.normal(scale=0.3, size=s) for s in ((20, 30), (30,), (30, 5), (5,)))
    leaves = [leaf(a) for a in (w1, b1, w2, b2)]
    hidden = functional.gelu(torch.tensor(x) @ leaves[0] + leaves[1])
    expected = functional.cross_entropy(hidden @ leaves[2] + leaves[3], torch.tensor(labels))
    expected.backward()
    h, z = kernels.linear(x, w1, b1, "gelu", return_preactivation=True)
    loss, grad = kernels.softmax_cross_entropy(kernels.linear(h, w2, b2), labels)
    grad_h, grad_w2, grad_b2 = kernels.linear_backward(grad, h, w2)
    _, grad_w1, grad_b1 = kernels.linear_backward(grad_h, x, w1, activation="gelu", z=z, need_x=False)
    assert_close(loss, expected)
    for result, tensor in zip((grad_w1, grad_b1, grad_w2, grad_b2), leaves, strict=True):
        assert_close(result, tensor.grad)


# Optimizers.


def check_steps(name: str, ours: dict[str, Any], theirs: dict[str, Any], rng: Any, steps: int = 12) -> None:
    """Parameter and state after each of several steps, from gradients of changing size."""
    optimizer_class, state_names = TORCH_OPTIMIZERS[name]
    start = rng.normal(size=(13, 7))
    tensor, param = leaf(start), start.copy()
    optimizer = optimizer_class([tensor], **theirs)
    plain = name == "sgd_update" and not ours.get("momentum")
    state = {} if plain else {argument: np.zeros_like(start) for argument in state_names}
    for step in range(1, steps + 1):
        grad = rng.normal(scale=10.0 ** ((step % 4) - 2), size=start.shape)
        grad[0] = 0.0 if step == 1 else grad[0]
        tensor.grad = torch.tensor(grad)
        optimizer.step()
        counted = {} if name == "sgd_update" else {"step": step}
        getattr(kernels, name)(param, grad, **state, **counted, **ours)
        assert_close(param, tensor)
        for argument, array in state.items():
            assert_close(array, optimizer.state[tensor][state_names[argument]])


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)])
def test_sgd(momentum: float, nesterov: bool, weight_decay: float, backend: Any, rng: Any) -> None:
    numbers = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    check_steps("sgd_update", numbers, numbers, rng)


@pytest.mark.parametrize("weight_decay", [None, 0.0, 0.05])
@pytest.mark.parametrize(
    ("lr", "beta1", "beta2", "eps"),
    [(None,) * 4, (0.1, 0.9, 0.999, 1e-8), (0.02, 0.5, 0.9, 1e-3), (1e-3, 0.0, 0.99, 0.1)],
)
@pytest.mark.parametrize("name", ["adam_update", "adamw_update"])
def test_adam(
    name: str,
    lr: float | None,
    beta1: float | None,
    beta2: float | None,
    eps: float | None,
    weight_decay: float | None,
    backend: Any,
    rng: Any,
) -> None:
    """With given numbers, and with the defaults, which are PyTorch's."""
    ours = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    theirs = {"lr": lr, "betas": None if beta1 is None else (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    ours, theirs = ({k: v for k, v in given.items() if v is not None} for given in (ours, theirs))
    check_steps(name, ours, theirs, rng)
