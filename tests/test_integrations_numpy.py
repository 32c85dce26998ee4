"""NumPy accelerated: what is replaced, that it computes, and that NumPy is as it was afterwards."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import math
import operator
import os
import platform
import py_compile
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gemmlet
from gemmlet.backends import select
from gemmlet.backends.cpu import available_isas
from gemmlet.integrations import numpy as integration
from support import PATIENCE

pytestmark = pytest.mark.skipif(not available_isas(), reason="nothing is compiled")
glibc_only = pytest.mark.skipif(
    "glibc" not in platform.libc_ver() or "asan" in os.environ.get("LD_PRELOAD", ""), reason="about glibc's malloc"
)


@pytest.fixture
def accelerated() -> Iterator[None]:
    with gemmlet.accelerate_numpy():
        yield


def taken(name: str) -> int:
    return integration.counts()[name][0]


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("isa", available_isas())
def test_every_entry_is_replaced_and_takes_its_usual_case(isa: str) -> None:
    # Each function of NumPy on the arguments of the battery, in a process of its own for the instruction set.
    code = """
import numpy as np, gemmlet
from gemmlet.integrations import numpy as integration
names = [name for name in integration._extension().numpy_prepare()]
gemmlet.accelerate_numpy()
assert None not in names and integration.replaced() == tuple(names), set(names) - set(integration.replaced())
x = np.arange(42.0).reshape(6, 7) / 9 + 1
for name in names:
    before = integration.counts()[name][0]
    for case in integration._cases(name, x.copy(), x.copy()):
        extra = (0,) if name == "ndarray comparisons" else (None,) if name == "ndarray.__pow__" else ()
        integration._plain(name)(*case, *extra)
    assert integration.counts()[name][0] > before, name
print(integration._extension().__name__)
"""
    result = child("-c", code, GEMMLET_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert isa.replace("-", "_") in result.stdout


def test_nothing_is_replaced_before_it_is_asked_for() -> None:
    result = child("-c", "import gemmlet, gemmlet.integrations.numpy as i; print(i.replaced(), i.counts())")
    assert result.stdout == "() {}\n", result.stderr


def test_restored_at_the_end_of_the_outermost_block() -> None:
    x = np.ones(5)
    with gemmlet.accelerate_numpy() as outer:
        assert str(len(integration.replaced())) in repr(outer)
        with gemmlet.accelerate_numpy():
            x + x
        before = taken("ndarray.__add__")
        x + x
        assert taken("ndarray.__add__") == before + 1
    x + x
    assert integration.replaced() == ()
    assert taken("ndarray.__add__") == before + 1
    gemmlet.restore_numpy()  # does nothing


def test_the_last_of_several_blocks_restores() -> None:
    # In threads: the first to begin is the first to end.
    began, ended = threading.Barrier(2, timeout=PATIENCE), threading.Event()
    inside: list[int] = []

    def last() -> None:
        began.wait()
        with gemmlet.accelerate_numpy():
            began.wait()
            ended.wait(PATIENCE)
            inside.append(len(integration.replaced()))

    thread = threading.Thread(target=last)
    thread.start()
    try:
        with gemmlet.accelerate_numpy():
            began.wait()
            began.wait()
    finally:
        ended.set()
        thread.join()
    assert inside[0] > 0
    assert not integration.replaced()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_has_no_blocks_of_other_threads() -> None:
    result = child(
        "-c",
        """
import os, threading, gemmlet
from gemmlet.integrations.numpy import replaced

began, ended = threading.Event(), threading.Event()

def block():
    with gemmlet.accelerate_numpy():
        began.set()
        ended.wait()

thread = threading.Thread(target=block)
thread.start()
began.wait()
if os.fork() == 0:
    gemmlet.accelerate_numpy().__exit__(None, None, None)  # as of a block that another thread has begun
    os._exit(0)
assert os.wait()[1] == 0
pid = os.fork()
if pid == 0:
    gemmlet.restore_numpy()
    with gemmlet.accelerate_numpy():
        inside = replaced()
    os._exit(0 if inside and not replaced() else 1)
ended.set()
thread.join()
assert os.waitpid(pid, 0)[1] == 0
assert not replaced()
""",
    )
    assert result.returncode == 0, result.stderr


def test_what_is_replaced_is_known_after_a_reload() -> None:
    result = child(
        "-c",
        """
import gemmlet, importlib
import gemmlet.integrations.numpy as i
for _ in range(2):
    with gemmlet.accelerate_numpy():
        before = i.replaced()
        importlib.reload(i)
        assert i.replaced() == before != ()
    assert not i.replaced()
""",
    )
    assert result.returncode == 0, result.stderr


def test_names_bound_before_and_identities_stay(accelerated: None) -> None:
    # `np.exp` was the same object before: what is replaced is what it calls.
    before = taken("numpy.exp")
    exp = np.exp
    gemmlet.restore_numpy()
    assert exp is np.exp
    with gemmlet.accelerate_numpy():
        exp(np.ones(3))
        assert taken("numpy.exp") == 1
    assert before == 0


def test_an_entry_that_differs_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = integration._plain
    monkeypatch.setattr(integration, "_plain", lambda name: (lambda x: x) if name == "numpy.tanh" else plain(name))
    with gemmlet.accelerate_numpy():
        assert "numpy.tanh" not in integration.replaced()
        assert "numpy.exp" in integration.replaced()
        np.testing.assert_allclose(np.tanh(np.float64(0.5)), 0.46211715726000973, rtol=1e-15)


def test_a_function_of_the_programs_own_stays() -> None:
    code = """
import numpy as np
calls, plain = [], np.sum

def counting(*arguments, **named):
    calls.append(1)
    return plain(*arguments, **named)

def fails(x):
    raise ValueError

np.sum, np.tanh = counting, fails
import gemmlet
from gemmlet.integrations import numpy as integration
for _ in range(2):
    with gemmlet.accelerate_numpy():
        assert not {"numpy.sum", "numpy.tanh"} & set(integration.replaced())
        calls.clear()
        assert np.sum(np.ones(3)) == 3 and len(calls) == 1 and np.sum is counting
"""
    result = child("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("version", ["1.26.4", "3.0.0", "2.99.0.dev0"])
def test_an_unknown_numpy_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"^NumPy {version} cannot be accelerated: NumPy 2.0 to "):
        gemmlet.accelerate_numpy()


def test_refused_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise RuntimeError("backend 'cpu' was not compiled for this platform")

    monkeypatch.setattr(select, "load", load)
    with pytest.raises(RuntimeError, match=r"^NumPy cannot be accelerated: backend 'cpu' was not compiled"):
        gemmlet.accelerate_numpy()


PROGRAM = """
import sys
import numpy as np

assert __name__ == "__main__"
print(sys.argv, sys.path[0], np.tanh(np.ones((20, 30)) @ np.ones((30, 4))).sum())
from gemmlet.integrations.numpy import counts
print(counts().get("ndarray.__matmul__"))
sys.exit(7)
"""


def test_a_program_runs_as_it_is(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = child("-m", "gemmlet", str(program), "-x", "two words")
    assert result.returncode == 7, result.stderr
    assert result.stdout.splitlines() == [f"{[str(program), '-x', 'two words']} {tmp_path} 80.0", "(1, 0)"]
    result = child("-m", "gemmlet", "-m", "program", "y", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert result.returncode == 7, result.stderr
    assert result.stdout.splitlines()[1] == "(1, 0)"


def test_a_script_is_the_main_module_as_python_has_it(tmp_path: Path) -> None:
    # Reached by a link: what stands beside the file itself is found, and __main__ is the script's until the end.
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "neighbour.py").write_text("value = 42")
    (tmp_path / "real" / "script.py").write_text("""
import atexit, os, pickle, sys
import neighbour

class A:
    pass

atexit.register(lambda: print(len(pickle.dumps(A())) > 0, sys.modules["__main__"].A is A))
os.chdir("/")
print(neighbour.value, os.path.isabs(__file__), sys.argv, __name__)
""")
    (tmp_path / "link.py").symlink_to(tmp_path / "real" / "script.py")
    for program, argument in (["link.py"], "link.py"), (["-m", "link"], str(tmp_path / "link.py")):
        plain, ours = (
            subprocess.run(
                [sys.executable, *words, *program, "x"],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "real"), *sys.path])},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for words in ([], ["-m", "gemmlet"])
        )
        assert plain == ours == f"42 True {[argument, 'x']} __main__\nTrue True\n"
    result = child("-P", "-m", "gemmlet", str(tmp_path / "real" / "script.py"))
    assert "No module named 'neighbour'" in result.stderr


def test_a_program_that_cannot_be_run_is_one_line() -> None:
    for arguments, message in ((["no.py"], "there is no file no.py"), (["-m"], "-m needs a module behind it")):
        result = child("-m", "gemmlet", *arguments)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"gemmlet: {message}\n")
    result = child("-m", "gemmlet", "-m", "no_such_module")
    assert (result.returncode, result.stderr.splitlines()) == (1, [f"{sys.executable}: No module named no_such_module"])
    result = child("-c", "import sys; sys.argv = ['gemmlet', 'run.py']; from gemmlet.cli import main; main()")
    assert result.returncode == 2
    assert "python -m gemmlet program.py" in result.stderr


def test_whatever_python_runs(tmp_path: Path) -> None:
    what = "numpy.exp(numpy.zeros(3)).sum(), sys.argv, sys.path[:2], '__annotations__' in globals()"
    source = f"import numpy, sys; print({what}, globals().get('__file__'), str(__loader__).partition(' object')[0])"
    (tmp_path / "app").mkdir()
    for name in ("app/__main__.py", "script", "info"):
        (tmp_path / name).write_text(source)
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", source)
    py_compile.compile(str(tmp_path / "script"), str(tmp_path / "script.pyc"))
    programs = ["app/../script"], ["script.pyc"], ["./info"], ["app/"], ["app.pyz"], ["-c", source]
    for options, program in itertools.product(([], ["-P"]), programs):
        plain, ours = (
            subprocess.run(
                [sys.executable, *options, *words, *program, "x"],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for words in ([], ["-m", "gemmlet"])
        )
        assert plain == ours, program
        assert plain.startswith("3.0")


@pytest.mark.parametrize(
    "source",
    ["def f():\n    raise ValueError('no')\nf()", "def f(:", "raise KeyboardInterrupt", "raise SystemExit('end')"],
)
def test_tracebacks_begin_with_the_program(source: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(source)
    plain, ours = (child(*words, str(tmp_path / "program.py")) for words in ([], ["-m", "gemmlet"]))
    assert ours.stderr == plain.stderr
    assert ours.returncode == plain.returncode != 0


ENDS = """
import os, sys
class Lock:
    def __init__(self, name):
        self.name = name
        open(name, "w").close()
    def __del__(self):
        os.remove(self.name)
lock = Lock("global.lock")
def main():
    own = Lock("local.lock")
    own.cycle = own
    {}
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("end", ["sys.exit(0)", "sys.exit('bad')", "1 / 0", "return"])
def test_what_a_program_leaves_is_finalized(end: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(ENDS.format(end))
    with contextlib.chdir(tmp_path):
        for words in ["program.py"], ["-m", "program"]:
            plain, ours = (
                child(*more, *words, PYTHONPATH=os.pathsep.join(sys.path)) for more in ([], ["-m", "gemmlet"])
            )
            assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
            assert not list(tmp_path.glob("*.lock"))


def test_a_program_may_come_from_a_pipe_and_its_folder_be_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemmlet", "/dev/stdin"]
    assert subprocess.run(command, input="print(3)", capture_output=True, text=True, check=True).stdout == "3\n"
    (tmp_path / "program.py").write_text("print(4)")
    code = (
        "import os, sys, subprocess; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
        f"sys.exit(subprocess.call([sys.executable, '-m', 'gemmlet', {str(tmp_path / 'program.py')!r}]))"
    )
    with contextlib.chdir(tmp_path):
        result = child("-c", code, PYTHONPATH=os.pathsep.join(sys.path))
    assert (result.returncode, result.stdout) == (0, "4\n"), result.stderr


def test_a_program_may_have_a_module_of_the_name_resource(tmp_path: Path) -> None:
    (tmp_path / "resource.py").write_text("FILES = 5")
    (tmp_path / "program.py").write_text("import resource, gemmlet; gemmlet.accelerate_numpy(); print(resource.FILES)")
    for words in [], ["-m", "gemmlet"]:
        assert child(*words, str(tmp_path / "program.py")).stdout == "5\n"


@pytest.mark.parametrize(("spoil", "message"), [(b"bad!" + bytes(20), "Bad magic number"), (b"", "Bad code object")])
def test_bytecode_that_is_none(spoil: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "program.pyc").write_bytes(spoil or importlib.util.MAGIC_NUMBER + bytes(12))
    for words in [], ["-m", "gemmlet"]:
        result = child(*words, str(tmp_path / "program.pyc"))
        assert (result.returncode, result.stderr.splitlines()[-1]) == (1, f"RuntimeError: {message} in .pyc file")


def test_flags_of_all_threads_are_reported(accelerated: None) -> None:
    # The last elements are a worker's, or the caller's after a worker's.
    n = 1 << 19
    x = np.ones(n)
    threads = gemmlet.get_num_threads()
    gemmlet.set_num_threads(2)
    try:
        for at in (0, n // 2, n - 1):
            y = x.copy()
            y[at] = 0
            before = taken("ndarray.__truediv__")
            with pytest.warns(RuntimeWarning, match="^divide by zero encountered in divide$"):
                x / y
            with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
                x / y
            with np.errstate(divide="ignore"), warnings.catch_warnings(action="error"):
                x / y
            assert taken("ndarray.__truediv__") >= before + 3
    finally:
        gemmlet.set_num_threads(threads)


def test_edges_of_the_usual_cases(accelerated: None) -> None:
    # A sum begins at +0, also of one product.
    for x, w in (([[-1.0], [2.0]], [[0.0, 1.0]]), ([-1.0], [[0.0]]), ([[-1.0]], [0.0])):
        assert not np.signbit(np.array(x) @ np.array(w)).ravel()[0]
    # But np.dot of two numbers is their product.
    one, zero = np.array([[-1.0]]), np.array([[0.0]])
    for found in (np.dot(one, zero), one.dot(zero[0]), np.dot(one[0], zero), np.dot(one[0], zero[0])):
        assert np.signbit(found).all()
    # Of other strides, x[::-1] is no operand in place: NumPy writes no result where that raises.
    x = np.array([0.0])
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        x /= x[::-1]
    assert x.tolist() == [0.0]
    # A mask that lies in the array changes meanwhile.
    results = []
    for way in (operator.setitem, lambda a, mask, value: np.copyto(a, value, where=mask)):
        memory = np.zeros(64, np.uint8)
        memory[8:16] = [1, 1, 0, 1, 0, 1, 0, 1]
        way(memory.view(np.float64), memory[8:16].view(bool), -0.0)
        results.append(memory.tobytes())
    assert results[0] == results[1]


def test_flags_of_each_matrix_are_reported(accelerated: None) -> None:
    # An outer product is a multiplication; so many rows and columns are a kernel of another kind.
    for shapes in (((2, 2, 1), (2, 1, 2)), ((2, 2, 2), (2, 2, 2)), ((2, 20, 30), (2, 30, 20))):
        a, b = (np.ones(shape) for shape in shapes)
        a[0] = b[0] = 1e-200
        before = taken("numpy.matmul")
        with np.errstate(under="raise"), pytest.raises(FloatingPointError, match="underflow encountered in matmul"):
            np.matmul(a, b)
        with np.errstate(under="ignore"):
            assert np.matmul(a, b)[0].max() == 0
        assert taken("numpy.matmul") >= before + 1


@pytest.mark.parametrize(
    "function", ["exp", "log", "tanh", "sign", "negative", "max", "argmax", "less", "maximum", "clip"]
)
def test_flags_that_say_nothing_are_left_to_nobody(function: str, accelerated: None) -> None:
    # A loop that calls Python reports the flags that it finds afterwards.
    x = np.array([np.nan, np.inf, -np.inf, 0.5] * 9)
    if function == "log":
        x = abs(x)
    arguments = {"less": (x, 1.0), "maximum": (x, 1.0), "clip": (x, 0, 1)}.get(function, (x,))
    calls = {"less": lambda: x < 1.0}
    call = calls.get(function, lambda: getattr(np, function)(*arguments))
    with warnings.catch_warnings(action="error"):
        np.frompyfunc(lambda _: call(), 1, 1)(1.0)
    # Those of earlier calls are cleared, as by NumPy (argmax leaves them).
    overflowing = np.array([1e4])

    def after_an_overflow(_: object) -> int:
        with np.errstate(all="ignore"):
            np.exp(overflowing)
            call()
        return 0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.frompyfunc(after_an_overflow, 1, 1)(1.0)
    assert [str(each.message) for each in caught] == (
        ["overflow encountered in after_an_overflow (vectorized)"] if function == "argmax" else []
    )


def test_metadata_of_a_dtype_is_inherited(accelerated: None) -> None:
    x = np.ones((3, 3), np.dtype("f8", metadata={"unit": "m"}))
    for result in (x + x, -x, np.exp(x), x.sum(0), x @ x, x**2, np.clip(x, 0, 1), x[np.arange(2)]):
        assert result.dtype.metadata == {"unit": "m"}


def test_errors_of_a_square_have_numpys_name(accelerated: None) -> None:
    def messages() -> list[str]:
        found = []
        for exponent in (2, 2.0, 0.5):
            for x in (np.array([1e300, -1.0]), np.array([1e30, -1.0], np.float32)):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    x**exponent
                found += [str(each.message) for each in caught]
        return found

    before = taken("ndarray.__pow__")
    ours = messages()
    assert taken("ndarray.__pow__") == before + 6
    gemmlet.restore_numpy()
    assert ours == messages()


def test_ranges_of_large_numbers_are_numpys(accelerated: None) -> None:
    with pytest.raises(IndexError, match=r"^index -9223372036854775808 is out of bounds for axis 0 with size 3$"):
        np.ones((3, 3))[range(-(2**63), 2**63 - 1, 2**63 - 1), range(3)]


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="it warns no longer")
def test_a_write_that_numpy_warns_of(accelerated: None) -> None:
    for write in (lambda x: operator.iadd(x, 1), lambda x: np.exp(x, x), lambda x: x.__setitem__(x > 0, 5)):
        x, _ = np.broadcast_arrays(np.ones(3), np.ones(1))
        with pytest.warns(DeprecationWarning, match="overlapping memory|broadcast"):
            write(x)


def test_strides_of_axes_of_length_one(accelerated: None) -> None:
    def strides() -> list[tuple[int, ...]]:
        found = []
        for shape, order in itertools.product(itertools.product((1, 2), repeat=3), itertools.permutations(range(3))):
            x = np.ones([shape[axis] for axis in order]).transpose(np.argsort(order))
            results = (
                x + x,
                x + x[0],
                (x > 0) * x,
                x.astype(int) / 2.5,
                -x,
                x > 0,
                x.sum(0),
                x.max(2),
                np.zeros_like(x),
                np.where(x > 0, x, 0.0),
                x[[0]],
            )
            found += [result.strides for result in (*results, x[np.array([0])], np.clip(x, 0, 1))]
        return found

    ours = strides()
    gemmlet.restore_numpy()
    assert ours == strides()


def test_references_of_dtypes_are_kept(accelerated: None) -> None:
    x, y = np.arange(12.0).reshape(3, 4), np.ones((3, 4), np.float32)
    dtypes = [np.dtype(each) for each in ("f8", "f4", "i8", "?")]
    gc.collect()
    gc.disable()  # of others' arrays
    try:
        before = [sys.getrefcount(each) for each in dtypes]
        for _ in range(1000):
            for a in (x, y):
                a + a, a - 1, a @ a.T, a > 0, -a, a**2, a[range(2), 0], a[np.arange(2)], a.sum(), a.max(1), a.argmax(0)
                (
                    np.exp(a),
                    np.where(a > 1, a, 0),
                    np.clip(a, 0, 1),
                    np.outer(a[0], a[0]),
                    np.zeros_like(a),
                    np.linalg.norm(a),
                )
                a[a > 20] = 0
                a[range(2), range(2)] = a[0, 0]
                a += 0
        after = [sys.getrefcount(each) for each in dtypes]
    finally:
        gc.enable()
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) < 200


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_long_sums_of_products_are_accurate(dtype: str, accelerated: None) -> None:
    n = 300_000
    x = np.random.default_rng(0).random((n, 2)).astype(dtype)
    a, b = x[:, 0], x[:, 1]
    exact = math.fsum(a.astype(np.longdouble) * b.astype(np.longdouble))
    contiguous = [each.copy() for each in (a, b)]
    columns = np.asfortranarray(np.broadcast_to(a, (8, n)))
    before = taken("numpy.dot"), taken("ndarray.__matmul__")
    products = [
        np.dot(a, b),
        np.dot(a[::-1], b[::-1]),
        np.dot(*contiguous),
        contiguous[0] @ contiguous[1],
        (columns @ b)[0],
    ]
    assert (taken("numpy.dot"), taken("ndarray.__matmul__")) == (before[0] + 3, before[1] + 2)
    assert np.max(abs(np.array(products) / exact - 1)) < 4 * np.finfo(dtype).eps


WRITES = """
import mmap, threading, time
import numpy as np
import gemmlet

gemmlet.accelerate_numpy()
n = 1 << 15
x = np.frombuffer(mmap.mmap(-1, n * 8), np.float64)  # nothing may lie behind it
x[:] = np.random.default_rng(0).random(n)
end = time.monotonic() + 2

def write():
    rng = np.random.default_rng(1)
    while time.monotonic() < end:
        rng.random(out=x)  # without the GIL

writer = threading.Thread(target=write)
writer.start()
while writer.is_alive():
    assert 0 <= x.argmax() < n and 0 <= x.argmin() < n
"""  # a fault showed after some milliseconds on two processors; on one it may not


def test_an_index_is_one_while_another_thread_writes() -> None:
    result = child("-c", WRITES)
    assert result.returncode == 0, result.stderr


def test_a_matmul_is_symmetric_and_the_same_with_out(accelerated: None) -> None:
    rng = np.random.default_rng(0)
    for n in (3, 8, 31, 64, 130):
        a, b = rng.standard_normal((n, n)), rng.standard_normal((n, n))
        wanted = a @ b
        assert np.array_equal(np.dot(a, b), wanted)
        assert np.array_equal(a.dot(b), wanted)
        product = a @ a.T
        assert np.array_equal(product, product.T)
        again = b.copy()
        assert np.dot(a, again, out=again) is again
        assert np.array_equal(again, wanted)
        again = b.copy()
        assert np.matmul(a, again, again) is again
        assert np.array_equal(again, wanted)


def test_bytes_other_than_0_and_1_are_true(accelerated: None) -> None:
    mask = np.array([0, 1, 2, 127, 128, 200, 255] * 5, dtype=np.uint8).view(bool)
    x = np.arange(35.0)
    wanted = mask.view(np.uint8) != 0
    assert np.array_equal(np.where(mask, x, -x), np.where(wanted, x, -x))
    assert np.array_equal(x * mask, x * wanted)
    y = x.copy()
    y[mask] = -1
    assert np.array_equal(y, np.where(wanted, -1, x))
    assert set(integration.counts()["numpy.where"]) == {3, 0}


def test_memory_that_is_kept_is_nobodys(accelerated: None) -> None:
    rng = np.random.default_rng(0)
    alive = []
    for size in rng.integers(1, 1 << 16, 200):
        array = np.full(size, float(size))
        alive.append(array)
        alive[rng.integers(len(alive))] = array + 0.0
    gemmlet.restore_numpy()
    for array in alive:
        assert np.all(array == array.size)
    with gemmlet.accelerate_numpy():
        for array in alive[:50]:
            copy = np.zeros(array.size)
            assert not copy.any()
            copy.resize(array.size * 2 + 1, refcheck=False)
            assert not copy.any()
            np.zeros((array.size, 0)), np.empty((0, array.size, 3))
        del alive


def test_memory_of_numpys_own_is_filed_by_its_size() -> None:
    # NumPy's blocks are exact, and those of empty arrays larger than it says when it frees them.
    before = [np.zeros(size, np.uint8) for size in range(1, 1101) for _ in range(3)]
    empty = [np.empty((0, size)) for size in (1, 10, 1000, 100_000)]
    with gemmlet.accelerate_numpy():
        alive = []
        while before:
            before.pop()
            alive.append(np.full(len(before) % 1100 + 1, 7, np.uint8))
        del empty
        alive += [np.full(size, 7, np.uint8) for size in range(1, 1101)]
        assert all((array == 7).all() for array in alive)
    assert all((array == 7).all() for array in alive)
    del alive


SHORT_OF_MEMORY = """
import resource
import numpy as np
import gemmlet

gemmlet.accelerate_numpy()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (320 << 20), -1))
kept = [np.ones(size << 17) for size in (60, 50, 40, 30, 20)]
del kept
for make in (np.ones, np.zeros, lambda size: np.empty(10).resize(size)):
    make(200 << 17)
"""


# The size of its class is larger than what is left.
EXACTLY = """
import resource
import numpy as np
import gemmlet

gemmlet.accelerate_numpy()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (104 << 20), -1))
for make in (np.empty, np.zeros, np.ones):
    make(97 << 17)
"""

# A product packs its operands.
PACKED = """
import resource
import numpy as np
import gemmlet

gemmlet.accelerate_numpy()
a = np.ones((1500, 1500))
kept = [np.ones_like(a) for _ in range(12)]
del kept
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now, -1))
assert (a @ a).max() == 1500
"""

# Which leaves holes between what is alive.
LIMITED = """
import resource
resource.setrlimit(resource.{}, (1 << 40, -1))
import numpy as np
import gemmlet

gemmlet.accelerate_numpy()
def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = used()
del [np.ones(1 << 17) for _ in range(200)][:]
assert used() - before < 20 << 20
"""


@glibc_only
@pytest.mark.parametrize(
    "program", [SHORT_OF_MEMORY, EXACTLY, PACKED, *map(LIMITED.format, ("RLIMIT_AS", "RLIMIT_DATA"))]
)
def test_what_is_kept_is_given_back_where_memory_is_short(program: str) -> None:
    # A thread that begins late, on a busy machine, reserves addresses for its stack, its arena and OpenBLAS's buffer
    # after the limit is set: no other threads.
    alone = {"OPENBLAS_NUM_THREADS": "1", "GEMMLET_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    result = child("-c", program, **alone)
    assert result.returncode == 0, result.stderr


FREED = """
import resource
import numpy as np
import gemmlet
from gemmlet.integrations.numpy import KEPT_BYTES

def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

rng = np.random.default_rng(0)
gemmlet.accelerate_numpy()
np.ones(10) @ np.ones(10)
before = used()
for _ in range(4):
    arrays = [np.ones(size) for size in rng.integers(1 << 11, 1 << 17, 2500)]  # 1.3 GB
    del arrays
assert used() - before < 2.5 * KEPT_BYTES, used() - before
gemmlet.restore_numpy()
assert used() - before < 20 << 20, used() - before
"""


@glibc_only
def test_freed_memory_goes_back() -> None:
    result = child("-c", FREED)
    assert result.returncode == 0, result.stderr


def test_tracemalloc_is_told_of_arrays(accelerated: None) -> None:
    def bytes_of_arrays() -> int:
        only = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([only]).traces)

    tracemalloc.start()
    try:
        before = bytes_of_arrays()
        arrays = [np.ones(size) for size in (100, 1000, 1 << 20)]
        arrays[1].resize(2000, refcheck=False)
        assert bytes_of_arrays() - before >= sum(array.nbytes for array in arrays)
        arrays.clear()
        gemmlet.restore_numpy()
        assert bytes_of_arrays() <= before
    finally:
        tracemalloc.stop()


def test_threads_compute_while_numpy_is_accelerated_and_restored() -> None:
    x = np.arange(30.0).reshape(5, 6)
    wanted = (x + x, np.sum(x, axis=0), x[[1, 3]])
    wrong: list[object] = []
    done = threading.Event()

    def compute() -> None:
        while not done.is_set():
            for got, right in zip((x + x, np.sum(x, axis=0), x[[1, 3]]), wanted, strict=True):
                if not np.array_equal(got, right):
                    wrong.append(got)

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with gemmlet.accelerate_numpy():
            np.exp(x)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes(accelerated: None) -> None:
    x = np.ones((400, 500))
    wanted = (x @ x.T).sum() + np.exp(x).sum()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if (x @ x.T).sum() + np.exp(x).sum() == wanted else 1)
    assert os.waitpid(pid, 0)[1] == 0
