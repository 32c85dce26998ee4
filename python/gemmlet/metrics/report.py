"""All about a classifier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _checks as checks
from ._checks import Array
from .classes import confusion_matrix, precision_recall_fscore_support
from .curves import roc_auc_score
from .intervals import Interval, wilson_interval


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class, or a mean over classes.

    Attributes
    ----------
    label : object
        Of the class; of a mean its kind, ``"macro"`` or ``"weighted"``.
    precision, recall, f1 : float
        See `precision_recall_fscore_support`.
    support : float
        How many samples are of the class.
    roc_auc : float or None
        See `roc_auc_score`; None without probabilities, and NaN where it has no value.
    """

    label: Any
    precision: float
    recall: float
    f1: float
    support: float
    roc_auc: float | None = None


@dataclass(frozen=True)
class ClassificationReport:
    """What `classification_report` finds; ``print`` shows it as a table.

    Attributes
    ----------
    accuracy : float
    accuracy_interval : Interval
        95 %, by `wilson_interval`.
    classes : tuple of ClassScores
    macro, weighted : ClassScores
        Means over the classes that occur among labels or predictions, each counting the same, or by its support.
    confusion : ndarray, shape (classes, classes)
        See `confusion_matrix`.
    """

    accuracy: float
    accuracy_interval: Interval
    classes: tuple[ClassScores, ...]
    macro: ClassScores
    weighted: ClassScores
    confusion: Array

    def confusions(self, most: int = 5) -> list[tuple[Any, Any, int]]:
        """The most frequent mistakes: label, what was predicted, and how often."""
        wrong = self.confusion * ~np.eye(len(self.classes), dtype=bool)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        named = [self.classes[i].label for i in range(len(self.classes))]
        pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [(named[i], named[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table's rows, the heading first."""
        with_area = self.macro.roc_auc is not None
        yield ("class", "precision", "recall", "F1", "support") + ("ROC AUC",) * with_area
        for scores in (*self.classes, self.macro, self.weighted):
            numbers = (f"{number:.2%}" for number in (scores.precision, scores.recall, scores.f1))
            area = () if scores.roc_auc is None else (f"{scores.roc_auc:.5f}",)
            yield (str(scores.label), *numbers, f"{scores.support:.12g}", *area)

    def __str__(self) -> str:
        rows = list(self.rows())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        low, high = self.accuracy_interval
        return "\n".join([f"accuracy {self.accuracy:.2%} (95 %: {low:.2%} to {high:.2%})", "", *lines])


def classification_report(
    y_true: ArrayLike, y_pred: ArrayLike, y_score: ArrayLike | None = None, *, labels: ArrayLike | None = None
) -> ClassificationReport:
    """Accuracy, and for each class precision, recall, F1, support, and with `y_score` the area under the ROC curve.

    Parameters
    ----------
    y_true, labels
        See the module.
    y_pred : array_like, shape (n,)
    y_score : array_like, shape (n, classes), optional

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred")
    if y_score is None:
        classes, areas = checks.classes_of(labels, true, predicted), None
    else:
        scores = checks.as_scores(y_score, len(true), 2)
        classes = checks.classes_of_columns(true, scores.shape[1], labels)
        areas = roc_auc_score(true, scores, average=None, labels=classes).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(true, predicted, labels=classes)
    each = tuple(
        ClassScores(label, float(precision[i]), float(recall[i]), float(f1[i]), float(support[i]), areas and areas[i])
        for i, label in enumerate(classes.tolist())
    )
    means = {}
    # As in scikit-learn the mean is over the classes that occur, also where columns stand for others too.
    occurring = classes[np.isin(classes, np.concatenate([true, predicted]))]
    for kind in ("macro", "weighted"):
        mean = precision_recall_fscore_support(true, predicted, labels=occurring, average=kind)
        area = None if y_score is None else roc_auc_score(true, y_score, average=kind, labels=classes)
        means[kind] = ClassScores(kind, *mean[:3], float(support.sum()), area)
    correct = int(np.count_nonzero(true == predicted))
    confusion = confusion_matrix(true, predicted, labels=classes)
    interval = wilson_interval(correct, len(true))
    return ClassificationReport(correct / len(true), interval, each, means["macro"], means["weighted"], confusion)
