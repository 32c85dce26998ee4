"""Philox, the counter-based generator: NumPy's, and that of every instruction set, against known answers."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmlet.formulas import random

CSRC = Path(__file__).parents[1] / "csrc"

# Random123's (kat_vectors, philox4x32 10): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def use_of(counter: list[int], key: list[int]) -> dict[str, int]:
    """The arguments of `random_words` that have these words."""
    block, row, step, last = counter
    return {
        "seed": key[0] | key[1] << 32,
        "stream": last & 0xFFFF,
        "step": step | last >> 24 << 32,
        "row": row | (last >> 16 & 0xFF) << 32,
        "first_block": block,
    }


def by_reference(seed: int, stream: int, step: int, row: int, first_block: int, blocks: int = 1) -> Any:
    return random.random_words(seed, stream, step, row, first_block + np.arange(blocks))


def by_extension(backend: Any, blocks: int = 1, **use: int) -> Any:
    if not hasattr(backend, "extension"):
        pytest.skip("the reference's")
    out = np.empty((blocks, 4), np.uint32)
    backend.extension.random_words(*use.values(), out)
    return out


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str, any_threads_backend: Any) -> None:
    use = use_of(words_of(counter), words_of(key))
    assert by_reference(**use).tolist() == [words_of(result)]
    assert by_extension(any_threads_backend, **use).tolist() == [words_of(result)]


def below(bits: int) -> Any:
    return st.integers(0, 2**bits - 1)


@given(seed=below(64), stream=below(16), step=below(40), row=below(40), first=below(31), blocks=st.integers(0, 40))
def test_both_languages_draw_the_same(any_threads_backend: Any, first: int, blocks: int, **use: int) -> None:
    use = {name: use[name] for name in ("seed", "stream", "step", "row")} | {"first_block": first}
    np.testing.assert_array_equal(
        by_extension(any_threads_backend, blocks, **use), by_reference(**use, blocks=blocks), strict=False
    )


def test_no_two_uses_share_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of a counter has bits of its own, all 128 together."""
    monkeypatch.setattr(random, "philox", lambda words, key: words)

    def counter(stream: int, step: int, row: int, block: int) -> int:
        words = random.random_words(0, stream, step, row, block).tolist()
        return sum(word << 32 * i for i, word in enumerate(words))

    bits = random.STREAM_BITS, random.STEP_BITS, random.ROW_BITS, random.BLOCK_BITS
    single = [
        counter(*(1 << bit if part == i else 0 for i in range(4))) for part in range(4) for bit in range(bits[part])
    ]
    assert sorted(single) == [1 << bit for bit in range(128)]
    assert counter(*((1 << count) - 1 for count in bits)) == (1 << 128) - 1


def test_the_numbers_look_random() -> None:
    """Each bit is one half of the time, and none follows another, within a block nor over rows, steps and streams."""
    draws = [
        random.random_words(7, stream, step, np.arange(500)[:, None], np.arange(8)).reshape(-1, 4)
        for stream, step in itertools.product((0, 1), (0, 1))
    ]
    bits = np.concatenate([np.unpackbits(d.astype("<u4").view(np.uint8), axis=1) for d in draws], axis=1) * 2.0 - 1.0
    count = len(bits)
    assert np.abs(bits.mean(axis=0)).max() < 5 / np.sqrt(count)
    correlation = bits.T @ bits / count
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / np.sqrt(count)
    assert np.abs((bits[1:] * bits[:-1]).mean(axis=0)).max() < 5 / np.sqrt(count)


SCALAR = """
constexpr unsigned word(int i) {
  unsigned long long words[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
  gemmlet::philox(words, 0x299f31d0a4093822);
  return static_cast<unsigned>(words[i]);
}
static_assert(word(0) == 0xd16cfe09 && word(1) == 0x94fdcceb && word(2) == 0x5001e420 && word(3) == 0x24126ea1, "");
"""


@pytest.mark.skipif(not CSRC.is_dir() or shutil.which("g++") is None, reason="no checkout, or no compiler")
def test_scalars_give_the_known_answer(tmp_path: Path) -> None:
    """As a GPU has them."""
    file = tmp_path / "scalar.cpp"
    scalar_of = "namespace gemmlet { template <class V> using ScalarOf = V; }"
    file.write_text(f'#define GEMMLET_INLINE inline\n{scalar_of}\n#include "formulas/random.h"\n{SCALAR}')
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{CSRC}", file], check=True)
