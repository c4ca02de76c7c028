"""Progress bars on standard error, off under ``--quiet`` and where standard error is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn the bars off for this process."""
    global _quiet
    _quiet = quiet


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A bar whose only task is 0; advance it with ``bar.advance(0, n)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=_quiet, transient=False) as bar:
        bar.add_task(title, total=total, completed=done)
        yield bar


def track(items: Sequence[T], title: str) -> Iterator[T]:
    """Iterate with a bar."""
    with progress_bar(title, len(items)) as bar:
        for item in items:
            yield item
            bar.advance(0)  # type: ignore[arg-type]
