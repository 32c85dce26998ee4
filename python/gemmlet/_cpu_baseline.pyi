"""The compiled kernels; the modules of the other instruction sets have the same functions."""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

compiler: str
vector_bytes: int

def activations() -> list[str]: ...
def row_functions() -> list[str]: ...
def losses() -> list[str]: ...
def row_losses() -> list[str]: ...
def optimizer_rules() -> list[str]: ...
def set_num_threads(count: int) -> None: ...
def get_num_threads() -> int: ...
def fma_loop(is_double: bool, steps: int) -> float: ...
def mark() -> int: ...
def linear(
    x: NDArray[Any],
    w: NDArray[Any],
    b: NDArray[Any] | None,
    activation: int,
    parameter: float,
    y: NDArray[Any],
    z: NDArray[Any] | None,
) -> None: ...
def column_sum(x: NDArray[Any], out: NDArray[Any]) -> None: ...
def activation_forward(activation: int, x: NDArray[Any], parameter: float, out: NDArray[Any]) -> None: ...
def activation_backward(
    activation: int, grad_y: NDArray[Any], saved: NDArray[Any], parameter: float, out: NDArray[Any]
) -> None: ...
def row_function_forward(function: int, x: NDArray[Any], out: NDArray[Any]) -> None: ...
def row_function_backward(function: int, grad_y: NDArray[Any], y: NDArray[Any], out: NDArray[Any]) -> None: ...
def row_loss(loss: int, logits: NDArray[Any], labels: NDArray[Any], smoothing: float, out: NDArray[Any]) -> float: ...
def elementwise_loss(
    loss: int, prediction: NDArray[Any], target: NDArray[Any], parameter: float, out: NDArray[Any]
) -> float: ...
def optimizer_update(
    rule: int, param: NDArray[Any], grad: NDArray[Any], state: Sequence[NDArray[Any]], scalars: Sequence[float]
) -> None: ...
def formula(number: int, parameter: float, takes_parameter: bool, needs_x: bool, unit_interval: bool) -> object: ...
def quick(kind: str, formula: object) -> Callable[..., Any]: ...
def train_mlp(
    layers: Sequence[tuple[Any, ...]],
    x: NDArray[Any],
    row_start: NDArray[Any] | None,
    columns: NDArray[Any] | None,
    skip_zeros: bool,
    targets: NDArray[Any],
    loss: int,
    loss_parameter: float,
    row_weight: float,
    order: NDArray[Any],
    batch: int,
    rule: int,
    scalars: NDArray[Any],
    loss_sum: float,
) -> tuple[float, int]: ...
def train_gan(
    generator: Sequence[tuple[Any, ...]],
    discriminator: Sequence[tuple[Any, ...]],
    x: NDArray[Any],
    scale: float,
    shift: float,
    noise: NDArray[Any],
    real_target: float,
    non_saturating: bool,
    order: NDArray[Any],
    batch: int,
    generator_rule: int,
    generator_scalars: NDArray[Any],
    discriminator_rule: int,
    discriminator_scalars: NDArray[Any],
    decay: NDArray[Any],
    loss_sums: tuple[float, float],
) -> tuple[float, float]: ...
