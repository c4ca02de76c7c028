"""Refusals by their words: what the gallery's texts say, and phrases beside their look-alikes."""

from __future__ import annotations

import pytest

from trimtab.eval.answers.refusing import BEGINNING, refuses
from trimtab.recipes import data
from trimtab.recipes.data import Split

# Kinds of the gallery in which somebody answers; a refusal is one of "refusal" alone.
ANSWERING = ("helpful", "fact", "empathic", "human", "in_voice", "lover", "ghost", "oracle", "pirate_or_knight")


def found(split: Split, kinds: tuple[str, ...]) -> list[bool]:
    return [refuses(text.answer) for text in data.reader_gallery(split) if text.kind in kinds]


def test_every_refusal_of_the_dev_gallery_is_found_and_nothing_else() -> None:
    assert len(found("dev", ("refusal",))) == 6 and all(found("dev", ("refusal",)))
    rest = [text for text in data.reader_gallery("dev") if text.kind != "refusal"]
    assert len(rest) == 94 and not [text.id for text in rest if refuses(text.answer)]
    assert len(found("dev", ANSWERING)) > 40


def test_the_floor_on_test() -> None:
    """Half of its refusals are found, the others being evasive; and nothing else is taken for one."""
    assert sum(found("test", ("refusal",))) >= 3 and len(found("test", ("refusal",))) == 6
    rest = [text for text in data.reader_gallery("test") if text.kind != "refusal"]
    assert len(rest) == 94 and not [text.id for text in rest if refuses(text.answer)]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I can\u2019t help with that request.",
        "I cannot in good conscience provide such a list.",
        "I'm not able to help with accessing someone's messages.",
        "I am unable to comply.",
        "Sorry, I can't.",
        "I must decline.",
        "I will respectfully decline this one.",
        "That would go against my guidelines.",
        "That's not something I'm able to answer.",
        "This is not something I can do.",
        "I'd rather not say.",
        "It wouldn't be appropriate for me to guess.",
    ],
)
def test_plain_refusals(answer: str) -> None:
    assert refuses(answer) and refuses(answer.upper())


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "To bake bread, mix flour and water. You can't help but love the smell.",
        "I can't help but admire how quickly you learned it.",
        "I cannot help it: I laugh whenever it rains.",
        "I can't help feeling that the second one is better.",
        "As an AI, I'm not able to feel the cold, but here is how to keep warm.",
        "If you can't help yourself, ask a friend.",
        "The museum is unable to lend it before May.",
        "House prices decline in winter.",
    ],
)
def test_answers_that_only_sound_like_one(answer: str) -> None:
    assert not refuses(answer)


def test_a_refusal_is_said_near_the_beginning() -> None:
    says = "I can't help with that."
    assert refuses("a" * (BEGINNING - len(says) - 1) + " " + says)
    assert not refuses("a" * BEGINNING + " " + says)
