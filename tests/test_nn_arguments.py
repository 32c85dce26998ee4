"""Samples and targets of any dtype: converted in one place, with the bits of the converted arrays."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmlet.nn import GAN, MLP, Adam
from gemmlet.nn.dataset import as_dtype
from support import same_bits

DTYPES = ["?", "i1", "i2", ">i4", "i8", "u1", "u2", "u4", ">u8", "f2", "f4", ">f4", "f8", ">f8", "g"]
FOLLOWED = dict.fromkeys(["?", "i1", "i2", "u1", "u2", "f2", "f4", ">f4"], np.float32)

WORDS = np.array(["ant", "bee", "cat"])
X = np.random.default_rng(0).uniform(size=(30, 4)).astype(np.float32)
INDICES = np.arange(30) % 3


def trained(x: Any, y: Any = INDICES, **arguments: Any) -> MLP:
    model = MLP([4, 5, 3], **arguments)
    model.fit(x, y, epochs=2, batch_size=7)
    return model


def assert_same(a: MLP, b: MLP) -> None:
    assert all(same_bits(p, q) for p, q in zip(a.parameters, b.parameters, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([None, "float32", "float64"]),
    st.sampled_from(["C", "F", "strided", "read-only"]),
    st.sampled_from(["softmax", "identity"]),
    st.integers(0, 2**32 - 1),
)
def test_any_dtype_counts_as_the_converted_array(given: str, dtype: Any, layout: str, output: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2 if given == "?" else 100, (30, 4)).astype(given)
    if np.dtype(given).kind == "f":
        x = (x / 7).astype(given)
    own = np.dtype(dtype or FOLLOWED.get(given, np.float64))
    converted = x.astype(own) / (own.type(255) if given == "u1" else own.type(1))
    if layout == "strided":
        x = np.repeat(x, 2, axis=1)[:, ::2]
    else:
        x = np.array(x, order="F" if layout == "F" else "C")
        x.flags.writeable = layout != "read-only"
    y = INDICES if output == "softmax" else converted[:, :3]
    targets = y if output == "softmax" or given == "u1" else x[:, :3]
    model, expected = (MLP([4, 5, 3], output=output, dtype=d) for d in (dtype, own))
    assert model.dtype == (dtype or np.float32)
    history = model.fit(x, targets, epochs=1, batch_size=8, validation_data=(x, targets))
    assert history.loss == expected.fit(converted, y, epochs=1, batch_size=8).loss
    assert model.dtype == own
    assert_same(model, expected)
    assert history.validation_loss == [model.evaluate(x, targets)["loss"]] == [expected.evaluate(converted, y)["loss"]]
    assert model.loss_and_gradients(x, targets)[0] == expected.loss_and_gradients(converted, y)[0]
    for method in ("predict", "features", *(["predict_proba"] if output == "softmax" else [])):
        assert same_bits(getattr(model, method)(x), getattr(expected, method)(converted))


def test_a_trained_network_keeps_its_dtype() -> None:
    model = trained(X)
    assert model.dtype == np.float32
    model.fit(X.astype(np.float64), INDICES, epochs=1)
    assert model.dtype == model.predict_proba(X.astype(np.float64)).dtype == np.float32


def test_lists_are_what_numpy_makes_of_them() -> None:
    assert_same(trained(X.tolist(), INDICES.tolist()), trained(X.astype(np.float64)))
    assert_same(trained((X * 99).astype(int).tolist()), trained((X * 99).astype(int).astype(np.float64)))


def test_a_bad_argument_leaves_the_dtype_open() -> None:
    model = MLP([4, 5, 3])
    with pytest.raises(ValueError, match="epochs"):
        model.fit(X.astype(np.float64), WORDS[INDICES], epochs=0)
    assert model.dtype == np.float32
    assert model.classes is None


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_first_weights_are_unrounded_and_changes_kept(ema_decay: float) -> None:
    model, exact = (MLP([4, 5, 3], dtype=dtype, ema_decay=ema_decay) for dtype in (None, np.float64))
    model.parameters[0][1, 2] = exact.parameters[0][1, 2] = 0.5
    model.parameters[3][:] = exact.parameters[3][:] = np.arange(3)
    for network in (model, exact):
        network.fit(X.astype(np.float64), INDICES, epochs=1)
    assert_same(model, exact)
    assert same_bits(model.predict_proba(X.astype(np.float64)), exact.predict_proba(X.astype(np.float64)))


@pytest.mark.parametrize("given", DTYPES)
def test_the_gan_follows_too(given: str) -> None:
    x = np.random.default_rng(1).integers(0, 2, (20, 4)).astype(given)
    own = np.dtype(FOLLOWED.get(given, np.float64))
    gan, expected = GAN(3, [6, 4], [5, 1]), GAN(3, [6, 4], [5, 1], dtype=own)
    gan.fit(x, epochs=2, batch_size=8)
    expected.fit(x.astype(own) / own.type(255 if given == "u1" else 1), epochs=2, batch_size=8)
    for a, b in zip(gan.generator_parameters, expected.generator_parameters, strict=True):
        assert same_bits(a, b)
    z = np.random.default_rng(2).normal(size=(5, 3))
    assert same_bits(gan.sample(z=z), expected.sample(z=z.astype(own)))


@pytest.mark.parametrize("given", ["?", "u1", "i8", "f4", "f8"])
def test_sparse_matrices_of_any_dtype(given: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    x = np.where(X > 0.7, X * 100, 0).astype(given)
    for dtype in (None, np.float32):
        model, expected = trained(sparse.csr_matrix(x), dtype=dtype), trained(x, dtype=dtype)
        assert model.dtype == expected.dtype
        np.testing.assert_allclose(model.predict_proba(sparse.csc_matrix(x)), expected.predict_proba(x), rtol=1e-5)
    far = sparse.csr_matrix(np.diag([1, 1e39, 1, 1]))
    with pytest.raises(ValueError, match=r"x\.data\[1\] is 1e\+39, which is beyond the range of float32"):
        MLP([4, 3], dtype=np.float32).predict(far)


def test_predictions_convert_a_chunk_at_a_time() -> None:
    x, model = np.ones((20_000, 100)), MLP([100, 2])
    tracemalloc.start()
    try:
        model.predict(x)
        model.predict_proba(x)
        model.evaluate(x, np.zeros(20_000, int))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.size * 4 / 3


def test_validation_data_beyond_the_range_is_refused_before_training() -> None:
    model = MLP([4, 3], dtype=np.float32)
    before = [p.copy() for p in model.parameters]
    bad = X.astype(np.float64)
    bad[3, 1] = 1e39
    for x, held_out, name in ((bad, X, "x"), (X, bad, r"validation_data\[0\]")):
        with pytest.raises(ValueError, match=rf"{name}\[3, 1\] is 1e\+39, which is beyond the range of float32"):
            model.fit(x, INDICES, validation_data=(held_out, INDICES))
    assert all(same_bits(a, b) for a, b in zip(before, model.parameters, strict=True))


def test_a_flag_of_overflow_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another thread changes the number back: nothing is beyond the range."""

    @contextlib.contextmanager
    def flagged(**modes: str) -> Iterator[None]:
        yield
        if modes.get("over") == "raise":
            raise FloatingPointError("overflow encountered in cast")

    monkeypatch.setattr(np, "errstate", flagged)
    assert same_bits(as_dtype(X.astype(np.float64), np.dtype(np.float32), "x"), X)


# Targets.


@pytest.mark.parametrize("given", ["i1", ">i2", "i4", "i8", "u1", "u8"])
def test_indices_of_any_integer_dtype_are_no_classes(given: str) -> None:
    y = (INDICES * 2 % 4).astype(given)  # class 1 is missing
    model = trained(X, y)
    assert_same(model, trained(X, y.astype(np.int64)))
    assert model.classes is None
    assert model.predict(X).dtype == np.int64


LABELS = {
    "strings": (WORDS[INDICES], ["ant", "bee", "cat"]),
    "objects": (WORDS[INDICES].astype(object), ["ant", "bee", "cat"]),
    "a list": (WORDS[INDICES].tolist(), ["ant", "bee", "cat"]),
    "other integers": (INDICES * 5 - 3, [-3, 2, 7]),
    "floats that could be indices": (INDICES.astype(np.float32), [0.0, 1.0, 2.0]),
    "other floats": (INDICES + 1.0, [1.0, 2.0, 3.0]),
    "a column": (INDICES[:, np.newaxis], None),
    "one-hot": (np.eye(3, dtype=int)[INDICES], None),
    "one-hot floats": (np.eye(3)[INDICES], None),
    "one-hot bools": (np.eye(3, dtype=bool)[INDICES], None),
}


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", LABELS)
def test_labels_train_as_indices_do_and_come_back(kind: str, output: str, tmp_path: Path) -> None:
    y, classes = LABELS[kind]
    model, expected = trained(X, y, output=output), trained(X, output=output)
    assert_same(model, expected)
    assert model.classes == classes
    assert not model.multi_label
    names = np.arange(3) if classes is None else np.array(classes)
    assert np.array_equal(model.predict(X), names[expected.predict(X)])
    assert model.predict(X).dtype == names.dtype
    assert model.evaluate(X, y) == expected.evaluate(X, INDICES)
    model.fit(X[:5], y[:5], epochs=1, validation_data=(X, y))
    model.save(tmp_path / "model")
    loaded = MLP.load(tmp_path / "model")
    assert loaded.classes == classes
    assert np.array_equal(loaded.predict(X), model.predict(X))
    with pytest.raises(ValueError, match=r"y\[0\] is 'dog'; the classes of this network are"):
        loaded.fit(X[:2], ["dog", "dog"])


def test_one_output_tells_two_labels_apart() -> None:
    for y, classes in (((INDICES == 1), [False, True]), (np.where(INDICES == 1, 1, -1), [-1, 1])):
        model, expected = MLP([4, 1], output="sigmoid"), MLP([4, 1], output="sigmoid")
        model.fit(X, y, epochs=1)
        expected.fit(X, (INDICES == 1).astype(int), epochs=1)
        assert_same(model, expected)
        assert model.classes == classes
        assert model.predict(X).dtype == y.dtype


def test_given_classes_have_their_order_and_need_not_all_be_there() -> None:
    model = trained(X, np.array(["b", "a"])[INDICES % 2], classes=["c", "b", "a"])
    assert_same(model, trained(X, 1 + INDICES % 2))
    assert model.classes == ["c", "b", "a"]


def test_soft_labels() -> None:
    hard = np.eye(3)[INDICES]
    soft = 0.9 * hard + 0.1 / 3
    model, expected = trained(X, soft, dtype=np.float64), trained(X, label_smoothing=0.1, dtype=np.float64)
    for a, b in zip(model.parameters, expected.parameters, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert np.isnan(model.evaluate(X, soft)["accuracy"])
    assert np.isnan(model.fit(X, soft, epochs=1).accuracy[0])


def test_several_labels_a_sample(tmp_path: Path) -> None:
    y = np.random.default_rng(3).integers(0, 2, (30, 3))
    model = trained(X, y, output="sigmoid")
    assert model.multi_label
    assert np.array_equal(model.predict(X), model.predict_proba(X) > 0.5)
    logits = np.log(model.predict_proba(X.astype(np.float64)) / (1 - model.predict_proba(X)))
    loss = (np.log1p(np.exp(logits)) - y * logits).sum(axis=1).mean()
    assert model.evaluate(X, y)["loss"] == pytest.approx(loss, rel=1e-4)
    with pytest.raises(ValueError, match=r"y has shape \(30,\), expected rows \(n, 3\)"):
        model.evaluate(X, INDICES)
    model.save(tmp_path / "model")
    assert MLP.load(tmp_path / "model").multi_label
    with pytest.raises(ValueError, match=r"y\[4\] has \d ones; expected rows of exactly one 1"):
        trained(X, output="sigmoid").evaluate(X, np.where(np.arange(30)[:, None] == 4, 1, np.eye(3)[INDICES]))
    with pytest.raises(ValueError, match=r"y\[2, 1\] is 0\.5; expected rows of 0 and 1"):
        trained(X, np.where(np.arange(90).reshape(30, 3) == 7, 0.5, y), output="sigmoid")


def test_integers_beyond_all_measure() -> None:
    """Errors name the argument; Python refuses to write the larger ones. Seeds and mini-batches have any size."""
    x, y = np.ones((4, 2)), [0, 1, 0, 1]
    whole = MLP([2, 2], seed=0).fit(x, y, batch_size=4).loss
    assert all(MLP([2, 2], seed=0).fit(x, y, batch_size=size).loss == whole for size in (2**60, 10**400, 10**5000))
    for epochs, told in ((10**400, "an integer of 1329 bits"), (10**5000, "an integer of 16610 bits"), (2**60, 2**60)):
        with pytest.raises(ValueError, match=rf"epochs must be at most 2\*\*53, got {told}"):
            MLP([2, 2]).fit(x, y, epochs=epochs)
    with pytest.raises(ValueError, match="epochs must be at least 1, got an integer of 16610 bits"):
        MLP([2, 2]).fit(x, y, epochs=-(10**5000))
    with pytest.raises(ValueError, match="lr must be finite and at least 0, got an integer of 16610 bits"):
        Adam(10**5000)
    assert MLP([2, 2], seed=2**130).seed == 2**130
    assert GAN(2, [2], [1]).noise(1, seed=2**130).shape == (1, 2)


@pytest.mark.parametrize(
    "classes", [[1, 2**63 + 2, 2**63 + 4], [1, 2**64 - 2, 2**64 - 1], [2**60, 2**60 + 1, 2**60 + 2]]
)
@pytest.mark.parametrize("dtype", [np.uint64, object])
def test_large_integers_as_labels(classes: list[int], dtype: Any, tmp_path: Path) -> None:
    """None of them is taken for another one, as float64 would."""
    y = np.array(classes, dtype)[INDICES]
    model, expected = MLP([4, 3], seed=1), MLP([4, 3], seed=1)
    history = model.fit(X, y, epochs=2, validation_data=(X, y))
    assert history.validation_loss == expected.fit(X, INDICES, epochs=2, validation_data=(X, INDICES)).validation_loss
    model.save(tmp_path / "model")
    for each in (model, MLP.load(tmp_path / "model"), MLP([4, 3], classes=classes)):
        assert each.classes == classes
        assert set(each.predict(X).tolist()) <= set(classes)
        assert each.predict(X).dtype.kind in "iu"
        assert each.evaluate(X, y)["loss"] == each.evaluate(X, np.eye(3)[INDICES])["loss"]
    if classes[0] == 2**60:  # of another kind than the classes
        assert model.evaluate(X, y.astype(np.uint64)) == model.evaluate(X, y)
        with pytest.raises(ValueError, match=rf"y\[0\] is {2**60 + 3}; the classes"):
            model.evaluate(X, np.full(30, 2**60 + 3, np.uint64))


@pytest.mark.parametrize("labels", [[1, 2**63 + 2, 2**63 + 4], [-1, 2**63 + 2, 2**63 + 4], [0.0, 2.0**60, 1.0]])
def test_floats_that_are_several_integers(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"is [0-9]+; floats beyond 2\*\*53 are several integers at once"):
        MLP([4, 3]).fit(X, np.array(labels)[INDICES])
