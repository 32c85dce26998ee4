"""Cases of gemmlet under PyTorch: a fused step, a gradient and inference by `torch.compile`, an update by an optimizer.

Peers are PyTorch as it is, and compiled by its own backend, inductor, which compiles the loss of a mini-batch. Networks
have tanh. Python's part of a call counts on both sides: a mini-batch is one call of each. "dynamo alone" is what
`torch.compile` costs with a backend that computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from gemmlet.formulas.optimizers import OPTIMIZER_RULES, adam_hyperparameters

from .case import Array, Case, Prepared, Settings
from .implementations import OURS
from .training import (
    ADAM_BETAS,
    ADAM_EPS,
    ADAM_LR,
    LAYERS,
    LR,
    Task,
    digits,
    exact_mlp,
    matmul_flops,
    mlp_flops,
    task,
    torch_layers,
)

_SIZES = ((LAYERS, 1), (LAYERS, 64), (LAYERS, 1024), ((784, 512, 512, 10), 64), ((784, 1024, 1024, 10), 1024))
_RULES = ("sgd", "momentum", "adam")
_DYNAMO = "dynamo alone"


def _inputs(layers: tuple[int, ...], batch: int, rule: str = "sgd", settings: Settings | None = None) -> Task:
    """One mini-batch: dense random samples, or with settings digits."""
    rng = np.random.default_rng(0)
    samples, labels = rng.random((batch, layers[0])).astype(np.float32), rng.integers(0, 10, batch)
    if settings is not None:
        samples, labels = digits(settings, batch)
    return task(layers, samples, labels, batch, "float32", rule=rule)


def _optimizer(package: Any, parameters: Any, rule: str, **settings: Any) -> Any:
    if rule == "adam":
        return package.Adam(parameters, lr=ADAM_LR, betas=ADAM_BETAS, eps=ADAM_EPS, **settings)
    return package.SGD(parameters, lr=LR, momentum=0.9 if rule == "momentum" else 0.0, **settings)


def _arrays(tensors: Any) -> list[Array]:
    return [each.detach().numpy().T.copy() for each in tensors]


def _prepared(t: Task, backend: str | None) -> tuple[Any, Any, Any, Callable[[Any, Any], Any]]:
    """A model, a mini-batch, and the loss of it: as it is, or compiled."""
    import torch

    from gemmlet.integrations.torch import backend as ours

    torch._dynamo.reset()  # each is compiled anew, as in a program of its own
    model = torch_layers(t.layers, t.parameters)

    def loss(x: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(x), labels)

    compiler: Any = ours if backend == OURS else backend
    compiled = loss if backend is None else torch.compile(loss, backend=compiler, dynamic=False)
    return model, torch.from_numpy(t.x), torch.from_numpy(t.labels), compiled


def _step(t: Task, backend: str | None) -> Prepared:
    """Return a step of PyTorch's loop."""
    import torch

    model, x, labels, loss = _prepared(t, backend)
    optimizer = _optimizer(torch.optim, model.parameters(), t.rule)

    def step() -> None:
        optimizer.zero_grad()
        loss(x, labels).backward()
        optimizer.step()

    def result() -> list[Array]:
        step()
        return _arrays(model.parameters())

    return Prepared(step, result)


def _fused_step(t: Task) -> Prepared:
    import torch

    from gemmlet.integrations.torch import fused_step

    model, x, labels, _ = _prepared(t, None)
    optimizer = _optimizer(torch.optim, model.parameters(), t.rule)
    step = fused_step(model, torch.nn.CrossEntropyLoss(), optimizer)

    def result() -> list[Array]:
        step(x, labels)
        return _arrays(model.parameters())

    return Prepared(partial(step, x, labels), result)


def _gradient(t: Task, backend: str | None) -> Prepared:
    """Return forward, loss and backward."""
    model, x, labels, loss = _prepared(t, backend)

    def call() -> None:
        model.zero_grad()
        loss(x, labels).backward()

    def result() -> list[Array]:
        call()
        return _arrays(each.grad for each in model.parameters())

    return Prepared(call, result)


def _inference(t: Task, backend: str | None) -> Prepared:
    """Return the outputs of the network."""
    import torch

    from gemmlet.integrations.torch import backend as ours

    torch._dynamo.reset()
    model, x = torch_layers(t.layers, t.parameters), torch.from_numpy(t.x)
    outputs = model(x).detach()

    def nothing(graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *_: (outputs,)

    compilers: dict[str | None, Any] = {OURS: ours, _DYNAMO: nothing}
    compiler = compilers.get(backend, backend)
    compiled = model if backend is None else torch.compile(model, backend=compiler, dynamic=False)

    def call() -> Any:
        with torch.no_grad():
            return compiled(x)

    return Prepared(call, lambda: [call().numpy()])


def _exact_outputs(t: Task) -> list[Array]:
    y = t.x.astype(np.float64)
    for i in range(0, len(t.parameters), 2):
        y = y @ t.parameters[i].astype(np.float64) + t.parameters[i + 1].astype(np.float64)
        y = np.tanh(y) if i + 2 < len(t.parameters) else y
    return [y]


def _exact_gradient(t: Task) -> list[Array]:
    after = exact_mlp(replace(t, rule="sgd"))
    return [(before - p) / LR for before, p in zip(t.parameters, after, strict=True)]


def _update(t: Task, package: str, **settings: Any) -> Prepared:
    """Return an update of all parameters of the network; their own values stand for gradients."""
    import importlib

    model = torch_layers(t.layers, t.parameters)
    parameters = list(model.parameters())
    for each in parameters:
        each.grad = each.detach().clone()
    optimizer = _optimizer(importlib.import_module(package), parameters, t.rule, **settings)

    def result() -> list[Array]:
        optimizer.step()
        return _arrays(parameters)

    return Prepared(optimizer.step, result)


def _exact_update(t: Task) -> list[Array]:
    name = "adam" if t.rule == "adam" else "sgd"  # the first step with momentum is one without
    numbers = (LR, 0.0) if name == "sgd" else adam_hyperparameters(1, ADAM_LR, *ADAM_BETAS, ADAM_EPS, 0.0, False)
    found = []
    for each in t.parameters:
        p = each.astype(np.float64)
        state = [np.zeros_like(p) for _ in OPTIMIZER_RULES[name].state]
        found.append(OPTIMIZER_RULES[name].apply(p, p, *state, *numbers)[0])
    return found


def cases(settings: Settings) -> Iterator[Case]:
    """Steps, gradients and updates of networks of PyTorch."""

    def case(name: str, layers: tuple[int, ...], batch: int, inputs: Any, made: Any, exact: Any, **labels: Any) -> Case:
        weights = sum(before * after for before, after in pairwise(layers))
        return Case(
            "torch",
            name,
            inputs,
            made,
            exact,
            rtol=1e-5,
            atol=1e-5,
            flops=batch
            * {"update": 0.0, "inference": sum(matmul_flops(layers))}.get(labels["work"], mlp_flops(layers)),
            bytes=4.0 * ((1 if labels["work"] == "inference" else 2) * weights + batch * layers[0]),
            labels={"dtype": "float32", "layers": "-".join(map(str, layers)), "batch": batch, **labels},
        )

    compiled: dict[str, str | None] = {"pytorch": None, "pytorch compiled": "inductor"}
    for layers, batch in _SIZES[:2] if settings.quick else _SIZES:
        name = f"{'-'.join(map(str, layers))}, batch {batch}"
        made = {each: partial(_gradient, backend=backend) for each, backend in {OURS: OURS, **compiled}.items()}
        inputs = partial(_inputs, layers, batch)
        yield case(f"gradient {name}", layers, batch, inputs, made, _exact_gradient, work="gradient")
        made = {each: partial(_inference, backend=backend) for each, backend in {OURS: OURS, **compiled}.items()}
        made[_DYNAMO] = partial(_inference, backend=_DYNAMO)
        yield case(f"inference {name}", layers, batch, inputs, made, _exact_outputs, work="inference")
        for rule, given in (("sgd", None), ("adam", None), ("sgd", settings))[: 3 if batch == 1 else 2]:
            steps: dict[str, Any] = {OURS: _fused_step}
            steps |= {each: partial(_step, backend=backend) for each, backend in compiled.items()}
            data = "dense random" if given is None else "MNIST"
            inputs = partial(_inputs, layers, batch, rule, given)
            named = {"work": "step", "update": rule, "data": data}
            yield case(f"step {name}, {rule}, {data}", layers, batch, inputs, steps, exact_mlp, **named)
    updates = {
        OURS: partial(_update, package="gemmlet.integrations.torch"),
        "pytorch": partial(_update, package="torch.optim"),
        "pytorch fused": partial(_update, package="torch.optim", fused=True),
    }
    for layers in ((64, 32, 10), LAYERS, (784, 1024, 1024, 10))[: 2 if settings.quick else 3]:
        for rule in _RULES:
            name = f"update {'-'.join(map(str, layers))}, {rule}"
            inputs = partial(_inputs, layers, 1, rule)
            yield case(name, layers, 1, inputs, updates, _exact_update, work="update", update=rule)
