"""Compile every CUDA kernel with nvcc, warnings being errors: a second opinion on what NVRTC compiles for users.

    python tools/nvcc_check.py [--arch sm_90a] [--nvcc /usr/local/cuda/bin/nvcc] [--only REGEX]

The kernels are those that the backend lists; nothing is run, so that no GPU is needed. CMake's target `nvcc_check`
calls it too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Those of NVRTC (backends/cuda/compiler.py) as nvcc spells them; formulas are constexpr, for host and device.
OPTIONS = ("-std=c++17", "--expt-relaxed-constexpr", "-fmad=false", "-Werror", "all-warnings", "-cubin")


def source(expressions: dict[str, list[str]], only: str) -> str:
    """A translation unit that has every kernel whose name fits `only`."""
    lines = [f'#include "cuda/{name}"' for name in expressions]
    kernels = [kernel for some in expressions.values() for kernel in some if re.search(only, kernel)]
    return "\n".join([*lines, "const void* kernels[] = {", *(f"    (const void*){k}," for k in kernels), "};", ""])


def check(nvcc: str, arch: str, only: str) -> subprocess.CompletedProcess[str]:
    """Compile them all; the result has nvcc's messages."""
    from gemmlet.backends.cuda import backend as cuda_backend

    # An activation is a small part of a matmul's kernel, at its end: the longest one is enough.
    expressions = cuda_backend.expressions(fused=["gelu"])
    for name, architectures in cuda_backend.ARCHITECTURES.items():
        if arch not in architectures:
            del expressions[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(source(expressions, only))
        command = [
            nvcc,
            *OPTIONS,
            f"-arch={arch}",
            "-I",
            str(ROOT / "csrc"),
            "-o",
            str(Path(folder) / "out"),
            str(file),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> int:
    """Compile, and say so; the exit status is nvcc's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--only", default="", metavar="REGEX", help="kernels whose names fit")
    arguments = parser.parse_args()
    done = check(arguments.nvcc, arguments.arch, arguments.only)
    print(done.stdout + done.stderr, end="")
    print("nvcc compiles them" if done.returncode == 0 else "nvcc refuses")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
