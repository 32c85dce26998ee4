"""`gemmlet.metrics` beside `sklearn.metrics`, and beside what can be computed by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import stats

from gemmlet import metrics
from support import frechet_by_eigenvalues

Array = NDArray[Any]


class Case:
    """Labels of some samples, predictions, scores and weights, with ties, and classes that are missing."""

    def __init__(self, seed: int, n: int, classes: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(classes, size=n)
        self.labels[:classes] = np.arange(classes)[:n]
        self.predicted = np.where(rng.random(n) < 0.6, self.labels, rng.integers(classes, size=n))
        # Of few different values, so that there are ties.
        self.scores = rng.integers(1, 6, (n, classes)) / 5
        self.probabilities = self.scores / self.scores.sum(axis=1, keepdims=True)
        self.positive = self.labels == 0
        self.weights = rng.integers(0, 4, n) / 2 + (np.arange(n) < classes)
        self.names = np.array([f"class {'dacb'[i % 4]}{i}" for i in range(classes)])
        self.numbers = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))


cases = st.builds(Case, st.integers(0, 2**32 - 1), st.integers(8, 60), st.integers(2, 5))

# Each of gemmlet.metrics and each of sklearn.metrics with the same name, on the same case.
SAME: dict[str, Callable[[Any, Case, dict[str, Any]], Any]] = {
    "accuracy_score": lambda f, c, more: f(c.labels, c.predicted, **more),
    "accuracy_score of rows": lambda f, c, more: f(c.scores > 0.5, c.scores > 0.4, **more),
    "confusion_matrix": lambda f, c, more: f(c.labels, c.predicted, **more),
    "confusion_matrix of labels": lambda f, c, more: f(
        c.names[c.labels], c.names[c.predicted], labels=c.names[[1, 0]], **more
    ),
    "precision_recall_fscore_support": lambda f, c, more: f(c.labels, c.predicted, zero_division=0.0, **more),
    **{
        f"precision_recall_fscore_support {average}": (
            lambda f, c, more, average=average: f(
                c.labels, np.minimum(c.predicted, 1), average=average, zero_division=0.0, **more
            )
        )
        for average in ("macro", "weighted", "micro")
    },
    "top_k_accuracy_score": lambda f, c, more: f(
        *((c.labels, c.scores) if c.scores.shape[1] > 2 else (c.labels % 3, np.hstack([c.scores, c.scores[:, :1]]))),
        k=2,
        labels=np.arange(max(3, c.scores.shape[1])),
        **more,
    ),
    "roc_curve": lambda f, c, more: f(c.positive, c.scores[:, 0], **more),
    "roc_auc_score": lambda f, c, more: f(c.positive, c.scores[:, 0], **more),
    "precision_recall_curve": lambda f, c, more: f(c.positive, c.scores[:, 0], **more),
    "average_precision_score": lambda f, c, more: f(
        c.names[c.labels % 2], c.scores[:, 0], pos_label=c.names[0], **more
    ),
    "log_loss": lambda f, c, more: f(c.labels, c.probabilities, **more),
    "brier_score_loss": lambda f, c, more: f(c.positive, c.probabilities[:, 0], **more),
    "mean_squared_error": lambda f, c, more: f(*c.numbers, **more),
    "mean_absolute_error": lambda f, c, more: f(*c.numbers, **more),
    "r2_score": lambda f, c, more: f(*c.numbers, **more),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SAME)
@given(case=cases)
@settings(max_examples=30)
def test_the_same_as_scikit_learn(name: str, weighted: bool, case: Case) -> None:
    more = {"sample_weight": case.weights} if weighted else {}
    ours, theirs = (getattr(module, name.split()[0]) for module in (metrics, sklearn.metrics))
    found, wanted = SAME[name](ours, case, more), SAME[name](theirs, case, more)
    if not isinstance(found, tuple):
        found, wanted = (found,), (wanted,)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert np.shape(a) == np.shape(b)
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@given(case=cases)
def test_the_area_under_the_roc_curve_of_several_classes(case: Case) -> None:
    wanted = [sklearn.metrics.roc_auc_score(case.labels == i, case.scores[:, i]) for i in range(case.scores.shape[1])]
    found = metrics.roc_auc_score(case.labels, case.scores, average=None)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)
    assert metrics.roc_auc_score(case.labels, case.scores) == pytest.approx(np.mean(wanted), rel=1e-13)
    support = np.bincount(case.labels)
    assert metrics.roc_auc_score(case.labels, case.scores, average="weighted") == pytest.approx(
        np.average(wanted, weights=support), rel=1e-13
    )


@given(case=cases)
def test_the_brier_score_of_several_classes(case: Case) -> None:
    wanted = np.square(case.probabilities - np.eye(case.scores.shape[1])[case.labels]).sum(axis=1).mean()
    found = metrics.brier_score_loss(case.labels, case.probabilities)
    assert found == pytest.approx(wanted / (1 + (case.scores.shape[1] == 2)), rel=1e-12)


@given(case=cases)
def test_calibration_as_it_is_defined(case: Case) -> None:
    bins, confidence = 5, case.probabilities.max(axis=1)
    correct = case.probabilities.argmax(axis=1) == case.labels
    curve = metrics.calibration_curve(case.labels, case.probabilities, bins=bins)
    error = 0.0
    for i in range(bins):
        low, high = i / bins, (i + 1) / bins
        rows = (confidence > curve.edges[i]) & (confidence <= curve.edges[i + 1])
        assert (curve.edges[i], curve.edges[i + 1]) == pytest.approx((low, high))
        assert curve.weight[i] == rows.sum()
        if rows.any():
            assert curve.confidence[i] == pytest.approx(confidence[rows].mean())
            assert curve.accuracy[i] == pytest.approx(correct[rows].mean())
            error += rows.mean() * abs(confidence[rows].mean() - correct[rows].mean())
        else:
            assert math.isnan(curve.confidence[i])
            assert math.isnan(curve.accuracy[i])
    assert metrics.calibration_error(case.labels, case.probabilities, bins=bins) == pytest.approx(error, abs=1e-14)


def test_calibration_of_one_column_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500)
    y = rng.random(500) < p**2
    from sklearn.calibration import calibration_curve

    accuracy, confidence = calibration_curve(y, p, n_bins=8)
    curve = metrics.calibration_curve(y, p, bins=8)
    np.testing.assert_allclose(curve.accuracy, accuracy)
    np.testing.assert_allclose(curve.confidence, confidence)


@pytest.mark.parametrize(
    ("successes", "n", "confidence"), [(9924, 10000, 0.95), (0, 20, 0.95), (20, 20, 0.99), (3, 10, 0.9)]
)
def test_wilsons_interval(successes: int, n: int, confidence: float) -> None:
    assert metrics.wilson_interval(np.uint8(3), np.uint8(200)) == metrics.wilson_interval(3, 200)
    wanted = stats.binomtest(successes, n).proportion_ci(confidence, "wilson")
    found = metrics.wilson_interval(successes, n, confidence)
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemars_test_is_the_exact_one(corrects: int, spoils: int) -> None:
    both, neither = 7, 3
    true = np.zeros(corrects + spoils + both + neither, int)
    a, b = true.copy(), true.copy()
    a[: corrects + neither] = 1
    b[corrects : corrects + neither + spoils] = 1
    found = metrics.mcnemar(true, a, b)
    assert found[:2] == (corrects, spoils)
    wanted = stats.binomtest(corrects, corrects + spoils).pvalue if corrects + spoils else 1.0
    assert found.p_value == pytest.approx(wanted, rel=1e-9)


def test_mcnemars_test_of_many_samples() -> None:
    true, a, b = np.zeros((3, 300_000), int)
    a[:101_000], b[101_000:201_000] = 1, 1
    assert metrics.mcnemar(true, a, b).p_value == pytest.approx(stats.binomtest(100_000, 201_000).pvalue, rel=1e-6)


def test_a_bootstrap_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        right = rng.random(300) < 0.8
        low, high = metrics.bootstrap_interval(np.mean, right, resamples=200, confidence=0.9, seed=seed)
        held += low <= 0.8 <= high
    assert 165 <= held <= 195  # 180 +- 4.2, one standard deviation


def test_the_seed_of_a_bootstrap_interval() -> None:
    rng = np.random.default_rng(0)
    y, p = rng.integers(2, size=50), rng.random(50)
    intervals = [metrics.bootstrap_interval(metrics.roc_auc_score, y, p, resamples=50, seed=s) for s in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert all(map(math.isnan, metrics.bootstrap_interval(lambda _: math.nan, y, resamples=3)))


def test_a_report_has_what_the_functions_have() -> None:
    case = Case(3, 50, 4)
    report = metrics.classification_report(case.labels, case.predicted, case.probabilities)
    theirs = sklearn.metrics.classification_report(case.labels, case.predicted, output_dict=True, zero_division=0.0)
    assert report.accuracy == theirs["accuracy"]
    assert report.accuracy_interval == metrics.wilson_interval(int(np.sum(case.labels == case.predicted)), 50)
    for scores, wanted in zip(
        (*report.classes, report.macro, report.weighted),
        (*(theirs[str(i)] for i in range(4)), theirs["macro avg"], theirs["weighted avg"]),
        strict=True,
    ):
        found = (scores.precision, scores.recall, scores.f1, scores.support)
        assert found == pytest.approx([wanted[name] for name in ("precision", "recall", "f1-score", "support")])
    areas = metrics.roc_auc_score(case.labels, case.probabilities, average=None)
    assert [scores.roc_auc for scores in report.classes] == areas.tolist()
    assert report.macro.roc_auc == pytest.approx(areas.mean())
    mistakes = report.confusions(3)
    assert mistakes[0][2] == (report.confusion - np.diag(np.diag(report.confusion))).max()
    assert [count for *_, count in mistakes] == sorted((count for *_, count in mistakes), reverse=True)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"accuracy {report.accuracy:.2%} (95 %: ")
    assert len({len(line) for line in lines[2:]}) == 1
    assert len(lines) == 2 + 1 + 4 + 2


def test_a_report_of_strings_without_scores() -> None:
    report = metrics.classification_report(["cat", "dog", "dog"], ["cat", "dog", "cat"])
    assert [scores.label for scores in report.classes] == ["cat", "dog"]
    assert report.macro.roc_auc is None
    assert report.confusions() == [("dog", "cat", 1)]
    assert "AUC" not in str(report)


def test_classes_that_nobody_has() -> None:
    # A column without a sample has no area, and means leave it out.
    scores = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    areas = metrics.roc_auc_score([0, 1, 0], scores, average=None)
    assert areas[:2].tolist() == [1.0, 1.0]
    assert math.isnan(areas[2])
    assert metrics.roc_auc_score([0, 1, 0], scores) == 1.0
    assert math.isnan(metrics.roc_auc_score([0, 0, 0], scores))
    report = metrics.classification_report([0, 1, 0], [0, 1, 0], scores)
    assert len(report.classes) == 3
    assert report.classes[2].support == 0
    false, true, _ = metrics.roc_curve([0, 0], [0.1, 0.2])
    assert np.isnan(true).all()
    assert false.tolist() == [0, 0.5, 1] or false.tolist() == [0, 1]


def test_columns_that_could_stand_for_other_classes() -> None:
    y = np.array([1, 1, 2, 2])
    p = np.full((4, 3), 0.05)
    p[np.arange(4), y - 1] = 0.9
    for metric in (metrics.roc_auc_score, metrics.log_loss, metrics.top_k_accuracy_score):
        with pytest.raises(ValueError, match="y_true has labels from 1 to 2 and no 0, y_score 3 columns: give labels"):
            metric(y, p)
    assert metrics.log_loss(y, p, labels=[1, 2, 3]) == pytest.approx(-math.log(0.9))
    areas = metrics.roc_auc_score(y, p, labels=[1, 2, 3], average=None)
    assert areas[:2].tolist() == [1, 1]
    assert math.isnan(areas[2])


@pytest.mark.parametrize("zero_division", [0, 1, 0.0, 1.0, math.nan])
@pytest.mark.parametrize("average", [None, "macro", "weighted"])
def test_what_stands_for_0_by_0(zero_division: float, average: str | None) -> None:
    y, predicted = [0, 1, 1, 3], [0, 1, 2, 2]
    found, wanted = (
        f(y, predicted, average=average, zero_division=zero_division)
        for f in (metrics.precision_recall_fscore_support, sklearn.metrics.precision_recall_fscore_support)
    )
    for a, b in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e-308, 1.0, 1e170, 1e300])
def test_the_size_of_weights_changes_no_score(scale: float) -> None:
    y, score, weights = [0, 1, 0, 1], [0.1, 0.9, 0.4, 0.2], np.array([1.0, 2, 3, 4])
    for metric in (metrics.roc_auc_score, metrics.average_precision_score):
        assert metric(y, score, sample_weight=scale * weights) == pytest.approx(metric(y, score, sample_weight=weights))


def test_a_resample_without_a_class_is_left_out() -> None:
    y, score = [0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.5]
    assert metrics.bootstrap_interval(metrics.roc_auc_score, y, score) == (1.0, 1.0)
    assert math.isnan(metrics.roc_auc_score(y[:3], score[:3]))


def test_large_integers_are_told_apart() -> None:
    big = np.array([2**53, 2**53 + 1])
    assert metrics.confusion_matrix(big.astype(np.uint64), big).tolist() == [[1, 0], [0, 1]]


def test_one_column_may_be_a_matrix() -> None:
    y, p = [0, 1, 1], np.array([[0.1], [0.7], [0.6]])
    for metric in (metrics.log_loss, metrics.brier_score_loss, metrics.roc_auc_score, metrics.calibration_error):
        assert metric(y, p) == metric(y, p[:, 0])


def test_a_constant_that_is_predicted() -> None:
    assert metrics.r2_score([3, 3, 3], [3, 3, 3]) == 1.0
    assert metrics.r2_score([3, 3, 3], [3, 3, 4]) == 0.0


def test_the_area_of_descending_points() -> None:
    assert metrics.auc([1, 0.5, 0], [0, 1, 1]) == metrics.auc([0, 0.5, 1], [1, 1, 0]) == 0.75


@given(arrays.arrays(np.float64, st.integers(2, 30), elements=st.floats(-3, 3)), st.data())
def test_the_area_is_the_probability_of_a_higher_score(scores: Array, data: st.DataObject) -> None:
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    a, b = scores[positive], scores[~positive]
    if not (len(a) and len(b)):
        return
    wins = (a[:, np.newaxis] > b).mean() + 0.5 * (a[:, np.newaxis] == b).mean()
    assert metrics.roc_auc_score(positive, scores) == pytest.approx(wins, abs=1e-14)


# Of generated samples.


def frechet_by_scipy(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(axis=0) - b.mean(axis=0)
    return shift @ shift + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b))


def test_frechet_distance_of_equals(rng: np.random.Generator) -> None:
    a = rng.normal(size=(50, 8))
    scale = np.trace(np.cov(a, rowvar=False))
    assert 0 <= metrics.frechet_distance(a, a) < 1e-12 * scale
    assert 0 <= metrics.frechet_distance(a, rng.permutation(a)) < 1e-12 * scale


def test_frechet_distance_of_a_shift(rng: np.random.Generator) -> None:
    a, shift = rng.normal(size=(50, 8)), rng.normal(size=8)
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(shift @ shift, rel=1e-12)
    assert metrics.frechet_distance(a[:, :1], a[:, :1] + 3) == pytest.approx(9, rel=1e-12)


def test_frechet_distance_of_a_stretch(rng: np.random.Generator) -> None:
    """Of two normal distributions of one feature: the squared difference of the standard deviations."""
    a = rng.normal(size=(50, 1))
    assert metrics.frechet_distance(a, 4 * (a - a.mean()) + a.mean()) == pytest.approx(9 * a.var(ddof=1), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_frechet_distance_against_scipy(rng: np.random.Generator, dtype: Any) -> None:
    a = (rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))).astype(dtype)
    b = (rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 1).astype(dtype)
    distance = metrics.frechet_distance(a, b)
    assert distance == pytest.approx(frechet_by_scipy(a, b), rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_of_singular_covariances(rng: np.random.Generator) -> None:
    """Fewer rows than features, a feature that never changes, and rows that are all the same."""
    a, b = rng.normal(size=(5, 20)), rng.normal(size=(6, 20))
    a[:, 0] = b[:, 0] = 1
    assert metrics.frechet_distance(a, b) == pytest.approx(frechet_by_eigenvalues(a, b), rel=1e-6)
    same = np.ones((3, 4))
    assert metrics.frechet_distance(same, same + 2) == 16


@pytest.mark.parametrize(("a", "b"), [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4)), ((5,), (5,))])
def test_frechet_distance_of_bad_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a and b have shapes {a} and {b}")):
        metrics.frechet_distance(np.ones(a), np.ones(b))


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: metrics.accuracy_score([math.nan, 1.0], [1, 1]), ValueError, "y_true has NaN at"),
    (lambda: metrics.r2_score([math.inf, 1.0], [1, 1]), ValueError, "y_true has inf at"),
    (
        lambda: metrics.precision_recall_fscore_support([0], [0], zero_division="warn"),
        ValueError,
        "zero_division must be",
    ),
    (lambda: metrics.roc_auc_score([0, 1, 2], [0.1, 0.9, 0.5], labels=[0, 1]), ValueError, "y_true has the label 2"),
    (lambda: metrics.roc_auc_score([0, 1], [0.1, 0.9], average="bogus"), ValueError, "average must be"),
    (lambda: metrics.roc_auc_score([0, 1], np.ma.masked_array([0.1, 0.9])), TypeError, "y_score is a masked array"),
    (lambda: metrics.roc_curve([0, 1], [0.1, 0.9], pos_label=[0, 1]), TypeError, "pos_label must be one label"),
    (
        lambda: metrics.top_k_accuracy_score([0, 1], np.ones((2, 2)), k=1.5),
        TypeError,
        "k must be an integer, got float",
    ),
    (lambda: metrics.calibration_error([0, 1], [0.5, 0.5], bins="a"), TypeError, "bins must be an integer"),
    (lambda: metrics.bootstrap_interval(np.mean, [1], confidence="a"), TypeError, "confidence must be a number"),
    (lambda: metrics.bootstrap_interval(np.mean, [1], seed=-1), ValueError, "seed must be at least 0"),
    (lambda: metrics.bootstrap_interval(np.mean, np.ma.masked_array([1])), TypeError, r"arrays\[0\] is a masked array"),
    (lambda: metrics.frechet_distance(np.full((3, 2), np.nan), np.ones((3, 2))), ValueError, "a has NaN"),
    (lambda: metrics.accuracy_score([1, 2], [1]), ValueError, r"y_true has shape \(2,\) and y_pred \(1,\)"),
    (lambda: metrics.accuracy_score([1, 2], ["1", "2"]), TypeError, "y_true has dtype int64 and y_pred <U1"),
    (lambda: metrics.accuracy_score([], []), ValueError, "y_true is empty"),
    (lambda: metrics.accuracy_score([[1], [1, 2]], [1, 2]), ValueError, "y_true cannot be read"),
    (lambda: metrics.accuracy_score([None], [1]), TypeError, "y_true has dtype object"),
    (lambda: metrics.accuracy_score(np.ma.masked_array([1]), [1]), TypeError, "y_true is a masked array"),
    (lambda: metrics.accuracy_score([1], [1], sample_weight=[-1]), ValueError, "sample_weight must be finite"),
    (lambda: metrics.accuracy_score([1], [1], sample_weight=[1, 1]), ValueError, "sample_weight has shape"),
    (lambda: metrics.confusion_matrix([0, 1], [0, 1], labels=[0, 0]), ValueError, "labels has a label twice"),
    (lambda: metrics.confusion_matrix([0, 1], [0, 1], labels=["a"]), TypeError, "labels has dtype"),
    (
        lambda: metrics.precision_recall_fscore_support([0, 1], [0, 1], average="all"),
        ValueError,
        "average must be None",
    ),
    (lambda: metrics.roc_curve([1, 2], [0.1, 0.2]), ValueError, "y_true must be bools, or 0 and 1"),
    (lambda: metrics.roc_curve(["a", "b"], [0.1, 0.2]), ValueError, "pos_label"),
    (lambda: metrics.roc_curve([0, 1], [0.1, math.nan]), ValueError, r"y_score has NaN at \(1,\)"),
    (lambda: metrics.roc_curve([0, 1], [[0.1, 0.2]]), ValueError, r"y_score has shape \(1, 2\), expected \(2,\)"),
    (lambda: metrics.roc_auc_score([0, 1], np.ones((2, 3)), average="micro"), ValueError, "average must be None"),
    (lambda: metrics.roc_auc_score([0, 1, 2], [1.0, 2, 3]), ValueError, "y_true must have two classes"),
    (lambda: metrics.roc_auc_score(["a", "b"], np.ones((2, 3))), ValueError, "y_score has 3 columns, y_true 2"),
    (lambda: metrics.log_loss([0, 1], [[0.5, 0.5], [1.5, -0.5]]), ValueError, r"within \[0, 1\]"),
    (lambda: metrics.log_loss([0, 5], np.ones((2, 2)), labels=[0, 1]), ValueError, "y_true has the label"),
    (lambda: metrics.calibration_curve([0, 1], [0.5, 0.5], bins=0), ValueError, "bins must be at least 1"),
    (lambda: metrics.top_k_accuracy_score([0, 1], np.ones((2, 2)), k=0), ValueError, "k must be at least 1"),
    (lambda: metrics.auc([0, 2, 1], [0, 0, 0]), ValueError, "x must ascend or descend"),
    (lambda: metrics.auc([0], [0]), ValueError, "x must have at least 2 points"),
    (lambda: metrics.wilson_interval(3, 2), ValueError, "successes must be from 0 to n"),
    (lambda: metrics.wilson_interval(1, 2, 95), ValueError, "confidence must be between 0 and 1"),
    (lambda: metrics.bootstrap_interval(np.mean), ValueError, "arrays must have the same number"),
    (lambda: metrics.bootstrap_interval(np.mean, [1], [1, 2]), ValueError, "arrays must have the same number"),
    (lambda: metrics.bootstrap_interval(np.mean, []), ValueError, "arrays are empty"),
    (lambda: metrics.bootstrap_interval(np.mean, [1], resamples=0), ValueError, "resamples must be"),
    (lambda: metrics.r2_score([1], [1]), ValueError, "at least 2 samples"),
    (lambda: metrics.mean_squared_error(["a"], ["a"]), TypeError, "y_true has dtype <U1; expected numbers"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_bad_input_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_numpy_is_all_that_it_imports() -> None:
    import subprocess
    import sys

    code = (
        "import sys, numpy, gemmlet; before = set(sys.modules); import gemmlet.metrics; "
        "print({n.split('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names - {'numpy'})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "{'gemmlet'}"


def test_all_is_all() -> None:
    public = {name for name in vars(metrics) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(metrics, name)) is type(metrics)}
    assert set(metrics.__all__) | {"Interval"} >= public - modules
    assert [name for name in metrics.__all__ if not hasattr(metrics, name)] == []
