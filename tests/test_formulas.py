"""A formula stands once in C++ (csrc/formulas) and once in Python (gemmlet/formulas), and nowhere else.

What is looked for elsewhere: a function of the mathematics that formulas are made of, such as an exponential or a
choice by element; a struct of a formula's name; and a list of formulas. A copy that consists of sums and products alone
is found by its name only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gemmlet import kernels
from gemmlet.formulas.activations import ACTIVATIONS
from gemmlet.formulas.losses import LOSSES, ROW_FUNCTIONS, ROW_LOSSES
from gemmlet.formulas.optimizers import OPTIMIZER_RULES

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "csrc").is_dir():
    pytest.skip("no checkout of the repository", allow_module_level=True)

# Each list of Python, by the name of C++'s.
REGISTRY: dict[str, Mapping[str, Any]] = {
    "ACTIVATIONS": ACTIVATIONS,
    "LOSSES": LOSSES,
    "ROW_FUNCTIONS": ROW_FUNCTIONS,
    "ROW_LOSSES": ROW_LOSSES,
    "OPTIMIZER_RULES": OPTIMIZER_RULES,
}
# Sums of products, into which an activation is fused: they have no formula of their own.
MATMULS = {"matmul", "linear", "linear_backward"}
# Arguments choose the rule, or its hyperparameters.
UPDATES = {"sgd_update": ("sgd", "momentum"), "adam_update": ("adam",), "adamw_update": ("adam",)}

# What a value type has: the mathematics of simd.h and of GPUs, besides csrc/formulas/math.h. And NumPy's functions,
# each of which is one of these.
VALUE_TYPES = {"cpu/simd.h", "cpu/ufuncs.cpp", "cuda/scalar.cuh", "cuda/reduced_precision.cuh", "cuda/ptx.cuh"}
MATHEMATICS = re.compile(
    r"(?<!: )\b(exp|expf|exp2|expm1|log|logf|log2|log1p|log1p_unit|tanh|erfc?|pow|sqrt|decay|decay_times"
    r"|unsigned_decay_times|scaled_normal_tail|select|copysign|at_least|at_most)(<[^<>()]*>)?\("
)
# Lines elsewhere that may have it, each with the reason.
ALLOWED = {
    "static V term(V v) { return decay(v); }": "a row's values are those of simd.h",
    "static V exp(V v) { return gemmlet::exp(v); }": "the same",
    "static Statistic log(const Statistic& s) { return Layout::log(s); }": "the logarithm of a row's sum",
    "static Statistic log(Statistic s) { return std::log(s); }": "the same, of one row",
    "static Statistic log(const Statistic& s) {": "the same, of several",
    "return Statistic([&](int i) { return gemmlet::log(s.part[i]); });": "the same",
    "each([&](int, Vec<T> v) { most = select(v > most, v, most); }, x);": "the largest number of a row",
    "Vec<T> operator()(Vec<T> loss) const { return at_most(at_least(loss, least), most); }": "what a loss counts",
    "return well && flags == 0 && std::isfinite(square) ? new_scalar(std::sqrt(square)) : nullptr;": "a norm",
    "__device__ __forceinline__ double value() const { return fma(times_, 600 * 0.69314718055994530942, "
    "log(product_)); }": "a sum of logarithms is the logarithm of a product",
}
PYTHON_MATHEMATICS = re.compile(r"\b(np|math)\.(exp|exp2|expm1|log|log2|log1p|logaddexp|tanh)\b")
# Numba's scalar kernels, what gemmlet is compared with and put under, and metrics, which no kernel computes.
PYTHON_ALLOWED = ("formulas", "backends/numba", "bench", "integrations", "metrics")


def code_of(path: Path) -> str:
    return re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|\bGEMMLET_INLINE(_LAMBDA)? ', "", path.read_text("utf-8"))


def formula_sources(root: Path) -> list[Path]:
    return sorted((root / "csrc/formulas").glob("*.h"))


def listed(root: Path) -> dict[str, list[str]]:
    """C++'s lists."""
    text = "\n".join(code_of(path) for path in formula_sources(root))
    lists = re.findall(r"#define GEMMLET_(\w+)\(X\)((?:.*\\\n)*.*)", text)
    return {name: re.findall(r"\bX\((\w+)\)", entries) for name, entries in lists}


def strays(root: Path) -> list[str]:
    """Where something of a formula stands outside of csrc/formulas and gemmlet/formulas."""
    names = "|".join(name for entries in REGISTRY.values() for name in entries)
    found = []
    csrc = root / "csrc"
    for path in sorted(p for folder in ("cpu", "cuda") for p in (csrc / folder).rglob("*") if p.is_file()):
        file = path.relative_to(csrc).as_posix()
        for number, line in enumerate(code_of(path).splitlines(), 1):
            calls = file not in VALUE_TYPES and MATHEMATICS.search(line) and line.strip() not in ALLOWED
            if calls or re.search(rf"\b(struct|class) ({names})\b|#define GEMMLET_({'|'.join(REGISTRY)})\b", line):
                found.append(f"csrc/{file}:{number}: {line.strip()}")
    package = root / "python/gemmlet"
    for path in sorted(package.rglob("*.py")):
        if not path.relative_to(package).as_posix().startswith(PYTHON_ALLOWED):
            lines = enumerate(path.read_text("utf-8").splitlines(), 1)
            found += [
                f"{path.relative_to(root)}:{i}: {line.strip()}" for i, line in lines if PYTHON_MATHEMATICS.search(line)
            ]
    return found


def test_both_languages_list_the_same() -> None:
    assert {name: sorted(entries) for name, entries in listed(ROOT).items()} == {
        name: sorted(entries) for name, entries in REGISTRY.items()
    }


@pytest.mark.parametrize("name", sorted(set(kernels.__all__) - MATMULS))
def test_a_formula_stands_twice(name: str) -> None:
    cpp, headers = listed(ROOT), [code_of(path) for path in formula_sources(ROOT)]
    for formula in UPDATES.get(name, (name.removesuffix("_backward"),)):
        assert [kind for kind, entries in REGISTRY.items() if formula in entries] == [
            kind for kind, entries in cpp.items() for entry in entries if entry == formula
        ]
        assert sum(len(re.findall(rf"\bstruct {formula} {{", text)) for text in headers) == 1


def test_every_formula_is_that_of_a_kernel() -> None:
    formulas = {name for entries in REGISTRY.values() for name in entries}
    of_kernels = {f for n in kernels.__all__ for f in UPDATES.get(n, (n.removesuffix("_backward"),))} - {"linear"}
    assert formulas == of_kernels - MATMULS


def test_nothing_else_has_a_formula() -> None:
    assert strays(ROOT) == []
    used = {
        line.strip() for path in (ROOT / "csrc").rglob("*") if path.is_file() for line in code_of(path).splitlines()
    }
    assert set(ALLOWED) <= used  # what is allowed and not there hides what comes later


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("csrc/cpu/losses.cpp", "double softplus_again(double x) { return std::log(1 + std::exp(x)); }"),
        ("csrc/cpu/matmul/matmul.cpp", "template <class V> V relu_again(V x) { return select(x > V{}, x, V{}); }"),
        ("csrc/cuda/training/loss.cuh", "__device__ float term(float x) { return exp(x); }"),
        ("csrc/cuda/optimizers.cuh", "__device__ float root(float x) { return sqrt(x); }"),
        ("csrc/cuda/rows.cuh", "struct softmax {};"),
        ("csrc/cpu/elementwise.cpp", "#define GEMMLET_ROW_FUNCTIONS(X) X(softmax)"),
        ("python/gemmlet/kernels.py", "def again(x): return np.exp(x - np.max(x))"),
    ],
)
def test_a_third_copy_is_found(file: str, line: str, tmp_path: Path) -> None:
    for folder in ("csrc", "python/gemmlet"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.gz"))
    with (tmp_path / file).open("a") as stream:
        stream.write(f"{line}\n")
    (stray,) = strays(tmp_path)
    assert stray.startswith(f"{file}:")
    assert stray.endswith(line)
