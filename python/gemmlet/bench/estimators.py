"""Cases of scikit-learn's `MLPClassifier`, as it is and with gemmlet under it.

Both sides are given the same floating-point images, by the same arguments: Adam, mini-batches of 200.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .case import Array, Case, Prepared, Settings
from .implementations import OURS
from .training import digits, matmul_flops, mlp_flops

BATCH = 200
# The hidden layers, and the epochs of a fit: what it does once weighs as little as in fits that go on to convergence.
EPOCHS = {(100,): 10, (256, 128): 5, (512, 512): 3}
FITTED, PREDICTED = 12_000, 10_000
# What is checked: the loss curve of a shorter fit.
CHECKED, CHECKED_EPOCHS = 2_000, 2


class Task(NamedTuple):
    """The hidden layers, images and labels."""

    hidden: tuple[int, ...]
    x: Array
    labels: Array


def _classifier(implementation: str) -> Any:
    name = "gemmlet.integrations.sklearn" if implementation == OURS else "sklearn.neural_network"
    return importlib.import_module(name).MLPClassifier


def _fitted(implementation: str, t: Task, epochs: int) -> Any:
    model = _classifier(implementation)(t.hidden, batch_size=BATCH, max_iter=epochs, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return model.fit(t.x, t.labels)


def _fit(implementation: str, t: Task) -> Prepared:
    """Return the fit of a new network; its loss curve is checked."""
    return Prepared(partial(_fitted, implementation, t, EPOCHS[t.hidden]), lambda: _loss_curve(implementation, t))


def _loss_curve(implementation: str, t: Task) -> Array:
    checked = t._replace(x=t.x[:CHECKED], labels=t.labels[:CHECKED])
    return np.array(_fitted(implementation, checked, CHECKED_EPOCHS).loss_curve_)


def _predict(implementation: str, t: Task) -> Any:
    """Return predictions of a network that scikit-learn has fitted for a moment."""
    model = _classifier(implementation)()
    vars(model).update(vars(_fitted("scikit-learn", Task(t.hidden, t.x[:1000], t.labels[:1000]), 1)))
    return partial(model.predict_proba, t.x)


def _exact_loss_curve(t: Task) -> Array:
    return _loss_curve("scikit-learn", t._replace(x=t.x.astype(np.float64)))


def _exact_probabilities(t: Task) -> Array:
    model = _predict("scikit-learn", t).func.__self__
    for parameters in (model.coefs_, model.intercepts_):
        parameters[:] = [p.astype(np.float64) for p in parameters]
    found: Array = model.predict_proba(t.x.astype(np.float64))
    return found


def _case(settings: Settings, kind: str, hidden: tuple[int, ...], dtype: str, count: int) -> Case:
    def inputs() -> Task:
        images, labels = digits(settings, count)
        return Task(hidden, images.reshape(count, -1).astype(dtype) / np.dtype(dtype).type(255), labels)

    fits, layers = kind == "fit", (784, *hidden, 10)
    make = _fit if fits else _predict
    widths = "-".join(map(str, layers))
    return Case(
        "sklearn",
        f"{kind} {widths} relu, {f'adam, batch {BATCH}, ' if fits else ''}{count:,} images, {dtype}",
        inputs,
        {name: partial(make, name) for name in (OURS, "scikit-learn")},
        _exact_loss_curve if fits else _exact_probabilities,
        rtol=(1e-4 if dtype == "float32" else 1e-9) if fits else 0.0,
        atol=0.0 if fits else 1e-5 if dtype == "float32" else 1e-12,
        flops=(mlp_flops(layers) if fits else sum(matmul_flops(layers))) * count,
        bytes=float(count * layers[0] * np.dtype(dtype).itemsize),
        units=EPOCHS[hidden] if fits else 1,
        unit="epoch" if fits else "call",
        labels={"kind": kind, "dtype": dtype, "hidden": "-".join(map(str, hidden))},
    )


def sklearn(settings: Settings) -> Iterator[Case]:
    """`MLPClassifier` on MNIST: an epoch, from fits of three to ten epochs, all of `fit` included; `predict_proba`."""
    if importlib.util.find_spec("sklearn") is None:
        return
    networks = list(EPOCHS)[: 1 if settings.quick else None]
    for kind, count in (("fit", FITTED), ("predict", PREDICTED)):
        for dtype in ("float32",) if settings.quick else ("float32", "float64"):
            for hidden in networks:
                yield _case(settings, kind, hidden, dtype, 1_000 if settings.quick else count)
