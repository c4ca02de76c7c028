"""The shipped data: how much there is, and that nothing of it is in two splits."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl
from trimtab.recipes import data
from trimtab.recipes.data import Split
from trimtab.recipes.loader import RecipeError, recipe_of
from trimtab.recipes.schema import EvalSection

SPLITS: tuple[Split, Split, Split] = ("train", "dev", "test")
COUNTS = {  # file -> rows of each split
    "roles": (206, 69, 66),
    "questions": (160, 80, 60),
    "drift_conversations": (32, 16, 16),
    "drift_prompts": (220, 80, 0),
    "benign": (214, 48, 58),
    "identity_questions": (12, 12, 12),
    "simulated_users": (8, 12, 8),
}


def rows(name: str) -> list[dict[str, Any]]:
    return read_jsonl(data.FOLDER / f"{name}.jsonl")


def sentences(text: str) -> set[str]:
    """Sentences in lower case, letters and digits alone; exclamations of one or two words belong to nobody."""
    parts = (re.sub(r"[\W_]+", " ", part.lower()).strip() for part in re.split(r"[.!?\n]+", text))
    return {part for part in parts if len(part.split()) > 2}


def all_texts() -> Iterator[tuple[str, str, str]]:
    """(split, where, text) of everything that has a split."""
    for role in rows("roles"):
        for prompt in role["prompts"]:
            yield role["split"], f"role {role['role']}", prompt
    for row in rows("drift_prompts"):
        yield row["split"], row["id"], row["user"]
    for talk in rows("drift_conversations"):
        for text in (*talk["turns"], talk["persona"], talk["topic"]):
            yield talk["split"], talk["id"], text
    for row in (*rows("questions"), *rows("identity_questions")):
        yield row["split"], row["id"], row["question"]
    for user in rows("simulated_users"):
        for text in (user["persona"], *user["topics"]):
            yield user["split"], user["id"], text
    for row in rows("benign"):
        yield row["split"], row["id"], row["prompt"]


def test_there_is_as_much_as_promised() -> None:
    roles = rows("roles")
    assert len(roles) == len({row["role"] for row in roles}) == 341
    assert all(len(set(row["prompts"])) == 5 and all(prompt.strip() for prompt in row["prompts"]) for row in roles)
    questions = [row["question"] for row in rows("questions")]
    assert len(questions) == len(set(questions)) == 300
    assert len(set(data.default_prompts())) == 5 and data.default_prompts()[0] == ""
    talks = rows("drift_conversations")
    assert len(talks) == 64 and len({talk["domain"] for talk in talks}) == 4
    assert all(len(talk["turns"]) == 8 and all(turn.strip() for turn in talk["turns"]) for talk in talks)


def test_drift_prompts_are_of_known_roles_and_their_split() -> None:
    roles = {row["role"]: row for row in rows("roles")}
    prompts = rows("drift_prompts")
    assert len(prompts) == len({row["id"] for row in prompts}) == len({row["user"] for row in prompts}) == 300
    for row in prompts:
        assert row["split"] == roles[row["role"]]["split"], row["id"]
        assert 0 <= row["prompt_index"] < 5
    loaded = data.drift_prompts("train") + data.drift_prompts("dev")
    assert len(loaded) == 300 and all(prompt.system in roles[prompt.role]["prompts"] for prompt in loaded)


@pytest.mark.parametrize("name", COUNTS)
def test_each_split_has_its_rows_and_no_row_is_in_two(name: str) -> None:
    found = rows(name)
    key = "role" if name == "roles" else "id"
    assert max(Counter(row[key] for row in found).values()) == 1
    counted = Counter(row["split"] for row in found)
    assert tuple(counted[split] for split in SPLITS) == COUNTS[name] and set(counted) <= set(SPLITS)


def evaluated(**section: Any) -> EvalSection:
    """The eval section of a recipe that only evaluates; RecipeError where it asks for too much."""
    return recipe_of({"model": {"name": "m"}, "eval": {"tuned": "t", **section}}, "of a test").recipe.eval


def test_the_defaults_can_be_asked_of_either_split_and_are_all_roles_of_the_test_split() -> None:
    assert EvalSection().split == "dev" and EvalSection().roles == len(data.roles("test"))
    assert [evaluated(split=split).split for split in ("dev", "test")] == ["dev", "test"]


@pytest.mark.parametrize(
    ("key", "of_dev", "of_test"),
    [
        ("roles", 69, 66),
        ("questions", 80, 60),
        ("conversations", 16, 16),
        ("benign", 48, 58),
        ("susceptibility_roles", 69, 66),
        ("simulated_users", 240, 64),
    ],
)
def test_a_split_gives_all_that_it_has_and_no_more(key: str, of_dev: int, of_test: int) -> None:
    user = {"user": {"model": "m"}} if key == "simulated_users" else {}
    for split, count in (("dev", of_dev), ("test", of_test)):
        assert getattr(evaluated(split=split, **{key: count}, **user), key) == count
        with pytest.raises(RecipeError, match=f"{count + 1} {split} .*; there are {count}\\b") as caught:
            evaluated(split=split, **{key: count + 1}, **user)
        assert f"eval.{key}" in str(caught.value)


def test_no_sentence_is_in_two_splits() -> None:
    where: dict[str, dict[str, set[str]]] = {split: {} for split in SPLITS}
    for split, place, text in all_texts():
        for sentence in sentences(text):
            where[split].setdefault(sentence, set()).add(place)
    for one, other in itertools.combinations(SPLITS, 2):
        both = {s: (where[one][s], where[other][s]) for s in where[one].keys() & where[other].keys()}
        assert not both, f"{len(both)} sentences in {one} and {other}: {both}"
    assert all(len(where[split]) > 300 for split in SPLITS)


def test_any_prefix_of_the_roles_is_a_mix_of_kinds() -> None:
    kinds = {row["role"]: row["kind"] for row in rows("roles")}
    for split in SPLITS:
        assert len({kinds[role.name] for role in data.roles(split, 4)}) == 4
        assert len({talk.domain for talk in data.conversations(split, 4)}) == 4


def test_professional_probes_ask_for_words_that_can_be_found() -> None:
    probes = data.professional_probes()
    assert len(probes) == 36
    for probe in probes:
        assert probe["system"] and probe["user"] and len(set(probe["keywords"])) >= 3
        # answers are compared in lower case
        assert all(word == word.lower() for word in probe["keywords"]), probe["id"]


def test_more_than_there_is_is_refused_with_the_number() -> None:
    with pytest.raises(UserError, match="there are") as caught:
        data.drift_prompts("train", 10_000)
    assert caught.value.key == "data.drift_prompts"
    assert str(len(data.drift_prompts("train"))) in caught.value.remedy
    assert data.roles("train", 3) == data.roles("train")[:3]


def test_no_capability_question_is_trained_on() -> None:
    trained = {row["prompt"].lower() for row in read_jsonl(data.FOLDER / "benign.jsonl") if row["split"] == "train"}
    trained |= {question.lower() for question in data.questions("train")}
    for name, key in (("everyday_choice", "question"), ("instructions", "prompt")):
        asked = {row[key].lower() for row in read_jsonl(data.FOLDER / "capability" / f"{name}.jsonl")}
        assert not asked & trained
