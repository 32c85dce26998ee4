"""Optimizers: how parameters change, given their gradients. Each is one kernel and the state that it keeps."""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .. import kernels
from .._locks import fork_safe_lock
from .._memory import aligned_copy, aligned_zeros
from .._signals import deferred_signals
from ..formulas.optimizers import OPTIMIZER_RULES, adam_table
from ..training.plan import Update
from ..training.reference import clip_by_norm, clip_by_value
from . import _checks as checks
from .schedules import ONE

Array = NDArray[Any]


@dataclass(eq=False)
class State:
    """What an optimizer keeps for one parameter, of this shape and dtype.

    Attributes
    ----------
    values : bytes
        Of one that waits, or waited: the `fingerprint` of its parameter.
    source : State, optional
        The one that waits and that this is a copy of.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    arrays: tuple[Array, ...]
    steps: int = 0
    values: bytes = b""
    source: State | None = None

    def fits(self, param: Array) -> bool:
        """Whether it may be that of `param`."""
        return (self.shape, self.dtype) == (param.shape, param.dtype)


def fingerprint(param: Array) -> bytes:
    """What tells the values of a parameter from others of its shape and dtype."""
    return hashlib.blake2b(np.ascontiguousarray(param).data, digest_size=16).digest()


# Of all optimizers, so that a fork waits for one. It is held at the first use of parameters and for a copy.
_LOCK = fork_safe_lock()


class States:
    """The states of an optimizer in the order of their first use, each as long as its parameter lives.

    A copy, or what was pickled, has no parameters yet, and its states wait for copies of them: parameters of the same
    values. What they would take over is theirs once they are updated; until then nothing changes.
    """

    def __init__(self, waiting: Iterable[State] = ()) -> None:
        self._of: dict[int, tuple[weakref.ref[Array], State]] = {}  # by the id of the parameter
        self._waiting = list(waiting)

    def __reduce__(self) -> tuple[Any, ...]:
        with _LOCK:
            living = ((reference(), state) for reference, state in list(self._of.values()))
            copied = [replace(state, values=fingerprint(param)) for param, state in living if param is not None]
            return States, ([*copied, *self._waiting],)

    def __len__(self) -> int:
        return len(self._of) + len(self._waiting)

    def values(self) -> list[State]:
        """Those whose parameters live."""
        return [state for _, state in list(self._of.values())]

    def get(self, param: Array) -> State | None:
        """That of a parameter, if there is one."""
        found = self._of.get(id(param))
        return found[1] if found is not None and found[0]() is param else None

    def keep(self, params: Sequence[Array], states: Sequence[State]) -> None:
        """From now on the states are those of the parameters, which `find` has found for them."""
        with _LOCK:
            taken = [state.source for state in states]
            self._waiting = [state for state in self._waiting if state not in taken]
            for param, state in zip(params, states, strict=True):
                state.source = None
                self._set(param, state)

    def release(self, params: Sequence[Array], states: Sequence[State]) -> None:
        """Undo `keep`; the states and the parameters are as they were."""
        with _LOCK:
            for param in params:
                self._of.pop(id(param), None)
            self._waiting = [*(state for state in states if state.values), *self._waiting]

    def _set(self, param: Array, state: State) -> None:
        mine, key = weakref.ref(self), id(param)

        def forget(reference: weakref.ref[Array]) -> None:
            states = mine()
            if states is not None and states._of.get(key, (None,))[0] is reference:
                del states._of[key]

        self._of[key] = weakref.ref(param, forget), state

    def find(self, params: Sequence[Array], arrays: int) -> list[State]:
        """Those of parameters that belong together; new ones have so many arrays of zeros."""
        with _LOCK:
            known = [self.get(param) for param in params]
            new = iter(self._new([p for p, state in zip(params, known, strict=True) if state is None], arrays))
            return [next(new) if state is None else state for state in known]

    def _new(self, params: Sequence[Array], arrays: int) -> list[State]:
        """Copies of consecutive states that wait for these parameters, or for most of them; or zeros."""
        best, found = 0, list[State]()
        prints = [fingerprint(param) for param in params] if self._waiting else []
        for first in range(len(self._waiting) - len(params) + 1 if params else 0):
            some = self._waiting[first : first + len(params)]
            equal = sum(state.values == its for state, its in zip(some, prints, strict=True))
            if equal > best and all(map(State.fits, some, params)):
                best, found = equal, some
        if found:
            return [replace(s, arrays=tuple(map(aligned_copy, s.arrays)), source=s) for s in found]
        zeros = [tuple(aligned_zeros(param.shape, param.dtype) for _ in range(arrays)) for param in params]
        return [State(param.shape, param.dtype, state) for param, state in zip(params, zeros, strict=True)]


@dataclass
class Optimizer(ABC):
    """Base of the optimizers.

    An optimizer keeps its state (velocity, moments, number of steps) for each parameter that it has updated, as long as
    that exists, and so one object may serve several networks, in several threads too. `fit` continues with the state
    of an object that it is given.

    A deep copy, and what pickle or joblib make of an optimizer, has the states too, but no parameters: copies of the
    parameters, those of a network as a whole, take them over when they are first updated. So a copy goes on with a copy
    of any network that the optimizer has served, with the same bits. What tells a copy are the values, of which not all
    may have changed between; other parameters start anew. (`copy.copy` makes an optimizer that shares the states, with
    settings of its own; that of a `ClipNorm` shares the optimizer.)

    Attributes
    ----------
    name : str
        What `make_optimizer` and `fit` know it by.
    lr : float
        Learning rate, at least 0. Like the other settings it may be changed between steps, and is checked where it is.
    """

    name: ClassVar[str]
    lr: float
    _states: States = field(default_factory=States, init=False, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._checked(name, value) if name in self.__match_args__ else value)

    def _checked(self, name: str, value: Any) -> Any:
        """A setting that is to be set; numbers become Python's."""
        if name == "decay_biases":
            return arguments.flag(value, name)
        if name == "clip_value":
            return None if value is None else arguments.number(value, name, low=0.0, open_low=True)
        high = 1.0 if name in ("momentum", "beta1", "beta2") else np.inf
        number = arguments.number(value, name, low=0.0, high=high)
        if name in ("beta1", "beta2") and number == 1.0:
            raise ValueError(f"{name} must be below 1, got 1")
        return number

    def _take(self, settings: Mapping[str, Any]) -> None:
        """Set all of another optimizer's settings at once, but for `name`."""
        vars(self).update({name: settings[name] for name in self.__match_args__})

    def update(self, param: Array, grad: Array, *, lr_factor: float = 1.0) -> None:
        """Update one parameter in place.

        Parameters
        ----------
        param : ndarray of float32 or float64
            The same object at every step: the state belongs to it. One of a single dimension is a bias, which has no
            weight decay without `decay_biases`.
        grad : ndarray, the shape and dtype of `param`
            The gradient of the loss with respect to it; it is only read.
        lr_factor : float
            What the learning rate is multiplied by for this step, as a schedule has it.

        Raises
        ------
        TypeError, ValueError
            A dtype, a shape or a setting does not fit.
        """
        if not isinstance(param, np.ndarray):
            raise TypeError(f"param must be a NumPy array, got {type(param).__name__}")
        lr = arguments.number(self.lr, "lr", low=0.0) * lr_factor  # which the kernel checks
        with deferred_signals():
            known = self._states.get(param)
            state = known or self._states.find([param], self._arrays_per_parameter)[0]
            self._apply(param, grad, state.arrays, state.steps + 1, lr)
            state.steps += 1
            if known is None:
                self._states.keep([param], [state])

    def _rates(self, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """The learning rates of steps with these factors, checked: a product may be too large."""
        lr = arguments.number(self.lr, "lr", low=0.0)
        arguments.number(lr * max(factors.tolist()), "lr", low=0.0)
        return lr * factors

    def group(self, params: Sequence[Array]) -> ParameterGroup:
        """Parameters to be updated together, in each step of a plan; their state is this optimizer's."""
        states = self._states.find(params, self._arrays_per_parameter)
        if len({len(state.arrays) for state in states}) > 1:
            raise ValueError("optimizer has state for some parameters, from other settings: take a fresh one")
        rule, _ = self._hyperparameters(len(states[0].arrays), 1, self._rates(ONE))
        return ParameterGroup(self, rule, params, states)

    def fresh(self) -> Self:
        """Return an optimizer with the same settings and no state."""
        return replace(self)

    def settings(self) -> dict[str, Any]:
        """Return the name and the settings, as `make_optimizer` takes them."""
        return {"name": self.name} | {name: getattr(self, name) for name in self.__match_args__}

    @property
    @abstractmethod
    def _arrays_per_parameter(self) -> int:
        """How many arrays the kernel keeps for a parameter; they start at zero."""

    @abstractmethod
    def _apply(self, param: Array, grad: Array, arrays: tuple[Array, ...], step: int, lr: float) -> None:
        """Call the kernel; `step` is 1 at the first update."""

    @abstractmethod
    def _hyperparameters(self, arrays: int, step: int, rates: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
        """The rule and its hyperparameters at the steps from `step` on, for parameters with `arrays` state arrays."""


def _decay_of(param: Array, rule: SGD | Adam) -> float:
    """The weight decay of a parameter."""
    return rule.weight_decay if rule.decay_biases or param.ndim > 1 else 0.0


def _clipped(grad: Array, clip_value: float | None) -> Array:
    """A gradient as the kernel gets it."""
    if clip_value is None:
        return grad
    clipped = arguments.as_floats(grad, "grad").copy()
    clip_by_value([clipped], clip_value)
    return clipped


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer updates together, by one rule, and its state for each."""

    optimizer: Optimizer
    rule: str
    params: Sequence[Array]
    states: list[State]

    def update(self, network: int) -> Update:
        """The phase that updates the parameters, those of a network of the plan."""
        rule: Any = self.optimizer
        return Update(network, self.rule, getattr(rule, "max_norm", None), rule.clip_value, rule.decay_biases)

    def hyperparameters(self, factors: NDArray[np.float64]) -> Array | list[Array]:
        """The rule's hyperparameters at the next updates, as `Batches` has them; `factors` has one for each."""
        optimizer, steps = self.optimizer, [state.steps for state in self.states]
        count, rates = len(self.states[0].arrays), optimizer._rates(factors)
        tables = {n: optimizer._hyperparameters(count, n + 1, rates)[1] for n in set(steps)}
        return tables.popitem()[1] if len(tables) == 1 else [tables[n] for n in steps]

    def advance(self, steps: int) -> None:
        """Take note that `steps` updates were done."""
        if not self.is_kept:
            self.keep()
        for state in self.states:
            state.steps += steps

    @property
    def is_kept(self) -> bool:
        """Whether the states are the optimizer's: before the first update they are not, as a fit may be refused."""
        return self.optimizer._states.get(self.params[0]) is self.states[0]

    def keep(self) -> None:
        """Make the states the optimizer's."""
        self.optimizer._states.keep(self.params, self.states)

    def release(self) -> None:
        """Undo that, once the states are as they were then."""
        self.optimizer._states.release(self.params, self.states)


@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and weight decay if wanted (`gemmlet.kernels.sgd_update`).

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.
    momentum : float, within [0, 1]
    nesterov : bool
        Nesterov's form of momentum (Sutskever et al., 2013), which needs `momentum` above 0.
    weight_decay : float
        Added to the gradient as ``weight_decay * param``, after it is clipped.
    decay_biases : bool
        Whether biases decay too, as in PyTorch. By default weights alone do: a bias is one number per unit, which adds
        little to what a network can learn by heart.
    clip_value : float, above 0, optional
        Each number of a gradient is limited to ±`clip_value` first (PyTorch's ``clip_grad_value_``); NaN stays NaN. A
        change counts from the next `fit`, as one of `decay_biases` does.
    """

    name = "sgd"

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_biases: bool = False
    clip_value: float | None = None

    def _checked(self, name: str, value: Any) -> Any:
        checked = arguments.flag(value, name) if name == "nesterov" else super()._checked(name, value)
        if (name == "nesterov" and checked and not self.momentum) or (
            name == "momentum" and self.nesterov and not checked
        ):
            raise ValueError("nesterov needs a momentum above 0")
        return checked

    @property
    def _arrays_per_parameter(self) -> int:
        return 1 if self.momentum else 0

    def _apply(self, param: Array, grad: Array, arrays: tuple[Array, ...], step: int, lr: float) -> None:
        grad, decay = _clipped(grad, self.clip_value), _decay_of(param, self)
        kernels.sgd_update(
            param, grad, *arrays, lr=lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=decay
        )

    def _hyperparameters(self, arrays: int, step: int, rates: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
        settings = self.momentum, self.nesterov, self.weight_decay
        rule, first = arguments.sgd_hyperparameters(arrays > 0, float(rates[0]), *settings)
        if len(rates) == 1:
            return rule, np.array([first])
        numbers = np.empty((len(rates), len(first)))
        numbers[:] = first
        numbers[:, OPTIMIZER_RULES[rule].hyperparameters.index("lr")] = rates
        return rule, numbers


@dataclass
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015; `gemmlet.kernels.adam_update`).

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.
    beta1, beta2 : float, within [0, 1)
        Decay of the two moments.
    eps : float
        Added to the root of the second moment.
    weight_decay : float
        Added to the gradient as ``weight_decay * param``, after it is clipped.
    decay_biases, clip_value
        As in `SGD`.
    """

    name = "adam"
    _kernel = staticmethod(kernels.adam_update)
    _decoupled: ClassVar[bool] = False

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_biases: bool = False
    clip_value: float | None = None

    @property
    def _arrays_per_parameter(self) -> int:
        return 2

    def _apply(self, param: Array, grad: Array, arrays: tuple[Array, ...], step: int, lr: float) -> None:
        settings = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "weight_decay": _decay_of(param, self)}
        self._kernel(param, _clipped(grad, self.clip_value), *arrays, step=step, lr=lr, **settings)

    def _hyperparameters(self, arrays: int, step: int, rates: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
        settings = self.beta1, self.beta2, self.eps, self.weight_decay, self._decoupled
        first = arguments.adam_hyperparameters(step, float(rates[0]), *settings)  # which checks them, too
        return "adam", adam_table(step, rates, *settings) if len(rates) > 1 else np.array([first])


@dataclass
class AdamW(Adam):
    """AdamW (Loshchilov and Hutter, 2019; `gemmlet.kernels.adamw_update`).

    Parameters
    ----------
    lr, beta1, beta2, eps
        As in `Adam`.
    weight_decay : float
        Each step multiplies the parameter by ``1 - lr * weight_decay``.
    decay_biases, clip_value
        As in `SGD`.
    """

    name = "adamw"
    _kernel = staticmethod(kernels.adamw_update)
    _decoupled: ClassVar[bool] = True

    weight_decay: float = 0.01


class ClipNorm(Optimizer):
    """An optimizer whose gradients are clipped by norm first (Pascanu et al., 2013).

    Where the Euclidean norm of all gradients of a network together is above `max_norm`, `fit` scales them down to it.
    `update` knows one gradient, and clips by its norm. A norm that is not finite scales nothing. The other settings are
    the optimizer's: ``clipped.lr`` is ``clipped.optimizer.lr``; its `clip_value` comes after. A change of `max_norm`
    counts from the next `fit`.

    Parameters
    ----------
    optimizer : str or Optimizer
    max_norm : float, above 0

    Raises
    ------
    TypeError, ValueError
        An argument does not fit.

    Notes
    -----
    Clipping needs all gradients before the first update. On the backends `cpu` and `cuda`, whose own executors never
    write them to memory, `fit` trains with the reference executor then: slower, and a mini-batch a call.
    """

    def __init__(self, optimizer: str | Optimizer, max_norm: float) -> None:
        self.optimizer, self.max_norm = as_optimizer(optimizer), max_norm
        if isinstance(self.optimizer, ClipNorm):
            self.max_norm = min(self.max_norm, self.optimizer.max_norm)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "optimizer":
            vars(self)[name] = as_optimizer(value)
        elif name == "max_norm":
            vars(self)[name] = arguments.number(value, name, low=0.0, open_low=True)
        else:
            setattr(self.optimizer, name, value)

    def __repr__(self) -> str:
        return f"ClipNorm({self.optimizer!r}, {self.max_norm})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipNorm) and (self.optimizer, self.max_norm) == (other.optimizer, other.max_norm)

    __hash__ = None  # type: ignore[assignment]

    @property
    def _arrays_per_parameter(self) -> int:
        return self.optimizer._arrays_per_parameter

    def _apply(self, param: Array, grad: Array, arrays: tuple[Array, ...], step: int, lr: float) -> None:
        clipped = arguments.as_floats(grad, "grad").copy()
        clip_by_norm([clipped], self.max_norm)
        self.optimizer._apply(param, clipped, arrays, step, lr)

    def _hyperparameters(self, arrays: int, step: int, rates: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
        return self.optimizer._hyperparameters(arrays, step, rates)

    def fresh(self) -> Self:
        return type(self)(self.optimizer.fresh(), self.max_norm)

    def settings(self) -> dict[str, Any]:
        return self.optimizer.settings() | {"max_norm": self.max_norm}

    def _take(self, settings: Mapping[str, Any]) -> None:
        self.optimizer._take(settings)
        self.max_norm = settings["max_norm"]


OPTIMIZERS: dict[str, type[SGD] | type[Adam]] = {kind.name: kind for kind in (SGD, Adam, AdamW)}


def make_optimizer(name: str, *, max_norm: float | None = None, **settings: Any) -> Optimizer:
    """Return a new optimizer by its name.

    Parameters
    ----------
    name : str
        ``"sgd"``, ``"adam"`` or ``"adamw"``.
    max_norm : float, optional
        Clips gradients by norm, see `ClipNorm`.
    **settings
        What `SGD`, `Adam` or `AdamW` take: ``lr=0.01``, say.

    Raises
    ------
    TypeError, ValueError
        There is no such optimizer or setting, or its value does not fit.
    """
    kind = OPTIMIZERS[checks.choice(name, "optimizer", OPTIMIZERS)]
    known = [f.name for f in fields(kind) if f.init]
    for setting in settings:
        if setting not in known:
            raise TypeError(f"optimizer {name!r} has no setting {setting!r}; it has {', '.join(known)}")
    optimizer = kind(**settings)
    return optimizer if max_norm is None else ClipNorm(optimizer, max_norm)


def as_optimizer(value: Any, name: str = "optimizer") -> Optimizer:
    """Return `value`, an optimizer or the name of one."""
    if isinstance(value, Optimizer):
        return value
    if isinstance(value, str):
        return make_optimizer(value)
    raise TypeError(f"{name} must be a name or an optimizer of gemmlet.nn, got {type(value).__name__}")
