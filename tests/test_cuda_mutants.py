"""Errors planted in the CUDA kernels are found: what the tests look at would not be right by chance.

A mutant is a file of csrc/cuda/ with one text replaced. It must give wrong results, or be reported by what runs the
kernels on the CPU, in one of the orders of threads; or, where those keep to an order that threads of a GPU need not
keep, ThreadSanitizer must report a data race.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("cupy")

import test_cuda_training
from cuda_on_host.device import COMPILER, ROOT, THREAD_ORDERS, CompileError, HostDevice, sanitized_environment
from gemmlet.backends.cuda import launches
from gemmlet.backends.cuda import matmul as cuda_matmul
from gemmlet.backends.cuda.backend import CudaBackend
from gemmlet.backends.numpy import NumpyBackend
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.augmentation import Draw
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES
from gemmlet.nn import Augment

if shutil.which(COMPILER) is None:
    pytest.skip(f"there is no {COMPILER}", allow_module_level=True)
if os.environ.get("GEMMLET_CUDA_HOST_SANITIZE") and __name__ != "__main__":
    pytest.skip("a sanitizer would end the process", allow_module_level=True)


class Run:
    """Methods of the backend on one device, next to those of the reference; `quick`, where each matmul takes long."""

    def __init__(self, device: HostDevice, quick: bool = False) -> None:
        self.device = device
        self.quick = quick
        self.backend = CudaBackend([device])
        self.reference = NumpyBackend()
        self.rng = np.random.default_rng(7)

    def normal(self, *shape: int, dtype: Any = np.float32) -> Any:
        return self.rng.normal(size=shape).astype(dtype)

    def place(self, array: Any, offset: int) -> Any:
        """A copy on the device that begins `offset` elements behind a multiple of 256 bytes."""
        memory = self.device.empty((array.size + offset,), array.dtype)
        copy = memory[offset:].reshape(array.shape)
        self.device.view(copy)[...] = array
        return copy

    def compare(self, method: str, *arguments: Any, offset: int = 0) -> None:
        """What a method returns and does to its arguments, arrays and tuples of arrays among them."""

        def each(change: Callable[[Any], Any]) -> list[Any]:
            def changed(argument: Any) -> Any:
                if isinstance(argument, tuple) and all(isinstance(a, np.ndarray) for a in argument):
                    return tuple(map(changed, argument))
                return change(argument) if isinstance(argument, np.ndarray) else argument

            return list(map(changed, arguments))

        expected = each(np.copy)
        got = each(lambda array: self.place(array, offset))
        value = getattr(self.reference, method)(*expected)
        result = getattr(self.backend, method)(*got)
        if value is not None:
            np.testing.assert_allclose(result, value, rtol=1e-4)
        for ours, right in zip(got, expected, strict=True):
            pairs = zip(ours, right, strict=True) if isinstance(right, tuple) else [(ours, right)]
            for a, b in pairs:
                if isinstance(b, np.ndarray):
                    tolerance = {2: 2e-2, 4: 2e-5, 8: 1e-12}[b.itemsize]
                    view = self.device.view(a).astype(np.float64)
                    np.testing.assert_allclose(view, b.astype(np.float64), rtol=tolerance, atol=tolerance)


def poison(array: Any) -> Any:
    return np.full_like(array, np.nan)


#
# Checks: a few calls each, of all that the kernels of a file must get right.
#


def elementwise(run: Run) -> None:
    for n, offset in ((1, 0), (2047, 0), (2048, 0), (4099, 0), (2060, 1)):
        x = run.normal(n)
        run.compare("activation", ACTIVATIONS["relu"], x, 0.0, poison(x), offset=offset)
        run.compare("activation_backward", ACTIVATIONS["gelu"], run.normal(n), x, 0.0, poison(x), offset=offset)


def copies(run: Run) -> None:
    for x in (run.normal(5, 7).T, run.normal(4, 6, 8)[::-1, ::2, 1:], run.normal(300, 2)[:, :1]):
        target = run.device.array(poison(x))
        run.backend.assign(target, run.device.array(x))
        np.testing.assert_array_equal(run.device.view(target), x)


def rows_by_lanes(run: Run) -> None:
    for rows in (1, 70, 200):
        for function in ROW_FUNCTIONS.values():
            x = run.normal(rows, 30) * 40 - 200
            y = poison(x)
            run.compare("row_function", function, x, y)
            run.reference.row_function(function, x, y)
            run.compare("row_function_backward", function, run.normal(rows, 30), y, poison(x))


def rows_by_blocks(run: Run) -> None:
    for columns in (1500, 10300):
        function = ROW_FUNCTIONS["softmax"]
        x = run.normal(7, columns)
        y = poison(x)
        run.compare("row_function", function, x, y)
        run.reference.row_function(function, x, y)
        run.compare("row_function_backward", function, run.normal(7, columns), y, poison(x))


def cross_entropy(run: Run) -> None:
    loss = ROW_LOSSES["softmax_cross_entropy"]
    for rows, columns in ((1, 10), (70, 10), (9, 300)):
        z = run.normal(rows, columns)
        run.compare("row_loss", loss, z, run.rng.integers(0, columns, rows), 0.1, poison(z))
        soft = run.rng.dirichlet(np.ones(columns), rows).astype(np.float32)
        run.compare("row_loss", loss, z, soft, 0.1, poison(z))
        run.compare("row_loss", loss, z, run.rng.integers(0, columns, rows), 0.0, poison(z))
    # More rows than a few rounds take; whole packs of 16 bits; and enough rows for a thread that the product of their
    # sums would be too large.
    for rows, columns, dtype in ((1200, 10, np.float32), (2, 24, np.float16), (3 * 128 * 160, 16, np.float32)):
        z = (run.normal(rows, columns) if columns != 16 else np.zeros((rows, columns))).astype(dtype)
        run.compare("row_loss", loss, z, run.rng.integers(0, columns, rows), 0.0, poison(z))


def elementwise_losses(run: Run) -> None:
    for n, offset in ((1, 0), (7000, 0), (7001, 0), (70, 1)):
        x = run.normal(n)
        run.compare("elementwise_loss", LOSSES["mean_squared_error"], x, run.normal(n), 0.0, poison(x), offset=offset)


def checked_losses(run: Run) -> None:
    """A number out of range, and nothing is written; without one the loss is there."""
    for bad in (None, -0.5, 1.5):
        p = run.rng.uniform(0.1, 0.9, 3000).astype(np.float32)
        gradient = run.place(poison(p), 0)
        p[1234] = p[1234] if bad is None else bad
        loss = run.backend.fast_paths["binary_cross_entropy"](run.place(p, 0), run.place(p[::-1], 0), None, gradient)
        assert (loss is None) == np.all(np.isnan(run.device.view(gradient))) == (bad is not None)
    for bad, smoothing in itertools.product((None, -1, 10), (0.0, 0.1)):
        z, labels = run.normal(70, 10), run.rng.integers(0, 10, 70)
        labels[:2], labels[50] = (0, 9), labels[50] if bad is None else bad
        gradient = run.place(poison(z), 0)
        arguments = run.place(z, 0), run.place(labels, 0), smoothing, gradient
        loss = run.backend.fast_paths["softmax_cross_entropy"](*arguments)
        assert (loss is None) == np.all(np.isnan(run.device.view(gradient))) == (bad is not None)


def columns(run: Run) -> None:
    for shape in ((1, 1), (70, 40), (3001, 8)):
        x = run.normal(*shape)
        for array in (x, x.T.copy().T):
            out = run.device.array(np.full(shape[1], np.nan, np.float32))
            run.backend.column_sum(run.device.array(array), out)
            np.testing.assert_allclose(run.device.view(out), x.sum(0, dtype=np.float64), rtol=1e-4, atol=1e-4)


def ranges(run: Run) -> None:
    for n in (1, 1000, 9000):
        x = run.rng.integers(-100, 100, n).astype(np.int8)
        for at in range(0, n, 500):
            x[at] = 120
            copy, low, high = run.backend.as_indices(run.device.upload(x))
            np.testing.assert_array_equal(run.device.view(copy), x)
            assert (low, high) == (x.min(), 120)
            x[at] = 0


def optimizers(run: Run) -> None:
    for n, offset in ((1, 0), (1030, 0), (1030, 1)):
        p, g, m, v = (run.normal(n) for _ in range(4))
        hyperparameters = tuple(np.linspace(0.1, 0.9, len(OPTIMIZER_RULES["adam"].hyperparameters)))
        run.compare("update", OPTIMIZER_RULES["adam"], p, g, (m, np.abs(v)), hyperparameters, offset=offset)


def augmentation(run: Run) -> None:
    """Images that are staged, of words and of single bytes, and images that are not."""
    most = Augment(180, 0.5, 1, 9, 8, 99, 1).settings
    for sides in ((28, 28), (33, 7), (5, 61)) if run.quick else ((28, 28), (33, 7), (5, 61), (80, 120)):
        images, numbers = run.rng.integers(1, 256, (6, *sides), np.uint8), np.arange(6)
        for settings in (most, most._replace(elastic=0.0), most._replace(noise=0.0, erase=0.0)):
            draw, expected = Draw(3, 4, numbers), np.empty_like(images)
            run.reference.augment(images, settings, draw, expected)
            out = run.device.upload(np.full_like(images, 77))
            run.backend.augment(run.device.upload(images), settings, draw, out)
            np.testing.assert_array_equal(run.device.view(out), expected)


def matmuls(kernel: str, dtype: str, tf32: bool = False) -> Callable[[Run], None]:
    """Matmuls of small integers, exact, by one tile of a kernel: several tiles and steps, and parts of both."""
    sizes = {"skinny": [(150, 3, 300), (1, 300, 70)], "wgmma": [(152, 304, 296)]}
    # The smallest; but of wgmma's the one with clusters.
    first = max if kernel == "wgmma" else min

    def check(run: Run) -> None:
        # So that it may pay to divide k; and so few that blocks take tiles in turn.
        run.device.multiprocessors = 2 if kernel == "wgmma" else 64
        shapes = sizes.get(kernel, [(70, 45, 300), (72, 48, 304)])
        for m, n, k in shapes[-1:] if run.quick else shapes:
            x, w, b = (run.rng.integers(-4, 5, shape).astype(dtype) for shape in ((m, k), (k, n), (n,)))
            z = x.astype(np.float64) @ w.astype(np.float64) + b.astype(np.float64)
            orders = [("CC", 0), ("FF", 0), ("CF", 0), ("CF", 1)]
            for order, offset in orders[: 1 if run.quick else None]:
                arrays = [np.asarray(array, order=o) for array, o in zip((x, w), order, strict=True)]
                arrays = [run.place(a.T, offset).T if a.flags.f_contiguous else run.place(a, offset) for a in arrays]
                choices = [c for c in cuda_matmul.choose(run.device, *arrays, tf32) if c.tile.kernel == kernel]
                if not choices:  # no tile takes what is misaligned, or lies so
                    continue
                tile = first((choice.tile for choice in choices), key=lambda tile: tile.rows * tile.columns)
                splits = {choice.splits for choice in choices if choice.tile == tile} & ({1} if run.quick else {1, 2})
                used = [cuda_matmul.Choice(tile, count) for count in splits]
                if kernel == "simt":  # of one slice and four stages: copies and barriers are in other places
                    used.append(cuda_matmul.Choice(cuda_matmul.simt(dtype, (64, 64, 16, 8, 8, 1, 4), 0.0, 0.0), 1))
                for choice in used:
                    out, kept = (run.place(np.full((m, n), np.nan, dtype), offset) for _ in range(2))
                    cuda_matmul.linear(
                        run.device, *arrays, run.place(b, offset), ACTIVATIONS["relu"], 0.0, out, kept,
                        tf32=tf32, choice=choice,
                    )  # fmt: skip
                    np.testing.assert_array_equal(run.device.view(kept), z.astype(dtype))
                    np.testing.assert_array_equal(run.device.view(out), np.maximum(z, 0).astype(dtype))

    check.__name__ = f"{kernel}_{'tf32' if tf32 else dtype}"
    return check


@functools.cache
def trained(name: str) -> list[Any]:
    """What training gives without a mutant, which tests/test_cuda_training.py compares with the CPU's."""
    return call_of_training(name).on(HostDevice())


def call_of_training(name: str) -> Any:
    if name == "gan":
        return test_cuda_training.Gan(np.float32, count=20, batch=9, rates=(0.2, 0.5), noise=0.3)
    if name == "penalized_gan":
        # Two rows of each mini-batch, and one of the last, have the penalty.
        how = {"penalty": (3.0, 5), "discriminator": (33, 17, 6, 1), "rates": (0.2, 0.3, 0.3)}
        how |= {"classes": 4}
        return test_cuda_training.Gan(np.float32, count=20, batch=9, **how)
    if name == "mlp_in_a_cluster":
        how = {"rule": "momentum", "count": 200, "batch": 35, "kind": "bytes", "rates": (0.2, 0.5)}
        return test_cuda_training.Mlp((35, 13, 10), np.float32, weights="", **how)
    is_sparse = name == "mlp_of_sparse"
    how = {"rule": "momentum", "count": 90, "batch": 70, "kind": "sparse" if is_sparse else "floats", "sign": -1.0}
    random = {"rates": (0.2 * is_sparse, 0.5, 0.3), "noise": 0.1 * is_sparse}
    return test_cuda_training.Mlp((150, 69, 34, 40), np.float32, **how, **random)


def training(name: str, plan: str) -> Callable[[Run], None]:
    def check(run: Run) -> None:
        with pytest.MonkeyPatch.context() as patch:
            test_cuda_training.use_plan(plan if plan == "cluster" else "small", patch)
            expected = trained(name)
            test_cuda_training.use_plan(plan, patch)
            result = call_of_training(name).on(run.device)
        if plan == "cluster":
            assert test_cuda_training.same(result, expected)
        test_cuda_training.assert_close(result, expected, np.dtype(np.float32))

    check.__name__ = name
    return check


CHECKS: dict[str, Callable[[Run], None]] = {
    check.__name__: check
    for check in (
        elementwise,
        copies,
        rows_by_lanes,
        rows_by_blocks,
        cross_entropy,
        elementwise_losses,
        checked_losses,
        columns,
        ranges,
        optimizers,
        augmentation,
        matmuls("simt", "float32"),
        matmuls("skinny", "float32"),
        matmuls("mma", "float16"),
        matmuls("mma", "float32", tf32=True),
        matmuls("wgmma", "float16"),
        matmuls("wgmma", "float32", tf32=True),
        training("mlp", "small"),
        training("mlp_of_sparse", "small"),
        training("mlp_in_tiles", "wide"),
        training("mlp_in_a_cluster", "cluster"),
        training("gan", "small"),
        training("penalized_gan", "medium"),
    )
}


#
# Mutants
#


class Mutant(NamedTuple):
    """A text of a file, once in there, what it is replaced by, and the checks one of which must fail."""

    file: str
    text: str
    instead: str
    checks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.text!r} -> {self.instead!r}"


def mutants(file: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    path = file if file.endswith(".h") else f"{file}.cuh"
    return [Mutant(path, text, instead, tuple(checks.split())) for text, instead, checks in changes]


BARRIER, FENCE = "__syncthreads();", "__threadfence();"
CLUSTER = "ptx::arrive_at_cluster();\n    ptx::wait_for_cluster();\n"

# Found by what is computed, or reported.
WRONG = [
    *mutants(
        "elementwise",
        ("first + share <= n", "first + share <= n + 1", "elementwise"),
        ("is_aligned(out) && (is_aligned(in) && ...)", "true", "elementwise"),
        ("at = first + threadIdx.x * N", "at = first + threadIdx.x", "elementwise"),
        ("apart = map_threads * N", "apart = map_threads", "elementwise"),
        ("if (N > 1 || i < n) store_pack", "if (N > 1 || i <= n) store_pack", "elementwise"),
        ("if (i >= n) return;", "if (i >= n - 1) return;", "copies"),
        ("int d = dimensions - 1; d >= 0", "int d = dimensions - 1; d > 0", "copies"),
        ("at * layout.to[d]", "at * layout.from[d]", "copies"),
    ),
    *mutants(
        "warp_reduce",
        ("int distance = Lanes / 2; distance > 0", "int distance = Lanes / 2; distance > 1", "rows_by_lanes"),
        ("return a > b || b != b ? a : b;", "return a < b || b != b ? a : b;", "ranges"),
        ("unsigned warp = 1; warp < blockDim.x / 32", "unsigned warp = 1; warp < blockDim.x / 32 - 1", "ranges"),
        (BARRIER + "\n  v = partial[0];", "v = partial[0];", "ranges"),
        (BARRIER + "\n  v = reduce_lanes<Threads", "v = reduce_lanes<Threads", "rows_by_blocks"),
        ("(Threads / 32)], op);\n  " + BARRIER, "(Threads / 32)], op);", "rows_by_blocks"),
        ("== blocks - 1;", ">= blocks - 2;", "ranges columns"),
    ),
    *mutants(
        "rows",
        ("if (column(j * N) < end) pack", "if (column(j * N) <= end) pack", "rows_by_lanes"),
        ("if (column(j) < end_) store_pack", "if (column(j) <= end_) store_pack", "rows_by_lanes"),
        ("j / N * N * Team::size >= width_", "j * N * Team::size >= width_", "cross_entropy"),
        ("larger = Largest{}(larger, number[k]);", "", "rows_by_blocks"),
        ("total *= lowered(term_of(most, larger));", "", "rows_by_blocks"),
        ("least = Largest{}(least, v);", "least = v;", "rows_by_lanes"),
        ("at / N % Team::size == Team::thread()", "at % Team::size == Team::thread()", "cross_entropy"),
        ("slot == i ? absent : widen(word)", "widen(word)", "cross_entropy"),
        ("if (slot >> 1 == i / 2) word", "if (false) word", "cross_entropy"),
        ("(slot & 1) == 0 ? 0xffffu", "(slot & 1) == 1 ? 0xffffu", "cross_entropy"),
        ("s += f(i, v, slot);", "s = f(i, v, slot);", "rows_by_blocks"),
    ),
    *mutants(
        "../formulas/rows.h",
        ("others.total + R::term(difference)", "others.total", "cross_entropy"),
        ("at_label = -others.total", "at_label = others.total", "cross_entropy"),
        ("losses::times(t, shifted)", "t", "cross_entropy"),
    ),
    *mutants(
        "losses",
        (
            "if (threadIdx.x == 0) partial[blockIdx.x] = total;",
            "partial[blockIdx.x] = total / 2;",
            "elementwise_losses",
        ),
        ("total = 0;\n  // Many", "// Many", "elementwise_losses"),
        ("i += threads * N", "i += threads", "elementwise_losses"),
        ("Index i = packed + thread; i < n", "Index i = packed + thread; i <= n", "elementwise_losses"),
        ("aligned ? n / N * N : 0", "n / N * N", "elementwise_losses"),
        ("if (is_refused(range, 0.0, 1.0, loss)) return;", "", "checked_losses"),
        ("if (is_refused(range, Index(0), Index(columns - 1), loss)) return;", "", "checked_losses"),
        ("Index(columns - 1)", "Index(columns)", "checked_losses"),
        ("range[0] < low || range[1] > high", "range[1] > high", "checked_losses"),
        ("range[0] < low || range[1] > high", "range[0] < low", "checked_losses"),
        ("loss[1] = 1;", "loss[1] = 0;", "checked_losses"),
        ("present && label_slot >= 0", "present && label_slot < 0", "cross_entropy"),
        ("slot == label_slot ? of_row.at_label", "slot == label_slot ? -of_row.at_label", "cross_entropy"),
        ("later_label = label_of(r + 2 * apart)", "later_label = label_of(r + apart)", "cross_entropy"),
        ("++times_;", "", "cross_entropy"),
        ("Team::thread() == 0 ? total + totals.value() : 0", "total + totals.value()", "cross_entropy"),
        ("i < columns ? smoothing.of_class(i == label) : V(0)", "smoothing.of_class(i == label)", "cross_entropy"),
        ("i < columns ? smoothing.of_target(t", "true ? smoothing.of_target(t", "cross_entropy"),
        ("if (present && Team::thread() == 0) total", "if (Team::thread() == 0) total", "cross_entropy"),
        ("if (present && Team::thread() == 0) total", "if (present) total", "cross_entropy"),
    ),
    *mutants(
        "column_sum",
        ("int w = 1; w < warps", "int w = 1; w < warps - 1", "columns"),
        ("(rows + gridDim.y - 1) / gridDim.y", "rows / gridDim.y", "columns"),
        ("end = begin + share < rows ? begin + share : rows", "end = begin + share", "columns"),
        ("column < columns && (Down ? lane : warp) == 0", "(Down ? lane : warp) == 0", "columns"),
        ("of_warps[warp][lane] = sum;\n    " + BARRIER, "of_warps[warp][lane] = sum;", "columns"),
        ("unsigned part = 1; part < gridDim.y", "unsigned part = 0; part < gridDim.y", "columns"),
        ("highs[i]);\n  }\n  low", "lows[i]);\n  }\n  low", "ranges"),
        ("if (copy != nullptr) copy[i] = v;", "if (copy != nullptr) copy[i] = low;", "ranges"),
    ),
    *mutants(
        "optimizers",
        ("thread < whole", "thread <= whole", "optimizers"),
        ("store_pack(state[j] + thread * N, s[j]);", ";", "optimizers"),
        (
            "state0 + i, state1 + i});\n    }\n    return;",
            "state1 + i, state0 + i});\n    }\n    return;",
            "optimizers",
        ),
        ("is_aligned(param) && is_aligned(grad) && is_aligned(state0) && is_aligned(state1)", "true", "optimizers"),
        ("if (i < n) one(", "one(", "optimizers"),
    ),
    *mutants(
        "matmul/common",
        ("min(row_tiles - group * group_rows, group_rows)", "group_rows", "simt_float32"),
        ("last < k ? last : k", "last", "simt_float32"),
        ("count / k_block + (count % k_block > 0)", "count / k_block", "simt_float32"),
        (
            "row >= m || column >= n) return;\n    C number",
            "row > m || column >= n) return;\n    C number",
            "simt_float32",
        ),
        ("if (column + j >= n) break;", "if (column + j > n) break;", "simt_float32"),
        ("if (column + j < n) to[j] = sum[j];", "if (column + j <= n) to[j] = sum[j];", "simt_float32"),
        ("thread >= static_cast<Index>(m) * packs", "thread >= static_cast<Index>(m) * packs - 1", "simt_float32"),
        ("int slice = 1; slice < slices", "int slice = 1; slice < slices - 1", "simt_float32"),
    ),
    *mutants(
        "matmul/simt",
        ("lines_left_ > 0 && step < steps_left_ ? 16 : 0", "lines_left_ > 0 ? 16 : 0", "simt_float32"),
        ("line < lines_left_ && step < steps_left_", "line < lines_left_", "simt_float32"),
        ("wait_for_copies<Tile::ahead - 1>();\n  " + BARRIER, "wait_for_copies<3>();\n  " + BARRIER, "simt_float32"),
        ("wait_for_copies<Tile::ahead - 1>();\n        _", "wait_for_copies<3>();\n        _", "simt_float32"),
        ("ptx::commit_copies();\n  ptx::wait_for_copies<0>", "ptx::wait_for_copies<0>", "simt_float32"),
        (BARRIER + "\n        write", "write", "simt_float32"),
        ("slice_k / 2 : slice_k - 1, ahead", "slice_k / 2 : slice_k - 2, ahead", "simt_float32"),
        ("stages - 1 - has_spare", "stages - 1", "simt_float32"),
        (BARRIER + "\n    constexpr int height", "constexpr int height", "simt_float32"),
        ("read = next_stage(read)", "read = next_stage(next_stage(read))", "simt_float32"),
        ("fma(a_now[step % 2]", "fma(a_now[(step + 1) % 2]", "simt_float32"),
    ),
    *mutants(
        "matmul/skinny",
        ("step < steps.last; ++step", "step < steps.last - 1; ++step", "skinny_float32"),
        ("step <= last - size - (batch - 1) * apart", "step <= last - size", "skinny_float32"),
        ("lanes >= first", "lanes > first", "skinny_float32"),
        ("= of_warp;\n    }\n  " + BARRIER, "= of_warp;\n    }", "skinny_float32"),
        ("int warp = 1; warp < warps", "int warp = 2; warp < warps", "skinny_float32"),
    ),
    *mutants(
        "matmul/mma",
        ("i * apart < outer_left_ ? valid * size : 0", "valid * size", "mma_float16"),
        ("low = j < valid ?", "low = j <= valid ?", "mma_float16"),
        ("j < valid ? 4 : 0", "4", "mma_tf32"),
        ("wait_for_copies<Tile::stages - 2>();\n  " + BARRIER, "wait_for_copies<3>();\n  " + BARRIER, "mma_float16"),
        ("wait_for_copies<Tile::stages - 2>();\n        _", "wait_for_copies<3>();\n        _", "mma_float16"),
        (BARRIER + "\n        read", "read", "mma_float16"),
        (BARRIER + "\n  finish_rows", "finish_rows", "mma_float16"),
        ("b_now[step % 2][j][2 * half + 1]", "b_now[step % 2][j][2 * half]", "mma_tf32"),
        ("upper(lane / 8, is_b) * 8", "upper(lane / 8, !is_b) * 8", "mma_float16"),
    ),
    *mutants(
        "matmul/wgmma",
        ("& (Tile::alignment - 1)", "& 15", "wgmma_float16"),
        ("lines_apart >> 4 << 16 | eight_rows >> 4", "eight_rows >> 4 << 16 | lines_apart >> 4", "wgmma_float16"),
        ("i * (along_lines ? 16 * 128 : 32)", "i * (along_lines ? 8 * 128 : 32)", "wgmma_float16"),
        ("of_x(shared + Tile::operand_bytes(consumer * 64))", "of_x(shared)", "wgmma_float16"),
        ("r / 4 % 2 * 16 + r / 8 * 4", "r / 4 % 2 * 16 + r / 8 * 8", "wgmma_tf32"),
        ("(line % 32 / 4 ^ step)", "(line % 32 / 4)", "wgmma_tf32"),
        ("(step / 4 ^ line % 8)", "(step / 4)", "wgmma_tf32"),
        ("ptx::flipped(from_[j] + stage, i * 32)", "from_[j] + stage + i * 32", "wgmma_tf32"),
        ("init_barrier(full(), 1)", "init_barrier(full(), 2)", "wgmma_float16"),
        ("Tile::consumers * 4 * Tile::cluster);", "Tile::consumers * 4);", "wgmma_float16"),
        ("    ptx::fence_barrier_init();", "", "wgmma_float16"),
        ("origin.row += blockIdx.x % Tile::cluster * Tile::rows;", "", "wgmma_float16"),
        (CLUSTER + "  } else", "} else", "wgmma_float16"),
        (CLUSTER + "  }\n}", "}\n}", "wgmma_float16"),
        ("ptx::wait_for_phase(stages.empty(), stages.parity() ^ 1);", "", "wgmma_float16"),
        ("stages.parity() ^ 1", "stages.parity()", "wgmma_float16"),
        (
            "arrive_expecting(stages.full(), Tile::stage_bytes)",
            "arrive_expecting(stages.full(), 16384)",
            "wgmma_float16",
        ),
        (
            "arrive_expecting(stages.full(), Tile::stage_bytes)",
            "arrive_expecting(stages.full(), 65536)",
            "wgmma_float16",
        ),
        ("% Tile::cluster * share", "% 1 * share", "wgmma_float16"),
        ("(1 << Tile::cluster) - 1", "1", "wgmma_float16"),
        ("ptx::wait_for_phase(stages.full(), stages.parity());\n          ptx::f", "ptx::f", "wgmma_float16"),
        (
            "ptx::fence_wgmma();\n#pragma unroll\n          for (int i = 0; i < Tile",
            "for (int i = 0; i < Tile",
            "wgmma_float16",
        ),
        ("adds = i > 0 || step > steps.first", "adds = 1", "wgmma_float16"),
        ("wait_for_wgmma<1>", "wait_for_wgmma<2>", "wgmma_float16"),
        ("if (step > steps.first) leave(last);", "leave(stages.empty());", "wgmma_float16"),
        ("ptx::finish_wgmma(sum);\n", "leave(last);ptx::finish_wgmma(sum);", "wgmma_float16"),
        ("if constexpr (Tile::size == 2) leave(last);", "", "wgmma_float16"),
        ("if (lane < Tile::cluster)", "if (lane < 1)", "wgmma_float16"),
        ("parity());\n        reader", "parity() ^ 1);\n        reader", "wgmma_tf32"),
        ("ptx::wait_for_phase(stages.full(), stages.parity());\n            reader", "reader", "wgmma_tf32"),
        ("ptx::fence_wgmma();\n#pragma unroll\n          for (int i = 0; i < 4", "for (int i = 0; i < 4", "wgmma_tf32"),
        ("ptx::wait_for_wgmma<0>();\n          leave(last);", "leave(last);", "wgmma_tf32"),
        ("ptx::wait_for_wgmma<0>();", "", "wgmma_tf32"),
        ("__syncwarp();\n      const Columns of", "const Columns of", "wgmma_float16"),
        ("      __syncwarp();\n    }\n  }\n\n private", "}\n  }\n\n private", "wgmma_float16"),
        ("from = (from ^ flips)", "from = from", "wgmma_float16"),
        ("column_ += columns;", "", "wgmma_float16"),
        ("g / 4 + i / 2 * 2", "g / 4 + i / 2", "wgmma_tf32"),
        ("first_column_ + first + row : line_of", "first_column_ + row : line_of", "wgmma_tf32"),
    ),
    *mutants(
        "matmul/small",
        ("column < 0 ? T(1)", "column < 0 ? T(0)", "mlp"),
        ("upper ? sum[i + kept / 2] : sum[i], give", "upper ? sum[i] : sum[i], give", "mlp"),
        ("< k_size) {\n          a_lines", "< k_size - 1) {\n          a_lines", "mlp"),
        ("u * warp_k < k_size) {\n#pragma", "u * warp_k <= k_size) {\n#pragma", "mlp"),
        ("unsigned warp = 1; warp <", "unsigned warp = 2; warp <", "mlp"),
        ("= sum[s];\n    }\n    " + BARRIER, "= sum[s];\n    }", "mlp"),
        ("if (k < k_size) line.load", "if (k <= k_size) line.load", "mlp_in_tiles"),
        ("b_share.put(b_memory);\n      " + BARRIER, "b_share.put(b_memory);", "mlp_in_tiles"),
        ("}\n      " + BARRIER + "\n    }", "}\n    }", "mlp_in_tiles"),
        ("sum[s]);\n    " + BARRIER, "sum[s]);", "mlp_in_tiles"),
        ("int g = 1; g < groups", "int g = 2; g < groups", "mlp_in_tiles"),
    ),
    *mutants(
        "training/top",
        ("int warp = 1; warp < threads / 32", "int warp = 2; warp < threads / 32", "mlp"),
        (BARRIER + "\n  for (int j = thread", "for (int j = thread", "mlp"),
        (BARRIER + "\n  T* const grad_row", "T* const grad_row", "mlp"),
        (BARRIER + "\n  const Index below_row", "const Index below_row", "mlp"),
    ),
    *mutants("training/dense", ("saved + at(penalized ? penalty.sample(i) : i", "saved + at(i", "penalized_gan")),
    *mutants(
        "training/draw",
        ("opens ? progress->next : progress->step", "progress->step", "mlp"),
        ("row < boundary", "row <= boundary", "gan"),
        ("(n == 1 ? first : c) % 2", "(n == 1 ? c : first) % 2", "mlp"),
        ("4 * static_cast<int>(threadIdx.x); k < width", "4 * static_cast<int>(threadIdx.x); k < width - 3", "gan"),
    ),
    *mutants(
        "training/gather",
        ("T(0);\n  " + BARRIER, "T(0);", "mlp_of_sparse"),
        ("if (changes.any()) {\n    " + BARRIER, "if (changes.any()) {", "mlp_of_sparse"),
        ("row = is_second ? i : i - p.generated", "row = is_second ? i : i - p.generated + 1", "gan"),
        ("k < p.features; k += static_cast", "k < p.features - 1; k += static_cast", "gan"),
    ),
    *mutants(
        "training/update",
        ("if (p.closes) ++p.progress->next;", "", "mlp"),
        ("while (block < p.layers[l].first_block)", "while (block <= p.layers[l].first_block && l)", "mlp"),
        ("+= p.weight * loss", "+= loss", "mlp"),
        ("(k < rows && (further", "((further", "penalized_gan"),
        ("of_row<false>(k) == further", "of_row<false>(k) >= further", "penalized_gan"),
    ),
    *mutants(
        "training/cluster",
        ("count == tile_features && reinterpret", "reinterpret", "mlp_in_a_cluster"),
        ("kept >>= 2;", "", "mlp_in_a_cluster"),
        ("weight = memory.weights[parity]", "weight = memory.weights[1 - parity]", "mlp_in_a_cluster"),
        ("p.drops.apply(kept, grad);", ";", "mlp_in_a_cluster"),
        ("if (i < p.rows) {\n    const Index sample", "{\n    const Index sample", "mlp_in_a_cluster"),
        ("first_step * Rule::hyperparameter_count;", "0;", "mlp_in_a_cluster"),
        ("? 1.0f : 0.0f", "? 0.0f : 0.0f", "mlp_in_a_cluster"),
        (BARRIER + "\n    {\n#pragma", "{\n#pragma", "mlp_in_a_cluster"),
        ("= label;\n    " + BARRIER, "= label;", "mlp_in_a_cluster"),
        ("}\n      __syncwarp();\n      Pack<float, 2> y;", "}\n      Pack<float, 2> y;", "mlp_in_a_cluster"),
        ("}\n    __syncwarp();\n\n    // What the units", "}\n    // What the units", "mlp_in_a_cluster"),
        (CLUSTER.replace("    ", "  "), "", "mlp_in_a_cluster"),
        ("ptx::fence_barrier_init();", "", "mlp_in_a_cluster"),
        ("parity);\n      const int j", "1 - parity);\n      const int j", "mlp_in_a_cluster"),
        ("ptx::wait_for_phase(barrier, parity);\n      const int j", "const int j", "mlp_in_a_cluster"),
        ("ptx::wait_for_phase(barrier, parity);\n    }", "}", "mlp_in_a_cluster"),
        ("Ranks * quads * 16", "Ranks * quads * 16 + 16", "mlp_in_a_cluster"),
        ("rows_of_warp * quads * 16", "8 * quads * 16", "mlp_in_a_cluster"),
        ("}\n    }\n    " + BARRIER + "\n\n    float hyper", "}\n    }\n    float hyper", "mlp_in_a_cluster"),
        ("wait_for_copies<1>", "wait_for_copies<2>", "mlp_in_a_cluster"),
        ("__syncwarp();\n    copy(step + 2);", "copy(step + 3);", "mlp_in_a_cluster"),
        ("int part = 0; part < 3; ++part)\n#pragma", "int part = 0; part < 2; ++part)\n#pragma", "mlp_in_a_cluster"),
        ("ptx::mma_bf16(sums[half][1],", "if (q < 0) ptx::mma_bf16(sums[half][1],", "mlp_in_a_cluster"),
    ),
    *mutants(
        "augment",
        ("* quads_of_row + 1 : 0", "* quads_of_row : 0", "augmentation"),
        ("at = 2 * (block + i / 2 * blocks)", "at = 2 * (block + i / 2 * (pixels / 4))", "augmentation"),
        ("pixels);\n  " + BARRIER, "pixels);", "augmentation"),
        ("sample);\n    " + BARRIER, "sample);", "augmentation"),
        ("drawn);\n    " + BARRIER, "drawn);", "augmentation"),
    ),
]

# Races that no order of a CPU's threads shows, or not in every run.
RACES = [
    *mutants(
        "warp_reduce",
        (FENCE + "\n    last", "last", "elementwise_losses"),
        ("== blocks - 1;\n    " + FENCE, "== blocks - 1;", "elementwise_losses"),
        ("__shared__ bool last;\n  " + BARRIER, "__shared__ bool last;", "columns"),
        (BARRIER + "\n  v = partial[0];", "v = partial[0];", "ranges"),
        ("v = op(v, partial[warp]);\n  " + BARRIER, "v = op(v, partial[warp]);", "ranges"),
        (BARRIER + "\n  v = reduce_lanes<Threads", "v = reduce_lanes<Threads", "rows_by_blocks"),
        ("(Threads / 32)], op);\n  " + BARRIER, "(Threads / 32)], op);", "rows_by_blocks"),
    ),
    *mutants("warp_reduce", ("gridDim.x * gridDim.y * gridDim.z", "gridDim.x", "columns")),
    *mutants("augment", ("weights);\n    " + BARRIER, "weights);", "augmentation")),
    *mutants("losses", ("if (!is_last_block(counter)) return;", "is_last_block(counter);", "elementwise_losses")),
    *mutants("column_sum", ("of_warps[warp][lane] = sum;\n    " + BARRIER, "of_warps[warp][lane] = sum;", "columns")),
    *mutants("matmul/simt", (BARRIER + "\n        write", "write", "simt_float32")),
    *mutants("matmul/skinny", ("= of_warp;\n    }\n  " + BARRIER, "= of_warp;\n    }", "skinny_float32")),
    *mutants(
        "matmul/mma",
        (BARRIER + "\n        read", "read", "mma_float16"),
        (BARRIER + "\n  float* const sums", "float* const sums", "mma_float16"),
    ),
    *mutants(
        "matmul/wgmma",
        ("ptx::wait_for_phase(stages.full(), stages.parity());\n          ptx::f", "ptx::f", "wgmma_float16"),
        ("__syncwarp();\n      const Columns of", "const Columns of", "wgmma_float16"),
    ),
    *mutants(
        "training/cluster",
        (BARRIER + "\n    {\n#pragma", "{\n#pragma", "mlp_in_a_cluster"),
        ("= label;\n    " + BARRIER, "= label;", "mlp_in_a_cluster"),
        ("}\n      __syncwarp();\n      Pack<float, 2> y;", "}\n      Pack<float, 2> y;", "mlp_in_a_cluster"),
        ("}\n    __syncwarp();\n\n    // What the units", "}\n    // What the units", "mlp_in_a_cluster"),
        ("ptx::wait_for_phase(barrier, parity);\n      const int j", "const int j", "mlp_in_a_cluster"),
        ("ptx::wait_for_phase(barrier, parity);\n    }", "}", "mlp_in_a_cluster"),
        ("}\n    }\n    " + BARRIER + "\n\n    float hyper", "}\n    }\n    float hyper", "mlp_in_a_cluster"),
        ("wait_for_copies<1>();\n    __syncwarp();", "wait_for_copies<1>();", "mlp_in_a_cluster"),
        ("__syncwarp();\n    copy(step + 2);", "copy(step + 2);", "mlp_in_a_cluster"),
        ("&& (!of_all || rank == 0)", "", "mlp_in_a_cluster"),
        ("memory.bias[thread] = 0;\n  " + BARRIER, "memory.bias[thread] = 0;", "mlp_in_a_cluster"),
        ("own.grad[j] = 0;\n      }\n      __syncwarp();", "own.grad[j] = 0;\n      }", "mlp_in_a_cluster"),
        ("[&] {\n            __syncwarp();", "[&] {", "mlp_in_a_cluster"),
        ("});\n      __syncwarp();\n    }", "});\n    }", "mlp_in_a_cluster"),
        ("p.weight * loss;\n    " + BARRIER, "p.weight * loss;", "mlp_in_a_cluster"),
        ("of_steps[s];\n    " + BARRIER, "of_steps[s];", "mlp_in_a_cluster"),
    ),
]


def planted(mutant: Mutant, folder: pathlib.Path) -> pathlib.Path:
    """A root for `HostDevice` that has the mutant's file."""
    text = (ROOT / "csrc/cuda" / mutant.file).read_text()
    assert text.count(mutant.text) == 1, f"{mutant.file} has {mutant.text!r} {text.count(mutant.text)} times"
    path = folder / "csrc/cuda" / mutant.file
    path.parent.mkdir(parents=True)
    path.write_text(text.replace(mutant.text, mutant.instead))
    return folder


FEW_PARTS = {"MAX_PARTS": 3, "MAX_BLOCKS": dict.fromkeys(launches.MAX_BLOCKS, 3)}


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that blocks go round."""
    for name, few in FEW_PARTS.items():
        monkeypatch.setattr(launches, name, few)


@pytest.mark.parametrize("order", THREAD_ORDERS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_kernels_pass(check: Callable[[Run], None], order: str) -> None:
    check(Run(HostDevice(thread_order=order)))


def found(mutant: Mutant, folder: pathlib.Path) -> bool:
    root = planted(mutant, folder)
    for check in mutant.checks:
        for order in THREAD_ORDERS:
            try:
                CHECKS[check](Run(HostDevice(root, order)))
            except CompileError:
                raise
            except (AssertionError, RuntimeError):
                return True
    return False


def each_in_a_child() -> None:
    """Print for each mutant how a process ended that has run its checks: they may write anywhere."""
    for name, few in FEW_PARTS.items():
        setattr(launches, name, few)
    for number, mutant in enumerate(WRONG):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that hangs
            try:
                with tempfile.TemporaryDirectory() as folder:
                    status = 0 if found(mutant, pathlib.Path(folder)) else 1
            except BaseException:
                traceback.print_exc()
                status = 2
            os._exit(status)
        print(number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def ends() -> tuple[dict[int, int], str]:
    """Exit statuses by the numbers of mutants, below 0 for signals; and what was said about errors."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "children"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(tuple(map(int, line.split())) for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("number", range(len(WRONG)), ids=map(str, WRONG))
def test_a_mutant_fails(number: int, ends: tuple[dict[int, int], str]) -> None:
    statuses, errors = ends
    assert statuses[number] != 1, "nothing was found"
    assert statuses[number] != 2, errors[-3000:]


def under_thread_sanitizer() -> None:
    """Run the checks of all races, without a mutant and then with each."""
    for name, few in FEW_PARTS.items():
        setattr(launches, name, few)
    for name in sorted({name for mutant in RACES for name in mutant.checks}):
        CHECKS[name](Run(HostDevice(), quick=True))
    for mutant in RACES:
        with tempfile.TemporaryDirectory() as folder:
            root = planted(mutant, pathlib.Path(folder))
            for name in mutant.checks:
                try:
                    CHECKS[name](Run(HostDevice(root), quick=True))
                    print("FOUND NOTHING:", mutant)
                except AssertionError as error:
                    print("FOUND NO RACE:", mutant, error)
                except RuntimeError as error:
                    if "ThreadSanitizer reports a data race" not in str(error):
                        raise


def test_thread_sanitizer_reports_races() -> None:
    environment = sanitized_environment("thread")
    if environment is None:
        pytest.skip(f"{COMPILER} has no library for it")
    environment["TSAN_OPTIONS"] += ":exitcode=0:symbolize=0"  # which takes long
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("ThreadSanitizer: data race") >= len(RACES)


if __name__ == "__main__":
    each_in_a_child() if sys.argv[1:] == ["children"] else under_thread_sanitizer()
