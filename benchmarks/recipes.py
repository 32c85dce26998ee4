"""What the recipes reach: the accuracy on the test images by seed, the median, and the seconds of a training.

    python benchmarks/recipes.py --seeds 5
    python benchmarks/recipes.py --held-out               by training images, the last 10,000, as a recipe is chosen
    python benchmarks/recipes.py --pytorch --seeds 1      PyTorch with torchvision by the same recipe, one epoch

A line for each training, then a table in Markdown. PyTorch's loop is the usual one, its dataset on the fly: torchvision
transforms image by image, in a DataLoader with as many workers as gemmlet has threads. Its seconds are of one epoch,
times the epochs of the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import gemmlet
from gemmlet import data, metrics, nn
from gemmlet.backends import select
from gemmlet.nn.optimizers import make_optimizer

HELD_OUT = 10_000

# A shift of a unit of torchvision's elastic field is half an image; noise that is uniform within [-1, 1] keeps this
# deviation when it is smoothed with sigma 4.
_SIGMA, _DEVIATION = 4.0, 3**-0.5 / (2 * np.pi**0.5 * 4.0)


def train(recipe: nn.recipes.Recipe, given: Sequence[Any], seed: int, epochs: int | None) -> tuple[float, float]:
    """The accuracy on the last two of (x, y, x, y) after training on the first two, and the seconds of that."""
    x, y, x_test, y_test = given
    model, history = recipe.train(x, y, seed, **({} if epochs is None else {"epochs": epochs}))
    return model.evaluate(x_test, y_test)["accuracy"], history.seconds


def pytorch_epoch(recipe: nn.recipes.Recipe, x: Any, y: Any) -> float:
    """The seconds of an epoch in PyTorch, images by torchvision; those of a part of the images, scaled."""
    import torch
    from torchvision.transforms import v2

    torch.set_num_threads(gemmlet.get_num_threads())
    part = min(len(x), 3200)
    images, labels = torch.from_numpy(x[:part].reshape(-1, 1, 28, 28)), torch.from_numpy(y[:part].astype(np.int64))
    a = recipe.augment
    assert a is not None
    assert (recipe.activation, recipe.label_smoothing, recipe.ema_decay) == ("relu", 0, 0)
    shift = (a.shift / 28, a.shift / 28)
    degrees = float(np.rad2deg(np.arctan(a.shear)))
    transform = v2.Compose(
        [
            v2.RandomAffine(a.rotate, shift, (1 - a.scale, 1 + a.scale), degrees, v2.InterpolationMode.BILINEAR),
            v2.ElasticTransform(2 * a.elastic / _DEVIATION, _SIGMA),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def batch(samples: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        pictures, classes = zip(*samples, strict=True)
        return torch.stack([transform(each) for each in pictures]), torch.stack(classes)

    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels),
        recipe.batch_size,
        shuffle=True,
        num_workers=gemmlet.get_num_threads(),
        collate_fn=batch,
        persistent_workers=True,
        multiprocessing_context="fork",  # others cannot take a local function
    )
    widths, layers = [784, *recipe.hidden, 10], list[Any]([torch.nn.Flatten()])
    for before, after in pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    network, settings = torch.nn.Sequential(*layers[:-1]), recipe.optimizer.settings()
    weights, biases = ([p for p in network.parameters() if (p.ndim > 1) == kind] for kind in (True, False))
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": settings["weight_decay"]}, {"params": biases}],
        settings["lr"],
        momentum=settings["momentum"],
        nesterov=settings["nesterov"],
    )

    def epoch() -> float:
        begin = time.perf_counter()
        for pictures, classes in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(pictures), classes).backward()
            optimizer.step()
        return time.perf_counter() - begin

    epoch()  # in which the workers start
    return epoch() * len(x) / part


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line names, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(nn.recipes.RECIPES), metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=5, metavar="COUNT")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED")
    parser.add_argument("--epochs", type=int, help="others than the recipe's")
    parser.add_argument("--weight-decay", type=float, help="another than the recipe's")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--held-out", action="store_true", help="measure by training images")
    parser.add_argument("--pytorch", action="store_true")
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args(words)
    if given.threads is not None:
        gemmlet.set_num_threads(given.threads)
    digits = data.load_mnist(given.data_dir)
    if given.held_out:
        x, y = digits.x_train, digits.y_train
        sets = x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]
    else:
        sets = digits.x_train, digits.y_train, digits.x_test, digits.y_test
    print(f"{digits.source}; {select.current().describe()['backend']}, {gemmlet.get_num_threads()} threads")
    judged, lines = "held-out images" if given.held_out else "test images", list[str]()
    for name in given.recipes:
        recipe = nn.recipes.RECIPES[name]
        if given.weight_decay is not None:
            optimizer = make_optimizer(**recipe.optimizer.settings() | {"weight_decay": given.weight_decay})
            recipe = replace(recipe, optimizer=optimizer)
        found = []
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            found.append(train(recipe, sets, seed, given.epochs))
            print(f"{name}, seed {seed}: {found[-1][0]:.2%} of {judged}, {found[-1][1]:.1f} s", flush=True)
        accuracies, seconds = zip(*found, strict=True)
        median = statistics.median(accuracies)
        low, high = metrics.wilson_interval(round(median * len(sets[3])), len(sets[3]))
        epochs = recipe.epochs if given.epochs is None else given.epochs
        row = [
            name,
            "-".join(map(str, (784, *recipe.hidden, 10))),
            str(epochs),
            ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies),
            f"{100 * median:.2f} ({100 * low:.2f} to {100 * high:.2f})",
            f"{statistics.median(seconds):.1f}",
        ]
        if given.pytorch:
            row.append(f"{pytorch_epoch(recipe, *sets[:2]) * epochs:,.0f}")
        lines.append("| " + " | ".join(row) + " |")
    head = ["recipe", "network", "epochs", f"% of {judged}, by seed", "median (95 % interval)", "seconds"]
    head += ["PyTorch with torchvision, seconds"] if given.pytorch else []
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
