"""Tables: on the terminal with rich, and as Markdown for `docs/performance.md`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .implementations import IMPLEMENTATIONS, OURS
from .results import TIME, Change, Results, Row, compare, differences
from .targets import TARGETS, Verdict, geometric_mean, verdict
from .timing import duration

LOST = "▼"


def _amount(value: float, measure: str) -> str:
    return duration(value) if measure == TIME else f"{value:,.0f}"


def groups(results: Results) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each group."""
    for name, rows in itertools.groupby(results.rows, key=lambda row: row.group):
        yield name, list(rows)


def _heading(name: str, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The title of a group and the names of its rows, with the unit of work in the title if all have the same."""
    units = {row.unit for row in rows}
    if len(units) == 1:
        return f"{name} (one {units.pop()})", [row.name for row in rows]
    return name, [f"{row.name} (one {row.unit})" for row in rows]


def _own_cells(row: Row) -> list[str]:
    """p20, p50, p80, the percentage of the roofline, and in some groups operations a second."""
    rate = [""] * (row.group in _RATED)
    ours = row.timed.get(OURS)
    if ours is None:
        return ["", "", "", "", *rate]
    if ours.failed is not None:
        return [f"{LOST} failed", "", "", "", *rate]
    share, reached = row.roofline_share(), row.rate()
    times = [duration(row.percentile(OURS, percent)) for percent in (20, 50, 80)]
    if rate and reached is not None:
        rate = [f"{reached / 1e9:.1f}"]
    return [*times, "" if share is None else f"{share:.0%}", *rate]


def _is_behind(row: Row, peer: str) -> bool:
    ratio = row.ratio(peer) if IMPLEMENTATIONS[peer].is_peer else None
    return ratio is not None and ratio < 1


def _peer_cell(row: Row, peer: str) -> str:
    if peer not in row.timed:
        return ""
    if row.timed[peer].failed is not None:
        return "failed"
    time, ratio = duration(row.percentile(peer, 50)), row.ratio(peer)
    return time if ratio is None else f"{f'{LOST} ' if _is_behind(row, peer) else ''}{ratio:.2f} ({time})"


_OWN_COLUMNS = ("p20", "p50", "p80", "% of roofline")
# Groups that show operations a second as well.
_RATED = ("wide",)
EXPLANATION = (
    "p20, p50, p80: percentiles of gemmlet's time for one unit of work. Each peer: its median time over gemmlet's, "
    "taken within each round, and its own median time; above 1 gemmlet is ahead. "
    f"{LOST} marks what gemmlet loses. % of roofline: the least time that this machine's arithmetic and memory "
    "allow, over gemmlet's; above 100% where zeros of images are skipped, whose operations are counted."
)

SUMMARY = (
    "Of each group: the median of the rows' % of roofline, and the geometric mean of the ratios to each peer, above 1 "
    f"where gemmlet is ahead; {LOST} and how many rows it loses."
)


def _cells(names: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The columns of a group's table, with the peers that any of its rows has; and its lines, each after its name."""
    peers = [name for name in IMPLEMENTATIONS if name != OURS and any(name in row.timed for row in rows)]
    lines = [
        [name, *_own_cells(row), *(_peer_cell(row, peer) for peer in peers)]
        for name, row in zip(names, rows, strict=True)
    ]
    rate = ["GFLOP/s a thread"] if rows[0].group in _RATED else []
    return [*_OWN_COLUMNS, *rate, *peers], lines


def show(console: Console, results: Results) -> None:
    """Print a table for each group, what failed, and the targets."""
    for name, rows in groups(results):
        title, names = _heading(name, rows)
        table = Table(title=title, title_justify="left")
        table.add_column("")
        if results.measure != TIME:
            table.add_column("instructions", justify="right")
            for shown, row in zip(names, rows, strict=True):
                table.add_row(shown, f"{row.percentile(OURS, 50):,.0f}" if row.measured(OURS) else "failed")
            console.print(table)
            continue
        columns, lines = _cells(names, rows)
        for column in columns:
            table.add_column(column, justify="right")
        for shown, *cells in lines:
            # The sign says it too: not every terminal has colours.
            table.add_row(shown, *(f"[red]{cell}[/red]" if LOST in cell else cell for cell in cells))
        console.print(table)
    for row in results.rows:
        for name, timed in row.timed.items():
            if timed.failed is not None:
                console.print(f"{name} fails in {row.key}: {timed.failed}", markup=False, soft_wrap=True)
    if results.measure == TIME:
        console.print(EXPLANATION)
        verdicts = [verdict(target, results.rows) for target in TARGETS]
        show_targets(console, verdicts, quick=bool(results.settings.get("quick")))
    for note in results.notes:
        console.print(note, markup=False, soft_wrap=True)


def show_targets(console: Console, verdicts: Sequence[Verdict], *, quick: bool) -> None:
    """Print what was reached of the targets that were measured."""
    known = [v for v in verdicts if v.met is not None]
    if not known:
        return
    title = "Targets" + (" (--quick: not the sizes that they name)" if quick else "")
    table = Table("target", "required", "measured", "", title=title, title_justify="left")
    for cells in _target_cells(known):
        table.add_row(*cells)
    console.print(table)
    if len(known) < len(verdicts):
        console.print(f"{len(verdicts) - len(known)} more targets need rows or peers that were not measured.")


def _target_cells(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the lines of a table, where what several lines are about stands once."""
    last = None
    for v in verdicts:
        yield "" if v.work == last else v.work, v.required, v.measured, _word(v)
        last = v.work


def _word(v: Verdict) -> str:
    return "not measured" if v.met is None else "met" if v.met else f"{LOST} missed"


def show_changes(console: Console, old: Results, new: Results, tolerance: float) -> bool:
    """Print how the rows changed; returns whether none is slower by more than the tolerance."""
    changes = compare(old, new, tolerance)
    table = Table("", "before", "now", "change", title="Compared with the earlier run, 20th percentiles")
    for column in table.columns[1:]:
        column.justify = "right"
    for change in changes:
        mark = f"{LOST} " if change.slower else ""
        table.add_row(
            change.key,
            _amount(change.before, new.measure),
            "failed" if change.after == float("inf") else _amount(change.after, new.measure),
            f"{mark}{change.change - 1:+.1%}",
        )
    console.print(table)
    for line in differences(old, new):
        console.print(line, markup=False, soft_wrap=True)
    slower: list[Change] = [change for change in changes if change.slower]
    unit = "slower" if new.measure == TIME else "more instructions"
    rows = f"{len(slower)} of {len(changes)} rows:" if slower else f"None of {len(changes)} rows is"
    console.print(f"{rows} more than {tolerance:.0%} {unit}.")
    return not slower


def show_scaling(
    console: Console, curves: Mapping[str, Sequence[Mapping[str, Any]]], implementations: Sequence[str]
) -> None:
    """Print a table for each parameter: images per second, and the peak of memory."""
    for parameter, points in curves.items():
        table = Table(parameter, *implementations, title="Images per second (peak memory in MB)", title_justify="left")
        for point in points:
            cells = [
                "failed" if "failed" in m else f"{m['images_per_second']:,.0f} ({m['peak_mb']:,.0f})"
                for m in (point["sides"][name] for name in implementations)
            ]
            table.add_row(str(point["value"]), *cells)
        console.print(table)
    for parameter, points in curves.items():
        for point in points:
            for name, measured in point["sides"].items():
                if "failed" in measured:
                    console.print(f"{name} fails at {parameter} {point['value']}: {measured['failed']}", markup=False)


# Markdown.


def markdown(results: Results, tables: str) -> str:
    """Return the run as Markdown: the machine, the targets, and a line for each group; its rows are in `tables`."""
    lines = [_measured_on(results), ""]
    if flops := results.roofline.get("flops"):
        peaks = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in flops.items())
        copies = ", ".join(
            f"{rate / 1e9:.0f} GB/s at {int(size) / 1e6:.3g} MB" for size, rate in results.roofline["copy"].items()
        )
        lines += [f"The roofline: {peaks}; copies, read and written: {copies}.", ""]
    for note in results.notes:
        lines += [f"{note}.", ""]
    verdicts = [verdict(target, results.rows) for target in TARGETS]
    lines += _markdown_table(("target", "required", "measured", ""), list(_target_cells(verdicts)))
    lines += ["", SUMMARY, "", *_summary(results), "", f"Every row: [{tables}]({tables})."]
    return "\n".join(lines) + "\n"


def _summary(results: Results) -> list[str]:
    peers = [name for name in IMPLEMENTATIONS if any(name in row.peers for row in results.rows)]
    table = []
    for name, rows in groups(results):
        reached = [share for row in rows if (share := row.roofline_share()) is not None]
        cells = [name, str(len(rows)), f"{statistics.median(reached):.0%}" if reached else ""]
        for peer in peers:
            ratios = [ratio for row in rows if (ratio := row.ratio(peer)) is not None]
            lost = sum(_is_behind(row, peer) for row in rows)
            cells.append(f"{geometric_mean(ratios):.2f}{f' ({LOST} {lost})' if lost else ''}" if ratios else "")
        table.append(cells)
    return _markdown_table(("group", "rows", "% of roofline", *peers), table)


def markdown_tables(results: Results) -> str:
    """Return every row of the run as Markdown."""
    lines = [f"# Every row of a run on {results.versions['isa']}", "", _measured_on(results), "", EXPLANATION, ""]
    for name, rows in groups(results):
        title, names = _heading(name, rows)
        columns, table = _cells(names, rows)
        lost = sum(any(_is_behind(row, peer) for peer in IMPLEMENTATIONS) for row in rows)
        behind = f"{len(rows)} rows, {lost or 'none'} behind a peer"
        lines += [f"## {title}: {behind}", "", *_markdown_table((name, *columns), table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _measured_on(results: Results) -> str:
    machine, settings = results.machine, results.settings
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        f"Measured on {settings['date'][:10]}: {machine['cpu']}, {machine['processors']} processors, "
        f"{', '.join(machine['caches'])}; {machine['system']}; {settings['threads']} threads for every implementation. "
        f"{versions}."
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *(line(row) for row in rows)]


def between_markers(document: str, name: str, text: str) -> str:
    """Return the document with `text` between the markers of `name`; ValueError if it has none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"expected the lines {begin} and {end}, once each and in this order")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"
