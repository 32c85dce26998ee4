"""Kernels on arrays that are on a GPU: `cupy.ndarray`s in every layout and dtype, and what goes wrong with them.

Without a GPU the arrays are CuPy's over the CPU's memory, and the kernels those of ``csrc/cuda`` compiled for the CPU.
What the backend does to NumPy arrays is tested by all the files that go over the backends.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")
import gemmlet
from cuda_on_host import backend as place
from cuda_on_host.backend import to_cpu, to_gpu
from gemmlet import kernels, nn
from gemmlet.backends.cuda import launches
from gemmlet.backends.cuda.launches import ROW_TEAMS
from gemmlet.data import augment
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.augmentation import Draw
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from support import (
    UPDATED,
    arguments_of,
    assert_within,
    f64,
    reference_backward,
    reference_forward,
    row_bounds,
    same_bits,
)

ml_dtypes = pytest.importorskip("ml_dtypes")  # CuPy's bfloat16

try:
    BACKEND = place.load()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)
IS_GPU = not hasattr(BACKEND._first, "view")

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# The smallest numbers above 0.
TINY = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@pytest.fixture(params=list(DTYPES.values()), ids=list(DTYPES))
def any_dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture(autouse=True)
def other_backend_in_use() -> Iterator[None]:
    """Arrays on a GPU are computed there, whatever is chosen."""
    with gemmlet.use_backend("numpy"):
        yield


def strided(array: np.ndarray) -> np.ndarray:
    """The same values with gaps between them, the last dimension backwards in memory."""
    wide = np.zeros((*array.shape[:-1], 3 * array.shape[-1] + 1), array.dtype)
    view = wide[..., 1::3][..., : array.shape[-1]][..., ::-1]
    view[...] = array
    return view


def shifted(array: np.ndarray) -> np.ndarray:
    """The same values from an address that is no multiple of 16."""
    memory = np.zeros(array.size + 1, array.dtype)
    view = memory[1:].reshape(array.shape)
    view[...] = array
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "strided": strided,
    "shifted": shifted,
}


def on_gpu(arguments: dict[str, Any], layout: str = "C") -> dict[str, Any]:
    change = LAYOUTS[layout]
    moved = {}
    for name, value in arguments.items():
        is_array = isinstance(value, np.ndarray)
        if is_array and layout == "shifted":
            # Of a GPU array, a view that begins one element later.
            memory = to_gpu(np.concatenate([np.zeros(1, value.dtype), value.ravel()]))
            moved[name] = memory[1:].reshape(value.shape)
        else:
            moved[name] = to_gpu(change(value)) if is_array else value
    return moved


def results(name: str, arguments: dict[str, Any]) -> list[np.ndarray]:
    """What a call computes on GPU arrays, and what it updates."""
    returned = getattr(kernels, name)(**arguments)
    found = list(returned) if isinstance(returned, tuple) else [returned]
    found += [arguments.get(argument) for argument in UPDATED]
    return [r if isinstance(r, float) else to_cpu(r) for r in found if r is not None]


def expected(name: str, arguments: dict[str, Any]) -> list[np.ndarray]:
    """The reference, of the same numbers in float64."""
    wide = {k: f64(v) if isinstance(v, np.ndarray) and v.dtype.kind not in "iu" else v for k, v in arguments.items()}
    returned = getattr(kernels, name)(**wide)
    found = list(returned) if isinstance(returned, tuple) else [returned]
    return [r for r in [*found, *(wide.get(argument) for argument in UPDATED)] if r is not None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", kernels.__all__)
def test_every_kernel_in_every_layout(name: str, layout: str, any_dtype: Any, rng: Any) -> None:
    eps = EPS[any_dtype.name]
    for rows, columns in [(13, 17), (1, 40), (64, 3)]:
        arguments = arguments_of(name, rng, any_dtype, rows, columns)
        exact = expected(name, {k: np.copy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()})
        found = results(name, on_gpu(arguments, layout))
        assert len(found) == len(exact)
        for got, want in zip(found, exact, strict=True):
            if not isinstance(got, float):
                assert got.dtype == any_dtype
            # Sums of up to 64 numbers, rounded with them.
            assert_within(f64(got), want, 24 * eps * (np.abs(want) + np.max(np.abs(want))))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_the_bits_of_the_cpu(name: str, rng: Any) -> None:
    """Where the CPU has a fused multiply-add, as a GPU always has."""
    from gemmlet.backends.cpu import CpuBackend, available_isas

    with_fma = [isa for isa in available_isas() if isa.startswith("x86-64-v")]
    if not with_fma:
        pytest.skip("no instruction set with fma")
    for dtype in (np.float32, np.float64):
        x, grad = np.concatenate([rng.normal(scale=3, size=(2, 5000)), rng.normal(scale=60, size=(2, 500))], 1)
        special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-320, 1e-42, -1e-42, 88.5, -104.0, 710.0, -745.0]
        x, grad = (np.concatenate([a, special]).astype(dtype) for a in (x, grad))
        with gemmlet.use_backend(CpuBackend(with_fma[0])):
            y = getattr(kernels, name)(x)
            grad_x = getattr(kernels, f"{name}_backward")(grad, x, y)
        g, x_, y_ = to_gpu(grad), to_gpu(x), to_gpu(y)
        assert same_bits(to_cpu(getattr(kernels, name)(x_)), y)
        assert same_bits(to_cpu(getattr(kernels, f"{name}_backward")(g, x_, y_)), grad_x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_rounded_once(name: str, dtype: str) -> None:
    """All 65,536 numbers: computed to some 15 bits at least, and rounded to nearest."""
    entry, kind = ACTIVATIONS[name], np.dtype(DTYPES[dtype])
    x = np.arange(2**16, dtype=np.uint16).view(kind)
    y = to_cpu(getattr(kernels, name)(to_gpu(x)))
    exact = reference_forward(entry, x.astype(np.float32))
    with np.errstate(all="ignore"):
        nearest = exact.astype(np.float32).astype(kind)
        spacing = np.abs(f64(nearest)) * EPS[dtype] + TINY[dtype]
    got = f64(y)
    finite = np.isfinite(f64(nearest)) & np.isfinite(got)
    assert np.array_equal(np.isnan(got), np.isnan(exact))
    # The largest numbers round to infinity on one side or the other.
    assert np.count_nonzero(np.isfinite(got) != np.isfinite(f64(nearest))) <= 2
    assert np.all(np.abs(got[finite] - exact[finite]) <= 0.52 * spacing[finite])
    ones = to_gpu(np.ones_like(x))
    grad = f64(to_cpu(getattr(kernels, f"{name}_backward")(ones, to_gpu(x), to_gpu(y))))
    saved = x.astype(np.float32) if entry.needs_x else f64(y)
    exact = reference_backward(entry, np.ones(x.shape), saved, float(np.float32(entry.default)))
    with np.errstate(all="ignore"):
        spacing = np.abs(exact) * EPS[dtype] + TINY[dtype] + entry.backward_accuracy.floor * 2.0**-18
        finite = np.isfinite(exact.astype(np.float32).astype(kind).astype(np.float64)) & np.isfinite(grad)
    assert np.array_equal(np.isnan(grad), np.isnan(exact))
    assert np.all(np.abs(grad[finite] - exact[finite]) <= 0.52 * spacing[finite])


# Functions of rows, and losses: every team of threads that may take a row.


def allow_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let grids have few blocks at most, and the backend make what has a place for each of them anew."""
    monkeypatch.setattr(launches, "MAX_BLOCKS", dict.fromkeys(launches.MAX_BLOCKS, count))
    monkeypatch.setattr(BACKEND, "_own", threading.local())


COLUMNS = sorted({max(1, most + d) for most, _, _ in ROW_TEAMS[:-1] for d in (-1, 0, 1)} | {1, 2, 12, 1000, 10000})


@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_of_every_length(columns: int, any_dtype: Any, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in float32 at least, and rounded to 16 bits, or to zero, once."""
    eps, computed = EPS[any_dtype.name], min(EPS[any_dtype.name], 2.0**-23)
    rounding, tiny = (eps, TINY[any_dtype.name]) if eps > computed else (0.0, 0.0)
    # More rows than one round of the grid takes.
    allow_blocks(2, monkeypatch)
    rows = 2 * 2 * 256 + 5 if columns <= 10 else 3 if columns > 512 else 260
    x, grad = rng.normal(scale=3, size=(2, rows, columns)).astype(any_dtype)
    relative, absolute = row_bounds(x, computed)
    for name, entry in ROW_FUNCTIONS.items():
        y = getattr(kernels, name)(to_gpu(x))
        exact = entry.forward(f64(x))
        error = absolute if name == "log_softmax" else relative * np.abs(exact)
        assert_within(f64(to_cpu(y)), exact, error + rounding * np.abs(exact) + tiny)
        grad_x = getattr(kernels, f"{name}_backward")(to_gpu(grad), None, y)
        y = f64(to_cpu(y))
        size = np.sum(np.abs(f64(grad)) * (1.0 if name == "log_softmax" else np.abs(y)), axis=-1, keepdims=True)
        factor = np.exp(y) if name == "log_softmax" else np.abs(y)
        error = (columns + 8) * computed * (factor * (np.abs(f64(grad)) + size) + np.abs(f64(grad)))
        exact = entry.backward(f64(grad), y)
        assert_within(f64(to_cpu(grad_x)), exact, error + rounding * np.abs(exact) + tiny)
    labels = rng.integers(0, columns, size=rows)
    narrow = labels.astype(np.uint8 if columns < 256 else np.int16)
    soft = rng.uniform(size=(rows, columns)).astype(any_dtype)
    log_p = -ROW_FUNCTIONS["log_softmax"].forward(f64(x))
    for entry, labels_given, smoothing in itertools.product(ROW_LOSSES.values(), (labels, narrow, soft), (0.0, 0.1)):
        loss, gradient = getattr(kernels, entry.name)(to_gpu(x), to_gpu(labels_given), label_smoothing=smoothing)
        targets = f64(soft) if labels_given is soft else np.eye(columns)[labels] if columns < 8000 else None
        if targets is None:  # too large to be worth it
            continue
        targets = (1 - smoothing) * targets + smoothing / columns
        value, slope = entry.evaluate(f64(x), targets)
        assert isinstance(loss, float)
        terms = np.sum(targets * (absolute + 4 * computed * log_p), axis=-1)
        assert_within(loss, np.mean(value), np.mean(terms) + rows * 2.0**-52 * abs(np.mean(value)))
        total = np.sum(targets, axis=-1, keepdims=True)
        error = (relative + (columns + 8) * computed) * np.exp(-log_p) * total + 4 * computed * targets
        exact = slope / rows
        assert_within(f64(to_cpu(gradient)), exact, error / rows + rounding * np.abs(exact) + tiny)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_many_elements(name: str, any_dtype: Any, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the grid takes in one round, and a few that fill no pack; the same bits again."""
    allow_blocks(8, monkeypatch)
    p, t = rng.uniform(0.1, 0.9, size=(2, 8 * 256 * 8 * 2 + 7)).astype(any_dtype)
    loss, grad = getattr(kernels, name)(to_gpu(p), to_gpu(t))
    exact, exact_grad = getattr(kernels, name)(f64(p), f64(t))
    assert abs(loss - exact) <= 1e-6 * abs(exact)
    bound = 4 * EPS[any_dtype.name] * (np.abs(exact_grad) + 1 / p.size) + TINY[any_dtype.name]
    assert_within(f64(to_cpu(grad)), exact_grad, bound)
    again, grad_again = getattr(kernels, name)(to_gpu(p), to_gpu(t))
    assert loss == again
    assert same_bits(to_cpu(grad).view(np.uint8), to_cpu(grad_again).view(np.uint8))


def test_column_sums(any_dtype: Any, rng: Any) -> None:
    for rows, columns in [(1, 1), (3, 300), (5000, 2), (1031, 67), (100_003, 3)]:
        grad = rng.integers(-1, 2, size=(rows, columns)).astype(any_dtype)
        for array in (to_gpu(grad), to_gpu(np.asfortranarray(grad)), to_gpu(strided(grad))):
            total = kernels.linear_backward(array, None, None, need_x=False, need_w=False)[2]
            assert np.array_equal(to_cpu(total), f64(grad).sum(axis=0).astype(any_dtype))


# Arguments.


def test_out_is_used_and_returned(any_dtype: Any, rng: Any) -> None:
    x = rng.normal(size=(5, 7)).astype(any_dtype)
    for layout in LAYOUTS:
        out = on_gpu({"out": np.zeros_like(x)}, layout)["out"]
        assert kernels.relu(to_gpu(x), out=out) is out
        assert same_bits(f64(to_cpu(out)), np.maximum(f64(x), 0))
    in_place = to_gpu(x)
    kernels.relu(in_place, out=in_place)
    assert same_bits(f64(to_cpu(in_place)), np.maximum(f64(x), 0))


def test_partial_overlap(rng: Any) -> None:
    x = rng.normal(size=101).astype(np.float32)
    memory = to_gpu(x)
    kernels.relu(memory[:-1], out=memory[1:])
    assert same_bits(to_cpu(memory)[1:], np.maximum(x[:-1], 0))
    square = to_gpu(np.ones((8, 8), np.float32))
    with pytest.raises(ValueError, match="out overlaps a"):
        kernels.matmul(square, square, out=square)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *[("matmul", "b"), ("linear", "b"), ("linear_backward", "w"), ("tanh_backward", "y"), ("huber", "targets")],
        *[("softmax_cross_entropy", "labels"), ("adam_update", "m"), ("softmax_backward", "y"), ("relu", "out")],
    ],
)
def test_arrays_in_different_places(name: str, argument: str, rng: Any) -> None:
    host = arguments_of(name, rng, np.float32, 6, 5)
    if argument == "out":
        host["out"] = np.zeros((6, 5), np.float32)
    for mixed in (on_gpu(host) | {argument: host[argument]}, host | {argument: to_gpu(host[argument])}):
        with pytest.raises(ValueError, match=rf"^{argument} is on (the CPU|GPU 0), the other arguments on"):
            getattr(kernels, name)(**mixed)
    if argument == "out":
        assert not np.any(host["out"])


def test_dtypes_that_are_none() -> None:
    for dtype in (np.int32, np.complex64, np.bool_):
        with pytest.raises(TypeError, match=r"^x has dtype .*expected float32, float64, float16 or bfloat16"):
            kernels.tanh(to_gpu(np.ones(3, dtype)))
    with pytest.raises(TypeError, match="b has dtype float64, the other arguments float32"):
        kernels.matmul(to_gpu(np.ones((2, 2), np.float32)), to_gpu(np.ones((2, 2))))
    with pytest.raises(TypeError, match="x has dtype float16; expected float32 or float64"):
        kernels.tanh(np.ones(3, np.float16))


def test_labels_out_of_range_write_nothing() -> None:
    logits, out = to_gpu(np.zeros((4, 3), np.float32)), to_gpu(np.full((4, 3), 7, np.float32))
    for labels in ([0, 1, 2, 3], [0, -1, 2, 1]):
        with pytest.raises(ValueError, match=r"labels must lie within \[0, 3\), got"):
            kernels.softmax_cross_entropy(logits, to_gpu(np.array(labels)), out=out)
    assert np.all(to_cpu(out) == 7)
    with pytest.raises(ValueError, match=r"p must lie within \[0, 1\], got 0\.0 to 2\.0"):
        kernels.binary_cross_entropy(to_gpu(np.array([0, 2.0, math.nan])), to_gpu(np.zeros(3)), out=to_gpu(np.ones(3)))


def test_empty_arrays(any_dtype: Any) -> None:
    nothing = to_gpu(np.zeros((0, 3), any_dtype))
    assert kernels.tanh(nothing).shape == (0, 3)
    assert kernels.softmax(nothing).shape == (0, 3)
    assert kernels.matmul(nothing, to_gpu(np.zeros((3, 4), any_dtype))).shape == (0, 4)
    assert math.isnan(kernels.mean_squared_error(nothing, nothing)[0])
    no_terms = kernels.matmul(to_gpu(np.zeros((2, 0), any_dtype)), to_gpu(np.zeros((0, 3), any_dtype)))
    assert np.array_equal(to_cpu(no_terms), np.zeros((2, 3)))


def test_more_dimensions_than_two(rng: Any) -> None:
    x, w = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(5, 6))
    for array in (x, x.transpose(2, 0, 1, 3), x[:, ::-1, ::2]):
        assert_within(to_cpu(kernels.linear(to_gpu(array), to_gpu(w))), array @ w, 1e-13)
        assert_within(to_cpu(kernels.matmul(to_gpu(array), to_gpu(w))), array @ w, 1e-13)
        assert_within(to_cpu(kernels.tanh(to_gpu(array))), np.tanh(array), 1e-15)
    stack = rng.normal(size=(3, 5, 2))
    assert_within(to_cpu(kernels.matmul(to_gpu(x), to_gpu(stack))), x @ stack, 1e-13)


# Networks.


def some_samples(kind: str, n: int, features: int, rng: Any) -> Any:
    x = rng.uniform(size=(n, features)).astype(np.float32)
    return (255 * x).astype(np.uint8) if kind == "bytes" else x


@pytest.mark.parametrize("kind", ["float", "bytes"])
def test_fit_on_samples_that_are_on_a_gpu(kind: str, rng: Any) -> None:
    """They are trained on there, whatever backend is in use, with the bits of samples that are brought there."""
    x, y = some_samples(kind, 90, 12, rng), rng.integers(0, 3, size=90)
    held_out, labels = some_samples(kind, 30, 12, rng), rng.integers(0, 3, size=30)

    def fit(change: Any) -> tuple[nn.MLP, nn.GAN, nn.History]:
        mlp, gan = nn.MLP([12, 8, 3], seed=1), nn.GAN(4, [8, 12], [8, 1], seed=1)
        validation = change(held_out), change(labels)
        history = mlp.fit(change(x), change(y), epochs=2, batch_size=20, validation_data=validation)
        gan.fit(change(x), epochs=1, batch_size=20)
        return mlp, gan, history

    with gemmlet.use_backend(BACKEND):
        brought = fit(lambda array: array)
    there = fit(to_gpu)
    for a, b in zip(brought[:2], there[:2], strict=True):
        parameters = [n.parameters if isinstance(n, nn.MLP) else n.generator_parameters for n in (a, b)]
        assert all(same_bits(p, q) for p, q in zip(*parameters, strict=True))
    assert brought[2].validation_loss == there[2].validation_loss
    scores = there[0].evaluate(held_out, labels)
    assert there[2].validation_loss[-1] == pytest.approx(scores["loss"], rel=1e-6)
    assert there[2].validation_accuracy[-1] == scores["accuracy"]


class Moved:
    """What goes to a device and comes back: the bytes of each copy."""

    def __init__(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: list[int] = []
        self.down: list[int] = []
        kind = type(device)
        upload, download = kind.upload, kind.download
        monkeypatch.setattr(kind, "upload", lambda d, a, *out: self.up.append(a.nbytes) or upload(d, a, *out))
        monkeypatch.setattr(kind, "download", lambda d, a, out: self.down.append(out.nbytes) or download(d, a, out))


NETWORKS: dict[str, Any] = {
    "softmax": lambda dtype: nn.MLP([12, 9, 8, 3], "gelu", dtype=dtype),
    "sigmoid": lambda dtype: nn.MLP([12, 9, 4], output="sigmoid", dtype=dtype),
    "one sigmoid": lambda dtype: nn.MLP([12, 9, 1], output="sigmoid", dtype=dtype),
    "identity": lambda dtype: nn.MLP([12, 9, 5], output="identity", dtype=dtype),
    "one number": lambda dtype: nn.MLP([12, 9, 1], output="identity", dtype=dtype),
}


@pytest.mark.parametrize("size", [None, 8])
def test_batches_where_the_samples_are(size: int | None, rng: Any) -> None:
    """On a GPU; the function may use their memory again."""
    x, y = rng.random((64, 12), dtype=np.float32), rng.integers(0, 4, 64)
    model, expected = nn.MLP([12, 9, 4]), nn.MLP([12, 9, 4])
    there = to_gpu(x[:16])

    def batch(i: int) -> tuple[Any, Any]:
        BACKEND.assign(there, to_gpu(x[16 * i : 16 * i + 16]))
        return there, to_gpu(y[16 * i : 16 * i + 16])

    history = model.fit(batch, epochs=2, steps_per_epoch=4, batch_size=size, shuffle=False)
    assert history.loss == expected.fit(to_gpu(x), y, 2, size or 16, shuffle=False).loss
    assert all(map(same_bits, model.parameters, expected.parameters))


@pytest.mark.parametrize("kind", ["float", "bytes", "images"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_where_the_samples_are(name: str, kind: str, dtype: Any, rng: Any, monkeypatch: Any) -> None:
    """On a GPU they stay there, and results are there; the numbers are the CPU's."""
    monkeypatch.setattr(nn.mlp, "CHUNK", 16)
    model = NETWORKS[name](dtype)
    outputs = model.layers[-1]
    x = some_samples("float" if kind == "float" else "bytes", 50, 12, rng)
    x = x.astype(dtype) if kind == "float" else x.reshape(50, 3, 4) if kind == "images" else x
    y = rng.integers(0, max(outputs, 2), size=50)
    if model.output == "identity":
        y = rng.normal(size=(50, outputs)).astype(dtype)
    methods = ["predict", "features"] + ["predict_proba"] * (model.output != "identity")
    bound = {"float32": 1e-5, "float64": 1e-13}[str(dtype)]
    with gemmlet.use_backend("numpy"):
        expected = {method: getattr(model, method)(x) for method in methods}
        scores = model.evaluate(x, y)

    there, labels = to_gpu(x), to_gpu(y)
    parameters = sum(p.nbytes for p in model.parameters)
    with monkeypatch.context() as patch:
        moved = Moved(BACKEND._first, patch)
        results = {method: getattr(model, method)(there) for method in methods}
        up = sum(moved.up) - len(methods) * parameters
        assert up == (expected["predict"].nbytes if model.output != "identity" else 0)
        # Only what classes are found by comes back.
        assert sum(moved.down) == (50 * outputs * dtype.itemsize if model.output != "identity" else 0)
    for method, wanted in expected.items():
        assert type(results[method]) is type(there)
        assert (results[method].shape, results[method].dtype) == (wanted.shape, wanted.dtype)
        assert_within(to_cpu(results[method]), wanted, bound)
    for found in (model.evaluate(there, labels), model.evaluate(there, y)):
        assert found["loss"] == pytest.approx(scores["loss"], rel=bound)
        assert found["accuracy"] == pytest.approx(scores["accuracy"], nan_ok=True)

    # Samples that are on the CPU go there as they are, and come back from the last layer.
    with gemmlet.use_backend(BACKEND), monkeypatch.context() as patch:
        moved = Moved(BACKEND._first, patch)
        brought = {method: getattr(model, method)(x) for method in methods}
        assert sum(moved.up) == len(methods) * (parameters + x.nbytes)
        # Of one sigmoid output both probabilities come back.
        assert len(moved.down) == 4 * (len(methods) + (model.output == "sigmoid" and model.layers[-1] == 1))
        assert model.evaluate(x, y) == pytest.approx(model.evaluate(there, labels), rel=0, abs=0, nan_ok=True)
    for method, result in brought.items():
        assert type(result) is np.ndarray
        assert same_bits(result, to_cpu(results[method]))


def test_predictions_of_no_samples(dtype: Any) -> None:
    model = nn.MLP([12, 9, 3], dtype=dtype)
    nothing = to_gpu(np.zeros((0, 12), dtype))
    assert model.predict(nothing).shape == (0,)
    assert model.predict_proba(nothing).shape == (0, 3)


def test_predictions_of_sparse_matrices(rng: Any) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    model = nn.MLP([12, 9, 3])
    x = rng.uniform(size=(50, 12)).astype(np.float32) * (rng.uniform(size=(50, 12)) < 0.3)
    with gemmlet.use_backend(BACKEND):
        assert same_bits(model.predict_proba(sparse.csr_array(x)), model.predict_proba(x))


def test_every_byte_is_a_255th_of_its_value(dtype: Any) -> None:
    """With the bits of the CPU's division."""
    model = nn.MLP([16, 16], "tanh", "identity", dtype=dtype)
    model.parameters[0][...] = np.eye(16)
    x = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert same_bits(to_cpu(model.predict(to_gpu(x))), x.astype(dtype) / dtype.type(255))


@pytest.mark.parametrize("output", ["tanh", "sigmoid"])
def test_samples_of_noise_that_is_on_a_gpu(output: str, dtype: Any, rng: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(nn.gan, "CHUNK", 16)
    gan = nn.GAN(4, [8, 12], [8, 1], generator_output=output, dtype=dtype)
    noise = gan.noise(50, seed=1)
    expected = gan.sample(z=noise)
    assert 0 <= expected.min() < expected.max() <= 1
    there = gan.sample(z=to_gpu(noise))
    assert_within(to_cpu(there), expected, {"float32": 1e-6, "float64": 1e-14}[str(dtype)])
    with gemmlet.use_backend(BACKEND):
        assert same_bits(gan.sample(50, z=noise), to_cpu(there))
    x = rng.uniform(size=(50, 12)).astype(dtype)
    for gradients, data in (
        (gan.discriminator_loss_and_gradients, (x, noise)),
        (gan.generator_loss_and_gradients, (noise,)),
    ):
        found, wanted = gradients(*map(to_gpu, data)), gradients(*data)
        assert found[0] == wanted[0]
        assert all(map(same_bits, found[1], wanted[1]))


@pytest.mark.parametrize("bad", [1.5, -0.25, math.nan])
def test_samples_of_a_gan_out_of_range(bad: float, dtype: Any, rng: Any) -> None:
    x = rng.uniform(size=(50, 12)).astype(dtype)
    x[20, 3] = bad
    message = "x must be finite, got nan in row 20" if math.isnan(bad) else rf"x must lie .*, but x\[20, 3\] is {bad}"
    with pytest.raises(ValueError, match=message):
        nn.GAN(4, [8, 12], [8, 1], dtype=dtype).fit(to_gpu(x))


# Images.

AUGMENTED = {"rotate": 12, "scale": 0.12, "shear": 0.12, "shift": 1, "elastic": 1.2, "noise": 9, "erase": 0.4}


@pytest.mark.parametrize("sides", [(28, 28), (5, 61), (110, 90)], ids=str)
def test_images_are_augmented_where_they_are(sides: tuple[int, int], rng: Any) -> None:
    """Also of a size that is not staged in shared memory."""
    images, numbers = rng.integers(0, 256, (5, *sides), np.uint8), rng.integers(0, 2**40, 5)

    def augmented(images: Any, indices: Any = numbers, **more: Any) -> Any:
        return augment(images, **AUGMENTED, seed=2**64 - 2, epoch=3, indices=indices, **more)

    expected = augmented(images)
    for layout in LAYOUTS:
        there = on_gpu({"images": images}, layout)["images"]
        result = augmented(there)
        assert type(result) is type(there)
        assert np.array_equal(to_cpu(result), expected)
        assert np.array_equal(to_cpu(there), images)
        assert np.array_equal(to_cpu(augmented(there, to_gpu(numbers), out=result)), expected)
        assert augmented(there, out=there) is there
        assert np.array_equal(to_cpu(there), expected)
    # Part of it is where the images are.
    memory = to_gpu(np.concatenate([images, images]))
    augmented(memory[:5], out=memory[2:7])
    assert np.array_equal(to_cpu(memory[2:7]), expected)
    # As `Backend.augment` takes rows, from either side.
    settings, draw = nn.Augment(**AUGMENTED).settings, Draw(2**64 - 2, 3, numbers[:3])
    rows, out = np.array([4, 0, 4]), to_gpu(np.zeros((3, *sides), np.uint8))
    for given in (rows, to_gpu(rows)):
        BACKEND.augment(to_gpu(images), settings, draw, out, given)
        assert np.array_equal(to_cpu(out), augmented(images[rows], numbers[:3]))


def test_images_in_different_places() -> None:
    images = np.zeros((2, 5, 7), np.uint8)
    with pytest.raises(TypeError, match=r"^indices are on GPU 0, images on the CPU"):
        augment(images, indices=to_gpu(np.arange(2)))
    with pytest.raises(ValueError, match=r"^out is on the CPU, the other arguments on GPU 0"):
        augment(to_gpu(images), out=images)
    with pytest.raises(ValueError, match=r"^indices must be from 0 to .*, got -1 to 1"):
        augment(to_gpu(images), indices=to_gpu(np.array([-1, 1])))
    assert augment(to_gpu(images[:0]), rotate=3).shape == (0, 5, 7)


@pytest.mark.skipif(IS_GPU, reason="there is a GPU")
def test_without_a_gpu_the_choice_says_so() -> None:
    from gemmlet.backends.cuda.backend import CudaBackend

    with pytest.raises(RuntimeError, match=r"^backend 'cuda' finds no usable GPU or driver: "):
        CudaBackend()


@pytest.mark.skipif(not IS_GPU, reason="no GPU")
def test_a_torch_tensor_in_and_out_without_a_copy(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.normal(size=(33, 65)), device="cuda", dtype=torch.float32)
    out = torch.empty_like(x)
    kernels.tanh(x, out=out)
    assert torch.allclose(out, torch.tanh(x), atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        y = torch.from_dlpack(kernels.relu(x.to(dtype)))
        assert torch.equal(y, torch.relu(x.to(dtype)))
    with pytest.raises(TypeError, match="x"):
        kernels.tanh(x.requires_grad_())


@pytest.mark.skipif(not IS_GPU, reason="no GPU")
def test_the_current_stream_is_used(rng: Any) -> None:
    """A graph holds what was launched on the stream that is recorded, and nothing else."""
    import cupy

    x = to_gpu(rng.normal(size=1000).astype(np.float32))
    out = cupy.zeros_like(x)
    kernels.tanh(x, out=out)  # compiles
    out[...] = 0
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        kernels.tanh(x, out=out)
        graph = stream.end_capture()
        stream.synchronize()
        assert not out.any()
        graph.launch(stream)
        stream.synchronize()
    assert cupy.allclose(out, cupy.tanh(x))


def test_tensor_cores_take_float32_when_they_are_asked_to(rng: np.random.Generator) -> None:
    assert gemmlet.get_float32_matmul_precision() == "highest"
    a, b = rng.normal(size=(40, 64)).astype(np.float32), rng.normal(size=(64, 24)).astype(np.float32)
    exact, bound = f64(a) @ f64(b), np.abs(f64(a)) @ np.abs(f64(b))
    errors = {}
    try:
        for precision in ("high", "highest"):
            gemmlet.set_float32_matmul_precision(precision)
            assert BACKEND.describe()["float32 matmuls"] == precision
            errors[precision] = np.max(np.abs(to_cpu(kernels.matmul(to_gpu(a), to_gpu(b))) - exact) / bound)
    finally:
        gemmlet.set_float32_matmul_precision("highest")
    assert 2.0**-16 < errors["high"] < 1.1 * 2.0**-10
    assert errors["highest"] < 64 * 2.0**-23 / 4
    with pytest.raises(ValueError, match=r"precision must be one of highest, high, got 'medium'"):
        gemmlet.set_float32_matmul_precision("medium")
