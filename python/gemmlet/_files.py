"""Atomic writes: a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

# A temporary file that is older than this, in seconds, and that nobody has locked is a killed run's.
_STALE_SECONDS = 60.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; what the block writes there replaces `path` if the block ends well.

    The file has the extension of `path`, from which writers of images tell the format, and a name of its own, so that
    several threads and processes may write the same file: the last one wins. A symbolic link stays, and its target is
    replaced. An existing file's permissions are kept, a new one gets those of any new file. All is on the disk before
    it takes the name: a power failure leaves the old file or the new one. What killed runs left beside it is removed.

    Raises
    ------
    OSError
        The file cannot be written, or `path` is no plain file. The error names `path`.
    """
    target = temporary = Path(path)
    try:
        target = Path(os.path.realpath(path))
        # No longer than a file system allows: a path that can be written directly has a temporary file, too.
        stem, suffix = f".{target.stem[:40]}-", target.suffix if len(target.suffix) <= 16 else ""
        temporary = target.with_name(f"{stem}{os.urandom(4).hex()}.tmp{suffix}")
        existing = _existing(target)
        try:
            with open(temporary, "xb") as held:
                # Some network file systems have no locks; nothing counts as stale there.
                with contextlib.suppress(OSError):
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if existing is not None:
                    # What others may not read they may not read while it is written, either.
                    with contextlib.suppress(PermissionError):
                        temporary.chmod(0o600)
                _remove_stale(target.parent, rf"{re.escape(stem)}[0-9a-f]{{8}}\.tmp{re.escape(suffix)}")
                yield temporary
                _sync(temporary)
                if existing is not None:
                    # Only root can give a file away; a file system without permissions has none to keep.
                    with contextlib.suppress(PermissionError):
                        os.chown(temporary, existing.st_uid, existing.st_gid)
                    with contextlib.suppress(PermissionError):
                        temporary.chmod(stat.S_IMODE(existing.st_mode) & 0o777)
                os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        # That the disk is full comes without a name, and the temporary name means nothing to anybody.
        if error.errno is None or error.filename not in (None, os.fspath(temporary), os.fspath(target)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    with contextlib.suppress(OSError):  # not every file system has it
        _sync(target.parent)


def check_replaceable(path: Path) -> None:
    """Raise OSError if `replacing` will refuse `path`, for all that is known before."""
    try:
        target = Path(os.path.realpath(path))
        _existing(target)
        check_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def check_folder(folder: Path) -> None:
    """Raise OSError unless a file can be made in `folder`: of /proc and read-only disks permissions do not tell."""
    probe = folder / f".{os.urandom(4).hex()}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(folder)) from None


def _existing(target: Path) -> os.stat_result | None:
    """What is known of an existing file, which must be one that may be replaced; None if there is none."""
    try:
        existing = target.stat()
    except FileNotFoundError:
        return None
    mode = existing.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a plain file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    folder = target.parent.stat()
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, existing.st_uid, folder.st_uid):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # as in /tmp
    return existing


def _remove_stale(folder: Path, pattern: str) -> None:
    entries: list[os.DirEntry[str]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as listing:  # a folder may be writable and not readable
        entries.extend(listing)
    for entry in entries:
        # Another thread or process may finish its file, or remove it, at any moment.
        with contextlib.suppress(OSError):
            if re.fullmatch(pattern, entry.name) and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                with open(entry.path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


def _sync(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)
