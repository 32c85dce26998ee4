"""`benchmarks/gpu_report.py` without a GPU: its cases run on the CPU, its tables come out of made-up runs."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

for package in ("cupy", "rich", "torch", "jax"):
    pytest.importorskip(package)

import cuda_on_host.backend  # noqa: E402
import gemmlet  # noqa: E402
from gemmlet import nn  # noqa: E402
from gemmlet.backends import select  # noqa: E402
from gemmlet.backends.cuda import compiler, launches  # noqa: E402
from gemmlet.backends.cuda import training as cuda_training  # noqa: E402
from gemmlet.bench import training as bench  # noqa: E402
from gemmlet.bench.results import Row  # noqa: E402
from gemmlet.bench.timing import Timed  # noqa: E402
from gemmlet.data import load_mnist  # noqa: E402
from gemmlet.formulas.losses import LOSSES, ROW_LOSSES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu_cases  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import gpu_sanitized  # noqa: E402
import gpu_tables  # noqa: E402
import gpu_timing  # noqa: E402
import gpu_training  # noqa: E402
import gpu_variants  # noqa: E402
from gpu_timing import Case, Gpu, Implementation  # noqa: E402

try:
    BACKEND = cuda_on_host.backend.load()
except RuntimeError as problem:
    pytest.skip(f"no backend cuda: {problem}", allow_module_level=True)


class OnCpu(Gpu):
    """The CPU in place of a GPU: NumPy's arrays for CuPy's, and nothing is recorded."""

    torch_device = "cpu"
    l2_bytes = 10_000
    copy_rate = 1e10

    def __init__(self) -> None:
        import jax
        import torch

        self.xp, self.torch, self.jax = np, torch, jax
        self.notes, self.matmul_rates = [], {}
        self.lost = False

    def matmul_rate(self, kind: str) -> float:
        return 1e11

    def normal(self, shape: tuple[int, ...], dtype: str = "float32", *, seed: int, scale: float = 1.0) -> Any:
        return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)

    def wide(self, array: Any) -> Any:
        return array.astype(np.float64)

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Any:
        return np.full(shape, np.nan, np.float32)

    def poison(self, array: Any) -> None:
        array.fill(np.nan)

    def upload(self, array: np.ndarray) -> Any:
        return array.copy()

    def numpy(self, array: Any) -> np.ndarray:
        return array

    def tensor(self, array: Any) -> Any:
        return self.torch.from_numpy(array)

    def array(self, tensor: Any) -> Any:
        return tensor.detach().numpy()

    def bias_activation(self, activation: str) -> Callable[[Any, Any], None]:
        def call(y: Any, b: Any) -> None:
            y += b
            y[...] = np.tanh(y) if activation == "tanh" else np.maximum(y, 0)

        return call

    @property
    def unwaited(self) -> Any:
        return gpu_timing._Unwaited([BACKEND._first])

    def graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        call()
        return call

    def torch_graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        for _ in range(3):
            call()
        return call

    def synchronize(self) -> None:
        pass

    def alive(self) -> bool:
        return not self.lost

    def free(self) -> None:
        pass

    def seconds(self, call: Callable[[], Any], count: int) -> float:
        call()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count


@pytest.fixture
def gpu() -> OnCpu:
    return OnCpu()


@pytest.fixture(autouse=True)
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report looks for the package in the sources, where nothing is compiled: others' children shall not."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few elements, images and rounds; networks on the CPU, as the twin of the GPU takes too long for them."""
    monkeypatch.setattr(gpu_training, "BACKEND", "cpu")
    monkeypatch.setattr(gpu_cases, "ELEMENTS", 30_000)
    monkeypatch.setattr(gpu_training, "SAMPLES", 160)
    monkeypatch.setattr(gpu_training, "CHECKED_STEPS", 2)
    monkeypatch.setattr(gpu_training, "GAN_STEPS", 16)
    monkeypatch.setattr(gpu_training, "MORE_EPOCHS", 1)
    monkeypatch.setattr(gpu_timing, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(gpu_timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(gpu_timing, "MAX_ROUNDS", 2)
    with gemmlet.use_backend(select.current()):
        yield


def timed(gpu: Gpu, case: Case) -> Row:
    row = gpu_timing.run(gpu, case, 0.01)
    for name, measured in row.timed.items():
        assert measured.failed is None, (case.key, name, measured.failed)
        assert len(measured.samples) == 2
        # (An epoch of gemmlet is a difference, which is nothing but noise for a few samples.)
        assert min(measured.samples) > 0 or case.group in ("epoch", "gan", "fit")
    assert list(row.timed) == list(case.implementations)
    return row


# The cases.


def small_matmuls() -> Iterator[Case]:
    names = list(gpu_cases.LINEAR_IMPLEMENTATIONS)
    for activation in ("tanh", "relu"):
        yield gpu_cases.linear_case(6, 11, 7, activation, "layers", names)
    for kind in ("bfloat16", "float16", "tf32"):
        yield gpu_cases.matmul_case(24, kind)
    yield from gpu_cases.overheads()


@pytest.mark.parametrize("case", list(small_matmuls()), ids=lambda case: case.key)
def test_matmuls(gpu: OnCpu, case: Case) -> None:
    row = timed(gpu, case)
    assert (row.roofline is None) is (row.group == "overhead")


@pytest.mark.parametrize("family", ["elementwise", "losses", "optimizers"])
def test_elements(gpu: OnCpu, family: str) -> None:
    for case in gpu_cases.cases(family):
        assert timed(gpu, case).roofline_share() is not None


def test_families_have_the_cases_of_the_targets() -> None:
    cases = [case for family in gpu_cases.FAMILIES for case in gpu_cases.cases(family)]
    assert len({case.key for case in cases}) == len(cases)
    assert set(gpu_cases.FAMILIES) | set(gpu_report.STAGES) == set(gpu_report.SECONDS)
    rows = [
        Row(c.group, c.name, c.unit, {n: Timed((1.0, 1.0)) for n in c.implementations}, c.labels, roofline=1.0)
        for c in cases
    ]
    report = {"rows": gpu_cases.rows_as_json(rows)}
    found = {v.work: v for v in gpu_tables.verdicts(report)}
    for target in gpu_tables.TARGETS:
        assert found[target.work].met is not None, target.work
    # The 100 million elements are more than twice the L2 cache of any GPU.
    assert 4 * 100_000_000 > 2 * 128 * 2**20
    layers = [case for case in cases if case.labels.get("set") == "layers"]
    assert len(layers) == 36


def test_a_wrong_or_broken_implementation_is_not_timed(gpu: OnCpu) -> None:
    def result(value: float) -> Callable[[Gpu, Any], Implementation]:
        return lambda gpu, inputs: Implementation(lambda: None, lambda: value)

    def broken(gpu: Gpu, inputs: Any) -> Implementation:
        raise RuntimeError("some\nthing")

    implementations = {"gemmlet": result(0.5), "wrong": result(2.0), "nan": result(np.nan), "broken": broken}
    row = gpu_timing.run(
        gpu, Case("g", "n", lambda gpu: None, implementations, lambda gpu, inputs, result: result), 0.01
    )
    assert row.timed["gemmlet"].failed is None
    assert row.timed["wrong"].failed == "wrong result: 2 times the tolerance"
    assert row.timed["nan"].failed == "wrong result: nan times the tolerance"
    assert row.timed["broken"].failed == "RuntimeError: some thing"
    assert "FAILED RuntimeError" in gpu_cases.summary(row)
    gpu.torch = None
    for case in (gpu_cases.linear_case(6, 11, 7, "tanh", "layers", list(gpu_cases.LINEAR_IMPLEMENTATIONS)),):
        assert list(gpu_timing.run(gpu, case, 0.01).timed) == ["gemmlet", "cupy", "jax"]


def test_an_element_that_is_not_written_is_seen(gpu: OnCpu) -> None:
    case = gpu_cases.elementwise_case("tanh", "float32")
    inputs = case.inputs(gpu)
    result = np.tanh(inputs.inputs[0])
    assert case.error(gpu, inputs, result) < 1
    result[15_000] = np.nan
    assert not case.error(gpu, inputs, result) <= 1
    p = gpu_cases.make_matmul(gpu, 5, 6, 7, "float32", "tanh", 3)
    assert 1 < len(p.sets) <= 3
    good = np.tanh(p.sets[0].x @ p.sets[0].w + p.sets[0].b)
    assert gpu_cases.matmul_error(gpu, p, good) < 1
    assert not gpu_cases.matmul_error(gpu, p, np.where(np.arange(7) == 3, np.nan, good)) <= 1
    assert gpu_cases.matmul_error(gpu, p, good * (1 + 1e-4)) > 1


def test_another_process_goes_on_after_the_gpu_is_lost(
    gpu: OnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(name: str, *, loses: bool = False, raises: bool = False) -> Case:
        def prepare(gpu: Any, inputs: Any) -> Implementation:
            gpu.lost = loses
            return Implementation(lambda: None, lambda: 0.0)

        def inputs(gpu: Any) -> None:
            if raises:
                raise MemoryError("of the GPU")

        return Case("g", name, inputs, {"gemmlet": prepare}, lambda gpu, inputs, result: 0.0)

    chosen = [case("first"), case("no memory", raises=True), case("second", loses=True), case("third")]
    monkeypatch.setattr(gpu_cases, "Gpu", lambda peers: OnCpu())
    monkeypatch.setitem(gpu_cases._CASES, "losses", lambda: iter(chosen))
    kept = tmp_path / "rows"
    assert gpu_cases.main(["losses", str(kept), "--seconds-per-row", "0.01"]) == gpu_cases.LOST_STATUS
    assert gpu_cases.known(kept) == {"g: first", "g: no memory", "g: second"}
    assert gpu_cases.main(["losses", str(kept), "--seconds-per-row", "0.01"]) == 0
    entries = list(gpu_report._entries(kept))
    assert [entry["row"]["name"] for entry in entries if "row" in entry] == ["first", "third"]
    notes = [entry["note"] for entry in entries if "note" in entry]
    assert notes[0] == "g: no memory failed: MemoryError: of the GPU"
    assert "the GPU was lost in g: second, gemmlet" in notes[1]
    assert gpu_cases.main(["losses", str(tmp_path / "other"), "--seconds", "0"]) == 0
    assert "4 rows are left out" in capsys.readouterr().out


# Training.


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_mnist(download=False)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_epochs(gpu: OnCpu, rule: str, digits: Any) -> None:
    """Each implementation's weights are checked; the last mini-batch is smaller than the others."""
    row = timed(gpu, gpu_training.mlp_case(rule, lambda: gpu_training.mlp_task(digits.x_train, digits.y_train)))
    assert row.unit == "epoch"


def test_epochs_with_more(gpu: OnCpu, digits: Any) -> None:
    """Their weights are checked too: those of an epoch without what the row is about are wrong."""

    def task() -> Any:
        return gpu_training.mlp_task(digits.x_train, digits.y_train)

    for name in gpu_training.EXTRAS:
        case = gpu_training.extra_case("sgd", name, task)
        assert list(timed(gpu, case).timed) == ["gemmlet", "plain"]
        t, exact = case.inputs(gpu)
        without = case.implementations["plain"](gpu, (t, {"plain": exact["gemmlet"]}))
        assert not case.error(gpu, None, without.result()) <= 1


def test_gan_steps(gpu: OnCpu, digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHECKED_EPOCHS", 2)
    monkeypatch.setattr(bench, "CHECKED_STEPS", 8)
    timed(gpu, gpu_training.gan_case(lambda: digits.x_train))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_recorded_steps_begin_where_the_loop_does(gpu: OnCpu, rule: str, digits: Any) -> None:
    """What is run to record a graph leaves nothing behind, and the graph takes the same samples."""
    task = gpu_training.mlp_task(digits.x_train, digits.y_train, 160)
    torch = gpu.torch
    order = torch.from_numpy(np.random.default_rng(0).permutation(160))
    weights = []
    for graph in (False, True):
        model = gpu_training.TorchMlp(gpu, task, rule, graph)
        for epoch_order in (order, torch.flip(order, (0,))):
            model.epoch(epoch_order)
        weights.append(model.parameters())
        for first, trained in zip(task.parameters, weights[-1], strict=True):
            assert not np.array_equal(first, trained)
    for a, b in zip(*weights, strict=True):
        assert np.array_equal(a, b)


def test_recorded_gan_steps(gpu: OnCpu, digits: Any) -> None:
    task = bench.gan_task(digits.x_train[: 3 * 64])
    losses = []
    for graph in (False, True):
        model = gpu_training.TorchGan(gpu, task, graph)
        gpu.torch.manual_seed(7)
        losses.append([model.losses(3 * 64) for _ in range(2)])
    assert np.array_equal(*losses)


def test_what_is_checked_of_training(monkeypatch: pytest.MonkeyPatch, digits: Any) -> None:
    class Few:
        x_train, y_train, x_test, y_test = digits.x_train[:150], digits.y_train[:150], digits.x_test, digits.y_test
        source, is_sample = "a few", True

    monkeypatch.setattr(gpu_training, "_data", lambda data_dir: Few)
    monkeypatch.setattr(gpu_training, "EPOCHS", 1)
    found = dict(gpu_training.check(None, "numpy"))
    assert found["same_bits"]
    assert found["gan_finite"]
    assert not found["full"]
    assert found["weights_sgd"] <= gpu_tables.WEIGHTS["sgd"]
    assert found["weights_adam"] <= gpu_tables.WEIGHTS["adam"]
    assert 0 <= found["mlp_accuracy"] <= 1
    assert json.loads(json.dumps(found)) == found


# What takes small work apart, and what times constants: on the stand-in for a GPU.


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Images of a size that the stand-in takes in no time; and few repetitions."""
    monkeypatch.setattr(gpu_training, "MORE_EPOCHS", 2)
    for name in ("REPEATS", "CALLS"):
        monkeypatch.setattr(gpu_parts, name, 2)
    return np.random.default_rng(0).integers(0, 256, (40, 12)).astype(np.uint8)


def test_parts_of_a_step(gpu: OnCpu, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches that are taken down are those of a step, and train as `fit` does when they are done again."""
    monkeypatch.setattr(cuda_training, "CLUSTER_SIZES", ())
    monkeypatch.setattr(cuda_training, "STEPS_TOGETHER", 2)
    fit = gpu_parts.mlp(pixels, "sgd", (12, 9, 3), batch=4)
    found = gpu_parts.Steps(gpu, BACKEND, fit, 4)
    facts = [launch.facts() for launch in found.launches]
    assert [name for name, *_ in facts[1:]] == ["top<float>", "update<float, unsigned char, sgd>"]
    assert facts[0][0].startswith("first_forward<float, unsigned char, SmallTile")
    assert facts[1][1:3] == ["4x1", "32"]
    for launch in found.launches:
        assert found.alone(launch) > 0
    assert found.whole() > 0
    # `fit` had done all steps once before.
    found.session._is_newer = True
    found.session.write_back()
    twice = nn.MLP([12, 9, 3], "tanh", seed=0)
    with gemmlet.use_backend(BACKEND):
        rule = gpu_training.optimizer("sgd")
        twice.fit(pixels[:16], np.arange(16) % 3, epochs=2, batch_size=4, optimizer=rule, shuffle=False)
    trained = {array.shape: array for array, _ in found.session._copies()}
    for expected in twice.parameters:
        assert np.array_equal(trained[expected.shape], expected)

    rows = list(gpu_parts.step_rows(gpu, BACKEND, "MLP", fit, 4, 4))
    assert [row[1:5] for row in rows[:3]] == facts
    assert [row[1] for row in rows[3:5]] == ["sum of 3 launches", "all of them in order"]
    assert {len(row) for row in rows} == {len(gpu_parts.STEP_HEAD)}
    parts = {row[1]: float(row[-1]) for row in rows if row[1].startswith("fit: ")}
    whole = parts.pop("fit: a step of one more epoch")
    assert sum(parts.values()) == pytest.approx(whole, abs=0.05)
    with (
        mock.patch.object(BACKEND, "supports_fused", return_value=False),
        pytest.raises(RuntimeError, match="has no kernels for this plan"),
    ):
        gpu_parts.Steps(gpu, BACKEND, fit, 4)


def test_parts_of_a_cluster_and_of_a_gan(gpu: OnCpu, pixels: np.ndarray) -> None:
    fit = gpu_parts.mlp(pixels, "adam", (12, 9, 3), batch=4)
    found = gpu_parts.Steps(gpu, BACKEND, fit, 3)
    names = [launch.facts()[0].split("<")[0] for launch in found.launches]
    assert names == ["arrange_samples", "train_in_cluster", "close_steps"]
    assert found.whole() > 0
    *_, (_, penalized, _) = gpu_parts.works(pixels)
    of_gan = [launch.facts()[0].split("<")[0] for launch in gpu_parts.Steps(gpu, BACKEND, penalized, 1).launches]
    assert of_gan[:4] == ["first_forward_and_gather", "forward", "forward", "top"]
    assert of_gan.count("forward_penalty") == 1
    augmented = gpu_parts.mlp(pixels[:, :9], "sgd", (9, 5, 3), 4, nn.Augment())
    rows = list(gpu_parts.step_rows(gpu, BACKEND, "augmented", augmented, 2, 2))
    assert [row[1].split("<")[0] for row in rows[:5]] == [*names, "augment", "sum of 3 launches"]
    assert rows[3][2] == "8x1"  # a block for each image
    small = nn.GAN(4, [6, 12], [5, 1], seed=0)

    def train(steps: int, epochs: int = 1) -> None:
        small.fit(pixels[: steps * 4], epochs=epochs, batch_size=4)

    found = gpu_parts.Steps(gpu, BACKEND, train, 8)
    names = [launch.facts()[0].split("<")[0] for launch in found.launches]
    assert names[0] == "first_forward_and_gather"
    assert names.count("update") == 2
    assert found.alone(found.launches[-1]) > 0


def test_parts_of_a_call(gpu: OnCpu, pixels: np.ndarray) -> None:
    to_gpu, to_cpu = cuda_on_host.backend.to_gpu, cuda_on_host.backend.to_cpu
    rows = list(gpu_parts.call_rows(gpu, BACKEND, to_gpu))
    assert [row[0] for row in rows] == ["tanh 64x128", "softmax 64x128", "linear 64x784->128 tanh"]
    assert {len(row) for row in rows} == {len(gpu_parts.CALL_HEAD)}
    # The launch alone does the same.
    for whole, new, launch in gpu_parts.small_calls(BACKEND, to_gpu).values():
        out = whole()
        expected = to_cpu(out)
        BACKEND._first.view(out).fill(np.nan)
        launch()
        assert np.array_equal(to_cpu(out), expected)
        assert np.array_equal(to_cpu(new()), expected)


def test_scripts_write_tables(gpu: OnCpu, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = [["tanh", *["1.00"] * (len(gpu_parts.CALL_HEAD) - 1)]]
    monkeypatch.setattr(gpu_parts, "call_rows", lambda *given: calls)
    compiled: list[tuple[str, str]] = []
    for script in (gpu_parts, gpu_variants):
        monkeypatch.setattr(script, "Gpu", lambda peers: gpu)
        monkeypatch.setattr(script, "compile_together", lambda arch, pairs: compiled.extend(pairs))
    monkeypatch.setattr(gpu_parts, "STEPS", 8)
    monkeypatch.setattr(gpu_parts, "FIT_STEPS", 2)
    fit = gpu_parts.mlp(pixels, "sgd", (12, 9, 3), batch=4)

    def broken(steps: int, epochs: int = 1) -> None:
        raise RuntimeError("no such kernel")

    chosen = [("broken", broken, {}), ("MLP", fit, {"CLUSTER_SIZES": ()})]
    monkeypatch.setattr(gpu_parts, "works", lambda images: chosen)
    work = {"MLP": lambda: gpu_parts.Steps(gpu, BACKEND, fit).whole()}
    constant = gpu_variants.Constant(cuda_training, "STEPS_TOGETHER", (8, 1), work)
    monkeypatch.setattr(gpu_variants, "of_training", lambda *given: [constant])
    monkeypatch.setattr(gpu_variants, "of_rows", lambda *given: [])
    written = tmp_path / "tables"
    assert gpu_parts.main([str(written)]) == 1
    assert gpu_variants.main([str(written)]) == 0
    tables = [entry["table"] for entry in gpu_report._entries(written)]
    titles = [table["title"] for table in tables]
    assert titles[:3] == ["calls on small arrays", "a step of broken", "a step of MLP"]
    assert titles[3:] == ["µs by STEPS_TOGETHER: MLP and others"]
    assert tables[1]["rows"] == [["broken", "RuntimeError: no such kernel", "", "", "", ""]]
    assert "failed" not in tables[3]["rows"][0]
    for table in tables:
        assert {len(row) for row in table["rows"]} == {len(table["head"])}, table["title"]
    names = [name for _, name in compiled]
    assert any("train_in_cluster<16, gemmlet::optimizers::adam>" in name for name in names)
    assert not any("double" in name or "adamw" in name for name in names)


def test_losses_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_timing._Unwaited([BACKEND._first])
    z, t = (cuda_on_host.backend.to_gpu(np.ones((3, 4), np.float32)) for _ in range(2))
    monkeypatch.setattr(BACKEND._first, "synchronize", lambda: pytest.fail("waited for"))
    made.elementwise_loss(LOSSES["mean_squared_error"], z, t, 0.0, z)
    made.row_loss(ROW_LOSSES["softmax_cross_entropy"], t, t, 0.0, z)


def test_constants_are_timed(tmp_path: Path) -> None:
    seen = []

    def work() -> float:
        seen.append(launches.MAX_BLOCKS["rows"])
        if seen[-1] == 3:
            raise RuntimeError("too few")
        return 1e-6 * seen[-1]

    now, end = launches.MAX_BLOCKS, time.monotonic()
    constant = gpu_variants.Constant(launches, "MAX_BLOCKS", (now, {**now, "rows": 7}, {**now, "rows": 3}), {"a": work})
    gpu_variants.measure(tmp_path / "tables", [constant], end - 1.0)
    assert seen == []
    gpu_variants.measure(tmp_path / "tables", [constant], end + 60.0)
    assert seen == [now["rows"], 7, 3]
    assert now is launches.MAX_BLOCKS
    (table,) = (entry["table"] for entry in gpu_report._entries(tmp_path / "tables"))
    assert table["head"] == ["work", f"rows {now['rows']}", "rows 7", "rows 3", "best", "less than the first"]
    assert table["rows"][0] == ["a", f"{now['rows']:.2f}", "7.00", "failed", "rows 7", f"{1 - 7 / now['rows']:.0%}"]
    assert table["rows"][1][4] == "rows 3: RuntimeError: too few"


def test_constants_that_are_timed(gpu: OnCpu, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes first is what the backend does now; losses and functions of rows are computed with another value."""
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "upload", cuda_on_host.backend.to_gpu)
        (staged,) = (c.works for c in gpu_variants.of_training(gpu, BACKEND, pixels[:2, :9]) if "STAGED" in c.name)
        assert all(seconds() > 0 for seconds in staged.values())
    of_rows = gpu_variants.of_rows(gpu, BACKEND._first)
    for module, name, values, _ in [*gpu_variants.of_training(gpu, BACKEND, pixels), *of_rows]:
        assert name == "ROW_TEAMS" or values[0] == getattr(module, name), name
    for columns, teams in gpu_variants.TEAMS.items():
        assert all(launches._team(dtype, columns)[:2] == teams[0] for dtype in ("float32", "bfloat16"))
        assert all(threads * values >= columns or not values for threads, values in teams)
    monkeypatch.setattr(gpu_variants, "ELEMENTS", 2000)
    for module, name, values, works in of_rows:
        if name == "MAX_BLOCKS":
            with monkeypatch.context() as patched:
                patched.setattr(module, name, values[1])
                assert all(seconds() > 0 for work, seconds in works.items() if "bfloat16" not in work)
    assert len(gpu_variants.kernels_of_teams()) >= 4 * 15


@pytest.mark.parametrize("changed", gpu_variants.SOURCES, ids=lambda changed: changed.title)
def test_sources_that_are_timed(changed: gpu_variants.Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compile, to other code; of fewer instructions where jumps are gone, of more where branches are back."""
    try:
        compiler.nvrtc_version()
    except RuntimeError as error:
        pytest.skip(str(error))
    kernels = "training/cluster.cuh", ["gemmlet::train_in_cluster<16, gemmlet::optimizers::adam>"]
    before, _ = compiler.compile_cubin(*kernels, "sm_90a")
    monkeypatch.setattr(compiler, "sources", changed)
    after, _ = compiler.compile_cubin(*kernels, "sm_90a")
    assert (len(after.image) < 0.8 * len(before.image)) == (changed.title == "network compiled in")
    assert (len(after.image) > len(before.image)) == (changed.title == "exact rules")


# The small set for the sanitizer.


def test_sanitized_checks(capsys: pytest.CaptureFixture[str]) -> None:
    device, rng = BACKEND._first, np.random.default_rng(0)
    checks = list(gpu_sanitized.checks(device))
    names = [name for name, _ in checks]
    assert len(names) == len(set(names))
    parts = "MLP", "GAN", "dropout", "sparse", "n_classes", "tf32", "skinny", "simt", "mma ", "wgmma", "transposed"
    for part in (*gemmlet.kernels.__all__, *parts, "augmentation"):
        assert any(part in name for name in names), part
    trainings = list(gpu_sanitized.trainings(rng))
    some = [*trainings[:1], *trainings[4:], *gpu_sanitized.augmentation(rng)]
    some += list(gpu_sanitized.halves_and_strides(device, rng))[:6]
    matrices: list[Any] = []
    is_filled: list[bool] = []
    empty, fill = device.empty, gpu_sanitized.fill_padding

    def zeroed(shape: tuple[int, ...], dtype: Any) -> Any:
        matrix = empty(shape, dtype)
        # Those of a session: no other array of these checks is like them. All have padding.
        if len(shape) == 2 and shape[1] % 4 == 0 and np.dtype(dtype) == np.float32:
            device.view(matrix).fill(0)
            matrices.append(matrix)
        return matrix

    def watched(session: Any) -> None:
        fill(session)
        is_filled.extend(bool(np.isnan(device.view(matrix)[:, -1]).all()) for matrix in matrices)
        matrices.clear()

    with (
        mock.patch.object(gpu_sanitized, "fill_padding", watched),
        mock.patch.object(device, "empty", zeroed),
        gpu_sanitized.padding_filled(),
    ):
        assert gpu_sanitized.run(some, 60.0)
    assert capsys.readouterr().out == f"{len(some)} of {len(some)} checks, 0 wrong\n"
    assert len(is_filled) > 30
    assert all(is_filled)


def test_sanitized_checks_that_fail(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        gpu_sanitized._close([1.0, np.nan], [1.0, 1.0], 1e-3)

    def broken() -> None:
        raise RuntimeError("illegal address")

    def fine() -> None:
        gpu_sanitized._close([1.0, 2.0001], [1.0, 2.0], 1e-3)

    assert not gpu_sanitized.run([("a", wrong), ("b", fine)], 60.0)
    assert not gpu_sanitized.run([("a", broken), ("b", fine)], 60.0)
    assert gpu_sanitized.run([("a", fine), ("b", fine)], 0.0)
    out = capsys.readouterr().out
    assert "WRONG a: an error of nan" in out
    assert "2 of 2 checks, 1 wrong" in out
    assert "FAILED a: RuntimeError: illegal address" in out
    assert "1 of 2 checks, 0 wrong" in out


# Stages.


def runner(tmp_path: Path, seconds: float = 60.0) -> gpu_report.Runner:
    return gpu_report.Runner(tmp_path / "output.log", seconds)


def test_commands_are_shown_logged_and_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = gpu_report.environment()
    script = "print('one'); print('two', flush=True); raise SystemExit(5)"
    ended = runner(tmp_path).run([sys.executable, "-c", script], 30, environment, lambda line: line != "two")
    assert (ended.status, ended.lines, ended.how) == (5, ["one", "two"], "exit status 5")
    assert capsys.readouterr().out == "one\n"
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "print('started', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
    )
    start = time.monotonic()
    ended = runner(tmp_path).run([sys.executable, "-c", script], 2.0, environment)
    assert time.monotonic() - start < 50
    assert ended.status is None
    assert ended.lines == ["started", "interrupted"]
    assert ended.how.startswith("stopped after")
    assert (tmp_path / "output.log").read_text() == "one\ntwo\nstarted\ninterrupted\n"


def job(tmp_path: Path, *words: str, seconds: float = 60.0) -> gpu_report.Job:
    options = gpu_report.parse(["--out", str(tmp_path), *words])
    report: dict[str, Any] = {"stages": {}, "rows": [], "notes": [], "roof": {}, "settings": {}}
    return gpu_report.Job(runner(tmp_path, seconds), options, report)


def test_a_stage_has_its_share_of_the_time(tmp_path: Path) -> None:
    total = sum(gpu_report.SECONDS.values())
    assert total <= 60 * gpu_report.parse([]).minutes < 580
    whole = job(tmp_path, seconds=total)
    assert whole.limit("build") == pytest.approx(gpu_report.SECONDS["build"], abs=1)
    assert whole.limit("optimizers") == pytest.approx(total, abs=1)
    assert job(tmp_path, seconds=total / 2).limit("tests") < gpu_report.SECONDS["tests"]
    assert job(tmp_path, "--only", "losses", seconds=100).limit("losses") == pytest.approx(100, abs=1)


def test_what_was_built_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"python/gemmlet/a/b.py": "new", "csrc/cuda/c.cuh": "new", "python/gemmlet/d.so": "new"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    site = tmp_path / "site"
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_report, "SITE", site)
    gpu_report.refresh()
    assert not site.exists()
    (site / "gemmlet" / "a").mkdir(parents=True)
    (site / "gemmlet" / "a" / "b.py").write_text("old")
    gpu_report.refresh()
    found = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.*")}
    assert found == {"gemmlet/a/b.py": "new", "gemmlet/csrc/cuda/c.cuh": "new"}


def test_stages_fail_softly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(job: gpu_report.Job) -> gpu_report.Stage:
        return gpu_report.Stage(True, "fine")

    def bad(job: gpu_report.Job) -> gpu_report.Stage:
        raise OSError("no such thing")

    facts = {"name": "Some GPU", "driver": "1.2", "multiprocessors": 3, "l2_bytes": 2**20, "nvrtc": "13.0"}
    monkeypatch.setattr(gpu_report, "gpu_facts", lambda: dict(facts))
    monkeypatch.setattr(gpu_report, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_report, "STAGES", {"build": good, "tests": bad, "sanitizer": good, "train": good})
    with monkeypatch.context() as patched:
        patched.setattr(gpu_report.signal, "signal", lambda *arguments: None)
        out = str(tmp_path / "out")
        assert gpu_report.main(["--out", out, "--only", "build,tests"]) == 1
        assert gpu_report.main(["--out", out, "--only", "build"]) == 0
        monkeypatch.setattr(gpu_report, "gpu_facts", lambda: {**facts, "cublas": False})
        monkeypatch.setitem(gpu_report.STAGES, "build", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        assert gpu_report.main(["--out", out, "--only", "build,tiles"]) == 1
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["gpu"]["name"] == "Some GPU"
    *lacking, last = written["notes"]
    assert lacking[-1] == "tiles will fail: CuPy finds no cuBLAS"
    assert last == "stopped before its end"
    printed = capsys.readouterr().out
    assert "== tests: FAILED, 0 s; OSError: no such thing" in printed
    assert "build: ok" in printed
    assert (tmp_path / "out" / "report.txt").exists()
    earlier = [json.loads((tmp_path / "out" / f"report-{n}.json").read_text()) for n in (1, 2)]
    assert [report["settings"]["only"] for report in earlier] == [["build", "tests"], ["build"]]
    assert (tmp_path / "out" / "report-2.txt").exists()


def test_rows_of_processes_that_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "WORK", tmp_path)
    row = gpu_cases.rows_as_json([Row("losses", "a", "call", {"gemmlet": Timed((1.0,))})])[0]
    lines = [{"note": "jax is not installed"}, {"roof": {"copy": 1e12}}, {"tried": "losses: a"}, {"row": row}]
    statuses = iter([-6, 3, 0])

    def run(self: Any, command: Any, limit: float, environment: Any, show: Any = None) -> gpu_report.Ended:
        status = next(statuses)
        with Path(command[3]).open("a") as file:
            file.write(
                ("" if status else "\n".join(map(json.dumps, lines)) + "\n") + ('{"row": {"gr' if status else "")
            )
            file.write("\n")
        return gpu_report.Ended(status, 1.0, ["last line"])

    monkeypatch.setattr(gpu_report.Runner, "run", run)
    found = job(tmp_path, "--only", "losses")
    stage = gpu_report.timed(found, "losses")
    assert not stage.ok
    assert stage.summary == "1 rows, done, 3 processes"
    assert found.report["rows"] == [row]
    assert found.report["notes"] == ["losses: jax is not installed"]
    assert found.report["roof"] == {"copy": 1e12}
    # With little time there is one process.
    for given, summary in ((0, "1 rows, done"), (3, "0 rows, exit status 3")):
        statuses = iter([given])
        stage = gpu_report.timed(job(tmp_path, "--only", "losses", seconds=9), "losses")
        assert stage.summary == summary


def test_tables_of_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "WORK", tmp_path)
    (tmp_path / "mnist").mkdir()
    commands = []

    def run(self: Any, command: Any, limit: float, environment: Any, show: Any = None) -> gpu_report.Ended:
        commands.append([Path(word).name for word in command[1:]])
        gpu_timing.write_table(Path(command[command.index("--seconds") - 1]), f"table {len(commands)}", ["a"], [["1"]])
        return gpu_report.Ended(len(commands) - 1, 1.0, ["last line"])

    monkeypatch.setattr(gpu_report.Runner, "run", run)
    found = job(tmp_path, "--only", "parts,tiles", "--data-dir", str(tmp_path / "mnist"), seconds=100)
    stages = [gpu_report.STAGES[name](found) for name in ("parts", "tiles")]
    assert [stage.ok for stage in stages] == [True, False]
    assert stages[1].failures == ["last line"]
    assert [table["title"] for table in found.report["tables"].values()] == ["table 1", "table 2"]
    assert commands[0][:3] == ["gpu_parts.py", "parts.jsonl", "--seconds"]
    assert commands[0][-2:] == ["--data-dir", "mnist"]
    assert commands[1][:-1] == ["gpu_matmul.py", "--quick", "--tables", "tiles.jsonl", "--seconds"]


def test_what_pytest_says(tmp_path: Path) -> None:
    lines = ["....F [ 50%]", "FAILED tests/test_a.py::test_b - assert 1", "1 failed, 12 passed, 3 skipped in 33.21s"]
    stage = gpu_report.tests_stage(gpu_report.Ended(1, 34.0, lines))
    assert not stage.ok
    assert stage.summary == "1 failed, 12 passed, 3 skipped in 33.21s"
    assert stage.failures == [lines[1]]
    stage = gpu_report.tests_stage(gpu_report.Ended(0, 34.0, ["", "===== 12 passed in 133.21s (0:02:13) ====="]))
    assert stage.ok
    assert stage.summary == "12 passed in 133.21s (0:02:13)"
    stage = gpu_report.tests_stage(gpu_report.Ended(None, 34.0, ["12 passed in 3.21s"]))
    assert not stage.ok
    assert stage.summary == "12 passed in 3.21s (stopped after 34 s)"
    assert not gpu_report.tests_stage(gpu_report.Ended(4, 1.0, ["ERROR: usage"])).ok


def test_the_test_command_collects(tmp_path: Path) -> None:
    command = gpu_report.test_command()
    files = {Path(word).name for word in command if word.endswith(".py")}
    assert {"test_kernels.py", "test_cuda.py", "test_cuda_training.py", "test_fused.py", "test_nn_gan.py"} <= files
    assert not files & set(gpu_report.WITHOUT_GPU)
    for name in gpu_report.WITHOUT_GPU:
        assert (ROOT / "tests" / name).exists(), name
    command = [word for word in command if not word.endswith(".py")]
    command += [str(ROOT / "tests" / "test_registry.py"), "--collect-only", "-p", "no:randomly"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_sanitizer_says() -> None:
    clean = ["148 of 148 checks, 0 wrong", "========= ERROR SUMMARY: 0 errors"]
    stage = gpu_report.sanitizer_result(gpu_report.Ended(0, 9.0, clean))
    assert stage.ok
    assert stage.summary == "ERROR SUMMARY: 0 errors; 148 of 148 checks"
    race = ["9 of 148 checks, 0 wrong", "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"]
    stage = gpu_report.sanitizer_result(gpu_report.Ended(0, 9.0, race))
    assert not stage.ok
    assert "2 hazards" in stage.summary
    read = ["========= Uninitialized __global__ memory read of size 16 bytes", "=========     by thread (0,0,0)"]
    read.insert(1, "=========     at void gemmlet::update<float, unsigned char, gemmlet::optimizers::sgd>(T1)+0x3c0")
    stage = gpu_report.sanitizer_result(gpu_report.Ended(0, 9.0, [*read, *read, clean[0], "= ERROR SUMMARY: 2 errors"]))
    assert not stage.ok
    assert stage.summary == "ERROR SUMMARY: 2 errors; 148 of 148 checks; update: 2"
    assert not gpu_report.sanitizer_result(gpu_report.Ended(1, 9.0, clean)).ok
    assert not gpu_report.sanitizer_result(gpu_report.Ended(None, 9.0, clean[:1])).ok


def test_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_report.parse(["--only", " train,build"]).only == ["build", "train"]
    assert gpu_report.parse([]).only == list(gpu_report.SECONDS)
    for words, message in (
        ("--only nothing", "'nothing' is unknown"),
        ("--seconds-per-row 0", "--seconds-per-row must be a number above 0"),
        ("--minutes nan", "--minutes must be"),
        (f"--data-dir {tmp_path}/none", "is not a folder"),
        (f"--markdown {tmp_path}/none", "--markdown"),
        (f"--from {tmp_path}/none", "is no report: FileNotFoundError"),
        (f"--from {ROOT}/pyproject.toml", "is no report: JSONDecodeError"),
        (f"--from {ROOT}/benchmarks/instructions.json", "is no report: KeyError"),
    ):
        with pytest.raises(SystemExit):
            gpu_report.parse(words.split())
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(BACKEND._first, "view"), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("no GPU: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(BACKEND._first, "view"), reason="there is a GPU")
@pytest.mark.parametrize(
    "script", ["benchmarks/gpu_matmul.py", "benchmarks/gpu_sanitized.py", "tools/cluster_phases.py"]
)
def test_without_a_gpu_its_scripts_say_so(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("no GPU: ")


def test_what_is_missing_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_report, "NEEDS", {"build": {"no_such_module": "no-such"}, "tests": {"numpy": "numpy"}})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_report, "sanitizer_path", lambda: None)
    found = gpu_report.lacking(["build", "tests", "sanitizer"])
    assert found[0].startswith("build will fail: there is no no-such")
    assert found[1:] == ["sanitizer will fail: there is no compute-sanitizer"]
    assert gpu_report.lacking(["tests", "losses"]) == []


# Tables.


def made_up() -> dict[str, Any]:
    """A report as a run writes it, in which every family has rows."""
    rng = np.random.default_rng(0)
    rows = []
    for family in gpu_cases.FAMILIES:
        for case in gpu_cases.cases(family):
            timed = {name: Timed(tuple(1e-3 * rng.uniform(0.9, 1.1, 9))) for name in case.implementations}
            roofline = 9.9e-4 if case.bytes else None
            rows.append(
                Row(case.group, case.name, case.unit, timed, dict(case.labels), case.flops, case.bytes, roofline)
            )
    (one,) = (n for n, row in enumerate(rows) if row.name == "4096x4096->4096 tanh")
    rows[one] = Row("linear", rows[one].name, "call", {**rows[one].timed, "jax": Timed(failed="broken | in parts")})
    stage = {"ok": True, "seconds": 31.0, "summary": "fine", "failures": []}
    return {
        "date": "2026-02-03T04:05:06+00:00",
        "gpu": {"name": "Some GPU", "driver": "580.1", "multiprocessors": 132, "l2_bytes": 50 * 2**20},
        "versions": {"python": "3.12.3", "torch": "2.11"},
        "settings": {"only": list(gpu_report.SECONDS)},
        "roof": {"copy": 3e12, "products": {"float32": 5e13, "bfloat16": 8e14, "tf32": None}},
        "stages": {name: dict(stage) for name in gpu_report.SECONDS},
        "sanitizers": {tool: {"ok": True, "summary": "ERROR SUMMARY: 0 errors"} for tool in gpu_report.TOOLS},
        "trained": {"full": True, "mlp_accuracy": 0.9789, "same_bits": True, "weights_sgd": 3e-7, "weights_adam": 2e-5},
        "rows": gpu_cases.rows_as_json(rows),
        "tables": {"a step": {"title": "a step", "head": ["launch", "µs"], "rows": [["update", "7.25"]]}},
        "notes": ["matmul: 3 rows left out"],
    }


def test_text() -> None:
    report = made_up()
    text = gpu_tables.text(json.loads(json.dumps(report)))
    assert "Some GPU, 132 multiprocessors, L2 50 MiB" in text
    assert "copies at 3,000 GB/s" in text
    assert "bfloat16 800 TFLOP/s" in text
    assert re.search(r"^a step\nlaunch +µs\nupdate +7.25$", text, re.MULTILINE)
    assert "jax fails in linear: 4096x4096->4096 tanh: broken | in parts" in text
    for row in report["rows"]:
        assert row["name"] in text
    assert re.search(r"MLP on MNIST, accuracy +97.5% +97.89% +met", text)
    assert re.search(
        r"linear float32, layers up to 1024 wide, batch 64 to 4096 +1.2 × cuBLAS, every row +[01]\.\d+ .*▼ missed", text
    )
    assert text.rstrip().splitlines()[-1].startswith("epoch with dropout, label smoothing, augmentation")


def test_targets() -> None:
    report = made_up()
    report["trained"]["full"] = False
    report["stages"]["tests"].update(ok=False, summary="1 failed")
    found = {(v.work, v.required): v for v in gpu_tables.verdicts(report)}
    by_work = {work: v.met for (work, _), v in found.items()}
    assert by_work["the tests with cuda"] is False
    assert by_work["compute-sanitizer racecheck"] is True
    assert by_work["MLP on MNIST, accuracy"] is None  # not of the whole set
    assert by_work["weights after 100 steps (sgd), off the CPU's"] is True
    assert by_work["elementwise, 100 million elements"] is True
    assert by_work["linear float32, layers 4096 wide, batch 64 to 1024"] is False
    rows = report["rows"]
    slow = next(row for row in rows if row["group"] == "losses" and not row["labels"].get("waited"))
    slow["sides"]["gemmlet"]["samples"] = [1.98e-3] * 9
    broken = next(row for row in rows if row["group"] == "elementwise")
    broken["sides"]["gemmlet"] = {"failed": "wrong"}
    waited = next(row for row in rows if row["labels"].get("waited"))
    waited["sides"]["gemmlet"]["samples"] = [9.0] * 9
    by_work = {v.work: v for v in gpu_tables.verdicts(report)}
    assert by_work["losses and functions of rows, 100 million elements"].measured.startswith("0.50, softmax_cross")
    assert by_work["elementwise, 100 million elements"].measured == f"fails: {broken['name']}"
    nothing = gpu_tables.verdicts({})
    assert all(v.met is None for v in nothing)
    assert len({(v.work, v.required) for v in nothing}) == len(nothing)


def test_reports_of_one_gpu_are_put_together() -> None:
    first, second = made_up(), made_up()
    assert gpu_tables.merged([first]) == first
    first["stages"]["tests"]["ok"] = False
    first["rows"] = first["rows"][:-1]
    second["stages"] = {"tests": second["stages"]["tests"]}
    second["settings"] = {"only": ["tests"]}
    second["rows"] = second["rows"][-2:]
    del second["trained"]
    both = gpu_tables.merged([first, second])
    assert both["stages"]["tests"]["ok"]
    assert set(both["stages"]) == set(gpu_report.SECONDS)
    assert both["settings"]["only"] == list(gpu_report.SECONDS)
    assert len(both["rows"]) == len(made_up()["rows"])
    assert both["trained"] == first["trained"]
    second["gpu"] = {**second["gpu"], "name": "Another GPU"}
    with pytest.raises(ValueError, match="different GPUs"):
        gpu_tables.merged([first, second])


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, page = tmp_path / "report.json", tmp_path / "page.md"
    kept.write_text(json.dumps(made_up()))
    begin, end = "<!-- gpu:begin -->", "<!-- gpu:end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):  # what it wrote it replaces
        assert gpu_report.main(["--from", str(kept), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\nMeasured on 2026-02-03: Some GPU, ")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert r"broken | in parts" in text
    assert "| MLP on MNIST, accuracy | 97.5% | 97.89% | met |" in text
    for name, rows in itertools.groupby(sorted(row["group"] for row in made_up()["rows"])):
        assert f"<summary>{name} (one " in text
        assert f"): {len(list(rows))} rows, " in text
    assert "<details><summary>a step</summary>\n\n| launch | µs |\n| --- | ---: |\n| update | 7.25 |\n" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1
    page.write_text("no markers")
    with pytest.raises(SystemExit):  # and not after ten minutes
        gpu_report.parse(["--markdown", str(page)])
    assert "once each and in this order" in capsys.readouterr().err


def test_the_document_shows_commands_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs" / "performance.md").read_text().split("## On a GPU")[1]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for folder in ("mnist", "docs", "runs/gpu"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docs" / "performance.md").write_text("<!-- gpu:begin -->\n<!-- gpu:end -->\n")
    for name in ("report", "report-1"):
        (tmp_path / "runs" / "gpu" / f"{name}.json").write_text(json.dumps(made_up()))
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "benchmarks/gpu_report.py"]
        gpu_report.parse(words[2:])


def test_the_document_has_the_section() -> None:
    """The command that writes the other tables leaves it as it is."""
    from gemmlet.bench import report

    text = (ROOT / "docs" / "performance.md").read_text()
    assert report.between_markers(text, "gpu", "x\n") != text
    section = text.split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert section.strip().startswith("Measured on ")
    assert section in report.between_markers(text, "x86-64-v4", "other tables\n")
