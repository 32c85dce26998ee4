"""The multilayer perceptron."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _arguments as arguments
from .. import kernels
from ..backends import select
from ..formulas.losses import LOSSES, ROW_LOSSES
from ..training.plan import SAMPLES, Backward, Forward, Gather, Loss, Phase, TrainingPlan, Update
from ..training.reference import gradients, one_hot, predicted_classes
from . import _checks as checks
from .dataset import CHUNK, Samples, not_finite, slices
from .dense import Dense, activation_name, activation_number
from .fit import VALIDATION, History, Progress, Trainable, network_of
from .optimizers import SGD, Optimizer, ParameterGroup, Schedule, as_optimizer

Array = NDArray[Any]

# What outputs mean, and the losses that they can be trained with, the default first.
OUTPUTS = {
    "softmax": tuple(ROW_LOSSES),
    "sigmoid": tuple(name for name, loss in LOSSES.items() if loss.prediction == "logits"),
    "identity": (
        "mean_squared_error",
        *(name for name, loss in LOSSES.items() if name != "mean_squared_error" and not loss.unit_interval),
    ),
}


class MLP(Trainable):
    """Multilayer perceptron: linear layers with an activation between them, and a loss that belongs to its outputs.

    Parameters
    ----------
    layers : list of int
        Widths from the input to the output, ``[784, 128, 10]`` say; at least two.
    activation : str
        Of the hidden layers: any activation of `gemmlet.kernels`.
    output : {"softmax", "sigmoid", "identity"}
        What the outputs mean, and with it the objective, a mean over the samples:

        - softmax: one class out of several. Cross-entropy of the softmax.
        - sigmoid: with one output, class 1 against class 0; with several, each output on its own says whether the
          sample is of its class. The objective is the negative log-likelihood of a sample: binary
          cross-entropy, *summed* over the outputs.
        - identity: numbers. Mean squared error, the mean over the outputs too.
    loss : str, optional
        Another objective: an elementwise loss of `gemmlet.kernels`, with its default parameter. With sigmoid one that
        takes logits; with identity any that does not need predictions within [0, 1], `huber` say.
    dtype : float32 or float64
        Of parameters, inputs and results.
    seed : int, at least 0
        Draws the first weights and the order of the samples. The same seed gives the same bits.
    activation_parameter : float, optional
        The number that the activation takes, where it takes one (`negative_slope` of leaky_relu, `alpha` of elu).
    label_smoothing : float, within [0, 1)
        With softmax, targets of the objective become ``(1 - label_smoothing) * t + label_smoothing / classes`` (Szegedy
        et al., 2016); so do those of `evaluate`.
    ema_decay : float, within [0, 1)
        What the network is used with is an exponential moving average of its parameters with this decay per step
        (Polyak and Juditsky, 1992); less in the first steps, ``(1 + step) / (10 + step)``. With 0 it is the parameters
        themselves.
    default_optimizer : str or Optimizer
        What `fit` uses if it is given none: a name, or an optimizer whose settings are taken.
    default_batch_size : int
        Likewise.

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.

    Notes
    -----
    Weights are drawn uniformly by Xavier's rule (Glorot and Bengio, 2010) or He's (He et al., 2015), as the registry
    says for the activation; biases start at 0.

    Examples
    --------
    >>> import numpy as np
    >>> from gemmlet.nn import MLP, Adam
    >>> x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
    >>> model = MLP([2, 16, 2], seed=0)
    >>> history = model.fit(x, [0, 1, 1, 0], epochs=300, batch_size=4, optimizer=Adam(0.05))
    >>> model.predict(x).tolist()
    [0, 1, 1, 0]
    """

    def __init__(
        self,
        layers: Sequence[int],
        activation: str = "tanh",
        output: str = "softmax",
        *,
        loss: str | None = None,
        dtype: DTypeLike = np.float32,
        seed: int = 0,
        activation_parameter: float | None = None,
        label_smoothing: float = 0.0,
        ema_decay: float = 0.0,
        default_optimizer: str | Optimizer = "adam",
        default_batch_size: int = 64,
    ) -> None:
        self.layers = checks.widths(layers, "layers", 2)
        self.activation = activation_name(activation)
        self.output = checks.choice(output, "output", OUTPUTS)
        self.loss = OUTPUTS[output][0] if loss is None else checks.choice(loss, "loss", OUTPUTS[output])
        self.dtype = checks.float_dtype(dtype)
        self.seed = checks.whole_number(seed, "seed", 0)
        self.activation_parameter = activation_number(activation, activation_parameter)
        self.label_smoothing = checks.fraction(label_smoothing, "label_smoothing")
        self.ema_decay = ema_decay
        self.default_optimizer = as_optimizer(default_optimizer, "default_optimizer").fresh()
        self.default_batch_size = checks.whole_number(default_batch_size, "default_batch_size", 1)
        if output == "softmax" and self.layers[-1] < 2:
            raise ValueError('output "softmax" needs at least 2 outputs; for one output use "sigmoid"')
        if self.label_smoothing and output != "softmax":
            raise ValueError(f'label_smoothing needs output "softmax", this network has {output!r}')
        self.steps = 0
        # Two streams, so that the order of the samples does not depend on how many weights were drawn.
        draw, self._shuffle = (np.random.default_rng(s) for s in np.random.SeedSequence(self.seed).spawn(2))
        self._dense = Dense(self.layers, activation, None, self.dtype, draw, self.activation_parameter)
        self._average = self._dense.copy() if self.ema_decay else self._dense

    @classmethod
    def classic(cls, seed: int = 0) -> MLP:
        """Return the network of the textbook: 784-128-10, tanh, sigmoid outputs, trained with SGD at a rate of 0.1.

        Its `fit` takes these settings, and mini-batches of 16, unless told otherwise.
        """
        return cls([784, 128, 10], "tanh", "sigmoid", seed=seed, default_optimizer=SGD(0.1), default_batch_size=16)

    def __repr__(self) -> str:
        return f"MLP({self.layers}, {self.activation!r}, {self.output!r}, dtype=np.{self.dtype}, seed={self.seed})"

    @property
    def parameters(self) -> list[Array]:
        """The arrays that training changes: weight (in_features, out_features) and bias of each layer in turn."""
        return self._dense.parameters

    # Training.

    def fit(
        self,
        x: Any,
        y: Any,
        epochs: int = 10,
        batch_size: int | None = None,
        optimizer: str | Optimizer | None = None,
        lr_schedule: Schedule | None = None,
        validation_data: tuple[Any, Any] | None = None,
        shuffle: bool = True,
        verbose: bool = False,
        callback: Callable[[Progress], object] | None = None,
        callback_every: str = "batch",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
    ) -> History:
        """Train on samples `x` and their labels `y`.

        Parameters
        ----------
        x : array_like, shape (n, layers[0])
            Rows of the network's dtype; or uint8 images, of shape (n, 28, 28) too, which count as value/255 and are
            expanded a mini-batch at a time. Or a sparse matrix of scipy, of either dtype. On a GPU (CuPy's, or anything
            with ``__cuda_array_interface__`` or DLPack), they are trained on there; `y` may be there too. The
            parameters stay NumPy's.
        y : array_like
            Class indices, integers of shape (n,); with one sigmoid output 0 or 1. With identity outputs numbers of the
            network's dtype, shape (n,) for one output, else (n, layers[-1]).
        epochs : int
            How often each sample is used.
        batch_size : int, optional
            Samples per update; the last mini-batch of an epoch may be smaller. By default 64, or what the preset says.
        optimizer : str or Optimizer, optional
            A name, ``"sgd"``, ``"adam"`` or ``"adamw"``, with its default settings; or an object, whose state is
            continued. By default ``"adam"``, or what the preset says.
        lr_schedule : callable, optional
            ``lr_schedule(done)``, with the fraction of all mini-batches of this `fit` that is done, from 0 to below 1,
            returns what the learning rate is multiplied by in the next one: `linear_decay`, say, or
            ``lambda done: 0.1 ** int(3 * done)``. `optimizer.lr` stays as it is. The weights, which are a callback's to
            look at, may be older while it is asked.
        validation_data : (x, y), optional
            Evaluated after each epoch.
        shuffle : bool
            Whether each epoch takes the samples in a new random order.
        verbose : bool
            Whether to print a line per epoch.
        callback : callable, optional
            Called with a `Progress`. It may raise `StopTraining`.
        callback_every : {"batch", "call", "epoch"}
            When it is called: after every mini-batch, which then is a call of the backend by itself; after every call,
            which takes about a tenth of a second; or after every epoch. The last two train faster, on a GPU by far,
            with the same result.
        checkpoint : path, optional
            A file that is written again and again, each time whole or not at all: at the end of each epoch, every 30
            seconds in between, but not more often than every 50 times as long as that takes; and when `fit` ends,
            whatever ends it, Ctrl-C or an error. It has the network, which `load` reads, state and settings of the
            optimizer, which `load_optimizers` reads, the random streams, the history, and where the fit is.
        resume : bool or path
            A checkpoint to go on from: the results, history included, have the same bits as if nothing had come
            between. With True it is `checkpoint` if that exists, so that a job that is started again goes on. Samples
            and arguments must be those of then, but for `epochs`, which may be more, and callbacks.

        Returns
        -------
        History

        Raises
        ------
        TypeError, ValueError
            An argument does not fit. Nothing has been trained then, but where samples or targets are not finite, which
            training itself finds: then all is as it was before, too, unless a callback has changed them later on; or
            where `lr_schedule` returns no learning rate, which ends training between two steps.
        DivergedError
            A loss or a parameter is no longer finite. All is as it was shortly before that.
        OSError
            A checkpoint cannot be read or written; in the second case all is as the last step has left it.
        """
        samples, targets = self._samples_and_targets(x, y)
        settings = self._settings(
            epochs, batch_size, lr_schedule, shuffle, verbose, callback, callback_every, checkpoint, resume
        )
        rule = self._optimizer(optimizer)
        validate = None
        if validation_data is not None:
            names = "validation_data[0]", "validation_data[1]"
            validation = self._samples_and_targets(*checks.pair(validation_data, "validation_data"), names)
            for spoilt in (validation[0].not_finite(), not_finite(validation[1], names[1])):
                if spoilt:
                    raise ValueError(spoilt)
            validation[0].stay()

            def validate() -> dict[str, float]:
                return dict(zip(VALIDATION, self._evaluate(*validation), strict=True))

        history, group = History(), rule.group(self.parameters)
        plan = self._plan(samples, targets, group)
        self._train(history, samples, plan, {"optimizer": rule}, [group], settings, validate)
        return history

    def _plan(self, samples: Samples, targets: Array, group: ParameterGroup | None = None) -> TrainingPlan:
        """A step; without `group` all but the update."""
        reduction = "mean" if self.output == "identity" else "sum"
        phases: list[Phase] = [
            Gather(samples.dataset(may_skip_zeros=True)),
            Forward(0, (SAMPLES,)),
            Loss(0, self.loss, np.ascontiguousarray(targets), self.label_smoothing or None, reduction),
            Backward(0),
        ]
        if group is not None:
            phases.append(Update(0, group.rule, group.max_norm))
        average = self._average if self.ema_decay else None
        return TrainingPlan((network_of(self._dense, group, average),), tuple(phases))

    _progress = Progress

    def _metrics(self, sums: Sequence[float], correct: int, seen: int) -> dict[str, float]:
        return {"loss": sums[0] / seen, "accuracy": math.nan if self.output == "identity" else correct / seen}

    def loss_and_gradients(self, x: Any, y: Any) -> tuple[float, list[Array]]:
        """Loss of all samples as one mini-batch, of `parameters`, and its gradients: one array for each of them.

        Parameters
        ----------
        x, y
            As in `fit`.
        """
        samples, targets = self._samples_and_targets(x, y)
        step = gradients(select.current(), self._plan(samples.to_cpu(), targets), len(samples))
        return step.losses[0], step.gradients[0]

    def _loss(self, outputs: Array, targets: Array) -> float:
        """The objective, where the outputs are."""
        backend = select.of(outputs)
        if self.output == "softmax":
            labels = backend.placed_like(targets, outputs)
            return float(getattr(kernels, self.loss)(outputs, labels, label_smoothing=self.label_smoothing)[0])
        wanted = backend.placed_like(one_hot(targets, outputs.shape, self.dtype), outputs)
        mean = float(getattr(kernels, self.loss)(outputs, wanted)[0])
        # The kernel's mean is over all elements, the objective's of sigmoid outputs over the samples.
        return mean * outputs.shape[1] if self.output == "sigmoid" else mean

    # Use.

    def predict(self, x: Any) -> Array:
        """Predict the class of each sample, or the numbers that the outputs give.

        Parameters
        ----------
        x : array_like
            As in `fit`.

        Returns
        -------
        ndarray
            Class indices, int64 of shape (n,). With identity outputs the outputs: (n,) for one, else (n, layers[-1]).
            Of samples that are on a GPU a `cupy.ndarray` there, as of `predict_proba` and `features`.
        """
        samples = self._samples(x)
        if self.output == "identity":
            outputs = self._by_chunks(samples, self.layers[-1])
            return outputs[:, 0] if self.layers[-1] == 1 else outputs
        classes = np.empty(len(samples), np.int64)
        for where, outputs in self._outputs(samples):
            classes[where] = predicted_classes(arguments.on_cpu(outputs))
        return samples.backend.placed_like(classes, samples.array)

    def predict_proba(self, x: Any) -> Array:
        """Probabilities that the outputs stand for.

        Parameters
        ----------
        x : array_like
            As in `fit`.

        Returns
        -------
        ndarray, shape (n, layers[-1])
            With softmax they add up to 1 over the classes; with sigmoid each stands for itself.

        Raises
        ------
        ValueError
            The outputs are of the kind identity, which are no probabilities.
        """
        if self.output == "identity":
            raise ValueError('predict_proba needs output "softmax" or "sigmoid", this network has "identity"')
        to_probability = kernels.softmax if self.output == "softmax" else kernels.sigmoid
        return self._by_chunks(self._samples(x), self.layers[-1], to_probability)

    def evaluate(self, x: Any, y: Any) -> dict[str, float]:
        """Return ``{"loss": ..., "accuracy": ...}``, means over the samples; with identity outputs the accuracy is NaN.

        Parameters
        ----------
        x, y
            As in `fit`.
        """
        loss, accuracy = self._evaluate(*self._samples_and_targets(x, y))
        return {"loss": loss, "accuracy": accuracy}

    def _evaluate(self, samples: Samples, targets: Array) -> tuple[float, float]:
        loss_sum, correct = 0.0, 0
        for where, outputs in self._outputs(samples):
            loss_sum += self._loss(outputs, targets[where]) * len(outputs)
            if self.output != "identity":
                correct += int(np.count_nonzero(predicted_classes(arguments.on_cpu(outputs)) == targets[where]))
        return loss_sum / len(samples), math.nan if self.output == "identity" else correct / len(samples)

    def features(self, x: Any) -> Array:
        """Activations of the last hidden layer: what the network sees in each sample.

        Parameters
        ----------
        x : array_like
            As in `fit`.

        Returns
        -------
        ndarray, shape (n, layers[-2])

        Raises
        ------
        ValueError
            There is no hidden layer.
        """
        if len(self.layers) < 3:
            raise ValueError(f"features needs a hidden layer, this network has the layers {self.layers}")
        depth = len(self.layers) - 2
        return self._by_chunks(self._samples(x), self.layers[-2], depth=depth)

    def _outputs(self, samples: Samples, depth: int | None = None) -> Iterator[tuple[slice, Array]]:
        """What the last layer gives, or the first `depth` ones, some samples at a time, where the backend computes."""
        backend = samples.backend
        dense = self._average.with_parameters(lambda array: backend.to_device(array, samples.array))
        for where in slices(len(samples), CHUNK):
            yield where, dense.forward(samples.chunk(where), depth)

    def _by_chunks(
        self, samples: Samples, width: int, function: Callable[[Array], Array] | None = None, depth: int | None = None
    ) -> Array:
        """Those of all samples, of each chunk what `function` gives, in the place of the samples."""
        result = samples.backend.empty((len(samples), width), self.dtype, samples.array)
        for where, outputs in self._outputs(samples, depth):
            samples.backend.assign(result[where], outputs if function is None else function(outputs))
        return result

    # Arguments.

    def _samples(self, x: Any, name: str = "x") -> Samples:
        return Samples(x, self.layers[0], self.dtype, name, sparse=True)

    def _samples_and_targets(self, x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> tuple[Samples, Array]:
        samples = self._samples(x, names[0])
        if not len(samples):
            raise ValueError(f"{names[0]} is empty; expected at least one sample")
        targets = self._targets(y, names[1])
        if len(targets) != len(samples):
            raise ValueError(
                f"{names[0]} has {len(samples)} samples but {names[1]} has {len(targets)} entries; they must match"
            )
        return samples, targets

    def _targets(self, y: Any, name: str) -> Array:
        """Class indices as int64, or numbers as rows."""
        outputs = self.layers[-1]
        if self.output == "identity":
            numbers = arguments.on_cpu(arguments.as_floats(y, name, self.dtype))
            if numbers.ndim == 1 and outputs == 1:
                return numbers[:, np.newaxis]
            if numbers.ndim != 2 or numbers.shape[1] != outputs:
                raise ValueError(
                    f"{name} has shape {numbers.shape}, expected (n,{'' if outputs == 1 else f' {outputs}'})"
                )
            return numbers
        labels = arguments.on_cpu(arguments.as_array(y, name))
        if labels.ndim != 1:
            raise ValueError(f"{name} has shape {labels.shape}, expected (n,): a class index for each sample")
        if labels.dtype.kind not in "iu":
            raise TypeError(f"{name} has dtype {labels.dtype}; class indices must be integers: {name}.astype(np.int64)")
        classes = max(outputs, 2)
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            raise ValueError(f"{name} must lie within 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
        return labels.astype(np.int64, copy=False)

    # Files.

    def _config(self) -> dict[str, Any]:
        names = "layers", "activation", "output", "loss", "activation_parameter", "label_smoothing", "ema_decay"
        return {name: getattr(self, name) for name in names}

    def _parts(self) -> dict[str, Dense]:
        return {"": self._dense} | ({"average.": self._average} if self.ema_decay else {})

    @staticmethod
    def _widths(config: dict[str, Any]) -> dict[str, Sequence[int]]:
        layers = config["layers"]
        return {"": layers} | ({"average.": layers} if config.get("ema_decay") else {})
