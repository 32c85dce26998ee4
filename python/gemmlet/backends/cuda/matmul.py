"""Matmuls on a GPU: which kernel computes one, from which tiles, and its launch."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..._arrays import name_of
from ...formulas.activations import ACTIVATIONS, Activation
from .device import BoxNumber, Device
from .types import COMPUTED, FLOATS, SIZES, address

# The kernels count lines and steps in an int, and look a little beyond the last one.
LARGEST = 2**31 - 1024

# What a source is compiled for, where that is not every architecture; "host" is the CPU, in tests.
ARCHITECTURES = {"matmul/wgmma.cuh": ("sm_90a", "host")}

# Of dynamic shared memory, for one block.
_SHARED_KIB = {"sm_80": 163, "sm_87": 163, "sm_90a": 227, "sm_100a": 227, "host": 227}
_MIN_SHARED_KIB = 99


@dataclass(frozen=True)
class Tile:
    """How a kernel divides a matmul among its blocks."""

    # The first three compute tiles, "skinny" matmuls with at most four rows or columns.
    kernel: Literal["simt", "mma", "wgmma", "skinny"]
    # Of the result, for a block.
    rows: int
    columns: int
    k_block: int  # steps of k in a K block
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    # Nanoseconds, about: a launch but for its steps of k; and what such a step costs a multiprocessor.
    start: float
    step: float
    busy: float  # blocks that keep a multiprocessor busy; fewer take as long
    parameters: tuple[int, ...]  # of the C++ template, after the type
    cluster: int = 1  # blocks that compute neighbouring tiles together
    transposed: bool = False  # whether the kernel computes the transpose, of the second operand and the first

    def __str__(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.parameters))}"


class Choice(NamedTuple):
    """A tile, and how many blocks share the sum for it."""

    tile: Tile
    splits: int


def simt(dtype: str, parameters: tuple[int, ...], start: float, step: float, busy: float = 1.0) -> Tile:
    """Return ``SimtTile<...>``."""
    rows, columns, k_block, thread_rows, thread_columns, slices, stages = parameters
    size = SIZES[dtype]
    pad = 16 // size
    threads = 32 * (rows // (4 * thread_rows)) * (columns // (8 * thread_columns)) * slices
    loading = stages * k_block * (rows + columns + 2 * pad)
    finishing = rows * (columns + pad) * slices // (thread_rows // pad if slices == 1 else 1)
    return Tile("simt", rows, columns, k_block, threads, max(loading, finishing) * size, start, step, busy, parameters)


def mma(dtype: str, parameters: tuple[int, ...], start: float, step: float, busy: float = 1.0) -> Tile:
    """Return ``MmaTile<...>``."""
    rows, columns, k_block, row_warps, column_warps, slices, stages = parameters
    size = SIZES[dtype]
    pad = 32 if size == 4 else 16

    def operand(lines: int) -> int:
        return max(lines * (k_block * size + 16), k_block * (lines * size + pad))

    stage = operand(rows) + operand(columns)
    threads = 32 * row_warps * column_warps * slices
    shared = max(stages * stage, slices * rows * (columns + 8) * 4)
    return Tile("mma", rows, columns, k_block, threads, shared, start, step, busy, parameters)


def wgmma(dtype: str, parameters: tuple[int, ...], transposed: bool, start: float, step: float) -> Tile:
    """Return ``WgmmaTile<..., transposed>``."""
    x_lines, y_lines, stages, cluster, _ = parameters
    shared = 1024 - 16 + stages * (x_lines + y_lines) * 128 + x_lines * 64 * 4 + 2 * stages * 8
    parameters = (*parameters, int(transposed))
    rows, columns = (y_lines, x_lines) if transposed else (x_lines, y_lines)
    threads, k_block = 128 + 2 * x_lines, 128 // SIZES[dtype]
    return Tile("wgmma", rows, columns, k_block, threads, shared, start, step, 1.0, parameters, cluster, transposed)


def skinny(dtype: str, lines: int, count: int, lines_are_rows: bool) -> Tile:
    """Return what ``matmul_skinny<count>`` does with `lines` lines a block, of the operand that has many."""
    rows, columns = (lines, count) if lines_are_rows else (count, lines)
    step = lines * SIZES[dtype] / _SKINNY_BYTES
    return Tile("skinny", rows, columns, 256, 256, 0, _SKINNY_START, step, _SKINNY_BUSY[count], (count,))


# The constants of the estimate that tiles and splits are chosen by were fitted to what benchmarks/gpu_matmul.py
# measured: those of float32, float64 and TF32 on an H100, the others on an H200. The tiles are the fewest of those
# tried with which no matmul took over 7 % longer than with the best one (float32: 0.4 % in the mean of 33 shapes).
_SECOND_PASS = 2000.0  # ns
_SECOND_PASS_BYTES = 3300.0  # a ns, of all partial sums
_SKINNY_START = 1500.0  # ns
_SKINNY_BYTES = 31.0  # a ns, from memory to a multiprocessor
_SKINNY_BUSY = {1: 4.0, 4: 2.0}  # by how many lines there are at most: what keeps the memory busy

_SIMT_TILES = {
    "float32": (
        simt("float32", (128, 256, 16, 8, 16, 1, 4), 1700.0, 171.0),
        simt("float32", (64, 128, 16, 8, 8, 1, 4), 2090.0, 45.3, 1.2),
        simt("float32", (64, 64, 16, 8, 8, 2, 4), 1900.0, 25.0, 1.1),
        simt("float32", (32, 32, 32, 8, 4, 4, 4), 1710.0, 7.73, 1.2),
        simt("float32", (16, 64, 64, 4, 8, 8, 3), 1600.0, 8.73),
        simt("float32", (16, 32, 64, 4, 4, 8, 3), 1400.0, 5.14, 1.1),
    ),
    "float64": (
        simt("float64", (64, 64, 16, 8, 4, 2, 4), 3000.0, 52.5),
        simt("float64", (32, 32, 64, 8, 4, 8, 2), 1600.0, 16.3),
    ),
}

_MMA_TILES = {
    **dict.fromkeys(
        ("float16", "bfloat16"),
        (
            mma("bfloat16", (128, 256, 32, 2, 4, 1, 4), 2600.0, 20.0),
            mma("bfloat16", (128, 128, 32, 2, 2, 1, 4), 2600.0, 11.8),  # the largest for 99 KiB of shared memory
            mma("bfloat16", (64, 128, 64, 2, 2, 1, 4), 1600.0, 9.0),
            mma("bfloat16", (32, 32, 128, 1, 1, 4, 3), 1200.0, 3.0),
        ),
    ),
    # TF32: the same bytes, half the K block.
    "float32": (
        mma("float32", (128, 256, 16, 2, 4, 1, 4), 3900.0, 50.5),
        mma("float32", (128, 128, 16, 2, 2, 1, 4), 3200.0, 25.8, 1.35),
        mma("float32", (64, 128, 32, 2, 2, 1, 4), 2100.0, 16.8, 1.2),
        mma("float32", (32, 32, 64, 1, 1, 4, 3), 1400.0, 5.3),
    ),
}

# Fitted to what benchmarks/gpu_matmul.py measured on an H200; each was the fastest one somewhere. In TF32 one
# operand must lie by lines: b, or a if the kernel computes the transpose.
_WGMMA_TILES = {
    **dict.fromkeys(
        ("float16", "bfloat16"),
        (
            wgmma("bfloat16", (128, 256, 4, 2, 8), False, 3000.0, 11.0),
            wgmma("bfloat16", (128, 128, 6, 2, 8), False, 3000.0, 5.8),
            wgmma("bfloat16", (64, 128, 8, 2, 16), False, 3000.0, 3.8),
        ),
    ),
    "float32": (
        wgmma("float32", (128, 256, 4, 2, 8), False, 3000.0, 21.0),
        wgmma("float32", (128, 256, 4, 2, 8), True, 3000.0, 21.0),
    ),
}

# A line's worth of rows (or columns) that the skinny kernel takes at once: one, or up to four.
_SKINNY_COUNTS = (1, 4)


def tiles(dtype: str, tf32: bool, arch: str) -> tuple[Tile, ...]:
    """Return the tiles for matmuls of this type, but for skinny ones."""
    if dtype in _SIMT_TILES and not tf32:
        return _SIMT_TILES[dtype]
    return (*_MMA_TILES[dtype], *(_WGMMA_TILES[dtype] if arch in ARCHITECTURES["matmul/wgmma.cuh"] else ()))


def takes(tile: Tile, dtype: str, along_lines: Sequence[bool] | None) -> bool:
    """Return whether a tile's kernel takes operands that lie so.

    `along_lines` is whether lines of one step are contiguous in each operand, else steps of one line are; it is None if
    there are no tensor maps of them.
    """
    if tile.kernel != "wgmma":
        return True
    return along_lines is not None and (SIZES[dtype] == 2 or not along_lines[0 if tile.transposed else 1])


class _Operand(NamedTuple):
    """``Operand<T>`` but for its address, the rows of a or the columns of b.

    For a tensor map: its shape as rows of what is contiguous, and the bytes from row to row; 0 if there can be none.
    """

    line_stride: int
    step_stride: int
    lines: int
    along_lines: bool
    packed: bool
    shape: tuple[int, int]
    row_bytes: int

    def in_packs(self, size: int) -> bool:
        """Whether neighbouring lines, of numbers of `size` bytes, can be read 16 bytes at a time, and fill them."""
        return self.along_lines and self.packed and self.lines * size % 16 == 0

    def rest(self) -> bytes:
        """The struct but for the address."""
        return _OPERAND_REST.pack(*self[:5])


# Structs of matmul/common.cuh: Operand<T> and, by the type that is computed in, LinearEpilogue<T, F> behind their
# pointers; and as `Device.prepare` takes them, Operand<T> and PartialEpilogue<T>.
_OPERAND_REST = struct.Struct("=qqiii4x")
_LINEAR = {"float": struct.Struct("=iifi"), "double": struct.Struct("=iidi4x")}
_OPERAND = f"Q{_OPERAND_REST.size}s"
_TENSOR_MAP = "128s"
_PARTIAL = "Qiii4x"


def _operand(aligned: bool, size: int, lines: int, steps: int, line_stride: int, step_stride: int) -> _Operand:
    # The stride of what is there once is never used.
    if lines <= 1:
        line_stride = 0
    if steps <= 1:
        step_stride = 0
    along_lines = step_stride != 1 and (line_stride == 1 or abs(line_stride) < abs(step_stride)) and lines > 1
    inner, outer = (line_stride, step_stride) if along_lines else (step_stride, line_stride)
    packed = inner == 1 and aligned and outer * size % 16 == 0
    shape = (steps, lines) if along_lines else (lines, steps)
    row_bytes = (outer if shape[0] > 1 else -(-shape[1] // 8) * 8) * size
    if not packed or not steps or row_bytes < shape[1] * size:
        row_bytes = 0
    return _Operand(line_stride, step_stride, lines, along_lines, packed, shape, row_bytes)


# What a kernel is given of its two operands, by their addresses.
_Given = Callable[[int, int], tuple[Any, ...]]


class _Facts(NamedTuple):
    """What a matmul's launches depend on, but for the addresses; aligned: whether they are multiples of 16."""

    a_shape: tuple[int, int]
    b_shape: tuple[int, int]
    a_strides: tuple[int, int]
    b_strides: tuple[int, int]
    dtype: np.dtype[Any]
    a_aligned: bool
    b_aligned: bool

    def operands(self) -> tuple[_Operand, _Operand]:
        (m, k), n, size = self.a_shape, self.b_shape[1], self.dtype.itemsize
        a_row, a_column = (stride // size for stride in self.a_strides)
        b_row, b_column = (stride // size for stride in self.b_strides)
        first = _operand(self.a_aligned, size, m, k, a_row, a_column)
        return first, _operand(self.b_aligned, size, n, k, b_column, b_row)


def _as_structs(operands: tuple[_Operand, _Operand], second_first: bool) -> _Given:
    """Return what makes the structs of two operands."""
    first, second = (operand.rest() for operand in operands)
    if second_first:
        return lambda a, b: (b, second, a, first)
    return lambda a, b: (a, first, b, second)


def _as_tensor_maps(device: Device, tile: Tile, operands: tuple[_Operand, _Operand], size: int) -> _Given:
    """Return what makes the tensor maps by which a kernel copies what its blocks take of its two operands."""
    x_lines, y_lines = tile.parameters[:2]
    y_lines //= tile.cluster
    # Floats that go through registers are rounded there.
    numbers: tuple[BoxNumber, BoxNumber] = ("uint16", "uint16") if size == 2 else ("uint32", "tf32")

    def tensor_map(operand: _Operand, lines: int, number: BoxNumber, at: int) -> bytes:
        box = (tile.k_block, tile.k_block) if operand.along_lines else (lines, tile.k_block)
        return device.tensor_map(at, number, operand.shape, operand.row_bytes, box).tobytes()

    x, y = operands[::-1] if tile.transposed else operands

    def given(a: int, b: int) -> tuple[bytes, bytes]:
        x_at, y_at = (b, a) if tile.transposed else (a, b)
        return tensor_map(x, x_lines, numbers[0], x_at), tensor_map(y, y_lines, numbers[1], y_at)

    return given


def _blocks(tile: Tile, m: int, n: int) -> int:
    rows, columns = -(-m // tile.rows), -(-n // tile.columns)
    if tile.transposed:
        rows, columns = columns, rows
    return -(-rows // tile.cluster) * tile.cluster * columns


def estimate(choice: Choice, m: int, n: int, k: int, size: int, multiprocessors: int) -> float:
    """Nanoseconds on an H200, about: multiprocessors run the blocks in waves."""
    tile, splits = choice
    steps = -(-k // (tile.k_block * splits)) * tile.k_block
    waves = max(-(-_blocks(tile, m, n) * splits // multiprocessors), tile.busy)
    # To fill its first stage and to write its results takes a block about as long as one more K block.
    time = tile.start + waves * (steps + tile.k_block) * tile.step
    if splits > 1:
        time += _SECOND_PASS + m * n * splits * max(size, 4) / _SECOND_PASS_BYTES
    return time


def splits_of(tile: Tile, m: int, n: int, k: int, multiprocessors: int) -> Iterator[int]:
    """Into how many parts k may be cut, none of them empty."""
    k_blocks, blocks, last = -(-k // tile.k_block), _blocks(tile, m, n), 0
    for parts in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128):
        if parts > 1 and (parts > k_blocks or blocks * parts > 4 * multiprocessors):
            break
        splits = -(-k_blocks // -(-k_blocks // parts)) if k_blocks else 1
        if splits != last:
            yield splits
        last = splits


def candidates(
    m: int,
    n: int,
    k: int,
    dtype: str,
    tf32: bool,
    skinny_lines: tuple[int, int],
    arch: str,
    multiprocessors: int,
    along_lines: tuple[bool, bool] | None,
) -> list[Choice]:
    """Return all that can compute a matmul, the one with the lowest estimate first.

    `skinny_lines` are how many lines of a and of b a block of the skinny kernel takes; for `along_lines` see `takes`.
    """
    shared = 1024 * _SHARED_KIB.get(arch, _MIN_SHARED_KIB)
    found = [tile for tile in tiles(dtype, tf32, arch) if tile.shared <= shared and takes(tile, dtype, along_lines)]
    few = min(m, n)
    if few <= _SKINNY_COUNTS[-1]:
        count = next(count for count in _SKINNY_COUNTS if few <= count)
        found = [skinny(dtype, skinny_lines[0] if n <= m else skinny_lines[1], count, n <= m)]
    choices = [Choice(tile, splits) for tile in found for splits in splits_of(tile, m, n, k, multiprocessors)]

    return sorted(choices, key=lambda choice: estimate(choice, m, n, k, SIZES[dtype], multiprocessors))


def skinny_lines(dtype: str, along_lines: bool) -> int:
    """Return ``skinny_lines<T>(along_lines)``."""
    return 8 * (16 // SIZES[dtype]) if along_lines else 32


def choose(device: Device, a: Any, b: Any, tf32: bool = False) -> list[Choice]:
    """Return all that can compute ``a @ b``, the lowest estimate first."""
    aligned = (array.data.ptr % 16 == 0 for array in (a, b))
    return _choices(device, _Facts(a.shape, b.shape, a.strides, b.strides, a.dtype, *aligned), tf32)


def _choices(device: Device, facts: _Facts, tf32: bool) -> list[Choice]:
    first, second = facts.operands()
    dtype = name_of(facts.dtype)
    skinny = skinny_lines(dtype, first.along_lines), skinny_lines(dtype, second.along_lines)
    mapped = first.row_bytes > 0 and second.row_bytes > 0
    layouts = (first.along_lines, second.along_lines) if mapped else None
    k, cores = facts.a_shape[1], device.multiprocessors
    return candidates(first.lines, second.lines, k, dtype, tf32, skinny, device.arch, cores, layouts)


def kernel_of(tile: Tile, dtype: str, along_lines: Sequence[bool], epilogue: str) -> tuple[str, str]:
    """Return the source and the name of a kernel. Of ``"simt"`` the operands' `in_packs` count for `along_lines`."""
    name = FLOATS[dtype]
    numbers = ", ".join(map(str, tile.parameters))
    if tile.kernel == "skinny":
        return "matmul/skinny.cuh", f"gemmlet::matmul_skinny<{numbers}, {name}, {epilogue}>"
    layouts = ", ".join("true" if along else "false" for along in along_lines[:: -1 if tile.transposed else 1])
    tile_type = f"gemmlet::{tile.kernel.title()}Tile<{name}, {numbers}>"
    return f"matmul/{tile.kernel}.cuh", f"gemmlet::matmul_{tile.kernel}<{tile_type}, {layouts}, {epilogue}>"


@functools.cache
def linear_epilogue(dtype: str, activation: str) -> str:
    """Return the name of the epilogue that finishes a layer."""
    return f"gemmlet::LinearEpilogue<{FLOATS[dtype]}, gemmlet::activations::{activation}>"


def partial_epilogue(dtype: str) -> str:
    """Return the name of the epilogue that keeps the sums over a part of k."""
    return f"gemmlet::PartialEpilogue<{COMPUTED[dtype]}>"


@functools.cache
def combine_kernel(epilogue: str) -> tuple[str, str]:
    """Return the source and the name of the kernel that adds those."""
    return "matmul/common.cuh", f"gemmlet::matmul_combine<{epilogue}>"


def expressions(activations: Iterable[str] = ACTIVATIONS) -> dict[str, list[str]]:
    """Return the kernels that `linear` launches for these activations, by source file (see `ARCHITECTURES`).

    The activation is a small part of a kernel, at its end: with ``["gelu"]``, the longest one, each is there once.
    """
    found: dict[str, dict[str, None]] = {}

    def add(kernel: tuple[str, str]) -> None:
        source, name = kernel
        found.setdefault(source, {})[name] = None

    for dtype in FLOATS:
        finals = [linear_epilogue(dtype, name) for name in activations]
        for epilogue in finals:
            add(combine_kernel(epilogue))
        skinny_tiles = (skinny(dtype, skinny_lines(dtype, True), count, False) for count in _SKINNY_COUNTS)
        on_tensor_cores = tiles(dtype, True, "sm_90a") if dtype in _MMA_TILES else ()
        for tile in (*_SIMT_TILES.get(dtype, ()), *on_tensor_cores, *skinny_tiles):
            for layouts in itertools.product((False, True), repeat=2):
                if not takes(tile, dtype, layouts):
                    continue
                for epilogue in (*finals, partial_epilogue(dtype)):
                    add(kernel_of(tile, dtype, layouts, epilogue))
    return {source: list(names) for source, names in found.items()}


def linear(
    device: Device,
    x: Any,
    w: Any,
    b: Any | None,
    activation: Activation | None,
    parameter: float,
    out: Any,
    preactivation: Any | None,
    *,
    tf32: bool = False,
    choice: Choice | None = None,
) -> None:
    """``out = activation(x @ w + b)``, as `Backend.linear`, of arrays on one device; ValueError beyond `LARGEST`.

    x (m, k) and w (k, n) have any strides that are multiples of the element's size; all others are C-contiguous. `out`
    overlaps no other array, but may be misaligned; ``k = 0`` gives ``activation(b)``. `preactivation` takes
    ``x @ w + b``, rounded to its type; the activation is applied to what is rounded.

    With `tf32`, float32 operands may be rounded to TF32 (11 bits), for tensor cores. `choice` is one of `choose`, for
    tests and measurements.

    The error of a sum before it is rounded is at most ``k eps (abs(x) @ abs(w))``, with eps 2^-23 (2^-52 in float64).
    The same inputs give the same bits. The order of a sum depends on shapes and strides, and on the GPU's architecture
    and number of multiprocessors, by which the tile is chosen and k is split.
    """
    tf32 = tf32 and x.dtype.itemsize == 4
    name = "identity" if activation is None else activation.name
    addresses = x_, w_, y, z = x.data.ptr, w.data.ptr, out.data.ptr, address(preactivation)
    aligned = x_ % 16 == 0, w_ % 16 == 0, (y | z) % 16 == 0
    layouts = x.shape, w.shape, x.strides, w.strides, x.dtype
    run = prepared(device, device.multiprocessors, layouts, aligned, name, parameter, tf32, choice)
    run(*addresses, address(b))


@functools.lru_cache(maxsize=4096)
def prepared(
    device: Device,
    _multiprocessors: int,  # of the device, which a test may change
    layouts: tuple[Any, Any, Any, Any, np.dtype[Any]],
    aligned: tuple[bool, bool, bool],
    activation: str,
    parameter: float,
    tf32: bool,
    choice: Choice | None,
) -> Callable[[int, int, int, int, int], None]:
    """Return ``run(x, w, out, preactivation, b)``, of addresses, which does what `linear` does.

    `layouts` are the shapes of x and w, their strides, and the dtype; `aligned` says of which of x, w and both results
    the addresses are multiples of 16.
    """
    facts = _Facts(*layouts, *aligned[:2])
    (m, k), n, dtype = facts.a_shape, facts.b_shape[1], name_of(facts.dtype)
    if max(m, n, k) > LARGEST:
        raise ValueError(
            f"x {facts.a_shape} @ w {facts.b_shape}: a dimension is larger than {LARGEST}, "
            "the most that backend 'cuda' takes"
        )
    if not m or not n:
        return lambda *_: None
    tile, splits = choice or _choices(device, facts, tf32)[0]
    operands = facts.operands()
    final = linear_epilogue(dtype, activation)
    final_struct = _LINEAR[COMPUTED[dtype]]
    final_rest = final_struct.pack(m, n, parameter, n % (16 // facts.dtype.itemsize) == 0 and aligned[2])
    final_layout = f"QQQ{final_struct.size}s"

    blocks, steps = _blocks(tile, m, n), -(-k // (tile.k_block * splits)) * tile.k_block
    sizes: tuple[int, ...] = k, steps
    if tile.kernel == "wgmma":
        operand, given = _TENSOR_MAP, _as_tensor_maps(device, tile, operands, facts.dtype.itemsize)
        # Persistent blocks: each computes several tiles.
        blocks = min(blocks, max(device.multiprocessors // (splits * tile.cluster), 1) * tile.cluster)
    else:
        # The skinny kernel takes the operand of many lines first, and is told which one it is.
        second_first = tile.kernel == "skinny" and n > m
        operand, given = _OPERAND, _as_structs(operands, second_first)
        if tile.kernel == "skinny":
            sizes = k, steps, int(not second_first)
    epilogue, layout = (final, final_layout) if splits == 1 else (partial_epilogue(dtype), _PARTIAL)
    size = facts.dtype.itemsize
    found = [each.in_packs(size) if tile.kernel == "simt" else each.along_lines for each in operands]
    parameters = (operand, operand, *["i"] * len(sizes), layout)
    launch = device.prepare(*kernel_of(tile, dtype, found, epilogue), parameters, tile.threads, tile.shared)

    if splits == 1:

        def run(x: int, w: int, y: int, z: int, b: int) -> None:
            launch(blocks, 1, *given(x, w), *sizes, y, z, b, final_rest)

        return run

    sums = np.dtype(np.float64 if dtype == "float64" else np.float32)
    parts_packed = n % (16 // sums.itemsize) == 0
    combine = device.prepare(*combine_kernel(final), ("Q", "i", final_layout), 256)
    combine_blocks = -(-m * -(-n // (16 // sums.itemsize)) // 256)

    def run_in_parts(x: int, w: int, y: int, z: int, b: int) -> None:
        parts = device.empty((splits, m, n), sums)
        at = address(parts)
        launch(blocks, splits, *given(x, w), *sizes, at, m, n, parts_packed)
        combine(combine_blocks, 1, at, splits, y, z, b, final_rest)

    return run_in_parts
