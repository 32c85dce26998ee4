"""How arrays lie in memory changes no bit of a result: strides, overlap, foreign arrays. Inputs stay as they are."""

from __future__ import annotations

import array
import importlib.util
import inspect
import itertools
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmlet import _arguments, kernels
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from support import UPDATED, arguments_of, copies, outcome, same_bits

MATMULS = ("linear", "linear_backward", "matmul")
UPDATES = [name for name in kernels.__all__ if name.endswith("_update")]
WITH_OUT = [name for name in kernels.__all__ if "out" in inspect.signature(getattr(kernels, name)).parameters]
# Elementwise and row functions, whose `out` may be an input.
IN_PLACE = [name for name in WITH_OUT if name not in MATMULS]
GAP = 99  # what lies between the elements of a view


def room(shape: tuple[int, ...], dtype: Any, extent: tuple[int, ...], view: Callable[[Any], Any]) -> tuple[Any, Any]:
    whole = np.full(extent, GAP, dtype)
    part = view(whole)
    assert part.shape == shape
    return whole, part


def strided(shape: tuple[int, ...], dtype: Any, step: int) -> tuple[Any, Any]:
    """Every `step`-th element in each dimension; backwards if that is negative."""
    extent = tuple(1 + abs(step) * n for n in shape)
    start = None if step < 0 else 1
    return room(shape, dtype, extent, lambda w: w[tuple(slice(start, None, step) for _ in shape)][inside(shape)])


def inside(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(n) for n in shape)


# For a shape and a dtype: the memory, and a view of that shape in it.
LAYOUTS: dict[str, Callable[[tuple[int, ...], Any], tuple[Any, Any]]] = {
    "transposed": lambda shape, dtype: room(shape, dtype, shape[::-1], lambda w: w.T),
    "every second": lambda shape, dtype: strided(shape, dtype, 2),
    "every third": lambda shape, dtype: strided(shape, dtype, 3),
    "reversed": lambda shape, dtype: strided(shape, dtype, -1),
    "reversed, every second": lambda shape, dtype: strided(shape, dtype, -2),
    "window": lambda shape, dtype: room(
        shape, dtype, tuple(n + 3 for n in shape), lambda w: w[tuple(slice(1, n + 1) for n in shape)]
    ),
    "reversed transposed": lambda shape, dtype: room(shape, dtype, shape[::-1], lambda w: w[::-1].T),
}


def laid_out(layout: str, values: Any) -> Any:
    """A copy of `values` in this layout; "unaligned" is one as well."""
    if layout == "unaligned":
        view = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
        assert not view.flags.aligned or not view.size
    else:
        _, view = LAYOUTS[layout](values.shape, values.dtype)
    view[...] = values
    return view


def arguments_for(name: str, backend: Any, rng: Any, dtype: Any, rows: int = 6, columns: int = 37) -> dict[str, Any]:
    """Arguments whose result is one to the last bit, in any layout.

    A matmul may add in another order where a matrix is transposed, and so gets numbers whose products and sums
    are exact.
    """
    arguments = arguments_of(name, rng, dtype, rows, columns)
    if name in MATMULS:
        arguments = {k: np.round(4 * v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        if "activation" in arguments:
            arguments["activation"] = "relu"
    return arguments


def arrays_of(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}


def same(results: list[Any], expected: list[Any]) -> bool:
    return len(results) == len(expected) and all(map(same_bits, results, expected))


def assert_same(results: list[Any], expected: list[Any], what: Any = "") -> None:
    assert len(results) == len(expected)
    for result, exact in zip(results, expected, strict=True):
        assert same_bits(result, exact), what


# Strides.


@pytest.mark.parametrize("name", kernels.__all__)
def test_any_strides(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """All arrays in one layout, and each in that layout among contiguous ones."""
    arguments = arguments_for(name, backend, rng, dtype)
    expected = outcome(name, copies(arguments))
    different = []
    for layout in [*LAYOUTS, "unaligned"]:
        arrays = arrays_of(arguments)
        if layout == "unaligned":  # which cannot be updated
            arrays = {k: v for k, v in arrays.items() if k not in UPDATED}
        for moved in [list(arrays), *([argument] for argument in arrays)]:
            views = {argument: laid_out(layout, arrays[argument]) for argument in moved}
            if not same(outcome(name, {**copies(arguments), **views}), expected):
                different.append((layout, moved))
    assert not different


@pytest.mark.parametrize("name", kernels.__all__)
def test_broadcast_inputs(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """Stride 0: one row, one column, or one number that stands for a matrix."""
    arguments = arguments_for(name, backend, rng, dtype)
    inputs = {k: v for k, v in arrays_of(arguments).items() if k not in UPDATED}
    assert inputs
    for argument, values in inputs.items():
        for part in (values[:1], values[..., :1], values[:1, :1] if values.ndim == 2 else values[:1]):
            view = np.broadcast_to(part, values.shape)
            expected = outcome(name, {**copies(arguments), argument: view.copy()})
            assert_same(outcome(name, {**copies(arguments), argument: view}), expected, argument)


@pytest.mark.parametrize("name", ["linear", "linear_backward"])
def test_stacked_samples(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """Leading dimensions are samples: the same numbers as for a matrix, also where they cannot be run together."""
    arguments = arguments_for(name, backend, rng, dtype, rows=24)
    expected = outcome(name, copies(arguments))
    lead = {k: v for k, v in arrays_of(arguments).items() if len(v) == 24}
    assert lead.keys() == ({"x"} if name == "linear" else {"grad_y", "x", "y"})
    swapped = np.arange(24).reshape(4, 3, 2).transpose(2, 1, 0).reshape(24)  # the order of samples below
    for shape, how in (((24,), "whole"), ((4, 6), "whole"), ((2, 3, 4), "whole"), ((2, 3, 4), "swapped")):
        stacked = {}
        for k, v in lead.items():
            view = v.reshape(*shape, -1)
            if how == "swapped":
                memory = np.empty((4, 3, 2, v.shape[1]), dtype)
                view = memory.transpose(2, 1, 0, 3)
                view[...] = v.reshape(view.shape)
                assert np.array_equal(memory.reshape(24, -1)[swapped], v)
            stacked[k] = view
        results = outcome(name, {**copies(arguments), **stacked})
        first = results[0]
        assert first.shape[:-1] == shape
        assert_same([first.reshape(24, -1), *results[1:]], expected, (shape, how))


def test_one_sample(backend: Any, dtype: Any, rng: Any) -> None:
    arguments = arguments_for("linear", backend, rng, dtype, rows=1)
    row = kernels.linear(**{**arguments, "x": arguments["x"][0]})
    assert row.shape == (7,)
    assert same_bits(row, kernels.linear(**arguments)[0])
    arguments = arguments_for("linear_backward", backend, rng, dtype, rows=1)
    grad_x, *rest = kernels.linear_backward(**arguments)
    flat = {k: v if k == "w" or not isinstance(v, np.ndarray) else v[0] for k, v in arguments.items()}
    results = kernels.linear_backward(**flat)
    assert_same(list(results), [grad_x[0], *rest])


# Outputs.


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_of_any_strides(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """`out` is what comes back, and between its elements nothing changes."""
    arguments = arguments_for(name, backend, rng, dtype)
    expected = outcome(name, copies(arguments))
    for layout in LAYOUTS:
        whole, out = LAYOUTS[layout](expected[-1].shape, dtype)
        returned = getattr(kernels, name)(**arguments, out=out)
        assert (returned[1] if isinstance(returned, tuple) else returned) is out, layout
        assert same_bits(out, expected[-1]), layout
        if isinstance(returned, tuple):
            assert returned[0] == expected[0], layout
        out[...] = GAP
        assert np.all(whole == GAP), layout


def test_out_of_linear_with_preactivation(backend: Any, dtype: Any, rng: Any) -> None:
    arguments = arguments_for("linear", backend, rng, dtype)
    expected = outcome("linear", {**arguments, "return_preactivation": True})
    for out in (np.empty((6, 7), dtype), np.empty((7, 6), dtype).T, np.empty((6, 14), dtype)[:, ::2]):
        y, z = kernels.linear(**arguments, return_preactivation=True, out=out)
        assert y is out
        assert_same([y, z], expected)


@pytest.mark.parametrize("stack", ["left", "right", "both"])
def test_out_of_stacked_matmuls(stack: str, backend: Any, dtype: Any, rng: Any) -> None:
    arguments = arguments_for("matmul", backend, rng, dtype)
    a, b = arguments["a"], arguments["b"]
    lefts = np.stack([a, -a, a[::-1]]) if stack != "right" else a
    rights = np.stack([b, 2 * b, b[::-1]]) if stack != "left" else b
    expected = kernels.matmul(lefts, rights)
    for layout in LAYOUTS:
        whole, out = LAYOUTS[layout](expected.shape, dtype)
        assert kernels.matmul(laid_out(layout, lefts), laid_out(layout, rights), out=out) is out
        assert same_bits(out, expected)
        out[...] = GAP
        assert np.all(whole == GAP)


@pytest.mark.parametrize("size", [(6, 37), (300, 101)], ids=["small", "split between threads"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_out_is_an_input(name: str, size: tuple[int, int], backend: Any, dtype: Any, rng: Any) -> None:
    arguments = arguments_for(name, backend, rng, dtype, *size)
    expected = outcome(name, copies(arguments))
    shaped = [k for k, v in arrays_of(arguments).items() if v.shape == size]
    assert shaped
    for argument in shaped:
        fresh = copies(arguments)
        assert_same(outcome(name, {**fresh, "out": fresh[argument]}), expected, argument)
        assert same_bits(fresh[argument], expected[-1]), argument


def softmax_labels(arguments: dict[str, Any]) -> None:
    """One probability per class in place of the indices, so that there is one more array to overlap."""
    logits = arguments["logits"]
    arguments["labels"] = np.linspace(0.1, 1, logits.size).reshape(logits.shape).astype(logits.dtype)


@pytest.mark.parametrize("name", IN_PLACE)
def test_out_overlaps_an_input(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """Views of one buffer, shifted, reversed or transposed: as if the inputs had been copied first."""
    rows = columns = 23
    arguments = arguments_for(name, backend, rng, dtype, rows, columns)
    if name in ROW_LOSSES:
        softmax_labels(arguments)
    size = rows * columns
    shaped = [k for k, v in arrays_of(arguments).items() if v.shape == (rows, columns)]
    expected = outcome(name, copies(arguments))
    for argument in shaped:
        for shift in (-size + 1, -columns, -9, -8, -1, 1, 2, 8, 16, columns, size - 1):
            buffer = np.full(3 * size, GAP, dtype)
            read = buffer[size : 2 * size].reshape(rows, columns)
            read[...] = arguments[argument]
            out = buffer[size + shift : 2 * size + shift].reshape(rows, columns)
            before = buffer.copy()
            assert_same(outcome(name, {**arguments, argument: read, "out": out}), expected, (argument, shift))
            before[size + shift : 2 * size + shift] = expected[-1].reshape(-1)
            assert same_bits(buffer, before), "something besides out was written"
        for view in (lambda a: a.T, lambda a: a[::-1], lambda a: a[:, ::-1], lambda a: a[::-1].T):
            read = arguments[argument].copy()
            returned = outcome(name, {**arguments, argument: read, "out": view(read)})
            assert_same(returned, expected, argument)


@pytest.mark.parametrize("name", [n for n in IN_PLACE if n.endswith("_backward") or n in LOSSES])
def test_out_overlaps_both_inputs(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """One array is given as both inputs and as `out`, or all three overlap."""
    arguments = arguments_for(name, backend, rng, dtype, 9, 31)
    first, *others = list(arrays_of(arguments))
    values = np.abs(arguments[first]) / (1 + np.abs(arguments[first]))  # which are fit to be probabilities
    both = dict.fromkeys((first, *others), values)
    expected = outcome(name, {**arguments, **both})
    shared = values.copy()
    results = outcome(name, {**arguments, **dict.fromkeys(both, shared), "out": shared})
    assert_same(results, expected)
    for shift, start in itertools.product((1, -1, 31), (247, 278, 279, 280, 310)):
        buffer = np.tile(values.reshape(-1), 3)
        middle = buffer[279:558].reshape(9, 31)
        shifted = buffer[279 + shift : 558 + shift].reshape(9, 31)
        overlapping = {first: middle} | dict.fromkeys(others, shifted)
        expected = outcome(name, copies({**arguments, **overlapping}))
        results = outcome(name, {**arguments, **overlapping, "out": buffer[start : start + 279].reshape(9, 31)})
        assert_same(results, expected, (shift, start))


SLICES = st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 2, 3, -1, -2, -3]))


@given(source=SLICES, target=SLICES, size=st.integers(0, 50), name=st.sampled_from(IN_PLACE))
def test_any_two_slices_of_one_buffer(source: Any, target: Any, size: int, name: str, backend: Any) -> None:
    """For each, `out` takes what the call gives on copies."""

    def view(start: int, step: int) -> Any:
        part = buffer[start : start + abs(step) * size : abs(step)]
        assert part.shape == (size,)
        return (part if step > 0 else part[::-1])[np.newaxis, :]

    buffer = np.linspace(0.01, 0.99, 60 + 3 * 50)
    arguments = arguments_of(name, np.random.default_rng(1), np.float64, 1, size)
    if name in ROW_LOSSES:
        softmax_labels(arguments)
    argument = list(arrays_of(arguments))[-1]
    read, out = view(*source), view(*target)
    expected = outcome(name, {**arguments, argument: read.copy()})
    before = buffer.copy()
    assert_same(outcome(name, {**arguments, argument: read, "out": out}), expected)
    view_before = before[target[0] : target[0] + abs(target[1]) * size : abs(target[1])]
    view_before[...] = out[0, :: 1 if target[1] > 0 else -1]
    assert same_bits(buffer, before), "something besides out was written"


@pytest.mark.parametrize("name", UPDATES)
def test_updates_in_any_strides(name: str, backend: Any, dtype: Any, rng: Any) -> None:
    """Parameters and state are updated where they lie, and nothing between their elements."""
    arguments = arguments_for(name, backend, rng, dtype)
    expected = outcome(name, copies(arguments))
    written = [argument for argument in UPDATED if argument in arguments]
    for layout, room_for in LAYOUTS.items():
        for moved in [written, *([argument] for argument in written)]:
            rooms = {argument: room_for(arguments[argument].shape, dtype) for argument in moved}
            for argument, (_, view) in rooms.items():
                view[...] = arguments[argument]
            views = {argument: view for argument, (_, view) in rooms.items()}
            assert_same(outcome(name, {**copies(arguments), **views}), expected, (layout, moved))
            for whole, view in rooms.values():
                view[...] = GAP
                assert np.all(whole == GAP), (layout, moved)


# Nothing to compute.


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("name", kernels.__all__)
def test_empty_arrays(name: str, shape: tuple[int, int], backend: Any, dtype: Any, rng: Any) -> None:
    if name in ROW_LOSSES and shape == (5, 0):
        pytest.skip("no class index fits")
    arguments = arguments_of(name, rng, dtype, *shape)
    before = copies(arguments)
    results = outcome(name, arguments)
    if name in ACTIVATIONS or name in ROW_FUNCTIONS or (name.endswith("_backward") and name not in MATMULS):
        assert [r.shape for r in results] == [shape]
    elif name in LOSSES or name in ROW_LOSSES:
        loss, gradient = results
        assert math.isnan(loss)
        assert gradient.shape == shape
    elif name in UPDATES:
        assert {r.shape for r in results} == {shape}
    elif name == "matmul":
        assert same_bits(results[0], np.zeros((shape[0], 7), dtype))
    elif name == "linear":
        row = kernels.gelu(arguments["b"])
        assert same_bits(results[0], np.broadcast_to(row, (shape[0], 7)))
    else:
        assert [r.shape for r in results] == [shape, (shape[1], 7), (7,)]
        assert name == "linear_backward"
        assert shape[0] or not (np.any(results[1]) or np.any(results[2]))
    assert all(r.dtype == dtype for r in results if r.ndim)
    assert_same(list(arrays_of(arguments).values()), list(arrays_of(before).values()))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (300, 200)], ids=str)
def test_matmuls_without_inner_dimension(size: tuple[int, int], backend: Any, dtype: Any, rng: Any) -> None:
    """A sum of nothing is 0, whatever `out` held before; `linear` adds the bias and applies the activation."""
    rows, columns = size
    a, b = np.empty((rows, 0), dtype), np.empty((0, columns), dtype)
    bias = rng.normal(size=columns).astype(dtype)
    for out in (np.full(size, np.nan, dtype), np.full(size[::-1], np.nan, dtype).T):
        assert kernels.matmul(a, b, out=out) is out
        assert same_bits(out, np.zeros(size, dtype))
    for name in (None, *ACTIVATIONS):
        activated = bias if name is None else getattr(kernels, name)(bias)
        for view in (bias, np.repeat(bias, 2)[::2]):
            y, z = kernels.linear(a, b, view, name, return_preactivation=True, out=np.full(size, np.nan, dtype))
            assert same_bits(z, np.broadcast_to(bias, size))
            assert same_bits(y, np.broadcast_to(activated, size))
        zeros = np.zeros(size, dtype)
        assert same_bits(kernels.linear(a, b, None, name), zeros if name is None else getattr(kernels, name)(zeros))


# Arrays of others.


class Interface:
    """An object with the array interface alone."""

    def __init__(self, values: Any) -> None:
        self.values = values  # kept alive
        self.__array_interface__ = values.__array_interface__


class Exchange:
    """An object with DLPack alone."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


def tensor(values: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(values)


def buffer_of(values: Any) -> Any:
    """An array.array with a copy of the values, and a matrix's view of it."""
    flat = array.array(values.dtype.char, values.reshape(-1).tolist())
    return memoryview(flat).cast("B").cast(values.dtype.char, list(values.shape))


# From a contiguous array to a foreign one on the same memory.
FOREIGN: dict[str, Callable[[Any], Any]] = {
    "array interface": Interface,
    "memoryview": memoryview,
    "array.array": buffer_of,
    "DLPack": Exchange,
    "subclass": lambda values: values.view(np.matrix) if values.ndim == 2 else values.view(np.recarray),
}
if importlib.util.find_spec("torch") is not None:
    FOREIGN |= {"torch": tensor, "DLPack of torch": lambda values: Exchange(tensor(values))}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", kernels.__all__)
def test_foreign_arrays(name: str, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """As inputs, as `out`, and as what an update writes: always the caller's own memory."""
    arguments = arguments_for(name, any_threads_backend, rng, dtype)
    expected = outcome(name, copies(arguments))
    for kind, foreign in FOREIGN.items():
        wrapped = {k: foreign(v) for k, v in copies(arrays_of(arguments)).items()}
        assert_same(outcome(name, {**arguments, **wrapped}), expected, kind)
        if name in WITH_OUT:
            out = foreign(np.full(expected[-1].shape, np.nan, dtype))
            returned = getattr(kernels, name)(**{**arguments, **wrapped}, out=out)
            assert (returned[1] if isinstance(returned, tuple) else returned) is out, kind
            assert same_bits(_arguments.as_array(out, "out"), expected[-1]), kind


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_out_of_no_elements(kind: str, any_threads_backend: Any, dtype: Any) -> None:
    if kind == "array.array":
        pytest.skip("memoryview casts no empty matrix")
    out = FOREIGN[kind](np.zeros((0, 3), dtype))
    assert kernels.exp(np.zeros((0, 3), dtype), out=out) is out


@pytest.mark.parametrize("name", WITH_OUT)
def test_foreign_out_is_an_input(name: str, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """Overlap is seen through a tensor as well."""
    arguments = arguments_for(name, any_threads_backend, rng, dtype, rows=6, columns=6)
    if name in MATMULS:
        square = np.zeros((6, 6), dtype)
        names = ("a", "b") if name == "matmul" else ("x", "w")
        with pytest.raises(ValueError, match=f"overlaps {names[0]}"):
            getattr(kernels, name)(square, square.copy(), out=tensor(square))
        return
    expected = outcome(name, copies(arguments))
    first = next(k for k, v in arguments.items() if isinstance(v, np.ndarray))
    values = arguments[first].copy()
    assert_same(outcome(name, {**arguments, first: values, "out": tensor(values)}), expected)


@pytest.mark.parametrize("name", kernels.__all__)
def test_tensors_of_any_strides(name: str, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    arguments = arguments_for(name, any_threads_backend, rng, dtype)
    expected = outcome(name, copies(arguments))
    for layout in ("transposed", "every third", "window"):  # PyTorch has no negative strides
        tensors = {k: tensor(laid_out(layout, v)) for k, v in arrays_of(arguments).items()}
        assert_same(outcome(name, {**arguments, **tensors}), expected)


@pytest.mark.parametrize("name", kernels.__all__)
def test_tensors_that_require_grad(name: str, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """Their gradient would be lost."""
    arguments = arguments_for(name, any_threads_backend, rng, dtype)
    if name in WITH_OUT:
        arguments["out"] = np.empty_like(outcome(name, copies(arguments))[-1])
    for argument, values in arrays_of(arguments).items():
        if values.dtype.kind != "f":
            continue
        before = values.copy()
        attached = tensor(values).requires_grad_()
        with pytest.raises(TypeError, match=rf"\b{argument}\b.*requires grad.*detach"):
            getattr(kernels, name)(**{**arguments, argument: attached})
        assert same_bits(values, before)
        outcome(name, {**copies(arguments), argument: attached.detach()})


@pytest.mark.parametrize("dtype_name", ["bfloat16", "float16", "int64"])
def test_tensors_of_other_dtypes(dtype_name: str, any_threads_backend: Any) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"(?i)\bx\b.*" + dtype_name):
        kernels.exp(torch.ones(3, dtype=getattr(torch, dtype_name)))


# Without copies.


def peak(call: Callable[[], Any]) -> int:
    """Bytes that Python and NumPy held at most during a call."""
    call()  # what is allocated once is none of its business
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


ALLOWED = 100_000  # bytes; the arrays below have millions


@pytest.mark.parametrize("kind", [*FOREIGN, "numpy"])
def test_inputs_are_read_where_they_lie(kind: str, any_threads_backend: Any, dtype: Any) -> None:
    values = np.linspace(-1, 1, 12).reshape(3, 4).astype(dtype)
    object_given = values if kind == "numpy" else FOREIGN[kind](values)
    seen = _arguments.as_array(object_given, "x")
    if kind != "array.array":  # which has a copy of its own
        assert np.shares_memory(seen, values)
    assert np.shares_memory(seen, _arguments.as_array(object_given, "x"))
    if any_threads_backend.name == "numpy":  # which computes in float64, and so copies
        return
    big = np.linspace(-1, 1, 1_000_000).reshape(1000, 1000).astype(dtype)
    foreign = big if kind == "numpy" else FOREIGN[kind](big)
    out = np.empty_like(big)
    target = out if kind == "numpy" else FOREIGN[kind](out)
    assert peak(lambda: kernels.tanh(foreign, out=target)) < ALLOWED


def big_matrices(dtype: Any) -> tuple[Any, Any]:
    """64 × 8000 and 8000 × 64 numbers, each in a buffer four times that size."""
    numbers = np.linspace(-1, 1, 128 * 16000).astype(dtype)
    return numbers.reshape(128, 16000), numbers.reshape(16000, 128)


# From a big buffer to a view of a quarter of it, with half the rows and half the columns.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda whole: whole.reshape(-1)[: whole.size // 4].reshape(whole.shape[0] // 2, -1),
    "window": lambda whole: whole[: whole.shape[0] // 2, 5 : 5 + whole.shape[1] // 2],
    "transposed": lambda whole: whole.reshape(-1)[: whole.size // 4].reshape(-1, whole.shape[0] // 2).T,
    "every second": lambda whole: whole[::2, ::2],
    "reversed": lambda whole: whole[::-2, ::-2],
}
# Those that a BLAS takes as they are; what else NumPy's matmul copies is not ours to say.
BLAS_VIEWS = ("contiguous", "window", "transposed")


@pytest.mark.parametrize("left", VIEWS)
def test_matmuls_copy_no_views(left: str, any_threads_backend: Any, dtype: Any) -> None:
    views = VIEWS if any_threads_backend.name == "cpu" else BLAS_VIEWS
    if any_threads_backend.name == "cuda":
        pytest.skip("NumPy arrays are copied to the GPU and back")
    if left not in views:
        pytest.skip("NumPy decides what its matmul copies")
    activation = None if any_threads_backend.name == "numpy" else "relu"  # the reference's works on a float64 copy of y
    whole_a, whole_b = big_matrices(dtype)
    for right in views:
        a, b = VIEWS[left](whole_a), VIEWS[right](whole_b)
        assert (a.shape, b.shape) == ((64, 8000), (8000, 64))
        out = np.empty((64, 64), dtype)
        assert a.nbytes > 20 * ALLOWED
        assert peak(lambda a=a, b=b, out=out: kernels.matmul(a, b, out=out)) < ALLOWED
        assert peak(lambda a=a, b=b, out=out: kernels.linear(a, b, activation=activation, out=out)) < ALLOWED
        # The gradient of x is as large as x, that of w as w.
        results = a.nbytes + b.nbytes
        used = peak(lambda a=a, b=b, out=out: kernels.linear_backward(out, a, b, need_b=False))
        assert used < results + ALLOWED


@pytest.mark.parametrize("name", [n for n in WITH_OUT if n not in MATMULS])
def test_arrays_of_one_layout_are_not_copied(name: str, any_threads_backend: Any, rng: Any) -> None:
    """Contiguous arrays, and transposed ones wherever neither rows nor the order of a sum matter."""
    if any_threads_backend.name == "numpy":
        pytest.skip("the reference computes in float64 copies")
    base = name.removesuffix("_backward")
    if any_threads_backend.name == "numba" and (base in ACTIVATIONS or base in LOSSES):
        from gemmlet.backends.numba.formulas import scalar_kernels

        if name not in scalar_kernels(np.dtype(np.float32)):
            pytest.skip("it has no scalar kernel, and the reference computes in float64 copies")
    ordered = base in ROW_FUNCTIONS or name in LOSSES or name in ROW_LOSSES
    arguments = arguments_of(name, rng, np.float32, 300, 1000)
    out = np.empty((300, 1000), np.float32)
    assert peak(lambda: getattr(kernels, name)(**arguments, out=out)) < ALLOWED
    if not ordered:
        transposed = {k: np.asfortranarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        target = np.empty((300, 1000), np.float32, order="F")
        assert peak(lambda: getattr(kernels, name)(**transposed, out=target)) < ALLOWED


@pytest.mark.parametrize("name", UPDATES)
def test_updates_copy_nothing(name: str, any_threads_backend: Any, rng: Any) -> None:
    if any_threads_backend.name == "numpy":
        pytest.skip("the reference computes in float64 copies")
    arguments = arguments_of(name, rng, np.float32, 300, 1000)
    assert peak(lambda: getattr(kernels, name)(**arguments)) < ALLOWED


# Inputs.


@pytest.mark.parametrize("size", [(6, 37), (300, 101)], ids=["small", "split between threads"])
@pytest.mark.parametrize("name", kernels.__all__)
def test_inputs_stay_as_they_are(name: str, size: tuple[int, int], backend: Any, dtype: Any, rng: Any) -> None:
    """To the last bit; so they may be read-only."""
    arguments = arguments_for(name, backend, rng, dtype, *size)
    expected = outcome(name, copies(arguments))
    inputs = {k: v for k, v in arrays_of(arguments).items() if k not in UPDATED}
    before = {k: v.tobytes() for k, v in inputs.items()}
    outcome(name, {**copies(arguments), **inputs})
    assert {k: v.tobytes() for k, v in inputs.items()} == before
    for values in inputs.values():
        values.flags.writeable = False
    assert_same(outcome(name, {**copies(arguments), **inputs}), expected)
    if name in WITH_OUT:
        out = np.empty_like(expected[-1])
        outcome(name, {**inputs, **{k: v for k, v in arguments.items() if k not in inputs}, "out": out})
        assert {k: v.tobytes() for k, v in inputs.items()} == before


def test_scalars_and_lists_are_arrays(any_threads_backend: Any) -> None:
    """What NumPy makes float64 of is taken; a number gives an array without dimensions."""
    assert kernels.relu(-2.5) == 0
    assert kernels.exp(np.float32(0)).dtype == np.float32
    assert kernels.relu([[-1.0, 2.0]]).tolist() == [[0.0, 2.0]]
    assert kernels.matmul([[1.0, 2.0]], [[3.0], [4.0]]).tolist() == [[11.0]]
    loss, grad = kernels.mean_squared_error(3.0, 1.0)
    assert (loss, grad) == (4.0, 4.0)
