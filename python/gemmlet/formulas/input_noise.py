"""Noise that is added to the inputs of a network: nearly normal numbers, of random bytes.

``csrc/formulas/input_noise.h`` has it once more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .random import words_of_groups

# The standard deviation of a sum of four random bytes, and its mean.
DEVIATION, MEAN = math.sqrt(21845), 510

_GROUP_UNITS = 32


def noise(seed: int, stream: int, step: int, rows: Any, units: int) -> NDArray[np.int64]:
    """Integers of mean 0 and standard deviation `DEVIATION`, shape (len(rows), units): sums of four bytes, less `MEAN`.

    They are within 3.46 standard deviations. Parameters are those of `dropout.kept`. A group of 32 units has the words
    of `random.words_of_groups`.
    """
    groups = -(-units // _GROUP_UNITS)
    words = words_of_groups(seed, stream, step, rows, groups).reshape(-1, groups * _GROUP_UNITS)
    of_bytes = np.ascontiguousarray(words[:, :units].astype(np.uint32))[..., np.newaxis].view(np.uint8)
    return np.asarray(of_bytes.sum(axis=-1, dtype=np.int64) - MEAN)
