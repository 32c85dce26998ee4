"""The fast paths: the same bits as the general path, and every unusual argument is left to it."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from gemmlet import kernels
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from support import FAST_PATHS, UPDATED, Watched, arguments_of, complaint, copies, outcome, same_bits

try:
    from gemmlet.backends.cpu import CpuBackend, available_isas

    ISAS = available_isas()
except ImportError:
    ISAS = []

pytestmark = pytest.mark.skipif(not ISAS, reason="nothing is compiled here")


@pytest.fixture(params=ISAS)
def watched(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, Watched]]]:
    """A compiled backend in use, with its fast paths watched."""
    import gemmlet

    backend = CpuBackend(request.param)
    functions = {name: Watched(function) for name, function in backend.fast_paths.items()}
    monkeypatch.setattr(backend, "fast_paths", functions)
    with gemmlet.use_backend(backend):
        yield backend, functions


def general(backend: Any, name: str, arguments: dict[str, Any]) -> list[Any]:
    """The result without fast paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "fast_paths", MappingProxyType({}))
        return outcome(name, arguments)


def arrays_in(arguments: dict[str, Any]) -> list[str]:
    return [key for key, value in arguments.items() if isinstance(value, np.ndarray)]


SHAPES = [(1, 1), (3, 5), (1, 10), (64, 10), (7, 33), (70, 101)]


@pytest.mark.parametrize("name", kernels.__all__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_the_general_path(name: str, shape: Any, watched: Any, dtype: Any, rng: Any) -> None:
    backend, functions = watched
    arguments = arguments_of(name, rng, dtype, *shape)
    expected = general(backend, name, copies(arguments))
    got = outcome(name, copies(arguments))
    assert functions[FAST_PATHS[name]].answered == 1
    assert len(got) == len(expected)
    assert all(same_bits(a, b) and a.flags.c_contiguous for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if "linear" not in n and n != "matmul"])
def test_other_shapes_and_outputs(name: str, watched: Any, dtype: Any, rng: Any) -> None:
    """More dimensions, none, Fortran order, `out` apart and `out` in place."""
    backend, functions = watched
    base = name.removesuffix("_backward")
    by_rows = base in {*ROW_FUNCTIONS, *ROW_LOSSES}
    reshapes: list[Callable[[Any], Any]] = [lambda a: a]
    if base not in ROW_LOSSES:
        reshapes.append(lambda a: a.reshape(2, 3, 5))
    if not by_rows:
        reshapes += [lambda a: a.reshape(-1), lambda a: np.array(a.flat[0])]
        if base not in LOSSES:
            reshapes.append(np.asfortranarray)
    for reshape in reshapes:
        arguments = arguments_of(name, rng, dtype, 6, 5)
        for key in arrays_in(arguments):
            if arguments[key].shape == (6, 5):
                arguments[key] = reshape(arguments[key])
        first = next(iter(arguments))
        outs: list[Any] = [None]
        if not name.endswith("_update"):
            outs += [np.full_like(arguments[first], 99), first]
        for out in outs:
            mine, theirs = ({k: v.copy(order="K") if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
                            for _ in range(2))  # fmt: skip
            for given in (mine, theirs):
                if out is not None:
                    given["out"] = given[first] if isinstance(out, str) else out.copy(order="K")
            answered = functions[FAST_PATHS[name]].answered
            got, expected = outcome(name, mine), general(backend, name, theirs)
            assert functions[FAST_PATHS[name]].answered == answered + 1
            for a, b in zip(got, expected, strict=True):
                assert same_bits(a, b)
                assert a.strides == b.strides
            if out is not None:
                assert any(result is mine["out"] for result in got)


def unusual_arrays(good: Any) -> Iterator[tuple[str, Any]]:
    """Arrays of the same shape and numbers that the fast paths shall leave alone, or errors."""

    class Subclass(np.ndarray):
        pass

    yield "a subclass", good.view(Subclass)
    yield "a list", good.tolist()
    yield "byte-swapped", good.astype(good.dtype.newbyteorder())
    yield "half", good.astype(np.float16)
    yield "long double", good.astype(np.longdouble)
    yield "complex", good.astype(np.complex128)
    yield "object", good.astype(object)
    raw = np.zeros(good.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(good.dtype).reshape(good.shape)
    unaligned[...] = good
    yield "unaligned", unaligned
    yield "another dtype", good.astype(np.float32 if good.dtype == np.float64 else np.float64)
    yield "another shape", np.concatenate([good, good])
    yield "a scalar", good.dtype.type(1)
    yield "missing", None
    if good.ndim == 2:
        yield "strided", np.repeat(good, 2, axis=1)[:, ::2]
        yield "reversed", good[::-1].copy()[::-1]


@pytest.mark.parametrize("name", kernels.__all__)
def test_unusual_arrays(name: str, watched: Any, dtype: Any, rng: Any) -> None:
    """The same result, or the same error, as the general path."""
    backend, _ = watched
    good = arguments_of(name, rng, dtype, 6, 5)
    for key in arrays_in(good):
        for what, bad in unusual_arrays(good[key]):
            mine, theirs = copies(good) | {key: bad}, copies(good) | {key: bad}
            if key in UPDATED and isinstance(bad, np.ndarray):
                mine[key], theirs[key] = (bad.copy("K") if what not in ("unaligned",) else bad for _ in range(2))
            got = complaint(lambda m=mine: outcome(name, m))
            expected = complaint(lambda t=theirs: general(backend, name, t))
            label = f"{key}: {what}"
            if isinstance(expected, tuple):
                assert got == expected, label
            elif what == "unaligned" and key in UPDATED:
                continue
            else:
                assert isinstance(got, list), f"{label}: {got}"
                assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), label


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if not n.endswith("_update") and n != "linear_backward"])
def test_unusual_outputs(name: str, watched: Any, dtype: Any, rng: Any) -> None:
    backend, _ = watched
    good = arguments_of(name, rng, dtype, 6, 5)
    first = outcome(name, copies(good))[-1]
    memory = np.zeros(200, dtype)
    read_only = np.zeros_like(first)
    read_only.flags.writeable = False
    key = arrays_in(good)[0]
    overlapped = memory[: good[key].size].reshape(good[key].shape)
    overlapped[...] = good[key]
    for out in (
        *(bad for _, bad in unusual_arrays(first) if bad is not None),
        read_only,
        np.broadcast_to(memory[:1], first.shape),
        memory[3 : 3 + first.size].reshape(first.shape),
    ):
        mine, theirs = copies(good) | {key: overlapped, "out": out}, copies(good) | {key: overlapped.copy()}
        kept = np.array(memory)
        expected = general(backend, name, theirs)
        got = complaint(lambda m=mine: outcome(name, m))
        if isinstance(got, tuple):
            memory[...] = kept
            assert complaint(lambda m=mine: general(backend, name, m)) == got
            assert np.array_equal(memory, kept)
        else:
            assert any(same_bits(got[-1], e) for e in expected)
        memory[...] = kept


def test_arrays_that_were_pickled_are_usual(watched: Any, dtype: Any) -> None:
    """Their dtype is an object of its own."""
    _, functions = watched
    x = pickle.loads(pickle.dumps(np.ones(5, dtype)))
    assert kernels.tanh(x).dtype == dtype
    assert functions["tanh"].answered == 1


def test_labels(watched: Any, dtype: Any) -> None:
    backend, functions = watched
    z, labels = np.arange(12, dtype=dtype).reshape(4, 3), np.array([0, 1, 2, 1])
    expected = general(backend, "softmax_cross_entropy", {"logits": z, "labels": labels})
    for given in (labels, labels.astype(np.int32), labels.astype(np.uint8), np.repeat(labels, 2)[::2]):
        got = outcome("softmax_cross_entropy", {"logits": z, "labels": given})
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert functions["softmax_cross_entropy"].answered == 1
    for bad in ([0, 1, 2, 3], [0, -1, 2, 1], [2**62, 0, 0, 0], [-(2**63), 0, 0, 0], [2**63 - 1, 0, 0, 0]):
        with pytest.raises(ValueError, match="labels must lie within"):
            kernels.softmax_cross_entropy(z, np.array(bad))
    # The gradient over the memory of the labels.
    memory = np.zeros(12, np.float64)
    if dtype == np.float64:
        memory[:4] = labels.view(np.float64)
        over = memory[:4].view(np.int64)
        loss, _ = kernels.softmax_cross_entropy(z, over, out=memory.reshape(4, 3))
        assert loss == expected[0]
        assert same_bits(memory.reshape(4, 3), expected[1])


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if n.endswith("_update")])
def test_updates_refuse_shared_memory(name: str, watched: Any, dtype: Any, rng: Any) -> None:
    arguments = arguments_of(name, rng, dtype, 3, 5)
    for one, other in itertools.permutations(arrays_in(arguments), 2):
        given = copies(arguments)
        given[one] = given[other]
        with pytest.raises(ValueError, match="overlaps"):
            getattr(kernels, name)(**given)


def test_numbers_of_activations(watched: Any, dtype: Any) -> None:
    backend, functions = watched
    x = np.linspace(-2, 2, 9).astype(dtype)
    for number in (0.25, np.float64(0.25), 1, np.float32(0.5)):
        expected = general(backend, "elu", {"x": x, "alpha": number})[0]
        assert same_bits(kernels.elu(x, number), expected)
        assert same_bits(kernels.elu(x, alpha=number), expected)
    assert functions["elu"].answered == 4
    for bad in (0.0, -1.0, float("inf"), float("nan"), "1", None, True, 1e39 if dtype == np.float32 else 1j):
        with pytest.raises((TypeError, ValueError), match="alpha"):
            kernels.elu(x, bad)


@pytest.mark.skipif("PYTHONMALLOC" in os.environ, reason="another allocator: what it keeps is not ours")
@pytest.mark.parametrize("name", kernels.__all__)
def test_no_memory_is_lost(name: str, watched: Any, rng: Any) -> None:
    """Not even the smallest object, 16 bytes, a call."""
    arguments = arguments_of(name, rng, np.float64, 6, 5)
    wrong = arguments | {arrays_in(arguments)[0]: np.ones(3, np.float16)}
    kernel = getattr(kernels, name)

    def calls(count: int) -> None:
        for _ in range(count):
            kernel(**arguments)
            complaint(lambda: kernel(**wrong))

    calls(50)
    gc.collect()
    gc.freeze()  # The collections below need not look at what the libraries made.
    tracemalloc.start()
    try:
        calls(20)
        # Another thread of the process may allocate something meanwhile; what a call loses, it loses each time.
        for _ in range(3):
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            calls(200)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
            if grown < 200 * 16:
                break
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert grown < 200 * 16, f"{grown} bytes more after 200 calls"


def test_from_many_threads(watched: Any, dtype: Any, rng: Any) -> None:
    """Small calls that keep the GIL, and large ones that do not, at once; the first calls of all among them."""
    arguments = {
        (name, rows): arguments_of(name, rng, dtype, rows, 10)
        for name in ("tanh", "softmax", "softmax_cross_entropy", "linear", "linear_backward")
        for rows in (2, 3000)
    }
    expected = {key: outcome(key[0], given) for key, given in arguments.items()}
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(20):
            for key, given in arguments.items():
                got = outcome(key[0], given)
                if not all(same_bits(a, b) for a, b in zip(got, expected[key], strict=True)):
                    wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_makes_them_refuses(watched: Any) -> None:
    module = watched[0]._module
    good = module.formula(0, 0.0, False, False, False)
    with pytest.raises(ValueError, match="kind"):
        module.fast_path("no such kind", good)
    kinds = ("activation", "activation_backward", "row_function", "row_function_backward", "loss", "row_loss", "update")
    for kind in kinds:
        for bad in (None, 0, {}):
            with pytest.raises(TypeError, match="formula"):
                module.fast_path(kind, bad)
        for number in (-1, 99):
            with pytest.raises(ValueError, match="number"):
                module.fast_path(kind, module.formula(number, 0.0, False, False, False))
        with pytest.raises(TypeError, match="arguments expected"):
            module.fast_path(kind, good)()
    for kind in ("linear", "linear_backward"):
        for bad in (None, good, {"tanh": 0}):
            with pytest.raises(TypeError, match="formula"):
                module.fast_path(kind, bad)
        with pytest.raises(ValueError, match="number"):
            module.fast_path(kind, {"tanh": module.formula(99, 0.0, False, False, False)})
        with pytest.raises(TypeError, match="arguments expected"):
            module.fast_path(kind, {})()
