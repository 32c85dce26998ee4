"""Matrix products on a GPU: which kernel computes one, from which tiles, and its launch."""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .._arrays import name_of
from ..formulas.activations import ACTIVATIONS, Activation
from .cuda_device import BoxNumber, Device
from .cuda_types import COMPUTED, FLOATS, SIZES, address, pointer

# The kernels count lines and steps in an int, and look a little beyond the last one.
LARGEST = 2**31 - 1024

# What a source is compiled for, where that is not every architecture; "host" is the CPU, in tests.
ARCHITECTURES = {"matmul_wgmma.cuh": ("sm_90a", "host")}

# Whether products may be computed by wgmma where the architecture has it, without being told to: not until a run of
# benchmarks/gpu_report.py on such a GPU has checked and timed it.
WGMMA = False

# Of dynamic shared memory, for one block.
_SHARED_KIB = {"sm_80": 163, "sm_87": 163, "sm_90a": 227, "sm_100a": 227, "host": 227}
_LEAST_SHARED_KIB = 99


@dataclass(frozen=True)
class Tile:
    """How a kernel divides a product among its blocks.

    Attributes
    ----------
    kernel : str
        ``"simt"``, ``"mma"`` and ``"wgmma"`` compute tiles, ``"thin"`` products of at most four rows or columns.
    rows, columns : int
        Of the result, for a block.
    depth : int
        What k is divided into.
    threads, shared : int
        Of a block; bytes of dynamic shared memory.
    start, step : float
        Nanoseconds, about: a launch but for its steps of k; and what such a step costs a multiprocessor.
    busy : float
        So many blocks keep a multiprocessor busy; fewer take as long.
    parameters : tuple of int
        Of the C++ template, after the type.
    cluster : int
        So many blocks compute tiles next to each other together.
    transposed : bool
        Whether the kernel computes the transpose, of the second operand and the first.
    """

    kernel: Literal["simt", "mma", "wgmma", "thin"]
    rows: int
    columns: int
    depth: int
    threads: int
    shared: int
    start: float
    step: float
    busy: float
    parameters: tuple[int, ...]
    cluster: int = 1
    transposed: bool = False

    def __str__(self) -> str:
        return f"{self.kernel} {'x'.join(map(str, self.parameters))}"


class Choice(NamedTuple):
    """A tile, and how many blocks share the sum for it."""

    tile: Tile
    splits: int


def simt(
    dtype: str,
    rows: int,
    columns: int,
    depth: int,
    thread_rows: int,
    thread_columns: int,
    slices: int,
    stages: int,
    start: float,
    step: float,
    busy: float = 1.0,
) -> Tile:
    """Return ``SimtTile<...>``."""
    size = SIZES[dtype]
    pad = 16 // size
    threads = 32 * (rows // (4 * thread_rows)) * (columns // (8 * thread_columns)) * slices
    loading = stages * depth * (rows + columns + 2 * pad)
    finishing = rows * (columns + pad) * slices // (thread_rows // pad if slices == 1 else 1)
    parameters = (rows, columns, depth, thread_rows, thread_columns, slices, stages)
    return Tile("simt", rows, columns, depth, threads, max(loading, finishing) * size, start, step, busy, parameters)


def mma(
    dtype: str,
    rows: int,
    columns: int,
    depth: int,
    row_warps: int,
    column_warps: int,
    slices: int,
    stages: int,
    start: float,
    step: float,
    busy: float = 1.0,
) -> Tile:
    """Return ``MmaTile<...>``."""
    size = SIZES[dtype]
    pad = 32 if size == 4 else 16

    def operand(lines: int) -> int:
        return max(lines * (depth * size + 16), depth * (lines * size + pad))

    stage = operand(rows) + operand(columns)
    threads = 32 * row_warps * column_warps * slices
    shared = max(stages * stage, slices * rows * (columns + 8) * 4)
    parameters = (rows, columns, depth, row_warps, column_warps, slices, stages)
    return Tile("mma", rows, columns, depth, threads, shared, start, step, busy, parameters)


def wgmma(
    dtype: str,
    x_lines: int,
    y_lines: int,
    stages: int,
    cluster: int,
    group_rows: int,
    lag: int,
    transposed: bool,
    start: float,
    step: float,
    busy: float = 1.0,
) -> Tile:
    """Return ``WgmmaTile<...>``."""
    shared = 1024 - 16 + stages * (x_lines + y_lines) * 128 + x_lines * 64 * 4 + (2 * stages + (lag > 0)) * 8
    parameters = (x_lines, y_lines, stages, cluster, group_rows, lag, int(transposed))
    rows, columns = (y_lines, x_lines) if transposed else (x_lines, y_lines)
    threads, depth = 128 + 2 * x_lines, 128 // SIZES[dtype]
    return Tile("wgmma", rows, columns, depth, threads, shared, start, step, busy, parameters, cluster, transposed)


def thin(dtype: str, lines: int, count: int, lines_are_rows: bool) -> Tile:
    """Return what ``matmul_thin<count>`` does with so many lines a block, of the operand that has many."""
    rows, columns = (lines, count) if lines_are_rows else (count, lines)
    step = lines * SIZES[dtype] / _THIN_BYTES
    return Tile("thin", rows, columns, 256, 256, 0, _THIN_START, step, _THIN_BUSY[count], (count,))


# The constants of the estimate that tiles and splits are chosen by were fitted, as were those of every tile below, to
# what benchmarks/gpu_matmul.py measured on an H200 (float32 and bfloat16). The tiles are the fewest of those tried
# with which all its products of row-major matrices took at most 4 % longer than with the best one.
_SECOND_PASS = 2000.0  # ns
_SECOND_PASS_BYTES = 3300.0  # a ns, of all partial sums
_THIN_START = 1500.0  # ns
_THIN_BYTES = 31.0  # a ns, from memory to a multiprocessor
_THIN_BUSY = {1: 4.0, 4: 2.0}  # by how many lines there are at most: what keeps the memory busy

_SIMT_TILES = {
    "float32": (
        # Not measured yet. The step is the next tile's, by what a multiply-add costs in their main loops: 1.12 turns of
        # a scheduler, not 1.24 (tools/simt_slots.py). That one and 64x64x16x8x8x2x4 differ by a factor of 1.06 in turns
        # and of 1.07 in time, at 4096^3. Four warps are few, hence `busy`.
        simt("float32", 128, 128, 16, 8, 16, 1, 3, 2700.0, 82.0, 1.5),
        simt("float32", 128, 128, 16, 8, 8, 1, 3, 1800.0, 90.5),
        simt("float32", 64, 64, 16, 8, 8, 2, 4, 2700.0, 24.5, 1.15),
        simt("float32", 32, 32, 32, 8, 4, 4, 4, 2100.0, 8.3),
        simt("float32", 16, 64, 64, 4, 8, 8, 3, 1900.0, 8.8, 1.1),
        simt("float32", 16, 32, 64, 4, 4, 8, 3, 1600.0, 5.8),
    ),
    # By those of float32, at half the rate; not measured yet.
    "float64": (
        simt("float64", 64, 64, 16, 8, 4, 2, 4, 2700.0, 49.0, 1.15),
        simt("float64", 32, 32, 64, 8, 4, 8, 2, 2100.0, 17.0),
    ),
}


def _mma_tiles(dtype: str) -> tuple[Tile, ...]:
    # Those of bfloat16; TF32 has them of as many bytes, at half the rate, which is not measured yet.
    half = 2 if dtype == "float32" else 1
    return (
        mma(dtype, 128, 256, 32 // half, 2, 4, 1, 4, 2600.0, 20.0 * half),
        mma(dtype, 128, 128, 32 // half, 2, 2, 1, 4, 2600.0, 11.8 * half),  # the largest for 99 KiB of shared memory
        mma(dtype, 64, 128, 64 // half, 2, 2, 1, 4, 1600.0, 9.0 * half),
        mma(dtype, 32, 32, 128 // half, 1, 1, 4, 3, 1200.0, 3.0 * half),
    )


_MMA_TILES = {dtype: _mma_tiles(dtype) for dtype in ("float32", "float16", "bfloat16")}

# Fitted to what benchmarks/gpu_matmul.py --wgmma measured on an H200; each was the fastest one somewhere. In TF32 one
# operand must lie by lines: b, or a if the kernel computes the transpose.
_WGMMA_TILES = {
    **dict.fromkeys(
        ("float16", "bfloat16"),
        (
            wgmma("bfloat16", 128, 256, 4, 2, 8, 0, False, 3000.0, 11.0),
            wgmma("bfloat16", 128, 128, 6, 2, 8, 0, False, 3000.0, 5.8),
            wgmma("bfloat16", 64, 128, 8, 2, 16, 0, False, 3000.0, 3.8),
        ),
    ),
    "float32": (
        wgmma("float32", 128, 256, 4, 2, 8, 0, False, 3000.0, 21.0),
        wgmma("float32", 128, 256, 4, 2, 8, 0, True, 3000.0, 21.0),
    ),
}

# A line's worth of rows (or columns) that the thin kernel takes at once: one, or up to four.
_THIN_COUNTS = (1, 4)


def tiles(dtype: str, tf32: bool, arch: str) -> tuple[Tile, ...]:
    """Return the tiles that there are for products of this type, but for thin ones."""
    if dtype in _SIMT_TILES and not tf32:
        return _SIMT_TILES[dtype]
    return (*_MMA_TILES[dtype], *(_WGMMA_TILES[dtype] if arch in ARCHITECTURES["matmul_wgmma.cuh"] else ()))


def takes(tile: Tile, dtype: str, along_lines: Sequence[bool] | None) -> bool:
    """Return whether a tile's kernel takes operands that lie so.

    `along_lines` is whether lines of one step are contiguous in each operand, else steps of one line are; it is None if
    there are no tensor maps of them.
    """
    if tile.kernel != "wgmma":
        return True
    return along_lines is not None and (SIZES[dtype] == 2 or not along_lines[0 if tile.transposed else 1])


class _Operand(NamedTuple):
    """``Operand<T>``, the rows of a or the columns of b, and what is chosen by it.

    For a tensor map: where it is, as rows of what is contiguous, and the bytes from row to row; 0 if there can be none.
    """

    packed_struct: np.void
    lines: int
    along_lines: bool
    address: int
    shape: tuple[int, int]
    row_bytes: int


_OPERAND = struct.Struct("=Qqqiii4x")
_LINEAR = {"float": struct.Struct("=QQQiifi"), "double": struct.Struct("=QQQiidi4x")}
_PARTIAL = struct.Struct("=Qiii4x")


def _operand(pointer: int, size: int, lines: int, steps: int, line_stride: int, step_stride: int) -> _Operand:
    # The stride of what is there once is never used.
    if lines <= 1:
        line_stride = 0
    if steps <= 1:
        step_stride = 0
    along_lines = step_stride != 1 and (line_stride == 1 or abs(line_stride) < abs(step_stride)) and lines > 1
    inner, outer = (line_stride, step_stride) if along_lines else (step_stride, line_stride)
    packed = inner == 1 and pointer % 16 == 0 and outer * size % 16 == 0
    data = _OPERAND.pack(pointer, line_stride, step_stride, lines, along_lines, packed)
    shape = (steps, lines) if along_lines else (lines, steps)
    row_bytes = (outer if shape[0] > 1 else -(-shape[1] // 8) * 8) * size
    if not packed or not steps or row_bytes < shape[1] * size:
        row_bytes = 0
    return _Operand(np.void(data), lines, along_lines, pointer, shape, row_bytes)


def _operands(a: Any, b: Any) -> tuple[_Operand, _Operand]:
    (m, k), n, size = a.shape, b.shape[1], a.dtype.itemsize
    a_row, a_column = (stride // size for stride in a.strides)
    b_row, b_column = (stride // size for stride in b.strides)
    return _operand(a.data.ptr, size, m, k, a_row, a_column), _operand(b.data.ptr, size, n, k, b_column, b_row)


def _tensor_maps(device: Device, tile: Tile, first: _Operand, second: _Operand, size: int) -> tuple[np.void, np.void]:
    """Return those by which a kernel copies what its blocks take of its two operands."""
    x_lines, y_lines = tile.parameters[:2]
    number: BoxNumber = "uint16" if size == 2 else "uint32"

    def tensor_map(operand: _Operand, lines: int, number: BoxNumber) -> np.void:
        box = (tile.depth, tile.depth) if operand.along_lines else (lines, tile.depth)
        return device.tensor_map(operand.address, number, operand.shape, operand.row_bytes, box)

    x, y = (second, first) if tile.transposed else (first, second)
    # Floats that go through registers are rounded there.
    return tensor_map(x, x_lines, number), tensor_map(y, y_lines // tile.cluster, "uint16" if size == 2 else "tf32")


def _blocks(tile: Tile, m: int, n: int) -> int:
    rows, columns = -(-m // tile.rows), -(-n // tile.columns)
    if tile.transposed:
        rows, columns = columns, rows
    return -(-rows // tile.cluster) * tile.cluster * columns


def estimate(choice: Choice, m: int, n: int, k: int, size: int, multiprocessors: int) -> float:
    """Nanoseconds on an H200, about: multiprocessors take turns of one block each."""
    tile, splits = choice
    steps = -(-k // (tile.depth * splits)) * tile.depth
    turns = max(-(-_blocks(tile, m, n) * splits // multiprocessors), tile.busy)
    # To fill its first stage and to write its results takes a block about as long as one more depth.
    time = tile.start + turns * (steps + tile.depth) * tile.step
    if splits > 1:
        time += _SECOND_PASS + m * n * splits * max(size, 4) / _SECOND_PASS_BYTES
    return time


def splits_of(tile: Tile, m: int, n: int, k: int, multiprocessors: int) -> Iterator[int]:
    """Into how many parts k may be cut, none of them empty."""
    depths, blocks, last = -(-k // tile.depth), _blocks(tile, m, n), 0
    for parts in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128):
        if parts > 1 and (parts > depths or blocks * parts > 4 * multiprocessors):
            break
        splits = -(-depths // -(-depths // parts)) if depths else 1
        if splits != last:
            yield splits
        last = splits


def candidates(
    m: int,
    n: int,
    k: int,
    dtype: str,
    tf32: bool,
    thin_lines: tuple[int, int],
    arch: str,
    multiprocessors: int,
    along_lines: tuple[bool, bool] | None,
) -> list[Choice]:
    """Return all that can compute a product, the one with the lowest estimate first (see `WGMMA` for an exception).

    `thin_lines` are how many lines of a and of b a block of the thin kernel takes; for `along_lines` see `takes`.
    """
    shared = 1024 * _SHARED_KIB.get(arch, _LEAST_SHARED_KIB)
    found = [tile for tile in tiles(dtype, tf32, arch) if tile.shared <= shared and takes(tile, dtype, along_lines)]
    few = min(m, n)
    if few <= _THIN_COUNTS[-1]:
        count = next(count for count in _THIN_COUNTS if few <= count)
        found = [thin(dtype, thin_lines[0] if n <= m else thin_lines[1], count, n <= m)]
    choices = [Choice(tile, splits) for tile in found for splits in splits_of(tile, m, n, k, multiprocessors)]

    def key(choice: Choice) -> tuple[bool, float]:
        unproven = choice.tile.kernel == "wgmma" and not WGMMA
        return unproven, estimate(choice, m, n, k, SIZES[dtype], multiprocessors)

    return sorted(choices, key=key)


@functools.lru_cache(maxsize=4096)
def _choice(*arguments: Any) -> Choice:
    return candidates(*arguments)[0]


def thin_lines(dtype: str, along_lines: bool) -> int:
    """Return ``thin_lines<T>(along_lines)``."""
    return 8 * (16 // SIZES[dtype]) if along_lines else 32


def choose(device: Device, a: Any, b: Any, tf32: bool = False) -> list[Choice]:
    """Return all that can compute ``a @ b``, the best first, as far as is known."""
    first, second = _operands(a, b)
    return candidates(*_facts(device, a, first, second, tf32))


def _facts(device: Device, a: Any, first: _Operand, second: _Operand, tf32: bool) -> tuple[Any, ...]:
    dtype = name_of(a.dtype)
    thin = thin_lines(dtype, first.along_lines), thin_lines(dtype, second.along_lines)
    mapped = first.row_bytes > 0 and second.row_bytes > 0
    along_lines = (first.along_lines, second.along_lines) if mapped else None
    return first.lines, second.lines, a.shape[1], dtype, tf32, thin, device.arch, device.multiprocessors, along_lines


def kernel_of(tile: Tile, dtype: str, along_lines: Sequence[bool], epilogue: str) -> tuple[str, str]:
    """Return the source and the name of a kernel."""
    name = FLOATS[dtype]
    numbers = ", ".join(map(str, tile.parameters))
    if tile.kernel == "simt":
        return "matmul_simt.cuh", f"gemmlet::matmul_simt<gemmlet::SimtTile<{name}, {numbers}>, {epilogue}>"
    if tile.kernel == "thin":
        return "matmul_thin.cuh", f"gemmlet::matmul_thin<{numbers}, {name}, {epilogue}>"
    layouts = ", ".join("true" if along else "false" for along in along_lines[:: -1 if tile.transposed else 1])
    kernel, tile_type = f"matmul_{tile.kernel}", f"{tile.kernel.title()}Tile"
    return f"{kernel}.cuh", f"gemmlet::{kernel}<gemmlet::{tile_type}<{name}, {numbers}>, {layouts}, {epilogue}>"


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
    return "matmul.cuh", f"gemmlet::matmul_combine<{epilogue}>"


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
        thin_tiles = (thin(dtype, thin_lines(dtype, True), count, False) for count in _THIN_COUNTS)
        on_tensor_cores = tiles(dtype, True, "sm_90a") if dtype in _MMA_TILES else ()
        for tile in (*_SIMT_TILES.get(dtype, ()), *on_tensor_cores, *thin_tiles):
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
    """Compute ``out = activation(x @ w + b)``.

    Parameters
    ----------
    device : Device
        Where the arrays are.
    x : cupy.ndarray of shape (m, k), float32, float64, float16 or bfloat16
        Any strides that are multiples of the element's size, as of `w`.
    w : cupy.ndarray of shape (k, n)
        Of the same type as all others.
    b : cupy.ndarray of shape (n,), contiguous, optional
    activation : Activation, optional
        None is the identity.
    parameter : float
        Of the activation.
    out : cupy.ndarray of shape (m, n), C-contiguous
        It overlaps no other array, but may be misaligned. ``k = 0`` gives ``activation(b)``.
    preactivation : cupy.ndarray of shape (m, n), C-contiguous, optional
        Takes ``x @ w + b``, rounded to its type; the activation is applied to what is rounded.
    tf32 : bool, default False
        Whether float32 operands may be rounded to TF32 (11 bits), for tensor cores.
    choice : Choice, optional
        From `choose`, for tests and measurements.

    Raises
    ------
    ValueError
        A dimension is larger than `LARGEST`.

    Notes
    -----
    The error of a sum before it is rounded is at most ``k eps (abs(x) @ abs(w))``, with eps 2^-23 (2^-52 in float64).
    The same inputs give the same bits. The order of a sum depends on shapes and strides, and on the GPU's architecture
    and number of multiprocessors, by which the tile is chosen and k is split.
    """
    (m, k), n, dtype = x.shape, w.shape[1], name_of(x.dtype)
    if max(m, n, k) > LARGEST:
        raise ValueError(
            f"x {x.shape} @ w {w.shape}: a dimension is larger than {LARGEST}, the most that backend 'cuda' takes"
        )
    if not m or not n:
        return
    tf32 = tf32 and dtype == "float32"
    first, second = _operands(x, w)
    if choice is None:
        choice = _choice(*_facts(device, x, first, second, tf32))
    tile, splits = choice
    addresses = [address(array) for array in (out, preactivation, b)]
    per_pack = 16 // x.dtype.itemsize
    packed = n % per_pack == 0 and addresses[0] % 16 == 0 and addresses[1] % 16 == 0
    final = linear_epilogue(dtype, "identity" if activation is None else activation.name)
    final_data = np.void(_LINEAR[COMPUTED[dtype]].pack(*addresses, m, n, parameter, packed))

    steps = -(-k // (tile.depth * splits)) * tile.depth
    if splits > 1:
        sums = np.dtype(np.float64 if dtype == "float64" else np.float32)
        parts = device.empty((splits, m, n), sums)
        epilogue = partial_epilogue(dtype)
        data = np.void(_PARTIAL.pack(parts.data.ptr, m, n, n % (16 // sums.itemsize) == 0))
    else:
        epilogue, data = final, final_data

    source, name = kernel_of(tile, dtype, (first.along_lines, second.along_lines), epilogue)
    arguments: list[np.generic] = [first.packed_struct, second.packed_struct, np.int32(k), np.int32(steps)]
    if tile.kernel == "thin":
        if n <= m:
            arguments.append(np.int32(1))
        else:
            arguments[:2] = second.packed_struct, first.packed_struct
            arguments.append(np.int32(0))
    blocks = _blocks(tile, m, n)
    if tile.kernel == "wgmma":
        arguments[:2] = _tensor_maps(device, tile, first, second, x.dtype.itemsize)
        # They take tiles in turn.
        blocks = min(blocks, max(device.multiprocessors // (splits * tile.cluster), 1) * tile.cluster)
    grid = blocks, splits, 1
    device.launch(device.kernels(source, [name])[0], grid, tile.threads, [*arguments, data], tile.shared)
    if splits > 1:
        source, name = combine_kernel(final)
        threads = m * -(-n // (16 // sums.itemsize))
        arguments = [pointer(parts), np.int32(splits), final_data]
        device.launch(device.kernels(source, [name])[0], (-(-threads // 256), 1, 1), 256, arguments)
