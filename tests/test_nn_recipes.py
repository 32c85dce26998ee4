"""Recipes: what they train, and the program that measures it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemmlet import data, nn
from gemmlet.data import mnist

SAMPLE = Path(mnist.__file__).parent / "sample"
PROGRAM = Path(__file__).parents[1] / "benchmarks" / "recipes.py"


def test_a_recipe_is_a_network_and_the_arguments_of_its_fit() -> None:
    digits = data.load_mnist(SAMPLE)
    x, y = digits.x_train[:300], digits.y_train[:300]
    recipe = replace(nn.recipes.quick, hidden=(16,), epochs=3, ema_decay=0.9)
    (model, history), other = recipe.train(x, y, seed=4), nn.MLP([784, 16, 10], "relu", seed=4, ema_decay=0.9)
    optimizer = nn.SGD(0.05, momentum=0.9, nesterov=True)
    expected = other.fit(x.reshape(-1, 28, 28), y, 3, 64, optimizer, nn.cosine_decay, augment=nn.Augment())
    assert history.loss == expected.loss
    np.testing.assert_array_equal(model.predict_proba(x), other.predict_proba(x))
    plain, _ = recipe.train(x.reshape(-1, 28, 28), y, seed=4, augment=None)
    assert not np.array_equal(plain.parameters[0], model.parameters[0])


@pytest.mark.parametrize("name", nn.recipes.RECIPES)
def test_recipes_learn(name: str) -> None:
    """Of 5,000 digits, in a few epochs; networks are as the same optimizer leaves them, whoever trained before."""
    digits, recipe = data.load_mnist(SAMPLE), nn.recipes.RECIPES[name]
    results = [recipe.train(digits.x_train, digits.y_train, epochs=3)[0] for _ in range(2)]
    assert results[0].evaluate(digits.x_test, digits.y_test)["accuracy"] > 0.93
    np.testing.assert_array_equal(results[0].parameters[0], results[1].parameters[0])


def test_the_program_measures_them() -> None:
    words = ["quick", "--seeds", "3", "--epochs", "1", "--data-dir", SAMPLE]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, check=True)
    digits = data.load_mnist(SAMPLE)
    accuracies = [
        nn.recipes.quick.train(digits.x_train, digits.y_train, seed, epochs=1)[0].evaluate(digits.x_test, digits.y_test)
        for seed in range(3)
    ]
    percent = [f"{100 * each['accuracy']:.2f}" for each in accuracies]
    for seed, accuracy in enumerate(percent):
        assert re.search(rf"^quick, seed {seed}: {accuracy}% of test images, [\d.]+ s$", done.stdout, re.MULTILINE)
    row = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    widths = "-".join(map(str, (784, *nn.recipes.quick.hidden, 10)))
    assert row[:4] == ["quick", widths, "1", ", ".join(percent)]
    assert row[4].startswith(f"{sorted(percent, key=float)[1]} (")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_program_times_pytorch() -> None:
    words = ["quick", "--seeds", "1", "--epochs", "1", "--pytorch", "--data-dir", SAMPLE]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1].strip("| ").split(" | ")[-1].replace(",", "")) > 0
