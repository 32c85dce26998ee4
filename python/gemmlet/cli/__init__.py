"""The command ``gemmlet``: train the networks on MNIST, measure the kernels, and show what computes here.

Typer, rich and all that the trainings need come with the extra ``train``, the peers of ``bench`` with the extra of that
name; ``gemmlet info`` works without them.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .errors import UserError

# What the extra `train` brings, by the names they are imported under.
_EXTRA = ("typer", "rich", "matplotlib", "PIL", "sklearn")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; `arguments` are the words after the command's name, by default of ``sys.argv``.

    The exit status is 0 for success, 2 for options or files that cannot be used, 1 for what fails later on, and 130
    after Ctrl-C. Errors are one line on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A letter that the terminal cannot show, é or one in the name of a folder, must not end a training.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _run(words)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), error.code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        _forget_output()
        if isinstance(error, BrokenPipeError):  # whoever read our output has gone: "gemmlet info | head -1"
            sys.exit(1)
        _fail(str(error), 1)
    except MemoryError as error:
        _fail(f"out of memory, try a smaller --hidden or --batch-size: {error}", 1)
    sys.exit(status)


def _forget_output() -> None:
    """Drop what stdout still holds back, if it cannot be written: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    print(f"gemmlet: {message}", file=sys.stderr)
    sys.exit(code)


def _run(words: list[str]) -> int:
    # These two also work without the extra.
    if words == ["--version"]:
        from .. import __version__

        print(f"gemmlet {__version__}")
        return 0
    if words == ["info"]:
        from .info import show

        show()
        return 0

    if words[:1] == ["bench"]:
        from ..bench.suite import without_blas_variables

        environment = without_blas_variables(os.environ)
        if environment is not None:
            # NumPy's BLAS has read them when it was loaded: start once more.
            os.execve(sys.executable, [sys.executable, "-m", "gemmlet", *words], environment)

    needed, extra = (_EXTRA, "train") if words[:1] != ["bench"] else ((*_EXTRA, "threadpoolctl"), "bench")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'gemmlet[{extra}]'", code=1)
    from .app import run

    return run(words)
