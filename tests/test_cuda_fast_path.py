"""The fast paths of the CUDA backend: the general path's bits, and every unusual argument is left to it."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
import cupy
import ml_dtypes

import cuda_on_host.backend
from cuda_on_host.backend import to_cpu, to_gpu
from cuda_on_host.device import HostDevice
from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.backends.cuda import compiler
from gemmlet.backends.cuda import device as cuda_device
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.backends.cuda.device import CudaDevice
from support import FAST_PATHS, UPDATED, Watched, arguments_of, complaint

BACKEND = cuda_on_host.backend.load()

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

ELEMENTWISE = [name for name in kernels.__all__ if name not in ("matmul", "linear", "linear_backward")]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Watched]:
    """The fast paths, watched."""
    functions = {name: Watched(function) for name, function in BACKEND.fast_paths.items()}
    monkeypatch.setattr(BACKEND, "fast_paths", functions)
    return functions


@pytest.fixture(params=list(DTYPES.values()), ids=list(DTYPES))
def any_dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return np.dtype(request.param)


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, copied to the GPU."""
    return {k: to_gpu(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def outcome(name: str, arguments: dict[str, Any]) -> list[Any]:
    """Results and updated arrays, as NumPy arrays."""
    returned = getattr(kernels, name)(**arguments)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    results += [arguments.get(argument) for argument in UPDATED]
    return [to_cpu(r) if isinstance(r, cupy.ndarray) else np.asarray(r) for r in results if r is not None]


def general(name: str, arguments: dict[str, Any]) -> list[Any]:
    """The result without fast paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BACKEND, "fast_paths", MappingProxyType({}))
        return outcome(name, arguments)


def same(got: list[Any], expected: list[Any]) -> bool:
    return len(got) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(got, expected, strict=True)
    )


def arrays_in(arguments: dict[str, Any]) -> list[str]:
    return [key for key, value in arguments.items() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("name", kernels.__all__)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 10)], ids=str)
def test_same_bits_as_the_general_path(name: str, shape: Any, any_dtype: Any, watched: Any, rng: Any) -> None:
    arguments = arguments_of(name, rng, any_dtype, *shape)
    got = outcome(name, moved(arguments))
    assert watched[FAST_PATHS[name]].answered == 1
    assert same(got, general(name, moved(arguments)))


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if not n.endswith("_update") and n != "linear_backward"])
def test_outputs(name: str, watched: Any, rng: Any) -> None:
    """`out` apart from everything and, of elementwise functions, on each input."""
    arguments = arguments_of(name, rng, np.float32, 6, 8)
    expected = general(name, moved(arguments))
    given = moved(arguments)
    result = getattr(kernels, name)(**given, out=(out := to_gpu(np.full_like(expected[-1], 99))))
    assert (result[-1] if isinstance(result, tuple) else result) is out
    assert same([to_cpu(out)], expected[-1:])
    assert watched[FAST_PATHS[name]].answered == 1
    if name in ELEMENTWISE:
        for key in arrays_in(arguments):
            if arguments[key].shape == expected[-1].shape:
                given = moved(arguments)
                getattr(kernels, name)(**given, out=given[key])
                assert same([to_cpu(given[key])], expected[-1:]), key
        assert watched[FAST_PATHS[name]].left == 0


def layouts(array: np.ndarray) -> Iterator[Callable[[], Any]]:
    """A matrix on the GPU: as it is, transposed in memory, with gaps, and not at a multiple of 16 bytes."""
    yield lambda: to_gpu(array)
    yield lambda: to_gpu(np.asfortranarray(array))
    yield lambda: to_gpu(np.repeat(array, 2, axis=1))[:, ::2]
    yield lambda: to_gpu(np.concatenate([array.ravel()[:1], array.ravel()]))[1:].reshape(array.shape)


@pytest.mark.parametrize("b", [False, True])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
def test_layers(activation: str | None, b: bool, any_dtype: Any, watched: Any, rng: Any) -> None:
    """Matrices of any strides; the numbers before the activation; and skinny ones."""
    for m, k, n in [(9, 16, 8), (70, 5, 3), (1, 300, 24), (3, 40, 65)]:
        x, w, bias = (rng.normal(size=shape).astype(any_dtype) for shape in ((m, k), (k, n), (n,)))
        for (of_x, of_w), keep in zip(
            itertools.product(layouts(x), layouts(w)), itertools.cycle((False, True)), strict=False
        ):
            given = [
                {"x": of_x(), "w": of_w(), "b": to_gpu(bias) if b else None, "activation": activation}
                | {"return_preactivation": keep}
                for _ in range(2)
            ]
            assert same(outcome("linear", given[0]), general("linear", given[1]))
    assert watched["linear"].left == 0


@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
def test_gradients_of_layers(activation: str | None, any_dtype: Any, watched: Any, rng: Any) -> None:
    for m, k, n in [(9, 16, 8), (1030, 5, 3), (4, 6, 1), (2100, 2, 9)]:
        grad_y, saved, x, w = (rng.normal(size=s).astype(any_dtype) for s in ((m, n), (m, n), (m, k), (k, n)))
        needs = itertools.cycle(itertools.product((False, True), repeat=3))
        for (of_x, of_w), (need_x, need_w, need_b) in zip(
            itertools.product(layouts(x), layouts(w)), needs, strict=False
        ):
            given = [
                {"grad_y": to_gpu(grad_y), "x": of_x() if need_w else None, "w": of_w() if need_x else None}
                | {"y": to_gpu(saved), "z": to_gpu(saved), "activation": activation}
                | {"need_x": need_x, "need_w": need_w, "need_b": need_b}
                for _ in range(2)
            ]
            assert same(outcome("linear_backward", given[0]), general("linear_backward", given[1]))
    assert watched["linear_backward"].left == 0


def test_layers_that_are_unusual(watched: Any, rng: Any) -> None:
    """The errors of the general path, and what it computes."""
    x, w, g = (to_gpu(rng.normal(size=s).astype(np.float32)) for s in ((6, 8), (8, 4), (6, 4)))
    calls: list[Callable[[], Any]] = [
        lambda: kernels.linear(x, w, activation="no such"),
        lambda: kernels.linear(x, w, activation=3),
        lambda: kernels.linear(x, w, return_preactivation=1),
        lambda: kernels.linear(x, w.T),
        lambda: kernels.linear_backward(g, x, w, None, "tanh"),
        lambda: kernels.linear_backward(g, x, w, g, "silu"),
        lambda: kernels.linear_backward(g, x, w, g, "no such"),
        lambda: kernels.linear_backward(g, x, w, need_x=1),
        lambda: kernels.linear_backward(g, None, w),
        lambda: kernels.linear_backward(g, x, None),
        lambda: kernels.linear_backward(g, x, x),
        lambda: kernels.linear_backward(g, w, w),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)):
            call()
    expected = kernels.linear(x, w, activation="elu")
    assert watched["linear"].answered == 1
    assert same([to_cpu(kernels.linear(x, w, activation="elu", activation_parameter=1.0))], [to_cpu(expected)])
    assert watched["linear"].answered == 1
    assert watched["linear_backward"].answered == 0


class Subclass(cupy.ndarray):
    pass


def unusual_arrays(good: np.ndarray) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the fast paths shall leave alone, or make an error of, by how it is made."""
    other = np.float64 if good.dtype == np.float32 else np.float32
    yield "another dtype", lambda: to_gpu(good.astype(other))
    yield "another shape", lambda: to_gpu(np.concatenate([good, good]))
    yield "more dimensions", lambda: to_gpu(good[None])
    yield "empty", lambda: to_gpu(good[:0])
    yield "on the CPU", good.copy
    yield "missing", lambda: None
    yield "a list", good.tolist
    yield (
        "in the middle of 16 bytes",
        lambda: to_gpu(np.concatenate([good.ravel()[:1], good.ravel()]))[1:].reshape(good.shape),
    )
    yield "with gaps", lambda: to_gpu(np.repeat(good, 2, axis=-1))[..., ::2]
    yield "reversed", lambda: to_gpu(np.ascontiguousarray(good[::-1]))[::-1]

    def subclass() -> Any:
        kept = to_gpu(good)
        return Subclass(good.shape, good.dtype, memptr=kept.data)

    yield "a subclass", subclass
    if hasattr(BACKEND._first, "view"):
        # There is no such GPU: nothing may be launched on it.
        yield "on another GPU", lambda: HostDevice(number=1).array(good)


@pytest.mark.parametrize("name", kernels.__all__)
def test_unusual_arrays(name: str, watched: Any, rng: Any) -> None:
    """The same result, or the same error, as by the general path."""
    good = arguments_of(name, rng, np.float32, 6, 8)
    matmul = name not in ELEMENTWISE
    for key in arrays_in(good):
        for what, make in unusual_arrays(good[key]):
            if what == "on another GPU" and len(arrays_in(good)) == 1:
                continue
            answered = watched[FAST_PATHS[name]].answered
            mine, theirs = moved(good) | {key: make()}, moved(good) | {key: make()}
            got = complaint(lambda m=mine: outcome(name, m))
            left = watched[FAST_PATHS[name]].answered == answered
            expected = complaint(lambda t=theirs: general(name, t))
            label = f"{key}: {what}"
            if isinstance(expected, tuple):
                assert got == expected, label
                assert left, label
            else:
                assert isinstance(got, list), f"{label}: {got}"
                assert same(got, expected), label
            if what == "a subclass" or (not matmul and what in ("with gaps", "reversed", "in the middle of 16 bytes")):
                assert left, label


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if not n.endswith("_update") and n != "linear_backward"])
def test_unusual_outputs(name: str, watched: Any, rng: Any) -> None:
    """Those of `unusual_arrays`, and such that overlap an input in part: written as by the general path, or refused."""
    good = arguments_of(name, rng, np.float32, 8, 8)
    result = general(name, moved(good))[-1]
    for what, make in unusual_arrays(result):
        if what == "missing":
            continue
        mine, theirs = moved(good) | {"out": make()}, moved(good) | {"out": make()}
        got = complaint(lambda m=mine: outcome(name, m))
        expected = complaint(lambda t=theirs: general(name, t))
        assert got == expected if isinstance(expected, tuple) else same(got, expected), what
        assert watched[FAST_PATHS[name]].answered == 0, what
    for key in arrays_in(good):
        memory = np.zeros(good[key].size + result.size, np.float32)
        if good[key].dtype != np.float32:
            continue
        memory[: good[key].size] = good[key].ravel()
        for start in (4, good[key].size - 4):
            runs = []
            for run in (outcome, general):
                both = to_gpu(memory)
                array = both[: good[key].size].reshape(good[key].shape)
                out = both[start : start + result.size].reshape(result.shape)
                runs.append(complaint(lambda r=run, a=array, o=out, k=key: r(name, moved(good) | {k: a, "out": o})))
            assert runs[0] == runs[1] if isinstance(runs[1], tuple) else same(runs[0], runs[1]), key
            # What a gradient is not computed from may be written to.
            assert watched[FAST_PATHS[name]].answered == 0 or name.endswith("_backward"), key


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if n.endswith("_update")])
def test_updates_refuse_shared_memory(name: str, watched: Any, rng: Any) -> None:
    good = arguments_of(name, rng, np.float32, 6, 8)
    for one, other in itertools.permutations(arrays_in(good), 2):
        given = moved(good)
        given[one] = given[other]
        with pytest.raises(ValueError, match="overlaps"):
            getattr(kernels, name)(**given)
    assert watched[FAST_PATHS[name]].answered == 0


def test_numbers(watched: Any) -> None:
    x = np.linspace(-2, 2, 9).astype(np.float32)
    for number in (0.25, 1, np.float32(0.5)):
        given = {"x": to_gpu(x), "alpha": number}
        assert same(outcome("elu", given), general("elu", given))
    assert (watched["elu"].answered, watched["elu"].left) == (1, 2)
    for bad in (0.0, -1.0, float("inf"), float("nan"), "1", None, True, 1e39):
        with pytest.raises((TypeError, ValueError), match="alpha"):
            kernels.elu(to_gpu(x), bad)
    # A loss takes what float32 does not hold.
    huge = [{"p": to_gpu(x), "targets": to_gpu(0 * x), "delta": 1e39} for _ in range(2)]
    with np.errstate(over="ignore"):
        assert same(outcome("huber", huge[0]), general("huber", huge[1]))
    assert watched["huber"].answered == 0


def test_labels(watched: Any) -> None:
    z, labels = np.arange(16, dtype=np.float32).reshape(4, 4), np.array([0, 1, 2, 3])
    expected = general("softmax_cross_entropy", {"logits": to_gpu(z), "labels": to_gpu(labels)})
    for given in (labels, labels.astype(np.int32), labels.astype(np.uint8)):
        assert same(outcome("softmax_cross_entropy", {"logits": to_gpu(z), "labels": to_gpu(given)}), expected)
    assert watched["softmax_cross_entropy"].answered == 1
    for bad in ([0, 1, 2, 4], [0, -1, 2, 1], [2**62, 0, 0, 0], [-(2**63), 0, 0, 0]):
        out = to_gpu(z)
        with pytest.raises(ValueError, match="labels must lie within"):
            kernels.softmax_cross_entropy(to_gpu(z), to_gpu(np.array(bad)), out=out)
        assert np.array_equal(to_cpu(out), z)
    for bad in (-0.1, 1.5, float("nan"), "0"):
        with pytest.raises((TypeError, ValueError), match="label_smoothing"):
            kernels.softmax_cross_entropy(to_gpu(z), to_gpu(labels), label_smoothing=bad)
    # The gradient over the memory of the labels.
    memory = to_gpu(np.concatenate([labels.view(np.float32), z.ravel()[8:]]))
    over = cupy.ndarray((4,), np.int64, memptr=memory.data)
    loss, _ = kernels.softmax_cross_entropy(to_gpu(z), over, out=memory.reshape(4, 4))
    assert loss == expected[0]
    assert same([to_cpu(memory).reshape(4, 4)], expected[1:])
    assert watched["softmax_cross_entropy"].answered == 1


def test_probabilities_out_of_range() -> None:
    for bad in (-0.5, 1.5):
        p, out = np.array([0.5, bad], np.float32), to_gpu(np.full(2, 7, np.float32))
        with pytest.raises(ValueError, match=r"must lie within \[0, 1\]"):
            kernels.binary_cross_entropy(to_gpu(p), to_gpu(np.ones_like(p)), out=out)
        assert np.all(to_cpu(out) == 7)


@pytest.mark.skipif(not hasattr(BACKEND._first, "view"), reason="a GPU is late by itself")
def test_what_is_not_waited_for_is_not_read(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does nothing before it is waited for gives the same losses."""

    class Late(HostDevice):
        def __init__(self) -> None:
            super().__init__()
            self.queue: list[Callable[[], None]] = []

        def _do(self, work: Callable[[], None]) -> None:
            self.queue.append(work)

        def synchronize(self) -> None:
            for work in self.queue:
                work()
            self.queue.clear()

    names = [n for n in kernels.__all__ if n.endswith(("entropy", "logits", "error")) or n == "huber"]
    given = {name: arguments_of(name, rng, np.float32, 6, 8) for name in names}
    expected = {name: general(name, moved(arguments)) for name, arguments in given.items()}
    late = Late()
    backend = CudaBackend([late])
    monkeypatch.setitem(select._loaded, "cuda", backend)
    for _ in range(2):
        for name, arguments in given.items():
            loss, gradient = getattr(kernels, name)(
                **{k: late.array(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
            )
            assert loss == expected[name][0], name
            assert same([np.array(late.view(gradient))], expected[name][1:]), name


# What the driver is called with, by the real device on a driver that is none.


def test_arguments_are_where_the_pointers_say() -> None:
    packing, offsets = cuda_device._packing(("Q", "f", "Qqi", "5s", "i"))
    memory, pointers, address = cuda_device._memory_for(packing.size, offsets)
    packing.pack_into(memory, 0, 2**63 + 5, 1.5, 7, -9, 11, b"bytes", -2)
    assert all(offset % 8 == 0 for offset in offsets)
    assert address == ctypes.addressof(pointers)
    found = [ctypes.string_at(int(pointer), size) for pointer, size in zip(pointers, (8, 4, 20, 5, 4), strict=True)]
    expected = [np.uint64(2**63 + 5), np.float32(1.5), np.array([7, -9], np.int64), b"bytes", np.int32(-2)]
    expected[2] = expected[2].tobytes() + np.int32(11).tobytes()
    assert found == [bytes(value) if isinstance(value, bytes) else value.tobytes() for value in expected]


class Driver:
    """CuPy's part of a launch: two GPUs, and a note of what was launched where."""

    def __init__(self) -> None:
        self.current = threading.local()
        self.contexts: set[tuple[int, int]] = set()
        self.launches: list[tuple[Any, ...]] = []
        self.fails = False
        driver = self

        class Device:
            def __init__(self, number: int) -> None:
                self.number, self.compute_capability = number, "90"

            def __enter__(self) -> None:
                self.before, driver.current.gpu = driver.gpu(), self.number

            def __exit__(self, *_: object) -> None:
                driver.current.gpu = self.before

        class Module:
            def load(self, image: bytes) -> None:
                """Nothing is in it."""

            def get_function(self, name: str) -> Any:
                return SimpleNamespace(ptr=4711)

        runtime = SimpleNamespace(
            getDeviceCount=lambda: 2,
            getDeviceProperties=lambda number: {"name": b"Some GPU", "multiProcessorCount": 3, "major": 8},
            getDevice=self.gpu,
            memGetInfo=lambda: self.contexts.add((threading.get_ident(), self.gpu())),
            CUDARuntimeError=RuntimeError,
            driverGetVersion=lambda: 12030,
            streamPerThread=2,
        )
        self.streams = {0: 0, 1: 77}
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=Device,
            Module=Module,
            get_current_stream=lambda number: SimpleNamespace(ptr=self.streams[number]),
            driver=SimpleNamespace(launchKernel=self.launch, funcSetAttribute=lambda *a: self.attributes.append(a)),
        )
        self.attributes: list[tuple[int, ...]] = []

    def gpu(self) -> int:
        return getattr(self.current, "gpu", 0)

    def launch(self, function: int, *numbers: int) -> None:
        assert (threading.get_ident(), self.gpu()) in self.contexts, "no context"
        if self.fails:
            raise RuntimeError("no launch")
        *configuration, pointers, extra = numbers
        assert extra == 0
        first, second = (ctypes.c_uint64 * 2).from_address(pointers)
        values = ctypes.c_int64.from_address(first).value, ctypes.c_float.from_address(second).value
        self.launches.append((self.gpu(), function, *configuration, *values))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(compiler, "import_cupy", lambda: made)
    monkeypatch.setattr(compiler, "cubin", lambda source, names, arch: SimpleNamespace(image=b"", names={"k": "k"}))
    return made


def test_a_prepared_launch(driver: Driver) -> None:
    """On the device's GPU and its current stream, with the thread's context, whichever GPU is current."""
    launches = [CudaDevice(number).prepare("a.cuh", "k", ("q", "f"), 64, 100_000) for number in range(2)]
    assert [attribute[1:] for attribute in driver.attributes] == [(8, 100_000)] * 2

    def both() -> None:
        for number, launch in enumerate(launches):
            launch(5, 6, -number, 0.5)
        assert driver.gpu() == 0

    both()
    expected = [(n, 4711, 5, 6, 1, 64, 1, 1, 100_000, (0, 77)[n], -n, 0.5) for n in range(2)]
    assert driver.launches == expected
    thread = threading.Thread(target=both)
    thread.start()
    thread.join()
    assert driver.launches == 2 * expected
    assert len(driver.contexts) == 4


def test_a_prepared_launch_goes_on_after_an_error(driver: Driver) -> None:
    launch = CudaDevice(0).prepare("a.cuh", "k", ("q", "f"), 64)
    driver.fails = True
    with pytest.raises(RuntimeError, match="no launch"):
        launch(1, 1, 1, 0.5)
    with pytest.raises(Exception, match="pack_into expected"):
        launch(1, 1, 1)
    driver.fails = False
    launch(1, 1, 2, 0.25)
    assert [numbers[-2:] for numbers in driver.launches] == [(2, 0.25)]


@pytest.mark.parametrize(("setting", "stream"), [("0", 0), ("1", 2)])
def test_the_null_stream_is_the_threads_own_where_cupy_has_it_so(
    setting: str, stream: int, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", setting)
    devices = [CudaDevice(number) for number in range(2)]
    for device in devices:
        device.prepare("a.cuh", "k", ("q", "f"), 64)(1, 1, 0, 0.0)
    assert [launch[9] for launch in driver.launches] == [device.stream() for device in devices] == [stream, 77]


def test_prepared_launches_of_many_threads_keep_their_arguments_apart(driver: Driver) -> None:
    """Memory for arguments is used by one call at a time, even if one is made within another."""
    within: list[int] = [2, 3]

    def launch_kernel(function: int, *numbers: int) -> None:
        if within:
            launch(1, 1, within.pop(), 0.5)
        driver.launch(function, *numbers)

    driver.cuda.driver.launchKernel = launch_kernel
    launch = CudaDevice(0).prepare("a.cuh", "k", ("q", "f"), 64)
    launch(1, 1, 1, 0.5)
    assert [numbers[-2] for numbers in driver.launches] == [2, 3, 1]
    driver.launches.clear()

    def work(start: int) -> None:
        for number in range(start, start + 200):
            launch(1, 1, number, 0.5)

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers[-2] for numbers in driver.launches) == [1000 * k + i for k in range(4) for i in range(200)]
