"""The generative adversarial network."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _arguments as arguments
from ..backends import select
from ..training.plan import (
    NOISE,
    SAMPLES,
    SECOND_PASS,
    Backward,
    Dataset,
    Forward,
    Gather,
    Loss,
    Phase,
    TrainingPlan,
    Update,
)
from ..training.reference import gradients
from . import _checks as checks
from . import files
from .dataset import CHUNK, Samples, as_dtype, slices
from .dense import Dense, activation_name
from .fit import GANHistory, GANProgress, Trainable, Training, check_fixed, fitting, network_of, randomness_of
from .optimizers import Adam, Optimizer, ParameterGroup, as_optimizer
from .schedules import ReduceOnPlateau, Schedule

Array = NDArray[Any]

LOSSES = ("non_saturating", "minimax")
GENERATOR_OUTPUTS = ("tanh", "sigmoid")

# Positions in the plan's networks.
_GENERATOR, _DISCRIMINATOR = 0, 1


class GAN(Trainable):
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
    discriminator_dropout : float or list of float, each within [0, 1)
        The probability with which each output of a hidden layer of the discriminator is left out of a pass of `fit`, as
        `dropout` of `MLP`. The discriminator's step and the generator's leave out others.
    discriminator_input_dropout : float, within [0, 1)
        The same for its inputs.
    discriminator_input_noise : float, at least 0
        The standard deviation of noise on its inputs, samples and what is generated, as `input_noise` of `MLP`: in the
        range of the generator, which is [-1, 1] with tanh.
    dtype : float32 or float64, optional
        Of parameters and results; samples and noise of other dtypes are converted. By default that of the samples of
        the first `fit`, as in `MLP`.
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
        discriminator_dropout: float | Sequence[float] = 0.0,
        discriminator_input_dropout: float = 0.0,
        discriminator_input_noise: float = 0.0,
        dtype: DTypeLike | None = None,
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
        self.loss, self.label_smoothing, self.ema_decay = loss, label_smoothing, ema_decay
        self.discriminator_dropout: float | list[float] = discriminator_dropout  # type: ignore[assignment]
        self.discriminator_input_dropout = discriminator_input_dropout
        self.discriminator_input_noise = discriminator_input_noise
        self.seed = checks.whole_number(seed, "seed", 0, is_count=False)
        if default_optimizer is None:
            default_optimizer = Adam(lr=2e-4, beta1=0.5)
        self.default_optimizer = as_optimizer(default_optimizer, "default_optimizer").fresh()
        self.default_batch_size = default_batch_size
        self.features = self.generator[-1]
        self.steps = 0

        self._draw_layers(checks.float_dtype(dtype))
        self._follows_samples = dtype is None
        self._shuffle, self._training_noise, self._sampling_noise = self._fresh_streams()[1:]

    _stream_names = "shuffle", "training_noise", "sampling_noise"
    _checks = Trainable._checks | {
        **dict.fromkeys(
            (
                "latent_dim", "generator", "discriminator", "generator_activation", "discriminator_activation",
                "generator_output", "features", "seed",
            ),
            check_fixed,
        ),
        "loss": lambda _, value, name: checks.choice(value, name, LOSSES),
        "discriminator_dropout": lambda gan, value, name: checks.dropout_rates(
            value, name, len(gan.discriminator) - 1
        ),
        "discriminator_input_dropout": lambda _, value, name: checks.fraction(value, name),
        "discriminator_input_noise": lambda _, value, name: arguments.number(value, name, low=0.0),
    }  # fmt: skip

    def _fresh_streams(self) -> list[np.random.Generator]:
        """Of their own: samples drawn in between do not change what is learnt."""
        return [np.random.default_rng(s) for s in np.random.SeedSequence(self.seed).spawn(4)]

    def _draw_layers(self, dtype: np.dtype[Any]) -> None:
        draw = self._fresh_streams()[0]

        def dense(widths: Sequence[int], activation: str, output: str | None) -> Dense:
            # Rounded, as the public kernels do: Numba's executor computes with it in float64.
            slope = float(dtype.type(0.2)) if activation == "leaky_relu" else None
            return Dense(widths, activation, output, dtype, draw, slope)

        self.dtype = dtype
        self._generator = dense([self.latent_dim, *self.generator], self.generator_activation, self.generator_output)
        self._discriminator = dense([self.features, *self.discriminator], self.discriminator_activation, None)
        self._average = self._generator.copy() if self.ema_decay else self._generator

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
        names = "discriminator_dropout", "discriminator_input_dropout", "discriminator_input_noise"
        given = "".join(f"{name}={rate}, " for name in names if (rate := getattr(self, name)))
        return (
            f"GAN({self.latent_dim}, {self.generator}, {self.discriminator}, loss={self.loss!r}, {given}"
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

    @property
    def _parameters(self) -> dict[str, list[Array]]:
        names = {"generator_parameters": self.generator_parameters}
        return names | {"discriminator_parameters": self.discriminator_parameters}

    # Training.

    def fit(
        self,
        x: Any,
        epochs: int = 30,
        batch_size: int | None = None,
        optimizer: str | Optimizer | None = None,
        discriminator_optimizer: str | Optimizer | None = None,
        lr_schedule: Schedule | ReduceOnPlateau | None = None,
        shuffle: bool = True,
        verbose: bool = False,
        callback: Callable[[GANProgress], object] | None = None,
        callback_every: str = "batch",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
    ) -> GANHistory:
        """Train both networks on samples `x`.

        For each mini-batch the discriminator takes one step, then the generator.

        Parameters
        ----------
        x : array_like, shape (n, features)
            Rows of real numbers within [0, 1]; or uint8 images, of shape (n, 28, 28) too, which count as value/255 and
            are expanded a mini-batch at a time. On a GPU, they are trained on there.
        epochs, batch_size, shuffle, verbose, callback_every
            As in `MLP.fit`.
        optimizer : str or Optimizer, optional
            A name, ``"sgd"``, ``"adam"`` or ``"adamw"``, with its default settings; or an object, whose state is
            continued. By default Adam with a learning rate of 2e-4 and a `beta1` of 0.5, or what the preset says.
        discriminator_optimizer : str or Optimizer, optional
            One of its own for the discriminator; by default `optimizer` serves both.
        lr_schedule : callable, optional
            As in `MLP.fit`, for both learning rates; `ReduceOnPlateau` may follow either loss.
        callback : callable, optional
            Called with a `GANProgress`. It may draw samples, and raise `StopTraining`.
        checkpoint, resume
            As in `MLP.fit`.

        Returns
        -------
        GANHistory

        Raises
        ------
        TypeError, ValueError
            An argument does not fit, or a parameter is read-only; see `MLP.fit`.
        DivergedError
            A loss or a parameter is no longer finite.
        RuntimeError
            The network is in a `fit` of another thread.
        OSError
            A checkpoint cannot be read or written; see `MLP.fit`.
        """
        with fitting(self):
            samples = self._samples(x, None if self._follows_samples else self.dtype)
            settings = self._settings(
                epochs, batch_size, lr_schedule, shuffle, verbose, callback, callback_every, checkpoint, resume
            )
            rule = other = self._optimizer(optimizer)
            optimizers = {"optimizer": rule}
            if discriminator_optimizer is not None:
                other = as_optimizer(discriminator_optimizer, "discriminator_optimizer")
                optimizers["discriminator_optimizer"] = other
            self._settle(samples.dtype)
            generator, discriminator = rule.group(self.generator_parameters), other.group(self.discriminator_parameters)
            phases = [
                self._gather(samples.dataset(may_skip_zeros=False)),
                # The same noise serves both steps, so that the generator's forward pass is done once.
                Forward(_GENERATOR, (NOISE,)),
                *self._discriminator_phases(),
                Update(_DISCRIMINATOR, discriminator.rule, discriminator.max_norm),
                *self._generator_phases(),
                Update(_GENERATOR, generator.rule, generator.max_norm),
            ]
            data = {"x": samples.array}
            history, plan = GANHistory(), self._plan(phases, generator, discriminator)
            Training(self, history, samples, plan, optimizers, [discriminator, generator], settings, data).run()
        return history

    def _plan(self, phases: Sequence[Phase], *groups: ParameterGroup, drops: bool = True) -> TrainingPlan:
        generator, discriminator = groups or (None, None)
        average = self._average if self.ema_decay else None
        rates = self.discriminator_input_noise, self.discriminator_input_dropout, self.discriminator_dropout
        randomness = randomness_of(self, *rates, len(self.discriminator)) if drops else ()
        networks = (
            network_of(self._generator, generator, average),
            network_of(self._discriminator, discriminator, randomness=randomness),
        )
        return TrainingPlan(networks, tuple(phases))

    def _gather(self, dataset: Dataset) -> Gather:
        """Samples, from [0, 1] to the range of the generator."""
        return Gather(dataset, 2.0, -1.0) if self.generator_output == "tanh" else Gather(dataset)

    def _discriminator_phases(self) -> list[Phase]:
        """From samples, and from what is generated, to the discriminator's gradients."""
        targets = 1.0 - self.label_smoothing, 0.0
        return [
            Forward(_DISCRIMINATOR, (SAMPLES, _GENERATOR)),
            Loss(_DISCRIMINATOR, "binary_cross_entropy_with_logits", targets),
            Backward(_DISCRIMINATOR),
        ]

    def _generator_phases(self) -> list[Phase]:
        """From what is generated to the generator's gradients, through the discriminator as it is then.

        minimax: ``log(1 - D)`` shall become small, so that the loss of the target 0 is maximised.
        """
        target, sign = (1.0, 1.0) if self.loss == "non_saturating" else (0.0, -1.0)
        return [
            Forward(_DISCRIMINATOR, (_GENERATOR,), SECOND_PASS if self._is_random else 0),
            Loss(_DISCRIMINATOR, "binary_cross_entropy_with_logits", (target,), sign=sign),
            Backward(_DISCRIMINATOR, to=_GENERATOR),
            Backward(_GENERATOR),
        ]

    @property
    def _is_random(self) -> bool:
        return bool(self.discriminator_dropout or self.discriminator_input_dropout or self.discriminator_input_noise)

    _progress = GANProgress

    def _metrics(self, sums: Sequence[float], correct: float, seen: int) -> dict[str, float]:
        return {"generator_loss": sums[1] / seen, "discriminator_loss": sums[0] / seen}

    def discriminator_loss_and_gradients(self, x: Any, z: Any, step: int | None = None) -> tuple[float, list[Array]]:
        """Loss of the discriminator, and its gradients: one array for each of `discriminator_parameters`.

        Parameters
        ----------
        x : array_like, shape (n, features)
            As in `fit`.
        z : array_like, shape (m, latent_dim)
            Noise for the generator, as many rows as there are samples.
        step : int, optional
            As in `MLP.loss_and_gradients`.
        """
        samples = self._samples(x, self.dtype).to_cpu()
        noise = arguments.on_cpu(self._checked_noise(z, len(samples)))
        phases = [
            self._gather(samples.dataset(may_skip_zeros=False)),
            Forward(_GENERATOR, (NOISE,)),
            *self._discriminator_phases(),
        ]
        return self._gradients(phases, noise, step, _DISCRIMINATOR)

    def generator_loss_and_gradients(self, z: Any, step: int | None = None) -> tuple[float, list[Array]]:
        """Loss of the generator, and its gradients: one array for each of `generator_parameters`.

        Parameters
        ----------
        z : array_like, shape (n, latent_dim)
            Noise, at least one row.
        step : int, optional
            As in `MLP.loss_and_gradients`.
        """
        noise = arguments.on_cpu(self._checked_noise(z, None))
        if not len(noise):
            raise ValueError("z is empty; expected at least one row")
        phases = [Gather(Dataset(noise)), Forward(_GENERATOR, (NOISE,)), *self._generator_phases()]
        return self._gradients(phases, noise, step, _GENERATOR)

    def _gradients(
        self, phases: Sequence[Phase], noise: Array, step: int | None, network: int
    ) -> tuple[float, list[Array]]:
        number = 0 if step is None else checks.whole_number(step, "step", 0)
        taken = gradients(select.current(), self._plan(phases, drops=step is not None), len(noise), noise, number)
        return taken.losses[0], taken.gradients[network]

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
        return self._draw(np.random.default_rng(checks.whole_number(seed, "seed", 0, is_count=False)), count)

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
        generator = self._average.with_parameters(lambda array: backend.to_device(array, noise))
        for where in slices(len(noise), CHUNK):
            made = generator.forward(backend.to_device(noise[where]))
            if self.generator_output == "tanh":
                made = backend.scaled(made, self.dtype, 0.5, 0.5)
            backend.assign(result[where], made)
        return result

    # Arguments.

    def _samples(self, x: Any, dtype: np.dtype[Any] | None) -> Samples:
        samples = Samples(x, self.features, dtype)
        if not len(samples):
            raise ValueError("x is empty; expected at least one sample")
        samples.convert()
        if samples.array.dtype != np.uint8:
            low, high = samples.backend.extremes(samples.array)
            if spoilt := None if math.isfinite(low) else samples.not_finite():
                raise ValueError(spoilt)
            if not (low >= 0.0 and high <= 1.0):
                given = arguments.on_cpu(samples.array)
                place = np.argwhere(~((given >= 0.0) & (given <= 1.0)))[0]
                raise ValueError(
                    f"x must lie within [0, 1], but {checks.item('x', place)} is {given[tuple(place)]}; images "
                    "of bytes count as value/255 if they are uint8"
                )
        return samples

    def _checked_noise(self, z: Any, n: int | None) -> Array:
        noise = arguments.as_array(z, "z")
        checks.real_numbers(noise.dtype, "z")
        if noise.ndim != 2 or noise.shape[1] != self.latent_dim or n not in (None, len(noise)):
            raise ValueError(f"z has shape {noise.shape}, expected ({'n' if n is None else n}, {self.latent_dim})")
        return arguments.as_floats(as_dtype(noise, self.dtype, "z"), "z")

    # Files.

    def _config(self) -> dict[str, Any]:
        names = (
            "latent_dim", "generator", "discriminator", "generator_activation", "discriminator_activation",
            "generator_output", "loss", "label_smoothing", "ema_decay", "discriminator_dropout",
            "discriminator_input_dropout", "discriminator_input_noise",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _parts(self) -> dict[str, Dense]:
        parts = {"generator.": self._generator, "discriminator.": self._discriminator}
        return parts | ({"average.": self._average} if self.ema_decay else {})

    def _trained(self, arguments: Collection[str]) -> dict[str, list[dict[str, Array]]]:
        generator, discriminator = (files.named_tensors(d, prefix) for prefix, d in list(self._parts().items())[:2])
        if "discriminator_optimizer" in arguments:
            return {"optimizer": [generator], "discriminator_optimizer": [discriminator]}
        return {"optimizer": [generator, discriminator]}

    def save(
        self, file: files.Target, optimizer: Optimizer | None = None, discriminator_optimizer: Optimizer | None = None
    ) -> None:
        """Write both networks to a file, as `MLP.save` does.

        Parameters
        ----------
        file, optimizer
            As there.
        discriminator_optimizer : Optimizer, optional
            The discriminator's, if `fit` was given one of its own.

        Raises
        ------
        OSError
            The file cannot be written, or is no plain file.
        ValueError
            There is a `discriminator_optimizer` alone.
        """
        given = {"optimizer": optimizer, "discriminator_optimizer": discriminator_optimizer}
        if optimizer is None and discriminator_optimizer is not None:
            raise ValueError("discriminator_optimizer needs the other one, optimizer")
        self._write(file, {argument: rule for argument, rule in given.items() if rule is not None})

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the generator that `sample` uses as an ONNX file; `path` and errors are those of `MLP.to_onnx`.

        The graph takes ``z``, noise (n, latent_dim) of the network's dtype and any n, and gives ``x``, (n, features)
        within [0, 1].
        """
        from . import onnx

        halved = self.generator_output == "tanh"
        onnx.write(path, "GAN", self._saved_config(), self._average, input_name="z", output_name="x", halved=halved)

    @staticmethod
    def _widths(config: dict[str, Any]) -> dict[str, Sequence[int]]:
        generator = [config["latent_dim"], *config["generator"]]
        widths = {"generator.": generator, "discriminator.": [generator[-1], *config["discriminator"]]}
        return widths | ({"average.": generator} if config["ema_decay"] else {})
