"""How NumPy's dtypes, and arrays, are handed to CUDA kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

# Floating-point dtypes: what csrc/cuda calls them, what it computes them in (Compute<T>), and their bytes.
FLOATS = {"float32": "float", "float64": "double", "float16": "gemmlet::float16", "bfloat16": "gemmlet::bfloat16"}
COMPUTED = {name: "double" if name == "float64" else "float" for name in FLOATS}
SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
INTEGERS = {
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned",
    "int64": "long long",
    "uint64": "unsigned long long",
}
CPP_TYPES = FLOATS | INTEGERS

# States and hyperparameters that the kernel of an optimizer takes.
RULE_STATES = 2
RULE_HYPERPARAMETERS = 9


def address(array: Any) -> int:
    """Of an array's first element; 0 for None."""
    return 0 if array is None else int(array.data.ptr)


def pointer(array: Any) -> np.uint64:
    """The same as a kernel takes it."""
    return np.uint64(0 if array is None else array.data.ptr)


def number(value: float, dtype: np.dtype[Any]) -> np.floating[Any]:
    """A number in the type that elements of `dtype` are computed in."""
    return np.float64(value) if dtype.itemsize == 8 else np.float32(value)
