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


def classification(labels: Array, predicted: Array, probabilities: Array) -> dict[str, Any]:
    """The scores that ``metrics.json`` has, None where there is no value.

    Macro averages are over the classes that occur in either.
    """
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(labels, predicted, average="macro")
    correct = int(np.count_nonzero(labels == predicted))
    return {
        "test_accuracy": correct / len(labels),
        "test_accuracy_interval": list(metrics.wilson_interval(correct, len(labels))),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "roc_auc": finite(metrics.roc_auc_score(labels, probabilities)),
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
