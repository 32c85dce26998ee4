"""The compiled backend: C++ kernels, one extension module for each instruction set, the best one loaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .. import _environment
from ..formulas.activations import ACTIVATIONS, Activation
from ..formulas.augmentation import Draw, Settings
from ..formulas.losses import LOSSES, Loss, RowFunction, RowLoss
from ..formulas.optimizers import Hyperparameters, OptimizerRule
from . import threadpool
from .base import Array
from .numpy import NumpyBackend

if TYPE_CHECKING:
    from ..training.plan import Batches, Outcome, TrainingPlan

_MODULES = {"x86-64-v4": "_cpu_x86_64_v4", "x86-64-v3": "_cpu_x86_64_v3", "baseline": "_cpu_baseline"}


def available_isas() -> list[str]:
    """Return the instruction sets that were built and can run here, best first.

    The processor and the operating system are asked; on arm64 there is the baseline alone, which is NEON.
    """
    try:
        features = importlib.import_module("gemmlet._cpu_features")
    except ImportError:
        return []
    built = _built_isas()
    return [isa for isa in cast("list[str]", features.supported()) if isa in built]


def _built_isas() -> list[str]:
    return [isa for isa, module in _MODULES.items() if importlib.util.find_spec(f"gemmlet.{module}") is not None]


def _choose(isa: str | None) -> str:
    """The instruction set to load: the best, or the one that is asked for.

    What is asked for and cannot be had is a ValueError, so that no other backend silently takes its place.
    """
    available = available_isas()
    if not available:
        if built := _built_isas():
            raise RuntimeError(
                f"backend 'cpu' was compiled for {' and '.join(built)}, which this processor lacks: "
                "reinstall gemmlet on this machine, or build it with -C cmake.define.GEMMLET_ISAS=all"
            )
        raise RuntimeError("backend 'cpu' was not compiled for this platform: no extension module is installed")
    wanted = isa or _environment.read("GEMMLET_ISA") or available[0]
    if wanted not in _MODULES:
        raise ValueError(f"instruction set {wanted!r} is unknown; GEMMLET_ISA takes {', '.join(_MODULES)}")
    if wanted not in available:
        why = "cannot run here"
        if wanted not in _built_isas():
            why = "was not compiled (a build with -C cmake.define.GEMMLET_ISAS=all has it)"
        raise ValueError(f"instruction set {wanted!r} {why}; GEMMLET_ISA takes {', '.join(available)}")
    return wanted


class CpuBackend(NumpyBackend):
    """The compiled kernels.

    Parameters
    ----------
    isa : str, optional
        The instruction set; by default the best that can run here, or what ``GEMMLET_ISA`` lowers it to.

    Raises
    ------
    RuntimeError
        Nothing was compiled for this platform.
    ValueError
        There is no such instruction set, or it cannot run here.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = _choose(isa)
        # The stub `_cpu_baseline.pyi` has the signatures.
        self._module = importlib.import_module(f"gemmlet.{_MODULES[self.isa]}")
        threadpool.register(_MODULES.values())
        self._activations = {name: number for number, name in enumerate(self._module.activations())}
        self._row_functions = {name: number for number, name in enumerate(self._module.row_functions())}
        self._losses = {name: number for number, name in enumerate(self._module.losses())}
        self._row_losses = {name: number for number, name in enumerate(self._module.row_losses())}
        self._rules = {name: number for number, name in enumerate(self._module.optimizer_rules())}
        # Of activations, losses (a row loss is ~number) and rules: what `cpu_plan.executor` takes.
        losses = self._losses | {name: ~number for name, number in self._row_losses.items()}
        self.numbers = self._activations, losses, self._rules
        self.fast_paths = self._make_fast_paths()

    def _make_fast_paths(self) -> dict[str, Callable[..., Any]]:
        """The fast path (csrc/cpu/bindings/fast_path.cpp) of every formula that registry and extension both have."""
        fast_path, formula = self._module.fast_path, self._module.formula
        functions: dict[str, Callable[..., Any]] = {}
        activations = {
            name: formula(number, entry.default, entry.parameter is not None, entry.needs_x, False)
            for name, number in self._activations.items()
            if (entry := ACTIVATIONS.get(name)) is not None
        }
        rows = {name: formula(number, 0.0, False, False, False) for name, number in self._row_functions.items()}
        for kind, formulas in (("activation", activations), ("row_function", rows)):
            for name, made in formulas.items():
                functions[name] = fast_path(kind, made)
                functions[f"{name}_backward"] = fast_path(f"{kind}_backward", made)
        for name, number in self._losses.items():
            if (loss := LOSSES.get(name)) is not None:
                made = formula(number, loss.default, loss.parameter is not None, False, loss.unit_interval)
                functions[name] = fast_path("loss", made)
        for name, number in self._row_losses.items():
            functions[name] = fast_path("row_loss", formula(number, 0.0, False, False, False))
        for name, number in self._rules.items():
            functions[f"{name}_update"] = fast_path("update", formula(number, 0.0, False, False, False))
        functions["linear"] = fast_path("linear", activations)
        functions["linear_backward"] = fast_path("linear_backward", activations)
        return functions

    @property
    def extension(self) -> Any:
        """The extension module, for `gemmlet.integrations`; the stub ``_cpu_baseline.pyi`` has its functions."""
        return self._module

    def describe(self) -> dict[str, str]:
        import platform

        isa = "baseline (NEON)" if platform.machine().lower() in {"arm64", "aarch64"} else self.isa
        return {
            "backend": self.name,
            "isa": isa,
            "vectors": f"{self._module.vector_bytes} bytes",
            "threads": str(self._module.get_num_threads()),
            "compiler": self._module.compiler,
        }

    def set_num_threads(self, count: int) -> None:
        self._module.set_num_threads(count)

    def get_num_threads(self) -> int:
        """How many threads the kernels use; threadpoolctl may have changed it."""
        return int(self._module.get_num_threads())

    # A registry entry that has no C++ formula (yet) is computed by the reference: `super()`.

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        self._module.linear(a, b, None, -1, 0.0, out, None)

    def linear(
        self,
        x: Array,
        w: Array,
        b: Array | None,
        activation: Activation | None,
        parameter: float,
        out: Array,
        preactivation: Array | None,
    ) -> None:
        number = -1 if activation is None else self._activations.get(activation.name)
        if number is None:
            super().linear(x, w, b, activation, parameter, out, preactivation)
        else:
            self._module.linear(x, w, b, number, parameter, out, preactivation)

    def column_sum(self, x: Array, out: Array) -> None:
        self._module.column_sum(x, out)

    def activation(self, activation: Activation, x: Array, parameter: float, out: Array) -> None:
        if (number := self._activations.get(activation.name)) is None:
            super().activation(activation, x, parameter, out)
        else:
            self._module.activation_forward(number, x, parameter, out)

    def activation_backward(
        self, activation: Activation, grad_y: Array, saved: Array, parameter: float, out: Array
    ) -> None:
        if (number := self._activations.get(activation.name)) is None:
            super().activation_backward(activation, grad_y, saved, parameter, out)
        else:
            self._module.activation_backward(number, grad_y, saved, parameter, out)

    def row_function(self, function: RowFunction, x: Array, out: Array) -> None:
        if (number := self._row_functions.get(function.name)) is None:
            super().row_function(function, x, out)
        else:
            self._module.row_function_forward(number, x, out)

    def row_function_backward(self, function: RowFunction, grad_y: Array, y: Array, out: Array) -> None:
        if (number := self._row_functions.get(function.name)) is None:
            super().row_function_backward(function, grad_y, y, out)
        else:
            self._module.row_function_backward(number, grad_y, y, out)

    def row_loss(self, loss: RowLoss, logits: Array, labels: Array, label_smoothing: float, out: Array) -> float:
        if (number := self._row_losses.get(loss.name)) is None:
            return super().row_loss(loss, logits, labels, label_smoothing, out)
        if labels.ndim == 2 and np.may_share_memory(labels, out):
            labels = labels.copy()  # the kernel keeps exponentials in `out` while it still reads the labels
        return float(self._module.row_loss(number, logits, labels, label_smoothing, out))

    def elementwise_loss(self, loss: Loss, prediction: Array, target: Array, parameter: float, out: Array) -> float:
        if (number := self._losses.get(loss.name)) is None:
            return super().elementwise_loss(loss, prediction, target, parameter, out)
        return float(self._module.elementwise_loss(number, prediction, target, parameter, out))

    def update(
        self, rule: OptimizerRule, param: Array, grad: Array, state: tuple[Array, ...], hyperparameters: Hyperparameters
    ) -> None:
        if (number := self._rules.get(rule.name)) is None:
            super().update(rule, param, grad, state, hyperparameters)
        else:
            self._module.optimizer_update(number, param, grad, state, hyperparameters)

    # Images.

    def augment(self, images: Array, settings: Settings, draw: Draw, out: Array, rows: Array | None = None) -> None:
        self._module.augment(images, settings, *draw, rows, out)

    # Training.

    def supports_fused(self, plan: TrainingPlan) -> bool:
        """Whether C++ has all formulas and phases of the plan."""
        return self._executor(plan) is not None

    def forward(
        self, layers: Sequence[tuple[Array, Array, Activation | None]], x: Array, out: Array, *, skip_zeros: bool
    ) -> bool:
        given = []
        for weight, bias, activation in layers:
            number = -1 if activation is None else self._activations.get(activation.name)
            if number is None:
                return False
            given.append((weight, bias, number, 0.0 if activation is None else activation.default))
        self._module.forward(given, x, skip_zeros, out)
        return True

    def encoded(self, x: Array) -> tuple[Array, Array] | None:
        codes, value_of_byte = np.empty(x.shape, np.uint8), np.empty(256, x.dtype)
        return (codes, value_of_byte) if self._module.encode(x, codes, value_of_byte) else None

    def train(self, plan: TrainingPlan, batches: Batches) -> Outcome:
        """In C++: all steps in one call; no whole gradient of the weights is written to memory."""
        outcome = plan.executors[self](batches) if self.supports_fused(plan) and not batches.varies else None
        return super().train(plan, batches) if outcome is None else cast("Outcome", outcome)

    def _executor(self, plan: TrainingPlan) -> Any:
        if self not in plan.executors:
            from .cpu_plan import executor  # here, as kernels alone do not need it

            plan.executors[self] = executor(self._module, plan, *self.numbers)
        return plan.executors[self]
