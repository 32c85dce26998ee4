"""The lists: declared once in each language, and the same in both; what is public follows from them."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import gemmlet
from gemmlet import _environment, kernels, nn
from gemmlet.backends import cpu as cpu_backend
from gemmlet.backends import select
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES

PACKAGE = Path(gemmlet.__file__).parent
MODULES = [cpu_backend._MODULES[isa] for isa in cpu_backend.available_isas()]


@pytest.mark.parametrize("module", MODULES)
def test_both_languages_list_the_same(module: str) -> None:
    extension = importlib.import_module(f"gemmlet.{module}")
    assert set(extension.activations()) == set(ACTIVATIONS)
    assert set(extension.row_functions()) == set(ROW_FUNCTIONS)
    assert set(extension.losses()) == set(LOSSES)
    assert set(extension.row_losses()) == set(ROW_LOSSES)
    assert set(extension.optimizer_rules()) == set(OPTIMIZER_RULES)


def test_numba_has_only_what_the_registry_has() -> None:
    pytest.importorskip("numba")
    import numpy as np

    from gemmlet.backends.numba.formulas import scalar_kernels

    known = {*ACTIVATIONS, *(f"{name}_backward" for name in ACTIVATIONS), *LOSSES, *OPTIMIZER_RULES, "exponential"}
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        assert not set(scalar_kernels(dtype)) - known


def test_public_names_follow_from_the_registry() -> None:
    forward = [*ACTIVATIONS, *ROW_FUNCTIONS]
    generated = {*forward, *(f"{name}_backward" for name in forward), *LOSSES, *ROW_LOSSES}
    assert generated <= set(kernels.__all__)
    assert len(kernels.__all__) == len(set(kernels.__all__))
    public = {
        name
        for name, value in vars(kernels).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == kernels.__name__
    }
    assert public == set(kernels.__all__)


@pytest.mark.parametrize("name", kernels.__all__)
def test_docstrings_are_complete(name: str) -> None:
    function = getattr(kernels, name)
    doc = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^(\w+, )*{argument}(, \w+)*( :|$)", doc, re.MULTILINE), f"{name} leaves out {argument}"
    for section in ("Parameters", *([] if name.endswith("_update") else ["Returns"])):
        assert f"{section}\n{'-' * len(section)}\n" in doc
    if name in ACTIVATIONS:
        assert str(ACTIVATIONS[name].forward_accuracy) in doc
        assert ACTIVATIONS[name].source in doc


def test_every_activation_serves_in_linear_and_in_the_networks(rng: Any) -> None:
    for name in ACTIVATIONS:
        x = rng.normal(size=(5, 3)).astype("f4")
        assert kernels.linear(x, x.T, activation=name).shape == (5, 5)
        assert nn.MLP([3, 4, 2], name).predict(x).shape == (5,)


def test_stubs_have_what_the_extension_has() -> None:
    stub = (PACKAGE / "_cpu_baseline.pyi").read_text()
    in_stub = set(re.findall(r"^def (\w+)", stub, re.MULTILINE)) | set(re.findall(r"^(\w+): ", stub, re.MULTILINE))
    for module in MODULES:
        assert (PACKAGE / f"{module}.pyi").exists()
        extension = importlib.import_module(f"gemmlet.{module}")
        assert {name for name in vars(extension) if not name.startswith("_")} == in_stub
        for name in in_stub:
            # pybind11 puts the signature into the docstring.
            shown = re.match(rf"{name}\((.*)\) ->", getattr(extension, name).__doc__ or "")
            if callable(getattr(extension, name)):
                declared = re.search(rf"^def {name}\((.*?)\) ->", stub, re.MULTILINE | re.DOTALL)
                assert shown
                assert declared
                assert re.findall(r"(\w+): ", shown[1]) == re.findall(r"(\w+): ", declared[1]), name
    assert (PACKAGE / "py.typed").exists()


# Importing.


def _run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True
    )
    return result.stdout


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); import gemmlet.kernels, gemmlet.nn, json; "
        "print(json.dumps(list(set(sys.modules) - before)))"
    )
    loaded = {name.split(".")[0] for name in json.loads(_run(code))}
    assert not loaded & {"numba", "llvmlite", "cupy", "torch", "sklearn", "scipy", "matplotlib", "typer", "rich"}


def test_import_takes_30_ms_at_most() -> None:
    code = (
        "import time, numpy; start = time.process_time(); import gemmlet, gemmlet.kernels; "
        "gemmlet.kernels.tanh(numpy.ones(3)); print(time.process_time() - start)"
    )
    # The processor's time, as the machine may be busy with other tests; the least of many, as the first may compile.
    seconds: list[float] = []
    while len(seconds) < 60 and (not seconds or min(seconds) > 0.030):
        seconds.append(float(_run(code, GEMMLET_BACKEND="", PYTHONDONTWRITEBYTECODE="")))
    assert min(seconds) <= 0.030, seconds


def test_version() -> None:
    from importlib.metadata import version

    assert version("gemmlet") == gemmlet.__version__


# Selection.


def test_backend_by_environment() -> None:
    code = "import gemmlet; from gemmlet.backends import select; print(select.current().name)"
    assert _run(code, GEMMLET_BACKEND="numpy").strip() == "numpy"
    refused = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "GEMMLET_BACKEND": "gpu"}
    )
    assert "backend 'gpu' is unknown; GEMMLET_BACKEND takes cpu, cuda, numba, numpy" in refused.stderr


VARIABLES = """
import numpy as np
import gemmlet
from gemmlet import kernels
for call in (lambda: kernels.tanh(np.zeros(2)), gemmlet.show_config, gemmlet.get_num_threads):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("backend", ["", "cpu"])
@pytest.mark.parametrize("name", ["GEMMLET_BACKEND", "GEMMLET_ISA", "GEMMLET_NUM_THREADS"])
def test_a_variable_of_an_unknown_value_is_named(name: str, backend: str) -> None:
    """By every first use, whatever else is set; to import gemmlet does not use any."""
    if name == "GEMMLET_ISA" and not cpu_backend.available_isas():
        pytest.skip("nothing was compiled")
    lines = _run(VARIABLES, **({"GEMMLET_BACKEND": backend} | {name: "foo"})).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert set(re.findall(r"GEMMLET_\w+", line)) == {name}
        assert "'foo'" in line


def test_all_variables_are_declared() -> None:
    package = Path(gemmlet.__file__).parent
    sources = {path: path.read_text("utf-8") for path in package.rglob("*.py")}
    read = {name for text in sources.values() for name in re.findall(r'_environment\.read\("(\w+)"\)', text)}
    assert read == set(_environment.VARIABLES)
    by_hand = [str(path) for path, text in sources.items() if re.search(r'os\.environ\S*"GEMMLET_', text)]
    assert not by_hand
    assert all(name.startswith("GEMMLET_") and len(line) < 120 for name, line in _environment.VARIABLES.items())


def test_an_older_threadpoolctl(tmp_path: Path) -> None:
    """Before 3.2 it takes no controllers: kernels compute without one."""
    (tmp_path / "threadpoolctl.py").write_text("class LibController: pass\nclass threadpool_limits: pass\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + (
        "import numpy as np; from gemmlet import kernels; print(kernels.tanh(np.zeros(2)))"
    )
    assert _run(code) == "[0. 0.]\n"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the module for it has another name in each version")
def test_sub_interpreter() -> None:
    """There compiled kernels would hang: the reference takes their place, and whoever asks for them gets an error."""
    code = """
import _xxsubinterpreters as sub
sub.run_string(sub.create(isolated=False), '''
import warnings
import numpy as np
warnings.simplefilter("ignore")
import gemmlet
from gemmlet import kernels
print(kernels.tanh(np.zeros(2)))
from gemmlet.nn import MLP
print(MLP([2, 3, 2]).fit(np.ones((4, 2)), [0, 1, 0, 1], epochs=3).loss[0] > 0)
for name in ("cpu", "numba"):
    try:
        gemmlet.use_backend(name)
    except ImportError as error:
        print("sub-interpreter" in str(error))
''')
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"GEMMLET_BACKEND": ""},
        timeout=60,
    )
    assert run.stdout == "[0. 0.]\nTrue\nTrue\nTrue\n", run.stderr


@pytest.mark.parametrize("isa", cpu_backend.available_isas())
def test_isa_by_environment(isa: str) -> None:
    code = "import sys, gemmlet; gemmlet.show_config(); print([m for m in sys.modules if '_cpu_' in m])"
    output = _run(code, GEMMLET_ISA=isa, GEMMLET_BACKEND="cpu")
    assert re.search(rf"^isa +{isa}", output, re.MULTILINE)
    # The module of that instruction set is loaded, and no other.
    loaded = re.findall(r"gemmlet\.(_cpu_\w+)", output)
    assert sorted(loaded) == sorted(["_cpu_features", cpu_backend._MODULES[isa]])


def test_isa_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    features = types.SimpleNamespace(supported=lambda: ["x86-64-v3", "baseline"])
    monkeypatch.setitem(sys.modules, "gemmlet._cpu_features", features)
    monkeypatch.setattr(cpu_backend, "_built_isas", lambda: ["x86-64-v4", "baseline"])
    with pytest.raises(ValueError, match="'x86-64-v4' cannot run here; GEMMLET_ISA takes baseline"):
        cpu_backend.CpuBackend("x86-64-v4")
    with pytest.raises(ValueError, match=r"'x86-64-v3' was not compiled \(.*ISAS=all has it\); .* takes baseline"):
        cpu_backend.CpuBackend("x86-64-v3")
    with pytest.raises(ValueError, match="'sse' is unknown"):
        cpu_backend.CpuBackend("sse")
    # Compiled on another machine.
    monkeypatch.setattr(cpu_backend, "_built_isas", lambda: ["x86-64-v4"])
    with pytest.raises(RuntimeError, match=r"compiled for x86-64-v4, which this processor lacks: reinstall gemmlet on"):
        cpu_backend.CpuBackend()
    monkeypatch.setattr(cpu_backend, "_built_isas", list)
    with pytest.raises(RuntimeError, match="not compiled"):
        cpu_backend.CpuBackend()


class InterruptionError(RuntimeError):
    """What somebody's handler of a signal raises."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptionError])
@pytest.mark.parametrize("name", ["automatic", *select.CHOICES])
def test_a_signal_while_a_backend_loads(name: str, error: type[BaseException], monkeypatch: Any) -> None:
    """It ends the call, is not taken for a reason to compute with another backend, and leaves nothing half imported."""
    load = select.automatic if name == "automatic" else lambda: select.load(name)
    monkeypatch.setattr(select, "_loaded", {})  # other tests may have put a stand-in there
    try:
        expected = load().name
    except RuntimeError as problem:
        pytest.skip(str(problem))
    monkeypatch.setattr(select, "_loaded", {})
    imported = importlib.import_module

    def interrupted(*arguments: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as raised:  # as extension modules do
            raise ImportError("initialization failed") from raised
        return imported(*arguments)

    def handler(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGTERM, handler)
    try:
        monkeypatch.setattr(importlib, "import_module", interrupted)
        with pytest.raises(error):
            load()
    finally:
        monkeypatch.setattr(importlib, "import_module", imported)
        signal.signal(signal.SIGTERM, before)
    assert load().name == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_what_is_no_refusal_of_a_backend(kind: Any, error: type[BaseException], monkeypatch: Any) -> None:
    """A thread that is interrupted in an import, or runs out of memory there, goes on with no other backend."""

    def broken(name: str) -> Any:
        try:
            raise error
        except BaseException as raised:
            raise kind("initialization failed") from raised

    monkeypatch.setattr(select, "_load", broken)
    monkeypatch.setattr(select, "_loaded", {})
    with pytest.raises(kind, match="initialization failed"):
        select.automatic()


def test_automatic_choice_falls_back_and_says_so_once() -> None:
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import numpy as np
from gemmlet.backends import cpu as cpu_backend, select
cpu_backend._built_isas = lambda: []
sys.modules["numba"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)
from gemmlet import kernels
print(kernels.tanh(np.zeros(2)), kernels.relu(np.ones(2)), select.current().name)
"""
    lines = _run(code, GEMMLET_BACKEND="").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("gemmlet computes with the numpy backend (cpu: backend 'cpu' was not compiled")
    assert "pip install 'gemmlet[numba]'" in lines[0]
    assert lines[1] == "[0. 0.] [1. 1.] numpy"


def test_ctrl_c_while_a_backend_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not choose another one: an extension module makes an ImportError of what comes while it is imported."""
    from gemmlet.backends import select

    load = importlib.import_module

    def interrupted(*names: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
        return load(*names)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(select, "_loaded", {})
        monkeypatch.setattr(select, "_current", None)
        monkeypatch.setattr(importlib, "import_module", interrupted)
        with pytest.raises(KeyboardInterrupt):
            select.current()
        assert len(select._loaded) == 1
    finally:
        signal.signal(signal.SIGINT, handler)


def test_use_backend() -> None:
    from gemmlet.backends import select

    before = select.current()
    with gemmlet.use_backend("numpy") as chosen:
        assert select.current() is chosen
        assert chosen.name == "numpy"
        with gemmlet.use_backend(before):
            assert select.current() is before
        assert select.current() is chosen
    assert select.current() is before
    with pytest.raises(ValueError, match="backend 'gpu' is unknown"):
        gemmlet.use_backend("gpu")
    assert select.current() is before


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    gemmlet.show_config()
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"gemmlet", "backend", "isa", "threads", "numpy", "python", "platform"} <= set(shown)
    assert shown["gemmlet"] == gemmlet.__version__
