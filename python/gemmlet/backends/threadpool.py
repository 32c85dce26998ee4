"""Makes the compiled kernels known to threadpoolctl, where installed: `threadpool_limits` then holds for them too."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

_registered = False


def register(library_names: Iterable[str]) -> None:
    """Register a controller for extension modules whose file names begin with one of `library_names`."""
    global _registered
    if _registered or importlib.util.find_spec("threadpoolctl") is None:
        return
    import threadpoolctl

    if not hasattr(threadpoolctl, "register"):  # before 3.2, which knows its own libraries alone
        return

    class GemmletController(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = "gemmlet"
        internal_api = "gemmlet"
        filename_prefixes = tuple(library_names)
        check_symbols = ("gemmlet_get_num_threads", "gemmlet_set_num_threads")

        def get_num_threads(self) -> int:
            return int(self.dynlib.gemmlet_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.gemmlet_set_num_threads(num_threads)

        def get_version(self) -> None:
            return None

    threadpoolctl.register(GemmletController)
    _registered = True
