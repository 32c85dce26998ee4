"""Scores of one class against the rest: curves over all thresholds, and the areas under them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _checks as checks
from ._checks import Array, Floats


def roc_curve(
    y_true: ArrayLike, y_score: ArrayLike, *, pos_label: Any = None, sample_weight: ArrayLike | None = None
) -> tuple[Floats, Floats, Floats]:
    """The receiver operating characteristic: true against false positive rates as the threshold falls.

    Parameters
    ----------
    y_true : array_like, shape (n,)
        Bools, or 0 and 1; else `pos_label` says which label is positive, and all others are negative.
    y_score : array_like, shape (n,)
        Higher means positive. Not NaN.
    sample_weight
        See the module.

    Returns
    -------
    false_positive_rate, true_positive_rate, thresholds : ndarray, shape (points,)
        From (0, 0), at a threshold of infinity, to (1, 1): where ``y_score >= threshold`` is called positive. One point
        for each different score, but for those on a straight line between others. Rates are NaN where there are no
        samples of the kind.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    hits, false, thresholds = _cumulative(y_true, y_score, pos_label, sample_weight)
    if len(hits) > 2:
        # A point is left out if the curve goes on in the same direction.
        bends = np.diff(hits, 2).astype(bool) | np.diff(false, 2).astype(bool)
        kept = np.flatnonzero(np.concatenate(([True], bends, [True])))
        hits, false, thresholds = hits[kept], false[kept], thresholds[kept]
    hits, false = (np.concatenate(([0.0], each)) for each in (hits, false))
    rates = [each / each[-1] if each[-1] else np.full(each.shape, math.nan) for each in (false, hits)]
    return rates[0], rates[1], np.concatenate(([math.inf], thresholds))


def auc(x: ArrayLike, y: ArrayLike) -> float:
    """The area under a curve by the trapezoidal rule; `x` ascends or descends.

    Raises
    ------
    TypeError, ValueError
        There are fewer than two points, `x` does neither, or something is no finite number.
    """
    xs, ys = checks.same_shape(x, y, "x", "y", numbers=True)
    if len(xs) < 2:
        raise ValueError(f"x must have at least 2 points, got {len(xs)}")
    steps = np.diff(xs)
    if not ((steps >= 0).all() or (steps <= 0).all()):
        raise ValueError("x must ascend or descend; sort the points first")
    return math.fsum(steps * (ys[1:] + ys[:-1]) / 2) * (-1 if (steps < 0).any() else 1)


def roc_auc_score(
    y_true: ArrayLike,
    y_score: ArrayLike,
    *,
    average: str | None = "macro",
    labels: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> Any:
    """The area under the ROC curve: how probably a positive sample has a higher score than a negative one.

    Parameters
    ----------
    y_true, labels, sample_weight
        See the module. With one column of scores the second of the two classes is positive.
    y_score : array_like, shape (n,) or (n, classes)
        Of several columns each class is taken against the rest (Provost and Domingos, 2000). Rows need not sum to 1.
    average : {"macro", "weighted", None}
        The mean over the classes, that mean by support, or an array (classes,).

    Returns
    -------
    float or ndarray
        NaN where all samples, or none, are of the class. Averages leave such classes out; where all are, they are NaN.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    if average not in (None, "macro", "weighted"):
        raise ValueError(f"average must be None, 'macro' or 'weighted', got {average!r}")
    if checks.is_one_column(y_score):
        true = checks.as_vector(checks.as_labels(y_true, "y_true"), "y_true")
        classes = checks.classes_of(labels, true)
        if len(classes) > 2 or (labels is not None and len(classes) < 2):
            raise ValueError(f"y_true must have two classes where y_score is one column, got {len(classes)}")
        if len(classes) < 2:
            checks.as_scores(y_score, len(true), 1)
            return math.nan
        if (at := checks.positions(true, classes)).min() < 0:
            raise ValueError(f"y_true has the label {true[at < 0][0].item()!r}, which labels has not")
        return _area(at == 1, y_score, sample_weight)
    at, scores, weights = checks.of_columns(y_true, y_score, labels, sample_weight)
    areas = np.array([_area(at == column, scores[:, column], weights) for column in range(scores.shape[1])])
    if average is None:
        return areas
    known = ~np.isnan(areas)
    if not known.any():
        return math.nan
    support = checks.sums(at, weights, scores.shape[1])[known] if average == "weighted" else None
    return float(np.average(areas[known], weights=support))


def precision_recall_curve(
    y_true: ArrayLike, y_score: ArrayLike, *, pos_label: Any = None, sample_weight: ArrayLike | None = None
) -> tuple[Floats, Floats, Floats]:
    """Precision against recall as the threshold rises.

    Parameters
    ----------
    y_true, y_score, pos_label, sample_weight
        As for `roc_curve`.

    Returns
    -------
    precision, recall : ndarray, shape (points + 1,)
        At each threshold, from the lowest; the last point is precision 1 and recall 0, without a threshold. Recall is 1
        throughout where nothing is positive.
    thresholds : ndarray, shape (points,)

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    hits, false, thresholds = _cumulative(y_true, y_score, pos_label, sample_weight)
    precision = checks.ratio(hits, hits + false, 0.0)
    recall = hits / hits[-1] if hits[-1] else np.ones_like(hits)
    ends = (np.append(values[::-1], end) for values, end in ((precision, 1.0), (recall, 0.0)))
    return *ends, thresholds[::-1]  # type: ignore[return-value]


def average_precision_score(
    y_true: ArrayLike, y_score: ArrayLike, *, pos_label: Any = None, sample_weight: ArrayLike | None = None
) -> float:
    """The area under the precision–recall curve as a sum of steps: ``Σ (recall_i - recall_i-1) precision_i``.

    No interpolation, which would be too good (Davis and Goadrich, 2006).

    Parameters
    ----------
    y_true, y_score, pos_label, sample_weight
        As for `roc_curve`.

    Returns
    -------
    float
        0 where nothing is positive.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    precision, recall, _ = precision_recall_curve(y_true, y_score, pos_label=pos_label, sample_weight=sample_weight)
    return max(0.0, -math.fsum(np.diff(recall) * precision[:-1]))


def _area(positive: Array, scores: ArrayLike, sample_weight: ArrayLike | None) -> float:
    """The area under the ROC curve; NaN where all samples, or none, are positive."""
    hits, false, _ = _cumulative(positive, scores, None, sample_weight)
    if not (hits[-1] and false[-1]):
        return math.nan
    # In units of both kinds' weight: counts are exact, so that the area is.
    before = np.concatenate(([0.0], hits[:-1]))
    widths = np.diff(false, prepend=0.0)
    return float(widths @ (hits + before)) / (2 * float(hits[-1]) * float(false[-1]))


def _cumulative(
    y_true: ArrayLike, y_score: ArrayLike, pos_label: Any, sample_weight: ArrayLike | None
) -> tuple[Floats, Floats, Floats]:
    """Weights of the positive and of the negative samples at or above each different score, and these, descending."""
    positive = checks.is_positive(y_true, pos_label)
    scores = checks.as_scores(y_score, len(positive), 1)
    weights = checks.as_weights(sample_weight, len(positive))
    # By a power of two, which is exact, so that sums and their products neither overflow nor vanish.
    weights = np.ldexp(weights, -int(np.frexp(weights.max())[1]))
    counted = np.flatnonzero(weights)
    order = counted[np.argsort(-scores[counted], kind="stable")]
    scores, positive, weights = scores[order], positive[order], weights[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return np.cumsum(weights * positive)[ends], np.cumsum(weights * ~positive)[ends], scores[ends]
