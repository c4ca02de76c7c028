"""Progress bars on standard error, off under ``--quiet`` and where standard error is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Turn the bars off for this process."""
    global _quiet
    _quiet = quiet


@dataclass(frozen=True)
class Bar:
    """One bar."""

    progress: Progress
    task: TaskID

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.progress.advance(self.task, count)

    def reach(self, done: int) -> None:
        """So many are done by now."""
        self.progress.update(self.task, completed=done)


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar that counts up to ``total``, beginning at ``done``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=_quiet, transient=False) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done))


def track(items: Sequence[T], title: str) -> Iterator[T]:
    """Iterate with a bar."""
    with progress_bar(title, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()
