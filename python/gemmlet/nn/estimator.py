"""scikit-learn's manners for `MLP`: `score`, parameters by name, `clone`, `partial_fit`. Nothing here imports it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import metrics
from .fit import fitting
from .optimizers import Optimizer

Array = NDArray[Any]


class Estimator(ABC):
    """Mixin of networks that predict."""

    _of_partial_fit: Optimizer | None = None
    output: str
    layers: list[int]
    steps: int
    classes: list[Any] | None
    multi_label: bool
    default_optimizer: Optimizer
    predict: Callable[[Any], Any]
    fit: Callable[..., Any]

    @classmethod
    def _argument_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name, as they are now; what training has found out is none of them.

        Parameters
        ----------
        deep : bool
            Of no effect: no argument is an estimator.
        """
        found = {name: getattr(self, name) for name in self._argument_names()}
        return found | self._unsaid()

    @abstractmethod
    def _unsaid(self) -> dict[str, Any]:
        """Arguments that were left to the samples, or to other arguments: as they were given."""

    def set_params(self, **params: Any) -> Self:
        """Make the network anew with some of the constructor's arguments changed, and return it: nothing learnt stays.

        Raises
        ------
        TypeError, ValueError
            There is no such argument, or its value does not fit; the network stays as it is.
        RuntimeError
            The network is in a `fit`.
        """
        known = self._argument_names()
        if unknown := [name for name in params if name not in known]:
            raise ValueError(f"set_params has no parameter {unknown[0]!r}; there are {', '.join(known)}")
        with fitting(self):  # type: ignore[arg-type]
            other = type(self)(**self.get_params() | params)
        vars(self).clear()
        vars(self).update(vars(other))
        return self

    def __sklearn_clone__(self) -> Self:
        """A network with the same arguments that has learnt nothing, for `sklearn.base.clone`."""
        return type(self)(**self.get_params())

    # What scikit-learn asks of an estimator.

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags

        kind, is_regressor = self._estimator_type, self.output == "identity"
        return Tags(
            estimator_type=kind,
            target_tags=TargetTags(required=True),
            classifier_tags=None if is_regressor else ClassifierTags(multi_label=self.multi_label),
            regressor_tags=RegressorTags() if is_regressor else None,
            input_tags=InputTags(sparse=True),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return self.steps > 0

    @property
    def _estimator_type(self) -> str:
        return "regressor" if self.output == "identity" else "classifier"

    @property
    def classes_(self) -> Array:
        """The labels in the order of the columns of `predict_proba`, as scikit-learn calls them."""
        if self.output == "identity":
            raise AttributeError("classes_: identity outputs have no classes")
        return np.arange(max(self.layers[-1], 2)) if self.classes is None else np.array(self.classes)

    def score(self, x: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy, or of identity outputs the coefficient of determination R².

        Parameters
        ----------
        x, y
            As in `fit`.
        sample_weight : array_like, shape (n,), optional
            What each sample counts.
        """
        predicted = self.predict(x)
        if self.output == "identity":
            return metrics.r2_score(y, predicted, sample_weight=sample_weight)
        given = np.asarray(y)
        if given.ndim == 2 and given.shape[1] == self.layers[-1] > 1 and not self.multi_label:
            indices = given.argmax(axis=1)  # rows of ones
            given = indices if self.classes is None else np.array(self.classes)[indices]
        return metrics.accuracy_score(given, predicted, sample_weight=sample_weight)

    def partial_fit(self, x: Any, y: Any, classes: Sequence[Any] | None = None, sample_weight: Any = None) -> Self:
        """Train on some samples for an epoch, and return the network: data larger than memory comes in parts.

        One optimizer, with the settings of `default_optimizer`, serves all calls.

        Parameters
        ----------
        x, y, sample_weight
            As in `fit`.
        classes : list, optional
            All labels, in the first call, where they are no class indices and the first samples may lack some.
        """
        if classes is not None and self.classes is None:
            labels = np.unique(np.asarray(classes))
            if labels.tolist() != list(range(max(self.layers[-1], 2))):
                self.classes = labels.tolist()
        if self._of_partial_fit is None:
            self._of_partial_fit = self.default_optimizer.fresh()
        self.fit(x, y, epochs=1, optimizer=self._of_partial_fit, sample_weight=sample_weight)
        return self

    def summary(self) -> str:
        """Return a table of the layers: widths, activation and parameters of each.

        Examples
        --------
        >>> from gemmlet.nn import MLP
        >>> print(MLP([784, 128, 10], "relu").summary())
        layer  inputs  outputs  activation  parameters
        1         784      128  relu           100,480
        2         128       10  softmax          1,290
        total                                  101,770
        """
        rows = [("layer", "inputs", "outputs", "activation", "parameters")]
        total, last = 0, len(self.layers) - 1
        for i, (inputs, outputs) in enumerate(zip(self.layers, self.layers[1:], strict=False), 1):
            count = (inputs + 1) * outputs
            total += count
            activation = self.output if i == last else self.activation  # type: ignore[attr-defined]
            rows.append((str(i), f"{inputs:,}", f"{outputs:,}", activation, f"{count:,}"))
        rows.append(("total", "", "", "", f"{total:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        ways = (str.ljust, str.rjust, str.rjust, str.ljust, str.rjust)
        return "\n".join(
            "  ".join(way(cell, width) for way, cell, width in zip(ways, row, widths, strict=True)) for row in rows
        )
