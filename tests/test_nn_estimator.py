"""`MLP` and `GAN` in scikit-learn's manners, by scikit-learn's own tools."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmlet import metrics
from gemmlet.nn import GAN, MLP, SGD, Adam, ClipNorm
from support import same_bits

pytest.importorskip("sklearn")

from sklearn.base import clone, is_classifier, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 5))
Y = (X[:, 0] + X[:, 1] > 0).astype(int) + (X[:, 2] > 0.5)
BINARY = (X[:, 0] + X[:, 1] > 0).astype(int)
NAMES = np.array(["a", "b", "c"])[Y]
FAST: dict[str, Any] = {"default_optimizer": Adam(0.02), "default_batch_size": 10}


def same(a: MLP, b: MLP) -> bool:
    return all(map(same_bits, a.parameters, b.parameters))


def state(model: Any) -> dict[str, Any]:
    """All that a network is, to be compared after what should have changed nothing."""
    return {name: pickle.dumps(value) for name, value in vars(model).items()}


# Arguments by name.


def test_parameters_are_the_constructors_arguments() -> None:
    model = MLP([5, 8, 3], "relu", label_smoothing=0.1, default_optimizer=SGD(0.5), seed=7)
    model.fit(X, NAMES, 2)
    assert model.classes == ["a", "b", "c"]
    params = model.get_params()
    assert params["layers"] == [5, 8, 3]
    assert (params["label_smoothing"], params["seed"], params["default_optimizer"]) == (0.1, 7, SGD(0.5))
    assert params["default_optimizer__lr"] == 0.5
    assert model.get_params(deep=False).keys() == inspect.signature(MLP).parameters.keys()
    # What training has found out is none of them.
    assert model.dtype == np.float64
    assert [params[name] for name in ("dtype", "classes", "multi_label", "loss")] == [None, None, False, None]
    params["layers"].append(9)
    assert model.layers == [5, 8, 3]
    # What was set later, or given, is.
    model.label_smoothing, model.classes = 0.2, ["x", "y", "z"]
    assert [model.get_params()[name] for name in ("label_smoothing", "classes")] == [0.2, ["x", "y", "z"]]
    given = MLP([5, 3], output="sigmoid", loss="binary_cross_entropy_with_logits", dtype="float64").get_params()
    assert (given["loss"], given["dtype"]) == ("binary_cross_entropy_with_logits", np.float64)


@pytest.mark.parametrize("make", [lambda: MLP([5, 8, 3], seed=7), lambda: GAN(3, [4, 5], [6, 1], seed=7)])
def test_clone_has_learnt_nothing(make: Any) -> None:
    rows = np.abs(X) / np.abs(X).max()
    model, again = make(), make()
    fit = (lambda network: network.fit(rows, Y, 2).loss) if type(model) is MLP else (lambda n: n.fit(rows, 2))
    history = fit(model)
    other = clone(model)
    assert (other.steps, other.dtype) == (0, np.float32)
    assert state(other) == state(again)
    if type(model) is MLP:
        assert fit(other) == history
    else:
        assert fit(other).generator_loss == history.generator_loss


def test_clone_keeps_what_was_set() -> None:
    model = MLP([5, 8, 3], output="sigmoid")
    model.fit(X, np.eye(3, dtype=int)[Y], 1)
    assert not model.multi_label
    model.multi_label = True
    assert clone(model).multi_label
    learnt = MLP([5, 8, 3], output="sigmoid")
    learnt.fit(X, np.ones((200, 3)), 1)
    assert learnt.multi_label
    assert not clone(learnt).multi_label
    learnt = pickle.loads(pickle.dumps(learnt))
    assert not clone(learnt).multi_label
    model = MLP([5, 8, 1], output="sigmoid")
    model.fit(X, BINARY == 1, 1)
    assert (model.classes, clone(model).classes) == ([False, True], None)
    model.classes = ["no", "yes"]
    assert clone(model).classes == ["no", "yes"]


def test_a_pickle_of_before_can_be_cloned() -> None:
    model = MLP([5, 8, 3])
    model.fit(X, NAMES, 1)
    del vars(model)["_found"]
    old = pickle.loads(pickle.dumps(model))
    assert (clone(old).classes, clone(old).dtype, clone(old).steps) == (["a", "b", "c"], np.float64, 0)


def test_no_optimizer_means_the_default() -> None:
    """Of the GAN, whose constructor takes None; the settings beside it are those of the default one."""
    usual = GAN().default_optimizer.settings()
    for params, changed in (({}, {}), ({"default_optimizer__lr": 0.5}, {"lr": 0.5})):
        gan = GAN(default_optimizer=SGD(0.1)).set_params(default_optimizer=None, **params)
        assert gan.default_optimizer.settings() == usual | changed


def test_set_params_makes_it_anew() -> None:
    model = MLP([5, 8, 3], seed=7)
    model.fit(X, Y, 2)
    before = state(model)
    assert model.set_params() is model
    assert state(model) == before
    assert model.set_params(layers=[5, 4, 3], activation="relu", output="sigmoid") is model
    assert (model.steps, model.layers, model.loss) == (0, [5, 4, 3], "binary_cross_entropy_with_logits")
    other = MLP([5, 4, 3], "relu", "sigmoid", seed=7)
    model.fit(X, Y, 2)
    other.fit(X, Y, 2)
    assert same(model, other)
    assert same(pickle.loads(pickle.dumps(model)), model)
    before = state(model)
    for params, error, message in (
        ({"width": 3}, ValueError, "no parameter 'width'"),
        ({"seed": 1, "activation": "step"}, ValueError, "activation 'step'"),
        ({"default_optimizer__momentum": 0.9}, ValueError, "no parameter 'default_optimizer__momentum'"),
        (
            {"default_optimizer": "sgd", "default_optimizer__eps": 1},
            ValueError,
            "no parameter 'default_optimizer__eps'",
        ),
    ):
        with pytest.raises(error, match=message):
            model.set_params(**params)
        assert state(model) == before
    assert model.set_params(default_optimizer__lr=0.25).default_optimizer == Adam(0.25)
    assert model.set_params(default_optimizer=ClipNorm(SGD(0.5), 2.0)).get_params()["default_optimizer__max_norm"] == 2
    model.set_params(default_optimizer__lr=0.125, default_optimizer__max_norm=3.0)
    assert model.default_optimizer == ClipNorm(SGD(0.125), 3.0)
    model.set_params(default_optimizer="sgd", default_optimizer__momentum=0.5)
    assert model.default_optimizer == SGD(momentum=0.5)
    gan = GAN(3, [4, 5], [6, 1]).set_params(latent_dim=7, default_optimizer__lr=0.1)
    assert (gan.latent_dim, gan.default_optimizer.lr, gan.sample(2).shape) == (7, 0.1, (2, 5))


def test_set_params_during_a_fit_is_refused() -> None:
    model, expected = MLP([5, 8, 3]), MLP([5, 8, 3])

    def callback(_: Any) -> None:
        before = state(model)
        with pytest.raises(RuntimeError, match="this network is in a fit"):
            model.set_params(seed=1)
        assert state(model) == before

    history = model.fit(X, Y, 2, callback=callback, callback_every="epoch")
    assert history.loss == expected.fit(X, Y, 2).loss
    assert same(model, expected)


# scikit-learn's tools.


@pytest.mark.filterwarnings("ignore")
def test_tools_of_scikit_learn() -> None:
    model = MLP([5, 8, 3], "relu", **FAST)
    assert is_classifier(model)
    scores = cross_val_score(model, X, Y, cv=3, params={"epochs": 5})
    assert scores.shape == (3,)
    assert scores.min() > 0.6
    search = GridSearchCV(model, {"layers": [[5, 1, 3], [5, 16, 3]], "default_optimizer__lr": [1e-9, 0.02]}, cv=3)
    search.fit(X, NAMES)
    assert search.best_params_ == {"layers": [5, 16, 3], "default_optimizer__lr": 0.02}
    assert search.best_estimator_.layers == [5, 16, 3]
    assert search.classes_.tolist() == ["a", "b", "c"]
    pipeline = make_pipeline(StandardScaler(), clone(model))
    pipeline.fit(X, Y, mlp__epochs=20)
    assert pipeline.score(X, Y) > 0.8
    assert "MLP" in pipeline._repr_html_()
    auc = cross_val_score(model, X, NAMES, cv=3, scoring="roc_auc_ovr")
    assert auc.min() > 0.8
    numbers = MLP([5, 8, 1], output="identity", **FAST)
    assert is_regressor(numbers)
    assert cross_val_score(numbers, X, X[:, 0], cv=3).min() > 0.5
    with pytest.raises(AttributeError, match="identity outputs have no classes"):
        numbers.classes_  # noqa: B018
    bagging = BaggingClassifier(clone(model), n_estimators=2, random_state=0).fit(X, Y)
    assert bagging.score(X, Y) > 0.7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labels", [[0, 1], ["no", "yes"], [3, 7]])
def test_one_output_has_two_columns(labels: list[Any]) -> None:
    """Else scikit-learn's tools take the one for a class of its own, and are silently wrong."""
    y = np.array(labels)[BINARY]
    one, two = MLP([5, 8, 1], output="sigmoid", **FAST), MLP([5, 8, 2], **FAST)
    one.fit(X, y, 20)
    proba = one.predict_proba(X)
    assert proba.shape == (200, 2)
    assert np.abs(proba.sum(axis=1) - 1).max() < 1e-12
    assert np.array_equal(one.classes_[proba.argmax(axis=1)], one.predict(X))
    # A probability near 0 is no difference from 1.
    far = MLP([1, 1], output="sigmoid", dtype=np.float32)
    far.parameters[0][:] = 40
    assert far.predict_proba([[1.0]])[0, 0] == pytest.approx(np.exp(-40), rel=1e-5)
    for voting in ("soft", "hard"):
        ensemble = VotingClassifier([("one", clone(one)), ("linear", LogisticRegression())], voting=voting).fit(X, y)
        assert ensemble.score(X, y) > 0.9
    calibrated = CalibratedClassifierCV(clone(one), cv=3).fit(X, y)
    assert calibrated.score(X, y) > 0.9
    stacked = StackingClassifier([("one", clone(one)), ("two", two)], cv=3).fit(X, y)
    assert stacked.score(X, y) > 0.9
    assert cross_val_score(one, X, y, cv=3, scoring="roc_auc").min() > 0.9
    assert cross_val_score(one, X, y, cv=3, scoring="neg_log_loss").min() > -0.5
    assert cross_val_predict(one, X, y, cv=3, method="predict_proba").shape == (200, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_subclass_whose_fit_returns_itself() -> None:
    """What docs/sklearn.md has for the tools that call what `fit` returns."""

    class Classifier(MLP):
        def fit(self, x: Any, y: Any, *arguments: Any, **settings: Any) -> Any:
            super().fit(x, y, *arguments, **settings)
            return self

    tuned = TunedThresholdClassifierCV(Classifier([5, 8, 2], **FAST), cv=3).fit(X, BINARY)
    assert tuned.score(X, BINARY) > 0.9
    assert Classifier([5, 8, 2]).partial_fit(X, BINARY).steps == 4


@pytest.mark.parametrize(
    "kind", ["classes", "column", "labels", "one-hot", "labels of one-hot rows", "several labels", "numbers"]
)
def test_score(kind: str) -> None:
    weights = RNG.random(len(X))
    names, rows = np.array(["x", "y", "z"]), np.eye(3)[Y]
    settings: dict[str, Any] = {"several labels": {"output": "sigmoid"}, "numbers": {"output": "identity"}}.get(
        kind, {}
    )
    if kind == "labels of one-hot rows":
        settings = {"classes": list(names)}
    targets = {"labels": names[Y], "several labels": np.hstack([rows[:, :2], rows[:, :1]]), "column": Y[:, None]}.get(
        kind, rows
    )
    targets = Y if kind == "classes" else targets
    model = MLP([5, 8, 3], **settings)
    model.fit(X, targets, 3)
    predicted = model.predict(X)
    if kind == "numbers":
        wanted = metrics.r2_score(targets, predicted, sample_weight=weights)
    elif kind == "several labels":
        wanted = np.average((predicted == targets).all(axis=1), weights=weights)
    else:
        truth = names[Y] if kind.startswith("labels") else Y
        wanted = np.average(predicted == truth, weights=weights)
    assert model.score(X, targets, sample_weight=weights) == pytest.approx(wanted)


def test_classes_beyond_int64() -> None:
    labels = [5, 2**63 + 1, 2**63 + 2]
    model = MLP([5, 3], classes=labels)
    assert model.classes_.tolist() == labels


# partial_fit.


def test_partial_fit_keeps_one_optimizer(tmp_path: Path) -> None:
    names = np.array(["b", "c", "a"])
    model, other, rule = MLP([5, 8, 3]), MLP([5, 8, 3], classes=["a", "b", "c"]), Adam()
    order = np.argsort(Y, kind="stable")  # the first part lacks classes
    others = []
    for i, part in enumerate(np.array_split(order, 4)):
        assert model.partial_fit(X[part], names[Y[part]], classes=names) is model
        other.fit(X[part], names[Y[part]], 1, optimizer=rule)
        for network in others:
            network.partial_fit(X[part], names[Y[part]])
        if i == 1:
            model.save(tmp_path / "m.safetensors")
            others = [MLP.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    assert [same(network, other) for network in (model, *others)] == [True] * 4
    assert clone(model).classes is None
    # A file that has the state of another optimizer says nothing of that of partial_fit.
    other.save(tmp_path / "n.safetensors", rule)
    assert MLP.load(tmp_path / "n.safetensors")._of_partial_fit is None
    indices = MLP([5, 8, 3])
    indices.partial_fit(X[:5], Y[:5], classes=[0, 1, 2], sample_weight=np.ones(5))
    indices.partial_fit(X[:5], Y[:5], classes=np.arange(3))
    assert indices.classes is None
    assert indices.steps == 2
    bools = MLP([5, 8, 1], output="sigmoid").partial_fit(X, BINARY == 1, classes=[True, False])
    assert bools.classes == [False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"classes": ["a", "b"]}, ValueError, "classes must be 3 different labels"),
        ({"classes": ["a", 1, 2]}, TypeError, "must be all numbers"),
        ({"classes": ["a", "b", "d"]}, ValueError, "classes of this network are 'a', 'b', 'd'"),
        ({"classes": ["a", "b", "c"], "sample_weight": [1]}, ValueError, "sample_weight has shape"),
    ],
)
def test_a_partial_fit_that_fails_changes_nothing(arguments: Any, error: Any, message: str) -> None:
    model = MLP([5, 8, 3])
    before = state(model)
    with pytest.raises(error, match=message):
        model.partial_fit(X, NAMES, **arguments)
    assert state(model) == before
    model.partial_fit(X, Y)
    before = state(model)
    with pytest.raises(ValueError, match=r"classes are \['a', 'b', 'c'\], those of this network \[0, 1, 2\]"):
        model.partial_fit(X, NAMES, classes=["a", "b", "c"])
    assert state(model) == before
