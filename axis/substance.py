"""Substance: what an answer says beyond its question.

A refusal that names its subject, vague words around it, or an answer that breaks off carry next to no word that the question has
not. They can be told apart from an answer without asking what is true or wanted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

WORD = re.compile(r"(?=[^\W_])[\u2e81-\U0010ffff]|[^\W_\u2e81-\U0010ffff]+")
STEM = 5  # letters by which forms of a word are taken for one
OF_ENGLISH = """
a about above after again all also am an and another any are as at be because been before being below between
both but by can cannot could did do does doing done down each either else even ever every few for from further
get gets getting give go going had has have having he her here hers him his how i if in into is it its itself
just know let like made make many may me might more most much must my myself no nor not of off oh ok okay on
once one only or other our ours out over own please really s say see shall she should so some such t take than
that the their them then there these they thing things this those through to too under until up upon us use very
was way we well were what when where whether which while who whom whose why will with within without would yes
yet you your yours yourself d ll m re ve don isn aren doesn didn won
"""
FUNCTION_WORDS = frozenset(OF_ENGLISH.split())  # they say nothing by themselves


def words_of(text: str) -> list[str]:
    """Words in lower case, without marks; a script without spaces gives its characters."""
    return WORD.findall(text.lower())


def new_words(question: str, answer: str) -> int:
    """Distinct words of an answer that mean something and do not stand in its question, forms of one word taken together."""
    return len(stems_of(answer) - stems_of(question))


def stems_of(text: str) -> set[str]:
    """First letters of the words of a text that mean something."""
    return {word[:STEM] for word in words_of(text) if word not in FUNCTION_WORDS}


def runs_beside(question: str, answer: str) -> list[list[str]]:
    """The answer's words in runs between those of its question: what is left of a phrase that a subject was put into."""
    return _split(words_of(answer), _named(question))


def without_question(question: str, answer: str) -> str:
    """The answer without its question's words that mean something, else as it stands: empty only where no new word is in it."""
    named = _named(question)
    left = WORD.sub(lambda word: "" if word[0].lower()[:STEM] in named else word[0], answer)
    return " ".join(left.split())


def _named(question: str) -> set[str]:
    return {word[:STEM] for word in words_of(question)} - {word[:STEM] for word in FUNCTION_WORDS}


def _split(words: Sequence[str], at: Collection[str]) -> list[list[str]]:
    runs: list[list[str]] = [[]]
    for word in words:
        if word[:STEM] in at:
            runs.append([])
        else:
            runs[-1].append(word)
    return [run for run in runs if run]
