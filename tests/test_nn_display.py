"""What networks and histories look like, and what `fit` prints."""

from __future__ import annotations

import io
import math
import pickle
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from gemmlet.nn import GAN, MLP, Adam, GANHistory, History, StopTraining, bar

RNG = np.random.default_rng(0)
X = RNG.uniform(size=(60, 4)).astype(np.float32)
Y = (X[:, 0] > 0.5).astype(int)


# Tables and curves.


def test_summary_of_a_perceptron() -> None:
    model = MLP([784, 1000, 1], "gelu", "sigmoid", label_smoothing=0.0, ema_decay=0.5, default_batch_size=32)
    lines = model.summary().splitlines()
    assert lines[0] == repr(model)
    assert [line.split() for line in lines[2:8] if "-" not in line] == [
        ["input", "(n,", "784)"],
        ["1", "(n,", "1000)", "gelu", "785,000"],
        ["2", "(n,", "1)", "sigmoid", "1,001"],
        ["786,001", "parameters,", "3.14", "MB"],
    ]
    assert len({len(line) for line in lines if line.endswith(("parameters", "785,000", "1,001", "---"))}) == 1
    assert {"ema_decay=0.5", "default_batch_size=32"} <= set(lines)
    assert not any(line.startswith(("label_smoothing", "seed")) for line in lines)
    assert lines[-1] == "0 steps taken"
    assert repr(model.summary()) == str(model.summary())  # what an interpreter shows
    many = MLP([4, 1000], classes=list(range(5, 1005))).summary().splitlines()
    assert "classes=[5, 6, 7, 8, 9, 10, ...]" in many
    small = MLP([4, 2])
    small.fit(X, np.array(["no", "yes"])[Y], 1, batch_size=7)
    assert {"classes=['no', 'yes']", "9 steps taken", "10 parameters, 40 bytes"} <= set(small.summary().splitlines())


def test_summary_of_a_gan() -> None:
    rows = [line.split() for line in GAN(3, [5, 4], [6, 1]).summary().splitlines()]
    assert ["generator", "2", "(n,", "4)", "tanh", "24"] in rows
    assert ["discriminator", "input", "(n,", "4)"] in rows
    assert ["discriminator", "2", "(n,", "1)", "identity", "7"] in rows
    assert ["81", "parameters,", "324", "bytes"] in rows  # averages are no parameters


def svgs(html: str) -> list[ElementTree.Element]:
    """The charts, of HTML that is XML too but for line breaks."""
    root = ElementTree.fromstring(html.replace("<br>", "<br/>"))
    return [element for element in root.iter() if element.tag.endswith("}svg")]


def curves(chart: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [e.attrib["points"].split() for e in chart.iter() if e.tag.endswith("polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines]  # type: ignore[misc]


def test_a_history_in_a_notebook() -> None:
    history = History(
        loss=[4.0, 2.0, 1.0],
        accuracy=[math.nan] * 3,
        validation_loss=[4.0, math.nan, 3.0],
        validation_accuracy=[],
        metrics={"validation_f1": [0.5, 0.75, 0.625]},
        seconds=1.25,
    )
    html = history._repr_html_()
    assert "3 epochs, 1.2 s" in html
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", html)
    assert rows == [("loss", "1", "1"), ("validation loss", "3", "3"), ("validation f1", "0.625", "0.75")]
    losses, scores = svgs(html)
    ((first, second, third),) = curves(losses)
    assert first[0] < second[0] < third[0]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    # 4 is at the top, 1 at the bottom, 2 at two thirds down.
    assert first[1] < second[1] < third[1]
    assert (second[1] - first[1]) / (third[1] - first[1]) == pytest.approx(2 / 3, abs=0.01)
    # Between gaps a number is a dot.
    assert [e.attrib["cy"] for e in losses.iter() if e.tag.endswith("circle")] == [
        f"{first[1]:.1f}",
        f"{first[1] + (third[1] - first[1]) / 3:.1f}",
    ]
    assert len(curves(scores)) == 1
    assert svgs(History()._repr_html_()) == []
    assert len(svgs(History(loss=[1.0])._repr_html_())) == 1
    gan = GANHistory([1.0, 2.0], [2.0, 1.0])
    assert len(curves(svgs(gan._repr_html_())[0])) == 2


def test_a_network_in_a_notebook() -> None:
    model = MLP([4, 2], classes=["<a>", "b&c"])
    assert svgs(model._repr_html_()) == []
    history = model.fit(X, np.array(["<a>", "b&c"])[Y], 3)
    html = model._repr_html_()
    assert history._repr_html_() in html
    assert "&lt;a&gt;" in html
    assert "b&c" not in html
    assert len(svgs(html)) == 2
    assert pickle.loads(pickle.dumps(model))._repr_html_() == html
    gan = GAN(3, [4], [1])
    assert "discriminator" in gan._repr_html_()
    history = gan.fit(X, 2)
    assert history._repr_html_() in gan._repr_html_()


def test_a_fit_that_is_interrupted_leaves_its_curve() -> None:
    def callback(p: Any) -> None:
        if p.epoch == 3:
            raise KeyboardInterrupt

    model = MLP([4, 2])
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, 5, callback=callback, callback_every="epoch")
    assert "3 epochs" in model._repr_html_()


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    history = MLP([4, 2]).fit(X, Y, 3, validation_data=(X, Y))
    ax = history.plot()
    assert [line.get_label() for line in ax.lines] == ["loss", "validation loss"]
    assert ax.lines[0].get_xydata().tolist() == [[i, value] for i, value in enumerate(history.loss, 1)]
    assert history.plot(ax, names=["accuracy"]) is ax
    assert len(ax.lines) == 3
    assert len(GANHistory([1.0], [2.0]).plot().lines) == 2
    with pytest.raises(ValueError, match="names has 'f1'; this history has loss, accuracy"):
        history.plot(names=["f1"])
    pyplot.close("all")


def test_without_matplotlib() -> None:
    """All but `plot` works without it, and nothing imports it before."""
    code = """
import sys
sys.modules["matplotlib"] = None
from gemmlet.nn import MLP, History
assert "</svg>" in History(loss=[1.0])._repr_html_()
try:
    History(loss=[1.0]).plot()
except ImportError as error:
    assert "pip install matplotlib" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, gemmlet.nn; assert not {'matplotlib', 'sklearn', 'IPython'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# What is printed.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO, patch: pytest.MonkeyPatch, network: Any, *data: Any, **how: Any) -> str:
    patch.setattr(sys, "stdout", stream)
    patch.setenv("COLUMNS", "60")
    patch.setattr(bar, "_EVERY", 0.0)
    try:
        network.fit(*data, **how)
    finally:
        patch.undo()
    return stream.getvalue()


def seen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize("kind", ["MLP", "GAN"])
def test_a_bar_on_a_terminal(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    network, data = (MLP([4, 2]), (X, Y)) if kind == "MLP" else (GAN(3, [4], [1]), (X,))
    how: dict[str, Any] = {"epochs": 2, "batch_size": 6, "verbose": 1, "callback": lambda _: None}
    text = printed(Terminal(), monkeypatch, network, *data, **how)
    drawn = re.findall(r"\r(epoch (\d)/2  \[(.{20})\] (\d+)/10  (.*?) left)", text)
    assert [(epoch, int(batch)) for _, epoch, _, batch, _ in drawn] == [(e, b) for e in "12" for b in range(1, 11)]
    assert [shape for _, epoch, shape, _, _ in drawn if epoch == "1"] == [
        "=" * 2 * b + (">" + "." * 19)[: 20 - 2 * b] for b in range(1, 11)
    ]
    assert max(map(len, re.split("[\r\n]", text))) < 120
    # Of numbers that there is no room for none is cut.
    bars = re.split("[\r\n]", text)[1:11]
    assert all(len(line) < 60 and line.endswith(" left") for line in bars)
    lines = seen(text)
    losses = "loss" if kind == "MLP" else "generator loss"
    for epoch, line in enumerate(lines[:2], 1):
        assert re.fullmatch(rf"epoch {epoch}/2  0\.\d s  {losses} \d\.\d{{4}}.*", line)
    assert lines[2:] == [""]


@pytest.mark.parametrize(("stream", "verbose"), [("file", 1), ("file", True), ("terminal", 2), ("dumb", 1)])
def test_lines_elsewhere(stream: str, verbose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb" if stream == "dumb" else "xterm")
    target = io.StringIO() if stream == "file" else Terminal()
    model = MLP([4, 2])
    text = printed(target, monkeypatch, model, X, Y, epochs=2, verbose=verbose)
    expected = [
        f"epoch {i}/2  loss {loss:.4f}  accuracy {accuracy:.4f}\n"
        for i, (loss, accuracy) in enumerate(zip(model._history.loss, model._history.accuracy, strict=True), 1)
    ]
    assert text == "".join(expected)
    assert printed(Terminal(), monkeypatch, model, X, Y, epochs=2, verbose=0) == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopTraining])
def test_the_line_of_the_bar_is_left(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def callback(p: Any) -> None:
        if p.batch == 3:
            raise error

    stream = Terminal()
    try:
        printed(stream, monkeypatch, MLP([4, 2]), X, Y, epochs=2, batch_size=6, verbose=1, callback=callback)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("\n")


def test_notebooks_redraw() -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    assert bar.can_redraw(stream)
    assert not bar.can_redraw(io.StringIO())
    assert not bar.can_redraw(None)


def test_the_same_bits_with_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    a, b = MLP([4, 2]), MLP([4, 2])
    printed(Terminal(), monkeypatch, a, X, Y, epochs=2, batch_size=6, verbose=1, optimizer=Adam(0.1))
    b.fit(X, Y, 2, 6, Adam(0.1))
    assert all(np.array_equal(p, q) for p, q in zip(a.parameters, b.parameters, strict=True))
