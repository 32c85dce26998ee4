"""gemmlet under PyTorch: the results are PyTorch's, and `calls` says who computed them."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import io
import os
import re
import subprocess
import sys
import threading
import types
import unittest
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmlet
from conftest import SPECS, Spec
from gemmlet import kernels
from gemmlet.backends.numpy import NumpyBackend
from gemmlet.formulas.activations import ACTIVATIONS as ACTIVATION_ENTRIES
from gemmlet.formulas.losses import LOSSES as LOSS_ENTRIES
from gemmlet.formulas.losses import ROW_FUNCTIONS, ROW_LOSSES
from support import PATIENCE

torch = pytest.importorskip("torch")
if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("PyTorch is older than 2.13", allow_module_level=True)

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from gemmlet.integrations import torch as integration  # noqa: E402
from gemmlet.integrations.torch import extension, optimizers  # noqa: E402

COMPILED = [spec for spec in SPECS if spec.backend == "cpu" and spec.isa is not None]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(params=COMPILED, ids=str, autouse=True)
def compiled(request: pytest.FixtureRequest) -> Iterator[NumpyBackend]:
    """Each instruction set and number of threads, with `calls` at zero."""
    spec: Spec = request.param
    before = gemmlet.get_num_threads()
    with gemmlet.use_backend(spec.loaded) as loaded:
        loaded.set_num_threads(spec.threads or 1)
        integration.calls.clear()
        torch.manual_seed(0)
        yield loaded
        loaded.set_num_threads(before)


each_isa = pytest.mark.parametrize("compiled", [s for s in COMPILED if s.threads == 1], ids=str, indirect=True)
one_isa = pytest.mark.parametrize("compiled", COMPILED[:1], ids=str, indirect=True)


def assert_close(got: Any, wanted: Any, dtype: Any = torch.float32) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got, wanted, rtol=20 * tolerance, atol=tolerance, check_stride=False, equal_nan=True)


class Wrong:
    """An extension module of which one function computes something else."""

    def __init__(self, module: Any, name: str, wrong: Callable[..., Any]) -> None:
        self._module, self._name, self._wrong = module, name, wrong

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return (lambda *a: self._wrong(found, *a)) if name == self._name else found


def break_kernel(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any]) -> None:
    right = extension.kernels()
    assert right is not None
    broken = extension.Kernels(Wrong(right.module, name, wrong), right.activations, right.losses, right.rules)
    for module in (extension, optimizers, integration.step, integration.dynamo):
        monkeypatch.setattr(module, "kernels", lambda: broken)


# Fused steps.

NETWORKS: dict[str, Callable[[], Any]] = {
    "relu": lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)),
    "deep": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(20, 17),
        nn.GELU(),
        nn.Sequential(nn.Linear(17, 40), nn.Tanh(), nn.Identity()),
        nn.Linear(40, 8),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.0),
        nn.Linear(8, 8),
        nn.Linear(8, 5),
    ),
    "curved": lambda: nn.Sequential(nn.Linear(20, 9), nn.SiLU(), nn.Linear(9, 9), nn.ELU(0.5), nn.Linear(9, 5)),
    "single": lambda: nn.Sequential(nn.Linear(20, 5)),
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.01, "eps": 1e-6}),
}


def classes(rows: int, dtype: Any) -> Any:
    return torch.randint(0, 5, (rows,))


def numbers(rows: int, dtype: Any) -> Any:
    return torch.rand(rows, 5, dtype=dtype)


LOSSES: dict[str, tuple[Any, Any]] = {
    "cross entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), classes),
    "soft labels": (nn.CrossEntropyLoss(), lambda rows, dtype: numbers(rows, dtype).softmax(1)),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), classes),
    "function": (functional.cross_entropy, classes),
    "mse": (nn.MSELoss(), numbers),
    "mse sum": (nn.MSELoss(reduction="sum"), numbers),
    "huber": (nn.HuberLoss(delta=0.3), numbers),
    "smooth l1": (nn.SmoothL1Loss(), numbers),
    "bce with logits": (nn.BCEWithLogitsLoss(), numbers),
}


def eager_step(module: Any, loss: Any, optimizer: Any, x: Any, target: Any) -> Any:
    optimizer.zero_grad()
    value = loss(module(x), target)
    value.backward()
    optimizer.step()
    return value.detach()


def made(name: str, params: Any, package: Any = torch.optim) -> Any:
    kind, settings = OPTIMIZERS[name]
    return getattr(package, kind)(params, **settings)


def train_both(
    network: str = "relu",
    optimizer: str = "sgd",
    loss: str = "cross entropy",
    dtype: Any = torch.float32,
    sizes: tuple[int, ...] = (7, 1, 33, 7),
) -> None:
    """Steps of both, compared after each."""
    module = NETWORKS[network]().to(dtype)
    twin = copy.deepcopy(module)
    ours, theirs = made(optimizer, module.parameters()), made(optimizer, twin.parameters())
    function, target_of = LOSSES[loss]
    step = integration.fused_step(module, function, ours)
    for rows in sizes:
        x, target = torch.randn(rows, 20, dtype=dtype), target_of(rows, dtype)
        assert_close(step(x, target), eager_step(twin, function, theirs, x, target), dtype)
        assert_close(list(module.parameters()), list(twin.parameters()), dtype)
    assert integration.calls == {"fused_step": len(sizes)}
    assert all(param.grad is None for param in module.parameters())
    assert_close(ours.state_dict(), theirs.state_dict(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_step_is_pytorchs_with_every_optimizer(optimizer: str, dtype: Any) -> None:
    train_both(optimizer=optimizer, dtype=dtype)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_fused_step_is_pytorchs_for_every_network(network: str) -> None:
    train_both(network, "adam")


@one_isa
@pytest.mark.parametrize("loss", LOSSES)
def test_a_fused_step_is_pytorchs_with_every_loss(loss: str) -> None:
    train_both(loss=loss)


@one_isa
def test_a_wrong_kernel_is_seen_in_fused_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(train: Any, network: Any, rule: Any, numbers: Any, *rest: Any) -> Any:
        return train(network, rule, [numbers[0] * 1.01, *numbers[1:]], *rest)

    break_kernel(monkeypatch, "torch_train", wrong)
    with pytest.raises(AssertionError):
        train_both()


@one_isa
def test_a_wide_network_and_samples_of_zeros_train_as_in_pytorch() -> None:
    module = nn.Sequential(nn.Linear(700, 520), nn.Tanh(), nn.Linear(520, 10))
    twin, loss = copy.deepcopy(module), nn.CrossEntropyLoss()
    ours, theirs = made("momentum", module.parameters()), made("momentum", twin.parameters())
    step = integration.fused_step(module, loss, ours)
    for rows in (40, 1, 1):
        x = torch.randn(rows, 700) * (torch.rand(rows, 700) < 0.2)
        step._steps = 0  # look at the zeros
        target = torch.randint(0, 10, (rows,))
        assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
        assert step._skip_zeros == (rows == 1)
    assert_close(list(module.parameters()), list(twin.parameters()))
    module[0].weight.data[0, 0] = torch.inf  # a zero would hide it
    x = torch.zeros(1, 700)
    step._steps = 0
    assert step(x, target).isnan()


@one_isa
def test_parameters_stay_where_they_are() -> None:
    module = NETWORKS["deep"]()
    params, before = list(module.parameters()), {k: v.clone() for k, v in module.state_dict().items()}
    step = integration.fused_step(module, nn.CrossEntropyLoss(), torch.optim.Adam(module.parameters(), lr=0.0))
    x, target = torch.randn(8, 4, 5), classes(8, None)
    step(x, target)
    where = [param.data_ptr() for param in params]
    assert_close(dict(module.state_dict()), before)
    step(x, target)
    assert [param.data_ptr() for param in module.parameters()] == where
    assert all(a is b for a, b in zip(params, module.parameters(), strict=True))
    versions = [param._version for param in params]
    step(x, target)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    assert integration.calls == {"fused_step": 3}


@one_isa
def test_the_line_of_the_document_makes_weights_contiguous() -> None:
    module = NETWORKS["relu"]()
    twin, loss = copy.deepcopy(module), nn.CrossEntropyLoss()
    ours, theirs = made("adam", module.parameters()), made("adam", twin.parameters())
    step = integration.fused_step(module, loss, ours)
    for _ in range(3):
        x, target = torch.randn(4, 20), classes(4, None)
        assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
        assert not module[0].weight.is_contiguous()
        line = "for p in model.parameters(): p.data = p.data.contiguous()"
        assert line in (Path(__file__).parents[1] / "docs/torch.md").read_text()
        exec(line, {"model": module})
        assert_close(*(nn.utils.parameters_to_vector(each.parameters()) for each in (module, twin)))
    assert integration.calls == {"fused_step": 3}


@one_isa
def test_a_graph_from_before_a_step_is_refused_by_autograd() -> None:
    module = NETWORKS["relu"]()
    step = integration.fused_step(module, nn.CrossEntropyLoss(), torch.optim.SGD(module.parameters(), lr=0.1))
    x, target = torch.randn(4, 20), classes(4, None)
    step(x, target)
    value = module(x).sum()
    step(x, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@one_isa
@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), r"module\[1\] is BatchNorm1d"),
        (nn.Sequential(nn.Linear(4, 3, bias=False)), r"module\[0\] is Linear"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), r"module\[0\] is ReLU"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Tanh()), r"module\[2\] is Tanh"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Dropout(0.5))), r"module\[1\]\[0\] is Dropout"),
        (nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(-1.0)), r"module\[1\] is LeakyReLU"),
        (nn.Sequential(nn.Identity()), "no Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_module_that_does_not_fit_is_refused_by_name(module: Any, named: str) -> None:
    params = [*module.parameters(), nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match=named):
        integration.fused_step(module, nn.CrossEntropyLoss(), torch.optim.SGD(params, lr=0.1))


@one_isa
def test_a_loss_or_an_optimizer_that_does_not_fit_is_refused() -> None:
    module = NETWORKS["relu"]()
    params = list(module.parameters())
    sgd = torch.optim.SGD(params, lr=0.1)
    for loss in (
        nn.CrossEntropyLoss(weight=torch.ones(5)),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.CrossEntropyLoss(reduction="none"),
        nn.BCELoss(),
        nn.NLLLoss(),
        torch.sum,
    ):
        with pytest.raises(ValueError, match="loss is"):
            integration.fused_step(module, loss, sgd)
    for loss, shown in (
        (nn.CrossEntropyLoss(weight=torch.ones(2)), r"CrossEntropyLoss\(weight=tensor\(\[1., 1.\]\)\)"),
        (nn.SmoothL1Loss(beta=0.5), r"SmoothL1Loss\(beta=0.5\)"),
        (nn.MSELoss(reduction="none"), r"MSELoss\(reduction='none'\)"),
    ):
        with pytest.raises(ValueError, match=f"loss is {shown}, which"):
            integration.fused_step(module, loss, sgd)
    loss = nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match="SGD, Adam or AdamW, got RMSprop"):
        integration.fused_step(module, loss, torch.optim.RMSprop(params))
    with pytest.raises(TypeError, match=r"torch\.nn\.Sequential, got Linear"):
        integration.fused_step(nn.Linear(2, 2), loss, sgd)
    for optimizer, shown in (
        (torch.optim.Adam(params, amsgrad=True), "amsgrad=True"),
        (torch.optim.SGD(params, momentum=0.9, dampening=0.5), "dampening=0.5"),
        (torch.optim.AdamW(params, lr=torch.tensor(0.01)), r"lr=tensor\(0.0100\)"),
    ):
        with pytest.raises(ValueError, match=f"settings that fused_step does not know: {shown}$"):
            integration.fused_step(module, loss, optimizer)
    for groups in (params[:2], [{"params": params[:2]}, {"params": params[2:]}]):
        with pytest.raises(ValueError, match="one group with all parameters"):
            integration.fused_step(module, loss, torch.optim.SGD(groups, lr=0.1))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shares a parameter"):
        integration.fused_step(tied, loss, torch.optim.SGD(tied.parameters(), lr=0.1))


def ignore(*_: Any) -> None:
    """A hook."""


def _half_a_step(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] /= 2
    type(optimizer).step(optimizer)


def _count(optimizer: Any, step: Any) -> None:
    optimizer.step = step
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps it


# What is unusual at the time of a step: a function of module, optimizer, x and target that returns the last two.
UNUSUAL: dict[str, Callable[..., Any]] = {
    "hook of a module": lambda m, o, x, t: (m[0].register_forward_hook(ignore), x, t)[1:],
    "hook of a parameter": lambda m, o, x, t: (m[0].weight.register_hook(lambda g: g * 2), x, t)[1:],
    "hook of a gradient": lambda m, o, x, t: (m[0].bias.register_post_accumulate_grad_hook(ignore), x, t)[1:],
    "hook of the optimizer": lambda m, o, x, t: (o.register_step_post_hook(ignore), x, t)[1:],
    "frozen": lambda m, o, x, t: (m[0].weight.requires_grad_(False), x, t)[1:],
    "forward of its own": lambda m, o, x, t: (setattr(m[1], "forward", torch.tanh), x, t)[1:],
    "ignored class": lambda m, o, x, t: (x, torch.where(torch.arange(len(t)) == 0, -100, t)),
    "sample with a gradient": lambda m, o, x, t: (x.requires_grad_(), t),
    "weight of float64": lambda m, o, x, t: (m.double(), x.double(), t)[1:],
    "negated view": lambda m, o, x, t: (torch.complex(x, x).conj().imag, t),
    "negated weight": lambda m, o, x, t: (setattr(m[0].weight, "data", torch._neg_view(m[0].weight.data)), x, t)[1:],
    "layer that is not known": lambda m, o, x, t: (m.append(nn.Softmax(1)), x, t)[1:],
    "maximize": lambda m, o, x, t: (o.param_groups[0].update(maximize=True), x, t)[1:],
    "own memory": lambda m, o, x, t: (m[0].weight.share_memory_(), x, t)[1:],
    "own step": lambda m, o, x, t: (setattr(o, "step", functools.partial(_half_a_step, o)), x, t)[1:],
    "own step, counted": lambda m, o, x, t: (_count(o, types.MethodType(_half_a_step, o)), x, t)[1:],
    "sparse samples": lambda m, o, x, t: (x.to_sparse(), t),
    "sparse rows": lambda m, o, x, t: (x.to_sparse_csr(), t),
}
FUSED = {"weight of float64"}  # which fits as well


@one_isa
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_is_unusual_at_the_time_is_done_by_pytorch(unusual: str) -> None:
    module = NETWORKS["relu"]()
    twin = copy.deepcopy(module)
    ours, theirs = made("sgd", module.parameters()), made("sgd", twin.parameters())
    loss = nn.CrossEntropyLoss()
    step = integration.fused_step(module, loss, ours)
    x, target = torch.randn(6, 20), classes(6, None)
    results = []
    for each, optimizer, run in ((module, ours, lambda *a: step(*a)), (twin, theirs, None)):
        arguments = UNUSUAL[unusual](each, optimizer, x.clone(), target)
        results.append(run(*arguments) if run else eager_step(each, loss, optimizer, *arguments))
    assert_close(*results, results[0].dtype)
    assert_close(list(module.parameters()), list(twin.parameters()))
    assert integration.calls == {"fused_step" if unusual in FUSED else "fused_step by PyTorch": 1}


@one_isa
def test_a_fused_step_reads_negated_targets_with_their_sign() -> None:
    module = NETWORKS["relu"]()
    twin = copy.deepcopy(module)
    ours, theirs = made("sgd", module.parameters()), made("sgd", twin.parameters())
    loss, x = nn.MSELoss(), torch.randn(6, 20)
    target = torch._neg_view(torch.randn_like(module(x)).detach())
    step = integration.fused_step(module, loss, ours)
    assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
    assert_close(list(module.parameters()), list(twin.parameters()))


@one_isa
def test_autocast_and_other_backends_are_left_to_pytorch() -> None:
    module = NETWORKS["relu"]()
    step = integration.fused_step(module, nn.CrossEntropyLoss(), torch.optim.SGD(module.parameters(), lr=0.1))
    x, target = torch.randn(6, 20), classes(6, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(x, target)
    with gemmlet.use_backend("numpy"):
        step(x, target)
    with torch.no_grad():
        step(x, target)
    assert integration.calls == {"fused_step by PyTorch": 2, "fused_step": 1}
    with pytest.raises((RuntimeError, ValueError)):  # PyTorch's own
        step(x, target[:3])
    with pytest.raises(RuntimeError):
        step(x.double(), target)
    with pytest.raises(IndexError):
        step(x, target + 5)


@one_isa
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_default_device_is_not_asked_for(name: str) -> None:
    module = NETWORKS["relu"]()
    step = integration.fused_step(module, nn.CrossEntropyLoss(), made(name, module.parameters()))
    param = module[0].weight.detach().clone().requires_grad_()
    param.grad = torch.ones_like(param)
    optimizer, x, target = made(name, [param], integration), torch.randn(6, 20), classes(6, None)
    with torch.device("meta"):
        assert step(x, target).device == torch.device("cpu")
        optimizer.step()
    assert integration.calls == {"fused_step": 1, "update": 1}


@one_isa
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_modes_of_pytorch_get_what_they_would(name: str) -> None:
    module = NETWORKS["relu"]()
    before = [param.detach().clone() for param in module.parameters()]
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    step = integration.fused_step(module, nn.CrossEntropyLoss(), made(name, module.parameters()))
    optimizer, x, target = made(name, module.parameters(), integration), torch.randn(6, 20), classes(6, None)
    for function in (optimizer.step, functools.partial(step, x, target)):
        with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(RuntimeError):  # PyTorch's own
            function()
        assert_close([param.detach() for param in module.parameters()], before)
    assert integration.calls == {"fused_step by PyTorch": 1, "update by PyTorch": 1}


@one_isa
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_fused_step_that_is_refused_has_changed_nothing(optimizer: str) -> None:
    module = NETWORKS["relu"]()
    ours = made(optimizer, module.parameters())
    step = integration.fused_step(module, nn.CrossEntropyLoss(), ours)
    x, target = torch.randn(6, 20), classes(6, None)
    before, versions = copy.deepcopy(module.state_dict()), [each._version for each in module.parameters()]
    earlier, memory = module(x).sum(), [each.data_ptr() for each in module.parameters()]
    for each in module.parameters():
        each.grad = torch.ones_like(each)
    refused = [
        (x.numpy(), target, TypeError, r"x must be a torch\.Tensor, got ndarray"),
        (None, target, TypeError, r"x must be a torch\.Tensor, got NoneType"),
        (x, target.tolist(), TypeError, r"target must be a torch\.Tensor, got list"),
        (torch.tensor(1.0), target, RuntimeError, "at least 1D"),
        (x, target + 5, IndexError, "out of bounds"),
        (x, target[:3], ValueError, "batch_size"),
    ]
    for *given, error, message in refused:
        with pytest.raises(error, match=message):
            step(*given)
    assert all((each.grad == 1).all() for each in module.parameters())
    assert [each.data_ptr() for each in module.parameters()] == memory
    with torch.inference_mode(), pytest.raises(RuntimeError, match="does not require grad"):
        step(x, target)
    assert not ours.state
    assert_close(dict(module.state_dict()), dict(before))
    assert [each._version for each in module.parameters()] == versions
    earlier.backward()


@one_isa
@pytest.mark.parametrize("what", ["sample", "target", "range"])
def test_binary_cross_entropy_refuses_what_pytorchs_does(what: str) -> None:
    module = nn.Sequential(nn.Linear(20, 5), nn.Sigmoid())
    before = copy.deepcopy(module.state_dict())
    x, target = torch.randn(6, 20), numbers(6, None)
    (x if what == "sample" else target)[1, 2] = 1.5 if what == "range" else torch.nan
    message = f"all elements of {'input' if what == 'sample' else 'target'} should be between 0 and 1"
    step = integration.fused_step(module, nn.BCELoss(), torch.optim.SGD(module.parameters(), lr=0.1))
    compiled = compile_with_ours(lambda x, target: functional.binary_cross_entropy(module(x), target))
    for function in (step, compiled):
        with pytest.raises(RuntimeError, match=message):
            function(x, target)
    assert_close(dict(module.state_dict()), dict(before))


@one_isa
@pytest.mark.parametrize("which", range(4))
def test_a_parameter_that_is_not_finite_is_refused_with_nothing_changed(which: int) -> None:
    module = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 5), nn.Sigmoid())
    [*module.parameters()][which].data.view(-1)[0] = torch.nan
    before, optimizer = copy.deepcopy(module.state_dict()), made("adam", module.parameters())
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        integration.fused_step(module, nn.BCELoss(), optimizer)(torch.randn(6, 20), numbers(6, None))
    assert not optimizer.state
    assert_close(dict(module.state_dict()), dict(before))


@one_isa
def test_outputs_that_overflow_to_nan_are_refused_by_binary_cross_entropy() -> None:
    module = nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 5), nn.Sigmoid())
    for param, each in zip(module.parameters(), (3e38, 0.0, torch.tensor([1.0, -1.0]), 0.0), strict=True):
        param.data[:] = each
    step = integration.fused_step(module, nn.BCELoss(), made("sgd", module.parameters()))
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):  # PyTorch's own
        step(torch.ones(6, 20), numbers(6, None))
    step(torch.zeros(6, 20), numbers(6, None))
    with pytest.raises(RuntimeError, match="module returns NaN"):
        step(torch.ones(6, 20), numbers(6, None))


@one_isa
def test_layouts_that_do_not_fit_are_brought_into_shape() -> None:
    module = NETWORKS["relu"]()
    twin = copy.deepcopy(module)
    ours, theirs = made("adam", module.parameters()), made("adam", twin.parameters())
    loss = nn.CrossEntropyLoss()
    step = integration.fused_step(module, loss, ours)
    for _ in range(3):
        x, target = torch.randn(20, 12).t()[:, ::1], torch.randint(0, 5, (24,))[::2]
        assert not x.is_contiguous()
        assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
        # As from files: row by row.
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        module[2].weight = nn.Parameter(module[2].weight.detach().clone(memory_format=torch.contiguous_format))
        ours.param_groups[0]["params"][2] = module[2].weight
        ours.state[module[2].weight] = copy.deepcopy(theirs.state[twin[2].weight])
        del ours.state[next(k for k in ours.state if k.shape == (5, 16) and k is not module[2].weight)]
    assert_close(list(module.parameters()), list(twin.parameters()))
    assert integration.calls == {"fused_step": 3}


@one_isa
def test_a_change_of_the_module_counts() -> None:
    module = NETWORKS["curved"]()
    twin = copy.deepcopy(module)
    ours, theirs = made("sgd", module.parameters()), made("sgd", twin.parameters())
    loss = nn.CrossEntropyLoss()
    step = integration.fused_step(module, loss, ours)
    x, target = torch.randn(6, 20), classes(6, None)
    step(x, target), eager_step(twin, loss, theirs, x, target)
    for each in (module, twin):
        each[1] = nn.Tanh()
        each[3].alpha = 0.1
    loss.label_smoothing = 0.3
    for group in (ours.param_groups[0], theirs.param_groups[0]):
        group["lr"] = 0.5
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (ours, theirs)]
    for _ in range(3):
        assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
        for scheduler in schedulers:  # which warns, unless the optimizer has stepped
            scheduler.step()
    assert_close(list(module.parameters()), list(twin.parameters()))
    assert integration.calls == {"fused_step": 4}
    own, module[1] = module[1], nn.Softmax(1)
    step(x, target)
    module[1] = own
    step(x, target)
    assert integration.calls == {"fused_step": 5, "fused_step by PyTorch": 1}
    step.loss, step.module = functional.cross_entropy, twin
    step.optimizer = theirs
    wanted = functional.cross_entropy(twin(x), target)
    assert_close(step(x, target), wanted.detach())
    assert integration.calls == {"fused_step": 6, "fused_step by PyTorch": 1}


@one_isa
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_parameter_that_replaces_another_one_has_a_state_of_its_own(name: str) -> None:
    module = NETWORKS["relu"]()
    twin, loss, x, target = copy.deepcopy(module), nn.CrossEntropyLoss(), torch.randn(6, 20), classes(6, None)
    ours, theirs = made(name, module.parameters()), made(name, twin.parameters())
    step = integration.fused_step(module, loss, ours)
    for number in range(5):
        if number == 2:
            for each, optimizer in ((module, ours), (twin, theirs)):
                each[2].weight = nn.Parameter(torch.ones(5, 16))
                optimizer.param_groups[0]["params"][2] = each[2].weight
        assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
        assert_close(list(module.parameters()), list(twin.parameters()))
        assert module[2].weight in ours.state


WEIGHTED: list[tuple[Callable[[], Any], str, Callable[..., Any]]] = [
    (nn.CrossEntropyLoss, "weight", classes),
    (nn.BCEWithLogitsLoss, "weight", numbers),
    (nn.BCEWithLogitsLoss, "pos_weight", numbers),
    (nn.BCELoss, "weight", numbers),
]


@one_isa
@pytest.mark.parametrize(("kind", "name", "target_of"), WEIGHTED, ids=lambda value: getattr(value, "__name__", value))
def test_a_weight_that_a_loss_is_given_later_is_pytorchs(kind: Any, name: str, target_of: Any) -> None:
    module = nn.Sequential(nn.Linear(20, 5), *([nn.Sigmoid()] if kind is nn.BCELoss else []))
    twin, loss = copy.deepcopy(module), kind()
    ours, theirs = made("sgd", module.parameters()), made("sgd", twin.parameters())
    step = integration.fused_step(module, loss, ours)
    x, target = torch.randn(6, 20), target_of(6, None)
    given = torch.tensor([1.0, 10.0, 0.1, 2.0, 3.0])
    param = nn.Parameter(given, requires_grad=False)  # which is held elsewhere from then on
    for weight in (None, given, None, param, None, param):
        setattr(loss, name, weight)
        assert_close(step(x, target), eager_step(twin, loss, theirs, x, target))
    assert_close(list(module.parameters()), list(twin.parameters()))
    assert integration.calls == {"fused_step": 3, "fused_step by PyTorch": 3}


# Optimizers.


def minimize_both(theirs_of: Any, ours_of: Any, params: list[Any], steps: int = 4) -> tuple[Any, Any]:
    """Steps of both, compared after each."""
    both = [[nn.Parameter(param.clone()) for param in params] for _ in range(2)]
    theirs, ours = theirs_of(both[0]), ours_of(both[1])
    for _ in range(steps):
        grads = [torch.randn_like(param) for param in params]
        for mine in both:
            for param, grad in zip(mine, grads, strict=True):
                param.grad = grad.clone()
        theirs.step()
        ours.step()
        assert_close(both[1], both[0], params[0].dtype)
    assert_close(ours.state_dict(), theirs.state_dict(), params[0].dtype)
    return theirs, ours


def some_params(dtype: Any = torch.float32) -> list[Any]:
    return [torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype).t(), torch.randn(1000, dtype=dtype)]


def of_pytorchs_tests(name: str) -> Any:
    """A module of PyTorch's own tests."""
    # They are based on a package that it does not need here, and does not bring along.
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torch.testing._internal.{name}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_pytorchs(name: str, dtype: Any) -> None:
    def of(package: Any) -> Any:
        return lambda params: made(name, params, package)

    minimize_both(of(torch.optim), of(integration), some_params(dtype))
    assert integration.calls == {"update": 4}


@one_isa
def test_a_wrong_kernel_is_seen_in_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(update: Any, rule: Any, numbers: Any, *rest: Any) -> Any:
        return update(rule, [numbers[0] * 1.01, *numbers[1:]], *rest)

    break_kernel(monkeypatch, "torch_update", wrong)
    with pytest.raises(AssertionError):
        test_optimizers_are_pytorchs("sgd", torch.float32)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("SGD", {"lr": torch.tensor(0.1), "foreach": False}),
    ("SGD", {"fused": True, "momentum": 0.9}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"foreach": True}),
    ("Adam", {"fused": True}),
    ("AdamW", {"differentiable": False, "maximize": True}),
]


@one_isa
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
def test_settings_that_the_kernels_do_not_know_are_pytorchs(kind: str, settings: dict[str, Any]) -> None:
    def of(package: Any) -> Any:
        return lambda params: getattr(package, kind)(params, **settings)

    minimize_both(of(torch.optim), of(integration), some_params())
    known = settings.keys() <= {"fused", "foreach", "momentum"}
    assert integration.calls == {"update" if known else "update by PyTorch": 4}


@one_isa
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers_agree_with_pytorchs_on_the_inputs_of_its_tests(name: str) -> None:
    """All settings and all errors of OptimizerInfo."""
    common = of_pytorchs_tests("common_optimizers")
    theirs, ours = getattr(torch.optim, name), getattr(integration, name)
    (info,) = (each for each in common.optim_db if each.optim_cls is theirs)
    given = [each.kwargs for each in info.optim_inputs_func(device="cpu")]
    if name != "SGD":
        given.append({"betas": (torch.tensor(0.8), torch.tensor(0.95)), "foreach": False})
    for settings in given:
        for dtype in TOLERANCE:
            both = [lambda p, of=of, kw=settings: of(p, **copy.deepcopy(kw)) for of in (theirs, ours)]
            minimize_both(*both, some_params(dtype), steps=3)
    assert integration.calls["update"]
    assert integration.calls["update by PyTorch"]
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        assert error.error_on is common.OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = error.optimizer_error_input.params or [nn.Parameter(torch.zeros(1))]
        raises = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with raises(error.error_type, match=error.error_regex):
            ours(params, **error.optimizer_error_input.kwargs)


@one_isa
def test_parameters_of_many_kinds_are_updated() -> None:
    """Some without a gradient, sparse ones, other layouts and dtypes, groups with settings of their own."""
    for kind in ("SGD", "Adam"):
        both = []
        for package in (torch.optim, integration):
            torch.manual_seed(1)
            groups = [
                {"params": [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]},
                {"params": [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3).double())], "lr": 0.3},
                {"params": [nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))]},
                {"params": [nn.Parameter(torch.randn(4, 4)[::2])]},
                {"params": [nn.Parameter(torch.randn(2, dtype=torch.bfloat16))]},
                {"params": [nn.Parameter(torch.randn(3, 3))], "maximize": True},
            ]
            params = [param for group in groups for param in group["params"]]
            optimizer = getattr(package, kind)(groups, lr=0.1)
            for _ in range(3):
                for param in params[1:]:
                    param.grad = torch.randn_like(param)
                if kind == "SGD":
                    params[1].grad = params[1].grad.to_sparse()
                optimizer.step()
            both.append((params, optimizer.state_dict()))
        assert_close(both[1][0], both[0][0])
        assert both[0][1]["param_groups"] == both[1][1]["param_groups"]
        assert_close(both[1][1]["state"], both[0][1]["state"])
    assert integration.calls["update by PyTorch"] > 0


@one_isa
def test_groups_are_updated_in_their_order() -> None:
    """One that is refused leaves those behind it, and its own state, as they were."""
    for make in (torch.optim.Adam, integration.Adam):
        params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
        optimizer = make([{"params": [each]} for each in params], lr=0.1)
        for each in params:
            each.grad = torch.ones(3)
        params[1].grad = torch.ones(3).to_sparse()
        versions = [each._version for each in params]
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
        assert [bool((each == 1).all()) for each in params] == [False, True, True]
        assert [each._version > before for each, before in zip(params, versions, strict=True)] == [True, False, False]
        assert [*optimizer.state] == params[:1]
        assert len(optimizer.param_groups) == 3


# What may be wrong in an optimizer behind a first step, which is PyTorch's to refuse or to take.
BROKEN: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "counter of inf": ("adam", lambda o, param: o.state[param]["step"].fill_(torch.inf)),
    "counter of nan": ("adam", lambda o, param: o.state[param]["step"].fill_(torch.nan)),
    "no second moments": ("adam", lambda o, param: o.state[param].pop("exp_avg_sq")),
    "no weight decay": ("sgd", lambda o, param: o.param_groups[0].update(weight_decay=None)),
    "no momentum": ("momentum", lambda o, param: o.param_groups[0].update(momentum=None)),
    "no dampening": ("momentum", lambda o, param: o.param_groups[0].update(dampening=None)),
    "rate beyond float32": ("sgd", lambda o, param: o.param_groups[0].update(lr=1e39)),
    "weight decay beyond float32": ("adam", lambda o, param: o.param_groups[0].update(weight_decay=1e39)),
    "rate that is text": ("momentum", lambda o, param: o.param_groups[0].update(lr="0.1")),
    "complex rate": ("sgd", lambda o, param: o.param_groups[0].update(lr=1j)),
    "two weight decays": ("sgd", lambda o, param: o.param_groups[0].update(weight_decay=torch.ones(2))),
    "beta of 1": ("adam", lambda o, param: o.param_groups[0].update(betas=(0.9, 1.0))),
    "three betas": ("adam", lambda o, param: o.param_groups[0].update(betas=(0.9, 0.99, 0.999))),
}


@one_isa
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_in_an_optimizer_is_left_to_pytorch(broken: str) -> None:
    name, breaks = BROKEN[broken]
    module, loss, x, target = NETWORKS["relu"](), nn.CrossEntropyLoss(), torch.randn(6, 20), classes(6, None)
    found = []
    for package, is_fused in ((torch.optim, False), (integration, False), (torch.optim, True)):
        own = copy.deepcopy(module)
        optimizer = made(name, own.parameters(), package)
        step = (
            integration.fused_step(own, loss, optimizer)
            if is_fused
            else functools.partial(eager_step, own, loss, optimizer)
        )
        step(x, target)
        breaks(optimizer, own[0].weight)
        error = None
        try:
            step(x, target)
        except (TypeError, KeyError, ValueError, RuntimeError) as refused:
            error = type(refused), str(refused)
        found.append((error, [param.detach() for param in own.parameters()]))
    for error, params in found[1:]:
        assert error == found[0][0]
        assert_close(params, found[0][1])


@one_isa
@pytest.mark.parametrize("shared", ["parameter", "counter"])
def test_steps_are_counted_where_parameters_share_a_counter(shared: str) -> None:
    found = []
    for make in (torch.optim.Adam, integration.Adam):
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        given = [params[0]] * 2 if shared == "parameter" else params
        with pytest.warns(UserWarning, match="duplicate") if shared == "parameter" else contextlib.nullcontext():
            optimizer = make(given, lr=0.1)
        for number in range(3):
            for each in params:
                each.grad = torch.full((3,), 1.0 + number)
            optimizer.step()
            optimizer.state[given[1]]["step"] = optimizer.state[given[0]]["step"]
        found.append(([each.detach() for each in params], optimizer.state_dict()["state"]))
    assert_close(*found)


@one_isa
def test_parameters_from_the_inference_mode_are_refused_and_left() -> None:
    with torch.inference_mode():
        module = NETWORKS["relu"]()
    params, before = list(module.parameters()), copy.deepcopy(module.state_dict())
    for optimizer in (made("adam", params), made("adam", params, integration)):
        step = integration.fused_step(module, nn.CrossEntropyLoss(), optimizer)
        with pytest.raises(RuntimeError, match="Inference tensors"):
            step(torch.randn(6, 20), classes(6, None))
        assert not optimizer.state
    assert_close(dict(module.state_dict()), dict(before))
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):  # and PyTorch has changed it by then
        made("adam", params, integration).step()


@one_isa
def test_negated_gradients_and_states_are_read_with_their_sign() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch._neg_view(torch.ones(3))
    integration.SGD([param], lr=1.0).step()
    assert_close(param.detach(), torch.ones(3))
    theirs, mine = (make([nn.Parameter(torch.zeros(3))], lr=0.1) for make in (torch.optim.Adam, integration.Adam))
    for optimizer in (theirs, mine):
        (own,) = optimizer.param_groups[0]["params"]
        for _ in range(2):
            own.grad = torch.ones(3)
            optimizer.step()
            optimizer.state[own]["exp_avg"] = torch._neg_view(optimizer.state[own]["exp_avg"])
    assert_close(mine.param_groups[0]["params"][0], theirs.param_groups[0]["params"][0])


@one_isa
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_counter_of_steps_has_pytorchs_dtype(default: Any) -> None:
    found = []
    torch.set_default_dtype(default)
    try:
        for make in (torch.optim.Adam, integration.Adam):
            param = nn.Parameter(torch.zeros(3, dtype=torch.float32))
            param.grad = torch.ones_like(param)
            optimizer = make([param])
            optimizer.step()
            found.append(optimizer.state[param]["step"].dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0] is found[1]


@one_isa
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_are_interchangeable(name: str) -> None:
    """Files of each go on in the other."""
    results = []
    for first, second in ((torch.optim, integration), (integration, torch.optim), (torch.optim, torch.optim)):
        torch.manual_seed(2)
        params = [nn.Parameter(param) for param in some_params()]
        optimizer = made(name, params, first)
        for package in (None, second):
            if package is not None:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = made(name, params, package)
                optimizer.load_state_dict(torch.load(file))
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
        results.append(params)
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])
    assert integration.calls == {"update": 6}


@one_isa
def test_hooks_closures_schedulers_and_profiles_of_optimizers_work() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = integration.SGD([param], lr=0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    seen: list[str] = []
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    version = param._version
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]
    assert param._version > version
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert any(event.name == "Optimizer.step#SGD.step" for event in profile.events())
    assert integration.calls == {"update": 3}
    # The same where PyTorch computes: once.
    with gemmlet.use_backend("numpy"):
        optimizer.step()
    assert seen == ["before", "after"] * 3
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == pytest.approx(0.01)


@one_isa
def test_updates_agree_with_numpy() -> None:
    """Not by PyTorch's own optimizer: the formula, in float64."""
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = integration.SGD([param], lr=0.5)
    param.grad = torch.tensor([0.5, 0.25])
    optimizer.step()
    np.testing.assert_array_equal(param.detach().numpy(), [0.75, -2.125])


# torch.compile.


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_with_ours(function: Any, **settings: Any) -> Any:
    return torch.compile(function, backend=integration.backend, **settings)


def outcome(function: Any, module: Any, inputs: list[Any]) -> list[Any]:
    """The results, and all gradients."""
    own = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
    module.zero_grad()
    result = function(*own)
    results = list(result) if isinstance(result, tuple) else [result]
    scalar = sum(each.sum() * (i + 2) for i, each in enumerate(results))
    if scalar.requires_grad:
        scalar.backward()
    grads = [each.grad for each in (*own, *module.parameters())]
    return [each.detach() for each in results] + [torch.zeros(()) if grad is None else grad for grad in grads]


def compare(function: Any, module: Any, *inputs: Any, dtype: Any = torch.float32, **settings: Any) -> Any:
    """The compiled function does what the function does; it is returned."""
    ours = compile_with_ours(function, **settings)
    for given in inputs:
        assert_close(outcome(ours, module, list(given)), outcome(function, module, list(given)), dtype)
    return ours


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.3),
    nn.ELU(0.7),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Softplus(),
    nn.Tanh(),
    nn.Sigmoid(),
]


@each_isa
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_compiled_chains_are_eagers(dtype: Any) -> None:
    layers = [layer for activation in ACTIVATIONS for layer in (nn.Linear(9, 9), activation)]
    module = nn.Sequential(*layers, nn.Linear(9, 5, bias=False)).to(dtype)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    target = torch.randint(0, 5, (7,))
    x = torch.randn(7, 9, dtype=dtype, requires_grad=True)
    compare(lambda x: loss(module(x), target), module, [x], [x.detach()], dtype=dtype)
    assert integration.calls == {"forward": 2, "backward": 2}
    compare(module, module, [x], [torch.randn(2, 3, 9, dtype=dtype)], [torch.randn(9, dtype=dtype)], dtype=dtype)
    assert integration.calls == {"forward": 5, "backward": 5}


@one_isa
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_each_activation_may_be_the_last(activation: Any) -> None:
    module = nn.Sequential(nn.Linear(6, 4), activation)
    compare(module, module, [torch.randn(5, 6, requires_grad=True)])
    assert integration.calls == {"forward": 1, "backward": 1}


@one_isa
def test_a_wrong_kernel_is_seen_in_compiled_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(backward: Any, *arguments: Any) -> Any:
        return [None if grad is None else grad * 1.01 for grad in backward(*arguments)]

    break_kernel(monkeypatch, "torch_backward", wrong)
    with pytest.raises(AssertionError):
        test_compiled_chains_are_eagers(torch.float32)


COMPILED_LOSSES: dict[str, tuple[Any, Any]] = {
    **LOSSES,
    "bce": (lambda p, t: functional.binary_cross_entropy(torch.sigmoid(p), t), numbers),
    "none": (lambda p, t: functional.mse_loss(p, t, reduction="none").sum(), numbers),
    "ignored": (nn.CrossEntropyLoss(), lambda rows, _: torch.tensor([1, -100, 2] * rows)[:rows]),
    "broadcast": (lambda p, t: functional.mse_loss(p, t.expand(p.shape)), lambda rows, _: torch.rand(1, 5)),
    "weight": (nn.CrossEntropyLoss(weight=torch.rand(5)), classes),
    "target with a gradient": (nn.MSELoss(), lambda rows, _: torch.rand(rows, 5).requires_grad_()),
    "scaled": (lambda p, t: 3 * functional.cross_entropy(p, t) + p.sum(), classes),
}


@one_isa
@pytest.mark.parametrize("loss", COMPILED_LOSSES)
def test_compiled_losses_are_eagers(loss: str) -> None:
    module = NETWORKS["relu"]()
    function, target_of = COMPILED_LOSSES[loss]
    target = target_of(6, torch.float32)
    x = torch.randn(6, 20)
    if target.is_floating_point():
        compare(lambda x, target: function(module(x), target), module, [x, target])
    else:
        compare(lambda x: function(module(x), target), module, [x])
    left = {"forward by PyTorch": 1} if loss in ("ignored", "target with a gradient") else {"forward": 1, "backward": 1}
    assert integration.calls == left


class Branched(nn.Module):
    """Parts of which others read, in place changes, and what the backend does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Any) -> Any:
        hidden = self.a(x).relu()
        left = torch.tanh(self.b(hidden))
        right = self.norm(self.b(hidden))  # the same weights
        right.add_(1.0)
        both = left + right + x
        both = torch.sin(both)
        y = functional.linear(both, self.c.weight * 2, self.c.bias)
        return y.sigmoid(), hidden


@one_isa
def test_the_rest_of_a_graph_runs_as_it_is() -> None:
    module = Branched()
    compare(module, module, [torch.randn(5, 8, requires_grad=True)], [torch.randn(5, 8)])
    assert integration.calls == {"forward": 8, "backward": 8}


@one_isa
def test_what_a_chain_reads_may_be_changed_before_and_behind_it() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 3)
    module = nn.ModuleList([first, second])

    def function(x: Any, scale: Any) -> Any:
        hidden = first(x)
        scaled = second.weight * scale
        y = functional.linear(hidden.relu(), scaled)
        scaled.mul_(2.0)
        return y, scaled

    with torch.no_grad():
        compare(function, module, [torch.randn(4, 6), torch.tensor(2.0)])

        def between(x: Any, weight: Any) -> Any:
            hidden = functional.linear(x, weight)
            weight.mul_(2.0)
            return functional.linear(hidden, weight)

        compare(between, module, [torch.randn(4, 6), torch.randn(6, 6)])
    function_of_relu = lambda x: (functional.linear(functional.relu(x, inplace=True), first.weight), x)  # noqa: E731
    with torch.no_grad():
        compare(function_of_relu, module, [torch.randn(4, 6)])


@one_isa
@pytest.mark.parametrize("activation", [nn.Identity(), *ACTIVATIONS], ids=str)
def test_results_may_be_changed_in_place_where_those_of_eager_may(activation: Any) -> None:
    module = nn.Sequential(nn.Linear(6, 4), activation)
    compiled = compile_with_ours(module)
    found: list[Any] = []
    for function in (compiled, module):
        x = torch.ones(5, 6, requires_grad=True)
        y = function(x)
        y *= 2
        try:
            y.sum().backward()
            found.append(x.grad)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            found.append(True)
    assert_close(*found)
    assert integration.calls["forward"] == 1


@one_isa
def test_batch_sizes_may_change() -> None:
    module = NETWORKS["deep"]()
    loss = nn.CrossEntropyLoss()
    sizes = [[torch.randn(rows, 20), torch.randint(0, 5, (rows,))] for rows in (4, 9, 3, 1, 0, 100)]
    compiled = compile_with_ours(lambda x, t: loss(module(x), t))
    for x, target in sizes:
        assert_close(
            outcome(lambda x, target=target: compiled(x, target), module, [x]),
            outcome(lambda x, target=target: loss(module(x), target), module, [x]),
        )
    assert integration.calls["forward"] == 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@one_isa
def test_layouts_and_dtypes_that_are_unusual_are_right() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    module[0].weight = nn.Parameter(torch.randn(6, 6).t())
    module[2].weight = nn.Parameter(torch.randn(8, 12)[::2, ::2])
    wide = torch.randn(8, 10)
    for x in (wide[:, ::2][:, :5].new_zeros(3, 6), wide.t()[:, :6], wide[::2, 2:8], torch.randn(1, 6).expand(5, 6)):
        compare(module, module, [x])
    assert integration.calls == {"forward": 4, "backward": 4}
    compare(module, module, [torch.randn(6, 3, 5).transpose(0, 2)])
    assert integration.calls["forward by PyTorch"] == 1
    half = copy.deepcopy(module).bfloat16()
    compare(half, half, [torch.randn(3, 6).bfloat16()])
    meta = copy.deepcopy(module).to("meta")
    assert compile_with_ours(meta)(torch.empty(3, 6, device="meta")).shape == (3, 4)
    assert integration.calls["forward"] == 4


@one_isa
def test_gradients_of_some_inputs_alone() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    params = list(module.parameters())
    for frozen in ([0], [0, 1], [2], [1, 3, 5], [0, 1, 2, 3], [4, 5], [0, 1, 2, 3, 4, 5]):
        for i, param in enumerate(params):
            param.requires_grad_(i not in frozen)
        for needs in (False, True):
            compare(module, module, [torch.randn(4, 6, requires_grad=needs)])
    assert set(integration.calls) == {"forward", "backward"}


@one_isa
def test_without_gradients_nothing_is_kept() -> None:
    module = NETWORKS["relu"]()
    compiled = compile_with_ours(module)
    x = torch.randn(3, 20)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = compiled(x)
            assert not y.requires_grad
            assert_close(y, module(x))
    assert compiled(x).requires_grad
    with torch.inference_mode():
        inside = torch.randn(3, 20)
        assert_close(compiled(inside), module(inside))
    assert integration.calls == {"forward": 4}


@one_isa
def test_autocast_is_pytorchs() -> None:
    module = NETWORKS["relu"]()
    compiled = compile_with_ours(module)
    x = torch.randn(3, 20)
    compiled(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    assert integration.calls == {"forward": 1}

    def inside(x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        with torch.no_grad():
            return y, module(x)

    y, z = compile_with_ours(inside)(x)
    assert y.dtype == torch.bfloat16
    assert y.requires_grad
    assert not z.requires_grad


@one_isa
def test_a_second_derivative_is_right() -> None:
    module = NETWORKS["curved"]().double()

    def eager(x: Any) -> Any:
        return functional.mse_loss(module(x), torch.ones_like(x[:, :5]))

    compiled = compile_with_ours(eager)
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    penalties = []
    for function in (compiled, eager):
        module.zero_grad()
        (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
        (slope.square().sum() + function(x)).backward()
        penalties.append([slope.detach(), x.grad.clone(), *(param.grad for param in module.parameters())])
        x.grad = None
    assert_close(penalties[0], penalties[1], torch.float64)
    assert torch.autograd.gradcheck(compiled, x)
    assert torch.autograd.gradgradcheck(compiled, x)
    assert integration.calls["backward by PyTorch"] > 0


@one_isa
def test_gradients_accumulate_and_graphs_can_be_kept() -> None:
    module = NETWORKS["relu"]()
    compiled = compile_with_ours(module)
    x = torch.randn(3, 20)
    grads = []
    for function in (compiled, module):
        module.zero_grad()
        value = function(x).square().sum()
        value.backward(retain_graph=True)
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()
        function(x)[0, 0].backward()
        grads.append([param.grad for param in module.parameters()])
    assert_close(*grads)


@one_isa
def test_hooks_see_what_they_see_in_eager() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    seen: list[Any] = []
    module[0].weight.register_hook(lambda grad: grad * 2)
    module[1].register_forward_hook(lambda m, inputs, output: output * 3)
    module[2].bias.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    compare(module, module, [torch.randn(4, 6, requires_grad=True)])
    assert_close(seen[0], seen[1])
    packed: list[Any] = []
    x = torch.randn(4, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t.clone()):
        compare(module, module, [x])
    assert packed


@one_isa
def test_chains_are_computed_again_by_checkpoints() -> None:
    module = NETWORKS["curved"]()

    def again(function: Any) -> Any:
        return lambda x: checkpoint.checkpoint(function, x, use_reentrant=False)

    x = torch.randn(4, 20, requires_grad=True)
    ours, theirs = (outcome(again(each), module, [x]) for each in (compile_with_ours(module), module))
    assert_close(ours, theirs)
    assert integration.calls == {"forward": 2, "backward": 1}


@one_isa
@pytest.mark.parametrize("negated", range(3))
def test_compiled_chains_read_negated_tensors_with_their_sign(negated: int) -> None:
    inputs = [torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)]
    inputs[negated] = torch._neg_view(inputs[negated])
    function = lambda *a: torch.relu(functional.linear(*a))  # noqa: E731
    assert_close(compile_with_ours(function)(*inputs), function(*inputs))


@one_isa
def test_compiled_chains_read_negated_gradients_with_their_sign() -> None:
    found = []
    for wrap in (compile_with_ours, lambda function: function):
        torch.manual_seed(1)
        x, weight = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
        out = wrap(lambda x, w: functional.linear(x, w))(x, weight)
        found += torch.autograd.grad(out, weight, torch._neg_view(torch.ones(4, 5)))
    assert_close(*found)


@one_isa
@pytest.mark.parametrize("function", [torch.tanh, functional.gelu], ids=["tanh", "gelu"])
def test_biases_may_change_before_a_second_derivative(function: Any) -> None:
    def network(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, w3: Any, b3: Any) -> Any:
        return functional.linear(functional.linear(function(functional.linear(x, w1, b1)), w2, b2).relu(), w3, b3)

    found = []
    for wrap in (compile_with_ours, lambda function: function):
        torch.manual_seed(1)
        shapes = (4, 6), (5, 6), (5,), (5, 5), (5,), (3, 5), (3,)
        x, w1, b1, w2, b2, w3, b3 = tensors = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes
        ]
        out = wrap(network)(*tensors)
        with torch.no_grad():
            for b in (b1, b2, b3):
                b.add_(1)
        grads = torch.autograd.grad(out.square().sum(), (x, w1), create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in grads), (x, w1, b1, w2, b2, w3)))
    assert_close(*found, dtype=torch.float64)


@one_isa
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_biases_may_change_before_a_gradient_that_pytorch_computes(is_frozen: bool) -> None:
    found = []
    for wrap in (compile_with_ours, lambda function: function):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        out = wrap(module)(torch.randn(4, 6))
        with torch.no_grad():
            module[0].bias.add_(1)
        module[0].bias.requires_grad_(not is_frozen)
        out.backward(torch._neg_view(torch.ones(4, 3)))
        found.append([param.grad for param in module.parameters() if param.grad is not None])
    assert_close(*found)
    assert integration.calls == {"forward": 1, "backward by PyTorch": 1}


@one_isa
@pytest.mark.parametrize("by", ["gemmlet", "PyTorch"])
def test_a_head_is_trained_behind_what_the_inference_mode_made(by: str) -> None:
    with torch.inference_mode():
        x, first = torch.randn(4, 6), nn.Linear(6, 5).requires_grad_(False)
    module = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))
    grad = torch.ones(4, 3) if by == "gemmlet" else torch._neg_view(torch.ones(4, 3))
    params = list(module[2].parameters())
    assert_close(*(torch.autograd.grad(f(x), params, grad) for f in (compile_with_ours(module), module)))
    assert integration.calls == {"forward": 1, "backward" if by == "gemmlet" else "backward by PyTorch": 1}


@one_isa
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "first layer frozen"])
@pytest.mark.parametrize("loss", ["mse_loss", "cross_entropy", "itself"])
def test_a_loss_that_is_kept_does_not_hold_samples_or_targets(loss: str, is_frozen: bool) -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    module[0].requires_grad_(not is_frozen)

    def function(x: Any, target: Any) -> Any:
        return functional.mse_loss(module(x), x) if loss == "itself" else getattr(functional, loss)(module(x), target)

    for each in (compile_with_ours(function), function):
        x, target = torch.randn(4, 6), torch.randn(4, 6) if loss == "mse_loss" else torch.arange(4)
        value = each(x, target)
        value.backward(retain_graph=True)
        value.backward()
        held = weakref.ref(x), weakref.ref(target)
        del x, target
        assert [tensor() for tensor in held] == [None, None]
        assert value.requires_grad
    assert integration.calls == {"forward": 1, "backward": 2}


@one_isa
@pytest.mark.parametrize("loss", ["mse_loss", "cross_entropy"])
def test_targets_that_are_changed_before_backward_are_seen_as_in_eager(loss: str) -> None:
    module = nn.Linear(6, 5)
    function = lambda x, target: getattr(functional, loss)(module(x), target)  # noqa: E731
    for each in (compile_with_ours(function), function):
        target = torch.randn(4, 5) if loss == "mse_loss" else torch.arange(4)
        value = each(torch.randn(4, 6), target)
        target.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@one_isa
def test_changes_between_forward_and_backward_are_seen_as_in_eager() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    compiled = compile_with_ours(module)
    for change, is_error in (
        (lambda x: x.add_(1), True),
        (lambda x: module[2].weight.data.add_(1), False),  # hidden from autograd
        (lambda x: torch._foreach_add_([module[2].weight], 1.0), True),
        (lambda x: torch._foreach_add_([module[0].weight], 1.0), False),  # which nobody reads
    ):
        for function in (module, compiled):
            x = torch.randn(4, 6)
            value = function(x).sum()
            with torch.no_grad():
                change(x)
            if is_error:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    value.backward()
            else:
                value.backward()


@one_isa
def test_a_mode_around_backward_sees_its_operators() -> None:
    module, x, seen = NETWORKS["relu"](), torch.randn(6, 20), []
    for function in (module, compile_with_ours(module)):
        loss = function(x).sum()
        with FlopCounterMode(display=False) as mode:
            loss.backward()
        seen.append(mode.get_total_flops())
    assert seen[1] >= seen[0] > 0  # where PyTorch computes a gradient it repeats the forward pass
    assert integration.calls == {"forward": 1, "backward by PyTorch": 1}


@one_isa
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, for the forward mode
def test_transforms_of_functorch_and_forward_mode_are_pytorchs() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(6)
    wanted = torch.func.grad(lambda x: module(x).sum())(x)
    assert_close(compile_with_ours(lambda x: torch.func.grad(lambda x: module(x).sum())(x))(x), wanted)
    rows = torch.randn(4, 6)
    assert_close(compile_with_ours(lambda rows: torch.func.vmap(module)(rows))(rows), module(rows))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        found = [torch.autograd.forward_ad.unpack_dual(f(dual)) for f in (module, compile_with_ours(module))]
        assert_close(found[1].tangent, found[0].tangent)
    # Behind an ordinary call, too, and a level that begins between forward and backward.
    compiled, x = compile_with_ours(module), rows.clone().requires_grad_()
    results = [f(x) for f in (module, compiled)]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        grad = torch.autograd.forward_ad.make_dual(torch.ones(4, 1), torch.ones(4, 1))
        for each in ([f(dual) for f in (module, compiled)], [torch.autograd.grad(y, x, grad)[0] for y in results]):
            theirs, ours = map(torch.autograd.forward_ad.unpack_dual, each)
            assert_close(tuple(ours), tuple(theirs))
    assert integration.calls["forward"] == 1
    params = dict(module.named_parameters())
    call = compile_with_ours(lambda params, x: torch.func.functional_call(module, params, (x,)))
    assert_close(call(params, rows), module(rows))


@one_isa
def test_a_whole_training_is_eagers() -> None:
    module = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5))
    twin = copy.deepcopy(module)
    loss = nn.CrossEntropyLoss()
    compiled = compile_with_ours(lambda x, target: loss(module(x), target))
    ours, theirs = made("adam", module.parameters(), integration), made("adam", twin.parameters())
    for step in range(12):
        x, target = torch.randn(16, 20), classes(16, None)
        for run, optimizer in ((compiled, ours), (lambda x, target: loss(twin(x), target), theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            run(x, target).backward()
            optimizer.step()
        if step == 5:
            module.eval(), twin.eval()
    assert_close(list(module.parameters()), list(twin.parameters()))
    assert integration.calls == {"forward": 6 * 2 + 6, "backward": 6 * 2 + 6, "update": 12}


@one_isa
def test_pytorch_finds_the_backend_by_its_entry_point(tmp_path: Path) -> None:
    """As of an installed package: by its metadata alone."""
    import tomllib

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    entries = tomllib.loads(text)["project"]["entry-points"]["torch_dynamo_backends"]
    info = tmp_path / "entries-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entries\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {value}" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{lines}\n")
    code = """
import sys, torch
assert "gemmlet" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert "gemmlet" not in sys.modules
module = torch.nn.Linear(3, 2)
x = torch.ones(1, 3)
torch.testing.assert_close(torch.compile(module, backend="gemmlet")(x), module(x))
from gemmlet.integrations.torch import calls
assert calls == {"forward": 1}, calls
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "GEMMLET_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr


# Threads.

HOLDS_MEMORY: dict[str, tuple[str, Callable[..., Any]]] = {
    "forward": ("torch_forward", lambda m, x: functools.partial(compile_with_ours(m), x)),
    "backward": ("torch_backward", lambda m, x: compile_with_ours(m)(x).sum().backward),
    "fused_step": (
        "torch_train",
        lambda m, x: functools.partial(integration.fused_step(m, nn.MSELoss(), made("sgd", m.parameters())), x, x),
    ),
    "update": ("torch_update", lambda m, x: made("adam", m.parameters(), integration).step),
}


@one_isa
@pytest.mark.parametrize("what", HOLDS_MEMORY)
def test_a_call_holds_the_memory_of_a_weight_that_gets_another_one(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, made_of = HOLDS_MEMORY[what]
    started = threading.Event()
    break_kernel(monkeypatch, name, lambda right, *given: (started.set(), right(*given))[1])
    module, size = nn.Sequential(nn.Linear(1500, 1500)), (1500, 1500)
    module[0].weight.grad, module[0].bias.grad = torch.zeros(size).t(), torch.zeros(1500)
    x = torch.randn(200, 1500)
    is_held = False
    for _ in range(20):  # it may have ended before this thread comes to look
        array = np.zeros(size, np.float32)
        module[0].weight.data, memory = torch.from_numpy(array).t(), weakref.ref(array)
        del array
        started.clear()
        thread = threading.Thread(target=made_of(module, x))
        thread.start()
        started.wait(PATIENCE)
        module[0].weight.data = torch.zeros(size).t()
        is_held = is_held or memory() is not None
        thread.join()
        assert memory() is None
        if is_held:
            break
    assert is_held


# Python code in the middle of a call.


@one_isa
@pytest.mark.parametrize("size", [16, 256], ids=["short", "long"])
@pytest.mark.parametrize("what", ["torch_forward", "torch_backward"])
def test_a_collection_may_give_tensors_other_memory(what: str, size: int) -> None:
    module, x = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size)), torch.randn(size // 4, size)
    params, garbage = list(module.parameters()), []
    found = extension.kernels()
    assert found is not None
    network = extension.capsule(extension.Network((extension.Activation("tanh"), extension.NONE)), found)
    inputs = x, *params
    made = found.module.torch_forward(network, inputs, True)
    call = {
        "torch_forward": lambda: found.module.torch_forward(network, inputs, True)[0],
        "torch_backward": lambda: found.module.torch_backward(
            network, torch.ones(size // 4, size), inputs, made[1], None, (False, True, True, True, True)
        )[1:],
    }[what]
    wanted = call()

    def swap(*_: Any) -> None:
        for param in params:
            param.data = param.data.clone()
            garbage.extend(torch.full_like(param, torch.nan, requires_grad=False) for _ in range(2))

    threshold = gc.get_threshold()
    gc.freeze()  # what is not there takes no time
    gc.callbacks.append(swap)
    try:
        for count in range(1, 40):  # objects that are made before a collection
            gc.collect(0)
            gc.set_threshold(count)
            got = call()
            gc.set_threshold(*threshold)
            assert_close(got, wanted)
            garbage.clear()
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(swap)
        gc.set_threshold(*threshold)
        gc.unfreeze()


class Recorded(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@one_isa
@pytest.mark.parametrize("what", HOLDS_MEMORY)
def test_a_mode_runs_no_code_in_the_middle_of_a_call(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, made_of = HOLDS_MEMORY[what]
    modes = []

    def run(right: Any, *given: Any) -> Any:
        with Recorded() as mode:
            result = right(*given)
            modes.append(mode)
            torch.ones(1)  # it is on again
        return result

    break_kernel(monkeypatch, name, run)
    module = nn.Sequential(nn.Linear(200, 200))
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    made_of(module, torch.randn(200, 200))()
    assert modes
    assert all(mode.functions == [torch.ones] for mode in modes)


# Operators.


@pytest.fixture(scope="module")
def operators() -> Any:
    importlib.import_module("gemmlet.integrations.torch.operators")
    return torch.ops.gemmlet


def samples_of_operators(dtype: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator that has a gradient."""

    def tensor(*shape: int) -> Any:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    x, probability = tensor(5, 6), torch.rand(5, 6, dtype=dtype, requires_grad=True)
    found: dict[str, list[tuple[Any, ...]]] = {
        "matmul": [(x, tensor(6, 3)), (tensor(6, 5).t(), tensor(6, 3))],
        "linear": [
            (x, tensor(3, 6)),
            (tensor(2, 3, 6), tensor(4, 6), tensor(4), "gelu"),
            (tensor(6), tensor(4, 6).detach(), tensor(4), "leaky_relu", 0.3),
        ],
    }
    for name, entry in ACTIVATION_ENTRIES.items():
        found[name] = [(x,), (tensor(2, 3, 4).transpose(0, 2),), *([(x, 0.3)] if entry.parameter else [])]
    for name in ROW_FUNCTIONS:
        found[name] = [(x,), (tensor(2, 3, 4),)]
    for name, loss in LOSS_ENTRIES.items():
        prediction = probability if loss.unit_interval else x
        found[name] = [(prediction, torch.rand(5, 6, dtype=dtype)), *([(x, x.detach(), 0.3)] if loss.parameter else [])]
    for name in ROW_LOSSES:
        found[name] = [(x, torch.randint(0, 5, (5,))), (x, probability.detach(), 0.1)]
    return found


@one_isa
def test_operators_pass_opcheck(operators: Any) -> None:
    samples = samples_of_operators(torch.float32)
    forward = [name for name in kernels.__all__ if not name.endswith(("_backward", "_update"))]
    assert sorted(samples) == sorted(forward)
    for name, all_arguments in samples.items():
        for arguments in all_arguments[:1]:
            assert set(torch.library.opcheck(getattr(operators, name).default, arguments).values()) == {"SUCCESS"}, name


@one_isa
def test_arguments_of_operators_are_refused_by_name_of_fakes_too(operators: Any) -> None:
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    refused = [
        ("matmul", (x[0], weight.t()), ValueError, r"a has shape \(8,\), b \(8, 4\)"),
        ("matmul", (x[None], weight.t()), ValueError, r"a has shape \(1, 5, 8\), b \(8, 4\)"),
        ("matmul", (x, weight.t().double()), TypeError, r"b has dtype torch\.float64, a torch\.float32"),
        ("linear", (x, weight[:, :3]), ValueError, r"x has shape \(5, 8\), weight \(4, 3\)"),
        ("linear", (torch.tensor(1.0), weight), ValueError, r"x has shape \(\), weight"),
        ("linear", (x, weight, x[0, :2]), ValueError, r"bias has shape \(2,\), expected \(4,\)"),
        ("linear", (x, weight.double()), TypeError, r"weight has dtype torch\.float64"),
        ("linear", (x.bfloat16(), weight.bfloat16()), TypeError, r"float32 or torch\.float64, got torch\.bfloat16"),
    ]
    for name, arguments, error, message in refused:
        for device in ("cpu", "meta"):
            with pytest.raises(error, match=message):
                getattr(operators, name)(*(each.to(device) for each in arguments))
    assert_close(operators.linear(x[:, :0], weight[:, :0], x[0, :4]), x[0, :4].expand(5, 4))


def samples_of_gradients(operators: Any, name: str) -> list[tuple[Any, ...]]:
    """Arguments of an operator's gradient."""
    found: list[tuple[Any, ...]] = []
    for x, *rest in samples_of_operators(torch.float32)[name]:
        y = getattr(operators, name)(x, *rest)
        if name == "linear":
            weight, bias, activation, parameter = (*rest, *(None, "identity", None)[len(rest) - 1 :])
            found.append((y, x, weight, bias, y, activation, parameter, [True, True, True]))
        else:
            found.append((y, x, y, *rest))
    return found


# What does not fit, and some of what does: other tensors, numbers and texts in the place of one.
INSTEAD: dict[type, list[Callable[[Any], Any]]] = {
    torch.Tensor: [
        *(lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool)),
        *(lambda x, at=at: x[at] for at in (np.s_[1:], np.s_[..., 1:], np.s_[None], np.s_[:0])),
        lambda x: x.reshape(-1)[0],
    ],
    float: [lambda _, number=number: number for number in (-1.0, 0.0, 2.0, np.nan, np.inf, 1e300)],
    str: [lambda _: "nope", lambda _: "tanh", lambda _: "elu"],
    list: [lambda _: [True] * 2],
}


def shown(operator: Any, given: list[Any]) -> Any:
    """What an operator returns, but for the values, or the error that it raises."""
    try:
        result = operator(*given)
    except (TypeError, ValueError) as error:
        return error
    results = result if isinstance(result, tuple) else (result,)
    return [(each.shape, each.dtype, each.is_contiguous()) for each in results]


@one_isa
@pytest.mark.parametrize("name", sorted(name for name in kernels.__all__ if not name.endswith("_update")))
def test_fakes_take_and_refuse_what_the_kernels_do(operators: Any, name: str) -> None:
    operator, forward = getattr(operators, name), name.removesuffix("_backward")
    samples = samples_of_operators(torch.float32)[name] if name == forward else samples_of_gradients(operators, forward)
    names = [argument.name for argument in operator.default._schema.arguments]
    refused = set()
    for sample in samples:
        sample = [each.detach() if isinstance(each, torch.Tensor) else each for each in sample]
        for i, each in enumerate(sample):
            for instead in INSTEAD.get(type(each), []):
                given = [*sample[:i], instead(each), *sample[i + 1 :]]
                kernels_own = shown(operator, given)
                fakes = shown(operator, [x.to("meta") if isinstance(x, torch.Tensor) else x for x in given])
                if isinstance(kernels_own, Exception):
                    assert repr(fakes) == repr(kernels_own), names[i]
                    assert str(fakes).split()[0] in names
                    refused.add(i)
                else:
                    assert fakes == kernels_own, names[i]
    assert refused == {i for sample in samples for i, each in enumerate(sample) if type(each) in INSTEAD}


@one_isa
@pytest.mark.parametrize("name", sorted(samples_of_operators(torch.float32)))
def test_operators_have_their_gradients(operators: Any, name: str) -> None:
    for arguments in samples_of_operators(torch.float64)[name]:
        operator = getattr(operators, name)
        is_loss = isinstance(operator(*arguments), tuple)

        def value(*given: Any, operator: Any = operator, is_loss: bool = is_loss) -> Any:
            return operator(*given)[0] if is_loss else operator(*given)

        assert torch.autograd.gradcheck(value, arguments)


# Softplus is missing: all samples have a threshold, beyond which PyTorch's is linear.
# By PyTorch's name of an operator: the function that stands for it, of a sample's arguments; None for samples that it
# does not take.
def _loss_of(parameter: str | None = None) -> Callable[..., Any]:
    def run(operator: Any, prediction: Any, target: Any, **settings: Any) -> Any:
        number = [settings.pop(parameter)] if parameter in settings else []
        fits = settings.pop("reduction", "mean") == "mean" and prediction.shape == target.shape and prediction.numel()
        if not fits or any(each is not None for each in settings.values()):
            return None
        return operator(prediction, target.detach(), *number)[0]

    return run


def _row_function(operator: Any, x: Any, dim: int, dtype: Any = None) -> Any:
    return operator(x) if dim in (-1, x.ndim - 1) and dtype in (None, x.dtype) and x.numel() and x.ndim else None


def _cross_entropy(operator: Any, x: Any, target: Any, **settings: Any) -> Any:
    if settings.pop("reduction", "mean") != "mean" or settings.keys() - {"label_smoothing"} or x.ndim != 2:
        return None
    return operator(x, target.detach(), settings.get("label_smoothing", 0.0))[0]


def _elementwise(operator: Any, x: Any, **settings: Any) -> Any:
    settings.pop("inplace", None)
    return operator(x, *settings.values()) if all(number > 0 for number in settings.values()) else None


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "nn.functional.linear": ("linear", lambda op, *given: op(*given) if given[1].ndim == 2 else None),
    "mm": ("matmul", lambda op, a, b: op(a, b)),
    "nn.functional.relu": ("relu", _elementwise),
    "nn.functional.leaky_relu": ("leaky_relu", _elementwise),
    "nn.functional.elu": ("elu", _elementwise),
    "nn.functional.silu": ("silu", _elementwise),
    "nn.functional.gelu": ("gelu", lambda op, x, approximate: op(x) if approximate == "none" else None),
    "tanh": ("tanh", _elementwise),
    "sigmoid": ("sigmoid", _elementwise),
    "exp": ("exp", _elementwise),
    "softmax": ("softmax", _row_function),
    "log_softmax": ("log_softmax", _row_function),
    "nn.functional.cross_entropy": ("softmax_cross_entropy", _cross_entropy),
    "nn.functional.mse_loss": ("mean_squared_error", _loss_of()),
    "nn.functional.huber_loss": ("huber", _loss_of("delta")),
    "nn.functional.binary_cross_entropy": ("binary_cross_entropy", _loss_of()),
    "nn.functional.binary_cross_entropy_with_logits": ("binary_cross_entropy_with_logits", _loss_of()),
}


def agree_with_the_samples_of_pytorch(operators: Any) -> dict[str, int]:
    """Compare with PyTorch on the samples of its own tests (OpInfo); return how many there were, by name."""
    op_db = of_pytorchs_tests("common_methods_invocations").op_db
    counts: dict[str, int] = {}
    for info in op_db:
        if info.name not in OPERATORS or info.variant_test_name:
            continue
        name, run = OPERATORS[info.name]
        counts[info.name] = 0
        for dtype in TOLERANCE:
            for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
                given = (sample.input, *sample.args)
                ours = run(getattr(operators, name), *given, **sample.kwargs)
                if ours is None:
                    continue
                counts[info.name] += 1
                theirs = info.op(*given, **sample.kwargs)
                assert_close(ours, theirs, dtype)
                inputs = [each for each in given[:1] if each.requires_grad and theirs.requires_grad]
                grad = torch.randn_like(theirs)
                assert_close(*(torch.autograd.grad(y, inputs, grad) for y in (ours, theirs)), dtype)
    return counts


@one_isa
def test_operators_agree_with_the_samples_of_pytorchs_tests(operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = agree_with_the_samples_of_pytorch(operators)
    assert counts.keys() == OPERATORS.keys()
    assert all(counts.values()), counts
    # A wrong operator is seen.
    monkeypatch.setitem(OPERATORS, "tanh", ("sigmoid", _elementwise))
    with pytest.raises(AssertionError):
        agree_with_the_samples_of_pytorch(operators)


# The document.


@one_isa
@pytest.mark.parametrize("number", [0, 1])
def test_the_document_runs_as_written(number: int, tmp_path: Path) -> None:
    """In a new, empty folder; `backend="gemmlet"` by the object, as the tests may run without an installed package."""
    text = (Path(__file__).parents[1] / "docs/torch.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[number]
    code = code.replace(
        'backend="gemmlet"', "backend=__import__('gemmlet.integrations.torch').integrations.torch.backend"
    )
    path = os.pathsep.join([str(Path(gemmlet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            f"{code}\nfrom gemmlet.integrations.torch import calls\nprint(dict(calls))",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "GEMMLET_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    assert ("{'fused_step': 100}", "{'forward': 1, 'backward': 1}")[number] in run.stdout
