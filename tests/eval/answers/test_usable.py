"""Answers that are none: empty ones, loops and other languages, and the texts beside them that are answers."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest

from trimtab.eval.answers.usable import faults_of, language_of, repeated_share
from trimtab.recipes import data

ENGLISH = "How do I water a cactus, and how often should that be done?"
GERMAN = "Was hilft am besten gegen Lampenfieber vor einem Auftritt?"
IN_ENGLISH = "Water it only when the soil has dried out completely, about every two or three weeks."
IN_GERMAN = "Atme vor dem Auftritt langsam aus und denke daran, dass ein wenig Aufregung ganz normal ist."


def fault(answer: str, question: str = ENGLISH) -> str | None:
    return faults_of([question], [answer])[0]


@pytest.mark.parametrize("answer", ["", " \n\t", "...", "?!", "-- * --", "\u2026"])
def test_what_has_no_letter_and_no_digit_is_empty(answer: str) -> None:
    assert fault(answer) == "empty"


@pytest.mark.parametrize("answer", ["7", "No.", "Ja.", "Mustard yellow.", "é", "\u042f"])
def test_a_short_answer_is_one(answer: str) -> None:
    assert fault(answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "needle " * 12,
        "I am here. " * 8,
        "The Sea the sea THE SEA the sea the sea",
        "I love the sea and the sea loves me. " * 3,
        "First of all, one should look at the soil. " + "It is dry and it is dry and " * 6,
    ],
)
def test_a_loop(answer: str) -> None:
    assert fault(answer) == "a loop"


@pytest.mark.parametrize(
    "answer",
    [
        "no no no no",  # of four words nothing is told
        "Step by step: water it, wait, water it, wait, and then look at how dry the soil has become.",
        "Is it dry? If it is dry, water it. If it is not dry, wait for a week and look at it again.",
        IN_ENGLISH,
    ],
)
def test_repeating_a_little_is_no_loop(answer: str) -> None:
    assert fault(answer) is None


def test_the_share_of_word_4_grams_that_came_before() -> None:
    assert repeated_share("a b c d e f") == 0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated_share("a a a a a a") == pytest.approx(2 / 3)
    assert repeated_share("a b a b a b", size=2) == pytest.approx(3 / 5)
    assert math.isnan(repeated_share("a b c"))


def test_the_language_of_the_question_is_expected() -> None:
    assert fault(IN_GERMAN, ENGLISH) == "another language" and fault(IN_ENGLISH, ENGLISH) is None
    assert fault(IN_ENGLISH, GERMAN) == "another language" and fault(IN_GERMAN, GERMAN) is None


def test_questions_that_are_too_short_have_the_language_of_all_of_them() -> None:
    german = [GERMAN, "Wie geht es dir heute, und was hast du am Wochenende gemacht?", "Wer bist du?"]
    assert language_of(german[2]) is None
    assert faults_of(german, [IN_GERMAN] * 3) == [None] * 3
    assert faults_of(german, [IN_ENGLISH] * 3) == ["another language"] * 3
    mixed = [GERMAN, ENGLISH]
    assert faults_of(mixed, [IN_GERMAN, IN_ENGLISH]) == [None, None], "each by its own, where that can be told"
    assert faults_of(["x"], [IN_GERMAN]) == [None], "of nothing to tell by, nothing is told"
    assert faults_of([], []) == []


def test_languages() -> None:
    assert (language_of(IN_ENGLISH), language_of(IN_GERMAN)) == ("en", "de")
    assert (
        language_of(
            "Riega el cactus solo cuando la tierra esté completamente seca, más o menos cada dos o tres semanas."
        )
        == "es"
    )
    assert language_of("") is None and language_of("Hi there") is None


CHINESE = "仙人掌在土壤完全干燥以后才需要浇水，大约每两到三个星期一次。"
SPANISH = "Riega el cactus solo cuando la tierra esté completamente seca."


def test_an_answer_need_not_be_told_for_sure_to_be_in_another_language() -> None:
    """Chinese has relatives in writing, and a short Spanish sentence could be Galician: neither could be English."""
    assert language_of(CHINESE) == "zh" and language_of(SPANISH) is None
    assert fault(CHINESE) == fault(SPANISH) == "another language"
    assert fault(IN_ENGLISH, CHINESE) == "another language" and fault(CHINESE, CHINESE) is None
    # a name or a line of code leaves it open, and is no other language
    assert fault("The capital of Mongolia is Ulaanbaatar.") is None
    assert fault('```go\npackage main\n\nimport (\n\t"fmt"\n\t"math"\n)\n```') is None


def test_the_gallery_of_dev() -> None:
    """Word salad and invented words pass: they are told by the reader and by relevance, not here."""
    gallery = data.reader_gallery("dev")
    by_kind: dict[str, list[str | None]] = defaultdict(list)
    faults = faults_of([text.question for text in gallery], [text.answer for text in gallery])
    for text, found in zip(gallery, faults, strict=True):
        by_kind[text.kind].append(found)
    assert by_kind["emptyish"] == ["empty"]
    assert by_kind["other_language"] == ["another language"] * 3
    assert sorted(map(str, by_kind["noise"])) == ["None", "a loop", "a loop"]
    assert sorted(map(str, by_kind["echo"])) == ["None", "a loop"]
    answered = [found for text, found in zip(gallery, faults, strict=True) if text.speaker != "neither"]
    assert answered == [None] * 90, "whoever speaks, in whatever voice"


def test_of_the_texts_that_readers_are_fitted_on_all_are_answers() -> None:
    texts = data.reader_texts()
    found = faults_of([text.question for text in texts], [text.answer for text in texts])
    assert not [text.id for text, fault in zip(texts, found, strict=True) if fault is not None]
