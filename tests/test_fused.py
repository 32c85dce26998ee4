"""Fused training: whole mini-batches in one call give what single steps with the public kernels give.

Also: the same bits for any number of threads and whether zeros are skipped or not, sparse matrices, callbacks, Ctrl-C.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemmlet
from cuda_on_host.backend import skip_long
from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.nn import GAN, MLP, SGD, Adam, AdamW, DivergedError, StopTraining, dataset, fit, linear_decay
from gemmlet.training import reference
from gemmlet.training.plan import (
    SAMPLES,
    Activation,
    Backward,
    Dataset,
    Forward,
    Gather,
    Linear,
    Loss,
    Parameter,
    TrainingPlan,
    Update,
)
from support import assert_within, run_on, same_bits, stop_after

# Of float64 and float32 weights after dozens of steps, relative to the largest: rounding, as training carries it on.
BOUNDS = {"float64": 1e-10, "float32": 1e-4}
RULES: dict[str, Callable[[], Any]] = {
    "sgd": lambda: SGD(0.05),
    "sgd, weight decay": lambda: SGD(0.05, weight_decay=0.1),
    "momentum": lambda: SGD(0.02, momentum=0.8),
    "nesterov": lambda: SGD(0.02, momentum=0.8, nesterov=True, weight_decay=0.05),
    "adam": lambda: Adam(3e-3, eps=1e-4),
    "adam, weight decay": lambda: Adam(3e-3, 0.7, 0.95, eps=1e-3, weight_decay=0.1),
    "adamw": lambda: AdamW(3e-3, eps=1e-4, weight_decay=0.3),
    "adamw, biases too": lambda: AdamW(3e-3, eps=1e-4, weight_decay=0.3, decay_biases=True),
    "momentum, clipped": lambda: SGD(0.02, momentum=0.8, weight_decay=0.05, clip_value=0.01),
}


def fuses(backend: Any, activation: str = "relu") -> bool:
    """Whether it has an executor of its own for networks with this activation."""
    zeros = np.zeros((1, 1), np.float32)
    network = (Linear(Parameter(zeros), Parameter(zeros[0])), Activation(activation, 0.0))
    phases = Gather(Dataset(zeros)), Forward(0, (SAMPLES,)), Loss(0, "mean_squared_error", zeros), Backward(0)
    return bool(backend.supports_fused(TrainingPlan((network,), (*phases, Update(0, "sgd")))))


@pytest.fixture
def fusing(any_threads_backend: Any) -> Any:
    if not fuses(any_threads_backend):
        pytest.skip("it has no executor of its own")
    skip_long(any_threads_backend)  # test_cuda_training.py has some of it
    return any_threads_backend


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Within, `fit` trains with the reference executor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(select.current()), "supports_fused", lambda backend, plan: False)
        yield


@contextlib.contextmanager
def calls_of(owner: Any, name: str) -> Iterator[list[tuple[float, float]]]:
    """The calls of a function of a backend or a module: when each began and ended."""
    times: list[tuple[float, float]] = []
    function = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        times.append((start, time.perf_counter()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, timed)
        yield times


def set_threads(backend: Any, count: int) -> None:
    gemmlet.set_num_threads(count)
    backend.set_num_threads(count)


def mlp_problem(layers: list[int], output: str, n: int, dtype: Any, zeros: float = 0.0) -> tuple[Any, Any]:
    """Inputs of which a share is 0, and what they belong to."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, layers[0])).astype(dtype)
    x[rng.uniform(size=x.shape) < zeros] = 0
    if output == "identity":
        return x, rng.normal(size=(n, layers[-1])).astype(dtype)
    return x, rng.integers(0, max(layers[-1], 2), size=n)


def weights_of(network: MLP | GAN) -> list[Any]:
    if isinstance(network, MLP):
        return network.parameters
    return [*network.generator_parameters, *network.discriminator_parameters, *network._average.parameters]


def fitted(network: Any, *data: Any, **arguments: Any) -> list[Any]:
    """What `fit` leaves behind: all weights, then what the history says."""
    history = vars(network.fit(*data, **arguments))
    return [*weights_of(network), *(np.array(v) for k, v in sorted(history.items()) if isinstance(v, list))]


def same(results: list[Any], expected: list[Any]) -> bool:
    return len(results) == len(expected) and all(map(same_bits, results, expected))


def assert_same_sums(backend: Any, results: list[Any], expected: list[Any], dtype: Any) -> None:
    """To skip zeros leaves the sums as they are where a backend's own matmuls sum first to last."""
    if backend.name == "cpu":
        assert same(results, expected)
    else:
        assert_close(results, expected, dtype)


def assert_close(results: list[Any], expected: list[Any], dtype: Any) -> None:
    assert len(results) == len(expected)
    weights = [array for array in expected if array.ndim == 2]
    assert all(np.isfinite(w).all() for w in weights)
    scale = max(np.abs(w).max() for w in weights)
    for result, wanted in zip(results, expected, strict=True):
        assert_within(result, wanted, BOUNDS[str(np.dtype(dtype))] * max(scale, 1.0))


def check(make: Callable[[], Any], backend: Any, dtype: Any, *data: Any, **arguments: Any) -> None:
    """The fused `fit` of a network and optimizer(s), single steps, and single steps with NumPy agree."""

    def run() -> list[Any]:
        called = {k: v() if callable(v) else v for k, v in arguments.items()}
        return fitted(make(), *data, **called)

    with calls_of(reference, "train") as calls:
        result = run()
    assert not calls
    with calls_of(reference, "train") as calls, one_by_one():
        assert_close(result, run(), dtype)
    assert calls
    with gemmlet.use_backend("numpy"):
        assert_close(result, run(), dtype)


def check_mlp(
    layers: list[int],
    backend: Any,
    dtype: Any,
    *,
    activation: str = "tanh",
    output: str = "softmax",
    rule: str = "adam",
    n: int = 49,
    batch: int = 16,
    epochs: int = 8,
    zeros: float = 0.0,
) -> None:
    x, y = mlp_problem(layers, output, n, dtype, zeros)
    check(
        lambda: MLP(layers, activation, output, dtype=dtype, seed=3),
        backend,
        dtype,
        x,
        y,
        optimizer=RULES[rule],
        batch_size=batch,
        epochs=epochs,
    )


# The same weights as single steps.


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, fusing: Any, dtype: Any) -> None:
    if not fuses(fusing, activation):
        pytest.skip("Numba has no scalar kernel of it, so that the reference trains")
    layers = [9, 4, 3] if activation == "exp" else [9, 17, 8, 3]  # exp of exp soon overflows
    check_mlp(layers, fusing, dtype, activation=activation, rule="adam", epochs=12)


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_parameters_of_activations(activation: str, fusing: Any, dtype: Any) -> None:
    x, y = mlp_problem([9, 17, 3], "softmax", 49, dtype)

    def make() -> MLP:
        return MLP([9, 17, 3], activation, dtype=dtype, activation_parameter=0.4)

    check(make, fusing, dtype, x, y, batch_size=16, epochs=5, optimizer=RULES["sgd"])


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize("width", [1, 2, 7, 10])
def test_every_output(output: str, width: int, fusing: Any, dtype: Any) -> None:
    width += output == "softmax"
    for layers in ([5, width], [5, 16, width]):
        check_mlp(layers, fusing, dtype, output=output, rule="sgd", n=20, batch=7, epochs=10)


@pytest.mark.parametrize("rule", RULES)
def test_every_optimizer(rule: str, fusing: Any, dtype: Any) -> None:
    """Also where many inputs are 0, so that some weights have no gradient."""
    for zeros, batch in itertools.product((0.0, 0.9), (1, 16)):
        check_mlp([33, 17, 3], fusing, dtype, rule=rule, zeros=zeros, n=41, batch=batch, epochs=3 if batch == 1 else 20)


@pytest.mark.parametrize("depth", range(1, 6))
def test_every_depth(depth: int, fusing: Any, dtype: Any) -> None:
    check_mlp([10, *(12, 31, 9, 16)[: depth - 1], 3], fusing, dtype, epochs=10)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 600])
def test_awkward_widths(width: int, fusing: Any, dtype: Any) -> None:
    """As inputs, hidden units and outputs; rows of 600 weights are packed before they are used."""
    check_mlp([width, width, max(width, 2)], fusing, dtype, rule="momentum", epochs=3)


@pytest.mark.parametrize("batch", [1, 2, 7, 15, 16, 17, 48, 49, 64, 300, 1000, 2**63 - 1, 10**30])
def test_any_batch_size(batch: int, fusing: Any, dtype: Any) -> None:
    """Last mini-batches that are smaller, and mini-batches of more than there is."""
    check_mlp([10, 33, 5], fusing, dtype, rule="momentum", n=301 if batch > 7 else 30, batch=batch, epochs=3)


@hypothesis.settings(max_examples=20)
@given(data=st.data())
def test_any_configuration(data: Any, fusing: Any) -> None:
    width = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65])
    output = data.draw(st.sampled_from(["softmax", "sigmoid", "identity"]))
    layers = data.draw(st.lists(width, min_size=2, max_size=5))
    if output == "softmax":
        layers[-1] += 1
    set_threads(fusing, data.draw(st.integers(1, 3)))
    check_mlp(
        layers,
        fusing,
        np.dtype(data.draw(st.sampled_from(["float32", "float64"]))),
        # Smooth ones: at a kink rounding may decide for either side.
        activation=data.draw(st.sampled_from(["tanh", "sigmoid", "silu", "gelu", "softplus"])),
        output=output,
        rule=data.draw(st.sampled_from(sorted(RULES))),
        n=data.draw(st.integers(1, 70)),
        batch=data.draw(st.integers(1, 80)),
        epochs=2,
        zeros=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
    )


def test_many_epochs_of_few_samples(fusing: Any, dtype: Any) -> None:
    """Calls that are short, however many steps they might take."""
    x, y = mlp_problem([2, 2], "softmax", 4, dtype)
    history = MLP([2, 2], dtype=dtype).fit(x, y, 700, 2, "sgd")
    assert history.loss[-1] < history.loss[0]
    assert len(GAN(1, [2], [1], dtype=dtype).fit(np.eye(4, 2, dtype=dtype), 700, 2).generator_loss) == 700


GANS: dict[str, dict[str, Any]] = {
    "plain": {"ema_decay": 0.0, "label_smoothing": 0.0},
    "averaged": {"ema_decay": 0.9},
    "minimax": {"loss": "minimax", "ema_decay": 0.9, "label_smoothing": 0.2},
    "sigmoid": {"generator_output": "sigmoid", "ema_decay": 0.99},
    "sigmoid minimax": {"generator_output": "sigmoid", "loss": "minimax", "ema_decay": 0.0},
    "deep": {"generator": [17, 5, 33], "discriminator": [9, 16, 1], "generator_activation": "silu"},
    "shallow": {"generator": [33], "discriminator": [1]},
}


def small_gan(variant: str, dtype: Any) -> GAN:
    settings = {
        "generator": [20, 33],
        "discriminator": [24, 1],
        "generator_activation": "tanh",
        "discriminator_activation": "gelu",
    }
    return GAN(7, dtype=dtype, seed=1, **{**settings, **GANS[variant]})


@pytest.mark.parametrize("variant", GANS)
@pytest.mark.parametrize("images", [False, True], ids=["float", "uint8"])
def test_gan(variant: str, images: bool, fusing: Any, dtype: Any, rng: Any) -> None:
    x = rng.integers(0, 256, (60, 33), np.uint8) if images else rng.uniform(size=(60, 33)).astype(dtype)
    for batch in (1, 16, 25, 100):
        check(
            lambda: small_gan(variant, dtype),
            fusing,
            dtype,
            x[:20] if batch == 1 else x,
            batch_size=batch,
            epochs=1 if batch == 1 else 6,
            optimizer=RULES["adam"],
        )


@pytest.mark.parametrize("hidden", [(), (21,), (530, 470)], ids=["no hidden layer", "one", "layer by layer"])
def test_gan_of_classes(hidden: tuple[int, ...], fusing: Any, dtype: Any, rng: Any) -> None:
    x, y = rng.integers(0, 256, (60, 33), np.uint8), rng.integers(0, 4, 60)
    smooth = {"generator_activation": "tanh", "discriminator_activation": "gelu", "ema_decay": 0.9}
    for batch, rule in ((1, "sgd"), (25, "adam"), (100, "nesterov")):
        few = slice(6 if batch == 1 else 60)
        check(
            lambda: GAN(7, [*hidden, 33], [*hidden[::-1], 1], n_classes=5, dtype=dtype, seed=1, **smooth),
            fusing,
            dtype,
            x[few],
            y=y[few],
            batch_size=batch,
            epochs=2,
            optimizer=RULES[rule],
        )


def test_gan_with_an_optimizer_for_each(fusing: Any, dtype: Any, rng: Any) -> None:
    x = rng.uniform(size=(60, 33)).astype(dtype)
    for first, second in itertools.permutations(["sgd", "nesterov", "adamw"], 2):
        check(
            lambda: small_gan("averaged", dtype),
            fusing,
            dtype,
            x,
            batch_size=16,
            epochs=3,
            optimizer=RULES[first],
            discriminator_optimizer=RULES[second],
        )


# The same bits for any number of threads.


@pytest.mark.parametrize("zeros", [0.0, 0.9], ids=["dense", "sparse"])
@pytest.mark.parametrize("width", [9, 40, 300, 512, 1200])
def test_same_bits_for_any_number_of_threads(width: int, zeros: float, fusing: Any, dtype: Any) -> None:
    """Widths with which each thread has columns of the first layer, with too few, and trained layer by layer."""
    layers = [100, width, 130, 3]
    x, y = mlp_problem(layers, "softmax", 150, dtype, zeros)
    for batch, rule in ((60, "momentum"), (1, "sgd")):
        expected: list[Any] = []
        for threads in (1, 2, 3, 2):
            set_threads(fusing, threads)
            some = slice(30 if batch == 1 else None)
            arguments = {"batch_size": batch, "epochs": 2, "optimizer": RULES[rule]()}
            result = fitted(MLP(layers, dtype=dtype), x[some], y[some], **arguments)
            expected = expected or result
            assert same(result, expected), (threads, batch)


@pytest.mark.parametrize("kind", ["dense", "sparse", "bytes"])
def test_same_bits_over_many_steps(kind: str, fusing: Any, dtype: Any) -> None:
    """Calls so long that a thread has the columns it works on in memory of its own, with states; and short ones."""
    x, y = mlp_problem([100, 3], "softmax", 800, dtype, 0.0 if kind == "dense" else 0.9)
    if kind == "bytes":
        x = np.clip(np.abs(x) * 100, 0, 255).astype(np.uint8)

    def run(threads: int, rule: str, callback: Any = None) -> list[Any]:
        set_threads(fusing, threads)
        arguments = {"batch_size": 60, "epochs": 3, "optimizer": RULES[rule](), "callback": callback}
        return fitted(MLP([100, 512, 3], dtype=dtype), x, y, **arguments)

    for rule in ("sgd", "momentum", "adam"):
        expected = run(1, rule)
        for threads in (2, 3, 5):
            assert same(run(threads, rule), expected), (rule, threads)
        assert same(run(2, rule, lambda progress: None), expected), rule


@pytest.mark.parametrize(
    ("n_classes", "width", "penalty"), [(0, 130, 0.0), (10, 130, 0.0), (10, 700, 0.0), (0, 130, 2.0), (10, 700, 2.0)]
)
def test_gan_same_bits_for_any_number_of_threads(
    n_classes: int, width: int, penalty: float, fusing: Any, dtype: Any, rng: Any
) -> None:
    if penalty and fusing.name == "numba":
        pytest.skip("the reference computes gradient penalties")
    x, y = rng.uniform(size=(130, 200)).astype(dtype), rng.integers(0, n_classes, 130) if n_classes else None
    expected: list[Any] = []
    for threads in (1, 2, 3, 2):
        set_threads(fusing, threads)
        gan = GAN(20, [width, 200], [width, 140, 1], n_classes=n_classes, gradient_penalty=penalty, dtype=dtype)
        result = fitted(gan, x, epochs=2, batch_size=50, y=y)
        expected = expected or result
        assert same(result, expected), threads


# Zeros.


def with_zeros(kind: str, rng: Any, n: int, features: int, dtype: Any) -> Any:
    x = rng.uniform(0.01, 1, size=(n, features))
    if kind != "none":
        x[rng.uniform(size=x.shape) < 0.6] = 0
    if kind == "rows":
        x[::3] = 0
    if kind == "columns":
        x[:, ::3] = 0
    if kind == "all":
        x[:] = 0
    return np.ceil(x * 255).astype(np.uint8) if dtype == np.uint8 else x.astype(dtype)


@pytest.mark.parametrize("kind", ["none", "some", "rows", "columns", "all"])
@pytest.mark.parametrize("features", [1, 63, 64, 65, 129])
def test_skipping_zeros_changes_no_bit(
    features: int, kind: str, fusing: Any, dtype: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of the first layer that are fewer than a vector, and more; optimizers that are idle without gradient."""
    y = rng.integers(0, 2, size=35)
    for given_dtype, width, rule in itertools.product((dtype, np.uint8), (1, 3, 33), ("sgd", "adam")):
        x = with_zeros(kind, rng, 35, features, given_dtype)
        for batch in (1, 16):
            results = []
            for below in (0, 2):
                monkeypatch.setattr(dataset, "SPARSE_BELOW", below)
                arguments = {"batch_size": batch, "epochs": 2, "optimizer": RULES[rule]()}
                results.append(fitted(MLP([features, width, 2], dtype=dtype), x, y, **arguments))
            assert_same_sums(fusing, *results, dtype)


@pytest.mark.parametrize("batch", [63, 64, 65, 150, 400])
def test_skipping_zeros_in_long_mini_batches(
    batch: int, fusing: Any, dtype: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bytes, 64 rows are looked at together; the last mini-batch is shorter."""
    x, y = with_zeros("some", rng, 333, 70, np.uint8), rng.integers(0, 2, size=333)
    results = []
    for below in (0, 2):
        monkeypatch.setattr(dataset, "SPARSE_BELOW", below)
        results.append(
            fitted(MLP([70, 33, 2], dtype=dtype), x, y, batch_size=batch, epochs=2, optimizer=RULES["sgd"]())
        )
    assert_same_sums(fusing, *results, dtype)


def test_skipping_zeros_for_any_number_of_columns(
    fusing: Any, dtype: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one to eight vectors, the last of which is whole or not, of all columns and of a thread's."""
    if fusing.name != "cpu":
        pytest.skip("blocks of vectors are those of the C++ modules")
    x, y = with_zeros("some", rng, 300, 150, dtype), rng.integers(0, 2, size=300)
    for width in (1, 5, 8, 10, 24, 36, 50, 72, 88, 104, 128):
        results = []
        for below, threads in ((0, 1), (2, 1), (2, 2)):
            set_threads(fusing, threads)
            monkeypatch.setattr(dataset, "SPARSE_BELOW", below)
            model = MLP([150, width, 2], dtype=dtype)
            results.append(fitted(model, x, y, batch_size=30, epochs=1, optimizer=RULES["adam"]()))
        assert same(results[1], results[0])
        assert same(results[2], results[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float", "uint8", "csr"])
def test_zeros_hide_no_weight(
    kind: str, bad: float, training: Any, dtype: Any, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is not finite makes NaN of a zero, in the very next batch. A callback may have set it."""
    monkeypatch.setattr(fit, "_next_copy", lambda started: math.inf)  # before one, parameters are looked at
    x = np.zeros((64, 20), np.uint8 if kind == "uint8" else dtype)
    x[:, :4] = rng.integers(0, 2, (64, 4))
    given = pytest.importorskip("scipy.sparse").csr_matrix(x) if kind == "csr" else x
    y = rng.integers(0, 2, 64)
    for every, at, batches in (
        ("batch", (1, 2), "1, batch 3 of 8:"),
        ("epoch", (1, 8), "2, batch(es 1 to [1-8]| 1) of 8:"),
    ):
        model, losses = MLP([20, 8, 2], dtype=dtype), list[float]()

        def spoil(progress: Any, model: Any = model, losses: Any = losses, at: tuple[int, int] = at) -> None:
            losses.append(progress.loss)
            if (progress.epoch, progress.batch) == at:
                model.parameters[0][10] = bad

        with pytest.raises(DivergedError, match=f"in epoch {batches} the loss is no longer finite"):
            model.fit(given, y, 2, 8, callback=spoil, callback_every=every)
        assert np.isfinite(losses).tolist() == [True] * (2 if every == "batch" else 1)
        model.parameters[0][10] = bad
        assert not np.isfinite(model.loss_and_gradients(given, y)[0])
        with pytest.raises(ValueError, match="the network has parameters that are not finite"):
            model.fit(given, y, 1, 8)


def test_zeros_are_skipped_where_there_are_many(fusing: Any, rng: Any) -> None:
    """What decides it; the tests above set it."""
    for share, skipped in ((0.1, True), (0.9, False)):
        x = (rng.uniform(size=(50, 40)) < share).astype(np.float32)
        given = dataset.Samples(x, 40, np.dtype(np.float32)).dataset(may_skip_zeros=True)
        assert given.skip_zeros is skipped


# Sparse matrices.


def sparse_forms(dense: Any) -> dict[str, Any]:
    """The same numbers in all forms that scipy knows, tidy and untidy."""
    sparse = pytest.importorskip("scipy.sparse")
    csr = sparse.csr_matrix(dense)
    forms = {"csr": csr, "csc": csr.tocsc(), "coo": csr.tocoo(), "lil": csr.tolil(), "array": sparse.csr_array(dense)}

    unsorted = csr.copy()
    for row in range(csr.shape[0]):
        entries = slice(csr.indptr[row], csr.indptr[row + 1])
        unsorted.indices[entries] = csr.indices[entries][::-1]
        unsorted.data[entries] = csr.data[entries][::-1]
    forms["unsorted"] = sparse.csr_matrix((unsorted.data, unsorted.indices, unsorted.indptr), csr.shape)

    wide = sparse.csr_matrix(dense)
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    forms["int64"] = wide

    coo = csr.tocoo()
    rows, columns = np.concatenate([coo.row, [0, 1]]), np.concatenate([coo.col, [0, 1]])
    forms["explicit zeros"] = sparse.csr_matrix(
        (np.concatenate([coo.data, np.zeros(2, dense.dtype)]), (rows, columns)), csr.shape
    )
    half = (coo.data // 2) if dense.dtype == np.uint8 else coo.data / 2
    parts = np.concatenate([half, coo.data - half])
    forms["duplicates"] = sparse.coo_matrix(
        (parts, (np.concatenate([coo.row] * 2), np.concatenate([coo.col] * 2))), csr.shape
    )
    by_row = np.argsort(np.concatenate([coo.row] * 2), kind="stable")
    forms["duplicates by rows"] = sparse.csr_matrix(
        (parts[by_row], np.concatenate([coo.col] * 2)[by_row], 2 * csr.indptr), csr.shape
    )
    return forms


def memory_of(matrix: Any) -> list[bytes]:
    return [value.tobytes() for _, value in sorted(vars(matrix).items()) if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("images", [False, True], ids=["float", "uint8"])
def test_sparse_matrices(images: bool, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """All that takes samples takes them, and gives what it gives for the dense array; they are not changed."""
    dense = with_zeros("rows", rng, 40, 70, np.uint8 if images else dtype)
    y = rng.integers(0, 3, size=40)
    arguments = {"batch_size": 16, "epochs": 2, "optimizer": "adam"}
    model = MLP([70, 20, 3], dtype=dtype)
    expected = fitted(model, dense, y, validation_data=(dense[:9], y[:9]), **arguments)
    # Of dense arrays a GPU's cluster takes images, and rounds otherwise.
    in_cluster = any_threads_backend.name == "cuda" and images and dtype == np.float32
    for name, x in sparse_forms(dense).items():
        before, other = memory_of(x), MLP([70, 20, 3], dtype=dtype)
        assert (x.toarray() == dense).all(), name
        result = fitted(other, x, y, validation_data=(x.tocsr()[:9], y[:9]), **arguments)
        if fuses(any_threads_backend) and not in_cluster:
            assert same(result, expected), name
        else:
            assert_close(result, expected, dtype)
        assert same_bits(model.predict(dense), model.predict(x)), name
        assert same_bits(model.predict_proba(dense), model.predict_proba(x)), name
        assert same_bits(model.features(dense), model.features(x)), name
        assert model.evaluate(x, y) == model.evaluate(dense, y), name
        assert model.loss_and_gradients(x, y)[0] == model.loss_and_gradients(dense, y)[0], name
        assert memory_of(x) == before, name


def test_bad_sparse_matrices(any_threads_backend: Any, dtype: Any) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    model, y = MLP([5, 2], dtype=dtype), [0, 1, 0, 1, 1]
    before = [w.copy() for w in model.parameters]
    for wrong in ("complex64", "complex128"):
        with pytest.raises(TypeError, match=rf"\bx\b.*{wrong}.*real numbers"):
            model.fit(sparse.csr_matrix(np.eye(5)).astype(wrong), y)
        with pytest.raises(TypeError, match=rf"\bx\b.*{wrong}.*real numbers"):
            model.predict(sparse.csc_matrix(np.eye(5)).astype(wrong))
    with pytest.raises(ValueError, match=r"\bx\b.*\(5, 6\)"):
        model.fit(sparse.eye(5, 6, dtype=dtype, format="csr"), y)
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        cube = sparse.coo_array(np.ones((5, 5, 1), dtype))  # since SciPy 1.15
    if "cube" in locals():
        with pytest.raises(ValueError, match=r"x has shape \(5, 5, 1\), expected \(n, 5\)"):
            model.fit(cube, y)
    with pytest.raises(ValueError, match=r"\bx\b.*empty"):
        model.fit(sparse.csr_matrix((0, 5), dtype=dtype), y)
    with pytest.raises(TypeError, match=r"validation_data\[0\]"):
        model.fit(np.eye(5, dtype=dtype), y, validation_data=(sparse.eye(5, dtype=complex), y))
    with pytest.raises(TypeError, match=r"\bx\b.*sparse"):
        GAN(2, [5], [1], dtype=dtype).fit(sparse.eye(5, dtype=dtype, format="csr"))
    assert same(model.parameters, before)


@pytest.mark.parametrize("given", ["float32", "float64", "int64", "bool"])
def test_sparse_matrices_are_converted(given: str, any_threads_backend: Any, dtype: Any) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    x, y = sparse.csr_matrix(np.eye(5)).astype(given), [0, 1, 0, 1, 1]
    results = []
    for numbers in (x, x.astype(dtype)):
        model = MLP([5, 2], dtype=dtype)
        held_out = numbers.tocsc(), y
        results.append([*fitted(model, numbers, y, 2, validation_data=held_out), model.predict_proba(held_out[0])])
    assert same(*results)


# Callbacks.


def test_a_callback_sees_every_step(training: Any, dtype: Any) -> None:
    """Its numbers and the weights at each step are those of single steps; that it is there changes no bit."""
    layers = [6, 16, 3]
    x, y = mlp_problem(layers, "softmax", 70, dtype)

    def seen() -> tuple[list[Any], list[list[Any]]]:
        model, progress, weights = MLP(layers, dtype=dtype), [], []

        def callback(p: Any) -> None:
            progress.append(p)
            weights.append([w.copy() for w in model.parameters])

        model.fit(x, y, 3, 16, RULES["adam"](), validation_data=(x[:5], y[:5]), callback=callback)
        return progress, weights

    progress, weights = seen()
    with one_by_one():
        expected_progress, expected_weights = seen()
    steps = [(p.epoch, p.epochs, p.batch, p.batches, p.epoch_done) for p in progress]
    assert steps == [(e, 3, b, 5, b == 5) for e in range(1, 4) for b in range(1, 6)]
    for p, wanted, arrays, wanted_arrays in zip(progress, expected_progress, weights, expected_weights, strict=True):
        assert p.loss == pytest.approx(wanted.loss, rel=BOUNDS[str(dtype)])
        assert p.accuracy == pytest.approx(wanted.accuracy, abs=1e-12)
        assert (p.validation_loss is None) == (wanted.validation_loss is None)
        assert_close(arrays, wanted_arrays, dtype)
    without = MLP(layers, dtype=dtype)
    history = without.fit(x, y, 3, 16, RULES["adam"](), validation_data=(x[:5], y[:5]))
    assert same(without.parameters, weights[-1])
    assert history.loss == [p.loss for p in progress if p.epoch_done]
    assert history.validation_loss == [p.validation_loss for p in progress if p.epoch_done]


def test_stop_training_after_so_many_steps(training: Any, dtype: Any, rng: Any) -> None:
    layers = [6, 16, 3]
    x, y = mlp_problem(layers, "softmax", 70, dtype)
    for steps in (1, 4, 5, 7):
        stopped, whole, rule = MLP(layers, dtype=dtype), MLP(layers, dtype=dtype), Adam()
        history = stopped.fit(x, y, 3, 16, rule, shuffle=False, callback=stop_after(steps))
        assert len(history.loss) == math.ceil(steps / 5)
        other = Adam()
        for step in range(steps):
            some = slice(step % 5 * 16, step % 5 * 16 + 16)
            whole.fit(x[some], y[some], 1, 16, other, shuffle=False)
        assert same(stopped.parameters, whole.parameters)
        assert {s.steps for s in rule._states.values()} == {steps}
    gan = small_gan("averaged", dtype)
    gan.fit(rng.uniform(size=(70, 33)).astype(dtype), 3, 16, callback=stop_after(7))
    assert gan.steps == 7


def test_learning_rates_that_change(training: Any, dtype: Any, rng: Any) -> None:
    x, y = mlp_problem([6, 16, 3], "softmax", 70, dtype)
    images = rng.uniform(size=(70, 33)).astype(dtype)

    def run() -> list[list[Any]]:
        rules = [SGD(0.1, momentum=0.5), Adam(0.01, eps=1e-4)]

        def jump(progress: Any) -> None:
            for rule in rules:
                rule.lr = 0.01 * progress.batch

        results = [
            fitted(MLP([6, 16, 3], dtype=dtype), x, y, epochs=3, batch_size=16, optimizer=rules[0], callback=jump),
            fitted(small_gan("averaged", dtype), images, epochs=3, batch_size=16, optimizer=rules[1], callback=jump),
        ]
        assert (rules[0].lr, rules[1].lr) == (0.05, 0.05)
        return results

    results = run()
    with one_by_one():
        expected = run()
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result, wanted, dtype)


@pytest.mark.parametrize("schedule", [linear_decay, lambda done: 0.5 if done < 0.4 else 0.0], ids=["linear", "steps"])
@pytest.mark.parametrize("rule", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_schedules(network: str, rule: str, schedule: Any, training: Any, dtype: Any, rng: Any) -> None:
    """In calls of many steps they give the weights of single steps, and of a rate that a callback sets at each step."""
    x, y = mlp_problem([6, 16, 3], "softmax", 70, dtype)
    images = rng.uniform(size=(70, 33)).astype(dtype)

    def run(**settings: Any) -> list[Any]:
        optimizer = RULES[rule]()
        if settings.pop("by_hand", False):
            first, steps = optimizer.lr, itertools.count(1)
            optimizer.lr = first * schedule(0.0)
            settings["callback"] = lambda p: setattr(optimizer, "lr", first * schedule(next(steps) / 15))
        else:
            settings["lr_schedule"] = schedule
        made: Any = MLP([6, 16, 3], dtype=dtype) if network == "mlp" else small_gan("averaged", dtype)
        data = (x, y) if network == "mlp" else (images,)
        rate = optimizer.lr
        result = fitted(made, *data, epochs=3, batch_size=16, optimizer=optimizer, **settings)
        if "lr_schedule" in settings:
            assert optimizer.lr == rate
        return result

    with calls_of(training, "train") as calls:
        result = run()
    if network == "mlp":
        assert not fuses(training) or 3 <= len(calls) < 15
    with one_by_one():
        assert_close(result, run(), dtype)
    assert_close(result, run(by_hand=True), dtype)


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_a_schedule_that_cannot_be(network: str, training: Any, dtype: Any, rng: Any) -> None:
    """What it returns is checked before the steps that it is for."""
    x, y = mlp_problem([33, 16, 3], "softmax", 70, dtype)
    data = (x, y) if network == "mlp" else (rng.uniform(size=(70, 33)).astype(dtype),)
    for value, error in ((-0.5, ValueError), (math.nan, ValueError), ("fast", TypeError)):
        made: Any = MLP([33, 16, 3], dtype=dtype) if network == "mlp" else small_gan("averaged", dtype)
        before = [w.copy() for w in weights_of(made)]
        with pytest.raises(error, match="what lr_schedule returns must be"):
            made.fit(*data, 3, 16, lr_schedule=lambda done, value=value: value)
        assert same(weights_of(made), before)
        with pytest.raises(TypeError, match="lr_schedule must be callable, got float"):
            made.fit(*data, 3, 16, lr_schedule=0.5)


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_when_a_callback_is_called(network: str, training: Any, dtype: Any, rng: Any) -> None:
    """After mini-batches, calls or epochs; the result is one."""
    x, y = mlp_problem([6, 16, 3], "softmax", 150, dtype)
    data = (x, y) if network == "mlp" else (rng.uniform(size=(150, 33)).astype(dtype),)
    results, told = [], {}
    for every in ("batch", "call", "epoch"):
        made: Any = MLP([6, 16, 3], dtype=dtype) if network == "mlp" else small_gan("averaged", dtype)
        steps = told[every] = []
        with calls_of(training, "train") as calls:
            arguments = {"epochs": 3, "batch_size": 16, "callback": steps.append, "callback_every": every}
            results.append(fitted(made, *data, **arguments))
        assert len(calls) in (0, len(steps)) or every == "epoch"
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    steps = {every: [(p.epoch, p.batch) for p in seen] for every, seen in told.items()}
    assert steps["batch"] == [(epoch, batch) for epoch in range(1, 4) for batch in range(1, 11)]
    assert steps["epoch"] == [(epoch, 10) for epoch in range(1, 4)]
    assert set(steps["epoch"]) < set(steps["call"]) <= set(steps["batch"])
    assert len(steps["call"]) == len(set(steps["call"]))
    # What they are told is the same, too.
    of_step = dict(zip(steps["batch"], told["batch"], strict=True))
    for every in ("call", "epoch"):
        assert [of_step[step] for step in steps[every]] == told[every]


def test_stop_training_after_a_call(training: Any, dtype: Any) -> None:
    x, y = mlp_problem([6, 16, 3], "softmax", 150, dtype)
    for every in ("call", "epoch"):
        model, rule = MLP([6, 16, 3], dtype=dtype), Adam()
        history = model.fit(x, y, 3, 16, rule, callback=stop_after(2), callback_every=every)
        (steps,) = {state.steps for state in rule._states.values()}
        assert steps == 20 if every == "epoch" else 2 <= steps <= 20
        assert len(history.loss) == math.ceil(steps / 10)


@pytest.mark.parametrize("make", [SGD, Adam])
def test_a_learning_rate_that_cannot_be(make: Any, training: Any, dtype: Any) -> None:
    x, y = mlp_problem([6, 16, 3], "softmax", 70, dtype)
    for lr in (-1.0, math.nan, math.inf):
        model, rule, weights = MLP([6, 16, 3], dtype=dtype), make(), []

        def callback(progress: Any, model: Any = model, rule: Any = rule, weights: Any = weights, lr: Any = lr) -> None:
            weights.append([w.copy() for w in model.parameters])
            rule.lr = lr

        with pytest.raises(ValueError, match=r"\blr\b"):
            model.fit(x, y, 3, 16, rule, callback=callback)
        assert len(weights) == 1
        assert same(model.parameters, weights[0])


def test_state_goes_on(fusing: Any, dtype: Any) -> None:
    """Over several calls of `fit`, with updates by hand in between; and where parameters have had unequally many."""
    x, y = mlp_problem([6, 16, 3], "softmax", 70, dtype)

    def run(unequal: bool, rule: Any) -> list[Any]:
        model = MLP([6, 16, 3], dtype=dtype)
        result = fitted(model, x, y, epochs=2, batch_size=16, optimizer=rule)
        _, gradients = model.loss_and_gradients(x, y)
        for param, grad in list(zip(model.parameters, gradients, strict=True))[: 2 if unequal else None]:
            rule.update(param, grad)
        return result + fitted(model, x, y, epochs=2, batch_size=16, optimizer=rule)

    for unequal, rule in itertools.product((False, True), ("momentum", "adam", "adamw")):
        with calls_of(reference, "train") as calls:
            result = run(unequal, RULES[rule]())
        assert bool(calls) is unequal  # the second `fit` has hyperparameters of its own for each parameter
        with one_by_one():
            assert_close(result, run(unequal, RULES[rule]()), dtype)


def test_updates_by_hand_within_a_callback(training: Any, dtype: Any) -> None:
    x, y = mlp_problem([6, 16, 3], "softmax", 70, dtype)

    def run(params: int) -> list[Any]:
        model, rule = MLP([6, 16, 3], dtype=dtype), RULES["adam"]()

        def callback(progress: Any) -> None:
            if progress.batch == 2:
                for param in model.parameters[:params]:
                    rule.update(param, np.ones_like(param))

        return fitted(model, x, y, epochs=2, batch_size=16, optimizer=rule, callback=callback)

    for params in (4, 1):
        result = run(params)
        with one_by_one():
            assert_close(result, run(params), dtype)


# Networks may stay on a GPU between calls, and numbers are drawn before they are wanted: nobody notices.


class BrokenError(Exception):
    """What a callback raises that has an error."""


def made(network: str, dtype: Any, rng: Any) -> tuple[Any, tuple[Any, ...]]:
    """A network, and samples for it."""
    if network == "mlp":
        return MLP([6, 16, 3], dtype=dtype), mlp_problem([6, 16, 3], "softmax", 150, dtype)
    return small_gan("averaged", dtype), (rng.uniform(size=(150, 33)).astype(dtype),)


@pytest.fixture(params=["mlp", "gan"])
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def told(callback: Any, every: str, network: str, dtype: Any, **arguments: Any) -> list[Any]:
    """What two fits of a network leave behind, and its optimizer, the callback being told of the first one."""
    model, data = made(network, dtype, np.random.default_rng(0))
    rule = RULES["adam"]()
    with contextlib.suppress(BrokenError):
        model.fit(*data, 3, 16, rule, callback=lambda p: callback(model, rule, p), callback_every=every, **arguments)
    states = [s for state in rule._states.values() for s in (*(a.copy() for a in state.arrays), np.array(state.steps))]
    return [*(w.copy() for w in weights_of(model)), *states, *fitted(model, *data, epochs=2, optimizer=rule)]


def look(seen: list[Any]) -> Any:
    """A callback that keeps what it sees, the optimizer's state too."""

    def callback(model: Any, rule: Any, progress: Any) -> None:
        arrays = [a for state in rule._states.values() for a in state.arrays]
        seen.append((progress.epoch, progress.batch, [a.copy() for a in [*weights_of(model), *arrays]]))

    return callback


@pytest.mark.parametrize("every", ["call", "epoch"])
def test_what_a_callback_looks_at(every: str, network: str, training: Any, dtype: Any) -> None:
    every_step: list[Any] = []
    seen: list[Any] = []
    expected = told(look(every_step), "batch", network, dtype)
    assert same(told(look(seen), every, network, dtype), expected)
    of_step = {key[:2]: key[2] for key in every_step}
    assert len(seen) >= 3
    for epoch, batch, arrays in seen:
        assert same(arrays, of_step[epoch, batch])


@pytest.mark.parametrize("every", ["call", "epoch"])
def test_what_a_callback_changes(every: str, network: str, training: Any, dtype: Any) -> None:
    """Weights, the optimizer's state, a learning rate: after each epoch."""

    def callback(model: Any, rule: Any, progress: Any) -> None:
        if progress.batch == progress.batches:
            for array in [*weights_of(model), *(a for state in rule._states.values() for a in state.arrays)]:
                array *= array.dtype.type(0.75)
            rule.lr *= 0.5

    assert same(told(callback, every, network, dtype), told(callback, "batch", network, dtype))


@pytest.mark.parametrize("error", [StopTraining, BrokenError])
@pytest.mark.parametrize("every", ["call", "epoch"])
def test_what_a_callback_ends(error: type[Exception], every: str, network: str, training: Any, dtype: Any) -> None:
    """Weights are those of the last step; the next `fit` goes on with the next numbers of the generators."""

    def callback(model: Any, rule: Any, progress: Any) -> None:
        if progress.epoch == 2 and progress.batch == progress.batches:
            raise error

    assert same(told(callback, every, network, dtype), told(callback, "batch", network, dtype))


def test_fit_within_a_callback(network: str, training: Any, dtype: Any) -> None:
    """Of the same network with the same optimizer; and a copy has the generators as they are."""
    _, data = made(network, dtype, np.random.default_rng(1))

    def callback(model: Any, rule: Any, progress: Any) -> None:
        if progress.batch == progress.batches:
            other = copy.deepcopy(model)
            model.fit(*data, epochs=1, batch_size=50, optimizer=rule)
            other.fit(*data, epochs=1, batch_size=50, optimizer=Adam())
            results.append([*weights_of(other), *(w.copy() for w in weights_of(model))])

    results: list[Any] = []
    expected = told(callback, "batch", network, dtype)
    expected_results = results
    for every in ("call", "epoch"):
        results = []
        assert same(told(callback, every, network, dtype), expected)
        assert len(results) == 3
        assert all(map(same, results, expected_results))


def test_weights_that_are_set_between_fits(network: str, training: Any, dtype: Any, tmp_path: Any) -> None:
    model, data = made(network, dtype, np.random.default_rng(0))
    rule = RULES["adam"]()
    first = fitted(model, *data, epochs=2, batch_size=16, optimizer=rule)
    kept = [w.copy() for w in weights_of(model)]
    model.save(tmp_path / "kept")
    with one_by_one():
        assert_close(fitted(made(network, dtype, np.random.default_rng(0))[0], *data, epochs=2, batch_size=16,
                            optimizer=RULES["adam"]()), first, dtype)  # fmt: skip
    loaded = type(model).load(tmp_path / "kept")
    assert same(weights_of(loaded), kept)
    model.fit(*data, epochs=1, batch_size=16, optimizer=rule)
    assert not same(weights_of(model), kept)
    for weight, value in zip(weights_of(model), kept, strict=True):
        weight[...] = value
    if network == "gan":
        model.steps = loaded.steps
    model._shuffle, loaded._shuffle = np.random.default_rng(7), np.random.default_rng(7)
    if network == "gan":
        model._training_noise, loaded._training_noise = np.random.default_rng(8), np.random.default_rng(8)
    results = [fitted(m, *data, epochs=2, batch_size=16, optimizer=RULES["adam"]()) for m in (model, loaded)]
    assert same(*results)


def test_an_error_of_a_schedule(network: str, training: Any, dtype: Any) -> None:
    """After some epochs: weights and optimizer are as the last step left them."""

    def run(callback: Any) -> list[Any]:
        model, data = made(network, dtype, np.random.default_rng(0))
        rule = RULES["adam"]()
        with pytest.raises(ValueError, match="what lr_schedule returns"):
            model.fit(*data, 3, 16, rule, lr_schedule=lambda done: 1.0 if done < 0.66 else -1.0, callback=callback)
        assert {state.steps for state in rule._states.values()} == {20}
        return [*weights_of(model), *(a for state in rule._states.values() for a in state.arrays)]

    # Single steps end at the same one: an epoch has ten.
    assert same(run(None), run(lambda progress: None))


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np
from gemmlet.nn import GAN, MLP, Adam, StopTraining
from support import same_bits

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
rng = np.random.default_rng(0)
x = rng.uniform(size=(20_000, 64)).astype(np.float32)
data = (x,) if sys.argv[-1] == "gan" else (x, rng.integers(0, 10, size=len(x)))
make = (lambda: GAN(8, [128, 64], [128, 1])) if sys.argv[-1] == "gan" else (lambda: MLP([64, 128, 10]))
make().fit(*(array[:64] for array in data), epochs=1)  # Numba compiles, which does not end at once
network, rule = make(), Adam()
sent = []

def interrupt():
    while not network.steps:
        time.sleep(0.01)
    time.sleep(0.1)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    network.fit(*data, epochs=10**6, optimizer=rule)
except KeyboardInterrupt:
    took = time.perf_counter() - sent[0]
assert took < 5, took  # a call is a tenth of a second; the machine may be busy

# What it leaves is what those steps give, and the optimizer knows how many they were.
def weights(network):
    if isinstance(network, MLP):
        return network.parameters
    return network.generator_parameters + network.discriminator_parameters

counts = {state.steps for state in rule._states.values()}
assert len(counts) == 1, counts
steps = left = counts.pop()
assert steps > 0

def callback(progress):
    global left
    left -= 1
    if not left:
        raise StopTraining

other = make()
other.fit(*data, epochs=10**6, optimizer=Adam(), callback=callback)
for a, b in zip(weights(network), weights(other)):
    assert np.isfinite(a).all()
    assert same_bits(a, b)
assert getattr(network, "steps", 0) == getattr(other, "steps", 0)
"""


@pytest.mark.parametrize("kind", ["mlp", "gan"])
def test_ctrl_c(kind: str, any_threads_backend: Any) -> None:
    """It ends `fit` soon, and between two steps."""
    run_on(any_threads_backend, f"import sys\nsys.argv.append({kind!r})\n{INTERRUPTED}")


# Layouts, and what is refused.


def strange_layouts(x: Any) -> dict[str, Any]:
    wide = np.repeat(x, 2, axis=1)
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    return {
        "every other column": wide[:, ::2],
        "backwards": x[::-1].copy()[::-1],
        "Fortran": np.asfortranarray(x),
        "unaligned": unaligned,
        "read-only": read_only,
        "images": x.reshape(len(x), 2, -1),
        "list": x.tolist() if x.dtype == np.float64 else x,
    }


@pytest.mark.parametrize("images", [False, True], ids=["float", "uint8"])
def test_layouts(images: bool, training: Any, dtype: Any, rng: Any) -> None:
    x, y = with_zeros("none", rng, 50, 24, np.uint8 if images else dtype), rng.integers(0, 3, size=50)
    arguments = {"epochs": 2, "batch_size": 16}
    expected = fitted(MLP([24, 16, 3], dtype=dtype), x, y, **arguments)
    expected_gan = fitted(GAN(3, [24], [9, 1], dtype=dtype), x, **arguments)
    for name, strange in strange_layouts(x).items():
        assert same(fitted(MLP([24, 16, 3], dtype=dtype), strange, y, **arguments), expected), name
        assert same(fitted(GAN(3, [24], [9, 1], dtype=dtype), strange, **arguments), expected_gan), name
    for labels in (y.astype(np.int32), y.astype(np.uint8), np.repeat(y, 2)[::2], y[::-1].copy()[::-1], y.tolist()):
        assert same(fitted(MLP([24, 16, 3], dtype=dtype), x, labels, **arguments), expected)


def test_layouts_of_numbers_to_learn(training: Any, dtype: Any) -> None:
    x, y = mlp_problem([6, 4], "identity", 50, dtype)
    expected = fitted(MLP([6, 4], output="identity", dtype=dtype), x, y, epochs=2, batch_size=16)
    for name, strange in strange_layouts(y).items():
        if name != "images":
            result = fitted(MLP([6, 4], output="identity", dtype=dtype), x, strange, epochs=2, batch_size=16)
            assert same(result, expected), name


@pytest.mark.parametrize(("output", "outputs", "bad"), [("softmax", 3, 3), ("softmax", 3, -1), ("sigmoid", 1, 2)])
def test_labels_out_of_range_are_refused_before_training(
    output: str, outputs: int, bad: int, training: Any, dtype: Any
) -> None:
    x, y = mlp_problem([6, outputs], output, 300, dtype)
    y[-1] = bad
    model = MLP([6, outputs], output=output, dtype=dtype)
    before = [w.copy() for w in model.parameters]
    with pytest.raises(ValueError, match=rf"\by\b.*{bad}"):
        model.fit(x, y, batch_size=16, shuffle=False)
    assert same(model.parameters, before)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [3, -1, 2**40])
def test_labels_are_those_that_fit_was_given(bad: int, output: str, training: Any, dtype: Any) -> None:
    """Whatever a callback makes of them."""
    x, y = mlp_problem([6, 3], output, 64, dtype)
    labels, validation = y.astype(np.int64), y[:9].astype(np.int64)

    def spoil(progress: Any) -> None:
        labels[:] = validation[:] = bad

    def fitted_by(callback: Any) -> tuple[Any, ...]:
        model = MLP([6, 3], output=output, dtype=dtype)
        history = model.fit(x, labels, 2, 8, "adam", validation_data=(x[:9], validation), callback=callback)
        return model.parameters, history.validation_loss

    expected, losses = fitted_by(lambda progress: None)
    result, others = fitted_by(spoil)
    assert same(result, expected)
    assert others == losses


@pytest.mark.parametrize("bad", [6, -1, 2**31 - 1, -(2**31)])
def test_what_a_wrong_column_leaves_is_what_so_many_steps_give(bad: int, training: Any, dtype: Any) -> None:
    """A call of several steps that would come to it is refused before its first."""
    sparse = pytest.importorskip("scipy.sparse")
    if training.name == "cuda":
        pytest.skip("it has a copy of them")
    x, y = mlp_problem([6, 3], "softmax", 160, dtype)
    spoilt, model, rule = sparse.csr_matrix(x), MLP([6, 3], dtype=dtype), Adam()

    def spoil(progress: Any) -> None:
        spoilt.indices[-1] = bad

    with pytest.raises(ValueError, match="indices"):
        model.fit(spoilt, y, 2, 8, rule, shuffle=False, callback=spoil, callback_every="epoch")
    assert {state.steps for state in rule._states.values()} == {model.steps}
    assert 20 <= model.steps < 40
    with pytest.raises(ValueError, match=rf"x is a sparse matrix with the column {bad}; expected 0 to 5"):
        model.evaluate(spoilt, y)
    other = MLP([6, 3], dtype=dtype)
    other.fit(sparse.csr_matrix(x), y, 2, 8, Adam(), shuffle=False, callback=stop_after(model.steps))
    assert same(model.parameters, other.parameters)


TRAINED = {
    "mlp": (lambda dtype: MLP([6, 4, 3], dtype=dtype), ["parameters"]),
    "gan": (lambda dtype: GAN(2, [5, 6], [4, 1], dtype=dtype), ["generator_parameters", "discriminator_parameters"]),
}


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_nothing_is_resized_that_fit_uses(network: str, training: Any, dtype: Any) -> None:
    """NumPy would free the memory, even of an array that others share."""
    x, y = mlp_problem([6, 3], "identity", 64, dtype)
    x = np.abs(x) / np.abs(x).max()
    make, names = TRAINED[network]
    model = make(dtype) if network == "gan" else MLP([6, 3], output="identity", dtype=dtype)
    used, asked = [x, *([y] if network == "mlp" else [])], []
    used += [array for name in names for array in getattr(model, name)]

    def resize(progress: Any) -> None:
        for array in used:
            asked.append(array)
            with pytest.raises(ValueError, match="resize"):
                array.resize(array.size + 1, refcheck=False)

    if network == "gan":
        model.fit(x, 1, 8, callback=resize)
    else:
        model.fit(x[:], y[:], 1, 8, validation_data=(x, y), callback=resize)
    assert len(asked) > 8


@pytest.mark.parametrize("at", [0, 3], ids=["before", "meanwhile"])
@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_read_only_parameters(network: str, at: int, training: Any, dtype: Any) -> None:
    """They are refused before a step, which would else change what stands before them."""
    make, names = TRAINED[network]
    x, y = mlp_problem([6, 3], "softmax", 64, dtype)
    x = np.abs(x) / np.abs(x).max()
    for name in names:
        for i in range(4):
            model, rule, done = make(dtype), Adam(), []
            array = getattr(model, name)[i]

            def freeze(progress: Any = None, array: Any = array, done: Any = done) -> None:
                done.append(progress)
                array.flags.writeable = len(done) <= at

            if not at:
                freeze()
            arguments = (x, y) if network == "mlp" else (x,)
            with pytest.raises(ValueError, match=rf"^{name}\[{i}\] is read-only$"):
                model.fit(*arguments, 2, 8, rule, callback=freeze)
            assert model.steps == (at + 1 if at else 0)
            other = make(dtype)
            if at:
                other.fit(*arguments, 2, 8, Adam(), callback=stop_after(at + 1))
            for names_of in names:
                assert same(getattr(model, names_of), getattr(other, names_of))


def test_stop_training_from_a_schedule(training: Any, dtype: Any) -> None:
    x, y = mlp_problem([6, 3], "softmax", 64, dtype)

    def schedule(after: int) -> Callable[[float], float]:
        asked = itertools.count()

        def factor(done: float) -> float:
            if next(asked) == after:
                raise StopTraining
            return 1.0

        return factor

    assert MLP([6, 3], dtype=dtype).fit(x, y, 2, 8, lr_schedule=schedule(0)).loss == []
    model = MLP([6, 3], dtype=dtype)
    assert len(model.fit(x, y, 2, 8, lr_schedule=schedule(12)).loss) == (2 if model.steps > 8 else 1)


# Threads.


def test_two_threads_fit_two_models(fusing: Any, dtype: Any, rng: Any) -> None:
    """While a third one calls kernels: all get what they get alone."""
    set_threads(fusing, 2)
    x, y = mlp_problem([64, 128, 10], "softmax", 1000, dtype)
    a, b = rng.normal(size=(100, 150)).astype(dtype), rng.normal(size=(150, 200)).astype(dtype)
    result, done = kernels.matmul(a, b), threading.Event()

    def fit(seed: int) -> list[Any]:
        return fitted(MLP([64, 128, 10], dtype=dtype, seed=seed), x, y, epochs=4)

    def matmuls() -> int:
        count = 0
        while not (done.is_set() and count):  # on a busy machine it may begin when the others have ended
            assert same_bits(kernels.matmul(a, b), result)
            count += 1
        return count

    expected = [fit(0), fit(1)]
    with ThreadPoolExecutor(3) as pool:
        futures, others = [pool.submit(fit, seed) for seed in (0, 1)], pool.submit(matmuls)
        try:
            results = [future.result() for future in futures]
        finally:
            done.set()
        assert others.result() > 0
    assert same(results[0], expected[0])
    assert same(results[1], expected[1])


def test_other_threads_run_meanwhile(fusing: Any) -> None:
    """Within a single call: the GIL is released."""
    x, y = mlp_problem([256, 512, 10], "softmax", 3000, np.float32)

    def is_seen() -> bool:
        ticks: list[float] = []
        done = threading.Event()

        def tick() -> None:
            while not done.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.001)

        thread = threading.Thread(target=tick)
        with calls_of(fusing, "train") as calls:
            thread.start()
            try:
                MLP([256, 512, 10]).fit(x, y, 2, 256)
            finally:
                done.set()
                thread.join()
        start, end = max(calls, key=lambda call: call[1] - call[0])
        quarter = (end - start) / 4
        return any(start + quarter < t < end - quarter for t in ticks)

    assert any(is_seen() for _ in range(20))  # the other thread may have had no processor


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fit_in_a_child_after_fit_in_its_parent(fusing: Any) -> None:
    if fusing.name == "cuda":
        pytest.skip("CUDA cannot be used in a child")
    script = """
import os
import numpy as np
import gemmlet
from gemmlet.nn import MLP
from support import same_bits

gemmlet.set_num_threads(2)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(500, 64)).astype(np.float32), rng.integers(0, 3, size=500)
def fit():
    model = MLP([64, 256, 3])
    model.fit(x, y, epochs=2)
    return model.parameters
expected = fit()
child = os.fork()
if child == 0:
    os._exit(0 if all(map(same_bits, fit(), expected)) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(same_bits, fit(), expected))
"""
    run_on(fusing, script)
