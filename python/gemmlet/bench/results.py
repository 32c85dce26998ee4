"""What came out of a run: rows of samples, and what they were measured on; saved as JSON, compared with another run.

Everything shown is computed from the samples, so that a file tells all that its table does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .implementations import OURS
from .timing import Timed, percentile, ratio

SCHEMA = 1
TIME, INSTRUCTIONS = "seconds", "instructions"
# How much more than before is a regression.
TOLERANCES = {TIME: 0.25, INSTRUCTIONS: 0.03}

# What files and attributes call the same; files say "sides" and "roof" for `Row.timed` and `roofline`.
_RUN = ("measure", "machine", "versions", "settings", "notes")
_ROW = ("group", "name", "unit", "labels", "flops", "bytes")


@dataclass(frozen=True)
class Row:
    """A case and what each implementation took, in seconds or instructions for one `unit`."""

    group: str
    name: str
    unit: str
    timed: Mapping[str, Timed]
    labels: Mapping[str, Any] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    roofline: float | None = None  # the least seconds that the work takes on this machine; None where not known

    @property
    def key(self) -> str:
        """What the row is known by."""
        return f"{self.group}: {self.name}"

    def measured(self, implementation: str) -> bool:
        """Whether there are samples of an implementation."""
        return implementation in self.timed and bool(self.timed[implementation].samples)

    def percentile(self, implementation: str, percent: float) -> float:
        """Return a percentile of an implementation's samples."""
        return percentile(self.timed[implementation].samples, percent)

    def ratio(self, peer: str, implementation: str = OURS) -> float | None:
        """Return the peer's time over that of `implementation`, None if one is missing; above 1 the peer is slower."""
        if not (self.measured(peer) and self.measured(implementation)):
            return None
        return ratio(self.timed[implementation].samples, self.timed[peer].samples)

    def roofline_share(self) -> float | None:
        """Return the share of the roofline that gemmlet reaches, by its median."""
        return self.roofline / self.percentile(OURS, 50) if self.roofline and self.measured(OURS) else None

    def rate(self) -> float | None:
        """Return gemmlet's operations a second and thread, by its median; None if one of the three is not known."""
        threads = self.labels.get("threads")
        if not (threads and self.flops and self.measured(OURS)):
            return None
        return self.flops / self.percentile(OURS, 50) / float(threads)

    @property
    def peers(self) -> list[str]:
        """The implementations that gemmlet is compared with."""
        return [name for name in self.timed if name != OURS]


@dataclass(frozen=True)
class Results:
    """A run: what it measured, on what, and how."""

    measure: str  # "seconds" or "instructions"
    rows: Sequence[Row]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()  # what a reader has to know besides
    roofline: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the run for a JSON file."""
        same = {name: getattr(self, name) for name in _RUN}
        return {"schema": SCHEMA, **same, "roof": self.roofline, "rows": [_row_as_json(row) for row in self.rows]}


def _row_as_json(row: Row) -> dict[str, Any]:
    implementations: dict[str, Any] = {}
    for name, timed in row.timed.items():
        # Five digits: the clock has no more, and files stay small.
        samples = [float(f"{value:.5g}") if value < 1 else value for value in timed.samples]
        implementations[name] = {"samples": samples} if timed.failed is None else {"failed": timed.failed}
    return {**{name: getattr(row, name) for name in _ROW}, "roof": row.roofline, "sides": implementations}


def from_json(content: Any) -> Results:
    """Return the run that `Results.as_json` made text of; ValueError if it is something else."""
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError("no results of gemmlet bench")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"results in the schema {content.get('schema')}, expected {SCHEMA}")
    if content.get("measure") not in TOLERANCES:
        raise ValueError(f"results in {content.get('measure')!r}, expected one of {', '.join(TOLERANCES)}")
    try:
        rows = []
        for row in content["rows"]:
            saved = row["sides"].items()
            timed = {name: Timed(tuple(entry.get("samples", ())), entry.get("failed")) for name, entry in saved}
            rows.append(Row(timed=timed, roofline=row["roof"], **{name: row[name] for name in _ROW}))
        return Results(rows=rows, roofline=content["roof"], **{name: content[name] for name in _RUN})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results of gemmlet bench that are damaged ({error})") from error


def load(path: Path) -> Results:
    """Read a run from a file; OSError or ValueError if it cannot be read, or holds something else."""
    try:
        return from_json(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no JSON ({error})") from error


# Comparing two runs.


@dataclass(frozen=True)
class Change:
    """How a row changed: `change` is what it takes now over what it took, infinite if it now fails."""

    key: str
    before: float
    after: float
    tolerance: float

    @property
    def change(self) -> float:
        """The new value over the old one."""
        return self.after / self.before

    @property
    def slower(self) -> bool:
        """Whether it is a regression."""
        return not self.change <= 1.0 + self.tolerance


def compare(old: Results, new: Results, tolerance: float) -> list[Change]:
    """Compare gemmlet's times of the rows that both runs have, by the 20th percentile, which noise moves least.

    Runs that measured different things, or share no row, are a ValueError.
    """
    if old.measure != new.measure:
        raise ValueError(f"one run counts {old.measure}, the other {new.measure}")
    before = {row.key: row for row in old.rows if row.measured(OURS)}
    changes = [
        Change(
            row.key,
            before[row.key].percentile(OURS, 20),
            row.percentile(OURS, 20) if row.measured(OURS) else math.inf,
            tolerance,
        )
        for row in new.rows
        if row.key in before and OURS in row.timed
    ]
    if not changes:
        raise ValueError("the two runs have no row in common")
    return changes


def differences(old: Results, new: Results) -> list[str]:
    """Return what makes the numbers of two runs hard to compare: another processor, compiler or number of threads."""
    pairs: Iterable[tuple[str, Any, Any]] = (
        ("processor", old.machine.get("cpu"), new.machine.get("cpu")),
        ("instruction set", old.versions.get("isa"), new.versions.get("isa")),
        ("compiler", old.versions.get("compiler"), new.versions.get("compiler")),
        ("Python", old.versions.get("python"), new.versions.get("python")),
        ("NumPy", old.versions.get("numpy"), new.versions.get("numpy")),
        ("number of threads", old.settings.get("threads"), new.settings.get("threads")),
    )
    return [f"The {name} differs: {a} before, {b} now." for name, a, b in pairs if a != b]
