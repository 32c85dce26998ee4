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

    Raises
    ------
    UserError
        ``GEMMLET_BACKEND`` asks for one that is not there. Without it, some backend always loads.
    """
    try:
        select.current()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"GEMMLET_BACKEND: {error}") from error
