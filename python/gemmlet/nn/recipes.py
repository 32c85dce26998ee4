"""Whole trainings of classifiers of digits, as data: what reaches an accuracy in a time.

They were chosen by the last 10,000 training images, which were held out for that, never by test images. What they reach
is in docs/training.md; ``python benchmarks/recipes.py`` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .augment import Augment
from .fit import History
from .mlp import MLP
from .optimizers import SGD, Optimizer
from .schedules import Schedule, cosine_decay


@dataclass(frozen=True)
class Recipe:
    """A training of a classifier of 28x28 images, of ten classes.

    Attributes
    ----------
    hidden : tuple of int
        Widths of the hidden layers.
    epochs, batch_size : int
    optimizer : Optimizer
    lr_schedule : callable
    augment : Augment or None
    activation : str
    label_smoothing, ema_decay : float
        As `MLP` takes them.

    Examples
    --------
    >>> from gemmlet import data, nn
    >>> digits = data.load_mnist()  # doctest: +SKIP
    >>> model, history = nn.recipes.quick.train(digits.x_train, digits.y_train)  # doctest: +SKIP
    """

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int = 64
    optimizer: Optimizer = field(default_factory=lambda: SGD(0.05, momentum=0.9, nesterov=True))
    lr_schedule: Schedule = cosine_decay
    augment: Augment | None = field(default_factory=Augment)
    activation: str = "relu"
    label_smoothing: float = 0.0
    ema_decay: float = 0.0

    def network(self, seed: int = 0) -> MLP:
        """A network that has learnt nothing yet."""
        layers = [784, *self.hidden, 10]
        return MLP(layers, self.activation, seed=seed, label_smoothing=self.label_smoothing, ema_decay=self.ema_decay)

    def arguments(self) -> dict[str, Any]:
        """Those of `MLP.fit`, besides samples and labels."""
        names = "epochs", "batch_size", "lr_schedule", "augment"
        return {name: getattr(self, name) for name in names} | {"optimizer": self.optimizer.fresh()}

    def train(self, x: Any, y: Any, seed: int = 0, **more: Any) -> tuple[MLP, History]:
        """Train a network.

        Parameters
        ----------
        x : array_like of uint8, shape (n, 28, 28) or (n, 784)
        y : array_like of int, shape (n,)
            The classes, 0 to 9.
        seed : int
            Of the network, and so of all that is drawn.
        **more
            Other arguments of `MLP.fit`, which take the place of the recipe's.

        Returns
        -------
        MLP, History

        Raises
        ------
        TypeError, ValueError
            As `MLP.fit` does.
        """
        model, images = self.network(seed), np.asarray(x)
        if images.ndim == 2:
            images = images.reshape(-1, 28, 28)
        return model, model.fit(images, y, **self.arguments() | more)


quick = Recipe((384,), 60)
good = Recipe((512, 256), 60)
best = Recipe((512, 256), 240, optimizer=SGD(0.05, momentum=0.9, nesterov=True, weight_decay=5e-5))

RECIPES = {"quick": quick, "good": good, "best": best}
