"""The commands and their options. What a training does is in `train_mlp` and `train_gan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .. import nn
from ..backends import select
from ..bench.results import TOLERANCES
from ..formulas.activations import ACTIVATIONS
from . import augment, bench, evaluate, info, predict, sample, train_gan, train_mlp, training
from .commands import COMMANDS, HELP_OPTIONS, PROGRAMS
from .errors import UserError

Number = TypeVar("Number", int, float)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"gemmlet {__version__}")
        raise typer.Exit


def _option(*values: Any, help: str, default: str, **settings: Any) -> Any:  # noqa: A002 - it is Typer's name
    """An option whose default the help describes in words; Typer would put these in brackets of their own."""
    return typer.Option(*values, help=f"{help}  [default: {default}]", show_default=False, **settings)


def _parser(kind: type[Number], what: str) -> dict[str, Any]:
    """The settings of an option that takes a number: what is said of others names what was given."""

    def parse(word: str) -> Number:
        try:
            return kind(word)
        except ValueError:
            raise typer.BadParameter(f"{word!r} is no {what}") from None

    return {"parser": parse, "metavar": "NUMBER"}


INTEGER, REAL = _parser(int, "integer"), _parser(float, "number")


def _data_dir(default: str) -> Any:
    return _option(metavar="FOLDER", help="Folder with the four MNIST files, raw or gzipped.", default=default)


# What bench --compare allows, as the help shows it.
_TOLERANCES = "{seconds:.0%} of time, {instructions:.0%} of instructions".format(**TOLERANCES)

DataDir = Annotated[Path | None, _data_dir("GEMMLET_DATA_DIR, else the download, else a small sample")]
Momentum = Annotated[float | None, _option(help="Momentum, of sgd alone.", default="0", **REAL)]
# Numba and NumPy leave matmul to a BLAS, which may add in another order with other threads.
Seed = Annotated[
    int | None,
    _option(
        help="The same seed gives the same result, with the backend cpu for any number of threads.",
        default="0",
        **INTEGER,
    ),
]
BackendName = Annotated[
    str | None,
    _option(
        metavar="NAME",
        help=f"What computes: {', '.join(select.CHOICES)}.",
        default="GEMMLET_BACKEND, else the first that works",
    ),
]
Threads = Annotated[int | None, _option(help="Threads to use.", default="what gemmlet info shows", **INTEGER)]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the results go.")]
OutOfTraining = Annotated[
    Path | None, _option(metavar="FOLDER", help="Where the results go.", default="runs/ and the network's name")
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Go on with the training that left this folder. Its options hold; --epochs may be raised.",
    ),
]

app = typer.Typer(
    help="Compiled kernels for small dense networks.",
    epilog=PROGRAMS,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": list(HELP_OPTIONS)},
)
train_app = typer.Typer(help=COMMANDS["train"], rich_markup_mode=None)
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


@app.command("info", help=COMMANDS["info"])
def _info() -> None:
    info.show()


@dataclass(frozen=True)
class _Texts:
    """What the help of a training says, where the networks differ."""

    command: str
    lr: str
    hidden: str
    activation: str
    dropout: str
    classic: str
    recipe: str = ""  # without a help there is none


def _add_training(
    name: str,
    defaults: training.Defaults,
    classic_defaults: training.Defaults,
    run: Callable[[training.Options], int],
    texts: _Texts,
) -> None:
    is_gan = name == "gan"  # which refuses some of the options

    def differing(attribute: str) -> str:
        """The defaults of an option, with and without --classic."""
        value, other = (training.text(getattr(each, attribute)) for each in (defaults, classic_defaults))
        return value if value == other else f"{value}; with --classic {other}"

    def by_optimizer(setting: str) -> str:
        value, other = (
            ", ".join(f"{key} {rule.settings()[setting]:g}" for key, rule in each.optimizers.items())
            for each in (defaults, classic_defaults)
        )
        return value if value == other else f"{value}; with --classic {other}"

    def command(
        data_dir: DataDir = None,
        epochs: int | None = _option(
            None, help="Passes over the training images.", default=differing("epochs"), **INTEGER
        ),
        batch_size: int | None = _option(
            None, help="Images in a mini-batch.", default=differing("batch_size"), **INTEGER
        ),
        lr: float | None = _option(None, help=texts.lr, default=by_optimizer("lr"), **REAL),
        optimizer: str | None = _option(
            None, metavar="NAME", help=f"One of {', '.join(nn.OPTIMIZERS)}.", default=differing("optimizer")
        ),
        weight_decay: float | None = _option(
            None, help="Weight decay of the optimizer.", default=by_optimizer("weight_decay"), **REAL
        ),
        momentum: Momentum = None,
        clip_value: float | None = _option(
            None, help="What each number of a gradient is limited to.", default="no limit", **REAL
        ),
        l1: float | None = _option(None, help="L1 penalty of the weights.", default="0", hidden=is_gan, **REAL),
        l2: float | None = _option(None, help="L2 penalty of the weights.", default="0", hidden=is_gan, **REAL),
        hidden: str | None = _option(None, metavar="WIDTHS", help=texts.hidden, default=differing("hidden")),
        activation: str | None = _option(None, metavar="NAME", help=texts.activation, default=differing("activation")),
        dropout: str | None = _option(
            None, training.option_name("dropout", name), metavar="RATES", help=texts.dropout, default="0"
        ),
        input_dropout: float | None = _option(
            None, training.option_name("input_dropout", name), help="The same of its inputs.", default="0", **REAL
        ),
        seed: Seed = None,
        backend: BackendName = None,
        threads: Threads = None,
        out: OutOfTraining = None,
        resume: Resume = None,
        classic: bool = typer.Option(False, "--classic", help=texts.classic),
        augment: str | None = _option(
            None,
            metavar="[SETTINGS]",
            help="Transform images anew in each epoch, by settings such as rotate=12,elastic=0, else those of gemmlet "
            "augment.",
            default="as they are",
        ),
        patience: int | None = _option(
            None,
            help="End after so many epochs without a smaller loss of held-out images, and keep the best.",
            default="all epochs",
            hidden=is_gan,
            **INTEGER,
        ),
        recipe: str | None = _option(None, metavar="NAME", help=texts.recipe, default="none", hidden=not texts.recipe),
    ) -> int:
        given = locals()
        return run(training.Options(**{field.name: given[field.name] for field in fields(training.Options)}))

    train_app.command(name, help=texts.command)(command)


_RECIPES = ", ".join(f"{name} ({recipe.epochs} epochs)" for name, recipe in nn.recipes.RECIPES.items())
_ACTIVATIONS = f"one of {', '.join(ACTIVATIONS)}"

_add_training(
    "mlp",
    train_mlp.DEFAULTS,
    train_mlp.CLASSIC,
    train_mlp.run,
    _Texts(
        command="""Train a classifier of digits.

        The curves show a tenth of the training images that is held out; the test images are used once, at the end.
        Ctrl-C stops early and saves what was learnt.
        """,
        lr="Learning rate; without --classic it falls to 0 over the epochs.",
        hidden="Hidden layers, such as 128 or 256,128.",
        activation=f"Of the hidden layers: {_ACTIVATIONS}.",
        dropout="The share of the units of hidden layers that a step leaves out: for all of them, or a list.",
        classic="784-128-10, tanh, sigmoid outputs, binary cross-entropy, SGD 0.1.",
        recipe=f"A whole training, on all training images: {_RECIPES}.",
    ),
)
_add_training(
    "gan",
    train_gan.DEFAULTS,
    train_gan.CLASSIC,
    train_gan.run,
    _Texts(
        command="""Train a generator of each digit, and measure it with a classifier trained on the spot.

        Ctrl-C stops early and saves what was learnt.
        """,
        lr="Learning rate; without --classic it falls to 0 in the second half of the epochs.",
        hidden="Hidden layers of the generator, such as 128 or 256,128; the discriminator has them in reverse.",
        activation=f"Of the hidden layers, or NAME,NAME of the generator's and the discriminator's: {_ACTIVATIONS}.",
        dropout="The share of the units of the discriminator's hidden layers that passes leave out: of all, or a list.",
        classic="100-256-784 tanh generator, 784-256-1 discriminator, which are told no labels.",
    ),
)


_MODEL = "A file of save or to_onnx, or the folder that a training left."
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command("evaluate", short_help=COMMANDS["evaluate"])
def _evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL [OTHER]", help=_MODEL, show_default=False)],
    data_dir: DataDir = None,
    as_json: Json = False,
    out: Annotated[
        Path | None, _option(metavar="FOLDER", help="Where evaluation.json and pictures go.", default="nowhere")
    ] = None,
    backend: BackendName = None,
    threads: Threads = None,
) -> int:
    """Measure a classifier of digits on the test images: accuracy, precision, recall, F1, ROC AUC, calibration.

    Of two models it is said how many mistakes of the first the second corrects, and how many it makes anew; the
    pictures are those of the second.
    """
    options = locals()
    return evaluate.run(evaluate.Options(**options))


@app.command("predict", short_help=COMMANDS["predict"])
def _predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="PNG and the like, or an IDX file.", show_default=False)
    ],
    as_json: Json = False,
    backend: BackendName = None,
    threads: Threads = None,
) -> int:
    """Say which digit each image shows, and how sure the network is.

    An image of 28 × 28 pixels is taken as it is, any other one cut to the digit and scaled as those of MNIST were.
    """
    options = locals()
    return predict.run(predict.Options(**options))


@app.command("sample", short_help=COMMANDS["sample"])
def _sample(
    model: Annotated[
        Path,
        typer.Argument(metavar="GAN", help="A file of save, or the folder that a training left.", show_default=False),
    ],
    count: Annotated[int, typer.Option("-n", "--count", help="How many samples, or rows.", **INTEGER)] = 100,
    digit: Annotated[
        int | None,
        _option(help="Only this digit; of a network that was trained with labels.", default="all", **INTEGER),
    ] = None,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Rows, each from one sample to another of the same digit.")
    ] = False,
    seed: Annotated[
        int | None, _option(help="The same seed gives the same samples.", default="other ones each time", **INTEGER)
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, a PNG.")] = Path("samples.png"),
    backend: BackendName = None,
    threads: Threads = None,
) -> int:
    """Draw samples of a GAN into a picture."""
    options = locals()
    return sample.run(sample.Options(**options))


_AUGMENT = nn.Augment()


def _setting(what: str) -> Any:
    return typer.Option(metavar="NUMBER", help=what, parser=REAL["parser"])


@app.command("augment", short_help=COMMANDS["augment"])
def _augment(
    data_dir: DataDir = None,
    rotate: Annotated[float, _setting("Degrees, to either side.")] = _AUGMENT.rotate,
    scale: Annotated[
        float, _setting("Height and width, each by a factor of 1 - NUMBER to 1 + NUMBER.")
    ] = _AUGMENT.scale,
    shear: Annotated[
        float, _setting("Pixels by which a row is shifted, to either side, for each row.")
    ] = _AUGMENT.shear,
    shift: Annotated[float, _setting("Pixels, along each axis, to either side.")] = _AUGMENT.shift,
    elastic: Annotated[float, _setting("Pixels by which a pixel is displaced, standard deviation.")] = _AUGMENT.elastic,
    noise: Annotated[float, _setting("Grey levels of 256 that are added, standard deviation.")] = _AUGMENT.noise,
    erase: Annotated[float, _setting("Probability with which a rectangle is erased.")] = _AUGMENT.erase,
    seed: Annotated[int, typer.Option(help="The same seed gives the same picture.", **INTEGER)] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, a PNG.")] = Path("augmented.png"),
    backend: BackendName = None,
) -> int:
    """Draw a digit of each class, and what augmentation makes of it in nine epochs.

    0 leaves something out. The ranges and the sources: gemmlet.nn.Augment.
    """
    options = locals()
    return augment.run(augment.Options(**options))


@app.command("bench", short_help=COMMANDS["bench"])
def _bench(
    groups: Annotated[
        list[str] | None,
        typer.Argument(metavar="GROUP", help="What to measure.  [default: everything]", show_default=False),
    ] = None,
    words: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only cases with all of these words, as in 'tanh float32'.")
    ] = "",
    sides: Annotated[
        str, _option(metavar="NAMES", help="Only these implementations, as in gemmlet,numpy.", default="all installed")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and rounds: a minute or two.")] = False,
    threads: Threads = None,
    seconds: Annotated[
        float | None,
        _option(help="Seconds for a case, all implementations together.", default="1, with --quick 0.1", **REAL),
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
        float | None,
        _option(help="How much slower a row may get.", default=_TOLERANCES, **REAL | {"metavar": "PERCENT"}),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write targets and means into a Markdown file, and all rows beside it."),
    ] = None,
) -> int:
    """Check and time the kernels and the trainings beside NumPy, PyTorch, JAX, scikit-learn and numexpr.

    Peers that are not installed are left out; they come with the extra bench.
    """
    options = locals()
    return bench.run(bench.Options(**options))


def run(words: list[str]) -> int:
    """Run the command that `words` name and return its exit status."""
    command = typer.main.get_command(app)
    given = []
    for word, following in pairwise([*words, ""]):
        given.append(word)
        if word == "--augment" and (not following or following.startswith("-")):
            given.append(training.DEFAULT_AUGMENT)  # Typer has no options whose value may be left out
    try:
        return int(command.main(args=given, prog_name="gemmlet", standalone_mode=False) or 0)
    except Exception as error:
        # Click's errors. Their class is not to be named: some versions of Typer use click, others hold a copy of it.
        text = getattr(error, "format_message", None)
        if text is None:
            raise
        raise UserError(text(), code=getattr(error, "exit_code", 2)) from error
