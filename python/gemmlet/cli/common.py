"""What commands share: the backend and its threads, the data, and files of networks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import numpy as np

from .. import get_num_threads, nn, set_num_threads, use_backend
from ..backends import select
from ..data import Mnist, load_mnist
from . import info
from .errors import UserError

Network = TypeVar("Network", nn.MLP, nn.GAN)

# What a training leaves in its folder.
MODEL = "model.safetensors"


def use(backend: str | None, threads: int | None) -> None:
    """Put what ``--backend`` and ``--threads`` ask for to use, or raise `UserError`."""
    if threads is not None and not 1 <= threads <= 1024:
        raise UserError(f"--threads must be from 1 to 1,024, got {threads}")
    if backend is not None:
        try:
            use_backend(backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise info.backend_error("--backend", error) from error
    info.choose_backend()
    if threads is not None:
        set_num_threads(threads)
    _limit_blas(get_num_threads())


def _limit_blas(threads: int) -> None:
    """Limit NumPy's BLAS, which computes the matmuls of the backends numpy and numba.

    Without this it would ignore ``--threads`` and GEMMLET_NUM_THREADS, and what is said of threads would be wrong.
    """
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)


def backend_line() -> str:
    """What computes, and with how many threads."""
    description, threads = select.current().describe(), get_num_threads()
    return f"Backend: {description['backend']}, {description['isa']}, {threads} thread{'s' * (threads > 1)}"


def load_data(data_dir: Path | None) -> Mnist:
    """Load MNIST, or raise `UserError`."""
    try:
        return load_mnist(data_dir)
    except (OSError, ValueError) as error:
        raise UserError(str(error).replace("(data_dir)", "(--data-dir)")) from error
    except RuntimeError as error:  # the home directory of "~nobody"
        raise UserError(f"{'GEMMLET_DATA_DIR' if data_dir is None else '--data-dir'}: {error}") from error


def load_network(path: Path, network: type[Network]) -> Network:
    """Read a network from a file of `save`, from an ONNX file, or from a training's folder, or raise `UserError`."""
    file = path / MODEL if path.is_dir() else path
    try:
        if file.suffix == ".onnx" and issubclass(network, nn.MLP):
            return network.from_onnx(file)
        return network.load(file)
    except FileNotFoundError:
        hint = f", which gemmlet train leaves in {path}" if path.is_dir() else ""
        raise UserError(f"{file} does not exist{hint}") from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error


def load_digits_classifier(path: Path) -> nn.MLP:
    """Read a network that says of 28 × 28 images which digit they show, or raise `UserError`."""
    model = load_network(path, nn.MLP)
    if model.layers[0] != 784 or model.layers[-1] != 10 or model.output == "identity" or model.multi_label:
        raise UserError(f"{path} is {model}; expected a network from 784 pixels to the probabilities of ten digits")
    if not all(np.isfinite(array).all() for array in model.parameters):
        raise UserError(f"{path} has parameters that are not finite")
    return model


def check_picture_path(path: Path) -> None:
    """Raise `UserError` unless ``--out`` is where a picture can be written."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: expected a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.absolute().parent}")


def finite(value: float | None) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def percent(value: float | None) -> str:
    """Return a share as a percentage, and a dash for None."""
    return "-" if value is None else f"{value:.2%}"
