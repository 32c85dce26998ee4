"""Cases of whole trainings, an MLP's epoch and a GAN's step, with the loops of the peers as users write them.

gemmlet is given the images as they come, uint8; the peers' conversion to floating point is not timed. NumPy's loops
allocate their large arrays once. PyTorch's are the usual ones; "compiled", the loss of a mini-batch is. JAX's are one
jitted `lax.scan` over the mini-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gemmlet import kernels, nn
from gemmlet.data import Mnist, load_mnist
from gemmlet.formulas.optimizers import adam_hyperparameters

from .case import Array, Call, Case, Prepared, Settings
from .implementations import OURS

BATCH, LR = 64, 0.1
LAYERS = (784, 128, 10)
# So large an eps that the rounding errors of a gradient that is nearly 0 are not magnified: the result is checked.
ADAM_LR, ADAM_BETAS, ADAM_EPS = 1e-3, (0.9, 0.999), 1e-3


@functools.cache
def _mnist(data_dir: Path | None) -> Mnist:
    return load_mnist(data_dir, download=False)


def data_source(settings: Settings) -> str:
    """Say in words where the images come from; not by the name of a folder, which is nobody else's business."""
    data = _mnist(settings.data_dir)
    source = data.source if data.is_sample else "MNIST from the folder that was given"
    return f"{source}, {len(data.x_train):,} images, repeated where more are needed"


def digits(settings: Settings, count: int) -> tuple[Array, Array]:
    """Return images, uint8, and their labels."""
    data = _mnist(settings.data_dir)
    where = np.arange(count) % len(data.x_train)
    return data.x_train[where], data.y_train[where]


# The MLP.


@dataclass(frozen=True)
class Task:
    """An MLP with tanh, what it is trained on, and by which rule: "sgd" or "adam"."""

    layers: tuple[int, ...]
    given: Array  # the samples as gemmlet is given them: uint8 images, or floating point
    x: Array  # the same in floating point, which is what the peers are given
    labels: Array
    batch: int
    parameters: list[Array]  # the first weights and biases, in turn
    # The result is checked after this many samples, in their order: after many more updates rounding errors have grown
    # beyond all bounds, with one sample each even those of float64.
    checked: int
    rule: str = "sgd"


def task(
    layers: Sequence[int],
    given: Array,
    labels: Array,
    batch: int,
    dtype: str,
    checked: int | None = None,
    rule: str = "sgd",
) -> Task:
    """Return the task, with the first weights that gemmlet draws; without `checked` all samples are."""
    x = given.astype(dtype) / np.dtype(dtype).type(255) if given.dtype == np.uint8 else given
    model = nn.MLP(list(layers), "tanh", dtype=dtype)
    parameters = [p.copy() for p in model.parameters]
    return Task(tuple(layers), given, x, labels, batch, parameters, len(labels) if checked is None else checked, rule)


def gemmlet_mlp(t: Task) -> Prepared:
    """Return an epoch of `nn.MLP.fit`."""
    model = nn.MLP(list(t.layers), "tanh", dtype=t.x.dtype)
    optimizer = nn.SGD(LR) if t.rule == "sgd" else nn.Adam(ADAM_LR, eps=ADAM_EPS)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": t.batch, "optimizer": optimizer}

    def result() -> list[Array]:
        model.fit(t.given[: t.checked], t.labels[: t.checked], shuffle=False, **settings)
        return model.parameters

    return Prepared(partial(model.fit, t.given, t.labels, **settings), result)


def kernels_mlp(t: Task) -> Prepared:
    """Return an epoch of gemmlet's kernels, called layer by layer."""
    parameters = [p.copy() for p in t.parameters]
    weights, biases = parameters[::2], parameters[1::2]
    activations = [*["tanh"] * (len(weights) - 1), None]
    states = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    rng = np.random.default_rng(0)
    steps = 0

    def update(position: int, grad: Array) -> None:
        if t.rule == "sgd":
            kernels.sgd_update(parameters[position], grad, lr=LR)
        else:
            kernels.adam_update(parameters[position], grad, *states[position], step=steps, lr=ADAM_LR, eps=ADAM_EPS)

    def epoch(order: Array) -> None:
        nonlocal steps
        for start in range(0, len(order), t.batch):
            steps += 1
            where = order[start : start + t.batch]
            a = [t.x[where]]
            for w, b, activation in zip(weights, biases, activations, strict=True):
                a.append(kernels.linear(a[-1], w, b, activation))
            _, grad = kernels.softmax_cross_entropy(a[-1], t.labels[where])
            for i in reversed(range(len(weights))):
                below, grad_w, grad_b = kernels.linear_backward(
                    grad, a[i], weights[i], a[i + 1], activations[i], need_x=i > 0
                )
                assert grad_w is not None
                assert grad_b is not None
                update(2 * i, grad_w)
                update(2 * i + 1, grad_b)
                grad = below

    def result() -> list[Array]:
        epoch(np.arange(t.checked))
        return parameters

    return Prepared(lambda: epoch(rng.permutation(len(t.labels))), result)


def numpy_epochs(t: Task, parameters: list[Array]) -> Callable[[Array], None]:
    """Return the epoch in NumPy, a function of the order of the samples; it changes `parameters`."""
    dtype, batch = parameters[0].dtype, t.batch
    weights, biases = parameters[::2], parameters[1::2]
    acts = [np.empty((batch, width), dtype) for width in t.layers]
    grads = [np.empty_like(a) for a in acts]
    grad_w = [np.empty_like(w) for w in weights]
    updates = [numpy_rule("adam", p) for p in parameters] if t.rule == "adam" else []
    # SGD multiplies the gradient of the loss by the learning rate, which then need not be applied to each weight.
    scale = LR if t.rule == "sgd" else 1.0
    every = np.arange(batch)
    steps = 0

    def step(where: Array) -> None:
        m = len(where)
        a, g = [buffer[:m] for buffer in acts], [buffer[:m] for buffer in grads]
        np.take(t.x, where, axis=0, out=a[0])
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            np.matmul(a[i], w, out=a[i + 1])
            a[i + 1] += b
            if i < len(weights) - 1:
                np.tanh(a[i + 1], out=a[i + 1])
        # The gradient of softmax cross-entropy.
        z = a[-1]
        np.subtract(z, z.max(axis=1, keepdims=True), out=g[-1])
        np.exp(g[-1], out=g[-1])
        g[-1] /= g[-1].sum(axis=1, keepdims=True)
        g[-1][every[:m], t.labels[where]] -= 1
        g[-1] *= dtype.type(scale / m)
        for i in reversed(range(len(weights))):
            np.matmul(a[i].T, g[i + 1], out=grad_w[i])
            if i:
                np.matmul(g[i + 1], weights[i].T, out=g[i])
                np.multiply(a[i], a[i], out=a[i])
                np.subtract(1, a[i], out=a[i])
                g[i] *= a[i]
            grad_b = g[i + 1].sum(axis=0)
            if updates:
                numbers = adam_hyperparameters(steps, ADAM_LR, *ADAM_BETAS, ADAM_EPS, 0.0, False)
                updates[2 * i](grad_w[i], numbers)
                updates[2 * i + 1](grad_b, numbers)
            else:
                weights[i] -= grad_w[i]
                biases[i] -= grad_b

    def epoch(order: Array) -> None:
        nonlocal steps
        for start in range(0, len(order), batch):
            steps += 1
            step(order[start : start + batch])

    return epoch


def numpy_mlp(t: Task) -> Prepared:
    """Return an epoch of the loop in NumPy."""
    parameters = [p.copy() for p in t.parameters]
    epoch = numpy_epochs(t, parameters)
    rng = np.random.default_rng(0)

    def result() -> list[Array]:
        epoch(np.arange(t.checked))
        return parameters

    return Prepared(lambda: epoch(rng.permutation(len(t.labels))), result)


def exact_mlp(t: Task) -> list[Array]:
    """Return the parameters after an epoch without shuffling, in float64."""
    parameters = [p.astype(np.float64) for p in t.parameters]
    exact = replace(t, x=t.x.astype(np.float64))
    numpy_epochs(exact, parameters)(np.arange(t.checked))
    return parameters


def torch_layers(widths: Sequence[int], parameters: Sequence[Array], last: Any = None) -> Any:
    """Linear layers with tanh between them, and `last` after them, that start from these parameters."""
    import torch

    modules: list[Any] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        layer = torch.nn.Linear(before, after)
        layer.weight = torch.nn.Parameter(torch.from_numpy(parameters[2 * i].T.copy()))
        layer.bias = torch.nn.Parameter(torch.from_numpy(parameters[2 * i + 1].copy()))
        modules += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules[:-1], *([] if last is None else [last]))


def torch_mlp(t: Task, compiled: bool = False) -> Prepared:
    """Return an epoch of the usual loop in PyTorch."""
    import torch

    model = torch_layers(t.layers, t.parameters)
    x, labels = torch.from_numpy(t.x), torch.from_numpy(t.labels)
    optimizer: Any
    if t.rule == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=ADAM_LR, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)

    def loss(x: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(x), labels)

    if compiled:
        loss = torch.compile(loss, dynamic=False)

    def epoch(order: Any) -> None:
        for where in order.split(t.batch):
            optimizer.zero_grad()
            loss(x[where], labels[where]).backward()
            optimizer.step()

    def result() -> list[Array]:
        epoch(torch.arange(t.checked))
        return [p.detach().numpy().T for p in model.parameters()]

    return Prepared(lambda: epoch(torch.randperm(len(labels))), result)


def _jax_dense(parameters: Sequence[Any], x: Any) -> Any:
    """Linear layers with tanh between them."""
    import jax.numpy as jnp

    *hidden, (w, b) = zip(parameters[::2], parameters[1::2], strict=True)
    for weight, bias in hidden:
        x = jnp.tanh(x @ weight + bias)
    return x @ w + b


def jax_mlp(t: Task) -> Prepared:
    """Return an epoch in JAX, jitted as a whole."""
    import jax
    import jax.numpy as jnp

    n, batch = len(t.labels), t.batch

    def loss(parameters: list[Any], x: Any, labels: Any) -> Any:
        return -jax.nn.log_softmax(_jax_dense(parameters, x))[jnp.arange(len(labels)), labels].mean()

    def step(parameters: list[Any], x: Any, labels: Any) -> list[Any]:
        gradients = jax.grad(loss)(parameters, x, labels)
        return [p - LR * g for p, g in zip(parameters, gradients, strict=True)]

    @partial(jax.jit, donate_argnums=0)
    def epoch(parameters: list[Any], x: Any, labels: Any, order: Any) -> list[Any]:
        def body(parameters: list[Any], where: Any) -> tuple[list[Any], None]:
            return step(parameters, x[where], labels[where]), None

        full = len(order) - len(order) % batch
        parameters, _ = jax.lax.scan(body, parameters, order[:full].reshape(-1, batch))
        rest = order[full:]
        return step(parameters, x[rest], labels[rest]) if len(rest) else parameters

    x, labels = jnp.asarray(t.x), jnp.asarray(t.labels)
    parameters = [jnp.array(p) for p in t.parameters]
    rng = np.random.default_rng(0)

    def run(order: Array) -> list[Any]:
        nonlocal parameters
        parameters = list(jax.block_until_ready(epoch(parameters, x, labels, order)))
        return parameters

    return Prepared(lambda: run(rng.permutation(n)), lambda: run(np.arange(t.checked)))


def sklearn_mlp(t: Task) -> Prepared:
    """Return an epoch of scikit-learn's `MLPClassifier`: `partial_fit` is one."""
    from sklearn.neural_network import MLPClassifier

    sgd = {"solver": "sgd", "learning_rate_init": LR, "momentum": 0.0, "nesterovs_momentum": False, "alpha": 0.0}
    settings = {"activation": "tanh", "batch_size": t.batch, "shuffle": False, "random_state": 0}
    model = MLPClassifier(t.layers[1:-1], **settings, **sgd)
    # Once for the shapes; then it starts from the same parameters as the others.
    model.partial_fit(t.x[: t.batch], t.labels[: t.batch], classes=np.arange(t.layers[-1]))
    for kept, given in ((model.coefs_, t.parameters[::2]), (model.intercepts_, t.parameters[1::2])):
        for target, value in zip(kept, given, strict=True):
            target[...] = value

    def result() -> list[Array]:
        model.partial_fit(t.x[: t.checked], t.labels[: t.checked])
        parameters = [p.copy() for pair in zip(model.coefs_, model.intercepts_, strict=True) for p in pair]
        model.shuffle = True
        return parameters

    return Prepared(lambda: model.partial_fit(t.x, t.labels), result)


MLP_IMPLEMENTATIONS: dict[str, Callable[[Task], Prepared]] = {
    OURS: gemmlet_mlp,
    "gemmlet-numba": gemmlet_mlp,
    "gemmlet kernels": kernels_mlp,
    "numpy": numpy_mlp,
    "pytorch": torch_mlp,
    "pytorch compiled": partial(torch_mlp, compiled=True),
    "jax": jax_mlp,
    "scikit-learn": sklearn_mlp,
}
EPOCH_IMPLEMENTATIONS = tuple(name for name in MLP_IMPLEMENTATIONS if name != "gemmlet kernels")
WIDE_IMPLEMENTATIONS = (OURS, "gemmlet kernels", "numpy", "pytorch")


def matmul_flops(layers: Sequence[int]) -> list[float]:
    """Operations of the forward matmuls for one sample."""
    return [2.0 * before * after for before, after in pairwise(layers)]


def mlp_flops(layers: Sequence[int]) -> float:
    """Operations for one sample of a training: three matmuls a layer, but for the gradient of the input."""
    flops = matmul_flops(layers)
    return 3.0 * sum(flops) - flops[0]


def mlp_case(
    data: str,
    inputs: Callable[[], Task],
    layers: Sequence[int],
    count: int,
    batch: int,
    dtype: str,
    implementations: Sequence[str] = EPOCH_IMPLEMENTATIONS,
    group: str = "epoch",
) -> Case:
    """Return the case of an epoch, or with one image at a time of an image, of an MLP with tanh and SGD."""
    single = batch == 1
    size = float(layers[0] * np.dtype(dtype).itemsize)
    return Case(
        group,
        f"{data} {'-'.join(map(str, layers))} tanh, {'one image at a time' if single else f'batch {batch}'}, "
        f"{count:,} images, {dtype}",
        inputs,
        {name: MLP_IMPLEMENTATIONS[name] for name in implementations},
        exact_mlp,
        # Rounding errors grow from update to update: in float32 the peers' are up to 1e-6 after an epoch.
        rtol=0.0,
        atol=1e-5 if dtype == "float32" else 1e-6,
        flops=mlp_flops(layers) * (1 if single else count),
        bytes=size * (1 if single else count),
        units=count if single else 1,
        unit="image" if single else "epoch",
        labels={"data": data, "dtype": dtype, "batch": batch},
    )


def digits_case(
    settings: Settings, layers: Sequence[int], count: int, batch: int, dtype: str, implementations: Sequence[str]
) -> Case:
    """Return the case of an MLP on images as they are in MNIST."""
    checked = min(count, 200) if batch == 1 else None

    def inputs() -> Task:
        return task(layers, *digits(settings, count), batch, dtype, checked)

    return mlp_case("MNIST", inputs, layers, count, batch, dtype, implementations)


def epoch(settings: Settings) -> Iterator[Case]:
    """An epoch of MNIST, 784-128-10, tanh, softmax cross-entropy, SGD with 0.1."""
    count, singles = (6_400, 400) if settings.quick else (60_000, 3_000)

    def dense() -> Task:
        samples = np.random.default_rng(0).random((count, LAYERS[0]), "float32")
        return task(LAYERS, samples, digits(settings, count)[1], BATCH, "float32")

    yield digits_case(settings, LAYERS, count, BATCH, "float32", EPOCH_IMPLEMENTATIONS)
    yield mlp_case("dense random", dense, LAYERS, count, BATCH, "float32")
    yield digits_case(settings, LAYERS, singles, 1, "float64", (OURS, "gemmlet-numba", "numpy"))


# Of two hidden layers.
WIDTHS, BATCHES = (64, 128, 256, 512, 1024, 2048), (16, 64, 256, 1024)
# Those of the networks that reach 99 % on MNIST, with Adam in float32.
MNIST_WIDTHS, MNIST_BATCH = (512, 800, 1024), 128
# A call takes so many steps that what `fit` does once, copying parameters and states, counts as little as in an epoch:
# of at least this many operations, and this many steps or samples.
_WIDE_FLOPS, _WIDE_STEPS, _WIDE_SAMPLES = 4e9, 32, 4096


def wide(settings: Settings) -> Iterator[Case]:
    """Steps of 784-width-width-10, tanh, on dense random input: every width and batch, dtypes and rules in turn.

    Then the widths of MNIST_WIDTHS, on dense random input and on MNIST.
    """
    for i, j in ((2, 1), (3, 2)) if settings.quick else np.ndindex(len(WIDTHS), len(BATCHES)):
        yield wide_case(WIDTHS[i], BATCHES[j], ("float32", "float64")[(i + j) % 2], ("sgd", "adam")[(i + j // 2) % 2])
    for width in (800,) if settings.quick else MNIST_WIDTHS:
        yield wide_case(width, MNIST_BATCH, "float32", "adam")
        yield wide_case(width, MNIST_BATCH, "float32", "adam", settings)


def wide_case(width: int, batch: int, dtype: str, rule: str, mnist: Settings | None = None) -> Case:
    """Return the case of a step, on dense random input or, with `mnist`, on images as they are in MNIST."""
    layers = (LAYERS[0], width, width, LAYERS[-1])
    steps = max(1, round(_WIDE_FLOPS / (mlp_flops(layers) * batch)), min(_WIDE_STEPS, _WIDE_SAMPLES // batch))
    checked = min(steps, 4) * batch

    def inputs() -> Task:
        if mnist is not None:
            return task(layers, *digits(mnist, steps * batch), batch, dtype, checked, rule)
        rng = np.random.default_rng(0)
        samples, labels = rng.random((steps * batch, layers[0])).astype(dtype), rng.integers(0, 10, steps * batch)
        return task(layers, samples, labels, batch, dtype, checked, rule)

    data = "dense random" if mnist is None else "MNIST"
    case = mlp_case(data, inputs, layers, steps * batch, batch, dtype, WIDE_IMPLEMENTATIONS, "wide")
    # Weights and what the rule keeps of each are read and written.
    arrays = 2 * (1 if rule == "sgd" else 3) * sum(before * after for before, after in pairwise(layers))
    return replace(
        case,
        name=f"{'-'.join(map(str, layers))}, batch {batch}, {dtype}, {rule}{', MNIST' if mnist else ''}",
        flops=mlp_flops(layers) * batch,
        bytes=float((arrays + batch * layers[0]) * np.dtype(dtype).itemsize),
        units=steps,
        unit="step",
        labels={**case.labels, "update": rule},
    )


# Optimizer updates in NumPy, in place.


def numpy_rule(rule: str, param: Array) -> Callable[[Array, Sequence[float]], None]:
    """Return a function of the gradient and the rule's hyperparameters that updates `param` and the state it keeps."""
    scratch, other = np.empty_like(param), np.empty_like(param)
    first, second = np.zeros_like(param), np.zeros_like(param)

    def sgd(grad: Array, numbers: Sequence[float]) -> None:
        np.multiply(grad, numbers[0], out=scratch)
        np.subtract(param, scratch, out=param)

    def momentum(grad: Array, numbers: Sequence[float]) -> None:
        np.multiply(first, numbers[2], out=first)
        np.add(first, grad, out=first)
        np.multiply(first, numbers[0], out=scratch)
        np.subtract(param, scratch, out=param)

    def adam(grad: Array, numbers: Sequence[float]) -> None:
        step_size, beta1, beta2, gain1, gain2, eps, correction, _, shrink = numbers
        np.multiply(first, beta1, out=first)
        np.multiply(grad, gain1, out=scratch)
        np.add(first, scratch, out=first)
        np.multiply(second, beta2, out=second)
        np.multiply(grad, grad, out=scratch)
        np.multiply(scratch, gain2, out=scratch)
        np.add(second, scratch, out=second)
        np.sqrt(second, out=scratch)
        np.multiply(scratch, correction, out=scratch)
        np.add(scratch, eps, out=scratch)
        np.divide(first, scratch, out=other)
        np.multiply(other, step_size, out=other)
        if shrink != 1.0:
            np.multiply(param, shrink, out=param)
        np.subtract(param, other, out=param)

    return {"sgd": sgd, "momentum": momentum, "adam": adam}[rule]


# The GAN of the textbook: all tanh, the losses of Goodfellow et al., 2014, the generator's in its non-saturating form.

LATENT, GENERATOR, DISCRIMINATOR = 100, (256, 784), (256, 1)
# The same with the layers and the mini-batch of `gemmlet train gan`.
COMMAND_GENERATOR, COMMAND_DISCRIMINATOR, COMMAND_BATCH = (256, 512, 784), (512, 256, 1), 128
GAN_LR, BETA1, BETA2, EPS = 2e-4, 0.5, 0.999, 1e-8
# What is checked: the mean losses over this many epochs of this many steps.
CHECKED_EPOCHS, CHECKED_STEPS = 4, 16


@dataclass(frozen=True)
class GanTask:
    """What a GAN is trained on."""

    # Images as gemmlet is given them, and as the peers are: floating point, from -1 to 1.
    given: Array
    real: Array
    # The first weights and biases, in turn.
    generator: list[Array]
    discriminator: list[Array]
    batch: int = BATCH


def _widths(parameters: Sequence[Array]) -> tuple[int, ...]:
    """The inputs and the outputs of each layer."""
    return (*(len(w) for w in parameters[::2]), parameters[-1].size)


def _gan(generator: Sequence[int], discriminator: Sequence[int]) -> nn.GAN:
    """`nn.GAN.classic` with other layers."""
    return nn.GAN(
        LATENT,
        generator,
        discriminator,
        generator_activation="tanh",
        discriminator_activation="tanh",
        label_smoothing=0.0,
        ema_decay=0.0,
    )


def gan_task(
    images: Array,
    generator: Sequence[int] = GENERATOR,
    discriminator: Sequence[int] = DISCRIMINATOR,
    batch: int = BATCH,
) -> GanTask:
    """Return the task, with the first weights that gemmlet draws."""
    model = _gan(generator, discriminator)
    real = images.astype(np.float32) * np.float32(2 / 255) - np.float32(1)
    parts = (model.generator_parameters, model.discriminator_parameters)
    copies = [[p.copy() for p in part] for part in parts]
    return GanTask(images, real, copies[0], copies[1], batch)


def _checked(epochs: Callable[[int], Any], batch: int) -> Call:
    """The mean losses (generator, discriminator) of each checked epoch, from a function of the number of images."""

    def result() -> Array:
        return np.array([epochs(CHECKED_STEPS * batch) for _ in range(CHECKED_EPOCHS)])

    return result


def gemmlet_gan(t: GanTask) -> Prepared:
    """Return an epoch of `nn.GAN.fit`."""
    model = _gan(_widths(t.generator)[1:], _widths(t.discriminator)[1:])
    optimizer = nn.Adam(GAN_LR, beta1=BETA1)

    def epoch(n: int) -> tuple[float, float]:
        history = model.fit(t.given[:n], epochs=1, batch_size=t.batch, optimizer=optimizer, shuffle=False)
        return history.generator_loss[0], history.discriminator_loss[0]

    return Prepared(lambda: epoch(len(t.given)), _checked(epoch, t.batch))


class NumpyGan:
    """The loop in NumPy."""

    def __init__(self, t: GanTask, seed: int = 0) -> None:
        self.real, self.batch = t.real, t.batch
        self.generator = [p.copy() for p in t.generator]
        self.discriminator = [p.copy() for p in t.discriminator]
        self.rng = np.random.default_rng(seed)
        self.steps = 0
        self._updates = [numpy_rule("adam", p) for p in (*self.generator, *self.discriminator)]

    def _update(self, gradients: Sequence[Array], offset: int) -> None:
        numbers = adam_hyperparameters(self.steps, GAN_LR, BETA1, BETA2, EPS, 0.0, False)
        for update, grad in zip(self._updates[offset : offset + len(gradients)], gradients, strict=True):
            update(grad, numbers)

    def epoch(self, n: int) -> tuple[float, float]:
        """Train on the first `n` images in their order; returns the mean losses."""
        starts = range(0, n, self.batch)
        losses = [self._step(self.real[start : min(start + self.batch, n)]) for start in starts]
        generator, discriminator = np.mean(losses, axis=0)
        return float(generator), float(discriminator)

    def _step(self, real: Array) -> tuple[float, float]:
        self.steps += 1
        m, dtype = len(real), real.dtype
        z = self.rng.standard_normal((m, LATENT), dtype)
        made = _tanh_layers(z, self.generator)
        made.append(_tanh_layer(made[-1], *self.generator[-2:]))

        # The discriminator: its targets are 1 for the first half, 0 for the second.
        seen = _tanh_layers(np.concatenate([real, made[-1]]), self.discriminator)
        logits = seen[-1] @ self.discriminator[-2] + self.discriminator[-1]
        discriminator_loss = (np.logaddexp(0, -logits[:m]).sum() + np.logaddexp(0, logits[m:]).sum()) / m
        grad = 1 / (1 + np.exp(-logits))
        grad[:m] -= 1
        grad /= m
        self._update(_gradients(grad, seen, self.discriminator), len(self.generator))

        # The generator, through the discriminator as it is now.
        seen = _tanh_layers(made[-1], self.discriminator)
        logits = seen[-1] @ self.discriminator[-2] + self.discriminator[-1]
        generator_loss = np.logaddexp(0, -logits).sum() / m
        grad = (1 / (1 + np.exp(-logits)) - 1) / m
        for y, w in zip(reversed(seen), self.discriminator[-2::-2], strict=True):
            grad = _tanh_backward(grad @ w.T, y)
        self._update(_gradients(grad, made[:-1], self.generator), 0)
        return float(generator_loss), float(discriminator_loss)


def _tanh_layers(x: Array, parameters: Sequence[Array]) -> list[Array]:
    """The inputs of all layers, with tanh between them."""
    inputs = [x]
    for w, b in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        inputs.append(_tanh_layer(inputs[-1], w, b))
    return inputs


def _gradients(grad: Array, inputs: Sequence[Array], parameters: Sequence[Array]) -> list[Array]:
    """The gradients of the parameters, from that of the last layer's preactivations."""
    gradients: list[Array] = []
    for i in reversed(range(len(inputs))):
        gradients[:0] = [inputs[i].T @ grad, grad.sum(axis=0)]
        if i:
            grad = _tanh_backward(grad @ parameters[2 * i].T, inputs[i])
    return gradients


def _tanh_layer(x: Array, w: Array, b: Array) -> Array:
    y = x @ w
    y += b
    np.tanh(y, out=y)
    return y


def _tanh_backward(grad_y: Array, y: Array) -> Array:
    slope = y * y
    np.subtract(1, slope, out=slope)
    grad_y *= slope
    return grad_y


def numpy_gan(t: GanTask) -> Prepared:
    """Return an epoch of the loop in NumPy."""
    gan = NumpyGan(t)
    return Prepared(lambda: gan.epoch(len(t.real)), _checked(gan.epoch, t.batch))


def torch_gan(t: GanTask) -> Prepared:
    """Return an epoch of the usual loop in PyTorch."""
    import torch

    torch.manual_seed(0)
    generator = torch_layers(_widths(t.generator), t.generator, torch.nn.Tanh())
    discriminator = torch_layers(_widths(t.discriminator), t.discriminator)
    settings: dict[str, Any] = {"lr": GAN_LR, "betas": (BETA1, BETA2), "eps": EPS, "fused": True}
    generator_optimizer = torch.optim.Adam(generator.parameters(), **settings)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), **settings)
    samples = torch.from_numpy(t.real)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def epoch(n: int) -> tuple[float, float]:
        sums = torch.zeros(2)
        for real in samples[:n].split(t.batch):
            m = len(real)
            fake = generator(torch.randn(m, LATENT))
            discriminator_optimizer.zero_grad()
            logits = discriminator(torch.cat([real, fake.detach()]))
            loss = entropy(logits[:m], torch.ones(m, 1)) + entropy(logits[m:], torch.zeros(m, 1))
            loss.backward()
            discriminator_optimizer.step()

            generator_optimizer.zero_grad()
            # Its gradients in the discriminator are not needed.
            discriminator.requires_grad_(False)
            generator_loss = entropy(discriminator(fake), torch.ones(m, 1))
            generator_loss.backward()
            discriminator.requires_grad_(True)
            generator_optimizer.step()
            sums += torch.stack([generator_loss.detach(), loss.detach()])
        mean = sums / math.ceil(n / t.batch)
        return float(mean[0]), float(mean[1])

    return Prepared(lambda: epoch(len(t.real)), _checked(epoch, t.batch))


def jax_gan(t: GanTask) -> Prepared:
    """Return an epoch in JAX, jitted as a whole."""
    import jax
    import jax.numpy as jnp

    def adam(parameters: Any, gradients: Any, moments: Any, step: Any) -> tuple[Any, Any]:
        first = [BETA1 * m + (1 - BETA1) * g for m, g in zip(moments[0], gradients, strict=True)]
        second = [BETA2 * v + (1 - BETA2) * g * g for v, g in zip(moments[1], gradients, strict=True)]
        size, root = GAN_LR / (1 - BETA1**step), jnp.sqrt(1 - BETA2**step)
        new = [p - size * m / (jnp.sqrt(v) / root + EPS) for p, m, v in zip(parameters, first, second, strict=True)]
        return new, (first, second)

    def discriminator_loss(parameters: Any, both: Any) -> Any:
        logits = _jax_dense(parameters, both)
        half = len(both) // 2
        return jax.nn.softplus(-logits[:half]).mean() + jax.nn.softplus(logits[half:]).mean()

    def generator_loss(parameters: Any, discriminator: Any, z: Any) -> Any:
        return jax.nn.softplus(-_jax_dense(discriminator, jnp.tanh(_jax_dense(parameters, z)))).mean()

    def step(carry: Any, real: Any) -> tuple[Any, Any]:
        generator, discriminator, moments_g, moments_d, key, count = carry
        key, drawn = jax.random.split(key)
        count = count + 1
        z = jax.random.normal(drawn, (len(real), LATENT), real.dtype)
        fake = jnp.tanh(_jax_dense(generator, z))
        both = jnp.concatenate([real, fake])
        loss_d, gradients = jax.value_and_grad(discriminator_loss)(discriminator, both)
        discriminator, moments_d = adam(discriminator, gradients, moments_d, count)
        loss_g, gradients = jax.value_and_grad(generator_loss)(generator, discriminator, z)
        generator, moments_g = adam(generator, gradients, moments_g, count)
        return (generator, discriminator, moments_g, moments_d, key, count), jnp.stack([loss_g, loss_d])

    @partial(jax.jit, donate_argnums=0, static_argnums=2)
    def epoch(carry: Any, samples: Any, n: int) -> Any:
        carry, losses = jax.lax.scan(step, carry, samples[:n].reshape(-1, t.batch, samples.shape[1]))
        return carry, losses.mean(axis=0)

    def zeros(parameters: Sequence[Array]) -> Any:
        return tuple([jnp.zeros(p.shape, p.dtype) for p in parameters] for _ in range(2))

    samples = jnp.asarray(t.real)
    first = [[jnp.array(p) for p in parameters] for parameters in (t.generator, t.discriminator)]
    carry: Any = (*first, zeros(t.generator), zeros(t.discriminator), jax.random.key(0), jnp.float32(0))

    def run(n: int) -> Any:
        nonlocal carry
        carry, losses = jax.block_until_ready(epoch(carry, samples, n))
        return losses

    return Prepared(lambda: run(len(t.real)), _checked(run, t.batch))


def exact_gan(t: GanTask) -> Array:
    """Return the mean losses of the checked epochs in float64, the mean over a few seeds of the noise."""
    generator, discriminator = ([p.astype(np.float64) for p in part] for part in (t.generator, t.discriminator))
    exact = replace(t, real=t.real.astype(np.float64), generator=generator, discriminator=discriminator)
    return np.asarray(np.mean([_checked(NumpyGan(exact, seed).epoch, t.batch)() for seed in range(3)], axis=0))


GAN_IMPLEMENTATIONS: dict[str, Callable[[GanTask], Prepared]] = {
    OURS: gemmlet_gan,
    "gemmlet-numba": gemmlet_gan,
    "numpy": numpy_gan,
    "pytorch": torch_gan,
    "jax": jax_gan,
}


def gan_flops(generator: Sequence[int] = GENERATOR, discriminator: Sequence[int] = DISCRIMINATOR) -> float:
    """Operations of a step for one image: both networks forward, and what each backward pass needs."""
    layers = (generator[-1], *discriminator)
    # A generated image goes through the discriminator once more, forward and back.
    through = 2 * sum(matmul_flops(layers))
    return mlp_flops((LATENT, *generator)) + 2 * mlp_flops(layers) + through


def gan_case(
    settings: Settings,
    count: int,
    generator: Sequence[int] = GENERATOR,
    discriminator: Sequence[int] = DISCRIMINATOR,
    batch: int = BATCH,
) -> Case:
    """Return the case of a step, measured over as many as `count` images give."""
    steps = math.ceil(count / batch)
    names = ("-".join(map(str, widths)) for widths in ((LATENT, *generator), (generator[-1], *discriminator)))
    return Case(
        "gan",
        f"step {' and '.join(names)}, batch {min(count, batch)}, Adam, float32",
        lambda: gan_task(digits(settings, count)[0], generator, discriminator, batch),
        GAN_IMPLEMENTATIONS,
        exact_gan,
        # Each implementation draws its own noise: losses differ, and their means over a few steps are close.
        rtol=0.0,
        atol=0.05,
        flops=gan_flops(generator, discriminator) * count / steps,
        bytes=float(generator[-1] * 4 * count / steps),
        units=steps,
        unit="step",
        labels={"dtype": "float32", "batch": batch},
    )


def gan(settings: Settings) -> Iterator[Case]:
    """Step of a GAN, the textbook's and the one of `gemmlet train gan`, all tanh, Adam."""
    steps = CHECKED_STEPS if settings.quick else 50
    yield gan_case(settings, steps * BATCH)
    command = (COMMAND_GENERATOR, COMMAND_DISCRIMINATOR, COMMAND_BATCH)
    yield gan_case(settings, CHECKED_STEPS * COMMAND_BATCH, *command)
