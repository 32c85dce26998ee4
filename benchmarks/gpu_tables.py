"""What a run of `gpu_report.py` says: tables for a terminal, Markdown for `docs/performance.md`, and the targets.

Everything is computed from the report, a dictionary as it is in ``report.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemmlet.bench.report import LOST, between_markers
from gemmlet.bench.results import Results, Row, from_json
from gemmlet.bench.targets import Limit, Target, Verdict, verdict
from gemmlet.bench.timing import duration

Report = Mapping[str, Any]

# What a weight may differ from the CPU's after 100 steps, relative to the largest of its array: rounding. Adam divides
# by the size of gradients, of which the smallest are little else.
WEIGHTS = {"sgd": 1e-5, "adam": 1e-3}
ACCURACY = 0.975
REQUIRED_TOOLS = ("memcheck", "racecheck")


def rows(report: Report) -> list[Row]:
    """Return the rows that were timed."""
    content = {**Results("seconds", [], {}, {}, {}).as_json(), "rows": report.get("rows", [])}
    return list(from_json(content).rows)


def merged(reports: Sequence[Report]) -> dict[str, Any]:
    """Return reports of one GPU as one: what several have is the last one's.

    Raises
    ------
    ValueError
        They are of different GPUs.
    """
    result: dict[str, Any] = {**reports[0]}
    for report in reports[1:]:
        if report["gpu"]["name"] != result["gpu"]["name"]:
            raise ValueError(f"reports of different GPUs: {result['gpu']['name']} and {report['gpu']['name']}")
        only = [*result["settings"]["only"], *report["settings"]["only"]]
        kept = {(row["group"], row["name"]): row for row in [*result["rows"], *report["rows"]]}
        names = ("stages", "sanitizers", "trained", "roof", "tables")
        parts = {name: {**result.get(name, {}), **report.get(name, {})} for name in names}
        notes = [*result["notes"], *report["notes"]]
        settings = {**report["settings"], "only": list(dict.fromkeys(only))}
        result = {**report, **parts, "settings": settings, "rows": list(kept.values()), "notes": notes}
    return result


def groups(timed: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each group."""
    for name, of_it in itertools.groupby(sorted(timed, key=lambda row: row.group), key=lambda row: row.group):
        yield name, list(of_it)


#
# Targets
#


@dataclass(frozen=True)
class RooflineTarget:
    """A percentage of the roofline that every row has to reach."""

    work: str
    chosen: Callable[[Row], bool]
    at_least: float

    def verdict(self, timed: Sequence[Row]) -> Verdict:
        """Return what the rows say."""
        required = f"{self.at_least:g} of the copy bandwidth, every row"
        chosen = [row for row in timed if self.chosen(row)]
        failed = [row.name for row in chosen if "gemmlet" in row.timed and row.timed["gemmlet"].failed is not None]
        if failed:
            return Verdict(self.work, required, f"fails: {failed[0]}", met=False)
        shares = {row.name: share for row in chosen if (share := row.roofline_share()) is not None}
        if not shares:
            return Verdict(self.work, required, "not measured", met=None)
        worst = min(shares, key=lambda name: shares[name])
        measured = f"{shares[worst]:.2f}, {worst}, the worst of {len(shares)} rows"
        return Verdict(self.work, required, measured, met=shares[worst] >= self.at_least)


def _of(group: str, **labels: Any) -> Callable[[Row], bool]:
    return lambda row: row.group == group and all(row.labels.get(name) == value for name, value in labels.items())


def _unwaited(group: str) -> Callable[[Row], bool]:
    return lambda row: row.group == group and not row.labels.get("waited")


def _wide(least: int, most: int) -> Callable[[Row], bool]:
    """Layers whose larger side is within these bounds."""
    return lambda row: _of("linear", set="layers")(row) and least <= row.labels["width"] <= most


def _large(*dtypes: str) -> Callable[[Row], bool]:
    return lambda row: row.group == "matmul" and row.labels["side"] in (4096, 8192) and row.labels["dtype"] in dtypes


_EPOCH, _GAN, _CALL = "MNIST epoch 784-128-10, batch 64", "GAN step, batch 64", "a call on a small array, tanh 64x128"

TARGETS: tuple[Target | Limit | RooflineTarget, ...] = (
    Target("linear float32, 1024³ to 4096³", _of("linear", set="squares"), ("cuBLAS",), 0.97),
    Target("linear float32, layers up to 1024 wide, batch 64 to 4096", _wide(0, 1024), ("cuBLAS",), 1.2),
    Target("linear float32, layers 4096 wide, batch 64 to 1024", _wide(4096, 4096), ("cuBLAS",), 1.0),
    Target("matmul bfloat16 and float16, 4096³ and 8192³", _large("bfloat16", "float16"), ("cuBLAS",), 0.9),
    Target("matmul TF32, 4096³ and 8192³", _large("tf32"), ("cuBLAS",), 0.9),
    RooflineTarget("elementwise, 100 million elements", _of("elementwise"), 0.92),
    RooflineTarget("losses and functions of rows, 100 million elements", _unwaited("losses"), 0.9),
    Limit(_CALL, _of("overhead", call="tanh 64x128"), 8e-6),
    Limit(_EPOCH, _of("epoch"), 6e-3),
    Target(_EPOCH, _of("epoch"), ("pytorch graph",), 1.3),
    Limit(_GAN, _of("gan"), 60e-6),
    Target(_GAN, _of("gan"), ("pytorch graph",), 1.3),
    Target(_GAN, _of("gan"), ("jax",), 1.5),
    # Within 1.3 times the plain epoch.
    Target("epoch with dropout, label smoothing, augmentation", _of("fit"), ("plain",), 0.77),
)


def verdicts(report: Report) -> list[Verdict]:
    """Return what the run says about each target."""
    timed = rows(report)
    found = [t.verdict(timed) if isinstance(t, RooflineTarget) else verdict(t, timed) for t in TARGETS]
    return [*_facts(report), *found]


def _facts(report: Report) -> Iterator[Verdict]:
    trained = report.get("trained", {})

    def fact(work: str, required: str, measured: str | None, met: bool | None) -> Verdict:
        return Verdict(
            work, required, "not measured" if measured is None else measured, None if measured is None else met
        )

    tests = report.get("stages", {}).get("tests")
    yield fact("the tests with cuda", "all pass", tests and tests["summary"], met=bool(tests and tests["ok"]))
    tools = report.get("sanitizers", {})
    for tool in REQUIRED_TOOLS:
        found = tools.get(tool)
        yield fact(f"compute-sanitizer {tool}", "0 errors", found and found["summary"], met=bool(found and found["ok"]))
    accuracy, full = trained.get("mlp_accuracy"), trained.get("full", False)
    if accuracy is None:
        yield fact("MLP on MNIST, accuracy", f"{ACCURACY:.1%}", None, None)
    else:
        where = "" if full else ", trained on a sample of MNIST only"
        met = accuracy >= ACCURACY if full else None
        yield Verdict("MLP on MNIST, accuracy", f"{ACCURACY:.1%}", f"{accuracy:.2%}{where}", met)
    for rule, bound in WEIGHTS.items():
        difference = trained.get(f"weights_{rule}")
        measured = None if difference is None else f"{difference:.2g}"
        work = f"weights after 100 steps ({rule}), off the CPU's"
        yield fact(work, f"at most {bound:g}", measured, met=difference is not None and difference <= bound)
    bits = trained.get("same_bits")
    yield fact("trained twice", "the same bits", None if bits is None else "yes" if bits else "no", met=bool(bits))


def _word(v: Verdict) -> str:
    return "" if v.met is None else "met" if v.met else f"{LOST} missed"


#
# Text
#


def _short(seconds: float) -> str:
    return duration(seconds).replace(" ", "")


def _peers(of_it: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in of_it for name in row.timed if name != "gemmlet"))


def _ours(row: Row) -> list[str]:
    if not row.measured("gemmlet"):
        return ["FAILED", ""]
    share = row.roofline_share()
    return [_short(row.percentile("gemmlet", 50)), "" if share is None else f"{share:.0%}"]


def _theirs(row: Row, peer: str) -> str:
    if peer not in row.timed:
        return ""
    if row.timed[peer].failed is not None:
        return "failed"
    ratio = row.ratio(peer)
    time = _short(row.percentile(peer, 50))
    return time if ratio is None else f"{ratio:.2f}"


def _aligned(table: Sequence[Sequence[str]], *, words: bool = False) -> list[str]:
    """Lines of a table; its first column is of words, and the others are too, or of numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        ("  " if words else " ")
        .join(
            cell.ljust(width) if words or not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        .rstrip()
        for line in table
    ]


def text(report: Report) -> str:
    """Return everything as lines that fit a terminal, the targets last."""
    lines = [_machine(report), ""]
    for name, of_it in groups(rows(report)):
        peers = _peers(of_it)
        head = [f"{name} (one {of_it[0].unit})", "gemmlet", "%", *peers]
        table = [head, *([row.name, *_ours(row), *(_theirs(row, peer) for peer in peers)] for row in of_it)]
        lines += [*_aligned(table), ""]
    if lines[2:]:
        lines += [
            "%: of roofline. A peer's number: its time over gemmlet's, median of the rounds; above 1 gemmlet is ahead.",
            "",
        ]
    for table in report.get("tables", {}).values():
        lines += [table["title"], *_aligned([table["head"], *table["rows"]]), ""]
    lines += [*_stages(report), ""]
    lines += [f"note: {note}" for note in report.get("notes", [])]
    lines += _failed(report)
    lines += ["", *_aligned([["target", "required", "measured", ""], *_target_cells(report)], words=True)]
    return "\n".join(lines) + "\n"


def _target_cells(report: Report) -> list[list[str]]:
    return [[v.work, v.required, v.measured, _word(v)] for v in verdicts(report)]


def _machine(report: Report) -> str:
    gpu, versions = report["gpu"], report["versions"]
    roofline = report.get("roof", {})
    parts = [f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_bytes'] / 2**20:.0f} MiB"]
    parts.append(f"driver {gpu['driver']}")
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    if "copy" in roofline:
        parts.append(f"copies at {roofline['copy'] / 1e9:,.0f} GB/s, read and written")
    rates = {kind: rate for kind, rate in roofline.get("products", {}).items() if rate}
    if rates:
        parts.append("cuBLAS, 8192³: " + ", ".join(f"{kind} {rate / 1e12:.0f} TFLOP/s" for kind, rate in rates.items()))
    return "; ".join(parts)


def _stages(report: Report) -> list[str]:
    lines = []
    for name, stage in report.get("stages", {}).items():
        lines.append(f"{name}: {'ok' if stage['ok'] else 'FAILED'}, {stage['seconds']:.0f} s; {stage['summary']}")
        lines += [f"  {line}" for line in stage.get("failures", [])]
    for tool, found in report.get("sanitizers", {}).items():
        lines.append(f"  {tool}: {'ok' if found['ok'] else 'FAILED'}; {found['summary']}")
    return lines


def _failed(report: Report) -> list[str]:
    return [
        f"{name} fails in {row.key}: {timed.failed}"
        for row in rows(report)
        for name, timed in row.timed.items()
        if timed.failed is not None
    ]


#
# Markdown
#


def markdown(report: Report) -> str:
    """Return the run as Markdown."""
    lines = [f"Measured on {report['date'][:10]}: {_machine(report)}.", ""]
    lines += [f"- {line.strip()}" for line in _stages(report)]
    lines += [f"- {note}" for note in [*report.get("notes", []), *_failed(report)]]
    lines += ["", *_markdown_table(["target", "required", "measured", ""], _target_cells(report))]
    lines += [
        "",
        "p20, p50, p80: percentiles of gemmlet's time. Each peer: its time over gemmlet's, the median over the rounds, "
        f"and its own median time; above 1 gemmlet is ahead, {LOST} marks what it loses. % of roofline: the time that "
        "this card's copies, or cuBLAS at 8192³ in that type, would take, over gemmlet's.",
        "",
    ]
    for name, of_it in groups(rows(report)):
        peers = _peers(of_it)
        lost = sum(any((row.ratio(peer) or 1.0) < 1 for peer in peers) for row in of_it)
        head = [name, "p20", "p50", "p80", "% of roofline", *peers]
        table = [[row.name, *_percentiles(row), *(_markdown_peer(row, peer) for peer in peers)] for row in of_it]
        title = f"{name} (one {of_it[0].unit}): {len(of_it)} rows, {lost or 'none'} behind a peer"
        lines += [f"<details><summary>{title}</summary>", "", *_markdown_table(head, table), "", "</details>", ""]
    for table in report.get("tables", {}).values():
        body = _markdown_table(table["head"], table["rows"])
        lines += [f"<details><summary>{table['title']}</summary>", "", *body, "", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def _percentiles(row: Row) -> list[str]:
    if not row.measured("gemmlet"):
        return [f"{LOST} failed", "", "", ""]
    share = row.roofline_share()
    times = [duration(row.percentile("gemmlet", percent)) for percent in (20, 50, 80)]
    return [*times, "" if share is None else f"{share:.0%}"]


def _markdown_peer(row: Row, peer: str) -> str:
    cell = _theirs(row, peer)
    ratio = row.ratio(peer)
    return cell if ratio is None else f"{f'{LOST} ' if ratio < 1 else ''}{cell} ({duration(row.percentile(peer, 50))})"


def _markdown_table(head: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        # Names of kernels have what would be tags.
        return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, table)]


def written_into(document: str, report: Report) -> str:
    """Return the document with the report between its markers of ``gpu``; ValueError if it has none."""
    return between_markers(document, "gpu", markdown(report))
