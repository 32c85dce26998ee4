"""``python -m gemmlet`` is the command ``gemmlet``, or runs a Python program with NumPy accelerated.

``python -m gemmlet script.py arguments``, ``python -m gemmlet -m module arguments`` and ``python -m gemmlet -c code
arguments`` are what they would be without ``-m gemmlet``, but for the speed. A script may also be a folder or a zip
file with a ``__main__.py``; one with the name of a command is told from it by its folder, as ``./train``.
"""

from __future__ import annotations

import marshal
import os
import runpy
import sys
import zipfile
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from importlib.util import MAGIC_NUMBER
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from .cli.commands import COMMANDS

# The files whose frames come before the program's.
_OURS = (__file__, "<frozen runpy>", runpy.__file__)


def _kind(words: list[str]) -> str | None:
    """What the words run: a module, code, a script, or a folder that is one; None for the command."""
    if not words or words[0] in COMMANDS:
        return None
    if words[0] in {"-m", "-c"}:
        return {"-m": "module", "-c": "code"}[words[0]]
    if os.path.isdir(words[0]) or zipfile.is_zipfile(words[0]):
        return "folder"
    return "script" if words[0].endswith(".py") or os.path.exists(words[0]) else None


def _run_program(kind: str, words: list[str]) -> None:
    from .integrations.numpy import accelerate_numpy

    if kind in {"module", "code"} and len(words) < 2:
        _refuse(f"{words[0]} needs a {kind} behind it")
    if kind == "script" and not os.path.exists(words[0]):
        _refuse(f"there is no file {words[0]}")
    try:
        accelerate_numpy()
    except RuntimeError as error:
        sys.exit(f"gemmlet: {error}")
    # The main module to the end of the process: threads and atexit find it.
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    if "__annotations__" in globals():  # not in the main module of every version
        main_module.__annotations__ = {}
    try:
        _run(kind, words, main_module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        _show_from(error)
        raise


def _refuse(message: str) -> NoReturn:
    print(f"gemmlet: {message}", file=sys.stderr)
    sys.exit(2)


def _run(kind: str, words: list[str], main_globals: dict[str, Any]) -> None:
    """Run a program as Python does, with its folder on the path."""
    sys.argv = {"module": words[1:], "code": ["-c", *words[2:]]}.get(kind, words)
    if kind == "module":
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]  # what `python -m` calls
    elif kind == "code":
        if not sys.flags.safe_path:
            sys.path[0] = ""
        main_globals["__loader__"] = BuiltinImporter
        exec(compile(words[1], "<string>", "exec", dont_inherit=True), main_globals)
    elif kind == "folder":
        sys.path[: 0 if sys.flags.safe_path else 1] = [_absolute(words[0])]
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        path = _absolute(words[0])
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.realpath(path))
        with open(path, "rb") as file:
            content = file.read()  # at once: it may be a pipe
        if is_bytecode := content.startswith(MAGIC_NUMBER) or path.endswith(".pyc"):
            code = _code_of(content)
        else:
            code = compile(content, path, "exec", dont_inherit=True)
        loader = (SourcelessFileLoader if is_bytecode else SourceFileLoader)("__main__", path)
        main_globals.update(__file__=path, __cached__=None, __loader__=loader)
        exec(code, main_globals)


def _absolute(path: str) -> str:
    """A path as Python has that of a program: not normalised. The current folder may be gone."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def _code_of(content: bytes) -> CodeType:
    """The code in a file of bytecode, behind its header of 16 bytes."""
    if not content.startswith(MAGIC_NUMBER):
        raise RuntimeError("Bad magic number in .pyc file")
    try:
        code = marshal.loads(content[16:])
    except (EOFError, ValueError, TypeError):
        code = None
    if not isinstance(code, CodeType):
        raise RuntimeError("Bad code object in .pyc file")
    return code


def _programs_part(traceback: TracebackType | None) -> TracebackType | None:
    """What follows our frames in a traceback: Python, too, shows those of runpy under a module."""
    part = traceback
    while traceback is not None and (file := traceback.tb_frame.f_code.co_filename) in _OURS:
        traceback = traceback.tb_next
        if file == __file__:
            part = traceback
    return part


def _show_from(error: BaseException) -> None:
    """Have an error that nobody handles shown without our frames."""
    hook = sys.excepthook
    # By its number: the error holds all that is in its frames, which at the end must go before the modules do.
    shown = id(error)

    def excepthook(kind: type[BaseException], value: BaseException, frames: TracebackType | None) -> None:
        if id(value) == shown:
            frames = sys.last_traceback = _programs_part(frames)
            value = value.with_traceback(frames)
        hook(kind, value, frames)

    sys.excepthook = excepthook


_words = sys.argv[1:]
if (_program := _kind(_words)) is not None:
    _run_program(_program, _words)
else:
    from .cli import main

    main()
