"""The pictures that the trainings leave. Each function draws one and writes it to `path`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .. import metrics, nn
from .._files import replacing
from ..bench.plots import plain, save
from .evaluation import RocCurve

Array = NDArray[Any]

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"
_SIDE = 28


def _epochs(axes: Axes, count: int) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, max(count, 1) + 0.5)


def _line(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    if not values:
        return  # no images were held out
    marker = "o" if len(values) <= 30 else None
    axes.plot(range(1, len(values) + 1), values, color=color, label=label, marker=marker, markersize=3.5)


def learning_curves(path: Path, history: nn.History) -> None:
    """Draw loss and accuracy over the epochs, for the training and the held-out images."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, training, held_out in (
        (left, history.loss, history.validation_loss),
        (right, history.accuracy, history.validation_accuracy),
    ):
        _line(axes, training, _BLUE, "training images (mean over the epoch)")
        _line(axes, held_out, _ORANGE, "held-out images (after the epoch)")
        plain(axes)
        _epochs(axes, len(training))
    left.set(title="Loss", ylabel="cross-entropy per image (nats)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    right.set(title="Accuracy", ylabel="fraction of images classified correctly")
    low, high = right.get_ylim()
    right.set_ylim(max(low, -0.01), min(high, 1.01))  # around points that are all the same it may go far beyond
    right.yaxis.set_major_formatter(PercentFormatter(1))
    save(figure, path)


def confusion_matrix(path: Path, labels: Array, predicted: Array) -> None:
    """Draw how often each digit was taken for each other."""
    counts = np.zeros((10, 10), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    mistakes = counts * ~np.eye(10, dtype=bool)

    figure = Figure(figsize=(7, 6.6), layout="constrained")
    axes = figure.subplots()
    # Only the mistakes are coloured: a scale that also held the diagonal would show nothing else.
    shown = np.ma.masked_equal(mistakes, 0)
    axes.imshow(shown, cmap="Oranges", vmin=0, vmax=max(1, mistakes.max()) * 1.25)
    for true in range(10):
        for seen in range(10):
            count = counts[true, seen]
            if true == seen:
                axes.add_patch(Rectangle((seen - 0.5, true - 0.5), 1, 1, facecolor="#d9ead3", edgecolor="none"))
            if count:
                strong = true == seen or count > 0.7 * mistakes.max()
                axes.text(seen, true, f"{count}", ha="center", va="center", fontweight="bold" if strong else "normal")
    axes.set(xticks=range(10), yticks=range(10), xlabel="predicted digit", ylabel="true digit")
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(0.5, 9.5), minor=True)
    axes.set_yticks(np.arange(0.5, 9.5), minor=True)
    axes.grid(which="minor", color="#e2e8f0", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    right = np.trace(counts) / counts.sum()
    axes.set_title(f"Confusion matrix: {right:.2%} of {counts.sum():,} test images are classified correctly")
    save(figure, path)


def roc_curves(path: Path, curves: Sequence[RocCurve], count: int) -> None:
    """Draw each class against the rest, over a logarithmic axis: good classifiers differ at its left end only."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    lowest = 0.5 / max(count, 2)
    for curve in curves:
        color = colormaps["tab10"](curve.label)
        x = np.maximum(curve.false_positive, lowest)
        axes.plot(
            x, curve.true_positive, color=color, label=f"{curve.label} (AUC {curve.auc:.4f})", drawstyle="steps-post"
        )
    chance = np.geomspace(lowest, 1)
    axes.plot(chance, chance, color="black", linestyle=":", label="chance (AUC 0.5)")
    axes.set_xscale("log")
    axes.set(
        xlim=(lowest, 1),
        ylim=(0, 1.01),
        xlabel="false positive rate (log scale)",
        ylabel="true positive rate",
        title="ROC curves, each digit against the rest, on the test images",
    )
    plain(axes)
    figure.legend(title="digit", loc="outside right center", frameon=False)
    save(figure, path)


def precision_recall_curves(path: Path, labels: Array, probabilities: Array) -> None:
    """Draw precision over recall, each class against the rest, where good classifiers differ."""
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    lowest = 1.0
    for label in range(probabilities.shape[1]):
        positive, scores = labels == label, probabilities[:, label]
        if not positive.any():
            continue
        precision, recall, _ = metrics.precision_recall_curve(positive, scores)
        average = metrics.average_precision_score(positive, scores)
        name = f"{label} (average precision {average:.4f})"
        axes.plot(recall, precision, color=colormaps["tab10"](label), label=name, drawstyle="steps-post")
        lowest = min(lowest, float(precision[recall <= 0.95].min()))
    # Of good classifiers the corner: all else is a straight line.
    low, margin = (0.9, 0.002) if lowest >= 0.9 else (0.0, 0.02)
    axes.set(
        xlim=(low, 1 + margin),
        ylim=(low, 1 + margin),
        xlabel="recall",
        ylabel="precision",
        title="Precision–recall curves, each digit against the rest, on the test images",
    )
    plain(axes)
    figure.legend(title="digit", loc="outside right center", frameon=False)
    save(figure, path)


def reliability(path: Path, curve: metrics.CalibrationCurve, error: float) -> None:
    """Draw how often predictions of some confidence are right, and how many there are of each."""
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, width, there = curve.edges[:-1], np.diff(curve.edges), curve.weight > 0
    above.bar(left[there], curve.accuracy[there], width[there], align="edge", color=_BLUE, edgecolor="white")
    mean = curve.confidence[there]
    above.plot(mean, curve.accuracy[there], color=_ORANGE, marker="o", markersize=3.5, label="at the mean confidence")
    above.plot([0, 1], [0, 1], color="black", linestyle=":", label="as sure as right")
    above.legend(frameon=False, loc="upper left")
    above.set(xlim=(0, 1), ylim=(0, 1.01), ylabel="share of images classified correctly")
    above.set_title(f"Reliability: expected calibration error {error:.2%}, {len(left)} bins")
    # Of nearly all images the network is sure: without a logarithmic scale nothing else would be seen.
    below.bar(left[there], curve.weight[there], width[there], align="edge", color=_GREY, edgecolor="white")
    below.set_yscale("log")
    below.set(xlabel="confidence: the largest probability", ylabel="images")
    for axes in (above, below):
        plain(axes)
    save(figure, path)


def worst_mistakes(
    path: Path, images: Array, labels: Array, predicted: Array, probabilities: Array, most: int = 25
) -> None:
    """Show the wrong predictions that the network was surest of."""
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:most]

    columns = 5
    rows = max(1, -(-len(worst) // columns))
    figure = Figure(figsize=(columns * 1.75, rows * 2.0 + 0.9), layout="constrained")
    mistakes = "1 mistake" if len(wrong) == 1 else f"{len(wrong):,} mistakes"
    which = "The most confident of " if len(wrong) > most else ""
    figure.suptitle(f"{which}{mistakes} on {len(labels):,} test images")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, i in zip(figure.axes, worst, strict=False):
        axes.imshow(images[i].reshape(_SIDE, _SIDE), cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(f"is {labels[i]}, seen as {predicted[i]}\n({confidence[i]:.1%} sure)", fontsize=9)
    save(figure, path)


def gan_losses(path: Path, generator: Sequence[float], discriminator: Sequence[float], label_smoothing: float) -> None:
    """Draw the losses of the two networks over the epochs."""
    digit = "−log D(digit)"
    if label_smoothing:
        digit = f"−{1 - label_smoothing:g} log D(digit) − {label_smoothing:g} log(1 − D(digit))"
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    _line(axes, generator, _BLUE, "generator: −log D(sample)")
    _line(axes, discriminator, _ORANGE, f"discriminator: {digit} − log(1 − D(sample))")
    plain(axes)
    _epochs(axes, len(generator))
    axes.set_ylim(bottom=0)
    axes.set(title="Losses of the GAN (mean over the epoch)", ylabel="loss (nats)")
    figure.legend(loc="outside lower center", frameon=False)  # as wide as the axes, it would cover lines
    save(figure, path)


def class_shares(path: Path, shares: Sequence[float]) -> None:
    """Draw how the samples are spread over the digits."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(range(10), shares, color=_BLUE)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=9, padding=2)
    axes.axhline(0.1, color=_GREY, linestyle=":")
    # Beside the axes, where it covers no bar's label.
    axes.text(1.01, 0.1, "equal\nshares", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=_GREY)
    plain(axes)
    axes.grid(visible=False, axis="x")
    axes.set(xticks=range(10), xlabel="digit, as the classifier sees it", ylabel="share of the samples")
    axes.set_title("Which digits the generator draws")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(y=0.12)
    save(figure, path)


def sample_grid(samples: Array, title: str, *, columns: int = 10, zoom: int = 2) -> Image.Image:
    """Lay samples (n, 784), 0 to 1, out in a grid under a title: dark ink on white, as in the other pictures."""
    gap, header = 2, 14
    rows = -(-len(samples) // columns)
    cell = _SIDE + gap
    page = np.full((rows * cell + gap, columns * cell + gap), 255, np.uint8)
    pixels = np.rint(255 * (1 - np.clip(samples, 0, 1))).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
    for i, picture in enumerate(pixels):
        y, x = gap + i // columns * cell, gap + i % columns * cell
        page[y : y + _SIDE, x : x + _SIDE] = picture
    grid = Image.fromarray(page).resize((page.shape[1] * zoom, page.shape[0] * zoom), Image.Resampling.NEAREST)
    canvas = Image.new("L", (grid.width, grid.height + header * zoom), 255)
    canvas.paste(grid, (0, header * zoom))
    font = ImageFont.load_default(size=11 * zoom)
    ImageDraw.Draw(canvas).text((2 * gap * zoom, header * zoom // 2), title, fill=0, font=font, anchor="lm")
    return canvas


def save_image(path: Path, image: Image.Image) -> None:
    """Write one picture."""
    with replacing(path) as temporary:
        image.save(temporary, optimize=True)


def load_image(path: Path) -> Image.Image:
    """Read what `save_image` has written."""
    with Image.open(path) as image:
        image.load()
        return image


def save_animation(path: Path, images: Sequence[Image.Image]) -> None:
    """Write pictures as an endless GIF, the last one shown longer."""
    durations = [400] * (len(images) - 1) + [2500]  # milliseconds
    with replacing(path) as temporary:
        images[0].save(temporary, save_all=True, append_images=images[1:], duration=durations, loop=0)
