"""An evaluation whose answers, and what is read in them, are given: for the arithmetic of measures, without any model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trimtab.eval.answers.arms import Answers, Item
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.schema import Estimate
from trimtab.recipes.data import Conversation
from trimtab.recipes.schema import EvalSection

ARMS = ("base", "base+cap", "tuned")
PLAIN = "Here is a plain answer of some words."


class KnownReader:
    """A reader that has been told what it will read: text -> log-odds; 0 for any other text, NaN for one of no words."""

    def __init__(self, scores: Mapping[str, float], name: str = "the base", auc: float = 0.95) -> None:
        self.name = name
        self.quality = {"AUC on the gallery": Estimate(value=auc, low=auc - 0.1, high=auc + 0.04, n=90)}
        self.facts: dict[str, Any] = {"name": name}
        self._scores = dict(scores)

    def read(self, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
        assert len(questions) == len(answers)
        return [self._scores.get(text, 0.0) if text.strip() else math.nan for text in answers]


def given(items: Sequence[Item], texts: Sequence[str]) -> Answers:
    """Answers to items, their means all 0."""
    assert len(items) == len(texts)
    return Answers(list(texts), torch.zeros(len(items), 1, 1), [item.prompt for item in items], [True for _ in items])


def evaluation(
    said: Mapping[str, Mapping[str, Sequence[str]]],
    scores: Mapping[str, float] | None = None,
    *,
    relevance: Mapping[str, float] | None = None,
    talks: Sequence[Conversation] = (),
    on_talks: Mapping[str, Sequence[Answers]] | None = None,
    reader: KnownReader | None = None,
    second: KnownReader | None = None,
    **section: Any,
) -> Evaluation:
    """An evaluation with given answers.

    Args:
        said: ``roles``, ``default``, ``benign`` -> arm -> texts, as many as are asked; what is left out is :data:`PLAIN`.
        scores: text -> the reader's log-odds.
        relevance: text -> its relevance; 1 for any other text.
        talks: conversations.
        on_talks: arm -> turn by turn, the answers in them.
        reader: another than one that knows ``scores``.
        second: second reader.
        section: of the recipe.
    """
    size = {"roles": 6, "questions": 2, "benign": 4, "benign_systems": 0, "lookalikes": 0, "transcripts": 0}
    whole = EvalSection.model_validate({**size, "bootstrap": 200, **section})
    arms = list(said.get("roles", dict.fromkeys(ARMS)))
    run: Any = SimpleNamespace(recipe=SimpleNamespace(eval=whole))
    made = Evaluation(run, SimpleNamespace(names=arms, floor=None, folder=Path()), {})  # type: ignore[arg-type]
    sets = {"roles": made.roles, "default": made.defaults, "benign": made.benign}
    for name, items in sets.items():
        texts = said.get(name, {})
        found = {arm: given(items, texts.get(arm, [PLAIN] * len(items))) for arm in arms}
        vars(made)[f"on_{name}"] = found
    known = {} if relevance is None else relevance
    vars(made).update(
        on_roles_after={}, talks=list(talks), on_talks=dict(on_talks or {}),
        reader=reader or KnownReader(scores or {}), second_reader=second,
        rulers={"training": SimpleNamespace(z=lambda means: [0.0] * len(means))},
        relevance=lambda answers: {
            arm: [known.get(text, 1.0) if text.strip() else math.nan for text in found.texts]
            for arm, found in answers.items()
        },
    )  # fmt: skip
    return made
