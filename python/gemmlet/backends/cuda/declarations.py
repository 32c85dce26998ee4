"""Structs, constants and lists that C++ declares, read from its sources, so that they are declared once."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from . import compiler

_MEMBER = re.compile(r"^  (?:const )?(?:unsigned )?(\w+)(?:<(\w+)>)?( ?[*\w][^();=]*);", re.MULTILINE)
_TYPES = {"bool": "?", "int": "i4", "ActivationNumber": "i4", "Index": "i8", "float": "f4", "double": "f8"}


@functools.cache
def struct(name: str, t: np.dtype[Any] | None = None) -> np.dtype[Any]:
    """A struct of ``csrc/cuda``, whose template parameters are all of type `t`."""
    fields: list[Any] = []
    for kind, argument, declarators in _MEMBER.findall(_body(name)):
        for declarator in declarators.split(","):
            found = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\w+)\])?", declarator)
            assert found is not None, declarator
            pointer, member, count = found.groups()
            if pointer:
                dtype: Any = "u8"
            else:
                dtype = _TYPES.get(kind) or (t if len(kind) == 1 else struct(kind, _template_argument(argument, t)))
            shape = () if count is None else (int(count) if count.isdigit() else constant(f"{name}::{count}"),)
            fields.append((member, dtype, shape))
    return np.dtype(fields, align=True)


def constant(name: str) -> int:
    """An integer constant of ``csrc/cuda``, or of a struct: ``"WideTile::rows"``."""
    scope, _, name = name.rpartition("::")
    found = re.search(rf"constexpr int (?:[^;]*, )?{name} = (\d+)[,;]", _body(scope) if scope else _sources())
    assert found is not None, name
    return int(found[1])


@functools.cache
def places(kind: str) -> dict[str, int]:
    """The numbers by which kernels know activations, losses or row losses: their places in C++'s list."""
    text = "".join(text for name, text in compiler.sources().items() if name.startswith("formulas/"))
    declared = re.search(rf"#define GEMMLET_{kind.upper()}\(X\)((?:.*\\\n)*.*)", text)
    assert declared is not None
    return {name: place for place, name in enumerate(re.findall(r"X\((\w+)\)", declared[1]))}


def _template_argument(argument: str, t: np.dtype[Any] | None) -> np.dtype[Any] | None:
    return np.dtype(_TYPES[argument]) if argument in _TYPES else t if argument else None


@functools.cache
def _sources() -> str:
    return "\n".join(text for name, text in compiler.sources().items() if name.startswith("cuda/"))


def _body(name: str) -> str:
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", _sources(), re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]
