"""The generative adversarial network."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _arguments as arguments
from .. import kernels
from .._threads import get_num_threads
from ..backends import select
from . import _checks as checks
from . import files
from .dense import Dense, Record, activation_name
from .fused import GanNetworks, Pace, Steps, gan_steps
from .normals import fill_normal
from .optimizers import Adam, Optimizer, Schedule, as_optimizer, lr_factors, make_optimizer
from .training import CALLBACK_EVERY, CHUNK, Ahead, GANHistory, GANProgress, Samples, StopTraining, sample_order, slices

Array = NDArray[Any]

# Which draw noise while a GPU trains: enough to be done earlier.
_DRAWING_THREADS = 4

LOSSES = ("non_saturating", "minimax")
GENERATOR_OUTPUTS = ("tanh", "sigmoid")


class GAN:
    """Generative adversarial network (Goodfellow et al., 2014) of two multilayer perceptrons.

    The generator G makes a sample from noise z, the discriminator D tells samples of the data from generated ones; each
    learns against the other. D gives a logit, and its loss is the negative of the value function,
    ``-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))``, a mean over a mini-batch.

    Parameters
    ----------
    latent_dim : int
        Width of the noise, which is normal with variance 1.
    generator, discriminator : list of int
        Widths after the input. The last of `generator` is the number of features, the last of `discriminator` is 1.
    generator_activation, discriminator_activation : str
        Of the hidden layers: any activation of `gemmlet.kernels`. Where it is leaky_relu its slope is 0.2 (Radford et
        al., 2016).
    generator_output : {"tanh", "sigmoid"}
        Activation of the generator's last layer. With tanh both networks see samples scaled to [-1, 1]; what goes into
        `fit` and comes out of `sample` is within [0, 1] in either case.
    loss : {"non_saturating", "minimax"}
        What the generator minimises: ``-log sigmoid(D(G(z)))``, whose gradient does not vanish while D is winning, or
        ``log(1 - sigmoid(D(G(z))))``.
    label_smoothing : float, within [0, 1)
        D's target for samples of the data is 1 minus this (one-sided label smoothing, Salimans et al., 2016).
    ema_decay : float, within [0, 1)
        `sample` uses an exponential moving average of the generator's parameters with this decay per step (Yazıcı et
        al., 2019); less in the first steps, ``(1 + step) / (10 + step)``. With 0 it is the generator itself.
    dtype : float32 or float64
        Of parameters, inputs and results.
    seed : int, at least 0
        Draws the first weights, the order of the samples and the noise. The same seed gives the same bits.
    default_optimizer : str or Optimizer
        What `fit` uses if it is given none: a name, or an optimizer whose settings are taken. By default Adam with a
        learning rate of 2e-4 and a `beta1` of 0.5 (Radford et al., 2016).
    default_batch_size : int
        Likewise.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.

    Examples
    --------
    >>> from gemmlet import data
    >>> from gemmlet.nn import GAN
    >>> gan = GAN(seed=0)
    >>> history = gan.fit(data.load_mnist().x_train, epochs=30)  # doctest: +SKIP
    >>> gan.sample(16).shape
    (16, 784)
    """

    def __init__(
        self,
        latent_dim: int = 100,
        generator: Sequence[int] = (256, 784),
        discriminator: Sequence[int] = (256, 1),
        *,
        generator_activation: str = "relu",
        discriminator_activation: str = "leaky_relu",
        generator_output: str = "tanh",
        loss: str = "non_saturating",
        label_smoothing: float = 0.1,
        ema_decay: float = 0.999,
        dtype: DTypeLike = np.float32,
        seed: int = 0,
        default_optimizer: str | Optimizer | None = None,
        default_batch_size: int = 64,
    ) -> None:
        self.latent_dim = checks.whole_number(latent_dim, "latent_dim", 1)
        self.generator = checks.widths(generator, "generator", 1)
        self.discriminator = checks.widths(discriminator, "discriminator", 1)
        if self.discriminator[-1] != 1:
            raise ValueError(f"discriminator must end in the width 1, got {self.discriminator}")
        self.generator_activation = activation_name(generator_activation, "generator_activation")
        self.discriminator_activation = activation_name(discriminator_activation, "discriminator_activation")
        self.generator_output = checks.choice(generator_output, "generator_output", GENERATOR_OUTPUTS)
        self.loss = checks.choice(loss, "loss", LOSSES)
        self.label_smoothing = _fraction(label_smoothing, "label_smoothing")
        self.ema_decay = _fraction(ema_decay, "ema_decay")
        self.dtype = checks.float_dtype(dtype)
        self.seed = checks.whole_number(seed, "seed", 0)
        if default_optimizer is None:
            default_optimizer = Adam(lr=2e-4, beta1=0.5)
        self.default_optimizer = as_optimizer(default_optimizer, "default_optimizer").fresh()
        self.default_batch_size = checks.whole_number(default_batch_size, "default_batch_size", 1)
        self.features = self.generator[-1]
        self.steps = 0

        # Streams of their own: samples drawn in between do not change what is learnt.
        seeds = np.random.SeedSequence(self.seed).spawn(4)
        draw, self._shuffle, self._training_noise, self._sampling_noise = (np.random.default_rng(s) for s in seeds)
        self._generator = self._new_generator(draw)
        self._discriminator = Dense(
            [self.features, *self.discriminator],
            self.discriminator_activation,
            None,
            self.dtype,
            draw,
            _slope(self.discriminator_activation),
        )
        self._average = self._generator
        if self.ema_decay:
            self._average = self._new_generator(draw)
            for average, param in zip(self._average.parameters, self._generator.parameters, strict=True):
                average[...] = param

    def _new_generator(self, rng: np.random.Generator) -> Dense:
        return Dense(
            [self.latent_dim, *self.generator],
            self.generator_activation,
            self.generator_output,
            self.dtype,
            rng,
            _slope(self.generator_activation),
        )

    @classmethod
    def classic(cls, seed: int = 0) -> GAN:
        """Return the networks of the textbook: a generator 100-256-784 and a discriminator 784-256-1, all tanh.

        Neither labels are smoothed nor parameters averaged.
        """
        return cls(
            100,
            [256, 784],
            [256, 1],
            generator_activation="tanh",
            discriminator_activation="tanh",
            label_smoothing=0.0,
            ema_decay=0.0,
            seed=seed,
        )

    def __repr__(self) -> str:
        return (
            f"GAN({self.latent_dim}, {self.generator}, {self.discriminator}, loss={self.loss!r}, "
            f"dtype=np.{self.dtype}, seed={self.seed})"
        )

    @property
    def generator_parameters(self) -> list[Array]:
        """The arrays of the generator: weight (in_features, out_features) and bias of each layer in turn."""
        return self._generator.parameters

    @property
    def discriminator_parameters(self) -> list[Array]:
        """The arrays of the discriminator, likewise."""
        return self._discriminator.parameters

    # Training.

    def fit(
        self,
        x: Any,
        epochs: int = 30,
        batch_size: int | None = None,
        optimizer: str | Optimizer | None = None,
        discriminator_optimizer: str | Optimizer | None = None,
        lr_schedule: Schedule | None = None,
        shuffle: bool = True,
        verbose: bool = False,
        callback: Callable[[GANProgress], object] | None = None,
        callback_every: str = "batch",
    ) -> GANHistory:
        """Train both networks on samples `x`.

        For each mini-batch the discriminator takes one step, then the generator.

        Parameters
        ----------
        x : array_like, shape (n, features)
            Rows within [0, 1] of the network's dtype; or uint8 images, of shape (n, 28, 28) too, which count as
            value/255 and are expanded a mini-batch at a time. On a GPU, they are trained on there.
        epochs : int
            How often each sample is used.
        batch_size : int, optional
            Samples per update; the last mini-batch of an epoch may be smaller. By default 64, or what the preset says.
        optimizer : str or Optimizer, optional
            A name, ``"sgd"``, ``"adam"`` or ``"adamw"``, with its default settings; or an object, whose state is
            continued. By default Adam with a learning rate of 2e-4 and a `beta1` of 0.5, or what the preset says.
        discriminator_optimizer : str or Optimizer, optional
            One of its own for the discriminator; by default `optimizer` serves both.
        lr_schedule : callable, optional
            ``lr_schedule(done)``, with the share of all mini-batches of this `fit` that is done, from 0 to below 1,
            returns what both learning rates are multiplied by in the next one: `linear_decay`, say. `optimizer.lr`
            stays as it is. The weights, which are a callback's to look at, may be older while it is asked.
        shuffle : bool
            Whether each epoch takes the samples in a new random order.
        verbose : bool
            Whether to print a line per epoch.
        callback : callable, optional
            Called with a `GANProgress`. It may draw samples, and raise `StopTraining`.
        callback_every : {"batch", "call", "epoch"}
            When it is called: after every mini-batch, which then is a call of the backend by itself; after every call,
            in which a backend that can (`cpu`, `cuda`) trains about a tenth of a second; or after every epoch. The
            last two train faster, on a GPU by far, with the same result.

        Returns
        -------
        GANHistory

        Raises
        ------
        TypeError, ValueError
            An argument does not fit; nothing has been trained then.
        """
        samples = self._samples(x)
        epochs = checks.whole_number(epochs, "epochs", 1)
        size = self.default_batch_size if batch_size is None else checks.whole_number(batch_size, "batch_size", 1)
        rule = self.default_optimizer.fresh() if optimizer is None else as_optimizer(optimizer)
        other = rule
        if discriminator_optimizer is not None:
            other = as_optimizer(discriminator_optimizer, "discriminator_optimizer")
        rng = self._shuffle if arguments.flag(shuffle, "shuffle") else None
        verbose = arguments.flag(verbose, "verbose")
        checks.optional_callable(lr_schedule, "lr_schedule")
        checks.optional_callable(callback, "callback")
        every = checks.choice(callback_every, "callback_every", CALLBACK_EVERY)

        history = GANHistory()
        start = time.perf_counter()
        batches = math.ceil(len(samples) / size)
        steps = self._fused_steps(samples, rule, other)
        one_by_one = steps is None or (callback is not None and every == "batch")
        pace, orders = Pace(), Ahead(rng, sample_order)
        by_threads = None if steps is None else partial(self._draw_by_threads, steps)
        noises = Ahead(self._training_noise, self._draw, by_threads)

        def prepare(epoch: int, rest: int) -> None:
            """Draw what the next call takes, if the one that runs leaves `rest` samples of its epoch."""
            if not rest and epoch < epochs:
                rest = len(samples)
                orders.prepare(rest)
            if rest:
                noises.prepare(min(rest, size * (1 if one_by_one else pace.following())))

        def write_back() -> None:
            if steps is not None:
                steps.write_back()

        try:
            for epoch in range(1, epochs + 1):
                generator_sum, discriminator_sum, seen, batch = 0.0, 0.0, 0, 0
                order = orders.take(len(samples))
                stopped = False
                while batch < batches and not stopped:
                    where = order[seen : seen + size * (1 if one_by_one else pace.steps)]
                    noise = noises.take(len(where))
                    done = math.ceil(len(where) / size)
                    factors = lr_factors(lr_schedule, (epoch - 1) * batches + batch, done, epochs * batches)
                    fused = None
                    if steps is not None:
                        decay, rest = self._decay(self.steps + np.arange(1, done + 1)), len(samples) - seen - len(where)
                        # Counted before: Ctrl-C comes as the call returns, its steps done.
                        self.steps += done
                        pace.start()
                        try:
                            sums = generator_sum, discriminator_sum
                            fused = steps.take(where, size, factors, noise, decay, sums, partial(prepare, epoch, rest))
                        except (TypeError, ValueError, MemoryError):
                            self.steps -= done
                            raise
                        pace.stop(done)
                        if fused is None:
                            self.steps -= done
                    if fused is not None:
                        generator_sum, discriminator_sum = fused
                    else:
                        # From now on no more noise is drawn than a step uses: what is learnt shall not depend on
                        # the pace.
                        one_by_one, where = True, where[:size]
                        write_back()
                        losses = self._step(self._scaled(samples.batch(where)), noise[:size], rule, other, factors[0])
                        generator_sum += losses[0] * len(where)
                        discriminator_sum += losses[1] * len(where)
                    seen += len(where)
                    batch += math.ceil(len(where) / size)
                    if callback is not None and (batch == batches or every != "epoch"):
                        means = generator_sum / seen, discriminator_sum / seen
                        write_back()
                        try:
                            callback(GANProgress(epoch, epochs, batch, batches, *means, batch == batches))
                        except StopTraining:
                            stopped = True
                history.generator_loss.append(generator_sum / seen)
                history.discriminator_loss.append(discriminator_sum / seen)
                if verbose:
                    print(
                        f"epoch {epoch}/{epochs}  generator loss {history.generator_loss[-1]:.4f}  "
                        f"discriminator loss {history.discriminator_loss[-1]:.4f}",
                        flush=True,
                    )
                if stopped:
                    break
        finally:
            write_back()
        history.seconds = time.perf_counter() - start
        return history

    def _step(
        self, real: Array, noise: Array, rule: Optimizer, other: Optimizer, lr_factor: float
    ) -> tuple[float, float]:
        """One step of the discriminator and one of the generator; the losses of the two, generator first."""
        records = self._generator.record(noise)
        discriminator_loss, gradients = self._discriminator_gradients(real, records[-1].y)
        for param, grad in zip(self.discriminator_parameters, gradients, strict=True):
            other.update(param, grad, lr_factor=lr_factor)
        # The same noise serves the generator, so that its forward pass is done once.
        generator_loss, gradients = self._generator_gradients(records)
        for param, grad in zip(self.generator_parameters, gradients, strict=True):
            rule.update(param, grad, lr_factor=lr_factor)
        self.steps += 1
        self._update_average()
        return generator_loss, discriminator_loss

    def _fused_steps(self, samples: Samples, rule: Optimizer, other: Optimizer) -> Steps | None:
        """The same for many mini-batches in one call, where the backend has it: see `gemmlet.nn.fused`."""
        average = None if self._average is self._generator else self._average
        scale, shift = (2.0, -1.0) if self.generator_output == "tanh" else (1.0, 0.0)
        return gan_steps(
            GanNetworks(self._generator, self._discriminator, average),
            samples,
            scale,
            shift,
            1.0 - self.label_smoothing,
            self.loss == "non_saturating",
            rule,
            other,
        )

    def _decay(self, steps: Any) -> Any:
        """Of the moving average after so many steps, a number or an array: at first it follows closely."""
        return np.minimum(self.ema_decay, (1 + steps) / (10 + steps))

    def _update_average(self) -> None:
        if self._average is self._generator:
            return
        decay = float(self._decay(self.steps))
        for average, param in zip(self._average.parameters, self._generator.parameters, strict=True):
            average *= decay
            average += (1.0 - decay) * param

    def _discriminator_gradients(self, real: Array, fake: Array) -> tuple[float, list[Array]]:
        both = np.concatenate([real, fake])
        targets = np.zeros((len(both), 1), self.dtype)
        targets[: len(real)] = 1.0 - self.label_smoothing
        records = self._discriminator.record(both)
        loss, grad = kernels.binary_cross_entropy_with_logits(records[-1].y, targets)
        # The kernel's mean is over both halves, the loss the sum of the means over each.
        grad *= 2.0
        return 2.0 * loss, self._discriminator.backward(grad, records)[1]

    def _generator_gradients(self, generated: list[Record]) -> tuple[float, list[Array]]:
        records = self._discriminator.record(generated[-1].y)
        logits = records[-1].y
        if self.loss == "non_saturating":
            loss, grad = kernels.binary_cross_entropy_with_logits(logits, np.ones_like(logits))
        else:
            loss, grad = kernels.binary_cross_entropy_with_logits(logits, np.zeros_like(logits))
            loss = -loss
            np.negative(grad, out=grad)
        grad_fake, _ = self._discriminator.backward(grad, records, need_input=True, need_parameters=False)
        assert grad_fake is not None
        return loss, self._generator.backward(grad_fake, generated)[1]

    def discriminator_loss_and_gradients(self, x: Any, z: Any) -> tuple[float, list[Array]]:
        """Loss of the discriminator, and its gradients: one array for each of `discriminator_parameters`.

        Parameters
        ----------
        x : array_like, shape (n, features)
            As in `fit`.
        z : array_like, shape (m, latent_dim)
            Noise for the generator, as many rows as there are samples.
        """
        samples = self._samples(x)
        noise = arguments.on_cpu(self._checked_noise(z, len(samples)))
        return self._discriminator_gradients(self._scaled(samples.batch(slice(None))), self._generator.forward(noise))

    def generator_loss_and_gradients(self, z: Any) -> tuple[float, list[Array]]:
        """Loss of the generator, and its gradients: one array for each of `generator_parameters`.

        Parameters
        ----------
        z : array_like, shape (n, latent_dim)
            Noise, at least one row.
        """
        noise = arguments.on_cpu(self._checked_noise(z, None))
        if not len(noise):
            raise ValueError("z is empty; expected at least one row")
        return self._generator_gradients(self._generator.record(noise))

    # Use.

    def noise(self, n: int, seed: int | None = None) -> Array:
        """Draw noise for `sample`, normal with variance 1.

        Parameters
        ----------
        n : int
        seed : int, optional
            Noise that is the same at every call, to compare samples with. Without it each call draws new noise.

        Returns
        -------
        ndarray, shape (n, latent_dim)
        """
        count = checks.whole_number(n, "n", 0)
        if seed is None:
            return self._draw(self._sampling_noise, count)
        return self._draw(np.random.default_rng(checks.whole_number(seed, "seed", 0)), count)

    def sample(self, n: int | None = None, *, z: Any = None) -> Array:
        """Generate samples.

        Parameters
        ----------
        n : int, optional
            How many; needed without `z`.
        z : array_like, shape (n, latent_dim), optional
            The noise to make them from, as `noise` draws it.

        Returns
        -------
        ndarray, shape (n, features)
            Within [0, 1]. Of noise that is on a GPU a `cupy.ndarray` there.

        Raises
        ------
        TypeError, ValueError
            An argument is missing or does not fit.
        """
        count = None if n is None else checks.whole_number(n, "n", 0)
        if z is None:
            if count is None:
                raise TypeError("n or z is needed: how many samples, or the noise to make them from")
            noise = self.noise(count)
        else:
            noise = self._checked_noise(z, count)
        backend = select.of(noise)
        result = backend.empty((len(noise), self.features), self.dtype, noise)
        generator = self._average.brought(lambda array: backend.bring(array, noise))
        for where in slices(len(noise), CHUNK):
            made = generator.forward(backend.bring(noise[where]))
            if self.generator_output == "tanh":
                made = backend.scaled(made, self.dtype, 0.5, 0.5)
            backend.assign(result[where], made)
        return result

    def _draw(self, rng: np.random.Generator, n: int) -> Array:
        # Drawn in float64 for either dtype, so that both get the same numbers.
        return rng.standard_normal((n, self.latent_dim)).astype(self.dtype, copy=False)

    def _draw_by_threads(self, steps: Steps, rng: np.random.Generator, n: int) -> Array:
        """The same, where a GPU takes it from."""
        noise = steps.empty_pinned((n, self.latent_dim), self.dtype)
        fill_normal(rng, noise.reshape(-1), min(get_num_threads(), _DRAWING_THREADS))
        return noise

    # Arguments.

    def _samples(self, x: Any) -> Samples:
        samples = Samples(x, self.features, self.dtype)
        if not len(samples):
            raise ValueError("x is empty; expected at least one sample")
        if samples.array.dtype != np.uint8:
            low, high = samples.backend.extremes(samples.array)
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(f"x must lie within [0, 1], got {low:g} to {high:g}")
        return samples

    def _scaled(self, rows: Array) -> Array:
        """Bring samples from [0, 1] to the range of the generator."""
        return select.of(rows).scaled(rows, self.dtype, 2.0, -1.0) if self.generator_output == "tanh" else rows

    def _checked_noise(self, z: Any, n: int | None) -> Array:
        noise = arguments.as_floats(z, "z", self.dtype)
        if noise.ndim != 2 or noise.shape[1] != self.latent_dim or n not in (None, len(noise)):
            raise ValueError(f"z has shape {noise.shape}, expected ({'n' if n is None else n}, {self.latent_dim})")
        return noise

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both networks to a safetensors file, whole or not at all.

        Parameters
        ----------
        path : path
            An existing file is replaced. The configuration is in the metadata, under ``gemmlet``, as JSON.

        Raises
        ------
        ImportError
            The package safetensors is missing: ``pip install 'gemmlet[train]'``.
        OSError
            The file cannot be written.
        """
        config = {
            "latent_dim": self.latent_dim,
            "generator": self.generator,
            "discriminator": self.discriminator,
            "generator_activation": self.generator_activation,
            "discriminator_activation": self.discriminator_activation,
            "generator_output": self.generator_output,
            "loss": self.loss,
            "label_smoothing": self.label_smoothing,
            "ema_decay": self.ema_decay,
            "dtype": str(self.dtype),
            "seed": self.seed,
            "default_optimizer": self.default_optimizer.settings(),
            "default_batch_size": self.default_batch_size,
            "steps": self.steps,
        }
        tensors: dict[str, Array] = {}
        for prefix, dense in self._parts().items():
            tensors |= files.named_tensors(dense, prefix)
        files.write(path, "GAN", config, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read networks that `save` has written.

        Raises
        ------
        ImportError
            The package safetensors is missing: ``pip install 'gemmlet[train]'``.
        OSError
            The file is missing or cannot be read.
        ValueError
            It is corrupt or holds something else; the message names it.
        """
        config, tensors = files.read(path, "GAN")
        with files.errors_name(path, "GAN"):
            steps = checks.whole_number(config.pop("steps"), "steps", 0)
            generator = [config["latent_dim"], *config["generator"]]
            shapes = files.expected_shapes(generator, "generator.")
            if config["ema_decay"]:
                shapes |= files.expected_shapes(generator, "average.")
            shapes |= files.expected_shapes([generator[-1], *config["discriminator"]], "discriminator.")
            files.check_tensors(tensors, shapes, np.dtype(config["dtype"]))
            gan = cls(**{**config, "default_optimizer": make_optimizer(**config["default_optimizer"])})
        for prefix, dense in gan._parts().items():
            files.copy_into(dense, tensors, prefix)
        gan.steps = steps
        return gan

    def _parts(self) -> dict[str, Dense]:
        """Return the networks by the prefix of their tensors' names."""
        parts = {"generator.": self._generator, "discriminator.": self._discriminator}
        if self._average is not self._generator:
            parts["average."] = self._average
        return parts


def _fraction(value: Any, name: str) -> float:
    number = arguments.number(value, name, low=0.0, high=1.0)
    if number == 1.0:
        raise ValueError(f"{name} must be below 1, got 1")
    return number


def _slope(activation: str) -> float | None:
    return 0.2 if activation == "leaky_relu" else None
