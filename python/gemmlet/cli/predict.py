"""What ``gemmlet predict`` does: say which digits images show, and how sure a network is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data import mnist
from . import common
from .errors import UserError

Bytes = NDArray[np.uint8]

SIDE = 28
# Of MNIST: digits fit into a box of this size, and their centre of mass is that of the image.
BOX = 20


@dataclass(frozen=True)
class Options:
    """The command line, unchecked."""

    model: Path
    images: list[Path]
    as_json: bool
    backend: str | None
    threads: int | None


def run(options: Options) -> int:
    """Print a line for each image, and return the exit status."""
    common.use(options.backend, options.threads)
    model = common.load_digits_classifier(options.model)
    named = [each for path in options.images for each in _read(path)]
    if not named:
        raise UserError("the files hold no image")
    names, images = [name for name, _ in named], np.stack([image for _, image in named])
    probabilities = model.predict_proba(images)
    classes = model.classes or list(range(10))
    # Not by the largest probability alone: several sigmoids may be rounded to 1.
    predicted = model.predict(images).tolist()
    found = []
    for name, label, row in zip(names, predicted, probabilities, strict=True):
        first = classes.index(label)
        others = [i for i in np.argsort(-row, kind="stable").tolist() if i != first]
        order = [first, *others]
        found.append({"image": name, "label": label, "probabilities": {str(classes[i]): float(row[i]) for i in order}})
    if options.as_json:
        print(json.dumps(found, indent=2))
        return 0
    for each in found:
        (label, sure), (second, less), *_ = each["probabilities"].items()
        print(f"{each['image']}: {label} ({sure:.1%} sure; then {second}, {less:.1%})")
    return 0


def _read(path: Path) -> Iterator[tuple[str, Bytes]]:
    """The images in a file, as MNIST has them, each with its name."""
    try:
        with open(path, "rb") as opened:
            head = opened.read(4)
        if head[:2] in (b"\0\0", b"\x1f\x8b"):
            for i, image in enumerate(mnist.read_images(path)):
                yield f"{path}[{i}]", image
        else:
            yield str(path), digit_of(path).reshape(-1)
    except (OSError, ValueError) as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from error


def digit_of(path: Path) -> Bytes:
    """The image of a digit as MNIST would have it, light on dark.

    One of 28 × 28 pixels stays as it is, but for dark ink on a light ground, which is inverted. Others are cut to the
    digit, scaled into 20 × 20 pixels and put on the centre of mass (LeCun et al., 1998).
    """
    from PIL import Image

    with Image.open(path) as opened:
        # What is transparent is paper.
        image = opened.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        pixels = np.asarray(Image.alpha_composite(paper, image).convert("L"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        pixels = 255 - pixels
    if pixels.shape == (SIDE, SIDE):
        return pixels
    ground = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
    ink = np.clip(pixels.astype(np.int64) - ground, 0, None)
    peak = ink.max()
    if peak < 32:
        raise ValueError("no digit stands out from its ground")
    ink = (ink * 255 // peak).astype(np.uint8)
    rows, columns = (np.flatnonzero((ink > 64).any(axis=axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = BOX / max(cut.shape)
    size = max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale))
    small = np.asarray(
        Image.fromarray(cut).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    )
    mass = small.sum(dtype=np.float64)
    center = [float((small.sum(axis=1 - axis) @ np.arange(small.shape[axis])) / mass) for axis in (0, 1)]
    result = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (int(np.clip(round((SIDE - 1) / 2 - c), 0, SIDE - n)) for c, n in zip(center, small.shape, strict=True))
    result[top : top + small.shape[0], left : left + small.shape[1]] = small
    return result
