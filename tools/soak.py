"""Use gemmlet for a given time as nobody should, and count what was tried: ``python tools/soak.py --minutes 30``.

Each part runs in child processes, a slice of time and a seed each; one that fails, crashes or hangs is a fault, and is
printed with the command that repeats it. The exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import gemmlet
from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.backends.cpu import CpuBackend, available_isas
from gemmlet.nn import GAN, MLP, Adam

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from support import UPDATED, arguments_of, copies, one_call_of_each, outcome, same_bits  # noqa: E402
from test_layouts import LAYOUTS, laid_out  # noqa: E402

# Seconds of a slice; one that takes so many more than it was given hangs.
SLICE, PATIENCE = 30.0, 60.0
LEAK = 24 << 20  # bytes that a process may grow by after its warm-up; allocators keep some


def until(seconds: float) -> Iterator[int]:
    """Count up until the time is over, at least once."""
    end, count = time.monotonic() + seconds, 0
    while not count or time.monotonic() < end:
        yield count
        count += 1


def backends() -> dict[str, Any]:
    """The backends of this machine's processor, but for the reference."""
    found: dict[str, Any] = {f"cpu-{isa}": CpuBackend(isa) for isa in available_isas()}
    with contextlib.suppress(ImportError, RuntimeError):
        found["numba"] = select.load("numba")
    return found


def task(rng: np.random.Generator) -> tuple[MLP, Any, Any]:
    """A network with samples and labels."""
    layers = [int(n) for n in rng.integers(1, 40, 2)] + [int(rng.integers(2, 9))]
    rows = int(rng.integers(1, 120))
    x = rng.normal(size=(rows, layers[0])).astype(np.float32)
    return MLP(layers, seed=int(rng.integers(1000))), x, rng.integers(0, layers[-1], rows)


# The parts: each tries for some seconds, counts what it tried, and raises at a fault.


def arrays(arguments: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those of the arguments that are arrays."""
    return [(name, value) for name, value in arguments.items() if isinstance(value, np.ndarray)]


def kernels_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Every kernel of the registry, in random shapes and layouts, against the reference in float64."""
    chosen, reference = list(backends().items()), select.load("numpy")
    for _ in until(seconds):
        label, backend = chosen[rng.integers(len(chosen))]
        name, dtype = str(rng.choice(kernels.__all__)), (np.float32, np.float64)[rng.integers(2)]
        rows, columns = (int(2 ** rng.uniform(0, 8)) for _ in range(2))
        arguments = arguments_of(name, rng, dtype, rows, columns)
        exactly = {k: v.astype(np.float64) if v.dtype == dtype else v for k, v in arrays(copies(arguments))}
        with gemmlet.use_backend(reference):
            expected = outcome(name, arguments | exactly)
        layouts = {k: str(rng.choice([*LAYOUTS, "plain", "unaligned"])) for k, _ in arrays(arguments)}
        layouts |= {k: "plain" for k in UPDATED if layouts.get(k) == "unaligned"}  # which is refused there
        given = {k: v if layouts[k] == "plain" else laid_out(layouts[k], v) for k, v in arrays(arguments)}
        count = int(rng.integers(1, 4))
        gemmlet.set_num_threads(count)
        backend.set_num_threads(count)  # which gemmlet's setting reaches only where it was loaded by name
        with gemmlet.use_backend(backend):
            results = outcome(name, arguments | given)
        tolerance = 2e-4 if dtype == np.float32 else 1e-10
        for result, exact in zip(results, expected, strict=True):
            scale = 1.0 + np.max(np.abs(exact), initial=0.0, where=np.isfinite(exact))
            same = result.shape == exact.shape and np.allclose(result, exact, tolerance, tolerance * scale, True)
            assert same, f"{name} on {label}, {dtype.__name__} ({rows}, {columns}), {layouts}: wrong"
        tried[f"calls on {label}"] += 1


def threads_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """All kernels, and networks, from several threads at once: the same bits as from one."""
    for _ in until(seconds):
        gemmlet.set_num_threads(int(rng.integers(1, 5)))
        calls = one_call_of_each(rng, np.float32, *(int(n) for n in rng.integers(1, 90, 2)))
        model, x, y = task(rng)

        def trained(model: MLP = model, x: Any = x, y: Any = y) -> Any:
            own = copy.deepcopy(model)
            own.fit(x, y, epochs=2, batch_size=16, optimizer=Adam())
            return own.parameters

        calls["fit"] = trained
        expected = {name: call() for name, call in calls.items()}

        def work(_: int, calls: Any = calls, expected: Any = expected) -> None:
            for name, call in calls.items():
                assert all(map(same_bits, call(), expected[name])), f"{name}: other bits in a thread"

        count = int(rng.integers(2, 6))
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(work, range(count)))
        tried["threads"] += count
        tried["calls"] += count * len(calls)


def in_fork(act: Callable[[], None], meanwhile: Callable[[int], None] = lambda child: None) -> None:
    """Run `act` in a fork of this process, and `meanwhile` here; raise unless it ends well within 20 s."""
    child = os.fork()
    if child == 0:
        failed = False
        try:
            act()
        except Exception:  # a Ctrl-C outside what `act` guards is none
            failed = True
            traceback.print_exc()
        finally:
            os._exit(failed)
    meanwhile(child)
    end = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGABRT)  # faulthandler says where it stood
            os.waitpid(child, 0)
            raise AssertionError("a child process hangs")
        time.sleep(0.001)
    assert ended[1] == 0, f"a child process ended with {os.waitstatus_to_exitcode(ended[1])}"


def fork_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Forks of a process that has computed in threads, which compute the same."""
    for _ in until(seconds):
        gemmlet.set_num_threads(int(rng.integers(1, 5)))
        calls = one_call_of_each(rng, np.float64, *(int(n) for n in rng.integers(1, 200, 2)))
        expected = {name: call() for name, call in calls.items()}
        model, x, y = task(rng)

        def act(calls: Any = calls, expected: Any = expected, model: MLP = model, x: Any = x, y: Any = y) -> None:
            for name, call in calls.items():
                assert all(map(same_bits, call(), expected[name])), f"{name}: other bits in a fork"
            model.fit(x, y, epochs=1)

        in_fork(act)
        tried["forks"] += 1
        tried["calls"] += len(calls) + 1


def signals_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Storms of Ctrl-C during fit: it ends, its parameters are finite, and training goes on."""
    model, x, y = task(rng)
    model.fit(x, y, epochs=1)  # what is imported first: within an import Python may drop a Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in until(seconds):
        gemmlet.set_num_threads(int(rng.integers(1, 4)))
        model, x, y = task(rng)
        gaps = rng.exponential(0.002, int(rng.integers(1, 30)))
        started, start = os.pipe()  # a fork drops the signals that come before its first line

        def act(model: MLP = model, x: Any = x, y: Any = y, start: int = start) -> None:
            try:
                os.write(start, b"!")
                model.fit(x, y, epochs=1_000_000_000, batch_size=8)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            assert all(np.isfinite(parameter).all() for parameter in model.parameters), "parameters that are not finite"
            model.fit(x, y, epochs=1)

        def storm(child: int, gaps: Any = gaps, started: int = started) -> None:
            os.read(started, 1)
            for gap in gaps:
                time.sleep(gap)
                os.kill(child, signal.SIGINT)  # until it is waited for it has its process ID

        in_fork(act, storm)
        os.close(started)
        os.close(start)
        tried["storms"] += 1
        tried["signals"] += len(gaps)


def leaks_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Calls, errors, trainings and files again and again: no more memory than after a while."""
    calls = [*one_call_of_each(rng, np.float32, 60, 50).values()]
    gan, images = GAN(3, [8, 6], [8, 1]), rng.uniform(size=(50, 6)).astype(np.float32)
    bad = [lambda: kernels.matmul(images, images), lambda: MLP.load(io.BytesIO(bytes(100))), lambda: MLP([0, 1])]

    def everything() -> None:
        for call in calls:
            call()
        for call in bad:
            with contextlib.suppress(ValueError):
                call()
        model, x, y = task(rng)
        model.fit(x, y, epochs=1)
        gan.fit(images, epochs=1)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder) / "a")
            MLP.load(Path(folder) / "a").predict(x)
        tried["rounds"] += 1

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    for _ in until(seconds / 4):
        everything()
    before, rounds = resident(), tried["rounds"]
    for _ in until(3 * seconds / 4):
        everything()
    grown = resident() - before
    assert grown < LEAK, f"{grown >> 20} MiB more after {tried['rounds'] - rounds} rounds"


def files_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Networks' files with bytes changed, cut out, doubled and swapped: read, or refused with ValueError."""
    models = [MLP([3, 4, 2], ema_decay=0.5), GAN(2, [3, 4], [3, 1])]
    for _ in until(seconds):
        model, file = models[rng.integers(2)], io.BytesIO()
        model.save(file)
        content = bytearray(file.getvalue())
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(int(rng.integers(1, 5))):
            at, n = int(rng.integers(min(header, len(content)) or 1)), int(rng.exponential(8)) + 1
            how = rng.integers(5)
            if how == 0:
                content[at : at + n] = rng.bytes(n)
            elif how == 1:
                del content[at : at + n]
            elif how == 2:
                content[at:at] = content[at : at + n] * int(rng.integers(1, 9))
            elif how == 3:  # what JSON is made of
                content[at : at + 1] = rng.choice([b"[", b"]", b"{", b"}", b'"', b":", b",", b"9", b"-", b"e", b"NaN"])
            else:
                del content[int(rng.integers(len(content) + 1)) :]
        if rng.random() < 0.7:  # a length that fits, so that the header is looked at
            content[:8] = max(0, header - 8 + len(content) - len(file.getvalue())).to_bytes(8, "little")
        try:
            type(model).load(io.BytesIO(content))
            tried["files read"] += 1
        except ValueError:
            tried["files refused"] += 1


def indices_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Index arrays that are broken: refused, or computed with what was checked."""
    from test_broken_indices import run

    tried["calls"] += run(int(rng.integers(1 << 30)), seconds)


def numpy_part(seconds: float, rng: np.random.Generator, tried: Counter[str]) -> None:
    """Random programs over NumPy's surface: while it is accelerated they see the same, warnings and errors too."""
    from numpy_cases import differences

    for _ in until(seconds):
        gemmlet.set_num_threads(int(rng.integers(1, 4)))
        seed, count = int(rng.integers(1 << 30)), 500
        found = "\n\n".join(differences(seed, count, gemmlet.accelerate_numpy))
        assert not found, f"accelerated, NumPy differs:\n{found}"
        tried["programs"] += count


PARTS: dict[str, Callable[[float, np.random.Generator, Counter[str]], None]] = {
    "kernels": kernels_part,
    "threads": threads_part,
    "fork": fork_part,
    "signals": signals_part,
    "leaks": leaks_part,
    "files": files_part,
    "indices": indices_part,
    "numpy": numpy_part,
}


def run_part(name: str, seconds: float, seed: int) -> None:
    """Run one slice in this process; its last line has the counts as JSON."""
    faulthandler.enable()
    tried: Counter[str] = Counter()
    try:
        with np.errstate(all="ignore"):
            PARTS[name](seconds, np.random.default_rng(seed), tried)
    finally:
        print(json.dumps(tried), flush=True)


def run_child(name: str, seconds: float, seed: int) -> tuple[dict[str, int], str]:
    """Run one slice in a child process; its counts, and its fault in words."""
    words = ["--part", name, "--seconds", f"{seconds:g}", "--seed", str(seed)]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds + PATIENCE)
        fault = f"ended with {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler says where it stands
        output, _ = process.communicate()
        fault = "hangs"
    counts = next((json.loads(line) for line in reversed(output.splitlines()) if line.startswith("{")), {})
    return counts, fault and f"{output[-3000:]}\nFAULT: {name} {fault}; again: python tools/soak.py {' '.join(words)}"


def main() -> None:
    """Read the command line and run the parts in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of all parts together (default: %(default)g)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first slice, each takes the next (default: 0)")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return run_part(arguments.part, arguments.seconds, arguments.seed)
    names = [name for name in arguments.only.split(",") if name]
    if not names or set(names) - set(PARTS):
        parser.error(f"--only takes some of {', '.join(PARTS)}")
    tried: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults, seed, end = 0, arguments.seed, time.monotonic() + 60 * arguments.minutes
    seconds = min(SLICE, 60 * arguments.minutes / len(names))
    while seed == arguments.seed or time.monotonic() < end:
        for name in names:
            counts, fault = run_child(name, seconds, seed)
            tried[name] += Counter({"slices": 1} | counts)
            faults += bool(fault)
            shown = ", ".join(f"{count:,} {what}" for what, count in tried[name].items())
            print(f"{fault}\n" * bool(fault) + f"{name:<8} {'FAULT' if fault else 'ok':<5} so far: {shown}", flush=True)
            seed += 1
    print(f"{faults} faults in {seed - arguments.seed} slices")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
