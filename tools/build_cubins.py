"""Compile the CUDA kernels ahead of time, into the package, so that users of a wheel wait for no compiler.

    python tools/build_cubins.py [--arch sm_80,sm_90a] [--out python/gemmlet/cubins] [--jobs N]

Run it before a wheel is built. Of each architecture and source it makes an archive of what
`gemmlet.backends.cuda.device` asks for, under the keys by which that looks: found by users whose NVRTC has the version
of this machine's; others compile. An archive that is complete is left alone. No GPU is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gemmlet.backends.cuda import backend as cuda_backend
from gemmlet.backends.cuda import compiler


def is_complete(path: Path, names: Mapping[str, str]) -> bool:
    """Whether the archive holds all of these files."""
    with contextlib.suppress(FileNotFoundError), tarfile.open(path) as kept:
        return set(kept.getnames()) == set(names)
    return False


def build(path: Path, source: str, names: Mapping[str, str], arch: str, pool: ThreadPoolExecutor) -> None:
    """Write an archive of kernels, whose expressions are by file name."""

    def compiled(expression: str) -> bytes:
        return compiler.to_bytes(compiler.compile_cubin(source, [expression], arch)[0])

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        # In the order of the expressions: like ones are neighbours.
        for name, content in zip(names, pool.map(compiled, names.values()), strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    compiler.write(path, packed.getvalue())
    path.chmod(0o644)


def main() -> int:
    """Compile what is not there yet, and say how much it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(compiler.ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=compiler.PACKAGE / "cubins")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="kernels whose names hold this")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for arch in arguments.arch.split(","):
            size = count = 0
            for source, expressions in cuda_backend.expressions().items():
                wanted = sorted(expression for expression in expressions if arguments.only in expression)
                if not wanted or arch not in cuda_backend.ARCHITECTURES.get(source, (arch,)):
                    continue
                names = {f"{compiler.key(source, [expression], arch)}.cubin": expression for expression in wanted}
                path = compiler.archive(arguments.out, source, arch)
                if not is_complete(path, names):
                    build(path, source, names, arch, pool)
                size, count = size + path.stat().st_size, count + len(names)
            print(f"{arch}: {count} cubins, {size / 1e6:.1f} MB, in {arguments.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
