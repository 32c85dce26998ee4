"""Augmentation of images: what becomes of an image, from random words; ``csrc/formulas/augmentation.h`` once more.

The parameters of a transform are computed in float64, by sums, products, quotients and a square root in a fixed order,
and rounded to integers; all that follows is in integers. So every backend gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .random import STREAMS, random_words

Array = NDArray[Any]

# The longest side of an image.
MAX_SIDE = 1024

# Control points of the elastic grid along an axis, and the bits of their weights' fraction.
CONTROL_POINTS, WEIGHT_BITS = 7, 10


class Settings(NamedTuple):
    """The numbers of `gemmlet.nn.Augment`, within its ranges; the compiled kernels get them in this order."""

    rotate: float
    scale: float
    shear: float
    shift: float
    elastic: float
    noise: float
    erase: float

    def warps(self) -> bool:
        """Whether pixels are moved."""
        return any((self.rotate, self.scale, self.shear, self.shift, self.elastic))


class Draw(NamedTuple):
    """What makes transforms different: those of `samples`, an array of indices, in an epoch."""

    seed: int
    epoch: int
    samples: Array

    def of(self, part: slice) -> Draw:
        """Those of some of the samples."""
        return self._replace(samples=self.samples[part])

    def words(self, stream: str, blocks: int) -> Array:
        """Random words (samples, blocks, 4)."""
        return random_words(self.seed, STREAMS[stream], self.epoch, self.samples[:, None], np.arange(blocks))


def blocks(count: int, pixels: int) -> Iterator[slice]:
    """Images that are computed at a time: what is computed on the way takes much more memory than they."""
    step = max(1, (1 << 17) // pixels)
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


class Numbers(NamedTuple):
    """What images are transformed by, in integers; of what is left out, an empty array."""

    maps: Array  # as `affine_maps` has them,
    points: Array  # `control_points`,
    noise: Array  # `noise`,
    corners: Array  # and `corners`


def numbers(settings: Settings, height: int, width: int, draw: Draw) -> Numbers:
    """The numbers that these samples are transformed by."""
    maps, points = np.empty((0, 2, 3), np.int64), np.empty((0, 2, CONTROL_POINTS, CONTROL_POINTS), np.int64)
    added, removed = np.empty((0, height, width), np.int64), np.empty((0, 4), np.int64)
    if settings.warps():
        maps, points = affine_maps(settings, height, width, draw), control_points(settings, draw)
    if settings.noise:
        added = noise(settings, height, width, draw)
    if settings.erase:
        removed = corners(settings, height, width, draw)
    return Numbers(maps, points, added, removed)


def augmented(images: Array, settings: Settings, draw: Draw) -> Array:
    """The images (n, h, w) transformed: the reference."""
    _, height, width = images.shape
    by = numbers(settings, height, width, draw)
    result = images.astype(np.int64)
    if by.maps.size:
        result = warped(result, by.maps, displacements(by.points, height, width))
    if by.noise.size:
        result = np.clip(result + by.noise, 0, 255)
    if by.corners.size:
        result[inside(by.corners, height, width)] = 0
    return result.astype(np.uint8)


# Random words as numbers.


def _signed_unit(words: Array) -> Array:
    """Random words as numbers within [-1, 1)."""
    return words.astype(np.uint32).view(np.int32) * 2.0**-31


def _unit(words: Array) -> Array:
    """Random words as numbers within [0, 1)."""
    return words * 2.0**-32


def _signed_halves(words: Array) -> Array:
    """Each word as two integers of 16 bits, along the last axis."""
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(*words.shape[:-1], 2 * words.shape[-1]).astype(np.uint16).view(np.int16).astype(np.int64)


def _nearest(numbers: Any) -> NDArray[np.int64]:
    return np.asarray(np.rint(numbers), np.int64)


def _series(x: Array, *coefficients: float) -> Array:
    """A power series by Horner's rule, the coefficients from the lowest power up."""
    value: Any = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = coefficient + x * value
    return np.asarray(value)


def _sine(x: Array) -> Array:
    """Taylor's, within 3e-8 for angles up to pi."""
    odd = (1.0 if n % 4 == 1 else -1.0 for n in range(1, 19, 2))
    return x * _series(x * x, *(sign / math.factorial(n) for sign, n in zip(odd, range(1, 19, 2), strict=True)))


def _cosine(x: Array) -> Array:
    even = (1.0 if n % 4 == 0 else -1.0 for n in range(0, 19, 2))
    return _series(x * x, *(sign / math.factorial(n) for sign, n in zip(even, range(0, 19, 2), strict=True)))


# Where pixels come from.


def affine_maps(settings: Settings, height: int, width: int, draw: Draw) -> Array:
    """For each image a matrix (2, 3), from (x, y, 1) to the place (x, y) that the pixel comes from, in 2**-16 of one.

    Around the middle of the image: rotated, sheared along x, scaled along each axis, shifted.
    """
    count = len(draw.samples)
    unit = _signed_unit(draw.words("warp", 2).reshape(count, 8)).T
    angle = unit[0] * (settings.rotate * (3.141592653589793 / 180))
    scale_x, scale_y = 1 / (1 + unit[1] * settings.scale), 1 / (1 + unit[2] * settings.scale)
    shear, shift_x, shift_y = unit[3] * settings.shear, unit[4] * settings.shift, unit[5] * settings.shift
    s, c, middle_x, middle_y = _sine(angle), _cosine(angle), (width - 1) * 0.5, (height - 1) * 0.5
    x_x, x_y, y_x, y_y = (c + shear * s) * scale_x, (shear * c - s) * scale_x, s * scale_y, c * scale_y
    x_0 = middle_x + shift_x - x_x * middle_x - x_y * middle_y
    y_0 = middle_y + shift_y - y_x * middle_x - y_y * middle_y
    return _nearest(np.stack([x_x, x_y, x_0, y_x, y_y, y_0], axis=-1) * 65536).reshape(count, 2, 3)


def spline_weights(length: int, spacing: int) -> Array:
    """(length, control points): what each weighs at each pixel, by cubic B-splines, in 2**-10."""
    place = np.arange(length)
    r, s = place % spacing, spacing
    t = s - r
    of_sixth = t**3, 3 * r**3 - 6 * r * r * s + 4 * s**3, 3 * t**3 - 6 * t * t * s + 4 * s**3, r**3
    weights = np.zeros((length, CONTROL_POINTS), np.int64)
    for i, numerator in enumerate(of_sixth):
        weights[place, place // spacing + i] = ((numerator << (WEIGHT_BITS + 1)) + 6 * s**3) // (12 * s**3)
    return weights


def control_points(settings: Settings, draw: Draw) -> Array:
    """(images, axis, row, column): how far the points of the elastic grid are displaced, in 2**-8 of a pixel.

    The mean of a spline's squared weights is 151/315 along each axis, that of squared numbers within [-1, 1] is 1/3.
    """
    scale = int(_nearest(settings.elastic * (256 * 1.7320508075688772 * (315.0 / 151.0))))
    points = _signed_halves(draw.words("warp", 2 + 2 * CONTROL_POINTS)[:, 2:])
    return (points[..., :CONTROL_POINTS] * scale >> 15).reshape(len(points), 2, CONTROL_POINTS, CONTROL_POINTS)


def grid_spacing(height: int, width: int) -> int:
    """Pixels between control points of the elastic grid, along both axes."""
    return (max(height, width) + 3) // 4


def grid_weights(height: int, width: int) -> tuple[Array, Array]:
    """The weights of the elastic grid's control points for each row, and for each column, of pixels."""
    spacing = grid_spacing(height, width)
    return spline_weights(height, spacing), spline_weights(width, spacing)


def displacements(points: Array, height: int, width: int) -> Array:
    """(images, axis, h, w): the elastic displacement of each pixel in 2**-16 of one, rounded on the way."""
    of_row, of_column = grid_weights(height, width)
    by_column = (points @ of_column.T + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS
    return np.asarray((of_row @ by_column + 2) >> 2)


def warped(images: Array, maps: Array, displaced: Array) -> Array:
    """Bilinear interpolation by weights of 6 bits; beyond the images is 0."""
    count, height, width = images.shape
    x, y = np.arange(width), np.arange(height)[:, None]
    places: Any = maps[..., 0, None, None] * x + maps[..., 1, None, None] * y + maps[..., 2, None, None] + displaced
    # Two pixels of nothing around the images.
    column, row = np.clip(places[:, 0] >> 16, -2, width) + 2, np.clip(places[:, 1] >> 16, -2, height) + 2
    right, down = places[:, 0] >> 10 & 63, places[:, 1] >> 10 & 63
    around = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    image = np.arange(count)[:, None, None]

    def side(column: Any) -> Any:
        return around[image, row, column] * (64 - down) + around[image, row + 1, column] * down

    return np.asarray((side(column) * (64 - right) + side(column + 1) * right + 2048) >> 12)


# What is added and taken away.


def noise(settings: Settings, height: int, width: int, draw: Draw) -> Array:
    """(images, h, w): sums of four random bytes, less their mean, scaled.

    The words 0 and 1 of all blocks, whose number is a multiple of 8, are for the first half of the pixels, those 2 and
    3 for the second.
    """
    scale = int(_nearest(settings.noise * (8192 / 147.80054127099805)))
    blocks = (height * width + 31) // 32 * 8
    words = draw.words("noise", blocks)
    words = np.concatenate([words[..., :2], words[..., 2:]], axis=1).reshape(len(words), 4 * blocks)[
        :, : height * width
    ]
    sums = words.astype(np.uint32)[..., None].view(np.uint8).sum(axis=-1, dtype=np.int64)
    return np.asarray((sums - 510) * scale + 4096 >> 13).reshape(len(words), height, width)


def corners(settings: Settings, height: int, width: int, draw: Draw) -> Array:
    """(images, 4): the rectangle that is erased, its first row, the row after it, and so for columns; maybe empty.

    Zhong et al., 2017: 2 to 40 % of the image, the ratio of height to width from 0.3 to 1 / 0.3; what exceeds the image
    is cut off.
    """
    words = draw.words("erase", 2).reshape(len(draw.samples), 8).T
    area = (0.02 + _unit(words[1]) * 0.38) * (height * width)
    ratio = 0.3 + _unit(words[2]) * (1 / 0.3 - 0.3)
    h, w = (np.clip(_nearest(np.sqrt(a)), 1, most) for a, most in ((area * ratio, height), (area / ratio, width)))
    top, left = (
        (word * (most - size + 1).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
        for word, most, size in ((words[3], height, h), (words[4], width, w))
    )
    return np.stack([top, top + h, left, left + w], axis=1) * (_unit(words[0]) < settings.erase)[:, None]


def inside(rectangles: Array, height: int, width: int) -> Array:
    """(images, h, w): whether a pixel is within the rectangle of its image."""
    top, bottom, left, right = (each[:, None, None] for each in rectangles.T)
    x, y = np.arange(width), np.arange(height)[:, None]
    return np.asarray((y >= top) & (y < bottom) & (x >= left) & (x < right))
