"""What is compared, gemmlet and its peers: what each needs, and how all get the same number of threads."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import gemmlet
from gemmlet._threads import processors
from gemmlet.backends import select


@dataclass(frozen=True)
class Implementation:
    """One of what is compared."""

    name: str  # as tables and files have it
    package: str | None = None  # that it needs, as it is imported; None needs nothing beyond gemmlet
    backend: str | None = None  # of gemmlet, that it runs on; None is the one in use
    compiles: bool = False  # whether it compiles for seconds before its first result; ``--quick`` leaves it out
    in_extra: bool = True  # whether the extra `bench` brings the package: others are measured where they happen to be
    is_peer: bool = True  # whether gemmlet is behind where this is faster: not gemmlet's other backend, nor a floor

    def available(self) -> bool:
        """Whether its package is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run a block on this implementation's backend."""
        if self.backend is None:
            yield
        else:
            with gemmlet.use_backend(self.backend):
                yield


# What everything is compared from.
OURS = "gemmlet"

IMPLEMENTATIONS: dict[str, Implementation] = {
    each.name: each
    for each in (
        Implementation(OURS),
        Implementation("gemmlet-numba", "numba", backend="numba", compiles=True, is_peer=False),
        Implementation("gemmlet kernels"),
        Implementation("gemmlet plain", is_peer=False),  # without what a row is about
        Implementation("numpy"),
        Implementation("pytorch", "torch"),
        Implementation("pytorch fused", "torch"),
        Implementation("pytorch compiled", "torch", compiles=True),
        Implementation("jax", "jax"),
        Implementation("scikit-learn", "sklearn"),
        Implementation("numexpr", "numexpr"),
        Implementation("thinc", "thinc"),
        Implementation("scipy", "scipy"),
        Implementation("opencv", "cv2", in_extra=False),
        Implementation("kornia", "kornia", in_extra=False),
        # `torch.compile`, without what is compiled.
        Implementation("dynamo alone", "torch", compiles=True, is_peer=False),
    )
}


def missing_packages() -> list[str]:
    """Return the packages of peers that are not installed, though the extra would bring them."""
    missing = {each.package for each in IMPLEMENTATIONS.values() if each.in_extra and not each.available()}
    return sorted(package for package in missing if package)


@contextlib.contextmanager
def same_threads(count: int, names: Iterable[str]) -> Iterator[list[str]]:
    """Give every implementation `count` threads while the block runs, and yield notes about those that do not obey.

    Their packages are imported first, as only a library that is loaded can be told.
    """
    import threadpoolctl

    packages = {IMPLEMENTATIONS[name].package for name in names}
    if "jax" in packages:
        import jax

        # Without it JAX computes in float32 what it is given in float64. It leaves float32 as it is.
        jax.config.update("jax_enable_x64", True)
    for package in sorted(package for package in packages if package):
        importlib.import_module(package)
    # The backend registers itself with threadpoolctl when it is loaded.
    select.current()
    before = gemmlet.get_num_threads()
    restore = []
    for name in packages & {"torch", "numexpr"} | ({"torch"} if "kornia" in packages else set()):
        module = sys.modules[str(name)]
        restore.append((module.set_num_threads, module.get_num_threads()))
    if "cv2" in packages:
        restore.append((sys.modules["cv2"].setNumThreads, sys.modules["cv2"].getNumThreads()))
    notes = []
    if "jax" in packages and processors() != count:
        notes.append(
            f"JAX has a thread for each of the {processors()} processors, the other implementations {count}: "
            "it takes no number at run time"
        )
    with threadpoolctl.threadpool_limits(count):
        try:
            gemmlet.set_num_threads(count)
            for setter, _ in restore:
                setter(count)
            yield notes
        finally:
            for setter, value in restore:
                setter(value)
            gemmlet.set_num_threads(before)
