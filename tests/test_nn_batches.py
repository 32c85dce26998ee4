"""`fit` on batches of a function, a sequence or an iterator, and on files that are mapped into memory."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmlet
from gemmlet.nn import (
    GAN,
    MLP,
    SGD,
    Adam,
    DivergedError,
    EarlyStopping,
    ReduceOnPlateau,
    StopTraining,
    WarmUp,
    batches,
    cosine_decay,
)
from support import same_bits

N, SIZE = 100, 8  # 13 batches, the last of four
COUNT = 13
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (N, 6)).astype(np.uint8)
X = (RNG.uniform(size=(N, 6)) * (RNG.random((N, 6)) < 0.3)).astype(np.float32)
Y = RNG.integers(0, 3, N)
HELD_OUT = X[:20] + np.float32(0.1), Y[:20]


def batch(i: int, x: Any = X, y: Any = Y, size: int = SIZE) -> tuple[Any, Any]:
    return x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]


class Items:
    """As Keras has them, and lists of batches are."""

    def __init__(self, *data: Any) -> None:
        self.data, self.ended = data, 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        return batch(i, *self.data)

    def on_epoch_end(self) -> None:
        self.ended += 1


class Loader:
    """As PyTorch's DataLoader is."""

    def __init__(self, *data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[Any]:
        return (list(batch(i, *self.data)) for i in range(COUNT))


def endless(*data: Any) -> Iterator[Any]:
    while True:
        yield from (batch(i, *data) for i in range(COUNT))


# What has the batches, and whether `steps_per_epoch` is needed.
SOURCES: dict[str, tuple[Callable[..., Any], bool]] = {
    "function": (lambda *data: lambda i: batch(i, *data), True),
    "items": (Items, False),
    "list": (lambda *data: [batch(i, *data) for i in range(COUNT)], False),
    "loader": (Loader, False),
    "generator": (endless, True),
}


def model_of(**settings: Any) -> MLP:
    return MLP([6, 8, 3], "relu", **settings)


def parameters(model: Any) -> list[Any]:
    return [array.copy() for dense in model._parts().values() for array in dense.parameters]


def same(a: Any, b: Any) -> bool:
    return all(map(same_bits, parameters(a), parameters(b)))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("data", [X, BYTES, X.astype(np.float64)], ids=["float32", "uint8", "float64"])
def test_the_bits_of_the_same_rows_in_memory(kind: str, data: Any, backend: object) -> None:
    make, needs_steps = SOURCES[kind]
    how: dict[str, Any] = {"epochs": 3, "optimizer": Adam(0.01), "shuffle": False, "validation_data": HELD_OUT}
    how["lr_schedule"] = WarmUp(0.2, cosine_decay)
    expected, model = model_of(ema_decay=0.9), model_of(ema_decay=0.9)
    wanted = expected.fit(data, Y, batch_size=SIZE, **{**how, "optimizer": Adam(0.01)})
    told: list[Any] = []
    history = model.fit(
        make(data, Y),
        steps_per_epoch=COUNT if needs_steps else None,
        callback=told.append,
        callback_every="call",
        **how,
    )
    assert model.dtype == expected.dtype
    assert same(model, expected)
    assert (history.loss, history.accuracy) == (wanted.loss, wanted.accuracy)
    assert history.validation_loss == wanted.validation_loss
    assert model.steps == 3 * COUNT
    ends = [p for p in told if p.epoch_done]
    assert [(p.epoch, p.batch, p.batches) for p in ends] == [(e, COUNT, COUNT) for e in (1, 2, 3)]
    assert [p.loss for p in ends] == history.loss


@pytest.mark.parametrize("threads", [1, 2])
def test_numbered_batches_come_in_a_random_order(threads: int) -> None:
    asked: list[int] = []

    def function(i: int) -> Any:
        asked.append(i)
        return batch(i)

    before = gemmlet.get_num_threads()
    gemmlet.set_num_threads(threads)
    try:
        model, expected = model_of(seed=3), model_of(seed=3)
        model.fit(function, epochs=2, steps_per_epoch=COUNT - 1)  # without the last, which is smaller
        rule, stream = Adam(), expected._fresh_streams()[1]
        orders = [stream.permutation(COUNT - 1) for _ in range(2)]
        for order in orders:
            rows = np.concatenate([np.arange(i * SIZE, (i + 1) * SIZE) for i in order])
            expected.fit(X[rows], Y[rows], 1, SIZE, rule, shuffle=False)
    finally:
        gemmlet.set_num_threads(before)
    assert asked == np.concatenate(orders).tolist()  # each once, the first one too
    assert same(model, expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_are_divided(shuffle: bool) -> None:
    """Parts of data of 25 rows, in mini-batches of 8: of each part the last one is smaller."""
    model, expected, rule = model_of(seed=3), model_of(seed=3), SGD(0.1, momentum=0.9)
    told: list[Any] = []
    history = model.fit(
        lambda i: batch(i, size=25),
        steps_per_epoch=4,
        epochs=2,
        batch_size=8,
        shuffle=shuffle,
        optimizer=SGD(0.1, momentum=0.9),
        lr_schedule=cosine_decay,
        callback=told.append,
        callback_every="epoch",
    )
    stream, losses = expected._fresh_streams()[1], []
    for epoch in range(2):
        order, sums = stream.permutation(4) if shuffle else np.arange(4), 0.0
        for place, i in enumerate(order):
            rows = 25 * i + (stream.permutation(25) if shuffle else np.arange(25))
            done = (4 * epoch + place) / 8
            part = expected.fit(
                X[rows], Y[rows], 1, 8, rule, shuffle=False, lr_schedule=lambda d, done=done: cosine_decay(done + d / 8)
            )
            sums += 25 * part.loss[0]
        losses.append(sums / 100)
    assert history.loss == pytest.approx(losses, rel=1e-6)
    for a, b in zip(parameters(model), parameters(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert [(p.batch, p.batches) for p in told] == [(16, 16)] * 2


def test_batches_of_all_kinds_in_one_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes, dense and sparse, bytes and floats: each is its mini-batch."""
    sparse = pytest.importorskip("scipy.sparse")
    floats, names = BYTES / np.float32(255), np.array(["a", "b", "c"])[Y]
    some: list[Any] = []
    for place, (start, stop) in enumerate(pairwise([0, 8, 16, 19, 27, 40, 41, 49, 57])):
        x = [BYTES[start:stop], floats[start:stop], sparse.csr_array(floats[start:stop])][place % 3]
        some.append((x, names[start:stop]))
    expected, rule = model_of(classes=["a", "b", "c"]), Adam()
    for x, y in some:
        expected.fit(x, y, 1, len(y), rule, shuffle=False)
    for most in (batches._BLOCK_BYTES, 1):
        monkeypatch.setattr(batches, "_BLOCK_BYTES", most)
        model = model_of(classes=["a", "b", "c"], dtype=np.float32)
        model.fit(iter(some), epochs=1)
        assert same(model, expected)


@pytest.mark.parametrize("kind", ["several labels", "soft labels", "numbers"])
def test_targets_of_all_kinds(kind: str) -> None:
    rows = RNG.random((N, 3))
    y = {"several labels": (rows > 0.3).astype(int), "soft labels": rows / rows.sum(axis=1)[:, None]}.get(kind, rows)
    output = {"several labels": "sigmoid", "soft labels": "softmax", "numbers": "identity"}[kind]
    model, expected = model_of(output=output), model_of(output=output)
    history = model.fit(Items(X, y), epochs=2, shuffle=False)
    assert history.loss == expected.fit(X, y, 2, SIZE, shuffle=False).loss
    assert same(model, expected)
    assert model.multi_label == (kind == "several labels")


@pytest.mark.parametrize("kind", ["numbers", "classes", "sparse", "divided"])
def test_a_source_may_use_its_memory_again(kind: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    output = "identity" if kind == "numbers" else "softmax"
    targets = X[:, :3] if kind == "numbers" else Y
    full = sparse.csr_array(np.ones((20, 6), np.float32))
    x, y = np.empty((20, 6), np.float32), targets[:20].copy()

    def function(i: int) -> Any:
        x[:], y[:] = X[20 * i : 20 * i + 20], targets[20 * i : 20 * i + 20]
        full.data[:] = x.ravel()
        return full if kind == "sparse" else x, y

    model, expected = model_of(output=output, dtype=np.float32), model_of(output=output)
    size = 10 if kind == "divided" else None
    model.fit(function, steps_per_epoch=5, epochs=2, shuffle=False, batch_size=size)
    expected.fit(X, targets, 2, size or 20, shuffle=False)
    assert same(model, expected)


def test_early_stopping_and_plateaus() -> None:
    early = EarlyStopping("validation_loss", 2, min_delta=0.01)
    plateau = ReduceOnPlateau("validation_loss", 0, factor=0.5)
    how: dict[str, Any] = {"epochs": 30, "shuffle": False, "validation_data": HELD_OUT, "early_stopping": early}
    model, expected = model_of(), model_of()
    history = model.fit(Loader(), optimizer=SGD(1.0), lr_schedule=plateau, metrics=["macro_f1"], **how)
    wanted = expected.fit(X, Y, batch_size=SIZE, optimizer=SGD(1.0), lr_schedule=plateau, metrics=["macro_f1"], **how)
    assert len(history.loss) < 30
    assert (history.loss, history.metrics) == (wanted.loss, wanted.metrics)
    assert same(model, expected)


def test_dataloaders_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, IterableDataset, TensorDataset

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            return zip(X, Y, strict=True)

    loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=SIZE)
    expected = model_of()
    expected.fit(X, Y, 2, SIZE, shuffle=False)
    for source in loader, DataLoader(Stream(), batch_size=SIZE):  # the length of the second raises TypeError
        model = model_of()
        model.fit(source, epochs=2)
        assert same(model, expected)
    gan, other = (GAN(3, [4, 6], [5, 1]) for _ in range(2))
    gan.fit(loader, 2)
    other.fit(X, 2, SIZE, shuffle=False)
    assert same(gan, other)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_gan(kind: str) -> None:
    make, _ = SOURCES[kind]
    gan, expected = (GAN(3, [4, 6], [5, 1]) for _ in range(2))
    history = gan.fit(make(X), 3, steps_per_epoch=COUNT, shuffle=False)
    wanted = expected.fit(X, 3, SIZE, shuffle=False)
    assert history.generator_loss == wanted.generator_loss
    assert same(gan, expected)
    rows = [batch(i)[0] for i in range(COUNT)]
    lone = GAN(3, [4, 6], [5, 1])
    lone.fit(rows.__getitem__, 3, steps_per_epoch=COUNT, shuffle=False)
    assert same(lone, expected)
    items = GAN(3, [4, 6], [5, 1])
    items.fit(Items(X), 3, shuffle=False)
    assert same(items, expected)
    with pytest.raises(ValueError, match=r"x of batch 0 must lie within \[0, 1\], but x of batch 0\[0, "):
        GAN(3, [4, 6], [5, 1]).fit(lambda i: batch(i, X + 2), steps_per_epoch=2)
    with pytest.raises(ValueError, match="checkpoint needs all samples at once"):
        GAN(3, [4, 6], [5, 1]).fit(Loader(), checkpoint="gan.safetensors")


def test_an_iterable_goes_on_where_an_epoch_has_ended() -> None:
    model, expected = model_of(), model_of()
    model.fit(Loader(), epochs=4, steps_per_epoch=5)
    order = [i % COUNT for i in range(20)]
    rows = [batch(i) for i in order]
    expected.fit(iter(rows), epochs=4, steps_per_epoch=5)
    assert model.steps == expected.steps == 20
    assert same(model, expected)
    items = Items()
    model.fit(items, epochs=3, steps_per_epoch=2)
    assert items.ended == 3


def test_an_iterator_that_ends() -> None:
    model = model_of()
    history = model.fit(iter([batch(0), batch(1)]), epochs=1)
    assert (len(history.loss), model.steps) == (1, 2)
    with pytest.warns(RuntimeWarning, match="x has ended after 1 of 2 batches"):
        history = model.fit(iter([batch(0), batch(1), batch(2)]), epochs=3, steps_per_epoch=2)
    assert (len(history.loss), model.steps) == (2, 5)
    with pytest.warns(RuntimeWarning, match="x has ended after 0 of 2 batches"):
        history = model.fit(iter([batch(0), batch(1)]), epochs=3, steps_per_epoch=2)
    assert (len(history.loss), model.steps) == (1, 7)


@pytest.mark.parametrize("every", ["batch", "call", "epoch"])
def test_callbacks_end_it(every: str) -> None:
    """In the midst of an epoch, at a mini-batch or at its end."""
    told: list[Any] = []

    def callback(p: Any) -> None:
        told.append(p)
        if model.steps >= 3:
            raise StopTraining

    model = model_of()
    history = model.fit(endless(), epochs=4, steps_per_epoch=COUNT, callback=callback, callback_every=every)
    assert told[-1].batch == model.steps == (3 if every == "batch" else told[-1].batch)
    assert len(history.loss) == 1
    if every == "batch":
        assert [(p.batch, p.batches, p.epoch_done) for p in told] == [(i, COUNT, False) for i in (1, 2, 3)]
    # How many there are is not known before the first epoch has ended.
    told.clear()
    model = model_of()
    model.fit(iter([batch(i) for i in range(2)]), epochs=1, callback=told.append)
    assert [(p.batch, p.batches, p.epoch_done) for p in told] == [(1, 0, False), (2, 2, True)]


@pytest.mark.parametrize("change", ["l1", "l2", "clip_value", "label_smoothing"])
def test_what_a_callback_changes_counts_from_the_next_fit(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_BLOCK_BYTES", 1)  # a block of each

    def trained(*data: Any, **how: Any) -> MLP:
        model, rule = model_of(), SGD(0.1)
        changed = rule if hasattr(rule, change) else model
        how |= {"shuffle": False, "optimizer": rule, "callback": lambda _: setattr(changed, change, 1e-3)}
        losses = model.fit(*data, epochs=2, **how).loss
        assert losses != model.fit(*data, epochs=2, **how).loss
        return model

    assert same(trained(Items()), trained(X, Y, batch_size=SIZE))


def test_what_a_callback_changes_of_a_gan_with_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_BLOCK_BYTES", 1)

    def trained(*data: Any, **how: Any) -> GAN:
        gan = GAN(3, [4, 6], [5, 1], n_classes=3)
        gan.fit(*data, epochs=2, shuffle=False, callback=lambda _: setattr(gan, "gradient_penalty", 5.0), **how)
        return gan

    assert same(trained(Items(), steps_per_epoch=COUNT), trained(X, batch_size=SIZE, y=Y))


@pytest.mark.parametrize(
    ("x", "how", "error", "message"),
    [
        (X, {}, TypeError, "x is a ndarray; without y it must be batches"),
        (5, {}, TypeError, "x must be samples, or batches: a function, or an iterable; got int"),
        ({0: batch(0)}, {}, TypeError, "x is a dict; without y it must be batches"),
        (batch, {}, ValueError, "steps_per_epoch is needed"),
        (batch, {"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1, got 0"),
        (batch, {"steps_per_epoch": 2.5}, TypeError, "steps_per_epoch must be an integer"),
        (Items(), {"steps_per_epoch": 14}, ValueError, "steps_per_epoch is 14, x has 13 batches"),
        ([], {}, ValueError, "x has no batch"),
        (iter([]), {"epochs": 1}, ValueError, "x has no batch"),
        (set(), {"steps_per_epoch": 2}, ValueError, "x has no batch"),
        (iter([batch(0)]), {}, ValueError, "x is an iterator, which ends once: give steps_per_epoch, or epochs=1"),
        (iter([batch(0)]), {"epochs": 1, "lr_schedule": cosine_decay}, ValueError, "lr_schedule needs steps_per_epoch"),
        ([X[:8]], {}, TypeError, r"batch 0 must be a pair \(x, y\), got ndarray"),
        ([(*batch(0), np.ones(8))], {}, TypeError, r"batch 0 must be a pair \(x, y\), got 3 items"),
        ([(X[:8, :3], Y[:8])], {}, ValueError, r"x of batch 0 has shape \(8, 3\), expected \(n, 6\)"),
        ([(X[:8], Y[:7])], {}, ValueError, "x of batch 0 has 8 samples but y of batch 0 has 7 entries"),
        ([(X[:0], Y[:0])], {}, ValueError, "x of batch 0 is empty"),
        ([(X[:8] * np.nan, Y[:8])], {}, ValueError, "x of batch 0 must be finite, got nan in row 0"),
        (X, {"y": Y, "steps_per_epoch": 2}, ValueError, "steps_per_epoch is for batches, which have y in them"),
        (Items(), {"validation_split": 0.1}, ValueError, "validation_split needs all samples at once"),
        (Items(), {"sample_weight": np.ones(N)}, ValueError, "sample_weight needs all samples at once"),
        (Items(), {"class_weight": "balanced"}, ValueError, "class_weight needs all samples at once"),
        (Items(), {"checkpoint": "m.safetensors"}, ValueError, "checkpoint needs all samples at once"),
        (Items(), {"resume": "m.safetensors"}, ValueError, "resume needs all samples at once"),
        (Items(), {"epochs": 0}, ValueError, "epochs must be at least 1"),
        (Items(), {"shuffle": 3}, TypeError, "shuffle must be True or False"),
    ],
)
def test_what_is_refused(x: Any, how: Any, error: Any, message: str) -> None:
    model = model_of()
    before = parameters(model), model._shuffle.bit_generator.state
    with pytest.raises(error, match=message):
        model.fit(x, **how)
    assert all(map(same_bits, parameters(model), before[0]))
    assert (model.steps, model.classes, model.dtype) == (0, None, np.float32)
    assert model._shuffle.bit_generator.state == before[1]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("most", [batches._BLOCK_BYTES, 1])
def test_a_later_batch_that_does_not_fit_ends_in_the_last_good_state(
    most: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_BLOCK_BYTES", most)
    bad = X.copy()
    bad[5 * SIZE + 2, 1] = np.inf
    expected = model_of()
    expected.fit(X[: 5 * SIZE], Y[: 5 * SIZE], 1, size or SIZE, shuffle=False)

    def broken() -> Iterator[Any]:
        yield from (batch(i) for i in range(5))
        raise OSError("the disk is gone")

    for x, error, message in (
        (Items(bad, Y), ValueError, "x of batch 5 must be finite, got inf in row 2"),
        (Items(X, np.where(np.arange(N) >= 5 * SIZE, 9, Y)), ValueError, r"y of batch 5\[0\] is 9"),
        (broken(), OSError, "the disk is gone"),
    ):
        model = model_of()
        with pytest.raises(error, match=message):
            model.fit(x, epochs=1, batch_size=size, shuffle=False)
        assert model.steps == expected.steps
        assert same(model, expected)
    told: list[Any] = []
    with pytest.raises(OSError, match="the disk is gone"):
        model_of().fit(broken(), epochs=1, batch_size=size, callback=told.append)
    assert [(p.batch, p.epoch_done) for p in told] == [(i + 1, False) for i in range(expected.steps)]

    def stop(p: Any) -> None:
        if p.batch == expected.steps:
            raise StopTraining

    with pytest.raises(OSError, match="the disk is gone"):
        model_of().fit(broken(), epochs=1, batch_size=size, callback=stop)


def test_batches_with_other_targets_than_the_first_are_refused() -> None:
    hard, soft = np.eye(3)[Y], np.full((N, 3), 1 / 3)
    for first, others, has, expected in (
        (Y, soft, "soft labels", "one class for each sample"),
        (hard, soft, "soft labels", "one class for each sample"),
        (soft, Y, "one class for each sample", "soft labels"),
    ):
        model = model_of()
        some = [batch(0, X, first), batch(1, X, others)]
        with pytest.raises(ValueError, match=f"^y of batch 1 has {has}; expected {expected}, as before$"):
            model.fit(some, shuffle=False)
        assert model.steps == 1
    # Among soft labels one-hot rows may be.
    mixed = np.where(np.arange(N)[:, None] < SIZE, soft, hard)
    model, wanted = model_of(), model_of()
    history = model.fit(Items(X, mixed), epochs=1, shuffle=False)
    assert history.loss == wanted.fit(X, mixed, 1, SIZE, shuffle=False).loss
    assert math.isnan(history.accuracy[0])
    assert same(model, wanted)


@pytest.mark.parametrize("has_images", [False, True])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_a_batch_of_a_gan_may_be(count: int, labels: bool, has_images: bool) -> None:
    """Samples in an array or a list, flat or images; or the array in a list, with labels or alone."""
    x = X.reshape(N, 2, 3)[:count] if has_images else X[:count]
    settings = {"n_classes": 3} if labels else {}
    expected = GAN(3, [4, 6], [5, 1], **settings)
    expected.fit(x, 1, shuffle=False, y=Y[:count] if labels else None)
    for given in [[x, Y[:count]]] if labels else [x, [x], (x, Y[:count]), list(x)]:
        gan = GAN(3, [4, 6], [5, 1], **settings)
        gan.fit([given], 1, steps_per_epoch=1)
        assert same(gan, expected)


def test_labels_of_a_gan_are_named_by_their_batch() -> None:
    for y, message in (
        (np.where(np.arange(N) == SIZE, 7, Y), r"y of batch 1\[0\] is 7"),
        (np.full((N, 3), 1 / 3), "y of batch 0 has soft labels"),
    ):
        with pytest.raises(ValueError, match=message):
            GAN(3, [4, 6], [5, 1], n_classes=3).fit(Items(X, y), steps_per_epoch=COUNT, shuffle=False)
    with pytest.raises(TypeError, match="y of batch 0 is needed"):
        GAN(3, [4, 6], [5, 1], n_classes=3).fit([X], steps_per_epoch=1)


@pytest.mark.parametrize("data", [(Items(),), (X, Y)], ids=["batches", "memory"])
def test_divergence_after_the_last_epoch(data: Any) -> None:
    model = model_of()

    def callback(p: Any) -> None:
        assert p.batch == COUNT
        model.parameters[0][0, 0] = np.nan if p.epoch == 3 else 0.0

    with pytest.raises(DivergedError, match="diverged after epoch 3: parameters are no longer finite"):
        model.fit(*data, epochs=3, batch_size=SIZE, callback=callback, callback_every="epoch")


def test_divergence() -> None:
    model = MLP([6, 8, 1], output="identity")
    with pytest.raises(DivergedError, match="the loss is no longer finite; the network is as it was after"):
        model.fit(Items(X, X[:, 0] * 1e6), epochs=50, optimizer=SGD(1e3), lr_schedule=None)
    assert all(np.isfinite(p).all() for p in model.parameters)


@pytest.mark.parametrize(("most", "steps"), [(batches._BLOCK_BYTES, 0), (1, 2)])
def test_an_interrupt_leaves_whole_steps(most: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the fourth batch is loaded; what was loaded ahead is not trained on."""
    monkeypatch.setattr(batches, "_BLOCK_BYTES", most)
    monkeypatch.setattr(batches, "_BLOCK_SECONDS", math.inf)

    def interrupted() -> Iterator[Any]:
        yield from (batch(i) for i in range(3))
        raise KeyboardInterrupt

    model, expected = model_of(), model_of()
    with pytest.raises(KeyboardInterrupt):
        model.fit(interrupted(), epochs=1)
    assert model.steps == steps
    if steps:
        expected.fit([batch(i) for i in range(steps)], epochs=1, shuffle=False)
    assert same(model, expected)
    assert math.isfinite(model.fit(X, Y, 1).loss[0])


def test_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of memory there is what a block has, and the next batch; of what was trained on nothing is kept."""
    monkeypatch.setattr(batches, "_BLOCK_BYTES", 4 * SIZE * 6 * 4)
    alive: set[int] = set()
    most = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def function(i: int) -> Any:
        nonlocal most
        x = np.array(X[:SIZE]).view(Counted)
        alive.add(id(x))
        most = max(most, len(alive))
        return x, Y[:SIZE]

    model_of().fit(function, epochs=2, steps_per_epoch=30)
    gc.collect()
    assert most <= 12
    assert not alive


# Files that are mapped into memory.


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_memmap_has_the_bits_of_an_array(dtype: Any, tmp_path: Path) -> None:
    data = BYTES.astype(dtype) if dtype == np.uint8 else X
    mapped = np.memmap(tmp_path / "x", dtype, "w+", shape=data.shape)
    mapped[:] = data
    model, expected = model_of(), model_of()
    model.fit(np.memmap(tmp_path / "x", dtype, "r", shape=data.shape), Y, 2)
    expected.fit(data, Y, 2)
    assert same(model, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what a process has")
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_memmap_is_not_copied(dtype: str, tmp_path: Path) -> None:
    """Pages of the file are the system's, which it takes back; memory of its own the process needs little of."""
    code = f"""
import numpy as np
from gemmlet.nn import MLP
def own():
    facts = dict(line.split(":") for line in open("/proc/self/status"))
    return int(facts["RssAnon"].split()[0]) / 1024
rows = {96 << 20} // 512 // np.dtype("{dtype}").itemsize
x, y = np.memmap({str(tmp_path / "x")!r}, "{dtype}", "w+", shape=(rows, 512)), np.zeros(rows, int)
model = MLP([512, 4, 2], dtype="float32")
model.fit(x[:64], y[:64], 1)
before = own()
seen = []
model.fit(x, y, 1, 256, callback=lambda p: seen.append(own()), callback_every="call")
print(max(seen) - before)
"""
    environment = {**os.environ, "GEMMLET_BACKEND": ""}
    environment.pop("GEMMLET_BACKEND")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 24
