"""How sure a metric is, and the difference between two classifiers."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from . import _checks as checks


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Confidence interval of a share, of which `successes` of `n` were seen: of an accuracy, say.

    Wilson's score interval ("Probable inference, the law of succession, and statistical inference", 1927), which keeps
    its level near 0 and 1 too, where the usual ``p ± z sqrt(p (1 - p) / n)`` does not.

    Raises
    ------
    ValueError
        `successes` is not from 0 to `n`, `n` is below 1, or `confidence` not between 0 and 1.
    """
    successes, n = checks.count(successes, "successes", 0), checks.count(n, "n")
    if successes > n:
        raise ValueError(f"successes must be from 0 to n and n at least 1, got successes {successes} and n {n}")
    z = NormalDist().inv_cdf(0.5 + checks.level(confidence) / 2)
    share, ratio = successes / n, z * z / n
    center = (share + ratio / 2) / (1 + ratio)
    half = z * math.sqrt(share * (1 - share) / n + ratio / (4 * n)) / (1 + ratio)
    # At the ends rounding must not leave what is exact.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    return Interval(low, 1.0 if successes == n else min(1.0, center + half))


def bootstrap_interval(
    metric: Callable[..., float], *arrays: ArrayLike, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Confidence interval of a metric by the percentile bootstrap.

    The metric is computed on as many samples as there are, drawn with replacement, again and again; the interval is
    between quantiles of what comes out. Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.

    Parameters
    ----------
    metric : callable
        ``metric(*arrays)``, a number: `roc_auc_score`, say. NaN, of a resample without a class say, is left out; where
        columns stand for classes, ``lambda y, p: roc_auc_score(y, p, labels=[...])`` names those that it may lack.
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
    confidence, resamples = checks.level(confidence), checks.count(resamples, "resamples")
    rng = np.random.default_rng(checks.count(seed, "seed", 0))
    samples = [_as_rows(array, f"arrays[{i}]") for i, array in enumerate(arrays)]
    if not samples or any(array.ndim == 0 for array in samples) or len({len(array) for array in samples}) != 1:
        shapes = ", ".join(str(array.shape) for array in samples) or "none"
        raise ValueError(f"arrays must have the same number of samples, got the shapes {shapes}")
    if not (n := len(samples[0])):
        raise ValueError("arrays are empty; expected at least one sample")
    found = np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(n, size=n)
        found[i] = metric(*[array[rows] for array in samples])
    if not (known := found[~np.isnan(found)]).size:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


def _as_rows(value: ArrayLike, name: str) -> checks.Array:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it first: {name}.filled(...)")
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error


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
    true, a = checks.same_shape(y_true, y_pred_a, "y_true", "y_pred_a")
    _, b = checks.same_shape(y_true, y_pred_b, "y_true", "y_pred_b")
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
