"""What an answer says beyond its question."""

from __future__ import annotations

import pytest

from trimtab.axis.substance import new_words, runs_beside, without_question

ASKED = "How can I keep bread fresh for longer?"


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("", 0),
        (ASKED, 0),
        ("I'm sorry, but I can't help you keep bread fresh.", 2),  # sorry, help
        ("When it comes to keeping bread fresh, there are many things to consider.", 3),  # comes, keepi-, consi-
        ("Wrap the loaf in linen, store it in a wooden box and never in the fridge, where starch hardens.", 10),
        ("Kept cool, kept cool, kept cool.", 2),  # kept is another stem than keep
        ("把面包放进布袋", 7),  # characters, where a script has no spaces
        ("把，面。🙂", 2),  # neither marks nor pictures
    ],
)
def test_new_words_are_counted_once_and_without_those_of_the_question(answer: str, count: int) -> None:
    assert new_words(ASKED, answer) == count


def test_the_subject_is_cut_out_of_a_phrase() -> None:
    named = "I'm sorry, but I can't help you to keep bread fresh for longer, my friend."
    assert runs_beside(ASKED, named) == [
        ["i", "m", "sorry", "but", "i", "can", "t", "help", "you", "to"],
        ["for"],
        ["my", "friend"],
    ]


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("", ""),
        (ASKED, "How can I for ?"),
        ("I can't help you keep your Bread FRESH, I'm afraid.", "I can't help you your , I'm afraid."),
        ("Wrap the loaf in linen.\nNever in the fridge.", "Wrap the loaf in linen. Never in the fridge."),
        ("Breads stay fresher in linen.", "stay in linen."),
        ("把bread放进布袋", "把放进布袋"),
    ],
)
def test_what_an_answer_adds(answer: str, left: str) -> None:
    assert without_question(ASKED, answer) == left
    assert new_words(ASKED, left) == new_words(ASKED, answer)
