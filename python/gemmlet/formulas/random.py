"""Random numbers that are a function of what they are for: Philox 4x32-10, a counter-based generator.

The key is the seed, and the counter is (block, row, step, stream), which no two uses share: numbers depend on no order,
and so neither on threads nor on mini-batches. ``csrc/formulas/random.h`` has the layout of the counter.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# What random numbers are for. The inputs of layer k have the dropout of the stream 256 + k; a second forward pass of a
# network in a step adds `SECOND_PASS` to its streams, of which the compiled plans know those below twice that.
STREAMS = {"warp": 0, "noise": 1, "erase": 2, "input noise": 255, "dropout": 256}
SECOND_PASS = 1 << 14

# The bits of a counter's parts.
BLOCK_BITS, ROW_BITS, STEP_BITS, STREAM_BITS = 32, 40, 40, 16

# The blocks of a group of units.
GROUP_BLOCKS = 8

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(words: list[NDArray[np.uint64]], key: int) -> list[NDArray[np.uint64]]:
    """The four random words of a counter; each is below 2**32, and an array of any shape."""
    a, b, c, d = words
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (second >> _HALF) ^ b ^ np.uint64(key0), second & _LOW
        c, d = (first >> _HALF) ^ d ^ np.uint64(key1), first & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def random_words(seed: int, stream: int, step: int, rows: Any, blocks: Any) -> NDArray[np.uint64]:
    """The numbers of some blocks: four for each, below 2**32, along a last axis.

    Parameters
    ----------
    seed : int
        Below 2**64.
    stream : int
        What the numbers are for; below 2**16.
    step : int
        The epoch or the step; below 2**40.
    rows, blocks : array_like of int
        They are broadcast against each other; below 2**40 and 2**32.
    """
    rows, blocks = np.broadcast_arrays(np.asarray(rows, np.uint64), np.asarray(blocks, np.uint64))
    last = np.uint64(stream + (step >> 32 << 24)) + (rows >> _HALF << np.uint64(16))
    words = [blocks, rows & _LOW, np.full(rows.shape, step & 0xFFFFFFFF, np.uint64), last]
    return np.stack(philox(words, seed), axis=-1)


def words_of_groups(seed: int, stream: int, step: int, rows: Any, groups: int) -> NDArray[np.uint64]:
    """The words of groups of units, 32 each, of rows at these places: shape (len(rows), groups, 32).

    Each group has `GROUP_BLOCKS` blocks: first the words 0 and 1 of the blocks in turn, then the words 2 and 3. `step`
    counts modulo 2**40.
    """
    blocks = np.arange(groups * GROUP_BLOCKS)
    words = random_words(seed, stream, step % (1 << STEP_BITS), np.asarray(rows)[:, np.newaxis], blocks)
    return words.reshape(-1, groups, GROUP_BLOCKS, 2, 2).swapaxes(2, 3).reshape(-1, groups, 4 * GROUP_BLOCKS)
