"""Relevance: an answer held against its own question and others, by hand from its log-probabilities."""

from __future__ import annotations

import math

import pytest

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import Loaded
from trimtab.axis.scoring import answer_logprobs, relevance

QUESTIONS = ["How do I bake bread at home?", "Why is the sky blue?", "Tell me about the ships.", "Who are you?"]
ANSWERS = ["Arr, the oven be small.", "", "The sky is blue, my child, é.", "B"]
OTHERS = [QUESTIONS[1:], QUESTIONS[2:], [QUESTIONS[0]], [QUESTIONS[0], QUESTIONS[1], QUESTIONS[2]]]


def logprob(loaded: Loaded, form: ChatFormat, question: str, answer: str) -> float:
    return answer_logprobs(loaded.model, form, [chat("", question)], [answer])[0]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_an_answer_is_held_against_the_likeliest_of_the_others(
    loaded: Loaded, form: ChatFormat, batch_size: int
) -> None:
    found = relevance(loaded.model, form, QUESTIONS, ANSWERS, OTHERS, batch_size=batch_size)
    for k in (0, 2, 3):
        own = logprob(loaded, form, QUESTIONS[k], ANSWERS[k])
        rest = max(logprob(loaded, form, other, ANSWERS[k]) for other in OTHERS[k])
        assert found[k] == pytest.approx((own - rest) / len(form.answer_ids(ANSWERS[k])), abs=1e-4)
        assert abs(found[k]) > 1e-4
    assert math.isnan(found[1]), "an empty answer has none"


def test_against_its_own_question_an_answer_has_no_relevance(loaded: Loaded, form: ChatFormat) -> None:
    found = relevance(loaded.model, form, QUESTIONS[:1], ANSWERS[:1], [QUESTIONS[:1]])
    assert found == [pytest.approx(0.0, abs=1e-6)]


def test_of_two_questions_one_answer_is_as_much_on_the_one_as_off_the_other(loaded: Loaded, form: ChatFormat) -> None:
    one, other = relevance(loaded.model, form, QUESTIONS[:2], ["B", "B"], [[QUESTIONS[1]], [QUESTIONS[0]]])
    assert one == pytest.approx(-other, abs=1e-5) and one != 0


def test_as_many_lists_of_others_as_answers(loaded: Loaded, form: ChatFormat) -> None:
    with pytest.raises(ValueError, match="shorter"):
        relevance(loaded.model, form, QUESTIONS[:2], ANSWERS[:2], OTHERS[:1])
