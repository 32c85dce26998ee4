"""Augmentation of images, as a function of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .. import _arrays as arrays
from ..backends import select
from ..formulas import random
from ..formulas.augmentation import Draw
from ..nn import _checks as checks
from ..nn.augment import Augment, check_images


def augment(
    images: Any,
    *,
    rotate: float = 0,
    scale: float = 0,
    shear: float = 0,
    shift: float = 0,
    elastic: float = 0,
    noise: float = 0,
    erase: float = 0,
    seed: int = 0,
    epoch: int = 0,
    indices: Any = None,
    out: Any = None,
) -> NDArray[np.uint8]:
    """Transform images, each by numbers of its own: warped, with noise, with a rectangle erased, in this order.

    The numbers follow from `seed`, `epoch` and the image's index alone (Philox 4x32-10, a counter-based generator), and
    all that follows from them is in integers: the same bytes on every backend and instruction set, for any number of
    threads, whichever images a call has. With all settings 0 the images stay as they are.

    Pixels are interpolated bilinearly; what comes from beyond an image is 0. To train on other images in each epoch,
    give an `Augment` to `fit`, which needs no copy of all of them.

    Parameters
    ----------
    images : array_like of uint8, shape (n, h, w)
        Each side from 1 to 1024. Rows of pixels are images by ``rows.reshape(-1, 28, 28)``, which is a view. The result
        is where they are, on the CPU or on a GPU.
    rotate, scale, shear, shift, elastic, noise, erase : float
        See `gemmlet.nn.Augment`, which has the ranges, the units and the sources; ``augment(images, **vars(settings))``
        takes one.
    seed : int, 0 to 2**64 - 1
        Other seeds, other transforms.
    epoch : int, 0 to 2**40 - 1
        In each epoch an image has another transform.
    indices : array_like of int, shape (n,), optional
        The number of each image in the data set, 0 to 2**40 - 1; by default from 0 on. So
        ``augment(images[i], indices=i)`` is ``augment(images)[i]`` for an array of integers. Images with the same
        number have the same transform, as the channels of one picture should.
    out : array_like of uint8, shape (n, h, w), optional
        Takes the result; it may be `images`.

    Returns
    -------
    ndarray of uint8, shape (n, h, w)

    Raises
    ------
    TypeError
        `images` or `out` are not bytes; `indices` alone are on a GPU; a setting is no number.
    ValueError
        A shape does not fit, or a number is out of its range. Each error names the argument.

    Examples
    --------
    >>> import numpy as np
    >>> digits = np.zeros((2, 28, 28), np.uint8)
    >>> augment(digits, rotate=12, elastic=1.2, seed=1).shape
    (2, 28, 28)
    """
    settings = Augment(rotate, scale, shear, shift, elastic, noise, erase).settings
    array = arguments.as_array(images, "images")
    check_images(array, "images")
    draw = Draw(_below(seed, "seed", 64), _below(epoch, "epoch", random.STEP_BITS), _sample_numbers(indices, array))
    backend = select.of(array)
    result = arguments.output(backend, out, "out", array.shape, array)
    source = backend.contiguous(array)
    target = result if result.flags.c_contiguous else backend.empty_like(source)
    if arguments.overlaps(source, target) and not arguments.same_view(source, target):
        source = backend.copy(source)
    backend.augment(source, settings, draw, target)
    if target is not result:
        backend.assign(result, target)
    return result if out is None else out


def _below(value: Any, name: str, bits: int) -> int:
    """Return an integer from 0 to ``2**bits - 1``."""
    number = checks.whole_number(value, name, 0, is_count=False)
    if number >> bits:
        raise ValueError(f"{name} must be below 2**{bits}, got {arguments.shown(number)}")
    return number


def _sample_numbers(indices: Any, images: Any) -> NDArray[np.int64]:
    count = len(images)
    if indices is None:
        return np.arange(count)
    array = arguments.as_array(indices, "indices")
    if arrays.is_on_gpu(array) and not arrays.is_on_gpu(images):
        raise TypeError(f"indices are on {arrays.place(array)}, images on the CPU")
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"indices has dtype {array.dtype}, expected integers")
    arguments.check_shape(array, "indices", (count,), "one for each image")
    array = arguments.on_cpu(array)
    array = array.copy()  # which nobody can change after the check
    if count and not (array.min() >= 0 and int(array.max()) >> random.ROW_BITS == 0):
        raise ValueError(f"indices must be from 0 to 2**{random.ROW_BITS} - 1, got {array.min()} to {array.max()}")
    return array.astype(np.int64)
