"""Samples, as users give them and as networks take them, and the random numbers that training draws."""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .._arrays import is_on_gpu
from .._memory import held
from ..backends import select
from ..backends.base import Backend
from ..training.plan import Dataset
from . import _checks as checks

Array = NDArray[Any]

# Rows that are computed at a time where the whole is not a mini-batch: 3 MB of float32 images.
CHUNK = 1024

# Below this density of nonzeros, to skip zeros is faster (measured by `gemmlet bench epoch` on inputs of
# several densities: docs/performance.md).
SPARSE_BELOW = 0.5

# Rows, evenly spread, that tell samples from others, in a millisecond.
_CHECKED_ROWS = 256


class Samples:
    """Samples, given as rows of numbers or as uint8 images; handed out as rows of `dtype`, some at a time.

    What is on a GPU stays there. This is the only place where samples are converted. A callback or another thread may
    change the numbers, and the columns of a sparse matrix, which are checked where they are used; its rows, shapes and
    sizes stay as they are.

    Parameters
    ----------
    x : array_like, shape (n, features) or (n, ...) with `features` values a sample
        Real numbers or bools of any dtype, which count as their value, but for uint8, which counts as value/255; on the
        CPU or on a GPU. A sparse matrix of scipy, if `sparse`.
    features : int
    dtype : numpy.dtype or None
        float32 or float64. With None, it follows the samples: float32 where that holds every number of their dtype
        exactly, else float64.
    name : str
        For error messages.
    sparse : bool
        Whether a sparse matrix will do.

    Raises
    ------
    TypeError, ValueError
        The dtype or the shape does not fit. A number beyond the range of `dtype` is found when it is converted.
    """

    def __init__(
        self, x: Any, features: int, dtype: np.dtype[Any] | None, name: str = "x", *, sparse: bool = False
    ) -> None:
        # Its attributes tell it apart without importing scipy.
        is_sparse = hasattr(x, "tocsr") and hasattr(x, "toarray")
        if is_sparse and not sparse:
            raise TypeError(f"{name} is a sparse matrix; expected an array: {name}.toarray()")
        array = x if is_sparse else arguments.as_array(x, name)
        checks.real_numbers(array.dtype, name)
        values = 1
        for length in array.shape[1:]:
            values *= length
        if array.ndim < 2 or (is_sparse and array.ndim > 2) or values != features:
            hint = f": {name}.reshape(-1, 1)" if array.ndim == 1 and features == 1 else ""
            raise ValueError(f"{name} has shape {array.shape}, expected (n, {features}), one sample a row{hint}")
        self.array: Any
        self.name, self.is_sparse = name, is_sparse
        # While it is held, NumPy resizes no array whose memory is used here.
        if is_sparse:
            self.array = _canonical(x, name)
            self.held = held(self.array.data, self.array.indices)
        else:
            self.array = array.view()
            self.held = held(array)
        self.on_gpu = not is_sparse and is_on_gpu(array)
        self.features = features
        if dtype is None:
            dtype = np.dtype(np.float32 if np.can_cast(array.dtype, np.float32) else np.float64)
        self.dtype = dtype

    def __len__(self) -> int:
        return int(self.array.shape[0])

    @property
    def backend(self) -> Backend:
        """The backend that computes with them."""
        return select.of(self.array) if self.on_gpu else select.current()

    def stay(self) -> None:
        """Convert them and move them to the backend's device once, as samples are that are used repeatedly."""
        self.convert()
        if not self.is_sparse:
            self.array = self.backend.to_device(self.array)
            self.on_gpu = is_on_gpu(self.array)

    def not_finite(self) -> str | None:
        """Return an error message if a number is not finite, else None."""
        if self.array.dtype == np.uint8:
            return None
        if self.is_sparse:
            wrong = np.flatnonzero(~np.isfinite(self.array.data))[:1]
            if not len(wrong):
                return None
            row = int(np.searchsorted(self.array.indptr, wrong[0], "right")) - 1
            # Of the value alone: `toarray` of the row would write wherever its columns point by now.
            return not_finite(self.array.data[wrong], self.name, row)
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

    def convert(self) -> None:
        """Convert all samples to `dtype`, for training; images of bytes stay bytes."""
        self.array = self._converted(self.array, 0)

    def _converted(self, array: Any, first: int) -> Any:
        """Return `array`, whose first row is sample `first`, as `dtype`; images of bytes stay bytes."""
        if array.dtype == self.dtype:
            return array
        if self.is_sparse:
            if array.dtype == np.uint8:
                data = self.backend.scaled(array.data, self.dtype)
            else:
                data = as_dtype(array.data, self.dtype, f"{self.name}.data")
            return type(array)((data, array.indices, array.indptr), shape=array.shape)
        return array if array.dtype == np.uint8 else as_dtype(array, self.dtype, self.name, first)

    def chunk(self, where: slice) -> Array:
        """Return the samples at `where` as rows, shape (m, features), where the backend computes."""
        if self.is_sparse:
            indptr = self.array.indptr[where.start : where.stop + 1]
            entries = slice(indptr[0], indptr[-1])
            columns = self.array.indices[entries].copy()
            _check_indices(columns, self.features, self.name)
            shape = len(indptr) - 1, self.features
            rows = type(self.array)((self.array.data[entries], columns, indptr - indptr[0]), shape=shape)
            return self.backend.to_device(self._converted(rows, where.start).toarray())
        some = self._converted(self.array[where], where.start)
        rows = self.backend.contiguous(self.backend.to_device(some))
        rows = rows.reshape(len(rows), self.features)
        return rows if rows.dtype == self.dtype else self.backend.scaled(rows, self.dtype)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return some of them, a copy."""
        taken = copy.copy(self)
        taken.array = self.array[rows]
        taken.held = held(taken.array.data, taken.array.indices) if self.is_sparse else held(taken.array)
        return taken

    def dataset(self, *, may_skip_zeros: bool) -> Dataset:
        """The samples as training takes them; zeros are skipped, if they may be, where there are many."""
        self.convert()
        if self.is_sparse:
            indptr, indices = self.array.indptr.astype(np.int64), np.ascontiguousarray(self.array.indices, np.int32)
            return Dataset(np.ascontiguousarray(self.array.data), indptr, indices, True)
        if self.on_gpu:
            return Dataset(self.backend.contiguous(self.array).reshape(len(self), self.features))
        rows = np.ascontiguousarray(self.array).reshape(len(self), self.features)
        if not arguments.is_aligned(rows):
            rows = rows.copy()
        # A thousand rows, evenly spread, tell the density; NumPy counts bools up to ten times as fast as floats.
        some = rows[:: max(1, len(rows) // 1000)] != 0
        return Dataset(rows, skip_zeros=may_skip_zeros and bool(np.count_nonzero(some) < SPARSE_BELOW * some.size))


def _canonical(matrix: Any, name: str) -> Any:
    """Return a sparse matrix as CSR, its column indices ascending and unique; only `indptr` is always a copy."""
    for part in ("indptr", "indices", "row", "col"):
        found = np.asarray(getattr(matrix, part, 0)).dtype
        if found.kind not in "iu":
            raise TypeError(f"{name} is a sparse matrix whose {part} has dtype {found}; expected integers")
    if matrix.format != "csr":
        matrix = _by_rows(matrix, name)
    n, features = matrix.shape
    indptr, indices, data = map(np.asarray, (matrix.indptr, matrix.indices, matrix.data))
    if not indptr.ndim == indices.ndim == data.ndim == 1:
        raise ValueError(f"{name} is a sparse matrix whose indptr, indices and data are not one-dimensional")
    indptr, most = indptr.astype(np.int64), min(len(indices), len(data))
    if len(indptr) != n + 1 or indptr[0] != 0 or indptr[-1] > most or np.any(indptr[1:] < indptr[:-1]):
        raise ValueError(
            f"{name} is a sparse matrix whose indptr does not fit: expected {n + 1} offsets that ascend from 0 to at "
            f"most {most}, the number of its indices"
        )
    indices, data = indices[: indptr[-1]], data[: indptr[-1]]
    _check_indices(indices, features, name)
    ascending, starts = indices[1:] > indices[:-1], indptr[1:-1]
    ascending[starts[(starts > 0) & (starts < len(indices))] - 1] = True
    is_canonical = bool(ascending.all())
    if not is_canonical:
        # SciPy trusts indices: it sorts a copy, which has been checked and which nobody else can change.
        indices, data = indices.copy(), data.copy()
        _check_indices(indices, features, name)
    rows = type(matrix)((data, indices, indptr), shape=matrix.shape)
    if not is_canonical:
        rows.sum_duplicates()
    return rows


def checksum(rows: Any) -> int:
    """What tells samples or targets from others, by some of their rows; a sparse matrix has that of its array."""
    some = rows[:: math.ceil(rows.shape[0] / _CHECKED_ROWS)]
    array = some.toarray() if hasattr(some, "toarray") else arguments.on_cpu(some)
    return zlib.crc32(array.tobytes())


def not_finite(array: Array, name: str, first: int = 0) -> str | None:
    """Return an error message that names the first row with a number that is not finite, else None.

    Rows are counted from `first` on.
    """
    if array.dtype.kind == "f":
        for where in slices(len(array), CHUNK):
            if not np.isfinite(rows := array[where].reshape(-1)).all():
                at = int(np.argmin(np.isfinite(rows)))
                row = first + where.start + at // (rows.size // (where.stop - where.start))
                return f"{name} must be finite, got {rows[at]} in row {row}"
    return None


def as_dtype(array: Any, dtype: np.dtype[Any], name: str, first: int = 0) -> Any:
    """Return real numbers, on the CPU or a GPU, as `dtype`; what is converted becomes C-contiguous.

    Raises
    ------
    ValueError
        A finite one is beyond the range of `dtype`; the message has its place, if the first row has the number `first`.
    """
    if array.dtype == dtype:
        return array
    if not is_on_gpu(array):
        # NumPy reads the processor's overflow flag: no pass over the result has to look for infinities.
        with contextlib.suppress(FloatingPointError), np.errstate(all="ignore", over="raise"):
            return array.astype(dtype, order="C")
    with np.errstate(all="ignore"):
        numbers = array.astype(dtype, order="C")
    beyond = arguments.on_cpu(abs(numbers) == np.inf) & arguments.on_cpu(abs(array) != np.inf)
    if not beyond.any():
        return numbers
    place = np.argwhere(beyond)[0]
    value = array[tuple(place)]
    raise ValueError(f"{checks.item(name, place, first)} is {value:g}, which is beyond the range of {dtype}")


def _by_rows(matrix: Any, name: str) -> Any:
    """A sparse matrix of another format than CSR as CSR, after its indices have been checked."""
    n, features = matrix.shape
    if matrix.format == "coo":
        _check_indices(np.ravel(matrix.row), n, name, "row")
        _check_indices(np.ravel(matrix.col), features, name)
    elif matrix.format == "csc":
        _check_indices(np.ravel(matrix.indices), n, name, "row")
    try:
        # SciPy checks a copy, which nobody else can change. (COO matrices are checked by their constructor.)
        own = matrix.copy()
        if hasattr(own, "check_format"):
            own.check_format()
        return own.tocsr()
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} is a sparse matrix whose indices do not fit: {error}") from error


def _check_indices(indices: NDArray[Any], high: int, name: str, part: str = "column") -> None:
    """Raise ValueError unless row or column indices of a sparse matrix are in range."""
    if len(indices) and (indices.min() < 0 or indices.max() >= high):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"{name} is a sparse matrix with the {part} {wrong}; expected 0 to {high - 1}")


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
