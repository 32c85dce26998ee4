"""What README and CONTRIBUTING say is true: their snippets run, what they name exists, their links lead somewhere."""

from __future__ import annotations

import contextvars
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import gemmlet
from gemmlet import kernels
from gemmlet.backends import select
from gemmlet.backends.cpu import available_isas
from gemmlet.cli.commands import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = (".py", ".h", ".cpp", ".cuh", ".cmake")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_readme_snippet(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from gemmlet.data import mnist

    def no_network() -> Any:
        raise mnist._NoDownloadError("no network in this test")

    monkeypatch.setattr(mnist, "_download", no_network)
    monkeypatch.delenv("GEMMLET_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    snippet, names = blocks("README.md", "python")[number], dict[str, Any]()
    for package in re.findall(r"'gemmlet\[(\w+)\]'", snippet):
        pytest.importorskip(package)
    code = compile(snippet, "README.md", "exec")
    contextvars.copy_context().run(exec, code, names)  # what a snippet chooses for its context ends with it
    if "digits" in names:
        digits = names["digits"]
        assert names["model"].evaluate(digits.x_test, digits.y_test)["accuracy"] > 0.9
        assert "epoch 5/5" in capsys.readouterr().out
    elif "step" in names:
        assert float(names["loss"]) > 0
    elif "h" in names:
        assert abs(names["h"] - names["np"].tanh(names["x"] @ names["w"] + names["b"])).max() < 1e-12
    elif "MLPClassifier" in names:
        assert names["MLPClassifier"].__module__ == "gemmlet.integrations.sklearn"
    elif "grad_w" in names:
        assert names["grad_w"].shape == names["w"].shape


def test_readme_names_kernels_and_backends_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    table = re.search(r"^## Kernels\n(.*?)\n\nf", text, re.MULTILINE | re.DOTALL)
    assert table
    listed = {name for span in re.findall(r"`([^`]*)`", table[1]) for name in span.split() if "…" not in name}
    assert len(listed) > 20
    assert listed <= set(kernels.__all__)
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == select.CHOICES


def test_the_command_asks_for_the_packages_of_its_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"pillow": "PIL", "scikit-learn": "sklearn"}
    packages = {
        extra: {imported.get(name, name) for line in extras[extra] for name in re.findall(r"^[\w-]+", line)}
        for extra in EXTRAS
    }
    assert set(EXTRAS["train"]) == packages["train"] - {"pooch"}  # without which the sample of MNIST is used
    assert EXTRAS["bench"] == EXTRAS["train"]  # the others are peers, or for the tests
    assert "gemmlet" in packages["bench"]


def test_the_snippet_for_a_gpu_needs_no_library_that_the_extras_do_not_bring() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (snippet,) = re.findall(
        r"^```\nimport cupy\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    for part, library in {"random": "curand", "linalg": "cusolver", "fft": "cufft", "matmul": "cublas"}.items():
        assert f"cupy.{part}" not in snippet or library in extras["cuda12"][1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        if here := re.fullmatch(rf"{re.escape(source)}/(?:blob|raw)/main/(.*)", target):
            assert (ROOT / here[1]).exists(), target
        elif document.name == "README.md":  # PyPI shows it without the files beside it
            assert target.startswith("https://"), target
        else:
            assert target.startswith("https://") or (document.parent / target).exists(), target
    # Files that are named in passing.
    for name in re.findall(r"`((?:csrc|python|tests|tools|docs|cmake|benchmarks|backends|\.ci)/[\w./]*)`", text):
        assert (ROOT / name).exists() or (ROOT / "python/gemmlet" / name).exists(), name


def test_the_design_names_what_exists() -> None:
    """In the design, identifiers are those of the sources, and paths lead to files; drawings too."""
    text = (ROOT / "docs/design.md").read_text()
    drawings, prose = (
        blocks("docs/design.md", "text"),
        re.sub(r"^```text$.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL),
    )
    assert len(drawings) == 6
    spans = re.findall(r"`([^`]+)`", prose)
    assert len(spans) > 150
    paths = {span for span in spans if "/" in span and " " not in span and "(" not in span}
    paths |= set(re.findall(r"\b(?:csrc|python|tests|cmake)/[\w./]+", text))
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    sources = [path for folder in ("csrc", "python", "cmake") for path in (ROOT / folder).rglob("*.*")]
    known = set(re.findall(r"\w+", "\n".join(p.read_text() for p in sources if p.suffix in _SOURCES)))
    named = {word for span in spans if span not in paths for word in re.findall(r"\w+", span)}
    named |= {word for drawing in drawings for word in re.findall(r"\w*[a-z]_[a-z]\w*|\w+(?=\()", drawing)}
    assert sorted(named - known) == []


def test_the_files_to_touch_are_counted() -> None:
    """Each row of CONTRIBUTING's table: the files it names, and the changelog."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Files to touch")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| (\d+) \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) >= 7
    for what, count, files in rows:
        assert len(set(re.findall(r"`((?:csrc|python)/[\w./]+)`", files))) + 1 == int(count), what


def test_options_in_the_documents_exist() -> None:
    typer = pytest.importorskip("typer")
    from gemmlet.cli.app import app

    command = typer.main.get_command(app)
    shown = [line for document in DOCUMENTS for block in blocks(str(document), "sh") for line in block.splitlines()]
    calls = [shlex.split(line.split("&&")[-1], comments=True) for line in shown if "gemmlet " in line]
    calls = [words[1:] for words in calls if words and Path(words[0]).name == "gemmlet"]
    assert len(calls) >= 5
    for words in calls:
        at = command
        while words and words[0] in getattr(at, "commands", {}):
            at, words = at.commands[words[0]], words[1:]
        options = {name for parameter in at.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words


def copy_of_the_repository(copy: Path) -> Path:
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if files.returncode:
        pytest.skip("no checkout of the repository")
    for name in filter(None, files.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)
    return copy


# What is asked of the layer that CONTRIBUTING adds.
LAYER_CHECK = """
import sys
from importlib.util import find_spec

import numpy as np
import torch
import gemmlet
from gemmlet.nn import MLP, AdamW

assert gemmlet.__file__.startswith(sys.argv[1]), gemmlet.__file__
rng = np.random.default_rng(0)
x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, 40)
for backend in sys.argv[2:]:
    with gemmlet.use_backend(backend):
        model = MLP([6, 8, 5, 3], "gelu", layer_norm=True, dtype=np.float64, ema_decay=0.5, seed=1)
        for array in model.parameters:
            array += 0.3 * rng.normal(size=array.shape)
        tensors = [torch.tensor(p, requires_grad=True) for p in model.parameters]

        def objective(rows):
            z = torch.tensor(x[rows])
            for i in (0, 4):
                z = z @ tensors[i] + tensors[i + 1]
                z = torch.nn.functional.layer_norm(z, z.shape[1:], *tensors[i + 2 : i + 4])
                z = torch.nn.functional.gelu(z)
            return torch.nn.functional.cross_entropy(z @ tensors[8] + tensors[9], torch.tensor(y[rows]))

        def assert_close(ours, theirs):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-10)

        loss, gradients = model.loss_and_gradients(x, y)
        wanted = objective(slice(None))
        wanted.backward()
        assert_close(loss, wanted)
        assert len(gradients) == len(tensors) == 10
        for gradient, tensor in zip(gradients, tensors):
            assert_close(gradient, tensor.grad)
        groups = [{"params": [t for t in tensors if t.ndim > 1]}]
        groups.append({"params": [t for t in tensors if t.ndim == 1], "weight_decay": 0.0})
        theirs = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            for first in range(0, 40, 16):
                theirs.zero_grad()
                objective(slice(first, first + 16)).backward()
                theirs.step()
        model.fit(x, y, 3, 16, AdamW(0.01, weight_decay=0.1), shuffle=False)
        for param, tensor in zip(model.parameters, tensors):
            assert_close(param, tensor)
        model.save("network")
        loaded = MLP.load("network")
        assert np.array_equal(loaded.predict_proba(x), model.predict_proba(x))
        for ours, average in zip(model._dense.parameters, model._average.parameters):
            average[...] = ours
        assert_close(model.evaluate(x, y)["loss"], objective(slice(None)))
        refused = [lambda: setattr(model, "layer_norm", False)]
        if find_spec("onnx") is not None:
            refused.append(lambda: model.to_onnx("network.onnx"))
        for call in refused:
            try:
                call()
            except (AttributeError, ValueError) as error:
                assert "layer_norm cannot be changed" in str(error) or "0.gain" in str(error)
            else:
                raise AssertionError(call)
        print(backend, "agrees")
"""


def apply_diff(text: str, diff: str) -> str:
    """The text, with the lines of a diff that stand in it once replaced."""
    lines = diff.rstrip("\n").split("\n")
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in "+-")
    assert text.count(before) == 1, diff
    return text.replace(before, after)


def test_a_layer_takes_six_files(tmp_path: Path) -> None:
    """Apply the worked example of CONTRIBUTING to a copy, with the modules that are built, and compare with PyTorch."""
    pytest.importorskip("torch")
    copy = copy_of_the_repository(tmp_path / "gemmlet")
    for module in Path(gemmlet.__file__).parent.glob("_cpu*.so"):
        shutil.copy2(module, copy / "python" / "gemmlet")
    example = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a layer in six files")[1].split("\n## ")[0]
    parts = re.split(r"\*\*`([^`]*)`\*\*", example)[1:]
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(files) == 6
    for name, part in files.items():
        text, diffs = (copy / name).read_text(), re.findall(r"```diff\n(.*?)```", part, re.DOTALL)
        assert diffs
        for diff in diffs:
            text = apply_diff(text, diff)
        (copy / name).write_text(text)
    backends = ["numpy"] + ["cpu"] * bool(available_isas()) + ["numba"] * (find_spec("numba") is not None)
    # An editable install of the package would come before PYTHONPATH.
    script = 'sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]\n'
    script = f"import sys\n{script}{LAYER_CHECK}"
    python, environment = str(copy / "python"), dict(os.environ)
    environment["PYTHONPATH"] = python
    done = subprocess.run(
        [sys.executable, "-c", script, python, *backends], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [f"{backend} agrees" for backend in backends], done.stderr
    # Without the operation in the reference nothing of it works.
    source = copy / "python" / "gemmlet" / "training" / "reference.py"
    source.write_text(source.read_text().replace("    LayerNorm: Operation(_normalize, _denormalize),\n", ""))
    broken = subprocess.run(done.args, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "KeyError: <class 'gemmlet.training.plan.LayerNorm'>" in broken.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the package is for Linux and macOS")
def test_an_activation_and_a_loss_take_three_files_each(tmp_path: Path) -> None:
    """Apply the worked examples of CONTRIBUTING to a copy, build it for one instruction set, run the tests on it."""
    copy, names = copy_of_the_repository(tmp_path / "gemmlet"), []
    for kind, formulas, struct_at, list_at, entry_at in (
        ("an activation", "activations", "// The list.", "  X(relu)", '        Activation(\n            name="relu"'),
        (
            "an elementwise loss",
            "losses",
            "#define GEMMLET_LOSSES",
            "  X(huber)",
            '        Loss(\n            name="huber"',
        ),
    ):
        example = (ROOT / "CONTRIBUTING.md").read_text().split(f"## Adding {kind} in three files")[1].split("\n## ")[0]
        struct, listed = re.findall(r"```cpp\n(.*?)```", example, re.DOTALL)
        (entry,) = re.findall(r"```python\n(.*?)```", example, re.DOTALL)
        (line,) = re.findall(r"```md\n(.*?)```", example, re.DOTALL)
        names += re.findall(r'name="(\w+)"', entry)
        # Each piece goes in front of something that stands in the file once.
        edits = {
            f"csrc/formulas/{formulas}.h": ((struct, struct_at), (listed, list_at)),
            f"python/gemmlet/formulas/{formulas}.py": ((entry, entry_at),),
            "CHANGELOG.md": ((line, "- `gemmlet.kernels`"),),
        }
        assert len(edits) == 3
        assert set(re.findall(r"\*\*`([^`]*)`\*\*", example)) == set(edits)
        for name, pieces in edits.items():
            text = (copy / name).read_text()
            for piece, place in pieces:
                assert text.count(place) == 1, (name, place)
                text = text.replace(place, piece + place)
            (copy / name).write_text(text)
    # What is asked is whether it builds and works, not how fast it is: optimising takes most of the time of a build.
    options = (copy / "CMakeLists.txt").read_text()
    assert options.count("-O3") == 1
    (copy / "CMakeLists.txt").write_text(options.replace("-O3", "-O0"))

    site = tmp_path / "site"
    define = "--config-settings=cmake.define.GEMMLET_ISAS=baseline"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), define, str(copy)]
    # Of the environment CMAKE_ARGS would come after the definition here, and build what it asks for as well.
    environment = {n: value for n, value in os.environ.items() if n not in ("CMAKE_ARGS", "GEMMLET_TEST_BACKENDS")}
    built = subprocess.run(pip, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    # An editable install of the package would come before PYTHONPATH.
    (site / "sitecustomize.py").write_text(
        'import sys\nsys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]\n'
    )
    environment["PYTHONPATH"] = str(site)
    activation, loss = names
    used = f"kernels.{activation}_backward, kernels.{loss}"
    check = f"import gemmlet; from gemmlet import kernels; print(gemmlet.__file__); {used}"
    imported = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, cwd=copy)
    assert imported.stdout.startswith(str(site)), imported
    tests = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-k",
            f"{activation} or {loss} or list_the_same or public_names",
            "-n=0",  # to collect tests takes longer than to run these
            "-p",
            "no:cacheprovider",
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=copy,
    )
    assert tests.returncode == 0, tests.stdout
    # Values, special values, accuracy, shapes, fusing, training, documentation ... on each backend.
    passed = [line for line in tests.stdout.splitlines() if " PASSED" in line]
    for name in names:
        assert sum(name in line for line in passed) > 50, tests.stdout
    assert any("test_fit" in line and loss in line for line in passed), tests.stdout
