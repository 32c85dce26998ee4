"""The commands and their options. What a training does is in `train_mlp` and `train_gan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .. import nn
from ..backends import select
from ..bench.results import TOLERANCES
from . import bench, info, train_gan, train_mlp, training
from .errors import UserError


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"gemmlet {__version__}")
        raise typer.Exit


def _data_dir(show_default: str) -> Any:
    help_text = "Folder with the four MNIST files, raw or gzipped."
    return typer.Option(metavar="FOLDER", help=help_text, show_default=show_default)


# The defaults of each network, as the help shows them.
_MLP, _CLASSIC, _GAN = train_mlp.DEFAULTS, train_mlp.CLASSIC, train_gan.DEFAULTS
_EPOCHS = f"mlp {_MLP.epochs}, gan {_GAN.epochs}"
_BATCH_SIZES = f"mlp {_MLP.batch_size}, with --classic {_CLASSIC.batch_size}; gan {_GAN.batch_size}"
_OPTIMIZERS = f"mlp {_MLP.optimizer}, with --classic {_CLASSIC.optimizer}; gan {_GAN.optimizer}"
_WIDTHS = "mlp {}; gan {}".format(*(",".join(map(str, each.hidden)) for each in (_MLP, _GAN)))
# What bench --compare allows, as the help shows it.
_TOLERANCES = "{seconds:.0%} of time, {instructions:.0%} of instructions".format(**TOLERANCES)

DataDir = Annotated[Path | None, _data_dir("GEMMLET_DATA_DIR, else the download, else a small sample")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training images.", show_default=_EPOCHS)]
BatchSize = Annotated[int | None, typer.Option(help="Images in a mini-batch.", show_default=_BATCH_SIZES)]
Lr = Annotated[
    float | None,
    typer.Option(
        help="Learning rate; mlp without --classic lowers it to 0 over the epochs.", show_default="by the optimizer"
    ),
]
OptimizerName = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(nn.OPTIMIZERS)}.", show_default=_OPTIMIZERS)
]
Hidden = Annotated[
    str | None,
    typer.Option(
        metavar="WIDTHS",
        help="Hidden layers, such as 128 or 256,128; a GAN's discriminator has them in reverse.",
        show_default=_WIDTHS,
    ),
]
# Numba and NumPy leave matmul to a BLAS, which may add in another order with other threads.
Seed = Annotated[
    int, typer.Option(help="The same seed gives the same result, with the backend cpu for any number of threads.")
]
BackendName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"What computes: {', '.join(select.CHOICES)}.",
        show_default="GEMMLET_BACKEND, else the first that works",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads to use.", show_default="what gemmlet info shows")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")]

app = typer.Typer(help="Compiled kernels for small dense networks.", add_completion=False, rich_markup_mode=None)
train_app = typer.Typer(help="Train a network on MNIST.", rich_markup_mode=None)
app.add_typer(train_app, name="train")


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@train_app.callback(invoke_without_command=True)
def _train(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("info")
def _info() -> None:
    """Show backend, instruction set, threads and versions."""
    info.show()


def _add_training(name: str, run: Callable[[training.Options], int], classic_help: str, description: str) -> None:
    def command(
        data_dir: DataDir = None,
        epochs: Epochs = None,
        batch_size: BatchSize = None,
        lr: Lr = None,
        optimizer: OptimizerName = None,
        hidden: Hidden = None,
        seed: Seed = 0,
        backend: BackendName = None,
        threads: Threads = None,
        out: Out = Path("runs", name),
        classic: bool = typer.Option(False, "--classic", help=classic_help),
    ) -> int:
        options = training.Options(
            data_dir, epochs, batch_size, lr, optimizer, hidden, seed, backend, threads, out, classic
        )
        return _uninterrupted(run, options)

    train_app.command(name, help=description)(command)


_add_training(
    "mlp",
    train_mlp.run,
    "784-128-10, tanh, sigmoid outputs, binary cross-entropy, SGD 0.1.",
    """Train a classifier of digits.

    The curves show a tenth of the training images that is held out; the test images are used once, at the end. Ctrl-C
    stops early and saves what was learnt.
    """,
)
_add_training(
    "gan",
    train_gan.run,
    "100-256-784 tanh generator, 784-256-1 discriminator.",
    """Train a generator of digits, and measure it with a classifier trained on the spot.

    Ctrl-C stops early and saves what was learnt.
    """,
)


@app.command("bench")
def _bench(
    groups: Annotated[
        list[str] | None, typer.Argument(metavar="[GROUP]...", help="What to measure.", show_default="everything")
    ] = None,
    words: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only cases with all of these words, as in 'tanh float32'.")
    ] = "",
    sides: Annotated[
        str,
        typer.Option(
            metavar="NAMES", help="Only these implementations, as in gemmlet,numpy.", show_default="all installed"
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and rounds: a minute or two.")] = False,
    threads: Threads = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds for a case, all implementations together.", show_default="1, with --quick 0.1"),
    ] = None,
    data_dir: Annotated[Path | None, _data_dir("GEMMLET_DATA_DIR, else a small sample, repeated")] = None,
    out: Out = Path("runs/bench"),
    only_list: Annotated[bool, typer.Option("--list", help="List the cases and their implementations.")] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Curves over batch, width, depth and threads, with peak memory, instead.")
    ] = False,
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Count instructions with valgrind instead of timing.")
    ] = False,
    earlier: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Show an earlier bench.json instead of measuring.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with an earlier bench.json; exit status 1 if a row got slower."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="PERCENT", help="How much slower a row may get.", show_default=_TOLERANCES)
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables between the markers of a Markdown file.")
    ] = None,
) -> int:
    """Check and time the kernels and the trainings beside NumPy, PyTorch, JAX, scikit-learn and numexpr.

    Peers that are not installed are left out; they come with the extra bench.
    """
    options = locals()
    return _uninterrupted(bench.run, bench.Options(**options))


Given = TypeVar("Given")


def _uninterrupted(command: Callable[[Given], int], options: Given) -> int:
    try:
        return command(options)
    except KeyboardInterrupt:
        # Typer would make of it what depends on its version.
        raise UserError("interrupted", code=130) from None


def run(words: list[str]) -> int:
    """Run the command that `words` name and return its exit status."""
    command = typer.main.get_command(app)
    try:
        return int(command.main(args=words, prog_name="gemmlet", standalone_mode=False) or 0)
    except Exception as error:
        # Click's errors. Their class is not to be named: some versions of Typer use click, others hold a copy of it.
        text = getattr(error, "format_message", None)
        if text is None:
            raise
        raise UserError(text(), code=getattr(error, "exit_code", 2)) from error
