"""Log-probabilities of answers against one plain forward a row, and the persona log-likelihood ratio's formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import Loaded
from trimtab.axis.scoring import answer_logprobs, persona_llr

PROMPTS = [
    chat("You are a pirate who speaks of the sea.", "How do I bake bread at home?"),
    chat("", "Why is the sky blue?"),
    chat("You are a ghost.", "Tell me about the ships."),
    chat("", "x"),
]
ANSWERS = ["Arr, the oven be small.", "", "The grass is green and the sky is blue, my child, é.", "B"]


def by_hand(model: Any, form: ChatFormat, prompt: Any, answer: str) -> float:
    """Sum of log p over the answer's tokens, one at a time, each from its own forward over all that came before."""
    ids, total = form.prompt_ids(prompt), 0.0
    for token in form.answer_ids(answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answer_logprobs_are_those_of_plain_forwards(loaded: Loaded, form: ChatFormat, batch_size: int) -> None:
    expected = [by_hand(loaded.model, form, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    found = answer_logprobs(loaded.model, form, PROMPTS, ANSWERS, batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[1] == 0.0 and all(value < -1 for value in found[:1] + found[2:])


def test_persona_llr_is_the_ratio_a_token(loaded: Loaded, form: ChatFormat) -> None:
    plain = [[prompt[-1]] for prompt in PROMPTS]
    found = persona_llr(loaded.model, form, PROMPTS, plain, ANSWERS, batch_size=3)
    for i in (0, 2):
        count = len(form.answer_ids(ANSWERS[i]))
        difference = by_hand(loaded.model, form, PROMPTS[i], ANSWERS[i]) - by_hand(
            loaded.model, form, plain[i], ANSWERS[i]
        )
        assert found[i] == pytest.approx(difference / count, abs=1e-4)
        assert abs(found[i]) > 1e-3
    assert math.isnan(found[1])  # an empty answer
    assert found[3] == pytest.approx(0.0, abs=1e-6)  # no role at all


def test_nothing_but_empty_answers(loaded: Loaded, form: ChatFormat) -> None:
    assert answer_logprobs(loaded.model, form, PROMPTS[:2], ["", ""]) == [0.0, 0.0]
    assert all(math.isnan(v) for v in persona_llr(loaded.model, form, PROMPTS[:2], PROMPTS[:2], ["", ""]))
