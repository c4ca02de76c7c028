"""Answers that are none: empty ones, ones in another language than the question's, and ones that go round in a loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Fault = Literal["empty", "another language", "a loop"]

SURE = 0.9  # probability from which a question's language counts as told
UNLIKELY = 0.001  # probability of that language below which an answer is in another
# what is hardly told apart in writing, by the language that stands for it
ALIKE = {"wuu": "zh", "yue": "zh", "nn": "no", "ms": "id", "bs": "hr", "sr": "hr"}
FEWEST_WORDS = 5  # of fewer, a language is not told
LOOPED = 0.5  # share of word 4-grams that occurred before
FEWEST_DISTINCT = 0.25  # of the words, in a text of FEWEST_WORDS or more


def faults_of(questions: Sequence[str], answers: Sequence[str]) -> list[Fault | None]:
    """What keeps each answer from being one; None where it can be read.

    The language that is expected is the question's, or that of all questions together where a question is too short to tell.
    """
    together = language_of(" ".join(dict.fromkeys(questions)))
    return [_fault(answer, language_of(asked) or together) for asked, answer in zip(questions, answers, strict=True)]


def _fault(answer: str, expected: str | None) -> Fault | None:
    words = answer.split()
    if not any(character.isalnum() for character in answer):
        return "empty"
    if len(words) >= FEWEST_WORDS and (
        len({word.lower() for word in words}) / len(words) < FEWEST_DISTINCT or repeated_share(answer) > LOOPED
    ):
        return "a loop"
    given = _languages(answer)
    return "another language" if expected and given and given.get(expected, 0.0) < UNLIKELY else None


def repeated_share(text: str, size: int = 4) -> float:
    """Share of word ``size``-grams that occurred before in the text: 0 for fresh text, towards 1 for loops; NaN if too short."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def language_of(text: str) -> str | None:
    """Code of a text's language, as langid calls it; None for a short text, or where it can't be told for sure.

    Of languages that are hardly told apart in writing, one stands for all (:data:`ALIKE`).
    """
    found = _languages(text)
    code = max(found, key=found.__getitem__, default=None)
    return code if code is not None and found[code] >= SURE else None


def _languages(text: str) -> dict[str, float]:
    """Language -> its probability; nothing for a short text."""
    if len(text.split()) < FEWEST_WORDS and len(text) < 4 * FEWEST_WORDS:
        return {}
    found: dict[str, float] = {}
    for code, probability in _identifier().rank(text):
        name = ALIKE.get(str(code), str(code))
        found[name] = found.get(name, 0.0) + float(probability)
    return found


@functools.cache
def _identifier() -> Any:
    from py3langid import langid

    model = Path(str(langid.__file__)).parent / langid.MODEL_FILE
    return langid.LanguageIdentifier.from_modelpath(str(model), norm_probs=True)
