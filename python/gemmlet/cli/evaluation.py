"""How good a classifier is, and how good the samples of a generator are, as the commands show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import metrics
from .common import finite

Array = NDArray[Any]

# A sample counts as confident if the classifier gives its class at least this probability.
CONFIDENT = 0.9

# The bins of the calibration error, and how often samples are drawn anew for an interval: of F1, and of the area under
# the ROC curve, which takes twenty times as long.
BINS, RESAMPLES, RESAMPLES_OF_AREA = 15, 1000, 200


@dataclass(frozen=True)
class RocCurve:
    """One class against the rest: `true_positive` over `false_positive` rates, and the area `auc` under it."""

    label: int
    false_positive: Array
    true_positive: Array
    auc: float


def roc_curves(labels: Array, probabilities: Array) -> list[RocCurve]:
    """One curve for each class that some rows have and others have not.

    The rows of `probabilities` (n, classes) need not sum to 1: sigmoid outputs do not.
    """
    curves = []
    for label in range(probabilities.shape[1]):
        positive, scores = labels == label, probabilities[:, label]
        if positive.any() and not positive.all():
            false_positive, true_positive, _ = metrics.roc_curve(positive, scores)
            curves.append(RocCurve(label, false_positive, true_positive, metrics.roc_auc_score(positive, scores)))
    return curves


def report(labels: Array, predicted: Array, probabilities: Array) -> metrics.ClassificationReport:
    """What is known of a classifier whose classes are the columns of `probabilities` (n, classes)."""
    classes = np.arange(probabilities.shape[1])
    return metrics.classification_report(labels, predicted, probabilities, labels=classes)


def classification(labels: Array, predicted: Array, probabilities: Array) -> dict[str, Any]:
    """The scores that ``metrics.json`` has, None where there is no value."""
    found = report(labels, predicted, probabilities)
    return {
        "test_accuracy": found.accuracy,
        "test_accuracy_interval": list(found.accuracy_interval),
        "macro_precision": found.macro.precision,
        "macro_recall": found.macro.recall,
        "macro_f1": found.macro.f1,
        "roc_auc": finite(found.macro.roc_auc),
    }


def sample_quality(probabilities: Array, features: Array, real_features: Array) -> dict[str, Any]:
    """Judge samples by what a digit classifier makes of them: the `probabilities` (n, 10) that it gives them.

    Features are those of its last hidden layer, for the samples (n, features) and for real digits (m, features).
    """
    digits = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])
    return {
        "confident_share": float((probabilities.max(axis=1) >= CONFIDENT).mean()),
        "class_shares": (digits / len(probabilities)).tolist(),
        "frechet_distance": metrics.frechet_distance(features, real_features),
    }
