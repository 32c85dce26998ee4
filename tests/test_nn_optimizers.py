"""Optimizers: against PyTorch's over many steps, their state, clipping by norm, and bad arguments."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmlet.formulas.optimizers import adam_hyperparameters, adam_table
from gemmlet.nn import GAN, MLP, OPTIMIZERS, SGD, Adam, AdamW, ClipNorm, Optimizer, linear_decay, make_optimizer
from gemmlet.nn.schedules import lr_factors
from gemmlet.training.plan import Batches
from support import same_bits

SETTINGS = {
    "sgd": (SGD(0.05), "SGD", {"lr": 0.05}),
    "sgd-decay": (SGD(0.05, weight_decay=0.02, decay_biases=True), "SGD", {"lr": 0.05, "weight_decay": 0.02}),
    "momentum": (SGD(0.05, 0.9), "SGD", {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (
        SGD(0.05, 0.8, nesterov=True, weight_decay=0.02, decay_biases=True),
        "SGD",
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
    ),
    "adam": (Adam(), "Adam", {}),
    "adam-all": (
        Adam(0.02, 0.5, 0.99, 1e-6, 0.03, decay_biases=True),
        "Adam",
        {"lr": 0.02, "betas": (0.5, 0.99), "eps": 1e-6, "weight_decay": 0.03},
    ),
    "adamw": (AdamW(decay_biases=True), "AdamW", {}),
    "adamw-all": (
        AdamW(0.02, 0.5, 0.99, 1e-6, 0.03, decay_biases=True),
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


# Copies.

X, Y = np.random.default_rng(0).random((40, 5)).astype(np.float32), np.arange(40) % 3


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def by_joblib(value: Any) -> Any:
    """Which writes an array that occurs twice twice."""
    joblib = pytest.importorskip("joblib")
    joblib.dump(value, file := io.BytesIO())
    file.seek(0)
    return joblib.load(file)


def made(network: str) -> Any:
    return GAN(2, [4, 5], [3, 1]) if network == "gan" else MLP([5, 4, 3], ema_decay=0.5)


def train(model: Any, *optimizers: Optimizer) -> list[Any]:
    """Two epochs, and what they make of the parameters."""
    if isinstance(model, GAN):
        model.fit(X, 2, 8, *optimizers)
        return [*model.generator_parameters, *model.discriminator_parameters, *model._average.parameters]
    model.fit(X, Y, 2, 8, *optimizers)
    return [*model.parameters, *model._average.parameters]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, by_joblib])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rules", ["sgd", "momentum", "adam", "clipped", "two"])
@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_copies_go_on_as_the_originals_do(network: str, rules: str, together: bool, copied: Any) -> None:
    rule = ClipNorm(Adam(0.01), 0.1) if rules == "clipped" else SETTINGS.get(rules, SETTINGS["adam"])[0].fresh()
    optimizers = (rule, SGD(0.1, 0.9)) if (rules, network) == ("two", "gan") else (rule,)
    originals = made(network), *optimizers
    train(*originals)
    copies = copied(originals) if together else [copied(original) for original in originals]
    assert copies[1] == optimizers[0]
    again = copied(copies)  # of which no parameter has been seen yet
    expected = [[a.copy() for a in train(*originals)] for _ in range(2)]
    for others in (copies, again):
        for arrays in expected:
            assert all(map(same_bits, train(*others), arrays))
    assert all(map(same_bits, train(*copied(copies)), train(*originals)))


def test_a_copy_of_settings_shares_the_states() -> None:
    param, one = np.zeros(3), Adam()
    one.update(param, np.ones(3))
    other = copy.copy(one)
    other.lr = 0.5
    other.update(param, np.ones(3))
    assert one.lr == 1e-3
    assert [state.steps for state in one._states.values()] == [2]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, by_joblib])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_a_copy_goes_on_with_any_network_of_several(network: str, together: bool, copied: Any) -> None:
    """Networks of the same shapes, one a copy of another; some the optimizer has served, one not."""
    first, rule = made(network), SETTINGS["adam"][0].fresh()
    train(first, rule)
    models = [first, copy.deepcopy(first), made(network), made(network)]
    for model, times in zip(models, (1, 1, 2, 0), strict=True):
        for _ in range(times):
            train(model, rule)
    del models[0], first
    copies = [copied((model, rule)) if together else (copied(model), copied(rule)) for model in models]
    for model, (other, its_rule) in zip(models, copies, strict=True):
        for _ in range(2):
            assert all(map(same_bits, train(other, its_rule), train(model, rule)))


def test_a_copy_goes_on_with_a_network_that_is_changed() -> None:
    """As long as something is as it was."""
    model, rule = made("mlp"), Adam(0.01)
    train(model, rule)
    pairs = [(model, rule), copy.deepcopy((model, rule))]
    for changed, _ in pairs:
        changed.parameters[-2][...] = 0.125
    assert all(map(same_bits, *(train(*pair) for pair in pairs)))


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_what_is_refused_uses_up_no_state(network: str, tmp_path: Path) -> None:
    """Of a copy, or of a file: it is there for the network that is trained, after others that were not."""
    model, rule = made(network), Adam(0.01)
    train(model, rule)
    model.save(tmp_path / "file", rule)
    model.save(tmp_path / "alone")
    rules = copy.deepcopy(rule), type(model).load_optimizers(tmp_path / "file")["optimizer"]
    expected = [a.copy() for a in train(model, rule)]

    def refused(message: str, x: Any = X, writeable: bool = True, **arguments: Any) -> None:
        other = type(model).load(tmp_path / "file")
        next(iter(other._parameters.values()))[0].flags.writeable = writeable
        with pytest.raises(ValueError, match=message):
            other.fit(x, *([Y] if network == "mlp" else []), optimizer=waiting, **arguments)

    for waiting in rules:
        spoilt = X.copy()
        spoilt[-1] = np.nan
        refused("got nan|is nan", spoilt)
        refused("epochs must be at least 1", epochs=0)
        refused("is no checkpoint of a fit", resume=tmp_path / "alone")
        refused("lr_schedule", lr_schedule=lambda done: -1.0)
        refused("is read-only", writeable=False)
        for _ in range(2):
            type(model).load(tmp_path / "file").save(tmp_path / "again", waiting)
        assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
        made(network).save(tmp_path / "other", waiting)  # it has none of these states
        assert {s.steps for s in type(model).load_optimizers(tmp_path / "other")["optimizer"]._states._waiting} == {0}
        loaded = type(model).load(tmp_path / "file")
        assert all(map(same_bits, train(loaded, waiting), expected))


def test_a_copy_takes_over_what_is_equal() -> None:
    """Parameter by parameter, those of a network as a whole, and each state once; what is not equal starts anew."""
    one, params = Adam(), [np.full(2, 1.0), np.full(3, 2.0), np.full(3, 3.0)]
    for times, param in enumerate(params, 1):
        for _ in range(times):
            one.update(param, np.ones_like(param))
    a, b, c = params
    assert len(one._states) == 3

    def steps_of(optimizer: Optimizer, *arrays: Any) -> list[int]:
        mine = [array.copy() for array in arrays]
        for array in mine:
            optimizer.update(array, np.ones_like(array))
        return [state.steps - 1 for state in optimizer._states.values()]

    assert steps_of(copy.deepcopy(one), c, b, c, a, a) == [3, 2, 0, 1, 0]
    assert steps_of(copy.deepcopy(one), b + 1, np.float32(b), b[:2], b.reshape(3, 1), b) == [0, 0, 0, 0, 2]
    assert steps_of(one.fresh(), a, b) == [0, 0]
    other = copy.deepcopy(one)
    assert [state.steps for state in other.group([b.copy(), a.copy()]).states] == [0, 0]
    group = other.group([b.copy(), c.copy()])
    for _ in range(2):
        assert [state.steps for state in other.group([b.copy(), c.copy()]).states] == [2, 3]
    group.advance(5)
    assert [state.steps for state in other.group(group.params).states] == [7, 8]
    assert [state.steps for state in other.group([b.copy(), c.copy()]).states] == [0, 0]
    assert len(other._states) == 3
    # Of another model altogether: `fit` trains all of it.
    model = MLP([2, 2])
    before = [p.copy() for p in model.parameters]
    copies = [copy.deepcopy(one) for _ in range(2)]
    model.fit(X[:, :2].copy(), Y % 2, epochs=1, optimizer=copies[0])
    assert not any(map(np.array_equal, before, model.parameters))
    assert {state.steps for state in copies[0]._states.values()} == {1}


def test_an_optimizer_does_not_keep_its_parameters() -> None:
    """Of many networks that are gone nothing is left, and an array at an old address gets no old state."""
    shared, x = Adam(), np.zeros((1, 32), np.float32)

    def fit() -> weakref.ref[Any]:
        model = MLP([32, 32, 2])
        model.fit(x, [1], epochs=1, optimizer=shared)
        assert {state.steps for state in shared._states.values()} == {1}
        return weakref.ref(model)

    fit()
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        models = [fit() for _ in range(300)]
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 300 * 500  # a network has 5 kB
    finally:
        tracemalloc.stop()
    assert not any(model() for model in models)
    assert not shared._states
    # And a parameter does not keep the optimizer.
    param, optimizer = np.zeros(3), Adam()
    optimizer.update(param, np.ones(3))
    kept = weakref.ref(optimizer)
    del optimizer
    assert kept() is None


def test_threads_share_an_optimizer() -> None:
    """Each trains networks of its own; no state is lost, and no step."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for clipped in (False, True):
            optimizer: Any = ClipNorm(Adam(), 1.0) if clipped else Adam()
            models = [MLP([5, 4, 3], seed=seed) for seed in range(8)]
            expected = [MLP([5, 4, 3], seed=seed) for seed in range(8)]
            for model in expected:
                model.fit(X, Y, 3, 8, optimizer.fresh())
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(model.fit, X, Y, 3, 8, optimizer) for model in models]:
                    done.result()
            for ours, theirs in zip(models, expected, strict=True):
                assert all(map(same_bits, ours.parameters, theirs.parameters))
            assert [state.steps for state in optimizer._states.values()] == [15] * 32
    finally:
        sys.setswitchinterval(interval)


# Settings.


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
    with pytest.raises(ValueError, match="lr must be finite and at least 0, got inf"):
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


@pytest.mark.parametrize(
    ("optimizer", "setting", "value", "message"),
    [
        (SGD(0.1), "lr", -1, "lr must be at least 0, got -1"),
        (Adam(), "lr", "0.1", "lr must be a real number, got str"),
        (Adam(), "beta2", 1, "beta2 must be below 1, got 1"),
        (SGD(0.1), "momentum", 2, r"momentum must be within \[0, 1\], got 2"),
        (SGD(0.1, 0.9, nesterov=True), "momentum", 0, "nesterov needs a momentum above 0"),
        (SGD(0.1), "nesterov", True, "nesterov needs a momentum above 0"),
        (SGD(0.1, 0.9), "nesterov", 1, "nesterov must be True or False, got int"),
        (ClipNorm("sgd", 1.0), "max_norm", -1.0, r"max_norm must be above 0, got -1\.0"),
        (ClipNorm("sgd", 1.0), "lr", np.nan, "lr must be finite and at least 0, got nan"),
        (ClipNorm("sgd", 1.0), "optimizer", 3, "optimizer must be a name or an optimizer of gemmlet.nn, got int"),
    ],
)
def test_settings_are_checked_where_they_are_set(optimizer: Any, setting: str, value: Any, message: str) -> None:
    before = optimizer.settings()
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(optimizer, setting, value)
    assert optimizer.settings() == before


def test_numbers_of_other_kinds_as_settings() -> None:
    """They become Python's, which files have."""
    optimizer = ClipNorm(SGD(0.1), 1.0)
    for number in (Fraction(1, 4), np.float32(0.25), np.float64(0.25)):
        optimizer.lr = optimizer.weight_decay = optimizer.max_norm = optimizer.clip_value = number
        others = "name", "nesterov", "decay_biases"
        kinds = {type(value) for name, value in optimizer.settings().items() if name not in others}
        assert (kinds, optimizer.lr) == ({float}, 0.25)


@pytest.mark.parametrize("copied", [lambda optimizer: optimizer, copy.copy, copy.deepcopy])
def test_settings_are_those_of_the_clipped_optimizer(copied: Any) -> None:
    optimizer = copied(ClipNorm(ClipNorm(SGD(0.5, momentum=0.9), 2.0), 3.0))
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.max_norm) == ("sgd", 0.5, 0.9, 2.0)
    optimizer.lr, optimizer.momentum, optimizer.max_norm = 0.25, 0.0, 1.0
    assert optimizer.settings() == SGD(0.25).settings() | {"max_norm": 1.0}
    assert not hasattr(optimizer, "beta1")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_by_name(name: str) -> None:
    optimizer = make_optimizer(name, lr=0.125)
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.lr == 0.125
    assert make_optimizer(**optimizer.settings()) == optimizer


# Clipping by norm.


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_clipping_agrees_with_pytorch(rule: str, backend: object, rng: np.random.Generator) -> None:
    """Of all gradients of a network together, with a schedule; norms are above and below the limit."""
    torch = pytest.importorskip("torch")
    template, theirs_name, settings = SETTINGS[rule]
    max_norm, norms = 1.5, []
    model = MLP([5, 8, 3], dtype=np.float64, default_optimizer=ClipNorm(template, max_norm))
    x, y = 3 * rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    tensors = [torch.tensor(p, requires_grad=True) for p in model.parameters]
    theirs = getattr(torch.optim, theirs_name)(tensors, **settings)
    rate = theirs.param_groups[0]["lr"]
    for step in range(20):
        rows = slice(step % 10 * 6, step % 10 * 6 + 6)
        theirs.zero_grad()
        outputs = torch.tanh(torch.tensor(x[rows]) @ tensors[0] + tensors[1]) @ tensors[2] + tensors[3]
        torch.nn.functional.cross_entropy(outputs, torch.tensor(y[rows])).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(tensors, max_norm).item())
        theirs.param_groups[0]["lr"] = rate * (1 - step / 20)
        theirs.step()
    assert min(norms) < 0.9 * max_norm < 1.1 * max_norm < max(norms)
    model.fit(x, y, 2, 6, shuffle=False, lr_schedule=linear_decay)
    for param, tensor in zip(model.parameters, tensors, strict=True):
        # PyTorch adds 1e-6 to the norm.
        np.testing.assert_allclose(param, tensor.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_norm_below_the_limit_changes_no_bit(name: str, backend: object, dtype: Any) -> None:
    """Whether gradients are written or not; to rounding where executors differ, that of a GPU say."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(dtype), rng.integers(0, 3, 40)
    models = [MLP([5, 8, 3], dtype=dtype) for _ in range(2)]
    rules = SETTINGS[name][0].fresh(), ClipNorm(SETTINGS[name][0].fresh(), 1e6)
    for model, rule in zip(models, rules, strict=True):
        model.fit(x, y, 2, 8, rule)
    for ours, theirs in zip(*(model.parameters for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 if dtype == np.float64 else 1e-5)
    params = [p.copy() for p in (models[0].parameters[0],) * 2]
    for param, rule in zip(params, rules, strict=True):
        for grad in np.random.default_rng(1).normal(size=(3, *param.shape)).astype(dtype):
            rule.update(param, grad)
    assert same_bits(*params)


def test_an_update_clips_its_gradient(dtype: Any) -> None:
    """By the norm of that one, which is not written to."""
    clipped, param = ClipNorm(SGD(1.0), 2.0), np.zeros(2, dtype)
    grad = np.array([3, -4], dtype)
    clipped.update(param, grad)
    np.testing.assert_allclose(param, [-1.2, 1.6], rtol=1e-6)
    np.testing.assert_array_equal(grad, [3, -4])
    clipped.update(param, grad, lr_factor=0.5)
    np.testing.assert_allclose(param, [-1.8, 2.4], rtol=1e-6)
    clipped.lr = 0.0
    assert clipped.optimizer.lr == clipped.lr == 0.0
    # Of integers, say: nothing is left behind.
    for wrong, error, message in (
        (np.array([30, -40]), TypeError, "grad has dtype int64; expected float32"),
        (np.ones(3, dtype), ValueError, "grad has shape"),
        (None, TypeError, "grad is None"),
    ):
        with pytest.raises(error, match=message):
            clipped.update(param, wrong)
    with pytest.raises(TypeError, match="param must be a NumPy array, got list"):
        clipped.update([0.0], np.ones(1))
    (state,) = clipped.optimizer._states.values()
    assert state.steps == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_without_a_norm_are_not_clipped(bad: float, backend: Any) -> None:
    """What is not finite stays where it is: it spoils no other number."""
    param, grad = np.zeros(3), np.array([bad, 30.0, -40.0])
    ClipNorm(SGD(1.0), 1.0).update(param, grad)
    np.testing.assert_array_equal(param, -grad)
    results = []
    for rule in (SGD(0.1), ClipNorm(SGD(0.1), 1e-3)):
        model = MLP([2, 2], output="identity", dtype=np.float64)
        group = rule.group(model.parameters)  # `fit` would refuse the targets
        plan = model._plan(*model._samples_and_targets(np.ones((4, 2)), np.full((4, 2), [bad, 3.0])), group)
        backend.train(plan, Batches(np.arange(4), 4, (group.hyperparameters(np.ones(1)),), (0.0,)))
        results.append(model.parameters)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert np.isfinite(ours[..., 1]).all()
        assert not np.isfinite(ours[..., 0]).any()


def test_what_clipping_knows() -> None:
    clipped = ClipNorm(SGD(0.5, 0.9), 2)
    assert repr(clipped) == f"ClipNorm({clipped.optimizer!r}, 2.0)"
    assert clipped.settings() == SGD(0.5, 0.9).settings() | {"max_norm": 2.0}
    assert make_optimizer(**clipped.settings()) == clipped == make_optimizer("sgd", lr=0.5, momentum=0.9, max_norm=2)
    assert clipped != SGD(0.5, 0.9)
    assert clipped != ClipNorm(SGD(0.5, 0.9), 3)
    assert clipped != ClipNorm(SGD(0.5), 2)
    assert ClipNorm("adam", 1.0) == ClipNorm(Adam(), 1.0)
    param = np.ones(1)
    clipped.update(param, np.ones(1))
    fresh = clipped.fresh()
    assert fresh == clipped
    assert clipped.optimizer._states
    assert not fresh.optimizer._states
    # The default of a network is a fresh one, too.
    assert MLP([2, 2], default_optimizer=clipped).default_optimizer == clipped


@pytest.mark.parametrize(("inner", "outer"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_smallest_of_nested_norms_counts(inner: float, outer: float) -> None:
    nested = ClipNorm(ClipNorm(SGD(1.0), inner), outer)
    assert nested.max_norm == 1.0
    assert make_optimizer(**nested.settings()) == ClipNorm(SGD(1.0), 1.0)
    assert nested.fresh() == nested
    assert nested.lr == 1.0
    param, x = np.zeros(2), np.full((4, 2), 10.0)
    nested.update(param, np.array([3.0, -4.0]))
    np.testing.assert_allclose(param, [-0.6, 0.8], rtol=1e-12)
    models = [MLP([2, 2], dtype=np.float64) for _ in range(2)]
    for model, rule in zip(models, (nested, ClipNorm(SGD(1.0), 1.0)), strict=True):
        model.fit(x, [0, 1, 1, 1], 2, 4, rule)
    assert all(same_bits(*pair) for pair in zip(*(model.parameters for model in models), strict=True))


# Bad arguments.


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
        (lambda: SGD(float("nan")), ValueError, "lr must be finite and at least 0, got nan"),
        (lambda: SGD(momentum=1.5), ValueError, r"momentum must be within \[0, 1\], got 1\.5"),
        (lambda: SGD(nesterov=True), ValueError, "nesterov needs a momentum above 0"),
        (lambda: SGD(momentum=0.9, nesterov=1), TypeError, "nesterov must be True or False, got int"),
        (lambda: SGD(weight_decay=-1), ValueError, "weight_decay must be at least 0"),
        (lambda: Adam(beta1=1.0), ValueError, "beta1 must be below 1, got 1"),
        (lambda: Adam(beta2=-0.1), ValueError, r"beta2 must be within \[0, 1\]"),
        (lambda: Adam(eps=-1e-8), ValueError, "eps must be at least 0"),
        (lambda: AdamW(weight_decay=None), TypeError, "weight_decay must be a real number, got NoneType"),
        (lambda: Optimizer(), TypeError, "abstract"),
        (lambda: ClipNorm("adam", 0), ValueError, "max_norm must be above 0, got 0"),
        (lambda: ClipNorm("adam", -1.0), ValueError, r"max_norm must be above 0, got -1\.0"),
        (lambda: ClipNorm("adam", float("inf")), ValueError, "max_norm must be finite and above 0, got inf"),
        (lambda: ClipNorm("adam", None), TypeError, "max_norm must be a real number, got NoneType"),
        (lambda: ClipNorm("lion", 1.0), ValueError, "optimizer 'lion' is unknown"),
        (lambda: ClipNorm(Adam, 1.0), TypeError, "optimizer must be a name or an optimizer of gemmlet.nn, got"),
        (lambda: make_optimizer("sgd", max_norm="big"), TypeError, "max_norm must be a real number, got str"),
        (lambda: make_optimizer("sgd", max_norm=float("nan")), ValueError, "max_norm must be finite and above 0"),
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
