"""The command ``gemmlet``: train and use the networks, measure the kernels, and show what computes here.

Typer, rich and all that networks need come with the extra ``train``, the peers of ``bench`` with the extra of that
name; ``gemmlet info`` and the list of commands work without them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO, cast

from .commands import EXTRAS, FOR_HELP, HELP_OPTIONS, PROGRAMS, extra_of, list_commands, missing
from .errors import UserError
from .signals import Interrupted, stops


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; `arguments` are the words after the command's name.

    By default they are those of ``sys.argv``, and the process ends: from then on signals are ignored.

    The exit status is 0 for success, 2 for options or files that cannot be used, 1 for what fails later on, and 128 and
    the number of the first signal that came, 130 after Ctrl-C. Errors are one line on stderr.
    """
    with stops.handled(_run.__code__, ends_process=arguments is None):
        status, message = _outcome(list(sys.argv[1:] if arguments is None else arguments))
        if message:
            with contextlib.suppress(OSError):
                print(f"gemmlet: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _outcome(words: list[str]) -> tuple[int, str]:
    """Run the command line, and return the exit status and the error's line."""
    # Pictures are drawn without a window. Jupyter exports the name of a backend that other environments lack.
    os.environ.pop("MPLBACKEND", None)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: its number would go to the next file that is opened, a model's say
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    output, status, message = _Output(sys.stdout), 0, ""
    try:
        with contextlib.redirect_stdout(cast(TextIO, output)):
            status = _run(words, output)
    except UserError as error:
        status, message = error.code, str(error)
    except OSError as error:
        status, message = 1, str(error)
    except MemoryError as error:
        status, message = 1, f"out of memory, try a smaller --hidden or --batch-size: {error}"
    except Interrupted:
        message = stops.message
    except Exception:
        if not stops.have_raised:
            raise
        message = stops.message  # the error is what something made of it, a module that was being imported say
    if stops.first is not None:
        status = 128 + stops.first
    if output.error is not None and not status:
        status = 1
        if not isinstance(output.error, BrokenPipeError):  # else its reader has gone: "gemmlet info | head -1"
            message = f"standard output: {output.error}"
    return status, message


class _Output:
    """Standard output, which may be full, or a pipe that nobody reads: what is computed is worth more.

    Attributes
    ----------
    error : OSError or None
        Why something could not be written; all that followed is lost.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.error: OSError | None = None
        # A letter that the terminal cannot show, é or one in the name of a folder, must not end a training.
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._try(self._file.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._file.flush)

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except (OSError, Interrupted) as error:
            # Python would try again to write what it holds back, and complain at exit, or wait for a reader for ever.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            if isinstance(error, Interrupted):
                raise
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _run(words: list[str], output: _Output) -> int:
    """Run the command line; signals are raised in here."""
    stops.check()
    status = _command(words)
    output.flush()
    return status


def _command(words: list[str]) -> int:
    # These also work without the extra.
    if words == ["--version"]:
        from .. import __version__

        print(f"gemmlet {__version__}")
        return 0
    if words == ["info"]:
        from .info import show

        show()
        return 0
    if set(words) <= set(HELP_OPTIONS) and missing(FOR_HELP):
        list_commands()
        return 0
    if words[:1] == ["bench"]:
        from ..bench.suite import peers_environment

        environment = peers_environment(os.environ)
        if environment is not None:
            # The peers read it when they are loaded, and NumPy is: start once more.
            os.execve(sys.executable, [sys.executable, "-m", "gemmlet", *words], environment)

    if words[:1] and words[0].endswith(".py"):
        raise UserError(f"no such command {words[0]!r}. {PROGRAMS}")
    extra = extra_of(words[0] if words else "")
    if needed := missing(FOR_HELP if set(words) & set(HELP_OPTIONS) or not words else EXTRAS[extra]):
        raise UserError(f"this needs {', '.join(needed)}: pip install 'gemmlet[{extra}]'", code=1)
    from .app import run

    return run(words)
