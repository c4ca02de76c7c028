"""Scores of texts by a frozen model, each worked out once: base and capped base are read again beside every tuned model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from trimtab.axis.files import append_jsonl, fingerprint, read_jsonl

K = TypeVar("K", bound=Hashable)


class KeptScores(Generic[K]):
    """Scores in a file, found again by what was scored.

    Equal texts share one score. Scored twice, in batches of other widths, they would differ in the last digits.

    Args:
        path: JSON lines. What scores has to be in the name, such as a model's
            :attr:`~trimtab.eval.answers.readers.ReadingModel.identity`: it is not in the keys.
        score: new keys -> the score of each; NaN for one that has none.
    """

    def __init__(self, path: Path, score: Callable[[list[K]], Sequence[float]]) -> None:
        self._path = path
        self._score = score
        self._known: dict[str, float] | None = None

    def of(self, keys: Sequence[K]) -> list[float]:
        """The score of each key, [n]."""
        if self._known is None:
            rows = read_jsonl(self._path) if self._path.exists() else []
            self._known = {row["key"]: row["score"] for row in rows}
        names = [fingerprint(key) for key in keys]
        new = {name: key for name, key in zip(names, keys, strict=True) if name not in self._known}
        if new:
            found = dict(zip(new, map(float, self._score(list(new.values()))), strict=True))
            self._known |= found
            kept = [{"key": name, "score": score} for name, score in found.items() if score == score]
            if kept:
                append_jsonl(self._path, kept)
        return [self._known[name] for name in names]
