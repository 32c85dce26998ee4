"""MNIST, the handwritten digits of LeCun, Cortes and Burges (http://yann.lecun.com/exdb/mnist/).

The four files are in the IDX format: two zero bytes, a byte for the type (8: uint8), a byte for the number of
dimensions, each dimension as a big-endian 32-bit integer, then the values in C order. They are read raw or gzipped.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from .. import _environment

_log = logging.getLogger("gemmlet")

# Every file by its name in the original distribution, with the SHA-256 of what it holds uncompressed.
SHA256: dict[str, str] = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS: tuple[str, ...] = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

# Without a network the sample must come within seconds: a mirror that has not answered by then counts as unreachable.
_ANSWER_SECONDS = 4.0
_READ_SECONDS = 10.0

_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_SIDE = 28
_PIECE = 1 << 20  # bytes
_LARGEST = 1 << 26  # bytes, above the 47,040,016 of the training images


@dataclass(frozen=True)
class Mnist:
    """MNIST as arrays.

    Attributes
    ----------
    x_train, x_test : ndarray of uint8, shape (n, 784)
        One image a row, 0 (background) to 255 (ink); ``x.reshape(-1, 28, 28)`` gives pictures. `gemmlet.nn` takes them
        as they are and counts a pixel as value/255.
    y_train, y_test : ndarray of int64, shape (n,)
        The digits, 0 to 9.
    source : str
        Where they come from, in words.
    is_sample : bool
        Whether this is the small sample that comes with the package.
    """

    x_train: NDArray[np.uint8]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    source: str
    is_sample: bool = False


def load_mnist(data_dir: str | os.PathLike[str] | None = None, *, download: bool = True) -> Mnist:
    """Load MNIST: 60,000 training and 10,000 test images, or the embedded sample of 5,000 and 1,000.

    The first of these that applies is used:

    1. The folder `data_dir`, else the one that the environment variable ``GEMMLET_DATA_DIR`` names. It holds the four
       IDX files under their usual names (``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte`` and so on), raw or
       gzipped. It may hold any subset of MNIST, or other 28 × 28 images in ten classes in the same format.
    2. The cache of downloads, else the download, with the package pooch. The SHA-256 of each file is checked; a mirror
       that fails is followed by the next.
    3. The embedded sample: genuine digits with the same share of each class. One line, logged as a warning to the
       logger ``gemmlet``, says so.

    Parameters
    ----------
    data_dir : path, optional
        A folder. With it there is no download and no sample.
    download : bool
        False: neither use the cache nor the network.

    Returns
    -------
    Mnist

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        The folder, or one of the files, is missing.
    ValueError
        A file is truncated, corrupt or no MNIST file; the message names it, what was found and what was expected.
    """
    chosen = data_dir if data_dir is not None else _environment.read("GEMMLET_DATA_DIR") or None
    if chosen is not None:
        origin = "data_dir" if data_dir is not None else "GEMMLET_DATA_DIR"
        try:
            folder = Path(chosen).expanduser()
        except RuntimeError as error:
            raise FileNotFoundError(f"{chosen} ({origin}) names a home folder that is not known: {error}") from None
        if not folder.exists():
            raise FileNotFoundError(f"{folder} ({origin}) does not exist; expected a folder with the MNIST files")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} ({origin}) is not a folder; expected a folder with the MNIST files")
        return _load_folder(folder, str(folder))

    reason = "the download is switched off"
    if download:
        try:
            folder = _download()
        except _NoDownloadError as error:
            reason = str(error)
        else:
            return _load_folder(folder, f"the download in {folder}")
    sample = _load_folder(Path(__file__).parent / "sample", "the sample embedded in gemmlet", is_sample=True)
    _log.warning(
        "gemmlet uses its embedded sample of MNIST, %d training and %d test digits (%s); for the whole set, "
        "name a folder with its four files in --data-dir, data_dir= or GEMMLET_DATA_DIR, or connect to the network",
        len(sample.y_train),
        len(sample.y_test),
        reason,
    )
    return sample


def _load_folder(folder: Path, source: str, *, is_sample: bool = False) -> Mnist:
    arrays: list[NDArray[Any]] = []
    paths = [_find(folder, name) for name in SHA256]
    for images, labels in (paths[:2], paths[2:]):
        x, y = read_images(images), read_labels(labels)
        if len(x) != len(y):
            raise ValueError(f"{labels} holds {len(y)} labels, {images} {len(x)} images; expected one label an image")
        arrays += [x, y]
    x_train, y_train, x_test, y_test = arrays
    return Mnist(x_train, y_train, x_test, y_test, source, is_sample)


def _find(folder: Path, name: str) -> Path:
    for stem in (name, name.replace("-idx", ".idx")):
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder} lacks the file {name} (or {name}.gz)")


def read_images(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of 28 × 28 images, raw or gzipped, as rows of shape (n, 784)."""
    images = _read_idx(path, 3)
    if images.shape[1:] != (_SIDE, _SIDE):
        height, width = images.shape[1:]
        raise ValueError(f"{path} holds images of {height} × {width} pixels; expected {_SIDE} × {_SIDE}")
    # A copy: NumPy asks for large pages, in which samples in random order are found sooner.
    return images.reshape(len(images), _SIDE * _SIDE).copy()


def read_labels(path: Path) -> NDArray[np.int64]:
    """Read an IDX file of labels 0 to 9, raw or gzipped, as shape (n,)."""
    labels = _read_idx(path, 1)
    if labels.max() > 9:
        place = int(np.argmax(labels > 9))
        raise ValueError(f"{path} has the label {labels[place]} at position {place}; expected digits, 0 to 9")
    return labels.astype(np.int64)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read the IDX file at `path`, which must hold uint8 in just `dimensions` dimensions, and not be empty."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
            try:
                # The header first: a large foreign file is refused before it is read.
                header = stream.read(4 + 4 * dimensions)
                shape = _parse_header(header, path, dimensions)
                expected = math.prod(shape)
                values = _read_up_to(stream, expected)
                more = bool(stream.read(1))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is truncated or corrupt: {error}") from error
    announced = f"its header announces {' × '.join(map(str, shape))} values"
    if len(values) < expected:
        raise ValueError(f"{path} is truncated: {announced} = {expected} bytes, but {len(values)} follow")
    if more:
        raise ValueError(f"{path} is corrupt: {announced} = {expected} bytes, but more follow")
    if not expected:
        raise ValueError(f"{path} is empty: {announced}; expected at least one")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_up_to(stream: gzip.GzipFile | io.BufferedReader, size: int) -> bytearray:
    """Read `size` bytes, or fewer where the file ends: in pieces, as it may hold far fewer than it announces."""
    values = bytearray()
    while len(values) < size and (piece := stream.read(min(size - len(values), _PIECE))):
        values += piece
    return values


def _parse_header(header: bytes, path: Path, dimensions: int) -> tuple[int, ...]:
    what = "image" if dimensions == 3 else "label"
    expected = f"an MNIST {what} file, which begins 00 00 08 {dimensions:02x}"
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in _IDX_TYPES:
        begin = header[:4].hex(" ") or "nowhere (0 bytes)"
        raise ValueError(f"{path} is no IDX file: it begins {begin}; expected {expected}")
    if header[2] != 0x08:
        kind = f"{_IDX_TYPES[header[2]]} values (type code {header[2]:#04x})"
        raise ValueError(f"{path} holds {kind}; expected {expected}")
    if header[3] != dimensions:
        raise ValueError(f"{path} has {header[3]} dimension(s) instead of {dimensions}; expected {expected}")
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(f"{path} is truncated: {len(header)} bytes, its header alone has {4 + 4 * dimensions}")
    return struct.unpack(f">{dimensions}I", header[4:])


# The download.


class _NoDownloadError(Exception):
    """The files are neither cached nor to be had; the message says why."""


def _download() -> Path:
    """Return the folder that holds the four files uncompressed, downloading what is not there yet."""
    try:
        import pooch
    except ImportError:
        raise _NoDownloadError("to download it needs the package pooch: pip install 'gemmlet[train]'") from None
    try:
        folder = Path(pooch.os_cache("gemmlet")).expanduser() / "mnist"
    except RuntimeError:  # neither HOME is set nor does the system know the user
        raise _NoDownloadError("there is no folder for the download: set HOME, or XDG_CACHE_HOME") from None
    missing = [name for name, digest in SHA256.items() if not _is_cached(folder / name, digest)]
    if not missing:
        return folder

    reasons = _unreachable(MIRRORS)
    for mirror in MIRRORS:
        if mirror in reasons:
            continue
        try:
            while missing:
                _retrieve(mirror, missing[0], folder)
                del missing[0]
            return folder
        except (OSError, ValueError, EOFError, zlib.error) as error:  # the errors of requests are OSErrors
            reasons[mirror] = _in_short(error)
    raise _NoDownloadError("no download: " + ", ".join(f"{urlsplit(m).netloc}: {reasons[m]}" for m in MIRRORS))


def _is_cached(path: Path, digest: str) -> bool:
    import pooch

    try:
        return bool(pooch.file_hash(str(path)) == digest)
    except OSError:
        return False


def _unreachable(mirrors: Sequence[str]) -> dict[str, str]:
    """Which mirrors do not answer within `_ANSWER_SECONDS`, and why.

    All are asked at once, each in its own thread: the time limits of requests count for each address of a host alone,
    and not for the look-up of its name, so that without a network one mirror could take half a minute.
    """
    import requests

    answers: dict[str, str | None] = {}

    def ask(mirror: str) -> None:
        try:
            requests.head(mirror + "t10k-labels-idx1-ubyte.gz", timeout=_ANSWER_SECONDS).close()
            answers[mirror] = None  # any answer will do, also a refusal
        except OSError as error:
            answers[mirror] = _in_short(error)

    threads = [threading.Thread(target=ask, args=(mirror,), daemon=True) for mirror in mirrors]
    end = time.monotonic() + _ANSWER_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    found = {mirror: answers.get(mirror, f"no answer within {_ANSWER_SECONDS:g} s") for mirror in mirrors}
    return {mirror: reason for mirror, reason in found.items() if reason is not None}


def _retrieve(mirror: str, name: str, folder: Path) -> None:
    """Put the file `name`, uncompressed and checked, into `folder`; a file that does not pass is not left there."""
    import pooch

    def fetch(url: str, output: str, _: object) -> None:
        buffer = io.BytesIO()
        pooch.HTTPDownloader(timeout=(_ANSWER_SECONDS, _READ_SECONDS), chunk_size=1 << 16)(url, buffer, None)
        content = buffer.getvalue()
        # Some servers declare the gzip as an encoding of the transfer, and requests has undone it already.
        if content[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
                content = stream.read(_LARGEST)  # of more the SHA-256 differs anyhow
        Path(output).write_bytes(content)

    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # it reports each file in two lines
    try:
        _log.info("downloading %s%s.gz", mirror, name)
        pooch.retrieve(f"{mirror}{name}.gz", f"sha256:{SHA256[name]}", fname=name, path=folder, downloader=fetch)
    finally:
        logger.setLevel(level)


def _in_short(error: Exception) -> str:
    """One line of a network error, whose text may be long."""
    import requests

    if isinstance(error, requests.exceptions.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached"
    if isinstance(error, ValueError) and "SHA256" in str(error):
        return "sent another file (its SHA-256 differs)"
    return " ".join(str(error).split())[:200]
