"""The charts of a run. Each function draws one and writes it to `path`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .._files import replacing
from .implementations import IMPLEMENTATIONS, OURS
from .results import Row

# Okabe and Ito's colours, which colour-blind people can tell apart as well.
_COLORS = (
    "#000000",
    "#999999",
    "#8c564b",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#e69f00",
    "#009e73",
    "#56b4e9",
    "#b8a800",
    "#332288",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
    "#666666",
)
_MARKERS = ("o", "x", "+", "s", "^", "v", "D", "P", "*", "<", ">", "p", "h", "d", "8", "H")
STYLE = dict(zip(IMPLEMENTATIONS, zip(_COLORS, _MARKERS, strict=True), strict=True))


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure. One made without pyplot draws with Agg and belongs to nobody else."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def plain(axes: Axes) -> None:
    """Leave out the frame's upper and right line, and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def ratios(path: Path, group: str, rows: Sequence[Row], subtitle: str) -> None:
    """Draw the ratio to each peer, a line for each row, over a logarithmic axis."""
    figure = Figure(figsize=(9.5, 1.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for peer, (color, marker) in STYLE.items():
        points = [(ratio, i) for i, row in enumerate(rows) if (ratio := row.ratio(peer)) is not None]
        if peer != OURS and points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=22, color=color, marker=marker, label=peer, linewidths=1.2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[-1] in "25" else ""))
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time of the peer / time of gemmlet (right of 1 gemmlet is ahead)")
    axes.set_title(f"{group}\n{subtitle}", fontsize=9)
    plain(axes)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(figure, path, dpi=110)


def scaling(path: Path, axes_points: Mapping[str, Sequence[Mapping[str, Any]]], subtitle: str) -> None:
    """Draw throughput (top) and peak memory (bottom) of each implementation over each parameter."""
    figure = Figure(figsize=(4.0 * len(axes_points), 7), layout="constrained")
    grid = figure.subplots(2, len(axes_points), squeeze=False, sharex="col")
    for column, (parameter, points) in enumerate(axes_points.items()):
        for quantity, row, label in (("images_per_second", 0, "images per second"), ("peak_mb", 1, "peak memory (MB)")):
            axes = grid[row][column]
            for name, (color, marker) in STYLE.items():
                line = [
                    (p["value"], p["sides"][name][quantity]) for p in points if quantity in p["sides"].get(name, {})
                ]
                if line:
                    x, y = zip(*line, strict=True)
                    axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.2, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            # Memory may stay within one decade, of which powers of ten would label nothing.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks([p["value"] for p in points], [f"{p['value']}" for p in points], fontsize=7)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylabel(label if column == 0 else "")
            axes.set_xlabel(parameter if row else "")
            plain(axes)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"Training an MLP\n{subtitle}", fontsize=9)
    save(figure, path, dpi=110)
