"""Every family of CUDA kernels, on small awkward shapes: what `gpu_report.py` runs under NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/gpu_sanitized.py [--seconds 30]

Arrays are allocations of their own, without CuPy's pool, in which an access beyond an array would go unseen. Kernels of
training read the space behind the rows of their matrices, and use it for nothing (csrc/cuda/training/step.cuh): it is
NaN here, so that initcheck tells of other memory alone. Results are checked against the reference as well. What does
not fit into `--seconds` is left out, and said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import scipy.sparse

import gemmlet
from gemmlet import kernels, nn
from gemmlet.backends import select
from gemmlet.backends.cuda import matmul as cuda_matmul
from gemmlet.backends.cuda import training as cuda_training
from gemmlet.data import augment
from gemmlet.formulas.activations import ACTIVATIONS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import one_call_of_each

Check = tuple[str, Callable[[], None]]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Relative errors, of results and of sums: coarse, as this is about memory.
_ERRORS = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}


def _close(got: Any, exact: Any, tolerance: float) -> None:
    got, exact = np.asarray(got).astype(np.float64), np.asarray(exact).astype(np.float64)
    size = float(np.max(np.abs(exact))) if exact.size else 0.0
    error = float(np.max(np.abs(got - exact))) if exact.size else 0.0
    if not error <= tolerance * max(size, 1e-3):
        raise AssertionError(f"an error of {error:.3g} in numbers up to {size:.3g}")


def _download(device: Any, array: Any) -> np.ndarray:
    if not array.flags.c_contiguous:
        return _download(device, array.T).T
    out = np.empty(array.shape, array.dtype)
    device.download(array, out)
    return out


def matmuls(device: Any, rng: np.random.Generator) -> Iterator[Check]:
    """Every tile, with whole sums and with divided ones, in one layout of each shape."""
    layouts = itertools.product((False, True), repeat=2)

    def check(kind: str, choice: Any, operands: tuple[Any, Any], a: np.ndarray, b: np.ndarray) -> None:
        bias = rng.normal(size=b.shape[1]).astype(a.dtype)
        out, z = (device.empty((a.shape[0], b.shape[1]), a.dtype) for _ in range(2))
        arguments = *operands, device.upload(bias), ACTIVATIONS["relu"], 0.0, out, z
        cuda_matmul.linear(device, *arguments, tf32=kind == "tf32", choice=choice)
        exact = a.astype(np.float64) @ b.astype(np.float64) + bias.astype(np.float64)
        tolerance = 5e-3 if kind == "tf32" else _ERRORS[kind]
        _close(_download(device, z), exact, tolerance)
        _close(_download(device, out), np.maximum(exact, 0), tolerance)

    # Sizes that divide into nothing; and few rows or columns, which have a kernel of their own.
    shapes = ((37, 300, 45), (3, 520, 67), (65, 130, 1), (131, 72, 264))
    for (m, k, n), layout in zip(shapes, layouts, strict=True):
        for number, kind in enumerate((*DTYPES, "tf32")):
            dtype = DTYPES["float32" if kind == "tf32" else kind]
            a, b = (rng.normal(size=shape).astype(dtype) for shape in ((m, k), (k, n)))
            # Not the same layouts for all types.
            transposed = layout if number % 2 else tuple(not is_transposed for is_transposed in layout)
            operands = tuple(
                device.upload(np.ascontiguousarray(x.T)).T if is_transposed else device.upload(x)
                for x, is_transposed in zip((a, b), transposed, strict=True)
            )
            seen = set()
            for choice in cuda_matmul.choose(device, *operands, kind == "tf32"):
                case = choice.tile, choice.splits > 1
                if case not in seen:
                    seen.add(case)
                    name = f"{kind} {m}x{k} @ {k}x{n}, {choice.tile}, {choice.splits} parts, transposed {transposed}"
                    yield name, lambda c=(kind, choice, operands, a, b): check(*c)


def trainings(rng: np.random.Generator) -> Iterator[Check]:
    """Some steps of both networks, the last mini-batch smaller."""
    images = (rng.integers(0, 256, (23, 30)) * (rng.random((23, 30)) < 0.4)).astype(np.uint8)
    numbers = rng.random((23, 30), np.float32)
    labels, counts = rng.integers(0, 5, 23), rng.uniform(0.5, 1.5, 23)

    def mlp(x: Any, hidden: list[int], output: str, rule: str, dtype: Any, **settings: Any) -> None:
        weights, more = [], {"sample_weight": counts} if settings else {}
        for backend in ("cuda", "numpy"):
            model = nn.MLP([30, *hidden, 5], "gelu", output, dtype=dtype, **settings)
            with gemmlet.use_backend(backend):
                given = x if x.dtype == np.uint8 else x.astype(dtype)
                model.fit(given, labels, 2, 7, nn.make_optimizer(rule), **more)
            weights.append(model.parameters)
        for got, exact in zip(*weights, strict=True):
            _close(got, exact, 1e-3)

    def gan(**settings: Any) -> None:
        losses = []
        for backend in ("cuda", "numpy"):
            model = nn.GAN(7, [33, 30], [21, 9, 1], dtype=np.float32, **settings)
            with gemmlet.use_backend(backend):
                history = model.fit(images, 2, 7, y=labels if "n_classes" in settings else None)
            losses.append([history.generator_loss, history.discriminator_loss])
        _close(*losses, 1e-3)

    random = {"dropout": 0.5, "input_dropout": 0.2}
    for x, hidden, output, rule, dtype, settings in (
        (images, [33], "softmax", "adam", np.float32, {}),
        (numbers, [17, 9], "sigmoid", "sgd", np.float32, {}),
        (images, [], "softmax", "sgd", np.float64, {}),
        (numbers, [260], "softmax", "adamw", np.float32, {}),
        (images, [33], "softmax", "sgd", np.float32, random),
        (images, [17, 9], "softmax", "adam", np.float32, random | {"input_noise": 0.1}),
        (scipy.sparse.csr_array(numbers * (numbers < 0.4)), [17], "softmax", "sgd", np.float32, random),
    ):
        words = " ".join(("sparse" if scipy.sparse.issparse(x) else "", *settings)).strip()
        yield (
            f"MLP 30-{hidden}-5 {output} {rule} {np.dtype(dtype)} {words}".strip(),
            lambda c=(x, hidden, output, rule, dtype), more=settings: mlp(*c, **more),
        )
    penalized = {"n_classes": 5, "gradient_penalty": 0.5}
    random = {f"discriminator_{name}": rate for name, rate in (random | {"input_noise": 0.1}).items()}
    for settings in ({}, penalized, penalized | random):
        yield " ".join(("GAN 7-33-30, 30-21-9-1", *settings)), lambda more=settings: gan(**more)


def augmentation(rng: np.random.Generator) -> Iterator[Check]:
    """Images that are staged in shared memory, of words and of single bytes, and images that are not."""

    def check(images: np.ndarray, settings: dict[str, float]) -> None:
        results = []
        for backend in ("cuda", "numpy"):
            with gemmlet.use_backend(backend):
                results.append(augment(images, **settings, seed=1))
        if not np.array_equal(*results):
            raise AssertionError(f"{np.count_nonzero(results[0] != results[1])} other bytes")

    every = {"rotate": 30.0, "elastic": 2.0, "noise": 9.0, "erase": 1.0}
    for sides in ((28, 28), (5, 7), (110, 90)):
        images = rng.integers(0, 256, (3, *sides), np.uint8)
        for settings in (every, {"shift": 3.0}, {"noise": 9.0}):
            yield f"augmentation of {sides}: {' '.join(settings)}", lambda c=(images, settings): check(*c)


def fill_padding(session: Any) -> None:
    """Write NaN to what lies behind the rows of the matrices of a session of training."""
    view = getattr(session.device, "view", lambda array: array)  # the stand-in's, where there is no GPU
    for network in session.networks:
        # (The inputs of a layer are the results of the one below.)
        every = network.y, network.z, network.grad, [*network.x[1:], None]
        for width, *matrices in zip(network.widths[1:], *every, strict=True):
            for matrix in matrices:
                if matrix is not None:
                    view(matrix)[:, width:] = np.nan
    for matrix in (session._gathered, session._changed):
        if matrix is not None:
            view(matrix)[:, session.networks[-1].inputs[0] :] = np.nan


@contextlib.contextmanager
def padding_filled() -> Iterator[None]:
    """Let each session begin so."""
    reserve = cuda_training.Session._reserve

    def reserved(session: Any, rows: int) -> None:
        is_larger = rows > session._capacity
        reserve(session, rows)
        if is_larger:
            fill_padding(session)

    with mock.patch.object(cuda_training.Session, "_reserve", reserved):
        yield


def all_kernels(rng: np.random.Generator) -> Iterator[Check]:
    """Every public kernel, of NumPy arrays that are copied to the GPU and back."""

    def check(call: Callable[[], tuple[Any, ...]], dtype: str) -> None:
        with gemmlet.use_backend("numpy"):
            expected = call()
        with gemmlet.use_backend("cuda"):
            got = call()
        for a, b in zip(got, expected, strict=True):
            if b is not None:
                _close(a, b, _ERRORS[dtype])

    for rows, columns, dtype in ((13, 37, "float32"), (5, 1500, "float32"), (1, 1, "float32"), (6, 5000, "float64")):
        for name, call in one_call_of_each(rng, DTYPES[dtype], rows, columns).items():
            yield f"{name} {rows}x{columns} {dtype}", lambda c=(call, dtype): check(*c)


def halves_and_strides(device: Any, rng: np.random.Generator) -> Iterator[Check]:
    """16 bits, and arrays with gaps, misaligned and backwards."""

    def check(kernel: Callable[[Any], Any], reference: Callable[[Any], Any], base: np.ndarray, view: Any) -> None:
        result = _download(device, kernel(view(device.upload(base))))
        _close(result, reference(view(base).astype(np.float64)), _ERRORS[base.dtype.name])

    views: dict[str, Callable[[Any], Any]] = {
        "whole": lambda a: a,
        "one element on": lambda a: a.reshape(-1)[1:-36].reshape(-1, 37),
        "backwards": lambda a: a[::-2, ::-3],
        "transposed": lambda a: a.T,
    }
    for dtype, (name, view) in itertools.product(("float32", "float16", "bfloat16"), views.items()):
        base = rng.normal(size=(19, 37)).astype(DTYPES[dtype])
        for kernel, reference in (
            (kernels.tanh, np.tanh),
            (kernels.relu, lambda x: np.maximum(x, 0)),
            (kernels.softmax, lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)),
        ):
            yield f"{kernel.__name__} {dtype} {name}", lambda c=(kernel, reference, base, view): check(*c)


def checks(device: Any) -> Iterator[Check]:
    """Everything, what is most likely wrong first."""
    rng = np.random.default_rng(0)
    yield from trainings(rng)
    yield from augmentation(rng)
    yield from matmuls(device, rng)
    yield from halves_and_strides(device, rng)
    yield from all_kernels(rng)


def run(all_of_them: Sequence[Check], seconds: float) -> bool:
    """Run them as long as there is time; return whether all that ran were right."""
    end, failed, done = time.monotonic() + seconds, 0, 0
    for name, check in all_of_them:
        done += 1
        try:
            check()
        except AssertionError as error:
            failed += 1
            print(f"WRONG {name}: {error}", flush=True)
        except Exception as error:
            # After an error of CUDA nothing works any more.
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
            return False
        if time.monotonic() > end:
            break
    print(f"{done} of {len(all_of_them)} checks, {failed} wrong", flush=True)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args(arguments)
    try:
        backend: Any = select.load("cuda")
    except RuntimeError as error:
        parser.exit(2, f"no GPU: {error}\n")
    import cupy

    cupy.cuda.set_allocator(None)
    with padding_filled():
        return 0 if run(list(checks(backend._first)), options.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
