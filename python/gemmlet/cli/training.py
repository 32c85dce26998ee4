"""What `gemmlet train mlp` and `gemmlet train gan` share: checked options, the watch over a fit, what is printed."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import get_num_threads, nn, set_num_threads, use_backend
from ..backends import select
from ..data import Mnist, load_mnist
from . import info
from .errors import UserError
from .files import check_folder, make_folder

Array = NDArray[Any]


@dataclass(frozen=True)
class Defaults:
    """What applies where the command line says nothing."""

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    optimizer: str
    optimizers: Mapping[str, nn.Optimizer]  # each with its own learning rate and other settings
    lr_decay: bool  # whether the learning rate falls to 0 over the epochs


@dataclass(frozen=True)
class Options:
    """The command line, unchecked; None where it says nothing."""

    data_dir: Path | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    optimizer: str | None
    hidden: str | None
    seed: int
    backend: str | None
    threads: int | None
    out: Path
    classic: bool


@dataclass(frozen=True)
class Settings:
    """Checked options, with the defaults filled in."""

    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    optimizer: nn.Optimizer
    lr: float  # at first: it may fall later on
    lr_decay: bool
    seed: int
    out: Path
    classic: bool

    def facts(self) -> dict[str, Any]:
        """Return them for metrics.json."""
        facts = {name: value for name, value in vars(self).items() if name != "out"}
        return facts | {"hidden": list(self.hidden), "optimizer": self.optimizer.name}


def check(options: Options, defaults: Defaults) -> Settings:
    """Check the options, put backend and threads to use, and fill in the defaults; or raise `UserError`."""
    for option, value, low, high in (
        ("--epochs", options.epochs, 1, 10**9),
        ("--batch-size", options.batch_size, 1, 10**9),
        ("--threads", options.threads, 1, 1024),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{option} must be from {low} to {high:,}, got {value}")
    if options.seed < 0:
        raise UserError(f"--seed must be at least 0, got {options.seed}")
    if options.lr is not None and not (math.isfinite(options.lr) and options.lr > 0):
        raise UserError(f"--lr must be a number above 0, got {options.lr:g}")
    name = defaults.optimizer if options.optimizer is None else options.optimizer
    if name not in defaults.optimizers:
        raise UserError(f"--optimizer {name!r} is unknown; the choices are {', '.join(defaults.optimizers)}")
    optimizer = defaults.optimizers[name].fresh()
    if options.lr is not None:
        optimizer.lr = options.lr
    if options.classic and options.hidden is not None:
        raise UserError("--classic is one certain network; leave out --hidden")
    hidden = defaults.hidden if options.hidden is None else _widths(options.hidden)
    check_folder(options.out)
    if options.backend is not None:
        try:
            use_backend(options.backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise info.backend_error("--backend", error) from error
    info.choose_backend()
    if options.threads is not None:
        set_num_threads(options.threads)
    _limit_blas(get_num_threads())
    epochs, batch_size = options.epochs or defaults.epochs, options.batch_size or defaults.batch_size
    given = options.seed, options.out, options.classic
    return Settings(hidden, epochs, batch_size, optimizer, optimizer.lr, defaults.lr_decay, *given)


def _widths(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word[:9]) <= 1_000_000 for word in words):
        raise UserError(f"--hidden must be widths from 1 to 1,000,000, such as 128 or 256,128; got {text!r}")
    return tuple(map(int, words))


def _limit_blas(threads: int) -> None:
    """Limit NumPy's BLAS, which computes the matmuls of the backends numpy and numba, and scikit-learn's OpenMP.

    Without this they would ignore ``--threads`` and GEMMLET_NUM_THREADS, and metrics.json would be wrong.
    """
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)


def _load(options: Options) -> Mnist:
    try:
        return load_mnist(options.data_dir)
    except (OSError, ValueError) as error:
        raise UserError(str(error).replace("(data_dir)", "(--data-dir)")) from error
    except RuntimeError as error:  # the home directory of "~nobody"
        raise UserError(f"{'GEMMLET_DATA_DIR' if options.data_dir is None else '--data-dir'}: {error}") from error


class Watch:
    """Follows a training: shows how far it is, and ends it at Ctrl-C or when it has diverged.

    The first Ctrl-C sets `interrupted`, the second raises KeyboardInterrupt. Both hold until the results are saved.
    """

    def __init__(self, options: Options, defaults: Defaults, *, least: int = 1) -> None:
        """Check the options, load the data and say what is used; there must be `least` images of each kind."""
        self.settings = check(options, defaults)
        self.data = data = _load(options)
        self.interrupted = False
        self.epochs_done = 0
        # The names of folders are printed, in which brackets and colons mean nothing.
        self.console = Console(highlight=False, markup=False, emoji=False)
        self._figures: dict[str, float] = {}
        # Where no bar can be drawn, there is a line for each epoch.
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(self.settings.epochs)),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_interactive,
        )
        self._task = self._bar.add_task("", total=None, epoch=1, figures="")
        images, tests = len(data.y_train), len(data.y_test)
        if min(images, tests) < least:
            raise UserError(
                f"{data.source} has {images} training and {tests} test images; expected at least {least} each"
            )
        make_folder(self.settings.out)
        self._say(f"Data: {data.source} ({images:,} training and {tests:,} test images)")
        description, threads = select.current().describe(), get_num_threads()
        self._say(f"Backend: {description['backend']}, {description['isa']}, {threads} thread{'s' * (threads > 1)}")

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def __enter__(self) -> Watch:
        self._previous = signal.getsignal(signal.SIGINT)
        # A program that was started with SIGINT ignored, by nohup for one, keeps ignoring it.
        if self._previous is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Show the bar while the block runs; then say what happens, if Ctrl-C ended it."""
        with self._bar:
            yield
        if self.interrupted:
            self.console.print("Interrupted: saving what was learnt (Ctrl-C again ends at once).")

    def see(self, progress: nn.Progress | nn.GANProgress, figures: Mapping[str, float | None]) -> None:
        """Take note of some mini-batches and their figures, and raise `StopTraining` if they shall be the last."""
        known = {name: value for name, value in figures.items() if value is not None}
        if not all(map(math.isfinite, known.values())):
            raise _diverged()
        # What is measured once an epoch stays in the bar during the next one.
        self._figures |= known
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self._figures.items())
        batches = progress.epochs * progress.batches
        done = (progress.epoch - 1) * progress.batches + progress.batch
        if self.console.is_interactive:
            self._bar.update(self._task, total=batches, completed=done, epoch=progress.epoch, figures=shown)
        elif progress.epoch_done:
            self.console.print(f"epoch {progress.epoch}/{progress.epochs}  {shown}")
        if progress.epoch_done:
            self.epochs_done = progress.epoch
        if self.interrupted and done < batches:
            raise nn.StopTraining

    def facts(self, seconds: float) -> dict[str, Any]:
        """Return what metrics.json says of any training; `seconds` are those of the training alone."""
        description = select.current().describe()
        return {
            "seconds": seconds,
            "backend": description["backend"],
            "isa": description["isa"],
            "threads": get_num_threads(),
            "interrupted": self.epochs_done < self.settings.epochs,
            "epochs_done": self.epochs_done,
            **self.settings.facts(),
            "data": self.data.source,
            "training_images": len(self.data.y_train),
            "test_images": len(self.data.y_test),
        }

    def finish(self, title: str, rows: Mapping[str, str]) -> None:
        """Print a table of names and values, and where the results are."""
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows.items():
            table.add_row(name, value)
        # Not as the table's own title, which would be folded to its width.
        self.console.print(title)
        self.console.print(table)
        self._say(f"Model, metrics and pictures: {self.settings.out}")


def _diverged() -> UserError:
    return UserError("the training diverged: its numbers are no longer finite; try a smaller --lr", code=1)


def check_finite(results: Array) -> None:
    """Raise if the last steps, whose loss nobody has seen, spoilt the network."""
    if not np.isfinite(results).all():
        raise _diverged()


def curves(history: nn.History | nn.GANHistory, *names: str) -> dict[str, list[float | None]]:
    """Return the named lists of a history for JSON, which has no NaN."""
    return {name: [v if math.isfinite(v) else None for v in getattr(history, name)] for name in names}


def percent(value: float | None) -> str:
    """Return a share as a percentage, and a dash for None."""
    return "-" if value is None else f"{value:.2%}"
