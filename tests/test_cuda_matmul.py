"""Every matmul kernel, forced, on awkward shapes and layouts; on the CPU, by tests/cuda_on_host."""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
ml_dtypes = pytest.importorskip("ml_dtypes")

import cupy  # noqa: E402

from cuda_on_host.device import COMPILER, HERE, ROOT, THREAD_ORDERS, HostDevice  # noqa: E402
from gemmlet.backends.cuda import device as cuda_device  # noqa: E402
from gemmlet.backends.cuda import matmul as cuda_matmul  # noqa: E402
from gemmlet.backends.cuda.matmul import Choice  # noqa: E402
from gemmlet.formulas.activations import ACTIVATIONS, Activation  # noqa: E402
from support import assert_within, same_bits  # noqa: E402

if shutil.which(COMPILER) is None:
    pytest.skip(f"there is no {COMPILER}", allow_module_level=True)

DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "tf32": np.float32,
}
# The largest relative error of rounding to it, and of one step of a sum.
ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-24}
STEP = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-23, "bfloat16": 2.0**-23, "tf32": 2.0**-23}

SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 257]
# Each size in each place; and whole tiles, more of them in a column than the eight that run together.
SHAPES = [(m, SIZES[(5 * i + 8) % 18], SIZES[(7 * i + 14) % 18]) for i, m in enumerate(SIZES)]
SHAPES += [(128, 256, 64), (288, 64, 128)]

RELU = ACTIVATIONS["relu"]


@pytest.fixture(params=DTYPES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def device() -> HostDevice:
    return HostDevice()


#
# Layouts: of NumPy's array, one on the device, among numbers that nobody may read
#


def _inside(array: Any, shape: tuple[int, int], view: Callable[[Any], Any]) -> Any:
    base = device().empty(shape, array.dtype)  # poisoned: NaN
    result = view(base)
    if array.size:
        device().view(result)[...] = array
    return result


def by_row(array: Any) -> Any:
    return _inside(array, array.shape, lambda base: base)


def by_column(array: Any) -> Any:
    return _inside(array, array.shape[::-1], lambda base: base.T)


def part_by_row(array: Any) -> Any:
    """Of longer rows, the start and the rows aligned: 16 bytes at a time, up to the edge and not over it."""
    rows, columns = array.shape
    return _inside(array, (rows + 1, -(-columns // 8) * 8 + 8), lambda base: base[1:, 8 : 8 + columns])


def part_by_column(array: Any) -> Any:
    return part_by_row(array.T).T


def misaligned(array: Any) -> Any:
    rows, columns = array.shape
    return _inside(array, (rows, columns + 1), lambda base: base[:, 1:])


def reversed_part(array: Any) -> Any:
    rows, columns = array.shape
    return _inside(array, (2 * columns, 3 * rows), lambda base: base[::-2, ::-3].T)


LAYOUTS = [by_row, by_column, part_by_row, part_by_column, misaligned, reversed_part]
# Each with each, and each as each operand with every shape, in some rounds.
LAYOUT_PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))


#
# Matmuls
#


def matmul(
    kind: str,
    a: Any,
    b: Any,
    bias: Any = None,
    activation: Activation | None = None,
    parameter: float = 0.0,
    choice: Choice | None = None,
    keep: bool = False,
    misplaced: bool = False,
) -> Any:
    """``activation(a @ b + bias)``; with `keep` also the preactivation; the results are misaligned if `misplaced`."""
    (m, _), (_, n) = a.shape, b.shape
    results = [device().empty((m * n + misplaced,), a.dtype)[misplaced:].reshape(m, n) for _ in range(1 + keep)]
    vector = None if bias is None else device().array(bias)
    z = results[1] if keep else None
    cuda_matmul.linear(device(), a, b, vector, activation, parameter, results[0], z, tf32=kind == "tf32", choice=choice)
    copies = [np.array(device().view(result)) for result in results]
    return tuple(copies) if keep else copies[0]


def choices(kind: str, a: Any, b: Any) -> Iterator[Choice]:
    """Every tile, once with whole sums and once with k in as many parts as there may be.

    But for what would be compiled to test the same again: the kernels of float16 differ from those of bfloat16 by one
    instruction, so one tile of a kernel does; and kernels of tensor cores are compiled for each pair of layouts, of
    which the ends of sums know nothing, so k is split where both operands are alike.
    """
    found: dict[tuple[Any, bool], Choice] = {}
    candidates = cuda_matmul.choose(device(), a, b, kind == "tf32")
    smallest = min((choice.tile for choice in candidates), key=lambda tile: tile.rows * tile.columns)
    alike = (a.strides[1] == a.itemsize) == (b.strides[1] == b.itemsize)
    for choice in candidates:
        key = choice.tile, choice.splits > 1
        if kind == "float16" and choice.tile.kernel != "wgmma" and choice.tile != smallest:
            continue
        if choice.tile.kernel in ("mma", "wgmma") and choice.splits > 1 and not alike:
            continue
        if key not in found or choice.splits > found[key].splits:
            found[key] = choice
    yield from found.values()


def integers(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Any:
    """Small enough for all sums to be exact, also when rounded to 16 bits."""
    largest = 1 if np.dtype(DTYPES[kind]).itemsize == 2 else 5
    return rng.integers(-largest, largest + 1, shape).astype(DTYPES[kind])


def f64(array: Any) -> Any:
    return array.astype(np.float64)


@pytest.mark.parametrize("turn", range(2))
def test_sums_of_integers_are_exact(kind: str, turn: int, rng: np.random.Generator) -> None:
    pairs = itertools.cycle(LAYOUT_PAIRS[turn::2])
    for m, n, k in SHAPES:
        a, b, bias = integers(rng, (m, k), kind), integers(rng, (k, n), kind), integers(rng, (n,), kind)
        exact = (f64(a) @ f64(b) + f64(bias)).astype(np.float32).astype(a.dtype)
        for _ in range(3):
            a_layout, b_layout = next(pairs)
            x, w = a_layout(a), b_layout(b)
            for choice in choices(kind, x, w):
                result = matmul(kind, x, w, bias, choice=choice, misplaced=bool(turn))
                assert same_bits(result, exact), (m, n, k, a_layout.__name__, b_layout.__name__, choice)


def test_matmuls_of_few_rows_or_columns(kind: str, rng: np.random.Generator) -> None:
    for few, many, k in [(1, 257, 2049), (2, 31, 600), (3, 65, 1023), (4, 130, 33), (1, 1, 5000), (4, 3, 0)]:
        for m, n in ((few, many), (many, few)):
            a, b, bias = integers(rng, (m, k), kind), integers(rng, (k, n), kind), integers(rng, (n,), kind)
            exact = (f64(a) @ f64(b) + f64(bias)).astype(np.float32).astype(a.dtype)
            for a_layout, b_layout in [(by_row, by_row), (by_column, by_column), (misaligned, reversed_part)]:
                x, w = a_layout(a), b_layout(b)
                for choice in choices(kind, x, w):
                    result = matmul(kind, x, w, bias, choice=choice)
                    assert same_bits(result, exact), (m, n, k, a_layout.__name__, b_layout.__name__, choice)


def tf32(x: Any) -> Any:
    """Rounded to 10 bits after the point, ties away from zero."""
    mantissa, exponent = np.frexp(f64(x))
    scaled = np.abs(mantissa) * 2.0**11
    return np.ldexp(np.sign(mantissa) * np.floor(scaled + 0.5), exponent - 11)


def test_error_of_a_sum(kind: str, rng: np.random.Generator) -> None:
    for m, n, k in [(70, 132, 777), (3, 67, 2000), (40, 24, 1)]:
        a, b = rng.normal(size=(m, k)).astype(DTYPES[kind]), rng.normal(size=(k, n)).astype(DTYPES[kind])
        bias = rng.normal(size=n).astype(DTYPES[kind])
        # TF32 is no faster where the time goes into reading.
        a_, b_ = (tf32(a), tf32(b)) if kind == "tf32" and m > 4 else (f64(a), f64(b))
        exact = a_ @ b_ + f64(bias)
        # Every sum has k steps and one for the bias, and is rounded at its end; float64 has an error of its own.
        bound = (k + 1) * (STEP[kind] + 2.0**-53) * (abs(a_) @ abs(b_) + abs(f64(bias))) + ROUNDING[kind] * abs(exact)
        x, w = by_row(a), by_column(b)
        for choice in choices(kind, x, w):
            assert_within(f64(matmul(kind, x, w, bias, choice=choice)), exact, 1.01 * bound)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_that_of_the_preactivation_as_rounded(name: str, rng: np.random.Generator) -> None:
    activation = ACTIVATIONS[name]
    for kind in ("float32", "float64", "float16", "bfloat16"):
        a, b = (0.5 * rng.normal(size=shape) for shape in ((33, 9), (9, 40)))
        a, b = a.astype(DTYPES[kind]), b.astype(DTYPES[kind])
        x, w = by_row(a), by_row(b)
        whole, split = (next(c for c in (*choices(kind, x, w), None) if c is None or c.splits == s) for s in (1, 2))
        for choice in {whole, split}:
            y, z = matmul(kind, x, w, None, activation, activation.default, choice, keep=True)
            assert same_bits(y, matmul(kind, x, w, None, activation, activation.default, choice))
            assert_within(f64(z), f64(a) @ f64(b), 20 * ROUNDING[kind] * (abs(f64(a)) @ abs(f64(b))))
            # Formulas are computed in float at least; what they cost there, test_accuracy.py measures.
            parameter = activation.default if kind == "float64" else float(np.float32(activation.default))
            exact = activation.forward(f64(z), parameter)
            relative = 32 * ROUNDING["float64" if kind == "float64" else "float32"] + ROUNDING[kind]
            assert_within(
                f64(y), exact, relative * np.maximum(abs(exact), activation.forward_accuracy.floor) + 2.0**-25
            )


def test_special_values(kind: str, rng: np.random.Generator) -> None:
    """As in the sum written out; what is beyond the edge of a matrix adds nothing, not even to infinity."""
    for m, n, k in [(5, 7, 3), (33, 17, 40), (1, 20, 70)]:
        a, b = f64(integers(rng, (m, k), kind)), f64(integers(rng, (k, n), kind))
        a[rng.integers(0, m), :: max(k // 2, 1)] = np.inf
        a[rng.integers(0, m), k - 1] = np.nan
        b[0, rng.integers(0, n)] = -np.inf
        b[k - 1, rng.integers(0, n)] = 0
        with np.errstate(invalid="ignore"):
            exact = np.stack([np.sum(row[:, None] * b, axis=0) for row in a]).astype(DTYPES[kind])
        for a_layout, b_layout in [(by_row, by_row), (by_column, by_column), (misaligned, misaligned)]:
            x, w = a_layout(a.astype(DTYPES[kind])), b_layout(b.astype(DTYPES[kind]))
            for choice in choices(kind, x, w):
                assert same_bits(matmul(kind, x, w, choice=choice), exact), (m, n, k, choice)


def test_tf32_rounds_to_nearest_and_keeps_what_is_special() -> None:
    ulp = 2.0**-10
    rows = [1 + ulp / 2, 1 + 3 * ulp / 2, -1 - ulp / 2, 1 + ulp / 2 - 2.0**-23, np.inf, -np.inf, np.nan, 2.0**-130]
    a = np.array(rows, np.float32)[:, None].repeat(2, 1)
    b = np.array([[1.0], [0.0]], np.float32).repeat(8, 1)
    with np.errstate(invalid="ignore"):
        expected = [1 + ulp, 1 + 2 * ulp, -1 - ulp, 1, np.nan, np.nan, np.nan, 2.0**-130]
    for layout in (by_row, by_column):
        x, w = layout(a), layout(b)
        for choice in choices("tf32", x, w):
            result = matmul("tf32", x, w, choice=choice)
            assert same_bits(result[:, 0], np.array(expected, np.float32)), choice


def test_zero_strides(kind: str, rng: np.random.Generator) -> None:
    """One row for all, one column for all, one number for all."""
    a, b = integers(rng, (1, 40), kind), integers(rng, (40, 1), kind)
    for a_shape, b_shape in [((33, 40), (40, 21)), ((1, 40), (40, 21)), ((33, 40), (40, 1))]:
        x, w = by_row(a), by_row(b)
        x = cupy.ndarray(a_shape, x.dtype, x.data, strides=(0, x.itemsize))
        w = cupy.ndarray(b_shape, w.dtype, w.data, strides=(w.itemsize, 0))
        exact = np.broadcast_to((f64(a) @ f64(b)).astype(a.dtype), (a_shape[0], b_shape[1]))
        for choice in choices(kind, x, w):
            assert same_bits(matmul(kind, x, w, choice=choice), exact), choice
    x = cupy.ndarray((5, 40), x.dtype, x.data, strides=(0, 0))
    exact = (f64(a[0, 0]) * np.sum(f64(b))).astype(np.float32).astype(a.dtype)
    for choice in choices(kind, x, w):
        assert np.all(matmul(kind, x, w, choice=choice) == exact), choice


def test_same_bits_in_every_order_of_threads(kind: str, rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(70, 300)).astype(DTYPES[kind]), rng.normal(size=(300, 45)).astype(DTYPES[kind])
    skinny = rng.normal(size=(300, 2)).astype(DTYPES[kind])
    pairs = [(by_row(a), by_column(b)), (misaligned(a), by_row(b)), (by_column(a), by_row(skinny))]
    for x, w in pairs:
        for choice in choices(kind, x, w):
            results = []
            try:
                for order in THREAD_ORDERS:
                    device().thread_order = order
                    results.append(matmul(kind, x, w, choice=choice))
            finally:
                device().thread_order = "forward"
            assert all(same_bits(results[0], other) for other in results[1:]), choice


def test_empty_results_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device(), "launch", None)
    for m, n in [(0, 3), (3, 0), (0, 0)]:
        matmul("float32", by_row(np.ones((m, 2), np.float32)), by_row(np.ones((2, n), np.float32)))


def test_too_large_a_dimension_is_named() -> None:
    one = device().empty((1,), np.float32)
    for m, n, k in itertools.permutations([cuda_matmul.LARGEST + 1, 2, 2]):
        x = cupy.ndarray((m, k), np.float32, one.data, strides=(0, 0))
        w = cupy.ndarray((k, n), np.float32, one.data, strides=(0, 0))
        with pytest.raises(ValueError, match=rf"x \({m}, {k}\) @ w \({k}, {n}\).*{cuda_matmul.LARGEST}"):
            cuda_matmul.linear(device(), x, w, None, None, 0.0, one, None)


#
# What is chosen
#


def all_tiles() -> Iterator[tuple[str, cuda_matmul.Tile]]:
    for kind, dtype in DTYPES.items():
        for tile in cuda_matmul.tiles(np.dtype(dtype).name, kind == "tf32", "host"):
            yield np.dtype(dtype).name, tile


def test_python_and_cpp_agree_on_tiles() -> None:
    cpp = {"float32": "float", "float64": "double", "float16": "gemmlet::float16", "bfloat16": "gemmlet::bfloat16"}
    lines = ['#include "cuda_host.h"', '#include "cuda/matmul/simt.cuh"', '#include "cuda/matmul/mma.cuh"']
    lines += ['#include "cuda/matmul/skinny.cuh"', '#include "cuda/matmul/wgmma.cuh"']
    for dtype, tile in all_tiles():
        numbers = ", ".join(map(str, tile.parameters))
        name = f"gemmlet::{tile.kernel.title()}Tile<{cpp[dtype]}, {numbers}>"
        lines.append(f"static_assert({name}::threads == {tile.threads} && {name}::shared_bytes == {tile.shared});")
    for dtype, along_lines in itertools.product(cpp, (True, False)):
        lines_of_block = cuda_matmul.skinny_lines(dtype, along_lines)
        lines.append(
            f"static_assert(gemmlet::skinny_lines<{cpp[dtype]}>({str(along_lines).lower()}) == {lines_of_block});"
        )
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-x", "c++", f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-"]
    done = subprocess.run(command, input="\n".join(lines), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("arch", "kib"), [("sm_80", 163), ("sm_86", 99), ("sm_90a", 227), ("sm_999", 99)])
def test_tiles_fit_into_shared_memory(arch: str, kib: int) -> None:
    for kind, dtype in DTYPES.items():
        for m, n, k in [(4096, 4096, 4096), (64, 128, 784), (784, 128, 60000), (100000, 10, 128)]:
            found = cuda_matmul.candidates(
                m, n, k, np.dtype(dtype).name, kind == "tf32", (32, 32), arch, 132, (False, False)
            )
            assert found
            assert all(choice.tile.shared <= 1024 * kib for choice in found)


def test_wgmma_is_chosen_where_it_is() -> None:
    for dtype, arch, along_lines, there in [
        ("bfloat16", "sm_90a", (False, True), True),
        ("float16", "sm_90a", (True, True), True),
        ("float32", "sm_90a", (False, True), True),
        ("float32", "sm_90a", (True, False), True),
        ("float32", "sm_90a", (True, True), False),
        ("bfloat16", "sm_90a", None, False),
        ("bfloat16", "sm_80", (False, True), False),
        ("bfloat16", "sm_100a", (False, True), False),
    ]:
        found = cuda_matmul.candidates(4096, 4096, 4096, dtype, dtype == "float32", (32, 32), arch, 132, along_lines)
        kernels = [choice.tile.kernel for choice in found]
        assert ("wgmma" in kernels) == there
        assert kernels[0] == ("wgmma" if there else "mma")


def test_what_no_tensor_map_can_be_of_is_left_to_others() -> None:
    x = by_row(np.ones((64, 64), np.float16))

    def views(shape: tuple[int, int], strides: tuple[int, int], offset: int = 0) -> Any:
        return cupy.ndarray(shape, x.dtype, x.data + offset, strides=strides)

    for view, there in [
        (x, True),
        (x.T, True),
        (x[:, :40], True),
        (x[1:, 8:], True),
        (x.T[:, :1], True),  # contiguous, and no next row
        (x[:, 1:], False),  # misaligned
        (x[:, ::2], False),
        (x[::-1], False),
        (views((8, 64), (0, 2)), False),  # one row for all
        (views((64, 60), (72, 2)), False),  # rows of no multiple of 16 bytes
        (views((8, 64), (16, 2)), False),  # overlapping windows
    ]:
        k = view.shape[1]
        w = by_row(np.ones((k, 64), np.float16))
        kernels = {choice.tile.kernel for choice in cuda_matmul.choose(device(), view, w)}
        assert ("wgmma" in kernels) == there, (view.shape, view.strides)


def test_tensor_maps_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is asked for, by a library that only looks at it."""
    calls: list[tuple[Any, ...]] = []

    class Driver:
        @staticmethod
        def cuTensorMapEncodeTiled(to: Any, *arguments: Any) -> int:  # noqa: N802 - CUDA's name
            assert ctypes.cast(to, ctypes.c_void_p).value % 64 == 0
            ctypes.memset(to, len(calls) + 1, 128)
            calls.append(
                tuple(getattr(a, "value", None) or [*a] if hasattr(a, "__len__") else a.value for a in arguments)
            )
            return 0 if len(calls) < 3 else 1

    monkeypatch.setattr(cuda_device, "_driver", Driver)
    cuda_device.CudaDevice.tensor_map.cache_clear()
    try:
        made = [cuda_device.CudaDevice.tensor_map(4096, "uint16", (70, 40), 96, (128, 64)) for _ in range(2)]
        assert [bytes(m) for m in made] == [b"\1" * 128] * 2
        assert calls == [(1, 2, 4096, [40, 70], [96], [64, 128], [1, 1], 0, 3, 3, 0)]
        assert bytes(cuda_device.CudaDevice.tensor_map(4096, "tf32", (70, 40), 160, (128, 32))) == b"\2" * 128
        assert calls[1][0] == 11
        with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled of \(70, 40\) at 0x1000.*error 1"):
            cuda_device.CudaDevice.tensor_map(4096, "uint32", (70, 40), 160, (128, 32))
    finally:
        cuda_device.CudaDevice.tensor_map.cache_clear()


def test_no_part_of_k_is_empty() -> None:
    for k in (1, 7, 63, 64, 65, 784, 1000, 60000):
        for choice in cuda_matmul.candidates(40, 50, k, "float32", False, (32, 32), "sm_90a", 132, None):
            k_blocks = -(-k // choice.tile.k_block)
            steps = -(-k_blocks // choice.splits)
            assert steps * (choice.splits - 1) < k_blocks <= steps * choice.splits


def test_expressions_are_all_that_is_launched(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    known = {(source, name) for source, names in cuda_matmul.expressions().items() for name in names}
    launched: set[tuple[str, str]] = set()

    def prepare(source: str, name: str, *_: Any) -> Callable[..., None]:
        launched.add((source, name))
        return lambda *_: None

    monkeypatch.setattr(device(), "prepare", prepare)
    for kind in DTYPES:
        for layouts in LAYOUT_PAIRS[::3]:
            for m, n, k in [(70, 80, 300), (3, 80, 300)]:
                x, w = layouts[0](integers(rng, (m, k), kind)), layouts[1](integers(rng, (k, n), kind))
                for choice in choices(kind, x, w):
                    matmul(kind, x, w, None, RELU, choice=choice)
    assert launched <= known
