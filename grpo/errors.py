"""Errors that a user can mend: each problem is one line `where: field: what it is (what is wanted)`.

The command line prints the lines and exits with `exit_code`, without a traceback; in Python they are exceptions.
"""

from __future__ import annotations

MAX_LINES = 10


def clip(value: object, limit: int = 80) -> str:
    """`value` as one printable line of at most `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class InputError(ValueError):
    """Bad input, found before training: unknown key, missing file, impossible size. One line per problem."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        shown = self.lines[:MAX_LINES]
        if len(self.lines) > MAX_LINES:
            shown.append(f"and {len(self.lines) - MAX_LINES} more")
        super().__init__("\n".join(shown))


class RunError(RuntimeError):
    """The run cannot go on (a reward raised, three non-finite steps in a row, …). The run folder has been saved."""

    exit_code = 1
