"""`MLP` in scikit-learn's manners, by scikit-learn's own tools."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from gemmlet import metrics
from gemmlet.nn import MLP, SGD, Adam
from support import same_bits

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 5))
Y = (X[:, 0] + X[:, 1] > 0).astype(int) + (X[:, 2] > 0.5)


def same(a: MLP, b: MLP) -> bool:
    return all(map(same_bits, a.parameters, b.parameters))


def test_parameters_are_the_constructors_arguments() -> None:
    model = MLP([5, 8, 3], "relu", label_smoothing=0.1, default_optimizer=SGD(0.5), seed=7)
    model.fit(X, np.array(["a", "b", "c"])[Y], 2)
    assert model.classes == ["a", "b", "c"]
    params = model.get_params()
    assert params["layers"] == [5, 8, 3]
    assert (params["label_smoothing"], params["seed"], params["default_optimizer"]) == (0.1, 7, SGD(0.5))
    # What training has found out is none of them.
    assert (params["dtype"], params["classes"], params["multi_label"], params["loss"]) == (None, None, False, None)
    model.label_smoothing = 0.2
    assert model.get_params()["label_smoothing"] == 0.2
    assert MLP([5, 3], output="sigmoid", loss="binary_cross_entropy_with_logits").get_params()["loss"] is None


def test_clone_has_learnt_nothing() -> None:
    model = MLP([5, 8, 3], seed=7)
    model.fit(X, Y, 2)
    other = clone(model)
    assert other.steps == 0
    assert other.dtype == np.float32
    model_again, history = MLP([5, 8, 3], seed=7), None
    history = model_again.fit(X, Y, 2)
    assert other.fit(X, Y, 2).loss == history.loss
    assert same(other, model_again)
    assert same(other, model)


def test_set_params_makes_it_anew() -> None:
    model = MLP([5, 8, 3], seed=7)
    model.fit(X, Y, 2)
    assert model.set_params(layers=[5, 4, 3], activation="relu", output="sigmoid") is model
    assert (model.steps, model.layers, model.loss) == (0, [5, 4, 3], "binary_cross_entropy_with_logits")
    other = MLP([5, 4, 3], "relu", "sigmoid", seed=7)
    model.fit(X, Y, 2)
    other.fit(X, Y, 2)
    assert same(model, other)
    assert same(pickle.loads(pickle.dumps(model)), model)
    for params, message in (({"width": 3}, "no parameter 'width'"), ({"activation": "step"}, "activation 'step'")):
        with pytest.raises(ValueError, match=message):
            model.set_params(**params)
        assert same(model, other)


@pytest.mark.filterwarnings("ignore")
def test_tools_of_scikit_learn() -> None:
    model = MLP([5, 8, 3], "relu", default_optimizer=Adam(0.02), default_batch_size=10)
    scores = cross_val_score(model, X, Y, cv=3)
    assert scores.shape == (3,)
    assert scores.min() > 0.6
    search = GridSearchCV(model, {"layers": [[5, 1, 3], [5, 16, 3]], "activation": ["relu", "tanh"]}, cv=3)
    search.fit(X, Y)
    assert search.best_params_["layers"] == [5, 16, 3]
    assert search.best_estimator_.layers == [5, 16, 3]
    pipeline = make_pipeline(StandardScaler(), clone(model))
    pipeline.fit(X, Y)
    assert pipeline.score(X, Y) > 0.8
    auc = cross_val_score(model, X, np.array(["a", "b", "c"])[Y], cv=3, scoring="roc_auc_ovr")
    assert auc.min() > 0.8
    numbers = MLP([5, 8, 1], output="identity", default_optimizer=Adam(0.02), default_batch_size=10)
    assert cross_val_score(numbers, X, X[:, 0], cv=3).min() > 0.5


@pytest.mark.parametrize(
    "kind", ["classes", "labels", "one-hot", "labels of one-hot rows", "several labels", "numbers"]
)
def test_score(kind: str) -> None:
    weights = RNG.random(len(X))
    names, rows = np.array(["x", "y", "z"]), np.eye(3)[Y]
    settings: dict[str, Any] = {"several labels": {"output": "sigmoid"}, "numbers": {"output": "identity"}}.get(
        kind, {}
    )
    if kind == "labels of one-hot rows":
        settings = {"classes": list(names)}
    targets = {"labels": names[Y], "several labels": np.hstack([rows[:, :2], rows[:, :1]])}.get(kind, rows)
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


def test_partial_fit_keeps_one_optimizer() -> None:
    names = np.array(["b", "c", "a"])
    model, other, rule = MLP([5, 8, 3]), MLP([5, 8, 3], classes=["a", "b", "c"]), Adam()
    order = np.argsort(Y, kind="stable")  # the first part lacks classes
    for part in np.array_split(order, 4):
        assert model.partial_fit(X[part], names[Y[part]], classes=names) is model
        other.fit(X[part], names[Y[part]], 1, optimizer=rule)
    assert same(model, other)
    indices = MLP([5, 8, 3])
    indices.partial_fit(X[:5], Y[:5], classes=[0, 1, 2], sample_weight=np.ones(5))
    assert indices.classes is None
    assert indices.steps == 1


def test_summary() -> None:
    lines = MLP([784, 1000, 1], "gelu", "sigmoid").summary().splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["1", "784", "1,000", "gelu", "785,000"],
        ["2", "1,000", "1", "sigmoid", "1,001"],
        ["total", "786,001"],
    ]
    assert len({len(line) for line in lines}) == 1
