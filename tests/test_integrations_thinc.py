"""Thinc on gemmlet: its own tests pass, results are NumpyOps's, and importing breaks nothing, whatever is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("thinc")
from thinc import api
from thinc.backends import context_ops

import gemmlet
from gemmlet.backends import select
from gemmlet.integrations import thinc as integration
from gemmlet.integrations.thinc import GemmletOps
from support import PATIENCE, run_on

ROOT = Path(__file__).resolve().parent.parent
STOCK = api.NumpyOps()

# The kernels that GemmletOps asks for.
KERNELS = sorted(set(re.findall(r'_computed\(\s*"(\w+)"', Path(str(integration.__file__)).read_text())))


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """On the compiled backend: the others have few fast paths, and leave most to NumpyOps."""
    try:
        select.load("cpu")
    except RuntimeError:
        pytest.skip("nothing is compiled")
    with gemmlet.use_backend("cpu"):
        yield


@pytest.fixture
def ops() -> GemmletOps:
    return GemmletOps()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that have answered calls of this test."""
    kernels = list[str]()
    computed = integration._computed

    def watched(kernel: str, *arguments: Any) -> Any:
        result = computed(kernel, *arguments)
        if result is not None:
            kernels.append(kernel)
        return result

    monkeypatch.setattr(integration, "_computed", watched)
    return kernels


# Thinc's own tests.

PLUGIN = '''
"""Thinc's tests on GemmletOps in NumpyOps's place: counts the answers of each kernel, and may make them wrong."""

import builtins
import collections
import json
import os
import sys

import hypothesis
import numpy as np
import thinc.api
import thinc.backends
from thinc.config import registry

from gemmlet.integrations import thinc as integration


class Swapped(integration.GemmletOps):
    name = "numpy"


registry.ops("NumpyOps", func=Swapped)
thinc.api.NumpyOps = thinc.backends.NumpyOps = Swapped

taken, computed, wrong = collections.Counter(), integration._computed, "WRONG" in os.environ


def watched(kernel, *arguments):
    result = computed(kernel, *arguments)
    if result is not None:
        taken[kernel] += 1
        if wrong:
            changed = result if isinstance(result, np.ndarray) else arguments[0]
            changed += 1
    return result


integration._computed = watched
if wrong:  # to find the smallest example of each failure takes minutes
    hypothesis.settings.register_profile("quick", phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("quick")


def pytest_collection_finish(session):
    # Since NumPy 2.4 float() refuses the arrays of one element that test_compare_activations_to_torch gives it.
    sys.modules["thinc.tests.backends.test_ops"].float = lambda array: builtins.float(np.asarray(array).item())


def pytest_sessionfinish(session):
    with open(os.environ["TAKEN"], "w") as file:
        json.dump(taken, file)
'''

THINCS_TESTS = (
    "backends.test_ops",
    "test_optimizers",
    "test_loss",
    "model.test_model",
    "layers.test_combinators",
    "layers.test_feed_forward",
    "layers.test_layers_api",
    "layers.test_softmax",
)


def run_thincs_tests(folder: Path, *arguments: str, **environment: str) -> tuple[str, dict[str, int]]:
    """The last lines of Thinc's tests, and how many calls each kernel has answered."""
    (folder / "on_gemmlet.py").write_text(PLUGIN)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "on_gemmlet", "-p", "no:cacheprovider", "-q", "--pyargs"]
    child = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "TAKEN": str(folder / "taken.json"), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    taken = folder / "taken.json"
    assert taken.exists(), child.stdout + child.stderr
    return child.stdout, json.loads(taken.read_text())


@pytest.mark.slow
def test_thincs_own_tests_pass(tmp_path: Path) -> None:
    output, taken = run_thincs_tests(tmp_path, *(f"thinc.tests.{name}" for name in THINCS_TESTS))
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) > 1000
    assert not re.search(r"failed|error", output.splitlines()[-1]), output
    assert sorted(taken) == KERNELS  # each has answered


@pytest.mark.slow
def test_thincs_own_tests_find_wrong_kernels(tmp_path: Path) -> None:
    output, _ = run_thincs_tests(tmp_path, "thinc.tests.backends.test_ops", WRONG="1")
    failed = set(re.findall(r"^FAILED .*::(\w+)(?:\[torch_func(\d+))?", output, re.MULTILINE))
    names = {name for name, _ in failed}
    assert {"test_gemm_computes_correctly", "test_softmax_sums_to_one", "test_softmax_temperature"} <= names, output
    if any(name == "test_compare_activations_to_torch" for name in names):  # with PyTorch
        # relu, swish, gelu_approx, gelu and sigmoid, by their numbers there, but not mish, which is NumpyOps's.
        numbers = {number for name, number in failed if number}
        assert {"0", "5", "9", "10", "11"} <= numbers
        assert "4" not in numbers


# The same results as NumpyOps.


def arrays(dtype: str, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(7)
    return [rng.uniform(-3, 3, shape).astype(dtype) for shape in shapes]


Call = Callable[[Any, list[Any]], Any]
SQUARE = (7, 5)
# What to call, the shapes of the arguments, and the kernel.
CALLS: dict[str, tuple[Call, list[tuple[int, ...]], str]] = {
    "gemm": (lambda ops, a: ops.gemm(a[0], a[1]), [(4, 6), (6, 3)], "linear"),
    "gemm first": (lambda ops, a: ops.gemm(a[0], a[1], trans1=True), [(6, 4), (6, 3)], "linear"),
    "gemm second": (lambda ops, a: ops.gemm(a[0], a[1], trans2=True), [(4, 6), (3, 6)], "linear"),
    "gemm both": (lambda ops, a: ops.gemm(a[0], a[1], trans1=True, trans2=True), [(6, 4), (3, 6)], "linear"),
    "gemm out": (lambda ops, a: ops.gemm(a[0], a[1], out=a[2]), [(4, 6), (6, 3), (4, 3)], "linear"),
    "affine": (lambda ops, a: ops.affine(*a), [(4, 6), (3, 6), (3,)], "linear"),
    "relu": (lambda ops, a: ops.relu(*a), [SQUARE], "relu"),
    "relu in place": (lambda ops, a: ops.relu(a[0], inplace=True), [SQUARE], "relu"),
    "backprop_relu": (lambda ops, a: ops.backprop_relu(*a), [SQUARE] * 2, "relu_backward"),
    "backprop_relu in place": (lambda ops, a: ops.backprop_relu(*a, inplace=True), [SQUARE] * 2, "relu_backward"),
    "sigmoid": (lambda ops, a: ops.sigmoid(*a), [SQUARE], "sigmoid"),
    "sigmoid in place": (lambda ops, a: ops.sigmoid(a[0], inplace=True), [SQUARE], "sigmoid"),
    "backprop_sigmoid": (lambda ops, a: ops.backprop_sigmoid(*a), [SQUARE] * 2, "sigmoid_backward"),
    "backprop_sigmoid in place": (
        lambda ops, a: ops.backprop_sigmoid(*a, inplace=True),
        [SQUARE] * 2,
        "sigmoid_backward",
    ),
    "swish": (lambda ops, a: ops.swish(*a), [SQUARE], "silu"),
    "swish in place": (lambda ops, a: ops.swish(a[0], inplace=True), [SQUARE], "silu"),
    "backprop_swish": (lambda ops, a: ops.backprop_swish(a[0], a[1], STOCK.swish(a[1])), [SQUARE] * 2, "silu_backward"),
    "backprop_swish in place": (
        lambda ops, a: ops.backprop_swish(a[0], a[1], STOCK.swish(a[1]), inplace=True),
        [SQUARE] * 2,
        "silu_backward",
    ),
    "gelu": (lambda ops, a: ops.gelu(*a), [SQUARE], "gelu"),
    "gelu in place": (lambda ops, a: ops.gelu(a[0], inplace=True), [SQUARE], "gelu"),
    "backprop_gelu": (lambda ops, a: ops.backprop_gelu(*a), [SQUARE] * 2, "gelu_backward"),
    "backprop_gelu in place": (lambda ops, a: ops.backprop_gelu(*a, inplace=True), [SQUARE] * 2, "gelu_backward"),
    "gelu_approx": (lambda ops, a: ops.gelu_approx(*a), [SQUARE], "gelu_tanh"),
    "gelu_approx in place": (lambda ops, a: ops.gelu_approx(a[0], inplace=True), [SQUARE], "gelu_tanh"),
    "backprop_gelu_approx": (lambda ops, a: ops.backprop_gelu_approx(*a), [SQUARE] * 2, "gelu_tanh_backward"),
    "softmax": (lambda ops, a: ops.softmax(*a), [SQUARE], "softmax"),
    "softmax in place": (lambda ops, a: ops.softmax(a[0], inplace=True, axis=1), [SQUARE], "softmax"),
    "softmax tempered": (lambda ops, a: ops.softmax(*a, temperature=0.5), [(2, *SQUARE)], "softmax"),
    "backprop_softmax": (lambda ops, a: ops.backprop_softmax(*a), [SQUARE] * 2, "softmax_backward"),
    "backprop_softmax tempered": (
        lambda ops, a: ops.backprop_softmax(*a, temperature=2.0),
        [SQUARE] * 2,
        "softmax_backward",
    ),
    "update_averages": (lambda ops, a: ops.update_averages(*a, 3), [SQUARE] * 2, "sgd_update"),
    "update_averages at last": (lambda ops, a: ops.update_averages(*a, 10**6), [SQUARE] * 2, "sgd_update"),
}


def same(got: Any, wanted: Any, dtype: str) -> None:
    assert (type(got), getattr(got, "dtype", None)) == (type(wanted), getattr(wanted, "dtype", None))
    if got is not None:
        # NumpyOps itself is that exact: gelu's erf is an approximation to 1.5e-7, gelu_approx's gradient has 6 digits.
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_the_usual_call_is_computed_by_a_kernel(name: str, dtype: str, ops: GemmletOps, taken: list[str]) -> None:
    call, shapes, kernel = CALLS[name]
    ours, theirs = arrays(dtype, *shapes), arrays(dtype, *shapes)
    got, wanted = call(ops, ours), call(STOCK, theirs)
    assert taken == [kernel]
    same(got, wanted, dtype)
    for a, b in zip(ours, theirs, strict=True):  # what is changed, and what is not
        same(a, b, dtype)
        assert (got is a) == (wanted is b)


@pytest.mark.parametrize(
    "change", ["transposed", "every other", "subclass", "integers", "mixed", "empty", "shape", "read-only"]
)
@pytest.mark.parametrize("name", [name for name in CALLS if "out" not in name])
def test_any_other_call_is_as_before(name: str, change: str, ops: GemmletOps) -> None:
    """Results, and errors by their type: it may be a kernel that takes it, or NumpyOps."""
    call, shapes, _ = CALLS[name]

    def changed() -> list[Any]:
        found = arrays("float32", *shapes)
        if change == "transposed":
            return [np.asfortranarray(a) for a in found]
        if change == "every other":
            return [np.repeat(a, 2, axis=-1)[..., ::2] for a in found]
        if change == "integers":
            return [a.astype(np.int64) for a in found]
        if change == "mixed":
            return [found[0].astype(np.float64), *found[1:]]
        if change == "empty":
            return [a[:0] if a.ndim == 2 else a for a in found]
        if change == "shape":
            return [found[0][:, :3], *found[1:]]
        if change == "read-only":
            for a in found:
                a.flags.writeable = False
            return found
        return [a.view(np.memmap) for a in found]

    def outcome(ops: Any) -> Any:
        given = changed()
        with np.errstate(all="ignore"):
            try:
                return [call(ops, given), *given]
            except Exception as error:
                return type(error)

    if change == "transposed" and name.startswith("backprop_relu"):
        return  # NumpyOps reads Y in the order of memory, and is wrong where that is not dY's: see below
    got, wanted = outcome(ops), outcome(STOCK)
    if isinstance(wanted, type):
        assert got is wanted
    else:
        for a, b in zip(got, wanted, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
                assert a.dtype == b.dtype


def test_the_gradient_of_relu_takes_any_layout(ops: GemmletOps) -> None:
    dY, Y = arrays("float32", SQUARE, SQUARE)
    expected = np.where(Y > 0, dY, 0)
    assert np.array_equal(ops.backprop_relu(np.asfortranarray(dY), np.asfortranarray(Y)), expected)


def test_adam_is_numpyops(ops: GemmletOps, taken: list[str]) -> None:
    ours, theirs = arrays("float32", *[(500,)] * 4), arrays("float32", *[(500,)] * 4)
    for state in (ours, theirs):
        state[2:] = [np.zeros(500, "f"), np.zeros(500, "f")]
    for step in range(1, 6):
        rate = 0.01 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        for each, state in ((ops, ours), (STOCK, theirs)):
            state[1][:] = arrays("float32", (500,))[0] / step
            results = each.adam(*state, 0.9, 0.999, 1e-8, rate, 0.5)  # the last one is not read
            assert all(a is b for a, b in zip(results, state, strict=True))
            assert not state[1].any()
    assert taken == ["adam_update"] * 5
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_adam_with_a_gradient_that_is_read_only_is_numpyops(ops: GemmletOps) -> None:
    """Which sets it to 0 nevertheless."""
    found = []
    for each in (ops, STOCK):
        state = [np.abs(a) for a in arrays("float32", *[(9,)] * 4)]
        state[1].flags.writeable = False
        each.adam(*state, 0.9, 0.999, 1e-8, 0.1)
        found.append(state)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Training.


def trained(ops: Any, *, steps: int = 8) -> tuple[list[Any], Any]:
    """Parameters and averages after some steps of a network whose first weights are the same on any ops."""
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 12), dtype="f"), np.eye(3, dtype="f")[rng.integers(3, size=20)]
    token = context_ops.set(ops)
    try:
        model = api.chain(api.Relu(nO=9), api.Gelu(nO=8), api.Softmax())
        model.initialize(X=x, Y=y)
        places = [(node, name) for node in model.walk() for name in node.param_names]
        for node, name in places:
            node.set_param(name, rng.normal(0, 0.4, node.get_param(name).shape).astype("f"))
        optimizer = api.Adam(0.01, eps=1e-3)
        for _ in range(steps):
            predicted, backprop = model.begin_update(x)
            backprop(predicted - y)
            model.finish_update(optimizer)
        return [*(node.get_param(name) for node, name in places), *optimizer.averages.values()], model
    finally:
        context_ops.reset(token)


def test_training_is_the_same_by_kernels(ops: GemmletOps, taken: list[str]) -> None:
    wanted, _ = trained(STOCK)
    assert not taken
    got, model = trained(ops)
    assert isinstance(model.ops, GemmletOps)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    # Of three layers: forward, and two gradients; six parameters.
    assert taken.count("linear") == 8 * 9 + 3  # and forward once, to initialize
    for kernel, count in (("relu", 9), ("gelu", 9), ("softmax", 9), ("relu_backward", 8), ("gelu_backward", 8)):
        assert taken.count(kernel) == count
    assert taken.count("adam_update") == taken.count("sgd_update") == 8 * 6


def test_other_ops_keep_their_optimizer(ops: GemmletOps, taken: list[str]) -> None:
    """That optimizers ask the current ops concerns nobody else."""
    from thinc import optimizers

    found = optimizers.get_array_ops
    GemmletOps()
    assert optimizers.get_array_ops is found  # once
    assert type(found(np.zeros(1))) is api.NumpyOps
    token = context_ops.set(ops)
    assert found(np.zeros(1)) is ops
    context_ops.reset(token)
    trained(STOCK)
    assert not taken


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give children the entry point as pip installs it: in the metadata of a distribution."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["thinc_ops"]
    info = tmp_path / "installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[thinc_ops]", *lines]))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


# Thinc imports PyTorch if it can, which takes seconds.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"


def run(script: str, **environment: str) -> str:
    return run_on(select.load("cpu"), WITHOUT_TORCH + script, **environment)


def test_an_entry_point_names_it(installed: None) -> None:
    words = run(
        "from thinc.api import get_current_ops, use_ops\n"
        "with use_ops('gemmlet'): ops = get_current_ops()\n"
        "assert type(get_current_ops()).__name__ != 'GemmletOps'\n"
        "print(type(ops).__module__, type(ops).__name__, ops.name)"
    )
    assert words.split() == ["gemmlet.integrations.thinc", "GemmletOps", "gemmlet"]


def test_the_examples_of_the_page(installed: None) -> None:
    page = (ROOT / "docs" / "thinc.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        assert run(f"{example}\nprint(model.ops.name)").split() == ["gemmlet"]


# What is broken is said when ops are made, not when the module is imported.

_MAKE = "from gemmlet.integrations.thinc import GemmletOps\nprint(GemmletOps.name)\nGemmletOps()"
_WITHOUT = "import sys\nfor name in {names}: sys.modules[name] = None\n"
_COMPILED = "[f'gemmlet._cpu_{isa}' for isa in ('x86_64_v4', 'x86_64_v3', 'baseline')]"


@pytest.mark.parametrize(
    ("before", "environment", "error"),
    [
        ("", {"GEMMLET_BACKEND": "wrong"}, "ValueError: backend 'wrong' is unknown; GEMMLET_BACKEND takes"),
        ("", {"GEMMLET_ISA": "wrong"}, "ValueError: instruction set 'wrong'"),
        ("", {"GEMMLET_NUM_THREADS": "many"}, "ValueError: GEMMLET_NUM_THREADS"),
        (_WITHOUT.format(names=["thinc"]), {}, r"ImportError: GemmletOps needs thinc 8.3 or later: pip install"),
        (_WITHOUT.format(names=["thinc.backends.numpy_ops"]), {}, r"ImportError: GemmletOps needs thinc 8.3 or later"),
        (
            "import sys, types\nsys.modules['thinc'] = old = types.ModuleType('thinc')\nold.__path__ = []\n",
            {},
            "ImportError: GemmletOps needs thinc 8.3",
        ),
        (_WITHOUT.format(names=f"{_COMPILED} + ['numba']"), {"GEMMLET_BACKEND": ""}, None),
        (_WITHOUT.format(names=f"{_COMPILED} + ['numba']"), {"GEMMLET_BACKEND": "cpu"}, "Error"),
    ],
    ids=["backend", "isa", "threads", "no thinc", "broken thinc", "another thinc", "not compiled", "cpu not compiled"],
)
def test_importing_breaks_nothing(before: str, environment: dict[str, str], error: str | None) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + before + _MAKE],
        env={**os.environ, "PYTHONPATH": path, "GEMMLET_BACKEND": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert child.stdout == "gemmlet\n", child.stderr  # the class is there, whatever becomes of it
    if error is None:
        assert child.returncode == 0, child.stderr
    else:
        assert re.search(error, child.stderr.splitlines()[-1]), child.stderr


def test_thinc_works_where_gemmlet_does_not(installed: None) -> None:
    script = (
        "from thinc.api import Linear, get_ops, use_ops\n"
        "with use_ops('numpy'): Linear(2, 2)\n"
        "assert 'gemmlet.integrations.thinc' in sys.modules\n"
        "try: get_ops('gemmlet')\n"
        "except ValueError as error: print(error)"
    )
    assert run(script, GEMMLET_BACKEND="wrong").startswith("backend 'wrong' is unknown")


def test_importing_it_costs_little() -> None:
    """Whoever imports Thinc imports this: not the kernels, nor what only some backends need."""
    script = (
        "import thinc.api; before = set(sys.modules); import gemmlet.integrations.thinc\n"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('gemmlet')))\n"
        "print(any(name in sys.modules for name in ('gemmlet.kernels', 'gemmlet.nn', 'gemmlet.backends.cpu')))"
    )
    others, heavy = run(script).splitlines()
    assert not {"numba", "cupy", "scipy"} & {name.split(".")[0] for name in json.loads(others.replace("'", '"'))}
    assert heavy == "False"


def test_without_a_compiled_module_everything_is_numpyops(taken: list[str]) -> None:
    with gemmlet.use_backend("numpy"):
        got, _ = trained(GemmletOps())
    wanted, _ = trained(STOCK)
    assert not taken
    for a, b in zip(got, wanted, strict=True):
        assert np.array_equal(a, b)
