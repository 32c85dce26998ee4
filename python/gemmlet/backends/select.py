"""Which backend computes: decided once, printable, and open to change.

Automatic choice takes the first backend that loads, in the order of `_AUTOMATIC`, and logs once if that was not the
first. A request by name (`GEMMLET_BACKEND`, `use_backend`) loads that backend or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _environment, _threads
from .._signals import deferred_signals
from .._version import __version__

if TYPE_CHECKING:
    from .base import Backend

_CLASSES = {
    "cpu": (".cpu", "CpuBackend"),
    "cuda": (".cuda.backend", "CudaBackend"),
    "numba": (".numba.backend", "NumbaBackend"),
    "numpy": (".numpy", "NumpyBackend"),
}
CHOICES = tuple(_CLASSES)
# In this order without a request by name. Arrays on a GPU go to "cuda" in any case.
_AUTOMATIC = ("cpu", "numba", "numpy")

_loaded: dict[str, Backend] = {}
_current: Backend | None = None


def load(name: str) -> Backend:
    """Return the backend called `name`, loading it at its first use; it raises what `use_backend` does.

    Signals wait meanwhile: of an import that Ctrl-C ends, some packages make an error of their own, and some, half
    imported, are broken for ever.
    """
    if name in _loaded:
        return _loaded[name]
    if name not in _CLASSES:
        raise ValueError(f"backend {name!r} is unknown; the choices are {', '.join(CHOICES)}")
    with deferred_signals():
        return _load(name)


def _load(name: str) -> Backend:
    if name in ("cpu", "numba") and _in_sub_interpreter():
        raise ImportError(
            f"backend {name!r} cannot be used in a sub-interpreter, where it would wait for the GIL for ever"
        )
    if name == "numba" and importlib.util.find_spec("numba") is None:
        raise RuntimeError("backend 'numba' needs the package numba: pip install 'gemmlet[numba]'")
    module, class_name = _CLASSES[name]
    backend: Backend = getattr(importlib.import_module(module, __package__), class_name)()
    backend.set_num_threads(_threads.get_num_threads())
    return _loaded.setdefault(name, backend)


def _in_sub_interpreter() -> bool:
    """Whether this is another interpreter than the process's first: pybind11 and Numba know that one's GIL alone."""
    for module in ("_interpreters", "_xxsubinterpreters"):  # since Python 3.13; before
        try:
            interpreters = importlib.import_module(module)
        except ImportError:
            continue
        return bool(interpreters.get_current() != interpreters.get_main())
    return False


def _is_refusal(error: BaseException) -> bool:
    """Whether an error says that a backend cannot be had, not that something else ended its import.

    Signals wait, but a thread may be interrupted too, and memory may run out: of either, imports and classes make an
    ImportError or a RuntimeError of their own.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return all(isinstance(link, Exception) and not isinstance(link, MemoryError) for link in chain)


def automatic() -> Backend:
    """Return the backend that is used where nobody asks for one: for arrays on the CPU."""
    refusals = []
    for name in _AUTOMATIC:
        with deferred_signals():  # what a handler raises, whatever it is, is no refusal
            try:
                backend = load(name)
            except (RuntimeError, ImportError) as error:
                if not _is_refusal(error):
                    raise
                refusals.append(f"{name}: {error}")
                continue
        if refusals:
            import logging  # here, as few need it: importing gemmlet shall cost little

            reasons = "; ".join(refusals)
            logging.getLogger("gemmlet").warning("gemmlet computes with the %s backend (%s)", name, reasons)
        return backend
    raise AssertionError("the numpy backend always loads")


def current() -> Backend:
    """Return the backend in use, choosing it at the first call: `GEMMLET_BACKEND`, else the first that loads."""
    global _current
    if _current is None:
        name = _environment.read("GEMMLET_BACKEND")
        if name and name not in _CLASSES:
            raise ValueError(f"backend {name!r} is unknown; GEMMLET_BACKEND takes {', '.join(CHOICES)}")
        _current = load(name) if name else automatic()
    return _current


def of(array: Any) -> Backend:
    """Return the backend for this array: the one in use, but `cuda` if it is on a GPU."""
    if type(array) is np.ndarray:
        return current()
    return load("cuda")


def _declines(*_: Any) -> None:
    """What stands for a fast path that is not there."""


def fast_path_on_gpu(name: str) -> Callable[..., Any]:
    """Return the fast path of a kernel for arrays on a GPU, which are computed there whatever is in use.

    It declines everything before the first array on a GPU has come, and where `cuda` is in use, whose own has declined.
    """
    cuda = _loaded.get("cuda")
    return _declines if cuda is None or cuda is current() else cuda.fast_paths.get(name, _declines)


class use_backend:  # noqa: N801 - it is used as a function
    """Choose the backend for the whole process, or in a ``with`` statement for a while.

    Parameters
    ----------
    backend : str
        ``"cpu"``, ``"numba"``, ``"numpy"`` or ``"cuda"``. A backend object, as a ``with`` block yields it, is taken
        too. Arrays on a GPU are computed there whatever is chosen; with ``"cuda"`` NumPy arrays are as well, and
        copied there and back.

    Raises
    ------
    TypeError
        `backend` is neither a name nor a backend.
    ValueError
        There is no such backend.
    RuntimeError
        It cannot be loaded here; the message says why.
    """

    def __init__(self, backend: str | Backend) -> None:
        global _current
        from .numpy import NumpyBackend  # from which all are derived

        if not isinstance(backend, str | NumpyBackend):
            raise TypeError(f"backend must be a name or a backend, got {type(backend).__name__}")
        chosen = load(backend) if isinstance(backend, str) else backend
        self._previous = _current
        self.backend = _current = chosen

    def __enter__(self) -> Backend:
        return self.backend

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._previous


def set_num_threads(count: int) -> None:
    """Set how many threads a kernel may use; it never changes a result.

    Parameters
    ----------
    count : int
        At least 1. Of more than this process has processors, as many are used as it has: more would be slower.

    Raises
    ------
    TypeError, ValueError
        `count` is not an integer, or below 1.
    """
    _threads.set_num_threads(count)
    for backend in _loaded.values():
        backend.set_num_threads(_threads.get_num_threads())


def get_num_threads() -> int:
    """Return how many threads a kernel may use.

    It is what `set_num_threads` set; else ``GEMMLET_NUM_THREADS``; else ``OMP_NUM_THREADS``; else the processors that
    the affinity mask and the cgroup's quota leave. It is never more than the affinity mask has. For the compiled
    backend, `threadpoolctl.threadpool_limits` lowers it.

    Raises
    ------
    ValueError
        ``GEMMLET_NUM_THREADS``, or another variable that chooses what computes, has an unknown value.
    """
    return current().get_num_threads()


def config() -> dict[str, str]:
    """What computes here: backend, ISA, threads and versions, as text."""
    import platform

    return {
        "gemmlet": __version__,
        **current().describe(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def show_config() -> None:
    """Print what computes here: backend, ISA, threads and versions."""
    facts = config()
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
