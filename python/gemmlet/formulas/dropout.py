"""Dropout: which units are kept, and what they are multiplied by; ``csrc/formulas/dropout.h`` once more.

A unit is kept where 16 random bits are below a threshold, so that a rate counts in units of 2**-16. What is kept is
scaled by 65536 / threshold: its mean is that of the units without dropout, whatever the threshold was rounded to.

Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: a simple way to prevent neural networks from
overfitting", 2014; scaled in training rather than afterwards ("inverted").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .random import words_of_groups

# The decisions of so many units come from a group of the generator's words; they are the bits of a machine word.
GROUP_UNITS = 64

# A threshold that keeps all.
ALL = 1 << 16

# Rows of a mini-batch's second input, as the discriminator of a GAN has one, are counted from here, and so on.
INPUT_ROWS = 1 << 32


def threshold(rate: float) -> int:
    """Of 65536 decisions how many keep a unit; at least 1."""
    return max(1, ALL - round(rate * ALL))


def scale(keep: int) -> float:
    """What units that are kept are multiplied by, rounded to their dtype."""
    return ALL / keep


def places(count: int, rows: int) -> NDArray[np.int64]:
    """The places of `count` rows in a mini-batch of `rows` samples: those of several inputs follow each other."""
    inputs, row = np.divmod(np.arange(count), rows)
    return np.asarray(inputs * INPUT_ROWS + row, np.int64)


def kept(seed: int, stream: int, step: int, rows: Any, units: int, keep: int) -> NDArray[np.bool_]:
    """Which units are kept, as an array of bools, shape (len(rows), units).

    Parameters
    ----------
    seed : int
        The generator's key, below 2**64.
    stream : int
        That of the layer; below 2**16.
    step : int
        Of the training; counted modulo 2**40.
    rows : array_like of int
        The places of the rows in the mini-batch, see `places`.
    units : int
    keep : int
        A threshold.

    Notes
    -----
    A group of 64 units has the words of `random.words_of_groups`, of two decisions each, the lower half first.
    """
    groups = -(-units // GROUP_UNITS)
    words = words_of_groups(seed, stream, step, rows, groups)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return np.asarray(halves.reshape(-1, groups * GROUP_UNITS)[:, :units] < keep)
