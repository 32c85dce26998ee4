"""What ``gemmlet evaluate`` does: one network on the test images, or two of them on the same ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .. import metrics, nn
from ..data import Mnist
from . import common, evaluation, files
from .common import finite, percent
from .errors import UserError

Array = evaluation.Array


@dataclass(frozen=True)
class Options:
    """The command line, unchecked."""

    models: list[Path]
    data_dir: Path | None
    as_json: bool
    out: Path | None
    backend: str | None
    threads: int | None


@dataclass(frozen=True)
class Evaluated:
    """A network, what it says of the test images, and what that is worth."""

    path: Path
    model: nn.MLP
    predicted: Array
    probabilities: Array
    report: metrics.ClassificationReport
    scores: dict[str, Any]  # as JSON


def run(options: Options) -> int:
    """Evaluate the networks, print or write what came out, and return the exit status."""
    if len(options.models) > 2:
        raise UserError(f"expected one model, or two to compare, got {len(options.models)}")
    if options.out is not None:
        files.check_folder(options.out)
    common.use(options.backend, options.threads)
    models = [(path, _load(path)) for path in options.models]
    data = common.load_data(options.data_dir)
    if not len(data.y_test):
        raise UserError(f"{data.source} has no test images")
    found = [evaluate(path, model, data) for path, model in models]
    content = {"data": data.source, "test_images": len(data.y_test)}
    content |= found[0].scores if len(found) == 1 else {"models": [each.scores for each in found]}
    change = None
    if len(found) == 2:
        change = metrics.mcnemar(data.y_test, *(as_digits(each.predicted) for each in found))
        content["comparison"] = change._asdict()
    if options.out is not None:
        out = files.make_folder(options.out)
        files.write_json(out / "evaluation.json", content)
        _draw(found[-1], data, out)
    if options.as_json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return 0
    console = Console(highlight=False, markup=False, emoji=False)
    say = partial(console.print, soft_wrap=True)
    say(f"Data: {data.source} ({len(data.y_test):,} test images)")
    say(common.backend_line())
    for each in found:
        say(f"\n{each.path}: {each.model}")
        for line in _lines(each):
            say(line)
    if change is not None:
        corrects, spoils, p = change
        a, b = options.models
        say(
            f"\n{b} corrects {corrects} of the mistakes of {a}, and spoils {spoils} (McNemar's exact test: p = {p:.2g})"
        )
    if options.out is not None:
        say(f"\nNumbers and pictures{f' of {found[-1].path}' * (len(found) > 1)}: {options.out}")
    return 0


def evaluate(path: Path, model: nn.MLP, data: Mnist) -> Evaluated:
    """Measure a network on the test images."""
    labels, predicted = data.y_test, as_digits(model.predict(data.x_test))
    probabilities = model.predict_proba(data.x_test).astype(np.float64)
    report, classes = evaluation.report(labels, predicted, probabilities), np.arange(probabilities.shape[1])
    f1_interval = metrics.bootstrap_interval(_macro_f1, labels, predicted, resamples=evaluation.RESAMPLES)
    area_interval = metrics.bootstrap_interval(
        partial(metrics.roc_auc_score, labels=classes), labels, probabilities, resamples=evaluation.RESAMPLES_OF_AREA
    )
    scores = {
        "model": str(path),
        "layers": model.layers,
        "accuracy": report.accuracy,
        "accuracy_interval": list(report.accuracy_interval),
        "top_2_accuracy": metrics.top_k_accuracy_score(labels, probabilities, k=2, labels=classes),
        "top_3_accuracy": metrics.top_k_accuracy_score(labels, probabilities, k=3, labels=classes),
        # Of sigmoids, which do not add up to 1, it would be another one.
        "log_loss": metrics.log_loss(labels, probabilities, labels=classes) if model.output == "softmax" else None,
        "brier_score": metrics.brier_score_loss(labels, probabilities, labels=classes),
        "calibration_error": metrics.calibration_error(labels, probabilities, bins=evaluation.BINS, labels=classes),
        "calibration_bins": evaluation.BINS,
        "macro": _as_json(report.macro),
        "weighted": _as_json(report.weighted),
        "macro_f1_interval": list(f1_interval),
        "roc_auc_interval": [finite(end) for end in area_interval],
        "classes": [_as_json(each) for each in report.classes],
        "confusion_matrix": report.confusion.tolist(),
    }
    return Evaluated(path, model, predicted, probabilities, report, scores)


def _load(path: Path) -> nn.MLP:
    """A network whose classes are the digits, in their order."""
    model = common.load_digits_classifier(path)
    if model.classes is not None and [str(label) for label in model.classes] != [str(i) for i in range(10)]:
        raise UserError(f"{path} has the classes {', '.join(map(repr, model.classes))}; expected the digits 0 to 9")
    return model


def as_digits(predicted: Array) -> Array:
    """Predictions as digits: the labels of a network may be strings."""
    return predicted.astype(np.int64)


def _macro_f1(labels: Array, predicted: Array) -> float:
    return float(metrics.precision_recall_fscore_support(labels, predicted, average="macro")[2])


def _as_json(scores: metrics.ClassScores) -> dict[str, Any]:
    return asdict(scores) | {"roc_auc": finite(scores.roc_auc)}


def _lines(each: Evaluated) -> list[str]:
    """The scores of a network, a line for each."""
    scores = each.scores
    low, high = scores["macro_f1_interval"]
    area = [finite(each.report.macro.roc_auc), *scores["roc_auc_interval"]]
    loss = scores["log_loss"]
    mistakes = [f"{label} as {seen} ({count})" for label, seen, count in each.report.confusions(3)]
    return [
        *str(each.report).splitlines(),
        "",
        f"macro F1 {percent(scores['macro']['f1'])} (95 %: {low:.2%} to {high:.2%})"
        + ("" if None in area else f", ROC AUC {area[0]:.5f} (95 %: {area[1]:.5f} to {area[2]:.5f})"),
        f"among the best two {scores['top_2_accuracy']:.2%}, three {scores['top_3_accuracy']:.2%}",
        ("" if loss is None else f"log loss {loss:.4f}, ")
        + f"Brier score {scores['brier_score']:.4f}, calibration error {scores['calibration_error']:.2%} "
        f"(of the largest probability, in {scores['calibration_bins']} bins)",
        "most mistakes: " + ("none" if not mistakes else "; ".join(mistakes)),
    ]


def _draw(each: Evaluated, data: Mnist, out: Path) -> None:
    from . import plots

    labels, probabilities = data.y_test, each.probabilities
    plots.confusion_matrix(out / "confusion_matrix.png", labels, each.predicted)
    plots.roc_curves(out / "roc_curves.png", evaluation.roc_curves(labels, probabilities), len(labels))
    plots.precision_recall_curves(out / "precision_recall_curves.png", labels, probabilities)
    plots.reliability(
        out / "reliability.png",
        metrics.calibration_curve(
            labels, probabilities, bins=evaluation.BINS, labels=np.arange(probabilities.shape[1])
        ),
        each.scores["calibration_error"],
    )
    plots.worst_mistakes(out / "worst_mistakes.png", data.x_test, labels, each.predicted, probabilities)
