"""``python -m gemmlet`` is the command ``gemmlet``."""

from .cli import main

main()
