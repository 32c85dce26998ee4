"""The file format safetensors (https://github.com/huggingface/safetensors), written and read with NumPy alone.

Eight bytes, the length of a header, little-endian; the header, JSON, padded with spaces to a multiple of eight; the
tensors' buffers, little-endian and in C order, one after the other without a gap. The header gives each tensor's dtype,
shape and place, and under ``__metadata__`` strings.
"""

from __future__ import annotations

import errno
import io
import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# NumPy's dtypes by the format's names, in the order in which its own library sorts tensors: strictest alignment first.
_DTYPES = {
    "F64": "<f8", "U64": "<u8", "I64": "<i8", "F32": "<f4", "U32": "<u4", "I32": "<i4",
    "F16": "<f2", "U16": "<u2", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

# A longer header is refused, as by the format's own library.
_MAX_HEADER = 100_000_000

# Bytes that are read at a time: a file that claims more than it has costs no more memory than it has.
_PIECE = 1 << 20


class Readable(Protocol):
    """A binary file that is open for reading."""

    def read(self, n: int, /) -> Any:
        """Return up to `n` bytes; none at the end."""


class Writable(Protocol):
    """A binary file that is open for writing."""

    def write(self, content: memoryview, /) -> Any:
        """Take bytes, and return how many."""


def dump(file: Writable, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write tensors by name and strings by name.

    Raises
    ------
    ValueError
        A tensor's dtype or name is none of the format's, or the header gets too long; nothing has been written then.
    """
    check_has(file, "write")
    for name, array in tensors.items():
        if name == "__metadata__" or array.dtype.newbyteorder("<") not in _NAMES:
            raise ValueError(f"tensor {name!r} of dtype {array.dtype} has no place in a safetensors file")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ranks = list(_DTYPES)
    little = {name: np.asarray(array, array.dtype.newbyteorder("<"), order="C") for name, array in tensors.items()}
    names = sorted(little, key=lambda name: (ranks.index(_NAMES[little[name].dtype]), name))
    end = 0
    for name in names:
        array = little[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"the header would have {len(text):,} bytes, the most are {_MAX_HEADER:,}")
    _write(file, memoryview(struct.pack("<Q", len(text)) + text))
    for name in names:
        _write(file, little[name].reshape(-1).view(np.uint8).data)


def load(file: Readable) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the metadata and the tensors of a file that is read from where it stands to its end.

    Each tensor has memory of its own. What the header claims costs none before the file has shown as many bytes.

    Raises
    ------
    ValueError
        It is truncated or corrupt, or has a dtype that NumPy lacks.
    """
    check_has(file, "read")
    length = int.from_bytes(_read(file, 8, "it is truncated: it has not even the length of its header"), "little")
    if length > _MAX_HEADER:
        hint = "; it begins as ONNX files do, which MLP.from_onnx reads" if length % 256 == 8 else ""
        raise ValueError(f"its header would have {length:,} bytes, the most are {_MAX_HEADER:,}{hint}")
    header = parse_json(_read(file, length, "it is truncated: its header is not all there").decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no strings")
    places = {name: _place(name, entry) for name, entry in header.items()}
    in_order = sorted(places, key=lambda name: places[name][2:])
    end = 0
    for name in in_order:
        if places[name][2] != end:
            raise ValueError(f"tensor {name!r} begins at byte {places[name][2]} of the buffers, expected {end}")
        end = places[name][3]
    tensors = {}
    for name in in_order:
        dtype, shape, begin, end = places[name]
        content = _read(file, end - begin, f"it is truncated: tensor {name!r} is not all there")
        # Natively, as all that computes with it expects; the values are little-endian in the file.
        tensors[name] = np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    if len(file.read(1)):
        raise ValueError("bytes follow behind the last tensor")
    return metadata, tensors


def check_has(file: Any, method: str) -> None:
    """Raise `TypeError` unless the file is binary and has this method."""
    if isinstance(file, io.TextIOBase) or not callable(getattr(file, method, None)):
        raise TypeError(f"file must be a path or a binary file with a {method}(), got {type(file).__name__}")


def _write(file: Writable, content: memoryview) -> None:
    while content:
        written = file.write(content)
        # An unbuffered file may take less than it is given, and None means nothing there; others return None for all.
        if written is None and not isinstance(file, io.RawIOBase):
            return
        if not written:
            raise BlockingIOError(errno.EAGAIN, "the file takes no more bytes now, as it is non-blocking")
        content = content[written:]


def _read(file: Readable, n: int, message: str) -> bytearray:
    content = bytearray()
    while len(content) < n:
        piece = file.read(min(n - len(content), _PIECE))
        if piece is None:
            raise BlockingIOError(errno.EAGAIN, "the file has no bytes now, as it is non-blocking")
        if not len(piece):
            raise ValueError(message)
        content += piece
    return content


def parse_json(text: str) -> Any:
    """Return what JSON stands for, or raise `ValueError`: it is nested too deeply, has a name twice, or NaN."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        pairs = list(pairs)
        if len(result := dict(pairs)) < len(pairs):
            raise ValueError("its JSON has a name twice")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"its JSON has the number {constant}")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


def _place(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """The dtype, the shape, and where in the buffers the tensor begins and ends, checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        # No array has more dimensions: their product is bounded before it is formed.
        if not isinstance(numbers, list) or len(numbers) > 64 or not all(_is_size(n) for n in numbers):
            raise ValueError(f"tensor {name!r} has a shape or data_offsets that are no lists of sizes")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {name!r} has the dtype {entry['dtype']!r}; the choices are {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} has {dtype.itemsize} bytes a number, but lies at {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]
