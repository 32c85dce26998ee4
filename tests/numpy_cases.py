"""Random programs of a line or two over NumPy's surface, run twice and compared: with and without an acceleration.

A `Case` is source text, so that what differs can be repeated by hand: operands of many types, dtypes, shapes and
layouts, a statement, and what NumPy is to do at floating-point errors. `run` executes one and describes everything that
a program could see of it: types, dtypes, shapes, strides, flags, bits, memory that is shared, warnings and where they
point, and errors.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def _split(text: str) -> list[str]:
    """Return the pieces between two spaces and more."""
    return re.split(r"\s{2,}", text.strip())


# Operands. Their values are drawn once, so that they are the same in both runs.

_SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, -1e-310, 1e-40, 1e300, -1e300, 700.0, -700.0, 0.5, -2.0]


@functools.lru_cache(maxsize=4096)
def _bytes(seed: int, shape: tuple[int, ...], dtype: str, values: str) -> bytes:
    rng = np.random.default_rng(seed)
    if values == "whole":
        drawn = rng.integers(-4, 5, shape).astype(np.float64)
    elif values == "special":
        drawn = rng.choice(_SPECIAL, shape)
    elif values == "positive":
        drawn = rng.uniform(0.1, 3.0, shape)
    else:
        drawn = rng.standard_normal(shape)
        if values == "few special":
            drawn[rng.random(shape) < 0.1] = rng.choice(_SPECIAL[:5])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype == "b1":
            return (np.asarray(drawn) > 0).tobytes()
        if np.dtype(dtype).kind in "iu":
            return np.asarray(np.nan_to_num(3 * drawn, posinf=9, neginf=-9)).astype(dtype).tobytes()
        return np.asarray(drawn).astype(dtype).tobytes()


def draw(seed: int, shape: tuple[int, ...], dtype: str = "f8", values: str = "normal") -> np.ndarray:
    """Draw an array, C-contiguous and aligned."""
    array = np.empty(shape, dtype)
    array[...] = np.frombuffer(_bytes(seed, shape, dtype, values), dtype).reshape(shape)
    return array


class Sub(np.ndarray):
    """A subclass without methods of its own."""


class Wrapped(np.ndarray):
    """A subclass that has a say in what ufuncs and functions return."""

    def __array_finalize__(self, obj: Any) -> None:
        self.made_from = type(obj).__name__

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return ("wrapped", None if context is None else context[0].__name__, np.asarray(array))


class Override:
    """No array, and in charge of every ufunc and function that it is given to."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return ("ufunc", ufunc.__name__, method, len(inputs), sorted(kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return ("function", func.__name__, len(args), sorted(kwargs))


class Reflected:
    """No array, and with operators that come before those of arrays."""

    __array_ufunc__ = None

    def __radd__(self, other: Any) -> Any:
        return ("radd", type(other).__name__)

    def __rmatmul__(self, other: Any) -> Any:
        return ("rmatmul", type(other).__name__)

    def __gt__(self, other: Any) -> Any:
        return ("gt", type(other).__name__)


class AsArray:
    """No array, and converted to one."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.arange(3.0) if dtype is None else np.arange(3.0).astype(dtype)


def unaligned(a: np.ndarray) -> np.ndarray:
    """Return a copy whose memory begins at an odd address."""
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    copy = memory.view(a.dtype) if a.ndim else memory.view(a.dtype)[:1]
    copy = copy.reshape(a.shape)
    copy[...] = a
    return copy


def readonly(a: np.ndarray) -> np.ndarray:
    """Return the array, which can no longer be written."""
    a.flags.writeable = False
    return a


def masked(a: np.ndarray) -> Any:
    """Return a masked array."""
    mask = np.zeros(a.shape, bool)
    mask.reshape(-1)[::3] = True
    return np.ma.array(a, mask=mask)


def field_of(a: np.ndarray) -> np.ndarray:
    """Return a copy that is a field of records, whose strides are no multiple of the item's size."""
    records = np.zeros(a.shape, [("value", a.dtype), ("more", "i4")])
    records["value"] = a
    return records["value"]


def listed(a: np.ndarray) -> list[Any]:
    """Return the array as a list; not one without dimensions, which would be a number."""
    if a.ndim == 0:
        raise ValueError
    return list(a.tolist())


LAYOUTS = {
    "{a}": 30,
    "np.asfortranarray({a})": 3,
    "{a}.T": 4,
    "{a}[::-1]": 2,
    "{a}[..., ::-1]": 1,
    "{a}[..., ::2]": 2,
    "{a}[::2]": 2,
    "{a}[1:]": 2,
    "{a}[:, :1]": 1,
    "{a}[:1]": 1,
    "np.broadcast_to({a}, (2, *{a}.shape))": 1,
    "np.broadcast_to({a}[..., :1], {a}.shape)": 1,
    "unaligned({a})": 1,
    "field_of({a})": 1,
    "{a}.astype({a}.dtype.newbyteorder())": 1,
    "readonly({a})": 1,
    "{a}.view(Sub)": 1,
    "{a}.view(Wrapped)": 1,
    "masked({a})": 1,
    "{a}.astype(object)": 1,
    "listed({a})": 1,
    "np.matrix({a})": 0.5,
    "{a}.view(np.recarray)": 0.2,
    "{a}[None]": 1,
    "{a}[..., None]": 1,
    "{a}.ravel()[:0]": 0.5,
    "{a}.squeeze()": 0.5,
}  # fmt: skip
DTYPES = {"f8": 60, "f4": 12, "i8": 8, "b1": 4, "i4": 3, "u1": 2, "f2": 1, "c16": 1, "g": 1, "u8": 1}
VALUES = {"normal": 10, "whole": 4, "special": 3, "few special": 2, "positive": 3}
SHAPES = {
    (3, 4): 6, (5,): 6, (1, 4): 2, (4, 1): 4, (8, 8): 3, (17,): 2, (): 2, (1,): 2, (1, 1): 2, (0,): 1, (0, 3): 1,
    (3, 0): 1, (2, 3, 4): 2, (1, 3, 1): 1, (33, 9): 2, (100,): 2, (64, 50): 2, (1000,): 1, (40, 300): 0.3,
    (300, 130): 0.3, (2, 1, 2, 3): 0.3,
}  # fmt: skip
SCALARS = _split("""
    2  0  -1  3  1  0.5  2.0  -0.0  1e-8  float('nan')  float('inf')  True  1j  2**63  2**70  -(2**70)
    np.float64(0.5)  np.float64('nan')  np.float32(0.1)  np.int64(3)  np.int32(-2)  np.uint8(200)  np.bool_(True)
    np.array(1.5)  np.array(2)  np.array(0.5, 'f4')  None  'text'  1e400  np.longdouble(0.3)  np.float16(0.3)
    Override()  Reflected()  AsArray()  [1.0, 2.0]  (1, 2)  range(4)  np.float64(2)  2  0.1  1
    np.datetime64('2020-01-01')
""")


def _pick(rng: random.Random, weights: dict[Any, float]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _array(rng: random.Random, shape: tuple[int, ...], dtype: str = "", values: str = "", plain: bool = False) -> str:
    dtype = dtype or _pick(rng, DTYPES)
    values = values or _pick(rng, VALUES)
    text = f"draw({rng.randrange(100)}, {shape}, {dtype!r}, {values!r})"
    return text if plain else _pick(rng, LAYOUTS).format(a=text)


def _beside(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape that mostly broadcasts with another one."""
    kind = rng.randrange(12)
    if kind < 6 or not shape:
        return shape
    if kind == 6:
        return shape[-1:]
    if kind == 7:
        return (*shape[:-1], 1)
    if kind == 8:
        return (1, *shape[1:])
    if kind == 9:
        return (2, *shape)
    if kind == 10:
        return ()
    return (*shape[:-1], shape[-1] + 1)


# Statements. In them a, b, c and d are operands; what a program would see of the outcome is in `r`.

_USUAL = ["+", "-", "*", "/", "**"]
_BINARY = [*_USUAL, "//", "%", "@", "&", "|", "^", "<<", ">>", "<", "<=", ">", ">=", "==", "!="]
_UFUNCS_1 = _split("exp  log  tanh  sqrt  square  abs  negative")
_MORE_UFUNCS_1 = _split("""
    sign  sin  cos  log1p  expm1  exp2  log2  log10  reciprocal  positive  isnan  isfinite  isinf  signbit  floor
    ceil  rint  logical_not  cbrt  invert  spacing  conjugate  arctan  sinh
""")
_UFUNCS_2 = _split("add  subtract  multiply  divide  power  maximum  minimum  greater  less  equal  matmul")
_MORE_UFUNCS_2 = _split("""
    fmax  fmin  arctan2  hypot  greater_equal  less_equal  not_equal  logical_and  logical_or  floor_divide  remainder
    copysign  ldexp  nextafter  bitwise_and  logaddexp  float_power  heaviside  fmod
""")
_REDUCTIONS = _split("sum  mean  max  min  prod  any  all  argmax  argmin  std  var  cumsum")
_EXPRESSIONS = _split("""
    1 / (1 + np.exp(-a))  1.0 / (1.0 + np.exp(-a))  a * (1 - a)  1 - a**2  1 - np.tanh(a)**2  np.exp(a - np.max(a))
    np.exp(a - a.max(axis=-1, keepdims=True))  np.exp(a) / np.sum(np.exp(a))  np.maximum(0, a)  np.maximum(a, 0)
    np.maximum(0.01 * a, a)  a * (a > 0)  (a > 0) * b  (a > 0).astype(float)  (a > 0).astype(int)
    np.where(a > 0, a, 0.01 * a)  np.where(a > 0, 1, 0)  np.where(a > b, a, b)  np.mean((a - b)**2)
    ((a - b)**2).mean()  np.sum((a - b)**2, axis=-1)  np.sqrt(np.sum((a - b)**2))  -np.mean(np.log(a + 1e-8))
    a + b * c  (a + b) * c - a / b  a - a.mean(axis=0)  (a - np.mean(a, axis=0)) / np.std(a, axis=0)
    (a - a.mean()) / (a.std() + 1e-8)  0.9 * a + (1 - 0.9) * b  0.9 * a + 0.1 * b**2  a / (np.sqrt(b) + 1e-8)
    -a * np.log(b) - (1 - a) * np.log(1 - b)  np.clip(a, 1e-15, 1 - 1e-15)  np.sum(a, axis=0) / len(a)  a[1:] - a[:-1]
    (a + b)[0]  2 * a + 1  a + a + a + a  a * a * a  -(-a)  (a * 2) ** 2  a.T + a.T  a.T * 2 - b  (a == b).mean()
    np.sum(a == b)  np.argmax(a, axis=1) == np.argmax(b, axis=1)  abs(a - b).max()  np.abs(a - b) < 1e-3
    np.linalg.norm(a - b)  np.outer(a, b)  np.eye(3)[np.arange(3) % 2]  np.zeros_like(a) + b  np.ones(a.shape) * a
    np.exp(a.T - np.max(a, axis=1))  np.log(np.exp(a).sum(axis=-1))[..., None]  a.sum(axis=0, keepdims=True) * 2
    (a + 1).sum(axis=1)  np.square(a - b)  np.power(a, 2)  np.power(a, b)
    np.multiply(a, b) + np.multiply(1 - a, 1 - b)
""")
_STATEMENTS = _split("""
    a[a < 0] = 0  a[a <= 0] = 0.01  a[b > 0] = 1  a[a > 0] = a[a > 0] * 2  a[a > 0] = b  a[a != a] = 0
    a[~(a > 0)] *= 0.5  a[:] = b  a[...] = 0.9 * a + 0.1 * b  a[0] = b  a[-1] = 1  a[:, 0] = 7
    a[np.arange(len(a)), 0] -= 1  a[range(len(a)), 0] -= 1  a[[0, 0]] += 1  a[0] += 1  a[1:] += a[:-1]
    a[1:] -= a[:-1]  a[:-1] *= a[1:]  a[::2] /= 2  a += a.T  a -= a.T  a *= a[::-1]  a += 1  a -= 0.1 * b  a *= 2
    a /= 2  a /= b  a **= 2  a **= 0.5  a += b  a -= b  a *= b  a //= 2  a %= 2  a @= b  a += True  a += 1j
    a -= np.float64(1)  a /= 0  a <<= 1  a |= b  a += 'x'  a += None  np.add(a, b, out=a)
    np.add(a[1:], a[:-1], out=a[1:])  np.subtract(a[1:], a[:-1], out=a[:-1])  np.multiply(a, 2, a)  np.exp(a, out=a)
    np.exp(a[1:], out=a[:-1])  np.tanh(a, a)  np.maximum(a, 0, out=a)  np.maximum(a, 0, a)  np.sqrt(a, out=a)
    np.clip(a, -1, 1, out=a)  a.clip(-1, 1, out=a)  np.copyto(a, b)  np.copyto(a, b, where=a > 0)
    np.add.at(a, [0, 0], 1)  np.put(a, [0], 5)  np.putmask(a, a > 0, 0)  np.place(a, a > 0, [1, 2])  a.fill(3)
    a.sort()  a[a.argsort()[:2]] = 0  a[None] = 1  a[()] = 2  a[True] = 3  a[0, 0] = 1  a[99] = 1  a[1.5] = 1
    a[np.array([True, False])] = 1  a.flat[0] = 4  a[b] = 1  a[b > 0] += c  a = -a; a += 1  c += a; a = c * 2
    d = a; d += 1; r = a is d  np.divide(a, b, out=np.zeros(a.shape), where=b != 0)
    np.log(a, out=np.zeros_like(a), where=a > 0)  np.dot(a, b, out=a)  np.dot(a, b, out=b)  np.dot(a, b, out=c)
    np.matmul(a, b, out=a)  np.sum(a, axis=0, out=b)  np.mean(a, 0, None, b)  np.max(a, axis=-1, out=b)  del a[0]
    a.shape = (-1,); a += 1  a.real += 1  a.T[...] = b.T  a.T[a.T > 0] = 0  a[:, ::-1][a > 0] = 0  a.ravel()[0] = 9
""")
_PIECES = _split("""
    a[0]  a[-1]  a[0, 0]  a[:, 0]  a[0, :]  a[1:3]  a[::-1]  a[..., 0]  a[None]  a[a > 0]  a[a > 0, 0]  a[[0, 1]]
    a[np.array([0, -1])]  a[range(2)]  a[[0, 1], [0, 1]]  a[range(2), [0, 1]]  a[np.arange(2), np.array([0, 1])]
    a[:, [0, 1]]  a[True]  a[()]  a[99]  a['x']  a[1.0]  a[np.int64(0)]  a[np.bool_(True)]  a[b > 0]  a[b == b]
    a[np.array(0)]  a[[]]  a[[True, False]]  a[None, :, None]  a[2:1]  a[:, None]
    a[np.random.RandomState(0).permutation(len(a))]
""")
_CALLS = _split("""
    np.zeros({s})  np.ones({s})  np.zeros({s}, dtype=int)  np.ones({s}, 'f4', 'F')  np.zeros_like(a)  np.ones_like(a)
    np.full_like(a, 2)  np.empty_like(a).shape  np.copy(a)  a.copy()  a.copy('F')  np.array(a)
    np.array(a, dtype='f4')  np.asarray(a)  a.astype('f4')  a.astype(int)  a.reshape(-1)  a.reshape(-1, 1)  a.ravel()
    a.T  a.transpose()  a.flatten('F')  np.hstack((a, b))  np.vstack([a, b])  np.concatenate([a, b])
    np.concatenate([a, b], axis=1)  np.stack([a, b])  np.column_stack([a, b])  np.c_[a, b]  np.round(a, 2)
    np.allclose(a, b)  np.isclose(a, b, equal_nan=True)  np.array_equal(a, b)  np.nan_to_num(a)  np.unique(a)
    np.sort(a)  np.argsort(a)  np.diff(a)  np.cumsum(a)  np.bincount([0, 1, 1])  np.count_nonzero(a)  np.median(a)
    np.percentile(a, 30)  np.average(a, axis=0)  np.linalg.norm(a)  np.linalg.norm(a, axis=-1)
    np.linalg.norm(a, axis=0, keepdims=True)  np.linalg.norm(a, 1)  np.linalg.norm(a, 'fro')  np.linalg.norm(a, 2)
    np.linalg.norm(a, np.inf)  np.linalg.norm(a, ord=-1, axis=0)  np.clip(a, 0, 1)  np.clip(a, b, c)
    np.clip(a, None, 1)  np.clip(a, 1, 0)  np.clip(a, 0.5, None)  np.clip(a, a_min=0, a_max=1)  a.clip(0)
    a.clip(-1, 1)  a.clip(min=0)  np.clip(a, -1, 1, dtype='f4')  np.clip(a, float('nan'), 1)  np.clip(a, 0, 10**30)
    np.clip(a, -5, 5)  np.where(a > 0, a, b)  np.where(a > 0)  np.where(a, 1, 0.0)  np.where(a > 0, 1, b)
    np.where(b > 0, a, c)  np.where(a > 0, a)  np.where(True, a, b)  np.where(a, b, c)  np.where(a > 0, 'x', 'y')
    np.einsum('ij,jk', a, b)  np.tensordot(a, b, 1)  np.inner(a, b)  np.vdot(a, b)  np.outer(a, b)  np.cross(a, b)
    np.trace(a)  np.squeeze(a)  np.expand_dims(a, 0)  np.tile(a, 2)  np.repeat(a, 2)  np.squeeze(a, axis=0)
    np.maximum.reduce([a, b])  sum(a)  max(a)  abs(a)  divmod(a, 2)  pow(a, 2)  pow(a, 2, 3)  round(a, 1)  float(a)
    bool(a)  int(a)  len(a)  list(a)  repr(a)  a.tolist()  a.item()  ~a  +a  -a  not a  hash(a)  a < b < c  a and b
    a in [1]  1 in a  complex(a)  np.add.reduce(a)  np.add.reduce(a, axis=None)
    np.add.reduce(a, axis=-1, keepdims=True)  np.add.accumulate(a)  np.add.outer(a, b)  np.add.reduceat(a, [0, 1])
    np.multiply.reduce(a, initial=2)  np.maximum.reduce(a, axis=0)  np.minimum.accumulate(a)  np.subtract.outer(a, b)
    np.logaddexp.reduce(a)  np.add.reduce(a, where=a > 0)  np.nansum(a)  np.nanmax(a)  np.ptp(a)  np.fmax.reduce(a)
    np.exp.types  np.add.identity  np.dot.__name__  np.modf(a)  np.frexp(a)  np.vectorize(lambda x: x + 1)(a)
    np.apply_along_axis(np.sum, 0, a)  np.frompyfunc(lambda x, y: x + y, 2, 1)(a, b)  a.sum().dtype  a.dot(b).shape
    np.result_type(a, b)  np.nditer(a).itersize  [x for x in np.nditer(a)]  np.linalg.svd(a)[1]  np.linalg.inv(a)
    np.linalg.solve(a, b)  np.cov(a)  np.corrcoef(a)  np.polyfit([1, 2, 3], [1, 2, 3], 1)  np.fft.fft(a)
    np.interp(a, [0, 1], [0, 1])  np.histogram(a[np.isfinite(a)], 3)  np.gradient(a)  np.searchsorted([0.0, 1.0], a)
    np.ma.dot(a, b)  np.ma.masked_invalid(a).sum()  (np.ma.array(a, mask=a > 0) + b).sum()
""")
# What calls kernels whose results may differ in the last places: per call, some ULP; in sums of products, a bound.
_INEXACT = _split("""
    exp  log  tanh  dot  matmul  @  norm  einsum  inner  outer  inv  solve  svd  cov  corrcoef  polyfit  fft
""")


@dataclass(frozen=True)
class Case:
    """A program of one line, its operands, and what is done at floating-point errors."""

    operands: dict[str, str]
    code: str
    errors: str  # of np.errstate

    def __str__(self) -> str:
        lines = [f"{name} = {text}" for name, text in self.operands.items()]
        return "\n".join([*lines, f"with np.errstate(all={self.errors!r}): {self.code}"])

    @property
    def inexact(self) -> bool:
        """Whether results may differ by rounding."""
        return any(word in self.code for word in _INEXACT)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return bool(re.search("dot|matmul|@|cov|corr", self.code))

    @property
    def elementwise(self) -> bool:
        """Whether each number of the result is a function of one number, so that its own size bounds its rounding."""
        return bool(re.match(r"(r = )?np\.(exp|log|tanh|exp2|expm1|log1p|log2|log10)\(a[^()]*\)$", self.code))


_AXES = _split("0  1  -1  0  1  -1  None  (0, 1)  -2  2  ()  (0,)  np.int64(0)  0.5  'x'  True")
_KEEPDIMS = _split("keepdims=True  keepdims=True  keepdims=False  keepdims=1  keepdims=np._NoValue")
_REDUCED_AS = _split("""
    dtype='f4'  dtype='f8'  dtype=int  dtype=object  dtype=None  dtype='c16'  out=b  out=None  out=np.zeros(3)
    out=np.array(0.0)  out=(b,)  where=a > 0  where=True  initial=1  initial=0.5  where=False  nonsense=1  ddof=1
""")
_CALLED_WITH = _split("""
    out=c  out=(c,)  c  out=a  out=b  where=True  where=[True]  out=c, where=a > 0  dtype='f8'  dtype='f4'  dtype='i8'
    casting='unsafe'  casting='no'  order='F'  order='C'  subok=False  out=None  out=(None,)  out=()  sig='dd->d'
    signature='d->d'  axis=0  nonsense=1  c, out=c  dtype=object  out=[c]  extobj=None  out=c, casting='unsafe'
    dtype=float, out=c
""")


def _reduction(rng: random.Random) -> str:
    name = rng.choice(_REDUCTIONS if rng.random() < 0.3 else ["sum", "mean", "max", "min", "argmax"])
    words = []
    if rng.random() < 0.7:
        words.append(rng.choice(["", "axis=", "axis="]) + rng.choice(_AXES))
    if rng.random() < 0.4:
        words.append(rng.choice(_KEEPDIMS))
    if rng.random() < 0.2 and name != "cumsum":  # NumPy 2.4 writes beyond an `out` that is too small for it
        words.append(rng.choice(_REDUCED_AS))
    return f"r = a.{name}({', '.join(words)})" if rng.random() < 0.5 else f"r = np.{name}({', '.join(['a', *words])})"


def _ufunc(rng: random.Random) -> str:
    usual = rng.random() < 0.75
    if rng.random() < 0.5:
        name, given = rng.choice(_UFUNCS_1 if usual else _MORE_UFUNCS_1), "a"
    else:
        name = rng.choice(_UFUNCS_2 if usual else _MORE_UFUNCS_2)
        given = rng.choice(["a, b", "a, b", "b, a", "a, s", "s, a"])
    more = ", " + rng.choice(_CALLED_WITH) if rng.random() < 0.35 else ""
    return f"r = np.{name}({given}{more})"


_SIZES = [1, 2, 3, 4, 5, 10, 17, 30, 64, 0]


def _product(rng: random.Random, dtype: str) -> Case:
    """Matmuls, of shapes that mostly fit."""
    m, k, n = (rng.choice(_SIZES if rng.random() < 0.9 else [100, 200, 300]) for _ in range(3))
    left, right = ((m, k), (k, n))
    if rng.random() < 0.6:
        less_usual = [((2, m, k), (k, n)), ((2, m, k), (2, k, n)), ((m, k), (n, k)), ((), (k,))]
        left, right = rng.choice([((k,), (k, n)), ((m, k), (k,)), ((k,), (k,)), ((m, 1), (1, n)), *less_usual])
    values = rng.choice(["normal", "normal", "whole", "few special"])

    def operand(shape: tuple[int, ...]) -> str:
        own = dtype if rng.random() < 0.9 else _pick(rng, DTYPES)
        if len(shape) == 2 and rng.random() < 0.35:
            return _array(rng, shape[::-1], own, values, plain=True) + ".T"
        if shape and rng.random() < 0.1:
            twice = _array(rng, tuple(2 * size for size in shape), own, values, plain=True)
            return f"{twice}[{', '.join(['::2'] * len(shape))}]"
        return _array(rng, shape, own, values, plain=rng.random() < 0.85)

    operands = {"a": operand(left), "b": operand(right)}
    if rng.random() < 0.13:
        operands["b"] = rng.choice([*SCALARS, "a.T", "a", "a[::-1]"])
    if rng.random() < 0.15:
        shape = (*left[:-1], *right[:-2], *right[-1:]) if len(right) > 1 else left[:-1]
        operands["c"] = _array(rng, shape, plain=rng.random() < 0.8)
        call = rng.choice(["np.dot(a, b, out=c)", "np.dot(a, b, c)", "a.dot(b, out=c)", "np.matmul(a, b, out=c)"])
    else:
        call = rng.choice(["a @ b", "np.dot(a, b)", "a.dot(b)", "np.matmul(a, b)"])
    return Case(operands, f"r = {call}", _errors(rng))


def _errors(rng: random.Random) -> str:
    return rng.choices(["warn", "raise", "ignore", "call"], [6, 2, 1, 1])[0]


def case(rng: random.Random) -> Case:
    """Draw a case."""
    dtype = rng.choice(["f8", "f8", "f8", "f4", ""])
    kind = rng.choices(
        ["product", "binary", "ufunc", "reduction", "expression", "statement", "piece", "call"],
        [12, 25, 17, 16, 12, 9, 5, 10],
    )[0]
    if kind == "product":
        return _product(rng, dtype or "f8")
    shape = _pick(rng, SHAPES)
    values = rng.choice(["", "", "normal"])
    operands = {"a": _array(rng, shape, dtype, values, plain=rng.random() < 0.4)}
    for name in "bc":
        own = dtype if rng.random() < 0.85 else ""
        operands[name] = _array(rng, _beside(rng, shape), own, values, plain=rng.random() < 0.5)
    operands["s"] = rng.choice(SCALARS)
    if kind == "binary":
        operator = rng.choice(_USUAL if rng.random() < 0.6 else _BINARY)
        left, right = rng.choice([("a", "b"), ("a", "b"), ("a", "s"), ("s", "a"), ("a", "a")])
        in_place = rng.random() < 0.25 and operator[-1] not in "=<>"
        code = f"a {operator}= {right if right != 'a' else 'b'}" if in_place else f"r = {left} {operator} {right}"
    elif kind == "ufunc":
        code = _ufunc(rng)
    elif kind == "reduction":
        code = _reduction(rng)
    elif kind == "expression":
        code = "r = " + rng.choice(_EXPRESSIONS)
    elif kind == "statement":
        code = rng.choice(_STATEMENTS)
    elif kind == "piece":
        code = "r = " + rng.choice(_PIECES)
    else:
        code = "r = " + rng.choice(_CALLS).format(s=shape)
    if any("object" in text for text in operands.values()) and any(word in code for word in ("**", "pow", "<<")):
        return case(rng)  # Python's whole numbers have no end
    used = {name: text for name, text in operands.items() if name in _names(code)}
    return Case(used, code, _errors(rng))


@functools.lru_cache(maxsize=8192)
def _names(code: str) -> tuple[str, ...]:
    return compile(code, "<case>", "exec").co_names


def cases(seed: int) -> Iterator[Case]:
    """Yield cases without end, the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        yield case(rng)


# Outcomes.


@dataclass
class Outcome:
    """What a program could see of a case: facts, which must be equal, and numbers, which may differ by rounding."""

    facts: list[Any] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """Describe a value."""
        kind = type(value)
        if value is np.ma.masked:
            self.facts.append((name, "masked"))
        elif isinstance(value, np.ma.MaskedArray):
            self.facts.append((name, kind.__name__, repr(value.fill_value)))
            self.add(f"{name}.data", value.data)
            self.add(f"{name}.mask", value.mask)
        elif isinstance(value, np.ndarray):
            made_from = getattr(value, "made_from", None)
            self.facts.append((name, kind.__name__, value.dtype.str, value.shape, value.strides, made_from))
            self.facts.append((name, str(value.flags), value.base is None))
            self._add_numbers(np.array(value, subok=False))
        elif isinstance(value, np.generic):
            self.facts.append((name, kind.__name__, value.dtype.str))
            self._add_numbers(np.array(value))
        elif isinstance(value, tuple | list):
            self.facts.append((name, kind.__name__, len(value)))
            for number, one in enumerate(value):
                self.add(f"{name}[{number}]", one)
        elif isinstance(value, float | complex):
            self.facts.append((name, kind.__name__))
            self._add_numbers(np.array(value))
        else:
            text = repr(value)
            self.facts.append((name, kind.__name__, None if " at 0x" in text else text))

    def _add_numbers(self, copy: np.ndarray) -> None:
        if copy.dtype.kind == "O" or copy.dtype.names:
            self.facts.append(repr(copy.tolist()))
        else:
            self.numbers.append(copy)


_HELPERS = {
    each.__name__: each
    for each in (draw, Sub, Wrapped, Override, Reflected, AsArray, unaligned, readonly, masked, field_of, listed)
} | {"np": np}


def run(case: Case) -> Outcome | None:
    """Run a case; None if its operands cannot be made."""
    names: dict[str, Any] = dict(_HELPERS)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name, text in case.operands.items():
                names[name] = eval(text, names)
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError):
            return None
    given = {name: names[name] for name in case.operands}
    outcome = Outcome()
    reported: list[Any] = []
    # Whether something underflows on the way to a result depends on the way. And in products of infinities OpenBLAS
    # computes 0 * inf for what it pads its panels by.
    under, invalid = ("ignore" if depends else case.errors for depends in (case.inexact, case.is_product))
    with (
        np.errstate(all=case.errors, under=under, invalid=invalid, call=lambda *words: reported.append(words)),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            exec(_compiled(case.code), names)
        except Exception as error:
            outcome.facts.append(("error", type(error).__name__, str(error)))
            if not isinstance(error, FloatingPointError):
                return outcome  # operands in place may be half done
    outcome.facts += [(w.category.__name__, str(w.message), w.lineno, w.filename == "<case>") for w in caught]
    outcome.facts += reported
    result = names.get("r")
    for name, value in given.items():
        outcome.facts.append((name, value is result, value is names[name]))
        if isinstance(result, np.ndarray) and isinstance(value, np.ndarray):
            outcome.facts.append(np.may_share_memory(result, value))
        outcome.add(name, value)
    outcome.add("r", result)
    return outcome


@functools.lru_cache(maxsize=8192)
def _compiled(code: str) -> Any:
    return compile(code, "<case>", "exec")


def difference(case: Case, before: Outcome | None, after: Outcome | None) -> str | None:
    """Say how two outcomes of a case differ; None if they do not."""
    if before is None or after is None:
        return None if before is after else "operands can be made in one of the runs alone"
    if before.facts != after.facts:
        pairs = [(b, a) for b, a in zip(before.facts, after.facts, strict=False) if b != a]
        if not pairs:
            more, less = sorted((before.facts, after.facts), key=len, reverse=True)
            return f"facts in one of the runs alone: {more[len(less) :]}"
        return f"before {pairs[0][0]}, after {pairs[0][1]}"
    for one, other in zip(before.numbers, after.numbers, strict=True):
        if one.tobytes() != other.tobytes() and not _same(one, other, case):
            return f"before {one!r}, after {other!r}"
    return None


def differences(seed: int, count: int, accelerated: Callable[[], AbstractContextManager[Any]]) -> Iterator[str]:
    """Run cases without and with the acceleration, and yield each that differs, as a program and what was seen."""
    drawn = list(itertools.islice(cases(seed), count))
    before = [run(each) for each in drawn]
    with accelerated():
        after = [run(each) for each in drawn]
    for each, one, other in zip(drawn, before, after, strict=True):
        if found := difference(each, one, other):
            yield f"{each}\n# {found}"


def _same(one: np.ndarray, other: np.ndarray, case: Case) -> bool:
    """Whether numbers are the same: to the bit but for what kind of NaN they are, or within rounding."""
    if one.dtype.kind not in "fc":
        return False
    if one.dtype.kind == "c":
        return all(_same(each(one), each(other), case) for each in (np.real, np.imag))
    with np.errstate(all="ignore"):
        # Which of the two zeros is the larger one NumPy leaves to the processor.
        same = (one == other) & ((np.signbit(one) == np.signbit(other)) | bool(re.search("max|min|clip", case.code)))
        same |= np.isnan(one) & np.isnan(other)
        if not case.inexact:
            return bool(np.all(same))
        if case.elementwise:
            return bool(np.all(same | (np.abs(one - other) <= 4 * np.spacing(np.abs(one)))))
        finite = one[np.isfinite(one)]
        largest = np.max(np.abs(finite), initial=1.0 if abs(finite).max(initial=0.0) > 1e-300 else 0.0)
        # Each of the two is off by some roundings of what it is made from, of which the largest result gives the size.
        text = " ".join([case.code, *case.operands.values()])
        eps = max(np.finfo(name).eps for name in ("f2", "f4", one.dtype) if not isinstance(name, str) or name in text)
        return bool(np.all(same | (np.abs(one - other) <= 256 * eps * largest)))
