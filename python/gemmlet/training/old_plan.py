"""What a call of fused training does: the networks, their samples and their updates, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class FusedLayer(NamedTuple):
    """One layer as fused training takes it: parameters, optimizer state of each, and moving averages or None."""

    weight: Array
    bias: Array
    activation: str | None
    activation_parameter: float
    weight_state: tuple[Array, ...]
    bias_state: tuple[Array, ...]
    weight_average: Array | None = None
    bias_average: Array | None = None


class Feed(NamedTuple):
    """Samples as fused training takes them: rows (n, features), uint8 or float; or a sparse matrix's three arrays.

    Rows may be on a GPU, for a backend that computes there.
    """

    x: Array
    row_start: NDArray[np.int64] | None
    columns: NDArray[np.int32] | None
    skip_zeros: bool


class FusedNetwork(NamedTuple):
    """A stack of layers, and how it is updated: an optimizer's rule, and its numbers at each step, (steps, numbers)."""

    layers: Sequence[FusedLayer]
    rule: str
    scalars: NDArray[np.float64]


class MlpRun(NamedTuple):
    """What `train_mlp` does in one call: a step for each mini-batch of `order`.

    Attributes
    ----------
    network : FusedNetwork
        Its arrays are updated in place.
    feed : Feed
    targets : ndarray
        Of all samples: class indices, int64 of shape (n,), or numbers (n, outputs).
    loss : str
        ``"softmax_cross_entropy"`` or an elementwise one, whose sum over a row counts `row_weight` times.
    row_weight : float
    order : ndarray of int64
        Which samples; `batch` of them make a mini-batch, the last of which may be smaller.
    batch : int
    loss_sum : float
        What the losses of the samples are added to.
    meanwhile : callable or None
        A backend whose processor would only wait for a GPU calls it while it does: it prepares the next call, and
        raises nothing.
    """

    network: FusedNetwork
    feed: Feed
    targets: Any
    loss: str
    row_weight: float
    order: NDArray[np.int64]
    batch: int
    loss_sum: float
    meanwhile: Callable[[], None] | None = None


class GanRun(NamedTuple):
    """What `train_gan` does in one call: a step of each network, first the discriminator, for each batch of `order`.

    Attributes
    ----------
    generator, discriminator : FusedNetwork
        Their arrays, the generator's moving averages among them, are updated in place.
    feed : Feed
        Samples within [0, 1], which the discriminator sees as ``scale * x + shift``.
    scale, shift : float
    noise : ndarray, shape (len(order), latent_dim)
    real_target : float
        The discriminator's target for samples; for what is generated it is 0.
    non_saturating : bool
        Which of the two losses the generator has.
    order, batch
        As in `MlpRun`.
    decay : ndarray of float64, shape (steps,)
        Of the moving averages.
    loss_sums : (float, float)
        What the losses of generator and discriminator are added to.
    meanwhile
        As in `MlpRun`.
    """

    generator: FusedNetwork
    discriminator: FusedNetwork
    feed: Feed
    scale: float
    shift: float
    noise: Array
    real_target: float
    non_saturating: bool
    order: NDArray[np.int64]
    batch: int
    decay: NDArray[np.float64]
    loss_sums: tuple[float, float]
    meanwhile: Callable[[], None] | None = None
