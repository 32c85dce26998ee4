"""``gemmlet info``."""

from __future__ import annotations

from ..backends import select
from .errors import UserError


def show() -> None:
    """Print what computes here: backend, ISA, threads and versions."""
    choose_backend()
    select.show_config()


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
