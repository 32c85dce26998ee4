"""Cases of Thinc: the same training step, with its own ops and with gemmlet's under the same code."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from .case import Array, Case, Prepared, Settings
from .implementations import OURS
from .training import ADAM_BETAS, ADAM_EPS, ADAM_LR, LAYERS, mlp_flops, numpy_rule

CHECKED_STEPS = 5


@dataclass(frozen=True)
class Task:
    """A mini-batch, and the first weights (outputs, inputs) and biases of two layers."""

    x: Array
    y: Array  # one-hot rows
    parameters: list[Array]


def _task(batch: int) -> Task:
    rng = np.random.default_rng(0)
    parameters = []
    for before, after in pairwise(LAYERS):
        parameters += [rng.normal(0, before**-0.5, (after, before)).astype("f"), np.zeros(after, "f")]
    return Task(
        rng.random((batch, LAYERS[0]), dtype="f"),
        np.eye(LAYERS[-1], dtype="f")[rng.integers(10, size=batch)],
        parameters,
    )


def _prepared(step: Callable[[], object], parameters: Callable[[], list[Array]]) -> Prepared:
    def result() -> list[Array]:
        for _ in range(CHECKED_STEPS):
            step()
        return parameters()

    return Prepared(step, result)


@contextmanager
def _current(ops: Any) -> Iterator[None]:
    from thinc import api

    before = api.get_current_ops()
    api.set_current_ops(ops)
    try:
        yield
    finally:
        api.set_current_ops(before)


def _on_ops(ops: Any, t: Task) -> Prepared:
    """The step as Thinc's users write it, on these ops."""
    from thinc import api

    with _current(ops):
        model = api.chain(api.Relu(nO=LAYERS[1]), api.Softmax())
        model.initialize(X=t.x, Y=t.y)
    places = [(layer, name) for layer in model.layers for name in ("W", "b")]
    for (layer, name), array in zip(places, t.parameters, strict=True):
        layer.set_param(name, array.copy())
    optimizer = api.Adam(ADAM_LR, beta1=ADAM_BETAS[0], beta2=ADAM_BETAS[1], eps=ADAM_EPS)

    def step() -> None:
        with _current(ops):
            predicted, backprop = model.begin_update(t.x)
            backprop(predicted - t.y)
            model.finish_update(optimizer)

    return _prepared(step, lambda: [layer.get_param(name) for layer, name in places])


def _gemmlet(t: Task) -> Prepared:
    from ..integrations.thinc import GemmletOps

    return _on_ops(GemmletOps(), t)


def _thinc(t: Task) -> Prepared:
    from thinc.api import NumpyOps

    return _on_ops(NumpyOps(), t)


def _numpy(t: Task, dtype: str = "float32") -> Prepared:
    """The same by hand: gradients clipped to a norm of 1 and averages, too, as by default in Thinc."""
    x, y = t.x.astype(dtype), t.y.astype(dtype)
    parameters = [p.astype(dtype) for p in t.parameters]
    averages = [np.zeros_like(p) for p in parameters]
    updates = [numpy_rule("adam", p) for p in parameters]
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        w0, b0, w1, b1 = parameters
        hidden = np.maximum(x @ w0.T + b0, 0)
        logits = hidden @ w1.T + b1
        grad = np.exp(logits - logits.max(axis=1, keepdims=True))
        grad /= grad.sum(axis=1, keepdims=True)
        grad -= y
        below = (grad @ w1) * (hidden > 0)
        below @ w0  # the gradient of the input, which Thinc's layers return
        beta1, beta2 = ADAM_BETAS
        rate = ADAM_LR * math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        gain = 1 - min((1 + steps) / (10 + steps), 0.9999)
        gradients = below.T @ x, below.sum(axis=0), grad.T @ hidden, grad.sum(axis=0)
        for p, g, average, update in zip(parameters, gradients, averages, updates, strict=True):
            if (norm := float(np.linalg.norm(g))) >= 1:
                g /= norm
            update(g, (rate, beta1, beta2, 1 - beta1, 1 - beta2, ADAM_EPS, 1.0, 0.0, 1.0))
            average += gain * (p - average)

    return _prepared(step, lambda: parameters)


def _exact(t: Task) -> list[Array]:
    found: list[Array] = _numpy(t, "float64").result()
    return found


def thinc(settings: Settings) -> Iterator[Case]:
    """Step of Thinc's ``chain(Relu(128), Softmax())`` with Adam."""
    if importlib.util.find_spec("thinc") is None:
        return
    for batch in (1, 64):
        yield Case(
            "thinc",
            f"step {'-'.join(map(str, LAYERS))} relu, batch {batch}, Adam, float32",
            partial(_task, batch),
            {OURS: _gemmlet, "thinc": _thinc, "numpy": _numpy},
            _exact,
            rtol=0.0,
            atol=1e-5,
            flops=batch * (mlp_flops(LAYERS) + 2.0 * LAYERS[0] * LAYERS[1]),  # with the gradient of the input
            bytes=4.0 * 6 * sum(p.size for p in _task(1).parameters),
            unit="step",
            labels={"dtype": "float32", "batch": batch},
        )
