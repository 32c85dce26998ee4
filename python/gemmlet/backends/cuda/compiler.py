"""CUDA C++ to machine code: NVRTC at first use, and a cache on disk.

The sources travel with the package, so that a user needs a driver and NVRTC, and no nvcc. What is compiled is a file of
``csrc/cuda`` and the names of the kernels wanted from it; a cubin's key is a SHA-256 of every source, the options, the
names, the version of NVRTC and the architecture, and no path.

A release brings cubins along: for each architecture and source an archive, in which kernels that are alike are
compressed together. What is wanted of it goes to the cache, as if it had been compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ... import _environment
from ..._files import replacing
from ..._signals import deferred_signals

# What a release is compiled for ahead of time. The "a" is for instructions of that architecture alone.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")

# No product and sum is contracted but where the source says fma: an elementwise result has the bits of the CPU's.
# (Subnormal numbers, divisions and square roots are NVRTC's defaults: kept, and correctly rounded.)
OPTIONS = ("-std=c++17", "-default-device", "-fmad=false", "-DNDEBUG")

PACKAGE = Path(__file__).parents[2]


class Cubin(NamedTuple):
    """Machine code for one architecture, and what its kernels are called there, by the names that C++ has for them."""

    image: bytes
    names: Mapping[str, str]


def architecture(capability: str) -> str:
    """What to compile for on a GPU of this compute capability, ``"90"`` say."""
    return f"sm_{capability}a" if f"sm_{capability}a" in ARCHITECTURES else f"sm_{capability}"


@functools.cache
def sources() -> Mapping[str, str]:
    """The sources by the names that they include each other by: ``"cuda/matmul/common.cuh"``.

    RuntimeError if they were not installed with the package.
    """
    # In a checkout that is installed as editable they stay where they are.
    for root in (PACKAGE / "csrc", PACKAGE.parents[1] / "csrc"):
        if (root / "cuda").is_dir():
            files = [*root.glob("cuda/**/*.cuh"), *root.glob("formulas/*.h")]
            return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in sorted(files)}
    raise RuntimeError("the CUDA sources were not installed with gemmlet")


def import_cupy() -> Any:
    """Return CuPy; RuntimeError if it is not installed, or does not work: the message says what would help."""
    if importlib.util.find_spec("cupy") is None:
        raise RuntimeError("backend 'cuda' needs CuPy: pip install 'gemmlet[cuda12]', or 'gemmlet[cuda13]'")
    try:
        with deferred_signals():  # half imported it is broken for ever
            return importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"backend 'cuda' needs CuPy, which is installed and cannot be imported: {error}") from error


@functools.cache
def _nvrtc() -> Any:
    """CuPy's binding of NVRTC, with the library loaded."""
    nvrtc = import_cupy().cuda.nvrtc
    try:
        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise RuntimeError(
            "NVRTC, CUDA's compiler library, cannot be loaded: pip install 'gemmlet[cuda12]', or 'gemmlet[cuda13]', "
            f"brings it ({error})"
        ) from error
    return nvrtc


def nvrtc_version() -> str:
    """The version of NVRTC, as text."""
    return ".".join(map(str, _nvrtc().getVersion()))


def compile_cubin(
    source: str, expressions: Sequence[str], arch: str, options: Sequence[str] = OPTIONS
) -> tuple[Cubin, str]:
    """Compile kernels of ``csrc/cuda/<source>``; return them and the compiler's log.

    RuntimeError if NVRTC is missing, does not know the architecture, or refuses the source: the message holds its log.
    """
    nvrtc = _nvrtc()
    headers = sources()
    texts, names_of_headers = (tuple(text.encode() for text in part) for part in (headers.values(), headers.keys()))
    program = nvrtc.createProgram(f'#include "cuda/{source}"\n', source, texts, names_of_headers)
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, (*options, f"-arch={arch}"))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            if "invalid value for --gpu-architecture" in log or "INVALID_OPTION" in str(error):
                log += f"\nNVRTC {nvrtc_version()} may be too old for {arch}: install a newer one"
            raise RuntimeError(f"{source} cannot be compiled for {arch}: {error}\n{log}") from None
        names = {expression: nvrtc.getLoweredName(program, expression) for expression in expressions}
        # (CuPy gives the lowered names as str or bytes, and the log with a zero at its end.)
        names = {key: value.decode() if isinstance(value, bytes) else value for key, value in names.items()}
        # CuPy takes the last byte, which belongs to the file, for the end of a string.
        image = bytes(nvrtc.getCUBIN(program)) + b"\0"
        return Cubin(image, names), nvrtc.getProgramLog(program).rstrip("\0")
    finally:
        nvrtc.destroyProgram(program)


def key(source: str, expressions: Sequence[str], arch: str) -> str:
    """The name of these kernels in the cache."""
    facts = [sources(), OPTIONS, source, list(expressions), nvrtc_version(), arch]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cache_folder() -> Path:
    """``GEMMLET_CACHE_DIR``, else ``gemmlet`` in the user's folder of caches."""
    chosen = _environment.read("GEMMLET_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemmlet"


def cubin(source: str, expressions: Sequence[str], arch: str) -> Cubin:
    """Kernels of ``csrc/cuda/<source>``: from the package, from the cache, or compiled, and kept if that can be."""
    name = f"{key(source, expressions, arch)}.cubin"
    with contextlib.suppress(OSError, RuntimeError):  # the latter: there is no home folder
        kept = _of_bytes((cache_folder() / name).read_bytes())
        if kept is not None:
            return kept
    made = _shipped(archive(PACKAGE / "cubins", source, arch), name)
    if made is None:
        made, _ = compile_cubin(source, expressions, arch)
    # A cache that cannot be written to costs time, and nothing else.
    with contextlib.suppress(OSError, RuntimeError):
        write(cache_folder() / name, to_bytes(made))
    return made


def to_bytes(made: Cubin) -> bytes:
    """A cubin as a file holds it: its SHA-256, the names as a line of JSON, and the machine code."""
    content = json.dumps(dict(made.names)).encode() + b"\n" + made.image
    return hashlib.sha256(content).digest() + content


def _of_bytes(content: bytes) -> Cubin | None:
    """What `to_bytes` has made; None if it is something else."""
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    names, image = content[32:].split(b"\n", 1)
    return Cubin(image, json.loads(names))


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def archive(folder: Path, source: str, arch: str) -> Path:
    """Where a release has the cubins of a source for an architecture."""
    return folder / arch / Path(source).with_suffix(".tar.xz")


def _shipped(path: Path, name: str) -> Cubin | None:
    """The cubin of that name in an archive; None if there is none."""
    # Whatever is wrong with it, the kernel can be compiled.
    with contextlib.suppress(Exception), tarfile.open(path) as members:
        file = members.extractfile(name)
        return None if file is None else _of_bytes(file.read())
    return None
