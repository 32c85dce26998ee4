"""``gemmlet info``."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .._environment import VARIABLES, read
from ..backends import select
from ..integrations.numpy import accelerate_numpy, replaced
from .errors import UserError

if TYPE_CHECKING:
    from ..backends.base import Backend


def show() -> None:
    """Print what computes here, which backends there are and why others are not, and the environment variables.

    `UserError` at the end if a variable asks for what is not there.
    """
    refused = None
    try:
        choose_backend()
        select.show_config()
    except UserError as error:
        refused = error
        print(f"No backend: {error}")
    print("\nBackends")
    _print_rows({name: _describe(name, in_use=None if refused else select.current()) for name in select.CHOICES})
    print("\nNumPy accelerated (python -m gemmlet program.py)")
    _print_rows({np.__version__: _accelerated()})
    print("\nEnvironment variables")
    _print_rows({name: f"{read(name) or 'not set'}: {text}" for name, text in VARIABLES.items()})
    if refused is not None:
        raise refused


def _print_rows(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for name, text in rows.items():
        indent = " " * (width + 4)
        lines = textwrap.wrap(text, 110 - len(indent), break_long_words=False, break_on_hyphens=False)
        print(f"  {name:<{width}}  " + f"\n{indent}".join(lines))


def _describe(name: str, in_use: Backend | None) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy's, where there is no GPU
            backend = select.load(name)
    except (ValueError, RuntimeError, ImportError) as error:
        return f"not here: {error}"
    return f"{'in use' if backend is in_use else 'ready'}, {backend.describe()['isa']}"


def _accelerated() -> str:
    """The functions of NumPy that are replaced on request, or why none are."""
    try:
        with accelerate_numpy():
            return ", ".join(name.removeprefix("numpy.") for name in replaced())
    except RuntimeError as error:
        return str(error)


def choose_backend() -> None:
    """Have the backend chosen, where that is still to be done.

    `UserError` if ``GEMMLET_BACKEND`` asks for one that is not there; without it, some backend always loads.
    """
    try:
        select.current()
    except (ValueError, RuntimeError, ImportError) as error:
        raise backend_error("GEMMLET_BACKEND", error) from error


def backend_error(origin: str, error: Exception) -> UserError:
    """Return what tells that the backend cannot be had, which `origin` asked for; or the variable that is to blame."""
    return UserError(str(error) if "GEMMLET_" in str(error) else f"{origin}: {error}")
