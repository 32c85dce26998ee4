"""Networks as files: safetensors, the configuration as JSON in the metadata."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from .._files import replacing
from . import _checks as checks
from . import safetensors
from .dense import Dense, tensor_shapes
from .optimizers import Optimizer, State, States, as_optimizer, fingerprint, make_optimizer

Array = NDArray[Any]

# What networks are read from and written to: a path, or an open binary file.
Source = str | os.PathLike[str] | safetensors.Readable
Target = str | os.PathLike[str] | safetensors.Writable

_KEY = "gemmlet"

# The version of the configuration in the metadata; files without one are older. A higher one changes a field's meaning.
FORMAT = 1

# Prefix of the names of optimizers' states, which `Saved.load` passes over.
OPTIMIZER = "optimizer."
# Likewise of the parameters of the best epoch, in a checkpoint.
BEST = "best."


def named_tensors(dense: Dense, prefix: str = "") -> dict[str, Array]:
    """Return the parameters by name: ``<prefix>0.weight``, ``<prefix>0.bias`` and so on."""
    named = enumerate(layer.tensors() for layer in dense.layers)
    return {f"{prefix}{i}.{name}": array for i, tensors in named for name, array in tensors.items()}


def expected_shapes(
    widths: Sequence[int], prefix: str = "", config: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `named_tensors` gives for a network of these widths and settings."""
    return {f"{prefix}{name}": shape for name, shape in tensor_shapes(widths, config).items()}


def header(kind: str, config: dict[str, Any], extra: dict[str, Any] | None = None) -> dict[str, str]:
    """Return the metadata of a file: the configuration of a network as JSON, and `extra` beside it."""
    content = {"format": FORMAT, "network": kind, "config": config} | ({} if extra is None else {"extra": extra})
    return {_KEY: json.dumps(content, allow_nan=False)}


def parsed_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what `header` has put into metadata; raise `ValueError` where there is no such thing."""
    content = safetensors.parse_json(metadata.get(_KEY, "null"))
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError("it holds no network of gemmlet")
    return content


def write(
    file: Target, kind: str, config: dict[str, Any], tensors: dict[str, Array], extra: dict[str, Any] | None = None
) -> None:
    """Write a network to `file`: to a path whole or not at all. `extra` is JSON beside the configuration: streams, say.

    JSON has no NaN and no infinity: they are a `ValueError` in `config` and `extra`.
    """
    metadata = header(kind, config, extra)
    if not isinstance(file, str | os.PathLike):
        try:
            safetensors.dump(file, tensors, metadata)
            if callable(flush := getattr(file, "flush", None)):
                flush()  # what cannot be written is said here, not when somebody closes the file
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = _name(file)
            raise
        return
    with replacing(Path(file)) as temporary, open(temporary, "wb") as opened:
        safetensors.dump(opened, tensors, metadata)


def read(file: Source, kind: str) -> tuple[dict[str, Any], dict[str, Array], dict[str, Any]]:
    """Return the configuration, the tensors, and what else was written as JSON, of the network of this kind in `file`.

    Raises
    ------
    OSError
        The file is missing or cannot be read.
    ValueError
        It is corrupt, of a newer gemmlet, or holds something else; the message names it.
    """
    if not isinstance(file, str | os.PathLike):
        safetensors.check_has(file, "read")
    with errors_name(file, kind):
        if isinstance(file, str | os.PathLike):
            with open(file, "rb") as opened:
                metadata, tensors = safetensors.load(opened)
        else:
            metadata, tensors = safetensors.load(file)
        found = parsed_header(metadata)
        version = checks.whole_number(found.get("format", 0), "format", 0)
    if version > FORMAT:
        raise ValueError(
            f"{_name(file)} was written by a newer gemmlet, in format {version}; this one reads up to {FORMAT}"
        )
    with errors_name(file, kind):
        if found.get("network") != kind:
            raise ValueError(f"it holds a {found.get('network')}")
        extra = found.get("extra", {})
        if not isinstance(extra, dict):
            raise ValueError("what it has besides the network is no JSON object")
        return found["config"], tensors, extra


@contextmanager
def errors_name(file: Source, kind: str) -> Iterator[None]:
    """Turn the errors that a corrupt or foreign file causes into a `ValueError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # reading has failed, not opening
            error.filename = _name(file)
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{_name(file)} is corrupt, or no file of a gemmlet {kind}: {error}") from error


def _name(file: Source | Target) -> str:
    return os.fspath(file) if isinstance(file, str | os.PathLike) else str(getattr(file, "name", "the file"))


def check_tensors(tensors: dict[str, Array], shapes: dict[str, tuple[int, ...]], dtype: np.dtype[Any]) -> None:
    """Raise `ValueError` unless just the tensors of these shapes are there, all of `dtype`."""
    if tensors.keys() != shapes.keys():
        raise ValueError(f"it has the tensors {sorted(tensors)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise ValueError(
                f"tensor {name!r} is {tensors[name].dtype} of shape {tensors[name].shape}, expected {dtype} of {shape}"
            )


# An optimizer in a file: its settings, and its states by the names of the parameters.
Described = tuple[dict[str, Any], dict[str, State]]


def optimizers_of(tensors: dict[str, Array], extra: dict[str, Any]) -> dict[str, Described]:
    """The optimizers that were saved with a network, by the arguments of `fit`."""
    found: dict[str, Described] = {}
    for argument, optimizer in extra.get("optimizers", {}).items():
        states = {}
        for name, steps in optimizer["steps"].items():
            value, arrays = tensors[name], list[Array]()
            while (array := tensors.get(f"{OPTIMIZER}{name}.{len(arrays)}")) is not None:
                arrays.append(array)
            if any((array.shape, array.dtype) != (value.shape, value.dtype) for array in arrays):
                raise ValueError(f"the optimizer's state of {name} has another shape or dtype than {name}")
            count = checks.whole_number(steps, "steps", 0)
            states[name] = State(value.shape, value.dtype, tuple(arrays), count, fingerprint(value))
        found[argument] = optimizer_of(optimizer["settings"]).settings(), states
    return found


def optimizer_of(settings: Mapping[str, Any]) -> Optimizer:
    """The optimizer of these settings in a file. Those of older files that decay weights decay biases too."""
    return make_optimizer(**{"decay_biases": settings.get("weight_decay", 0.0) > 0, **settings})


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
    _stream_names: ClassVar[tuple[str, ...]]  # of the attributes, without their underscore
    # JSON that checkpoints have besides, of whoever calls `fit`.
    _notes: Mapping[str, Any] = MappingProxyType({})
    # The optimizer of `partial_fit`, once that was called.
    _of_partial_fit: Optimizer | None = None

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """The arguments of the constructor, but for those above."""

    @abstractmethod
    def _parts(self) -> dict[str, Dense]:
        """All stacks of layers, by the prefix of their tensors' names."""

    def _trained(self, arguments: Collection[str]) -> dict[str, list[dict[str, Array]]]:
        """What each optimizer among the arguments of `fit` updates: of each network the parameters by name."""
        return {"optimizer": [named_tensors(self._parts()[""])]}

    def _streams(self) -> dict[str, np.random.Generator]:
        """The random streams, by name."""
        return {name: getattr(self, f"_{name}") for name in self._stream_names}

    def _identity(self) -> dict[str, Any]:
        """What two networks must share for one to go on with the other's checkpoint."""
        return self._config() | {"dtype": str(self.dtype), "seed": self.seed}

    def _saved_config(self) -> dict[str, Any]:
        """The configuration in files: what `_identity` has, defaults of `fit`, and the steps that were taken."""
        return self._identity() | {
            "default_optimizer": self.default_optimizer.settings(),
            "default_batch_size": self.default_batch_size,
            "steps": self.steps,
        }

    @staticmethod
    @abstractmethod
    def _widths(config: dict[str, Any]) -> dict[str, Sequence[int]]:
        """The widths of `_parts`, from input to output."""

    def save(self, file: Target, optimizer: Optimizer | None = None) -> None:
        """Write the network to a safetensors file, to a path whole or not at all.

        Its random streams are written too: after `load`, `fit` goes on with the same order of samples. With the
        optimizer and `load_optimizers` it goes on with the same bits, but for an `lr_schedule`, which begins anew.

        Parameters
        ----------
        file : path or binary file
            An existing file is replaced, a symbolic link's target; permissions are kept. A file that is open is
            flushed. The configuration is in the metadata, under ``gemmlet``, as JSON.
        optimizer : Optimizer, optional
            One that `fit` was given: its settings and its state are written, for `load_optimizers`. By default that
            of `partial_fit`, if there was one, which goes on after `load`.

        Raises
        ------
        OSError
            The file cannot be written, or is no plain file.
        """
        rule = self._of_partial_fit if optimizer is None else optimizer
        self._write(file, {} if rule is None else {"optimizer": rule})

    def _write(
        self,
        file: Target,
        optimizers: Mapping[str, Optimizer],
        fit: dict[str, Any] | None = None,
        best: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        """Write the network, optimizers by the arguments of `fit`, and what a checkpoint has besides."""
        config = self._saved_config()
        tensors, shapes = dict[str, Array](), dict[str, tuple[int, ...]]()
        for prefix, dense in self._parts().items():
            tensors |= named_tensors(dense, prefix)
            shapes |= expected_shapes(self._widths(config)[prefix], prefix, config)
        check_tensors(tensors, shapes, self.dtype)  # somebody may have set them
        described = {}
        for argument, networks in self._trained(optimizers).items() if optimizers else ():
            optimizer, by_name = as_optimizer(optimizers[argument], argument), dict[str, State]()
            for params in networks:
                states = optimizer._states.find(list(params.values()), optimizer._arrays_per_parameter)
                by_name |= zip(params, states, strict=True)
            for name, state in by_name.items():
                tensors |= {f"{OPTIMIZER}{name}.{i}": array for i, array in enumerate(state.arrays)}
            steps = {name: state.steps for name, state in by_name.items()}
            described[argument] = {"settings": optimizer.settings(), "steps": steps}
        tensors |= {f"{BEST}{name}": array for name, array in best.items()}
        streams = {name: rng.bit_generator.state for name, rng in self._streams().items()}
        extra = {"streams": streams, "optimizers": described}
        if self._of_partial_fit is not None:
            extra["partial_fit"] = optimizers.get("optimizer") is self._of_partial_fit
        if fit is not None:
            extra |= {"fit": fit, "notes": dict(self._notes)}
        write(file, type(self).__name__, config, tensors, extra)

    @classmethod
    def load(cls, file: Source) -> Self:
        """Read a network that `save` has written.

        Parameters
        ----------
        file : path or binary file

        Raises
        ------
        OSError
            The file is missing or cannot be read.
        ValueError
            It is corrupt, of a newer gemmlet, or holds something else; the message names it.
        """
        return cls._made(file, *read(file, cls.__name__), best=True)

    @classmethod
    def load_optimizers(cls, file: Source) -> dict[str, Optimizer]:
        """Read the optimizers that `save`, or a `fit` with checkpoints, has written with a network.

        Parameters
        ----------
        file : path or binary file

        Returns
        -------
        dict
            By the arguments of `fit`, ``{"optimizer": Adam(...)}`` say. They go on with the network that `load` reads
            from the same file, as copies of optimizers do: ``model.fit(x, y, **MLP.load_optimizers(path))``.

        Raises
        ------
        OSError
            The file is missing or cannot be read.
        ValueError
            It is corrupt, of a newer gemmlet, holds something else, or has no optimizer; the message names it.
        """
        _, tensors, extra = read(file, cls.__name__)
        found = {}
        with errors_name(file, cls.__name__):
            for argument, (settings, states) in optimizers_of(tensors, extra).items():
                found[argument] = make_optimizer(**settings)
                found[argument]._states = States(states.values())
        if not found:
            raise ValueError(f"{_name(file)} has no optimizer: it was saved without one")
        return found

    @classmethod
    def _made(
        cls,
        file: Source,
        config: dict[str, Any],
        tensors: dict[str, Array],
        extra: dict[str, Any],
        *,
        best: bool = False,
    ) -> Self:
        """The network that was read from a file; with the parameters of the best epoch, if wanted and there."""
        with errors_name(file, cls.__name__):
            # Perceptrons that were saved before there were averages have neither.
            steps = checks.whole_number(config.pop("steps") if "ema_decay" in config else 0, "steps", 0)
            shapes: dict[str, tuple[int, ...]] = {}
            for prefix, widths in cls._widths(config).items():
                shapes |= expected_shapes(widths, prefix, config)
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith((OPTIMIZER, BEST))}
            if best and (kept := {n.removeprefix(BEST): t for n, t in tensors.items() if n.startswith(BEST)}):
                own = kept
            check_tensors(own, shapes, np.dtype(checks.choice(config["dtype"], "dtype", ("float32", "float64"))))
            network = cls(**{**config, "default_optimizer": optimizer_of(config["default_optimizer"])})
            streams = network._streams()
            for name, state in extra.get("streams", {}).items():
                streams[name].bit_generator.state = state
            if extra.get("partial_fit") is True:
                settings, states = optimizers_of(tensors, extra)["optimizer"]
                network._of_partial_fit = make_optimizer(**settings)
                network._of_partial_fit._states = States(states.values())
        for prefix, dense in network._parts().items():
            copy_into(dense, own, prefix)
        network.steps = steps
        return network
