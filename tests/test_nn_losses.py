"""The perceptron's choice of an elementwise loss: objective, gradients, training, files, and bad arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmlet.formulas.losses import LOSSES
from gemmlet.nn import MLP, SGD
from gemmlet.nn.mlp import OUTPUTS

CHOICES = [(output, loss) for output in ("sigmoid", "identity") for loss in OUTPUTS[output]]


def problem(output: str, model: MLP, rng: np.random.Generator, n: int = 9) -> tuple[Any, Any, Any]:
    """Samples, labels, and the labels as targets of an elementwise loss."""
    width = model.layers[-1]
    x = rng.normal(size=(n, model.layers[0])).astype(model.dtype)
    if output == "identity":
        y = rng.normal(scale=2, size=(n, width)).astype(model.dtype)
        return x, y, y
    y = rng.integers(0, max(width, 2), size=n)
    return x, y, y[:, np.newaxis] if width == 1 else np.eye(width)[y]


def test_the_outputs_have_their_losses() -> None:
    assert [losses[0] for losses in OUTPUTS.values()] == [
        "softmax_cross_entropy",
        "binary_cross_entropy_with_logits",
        "mean_squared_error",
    ]
    assert {"huber", "binary_cross_entropy_with_logits"} <= set(OUTPUTS["identity"])
    assert "binary_cross_entropy" not in {loss for losses in OUTPUTS.values() for loss in losses}
    for output, losses in OUTPUTS.items():
        assert MLP([3, 2], output=output).loss == losses[0]
        assert len(losses) == len(set(losses))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(("output", "loss"), CHOICES)
def test_objective_and_gradients(
    output: str, loss: str, width: int, backend: Any, dtype: Any, rng: np.random.Generator
) -> None:
    model = MLP([5, width], output=output, loss=loss, dtype=dtype, seed=1)
    x, y, targets = problem(output, model, rng)
    weight, bias = (p.astype(np.float64) for p in model.parameters)
    # The mean over the samples; over the outputs a sum with sigmoid, else the mean.
    count = len(x) * (width if output == "identity" else 1)
    entry = LOSSES[loss]
    values, slopes = entry.evaluate(x @ weight + bias, targets.astype(np.float64), entry.default, 1.0 / count)
    value, gradients = model.loss_and_gradients(x, y)
    tolerance = 64 * float(np.finfo(dtype).eps)
    assert value == pytest.approx(values.sum() / count, rel=tolerance)
    for gradient, exact in zip(gradients, (x.T @ slopes, slopes.sum(axis=0)), strict=True):
        assert np.abs(gradient - exact).max() <= tolerance * max(1.0, np.abs(exact).max())
    assert model.evaluate(x, y)["loss"] == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize(("output", "loss"), CHOICES)
def test_fit_takes_the_steps_of_its_gradients(
    output: str, loss: str, backend: Any, dtype: Any, rng: np.random.Generator
) -> None:
    model, stepped = (MLP([5, 7, 3], output=output, loss=loss, dtype=dtype, seed=2) for _ in range(2))
    x, y, _ = problem(output, model, rng, 8)
    history = model.fit(x, y, epochs=3, batch_size=8, optimizer=SGD(0.05), shuffle=False)
    for _ in range(3):
        _, gradients = stepped.loss_and_gradients(x, y)
        for parameter, gradient in zip(stepped.parameters, gradients, strict=True):
            parameter -= dtype.type(0.05) * gradient
    assert history.loss[-1] < history.loss[0]
    for mine, theirs in zip(model.parameters, stepped.parameters, strict=True):
        assert np.abs(mine - theirs).max() <= 64 * np.finfo(dtype).eps


@pytest.mark.parametrize(("output", "loss"), CHOICES)
def test_a_file_keeps_the_loss(output: str, loss: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = MLP([4, 2], output=output, loss=loss)
    x, y, _ = problem(output, model, rng)
    model.save(tmp_path / "model")
    loaded = MLP.load(tmp_path / "model")
    assert loaded.loss == loss
    assert loaded.evaluate(x, y)["loss"] == model.evaluate(x, y)["loss"]


def test_a_file_from_before_there_was_a_choice(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    numpy_files = pytest.importorskip("safetensors.numpy")
    model = MLP([4, 2], output="identity")
    model.save(tmp_path / "model")
    with safetensors.safe_open(tmp_path / "model", framework="numpy") as file:
        header = json.loads(file.metadata()["gemmlet"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["config"]["loss"]
    numpy_files.save_file(tensors, tmp_path / "older", {"gemmlet": json.dumps(header)})
    assert MLP.load(tmp_path / "older").loss == "mean_squared_error"


@pytest.mark.parametrize(
    ("output", "loss", "error", "message"),
    [
        ("softmax", "huber", ValueError, "loss 'huber' is unknown; the choices are softmax_cross_entropy"),
        ("sigmoid", "huber", ValueError, "the choices are binary_cross_entropy_with_logits"),
        ("identity", "binary_cross_entropy", ValueError, "the choices are mean_squared_error, "),
        ("identity", "quantile", ValueError, "loss 'quantile' is unknown"),
        (
            "identity",
            "wasserstein",
            ValueError,
            "loss 'wasserstein' has no minimum: .* the choices are mean_squared_error",
        ),
        ("identity", 1, TypeError, "loss must be a string, got int"),
    ],
)
def test_a_loss_that_does_not_fit(output: str, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MLP([3, 2], output=output, loss=loss)
