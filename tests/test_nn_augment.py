"""Augmentation within `fit`: each epoch has its own images, whatever computes them, and however steps are taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_on_host.backend
from gemmlet import data, set_num_threads, use_backend
from gemmlet.formulas import augmentation
from gemmlet.formulas.augmentation import Draw
from gemmlet.nn import GAN, MLP, SGD, Adam, Augment, StopTraining
from gemmlet.nn import augment as augment_module
from gemmlet.nn.augment import Augmented
from gemmlet.nn.dataset import Samples
from gemmlet.training import reference

N, HEIGHT, WIDTH, SIZE, EPOCHS = 150, 9, 7, 16, 3
BATCHES = 10
AUGMENT = Augment(erase=0.2, noise=3)
RNG = np.random.default_rng(0)
X = np.where(RNG.random((N, HEIGHT, WIDTH)) < 0.4, RNG.integers(0, 256, (N, HEIGHT, WIDTH)), 0).astype(np.uint8)
Y = RNG.integers(0, 3, N)


def mlp(**settings: Any) -> MLP:
    return MLP([HEIGHT * WIDTH, 8, 3], "relu", **{"seed": 2**70 + 3, **settings})


def gan() -> GAN:
    return GAN(4, [8, HEIGHT * WIDTH], [8, 1], seed=5)


def parameters_of(model: Any) -> list[Any]:
    return [array.copy() for dense in model._parts().values() for array in dense.parameters]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def by_hand(model: Any, epoch: int, augment: Augment = AUGMENT) -> Any:
    return data.augment(X, **vars(augment), epoch=epoch * BATCHES, seed=model.augment_seed)


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "classes": (Y, {}, {}),
    "sparse first layer, averages": (Y, {"ema_decay": 0.9}, {"augment": Augment()}),
    "weights": (Y, {}, {"class_weight": {0: 2.0}, "sample_weight": np.linspace(0.5, 1.5, N)}),
    "soft labels": (RNG.dirichlet(np.ones(3), N), {}, {}),
    "numbers": (RNG.normal(size=(N, 3)), {"output": "identity", "dtype": np.float64}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_mlp_learns_from_augmented_images(backend: Any, case: str) -> None:
    """The same bits as by fits of one epoch, whose images were augmented before."""
    y, settings, given = CASES[case]
    augment = given.get("augment", AUGMENT)
    model, other, optimizer, same = mlp(**settings), mlp(**settings), Adam(0.01), Adam(0.01)
    history = model.fit(X, y, EPOCHS, SIZE, optimizer, **{"augment": augment, **given})
    losses = [
        other.fit(by_hand(other, epoch, augment), y, 1, SIZE, same, **{**given, "augment": None}).loss[0]
        for epoch in range(EPOCHS)
    ]
    assert history.loss == losses
    assert_same(parameters_of(model), parameters_of(other))
    plain = mlp(**settings)
    assert plain.fit(X, y, EPOCHS, SIZE, Adam(0.01), **{**given, "augment": None}).loss != losses


def test_a_gan_learns_from_augmented_images(backend: Any) -> None:
    model, other, optimizer, same = gan(), gan(), Adam(0.01), Adam(0.01)
    model.fit(X, EPOCHS, SIZE, optimizer, augment=AUGMENT)
    for epoch in range(EPOCHS):
        other.fit(by_hand(other, epoch), 1, SIZE, same)
    assert_same(parameters_of(model), parameters_of(other))


def test_blocks_are_those_of_the_reference(any_threads_backend: Any) -> None:
    """The same bytes on every backend, from several threads."""
    chosen = np.random.default_rng(1).permutation(N)[:70]
    images = Samples(X, HEIGHT * WIDTH, np.dtype(np.float32))
    expected = augmentation.augmented(X[chosen], AUGMENT.settings, Draw(2**64 - 1, 7, chosen))
    for threads in (1, 2, 5):
        set_num_threads(threads)
        any_threads_backend.set_num_threads(threads)
        block = Augmented(images, AUGMENT, 2**64 - 1, SIZE, Y)
        where = block.take(chosen, 7)
        pixels = cuda_on_host.backend.to_cpu(block.samples.array) if block.on_gpu else block.samples.array
        np.testing.assert_array_equal(pixels[where], expected)
        np.testing.assert_array_equal(block.targets[where], Y[chosen])


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_how_steps_are_taken_changes_nothing(
    any_threads_backend: Any, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, sizes = [], []
    take = Augmented.take
    monkeypatch.setattr(Augmented, "take", lambda self, rows, epoch: sizes.append(len(rows)) or take(self, rows, epoch))
    for threads, every, block in ((1, "call", 4096), (2, "batch", 4096), (5, "epoch", 40), (2, "call", 1)):
        set_num_threads(threads)
        any_threads_backend.set_num_threads(threads)
        monkeypatch.setattr(augment_module, "_BLOCK", block)
        sizes.clear()
        model: Any = mlp() if network == "mlp" else gan()
        given = {"epochs": EPOCHS, "batch_size": SIZE, "optimizer": Adam(0.01), "augment": AUGMENT}
        model.fit(*((X, Y) if network == "mlp" else (X,)), **given, callback=lambda _: None, callback_every=every)
        results.append(parameters_of(model))
        assert any_threads_backend.name == "cuda" or max(sizes[1:]) <= max(SIZE, block)
    for result in results[1:]:
        assert_same(results[0], result)


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_a_fit_goes_on_in_the_midst_of_an_epoch(backend: Any, network: str, tmp_path: Path) -> None:
    def fit(model: Any, **more: Any) -> list[Any]:
        given = {"epochs": EPOCHS, "batch_size": SIZE, "optimizer": Adam(0.01), "augment": AUGMENT} | more
        model.fit(*((X, Y) if network == "mlp" else (X,)), **given)
        return parameters_of(model)

    def stop(progress: Any) -> None:
        if (progress.epoch, progress.batch) == (2, 4):
            raise StopTraining

    make = mlp if network == "mlp" else gan
    expected, path = fit(make()), tmp_path / "checkpoint"
    fit(make(), checkpoint=path, callback=stop)
    with pytest.raises(ValueError, match=r"another fit: augment was 'Augment\(.*', is None"):
        fit(make(), resume=path, augment=None)
    with pytest.raises(ValueError, match=r"another fit: augment was 'Augment\(.*erase=0.2\)', is .*erase=0.3"):
        fit(make(), resume=path, augment=Augment(erase=0.3, noise=3))
    assert_same(fit(make(), resume=path), expected)


# What a GPU does.


@pytest.fixture(params=["cuda"])
def cuda() -> Iterator[Any]:
    """The backend, in use; tests have its name, by which the GPU report finds them."""
    try:
        backend = cuda_on_host.backend.load()
    except RuntimeError as error:
        pytest.skip(str(error))
    with use_backend(backend):
        yield backend


class Moved:
    """The bytes of each copy to a device."""

    def __init__(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: list[int] = []
        kind, upload = type(device), type(device).upload
        monkeypatch.setattr(kind, "upload", lambda d, a, *out: self.up.append(a.nbytes) or upload(d, a, *out))


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_images_go_to_a_gpu_once(cuda: Any, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fit copies there is what one without augmentation does, and the numbers of the samples."""
    copied = []
    for augment in (None, AUGMENT):
        moved = Moved(cuda._first, monkeypatch)
        model: Any = mlp() if network == "mlp" else gan()
        given = {"epochs": EPOCHS, "batch_size": SIZE, "optimizer": Adam(0.01), "augment": augment}
        # A step a call, so that the calls are the same ones.
        model.fit(*((X, Y) if network == "mlp" else (X,)), **given, callback=lambda _: None, callback_every="batch")
        copied.append(sorted(moved.up))
    assert copied[0].count(X.nbytes) == 1
    assert copied[1] == sorted([*copied[0], Y.nbytes])


def test_memory_of_a_gpu_may_not_suffice(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then blocks are made on the CPU, of which the results are the same."""
    expected, model = mlp(), mlp()
    expected.fit(X, Y, EPOCHS, SIZE, augment=AUGMENT)
    empty, restage, blocks = type(cuda._first).empty, type(cuda).restage, []

    def limited(device: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if len(shape) == 3 and shape[0] == N:
            raise MemoryError
        return empty(device, shape, dtype)

    monkeypatch.setattr(type(cuda._first), "empty", limited)
    monkeypatch.setattr(type(cuda), "restage", lambda self, plan: blocks.append(plan) or restage(self, plan))
    monkeypatch.setattr(augment_module, "_BLOCK", 3 * SIZE)
    model.fit(X, Y, EPOCHS, SIZE, augment=AUGMENT)
    assert len(blocks) >= EPOCHS * N / (3 * SIZE)
    assert_same(parameters_of(model), parameters_of(expected))


@pytest.mark.parametrize("settings", [{}, {"l2": 0.01}], ids=["fused", "by the reference"])
def test_images_that_are_on_a_gpu(cuda: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    models = mlp(**settings), mlp(**settings)
    there, by_reference = cuda_on_host.backend.to_gpu(X), []
    train = reference.train
    monkeypatch.setattr(reference, "train", lambda *given: by_reference.append(given) or train(*given))
    for model, x in zip(models, (X, there), strict=True):
        model.fit(x, Y, EPOCHS, SIZE, augment=AUGMENT, validation_data=(x[:20], Y[:20]))
    assert len(by_reference) == (2 * EPOCHS * BATCHES if settings else 0)
    assert_same(*map(parameters_of, models))
    np.testing.assert_array_equal(cuda_on_host.backend.to_cpu(there), X)


def test_no_epoch_has_the_images_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are divided among fits, and whether they are whole."""
    epochs: list[int] = []
    take = Augmented.take
    monkeypatch.setattr(Augmented, "take", lambda self, rows, epoch: epochs.append(epoch) or take(self, rows, epoch))

    def stop(progress: Any) -> None:
        if progress.batch == 3:
            raise StopTraining

    model, found = mlp(), []
    for more in ({"epochs": 2}, {"epochs": 1, "callback": stop}, {"epochs": 2}, {"epochs": 2, "batch_size": 5}):
        epochs.clear()
        model.fit(X, Y, **{"batch_size": SIZE, "augment": AUGMENT, **more})
        found.append(sorted(set(epochs[1:])))  # the first block tells the density
    assert found == [[0, 10], [20], [23, 33], [43, 73]]
    whole, parts = mlp(), mlp()
    for model, fits in ((whole, (3,)), (parts, (1, 2))):
        optimizer = SGD(0.1)
        for count in fits:
            model.fit(X, Y, count, SIZE, optimizer, augment=AUGMENT)
    assert_same(parameters_of(whole), parameters_of(parts))


def test_seeds_differ_and_may_be_large() -> None:
    seeds = {MLP([4, 2], seed=seed).augment_seed for seed in (0, 1, 2**64, 2**64 + 1, 2**200)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert MLP([4, 2], seed=9).augment_seed == GAN(2, [4], [1], seed=9).augment_seed == 9367271515570180175


def test_validation_data_stays_as_it_is(backend: Any) -> None:
    model = mlp()
    history = model.fit(X, Y, EPOCHS, SIZE, Adam(0.01), validation_data=(X, Y), augment=AUGMENT)
    assert history.validation_loss[-1] == model.evaluate(X, Y)["loss"]
    parts = [mlp(), mlp()]
    losses = [
        m.fit(X, Y, 1, SIZE, SGD(0.0), validation_split=0.3, augment=a).validation_loss
        for m, a in zip(parts, (None, AUGMENT), strict=True)
    ]
    assert losses[0] == losses[1]


def test_noise_makes_a_sparse_data_set_dense() -> None:
    """Zeros are skipped where the images that are trained on have many."""
    black = np.zeros((40, HEIGHT, WIDTH), np.uint8)
    for augment, skips in ((Augment(), True), (Augment(noise=90), False)):
        block = Augmented(Samples(black, HEIGHT * WIDTH, np.dtype(np.float32)), augment, 0, SIZE)
        assert block.samples.dataset(may_skip_zeros=True).skip_zeros == skips


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"rotate": 3}}, "augment must be an Augment, got dict"),
        ({"x": X / 255}, "x, which is to be augmented, has dtype float64, expected uint8"),
        ({"x": X.astype(np.int16)}, "x, which is to be augmented, has dtype int16, expected uint8"),
        ({"x": X.reshape(N, -1)}, r"x, which is to be augmented, has shape \(150, 63\), expected \(n, h, w\): reshape"),
        ({"x": X[..., None]}, r"has shape \(150, 9, 7, 1\), expected \(n, h, w\)$"),
    ],
)
@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_what_cannot_be_augmented_is_refused(changes: dict[str, Any], message: str, network: str) -> None:
    given: dict[str, Any] = {"x": X, "augment": AUGMENT, "epochs": 1} | changes
    model: Any = mlp() if network == "mlp" else gan()
    before = parameters_of(model)
    with pytest.raises((TypeError, ValueError), match=message):
        model.fit(**given, **({"y": Y} if network == "mlp" else {}))
    assert_same(parameters_of(model), before)
    assert not model.steps


def test_a_sparse_matrix_is_refused() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match="x, which is to be augmented, is a sparse matrix"):
        mlp().fit(scipy_sparse.csr_array(X.reshape(N, -1)), Y, augment=AUGMENT)
    wide = MLP([2 * (augmentation.MAX_SIDE + 1), 2])
    with pytest.raises(ValueError, match="height and width must be from 1 to 1024"):
        wide.fit(np.zeros((2, 2, augmentation.MAX_SIDE + 1), np.uint8), [0, 1], augment=AUGMENT)


def test_a_target_that_is_not_finite_is_named(backend: Any) -> None:
    model, y = mlp(output="identity"), RNG.normal(size=(N, 3)).astype(np.float32)
    y[140, 1] = np.nan
    with pytest.raises(ValueError, match="y must be finite, got nan in row 140"):
        model.fit(X, y, EPOCHS, SIZE, augment=AUGMENT)
    assert not model.steps
