"""The generative adversarial network."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

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
    GradientPenalty,
    Labels,
    Loss,
    Phase,
    TrainingPlan,
)
from ..training.reference import gradients, one_hot
from . import _checks as checks
from . import files
from .augment import Augment, Augmented, check_augment
from .batches import BatchTraining, Piece, Source, is_source, refuse
from .dataset import CHUNK, Samples, as_dtype, slices
from .dense import Dense, activation_name
from .estimator import Estimator
from .fit import GANHistory, GANProgress, Trainable, Training, check_fixed, fitting, network_of, randomness_of
from .optimizers import Adam, Optimizer, ParameterGroup, as_optimizer
from .schedules import ReduceOnPlateau, Schedule
from .targets import Meaning, of_classes

Array = NDArray[Any]


class _Objective(NamedTuple):
    """The elementwise losses of both networks, and the targets of samples and of generated rows."""

    discriminator: str
    samples: float
    generated: float
    generator: str
    wanted: float
    sign: float = 1.0  # -1: the generator's is maximised


_LOGISTIC = "binary_cross_entropy_with_logits"
_OBJECTIVES = {
    "non_saturating": _Objective(_LOGISTIC, 1.0, 0.0, _LOGISTIC, 1.0),
    # log(1 - D) shall become small, so that the loss of the target 0 is maximised.
    "minimax": _Objective(_LOGISTIC, 1.0, 0.0, _LOGISTIC, 0.0, -1.0),
    "hinge": _Objective("hinge", 1.0, -1.0, "wasserstein", 1.0),
    "wasserstein": _Objective("wasserstein", 1.0, -1.0, "wasserstein", 1.0),
}
LOSSES = tuple(_OBJECTIVES)
GENERATOR_OUTPUTS = ("tanh", "sigmoid")

# One of so many samples stands for all in the gradient penalty, and the activations of which it is exact.
PENALTY_SHARE = 4
LINEAR_IN_PIECES = "relu", "leaky_relu", "identity"

# Positions in the plan's networks.
_GENERATOR, _DISCRIMINATOR = 0, 1


class GAN(Estimator):
    """Generative adversarial network (Goodfellow et al., 2014) of two multilayer perceptrons.

    The generator G makes a sample from noise z, the discriminator D tells samples of the data from generated ones; each
    learns against the other. D gives a logit, and its loss is the negative of the value function,
    ``-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z))))``, a mean over a mini-batch.

    Parameters
    ----------
    latent_dim : int
        Width of the noise, which is normal, with variance 1 in training.
    generator, discriminator : list of int
        Widths after the input. The last of `generator` is the number of features, the last of `discriminator` is 1.
    n_classes : int, optional
        How many classes samples are of, at least 2; 0 for samples without classes. Both networks are given the class,
        as a one-hot row that follows noise and sample (Mirza and Osindero, "Conditional Generative Adversarial Nets",
        2014), and `sample` makes samples of the class that is asked for.
    generator_activation, discriminator_activation : str
        Of the hidden layers: any activation of `gemmlet.kernels`. Where it is leaky_relu its slope is 0.2 (Radford et
        al., 2016).
    generator_output : {"tanh", "sigmoid"}
        Activation of the generator's last layer. With tanh both networks see samples scaled to [-1, 1]; what goes into
        `fit` and comes out of `sample` is within [0, 1] in either case. With sigmoid a background of 0 is 0 to D, too,
        whose weights for pixels that are always background then learn from speckles alone: fewer are left.
    generator_output_bias : float
        The biases of the generator's last layer at first. With the one whose activation is the mean of the data (-2 and
        sigmoid for handwritten digits) D does not tell both apart by their brightness at once.
    loss : {"non_saturating", "minimax", "hinge", "wasserstein"}
        What the generator minimises: ``-log sigmoid(D(G(z)))``, whose gradient does not vanish while D is winning, or
        ``log(1 - sigmoid(D(G(z))))``. Or ``-D(G(z))``, while D's loss is ``max(1 - D(x), 0) + max(1 + D(G(z)), 0)``
        (Lim and Ye, "Geometric GAN", 2017), or ``-D(x) + D(G(z))`` (Arjovsky et al., "Wasserstein GAN", 2017), which
        has no bound without a `gradient_penalty`.
    label_smoothing : float, within [0, 1)
        D's target for samples of the data is 1 minus this (one-sided label smoothing, Salimans et al., 2016), with the
        first two losses.
    gradient_penalty : float, at least 0
        Half of this times the mean of ``|dD(x) / dx|²`` over samples of the data, x as D sees them, is added to D's
        loss (R1; Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018). A quarter of each
        mini-batch stands for the whole. D's activation must be linear in pieces: relu, leaky_relu or identity. The
        losses of the history are without it.
    ema_decay : float, within [0, 1)
        `sample` uses an exponential moving average of the generator's parameters with this decay per step (Yazıcı et
        al., 2019); less in the first steps, ``(1 + step) / (10 + step)``. With 0 it is the generator itself.
    temperature : float, above 0
        The standard deviation of the noise that samples are made from, while training has 1. Below 1 they are clearer
        and less different (Kingma and Dhariwal, "Glow", 2018).
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
        n_classes: int = 0,
        generator_activation: str = "relu",
        discriminator_activation: str = "leaky_relu",
        generator_output: str = "tanh",
        generator_output_bias: float = 0.0,
        loss: str = "non_saturating",
        label_smoothing: float = 0.1,
        gradient_penalty: float = 0.0,
        ema_decay: float = 0.999,
        temperature: float = 1.0,
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
        self.n_classes = checks.whole_number(n_classes, "n_classes", 0)
        if self.n_classes == 1:
            raise ValueError("n_classes must be 0 or at least 2, got 1")
        self.generator_activation = activation_name(generator_activation, "generator_activation")
        self.discriminator_activation = activation_name(discriminator_activation, "discriminator_activation")
        self.generator_output = checks.choice(generator_output, "generator_output", GENERATOR_OUTPUTS)
        self.generator_output_bias = arguments.number(generator_output_bias, "generator_output_bias")
        self.loss, self.label_smoothing, self.ema_decay = loss, label_smoothing, ema_decay
        self.gradient_penalty, self.temperature = gradient_penalty, temperature
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
        self._found = {"dtype": self.dtype} if dtype is None else {}
        self._shuffle, self._training_noise, self._sampling_noise = self._fresh_streams()[1:]

    _stream_names = "shuffle", "training_noise", "sampling_noise"
    _in_repr = (
        "latent_dim", "generator", "discriminator", "n_classes", "loss", "dtype", "seed", "discriminator_dropout",
        "discriminator_input_dropout", "discriminator_input_noise",
    )  # fmt: skip
    _checks = Trainable._checks | {
        **dict.fromkeys(
            (
                "latent_dim", "generator", "discriminator", "n_classes", "generator_activation",
                "discriminator_activation", "generator_output", "generator_output_bias", "features", "seed",
            ),
            check_fixed,
        ),
        "loss": lambda _, value, name: checks.choice(value, name, LOSSES),
        "temperature": lambda _, value, name: arguments.number(value, name, low=0.0, open_low=True),
        "gradient_penalty": lambda gan, value, name: gan._penalty(value, name),
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
        widths = self._widths({name: getattr(self, name) for name in self._WIDTHS})
        self._generator = dense(widths["generator."], self.generator_activation, self.generator_output)
        self._discriminator = dense(widths["discriminator."], self.discriminator_activation, None)
        self._generator.layers[-1].bias[...] = self.generator_output_bias
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
        classes = f"n_classes={self.n_classes}, " if self.n_classes else ""
        names = "discriminator_dropout", "discriminator_input_dropout", "discriminator_input_noise"
        given = "".join(f"{name}={rate}, " for name in names if (rate := getattr(self, name)))
        return (
            f"GAN({self.latent_dim}, {self.generator}, {self.discriminator}, {classes}loss={self.loss!r}, {given}"
            f"dtype=np.{self.dtype}, seed={self.seed})"
        )

    @property
    def generator_parameters(self) -> list[Array]:
        """The arrays of the generator: weight (in_features, out_features) and bias of each layer in turn.

        Where there are classes the first weight ends in a row for each.
        """
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
        verbose: bool | int = False,
        callback: Callable[[GANProgress], object] | None = None,
        callback_every: str = "batch",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        *,
        steps_per_epoch: int | None = None,
        augment: Augment | None = None,
        y: Any = None,
    ) -> GANHistory:
        """Train both networks on samples `x`.

        For each mini-batch the discriminator takes one step, then the generator.

        Parameters
        ----------
        x : array_like, shape (n, features)
            Rows of real numbers within [0, 1]; or uint8 images, of shape (n, 28, 28) too, which count as value/255 and
            are expanded a mini-batch at a time. On a GPU, they are trained on there. Or batches of them, as in
            `MLP.fit`; of one that is a pair, as a DataLoader's, the first counts. A list is one of samples, unless
            there is `steps_per_epoch`.
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
        checkpoint, resume, steps_per_epoch, augment
            As in `MLP.fit`.
        y : array_like, shape (n,), optional
            The class of each sample, an integer from 0 to ``n_classes - 1``, or one-hot rows (n, n_classes): needed if
            there are classes, and only then.

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
            dtype, source = None if self._follows_samples else self.dtype, None
            if steps_per_epoch is not None or is_source(x):
                refuse({"checkpoint": checkpoint is not None, "resume": resume, "augment": augment is not None})
                if y is not None:
                    raise ValueError("y is for samples in an array; batches are pairs of samples and labels")
                source, (samples, labels) = self._batches(x, steps_per_epoch, epochs, shuffle, dtype)
            else:
                if augment is not None:
                    check_augment(augment, x)
                samples = self._samples(x, dtype)
                labels = self._labels(y, len(samples), "y")
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

            def gather_of(samples: Samples, labels: Any) -> Gather:
                return self._gather(samples.dataset(may_skip_zeros=False), labels)

            def plan_of(samples: Samples, labels: Any) -> TrainingPlan:
                phases = [
                    gather_of(samples, labels),
                    # The same noise serves both steps, so that the generator's forward pass is done once.
                    Forward(_GENERATOR, (NOISE,)),
                    *self._discriminator_phases(),
                    discriminator.update(_DISCRIMINATOR),
                    *self._generator_phases(),
                    generator.update(_GENERATOR),
                ]
                return self._plan(phases, generator, discriminator)

            def is_fused() -> bool:
                return samples.backend.supports_fused(plan_of(samples, labels))

            augmented = None
            if augment is not None:
                how = augment, self.augment_seed, settings.batch_size
                augmented = Augmented(samples, *how, labels, is_fused=is_fused)
            data, groups = {"x": samples.array} | ({} if labels is None else {"y": labels}), [discriminator, generator]
            block = (samples, labels) if augmented is None else (augmented.samples, augmented.targets)
            history, plan = GANHistory(), plan_of(*block)
            if source is None:
                Training(self, history, samples, plan, optimizers, groups, settings, data, augmented=augmented).run()
            else:
                loop = source, gather_of, None if batch_size is None else settings.batch_size
                BatchTraining(*loop, self, history, samples, plan, optimizers, groups, settings, data).run()
        return history

    def _batches(
        self, x: Any, steps_per_epoch: Any, epochs: Any, shuffle: Any, dtype: np.dtype[Any] | None
    ) -> tuple[Source, Piece]:
        """Where batches come from, and the first of them."""

        def load(batch: Any, name: str) -> Piece:
            nonlocal dtype
            is_pair = self._is_pair(batch)
            samples = self._samples(batch[0] if is_pair else batch, dtype, name)
            dtype = samples.dtype
            if not self.n_classes:
                return Piece(samples, None)
            labels = batch[1] if is_pair and len(batch) == 2 else None
            return Piece(samples, self._labels(labels, len(samples), f"y{name[1:]}"))

        source = Source(x, steps_per_epoch, checks.whole_number(epochs, "epochs", 1), load)
        return source, source.first(self._shuffle if arguments.flag(shuffle, "shuffle") else None)

    def _is_pair(self, batch: Any) -> bool:
        """Whether a batch is samples and labels, or samples alone as a DataLoader gives them: no list of samples."""
        if not isinstance(batch, list | tuple) or len(batch) not in (1, 2):
            return False
        shape: Any = getattr(batch[0], "shape", ())
        return len(shape) > 1 and (shape[0] == 1 or math.prod(shape) != self.features)

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

    def _gather(self, dataset: Dataset, labels: NDArray[np.int64] | None) -> Gather:
        """Samples, from [0, 1] to the range of the generator."""
        if labels is not None:
            dataset = dataset._replace(labels=Labels(labels, self.n_classes))
        return Gather(dataset, 2.0, -1.0) if self.generator_output == "tanh" else Gather(dataset)

    def _discriminator_phases(self) -> list[Phase]:
        """From samples, and from what is generated, to the discriminator's gradients."""
        objective = _OBJECTIVES[self.loss]
        smoothing = self.label_smoothing if objective.discriminator == _LOGISTIC else 0.0
        return [
            Forward(_DISCRIMINATOR, (SAMPLES, _GENERATOR)),
            Loss(_DISCRIMINATOR, objective.discriminator, (objective.samples - smoothing, objective.generated)),
            Backward(_DISCRIMINATOR),
            *[GradientPenalty(_DISCRIMINATOR, self.gradient_penalty, PENALTY_SHARE)] * bool(self.gradient_penalty),
        ]

    def _generator_phases(self) -> list[Phase]:
        """From what is generated to the generator's gradients, through the discriminator as it is then."""
        objective = _OBJECTIVES[self.loss]
        return [
            Forward(_DISCRIMINATOR, (_GENERATOR,), SECOND_PASS if self._is_random else 0),
            Loss(_DISCRIMINATOR, objective.generator, (objective.wanted,), sign=objective.sign),
            Backward(_DISCRIMINATOR, to=_GENERATOR),
            Backward(_GENERATOR),
        ]

    @property
    def _is_random(self) -> bool:
        return bool(self.discriminator_dropout or self.discriminator_input_dropout or self.discriminator_input_noise)

    _progress = GANProgress

    def _metrics(self, sums: Sequence[float], correct: float, seen: int) -> dict[str, float]:
        return {"generator_loss": sums[1] / seen, "discriminator_loss": sums[0] / seen}

    def discriminator_loss_and_gradients(
        self, x: Any, z: Any, y: Any = None, step: int | None = None
    ) -> tuple[float, list[Array]]:
        """Loss of the discriminator, and its gradients: one array for each of `discriminator_parameters`.

        A gradient penalty is in the gradients, and not in the loss.

        Parameters
        ----------
        x : array_like, shape (n, features)
            As in `fit`.
        z : array_like, shape (m, latent_dim)
            Noise for the generator, as many rows as there are samples.
        y : array_like, shape (n,), optional
            The classes of both, as in `fit`.
        step : int, optional
            As in `MLP.loss_and_gradients`.
        """
        samples = self._samples(x, self.dtype).to_cpu()
        noise = arguments.on_cpu(self._checked_noise(z, len(samples)))
        phases = [
            self._gather(samples.dataset(may_skip_zeros=False), self._labels(y, len(samples), "y")),
            Forward(_GENERATOR, (NOISE,)),
            *self._discriminator_phases(),
        ]
        return self._gradients(phases, noise, step, _DISCRIMINATOR)

    def generator_loss_and_gradients(self, z: Any, y: Any = None, step: int | None = None) -> tuple[float, list[Array]]:
        """Loss of the generator, and its gradients: one array for each of `generator_parameters`.

        Parameters
        ----------
        z : array_like, shape (n, latent_dim)
            Noise, at least one row.
        y : array_like, shape (n,), optional
            The classes to generate, as in `fit`.
        step : int, optional
            As in `MLP.loss_and_gradients`.
        """
        noise = arguments.on_cpu(self._checked_noise(z, None))
        if not len(noise):
            raise ValueError("z is empty; expected at least one row")
        labels = self._labels(y, len(noise), "y")
        dataset = Dataset(noise, labels=None if labels is None else Labels(labels, self.n_classes))
        phases = [Gather(dataset), Forward(_GENERATOR, (NOISE,)), *self._generator_phases()]
        return self._gradients(phases, noise, step, _GENERATOR)

    def _gradients(
        self, phases: Sequence[Phase], noise: Array, step: int | None, network: int
    ) -> tuple[float, list[Array]]:
        number = 0 if step is None else checks.whole_number(step, "step", 0)
        taken = gradients(select.current(), self._plan(phases, drops=step is not None), len(noise), noise, number)
        return taken.losses[0], taken.gradients[network]

    # Use.

    def noise(self, n: int, seed: int | None = None) -> Array:
        """Draw noise for `sample`: normal, with the standard deviation `temperature`.

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
        rng = self._sampling_noise
        if seed is not None:
            rng = np.random.default_rng(checks.whole_number(seed, "seed", 0, is_count=False))
        noise = self._draw(rng, count)
        return noise if self.temperature == 1.0 else noise * self.dtype.type(self.temperature)

    def sample(self, n: int | None = None, *, z: Any = None, label: Any = None) -> Array:
        """Generate samples.

        Parameters
        ----------
        n : int, optional
            How many; needed without `z`.
        z : array_like, shape (n, latent_dim), optional
            The noise to make them from, as `noise` draws it.
        label : int, or array_like of shape (n,), optional
            Their classes, where there are some: from 0 to ``n_classes - 1``. By default all in turn: sample i is one of
            the class ``i % n_classes``.

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
        classes = self._asked(label, len(noise))
        backend = select.of(noise)
        result = backend.empty((len(noise), self.features), self.dtype, noise)
        generator = self._average.with_parameters(lambda array: backend.to_device(array, noise))
        for where in slices(len(noise), CHUNK):
            rows = noise[where]
            if classes is not None:
                one_of_each = one_hot(classes[where], (len(rows), self.n_classes), self.dtype)
                rows = np.hstack([arguments.on_cpu(rows), one_of_each])
                rows = backend.to_device(rows, noise)
            made = generator.forward(backend.to_device(rows))
            if self.generator_output == "tanh":
                made = backend.scaled(made, self.dtype, 0.5, 0.5)
            backend.assign(result[where], made)
        return result

    # Arguments.

    def _samples(self, x: Any, dtype: np.dtype[Any] | None, name: str = "x") -> Samples:
        samples = Samples(x, self.features, dtype, name)
        if not len(samples):
            raise ValueError(f"{name} is empty; expected at least one sample")
        samples.convert()
        if samples.array.dtype != np.uint8:
            low, high = samples.backend.extremes(samples.array)
            if spoilt := None if math.isfinite(low) else samples.not_finite():
                raise ValueError(spoilt)
            if not (low >= 0.0 and high <= 1.0):
                given = arguments.on_cpu(samples.array)
                place = np.argwhere(~((given >= 0.0) & (given <= 1.0)))[0]
                raise ValueError(
                    f"{name} must lie within [0, 1], but {checks.item(name, place)} is {given[tuple(place)]}; images "
                    "of bytes count as value/255 if they are uint8"
                )
        return samples

    def _penalty(self, value: Any, name: str) -> float:
        penalty = arguments.number(value, name, low=0.0)
        if penalty and self.discriminator_activation not in LINEAR_IN_PIECES:
            raise ValueError(
                f"{name} needs a discriminator_activation that is linear in pieces, {', '.join(LINEAR_IN_PIECES)}, "
                f"got {self.discriminator_activation!r}"
            )
        return penalty

    def _labels(self, y: Any, n: int, name: str) -> NDArray[np.int64] | None:
        """Classes as training takes them; None where there are none."""
        if not self.n_classes:
            if y is not None:
                raise ValueError(f"{name} was given, but this network knows no classes: GAN(n_classes=...)")
            return None
        if y is None:
            raise TypeError(f"{name} is needed: the class of each sample, as n_classes is {self.n_classes}")
        targets, _ = of_classes(y, Meaning(self.n_classes, None, False, False), "softmax", self.dtype, name)
        if targets.ndim != 1:
            raise ValueError(f"{name} has soft labels; expected one class for each sample")
        if len(targets) != n:
            raise ValueError(f"{name} has {len(targets)} labels, but there are {n} samples; they must match")
        return np.ascontiguousarray(targets, np.int64)

    def _asked(self, label: Any, n: int) -> NDArray[np.int64] | None:
        """The classes of `n` samples that are to be made."""
        if self.n_classes and label is None:
            return np.arange(n, dtype=np.int64) % self.n_classes
        if self.n_classes and np.ndim(label) == 0:
            label = np.full(n, checks.whole_number(label, "label", 0, is_count=False))
        return self._labels(label, n, "label")

    def _checked_noise(self, z: Any, n: int | None) -> Array:
        noise = arguments.as_array(z, "z")
        checks.real_numbers(noise.dtype, "z")
        if noise.ndim != 2 or noise.shape[1] != self.latent_dim or n not in (None, len(noise)):
            raise ValueError(f"z has shape {noise.shape}, expected ({'n' if n is None else n}, {self.latent_dim})")
        return arguments.as_floats(as_dtype(noise, self.dtype, "z"), "z")

    # Files.

    def _config(self) -> dict[str, Any]:
        names = (
            "latent_dim", "generator", "discriminator", "n_classes", "generator_activation",
            "discriminator_activation", "generator_output", "generator_output_bias", "loss", "label_smoothing",
            "gradient_penalty", "ema_decay", "temperature", "discriminator_dropout", "discriminator_input_dropout",
            "discriminator_input_noise",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _shown_parts(self) -> dict[str, Dense]:
        return {"generator ": self._generator, "discriminator ": self._discriminator}

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
        within [0, 1]. Where there are classes, a row of noise is followed by the one-hot row of one:
        (n, latent_dim + n_classes).
        """
        from . import onnx

        halved = self.generator_output == "tanh"
        onnx.write(path, "GAN", self._saved_config(), self._average, input_name="z", output_name="x", halved=halved)

    # What the widths follow from.
    _WIDTHS = "latent_dim", "generator", "discriminator", "n_classes", "ema_decay"

    @staticmethod
    def _widths(config: dict[str, Any]) -> dict[str, Sequence[int]]:
        classes = config.get("n_classes", 0)  # which older files have none of
        generator = [config["latent_dim"] + classes, *config["generator"]]
        widths = {"generator.": generator, "discriminator.": [generator[-1] + classes, *config["discriminator"]]}
        return widths | ({"average.": generator} if config["ema_decay"] else {})


def interpolate(start: Any, end: Any, steps: int = 10) -> Array:
    """Return noise that leads from some rows of noise to others, for `GAN.sample`.

    It follows great circles, so that it stays as long as noise is: ``(sin((1 - t) a) start + sin(t a) end) / sin(a)``
    with the angle a between both rows. Shoemake, 1985; White, "Sampling Generative Networks", 2016.

    Parameters
    ----------
    start, end : array_like, shape (n, latent_dim)
    steps : int
        How many rows for each, `start` and `end` among them; at least 2.

    Returns
    -------
    ndarray, shape (n, steps, latent_dim)
        Of the dtype of both; float64 of integers.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.
    """
    ends = [arguments.on_cpu(arguments.as_array(value, name)) for value, name in ((start, "start"), (end, "end"))]
    for rows, name in zip(ends, ("start", "end"), strict=True):
        checks.real_numbers(rows.dtype, name)
    if ends[0].ndim != 2 or ends[0].shape != ends[1].shape:
        raise ValueError(
            f"start and end have shapes {ends[0].shape} and {ends[1].shape}; expected (n, latent_dim), both"
        )
    count = checks.whole_number(steps, "steps", 2)
    a, b = (rows.astype(np.float64)[:, np.newaxis] for rows in ends)
    norms = np.linalg.norm(a, axis=2, keepdims=True) * np.linalg.norm(b, axis=2, keepdims=True)
    cosine = np.divide((a * b).sum(axis=2, keepdims=True), norms, out=np.ones_like(norms), where=norms > 0)
    angle, t = np.arccos(np.clip(cosine, -1.0, 1.0)), np.linspace(0.0, 1.0, count)[:, np.newaxis]
    sine = np.sin(angle)
    # Rows of one direction, or of opposite ones, are on no great circle that is known: a line.
    straight = sine < 1e-6
    sine = np.where(straight, 1.0, sine)
    from_start = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    from_end = np.where(straight, t, np.sin(t * angle) / sine)
    dtype = np.result_type(*ends)
    result: Array = (from_start * a + from_end * b).astype(dtype if dtype.kind == "f" else np.float64)
    return result
