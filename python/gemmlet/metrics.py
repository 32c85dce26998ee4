"""How good predictions are: of classes, of probabilities, and of numbers. NumPy alone computes them, in float64.

Names, arguments and results are those of `sklearn.metrics` where it has the function, so that one can stand for the
other. What it lacks: intervals (`wilson_interval`, `bootstrap_interval`), the calibration error with its definition,
`mcnemar`, which compares two classifiers on the same samples, and `classification_report` with all of it.

Everywhere `y_true` are the labels of n samples, integers, bools or strings, and `sample_weight` (n,) what each sample
counts: finite numbers, none of them negative, of a positive sum; 1 by default. Where a function takes `labels`, these
are the classes in the order of the columns of `y_score` and of the results; by default those that occur, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CalibrationCurve",
    "ClassScores",
    "ClassificationReport",
    "Interval",
    "McNemar",
    "accuracy_score",
    "auc",
    "average_precision_score",
    "bootstrap_interval",
    "brier_score_loss",
    "calibration_curve",
    "calibration_error",
    "classification_report",
    "confusion_matrix",
    "log_loss",
    "mcnemar",
    "mean_absolute_error",
    "mean_squared_error",
    "precision_recall_curve",
    "precision_recall_fscore_support",
    "r2_score",
    "roc_auc_score",
    "roc_curve",
    "top_k_accuracy_score",
    "wilson_interval",
]

Array = NDArray[Any]
Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


# Classes.


def accuracy_score(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The share of samples whose prediction is their label.

    With rows of several labels (n, classes) a sample counts if its whole row is right.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred", most_dimensions=2)
    correct = (true == predicted).reshape(len(true), -1).all(axis=1)
    return _mean(correct.astype(np.float64), _weights(sample_weight, len(true)))


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Confidence interval of a share, of which `successes` of `n` were seen: of an accuracy, say.

    Wilson's score interval ("Probable inference, the law of succession, and statistical inference", 1927), which keeps
    its level near 0 and 1 too, where the usual ``p ± z sqrt(p (1 - p) / n)`` does not.

    Raises
    ------
    ValueError
        `successes` is not from 0 to `n`, `n` is below 1, or `confidence` not between 0 and 1.
    """
    if not (0 <= successes <= n and n >= 1):
        raise ValueError(f"successes must be from 0 to n and n at least 1, got successes {successes} and n {n}")
    z = NormalDist().inv_cdf(0.5 + _confidence(confidence) / 2)
    share, ratio = successes / n, z * z / n
    center = (share + ratio / 2) / (1 + ratio)
    half = z * math.sqrt(share * (1 - share) / n + ratio / (4 * n)) / (1 + ratio)
    # At the ends rounding must not leave what is exact.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    return Interval(low, 1.0 if successes == n else min(1.0, center + half))


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
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred")
    classes = _classes(labels, true, predicted)
    at, there = _positions(true, classes), _positions(predicted, classes)
    known, count = (at >= 0) & (there >= 0), len(classes)
    weights = None if sample_weight is None else _weights(sample_weight, len(true))[known]
    counts = np.bincount(at[known] * count + there[known], weights, count * count)
    return counts.reshape(count, count)


def precision_recall_fscore_support(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    average: str | None = None,
    sample_weight: ArrayLike | None = None,
    zero_division: float = 0.0,
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
    zero_division : float
        What stands where a class is never predicted, or never there.

    Returns
    -------
    precision, recall, f1, support
        Arrays (classes,), or floats and None.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred")
    classes = _classes(labels, true, predicted)
    weights = _weights(sample_weight, len(true))
    at, there, count = _positions(true, classes), _positions(predicted, classes), len(classes)

    def total(positions: NDArray[np.int64], counted: NDArray[np.bool_]) -> Floats:
        return _sums(positions[counted], weights[counted], count)

    hits = total(at, (at >= 0) & (at == there))
    support, found = total(at, at >= 0), total(there, there >= 0)
    if average == "micro":
        hits, support, found = (np.atleast_1d(each.sum()) for each in (hits, support, found))
    precision, recall = _ratio(hits, found, zero_division), _ratio(hits, support, zero_division)
    f1 = _ratio(2 * hits, found + support, zero_division)
    if average is None:
        return precision, recall, f1, support if sample_weight is not None else support.astype(np.int64)
    if average not in ("macro", "weighted", "micro"):
        raise ValueError(f"average must be None, 'macro', 'weighted' or 'micro', got {average!r}")
    if average == "weighted" and not support.any():
        return zero_division, zero_division, zero_division, None
    shares = support if average == "weighted" else None
    means = [float(np.average(each, weights=shares)) for each in (precision, recall, f1)]
    return means[0], means[1], means[2], None


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
    at, scores, weights = _of_columns(y_true, y_score, labels, sample_weight)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    own = scores[np.arange(len(at)), at][:, np.newaxis]
    later = np.arange(scores.shape[1]) > at[:, np.newaxis]
    ahead = np.count_nonzero((scores > own) | ((scores == own) & later), axis=1)
    return _mean((ahead < k).astype(np.float64), weights)


# Scores of one class against the rest.


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
    ValueError
        There are fewer than two points, or `x` does neither.
    """
    xs, ys = _same_shape(x, y, "x", "y", numbers=True)
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
    if np.ndim(y_score) == 1:
        true = _vector(y_true, "y_true")
        classes = _classes(labels, true)
        if len(classes) != 2:
            raise ValueError(f"y_true must have two classes where y_score is one column, got {len(classes)}")
        return _area(true == classes[1], np.asarray(y_score), sample_weight)
    if average not in (None, "macro", "weighted"):
        raise ValueError(f"average must be None, 'macro' or 'weighted', got {average!r}")
    at, scores, weights = _of_columns(y_true, y_score, labels, sample_weight)
    areas = np.array([_area(at == column, scores[:, column], weights) for column in range(scores.shape[1])])
    if average is None:
        return areas
    known = ~np.isnan(areas)
    if not known.any():
        return math.nan
    support = _sums(at, weights, scores.shape[1])[known] if average == "weighted" else None
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
    precision = _ratio(hits, hits + false, 0.0)
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


# Probabilities.


def log_loss(
    y_true: ArrayLike, y_score: ArrayLike, *, labels: ArrayLike | None = None, sample_weight: ArrayLike | None = None
) -> float:
    """The mean negative logarithm, in nats, of the probability that a sample's class was given.

    Probabilities count as at least the machine epsilon of their dtype, and at most 1 less that: a single 0 would make
    the mean infinite.

    Parameters
    ----------
    y_true, labels, sample_weight
        See the module.
    y_score : array_like, shape (n, classes) or (n,)
        Probabilities; of one column those of the second class.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    at, probabilities, weights = _probabilities(y_true, y_score, labels, sample_weight)
    epsilon = np.finfo(_float_dtype(y_score)).eps
    own = np.clip(probabilities[np.arange(len(at)), at], epsilon, 1 - epsilon)
    return _mean(-np.log(own), weights)


def brier_score_loss(
    y_true: ArrayLike, y_score: ArrayLike, *, labels: ArrayLike | None = None, sample_weight: ArrayLike | None = None
) -> float:
    """The mean squared error of probabilities, summed over the classes; of two classes half of that.

    From 0 to 2, of two classes to 1. Source: Brier, "Verification of forecasts expressed in terms of probability",
    1950.

    Parameters
    ----------
    y_true, y_score, labels, sample_weight
        As for `log_loss`.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    at, probabilities, weights = _probabilities(y_true, y_score, labels, sample_weight)
    own = probabilities[np.arange(len(at)), at]
    squares = np.einsum("ij,ij->i", probabilities, probabilities) - own * own + (1 - own) ** 2
    return _mean(squares, weights) * (0.5 if probabilities.shape[1] == 2 else 1.0)


class CalibrationCurve(NamedTuple):
    """How often predictions of some confidence are right: a reliability diagram.

    Attributes
    ----------
    edges : ndarray, shape (bins + 1,)
        Bin i has confidences above ``edges[i]``, and up to ``edges[i + 1]``; the first one 0 too.
    weight : ndarray, shape (bins,)
        How many samples it has, or the sum of their weights.
    confidence, accuracy : ndarray, shape (bins,)
        Their mean confidence, and the share of them that is right. NaN without any.
    """

    edges: Floats
    weight: Floats
    confidence: Floats
    accuracy: Floats


def calibration_curve(
    y_true: ArrayLike,
    y_score: ArrayLike,
    *,
    bins: int = 15,
    labels: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> CalibrationCurve:
    """Confidence and accuracy in `bins` bins of equal width.

    Confidence is the largest probability of a sample, and right is a sample of that class (Guo et al., "On Calibration
    of Modern Neural Networks", 2017). With one column it is the probability of the second class, and right is a sample
    of it, as in scikit-learn.

    Parameters
    ----------
    y_true, y_score, labels, sample_weight
        As for `log_loss`.
    bins : int, at least 1

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    at, probabilities, weights = _probabilities(y_true, y_score, labels, sample_weight)
    if np.ndim(y_score) == 1:
        confidence, correct = probabilities[:, 1], at == 1
    else:
        predicted = probabilities.argmax(axis=1)
        confidence, correct = probabilities[np.arange(len(at)), predicted], predicted == at
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.maximum(np.searchsorted(edges, confidence) - 1, 0)
    weight, confidence, right = (_sums(which, weights * each, bins) for each in (1.0, confidence, correct))
    return CalibrationCurve(edges, weight, _ratio(confidence, weight, math.nan), _ratio(right, weight, math.nan))


def calibration_error(
    y_true: ArrayLike,
    y_score: ArrayLike,
    *,
    bins: int = 15,
    labels: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> float:
    """The expected calibration error: the mean over the samples of their bin's ``|accuracy - confidence|``.

    Bins are those of `calibration_curve`. Fewer or other bins give another number: compare only what has the same.
    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", 2015.

    Parameters
    ----------
    y_true, y_score, bins, labels, sample_weight
        As for `calibration_curve`.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    curve = calibration_curve(y_true, y_score, bins=bins, labels=labels, sample_weight=sample_weight)
    there = curve.weight > 0
    return float(np.average(np.abs(curve.accuracy - curve.confidence)[there], weights=curve.weight[there]))


# How sure all this is.


def bootstrap_interval(
    metric: Callable[..., float], *arrays: ArrayLike, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Confidence interval of a metric by the percentile bootstrap.

    The metric is computed on as many samples as there are, drawn with replacement, again and again; the interval is
    between quantiles of what comes out. Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.

    Parameters
    ----------
    metric : callable
        ``metric(*arrays)``, a number: ``lambda y, p: metrics.roc_auc_score(y, p)``, say. NaN, of a resample without a
        class say, is left out.
    *arrays : array_like
        Of as many samples each, along the first axis.
    confidence : float, between 0 and 1
    resamples : int, at least 1
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    Interval
        NaN where all resamples are.

    Raises
    ------
    ValueError
        An argument does not fit.

    Examples
    --------
    >>> from gemmlet import metrics
    >>> labels, predicted = [0, 1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 1, 1]
    >>> metrics.accuracy_score(labels, predicted)
    0.875
    >>> metrics.bootstrap_interval(metrics.accuracy_score, labels, predicted)
    Interval(low=0.625, high=1.0)
    """
    _confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    samples = [np.asarray(array) for array in arrays]
    if not samples or any(array.ndim == 0 for array in samples) or len({len(array) for array in samples}) != 1:
        shapes = ", ".join(str(array.shape) for array in samples) or "none"
        raise ValueError(f"arrays must have the same number of samples, got the shapes {shapes}")
    if not (n := len(samples[0])):
        raise ValueError("arrays are empty; expected at least one sample")
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(n, size=n)
        found[i] = metric(*[array[rows] for array in samples])
    if not (known := found[~np.isnan(found)]).size:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


class McNemar(NamedTuple):
    """How classifier B differs from classifier A on the same samples.

    Attributes
    ----------
    corrects, spoils : int
        Samples that A has wrong and B right, and the other way round.
    p_value : float
        How probably as large a difference between the two would come by chance, were both equally good.
    """

    corrects: int
    spoils: int
    p_value: float


def mcnemar(y_true: ArrayLike, y_pred_a: ArrayLike, y_pred_b: ArrayLike) -> McNemar:
    """Compare two classifiers on the same samples: the exact test, two-sided.

    Samples that both have right, or both have wrong, say nothing of the difference; of the others each is a toss of a
    coin if both are equally good. Source: McNemar, "Note on the sampling error of the difference between correlated
    proportions or percentages", 1947.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, a = _same_shape(y_true, y_pred_a, "y_true", "y_pred_a")
    _, b = _same_shape(y_true, y_pred_b, "y_true", "y_pred_b")
    corrects = int(np.count_nonzero((a != true) & (b == true)))
    spoils = int(np.count_nonzero((a == true) & (b != true)))
    return McNemar(corrects, spoils, _two_sided(min(corrects, spoils), corrects + spoils))


def _two_sided(k: int, n: int) -> float:
    """Twice the probability of at most `k` heads in `n` tosses, at most 1."""
    if 2 * k >= n:
        return 1.0
    term = math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
    total = 0.0
    for i in range(k, -1, -1):
        total += term
        term *= i / (n - i + 1)
        if term < total * 1e-17:
            break
    return min(1.0, 2 * total)


# All about a classifier.


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
        Means over the classes, each counting the same, or by its support.
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
            yield (str(scores.label), *numbers, f"{scores.support:g}", *area)

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
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred")
    if y_score is None:
        classes, areas = _classes(labels, true, predicted), None
    else:
        scores = np.asarray(y_score)
        classes = _classes_of_columns(true, scores, labels)
        areas = roc_auc_score(true, scores, average=None, labels=classes).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(true, predicted, labels=classes)
    each = tuple(
        ClassScores(label, float(precision[i]), float(recall[i]), float(f1[i]), float(support[i]), areas and areas[i])
        for i, label in enumerate(classes.tolist())
    )
    means = {}
    for kind in ("macro", "weighted"):
        mean = precision_recall_fscore_support(true, predicted, labels=classes, average=kind)
        area = None if y_score is None else roc_auc_score(true, y_score, average=kind, labels=classes)
        means[kind] = ClassScores(kind, *mean[:3], float(support.sum()), area)
    correct = int(np.count_nonzero(true == predicted))
    confusion = confusion_matrix(true, predicted, labels=classes)
    interval = wilson_interval(correct, len(true))
    return ClassificationReport(correct / len(true), interval, each, means["macro"], means["weighted"], confusion)


# Numbers.


def mean_squared_error(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The mean of ``(y_pred - y_true)²`` over samples, and over outputs where rows have several.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred", most_dimensions=2, numbers=True)
    return _mean(np.square(predicted - true), _weights(sample_weight, len(true)))


def mean_absolute_error(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The mean of ``|y_pred - y_true|`` over samples, and over outputs where rows have several.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred", most_dimensions=2, numbers=True)
    return _mean(np.abs(predicted - true), _weights(sample_weight, len(true)))


def r2_score(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The coefficient of determination: 1 less the squared error as a share of the variance of `y_true`.

    1 is perfect, 0 no better than to predict the mean; of several outputs the mean. An output that never varies has 1
    if it is predicted exactly, else 0.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = _same_shape(y_true, y_pred, "y_true", "y_pred", most_dimensions=2, numbers=True)
    if len(true) < 2:
        raise ValueError(f"r2_score needs at least 2 samples, got {len(true)}")
    weights = _weights(sample_weight, len(true))
    true, predicted = true.reshape(len(true), -1), predicted.reshape(len(true), -1)
    error = weights @ np.square(predicted - true)
    spread = weights @ np.square(true - np.average(true, axis=0, weights=weights))
    constant = np.where(error == 0, 1.0, 0.0)
    return float(np.mean(np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1.0), constant)))


# Arguments.


def _confidence(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {value}")
    return value


def _array(value: ArrayLike, name: str) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it first")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind == "O" and all(isinstance(each, str) for each in array.flat):
        array = array.astype(str)
    if array.dtype.kind not in "biufU":
        raise TypeError(f"{name} has dtype {array.dtype}; expected numbers, bools or strings")
    if not len(np.atleast_1d(array)):
        raise ValueError(f"{name} is empty; expected at least one sample")
    return array


def _vector(value: ArrayLike, name: str) -> Array:
    array = _array(value, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected (n,)")
    return array


def _same_shape(
    a: ArrayLike, b: ArrayLike, a_name: str, b_name: str, *, most_dimensions: int = 1, numbers: bool = False
) -> tuple[Array, Array]:
    """Two arrays of one shape, which can be compared; as float64 if they have to be `numbers`."""
    arrays = []
    for value, name in ((a, a_name), (b, b_name)):
        array = _array(value, name)
        array = array if 1 < array.ndim <= most_dimensions and array.shape[1] != 1 else _vector(array, name)
        if numbers:
            array = _numbers(array, name)
        arrays.append(array)
    first, second = arrays
    if first.shape != second.shape:
        raise ValueError(f"{a_name} has shape {first.shape} and {b_name} {second.shape}; they must match")
    _check_comparable(first, second, a_name, b_name)
    return first, second


def _check_comparable(a: Array, b: Array, a_name: str, b_name: str) -> None:
    if (a.dtype.kind == "U") != (b.dtype.kind == "U"):
        raise TypeError(f"{a_name} has dtype {a.dtype} and {b_name} {b.dtype}, which cannot be compared")


def _numbers(array: Array, name: str) -> Floats:
    if array.dtype.kind == "U":
        raise TypeError(f"{name} has dtype {array.dtype}; expected numbers")
    floats = array.astype(np.float64)
    if np.isnan(floats).any():
        raise ValueError(f"{name} has NaN at {tuple(map(int, np.argwhere(np.isnan(floats))[0]))}")
    return floats


def _weights(sample_weight: ArrayLike | None, n: int) -> Floats:
    if sample_weight is None:
        return np.ones(n)
    weights = _numbers(_vector(sample_weight, "sample_weight"), "sample_weight")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight has shape {weights.shape}, expected ({n},), one for each sample")
    if not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError("sample_weight must be finite numbers, none of them negative, of a positive sum")
    return weights


def _classes(labels: ArrayLike | None, *values: Array) -> Array:
    """`labels`, checked; by default those that occur in `values`, ascending."""
    if labels is None:
        return np.unique(np.concatenate(values))
    classes = _vector(labels, "labels")
    if len(np.unique(classes)) != len(classes):
        raise ValueError("labels has a label twice")
    for each in values:
        _check_comparable(classes, each, "labels", "y_true")
    return classes


def _classes_of_columns(true: Array, scores: Array, labels: ArrayLike | None) -> Array:
    """The classes that columns of scores stand for: indices, if labels can be, else those that occur."""
    count = scores.shape[1]
    if labels is None and true.dtype.kind in "biu" and true.min() >= 0 and true.max() < count:
        return np.arange(count)
    classes = _classes(labels, true)
    if len(classes) != count:
        which = "y_true" if labels is None else "labels"
        hint = "; give labels, the class of each column" if labels is None else ""
        raise ValueError(f"y_score has {count} columns, {which} {len(classes)} classes; they must match{hint}")
    return classes


def _positions(values: Array, classes: Array) -> NDArray[np.int64]:
    """The place of each value among the classes, -1 if it is none of them."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    at = np.minimum(np.searchsorted(ordered, values), len(classes) - 1)
    return np.where(ordered[at] == values, order[at], -1)


def _scores(value: ArrayLike, shape: tuple[int, ...]) -> Floats:
    scores = _numbers(_array(value, "y_score"), "y_score")
    if scores.ndim != len(shape) or len(scores) != shape[0]:
        wanted = f"({shape[0]},)" if len(shape) == 1 else f"({shape[0]}, classes)"
        raise ValueError(f"y_score has shape {scores.shape}, expected {wanted}")
    return scores


def _of_columns(
    y_true: ArrayLike, y_score: ArrayLike, labels: ArrayLike | None, sample_weight: ArrayLike | None
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """The column of each sample's class, the scores (n, classes), and the weights."""
    true = _vector(y_true, "y_true")
    scores = _scores(y_score, (len(true), 0))
    at = _positions(true, _classes_of_columns(true, scores, labels))
    if (at < 0).any():
        raise ValueError(f"y_true has the label {true[at < 0][0]!r}, which labels has not")
    return at, scores, _weights(sample_weight, len(true))


def _float_dtype(y_score: ArrayLike) -> np.dtype[Any]:
    dtype = np.asarray(y_score).dtype
    return dtype if dtype.kind == "f" else np.dtype(np.float64)


def _probabilities(
    y_true: ArrayLike, y_score: ArrayLike, labels: ArrayLike | None, sample_weight: ArrayLike | None
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """`_of_columns` of probabilities; of one column those of both classes."""
    if np.ndim(y_score) == 1:
        true = _vector(y_true, "y_true")
        positive = _scores(y_score, (len(true),))
        y_score = np.stack([1 - positive, positive], axis=1)
    at, probabilities, weights = _of_columns(y_true, y_score, labels, sample_weight)
    if not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("y_score must be probabilities, within [0, 1]")
    return at, probabilities, weights


# Arithmetic.


def _mean(values: Floats, weights: Floats) -> float:
    return float(np.average(values.reshape(len(values), -1).mean(axis=1), weights=weights))


def _sums(which: NDArray[np.int64], weights: Floats, count: int) -> Floats:
    """The sum of the weights of each of `count` kinds."""
    return np.bincount(which, weights, count).astype(np.float64, copy=False)


def _ratio(above: Array, below: Array, otherwise: float) -> Floats:
    """``above / below``, and `otherwise` where that is 0 / 0."""
    result: Floats = np.divide(above, below, out=np.full(np.shape(above), otherwise), where=np.asarray(below) != 0)
    return result


def _positive(y_true: ArrayLike, pos_label: Any) -> NDArray[np.bool_]:
    true = _vector(y_true, "y_true")
    if pos_label is None:
        if true.dtype.kind == "U" or not np.isin(true, (0, 1)).all():
            raise ValueError("y_true must be bools, or 0 and 1, where pos_label does not say which label is positive")
        return true.astype(bool)
    _check_comparable(true, np.asarray(pos_label), "y_true", "pos_label")
    return np.asarray(true == pos_label)


def _cumulative(
    y_true: ArrayLike, y_score: ArrayLike, pos_label: Any, sample_weight: ArrayLike | None
) -> tuple[Floats, Floats, Floats]:
    """Weights of the positive and of the negative samples at or above each different score, and these, descending."""
    positive = _positive(y_true, pos_label)
    scores, weights = _scores(y_score, positive.shape), _weights(sample_weight, len(positive))
    counted = np.flatnonzero(weights)
    order = counted[np.argsort(-scores[counted], kind="stable")]
    scores, positive, weights = scores[order], positive[order], weights[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return np.cumsum(weights * positive)[ends], np.cumsum(weights * ~positive)[ends], scores[ends]


def _area(positive: Array, scores: Array, sample_weight: ArrayLike | None) -> float:
    """The area under the ROC curve; NaN where all samples, or none, are positive."""
    hits, false, _ = _cumulative(positive, scores, None, sample_weight)
    if not (hits[-1] and false[-1]):
        return math.nan
    # In units of both kinds' weight: counts are exact, so that the area is.
    before = np.concatenate(([0.0], hits[:-1]))
    widths = np.diff(false, prepend=0.0)
    return float(widths @ (hits + before)) / (2 * float(hits[-1]) * float(false[-1]))
