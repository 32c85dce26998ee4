"""Matmuls on a GPU: checks every kernel, then times all of them and cuBLAS, to choose tiles by.

    python benchmarks/gpu_matmul.py [--quick] [--kinds float32,bfloat16] [--tables FILE]
    python benchmarks/gpu_matmul.py --compile sm_90a    # into the cache, where there is no GPU

Each implementation runs as a CUDA graph of many launches, all of them in turn, by CUDA events; medians. What must come
from memory (matmuls with few rows or columns) has its operands rotated past the L2 cache. "cuBLAS +" has one more
kernel, that adds the bias and applies ReLU, which ours do in the epilogue.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gpu_timing import compile_together, write_table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cupy

from gemmlet.backends.cuda import compiler
from gemmlet.backends.cuda import matmul as cuda_matmul
from gemmlet.backends.cuda.device import CudaDevice, Device
from gemmlet.backends.cuda.matmul import Choice, Tile, mma, simt, wgmma
from gemmlet.formulas.activations import ACTIVATIONS

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "tf32": np.dtype(np.float32),
}
RELU = ACTIVATIONS["relu"]

# Tiles that are not among those of the backend, which they may replace. Of float32 some that have been behind by 2 to
# 5 % at 4096^3.
MORE_TILES: dict[str, tuple[Tile, ...]] = {
    "float32": (
        simt("float32", (128, 256, 16, 8, 16, 1, 3), 1700.0, 175.0),
        simt("float32", (128, 128, 16, 8, 16, 1, 4), 1470.0, 90.1, 1.75),
        simt("float32", (64, 64, 32, 8, 8, 2, 3), 1260.0, 24.8, 1.2),
    ),
    "bfloat16": (
        mma("bfloat16", (256, 128, 32, 4, 2, 1, 4), 2600.0, 20.0),
        mma("bfloat16", (32, 64, 128, 1, 1, 4, 3), 1200.0, 4.5),
        # Without clusters 2048^3 took 0.92 of the time, and larger ones as long.
        wgmma("bfloat16", (128, 256, 4, 1, 16), False, 3000.0, 11.5),
        wgmma("bfloat16", (64, 128, 8, 1, 16), False, 3000.0, 4.0),
    ),
    "tf32": (
        wgmma("float32", (128, 256, 4, 1, 16), True, 3000.0, 23.0),
        wgmma("float32", (128, 128, 6, 2, 8), True, 3000.0, 11.0),
    ),
}


class Shape(NamedTuple):
    """``(m, k) @ (k, n)``; layouts: "n", row by row, or "t", column by column; cold: the operands come from memory."""

    m: int
    n: int
    k: int
    layouts: str = "nn"
    cold: bool = False

    def __str__(self) -> str:
        return f"{self.m}x{self.k} @ {self.k}x{self.n} {self.layouts}"


SQUARES = [Shape(s, s, s) for s in (1024, 2048, 4096)]
LAYERS = [Shape(batch, n, 784) for batch in (64, 128, 256, 1024, 4096) for n in (128, 256)]
LAYERS += [
    Shape(64, 10, 128),
    Shape(4096, 10, 128),
    Shape(64, 1024, 1024),
    Shape(512, 512, 512),
    Shape(4096, 1024, 1024),
]
BACKWARD = [Shape(784, 128, k, "tn") for k in (64, 4096, 60000)]
BACKWARD += [Shape(64, 784, 128, "nt"), Shape(4096, 784, 128, "nt"), Shape(1024, 1024, 4096, "tn")]
SKINNY = [Shape(1, 4096, 4096, cold=True), Shape(1, 4096, 4096, "nt", True), Shape(4, 4096, 4096, cold=True)]
SKINNY += [Shape(16384, 1, 4096, cold=True), Shape(8, 4096, 4096, cold=True), Shape(100000, 3, 128, cold=True)]
SKINNY += [Shape(1, 128, 784), Shape(64, 1, 128), Shape(1, 784, 60000, cold=True)]
LAYOUTS = [Shape(2048, 2048, 2048, layouts) for layouts in ("nt", "tn", "tt")]

SHAPES = {
    "float32": SQUARES + LAYERS + BACKWARD + SKINNY + LAYOUTS,
    "bfloat16": [*SQUARES, Shape(8192, 8192, 8192), *LAYERS[::3], *BACKWARD[1:3], *SKINNY[:5], *LAYOUTS],
    "float16": [*SQUARES[1:], Shape(8192, 8192, 8192), *LAYERS[:2]],
    "tf32": [*SQUARES, *LAYERS[:2], *LAYOUTS[:1]],
    "float64": [*SQUARES[:2], *LAYERS[:2], *SKINNY[:1]],
}
# What there are targets for, or constants that wait for a measurement.
_LARGE = [*SQUARES[1:], Shape(8192, 8192, 8192)]
QUICK = {
    "bfloat16": [SQUARES[0], *_LARGE],
    "float16": _LARGE[1:],
    "tf32": [SQUARES[0], *_LARGE],
    "float32": [*SQUARES, *(Shape(rows, 4096, 4096) for rows in (64, 256, 1024)), LAYERS[-1], Shape(4096, 784, 256)],
    "float64": [*SQUARES[:2], LAYERS[0]],
}


#
# cuBLAS
#


# cudaDataType_t and cublasComputeType_t: float32 in full precision, and with TF32.
CUBLAS_TYPES = {"float32": (0, 68), "tf32": (0, 77), "float64": (1, 70), "float16": (2, 68), "bfloat16": (14, 68)}


class Cublas:
    """``out = a @ b`` of row-major matrices: the library that CuPy has loaded; CuPy itself lets no graph have it."""

    def __init__(self) -> None:
        cupy.cuda.device.get_cublas_handle()
        loaded = [
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcublas.so" in line
        ]
        self._library = ctypes.CDLL(loaded[0])
        self._handle = ctypes.c_void_p()
        self._do("cublasCreate_v2", ctypes.byref(self._handle))
        # Of its own, as nothing may be allocated while a stream is recorded.
        self._workspace = cupy.cuda.alloc(64 << 20)

    def _do(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function}: status {status}")

    def __call__(self, kind: str, a: Any, b: Any, out: Any) -> None:
        dtype, compute = CUBLAS_TYPES[kind]
        (m, k), n = a.shape, b.shape[1]
        one, zero = (np.array(value, np.float64 if kind == "float64" else np.float32) for value in (1, 0))

        def operand(x: Any) -> tuple[int, int]:
            size = x.dtype.itemsize
            by_row = x.strides[1] == size and (x.strides[0] >= x.shape[1] * size or x.shape[0] == 1)
            stride = x.strides[0] if by_row else x.strides[1]
            return (0 if by_row else 1), max(stride // size, x.shape[1] if by_row else x.shape[0])

        (transposed_a, stride_a), (transposed_b, stride_b) = operand(a), operand(b)
        stream, pointer = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr), ctypes.c_void_p
        self._do("cublasSetStream_v2", self._handle, stream)
        self._do("cublasSetWorkspace_v2", self._handle, pointer(self._workspace.ptr), ctypes.c_size_t(64 << 20))
        # Columns are rows to it: out^T = b^T a^T.
        self._do(
            "cublasGemmEx", self._handle, transposed_b, transposed_a, n, m, k, pointer(one.ctypes.data),
            pointer(b.data.ptr), dtype, stride_b, pointer(a.data.ptr), dtype, stride_a, pointer(zero.ctypes.data),
            pointer(out.data.ptr), dtype, n, compute, -1,
        )  # fmt: skip


def bias_relu(dtype: np.dtype[Any]) -> Callable[[Any, Any], None]:
    """One kernel, in place; with CuPy's types where it has them."""
    if dtype.name == "bfloat16":
        source = """
extern "C" __global__ void bias_relu(unsigned short* x, const unsigned short* b, int n, long long size) {
  const long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * 2;
  if (i >= size) return;
  unsigned pair = *(unsigned*)(x + i);
  for (int j = 0; j < 2; ++j) {
    const float v = __uint_as_float(pair >> 16 * j << 16) + __uint_as_float((unsigned)b[(i + j) % n] << 16);
    const unsigned r = v > 0 ? (__float_as_uint(v) + 0x7fff) >> 16 : 0;
    pair = (pair & ~(0xffffu << 16 * j)) | r << 16 * j;
  }
  *(unsigned*)(x + i) = pair;
}"""
        kernel = cupy.RawKernel(source, "bias_relu")

        def call(x: Any, b: Any) -> None:
            pairs = -(-x.size // 2)
            arguments = np.uint64(x.data.ptr), np.uint64(b.data.ptr), np.int32(x.shape[1]), np.int64(x.size)
            kernel((-(-pairs // 256),), (256,), arguments)

        return call
    elementwise = cupy.ElementwiseKernel("T x, T b", "T y", "y = x + b > T(0) ? T(x + b) : T(0)", "bias_relu")
    return lambda x, b: elementwise(x, b, x)


#
# Operands
#


class Pool:
    """Random numbers on the GPU, of which operands are made, each time from the next ones."""

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        self._dtype, self._size, self._at = dtype, size, 0
        generator = cupy.random.default_rng(0)
        if dtype.name == "bfloat16":
            bits = generator.standard_normal(size // 2, dtype=np.float32).view(np.uint32) >> 16
            self._memory = bits.astype(np.uint16)
        else:
            wide = np.float64 if dtype.itemsize == 8 else np.float32
            self._memory = generator.standard_normal(size // dtype.itemsize, dtype=wide).astype(dtype, copy=False)

    def matrix(self, rows: int, columns: int, layout: str = "n") -> Any:
        bytes_ = -(-rows * columns * self._dtype.itemsize // 256) * 256
        if self._at + bytes_ > self._size:
            self._at = 0
        pointer = self._memory.data + self._at
        self._at += bytes_
        shape = (rows, columns) if layout == "n" else (columns, rows)
        array = cupy.ndarray(shape, self._dtype, pointer)
        return array if layout == "n" else array.T


#
# Measuring
#


class Implementation:
    """Launches as a graph, that takes about a millisecond or more."""

    def __init__(self, device: CudaDevice, calls: list[Callable[[], None]], wanted_ms: float) -> None:
        self._do(calls)  # compiles, allocates
        self._start, self._end = cupy.cuda.Event(), cupy.cuda.Event()
        self.times: list[float] = []
        self._count = len(calls)
        self._graph = device.record(lambda: self._do(calls))
        self.run()
        once = min(self.run(), self.run()) * self._count / 1000
        repeats = max(1, min(int(wanted_ms / max(once, 1e-3)), 2000 // len(calls)))
        if repeats > 1:
            self._count *= repeats
            self._graph = device.record(lambda: self._do(calls * repeats))
            self.run()

    @staticmethod
    def _do(calls: Sequence[Callable[[], None]]) -> None:
        for call in calls:
            call()

    def run(self) -> float:
        """Return microseconds for a call."""
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return 1000 * float(cupy.cuda.get_elapsed_time(self._start, self._end)) / self._count

    def measure(self) -> None:
        self.times.append(self.run())

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def more_tiles(arch: str, kind: str, layouts: str) -> list[Tile]:
    """Tiles that are tried besides the backend's: in one layout, where each has kernels of its own."""
    shared = 1024 * (227 if arch in ("sm_90a", "sm_100a") else 99)
    return [t for t in MORE_TILES.get(kind, ()) if t.shared <= shared and (layouts == "nn" or t.kernel == "simt")]


def with_more(found: list[Choice], device: CudaDevice, kind: str, m: int, n: int, k: int, layouts: str) -> list[Choice]:
    """Return what the backend has found, and of `MORE_TILES` what can do it as well."""
    kernels = {choice.tile.kernel for choice in found}
    if "skinny" in kernels:
        return found
    # wgmma takes not all operands, which the backend knows.
    more = [t for t in more_tiles(device.arch, kind, layouts) if t.kernel != "wgmma" or "wgmma" in kernels]
    return found + [Choice(t, s) for t in more for s in cuda_matmul.splits_of(t, m, n, k, device.multiprocessors)]


def interesting(device: CudaDevice, kind: str, a: Any, b: Any, layouts: str) -> list[Choice]:
    """What the backend would take, first; then for every tile the most promising splits."""
    (m, k), n = a.shape, b.shape[1]
    found = with_more(cuda_matmul.choose(device, a, b, kind == "tf32"), device, kind, m, n, k, layouts)
    size = a.dtype.itemsize
    found.sort(key=lambda c: cuda_matmul.estimate(c, m, n, k, size, device.multiprocessors))
    first = cuda_matmul.choose(device, a, b, kind == "tf32")[0]
    chosen = [first]
    large = m * n * k > 2**31
    for choice in found:
        of_tile = sum(choice.tile == other.tile for other in chosen)
        blocks = -(-m // choice.tile.rows) * -(-n // choice.tile.columns)
        if choice in chosen or of_tile >= (1 if large else 3):
            continue
        if large and blocks > 32 * device.multiprocessors:
            continue
        chosen.append(choice)
    return chosen


class Row(NamedTuple):
    kind: str
    shape: Shape
    cublas: float
    cublas_plus: float
    ours: dict[str, float]  # by tile and splits, what the backend takes first


@functools.lru_cache(maxsize=1)
def pool_of(kind: str) -> Pool:
    return Pool(DTYPES[kind], 2**30)


def measure(device: CudaDevice, cublas: Cublas, pool: Pool, kind: str, shape: Shape, rounds: int) -> Row:
    dtype = DTYPES[kind]
    m, n, k, layouts, cold = shape
    bytes_ = (m * k + k * n + m * n) * dtype.itemsize
    l2 = cupy.cuda.runtime.getDeviceProperties(device.id)["l2CacheSize"]
    copies = max(1, min(64, -(-3 * l2 // bytes_))) if cold else 1
    operands = [(pool.matrix(m, k, layouts[0]), pool.matrix(k, n, layouts[1])) for _ in range(copies)]
    outs = [device.empty((m, n), dtype) for _ in range(copies)]
    bias = pool.matrix(1, n)[0]
    add = bias_relu(dtype)

    def ours(choice: Choice) -> list[Callable[[], None]]:
        def call(x: Any, w: Any, out: Any) -> Callable[[], None]:
            return lambda: cuda_matmul.linear(
                device, x, w, bias, RELU, 0.0, out, None, tf32=kind == "tf32", choice=choice
            )

        return [call(*pair, out) for pair, out in zip(operands, outs, strict=True)]

    def theirs(plus: bool) -> list[Callable[[], None]]:
        def call(x: Any, w: Any, out: Any) -> Callable[[], None]:
            def run() -> None:
                cublas(kind, x, w, out)
                if plus:
                    add(out, bias)

            return run

        return [call(*pair, out) for pair, out in zip(operands, outs, strict=True)]

    wanted = 1.0 if m * n * k < 2**33 else 0.0
    implementations: dict[str, Implementation] = {}
    for name, plus in (("cublas", False), ("cublas_plus", True)):
        implementations[name] = Implementation(device, theirs(plus), wanted)
    for choice in interesting(device, kind, *operands[0], layouts):
        implementations[f"{choice.tile}/{choice.splits}"] = Implementation(device, ours(choice), wanted)
    for _ in range(rounds):
        for implementation in implementations.values():
            implementation.measure()
    times = {name: implementation.median for name, implementation in implementations.items()}
    return Row(kind, shape, times.pop("cublas"), times.pop("cublas_plus"), times)


#
# Checking
#


def compile_all(arch: str, kinds: Sequence[str], by_row_only: bool = False) -> int:
    """Compile all kernels that are measured into the cache; return how many they are."""
    by_row = False, True  # how operands lie that are stored row by row
    found_layouts = [by_row] if by_row_only else list(itertools.product((False, True), repeat=2))
    wanted: dict[tuple[str, str], None] = {}
    for kind in kinds:
        name = DTYPES[kind].name
        epilogues = cuda_matmul.linear_epilogue(name, "relu"), cuda_matmul.partial_epilogue(name)
        wanted[cuda_matmul.combine_kernel(epilogues[0])] = None
        for epilogue, layouts in itertools.product(epilogues, found_layouts):
            found = [*cuda_matmul.tiles(name, kind == "tf32", arch)]
            found += [cuda_matmul.skinny(name, 32, n, False) for n in (1, 4)]
            found += [t for t in more_tiles(arch, kind, "nn") if t.kernel == "simt" or layouts == by_row]
            for tile in found:
                if cuda_matmul.takes(tile, name, layouts):
                    wanted[cuda_matmul.kernel_of(tile, name, layouts, epilogue)] = None
    compile_together(arch, wanted)
    return len(wanted)


def integers(
    device: Device, rng: np.random.Generator, dtype: np.dtype[Any], rows: int, columns: int, layout: str, step: int
) -> tuple[Any, Any]:
    """A part of a larger matrix, on the CPU and on the GPU, `step` numbers before a multiple of 16 bytes."""
    shape = (rows, columns) if layout == "n" else (columns, rows)
    largest = 1 if dtype.itemsize == 2 else 4
    values = rng.integers(-largest, largest + 1, (shape[0] + 1, -(-shape[1] // 8) * 8 + 8)).astype(dtype)
    a, x = (whole[1:, 8 - step : 8 - step + shape[1]] for whole in (values, device.upload(values)))
    return (a, x) if layout == "n" else (a.T, x.T)


def check(device: CudaDevice, kind: str) -> int:
    """Compare integers exactly: each tile, in each layout, aligned and not."""
    dtype, count = DTYPES[kind], 0
    rng = np.random.default_rng(0)
    for m, n, k in [(300, 333, 777), (257, 264, 72), (1, 1000, 513), (700, 3, 100), (5, 7, 0)]:
        for layouts, step in itertools.product(("nn", "nt", "tn", "tt"), (0, 1)):
            a, x = integers(device, rng, dtype, m, k, layouts[0], step)
            b, w = integers(device, rng, dtype, k, n, layouts[1], step)
            exact = np.maximum(a.astype(np.float64) @ b.astype(np.float64), 0).astype(dtype)
            found = with_more(cuda_matmul.choose(device, x, w, kind == "tf32"), device, kind, m, n, k, layouts)
            done: set[tuple[Tile, bool]] = set()
            for choice in found:
                key = choice.tile, choice.splits > 1
                if key in done:
                    continue
                done.add(key)
                out = device.upload(np.full((m, n), np.nan, dtype))
                cuda_matmul.linear(device, x, w, None, RELU, 0.0, out, None, tf32=kind == "tf32", choice=choice)
                result = np.empty((m, n), dtype)
                device.download(out, result)
                if not np.array_equal(result.astype(np.float64), exact.astype(np.float64)):
                    wrong = np.argwhere(result.astype(np.float64) != exact.astype(np.float64))
                    raise RuntimeError(f"WRONG: {kind} {m}x{k} @ {k}x{n} {layouts} offset {step} {choice}: {wrong[:5]}")
                count += 1
    return count


#
# The report
#


TABLE_HEAD = ("matmul", "cuBLAS", "what is taken", "over cuBLAS", "best", "over cuBLAS", "all")


def show(row: Row) -> list[str]:
    """Print a shape's times; return them as a row of the table."""
    m, n, k, _, cold = row.shape
    taken, ours = next(iter(row.ours.items()))
    best, time_best = min(row.ours.items(), key=lambda item: item[1])
    flops, bytes_ = 2.0 * m * n * k, (m * k + k * n + m * n) * DTYPES[row.kind].itemsize
    rate = f"{bytes_ / ours / 1e3:6.0f} GB/s" if cold else f"{flops / ours / 1e6:6.1f} TF/s"
    print(
        f"{row.kind:8} {row.shape!s:30} cuBLAS {row.cublas:8.1f}, + {row.cublas_plus:8.1f} us | ours {ours:8.1f} {rate}"
        f" = {row.cublas / ours:5.2f}, + {row.cublas_plus / ours:5.2f} | best {best} {row.cublas / time_best:5.2f}"
    )
    others = sorted(row.ours.items(), key=lambda item: item[1])
    times = "; ".join(f"{'*' if name == taken else ''}{name} {t:.1f}" for name, t in others)
    print(f"    {times}", flush=True)
    shares = f"{row.cublas / ours:.2f}", f"{row.cublas / time_best:.2f}"
    return [f"{row.kind} {row.shape}", f"{row.cublas:.1f}", taken, shares[0], best, shares[1], times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the shapes of targets; fewer rounds, no checks")
    parser.add_argument("--kinds", default=None, help=f"of {','.join(DTYPES)}")
    parser.add_argument("--tables", type=Path, default=None, help="add the times here, for gpu_report.py")
    parser.add_argument("--seconds", type=float, default=80.0, help="begin no shape after this time")
    parser.add_argument("--compile", metavar="ARCH", default=None, help="compile for it, and do nothing else")
    arguments = parser.parse_args()
    began = time.monotonic()
    shapes = QUICK if arguments.quick else SHAPES
    kinds = arguments.kinds.split(",") if arguments.kinds else list(shapes)
    if arguments.compile:
        compiled = compile_all(arguments.compile, kinds, arguments.quick)
        print(f"{compiled} kernels compiled, {time.monotonic() - began:.1f} s")
        return

    try:
        device = CudaDevice(0)
    except RuntimeError as error:
        parser.exit(2, f"no GPU: {error}\n")
    cublas = Cublas()
    print(f"{device.name}, {device.arch}, {device.multiprocessors} multiprocessors, NVRTC {compiler.nvrtc_version()}")
    compiled = compile_all(device.arch, kinds, arguments.quick)
    print(f"{compiled} kernels compiled, {time.monotonic() - began:.1f} s", flush=True)
    failed = False
    for kind in () if arguments.quick else kinds:
        try:
            print(f"{kind}: {check(device, kind)} results are exact, {time.monotonic() - began:.1f} s", flush=True)
        except Exception:
            failed = True
            traceback.print_exc()
    for kind in kinds:
        rows = []
        for shape in shapes[kind]:
            if time.monotonic() - began > arguments.seconds:
                print(f"{kind} {shape}: no time left", flush=True)
                continue
            try:
                row = measure(device, cublas, pool_of(kind), kind, shape, 5 if arguments.quick else 7)
            except Exception:
                failed = True
                traceback.print_exc()
                continue
            rows.append(show(row))
        if arguments.tables and rows:
            write_table(arguments.tables, f"tiles of matmuls in {kind}, µs", TABLE_HEAD, rows)
    print(f"{time.monotonic() - began:.1f} s")
    if failed:
        raise SystemExit("something failed: see above")


if __name__ == "__main__":
    main()
