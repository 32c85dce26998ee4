"""gemmlet under scikit-learn: the same results by our kernels, scikit-learn's own tests, what is left to it."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn")

from scipy import sparse  # noqa: E402
from sklearn import neural_network  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import ConvergenceWarning  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

import gemmlet  # noqa: E402
from gemmlet import kernels  # noqa: E402
from gemmlet.backends import select  # noqa: E402
from gemmlet.integrations import sklearn as ours  # noqa: E402
from support import PATIENCE, same_bits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

CLASSIFIER, REGRESSOR = "MLPClassifier", "MLPRegressor"
TAKES_WEIGHTS = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 7)

RNG = np.random.default_rng(0)
N, FEATURES = 90, 12
X = RNG.normal(size=(N, FEATURES))
ZEROS = X * (RNG.uniform(size=X.shape) < 0.2)
FEW = np.round(np.clip(X, 0, 2) * 8) / 8  # some twenty different numbers, half of them 0
CLASSES = np.array(["a", "b", "c"])[np.argmax(X[:, :3] + RNG.normal(size=(N, 3)) / 2, axis=1)]
LABELS = (X[:, :4] > 0.3).astype(int)
NUMBERS = np.tanh(X[:, :2]) + X[:, 2:4] / 3
WEIGHTS = RNG.integers(0, 4, N).astype(float)


@pytest.fixture
def cpu() -> Iterator[Any]:
    """The backend that has the plans, with two threads."""
    try:
        backend = select.load("cpu")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{error}")
    threads = gemmlet.get_num_threads()
    with gemmlet.use_backend("cpu"):
        gemmlet.set_num_threads(2)
        yield backend
        gemmlet.set_num_threads(threads)


@pytest.fixture
def calls(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been computed here: the calls of the backend, by name."""
    made: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return call

    backend = type(select.current())
    for name in ("train", "forward"):
        monkeypatch.setattr(backend, name, counted(name, getattr(backend, name)))
    for name in ("linear", "matmul"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    return made


# The class, targets, arguments, and whether samples go through a training plan.
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "adam": (CLASSIFIER, CLASSES, {"alpha": 0.5}),
    "adam, all else": (CLASSIFIER, CLASSES, {"beta_1": 0.7, "beta_2": 0.9, "epsilon": 1e-3, "batch_size": 7}),
    "two classes": (CLASSIFIER, CLASSES == "a", {"activation": "tanh"}),
    "labels": (CLASSIFIER, LABELS, {"activation": "logistic", "hidden_layer_sizes": (5, 4)}),
    "nesterov": (CLASSIFIER, CLASSES, {"solver": "sgd", "learning_rate_init": 0.05, "batch_size": 32}),
    "momentum": (CLASSIFIER, CLASSES, {"solver": "sgd", "nesterovs_momentum": False, "momentum": 0.5}),
    "sgd alone": (REGRESSOR, NUMBERS, {"solver": "sgd", "momentum": 0.0, "shuffle": False}),
    "invscaling": (REGRESSOR, NUMBERS, {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1}),
    "adaptive": (REGRESSOR, NUMBERS, {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 1}),
    "early stopping": (CLASSIFIER, CLASSES, {"early_stopping": True, "n_iter_no_change": 2, "max_iter": 30}),
    "early stopping, numbers": (REGRESSOR, NUMBERS, {"early_stopping": True, "learning_rate_init": 0.1}),
    "no hidden activation": (REGRESSOR, NUMBERS[:, 0], {"activation": "identity", "hidden_layer_sizes": 40}),
    "no hidden layer": (CLASSIFIER, CLASSES, {"hidden_layer_sizes": ()}),
    "wide": (CLASSIFIER, CLASSES, {"hidden_layer_sizes": (150, 33)}),
}


def pair(cls: str, settings: dict[str, Any]) -> list[Any]:
    """scikit-learn's network and ours."""
    given = {"hidden_layer_sizes": (9,), "random_state": 3, "max_iter": 6} | settings
    return [getattr(module, cls)(**given) for module in (neural_network, ours)]


def assert_alike(theirs: Any, mine: Any, x: Any, rtol: float) -> None:
    """All that is public of two networks that have been fitted: numbers to rounding, all else exactly."""
    for name, value in vars(theirs).items():
        if name.endswith("_") and not name.startswith("_"):
            other = getattr(mine, name)
            if name in ("coefs_", "intercepts_", "loss_curve_", "validation_scores_") and value is not None:
                assert len(value) == len(other)
                for a, b in zip(value, other, strict=True):
                    assert np.asarray(a).dtype == np.asarray(b).dtype or name.endswith("e_")
                    np.testing.assert_allclose(b, a, rtol, 100 * rtol, err_msg=name)
            elif isinstance(value, float | np.floating):
                np.testing.assert_allclose(other, value, rtol, err_msg=name)
            else:
                np.testing.assert_array_equal(other, value, err_msg=name)
    predict = "predict_proba" if hasattr(theirs, "predict_proba") else "predict"
    np.testing.assert_allclose(getattr(mine, predict)(x), getattr(theirs, predict)(x), 1e3 * rtol, 100 * rtol)


RTOL = {"float32": 1e-4, "float64": 1e-10}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same(name: str, dtype: Any, calls: list[str]) -> None:
    cls, y, settings = CASES[name]
    theirs, mine = pair(cls, settings)
    x = X.astype(dtype)
    theirs.fit(x, y)
    assert not calls
    mine.fit(x, y)
    assert "train" in calls
    assert_alike(theirs, mine, x, RTOL[str(dtype)])
    assert "linear" in calls


@pytest.mark.parametrize("kind", ["zeros", "few", "csr", "csc", "unsorted", "fortran", "strided", "float16", "list"])
def test_samples_of_any_kind(kind: str, calls: list[str]) -> None:
    unsorted = sparse.csr_matrix(ZEROS)
    for row in range(N):
        part = slice(unsorted.indptr[row], unsorted.indptr[row + 1])
        unsorted.indices[part], unsorted.data[part] = unsorted.indices[part][::-1], unsorted.data[part][::-1]
    unsorted.has_sorted_indices = False
    x = {
        "zeros": ZEROS,
        "few": FEW,
        "csr": sparse.csr_matrix(ZEROS),
        "csc": sparse.csc_array(ZEROS),
        "unsorted": unsorted,
        "fortran": np.asfortranarray(X),
        "strided": np.repeat(X, 2, axis=1)[:, ::2],
        "float16": X.astype(np.float16),
        "list": X.tolist(),
    }[kind]
    theirs, mine = (model.fit(x, CLASSES) for model in pair(CLASSIFIER, {"early_stopping": True}))
    assert "train" in calls
    assert_alike(theirs, mine, x, 1e-10)


def test_few_values_are_trained_on_as_bytes(cpu: Any) -> None:
    for dtype in (np.float32, np.float64):
        x = FEW.astype(dtype)
        codes, values = cpu.encoded(x)
        assert same_bits(values[codes], x)
        assert codes[x == 0].max() == 0
        assert cpu.encoded(X.astype(dtype)) is None
        special = np.array([0.0, -0.0, np.nan, np.inf, *range(252)], dtype)
        codes, values = cpu.encoded(special)
        assert same_bits(values[codes], special)
        assert cpu.encoded(np.arange(257).astype(dtype)) is None


def test_saturated_losses_are_limited_as_theirs(calls: list[str], dtype: Any) -> None:
    """Probabilities that round to 0 or 1 cost what scikit-learn's limits say."""
    for y in (CLASSES, CLASSES == "a", LABELS):
        theirs, mine = pair(CLASSIFIER, {"max_iter": 3, "learning_rate_init": 1e-6})
        x = (300 * X).astype(dtype)
        theirs.fit(x, y)
        mine.fit(x, y)
        # Of two classes they compute 1 - p, of which few bits are left.
        rtol = 10 * RTOL[str(dtype)] if y is CLASSES else 1e-3
        np.testing.assert_allclose(mine.loss_curve_, theirs.loss_curve_, rtol)
    assert "train" in calls


def test_partial_fits_and_warm_starts(calls: list[str], dtype: Any) -> None:
    x, rtol = X.astype(dtype), RTOL[str(dtype)]
    for solver in ("adam", "sgd"):
        models = pair(CLASSIFIER, {"solver": solver, "learning_rate": "invscaling"})
        for part in (slice(0, 40), slice(40, 41), slice(41, None)):
            for model in models:
                model.partial_fit(x[part], CLASSES[part], classes=np.unique(CLASSES))
        assert_alike(*models, x, rtol)
        # Either one goes on from what the other has left, state of the optimizer included.
        swapped = [copy.deepcopy(model) for model in models]
        vars(swapped[0]).update(vars(copy.deepcopy(models[1])))
        for model in (*models, *swapped):
            model.partial_fit(x, CLASSES)
        assert_alike(*models, x, rtol)
        assert_alike(*swapped, x, rtol)
    models = pair(REGRESSOR, {"warm_start": True, "early_stopping": True})
    for _ in range(3):
        for model in models:
            model.fit(x, NUMBERS)
    assert_alike(*models, x, rtol)
    assert "train" in calls


@pytest.mark.skipif(not TAKES_WEIGHTS, reason="scikit-learn has sample weights since 1.7")
@pytest.mark.parametrize("name", CASES)
def test_sample_weights(name: str, calls: list[str], dtype: Any) -> None:
    cls, y, settings = CASES[name]
    x, weights = FEW.astype(dtype), WEIGHTS.astype(dtype)
    theirs, mine = (m.fit(x, y, sample_weight=weights) for m in pair(cls, {"alpha": 0.5} | settings))
    assert "train" in calls
    assert_alike(theirs, mine, x, 10 * RTOL[str(dtype)])
    assert not np.allclose(mine.loss_curve_, pair(cls, {"alpha": 0.5} | settings)[1].fit(x, y).loss_curve_)


@pytest.mark.skipif(not TAKES_WEIGHTS, reason="scikit-learn has sample weights since 1.7")
@pytest.mark.parametrize(
    "weights", [1e-40, 1e-36, 1e30, np.repeat([1e-30, 1e30], N // 2)], ids=lambda w: f"{np.max(w)}"
)
def test_sample_weights_of_any_size(weights: Any, calls: list[str]) -> None:
    """In float32, of which the smallest weights have few bits left once scikit-learn has multiplied by them."""
    x, numbers = X.astype(np.float32), 1e4 * NUMBERS
    for cls, y, alpha in ((CLASSIFIER, CLASSES, 0.0), (REGRESSOR, numbers, 0.0), (REGRESSOR, numbers, 1e-4)):
        calls.clear()
        models = pair(cls, {"alpha": alpha, "batch_size": 8})
        theirs, mine = (m.fit(x, y, sample_weight=np.broadcast_to(weights, N)) for m in models)
        # The L2 term is divided by the weights: scikit-learn has its square in float64 here, float32 may not hold it.
        assert ("train" in calls) == (alpha < 1e15 * np.min(weights))
        assert_alike(theirs, mine, x, RTOL["float32"])


@pytest.mark.skipif(not TAKES_WEIGHTS, reason="scikit-learn has sample weights since 1.7")
def test_sample_weights_otherwise(calls: list[str]) -> None:
    theirs, mine = (m.fit(X, CLASSES, sample_weight=WEIGHTS) for m in pair(CLASSIFIER, {"solver": "lbfgs"}))
    assert {"linear", "matmul"} <= set(calls)
    assert_alike(theirs, mine, X, 1e-8)
    theirs, mine = pair(CLASSIFIER, {"batch_size": 30, "shuffle": False})
    for model in (theirs, mine):  # the first mini-batch is trained on
        with pytest.raises(ZeroDivisionError, match="Weights sum to zero, can't be normalized"):
            model.fit(X, CLASSES, sample_weight=np.repeat([1.0, 0.0, 1.0], 30))
    np.testing.assert_allclose(mine.coefs_[0], theirs.coefs_[0], 1e-10)
    calls.clear()
    theirs, mine = (m.fit(X, CLASSES, sample_weight=WEIGHTS - 0.1) for m in pair(CLASSIFIER, {}))
    assert "train" not in calls  # some are negative
    assert_alike(theirs, mine, X, 1e-12)
    for samples in (sparse.csr_matrix(ZEROS), ZEROS):
        theirs, mine = pair(CLASSIFIER, {})
        for model in (theirs, mine):
            for _ in range(2):
                model.partial_fit(samples, CLASSES, classes=np.unique(CLASSES), sample_weight=WEIGHTS + 1)
        assert_alike(theirs, mine, samples, RTOL["float64"])


def test_lbfgs(calls: list[str], dtype: Any) -> None:
    for cls, y in ((CLASSIFIER, CLASSES), (REGRESSOR, NUMBERS)):
        theirs, mine = (m.fit(X.astype(dtype), y) for m in pair(cls, {"solver": "lbfgs"}))
        assert_alike(theirs, mine, X.astype(dtype), 100 * RTOL[str(dtype)])
    assert {"linear", "matmul"} <= set(calls)
    assert "train" not in calls


def test_what_is_not_usual_is_theirs(calls: list[str]) -> None:
    for settings, y in (({"solver": "sgd", "learning_rate": "invscaling", "power_t": 9.0}, NUMBERS), ({}, NUMBERS)):
        theirs, mine = pair(REGRESSOR, settings | {"warm_start": True})
        for model in (theirs, mine):
            model.fit(X, y)
            if not settings:
                calls.clear()
                model.fit(X.astype(np.float32), y)  # the parameters are float64
        assert "train" not in calls
        assert_alike(theirs, mine, X, 1e-10)
    if TAKES_WEIGHTS:
        theirs, mine = (m.fit(X, NUMBERS**2) for m in pair(REGRESSOR, {"loss": "poisson"}))
        assert "train" not in calls
        assert_alike(theirs, mine, X, 1e-10)


def test_a_subclass_computes_as_it_says(calls: list[str]) -> None:
    def halved_gradients(base: Any) -> Any:
        def compute(self: Any, layer: int, rows: Any, activations: Any, deltas: Any, coefs: Any, biases: Any) -> None:
            base._compute_loss_grad(self, layer, rows, activations, deltas, coefs, biases)
            coefs[layer] *= 0.5

        return type("Halved", (base,), {"_compute_loss_grad": compute})

    def dropped_features(base: Any) -> Any:
        def forward(self: Any, activations: Any) -> Any:
            activations[0][:, 0] = 0
            return base._forward_pass(self, activations)

        return type("Dropped", (base,), {"_forward_pass": forward})

    for derived in (halved_gradients, dropped_features):
        bases = neural_network.MLPClassifier, ours.MLPClassifier
        models = [derived(base)((5,), random_state=0, max_iter=3).fit(X.copy(), CLASSES) for base in bases]
        assert "train" not in calls
        assert_alike(*models, X, 1e-10)


def test_a_function_of_scikit_learns_that_somebody_has_replaced(calls: list[str], monkeypatch: Any) -> None:
    tables = neural_network._multilayer_perceptron
    monkeypatch.setitem(tables.ACTIVATIONS, "relu", lambda x: np.maximum(x, 0.1 * x, out=x))
    theirs, mine = (m.fit(X, CLASSES) for m in pair(CLASSIFIER, {}))
    assert {"train", "linear"}.isdisjoint(calls)
    assert_alike(theirs, mine, X, 1e-10)


@pytest.mark.parametrize("sizes", [(9, 4), ()])
def test_another_number_of_layers_is_an_error_of_theirs(sizes: tuple[int, ...], cpu: Any) -> None:
    errors = []
    for model in pair(CLASSIFIER, {"warm_start": True}):
        model.fit(X, CLASSES).set_params(hidden_layer_sizes=sizes)
        with pytest.raises((AttributeError, IndexError, ValueError)) as caught:
            model.fit(X, CLASSES)
        errors.append(repr(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("lr", [0.0, 1e-50, 1e30])
def test_learning_rates_out_of_all_bounds(lr: float, cpu: Any) -> None:
    models = pair(CLASSIFIER, {"solver": "sgd"})
    for model in models:
        model.partial_fit(X, CLASSES, classes=np.unique(CLASSES))
        model._optimizer.learning_rate = lr
        with contextlib.suppress(ValueError), np.errstate(all="ignore"):  # 1e30 is too much for both
            model.partial_fit(X, CLASSES)
    np.testing.assert_allclose(models[1].coefs_[0], models[0].coefs_[0], 1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e14, 1e20, 1e39, 1e-20])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_float64_targets_of_float32_samples(scale: float, solver: str, calls: list[str]) -> None:
    """scikit-learn's losses and gradients are float64 then, of which float32 holds the usual ones."""
    settings = {"solver": solver, "learning_rate_init": 1e-4 / (max(1, scale) if solver == "sgd" else 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of overflows
        theirs, mine = (m.fit(X.astype(np.float32), NUMBERS * scale) for m in pair(REGRESSOR, settings))
    assert ("train" in calls) == (scale < 1e15)
    assert_alike(theirs, mine, X.astype(np.float32), 1e-4)


def a_row(model: Any) -> None:
    model.intercepts_[0] = model.intercepts_[0][np.newaxis]


def one_number(model: Any) -> None:
    model.intercepts_[0] = np.full(1, 0.1, model.coefs_[0].dtype)


def a_list(model: Any) -> None:
    model.intercepts_[0] = model.intercepts_[0].tolist()


def a_sparse_matrix(model: Any) -> None:
    model.coefs_[0] = sparse.csr_matrix(model.coefs_[0])


def a_sparse_array(model: Any) -> None:
    model.coefs_ = [sparse.csr_array(w) for w in model.coefs_]


def a_matrix(model: Any) -> None:
    model.coefs_[1] = model.coefs_[1].view(np.matrix)


def another_width(model: Any) -> None:
    model.coefs_[0], model.coefs_[1] = model.coefs_[0][:, :5].copy(), model.coefs_[1][:5].copy()
    model.intercepts_[0] = model.intercepts_[0][:5].copy()


def one_array_twice(model: Any) -> None:
    model.coefs_[1] = model.coefs_[0]


def views_that_overlap(model: Any) -> None:
    model.intercepts_[1] = model.intercepts_[0][:]


@pytest.mark.parametrize(
    "change",
    [
        *(a_row, one_number, a_list, a_sparse_matrix, a_sparse_array, a_matrix, another_width),
        *(one_array_twice, views_that_overlap),
    ],
)
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_parameters_that_somebody_has_set(change: Callable[[Any], None], solver: str, cpu: Any) -> None:
    """What scikit-learn computes with, it computes with here; what it does not take is its own error."""
    outcomes = []
    settings = {"hidden_layer_sizes": (12, 12), "warm_start": True, "solver": solver, "max_iter": 3}
    for model in pair(REGRESSOR, settings):
        model.fit(X, NUMBERS)
        change(model)
        outcomes.append([])
        for call in (lambda m: m.predict(X), lambda m: m.fit(X, NUMBERS).predict(X)):
            try:
                outcomes[-1].append(call(model))
            except Exception as error:
                outcomes[-1].append(type(error))
    for theirs, mine in zip(*outcomes, strict=True):
        if isinstance(theirs, type):
            assert mine is theirs
        else:
            np.testing.assert_allclose(mine, theirs, 1e-8, 1e-8)


def a_list_of_numbers(state: list[Any]) -> None:
    state[0] = state[0].tolist()


def what_nobody_may_write(state: list[Any]) -> None:
    state[0] = state[0].copy()
    state[0].flags.writeable = False


def an_array_of_another_class(state: list[Any]) -> None:
    state[0] = state[0].view(np.matrix)


def overlapping_arrays(state: list[Any]) -> None:
    state[0] = state[1][:]


@pytest.mark.parametrize(
    "change", [a_list_of_numbers, what_nobody_may_write, an_array_of_another_class, overlapping_arrays]
)
@pytest.mark.parametrize(("solver", "name"), [("adam", "ms"), ("sgd", "velocities")])
def test_states_that_somebody_has_set(change: Callable[[Any], None], solver: str, name: str, calls: list[str]) -> None:
    outcomes: list[Any] = []
    settings = {"hidden_layer_sizes": (X.shape[1], X.shape[1]), "solver": solver}
    for model in pair(REGRESSOR, settings):
        model.partial_fit(X, NUMBERS)
        change(getattr(model._optimizer, name))
        calls.clear()
        try:
            outcomes.append(model.partial_fit(X, NUMBERS).predict(X))
        except Exception as error:
            outcomes.append(type(error))
        assert "train" not in calls
    theirs, mine = outcomes
    if isinstance(theirs, type):
        assert mine is theirs
    else:
        np.testing.assert_allclose(mine, theirs, 1e-8, 1e-8)


@pytest.mark.parametrize("sizes", [{4: 0, 3: 0}.keys(), {4}, range(3, 5), np.array([4, 3]), np.int64(4)], ids=repr)
def test_hidden_layers_in_whatever_holds_them(sizes: Any, calls: list[str]) -> None:
    theirs, mine = (m.fit(X, NUMBERS) for m in pair(REGRESSOR, {"hidden_layer_sizes": sizes}))
    assert "train" in calls
    assert_alike(theirs, mine, X, 1e-10)


def test_predictions_of_other_dtypes(cpu: Any) -> None:
    """As NumPy promotes them; and of one sample, and of more than are taken at a time."""
    for fitted in (np.float32, np.float64):
        theirs, mine = (m.fit(X.astype(fitted), CLASSES) for m in pair(CLASSIFIER, {}))
        for x in (
            X,
            X.astype(np.float32),
            ZEROS,
            ZEROS.astype(np.float32),
            np.tile(ZEROS, (9, 1)),
            (X * 9).astype(np.int64),
            X[:1],
            np.tile(X, (25, 1)),
            np.asfortranarray(X),
        ):
            wanted, found = theirs.predict_proba(x), mine.predict_proba(x)
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted, 1e-4, 1e-5)
            np.testing.assert_array_equal(mine.predict(x), theirs.predict(x))


def test_zeros_that_are_skipped_hide_no_weights(cpu: Any, calls: list[str]) -> None:
    theirs, mine = (m.fit(X, CLASSES) for m in pair(CLASSIFIER, {}))
    calls.clear()
    wanted, found = (m.predict_proba(ZEROS) for m in (theirs, mine))
    assert calls == ["forward"]
    np.testing.assert_allclose(found, wanted, 1e-8)
    for model in (theirs, mine):
        model.coefs_[0][0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(mine.predict_proba(ZEROS)), np.isnan(theirs.predict_proba(ZEROS)))


def test_every_backend_learns_the_same(backend: Any) -> None:
    theirs, mine = (m.fit(X, CLASSES) for m in pair(CLASSIFIER, {"early_stopping": True}))
    assert_alike(theirs, mine, X, 1e-9)


def test_threads_leave_the_bits(cpu: Any) -> None:
    found = []
    for threads in (1, 2):
        gemmlet.set_num_threads(threads)
        mine = pair(CLASSIFIER, {"hidden_layer_sizes": (150, 33)})[1].fit(np.tile(X, (4, 1)), np.tile(CLASSES, 4))
        found.append([np.array(mine.loss_curve_), *mine.coefs_, *mine.intercepts_])
        found[-1] += [mine.predict_proba(np.tile(x, (9, 1))) for x in (X, ZEROS)]
    assert all(map(same_bits, *found))


def test_a_wrong_kernel_is_noticed(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of all these comparisons."""
    train = type(cpu).train

    def wrong(self: Any, plan: Any, batches: Any) -> Any:
        outcome = train(self, plan, batches)
        for parameter in plan.parameters(0):
            np.multiply(parameter.value, 1.001, out=parameter.value)
        return outcome

    monkeypatch.setattr(type(cpu), "train", wrong)
    theirs, mine = (m.fit(X, CLASSES) for m in pair(CLASSIFIER, {}))
    with pytest.raises(AssertionError):
        assert_alike(theirs, mine, X, 1e-4)


def test_errors_and_warnings_are_theirs(cpu: Any) -> None:
    for model in pair(REGRESSOR, {"solver": "sgd", "learning_rate_init": 1e200}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="non-finite parameter weights"):
                model.fit(1e100 * X, NUMBERS)
    for model in pair(REGRESSOR, {"early_stopping": True}):
        with pytest.raises(ValueError, match="does not support early_stopping"):
            model.partial_fit(X, NUMBERS)
        with pytest.raises(ValueError, match="validation set is too small"):
            model.fit(X[:5], NUMBERS[:5])
        assert "_epochs" not in vars(model)
    for model in pair(REGRESSOR, {"batch_size": 1000}):
        with pytest.warns(UserWarning, match="larger than sample size"):
            model.fit(X, NUMBERS)
        assert model.batch_size == 1000
    for model in pair(REGRESSOR, {"max_iter": 2}):
        # What comes first is the error, and the optimizer is there.
        for call, settings in (("partial_fit", {}), ("fit", {}), ("fit", {"validation_fraction": 0.999})):
            failing = clone(model).set_params(early_stopping=True, batch_size=1000, **settings)
            with (
                warnings.catch_warnings(action="error"),
                pytest.raises(ValueError, match=r"validation|early|n_samples"),
            ):
                getattr(failing, call)(X[:9], NUMBERS[:9])
            assert hasattr(failing, "_optimizer")
        with pytest.warns(ConvergenceWarning):
            model.fit(X, NUMBERS)


def test_an_interrupt_keeps_what_was_learnt(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, count = type(cpu).train, 0

    def interrupted(self: Any, plan: Any, batches: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return train(self, plan, batches)

    monkeypatch.setattr(type(cpu), "train", interrupted)
    mine = pair(CLASSIFIER, {"batch_size": 10})[1]
    with pytest.warns(UserWarning, match="interrupted by user"):
        mine.fit(X, CLASSES)
    assert mine._optimizer.t > 0
    assert "_epochs" not in vars(mine)
    assert "update_params" not in vars(mine._optimizer)
    mine.partial_fit(X, CLASSES)


def test_copies(cpu: Any) -> None:
    mine = pair(CLASSIFIER, {})[1].fit(X, CLASSES)
    assert type(clone(mine)) is ours.MLPClassifier
    assert clone(mine).get_params() == mine.get_params()
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        one, two = (copy.deepcopy(model).partial_fit(X, CLASSES) for model in (mine, other))
        assert all(map(same_bits, one.coefs_, two.coefs_))


def test_a_network_becomes_scikit_learns_by_its_class(cpu: Any) -> None:
    _, mine = pair(CLASSIFIER, {"early_stopping": True})
    wanted = mine.fit(X, CLASSES).predict_proba(X)
    mine.__class__ = neural_network.MLPClassifier
    assert b"gemmlet" not in pickle.dumps(mine)
    np.testing.assert_allclose(mine.predict_proba(X), wanted, 1e-8)


def test_patch_and_unpatch() -> None:
    module = types.ModuleType("somebody_s")
    module.Net, module.other = neural_network.MLPClassifier, 1  # type: ignore[attr-defined]
    module.Ours = ours.MLPClassifier  # type: ignore[attr-defined]  # on purpose
    sys.modules[module.__name__] = module
    originals = neural_network.MLPClassifier, neural_network.MLPRegressor
    private = neural_network._multilayer_perceptron
    before = neural_network.MLPClassifier(alpha=0.5)
    try:
        for _ in range(2):  # twice is as good as once
            ours.patch_sklearn()
        from sklearn.neural_network import MLPClassifier, MLPRegressor

        assert (MLPClassifier, MLPRegressor) == (ours.MLPClassifier, ours.MLPRegressor)
        assert module.Net is ours.MLPClassifier  # type: ignore[attr-defined]
        for estimator in (before, MLPClassifier(alpha=0.5)):
            assert type(pickle.loads(pickle.dumps(estimator))) is type(estimator)
        assert isinstance(module.Net(), originals[0])  # type: ignore[attr-defined]
    finally:
        ours.unpatch_sklearn()
        del sys.modules[module.__name__]
    assert (neural_network.MLPClassifier, neural_network.MLPRegressor) == originals
    assert private.MLPClassifier is module.Net is originals[0]  # type: ignore[attr-defined]
    assert module.Ours is ours.MLPClassifier is not originals[0]  # type: ignore[attr-defined]


def test_what_is_not_known_is_left_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = neural_network._multilayer_perceptron.BaseMultilayerPerceptron
    assert ours._find_fault() is None
    calls.clear()

    def changed(self: Any, samples: Any, *rest: Any) -> Any:
        return backprop(self, samples, *rest)

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:  # it counts the loss otherwise
        loss, *gradients = backprop(self, *args, **kwargs)
        return 2 * loss, *gradients

    def renamed(
        self: Any, X: Any, y: Any, weights: Any, a: Any, d: Any, c: Any, i: Any, layer_units: Any, incremental: Any
    ) -> Any:
        return fit_stochastic(self, X, y, weights, a, d, c, i, layer_units, incremental)

    fit_stochastic = base._fit_stochastic
    other.__signature__ = __import__("inspect").signature(base._backprop)  # type: ignore[attr-defined]
    backprop = base._backprop
    with monkeypatch.context() as patch:
        patch.setattr(base, "_backprop", changed)
        assert ours._find_fault() == "_backprop has changed"
        patch.setattr(base, "_backprop", other)
        assert ours._find_fault() == "MLPClassifier learns something else"
        if TAKES_WEIGHTS:
            patch.setattr(base, "_backprop", backprop)
            patch.setattr(base, "_fit_stochastic", renamed)
            assert ours._find_fault() == "MLPClassifier learns something else"
        patch.delattr(base, "_forward_pass")
        assert ours._find_fault() == "_forward_pass has changed"
    calls.clear()
    monkeypatch.setattr(ours, "_fault", "whatever")
    for settings in ({}, {"solver": "lbfgs"}):
        mine = pair(CLASSIFIER, settings)[1].fit(X, CLASSES)
        mine.predict(X)
    assert not calls


# scikit-learn's own tests.


@pytest.mark.parametrize("cls", [CLASSIFIER, REGRESSOR])
def test_the_checks_of_estimators_pass(cls: str, cpu: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(getattr(ours, cls)(max_iter=30))


# Run under `patch_sklearn`, with a count of the calls of the training plan; one that is wrong makes them fail.
CHILD = """
import os, sys
import pytest
import sklearn.neural_network.tests as tests
from gemmlet.backends import select
from gemmlet.integrations.sklearn import patch_sklearn

patch_sklearn()
backend, is_wrong, calls = type(select.current()), sys.argv[1] == "wrong", 0
train = backend.train

def counted(self, plan, batches):
    global calls
    calls += 1
    outcome = train(self, plan, batches)
    for parameter in plan.parameters(0) if is_wrong else ():
        parameter.value[...] *= 0.99
    return outcome

backend.train = counted

class Plugin:
    @pytest.fixture  # of scikit-learn's conftest.py
    def global_random_seed(self):
        return 42

file = os.path.join(os.path.dirname(tests.__file__), "test_mlp.py")
# Without the settings of whoever tests gemmlet.
options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "-c", os.devnull, "--rootdir=."]
status = pytest.main([file, *options], [Plugin()])
print("calls:", calls)
sys.exit(status)
"""


@pytest.mark.parametrize("setting", ["GEMMLET_BACKEND", "GEMMLET_NUM_THREADS"])
def test_an_unknown_setting_is_named(setting: str) -> None:
    """And scikit-learn's version is not blamed."""
    script = "import gemmlet.integrations.sklearn"
    environment = os.environ | {setting: "nonsense"}
    child = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert child.returncode == 1
    assert f"{setting} " in child.stderr.splitlines()[-1]
    assert "leaves scikit-learn" not in child.stderr


def run_their_tests(kind: str, folder: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, kind],
        cwd=folder,
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.slow
def test_their_own_tests_pass(cpu: Any, tmp_path: Any) -> None:
    """All of test_mlp.py, none left out."""
    done = run_their_tests("right", tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.rpartition("calls:")[2]) > 1000
    assert "deselected" not in done.stdout


def test_their_own_tests_notice_a_wrong_kernel(cpu: Any, tmp_path: Any) -> None:
    done = run_their_tests("wrong", tmp_path)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]
