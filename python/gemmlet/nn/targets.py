"""Targets, as users give them and as training takes them: class indices, or rows of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from . import _checks as checks
from .dataset import as_dtype

Array = NDArray[Any]
Label = str | int | float | bool

# The largest float64 up to which all integers are one.
_EXACT = 2.0**53

# How far soft labels of a row may be from a sum of 1.
_SUM_TOLERANCE = 1e-3

# What labels can be, the first that fits.
_KINDS: dict[str, Any] = {"bool": (bool, np.bool_), "number": (int, float, np.integer, np.floating), "string": str}
_EXPECTED = "labels must be integers, whole floats, bools or strings"


class Meaning(NamedTuple):
    """What the outputs of a classifier stand for.

    Attributes
    ----------
    outputs : int
    classes : list of labels, optional
        One for each class; None: class indices are the labels.
    multi_label : bool
        Whether a sample may be of several classes, or none.
    learns : bool
        Whether labels may still decide about both.
    """

    outputs: int
    classes: list[Label] | None
    multi_label: bool
    learns: bool

    @property
    def class_count(self) -> int:
        """The number of classes; a single output tells two apart."""
        return max(self.outputs, 2)


def numbers(y: Any, outputs: int, dtype: np.dtype[Any], name: str) -> Array:
    """Return real numbers as rows (n, outputs) of `dtype`; (n,) will do for one output."""
    rows = arguments.on_cpu(arguments.as_array(y, name))
    checks.real_numbers(rows.dtype, name)
    if rows.ndim == 1 and outputs == 1:
        rows = rows[:, np.newaxis]
    if rows.ndim != 2 or rows.shape[1] != outputs:
        raise ValueError(f"{name} has shape {rows.shape}, expected (n,{'' if outputs == 1 else f' {outputs}'})")
    return _aligned(as_dtype(rows, dtype, name))


def of_classes(y: Any, meaning: Meaning, output: str, dtype: np.dtype[Any], name: str) -> tuple[Array, Meaning]:
    """Return targets of a classifier, and what its outputs stand for after them.

    Parameters
    ----------
    y : array_like
        Labels (n,) or (n, 1); or rows (n, outputs), of several outputs: one-hot rows; soft labels, if the output is
        softmax; several ones, or none, if it is sigmoid.

    Returns
    -------
    targets : ndarray
        int64 (n,), class indices; or of `dtype`, (n, outputs).
    """
    # A copy, so that nobody can change them after these checks.
    given = arguments.on_cpu(arguments.as_array(y, name)).copy()
    if isinstance(y, list | tuple) and given.size == len(given):
        _check_kinds([row[0] for row in y] if given.ndim == 2 else list(y), name, given.dtype.kind in "biuf")
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim == 2 and given.shape[1] == meaning.outputs:
        targets, is_multi_label = _rows(given, meaning, output, dtype, name)
        return targets, meaning._replace(multi_label=is_multi_label, learns=False)
    if given.ndim != 1 or meaning.multi_label:
        rows = f"rows (n, {meaning.outputs})"
        expected = rows if meaning.multi_label else "(n,): a label for each sample"
        expected += f", or {rows}" if meaning.outputs > 1 and not meaning.multi_label else ""
        raise ValueError(f"{name} has shape {given.shape}, expected {expected}")
    classes = meaning.classes
    # The usual case.
    if classes is None and given.dtype.kind in "iu" and _within(given, meaning.class_count):
        return given.astype(np.int64, copy=False), meaning._replace(learns=False)
    labels = _plain(given, name)
    if classes is None and meaning.learns:
        classes = _learnt(labels, meaning, name)
    known = np.arange(meaning.class_count) if classes is None else as_labels(classes)
    return _positions(labels, known, name), meaning._replace(classes=classes, learns=False)


def weights_of(sample_weight: Any, class_weight: Any, targets: Array, meaning: Meaning) -> NDArray[np.float64] | None:
    """Return what each sample counts, in units of their mean; None where all count the same.

    Parameters
    ----------
    sample_weight : array_like, shape (n,), optional
    class_weight : {"balanced"} or mapping, optional
        From labels to what their samples count besides; 1 where it says nothing. Balanced: such that all classes that
        occur count the same.
    targets : ndarray
        As `of_classes` or `numbers` returns them.
    meaning : Meaning
    """
    if sample_weight is None and class_weight is None:
        return None
    n = len(targets)
    weights = np.ones(n)
    if sample_weight is not None:
        given = arguments.on_cpu(arguments.as_array(sample_weight, "sample_weight"))
        checks.real_numbers(given.dtype, "sample_weight")
        if given.shape != (n,):
            raise ValueError(f"sample_weight has shape {given.shape}, expected ({n},), one for each sample")
        weights = given.astype(np.float64)
        bad = ~((weights >= 0) & (weights < np.inf))
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"sample_weight[{row}] is {weights[row]:g}; expected finite numbers of at least 0")
    if class_weight is not None:
        if targets.ndim != 1:
            raise ValueError("class_weight needs one class for each sample; use sample_weight")
        weights = in_units_of_mean(weights)
        weights = weights * _by_class(class_weight, targets, weights, meaning)[targets]
    return in_units_of_mean(weights)


def in_units_of_mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weights of samples divided by their mean, where some are positive and none is too large."""
    if not (largest := float(weights.max(initial=0.0))) > 0:
        raise ValueError("sample_weight and class_weight leave no sample to train on; expected a positive sum")
    # The largest is 1 in between, so that no sum and no quotient overflows.
    scaled = weights / largest
    units: NDArray[np.float64] = scaled / scaled.mean()
    return units


def _by_class(value: Any, targets: Array, weights: NDArray[np.float64], meaning: Meaning) -> NDArray[np.float64]:
    """What samples of each class count."""
    count = meaning.class_count
    if isinstance(value, str):
        checks.choice(value, "class_weight", ("balanced",))
        sums = np.bincount(targets, weights, count)
        return np.divide(1.0, sums, out=np.zeros(count), where=sums > 0)
    if not isinstance(value, Mapping):
        raise TypeError(f"class_weight must be 'balanced' or a mapping from labels, got {type(value).__name__}")
    of_class = np.ones(count)
    labels = list(range(count)) if meaning.classes is None else meaning.classes
    for label, number in value.items():
        if label not in labels:
            raise ValueError(f"class_weight has the label {label!r}; expected {_shown(as_labels(labels))}")
        of_class[labels.index(label)] = arguments.number(number, f"class_weight[{label!r}]", low=0.0)
    return of_class


def split(targets: Array, fraction: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide samples at random into those to train with and a fraction to validate with, positions that ascend.

    Of class indices each class gives its share, rounded such that the whole has that of all samples.
    """
    n = len(targets)
    held_out = round(fraction * n)
    if not 0 < held_out < n:
        raise ValueError(f"validation_split of {fraction:g} leaves {held_out} of {n} samples to validate with")
    order = rng.permutation(n)
    if targets.ndim == 1:
        # Sorted by class, each one at random, every step of n / held_out has one of its share.
        order = order[np.argsort(targets[order], kind="stable")]
        chosen = order[((np.arange(held_out) + rng.random()) * n / held_out).astype(np.int64)]
    else:
        chosen = order[:held_out]
    is_held_out = np.zeros(n, bool)
    is_held_out[chosen] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def checked_classes(value: Any, output: str, outputs: int) -> list[Label] | None:
    """Return the argument `classes` of a network with these outputs."""
    if value is None:
        return None
    if output == "identity":
        raise ValueError('classes needs output "softmax" or "sigmoid", this network has "identity"')
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"classes must be a list of labels, got {type(value).__name__}")
    given = list(value)
    as_objects = np.empty(len(given), object)
    as_objects[:] = given
    labels = _plain(as_objects, "classes")
    if len(labels) != max(outputs, 2) or len(np.unique(labels)) != len(labels):
        raise ValueError(
            f"classes must be {max(outputs, 2)} different labels, as layers[-1] says, got {_shown(labels)}"
        )
    return labels.tolist()  # type: ignore[no-any-return]


def as_labels(labels: Sequence[Any]) -> Array:
    """Labels as an array: of integers as one of integers, of which NumPy makes float64 if they need uint64."""
    array = np.array(labels)
    if array.dtype.kind == "f" and all(isinstance(label, int) for label in labels) and min(labels) >= 0:
        return np.array(labels, np.uint64)
    return array


def _aligned(rows: Array) -> Array:
    return rows if arguments.is_aligned(rows) else rows.copy()


def _within(labels: Array, count: int) -> bool:
    """Whether numbers lie within 0 to ``count - 1``."""
    return not len(labels) or bool(labels.min() >= 0 and labels.max() < count)


def _rows(given: Array, meaning: Meaning, output: str, dtype: np.dtype[Any], name: str) -> tuple[Array, bool]:
    """Targets from rows (n, outputs), and whether they are of several labels."""
    checks.real_numbers(given.dtype, name)
    ones = given == 1
    other = ~ones & (given != 0)
    if not other.any():
        counts = ones.sum(axis=1)
        if not meaning.multi_label and (counts == 1).all():
            return np.argmax(ones, axis=1), False
        if meaning.multi_label or (output == "sigmoid" and meaning.learns and meaning.classes is None):
            return ones.astype(dtype), True
        row = int(np.argmax(counts != 1))
        hint = ", as multi_label is False" if output == "sigmoid" else ""
        raise ValueError(f"{name}[{row}] has {counts[row]} ones; expected rows of exactly one 1{hint}")
    if output != "softmax":
        place = np.argwhere(other)[0]
        raise ValueError(f"{checks.item(name, place)} is {given[tuple(place)]}; expected rows of 0 and 1")
    bad = ~(given >= 0)
    if bad.any():
        place = np.argwhere(bad)[0]
        raise ValueError(f"{checks.item(name, place)} is {given[tuple(place)]}; expected soft labels of at least 0")
    sums = given.sum(axis=1, dtype=np.float64)
    if (bad := ~(abs(sums - 1) <= _SUM_TOLERANCE)).any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name}[{row}] adds up to {sums[row]:g}; expected one-hot rows, or soft labels with the sum 1"
        )
    return _aligned(as_dtype(given, dtype, name)), False


def _check_kinds(labels: list[Any], name: str, are_numbers: bool) -> None:
    """Raise TypeError unless labels are all bools, all numbers or all strings: NumPy would make one kind of several.

    If they make an array of numbers, what is neither of the three counts as one: a scalar of another library.
    """
    if len(set(map(type, labels))) == 1 and isinstance(labels[0], int | float | str):  # the usual case
        return
    other = "number" if are_numbers else ""
    kinds = [next((kind for kind, types in _KINDS.items() if isinstance(label, types)), other) for label in labels]
    if "" in kinds:
        row = kinds.index("")
        hint = ": decode bytes" if isinstance(labels[row], bytes) else ""
        raise TypeError(f"{name}[{row}] is {labels[row]!r}; {_EXPECTED}{hint}")
    row = next((row for row, kind in enumerate(kinds) if kind != kinds[0]), 0)
    if row:
        raise TypeError(
            f"{name}[{row}] is {labels[row]!r}, {name}[0] is {labels[0]!r}; labels must be all numbers, all bools or "
            "all strings"
        )


def _plain(labels: Array, name: str) -> Array:
    """Labels as bools, integers, whole float64 or strings; objects too, if all are of one of these kinds."""
    if labels.dtype.kind in "OT":  # T: NumPy's strings of variable length
        _check_kinds(labels.tolist(), name, are_numbers=False)
        labels = as_labels(labels.tolist())
    kind = labels.dtype.kind
    if kind == "U":
        return labels
    if kind not in "biuf":
        raise TypeError(f"{name} has dtype {labels.dtype}; {_EXPECTED}{': decode bytes' if kind == 'S' else ''}")
    if kind == "f":
        labels = labels.astype(np.float64, copy=False)
        if (bad := ~(np.isfinite(labels) & (labels == np.trunc(labels)))).any():
            row = int(np.argmax(bad))
            raise ValueError(f"{name}[{row}] is {labels[row]}; labels must be whole numbers, bools or strings")
        if (merged := abs(labels) > _EXACT).any():
            row = int(np.argmax(merged))
            raise ValueError(f"{name}[{row}] is {labels[row]:.0f}; floats beyond 2**53 are several integers at once")
    return labels


def _learnt(labels: Array, meaning: Meaning, name: str) -> list[Label] | None:
    """The classes that labels stand for: indices if they can be, else as many different labels as there are outputs."""
    kind = labels.dtype.kind
    if kind == "b" and meaning.class_count == 2:
        return [False, True]
    if kind in "iuf" and _within(labels, meaning.class_count):
        return [float(i) for i in range(meaning.class_count)] if kind == "f" else None
    classes = np.unique(labels)
    if len(classes) != meaning.class_count:
        message = (
            f"{name} has {len(classes)} classes ({_shown(classes)}), but the network has {meaning.class_count}, as "
            "layers[-1] says; they must match"
        )
        if kind in "iuf":
            row = int(np.argmax((labels < 0) | (labels >= meaning.class_count)))
            message += f", or be indices: {name}[{row}] is {labels[row]}, not within 0 to {meaning.class_count - 1}"
        raise ValueError(f"{message}. classes= names those that no sample has")
    return classes.tolist()  # type: ignore[no-any-return]


def _positions(labels: Array, classes: Array, name: str) -> NDArray[np.int64]:
    """The class index of each label."""
    are_strings = labels.dtype.kind == "U", classes.dtype.kind == "U"
    # True is no class 1 of five, or of classes from 1 to 3.
    are_bools = labels.dtype.kind == "b" and classes.dtype.kind != "b" and np.sort(classes).tolist() != [0, 1]
    if len(set(are_strings)) > 1 or are_bools:
        known = np.zeros(len(labels), bool)
        found = np.zeros(len(labels), np.int64)
    else:
        ours, theirs = classes, labels
        if ours.dtype.kind != theirs.dtype.kind:
            # NumPy would compare them as float64, in which large integers are equal.
            ours, theirs = ours.astype(object), theirs.astype(object)
        order = np.argsort(ours)
        found = order[np.minimum(np.searchsorted(ours, theirs, sorter=order), len(ours) - 1)]
        known = ours[found] == theirs
    if not known.all():
        row = int(np.argmin(known))
        raise ValueError(f"{name}[{row}] is {labels[row].item()!r}; the classes of this network are {_shown(classes)}")
    return found


def _shown(labels: Array) -> str:
    """Some labels, for a message."""
    shown = [repr(label) for label in labels[:6].tolist()]
    return ", ".join([*shown, "..."] if len(labels) > 6 else shown)
