"""Locks that outlive a fork."""

from __future__ import annotations

import os
import threading


def fork_safe_lock() -> threading.RLock:
    """Return a reentrant lock for which a fork waits, for as long as the process lives.

    No child finds it held by a thread that it does not have, nor half done what it guards.
    """
    lock = threading.RLock()
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
