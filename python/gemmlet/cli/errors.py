"""The error that ends the command with one line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used; its one line is all that is printed, and the exit status is `code`."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
