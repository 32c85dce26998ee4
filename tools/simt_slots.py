"""What a multiply-add costs in the main loops of the SIMT matmuls: a figure that needs no GPU.

    python tools/simt_slots.py [--arch sm_90a] [--nvdisasm PATH] [128x128x16x8x16x1x3 ...]

A warp's multiply-add takes one issue slot of its scheduler. So does every other instruction of the loop; and one more
is lost where all three numbers come from the same of the two banks of registers (Jia et al., 2018, arXiv:1804.06826).
For float32, x and w row by row, it prints for each tile, by default for the backend's: registers, how many blocks a
multiprocessor has room for, and issue slots for each multiply-add; 1 would be the peak. nvdisasm comes with CUDA, or
with `pip install nvidia-cuda-nvdisasm`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

from gemmlet.backends.cuda import compiler
from gemmlet.backends.cuda import matmul as cuda_matmul
from gemmlet.backends.cuda.matmul import Tile

_FFMA = re.compile(r"FFMA R\d+, (R\d+)(\.reuse)?, (R\d+)(\.reuse)?, (R\d+)(\.reuse)?$")
_REGISTERS, _SHARED, _THREADS = 65536, 227 * 1024, 2048  # of a multiprocessor


def instructions(image: bytes, nvdisasm: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a cubin, and to which one each label belongs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    return found, labels


def main_loop(found: list[str], labels: dict[str, int]) -> list[str]:
    """The loop with the most multiply-adds, which has no branches."""

    def multiply_adds(loop: range) -> int:
        return sum(found[i].startswith("FFMA") for i in loop)

    jumps = ((i, re.search(r"BRA.*`\((\.L\S+)\)", text)) for i, text in enumerate(found))
    loops = [range(labels[to[1]], i + 1) for i, to in jumps if to and labels[to[1]] <= i]
    return [found[i] for i in max(loops, key=multiply_adds)]


def conflicts(run: Iterable[str]) -> Iterator[str]:
    """The multiply-adds that wait for a bank; a number that the one before kept in its place needs none."""
    kept: dict[int, str] = {}
    for text in run:
        match = _FFMA.match(text)
        if match is None:
            kept = {}
            continue
        registers = dict(enumerate(match.group(1, 3, 5)))
        read = {int(name[1:]) for place, name in registers.items() if kept.get(place) != name}
        if any(sum(register % 2 == bank for register in read) > 2 for bank in (0, 1)):
            yield text
        kept = {place: registers[place] for place in registers if match.group(2 * place + 2)}


def report(tile: Tile, arch: str, nvdisasm: str) -> str:
    """A line about a tile."""
    epilogue = cuda_matmul.linear_epilogue("float32", "relu")
    source, name = cuda_matmul.kernel_of(tile, "float32", (False, True), epilogue)
    options = (*compiler.OPTIONS, "--ptxas-options=-v")
    made, log = compiler.compile_cubin(source, [name], arch, options)
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None
    registers = int(used[1])
    room = min(
        _REGISTERS // (-(-registers // 8) * 8 * tile.threads), _SHARED // (tile.shared + 1024), _THREADS // tile.threads
    )
    run = main_loop(*instructions(made.image, nvdisasm))
    count, lost = sum(text.startswith("FFMA") for text in run), sum(1 for _ in conflicts(run))
    line = f"{tile!s:28} {registers:4} registers, {room} blocks of {tile.threads}"
    return f"{line}: {(len(run) + lost) / count:.3f} issue slots ({lost / count:.3f} lost to banks)"


def main() -> int:
    """Print a line about each tile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tiles", nargs="*", help="parameters of SimtTile after the type, as 128x128x16x8x16x1x3")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--nvdisasm", default="nvdisasm")
    arguments = parser.parse_args()
    named = [cuda_matmul.simt("float32", tuple(map(int, text.split("x"))), 0.0, 0.0) for text in arguments.tiles]
    for tile in named or cuda_matmul.tiles("float32", False, arguments.arch):
        print(report(tile, arguments.arch, arguments.nvdisasm), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
