"""The commands by name, and the packages that they need: what is known before any of those is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

# As the help lists them.
COMMANDS = {
    "train": "Train a network on MNIST.",
    "bench": "Check and time the kernels and the trainings beside their peers.",
    "info": "Show backends, threads, versions and environment variables.",
}
HELP_OPTIONS = ("-h", "--help")
# What the help says besides: it is no command, as it runs in the interpreter that is named.
PROGRAMS = "python -m gemmlet program.py runs a program with NumPy accelerated."

# What the extras bring, by the names they are imported under, and what of it the help needs.
_TRAIN = ("typer", "rich", "matplotlib", "PIL", "sklearn", "threadpoolctl")
EXTRAS = {"train": _TRAIN, "bench": _TRAIN}
FOR_HELP = ("typer", "rich")


def missing(packages: Sequence[str]) -> list[str]:
    """Return those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def list_commands() -> None:
    """Print what the help without any package can say."""
    print("Usage: gemmlet [-h] [--version] COMMAND ...\n\nCommands:")
    for name, text in COMMANDS.items():
        print(f"  {name:<5}  {text}")
        if needed := missing(EXTRAS.get(name, ())):
            print(f"         It needs {', '.join(needed)}: pip install 'gemmlet[{name}]'")
    print(f"\n{PROGRAMS}")
