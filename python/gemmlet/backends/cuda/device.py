"""The one object through which the CUDA backend touches a GPU: compiled kernels, memory, launches, graphs.

Everything else in the backend is arithmetic on shapes and addresses, so that tests put an object of the same kind in
its place that runs the very kernels on the CPU (tests/cuda_on_host).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import compiler

# A kernel with everything but the size of its grid and its arguments: ``launch(grid_x, grid_y, *values)``.
Launch = Callable[..., None]

# Blocks along x, y and z.
Grid = tuple[int, int, int]

# What is copied as it is, or rounded to TF32.
BoxNumber = Literal["uint16", "uint32", "tf32"]


class Graph(Protocol):
    """Launches that were recorded once, to be done again."""

    def replay(self, count: int = 1) -> None:
        """Do all of them, in order, `count` times, on the current stream."""


class Device(Protocol):
    """A GPU, and the stream that is current in the calling thread."""

    id: int  # CUDA's number of the GPU
    name: str  # as the driver calls it
    arch: str  # what is compiled for, "sm_90a"
    multiprocessors: int

    def __hash__(self) -> int:
        """What is prepared for a device is remembered by it."""

    def kernels(self, source: str, expressions: Sequence[str]) -> list[Any]:
        """Return kernels of the file ``csrc/cuda/<source>``, to be launched, compiled at their first use.

        `expressions` are what C++ calls them: ``"gemmlet::fill<float>"``. Those of one call are compiled together.
        """

    def launch(
        self, kernel: Any, grid: Grid, block: int, arguments: Sequence[np.generic], shared: int = 0, cluster: int = 1
    ) -> None:
        """Start a kernel on the current stream.

        `arguments` are NumPy scalars of just the kernel's parameter types (uint64 for a pointer, void for a struct),
        `shared` the bytes of dynamic shared memory, `cluster` how many blocks the kernel's own clusters have.
        """

    def prepare(self, source: str, expression: str, parameters: Sequence[str], block: int, shared: int = 0) -> Launch:
        """Return what launches a kernel (see `kernels`) on the current stream at the least cost.

        `parameters` are the kernel's in the notation of `struct`, without alignment: ``"Q"`` a pointer, ``"Qii"`` a
        struct of a pointer and two integers. A launch takes the values of all of them, one after the other. Clusters
        have at most 8 blocks.
        """

    def pinned(self) -> NDArray[np.int64]:
        """Return two numbers in memory of the CPU that kernels write to, at the same address."""

    def tensor_map(
        self, address: int, dtype: BoxNumber, shape: tuple[int, int], row_bytes: int, box: tuple[int, int]
    ) -> np.void:
        """Return a ``TensorMap``, by which kernels copy boxes of an array to shared memory (TMA, from sm_90 on).

        Rows of contiguous numbers are `row_bytes` apart, a multiple of 16, as is the `address`; rows of a box are 128
        bytes.
        """

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return a new `cupy.ndarray`, C-contiguous, its start aligned to 256 bytes."""

    def empty_pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a new NumPy array, C-contiguous, in page-locked memory if there is some."""

    def upload(self, array: NDArray[Any], out: Any = None) -> Any:
        """Return a copy of a C-contiguous NumPy array on the GPU; in `out`, if that is given.

        It is made on the current stream. A page-locked array has to stay as it is until the stream has been waited for;
        any other has been read when this returns.
        """

    def download(self, array: Any, out: NDArray[Any]) -> None:
        """Copy a C-contiguous `cupy.ndarray` into a C-contiguous NumPy array, and wait until it is there."""

    def zero(self, array: Any) -> None:
        """Fill a contiguous `cupy.ndarray` with zeros, on the current stream."""

    def record(self, launches: Callable[[], None]) -> Graph:
        """Return what `launches` launches as a graph, without doing it.

        Arrays that `empty` returns meanwhile are kept for the graph.
        """

    def stream(self) -> int:
        """A number for the current stream."""

    def synchronize(self) -> None:
        """Wait for the current stream; raise what went wrong on it."""


class _ThreadsOwn(threading.local):
    """Of each thread: whether it has CUDA's context; while it records a graph, the arrays that it made meanwhile."""

    has_context = False
    recorded: list[Any] | None = None


class CudaDevice:
    """The real one, by CUDA's number: CuPy's arrays, streams and graphs, and kernels compiled by NVRTC (`compiler`).

    RuntimeError if CuPy is not installed, or finds no driver or no such GPU; the message says which.
    """

    def __init__(self, number: int = 0) -> None:
        cupy = compiler.import_cupy()
        self._cupy = cupy
        runtime = cupy.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except (runtime.CUDARuntimeError, RuntimeError, ImportError) as error:
            raise RuntimeError(f"backend 'cuda' finds no usable GPU or driver: {error}") from error
        if not 0 <= number < count:
            raise RuntimeError(f"backend 'cuda' finds {count} GPU{'s' * (count != 1)}, and no number {number}")
        self.id = number
        self._device = cupy.cuda.Device(number)
        properties = runtime.getDeviceProperties(number)
        name = properties["name"]
        self.name = name.decode() if isinstance(name, bytes) else str(name)
        self.arch = compiler.architecture(self._device.compute_capability)
        self.multiprocessors = int(properties["multiProcessorCount"])
        self._kernels: dict[tuple[str, str], Any] = {}
        self._modules: list[Any] = []
        # The bytes of dynamic shared memory that a kernel has been allowed; up to 48 KiB it need not ask.
        self._allowed: dict[int, int] = {}
        # Kernels that have been allowed clusters of more than 8 blocks.
        self._large_clusters: set[int] = set()
        self._own = _ThreadsOwn()
        self._get_device = runtime.getDevice
        # Where CuPy launches if the null stream is current.
        per_thread = int(os.environ.get("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "0"))
        self._null_stream = int(runtime.streamPerThread) if per_thread else 0

    def kernels(self, source: str, expressions: Sequence[str]) -> list[Any]:
        found = [self._kernels.get((source, expression)) for expression in expressions]
        if None in found:
            compiled = compiler.cubin(source, list(expressions), self.arch)
            module = self._cupy.cuda.Module()
            with self._device:
                module.load(compiled.image)
                for expression in expressions:
                    self._kernels[source, expression] = module.get_function(compiled.names[expression])
            self._modules.append(module)
            found = [self._kernels[source, expression] for expression in expressions]
        return found

    def launch(
        self, kernel: Any, grid: Grid, block: int, arguments: Sequence[np.generic], shared: int = 0, cluster: int = 1
    ) -> None:
        with self._device:
            self._allow(kernel, shared, cluster)
            # CuPy takes a struct as an array of one, and copies it.
            given = [np.array(a) if type(a) is np.void else a for a in arguments]
            kernel(grid, (block, 1, 1), given, shared_mem=shared)

    def _allow(self, kernel: Any, shared: int, cluster: int = 1) -> None:
        set_attribute = self._cupy.cuda.driver.funcSetAttribute
        if shared > self._allowed.get(kernel.ptr, 48 * 1024):
            set_attribute(kernel.ptr, 8, shared)  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._allowed[kernel.ptr] = shared
        if cluster > 8 and kernel.ptr not in self._large_clusters:
            set_attribute(kernel.ptr, 14, 1)  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            self._large_clusters.add(kernel.ptr)

    def prepare(self, source: str, expression: str, parameters: Sequence[str], block: int, shared: int = 0) -> Launch:
        # CuPy makes an object of each argument, which costs more than the driver's part of a launch. Here all of them
        # are packed into one piece of memory, to whose parts the driver's array of pointers points once and for all.
        (kernel,) = self.kernels(source, [expression])
        with self._device:
            self._allow(kernel, shared)
        packing, offsets = _packing(parameters)
        pack_into, function, device, own = packing.pack_into, kernel.ptr, self._device, self._own
        number, get_device, null_stream = self.id, self._get_device, self._null_stream
        get_stream, launch_kernel = self._cupy.cuda.get_current_stream, self._cupy.cuda.driver.launchKernel
        # Memory for arguments that no thread uses now; to take from a list and to give back is atomic. Launches copy.
        free: list[tuple[bytearray, Any, int]] = []

        def launch(grid_x: int, grid_y: int, *values: Any) -> None:
            if get_device() != number:
                with device:
                    launch(grid_x, grid_y, *values)
                return
            if not own.has_context:
                self._make_context()
            try:
                memory = free.pop()
            except IndexError:
                memory = _memory_for(packing.size, offsets)
            pack_into(memory[0], 0, *values)
            stream = get_stream(number).ptr or null_stream
            launch_kernel(function, grid_x, grid_y, 1, block, 1, 1, shared, stream, memory[2], 0)
            free.append(memory)

        return launch

    def _make_context(self) -> None:
        """Give the calling thread CUDA's context, which CuPy's own launches do and the driver's does not."""
        self._cupy.cuda.runtime.memGetInfo()
        self._own.has_context = True

    # Remembered, as it takes some microseconds; nothing of the arguments is looked at but their values.
    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def tensor_map(
        address: int, dtype: BoxNumber, shape: tuple[int, int], row_bytes: int, box: tuple[int, int]
    ) -> np.void:
        # CUtensorMapDataType: UINT16, UINT32, TFLOAT32.
        number = {"uint16": 1, "uint32": 2, "tf32": 11}[dtype]
        memory = ctypes.create_string_buffer(128 + 64)
        offset = -ctypes.addressof(memory) % 64  # which the driver asks for
        status = _driver().cuTensorMapEncodeTiled(
            ctypes.byref(memory, offset),
            ctypes.c_int(number),
            ctypes.c_uint32(2),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * 2)(*shape[::-1]),
            (ctypes.c_uint64 * 1)(row_bytes),
            (ctypes.c_uint32 * 2)(*box[::-1]),
            (ctypes.c_uint32 * 2)(1, 1),
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(3),  # CU_TENSOR_MAP_SWIZZLE_128B
            ctypes.c_int(3),  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
            ctypes.c_int(0),  # zeros beyond the array
        )
        if status:
            raise RuntimeError(
                f"cuTensorMapEncodeTiled of {shape} at {address:#x}, rows {row_bytes} apart: error {status}"
            )
        return np.void(memory.raw[offset : offset + 128])

    def pinned(self) -> NDArray[np.int64]:
        with self._device:
            return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(16), np.int64, 2)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        if self._get_device() == self.id:
            array = self._cupy.ndarray(shape, dtype)
        else:
            with self._device:
                array = self._cupy.ndarray(shape, dtype)
        if self._own.recorded is not None:
            self._own.recorded.append(array)
        return array

    def empty_pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        dtype, count = np.dtype(dtype), math.prod(shape)
        try:
            with self._device:
                memory = self._cupy.cuda.alloc_pinned_memory(max(count * dtype.itemsize, 1))
        except self._cupy.cuda.runtime.CUDARuntimeError:
            return np.empty(shape, dtype)  # the system lets no more memory be locked
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def upload(self, array: NDArray[Any], out: Any = None) -> Any:
        target = self.empty(array.shape, array.dtype) if out is None else out
        if array.size:
            with self._device:
                target.set(array, stream=self._cupy.cuda.get_current_stream())
        return target

    def download(self, array: Any, out: NDArray[Any]) -> None:
        if out.size:
            with self._device:
                array.get(out=out)

    def zero(self, array: Any) -> None:
        if array.size:
            with self._device:
                array.data.memset_async(0, array.nbytes)

    def record(self, launches: Callable[[], None]) -> Graph:
        recorded: list[Any] = []
        self._own.recorded = recorded
        try:
            with self._device:
                stream = self._cupy.cuda.Stream(non_blocking=True)
                with stream:
                    stream.begin_capture()
                    try:
                        launches()
                    finally:
                        graph = stream.end_capture()
        finally:
            self._own.recorded = None
        return _CudaGraph(graph, self._cupy, self._device, recorded)

    def stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream(self.id).ptr) or self._null_stream

    def synchronize(self) -> None:
        if self._get_device() == self.id:
            self._cupy.cuda.runtime.streamSynchronize(self.stream())
        else:
            with self._device:
                self._cupy.cuda.runtime.streamSynchronize(self.stream())


def _packing(parameters: Sequence[str]) -> tuple[struct.Struct, list[int]]:
    """How values are packed, each parameter at a multiple of 8 bytes; and where each is."""
    offsets, format_ = [], "="
    for parameter in parameters:
        offsets.append(struct.calcsize(format_))
        format_ += parameter
        format_ += f"{-struct.calcsize(format_) % 8}x"
    return struct.Struct(format_), offsets


def _memory_for(size: int, offsets: Sequence[int]) -> tuple[bytearray, Any, int]:
    """Memory for arguments, pointers to them, and the address of the pointers."""
    memory = bytearray(size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pointers = (ctypes.c_uint64 * len(offsets))(*(start + offset for offset in offsets))
    return memory, pointers, ctypes.addressof(pointers)


@functools.cache
def _driver() -> ctypes.CDLL:
    """The driver's library, for what CuPy does not bind; CuPy has loaded it."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


class _CudaGraph:
    def __init__(self, graph: Any, cupy: Any, device: Any, memory: list[Any]) -> None:
        self._graph, self._cupy, self._device = graph, cupy, device
        self._memory = memory  # which the graph's kernels use as long as there is the graph

    def replay(self, count: int = 1) -> None:
        """See `Graph`."""
        with self._device:
            stream = self._cupy.cuda.get_current_stream()
            for _ in range(count):
                self._graph.launch(stream)
