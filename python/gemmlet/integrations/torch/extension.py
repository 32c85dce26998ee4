"""The extension module, told of PyTorch's tensors; and what a network is to it."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ...backends import select
from ...backends.cpu import CpuBackend
from ...formulas.activations import ACTIVATIONS
from ...formulas.losses import LOSSES, ROW_LOSSES

EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
if EXCHANGE is None:
    raise ImportError(f"gemmlet.integrations.torch needs PyTorch 2.13 or later, got {torch.__version__}")

DTYPES = (torch.float32, torch.float64)  # that the kernels take

# How often gemmlet computed, by what was called: "fused_step", "update", "forward", "backward"; and how often it left
# that to PyTorch: the same with " by PyTorch".
calls: Counter[str] = Counter()


@dataclass(frozen=True, eq=False)
class Kernels:
    """An extension module, and the numbers of its formulas by name; that of a row loss is ``~number``."""

    module: Any
    activations: Mapping[str, int]
    losses: Mapping[str, int]
    rules: Mapping[str, int]


@functools.cache
def _kernels_of(backend: CpuBackend) -> Kernels:
    modes = torch._C._is_torch_function_mode_enabled, torch._C.DisableTorchFunction
    backend.extension.use_torch(EXCHANGE, torch.Tensor, nn.Parameter, *modes)
    return Kernels(backend.extension, *backend.numbers)


def kernels() -> Kernels | None:
    """The kernels in use; None if they are not the compiled ones, which alone take PyTorch's tensors."""
    backend = select.current()
    return _kernels_of(backend) if isinstance(backend, CpuBackend) else None


class Activation(NamedTuple):
    """An activation of the registry, with its parameter; `name` is None where there is none."""

    name: str | None
    parameter: float = 0.0


NONE = Activation(None)


class Loss(NamedTuple):
    """A loss of the registry, with its parameter."""

    name: str
    parameter: float
    is_mean: bool = True


class Network(NamedTuple):
    """Linear layers, the activation behind each, and perhaps a loss of the outputs."""

    activations: tuple[Activation, ...]
    loss: Loss | None = None


@functools.cache
def capsule(network: Network, kernels: Kernels) -> Any:
    """The network as an extension module has it."""
    layers = [
        (-1, 0.0, False) if name is None else (kernels.activations[name], parameter, ACTIVATIONS[name].needs_x)
        for name, parameter in network.activations
    ]
    loss = None
    if network.loss is not None:
        name, parameter, is_mean = network.loss
        loss = kernels.losses[name], parameter, is_mean, name in LOSSES and LOSSES[name].unit_interval
    return kernels.module.torch_network(layers, loss)


# What PyTorch's modules and functions are to the registry: functions of their arguments, by PyTorch's names. None is
# what the registry does not have: a gradient that cannot be had from the result, say.


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation | None:
    return Activation("softplus") if beta == 1 and threshold >= 20 else None


def _with_parameter(name: str) -> Callable[..., Activation | None]:
    entry = ACTIVATIONS[name]

    def made(**arguments: float) -> Activation | None:
        number = arguments.get(str(entry.parameter), entry.default)
        return Activation(name, float(number)) if isinstance(number, int | float) and number > 0 else None

    return made


def _gelu(approximate: str = "none") -> Activation | None:
    return Activation({"none": "gelu", "tanh": "gelu_tanh"}[approximate])


def _plain(name: str) -> Callable[[], Activation]:
    return lambda: Activation(name)


# By PyTorch's function: the names of its arguments behind the first, and the activation.
ACTIVATION_FUNCTIONS: dict[Any, tuple[tuple[str, ...], Callable[..., Activation | None]]] = {
    **{f: ((), _plain("relu")) for f in (functional.relu, torch.relu)},
    **{f: ((), _plain("tanh")) for f in (functional.tanh, torch.tanh)},
    **{f: ((), _plain("sigmoid")) for f in (functional.sigmoid, torch.sigmoid)},
    functional.silu: ((), _plain("silu")),
    functional.gelu: (("approximate",), _gelu),
    functional.leaky_relu: (("negative_slope",), _with_parameter("leaky_relu")),
    functional.elu: (("alpha",), _with_parameter("elu")),
    functional.softplus: (("beta", "threshold"), _softplus),
}
ACTIVATION_METHODS = {name: _plain(name) for name in ("relu", "tanh", "sigmoid")}
ACTIVATION_MODULES: dict[type, tuple[tuple[str, ...], Callable[..., Activation | None]]] = {
    nn.ReLU: ((), _plain("relu")),
    nn.Tanh: ((), _plain("tanh")),
    nn.Sigmoid: ((), _plain("sigmoid")),
    nn.SiLU: ((), _plain("silu")),
    nn.GELU: (("approximate",), _gelu),
    nn.LeakyReLU: (("negative_slope",), _with_parameter("leaky_relu")),
    nn.ELU: (("alpha",), _with_parameter("elu")),
    nn.Softplus: (("beta", "threshold"), _softplus),
}


def _loss(name: str, reduction: str, parameter: float | None = None) -> Loss | None:
    entry = LOSSES.get(name) or ROW_LOSSES[name]
    return Loss(name, entry.default if parameter is None else float(parameter), reduction == "mean")


def _cross_entropy(weight: Any, ignore_index: int, reduction: str, label_smoothing: float) -> Loss | None:
    fits = weight is None and ignore_index < 0 and 0 <= label_smoothing <= 1
    return _loss("softmax_cross_entropy", reduction, label_smoothing) if fits else None


def _bce(weight: Any, reduction: str) -> Loss | None:
    return _loss("binary_cross_entropy", reduction) if weight is None else None


def _bce_with_logits(weight: Any, pos_weight: Any, reduction: str) -> Loss | None:
    fits = weight is None and pos_weight is None
    return _loss("binary_cross_entropy_with_logits", reduction) if fits else None


def _mse(reduction: str, weight: Any = None) -> Loss | None:
    return _loss("mean_squared_error", reduction) if weight is None else None


def _huber(reduction: str, delta: float, weight: Any = None) -> Loss | None:
    return _loss("huber", reduction, delta) if weight is None and delta > 0 else None


def _smooth_l1(reduction: str, beta: float) -> Loss | None:
    return _loss("huber", reduction, 1.0) if beta == 1 else None


# By PyTorch's module: the attributes that its loss depends on, and the loss.
LOSS_MODULES: dict[type, tuple[tuple[str, ...], Callable[..., Loss | None]]] = {
    nn.CrossEntropyLoss: (("weight", "ignore_index", "reduction", "label_smoothing"), _cross_entropy),
    nn.BCELoss: (("weight", "reduction"), _bce),
    nn.BCEWithLogitsLoss: (("weight", "pos_weight", "reduction"), _bce_with_logits),
    nn.MSELoss: (("reduction",), _mse),
    nn.HuberLoss: (("reduction", "delta"), _huber),
    nn.SmoothL1Loss: (("reduction", "beta"), _smooth_l1),
}
# By PyTorch's function, too, whose signature has the defaults.
LOSS_FUNCTIONS: dict[Any, Callable[..., Loss | None]] = {
    functional.cross_entropy: _cross_entropy,
    functional.binary_cross_entropy: _bce,
    functional.binary_cross_entropy_with_logits: _bce_with_logits,
    functional.mse_loss: _mse,
    functional.huber_loss: _huber,
    functional.smooth_l1_loss: _smooth_l1,
}


def of_module(module: nn.Module, table: Mapping[type, tuple[tuple[str, ...], Callable[..., Any]]]) -> Any:
    """What a module of one of the tables is to the registry; None if it is not in it."""
    entry = table.get(type(module))
    if entry is None:
        return None
    names, made = entry
    return made(**{name: getattr(module, name) for name in names})


def of_function(function: Any) -> Loss | None:
    """What a loss of torch.nn.functional is with its defaults; None if it is not in the table."""
    made = LOSS_FUNCTIONS.get(function)
    if made is None:
        return None
    defaults = inspect.signature(function).parameters
    return made(**{name: defaults[name].default for name in inspect.signature(made).parameters})


# Whether a tensor's memory holds the negative of its values, which the kernels would read.
is_negated = torch.Tensor.is_neg

# Of tensors that have been changed: autograd is told. Those of the inference mode have no version.
increment_versions = torch.autograd.graph.increment_version
has_no_version = torch.Tensor.is_inference
