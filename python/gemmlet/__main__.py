"""``python -m gemmlet`` is the command ``gemmlet``, or runs a Python program with NumPy accelerated.

``python -m gemmlet script.py arguments`` and ``python -m gemmlet -m module arguments`` are what they would be without
``-m gemmlet``, but for the speed.
"""

from __future__ import annotations

import os
import runpy
import sys
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
    if is_module:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        _run_script(words[0])


def _run_script(name: str) -> None:
    """Run a script as Python does: its folder on the path, and its module the main one to the end of the process."""
    path = os.path.abspath(name)
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


_words = sys.argv[1:]
if _words and (_words[0] == "-m" or _words[0].endswith(".py")):
    _run_program(_words)
else:
    from .cli import main

    main()
