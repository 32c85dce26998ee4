"""What a case is: one piece of work, the implementations that do it, and the result that each must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """What the cases depend on."""

    quick: bool = False  # fewer shapes, and smaller ones
    data_dir: Path | None = None  # the folder with MNIST; None is GEMMLET_DATA_DIR, else the embedded sample


@dataclass(frozen=True)
class Prepared:
    """One implementation of a case, ready to run."""

    call: Call  # what is timed; it ends when the work is done, not when it has been queued
    result: Call  # does the same once and returns what is checked: arrays, in a tuple if there are several
    own_clock: bool = False  # whether the call returns the seconds that count, which are not all that it takes


Factory = Callable[[Any], Call | Prepared]


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    group: str
    name: str
    inputs: Callable[[], Any]  # draws the arguments, the same ones every time
    # By name, a function of the inputs that returns the call. It does all that is not to be timed.
    implementations: Mapping[str, Factory]
    exact: Callable[[Any], Any]  # a function of the inputs that returns the correct result, computed in float64
    # A result may be off by ``atol + rtol * abs(exact)``, element by element.
    rtol: float
    atol: float
    # The least work: floating-point operations of the matmuls, and bytes read and written, each array once. With them
    # goes the distance to the roofline; zeros where it makes no sense.
    flops: float = 0.0
    bytes: float = 0.0
    # How many of what one call does: times are given for one.
    units: int = 1
    unit: str = "call"
    labels: Mapping[str, Any] = field(default_factory=dict)  # for selecting rows: kernel, dtype and so on

    @property
    def key(self) -> str:
        """The row's key in tables and files."""
        return f"{self.group}: {self.name}"

    def prepare(self, implementation: str, inputs: Any) -> Prepared:
        """Return one implementation, ready to run on `inputs`."""
        made = self.implementations[implementation](inputs)
        return made if isinstance(made, Prepared) else Prepared(made, made)

    def error(self, result: Any, exact: Any) -> float:
        """Return the largest error over the tolerance: above 1, or NaN, the result is wrong."""
        results, expected = arrays(result), arrays(exact)
        if len(results) != len(expected):
            raise ValueError(f"{len(results)} results instead of {len(expected)}")
        worst = 0.0
        for got, wanted in zip(results, expected, strict=True):
            if got.shape != wanted.shape:
                raise ValueError(f"a result of shape {got.shape} instead of {wanted.shape}")
            if got.size:
                error = np.abs(got.astype(np.float64) - wanted) / (self.atol + self.rtol * np.abs(wanted))
                worst = max(worst, float(np.max(error))) if not np.isnan(error).any() else np.nan
        return worst


def arrays(result: Any) -> list[Array]:
    """Return results as a list of NumPy arrays."""
    return [np.asarray(one) for one in (result if isinstance(result, tuple | list) else (result,))]
