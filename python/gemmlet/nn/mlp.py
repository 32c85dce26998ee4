"""The multilayer perceptron."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import _arguments as arguments
from .. import kernels
from .._memory import held
from ..backends import select
from ..formulas.losses import LOSSES, ROW_LOSSES
from ..training.plan import SAMPLES, Backward, Forward, Gather, Loss, Penalty, Phase, TrainingPlan
from ..training.reference import gradients, one_hot, predicted_classes
from . import _checks as checks
from . import monitors
from .augment import Augment, Augmented, check_augment
from .batches import BatchTraining, Piece, Source, refuse
from .dataset import CHUNK, Samples, not_finite, slices
from .dense import Dense, activation_name, activation_number
from .estimator import Predictor
from .files import errors_name
from .fit import VALIDATION, History, Progress, Trainable, Training, check_fixed, fitting, network_of, randomness_of
from .monitors import Metric
from .optimizers import SGD, Optimizer, ParameterGroup, as_optimizer
from .schedules import EarlyStopping, ReduceOnPlateau, Schedule
from .targets import (
    Label,
    Meaning,
    as_labels,
    checked_classes,
    in_units_of_mean,
    numbers,
    of_classes,
    split,
    weights_of,
)

Array = NDArray[Any]

# What outputs mean, and the losses that they can be trained with, the default first.
OUTPUTS = {
    "softmax": tuple(ROW_LOSSES),
    "sigmoid": tuple(name for name, loss in LOSSES.items() if loss.prediction == "logits"),
    "identity": (
        "mean_squared_error",
        *(
            name
            for name, loss in LOSSES.items()
            if name != "mean_squared_error" and not loss.unit_interval and loss.has_minimum
        ),
    ),
}


def _loss(model: MLP, value: Any, name: str) -> str:
    choices = OUTPUTS[model.output]
    if isinstance(value, str) and value in LOSSES and not LOSSES[value].has_minimum:
        raise ValueError(f"{name} {value!r} has no minimum: it is for a GAN; the choices are {', '.join(choices)}")
    return checks.choice(value, name, choices)


def _label_smoothing(model: MLP, value: Any, name: str) -> float:
    number = checks.fraction(value, name)
    if number and model.output != "softmax":
        raise ValueError(f'{name} needs output "softmax", this network has {model.output!r}')
    return number


def _multi_label(model: MLP, value: Any, name: str) -> bool:
    wanted = arguments.flag(value, name)
    if wanted and (model.output != "sigmoid" or model.layers[-1] == 1 or model.classes is not None):
        raise ValueError(f'{name} needs output "sigmoid", several outputs and no classes')
    return wanted


class MLP(Predictor):
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
          sample is of its class, and it may be of several (`multi_label`). The objective is the negative
          log-likelihood of a sample: binary cross-entropy, *summed* over the outputs.
        - identity: numbers. Mean squared error, the mean over the outputs too.
    loss : str, optional
        Another objective: an elementwise loss of `gemmlet.kernels`, with its default parameter. With sigmoid one that
        takes logits; with identity any that does not need predictions within [0, 1], `huber` say. `wasserstein`, which
        has no minimum, is for a `GAN`.
    dtype : float32 or float64, optional
        Of parameters and results; samples of other dtypes are converted. By default the samples of the first `fit`
        decide: float32 if it holds every number of their dtype exactly (float16, uint8, 16-bit integers, bools), else
        float64, as for lists of floats or ints. Until then it is float32. A first `fit` that makes it float64 replaces
        the arrays of `parameters`, by the same draw in float64; values that were changed before are kept.
    seed : int, at least 0
        Draws the first weights and the order of the samples. The same seed gives the same bits.
    activation_parameter : float, optional
        The number that the activation takes, where it takes one (`negative_slope` of leaky_relu, `alpha` of elu).
    label_smoothing : float, within [0, 1)
        With softmax, targets of the objective become ``(1 - label_smoothing) * t + label_smoothing / classes`` (Szegedy
        et al., 2016); so do those of `evaluate`.
    l1, l2 : float, at least 0
        ``l1 * sum(|w|) + l2 / 2 * sum(w**2)`` over all weights, biases left out, is added to the objective of every
        mini-batch. The loss of the history has it; those of validation data and `evaluate`, which say how well samples
        are predicted, do not. L1 draws weights to 0 (Tibshirani, 1996), and has the gradient 0 there. With `SGD`,
        `l2` does the same as `weight_decay`.
    ema_decay : float, within [0, 1)
        What the network is used with is an exponential moving average of its parameters with this decay per step
        (Polyak and Juditsky, 1992); less in the first steps, ``(1 + step) / (10 + step)``. With 0 it is the parameters
        themselves.
    dropout : float or list of float, each within [0, 1)
        The probability with which a step of `fit` leaves out each output of a hidden layer, in units of 2**-16; a list
        has one for each layer. The others are scaled so that the mean stays, and `predict` and `evaluate` use all
        (Srivastava et al., 2014). What is left out follows from `seed`, `steps`, the layer, the unit and the sample's
        place in the mini-batch: it is the same on every backend, and for any number of threads.
    input_dropout : float, within [0, 1)
        The same for the inputs.
    input_noise : float, at least 0
        The standard deviation of noise that each step of `fit` adds to the inputs as the network sees them. It is
        nearly normal, a sum of four random bytes, and drawn like `dropout`. No zeros are skipped then; and on `numba`,
        and of sparse matrices on `cpu`, the reference trains, a mini-batch a call: slower.
    default_optimizer : str or Optimizer
        What `fit` uses if it is given none: a name, or an optimizer whose settings are taken.
    default_batch_size : int
        Likewise.
    classes : list of str, of numbers or of bools, optional
        The labels of the classes, one for each output, or two for one output; `predict` gives them back. By default the
        first `fit` finds them in its targets, and with indices as labels there are none; see there.
    multi_label : bool
        Whether a sample may be of several classes, or of none: `predict` then gives rows of 0 and 1. With sigmoid and
        several outputs. By default the first `fit` finds out.

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
        dtype: DTypeLike | None = None,
        seed: int = 0,
        activation_parameter: float | None = None,
        label_smoothing: float = 0.0,
        l1: float = 0.0,
        l2: float = 0.0,
        ema_decay: float = 0.0,
        dropout: float | Sequence[float] = 0.0,
        input_dropout: float = 0.0,
        input_noise: float = 0.0,
        default_optimizer: str | Optimizer = "adam",
        default_batch_size: int = 64,
        classes: Sequence[Label] | None = None,
        multi_label: bool = False,
    ) -> None:
        self.layers = checks.widths(layers, "layers", 2)
        self.activation = activation_name(activation)
        self.output = checks.choice(output, "output", OUTPUTS)
        self.loss = OUTPUTS[output][0] if loss is None else loss
        self.seed = checks.whole_number(seed, "seed", 0, is_count=False)
        self.activation_parameter = activation_number(activation, activation_parameter)
        self.label_smoothing, self.ema_decay = label_smoothing, ema_decay
        self.l1, self.l2 = l1, l2
        self.dropout: float | list[float] = dropout  # type: ignore[assignment] # _checks makes a list of a sequence
        self.input_dropout, self.input_noise = input_dropout, input_noise
        self.default_optimizer = as_optimizer(default_optimizer, "default_optimizer").fresh()
        self.default_batch_size = default_batch_size
        if output == "softmax" and self.layers[-1] < 2:
            raise ValueError('output "softmax" needs at least 2 outputs; for one output use "sigmoid"')
        self.classes: list[Label] | None = classes  # type: ignore[assignment] # _checks makes a list of it
        self.multi_label = multi_label
        self.steps = 0
        self._draw_layers(checks.float_dtype(dtype))
        self._follows_samples = dtype is None
        self._found = ({"dtype": self.dtype} if dtype is None else {}) | ({"loss": self.loss} if loss is None else {})
        self._shuffle = self._fresh_streams()[1]

    _stream_names = ("shuffle",)
    _in_repr = "layers", "activation", "output", "dtype", "seed", "dropout", "input_dropout", "input_noise"
    _checks = Trainable._checks | {
        **dict.fromkeys(("layers", "activation", "output", "activation_parameter", "seed"), check_fixed),
        "loss": _loss,
        "classes": lambda model, value, _: checked_classes(value, model.output, model.layers[-1]),
        "label_smoothing": _label_smoothing,
        **dict.fromkeys(("l1", "l2"), lambda _, value, name: arguments.number(value, name, low=0.0)),
        "dropout": lambda model, value, name: checks.dropout_rates(value, name, len(model.layers) - 2),
        "input_dropout": lambda _, value, name: checks.fraction(value, name),
        "input_noise": lambda _, value, name: arguments.number(value, name, low=0.0),
        "multi_label": _multi_label,
    }

    def _fresh_streams(self) -> list[np.random.Generator]:
        """Two, so that the order of the samples does not depend on how many weights were drawn."""
        return [np.random.default_rng(s) for s in self._seeds()[:2]]

    def _seeds(self) -> list[np.random.SeedSequence]:
        """Of the weights, of the order of the samples, and of those that are held out."""
        return np.random.SeedSequence(self.seed).spawn(3)

    def _draw_layers(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._dense = Dense(
            self.layers, self.activation, None, dtype, self._fresh_streams()[0], self.activation_parameter
        )
        self._average = self._dense.copy() if self.ema_decay else self._dense

    @classmethod
    def classic(cls, seed: int = 0) -> MLP:
        """Return the network of the textbook: 784-128-10, tanh, sigmoid outputs, trained with SGD at a rate of 0.1.

        Its `fit` takes these settings, and mini-batches of 16, unless told otherwise.
        """
        return cls([784, 128, 10], "tanh", "sigmoid", seed=seed, default_optimizer=SGD(0.1), default_batch_size=16)

    def __repr__(self) -> str:
        others = {name: rate for name in ("dropout", "input_dropout", "input_noise") if (rate := getattr(self, name))}
        given = "".join(f", {name}={value}" for name, value in others.items())
        return (
            f"MLP({self.layers}, {self.activation!r}, {self.output!r}{given}, dtype=np.{self.dtype}, seed={self.seed})"
        )

    @property
    def parameters(self) -> list[Array]:
        """The arrays that training changes: weight (in_features, out_features) and bias of each layer in turn."""
        return self._dense.parameters

    @property
    def _parameters(self) -> dict[str, list[Array]]:
        return {"parameters": self.parameters}

    # Training.

    def fit(
        self,
        x: Any,
        y: Any = None,
        epochs: int = 10,
        batch_size: int | None = None,
        optimizer: str | Optimizer | None = None,
        lr_schedule: Schedule | ReduceOnPlateau | None = None,
        validation_data: tuple[Any, Any] | None = None,
        shuffle: bool = True,
        verbose: bool | int = False,
        callback: Callable[[Progress], object] | None = None,
        callback_every: str = "batch",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        *,
        validation_split: float = 0.0,
        early_stopping: EarlyStopping | None = None,
        metrics: Sequence[str] | Mapping[str, Metric] = (),
        class_weight: str | Mapping[Any, float] | None = None,
        sample_weight: Any = None,
        steps_per_epoch: int | None = None,
        augment: Augment | None = None,
    ) -> History:
        """Train on samples `x` and their labels `y`.

        Parameters
        ----------
        x : array_like, shape (n, layers[0])
            Rows of real numbers, or uint8 images, of shape (n, 28, 28) too. **uint8 counts as value/255**, and is
            expanded a mini-batch at a time; every other dtype counts as its value, and is converted to the network's:
            pixels from 0 to 255 in lists, or as int64, should be made uint8. Or a sparse matrix of scipy, likewise. On
            a GPU (CuPy's, or anything with ``__cuda_array_interface__`` or DLPack), they are trained on there; `y` may
            be there too. The parameters stay NumPy's. A `np.memmap` of uint8 or of the network's dtype is not copied.

            Without `y`: batches, each a pair (x, y) of these. A function that is called with their numbers, from 0 to
            below `steps_per_epoch`; an object with a length and items, likewise; or an iterable, PyTorch's DataLoader
            say. See Notes.
        y : array_like
            With softmax or sigmoid a label for each sample, (n,) or (n, 1):

            - class indices, integers from 0 to below layers[-1], or to 1 for one output. Not every class need be there;
            - else integers, whole floats, bools or strings. The first `fit` keeps them as `classes`: bools as two
              classes, floats that could be indices as these, others in ascending order, of which there must be as many
              as outputs.
              `predict` gives them back, and from then on no others are known.

            For several outputs rows (n, layers[-1]) will do: one-hot rows, which are class indices; for softmax soft
            labels, which add up to 1; for sigmoid 0 and 1 in any number, and the first `fit` sets `multi_label` then.

            With identity outputs real numbers, (n,) for one output, else (n, layers[-1]); they are converted, and uint8
            counts as its value.
        epochs : int
            How often each sample is used.
        batch_size : int, optional
            Samples per update; the last mini-batch of an epoch may be smaller. By default 64, or what the preset says;
            without it the batches that a function or an iterable gives are mini-batches as they are.
        optimizer : str or Optimizer, optional
            A name, ``"sgd"``, ``"adam"`` or ``"adamw"``, with its default settings; or an object, whose state is
            continued. By default ``"adam"``, or what the preset says.
        lr_schedule : callable, optional
            ``lr_schedule(done)``, with the fraction of all mini-batches of this `fit` that is done, from 0 to below 1,
            returns what the learning rate is multiplied by in the next one: `linear_decay`, say, or
            ``lambda done: 0.1 ** int(3 * done)``. `optimizer.lr` stays as it is. While it is called, `parameters` may
            be those of an earlier step: from a GPU they come back for callbacks alone. Others are `cosine_decay`,
            `StepDecay` and `WarmUp`; `ReduceOnPlateau` follows the history instead.
        validation_data : (x, y), optional
            Evaluated after each epoch.
        shuffle : bool
            Whether each epoch takes the samples in a new random order.
        verbose : {0, 1, 2} or bool
            What is printed. With 1 or True a line per epoch, with a bar in it on a terminal and in a notebook; with 2 a
            line per epoch everywhere.
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
            optimizer, which `load_optimizers` reads, the random streams, the history, and where the fit is. With
            `early_stopping` that restores the best epoch, `load` gives the parameters of the best one so far.
        resume : bool or path
            A checkpoint to go on from: the results, history included, have the same bits as if nothing had come
            between. With True it is `checkpoint` if that exists, so that a job that is started again goes on; one that
            `StopTraining` has ended, too. Samples and arguments must be those of then, but for `epochs`, which may be
            more, and callbacks; what differs is named. Of samples and targets some rows are compared, of `lr_schedule`
            whether there is one.
        validation_split : float, within [0, 1)
            The share of the samples that is held out at random, by `seed`, and evaluated instead of `validation_data`;
            of each class the same share, as nearly as whole samples allow: of a class with a single one all or none.
        early_stopping : EarlyStopping, optional
            When to end before the epochs do, and whether to go back to the best one.
        metrics : list of str, or mapping
            What is computed of the validation data after each epoch besides loss and accuracy, and kept in
            ``history.metrics``, under ``validation_`` and its name. Of classes: macro_precision, macro_recall,
            macro_f1, weighted_f1, roc_auc, top_2_accuracy, log_loss, brier_score, calibration_error; of numbers:
            mean_squared_error, mean_absolute_error, r2; see `gemmlet.metrics`. Or functions by name,
            ``f(y_true, y_score)`` of class indices (n,) and probabilities (n, classes), or of numbers, that return a
            number.
        class_weight : {"balanced"} or mapping, optional
            From labels to what their samples count, 1 where it says nothing. Balanced: all classes count the same.
        sample_weight : array_like, shape (n,), optional
            What each sample counts in the objective: finite, at least 0. The mean weight of those that are trained on,
            together with those of the classes, counts as 1. A mini-batch's objective is the weighted sum divided by its
            size. The accuracy of the history counts samples, and validation has no weights. On `numba` the reference
            trains then, a mini-batch a call: slower.
        steps_per_epoch : int, optional
            How many batches an epoch has; by default as many as `x` says, or gives. An iterable goes on in the next
            epoch where it was, and begins again at its end.
        augment : Augment, optional
            Each epoch has its own transform of each image instead of `x`, which then is uint8 of shape (n, h, w), on
            the CPU. The transform follows from `seed`, the place of the image among those that are trained on, and
            `steps` at the begin of the epoch, which ``data.augment(x, **vars(augment), seed=model.augment_seed,
            epoch=steps)`` has as its `epoch`. Validation data stays as it is.

        Returns
        -------
        History

        Raises
        ------
        TypeError, ValueError
            An argument does not fit, or a parameter is read-only: nothing has been trained. Samples or targets that are
            not finite are found while training, and undo it. What goes wrong only later, by a callback or by a factor
            of `lr_schedule` that is no number of at least 0, ends training in the last good state.
        DivergedError
            A loss or a parameter is no longer finite. All is as it was shortly before that.
        RuntimeError
            The network is in a `fit` of another thread.
        CheckpointError
            The last checkpoint cannot be written; all is as the last step has left it. Of one before there is a
            warning, and training goes on.
        OSError
            A checkpoint cannot be read, or it is known beforehand that none can be written.

        Notes
        -----
        Batches are loaded some ahead: as many as come in a tenth of a second, up to 32 MB, or the next one. All have
        the dtype that the first one decides about, and the labels that it has, or `classes`. With `shuffle` those that
        have numbers are asked for in a new random order in each epoch; others come as they come. With `batch_size` each
        is divided into mini-batches, and with `shuffle` in a random order: for large parts of data. The result has the
        same bits as that of the same mini-batches from memory. `validation_split`, `class_weight`, `sample_weight`,
        `checkpoint`, `resume` and `augment` need all samples at once; `lr_schedule` the number of batches. A batch that
        does not fit, or is not finite, ends training in the last good state, which has the steps before.
        """
        with fitting(self):
            dtype, source = None if self._follows_samples else self.dtype, None
            if y is None or steps_per_epoch is not None:
                if y is not None:
                    raise ValueError("steps_per_epoch is for batches, which have y in them, but y was given")
                lacking = {"validation_split": validation_split, "checkpoint": checkpoint, "resume": resume}
                lacking |= {"class_weight": class_weight is not None, "sample_weight": sample_weight is not None}
                lacking |= {"augment": augment is not None}
                source, (samples, targets), meaning = self._batches(x, steps_per_epoch, epochs, shuffle, dtype, lacking)
            else:
                if augment is not None:
                    check_augment(augment, x)
                samples = self._filled(x, "x", dtype)
                targets, meaning = self._targets(y, "y", samples, self._meaning())
            settings = self._settings(
                epochs,
                batch_size,
                lr_schedule,
                shuffle,
                verbose,
                callback,
                callback_every,
                checkpoint,
                resume,
                early_stopping,
            )
            rule = self._optimizer(optimizer)
            weights = weights_of(sample_weight, class_weight, targets, meaning)
            samples.convert()
            data, validate = {"x": samples.array, "y": targets}, None
            if weights is not None:
                data["sample_weight"] = weights
            is_default = type(validation_split) is float and validation_split == 0.0  # the usual case
            share = 0.0 if is_default else checks.fraction(validation_split, "validation_split")
            validation = None
            if validation_data is not None:
                if share:
                    raise ValueError("validation_split and validation_data: give one of them")
                given = checks.pair(validation_data, "validation_data")
                held_out = self._filled(given[0], "validation_data[0]", samples.dtype)
                validation = held_out, self._targets(given[1], "validation_data[1]", held_out, meaning)[0]
                for spoilt in (held_out.not_finite(), not_finite(validation[1], "validation_data[1]")):
                    if spoilt:
                        raise ValueError(spoilt)
                data |= {"validation_data[0]": held_out.array, "validation_data[1]": validation[1]}
            elif share:
                for spoilt in (samples.not_finite(), not_finite(targets, "y")):
                    if spoilt:
                        raise ValueError(spoilt)
                kept, held = split(targets, share, np.random.default_rng(self._seeds()[2]))
                validation = samples.take(held), targets[held]
                samples, targets = samples.take(kept), targets[kept]
                weights = None if weights is None else in_units_of_mean(weights[kept])
            functions = monitors.checked(metrics, self._known_metrics(targets))
            facts = {"metrics": sorted(functions), "validation_split": share}
            history = History()
            if validation is not None:
                validation[0].stay()
                validate = partial(self._validated, *validation, functions)
                history.metrics = {f"validation_{name}": [] for name in functions}
            elif functions:
                raise ValueError("metrics needs validation_data or validation_split")
            self._settle(samples.dtype)
            if meaning.classes is not self.classes or meaning.multi_label is not self.multi_label:
                self._take_meaning(meaning)
            group, augmented = rule.group(self.parameters), None
            if augment is None:
                plan = self._plan(samples, targets, group, weights)
            else:
                seed, size = self.augment_seed, settings.batch_size
                augmented = Augmented(samples, augment, seed, size, targets, weights)
                plan = self._plan(augmented.samples, augmented.targets, group, augmented.weights)
            rules, groups = {"optimizer": rule}, [group]
            if source is None:
                Training(self, history, samples, plan, rules, groups, settings, data, validate, facts, augmented).run()
            else:
                loop = source, self._gather, None if batch_size is None else settings.batch_size
                BatchTraining(*loop, self, history, samples, plan, rules, groups, settings, data, validate, facts).run()
        return history

    def _batches(
        self,
        x: Any,
        steps_per_epoch: Any,
        epochs: Any,
        shuffle: Any,
        dtype: np.dtype[Any] | None,
        lacking: Mapping[str, Any],
    ) -> tuple[Source, Piece, Meaning]:
        """Where batches come from, the first of them, and what outputs stand for after it."""
        refuse(lacking)
        meaning = self._meaning()
        are_rows: bool | None = None  # the targets of the first batch

        def load(batch: Any, name: str) -> Piece:
            nonlocal dtype, meaning, are_rows
            rows, labels = checks.pair(batch, name.removeprefix("x of "))
            samples = self._filled(rows, name, dtype)
            targets, meaning = self._targets(labels, f"y{name[1:]}", samples, meaning)
            dtype = samples.dtype
            shape = len(targets), self.layers[-1]
            if are_rows and targets.ndim == 1 and np.shape(labels) == shape:
                targets = one_hot(targets, shape, dtype)  # soft labels that happen to be 0 and 1
            if are_rows is None:
                are_rows = targets.ndim == 2
            elif are_rows != (targets.ndim == 2):
                kinds = "one class for each sample", "soft labels"
                raise ValueError(f"y{name[1:]} has {kinds[not are_rows]}; expected {kinds[are_rows]}, as before")
            return Piece(samples, targets)

        source = Source(x, steps_per_epoch, checks.whole_number(epochs, "epochs", 1), load)
        first = source.first(self._shuffle if arguments.flag(shuffle, "shuffle") else None)
        return source, first, meaning

    def _take_meaning(self, meaning: Meaning) -> None:
        """Keep what targets have said about the outputs."""
        if meaning.classes is not self.classes:
            self.classes = meaning.classes
            self._found = {**self._found, "classes": self.classes}
        if meaning.multi_label is not self.multi_label:
            self.multi_label = meaning.multi_label
            self._found = {**self._found, "multi_label": self.multi_label}

    def _known_metrics(self, targets: Array) -> Mapping[str, Metric]:
        if self.output == "identity":
            return monitors.OF_NUMBERS
        return monitors.OF_CLASSES if targets.ndim == 1 else {}

    def _validated(self, samples: Samples, targets: Array, functions: Mapping[str, Metric]) -> dict[str, float]:
        """What the history has of validation data after an epoch."""
        found = dict(zip(VALIDATION, self._evaluate(samples, targets), strict=True))
        if functions:
            function = {"softmax": kernels.softmax, "sigmoid": kernels.sigmoid, "identity": None}[self.output]
            found |= monitors.measured(functions, targets, self._by_chunks(samples, self.layers[-1], function))
        return found

    def _plan(
        self,
        samples: Samples,
        targets: Array,
        group: ParameterGroup | None = None,
        weights: Array | None = None,
        *,
        drops: bool = True,
    ) -> TrainingPlan:
        """A step; without `group` all but the update, without `drops` nothing is random."""
        reduction = "mean" if self.output == "identity" else "sum"
        phases: list[Phase] = [
            self._gather(samples, targets, weights),
            Forward(0, (SAMPLES,)),
            Loss(0, self.loss, np.ascontiguousarray(targets), self.label_smoothing or None, reduction),
            Backward(0),
        ]
        if self.l1 or self.l2:
            phases.append(Penalty(0, self.l2, self.l1, of_sum=False))
        if group is not None:
            phases.append(group.update(0))
        average = self._average if self.ema_decay else None
        rates = self.input_noise, self.input_dropout, self.dropout
        randomness = randomness_of(self, *rates, len(self.layers) - 1) if drops else ()
        return TrainingPlan((network_of(self._dense, group, average, randomness),), tuple(phases))

    def _gather(self, samples: Samples, _: Array, weights: Array | None = None) -> Gather:
        dataset = samples.dataset(may_skip_zeros=True)
        return Gather(dataset if weights is None else dataset._replace(weights=weights, divides_by_rows=True))

    _progress = Progress

    def _metrics(self, sums: Sequence[float], correct: float, seen: int) -> dict[str, float]:
        return {"loss": sum(sums) / seen, "accuracy": correct / seen}

    def loss_and_gradients(self, x: Any, y: Any, step: int | None = None) -> tuple[float, list[Array]]:
        """Loss of all samples as one mini-batch, of `parameters`, and its gradients: one array for each of them.

        Both are what `fit` minimises, `l1` and `l2` included.

        Parameters
        ----------
        x, y
            As in `fit`.
        step : int, optional
            With the dropout and the noise of this step, as `fit` takes it when `steps` is this; by default without.
        """
        samples, targets = self._samples_and_targets(x, y)
        number = 0 if step is None else checks.whole_number(step, "step", 0)
        plan = self._plan(samples.to_cpu(), targets, drops=step is not None)
        taken = gradients(select.current(), plan, len(samples), number=number)
        return sum(taken.losses), taken.gradients[0]

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
            The label of each sample, shape (n,): one of `classes`, or a class index, int64, where there are none. With
            `multi_label` rows of int64, 0 or 1, (n, layers[-1]). With identity outputs the outputs: (n,) for one, else
            (n, layers[-1]). Of samples that are on a GPU a `cupy.ndarray` there, as of `predict_proba` and `features`;
            but for labels that are strings, which are NumPy's.
        """
        samples = self._samples(x)
        if self.output == "identity":
            outputs = self._by_chunks(samples, self.layers[-1])
            return outputs[:, 0] if self.layers[-1] == 1 else outputs
        predicted = np.empty((len(samples), self.layers[-1]) if self.multi_label else len(samples), np.int64)
        for where, outputs in self._outputs(samples):
            logits = arguments.on_cpu(outputs)
            predicted[where] = logits > 0 if self.multi_label else predicted_classes(logits)
        labels = predicted if self.classes is None else as_labels(self.classes)[predicted]
        return labels if labels.dtype.kind == "U" else samples.backend.placed_like(labels, samples.array)

    def predict_proba(self, x: Any) -> Array:
        """Probabilities that the outputs stand for.

        Parameters
        ----------
        x : array_like
            As in `fit`.

        Returns
        -------
        ndarray, shape (n, classes)
            In the order of `classes_`. With softmax they add up to 1, and so they do with one sigmoid output, which
            has two columns: of class 0, or ``classes[0]``, and of class 1. With several ones each stands for itself.

        Raises
        ------
        ValueError
            The outputs are of the kind identity, which are no probabilities.
        """
        if self.output == "identity":
            raise ValueError('predict_proba needs output "softmax" or "sigmoid", this network has "identity"')
        if self.layers[-1] == 1:
            return self._of_two_classes(self._samples(x))
        to_probability = kernels.softmax if self.output == "softmax" else kernels.sigmoid
        return self._by_chunks(self._samples(x), self.layers[-1], to_probability)

    def _of_two_classes(self, samples: Samples) -> Array:
        """Probabilities of both, (n, 2), from one output."""
        backend = samples.backend
        result = backend.empty((len(samples), 2), self.dtype, samples.array)
        for where, outputs in self._outputs(samples):
            # Not 1 - p, which rounds a small probability to 0.
            backend.assign(result[where][:, :1], kernels.sigmoid(backend.scaled(outputs, self.dtype, -1.0)))
            backend.assign(result[where][:, 1:], kernels.sigmoid(outputs))
        return result

    def evaluate(self, x: Any, y: Any) -> dict[str, float]:
        """Return ``{"loss": ..., "accuracy": ...}``, means over the samples.

        The accuracy is NaN where the targets are no classes: numbers, soft labels, several labels a sample. The loss
        has no penalties.

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
            if targets.ndim == 1:
                correct += int(np.count_nonzero(predicted_classes(arguments.on_cpu(outputs)) == targets[where]))
        return loss_sum / len(samples), correct / len(samples) if targets.ndim == 1 else math.nan

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

    def _samples(self, x: Any) -> Samples:
        return Samples(x, self.layers[0], self.dtype, sparse=True)

    def _filled(self, x: Any, name: str, dtype: np.dtype[Any] | None) -> Samples:
        samples = Samples(x, self.layers[0], dtype, name, sparse=True)
        if not len(samples):
            raise ValueError(f"{name} is empty; expected at least one sample")
        return samples

    def _meaning(self) -> Meaning:
        return Meaning(self.layers[-1], self.classes, self.multi_label, learns=self.steps == 0)

    def _targets(self, y: Any, name: str, samples: Samples, meaning: Meaning) -> tuple[Array, Meaning]:
        """Class indices or rows of numbers, one for each sample, and what the outputs stand for after them."""
        if self.output == "identity":
            targets = numbers(y, meaning.outputs, samples.dtype, name)
        else:
            targets, meaning = of_classes(y, meaning, self.output, samples.dtype, name)
        if len(targets) != len(samples):
            raise ValueError(
                f"{samples.name} has {len(samples)} samples but {name} has {len(targets)} entries; they must match"
            )
        if self.output == "identity":  # class indices are a copy
            samples.held += held(targets)
        return targets, meaning

    def _samples_and_targets(self, x: Any, y: Any) -> tuple[Samples, Array]:
        samples = self._filled(x, "x", self.dtype)
        return samples, self._targets(y, "y", samples, self._meaning())[0]

    # Files.

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the network that `predict` uses as an ONNX file, for onnxruntime and other readers of opset 20.

        The graph takes ``x``, (n, layers[0]) of the network's dtype and any n, and gives ``y``, (n, layers[-1]): what
        `predict_proba` returns (of one sigmoid output its second column), or with identity outputs what the last layer
        gives. **Bytes are for the caller to divide by 255.** The configuration is in the metadata, under ``gemmlet``,
        as in the files of `save`: `classes` too, which `from_onnx` reads. Random streams and the state of optimizers
        are in files of `save` alone.

        Parameters
        ----------
        path : path
            Written whole or not at all, as by `save`.

        Raises
        ------
        ImportError
            The package onnx is missing.
        OSError
            The file cannot be written, or is no plain file.
        ValueError
            There are no ONNX operators for the activation, or the parameters exceed the 2 GiB of a file.
        """
        from . import onnx

        ending = {"softmax": "Softmax", "sigmoid": "Sigmoid", "identity": None}[self.output]
        onnx.write(path, "MLP", self._saved_config(), self._average, input_name="x", output_name="y", ending=ending)

    @classmethod
    def from_onnx(cls, path: str | os.PathLike[str], output: str | None = None) -> Self:
        """Read a network from an ONNX file, of `to_onnx` or of another exporter.

        The graph is one of layers, Gemm or MatMul and Add, with one activation between all of them, as an operator or
        composed as exporters do. Constants may be initializers or nodes; Identity, Dropout, Flatten and casts are
        passed over. Of scikit-learn's converter classifiers are read too, labels included. Sigmoid at
        the end does not tell whether a sample may have several labels; set `multi_label` if it may.

        Parameters
        ----------
        path : path
        output : {"softmax", "sigmoid", "identity"}, optional
            What the outputs mean, for a graph that ends in logits. By default what the graph ends in: Softmax or
            LogSoftmax, Sigmoid, or a layer.

        Returns
        -------
        MLP
            Of the dtype of the weights. From a file of `to_onnx` it has the settings of the network that wrote it,
            and starts from the weights that network predicted with; else, or if the graph no longer is what they say,
            those of a new one.

        Raises
        ------
        ImportError
            The package onnx is missing.
        OSError
            The file is missing or cannot be read.
        ValueError
            It is corrupt, or its graph is no such network: the message names the first node that does not fit.
        """
        from . import onnx

        if output is not None:
            checks.choice(output, "output", OUTPUTS)
        found = onnx.read(path, "MLP")
        if output not in (None, found.output) and found.output != "identity":
            raise ValueError(f"output is {output!r}, but the graph in {os.fspath(path)} ends in {found.output}")
        if found.classes and (output or found.output) == "identity":
            raise ValueError(f"{os.fspath(path)} has labels, but ends in a layer: output must be softmax or sigmoid")
        layers = [len(found.layers[0][0]), *(len(bias) for _, bias in found.layers)]
        saved = found.config if found.config.get("layers") == layers else {}
        dtype = found.layers[0][0].dtype
        model = cls(
            layers,
            found.activation or "tanh",
            output or found.output,
            dtype=dtype,
            activation_parameter=found.activation_parameter,
            classes=None if found.classes == list(range(max(layers[-1], 2))) else found.classes,
            multi_label=found.multi_label,
        )
        config = model._saved_config()
        # Of an activation graphs without hidden layers have nothing.
        told = ("output", "dtype") if found.activation is None else ("activation", "output", "dtype")
        if all(saved.get(name) == config[name] for name in told):
            with errors_name(path, cls.__name__):
                parameter = activation_number(saved["activation"], saved.get("activation_parameter"))
            of_both = {onnx.rounded(model.activation, p, dtype) for p in (parameter, model.activation_parameter)}
            if found.activation is None or len(of_both) == 1:
                config = saved
        tensors = dict[str, Array]()
        for prefix in cls._widths(config):
            for i, (weight, bias) in enumerate(found.layers):
                tensors |= {f"{prefix}{i}.weight": weight, f"{prefix}{i}.bias": bias}
        return cls._made(path, config, tensors, {})

    def _config(self) -> dict[str, Any]:
        names = (
            "layers", "activation", "output", "loss", "activation_parameter", "label_smoothing", "l1", "l2",
            "ema_decay", "classes", "multi_label", "dropout", "input_dropout", "input_noise",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _shown_parts(self) -> dict[str, Dense]:
        return {"": self._dense}

    @property
    def _shown_output(self) -> str:  # type: ignore[override] # it is this network's
        return self.output

    def _parts(self) -> dict[str, Dense]:
        return {"": self._dense} | ({"average.": self._average} if self.ema_decay else {})

    @staticmethod
    def _widths(config: dict[str, Any]) -> dict[str, Sequence[int]]:
        layers = config["layers"]
        return {"": layers} | ({"average.": layers} if config.get("ema_decay") else {})
