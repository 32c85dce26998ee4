"""Random programs of a line over NumPy's surface do the same while NumPy is accelerated.

`numpy_cases` draws and compares them; ``python tools/soak.py --only numpy`` draws more.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

import gemmlet
import numpy_cases
from gemmlet.integrations import numpy as accelerated
from numpy_cases import Case

CASES = 4000


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = gemmlet.get_num_threads()
    gemmlet.set_num_threads(count)
    try:
        with gemmlet.accelerate_numpy():
            yield
    finally:
        gemmlet.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_do_the_same(seed: int) -> None:
    found = list(numpy_cases.differences(seed, CASES, lambda: threads(1 + seed % 2)))
    assert not found, f"{len(found)} programs differ:\n\n" + "\n\n".join(found[:10])
    taken = {name: calls[0] for name, calls in accelerated.counts().items()}
    assert sum(taken.values()) > CASES / 10, taken


@pytest.mark.parametrize("product", ["a @ b", "np.matmul(a, b)", "np.dot(a, b)", "a.dot(b)", "np.dot(a, b, out=c)"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 2, 1), (2, 3, 4), (3, 40, 3), (64, 50, 40), (200, 64, 300), (1, 300, 3)])
@pytest.mark.parametrize("dtype", ["f8", "f4"])
def test_products_tell_of_what_is_invalid(product: str, m: int, k: int, n: int, dtype: str) -> None:
    """Random programs leave it out: of infinities NumPy says so even where nothing is invalid."""
    names = {"np": np, "a": np.ones((m, k), dtype), "b": np.ones((k, n), dtype), "c": np.empty((m, n), dtype)}
    said = [f"invalid value encountered in {'dot' if 'dot' in product else 'matmul'}"]

    def warned(last: float) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert eval(product, names)[-1, -1] == pytest.approx(last, nan_ok=True)
        return [str(w.message) for w in caught]

    for one, other in ((0, np.inf), (np.inf, 1), (np.nan, 1), (0, 0)):
        names["a"][-1, -1], names["b"][-1, -1] = one, other
        last = one * other + k - 1
        before = warned(last)
        with gemmlet.accelerate_numpy():
            # Threads of the BLAS, to which NumPy hands large ones, do not tell.
            assert warned(last) in ([said if other == np.inf else [], before])


@pytest.mark.parametrize(
    ("code", "instead"),
    [
        ("r = a + b", "r = (a + b).astype('f4')"),
        ("r = a + b", "r = np.asfortranarray(a + b)"),
        ("r = a + b", "r = np.nextafter(a + b, 9)"),
        ("r = a + b", "r = (a + b)[:]"),
        ("r = a + b", "r = (a + b).view(Sub)"),
        ("r = -(a * 0)", "r = a * 0"),
        ("r = np.sum(a)", "r = np.array(np.sum(a))"),
        ("r = np.sum(a)", "r = float(np.sum(a))"),
        ("r = a / 0", "r = np.full_like(a, np.inf) * np.sign(a)"),
        ("r = a / 0", "r = np.divide(a, 0, out=np.zeros_like(a), where=True); r = r.copy(); np.float64(1) / 0"),
        ("a += b", "a = a + b"),
        ("r = np.positive(a)", "r = a"),
        ("r = np.tanh(a)", "r = np.tanh(a) * (1 + 2e-15)"),
        ("r = a @ b.T", "r = a @ b.T + 1e-11"),
        ("r = a @ a", "r = np.linalg.cholesky(a)"),
    ],
)
def test_the_comparison_sees_what_differs(code: str, instead: str) -> None:
    operands = {"a": "draw(1, (3, 4))", "b": "draw(2, (3, 4))"}
    case = Case(operands, code, "warn")
    assert numpy_cases.difference(case, numpy_cases.run(case), numpy_cases.run(case)) is None
    assert numpy_cases.difference(case, numpy_cases.run(case), numpy_cases.run(Case(operands, instead, "warn")))
