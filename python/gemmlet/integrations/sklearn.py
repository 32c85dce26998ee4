"""scikit-learn's `MLPClassifier` and `MLPRegressor`, trained by gemmlet.

They are scikit-learn's own classes, with what trains and predicts replaced: arguments, attributes, labels, validation,
warm starts, early stopping and random streams are scikit-learn's own code, and results agree with it to rounding. The
solvers "sgd" and "adam" train whole stretches of mini-batches in one call of the backend; "lbfgs" takes its kernels
layer by layer. What is not usual is left to scikit-learn: sparse matrices but for training by "sgd" and "adam", the
loss "poisson", float64 targets of 1e15 and more with float32 samples, `power_t` above 2, negative sample weights,
parameters of another dtype than the samples, parameters that somebody has set to what is no plain array of its layer's
shape, backends other than `cpu`.

    from gemmlet.integrations.sklearn import MLPClassifier

or, for code that exists already,

    from gemmlet.integrations.sklearn import patch_sklearn

    patch_sklearn()
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn import neural_network
from sklearn.model_selection import train_test_split
from sklearn.neural_network import _multilayer_perceptron
from sklearn.utils import validation

from .. import kernels
from .._memory import aligned_zeros
from .._signals import deferred_signals
from ..backends import select
from ..formulas.activations import ACTIVATIONS
from ..formulas.optimizers import OPTIMIZER_RULES
from ..nn.dataset import SPARSE_BELOW, Samples, slices
from ..nn.fit import CallBudget
from ..training.plan import (
    SAMPLES,
    Activation,
    Backward,
    Batches,
    Dataset,
    Forward,
    Gather,
    Linear,
    Loss,
    Parameter,
    Penalty,
    TrainingPlan,
    Update,
)

__all__ = ["MLPClassifier", "MLPRegressor", "patch_sklearn", "unpatch_sklearn"]

Array = NDArray[Any]

# The registry's names of scikit-learn's activations; softmax is a function of rows.
_NAMES = {"identity": None, "logistic": "sigmoid", "relu": "relu", "tanh": "tanh", "exp": "exp"}

# By scikit-learn's optimizer: the rule, and the lists of arrays that are its state.
_RULES = {"AdamOptimizer": ("adam", ("ms", "vs")), "SGDOptimizer": ("momentum", ("velocities",))}
_OPTIMIZERS = {"adam": "AdamOptimizer", "sgd": "SGDOptimizer"}

# Rows that pass through all layers together when predicting: their activations stay in the cache.
_CHUNK = 1024

# With float64 targets scikit-learn computes losses and gradients of float32 samples in float64. Of targets and
# penalties below it float32 holds the squares, and those of a network's gradients.
_MOST_SQUARED = 1e15

# What is overridden of scikit-learn, all of it private, with the arguments that are used here.
_HOOKS = {
    "_fit_stochastic": ("X", "y", "layer_units", "incremental"),
    "_backprop": ("X", "y"),
    "_forward_pass": ("activations",),
    "_forward_pass_fast": ("X", "check_input"),
    "_compute_loss_grad": ("layer", "activations", "deltas", "coef_grads", "intercept_grads"),
    "_update_no_improvement_count": ("early_stopping",),
}

# scikit-learn's functions that are computed otherwise here, as they are at import.
_TABLES = [
    (table, dict(table))
    for table in (
        _multilayer_perceptron.ACTIVATIONS,
        _multilayer_perceptron.DERIVATIVES,
        _multilayer_perceptron.LOSS_FUNCTIONS,
    )
]


class _Epochs:
    """The epochs of one fit, by a training plan whose parameters and states are copied in and out.

    `size` samples make a mini-batch; `optimizer` is the class of scikit-learn's.
    """

    def __init__(self, model: Any, X: Any, y: Array, weights: Any, size: int, optimizer: str) -> None:
        self._model, self._X, self._size, self._budget = model, X, size, CallBudget()
        self._weights = None if weights is None else np.ascontiguousarray(weights, np.float64)
        self._backend, self._held_out = select.current(), None
        rule, self._states = _RULES[optimizer]
        self._columns = OPTIMIZER_RULES[rule].hyperparameters

        def parameter(array: Array) -> Parameter:
            value, *states = (aligned_zeros(array.shape, X.dtype) for _ in range(1 + len(self._states)))
            return Parameter(value, tuple(states))

        activation = _NAMES[model.activation]
        network: list[Linear | Activation] = []
        for weight, bias in zip(model.coefs_, model.intercepts_, strict=True):
            network.append(Linear(parameter(weight), parameter(bias)))
            if activation is not None:
                network.append(Activation(activation, 0.0))
        if activation is not None:
            network.pop()
        # In the order that scikit-learn's optimizers have.
        self._parameters = [layer.weight for layer in network if isinstance(layer, Linear)]
        self._parameters += [layer.bias for layer in network if isinstance(layer, Linear)]
        loss = _loss_of(model, y, X.dtype)
        # The gradient of a squared error is that of the sum over the outputs, whose mean is what is reported.
        self._share = 1.0 / y.shape[1] if model.out_activation_ == "identity" else 1.0
        self.plan = TrainingPlan(
            (tuple(network),),
            (
                Gather(self._dataset()),
                *(Forward(0, (SAMPLES,)), loss, Backward(0), Penalty(0, float(model.alpha)), Update(0, rule)),
            ),
        )
        self.is_supported = self._backend.supports_fused(self.plan)

    def _dataset(self) -> Dataset:
        dataset = Samples(self._X, self._X.shape[1], self._X.dtype, sparse=True).dataset(may_skip_zeros=True)
        dataset = dataset._replace(weights=self._weights)
        # Images of bytes, counts and one-hot columns have a few different numbers: as bytes they take less memory, and
        # their zeros are found sooner.
        if dataset.skip_zeros and dataset.indptr is None and (encoded := self._backend.encoded(dataset.x)) is not None:
            return dataset._replace(x=encoded[0], value_of_byte=encoded[1])
        return dataset

    def held_out(self, rows: NDArray[np.int64]) -> Any:
        """The samples for validation."""
        if self._held_out is None:
            self._held_out = self._X[rows[:, 0]]
        return self._held_out

    def run(self, order: NDArray[np.int64]) -> float:
        """Train for an epoch that takes the samples in this order; return its mean loss."""
        optimizer, budget, at = self._model._optimizer, self._budget, 0
        sums: tuple[float, ...] = 0.0, 0.0
        optimizer.update_params = _do_nothing
        self._copy_in(optimizer)
        try:
            while at < len(order):
                where = order[at : at + self._size * budget.steps]
                steps = math.ceil(len(where) / self._size)
                if self._weights is not None:
                    weight_sums = np.add.reduceat(self._weights[where], np.arange(0, len(where), self._size))
                    if not weight_sums.all():  # those before it are trained on
                        steps = int(np.argmin(weight_sums != 0))
                        where = where[: steps * self._size]
                    if not steps:  # np.average says so
                        raise ZeroDivisionError("Weights sum to zero, can't be normalized")
                with deferred_signals():
                    budget.start()
                    table = self._hyperparameters(optimizer, steps)
                    batches = Batches(where, min(self._size, len(where)), (table,), sums)
                    sums, _ = self._backend.train(self.plan, batches)
                    budget.stop(steps)
                    if hasattr(optimizer, "t"):
                        optimizer.t += steps
                        optimizer.learning_rate = float(table[-1, 0])
                at += len(where)
        finally:
            with deferred_signals():
                self._copy_out(optimizer)
        return (sums[0] * self._share + sums[1]) / len(order)

    def _hyperparameters(self, optimizer: Any, steps: int) -> NDArray[np.float64]:
        if self._columns[0] == "lr":
            values = {"lr": optimizer.learning_rate, "weight_decay": 0.0, "momentum": optimizer.momentum}
            values["nesterov"] = optimizer.nesterov
        else:
            t = np.arange(optimizer.t + 1, optimizer.t + steps + 1, dtype=np.float64)
            beta1, beta2 = optimizer.beta_1, optimizer.beta_2
            # Both corrections of the bias are in the step size, as epsilon is added to the moment that has none.
            step_size = optimizer.learning_rate_init * np.sqrt(1 - beta2**t) / (1 - beta1**t)
            values = {"step_size": step_size, "beta1": beta1, "beta2": beta2, "gain1": 1 - beta1, "gain2": 1 - beta2}
            values |= {"eps": optimizer.epsilon, "correction": 1.0, "l2": 0.0, "shrink": 1.0}
        table = np.empty((steps, len(self._columns)))
        for column, name in enumerate(self._columns):
            table[:, column] = values[name]
        return table

    def _copy_in(self, optimizer: Any) -> None:
        model, scale = self._model, self._scale(optimizer)
        for own, array in zip(self._parameters, [*model.coefs_, *model.intercepts_], strict=True):
            own.value[...] = array
        for number, name in enumerate(self._states):
            for own, array in zip(self._parameters, getattr(optimizer, name), strict=True):
                np.divide(array, scale, out=own.state[number])

    def _copy_out(self, optimizer: Any) -> None:
        model, scale = self._model, self._scale(optimizer)
        for own, array in zip(self._parameters, [*model.coefs_, *model.intercepts_], strict=True):
            array[...] = own.value
        for number, name in enumerate(self._states):
            for own, array in zip(self._parameters, getattr(optimizer, name), strict=True):
                np.multiply(own.state[number], scale, out=array)

    @staticmethod
    def _scale(optimizer: Any) -> float:
        """What scikit-learn's state is a multiple of: its velocities hold the learning rate."""
        return -optimizer.learning_rate if hasattr(optimizer, "velocities") else 1.0


def _do_nothing(*_: Any) -> None:
    """Update no parameters: they are updated."""


def _loss_of(model: Any, y: Array, dtype: np.dtype[Any]) -> Loss:
    """The loss of a network's outputs, before the output activation."""
    if model.out_activation_ == "identity":
        # Half of the squared error: without a delta there is no linear part.
        return Loss(0, "huber", np.ascontiguousarray(y, dtype), math.inf)
    eps = float(np.finfo(dtype).eps)  # of probabilities, the closest to 0 and to 1
    limits = -math.log1p(-eps), -math.log(eps)
    if model.out_activation_ == "softmax":
        return Loss(0, "softmax_cross_entropy", np.argmax(y, axis=1), limits=limits)
    targets = y[:, 0].astype(np.int64) if y.shape[1] == 1 else np.ascontiguousarray(y, dtype)
    return Loss(0, "binary_cross_entropy_with_logits", targets, limits=limits)


def _epochs_of(model: Any, X: Any, y: Array, weights: Any, size: int, optimizer: Any) -> _Epochs | None:
    """The epochs of a fit; None where that is not usual. `optimizer` is scikit-learn's, None if there is none yet."""
    kind = _OPTIMIZERS[model.solver] if optimizer is None else type(optimizer).__name__
    loss = "squared_error" if model.out_activation_ == "identity" else "log_loss"
    widths, dtype, parameters = _widths(model), X.dtype, [*model.coefs_, *model.intercepts_]
    names = () if optimizer is None else _RULES.get(kind, (kind, ()))[1]
    states = [getattr(optimizer, name) for name in names]
    written = [*parameters, *(a for state in states for a in state)]
    lr = model.learning_rate_init if optimizer is None else optimizer.learning_rate
    usual = (
        kind in _RULES
        and _computes_as_known(model)
        and widths is not None
        and (widths[0], widths[-1]) == (X.shape[1], y.shape[1])
        and model.loss == loss
        and dtype in (np.float32, np.float64)
        and all(_is_plain(a) and a.dtype == dtype and a.flags.writeable for a in written)
        and all([a.shape for a in state] == [a.shape for a in parameters] for state in states)
        and not any(np.may_share_memory(a, b) for a, b in combinations(written, 2))
        and (weights is None or (np.all(weights >= 0) and np.sum(weights, dtype=np.float64) < math.inf))
        and (loss == "log_loss" or y.dtype == dtype or _most(y, model.alpha, weights) < _MOST_SQUARED)
        # Velocities are kept without the learning rate: they must not overflow, nor it become 0.
        and (kind == "AdamOptimizer" or 1e-35 < lr < 1e35)
        and not (model.learning_rate == "invscaling" and (model.power_t > 2 or lr < 1e-15))
    )
    if not usual:
        return None
    epochs = _Epochs(model, X, y, weights, size, kind)
    return epochs if epochs.is_supported else None


def _computes_as_known(model: Any) -> bool:
    """Whether nobody, in a subclass say, has replaced what is computed otherwise here."""
    return (
        all(getattr(type(model), name) is getattr(_Accelerated, name) for name in _HOOKS if name != "_fit_stochastic")
        and _HOOKS.keys().isdisjoint(vars(model))
        and _has_known_functions()
    )


def _has_known_functions() -> bool:
    return all(table == known for table, known in _TABLES)


def _most(y: Array, alpha: float, weights: Any) -> float:
    """The largest target; or the penalty, divided by the least that the weights of a mini-batch may add up to."""
    least = 1.0 if weights is None else np.min(weights, where=weights > 0, initial=math.inf)
    return max(float(np.abs(y).max(initial=0)), float(alpha) / float(least))


def _widths(model: Any) -> list[int] | None:
    """The numbers of features, first to last; None where somebody has set parameters that are no arrays of layers."""
    coefs, parameters = model.coefs_, [*model.coefs_, *model.intercepts_]
    if len(coefs) != model.n_layers_ - 1 or not all(map(_is_plain, parameters)) or any(w.ndim != 2 for w in coefs):
        return None
    widths = [len(coefs[0]), *(w.shape[1] for w in coefs)]
    shapes = [*pairwise(widths), *((width,) for width in widths[1:])]
    return widths if [a.shape for a in parameters] == shapes else None


def _is_plain(array: Any) -> bool:
    """Whether an array computes as NumPy's own; that of a file that is mapped into memory does."""
    return type(array) in (np.ndarray, np.memmap)


class _Accelerated:
    """What is overridden of scikit-learn's classes; `super()` has what they do."""

    def _fit_stochastic(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = super()._fit_stochastic  # type: ignore[misc]
        call = inspect.signature(plain).bind(*args, **kwargs)
        given, batch_size = call.arguments, self.batch_size
        X, incremental = given["X"], given["incremental"]
        if _fault is not None or len(given["layer_units"]) != self.n_layers_:  # of which scikit-learn makes an error
            return plain(*args, **kwargs)
        n = X.shape[0]
        if self.early_stopping and not incremental:
            try:
                n = len(train_test_split(np.arange(n), test_size=self.validation_fraction, random_state=0)[0])
            except ValueError:  # which is scikit-learn's to say
                return plain(*args, **kwargs)
        size = int(min(200 if batch_size == "auto" else batch_size, n))
        optimizer = getattr(self, "_optimizer", None) if incremental else None
        epochs = _epochs_of(self, X, given["y"], given.get("sample_weight"), size, optimizer)
        if epochs is None:
            return plain(*args, **kwargs)
        # scikit-learn's loop sees the samples' numbers in place of the samples, and all of an epoch as one mini-batch.
        # Of the targets it needs those for validation alone.
        given["X"] = np.arange(X.shape[0]).reshape(-1, 1)
        if not self.early_stopping:
            given["y"] = given["X"]
        # A larger size stays, of which scikit-learn warns.
        self._epochs, self.batch_size = epochs, n if batch_size == "auto" else max(n, batch_size)
        try:
            return plain(*call.args, **call.kwargs)
        finally:
            del self._epochs
            self.batch_size = batch_size
            vars(self._optimizer).pop("update_params", None)

    def _backprop(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
        if "_epochs" in vars(self):
            return self._epochs.run(X[:, 0]), [], []
        return super()._backprop(X, *args, **kwargs)  # type: ignore[misc]

    def _update_no_improvement_count(self: Any, early_stopping: bool, X: Any, *args: Any, **kwargs: Any) -> Any:
        if early_stopping and "_epochs" in vars(self):
            X = self._epochs.held_out(X)
        return super()._update_no_improvement_count(early_stopping, X, *args, **kwargs)  # type: ignore[misc]

    def _forward_pass(self: Any, activations: Any) -> Any:
        layers = _layers(self, activations[0]) if _fault is None else None
        if layers is not None and len(layers) + 1 == len(activations) and activations[0].dtype == layers[0][0].dtype:
            for i, (layer, x) in enumerate(zip(layers, activations, strict=False)):
                activations[i + 1] = kernels.linear(x, *layer)
            if self.out_activation_ == "softmax":
                kernels.softmax(activations[-1], out=activations[-1])
            return activations
        return super()._forward_pass(activations)  # type: ignore[misc]

    def _compute_loss_grad(self: Any, layer: int, rows: Any, activations: Any, deltas: Any, *gradients: Any) -> Any:
        x, delta, weight = activations[layer], deltas[layer], self.coefs_[layer]
        if _fault is not None or not _are_usual(x, delta, weight):
            return super()._compute_loss_grad(layer, rows, activations, deltas, *gradients)  # type: ignore[misc]
        coef_grads, intercept_grads = gradients
        coef_grads[layer] = kernels.matmul(x.T, delta)
        coef_grads[layer] += self.alpha * weight
        coef_grads[layer] /= rows
        intercept_grads[layer] = np.sum(delta, axis=0) / rows
        return None

    def _forward_pass_fast(self: Any, X: Any, check_input: bool = True) -> Any:
        if check_input:
            X = _validated(self, X)
        if _fault is None and (layers := _layers(self, X)) is not None:
            return _outputs(layers, X, is_softmax=self.out_activation_ == "softmax")
        return super()._forward_pass_fast(X, check_input=False)  # type: ignore[misc]


def _are_usual(*arrays: Any) -> bool:
    """Whether the kernels take all of these together."""
    return all(map(_is_plain, arrays)) and (
        {a.dtype for a in arrays} in ({np.dtype(np.float32)}, {np.dtype(np.float64)})
    )


def _layers(model: Any, X: Any) -> list[tuple[Array, Array, str | None]] | None:
    """Weight, bias and activation of each layer in the dtype of the outputs; None for what the kernels do not take."""
    if not _is_plain(X) or X.ndim != 2 or X.dtype.kind not in "biuf" or not _has_known_functions():
        return None
    if (widths := _widths(model)) is None or widths[0] != X.shape[1]:
        return None
    parameters = [*model.coefs_, *model.intercepts_]
    dtype = np.result_type(X, *parameters)
    if dtype not in (np.float32, np.float64):
        return None
    count = len(model.coefs_)
    weights = [np.asarray(array, dtype) for array in parameters]
    names = [_NAMES[model.activation]] * (count - 1) + [_NAMES.get(model.out_activation_)]
    return list(zip(weights[:count], weights[count:], names, strict=True))


def _outputs(layers: list[tuple[Array, Array, str | None]], X: Array, *, is_softmax: bool) -> Array:
    """The outputs for all samples."""
    biases = [bias for _, bias, _ in layers]
    dtype, rows = biases[0].dtype, min(_CHUNK, len(X))
    outputs = np.empty((len(X), len(biases[-1])), dtype)
    hidden = [np.empty((rows, len(bias)), dtype) for bias in biases[:-1]]
    if _forward(layers, X, outputs):
        return kernels.softmax(outputs, out=outputs) if is_softmax else outputs
    for where in slices(len(X), _CHUNK):
        x = X[where].astype(dtype, copy=False)
        for layer, y in zip(layers, [*(y[: len(x)] for y in hidden), outputs[where]], strict=True):
            x = kernels.linear(x, *layer, out=y)
        if is_softmax:
            kernels.softmax(x, out=x)
    return outputs


def _forward(layers: list[tuple[Array, Array, str | None]], X: Array, out: Array) -> bool:
    """The outputs of all layers in one call that skips zeros; False, and nothing done, where there are few of them."""
    arrays = [X, *(array for weight, bias, _ in layers for array in (weight, bias))]
    if not all(array.dtype == out.dtype and array.flags.c_contiguous and array.flags.aligned for array in arrays):
        return False
    some = X[:: max(1, len(X) // 200)] != 0
    if np.count_nonzero(some) >= SPARSE_BELOW * some.size:
        return False
    entries = [(weight, bias, ACTIVATIONS[name] if name else None) for weight, bias, name in layers]
    return select.current().forward(entries, X, out, skip_zeros=True)


def _validated(model: Any, X: Any) -> Any:
    """Samples as scikit-learn takes them for predictions."""
    validate = getattr(validation, "validate_data", None) or type(model)._validate_data  # the latter until 1.5
    return validate(model, X, accept_sparse=["csr", "csc"], reset=False)


class MLPClassifier(_Accelerated, neural_network.MLPClassifier):  # type: ignore[misc]
    """`sklearn.neural_network.MLPClassifier`, trained by gemmlet: the same arguments and attributes.

    Results are the same to rounding, and have the same bits for any number of threads.
    """


class MLPRegressor(_Accelerated, neural_network.MLPRegressor):  # type: ignore[misc]
    """`sklearn.neural_network.MLPRegressor`, trained by gemmlet: the same arguments and attributes.

    Results are the same to rounding, and have the same bits for any number of threads.
    """


_SWAPS = {cls.__mro__[2]: cls for cls in (MLPClassifier, MLPRegressor)}

# What `patch_sklearn` has replaced: module, attribute, and the class that was there.
_replaced: list[tuple[Any, str, Any]] = []


def patch_sklearn() -> None:
    """Put gemmlet's classes in the place of scikit-learn's, in all modules that have been imported.

    Objects that exist already stay what they are, and can still be pickled: the module that defines the classes, by
    whose name pickle finds them, keeps its own.
    """
    # By identity: to ask objects of other packages for anything may run their code.
    swaps = {id(theirs): ours for theirs, ours in _SWAPS.items()}
    for name, module in list(sys.modules.items()):
        if name in {__name__, *(theirs.__module__ for theirs in _SWAPS)}:
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in swaps:
                setattr(module, attribute, swaps[id(value)])
                _replaced.append((module, attribute, value))


def unpatch_sklearn() -> None:
    """Put scikit-learn's own classes back where `patch_sklearn` has replaced them."""
    while _replaced:
        module, attribute, theirs = _replaced.pop()
        if module.__dict__.get(attribute) is _SWAPS[theirs]:
            setattr(module, attribute, theirs)


def _find_fault() -> str | None:
    """What is not as this file knows it of this version of scikit-learn; None if all is.

    Signatures first; then small networks are trained and compared.

    Raises
    ------
    ImportError, RuntimeError, ValueError
        The environment asks for a backend that is not there, or has an unknown value.
    """
    select.current()
    select.get_num_threads()
    for name, known in _HOOKS.items():
        hook = getattr(neural_network.MLPClassifier, name, None)
        if hook is None or not {*known} <= inspect.signature(hook).parameters.keys():
            return f"{name} has changed"
    rng = np.random.default_rng(0)
    X = rng.normal(size=(24, 3)).astype(np.float32)
    classes, numbers = np.arange(24) % 3, X[:, :2] * 0.5
    common = {"hidden_layer_sizes": (4,), "max_iter": 3, "batch_size": 7, "random_state": 0, "alpha": 0.1}
    takes_weights = "sample_weight" in inspect.signature(neural_network.MLPClassifier.fit).parameters  # since 1.7
    weights = {"sample_weight": 1.0 + np.arange(24) % 5} if takes_weights else {}
    for theirs, y, own, given in (
        (neural_network.MLPClassifier, classes, {"early_stopping": True, "validation_fraction": 0.25}, weights),
        (neural_network.MLPClassifier, classes > 0, {"solver": "sgd", "learning_rate": "invscaling"}, {}),
        (neural_network.MLPRegressor, numbers, {"activation": "tanh", "shuffle": False}, {}),
        (neural_network.MLPRegressor, numbers, {"solver": "lbfgs"}, {}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pair = [cls(**common, **own).fit(X, y, **given) for cls in (theirs, _SWAPS[theirs])]
                found = [
                    [*m.coefs_, *m.intercepts_, getattr(m, "loss_curve_", [m.loss_]), m.t_, m._forward_pass_fast(X)]
                    for m in pair
                ]
            except Exception as error:
                return f"{theirs.__name__}: {error!r}"
        if not all(np.allclose(a, b, 1e-3, 1e-4) for a, b in zip(*found, strict=True)):
            return f"{theirs.__name__} learns something else"
    return None


# Why scikit-learn's own code does everything, if it does.
_fault: str | None = None
_fault = _find_fault()
if _fault is not None:
    warnings.warn(
        f"gemmlet leaves scikit-learn {sklearn.__version__} as it is, which it does not know: {_fault}",
        RuntimeWarning,
        stacklevel=2,
    )
