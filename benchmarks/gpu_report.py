"""Everything about CUDA that needs a GPU, in one command, planned for less than ten minutes.

    python benchmarks/gpu_report.py [--data-dir DIR] [--out DIR] [--only STAGE,...] [--seconds-per-row X] [--minutes X]
    python benchmarks/gpu_report.py --from report.json [--from more.json ...] [--markdown docs/performance.md]

Builds the package, trains both networks, times everything against cuBLAS, PyTorch and JAX (gpu_cases.py says how),
takes small work apart (gpu_parts.py), times what constants might be instead (gpu_variants.py, gpu_matmul.py), runs the
tests with ``cuda`` as the backend, and NVIDIA's compute-sanitizer on a small set of kernels. What tells most comes
first, as a run may be cut. A stage that fails, or takes longer than it may, does not keep the others from running; the
exit status is 1 then, and 2 where there is no GPU. ``report.json`` and ``report.txt`` are written anew after each
stage, and the output of all stages goes to ``output.log``. What is built stays in ``build/gpu_report``, for later runs
without ``build``; of what changes, only C++ for the CPU has to be built again.

An earlier report in the folder becomes ``report-1.json``, and so on; ``--from`` puts several together.

The machine needs CuPy with cuBLAS, pytest with xdist and what the tests need besides, a C++ compiler, CMake,
scikit-build-core and pybind11 for the build, and compute-sanitizer of CUDA's toolkit; nothing is downloaded. What is
missing is said at the start; a peer that is missing is left out. docs/performance.md has the line that installs it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "build" / "gpu_report"
SITE = WORK / "site"

# The stages in their order, and the seconds that each has of the whole; with what those before it have left over.
SECONDS = {
    "build": 45.0,
    "train": 15.0,
    "calls": 20.0,
    "training": 70.0,
    "fit": 25.0,
    "parts": 30.0,
    "matmul": 70.0,
    "tests": 100.0,
    "elementwise": 20.0,
    "losses": 25.0,
    "sanitizer": 50.0,
    "variants": 50.0,
    "tiles": 35.0,
    "optimizers": 10.0,
}
# The script of a stage that writes tables, and its options.
SCRIPTS = {
    "parts": ["gpu_parts.py"],
    "variants": ["gpu_variants.py"],
    "tiles": ["gpu_matmul.py", "--quick", "--tables"],
}
# What stages do not run without: modules, by the names under which they are installed.
NEEDS = {
    "build": {"scikit_build_core": "scikit-build-core", "pybind11": "pybind11"},
    "tests": {"pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"},
    "sanitizer": {"ml_dtypes": "ml_dtypes", "scipy": "scipy"},
}
# Tests whose kernels always run on the CPU; of the others, those that say "cuda" in their names have to do with a GPU.
WITHOUT_GPU = (
    "test_cuda_compile.py",
    "test_cuda_matmul.py",
    "test_cuda_mutants.py",
    "test_cuda_on_host.py",
    "test_gpu_report.py",
)
TEST_PROCESSES = 12

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# For a tool's start, and what it prints at its end.
_TOOL_SECONDS = 20.0

# After an error of CUDA a process can time nothing more, and another one goes on with the rest.
MAX_PROCESSES = 3

_TAIL_LINES = 40
# Between the polite request to stop and the end.
_GRACE_SECONDS = 8.0

_GPU_FACTS = """
import json, cupy
try:
    import cupy_backends.cuda.libs.cublas
    cublas = True
except ImportError:
    cublas = False
runtime = cupy.cuda.runtime
count = runtime.getDeviceCount()
p = runtime.getDeviceProperties(0)
name = p["name"]
print(json.dumps({
    "name": name.decode() if isinstance(name, bytes) else name,
    "capability": f"{p['major']}.{p['minor']}",
    "multiprocessors": p["multiProcessorCount"],
    "l2_bytes": p["l2CacheSize"],
    "memory_bytes": p["totalGlobalMem"],
    "count": count,
    "cuda_driver": runtime.driverGetVersion(),
    "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
    "cublas": cublas,
}))
"""


@dataclass
class Ended:
    """What became of a command."""

    status: int | None  # None: it took too long
    seconds: float
    lines: list[str] = field(default_factory=list)

    @property
    def tail(self) -> list[str]:
        """The last lines."""
        return self.lines[-_TAIL_LINES:]

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s"
        return "done" if not self.status else f"exit status {self.status}"


class Runner:
    """Runs commands within the time that is left, and keeps what they print.

    Parameters
    ----------
    log : Path
        Where all output goes.
    seconds : float
        For everything.
    """

    def __init__(self, log: Path, seconds: float) -> None:
        self._log, self._end = log, time.monotonic() + seconds
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - time.monotonic())

    def run(
        self,
        command: Sequence[str | Path],
        limit: float,
        environment: Mapping[str, str],
        show: Callable[[str], bool] = lambda line: True,
    ) -> Ended:
        """Run a command for at most `limit` seconds; print those of its lines that `show` wants, as they come."""
        limit, start = min(limit, self.left), time.monotonic()
        lines: list[str] = []
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            env=dict(environment),
            cwd=ROOT,
            start_new_session=True,
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                with self._lock:
                    with self._log.open("a", encoding="utf-8") as log:
                        log.write(line)
                    if show(lines[-1]):
                        print(lines[-1], flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            # pytest then says what it has found so far.
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
            reader.join(5.0)
            if process.stdout is not None and not reader.is_alive():
                process.stdout.close()
        return Ended(status, time.monotonic() - start, lines)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a command and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def environment() -> dict[str, str]:
    """What all processes get."""
    wanted = {key: value for key, value in os.environ.items() if not key.startswith("GEMMLET_")}
    paths = [str(SITE) if (SITE / "gemmlet").is_dir() else str(ROOT / "python"), str(HERE)]
    return {
        **wanted,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "GEMMLET_CACHE_DIR": str(WORK / "cache"),
        "CUPY_CACHE_DIR": str(WORK / "cupy"),
        # JAX takes three quarters of the memory otherwise.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def refresh() -> None:
    """Bring what was built up to date, but for what is compiled: a stage may run again without `build`."""
    package = SITE / "gemmlet"
    for source, target in ((ROOT / "python" / "gemmlet", package), (ROOT / "csrc", package / "csrc")):
        for path in source.rglob("*.*") if package.is_dir() else ():
            copy = target / path.relative_to(source)
            if path.suffix in (".py", ".cuh", ".h") and (not copy.exists() or copy.read_bytes() != path.read_bytes()):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


#
# Stages
#


@dataclass
class Stage:
    """What a stage found."""

    ok: bool
    summary: str
    failures: list[str] = field(default_factory=list)


@dataclass
class Job:
    """What stages need: how to run commands, the options, and the report to add to."""

    runner: Runner
    options: argparse.Namespace
    report: dict[str, Any]

    def limit(self, stage: str) -> float:
        """The most seconds that a stage may take: its own, and none of those that come after it."""
        chosen = self.options.only
        after = sum(SECONDS[name] for name in chosen[chosen.index(stage) + 1 :])
        left = self.runner.left
        return left - after if left >= SECONDS[stage] + after else left * SECONDS[stage] / (SECONDS[stage] + after)

    def data(self) -> list[str]:
        """The option that names the data."""
        return [] if self.options.data_dir is None else ["--data-dir", str(self.options.data_dir.resolve())]


def build(job: Job) -> Stage:
    """The package, as pip builds it, with all processors."""
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(SITE)]
    command += [f"--config-settings=build-dir={WORK / 'cmake'}", str(ROOT)]
    settings = {**environment(), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    ended = job.runner.run(command, job.limit("build"), settings, lambda line: False)
    return Stage(ended.status == 0, ended.how, [] if ended.status == 0 else ended.tail)


def test_command() -> list[str]:
    """Return the command of the tests."""
    paths = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in WITHOUT_GPU]
    # Parameters are backends where a fixture or a list of them is named.
    named = re.compile(r"backend\b|SPECS")
    files = [str(path) for path in paths if "cuda" in path.name or named.search(path.read_text("utf-8"))]
    command = [sys.executable, "-m", "pytest", "-q", f"-n={TEST_PROCESSES}", "--dist=worksteal", "--tb=short", "-rfE"]
    command += ["-p", "no:cacheprovider", "-k", "cuda", "--maxfail=60", "--durations=8"]
    # What newer versions of other packages announce is no error of this one.
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserWarning"):
        command += ["-W", f"default::{category}"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=60", "--timeout-method=thread"]
    return command + files


_TEST_SUMMARY = re.compile(r"^=*\s*((?:\d+ [a-z]+(?:, )?)+ in [\d.]+s.*?)\s*=*$")


def tests(job: Job) -> Stage:
    """Every test of a backend, with cuda as the only one."""
    settings = {**environment(), "GEMMLET_TEST_BACKENDS": "cuda"}

    def show(line: str) -> bool:
        return line.startswith(("FAILED", "ERROR")) or "%]" in line or bool(_TEST_SUMMARY.match(line))

    ended = job.runner.run(test_command(), job.limit("tests"), settings, show)
    return tests_stage(ended)


def tests_stage(ended: Ended) -> Stage:
    """Return what pytest's output says."""
    found = [match[1] for line in ended.lines if (match := _TEST_SUMMARY.match(line))]
    failures = [line for line in ended.lines if line.startswith(("FAILED ", "ERROR "))]
    summary = found[-1] if found else "no summary"
    if ended.status != 0 and not failures:
        failures = ended.tail
    how = "" if ended.status in (0, 1) else f" ({ended.how})"
    return Stage(ended.status == 0 and bool(found), summary + how, failures[:60])


def sanitizer_path() -> str | None:
    """Where compute-sanitizer is."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders if folder)])
    return shutil.which("compute-sanitizer", path=paths)


def sanitizer(job: Job) -> Stage:
    """NVIDIA's compute-sanitizer, all of its tools at once, on `gpu_sanitized.py`."""
    path, settings, limit = sanitizer_path(), environment(), job.limit("sanitizer")
    end = time.monotonic() + limit
    if path is None:
        return Stage(False, "there is no compute-sanitizer")
    script = [sys.executable, str(HERE / "gpu_sanitized.py")]
    # Alone first: so that kernels are compiled once, and what is wrong without the tools is seen to be.
    alone = job.runner.run([*script, "--seconds", f"{0.3 * limit:.0f}"], 0.5 * limit, settings)
    if alone.status != 0:
        return Stage(False, f"without a tool: {alone.how}", alone.tail)
    left = max(5.0, end - time.monotonic())
    script += ["--seconds", f"{max(3.0, left - _TOOL_SECONDS):.0f}"]
    results: dict[str, Ended] = {}

    def run(tool: str) -> None:
        limit = "2000" if tool == "initcheck" else "20"
        options = ["--tool", tool, "--target-processes", "application-only", "--print-limit", limit]
        if tool == "memcheck":
            options += ["--report-api-errors", "no"]  # CuPy asks for what there may not be
        show = re.compile(r"SUMMARY|^========= (Invalid|Error|Barrier)|WRONG|FAILED").search
        results[tool] = job.runner.run([path, *options, *script], left, settings, lambda line: show(line) is not None)

    threads = [threading.Thread(target=run, args=(tool,)) for tool in TOOLS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {tool: sanitizer_result(results[tool]) for tool in TOOLS}
    job.report["sanitizers"] = {
        tool: {"ok": stage.ok, "summary": stage.summary, "lines": stage.failures} for tool, stage in found.items()
    }
    # What initcheck finds is told, and is no failure: memory that is read and not used is no error.
    bad = [tool for tool in TOOLS if not found[tool].ok and tool != "initcheck"]
    failures = [line for tool in bad for line in found[tool].failures]
    return Stage(not bad, f"{', '.join(bad)} not clean" if bad else "clean", failures)


_SANITIZER_SUMMARY = re.compile(r"=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)")
_PLACE = re.compile(r"^=+ +at (?:void )?(?:\w+::)*(\w+)")
_CHECKS = re.compile(r"(\d+ of \d+) checks, \d+ wrong")


def sanitizer_result(ended: Ended) -> Stage:
    """Return what a tool's output says."""
    summaries = [match for line in ended.lines if (match := _SANITIZER_SUMMARY.search(line))]
    checks = [match[1] for line in ended.lines if (match := _CHECKS.search(line))]
    if not summaries or not checks:
        return Stage(False, f"no summary: {ended.how}", ended.tail)
    ok = ended.status == 0 and all(match[2] == "0" for match in summaries)
    summary = f"{summaries[-1][1]}; {checks[-1]} checks"
    # Of many alike, how many there are of each kernel.
    places = collections.Counter(match[1] for line in ended.lines if (match := _PLACE.search(line)))
    summary += "".join(f"; {kernel}: {count}" for kernel, count in places.most_common(8))
    return Stage(ok, summary, [] if ok else [line for line in ended.lines if line.startswith("=====")][:30])


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """What a process has written so far."""
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off
                yield json.loads(line)


def train(job: Job) -> Stage:
    """Both networks, by gemmlet alone."""
    kept = WORK / "trained.jsonl"
    kept.unlink(missing_ok=True)
    command = [sys.executable, HERE / "gpu_training.py", kept, *job.data()]
    ended = job.runner.run(command, job.limit("train"), environment())
    trained = job.report["trained"] = {}
    for entry in _entries(kept):
        trained.update(entry.get("trained", {}))
    if ended.status != 0:
        return Stage(False, ended.how, ended.tail)
    if not trained.get("gan_finite"):
        return Stage(False, "the GAN's losses or samples are not finite")
    epoch = trained["mlp_seconds"] / trained["mlp_epochs"]
    return Stage(True, f"accuracy {trained['mlp_accuracy']:.2%} after {trained['mlp_epochs']} epochs of {epoch:.3f} s")


def timed(job: Job, family: str) -> Stage:
    """Rows of times."""
    kept = WORK / f"{family}.jsonl"
    kept.unlink(missing_ok=True)
    end, processes, ended = time.monotonic() + job.limit(family), 0, Ended(None, 0.0)
    # Another one is worth its start alone.
    while processes < MAX_PROCESSES and (not processes or time.monotonic() < end - 10):
        processes += 1
        left = end - time.monotonic()
        command: list[str | Path] = [sys.executable, HERE / "gpu_cases.py", family, kept, *job.data()]
        # One row, and the imports at the start, may take some seconds.
        command += ["--seconds-per-row", str(job.options.seconds_per_row), "--seconds", f"{0.85 * left:.0f}"]
        ended = job.runner.run(command, left, environment())
        if ended.status in (0, None):
            break
    count = 0
    for entry in _entries(kept):
        if "row" in entry:
            job.report["rows"].append(entry["row"])
            count += 1
        if "note" in entry:
            job.report["notes"].append(f"{family}: {entry['note']}")
        for name, value in entry.get("roof", {}).items():
            job.report["roof"].setdefault(name, value)
    restarts = "" if processes == 1 else f", {processes} processes"
    failed = ended.status != 0 or processes > 1
    return Stage(not failed and count > 0, f"{count} rows, {ended.how}{restarts}", ended.tail if failed else [])


def tabled(job: Job, name: str) -> Stage:
    """Tables of a script of its own."""
    kept = WORK / f"{name}.jsonl"
    kept.unlink(missing_ok=True)
    script, *more = SCRIPTS[name]
    limit = job.limit(name)
    command: list[str | Path] = [sys.executable, HERE / script, *more, kept, "--seconds", f"{0.8 * limit:.0f}"]
    command += [] if name == "tiles" else job.data()
    ended = job.runner.run(command, limit, environment())
    tables = [entry["table"] for entry in _entries(kept) if "table" in entry]
    job.report.setdefault("tables", {}).update({table["title"]: table for table in tables})
    failures = ended.tail if ended.status else []
    return Stage(ended.status == 0 and bool(tables), f"{len(tables)} tables, {ended.how}", failures)


STAGES: dict[str, Callable[[Job], Stage]] = {"build": build, "tests": tests, "sanitizer": sanitizer, "train": train}
STAGES |= {name: functools.partial(tabled, name=name) for name in SCRIPTS}


def run_stage(job: Job, name: str) -> None:
    """Run a stage, and put what it found into the report."""
    print(f"\n== {name} ({job.runner.left:.0f} s left)", flush=True)
    start = time.monotonic()
    if job.runner.left < 5:
        stage = Stage(False, "left out: the time is over")
    else:
        try:
            stage = STAGES[name](job) if name in STAGES else timed(job, name)
        except Exception as error:  # the other stages are still to come
            stage = Stage(False, f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - start
    job.report["stages"][name] = {
        "ok": stage.ok,
        "seconds": round(seconds, 1),
        "summary": stage.summary,
        "failures": stage.failures,
    }
    print(f"== {name}: {'ok' if stage.ok else 'FAILED'}, {seconds:.0f} s; {stage.summary}", flush=True)
    for line in stage.failures:
        print(f"   {line}", flush=True)
    write(job)


def write(job: Job) -> None:
    """Write what there is of the report."""
    import gpu_tables

    written = {"report.json": json.dumps(job.report, indent=1) + "\n", "report.txt": gpu_tables.text(job.report)}
    for name, text in written.items():
        temporary = job.options.out / f"{name}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(job.options.out / name)


#
# The machine
#


def gpu_facts() -> dict[str, Any]:
    """Return what GPU there is.

    Raises
    ------
    RuntimeError
        There is none; the message says how that shows.
    """
    # In a process of its own, as this one shall hold no memory of the GPU.
    asked = subprocess.run([sys.executable, "-c", _GPU_FACTS], capture_output=True, text=True, env=environment())
    if asked.returncode:
        raise RuntimeError(asked.stderr.strip().splitlines()[-1] if asked.stderr.strip() else "CuPy cannot be imported")
    facts: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
    facts["driver"] = _driver()
    return facts


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    return "unknown"


def lacking(stages: Sequence[str]) -> list[str]:
    """Return what stages need and the machine has not, a line for each stage."""
    found = []
    for stage in stages:
        missing = [package for module, package in NEEDS.get(stage, {}).items() if not importlib.util.find_spec(module)]
        if stage == "build" and shutil.which("cmake") is None and not importlib.util.find_spec("cmake"):
            missing.append("cmake")
        if stage == "sanitizer" and sanitizer_path() is None:
            missing.append("compute-sanitizer")
        if missing:
            found.append(f"{stage} will fail: there is no {', '.join(missing)}")
    return found


def versions(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"python": platform.python_version(), "nvrtc": str(facts["nvrtc"])}
    for name in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


#
# The command
#


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="a folder with MNIST; without it the embedded sample is used")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="where the report goes")
    parser.add_argument("--only", default="", help=f"some of these, separated by commas: {', '.join(SECONDS)}")
    parser.add_argument("--seconds-per-row", type=float, default=0.3, help="all implementations together, about")
    parser.add_argument("--minutes", type=float, default=9.6, help="for everything")
    earlier = (
        "show this report.json instead of measuring; several of one GPU, of which later ones count, are put together"
    )
    parser.add_argument("--from", dest="earlier", type=Path, action="append", help=earlier)
    parser.add_argument("--markdown", type=Path, help="write the tables between the markers of this document")
    options = parser.parse_args(arguments)
    only = [name.strip() for name in options.only.split(",") if name.strip()] or list(SECONDS)
    for name in only:
        if name not in SECONDS:
            parser.error(f"--only: {name!r} is unknown; the choices are {', '.join(SECONDS)}")
    options.only = [name for name in SECONDS if name in only]
    for name in ("seconds_per_row", "minutes"):
        if not 0 < getattr(options, name) < 1e6:
            parser.error(f"--{name.replace('_', '-')} must be a number above 0")
    if options.data_dir is not None and not options.data_dir.is_dir():
        parser.error(f"--data-dir {options.data_dir} is not a folder")
    # Before anything is measured.
    if options.markdown is not None:
        from gemmlet.bench.report import between_markers

        try:
            between_markers(options.markdown.read_text("utf-8"), "gpu", "")
        except (OSError, ValueError) as error:
            parser.error(f"--markdown {options.markdown}: {error}")
    if options.earlier is not None:
        options.earlier = _earlier(parser, options.earlier)
    return options


def _earlier(parser: argparse.ArgumentParser, paths: Sequence[Path]) -> dict[str, Any]:
    """The reports of `--from` as one."""
    import gpu_tables

    reports = []
    for path in paths:
        try:
            reports.append(json.loads(path.read_text("utf-8")))
            gpu_tables.text(reports[-1])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"--from {path} is no report: {type(error).__name__}: {error}")
    try:
        return gpu_tables.merged(reports)
    except ValueError as error:
        parser.error(f"--from: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    sys.path.insert(0, str(ROOT / "python"))
    options = parse(arguments)
    # Tables have signs that ASCII has not.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    import gpu_tables

    if options.earlier is not None:
        report = options.earlier
    else:
        notes = lacking(options.only)
        try:
            facts = gpu_facts()
        except RuntimeError as error:
            print("\n".join([f"no GPU: {error}", *notes]))
            return 2
        if "tiles" in options.only and not facts.get("cublas", True):
            notes.append("tiles will fail: CuPy finds no cuBLAS")
        report = measure(options, facts, notes)
    text = gpu_tables.text(report)
    print(f"\n{text}", flush=True)
    if options.markdown is not None:
        document = gpu_tables.written_into(options.markdown.read_text("utf-8"), report)
        options.markdown.write_text(document, encoding="utf-8")
    done = report["stages"]
    return 0 if all(name in done and done[name]["ok"] for name in report["settings"]["only"]) else 1


def keep_earlier(out: Path) -> None:
    """Give the report that is there the next free number: what a GPU has measured is kept."""
    if not (out / "report.json").exists():
        return
    number = next(n for n in itertools.count(1) if not (out / f"report-{n}.json").exists())
    for path in (out / "report.txt", out / "report.json"):
        if path.exists():
            path.replace(path.with_stem(f"report-{number}"))
    print(f"the earlier report is {out / f'report-{number}.json'}", flush=True)


def measure(options: argparse.Namespace, facts: dict[str, Any], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Run the stages, and return the report, which begins with `notes`."""
    for folder in (options.out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    keep_earlier(options.out)
    refresh()
    log = options.out / "output.log"
    log.write_text("")
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": facts,
        "versions": versions(facts),
        "settings": {"only": options.only, "seconds_per_row": options.seconds_per_row},
        "roof": {},
        "stages": {},
        "rows": [],
        "notes": [*notes],
    }
    print("\n".join([f"{facts['name']}, driver {facts['driver']}", *notes]), flush=True)
    job = Job(Runner(log, 60.0 * options.minutes), options, report)
    # Who stops it shall have the tables of what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in options.only:
            run_stage(job, name)
    except KeyboardInterrupt:
        report["notes"].append("stopped before its end")
    report["settings"]["seconds"] = round(60.0 * options.minutes - job.runner.left, 1)
    write(job)
    return report


if __name__ == "__main__":
    sys.exit(main())
