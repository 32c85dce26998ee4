"""Metrics that `fit` computes of validation data after each epoch, by name."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .. import metrics
from . import _checks as checks

Array = NDArray[Any]
Metric = Callable[[Any, Any], float]


def _of_classes(index: int, average: str) -> Metric:
    """One of precision, recall and F1, of the most probable class."""

    def metric(y_true: Array, y_score: Array) -> float:
        scores = metrics.precision_recall_fscore_support(y_true, y_score.argmax(axis=1), average=average)
        return float(scores[index])

    return metric


# Of class indices (n,) and probabilities (n, classes).
OF_CLASSES: dict[str, Metric] = {
    "macro_precision": _of_classes(0, "macro"),
    "macro_recall": _of_classes(1, "macro"),
    "macro_f1": _of_classes(2, "macro"),
    "weighted_f1": _of_classes(2, "weighted"),
    "roc_auc": metrics.roc_auc_score,
    "top_2_accuracy": partial(metrics.top_k_accuracy_score, k=2),
    "log_loss": metrics.log_loss,
    "brier_score": metrics.brier_score_loss,
    "calibration_error": metrics.calibration_error,
}
# Of numbers (n, outputs), and what is predicted.
OF_NUMBERS: dict[str, Metric] = {
    "mean_squared_error": metrics.mean_squared_error,
    "mean_absolute_error": metrics.mean_absolute_error,
    "r2": metrics.r2_score,
}


def checked(value: Any, known: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the argument `metrics` of `fit` as functions by name."""
    if type(value) is tuple and not value:  # the usual case
        return {}
    if isinstance(value, Mapping):
        for name, function in value.items():
            if not isinstance(name, str) or not name.isidentifier() or name in ("loss", "accuracy"):
                raise ValueError(f"metrics has the name {name!r}; expected an identifier, neither loss nor accuracy")
            if not callable(function):
                raise TypeError(f"metrics[{name!r}] must be callable, got {type(function).__name__}")
        return dict(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"metrics must be a list of names or a mapping of functions, got {type(value).__name__}")
    if value and not known:
        raise ValueError("metrics by name need one class for each sample; give functions by name")
    return {checks.choice(name, f"metrics[{i}]", known): known[name] for i, name in enumerate(value)}


def measured(functions: Mapping[str, Metric], targets: Array, outputs: Array) -> dict[str, float]:
    """What the functions give, by their names in the history; of one output the probabilities of both classes."""
    scores = arguments.on_cpu(outputs).astype(np.float64)
    if targets.ndim == 1 and scores.shape[1] == 1:
        scores = np.hstack([1 - scores, scores])
    found = dict[str, float]()
    for name, function in functions.items():
        value: Any = function(targets.copy(), scores.copy())  # a function of the caller's may change them
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
            raise TypeError(f"what metrics[{name!r}] returns must be a real number, got {type(value).__name__}")
        found[f"validation_{name}"] = float(value)
    return found
