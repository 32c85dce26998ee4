"""Settings of augmentation, and training samples that are augmented."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .. import _arrays as arrays
from .._memory import held
from ..formulas.augmentation import MAX_SIDE, Draw, Settings
from ..formulas.random import STEP_BITS
from .dataset import Samples

Array = NDArray[Any]

# Images that are augmented at a time: MNIST's are 3 MB, which stay in the cache until they are trained on.
_BLOCK = 4096

# Images that tell the density of all.
_SOME = 256

# The largest value of each: within these no number of the compiled kernels overflows.
_LARGEST = {"rotate": 180.0, "scale": 0.5, "shear": 1.0, "shift": 1024.0, "elastic": 32.0, "noise": 255.0, "erase": 1.0}


@dataclass(frozen=True)
class Augment:
    """How `fit` changes images for training: each by numbers of its own, drawn anew in each epoch.

    An image is shifted, scaled, sheared and rotated, in this order; each pixel of the result is displaced; noise comes
    last but for the rectangle. 0 leaves something out. The defaults are for light digits on black, which must stay
    what they are: what comes from beyond the image is 0, so invert dark ink on white first. `gemmlet.data.augment`
    has other defaults, 0 for each.

    Parameters
    ----------
    rotate : float, 0 to 180
        Rotation around the middle of the image, in degrees: uniform within [-rotate, rotate].
    scale : float, 0 to 0.5
        Height and width are multiplied each by a number of its own, uniform within [1 - scale, 1 + scale].
    shear : float, 0 to 1
        Rows are shifted by this many pixels for each pixel of their distance from the middle: uniform within
        [-shear, shear].
    shift : float, 0 to 1024
        Shift along each axis of the image as it was, in its pixels, which scaling then changes: uniform within
        [-shift, shift].
    elastic : float, 0 to 32
        Standard deviation of a smooth displacement of each pixel along each axis, in pixels: a cubic B-spline over a
        grid of random displacements, of which the longer side has four intervals. At 28 pixels these are 7 pixels wide,
        and the field is as smooth as Simard's with a deviation of 4 pixels [1]_.
    noise : float, 0 to 255
        Standard deviation of what is added to each pixel, in grey levels of 256: nearly normal, the sum of four uniform
        numbers, at most 3.45 deviations, rounded to whole grey levels. Results are clipped to 0 to 255, so that on
        black half of it is seen.
    erase : float, 0 to 1
        Probability with which a rectangle of an image is set to 0, the ground of digits [2]_. Its area is uniform
        within 2 to 40 % of the image, its height within 0.3 to 3.3 times its width, its place within the image; a side
        has one pixel at least, and is cut to the image's.

    Raises
    ------
    TypeError, ValueError
        A setting is not a real number, or not within its range.

    References
    ----------
    .. [1] Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual document
       analysis", 2003.
    .. [2] Zhong, Zheng, Kang, Li and Yang, "Random erasing data augmentation", 2017.

    Examples
    --------
    >>> Augment(rotate=15, noise=8)
    Augment(rotate=15.0, scale=0.12, shear=0.12, shift=1.0, elastic=1.2, noise=8.0, erase=0.0)
    """

    rotate: float = 12.0
    scale: float = 0.12
    shear: float = 0.12
    shift: float = 1.0
    elastic: float = 1.2
    noise: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = arguments.number(getattr(self, field.name), field.name, low=0.0, high=_LARGEST[field.name])
            object.__setattr__(self, field.name, value)

    @property
    def settings(self) -> Settings:
        """The numbers, as backends take them."""
        return Settings(*(getattr(self, name) for name in Settings._fields))


def check_images(array: Any, name: str, purpose: str = "") -> None:
    """Raise TypeError or ValueError unless an array has images (n, h, w) of bytes."""
    if hasattr(array, "tocsr"):
        raise TypeError(f"{name}{purpose} is a sparse matrix; expected images (n, h, w)")
    if array.dtype != np.uint8:
        raise TypeError(f"{name}{purpose} has dtype {array.dtype}, expected uint8: grey levels from 0 to 255")
    if array.ndim != 3:
        hint = f": reshape rows of pixels, as {name}.reshape(-1, 28, 28), one image as {name}[None]"
        hint = hint if array.ndim == 2 else ""
        raise ValueError(f"{name}{purpose} has shape {array.shape}, expected (n, h, w){hint}")
    if not all(1 <= side <= MAX_SIDE for side in array.shape[1:]):
        raise ValueError(f"{name}{purpose} has shape {array.shape}; height and width must be from 1 to {MAX_SIDE}")


def check_augment(augment: Any, x: Any) -> None:
    """Raise TypeError or ValueError unless `augment` has settings, and `x`, an argument of `fit`, images for them."""
    if not isinstance(augment, Augment):
        raise TypeError(f"augment must be an Augment, got {type(augment).__name__}")
    array = x if hasattr(x, "tocsr") else arguments.as_array(x, "x")
    check_images(array, "x", ", which is to be augmented,")


class Augmented:
    """Training samples of which each epoch has others: what a plan has as its dataset.

    Where a GPU trains, and its memory suffices, that is all samples, which are there and are transformed there once an
    epoch. Else it is a block of them on the CPU, made anew for each call.

    Parameters
    ----------
    samples : Samples
        Images (n, h, w) of bytes.
    settings : Augment
    seed : int, below 2**64
    batch_size : int
        A block is of whole mini-batches.
    targets, weights : ndarray, optional
        Of all samples.
    is_fused : callable
        Says whether the backend trains by an executor of its own, not by the reference, which is on the CPU.

    Attributes
    ----------
    samples : Samples
        Those of the dataset.
    targets, weights : ndarray or None
        Likewise.
    all_targets : ndarray or None
        As given.
    steps : int
        How many a call may take.
    on_gpu : bool
        Whether the dataset is; else the backend has to be told when it has changed (`Backend.restage`).
    """

    def __init__(
        self,
        samples: Samples,
        settings: Augment,
        seed: int,
        batch_size: int,
        targets: Any = None,
        weights: Array | None = None,
        is_fused: Callable[[], bool] = lambda: True,
    ) -> None:
        self.settings, self._seed, self._backend = settings, seed, samples.backend
        self.samples, self.all_targets, self._all_weights = copy.copy(samples), targets, weights
        self.targets: Any = targets
        self.weights: Any = weights
        self._epoch: int | None = None  # of the images of the dataset
        self._order = np.arange(len(samples))
        self.on_gpu = self._moves_to_gpu(is_fused)
        if self.on_gpu:
            self.steps = sys.maxsize
        else:
            self._make_block(batch_size)

    def _moves_to_gpu(self, is_fused: Callable[[], bool]) -> bool:
        """Put images and dataset where the backend trains, if that is a GPU with room for both."""
        backend = self._backend
        try:
            self._numbers = backend.to_device(self._order, self.samples.array)
            if not arrays.is_on_gpu(self._numbers) or not is_fused():
                return False
            self._images = backend.to_device(backend.contiguous(self.samples.array))
            self._pixels = backend.empty(self._images.shape, self._images.dtype, self._images)
        except MemoryError:
            return False
        self.samples.array, self.samples.on_gpu = self._pixels, True
        return True

    def _make_block(self, batch_size: int) -> None:
        self._images = np.ascontiguousarray(self._backend.to_cpu(self.samples.array))
        self.steps = max(1, _BLOCK // batch_size)
        count = len(self._images)
        rows = min(self.steps * batch_size, count)
        self._order = self._order[:rows]
        self._pixels = np.empty((rows, *self._images.shape[1:]), np.uint8)
        self.samples.array, self.samples.on_gpu, self.samples.held = self._pixels, False, held(self._pixels)
        if self.targets is not None:
            self.targets = np.empty((rows, *self.targets.shape[1:]), self.targets.dtype)
        if self.weights is not None:
            self.weights = np.empty(rows)
        # Some samples from everywhere, again and again, tell the density of the dataset.
        some = min(rows, _SOME)
        self.take(self._order[:some] * (count // some), 0)
        for array in (self._pixels, self.targets, self.weights):
            if array is not None:
                array[some:] = array[self._order[: rows - some] % some]

    def take(self, chosen: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Have these samples in the dataset, as they are in an epoch, and return where they are in it."""
        settings, draw = self.settings.settings, Draw(self._seed, epoch % 2**STEP_BITS, chosen)
        if self.on_gpu:
            if epoch != self._epoch:
                self._backend.augment(self._images, settings, draw._replace(samples=self._numbers), self._pixels)
                self._epoch = epoch
            return chosen
        count = len(chosen)
        self._backend.augment(self._images, settings, draw, self._pixels[:count], chosen)
        for block, given in ((self.targets, self.all_targets), (self.weights, self._all_weights)):
            if given is not None:
                block[:count] = given[chosen]
        return self._order[:count]
