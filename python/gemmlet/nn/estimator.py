"""Networks in scikit-learn's manners: arguments by name, `clone`, `score`, `partial_fit`. Nothing here imports it."""

from __future__ import annotations

import inspect
import reprlib
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import metrics
from .._signals import deferred_signals
from . import display
from .dense import Dense
from .display import Text
from .fit import Trainable, fitting
from .optimizers import Optimizer, as_optimizer, make_optimizer
from .targets import Label, as_labels, checked_classes

Array = NDArray[Any]

# Prefix of the settings of `default_optimizer`, as scikit-learn names the parameters of a parameter.
_OPTIMIZER = "default_optimizer__"


def _settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """The settings of an optimizer as parameters of a network."""
    return {f"{_OPTIMIZER}{name}": value for name, value in optimizer.settings().items() if name != "name"}


class Estimator(Trainable):
    """Base of networks whose constructor's arguments are asked for, and changed, by name."""

    default_optimizer: Optimizer
    # Arguments that `repr` shows, and the activation of last layers that have none.
    _in_repr: tuple[str, ...] = ()
    _shown_output = "identity"

    @classmethod
    def _arguments(cls) -> dict[str, Any]:
        """The names of the constructor's arguments, and their defaults."""
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name, as they are now; what training has found out is none of them.

        Parameters
        ----------
        deep : bool
            Whether the settings of `default_optimizer` are there too, as ``default_optimizer__lr`` and so on.
        """
        params = {}
        for name, default in self._arguments().items():
            value = getattr(self, name)
            if name in self._found and self._found[name] is value:
                value = default
            params[name] = list(value) if isinstance(value, list) else value
        if deep and "default_optimizer" in params:
            params |= _settings_of(self.default_optimizer)
        return params

    def set_params(self, **params: Any) -> Self:
        """Make the network anew with some arguments changed, and return it. What was learnt is lost.

        Attributes that may change are set without that: ``model.label_smoothing = 0.1``.

        Parameters
        ----------
        **params
            Arguments of the constructor; ``default_optimizer__lr`` and so on, of a new `default_optimizer` if that is
            given too. Without any, nothing changes.

        Raises
        ------
        TypeError, ValueError
            There is no such argument, or its value does not fit; the network stays as it is.
        RuntimeError
            The network is in a `fit`.
        """
        if not params:
            return self
        known = self.get_params()
        if "default_optimizer" in known.keys() & params.keys():
            optimizer = params["default_optimizer"]
            if optimizer is None:  # the constructor's own
                optimizer = type(self)(**self.get_params(deep=False) | {"default_optimizer": None}).default_optimizer
            params["default_optimizer"] = as_optimizer(optimizer, "default_optimizer")
            known = self.get_params(deep=False) | _settings_of(params["default_optimizer"])
        if unknown := [name for name in params if name not in known]:
            raise ValueError(f"set_params has no parameter {unknown[0]!r}; there are {', '.join(known)}")
        settings = {n.removeprefix(_OPTIMIZER): v for n, v in params.items() if n.startswith(_OPTIMIZER)}
        given = {n: v for n, v in (known | params).items() if not n.startswith(_OPTIMIZER)}
        if settings:
            optimizer = as_optimizer(given["default_optimizer"], "default_optimizer")
            given["default_optimizer"] = make_optimizer(**optimizer.settings() | settings)
        other = vars(type(self)(**given))
        if fitting.is_under_way(self):
            raise RuntimeError("this network is in a fit: set_params would make another one of it")
        with fitting(self), deferred_signals():
            mine = vars(self)
            for name in mine.keys() - other:
                del mine[name]
            mine.update(other)
        return self

    @abstractmethod
    def _shown_parts(self) -> dict[str, Dense]:
        """The stacks of layers that `summary` shows, by what it writes before the names of layers."""

    def _shown(self) -> tuple[str, dict[str, Dense], str, list[str]]:
        """What `summary` and notebooks show: title, layers, activation of the outputs, and other facts."""
        settings = [
            f"{name}={reprlib.repr(value) if isinstance(value, list) else repr(value)}"
            for name, default in self._arguments().items()
            if name not in self._in_repr and (value := getattr(self, name)) != default
        ]
        return repr(self), self._shown_parts(), self._shown_output, [*settings, f"{self.steps:,} steps taken"]

    def summary(self) -> Text:
        """Return a table of the layers: shapes, activations and parameters; below it what was set, and the steps.

        An interpreter shows it; ``print(model.summary())`` prints it.

        Examples
        --------
        >>> from gemmlet.nn import MLP
        >>> MLP([784, 128, 10], "relu", label_smoothing=0.1).summary()
        MLP([784, 128, 10], 'relu', 'softmax', dtype=np.float32, seed=0)
        layer  output shape  activation  parameters
        -------------------------------------------
        input      (n, 784)
        1          (n, 128)  relu           100,480
        2           (n, 10)  softmax          1,290
        -------------------------------------------
        101,770 parameters, 407 kB
        loss='softmax_cross_entropy'
        label_smoothing=0.1
        default_optimizer=Adam(lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.0)
        0 steps taken
        """
        return display.summary(*self._shown())

    def _repr_html_(self) -> str:
        return display.network_html(*self._shown(), self._history)

    def __sklearn_clone__(self) -> Self:
        """A network with the same arguments that has learnt nothing, for `sklearn.base.clone`."""
        return type(self)(**self.get_params(deep=False))


class Predictor(Estimator):
    """Base of networks that predict classes or numbers."""

    layers: list[int]
    output: str
    classes: list[Label] | None
    multi_label: bool

    @abstractmethod
    def predict(self, x: Any) -> Array:
        """Predict the class of each sample, or numbers."""

    @abstractmethod
    def fit(self, x: Any, y: Any, epochs: int, *, optimizer: Optimizer, sample_weight: Any) -> Any:
        """Train on samples and their labels."""

    # What scikit-learn asks of an estimator.

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags

        is_regressor = self.output == "identity"
        return Tags(
            estimator_type=self._estimator_type,
            target_tags=TargetTags(required=True, multi_output=self.layers[-1] > 1),
            classifier_tags=None if is_regressor else ClassifierTags(multi_label=self.multi_label),
            regressor_tags=RegressorTags() if is_regressor else None,
            input_tags=InputTags(sparse=True),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return self.steps > 0

    @property
    def _estimator_type(self) -> str:  # for scikit-learn before 1.6
        return "regressor" if self.output == "identity" else "classifier"

    @property
    def n_features_in_(self) -> int:
        """The number of inputs, as scikit-learn calls it."""
        return self.layers[0]

    @property
    def classes_(self) -> Array:
        """The labels in the order of the columns of `predict_proba`, as scikit-learn calls them."""
        if self.output == "identity":
            raise AttributeError("classes_: identity outputs have no classes")
        return np.arange(max(self.layers[-1], 2)) if self.classes is None else as_labels(self.classes)

    def score(self, x: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy, or of identity outputs the coefficient of determination R².

        Of several labels a sample counts as correct if all of them are.

        Parameters
        ----------
        x, y
            As in `fit`; soft labels are none.
        sample_weight : array_like, shape (n,), optional
            What each sample counts.
        """
        predicted = self.predict(x)
        if self.output == "identity":
            return metrics.r2_score(y, predicted, sample_weight=sample_weight)
        given = np.asarray(y)
        if given.ndim == 2 and not self.multi_label:
            # Rows of ones, or a column of labels.
            given = self.classes_[given.argmax(axis=1)] if given.shape[1] == self.layers[-1] > 1 else given[:, 0]
        return metrics.accuracy_score(given, predicted, sample_weight=sample_weight)

    def partial_fit(self, x: Any, y: Any, classes: Iterable[Any] | None = None, sample_weight: Any = None) -> Self:
        """Train on some samples for one epoch, and return the network: data larger than memory comes in parts.

        One optimizer serves all calls, with the settings that `default_optimizer` has at the first one. Copies,
        pickles and files of `save` have it too. `fit` takes batches from a function or an iterator in one call,
        which knows how much is done.

        Parameters
        ----------
        x, y, sample_weight
            As in `fit`.
        classes : list, optional
            All labels, where they are no class indices and the first samples may lack some. Later calls may repeat
            them.

        Raises
        ------
        TypeError, ValueError
            An argument does not fit: all is as before.
        """
        with fitting(self):
            if classes is not None:
                self._take_classes(classes)
            if self._of_partial_fit is None:
                self._of_partial_fit = self.default_optimizer.fresh()
            self.fit(x, y, 1, optimizer=self._of_partial_fit, sample_weight=sample_weight)
        return self

    def _take_classes(self, classes: Iterable[Any]) -> None:
        if isinstance(classes, np.ndarray):
            classes = classes.tolist()
        given = checked_classes(classes, self.output, self.layers[-1]) or []
        ascending = np.sort(as_labels(given))
        if self.classes is None and ascending.dtype.kind in "iu" and np.array_equal(ascending, self.classes_):
            return
        if self.classes is None and self.steps == 0:
            self.classes = ascending.tolist()
            self._found = {**self._found, "classes": self.classes}
        elif ascending.tolist() != np.sort(self.classes_).tolist():
            raise ValueError(f"classes are {ascending.tolist()}, those of this network {self.classes_.tolist()}")
