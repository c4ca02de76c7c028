"""Echo: an answer that repeats the question is found, one that answers it is not, and both reach the suite."""

from __future__ import annotations

import types
from typing import Any

import pytest

from trimtab.axis.chat_format import chat
from trimtab.axis.echo import echoes
from trimtab.eval.answers.arms import Item
from trimtab.eval.measures.echo import MEASURE

QUESTION = "Why do ships float, and stones sink?"


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("You ask: why do ships float and stones sink? A fine question.", True),
        ("WHY DO SHIPS FLOAT,\nAND STONES SINK", True),
        ("Ships float since they weigh less than the water in their place.", False),
        ("Why do ships float, and stones sinking?", False),
        ("", False),
    ],
)
def test_an_echo_is_the_question_itself(answer: str, repeats: bool) -> None:
    assert echoes(answer, QUESTION) == repeats
    assert not echoes(answer, "?")


def test_the_suite_has_tuned_minus_base_of_each_answer() -> None:
    items = [Item(f"i{k}", f"role{k}", chat("You are a ghost.", QUESTION)) for k in range(3)]
    said = {"base": [QUESTION, "x", "y"], "tuned": ["x", QUESTION, "y"]}
    evaluation: Any = types.SimpleNamespace(
        roles=items,
        role_clusters=[item.cluster for item in items],
        on_roles={arm: types.SimpleNamespace(texts=texts) for arm, texts in said.items()},
    )
    (effect,) = MEASURE.measure(evaluation).side_effects
    assert effect.values == [-1.0, 1.0, 0.0] and effect.clusters == ["role0", "role1", "role2"]
