"""``python -m gemmlet`` is the command ``gemmlet``, or runs a Python program with NumPy accelerated.

``python -m gemmlet script.py arguments`` and ``python -m gemmlet -m module arguments`` are what they would be without
``-m gemmlet``, but for the speed.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType


def _run_program(words: list[str]) -> None:
    from .integrations.numpy import accelerate_numpy

    is_module = words[0] == "-m"
    if is_module and len(words) < 2:
        sys.exit("gemmlet: -m needs the name of a module")
    if not is_module and not os.path.isfile(words[0]):
        sys.exit(f"gemmlet: there is no file {words[0]}")
    try:
        accelerate_numpy()
    except RuntimeError as error:
        sys.exit(f"gemmlet: {error}")
    # The main module to the end of the process: threads and atexit find it.
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    if "__annotations__" in globals():  # not in the main module of every version
        main_module.__annotations__ = {}
    if is_module:
        sys.argv = words[1:]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]  # what `python -m` calls
    else:
        sys.argv = words
        _run_script(words[0], main_module.__dict__)


def _run_script(name: str, main_globals: dict[str, object]) -> None:
    """Run a script as Python does, with its folder on the path."""
    path = os.path.abspath(name)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    loader = SourceFileLoader("__main__", path)
    main_globals.update(__file__=path, __builtins__=__builtins__, __cached__=None, __loader__=loader)
    exec(code, main_globals)


_words = sys.argv[1:]
if _words and (_words[0] == "-m" or _words[0].endswith(".py")):
    _run_program(_words)
else:
    from .cli import main

    main()
