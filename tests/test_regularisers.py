"""L1 and L2 of a network, gradients clipped by value, and decay of weights alone; PyTorch's autograd is the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmlet
from gemmlet.nn import GAN, MLP, SGD, Adam, AdamW, ClipNorm, make_optimizer
from gemmlet.nn.files import parsed_header
from gemmlet.nn.safetensors import dump, load
from gemmlet.training.plan import Batches
from support import same_bits

L1, L2, CLIP = 0.003, 0.05, 0.02
# What decays in PyTorch as it does here by default, and as it does there.
RULES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "sgd": (SGD(0.1, weight_decay=0.3), "SGD", {"lr": 0.1, "weight_decay": 0.3}),
    "nesterov": (
        SGD(0.1, 0.8, nesterov=True, weight_decay=0.3),
        "SGD",
        {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.3},
    ),
    "adam": (Adam(0.01, weight_decay=0.3), "Adam", {"lr": 0.01, "weight_decay": 0.3}),
    "adamw": (AdamW(0.01, weight_decay=0.3), "AdamW", {"lr": 0.01, "weight_decay": 0.3}),
}


def problem(rng: np.random.Generator, n: int = 40, zeros: float = 0.0) -> tuple[Any, Any]:
    x = rng.normal(size=(n, 6)) * (rng.uniform(size=(n, 6)) >= zeros)
    return x, rng.integers(0, 3, n)


def tensors_of(torch: Any, model: MLP) -> list[Any]:
    return [torch.tensor(p, requires_grad=True) for p in model.parameters]


def objective(torch: Any, tensors: list[Any], x: Any, y: Any, l1: float = L1, l2: float = L2) -> Any:
    """Of the network [6, 8, 3]: the loss with its penalties."""
    outputs = torch.tanh(torch.tensor(x) @ tensors[0] + tensors[1]) @ tensors[2] + tensors[3]
    weights = tensors[::2]
    penalty = sum(l1 * w.abs().sum() + l2 / 2 * w.square().sum() for w in weights)
    return torch.nn.functional.cross_entropy(outputs, torch.tensor(y)) + penalty


def assert_parameters(model: MLP, tensors: list[Any]) -> None:
    for param, tensor in zip(model.parameters, tensors, strict=True):
        np.testing.assert_allclose(param, tensor.detach().numpy(), rtol=0, atol=1e-10)


def test_objective_and_gradients_agree_with_pytorch(backend: Any, rng: Any) -> None:
    """Also where weights are 0: there the slope of L1 is 0."""
    torch = pytest.importorskip("torch")
    model, (x, y) = MLP([6, 8, 3], dtype=np.float64, l1=L1, l2=L2, seed=1), problem(rng)
    model.parameters[0][::2, ::3] = 0
    model.parameters[2][0] = -0.0
    tensors = tensors_of(torch, model)
    wanted = objective(torch, tensors, x, y)
    wanted.backward()
    loss, gradients = model.loss_and_gradients(x, y)
    assert loss == pytest.approx(wanted.item(), rel=1e-12)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=1e-10)
    plain = objective(torch, tensors, x, y, 0.0, 0.0).item()
    assert model.evaluate(x, y)["loss"] == pytest.approx(plain, rel=1e-12)  # without the penalties
    assert loss > plain + 0.1


@pytest.mark.parametrize("zeros", [0.0, 0.8])
@pytest.mark.parametrize("decay_biases", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_fits_agree_with_pytorch(name: str, decay_biases: bool, zeros: float, backend: Any, rng: Any) -> None:
    """First penalties, then clipping, then the optimizer's decay; the loss of the history has the penalties."""
    torch = pytest.importorskip("torch")
    template, theirs_name, settings = RULES[name]
    rule = template.fresh()
    rule.clip_value, rule.decay_biases = CLIP, decay_biases
    model, (x, y) = MLP([6, 8, 3], dtype=np.float64, l1=L1, l2=L2, seed=1), problem(rng, zeros=zeros)
    tensors = tensors_of(torch, model)
    others = {"params": tensors[1::2]} | ({} if decay_biases else {"weight_decay": 0.0})
    theirs = getattr(torch.optim, theirs_name)([{"params": tensors[::2]}, others], **settings)
    losses, clipped, count = [], 0, 0
    for _ in range(3):
        total = 0.0
        for first in range(0, 40, 16):
            rows = slice(first, first + 16)
            theirs.zero_grad()
            loss = objective(torch, tensors, x[rows], y[rows])
            loss.backward()
            clipped += sum(int((t.grad.abs() > CLIP).sum()) for t in tensors)
            count += sum(t.numel() for t in tensors)
            torch.nn.utils.clip_grad_value_(tensors, CLIP)
            theirs.step()
            total += loss.item() * len(x[rows])
        losses.append(total / 40)
    assert 0.1 * count < clipped < 0.9 * count
    history = model.fit(x, y, 3, 16, rule, shuffle=False, validation_data=(x, y))
    assert_parameters(model, tensors)
    np.testing.assert_allclose(history.loss, losses, rtol=1e-12)
    assert history.validation_loss[-1] == model.evaluate(x, y)["loss"]


def test_by_hand_as_fit_does(backend: Any, rng: Any) -> None:
    """`update` knows biases by their single dimension; a norm is clipped before values are."""
    for template, _, _ in RULES.values():
        for clip_value in (None, CLIP):
            rule = template.fresh()
            rule.clip_value = clip_value
            models = [MLP([6, 8, 3], dtype=np.float64, l1=L1, seed=2) for _ in range(2)]
            x, y = problem(rng)
            models[0].fit(x, y, 4, 40, rule, shuffle=False)
            by_hand = rule.fresh()
            for _ in range(4):
                _, gradients = models[1].loss_and_gradients(x, y)
                for param, gradient in zip(models[1].parameters, gradients, strict=True):
                    by_hand.update(param, gradient)
            for one, two in zip(*(model.parameters for model in models), strict=True):
                np.testing.assert_allclose(one, two, rtol=0, atol=1e-10)
    param, grad = np.zeros(2), np.array([3.0, -4.0])
    ClipNorm(SGD(1.0, clip_value=0.7), 1.0).update(param, grad)
    np.testing.assert_allclose(param, [-0.6, 0.7], rtol=1e-12)
    np.testing.assert_array_equal(grad, [3.0, -4.0])


def test_values_that_are_not_finite(backend: Any) -> None:
    """NaN stays, as in PyTorch, and an infinity is clipped, whoever updates."""
    torch = pytest.importorskip("torch")
    grads = [np.array([np.nan, np.inf, -np.inf, 0.25]), np.array([[1.5, np.nan], [-np.inf, -0.0]])]
    for grad in grads:
        tensor = torch.zeros(grad.shape, dtype=torch.float64, requires_grad=True)
        tensor.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_value_([tensor], 0.5)
        param = np.zeros(grad.shape)
        SGD(1.0, clip_value=0.5).update(param, grad)
        np.testing.assert_array_equal(param, -tensor.grad.numpy())
    for bad in (np.nan, 1e200):
        model, rule = MLP([2, 2], output="identity", dtype=np.float64), SGD(0.1, clip_value=0.5)
        before = [p.copy() for p in model.parameters]
        group = rule.group(model.parameters)  # `fit` would refuse NaN as targets
        plan = model._plan(*model._samples_and_targets(np.ones((4, 2)), np.full((4, 2), [bad, 0.0])), group)
        backend.train(
            there := backend.stage(plan), Batches(np.arange(4), 4, (group.hyperparameters(np.ones(1)),), (0.0,))
        )
        backend.write_back(there)
        for param, was in zip(model.parameters, before, strict=True):
            step = (param - was)[..., 0]
            assert np.isnan(step).all() if math.isnan(bad) else np.allclose(step, 0.05, rtol=0, atol=1e-12)
            assert np.isfinite(param[..., 1]).all()


def test_limits_beyond_the_dtype(training: Any, rng: Any) -> None:
    """One is no limit, one is 0."""
    x, y = problem(rng)
    results = []
    for clip_value in (None, 1e300, 1e-60):
        model = MLP([6, 4, 3], dtype=np.float32, seed=1)
        first = [p.copy() for p in model.parameters]
        model.fit(x.astype(np.float32), y, 2, 8, SGD(0.1, clip_value=clip_value))
        results.append(model.parameters)
    for no_limit, large, none, before in zip(*results, first, strict=True):
        np.testing.assert_allclose(large, no_limit, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(none, before)


@pytest.mark.parametrize("zeros", [0.0, 0.8])
@pytest.mark.parametrize("rule", ["sgd", "nesterov", "adamw"])
def test_same_bits_for_any_number_of_threads(
    rule: str, zeros: float, any_threads_backend: Any, dtype: Any, rng: Any
) -> None:
    x = (rng.normal(size=(150, 70)) * (rng.uniform(size=(150, 70)) >= zeros)).astype(dtype)
    y, results = rng.integers(0, 9, 150), []
    for threads in (1, 2, 3):
        gemmlet.set_num_threads(threads)
        any_threads_backend.set_num_threads(threads)
        model, optimizer = MLP([70, 130, 9], dtype=dtype, l1=1e-3, l2=1e-2), RULES[rule][0].fresh()
        optimizer.clip_value = 0.01
        history = model.fit(x, y, 2, 32, optimizer)
        results.append([*model.parameters, np.array(history.loss)])
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


def test_l1_makes_weights_small_that_predict_nothing(backend: Any, rng: Any) -> None:
    x = rng.normal(size=(200, 20))
    y = (x[:, 0] > 0).astype(np.int64)
    sizes = []
    for l1 in (0.0, 0.02):
        model = MLP([20, 2], dtype=np.float64, l1=l1)
        model.fit(x, y, 100, 50, SGD(0.1))
        sizes.append(np.abs(model.parameters[0][1:]).mean())
    assert sizes[1] < 0.1 * sizes[0]


def test_l1_alone_squares_nothing(backend: Any) -> None:
    """So that weights count whose squares are beyond float64."""
    model = MLP([3, 2], output="identity", dtype=np.float64, l1=1e-170)
    model.parameters[0][:] = 1e160
    history = model.fit(np.zeros((4, 3)), np.zeros((4, 2)), 1, optimizer=SGD(0.1))
    assert history.loss == pytest.approx([6e-10], rel=1e-12)


def test_both_optimizers_of_a_gan(backend: Any, rng: Any) -> None:
    """Decay of weights alone, and a step of each of which no number is larger than learning rate times limit."""
    x = rng.random((30, 7))
    gan = GAN(3, [5, 7], [6, 1], dtype=np.float64)
    before = [p.copy() for p in (*gan.generator_parameters, *gan.discriminator_parameters)]
    gan.fit(x, 1, 30, SGD(0.5, clip_value=1e-3), SGD(0.25, clip_value=1e-3, weight_decay=1.0))
    after = [*gan.generator_parameters, *gan.discriminator_parameters]
    steps = [a - b for a, b in zip(after, before, strict=True)]
    decayed = [s + 0.25 * b if s.ndim > 1 else s for s, b in zip(steps[4:], before[4:], strict=True)]
    for step, most in [*((s, 5e-4) for s in steps[:4]), *((s, 2.5e-4) for s in decayed)]:
        assert np.abs(step).max() <= most * (1 + 1e-9)
    assert np.abs(steps[0]).max() > 4.9e-4


# Files.


def test_files_keep_them(tmp_path: Path, rng: Any) -> None:
    rule = Adam(0.01, clip_value=0.25, decay_biases=True)
    model = MLP([6, 4, 3], l1=0.5, l2=0.25, default_optimizer=rule)
    x, y = problem(rng)
    model.fit(x, y, 1, optimizer=rule)
    model.save(tmp_path / "file", rule)
    loaded, optimizer = MLP.load(tmp_path / "file"), MLP.load_optimizers(tmp_path / "file")["optimizer"]
    assert (loaded.l1, loaded.l2, loaded.default_optimizer) == (0.5, 0.25, rule)
    assert optimizer == rule == make_optimizer(**rule.settings())
    assert loaded.loss_and_gradients(x, y)[0] == model.loss_and_gradients(x, y)[0]


def make_older(path: Path) -> None:
    """A file as it was before there was any of this."""
    with open(path, "rb") as file:
        metadata, tensors = load(file)
    header = parsed_header(metadata)
    config, extra = header["config"], header["extra"]
    del config["l1"], config["l2"]
    for settings in (
        config["default_optimizer"],
        extra["optimizers"]["optimizer"]["settings"],
        extra.get("fit", {}).get("optimizers", {}).get("optimizer"),
    ):
        for name in ("decay_biases", "clip_value") if settings else ():
            del settings[name]
    with open(path, "wb") as file:
        dump(file, tensors, {"gemmlet": json.dumps(header)})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_older_files_decay_biases(weight_decay: float, tmp_path: Path, rng: Any) -> None:
    rule, (x, y) = AdamW(0.01, weight_decay=weight_decay), problem(rng)
    model = MLP([6, 4, 3], default_optimizer=rule)
    model.fit(x, y, 1, optimizer=rule)
    model.save(tmp_path / "file", rule)
    make_older(tmp_path / "file")
    old = AdamW(0.01, weight_decay=weight_decay, decay_biases=weight_decay > 0)
    assert MLP.load(tmp_path / "file").default_optimizer == old
    assert MLP.load_optimizers(tmp_path / "file") == {"optimizer": old}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_older_checkpoints_go_on(weight_decay: float, tmp_path: Path, rng: Any) -> None:
    """With the optimizer that they are of."""
    x, y = problem(rng)

    def fit(epochs: int, **settings: Any) -> Any:
        model, rule = MLP([6, 4, 3]), Adam(**{"lr": 0.01, "weight_decay": weight_decay, **settings})
        model.fit(x, y, epochs, 8, rule, checkpoint=tmp_path / "file", resume=True)
        return model.parameters

    biases = weight_decay > 0
    fit(2, decay_biases=biases)
    make_older(tmp_path / "file")
    hint = r"; older versions decayed biases too: with decay_biases=True it goes on" if biases else ""
    with pytest.raises(ValueError, match=rf"optimizer\.decay_biases was {biases}, is {not biases}{hint}$"):
        fit(4, decay_biases=not biases)
    with pytest.raises(ValueError, match=r"optimizer\.lr was 0\.01, is 0\.02$"):
        fit(4, decay_biases=biases, lr=0.02)
    resumed = fit(4, decay_biases=biases)
    (tmp_path / "file").unlink()
    assert all(map(same_bits, resumed, fit(4, decay_biases=biases)))


@pytest.mark.parametrize(
    ("changes", "optimizer", "message"),
    [
        ({"l1": 0.0}, {}, r"l1 was 0\.5, is 0\.0"),
        ({"l2": 0.5}, {}, r"l2 was 0\.25, is 0\.5"),
        ({}, {"clip_value": None}, r"optimizer\.clip_value was 1\.0, is None"),
        ({}, {"decay_biases": True}, r"optimizer\.decay_biases was False, is True"),
    ],
)
def test_a_checkpoint_of_others_is_refused(
    changes: dict[str, Any], optimizer: dict[str, Any], message: str, tmp_path: Path, rng: Any
) -> None:
    x, y = problem(rng)

    def fit(epochs: int, network: dict[str, Any], settings: dict[str, Any]) -> Any:
        model = MLP([6, 4, 3], **{"l1": 0.5, "l2": 0.25, **network})
        history = model.fit(
            x, y, epochs, 8, Adam(**{"clip_value": 1.0, **settings}), checkpoint=tmp_path / "file", resume=True
        )
        return [*model.parameters, np.array(history.loss)]

    fit(2, {}, {})
    with pytest.raises(ValueError, match=message):
        fit(4, changes, optimizer)
    resumed = fit(4, {}, {})
    (tmp_path / "file").unlink()
    assert all(map(same_bits, resumed, fit(4, {}, {})))


# Bad arguments.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLP([2, 2], l1=-1.0), ValueError, r"l1 must be at least 0, got -1\.0"),
        (lambda: MLP([2, 2], l2=math.nan), ValueError, "l2 must be finite and at least 0, got nan"),
        (lambda: MLP([2, 2], l1="0.1"), TypeError, "l1 must be a real number, got str"),
        (lambda: setattr(MLP([2, 2]), "l2", None), TypeError, "l2 must be a real number, got NoneType"),
        (lambda: SGD(clip_value=0), ValueError, "clip_value must be above 0, got 0"),
        (lambda: AdamW(clip_value=math.inf), ValueError, "clip_value must be finite and above 0, got inf"),
        (lambda: ClipNorm(Adam(clip_value="1"), 1), TypeError, "clip_value must be a real number, got str"),
        (lambda: Adam(decay_biases=1), TypeError, "decay_biases must be True or False, got int"),
        (
            lambda: make_optimizer("sgd", decay_biases=None),
            TypeError,
            "decay_biases must be True or False, got NoneType",
        ),
    ],
)
def test_bad_arguments(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
