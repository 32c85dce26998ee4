"""The benchmarks: every case is there, checks find a wrong result, and what is reported follows from the samples."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemmlet
from gemmlet import kernels
from gemmlet.backends import cpu as cpu_backend
from gemmlet.bench import cases as bench_cases
from gemmlet.bench import (
    implementations,
    instructions,
    programs,
    results,
    roofline,
    scaling,
    suite,
    targets,
    timing,
    training,
)
from gemmlet.bench.case import Case, Prepared, Settings
from gemmlet.bench.results import Results, Row
from gemmlet.bench.timing import Plan, Timed
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES

for package in ("typer", "rich", "matplotlib", "sklearn", "threadpoolctl"):
    pytest.importorskip(package)

from gemmlet import cli  # noqa: E402
from gemmlet.bench import report  # noqa: E402

QUICK, FULL = Settings(quick=True), Settings()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In a folder of its own; the threads and the backend are as before afterwards."""
    threads = gemmlet.get_num_threads()
    for variable in ("GEMMLET_DATA_DIR", *suite.BLAS_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    with contextlib.chdir(tmp_path):
        yield
    gemmlet.set_num_threads(threads)


@pytest.fixture
def some_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roofline that takes no seconds to measure."""
    monkeypatch.setattr(roofline, "measure", lambda threads: roofline.Roofline({"float32": 1e11}, {2**20: 1e10}))


def call(*words: Any) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *map(str, words)])
    return int(caught.value.code or 0)


# The cases.


@pytest.mark.parametrize("settings", [QUICK, FULL], ids=["quick", "full"])
def test_cases_have_keys_and_implementations_of_their_own(settings: Settings) -> None:
    found = suite.chosen_cases(settings, suite.Choice())
    assert len({case.key for case in found}) == len(found)
    assert {case.group for case in found} == set(bench_cases.GROUPS)
    for case in found:
        assert implementations.OURS in case.implementations
        # Of ours alone, as NumPy is there before; beside itself; and under packages that compute by themselves.
        assert {"numpy", "gemmlet plain"} & {*case.implementations} or case.group in ("import", "sklearn", "torch")
        assert set(case.implementations) <= set(implementations.IMPLEMENTATIONS)
        assert json.loads(json.dumps(dict(case.labels))) == case.labels


def test_every_kernel_is_timed() -> None:
    timed = {case.labels.get("kernel") for case in suite.chosen_cases(FULL, suite.Choice())}
    forward = [*ACTIVATIONS, *ROW_FUNCTIONS]
    every = {*forward, *(f"{name}_backward" for name in forward), *LOSSES, *ROW_LOSSES}
    every |= {"matmul", "linear", "sgd_update", "adam_update", "adamw_update"}
    # linear_backward is an activation's gradient, two matmuls and a sum, each timed by itself.
    assert set(kernels.__all__) - {"linear_backward"} == every
    assert every <= timed
    assert {bench_cases._UPDATES[title][1] for title in bench_cases._UPDATES} == set(OPTIMIZER_RULES)


def test_a_new_activation_appears_without_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ACTIVATIONS["tanh"]._replace(name="new")
    monkeypatch.setitem(ACTIVATIONS, "new", entry)
    monkeypatch.setattr(kernels, "new", kernels.tanh, raising=False)
    monkeypatch.setattr(kernels, "new_backward", kernels.tanh_backward, raising=False)
    found = suite.chosen_cases(QUICK, suite.Choice(["activations"], "new"))
    assert [case.name for case in found] == [
        f"{kernel} 16,384 {dtype}" for dtype in ("float32", "float64") for kernel in ("new", "new_backward")
    ]
    for case in found:
        assert {"gemmlet", "numpy"} <= set(case.implementations)
        timing.check(case, "numpy")
        timing.check(case, "gemmlet")


@pytest.mark.parametrize(
    ("known", "find"),
    [("TORCH_ACTIVATIONS", "_torch_function"), ("JAX_ACTIVATIONS", "_jax_function")],
    ids=["torch", "jax"],
)
def test_peers_have_the_functions_that_the_tables_name(known: str, find: str) -> None:
    pytest.importorskip("torch" if "torch" in find else "jax")
    for name in getattr(bench_cases, known):
        assert callable(getattr(bench_cases, find)(name)), name


def test_peers_are_right() -> None:
    """Each implementation of a few cases that are small; `pytest benchmarks` checks all of them."""
    chosen = [
        "tanh 16,384 float64",
        "softmax_cross_entropy 64x10 float32",
        "adam 100,000 float64",
        "x.T@g 784x64x128",
        "augment: affine",
    ]
    found = [case for words in chosen for case in suite.chosen_cases(QUICK, suite.Choice((), words))]
    assert len(found) >= len(chosen)
    for case in found:
        for implementation in suite.chosen_implementations(
            case, QUICK, suite.Choice(implementations=("numpy", "gemmlet", "pytorch", "pytorch fused", "scipy"))
        ):
            timing.check(case, implementation)


@pytest.mark.parametrize("case", list(programs.programs(QUICK)), ids=lambda case: case.name)
def test_accelerated_programs_have_the_same_results(case: Case) -> None:
    timing.check(case, "gemmlet")


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        ("print('loss', numpy.exp(numpy.ones(3)).sum(), 'of', -1e-3)", None),
        ("print('loss', 1.5 + 1e-8 * ('gemmlet' in sys.modules))", "wrong result: 4 times the tolerance"),
        ("print('loss', *[1] * (1 + ('gemmlet' in sys.modules)))", "a result of shape (2,) instead of (1,)"),
        ("print('gemmlet' in sys.modules and 1 / 0, 7)", "RuntimeError: it.py: ZeroDivisionError: division by zero"),
    ],
)
def test_programs_are_run_and_compared(code: str, failed: str | None) -> None:
    Path("it.py").write_text(
        f"import sys\nimport numpy\nassert sys.argv == ['it.py'], sys.argv\nprint('more')\n{code}\n"
    )
    case = programs.case(Path("it.py"))
    timed = timing.run(case, list(case.implementations), Plan(0.001, 2))
    assert timed["numpy"].failed is None
    assert all(0 < seconds < 10 for seconds in timed["numpy"].samples)
    assert (timed["gemmlet"].failed is None) == (failed is None)
    assert failed is None or failed in str(timed["gemmlet"].failed)


@pytest.mark.parametrize(
    "case",
    [
        training.digits_case(QUICK, (784, 16, 10), 300, 64, "float64", ("gemmlet", "numpy")),
        *(training.wide_case(64, 256, "float64", rule) for rule in ("sgd", "adam")),
        training.wide_case(64, 128, "float64", "adam", QUICK),
    ],
    ids=lambda case: case.name,
)
def test_trainings_agree(case: Case) -> None:
    """NumPy's loop, which the others are held against, itself agrees with the step by step of `nn`."""
    inputs = case.inputs()
    exact = case.exact(inputs)
    for implementation in set(case.implementations) & {"gemmlet", "gemmlet kernels", "numpy"}:
        worst = max(
            np.abs(a - b).max() for a, b in zip(case.prepare(implementation, inputs).result(), exact, strict=True)
        )
        assert worst < 1e-12, implementation
    assert max(np.abs(a - b).max() for a, b in zip(inputs.parameters, exact, strict=True)) > 1e-3  # it has learnt


# Checking and timing.


def made_up(**made: Any) -> Case:
    return Case(
        "group",
        "name",
        lambda: np.arange(3.0),
        made,
        lambda x: x + 1,
        rtol=1e-6,
        atol=1e-6,
        labels={"dtype": "float64"},
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x,
        lambda x: x + 1 + 1e-5,
        lambda x: np.where(x == 2, np.nan, x + 1),
        lambda x: (x + 1)[:2],
        lambda x: (x + 1, x),
    ],
    ids=["values", "a little", "nan", "shape", "number"],
)
def test_a_wrong_implementation_is_found_and_never_timed(wrong: Any) -> None:
    times = []

    def right(x: Any) -> Any:
        return lambda: x + 1

    def spoilt(x: Any) -> Prepared:
        return Prepared(lambda: times.append(1), lambda: wrong(x))

    case = made_up(gemmlet=right, numpy=spoilt)
    timed = timing.run(case, ["gemmlet", "numpy"], Plan(0.001, 2))
    assert timed["gemmlet"].failed is None
    assert len(timed["gemmlet"].samples) >= 2
    assert timed["numpy"].failed
    assert timed["numpy"].samples == ()
    assert times == []
    with pytest.raises((AssertionError, ValueError)):
        timing.check(case, "numpy")


def test_an_implementation_that_raises_leaves_the_others() -> None:
    def raises(x: Any) -> Any:
        raise RuntimeError("no\nsuch thing")

    timed = timing.run(made_up(gemmlet=lambda x: lambda: x + 1, numpy=raises), ["numpy", "gemmlet"], Plan(0.001, 2))
    assert timed["numpy"].failed == "RuntimeError: no such thing"
    assert timed["gemmlet"].samples


class Clock:
    """A clock that the calls move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def implementation(self, seconds: float) -> Prepared:
        def run() -> None:
            self.now += seconds

        return Prepared(run, run)


def test_samples_are_seconds_per_call() -> None:
    clock = Clock()
    timed = timing.alternate(
        {
            "gemmlet": clock.implementation(1e-5),
            "numpy": clock.implementation(3e-3),
            "pytorch": clock.implementation(0.2),
        },
        Plan(1.0, 3, 50, 1e-3, 5e-3),
        random.Random(0),
        clock,
    )
    assert np.allclose(timed["gemmlet"], 1e-5)
    assert np.allclose(timed["numpy"], 3e-3)
    assert np.allclose(timed["pytorch"], 0.2)
    # A round takes about 0.2 s, so that there are some five.
    assert {len(samples) for samples in timed.values()} == {4}
    assert timing.calls_per_sample(clock.implementation(1e-5).call, 1e-3, clock) == 100


def test_an_implementation_is_warmed_up_until_it_is_fast_again() -> None:
    clock = Clock()
    seconds = itertools.chain([1e-4] * 3, [1e-2] * 5, itertools.repeat(1e-4))

    def run() -> None:
        clock.now += next(seconds)

    plan = Plan(warm_seconds=1e-3, max_warm_seconds=1.0)
    assert timing._warm_up(run, dataclasses.replace(plan, warm_seconds=2e-4), 1.0, clock) == pytest.approx(1e-4)
    assert timing._warm_up(run, plan, 1e-4, clock) == pytest.approx(1e-4)
    # The five slow calls are over, though one of them was longer than the warm-up has to be.
    assert clock.now > 5e-2
    before = clock.now
    timing._warm_up(run, plan, 1e-6, clock)  # it was never so fast again
    assert clock.now - before == pytest.approx(plan.max_warm_seconds, abs=1e-3)


@pytest.mark.skipif(not timing._TASKS.is_dir(), reason="this system has no such list of threads")
def test_quiet_is_when_no_thread_runs() -> None:
    """As with the threads of a BLAS, the one that runs does not need the GIL; others may have its processor."""
    numbers = np.ones(6_000_000)
    for _ in range(3):
        ended: list[float] = []
        begun = threading.Event()

        def spin(ended: list[float] = ended, begun: threading.Event = begun) -> None:
            begun.set()
            np.sin(numbers, out=numbers)
            ended.append(time.perf_counter())

        spinner = threading.Thread(target=spin)
        spinner.start()
        begun.wait()
        time.sleep(1e-3)
        timing._wait_until_quiet(60.0)
        waited_until = time.perf_counter()
        spinner.join()
        assert waited_until > ended[0] - 0.02


@pytest.mark.parametrize("begin", [0.0, 0.001, 0.0039])
def test_quiet_by_used_time_that_grows_at_ticks(begin: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no system tells which threads run: one does, for 0.1 s, and its time is added every 4 ms."""

    class Ticking:
        now = begin

        def perf_counter(self) -> float:
            return self.now

        def process_time(self) -> float:
            return min(self.now, 0.1) // 0.004 * 0.004

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    ticking = Ticking()
    monkeypatch.setattr(timing, "time", ticking)
    monkeypatch.setattr(timing, "_TASKS", tmp_path / "no such folder")
    timing._wait_until_quiet(1.0)
    assert 0.09 < ticking.now < 0.2
    timing._wait_until_quiet(1e-3)
    assert ticking.now < 0.25


def test_rounds_are_at_least_and_at_most_what_the_plan_says() -> None:
    clock = Clock()
    for seconds, expected in ((1e-9, 3), (1e9, 50)):
        timed = timing.alternate({"gemmlet": clock.implementation(1e-4)}, Plan(seconds, 3, 50), random.Random(0), clock)
        assert len(timed["gemmlet"]) == expected


def test_statistics() -> None:
    samples = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [timing.percentile(samples, p) for p in (20, 50, 80)] == pytest.approx([1.8, 3.0, 4.2])
    # Within each round the peer takes twice as long; the second round was slow for both.
    assert timing.ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 2.0
    assert timing.ratio([1.0, 10.0, 3.0], [3.0, 20.0, 3.0]) == 2.0
    assert targets.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_units_divide_the_time() -> None:
    case = dataclasses.replace(made_up(gemmlet=lambda x: lambda: x + 1), units=1000)
    slow = timing.run(dataclasses.replace(case, units=1), ["gemmlet"], Plan(0.001, 3))["gemmlet"].samples
    assert np.median(timing.run(case, ["gemmlet"], Plan(0.001, 3))["gemmlet"].samples) < np.median(slow) / 50


def test_same_threads_for_every_implementation() -> None:
    import threadpoolctl

    names = [
        implementation.name
        for implementation in implementations.IMPLEMENTATIONS.values()
        if implementation.package in (None, "torch", "numexpr") and implementation.available()
    ]
    before = gemmlet.get_num_threads()
    with implementations.same_threads(1, names):
        assert gemmlet.get_num_threads() == 1
        assert {library["num_threads"] for library in threadpoolctl.threadpool_info()} == {1}
        if "torch" in sys.modules:
            assert sys.modules["torch"].get_num_threads() == 1
    assert gemmlet.get_num_threads() == before


def test_missing_peers_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch, some_roofline: None) -> None:
    find = implementations.importlib.util.find_spec
    gone = {"torch", "jax", "sklearn", "numexpr", "numba"}
    monkeypatch.setattr(
        implementations.importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest)
    )
    run = suite.run(QUICK, suite.Choice(["activations"], "gelu_tanh 16,384 float32"), Plan(0.001, 2), 1)
    assert [list(row.timed) for row in run.rows] == [["gemmlet", "numpy"]] * 2
    assert run.notes[0].startswith("Left out, as they are not installed: jax, numba, numexpr, sklearn, torch")


def test_blas_variables_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        started.append((words, environment))
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert call("--list", "overhead") == 0
    ((words, environment),) = started
    assert words[1:] == ["-m", "gemmlet", "bench", "--list", "overhead"]
    assert "OPENBLAS_CORETYPE" not in environment
    assert suite.peers_environment({"PATH": "x", "GEMMLET_ISA": "baseline"}) is None


def test_peers_are_held_to_the_instruction_set(some_roofline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"GEMMLET_ISA": "x86-64-v3", "OPENBLAS_CORETYPE": "SkylakeX"}
    held = suite.peers_environment(given)
    assert held == given | suite.PEERS_ISA["x86-64-v3"]
    assert suite.peers_environment(held) is None
    script = "import json, numpy, torch, threadpoolctl as t; x = torch.ones(2) @ torch.ones(2)\n"
    script += "blas = next(i for i in t.threadpool_info() if i['internal_api'] == 'openblas')\n"
    script += "print(json.dumps([torch.backends.cpu.get_cpu_capability(), blas['architecture']]))"
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | held, capture_output=True, check=True)
    assert json.loads(done.stdout) == ["AVX2", "Haswell"]
    monkeypatch.setenv("GEMMLET_ISA", "x86-64-v3")
    run = suite.run(QUICK, suite.Choice(["overhead"], "tanh 10", ["numpy"]), Plan(0.001, 2), 1)
    assert any("OPENBLAS_CORETYPE" in note for note in run.notes)


def test_steps_of_wide_networks_are_checked_while_rounding_is_small(some_roofline: None) -> None:
    """784-1024-1024-10 with 16 rows and SGD: after a hundred steps float32 is as far from float64 as from anything."""
    chosen = suite.Choice(["wide"], "1024-1024 batch 16, float32", ["gemmlet", "gemmlet kernels", "numpy"])
    (found,) = suite.run(FULL, chosen, Plan(0.001, 1), 1).rows
    assert {name: timed.failed for name, timed in found.timed.items()} == dict.fromkeys(chosen.implementations)


# The roofline.


def test_roofline() -> None:
    top = roofline.measure(1, (2**16, 2**20))
    assert set(top.copy) == {2**16, 2**20}
    assert all(1e8 < rate < 1e13 for rate in top.copy.values())
    assert all(1e8 < rate < 1e13 for rate in top.flops.values())
    case = dataclasses.replace(made_up(), flops=1e9, bytes=8.0)
    known = roofline.Roofline({"float64": 1e9}, {1024: 1e9, 2048: 2e9})
    assert known.seconds(case) == 1.0
    assert known.seconds(dataclasses.replace(case, flops=0.0, bytes=1024.0)) == pytest.approx(1024e-9)
    assert known.seconds(dataclasses.replace(case, flops=0.0, bytes=4096.0)) == pytest.approx(2048e-9)
    assert roofline.Roofline({}, {}).seconds(case) is None


def test_fma_loop() -> None:
    if not cpu_backend.available_isas():
        pytest.skip("nothing is compiled here")
    module = cpu_backend.CpuBackend()._module
    for is_double, size in ((False, 4), (True, 8)):
        done = module.fma_loop(is_double, 10)
        # Two for each multiply-add, in each lane of twelve registers, in eight tasks a thread.
        assert done == 2 * 10 * 12 * (module.vector_bytes / size) * 8 * module.get_num_threads()
        assert module.fma_loop(is_double, 20) == 2 * done
        for bad in (0, -1, -(2**63)):
            with pytest.raises(ValueError, match="steps"):
                module.fma_loop(is_double, bad)
    assert module.mark() + 1 == module.mark()


# Results.


def row(name: str = "tanh", group: str = "activations", roofline: float | None = None, **samples: Any) -> Row:
    made = {
        implementation: Timed(failed=s) if isinstance(s, str) else Timed(tuple(s))
        for implementation, s in samples.items()
    }
    return Row(group, name, "call", made, {"kernel": name, "dtype": "float32"}, 1.0, 2.0, roofline)


def run_of(*rows: Row, measure: str = results.TIME, **settings: Any) -> Results:
    machine = {"cpu": "some cpu", "processors": 2, "caches": ["L2 Unified 512K"], "system": "some system"}
    settings = {"threads": 2, "date": "2020-02-02T00:00:00", **settings}
    return Results(measure, rows, machine, {"gemmlet": "1", "isa": "some", "compiler": "gcc 1"}, settings, ["A note"])


def saved(name: str, run: Results) -> Path:
    path = Path(name).resolve()
    path.write_text(json.dumps(run.as_json(), allow_nan=False))
    return path


def test_json_round_trip() -> None:
    run = run_of(row(gemmlet=[1e-6, 2e-6], numpy=[3e-6, 4e-6], jax="it broke", roofline=1e-6), measure=results.TIME)
    read = results.load(saved("a.json", run))
    assert read == dataclasses.replace(run, rows=list(run.rows), notes=list(run.notes))
    assert read.rows[0].ratio("numpy") == 2.5
    assert read.rows[0].ratio("jax") is None
    assert read.rows[0].roofline_share() == pytest.approx(1 / 1.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("[1]", "no results of gemmlet bench"),
        ('{"rows": [], "schema": 99}', "schema 99, expected 1"),
        ('{"rows": [], "schema": 1, "measure": "miles"}', "'miles'"),
        ('{"rows": [{}], "schema": 1, "measure": "seconds"}', "damaged"),
        ('{"rows": [], "schema": 1, "measure": "seconds"}', "damaged"),
    ],
)
def test_json_of_something_else(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text(text)
    assert call("--from", "a.json") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gemmlet: --from a.json: ")
    assert words in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("measure", "factor", "options", "status"),
    [
        (results.TIME, 1.0, [], 0),
        (results.TIME, 0.5, [], 0),
        (results.TIME, 1.2, [], 0),
        (results.TIME, 1.3, [], 1),
        (results.TIME, 1.2, ["--tolerance", 10], 1),
        (results.TIME, 1.3, ["--tolerance", 40], 0),
        (results.INSTRUCTIONS, 1.02, [], 0),
        (results.INSTRUCTIONS, 1.04, [], 1),
    ],
)
def test_compare(
    measure: str, factor: float, options: list[Any], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old = saved("old.json", run_of(row(gemmlet=[1000.0] * 3), row("exp", gemmlet=[500.0]), measure=measure))
    new = saved(
        "new.json",
        run_of(
            row(gemmlet=[1000.0 * factor] * 3), row("exp", gemmlet=[500.0]), row("new", gemmlet=[9.0]), measure=measure
        ),
    )
    assert call("--from", new, "--compare", old, *options) == status
    shown = capsys.readouterr().out
    assert f"{factor - 1:+.1%}" in shown
    assert ("1 of 2 rows: more than" in shown) == bool(status)


def test_compare_a_row_that_fails_now() -> None:
    old = saved("old.json", run_of(row(gemmlet=[1.0])))
    new = saved("new.json", run_of(row(gemmlet="wrong result", numpy=[1.0])))
    assert call("--from", new, "--compare", old) == 1
    assert call("--from", old, "--compare", new) == 2  # nothing to compare with


def test_compare_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    old = saved("old.json", run_of(row(gemmlet=[1.0])))
    other = dataclasses.replace(run_of(row(gemmlet=[1.0]), threads=1), versions={"compiler": "gcc 2"})
    assert call("--from", saved("new.json", other), "--compare", old) == 0
    shown = capsys.readouterr().out
    assert "The compiler differs: gcc 1 before, gcc 2 now." in shown
    assert "The number of threads differs: 2 before, 1 now." in shown
    assert "processor differs" not in shown


def test_compare_of_different_measures(capsys: pytest.CaptureFixture[str]) -> None:
    old = saved("old.json", run_of(row(gemmlet=[1.0]), measure=results.INSTRUCTIONS))
    assert call("--from", saved("new.json", run_of(row(gemmlet=[1.0]))), "--compare", old) == 2
    assert "one run counts instructions, the other seconds" in capsys.readouterr().err


def test_what_is_lost_is_shown_and_marked(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(row(gemmlet=[2e-6], numpy=[1e-6], pytorch=[3e-6], roofline=1e-6), row("gelu", gemmlet="wrong result"))
    assert call("--from", saved("a.json", run)) == 0
    shown = capsys.readouterr().out
    assert "▼ 0.50 (1.00 µs)" in shown
    assert " 1.50 (3.00 µs)" in shown
    assert "▼ 1.50" not in shown
    assert "50%" in shown
    assert "▼ failed" in shown
    assert "gemmlet fails in activations: gelu: wrong result" in shown
    assert "A note" in shown
    assert "GFLOP/s" not in shown


def test_wide_networks_have_operations_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    made = [row(name, "wide", gemmlet="wrong" if name == "failed" else [2e-3]) for name in ("rated", "failed", "older")]
    threads = {"rated": {"threads": 2}, "failed": {"threads": 2}, "older": {}}
    run = run_of(*(dataclasses.replace(r, flops=3e8, labels={**r.labels, **threads[r.name]}) for r in made))
    Path("page.md").write_text("<!-- some:begin -->\n<!-- some:end -->\n")
    assert call("--from", saved("a.json", run), "--markdown", "page.md") == 0
    tables = Path("page-some.md").read_text()
    assert "% of roofline | GFLOP/s a thread |" in tables
    assert "| rated | 2.00 ms | 2.00 ms | 2.00 ms |  | 75.0 |" in tables
    assert "| older | 2.00 ms | 2.00 ms | 2.00 ms |  |  |" in tables
    assert "| failed | ▼ failed |  |  |  |  |" in tables


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (123e-6, "123 µs"), (4.56e-6, "4.56 µs"), (5e-8, "50.0 ns")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_targets() -> None:
    every = targets.Target("work", lambda row: row.group == "activations", ("numpy", "pytorch"), 1.5)
    mean = dataclasses.replace(every, mean=True)
    rows = [
        row("a", gemmlet=[1.0], numpy=[2.0], pytorch=[8.0]),
        row("b", gemmlet=[1.0], numpy=[9.0], pytorch=[1.25]),
        row("c", group="losses", gemmlet=[1.0], numpy=[0.1], pytorch=[0.1]),
    ]
    # The better of the two is the one that leaves the smaller ratio: 2 and 1.25.
    verdict = targets.verdict(every, rows)
    assert (verdict.met, verdict.measured) == (False, "1.58 (geometric mean of 2 rows); worst 1.25, b")
    assert targets.verdict(mean, rows).met is True
    assert targets.verdict(every, rows[:1]).measured == "2.00"
    assert targets.verdict(every, rows[:1]).met is True
    assert targets.verdict(every, [row("a", gemmlet=[1.0], numpy=[9.0])]).met is None
    assert targets.verdict(every, [row("a", gemmlet="broken", numpy=[9.0], pytorch=[9.0])]).met is False
    rate = targets.Rate("work", lambda row: True, 0.5)
    assert rate.required == "5e-10 GFLOP/s a thread, every row"
    assert targets.verdict(rate, rows).met is None  # the threads are not known
    rated = [dataclasses.replace(row(gemmlet=[seconds]), flops=6.0, labels={"threads": 2}) for seconds in (3.0, 6.0)]
    assert [each.rate() for each in rated] == [1.0, 0.5]
    assert targets.verdict(rate, rated).met is True
    assert targets.verdict(dataclasses.replace(rate, at_least=0.6), rated).met is False
    limit = targets.Limit("work", lambda row: True, 0.03)
    assert targets.verdict(limit, [row(gemmlet=[0.02])]).met is True
    assert targets.verdict(limit, [row(gemmlet=[0.04])]).met is False


def test_every_target_has_rows() -> None:
    found = suite.chosen_cases(FULL, suite.Choice())
    fast = {implementation: Timed((1.0,)) for implementation in implementations.IMPLEMENTATIONS}
    rows = [
        Row(
            case.group,
            case.name,
            case.unit,
            {s: fast[s] for s in case.implementations},
            {**case.labels, "threads": 1},
            case.flops,
            case.bytes,
            0.5,
        )
        for case in found
    ]
    for target in targets.TARGETS:
        if isinstance(target, targets.Limit):
            assert targets.verdict(target, rows).met is False
        else:
            slowest = min((row.flops for row in rows if target.chosen(row)), default=0.0)
            reached = {targets.Share: 0.5, targets.Rate: slowest}.get(type(target), 1.0)
            assert targets.verdict(target, rows).met is (target.at_least <= reached), target


# Markdown.


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    run = saved("a.json", run_of(row(gemmlet=[2e-6], numpy=[1e-6]), row("gelu", gemmlet=[1e-6], numpy=[3e-6])))
    page = Path("page.md")
    begin, end = "<!-- some:begin -->", "<!-- some:end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):  # what it wrote it replaces
        assert call("--from", run, "--markdown", page) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\nMeasured on 2020-02-02: some cpu")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "| activations | 2 |  | 1.22 (▼ 1) |" in text  # the square root of 0.5 x 3
    tables = Path("page-some.md").read_text()
    assert "| tanh | 2.00 µs | 2.00 µs | 2.00 µs |  | ▼ 0.50 (1.00 µs) |" in tables
    assert "activations (one call): 2 rows, 1 behind a peer" in tables
    # What is faster without being a peer.
    floors = {name: [1e-6] for name in ("gemmlet-numba", "dynamo alone")}
    floored = saved("floored.json", run_of(row(gemmlet=[2e-6], numpy=[3e-6], **floors)))
    assert call("--from", floored, "--markdown", page) == 0
    tables = Path("page-some.md").read_text()
    assert "activations (one call): 1 rows, none behind a peer" in tables
    assert "| 0.50 (1.00 µs) | 1.50 (3.00 µs) | 0.50 (1.00 µs) |" in tables
    assert "| activations | 1 |  | 0.50 | 1.50 | 0.50 |" in page.read_text()
    counts = saved("counts.json", run_of(row(gemmlet=[1000.0]), measure=results.INSTRUCTIONS))
    assert call("--from", counts, "--markdown", page) == 2
    assert "--markdown is for times, and these are instructions" in capsys.readouterr().err
    page.write_text("no markers")
    assert call("--from", run, "--markdown", page) == 2
    assert "once each and in this order" in capsys.readouterr().err


# The command.


def test_measures_saves_and_compares(capsys: pytest.CaptureFixture[str], some_roofline: None) -> None:
    words = ["overhead", "--filter", "TANH 1", "--seconds", 0.001, "--threads", 1, "--sides", "gemmlet,numpy"]
    assert call(*words, "--out", "here/there") == 0
    shown = capsys.readouterr().out
    assert "overhead (one call)" in shown
    folder = Path("here/there")
    assert {path.name for path in folder.iterdir()} == {"bench.json", "overhead.png"}
    run = results.load(folder / "bench.json")
    assert [r.name for r in run.rows] == ["tanh 1", "tanh 10", "linear tanh 1x16x4"]
    assert all(r.measured("gemmlet") and r.measured("numpy") for r in run.rows)
    assert run.settings["threads"] == 1
    assert {"cpu", "processors", "caches", "system"} <= set(run.machine)
    assert {"gemmlet", "numpy", "python", "backend", "isa"} <= set(run.versions)
    assert call(*words, "--out", "again", "--compare", folder / "bench.json", "--tolerance", 100_000) == 0


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--list", "--quick") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(suite.chosen_cases(QUICK, suite.Choice()))
    assert call("--list", "overhead", "import") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["overhead"] * 5 + ["import"] * 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("nonsense", "group 'nonsense' is unknown; the choices are epoch, wide, gan, matmul"),
        ("--filter nonsense", "no case matches --filter 'nonsense'"),
        ("--sides numpy,nobody", "--sides: 'nobody' is unknown; the choices are gemmlet,"),
        ("--threads 0", "--threads must be from 1 to 1,024, got 0"),
        ("--seconds 0", "--seconds must be a number above 0, got 0"),
        ("--seconds nan", "--seconds must be a number above 0, got nan"),
        ("--tolerance -1", "--tolerance must be a number above 0, got -1"),
        ("--scaling --instructions", "--scaling and --instructions exclude each other"),
        ("--scaling --markdown x.md", "leave out --compare and --markdown"),
        ("--instructions matmul", "leave out GROUP"),
        ("--instructions --markdown x.md", "leave out --instructions"),
        ("--compare nowhere.json", "--compare nowhere.json: "),
        ("--from nowhere.json", "--from nowhere.json: "),
        ("--markdown nowhere.md", "--markdown nowhere.md: "),
        ("--data-dir nowhere", "--data-dir nowhere is not a folder"),
        ("--data-dir . epoch", "lacks the file"),
        ("--out file", "file is a file, expected a folder"),
        ("--no-such-option", "no-such-option"),
    ],
)
def test_bad_options(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert call(*words.split()) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gemmlet: ")
    assert shown.count("\n") == 1
    assert named in shown


def test_importing_gemmlet_leaves_the_benchmarks_alone() -> None:
    code = (
        "import sys, gemmlet.kernels, gemmlet.nn, gemmlet.data; print([m for m in sys.modules if 'gemmlet.bench' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Instructions and scaling curves.


def test_instructions_without_valgrind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert call("--instructions") == 1
    assert "needs valgrind" in capsys.readouterr().err


def test_instructions_are_read_from_what_callgrind_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for valgrind that leaves the parts which it would: before, inside and between the pairs of marks."""
    script = Path("valgrind").resolve()
    count = len(instructions.cases())
    script.write_text(
        f"#!{sys.executable}\nimport sys\nout = [w for w in sys.argv if 'out-file=' in w][0].split('=')[1]\n"
        f"for i in range(1, {2 * (count + 1)} + 1):\n"
        "    inside = 100 if i == 2 else 100 + 1000 * i if i % 2 == 0 else 7\n"
        "    open(f'{out}.{i}', 'w').write(f'events: Ir\\nfn=(1) f\\n0 3\\ntotals: {inside}\\n')\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(instructions.shutil, "which", lambda name: str(script))
    # A build from source may have none of those that are counted.
    monkeypatch.setattr(instructions, "isa", lambda: cpu_backend.available_isas()[0])
    run = instructions.run()
    assert run.measure == results.INSTRUCTIONS
    expected = [1000 * 2 * (i + 2) / case.units for i, case in enumerate(instructions.cases())]
    assert [r.percentile("gemmlet", 50) for r in run.rows] == pytest.approx(expected)
    assert run.versions["compiler"]


def test_scaling_in_a_process_of_its_own() -> None:
    point = scaling.Point(batch=8, width=16, depth=1, threads=1, seconds=0.01)
    measured = scaling._in_a_process("numpy", point)
    assert "failed" not in measured
    assert measured["images_per_second"] > 10
    assert 10 < measured["loaded_mb"] <= measured["peak_mb"] < 4000
    assert "no_such" in scaling._in_a_process("no_such", point)["failed"]


def test_scaling_curves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def measured(implementation: str, point: scaling.Point) -> dict[str, Any]:
        asked.append((implementation, point))
        if implementation == "numpy" and point.batch == 1:
            return {"failed": "too small"}
        return {"images_per_second": 1e5 / point.depth, "loaded_mb": 50.0, "peak_mb": 100.0 + point.width}

    monkeypatch.setattr(scaling, "_in_a_process", measured)
    assert call("--scaling", "--quick", "--sides", "gemmlet,numpy", "--threads", 3, "--out", "s") == 0
    curves = json.loads(Path("s/scaling.json").read_text())["curves"]
    assert list(curves) == ["batch", "width", "depth", "threads"]
    assert [point["value"] for point in curves["threads"]] == [1, 2, 3]
    assert {point.threads for implementation, point in asked if point.batch != 64} == {3}
    assert curves["depth"][1]["sides"]["gemmlet"]["images_per_second"] == 1e5 / 4
    assert Path("s/scaling.png").stat().st_size > 10_000
    assert "numpy fails at batch 1: too small" in capsys.readouterr().out


# The document.


def test_commands_in_the_document_exist() -> None:
    """Every command line of docs/performance.md: its options, its groups, and the files that it names."""
    import typer

    from gemmlet.cli.app import app

    text = (ROOT / "docs/performance.md").read_text()
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    command = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    options = {name: parameter for parameter in command.params for name in parameter.opts}
    seen = set()
    for line in filter(None, lines):
        words = [word for word in shlex.split(line, comments=True) if "=" not in word]
        if words[0].endswith("gemmlet"):
            assert words[1] == "bench", line
            rest = iter(words[2:])
            for word in rest:
                if word.startswith("--"):
                    seen.add(word)
                    assert word in options, line
                    if not options[word].is_flag:
                        next(rest)
                else:
                    assert word in bench_cases.GROUPS, line
        elif "pytest" in words:
            for word in words[words.index("pytest") + 1 :]:
                if word.startswith("benchmarks"):
                    assert (ROOT / word).exists(), line
        else:
            assert "pip" in words[0], line
    assert {"--quick", "--scaling", "--compare", "--instructions", "--markdown", "--list", "--filter", "--from"} <= seen
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(bench_cases.GROUPS)
    for isa in ("x86-64-v4", "x86-64-v3"):
        assert report.between_markers(text, isa, "some tables\n") != text


def test_the_benchmarks_of_pytest_cover_the_groups() -> None:
    found = {
        name
        for path in (ROOT / "benchmarks").glob("bench_*.py")
        for name in re.findall(r"def bench_(\w+)", path.read_text())
    }
    # These are not calls of a kernel: one is the cost of any call, and two start processes.
    assert found == set(bench_cases.GROUPS) - {"overhead", "programs", "import"}
