"""Draw the sample of MNIST that is embedded in the package.

    python tools/draw_mnist_sample.py FOLDER

FOLDER holds the four genuine files, raw or gzipped. 5,000 training and 1,000 test digits are drawn at random with a
fixed seed, each class with the share that it has in the whole (largest remainders), in the order of the original, and
written as gzipped IDX files to python/gemmlet/data/sample. The same input gives the same bytes, as long as zlib is the
same.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemmlet._files import replacing
from gemmlet.data import load_mnist

SEED = 0
TRAIN, TEST = 5_000, 1_000
TARGET = Path(__file__).resolve().parent.parent / "python" / "gemmlet" / "data" / "sample"


def allot(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many of `count` digits each of the ten classes gets: its share of `labels`, rounded by largest remainders."""
    exact = np.bincount(labels, minlength=10) * count / len(labels)
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: count - counts.sum()]] += 1
    return counts


def draw(labels: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of `count` digits, stratified by class, without repetition, ascending."""
    if count > len(labels):
        raise ValueError(f"count is {count}, but there are only {len(labels)} labels")
    chosen = [
        rng.choice(np.flatnonzero(labels == digit), size, replace=False)
        for digit, size in enumerate(allot(labels, count))
    ]
    return np.sort(np.concatenate(chosen))


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    """`values` as a gzipped IDX file, without a time stamp or a name."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes(), 9, mtime=0)


def write_sample(source: Path, target: Path, train: int = TRAIN, test: int = TEST, seed: int = SEED) -> None:
    """Draw from the files in the folder `source` and write the four files to the folder `target`."""
    data = load_mnist(source)
    rng = np.random.default_rng(seed)
    target.mkdir(parents=True, exist_ok=True)
    for prefix, x, y, count in (("train", data.x_train, data.y_train, train), ("t10k", data.x_test, data.y_test, test)):
        chosen = draw(y, count, rng)
        for name, values in (
            (f"{prefix}-images-idx3-ubyte.gz", x[chosen].reshape(-1, 28, 28)),
            (f"{prefix}-labels-idx1-ubyte.gz", y[chosen].astype(np.uint8)),
        ):
            with replacing(target / name) as temporary:
                temporary.write_bytes(idx_bytes(values))


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw the sample of MNIST that is embedded in the package.")
    parser.add_argument("folder", type=Path, help="the four genuine files, raw or gzipped")
    parser.add_argument("--out", type=Path, default=TARGET, help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    write_sample(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
