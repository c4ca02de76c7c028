"""An evaluation asks what is of its split, and nothing of another."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.cli.calls import _arm_calls
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.measures import all_measures
from trimtab.recipes import data
from trimtab.recipes.data import Split
from trimtab.recipes.schema import EvalSection

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def section_of(split: Split) -> EvalSection:
    """All that has a split, and some of it."""
    given = {
        "roles": 20,
        "questions": 3,
        "conversations": 6,
        "benign": 30,
        "susceptibility_roles": 5,
        "simulated_users": 8,
    }
    return EvalSection.model_validate({"split": split, "user": {"model": "m"}, **given})


def evaluation_of(section: EvalSection) -> Evaluation:
    run: Any = SimpleNamespace(recipe=SimpleNamespace(eval=section))
    arms: Any = SimpleNamespace(floor=None, names=["base", "tuned"], folder=None)
    return Evaluation(run, arms, {})


def texts_of(split: Split) -> dict[str, set[str]]:
    """What a split has to ask, by kind."""
    return {
        "system prompts": {prompt for role in data.roles(split) for prompt in role.prompts},
        "questions": set(data.questions(split)),
        "benign": set(data.benign_prompts(split)),
        "turns": {turn for talk in data.conversations(split) for turn in talk.turns},
        "identity": set(data.identity_questions(split)),
        "benign systems": {text for row in data.benign_systems(split) for text in (row.system, row.user)},
    }


def asked_by(section: EvalSection) -> Iterator[str]:
    """Every system prompt and user turn that the arms get, but for simulated users'."""
    made = evaluation_of(section)
    for item in (*made.roles, *made.defaults, *made.benign):
        yield from (message["content"] for message in item.prompt)
    for talk in made.talks:
        yield from talk.turns
    for asked in (asked for measure in all_measures() for asked in measure.asks(section)):
        yield from (message["content"] for before in asked.before for message in before)
        yield from (turn for turns in asked.turns for turn in turns)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_all_that_is_asked_is_of_the_split(split: Split) -> None:
    asked = set(asked_by(section_of(split)))
    assert all(found & asked for found in texts_of(split).values())
    for other in set(SPLITS) - {split}:
        both = {kind: found & asked for kind, found in texts_of(other).items() if found & asked}
        assert not both, f"of {other}: {both}"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_simulated_users_are_of_the_split(split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    simulated = importlib.import_module("trimtab.eval.measures.simulated")
    monkeypatch.setattr(simulated, "user_model", lambda *_: None)
    monkeypatch.setattr(simulated, "simulated_conversations", lambda *_: [])
    made = evaluation_of(section_of(split))
    made.arms.folder = tmp_path
    users, played = simulated.played_in(made)
    assert users == data.simulated_users(split, 8) and set(played) == {"base", "tuned"}
    assert not {user.topic for user in users} & {u.topic for s in SPLITS if s != split for u in data.simulated_users(s)}


def test_the_plan_of_a_recipe_counts_the_prompts_of_its_split() -> None:
    """Dev and test have as many prompts, and other ones: the calls are as many, their lengths are not the same."""
    plans = [list(_arm_calls(section_of(split))) for split in ("dev", "test")]
    assert sum(call.rows for call in plans[0]) == sum(call.rows for call in plans[1])
    assert [call.prompt for call in plans[0]] != [call.prompt for call in plans[1]]
