"""What networks and histories look like: tables as text, HTML for notebooks with curves as SVG, and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .dense import Dense

# Of a chart, in pixels; the frame leaves room for numbers and names.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 24, 28

# Okabe and Ito's colours, which can be told apart by most.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Text(str):
    """A string that an interpreter shows as `print` does."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def table_of(parts: Mapping[str, Dense], output: str) -> list[tuple[str, str, str, str]]:
    """Rows of a table of layers: name, shape of the output, activation and number of parameters.

    `output` is the activation of last layers that have none of their own.
    """
    rows = [("layer", "output shape", "activation", "parameters")]
    for prefix, dense in parts.items():
        rows.append((f"{prefix}input", f"(n, {dense.layers[0].weight.shape[0]})", "", ""))
        for i, layer in enumerate(dense.layers, 1):
            count = f"{sum(array.size for array in layer.tensors().values()):,}"
            rows.append((f"{prefix}{i}", f"(n, {len(layer.bias)})", layer.activation or output, count))
    return rows


def totals(parts: Mapping[str, Dense]) -> str:
    """The number of all parameters, and their size."""
    arrays = [array for dense in parts.values() for array in dense.parameters]
    count, size = sum(array.size for array in arrays), sum(array.nbytes for array in arrays)
    unit = next(unit for unit in ((1, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")) if size < 1000 * unit[0])
    return f"{count:,} parameters, {size / unit[0]:.3g} {unit[1]}"


def summary(title: str, parts: Mapping[str, Dense], output: str, facts: Sequence[str]) -> Text:
    """A table of layers, with lines above and below."""
    rows = table_of(parts, output)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "{{:<{}}}  {{:>{}}}  {{:<{}}}  {{:>{}}}".format(*widths)
    lines = [template.format(*row).rstrip() for row in rows]
    rule = "-" * max(map(len, lines))
    return Text("\n".join([title, lines[0], rule, *lines[1:], rule, totals(parts), *facts]))


def network_html(title: str, parts: Mapping[str, Dense], output: str, facts: Sequence[str], history: Any) -> str:
    """The same as HTML, with the curves of the last training."""
    head, *rows = table_of(parts, output)
    below = "<br>".join(map(escape, [totals(parts), *facts]))
    curves = "" if history is None else history._repr_html_()
    return f"<div><b>{escape(title)}</b>{_html_table(head, rows)}<div>{below}</div>{curves}</div>"


def history_html(lists: Mapping[str, Sequence[float]], seconds: float) -> str:
    """The last number of each list and the best, and the curves."""
    known = {name: values for name, values in lists.items() if any(map(math.isfinite, values))}
    epochs = max(map(len, lists.values()), default=0)
    rows = [(_words(name), f"{values[-1]:.4g}", f"{_best(name, values):.4g}") for name, values in known.items()]
    # Losses and scores have scales of their own.
    losses = {name: values for name, values in known.items() if is_loss(name)}
    charts = [losses, {name: values for name, values in known.items() if name not in losses}]
    table = _html_table(("", "last", "best"), rows)
    text = f"{epochs} epoch{'s' * (epochs != 1)}, {seconds:.1f} s"
    return f"<div><div>{text}</div>{table}{''.join(_chart(lines) for lines in charts if lines)}</div>"


def is_loss(name: str) -> bool:
    """Whether a list of a history has losses."""
    return name.endswith("loss")


def _best(name: str, values: Sequence[float]) -> float:
    from .schedules import is_better_smaller

    finite = filter(math.isfinite, values)
    return min(finite) if is_better_smaller(name) else max(finite)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def cells(kind: str, row: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row) + "</tr>"

    return f"<table>{cells('th', head)}{''.join(cells('td', row) for row in rows)}</table>"


def _chart(lines: Mapping[str, Sequence[float]]) -> str:
    """Curves over the epochs as SVG; what is not finite is a gap."""
    finite = [value for values in lines.values() for value in values if math.isfinite(value)]
    low, high, epochs = min(finite), max(finite), max(map(len, lines.values()))
    spread = (high - low) or 1.0

    def x(epoch: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (epoch / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / spread

    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_HEIGHT - _TOP - _BOTTOM}" '
        'fill="none" stroke="#888"/>',
        *(
            f'<text x="{_LEFT - 4}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            for value in dict.fromkeys((low, high))
        ),
        *(
            f'<text x="{x(epoch - 1):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{epoch}</text>'
            for epoch in dict.fromkeys((1, epochs))
        ),
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">epoch</text>',
    ]
    at = float(_LEFT)
    for i, (name, values) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        for part in _without_gaps(values):
            if len(part) == 1:
                parts.append(f'<circle cx="{x(part[0][0]):.1f}" cy="{y(part[0][1]):.1f}" r="2.5" fill="{colour}"/>')
            else:
                points = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in part)
                parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = escape(_words(name))
        parts.append(f'<text x="{at}" y="14" style="fill:{colour}">{label}</text>')
        at += 7 * len(name) + 10
    width = max(_WIDTH, int(at))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" '
        f'viewBox="0 0 {width} {_HEIGHT}" font-family="sans-serif" font-size="12" fill="#888">{"".join(parts)}</svg>'
    )


def _without_gaps(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """The numbers with their places, in parts without any that is not finite."""
    parts: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values):
        if math.isfinite(value):
            parts[-1].append((place, value))
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def plot(lists: Mapping[str, Sequence[float]], names: Sequence[str] | None, ax: Any) -> Any:
    """Draw lists over the epochs with matplotlib, and return the axes."""
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    if names is None:
        names = [name for name, values in lists.items() if is_loss(name) and values]
    if unknown := [name for name in names if name not in lists]:
        raise ValueError(f"names has {unknown[0]!r}; this history has {', '.join(lists)}")
    if ax is None:
        ax = pyplot.subplots()[1]
    for name in names:
        values = lists[name]
        ax.plot(range(1, len(values) + 1), values, label=_words(name), marker="." if len(values) < 2 else None)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if names:
        ax.legend()
    return ax
