"""The sets of answers that are held to what any answer has to be: on the question, readable, of substance, and no refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trimtab.eval.answers.arms import Answers
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.items import benign_system_items

# key -> name for people, in the order of the report
SETS = {
    "roles": "under role prompts",
    "default": "of the default Assistant",
    "benign": "to benign requests",
    "benign_systems": "under benign system prompts",
    "conversations": "in conversations",
}


@dataclass(frozen=True)
class AnswerSet:
    """Answers of all arms to the same items.

    Attributes:
        key: one of :data:`SETS`.
        answers: arm -> answers, [n].
        clusters: role, request or conversation of each, [n].
        subjects: what each is about: its question, or its conversation, whose answers may share words. [n]
        crossed: question of each, where several clusters share it; else None.
    """

    key: str
    answers: Mapping[str, Answers]
    clusters: Sequence[str]
    subjects: Sequence[str]
    crossed: Sequence[str] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return SETS[self.key]


def figure_of(key: str, what: str, ending: str) -> str:
    """Name of a set's figure; that of role prompts is the plain one."""
    return f"{what}_{ending}" if key == "roles" else f"{what}_{key}_{ending}"


def sets_of(evaluation: Evaluation) -> list[AnswerSet]:
    """The sets that an evaluation asks for."""
    defaults, benign = evaluation.defaults, evaluation.benign
    systems, _ = benign_system_items(evaluation.section)
    found = [
        AnswerSet("roles", evaluation.on_roles, evaluation.role_clusters, evaluation.role_questions, evaluation.role_questions),
        AnswerSet("default", evaluation.on_default, [i.cluster for i in defaults], [i.question for i in defaults]),
        AnswerSet("benign", evaluation.on_benign, [i.cluster for i in benign], [i.question for i in benign]),
    ]  # fmt: skip
    if systems:
        answers = evaluation.answers("benign_systems", systems)
        found.append(AnswerSet("benign_systems", answers, [i.cluster for i in systems], [i.question for i in systems]))
    if evaluation.on_talks:
        found.append(_conversations(evaluation))
    return found


def _conversations(evaluation: Evaluation) -> AnswerSet:
    """Every answer of the scripted conversations, turn by turn; a place where a conversation has ended is none."""
    played = evaluation.on_talks
    places = [
        (turn, k) for turn, answers in enumerate(played["base"]) for k, prompt in enumerate(answers.prompts) if prompt
    ]
    names = [evaluation.talks[k].id for _, k in places]
    answers = {
        arm: Answers(
            [turns[turn].texts[k] for turn, k in places],
            torch.stack([turns[turn].means[k] for turn, k in places]),
            [turns[turn].prompts[k] for turn, k in places],
            [turns[turn].ended[k] for turn, k in places],
        )
        for arm, turns in played.items()
    }
    return AnswerSet("conversations", answers, names, names)
