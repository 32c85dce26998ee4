"""What ``gemmlet bench`` does, from checked options to the files in ``--out``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import get_num_threads
from .._files import replacing
from ..bench import instructions, machine, report, scaling, suite
from ..bench.case import Case, Settings
from ..bench.cases import GROUPS
from ..bench.implementations import IMPLEMENTATIONS
from ..bench.results import TIME, TOLERANCES, Results, load
from ..bench.timing import Plan
from . import files, info
from .errors import UserError

_WIDTH = 150

# Seconds for a case, and the least number of rounds.
_USUAL = Plan(1.0, 7)
_QUICK = Plan(0.05, 3, sample_seconds=1e-3, warm_seconds=4e-3, first_warm_seconds=0.02)


@dataclass(frozen=True)
class Options:
    """The parameters of the command in `app`, unchecked; None where the command line says nothing."""

    groups: list[str] | None
    words: str
    sides: str
    quick: bool
    threads: int | None
    seconds: float | None
    data_dir: Path | None
    out: Path
    only_list: bool
    scaling: bool
    instructions: bool
    earlier: Path | None
    compare: Path | None
    tolerance: float | None
    markdown: Path | None


def run(options: Options) -> int:
    """Run what the options say and return the exit status: 1 if a row got slower than ``--compare`` allows."""
    # Where there is no terminal, rich would fold the tables to 80 columns.
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
    _check(options)
    settings = Settings(options.quick, options.data_dir)
    choice = suite.Choice(options.groups or (), options.words, _implementations(options.sides))
    if options.only_list:
        for case in _cases(settings, choice):
            line = f"{case.key}  [{', '.join(case.implementations)}]"
            console.print(line, markup=False, soft_wrap=True, overflow="ignore", crop=False)
        return 0
    earlier = None if options.compare is None else _load(options.compare, "--compare")
    info.choose_backend()
    if options.scaling:
        return _run_scaling(console, options, choice)
    shown = None if options.earlier is None else _load(options.earlier, "--from")
    if options.markdown is not None:
        _between_markers(options.markdown, machine.versions() if shown is None else shown.versions, "")
    if shown is not None:
        results = shown
    elif options.instructions:
        results = _count(console)
    else:
        results = _measure(console, options, settings, choice)
    if options.earlier is None:
        files.write_json(files.make_folder(options.out) / "bench.json", results.as_json())
    report.show(console, results)
    if options.earlier is None:
        _draw(console, options, results)
    if options.markdown is not None:
        _write_markdown(options.markdown, results)
    if earlier is None:
        return 0
    tolerance = TOLERANCES[results.measure] if options.tolerance is None else options.tolerance / 100
    try:
        return 0 if report.show_changes(console, earlier, results, tolerance) else 1
    except ValueError as error:
        raise UserError(f"--compare {options.compare}: {error}") from error


def _check(options: Options) -> None:
    for name in options.groups or ():
        if name not in GROUPS:
            raise UserError(f"group {name!r} is unknown; the choices are {', '.join(GROUPS)}")
    if options.threads is not None and not 1 <= options.threads <= 1024:
        raise UserError(f"--threads must be from 1 to 1,024, got {options.threads}")
    for option, value in (("--seconds", options.seconds), ("--tolerance", options.tolerance)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{option} must be a number above 0, got {value:g}")
    from_file = options.earlier is not None
    modes = {"--scaling": options.scaling, "--instructions": options.instructions, "--from": from_file}
    if sum(modes.values()) > 1:
        raise UserError(f"{' and '.join(name for name, given in modes.items() if given)} exclude each other")
    if options.instructions and options.markdown is not None:
        raise UserError("--markdown is for times: leave out --instructions")
    if options.scaling and (options.compare or options.markdown):
        raise UserError("--scaling has curves, not rows: leave out --compare and --markdown")
    if options.instructions and (options.groups or options.words or options.sides or options.threads):
        raise UserError(
            "--instructions has a set of cases of its own: leave out GROUP, --filter, --sides and --threads"
        )
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError(f"--data-dir {options.data_dir} is not a folder")
    files.check_folder(options.out)


def _implementations(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise UserError(f"--sides: {name!r} is unknown; the choices are {', '.join(IMPLEMENTATIONS)}")
        if not IMPLEMENTATIONS[name].available():
            hint = ": pip install 'gemmlet[bench]'" if IMPLEMENTATIONS[name].in_extra else ""
            raise UserError(f"--sides: {name} needs the package {IMPLEMENTATIONS[name].package}{hint}")
    return names


def _cases(settings: Settings, choice: suite.Choice) -> list[Case]:
    cases = suite.chosen_cases(settings, choice)
    if not cases:
        raise UserError(f"no case matches --filter {choice.words!r}; gemmlet bench --list shows them")
    return cases


def _load(path: Path, option: str) -> Results:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: {error}") from error


def _threads(options: Options) -> int:
    return get_num_threads() if options.threads is None else options.threads


def _measure(console: Console, options: Options, settings: Settings, choice: suite.Choice) -> Results:
    _cases(settings, choice)
    usual = _QUICK if options.quick else _USUAL
    plan = usual if options.seconds is None else replace(usual, seconds=options.seconds)
    try:
        with _progress(console) as progress:
            return suite.run(settings, choice, plan, _threads(options), progress)
    except (OSError, ValueError) as error:  # of the data
        raise UserError(str(error).replace("(data_dir)", "(--data-dir)")) from error


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar, and yield a function that moves it: it takes what is measured, its number and how many there are."""
    with Progress(
        MofNCompleteColumn(),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not console.is_interactive,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, number, count: bar.update(task, description=text, completed=number, total=count)


def _count(console: Console) -> Results:
    try:
        with console.status("counting instructions under valgrind, which takes most of a minute"):
            return instructions.run()
    except instructions.CannotCountError as error:
        raise UserError(f"--instructions: {error}", code=1) from error


def _run_scaling(console: Console, options: Options, choice: suite.Choice) -> int:
    threads = _threads(options)
    implementations = tuple(
        name
        for name in scaling.LINES
        if IMPLEMENTATIONS[name].available() and name in (choice.implementations or IMPLEMENTATIONS)
    )
    if not implementations:
        raise UserError(f"--sides: none of them is in the curves, which have {', '.join(scaling.LINES)}")
    with _progress(console) as progress:
        seconds = (0.1 if options.quick else 1.0) if options.seconds is None else options.seconds
        curves = scaling.run(threads, seconds, options.quick, implementations, progress)
    out = files.make_folder(options.out)
    facts = machine.machine()
    content = {"machine": facts, "versions": machine.versions(), "settings": {"threads": threads}, "curves": curves}
    files.write_json(out / "scaling.json", content)
    report.show_scaling(console, curves, implementations)
    from ..bench import plots

    plots.scaling(out / "scaling.png", curves, f"{facts['cpu']}, {threads} threads where not said otherwise")
    console.print(f"Curves: {out}", markup=False, soft_wrap=True)
    return 0


def _draw(console: Console, options: Options, results: Results) -> None:
    from ..bench import plots

    threads = results.settings["threads"]
    shown = f"{results.machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    for name, rows in report.groups(results):
        compared = [row for row in rows if any(row.ratio(peer) is not None for peer in row.peers)]
        if compared:
            plots.ratios(options.out / f"{name}.png", name, compared, shown)
    console.print(f"Results: {options.out}", markup=False, soft_wrap=True)


def _write_markdown(path: Path, results: Results) -> None:
    if results.measure != TIME:
        raise UserError(f"--markdown is for times, and these are {results.measure}")
    tables = path.with_stem(f"{path.stem}-{results.versions['isa']}")
    page = _between_markers(path, results.versions, report.markdown(results, tables.name))
    for target, text in ((tables, report.markdown_tables(results)), (path, page)):
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _between_markers(path: Path, versions: Mapping[str, str], text: str) -> str:
    """The document with `text` as the section of the instruction set."""
    try:
        return report.between_markers(path.read_text("utf-8"), versions["isa"], text)
    except (OSError, ValueError) as error:
        raise UserError(f"--markdown {path}: {error}") from error
