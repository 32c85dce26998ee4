"""Bad arguments: for every argument of every kernel an error that names it, and nothing written.

The functions and their arguments are taken from the signatures: a new kernel or argument fails here until it has its
place in `support.arguments_of` and in the tables below.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import itertools
import math
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemmlet
from gemmlet import kernels, nn
from gemmlet.backends import select
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from support import PATIENCE, UPDATED, arguments_of, copies, outcome, run_on

ROWS, COLUMNS = 5, 3

# What each argument is; numbers with the values above their range, where it has an upper end.
ARRAYS = {"a", "b", "x", "w", "grad_y", "y", "z", "logits", "p", "targets", "param", "grad", "velocity", "m", "v"}
NUMBERS: dict[str, list[float]] = {
    "lr": [],
    "momentum": [1.5],
    "weight_decay": [],
    "beta1": [1, 1.5],
    "beta2": [1, 1.5],
    "eps": [],
    "label_smoothing": [1.5],
    "negative_slope": [0],
    "alpha": [0],
    "delta": [0],
    "activation_parameter": [0],
}
FLAGS = {"nesterov", "return_preactivation", "need_x", "need_w", "need_b"}
SIGNATURES = {name: inspect.signature(getattr(kernels, name)).parameters for name in kernels.__all__}
CASES = [(name, argument) for name, parameters in SIGNATURES.items() for argument in parameters]

# A value, the error that it must raise, and patterns that the message has besides the argument's name.
Bad = tuple[Any, type[Exception] | tuple[type[Exception], ...], tuple[str, ...]]
EITHER = (TypeError, ValueError)


class OnGPU:
    """What an array on a GPU looks like from outside."""

    __cuda_array_interface__ = {"shape": (5, 3), "typestr": "<f4", "data": (1, False), "version": 3}  # noqa: RUF012


def unaligned(array: Any) -> Any:
    result = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


def read_only(array: Any) -> Any:
    result = array.copy()
    result.flags.writeable = False
    return result


def other(dtype: Any) -> Any:
    return np.dtype(np.float64 if dtype == np.float32 else np.float32)


def flat(value: Any) -> Iterator[Any]:
    """What is in a list or tuple, and in those that are in it; or the value itself."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def bits(arguments: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of all arrays, in lists and tuples too, including the memory around a view."""
    result = {}
    for name, value in arguments.items():
        arrays = [v for v in flat(value) if isinstance(v, np.ndarray) and v.dtype != object]
        if arrays:
            result[name] = b"".join((v if v.base is None else np.asarray(v.base)).tobytes() for v in arrays)
    return result


def named(argument: str) -> str:
    """A pattern for the name of an argument; "a" is an English word besides."""
    return rf"\b{argument}\b" if argument != "a" else r"^a\b|\bfit a of\b|\bstacks of a\b|\boverlaps a\b"


def shown(value: Any) -> str:
    return f"array of {value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)[:40]


def complaint(name: str, arguments: dict[str, Any], argument: str, bad: Bad) -> str | None:
    """What is wrong with how `name` refuses the bad value; None if nothing is."""
    value, expected, parts = bad
    arguments = {**arguments, argument: value}
    before = bits(arguments)
    try:
        getattr(kernels, name)(**arguments)
    except Exception as error:  # a warning as well: none may come
        message = str(error)
        if not isinstance(error, expected):
            faults = [f"{type(error).__name__}, not {expected}"]
        else:
            faults = [f"{part!r} missing" for part in (named(argument), *parts) if not re.search(part, message)]
        faults += [f"{k} was written" for k, v in bits(arguments).items() if v != before[k]]
        return f"{argument} = {shown(value)}: {'; '.join(faults)}, in: {message}" if faults else None
    return f"{argument} = {shown(value)}: accepted"


# Bad values of each kind.


def bad_dtypes(good: Any, argument: str) -> Iterator[Bad]:
    """Arrays of the right shape that are neither float32 nor float64."""
    convert = rf"\b{argument}\.astype\(np\.float(32|64)\)"
    dtypes: list[Any] = [np.int8, np.int64, np.uint64, np.float16, np.complex64, np.complex128, np.bool_, object]
    for dtype in dtypes:
        yield good.astype(dtype), TypeError, (rf"\b{np.dtype(dtype)}\b", "float32 or float64", convert)
    yield good.astype("U8"), TypeError, ("<U8", "float32 or float64")
    yield good.astype("S8"), TypeError, ("S8", "float32 or float64")
    yield np.zeros(good.shape, "M8[s]"), TypeError, (r"datetime64\[s\]", "float32 or float64")
    yield np.zeros(good.shape, "f4,f4"), TypeError, ("f0", "float32 or float64")
    if np.dtype(np.longdouble).itemsize > 8:
        yield good.astype(np.longdouble), TypeError, (str(np.dtype(np.longdouble)), "float32 or float64")
    if hasattr(np.dtypes, "StringDType"):  # NumPy 2
        yield good.astype("U8").astype(np.dtypes.StringDType()), TypeError, ("StringDType", "float32 or float64")
    for dtype in (np.float32, np.float64):
        swapped = np.dtype(dtype).newbyteorder()
        yield good.astype(swapped), TypeError, ("byte order", re.escape(swapped.str), convert)


def no_arrays(good: Any) -> Iterator[Bad]:
    """What is no array on this machine at all."""
    yield np.ma.masked_array(good, mask=good > 0), TypeError, ("masked", "filled")
    yield OnGPU(), TypeError, ("GPU",)
    yield [[1.0, 2.0], [3.0]], TypeError, ("list",)
    yield object(), TypeError, ("object",)
    yield "text", TypeError, ()
    yield {"a": 1.0}, TypeError, ()


def misshapen(name: str, arguments: dict[str, Any], argument: str) -> list[tuple[int, ...]]:
    """Shapes that do not fit the other arguments."""
    if name == "matmul":
        return {"a": [(5, 4), (4,), (), (2, 5, 4)], "b": [(4, 7), (4,), (), (2, 4, 7)]}[argument]
    if name == "linear":
        return {"x": [(5, 4), (4,), ()], "w": [(4, 7), (3,), (), (1, 3, 7)], "b": [(8,), (1, 7), (7, 1), ()]}[argument]
    if name == "linear_backward" and argument in ("x", "w"):
        return {"x": [(6, 3), (5, 4), (3,), (1, 5, 3), ()], "w": [(3, 8), (3,), (1, 3, 7), ()]}[argument]
    if name in ROW_LOSSES:
        return [(6, 3), (3,), (1, 5, 3), ()]
    if len([v for v in arguments.values() if isinstance(v, np.ndarray)]) == 1:
        return [()] if name in ROW_FUNCTIONS else []
    rows, columns = arguments[argument].shape
    return [(rows + 1, columns), (rows, columns + 1), (columns, rows), (columns,), (1, rows, columns), (rows,), ()]


def may_be_missing(name: str, argument: str) -> bool:
    base = name.removesuffix("_backward")
    if name.endswith("_backward") and base in ACTIVATIONS:
        return argument == ("y" if ACTIVATIONS[base].needs_x else "x")
    if name.endswith("_backward") and base in ROW_FUNCTIONS:
        return argument == "x"
    return (name, argument) == ("linear", "b")


def bad_arrays(name: str, arguments: dict[str, Any], argument: str) -> Iterator[Bad]:
    good = arguments[argument]
    yield from bad_dtypes(good, argument)
    yield from no_arrays(good)
    for shape in misshapen(name, arguments, argument):
        # The message may be about another argument, which no longer fits: then it still tells this one's shape.
        told = re.escape(str(shape)) if shape else r"\(\)|scalar"
        if name in ROW_LOSSES and shape == (6, 3):
            told = r"\(6,\)"  # the labels are too few
        yield np.full(shape, 0.5, good.dtype), ValueError, (told,)
    if not may_be_missing(name, argument):
        yield None, EITHER, ("None|missing",)
    if argument in UPDATED:
        yield list(good), TypeError, ("list",)  # whose copy alone would be updated
        yield read_only(good), ValueError, ("read-only",)
        yield np.broadcast_to(good[:1], good.shape), ValueError, ("read-only|broadcast",)
        yield np.lib.stride_tricks.as_strided(good, good.shape, (0, good.itemsize)), ValueError, ("broadcast",)
        yield unaligned(good), ValueError, ("not aligned",)


def bad_outputs(good: Any) -> Iterator[Bad]:
    for dtype in (other(good.dtype), np.int64, np.float16, good.dtype.newbyteorder(), object, np.complex128):
        yield good.astype(dtype), TypeError, (re.escape(str(np.dtype(dtype))), rf"\b{good.dtype}\b")
    rows, columns = good.shape
    for shape in [(rows + 1, columns), (columns, rows), (rows, columns + 1), (columns,), (1, rows, columns), ()]:
        yield np.zeros(shape, good.dtype), ValueError, (re.escape(str(shape)), re.escape(str(good.shape)))
    yield read_only(good), ValueError, ("read-only",)
    yield memoryview(good).toreadonly(), ValueError, ("read-only",)
    yield np.lib.stride_tricks.as_strided(good, good.shape, (0, good.itemsize)), ValueError, ("broadcast",)
    yield np.broadcast_to(good[:1], good.shape), ValueError, ("read-only|broadcast",)
    yield unaligned(good), ValueError, ("not aligned",)
    yield np.ma.masked_array(good), TypeError, ("masked",)
    yield OnGPU(), TypeError, ("GPU",)
    yield good.tolist(), TypeError, ()
    yield list(good), TypeError, ("list",)  # of the right dtype, so that only its memory is out of reach
    yield 0.0, EITHER, ()
    yield "text", TypeError, ()


def bad_numbers(argument: str, dtype: Any) -> Iterator[Bad]:
    for value in ("0.5", True, np.True_, 1j, np.array([0.5]), [0.5]):
        yield value, TypeError, ("real number", type(value).__name__)
    if argument != "activation_parameter":  # whose None is documented
        yield None, TypeError, ("real number", "None")
    for value in (np.nan, np.inf, -np.inf, -0.1, -1, *NUMBERS[argument]):
        yield value, ValueError, (re.escape(repr(value)[:20]), "must be")
    yield 10**400, ValueError, ("an integer of 1329 bits", "must be")
    if argument in ("negative_slope", "alpha", "activation_parameter") and dtype == np.float32:
        yield 1e39, ValueError, ("1e.?39",)  # infinite in float32


def bad_labels(arguments: dict[str, Any]) -> Iterator[Bad]:
    logits, labels = arguments["logits"], arguments["labels"]
    rows, classes = logits.shape
    for at, value in itertools.product((0, rows - 1), (-1, classes, 127, -128)):
        wrong = labels.astype(np.int8)
        wrong[at] = value
        yield wrong, ValueError, (rf"\[0, {classes}\)", str(value))
    yield np.full(rows, 2**64 - 1, np.uint64), ValueError, (str(2**64 - 1),)
    yield np.full(rows, np.iinfo(np.int64).min), ValueError, (str(np.iinfo(np.int64).min),)
    for dtype in (np.float32, np.float64, np.float16, np.bool_, np.complex64, object, "U3", "m8[s]"):
        yield labels.astype(dtype), TypeError, (re.escape(str(np.dtype(dtype))), "integer")
    yield np.eye(classes, dtype=np.int64)[labels], TypeError, ("int64", r"labels\.astype\(np.float(32|64)\)")
    yield np.eye(classes, dtype=other(logits.dtype))[labels], TypeError, (rf"astype\(np.{logits.dtype}\)",)
    for shape in [(rows + 1,), (0,)]:
        yield np.zeros(shape, np.int64), ValueError, (re.escape(str(shape)), rf"\({rows},\)")
    for shape in [(rows, classes + 1), (rows, 1), (rows + 1, classes), (classes, rows), (1, rows, classes)]:
        yield np.zeros(shape, logits.dtype), ValueError, (re.escape(str(shape)), rf"\({rows}, {classes}\)")
    yield 1, EITHER, (r"\(\)|scalar|index|indices",)
    yield None, EITHER, ("None",)
    yield np.ma.masked_array(labels), TypeError, ("masked",)
    yield OnGPU(), TypeError, ("GPU",)


def bad_values(name: str, arguments: dict[str, Any], argument: str, dtype: Any) -> Iterator[Bad]:
    if argument in ARRAYS:
        yield from bad_arrays(name, arguments, argument)
    elif argument == "out":
        yield from bad_outputs(result_of(name, arguments))
    elif argument in NUMBERS:
        yield from bad_numbers(argument, dtype)
    elif argument == "labels":
        yield from bad_labels(arguments)
    elif argument == "activation":
        for value in ("no_such", "", "softmax", "Relu"):
            yield value, ValueError, (repr(value), "choices", r"\brelu\b")
        for value in (3, b"relu", kernels.relu, ACTIVATIONS["relu"], ["relu"], True):
            yield value, TypeError, (type(value).__name__, "name or None")
    elif argument == "step":
        for value in (1.0, 1.5, "1", True, None, np.nan, np.array([1])):
            yield value, TypeError, ("integer", type(value).__name__)
        for value in (0, -1, np.int64(0)):
            yield value, ValueError, ("at least 1", str(value))
    elif argument in FLAGS:
        for value in ("false", [True], np.array([True, False])):
            yield value, TypeError, (type(value).__name__,)
    else:
        pytest.fail(f"{argument} of {name} has no role here")


def result_of(name: str, arguments: dict[str, Any]) -> Any:
    """An array such as the call returns."""
    with gemmlet.use_backend("numpy"):
        return next(result for result in outcome(name, copies(arguments)) if result.ndim)


def good_arguments(name: str, argument: str, rng: Any, dtype: Any) -> dict[str, Any]:
    arguments = arguments_of(name, rng, dtype, ROWS, COLUMNS)
    if (name, argument) == ("linear_backward", "z"):
        arguments |= {"activation": "gelu", "z": arguments["y"].copy()}
    if argument == "activation_parameter":
        arguments["activation"] = "elu"
    return arguments


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_every_argument(name: str, argument: str, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    arguments = good_arguments(name, argument, rng, dtype)
    complaints = [
        complaint(name, arguments, argument, bad) for bad in bad_values(name, copies(arguments), argument, dtype)
    ]
    assert complaints
    assert not any(complaints), "\n".join(filter(None, complaints))


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_the_other_arguments_are_right(name: str, argument: str, dtype: Any, rng: Any) -> None:
    """So that every error above is about the bad value."""
    arguments = good_arguments(name, argument, rng, dtype)
    if argument == "out":
        arguments["out"] = np.empty_like(result_of(name, arguments))
    with gemmlet.use_backend("numpy"):
        assert all(np.isfinite(result).all() for result in outcome(name, arguments))


@pytest.mark.parametrize("name", kernels.__all__)
def test_arguments_that_are_missing_or_unknown(name: str, rng: Any) -> None:
    arguments = arguments_of(name, rng, np.float64, ROWS, COLUMNS)
    with pytest.raises(TypeError, match="unknown"):
        getattr(kernels, name)(**arguments, unknown=1)
    for argument, parameter in SIGNATURES[name].items():
        if parameter.default is parameter.empty:
            rest = {k: v for k, v in arguments.items() if k != argument}
            with pytest.raises(TypeError, match=rf"\b{argument}\b"):
                getattr(kernels, name)(**rest)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, argument in CASES
        if argument in ARRAYS or (name in ROW_LOSSES and argument == "labels")
    ],
)
def test_dtypes_must_agree(name: str, argument: str, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """A float64 array among float32 ones, or the other way round, is not cast."""
    arguments = good_arguments(name, argument, rng, dtype)
    arrays = [k for k, v in arguments.items() if isinstance(v, np.ndarray) and v.dtype == dtype]
    if argument == "labels":
        value = np.eye(COLUMNS, dtype=other(dtype))[arguments["labels"]]
    elif arrays == [argument]:
        # It is alone, but for the result.
        arguments["out"] = result_of(name, arguments)
        value = arguments[argument].astype(other(dtype))
    else:
        value = arguments[argument].astype(other(dtype))
    # The first array decides what the others must be: its odd dtype is told as that of "the other arguments".
    first = argument == arrays[0]
    message = "^" if first else rf"\b{argument}\b.*astype\(np.{dtype}\)"
    before = bits(arguments)
    with pytest.raises(TypeError, match=message) as caught:
        getattr(kernels, name)(**{**arguments, argument: value})
    assert {"float32", "float64"} <= set(re.findall(r"float\d+", str(caught.value)))
    assert bits(arguments) == before


# Overlap.


def two_views(dtype: Any, shift: int) -> tuple[Any, Any]:
    """Two 4 × 4 matrices in one buffer, `shift` elements apart."""
    buffer = np.linspace(0, 1, 64).astype(dtype)
    return buffer[16:32].reshape(4, 4), buffer[16 + shift : 32 + shift].reshape(4, 4)


@pytest.mark.parametrize("shift", [-15, -4, -1, 0, 1, 4, 15])
@pytest.mark.parametrize(("name", "argument"), [("matmul", "a"), ("matmul", "b"), ("linear", "x"), ("linear", "w")])
def test_a_matmul_cannot_write_where_it_reads(
    name: str, argument: str, shift: int, any_threads_backend: Any, dtype: Any
) -> None:
    read, out = two_views(dtype, shift)
    names = ("a", "b") if name == "matmul" else ("x", "w")
    arguments = {k: np.ones((4, 4), dtype) for k in names}
    for view in (read, read.T, read[::-1]):
        bad = (out, ValueError, ("overlap", named(argument)))
        problem = complaint(name, {**arguments, argument: view}, "out", bad)
        assert problem is None, problem


def test_a_matmul_cannot_write_to_its_bias(any_threads_backend: Any, dtype: Any) -> None:
    buffer = np.zeros(32, dtype)
    arguments = {"x": np.ones((4, 4), dtype), "w": np.ones((4, 4), dtype)}
    for b in (buffer[:4], buffer[12:16], buffer[15:19], buffer[:8:2], buffer[3::-1]):
        problem = complaint(
            "linear", {**arguments, "b": b}, "out", (buffer[:16].reshape(4, 4), ValueError, ("overlap", r"\bb\b"))
        )
        assert problem is None, problem


def test_interleaved_memory_is_no_overlap(any_threads_backend: Any, dtype: Any) -> None:
    """Even and odd columns share no element, though their bounds overlap."""
    buffer = np.arange(32).reshape(4, 8).astype(dtype)
    before, w = buffer[:, ::2].copy(), np.full((4, 4), 2, dtype)
    kernels.matmul(buffer[:, ::2], w, out=buffer[:, 1::2])
    assert np.array_equal(buffer[:, ::2], before)
    assert np.array_equal(buffer[:, 1::2], before @ w)


@pytest.mark.parametrize("shift", [-15, -1, 0, 3, 15])
@pytest.mark.parametrize("name", [name for name in kernels.__all__ if name.endswith("_update")])
def test_updates_need_memory_of_their_own(
    name: str, shift: int, any_threads_backend: Any, dtype: Any, rng: Any
) -> None:
    arguments = arguments_of(name, rng, dtype, 4, 4)
    arrays = [k for k, v in arguments.items() if isinstance(v, np.ndarray)]
    for first, second in itertools.permutations(arrays, 2):
        a, b = two_views(dtype, shift)
        problem = complaint(
            name, {**arguments, first: a}, second, (b, ValueError, ("overlaps", rf"\b{first}\b", rf"\b{second}\b"))
        )
        assert problem is None, problem


def test_labels_cannot_lie_in_the_gradient(any_threads_backend: Any) -> None:
    """Class indices that a gradient overwrites would be read as numbers out of range: in a child, as it may crash."""
    script = """
import numpy as np
from gemmlet import kernels
logits, gradient = np.random.default_rng(0).normal(size=(64, 8)), np.zeros((64, 8))
labels = gradient.reshape(-1).view(np.int64)[:64]
expected, _ = kernels.softmax_cross_entropy(logits, labels.copy())
try:
    loss, _ = kernels.softmax_cross_entropy(logits, labels, out=gradient)
    assert loss == expected, (loss, expected)
except ValueError as error:
    assert "out" in str(error) and "labels" in str(error), error
"""
    run_on(any_threads_backend, script)


# What the signatures do not tell.


def test_momentum_needs_velocity(any_threads_backend: Any, dtype: Any) -> None:
    param, grad = np.ones(3, dtype), np.ones(3, dtype)
    for numbers in ({"momentum": 0.9}, {"nesterov": True}, {"momentum": 0.9, "nesterov": True}):
        with pytest.raises(ValueError, match=r"\bvelocity\b.*momentum"):
            kernels.sgd_update(param, grad, lr=0.1, **numbers)
    assert np.array_equal(param, np.ones(3))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_linear_backward_says_what_it_needs(name: str, any_threads_backend: Any, dtype: Any) -> None:
    grad, x, w = np.ones((4, 2), dtype), np.ones((4, 3), dtype), np.ones((3, 2), dtype)
    if ACTIVATIONS[name].needs_x:
        with pytest.raises(ValueError, match=rf"\bz is missing.*{name}.*return_preactivation=True"):
            kernels.linear_backward(grad, x, w, grad, name)
    else:
        with pytest.raises(ValueError, match=rf"\by is missing.*{name}"):
            kernels.linear_backward(grad, x, w, None, name, z=grad)


def test_linear_backward_needs_what_it_multiplies(any_threads_backend: Any, dtype: Any) -> None:
    grad, x, w = np.ones((4, 2), dtype), np.ones((4, 3), dtype), np.ones((3, 2), dtype)
    with pytest.raises((TypeError, ValueError), match=r"\bw\b.*need_x"):
        kernels.linear_backward(grad, x, None)
    with pytest.raises((TypeError, ValueError), match=r"\bx\b.*need_w"):
        kernels.linear_backward(grad, None, w)


@pytest.mark.parametrize("argument", ["y", "z"])
def test_linear_backward_checks_what_it_does_not_read(argument: str, any_threads_backend: Any, dtype: Any) -> None:
    """As the gradients of activations do: a mistake shows before the activation is changed."""
    arguments = {"grad_y": np.ones((4, 2), dtype), "x": np.ones((4, 3), dtype), "w": np.ones((3, 2), dtype)}
    with pytest.raises(ValueError, match=rf"\b{argument}\b has shape"):
        kernels.linear_backward(**arguments, **{argument: np.ones((5, 2), dtype)})
    with pytest.raises(TypeError, match=rf"\b{argument}\b has dtype"):
        kernels.linear_backward(**arguments, **{argument: np.ones((4, 2), int)})


def test_activation_parameter_needs_an_activation_that_takes_one(any_threads_backend: Any, dtype: Any) -> None:
    x, w = np.ones((4, 3), dtype), np.ones((3, 2), dtype)
    for activation in (None, *(name for name, entry in ACTIVATIONS.items() if entry.parameter is None)):
        with pytest.raises(ValueError, match=rf"\bactivation_parameter\b.*{activation}"):
            kernels.linear(x, w, activation=activation, activation_parameter=0.1)
        with pytest.raises(ValueError, match=rf"\bactivation_parameter\b.*{activation}"):
            kernels.linear_backward(x[:, :2], x, w, x[:, :2], activation, z=x[:, :2], activation_parameter=0.1)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.unit_interval])
@pytest.mark.parametrize("value", [-0.25, -1e-30, 1.0001, 2.0, np.inf, -np.inf])
def test_probabilities_lie_within_0_and_1(name: str, value: float, any_threads_backend: Any, dtype: Any) -> None:
    for size, at in ((1, 0), (9, 8), (300, 299), (300, 0)):
        p, targets = np.full(size, 0.5, dtype), np.ones(size, dtype)
        p[at] = value
        for out in (np.full(size, 7, dtype), p):
            bad = (p, ValueError, (r"\[0, 1\]", re.escape(str(float(dtype.type(value))))))
            problem = complaint(name, {"targets": targets, "out": out}, LOSSES[name].prediction, bad)
            assert problem is None, problem
        p[:at] = np.nan  # among which it is still found
        with pytest.raises(ValueError, match=rf"\b{LOSSES[name].prediction}\b"):
            getattr(kernels, name)(p, targets)


def test_stacks_that_do_not_broadcast(any_threads_backend: Any, dtype: Any) -> None:
    a, b = np.ones((2, 4, 3), dtype), np.ones((5, 3, 2), dtype)
    with pytest.raises(ValueError, match=r"\ba\b.*\(2, 4, 3\).*\bb\b.*\(5, 3, 2\)"):
        kernels.matmul(a, b)


@pytest.mark.parametrize("name", ["adam_update", "adamw_update"])
def test_a_step_that_no_float_holds(name: str, any_threads_backend: Any, dtype: Any) -> None:
    """It is refused, or the corrections have come to their limit, 1."""
    param, expected = np.ones(3, dtype), np.ones(3, dtype)
    getattr(kernels, name)(expected, *np.ones((3, 3), dtype), step=10**9)
    with contextlib.suppress(ValueError):
        getattr(kernels, name)(param, *np.ones((3, 3), dtype), step=10**400)
        assert np.array_equal(param, expected)


def test_names_of_backends() -> None:
    for bad in ("gpu", "", "CPU"):
        with pytest.raises(ValueError, match=f"{bad!r}.*choices are cpu, cuda, numba, numpy"):
            gemmlet.use_backend(bad)
    for other in (3, b"cpu", None, object(), ["cpu"], type(select.current())):
        with pytest.raises(TypeError, match=f"backend must be a name or a backend, got {type(other).__name__}"):
            gemmlet.use_backend(other)


# The bindings: they protect memory, whoever calls them.


def _modules() -> list[Any]:
    try:
        from gemmlet.backends.cpu import _MODULES, available_isas
    except ImportError:
        return []
    return [importlib.import_module(f"gemmlet.{_MODULES[isa]}") for isa in available_isas()]


MODULES = _modules()
GUARD = 64  # elements


class Guarded:
    """Arrays with elements around them that nobody may write."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Any, Any, Any]] = []

    def array(self, shape: tuple[int, ...], dtype: Any, fill: float = 0.5) -> Any:
        size = int(np.prod(shape))
        buffer = np.full(size + 2 * GUARD, 77, dtype)
        inside = buffer[GUARD : GUARD + size]
        inside[:] = np.asarray(fill).astype(dtype)  # of bytes, -1 is 255
        self.buffers.append((buffer, size, buffer.dtype))
        return inside.reshape(shape)

    def intact(self) -> bool:
        return all(np.all(b[:GUARD] == 77) and np.all(b[GUARD + n :] == 77) for b, n, _ in self.buffers)


def function_of(call: str) -> str:
    return call.split(":")[0]


def binding_calls(module: Any, dtype: Any, guarded: Guarded) -> dict[str, dict[str, Any]]:
    """For each function of the module the arguments of a call that is right."""

    def array(*shape: int) -> Any:
        return guarded.array(shape, dtype)

    labels = guarded.array((6,), np.int64, 1)
    rules = {"sgd": (0, 2), "momentum": (1, 4), "adam": (2, 9)}
    assert set(rules) == set(module.optimizer_rules())
    rule = module.optimizer_rules().index("adam")
    calls: dict[str, dict[str, Any]] = {
        "linear": {"x": array(6, 5), "w": array(5, 4), "b": array(4), "activation": 0, "parameter": 0.5},
        "column_sum": {"x": array(6, 5), "out": array(5)},
        "activation_forward": {"activation": 0, "x": array(6, 5), "parameter": 0.5, "out": array(6, 5)},
        "activation_backward": {"activation": 0, "grad_y": array(30), "saved": array(30), "parameter": 0.5},
        "row_function_forward": {"function": 0, "x": array(6, 5), "out": array(6, 5)},
        "row_function_backward": {"function": 0, "grad_y": array(6, 5), "y": array(6, 5), "out": array(6, 5)},
        "row_loss": {"loss": 0, "logits": array(6, 5), "labels": labels, "smoothing": 0.1, "out": array(6, 5)},
        "elementwise_loss": {"loss": 0, "prediction": array(30), "target": array(30), "parameter": 0.5},
        "encode": {"x": array(30), "codes": guarded.array((30,), np.uint8), "value_of_byte": array(256)},
        "optimizer_update": {"rule": rule, "param": array(30), "grad": array(30), "state": [array(30), array(30)]},
    }
    calls["linear"] |= {"y": array(6, 4), "z": array(6, 4)}
    calls["activation_backward"]["out"] = array(30)
    calls["elementwise_loss"]["out"] = array(30)
    calls["optimizer_update"]["hyperparameters"] = [0.1] * rules["adam"][1]

    def layer(inputs: int, outputs: int, activation: int, averages: bool = False) -> tuple[Any, ...]:
        shapes = [(inputs, outputs), (outputs,)]
        states = [[array(*shape), array(*shape)] for shape in shapes]
        average = [array(*shape) if averages else None for shape in shapes]
        return (*(array(*shape) for shape in shapes), activation, 0.5, *states, *average)

    # Seven samples of five features, in mini-batches of three.
    order = guarded.array((7,), np.int64)
    order[:] = [6, 0, 5, 1, 4, 2, 3]
    indptr = guarded.array((8,), np.int64)
    indptr[:] = [0, 2, 2, 5, 6, 6, 6, 8]
    indices = guarded.array((8,), np.int32)
    indices[:] = [0, 4, 1, 2, 3, 0, 3, 4]

    def hyperparameters(count: int) -> list[Any]:
        return [guarded.array((3, rules["adam"][1]), np.float64) for _ in range(count)]

    def mlp(targets: Any, loss: int) -> dict[str, Any]:
        phases = [("forward", 0, [-1]), ("loss", 0, loss, 0.5, 1.0, targets, -1.0, 2.0)]
        phases += [("backward", 0, -1), ("penalty", 0, 0.5, 0.25, True), ("update", 0, rule, 2.0, False)]
        return {
            "networks": [[layer(5, 9, 0), layer(9, 4, -1)]],
            "phases": phases,
            "dropout": [(0, 0, 50000, 256, 2**64 - 1), (0, 1, 30000, 257, 0)],
            "input_noise": [(0, 0.5, 255, 2**64 - 1)],
            "x": array(7, 5),
            "indptr": None,
            "indices": None,
            "skip_zeros": True,
            "value_of_byte": None,
            "weights": None,
            "divides_by_rows": False,
            "labels": None,
            "classes": 0,
            "scale": 1.0,
            "shift": 0.0,
            "order": order,
            "batch": 3,
            "hyperparameters": hyperparameters(1),
            "losses": [0.0, 0.0],
            "decay": None,
            "noise": None,
            "first_step": 2**64 - 2,
            "kept": module.kept_memory(),
        }

    calls["train: CSR"] = mlp(guarded.array((7,), np.int64, 1), -1)
    calls["train: CSR"] |= {"x": array(8), "indptr": indptr, "indices": indices, "input_noise": []}
    calls["train: dense"] = mlp(array(7, 4), 0)
    codes = guarded.array((7, 5), np.uint8, 3)
    weights = guarded.array((7,), np.float64)
    calls["train: bytes"] = mlp(array(7, 4), 0) | {"x": codes, "value_of_byte": array(256), "weights": weights}
    # A GAN: the discriminator is trained on samples and generated rows, the generator through the discriminator.
    calls["train: GAN"] = calls["train: dense"] | {
        "networks": [[layer(2, 9, 0, True), layer(9, 5, -1, True)], [layer(5, 4, 0), layer(4, 1, -1)]],
        "phases": [
            ("forward", 0, [-2]),
            ("forward", 1, [-1, 0]),
            ("loss", 1, 0, 0.5, 1.0, [0.9, 0.0], -1.0, 2.0),
            ("backward", 1, -1),
            ("gradient_penalty", 1, 0.5, 2),
            ("update", 1, rule, math.inf, True),
            ("forward", 1, [0], 2**14),
            ("loss", 1, 0, 0.5, -1.0, [1.0], -1.0, 2.0),
            ("backward", 1, 0),
            ("backward", 0, -1),
            ("update", 0, rule, 0.1, False),
        ],
        "x": array(7, 5),
        "scale": 2.0,
        "shift": -1.0,
        "hyperparameters": hyperparameters(2),
        "losses": [0.0, 0.0],
        "decay": guarded.array((3,), np.float64),
        "noise": array(7, 2),
    }
    labels = guarded.array((7,), np.int64, 2)
    networks = [[layer(2 + 3, 9, 0, True), layer(9, 5, -1, True)], [layer(5 + 3, 4, 0), layer(4, 1, -1)]]
    calls["train: labels"] = calls["train: GAN"] | {"networks": networks, "labels": labels, "classes": 3}
    # A gradient penalty and dropout of one network exclude each other.
    calls["train: dropout"] = calls["train: GAN"] | {"dropout": [(1, 0, 50000, 256, 3), (1, 1, 30000, 257, 4)]}
    calls["train: dropout"]["phases"] = [p for p in calls["train: GAN"]["phases"] if p[0] != "gradient_penalty"]
    others = {"activations", "row_functions", "losses", "row_losses", "optimizer_rules"}
    others |= {"get_num_threads", "set_num_threads", "fma_loop", "mark"}  # in test_bench.py
    others |= {"forward", "augment", "random_words"}  # below
    others |= {"kept_memory", "formula", "fast_path"}  # see test_fast_path.py
    others |= {
        name for name in dir(module) if name.startswith(("numpy_", "torch_", "use_torch"))
    }  # test_integrations_*
    functions = {name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")}
    assert functions == {function_of(name) for name in calls} | others
    return calls


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_binding_of_augment_refuses(module: Any) -> None:
    guarded = Guarded()
    images, out = guarded.array((3, 4, 5), np.uint8, 7), guarded.array((3, 4, 5), np.uint8, 9)
    samples, settings = guarded.array((3,), np.int64, 1), [12.0, 0.1, 0.1, 1.0, 1.2, 3.0, 0.5]
    good = {"images": images, "settings": settings, "seed": 1, "epoch": 2, "samples": samples, "rows": None, "out": out}
    bad: dict[str, list[Any]] = {
        "images": [images[0], images[:, :0], images[..., ::2], images.astype(np.int8), images.tolist(), None],
        "settings": [settings[:-1], [*settings, 0.0], "text", None, ["a"] * 7],
        "seed": [-1, 2**64, 0.5, None],
        "epoch": [2**63, 0.5, None],
        "samples": [samples[:2], samples.astype(np.int32), samples[::-1], None],
        "rows": [samples[:2], samples.astype(np.int32), samples[::-1], samples + 2, samples - 2, 3],
        "out": [out[:2], out[..., ::2], out.astype(np.int8), read_only(out), None],
    }
    for argument, values in bad.items():
        for value in values:
            with pytest.raises((TypeError, ValueError)):
                module.augment(**good | {argument: value})
    largest = [180.0, 0.5, 1.0, 1024.0, 32.0, 255.0, 1.0]
    for i in range(7):
        for value in (math.nan, math.inf, -5e-324, np.nextafter(largest[i], math.inf)):
            with pytest.raises(ValueError, match="settings"):
                module.augment(**good | {"settings": [*settings[:i], value, *settings[i + 1 :]]})
    assert (out == 9).all()
    module.augment(**good | {"settings": largest})
    words = guarded.array((8,), np.uint32)
    for wrong in (words.astype(np.int64), words[::2], read_only(words), None):
        with pytest.raises((TypeError, ValueError)):
            module.random_words(1, 0, 0, 0, 0, wrong)
    module.random_words(1, 0, 0, 0, 0, words[:6])
    assert guarded.intact()


STRIDED_IS_FINE = {("linear", "x"), ("linear", "w"), ("column_sum", "x")}
WRITTEN = {"codes", "value_of_byte", "out", "y", "z", "param"}
# Indices and how they name their list.
LISTS = {"activation": "activations", "function": "row_functions", "loss": "losses", "rule": "optimizer_rules"}


def bad_layers(good: list[tuple[Any, ...]]) -> Iterator[Any]:
    """Of each layer each part, and lists of layers that do not fit."""
    yield from ([], None, "text", [()], [None], good[::-1])
    yield [*good, good[0]]
    for at, layer in enumerate(good):

        def altered(part: int, value: Any, at: int = at, layer: Any = layer) -> list[Any]:
            return [*good[:at], (*layer[:part], value, *layer[part + 1 :]), *good[at + 1 :]]

        yield [*good[:at], layer[:-1], *good[at + 1 :]]
        yield [*good[:at], (*layer, None), *good[at + 1 :]]
        for part in (0, 1, 6, 7):
            array = layer[part]
            if array is None:
                continue
            strange = [array[..., :-1].copy(), array[:0], np.concatenate([array, array]), unaligned(array)]
            strange += [array.astype(d) for d in (other(array.dtype), np.int32, np.float16, object)]
            strange += [read_only(array), np.broadcast_to(array[:1], array.shape), "text", 1.0]
            if array.size > 1:
                strange.append(np.repeat(array, 2, axis=-1)[..., ::2])
            if part < 2:  # it is no average, which may be missing
                strange += [None, array[None], array.reshape(-1)[0]]
            yield from (altered(part, value) for value in strange)
        for part in (4, 5):
            states = layer[part]
            yield from (altered(part, value) for value in ([], states[:1], [*states, states[0]], None, [None, None]))
            yield altered(part, [states[0], read_only(states[1])])
            yield altered(part, [states[0], np.concatenate([states[1], states[1]])])
            yield altered(part, [states[0].astype(other(states[0].dtype)), states[1]])
        yield from (altered(2, value) for value in (-2, 10**4, 2**31 - 1, 2**40, "relu", None, 0.5))
        yield from (altered(3, value) for value in ("0.5", None, 1j))


def bad_networks(good: list[Any]) -> Iterator[Any]:
    """Of each network each part, networks too few or too many, and parameters that lie in each other's memory."""
    yield from ([], None, "text", [None], good[:-1], [[], *good[1:]])
    for at, network in enumerate(good):
        yield from ([*good[:at], layers, *good[at + 1 :]] for layers in bad_layers(network))
        first, *rest = network
        weight, bias, *_ = first
        for part, value in ((4, [weight, first[4][1]]), (5, [bias, bias]), (6, weight), (7, first[5][0]), (7, bias)):
            yield [*good[:at], [(*first[:part], value, *first[part + 1 :]), *rest], *good[at + 1 :]]
        yield [*good[:at], [(weight, weight.reshape(-1)[-len(bias) :], *first[2:]), *rest], *good[at + 1 :]]
    if len(good) > 1:
        (weight, _, *others), *rest = good[1]
        yield [good[0], [(weight, good[0][-1][1][: weight.shape[1]], *others), *rest]]


def bad_phases(good: list[tuple[Any, ...]], module: Any) -> Iterator[Any]:
    """Of each phase each field, phases that do not follow each other, and those that find something else to read."""
    yield from ([], None, "text", [()], [None], good[::-1], good[:-1], good[1:], [*good, good[0]], [("text", 0), *good])
    networks, rules, losses = len({phase[1] for phase in good}), len(module.optimizer_rules()), len(module.losses())
    for at, phase in enumerate(good):

        def altered(field: int, value: Any, at: int = at, phase: Any = phase) -> list[Any]:
            return [*good[:at], (*phase[:field], value, *phase[field + 1 :]), *good[at + 1 :]]

        kind = phase[0]
        # A second forward phase changes nothing, and a gradient penalty may be missing.
        if kind not in ("forward", "gradient_penalty") or networks == 1:
            yield [*good[:at], *good[at + 1 :]]
        if kind in ("backward", "gradient_penalty", "update"):  # the gradient is gone, or penalized
            yield [*good[: at + 1], phase, *good[at + 1 :]]
        if len(phase) != 4 or kind != "forward":  # whose stream may be left out
            yield [*good[:at], phase[:-1], *good[at + 1 :]]
        yield [*good[:at], (*phase, None), *good[at + 1 :]]
        yield from (altered(0, value) for value in ("", "Forward", "\ud800", None, 0, b"loss"))
        yield from (altered(1, value) for value in (-1, networks, 2**31 - 1, 2**40, -(2**31), None, "0", 0.5))
        if kind == "forward":
            own = phase[1]
            strange = [
                [],
                [own],
                [-3],
                [networks],
                [2**31 - 1],
                [2**40],
                [-1] * 17,
                [-1, None],
                None,
                "text",
                -1,
                [0.5],
            ]
            yield from (altered(2, value) for value in strange)
            if len(phase) == 4:
                yield from (altered(3, value) for value in (-1, 2**15, 2**63, 2**64, None, "0", 0.5))
        elif kind == "update":
            wrong = [rule for rule in range(rules) if rule != phase[2]]  # with another number of states
            yield from (altered(2, value) for value in (*wrong, -1, rules, 2**31 - 1, 2**40, "adam", None, 0.5))
            yield from (altered(3, value) for value in ("0.5", None, [0.5], 1j))
            yield from (altered(4, value) for value in ("yes", [True]))
        elif kind == "backward":
            others = [number for number in (-1, *range(networks)) if number != phase[2] and number != phase[1]]
            if phase[2] >= 0:
                yield from (altered(2, value) for value in others)
            yield from (altered(2, value) for value in (phase[1], networks, 2**31 - 1, 2**40, None, "0", 0.5))
        elif kind == "gradient_penalty":
            yield from (altered(2, value) for value in (-1.0, np.nan, "0.5", None, [0.5], 1j))
            yield from (altered(3, value) for value in (0, -1, 2**40, 2**63 - 1, "2", None, 0.5))
        elif kind == "penalty":
            for field in (2, 3):
                yield from (altered(field, value) for value in ("0.5", None, [0.5], 1j))
            yield from (altered(4, value) for value in ("yes", [True]))
        else:
            yield from (altered(2, value) for value in (-2, losses, 2**31 - 1, -(2**31), 2**40, "huber", None, 0.5))
            for field in (3, 4, 6, 7):
                yield from (altered(field, value) for value in ("0.5", None, [0.5], 1j))
            yield from (altered(5, value) for value in bad_targets(phase[5]))


def bad_targets(good: Any) -> Iterator[Any]:
    yield from (None, "text", 1.0, object(), [None])
    if isinstance(good, list):
        yield from ([], [*good, 0.5], good[:-1], ["0.5"] * len(good), np.array([]), np.full(len(good), 0.5, np.float16))
        return
    yield from (good[:-1].copy(), np.concatenate([good, good]), good.tolist(), unaligned(good), good[:0])
    yield from (np.repeat(good, 2, axis=-1)[..., ::2], good[::-1], [0.5, 0.5], [])
    yield from (good.astype(d) for d in (np.uint64, np.float16, np.int16, object, good.dtype.newbyteorder()))
    if good.dtype == np.int64:
        for at, value in itertools.product((0, 6), (-1, 4, 2**31 - 1, -(2**31), 2**62)):
            wrong = good.copy()
            wrong[at] = value
            yield wrong


def is_usual_bytes(array: Any, good: Any) -> bool:
    """Bytes in another order, or not aligned, are usual ones."""
    is_bytes = isinstance(array, np.ndarray) and isinstance(good, np.ndarray) and array.dtype == good.dtype == np.uint8
    return bool(is_bytes and array.shape == good.shape and array.flags.carray and not np.may_share_memory(array, good))


def bad_for_training(argument: str, good: Any, arguments: dict[str, Any], module: Any) -> Iterator[Any]:
    """Bad values of the arguments of `train`."""
    if argument == "networks":
        yield from bad_networks(good)
    elif argument == "phases":
        yield from bad_phases(good, module)
    elif argument == "batch":
        # With other numbers of mini-batches the hyperparameters are too many or too few.
        yield from (0, -1, -(2**63), 2**63, 2, 7, 2**62, 2**63 - 1, None, "3", 3.5, np.nan)
    elif argument in ("skip_zeros", "divides_by_rows"):
        yield from ("yes", [True])
    elif argument == "classes":
        yield from (good - 1, good + 1, -(2**63), 2**62, 2**64, None, "3", 0.5)
    elif argument == "dropout":
        yield from (None, 0.5, "text", [None])
        if not good:
            return
        yield from ([good[0][:-1]], [(*good[0], 0)], good[0])
        for field, wrong in enumerate(((2, 2**40), (2, 2**40), (0, 65537, 2**33), (2**15, 2**33), (2**64,))):
            for value in (*wrong, -1, None, "0", 0.5):
                yield [good[1], (*good[0][:field], value, *good[0][field + 1 :])]
    elif argument == "input_noise":
        yield from (None, 0.5, "text", [None])
        if not good:
            yield [(0, 0.5, 255, 1)]  # a sparse matrix has none
            return
        yield from ([good[0][:-1]], [(*good[0], 0)], good[0])
        for field, wrong in enumerate(((2, 2**40), (math.nan,), (2**15, 2**33), (2**64,))):
            for value in (*wrong, -1, None, "0", *([0.5] if field != 1 else [])):
                yield [(*good[0][:field], value, *good[0][field + 1 :])]
    elif argument == "first_step":
        yield from (-1, 2**64, None, "0", 0.5, [0])
    elif argument == "kept":
        yield from (None, 0, b"text", object(), np.ones(2).__dlpack__())
    elif argument == "losses":
        yield from (None, 0.0, [], good[:-1], [*good, 0.0], ["0"] * len(good))
    elif argument == "hyperparameters":
        yield from (None, [], [*good, good[0]], [None] * len(good), "text", 0.5)
        for at, table in enumerate(good):
            strange = [
                table[:-1].copy(),
                np.concatenate([table, table]),
                unaligned(table),
                table[::-1],
                table[:0],
                None,
            ]
            strange += [table.astype(d) for d in (np.float32, np.int64, object, table.dtype.newbyteorder())]
            yield from ([*good[:at], value, *good[at + 1 :]] for value in strange)
    elif isinstance(good, float):
        yield from ("0.5", None, [0.5], 1j)
        if arguments["indptr"] is not None:  # which is not scaled
            yield 0.5
    elif good is None:
        yield from ("text", 1.0, object(), np.zeros(0), np.zeros((3, 2), np.int16), np.zeros((2, 2), np.int64))
        yield np.zeros(2, np.int64 if argument == "indptr" else np.int32)
    else:
        yield from (good[:-1].copy(), np.concatenate([good, good], axis=-1), good.tolist(), "text", 1.0, object())
        yield from (unaligned(good), np.repeat(good, 2, axis=-1)[..., ::2], good[::-1])
        if argument != "order":  # of no samples nothing is to be done
            yield good[:0]
        yield from (good.astype(d) for d in (np.uint64, np.float16, np.int16, object, good.dtype.newbyteorder()))
        # Averages follow at once then, bytes are value/255, and each sample counts 1.
        if argument not in ("decay", "value_of_byte", "weights"):
            yield None
        ends = {"order": 7, "indices": 5, "indptr": 9, "labels": 3}
        if argument in ends:
            for at, value in itertools.product((0, len(good) - 1), (-1, ends[argument], 2**31 - 1, -(2**31))):
                wrong = good.copy()
                wrong[at] = value
                yield wrong
        if argument == "indices":
            yield good[[0, 1, 3, 2, 4, 5, 6, 7]]  # not ascending
            yield good[[0, 1, 2, 2, 4, 5, 6, 7]]  # twice the same
        if argument == "indptr":
            yield good[[0, 1, 3, 2, 4, 5, 6, 7]]
        # In the memory of a parameter, which training changes.
        for network in arguments["networks"]:
            weight = network[0][0].reshape(-1)
            if weight.nbytes >= good.nbytes:
                alias = np.ndarray(good.shape, good.dtype, weight.data)
                if good.dtype.kind == "f":
                    yield alias
                else:
                    weight[:] = 0  # whose bits are indices within their range, and offsets of empty rows
                    yield alias


def bad_for_bindings(name: str, argument: str, good: Any, module: Any) -> Iterator[Any]:
    if argument in LISTS:
        count = len(getattr(module, LISTS[argument])())
        yield from (-2, count, 2**31 - 1, -(2**31), 2**40, "relu", None, 0.5)
        if (name, argument) != ("linear", "activation"):  # where it is none
            yield -1
    elif argument in ("parameter", "smoothing"):
        yield from ("0.5", None, [0.5], 1j)
    elif argument == "hyperparameters":
        yield from ([], good[:-1], [*good, 0.1], None, ["a"] * len(good), 0.1)
    elif argument == "state":
        yield from ([], good[:1], [*good, good[0]], None, [None, None], [good[0], good[1][:-1]], good[0])
        yield [good[0], read_only(good[1])]
        yield [good[0], good[1].astype(other(good[1].dtype))]
    else:
        yield from (good.tolist(), "text", 1.0, object(), np.zeros((0,) * good.ndim, good.dtype))
        if (name, argument) not in {("linear", "b"), ("linear", "z")}:
            yield None
        yield np.concatenate([good, good], axis=-1)
        yield good[..., :-1].copy()
        yield unaligned(good)
        for dtype in (other(good.dtype), np.int32, np.uint64, np.float16, good.dtype.newbyteorder(), object, bool):
            yield good.astype(dtype)
        if (name, argument) not in STRIDED_IS_FINE:
            yield np.repeat(good, 2, axis=-1)[..., ::2]
            yield good[::-1]
        if argument in WRITTEN and (name, argument) != ("row_function_backward", "y"):
            yield read_only(good)
            yield np.broadcast_to(good[:1], good.shape)
        if argument == "labels":
            for at, value in itertools.product((0, 5), (-1, 5, 2**62, -(2**63))):
                wrong = good.copy()
                wrong[at] = value
                yield wrong


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_bindings_refuse(module: Any, dtype: Any) -> None:
    guarded = Guarded()
    calls = binding_calls(module, dtype, guarded)
    for name, arguments in calls.items():
        function = getattr(module, function_of(name))
        function(**arguments)
        for argument, good in arguments.items():
            is_training = function_of(name) == "train"
            for bad in (
                bad_for_training(argument, good, arguments, module)
                if is_training
                else bad_for_bindings(name, argument, good, module)
            ):
                if is_usual_bytes(bad, good):
                    continue
                before = bits(arguments)
                with pytest.raises((TypeError, ValueError)) as caught:
                    function(**{**arguments, argument: bad})
                # The one that fails to fit may be another; pybind11's own message lists all with their types.
                names = "|".join(arguments)
                message = str(caught.value)
                assert re.search(
                    rf"^({names}|labels|loss|targets|rule): |incompatible function arguments|writ", message
                )
                assert bits(arguments) == before
        with pytest.raises(TypeError):
            function()
    assert guarded.intact()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@given(data=st.data())
def test_bindings_never_write_elsewhere(module: Any, data: Any) -> None:
    """Any mixture of right and wrong arguments is refused, or writes into its own outputs alone."""
    dtype = np.dtype(data.draw(st.sampled_from(["float32", "float64"])))
    guarded = Guarded()
    calls = binding_calls(module, dtype, guarded)
    name = data.draw(st.sampled_from(sorted(calls)))
    arguments = dict(calls[name])
    replaced = data.draw(st.sets(st.sampled_from(sorted({*arguments} - {"kept"})), min_size=1))
    for argument in sorted(replaced):
        good = arguments[argument]
        if isinstance(good, np.ndarray):
            shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
            kind = data.draw(st.sampled_from([good.dtype, good.dtype, good.dtype, "float32", "float64", "int64"]))
            array = guarded.array(shape, kind, data.draw(st.integers(-2, 6)))
            if array.ndim and data.draw(st.booleans()):
                array = array[:: data.draw(st.sampled_from([-1, 2, -3]))]
            if array.ndim == 2 and data.draw(st.booleans()):
                array = array.T
            arguments[argument] = array
        elif argument == "networks":
            arguments[argument] = data.draw(st.sampled_from(list(bad_networks(good))))
        elif argument == "phases":
            arguments[argument] = data.draw(st.lists(some_phase(len(calls[name]["networks"]), good), max_size=12))
        elif isinstance(good, list):
            extra = guarded.array((data.draw(st.integers(0, 40)),), dtype) if argument == "state" else 0.5
            arguments[argument] = [*good, extra][data.draw(st.integers(0, 2)) :]
        else:
            arguments[argument] = data.draw(st.integers(-3, 20) | st.floats())
    with contextlib.suppress(TypeError, ValueError):
        getattr(module, function_of(name))(**arguments)
    assert guarded.intact()


def some_phase(networks: int, good: list[tuple[Any, ...]]) -> Any:
    """Phases of any kind, of which a list may happen to be a plan."""
    network, source = st.integers(0, networks - 1), st.integers(-2, networks - 1)
    rule = next(phase[2] for phase in good if phase[0] == "update")
    targets = st.sampled_from([phase[5] for phase in good if phase[0] == "loss"] + [[0.5], [0.5] * 2, [0.5] * 3])
    return (
        st.sampled_from(good)
        | st.tuples(st.just("forward"), network, st.lists(source, min_size=1, max_size=3))
        | st.tuples(st.just("loss"), network, *map(st.just, (0, 0.5, 1.0)), targets, *map(st.just, (-1.0, 2.0)))
        | st.tuples(st.just("penalty"), network, st.just(0.5), st.just(0.25), st.booleans())
        | st.tuples(st.just("backward"), network, st.integers(-1, networks - 1))
        | st.tuples(st.just("update"), network, st.just(rule), st.sampled_from([math.inf, 0.1]), st.booleans())
    )


def plan_of(data: Any, networks: int, rule: int, loss: int) -> list[tuple[Any, ...]]:
    """Phases in any order in which each may find what it reads."""
    phases: list[tuple[Any, ...]] = []
    inputs: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        network = data.draw(st.integers(0, networks - 1))
        if network not in inputs or data.draw(st.booleans()):
            inputs[network] = data.draw(st.lists(st.sampled_from([-1, -2, *inputs]), min_size=1, max_size=3))
            phases.append(("forward", network, inputs[network]))
        if data.draw(st.booleans()):
            phases.append(("loss", network, loss, 0.5, 1.0, [0.5] * len(inputs[network]), -1.0, 2.0))
            to = data.draw(st.sampled_from([-1, inputs[network][0]]))
            phases.append(("backward", network, max(to, -1)))
            if to >= 0:
                phases.append(("backward", to, -1))
            if data.draw(st.booleans()):
                phases.append(("penalty", to if to >= 0 else network, 0.5, 0.25, network == 0))
            phases.append(("update", to if to >= 0 else network, rule, 0.1 if network else math.inf, network == 0))
    return phases


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@given(data=st.data())
def test_any_plan_is_safe(module: Any, data: Any) -> None:
    """Any plan of three networks of one width is refused, or runs, and writes into its parameters alone."""
    guarded, width, count = Guarded(), data.draw(st.sampled_from([1, 5, 17])), data.draw(st.integers(1, 70))
    rule = module.optimizer_rules().index("sgd")

    def layer(activation: int) -> tuple[Any, ...]:
        weight, bias = guarded.array((width, width), np.float32, 0.01), guarded.array((width,), np.float32)
        return weight, bias, activation, 0.5, [], [], None, None

    networks = [[layer(0) for _ in range(data.draw(st.integers(1, 3)))] for _ in range(3)]
    one = st.tuples(*(st.integers(0, 2),) * 2, st.integers(1, 2**16), st.just(256), st.integers(0, 2**64 - 1))
    dropout = [each for each in data.draw(st.lists(one, max_size=4)) if each[1] < len(networks[each[0]])]
    one = st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, math.inf]), st.just(255), st.just(1))
    input_noise = data.draw(st.lists(one, max_size=2))
    phases = plan_of(data, 3, rule, 0)
    batch = data.draw(st.integers(1, count))
    order = guarded.array((count,), np.int64, 0)
    order[:] = np.arange(count)[::-1]
    x = guarded.array((count, width), data.draw(st.sampled_from([np.float32, np.uint8])), 1)
    updates, losses, penalties = (sum(p[0] == kind for p in phases) for kind in ("update", "loss", "penalty"))
    tables = [guarded.array((-(-count // batch), 2), np.float64, 1e-3) for _ in range(updates)]
    values = guarded.array((256,), np.float32) if x.dtype == np.uint8 and data.draw(st.booleans()) else None
    weights = guarded.array((count,), np.float64) if data.draw(st.booleans()) else None
    arguments = (
        networks,
        phases,
        dropout,
        input_noise,
        x,
        None,
        None,
        data.draw(st.booleans()),
        values,
        weights,
        data.draw(st.booleans()),
    )
    arguments += (None, 0, data.draw(st.sampled_from([1.0, 2.0])), 0.0)
    noise = guarded.array((count, width), np.float32)
    rest = (order, batch, tables, [0.0] * (losses + penalties), None, noise, 7, module.kept_memory())
    with contextlib.suppress(ValueError):
        module.train(*arguments, *rest)
    assert guarded.intact()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_memory_that_calls_share(module: Any, dtype: Any) -> None:
    """What another call left in it, of any plan, reaches no result; at the same time each has its own."""

    def layer(inputs: int, outputs: int, activation: int) -> tuple[Any, ...]:
        parameters = [rng.normal(0, 0.1, shape).astype(dtype) for shape in ((inputs, outputs), (outputs,))]
        return (*parameters, activation, 0.5, *([np.abs(p), np.abs(p)] for p in parameters), None, None)

    def left_by(arguments: dict[str, Any], kept: Any, spoilt: bool = False) -> Any:
        networks = copy.deepcopy(arguments["networks"])
        for weight, *_ in networks[0] if spoilt else ():
            weight[...] = np.nan
        module.train(**arguments | {"networks": networks, "kept": kept})
        return bits({"networks": networks})

    rng, calls = np.random.default_rng(0), binding_calls(module, dtype, Guarded())
    plans = [arguments for name, arguments in calls.items() if function_of(name) == "train"]
    # So wide that layers are computed one by one; and the same in smaller mini-batches, the last one smaller yet.
    wide = plans[1] | {"networks": [[layer(300, 900, 0), layer(900, 900, 1), layer(900, 4, -1)]]}
    wide |= {"x": rng.normal(size=(40, 300)).astype(dtype), "order": np.arange(40), "skip_zeros": False}
    targets = rng.normal(size=(40, 4)).astype(dtype)
    wide["phases"] = [(*p[:5], targets, *p[6:]) if p[0] == "loss" else p for p in wide["phases"]]
    once = [table[:1].copy() for table in wide["hyperparameters"]]
    plans += [wide | {"batch": 40, "hyperparameters": once}, wide | {"batch": 17}]
    expected, kept = [left_by(plan, module.kept_memory()) for plan in plans], module.kept_memory()
    for before in plans:
        for plan, right in zip(plans, expected, strict=True):
            left_by(before, kept, spoilt=True)
            assert left_by(plan, kept) == right
    with ThreadPoolExecutor(4) as threads:
        for plan, right in zip(plans, expected, strict=True):
            assert all(left == right for left in threads.map(left_by, [plan] * 8, [kept] * 8))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_forward_refuses(module: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, w, b, v, c = (rng.normal(size=shape).astype(dtype) for shape in ((7, 5), (5, 9), (9,), (9, 2), (2,)))
    good = {"layers": [(w, b, -1, 0.0), (v, c, -1, 0.0)], "x": x, "skip_zeros": True, "out": np.empty((7, 2), dtype)}
    module.forward(**good)
    np.testing.assert_allclose(good["out"], (x @ w + b) @ v + c, 1e-4, 1e-4)
    layers = [[], None, [None], [(w, b, -1)], good["layers"][::-1], [(w, b[:-1].copy(), -1, 0.0)], [(w, b, 99, 0.0)]]
    layers += [[(w.astype(other(dtype)), b, -1, 0.0)], [(np.asfortranarray(w), b, -1, 0.0)], [(w[:0], b, -1, 0.0)]]
    bad: dict[str, list[Any]] = {"layers": layers, "x": [x[:, :-1].copy(), x[::-1], x.astype(other(dtype)), x[0], None]}
    bad |= {"skip_zeros": ["no"], "out": [good["out"][:-1], np.empty((7, 2), other(dtype)), read_only(good["out"])]}
    for argument, values in bad.items():
        for value in values:
            with pytest.raises((TypeError, ValueError)):
                module.forward(**good | {argument: value})


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_what_phases_run_may_resize_arrays(module: Any) -> None:
    """Python code of a number in a phase shrinks the arrays of the call: sizes are those after it."""

    class Number:
        def __init__(self, number: int, arrays: list[Any]) -> None:
            self.number, self.arrays = number, arrays

        def __index__(self) -> int:
            for array in self.arrays:
                array.resize(1, refcheck=False)
            return self.number

        def __float__(self) -> float:
            return float(self.__index__())

    calls = binding_calls(module, np.dtype(np.float32), Guarded())
    for name in [name for name in calls if function_of(name) == "train"]:
        for at, phase in enumerate(calls[name]["phases"]):
            for field, number in enumerate(phase):
                if type(number) not in (int, float):
                    continue
                arguments = dict(calls[name])
                for argument, value in arguments.items():
                    if isinstance(value, np.ndarray):
                        arguments[argument] = value.copy()
                own = [value for value in arguments.values() if isinstance(value, np.ndarray)]
                arguments["phases"] = list(arguments["phases"])
                changed = (*phase[:field], Number(number, own), *phase[field + 1 :])
                arguments["phases"][at] = changed
                with pytest.raises((TypeError, ValueError)):
                    module.train(**arguments)
                assert all(array.size == 1 for array in own) or not own


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_bindings_count_elements_without_overflow(module: Any) -> None:
    """2**40 rows of nothing by 2**40 columns are 2**80 elements, which is 0 in 64 bits: in a child, as it may crash."""
    script = f"""
import numpy as np
from {module.__name__} import linear
try:
    linear(np.empty((2**40, 0)), np.empty((0, 2**40)), None, -1, 0.0, np.empty(0), None)
except ValueError:
    pass
else:
    raise SystemExit("accepted")
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert child.returncode == 0, f"exit status {child.returncode}: {child.stderr[-2000:]}"


def test_huge_matmuls_of_nothing_are_refused(any_threads_backend: Any, dtype: Any) -> None:
    a, b = np.empty((2**40, 0), dtype), np.empty((0, 2**40), dtype)
    for call in (lambda: kernels.matmul(a, b), lambda: kernels.linear(a, b)):
        with pytest.raises((ValueError, MemoryError)):
            call()


def test_a_number_just_outside_the_unit_interval_is_shown(any_threads_backend: Any, dtype: Any) -> None:
    p = np.full(4, 0.5, dtype)
    p[2] = np.nextafter(dtype.type(1), dtype.type(2))
    with pytest.raises(ValueError, match=r"p must lie within \[0, 1\], got 0\.5 to 1\.0000"):
        kernels.binary_cross_entropy(p, p)
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"alpha must be finite and above 0, got {bad}"):
            kernels.elu(p, alpha=bad)


def test_more_parameters_than_memory() -> None:
    """Said before any is taken: with their sizes."""
    tracemalloc.start()
    try:
        for make in (
            lambda: nn.MLP([784, 1_000_000, 1_000_000, 10]),
            lambda: nn.GAN(64, [1_000_000, 1_000_000, 784], [784, 16, 1]),
        ):
            with pytest.raises(MemoryError, match=r"1000000, 1000000.* parameters.* GB"):
                make()
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()
