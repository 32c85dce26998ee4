"""Normal numbers by several threads, which are those of one generator, bit for bit.

NumPy's ziggurat takes one word of the generator's for most numbers, and more for a few. Whoever begins at any word has
so gone astray by one or two at most, and soon gives the very numbers that are given from the first word on. So threads
begin at words where their parts are expected a little later, and where a part begins is found by its numbers.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers that a thread draws at a time: half a millisecond.
_PART = 1 << 16

# Words that a number takes on average, and how many numbers tell that two streams are one.
_WORDS, _ALIKE = 1.0221, 8


def fill_normal(rng: np.random.Generator, out: NDArray[Any], threads: int) -> None:
    """``out[...] = rng.standard_normal(out.size)``, out of one dimension; `rng` is moved on as by that."""
    parts = out.size // _PART
    if threads < 2 or parts < 2 or not isinstance(rng.bit_generator, np.random.PCG64):
        out[...] = rng.standard_normal(out.size)
        return
    generator, before = rng.bit_generator, rng.bit_generator.state
    starts = [part * _PART for part in range(parts)]
    ends = [*starts[1:], out.size]

    def draw(part: int) -> tuple[np.random.Generator, NDArray[np.float64]]:
        other = np.random.PCG64(0)
        other.state = before
        other.advance(max(0, int(_WORDS * starts[part]) - _early(starts[part])))
        mine, count = np.random.Generator(other), ends[part] - starts[part]
        # The last one shall not go further than it has to.
        more = 0 if part == parts - 1 else 2 * _early(starts[part]) + _ALIKE
        return mine, mine.standard_normal(count + more)

    with ThreadPoolExecutor(threads) as pool:
        expected = None
        for part, (last, numbers) in enumerate(pool.map(draw, range(parts))):
            begin = 0 if expected is None else _place(numbers, expected)
            count = ends[part] - starts[part]
            if begin is None:
                break
            if part == parts - 1:
                numbers = np.concatenate([numbers, last.standard_normal(begin)])
                # (`advance` forgets the half of a word that is left of integers drawn before.)
                generator.state = {**before, "state": last.bit_generator.state["state"]}
            out[starts[part] : ends[part]] = numbers[begin : begin + count]
            expected = numbers[begin + count : begin + count + _ALIKE]
            if len(expected) < _ALIKE and part < parts - 1:
                begin = None
                break
    if begin is None:
        out[...] = rng.standard_normal(out.size)


def _early(numbers: int) -> int:
    """Words by which to begin before where so many numbers probably end: ten standard deviations, and some to fall in."""
    return 64 + 2 * math.isqrt(numbers) if numbers else 0


def _place(numbers: NDArray[np.float64], expected: NDArray[np.float64]) -> int | None:
    """Where in `numbers` the expected ones begin."""
    for place in np.flatnonzero(numbers == expected[0]):
        if np.array_equal(numbers[place : place + _ALIKE], expected):
            return int(place)
    return None
