"""Fused training steps of a plain network, in PyTorch's own memory."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from ...nn.dataset import SPARSE_BELOW
from .extension import (
    ACTIVATION_MODULES,
    LOSS_MODULES,
    NONE,
    Activation,
    Loss,
    Network,
    calls,
    capsule,
    has_no_version,
    increment_versions,
    is_negated,
    kernels,
    of_function,
    of_module,
)
from .optimizers import SGD, Adam, AdamW, Rule, States, keep, numbers_of, rule_of, states_of, step_of, unknown_settings

_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, SGD, Adam, AdamW)

_NO_STATES: States = [], [], []

# Steps between two looks at how many zeros the samples have, which takes longer than a small step.
_LOOK_EVERY = 64

# Attributes of modules, and those of all modules and optimizers: empty dicts unless somebody has hooks.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    *(getattr(torch_module, f"_global{name}") for name in _HOOKS),
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
]


def fused_step(module: nn.Sequential, loss: Any, optimizer: torch.optim.Optimizer) -> FusedStep:
    """Return a function that trains `module` by one mini-batch, in one call.

    It does what these lines do, and leaves no gradients behind::

        optimizer.zero_grad()
        value = loss(module(x), target)
        value.backward()
        optimizer.step()

    Parameters are updated where they are: in the module's own tensors, whose memory lies as (in, out) from the first
    step on; shapes, values and ``state_dict()`` stay the same. The optimizer's state is in `optimizer` as always.

    Parameters
    ----------
    module : torch.nn.Sequential
        Linear layers with biases, each with at most one activation behind it (ReLU, LeakyReLU, ELU, GELU, SiLU,
        Softplus, Tanh, Sigmoid); Identity, Flatten as the first one, Dropout with ``p=0``, and Sequential with such.
    loss : torch.nn.Module or function of torch.nn.functional
        CrossEntropyLoss, MSELoss, HuberLoss, SmoothL1Loss with ``beta=1``, BCEWithLogitsLoss, or BCELoss behind a
        Sigmoid; without weights, and with a mean or a sum.
    optimizer : torch.optim.Optimizer
        SGD, Adam or AdamW, PyTorch's or gemmlet's, with all parameters of the module in one group.

    Returns
    -------
    FusedStep
        ``step(x, target)`` returns the loss before the step, a tensor of one number.

    Raises
    ------
    TypeError
        `module` or `optimizer` is none of these.
    ValueError
        Something of `module`, `loss` or `optimizer` is not known; the message names it.
    """
    return FusedStep(module, loss, optimizer)


class FusedStep:
    """A step of training; `fused_step` makes it.

    PyTorch does the step, with the same result to rounding, where something is unusual at the time: samples and
    parameters that are not float32 or float64 on the CPU, samples or targets of other shapes, class indices that
    PyTorch would ignore or refuse, hooks, autocast, dispatch modes, frozen parameters, a backend other than the
    compiled one. `calls` counts both.
    """

    def __init__(self, module: nn.Sequential, loss: Any, optimizer: torch.optim.Optimizer) -> None:
        if type(module) is not nn.Sequential:
            raise TypeError(f"module must be a torch.nn.Sequential, got {type(module).__name__}")
        if type(optimizer) not in _OPTIMIZERS:
            raise TypeError(f"optimizer must be SGD, Adam or AdamW, got {type(optimizer).__name__}")
        self.module, self.loss, self.optimizer = module, loss, optimizer
        self._steps, self._skip_zeros = 0, False
        self._model = _Model(module, loss)
        params, group = self._model.params, optimizer.param_groups[0]
        if len({param.data_ptr() for param in params}) < len(params):
            raise ValueError("module shares a parameter between layers, which fused_step does not train")
        if rule_of(optimizer, group) is None:
            raise ValueError(f"optimizer has settings that fused_step does not know: {unknown_settings(group)}")
        if not self._is_group(params):
            raise ValueError("optimizer must have one group with all parameters of module, in their order")

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Train by one mini-batch.

        Parameters
        ----------
        x : tensor, shape (rows, features)
        target : tensor
            What the loss takes.

        Returns
        -------
        tensor
            The loss before the step, without a graph.

        Raises
        ------
        TypeError
            `x` or `target` is no tensor.
        RuntimeError
            Finite samples and parameters overflow to NaN before a BCELoss; the parameters have been updated by then.
            What else a forward pass of PyTorch refuses raises its error, and leaves parameters and state as they were.
        """
        value = self._fused(x, target)
        if value is None:
            for name, given in (("x", x), ("target", target)):
                if not isinstance(given, torch.Tensor):
                    raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
            calls["fused_step by PyTorch"] += 1
            return self._by_pytorch(x, target)
        calls["fused_step"] += 1
        if self._model.refuses_nan and math.isnan(value):
            raise RuntimeError("module returns NaN, which BCELoss refuses: its outputs overflow")
        return torch.scalar_tensor(value, dtype=x.dtype, device="cpu")

    def _by_pytorch(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            loss = self.loss(self.module(x), target)
            self.optimizer.zero_grad()  # behind what may raise
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        result: torch.Tensor = loss.detach()
        return result

    def _fused(self, x: torch.Tensor, target: torch.Tensor) -> float | None:
        if torch._C._len_torch_dispatch_stack():
            return None  # under a mode that computes something else, or watches
        found, optimizer, model = kernels(), self.optimizer, self._model
        if model.of != (self.module, self.loss) or not model.is_current():
            try:
                model = self._model = _Model(self.module, self.loss)
            except ValueError:  # as long as it is so: the next step looks again
                return None
        params, group = model.params, optimizer.param_groups[0]
        rule = rule_of(optimizer, group)
        if found is None or rule is None or model.is_observed(optimizer) or not self._is_group(params):
            return None
        if not (type(x) is type(target) is torch.Tensor):
            return None
        if x.requires_grad or target.requires_grad:
            return None
        if torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled():
            return None
        if model.flattens and x.ndim != 2:
            x = x.flatten(1)
        if self._steps % _LOOK_EVERY == 0 and x.layout is torch.strided:
            self._skip_zeros = x.shape[:1] == (1,) and bool(torch.count_nonzero(x) < SPARSE_BELOW * x.numel())
        self._steps += 1
        network, number = capsule(model.network, found), found.rules[rule.name]
        while True:
            if (own := self._states_of(rule, params)) is None:
                return None
            states, steps, made = own
            changed = params + states
            if any(map(is_negated, [x, target, *changed])) or any(map(has_no_version, changed)):
                return None
            if (step := step_of(steps)) is None or (numbers := numbers_of(rule, group, step)) is None:
                return None
            result = found.module.torch_train(
                network, number, numbers, x, target, self._skip_zeros, params, states, steps, step
            )
            if result is not None:
                break
            if {x.layout, target.layout} != {torch.strided}:
                return None
            if not (x.is_contiguous() and target.is_contiguous()):
                x, target = x.contiguous(), target.contiguous()
            elif misplaced := self._misplaced(params, rule.state):
                with torch.no_grad():
                    self.loss(self.module(x), target)  # may raise, before anything is changed
                _lay_out(misplaced)
            else:
                return None
        increment_versions(changed)
        if made:
            keep(optimizer, made)
        for param in params:
            if param.grad is not None:
                param.grad = None
        optimizer._opt_called = True  # which learning rate schedulers ask for
        value: float = result
        return value

    def _states_of(self, rule: Rule, params: list[torch.Tensor]) -> States | None:
        if not rule.state:
            return _NO_STATES
        state = self.optimizer.state
        # To look a tensor up takes longer than to compare.
        in_order = len(state) == len(params) and all(map(operator.is_, state, params))
        found = [*state.values()] if in_order else [state.get(param, {}) for param in params]
        return states_of(found, rule, params)

    def _misplaced(self, params: list[torch.Tensor], names: tuple[str, ...]) -> list[tuple[Any, str, torch.Tensor]]:
        """The weights, and their states, that do not lie as (in, out), each with who has it and its name there.

        Not those of which others know the memory.
        """
        found: list[tuple[Any, str, torch.Tensor]] = []
        for param in params:
            state = self.optimizer.state.get(param, {})
            found.append((param, "data", param))
            found += [(state, name, state[name]) for name in names if state.get(name) is not None]
        return [
            (owner, name, tensor)
            for owner, name, tensor in found
            if tensor.ndim == 2
            and not tensor.t().is_contiguous()
            and tensor.device.type == "cpu"
            and not tensor.is_shared()
            and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        ]

    def _is_group(self, params: list[torch.Tensor]) -> bool:
        groups = self.optimizer.param_groups
        given = groups[0]["params"]
        return len(groups) == 1 and len(given) == len(params) and all(map(operator.is_, given, params))


def _lay_out(misplaced: list[tuple[Any, str, torch.Tensor]]) -> None:
    """Let them lie as (in, out)."""
    for owner, name, tensor in misplaced:
        moved = tensor.detach().t().contiguous().t()
        if isinstance(owner, dict):
            owner[name] = moved
        else:
            owner.data = moved


class _Model:
    """What a module and its loss are to gemmlet, as long as `is_current`.

    ValueError if something of them is not known.
    """

    def __init__(self, module: nn.Sequential, loss: Any) -> None:
        self.of = module, loss
        self._modules: list[nn.Module] = []
        self._linears: list[nn.Linear] = []
        self._read: list[tuple[dict[str, Any], str]] = []  # attributes of modules that all of this depends on
        self.flattens = False
        activations: list[Activation] = []
        for name, layer in self._layers("module", module):
            kind = type(layer)
            if kind is nn.Linear and layer.bias is not None:
                self._linears.append(layer)
                activations.append(NONE)
            elif kind is nn.Identity or (kind is nn.Dropout and layer.p == 0):
                self._reads(layer, "p")
            elif kind is nn.Flatten and not self._linears and (layer.start_dim, layer.end_dim) == (1, -1):
                self.flattens = True
                self._reads(layer, "start_dim", "end_dim")
            elif activations and activations[-1] is NONE and (activation := of_module(layer, ACTIVATION_MODULES)):
                activations[-1] = activation
                self._reads(layer, *ACTIVATION_MODULES[kind][0])
            else:
                raise ValueError(
                    f"{name} is {layer}, which fused_step does not train: it knows Linear layers with a bias, with at "
                    "most one activation behind each"
                )
        if not self._linears:
            raise ValueError("module has no Linear layer")
        self.network = Network(tuple(activations), self._loss(loss, activations[-1]))
        self.params: list[torch.Tensor] = [p for each in self._linears for p in (each.weight, each.bias)]
        self._values = self._found()
        # What the modules hold: sequences their layers, layers their parameters, a loss its weights.
        held: list[Mapping[str, Any]] = [each._modules for each in self._modules if type(each) is nn.Sequential]
        held += [each._parameters for each in self._linears]
        self._held = [*held, loss._buffers, loss._parameters] if isinstance(loss, nn.Module) else held
        self._parts = self._found_parts()
        attributes = [each.__dict__ for each in self._modules]
        self._attributes, self._sizes = attributes, [*map(len, attributes)]
        self._has_own_forward = any("forward" in each for each in attributes)
        self._hooks = [each[name] for each in attributes for name in _HOOKS] + _GLOBAL_HOOKS

    def _layers(self, name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """The layers of nested sequences, with their names."""
        self._modules.append(module)
        if type(module) is not nn.Sequential:
            yield name, module
            return
        for key, child in module._modules.items():
            assert child is not None
            yield from self._layers(f"{name}[{key}]", child)

    def _loss(self, loss: Any, last: Activation) -> Loss:
        is_module = isinstance(loss, nn.Module)
        found: Loss | None = of_module(loss, LOSS_MODULES) if is_module else of_function(loss)
        if found is None or (is_module and loss.reduction not in ("mean", "sum")):
            raise ValueError(f"loss is {_shown(loss)}, which fused_step does not know")
        self.refuses_nan = found.name == "binary_cross_entropy"
        if self.refuses_nan and last.name != "sigmoid":
            raise ValueError("loss is BCELoss, which needs a Sigmoid as the last layer of module")
        if is_module:
            self._modules.append(loss)
            self._reads(loss, *LOSS_MODULES[type(loss)][0])
        return found

    def _reads(self, module: nn.Module, *names: str) -> None:
        self._read += [(module.__dict__, name) for name in names]

    def _found(self) -> list[Any]:
        return [attributes.get(name) for attributes, name in self._read]

    def _found_parts(self) -> list[Any]:
        return [*itertools.chain.from_iterable(map(_values, self._held))]

    def is_current(self) -> bool:
        """Whether the modules are as they were."""
        parts = self._found_parts()
        return (
            len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and [*map(len, self._attributes)] == self._sizes
            and self._found() == self._values
        )

    def is_observed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether somebody waits for a part of the step, or has frozen a parameter."""
        return bool(
            self._has_own_forward
            or any(self._hooks)
            or optimizer._optimizer_step_pre_hooks
            or (not _REPLACED.isdisjoint(optimizer.__dict__) and _has_own_step(optimizer))
            or optimizer._optimizer_step_post_hooks
            or any(map(_backward_hooks, self.params))
            or any(map(_gradient_hooks, self.params))
            or not all(map(_requires_grad, self.params))
        )


_values = operator.methodcaller("values")
_backward_hooks = operator.attrgetter("_backward_hooks")
_gradient_hooks = operator.attrgetter("_post_accumulate_grad_hooks")
_requires_grad = operator.attrgetter("requires_grad")


_REPLACED = frozenset(("step", "zero_grad"))  # methods that an instance may have of its own


def _has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one of them has been replaced, other than by learning rate schedulers: they count the class's steps."""
    step = optimizer.step
    counted = hasattr(step, "_wrapped_by_lr_sched") and step.__wrapped__ is type(optimizer).step
    return "zero_grad" in optimizer.__dict__ or not counted


def _shown(loss: Any) -> str:
    """A loss with the settings that it depends on, where they are not the defaults."""
    if type(loss) not in LOSS_MODULES:
        return str(loss)
    defaults = inspect.signature(type(loss)).parameters
    given = {name: getattr(loss, name) for name in LOSS_MODULES[type(loss)][0]}
    settings = [f"{name}={each!r}" for name, each in given.items() if repr(each) != repr(defaults[name].default)]
    return f"{type(loss).__name__}({', '.join(settings)})"
