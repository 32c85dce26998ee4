"""Noise that is added to the inputs of a network: nearly normal numbers, of random bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .random import STEP_BITS, random_words

# The stream of the noise on the inputs; those of dropout follow.
STREAM = 255

# The standard deviation of a sum of four random bytes, and its mean.
DEVIATION, MEAN = math.sqrt(21845), 510

_GROUP_UNITS, _GROUP_BLOCKS = 32, 8


def noise(seed: int, stream: int, step: int, rows: Any, units: int) -> NDArray[np.int64]:
    """Integers of mean 0 and standard deviation `DEVIATION`, shape (len(rows), units): sums of four bytes, less `MEAN`.

    They are within 3.46 standard deviations. Parameters are those of `dropout.kept`. A group of 32 units has eight
    blocks: units 0 to 15 the words 0 and 1 of the blocks in turn, units 16 to 31 the words 2 and 3.
    """
    groups = -(-units // _GROUP_UNITS)
    blocks = np.arange(groups * _GROUP_BLOCKS)
    words = random_words(seed, stream, step % (1 << STEP_BITS), np.asarray(rows)[:, np.newaxis], blocks)
    words = words.reshape(-1, groups, _GROUP_BLOCKS, 2, 2).swapaxes(2, 3).reshape(-1, groups * _GROUP_UNITS)
    of_bytes = np.ascontiguousarray(words[:, :units].astype(np.uint32))[..., np.newaxis].view(np.uint8)
    return np.asarray(of_bytes.sum(axis=-1, dtype=np.int64) - MEAN)
