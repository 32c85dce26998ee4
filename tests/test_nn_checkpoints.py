"""Checkpoints: a training that was killed, stopped or saved goes on with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmlet.backends import select
from gemmlet.nn import (
    GAN,
    MLP,
    SGD,
    Adam,
    CheckpointError,
    ClipNorm,
    DivergedError,
    StopTraining,
    checkpoints,
    files,
    linear_decay,
)
from gemmlet.nn import fit as fit_module
from gemmlet.nn.optimizers import ParameterGroup

RULES: dict[str, Callable[[], Any]] = {
    "sgd": lambda: SGD(0.05),
    "momentum": lambda: SGD(0.02, 0.8, nesterov=True),
    "adam": lambda: Adam(3e-3),
    "clipped": lambda: ClipNorm(Adam(3e-3), 0.5),
}
N, SIZE, EPOCHS = 150, 16, 5
RNG = np.random.default_rng(0)
X, Y = RNG.uniform(size=(N, 6)).astype(np.float32), RNG.integers(0, 3, N)


class Killed(Exception):  # noqa: N818 - it stands for a signal
    """What ends a training somewhere."""


def fit_of(network: str, rule: str = "adam", **settings: Any) -> tuple[Any, Any, Callable[..., Any]]:
    """A network, its optimizer, and a `fit` of it."""
    optimizer = RULES[rule]()
    model: Any = MLP([6, 5, 3], ema_decay=0.9) if network == "mlp" else GAN(2, [4, 6], [5, 1])
    if network == "conditional gan":
        model, settings = GAN(2, [4, 6], [5, 1], n_classes=3), {"y": Y} | settings
    settings = {"epochs": EPOCHS, "batch_size": SIZE, "optimizer": optimizer, "lr_schedule": linear_decay} | settings
    if network == "mlp":
        return model, optimizer, lambda **more: model.fit(X, Y, **{"validation_data": (X, Y), **settings, **more})
    if rule == "momentum":
        settings["discriminator_optimizer"] = Adam(1e-3)
    return model, optimizer, lambda **more: model.fit(X, **{**settings, **more})


def left_by(model: Any, optimizer: Any) -> list[Any]:
    states = optimizer._states.values()
    arrays = [array for dense in model._parts().values() for array in dense.parameters]
    streams = [json.dumps(rng.bit_generator.state) for rng in model._streams().values()]
    return [*(a.copy() for a in arrays), *(a.copy() for s in states for a in s.arrays), np.array(streams),
            np.array([model.steps, *(state.steps for state in states)])]  # fmt: skip


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def killed_after(calls: int) -> Callable[[Any], None]:
    """A callback that raises at its last call."""

    def callback(progress: Any) -> None:
        callback.calls -= 1  # type: ignore[attr-defined]
        if not callback.calls:  # type: ignore[attr-defined]
            raise Killed

    callback.calls = calls  # type: ignore[attr-defined]
    return callback


def lists_of(history: Any) -> dict[str, list[float]]:
    return {name: values for name, values in vars(history).items() if isinstance(values, list)}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_training_goes_on_with_the_same_bits(
    rule: str, shuffle: bool, network: str, training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended again and again in the midst of an epoch and between two, by what is started again each time."""
    model, optimizer, fit = fit_of(network, rule, shuffle=shuffle)
    history = fit()
    expected, path = left_by(model, optimizer), tmp_path / "checkpoint"
    for calls in (3, 10, 1, 7, 13, 100):
        monkeypatch.setattr(checkpoints, "_SECONDS", 0.0 if calls % 2 else 1e9)
        again, optimizer, fit = fit_of(network, rule, shuffle=shuffle)
        try:
            result = fit(checkpoint=path, resume=True, callback=killed_after(calls))
        except Killed:
            assert type(again).load(path).steps == again.steps
    assert same(left_by(again, optimizer), expected)
    assert lists_of(result) == lists_of(history)
    assert result.seconds > 0
    assert list(tmp_path.iterdir()) == [path]
    # What is done is done; more epochs are like a fit of its own, if the rate is the same.
    again, optimizer, fit = fit_of(network, rule, shuffle=shuffle)
    assert lists_of(fit(checkpoint=path, resume=True)) == lists_of(history)
    assert same(left_by(again, optimizer), expected)
    for each in (fit, fit_of(network, rule, shuffle=shuffle)[2]):
        assert len(next(iter(lists_of(each(resume=path, epochs=EPOCHS + 2)).values()))) == EPOCHS + 2


def test_stopping_is_like_that_too(network: str, training: Any, tmp_path: Path) -> None:
    """The history that `fit` returns has the part of an epoch; the checkpoint goes on with it."""
    stop_and_go_on(network, tmp_path)


def test_stopping_of_a_conditional_gan(training: Any, tmp_path: Path) -> None:
    stop_and_go_on("conditional gan", tmp_path)


def stop_and_go_on(network: str, tmp_path: Path) -> None:
    path, (model, optimizer, fit) = tmp_path / "checkpoint", fit_of(network)
    history = fit()

    def stop(progress: Any) -> None:
        if (progress.epoch, progress.batch) == (3, 4):
            raise StopTraining

    stopped = fit_of(network)[2](checkpoint=path, callback=stop)
    assert {len(values) for values in lists_of(stopped).values()} == {3}
    again, other, fit = fit_of(network)
    assert lists_of(fit(resume=path)) == lists_of(history)
    assert same(left_by(again, other), left_by(model, optimizer))


def test_settings_that_a_callback_changes(training: Any, tmp_path: Path) -> None:
    """The optimizer goes on with them; and the very object that a fit has left may be given as it is."""

    def lower(optimizer: Any, kill: tuple[int, int]) -> Callable[[Any], None]:
        def callback(progress: Any) -> None:
            if progress.epoch_done:
                optimizer.lr *= 0.5
            if (progress.epoch, progress.batch) == kill:
                raise Killed

        return callback

    model, optimizer, fit = fit_of("mlp", lr_schedule=None)
    fit(callback=lower(optimizer, (0, 0)))
    for new in (True, False):
        again, other, fit = fit_of("mlp", lr_schedule=None)
        with pytest.raises(Killed):
            fit(checkpoint=tmp_path / "kept", callback=lower(other, (3, 2)))
        assert MLP.load_optimizers(tmp_path / "kept")["optimizer"].lr == 3e-3 / 4
        if new:
            again, other, fit = fit_of("mlp", lr_schedule=None)
        fit(resume=tmp_path / "kept", callback=lower(other, (0, 0)))
        assert same(left_by(again, other), left_by(model, optimizer))


CHILD = """
import sys
import numpy as np
import test_nn_checkpoints as tests
from gemmlet.nn import checkpoints
from support import same_bits

checkpoints._SECONDS = checkpoints._WRITES = 0
model, optimizer, fit = tests.fit_of(sys.argv[1], epochs=2000)
print("ready", flush=True)
fit(checkpoint=sys.argv[2], resume=True, callback=lambda p: None)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no signals here")
def test_kill(network: str, tmp_path: Path) -> None:
    """At any moment, while a checkpoint is written too: what is there is whole, and goes on with the same bits."""
    path, chance = tmp_path / "checkpoint", random.Random(3)
    kind: Any = MLP if network == "mlp" else GAN
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    backend = select.current()  # of which the bits are
    chosen = {"GEMMLET_BACKEND": backend.name, "GEMMLET_ISA": getattr(backend, "isa", "")}
    environment = os.environ | chosen | {"PYTHONPATH": os.pathsep.join(paths)}
    for _ in range(4):
        before = kind.load(path).steps if path.exists() else 0
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, network, path], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        while not path.exists() or kind.load(path).steps <= before + 10:  # however slow the disk is
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(chance.uniform(0.05, 0.2))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
    steps = kind.load(path).steps
    model, optimizer, fit = fit_of(network, epochs=2000)
    with pytest.raises(Killed):
        fit(resume=path, callback=killed_after(5))
    other, same_optimizer, fit = fit_of(network, epochs=2000)
    with pytest.raises(Killed):
        fit(callback=killed_after(steps + 5))
    assert same(left_by(model, optimizer), left_by(other, same_optimizer))


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one is written all the same, however often it comes."""
    path, write, came = tmp_path / "checkpoint", files.write, []
    model, _, fit = fit_of("mlp")

    def interrupted(*arguments: Any) -> None:
        for _ in range(5):
            came.append(model.steps)
            signal.raise_signal(signal.SIGINT)
        write(*arguments)

    monkeypatch.setattr(files, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint=path, callback=lambda p: None)
    assert len(came) == 6  # the first one of the first epoch's end; five of the last
    assert MLP.load(path).steps == model.steps == came[0]
    whole, other, fit = fit_of("mlp")
    fit()
    monkeypatch.setattr(files, "write", write)
    again, rule, fit = fit_of("mlp")
    fit(resume=path)
    assert same(left_by(again, rule), left_by(whole, other))


def test_ctrl_c_while_a_fit_is_resumed(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is as in the checkpoint, then it comes."""
    path, keep = tmp_path / "checkpoint", ParameterGroup.keep
    written, optimizer, fit = fit_of(network)
    with pytest.raises(Killed):
        fit(checkpoint=path, callback=killed_after(30))

    def interrupted(group: ParameterGroup) -> None:
        signal.raise_signal(signal.SIGINT)
        keep(group)

    monkeypatch.setattr(ParameterGroup, "keep", interrupted)
    model, other, fit = fit_of(network)
    with pytest.raises(KeyboardInterrupt):
        fit(resume=path)
    assert same(left_by(model, other), left_by(written, optimizer))


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one stays, with a warning, and the last one is tried. Another error stays that one."""
    path, write, fails = tmp_path / "checkpoint", files.write, []

    def full(*arguments: Any) -> None:
        if fails:
            raise OSError(28, "No space left on device", os.fspath(path))
        write(*arguments)

    monkeypatch.setattr(files, "write", full)
    monkeypatch.setattr(checkpoints, "_WRITES", 0)
    for error in (CheckpointError, Killed, None):
        model, optimizer, fit = fit_of("mlp")
        fails.clear()

        def callback(progress: Any, error: Any = error) -> None:
            if progress.epoch == 3:
                fails.append(progress)
                if error is Killed and progress.batch == 2:
                    raise Killed
            if progress.epoch == 5 and error is None:
                fails.clear()

        warned = (
            contextlib.nullcontext() if error is Killed else pytest.warns(RuntimeWarning, match=f"left .*: '{path}'")
        )
        with warned:
            if error is None:
                fit(checkpoint=path, callback=callback)
                assert MLP.load(path).steps == model.steps == 50
                continue
            with pytest.raises(error) as told:
                fit(checkpoint=path, callback=callback)
        assert "No space left on device" in "".join([str(told.value), *getattr(told.value, "__notes__", ())])
        assert MLP.load(path).steps == 20
        assert {state.steps for state in optimizer._states.values()} == {model.steps}
        if error is CheckpointError:
            copied = pickle.loads(pickle.dumps(told.value))
            for each in (told.value, copied):
                assert (each.filename, len(each.history.loss), model.steps) == (str(path), EPOCHS, 50)
                assert each.history.seconds > 0
    with pytest.raises(FileNotFoundError, match=r"checkpoint is to be in .*nowhere, which is no folder"):
        fit_of("mlp")[2](checkpoint=tmp_path / "nowhere" / "checkpoint")


def test_when_checkpoints_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each epoch's end and some seconds after the last one, but not more often than is cheap; and at the end."""
    write, written, slow = files.write, [], [0.0]

    def watched(*arguments: Any) -> None:
        position = arguments[-1]["fit"]["position"]
        written.append((position["epoch"], position["seen"]))
        time.sleep(slow[0])
        write(*arguments)

    monkeypatch.setattr(files, "write", watched)
    monkeypatch.setattr(checkpoints, "_WRITES", 0)
    run = lambda: fit_of("mlp")[2](checkpoint=tmp_path / "kept", callback=lambda p: None)  # noqa: E731
    run()
    assert written == [(epoch, 0) for epoch in range(2, EPOCHS + 2)]
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.0)
    written.clear()
    run()
    assert len(written) == EPOCHS * -(-N // SIZE)
    monkeypatch.setattr(checkpoints, "_WRITES", 50)
    written.clear()
    slow[0] = 0.1
    run()
    assert len(written) == 2
    assert written[-1] == (EPOCHS + 1, 0)


def test_divergence_leaves_the_good_state(
    network: str, training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_WRITES", 0)  # which it goes back to, however long copies and checkpoints take
    path, (model, optimizer, fit) = tmp_path / "checkpoint", fit_of(network, lr_schedule=None)

    def callback(progress: Any) -> None:
        if progress.epoch == 4:
            optimizer.lr = 1e38

    with pytest.raises(DivergedError) as told:
        fit(checkpoint=path, callback=callback)
    error = pickle.loads(pickle.dumps(told.value))
    assert (str(error), error.history) == (str(told.value), told.value.history)
    assert {len(values) for values in lists_of(error.history).values()} <= {3, 4}
    assert error.history.seconds > 0
    loaded = type(model).load(path)
    assert loaded.steps == model.steps
    assert all(np.isfinite(a).all() for dense in loaded._parts().values() for a in dense.parameters)


def test_nothing_older_replaces_a_checkpoint(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training that diverges goes back to is no older; one that is refused takes back what it has learnt."""
    monkeypatch.setattr(fit_module, "_COPY_EVERY", 1e9)
    monkeypatch.setattr(checkpoints, "_WRITES", 0)
    path, (model, optimizer, fit) = tmp_path / "checkpoint", fit_of(network, lr_schedule=None)

    def callback(progress: Any) -> None:
        if (progress.epoch, progress.batch) == (4, 2):
            optimizer.lr = 1e38

    with pytest.raises(DivergedError):
        fit(checkpoint=path, callback=callback)
    assert type(model).load(path).steps == model.steps == 30
    if network == "gan":  # whose samples are looked through before
        return
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.0)
    x = X.copy()
    x[-1, 0] = np.nan
    model = MLP([6, 5, 3])
    with pytest.raises(ValueError, match=f"x must be finite, got nan in row {N - 1}"):
        model.fit(x, Y, 3, SIZE, shuffle=False, callback=lambda p: None, checkpoint=path)
    assert (model.steps, MLP.load(path).steps) == (0, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [6, 4, 3]}, r"layers was \[6, 5, 3\], is \[6, 4, 3\]"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"dtype": np.float64}, "dtype was 'float32', is 'float64'"),
        ({"ema_decay": 0.0}, r"ema_decay was 0\.9, is 0\.0"),
        ({"n": N - 1}, f"samples was {N}, is {N - 1}"),
        ({"batch_size": 8}, "batch_size was 16, is 8"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"validation_data": None}, "validation_data was True, is False"),
        ({"optimizer": Adam(1e-3)}, r"optimizer\.lr was 0\.003, is 0\.001"),
        ({"optimizer": SGD(3e-3)}, "optimizer.name was 'adam', is 'sgd'"),
        ({"optimizer": ClipNorm(Adam(3e-3), 1.0)}, r"optimizer\.max_norm was None, is 1\.0"),
        ({"epochs": 2}, "epochs must be at least 3, which the fit of .*checkpoint has begun, got 2"),
        ({"resume": "elsewhere"}, "No such file or directory: 'elsewhere'"),
        ({"resume": 3}, "resume must be True, False or a path, got int"),
        ({"resume": True}, "resume=True needs checkpoint, or give resume the path"),
        ({"checkpoint": 3}, "checkpoint must be a path, got int"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And changes nothing."""
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        fit_of("mlp")[2](checkpoint=path, callback=killed_after(24))
    kind: dict[str, Any] = {"layers": [6, 5, 3], "ema_decay": 0.9}
    arguments = {"epochs": EPOCHS, "batch_size": SIZE, "optimizer": Adam(3e-3), "lr_schedule": linear_decay}
    arguments |= {"validation_data": (X, Y), "resume": path}
    for name, value in changes.items():
        (kind if name in ("layers", "seed", "dtype", "ema_decay") else arguments)[name] = value
    n, model = arguments.pop("n", N), MLP(**kind)
    x = X.astype(model.dtype)
    if arguments["validation_data"] is not None:
        arguments["validation_data"] = x, Y
    before = left_by(model, Adam())
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        model.fit(x[:n], Y[:n], **arguments)
    assert same(left_by(model, Adam()), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X + 1}, "checksum of x was [0-9]+, is [0-9]+"),
        ({"y": (Y + 1) % 3}, "checksum of y was [0-9]+, is [0-9]+"),
        ({"validation_data": (X[1:], Y[1:])}, r"checksum of validation_data\[0\] was"),
        ({"validation_data": (X, (Y + 1) % 3)}, r"checksum of validation_data\[1\] was"),
        ({"lr_schedule": None}, "lr_schedule was True, is False"),
    ],
)
def test_other_data_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, sparse = tmp_path / "checkpoint", pytest.importorskip("scipy.sparse")
    with pytest.raises(Killed):
        fit_of("mlp")[2](checkpoint=path, callback=killed_after(24))
    arguments = {"x": X, "y": Y, "epochs": EPOCHS, "batch_size": SIZE, "optimizer": Adam(3e-3), "resume": path}
    arguments |= {"validation_data": (X, Y), "lr_schedule": linear_decay}
    model = MLP([6, 5, 3], ema_decay=0.9)
    with pytest.raises(ValueError, match=message):
        model.fit(**arguments | changes)
    assert model.steps == 0
    # The same data in another form are the same.
    model.fit(**arguments | {"x": sparse.csr_matrix(X), "y": np.eye(3)[Y]})
    with pytest.raises(Killed):
        fit_of("gan")[2](checkpoint=path, callback=killed_after(24))
    with pytest.raises(ValueError, match="checksum of x was"):
        GAN(2, [4, 6], [5, 1]).fit(X / 2, EPOCHS, SIZE, Adam(3e-3), lr_schedule=linear_decay, resume=path)
    with pytest.raises(Killed):
        fit_of("conditional gan")[2](checkpoint=path, callback=killed_after(24))
    with pytest.raises(ValueError, match="checksum of y was"):
        fit_of("conditional gan")[2](resume=path, y=(Y + 1) % 3)


def test_resume_with_a_read_only_parameter(network: str, tmp_path: Path) -> None:
    """It is refused before anything is changed."""
    fit_of(network)[2](checkpoint=tmp_path / "checkpoint")
    model, optimizer, fit = fit_of(network)
    before = left_by(model, optimizer)
    next(iter(model._parameters.values()))[-1].flags.writeable = False
    with pytest.raises(ValueError, match="is read-only"):
        fit(resume=tmp_path / "checkpoint")
    assert same(left_by(model, optimizer), before)


@pytest.mark.parametrize("tensor", ["0.bias", "average.1.weight", "optimizer.1.weight.1"])
def test_resume_from_numbers_that_are_not_finite(tensor: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fit_of("mlp")[2](checkpoint=path)
    config, tensors, extra = files.read(path, "MLP")
    tensors[tensor] = np.full_like(tensors[tensor], np.nan)
    files.write(path, "MLP", config, tensors, extra)
    model, optimizer, fit = fit_of("mlp")
    before = left_by(model, optimizer)
    with pytest.raises(ValueError, match=f"checkpoint is corrupt.*tensor '{tensor}' is not finite"):
        fit(resume=path)
    assert same(left_by(model, optimizer), before)


def test_ctrl_c_while_a_checkpoint_is_read(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is what the checkpoint has, as a whole."""
    path, (model, optimizer, fit) = tmp_path / "checkpoint", fit_of(network)
    fit(checkpoint=path)
    again, other, fit = fit_of(network)
    keep = ParameterGroup.keep

    def interrupted(group: ParameterGroup) -> None:
        signal.raise_signal(signal.SIGINT)
        keep(group)

    monkeypatch.setattr(ParameterGroup, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(resume=path)
    assert same(left_by(again, other), left_by(model, optimizer))


def test_a_network_alone_is_no_checkpoint(network: str, tmp_path: Path) -> None:
    model, optimizer, fit = fit_of(network)
    model.save(tmp_path / "model", optimizer)
    with pytest.raises(ValueError, match="model is no checkpoint of a fit: it has a network alone"):
        fit(resume=tmp_path / "model")
    _, _, fit = fit_of("gan" if network == "mlp" else "mlp")
    with pytest.raises(ValueError, match="holds a"):
        fit(resume=tmp_path / "model")


# Files of a network with its optimizers.


@pytest.mark.parametrize("rule", RULES)
def test_saved_with_its_optimizer_a_network_goes_on(rule: str, network: str, training: Any, tmp_path: Path) -> None:
    """Two epochs, a file, and two more are four epochs."""
    for how in ("file", "checkpoint"):
        model, optimizer, fit = fit_of(network, rule, lr_schedule=None, epochs=4)
        saved, other, fit_some = fit_of(network, rule, lr_schedule=None, epochs=2)
        fit()
        path = tmp_path / how
        if how == "file":
            fit_some()
            if network == "gan" and rule == "momentum":
                pytest.skip("of two optimizers below")
            saved.save(path, other)
        else:
            fit_some(checkpoint=path)
        loaded = type(model).load(path)
        data = (X, Y) if network == "mlp" else (X,)
        rules = type(model).load_optimizers(path)
        assert rules["optimizer"] == optimizer
        loaded.fit(*data, 2, SIZE, **rules)
        assert same(left_by(loaded, rules["optimizer"]), left_by(model, optimizer))


def test_two_optimizers_of_a_gan(tmp_path: Path) -> None:
    models = [GAN(2, [4, 6], [5, 1]) for _ in range(2)]
    rules = [{"optimizer": SGD(0.1, 0.9), "discriminator_optimizer": Adam(1e-3)} for _ in range(2)]
    models[0].fit(X, 4, SIZE, **rules[0])
    models[1].fit(X, 2, SIZE, **rules[1])
    models[1].save(tmp_path / "gan", **rules[1])
    loaded, again = GAN.load(tmp_path / "gan"), GAN.load_optimizers(tmp_path / "gan")
    assert again == rules[1]
    loaded.fit(X, 2, SIZE, **again)
    for name, rule in again.items():
        assert same(left_by(loaded, rule), left_by(models[0], rules[0][name]))
    # A copy that nobody has used yet is saved as well.
    GAN.load(tmp_path / "gan").save(tmp_path / "copy", **GAN.load_optimizers(tmp_path / "gan"))
    with pytest.raises(ValueError, match="discriminator_optimizer needs the other one"):
        models[0].save(tmp_path / "gan", discriminator_optimizer=Adam())
    models[0].save(tmp_path / "gan")
    with pytest.raises(ValueError, match="gan has no optimizer: it was saved without one"):
        GAN.load_optimizers(tmp_path / "gan")


def test_a_history_that_is_not_finite(tmp_path: Path) -> None:
    """Identity outputs have no accuracy."""
    histories = []
    for epochs in (2, 4, 4):
        model, resume = MLP([6, 3], output="identity"), tmp_path / "kept" if len(histories) == 1 else False
        histories.append(model.fit(X, X[:, :3].copy(), epochs, checkpoint=tmp_path / "kept", resume=resume))
    assert np.isnan(histories[1].accuracy).tolist() == [True] * 4
    assert histories[1].loss == histories[2].loss


def test_a_copy_is_saved_as_it_waits(tmp_path: Path) -> None:
    model, optimizer, fit = fit_of("mlp", lr_schedule=None)
    fit()
    model.save(tmp_path / "one", optimizer)
    other, rules = MLP.load(tmp_path / "one"), MLP.load_optimizers(tmp_path / "one")
    other.save(tmp_path / "two", **rules)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def spoilt(value: Any, chance: random.Random) -> Any:
    """JSON of another kind, or with something missing."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        name = chance.choice(list(value))
        rest = {k: v for k, v in value.items() if k != name}
        return rest if chance.random() < 0.2 else rest | {name: spoilt(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.5:
        return [spoilt(value[0], chance), *value[1:]]
    return chance.choice([None, "x", -1, 10**50, 1.5, "nan", [], {}, [1], {"x": 1}, True])


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    """Whatever is wrong in what a checkpoint has besides the network: a ValueError, and nothing is changed."""
    path, chance, told = tmp_path / "checkpoint", random.Random(5), list[str]()
    with pytest.raises(Killed):
        fit_of("mlp")[2](checkpoint=path, callback=killed_after(24))
    config, tensors, extra = files.read(path, "MLP")
    for _ in range(300):
        files.write(path, "MLP", config, tensors, spoilt(extra, chance) if chance.random() < 0.95 else {"fit": extra})
        model, _, fit = fit_of("mlp")
        before = left_by(model, Adam())
        for read in (lambda fit=fit: fit(resume=path), lambda: MLP.load(path), lambda: MLP.load_optimizers(path)):
            try:
                read()
            except ValueError as error:
                told.append(str(error))
                assert same(left_by(model, Adam()), before)
    assert len(told) > 300
    assert all(str(path) in error for error in told)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config steps", 10**30),
        ("optimizers optimizer steps 0.weight", 10**30),
        ("fit position correct", N),
        ("fit position sums", ["inf"]),
        ("fit history loss", [1.0]),
        ("fit history loss", [1.0, "inf"]),
        ("fit history accuracy", []),
        ("fit history validation_loss", [1.0, 1.0, 1.0]),
        ("fit history accuracy", [1.0, "inf"]),
        ("fit seconds", -1.0),
        ("optimizers optimizer settings", {"name": "adam", "lr": 3e-3, "max_norm": 1.0}),
        ("optimizers optimizer settings", {"name": "adamw", "lr": 3e-3}),
    ],
)
def test_what_no_fit_has_written(place: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        fit_of("mlp")[2](checkpoint=path, callback=killed_after(24))
    config, tensors, extra = files.read(path, "MLP")
    content: Any = {"config": config, **extra}
    *names, last = place.split()
    for name in names:
        content = content[name]
    content[last] = value
    files.write(path, "MLP", config, tensors, extra)
    model, optimizer, fit = fit_of("mlp")
    before = left_by(model, optimizer)
    with pytest.raises(ValueError, match=f"{path} is corrupt"):
        fit(resume=path)
    assert same(left_by(model, optimizer), before)


def test_resume_from_one_file_into_another(tmp_path: Path) -> None:
    """Nothing is left to do, and the checkpoint that was asked for is there."""
    _, _, fit = fit_of("mlp")
    fit(checkpoint=tmp_path / "one")
    model, _, fit = fit_of("mlp")
    fit(checkpoint=tmp_path / "other", resume=tmp_path / "one")
    assert MLP.load(tmp_path / "other").steps == model.steps > 0


def test_a_refused_step_draws_no_noise(tmp_path: Path) -> None:
    whole, rule, fit = fit_of("gan")
    fit()
    model, _, fit = fit_of("gan")

    def freeze(progress: Any) -> None:
        if progress.batch == 3:
            model.generator_parameters[0].flags.writeable = False

    with pytest.raises(ValueError, match=r"generator_parameters\[0\] is read-only"):
        fit(callback=freeze, checkpoint=tmp_path / "checkpoint")
    again, same_rule, fit = fit_of("gan")
    fit(resume=tmp_path / "checkpoint")
    assert same(left_by(again, same_rule), left_by(whole, rule))


@pytest.mark.parametrize("attribute", ["shape", "dtype"])
def test_a_callback_that_changes_the_layout_of_a_parameter(network: str, attribute: str, tmp_path: Path) -> None:
    """It ends training, the parameter is as it was, and what was learnt is in the checkpoint."""
    for moment in (3, EPOCHS * -(-N // SIZE)):
        path, (model, _, fit) = tmp_path / "checkpoint", fit_of(network)
        parameters = next(iter(model._parameters.values()))

        def callback(progress: Any, param: Any = parameters[2], moment: int = moment) -> None:
            if (progress.epoch - 1) * progress.batches + progress.batch == moment:
                setattr(param, attribute, np.int32 if attribute == "dtype" else param.shape[::-1])

        layouts = [(array.shape, array.dtype) for array in parameters]
        with pytest.raises(ValueError, match=r"a parameter was made .* while fit ran; expected .*, which it is again"):
            fit(checkpoint=path, callback=callback)
        assert [(array.shape, array.dtype) for array in parameters] == layouts
        assert type(model).load(path).steps == model.steps == moment


def test_what_load_would_refuse_is_not_written(tmp_path: Path) -> None:
    model, path = MLP([6, 5, 3], dtype=np.float32), tmp_path / "model"
    model.save(path)
    model.parameters[0].shape = 5, 6
    with pytest.raises(
        ValueError, match=r"tensor '0\.weight' is float32 of shape \(5, 6\), expected float32 of \(6, 5\)"
    ):
        model.save(path)
    model.parameters[0].shape = 6, 5
    model.layers[1] = 4
    with pytest.raises(
        ValueError, match=r"tensor '0\.weight' is float32 of shape \(6, 5\), expected float32 of \(6, 4\)"
    ):
        model.save(path)
    MLP.load(path)


MODELS: dict[str, Callable[[], Any]] = {
    "softmax": lambda: MLP([6, 5, 3]),
    "identity": lambda: MLP([6, 5, 3], output="identity"),
    "gan": lambda: GAN(2, [4, 6], [5, 1]),
}


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("softmax", "layers", [6, 3], "layers cannot be changed: a network has it from its beginning"),
        ("softmax", "activation", "relu", "activation cannot be changed"),
        ("softmax", "output", "sigmoid", "output cannot be changed"),
        ("softmax", "activation_parameter", 0.1, "activation_parameter cannot be changed"),
        ("softmax", "seed", 3, "seed cannot be changed"),
        ("gan", "latent_dim", 3, "latent_dim cannot be changed"),
        ("gan", "generator_output", "sigmoid", "generator_output cannot be changed"),
        ("softmax", "loss", "huber", "loss 'huber' is unknown"),
        ("gan", "loss", "huber", "loss 'huber' is unknown"),
        ("softmax", "label_smoothing", 2.0, r"label_smoothing must be within \[0, 1\], got 2"),
        ("identity", "label_smoothing", 0.5, 'label_smoothing needs output "softmax"'),
        ("gan", "label_smoothing", np.nan, r"label_smoothing must be within \[0, 1\], got nan"),
        ("softmax", "multi_label", True, 'multi_label needs output "sigmoid"'),
        ("softmax", "multi_label", 1, "multi_label must be True or False, got int"),
        ("softmax", "classes", ["a", "b"], "classes must be 3 different labels"),
        ("gan", "default_batch_size", 0, "default_batch_size must be at least 1, got 0"),
        ("softmax", "default_optimizer", "huber", "optimizer 'huber' is unknown"),
        ("softmax", "steps", 1.5, "steps must be an integer, got float"),
    ],
)
def test_attributes_are_checked_where_they_are_set(kind: str, name: str, value: Any, message: str) -> None:
    model = MODELS[kind]()
    before = getattr(model, name)
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        setattr(model, name, value)
    assert getattr(model, name) is before


def test_numbers_of_other_kinds_are_written(tmp_path: Path) -> None:
    model, path = MLP([6, 5, 3], dtype=np.float32), tmp_path / "checkpoint"
    model.default_batch_size, model.steps = np.int64(16), np.int64(0)
    model.label_smoothing, model.ema_decay, model.classes = Fraction(1, 4), np.float32(0), np.arange(3)
    model.multi_label, model.default_optimizer = np.bool_(False), "sgd"
    model.default_optimizer.lr = Fraction(1, 8)
    model.fit(X, Y, 2, checkpoint=path)
    loaded = MLP.load(path)
    assert loaded._config() == model._config()
    assert (loaded.default_batch_size, loaded.default_optimizer) == (16, SGD(0.125))
