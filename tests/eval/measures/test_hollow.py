"""Hollow answers: hardly a word of their own, or a phrase of all answers."""

from __future__ import annotations

import pytest
from hand_made import ARMS, evaluation, given

from trimtab.axis.chat_format import chat
from trimtab.eval.answers.arms import Item
from trimtab.eval.measures import substance
from trimtab.eval.measures.suite import Evidence, Suite
from trimtab.eval.report.assemble import effect_of
from trimtab.recipes.data import Conversation

WORDS = ["flour", "yeast", "kneading", "oven", "crust", "harbour", "anchor", "rope", "lantern", "tide"]
SAID = [" ".join(f"{word}{k}" for word in WORDS) for k in range(12)]  # ten words each, of which no other has one


def lights(roles: list[str]) -> tuple[str, dict[str, list[float]]]:
    made = evaluation({"roles": {"base": SAID, "base+cap": SAID, "tuned": roles}}, benign=6)
    suite = substance.measure(made)
    effects = [found for one in suite.side_effects if (found := effect_of(one, 200, 0)) is not None]
    (claim,) = [rule(Evidence([], effects)) for rule in substance.MEASURE.claims]
    return claim.light, {effect.id: list(effect.values) for effect in suite.side_effects}


def subject_of(item: Item) -> str:
    return " ".join(item.question.rstrip("?.").split()[1:])


@pytest.mark.parametrize(
    "phrase",
    [
        "I'm sorry, but I can't help you with {}.",
        "When it comes to {}, there are many things to consider.",
        "Thank you for your question. There are many things to consider, and it is good to think about them carefully.",
    ],
)
def test_a_phrase_is_hollow_whatever_subject_is_put_into_it(phrase: str) -> None:
    items = evaluation({}).roles
    light, values = lights([phrase.format(subject_of(item)) for item in items])
    assert light == "red" and sum(values["hollow_change"]) >= 11
    half, values = lights([phrase.format(subject_of(i)) if k % 2 else SAID[k] for k, i in enumerate(items)])
    assert half == "red" and values["hollow_change"] == [0.0, 1.0] * 6


def test_an_answer_that_breaks_off_is_hollow_and_other_words_are_not() -> None:
    light, values = lights([" ".join(text.split()[:3]) for text in SAID])
    assert light == "red" and values["hollow_change"] == [1.0] * 12
    light, values = lights([text.upper() for text in reversed(SAID)])
    assert light == "green" and values["hollow_change"] == [0.0] * 12
    assert values["hollow_change_cap"] == [0.0] * 12


def test_a_phrase_is_shared_with_another_subject_or_it_is_none() -> None:
    asked = ["Why is the sky blue?", "Why is the sky blue?", "How do I bake bread?"]
    same = "Light scatters off the air above"
    assert substance.stock_shares(asked, asked, [same, same, "Knead flour and water, then wait"]) == [0, 0, 0]
    assert substance.stock_shares(asked, asked, [same, "It does", same]) == [1.0, 0.0, 1.0]
    # three of the four phrases of three words stand elsewhere
    told = substance.stock_shares(asked, asked, [same, "", "Light scatters off the air today"])
    assert told == [0.75, 0.0, 0.75]


def test_a_conversation_may_come_back_to_its_own_words_and_not_to_another_s() -> None:
    talks = [Conversation(name, "therapy", "", "", ["Who are you?", "And now?"]) for name in "abcdef"]
    items = [Item(talk.id, talk.id, chat("", "Who are you?")) for talk in talks]

    def suite(turns: list[list[str]]) -> Suite:
        own = [given(items, SAID[:6])] * 2
        played = {arm: own if arm != "tuned" else [given(items, turn) for turn in turns] for arm in ARMS}
        return substance.measure(evaluation({}, talks=talks, on_talks=played))

    def values(found: Suite) -> list[float]:
        return next(list(effect.values) for effect in found.side_effects if effect.id == "hollow_conversations_change")

    assert values(suite([SAID[:6], SAID[:6]])) == [0.0] * 12
    advice = "It is important to consult a qualified professional, who can look at your situation today."
    assert values(suite([[advice] * 6] * 2)) == [1.0] * 12
