"""NumPy's own tests, and some of SciPy's and scikit-learn's, as they are installed, pass while NumPy is accelerated."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import PATIENCE

NUMPY = [
    "numpy/_core/tests/test_umath.py", "numpy/_core/tests/test_umath_accuracy.py", "numpy/_core/tests/test_numeric.py",
    "numpy/_core/tests/test_multiarray.py", "numpy/_core/tests/test_nep50_promotions.py",
    "numpy/linalg/tests/test_linalg.py",
]  # fmt: skip
# Those that use products, exponentials, sums and masks most.
SCIPY = [
    "scipy/special/tests/test_logsumexp.py", "scipy/linalg/tests/test_basic.py", "scipy/cluster/tests/test_vq.py",
    "scipy/interpolate/tests/test_rbfinterp.py", "scipy/stats/tests/test_entropy.py",
    "scipy/optimize/tests/test_least_squares.py",
]  # fmt: skip
SKLEARN = [
    "sklearn/neural_network/tests/test_mlp.py", "sklearn/mixture/tests/test_gaussian_mixture.py",
    "sklearn/gaussian_process/tests/test_kernels.py", "sklearn/tests/test_naive_bayes.py",
]  # fmt: skip
# They need 8 and 16 GiB, and half a minute; and five seconds for all arrays of 16 bools. The last one, of NumPy 2.5,
# replaces a loop inside a ufunc, which is not seen (docs/numpy.md).
LEFT_OUT = "not test_huge_vectordot and not test_count_nonzero_all and not TestReplaceLoopBySignature"


@dataclass(frozen=True)
class Ran:
    passed: int
    failed: list[str]
    taken: dict[str, int]
    output: str


def run(folder: Path, *words: str) -> Ran:
    """Run tests of packages in a child process, each test named by its path from where packages are installed."""
    packages = {word.split("/")[0] for word in words if "/" in word}
    for package in packages:
        pytest.importorskip(package)
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent.parent
    outcome = folder / "outcome.json"
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", root, "--confcutdir", root]
    command += ["-p", "numpy_peers", "-p", "no:cacheprovider", "-q", "--tb=short", "--outcome", outcome]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "SKLEARN_SKIP_NETWORK_TESTS": "1",
        # Threads of a BLAS that wait do so by spinning, on the processors that other tests need.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "GEMMLET_NUM_THREADS": "2",
    }
    given = [root / word if "/" in word else word for word in words]
    done = subprocess.run(
        [*map(str, [*command, *given])], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    output = (done.stdout + done.stderr)[-5000:]
    assert outcome.exists(), output
    found = json.loads(outcome.read_text())
    return Ran(found["passed"], found["failed"], {name: pair[0] for name, pair in found["counts"].items()}, output)


def fail_no_more(folder: Path, at_least: int, *words: str) -> Ran:
    """Run tests while NumPy is accelerated; none fails that does not fail otherwise, too."""
    ran = run(folder, "--accelerated", *words)
    assert len(ran.failed) < 50, f"{len(ran.failed)} fail:\n{ran.output}"
    worse = sorted(set(ran.failed) - set(run(folder, *ran.failed).failed)) if ran.failed else []
    assert not worse, f"{worse} fail while NumPy is accelerated:\n{ran.output}"
    assert ran.passed > at_least, ran.output
    return ran


@pytest.mark.slow
def test_numpys_own_tests(tmp_path: Path) -> None:
    ran = fail_no_more(tmp_path, 20_000, *NUMPY, "-k", LEFT_OUT)
    unused = [name for name, taken in ran.taken.items() if not taken]
    assert sum(ran.taken.values()) > 100_000
    assert len(unused) < len(ran.taken) / 5, f"no test reaches {unused}"


@pytest.mark.slow
@pytest.mark.parametrize(("paths", "at_least"), [(SCIPY, 3000), (SKLEARN, 400)], ids=["scipy", "scikit-learn"])
def test_tests_of_packages_that_use_numpy(tmp_path: Path, paths: list[str], at_least: int) -> None:
    ran = fail_no_more(tmp_path, at_least, *paths)
    assert sum(ran.taken.values()) > 10_000, ran.taken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("numpy.exp", [NUMPY[1]]),
        ("numpy.dot", [NUMPY[3], "-k", "TestDot and (vecmat or dotcol or dotvec)"]),
        ("numpy.sum", ["scipy/stats/tests/test_entropy.py"]),
        ("numpy.exp", ["sklearn/gaussian_process/tests/test_kernels.py"]),
    ],
)
def test_they_find_a_wrong_kernel(tmp_path: Path, entry: str, words: list[str]) -> None:
    ran = run(tmp_path, "--accelerated", "--wrong", entry, *words)
    assert ran.taken[entry]
    assert ran.failed, ran.output
