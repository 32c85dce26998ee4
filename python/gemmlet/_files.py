"""Atomic writes: a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what the block writes there replaces `path` if the block ends well.

    The name keeps the extension, from which writers of images tell the format. It is unique, so that several threads
    and processes may write the same file: the last one wins. The file gets the permissions of any new file.
    """
    temporary = path.with_name(f".{path.stem}-{os.urandom(4).hex()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
