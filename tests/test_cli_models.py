"""`gemmlet evaluate`, `predict` and `sample`, of networks that were trained, and `augment`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image, ImageDraw

from cli_support import (
    TEST_IMAGES,
    TEST_LABELS,
    call,
    check_picture,
    error_line,
    idx,
    names_in,
    undone,  # noqa: F401 - it is a fixture
    write_digits,
)
from gemmlet import metrics, nn
from gemmlet.cli import predict
from gemmlet.data import augment, load_mnist

PICTURES = {
    "confusion_matrix.png": (840, 792),
    "roc_curves.png": (1140, 624),
    "precision_recall_curves.png": (1140, 624),
    "reliability.png": (720, 768),
    "worst_mistakes.png": (1050, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "folder")


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """The file of a network that has learnt a little, in a folder as a training leaves it."""
    out = tmp_path_factory.mktemp("runs") / "mlp"
    out.mkdir()
    train(folder, epochs=2).save(out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def better(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "better.safetensors"
    train(folder, epochs=6).save(path)
    return path


def train(folder, epochs, **settings):
    data = load_mnist(folder)
    model = nn.MLP([784, 32, 10], "relu", seed=3, **settings)
    model.fit(data.x_train, data.y_train, epochs=epochs, batch_size=20)
    return model


def evaluated(capsys, *words):
    assert call("evaluate", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


# evaluate.


def test_evaluation_is_that_of_scikit_learn(model, folder, capsys):
    found = evaluated(capsys, model, "--data-dir", folder)
    data, network = load_mnist(folder), nn.MLP.load(model / "model.safetensors")
    y, predicted, p = data.y_test, network.predict(data.x_test), network.predict_proba(data.x_test).astype(np.float64)
    report = sklearn.metrics.classification_report(y, predicted, output_dict=True, zero_division=0.0)
    assert (found["data"], found["test_images"], found["layers"]) == (str(folder), 80, [784, 32, 10])
    assert 0.2 < found["accuracy"] < 1
    assert found["accuracy"] == report["accuracy"]
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    every = [(found["classes"][i], report[str(i)]) for i in range(10)]
    every += [(found["macro"], report["macro avg"]), (found["weighted"], report["weighted avg"])]
    for ours, theirs in every:
        assert [ours[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(
            [theirs[name] for name in ("precision", "recall", "f1-score", "support")], rel=1e-12
        )
    area = sklearn.metrics.roc_auc_score(y, p / p.sum(axis=1, keepdims=True), multi_class="ovr")
    assert found["macro"]["roc_auc"] == pytest.approx(area, rel=1e-6)
    assert found["confusion_matrix"] == sklearn.metrics.confusion_matrix(y, predicted).tolist()
    assert found["top_2_accuracy"] == sklearn.metrics.top_k_accuracy_score(y, p, k=2)
    assert found["log_loss"] == pytest.approx(-np.log(p[np.arange(80), y]).mean(), rel=1e-9)
    own, which = p.max(axis=1), np.ceil(p.max(axis=1) * found["calibration_bins"])
    right = predicted == y
    error = sum((which == i).mean() * abs(own[which == i].mean() - right[which == i].mean()) for i in np.unique(which))
    assert found["calibration_error"] == pytest.approx(error, abs=1e-12)
    for name, value in (("macro_f1_interval", found["macro"]["f1"]), ("roc_auc_interval", found["macro"]["roc_auc"])):
        assert found[name][0] < value < found[name][1]
    assert evaluated(capsys, model, "--data-dir", folder) == found  # intervals are seeded


def test_what_is_printed(model, folder, capsys, tmp_path):
    assert call("evaluate", model, "--data-dir", folder, "--out", tmp_path / "new" / "out") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "new" / "out" / "evaluation.json").read_text())
    assert f"Data: {folder} (80 test images)" in printed
    low, high = content["accuracy_interval"]
    assert f"\naccuracy {content['accuracy']:.2%} (95 %: {low:.2%} to {high:.2%})\n" in printed
    assert re.search(r"^class +precision +recall +F1 +support +ROC AUC$", printed, re.MULTILINE)
    for scores in (*content["classes"], content["macro"], content["weighted"]):
        assert re.search(
            rf"^{scores['label']} +{scores['precision']:.2%} +{scores['recall']:.2%} ", printed, re.MULTILINE
        )
    assert f"log loss {content['log_loss']:.4f}, Brier score {content['brier_score']:.4f}" in printed
    matrix = np.array(content["confusion_matrix"])
    most = (matrix - np.diag(np.diag(matrix))).max()
    assert re.search(rf"^most mistakes: \d as \d \({most}\);", printed, re.MULTILINE)
    assert names_in(tmp_path / "new" / "out") == {"evaluation.json", *PICTURES}
    for name, size in PICTURES.items():
        check_picture(tmp_path / "new" / "out" / name, size)


def test_two_models(model, better, folder, capsys):
    found = evaluated(capsys, model, better, "--data-dir", folder)
    data = load_mnist(folder)
    a, b = (nn.MLP.load(path).predict(data.x_test) == data.y_test for path in (model / "model.safetensors", better))
    assert [each["accuracy"] for each in found["models"]] == [a.mean(), b.mean()]
    corrects, spoils = int((b & ~a).sum()), int((a & ~b).sum())
    assert corrects > spoils
    p = metrics.mcnemar(data.y_test, *(np.where(each, data.y_test, 11) for each in (a, b))).p_value
    assert found["comparison"] == {"corrects": corrects, "spoils": spoils, "p_value": p}
    assert call("evaluate", model, better, "--data-dir", folder) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    wanted = f"{better} corrects {corrects} of the mistakes of {model}, and spoils {spoils} "
    assert last == f"{wanted}(McNemar's exact test: p = {p:.2g})"


def test_a_sigmoid_network(folder, tmp_path, capsys):
    """Its probabilities do not add up to 1, and have no log loss."""
    train(folder, 2, output="sigmoid").save(tmp_path / "model.safetensors")
    assert evaluated(capsys, tmp_path / "model.safetensors", "--data-dir", folder)["log_loss"] is None
    assert call("evaluate", tmp_path / "model.safetensors", "--data-dir", folder) == 0
    assert "log loss" not in capsys.readouterr().out


def test_labels_that_are_strings(folder, tmp_path, capsys):
    data = load_mnist(folder)
    network = nn.MLP([784, 16, 10], "relu", classes=[str(i) for i in range(10)])
    network.fit(data.x_train, data.y_train.astype(str), epochs=2, batch_size=20)
    network.save(tmp_path / "model.safetensors")
    found = evaluated(capsys, tmp_path / "model.safetensors", "--data-dir", folder)
    assert found["accuracy"] == (network.predict(data.x_test) == data.y_test.astype(str)).mean()


def test_an_onnx_file(model, folder, tmp_path, capsys):
    pytest.importorskip("onnx")
    nn.MLP.load(model / "model.safetensors").to_onnx(tmp_path / "net.onnx")
    found, wanted = (evaluated(capsys, path, "--data-dir", folder) for path in (tmp_path / "net.onnx", model))
    assert {**found, "model": None} == {**wanted, "model": None}


def test_one_image(model, tmp_path, capsys):
    """Without an image of most classes there are no areas, and JSON has no NaN."""
    found = evaluated(capsys, model, "--data-dir", write_digits(tmp_path / "one", 1, 1))
    assert found["macro"]["roc_auc"] is None
    assert found["macro_f1_interval"] == [found["macro"]["f1"]] * 2  # over the classes that occur
    assert found["roc_auc_interval"] == [None, None]
    assert call("evaluate", model, "--data-dir", tmp_path / "one", "--out", tmp_path / "out") == 0
    assert "macro F1" in capsys.readouterr().out
    assert names_in(tmp_path / "out") == {"evaluation.json", *PICTURES}


def test_two_classes_alone(model, tmp_path, capsys):
    """What is said of the whole and its interval are over the same classes."""
    folder = write_digits(tmp_path / "two", 20, 60)
    (folder / TEST_LABELS).write_bytes(idx(np.repeat([3, 7], 30).astype(np.uint8)))
    found = evaluated(capsys, model, "--data-dir", folder)
    low, high = found["macro_f1_interval"]
    assert low <= found["macro"]["f1"] <= high
    assert len(found["classes"]) == 10


# predict.


def predicted(capsys, *words):
    assert call("predict", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_an_idx_file(model, folder, capsys):
    found = predicted(capsys, model, folder / TEST_IMAGES)
    network, data = nn.MLP.load(model / "model.safetensors"), load_mnist(folder)
    assert [each["label"] for each in found] == network.predict(data.x_test).tolist()
    probabilities = network.predict_proba(data.x_test)
    for i, each in enumerate(found):
        assert each["image"] == f"{folder / TEST_IMAGES}[{i}]"
        assert next(iter(each["probabilities"])) == str(each["label"])
        for label, p in each["probabilities"].items():
            assert p == pytest.approx(float(probabilities[i, int(label)]), rel=1e-6)
        values = list(each["probabilities"].values())
        assert values[1:] == sorted(values[1:], reverse=True)


def test_pictures(model, folder, tmp_path, capsys):
    """Of 28 × 28 pixels one is taken as it is; dark on light, coloured or with transparent paper it is the same one."""
    image = load_mnist(folder).x_test[3].reshape(28, 28).copy()
    image[[0, -1]] = image[:, [0, -1]] = 0  # MNIST has a border
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(255 - image).save(tmp_path / "b.png")
    Image.fromarray(np.stack([image] * 3, axis=2)).save(tmp_path / "c.png")
    transparent = np.stack([np.zeros_like(image)] * 3 + [image], axis=2)
    Image.fromarray(transparent).save(tmp_path / "d.png")
    names = [tmp_path / f"{name}.png" for name in "abcd"]
    for name in names:
        np.testing.assert_array_equal(predict.digit_of(name), image)
    assert call("predict", model, *names) == 0
    lines = capsys.readouterr().out.splitlines()
    probabilities = nn.MLP.load(model / "model.safetensors").predict_proba(image.reshape(1, -1))[0]
    first, second = np.argsort(-probabilities)[:2]
    says = f"{first} ({probabilities[first]:.1%} sure; then {second}, {probabilities[second]:.1%})"
    assert lines == [f"{name}: {says}" for name in names]


@pytest.mark.parametrize("width", [60, 300, 1200])
def test_a_photo_is_scaled_as_mnist_was(width, tmp_path):
    """The digit fits into 20 × 20 pixels, and its centre of mass is that of the image, wherever it stands."""
    page = Image.new("RGB", (width, width), (250, 248, 240))
    pen = ImageDraw.Draw(page)
    pen.line(
        [(0.2 * width, 0.1 * width), (0.5 * width, 0.1 * width), (0.3 * width, 0.8 * width)], (20, 20, 90), width // 15
    )
    page.save(tmp_path / "seven.jpg", quality=95)
    image = predict.digit_of(tmp_path / "seven.jpg")
    assert (image.shape, image.dtype) == ((28, 28), np.uint8)
    rows, columns = (np.flatnonzero((image > 64).any(axis=axis)) for axis in (1, 0))
    assert 19 <= rows[-1] - rows[0] + 1 <= 20
    assert columns[-1] - columns[0] + 1 < 16
    mass = image.astype(float)
    for axis in (0, 1):
        assert abs((mass.sum(axis=1 - axis) @ np.arange(28)) / mass.sum() - 13.5) <= 0.6
    assert image.max() > 200


def photo(path, *, size=300, ground=245, ink=20, slope=0.0, width=0.07, mirror=None, speck=False, exif=None):
    """A seven on some ground, which gets darker to the right by `slope`."""
    page = Image.new("L", (4 * size, 4 * size), 0)
    pen = ImageDraw.Draw(page)
    line = [(0.2 * 4 * size, 0.15 * 4 * size), (0.6 * 4 * size, 0.15 * 4 * size), (0.35 * 4 * size, 0.8 * 4 * size)]
    pen.line(line, 255, max(1, round(width * 4 * size)), joint="curve")
    share = np.asarray(page.resize((size, size), Image.Resampling.BOX)) / 255
    light = ground - slope * np.arange(size) / size
    pixels = (1 - share) * light + share * ink
    if speck:
        pixels[size - 3, size - 3] = ink
    image = Image.fromarray(pixels.astype(np.uint8))
    more = {}
    if exif is not None:
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = exif
        image = image.transpose({6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[exif])
    image.save(path, **more)
    return predict.digit_of(path).astype(int)


@pytest.mark.parametrize(
    "how",
    [
        {"ground": 120},
        {"ground": 140, "ink": 255},
        {"ground": 0, "ink": 255},
        {"slope": 110},
        {"ground": 255, "slope": 60, "ink": 0},
        {"width": 0.01, "size": 1000},
        {"speck": True, "size": 1000},
        {"exif": 6},
        {"exif": 3},
        {"size": 80},
        {"size": 1500},
    ],
    ids=str,
)
def test_the_same_digit_on_any_page(how, tmp_path):
    wanted, found = photo(tmp_path / "a.png"), photo(tmp_path / "b.png", **how)
    # A thin line is thinner, a small picture coarser, and all of them are in the same place.
    assert found.max() == 255
    least = 0.6 if how.get("width", 1) < 0.05 else 0.85 if how.get("size", 300) < 100 else 0.95
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > least


def test_one_image_that_cannot_be_read_stops_no_other(model, folder, tmp_path, capsys):
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    words = ["predict", model, tmp_path / "b.png", tmp_path / "a.png", tmp_path / "c.png", folder / TEST_IMAGES]
    assert call(*words) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 81
    assert shown.err.count("\n") == 1
    assert f"{tmp_path / 'b.png'}" in shown.err
    assert "(and 1 more)" in shown.err


@pytest.mark.parametrize("mode", ["I;16", "F", "P", "LA", "1"])
def test_pictures_of_any_kind(mode, tmp_path):
    page = Image.new("L", (100, 100), 0)
    ImageDraw.Draw(page).line([(50, 20), (50, 80)], 255, 9)
    values = np.asarray(page).astype(float)
    if mode in ("I;16", "F"):
        image = Image.fromarray((values * 257).astype(np.uint16)) if mode == "I;16" else Image.fromarray(values / 255)
    elif mode == "LA":  # white ink on nothing
        image = Image.merge("LA", [Image.new("L", page.size, 255), page])
    else:
        image = page.convert(mode)
    path = tmp_path / ("a.tif" if mode == "F" else "a.png")
    image.save(path)
    digit = predict.digit_of(path)
    assert digit[10, 13:15].max() == 255
    assert digit[:, :8].max() == digit[:, 20:].max() == 0


# sample.


def test_samples(tmp_path, capsys):
    gan = nn.GAN(generator=[32, 784], discriminator=[16, 1], seed=1)
    gan.save(tmp_path / "gan.safetensors")
    words = ["sample", tmp_path / "gan.safetensors", "-n", 20, "--seed", 4]
    assert call(*words, "--out", tmp_path / "a.png") == 0
    assert capsys.readouterr().out == f"20 samples: {tmp_path / 'a.png'}\n"
    check_picture(tmp_path / "a.png", (604, 152))
    assert call(*words, "--out", tmp_path / "b.png") == 0
    assert call(*words[:-1], 5, "--out", tmp_path / "c.png") == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_samples_of_a_digit_and_interpolations(tmp_path, capsys):
    gan = nn.GAN(generator=[32, 784], discriminator=[16, 1], n_classes=10, seed=1)
    gan.save(tmp_path / "gan.safetensors")
    words = ["sample", tmp_path / "gan.safetensors", "-n", 20, "--seed", 4]
    pictures = {}
    for name, more in (
        ("all", []),
        ("7", ["--digit", 7]),
        ("ways", ["--interpolate"]),
        ("of 7", ["--interpolate", "--digit", 7]),
    ):
        path = tmp_path / f"{name}.png"
        assert call(*words, *more, "--out", path) == 0
        what = "interpolations" if "--interpolate" in more else "samples"
        assert capsys.readouterr().out == f"20 {what}: {path}\n"
        check_picture(path, (604, 1232 if "--interpolate" in more else 152))
        pictures[name] = np.asarray(Image.open(path))
    cells = {name: digits_of(picture) for name, picture in pictures.items()}
    noise = gan.noise(20, seed=4)
    for name, label in (("all", None), ("7", 7)):
        np.testing.assert_allclose(cells[name], 1 - gan.sample(z=noise, label=label), atol=0.003)
    # The row of a digit begins with its sample; from there it leads to the noise of the next.
    np.testing.assert_allclose(cells["ways"][::10], cells["all"])
    np.testing.assert_allclose(cells["of 7"][::10], cells["7"])
    np.testing.assert_allclose(cells["of 7"][9::10], np.roll(cells["7"], -1, axis=0))


def digits_of(picture):
    """The cells of a grid of ten columns, rows (n, 784)."""
    page = picture[28::2, ::2] / 255  # after the title; each pixel is four
    rows = (len(page) - 2) // 30
    return np.stack(
        [page[2 + 30 * r : 30 + 30 * r, 2 + 30 * c : 30 + 30 * c].ravel() for r in range(rows) for c in range(10)]
    )


# augment.


def test_augmented_digits(folder, tmp_path, capsys):
    words = ["augment", "--data-dir", folder, "--seed", 4, "--noise", 3]
    assert call(*words, "--out", tmp_path / "a.png") == 0
    settings = "rotate=12.0, scale=0.12, shear=0.12, shift=1.0, elastic=1.2, noise=3.0, erase=0.0"
    assert capsys.readouterr().out == f"Augment({settings}): {tmp_path / 'a.png'}\n"
    check_picture(tmp_path / "a.png", (604, 632))
    assert call(*words, "--backend", "numpy", "--out", tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # Below the title, without the gaps: the digits themselves, and in the last row and column that of the last epoch.
    cells = 255 - np.asarray(Image.open(tmp_path / "a.png"))[32::2, 4::2]
    digits = load_mnist(folder).x_train[:10].reshape(10, 28, 28)
    assert (cells[:28, :28] == digits[0]).all()
    expected = augment(digits, **vars(nn.Augment(noise=3)), seed=4, epoch=8)[9]
    assert (cells[270:298, 270:298] == expected).all()


# What cannot be used.


@pytest.fixture
def files(tmp_path, folder, model):
    """Files by the names that the table below has in braces."""
    nn.MLP([10, 4, 2]).save(tmp_path / "small")
    nn.MLP([784, 10], output="identity").save(tmp_path / "numbers")
    nn.MLP([784, 10], classes=list("abcdefghij")).save(tmp_path / "names")
    spoilt = nn.MLP([784, 10])
    spoilt.parameters[0][5, 5] = np.nan
    spoilt.save(tmp_path / "spoilt")
    Image.new("1", (14000, 14000), 1).save(tmp_path / "bomb.png")
    nn.GAN(generator=[16, 784], discriminator=[16, 1]).save(tmp_path / "gan")
    nn.GAN(generator=[16, 10], discriminator=[16, 1]).save(tmp_path / "small_gan")
    (tmp_path / "text").write_text("seven")
    (tmp_path / "empty").mkdir()
    Image.new("L", (90, 90), 255).save(tmp_path / "blank.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "blank.png").read_bytes()[:60])
    (tmp_path / "wide").write_bytes(idx(np.zeros((2, 28, 29), np.uint8)))
    names = {path.stem: path for path in tmp_path.iterdir()}
    return names | {"model": model, "data": folder, "images": folder / TEST_IMAGES}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate {missing}", "{missing} does not exist"),
        ("evaluate {empty}", "model.safetensors does not exist, which gemmlet train leaves in {empty}"),
        ("evaluate {text}", "{text} is corrupt, or no file of a gemmlet MLP"),
        ("evaluate {small}", "expected a network from 784 pixels to the probabilities of ten digits"),
        ("evaluate {numbers}", "expected a network from 784 pixels to the probabilities of ten digits"),
        ("evaluate {gan}", "it holds a GAN"),
        ("evaluate {names}", "has the classes 'a', 'b',"),
        ("evaluate {spoilt}", "{spoilt} has parameters that are not finite"),
        ("predict {model} {bomb}", "{bomb}"),
        ("predict {spoilt} {images}", "{spoilt} has parameters that are not finite"),
        ("evaluate {model} {model} {model}", "expected one model, or two to compare, got 3"),
        ("evaluate {model} --data-dir {missing}", "{missing} (--data-dir) does not exist"),
        ("evaluate {model} --out {text}", "{text} is a file, expected a folder"),
        ("evaluate {model} --threads 0", "--threads must be from 1 to 1,024, got 0"),
        ("evaluate {model} --backend none", "--backend"),
        ("predict {model}", "IMAGE"),
        ("predict {model} {missing}", "{missing} does not exist"),
        ("predict {model} {text}", "{text}"),
        ("predict {model} {cut}", "{cut}"),
        ("predict {model} {blank}", "no digit stands out from its ground"),
        ("predict {model} {wide}", "images of 28 × 29 pixels"),
        ("predict {model} {empty}", "{empty} is a folder, expected an image"),
        ("predict {gan} {images}", "it holds a GAN"),
        ("sample {model}", "it holds a MLP"),
        ("sample {small_gan}", "makes samples of 10 numbers, expected 784 pixels"),
        ("sample {gan} -n 0", "-n must be from 1 to 10,000, got 0"),
        ("sample {gan} --seed -1", "--seed must be at least 0, got -1"),
        ("sample {gan} --digit 10", "--digit must be from 0 to 9, got 10"),
        ("sample {gan} --digit 3", "was trained without labels of this digit: leave out --digit"),
        ("sample {gan} --out samples.jpg", "expected a name that ends in .png"),
        ("augment --rotate 200", "--rotate must be within [0, 180], got 200.0"),
        ("augment --noise nan", "--noise must be within [0, 255], got nan"),
        ("augment --erase many", "'many' is no number"),
        ("augment --seed -1", "--seed must be from 0 to 2**64 - 1, got -1"),
        ("augment --out grid", "--out grid: expected a name that ends in .png"),
        ("augment --data-dir {empty}", "{empty} lacks the file train-images-idx3-ubyte"),
        ("sample {gan} --out {missing}/a.png", "there is no folder {missing}"),
    ],
)
def test_what_cannot_be_used(words, message, files, tmp_path, capsys):
    names = files | {"missing": tmp_path / "missing"}
    before = set(tmp_path.iterdir())
    assert call(*(word.format(**names) for word in words.split())) == 2
    assert message.format(**names) in error_line(capsys)
    assert set(tmp_path.iterdir()) == before
