"""What runs CUDA kernels on the CPU does as a GPU does, and reports what a GPU would not."""

from __future__ import annotations

import functools
import gc
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
pytest.importorskip("ml_dtypes")

import ml_dtypes

from cuda_on_host.device import (
    COMPILER,
    SANITIZERS,
    THREAD_ORDERS,
    CompileError,
    HostDevice,
    Kernel,
    sanitized_environment,
)

if shutil.which(COMPILER) is None:
    pytest.skip(f"there is no {COMPILER}", allow_module_level=True)

ROOT = pathlib.Path(__file__).parent / "cuda_on_host"
# These find the planted errors first, and end the process.
not_sanitized = pytest.mark.skipif(SANITIZERS != (), reason="a sanitizer would end the process")

EXPRESSIONS = [
    "places",
    *(f"block_sum<{missing}>" for missing in range(3)),
    "unwritten",
    "shuffles",
    "exits",
    "deadlock",
    "divergent",
    "part_of_a_warp",
    "stray_write",
    "stray_shared_write",
    "stray_index",
    "misaligned",
    "copies<2, 1>",
    "copies<3, 2>",
    *(f"ring<{static}, {wait}>" for static in (0, 1) for wait in (0, 1)),
    *(f"cluster<{wrong}>" for wrong in range(14)),
    "last_block<0>",
    "large_frame",
    "faults",
    "counts",
    "quotients",
    *(f"boxes<{wrong}, {2 if wrong == 3 else 1}>" for wrong in range(10)),
    "boxes<0, 2>",
    *(f"{name}<gemmlet::{kind}16>" for name in ("round_trip", "rounded") for kind in ("float", "bfloat")),
]


@functools.cache
def kernels() -> dict[str, Kernel]:
    names = [f"shim::{name}" for name in EXPRESSIONS]
    return dict(zip(EXPRESSIONS, HostDevice(ROOT).kernels("shim.cuh", names), strict=True))


@pytest.fixture(params=THREAD_ORDERS)
def device(request: pytest.FixtureRequest) -> HostDevice:
    """A device for each order of threads."""
    return HostDevice(ROOT, request.param)


def launch(device: HostDevice, name: str, grid: int | tuple[int, int, int], block: int, *arguments: Any, **how: Any):
    """Launch with arrays, integers (`int`) and NumPy scalars."""

    def scalar(argument: Any) -> np.generic:
        if hasattr(argument, "data") and not isinstance(argument, np.generic):
            return np.uint64(argument.data.ptr)
        return np.int32(argument) if isinstance(argument, int) else argument

    size = (grid, 1, 1) if isinstance(grid, int) else grid
    device.launch(kernels()[name], size, block, [scalar(a) for a in arguments], **how)


def zeros(device: HostDevice, shape: int | Sequence[int], dtype: Any) -> Any:
    return device.upload(np.zeros(shape, dtype))


def test_every_thread_runs_once_in_the_order_asked_for(device: HostDevice):
    device.os_threads = 1
    grid, block = (4, 3, 2), 70
    place, turn, counter = (zeros(device, n, np.uint32) for n in (24 * block, 24 * block, 1))
    launch(device, "places", grid, block, place, turn, counter)
    z, y, x, thread = np.indices((2, 3, 4, block))
    np.testing.assert_array_equal(device.view(place), (((z * 10 + y) * 10 + x) * 1000 + thread).ravel())
    turns = device.view(turn).reshape(24, block)
    assert np.array_equal(np.sort(turns.ravel()), np.arange(24 * block))
    order = np.arange(24 * block).reshape(24, block)
    if device.thread_order in ("strided", "random"):
        assert (turns.min(1) % block == 0).all()  # block by block
        assert (np.abs(np.diff(turns)) > 1).mean() > 0.9
    else:
        expected = {"forward": order, "backward": order[::-1, ::-1], "eager": order[:, ::-1]}
        np.testing.assert_array_equal(turns, expected[device.thread_order])


def test_barriers_and_shared_memory(device: HostDevice, rng: np.random.Generator):
    x = rng.integers(-8, 9, (37, 256)).astype(np.float32)
    y = device.empty((37,), np.float32)
    launch(device, "block_sum<0>", 37, 256, device.upload(x), y, shared=1024)
    np.testing.assert_array_equal(device.view(y), x.sum(1))


@not_sanitized
def test_a_missing_barrier_is_seen_in_some_order(rng: np.random.Generator):
    x = rng.integers(1, 9, (3, 256)).astype(np.float32)
    for missing in (1, 2):
        wrong = []
        for order in THREAD_ORDERS:
            device = HostDevice(ROOT, order)
            y = device.empty((3,), np.float32)
            launch(device, f"block_sum<{missing}>", 3, 256, device.upload(x), y, shared=1024)
            wrong += [order] * (not np.array_equal(device.view(y), x.sum(1)))
        assert wrong, missing


def test_shared_memory_is_poisoned_before_each_block(device: HostDevice):
    y = zeros(device, 9 * 64, np.uint32)
    launch(device, "unwritten", 9, 64, y, shared=256)
    assert (device.view(y) == 0xFFFFFFFF).all()


@pytest.mark.parametrize("threads", [96, 64, 40, 7])
def test_shuffles_and_votes(device: HostDevice, threads: int):
    y = zeros(device, (threads, 6), np.int64)
    launch(device, "shuffles", 1, threads, y)
    i = np.arange(threads)
    lane, first, there = i % 32, i // 32 * 32, np.minimum(i // 32 * 32 + 32, threads)

    def of(other: Any) -> Any:
        return np.where(other < there, 1 << 40 | other, -1)

    ballot = [sum(1 << int(j) % 32 for j in range(f, t) if j % 3 == 0) for f, t in zip(first, there, strict=True)]
    any_all = 2 * ((first <= 40) & (there > 40)) + (there <= 40)
    expected = [of(i ^ 1), of(first + 3), of(np.where(lane >= 2, i - 2, i))]
    expected += [of(np.where(lane % 8 < 6, i + 2, i)), ballot, any_all]
    np.testing.assert_array_equal(device.view(y), np.transpose(expected))


def test_threads_that_exited_are_not_waited_for(device: HostDevice):
    y = zeros(device, 128, np.int32)
    launch(device, "exits", 1, 128, y)
    i = np.arange(0, 128, 2)
    np.testing.assert_array_equal(device.view(y)[::2], (i + 2) % 128 + (i ^ 2))


def test_large_frames_and_atomics(device: HostDevice):
    values, counter = zeros(device, 21, np.int32), zeros(device, 1, np.uint32)
    for _ in range(2):
        launch(device, "last_block<0>", 20, 1, values, counter)
        assert device.view(values)[-1] == sum(range(20))
    y = zeros(device, 2048, np.int32)
    launch(device, "large_frame", 2, 1024, y, 2048)
    assert (device.view(y) == 4095 + 2047).all()
    counters = zeros(device, 3, np.uint32)
    launch(device, "counts", 7, 100, counters)
    assert device.view(counters).tolist() == [0, 1, 7]


@not_sanitized
@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        (
            "deadlock",
            64,
            r"deadlock: .* wait in __syncthreads at shim.cuh:\d+; thread 5 .* waits in __syncwarp at shim",
        ),
        ("divergent", 64, r"comes to __syncthreads at shim.cuh:\d+, while another waits in __syncthreads at shim.cuh"),
        (
            "part_of_a_warp",
            32,
            r"thread \d+ of block \(\d, 0, 0\): __shfl_xor_sync at .*: the mask 0000ffff does not name",
        ),
        ("stray_shared_write", 64, r"a write behind the dynamic shared memory of block \(\d, 0, 0\), 256 bytes"),
    ],
)
def test_errors_name_the_place(device: HostDevice, name: str, block: int, message: str):
    arguments = [] if name == "deadlock" else [zeros(device, 64, np.float32)]
    for _ in range(2):  # what was given up does not hinder what comes
        with pytest.raises(RuntimeError, match=f"^shim::{name}: .*{message}"):
            launch(device, name, 3, block, *arguments, shared=256)
    test_every_thread_runs_once_in_the_order_asked_for(HostDevice(ROOT))


@not_sanitized
def test_stray_writes():
    device = HostDevice(ROOT)
    y = device.empty((3, 7), np.float32)
    assert y.data.ptr % 512 == 256
    assert np.isnan(device.view(y)).all()
    for index, where in ((-1, "before"), (-64, "before"), (21, "behind"), (84, "behind")):
        with pytest.raises(RuntimeError, match=f"stray_write: a write {where} an array of 84 bytes"):
            launch(device, "stray_write", 1, 1, y, index)
    with pytest.raises(RuntimeError, match=r"thread 0 of block \(0, 0, 0\): .*shim.cuh:\d+: the index 4 is outside of"):
        launch(device, "stray_index", 1, 1, y, 4)
    with pytest.raises(
        RuntimeError, match=r"pack.cuh:\d+: the address 0x\w+ is misaligned for .*Pack.* multiple of 16"
    ):
        launch(device, "misaligned", 1, 1, y, 2)
    launch(device, "stray_index", 1, 1, y, 3)
    launch(device, "misaligned", 1, 1, y, 4)
    assert device.view(y).ravel()[4:8].tolist() == [1, 2, 3, 4]


@not_sanitized
def test_faults(device: HostDevice):
    y = zeros(device, 64, np.int32)
    for arguments, message in (
        ((np.uint64(64), 1, 0), "illegal access of 0x.*"),
        ((y, 0, 0), "divides by zero"),
        ((y, 1, 10**6), "illegal access of 0x.*, or the stack is full"),
    ):
        with pytest.raises(RuntimeError, match=rf"thread \d+ of block \(\d, 0, 0\): {message}"):
            launch(device, "faults", 3, 64, *arguments)
        launch(device, "faults", 1, 64, y, 1, 3)


@not_sanitized
def test_an_asynchronous_copy_is_there_only_after_a_wait(device: HostDevice, rng: np.random.Generator):
    x = rng.normal(size=(5, 64)).astype(np.float32)
    y = device.empty(x.shape, x.dtype)
    launch(device, "copies<2, 1>", 1, 64, device.upload(x), y, 5, shared=512)
    expected = x.copy()
    expected[-1, 1::2] = 0
    np.testing.assert_array_equal(device.view(y), expected)
    with pytest.raises(RuntimeError, match=r"thread \d+ .*: ends, and has not waited for all its asynchronous copies"):
        launch(device, "copies<3, 2>", 1, 64, device.upload(x), y, 5, shared=768)
    assert np.isnan(device.view(y)[:4]).any()


def box_of(device: HostDevice, x: Any) -> np.void:
    return device.tensor_map(x.data.ptr, "uint16", x.shape, x.strides[0], (8, 64))


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_box_arrives_swizzled_in_every_block_of_a_cluster(device: HostDevice, cluster: int, rng: np.random.Generator):
    x = rng.integers(1, 60000, (7, 40), np.uint16)
    y = device.upload(np.zeros((6, 8, 8, 8), np.uint16))
    array = device.upload(x)
    launch(device, f"boxes<0, {cluster}>", 6, 64, box_of(device, array), y, shared=3072, cluster=cluster)
    expected = np.zeros((8, 64), np.uint16)
    expected[:6, :38] = x[1:, 2:]
    packs = expected.reshape(8, 8, 8)
    for row in range(8):
        for pack in range(8):
            np.testing.assert_array_equal(device.view(y)[:, row, pack ^ row], np.tile(packs[row, pack], (6, 1)))


@not_sanitized
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1, "there is no mbarrier at 0x"),
        (2, "is used, and there was no fence after it was initialized"),
        (4, "ends, and has not waited for all its bulk copies"),
        (5, "more threads arrive at the mbarrier at 0x.* than it waits for"),
        (6, "an mbarrier expects 512 bytes, and 1024 are copied"),
        (7, r"deadlock: no thread can go on; .* wait in mbarrier.try_wait at shim.cuh"),
        (8, "the mbarrier at 0x.* was written to"),
        (9, "a box is copied to no multiple of 1024 bytes"),
    ],
)
def test_errors_of_barriers_in_shared_memory(device: HostDevice, wrong: int, message: str):
    x, y = device.empty((7, 40), np.uint16), device.empty((3, 512), np.uint16)
    with pytest.raises(RuntimeError, match=f"boxes<{wrong}, 1>: .*{message}"):
        launch(device, f"boxes<{wrong}, 1>", 3, 64, box_of(device, x), y, shared=3072)


@not_sanitized
def test_a_missing_barrier_of_a_cluster_is_seen_in_some_order():
    found = 0
    for order in THREAD_ORDERS:
        device = HostDevice(ROOT, order)
        x, y = device.empty((7, 40), np.uint16), device.empty((4, 512), np.uint16)
        try:
            launch(device, "boxes<3, 2>", 4, 64, box_of(device, x), y, shared=3072, cluster=2)
        except RuntimeError:  # "there is no mbarrier", tested above
            found += 1
    assert found


def test_tensor_maps_that_no_gpu_makes():
    device = HostDevice(ROOT)
    for address, shape, row_bytes, box in [
        (8, (7, 40), 80, (8, 64)),
        (16, (7, 40), 88, (8, 64)),
        (16, (7, 40), 64, (8, 64)),
        (16, (7, 40), -80, (8, 64)),
        (16, (7, 0), 80, (8, 64)),
        (16, (7, 40), 80, (257, 64)),
        (16, (7, 40), 80, (8, 32)),
    ]:
        with pytest.raises(ValueError, match="no tensor map of"):
            device.tensor_map(address, "uint16", shape, row_bytes, box)


@pytest.mark.parametrize("static", [0, 1])
def test_blocks_of_a_cluster_wait_for_each_other(device: HostDevice, static: int):
    if static and "thread" in SANITIZERS:
        pytest.skip("ThreadSanitizer does not see that each block has its own")
    values = zeros(device, (2, 6), np.int32)
    launch(device, f"ring<{static}, 1>", 6, 96, values, 5, shared=384, cluster=3)
    expected = np.zeros((2, 3), int)
    for _ in range(5):
        expected = np.roll(expected, -1, axis=1) + np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(device.view(values)[1], expected.ravel())


def test_blocks_of_a_cluster_write_to_each_other(device: HostDevice):
    y = zeros(device, (9, 64), np.int32)
    launch(device, "cluster<0>", 9, 64, y, shared=256, cluster=3)
    np.testing.assert_array_equal(device.view(y), np.repeat([6, 15, 24], 3 * 64).reshape(9, 64))


@not_sanitized
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1, "accesses block . of the cluster, which may not have begun"),
        (3, "comes to barrier.cluster.arrive at .* a second time, and has not waited"),
        (4, "accesses block . of the cluster, which may not have begun"),
        (5, "waits in barrier.cluster.wait at .*, and has not arrived"),
        (6, "there is no block 3 in the cluster"),
        (7, "accesses block 1 of the cluster, which has ended"),
        (8, "an mbarrier expects 32 bytes, and 48 are copied|has not waited for all its bulk copies|which has ended"),
        (9, "deadlock: .* wait in mbarrier.try_wait at shim.cuh"),
        (10, "is used, and there was no fence after it was initialized"),
        (11, "there is no mbarrier at"),
        (12, "there is an mbarrier at 0x.* already"),
        (13, "ends, and has not waited for all its bulk copies|which has ended"),
    ],
)
def test_misuse_of_a_cluster_is_reported(wrong: int, message: str):
    device = HostDevice(ROOT)
    with pytest.raises(RuntimeError, match=message):
        launch(device, f"cluster<{wrong}>", 3, 64, zeros(device, 192, np.int32), shared=256, cluster=3)


def test_clusters_are_those_of_the_kernel():
    device = HostDevice(ROOT)
    y = zeros(device, 192, np.int32)
    for name, grid, size in (("cluster<0>", 3, 1), ("cluster<0>", 4, 3), ("divergent", 3, 3)):
        with pytest.raises(ValueError, match=f"{name}: clusters of {size} in a grid of"):
            launch(device, name, grid, 64, y, shared=256, cluster=size)


def test_arguments_are_checked():
    device = HostDevice(ROOT)
    y = device.empty((4,), np.float32)
    with pytest.raises(TypeError, match=r"shim::stray_write takes 2 arguments {float\*, int}, not 1"):
        launch(device, "stray_write", 1, 1, y)
    for wrong in (np.int64(0), np.float32(0), np.uint64(0)):
        with pytest.raises(TypeError, match=r"argument 1 is \w+, . bytes; the parameter, of 4 bytes, is number 1 of"):
            launch(device, "stray_write", 1, 1, y, wrong)
    with pytest.raises(TypeError, match="argument 0 is int32, 4 bytes"):
        launch(device, "stray_write", 1, 1, 0, 0)
    with pytest.raises(TypeError, match="argument 1 is a list, no NumPy scalar"):
        device.launch(kernels()["stray_write"], (1, 1, 1), 1, [np.uint64(y.data.ptr), []])


@pytest.mark.parametrize(
    ("name", "grid", "block", "shared"),
    [
        ("block_sum<0>", 1, 513, 0),
        ("block_sum<1>", 1, 257, 0),
        ("divergent", 1, 1025, 0),
        ("divergent", 1, 0, 0),
        ("divergent", 0, 32, 0),
        ("divergent", (1, 65536, 1), 32, 0),
        ("divergent", (1, 1, 65536), 32, 0),
        ("divergent", 1, 32, 227 * 1024 + 1),
    ],
)
def test_launches_that_no_gpu_does(name: str, grid: int | tuple[int, int, int], block: int, shared: int):
    device = HostDevice(ROOT)
    y = device.empty((4,), np.float32)
    with pytest.raises(ValueError, match=f"^shim::{name}: "):
        launch(device, name, grid, block, *[y] * len(kernels()[name].sizes), shared=shared)


def test_kernels_that_do_not_compile():
    with pytest.raises(CompileError, match="no_such_kernel"):
        HostDevice(ROOT).kernels("shim.cuh", ["shim::no_such_kernel"])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_16_bit_conversions_have_the_bits_of_numpy(kind: str, rng: np.random.Generator):
    """`ml_dtypes` has bfloat16. Every NaN becomes the one without a sign and with all bits of the fraction."""
    device = HostDevice(ROOT)
    dtype = np.dtype(np.float16 if kind == "float16" else ml_dtypes.bfloat16)
    x = np.arange(65536).astype(np.uint16).view(dtype)
    wide, y = device.empty(x.shape, np.float32), device.empty(x.shape, dtype)
    launch(device, f"round_trip<gemmlet::{kind}>", 3, 256, device.upload(x), wide, y, x.size)
    with np.errstate(invalid="ignore"):
        nan = np.isnan(x)
    np.testing.assert_array_equal(device.view(wide)[~nan].view(np.uint32), x[~nan].astype(np.float32).view(np.uint32))
    assert np.isnan(device.view(wide)[nan]).all()
    np.testing.assert_array_equal(device.view(y).view(np.uint16), np.where(nan, 0x7FFF, x.view(np.uint16)))

    bits = rng.integers(0, 2**32, 200_000, np.uint32)
    # Halfway between two neighbours, and next to that.
    middle = x.astype(np.float32).view(np.uint32)
    middle = np.where(nan, 0, middle)
    half = np.uint32(0x1000 if kind == "float16" else 0x8000)
    floats = np.concatenate([bits, *(middle + half + np.uint32(d % 2**32) for d in (-1, 0, 1))]).view(np.float32)
    # And between two subnormal ones.
    floats = np.concatenate([floats, (np.arange(4100) * 0.5 * 2.0**-24).astype(np.float32)])
    y = device.empty(floats.shape, dtype)
    launch(device, f"rounded<gemmlet::{kind}>", 5, 128, device.upload(floats), y, floats.size)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(dtype).view(np.uint16)
    np.testing.assert_array_equal(device.view(y).view(np.uint16), np.where(np.isnan(floats), 0x7FFF, expected))


def test_quotients_are_rounded_once(rng: np.random.Generator):
    """However far off the reciprocal that they are made of is, of numbers that the formulas divide by."""
    device = HostDevice(ROOT)
    a, b = rng.uniform(-1, 1, 300_000).astype(np.float32), rng.uniform(1, 2, 300_000).astype(np.float32)
    b[100_000:] *= np.float32(2.0) ** rng.integers(-30, 30, 200_000).astype(np.float32)
    a[::3] = rng.choice([0.0, 1.0, 4.0, 1e4, np.nan], a[::3].size)
    b[:1000] = np.arange(1000) * np.float32(2.0**-23) + 1
    q = device.empty(a.shape, np.float32)
    launch(device, "quotients", -(-a.size // 256), 256, device.upload(a), device.upload(b), q, a.size)
    np.testing.assert_array_equal(device.view(q), a / b)


def test_arrays(rng: np.random.Generator):
    device = HostDevice()
    base = rng.normal(size=(6, 8))
    for x in (base, base.T, base[::-1, ::2], base[1:, 3], np.broadcast_to(base[:, :1], (6, 8)), base[:0], base[2, 2]):
        x = np.asarray(x)
        y = device.array(x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        if x.size:
            assert y.strides == x.strides
        np.testing.assert_array_equal(device.view(y), x)
        np.testing.assert_array_equal(device.view(y.T), x.T)
    y = device.upload(base)
    out = np.empty_like(base)
    device.download(y, out)
    np.testing.assert_array_equal(out, base)
    np.testing.assert_array_equal(device.view(y[1:4, ::-2]), base[1:4, ::-2])
    device.zero(y)
    assert not device.view(y).any()
    view = device.view(y.T)
    del y
    gc.collect()
    assert not view.any()  # the memory lives on
    for bad in (lambda: device.upload(base.T), lambda: device.download(device.array(base.T), out)):
        with pytest.raises(ValueError, match="C-contiguous"):
            bad()


def test_graphs():
    device = HostDevice(ROOT)
    counters = zeros(device, 3, np.uint32)

    def launches() -> None:
        device.zero(counters[1:])
        launch(device, "counts", 1, 4, counters)
        with pytest.raises(RuntimeError, match="recorded"):
            device.synchronize()

    graph = device.record(launches)
    assert device.view(counters).tolist() == [0, 0, 0]
    graph.replay()
    assert device.view(counters).tolist() == [4, 1, 7]
    device.view(counters)[2] = 0
    graph.replay(2)
    assert device.view(counters).tolist() == [2, 1, 7]


PLANTED = """
import pathlib, sys
import numpy as np
from cuda_on_host.device import HostDevice

device = HostDevice(pathlib.Path("cuda_on_host"))
launches = [line.split("; ") for line in sys.argv[1:]]
kernels = device.kernels("shim.cuh", list({name: 0 for name, _ in launches}))
kernels = {kernel.name: kernel for kernel in kernels}
for name, number in launches:
    arrays = [device.upload(np.zeros(192, np.int32)) for _ in range(2 if "last" in name or "block_sum" in name else 1)]
    arguments = [*(np.uint64(array.data.ptr) for array in arrays), np.int32(number)]
    print(f"LAUNCH {name} {number}", file=sys.stderr, flush=True)
    arguments = arguments[: len(kernels[name].sizes)]
    try:
        cluster = 3 if "cluster" in name or "ring" in name else 1
        device.launch(kernels[name], (3, 1, 1), 64, arguments, shared=256, cluster=cluster)
    except RuntimeError as error:
        print(error, file=sys.stderr)
"""


@not_sanitized
@pytest.mark.parametrize(
    ("sanitizer", "right", "wrong", "report"),
    [
        (
            "thread",
            ["shim::block_sum<0>; 0", "shim::ring<0, 1>; 5", "shim::last_block<0>; 0", "shim::cluster<0>; 0"],
            [
                *(f"shim::{name}<{missing}>; 0" for name in ("block_sum", "last_block") for missing in (1, 2)),
                "shim::ring<0, 0>; 5",
                "shim::cluster<2>; 0",
            ],
            r"(?s)ThreadSanitizer: data race \S*(shim.cuh:\d+ in void shim|on_host.h:\d+ in gemmlet)::"
            r".*ThreadSanitizer reports a data race",
        ),
        (
            "address",
            ["shim::block_sum<0>; 0", "shim::stray_write; 191"],
            ["shim::stray_write; 192"],
            r"AddressSanitizer: use-after-poison \S*shim.cuh:\d+ in shim::",
        ),
    ],
)
def test_sanitizers_report_planted_errors(sanitizer: str, right: list[str], wrong: list[str], report: str):
    environment = sanitized_environment(sanitizer)
    if environment is None:
        pytest.skip(f"{COMPILER} has no library for it")
    command = [sys.executable, "-c", PLANTED, *right, *wrong]
    done = subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=300)
    start, *parts = done.stderr.split("LAUNCH ")
    assert len(parts) == len(right) + len(wrong), done.stderr
    assert "Sanitizer" not in start
    for part, launch in zip(parts, [*right, *wrong], strict=True):
        assert part.startswith(launch.replace(";", "") + "\n")
        assert (re.search(report, part) is not None) == (launch in wrong), part


TRAINED = """
import numpy as np
from gemmlet import nn

x, y = np.arange(640 * 784, dtype=np.uint8).reshape(640, 784), np.arange(640) % 7
nn.MLP([784, 41, 7], "tanh").fit(x, y, epochs=4)
"""


@not_sanitized
def test_nothing_is_reported_of_threads_of_the_backend_for_the_cpu():
    """How they wait for each other is compiled without ThreadSanitizer."""
    environment = sanitized_environment("thread")
    if environment is None:
        pytest.skip(f"{COMPILER} has no library for it")
    done = subprocess.run([sys.executable, "-c", TRAINED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
