"""What ``gemmlet train mlp`` and ``gemmlet train gan`` do, from checked options to the files in ``--out``."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import get_num_threads, nn, set_num_threads, use_backend
from ..backends import select
from ..data import Mnist, load_mnist
from . import UserError, evaluation, files, info

if TYPE_CHECKING:
    from PIL.Image import Image

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


# With a rate that falls to 0, Adam may start with more than its usual 1e-3.
_MLP_OPTIMIZERS = {"sgd": nn.SGD(0.1), "adam": nn.Adam(3e-3), "adamw": nn.AdamW(3e-3)}
# A beta1 of 0.5: Radford et al., 2016.
_GAN_OPTIMIZERS = {"sgd": nn.SGD(0.1), "adam": nn.Adam(1e-3, beta1=0.5), "adamw": nn.AdamW(1e-3, beta1=0.5)}

MLP = Defaults((256,), 10, 64, "adam", _MLP_OPTIMIZERS, lr_decay=True)
MLP_ACTIVATION = "relu"
CLASSIC_MLP = Defaults((128,), 10, 16, "sgd", _MLP_OPTIMIZERS, lr_decay=False)
# Two hidden layers, as with one far fewer samples are recognised; and with 2e-4 and mini-batches of 64 it takes longer.
GAN = Defaults((256, 512), 30, 128, "adam", _GAN_OPTIMIZERS, lr_decay=False)
CLASSIC_GAN = Defaults((256,), 30, 128, "adam", _GAN_OPTIMIZERS, lr_decay=False)

# The share of the training images that the learning curves are measured on, and that the network never learns from.
HELD_OUT = 0.1
# How many samples a generator is judged by, how many a picture of them shows, and about how many pictures there are.
JUDGED, SHOWN, PICTURES = 1000, 100, 12
# The classifier that judges them: its hidden layer, and its epochs.
JUDGE_HIDDEN, JUDGE_EPOCHS = 128, 10


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
        return {
            "classic": self.classic,
            "hidden": list(self.hidden),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "optimizer": self.optimizer.name,
            "lr": self.lr,
            "lr_decay": self.lr_decay,
            "seed": self.seed,
        }


def check(options: Options, defaults: Defaults) -> Settings:
    """Check the options, put backend and threads to use, and fill in the defaults.

    Raises
    ------
    UserError
        One of them cannot be used.
    """
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
            raise UserError(f"--backend: {error}") from error
    info.choose_backend()
    if options.threads is not None:
        set_num_threads(options.threads)
    _limit_blas(get_num_threads())
    return Settings(
        hidden,
        options.epochs or defaults.epochs,
        options.batch_size or defaults.batch_size,
        optimizer,
        optimizer.lr,
        defaults.lr_decay,
        options.seed,
        options.out,
        options.classic,
    )


def _widths(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word[:9]) <= 1_000_000 for word in words):
        raise UserError(f"--hidden must be widths from 1 to 1,000,000, such as 128 or 256,128; got {text!r}")
    return tuple(map(int, words))


def check_folder(out: Path) -> None:
    """Raise unless `out` is a folder that can be written to, or can become one."""
    try:
        existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    except OSError as error:  # a name too long, or a folder that is closed to us
        raise UserError(f"--out {out}: {error.strerror}") from error
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {existing} cannot be written to")


def make_folder(out: Path, inside: str = ".") -> Path:
    """Return the folder `inside` the folder `out`, which is made unless it is there."""
    folder = out / inside
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: the folder {folder} cannot be made ({error.strerror})") from error
    return folder


def _limit_blas(threads: int) -> None:
    """Limit NumPy's BLAS, which computes the products of the backends numpy and numba, and scikit-learn's OpenMP.

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


# What both trainings share.


class _Watch:
    """Follows a training: shows how far it is, and ends it at Ctrl-C or when it has diverged.

    The first Ctrl-C sets `interrupted`, the second raises KeyboardInterrupt. Both hold until the results are saved.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.interrupted = False
        self.epochs_done = 0
        self._console = console
        self._figures: dict[str, float] = {}
        # Where no bar can be drawn, there is a line for each epoch.
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=None, epoch=1, figures="")

    def __enter__(self) -> _Watch:
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
            self._console.print("Interrupted: saving what was learnt (Ctrl-C again ends at once).")

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
        if self._console.is_interactive:
            self._bar.update(self._task, total=batches, completed=done, epoch=progress.epoch, figures=shown)
        elif progress.epoch_done:
            self._console.print(f"epoch {progress.epoch}/{progress.epochs}  {shown}")
        if progress.epoch_done:
            self.epochs_done = progress.epoch
        if self.interrupted and done < batches:
            raise nn.StopTraining


def _diverged() -> UserError:
    return UserError("the training diverged: its numbers are no longer finite; try a smaller --lr", code=1)


def _check_finite(results: Array) -> None:
    """Raise if the last steps, whose loss nobody has seen, spoilt the network."""
    if not np.isfinite(results).all():
        raise _diverged()


def _facts(data: Mnist, settings: Settings, seconds: float, epochs_done: int) -> dict[str, Any]:
    """Return what metrics.json says of any training; `seconds` are those of the training alone."""
    description = select.current().describe()
    return {
        "seconds": seconds,
        "backend": description["backend"],
        "isa": description["isa"],
        "threads": get_num_threads(),
        "interrupted": epochs_done < settings.epochs,
        "epochs_done": epochs_done,
        **settings.facts(),
        "data": data.source,
        "training_images": len(data.y_train),
        "test_images": len(data.y_test),
    }


def _console() -> Console:
    # What is printed has the names of folders in it, in which brackets and colons mean nothing.
    return Console(highlight=False, markup=False, emoji=False)


def _begin(options: Options, defaults: Defaults, console: Console, *, least: int = 1) -> tuple[Settings, Mnist]:
    """Check the options, load the data, of which there must be `least` images of each kind, and say what is used."""
    settings = check(options, defaults)
    data = _load(options)
    images, tests = len(data.y_train), len(data.y_test)
    if min(images, tests) < least:
        raise UserError(f"{data.source} has {images} training and {tests} test images; expected at least {least} each")
    make_folder(settings.out)
    console.print(f"Data: {data.source} ({images:,} training and {tests:,} test images)", soft_wrap=True)
    description, threads = select.current().describe(), get_num_threads()
    console.print(
        f"Backend: {description['backend']}, {description['isa']}, {threads} thread{'s' * (threads > 1)}",
        soft_wrap=True,
    )
    return settings, data


def _finite(values: Sequence[float]) -> list[float | None]:
    """Return `values` for JSON, which has no NaN."""
    return [value if math.isfinite(value) else None for value in values]


def _show_table(console: Console, title: str, rows: Mapping[str, str]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    # Not as the table's own title, which would be folded to its width.
    console.print(title)
    console.print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


# The MLP.


def train_mlp(options: Options) -> int:
    """Train an MLP, write the results to the folder ``--out`` and return the exit status."""
    console = _console()
    settings, data = _begin(options, CLASSIC_MLP if options.classic else MLP, console)
    if settings.classic:
        model = nn.MLP.classic(seed=settings.seed)
    else:
        model = nn.MLP([784, *settings.hidden, 10], MLP_ACTIVATION, seed=settings.seed)
    kept, held_out = hold_out(len(data.y_train), settings.seed)

    def callback(p: nn.Progress) -> None:
        watch.see(p, {"loss": p.loss, "accuracy": p.accuracy, "held out": p.validation_accuracy})

    with _Watch(console, settings.epochs) as watch:
        with watch.bar():
            history = model.fit(
                data.x_train[kept],
                data.y_train[kept],
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                optimizer=settings.optimizer,
                lr_schedule=nn.linear_decay if settings.lr_decay else None,
                validation_data=(data.x_train[held_out], data.y_train[held_out]) if len(held_out) else None,
                callback=callback,
                callback_every="call",
            )
        _finish_mlp(model, data, settings, history, watch.epochs_done, console)
    return 130 if watch.interrupted else 0


def hold_out(count: int, seed: int) -> tuple[Array, Array]:
    """Divide positions 0 to `count` at random into those to train with and the share `HELD_OUT`, each ascending."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = int(count * HELD_OUT)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _finish_mlp(
    model: nn.MLP, data: Mnist, settings: Settings, history: nn.History, epochs_done: int, console: Console
) -> None:
    """Save the network, measure it on the test images, and write and show what came out."""
    from . import plots

    out = settings.out
    probabilities = model.predict_proba(data.x_test)
    _check_finite(probabilities)
    model.save(out / "model.safetensors")
    # Not the largest probability: several sigmoids may be rounded to 1.
    predicted = model.predict(data.x_test)
    curves = evaluation.roc_curves(data.y_test, probabilities)
    scores = evaluation.classification(data.y_test, predicted, curves)
    files.write_json(
        out / "metrics.json",
        {
            **scores,
            **_facts(data, settings, history.seconds, epochs_done),
            "layers": model.layers,
            "history": {
                "loss": _finite(history.loss),
                "accuracy": _finite(history.accuracy),
                "validation_loss": _finite(history.validation_loss),
                "validation_accuracy": _finite(history.validation_accuracy),
            },
        },
    )
    plots.learning_curves(
        out / "learning_curves.png",
        history.loss,
        history.accuracy,
        history.validation_loss,
        history.validation_accuracy,
    )
    plots.confusion_matrix(out / "confusion_matrix.png", data.y_test, predicted)
    plots.roc_curves(out / "roc_curves.png", curves, len(data.y_test))
    plots.worst_mistakes(out / "worst_mistakes.png", data.x_test, data.y_test, predicted, probabilities)
    _show_table(
        console,
        f"On {len(data.y_test):,} test images",
        {
            "accuracy": _share(scores["test_accuracy"]),
            "precision (macro)": _share(scores["macro_precision"]),
            "recall (macro)": _share(scores["macro_recall"]),
            "F1 (macro)": _share(scores["macro_f1"]),
            "ROC AUC (one against the rest)": "-" if scores["roc_auc"] is None else f"{scores['roc_auc']:.5f}",
            "training time": f"{history.seconds:.1f} s",
        },
    )
    console.print(f"Model, metrics and pictures: {out}", soft_wrap=True)


# The GAN.


def train_gan(options: Options) -> int:
    """Train a GAN, write the results to the folder ``--out`` and return the exit status."""
    from . import plots

    console = _console()
    # A covariance, as in the Fréchet distance, needs two.
    settings, data = _begin(options, CLASSIC_GAN if options.classic else GAN, console, least=2)
    if settings.classic:
        model = nn.GAN.classic(seed=settings.seed)
    else:
        model = nn.GAN(
            generator=[*settings.hidden, 784], discriminator=[*reversed(settings.hidden), 1], seed=settings.seed
        )
    pictures = make_folder(settings.out, "samples")
    for old in pictures.glob("epoch_*.png"):
        old.unlink()  # those of an earlier run, which may have had more epochs
    noise = model.noise(SHOWN, seed=settings.seed)
    every = max(1, round(settings.epochs / PICTURES))
    shown: dict[int, Image] = {}  # by how many steps the generator had taken

    def grid(title: str) -> Image:
        samples = model.sample(SHOWN, z=noise)
        _check_finite(samples)
        shown[model.steps] = plots.sample_grid(samples, title)
        return shown[model.steps]

    def picture(epoch: int) -> None:
        plots.save_image(pictures / f"epoch_{epoch:04}.png", grid(f"epoch {epoch}"))

    def callback(p: nn.GANProgress) -> None:
        watch.see(p, {"generator loss": p.generator_loss, "discriminator loss": p.discriminator_loss})
        if p.epoch_done and (p.epoch % every == 0 or p.epoch == p.epochs):
            picture(p.epoch)

    with _Watch(console, settings.epochs) as watch:
        picture(0)
        with watch.bar():
            history = model.fit(
                data.x_train,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                optimizer=settings.optimizer,
                callback=callback,
                callback_every="call",
            )
        if model.steps not in shown:
            grid(f"epoch {len(history.generator_loss)}, interrupted")
        plots.save_animation(settings.out / "samples.gif", list(shown.values()))
        plots.save_image(settings.out / "samples.png", shown[model.steps])
        _finish_gan(model, data, settings, history, watch.epochs_done, console)
    return 130 if watch.interrupted else 0


def _finish_gan(
    model: nn.GAN, data: Mnist, settings: Settings, history: nn.GANHistory, epochs_done: int, console: Console
) -> None:
    """Save the network, measure its samples, and write and show what came out."""
    from . import plots

    out = settings.out
    model.save(out / "model.safetensors")
    console.print("Training the classifier that judges the samples.")
    judge = nn.MLP([784, JUDGE_HIDDEN, 10], "relu", seed=settings.seed)
    judge.fit(data.x_train, data.y_train, epochs=JUDGE_EPOCHS, batch_size=64, optimizer="adam")
    judge_accuracy = judge.evaluate(data.x_test, data.y_test)["accuracy"]
    samples = model.sample(JUDGED)
    real_features = judge.features(data.x_test)
    quality = evaluation.sample_quality(judge.predict_proba(samples), judge.features(samples), real_features)
    # What genuine digits score, for comparison: as many training images.
    genuine = data.x_train[np.random.default_rng(settings.seed).permutation(len(data.x_train))[:JUDGED]]
    genuine_distance = evaluation.frechet_distance(judge.features(genuine), real_features)
    files.write_json(
        out / "metrics.json",
        {
            **quality,
            "frechet_distance_of_genuine_digits": genuine_distance,
            "samples_judged": JUDGED,
            "classifier_accuracy": judge_accuracy,
            **_facts(data, settings, history.seconds, epochs_done),
            "history": {
                "generator_loss": _finite(history.generator_loss),
                "discriminator_loss": _finite(history.discriminator_loss),
            },
        },
    )
    plots.gan_losses(out / "loss_curves.png", history.generator_loss, history.discriminator_loss)
    plots.class_shares(out / "class_shares.png", quality["class_shares"])
    rarest = int(np.argmin(quality["class_shares"]))
    _show_table(
        console,
        f"What a classifier ({judge_accuracy:.2%} right on the test images) makes of {JUDGED:,} samples",
        {
            f"classified with a probability of at least {evaluation.CONFIDENT}": _share(quality["confident_share"]),
            f"share of the rarest digit ({rarest})": _share(quality["class_shares"][rarest]),
            "Fréchet distance to the test images": f"{quality['frechet_distance']:.2f}",
            "the same for genuine training images": f"{genuine_distance:.2f}",
            "training time": f"{history.seconds:.1f} s",
        },
    )
    console.print(f"Model, metrics and pictures: {out}", soft_wrap=True)
