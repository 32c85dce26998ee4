"""Threads: the same bits for any number of them, from any of them, after a fork and at exit; and how many there are.

What may hang or crash runs in a process of its own, with a time limit.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmlet
from gemmlet import _cgroup, _threads, kernels
from gemmlet.backends import select
from gemmlet.data import augment
from support import arguments_of, copies, one_call_of_each, outcome, run_on, same_bits

ELEMENTWISE = [name for name in kernels.__all__ if name not in ("linear", "linear_backward", "matmul")]


def set_threads(backend: Any, count: int) -> None:
    gemmlet.set_num_threads(count)
    backend.set_num_threads(count)


def same(results: Any, expected: Any) -> bool:
    return len(results) == len(expected) and all(map(same_bits, results, expected))


# Results.


@pytest.mark.parametrize(("rows", "columns"), [(700, 300), (3, 120_000), (120_000, 3)], ids=["matrix", "wide", "tall"])
def test_same_bits_for_any_number(rows: int, columns: int, any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """Sizes that every kernel splits; of the shapes one has too few rows to go by them, another too few columns."""
    if rows != 700 and any_threads_backend.name == "numpy":
        pytest.skip("it has no threads of its own")
    for name in kernels.__all__ if rows == 700 or any_threads_backend.name == "cpu" else ELEMENTWISE:
        arguments = arguments_of(name, rng, dtype, rows, columns)
        set_threads(any_threads_backend, 1)
        expected = outcome(name, copies(arguments))
        for count in (2, 3, 5, 2):
            set_threads(any_threads_backend, count)
            assert same(outcome(name, copies(arguments)), expected), (name, count)


def test_same_bits_where_a_task_gets_a_single_column(any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """Columns that are divided in multiples of a tile's width leave one over for the last task."""
    if any_threads_backend.name != "cpu":
        pytest.skip("its matmul is not divided into tasks of columns")
    for columns in range(129, 1000, 32):
        x, w = rng.normal(size=(4, 1000)).astype(dtype), rng.normal(size=(columns, 1000)).astype(dtype)
        b = rng.normal(size=columns).astype(dtype)
        set_threads(any_threads_backend, 1)
        expected = kernels.linear(x, w.T, b, "relu", return_preactivation=True)
        for count in (3, 4, 5, 8):
            set_threads(any_threads_backend, count)
            assert same(kernels.linear(x, w.T, b, "relu", return_preactivation=True), expected), (columns, count)


def test_same_bits_for_any_number_in_a_large_call(any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """Enough for five threads on every backend, and of a length that nothing divides."""
    size = 400_009
    for name in ("tanh", "tanh_backward", "mean_squared_error", "adam_update"):
        arguments = arguments_of(name, rng, dtype, 1, size)
        set_threads(any_threads_backend, 1)
        expected = outcome(name, copies(arguments))
        for count in (2, 3, 5):
            set_threads(any_threads_backend, count)
            assert same(outcome(name, copies(arguments)), expected), (name, count)


def test_many_python_threads_at_once(any_threads_backend: Any, dtype: Any, rng: Any) -> None:
    """Sixteen threads, each with every kernel in an order of its own, beside each other and in the pool."""
    calls = one_call_of_each(rng, dtype, 130, 90)
    set_threads(any_threads_backend, 2)
    expected = {name: call() for name, call in calls.items()}
    names, barrier = list(calls), threading.Barrier(16)

    def work(first: int) -> list[str]:
        barrier.wait(timeout=60)
        order = names[first:] + names[:first]
        return [name for name in order for _ in range(2) if not same(calls[name](), expected[name])]

    with ThreadPoolExecutor(16) as executor:
        wrong = list(executor.map(work, [3 * i % len(names) for i in range(16)]))
    assert wrong == [[]] * 16


def test_resizing_while_others_compute(any_threads_backend: Any, rng: Any) -> None:
    x = rng.normal(size=(300, 300)).astype(np.float32)
    expected = kernels.linear(x, x, activation="tanh"), kernels.gelu(x), kernels.softmax(x)
    stop = threading.Event()

    def compute() -> int:
        rounds = 0
        while not stop.is_set():
            results = kernels.linear(x, x, activation="tanh"), kernels.gelu(x), kernels.softmax(x)
            assert same(results, expected)
            rounds += 1
        return rounds

    def resize(seed: int) -> None:
        numbers = np.random.default_rng(seed)
        for _ in range(100):
            set_threads(any_threads_backend, int(numbers.integers(1, 6)))
            time.sleep(0.001)

    with ThreadPoolExecutor(5) as executor:
        computing = [executor.submit(compute) for _ in range(3)]
        try:
            for resizing in [executor.submit(resize, seed) for seed in range(2)]:
                resizing.result(timeout=60)
        finally:
            stop.set()
        assert all(future.result(timeout=60) > 0 for future in computing)


# The GIL.


def long_calls(dtype: Any) -> dict[str, Callable[[], Any]]:
    """One call for each function of the extension modules, of some ten milliseconds."""
    n = 2_000_000
    x, y, out = np.linspace(0.1, 0.9, 3 * n).astype(dtype).reshape(3, -1, 100)
    labels = np.arange(len(x)) % 100
    square, tall = np.ones((600, 600), dtype), np.broadcast_to(x[0], (200_000, 100))
    return {
        "linear": lambda: kernels.linear(square, square, activation="tanh"),
        "column_sum": lambda: kernels.linear_backward(tall, None, None, need_x=False, need_w=False),
        "activation_forward": lambda: kernels.gelu(x, out=out),
        "activation_backward": lambda: kernels.gelu_backward(x, y, None, out=out),
        "row_function_forward": lambda: kernels.softmax(x, out=out),
        "row_function_backward": lambda: kernels.log_softmax_backward(x, None, y, out=out),
        "row_loss": lambda: kernels.softmax_cross_entropy(x, labels, out=out),
        "elementwise_loss": lambda: kernels.binary_cross_entropy_with_logits(x, y, out=out),
        "optimizer_update": lambda: kernels.adam_update(out, x, y.copy(), y.copy(), step=1),
    }


def test_the_gil_is_released(any_threads_backend: Any) -> None:
    """Another Python thread goes on during a call. With the GIL held it would stand still from the start to the end."""
    if any_threads_backend.name == "numpy":
        pytest.skip("NumPy decides where it holds the GIL")
    set_threads(any_threads_backend, 1)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    def ticks_during(call: Callable[[], Any]) -> int:
        ticks.clear()
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        # What comes at the edges may come before the kernel has begun, or after it has ended.
        margin = 0.2 * (end - start)
        return sum(start + margin < t < end - margin for t in list(ticks))

    def lets_others_go_on(call: Callable[[], Any]) -> bool:
        # A busy machine may let the other thread wait, or the calling one outside the kernel: some good runs of many.
        # With the GIL held there would be none.
        good = (True for _ in range(200) if ticks_during(call) >= 3)
        return len(list(itertools.islice(good, 3))) == 3

    other = threading.Thread(target=tick)
    other.start()
    try:
        calls = long_calls(np.float64)
        if any_threads_backend.name == "cpu":  # elsewhere NumPy draws the numbers
            images = np.ones((20_000, 28, 28), np.uint8)
            calls["augment"] = lambda: augment(images, rotate=12, elastic=1.2, out=images)
        for call in calls.values():
            call()  # compiled, and in memory
        stuck = [name for name, call in calls.items() if not lets_others_go_on(call)]
    finally:
        stop.set()
        other.join()
    assert not stuck


# The floating-point mode.

FLUSH_TO_ZERO = """
import numpy as np, torch
import gemmlet
from gemmlet import kernels
from gemmlet.backends import select

def threads(count):
    gemmlet.set_num_threads(1)
    select.current().set_num_threads(count)

x = np.linspace(-103, -87.4, 400_000).astype(np.float32)  # exp of it is subnormal
threads(1)
exact = kernels.exp(x).tobytes()
torch.set_flush_denormal(True)
flushed = kernels.exp(x).tobytes()
assert flushed != exact
threads(4)
assert kernels.exp(x).tobytes() == flushed  # makes the workers
for on, result in (False, exact), (True, flushed):
    torch.set_flush_denormal(on)
    for _ in range(8):
        assert kernels.exp(x).tobytes() == result
print("done")
"""


def test_workers_compute_in_the_mode_of_the_caller(any_threads_backend: Any) -> None:
    """Whatever another library had set when they were made."""
    pytest.importorskip("torch")
    if any_threads_backend.name != "cpu":
        pytest.skip("its threads are not gemmlet's")
    assert run_on(any_threads_backend, FLUSH_TO_ZERO) == "done\n"


# Memory.

LITTLE_MEMORY = """
import resource, sys
import numpy as np
import gemmlet
from gemmlet import kernels, nn
from gemmlet.backends import select

a = np.ones((600, 600), np.float32)
x, y = np.zeros((512, 784), np.uint8), np.zeros(512, np.int64)
model = nn.MLP([784, 256, 10], seed=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(EXTRA),) * 2)
gemmlet.set_num_threads(1)
select.current().set_num_threads(256)
try:
    for _ in range(5):
        kernels.matmul(a, a)
    model.fit(x, y, epochs=1, batch_size=256)
except MemoryError:
    pass
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of memory is Linux's")
def test_more_threads_than_memory(any_threads_backend: Any) -> None:
    """Fewer threads, or MemoryError: no abort of the process, and no team that waits for a member."""
    if any_threads_backend.name != "cpu":
        pytest.skip("its threads are not gemmlet's")
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer takes memory of its own, and ends the process where there is none")
    for extra in (3e7, 1e8, 1.3e8, 2e8, 4e8):
        assert run_on(any_threads_backend, LITTLE_MEMORY.replace("EXTRA", str(extra)), timeout=60) == "done\n"


# Processes.


FORK = """
import os, signal, sys, threading, time
import numpy as np
import gemmlet
from support import one_call_of_each, same_bits

gemmlet.set_num_threads(2)
calls = one_call_of_each(np.random.default_rng(0), np.float32, 700, 300)
expected = {name: call() for name, call in calls.items()}


def check(where):
    for name, call in calls.items():
        for result, exact in zip(call(), expected[name], strict=True):
            assert same_bits(result, exact), (where, name)


def in_child(where, seconds=60):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check(where)
            status = 0
        except BaseException as error:
            print(where, repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, (where, status)
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise SystemExit(f"{where}: the child hangs")
"""

# After the pool has been used; then while other threads are inside kernels. These keep to elementwise kernels where the
# matmul is a BLAS, whose locks are its own to care for.
FORK += """
in_child("child")
check("parent after the fork")
gemmlet.set_num_threads(3)
in_child("child of a resized pool")
pid = os.fork()
if pid == 0:
    try:
        in_child("grandchild")
        gemmlet.set_num_threads(2)
        check("child that resizes")
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0

x = np.random.default_rng(1).normal(size=(700, 700)).astype(np.float32)
stop = threading.Event()


def compute(step):
    while not stop.is_set():
        step()


compiled = os.environ["GEMMLET_BACKEND"] == "cpu"
steps = [lambda: gemmlet.kernels.gelu(x), lambda: gemmlet.kernels.softmax(x)]
if compiled:
    steps.append(lambda: gemmlet.kernels.matmul(x, x))
others = [threading.Thread(target=compute, args=(step,)) for step in steps]
for other in others:
    other.start()
try:
    for i in range(10 if compiled else 3):
        time.sleep(0.003)
        in_child(f"child {i} of a parent that computes")
finally:
    stop.set()
    for other in others:
        other.join()
check("parent that has computed")
"""


MOVED = """
import os, time
import numpy as np
import gemmlet
from gemmlet import kernels

gemmlet.set_num_threads(2)

def threads():
    return [int(name) for name in os.listdir("/proc/self/task")]

def everywhere(processors):
    for thread in threads():
        os.sched_setaffinity(thread, processors)

x, y = np.ones(400_000, np.float32), np.empty(400_000, np.float32)
allowed = frozenset(os.sched_getaffinity(0))

def compute():
    # Calls while the workers are awake, about to be, and asleep; returns where the threads but this one may run.
    for _ in range(5):
        for _ in range(10):
            kernels.tanh(x[:40_000], out=y[:40_000])
        kernels.tanh(x, out=y)
        assert (y == y[0]).all()
        time.sleep(0.01)
    return {frozenset(os.sched_getaffinity(thread)) for thread in threads() if thread != os.getpid()}

compute()
for _ in range(3):
    for here in sorted(allowed)[:2]:
        os.sched_setaffinity(0, {here})  # of this thread only
        seen = compute()
        assert seen <= {allowed, allowed - {here}}, (seen, here)
        if len(allowed) > 1 and os.environ["GEMMLET_BACKEND"] == "cpu":
            assert allowed - {here} in seen, (seen, here)
        assert os.sched_getaffinity(0) == {here}
    everywhere({here})  # as with taskset; it stays
    assert compute() == {frozenset({here})}
    everywhere(allowed)
    assert all(len(allowed - some) <= 1 for some in compute())
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells where threads may run")
def test_where_threads_may_run(any_threads_backend: Any) -> None:
    """The workers keep off the caller's processor, and to those that they were given."""
    assert run_on(any_threads_backend, MOVED) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork(any_threads_backend: Any) -> None:
    """All kernels work in a child, with the same bits; a hang is ended and told."""
    if any_threads_backend.name == "cuda":
        pytest.skip("CUDA cannot be used in a child")
    run_on(any_threads_backend, FORK, timeout=200)


FORK_IN_THE_MIDST = """
import copy, os, signal, threading, time
import numpy as np
from gemmlet.nn import optimizers

optimizer, param = optimizers.Adam(), np.ones(8)
held, fingerprint = threading.Event(), optimizers.fingerprint


def slow(param):
    held.set()
    time.sleep(0.2)
    return fingerprint(param)


optimizer.update(param, param.copy())
optimizers.fingerprint = slow
thread = threading.Thread(target=copy.deepcopy, args=[optimizer])
thread.start()
held.wait()  # it copies the state of a parameter, which nobody may change meanwhile
pid = os.fork()
if not pid:
    signal.alarm(20)  # which ends it, if it hangs
    optimizer.update(np.ones(3), np.ones(3))
    os._exit(0)
thread.join()
optimizer.update(np.ones(3), np.ones(3))
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_another_thread_holds_a_lock() -> None:
    run_on(select.current(), FORK_IN_THE_MIDST, timeout=100)


def test_every_lock_is_made_for_forks() -> None:
    """By the one function that makes them."""
    makes = re.compile(r"\b(R?Lock|Condition|Semaphore)\(")
    makers = [path.name for path in Path(gemmlet.__file__).parent.rglob("*.py") if makes.search(path.read_text())]
    assert makers == ["_locks.py"]


EXIT = """
import threading, time
import numpy as np
import gemmlet
from gemmlet import kernels

gemmlet.set_num_threads(2)
x = np.ones((1000, 1000), np.float32)
started = threading.Barrier(4)


def compute(step):
    step()
    started.wait()
    while True:
        step()


steps = [lambda: kernels.gelu(x), lambda: kernels.tanh(x), lambda: kernels.adam_update(*np.ones((4, 300_000)), step=1)]
for step in steps:
    threading.Thread(target=compute, args=(step,), daemon=True).start()
started.wait()
time.sleep(DELAY)
print("end", flush=True)
"""


def test_exit_while_a_daemon_thread_computes(any_threads_backend: Any) -> None:
    """The interpreter ends at once and without a crash, wherever in a kernel the thread is."""
    for i in range(4 if any_threads_backend.name == "cpu" else 1):
        delay = 0.01 + 0.007 * i
        assert run_on(any_threads_backend, EXIT.replace("DELAY", str(delay)), timeout=60) == "end\n"


def test_exit_after_use(any_threads_backend: Any) -> None:
    """Sleeping workers do not hold up the end of the process."""
    script = """
import numpy as np, gemmlet
gemmlet.set_num_threads(5)
gemmlet.kernels.tanh(np.ones((1000, 1000)))
"""
    run_on(any_threads_backend, script, timeout=120)


# How many.


@pytest.fixture
def fresh_count(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As at the start of a process: nothing set, nothing in the environment, eight processors, no quota."""
    monkeypatch.setattr(_threads, "_count", None)
    monkeypatch.delenv("GEMMLET_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(_threads, "processors", lambda: 8)
    monkeypatch.setattr(_cgroup, "processors", lambda: math.inf)
    return monkeypatch


@pytest.mark.parametrize("name", select.CHOICES)
def test_setting_takes_effect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "processors", lambda: 8)
    try:
        backend = select.load(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    before = gemmlet.get_num_threads()
    with gemmlet.use_backend(name):
        try:
            for count in (1, 3, np.int64(2), 5):
                gemmlet.set_num_threads(count)
                assert gemmlet.get_num_threads() == count
                assert type(gemmlet.get_num_threads()) is int
                assert backend.get_num_threads() == count
                if name != "numpy":
                    assert str(int(count)) in backend.describe()["threads"]
        finally:
            gemmlet.set_num_threads(before)


@pytest.mark.parametrize("name", select.CHOICES)
@pytest.mark.parametrize(
    ("count", "error"),
    [
        *((count, ValueError) for count in (0, -1, np.int64(0))),
        *((count, TypeError) for count in (1.0, 2.5, "2", None, [2], math.nan, np.ones(2, int))),
    ],
    ids=repr,
)
def test_bad_counts(name: str, count: Any, error: type[Exception]) -> None:
    try:
        backend = select.load(name)
    except RuntimeError as missing:
        pytest.skip(str(missing))
    with gemmlet.use_backend(name):
        before = gemmlet.get_num_threads(), backend.get_num_threads()
        with pytest.raises(error, match=rf"\bcount\b.*({type(count).__name__}|got {count})"):
            gemmlet.set_num_threads(count)
        assert (gemmlet.get_num_threads(), backend.get_num_threads()) == before


@pytest.mark.parametrize("count", [5000, 2**31, 2**40, 10**30])
@pytest.mark.parametrize("name", select.CHOICES)
def test_a_huge_count_is_one_for_all_backends(name: str, count: int) -> None:
    """More threads than processors would be slower: every backend takes as many as there are."""
    try:
        backend = select.load(name)
    except RuntimeError as missing:
        pytest.skip(str(missing))
    before = gemmlet.get_num_threads()
    with gemmlet.use_backend(name):
        try:
            gemmlet.set_num_threads(count)
            assert gemmlet.get_num_threads() == backend.get_num_threads() == _threads.processors()
        finally:
            gemmlet.set_num_threads(before)
            backend.set_num_threads(before)


@pytest.mark.parametrize(
    ("gemmlet_threads", "omp_threads", "expected"),
    [
        (None, None, 8),
        ("3", None, 3),
        (" 3 ", None, 3),
        ("3", "2", 3),
        (None, "2", 2),
        (None, "4,2", 4),
        ("6,1", "2", 6),
        (None, "4, 2", 4),
        ("12", None, 8),  # no more than there are processors
        (None, "12", 8),
        ("99999999999999999999", None, 8),
        ("9" * 5000, None, 8),
        ("", "", 8),
        (" ", "2", 2),
        (None, ",2", 8),
        (None, "true", 8),
        (None, "4 2", 8),
    ],
)
def test_environment(gemmlet_threads: str | None, omp_threads: str | None, expected: int, fresh_count: Any) -> None:
    for name, value in (("GEMMLET_NUM_THREADS", gemmlet_threads), ("OMP_NUM_THREADS", omp_threads)):
        if value is not None:
            fresh_count.setenv(name, value)
    assert _threads.get_num_threads() == expected


@pytest.mark.parametrize("value", ["none", "0", "000", "-4", "2.5", "1e9", "0x4", "²", ",2", "4 2"])
def test_the_environment_is_no_number(value: str, fresh_count: Any) -> None:
    """It is said, and said again: a default in its place would pass for what was asked for."""
    fresh_count.setenv("GEMMLET_NUM_THREADS", value)
    fresh_count.setenv("OMP_NUM_THREADS", "2")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"GEMMLET_NUM_THREADS must be an integer of at least 1, got {value!r}"):
            _threads.get_num_threads()


@pytest.mark.parametrize(
    ("quota", "expected"), [(math.inf, 8), (100.0, 8), (8.0, 8), (2.0, 2), (1.5, 2), (1.0, 1), (0.5, 1), (0.01, 1)]
)
def test_quota_and_processors(quota: float, expected: int, fresh_count: Any) -> None:
    """The smaller of the two; part of a processor counts as one."""
    fresh_count.setattr(_cgroup, "processors", lambda: quota)
    assert _threads.get_num_threads() == expected


def test_the_environment_is_read_in_a_new_process(any_threads_backend: Any) -> None:
    script = "import gemmlet; print(gemmlet.get_num_threads())"
    there = _threads.processors()
    for own, omp, wanted in (("1", "2", 1), ("", "1,2", 1), ("3", "1", 3), ("", "4,2", 4)):
        found = run_on(any_threads_backend, script, GEMMLET_NUM_THREADS=own, OMP_NUM_THREADS=omp)
        assert found == f"{min(wanted, there)}\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_affinity(any_threads_backend: Any) -> None:
    if any_threads_backend.name == "cuda":
        pytest.skip("gemmlet is imported before the script begins")
    script = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import gemmlet
print(gemmlet.get_num_threads())
"""
    assert run_on(any_threads_backend, script, GEMMLET_NUM_THREADS="", OMP_NUM_THREADS="") == "1\n"


# The cgroup.


def quota_of(root: Path, membership: str, files: dict[str, str], limit: Any = _cgroup.processors) -> float:
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "membership").write_text(membership)
    return float(limit(str(root / "cgroup"), str(root / "membership")))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"a/b/cpu.max": "max 100000\n"}, math.inf),
        ({"a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ({"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ({"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
        ({"cpu.max": "300000 100000\n"}, 3.0),  # what a container sees as its root
        ({"a/b/cpu.max": "nonsense\n", "a/cpu.max": "250000 50000\n"}, 5.0),
        ({"a/b/cpu.max": "", "cpu.max": "100000 0\n"}, math.inf),
        ({"other/cpu.max": "100000 100000\n", "a/b/c/cpu.max": "100000 100000\n"}, math.inf),
    ],
)
def test_cgroup_version_2(files: dict[str, str], expected: float, tmp_path: Path) -> None:
    assert quota_of(tmp_path, "0::/a/b\n", files) == expected


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        (v1("cpu/a/b", -1), math.inf),
        (v1("cpu/a/b", 150_000), 1.5),
        (v1("cpu/a/b", -1) | v1("cpu", 300_000), 3.0),
        (v1("cpu", 250_000, 50_000), 5.0),  # what a container sees as its root
        (v1("cpu/a/b", 400_000) | v1("cpu", 200_000), 2.0),
        (v1("cpu/a/b", -1) | v1("cpu/a", 200_000), 2.0),
        (v1("cpu/a/b", 400_000) | v1("cpu/a", 200_000), 2.0),
        ({"cpu/a/b/cpu.cfs_quota_us": "100000\n"}, math.inf),  # no period
        (v1("cpuset/a/b", 100_000), math.inf),
    ],
)
def test_cgroup_version_1(files: dict[str, str], expected: float, tmp_path: Path) -> None:
    membership = "11:cpuset:/a/b\n4:cpu,cpuacct:/a/b\n3:memory:/a/b\n1:name=systemd:/a/b\n0::/a/b\n"
    assert quota_of(tmp_path, membership, files) == expected


def test_no_cgroup(tmp_path: Path) -> None:
    for limit in (_cgroup.processors, _cgroup.memory):
        assert limit(str(tmp_path), str(tmp_path / "missing")) == math.inf
    assert quota_of(tmp_path, "", {"cpu.max": "100000 100000"}) == math.inf
    assert _cgroup.processors() > 0  # whatever this machine has


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a\n", {}, math.inf),
        ("0::/a\n", {"a/memory.max": "max\n"}, math.inf),
        ("0::/a\n", {"a/memory.max": "max\n", "memory.max": "4096\n"}, 4096),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "8192\n"}, 8192),
    ],
)
def test_memory_of_the_cgroup(membership: str, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    assert quota_of(tmp_path, membership, files, _cgroup.memory) == expected


# threadpoolctl.


def gemmlet_pools() -> list[dict[str, Any]]:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "gemmlet"]


def test_threadpoolctl(any_threads_backend: Any) -> None:
    """It lists every loaded module, lowers its number of threads, and restores it."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    if any_threads_backend.name != "cpu":
        pytest.skip("this backend has no pool of its own in a shared library")
    set_threads(any_threads_backend, 3)
    module = Path(any_threads_backend._module.__file__).name
    ours = [pool for pool in gemmlet_pools() if Path(pool["filepath"]).name == module]
    assert [pool["num_threads"] for pool in ours] == [3]
    assert ours[0]["internal_api"] == "gemmlet"
    x = np.linspace(-3, 3, 300_000, dtype=np.float32)
    expected = kernels.gelu(x)
    for limits in (1, {"gemmlet": 2}):
        with threadpoolctl.threadpool_limits(limits=limits):
            assert gemmlet.get_num_threads() == (1 if limits == 1 else 2)
            assert same_bits(kernels.gelu(x), expected)
        assert gemmlet.get_num_threads() == 3
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        assert gemmlet.get_num_threads() == 3
    assert same_bits(kernels.gelu(x), expected)


def test_gemmlet_works_without_threadpoolctl(any_threads_backend: Any) -> None:
    script = """
import sys
sys.modules["threadpoolctl"] = None  # as if it were not installed
import numpy as np, gemmlet
print(gemmlet.kernels.relu(np.array([-1.0, 2.0])).tolist())
"""
    assert run_on(any_threads_backend, script) == "[0.0, 2.0]\n"
