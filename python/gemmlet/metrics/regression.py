"""Metrics of predicted numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from . import _checks as checks


def mean_squared_error(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The mean of ``(y_pred - y_true)²`` over samples, and over outputs where rows have several.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred", allow_rows=True, numbers=True)
    return checks.mean(np.square(predicted - true), checks.as_weights(sample_weight, len(true)))


def mean_absolute_error(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The mean of ``|y_pred - y_true|`` over samples, and over outputs where rows have several.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred", allow_rows=True, numbers=True)
    return checks.mean(np.abs(predicted - true), checks.as_weights(sample_weight, len(true)))


def r2_score(y_true: ArrayLike, y_pred: ArrayLike, *, sample_weight: ArrayLike | None = None) -> float:
    """The coefficient of determination: 1 less the squared error as a share of the variance of `y_true`.

    1 is perfect, 0 no better than to predict the mean; of several outputs the mean. An output that never varies has 1
    if it is predicted exactly, else 0.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    true, predicted = checks.same_shape(y_true, y_pred, "y_true", "y_pred", allow_rows=True, numbers=True)
    if len(true) < 2:
        raise ValueError(f"r2_score needs at least 2 samples, got {len(true)}")
    weights = checks.as_weights(sample_weight, len(true))
    true, predicted = true.reshape(len(true), -1), predicted.reshape(len(true), -1)
    error = weights @ np.square(predicted - true)
    spread = weights @ np.square(true - np.average(true, axis=0, weights=weights))
    constant = np.where(error == 0, 1.0, 0.0)
    return float(np.mean(np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1.0), constant)))
