"""The generative adversarial network: both losses' gradients against PyTorch, learning, files, and bad arguments."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_on_host.backend import skip_long
from gemmlet.nn import GAN, MLP, SGD, Adam, Augment, ClipNorm, GANProgress, StopTraining, interpolate
from support import same_bits

# Gradients.


class TorchGAN:
    """The same networks in PyTorch, with the parameters of a `GAN`; `y`: the classes of samples, if there are some."""

    def __init__(self, gan: GAN, y: Any = None) -> None:
        self.torch = pytest.importorskip("torch")
        self.gan, self.y = gan, y
        self.g = [self.torch.tensor(p, requires_grad=True) for p in gan.generator_parameters]
        self.d = [self.torch.tensor(p, requires_grad=True) for p in gan.discriminator_parameters]

    def activation(self, name: str) -> Any:
        functional = self.torch.nn.functional
        if name == "leaky_relu":
            return lambda x: functional.leaky_relu(x, 0.2)
        functions = {"gelu": functional.gelu, "silu": functional.silu, "identity": lambda x: x}
        return {"tanh": self.torch.tanh, "relu": functional.relu, **functions}[name]

    def stack(self, parameters: list[Any], x: Any, activation: Any) -> Any:
        for i in range(0, len(parameters), 2):
            x = x @ parameters[i] + parameters[i + 1]
            if i + 2 < len(parameters):
                x = activation(x)
        return x

    def with_classes(self, x: Any) -> Any:
        if self.y is None:
            return x
        one_hot = self.torch.nn.functional.one_hot(self.torch.tensor(self.y), self.gan.n_classes)
        return self.torch.cat([x, one_hot.to(x.dtype)], 1)

    def generate(self, z: Any) -> Any:
        x = self.stack(self.g, self.with_classes(self.torch.tensor(z)), self.activation(self.gan.generator_activation))
        return self.torch.tanh(x) if self.gan.generator_output == "tanh" else self.torch.sigmoid(x)

    def logits(self, x: Any) -> Any:
        return self.stack(self.d, self.with_classes(x), self.activation(self.gan.discriminator_activation))

    def discriminator_loss(self, x: Any, z: Any) -> Any:
        real = self.torch.tensor(2 * x - 1 if self.gan.generator_output == "tanh" else x)
        fake = self.generate(z).detach()
        d, d_of_fake = self.logits(real), self.logits(fake)
        if self.gan.loss == "hinge":
            return self.torch.relu(1 - d).mean() + self.torch.relu(1 + d_of_fake).mean()
        if self.gan.loss == "wasserstein":
            return d_of_fake.mean() - d.mean()
        p, q, t = d.sigmoid(), d_of_fake.sigmoid(), 1 - self.gan.label_smoothing
        return -(t * p.log() + (1 - t) * (1 - p).log()).mean() - (1 - q).log().mean()

    def penalty(self, x: Any) -> Any:
        """What the gradient penalty adds to the discriminator's loss, for a quarter of the samples."""
        real, y = self.torch.tensor(2 * x - 1 if self.gan.generator_output == "tanh" else x), self.y
        real = real[: -(-len(x) // 4)].requires_grad_()
        self.y = None if y is None else y[: len(real)]
        logits = self.stack(self.d, self.with_classes(real), self.activation(self.gan.discriminator_activation))
        self.y = y
        (grad,) = self.torch.autograd.grad(logits.sum(), real, create_graph=True)
        return self.gan.gradient_penalty / 2 * grad.square().sum(1).mean()

    def generator_loss(self, z: Any) -> Any:
        logits = self.logits(self.generate(z))
        if self.gan.loss in ("hinge", "wasserstein"):
            return -logits.mean()
        q = logits.sigmoid()
        return (1 - q).log().mean() if self.gan.loss == "minimax" else -q.log().mean()


VARIANTS = {
    "default": {},
    "minimax": {"loss": "minimax"},
    "no smoothing": {"label_smoothing": 0.0},
    "hinge": {"loss": "hinge"},
    "wasserstein": {"loss": "wasserstein", "gradient_penalty": 1.0, "n_classes": 3},
    "sigmoid": {"generator_output": "sigmoid", "loss": "minimax"},
    "deep": {"generator": [6, 7, 4], "discriminator": [8, 5, 6, 1]},
    "no hidden layers": {"generator": [4], "discriminator": [1]},
    "needs z": {"generator_activation": "gelu", "discriminator_activation": "silu", "loss": "minimax"},
    "tanh": {"generator_activation": "tanh", "discriminator_activation": "tanh"},
    "classes": {"n_classes": 3, "generator": [6, 7, 4]},
    "penalty": {"gradient_penalty": 0.7, "discriminator": [9, 8, 7, 1]},
    "penalty, relu": {"gradient_penalty": 20.0, "discriminator_activation": "relu", "generator_output": "sigmoid"},
    "penalty, one layer": {"gradient_penalty": 2.0, "discriminator": [1], "n_classes": 2},
    "penalty, classes": {"gradient_penalty": 3.0, "discriminator_activation": "identity", "n_classes": 3},
    "classes, no hidden layers": {
        "n_classes": 2,
        "generator": [4],
        "discriminator": [1],
        "generator_output": "sigmoid",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant: str, backend: object, rng: np.random.Generator) -> None:
    gan = GAN(**{"latent_dim": 3, "generator": [6, 4], "discriminator": [5, 1], "dtype": "float64"} | VARIANTS[variant])
    for parameters in (gan.generator_parameters, gan.discriminator_parameters):
        for bias in parameters[1::2]:  # zeros would hide a mistake
            bias[...] = rng.normal(size=bias.shape)
    x, z = rng.uniform(size=(11, 4)), rng.normal(size=(11, 3))
    y = rng.integers(0, gan.n_classes, 11) if gan.n_classes else None
    theirs = TorchGAN(gan, y)

    expected = theirs.discriminator_loss(x, z)
    (expected + (theirs.penalty(x) if gan.gradient_penalty else 0.0)).backward()
    loss, gradients = gan.discriminator_loss_and_gradients(x, z, y)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    check(gradients, theirs.d)

    for tensor in theirs.d:
        tensor.grad = None
    expected = theirs.generator_loss(z)
    expected.backward()
    loss, gradients = gan.generator_loss_and_gradients(z, y)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    check(gradients, theirs.g)


def check(gradients: list[Any], tensors: list[Any]) -> None:
    assert len(gradients) == len(tensors)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        exact = tensor.grad.numpy()
        if exact.any():
            assert np.abs(gradient - exact).max() <= 1e-10 * np.abs(exact).max()
        else:  # of the bias of a last layer, from which a loss that is linear learns nothing
            assert np.abs(gradient).max() <= 1e-14


@pytest.mark.parametrize(
    ("norms", "n_classes", "penalty"),
    [(None, 0, 0.0), ((0.02, 0.1), 0, 0.0), (None, 3, 0.0), (None, 0, 2.0), (None, 3, 0.5)],
    ids=["", "clipped", "classes", "penalty", "classes and penalty"],
)
def test_training_agrees_with_pytorch(
    norms: Any, n_classes: int, penalty: float, backend: object, rng: np.random.Generator
) -> None:
    """Some steps of both networks and of the moving average, with the noise that `fit` draws."""
    settings = {"n_classes": n_classes, "gradient_penalty": penalty, "dtype": "float64", "ema_decay": 0.5, "seed": 3}
    gan, twin = (GAN(3, [6, 4], [5, 7, 1], **settings) for _ in range(2))
    y = rng.integers(0, n_classes, 10) if n_classes else None
    theirs = TorchGAN(twin)
    torch = theirs.torch
    x = rng.uniform(size=(10, 4))
    rules = [torch.optim.Adam(p, lr=2e-4, betas=(0.5, 0.999)) for p in (theirs.g, theirs.d)]
    averages = [t.detach().clone() for t in theirs.g]
    losses = []

    def clip(tensors: list[Any], max_norm: float) -> None:
        norm = torch.cat([tensor.grad.ravel() for tensor in tensors]).norm()
        assert norm > max_norm
        for tensor in tensors:
            tensor.grad *= max_norm / norm

    for step in range(6):
        part = x[:4], x[4:8], x[8:]
        theirs.y = None if y is None else np.split(y, [4, 8])[step % 3]
        z = twin._draw(twin._training_noise, len(part[step % 3]))
        rules[1].zero_grad()
        loss_d = theirs.discriminator_loss(part[step % 3], z)
        (loss_d + (theirs.penalty(part[step % 3]) if penalty else 0.0)).backward()
        if norms:
            clip(theirs.d, norms[1])
        rules[1].step()
        rules[0].zero_grad()
        loss_g = theirs.generator_loss(z)
        loss_g.backward()
        if norms:
            clip(theirs.g, norms[0])
        rules[0].step()
        losses.append((loss_g.item(), loss_d.item()))
        decay = min(0.5, (2 + step) / (11 + step))
        averages = [decay * a + (1 - decay) * t.detach() for a, t in zip(averages, theirs.g, strict=True)]
    adam = gan.default_optimizer
    ours = [ClipNorm(adam.fresh(), norm) for norm in norms] if norms else [None, None]
    history = gan.fit(x, 2, 4, *ours, shuffle=False, y=y)
    assert gan.steps == 6
    for ours, tensors in ((gan.generator_parameters, theirs.g), (gan.discriminator_parameters, theirs.d)):
        for param, tensor in zip(ours, tensors, strict=True):
            np.testing.assert_allclose(param, tensor.detach().numpy(), rtol=1e-9, atol=1e-12)
    for epoch in range(2):
        means = np.average(losses[3 * epoch : 3 * epoch + 3], axis=0, weights=[4, 4, 2])
        assert [history.generator_loss[epoch], history.discriminator_loss[epoch]] == pytest.approx(means, rel=1e-9)
    z = gan.noise(5)
    theirs.g, theirs.y = averages, None if y is None else y[:5]
    np.testing.assert_allclose(gan.sample(z=z, label=theirs.y), (theirs.generate(z).numpy() + 1) / 2, rtol=1e-9)


# Learning.


def ring(rng: np.random.Generator, n: int) -> Any:
    """Points near a circle within the unit square."""
    angle = rng.uniform(0, 2 * np.pi, n)
    radius = 0.35 + 0.02 * rng.normal(size=n)
    return np.clip(0.5 + radius[:, np.newaxis] * np.stack([np.cos(angle), np.sin(angle)], axis=1), 0, 1).astype(
        np.float32
    )


@pytest.mark.parametrize("loss", ["non_saturating", "minimax", "hinge", "wasserstein"])
def test_learns_a_ring(loss: str, any_threads_backend: object, rng: np.random.Generator) -> None:
    skip_long(any_threads_backend)
    x = ring(rng, 2048)
    # Without a bound of its own, the critic needs one; it learns more slowly with it.
    penalty, bound = (1.0, 0.08) if loss == "wasserstein" else (0.0, 0.04)
    gan = GAN(8, [64, 64, 2], [64, 64, 1], loss=loss, gradient_penalty=penalty, ema_decay=0.99)
    before = gan.sample(1000)
    history = gan.fit(x, epochs=40, batch_size=64, optimizer=Adam(2e-3, beta1=0.5))
    points = gan.sample(1000).astype(np.float64)
    assert len(history.generator_loss) == len(history.discriminator_loss) == 40

    def off_the_ring(p: Any) -> float:
        return float(np.mean(np.abs(np.hypot(*(p - 0.5).T) - 0.35)))

    def in_the_quarters(p: Any) -> Any:
        return np.bincount(2 * (p[:, 0] > 0.5) + (p[:, 1] > 0.5), minlength=4) / len(p)

    # The points of the data are 0.016 off themselves.
    assert off_the_ring(points) < bound < 0.1 < off_the_ring(before.astype(np.float64))
    assert in_the_quarters(points).min() > 0.15
    if loss not in ("hinge", "wasserstein"):
        assert 0.5 < history.discriminator_loss[-1] < 2 * math.log(2) + 0.2


def test_learns_classes(any_threads_backend: object, rng: np.random.Generator) -> None:
    """Four quarters of a ring: each sample is of the quarter that was asked for."""
    skip_long(any_threads_backend)
    x = ring(rng, 2048)
    y = 2 * (x[:, 0] > 0.5) + (x[:, 1] > 0.5)
    gan = GAN(8, [64, 64, 2], [64, 64, 1], n_classes=4, ema_decay=0.99)
    gan.fit(x, epochs=20, batch_size=64, optimizer=Adam(2e-3, beta1=0.5), y=y)

    def quarters(points: Any) -> Any:
        return 2 * (points[:, 0] > 0.5) + (points[:, 1] > 0.5)

    assert np.mean(quarters(gan.sample(1000)) == np.arange(1000) % 4) > 0.95
    for label in range(4):
        points = gan.sample(500, label=label)
        assert np.mean(quarters(points) == label) > 0.9
        assert points.std(axis=0).min() > 0.03  # they are not all the same


def test_classes_of_batches_and_of_augmented_images(backend: object, rng: np.random.Generator) -> None:
    """Labels go with the samples, wherever these come from."""
    x, y = rng.integers(0, 256, (64, 6, 6), np.uint8), rng.integers(0, 3, 64)

    def trained(x: Any, **arguments: Any) -> list[Any]:
        gan = GAN(3, [8, 36], [9, 1], n_classes=3, gradient_penalty=0.1)
        gan.fit(x, epochs=2, batch_size=16, **arguments)
        return [*gan.generator_parameters, *gan.discriminator_parameters]

    def batch(number: int) -> Any:
        return x[32 * number :][:32], y[32 * number :][:32]

    in_batches = trained(batch, steps_per_epoch=2, shuffle=False)
    assert all(map(same_bits, in_batches, trained(x, y=y, shuffle=False)))
    unchanged = Augment(rotate=0, scale=0, shear=0, shift=0, elastic=0, noise=0, erase=0)
    assert all(map(same_bits, trained(x, y=y, augment=unchanged), trained(x, y=y)))
    with pytest.raises(TypeError, match="y of batch 0 is needed"):
        trained(lambda number: x[:32], steps_per_epoch=2)
    with pytest.raises(ValueError, match="y is for samples in an array; batches are pairs"):
        trained(batch, steps_per_epoch=2, y=y)


def test_classes_in_turn() -> None:
    gan = GAN(3, [5, 4], [5, 1], n_classes=3)
    assert gan.generator_parameters[0].shape == (6, 5)
    assert gan.discriminator_parameters[0].shape == (7, 5)
    z = gan.noise(7, seed=1)
    in_turn = gan.sample(z=z)
    assert same_bits(in_turn, gan.sample(z=z, label=[0, 1, 2, 0, 1, 2, 0]))
    assert same_bits(in_turn, gan.sample(z=z, label=np.eye(3)[[0, 1, 2, 0, 1, 2, 0]]))
    assert not same_bits(in_turn, gan.sample(z=z, label=1))
    assert same_bits(gan.sample(z=z, label=1)[1::3], gan.sample(z=z, label=np.int8(1))[1::3])
    assert same_bits(gan.sample(z=z, label=1)[1::3], in_turn[1::3])


def test_one_sample_of_many_classes() -> None:
    """Takes no memory for each pair of them."""
    gan = GAN(3, [5, 4], [5, 1], n_classes=2000)
    tracemalloc.start()
    try:
        gan.sample(1, label=1999)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # 16 MB with an identity matrix


def test_output_bias(dtype: Any) -> None:
    gan = GAN(3, [5, 4], [5, 1], generator_output="sigmoid", generator_output_bias=-2)
    assert gan.sample(2000).mean() == pytest.approx(1 / (1 + math.exp(2)), rel=0.2)
    assert (gan.generator_parameters[1] == 0).all()
    gan.fit(np.zeros((4, 4), dtype), 1, optimizer=SGD(0.0))  # which sets the dtype
    assert gan.generator_parameters[3].dtype == dtype
    assert (gan.generator_parameters[3] == -2).all()


def test_classic() -> None:
    gan = GAN.classic(seed=2)
    assert (gan.latent_dim, gan.generator, gan.discriminator, gan.seed) == (100, [256, 784], [256, 1], 2)
    assert [p.shape for p in gan.generator_parameters] == [(100, 256), (256,), (256, 784), (784,)]
    assert [p.shape for p in gan.discriminator_parameters] == [(784, 256), (256,), (256, 1), (1,)]
    gan.fit(np.zeros((4, 28, 28), np.uint8), epochs=1)
    assert gan.sample(3).shape == (3, 784)


# Reproducibility.


def test_same_seed_same_bits(backend: object, rng: np.random.Generator) -> None:
    x = rng.uniform(size=(50, 4)).astype(np.float32)

    def trained(seed: int, callback: Any = None) -> tuple[GAN, list[Any]]:
        gan = GAN(3, [8, 4], [8, 1], seed=seed)
        history = gan.fit(x, epochs=2, batch_size=16, callback=callback)
        return gan, [*gan.generator_parameters, *gan.discriminator_parameters, history.generator_loss]

    (one, state), (two, state2), (other, state3) = trained(5), trained(5), trained(6)
    assert all(same_bits(a, b) for a, b in zip(state, state2, strict=True))
    assert not any(same_bits(a, b) for a, b in zip(state, state3, strict=True))
    assert same_bits(one.sample(7), two.sample(7))
    assert not same_bits(one.sample(7), one.sample(7))
    assert not same_bits(one.sample(7), other.sample(7))
    # Samples drawn while training do not change what is learnt.
    drawing = GAN(3, [8, 4], [8, 1], seed=5)
    drawing.fit(x, epochs=2, batch_size=16, callback=lambda _: drawing.sample(3))
    assert all(same_bits(a, b) for a, b in zip(state, drawing.generator_parameters, strict=False))


def test_noise() -> None:
    gan, other = GAN(6, [4], [1], seed=1), GAN(6, [4], [1], seed=2)
    fixed = gan.noise(1000, seed=3)
    assert fixed.shape == (1000, 6)
    assert fixed.dtype == np.float32
    assert abs(fixed.mean()) < 0.05
    assert fixed.std() == pytest.approx(1.0, abs=0.05)
    assert same_bits(fixed, gan.noise(1000, seed=3))
    assert same_bits(fixed, other.noise(1000, seed=3))
    assert not same_bits(fixed, gan.noise(1000, seed=4))
    assert not same_bits(gan.noise(5), gan.noise(5))
    assert same_bits(gan.sample(z=fixed), gan.sample(1000, z=fixed))
    assert same_bits(gan.sample(z=fixed.astype(np.float32)[::2]), gan.sample(z=np.ascontiguousarray(fixed[::2])))


def test_interpolate() -> None:
    gan = GAN(100, [4], [1])
    start, end = gan.noise(5, seed=1), gan.noise(5, seed=2)
    way = interpolate(start, end, 7)
    assert way.shape == (5, 7, 100)
    assert way.dtype == np.float32
    np.testing.assert_allclose(way[:, 0], start, rtol=1e-6)
    np.testing.assert_allclose(way[:, -1], end, rtol=1e-6)
    # Equal steps, on the circle through both.
    unit = start / np.linalg.norm(start, axis=1, keepdims=True)
    ways = interpolate(unit[:4], unit[1:], 7)
    np.testing.assert_allclose(np.linalg.norm(ways, axis=2), 1, rtol=1e-6)
    lengths = np.linalg.norm(np.diff(ways, axis=1), axis=2)
    np.testing.assert_allclose(lengths, lengths[:, :1].repeat(6, axis=1), rtol=1e-5)
    right_angle = interpolate([[3.0, 0.0]], [[0.0, 3.0]], 3)[0]
    np.testing.assert_allclose(right_angle, [[3, 0], [3 / math.sqrt(2)] * 2, [0, 3]], atol=1e-12)
    # Where there is no such circle, a line.
    np.testing.assert_allclose(interpolate([[1, 0], [1, 0], [0, 0]], [[3, 0], [-1, 0], [2, 2]], 3)[:, 1],
                               [[2, 0], [0, 0], [1, 1]], atol=1e-12)  # fmt: skip
    for bad, error, message in (
        ((start, end[:4]), ValueError, r"start and end have shapes \(5, 100\) and \(4, 100\)"),
        ((start[0], end[0]), ValueError, r"expected \(n, latent_dim\)"),
        ((start, end, 1), ValueError, "steps must be at least 2, got 1"),
        ((start, end, 2.5), TypeError, "steps must be an integer"),
        ((start, end.astype(complex)), TypeError, "end has dtype complex128"),
    ):
        with pytest.raises(error, match=message):
            interpolate(*bad)


def test_temperature(dtype: Any) -> None:
    cold, other = (GAN(6, [4], [1], temperature=temperature, dtype=dtype, seed=1) for temperature in (0.5, 1.0))
    assert same_bits(cold.noise(100, seed=3), other.noise(100, seed=3) * dtype.type(0.5))
    assert same_bits(cold.sample(z=cold.noise(5, seed=2)), other.sample(z=cold.noise(5, seed=2)))
    cold.fit(np.zeros((8, 4), dtype), 1)
    other.fit(np.zeros((8, 4), dtype), 1)
    assert all(map(same_bits, cold.generator_parameters, other.generator_parameters))  # training is not colder
    cold.temperature = 1
    assert same_bits(cold.noise(100, seed=3), other.noise(100, seed=3))


@pytest.mark.parametrize("output", ["tanh", "sigmoid"])
def test_samples_lie_within_0_and_1(output: str, dtype: Any) -> None:
    gan = GAN(5, [8, 6], [4, 1], generator_output=output, ema_decay=0.0, dtype=dtype)
    gan.generator_parameters[2][...] *= 1000  # as far out as it goes
    x = gan.sample(1500)
    assert x.shape == (1500, 6)
    assert x.dtype == dtype
    assert x.min() >= 0.0
    assert x.max() <= 1.0
    assert x.min() < 0.01 < 0.99 < x.max()
    assert gan.sample(0).shape == (0, 6)


def test_without_an_average_samples_come_from_the_generator(rng: np.random.Generator) -> None:
    gan = GAN(3, [4], [1], generator_output="sigmoid", ema_decay=0.0, dtype="float64")
    gan.fit(rng.uniform(size=(20, 4)), epochs=1, batch_size=5)
    z = gan.noise(4)
    weight, bias = gan.generator_parameters
    np.testing.assert_allclose(gan.sample(z=z), 1 / (1 + np.exp(-(z @ weight + bias))), rtol=1e-12)


def test_uint8_counts_as_a_fraction_of_255(backend: object, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (40, 4, 3), dtype=np.uint8)
    results = []
    for x in (images, images.reshape(40, 12), images.reshape(40, 12).astype(np.float32) / 255):
        gan = GAN(3, [8, 12], [8, 1])
        history = gan.fit(x, epochs=2, batch_size=16)
        results.append([*gan.generator_parameters, *gan.discriminator_parameters, history.discriminator_loss])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_images_are_never_expanded_as_a_whole() -> None:
    images = np.zeros((20_000, 784), np.uint8)
    gan = GAN(2, [2, 784], [2, 1], ema_decay=0.0)
    tracemalloc.start()
    try:
        gan.fit(images, epochs=1, batch_size=250)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < images.size * 4 / 3


# Training, step by step.


def test_discriminator_optimizer(rng: np.random.Generator) -> None:
    """A learning rate of 0 leaves one of the two as it is."""
    x = rng.uniform(size=(20, 4)).astype(np.float32)
    for still in ("generator", "discriminator"):
        gan = GAN(3, [5, 4], [5, 1])
        before = {
            name: [p.copy() for p in getattr(gan, f"{name}_parameters")] for name in ("generator", "discriminator")
        }
        rates = {"generator": 0.1, "discriminator": 0.1} | {still: 0.0}
        gan.fit(x, 1, 8, SGD(rates["generator"]), discriminator_optimizer=SGD(rates["discriminator"]))
        for name, parameters in before.items():
            unchanged = [same_bits(a, b) for a, b in zip(parameters, getattr(gan, f"{name}_parameters"), strict=True)]
            assert all(unchanged) if name == still else not any(unchanged)


def test_defaults_of_fit(rng: np.random.Generator) -> None:
    x = rng.uniform(size=(40, 4)).astype(np.float32)
    one, two = GAN(3, [4], [1]), GAN(3, [4], [1])
    one.fit(x, epochs=2)
    two.fit(x, epochs=2, batch_size=64, optimizer=Adam(lr=2e-4, beta1=0.5))
    assert same_bits(one.sample(9), two.sample(9))
    three = GAN(3, [4], [1], default_optimizer="sgd", default_batch_size=5)
    four = GAN(3, [4], [1])
    three.fit(x, epochs=2)
    four.fit(x, epochs=2, batch_size=5, optimizer="sgd")
    assert same_bits(three.sample(9), four.sample(9))
    assert not same_bits(one.sample(9), three.sample(9))


def test_callback_is_told_of_every_mini_batch(rng: np.random.Generator) -> None:
    told: list[GANProgress] = []
    history = GAN(3, [4], [1]).fit(rng.uniform(size=(50, 4)).astype(np.float32), 2, 20, callback=told.append)
    assert [(p.epoch, p.epochs, p.batch, p.batches) for p in told] == [(e, 2, b, 3) for e in (1, 2) for b in (1, 2, 3)]
    assert [p.epoch_done for p in told] == [False, False, True] * 2
    assert [p.generator_loss for p in told if p.epoch_done] == history.generator_loss
    assert [p.discriminator_loss for p in told if p.epoch_done] == history.discriminator_loss


@pytest.mark.parametrize("batch", [2, 3])
def test_stop_training(batch: int, rng: np.random.Generator) -> None:
    told: list[GANProgress] = []

    def stop(progress: GANProgress) -> None:
        told.append(progress)
        if progress.epoch == 2 and progress.batch == batch:
            raise StopTraining

    gan = GAN(3, [4], [1])
    history = gan.fit(rng.uniform(size=(50, 4)).astype(np.float32), 5, 20, callback=stop)
    assert len(told) == gan.steps == 3 + batch
    assert history.generator_loss == [told[2].generator_loss, told[-1].generator_loss]
    assert history.discriminator_loss == [told[2].discriminator_loss, told[-1].discriminator_loss]
    assert history.seconds > 0.0


def test_verbose_prints_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    GAN(3, [4], [1]).fit(np.zeros((5, 4), np.float32), epochs=2, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all("generator loss" in line and "discriminator loss" in line for line in lines)


# Files.


@pytest.mark.parametrize(
    "gan",
    [
        GAN(3, [5, 4], [6, 1]),
        GAN(
            2,
            [4],
            [1],
            generator_activation="gelu",
            discriminator_activation="tanh",
            generator_output="sigmoid",
            loss="minimax",
            label_smoothing=0.0,
            ema_decay=0.0,
            dtype=np.float64,
            seed=7,
            default_optimizer=ClipNorm(SGD(0.5, 0.9), 0.25),
            default_batch_size=5,
        ),
        GAN(2, [4], [1], n_classes=5, gradient_penalty=0.1, generator_output_bias=-2.0, loss="hinge", temperature=0.5),
    ],
    ids=["default", "all else", "classes"],
)
def test_save_and_load(gan: GAN, tmp_path: Path, rng: np.random.Generator) -> None:
    y = np.arange(20) % gan.n_classes if gan.n_classes else None
    gan.fit(rng.uniform(size=(20, 4)).astype(gan.dtype), epochs=1, y=y)
    path = tmp_path / "gan.safetensors"
    gan.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = GAN.load(path)
    different = {
        name for name, value in vars(gan).items() if not name.startswith("_") and getattr(loaded, name) != value
    }
    assert not different
    assert gan.steps > 0
    for a, b in zip(
        gan.generator_parameters + gan.discriminator_parameters,
        loaded.generator_parameters + loaded.discriminator_parameters,
        strict=True,
    ):
        assert same_bits(a, b)
    z = gan.noise(6)
    assert same_bits(gan.sample(z=z), loaded.sample(z=z))
    loaded.fit(rng.uniform(size=(20, 4)).astype(gan.dtype), epochs=1, y=y)


@pytest.mark.parametrize(
    "how", ["truncated", "foreign", "no average", "negative steps", "lacks steps", "other widths", "MLP"]
)
def test_a_bad_file_is_named(how: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "gan.safetensors"
    GAN(3, [4], [1]).save(path)
    assert GAN.load(path).latent_dim == 3
    if how == "MLP":
        MLP([4, 2]).save(path)
    elif how == "foreign":
        path.write_text("hello")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["gemmlet"])
        tensors = safetensors.load(content)
        if how == "no average":
            tensors = {name: array for name, array in tensors.items() if not name.startswith("average.")}
        elif how == "negative steps":
            header["config"]["steps"] = -1
        elif how == "lacks steps":
            del header["config"]["steps"]
        elif how == "other widths":
            header["config"]["generator"] = [5]
        path.write_bytes(safetensors.save(tensors, {"gemmlet": json.dumps(header)}))
    with pytest.raises(ValueError, match=r"gan\.safetensors is corrupt, or no file of a gemmlet GAN: ."):
        GAN.load(path)


# Bad arguments.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"latent_dim": 0}, ValueError, "latent_dim must be at least 1, got 0"),
        ({"latent_dim": 2.0}, TypeError, "latent_dim must be an integer, got float"),
        ({"generator": []}, ValueError, "generator must have at least 1 width, got"),
        ({"generator": [4, -1]}, ValueError, r"generator\[1\] must be at least 1, got -1"),
        ({"discriminator": 1}, TypeError, "discriminator must be a list of layer widths, got int"),
        ({"discriminator": [4, 2]}, ValueError, r"discriminator must end in the width 1, got \[4, 2\]"),
        ({"generator_activation": "cube"}, ValueError, "generator_activation 'cube' is unknown"),
        ({"discriminator_activation": 3}, TypeError, "discriminator_activation must be a string, got int"),
        ({"n_classes": 1}, ValueError, "n_classes must be 0 or at least 2, got 1"),
        ({"n_classes": -2}, ValueError, "n_classes must be at least 0, got -2"),
        ({"n_classes": 2.0}, TypeError, "n_classes must be an integer, got float"),
        ({"generator_output": "relu"}, ValueError, "generator_output 'relu' is unknown; the choices are tanh, sigmoid"),
        (
            {"loss": "huber"},
            ValueError,
            "loss 'huber' is unknown; the choices are non_saturating, minimax, hinge, wasserstein",
        ),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing must be below 1, got 1"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be within \[0, 1\], got -0\.1"),
        ({"generator_output_bias": math.nan}, ValueError, "generator_output_bias must be finite"),
        ({"generator_output_bias": None}, TypeError, "generator_output_bias must be a real number"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": "hot"}, TypeError, "temperature must be a real number, got str"),
        ({"gradient_penalty": -1.0}, ValueError, "gradient_penalty must be at least 0, got -1"),
        ({"gradient_penalty": math.inf}, ValueError, "gradient_penalty must be finite"),
        ({"gradient_penalty": "much"}, TypeError, "gradient_penalty must be a real number, got str"),
        (
            {"gradient_penalty": 1.0, "discriminator_activation": "tanh"},
            ValueError,
            "gradient_penalty needs a discriminator_activation that is linear in pieces, relu, leaky_relu, identity",
        ),
        ({"ema_decay": 1}, ValueError, "ema_decay must be below 1, got 1"),
        ({"ema_decay": "slow"}, TypeError, "ema_decay must be a real number, got str"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64"),
        ({"seed": -5}, ValueError, "seed must be at least 0, got -5"),
        ({"default_optimizer": "lion"}, ValueError, "optimizer 'lion' is unknown"),
        ({"default_batch_size": 0}, ValueError, "default_batch_size must be at least 1"),
    ],
)
def test_bad_arguments_of_the_constructor(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GAN(**changes)


X = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.astype(complex)}, TypeError, "x has dtype complex128; expected real numbers"),
        ({"x": X[:, :3]}, ValueError, r"x has shape \(3, 3\), expected \(n, 4\)"),
        ({"x": X[:0]}, ValueError, "x is empty; expected at least one sample"),
        ({"x": X + 1.5}, ValueError, r"x must lie within \[0, 1\], but x\[0, 0\] is 1\.5"),
        ({"x": X - 1}, ValueError, r"x must lie within \[0, 1\], but x\[0, 0\] is -1"),
        ({"x": X + np.float32("nan")}, ValueError, "x must be finite, got nan in row 0"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"optimizer": "lion"}, ValueError, "optimizer 'lion' is unknown"),
        ({"optimizer": 3}, TypeError, "optimizer must be a name or an optimizer of gemmlet.nn, got int"),
        ({"discriminator_optimizer": 3}, TypeError, "discriminator_optimizer must be a name or an optimizer"),
        ({"shuffle": None}, TypeError, "shuffle must be True or False, got NoneType"),
        ({"verbose": "auto"}, TypeError, "verbose must be an integer, got str"),
        ({"callback": []}, TypeError, "callback must be callable, got list"),
        ({"callback_every": None}, TypeError, "callback_every must be a string, got NoneType"),
        ({"lr_schedule": 0.5}, TypeError, "lr_schedule must be callable, got float"),
    ],
)
def test_bad_arguments_of_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    gan = GAN(3, [4], [1])
    before = [p.copy() for p in gan.generator_parameters]
    with pytest.raises(error, match=message):
        gan.fit(**{"x": X} | changes)
    assert all(same_bits(a, b) for a, b in zip(before, gan.generator_parameters, strict=True))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (None, TypeError, "y is needed: the class of each sample, as n_classes is 3"),
        ([0, 1], ValueError, "y has 2 labels, but there are 3 samples; they must match"),
        ([0, 1, 3], ValueError, r"y\[2\] is 3; the classes of this network are 0, 1, 2"),
        ([0, -1, 1], ValueError, r"y\[1\] is -1; the classes of this network are 0, 1, 2"),
        ([0, 1, 0.5], ValueError, r"y\[2\] is 0.5; labels must be whole numbers, bools or strings"),
        ([0, 1, math.nan], ValueError, r"y\[2\] is nan; labels must be whole numbers"),
        (["a", "b", "c"], ValueError, r"y\[0\] is 'a'; the classes of this network are 0, 1, 2"),
        (np.full((3, 3), 1 / 3), ValueError, "y has soft labels; expected one class for each sample"),
        (np.zeros((3, 2)), ValueError, r"y has shape \(3, 2\), expected"),
    ],
)
def test_bad_labels(y: Any, error: type[Exception], message: str) -> None:
    gan = GAN(3, [4], [1], n_classes=3)
    before = [p.copy() for p in gan.generator_parameters]
    with pytest.raises(error, match=message):
        gan.fit(X, y=y)
    with pytest.raises(error, match=message):
        gan.discriminator_loss_and_gradients(X, gan.noise(3), y)
    with pytest.raises(error, match=message):
        gan.generator_loss_and_gradients(gan.noise(3), y)
    if y is not None:
        with pytest.raises(error, match=message.replace("y", "label", 1)):
            gan.sample(3, label=y)
    assert all(map(same_bits, before, gan.generator_parameters))
    assert gan.steps == 0


def test_labels_of_another_network() -> None:
    plain, conditional = GAN(3, [4], [1]), GAN(3, [4], [1], n_classes=3)
    for what in (
        lambda: plain.fit(X, y=[0, 0, 0]),
        lambda: plain.sample(3, label=1),
        lambda: plain.generator_loss_and_gradients(plain.noise(2), [0, 1]),
    ):
        with pytest.raises(ValueError, match="was given, but this network knows no classes"):
            what()
    for label, error in ((3, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="label"):
            conditional.sample(3, label=label)
    with pytest.raises(AttributeError, match="n_classes cannot be changed"):
        conditional.n_classes = 4


def test_bad_arguments_of_the_other_methods() -> None:
    gan = GAN(3, [4], [1])
    z = np.zeros((3, 3), np.float32)
    with pytest.raises(TypeError, match="n or z is needed"):
        gan.sample()
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        gan.sample(-1)
    with pytest.raises(ValueError, match=r"z has shape \(3, 2\), expected \(n, 3\)"):
        gan.sample(z=z[:, :2])
    with pytest.raises(ValueError, match=r"z has shape \(3, 3\), expected \(5, 3\)"):
        gan.sample(5, z=z)
    with pytest.raises(TypeError, match="z has dtype complex128"):
        gan.sample(z=z.astype(complex))
    with pytest.raises(ValueError, match="seed must be at least 0"):
        gan.noise(3, seed=-1)
    with pytest.raises(TypeError, match="n must be an integer, got float"):
        gan.noise(3.0)
    with pytest.raises(ValueError, match=r"z has shape \(2, 3\), expected \(3, 3\)"):
        gan.discriminator_loss_and_gradients(X, z[:2])
    with pytest.raises(ValueError, match="z is empty"):
        gan.generator_loss_and_gradients(z[:0])
