"""The commands by name, and the packages that they need: what is known before any of those is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

# As the help lists them.
COMMANDS = {
    "train": "Train a network on MNIST.",
    "evaluate": "Measure a classifier of digits, or compare two.",
    "predict": "Say which digits images show.",
    "sample": "Draw what a generator makes.",
    "augment": "Draw what augmentation makes of digits.",
    "bench": "Check and time the kernels and the trainings beside their peers.",
    "info": "Show backends, threads, versions and environment variables.",
}
HELP_OPTIONS = ("-h", "--help")
# What the help says besides: it is no command, as it runs in the interpreter that is named.
PROGRAMS = "python -m gemmlet program.py runs a program with NumPy accelerated."

# What the extras bring, by the names they are imported under, and what of it the help needs.
_TRAIN = ("typer", "rich", "matplotlib", "PIL", "threadpoolctl")
EXTRAS = {"train": _TRAIN, "bench": _TRAIN}
FOR_HELP = ("typer", "rich")


def extra_of(command: str) -> str:
    """Return the extra that a command needs; of words that are no command the one that most need."""
    return command if command in EXTRAS else "train"


def missing(packages: Sequence[str]) -> list[str]:
    """Return those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def list_commands() -> None:
    """Print what the help without any package can say."""
    print("Usage: gemmlet [-h] [--version] COMMAND ...\n\nCommands:")
    for name, text in COMMANDS.items():
        print(f"  {name:<8}  {text}")
        extra = extra_of(name)
        if name != "info" and (needed := missing(EXTRAS[extra])):
            print(f"            It needs {', '.join(needed)}: pip install 'gemmlet[{extra}]'")
    print(f"\n{PROGRAMS}")
