"""The one object through which the CUDA backend touches a GPU: compiled kernels, memory, launches, graphs.

Everything else in the backend is arithmetic on shapes and addresses, so that tests put an object of the same kind in
its place that runs the very kernels on the CPU (tests/cuda_on_host).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import cuda_compile


class Graph(Protocol):
    """Launches that were recorded once, to be done again."""

    def replay(self, count: int = 1) -> None:
        """Do all of them, in order, so many times, on the current stream."""


class Device(Protocol):
    """A GPU, and the stream that is current in the calling thread.

    Attributes
    ----------
    id : int
        CUDA's number of the GPU.
    name : str
        As the driver calls it.
    arch : str
        What is compiled for, ``"sm_90a"``.
    multiprocessors : int
    """

    id: int
    name: str
    arch: str
    multiprocessors: int

    def kernels(self, source: str, expressions: Sequence[str]) -> list[Any]:
        """Return kernels of the file ``csrc/cuda/<source>``, to be launched, compiled at their first use.

        `expressions` are what C++ calls them: ``"gemmlet::fill<float>"``. Those of one call are compiled together.
        """

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: int,
        arguments: Sequence[np.generic],
        shared: int = 0,
        cluster: int = 1,
    ) -> None:
        """Start a kernel on the current stream.

        `arguments` are NumPy scalars of just the kernel's parameter types (uint64 for a pointer, void for a struct),
        `shared` the bytes of dynamic shared memory, `cluster` how many blocks the kernel's own clusters have.
        """

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Return a new `cupy.ndarray`, C-contiguous, its start aligned to 256 bytes."""

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a copy of a C-contiguous NumPy array on the GPU."""

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


class CudaDevice:
    """The real one: CuPy's arrays, streams and graphs, and kernels compiled by NVRTC (`cuda_compile`).

    Parameters
    ----------
    number : int
        CUDA's number of the GPU.

    Raises
    ------
    RuntimeError
        CuPy is not installed, or finds no driver or no such GPU; the message says which.
    """

    def __init__(self, number: int = 0) -> None:
        cupy = cuda_compile.import_cupy()
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
        self.arch = cuda_compile.architecture(self._device.compute_capability)
        self.multiprocessors = int(properties["multiProcessorCount"])
        self._kernels: dict[tuple[str, str], Any] = {}
        self._modules: list[Any] = []
        # The bytes of dynamic shared memory that a kernel has been allowed; up to 48 KiB it need not ask.
        self._allowed: dict[int, int] = {}
        # Of a thread that records a graph: the arrays that it made meanwhile.
        self._own = threading.local()

    def kernels(self, source: str, expressions: Sequence[str]) -> list[Any]:
        """See `Device`."""
        found = [self._kernels.get((source, expression)) for expression in expressions]
        if None in found:
            compiled = cuda_compile.cubin(source, list(expressions), self.arch)
            module = self._cupy.cuda.Module()
            with self._device:
                module.load(compiled.image)
                for expression in expressions:
                    self._kernels[source, expression] = module.get_function(compiled.names[expression])
            self._modules.append(module)
            found = [self._kernels[source, expression] for expression in expressions]
        return found

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: int,
        arguments: Sequence[np.generic],
        shared: int = 0,
        cluster: int = 1,
    ) -> None:
        """See `Device`."""
        with self._device:
            if shared > self._allowed.get(kernel.ptr, 48 * 1024):
                attribute = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._cupy.cuda.driver.funcSetAttribute(kernel.ptr, attribute, shared)
                self._allowed[kernel.ptr] = shared
                if cluster > 8:
                    attribute = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                    self._cupy.cuda.driver.funcSetAttribute(kernel.ptr, attribute, 1)
            # CuPy takes a struct as an array of one, and copies it.
            given = [np.array(a) if type(a) is np.void else a for a in arguments]
            kernel(grid, (block, 1, 1), given, shared_mem=shared)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Device`."""
        with self._device:
            array = self._cupy.ndarray(shape, dtype)
        if (recorded := getattr(self._own, "recorded", None)) is not None:
            recorded.append(array)
        return array

    def upload(self, array: NDArray[Any]) -> Any:
        """See `Device`."""
        target = self.empty(array.shape, array.dtype)
        if array.size:
            with self._device:
                # Pageable memory has been read when this returns.
                target.set(array, stream=self._cupy.cuda.get_current_stream())
        return target

    def download(self, array: Any, out: NDArray[Any]) -> None:
        """See `Device`."""
        if out.size:
            with self._device:
                array.get(out=out)

    def zero(self, array: Any) -> None:
        """See `Device`."""
        if array.size:
            with self._device:
                array.data.memset_async(0, array.nbytes)

    def record(self, launches: Callable[[], None]) -> Graph:
        """See `Device`."""
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
        """See `Device`."""
        return int(self._cupy.cuda.get_current_stream(self.id).ptr)

    def synchronize(self) -> None:
        """See `Device`."""
        with self._device:
            self._cupy.cuda.get_current_stream().synchronize()


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
