"""Checks of what callers of `gemmlet.nn` pass, besides those of arrays and real numbers in `gemmlet._arguments`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from .. import _arguments as arguments
from .._arrays import name_of

# More of anything nobody has; a float64 holds all integers up to it.
_LARGEST = 1 << 53


def whole_number(value: Any, name: str, low: int, *, is_count: bool = True) -> int:
    """Return `value` as an int of at least `low`; a count is no larger than it can be, either."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {arguments.shown(number)}")
    if is_count and number > _LARGEST:
        raise ValueError(f"{name} must be at most 2**53, got {arguments.shown(number)}")
    return number


def verbosity(value: Any, name: str) -> int:
    """Return what is printed: 0, 1 or 2; True is 1."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if whole_number(value, name, 0) > 2:
        raise ValueError(f"{name} must be 0, 1, 2, True or False, got {arguments.shown(value)}")
    return int(value)


def batch_size(value: Any, name: str) -> int:
    """Return the number of rows of a mini-batch; more than there can be are as many as there are."""
    return min(whole_number(value, name, 1, is_count=False), _LARGEST)


def widths(value: Any, name: str, least: int) -> list[int]:
    """Return layer widths as a list of at least `least` ints, each at least 1."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a list of layer widths, got {type(value).__name__}")
    result = [whole_number(width, f"{name}[{i}]", 1) for i, width in enumerate(value)]
    if len(result) < least:
        raise ValueError(f"{name} must have at least {least} width{'s' * (least > 1)}, got {result}")
    return result


def choice(value: Any, name: str, choices: Iterable[str]) -> str:
    """Return `value`, a string out of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; the choices are {', '.join(known)}")
    return value


def path(value: Any, name: str, expected: str = "a path") -> Path:
    """Return `value` as a Path."""
    try:
        return Path(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}") from None


def optional_callable(value: Any, name: str) -> None:
    """Raise unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def float_dtype(value: Any) -> np.dtype[Any]:
    """Return `value` as the dtype float32 or float64; None is float32, until there are samples to follow."""
    try:
        dtype = np.dtype(np.float32 if value is None else value)
    except TypeError:
        dtype = np.dtype(np.void)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {value!r}")
    return dtype


def real_numbers(dtype: np.dtype[Any], name: str) -> None:
    """Raise unless an array of this dtype has real numbers or bools, of any size and byte order."""
    if dtype.kind not in "biuf" and name_of(dtype) != "bfloat16":
        raise TypeError(f"{name} has dtype {dtype}; expected real numbers: integers, floats or bools")


def item(name: str, place: Iterable[int], first: int = 0) -> str:
    """An element of an array in words, ``x[3, 17]``; `first` is the number of its first row."""
    row, *others = map(int, place)
    return f"{name}[{', '.join(map(str, [row + first, *others]))}]"


def pair(value: Any, name: str) -> tuple[Any, Any]:
    """Return `value` as a pair (x, y)."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
        shown = f"{len(value)} items" if isinstance(value, Sequence) else type(value).__name__
        raise TypeError(f"{name} must be a pair (x, y), got {shown}")
    return value[0], value[1]


def dropout_rates(value: Any, name: str, hidden: int) -> float | list[float]:
    """Return `value` as rates within [0, 1): a float for all of so many hidden layers, or a list of one for each."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set):
        rates = [fraction(rate, f"{name}[{i}]") for i, rate in enumerate(value)]
        if len(rates) != hidden:
            raise ValueError(f"{name} must have one rate for each of {hidden} hidden layers, got {len(rates)}")
        return rates
    rate = fraction(value, name)
    if rate and not hidden:
        raise ValueError(f"{name} needs a hidden layer, this network has none")
    return rate


def fraction(value: Any, name: str) -> float:
    """Return `value` as a float within [0, 1)."""
    number = arguments.number(value, name, low=0.0, high=1.0)
    if number == 1.0:
        raise ValueError(f"{name} must be below 1, got 1")
    return number
