"""What an answer says beyond its question."""

from __future__ import annotations

import pytest

from trimtab.axis.substance import new_words, runs_beside

ASKED = "How can I keep bread fresh for longer?"


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("", 0),
        (ASKED, 0),
        ("I'm sorry, but I can't help you keep bread fresh.", 2),  # sorry, help
        (
            "When it comes to keeping bread fresh for longer, there are a lot of things to consider.",
            4,
        ),  # comes, keepi-, lot, consider
        ("Wrap the loaf in linen, store it in a wooden box and never in the fridge, where starch hardens.", 10),
        ("Kept cool, kept cool, kept cool.", 2),  # kept is another stem than keep
        ("把面包放进布袋", 7),  # characters, where a script has no spaces
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
