"""The GPU as the benchmarks see it: arrays, graphs, and the time that it takes itself, by CUDA events.

Everything here that touches a GPU is a method of `Gpu`, so that tests run the cases on the CPU with another one.
"""

from __future__ import annotations

import concurrent.futures
import gc
import importlib
import importlib.util
import json
import math
import multiprocessing
import random
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import numpy as np

import gemmlet
from gemmlet.backends.cuda import compiler
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.bench.results import Row
from gemmlet.bench.timing import Timed

Call = Callable[[], Any]

# What an implementation needs, where that is not gemmlet and CuPy alone.
PACKAGES = {"cuBLAS": "torch", "pytorch": "torch", "pytorch graph": "torch", "jax": "jax"}

# A sample: as many calls as take SAMPLE_SECONDS, at most MAX_CALLS.
SAMPLE_SECONDS, MAX_CALLS = 2e-3, 50
MIN_ROUNDS, MAX_ROUNDS = 7, 60
# Where so many rounds take longer than LONG_SECONDS, LONG_ROUNDS: epochs are means of many steps themselves.
LONG_SECONDS, LONG_ROUNDS = 6.0, 3

# Elements of a float32 array that fill the largest memory needed for a copy: 1 GiB.
_COPIED = 2**28
_ROOFLINE_SIZE = 8192

# The sum of four evenly distributed numbers: close to a normal distribution, of variance 1. No cuRAND is needed.
_NORMAL = """
unsigned h = (unsigned)i * 2654435761u + seed;
h ^= h >> 16; h *= 0x85ebca6bu; h ^= h >> 13; h *= 0xc2b2ae35u; h ^= h >> 16;
unsigned g = h * 747796405u + 2891336453u;
g ^= g >> 15; g *= 0x2c1b3c6du; g ^= g >> 12;
float sum = (float)(h & 0xffffu) + (float)(h >> 16) + (float)(g & 0xffffu) + (float)(g >> 16);
x = scale * (sum * (1.0f / 65536.0f) - 2.0f) * 1.7320508f;
"""
_TO_BFLOAT16 = "y = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)"
_ACTIVATIONS = {"tanh": "tanh(v)", "relu": "v > T(0) ? v : T(0)"}


class LostError(Exception):
    """An error after which this process can do nothing on the GPU any more."""


class _Unwaited(CudaBackend):
    """Losses stay on the GPU, so that launches are timed and no waiting: PyTorch does not wait either."""

    def mean(self, device: Any, launch: Any, blocks: int, *values: Any, check: bool = False) -> float:
        scratch, result = self.scratch(device), self._result(device)
        launch(blocks, 1, *values, scratch.range if check else 0, scratch.partial, result.place, scratch.counter)
        return math.nan


class _Stream:
    """A stream of PyTorch, for CuPy, by the protocol that both know in newer versions."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class Gpu:
    """The first GPU, through CuPy and, where they are installed and have CUDA, PyTorch and JAX.

    All implementations but JAX's work on the default stream, so that one pair of events times any of them.

    Attributes
    ----------
    xp
        CuPy.
    torch, jax
        None where there is none.
    torch_device : str
    notes : list of str
        What is missing.
    matmul_rates : dict
        What `matmul_rate` has measured.
    """

    torch_device = "cuda"

    def __init__(self, peers: tuple[str, ...] = ("torch", "jax")) -> None:
        self.xp: Any = importlib.import_module("cupy")
        self.notes: list[str] = []
        self.matmul_rates: dict[str, float | None] = {}
        self.torch = self._peer("torch", lambda torch: torch.cuda.is_available()) if "torch" in peers else None
        self.jax = self._peer("jax", lambda jax: jax.default_backend() == "gpu") if "jax" in peers else None
        if self.torch is not None:
            self.torch.set_float32_matmul_precision("highest")  # no TF32 where float32 is compared
        if self.jax is not None:
            self.jax.config.update("jax_default_matmul_precision", "highest")

    def _peer(self, name: str, has_gpu: Callable[[Any], bool]) -> Any:
        if importlib.util.find_spec(name) is None:
            self.notes.append(f"{name} is not installed")
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
                if has_gpu(module):
                    return module
            self.notes.append(f"{name} finds no GPU")
        except Exception as error:  # whatever is wrong with a peer, the others are timed
            self.notes.append(f"{name} cannot be used: {_in_short(error)}")
        return None

    # Facts.

    def has(self, implementation: str) -> bool:
        """Return whether there is what an implementation needs."""
        package = PACKAGES.get(implementation)
        return package is None or getattr(self, package) is not None

    @cached_property
    def l2_bytes(self) -> int:
        """Of the L2 cache."""
        return int(self.xp.cuda.runtime.getDeviceProperties(0)["l2CacheSize"])

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second, read and written, of a copy of 1 GiB within the GPU's memory."""
        source, target = self.normal((_COPIED,), seed=1), self.empty((_COPIED,))
        seconds = [self.seconds(lambda: self.copy(source, target), 5) for _ in range(9)]
        return 2.0 * source.nbytes / statistics.median(seconds)

    def matmul_rate(self, kind: str) -> float | None:
        """Operations a second of a matmul of cuBLAS, 8192³, which stands in for the arithmetic's roofline."""
        if kind not in self.matmul_rates:
            try:
                self.matmul_rates[kind] = None if self.torch is None else self._measured_matmul_rate(kind)
            except Exception as error:  # there is no roofline then, and all else goes on
                self.matmul_rates[kind] = None
                self.notes.append(f"no roofline for {kind}: {_in_short(error)}")
            self.free()
        return self.matmul_rates[kind]

    def _measured_matmul_rate(self, kind: str) -> float:
        dtype = "float32" if kind == "tf32" else kind
        shape = (_ROOFLINE_SIZE, _ROOFLINE_SIZE)
        a, b, out = (self.tensor(self.normal(shape, dtype, seed=seed)) for seed in (1, 2, 3))
        torch = self.torch
        with self.tf32(kind == "tf32"):
            seconds = [self.seconds(lambda: torch.mm(a, b, out=out), 2) for _ in range(5)]
        return 2.0 * _ROOFLINE_SIZE**3 / statistics.median(seconds)

    # Arrays.

    def normal(self, shape: tuple[int, ...], dtype: str = "float32", *, seed: int, scale: float = 1.0) -> Any:
        """Return numbers of mean 0 and standard deviation `scale`."""
        values = self.xp.empty(shape, np.float32)
        fill = self.xp.ElementwiseKernel("uint32 seed, float32 scale", "float32 x", _NORMAL, "gemmlet_bench_normal")
        fill(np.uint32(seed), np.float32(scale), values)
        return self.rounded(values, dtype)

    def rounded(self, values: Any, dtype: str) -> Any:
        """Return float32 numbers in another type."""
        if dtype == "float32":
            return values
        if dtype != "bfloat16":
            return values.astype(dtype)
        halves = self.xp.empty(values.shape, np.uint16)
        convert = self.xp.ElementwiseKernel("uint32 bits", "uint16 y", _TO_BFLOAT16, "gemmlet_bench_bfloat16")
        convert(values.view(np.uint32), halves)
        return halves.view(_bfloat16())

    def wide(self, array: Any) -> Any:
        """Return an array in float64."""
        if array.dtype.name == "bfloat16":
            array = (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return array.astype(np.float64)

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        """Return an array of NaN."""
        if dtype == "bfloat16":
            return self.empty(shape, "uint16").view(_bfloat16())
        array = self.xp.empty(shape, dtype)
        self.poison(array)
        return array

    def poison(self, array: Any) -> None:
        """Fill a contiguous array with bytes that are NaN in every type."""
        array.data.memset_async(0xFF, array.nbytes)

    def copy(self, source: Any, target: Any) -> None:
        """Copy a contiguous array."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def upload(self, array: np.ndarray) -> Any:
        """Return a copy of a NumPy array."""
        return self.xp.asarray(array)

    def numpy(self, array: Any) -> np.ndarray:
        """Return a copy as a NumPy array."""
        return array.get()

    def tensor(self, array: Any) -> Any:
        """Return a tensor of PyTorch on the same memory."""
        if array.dtype.name == "bfloat16":
            return self.torch.from_dlpack(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_dlpack(array)

    def array(self, tensor: Any) -> Any:
        """Return a CuPy array on the memory of a tensor."""
        tensor = tensor.detach()
        if tensor.dtype == self.torch.bfloat16:
            return self.xp.from_dlpack(tensor.view(self.torch.int16)).view(_bfloat16())
        return self.xp.from_dlpack(tensor)

    def jax_array(self, array: Any) -> Any:
        """Return a copy as an array of JAX."""
        return self.jax.device_put(self.numpy(array))

    # Work.

    def bias_activation(self, activation: str) -> Callable[[Any, Any], None]:
        """Return a kernel of CuPy's, ``y = activation(y + b)``, on PyTorch's current stream, if there is PyTorch."""
        code = f"T v = z + b; y = {_ACTIVATIONS[activation]}"
        kernel = self.xp.ElementwiseKernel("T z, T b", "T y", code, f"gemmlet_bench_bias_{activation}")

        streams: dict[int, Any] = {}

        def call(y: Any, b: Any) -> None:
            if self.torch is None:
                kernel(y, b, y)
                return
            address = self.torch.cuda.current_stream().cuda_stream
            if address not in streams:
                streams[address] = self.xp.cuda.Stream.from_external(_Stream(address))
            with streams[address]:
                kernel(y, b, y)

        return call

    @contextmanager
    def tf32(self, allowed: bool) -> Iterator[None]:
        """Let gemmlet and PyTorch use TF32 in matmuls of float32, or not."""
        modules = [module for module in (gemmlet, self.torch) if module is not None]
        for module in modules:
            module.set_float32_matmul_precision("high" if allowed else "highest")
        try:
            yield
        finally:
            for module in modules:
                module.set_float32_matmul_precision("highest")

    @cached_property
    def unwaited(self) -> Any:
        """gemmlet's backend, but that losses are not waited for."""
        return _Unwaited()

    def graph(self, call: Call) -> Call:
        """Record what a call launches through CuPy, and return what launches it again."""
        # On a stream of their own: CuPy gives to no other stream what was allocated on this one.
        stream = self.xp.cuda.Stream(non_blocking=True)
        self.synchronize()
        with stream:
            call()  # kernels are compiled, and memory is taken, before
            stream.synchronize()
            stream.begin_capture()
            try:
                call()
            finally:
                graph = stream.end_capture()
        return graph.launch

    def torch_graph(self, call: Call) -> Call:
        """Record what a call launches through PyTorch, which is called thrice before: as PyTorch's manual has it."""
        torch = self.torch
        self.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        self.synchronize()
        return graph.replay

    def synchronize(self) -> None:
        """Wait for everything on the GPU."""
        self.xp.cuda.runtime.deviceSynchronize()

    def alive(self) -> bool:
        """Whether it can still be used by this process."""
        try:
            self.synchronize()
        except self.xp.cuda.runtime.CUDARuntimeError:
            return False
        return True

    def free(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        self.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    # Time.

    def seconds(self, call: Call, count: int) -> float:
        """Seconds of one of `count` calls on the GPU.

        One more goes ahead of them, untimed, so that their launches queue up, and the GPU waits for none of them.
        """
        start, end = self.xp.cuda.Event(), self.xp.cuda.Event()
        call()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, end)) * 1e-3 / count


def _bfloat16() -> np.dtype[Any]:
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Implementation:
    """One implementation of a case, ready to run.

    Attributes
    ----------
    call
        Queues the work; with `clock` "own" it does it, and returns the seconds that count.
    result
        Does it once and returns what is checked.
    units
        How many times a call does the work.
    clock
        "gpu" is its events. "host": calls are queued and waited for, by `wait`, which takes the last one's result.
    """

    call: Call
    result: Call
    units: int = 1
    clock: Literal["gpu", "host", "own"] = "gpu"
    wait: Callable[[Any], Any] | None = None

    def seconds(self, gpu: Gpu, count: int) -> float:
        """Return the seconds of one unit of work, in a sample of `count` calls."""
        if self.clock == "own":
            return float(self.call()) / self.units
        if self.clock == "gpu":
            return gpu.seconds(self.call, count) / self.units
        wait = self.wait or (lambda last: gpu.synchronize())
        wait(self.call())
        start = time.perf_counter()
        for _ in range(count):
            last = self.call()
        wait(last)
        return (time.perf_counter() - start) / (count * self.units)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes
    ----------
    group, name
        Together they are the row's key.
    inputs
        A function of the GPU that makes the arrays.
    implementations
        For each name a function of the GPU and the inputs. The first is gemmlet.
    error
        A function of the GPU, the inputs and a result: its error, over the tolerance.
    flops, bytes
        The least work: operations of the matmuls, and bytes read and written, each array once.
    rate
        What cuBLAS reaches in this type is the roofline of the operations; None: the bytes are all that counts.
    """

    group: str
    name: str
    inputs: Callable[[Gpu], Any]
    implementations: Mapping[str, Callable[[Gpu, Any], Implementation]]
    error: Callable[[Gpu, Any, Any], float]
    flops: float = 0.0
    bytes: float = 0.0
    rate: str | None = None
    unit: str = "call"
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The row's key."""
        return f"{self.group}: {self.name}"

    def roofline(self, gpu: Gpu) -> float | None:
        """Return the least seconds, by what this GPU copies and cuBLAS multiplies."""
        rate = None if self.rate is None else gpu.matmul_rate(self.rate)
        floors = [self.bytes / gpu.copy_rate if self.bytes else 0.0, self.flops / rate if rate else 0.0]
        return max(floors) or None


def run(gpu: Gpu, case: Case, seconds: float, seed: int = 0) -> Row:
    """Check each implementation of a case, then time all of them in turn.

    Raises
    ------
    LostError
        The GPU cannot be used any more; the message says since what.
    """
    roofline = case.roofline(gpu)
    inputs = case.inputs(gpu)
    correct: dict[str, Implementation] = {}
    timed: dict[str, Timed] = {}
    for name, make in case.implementations.items():
        if not gpu.has(name):
            continue
        try:
            implementation = make(gpu, inputs)
            error = case.error(gpu, inputs, implementation.result())
            timed[name] = Timed(failed=f"wrong result: {error:.3g} times the tolerance")
            if error <= 1.0:
                correct[name] = implementation
        except Exception as problem:  # one may fail in any way, and the others are still to be timed
            timed[name] = Timed(failed=_in_short(problem))
        if not gpu.alive():
            raise LostError(f"{case.key}, {name}: {timed[name].failed}")
    for name, samples in alternate(gpu, correct, seconds, random.Random(seed)).items():
        timed[name] = Timed(tuple(samples))
    correct.clear()
    return Row(case.group, case.name, case.unit, timed, dict(case.labels), case.flops, case.bytes, roofline)


def alternate(
    gpu: Gpu, implementations: Mapping[str, Implementation], seconds: float, rng: random.Random
) -> dict[str, list[float]]:
    """Seconds for a unit of work, one number for each round and implementation; each round has a new order."""
    counts, round_seconds = {}, 0.0
    for name, implementation in implementations.items():
        implementation.seconds(gpu, 1)
        start = time.perf_counter()
        once = implementation.seconds(gpu, 1) * implementation.units
        if implementation.clock == "own":
            counts[name] = 1
            round_seconds += time.perf_counter() - start
        else:
            counts[name] = max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / max(once, 1e-7))))
            round_seconds += once * (counts[name] + 1)
    least = MIN_ROUNDS if MIN_ROUNDS * round_seconds <= LONG_SECONDS else min(MIN_ROUNDS, LONG_ROUNDS)
    rounds = max(least, min(MAX_ROUNDS, int(seconds / max(round_seconds, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in implementations}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in rng.sample(list(implementations), len(implementations)):
                samples[name].append(implementations[name].seconds(gpu, counts[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


@contextmanager
def constants(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Set constants of a module for a while."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def compile_one(source: str, name: str, arch: str) -> None:
    """Compile a kernel into the cache."""
    try:
        compiler.cubin(source, [name], arch)
    except Exception:
        traceback.print_exc()  # it fails again where it is wanted, and nothing else


def compile_together(arch: str, wanted: Iterable[tuple[str, str]]) -> None:
    """Compile kernels, by source and name, on all processors."""
    jobs = [(*pair, arch) for pair in dict.fromkeys(wanted)]
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True)))


def write_table(path: Path, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Add a table to a file, one a line of JSON, and print it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"table": {"title": title, "head": head, "rows": rows}}) + "\n")
    print(f"  {title}: {', '.join(head)}", flush=True)
    for row in rows:
        print(f"    {'  '.join(row)}", flush=True)
