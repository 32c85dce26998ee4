"""Metrics of probabilities: how good they are, and how well calibrated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import _checks as checks
from ._checks import Floats


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
    at, probabilities, weights = checks.of_probabilities(y_true, y_score, labels, sample_weight)
    epsilon = np.finfo(_float_dtype(y_score)).eps
    own = np.clip(probabilities[np.arange(len(at)), at], epsilon, 1 - epsilon)
    return checks.mean(-np.log(own), weights)


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
    at, probabilities, weights = checks.of_probabilities(y_true, y_score, labels, sample_weight)
    own = probabilities[np.arange(len(at)), at]
    squares = np.einsum("ij,ij->i", probabilities, probabilities) - own * own + (1 - own) ** 2
    return checks.mean(squares, weights) * (0.5 if probabilities.shape[1] == 2 else 1.0)


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
    bins = checks.count(bins, "bins")
    at, probabilities, weights = checks.of_probabilities(y_true, y_score, labels, sample_weight)
    if checks.is_one_column(y_score):
        confidence, correct = probabilities[:, 1], at == 1
    else:
        predicted = probabilities.argmax(axis=1)
        confidence, correct = probabilities[np.arange(len(at)), predicted], predicted == at
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.maximum(np.searchsorted(edges, confidence) - 1, 0)
    weight, confidence, right = (checks.sums(which, weights * each, bins) for each in (1.0, confidence, correct))
    return CalibrationCurve(
        edges, weight, checks.ratio(confidence, weight, math.nan), checks.ratio(right, weight, math.nan)
    )


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


def _float_dtype(y_score: ArrayLike) -> np.dtype[Any]:
    dtype = np.asarray(y_score).dtype
    return dtype if dtype.kind == "f" else np.dtype(np.float64)
