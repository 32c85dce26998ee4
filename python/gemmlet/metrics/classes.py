"""Metrics of predicted classes."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks as checks
from ._checks import Array, Floats


def accuracy_score(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The share of samples whose prediction is their label.

    With rows of several labels (n, classes) a sample counts if its whole row is right.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred", allow_rows=True)
    correct = (true == predicted).reshape(len(true), -1).all(axis=1)
    return checks.mean(correct.astype(np.float64), checks.as_weights(sample_weight, len(true)))


def confusion_matrix(
    y_true: ArrayLike, y_pred: ArrayLike, *, labels: ArrayLike | None = None, sample_weight: ArrayLike | None = None
) -> Array:
    """How many samples of class i were predicted to be of class j, at (i, j).

    Samples of which label or prediction are not among `labels` are left out.

    Returns
    -------
    ndarray, shape (classes, classes)
        int64, or float64 with `sample_weight`.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred")
    classes = checks.classes_of(labels, true, predicted)
    at, there = checks.positions(true, classes), checks.positions(predicted, classes)
    known, count = (at >= 0) & (there >= 0), len(classes)
    weights = None if sample_weight is None else checks.as_weights(sample_weight, len(true))[known]
    counts = np.bincount(at[known] * count + there[known], weights, count * count)
    return counts.reshape(count, count)


def precision_recall_fscore_support(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    average: str | None = None,
    sample_weight: ArrayLike | None = None,
    zero_division: Any = 0.0,
) -> tuple[Any, Any, Any, Any]:
    """Precision, recall, F1 and support of each class.

    Precision is the share of the samples predicted to be of the class that are, recall the share of those of the class
    that are predicted to be, F1 their harmonic mean, support how many samples are of the class.

    Parameters
    ----------
    y_true, y_pred, labels, sample_weight
        See the module.
    average : {None, "macro", "weighted", "micro"}
        With macro the mean over the classes, with weighted that mean by support, with micro one of all classes taken
        together. The support is None then.
    zero_division : {0, 1, NaN}
        What stands where a class is never predicted, or never there. NaN is left out of means.

    Returns
    -------
    precision, recall, f1, support
        Arrays (classes,), or floats and None.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred")
    classes = checks.classes_of(labels, true, predicted)
    weights = checks.as_weights(sample_weight, len(true))
    if not isinstance(zero_division, Real) or not (math.isnan(zero_division) or zero_division in (0, 1)):
        raise ValueError(f"zero_division must be 0, 1 or NaN, got {zero_division!r}")
    zero_division = float(zero_division)
    at, there, count = checks.positions(true, classes), checks.positions(predicted, classes), len(classes)

    def total(positions: NDArray[np.int64], counted: NDArray[np.bool_]) -> Floats:
        return checks.sums(positions[counted], weights[counted], count)

    hits = total(at, (at >= 0) & (at == there))
    support, found = total(at, at >= 0), total(there, there >= 0)
    if average == "micro":
        hits, support, found = (np.atleast_1d(each.sum()) for each in (hits, support, found))
    precision, recall = checks.ratio(hits, found, zero_division), checks.ratio(hits, support, zero_division)
    f1 = checks.ratio(2 * hits, found + support, zero_division)
    if average is None:
        return precision, recall, f1, support if sample_weight is not None else support.astype(np.int64)
    if average not in ("macro", "weighted", "micro"):
        raise ValueError(f"average must be None, 'macro', 'weighted' or 'micro', got {average!r}")
    if average == "weighted" and not support.any():
        return zero_division, zero_division, zero_division, None
    shares = support if average == "weighted" else None
    means = [_mean_of_known(each, shares) for each in (precision, recall, f1)]
    return means[0], means[1], means[2], None


def _mean_of_known(values: Floats, weights: Floats | None) -> float:
    """The mean without NaN, which classes have where `zero_division` is NaN; NaN of nothing else."""
    known = ~np.isnan(values)
    if not known.any() or (weights is not None and not weights[known].any()):
        return math.nan
    return float(np.average(values[known], weights=None if weights is None else weights[known]))


def top_k_accuracy_score(
    y_true: ArrayLike,
    y_score: ArrayLike,
    *,
    k: int = 2,
    labels: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> float:
    """The share of samples whose class is among the `k` of the highest score, of equal scores those of later columns.

    Parameters
    ----------
    y_true, labels, sample_weight
        See the module. By default the columns are the classes 0, 1, ...
    y_score : array_like, shape (n, classes)
    k : int, at least 1

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    at, scores, weights = checks.of_columns(y_true, y_score, labels, sample_weight)
    k = checks.count(k, "k")
    own = scores[np.arange(len(at)), at][:, np.newaxis]
    later = np.arange(scores.shape[1]) > at[:, np.newaxis]
    ahead = np.count_nonzero((scores > own) | ((scores == own) & later), axis=1)
    return checks.mean((ahead < k).astype(np.float64), weights)
