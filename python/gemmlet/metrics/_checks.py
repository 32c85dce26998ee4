"""Checks of what the metrics are given, and arithmetic that they share."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]


def level(confidence: Any) -> float:
    """Return the level of a confidence interval, or raise."""
    if not isinstance(confidence, Real):
        raise TypeError(f"confidence must be a number, got {type(confidence).__name__}")
    if not 0 < (number := float(confidence)) < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return number


def count(value: Any, name: str, low: int = 1) -> int:
    """Return an integer of at least `low`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return number


def as_array(value: ArrayLike, name: str) -> Array:
    """Return numbers, bools or strings of at least one sample as an array."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost; fill it first: {name}.filled(...)")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an array: {error}") from error
    if array.dtype.kind == "O" and all(isinstance(each, str) for each in array.flat):
        array = array.astype(str)
    if array.dtype.kind not in "biufU":
        raise TypeError(f"{name} has dtype {array.dtype}; expected numbers, bools or strings")
    if not array.size:
        raise ValueError(f"{name} is empty; expected at least one sample")
    if array.dtype == np.uint64 and array.max() <= np.iinfo(np.int64).max:
        array = array.astype(np.int64)  # with signed labels NumPy would make floats of them
    return array


def as_vector(value: ArrayLike, name: str) -> Array:
    """Return one value for each sample, from shape (n,) or (n, 1)."""
    array = as_array(value, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected (n,)")
    return array


def as_labels(value: ArrayLike, name: str) -> Array:
    """Return labels (n,), or rows of them: of floats none that is not finite."""
    array = as_array(value, name)
    if array.dtype.kind == "f":
        as_numbers(array, name)
    return array


def as_numbers(value: ArrayLike, name: str, *, finite: bool = True) -> Floats:
    """Return an array as float64, without NaN, and without infinities if it has to be `finite`."""
    array = as_array(value, name)
    if array.dtype.kind == "U":
        raise TypeError(f"{name} has dtype {array.dtype}; expected numbers")
    floats = array.astype(np.float64)
    bad = ~np.isfinite(floats) if finite else np.isnan(floats)
    if bad.any():
        place = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(f"{name} has {'NaN' if np.isnan(floats[place]) else floats[place]} at {place}")
    return floats


def same_shape(
    a: ArrayLike, b: ArrayLike, a_name: str, b_name: str, *, allow_rows: bool = False, numbers: bool = False
) -> tuple[Array, Array]:
    """Two arrays of one shape which can be compared: (n,), or rows too; float64 if they have to be `numbers`."""
    arrays = []
    for value, name in ((a, a_name), (b, b_name)):
        array = as_numbers(value, name) if numbers else as_labels(value, name)
        arrays.append(array if allow_rows and array.ndim == 2 and array.shape[1] > 1 else as_vector(array, name))
    first, second = arrays
    if first.shape != second.shape:
        raise ValueError(f"{a_name} has shape {first.shape} and {b_name} {second.shape}; they must match")
    check_comparable(first, second, a_name, b_name)
    return first, second


def check_comparable(a: Array, b: Array, a_name: str, b_name: str) -> None:
    """Raise if one has strings and the other none."""
    if (a.dtype.kind == "U") != (b.dtype.kind == "U"):
        raise TypeError(f"{a_name} has dtype {a.dtype} and {b_name} {b.dtype}, which cannot be compared")


def as_weights(sample_weight: ArrayLike | None, n: int) -> Floats:
    """Return what each of `n` samples counts."""
    if sample_weight is None:
        return np.ones(n)
    weights = as_vector(as_numbers(sample_weight, "sample_weight"), "sample_weight")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight has shape {weights.shape}, expected ({n},), one for each sample")
    if not ((weights >= 0).all() and 0 < weights.sum() < math.inf):
        raise ValueError("sample_weight must be finite numbers, none of them negative, of a positive sum")
    return weights


# Classes.


def classes_of(labels: ArrayLike | None, *values: Array) -> Array:
    """`labels`, checked; by default those that occur in `values`, ascending."""
    if labels is None:
        return np.unique(np.concatenate(values))
    classes = as_vector(as_labels(labels, "labels"), "labels")
    if len(np.unique(classes)) != len(classes):
        raise ValueError("labels has a label twice")
    for each in values:
        check_comparable(classes, each, "labels", "y_true")
    return classes


def classes_of_columns(true: Array, columns: int, labels: ArrayLike | None) -> Array:
    """The classes that columns of scores stand for: indices, if labels can be, else those that occur, if all do."""
    if labels is None and true.dtype.kind in "biu" and true.min() >= 0 and true.max() < columns:
        if true.min() > 0:
            raise ValueError(
                f"y_true has labels from {int(true.min())} to {int(true.max())} and no 0, y_score {columns} columns: "
                "give labels, the class of each column"
            )
        return np.arange(columns)
    classes = classes_of(labels, true)
    if len(classes) != columns:
        which = "y_true" if labels is None else "labels"
        hint = "; give labels, the class of each column" if labels is None else ""
        raise ValueError(f"y_score has {columns} columns, {which} {len(classes)} classes; they must match{hint}")
    return classes


def positions(values: Array, classes: Array) -> NDArray[np.int64]:
    """The place of each value among the classes, -1 if it is none of them."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    at = np.minimum(np.searchsorted(ordered, values), len(classes) - 1)
    return np.where(ordered[at] == values, order[at], -1)


# Scores.


def as_scores(y_score: ArrayLike, n: int, dimensions: int) -> Floats:
    """Return scores of `n` samples, as an array of so many dimensions; (n, 1) is one column as well."""
    scores = as_numbers(y_score, "y_score", finite=False)
    if dimensions == 1 and scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if scores.ndim != dimensions or len(scores) != n:
        raise ValueError(f"y_score has shape {scores.shape}, expected ({n},{' classes' * (dimensions == 2)})")
    return scores


def is_one_column(y_score: ArrayLike) -> bool:
    """Whether scores are of one class alone."""
    shape = np.shape(as_array(y_score, "y_score"))
    return len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)


def of_columns(
    y_true: ArrayLike, y_score: ArrayLike, labels: ArrayLike | None, sample_weight: ArrayLike | None
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """The column of each sample's class, the scores (n, classes), and the weights."""
    true = as_vector(as_labels(y_true, "y_true"), "y_true")
    scores = as_scores(y_score, len(true), 2)
    at = positions(true, classes_of_columns(true, scores.shape[1], labels))
    if (at < 0).any():
        raise ValueError(f"y_true has the label {true[at < 0][0].item()!r}, which labels has not")
    return at, scores, as_weights(sample_weight, len(true))


def of_probabilities(
    y_true: ArrayLike, y_score: ArrayLike, labels: ArrayLike | None, sample_weight: ArrayLike | None
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """`of_columns` of probabilities; of one column those of both classes."""
    if is_one_column(y_score):
        positive = as_scores(y_score, len(as_vector(y_true, "y_true")), 1)
        y_score = np.stack([1 - positive, positive], axis=1)
    at, probabilities, weights = of_columns(y_true, y_score, labels, sample_weight)
    if not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("y_score must be probabilities, within [0, 1]")
    return at, probabilities, weights


def is_positive(y_true: ArrayLike, pos_label: Any) -> NDArray[np.bool_]:
    """Which samples are positive."""
    true = as_vector(as_labels(y_true, "y_true"), "y_true")
    if pos_label is None:
        if true.dtype.kind == "U" or not np.isin(true, (0, 1)).all():
            raise ValueError("y_true must be bools, or 0 and 1, where pos_label does not say which label is positive")
        return true.astype(bool)
    label = np.asarray(pos_label)
    if label.ndim:
        raise TypeError(f"pos_label must be one label, got {type(pos_label).__name__}")
    check_comparable(true, label, "y_true", "pos_label")
    return np.asarray(true == pos_label)


# Arithmetic.


def mean(values: Floats, weights: Floats) -> float:
    """The weighted mean over samples, of rows over these too."""
    return float(np.average(values.reshape(len(values), -1).mean(axis=1), weights=weights))


def sums(which: NDArray[np.int64], weights: Floats, count: int) -> Floats:
    """The sum of the weights of each of `count` kinds."""
    return np.bincount(which, weights, count).astype(np.float64, copy=False)


def ratio(above: Array, below: Array, otherwise: float) -> Floats:
    """``above / below``, and `otherwise` where that is 0 / 0."""
    result = np.full(np.shape(above), otherwise, np.float64)
    np.divide(above, below, out=result, where=np.asarray(below) != 0)
    return result
