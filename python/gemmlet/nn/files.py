"""Networks as files: safetensors, the configuration as JSON in the metadata."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .._files import replacing
from . import _checks as checks
from .dense import Dense
from .optimizers import Optimizer, make_optimizer

Array = NDArray[Any]

_KEY = "gemmlet"


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "to save and load networks needs the package safetensors: pip install 'gemmlet[train]'"
        ) from None
    return safetensors


def named_tensors(dense: Dense, prefix: str = "") -> dict[str, Array]:
    """Return the parameters by name: ``<prefix>0.weight``, ``<prefix>0.bias`` and so on."""
    tensors = {}
    for i, layer in enumerate(dense.layers):
        tensors[f"{prefix}{i}.weight"] = layer.weight
        tensors[f"{prefix}{i}.bias"] = layer.bias
    return tensors


def expected_shapes(widths: Sequence[int], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `named_tensors` gives for a network of these widths."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        shapes[f"{prefix}{i}.weight"] = (before, after)
        shapes[f"{prefix}{i}.bias"] = (after,)
    return shapes


def write(path: str | os.PathLike[str], kind: str, config: dict[str, Any], tensors: dict[str, Array]) -> None:
    """Write a network to `path`, whole or not at all."""
    metadata = {_KEY: json.dumps({"network": kind, "config": config})}
    content = _safetensors().numpy.save(tensors, metadata)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the configuration and the tensors of the network of this kind at `path`.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is corrupt, or holds something else; the message names it.
    """
    safetensors = _safetensors()
    # Its own errors for a missing file do not name it.
    with open(path, "rb"):
        pass
    with errors_name(path, kind), safetensors.safe_open(path, framework="numpy") as file:
        header = json.loads((file.metadata() or {}).get(_KEY, "null"))
        if not isinstance(header, dict) or not isinstance(header.get("config"), dict):
            raise ValueError("it holds no network of gemmlet")
        if header.get("network") != kind:
            raise ValueError(f"it holds a {header.get('network')}")
        return header["config"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def errors_name(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turn the errors that a corrupt or foreign file causes into a `ValueError` that names it."""
    try:
        yield
    except (_safetensors().SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is corrupt, or no file of a gemmlet {kind}: {error}") from error


def check_tensors(tensors: dict[str, Array], shapes: dict[str, tuple[int, ...]], dtype: np.dtype[Any]) -> None:
    """Raise `ValueError` unless just the tensors of these shapes are there, all of `dtype`."""
    if tensors.keys() != shapes.keys():
        raise ValueError(f"it has the tensors {sorted(tensors)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise ValueError(
                f"tensor {name!r} is {tensors[name].dtype} of shape {tensors[name].shape}, expected {dtype} of {shape}"
            )


def copy_into(dense: Dense, tensors: dict[str, Array], prefix: str = "") -> None:
    """Set the parameters from tensors that `check_tensors` has passed."""
    for name, array in named_tensors(dense, prefix).items():
        array[...] = tensors[name]


class Saved(ABC):
    """Base of the networks that are saved to files."""

    dtype: np.dtype[Any]
    seed: int
    steps: int
    default_optimizer: Optimizer
    default_batch_size: int

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """The arguments of the constructor, but for those above."""

    @abstractmethod
    def _parts(self) -> dict[str, Dense]:
        """All stacks of layers, by the prefix of their tensors' names."""

    @staticmethod
    @abstractmethod
    def _widths(config: dict[str, Any]) -> dict[str, Sequence[int]]:
        """The widths of `_parts`, from input to output."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to a safetensors file, whole or not at all.

        Parameters
        ----------
        path : path
            An existing file is replaced. The configuration is in the metadata, under ``gemmlet``, as JSON.

        Raises
        ------
        ImportError
            The package safetensors is missing: ``pip install 'gemmlet[train]'``.
        OSError
            The file cannot be written.
        """
        config = self._config() | {
            "dtype": str(self.dtype),
            "seed": self.seed,
            "default_optimizer": self.default_optimizer.settings(),
            "default_batch_size": self.default_batch_size,
            "steps": self.steps,
        }
        tensors: dict[str, Array] = {}
        for prefix, dense in self._parts().items():
            tensors |= named_tensors(dense, prefix)
        write(path, type(self).__name__, config, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a network that `save` has written.

        Raises
        ------
        ImportError
            The package safetensors is missing: ``pip install 'gemmlet[train]'``.
        OSError
            The file is missing or cannot be read.
        ValueError
            It is corrupt or holds something else; the message names it.
        """
        config, tensors = read(path, cls.__name__)
        with errors_name(path, cls.__name__):
            # Perceptrons that were saved before there were averages have neither.
            steps = checks.whole_number(config.pop("steps") if "ema_decay" in config else 0, "steps", 0)
            shapes: dict[str, tuple[int, ...]] = {}
            for prefix, widths in cls._widths(config).items():
                shapes |= expected_shapes(widths, prefix)
            check_tensors(tensors, shapes, np.dtype(config["dtype"]))
            network = cls(**{**config, "default_optimizer": make_optimizer(**config["default_optimizer"])})
        for prefix, dense in network._parts().items():
            copy_into(dense, tensors, prefix)
        network.steps = steps
        return network
