"""Batches of samples that a function, a sequence or an iterator gives, and the `fit` that takes them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._memory import held
from ..training.plan import Gather, Loss, TrainingPlan
from . import _checks as checks
from .dataset import Array, Samples, copy_of, not_finite, sample_order
from .fit import StopTraining, Training
from .schedules import ReduceOnPlateau, lr_factors

# Batches are trained on together, as a backend takes many steps in a call: up to so many bytes, or what has come in so
# many seconds.
_BLOCK_BYTES = 1 << 25
_BLOCK_SECONDS = 0.1

# What says that an object is an array.
_OF_ARRAYS = ("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__", "toarray")


class Piece(NamedTuple):
    """What one batch has: samples, and targets if there are any; both were checked."""

    samples: Samples
    targets: Any

    def __len__(self) -> int:
        return len(self.samples)


class Block(NamedTuple):
    """Rows that are on the host together, and are trained on as a dataset.

    Attributes
    ----------
    samples, targets
        As in `Piece`.
    batches : int
        How many batches of the source they are.
    size : int
        The rows of a mini-batch; the last one may have fewer.
    """

    samples: Samples
    targets: Any
    batches: int
    size: int


def is_source(x: Any) -> bool:
    """Whether the samples of a `fit` are batches: a function, or an iterable that is no array."""
    if type(x) is np.ndarray or isinstance(x, list | tuple | memoryview):  # the usual case
        return False
    is_iterable = hasattr(x, "__iter__") or (hasattr(x, "__getitem__") and hasattr(x, "__len__"))
    return callable(x) or (is_iterable and not any(hasattr(x, name) for name in _OF_ARRAYS))


class Source:
    """Batches of `fit`, epoch by epoch.

    Parameters
    ----------
    x : callable, sequence or iterable
    steps_per_epoch : int or None
        How many batches an epoch has.
    epochs : int
        Of an iterator, which ends once.
    load : callable
        ``load(batch, name)`` returns the `Piece` of what x gives.

    Attributes
    ----------
    count : int or None
        How many batches an epoch has, if that is known.
    is_indexed : bool
        Whether batches are asked for by number, in any order.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """

    def __init__(self, x: Any, steps_per_epoch: Any, epochs: int, load: Callable[[Any, str], Piece]) -> None:
        self._load, self._x = load, x
        self.count = None if steps_per_epoch is None else checks.whole_number(steps_per_epoch, "steps_per_epoch", 1)
        if any(hasattr(x, name) for name in _OF_ARRAYS) or isinstance(x, Mapping | str | bytes | memoryview):
            raise TypeError(f"x is a {type(x).__name__}; without y it must be batches: a function, or an iterable")
        self._get: Callable[[int], Any] | None = None
        if callable(x):
            self._get = x
        elif hasattr(x, "__getitem__") and hasattr(x, "__len__"):
            self._get = x.__getitem__
        elif not hasattr(x, "__iter__"):
            raise TypeError(f"x must be samples, or batches: a function, or an iterable; got {type(x).__name__}")
        self.is_indexed = self._get is not None
        try:
            length = len(x)
        except TypeError:  # it has none, or does not know it, as a DataLoader over an IterableDataset
            length = None
        if length is not None:
            if length == 0:
                raise ValueError("x has no batch; expected at least one")
            if self.is_indexed and (self.count or 0) > length:
                raise ValueError(f"steps_per_epoch is {self.count}, x has {length} batches")
            self.count = self.count or length
        elif self.is_indexed and self.count is None:
            raise ValueError("steps_per_epoch is needed: how many batches the function has")
        self._ends_once = not self.is_indexed and iter(x) is x
        if self._ends_once and self.count is None and epochs > 1:
            raise ValueError("x is an iterator, which ends once: give steps_per_epoch, or epochs=1")
        # Of an iterator, or of a sequence of batches that one epoch does not use up.
        self._iterator: Iterator[Any] | None = None
        self._has_ended = False
        self._first: tuple[int, Piece] | None = None

    def first(self, rng: np.random.Generator | None) -> Piece:
        """Load the batch that the first epoch begins with; `rng` will draw its order."""
        if self._get is not None:
            assert self.count is not None
            number = int(sample_order(None if rng is None else copy_of(rng), self.count)[0])
            self._first = number, self._loaded(number, self._get(number))
        else:
            batch = next(self._started(), None)
            if batch is None:
                raise ValueError("x has no batch; expected at least one")
            self._first = 0, self._loaded(0, batch)
        return self._first[1]

    def epoch(self, order: Sequence[int] | None) -> Iterator[Piece]:
        """The batches of an epoch, by their numbers in `order`, or as they come."""
        for number, batch in self._numbered(order):
            kept, self._first = self._first, None
            yield kept[1] if kept is not None and kept[0] == number else self._loaded(number, batch())
        if callable(ended := getattr(self._x, "on_epoch_end", None)):
            ended()  # as Keras does

    def _numbered(self, order: Sequence[int] | None) -> Iterator[tuple[int, Callable[[], Any]]]:
        if order is not None:
            assert self._get is not None
            for number in order:
                yield number, partial(self._get, number)
            return
        iterator, done = self._started(), 0
        if self._first is not None:
            yield 0, partial(next, iterator)  # which is not called: it was loaded
            done = 1
        for batch in itertools.islice(iterator, None if self.count is None else self.count - done):
            yield done, partial(_itself, batch)
            done += 1
        if self._ends_once and done < (self.count or 0) and not self._has_ended:
            self._has_ended = True
            warnings.warn(f"x has ended after {done} of {self.count} batches, and so does fit", RuntimeWarning, 2)
        if self.count is None and not self._ends_once:
            self._iterator = None

    def _started(self) -> Iterator[Any]:
        if self._iterator is None:
            # What can be iterated again goes on where the last epoch has ended, where that is known.
            again = self.count is not None and not self._ends_once
            self._iterator = _endless(self._x) if again else iter(self._x)
        return self._iterator

    def _loaded(self, number: int, batch: Any) -> Piece:
        piece = self._load(batch, f"x of batch {number}")
        if not len(piece):
            raise ValueError(f"batch {number} is empty; expected at least one sample")
        piece.samples.convert()
        spoilt = piece.samples.not_finite()
        if piece.targets is not None:
            spoilt = spoilt or not_finite(piece.targets, f"y of batch {number}")
        if spoilt:
            raise ValueError(spoilt)
        return _own(piece)


def _own(piece: Piece) -> Piece:
    """The piece in memory of its own: what gives batches may use the same memory for the next one."""
    samples, targets = piece
    if samples.is_sparse:
        samples.array = samples.array.copy()
    elif samples.on_gpu:
        samples.array = samples.backend.copy(samples.array)
    elif samples.array.base is not None:  # else it was converted
        samples.array = samples.array.copy()
    return Piece(samples, None if targets is None else targets.copy())


def _itself(batch: Any) -> Any:
    return batch


def _endless(x: Iterable[Any]) -> Iterator[Any]:
    while True:
        batch = None
        for batch in x:
            yield batch
        if batch is None:
            return


def _joined(pieces: Sequence[Piece]) -> Block:
    """Batches as one block; all but the last have as many rows as the first."""
    samples, targets = pieces[0]
    if len(pieces) > 1:
        joined = copy.copy(samples)
        joined.array = np.concatenate([piece.samples.array for piece in pieces])
        joined.held = held(joined.array)
        samples = joined
        if targets is not None:
            targets = np.concatenate([piece.targets for piece in pieces])
    return Block(samples, targets, len(pieces), len(pieces[0]))


def _fits(pieces: Sequence[Piece], other: Piece) -> bool:
    """Whether a batch may join others: only the last mini-batch of a block has fewer rows."""
    first, size = pieces[0], len(pieces[0])
    a, b = first.samples, other.samples
    return (
        len(pieces[-1]) == size >= len(other)
        and not (a.is_sparse or b.is_sparse or a.on_gpu or b.on_gpu)
        and (a.array.dtype, a.array.shape[1:]) == (b.array.dtype, b.array.shape[1:])
        and (first.targets is None or first.targets.shape[1:] == other.targets.shape[1:])
    )


def blocks(pieces: Iterator[Piece], size: int | None) -> Iterator[Block]:
    """The batches of an epoch in blocks: one each, divided into mini-batches of `size`; or several that are these.

    What `pieces` raises comes after the blocks before it.
    """
    failed: Exception | None = None

    def following() -> Piece | None:
        nonlocal failed
        try:
            return next(pieces, None)
        except Exception as error:
            failed = error
            return None

    piece = following()
    while piece is not None:
        if size is not None:
            yield Block(*piece, 1, size)
            piece = following()
            continue
        some, end = [piece], time.perf_counter() + _BLOCK_SECONDS
        most = _BLOCK_BYTES // max(1, piece.samples.features * piece.samples.array.dtype.itemsize * len(piece))
        piece = following()
        while piece is not None and len(some) < most and time.perf_counter() < end and _fits(some, piece):
            some.append(piece)
            piece = following()
        yield _joined(some)
    if failed is not None:
        raise failed


class BatchTraining(Training):
    """The loop of a `fit` whose samples come in batches.

    Parameters
    ----------
    source : Source
    gather_of : callable
        ``gather_of(samples, targets)`` returns the first phase of the step on a block; the others are the plan's.
    size : int or None
        Rows of a mini-batch; with None batches are mini-batches.
    *arguments, **settings
        As `Training` has them, with the samples of the first batch.

    Raises
    ------
    ValueError
        A schedule needs to know how many batches there are.
    """

    def __init__(
        self,
        source: Source,
        gather_of: Callable[[Samples, Any], Gather],
        size: int | None,
        *arguments: Any,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self._source, self._gather_of, self._divided = source, gather_of, size
        schedule = self._settings.lr_schedule
        if schedule is not None and not isinstance(schedule, ReduceOnPlateau) and source.count is None:
            raise ValueError("lr_schedule needs steps_per_epoch: how many batches an epoch has")
        # How many mini-batches an epoch has, 0 until that is known; and batches of the source before the block.
        self._batches = (source.count or 0) if size is None else 0
        self._before, self._block = 0, Block(self._samples, None, 1, self._size)

    def _order(self) -> Any:
        return self._orders.take(self._source.count).tolist() if self._source.is_indexed else None  # type: ignore[arg-type]

    def _epoch(self, order: Any) -> None:
        self._n, self._before = sys.maxsize, 0
        some = blocks(self._source.epoch(order), self._divided)
        block = next(some, None)
        if block is None:
            raise StopTraining  # the iterator has ended
        while block is not None:
            self._begin(block)
            rows, end = self._rows(block), self.at.seen + len(block.samples)
            while self.at.seen < end:
                self._call(rows)
                if self.at.seen < end:
                    self._report(done=False)
            self._first_batch += math.ceil(len(rows) / self._size)
            self._skipped, self._before = end, self._before + block.batches
            try:
                block = next(some, None)
            except Exception:
                with contextlib.suppress(StopTraining):  # it ends with the error anyway
                    self._report(done=False)
                raise
            if block is None:
                self._n, self._batches = end, self._first_batch
            self._report(done=block is None)

    def _begin(self, block: Block) -> None:
        """Make the block the dataset of a plan of its own; the rest is as it was when `fit` began."""
        self._backend.write_back(self._plan)
        self._samples, self._block, self._size = block.samples, block, block.size
        self._backend = block.samples.backend
        self._plan = self._backend.stage(self._plan_on(block))
        self._one_by_one = self._every_batch or not self._backend.supports_fused(self._plan)

    def _plan_on(self, block: Block) -> TrainingPlan:
        phases = [self._gather_of(block.samples, block.targets), *self._plan.phases[1:]]
        for i, phase in enumerate(phases):
            if isinstance(phase, Loss) and not isinstance(phase.targets, tuple):
                phases[i] = phase._replace(targets=np.ascontiguousarray(block.targets))
        return TrainingPlan(self._plan.networks, tuple(phases))

    def _rows(self, block: Block) -> NDArray[np.int64]:
        shuffles = self._settings.shuffle and self._divided is not None
        return sample_order(self.model._shuffle if shuffles else None, len(block.samples))

    def _factors(self, first: int, steps: int) -> Array:
        schedule, count = self._settings.lr_schedule, self._source.count
        if schedule is None or isinstance(schedule, ReduceOnPlateau):
            return super()._factors(first, steps)
        assert count is not None
        # Batches count alike: of one that is divided each mini-batch is a part.
        parts = 1 if self._divided is None else math.ceil(len(self._block.samples) / self._size)
        done = ((self.at.epoch - 1) * count + self._before) * parts + first - self._first_batch
        return lr_factors(schedule, done, steps, self._settings.epochs * count * parts)

    def _prepare(self, rest: int) -> None:
        """Nothing: how many samples the next call takes is not known."""


def refuse(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if something was given that needs all samples at once."""
    for name, value in settings.items():
        if value:
            raise ValueError(f"{name} needs all samples at once; it cannot be with batches")
