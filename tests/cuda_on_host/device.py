"""`HostDevice`: what the CUDA backend takes for a GPU, where there is none. The kernels of csrc/cuda/ run on the CPU.

A unit of kernels is compiled by g++ once for each content of its sources, into ``GEMMLET_CUDA_HOST_CACHE``, or else
a folder of the user's own below the system's for temporary files. What NVRTC and nvcc say of kernels is kept there too,
by all that it depends on. ``GEMMLET_CUDA_HOST_SANITIZE`` names sanitizers to compile with (tools/sanitize_cuda.sh),
``GEMMLET_CUDA_HOST_ORDER`` the order in which threads run, where a test does not say, and ``GEMMLET_CUDA_HOST_THREADS``
how many OS threads share the blocks.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import itertools
import math
import os
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # no CUDA is installed, it may say
    import cupy

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# From each thread to the next one, as long as no barrier decides; whether warps run ahead of each other; and the seed
# of an order drawn at random.
THREAD_ORDERS = {
    "forward": (1, False, 0),
    "backward": (-1, False, 0),
    "strided": (37, False, 0),
    "eager": (1, True, 0),
    "random": (1, False, 20240229),
}

# As of compute capability 8.0 to 12.0; the last is the smallest of the largest (9.0 has the most, 8.6 and 12.0 fewer).
MAX_BLOCK = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_SHARED = 227 * 1024

# Parameters that are no structs, in the notation of `struct`.
SCALARS = {"Q": np.uint64, "q": np.int64, "i": np.int32, "f": np.float32, "d": np.float64}

COMPILER = "g++"
SANITIZERS = tuple(name for name in os.environ.get("GEMMLET_CUDA_HOST_SANITIZE", "").split(",") if name)


class CompileError(RuntimeError):
    """Sources that g++ does not take."""


class _Kernel(ctypes.Structure):
    """`cuda_host::Kernel`."""

    _fields_ = (
        ("types", ctypes.c_char_p),
        ("count", ctypes.c_uint),
        ("sizes", ctypes.POINTER(ctypes.c_uint)),
        ("kinds", ctypes.c_char_p),
        ("max_threads", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("run", ctypes.c_void_p),
        ("statics", ctypes.c_void_p),
    )


class _Configuration(ctypes.Structure):
    """`cuda_host::Configuration`."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("step", ctypes.c_int),
        ("eager", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("os_threads", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel of a library that is loaded."""

    name: str
    description: _Kernel
    types: str  # of its parameters
    sizes: tuple[int, ...]
    kinds: str
    library: ctypes.CDLL


class Graph:
    """Launches, to be done again."""

    def __init__(self, launches: list[Callable[[], None]], memory: list[Any]) -> None:
        self._launches, self._memory = launches, memory

    def replay(self, count: int = 1) -> None:
        for _ in range(count):
            for launch in self._launches:
                launch()


class HostDevice:
    """The `gemmlet.backends.cuda.device.Device` that is no GPU.

    Parameters
    ----------
    root : path, optional
        Has files of ``csrc/`` that come before the project's own.
    thread_order : str, optional
        A key of `THREAD_ORDERS`; also an attribute, to be changed between launches.
    number : int
        CUDA's, of the GPU that it stands for.
    """

    name = "CPU (CUDA kernels compiled by g++)"
    arch = "host"
    multiprocessors = 4  # few, so that loops over a grid go round more than once

    def __init__(self, root: pathlib.Path = ROOT, thread_order: str | None = None, number: int = 0) -> None:
        self.root, self.id = root, number
        self.thread_order = thread_order or os.environ.get("GEMMLET_CUDA_HOST_ORDER", "forward")
        processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        threads = os.environ.get("GEMMLET_CUDA_HOST_THREADS", max(1, (os.cpu_count() or 1) // processes))
        self.os_threads = int(threads)
        self._recording = threading.local()  # its `launches`, where there are some: of a thread, as streams are
        self._kernels: dict[tuple[str, tuple[str, ...]], list[Kernel]] = {}
        self._pinned: list[weakref.ref[NDArray[np.uint8]]] = []
        # What a GPU might not have copied yet: where from, and what it is to find there.
        self._streams = threading.local()

    def kernels(self, source: str, expressions: Sequence[str]) -> list[Kernel]:
        key = source, tuple(expressions)
        if key not in self._kernels:
            library = ctypes.CDLL(str(_compiled_unit(self.root, source, expressions)))
            self._kernels[key] = [_kernel(library, number, name) for number, name in enumerate(expressions)]
        return self._kernels[key]

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: int,
        arguments: Sequence[np.generic],
        shared: int = 0,
        cluster: int = 1,
    ) -> None:
        _check_arguments(kernel, arguments)
        _check_configuration(kernel, grid, block, shared, cluster)
        configuration = _Configuration((*grid,), block, shared, *THREAD_ORDERS[self.thread_order], self.os_threads)
        # Copies, as the launch may be done later.
        values = [_aligned(a.tobytes()) for a in arguments]
        pointers = (ctypes.POINTER(ctypes.c_char) * len(values))(*values)

        def run() -> None:
            message = ctypes.create_string_buffer(2048)
            done = _runtime().cuda_host_launch(
                ctypes.byref(kernel.description),
                ctypes.byref(configuration),
                pointers,
                message,
                ctypes.c_size_t(len(message)),
            )
            if not done:
                raise RuntimeError(f"{kernel.name}: {message.value.decode()}")

        self._do(run)

    def prepare(
        self, source: str, expression: str, parameters: Sequence[str], block: int, shared: int = 0
    ) -> Callable[..., None]:
        (kernel,) = self.kernels(source, [expression])
        layouts = [struct.Struct("=" + parameter) for parameter in parameters]
        counts = [len(layout.unpack(bytes(layout.size))) for layout in layouts]

        def launch(grid_x: int, grid_y: int, *values: Any) -> None:
            if len(values) != sum(counts):
                raise TypeError(f"{kernel.name} takes {sum(counts)} values {parameters}, not {len(values)}")
            if (cluster := kernel.description.cluster) > 8:
                raise ValueError(f"{kernel.name}: clusters of {cluster} are not allowed to what is prepared")
            rest, arguments = list(values), []
            for parameter, layout, count in zip(parameters, layouts, counts, strict=True):
                data = np.void(layout.pack(*rest[:count]))
                arguments.append(data.view(SCALARS[parameter]) if parameter in SCALARS else data)
                del rest[:count]
            self.launch(kernel, (grid_x, grid_y, 1), block, arguments, shared, cluster=cluster)

        return launch

    def pinned(self) -> NDArray[np.int64]:
        return self.view(self.empty((2,), np.int64))

    def tensor_map(
        self, address: int, dtype: str, shape: tuple[int, int], row_bytes: int, box: tuple[int, int]
    ) -> np.void:
        size, rounds = {"uint16": (2, False), "uint32": (4, False), "tf32": (4, True)}[dtype]
        # What cuTensorMapEncodeTiled asks for, with swizzling by 128 bytes.
        if address % 16 or row_bytes % 16 or not shape[1] * size <= row_bytes < 2**40:
            raise ValueError(f"no tensor map of {shape} at {address}, rows {row_bytes} bytes apart")
        if not all(1 <= n <= 2**32 for n in shape) or not all(1 <= n <= 256 for n in box) or box[1] * size != 128:
            raise ValueError(f"no tensor map of {shape} with a box of {box}")
        return np.void(_TENSOR_MAP.pack(address, shape[1], shape[0], row_bytes, box[1], box[0], size, rounds))

    def _do(self, work: Callable[[], None]) -> None:
        if hasattr(self._recording, "launches"):
            self._recording.launches.append(work)
        else:
            work()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        dtype = np.dtype(dtype)
        memory = _allocate(math.prod(shape) * dtype.itemsize, self.id)
        array = cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))
        if hasattr(self._recording, "launches"):
            self._recording.memory.append(array)
        return array

    def empty_pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        dtype = np.dtype(dtype)
        memory = np.empty(max(math.prod(shape) * dtype.itemsize, 1), np.uint8)
        self._pinned = [known for known in self._pinned if known() is not None] + [weakref.ref(memory)]
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def upload(self, array: NDArray[Any], out: Any = None) -> Any:
        if not array.flags.c_contiguous:
            raise ValueError("upload takes C-contiguous arrays")
        copy = self.empty(array.shape, array.dtype) if out is None else out
        if copy.shape != array.shape or copy.dtype != array.dtype or not copy.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape} cannot be copied into {copy.dtype} {copy.shape}")
        self.view(copy)[...] = array
        for known in self._pinned:
            memory = known()
            if memory is not None and np.may_share_memory(memory, array):
                # A GPU may copy it as late as it is waited for.
                start = array.ctypes.data - memory.ctypes.data
                self._copying().append((known, slice(start, start + array.nbytes), array.tobytes()))
        return copy

    def download(self, array: Any, out: NDArray[Any]) -> None:
        if not (array.flags.c_contiguous and out.flags.c_contiguous):
            raise ValueError("download takes C-contiguous arrays")
        if array.shape != out.shape or array.dtype != out.dtype:
            raise ValueError(f"{array.dtype} {array.shape} cannot be copied into {out.dtype} {out.shape}")
        self.synchronize()
        out[...] = self.view(array)

    def zero(self, array: Any) -> None:
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            raise ValueError("zero takes contiguous arrays")
        self._do(lambda: self.view(array).fill(0))

    def record(self, launches: Callable[[], None]) -> Graph:
        self._recording.launches, self._recording.memory = recorded, memory = [], []
        try:
            launches()
        finally:
            del self._recording.launches
        return Graph(recorded, memory)

    def stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        if hasattr(self._recording, "launches"):
            raise RuntimeError("a stream that is recorded cannot be waited for")
        copying, self._streams.copying = self._copying(), []
        for known, where, content in copying:
            memory = known()
            if memory is None or memory[where].tobytes() != content:
                raise RuntimeError("page-locked memory was written or freed before the stream was waited for")

    def _copying(self) -> list[tuple[weakref.ref[NDArray[np.uint8]], slice, bytes]]:
        """Of the stream, which is the thread's own."""
        if not hasattr(self._streams, "copying"):
            self._streams.copying = []
        return self._streams.copying

    @staticmethod
    def view(array: Any) -> NDArray[Any]:
        """Return a NumPy array on the memory of a `cupy.ndarray`, with its strides."""
        memory = array.data.mem
        offset = array.data.ptr - memory.ptr
        return np.ndarray(array.shape, array.dtype, memory._owner, offset, array.strides)

    def array(self, array: NDArray[Any]) -> Any:
        """Return a `cupy.ndarray` with the values and the strides of a NumPy array."""
        reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        before = -sum(r for r in reach if r < 0) if array.size else 0
        after = sum(r for r in reach if r > 0) + array.itemsize if array.size else 0
        pointer = cupy.cuda.MemoryPointer(_allocate(before + after, self.id), before)
        copy = cupy.ndarray(array.shape, array.dtype, memptr=pointer, strides=array.strides)
        self.view(copy)[...] = array
        return copy


# `TensorMap` of ptx_on_host.h.
_TENSOR_MAP = struct.Struct("=Qqqqiiii80x")


def _aligned(content: bytes) -> Any:
    """Return a buffer aligned to 64 bytes, as much as a parameter may need."""
    memory = ctypes.create_string_buffer(len(content) + 64)
    buffer = (ctypes.c_char * len(content)).from_buffer(memory, -ctypes.addressof(memory) % 64)
    buffer.raw = content
    return buffer


def _allocate(size: int, device: int) -> Any:
    """Return memory, poisoned, with guards around it, that is given back with the last array on it."""
    runtime = _runtime()
    address = runtime.cuda_host_allocate(ctypes.c_size_t(size))
    if not address:
        raise MemoryError(f"{size} bytes")
    owner = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(owner, runtime.cuda_host_free, ctypes.c_void_p(address)).atexit = False
    return cupy.cuda.UnownedMemory(address, size, owner, device)


def _check_arguments(kernel: Kernel, arguments: Sequence[np.generic]) -> None:
    if len(arguments) != len(kernel.sizes):
        raise TypeError(f"{kernel.name} takes {len(kernel.sizes)} arguments {kernel.types}, not {len(arguments)}")
    for position, (argument, size, kind) in enumerate(zip(arguments, kernel.sizes, kernel.kinds, strict=True)):
        if not isinstance(argument, np.generic):
            raise TypeError(f"{kernel.name}: argument {position} is a {type(argument).__name__}, no NumPy scalar")
        fits = {"p": argument.dtype == np.uint64, "f": argument.dtype.kind == "f", "s": argument.dtype.kind == "V"}
        if argument.itemsize != size or not fits.get(kind, argument.dtype.kind in "iub"):
            raise TypeError(
                f"{kernel.name}: argument {position} is {argument.dtype}, {argument.itemsize} bytes; the parameter, "
                f"of {size} bytes, is number {position} of {kernel.types}"
            )


def _check_configuration(kernel: Kernel, grid: tuple[int, int, int], block: int, shared: int, cluster: int) -> None:
    if not all(1 <= size <= most for size, most in zip(grid, MAX_GRID, strict=True)) or math.prod(grid) >= 2**32:
        raise ValueError(f"{kernel.name}: a grid of {grid}, at most {MAX_GRID}")
    if not 1 <= block <= kernel.description.max_threads:
        raise ValueError(f"{kernel.name}: {block} threads a block, 1 to {kernel.description.max_threads}")
    if cluster != kernel.description.cluster or grid[0] % cluster:
        raise ValueError(f"{kernel.name}: clusters of {cluster} in a grid of {grid}, not {kernel.description.cluster}")
    if not 0 <= shared <= MAX_SHARED:
        raise ValueError(f"{kernel.name}: {shared} bytes of dynamic shared memory, at most {MAX_SHARED}")


def _kernel(library: ctypes.CDLL, number: int, name: str) -> Kernel:
    description = _Kernel.in_dll(library, f"cuda_host_kernel_{number}")
    types = re.search(r"P = ({.*})", description.types.decode())
    assert types is not None
    sizes = tuple(description.sizes[: description.count])
    return Kernel(name, description, types[1], sizes, description.kinds.decode(), library)


#
# Compiling
#


@functools.cache
def _folder() -> pathlib.Path:
    chosen = os.environ.get("GEMMLET_CUDA_HOST_CACHE")
    folder = pathlib.Path(chosen or pathlib.Path(tempfile.gettempdir()) / f"gemmlet-cuda-on-host-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} is another user's: set GEMMLET_CUDA_HOST_CACHE")
    return folder


@functools.cache
def _compiler() -> str:
    """The compiler's version and what the processor has: libraries of others cannot be used."""
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"{COMPILER} is not installed")
    return subprocess.run([COMPILER, "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0]


@functools.cache
def _has_fma() -> bool:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return cpuinfo.exists() and re.search(r"\bfma\b", cpuinfo.read_text()) is not None


def sanitized_environment(*sanitizers: str) -> dict[str, str] | None:
    """Return the environment for a process whose kernels are compiled with address, undefined or thread sanitizers.

    None where the compiler has no library for one of them.
    """
    # Python is not built with them, so they have to be there before anything else.
    preload = []
    for sanitizer in sanitizers:
        library = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}[sanitizer]
        command = [COMPILER, f"-print-file-name={library}"]
        preload.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    if not all(map(os.path.isabs, preload)):
        return None
    if "thread" in sanitizers:
        preload.insert(0, str(_runtime_path(sanitizers)))  # is told of races
    return os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "GEMMLET_CUDA_HOST_SANITIZE": ",".join(sanitizers),
        # Neighbouring blocks are in different ones: those in one are ordered.
        "GEMMLET_CUDA_HOST_THREADS": "3",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # CPython itself leaves memory behind
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Else a race is not reported if there was another where arrays had the same address; and a library's
        # thread_local variables, if 16 bytes behind a multiple of 4096, are taken for ones with a header that says
        # how many bytes they are.
        "TSAN_OPTIONS": "suppress_equal_addresses=0:intercept_tls_get_addr=0",
        "PYTHONMALLOC": "malloc",
        # ThreadSanitizer does not see how the threads of what is compiled without it wait for each other.
        "OPENBLAS_NUM_THREADS": "1",
        "GEMMLET_NUM_THREADS": "1",
    }


def _options() -> list[str]:
    """How kernels are compiled: nothing is contracted but what is written as fma, as with NVRTC's -fmad=false."""
    checks = [*SANITIZERS, "alignment", "bounds"]
    return [
        "-std=c++17",
        "-O1",
        "-g1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-gnu-unique",  # a shared variable of one library is none of another's
        "-fno-strict-aliasing",  # memory is read in packs
        "-ffp-contract=off",
        "-ftrivial-auto-var-init=pattern",
        f"-fsanitize={','.join(checks)}",
        "-fno-sanitize=shift-base",  # bits are shifted out, as C++20 has it
        "-fno-sanitize-recover=all",
        *(["-mfma"] if _has_fma() else []),
    ]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join([_compiler(), *parts]).encode()).hexdigest()[:32]


def _build(name: str, commands: Callable[[pathlib.Path], list[list[str]]]) -> pathlib.Path:
    """Return the file of that name in the cache; where there is none, of the commands that make it at a given path."""
    path = _folder() / name
    if path.exists():
        return path
    # The processes of a test run want the same ones at the same time. 256 locks are enough.
    with open(_folder() / f"{path.stem[-2:]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=_folder()) as folder:
                made = pathlib.Path(folder) / name
                # The compiler needs no sanitizer.
                environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
                for command in commands(made):
                    done = subprocess.run(command, env=environment, capture_output=True, text=True)
                    if done.returncode:
                        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
                os.replace(made, path)
    return path


def kept(name: str, compute: Callable[[], str]) -> str:
    """What `compute` returns, by a name that says all that it depends on: computed once, and kept in the cache."""
    path = _folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            made = pathlib.Path(folder) / name
            made.write_text(compute())
            os.replace(made, path)
    return path.read_text()


@functools.cache
def _runtime_path(sanitizers: tuple[str, ...] = SANITIZERS) -> pathlib.Path:
    source, header = HERE / "cuda_host.cpp", HERE / "cuda_host.h"
    defines = [f"-DCUDA_HOST_{name.upper()}" for name in sanitizers]
    options = ["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-pthread", *defines]
    name = "libcuda_host_" + _digest(source.read_text(), header.read_text(), *options)
    return _build(f"{name}.so", lambda to: [[COMPILER, *options, f"-Wl,-soname,{to.name}", "-o", str(to), str(source)]])


@functools.cache
def _runtime() -> ctypes.CDLL:
    runtime = ctypes.CDLL(str(_runtime_path()))
    runtime.cuda_host_allocate.restype = ctypes.c_void_p
    runtime.cuda_host_free.restype = None
    return runtime


@functools.cache
def _text(path: pathlib.Path) -> str:
    return path.read_text()


@functools.cache
def _sources(name: str, folders: tuple[pathlib.Path, ...]) -> dict[pathlib.Path, None]:
    """Return a file, as an include names it, and all that it includes, directly or not."""
    path = next((folder / name for folder in folders if (folder / name).exists()), None)
    if path is None:
        return {}  # a header of the system's
    found = {path: None}
    for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', _text(path), re.MULTILINE):
        found |= _sources(included, folders)
    return found


def _compiled_unit(root: pathlib.Path, source: str, expressions: Sequence[str]) -> pathlib.Path:
    """Return the library of the kernels of one source, `cuda_host_kernel_0` and so on."""
    folders = tuple(dict.fromkeys([root / "csrc", ROOT / "csrc", HERE]))
    files = [*_sources("cuda_host.h", folders), *_sources(f"cuda/{source}", folders)]
    bounds = dict(itertools.chain.from_iterable(_launch_bounds(_text(file)).items() for file in files))
    unit = ['#include "cuda_host.h"', f'#include "cuda/{source}"', *map(_declared_bounds(bounds), expressions)]
    for number, expression in enumerate(expressions):
        numbers = [_bound(bounds, expression, value) for value in ("launch_bounds", "cluster")]
        unit.append(f"CUDA_HOST_KERNEL({number}, {', '.join(numbers)}, {expression})")
    text = "\n".join([*dict.fromkeys(unit), ""])
    name = "unit_" + _digest(_runtime_path().name, text, *map(_text, files), *_options())

    def commands(to: pathlib.Path) -> list[list[str]]:
        code, compiled = to.with_suffix(".cpp"), to.with_suffix(".o")
        code.write_text(text)
        sanitizers = [f"-fsanitize={','.join(SANITIZERS)}"] if SANITIZERS else []
        return [
            [COMPILER, *_options(), *(f"-I{folder}" for folder in folders), "-c", "-o", str(compiled), str(code)],
            # Without the options, as the library of the checks for alignment and bounds is the runtime.
            [
                COMPILER,
                "-shared",
                "-Wl,-rpath,$ORIGIN",
                *sanitizers,
                "-o",
                str(to),
                str(compiled),
                str(_runtime_path()),
            ],
        ]

    return _build(f"{name}.so", commands)


# template <...> __global__ void __launch_bounds__(...) __cluster_dims__(...) name(, in either order
_PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_BOUNDED_KERNEL = re.compile(
    r"(?P<template>template\s*<[^;{}]*?>\s*)?(?:static\s+)?__global__\s+(?:static\s+)?void\s+"
    rf"(?P<bounds>(?:__(?:launch_bounds|cluster_dims)__\s*{_PARENTHESES}\s*)+)(?P<name>\w+)\s*\("
)


def _launch_bounds(text: str) -> dict[str, tuple[str, str, str]]:
    """Return, by a kernel's name, the head of its template, and the largest block and the cluster, expressions."""

    def first(bounds: str, name: str, default: int) -> str:
        # What follows a comma are others; what is within parentheses or angles holds commas, too.
        found = re.search(rf"__{name}__\s*\(((?:[^,<()]|<[^>]*>|\([^)]*\))*)", bounds)
        return found[1].strip() if found else str(default)

    return {
        match["name"]: (
            (match["template"] or "").strip(),
            first(match["bounds"], "launch_bounds", MAX_BLOCK),
            first(match["bounds"], "cluster_dims", 1),
        )
        for match in _BOUNDED_KERNEL.finditer(text)
    }


def _split(expression: str) -> tuple[str, str, str]:
    """Return the namespace, the name and the template's arguments of a kernel."""
    path, angle, rest = expression.partition("<")
    namespace, _, name = path.rpartition("::")
    return namespace, name, angle + rest


def _declared_bounds(bounds: dict[str, tuple[str, str, str]]) -> Callable[[str], str]:
    """Return what declares, for an expression, variables, or templates like the kernel: its block and its cluster."""

    def declared(expression: str) -> str:
        namespace, name, _ = _split(expression)
        if name not in bounds:
            return ""
        template, most, cluster = bounds[name]
        values = {"launch_bounds": most, "cluster": cluster}
        variables = " ".join(f"{template} constexpr unsigned {name}_{key} = {value};" for key, value in values.items())
        return f"namespace {namespace} {{ {variables} }}" if namespace else variables

    return declared


def _bound(bounds: dict[str, tuple[str, str, str]], expression: str, value: str) -> str:
    namespace, name, arguments = _split(expression)
    if name not in bounds:
        return str({"launch_bounds": MAX_BLOCK, "cluster": 1}[value])
    return f"({namespace}{'::' if namespace else ''}{name}_{value}{arguments})"
