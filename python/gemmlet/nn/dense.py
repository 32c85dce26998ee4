"""A stack of linear layers with activations between them: what the MLP and the GAN are made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import _arguments as arguments
from .. import kernels
from .._memory import aligned_copy, available
from ..formulas.activations import ACTIVATIONS
from . import _checks as checks

Array = NDArray[Any]

# Bytes of parameters and states below which a network is made without a look at the memory that is available.
_ALWAYS_THERE = 1 << 26


@dataclass(frozen=True)
class Layer:
    """One linear layer with its activation: ``y = activation(x @ weight + bias)``.

    Attributes
    ----------
    weight : ndarray, shape (in_features, out_features)
    bias : ndarray, shape (out_features,)
    activation : str or None
    activation_parameter : float or None
        The activation's own number; None is its default.
    """

    weight: Array
    bias: Array
    activation: str | None
    activation_parameter: float | None

    def tensors(self) -> dict[str, Array]:
        """The parameters by name, in their order."""
        return {"weight": self.weight, "bias": self.bias}

    def forward(self, x: Array) -> Array:
        """Return ``activation(x @ weight + bias)``."""
        number = self.activation_parameter
        y: Array = kernels.linear(x, self.weight, self.bias, self.activation, activation_parameter=number)
        return y


def tensor_shapes(widths: Sequence[int], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of `Dense`, by the number of the layer and the name in `Layer.tensors`.

    `config` is that of the network in a file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        shapes |= {f"{i}.weight": (before, after), f"{i}.bias": (after,)}
    return shapes


class Dense:
    """Linear layers one after the other, all hidden ones with the same activation.

    Parameters
    ----------
    widths : sequence of int
        From the input to the output, at least two.
    activation : str
        Of the hidden layers.
    output : str or None
        The activation of the last layer.
    dtype : numpy.dtype
    rng : numpy.random.Generator
        Draws the weights, uniformly within ±sqrt(6 / (in + out)) (Glorot and Bengio, 2010) or ±sqrt(6 / in) (He et al.,
        2015), as the activation's registry entry says. Biases start at 0.
    activation_parameter : float, optional
        The number that the hidden activation takes.

    Raises
    ------
    MemoryError
        The parameters and an optimizer's state for them are more than there is memory.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str,
        output: str | None,
        dtype: np.dtype[Any],
        rng: np.random.Generator,
        activation_parameter: float | None = None,
    ) -> None:
        _check_memory(widths, dtype)
        self.layers: list[Layer] = []
        last = len(widths) - 2
        for i, (before, after) in enumerate(pairwise(widths)):
            name = activation if i < last else output
            he = name is not None and ACTIVATIONS[name].initialization == "he"
            limit = math.sqrt(6.0 / (before if he else before + after))
            # Drawn in float64 for either dtype, so that both start from the same numbers.
            weight = aligned_copy(rng.uniform(-limit, limit, (before, after)).astype(dtype))
            bias = np.zeros(after, dtype)
            self.layers.append(Layer(weight, bias, name, activation_parameter if i < last else None))

    @property
    def parameters(self) -> list[Array]:
        """The arrays that training changes: weight and bias of each layer in turn."""
        return list(chain.from_iterable([layer.tensors().values() for layer in self.layers]))

    def copy(self) -> Self:
        """Return a network of the same parameters, in arrays of its own."""
        return self.with_parameters(aligned_copy)

    def with_parameters(self, move: Callable[[Array], Array]) -> Self:
        """Return the network with ``move(parameter)`` in place of each parameter."""
        there = copy.copy(self)
        there.layers = []
        for layer in self.layers:
            moved: dict[str, Any] = {name: move(array) for name, array in layer.tensors().items()}
            there.layers.append(replace(layer, **moved))
        return there

    def keep_changes(self, rounded: Dense) -> None:
        """Take the values of those parameters of `rounded` that are no longer this draw, rounded to its dtype."""
        for drawn, value in zip(self.parameters, rounded.parameters, strict=True):
            np.copyto(drawn, value, where=value != drawn.astype(value.dtype))

    def forward(self, x: Array, depth: int | None = None) -> Array:
        """Return the result of the last layer, or of the first `depth` ones."""
        for layer in self.layers[:depth]:
            x = layer.forward(x)
        return x


def _check_memory(widths: Sequence[int], dtype: np.dtype[Any]) -> None:
    parameters = sum((before + 1) * after for before, after in pairwise(widths))
    needed = 6 * parameters * dtype.itemsize  # with the two moments of Adam, and a copy of all that `fit` goes back to
    if needed > _ALWAYS_THERE and needed > (there := available()):
        raise MemoryError(
            f"layers of {', '.join(map(str, widths))} units have {parameters:,} parameters, which take "
            f"{needed / 1e9:,.1f} GB with an optimizer's state and a copy; {there / 1e9:,.1f} GB are available"
        )


def activation_name(value: Any, name: str = "activation") -> str:
    """Return `value`, the name of an activation."""
    return checks.choice(value, name, ACTIVATIONS)


def activation_number(activation: str, value: Any, name: str = "activation_parameter") -> float | None:
    """Return the number for an activation that takes one, checked; None stands for its default."""
    if value is None:
        return None
    if ACTIVATIONS[activation].parameter is None:
        raise ValueError(f"{name} was given, but the activation {activation!r} takes none")
    return arguments.number(value, name, low=0.0, open_low=True)
