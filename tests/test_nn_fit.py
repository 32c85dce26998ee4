"""What `fit` leaves where something goes wrong: signals, calls that fail, numbers that are not finite."""

from __future__ import annotations

import copy
import math
import random
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmlet import _signals
from gemmlet.nn import GAN, MLP, SGD, Adam, ClipNorm, DivergedError
from support import same_bits, stop_after

N = 60


def made(network: str, dtype: Any = np.float32, **settings: Any) -> tuple[Any, tuple[Any, ...]]:
    """A network with moving averages, and samples for it: eight mini-batches of 8."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(N, 6)).astype(dtype)
    if network == "mlp":
        return MLP([6, 5, 3], dtype=dtype, ema_decay=0.9, **settings), (x, rng.integers(0, 3, N))
    return GAN(2, [4, 6], [5, 1], dtype=dtype, **settings), (x,)


def weights_of(model: Any) -> list[Any]:
    return [array for dense in model._parts().values() for array in dense.parameters]


def left_by(model: Any, *optimizers: Any) -> list[Any]:
    """All that training changes."""
    states = [state for optimizer in optimizers for state in optimizer._states.values()]
    arrays = [*weights_of(model), *(array for state in states for array in state.arrays)]
    return [*(array.copy() for array in arrays), np.array([model.steps, *(state.steps for state in states)])]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def train_steps(steps: int, model: Any, data: Any, optimizer: Any, shuffle: bool = False) -> None:
    if steps:
        model.fit(*data, 10**6, 8, optimizer, shuffle=shuffle, callback=stop_after(steps))


# Signals.


class TimeUp(Exception):  # noqa: N818 - as its handler sees it
    """What the handler of an alarm raises."""


@contextmanager
def alarm() -> Iterator[Callable[[float], None]]:
    """A function that sets the alarm, some seconds from now."""

    def handle(number: int, frame: Any) -> None:
        raise TimeUp

    previous = signal.signal(signal.SIGALRM, handle)
    try:
        # Again, as what a garbage collection calls may have swallowed the first (`swallows`).
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds, 5.0) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# An alarm may ring while a garbage collection calls something, say hypothesis's clock: Python reports what that raises.
swallows = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@swallows
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("by_callback", [False, True])
def test_steps_are_counted_exactly(by_callback: bool, network: str, training: Any) -> None:
    """A training that is interrupted again and again, anywhere, is what the steps give that it has counted."""
    chance = random.Random(1)
    model, data = made(network)
    other, _ = made(network)
    rule, same_rule = Adam(0.01), Adam(0.01)
    train_steps(1, model, data, rule)  # Numba compiles
    train_steps(1, other, data, same_rule)
    for _ in range(100):
        before = model.steps
        with alarm() as ring:
            try:
                ring(chance.uniform(0.0001, 0.002))
                model.fit(*data, 10**6, 8, rule, shuffle=False, callback=(lambda p: None) if by_callback else None)
            except TimeUp:
                pass
        assert {state.steps for state in rule._states.values()} == {model.steps}
        train_steps(model.steps - before, other, data, same_rule)
        assert same(left_by(model, rule), left_by(other, same_rule))
    assert model.steps > 100


@swallows
def test_an_update_is_counted_if_it_was_done() -> None:
    chance, rule, param = random.Random(2), SGD(1.0), np.zeros(3)
    for _ in range(200):
        with alarm() as ring:
            try:
                ring(chance.uniform(0.0001, 0.001))
                while True:
                    rule.update(param, -np.ones(3))
            except TimeUp:
                pass
    (state,) = rule._states.values()
    assert param.tolist() == [state.steps] * 3


def test_every_signal_comes_in_the_end(training: Any) -> None:
    """Whatever handlers do: each is called, once, between two calls; then they are in their places."""
    model, data = made("mlp")
    came: list[int] = []
    numbers = signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGUSR2:
            raise TimeUp

    previous = [signal.signal(number, handle) for number in numbers]
    train, steps = type(training).train, []

    def interrupted(*arguments: Any) -> Any:
        for number in (*numbers, *numbers):
            signal.raise_signal(number)
        steps.append(model.steps)
        assert not came
        return train(*arguments)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(training), "train", interrupted)
            with pytest.raises(TimeUp):
                model.fit(*data, 2, 8)
        assert sorted(came) == sorted(numbers)
        assert steps == [0]
        assert model.steps > 0
        assert [signal.getsignal(number) for number in numbers] == [handle] * 3
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


# Calls that fail.


@pytest.mark.parametrize("error", [IndexError, RuntimeError, MemoryError, KeyboardInterrupt])
def test_what_is_refused_counts_nothing(error: Any, network: str, training: Any) -> None:
    """A call that raises before its first step, whatever it raises: random streams, too, are as if it had not been."""
    model, data = made(network)
    rule, train, calls = Adam(0.01), type(training).train, []

    def refusing(*arguments: Any) -> Any:
        calls.append(model.steps)
        if len(calls) == 4:
            raise error("no")
        return train(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(training), "train", refusing)
        with pytest.raises(error, match="no"):
            model.fit(*data, 3, 8, rule, shuffle=False)
    other, _ = made(network)
    same_rule = Adam(0.01)
    train_steps(calls[-1], other, data, same_rule)
    for _ in range(2):
        assert same(left_by(model, rule), left_by(other, same_rule))
        model.fit(*data, 2, 8, rule)
        other.fit(*data, 2, 8, same_rule)


def test_what_fails_midway_is_undone(network: str, training: Any) -> None:
    """With some parameters updated and others not: back to a moment shortly before, in every respect."""
    model, data = made(network)
    rule, update, updates = ClipNorm(Adam(0.01), 1.0), type(training).update, []

    def failing(*arguments: Any) -> Any:
        updates.append(model.steps)
        if len(updates) == 150:  # in the midst of a step
            raise MemoryError("no more")
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(training), "update", failing)
        try:
            model.fit(*data, 30, 8, rule, shuffle=False)
        except MemoryError:
            assert updates[-1] > 10
        else:
            assert len(updates) < 150  # it has an executor of its own, for clipping too
            return
    other, _ = made(network)
    same_rule = ClipNorm(Adam(0.01), 1.0)
    train_steps(model.steps, other, data, same_rule)
    for _ in range(2):
        assert same(weights_of(model), weights_of(other))
        model.fit(*data, 2, 8, rule)
        other.fit(*data, 2, 8, same_rule)
        assert same(left_by(model, rule.optimizer), left_by(other, same_rule.optimizer))


def test_a_network_is_in_one_fit_at_a_time(network: str) -> None:
    """Two first fits, say, would both draw the parameters; but a callback may call it, and so may a child."""
    model, data = made(network)
    message = "this network is in a fit of another thread: wait until that ends, or take a copy"
    told: list[Any] = []

    def callback(progress: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            told.append(pool.submit(model.fit, *data, 1).exception())
            told.append(pool.submit(copy.deepcopy(model).fit, *data, 1).exception())
        if progress.epoch == 1:
            model.fit(*data, 1)

    model.fit(*data, 2, callback=callback, callback_every="epoch")
    assert [(type(error), str(error)) for error in told] == [(RuntimeError, message), (type(None), "None")] * 2
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.fit, *data, 1).result()


# Numbers that are not finite.


def spoilt(data: Any, place: str, bad: float) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """Arguments of `fit`, and what their error says."""
    x, *y = (array.copy() for array in data)
    if place == "x":
        x[37, 2] = bad
        return (x, *y), {}, rf"x must be finite, got {bad} in row 37"
    if place in ("csr_matrix", "csr_array"):
        scipy = pytest.importorskip("scipy.sparse")
        x[x < 0.5] = 0
        x[37, 2] = bad
        return (getattr(scipy, place)(x), *y), {}, rf"x must be finite, got {bad} in row 37"
    if place == "y":
        y = [np.ones((N, 3), x.dtype)]
        y[0][41, 1] = bad
        return (x, *y), {}, rf"y must be finite, got {bad} in row 41"
    validation = [x.copy(), y[0] if place.endswith("[0]") else np.ones((N, 3), x.dtype)]
    y = [validation[1].copy()]
    validation[int(place[-2])][13, 1] = bad
    return ((x, *y), {"validation_data": validation}, rf"{re.escape(place)} must be finite, got {bad} in row 13")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["x", "csr_matrix", "csr_array", "y", "validation_data[0]", "validation_data[1]"])
def test_samples_that_are_not_finite_are_refused(place: str, bad: float, training: Any, dtype: Any) -> None:
    """By name and row; whoever leaves the row out then gets what a new network gets."""
    identity = place in ("y", "validation_data[1]")
    kind: dict[str, Any] = {"ema_decay": 0.5, "dtype": dtype, "output": "identity" if identity else "softmax"}
    model, (_, data) = MLP([6, 5, 3], **kind), made("mlp", dtype)
    rule, (given, more, message) = Adam(0.01), spoilt(data, place, bad)
    start = left_by(model)
    for callback in (None, lambda progress: None):
        with pytest.raises(ValueError, match=message):
            model.fit(*given, 3, 8, rule, callback=callback, **more)
        assert same(left_by(model), start)
        assert {state.steps for state in rule._states.values()} <= {0}
    good = data if not identity else (data[0], np.ones((N, 3), dtype))
    other = MLP([6, 5, 3], **kind)
    for each, optimizer in ((model, rule), (other, Adam(0.01))):
        each.fit(*good, 3, 8, optimizer)
    assert same(weights_of(model), weights_of(other))


def test_samples_of_a_gan_that_are_not_finite(training: Any) -> None:
    model, (x,) = made("gan")
    x[5, 3] = math.nan
    with pytest.raises(ValueError, match="x must be finite, got nan in row 5"):
        model.fit(x, 1, 8)


def test_samples_that_a_callback_spoils(training: Any) -> None:
    """They are named, too, and the last good state is kept."""
    if training.name == "cuda":
        pytest.skip("it has a copy of them")
    model, (x, y) = made("mlp")

    def callback(progress: Any) -> None:
        if progress.epoch == 3:
            x[20] = math.nan

    with pytest.raises(ValueError, match="x must be finite, got nan in row 20"):
        model.fit(x, y, 9, 8, Adam(), callback=callback, callback_every="epoch")
    assert np.isfinite(np.concatenate([w.ravel() for w in weights_of(model)])).all()


@pytest.mark.parametrize("every", ["batch", "call"])
def test_divergence_is_said_and_the_last_good_state_kept(every: str, network: str, training: Any) -> None:
    """All of it: weights, averages, the optimizer's state, steps, streams; a callback sees no such number."""
    model, data = made(network)
    seen: list[Any] = []
    rule, same_rule = Adam(0.01), Adam(0.01)

    def callback(progress: Any) -> None:
        seen.append(progress)
        if progress.epoch == 5:
            rule.lr = 1e38

    with pytest.raises(
        DivergedError, match=r"diverged (in|after) epoch [5-9].*; the network is as it was after"
    ) as told:
        model.fit(*data, 9, 8, rule, shuffle=False, callback=callback, callback_every=every)
    assert f"after {model.steps} steps" in str(told.value)
    assert all(math.isfinite(v) for p in seen for v in vars(p).values() if isinstance(v, float))
    assert all(np.isfinite(w).all() for w in weights_of(model))
    assert {state.steps for state in rule._states.values()} == {model.steps} - {0}
    other, _ = made(network)
    rule.lr = 0.01
    if model.steps <= 33:  # of the right rate
        train_steps(model.steps, other, data, same_rule)
        for _ in range(2):
            assert same(weights_of(model), weights_of(other))
            model.fit(*data, 2, 8, rule)
            other.fit(*data, 2, 8, same_rule)
            assert same(left_by(model, rule), left_by(other, same_rule))


def test_the_last_step_may_diverge(training: Any, dtype: Any) -> None:
    """Its own loss was finite."""
    model, rule = MLP([6, 3], output="identity", dtype=dtype), SGD(1e38 if dtype == np.float32 else 1e308)
    start = left_by(model)
    x = np.full((8, 6), 100, dtype)
    with pytest.raises(DivergedError, match="after epoch 1: parameters are no longer finite"):
        model.fit(x, x[:, :3].copy(), 1, 8, rule)
    assert same(left_by(model), start)
    with pytest.raises(DivergedError, match=r"after epoch 1, batch 1 of 2: .* A smaller learning rate may help"):
        model.fit(np.tile(x, (2, 1)), np.tile(x[:, :3], (2, 1)), 1, 8, rule, callback=stop_after(1))
    assert same(left_by(model), start)


def test_parameters_that_are_not_finite_from_the_beginning(training: Any) -> None:
    model, data = made("mlp")
    model.parameters[0][0, 0] = math.inf
    with pytest.raises(ValueError, match="the network has parameters that are not finite"):
        model.fit(*data)


# Settings.


def test_a_moving_average_is_there_from_the_beginning_or_never(network: str, training: Any) -> None:
    """Its decay may be changed."""
    for decay, wrong in ((0.0, 0.5), (0.5, 0.0)):
        model = MLP([6, 3], ema_decay=decay) if network == "mlp" else GAN(2, [6], [1], ema_decay=decay)
        with pytest.raises(ValueError, match=f"ema_decay cannot become {wrong:g}: a network has averages"):
            model.ema_decay = wrong
        with pytest.raises(ValueError, match=r"ema_decay must be within \[0, 1\]"):
            model.ema_decay = 2.0
        assert model.ema_decay == decay
    changed, whole = copy.deepcopy(model), copy.deepcopy(model)
    changed.ema_decay = 0.25
    data = made(network)[1]
    changed.fit(*data, 2, 8)
    whole.fit(*data, 2, 8)
    assert not same(weights_of(changed), weights_of(whole))


def test_a_handler_that_raises_while_handlers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C works afterwards: what has been replaced by then is put back."""

    def raise_now(number: int, frame: Any) -> None:
        raise TimeUp

    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, raise_now)
    replace = _signals.set_handler

    def slowly(number: int, handler: Any) -> Any:
        found = replace(number, handler)
        if number == signal.SIGINT and handler != before[0]:
            signal.raise_signal(signal.SIGALRM)
        return found

    monkeypatch.setattr(_signals, "set_handler", slowly)
    try:
        with pytest.raises(TimeUp), _signals.deferred_signals():
            raise AssertionError("the block is not entered")
        assert signal.getsignal(signal.SIGINT) is before[0]
    finally:
        signal.signal(signal.SIGALRM, before[1])


@pytest.mark.parametrize("problem", ["samples", "batch"])
def test_a_refused_first_fit_decides_nothing(problem: str) -> None:
    x = np.ones((4, 3))
    model = MLP([3, 4, 2])
    bad = x.copy()
    if problem == "samples":
        bad[1, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite|batch_size"):
        model.fit(bad, list("abab"), epochs=1, batch_size=0 if problem == "batch" else 2)
    assert model.classes is None
    assert model.dtype == np.float32
    model.fit(x, list("cdcd"), epochs=1, batch_size=2)
    assert model.classes == ["c", "d"]
    assert model.dtype == np.float64


def test_the_checkpoint_is_checked_before_training(tmp_path: Path) -> None:
    model, x = MLP([3, 4, 2]), np.ones((4, 3))
    with pytest.raises(IsADirectoryError):
        model.fit(x, [0, 1, 0, 1], checkpoint=tmp_path)
    assert model.steps == 0


def test_numpy_numbers_as_settings_are_written(tmp_path: Path) -> None:
    model, x, optimizer = MLP([3, 4, 2], dtype=np.float32), np.ones((4, 3)), Adam()

    def callback(_: Any) -> None:
        optimizer.lr = np.float32(0.5)  # type: ignore[assignment]

    model.fit(x, [0, 1, 0, 1], epochs=2, optimizer=optimizer, callback=callback, checkpoint=tmp_path / "checkpoint")
    assert MLP.load_optimizers(tmp_path / "checkpoint")["optimizer"].lr == 0.5
