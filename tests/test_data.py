import gzip
import http.server
import importlib.util
import logging
import os
import shutil
import struct
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from gemmlet.data import load_mnist, mnist

NAMES = tuple(mnist.SHA256)
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES


def idx(values, *, magic=None):
    head = magic or bytes((0, 0, 8, values.ndim))
    return head + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def made_up(train=60, test=30, seed=0):
    """The four files, by name, as bytes."""
    rng = np.random.default_rng(seed)
    return {
        TRAIN_IMAGES: idx(rng.integers(0, 256, (train, 28, 28), np.uint8)),
        TRAIN_LABELS: idx(rng.integers(0, 10, train, np.uint8)),
        TEST_IMAGES: idx(rng.integers(0, 256, (test, 28, 28), np.uint8)),
        TEST_LABELS: idx(rng.integers(0, 10, test, np.uint8)),
    }


@pytest.fixture
def folder(tmp_path):
    for name, content in made_up().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    monkeypatch.delenv("GEMMLET_DATA_DIR", raising=False)


def tool():
    path = Path(__file__).parent.parent / "tools" / "draw_mnist_sample.py"
    spec = importlib.util.spec_from_file_location("draw_mnist_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Folders.


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_folder(tmp_path, zipped, dotted):
    content = made_up()
    for name, values in content.items():
        stem = name.replace("-idx", ".idx") if dotted else name
        (tmp_path / (stem + ".gz" * zipped)).write_bytes(gzip.compress(values) if zipped else values)
    data = load_mnist(tmp_path)
    assert data.x_train.shape == (60, 784)
    assert data.x_test.shape == (30, 784)
    assert data.x_train.dtype == np.uint8
    assert data.y_train.dtype == np.int64
    assert data.x_train.tobytes() == content[TRAIN_IMAGES][16:]
    assert data.x_test.tobytes() == content[TEST_IMAGES][16:]
    assert data.y_train.tolist() == list(content[TRAIN_LABELS][8:])
    assert data.y_test.tolist() == list(content[TEST_LABELS][8:])
    assert data.source == str(tmp_path)
    assert not data.is_sample
    assert data.x_train.flags.writeable


def test_folder_from_environment(folder, monkeypatch):
    monkeypatch.setenv("GEMMLET_DATA_DIR", str(folder))
    assert load_mnist().source == str(folder)


def test_argument_precedes_environment(folder, monkeypatch):
    monkeypatch.setenv("GEMMLET_DATA_DIR", str(folder / "nowhere"))
    assert load_mnist(folder).source == str(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere \(GEMMLET_DATA_DIR\) does not exist"):
        load_mnist()


def test_missing_folder_is_no_silent_fallback(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere \(data_dir\) does not exist"):
        load_mnist(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"file .* is not a folder"):
        load_mnist(tmp_path / "file")


@pytest.mark.parametrize("name", NAMES)
def test_incomplete_folder(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the file {name}"):
        load_mnist(folder)


# Files that are no good: each error names the file, what was found and what was expected.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda b: b"", "begins nowhere"),
        (lambda b: b[:3], "begins 00 00 08"),
        (lambda b: b[:6], "truncated: 6 bytes"),
        (lambda b: b[:-1], "truncated: its header announces"),
        (lambda b: b + b"\0", "corrupt: its header announces"),
        (lambda b: b"\x89PNG" + b[4:], "no IDX file: it begins 89 50 4e 47"),
        (lambda b: b[:2] + b"\x07" + b[3:], "no IDX file: it begins 00 00 07"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "holds float32 values"),
        (lambda b: b[:3] + b"\x02" + b[4:], r"has 2 dimension\(s\) instead of"),
        (lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:], "truncated: its header announces 4294967295"),
        (lambda b: b[:4] + b"\0\0\0\0" + b[8 : 8 if b[3] == 1 else 16], "is empty"),
        (lambda b: gzip.compress(b)[:-9], "is truncated or corrupt"),
        (lambda b: gzip.compress(b)[:12], "is truncated or corrupt"),
        (lambda b: gzip.compress(b)[:-8] + bytes(8), "is truncated or corrupt: CRC"),
        (lambda b: gzip.compress(b)[:10] + b"\xff" * 40, "is truncated or corrupt"),
        (lambda b: b"\x1f\x8b" + b[2:], "is truncated or corrupt"),
        (lambda b: gzip.compress(b[:-5]), "truncated: its header announces"),
    ],
)
def test_bad_file(folder, name, spoil, found):
    path = folder / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=found) as caught:
        load_mnist(folder)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", [TRAIN_IMAGES, TEST_LABELS])
def test_no_more_is_read_than_announced(folder, name, zipped):
    """A hundredfold of zeros behind the values; or a header that announces what is not there."""
    path = folder / name
    content = path.read_bytes()
    for changed, message in (
        (content + bytes(200 << 20), "corrupt: .* but more follow"),
        (content[:4] + b"\xff\xff\xff\xff" + content[8:], "truncated: its header announces 4294967295"),
    ):
        path.write_bytes(gzip.compress(changed, 1) if zipped else changed)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                load_mnist(folder)
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


def test_other_picture_size(folder):
    (folder / TRAIN_IMAGES).write_bytes(idx(np.zeros((60, 32, 32), np.uint8)))
    with pytest.raises(ValueError, match=f"{TRAIN_IMAGES} holds images of 32 × 32 pixels; expected 28 × 28"):
        load_mnist(folder)


def test_more_labels_than_images(folder):
    (folder / TEST_LABELS).write_bytes(idx(np.zeros(31, np.uint8)))
    with pytest.raises(ValueError, match=f"{TEST_LABELS} holds 31 labels, .*{TEST_IMAGES} 30 images"):
        load_mnist(folder)


def test_label_above_nine(folder):
    (folder / TRAIN_LABELS).write_bytes(idx(np.r_[np.zeros(40), 10, np.zeros(19)].astype(np.uint8)))
    with pytest.raises(ValueError, match=f"{TRAIN_LABELS} has the label 10 at position 40; expected digits"):
        load_mnist(folder)


# The download, from servers on the loopback interface.


@contextmanager
def mirror(files, *, status=200, headers=()):
    """An http server of `files` (name without .gz -> content); yields its address and the list of requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            requests.append((self.command, self.path))
            content = files.get(self.path.removeprefix("/mnist/").removesuffix(".gz"))
            self.send_response(status if content is not None else 404)
            for header in headers:
                self.send_header(*header)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if content and self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = answer  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/mnist/", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A cache in a temporary folder, the hashes of made-up files; yields (zipped files, use mirrors, cache)."""
    pytest.importorskip("pooch")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    files = made_up()
    monkeypatch.setattr(mnist, "SHA256", {name: sha256(content).hexdigest() for name, content in files.items()})
    zipped = {name: gzip.compress(content) for name, content in files.items()}
    return zipped, lambda *m: monkeypatch.setattr(mnist, "MIRRORS", m), tmp_path / "cache" / "gemmlet" / "mnist"


def gets(requests):
    return [path for command, path in requests if command == "GET"]


def test_download_and_cache(online, caplog):
    files, use, cache = online
    with mirror(files) as (address, requests):
        use(address)
        data = load_mnist()
        assert len(gets(requests)) == 4
        assert not data.is_sample
        assert data.source == f"the download in {cache}"
        assert data.x_train.tobytes() == gzip.decompress(files[TRAIN_IMAGES])[16:]
        requests.clear()
        assert load_mnist().y_test.tolist() == data.y_test.tolist()
        assert requests == []  # the cache answers
        (cache / TEST_LABELS).write_bytes(b"spoilt")
        assert load_mnist().y_test.tolist() == data.y_test.tolist()
        assert gets(requests) == [f"/mnist/{TEST_LABELS}.gz"]
    assert sorted(os.listdir(cache)) == sorted(NAMES)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(dict.fromkeys(NAMES, b"<html>Please log in</html>"), id="another page"),
        pytest.param({name: gzip.compress(b"something else") for name in NAMES}, id="another file"),
        pytest.param({name: gzip.compress(b"something else")[:-5] for name in NAMES}, id="truncated"),
        pytest.param(dict.fromkeys(NAMES, b"\x1f\x8b" + b"\xff" * 99), id="no gzip"),
        pytest.param({}, id="404"),
    ],
)
def test_next_mirror(online, garbage):
    files, use, cache = online
    with mirror(garbage) as (bad, bad_requests), mirror(files) as (good, good_requests):
        use(bad, good)
        assert not load_mnist().is_sample
    assert len(gets(bad_requests)) == 1
    assert len(gets(good_requests)) == 4
    assert sorted(os.listdir(cache)) == sorted(NAMES)


def test_mirror_fails_half_way(online):
    files, use, _ = online
    half = {**files, TEST_IMAGES: b"broken"}
    with mirror(half) as (first, _), mirror(files) as (second, requests):
        use(first, second)
        assert not load_mnist().is_sample
    assert gets(requests) == [f"/mnist/{TEST_IMAGES}.gz", f"/mnist/{TEST_LABELS}.gz"]


def test_refusing_server(online):
    files, use, _ = online
    with mirror(files, status=503) as (bad, _), mirror(files) as (good, _):
        use(bad, good)
        assert not load_mnist().is_sample


def test_transfer_encoding_gzip(online):
    files, use, _ = online
    with mirror(files, headers=[("Content-Encoding", "gzip")]) as (address, _):
        use(address)
        assert not load_mnist().is_sample


def test_no_mirror_gives_the_sample_with_one_line(online, caplog):
    _, use, cache = online
    with mirror({}) as (bad, _):
        use(bad, "http://127.0.0.1:9/mnist/")
        data = load_mnist()
    assert data.is_sample
    (record,) = [r for r in caplog.records if r.name == "gemmlet"]
    text = record.getMessage()
    assert record.levelno == logging.WARNING
    assert "5000 training and 1000 test" in text
    assert "404" in text
    assert "127.0.0.1:9: cannot be reached" in text
    assert "--data-dir" in text
    assert "\n" not in text
    assert not cache.exists() or not os.listdir(cache)


def test_silent_mirror_is_not_waited_for(online, monkeypatch, caplog):
    _, use, _ = online
    monkeypatch.setattr(mnist, "_ANSWER_SECONDS", 2.0)
    # A socket that takes connections and never answers.
    with http.server.socketserver.TCPServer(("127.0.0.1", 0), None) as server:
        use(*[f"http://127.0.0.1:{server.server_address[1]}/mnist{i}/" for i in range(5)])
        start = time.monotonic()
        assert load_mnist().is_sample
        assert time.monotonic() - start < 8.0  # not five times 2
    assert "no answer" in caplog.text
    time.sleep(0.2)  # let the threads that still wait end


def test_cache_that_cannot_be_written(online, tmp_path, caplog):
    files, use, _ = online
    (tmp_path / "cache").write_bytes(b"a file, where the folder should be")
    with mirror(files) as (address, _):
        use(address)
        assert load_mnist().is_sample
    assert "no download" in caplog.text


def test_a_mirror_sends_much_more(online, monkeypatch):
    files, use, _ = online
    monkeypatch.setattr(mnist, "_LARGEST", 1 << 16)
    with mirror(dict.fromkeys(NAMES, gzip.compress(bytes(64 << 20)))) as (bad, _), mirror(files) as (good, _):
        use(bad, good)
        tracemalloc.start()
        try:
            assert not load_mnist().is_sample
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


def no_home(*_):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("cache", [lambda project: Path("~/.cache") / project, no_home], ids=["tilde", "error"])
def test_without_a_home(online, monkeypatch, caplog, cache):
    """As in a container that runs as a user whom it does not know; what asks for the folder differs among versions."""
    monkeypatch.setattr("pooch.os_cache", cache)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert load_mnist(download=True).is_sample
    assert "set HOME, or XDG_CACHE_HOME" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"~/mnist \(data_dir\) names a home folder that is not known"):
        load_mnist("~/mnist")


def test_without_pooch(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert load_mnist().is_sample
    assert "pip install 'gemmlet[train]'" in caplog.text


def test_download_switched_off(monkeypatch, caplog):
    monkeypatch.setattr(mnist, "_download", lambda: pytest.fail("it downloads"))
    assert load_mnist(download=False).is_sample
    assert "switched off" in caplog.text


# The embedded sample, and the script that drew it.


def test_sample():
    data = load_mnist(download=False)
    assert data.x_train.shape == (5000, 784)
    assert data.x_test.shape == (1000, 784)
    # How many there are of each digit in MNIST.
    train = np.array([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]) / 12
    test = np.array([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]) / 10
    assert np.abs(np.bincount(data.y_train) - train).max() < 1
    assert np.abs(np.bincount(data.y_test) - test).max() < 1
    # Pictures of ink on an empty background, all different.
    assert data.x_train.max() == 255
    assert 0.78 < (data.x_train == 0).mean() < 0.84
    assert len(np.unique(np.concatenate([data.x_train, data.x_test]), axis=0)) == 6000


def test_sample_is_a_data_folder():
    folder = Path(mnist.__file__).parent / "sample"
    assert len(load_mnist(folder).y_train) == 5000


def test_draw_is_stratified():
    draw = tool()
    rng = np.random.default_rng(1)
    labels = rng.choice(10, 3000, p=np.arange(1, 11) / 55)
    chosen = draw.draw(labels, 500, rng)
    assert len(np.unique(chosen)) == 500
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(labels[chosen], minlength=10)
    assert np.abs(counts - np.bincount(labels) / 6).max() < 1
    assert draw.draw(labels, 3000, rng).tolist() == list(range(3000))
    with pytest.raises(ValueError, match="count is 3001"):
        draw.draw(labels, 3001, rng)


def test_draw_is_deterministic(tmp_path):
    draw = tool()
    source = tmp_path / "source"
    source.mkdir()
    for name, content in made_up(300, 100).items():
        (source / name).write_bytes(content)
    for target in ("one", "two"):
        draw.write_sample(source, tmp_path / target, 50, 20)
    draw.write_sample(source, tmp_path / "other", 50, 20, seed=1)
    for name in NAMES:
        one, two, other = ((tmp_path / t / f"{name}.gz").read_bytes() for t in ("one", "two", "other"))
        assert one == two
        assert one != other
        assert one[4:8] == bytes(4)  # no time stamp
    drawn, whole = load_mnist(tmp_path / "one"), load_mnist(source)
    assert len(drawn.y_train) == 50
    # Every digit that was drawn is one of the source's, with its label.
    rows = {x.tobytes(): y for x, y in zip(whole.x_train, whole.y_train, strict=True)}
    assert all(rows[x.tobytes()] == y for x, y in zip(drawn.x_train, drawn.y_train, strict=True))


def test_folder_is_not_written_to(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    load_mnist(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    shutil.rmtree(folder)
