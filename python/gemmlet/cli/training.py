"""What `gemmlet train mlp` and `gemmlet train gan` share: checked options, the watch over a fit, what is printed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import get_num_threads, nn
from ..backends import select
from ..data import Mnist
from ..formulas.activations import ACTIVATIONS
from ..nn import files as network_files
from . import common, files
from .errors import UserError
from .signals import Interrupted, stops

Array = NDArray[Any]
Kept = TypeVar("Kept", nn.History, nn.GANHistory)

# Files in --out.
METRICS, CHECKPOINT = "metrics.json", "checkpoint.safetensors"

# What --augment takes where no settings follow it.
DEFAULT_AUGMENT = "default"

# What of a line with a bar is no figures: five characters of it, the time left, and the spaces between.
_REST_OF_BAR = 5 + 7 + 3


@dataclass(frozen=True)
class Defaults:
    """What applies where the command line says nothing."""

    hidden: tuple[int, ...]
    activation: tuple[str, ...]  # of each network
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
    weight_decay: float | None
    momentum: float | None
    clip_value: float | None
    l1: float | None
    l2: float | None
    hidden: str | None
    activation: str | None
    dropout: str | None
    input_dropout: float | None
    seed: int | None
    backend: str | None
    threads: int | None
    out: Path | None
    resume: Path | None
    classic: bool
    augment: str | None
    recipe: str | None
    patience: int | None


# What a recipe says, so that nothing else may.
_OF_RECIPE = (
    "batch_size", "lr", "optimizer", "weight_decay", "momentum", "clip_value", "l1", "l2", "hidden", "activation",
    "dropout", "input_dropout", "classic", "augment", "patience",
)  # fmt: skip

# Options that may differ from those of the training that --resume goes on with.
_FREE = ("data_dir", "epochs", "backend", "threads")

# Options that a training of before they were there has not.
_NEWER = ("clip_value", "l1", "l2", "dropout", "input_dropout", "augment", "recipe", "patience")


@dataclass(frozen=True)
class Settings:
    """Checked options, with the defaults filled in."""

    hidden: tuple[int, ...]
    activation: tuple[str, ...]
    dropout: float | list[float]
    input_dropout: float
    epochs: int
    batch_size: int
    optimizer: nn.Optimizer
    lr: float  # at first: it may fall later on
    lr_decay: bool
    l1: float
    l2: float
    seed: int
    out: Path
    classic: bool
    augment: nn.Augment | None
    recipe: str | None
    patience: int | None

    @property
    def early_stopping(self) -> nn.EarlyStopping | None:
        """On the loss of the images that are held out."""
        return None if self.patience is None else nn.EarlyStopping(patience=self.patience)

    def facts(self) -> dict[str, Any]:
        """Return them for metrics.json."""
        facts = {name: value for name, value in vars(self).items() if name != "out"}
        optimizer = {"optimizer": self.optimizer.name}
        told = "momentum", "weight_decay", "clip_value"
        optimizer |= {name: value for name, value in self.optimizer.settings().items() if name in told}
        facts["augment"] = None if self.augment is None else vars(self.augment)
        return facts | {"hidden": list(self.hidden), "activation": text(self.activation)} | optimizer


def text(value: Any) -> str:
    """Return the value of an option as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check(options: Options, network: str, defaults: Defaults) -> Settings:
    """Check the options, put backend and threads to use, and fill in the defaults; or raise `UserError`."""
    for option, value, low, high in (
        ("--epochs", options.epochs, 1, 10**9),
        ("--batch-size", options.batch_size, 1, 10**9),
        ("--patience", options.patience, 0, 10**9),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{option} must be from {low} to {high:,}, got {value}")
    seed, out = options.seed or 0, options.out or Path("runs", network)
    if seed < 0:
        raise UserError(f"--seed must be at least 0, got {seed}")
    if options.lr is not None and not (math.isfinite(options.lr) and options.lr > 0):
        raise UserError(f"--lr must be a number above 0, got {options.lr:g}")
    recipe = None if options.recipe is None else _recipe(options, network)
    if recipe is not None:
        defaults = _defaults(recipe)
    optimizer = _optimizer(options, defaults)
    for option, of_mlp in (("--l1", options.l1), ("--l2", options.l2), ("--patience", options.patience)):
        if of_mlp is not None and network != "mlp":
            raise UserError(f"{option} is for mlp; the network is {network}")
    for option, penalty in (("--l1", options.l1), ("--l2", options.l2)):
        if penalty is not None and not (math.isfinite(penalty) and penalty >= 0):
            raise UserError(f"{option} must be a number of at least 0, got {penalty:g}")
    for option, given in (("--hidden", options.hidden), ("--activation", options.activation)):
        if options.classic and given is not None:
            raise UserError(f"--classic is one certain network; leave out {option}")
    hidden = defaults.hidden if options.hidden is None else _widths(options.hidden)
    activation = defaults.activation if options.activation is None else _activations(options.activation, defaults)
    augment = None if options.augment is None else _augment(options.augment)
    if recipe is not None:
        augment = recipe.augment
    dropout = _dropout(options, network, len(hidden))
    files.check_folder(out)
    common.use(options.backend, options.threads)
    epochs, batch_size = options.epochs or defaults.epochs, options.batch_size or defaults.batch_size
    rates, penalties = (optimizer.lr, defaults.lr_decay), (options.l1 or 0.0, options.l2 or 0.0)
    common_ones = hidden, activation, *dropout, epochs, batch_size, optimizer, *rates, *penalties, seed, out
    return Settings(
        *common_ones, classic=options.classic, augment=augment, recipe=options.recipe, patience=options.patience
    )


def _recipe(options: Options, network: str) -> nn.recipes.Recipe:
    if network != "mlp":
        raise UserError("--recipe is for gemmlet train mlp")
    if (recipe := nn.recipes.RECIPES.get(str(options.recipe))) is None:
        raise UserError(f"--recipe {options.recipe!r} is unknown; the choices are {', '.join(nn.recipes.RECIPES)}")
    for name in _OF_RECIPE:
        value = getattr(options, name)
        if value is not None and value is not False:  # 0 is said, too
            raise UserError(f"--recipe is a whole training; leave out --{name.replace('_', '-')}")
    return recipe


def _defaults(recipe: nn.recipes.Recipe) -> Defaults:
    optimizer = recipe.optimizer
    return Defaults(
        recipe.hidden,
        (recipe.activation,),
        recipe.epochs,
        recipe.batch_size,
        optimizer.name,
        {optimizer.name: optimizer},
        lr_decay=True,
    )


def _optimizer(options: Options, defaults: Defaults) -> nn.Optimizer:
    name = defaults.optimizer if options.optimizer is None else options.optimizer
    if name not in defaults.optimizers:
        raise UserError(f"--optimizer {name!r} is unknown; the choices are {', '.join(defaults.optimizers)}")
    settings = defaults.optimizers[name].settings()
    for setting in ("lr", "weight_decay", "momentum", "clip_value"):
        value, option = getattr(options, setting), f"--{setting.replace('_', '-')}"
        if value is None:
            continue
        if setting not in settings:
            having = [other for other, each in defaults.optimizers.items() if setting in each.settings()]
            raise UserError(f"{option} is for {' and '.join(having)}; the optimizer is {name}")
        try:
            nn.make_optimizer(name, **{setting: value})
        except ValueError as error:
            raise UserError(str(error).replace(setting, option, 1)) from error
        settings[setting] = value
    return nn.make_optimizer(**settings)


def _augment(words: str) -> nn.Augment:
    """Settings such as rotate=12,elastic=0; the defaults where there are none."""
    settings = {}
    for word in [] if words == DEFAULT_AUGMENT else words.split(","):
        name, _, number = word.partition("=")
        try:
            settings[name.strip()] = float(number)
            nn.Augment(**settings)
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in fields(nn.Augment))
            known = f"expected NAME=NUMBER, the names being {names}"
            reason = str(error) if name.strip() in names.split(", ") and number else known
            raise UserError(f"--augment {word.strip()!r}: {reason}") from error
    return nn.Augment(**settings)


def _widths(words: str) -> tuple[int, ...]:
    widths = [word.strip() for word in words.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word[:9]) <= 1_000_000 for word in widths):
        raise UserError(f"--hidden must be widths from 1 to 1,000,000, such as 128 or 256,128; got {words!r}")
    return tuple(map(int, widths))


def _activations(words: str, defaults: Defaults) -> tuple[str, ...]:
    """One for each network; a single one is for all."""
    names, count = tuple(word.strip() for word in words.split(",")), len(defaults.activation)
    for name in names:
        if name not in ACTIVATIONS:
            raise UserError(f"--activation {name!r} is unknown; the choices are {', '.join(ACTIVATIONS)}")
    if len(names) not in (1, count):
        raise UserError(f"--activation must be 1{' or 2 names' if count > 1 else ' name'}, got {words!r}")
    return names if len(names) == count else names * count


def option_name(name: str, network: str) -> str:
    """The option of `Options.<name>` for "mlp" or "gan", where dropout is the discriminator's."""
    option = name.replace("_", "-")
    return f"--discriminator-{option}" if network == "gan" and name.endswith("dropout") else f"--{option}"


def _dropout(options: Options, network: str, layers: int) -> tuple[float | list[float], float]:
    """The rates of the hidden layers, and that of the inputs."""

    def rate(value: str | float, option: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < 1:
            raise UserError(f"{option} must be from 0 to below 1, got {value}")
        return number

    option = option_name("dropout", network)
    words = [] if options.dropout is None else options.dropout.split(",")
    rates = [rate(word.strip(), option) for word in words]
    if len(rates) not in (0, 1, layers):
        raise UserError(f"{option} must be 1 rate, or 1 for each of {layers} hidden layers, got {options.dropout!r}")
    inputs = options.input_dropout or 0.0
    return rates if len(rates) > 1 else sum(rates), rate(inputs, option_name("input_dropout", network))


def _checksum(data: Mnist) -> int:
    """What tells one set of training images from another."""
    return zlib.crc32(data.y_train.tobytes(), zlib.crc32(data.x_train.tobytes()))


def _resumed(options: Options, resume: Path, network: type[nn.MLP | nn.GAN]) -> tuple[Options, int, bool]:
    """Fill in the options of the training that left the folder `resume`.

    Also return the checksum of its images, and whether it has learnt something.
    """
    path, types = resume / CHECKPOINT, get_type_hints(Options)
    try:
        config, _, extra = network_files.read(path, network.__name__)
    except FileNotFoundError:
        raise UserError(f"--resume {resume}: there is no {CHECKPOINT}, which gemmlet train leaves") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {resume}: {error}") from error
    try:
        saved = dict.fromkeys(_NEWER) | extra["notes"]
        checksum, is_begun = int(saved.pop("images_crc32")), config["steps"] > 0
        saved |= {"data_dir": Path(folder)} if (folder := saved["data_dir"]) is not None else {}
        if wrong := saved.keys() ^ (types.keys() - {"out", "resume", "threads"}):
            raise ValueError(", ".join(sorted(wrong)))
        for name, value in saved.items():
            if not isinstance(value, types[name]):
                raise ValueError(f"{name} is {value!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--resume {resume}: the options in {CHECKPOINT} cannot be used ({error!r})") from error
    if options.out not in (None, resume):
        raise UserError(f"--out {options.out}: --resume goes on in its own folder, {resume}")
    unsaid = {}
    for name, value in saved.items():
        given, option = getattr(options, name), option_name(name, network.__name__.lower())
        if given is None or given is False:
            unsaid[name] = value
            continue
        if name == "epochs" and given < value:
            raise UserError(f"--epochs {given}: the training in {resume} has {value}, and may get more")
        if name not in _FREE and (given.replace(" ", "") if isinstance(given, str) else given) != value:
            raise UserError(f"{option} {given}: the training in {resume} has {'none' if value is None else value}")
    return replace(options, **unsaid, out=resume), checksum, is_begun


class Watch:
    """Follows a training: shows how far it is, ends it at a signal, and keeps what was learnt.

    The first of `STOPS` ends the training, and more of them change nothing until model and metrics are saved. From then
    on one ends the command. What fails after that, a picture say, is kept for the end.

    Attributes
    ----------
    resumes : bool
        Whether the training goes on from an earlier one, which has learnt something.
    more_epochs : float
        How many epochs would take as long as what `see_more` follows after the training.
    """

    def __init__(
        self, network: type[nn.MLP | nn.GAN], options: Options, defaults: Defaults, classic: Defaults, *, least: int = 1
    ) -> None:
        """Check the options, load the data and say what is used; there must be `least` images of each kind."""
        resume, checksum, self.resumes = options.resume, None, False
        if resume is not None:
            options, checksum, self.resumes = _resumed(options, resume, network)
        self.settings = check(options, network.__name__.lower(), classic if options.classic else defaults)
        self.data = data = common.load_data(options.data_dir)
        images, tests = len(data.y_train), len(data.y_test)
        if min(images, tests) < least:
            raise UserError(
                f"{data.source} has {images} training and {tests} test images; expected at least {least} each"
            )
        self.more_epochs = 0.0
        self._problems: list[str] = []
        self._ended_early = False
        self._last: nn.Progress | nn.GANProgress | None = None
        self._options, self._is_new = self._saved_options(options), resume is None
        if checksum not in (None, self._options["images_crc32"]):
            raise UserError(f"--resume {resume}: the training there had other images than those of {data.source}")
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
        self.say(f"Data: {data.source} ({images:,} training and {tests:,} test images)")
        self.say(common.backend_line())

    def _saved_options(self, options: Options) -> dict[str, Any]:
        """What ``--resume`` needs to go on."""
        settings, optimizer = self.settings, self.settings.optimizer.settings()
        saved = {
            "images_crc32": _checksum(self.data),
            "data_dir": None if options.data_dir is None else str(options.data_dir.absolute()),
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "lr": settings.lr,
            "optimizer": optimizer["name"],
            "weight_decay": optimizer["weight_decay"],
            "momentum": optimizer.get("momentum"),
            "clip_value": optimizer["clip_value"],
            "l1": options.l1,
            "l2": options.l2,
            "hidden": None if settings.classic else text(settings.hidden),
            "activation": None if settings.classic else text(settings.activation),
            "dropout": None if options.dropout is None else options.dropout.replace(" ", ""),
            "input_dropout": options.input_dropout,
            "seed": settings.seed,
            "backend": select.current().name,
            "classic": settings.classic,
            "augment": None if options.augment is None else options.augment.replace(" ", ""),
            "recipe": settings.recipe,
            "patience": settings.patience,
        }
        unsaid = {} if settings.recipe is None else {name: getattr(options, name) for name in _OF_RECIPE}
        return saved | unsaid

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, soft_wrap=True)

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            out = files.make_folder(self.settings.out)
            stack.enter_context(files.locked(out))
            if not self._is_new:
                self.say(f"Going on with the training in {out}")
            elif (out / CHECKPOINT).exists():
                # By its first checkpoint, not before: until then there is nothing to have instead.
                self.say(f"Replacing the training in {out}, with which --resume would go on")
            self._lock = stack.pop_all()
        stops.are_noted = True
        return self

    def __exit__(self, *_: object) -> None:
        stops.are_noted = False
        self._lock.close()

    def fit(self, model: nn.MLP | nn.GAN, fit: Callable[..., Kept]) -> Kept:
        """Train `model` with its `fit`, save it and what is known of the training, and return the history.

        Of a training that diverged what was learnt before is saved.
        """
        out, settings = self.settings.out, self.settings
        model._notes = self._options
        if not (out / CHECKPOINT).exists():  # --resume needs the options, even if nothing has been learnt yet
            model._write(out / CHECKPOINT, {}, {})
        try:
            history = fit(
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                optimizer=settings.optimizer,
                callback_every="call",
                checkpoint=out / CHECKPOINT,
                resume=self.resumes,
            )
        except ValueError as error:
            if not self.resumes:
                raise
            raise UserError(f"--resume {out}: {error}") from error
        except nn.DivergedError as error:
            if not model.steps:
                raise UserError(str(error), code=1) from error
            self._problems.append(str(error))
            history = error.history
        except nn.CheckpointError as error:
            self._problems.append(str(error))
            history = error.history
        model.save(out / common.MODEL)
        lists = [name for name, values in vars(history).items() if isinstance(values, list)]
        last, whole, early = self._last, len(getattr(history, lists[0])), settings.early_stopping
        if early is not None and whole:
            losses = getattr(history, early.monitor)
            self._ended_early = early.is_over(losses)
            best = max((epoch for epoch in range(1, whole + 1) if early.is_best(losses[:epoch])), default=whole)
            self.say(f"Of {whole} epochs that of number {best} is kept, with the least loss on held-out images")
        self._facts = self._training_facts(history.seconds, whole if last is None else model.steps // last.batches)
        self._facts["history"] = {name: [common.finite(v) for v in getattr(history, name)] for name in lists}
        self.write_metrics({})
        stops.message, stops.are_noted = "interrupted; what was learnt is saved", False
        if stops.first is not None:
            self.console.print(
                f"Interrupted: what was learnt is saved; --resume {out} goes on. Ctrl-C leaves out what is left to do.",
                markup=False,
                soft_wrap=True,
            )
        return history

    def see(self, progress: nn.Progress | nn.GANProgress, figures: Mapping[str, float | None]) -> None:
        """Take note of some mini-batches and their figures, and raise `StopTraining` if they shall be the last."""
        known = {name: value for name, value in figures.items() if value is not None}
        is_first, self._last = self._last is None, progress
        # What is measured once an epoch stays in the bar during the next one.
        self._figures |= known
        batches = progress.epochs * progress.batches
        done = (progress.epoch - 1) * progress.batches + progress.batch
        shown = [f"{name} {value:.4f}" for name, value in self._figures.items()]
        if self.console.is_interactive:
            # Of a training that goes on, the steps of before took no time.
            move = self._bar.reset if is_first else self._bar.update
            total = batches + self.more_epochs * progress.batches
            move(self._task, total=total, completed=done, epoch=progress.epoch, figures=self._fitting(shown))
        elif progress.epoch_done:
            self.say(f"epoch {progress.epoch}/{progress.epochs}  {'  '.join(shown)}")
        if stops.first is not None and done < batches:
            raise nn.StopTraining

    def _fitting(self, shown: Sequence[str]) -> str:
        """As many of the figures as the bar has room for."""
        room = self.console.width - len(f"epoch {self.settings.epochs}/{self.settings.epochs} ") - _REST_OF_BAR
        while len(line := "  ".join(shown)) > room and len(shown) > 1:
            shown = shown[:-1]
        return line

    def see_more(self, progress: nn.Progress) -> None:
        """Take note of how far what follows the training is."""
        if self.console.is_interactive:
            total = self._bar.tasks[0].total or 0.0
            batches = progress.epochs * progress.batches
            left = 1 - ((progress.epoch - 1) * progress.batches + progress.batch) / batches
            done = total * (1 - left * self.more_epochs / (self.settings.epochs + self.more_epochs))
            self._bar.update(self._task, completed=done)

    def bar(self) -> Progress:
        """Return what shows the bar while a ``with`` block runs."""
        return self._bar

    @contextmanager
    def attempting(self, what: str) -> Iterator[None]:
        """Keep an error for the end: what was learnt does not depend on the block, which does `what`."""
        try:
            yield
        except Exception as error:
            if stops.have_raised:  # this is what a module that was being imported has made of it
                raise Interrupted from error
            reason = str(error) or type(error).__name__
            self._problems.append(f"the model is saved, but not all that belongs to it; {what}: {reason}")

    def plots(self) -> ModuleType:
        """Say that pictures are drawn, and return the module that draws them."""
        self.console.print("Drawing the pictures.")
        from . import plots

        return plots

    def draw(self, function: Callable[..., None], name: str, *arguments: Any) -> None:
        """Draw a picture into ``--out``."""
        with self.attempting(name):
            function(self.settings.out / name, *arguments)

    def write_metrics(self, scores: Mapping[str, Any]) -> None:
        """Write metrics.json, with these scores and what is known of the training."""
        files.write_json(self.settings.out / METRICS, {**scores, **self._facts})

    def _training_facts(self, seconds: float, done: int) -> dict[str, Any]:
        """What metrics.json says of any training, of so many seconds and completed epochs."""
        description = select.current().describe()
        return {
            "seconds": seconds,
            "backend": description["backend"],
            "isa": description["isa"],
            "threads": get_num_threads(),
            "interrupted": done < self.settings.epochs and not self._ended_early,
            "epochs_done": done,
            **self.settings.facts(),
            "data": self.data.source,
            "training_images": len(self.data.y_train),
            "test_images": len(self.data.y_test),
        }

    def show(self, title: str, rows: Mapping[str, str]) -> None:
        """Print a table of names and values."""
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows.items():
            table.add_row(name, value)
        # Not as the table's own title, which would be folded to its width.
        self.console.print(title)
        self.console.print(table)

    def end(self) -> int:
        """Say where the results are, and return the exit status; `UserError` if something failed."""
        self.say(f"Model, metrics and pictures: {self.settings.out}")
        if self._problems:
            others = f" (and {len(self._problems) - 1} more)" if len(self._problems) > 1 else ""
            raise UserError(self._problems[0] + others, 1)
        return 0
