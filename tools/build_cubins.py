"""Compile the CUDA kernels ahead of time, into the package, so that users of a wheel wait for no compiler.

    python tools/build_cubins.py [--arch sm_80,sm_90a] [--out python/gemmlet/cubins] [--jobs N]

A file holds what `gemmlet.backends.cuda_device` asks for at once, under the key by which it looks: it is found by users
whose NVRTC has the version of this machine's; others compile. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gemmlet.backends import cuda_backend, cuda_compile


def main() -> int:
    """Compile what is not there yet, and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(cuda_compile.ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "python/gemmlet/cubins")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="kernels whose names hold this")
    arguments = parser.parse_args()
    wanted = [
        (source, expression, arch)
        for arch in arguments.arch.split(",")
        for source, expressions in cuda_backend.expressions().items()
        for expression in expressions
        if arguments.only in expression
    ]

    def build(kernel: tuple[str, str, str]) -> int:
        source, expression, arch = kernel
        path = arguments.out / f"{cuda_compile.key(source, [expression], arch)}.cubin"
        if not path.exists():
            cuda_compile.write(path, cuda_compile.compile_cubin(source, [expression], arch)[0])
        return path.stat().st_size

    with ThreadPoolExecutor(arguments.jobs) as pool:
        sizes = list(pool.map(build, wanted))
    print(f"{len(sizes)} cubins, {sum(sizes) / 1e6:.1f} MB, in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
