"""What the tests of the command share: digits to learn, and ways to call it."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

import gemmlet
from gemmlet import cli
from gemmlet.backends import select
from gemmlet.data import mnist

for package in ("typer", "rich", "matplotlib", "threadpoolctl"):
    pytest.importorskip(package)

import threadpoolctl  # noqa: E402
from PIL import Image  # noqa: E402

from gemmlet.bench.suite import BLAS_VARIABLES  # noqa: E402
from gemmlet.cli.signals import STOPS  # noqa: E402
from support import PATIENCE  # noqa: E402

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = mnist.SHA256


def idx(values):
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_digits(folder, train=200, test=80, seed=0):
    """Write the four files: of each class noise around a pattern, which some images hide, so that mistakes remain."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (10, 28, 28))
    folder.mkdir(exist_ok=True)
    for count, images, labels in ((train, TRAIN_IMAGES, TRAIN_LABELS), (test, TEST_IMAGES, TEST_LABELS)):
        y = np.arange(count) % 10
        share = rng.uniform(0.1, 0.5, (count, 1, 1))
        x = share * patterns[y] + (1 - share) * rng.integers(0, 256, (count, 28, 28))
        (folder / images).write_bytes(idx(x.astype(np.uint8)))
        (folder / labels).write_bytes(idx(y.astype(np.uint8)))
    return folder


# What changes results, or how rich prints them; and for what `gemmlet bench` starts anew, which would end the tests.
VARIABLES = ("GEMMLET_DATA_DIR", "GEMMLET_BACKEND", "GEMMLET_ISA", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
VARIABLES += BLAS_VARIABLES


@contextlib.contextmanager
def process_restored():
    """Undo what the command line does to the process: the backend, the threads of the kernels and of the BLAS."""
    backend, threads = select._current, gemmlet.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in STOPS}
    with pytest.MonkeyPatch.context() as patch, threadpoolctl.threadpool_limits():
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        # Nothing here may touch the network.
        patch.setattr(mnist, "_download", lambda: pytest.fail("it downloads"))
        # Ctrl-C would do nothing in tests that were started with it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            select._current = backend
            gemmlet.set_num_threads(threads)


@pytest.fixture(autouse=True)
def undone(tmp_path):
    # Not by the fixture monkeypatch: what a test patches with it must be undone before this is.
    with process_restored(), contextlib.chdir(tmp_path):
        yield


def call(*words):
    """Run the command in this process and return its exit status; signals do what they did before."""
    handlers = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    assert [signal.getsignal(number) for number in STOPS] == handlers
    return caught.value.code


def error_line(capsys):
    """The one line on stderr, which is all that an error prints."""
    text = capsys.readouterr().err
    assert text.startswith("gemmlet: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


# With Ctrl-C and a hangup as they are in a shell, however the tests were started.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); from gemmlet.cli import main; main()"
)


@contextlib.contextmanager
def start(*words, stdout=subprocess.PIPE, **environment):
    """The command as a process of its own, which the block does not leave behind."""
    # What Python prints then waits in a buffer, as it does for users.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=inherited | environment,
    ) as process:
        try:
            yield process
            process.wait(timeout=PATIENCE)  # one that has printed all may still be about to end
        finally:
            process.kill()


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def names_in(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def check_picture(path, size=(None, None)):
    """It has the size that is given, and is more than a blank page."""
    with Image.open(path) as picture:
        for length, expected in zip(picture.size, size, strict=True):
            assert expected in (None, length)
        pixels = np.asarray(picture.convert("L"))
    assert pixels.min() < 100
    assert pixels.max() == 255
    assert (pixels != 255).mean() > 0.01
