"""Files of networks, the format safetensors, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemmlet import _files
from gemmlet._files import check_replaceable, replacing
from gemmlet.nn import GAN, MLP, files, safetensors
from support import PATIENCE, same_bits

DTYPES = [np.dtype(dtype) for dtype in safetensors._DTYPES.values()]

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
names = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
tensors = st.dictionaries(names, hnp.arrays(st.sampled_from(DTYPES), shapes), max_size=5)
strings = st.text(st.characters(codec="utf-8"), max_size=9)
metadata = st.dictionaries(strings, strings, max_size=3)


def dumped(arrays: dict[str, Any], strings: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    safetensors.dump(file, arrays, strings or {})
    return file.getvalue()


def same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and same_bits(a[k], b[k]) for k in a)


# The format, from both sides.


@given(tensors, metadata)
def test_the_other_side_reads_what_is_written(arrays: dict[str, Any], strings: dict[str, str]) -> None:
    theirs = pytest.importorskip("safetensors.numpy")
    content = dumped(arrays, strings)
    assert same_tensors(theirs.load(content), arrays)
    assert int.from_bytes(content[:8], "little") % 8 == 0
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.get("__metadata__", {}) == strings


@given(tensors, metadata)
def test_what_the_other_side_writes_is_read(arrays: dict[str, Any], strings: dict[str, str]) -> None:
    theirs = pytest.importorskip("safetensors.numpy")
    found, loaded = safetensors.load(io.BytesIO(theirs.save(arrays, strings or None)))
    assert found == strings
    assert same_tensors(loaded, arrays)
    assert all(array.flags.aligned and array.flags.writeable and array.dtype.isnative for array in loaded.values())


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.arange(9.0)[::2], np.arange(3, dtype=">f8")])
def test_layouts_and_byte_orders(array: Any) -> None:
    _, loaded = safetensors.load(io.BytesIO(dumped({"a": array})))
    np.testing.assert_array_equal(loaded["a"], array)
    assert loaded["a"].dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(2, complex)}, "tensor 'a' of dtype complex128"),
        ({"a": np.array([None])}, "tensor 'a' of dtype object"),
        ({"__metadata__": np.zeros(2)}, "tensor '__metadata__'"),
    ],
)
def test_what_has_no_place_is_refused(arrays: dict[str, Any], message: str) -> None:
    file = io.BytesIO()
    with pytest.raises(ValueError, match=message):
        safetensors.dump(file, arrays, {})
    assert file.getvalue() == b""


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


def of_header(header: Any, buffers: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffers


TERABYTES = 1 << 43
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not even the length"),
    "seven bytes": (bytes(7), "not even the length"),
    "longer than allowed": (struct.pack("<Q", 100_000_001), "header would have 100,000,001 bytes"),
    "2^64 - 1": (b"\xff" * 8, "header would have"),
    "header cut": (struct.pack("<Q", 99_999_999) + b"{", "header is not all there"),
    "list": (of_header([]), "no JSON object"),
    "not UTF-8": (of_header(b'{"\xff": 1}'), "utf-8"),
    "no JSON": (of_header(b"{"), "Expecting"),
    "deep list": (of_header(b"[" * 100_000), "nested too deeply"),
    "deep object": (of_header(b'{"a":' * 100_000), "nested too deeply"),
    "name twice": (of_header(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)), "name twice"),
    "NaN": (of_header(b'{"a": NaN}'), "number NaN"),
    "huge number": (of_header(b'{"a": %s}' % (b"9" * 5000)), "digits"),
    "metadata no object": (of_header({"__metadata__": []}), "metadata are no strings"),
    "metadata no strings": (of_header({"__metadata__": {"a": 1}}), "metadata are no strings"),
    "entry no object": (of_header({"a": 3}), "must have dtype, shape and data_offsets"),
    "entry lacks": (of_header({"a": {"dtype": "F32"}}), "must have dtype, shape and data_offsets"),
    "unknown dtype": (of_header({"a": entry(dtype="BF16")}), "has the dtype 'BF16'"),
    "dtype a list": (of_header({"a": entry(dtype=[])}), r"has the dtype \[\]"),
    "negative size": (of_header({"a": entry(shape=[-2, -2])}), "no lists of sizes"),
    "bool as size": (of_header({"a": entry(shape=[True, 4])}), "no lists of sizes"),
    "float as size": (of_header({"a": entry(shape=[2.0, 2])}), "no lists of sizes"),
    "many dimensions": (of_header({"a": entry(shape=[1 << 62] * 100_000)}), "no lists of sizes"),
    "empty, sides beyond an array": (of_header({"a": entry(shape=[0, 1 << 62], data_offsets=[0, 0])}, b""), "array is"),
    "three offsets": (of_header({"a": entry(data_offsets=[0, 8, 16])}), "lies at"),
    "other size": (of_header({"a": entry(data_offsets=[0, 12])}), "lies at"),
    "hole": (of_header({"a": entry(data_offsets=[8, 24])}, bytes(24)), "begins at byte 8 of the buffers, expected 0"),
    "overlap": (of_header({"a": entry(), "b": entry()}), "begins at byte 0 of the buffers, expected 16"),
    "tensor cut": (of_header({"a": entry()}, bytes(15)), "tensor 'a' is not all there"),
    "tail": (of_header({"a": entry()}, bytes(17)), "bytes follow"),
    "terabytes": (
        of_header({"a": entry(shape=[TERABYTES // 4], data_offsets=[0, TERABYTES])}),
        "tensor 'a' is not all there",
    ),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)  # noqa: PT006
def test_bad_files_are_named_and_cost_no_memory(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"bad\.safetensors is corrupt, or no file of a gemmlet MLP: .*{message}"):
            MLP.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8e6 + 30 * len(content)
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match=message):
        safetensors.load(io.BytesIO(content))


def network_file(config: dict[str, Any] | None = None, **header: Any) -> bytes:
    """An MLP 2-3 as a file, with these changes."""
    file = io.BytesIO()
    MLP([2, 3]).save(file)
    strings, arrays = safetensors.load(io.BytesIO(file.getvalue()))
    content = json.loads(strings["gemmlet"])
    content["config"] |= config or {}
    return dumped(arrays, {"gemmlet": json.dumps(content | header)})


@pytest.mark.parametrize(
    "config",
    [
        {"layers": [1 << 40, 1 << 40]},
        {"layers": [2, 0]},
        {"layers": [True, 3]},
        {"layers": None},
        {"layers": {}},
        {"layers": 3},
        {"dtype": "object"},
        {"dtype": "f4,f4"},
        {"dtype": "f4,("},
        {"dtype": {"a": 1}},
        {"dtype": None},
        {"seed": -1},
        {"seed": 0.5},
        {"steps": 1.5},
        {"ema_decay": 2.0},
        {"default_optimizer": ["sgd"]},
        {"default_optimizer": {}},
        {"default_optimizer": {"name": "sgd", "lr": 10**400}},
        {"activation": []},
        {"self": 1},
    ],
    ids=json.dumps,
)
def test_a_bad_config_is_named_before_a_network_is_made(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(network_file(config))
    with pytest.raises(ValueError, match=r"bad\.safetensors is corrupt, or no file of a gemmlet MLP: ."):
        MLP.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '{"network": "MLP", "network": "MLP"}'])
def test_json_inside_the_metadata(text: str) -> None:
    with pytest.raises(ValueError, match="corrupt"):
        MLP.load(io.BytesIO(dumped({}, {"gemmlet": text})))


@pytest.mark.parametrize("make", [lambda: MLP([3, 4, 2], ema_decay=0.5), lambda: GAN(2, [3, 4], [3, 1])])
def test_every_truncation_and_changed_bytes(make: Callable[[], MLP | GAN], rng: np.random.Generator) -> None:
    model = make()
    file = io.BytesIO()
    model.save(file)
    content = file.getvalue()
    for end in range(len(content)):
        with pytest.raises(ValueError, match="the file is corrupt"):
            type(model).load(io.BytesIO(content[:end]))
    begin = 8 + int.from_bytes(content[:8], "little")
    refused, kept = 0, []
    for _ in range(2000):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(begin)] = rng.integers(256)
        try:
            loaded = type(model).load(io.BytesIO(changed))
        except ValueError as error:
            refused += str(error).startswith("the file ")
        else:  # another seed, say
            kept.append(shapes_of(loaded))
    assert refused + len(kept) == 2000
    assert set(map(str, kept)) == {str(shapes_of(model))}


def shapes_of(model: MLP | GAN) -> dict[str, list[tuple[int, ...]]]:
    return {name: [parameter.shape for parameter in dense.parameters] for name, dense in model._parts().items()}


# Versions, and what is not the network's.


def test_versions() -> None:
    strings, _ = safetensors.load(io.BytesIO(network_file()))
    assert json.loads(strings["gemmlet"])["format"] == files.FORMAT
    with pytest.raises(
        ValueError, match=r"^the file was written by a newer gemmlet, in format 7; this one reads up to"
    ):
        MLP.load(io.BytesIO(network_file(format=7, network="something new")))
    for version in (-1, "1", True, 1.0):
        with pytest.raises(ValueError, match="corrupt"):
            MLP.load(io.BytesIO(network_file(format=version)))


def test_what_is_not_the_networks_own(tmp_path: Path) -> None:
    model = MLP([2, 3])
    config = json.loads(safetensors.load(io.BytesIO(network_file()))[0]["gemmlet"])["config"]
    arrays = files.named_tensors(model._dense)
    more = {f"{files.OPTIMIZER}0": np.arange(3, dtype=np.int64)}
    files.write(tmp_path / "a", "MLP", config, arrays | more, {"position": [1, 2.5, None]})
    found, loaded, extra = files.read(tmp_path / "a", "MLP")
    assert (found, extra) == (config, {"position": [1, 2.5, None]})
    assert same_tensors(loaded, arrays | more)
    assert same_tensors(files.named_tensors(MLP.load(tmp_path / "a")._dense), arrays)
    files.write(tmp_path / "b", "MLP", config, arrays | {"else": np.zeros(3)})
    assert files.read(tmp_path / "b", "MLP")[2] == {}
    with pytest.raises(ValueError, match="'else'"):
        MLP.load(tmp_path / "b")
    with pytest.raises(ValueError, match="JSON"):
        files.write(tmp_path / "c", "MLP", config, arrays, {"loss": float("nan")})
    assert not (tmp_path / "c").exists()


# File objects.


class Unbuffered(io.RawIOBase):
    """A pipe's end, as it were: not seekable, seven bytes at a time."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece, self.content = self.content[: min(7, len(buffer))], self.content[min(7, len(buffer)) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, content: Any) -> int:
        self.content += bytes(content[:7])
        return min(7, len(content))


def test_file_objects(tmp_path: Path) -> None:
    model = MLP([3, 4, 2], seed=5)
    model.save(tmp_path / "path")
    content = (tmp_path / "path").read_bytes()
    with open(tmp_path / "opened", "wb") as opened:
        model.save(opened)
    assert (tmp_path / "opened").read_bytes() == content
    with open(tmp_path / "opened", "rb") as opened:
        assert same_bits(MLP.load(opened).parameters[0], model.parameters[0])
    raw = Unbuffered()
    model.save(raw)
    assert raw.content == content
    assert same_bits(MLP.load(raw).parameters[0], model.parameters[0])
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "wb") as writer:
        model.save(writer)
        writer.close()
        assert same_bits(MLP.load(reader).parameters[0], model.parameters[0])


@pytest.mark.parametrize("file", [io.StringIO(), 3, None, object()], ids=["text", "number", "None", "object"])
def test_no_file(file: Any) -> None:
    with pytest.raises(TypeError, match="file must be a path or a binary file"):
        MLP([2, 2]).save(file)
    with pytest.raises(TypeError, match="file must be a path or a binary file"):
        MLP.load(file)


def test_nothing_is_lost_in_a_non_blocking_file() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    with open(read, "rb", buffering=0) as reader, open(write, "wb", buffering=0) as writer:
        with pytest.raises(BlockingIOError):
            MLP.load(reader)
        with pytest.raises(BlockingIOError):
            MLP([400, 400]).save(writer)


def test_without_the_package(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(safetensors=None)\n"
        "from gemmlet.nn import MLP; MLP([2, 2]).save(sys.argv[1]); MLP.load(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], check=True)


# Atomic writes.


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_permissions_are_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    seen = []
    with replacing(path) as temporary:
        seen.append(stat.S_IMODE(temporary.stat().st_mode))
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert seen == [0o600]


def test_permissions_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_the_owner_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    os.chown(path, 12345, 23456)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "dangling"])
def test_symbolic_links_are_followed(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "runs").mkdir()
    target, link, outer = tmp_path / "runs" / "v1", tmp_path / "latest", tmp_path / "outer"
    if exists:
        target.write_text("old")
    link.symlink_to("runs/v1")
    outer.symlink_to(link)
    write(outer)
    assert target.read_text() == "new"
    assert link.is_symlink()
    assert outer.is_symlink()
    assert os.listdir(tmp_path / "runs") == ["v1"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="/a'"):
        write(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def socket_node(path: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFSOCK)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, socket_node], ids=["fifo", "folder", "socket"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, make: Callable[[Path], None], linked: bool) -> None:
    path = tmp_path / "node"
    make(path)
    kind = stat.S_IFMT(path.stat().st_mode)
    if linked:
        path = tmp_path / "link"
        path.symlink_to("node")
    with pytest.raises(OSError, match=path.name):
        write(path)
    assert stat.S_IFMT(path.stat().st_mode) == kind
    assert set(os.listdir(tmp_path)) == {"node", path.name}


def test_devices_are_refused() -> None:
    with pytest.raises(OSError, match="/dev/null"):
        MLP([2, 2]).save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["a" * 250, "é" * 120, "a." + "b" * 250, ".hidden", "with space.x y"])
def test_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    write(tmp_path / name, "again")
    assert (tmp_path / name).read_text() == "again"
    assert os.listdir(tmp_path) == [name]


# Errors name the path that was given, and nothing else; what was there stays.


def check_error(path: Path, code: int, act: Callable[[], None]) -> None:
    before = {p: p.read_bytes() for p in path.parent.glob("*")} if path.parent.is_dir() else {}
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        act()
    assert caught.value.errno == code
    assert caught.value.filename == str(path)
    assert type(caught.value) is type(OSError(code, ""))
    assert before == ({p: p.read_bytes() for p in path.parent.glob("*")} if path.parent.is_dir() else {})


def test_a_missing_folder(tmp_path: Path) -> None:
    path, link = tmp_path / "nowhere" / "model", tmp_path / "link"
    link.symlink_to(path)
    for act in (check_replaceable, MLP([2, 2]).save):
        check_error(path, errno.ENOENT, lambda act=act: act(path))
        with pytest.raises(FileNotFoundError, match="link"):
            act(link)
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_full_disk(tmp_path: Path, linked: bool) -> None:
    """By a limit of the size of files, which is as real as a full disk."""
    target = path = tmp_path / "model"
    target.write_text("old")
    if linked:
        path = tmp_path / "link"
        path.symlink_to(target)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        check_error(path, errno.EFBIG, lambda: MLP([400, 400]).save(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "model").write_text("old")
    monkeypatch.setattr(os, function, fail)
    check_error(tmp_path / "model", errno.ENOSPC, lambda: MLP([2, 2]).save(tmp_path / "model"))


def as_nobody(act: Callable[[], None]) -> str:
    """What `act` raises in a child process without root's rights."""
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            act()
            os.write(write_end, b"nothing")
        except BaseException as error:
            os.write(write_end, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with open(read) as answer:
        return answer.read()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach."""
    with tempfile.TemporaryDirectory() as name:
        if not all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(name).parents):
            pytest.skip("temporary folders are closed to others")
        os.chmod(name, 0o711)
        folder = Path(name) / "folder"
        folder.mkdir()
        yield folder


def test_no_permission(open_folder: Path) -> None:
    path = open_folder / "a"
    path.write_text("old")
    path.chmod(0o444)
    open_folder.chmod(0o777)
    assert as_nobody(lambda: write(path)) == f"PermissionError: [Errno 13] Permission denied: '{path}'"
    open_folder.chmod(0o555)
    new = open_folder / "new"
    assert as_nobody(lambda: write(new)) == f"PermissionError: [Errno 13] Permission denied: '{new}'"
    assert as_nobody(lambda: check_replaceable(new)) == f"PermissionError: [Errno 13] Permission denied: '{new}'"
    open_folder.chmod(0o333)  # writable, and not readable
    assert as_nobody(lambda: check_replaceable(new)) == "nothing"
    assert as_nobody(lambda: write(new)) == "nothing"
    open_folder.chmod(0o777)
    assert sorted(os.listdir(open_folder)) == ["a", "new"]


def fit(path: Path) -> None:
    """Start a training that does not come to its first step."""

    def callback(progress: Any) -> None:
        raise AssertionError("it was trained")

    MLP([2, 2]).fit(np.ones((4, 2)), [0, 1, 0, 1], 1, callback=callback, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_refused_before_training(open_folder: Path) -> None:
    MLP([2, 2]).fit(np.ones((4, 2)), [0, 1, 0, 1], 1)  # imports what others may not read
    path, link = open_folder / "a", open_folder / "link"
    path.write_text("old")
    path.chmod(0o666)
    open_folder.chmod(0o1777)  # as /tmp: others' files can be written, and not replaced
    for act in (write, fit):
        assert as_nobody(partial(act, path)) == f"PermissionError: [Errno 1] Operation not permitted: '{path}'"
    assert as_nobody(lambda: _files.check_replaceable(open_folder / "new")) == "nothing"
    open_folder.chmod(0o755)
    assert as_nobody(lambda: fit(path)) == f"PermissionError: [Errno 13] Permission denied: '{path}'"
    link.symlink_to("nowhere/b")
    with pytest.raises(FileNotFoundError, match=r"checkpoint is to be in .*/nowhere, which is no folder"):
        fit(link)
    with pytest.raises(FileNotFoundError, match="No such file or directory: '/proc/x'"):  # whoever asks
        fit(Path("/proc/x"))
    assert sorted(os.listdir(open_folder)) == ["a", "link"]


def test_an_error_of_reading_names_the_file(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        name = "broken.safetensors"

        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match=r"error: 'broken\.safetensors'$"):
        MLP.load(Broken())
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        MLP.load(tmp_path)


def test_errors_of_other_files_stay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "font").read_bytes()
    assert caught.value.filename == str(tmp_path / "font")
    with pytest.raises(OSError, match=r"^encoder error$"), replacing(tmp_path / "a"):
        raise OSError("encoder error")
    assert os.listdir(tmp_path) == []


# The disk, in this order: the content, the name, the folder's list of names.


def test_sync_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append("folder" if folder else f"file of {os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def note_replace(*args: Any) -> None:
        done.append("rename")
        replace(*args)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write(tmp_path / "a", "12345")
    assert done == ["file of 5 bytes", "rename", "folder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"


# Temporary files.


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    code = (
        "import os, signal, sys; from pathlib import Path; from gemmlet._files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary: os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=False)
    (stale,) = os.listdir(tmp_path)
    write(path)
    assert sorted(os.listdir(tmp_path)) == [stale, path.name]  # it may be another machine's, which goes on
    old = time.time() - 2 * _files._STALE_SECONDS
    os.utime(tmp_path / stale, (old, old))
    others = [".other-01234567.tmp.safetensors", ".model-0123.tmp.safetensors", ".model-01234567.safetensors"]
    for name in others:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    write(path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, *others])


def test_what_is_still_being_written_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with replacing(path) as temporary:
        temporary.write_text("slow")
        old = time.time() - 2 * _files._STALE_SECONDS
        os.utime(temporary, (old, old))
        write(path)
        assert temporary.exists()
    assert path.read_text() == "slow"
    assert os.listdir(tmp_path) == ["model"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_many_threads_and_processes_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    models = [MLP([20, 16, 2], seed=seed) for seed in range(4)]
    errors: list[BaseException] = []

    def save(model: MLP) -> None:
        try:
            for _ in range(15):
                model.save(path)
                MLP.load(path)
        except BaseException as error:
            errors.append(error)

    code = (
        "import sys; from gemmlet.nn import MLP\n"
        "for _ in range(30): MLP([20, 16, 2], seed=9).save(sys.argv[1]); MLP.load(sys.argv[1])"
    )
    child = subprocess.Popen([sys.executable, "-c", code, path], stderr=subprocess.PIPE, text=True)
    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert child.communicate(timeout=PATIENCE)[1] == ""
    assert child.returncode == 0
    assert errors == []
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is none")
@pytest.mark.parametrize("buffering", [0, -1])
def test_an_open_file_that_is_full_is_named(buffering: int) -> None:
    """When it is written, not when somebody closes it."""
    file = open("/dev/full", "wb", buffering=buffering)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        MLP([2, 2]).save(file)
    with contextlib.suppress(OSError):
        file.close()


def test_a_file_is_flushed(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        MLP([2, 2], seed=5).save(file)
        assert MLP.load(tmp_path / "file").seed == 5
