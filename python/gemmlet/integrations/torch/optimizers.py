"""PyTorch's SGD, Adam and AdamW, with an update of all parameters of a group in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.optim import optimizer as torch_optimizer

from ...formulas.optimizers import adam_hyperparameters
from .extension import calls, has_no_version, increment_versions, is_negated, kernels

Group = dict[str, Any]


class Rule(NamedTuple):
    """The rule of the registry that a group of parameters follows, and PyTorch's names for its state."""

    name: str
    state: tuple[str, ...]
    # ``hyperparameters(group, step)``, `step` counted from 1.
    hyperparameters: Callable[[Group, int], Iterable[float]]
    counts: bool  # whether the state has the number of steps, too


_SGD = Rule("sgd", (), lambda group, step: (group["lr"], group["weight_decay"]), False)
_MOMENTUM = Rule(
    "momentum",
    ("momentum_buffer",),
    lambda group, step: (group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"])),
    False,
)


def _adam(group: Group, step: int) -> Iterable[float]:
    beta1, beta2 = group["betas"]
    settings = group["eps"], group["weight_decay"], group["decoupled_weight_decay"]
    return adam_hyperparameters(step, group["lr"], beta1, beta2, *settings)


_ADAM = Rule("adam", ("exp_avg", "exp_avg_sq"), _adam, True)


def rule_of(optimizer: torch.optim.Optimizer, group: Group) -> Rule | None:
    """The rule of a group of SGD, Adam or AdamW; None if the kernels have none with its settings."""
    if group["maximize"] or group["differentiable"] or isinstance(group["lr"], torch.Tensor):
        return None
    if "grad_scale" in optimizer.__dict__ or "found_inf" in optimizer.__dict__:
        return None  # while a GradScaler steps
    if isinstance(optimizer, torch.optim.SGD):
        if group["dampening"] != 0:
            return None
        return _SGD if group["momentum"] == 0 else _MOMENTUM
    is_unusual = group["amsgrad"] or group["capturable"] or any(isinstance(b, torch.Tensor) for b in group["betas"])
    return None if is_unusual else _ADAM


def unknown_settings(group: Group) -> str:
    """Those of a group for which there is no rule."""
    names = [name for name in ("maximize", "differentiable", "dampening", "amsgrad", "capturable") if group.get(name)]
    tensors = {"lr": (group["lr"],), "betas": group.get("betas", ())}
    names += [name for name, given in tensors.items() if any(isinstance(each, torch.Tensor) for each in given)]
    return ", ".join(f"{name}={group[name]!r}" for name in names)


# Of parameters: all arrays in turn, the counters of steps, and what of it was missing in the optimizer, and is made as
# PyTorch does. That belongs in the optimizer once the step has been done: `keep`.
States = tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, dict[str, torch.Tensor]]]]


def states_of(found: list[dict[str, Any]], rule: Rule, params: list[torch.Tensor]) -> States | None:
    """The states of parameters, of which `found` are in the optimizer; None if PyTorch would miss some."""
    arrays, steps, made = [], [], []
    for state, param in zip(found, params, strict=False):
        missing = {}
        if rule.counts:
            step = state.get("step")
            if step is None:
                step = missing["step"] = torch.tensor(0.0, dtype=torch_optimizer._get_scalar_dtype(), device="cpu")
            steps.append(step)
        for name in rule.state:
            array = state.get(name)
            if array is None:
                array = missing[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            arrays.append(array)
        if missing:
            if rule.counts and state:
                return None
            made.append((param, missing))
    if made and len({id(param) for param, _ in made}) < len(made):
        return None  # a parameter that is there twice
    return arrays, steps, made


def keep(optimizer: torch.optim.Optimizer, made: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
    """Put into the optimizer what was missing in it."""
    for param, missing in made:
        optimizer.state[param].update(missing)


def step_of(steps: list[torch.Tensor]) -> int | None:
    """The number of the step to come, from 1; None if there is none."""
    if not steps:
        return 1
    last = float(steps[0])
    return int(last) + 1 if 0 <= last < math.inf else None


def numbers_of(rule: Rule, group: Group, step: int) -> list[float] | None:
    """The hyperparameters of a step; None if they are no finite numbers, which PyTorch may refuse or take."""
    try:
        numbers = list(rule.hyperparameters(group, step))
        return numbers if math.isfinite(sum(numbers)) else None
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        return None


def _update(optimizer: torch.optim.Optimizer, group: Group) -> bool:
    """Update a group; False, with nothing done, if that is left to PyTorch."""
    found, rule = kernels(), rule_of(optimizer, group)
    if found is None or rule is None or torch._C._len_torch_dispatch_stack():
        return False
    params, grads = [], []
    for param in group["params"]:
        if (grad := param.grad) is not None:
            params.append(param)
            grads.append(grad)
    if not params:
        return True
    found_states = [optimizer.state.get(param, {}) for param in params] if rule.state else []
    if (own := states_of(found_states, rule, params)) is None:
        return False
    states, steps, made = own
    changed = params + states
    if any(map(is_negated, changed + grads)) or any(map(has_no_version, changed)):
        return False
    if (step := step_of(steps)) is None or (numbers := numbers_of(rule, group, step)) is None:
        return False
    number = found.rules[rule.name]
    if not found.module.torch_update(number, numbers, params, grads, states, steps, step):
        return False
    increment_versions(changed)
    keep(optimizer, made)
    calls["update"] += 1
    return True


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    # PyTorch wraps the class's function when it makes the first optimizer of it.
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def _step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    groups = self.param_groups
    for group in groups:
        if not _update(self, group):
            calls["update by PyTorch"] += 1
            self.param_groups = [group]
            try:
                _unhooked(self._torch.step)(self)
            finally:
                self.param_groups = groups
    return loss


# With PyTorch's hooks, and its entry in profiles.
_hooked_step = torch.optim.Optimizer.profile_hook_step(_step)


class _OneCall:
    """An optimizer of PyTorch with another `step`."""

    _torch: Any  # PyTorch's class

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; by PyTorch what the kernels do not know.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        tensor or None
            What `closure` returned.
        """
        optimizer: Any = self
        if torch.compiler.is_compiling():
            return _unhooked(self._torch.step)(self, closure)
        if (
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        ):
            return _hooked_step(self, closure)
        return _step(self, closure)

    step.hooked = True  # type: ignore[attr-defined]  # so that PyTorch does not wrap it: that takes as long as an update


class SGD(_OneCall, torch.optim.SGD):  # type: ignore[misc]
    """`torch.optim.SGD`, with all parameters of a group updated in one call.

    Arguments, attributes and ``state_dict()`` are PyTorch's, and so are the results to rounding. PyTorch does the step
    of a group with `dampening`, `maximize`, `differentiable`, a tensor as `lr`, sparse gradients, or parameters that
    are not float32 or float64 on the CPU.
    """

    _torch = torch.optim.SGD


class Adam(_OneCall, torch.optim.Adam):  # type: ignore[misc]
    """`torch.optim.Adam`, with all parameters of a group updated in one call.

    Arguments, attributes and ``state_dict()`` are PyTorch's, and so are the results to rounding. PyTorch does the step
    of a group with `amsgrad`, `maximize`, `capturable`, `differentiable`, a tensor as `lr` or in `betas`, sparse
    gradients, or parameters that are not float32 or float64 on the CPU.
    """

    _torch = torch.optim.Adam


class AdamW(_OneCall, torch.optim.AdamW):  # type: ignore[misc]
    """`torch.optim.AdamW`, with all parameters of a group updated in one call; see `Adam`."""

    _torch = torch.optim.AdamW
