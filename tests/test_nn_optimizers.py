"""Optimizers: against PyTorch's over many steps, their state, and bad arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gemmlet.formulas.optimizers import adam_hyperparameters, adam_table
from gemmlet.nn import OPTIMIZERS, SGD, Adam, AdamW, Optimizer, linear_decay, make_optimizer
from gemmlet.nn.optimizers import lr_factors
from support import same_bits

SETTINGS = {
    "sgd": (SGD(0.05), "SGD", {"lr": 0.05}),
    "sgd-decay": (SGD(0.05, weight_decay=0.02), "SGD", {"lr": 0.05, "weight_decay": 0.02}),
    "momentum": (SGD(0.05, 0.9), "SGD", {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (
        SGD(0.05, 0.8, nesterov=True, weight_decay=0.02),
        "SGD",
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
    ),
    "adam": (Adam(), "Adam", {}),
    "adam-all": (
        Adam(0.02, 0.5, 0.99, 1e-6, 0.03),
        "Adam",
        {"lr": 0.02, "betas": (0.5, 0.99), "eps": 1e-6, "weight_decay": 0.03},
    ),
    "adamw": (AdamW(), "AdamW", {}),
    "adamw-all": (
        AdamW(0.02, 0.5, 0.99, 1e-6, 0.03),
        "AdamW",
        {"lr": 0.02, "betas": (0.5, 0.99), "eps": 1e-6, "weight_decay": 0.03},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_many_steps_agree_with_pytorch(name: str, backend: object, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    template, theirs_name, settings = SETTINGS[name]
    ours = template.fresh()
    params = [rng.normal(size=shape) for shape in ((5, 7), (7,))]
    tensors = [torch.tensor(p, requires_grad=True) for p in params]
    theirs = getattr(torch.optim, theirs_name)(tensors, **settings)
    start = [p.copy() for p in params]
    for _ in range(200):
        for param, tensor in zip(params, tensors, strict=True):
            grad = rng.normal(size=param.shape)
            tensor.grad = torch.tensor(grad)
            ours.update(param, grad)
        theirs.step()
    for param, tensor, before in zip(params, tensors, start, strict=True):
        np.testing.assert_allclose(param, tensor.detach().numpy(), rtol=1e-10, atol=1e-12)
        assert np.abs(param - before).max() > 1e-3


def test_state_belongs_to_the_parameter(rng: np.random.Generator) -> None:
    """One optimizer for two parameters in turn does what two optimizers do."""
    one, two = rng.normal(size=3), rng.normal(size=4)
    apart = [one.copy(), two.copy()]
    shared, optimizers = Adam(), [Adam(), Adam()]
    for step in range(5):
        for i, param in enumerate((one, two)):
            grad = rng.normal(size=param.shape)
            shared.update(param, grad)
            optimizers[i].update(apart[i], grad)
            if step == 2:  # a different number of steps for each
                break
    np.testing.assert_array_equal(one, apart[0])
    np.testing.assert_array_equal(two, apart[1])


def test_fresh_keeps_settings_and_no_state() -> None:
    used = SGD(0.5, momentum=0.9)
    param = np.ones(2)
    used.update(param, np.ones(2))
    fresh = used.fresh()
    assert fresh == SGD(0.5, momentum=0.9)
    after = np.ones(2)
    fresh.update(after, np.ones(2))
    np.testing.assert_array_equal(after, [0.5, 0.5])


def test_the_learning_rate_may_be_changed_between_steps() -> None:
    optimizer, param = SGD(1.0), np.zeros(1)
    optimizer.update(param, np.ones(1))
    optimizer.lr = 0.25
    optimizer.update(param, np.ones(1))
    assert param[0] == -1.25


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_factor_of_the_learning_rate_is_for_one_step(kind: Any) -> None:
    optimizer, by_hand = kind(0.5), kind(0.5)
    params = np.zeros(3), np.zeros(3)
    for factor in (1.0, 0.25, 0.0, 2.0):
        optimizer.update(params[0], np.arange(3.0), lr_factor=factor)
        by_hand.lr = 0.5 * factor
        by_hand.update(params[1], np.arange(3.0))
    np.testing.assert_array_equal(*params)
    assert optimizer.lr == 0.5
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -0\.5"):
        optimizer.update(params[0], np.ones(3), lr_factor=-1.0)
    optimizer.lr = 1e200
    with pytest.raises(ValueError, match="lr must be at least 0, got inf"):
        optimizer.update(params[0], np.ones(3), lr_factor=1e200)
    np.testing.assert_array_equal(*params)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.9999)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_adams_numbers_of_many_steps(decoupled: bool, betas: tuple[float, float], rng: np.random.Generator) -> None:
    """Bit for bit those of each step."""
    for step in (1, 9, 1000, 10**6, 2**53):
        rates = rng.uniform(0, 0.01, 300)
        table = adam_table(step, rates, *betas, 1e-8, 0.03, decoupled)
        rows = [
            adam_hyperparameters(step + i, rate, *betas, 1e-8, 0.03, decoupled) for i, rate in enumerate(rates.tolist())
        ]
        assert same_bits(table, np.array(rows))


def test_linear_decay() -> None:
    """From 1 to 0, which it would reach after the last step."""
    np.testing.assert_array_equal(lr_factors(linear_decay, 0, 6, 6), [1 - i / 6 for i in range(6)])
    np.testing.assert_array_equal(lr_factors(linear_decay, 4, 2, 8), [0.5, 0.375])
    np.testing.assert_array_equal(lr_factors(None, 4, 2, 8), [1, 1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_by_name(name: str) -> None:
    optimizer = make_optimizer(name, lr=0.125)
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.lr == 0.125
    assert make_optimizer(**optimizer.settings()) == optimizer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make_optimizer("adagrad"),
            ValueError,
            "optimizer 'adagrad' is unknown; the choices are sgd, adam, adamw",
        ),
        (lambda: make_optimizer(3), TypeError, "optimizer must be a string, got int"),
        (lambda: make_optimizer("sgd", beta1=0.5), TypeError, "optimizer 'sgd' has no setting 'beta1'; it has lr"),
        (lambda: SGD(-0.1), ValueError, r"lr must be at least 0, got -0\.1"),
        (lambda: SGD("fast"), TypeError, "lr must be a real number, got str"),
        (lambda: SGD(float("nan")), ValueError, "lr must be at least 0, got nan"),
        (lambda: SGD(momentum=1.5), ValueError, r"momentum must be within \[0, 1\], got 1\.5"),
        (lambda: SGD(nesterov=True), ValueError, "nesterov needs a momentum above 0"),
        (lambda: SGD(momentum=0.9, nesterov=1), TypeError, "nesterov must be True or False, got int"),
        (lambda: SGD(weight_decay=-1), ValueError, "weight_decay must be at least 0"),
        (lambda: Adam(beta1=1.0), ValueError, "beta1 must be below 1, got 1"),
        (lambda: Adam(beta2=-0.1), ValueError, r"beta2 must be within \[0, 1\]"),
        (lambda: Adam(eps=-1e-8), ValueError, "eps must be at least 0"),
        (lambda: AdamW(weight_decay=None), TypeError, "weight_decay must be a real number, got NoneType"),
        (lambda: Optimizer(), TypeError, "abstract"),
    ],
)
def test_bad_settings(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_bad_updates_leave_no_state() -> None:
    optimizer, param = Adam(), np.zeros(3)
    with pytest.raises(TypeError, match="param must be a NumPy array, got list"):
        optimizer.update([0.0], np.zeros(1))
    with pytest.raises(ValueError, match="grad has shape"):
        optimizer.update(param, np.ones(2))
    with pytest.raises(TypeError, match="grad has dtype float32"):
        optimizer.update(param, np.ones(3, np.float32))
    other = np.zeros(3)
    optimizer.update(param, np.ones(3))
    Adam().update(other, np.ones(3))
    np.testing.assert_array_equal(param, other)
