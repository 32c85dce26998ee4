"""What `fit` takes besides samples and an optimizer: schedules, early stopping, metrics, weights, a split."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmlet import metrics
from gemmlet.nn import (
    MLP,
    SGD,
    Adam,
    EarlyStopping,
    ReduceOnPlateau,
    StepDecay,
    StopTraining,
    WarmUp,
    cosine_decay,
    linear_decay,
)
from support import same_bits

Array = Any
N = 120
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(N, 6)).astype(np.float32)
# By a sum of the first columns and noise: 60, 40 and 20 of the classes, which can be learnt, but not for long.
SUMS = X[:, :3].sum(axis=1) + RNG.normal(0, 0.3, N)
Y = np.digitize(SUMS, np.sort(SUMS)[[60, 100]])
VALIDATION = X[::3] + np.float32(0.1), Y[::3] ^ (np.arange(40) % 5 == 0)


def model_of(**settings: Any) -> MLP:
    return MLP([6, 8, 3], **{"seed": 1, **settings})


def parameters(model: MLP) -> list[Array]:
    return [array.copy() for dense in model._parts().values() for array in dense.parameters]


def same(a: MLP | list[Array], b: MLP | list[Array]) -> bool:
    left, right = (each if isinstance(each, list) else parameters(each) for each in (a, b))
    return len(left) == len(right) and all(map(same_bits, left, right))


# Schedules.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (linear_decay, [1, 0.75, 0.5, 0.25]),
        (cosine_decay, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        (StepDecay(0.5, [0.25, 0.75]), [1, 0.5, 0.5, 0.25]),
        (WarmUp(0.5), [0.01 / 1.01, 0.51 / 1.01, 1, 1]),
        (WarmUp(0.5, linear_decay), [0.01 / 1.01, 0.51 / 1.01, 1, 0.5]),
        (WarmUp(0.0, linear_decay), [1, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules(schedule: Callable[[float], float], expected: list[float]) -> None:
    assert [schedule(done) for done in (0.0, 0.25, 0.5, 0.75)] == pytest.approx(expected, rel=1e-12)


def plateaus_by_hand(values: list[float], patience: int, min_delta: float) -> tuple[list[int], int | None, int]:
    """How often the rate is reduced after each epoch, after which epoch training ends, and the best epoch, from 1."""
    best, since, waited, reduced, reductions, end, best_epoch = math.inf, 0, 0, 0, [], None, 0
    for epoch, value in enumerate(values, 1):
        if value < best - min_delta or (best == math.inf and value < best):
            best, since, waited, best_epoch = value, 0, 0, epoch
        else:
            since, waited = since + 1, waited + 1
        if waited > patience:
            reduced, waited = reduced + 1, 0
        reductions.append(reduced)
        if since > patience and end is None:
            end = epoch
    return reductions, end, best_epoch


@given(
    st.lists(st.sampled_from([0.5, 0.25, 1.0, 0.75, math.nan, math.inf]), min_size=1, max_size=12),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.25]),
)
def test_what_follows_the_history(values: list[float], patience: int, min_delta: float) -> None:
    reductions, end, best = plateaus_by_hand(values, patience, min_delta)
    early = EarlyStopping("loss", patience, min_delta)
    plateau = ReduceOnPlateau("loss", patience, min_delta, factor=0.5, minimum=0.25)
    rising = EarlyStopping("validation_accuracy", patience, min_delta)
    for epoch in range(1, len(values) + 1):
        seen = values[:epoch]
        assert plateau.factor_after(seen) == max(0.5 ** reductions[epoch - 1], 0.25)
        if end is None or epoch <= end:
            assert early.is_over(seen) == (epoch == end) == rising.is_over([-value for value in seen])
    gains = np.flatnonzero(early.gains(values))
    assert (gains[-1] + 1 if len(gains) else 0) == best
    assert early.is_best(values) == (best == len(values))


def test_which_direction_is_better() -> None:
    for monitor in ("loss", "validation_loss", "validation_calibration_error", "validation_brier_score"):
        assert EarlyStopping(monitor).gains([2, 1]).all()
    for monitor in ("validation_accuracy", "validation_macro_f1", "validation_roc_auc", "validation_r2"):
        assert EarlyStopping(monitor).gains([1, 2]).all()
    assert EarlyStopping("loss", mode="max").gains([1, 2]).all()


def test_a_plateau_lowers_the_learning_rate() -> None:
    """As a schedule does that knows the epochs beforehand."""
    plateau = ReduceOnPlateau("validation_loss", patience=0, min_delta=0.02, factor=0.5)
    model, other = model_of(), model_of()
    how = {"epochs": 8, "batch_size": 20, "validation_data": VALIDATION}
    history = model.fit(X, Y, optimizer=SGD(0.5), lr_schedule=plateau, **how)
    factors = [plateau.factor_after(history.validation_loss[:epoch]) for epoch in range(8)]
    assert len(set(factors)) > 2
    again = other.fit(X, Y, optimizer=SGD(0.5), lr_schedule=lambda done: factors[int(8 * done)], **how)
    assert same(model, other)
    assert again.loss == history.loss


# Early stopping.

HOW: dict[str, Any] = {"batch_size": 10, "validation_data": VALIDATION}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_early_stopping_restores_the_best_epoch(ema_decay: float) -> None:
    model = model_of(ema_decay=ema_decay)
    early = EarlyStopping(patience=4)
    history = model.fit(X, Y, epochs=200, optimizer=Adam(0.02), early_stopping=early, **HOW)
    best = int(np.argmin(history.validation_loss)) + 1
    assert best > 1
    assert len(history.loss) == best + 5 < 200
    assert model.steps == 12 * len(history.loss)
    other = model_of(ema_decay=ema_decay)
    other.fit(X, Y, epochs=best, optimizer=Adam(0.02), **HOW)
    assert same(model, other)
    assert model.evaluate(*VALIDATION)["loss"] == history.validation_loss[best - 1]


def test_the_last_epoch_stays_if_the_best_is_not_wanted() -> None:
    model, other = model_of(), model_of()
    early = EarlyStopping(patience=4, restore_best=False)
    history = model.fit(X, Y, epochs=200, optimizer=Adam(0.02), early_stopping=early, **HOW)
    other.fit(X, Y, epochs=len(history.loss), optimizer=Adam(0.02), **HOW)
    assert same(model, other)


def test_the_best_is_restored_after_all_epochs_and_without_validation() -> None:
    model, other = model_of(), model_of()
    schedule = lambda done: 0.0 if done < 0.5 else 1e3  # noqa: E731 - it spoils the second half
    history = model.fit(X, Y, 6, 10, SGD(0.01), schedule, shuffle=False, early_stopping=EarlyStopping("loss", 100))
    assert int(np.argmin(history.loss)) < 5
    epochs = int(np.argmin(history.loss)) + 1
    other.fit(X, Y, epochs, 10, SGD(0.01), lambda done: schedule(done * epochs / 6), shuffle=False)
    assert same(model, other)


@pytest.mark.parametrize("stop", [3, 7, 9, 12])
def test_early_stopping_goes_on_from_a_checkpoint(stop: int, tmp_path: Path) -> None:
    how = {**HOW, "epochs": 200, "early_stopping": EarlyStopping(patience=4), "metrics": ["macro_f1"]}
    whole = model_of()
    wanted = whole.fit(X, Y, optimizer=Adam(0.02), **how)
    assert len(wanted.loss) > 12

    def interrupt(progress: Any) -> None:
        if progress.epoch == stop and progress.batch == 5:
            raise KeyboardInterrupt

    path = tmp_path / "fit.safetensors"
    model = model_of()
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, optimizer=Adam(0.02), callback=interrupt, checkpoint=path, **how)
    model = model_of()
    history = model.fit(X, Y, optimizer=Adam(0.02), checkpoint=path, resume=True, **how)
    assert same(model, whole)
    assert {**vars(history), "seconds": 0} == {**vars(wanted), "seconds": 0}
    assert same(MLP.load(path), whole)  # not the last epoch, which the checkpoint has as well
    # What has ended stays so.
    model = model_of()
    assert model.fit(X, Y, optimizer=Adam(0.02), checkpoint=path, resume=True, **how).loss == history.loss
    assert same(model, whole)
    for other in (EarlyStopping(patience=5), None):
        with pytest.raises(ValueError, match="early_stopping was"):
            model_of().fit(X, Y, optimizer=Adam(0.02), checkpoint=path, resume=True, **{**how, "early_stopping": other})


@pytest.mark.parametrize("when", range(1, 24))
def test_an_interrupt_where_an_epoch_is_printed_loses_no_best(when: int, tmp_path: Path, capsys: Any) -> None:
    how = {**HOW, "epochs": 200, "early_stopping": EarlyStopping(patience=4)}
    whole = model_of()
    wanted = whole.fit(X, Y, optimizer=Adam(0.02), **how)
    assert len(wanted.loss) >= 12
    when = min(when, len(wanted.loss))  # the last of these are the last epoch
    path, model = tmp_path / "fit.safetensors", model_of()
    with pytest.MonkeyPatch.context() as patch:

        def spoilt(line: str, **_: Any) -> None:
            if line.startswith(f"epoch {when}/"):
                raise BrokenPipeError

        patch.setattr("builtins.print", spoilt)
        with pytest.raises(BrokenPipeError):
            model.fit(X, Y, optimizer=Adam(0.02), verbose=True, checkpoint=path, **how)
    model = model_of()
    model.fit(X, Y, optimizer=Adam(0.02), checkpoint=path, resume=True, **how)
    assert same(model, whole)


def test_a_callback_that_stops_gets_the_best_too() -> None:
    def stop(progress: Any) -> None:
        if progress.epoch == 30 and progress.batch == 2:
            raise StopTraining

    model, other = model_of(), model_of()
    history = model.fit(
        X, Y, 200, optimizer=Adam(0.02), early_stopping=EarlyStopping(patience=100), callback=stop, **HOW
    )
    best = int(np.nanargmin(history.validation_loss)) + 1
    assert best < 29
    other.fit(X, Y, best, optimizer=Adam(0.02), **HOW)
    assert same(model, other)


def test_early_stopping_by_what_is_always_nan_says_so() -> None:
    model = MLP([6, 1], output="identity")
    with pytest.warns(RuntimeWarning, match="ended fit, as validation_accuracy was NaN after each epoch"):
        history = model.fit(X, Y, 9, validation_split=0.2, early_stopping=EarlyStopping("validation_accuracy", 2))
    assert len(history.loss) == 3


def test_a_plateau_of_what_is_always_nan_says_so() -> None:
    schedule = ReduceOnPlateau("validation_accuracy", patience=1)
    with pytest.warns(RuntimeWarning, match="lowered the learning rate, as validation_accuracy was NaN after each"):
        MLP([6, 1], output="identity").fit(X, Y, 2, validation_split=0.2, lr_schedule=schedule)


# Validation.


def test_a_split_holds_out_the_same_share_of_each_class() -> None:
    model = model_of()
    history = model.fit(X, Y, 3, 10, validation_split=0.25, shuffle=False)
    held = np.zeros(N, bool)
    for row in range(N):  # which rows it was trained on: those that change what is learnt
        other = X.copy()
        other[row] = 1 - other[row]
        again = model_of()
        again.fit(other, Y, 1, 10, validation_split=0.25, shuffle=False)
        once = model_of()
        once.fit(X, Y, 1, 10, validation_split=0.25, shuffle=False)
        held[row] = same(again, once)
    kept = np.flatnonzero(~held)
    assert np.bincount(Y[held]).tolist() == [15, 10, 5]
    plain = model_of()
    wanted = plain.fit(X[kept], Y[kept], 3, 10, shuffle=False, validation_data=(X[held], Y[held]))
    assert same(model, plain)
    assert (history.loss, history.validation_loss) == (wanted.loss, wanted.validation_loss)
    seeds = [model_of(seed=seed).fit(X, Y, 1, validation_split=0.25).validation_loss for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("kind", ["regression", "soft labels", "sparse"])
def test_other_targets_and_samples_are_split(kind: str) -> None:
    scipy = pytest.importorskip("scipy.sparse")
    targets = np.stack([Y == 0, Y == 1, Y == 2], axis=1) * 0.8 + 0.2 / 3
    model = model_of(output="identity") if kind == "regression" else model_of()
    history = model.fit(
        scipy.csr_matrix(X) if kind == "sparse" else X, Y if kind == "sparse" else targets, 2, validation_split=0.2
    )
    assert len(history.validation_loss) == 2
    assert math.isnan(history.validation_accuracy[0]) == (kind != "sparse")


def test_metrics_are_those_of_the_module() -> None:
    model = model_of()
    found: list[dict[str, float]] = []
    proba: list[Array] = []

    def callback(progress: Any) -> None:
        found.append(dict(progress.metrics))
        proba.append(model.predict_proba(VALIDATION[0]).astype(np.float64))

    own = {"largest": lambda y, p: float(p.max()), "count": lambda y, p: len(y)}
    history: Any = model.fit(
        X, Y, 3, metrics={**dict.fromkeys(own), **own}, callback=callback, callback_every="epoch", **HOW
    )
    assert history["validation_count"] == [40.0] * 3
    assert history["validation_largest"] == [float(p.max()) for p in proba]
    assert found[2] == {"validation_largest": history["validation_largest"][2], "validation_count": 40.0}
    names = ["macro_f1", "weighted_f1", "macro_recall", "roc_auc", "top_2_accuracy", "log_loss", "calibration_error"]
    other = model_of()
    history = other.fit(X, Y, 3, metrics=names, **HOW)
    p, y = proba[2], VALIDATION[1]
    assert same(model, other)
    macro = metrics.precision_recall_fscore_support(y, p.argmax(axis=1), average="macro")
    assert history["validation_macro_f1"][2] == macro[2]
    assert history["validation_macro_recall"][2] == macro[1]
    assert history["validation_roc_auc"][2] == metrics.roc_auc_score(y, p)
    assert history["validation_log_loss"][2] == pytest.approx(history.validation_loss[2], rel=1e-6)
    assert history["validation_top_2_accuracy"][2] == metrics.top_k_accuracy_score(y, p, k=2)
    assert "validation_macro_f1" in repr(history)


def test_metrics_of_one_output_and_of_numbers() -> None:
    two = MLP([6, 4, 1], output="sigmoid")
    history: Any = two.fit(X, Y > 0, 2, metrics=["roc_auc", "brier_score"], validation_split=0.5)
    assert len(history["validation_roc_auc"]) == 2
    assert 0 < history["validation_brier_score"][1] < 1
    numbers = MLP([6, 4, 1], output="identity")
    history = numbers.fit(X, X.sum(axis=1), 2, metrics=["r2", "mean_squared_error"], validation_data=(X, X.sum(axis=1)))
    assert history["validation_mean_squared_error"] == pytest.approx(history.validation_loss, rel=1e-5)
    assert history["validation_r2"][1] == metrics.r2_score(X.sum(axis=1), numbers.predict(X))


# Weights.


def test_whole_weights_are_repetitions(backend: Any) -> None:
    """In one mini-batch of all samples; weights count in units of their mean."""
    weights = np.arange(N) % 4
    model, other = model_of(dtype=np.float64), model_of(dtype=np.float64)
    x = X.astype(np.float64)
    history = model.fit(x, Y, 4, N, SGD(0.5), sample_weight=3.0 * weights)
    rows = np.repeat(np.arange(N), weights)
    wanted = other.fit(x[rows], Y[rows], 4, len(rows), SGD(0.5))
    for a, b in zip(parameters(model), parameters(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    assert history.loss == pytest.approx(wanted.loss, rel=1e-10)


def test_mini_batches_are_divided_by_their_size(backend: Any) -> None:
    """So that one of small weights counts less, and one without any changes nothing."""
    weights = np.repeat([0.0, 0.5, 1.5, 2.0], N // 4)
    model = model_of(dtype=np.float64)
    before = parameters(model)
    gradients = []
    for part in range(4):
        rows = slice(part * N // 4, (part + 1) * N // 4)
        x = X.astype(np.float64)
        gradients.append(model.loss_and_gradients(x[rows], Y[rows])[1])
    stopped: list[list[Array]] = []

    def callback(progress: Any) -> None:
        stopped.append(parameters(model))

    model.fit(X.astype(np.float64), Y, 1, N // 4, SGD(0.5), sample_weight=weights, shuffle=False, callback=callback)
    assert same(stopped[0], before)
    for value, start, gradient in zip(stopped[1], before, gradients[1], strict=True):
        np.testing.assert_allclose(value, start - 0.5 * 0.5 * gradient, rtol=1e-10, atol=1e-13)


def test_weights_of_classes() -> None:
    by_class, by_sample, balanced, third = (model_of() for _ in range(4))
    by_class.fit(X, Y, 3, 10, class_weight={0: 1, 1: 2.5, 2: 0})
    by_sample.fit(X, Y, 3, 10, sample_weight=np.array([1, 2.5, 0])[Y])
    assert same(by_class, by_sample)
    balanced.fit(X, Y, 3, 10, class_weight="balanced")
    third.fit(X, Y, 3, 10, class_weight={0: 2, 1: 3, 2: 6})
    for a, b in zip(parameters(balanced), parameters(third), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    named, names = model_of(), np.array(["a", "b", "c"])[Y]
    named.fit(X, names, 3, 10, class_weight={"b": 2.5, "c": 0}, sample_weight=np.full(N, 1e-300))
    assert same(named, by_class)


def test_weights_and_a_split_go_together() -> None:
    """What is held out says nothing of the units of what is trained on."""
    plain, weighted = model_of(), model_of()
    plain.fit(X, Y, 1, 10, validation_split=0.25, shuffle=False)
    found: list[Array] = []
    for large in range(N):  # of a row that is held out, the weight changes nothing
        weights = np.ones(N)
        weights[large] = 99.0
        weighted = model_of()
        weighted.fit(X, Y, 1, 10, validation_split=0.25, shuffle=False, sample_weight=weights)
        found.append(same(weighted, plain))
    assert sum(found) == 30
    weights = np.where(found, 1.0, 0.0)
    with pytest.raises(ValueError, match="leave no sample to train on"):
        model_of().fit(X, Y, 1, 10, validation_split=0.25, shuffle=False, sample_weight=weights)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e300, 1.7e308])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 1e300}, {1: 1e-300}])
def test_weights_of_any_size(scale: float, class_weight: Any) -> None:
    model, other = model_of(), model_of()
    model.fit(X, Y, 2, 10, sample_weight=np.full(N, scale), class_weight=class_weight)
    other.fit(X, Y, 2, 10, sample_weight=np.ones(N), class_weight=class_weight)
    assert same(model, other)


def test_a_metric_may_change_what_it_is_given() -> None:
    def spoils(y: Array, p: Array) -> float:
        y[:], p[:] = 0, 0
        return 1.0

    model, other = model_of(), model_of()
    history = model.fit(X, Y, 3, metrics={"spoils": spoils, "sum": lambda y, p: float(p.sum())}, **HOW)
    assert history["validation_sum"] == pytest.approx([40.0] * 3, rel=1e-5)
    assert history.validation_loss == other.fit(X, Y, 3, **HOW).validation_loss


def test_a_checkpoint_of_other_metrics_is_refused_by_name(tmp_path: Path) -> None:
    how: dict[str, Any] = {"checkpoint": tmp_path / "fit", "resume": True, "validation_split": 0.2}
    model_of().fit(X, Y, 2, metrics=["macro_f1"], **how)
    with pytest.raises(ValueError, match="metrics was"):
        model_of().fit(X, Y, 3, metrics=["macro_f1", "roc_auc"], **how)
    with pytest.raises(ValueError, match=r"validation_split was 0\.2, is 0\.3"):
        model_of().fit(X, Y, 3, metrics=["macro_f1"], **{**how, "validation_split": 0.3})


# What cannot be used.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"early_stopping": EarlyStopping()},
            ValueError,
            "early_stopping monitors 'validation_loss', this fit has loss",
        ),
        ({"lr_schedule": ReduceOnPlateau("accurracy")}, ValueError, "lr_schedule monitors 'accurracy'"),
        ({"early_stopping": 5}, TypeError, "early_stopping must be an EarlyStopping, got int"),
        ({"validation_split": 1.0}, ValueError, "validation_split"),
        ({"validation_split": 1e-4}, ValueError, "validation_split of 0.0001 leaves 0 of 120"),
        ({"validation_split": 0.5, "validation_data": (X, Y)}, ValueError, "give one of them"),
        ({"metrics": ["macro_f1"]}, ValueError, "metrics needs validation_data or validation_split"),
        (
            {"metrics": ["f1"], "validation_split": 0.1},
            ValueError,
            r"metrics\[0\] 'f1' is unknown; the choices are macro",
        ),
        ({"metrics": "macro_f1", "validation_split": 0.1}, TypeError, "metrics must be a list of names"),
        ({"metrics": {"loss": len}, "validation_split": 0.1}, ValueError, "metrics has the name 'loss'"),
        ({"metrics": {"a": 5}, "validation_split": 0.1}, TypeError, r"metrics\['a'\] must be callable"),
        ({"metrics": {"a": lambda y, p: "x"}, "validation_split": 0.1}, TypeError, r"what metrics\['a'\] returns"),
        ({"class_weight": {5: 1.0}}, ValueError, "class_weight has the label 5; expected 0, 1, 2"),
        ({"class_weight": {0: -1.0}}, ValueError, r"class_weight\[0\] must be"),
        ({"class_weight": "equal"}, ValueError, "class_weight 'equal' is unknown"),
        ({"class_weight": [1, 2, 3]}, TypeError, "class_weight must be 'balanced' or a mapping"),
        ({"class_weight": {0: 0, 1: 0, 2: 0}}, ValueError, "leave no sample"),
        ({"sample_weight": np.ones(N - 1)}, ValueError, r"sample_weight has shape \(119,\), expected \(120,\)"),
        ({"sample_weight": np.full(N, np.nan)}, ValueError, r"sample_weight\[0\] is nan"),
        ({"sample_weight": ["a"] * N}, TypeError, "sample_weight has dtype"),
    ],
)
def test_what_cannot_be_used(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = model_of()
    before = parameters(model)
    with pytest.raises(error, match=message):
        model.fit(X, Y, 2, **arguments)
    if "returns" not in message:
        assert model.steps == 0
        assert same(model, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepDecay(0.0), "factor must be"),
        (lambda: StepDecay(0.1, [0.5, 0.2]), "at must ascend"),
        (lambda: StepDecay(0.1, [2.0]), r"at\[0\] must be within"),
        (lambda: WarmUp(2.0), "fraction must be"),
        (lambda: EarlyStopping(patience=-1), "patience must be at least 0"),
        (lambda: EarlyStopping(mode="up"), "mode 'up' is unknown"),
        (lambda: ReduceOnPlateau(factor=-1.0), "factor must be"),
        (lambda: ReduceOnPlateau(min_delta=-1.0), "min_delta must be"),
    ],
)
def test_settings_that_do_not_fit(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
