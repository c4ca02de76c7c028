"""The one exception for faults of the user's input.

The command line turns a :class:`UserError` into exit code 2 and prints it without a traceback; any other exception is
ours and exits 1.
"""

from __future__ import annotations

import textwrap
from pathlib import Path


class UserError(ValueError):
    """A fault in what the user gave, with the place and the remedy.

    Args:
        fault: what is wrong, in one sentence.
        remedy: what to do about it.
        file: the file at fault, if one is.
        key: the key, field or option at fault, if one is.
    """

    def __init__(self, fault: str, *, remedy: str, file: str | Path | None = None, key: str | None = None) -> None:
        self.fault = fault
        self.remedy = remedy
        self.file = str(file) if file is not None else None
        self.key = key
        place = ": ".join(part for part in (self.file, key) if part)
        super().__init__(f"{place}: {fault}\n  remedy: {remedy}" if place else f"{fault}\n  remedy: {remedy}")


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of a bearable length; its kind where it says nothing."""
    return textwrap.shorten(str(error), 240, placeholder=" ...") or type(error).__name__
