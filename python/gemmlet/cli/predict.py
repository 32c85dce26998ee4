"""What ``gemmlet predict`` does: say which digits images show, and how sure a network is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data import mnist
from . import common
from .errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Bytes = NDArray[np.uint8]

SIDE = 28
# Of MNIST: digits fit into a box of this size, and their centre of mass is that of the image.
BOX = 20
# Larger pictures are averaged down to this side first, so that a speck is no part of the digit, and no more pixels than
# these are read.
LARGEST_SIDE, MOST_PIXELS = 256, 50_000_000
# No others: some formats start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


@dataclass(frozen=True)
class Options:
    """The command line, unchecked."""

    model: Path
    images: list[Path]
    as_json: bool
    backend: str | None
    threads: int | None


def run(options: Options) -> int:
    """Print a line for each image, and return the exit status; `UserError` at the end if a file cannot be read."""
    common.use(options.backend, options.threads)
    model = common.load_digits_classifier(options.model)
    found: list[dict[str, Any]] = []
    problems = []
    for path in options.images:
        try:
            for name, image in _read(path):
                found.append(_said(model, name, image))
                if not options.as_json:
                    (label, sure), (second, less), *_ = found[-1]["probabilities"].items()
                    print(f"{name}: {label} ({sure:.1%} sure; then {second}, {less:.1%})")
        except (OSError, ValueError) as error:
            problems.append(_problem(path, error))
    if options.as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(problems[0] + others, 1 if found else 2)
    return 0


def _said(model: Any, name: str, image: Bytes) -> dict[str, Any]:
    """What a network says of an image: its label, and the probabilities, that of the label first."""
    classes = list(range(10)) if model.classes is None else model.classes
    row = model.predict_proba(image[np.newaxis])[0]
    label = model.predict(image[np.newaxis]).tolist()[0]
    # Not by the largest probability alone: several sigmoids may be rounded to 1.
    first = classes.index(label)
    order = [first, *(i for i in np.argsort(-row, kind="stable").tolist() if i != first)]
    return {"image": name, "label": label, "probabilities": {str(classes[i]): float(row[i]) for i in order}}


def _problem(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, expected an image"
    text = str(error)
    return text if str(path) in text else f"{path}: {text}"


def _read(path: Path) -> Iterator[tuple[str, Bytes]]:
    """The images in a file, as MNIST has them, each with its name."""
    with open(path, "rb") as opened:
        head = opened.read(3)
    if head == b"\0\0\x08" or head[:2] == b"\x1f\x8b":
        for i, image in enumerate(mnist.read_images(path)):
            yield f"{path}[{i}]", image
    else:
        yield str(path), digit_of(path).reshape(-1)


def digit_of(path: Path) -> Bytes:
    """The image of a digit as MNIST would have it, light on dark.

    One of 28 × 28 pixels that is light on black stays as it is, and dark on white is inverted. Others are freed from an
    even or evenly rising ground, cut to the digit, scaled into 20 × 20 pixels and put on the centre of mass (LeCun et
    al., 1998).
    """
    pixels = _grey(path)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if pixels.shape == (SIDE, SIDE) and not 32 <= np.median(border) <= 223:
        return 255 - pixels if np.median(border) > 127 else pixels
    ink = _ink(pixels)
    if pixels.shape == (SIDE, SIDE):
        return ink
    rows, columns = (np.flatnonzero((ink > 64).any(axis=axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _centred(_fitting(cut))


def _grey(path: Path) -> Bytes:
    """The picture in a file as grey values, upright, what is transparent as paper."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large ones, which are refused here
        try:
            opened = Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
    with opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise ValueError(f"{opened.width} × {opened.height} pixels are too many; expected {MOST_PIXELS:,} at most")
        upright: Image.Image = ImageOps.exif_transpose(opened)
        if upright.mode in ("F", "I") or upright.mode.startswith("I;16"):
            values = np.asarray(upright, np.float64)
            low, high = values.min(), values.max()
            scaled: Bytes = ((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
            return scaled
        image = upright.convert("RGBA")
    # Paper is white, but for ink that is white itself.
    opaque = np.asarray(image, np.float64)
    inks = opaque[..., 3] > 127
    is_white = inks.any() and not inks.all() and opaque[inks][:, :3].mean() > 200
    paper = Image.new("RGBA", image.size, "black" if is_white else "white")
    return np.asarray(Image.alpha_composite(paper, image).convert("L"))


def _ink(pixels: Bytes) -> Bytes:
    """How far each pixel stands out from the ground, of which the border is a part, to 255."""
    from PIL import Image

    if (side := max(pixels.shape)) > LARGEST_SIDE:
        size = [max(1, round(length * LARGEST_SIDE / side)) for length in pixels.shape[::-1]]
        pixels = np.asarray(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BOX))
    # The plane through the border: light seldom falls evenly.
    height, width = pixels.shape
    y, x = np.mgrid[:height, :width]
    plane = np.stack([np.ones(pixels.shape), y / height, x / width], axis=2)
    edge = (y % max(height - 1, 1) == 0) | (x % max(width - 1, 1) == 0)
    factors, *_ = np.linalg.lstsq(plane[edge], pixels[edge].astype(np.float64), rcond=None)
    difference = pixels - plane @ factors
    # Ink is what there is less of, and stands out more.
    above, below = (np.square(np.clip(part, 0, None)).sum() for part in (difference, -difference))
    ink = np.clip(difference if above > below else -difference, 0, None)
    if (peak := ink.max()) < 24:
        raise ValueError("no digit stands out from its ground")
    stretched: Bytes = (ink * (255 / peak)).astype(np.uint8)
    return stretched


def _fitting(cut: Bytes) -> Bytes:
    """A digit scaled into the box of MNIST, its ink as dark as there."""
    from PIL import Image

    scale = BOX / max(cut.shape)
    size = max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale))
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    small = np.asarray(Image.fromarray(cut).resize(size, way), np.float64)
    stretched: Bytes = (small * (255 / small.max())).astype(np.uint8)
    return stretched


def _centred(digit: Bytes) -> Bytes:
    """An image of 28 × 28 pixels with the digit's centre of mass in the middle, as far as it has room."""
    mass = digit.sum(dtype=np.float64)
    center = [float((digit.sum(axis=1 - axis) @ np.arange(digit.shape[axis])) / mass) for axis in (0, 1)]
    top, left = (int(np.clip(round((SIDE - 1) / 2 - c), 0, SIDE - n)) for c, n in zip(center, digit.shape, strict=True))
    result = np.zeros((SIDE, SIDE), np.uint8)
    result[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return result
