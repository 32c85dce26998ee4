"""Random numbers that are drawn ahead, or by several threads, are those that one generator gives one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gemmlet.nn import normals
from gemmlet.nn.dataset import Ahead, sample_order
from support import same_bits

PART = normals._PART


def two_generators(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Alike, and with half a word that is left of an integer."""
    pair = np.random.default_rng(seed), np.random.default_rng(seed)
    for rng in pair:
        rng.integers(0, 9, dtype=np.int32)
        assert rng.bit_generator.state["has_uint32"] == 1
    return pair


def assert_filled(rng: np.random.Generator, other: np.random.Generator, size: int, dtype: Any, threads: int) -> None:
    out = np.full(size, np.nan, dtype)
    normals.fill_normal(rng, out, threads)
    assert same_bits(out, other.standard_normal(size).astype(dtype))
    assert rng.bit_generator.state == other.bit_generator.state


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, PART, 2 * PART - 1, 2 * PART, 5 * PART + 17])
def test_normal_numbers_by_threads(size: int, threads: int, dtype: Any) -> None:
    for seed in range(3):
        assert_filled(*two_generators(seed), size, dtype, threads)


def test_many_parts(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every beginning is found, and it is not drawn twice."""
    monkeypatch.setattr(normals, "_PART", 4096)
    found = []
    fill = normals._fill_by_parts
    monkeypatch.setattr(normals, "_fill_by_parts", lambda *arguments: found.append(fill(*arguments)) or found[-1])
    for seed in range(40):
        assert_filled(*two_generators(seed), 30_000 + 997 * seed, dtype, 3)
    assert found == [True] * 40


@pytest.mark.parametrize("words", [1.0, 1.05])
def test_a_beginning_that_is_not_found(words: float, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too early or too late by far, as another ziggurat would have it."""
    monkeypatch.setattr(normals, "_WORDS", words)
    monkeypatch.setattr(normals, "_PART", 1 << 14)
    rng, other = two_generators(0)
    before = rng.bit_generator.state
    out = np.empty(40 << 14, dtype)
    assert not normals._fill_by_parts(rng.bit_generator, out, 40, 2)
    assert rng.bit_generator.state == before
    assert_filled(rng, other, 40 << 14, dtype, 2)


def test_other_generators(dtype: Any) -> None:
    pair = [np.random.Generator(np.random.MT19937(1)) for _ in range(2)]
    out = np.empty(2 * PART, dtype)
    normals.fill_normal(pair[0], out, 4)
    assert same_bits(out, pair[1].standard_normal(2 * PART).astype(dtype))


def draw(rng: Any, n: int) -> Any:
    return rng.standard_normal(n)


def test_ahead() -> None:
    """Whatever was prepared, `take` gives what `draw` gives, and the generator moves on by that alone."""
    rng, other = two_generators(3)
    ahead = Ahead(rng, draw)
    for prepared, taken in ((7, 7), (8, 3), (None, 4), (2, 2), (0, 0), (5, 6)):
        before = rng.bit_generator.state
        if prepared is not None:
            ahead.prepare(prepared)
        assert rng.bit_generator.state == before == other.bit_generator.state
        assert same_bits(ahead.take(taken), draw(other, taken))
        assert rng.bit_generator.state == other.bit_generator.state
    ahead.prepare(4)
    rng.random()
    other.random()
    assert same_bits(ahead.take(4), draw(other, 4))


def test_ahead_is_used() -> None:
    rng, other = two_generators(4)
    drawn = []

    def watched(rng: Any, n: int) -> Any:
        drawn.append(n)
        return draw(rng, n)

    ahead = Ahead(rng, lambda rng, n: pytest.fail("it was drawn already"), watched)
    for n in (3, 5):
        ahead.prepare(n)
        assert same_bits(ahead.take(n), draw(other, n))
    assert drawn == [3, 5]


def test_orders_ahead() -> None:
    rng, other = two_generators(5)
    ahead = Ahead(rng, sample_order)
    for _ in range(3):
        ahead.prepare(100)
        assert same_bits(ahead.take(100), other.permutation(100))
        assert rng.bit_generator.state == other.bit_generator.state
    ahead = Ahead(None, sample_order)
    ahead.prepare(5)
    assert ahead.take(5).tolist() == [0, 1, 2, 3, 4]


def test_an_error_ahead_is_raised_by_take() -> None:
    rng, other = two_generators(6)

    def fails(rng: Any, n: int) -> Any:
        raise MemoryError("no more")

    ahead = Ahead(rng, fails)
    ahead.prepare(5)
    with pytest.raises(MemoryError):
        ahead.take(5)
    ahead = Ahead(rng, draw, fails)
    ahead.prepare(5)
    assert same_bits(ahead.take(5), draw(other, 5))
