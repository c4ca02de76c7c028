"""The shipped data: how much there is, and that nothing of it is in both splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl
from trimtab.recipes import data
from trimtab.recipes.data import Split

SPLITS: tuple[Split, Split] = ("train", "held_out")


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
    for row in rows("questions"):
        yield row["split"], row["id"], row["question"]
    for row in rows("benign"):
        yield row["split"], row["id"], row["prompt"]


def test_there_is_as_much_as_promised() -> None:
    roles = rows("roles")
    assert len(roles) == len({row["role"] for row in roles}) == 275
    assert all(len(set(row["prompts"])) == 5 and all(prompt.strip() for prompt in row["prompts"]) for row in roles)
    questions = [row["question"] for row in rows("questions")]
    assert len(questions) == len(set(questions)) == 240
    assert len(set(data.default_prompts())) == 5 and data.default_prompts()[0] == ""
    talks = rows("drift_conversations")
    assert len(talks) >= 40 and len({talk["domain"] for talk in talks}) == 4
    assert all(len(talk["turns"]) == 8 and all(turn.strip() for turn in talk["turns"]) for talk in talks)


def test_drift_prompts_are_of_known_roles_and_their_split() -> None:
    roles = {row["role"]: row for row in rows("roles")}
    prompts = rows("drift_prompts")
    assert len(prompts) == len({row["id"] for row in prompts}) == len({row["user"] for row in prompts}) == 300
    for row in prompts:
        assert row["split"] == roles[row["role"]]["split"], row["id"]
        assert 0 <= row["prompt_index"] < 5
    loaded = data.drift_prompts("train") + data.drift_prompts("held_out")
    assert len(loaded) == 300 and all(prompt.system in roles[prompt.role]["prompts"] for prompt in loaded)


@pytest.mark.parametrize("name", ["roles", "questions", "drift_prompts", "drift_conversations", "benign"])
def test_both_splits_are_filled_and_nothing_is_in_both(name: str) -> None:
    found = rows(name)
    key = "role" if name == "roles" else "id"
    assert max(Counter(row[key] for row in found).values()) == 1
    assert {row["split"] for row in found} == set(SPLITS)


def test_no_sentence_is_in_both_splits() -> None:
    where: dict[str, dict[str, set[str]]] = {split: {} for split in SPLITS}
    for split, place, text in all_texts():
        for sentence in sentences(text):
            where[split].setdefault(sentence, set()).add(place)
    both = {s: (where["train"][s], where["held_out"][s]) for s in where["train"].keys() & where["held_out"].keys()}
    assert not both, f"{len(both)} sentences in both splits: {both}"
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
