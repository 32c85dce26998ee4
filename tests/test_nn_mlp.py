"""The multilayer perceptron: gradients against PyTorch, learning, files, and bad arguments."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.nn import GAN, MLP, SGD, Adam, ClipNorm, Optimizer, Progress, StopTraining
from support import same_bits


def digits() -> tuple[Any, ...]:
    """Scikit-learn's 8 × 8 digits as uint8 (0 to 255) and labels: every fifth to test, the others to train on."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = np.round(x * (255 / 16)).astype(np.uint8)
    test = np.arange(len(x)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


def torch_activation(name: str) -> Any:
    torch = pytest.importorskip("torch")
    functions = {
        "identity": lambda x: x,
        "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.01),
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "exp": torch.exp,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return functions[name] if name in functions else getattr(torch.nn.functional, name)


def torch_forward(parameters: list[Any], x: Any, activation: Any) -> Any:
    for i in range(0, len(parameters), 2):
        x = x @ parameters[i] + parameters[i + 1]
        if i + 2 < len(parameters):
            x = activation(x)
    return x


# Gradients.


def problem(rng: np.random.Generator, layers: list[int], output: str, n: int = 9) -> tuple[Any, Any]:
    x = rng.normal(size=(n, layers[0]))
    if output == "identity":
        return x, rng.normal(size=(n, layers[-1]))
    return x, rng.integers(0, max(layers[-1], 2), size=n)


def check_gradients(model: MLP, x: Any, y: Any) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    for bias in model.parameters[1::2]:  # zeros would hide a mistake
        bias[...] = np.linspace(-0.5, 0.5, len(bias))
    tensors = [torch.tensor(p, requires_grad=True) for p in model.parameters]
    outputs = torch_forward(tensors, torch.tensor(x), torch_activation(model.activation))
    if model.output == "softmax":
        expected = functional.cross_entropy(outputs, torch.tensor(y), label_smoothing=model.label_smoothing)
    elif model.output == "sigmoid":
        k = outputs.shape[1]
        wanted = torch.tensor(y)[:, None].double() if k == 1 else functional.one_hot(torch.tensor(y), k).double()
        expected = functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum") / len(x)
    else:
        expected = functional.mse_loss(outputs, torch.tensor(y))
    expected.backward()
    loss, gradients = model.loss_and_gradients(x, y)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert len(gradients) == len(tensors)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        exact = tensor.grad.numpy()
        assert np.abs(gradient - exact).max() <= 1e-10 * np.abs(exact).max()


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("layers", [[6, 4], [6, 5, 3], [5, 7, 4, 6, 3], [3, 4, 1]], ids=str)
def test_gradients_for_every_output_and_depth(
    layers: list[int], output: str, backend: object, rng: np.random.Generator
) -> None:
    if output == "softmax" and layers[-1] == 1:
        layers = [*layers[:-1], 2]
    check_gradients(MLP(layers, "tanh", output, dtype=np.float64), *problem(rng, layers, output))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_for_every_activation(activation: str, backend: object, rng: np.random.Generator) -> None:
    layers = [6, 8, 7, 4]
    check_gradients(MLP(layers, activation, dtype=np.float64, seed=1), *problem(rng, layers, "softmax"))


def test_gradients_with_a_parameter_of_the_activation(backend: object, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    model = MLP([4, 6, 3], "leaky_relu", dtype=np.float64, activation_parameter=0.3)
    x, y = problem(rng, model.layers, "softmax")
    tensors = [torch.tensor(p, requires_grad=True) for p in model.parameters]
    outputs = torch_forward(tensors, torch.tensor(x), lambda a: torch.nn.functional.leaky_relu(a, 0.3))
    torch.nn.functional.cross_entropy(outputs, torch.tensor(y)).backward()
    for gradient, tensor in zip(model.loss_and_gradients(x, y)[1], tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.1, 0.75])
@pytest.mark.parametrize("layers", [[6, 2], [6, 5, 4]], ids=str)
def test_gradients_with_label_smoothing(
    layers: list[int], smoothing: float, backend: object, rng: np.random.Generator
) -> None:
    model = MLP(layers, dtype=np.float64, label_smoothing=smoothing)
    x, y = problem(rng, layers, "softmax")
    check_gradients(model, x, y)
    assert model.evaluate(x, y)["loss"] == pytest.approx(model.loss_and_gradients(x, y)[0], rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_training_agrees_with_pytorch(smoothing: float, backend: object, rng: np.random.Generator) -> None:
    """Whole epochs, in the given order: the weights, and what the history says."""
    torch = pytest.importorskip("torch")
    model = MLP([5, 8, 3], "silu", dtype=np.float64, label_smoothing=smoothing)
    x, y = problem(rng, model.layers, "softmax", n=50)
    tensors = [torch.tensor(p, requires_grad=True) for p in model.parameters]
    theirs = torch.optim.Adam(tensors, lr=0.01)
    losses: list[list[float]] = [[], []]
    for epoch in range(2):
        for start in range(0, 50, 16):
            theirs.zero_grad()
            outputs = torch_forward(tensors, torch.tensor(x[start : start + 16]), torch.nn.functional.silu)
            labels = torch.tensor(y[start : start + 16])
            loss = torch.nn.functional.cross_entropy(outputs, labels, label_smoothing=smoothing)
            loss.backward()
            theirs.step()
            losses[epoch].append(loss.item())
    history = model.fit(x, y, epochs=2, batch_size=16, optimizer=Adam(0.01), shuffle=False)
    for param, tensor in zip(model.parameters, tensors, strict=True):
        np.testing.assert_allclose(param, tensor.detach().numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        history.loss, [np.average(epoch, weights=[16, 16, 16, 2]) for epoch in losses], rtol=1e-9
    )


# Initialisation and reproducibility.


@pytest.mark.parametrize(("activation", "limit"), [("tanh", math.sqrt(6 / 900)), ("relu", math.sqrt(6 / 400))])
def test_initialization(activation: str, limit: float) -> None:
    model = MLP([400, 500, 200], activation, seed=3)
    weight, bias, last, _ = model.parameters
    assert weight.shape == (400, 500)
    assert weight.dtype == np.float32
    assert 0.999 * limit < np.abs(weight).max() <= limit * (1 + 1e-6)
    assert weight.std() == pytest.approx(limit / math.sqrt(3), rel=0.01)
    assert abs(weight.mean()) < 0.01 * limit
    assert np.abs(last).max() == pytest.approx(math.sqrt(6 / 700), rel=1e-3)
    assert not bias.any()


def test_both_dtypes_start_from_the_same_weights() -> None:
    for single, double in zip(MLP([5, 4, 2]).parameters, MLP([5, 4, 2], dtype="float64").parameters, strict=True):
        assert same_bits(single, double.astype(np.float32))


def test_same_seed_same_bits(backend: object, rng: np.random.Generator) -> None:
    x, y = rng.uniform(size=(100, 6)).astype(np.float32), rng.integers(0, 3, 100)

    def trained(seed: int) -> list[Any]:
        model = MLP([6, 16, 3], seed=seed)
        model.fit(x, y, epochs=3, batch_size=16)
        return model.parameters

    one, two, other = trained(5), trained(5), trained(6)
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))
    assert not any(same_bits(a, b) for a, b in zip(one, other, strict=True))


def test_shuffling_changes_the_order() -> None:
    x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])

    def trained(shuffle: bool, epochs: int) -> Any:
        model = MLP([4, 2])
        model.fit(x, y, epochs=epochs, batch_size=1, optimizer=SGD(0.9, 0.5), shuffle=shuffle)
        return model.parameters[0]

    assert not same_bits(trained(True, 3), trained(False, 3))


def test_an_optimizer_object_keeps_its_state(rng: np.random.Generator) -> None:
    x, y = rng.uniform(size=(40, 6)).astype(np.float32), rng.integers(0, 3, 40)

    def trained(parts: list[int], optimizer: Any) -> Any:
        model = MLP([6, 3])
        for epochs in parts:
            model.fit(x, y, epochs=epochs, batch_size=8, optimizer=optimizer)
        return model.parameters[0]

    assert same_bits(trained([4], Adam()), trained([1, 3], Adam()))
    assert same_bits(trained([4], "adam"), trained([4], Adam()))
    assert not same_bits(trained([4], "adam"), trained([1, 3], "adam"))


# Moving averages of the parameters.


def loss_of(parameters: list[Any], x: Any, y: Any) -> float:
    """Of a network with one hidden layer of tanh, in float64."""
    first, bias, last, end = (p.astype(np.float64) for p in parameters)
    outputs = np.tanh(x @ first + bias) @ last + end
    outputs -= outputs.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(outputs).sum(axis=1)) - outputs[np.arange(len(y)), y]))


# Of SGD without weight decay, parameters whose gradient is 0 stay, but not their averages.
@pytest.mark.parametrize(("kind", "rule", "batch"), [
    ("dense", Adam(0.05, eps=1e-3), 8), ("zeros", Adam(0.05, eps=1e-3), 8), ("sparse", Adam(0.05, eps=1e-3), 8),
    ("zeros", SGD(0.5), 4), ("zeros", SGD(0.5), 1), ("sparse", SGD(0.5), 4), ("sparse", SGD(0.5), 1),
])  # fmt: skip
def test_moving_averages(
    kind: str, rule: Optimizer, batch: int, backend: object, dtype: Any, rng: np.random.Generator
) -> None:
    """By their recurrence, over two fits, from the parameters after each mini-batch; who looks changes no bit."""
    x, y = rng.normal(size=(44, 12)).astype(dtype), rng.integers(0, 3, 44)
    if kind != "dense":
        x[rng.uniform(size=x.shape) < 0.8] = 0
    given = pytest.importorskip("scipy.sparse").csr_matrix(x) if kind == "sparse" else x
    model, other, plain = (MLP([12, 7, 3], dtype=dtype, ema_decay=ema) for ema in (0.6, 0.6, 0.0))
    expected, step = [p.astype(np.float64) for p in model.parameters], 0

    def follow(progress: Progress) -> None:
        nonlocal step
        step += 1
        decay = min(0.6, (1 + step) / (10 + step))
        for average, param in zip(expected, model.parameters, strict=True):
            average[...] = decay * average + (1 - decay) * param

    rules = [rule.fresh() for _ in range(3)]
    for epochs in (2, 3):
        model.fit(given, y, epochs, batch, rules[0], callback=follow)
        other.fit(given, y, epochs, batch, rules[1])
        plain.fit(given, y, epochs, batch, rules[2])
    assert step == model.steps == other.steps == 5 * -(-44 // batch)
    averages = model._average.parameters
    for average, correct in zip(averages, expected, strict=True):
        np.testing.assert_allclose(average, correct, rtol=0, atol=100 * np.finfo(dtype).eps)
    assert all(map(same_bits, other._average.parameters, averages))
    # The parameters are the raw ones, as if nothing were averaged.
    assert all(map(same_bits, model.parameters, other.parameters))
    assert all(map(same_bits, model.parameters, plain.parameters))
    raw, _ = model.loss_and_gradients(given, y)
    assert raw == pytest.approx(loss_of(model.parameters, x, y), rel=1e-5)
    # Everything else uses the averages.
    used = MLP([12, 7, 3], dtype=dtype)
    for param, average in zip(used.parameters, averages, strict=True):
        param[...] = average
    assert model.evaluate(given, y) == used.evaluate(given, y)
    assert abs(model.evaluate(given, y)["loss"] - raw) > 1e-3
    for name in ("predict", "predict_proba", "features"):
        assert same_bits(getattr(model, name)(given), getattr(used, name)(given))
    # Validation, too; it changes nothing.
    history = model.fit(given, y, 1, 8, rules[0], validation_data=(given, y))
    assert history.validation_loss == [model.evaluate(given, y)["loss"]]
    other.fit(given, y, 1, 8, rules[1])
    assert all(map(same_bits, other._average.parameters, model._average.parameters))


# Samples.


def test_uint8_counts_as_a_fraction_of_255(backend: Any, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
    y = rng.integers(0, 10, 60)
    rows = images.reshape(60, 784).astype(np.float32) / 255
    results = []
    for x in (images, images.reshape(60, 784), rows):
        model = MLP([784, 12, 10], seed=2)
        history = model.fit(x, y, epochs=2, batch_size=16, validation_data=(x, y))
        results.append([*model.parameters, model.predict(x), model.predict_proba(x), model.features(x), history.loss])
        results[-1] += [history.validation_loss, list(model.evaluate(x, y).values())]
    assert all(same_bits(a, b) for a, b in zip(results[0], results[1], strict=True))
    for a, b in zip(results[0], results[2], strict=True):
        if backend.name == "cuda":  # a cluster takes bytes alone, and adds in another order than what takes floats
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert same_bits(a, b)


def test_any_strides_and_foreign_arrays(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = rng.uniform(size=(30, 8)).astype(np.float32)
    y = rng.integers(0, 4, 30)
    expected = MLP([8, 5, 4])
    expected.fit(x, y, epochs=2, batch_size=8)
    wide = np.zeros((30, 16), np.float32)
    wide[:, ::2] = x
    for rows, labels in (
        (np.asfortranarray(x), y.astype(np.uint8)),
        (wide[:, ::2], y.tolist()),
        (torch.tensor(x), torch.tensor(y)),
    ):
        model = MLP([8, 5, 4])
        model.fit(rows, labels, epochs=2, batch_size=8)
        assert same_bits(model.predict(rows), expected.predict(x))
        for a, b in zip(model.parameters, expected.parameters, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_images_are_never_expanded_as_a_whole() -> None:
    images = np.zeros((20_000, 784), np.uint8)
    images[:, ::7] = np.arange(20_000, dtype=np.int64)[:, np.newaxis] % 251
    y = np.arange(20_000) % 10
    model = MLP([784, 4, 10])
    expanded = images.size * 4
    tracemalloc.start()
    try:
        model.fit(images, y, epochs=1, batch_size=1000, validation_data=(images, y))
        model.predict(images)
        model.evaluate(images, y)
        model.predict_proba(images)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < expanded / 3


# Learning.


def test_learns_digits(backend: object) -> None:
    x, y, x_test, y_test = digits()
    model = MLP([64, 48, 10])
    history = model.fit(x, y, epochs=8, batch_size=32, optimizer=Adam(5e-3), validation_data=(x_test, y_test))
    assert [len(v) for v in (history.loss, history.accuracy, history.validation_loss, history.validation_accuracy)] == [
        8
    ] * 4
    assert history.loss[-1] < 0.1 < 1.0 < history.loss[0]
    assert history.accuracy[-1] > 0.97
    assert history.seconds > 0.0
    scores = model.evaluate(x_test, y_test)
    assert scores["accuracy"] > 0.95
    assert scores == {"loss": history.validation_loss[-1], "accuracy": history.validation_accuracy[-1]}
    classes = model.predict(x_test)
    assert classes.dtype == np.int64
    assert np.mean(classes == y_test) == scores["accuracy"]
    probabilities = model.predict_proba(x_test)
    assert probabilities.shape == (len(x_test), 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert same_bits(probabilities.argmax(axis=1), classes)
    of_labels = probabilities[np.arange(len(x_test)), y_test].astype(np.float64)
    assert -np.log(of_labels).mean() == pytest.approx(scores["loss"], rel=1e-4)


def test_sigmoid_outputs_learn_digits(backend: object) -> None:
    x, y, x_test, y_test = digits()
    model = MLP([64, 48, 10], output="sigmoid", default_optimizer=SGD(0.2), default_batch_size=16)
    model.fit(x, y, epochs=3)
    assert model.evaluate(x_test, y_test)["accuracy"] > 0.9
    p = model.predict_proba(x_test)
    assert p.shape == (len(x_test), 10)
    assert np.abs(p.sum(axis=1) - 1).max() > 0.01  # each stands for itself
    assert same_bits(p.argmax(axis=1), model.predict(x_test))


def test_one_sigmoid_output_tells_two_classes_apart(backend: object, rng: np.random.Generator) -> None:
    x = rng.normal(size=(400, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)
    model = MLP([2, 16, 1], output="sigmoid")
    model.fit(x, y, epochs=15, batch_size=16, optimizer=Adam(0.05))
    assert model.evaluate(x, y)["accuracy"] > 0.95
    p = model.predict_proba(x)
    assert p.shape == (400, 2)
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-6
    assert same_bits(model.predict(x), (p[:, 1] > 0.5).astype(np.int64))


@pytest.mark.parametrize("width", [1, 2])
def test_identity_outputs_fit_a_function(width: int, backend: object, rng: np.random.Generator) -> None:
    x = rng.uniform(-2, 2, size=(300, 1)).astype(np.float32)
    y = np.concatenate([np.sin(2 * x), x * x], axis=1)[:, :width]
    target = y[:, 0] if width == 1 else y
    model = MLP([1, 32, width], output="identity")
    history = model.fit(x, target, epochs=60, batch_size=32, optimizer=Adam(0.02))
    assert math.isnan(history.accuracy[-1])
    prediction = model.predict(x)
    assert prediction.shape == target.shape
    assert np.mean((prediction - target) ** 2) < 0.02 * np.var(target)
    scores = model.evaluate(x, target)
    assert scores["loss"] == pytest.approx(np.mean((prediction - target) ** 2), rel=1e-3)
    assert math.isnan(scores["accuracy"])
    if width == 1:
        assert model.evaluate(x, target[:, np.newaxis])["loss"] == scores["loss"]


def test_features_are_the_last_hidden_layer(rng: np.random.Generator) -> None:
    model = MLP([5, 7, 6, 3], dtype=np.float64)
    x = rng.normal(size=(1030, 5))
    features = model.features(x)
    assert features.shape == (1030, 6)
    logits = features @ model.parameters[4] + model.parameters[5]
    assert same_bits(logits.argmax(axis=1), model.predict(x))
    with pytest.raises(ValueError, match=r"features needs a hidden layer, this network has the layers \[5, 3\]"):
        MLP([5, 3], dtype=np.float64).features(x)


def test_no_samples_no_predictions() -> None:
    nothing = np.zeros((0, 5), np.float32)
    assert MLP([5, 4, 3]).predict(nothing).shape == (0,)
    assert MLP([5, 4, 3]).predict_proba(nothing).shape == (0, 3)
    assert MLP([5, 4, 3]).features(nothing).shape == (0, 4)
    assert MLP([5, 4, 3], output="identity").predict(nothing).shape == (0, 3)


def test_the_example_of_the_docstring(backend: object) -> None:
    results = doctest.testmod(importlib.import_module("gemmlet.nn.mlp"))
    assert results.attempted
    assert not results.failed


def test_classic() -> None:
    model = MLP.classic(seed=4)
    assert (model.layers, model.activation, model.output, model.seed) == ([784, 128, 10], "tanh", "sigmoid", 4)
    assert model.default_optimizer == SGD(0.1)
    images, y = np.eye(10, 784, dtype=np.uint8) * 255, np.arange(10)
    by_default, by_hand = MLP.classic(), MLP([784, 128, 10], output="sigmoid")
    by_default.fit(images, y, epochs=2)
    by_hand.fit(images, y, epochs=2, batch_size=model.default_batch_size, optimizer=SGD(0.1))
    assert all(same_bits(a, b) for a, b in zip(by_default.parameters, by_hand.parameters, strict=True))


# Callbacks.


def test_callback_is_told_of_every_mini_batch(rng: np.random.Generator) -> None:
    x, y = rng.uniform(size=(50, 4)).astype(np.float32), rng.integers(0, 2, 50)
    told: list[Progress] = []
    history = MLP([4, 2]).fit(x, y, epochs=2, batch_size=20, validation_data=(x, y), callback=told.append)
    assert [(p.epoch, p.epochs, p.batch, p.batches) for p in told] == [(e, 2, b, 3) for e in (1, 2) for b in (1, 2, 3)]
    assert [p.epoch_done for p in told] == [False, False, True] * 2
    assert [p.loss for p in told if p.epoch_done] == history.loss
    assert [p.accuracy for p in told if p.epoch_done] == history.accuracy
    assert [p.validation_loss for p in told] == [
        None,
        None,
        history.validation_loss[0],
        None,
        None,
        history.validation_loss[1],
    ]
    assert [p.validation_accuracy for p in told if p.epoch_done] == history.validation_accuracy
    assert all(0.0 < p.loss < 3.0 and 0.0 <= p.accuracy <= 1.0 for p in told)
    with pytest.raises(dataclasses.FrozenInstanceError):
        told[0].loss = 0.0


@pytest.mark.parametrize("batch", [2, 3])
def test_stop_training(batch: int, rng: np.random.Generator) -> None:
    x, y = rng.uniform(size=(50, 4)).astype(np.float32), rng.integers(0, 2, 50)
    told: list[Progress] = []

    def stop(progress: Progress) -> None:
        told.append(progress)
        if progress.epoch == 2 and progress.batch == batch:
            raise StopTraining

    model = MLP([4, 2])
    history = model.fit(x, y, epochs=5, batch_size=20, validation_data=(x, y), callback=stop)
    assert len(told) == 3 + batch
    assert history.loss == [told[2].loss, told[-1].loss]
    assert history.accuracy == [told[2].accuracy, told[-1].accuracy]
    assert len(history.validation_loss) == len(history.validation_accuracy) == 2
    assert math.isnan(history.validation_loss[1]) == (batch < 3)
    assert history.seconds > 0.0


def test_other_exceptions_pass() -> None:
    def fail(_: Progress) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        MLP([4, 2]).fit(np.zeros((3, 4), np.float32), [0, 1, 0], callback=fail)


def test_verbose_prints_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.eye(4, dtype=np.float32), [0, 1, 0, 1]
    MLP([4, 2]).fit(x, y, epochs=2, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "loss 0." in lines[0]
    assert "validation" not in lines[0]
    MLP([4, 2]).fit(x, y, epochs=1, verbose=True, validation_data=(x, y))
    assert "validation loss" in capsys.readouterr().out
    MLP([4, 2], output="identity").fit(x, x[:, :2], epochs=1, verbose=True, validation_data=(x, x[:, :2]))
    assert "accuracy" not in capsys.readouterr().out  # numbers are no classes
    MLP([4, 2]).fit(x, y, epochs=1)
    assert capsys.readouterr().out == ""


# Files.


@pytest.mark.parametrize(
    "model",
    [
        MLP([6, 5, 3]),
        MLP([6, 3], dtype=np.float64, seed=9),
        MLP([6, 5, 4, 1], "leaky_relu", "sigmoid", activation_parameter=0.25, default_optimizer=SGD(0.5, 0.9)),
        MLP([6, 5, 2], "gelu", "identity", default_batch_size=7, dropout=0.25),
        MLP([6, 5, 4, 2], dropout=[0.25, 0], input_dropout=0.125, input_noise=0.5),
        MLP([6, 5, 3], label_smoothing=0.25, ema_decay=0.75, default_optimizer=ClipNorm(SGD(0.5, 0.9), 0.125)),
    ],
    ids=lambda model: f"{model!r}{', averaged' if model.ema_decay else ''}",
)
def test_save_and_load(model: MLP, tmp_path: Path, rng: np.random.Generator) -> None:
    for param in [*model.parameters, *model._average.parameters]:
        param[...] = rng.normal(size=param.shape)
    model.steps = 5
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"an older file")
    model.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = MLP.load(str(path))
    assert repr(loaded) == repr(model)
    settings = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in (loaded, model)]
    assert settings[0] == settings[1]
    assert all(same_bits(a, b) for a, b in zip(loaded.parameters, model.parameters, strict=True))
    assert all(same_bits(a, b) for a, b in zip(loaded._average.parameters, model._average.parameters, strict=True))
    x = rng.normal(size=(4, 6)).astype(model.dtype)
    assert same_bits(loaded.predict(x), model.predict(x))
    y = np.zeros((4, 2), model.dtype) if model.output == "identity" else [0, 1, 0, 1]
    assert model.evaluate(x, y)["loss"] == loaded.evaluate(x, y)["loss"]
    for m in (loaded, model):
        m.fit(x, y, epochs=1, shuffle=False)
    assert all(same_bits(a, b) for a, b in zip(loaded._average.parameters, model._average.parameters, strict=True))


def write_file(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path.write_bytes(safetensors.save(tensors, metadata))


def good_file() -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        "layers": [2, 3],
        "activation": "tanh",
        "output": "softmax",
        "dtype": "float32",
        "seed": 0,
        "activation_parameter": None,
        "default_optimizer": {"name": "adam"},
        "default_batch_size": 64,
    }
    return config, {"0.weight": np.zeros((2, 3), np.float32), "0.bias": np.zeros(3, np.float32)}


def spoil(path: Path, how: str) -> None:
    """Write a file that is good except in one point."""
    config, tensors = good_file()
    header: Any = {"network": "MLP", "config": config}
    if how == "no config":
        header = {"network": "MLP"}
    elif how == "header is a list":
        header = []
    elif how == "other network":
        header["network"] = "GAN"
    elif how == "lacks a key":
        del config["layers"]
    elif how == "unknown key":
        config["depth"] = 3
    elif how == "unknown activation":
        config["activation"] = "cube"
    elif how == "unknown optimizer":
        config["default_optimizer"] = {"name": "magic"}
    elif how == "bad dtype":
        config["dtype"] = "int8"
    elif how == "bad widths":
        config["layers"] = [2, "x"]
    elif how == "no average":
        config |= {"ema_decay": 0.5, "steps": 3}
    elif how == "lacks steps":
        config["ema_decay"] = 0.0
    elif how == "bad norm":
        config["default_optimizer"]["max_norm"] = -1.0
    elif how == "huge":
        config["layers"] = [10**9, 10**9]
    elif how == "missing tensor":
        del tensors["0.bias"]
    elif how == "extra tensor":
        tensors["1.bias"] = np.zeros(3, np.float32)
    elif how == "wrong shape":
        tensors["0.weight"] = np.zeros((3, 2), np.float32)
    elif how == "wrong dtype":
        tensors["0.bias"] = np.zeros(3, np.float64)
    elif how == "no JSON":
        header = None
    metadata = None if how == "no metadata" else {"gemmlet": "{" if header is None else json.dumps(header)}
    write_file(path, tensors, metadata)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "foreign":
        path.write_bytes(b"\x93NUMPY and so on")
    elif how == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "how",
    [
        "no config",
        "header is a list",
        "other network",
        "lacks a key",
        "unknown key",
        "unknown activation",
        "unknown optimizer",
        "bad dtype",
        "bad widths",
        "no average",
        "lacks steps",
        "bad norm",
        "huge",
        "missing tensor",
        "extra tensor",
        "wrong shape",
        "wrong dtype",
        "no JSON",
        "no metadata",
        "truncated",
        "foreign",
        "empty",
    ],
)
def test_a_bad_file_is_named(how: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    spoil(path, "nothing")
    # Which is as files were before there were averages and label smoothing.
    model = MLP.load(path)
    assert (model.layers, model.steps, model.ema_decay, model.label_smoothing) == ([2, 3], 0, 0.0, 0.0)
    spoil(path, how)
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt, or no file of a gemmlet MLP: ."):
        MLP.load(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        MLP.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MLP([2, 2]).save(tmp_path / "nowhere" / "file")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        MLP([2, 2]).save(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_importing_loads_no_heavy_package() -> None:
    heavy = ["safetensors", "torch", "sklearn", "matplotlib"]
    code = f"import sys, gemmlet.nn; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Bad arguments.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([5],), ValueError, r"layers must have at least 2 widths, got \[5\]"),
        ((7,), TypeError, "layers must be a list of layer widths, got int"),
        (("784",), TypeError, "layers must be a list of layer widths, got str"),
        (([5, 0, 2],), ValueError, r"layers\[1\] must be at least 1, got 0"),
        (([5, 2.0],), TypeError, r"layers\[1\] must be an integer, got float"),
        (([5, True],), TypeError, r"layers\[1\] must be an integer, got bool"),
        (([5, 2], "cube"), ValueError, "activation 'cube' is unknown; the choices are identity, relu"),
        (([5, 2], None), TypeError, "activation must be a string, got NoneType"),
        (
            ([5, 2], "tanh", "linear"),
            ValueError,
            "output 'linear' is unknown; the choices are softmax, sigmoid, identity",
        ),
        (([5, 1],), ValueError, 'output "softmax" needs at least 2 outputs'),
    ],
)
def test_bad_arguments_of_the_constructor(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP(*arguments)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("dtype", np.int32, TypeError, "dtype must be float32 or float64"),
        ("dtype", "flaot32", TypeError, "dtype must be float32 or float64"),
        ("dtype", np.float16, TypeError, "dtype must be float32 or float64"),
        ("classes", ["a", "b", "c"], ValueError, "classes must be 2 different labels, as layers.* got 'a', 'b', 'c'"),
        ("classes", ["a", "a"], ValueError, "classes must be 2 different labels"),
        ("classes", ["a", 1], TypeError, r"classes\[1\] is 1, classes\[0\] is 'a'; labels must be all numbers"),
        ("classes", [0.5, 1], ValueError, r"classes\[0\] is 0\.5; labels must be whole numbers"),
        ("classes", "ab", TypeError, "classes must be a list of labels, got str"),
        ("multi_label", True, ValueError, 'multi_label needs output "sigmoid"'),
        ("seed", -1, ValueError, "seed must be at least 0, got -1"),
        ("seed", 0.5, TypeError, "seed must be an integer, got float"),
        (
            "activation_parameter",
            0.1,
            ValueError,
            "activation_parameter was given, but the activation 'tanh' takes none",
        ),
        ("label_smoothing", 1, ValueError, "label_smoothing must be below 1, got 1"),
        ("label_smoothing", -0.1, ValueError, r"label_smoothing must be within \[0, 1\], got -0\.1"),
        ("label_smoothing", None, TypeError, "label_smoothing must be a real number, got NoneType"),
        ("ema_decay", 1.0, ValueError, "ema_decay must be below 1, got 1"),
        ("ema_decay", math.nan, ValueError, r"ema_decay must be within \[0, 1\], got nan"),
        ("ema_decay", "slow", TypeError, "ema_decay must be a real number, got str"),
        ("default_optimizer", 1, TypeError, "default_optimizer must be a name or an optimizer of gemmlet.nn, got int"),
        ("default_optimizer", "lion", ValueError, "optimizer 'lion' is unknown"),
        ("default_batch_size", 0, ValueError, "default_batch_size must be at least 1, got 0"),
    ],
)
def test_bad_keywords_of_the_constructor(argument: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP([5, 2], **{argument: value})


X, Y = np.zeros((3, 4), np.float32), np.array([0, 1, 2])


def test_an_activation_parameter_beyond_the_dtype() -> None:
    """It is known with the samples, whose dtype the network follows."""
    for call in ("fit", "evaluate", "loss_and_gradients", "predict"):
        arguments = (X,) if call == "predict" else (X, Y)
        model = MLP([4, 6, 3], "leaky_relu", activation_parameter=1e300)
        with pytest.raises(ValueError, match=r"activation_parameter must be finite in float32, got 1e\+300"):
            getattr(model, call)(*arguments)
    MLP([4, 6, 3], "leaky_relu", activation_parameter=1e300).fit(X.astype(np.float64), Y)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.astype(complex)}, TypeError, "x has dtype complex128; expected real numbers"),
        ({"x": X.astype(object)}, TypeError, "x has dtype object; expected real numbers"),
        ({"x": X.astype(str)}, TypeError, "x has dtype <U32; expected real numbers"),
        ({"x": X.astype("M8[s]")}, TypeError, r"x has dtype datetime64\[s\]; expected real numbers"),
        ({"x": np.zeros((3, 4), [("a", "f4")])}, TypeError, "x has dtype .*; expected real numbers"),
        ({"x": np.ma.masked_array(X, X == 0)}, TypeError, "x is a masked array"),
        ({"x": X[:, :3]}, ValueError, r"x has shape \(3, 3\), expected \(n, 4\)"),
        ({"x": X[0]}, ValueError, r"x has shape \(4,\), expected \(n, 4\)"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "x is empty; expected at least one sample"),
        ({"y": Y[:2]}, ValueError, "x has 3 samples but y has 2 entries; they must match"),
        ({"y": [0, 3, 3]}, ValueError, r"y has 2 classes \(0, 3\), but the network has 3, .*y\[1\] is 3, not within 0"),
        ({"y": [0, -1, 0]}, ValueError, r"y has 2 classes \(-1, 0\), but .*y\[1\] is -1, not within 0 to 2"),
        ({"y": ["a", "b", "a"]}, ValueError, r"y has 2 classes \('a', 'b'\), but the network has 3, as layers\[-1\]"),
        ({"y": [True, False, True]}, ValueError, r"y has 2 classes \(False, True\), but the network has 3"),
        ({"y": [0.0, 1.5, 2.0]}, ValueError, r"y\[1\] is 1\.5; labels must be whole numbers"),
        ({"y": [0.0, 1.0, math.nan]}, ValueError, r"y\[2\] is nan; labels must be whole numbers"),
        ({"y": np.array(["a", "b", None])}, TypeError, r"y\[2\] is None; labels must be integers, whole floats, bools"),
        ({"y": [None, 0, 1]}, TypeError, r"y\[0\] is None; labels must be integers, whole floats, bools or strings$"),
        ({"y": [1j, 0, 1]}, TypeError, r"y\[0\] is 1j; labels must be integers, whole floats, bools or strings$"),
        ({"y": np.array([b"a", b"b", b"c"])}, TypeError, r"y has dtype \|S1; labels must be .* strings: decode bytes"),
        ({"y": [b"a", b"b", b"c"]}, TypeError, r"y\[0\] is b'a'; labels must be .* strings: decode bytes"),
        ({"y": ["a", b"b", "c"]}, TypeError, r"y\[1\] is b'b'; labels must be .* strings: decode bytes"),
        (
            {"y": [0, "a", 1]},
            TypeError,
            r"y\[1\] is 'a', y\[0\] is 0; labels must be all numbers, all bools or all str",
        ),
        ({"y": ("a", 0.5, "b")}, TypeError, r"y\[1\] is 0.5, y\[0\] is 'a'; labels must be all numbers"),
        ({"y": [[0], ["a"], [1]]}, TypeError, r"y\[1\] is 'a', y\[0\] is 0; labels must be all numbers"),
        ({"y": [0, True, 2]}, TypeError, r"y\[1\] is True, y\[0\] is 0; labels must be all numbers"),
        ({"y": [True, 2, 0]}, TypeError, r"y\[1\] is 2, y\[0\] is True; labels must be all numbers"),
        ({"y": np.zeros((3, 2), int)}, ValueError, r"y has shape \(3, 2\), expected \(n,\): .*, or rows \(n, 3\)"),
        ({"y": np.tri(3, dtype=int)}, ValueError, r"y\[1\] has 2 ones; expected rows of exactly one 1"),
        ({"y": np.eye(3) * 0.75}, ValueError, r"y\[0\] adds up to 0\.75; expected one-hot rows, or soft labels"),
        ({"y": np.eye(3) - 0.25}, ValueError, r"y\[0, 1\] is -0\.25; expected soft labels of at least 0"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, got float"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": "all"}, TypeError, "batch_size must be an integer, got str"),
        ({"optimizer": "lion"}, ValueError, "optimizer 'lion' is unknown; the choices are sgd, adam, adamw"),
        ({"optimizer": Adam}, TypeError, "optimizer must be a name or an optimizer of gemmlet.nn"),
        ({"validation_data": X}, TypeError, r"validation_data must be a pair \(x, y\), got ndarray"),
        ({"validation_data": (X, Y, Y)}, TypeError, r"validation_data must be a pair \(x, y\), got 3 items"),
        ({"validation_data": (X[:, :2], Y)}, ValueError, r"validation_data\[0\] has shape \(3, 2\)"),
        ({"validation_data": (X, Y + 1)}, ValueError, r"validation_data\[1\]\[2\] is 3; the classes of .* are 0, 1, 2"),
        ({"shuffle": "yes"}, TypeError, "shuffle must be True or False, got str"),
        ({"verbose": 3}, ValueError, "verbose must be 0, 1, 2, True or False, got 3"),
        ({"resume": None}, TypeError, "resume must be True, False or a path, got NoneType"),
        ({"resume": np.True_}, ValueError, "resume=True needs checkpoint, or give resume the path"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"callback_every": "step"}, ValueError, "callback_every 'step' is unknown; the choices are batch,"),
        ({"callback_every": 10}, TypeError, "callback_every must be a string, got int"),
        ({"lr_schedule": "linear"}, TypeError, "lr_schedule must be callable, got str"),
    ],
)
def test_bad_arguments_of_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = MLP([4, 3])
    before = [p.copy() for p in model.parameters]
    with pytest.raises(error, match=message):
        model.fit(**{"x": X, "y": Y} | changes)
    assert all(same_bits(a, b) for a, b in zip(before, model.parameters, strict=True))
    if not changes.keys() - {"x", "y"}:
        with pytest.raises(error, match=message):
            model.evaluate(**{"x": X, "y": Y} | changes)


def test_scalars_of_other_libraries_are_labels() -> None:
    y = [np.array(1), np.int8(0), 2]
    assert MLP([4, 3]).fit(X, y, 1).loss == MLP([4, 3]).fit(X, [1, 0, 2], 1).loss


@pytest.mark.parametrize(
    ("classes", "takes"), [(2, True), (3, False), ([False, True], True), ([1, 2, 3], False)], ids=str
)
def test_bools_are_labels_of_two_classes(classes: Any, takes: bool) -> None:
    """Before the first fit and after it, which has found indices, say."""
    model = MLP([4, classes]) if isinstance(classes, int) else MLP([4, len(classes)], classes=classes)
    for _ in range(2):
        for call in (model.evaluate, model.fit):
            if takes:
                call(X, [True, False, True])
            else:
                with pytest.raises(
                    ValueError, match=r"y has 2 classes \(False, True\)|y\[0\] is True; the classes of this"
                ):
                    call(X, [True, False, True])
        model.fit(X, [1, 1, 1])


@pytest.mark.parametrize(
    ("outputs", "y", "error", "message"),
    [
        (2, np.zeros(3, np.float32), ValueError, r"y has shape \(3,\), expected \(n, 2\)"),
        (2, np.zeros((3, 3), np.float32), ValueError, r"y has shape \(3, 3\), expected \(n, 2\)"),
        (1, np.zeros((3, 2), np.float32), ValueError, r"y has shape \(3, 2\), expected \(n,\)"),
        (1, [0, 1e39, 2], ValueError, r"y\[1, 0\] is 1e\+39, which is beyond the range of float32"),
        (1, ["a", "b", "c"], TypeError, "y has dtype <U1; expected real numbers"),
    ],
)
def test_bad_targets_of_identity_outputs(outputs: int, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP([4, outputs], output="identity").fit(X, y)


@pytest.mark.parametrize("output", ["sigmoid", "identity"])
def test_label_smoothing_is_for_softmax(output: str) -> None:
    with pytest.raises(ValueError, match=f'label_smoothing needs output "softmax", this network has {output!r}'):
        MLP([4, 2], output=output, label_smoothing=0.1)
    assert MLP([4, 2], output=output, label_smoothing=0.0).label_smoothing == 0.0


def test_one_sigmoid_output_has_two_classes() -> None:
    with pytest.raises(ValueError, match=r"y has 3 classes \(0, 1, 2\), but the network has 2"):
        MLP([4, 1], output="sigmoid").fit(X, Y)


def test_numbers_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match='predict_proba needs output "softmax" or "sigmoid"'):
        MLP([4, 1], output="identity").predict_proba(X)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "features"])
def test_bad_samples(method: str) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\), expected \(n, 4\)"):
        getattr(MLP([4, 4, 3]), method)(X[:, :2])
    with pytest.raises(ValueError, match=r"x has shape \(4,\), expected \(n, 1\), .*: x\.reshape\(-1, 1\)"):
        getattr(MLP([1, 4, 3]), method)(X[0])
    with pytest.raises(TypeError, match="x has dtype complex64"):
        getattr(MLP([4, 4, 3]), method)(X.astype(np.complex64))
    far = np.zeros((3000, 4))
    far[2500, 3] = -1e39
    with pytest.raises(ValueError, match=r"x\[2500, 3\] is -1e\+39, which is beyond the range of float32"):
        getattr(MLP([4, 4, 3], dtype=np.float32), method)(far)


def test_a_file_of_the_other_network(tmp_path: Path) -> None:
    path = tmp_path / "gan.safetensors"
    GAN(2, [3], [1]).save(path)
    with pytest.raises(ValueError, match=r"gan\.safetensors .*: it holds a GAN"):
        MLP.load(path)
