"""The folder that the option ``--out`` names, and the JSON files in it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import _files
from .errors import UserError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON; a NaN in it is an error, as JSON has none."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with _files.replacing(path) as temporary:
        temporary.write_text(text)


def check_folder(out: Path) -> None:
    """Raise unless `out` is a folder that can be written to, or can become one."""
    try:
        existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long, or a folder that is closed to us
        raise UserError(f"--out {out}: {error.strerror}") from error
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, expected a folder")
    try:
        _files.check_folder(existing)
    except OSError as error:
        raise UserError(f"--out {out}: {existing} cannot be written to ({error.strerror})") from error


def make_folder(out: Path, inside: str = ".") -> Path:
    """Return the folder `inside` the folder `out`, which is made unless it is there."""
    folder = out / inside
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: the folder {folder} cannot be made ({error.strerror})") from error
    return folder


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs out of the folder `out` while the block runs. The lock of a killed run goes with it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing to it; name another folder") from None
        except OSError:  # a network file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
