"""CUDA C++ to machine code without a GPU: every kernel for every architecture, the cache, and what goes wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cupy")
from cuda_on_host.device import kept
from gemmlet.backends.cuda import backend as cuda_backend
from gemmlet.backends.cuda import compiler
from gemmlet.backends.cuda.compiler import ARCHITECTURES, OPTIONS, compile_cubin, cubin

ROOT = Path(__file__).parents[1]

try:
    compiler.nvrtc_version()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

# ptxas aims at a number of threads a multiprocessor, and may put a register or two of a long kernel aside for it.
SPILLED_BYTES = 32

KERNEL = "gemmlet::activation_forward<gemmlet::activations::relu, float>"


def spills(log: str) -> dict[str, int]:
    """Bytes that each kernel puts aside for want of registers, by its name in the cubin."""
    entries = re.findall(r"entry function '(\w+)' for '\w+'\n.*\n\D+\d+ bytes stack frame, (\d+) bytes spill", log)
    return {name: int(count) for name, count in entries}


# An activation is a small part of a matmul's kernel, at its end: the longest one is enough.
KERNELS = cuda_backend.expressions(fused=["gelu"])
# All for the architecture that has instructions of its own; a sixth of them for the others, for time's sake, unless
# GEMMLET_TEST_ALL_KERNELS is set: the code is the same.
IN_FULL = ARCHITECTURES if os.environ.get("GEMMLET_TEST_ALL_KERNELS") else ("sm_90a",)
COMPILED = [(a, s) for a in ARCHITECTURES for s in KERNELS if a in cuda_backend.ARCHITECTURES.get(s, (a,))]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "source"), COMPILED)
def test_every_kernel_compiles(arch: str, source: str) -> None:
    expressions = KERNELS[source][:: 1 if arch in IN_FULL else 6]

    def compiled() -> str:
        made, log = compile_cubin(source, expressions, arch, (*OPTIONS, "--ptxas-options=-v"))
        assert made.image[:4] == b"\x7fELF"
        return json.dumps([made.names, log])

    names, log = json.loads(kept(f"nvrtc_{compiler.key(source, expressions, arch)}", compiled))
    assert set(names) == set(expressions)
    spilled = spills(log)
    assert set(spilled) == set(names.values())
    assert max(spilled.values()) <= SPILLED_BYTES, {n: b for n, b in spilled.items() if b > SPILLED_BYTES}
    # What ptxas says where it makes a kernel wait for each of them.
    assert "wgmma.mma_async instructions are serialized" not in log
    # And where it adds a wgmma.fence.
    assert "warpgroup.arrive is injected" not in log


def test_the_clocks_of_a_cluster_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tools/cluster_phases.py makes of the kernel: its phases are there, by their comments."""
    path = Path(__file__).parents[1] / "tools" / "cluster_phases.py"
    spec = importlib.util.spec_from_file_location("cluster_phases", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sources = tool.with_clocks(dict(compiler.sources()))
    monkeypatch.setattr(compiler, "sources", lambda: sources)
    kernel = f"gemmlet::train_in_cluster<{tool.RANKS}, gemmlet::optimizers::sgd>"
    made, _ = compile_cubin("training/cluster.cuh", [kernel], "sm_90a")
    assert b"gemmlet_clocks" in made.image


def test_a_spill_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel that holds 128 numbers at once, and may have 64 registers."""
    text = """
template <class T> __global__ void __launch_bounds__(1024, 1) greedy(T* x) {
  T held[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) x[threadIdx.x * 128 + i] = held[i] * held[(i + 1) % 128];
}
"""
    with_greedy = {**compiler.sources(), "cuda/greedy.cuh": text}
    monkeypatch.setattr(compiler, "sources", lambda: with_greedy)
    _, log = compile_cubin("greedy.cuh", ["greedy<float>"], "sm_80", (*OPTIONS, "--ptxas-options=-v"))
    (spilled,) = spills(log).values()
    assert spilled > SPILLED_BYTES


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="a second opinion, where there is one")
def test_nvcc_agrees() -> None:
    some = [] if os.environ.get("GEMMLET_TEST_ALL_KERNELS") else ["--only", r"\bfloat\b"]
    tool = ROOT / "tools/nvcc_check.py"

    def compiled() -> str:
        done = subprocess.run([sys.executable, tool, "--nvcc", str(NVCC), *some], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    version = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    facts = compiler.sources(), KERNELS, tool.read_text(), version, some
    assert "nvcc compiles them" in kept(f"nvcc_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}", compiled)


# The cache.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMLET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures compiled for, in turn."""
    done: list[str] = []

    def compile_(source: str, expressions: Any, arch: str) -> Any:
        done.append(arch)
        return compile_cubin(source, expressions, arch)

    monkeypatch.setattr(compiler, "compile_cubin", compile_)
    return done


def test_kernels_are_compiled_once(cache: Path, compilations: list[str]) -> None:
    first = cubin("elementwise.cuh", [KERNEL], "sm_80")
    assert cubin("elementwise.cuh", [KERNEL], "sm_80") == first
    assert compilations == ["sm_80"]
    (file,) = cache.iterdir()
    assert file.stat().st_mode & stat.S_IRUSR
    cubin("elementwise.cuh", [KERNEL], "sm_90a")
    assert compilations == ["sm_80", "sm_90a"]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_compiled_anew(damage: bytes | None, cache: Path, compilations: list[str]) -> None:
    first = cubin("elementwise.cuh", [KERNEL], "sm_80")
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content) if damage is None else damage)
    assert cubin("elementwise.cuh", [KERNEL], "sm_80") == first
    assert cubin("elementwise.cuh", [KERNEL], "sm_80") == first
    assert compilations == ["sm_80", "sm_80"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a file where the folder should be"
    file.write_text("")
    monkeypatch.setenv("GEMMLET_CACHE_DIR", str(file))
    assert cubin("elementwise.cuh", [KERNEL], "sm_80").image[:4] == b"\x7fELF"
    assert file.read_text() == ""


def test_the_key_is_of_the_sources_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(source: str = "elementwise.cuh", kernel: str = KERNEL, arch: str = "sm_80") -> str:
        return compiler.key(source, [kernel], arch)

    keys = {key(), key("losses.cuh"), key(kernel=KERNEL.replace("relu", "tanh")), key(arch="sm_86")}
    before = compiler.sources()
    assert all(name.startswith(("cuda/", "formulas/")) for name in before)
    monkeypatch.setattr(compiler, "OPTIONS", (*OPTIONS, "-G"))
    keys.add(key())
    monkeypatch.setattr(compiler, "OPTIONS", OPTIONS)
    # A header that is only included counts.
    changed = {**before, "formulas/math.h": before["formulas/math.h"] + "\n"}
    monkeypatch.setattr(compiler, "sources", lambda: changed)
    keys.add(key())
    monkeypatch.setattr(compiler, "sources", lambda: before)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "99.9")
    keys.add(key())
    assert len(keys) == 7
    assert all(re.fullmatch("[0-9a-f]{64}", k) for k in keys)


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GEMMLET_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "gemmlet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_folder() == Path.home() / ".cache" / "gemmlet"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("GEMMLET_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    made = compiler.Cubin(b"image", {})
    monkeypatch.setattr(compiler, "key", lambda *_: "key")
    monkeypatch.setattr(compiler, "_shipped", lambda *_: None)
    monkeypatch.setattr(compiler, "compile_cubin", lambda *_: (made, ""))
    assert compiler.cubin("elementwise.cu", [], "sm_90") is made


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_replace(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="disk full"):
        compiler.write(tmp_path / "x.cubin", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with the cubins that a release brings, but for most kernels."""
    folder = tmp_path_factory.mktemp("package")
    tool = [sys.executable, str(ROOT / "tools/build_cubins.py")]
    command = [*tool, "--arch", "sm_80", "--out", str(folder / "cubins"), "--only", KERNEL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sm_80: 1 cubins, 0.0 MB")
    return folder


def test_a_release_brings_cubins(
    package: Path, cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "PACKAGE", package)
    brought = cubin("elementwise.cuh", [KERNEL], "sm_80")
    assert compilations == []
    assert brought == compile_cubin("elementwise.cuh", [KERNEL], "sm_80")[0]
    # From then on it is in the cache.
    monkeypatch.setattr(compiler, "PACKAGE", cache)
    assert cubin("elementwise.cuh", [KERNEL], "sm_80") == brought
    assert compilations == []
    # Others are compiled: of another architecture, of a source without an archive, of a key that it does not have.
    monkeypatch.setattr(compiler, "PACKAGE", package)
    cubin("elementwise.cuh", [KERNEL], "sm_86")
    cubin("optimizers.cuh", [next(iter(KERNELS["optimizers.cuh"]))], "sm_80")
    cubin("elementwise.cuh", [KERNEL.replace("relu", "tanh")], "sm_80")
    assert compilations == ["sm_86", "sm_80", "sm_80"]


@pytest.mark.parametrize("damage", ["cut", "turned", "not an archive"])
def test_a_damaged_archive_is_passed_over(
    damage: str, package: Path, tmp_path: Path, cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = compiler.archive(package / "cubins", "elementwise.cuh", "sm_80").read_bytes()
    half = len(content) // 2
    damaged = {
        "cut": content[:half],
        "turned": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "not an archive": b"x" * 1000,
    }
    compiler.write(compiler.archive(tmp_path / "cubins", "elementwise.cuh", "sm_80"), damaged[damage])
    monkeypatch.setattr(compiler, "PACKAGE", tmp_path)
    assert cubin("elementwise.cuh", [KERNEL], "sm_80").image[:4] == b"\x7fELF"
    assert compilations == ["sm_80"]


# Errors.


def test_a_compiler_error_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)elementwise\.cuh cannot be compiled for sm_80.*no_such_activation"):
        compile_cubin("elementwise.cuh", [KERNEL.replace("relu", "no_such_activation")], "sm_80")


def test_an_unknown_architecture() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)sm_999.*newer"):
        compile_cubin("elementwise.cuh", [KERNEL], "sm_999")


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else find(name))
    with pytest.raises(RuntimeError, match=r"CuPy.*gemmlet\[cuda12\]"):
        compiler.import_cupy()


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        @staticmethod
        def getVersion() -> None:  # noqa: N802 - CuPy's name
            raise RuntimeError("libnvrtc.so.12: cannot open shared object file")

    class Cuda:
        nvrtc = Missing

    class Cupy:
        cuda = Cuda

    compiler._nvrtc.cache_clear()
    monkeypatch.setattr(compiler, "import_cupy", lambda: Cupy)
    with pytest.raises(RuntimeError, match=r"NVRTC.*gemmlet\[cuda12\]"):
        compiler.nvrtc_version()
    monkeypatch.undo()
    assert compiler.nvrtc_version()


def test_capabilities() -> None:
    assert [compiler.architecture(c) for c in ("75", "80", "90", "100", "103", "120")] == [
        "sm_75", "sm_80", "sm_90a", "sm_100a", "sm_103", "sm_120"]  # fmt: skip


def test_two_cubins_of_one_source_are_alike() -> None:
    """Or the key would promise what the compiler does not keep."""
    digests = {hashlib.sha256(compile_cubin("elementwise.cuh", [KERNEL], "sm_80")[0].image).digest() for _ in range(2)}
    assert len(digests) == 1
