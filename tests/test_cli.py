import contextlib
import errno
import functools
import gzip
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cuda_on_host.backend
import gemmlet
from gemmlet import _environment, _threads, cli, nn
from gemmlet._files import replacing
from gemmlet.backends import select
from gemmlet.backends.cpu import available_isas
from gemmlet.cli import evaluation, files, training
from gemmlet.cli.commands import COMMANDS
from gemmlet.cli.train_mlp import hold_out
from gemmlet.data import load_mnist, mnist
from gemmlet.integrations.numpy import replaced
from gemmlet.metrics import frechet_distance, wilson_interval
from gemmlet.nn import files as network_files
from gemmlet.nn import fit

for package in ("typer", "rich", "matplotlib", "sklearn"):
    pytest.importorskip(package)

import scipy.ndimage  # noqa: E402
import sklearn.metrics  # noqa: E402
import threadpoolctl  # noqa: E402
from PIL import Image  # noqa: E402

from cli_support import (  # noqa: E402
    COMMAND,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    call,
    check_picture,
    error_line,
    idx,
    metrics_of,
    names_in,
    process_restored,
    start,
    undone,  # noqa: F401 - it is a fixture
    write_digits,
)
from gemmlet.cli import common, plots, train_mlp  # noqa: E402
from gemmlet.cli.signals import STOPS  # noqa: E402
from support import PATIENCE, frechet_by_eigenvalues  # noqa: E402

MLP_PICTURES = {
    "learning_curves.png": (1200, 480),
    "confusion_matrix.png": (840, 792),
    "roc_curves.png": (1140, 624),
    "worst_mistakes.png": (1050, None),  # as high as there are mistakes
}
GAN_PICTURES = {"loss_curves.png": (840, 504), "class_shares.png": (840, 456), "samples.png": (604, 632)}
RUN_FILES = {"model.safetensors", "metrics.json", "checkpoint.safetensors"}
EVERYWHERE = {"seconds", "backend", "isa", "threads", "interrupted", "epochs_done", "epochs", "seed", "data", "history"}


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take most of the time, for tests of something else."""
    for name in ("learning_curves", "confusion_matrix", "roc_curves", "worst_mistakes", "gan_losses", "class_shares"):
        monkeypatch.setattr(plots, name, lambda *_: None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "folder")


@pytest.fixture
def few(tmp_path):
    """Digits to spoil, and too few to hold some out."""
    return write_digits(tmp_path / "few", 9, 5)


def without(metrics, *names):
    return {name: value for name, value in metrics.items() if name not in names}


def once(tmp_path_factory, *words):
    """Run the command for the tests of a module; returns its results, and what it printed."""
    out = tmp_path_factory.mktemp("results") / "new" / "folder"
    with process_restored(), contextlib.redirect_stdout(io.StringIO()) as printed:
        assert call("train", *words, "--out", out) == 0
    return out, printed.getvalue()


# The MLP.


@pytest.fixture(scope="module")
def mlp(digits, tmp_path_factory):
    return once(tmp_path_factory, "mlp", "--data-dir", digits, "--epochs", 3, "--seed", 5)


def test_mlp_files(mlp):
    out, _ = mlp
    assert names_in(out) == RUN_FILES | MLP_PICTURES.keys()
    for name, size in MLP_PICTURES.items():
        check_picture(out / name, size)


def test_mlp_metrics(mlp, digits):
    metrics = metrics_of(mlp[0])
    assert metrics.keys() >= EVERYWHERE | {"test_accuracy", "macro_precision", "macro_recall", "macro_f1", "roc_auc"}
    for name in ("test_accuracy", "macro_precision", "macro_recall", "macro_f1", "roc_auc"):
        assert 0.2 < metrics[name] < 1  # better than chance; not perfect, or the averages would all be the same
    assert metrics["backend"] == select.current().describe()["backend"]
    assert metrics["isa"] == select.current().describe()["isa"]
    assert metrics["threads"] == gemmlet.get_num_threads()
    assert 0 < metrics["seconds"] < 60
    assert metrics["interrupted"] is False
    assert metrics["epochs_done"] == metrics["epochs"] == 3
    assert metrics["hidden"] == [256]
    assert metrics["layers"] == [784, 256, 10]
    assert (metrics["optimizer"], metrics["lr"], metrics["batch_size"]) == ("adam", 0.003, 64)
    assert (metrics["seed"], metrics["classic"], metrics["lr_decay"]) == (5, False, True)
    assert (metrics["data"], metrics["training_images"], metrics["test_images"]) == (str(digits), 200, 80)
    assert {name: len(values) for name, values in metrics["history"].items()} == {
        "loss": 3,
        "accuracy": 3,
        "validation_loss": 3,
        "validation_accuracy": 3,
    }
    assert metrics["history"]["loss"][2] < metrics["history"]["loss"][0]


def test_mlp_metrics_are_those_of_the_saved_model(mlp, digits):
    out, _ = mlp
    metrics, data, model = metrics_of(out), load_mnist(digits), nn.MLP.load(out / "model.safetensors")
    assert model.evaluate(data.x_test, data.y_test)["accuracy"] == metrics["test_accuracy"]
    predicted, probabilities = model.predict(data.x_test), model.predict_proba(data.x_test)
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        data.y_test, predicted, average="macro", zero_division=0
    )
    area = sklearn.metrics.roc_auc_score(data.y_test, probabilities, multi_class="ovr", average="macro")
    assert metrics["test_accuracy"] == sklearn.metrics.accuracy_score(data.y_test, predicted)
    assert metrics["macro_precision"] == pytest.approx(precision, rel=1e-12)
    assert metrics["macro_recall"] == pytest.approx(recall, rel=1e-12)
    assert metrics["macro_f1"] == pytest.approx(f1, rel=1e-12)
    assert metrics["roc_auc"] == pytest.approx(area, rel=1e-12)


def test_mlp_held_out_images_are_not_learnt_from(mlp, digits):
    kept, held_out = train_mlp.hold_out(200, seed=5)
    assert len(held_out) == 20
    assert sorted([*kept, *held_out]) == list(range(200))
    data, model = load_mnist(digits), nn.MLP([784, 256, 10], "relu", seed=5)
    some = data.x_train[kept], data.y_train[kept]
    history = model.fit(*some, epochs=3, optimizer=nn.Adam(3e-3), lr_schedule=nn.linear_decay)
    scores = model.evaluate(data.x_train[held_out], data.y_train[held_out])
    shown = metrics_of(mlp[0])["history"]
    assert history.loss == shown["loss"]
    assert scores == {"loss": shown["validation_loss"][-1], "accuracy": shown["validation_accuracy"][-1]}


def test_mlp_prints(mlp, digits):
    out, printed = mlp
    metrics = metrics_of(out)
    assert f"Data: {digits} (200 training and 80 test images)" in printed
    epochs = re.findall(r"^epoch (\d)/3  loss (\S+)  accuracy (\S+)  held out (\S+)$", printed, re.MULTILINE)
    columns = [metrics["history"][name] for name in ("loss", "accuracy", "validation_accuracy")]
    assert epochs == [(str(i), *(f"{v:.4f}" for v in row)) for i, row in enumerate(zip(*columns, strict=True), 1)]
    for name, value in (
        ("accuracy", f"{metrics['test_accuracy']:.2%}"),
        ("precision (macro)", f"{metrics['macro_precision']:.2%}"),
        ("recall (macro)", f"{metrics['macro_recall']:.2%}"),
        ("F1 (macro)", f"{metrics['macro_f1']:.2%}"),
        ("ROC AUC (one against the rest)", f"{metrics['roc_auc']:.5f}"),
    ):
        assert re.search(rf"^\W {re.escape(name)} +\W +{value} \W$", printed, re.MULTILINE)
    assert printed.endswith(f"Model, metrics and pictures: {out}\n")


@pytest.mark.usefixtures("no_pictures")
def test_mlp_classic(digits, tmp_path):
    assert call("train", "mlp", "--classic", "--data-dir", digits, "--epochs", 1, "--out", tmp_path / "out") == 0
    model, metrics = nn.MLP.load(tmp_path / "out" / "model.safetensors"), metrics_of(tmp_path / "out")
    assert (model.layers, model.activation, model.output) == ([784, 128, 10], "tanh", "sigmoid")
    assert (metrics["optimizer"], metrics["lr"], metrics["batch_size"]) == ("sgd", 0.1, 16)
    assert (metrics["hidden"], metrics["classic"], metrics["lr_decay"]) == ([128], True, False)
    data, (kept, _) = load_mnist(digits), train_mlp.hold_out(200, seed=0)
    history = nn.MLP.classic(seed=0).fit(data.x_train[kept], data.y_train[kept], epochs=1)
    assert metrics["history"]["loss"] == history.loss


@pytest.mark.usefixtures("no_pictures")
def test_accuracy_where_all_sigmoids_are_one(digits, tmp_path, monkeypatch):
    """Rounded to float32 they may be, while the numbers that go into them still tell the classes apart."""
    with monkeypatch.context() as patch:
        patch.setattr(nn.MLP, "predict_proba", lambda _, x: np.ones((len(x), 10), np.float32))
        words = "train", "mlp", "--classic", "--data-dir", digits, "--lr", 0.01, "--out", tmp_path / "out"
        assert call(*words) == 0
    data, model = load_mnist(digits), nn.MLP.load(tmp_path / "out" / "model.safetensors")
    metrics = metrics_of(tmp_path / "out")
    assert metrics["test_accuracy"] == model.evaluate(data.x_test, data.y_test)["accuracy"] > 0.2
    assert metrics["roc_auc"] == 0.5


def test_one_image(tmp_path, capsys):
    """No images to hold out, no curve of any class, and none to average."""
    folder = write_digits(tmp_path / "one", 1, 1)
    assert call("train", "mlp", "--data-dir", folder, "--epochs", 1, "--out", tmp_path / "out") == 0
    metrics = metrics_of(tmp_path / "out")
    assert metrics["roc_auc"] is None
    assert metrics["history"]["validation_loss"] == []
    assert re.search(r"ROC AUC \(one against the rest\) \W +- ", capsys.readouterr().out)
    for name, size in MLP_PICTURES.items():
        if name != "worst_mistakes.png":  # there may be none
            check_picture(tmp_path / "out" / name, size)


# The GAN.


@pytest.fixture(scope="module")
def gan(digits, tmp_path_factory):
    return once(tmp_path_factory, "gan", "--data-dir", digits, "--epochs", 30, "--hidden", 16, "--seed", 3)


def test_gan_files(gan):
    out, _ = gan
    pictures = {f"samples/epoch_{epoch:04}.png" for epoch in range(0, 31, 2)}
    assert names_in(out) == RUN_FILES | {"samples.gif"} | GAN_PICTURES.keys() | pictures
    for name, size in GAN_PICTURES.items():
        check_picture(out / name, size)
    for name in pictures:
        check_picture(out / name, GAN_PICTURES["samples.png"])


def test_gan_pictures_show_one_noise(gan):
    out, _ = gan
    model = nn.GAN.load(out / "model.safetensors")
    drawn = np.rint(255 * (1 - model.sample(z=model.noise(100, seed=3)))).reshape(100, 28, 28)
    page = np.asarray(Image.open(out / "samples.png"))
    for i in (0, 1, 10, 99):
        # Below 28 pixels of title, each pixel doubled, with two of them between the digits.
        y, x = 28 + 2 * (2 + 30 * (i // 10)), 2 * (2 + 30 * (i % 10))
        assert (page[y : y + 56 : 2, x : x + 56 : 2] == drawn[i]).all()
        assert (page[y + 1 : y + 57 : 2, x + 1 : x + 57 : 2] == drawn[i]).all()
    assert (page == np.asarray(Image.open(out / "samples" / "epoch_0030.png"))).all()
    untrained = nn.GAN(
        generator=[16, 784], discriminator=[16, 1], n_classes=10, generator_output="sigmoid",
        generator_output_bias=-2, temperature=0.94, seed=3,
    )  # fmt: skip
    assert (model.n_classes, model.gradient_penalty, model.temperature) == (10, 0.1, 0.94)
    drawn = np.rint(255 * (1 - untrained.sample(z=model.noise(100, seed=3)))).reshape(100, 28, 28)
    assert (np.asarray(Image.open(out / "samples" / "epoch_0000.png"))[32:88:2, 4:60:2] == drawn[0]).all()


def test_gan_animation(gan):
    out, _ = gan
    with Image.open(out / "samples.gif") as animation:
        assert animation.n_frames == 16
        assert animation.info["loop"] == 0
        durations = []
        for i in range(16):
            animation.seek(i)
            durations.append(animation.info["duration"])
            frame = np.asarray(animation.convert("L"))
            assert (frame == np.asarray(Image.open(out / "samples" / f"epoch_{2 * i:04}.png"))).all()
    assert durations == [400] * 15 + [2500]


def test_gan_metrics(gan, digits):
    metrics = metrics_of(gan[0])
    assert metrics.keys() >= EVERYWHERE | {"confident_share", "class_shares", "frechet_distance", "asked_digit_share"}
    assert len(metrics["class_shares"]) == 10
    assert sum(metrics["class_shares"]) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in (*metrics["class_shares"], metrics["confident_share"]))
    assert metrics["frechet_distance"] > metrics["frechet_distance_of_genuine_digits"] > 0
    assert 0.2 < metrics["classifier_accuracy"] <= 1
    assert metrics["samples_judged"] == 1000
    assert metrics["interrupted"] is False
    assert metrics["epochs_done"] == metrics["epochs"] == 30
    assert (metrics["optimizer"], metrics["lr"], metrics["batch_size"]) == ("adam", 0.002, 64)
    assert metrics["lr_decay"] is True
    assert (metrics["data"], metrics["training_images"], metrics["test_images"]) == (str(digits), 200, 80)
    assert {name: len(v) for name, v in metrics["history"].items()} == {"generator_loss": 30, "discriminator_loss": 30}


def test_gan_metrics_are_those_of_the_saved_model(gan, digits):
    out, _ = gan
    metrics, data = metrics_of(out), load_mnist(digits)
    judge = nn.MLP([784, 128, 10], "relu", seed=3)
    judge.fit(data.x_train, data.y_train, epochs=10, batch_size=64, optimizer="adam")
    samples = nn.GAN.load(out / "model.safetensors").sample(1000)
    probabilities = judge.predict_proba(samples)
    assert metrics["classifier_accuracy"] == judge.evaluate(data.x_test, data.y_test)["accuracy"]
    assert metrics["confident_share"] == np.mean(probabilities.max(axis=1) >= 0.9)
    assert metrics["class_shares"] == [np.mean(probabilities.argmax(axis=1) == digit) for digit in range(10)]
    assert metrics["asked_digit_share"] == np.mean(probabilities.argmax(axis=1) == np.arange(1000) % 10)
    expected = frechet_by_eigenvalues(judge.features(samples), judge.features(data.x_test))
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-5)


def test_gan_prints(gan):
    out, printed = gan
    metrics = metrics_of(out)
    epochs = re.findall(r"^epoch (\d+)/30  generator loss (\S+)  discriminator loss (\S+)$", printed, re.MULTILINE)
    columns = [metrics["history"][name] for name in ("generator_loss", "discriminator_loss")]
    assert epochs == [(str(i), *(f"{v:.4f}" for v in row)) for i, row in enumerate(zip(*columns, strict=True), 1)]
    assert f"classifier ({metrics['classifier_accuracy']:.2%} right on the test images) makes of 1,000 sam" in printed
    rarest = int(np.argmin(metrics["class_shares"]))
    for name, value in (
        ("classified with a probability of at least 0.9", f"{metrics['confident_share']:.2%}"),
        ("recognised as the digit that was asked for", f"{metrics['asked_digit_share']:.2%}"),
        (f"share of the rarest digit ({rarest})", f"{min(metrics['class_shares']):.2%}"),
        ("Fréchet distance to the test images", f"{metrics['frechet_distance']:.2f}"),
    ):
        assert re.search(rf"^\W {re.escape(name)} +\W +{value} \W$", printed, re.MULTILINE)


@pytest.mark.usefixtures("no_pictures")
def test_gan_classic(digits, tmp_path):
    assert call("train", "gan", "--classic", "--data-dir", digits, "--epochs", 1, "--out", tmp_path / "out") == 0
    model = nn.GAN.load(tmp_path / "out" / "model.safetensors")
    assert (model.generator, model.discriminator) == ([256, 784], [256, 1])
    assert (model.generator_activation, model.discriminator_activation) == ("tanh", "tanh")
    assert (model.label_smoothing, model.ema_decay) == (0, 0)


@pytest.mark.usefixtures("no_pictures")
def test_gan_replaces_the_pictures_of_an_earlier_run(digits, tmp_path):
    words = "train", "gan", "--data-dir", digits, "--hidden", 4, "--out", tmp_path / "out"
    assert call(*words, "--epochs", 3) == 0
    assert call(*words, "--epochs", 1) == 0
    assert sorted(os.listdir(tmp_path / "out" / "samples")) == ["epoch_0000.png", "epoch_0001.png"]


# Options.


@pytest.mark.usefixtures("no_pictures")
def test_several_hidden_layers(digits, tmp_path):
    for network in ("mlp", "gan"):
        words = "train", network, "--data-dir", digits, "--epochs", 1, "--hidden", "20, 12", "--out", tmp_path / network
        assert call(*words) == 0
        assert metrics_of(tmp_path / network)["hidden"] == [20, 12]
    assert nn.MLP.load(tmp_path / "mlp" / "model.safetensors").layers == [784, 20, 12, 10]
    loaded = nn.GAN.load(tmp_path / "gan" / "model.safetensors")
    assert (loaded.generator, loaded.discriminator) == ([20, 12, 784], [12, 20, 1])


@pytest.mark.parametrize(
    ("words", "lr"),
    [("sgd", 0.1), ("adam", 0.003), ("adamw", 0.003), ("sgd --lr 0.25", 0.25), ("adamw --lr 1e-5", 1e-5)],
)
@pytest.mark.usefixtures("no_pictures")
def test_optimizers(digits, tmp_path, words, lr):
    name, *more = words.split()
    words = "train", "mlp", "--data-dir", digits, "--epochs", 1, "--batch-size", 50, "--optimizer", name, *more
    assert call(*words, "--out", tmp_path / "out") == 0
    metrics = metrics_of(tmp_path / "out")
    assert (metrics["optimizer"], metrics["lr"], metrics["batch_size"]) == (name, lr, 50)
    # The network got just these settings.
    data, model = load_mnist(digits), nn.MLP([784, 256, 10], "relu", seed=0)
    kept, _ = train_mlp.hold_out(200, seed=0)
    some, rule = (data.x_train[kept], data.y_train[kept]), nn.make_optimizer(name, lr=lr)
    history = model.fit(*some, epochs=1, batch_size=50, optimizer=rule, lr_schedule=nn.linear_decay)
    assert metrics["history"]["loss"] == history.loss


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        ("--optimizer sgd --momentum 0.9 --weight-decay 0.001", nn.SGD(0.1, momentum=0.9, weight_decay=0.001)),
        ("--weight-decay 0.5", nn.Adam(3e-3, weight_decay=0.5)),
        ("--clip-value 1e-3", nn.Adam(3e-3, clip_value=1e-3)),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_settings_of_optimizers_and_activation(digits, tmp_path, words, optimizer):
    words = "train", "mlp", "--data-dir", digits, "--epochs", 1, "--activation", "gelu", *words.split()
    assert call(*words, "--out", tmp_path / "out") == 0
    data, model = load_mnist(digits), nn.MLP([784, 256, 10], "gelu", seed=0)
    kept, _ = train_mlp.hold_out(200, seed=0)
    history = model.fit(
        data.x_train[kept], data.y_train[kept], epochs=1, optimizer=optimizer, lr_schedule=nn.linear_decay
    )
    metrics = metrics_of(tmp_path / "out")
    assert metrics["history"]["loss"] == history.loss
    assert (metrics["activation"], metrics["weight_decay"]) == ("gelu", optimizer.weight_decay)
    assert metrics["clip_value"] == optimizer.clip_value


@pytest.mark.parametrize("words", ["", "--classic"])
@pytest.mark.usefixtures("no_pictures")
def test_penalties(digits, tmp_path, words):
    """They go on after --resume."""
    out = tmp_path / "out"
    words = "train", "mlp", "--data-dir", digits, "--l1", 1e-4, "--l2", 1e-3, *words.split()
    assert call(*words, "--epochs", 2, "--out", out) == 0
    metrics, model = metrics_of(out), nn.MLP.load(out / "model.safetensors")
    assert (metrics["l1"], metrics["l2"], model.l1, model.l2) == (1e-4, 1e-3, 1e-4, 1e-3)
    assert call(*words, "--epochs", 1, "--out", tmp_path / "other") == 0
    assert call("train", "mlp", "--resume", tmp_path / "other", "--epochs", 2) == 0
    assert len(metrics_of(tmp_path / "other")["history"]["loss"]) == 2
    resumed = nn.MLP.load(tmp_path / "other" / "model.safetensors")
    assert (resumed.l1, resumed.l2, resumed.steps) == (1e-4, 1e-3, model.steps)
    assert call(*words[:4], "--epochs", 1, "--out", tmp_path / "without", *words[8:]) == 0
    losses = [metrics_of(tmp_path / name)["history"]["loss"][0] for name in ("other", "without")]
    assert losses[0] > losses[1] + 0.1


def test_penalties_are_for_the_mlp(digits, tmp_path, capsys):
    assert call("train", "gan", "--data-dir", digits, "--out", tmp_path / "out", "--l2", 0.5) == 2
    assert "--l2 is for mlp; the network is gan" in error_line(capsys)


@pytest.mark.parametrize(("words", "activations"), [("elu", ("elu", "elu")), ("silu, tanh", ("silu", "tanh"))])
@pytest.mark.usefixtures("no_pictures")
def test_activations_of_the_gan(digits, tmp_path, capsys, words, activations):
    words = "train", "gan", "--data-dir", digits, "--epochs", 1, "--hidden", 4, "--activation", words
    assert call(*words, "--out", tmp_path / "out") == 0
    model = nn.GAN.load(tmp_path / "out" / "model.safetensors")
    assert (model.generator_activation, model.discriminator_activation) == activations
    said = f"Without gradient penalty: the discriminator's {activations[1]} is not linear in pieces"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.usefixtures("no_pictures")
def test_dropout(digits, tmp_path, network):
    """It is saved with the network, and the training goes on with it."""
    prefix = "--discriminator-" if network == "gan" else "--"
    words = "train", network, "--data-dir", digits, "--hidden", "8,4", f"{prefix}dropout", "0.5, 0.25"
    assert call(*words, f"{prefix}input-dropout", 0.2, "--epochs", 1, "--out", tmp_path / "out") == 0
    kind = nn.GAN if network == "gan" else nn.MLP
    model, attribute = kind.load(tmp_path / "out" / "model.safetensors"), prefix[2:].replace("-", "_")
    assert getattr(model, f"{attribute}dropout") == [0.5, 0.25]
    assert getattr(model, f"{attribute}input_dropout") == 0.2
    assert call("train", network, "--resume", tmp_path / "out", "--epochs", 2, f"{prefix}dropout", "0.5,0.25") == 0
    assert metrics_of(tmp_path / "out")["dropout"] == [0.5, 0.25]
    assert call("train", network, "--resume", tmp_path / "out", f"{prefix}dropout", "0.5") == 2


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.usefixtures("no_pictures")
def test_seed(digits, tmp_path, network):
    results = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(i)
        words = "train", network, "--data-dir", digits, "--epochs", 2, "--hidden", 16, "--seed", seed, "--out", out
        assert call(*words) == 0
        results.append(((out / "model.safetensors").read_bytes(), without(metrics_of(out), "seconds")))
    (model, metrics), again, (other_model, other_metrics) = results
    assert again == (model, metrics)
    assert other_model != model
    assert other_metrics["history"] != metrics["history"]


def load_or_skip(backend):
    try:
        cuda_on_host.backend.load() if backend == "cuda" else select.load(backend)
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.usefixtures("no_pictures")
def test_threads_change_nothing(digits, tmp_path, network):
    load_or_skip("cpu")
    results = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        words = "train", network, "--data-dir", digits, "--epochs", 2, "--backend", "cpu", "--threads", threads
        assert call(*words, "--out", out) == 0
        assert metrics_of(out)["threads"] == threads
        results.append(((out / "model.safetensors").read_bytes(), without(metrics_of(out), "seconds", "threads")))
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", select.CHOICES)
@pytest.mark.usefixtures("no_pictures")
def test_backend(digits, tmp_path, backend, capsys):
    load_or_skip(backend)
    words = "train", "mlp", "--data-dir", digits, "--epochs", 2, "--threads", 1, "--backend", backend
    assert call(*words, "--out", tmp_path / "out") == 0
    metrics, isa = metrics_of(tmp_path / "out"), select.load(backend).describe()["isa"]
    assert (metrics["backend"], metrics["isa"], metrics["threads"]) == (backend, isa, 1)
    assert f"Backend: {backend}, {isa}, 1 thread\n" in capsys.readouterr().out
    assert 0.2 < metrics["test_accuracy"] < 1


def blas_threads():
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.parametrize(("threads", "used"), [(1, 1), (3, 3), (4, 3)])
@pytest.mark.usefixtures("no_pictures")
def test_threads_hold_for_the_blas_too(digits, tmp_path, threads, used, monkeypatch):
    monkeypatch.setattr(_threads, "processors", lambda: 3)
    words = "train", "mlp", "--data-dir", digits, "--epochs", 1, "--backend", "numpy", "--out", tmp_path / "out"
    assert call(*words, "--threads", threads) == 0
    assert blas_threads() == {used}
    assert metrics_of(tmp_path / "out")["threads"] == used


@pytest.mark.usefixtures("no_pictures")
def test_threads_from_elsewhere_hold_for_the_blas_too(digits, tmp_path):
    gemmlet.set_num_threads(1)  # as GEMMLET_NUM_THREADS does
    words = "train", "mlp", "--data-dir", digits, "--epochs", 1, "--backend", "numpy", "--out", tmp_path / "out"
    assert call(*words) == 0
    assert blas_threads() == {1}
    assert metrics_of(tmp_path / "out")["threads"] == 1


@pytest.mark.usefixtures("no_pictures")
def test_defaults(digits, tmp_path):
    for network in ("mlp", "gan"):
        assert call("train", network, "--data-dir", digits, "--epochs", 1) == 0
    assert nn.MLP.load(tmp_path / "runs" / "mlp" / "model.safetensors").layers == [784, 256, 10]
    loaded = nn.GAN.load(tmp_path / "runs" / "gan" / "model.safetensors")
    assert (loaded.generator, loaded.discriminator) == ([256, 512, 784], [512, 256, 1])
    assert metrics_of(tmp_path / "runs" / "gan")["hidden"] == [256, 512]


@pytest.mark.usefixtures("no_pictures")
def test_data_dir_from_environment(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMLET_DATA_DIR", str(digits))
    assert call("train", "mlp", "--epochs", 1, "--out", tmp_path / "out") == 0
    assert metrics_of(tmp_path / "out")["data"] == str(digits)


@pytest.mark.usefixtures("no_pictures")
def test_sample_without_network(tmp_path, monkeypatch, capsys, caplog):
    def download():
        raise mnist._NoDownloadError("no network")

    monkeypatch.setattr(mnist, "_download", download)
    assert call("train", "mlp", "--epochs", 1, "--hidden", 32, "--out", tmp_path / "out") == 0
    metrics = metrics_of(tmp_path / "out")
    assert metrics["data"] == "the sample embedded in gemmlet"
    assert (metrics["training_images"], metrics["test_images"]) == (5000, 1000)
    assert metrics["test_accuracy"] > 0.5
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "(no network)" in record.getMessage()
    assert "Data: the sample embedded in gemmlet (5,000 training and 1,000 test images)" in capsys.readouterr().out


# What cannot be used: one line on stderr that names it, exit status 2, and nothing is written.


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.parametrize(
    "words",
    [
        "--epochs 0",
        "--epochs -1",
        "--epochs 1.5",
        "--epochs ten",
        "--epochs 9999999999999999999999",
        "--epochs",
        "--batch-size 0",
        "--batch-size x",
        "--batch-size 9999999999999999999999",
        "--lr 0",
        "--lr -0.1",
        "--lr nan",
        "--lr inf",
        "--lr fast",
        "--optimizer rmsprop",
        "--optimizer=",
        "--hidden=",
        "--hidden 0",
        "--hidden -5",
        "--hidden 12,,3",
        "--hidden 12,",
        "--hidden 1.5",
        "--hidden ²",
        "--hidden 1000001",
        "--hidden 9999999999999999999999",
        "--seed -1",
        "--seed x",
        "--backend gpu",
        "--backend=",
        "--threads 0",
        "--threads 1025",
        "--threads two",
        "--threads 9999999999999999999999",
        "--classic --hidden 5",
        "--classic --activation relu",
        "--activation swish",
        "--activation=",
        "--activation relu,relu,relu",
        "--momentum 0.9",  # Adam has none
        "--momentum 1.5 --optimizer sgd",
        "--momentum -1 --optimizer sgd",
        "--weight-decay -1",
        "--weight-decay nan",
        "--weight-decay much",
        "--augment rotate=200",
        "--augment rotate",
        "--augment elastic=much",
        "--augment elastic=1,colour=3",
        "--augment=",
        "--clip-value 0",
        "--l1 -0.5",
        "--patience -1",
        "--l1 much",
        "--l2 inf",
        "--resume nowhere",
        "--colour red",
        "surplus",
    ],
)
def test_bad_option(digits, tmp_path, capsys, network, words):
    assert call("train", network, "--data-dir", digits, "--out", tmp_path / "out", *words.split()) == 2
    assert re.split("[ =]", words)[0] in error_line(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.parametrize(
    "words",
    ["dropout 1", "dropout -0.1", "dropout nan", "dropout half", "dropout=", "dropout 0.5,", "dropout 0.5,0.5,0.5",
     "input-dropout 1", "input-dropout -0.1", "input-dropout nan", "input-dropout half"],
)  # fmt: skip
def test_bad_dropout(tmp_path, capsys, network, words):
    option = f"--{'discriminator-' * (network == 'gan')}{words}"
    assert call("train", network, "--hidden", "5,4", "--out", tmp_path / "out", *option.split()) == 2
    assert re.split("[ =]", option)[0] in error_line(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", ["tain", "train cnn", "--colour", "info surplus", "info --colour"])
def test_bad_command(capsys, words):
    assert call(*words.split()) == 2
    assert words.split()[-1] in error_line(capsys)


def test_message_says_what_was_given(digits, capsys):
    for option, value in (("--epochs", "0"), ("--lr", "-2.5"), ("--hidden", "wide"), ("--backend", "gpu")):
        assert call("train", "mlp", "--data-dir", digits, option, value) == 2
        assert value in error_line(capsys)
    for option, value, kind in (("--epochs", "x", "integer"), ("--seed", "1.5", "integer"), ("--lr", "fast", "number")):
        assert call("train", "mlp", "--data-dir", digits, option, value) == 2
        assert f"{option}': '{value}' is no {kind}" in error_line(capsys)
    assert call("bench", "--tolerance", "x") == 2
    assert "--tolerance': 'x' is no number" in error_line(capsys)


@pytest.mark.parametrize("words", [["train", "mlp"], ["train", "gan"], ["bench"]], ids=" ".join)
def test_defaults_are_in_brackets_of_one_kind(capsys, words):
    assert call(*words, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "[default: " in shown
    assert not re.search(r"\[default: \(|\[\[", shown)


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.parametrize(
    ("name", "spoil", "found"),
    [
        (TRAIN_IMAGES, lambda b: b[:-1], "is truncated"),
        (TRAIN_LABELS, lambda b: b"", "no IDX file"),
        (TEST_IMAGES, lambda b: b"\x89PNG" + b[4:], "no IDX file"),
        (TEST_LABELS, lambda b: b + b"\0", "is corrupt"),
        (TRAIN_IMAGES, lambda b: gzip.compress(b)[:-9], "is truncated or corrupt"),
        (TRAIN_LABELS, lambda b: b[:-1] + b"\x0a", "has the label 10"),
        (TEST_LABELS, lambda b: idx(np.zeros(6, np.uint8)), "holds 6 labels"),
    ],
)
def test_bad_file(few, tmp_path, capsys, network, name, spoil, found):
    (few / name).write_bytes(spoil((few / name).read_bytes()))
    assert call("train", network, "--data-dir", few, "--out", tmp_path / "out") == 2
    line = error_line(capsys)
    assert str(few / name) in line
    assert found in line
    assert not (tmp_path / "out").exists()


def test_missing_file(few, tmp_path, capsys):
    (few / TEST_LABELS).unlink()
    assert call("train", "mlp", "--data-dir", few, "--out", tmp_path / "out") == 2
    assert f"{few} lacks the file {TEST_LABELS}" in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_closed_file(few, tmp_path, capsys):
    (few / TEST_LABELS).chmod(0)
    assert call("train", "mlp", "--data-dir", few, "--out", tmp_path / "out") == 2
    assert TEST_LABELS in error_line(capsys)


@pytest.mark.parametrize(
    ("folder", "found"), [("nowhere", "does not exist"), ("file", "is not a folder"), ("~no such user/x", "home")]
)
def test_bad_data_folder(tmp_path, capsys, monkeypatch, folder, found):
    (tmp_path / "file").write_bytes(b"")
    assert call("train", "mlp", "--data-dir", folder, "--out", "out") == 2
    line = error_line(capsys)
    assert "--data-dir" in line
    assert found in line
    monkeypatch.setenv("GEMMLET_DATA_DIR", folder)
    assert call("train", "mlp", "--out", "out") == 2
    line = error_line(capsys)
    assert "GEMMLET_DATA_DIR" in line
    assert found in line
    assert not (tmp_path / "out").exists()


def test_gan_needs_two_images(tmp_path, capsys):
    for name, train_images, test_images in (("test", 9, 1), ("train", 1, 9)):
        folder = write_digits(tmp_path / name, train_images, test_images)
        assert call("train", "gan", "--data-dir", folder, "--out", tmp_path / "out") == 2
        assert f"{folder} has {train_images} training and {test_images} test images" in error_line(capsys)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below", "link", "x" * 300])
def test_out_that_cannot_be_a_folder(digits, tmp_path, capsys, out):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "folder")
    assert call("train", "mlp", "--data-dir", digits, "--out", out) == 2
    assert f"--out {out}: " in error_line(capsys)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_out_where_even_root_cannot_write(digits, capsys):
    assert call("train", "mlp", "--data-dir", digits, "--out", "/proc/nowhere/folder") == 2
    assert "--out /proc/nowhere/folder: " in error_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_without_permission(digits, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir()
    for mode in (0o500, 0):
        closed.chmod(mode)
        for out in (closed, closed / "below"):
            assert call("train", "mlp", "--data-dir", digits, "--out", out) == 2
            line = error_line(capsys)  # Typer's own, where it looks into folders
            assert "--out" in line
            assert str(out) in line
    closed.chmod(0o700)
    assert os.listdir(closed) == []


def test_file_in_place_of_the_folder_of_samples(digits, tmp_path, capsys):
    (tmp_path / "samples").write_text("kept")
    assert call("train", "gan", "--data-dir", digits, "--out", tmp_path) == 2
    assert f"--out {tmp_path / 'samples'}: " in error_line(capsys)
    assert os.listdir(tmp_path) == ["samples"]


def test_backend_from_environment_that_is_none(digits, capsys, monkeypatch):
    monkeypatch.setattr(select, "_current", None)
    monkeypatch.setenv("GEMMLET_DATA_DIR", str(digits))
    monkeypatch.setenv("GEMMLET_BACKEND", "abacus")
    assert call("train", "mlp") == 2
    line = error_line(capsys)
    assert "GEMMLET_BACKEND" in line
    assert "'abacus'" in line


@pytest.mark.parametrize("words", ["train mlp", "train mlp --backend cpu"])
def test_isa_that_is_none(digits, capsys, monkeypatch, words):
    monkeypatch.setattr(select, "_current", None)
    monkeypatch.setattr(select, "_loaded", {})
    monkeypatch.setenv("GEMMLET_DATA_DIR", str(digits))
    monkeypatch.setenv("GEMMLET_BACKEND", "cpu")
    monkeypatch.setenv("GEMMLET_ISA", "abacus")
    monkeypatch.setattr("gemmlet.backends.cpu.available_isas", lambda: ["baseline"])
    assert call(*words.split()) == 2
    line = error_line(capsys)
    assert line.startswith("gemmlet: instruction set 'abacus' is unknown; GEMMLET_ISA takes")
    assert "backend" not in line.lower()


def test_isa_that_is_none_without_a_wish_for_a_backend():
    """It was asked for, so that no other backend takes its place."""
    load_or_skip("cpu")
    with start("info", GEMMLET_ISA="abacus") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert "GEMMLET_ISA takes" in err
    assert out.startswith(f"No backend: {err.removeprefix('gemmlet: ')}\nBackends\n  cpu    not here: ")
    assert "GEMMLET_ISA          abacus: " in out


# What fails later on: one line on stderr and exit status 1.


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_diverging(digits, tmp_path, capsys, monkeypatch, network, backend):
    load_or_skip(backend)
    monkeypatch.setattr(fit, "_COPY_EVERY", 1e9)  # what the first step has made is finite yet
    (tmp_path / "model.safetensors").write_text("of an earlier run")
    words = "train", network, "--data-dir", digits, "--backend", backend, "--lr", 1e30, "--out", tmp_path
    assert call(*words) == 1
    assert "diverged" in error_line(capsys)
    assert (tmp_path / "model.safetensors").read_text() == "of an earlier run"
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_diverging_in_the_last_step(few, tmp_path, capsys, network):
    """Only one step, whose loss is that before it, and nothing held out that would show it."""
    words = "train", network, "--data-dir", few, "--epochs", 1, "--lr", 1e39, "--optimizer", "sgd"
    assert call(*words, "--out", tmp_path / "out") == 1
    assert "diverged" in error_line(capsys)
    assert names_in(tmp_path / "out").isdisjoint({"model.safetensors", "metrics.json"})


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_diverging_later_on(digits, tmp_path, capsys, monkeypatch, network):
    """What was learnt before is saved, and drawn."""
    monkeypatch.setattr(fit, "_next_copy", lambda now: now)
    see = training.Watch.see

    def spoil(self, progress, figures):
        see(self, progress, figures)
        if progress.epoch == 3:
            self.settings.optimizer.lr = 1e39

    monkeypatch.setattr(training.Watch, "see", spoil)
    words = "train", network, "--data-dir", digits, "--epochs", 9, "--hidden", 8, "--out", tmp_path / "out"
    assert call(*words) == 1
    assert "diverged" in error_line(capsys)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["interrupted"] is True
    assert 2 <= metrics["epochs_done"] <= 3
    assert {len(values) for values in metrics["history"].values()} == {metrics["epochs_done"]}
    model = {"mlp": nn.MLP, "gan": nn.GAN}[network].load(tmp_path / "out" / "model.safetensors")
    arrays = model.parameters if network == "mlp" else model.generator_parameters
    assert all(np.isfinite(array).all() for array in arrays)
    assert names_in(tmp_path / "out") >= (MLP_PICTURES if network == "mlp" else GAN_PICTURES).keys()


def test_file_that_cannot_be_replaced(digits, tmp_path, capsys):
    (tmp_path / "metrics.json").mkdir()
    assert call("train", "mlp", "--data-dir", digits, "--epochs", 1, "--out", tmp_path) == 1
    assert "metrics.json" in error_line(capsys)
    assert not list(tmp_path.glob(".*"))


def test_too_large_for_the_memory(digits, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError("Unable to allocate 7.28 TiB")

    monkeypatch.setattr(train_mlp.nn, "MLP", refuse)
    assert call("train", "mlp", "--data-dir", digits, "--out", tmp_path / "out") == 1
    line = error_line(capsys)
    assert "--hidden" in line
    assert "7.28 TiB" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("words", ["info", "train mlp --epochs 1 --hidden 4", "train gan --epochs 1 --hidden 4"])
def test_full_disk_for_what_is_printed(digits, tmp_path, words):
    to = ["--out", tmp_path / "out"] if "train" in words else []
    with (
        open("/dev/full", "w") as full,
        start(*words.split(), *to, stdout=full, GEMMLET_DATA_DIR=str(digits)) as process,
    ):
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.fullmatch("gemmlet: standard output: .*No space left on device\n", err)
    if to:
        check_results(tmp_path / "out", words.split()[1])


def check_results(out, network):
    """All that a training leaves is there, and it was not cut short."""
    assert metrics_of(out)["interrupted"] is False
    pictures = MLP_PICTURES if network == "mlp" else GAN_PICTURES
    assert names_in(out) >= RUN_FILES | pictures.keys()


def test_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    with contextlib.suppress(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".json"
        raise ZeroDivisionError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as outer:
        outer.write_text("outer")
        with replacing(path) as inner:
            inner.write_text("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    (tmp_path / "b").touch()
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode


def write_half(self, content, *_, **__):
    """Like writing to a disk that fills up."""
    path = content if isinstance(self, Image.Image) else self
    with open(path, "w") as file:
        file.write("half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("write", "owner", "method"),
    [
        (lambda path: files.write_json(path, {"a": 1}), Path, "write_text"),
        (lambda path: plots.save_image(path, Image.new("L", (9, 9))), Image.Image, "save"),
        (lambda path: plots.save_animation(path, [Image.new("L", (9, 9))] * 2), Image.Image, "save"),
    ],
    ids=["json", "png", "gif"],
)
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write, owner, method):
    path = tmp_path / "a.png"
    path.write_text("old")
    monkeypatch.setattr(owner, method, write_half)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    monkeypatch.undo()
    assert (tmp_path / "a.png").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_full_disk_after_the_training(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_text", write_half)
    assert call("train", "mlp", "--data-dir", digits, "--epochs", 1, "--out", tmp_path) == 1
    assert "No space left on device" in error_line(capsys)
    assert names_in(tmp_path) == RUN_FILES - {"metrics.json"}


def test_the_model_is_tried_where_there_is_no_room_for_a_checkpoint(digits, tmp_path, capsys, monkeypatch):
    write = nn.files.write

    def full(file, kind, config, tensors, extra):
        if extra.get("fit"):
            raise OSError(errno.ENOSPC, "No space left on device", os.fspath(file))
        write(file, kind, config, tensors, extra)

    monkeypatch.setattr(nn.files, "write", full)
    with pytest.warns(RuntimeWarning, match="a checkpoint could not be written, training goes on without"):
        assert call("train", "mlp", "--data-dir", digits, "--epochs", 2, "--out", tmp_path) == 1
    assert f"No space left on device: '{tmp_path / training.CHECKPOINT}'" in error_line(capsys)
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs_done"] == 2
    assert nn.MLP.load(tmp_path / "model.safetensors").steps > 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", ["info", "--help", "train mlp --epochs 1 --hidden 4", "train gan --epochs 1 --hidden 4"]
)
def test_broken_pipe(digits, tmp_path, words, unbuffered):
    """Nobody reads what is printed: all the same it is computed and saved."""
    environment = {"GEMMLET_DATA_DIR": str(digits), "PYTHONUNBUFFERED": unbuffered}
    to = ["--out", tmp_path / "out"] if "train" in words else []
    with start(*words.split(), *to, **environment) as process:
        process.stdout.close()  # long before it prints
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "")
    if to:
        check_results(tmp_path / "out", words.split()[1])


@pytest.mark.parametrize("words", ["info", "train mlp --epochs 1 --hidden 4"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_standard_streams(digits, tmp_path, words, closed):
    """As of a service: nothing can be printed, and that is no error."""
    to = f"--out {tmp_path / 'out'} --data-dir {digits}" if "train" in words else ""
    command = f'"{sys.executable}" -m gemmlet {words} {to} {closed}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    if to:
        check_results(tmp_path / "out", "mlp")
        nn.MLP.load(tmp_path / "out" / "model.safetensors")


# What fails once the model is saved is said at the end.


@pytest.mark.parametrize(("package", "network"), [("matplotlib", "mlp"), ("matplotlib", "gan"), ("PIL", "gan")])
def test_package_that_fails_to_import(digits, tmp_path, package, network):
    """As one does that was built for another NumPy, say."""
    program = f"""
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {package!r}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec): pass
    def exec_module(self, module): raise RuntimeError("was built for another NumPy")
sys.meta_path.insert(0, Broken())
{COMMAND}
"""
    words = "train", network, "--data-dir", digits, "--epochs", 1, "--hidden", 4, "--out", tmp_path / "out"
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "was built for another NumPy" in done.stderr
    assert metrics_of(tmp_path / "out")["epochs_done"] == 1
    assert {"mlp": nn.MLP, "gan": nn.GAN}[network].load(tmp_path / "out" / "model.safetensors").seed == 0


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_full_disk_in_the_midst_of_a_picture(digits, tmp_path, capsys, monkeypatch, network):
    """Also while the GAN trains: it goes on."""
    monkeypatch.setattr(Image.Image, "save", write_half)
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, **options: write_half(path, None))
    words = "train", network, "--data-dir", digits, "--epochs", 2, "--hidden", 4, "--out", tmp_path / "out"
    assert call(*words) == 1
    line = error_line(capsys)
    assert "No space left on device" in line
    assert "the model is saved" in line
    assert names_in(tmp_path / "out") == RUN_FILES
    assert metrics_of(tmp_path / "out")["epochs_done"] == 2


def test_backend_of_matplotlib_that_is_not_there(digits, tmp_path):
    """Jupyter exports its own, also to commands in another environment."""
    words = "train", "mlp", "--data-dir", digits, "--epochs", 1, "--hidden", 4, "--out", tmp_path / "out"
    with start(*words, MPLBACKEND="module://no_such_package.backend") as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    check_results(tmp_path / "out", "mlp")


# Two runs.


def test_folder_that_another_run_writes_to(digits, tmp_path, capsys):
    out = tmp_path / "out"
    endless = "train", "mlp", "--data-dir", digits, "--hidden", 4, "--epochs", 10**6, "--out", out
    with start(*endless) as process:
        wait_for(process, "epoch 1/")
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".json"}
        assert call("train", "gan", "--data-dir", digits, "--epochs", 1, "--out", out) == 2
        assert f"--out {out}: another run is writing to it" in error_line(capsys)
        assert {name: (out / name).read_bytes() for name in before} == before
        assert "samples" not in os.listdir(out)
        process.kill()
    # Its lock has gone with it.
    assert call("train", "mlp", "--data-dir", digits, "--epochs", 1, "--hidden", 4, "--out", out) == 0


# Signals.


def wait_for(process, start):
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal(digits, tmp_path, network, number):
    out = tmp_path / "out"
    with start("train", network, "--data-dir", digits, "--hidden", 8, "--epochs", 10**6, "--out", out) as process:
        wait_for(process, "epoch 3/")
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (128 + number, "")
    metrics = metrics_of(out)
    assert metrics["interrupted"] is True
    assert metrics["epochs_done"] >= 3
    assert {"mlp": nn.MLP, "gan": nn.GAN}[network].load(out / "model.safetensors").steps > 0


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_impatient_ctrl_c(digits, tmp_path, network):
    out = tmp_path / "out"
    with start("train", network, "--data-dir", digits, "--hidden", 8, "--epochs", 10**6, "--out", out) as process:
        wait_for(process, "epoch 3/")
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err in ("", "gemmlet: interrupted; what was learnt is saved\n")
    assert metrics_of(out)["epochs_done"] >= 3
    assert {"mlp": nn.MLP, "gan": nn.GAN}[network].load(out / "model.safetensors").steps > 0


# Runs the command in forked processes, which import some modules anew, and sends signals after more and more calls of
# functions; the first process gets none. Pictures, which take most of the time, are not drawn.
STORM = """
import json, os, signal, sys, time, types
from pathlib import Path
import matplotlib, rich.progress, rich.table, typer
from gemmlet import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.modules["gemmlet.cli.plots"] = plots = types.ModuleType("plots")
plots.__getattr__ = lambda name: lambda *arguments: None
PATTERNS = [[signal.SIGINT] * 5, [signal.SIGTERM, signal.SIGINT], [signal.SIGHUP] * 2, [signal.SIGINT, signal.SIGTERM]]
folder, count, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def run(out, at, ready):
    calls = 0
    def trace(*_):
        nonlocal calls
        calls += 1
        if calls == at:
            os.write(ready, b".")
    for number, name in (1, out), (2, f"{out}-err"):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    for name in "app", "train_mlp", "train_gan", "training", "evaluation", "files", "info":
        sys.modules.pop(f"gemmlet.cli.{name}", None)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        del sys.modules[name]
    sys.settrace(trace)
    try:
        sys.argv[1:] = [*words, "--out", f"{out}-run"]
        cli.main()
    finally:
        if at < 0:
            os.write(ready, str(calls).encode())

def waits(child):
    # Whether a signal waits for the process.
    status = Path(f"/proc/{child}/status")
    if not status.exists():  # another system
        time.sleep(0.1)
        return False
    lines = status.read_text().splitlines()
    return any(int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd")))

total = -1
for i in range(count):
    out, signals = f"{folder}/{i}", PATTERNS[i % len(PATTERNS)]
    begun, ready = os.pipe()
    if not (child := os.fork()):
        run(out, total * i // count if i else -1, ready)
    os.close(ready)
    if told := os.read(begun, 99):
        total = int(told) if i == 0 else total
        for number in signals if i else ():
            os.kill(child, number)
            time.sleep(0.001 * i)
            # Of two that wait for a process that does not run nobody knows which was the first.
            while len(set(signals)) > 1 and waits(child):
                time.sleep(0.001)
    status = os.waitpid(child, 0)[1]
    told = Path(out).read_text(), Path(f"{out}-err").read_text()
    print(json.dumps([signals[0], os.waitstatus_to_exitcode(status), *told]), flush=True)
"""


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_signals_at_any_moment(digits, tmp_path, network):
    """The exit status is that of the first one, and what is said to be saved is."""
    words = "train", network, "--data-dir", digits, "--hidden", 8, "--epochs", 3
    command = [sys.executable, "-c", STORM, *map(str, (tmp_path, 12, *words))]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout.splitlines()
    assert len(lines) == 12
    ends = set()
    for i, line in enumerate(lines):
        first, status, out, err = json.loads(line)
        ended = f"Model, metrics and pictures: {tmp_path / str(i)}-run\n" in out
        assert status == 128 + first or (ended and status == 0), line
        assert err in ("", "gemmlet: interrupted\n", "gemmlet: interrupted; what was learnt is saved\n")
        saved = "what was learnt is saved" in out + err
        assert saved or ended or err
        if saved or ended:
            path = tmp_path / f"{i}-run" / "model.safetensors"
            assert {"mlp": nn.MLP, "gan": nn.GAN}[network].load(path).steps > 0
        ends.add((saved, ended))
    assert len(ends) > 2


@pytest.mark.parametrize("number", STOPS)
def test_signal_before_and_after_the_command_runs(capsys, monkeypatch, number):
    """It ends one that has not begun, and changes nothing of one that ends already."""
    made = cli._Output.__init__

    def early(self, file):
        signal.raise_signal(number)
        made(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(cli._Output, "__init__", early)
        assert call("info") == 128 + number
    assert capsys.readouterr() == ("", "gemmlet: interrupted\n")
    # Once it has been run, nobody would catch anything.
    pressed = lambda *words, **to: (signal.raise_signal(number), print(*words, **to))  # noqa: E731
    monkeypatch.setattr(cli, "print", pressed, raising=False)
    assert call("info", "surplus") == 2
    assert "surplus" in error_line(capsys)


def test_other_errors_of_an_interrupted_import(digits, tmp_path, capsys, monkeypatch):
    """Extension modules make an ImportError of it."""

    def load(folder):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr(common, "load_mnist", load)
    assert call("train", "mlp", "--data-dir", digits, "--out", tmp_path / "out") == 143
    assert error_line(capsys) == "gemmlet: interrupted\n"


def test_hangup_that_is_ignored(digits, tmp_path):
    """As under nohup."""
    ignoring = COMMAND.replace("SIG_DFL", "SIG_IGN")
    words = "train", "mlp", "--data-dir", digits, "--hidden", 4, "--epochs", 100, "--out", tmp_path / "out"
    command = [sys.executable, "-c", ignoring, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, "epoch 3/")
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert metrics_of(tmp_path / "out")["epochs_done"] == 100


# --resume.


def long_run(network, digits, out):
    """Options of a training that writes checkpoints between its epochs' ends, and takes a second."""
    return "train", network, "--data-dir", digits, "--epochs", 6, "--hidden", 8, "--seed", 4, "--out", out


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    """Return a function that runs a training to its end, once for each network, and returns its folder."""

    @functools.cache
    def run(network):
        out = tmp_path_factory.mktemp("whole") / network
        with process_restored():
            assert call(*long_run(network, digits, out)) == 0
        return out

    return run


def check_same(out, other):
    """The same has been learnt, bit by bit, and the same pictures show it."""
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert without(metrics_of(out), "seconds") == without(metrics_of(other), "seconds")
    assert names_in(out) == names_in(other)
    for name in names_in(out):
        if Path(name).suffix in (".png", ".gif"):
            assert (out / name).read_bytes() == (other / name).read_bytes(), name


def test_patience(digits, few, tmp_path, capsys):
    """A rate that is too large makes the loss of held-out images larger soon."""
    out, given = tmp_path / "out", ("--epochs", 40, "--hidden", 8, "--optimizer", "sgd", "--lr", 3)
    assert call("train", "mlp", "--data-dir", digits, "--out", out, *given, "--patience", 1) == 0
    found, printed = metrics_of(out), capsys.readouterr().out
    losses = found["history"]["validation_loss"]
    best = 1 + losses.index(min(losses))
    assert found["epochs_done"] == len(losses) == best + 2 < 40
    assert not found["interrupted"]
    assert f"Of {best + 2} epochs that of number {best} is kept" in " ".join(printed.split())
    model = nn.MLP.load(out / "model.safetensors")
    images = load_mnist(digits)
    _, held_out = hold_out(len(images.y_train), 0)
    loss = model.evaluate(images.x_train[held_out], images.y_train[held_out])["loss"]
    assert loss == pytest.approx(min(losses), rel=1e-6)
    assert call("train", "mlp", "--resume", out) == 0
    assert metrics_of(out)["history"] == found["history"]
    for other in (("train", "gan", "--patience", 1), ("train", "mlp", "--patience", 1, "--recipe", "quick")):
        assert call(*other, "--out", tmp_path / "no") == 2
        assert "--patience" in error_line(capsys)
    assert call("train", "mlp", "--data-dir", few, "--patience", 1, "--out", tmp_path / "no") == 2
    assert "--patience: of 9 images none is held out" in error_line(capsys)


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_augment(digits, tmp_path, capsys, uninterrupted, network):
    plain, out = metrics_of(uninterrupted(network)), tmp_path / "out"
    assert call(*long_run(network, digits, out), "--augment", "rotate=5, noise=3") == 0
    found = metrics_of(out)
    assert found["augment"] == vars(nn.Augment(rotate=5, noise=3))
    assert plain["augment"] is None
    assert found["history"] != plain["history"]
    capsys.readouterr()
    assert call("train", network, "--resume", out, "--augment") == 2
    assert "--augment default: the training in" in error_line(capsys)
    assert call("train", network, "--resume", out, "--augment", "rotate=5,noise=3", "--epochs", 7) == 0
    assert metrics_of(out)["augment"] == found["augment"]
    assert call("train", network, "--augment", "--data-dir", digits, "--epochs", 1, "--out", tmp_path / "other") == 0
    assert metrics_of(tmp_path / "other")["augment"] == vars(nn.Augment())
    assert call("train", network, "--data-dir", digits, "--epochs", 1, "--out", tmp_path / "last", "--augment") == 0
    assert without(metrics_of(tmp_path / "last"), "seconds") == without(metrics_of(tmp_path / "other"), "seconds")


def test_recipe(digits, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("train", "mlp", "--data-dir", digits, "--out", out)
    assert call(*words, "--recipe", "best", "--epochs", 2, "--seed", 3) == 0
    images = load_mnist(digits)
    model, history = nn.recipes.best.train(images.x_train, images.y_train, 3, epochs=2)
    for array, same in zip(nn.MLP.load(out / "model.safetensors").parameters, model.parameters, strict=True):
        np.testing.assert_array_equal(array, same)
    found = metrics_of(out)
    assert (found["recipe"], found["hidden"], found["lr"]) == ("best", list(nn.recipes.best.hidden), 0.05)
    assert found["history"]["loss"] == history.loss
    assert found["augment"] == vars(nn.recipes.best.augment)
    capsys.readouterr()
    for refused, named in (
        ("--recipe quick", "--recipe quick: the training in"),
        ("--augment", "--augment default: the training in"),
        ("--lr 1", "--lr 1.0: the training in"),
    ):
        assert call("train", "mlp", "--resume", out, *refused.split()) == 2
        assert named in error_line(capsys)
    assert call("train", "mlp", "--resume", out, "--recipe", "best", "--epochs", 3) == 0
    assert metrics_of(out)["epochs_done"] == 3


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train gan --recipe quick", "--recipe is for gemmlet train mlp"),
        ("train mlp --recipe slow", "--recipe 'slow' is unknown; the choices are quick, good, best"),
        *(
            (f"train mlp --recipe quick --{word}", f"--recipe is a whole training; leave out --{word.split()[0]}")
            for word in ["batch-size 3", "lr 1", "hidden 5", "classic", "augment", "optimizer adam", "momentum 0"]
        ),
    ],
)
def test_recipe_is_a_whole_training(digits, tmp_path, capsys, words, named):
    assert call(*words.split(), "--data-dir", digits, "--out", tmp_path / "out") == 2
    assert named in error_line(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_resume_after_ctrl_c(digits, tmp_path, press, uninterrupted, network):
    """In the midst of an epoch, and once more in another."""
    whole, out = uninterrupted(network), tmp_path / "out"
    press(6 if network == "mlp" else 3)
    assert call(*long_run(network, digits, out)) == 130
    press(5 if network == "mlp" else 2)
    assert call("train", network, "--resume", out) == 130
    assert call("train", network, "--resume", out) == 0
    check_same(out, whole)


# Ends the process as if it were killed from outside, in this epoch, with what it has written until then.
KILLED = """
import os, signal
from gemmlet.cli import training
see = training.Watch.see
def killed(self, progress, figures):
    see(self, progress, figures)
    if progress.epoch == {epoch}:
        os.kill(os.getpid(), signal.SIGKILL)
training.Watch.see = killed
"""


def kill_in_epoch(epoch, *words):
    command = [sys.executable, "-c", KILLED.format(epoch=epoch) + COMMAND, *map(str, words)]
    assert subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode == -signal.SIGKILL


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_resume_after_kill(digits, tmp_path, uninterrupted, network):
    whole, out = uninterrupted(network), tmp_path / "out"
    kill_in_epoch(4, *long_run(network, digits, out))
    assert not (out / "model.safetensors").exists()
    model = {"mlp": nn.MLP, "gan": nn.GAN}[network].load(out / "checkpoint.safetensors")
    assert model.steps > 0
    assert call("train", network, "--resume", out) == 0
    check_same(out, whole)


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.usefixtures("no_pictures")
def test_resume_with_more_epochs(digits, tmp_path, network):
    words = "train", network, "--data-dir", digits, "--classic", "--batch-size", 40
    assert call(*words, "--epochs", 2, "--out", tmp_path / "a") == 0
    assert call("train", network, "--resume", tmp_path / "a", "--epochs", 4, "--threads", 1) == 0
    assert call(*words, "--epochs", 4, "--out", tmp_path / "b") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    # It has ended: nothing is left to do, but to measure and to draw anew.
    assert call("train", network, "--resume", tmp_path / "a") == 0
    a, b = metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b")
    assert without(a, "seconds", "threads") == without(b, "seconds", "threads")


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_resume_before_anything_was_learnt(digits, tmp_path, uninterrupted, network):
    whole, out = uninterrupted(network), tmp_path / "out"
    kill_in_epoch(1, *long_run(network, digits, out))
    assert call("train", network, "--resume", out) == 0
    check_same(out, whole)


def test_a_new_training_that_is_killed_leaves_the_old_one(digits, tmp_path, uninterrupted):
    """With its options, as long as the new one has no checkpoint; from then on the new one's hold."""
    whole, out = uninterrupted("mlp"), tmp_path / "out"
    kill_in_epoch(4, *long_run("mlp", digits, out))
    other = "train", "mlp", "--data-dir", digits, "--epochs", 3, "--seed", 9, "--classic", "--out", out
    kill_in_epoch(1, *other)
    copied = shutil.copytree(out, tmp_path / "copied")
    assert call("train", "mlp", "--resume", out) == 0
    check_same(out, whole)
    kill_in_epoch(2, *other[:-1], copied)
    assert call("train", "mlp", "--resume", copied) == 0
    assert (metrics_of(copied)["epochs_done"], metrics_of(copied)["seed"], metrics_of(copied)["classic"]) == (
        3,
        9,
        True,
    )


def test_a_resume_that_fails_records_nothing(tmp_path, capsys, uninterrupted):
    """Of the epochs that it was to have, say."""
    out = shutil.copytree(uninterrupted("mlp"), tmp_path / "out")
    path = out / "checkpoint.safetensors"
    whole = path.read_bytes()
    half = bytearray(whole)
    half[-100:] = bytes(50)
    path.write_bytes(half)
    before = {name: (out / name).read_bytes() for name in names_in(out)}
    capsys.readouterr()
    assert call("train", "mlp", "--resume", out, "--epochs", 9) == 2
    assert f"--resume {out}: {path} is corrupt" in error_line(capsys)
    assert {name: (out / name).read_bytes() for name in names_in(out)} == before
    path.write_bytes(whole)
    assert call("train", "mlp", "--resume", out) == 0
    assert metrics_of(out)["epochs"] == 6


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_training_that_diverges_has_the_whole_history(digits, tmp_path, monkeypatch, network):
    words = "train", network, "--data-dir", digits, "--hidden", 8, "--out", tmp_path / "out", "--epochs"
    assert call(*words, 4) == 0
    before = metrics_of(tmp_path / "out")["history"]
    monkeypatch.setattr(fit, "_next_copy", lambda now: now)
    see = training.Watch.see

    def spoil(self, progress, figures):
        see(self, progress, figures)
        if progress.epoch == 6:
            self.settings.optimizer.lr = 1e39

    monkeypatch.setattr(training.Watch, "see", spoil)
    assert call("train", network, "--resume", tmp_path / "out", "--epochs", 9) == 1
    metrics = metrics_of(tmp_path / "out")
    assert 5 <= metrics["epochs_done"] <= 6
    for name, values in metrics["history"].items():
        assert len(values) == metrics["epochs_done"]
        assert network == "mlp" or values[:4] == before[name]  # the MLP's rate falls otherwise


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--epochs 5", "--epochs 5: the training in out has 6"),
        ("--hidden 9", "--hidden 9: the training in out has 8"),
        ("--seed 0", "--seed 0: the training in out has 4"),
        ("--momentum 0", "--momentum 0.0: the training in out has none"),
        ("--clip-value 1", "--clip-value 1.0: the training in out has none"),
        ("--l1 0.5", "--l1 0.5: the training in out has none"),
        ("--optimizer sgd", "--optimizer sgd: the training in out has adam"),
        ("--classic", "--classic"),
        ("--out other", "--out other"),
        ("--data-dir others", "other images than those of others"),
    ],
)
def test_resume_with_other_options(tmp_path, capsys, uninterrupted, words, named):
    shutil.copytree(uninterrupted("mlp"), "out")
    write_digits(Path("others"), seed=1)
    before = {name: Path("out", name).read_bytes() for name in names_in(Path("out"))}
    capsys.readouterr()
    assert call("train", "mlp", "--resume", "out", *words.split()) == 2
    assert named in error_line(capsys)
    assert {name: Path("out", name).read_bytes() for name in names_in(Path("out"))} == before
    assert call("train", "mlp", "--resume", "out", "--hidden", " 8", "--seed", 4, "--out", "out", "--epochs", 6) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint.safetensors, which gemmlet train leaves"),
        (b"half", "out/checkpoint.safetensors is corrupt, or no file of a gemmlet MLP: it is truncated"),
        ({}, "the options in checkpoint.safetensors cannot be used (KeyError('images_crc32'))"),
        ([], "the options in checkpoint.safetensors cannot be used"),
        ({"epochs": "x"}, "the options in checkpoint.safetensors cannot be used (ValueError(\"epochs is 'x'\"))"),
        ({"lr": None, "more": 1}, "the options in checkpoint.safetensors cannot be used (ValueError('more'))"),
        ({"batch_size": -1}, "--batch-size must be from 1 to 1,000,000,000, got -1"),
    ],
    ids=str,
)
def test_resume_from_what_is_no_training(tmp_path, capsys, uninterrupted, content, message):
    shutil.copytree(uninterrupted("mlp"), "out")
    path = Path("out", "checkpoint.safetensors")
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        config, tensors, extra = network_files.read(path, "MLP")
        extra["notes"] = extra["notes"] | content if content else content
        network_files.write(path, "MLP", config, tensors, extra)
    capsys.readouterr()
    assert call("train", "mlp", "--resume", "out") == 2
    assert message in error_line(capsys)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_resume_without_newer_options(digits, tmp_path, network):
    """A training that began before they were there has none of them."""
    out = tmp_path / "out"
    assert call("train", network, "--data-dir", digits, "--epochs", 1, "--hidden", 4, "--out", out) == 0
    path = out / training.CHECKPOINT
    config, tensors, extra = network_files.read(path, network.upper())
    extra["notes"] = {name: value for name, value in extra["notes"].items() if name not in training._NEWER}
    network_files.write(path, network.upper(), config, tensors, extra)
    assert call("train", network, "--resume", out, "--epochs", 2) == 0
    assert metrics_of(out)["epochs_done"] == 2


def test_resume_of_the_other_network(capsys, uninterrupted):
    folder = uninterrupted("mlp")
    capsys.readouterr()
    assert call("train", "gan", "--resume", folder) == 2
    assert "it holds a MLP" in error_line(capsys)


@pytest.mark.usefixtures("no_pictures")
def test_new_training_in_the_folder_of_another(digits, tmp_path, capsys):
    words = "train", "mlp", "--data-dir", digits, "--hidden", 4, "--epochs", 1, "--out", tmp_path / "out"
    assert call(*words) == 0
    assert "Replacing" not in capsys.readouterr().out
    assert call(*words, "--seed", 1) == 0
    assert f"Replacing the training in {tmp_path / 'out'}, with which --resume would go on\n" in capsys.readouterr().out
    assert nn.MLP.load(tmp_path / "out" / "checkpoint.safetensors").seed == 1


# Ctrl-C.


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_ctrl_c(digits, tmp_path, network):
    out = tmp_path / "out"
    with start("train", network, "--data-dir", digits, "--hidden", 16, "--epochs", 10**6, "--out", out) as process:
        for line in process.stdout:
            if line.startswith("epoch 3/"):
                break
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "")
    assert f"Interrupted: what was learnt is saved; --resume {out} goes on." in rest
    assert rest.endswith(f"Model, metrics and pictures: {out}\n")
    metrics = metrics_of(out)
    assert metrics["interrupted"] is True
    assert 3 <= metrics["epochs_done"] < 10**6
    for name, size in (MLP_PICTURES if network == "mlp" else GAN_PICTURES).items():
        check_picture(out / name, size)
    data = load_mnist(digits)
    if network == "mlp":
        model = nn.MLP.load(out / "model.safetensors")
        assert model.evaluate(data.x_test, data.y_test)["accuracy"] == metrics["test_accuracy"]
    else:
        assert nn.GAN.load(out / "model.safetensors").steps >= 3 * 2
        with Image.open(out / "samples.gif") as animation:
            assert animation.n_frames == 2  # before, and at the end


@pytest.fixture
def press(monkeypatch):
    """Return a function that makes Ctrl-C come with the mini-batch of that number, each being a call by itself."""
    monkeypatch.setattr(fit.CallBudget, "stop", lambda pace, done: None)

    def at(batch, times=1):
        see, seen = training.Watch.see, []

        def pressed(self, progress, figures):
            seen.append(progress)
            if len(seen) == batch:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            see(self, progress, figures)

        monkeypatch.setattr(training.Watch, "see", pressed)

    return at


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_ctrl_c_in_the_first_epoch(digits, tmp_path, press, network):
    press(2)
    words = "train", network, "--data-dir", digits, "--epochs", 5, "--batch-size", 50, "--hidden", 8
    assert call(*words, "--out", tmp_path / "out") == 130
    metrics = metrics_of(tmp_path / "out")
    assert (metrics["interrupted"], metrics["epochs_done"]) == (True, 0)
    if network == "mlp":
        assert metrics["history"]["validation_accuracy"] == [None]
        check_picture(tmp_path / "out" / "learning_curves.png")
    else:
        model = nn.GAN.load(tmp_path / "out" / "model.safetensors")
        assert model.steps == 2
        # The last picture is of what was learnt, not of the end of an epoch.
        drawn = np.rint(255 * (1 - model.sample(z=model.noise(100, seed=0))))[0].reshape(28, 28)
        assert (np.asarray(Image.open(tmp_path / "out" / "samples.png"))[32:88:2, 4:60:2] == drawn).all()
        assert names_in(tmp_path / "out" / "samples") == {"epoch_0000.png"}


@pytest.mark.parametrize("network", ["mlp", "gan"])
@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_in_the_last_mini_batch(digits, tmp_path, press, network):
    """Everything has been learnt then."""
    press(8)
    words = "train", network, "--data-dir", digits, "--epochs", 2, "--batch-size", 50, "--hidden", 8
    assert call(*words, "--out", tmp_path / "out") == 130
    metrics = metrics_of(tmp_path / "out")
    assert (metrics["interrupted"], metrics["epochs_done"]) == (False, 2)
    assert (tmp_path / "out" / "samples" / "epoch_0002.png").exists() == (network == "gan")


@pytest.mark.parametrize(("network", "first"), [("mlp", "learning_curves.png"), ("gan", "loss_curves.png")])
def test_second_ctrl_c(digits, tmp_path, press, capsys, monkeypatch, network, first):
    """It ends at once; what is being written does not appear."""
    press(2)
    (tmp_path / first).write_text("of an earlier run")
    savefig = plots.Figure.savefig

    def pressed(self, path, **options):
        savefig(self, path, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(plots.Figure, "savefig", pressed)
    assert call("train", network, "--data-dir", digits, "--hidden", 8, "--out", tmp_path) == 130
    assert error_line(capsys) == "gemmlet: interrupted; what was learnt is saved\n"
    assert (tmp_path / first).read_text() == "of an earlier run"
    assert not list(tmp_path.glob(".*"))
    # What came before is whole.
    assert metrics_of(tmp_path)["interrupted"] is True
    assert {"mlp": nn.MLP, "gan": nn.GAN}[network].load(tmp_path / "model.safetensors").seed == 0


@pytest.mark.parametrize("network", ["mlp", "gan"])
def test_five_ctrl_c_while_training(digits, tmp_path, press, network):
    """However impatient: what was learnt is saved first."""
    press(2, times=5)
    assert call("train", network, "--data-dir", digits, "--hidden", 8, "--out", tmp_path / "out") == 130
    assert metrics_of(tmp_path / "out")["interrupted"] is True
    assert {"mlp": nn.MLP, "gan": nn.GAN}[network].load(tmp_path / "out" / "model.safetensors").seed == 0


def test_ctrl_c_before_the_training(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_mnist", lambda _: signal.raise_signal(signal.SIGINT))
    assert call("train", "mlp", "--data-dir", digits, "--out", tmp_path / "out") == 130
    assert error_line(capsys) == "gemmlet: interrupted\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_that_is_ignored_stays_ignored(digits, tmp_path, press):
    """As under nohup."""
    press(2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert call("train", "mlp", "--data-dir", digits, "--epochs", 2, "--out", tmp_path / "out") == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert metrics_of(tmp_path / "out")["epochs_done"] == 2


# What the terminal shows.


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch, no_pictures):
    """Return a function that runs the command on a terminal, and returns its lines, also those that others replaced."""

    def run(*words, term="xterm", columns=80):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("COLUMNS", str(columns))
        with contextlib.redirect_stdout(Terminal()) as terminal:
            assert call(*words) == 0
        without_codes = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
        return re.split(r"[\r\n]+", without_codes)

    return run


@pytest.mark.parametrize(
    ("network", "columns", "figures"),
    [
        ("mlp", 60, r"loss \S+  accuracy \S+"),
        ("mlp", 80, r"loss \S+  accuracy \S+  held out \S+"),
        ("mlp", 150, r"loss \S+  accuracy \S+  held out \S+"),
        ("gan", 60, r"generator loss \S+"),
        ("gan", 80, r"generator loss \S+  discriminator loss \S+"),
        ("gan", 150, r"generator loss \S+  discriminator loss \S+"),
    ],
)
def test_bar_fits_the_terminal(digits, tmp_path, shown, network, columns, figures):
    words = "train", network, "--data-dir", digits, "--epochs", 20, "--hidden", 4, "--out", tmp_path / "out"
    lines = shown(*words, columns=columns)
    bars = [line for line in lines if line.startswith("epoch ")]
    assert re.fullmatch(rf"epoch 20/20 ━{{5,}} {figures} \d:\d\d:\d\d", bars[-1])
    assert max(map(len, bars)) <= columns
    assert not any("…" in line for line in lines)
    # The table is not folded either.
    assert sum("│" in line for line in lines) == {"mlp": 7, "gan": 6}[network]
    assert "Drawing the pictures." in lines


def test_time_left_of_the_gan_includes_its_judge(digits, tmp_path, monkeypatch):
    """The bar ends when the judge has been trained, and not before."""
    done = []
    see_more = training.Watch.see_more

    def seen(self, progress):
        (task,) = self._bar.tasks
        done.append(task.completed / task.total)
        see_more(self, progress)

    monkeypatch.setattr(training.Watch, "see_more", seen)
    monkeypatch.setenv("TERM", "xterm")
    words = "train", "gan", "--data-dir", digits, "--epochs", 1, "--hidden", 16, "--out", tmp_path / "out"
    with contextlib.redirect_stdout(Terminal()):
        assert call(*words) == 0
    assert 0 < done[0] < 0.9


def test_no_bar_where_it_cannot_be_drawn(digits, tmp_path, shown):
    words = "train", "mlp", "--data-dir", digits, "--epochs", 3, "--hidden", 4, "--out", tmp_path / "out"
    lines = shown(*words, term="dumb")
    assert [line[:9] for line in lines if line.startswith("epoch ")] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


@pytest.mark.usefixtures("no_pictures")
def test_letters_that_the_terminal_lacks(digits, tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    words = "train", "gan", "--data-dir", digits, "--epochs", 1, "--hidden", 4, "--out", tmp_path / "Übung"
    assert call(*words) == 0
    assert b"Fr?chet distance" in written.getvalue()
    assert written.getvalue().endswith(b"?bung\n")


@pytest.mark.usefixtures("no_pictures")
def test_folder_is_shown_as_it_is_called(digits, tmp_path, capsys):
    out = tmp_path / "[bold]a[" / "b] :smile: 1.5"
    assert call("train", "mlp", "--data-dir", digits, "--epochs", 1, "--out", out) == 0
    assert capsys.readouterr().out.endswith(f"Model, metrics and pictures: {out}\n")


# The other commands, and the command without the extra.


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("GEMMLET_DATA_DIR", "/some/folder")
    assert call("info") == 0
    config, backends, accelerated, variables = capsys.readouterr().out.split("\n\n")
    shown = dict(line.split(maxsplit=1) for line in config.splitlines())
    assert shown == {name: " ".join(value.split()) for name, value in select.config().items()}
    assert shown.keys() >= {"gemmlet", "backend", "isa", "threads", "numpy", "python"}
    assert (shown["gemmlet"], shown["numpy"]) == (gemmlet.__version__, np.__version__)
    found = re.findall(r"^  (\w+) +(in use|ready|not here: .)", backends, re.MULTILINE)
    assert [name for name, _ in found] == list(select.CHOICES)
    assert [name for name, state in found if state == "in use"] == [select.current().name]
    assert re.findall(r"^  (\w+) ", variables, re.MULTILINE) == list(_environment.VARIABLES)
    if available_isas():
        listed = " ".join(accelerated.split())
        assert all(f" {name}," in listed for name in (f"{np.__version__} ndarray.__add__", "exp", "linalg.norm"))
        assert replaced() == ()
    assert "GEMMLET_DATA_DIR     /some/folder: the folder with" in variables
    assert "GEMMLET_CACHE_DIR    not set: the folder" in variables


@pytest.mark.parametrize("variable", ["GEMMLET_BACKEND", "GEMMLET_ISA"])
def test_info_lists_all_where_no_backend_can_be_had(capsys, monkeypatch, variable):
    monkeypatch.setattr(select, "_current", None)
    monkeypatch.setattr(select, "_loaded", {})
    monkeypatch.setenv("GEMMLET_BACKEND", "cpu")
    monkeypatch.setenv(variable, "abacus")
    assert call("info") == 2
    out, err = capsys.readouterr()
    assert "'abacus'" in err
    refused, backends, accelerated, variables = out.split("\n\n")
    assert refused == f"No backend: {err.removeprefix('gemmlet: ').strip()}"
    assert re.findall(r"^  (\w+) ", backends, re.MULTILINE) == list(select.CHOICES)
    assert "in use" not in backends
    if variable == "GEMMLET_ISA":
        assert "NumPy cannot be accelerated: instruction set 'abacus' is unknown" in " ".join(accelerated.split())
    assert re.search(rf"{variable} +abacus: ", variables)


def test_info_says_why_a_backend_is_not_there():
    program = f"import sys; sys.modules.update(numba=None, cupy=None); {COMMAND}"
    done = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True, check=True)
    for extra in ("numba", "cuda12"):
        assert f"gemmlet[{extra}]" in " ".join(done.stdout.split())


def test_commands_by_name(capsys):
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "gemmlet"]
    assert entry.load() is cli.main
    assert call("info") == 0
    command = [sys.executable, "-m", "gemmlet", "info"]
    environment = os.environ | {"GEMMLET_BACKEND": select.current().name}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert without_threads(shown) == without_threads(capsys.readouterr().out)


def without_threads(shown):
    config, _ = shown.split("\n\n", 1)  # the environments differ
    return [line for line in config.splitlines() if not line.startswith("threads")]


@pytest.mark.parametrize("words", ["--version", "--version info"])
def test_version(capsys, words):
    assert call(*words.split()) == 0
    assert capsys.readouterr().out == f"gemmlet {gemmlet.__version__}\n"


OPTIONS = (
    "data-dir",
    "epochs",
    "batch-size",
    "lr",
    "optimizer",
    "weight-decay",
    "momentum",
    "clip-value",
    "l1",
    "l2",
    "hidden",
    "activation",
    "seed",
    "backend",
    "threads",
    "out",
    "resume",
    "classic",
    "augment",
    "patience",
)
OF_MLP = ("l1", "l2", "patience")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", ["augment", "bench", "evaluate", "info", "predict", "sample", "train"]),
        ("--help", ["augment", "bench", "evaluate", "info", "predict", "sample", "train"]),
        ("-h", ["augment", "bench", "evaluate", "info", "predict", "sample", "train"]),
        ("train", ["mlp", "gan"]),
        ("train --help", ["mlp", "gan"]),
        ("train mlp --help", [f"--{name}" for name in (*OPTIONS, "recipe")]),
        ("train mlp -h", [f"--{name}" for name in (*OPTIONS, "recipe")]),
        ("train gan --help", [f"--{name}" for name in OPTIONS if name not in OF_MLP]),
        ("info --help", ["versions"]),
        ("evaluate --help", ["MODEL", "--data-dir", "--json", "--out", "--backend", "--threads"]),
        ("predict --help", ["MODEL", "IMAGE", "--json", "--backend", "--threads"]),
        ("sample --help", ["GAN", "--count", "--seed", "--out", "--backend", "--threads"]),
        ("augment --help", [f"--{name}" for name in (*nn.Augment().settings._fields, "seed", "out", "data-dir")]),
        ("bench --help", ["--filter", "--quick", "--compare", "--data-dir", "--scaling", "--instructions"]),
    ],
)
def test_help(capsys, words, named):
    assert call(*words.split()) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "Usage: gemmlet" in shown.out
    for name in named:
        assert re.search(rf"^ .*{name}\b", shown.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "code", "needed"),
    [
        ("info", 0, ""),
        ("--version", 0, ""),
        ("train mlp", 1, "train"),
        ("bench --list", 1, "bench"),
        ("evaluate a", 1, "train"),
    ],
)
def test_without_the_extra(words, code, needed):
    extra = ["typer", "rich", "matplotlib", "PIL", "sklearn", "scipy", "safetensors", "pooch", "threadpoolctl"]
    program = f"import sys; sys.modules.update(dict.fromkeys({extra})); from gemmlet.cli import main; main()"
    command = [sys.executable, "-c", program, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    if code:
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert f"pip install 'gemmlet[{needed}]'" in done.stderr
        assert "typer, rich, matplotlib" in done.stderr
    else:
        assert done.stderr == ""
        assert gemmlet.__version__ in done.stdout


@pytest.mark.parametrize("words", ["", "-h", "--help"])
def test_commands_are_listed_without_the_extra(words):
    program = f"import sys; sys.modules.update(typer=None, rich=None, matplotlib=None); {COMMAND}"
    command = [sys.executable, "-c", program, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
    for extra, count in (("train", 5), ("bench", 1)):
        assert done.stdout.count(f"It needs typer, rich, matplotlib: pip install 'gemmlet[{extra}]'") == count


def test_help_shows_the_defaults_of_one_network(capsys):
    shown = {}
    for network in ("mlp", "gan"):
        assert call("train", network, "--help") == 0
        shown[network] = " ".join(capsys.readouterr().out.split())
    assert "[default: 256; with --classic 128]" in shown["mlp"]
    assert "[default: 10]" in shown["mlp"]
    assert "[default: 24; with --classic 30]" in shown["gan"]
    assert "GAN" not in shown["mlp"]
    assert "discriminator" not in shown["mlp"]
    assert not any(f"--{name} " in shown["gan"] for name in (*OF_MLP, "recipe"))


# How results are measured.


def test_roc_curves():
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[0.9, 0.1, 0.5], [0.6, 0.4, 0.5], [0.65, 0.35, 0.5], [0.2, 0.8, 0.5]])
    zero, one = evaluation.roc_curves(labels, scores)  # nothing is of class 2
    assert (zero.label, one.label) == (0, 1)
    assert (zero.auc, one.auc) == (0.75, 0.75)
    assert one.false_positive.tolist() == [0, 0, 0.5, 0.5, 1]
    assert one.true_positive.tolist() == [0, 0.5, 0.5, 1, 1]
    assert evaluation.roc_curves(np.zeros(4, int), scores) == []  # nothing is of another class than 0


def test_classification():
    # Of class 0 two out of three are found, of class 1 one out of one; class 2 is never predicted.
    labels, predicted = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 1])
    probabilities = np.array([[0.9, 0, 0], [0.8, 0, 0], [0.2, 1, 0], [0, 1, 0], [0.3, 0.5, 0]])
    scores = evaluation.classification(labels, predicted, probabilities)
    assert scores == {
        "test_accuracy": pytest.approx(3 / 5),
        "test_accuracy_interval": list(wilson_interval(3, 5)),
        "macro_precision": pytest.approx((1 + 1 / 3 + 0) / 3),
        "macro_recall": pytest.approx((2 / 3 + 1 + 0) / 3),
        "macro_f1": pytest.approx((0.8 + 0.5 + 0) / 3),
        "roc_auc": pytest.approx((5 / 6 + 7 / 8 + 0.5) / 3),
    }
    assert evaluation.classification(labels[:2], predicted[:2], probabilities[:2])["roc_auc"] is None


def test_sample_quality(rng):
    probabilities = np.zeros((4, 10))
    probabilities[[0, 1, 2, 3], [3, 3, 7, 0]] = [1, 0.9, 0.89, 0.4]
    features, real = rng.normal(size=(4, 3)), rng.normal(size=(9, 3))
    assert evaluation.sample_quality(probabilities, features, real) == {
        "confident_share": 0.5,
        "class_shares": [0.25, 0, 0, 0.5, 0, 0, 0, 0.25, 0, 0],
        "frechet_distance": frechet_distance(features, real),
    }


# Pictures of what seldom happens.


@pytest.mark.parametrize(("wrong", "rows"), [(0, 1), (1, 1), (6, 2), (25, 5), (60, 5)])
def test_worst_mistakes(tmp_path, rng, wrong, rows):
    labels = np.arange(60) % 10
    predicted = (labels + (np.arange(60) < wrong)) % 10
    images = np.full((60, 784), 255, np.uint8)
    plots.worst_mistakes(tmp_path / "a.png", images, labels, predicted, rng.random((60, 10)))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1050, 240 * rows + 108)
        black, _ = scipy.ndimage.label(np.asarray(picture.convert("L")) == 0)
    # The images, which are all ink, are larger than any letter.
    assert (np.bincount(black.ravel())[1:] > 10_000).sum() == min(wrong, 25)


def test_worst_mistakes_are_those_it_was_surest_of(tmp_path):
    """The only black image among white ones is the one that is shown."""
    labels, predicted = np.array([1, 1, 1, 1]), np.array([1, 2, 2, 2])
    probabilities = np.full((4, 3), 0.1)
    probabilities[:, 2] = [1, 0.5, 0.8, 0.6]
    inks = []
    for black in range(4):
        images = np.zeros((4, 784), np.uint8)
        images[black] = 255
        plots.worst_mistakes(tmp_path / "a.png", images, labels, predicted, probabilities, most=1)
        inks.append((np.asarray(Image.open(tmp_path / "a.png").convert("L")) == 0).mean())
    assert int(np.argmax(inks)) == 2
    assert inks[2] > 2 * max(inks[i] for i in (0, 1, 3))


def test_confusion_matrix_without_mistakes(tmp_path):
    labels = np.arange(50) % 10
    plots.confusion_matrix(tmp_path / "a.png", labels, labels)
    check_picture(tmp_path / "a.png", MLP_PICTURES["confusion_matrix.png"])


def test_many_epochs(tmp_path):
    losses = np.geomspace(2, 0.1, 2000).tolist()
    plots.gan_losses(tmp_path / "a.png", losses, losses[::-1], 0.1)
    check_picture(tmp_path / "a.png", GAN_PICTURES["loss_curves.png"])


def test_sample_grid_of_incomplete_rows():
    grid = plots.sample_grid(np.array([[-1.0] * 784, [2.0] * 784, [0.5] * 784]), "", columns=2, zoom=1)
    page = np.asarray(grid)[14:]  # below the title
    assert page.shape == (62, 62)
    assert [page[y, x] for y, x in ((2, 2), (29, 29), (2, 32), (29, 59), (32, 2), (32, 32))] == [
        255,
        255,
        0,
        0,
        128,
        255,
    ]
