"""Echo: whether an answer repeats the question instead of answering it."""

from __future__ import annotations

LONGEST = 12  # words of a question that are looked for


def echoes(answer: str, question: str) -> bool:
    """Whether the question's first words stand in the answer, whatever their case, marks and spaces."""
    words = _words(question)[:LONGEST]
    return bool(words) and f" {' '.join(words)} " in f" {' '.join(_words(answer))} "


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()
