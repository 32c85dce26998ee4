"""The package in layers: a module imports its own layer and those below, and no modules import each other in a circle.

Read from the sources: imports in functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "gemmlet"

# From the bottom to the top: a folder, or a module.
LAYERS = (
    ("formulas",),
    ("_cgroup", "_environment"),
    ("_arrays", "_files", "_locks", "_memory", "_precision", "_signals", "_threads", "_version"),
    ("metrics",),
    ("training",),
    ("backends",),
    ("_arguments",),
    ("kernels",),
    ("__init__",),  # its lazy submodules are no imports of its own
    ("nn",),
    ("data",),
    ("integrations",),
    ("bench",),
    ("cli",),
    ("__main__",),
)

FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def file_of(parts: list[str]) -> str | None:
    """The file of a module, of its name's parts below the package."""
    name = "/".join(parts)
    return next((f for f in (f"{name}.py", f"{name}/__init__.py".lstrip("/")) if f in FILES), None)


def imported(file: str) -> Iterator[str]:
    """The files of the package that a file imports."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            targets = [(name[1:], None) for name in names if name[0] == "gemmlet"]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                folder = list(Path(file).parent.parts)
                module = folder[: len(folder) + 1 - node.level] + module
            elif module[0] == "gemmlet":
                module = module[1:]
            else:
                continue
            targets = [(module, alias.name) for alias in node.names]
        else:
            continue
        for parts, name in targets:
            found = (name and file_of([*parts, name])) or file_of(parts)
            assert found, f"{file} imports {'.'.join(parts)}, of which there is no file"
            yield found


IMPORTS = {file: set(imported(file)) for file in FILES}


def layer_of(file: str) -> int:
    first = Path(file).parts[0].removesuffix(".py")
    layers = [i for i, names in enumerate(LAYERS) if first in names]
    assert len(layers) == 1, f"{file} is in {len(layers)} layers, expected one"
    return layers[0]


def test_each_layer_imports_what_is_below() -> None:
    upward = [
        f"{file} imports {other}, which is above it"
        for file, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if layer_of(other) > layer_of(file)
    ]
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle() -> None:
    circles, done = [], set()

    def follow(path: list[str]) -> None:
        for other in sorted(IMPORTS[path[-1]]):
            if other in path:
                circles.append(" imports ".join([*path[path.index(other) :], other]))
            elif other not in done:
                follow([*path, other])
        done.add(path[-1])

    for file in sorted(FILES):
        if file not in done:
            follow([file])
    assert not circles, "\n".join(circles)
