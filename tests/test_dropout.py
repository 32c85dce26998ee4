"""Dropout: which units are left out, on every backend; what that does to outputs and gradients; and its arguments.

Likewise noise on inputs.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest

from gemmlet import use_backend
from gemmlet.formulas import dropout, input_noise
from gemmlet.formulas.random import STREAMS
from gemmlet.nn import GAN, MLP, SGD, Adam
from gemmlet.training.plan import SECOND_PASS, Activation, Dropout, UnsupportedError, dense_layers
from support import same_bits

X = np.random.default_rng(0).normal(size=(50, 70))
LABELS = np.random.default_rng(1).integers(0, 5, 50)


def kept(model: Any, layer: int, rate: float, step: int, rows: Any, units: int, stream: int = 0) -> Any:
    """Which inputs of a layer are kept, as the formula says."""
    number = STREAMS["dropout"] + layer + stream
    return dropout.kept(model._key, number, step, rows, units, dropout.threshold(rate))


# The formula.


@pytest.mark.parametrize("rate", [0.0, 2.0**-18, 2.0**-16, 0.1, 0.5, 0.8, 1 - 2.0**-16, math.nextafter(1, 0)])
def test_thresholds(rate: float) -> None:
    """Within half a unit of 2**-16, but at least one; the mean stays."""
    keep = dropout.threshold(rate)
    assert 1 <= keep <= dropout.ALL
    assert abs(keep / dropout.ALL - (1 - rate)) <= 2.0**-17 or keep == 1
    assert keep / dropout.ALL * dropout.scale(keep) == pytest.approx(1, abs=1e-15)
    assert dropout.kept(5, 256, 0, np.arange(2000), 1000, keep).all() == (keep == dropout.ALL)


def test_how_often_units_are_kept_and_that_they_are_independent() -> None:
    """Across units, rows, steps, layers, passes and seeds: within five standard deviations of what coins would do."""
    rows, units, rate = 60, 190, 0.3
    keep = dropout.threshold(rate)
    p, deviation = keep / dropout.ALL, math.sqrt(rate * (1 - rate))

    def drawn(seed: int = 7, stream: int = 256, step: int = 0, first: int = 0) -> Any:
        return dropout.kept(seed, stream, step, first + np.arange(rows), units, keep) - p

    first = drawn()
    count = math.sqrt(first.size)
    assert abs(first.mean()) < 5 * deviation / count
    assert np.abs(first.mean(axis=0)).max() < 5 * deviation / math.sqrt(rows)
    assert np.abs(first.mean(axis=1)).max() < 5 * deviation / math.sqrt(units)
    others = [drawn(seed=8), drawn(stream=257), drawn(stream=256 + SECOND_PASS), drawn(step=1), drawn(step=1 << 33)]
    others += [drawn(first=rows), drawn(first=dropout.INPUT_ROWS), *(np.roll(first, i, 0) for i in (1, 2, 7))]
    others += [np.roll(first, i, axis=1) for i in (*range(1, 33), 64, 128)]
    for other in others:
        assert abs(np.mean(first * other)) < 5 * deviation**2 / count


def test_rows_of_several_inputs_have_places_of_their_own() -> None:
    places = dropout.places(7, 3)
    assert places.tolist() == [0, 1, 2, 2**32, 2**32 + 1, 2**32 + 2, 2**33]


def test_units_do_not_depend_on_how_many_there_are() -> None:
    many = dropout.kept(1, 256, 3, np.arange(4), 200, 30000)
    for units in (1, 63, 64, 65, 199):
        np.testing.assert_array_equal(dropout.kept(1, 256, 3, np.arange(4), units, 30000), many[:, :units])


# What is left out of a step.


@pytest.mark.parametrize("units", [1, 7, 33, 64, 65, 200])
def test_which_weights_a_step_leaves_alone(units: int, backend: Any, dtype: Any) -> None:
    """Of a single sample those of the units that are left out, of inputs and of a hidden layer."""
    model = MLP([units, units, 3], "sigmoid", "identity", dtype=dtype, dropout=0.4, input_dropout=0.6, seed=2**70 + 1)
    model.parameters[0][...] = 0.01
    for step in range(6):
        model.steps, before = (1 << 33) + step, [p.copy() for p in model.parameters]
        model.fit(np.ones((1, units)), np.ones((1, 3)), epochs=1, optimizer=SGD(1e-3))
        for layer, rate in ((0, 0.6), (1, 0.4)):
            changed = (model.parameters[2 * layer] != before[2 * layer]).any(axis=1)
            expected = kept(model, layer, rate, (1 << 33) + step, [0], units)[0]
            if layer == 0 and not kept(model, 1, 0.4, (1 << 33) + step, [0], units).any():
                expected[:] = False  # no gradient comes through
            np.testing.assert_array_equal(changed, expected)


def noise_of(model: Any, deviation: float, step: int, rows: Any, units: int, stream: int = 0) -> Any:
    drawn = input_noise.noise(model._key, STREAMS["input noise"] + stream, step, rows, units)
    return deviation * drawn / input_noise.DEVIATION


def test_noise_is_nearly_normal_and_independent() -> None:
    """Mean, deviation and quantiles; across units, rows, steps, streams and seeds no correlation."""
    rows, units = 80, 250

    def drawn(seed: int = 7, stream: int = 255, step: int = 0, first: int = 0) -> Any:
        return input_noise.noise(seed, stream, step, first + np.arange(rows), units) / input_noise.DEVIATION

    first = drawn()
    count = math.sqrt(first.size)
    assert abs(first.mean()) < 5 / count
    assert abs(first.std() - 1) < 5 / count
    assert 3 < np.abs(first).max() < 3.46
    for quantile, share in ((1.0, 0.8413), (2.0, 0.9772)):  # of the normal distribution
        assert abs((first < quantile).mean() - share) < 0.01
    others = [drawn(seed=8), drawn(stream=256), drawn(stream=255 + SECOND_PASS), drawn(step=1), drawn(step=1 << 33)]
    others += [drawn(first=rows), drawn(first=dropout.INPUT_ROWS), *(np.roll(first, i, 0) for i in (1, 2, 7))]
    others += [np.roll(first, i, axis=1) for i in (*range(1, 33), 64, 128)]
    for other in others:
        assert abs(np.mean(first * other)) < 5 / count
    np.testing.assert_array_equal(
        input_noise.noise(7, 255, 0, np.arange(rows), 33), input_noise.noise(7, 255, 0, np.arange(rows), units)[:, :33]
    )


def test_gradients_with_noise_are_those_of_pytorch(backend: Any) -> None:
    """The noise comes before dropout, and no gradient sees it."""
    model = MLP([70, 33, 5], dtype=np.float64, input_dropout=0.25, input_noise=0.3, seed=2**80)
    rows, keep = np.arange(len(X)), dropout.threshold(0.25)
    mask = kept(model, 0, 0.25, 9, rows, 70) * dropout.scale(keep)
    loss, gradients = model.loss_and_gradients(X, LABELS, 9)
    noisy = X + noise_of(model, 0.3, 9, rows, 70)
    expected, wanted = torch_gradients(model, noisy, LABELS, [mask, np.ones((1, 33))])
    assert loss == pytest.approx(expected, rel=1e-10)
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)
    plain = torch_gradients(model, X, LABELS, [np.ones((1, 70)), np.ones((1, 33))])
    assert model.loss_and_gradients(X, LABELS)[0] == pytest.approx(plain[0], rel=1e-10)


@pytest.mark.parametrize("step", [0, 4])
def test_noise_of_a_gan(step: int, backend: Any) -> None:
    """Other noise on samples than on what is generated, and other noise in the generator's pass."""
    gan = GAN(4, [9, 70], [1], dtype=np.float64, discriminator_input_noise=0.3, label_smoothing=0.0)
    x, z = np.random.default_rng(2).uniform(size=(6, 70)), np.random.default_rng(3).normal(size=(6, 4))
    made = 2 * gan.sample(z=z) - 1  # the average is the generator itself yet
    weight, bias = gan.discriminator_parameters

    def judged(rows: Any, places: Any, stream: int) -> Any:
        return (rows + noise_of(gan, 0.3, step, places, 70, stream)) @ weight + bias

    places = dropout.places(12, 6)
    outputs = judged(np.concatenate([2 * x - 1, made]), places, 0)
    loss = (np.logaddexp(0, -outputs[:6]) + np.logaddexp(0, outputs[6:])).mean()
    assert gan.discriminator_loss_and_gradients(x, z, step=step)[0] == pytest.approx(loss, rel=1e-10)
    loss = np.logaddexp(0, -judged(made, places[:6], SECOND_PASS)).mean()
    assert gan.generator_loss_and_gradients(z, step=step)[0] == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("units", [1, 15, 17, 32, 33, 70, 200])
def test_the_bits_of_noisy_inputs(units: int, training: Any, dtype: Any) -> None:
    """Where the gradient of the only output is 1, a step from 0 leaves the inputs, negative, in the weights."""
    model = MLP([units, 1], output="identity", dtype=dtype, input_noise=0.3, seed=2**70)
    for parameter in model.parameters:
        parameter[...] = 0
    x = np.random.default_rng(7).normal(size=(1, units)).astype(dtype)
    model.steps = (1 << 33) + 5
    model.fit(x, np.full((1, 1), -0.5, dtype), epochs=1, optimizer=SGD(1.0))
    integers = input_noise.noise(model._key, STREAMS["input noise"], (1 << 33) + 5, [0], units).astype(dtype)
    assert same_bits(model.parameters[0], -(x + dtype.type(0.3 / input_noise.DEVIATION) * integers).T)


@pytest.mark.parametrize("form", ["bytes", "floats", "wide", "gan", "gan with a penalty"])
def test_fused_training_with_noise(form: str, any_threads_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the reference, and the same bits for any number of threads."""
    if any_threads_backend.name != "cpu":
        pytest.skip("the reference trains")

    def run() -> list[Any]:
        if form.startswith("gan"):
            penalty = {} if form == "gan" else {"gradient_penalty": 0.5, "discriminator_activation": "leaky_relu"}
            model: Any = GAN(5, [30, 70], [40, 1], dtype=np.float64, discriminator_input_noise=0.3, **penalty)
        else:
            hidden = [700, 400] if form == "wide" else [40]
            model = MLP([70, *hidden, 5], dtype=np.float64, input_noise=0.3, input_dropout=0.2 * (form == "floats"))
        x = X if form == "floats" else (255 * np.random.default_rng(5).random((50, 70))).astype(np.uint8)
        history = model.fit(*((x,) if form.startswith("gan") else (x, LABELS)), 3, 16, Adam(0.01, eps=1e-3))
        parameters = [array for dense in model._parts().values() for array in dense.parameters]
        names = ["generator_loss", "discriminator_loss"] if form.startswith("gan") else ["loss", "accuracy"]
        return parameters + [np.array(getattr(history, name)) for name in names]

    results = []
    for threads in (1, 2):
        any_threads_backend.set_num_threads(threads)
        results.append(run())
    assert all(map(same_bits, *results))
    monkeypatch.setattr(type(any_threads_backend), "supports_fused", lambda self, plan: False)
    expected = run()
    assert not all(map(same_bits, results[0], expected))  # two executors
    for a, b in zip(results[0], expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["bytes", "csr", "gan"])
def test_training_with_noise(form: str, training: Any, dtype: Any) -> None:
    """A step is that of the noisy samples; calls and fits change no bit; and only training has it."""
    rng = np.random.default_rng(6)
    x: Any = rng.integers(1, 256, (50, 70), np.uint8) * (rng.random((50, 70)) < 0.2)
    given: Any = x
    if form == "csr":
        given = pytest.importorskip("scipy.sparse").csr_array(x.astype(dtype) / 255)
    rates = {"input_noise": 0.2, "input_dropout": 0.3}

    def make(**rates: float) -> Any:
        if form != "gan":
            return MLP([70, 40, 5], dtype=dtype, **rates)
        return GAN(5, [30, 70], [20, 1], dtype=dtype, **{f"discriminator_{name}": v for name, v in rates.items()})

    expected = fitted(make(**rates), given, shuffle=False, optimizer="sgd")
    model = make(**rates)
    for _ in range(3):
        result = fitted(model, given, shuffle=False, optimizer="sgd", epochs=1)
    assert all(map(same_bits, expected, result))
    assert not all(map(same_bits, expected, fitted(make(input_dropout=0.3), given, shuffle=False, optimizer="sgd")))
    if form == "bytes":
        assert same_bits(make(**rates).predict_proba(x), make().predict_proba(x))
        step = make(input_noise=0.2)
        noisy = x.astype(dtype) / dtype.type(255) + noise_of(step, 0.2, 0, np.arange(50), 70)
        twin = make()
        for each, samples in ((step, x), (twin, noisy.astype(dtype))):
            fitted(each, samples, shuffle=False, optimizer=SGD(0.1), epochs=1, batch_size=50)
        for a, b in zip(step.parameters, twin.parameters, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", None])
def test_noise_that_cannot_be(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^input_noise must be"):
        MLP([4, 3, 2], input_noise=value)
    with pytest.raises((TypeError, ValueError), match=r"^discriminator_input_noise must be"):
        GAN(2, [3, 4], [5, 1], discriminator_input_noise=value)


def torch_gradients(model: MLP, x: Any, y: Any, masks: list[Any]) -> tuple[float, list[Any]]:
    torch = pytest.importorskip("torch")
    parameters = [torch.tensor(p, requires_grad=True) for p in model.parameters]
    h = torch.tensor(x)
    for i, factors in enumerate(masks):
        h = (h * torch.tensor(factors)) @ parameters[2 * i] + parameters[2 * i + 1]
        h = torch.tanh(h) if i + 1 < len(masks) else h
    loss = torch.nn.functional.cross_entropy(h, torch.tensor(y))
    loss.backward()
    return float(loss.detach()), [p.grad.numpy() for p in parameters]


@pytest.mark.parametrize("step", [0, 3, 1 << 35])
def test_gradients_are_those_of_pytorch(step: int, backend: Any) -> None:
    rates, layers = [0.1, 0.5, 0.25], [70, 33, 20, 5]
    model = MLP(layers, dtype=np.float64, dropout=rates[1:], input_dropout=rates[0], seed=4)
    rows = np.arange(len(X))
    keeps = [dropout.threshold(rate) for rate in rates]
    masks = [
        kept(model, i, rate, step, rows, layers[i]) * dropout.scale(keep)
        for i, (rate, keep) in enumerate(zip(rates, keeps, strict=True))
    ]
    loss, gradients = model.loss_and_gradients(X, LABELS, step)
    expected, wanted = torch_gradients(model, X, LABELS, masks)
    assert loss == pytest.approx(expected, rel=1e-10)
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)
    plain = torch_gradients(model, X, LABELS, [np.ones((1, width)) for width in layers[:-1]])
    assert model.loss_and_gradients(X, LABELS)[0] == pytest.approx(plain[0], rel=1e-10)
    assert abs(loss - plain[0]) > 1e-3


def test_gradients_of_a_gan_are_those_of_pytorch(backend: Any) -> None:
    """The discriminator's with other units left out of samples and of what is generated; the generator's by others."""
    torch = pytest.importorskip("torch")
    gan = GAN(4, [9, 70], [40, 1], dtype=np.float64, generator_activation="tanh", discriminator_activation="tanh",
              discriminator_dropout=0.5, discriminator_input_dropout=0.2, label_smoothing=0.0)  # fmt: skip
    x, z, step = np.random.default_rng(2).uniform(size=(6, 70)), np.random.default_rng(3).normal(size=(6, 4)), 5
    g, d = (
        [torch.tensor(p, requires_grad=True) for p in ps]
        for ps in (gan.generator_parameters, gan.discriminator_parameters)
    )

    def judged(rows: Any, places: Any, stream: int) -> Any:
        keeps = dropout.threshold(0.2), dropout.threshold(0.5)
        factors = [
            torch.tensor(kept(gan, i, rate, step, places, units, stream) * dropout.scale(keep))
            for i, (rate, units, keep) in enumerate(zip((0.2, 0.5), (70, 40), keeps, strict=True))
        ]
        return (torch.tanh((rows * factors[0]) @ d[0] + d[1]) * factors[1]) @ d[2] + d[3]

    made = torch.tanh(torch.tanh(torch.tensor(z) @ g[0] + g[1]) @ g[2] + g[3])
    places = dropout.places(12, 6)
    outputs = judged(torch.cat([torch.tensor(2 * x - 1), made]), places, 0)
    softplus = torch.nn.functional.softplus
    loss = (softplus(-outputs[:6]) + softplus(outputs[6:])).mean()
    wanted = torch.autograd.grad(loss, d, retain_graph=True)
    value, gradients = gan.discriminator_loss_and_gradients(x, z, step=step)
    assert value == pytest.approx(float(loss.detach()), rel=1e-10)
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=1e-10)
    loss = softplus(-judged(made, places[:6], SECOND_PASS)).mean()
    wanted = torch.autograd.grad(loss, g)
    value, gradients = gan.generator_loss_and_gradients(z, step=step)
    assert value == pytest.approx(float(loss.detach()), rel=1e-10)
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=1e-10)


def made(kind: str, dtype: Any) -> Any:
    noise = 0.2 * kind.startswith("noisy")
    if kind.endswith("gan"):
        widths = [700, 400, 1] if kind == "wide gan" else [40, 1]
        rates = {"dropout": 0.4, "input_dropout": 0.2, "input_noise": noise}
        return GAN(5, [30, 70], widths, dtype=dtype, **{f"discriminator_{name}": v for name, v in rates.items()})
    hidden = [700, 400] if kind == "wide mlp" else [40, 30]
    return MLP([70, *hidden, 5], "relu", dtype=dtype, dropout=[0.5, 0.25], input_dropout=0.2, input_noise=noise)


def fitted(model: Any, x: Any = None, **arguments: Any) -> list[Any]:
    x = (255 * np.random.default_rng(5).random((50, 70))).astype(np.uint8) if x is None else x
    data = (x,) if isinstance(model, GAN) else (x, LABELS)
    model.fit(*data, **{"epochs": 3, "batch_size": 16} | arguments)
    return [array for dense in model._parts().values() for array in dense.parameters]


KINDS = ["mlp", "wide mlp", "gan"]
NOISY = ["noisy mlp", "noisy gan"]


@pytest.mark.parametrize("kind", [*KINDS, "wide gan", *NOISY])
def test_a_fit_is_that_of_the_reference(kind: str, training: Any) -> None:
    """Each pass of each step leaves out the same units."""
    options: Any = {"epochs": 1, "optimizer": SGD(0.1)}
    results = fitted(made(kind, np.float64), **options)
    with use_backend("numpy"):
        expected = fitted(made(kind, np.float64), **options)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS + NOISY)
def test_same_bits_for_any_number_of_threads(kind: str, any_threads_backend: Any, dtype: Any) -> None:
    results = []
    for threads in (1, 2, 3):
        any_threads_backend.set_num_threads(threads)
        results.append(fitted(made(kind, dtype)))
    if any_threads_backend.name == "cpu":  # a BLAS may add in another order
        assert all(map(same_bits, results[0], results[1]))
        assert all(map(same_bits, results[0], results[2]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_of_a_fit_change_no_bit(kind: str, training: Any, dtype: Any) -> None:
    """A mini-batch a call, several, or a fit for each epoch: the steps count on."""
    expected = fitted(made(kind, dtype), shuffle=False, optimizer="sgd")
    assert all(map(same_bits, expected, fitted(made(kind, dtype), shuffle=False, optimizer="sgd", callback=len_of)))
    model = made(kind, dtype)
    for _ in range(3):
        result = fitted(model, shuffle=False, optimizer="sgd", epochs=1)
    assert all(map(same_bits, expected, result))


def len_of(progress: Any) -> None:
    """A callback that does nothing."""


@pytest.mark.parametrize("form", ["bytes", "few values", "floats", "csr"])
@pytest.mark.parametrize("batch", [1, 16, 50])
def test_dropped_inputs_and_skipped_zeros(
    form: str, batch: int, any_threads_backend: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits whether zeros are skipped or not; also of a sparse matrix."""
    rng = np.random.default_rng(6)
    x: Any = rng.integers(1, 256, (50, 70), np.uint8) * (rng.random((50, 70)) < 0.2)
    if form != "bytes":
        x = (x / 128 if form == "few values" else rng.normal(size=x.shape) * (x != 0)).astype(dtype)
    given = pytest.importorskip("scipy.sparse").csr_array(x) if form == "csr" else x
    results = []
    for skips, samples in ((True, given), (False, x)):
        monkeypatch.setattr("gemmlet.nn.dataset.SPARSE_BELOW", 2.0 if skips else -1.0)
        model = MLP([70, 40, 5], "tanh", dtype=dtype, input_dropout=0.3, dropout=0.5)
        results.append(fitted(model, samples, batch_size=batch, optimizer=SGD(0.1)))
    exact = any_threads_backend.name == "cpu"
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b) if exact else np.allclose(a, b, rtol=0, atol=1e-5)


def test_dropped_numbers_that_are_not_finite_do_no_harm(backend: Any, dtype: Any) -> None:
    """A hidden unit that overflows is left out like any other one."""
    x = np.ones((4, 3), dtype)
    model = MLP([3, 64, 2], "relu", "identity", dtype=dtype, dropout=0.5, seed=3)
    dropped = ~kept(model, 1, 0.5, 0, [0, 1, 2, 3], 64).any(axis=0)
    assert dropped.any()
    model.parameters[1][dropped] = np.inf
    loss, gradients = model.loss_and_gradients(x, np.zeros((4, 2)), 0)
    assert math.isfinite(loss)
    assert np.isfinite(gradients[2]).all()


def test_only_training_drops(backend: Any, dtype: Any) -> None:
    plain, model = MLP([70, 40, 5], dtype=dtype), MLP([70, 40, 5], dtype=dtype, dropout=0.5, input_dropout=0.5)
    assert same_bits(plain.predict_proba(X), model.predict_proba(X))
    assert plain.evaluate(X, LABELS) == model.evaluate(X, LABELS)
    assert plain.loss_and_gradients(X, LABELS)[0] == model.loss_and_gradients(X, LABELS)[0]
    history = model.fit(X, LABELS, epochs=1, batch_size=50, optimizer=SGD(0.0), validation_data=(X, LABELS))
    assert history.validation_loss == [plain.evaluate(X, LABELS)["loss"]]
    assert abs(history.loss[0] - history.validation_loss[0]) > 1e-3


def test_rates_of_nothing_change_no_bit(training: Any, dtype: Any) -> None:
    plain = fitted(MLP([70, 40, 30, 5], dtype=dtype))
    for rates in ({"dropout": 0, "input_dropout": 0.0}, {"dropout": [0, 0]}, {"dropout": (1e-9, 0.0)}):
        assert all(map(same_bits, plain, fitted(MLP([70, 40, 30, 5], dtype=dtype, **rates))))
    half = fitted(MLP([70, 40, 30, 5], dtype=dtype, dropout=[0, 0.5]))
    assert not same_bits(plain[0], half[0])


def test_every_seed_drops_others() -> None:
    seeds = 0, 1, 2**64, 2**64 + 1, 2**200
    keys = [MLP([2, 2], seed=seed)._key for seed in seeds]
    assert len(set(keys)) == len(seeds)
    assert all(0 <= key < 2**64 for key in keys)


def test_dropout_fights_overfitting(backend: Any) -> None:
    """A network that knows its 60 training samples by heart does better on others with it, of five seeds in all."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 30))
    y, other = rng.integers(0, 4, 60), rng.integers(0, 4, 2000)
    x, tested = (centers[labels] + 2.5 * rng.normal(size=(len(labels), 30)) for labels in (y, other))
    losses = dict.fromkeys((0.0, 0.5), 0.0)
    for rate, seed in itertools.product(losses, range(5)):
        model = MLP([30, 64, 4], "relu", seed=seed, dropout=rate, input_dropout=rate / 2)
        model.fit(x, y, epochs=60, batch_size=20, optimizer=Adam(1e-2))
        losses[rate] += model.evaluate(tested, other)["loss"]
    assert losses[0.5] < 0.8 * losses[0.0]


# Plans.


def test_a_dropout_belongs_to_the_layer_after_it() -> None:
    (linear,) = MLP([3, 2])._plan(MLP([3, 2])._samples(np.zeros((1, 3))), np.zeros(1, np.int64)).networks[0]
    first, second = Dropout(0.5, 256, 0), Dropout(0.25, 257, 0)
    layers = dense_layers((first, linear, Activation("tanh", 0.0), second, linear))
    assert [layer.dropout for layer in layers] == [first, second]
    assert [layer.activation for layer in layers] == ["tanh", None]
    for odd in ((linear, first), (first, second, linear), (linear, first, Activation("tanh", 0.0), linear)):
        with pytest.raises(UnsupportedError):
            dense_layers(odd)


# Arguments.


@pytest.mark.parametrize(
    ("layers", "rates", "message"),
    [
        ([4, 3, 2], {"dropout": 1.0}, "dropout must be below 1, got 1"),
        ([4, 3, 2], {"dropout": -0.1}, r"dropout must be within \[0, 1\], got -0.1"),
        ([4, 3, 2], {"input_dropout": math.nan}, r"input_dropout must be within \[0, 1\], got nan"),
        ([4, 3, 2], {"dropout": [0.5, 0.5]}, "dropout must have one rate for each of 1 hidden layers, got 2"),
        ([4, 3, 3, 2], {"dropout": [0.5, 1]}, r"dropout\[1\] must be below 1, got 1"),
        ([4, 2], {"dropout": 0.5}, "dropout needs a hidden layer, this network has none"),
    ],
)
def test_rates_that_cannot_be(layers: list[int], rates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MLP(layers, **rates)
    model = MLP(layers)
    ((name, value),) = rates.items()
    with pytest.raises(ValueError, match=f"^{message}"):
        setattr(model, name, value)
    of_gan = {f"discriminator_{name}": value}
    with pytest.raises(ValueError, match=f"^discriminator_{message}"):
        GAN(2, [3, layers[0]], [*layers[1:-1], 1], **of_gan)


@pytest.mark.parametrize(
    "value", ["0.5", None, True, [0.5, "0"], {}, {0: 0.5, 1: 0.5}, {0.5, 0.25}, np.zeros((2, 2))], ids=repr
)
def test_rates_of_another_type(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^dropout"):
        MLP([4, 3, 3, 2], dropout=value)
    with pytest.raises(TypeError, match=r"^input_dropout must be a real number"):
        MLP([4, 3, 3, 2], input_dropout=value)


@pytest.mark.parametrize("step", [-1, 0.5, "0", True, 2**60])
def test_a_step_that_cannot_be(step: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^step must be"):
        MLP([70, 5]).loss_and_gradients(X, LABELS, step)
    with pytest.raises((TypeError, ValueError), match=r"^step must be"):
        GAN(2, [3, 4], [5, 1]).generator_loss_and_gradients(np.ones((2, 2)), step=step)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files_have_the_rates(kind: str, tmp_path: Any) -> None:
    model = made(kind, np.dtype(np.float32))
    model.save(path := tmp_path / "model")
    for other in (type(model).load(path), copy.deepcopy(model)):
        assert repr(other) == repr(model)
        assert "dropout=" in repr(model)
        assert all(map(same_bits, fitted(copy.deepcopy(model)), fitted(other)))


@pytest.mark.parametrize("kind", KINDS + NOISY)
def test_a_training_goes_on_with_the_same_bits(kind: str, training: Any, tmp_path: Any) -> None:
    """Ended in the midst of an epoch, from its checkpoint; a network of other rates is another one."""

    class Killed(Exception):  # noqa: N818 - it stands for a signal
        pass

    def kill(progress: Any) -> None:
        if (progress.epoch, progress.batch) == (2, 3):
            raise Killed

    expected, path = fitted(made(kind, np.dtype(np.float32))), tmp_path / "checkpoint"
    with pytest.raises(Killed):
        fitted(made(kind, np.dtype(np.float32)), checkpoint=path, callback=kill)
    assert all(map(same_bits, fitted(made(kind, np.dtype(np.float32)), resume=path), expected))
    other = made(kind, np.dtype(np.float32))
    name = "discriminator_input_dropout" if kind.endswith("gan") else "input_dropout"
    setattr(other, name, 0.25)
    with pytest.raises(ValueError, match=rf"checkpoint of another fit: {name} was 0\.2, is 0\.25"):
        fitted(other, resume=path)


def test_rates_may_change_between_fits(training: Any) -> None:
    model, plain = MLP([70, 40, 30, 5], dropout=np.array([0.5, 0.5])), MLP([70, 40, 30, 5])
    assert model.dropout == [0.5, 0.5]
    model.dropout = 0
    assert repr(model) == repr(plain)
    assert all(map(same_bits, fitted(model), fitted(plain)))
