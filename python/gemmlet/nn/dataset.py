"""Samples, as users give them and as networks take them, and the random numbers that training draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .._arrays import is_on_gpu
from ..backends import select
from ..backends.base import Backend
from ..training.plan import Dataset

Array = NDArray[Any]

# Rows that are computed at a time where the whole is not a mini-batch: 3 MB of float32 images.
CHUNK = 1024

# Below this density of nonzeros, to skip zeros is faster (measured by `gemmlet bench epoch` on inputs of
# several densities: docs/performance.md).
SPARSE_BELOW = 0.5


class Samples:
    """Samples, given as float rows or as uint8 images; handed out as rows of `dtype`, some at a time.

    What is on a GPU stays there.

    Parameters
    ----------
    x : array_like, shape (n, features) or (n, ...) with `features` values a sample
        Of `dtype`, or uint8, which counts as value/255; on the CPU or on a GPU. A sparse matrix of scipy, if `sparse`.
    features : int
    dtype : numpy.dtype
        float32 or float64.
    name : str
        For error messages.
    sparse : bool
        Whether a sparse matrix will do.

    Raises
    ------
    TypeError, ValueError
        The dtype or the shape does not fit.
    """

    def __init__(self, x: Any, features: int, dtype: np.dtype[Any], name: str = "x", *, sparse: bool = False) -> None:
        # Its attributes tell it apart without importing scipy.
        is_sparse = hasattr(x, "tocsr") and hasattr(x, "toarray")
        if is_sparse and not sparse:
            raise TypeError(f"{name} is a sparse matrix; expected an array: {name}.toarray()")
        array = x if is_sparse else arguments.as_array(x, name)
        if array.dtype != np.uint8 and array.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {array.dtype}; expected {dtype}, the network's, or uint8, which counts as "
                f"value/255: convert with {name}.astype(np.{dtype})"
            )
        values = 1
        for length in array.shape[1:]:
            values *= length
        if array.ndim < 2 or values != features:
            raise ValueError(f"{name} has shape {array.shape}, expected (n, {features}), one sample a row")
        self.array: Any = _canonical(array, dtype) if is_sparse else array
        self.name, self.is_sparse = name, is_sparse
        self.on_gpu = not is_sparse and is_on_gpu(array)
        self.features = features
        self.dtype = dtype

    def __len__(self) -> int:
        return int(self.array.shape[0])

    @property
    def backend(self) -> Backend:
        """The backend that computes with them."""
        return select.of(self.array) if self.on_gpu else select.current()

    def stay(self) -> None:
        """Put them where the backend computes, if they are to be used more than once."""
        if not self.is_sparse:
            self.array = self.backend.to_device(self.array)
            self.on_gpu = is_on_gpu(self.array)

    def not_finite(self) -> str | None:
        """What is wrong with them, if not all are finite."""
        if self.array.dtype == np.uint8:
            return None
        if self.is_sparse:
            wrong = np.flatnonzero(~np.isfinite(self.array.data))
            if not len(wrong):
                return None
            row = int(np.searchsorted(self.array.indptr, wrong[0], "right")) - 1
            return not_finite(self.array[row].toarray(), self.name, row)
        array = self.array
        if self.on_gpu:
            if all(map(math.isfinite, self.backend.extremes(array))):
                return None
            array = self.backend.to_cpu(array)
        return not_finite(array, self.name)

    def to_cpu(self) -> Self:
        """Put them on the CPU, and return them."""
        if self.on_gpu:
            self.array, self.on_gpu = self.backend.to_cpu(self.array), False
        return self

    def chunk(self, where: slice) -> Array:
        """Return the samples at `where` as rows, shape (m, features), where the backend computes."""
        if self.is_sparse:
            return self.backend.to_device(self.array[where].toarray())
        rows = self.backend.contiguous(self.backend.to_device(self.array[where]))
        rows = rows.reshape(len(rows), self.features)
        return rows if rows.dtype == self.dtype else self.backend.scaled(rows, self.dtype)

    def dataset(self, *, may_skip_zeros: bool) -> Dataset:
        """The samples as training takes them; zeros are skipped, if they may be, where there are many."""
        if self.is_sparse:
            indptr, indices = self.array.indptr, self.array.indices
            return Dataset(
                self.array.data, indptr.astype(np.int64, copy=False), indices.astype(np.int32, copy=False), True
            )
        if self.on_gpu:
            return Dataset(self.backend.contiguous(self.array).reshape(len(self), self.features))
        rows = np.ascontiguousarray(self.array).reshape(len(self), self.features)
        if not arguments.is_aligned(rows):
            rows = rows.copy()
        # A thousand rows, evenly spread, tell the density.
        some = rows[:: max(1, len(rows) // 1000)]
        return Dataset(rows, skip_zeros=may_skip_zeros and bool(np.count_nonzero(some) < SPARSE_BELOW * some.size))


def _canonical(matrix: Any, dtype: np.dtype[Any]) -> Any:
    """The sparse matrix by rows, columns ascending and each once, with numbers of `dtype`."""
    rows = matrix.tocsr()
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    if rows.dtype == np.uint8:
        rows = rows.astype(dtype)
        rows.data /= 255.0
    return rows


def not_finite(array: Array, name: str, first: int = 0) -> str | None:
    """What is wrong with rows, counted from `first` on, of which not all numbers are finite; None if all are."""
    if array.dtype.kind == "f":
        for where in slices(len(array), CHUNK):
            if not np.isfinite(rows := array[where].reshape(-1)).all():
                at = int(np.argmin(np.isfinite(rows)))
                row = first + where.start + at // (rows.size // (where.stop - where.start))
                return f"{name} must be finite, got {rows[at]} in row {row}"
    return None


def slices(n: int, size: int) -> Iterator[slice]:
    """Divide ``range(n)`` into slices of `size`; the last one may be shorter."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def sample_order(rng: np.random.Generator | None, n: int) -> NDArray[np.int64]:
    """The order in which an epoch takes n samples: random if there is an `rng`."""
    return np.arange(n) if rng is None else rng.permutation(n)


class Ahead:
    """What a random generator gives, drawn before it is wanted.

    The generator itself moves on only as something is taken: what was drawn in vain leaves no trace.

    Parameters
    ----------
    rng : Generator or None
        With None, nothing is drawn ahead.
    draw : callable
        ``draw(rng, n)`` returns an array.
    draw_ahead : callable, optional
        The same array, and the same state of `rng` after it, by other means.
    """

    def __init__(
        self,
        rng: np.random.Generator | None,
        draw: Callable[[Any, int], Array],
        draw_ahead: Callable[[Any, int], Array] | None = None,
    ) -> None:
        self._rng, self._draw, self._draw_ahead = rng, draw, draw_ahead or draw
        self._other: np.random.Generator | None = None
        # How many, the states before and after, and what was drawn.
        self._prepared: tuple[int, Any, Any, Array] | None = None

    def prepare(self, n: int) -> None:
        """Draw n, which `take` will probably be asked for next."""
        self._prepared = None
        if self._rng is None:
            return
        try:
            before = self._rng.bit_generator.state
            self._other = self._other or copy_of(self._rng)
            self._other.bit_generator.state = before
            drawn = self._draw_ahead(self._other, n)
            self._prepared = n, before, self._other.bit_generator.state, drawn
        except Exception:
            return  # `take` will raise it, where it belongs

    def take(self, n: int) -> Array:
        """Return n, just as `draw` gives them."""
        prepared, self._prepared = self._prepared, None
        if self._rng is None or prepared is None or prepared[:2] != (n, self._rng.bit_generator.state):
            return self._draw(self._rng, n)
        self._rng.bit_generator.state = prepared[2]
        return prepared[3]


def copy_of(rng: np.random.Generator) -> np.random.Generator:
    """Return a generator that will give the same."""
    other = type(rng.bit_generator)(0)
    other.state = rng.bit_generator.state
    return np.random.Generator(other)
