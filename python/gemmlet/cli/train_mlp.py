"""What ``gemmlet train mlp`` does, from checked options to the files in ``--out``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .. import nn
from . import evaluation
from .common import percent
from .errors import UserError
from .training import Array, Defaults, Options, Watch

# With a rate that falls to 0, Adam may start with more than its usual 1e-3.
_OPTIMIZERS = {"sgd": nn.SGD(0.1), "adam": nn.Adam(3e-3), "adamw": nn.AdamW(3e-3)}
DEFAULTS = Defaults((256,), ("relu",), 10, 64, "adam", _OPTIMIZERS, lr_decay=True)
CLASSIC = Defaults((128,), ("tanh",), 10, 16, "sgd", _OPTIMIZERS, lr_decay=False)

# The share of the training images that the learning curves are measured on, and that the network never learns from.
HELD_OUT = 0.1


def run(options: Options) -> int:
    """Train an MLP, write the results to the folder ``--out`` and return the exit status."""
    watch = Watch(nn.MLP, options, DEFAULTS, CLASSIC)
    settings, data = watch.settings, watch.data
    schedule: nn.schedules.Schedule | None = nn.linear_decay if settings.lr_decay else None
    kept, held_out = hold_out(len(data.y_train), settings.seed)
    if settings.patience is not None and not len(held_out):
        raise UserError(f"--patience: of {len(kept)} images none is held out")
    if settings.recipe is not None:
        recipe = nn.recipes.RECIPES[settings.recipe]
        model, schedule = recipe.network(settings.seed), recipe.lr_schedule
        kept, held_out = np.arange(len(data.y_train)), np.arange(0)
    elif settings.classic:
        model = nn.MLP.classic(seed=settings.seed)
    else:
        model = nn.MLP([784, *settings.hidden, 10], *settings.activation, seed=settings.seed)
    model.l1, model.l2 = settings.l1, settings.l2
    model.dropout, model.input_dropout = settings.dropout, settings.input_dropout

    def callback(p: nn.Progress) -> None:
        watch.see(p, {"loss": p.loss, "accuracy": p.accuracy, "held out": p.validation_accuracy})

    with watch:
        with watch.bar():
            fit = partial(
                model.fit,
                data.x_train[kept].reshape(-1, 28, 28),
                data.y_train[kept],
                lr_schedule=schedule,
                validation_data=(data.x_train[held_out], data.y_train[held_out]) if len(held_out) else None,
                callback=callback,
                augment=settings.augment,
                early_stopping=settings.early_stopping,
            )
            history = watch.fit(model, fit)
        _finish(model, history, watch)
        return watch.end()


def hold_out(count: int, seed: int) -> tuple[Array, Array]:
    """Divide positions 0 to `count` at random into those to train with and the share `HELD_OUT`, each ascending."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = int(count * HELD_OUT)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _finish(model: nn.MLP, history: nn.History, watch: Watch) -> None:
    """Measure the network on the test images, and write and show what came out."""
    data = watch.data
    probabilities = model.predict_proba(data.x_test)
    # Not the largest probability: several sigmoids may be rounded to 1.
    predicted = model.predict(data.x_test)
    scores: dict[str, Any] = {"test_accuracy": float((predicted == data.y_test).mean())}
    curves: list[evaluation.RocCurve] = []
    with watch.attempting("scores"):
        scores |= evaluation.classification(data.y_test, predicted, probabilities)
        curves = evaluation.roc_curves(data.y_test, probabilities)
    scores["layers"] = model.layers
    watch.write_metrics(scores)
    area = scores.get("roc_auc")
    watch.show(
        f"On {len(data.y_test):,} test images",
        {
            "accuracy": percent(scores["test_accuracy"]),
            "accuracy (95 % interval)": " to ".join(map(percent, scores.get("test_accuracy_interval", ()))) or "-",
            "precision (macro)": percent(scores.get("macro_precision")),
            "recall (macro)": percent(scores.get("macro_recall")),
            "F1 (macro)": percent(scores.get("macro_f1")),
            "ROC AUC (one against the rest)": "-" if area is None else f"{area:.5f}",
            "training time": f"{history.seconds:.1f} s",
        },
    )
    with watch.attempting("pictures"):
        plots = watch.plots()
        watch.draw(plots.learning_curves, "learning_curves.png", history)
        watch.draw(plots.confusion_matrix, "confusion_matrix.png", data.y_test, predicted)
        watch.draw(plots.roc_curves, "roc_curves.png", curves, len(data.y_test))
        watch.draw(plots.worst_mistakes, "worst_mistakes.png", data.x_test, data.y_test, predicted, probabilities)
