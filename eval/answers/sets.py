"""The sets of answers that are held to what any answer has to be: on the question, readable, of substance, and no refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trimtab.eval.answers.arms import Answers
from trimtab.eval.answers.evaluation import Evaluation

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
        key: such as those of :data:`SETS`.
        name: for people.
        answers: arm -> answers, [n].
        clusters: role, request or conversation of each, [n].
        subjects: what each is about: its question, or its conversation, whose answers may share words. [n]
        crossed: question of each, where several clusters share it; else None.
    """

    key: str
    name: str
    answers: Mapping[str, Answers]
    clusters: Sequence[str]
    subjects: Sequence[str]
    crossed: Sequence[str] | None = None


def figure_of(key: str, what: str, ending: str) -> str:
    """Name of a set's figure; that of role prompts is the plain one."""
    return f"{what}_{ending}" if key == "roles" else f"{what}_{key}_{ending}"


def figures_of(what: str, ending: str, keys: Iterable[str] = tuple(SETS)) -> tuple[str, ...]:
    """The same of every set."""
    return tuple(figure_of(key, what, ending) for key in keys)


def sets_of(evaluation: Evaluation) -> list[AnswerSet]:
    """The sets that an evaluation asks for."""
    asked = {
        "roles": (evaluation.roles, evaluation.on_roles),
        "default": (evaluation.defaults, evaluation.on_default),
        "benign": (evaluation.benign, evaluation.on_benign),
        "benign_systems": (evaluation.benign_systems[0], evaluation.on_benign_systems),
    }
    found = []
    for key, (items, answers) in asked.items():
        if items:
            clusters, questions = [item.cluster for item in items], [item.question for item in items]
            crossed = questions if key == "roles" else None
            found.append(AnswerSet(key, SETS[key], answers, clusters, questions, crossed))
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
    return AnswerSet("conversations", SETS["conversations"], answers, names, names)
