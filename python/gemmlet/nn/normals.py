"""Normal numbers by several threads, which are those of one generator, bit for bit.

NumPy's ziggurat takes one word of the generator's for most numbers, and more for a few. Whoever begins at any word has
so gone astray by one or two at most, and soon gives the very numbers that are given from the first word on. So threads
begin a little before the words where their parts are expected, and where a part begins is found by its numbers.
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
    generator, parts = rng.bit_generator, min(out.size // _PART, 64 * threads)
    can = threads > 1 and parts > 1 and isinstance(generator, np.random.PCG64)
    if not (can and _fill_by_parts(generator, out, parts, threads)):
        out[...] = rng.standard_normal(out.size)


def _fill_by_parts(generator: Any, out: NDArray[Any], parts: int, threads: int) -> bool:
    """Whether every part's beginning was found; if not, `generator` is as it was."""
    before = generator.state
    edges = [out.size * part // parts for part in range(parts + 1)]

    def draw(part: int) -> tuple[np.random.Generator, NDArray[np.float64]]:
        other, early = np.random.PCG64(0), _early(edges[part])
        other.state = before
        other.advance(max(0, int(_WORDS * edges[part]) - early))
        mine, count = np.random.Generator(other), edges[part + 1] - edges[part]
        # The last part must not go further than it has to.
        return mine, mine.standard_normal(count if part == parts - 1 else count + 2 * early + _ALIKE)

    next_ones = None
    with ThreadPoolExecutor(threads) as pool:
        for part, (mine, numbers) in enumerate(pool.map(draw, range(parts))):
            begin = 0 if next_ones is None else _place(numbers, next_ones)
            if begin is None:
                return False
            if part == parts - 1:
                numbers = np.concatenate([numbers, mine.standard_normal(begin)])
                # `advance` forgets the half of a word that drawing integers may have left.
                generator.state = {**before, "state": mine.bit_generator.state["state"]}
            end = begin + edges[part + 1] - edges[part]
            out[edges[part] : edges[part + 1]] = numbers[begin:end]
            next_ones = numbers[end : end + _ALIKE]
    return True


def _early(count: int) -> int:
    """Words by which to begin before `count` numbers probably end: ten standard deviations, and some to spare."""
    return 64 + 2 * math.isqrt(count) if count else 0


def _place(numbers: NDArray[np.float64], next_ones: NDArray[np.float64]) -> int | None:
    """Where in `numbers` these begin, which must be `_ALIKE` ones."""
    for place in np.flatnonzero(numbers == next_ones[0]) if len(next_ones) == _ALIKE else ():
        if np.array_equal(numbers[place : place + _ALIKE], next_ones):
            return int(place)
    return None
