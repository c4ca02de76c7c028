"""The shipped data of readers, benign system prompts and kinds of roles: counts, labels, and what may not be in two places."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl
from trimtab.eval.answers.usable import language_of
from trimtab.eval.measures.instruction_rules import CHECKS, follows
from trimtab.recipes import data
from trimtab.recipes.data import Split

TRIED: tuple[Split, Split] = ("dev", "test")
KINDS_OF_ROLES = {"nonhuman", "human", "professional", "abstract"}


def plain(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_readers_are_fitted_on_602_texts_of_three_sources() -> None:
    texts = data.reader_texts()
    counts = Counter((text.source, text.speaker) for text in texts)
    assert counts == {
        ("written", "assistant"): 120,
        ("written", "persona"): 120,
        ("identity", "assistant"): 20,
        ("identity", "persona"): 83,
        ("sampled", "assistant"): 182,
        ("sampled", "persona"): 77,
    }
    assert len({text.id for text in texts}) == len(texts) == 602
    assert all(text.question.strip() and text.answer.strip() and text.kind for text in texts)
    assert len({text.question for text in texts}) > 100, "questions are the groups that folds are made of"


def test_each_written_question_has_both_speakers() -> None:
    """A reader that went by the question would be no better than chance on them."""
    speakers: dict[str, set[str]] = {}
    for text in data.reader_texts():
        if text.source == "written":
            speakers.setdefault(text.question, set()).add(text.speaker)
    both = [question for question, found in speakers.items() if len(found) == 2]
    assert len(both) > 0.9 * len(speakers)


def test_labels_of_sampled_texts_are_those_that_both_readers_gave() -> None:
    rows = read_jsonl(data.FOLDER / "reader_labels.jsonl")
    assert len(rows) == len({row["id"] for row in rows}) == 300
    assert {row["split"] for row in rows} == {"train"}
    assert {row["source"] for row in rows} == {"role", "capped", "default"}
    for row in rows:
        assert len(row["readers"]) == 2 and {*row["readers"], row["label"]} <= {"assistant", "persona", "unclear"}
        if row["label"] != "unclear":
            assert row["readers"] == [row["label"]] * 2, row["id"]
    train = {*data.questions("train"), *data.benign_prompts("train"), *(p.user for p in data.drift_prompts("train"))}
    assert {row["question"] for row in rows} <= train, "of train alone"


def test_the_gallery_has_the_same_kinds_in_both_splits() -> None:
    dev, test = (data.reader_gallery(split) for split in TRIED)
    for gallery in (dev, test):
        assert Counter(text.speaker for text in gallery) == {"assistant": 44, "persona": 46, "neither": 10}
        assert {text.source for text in gallery} == {"written"} and all(text.question for text in gallery)
    assert Counter(text.kind for text in dev) == Counter(text.kind for text in test)
    assert len({text.id for text in (*dev, *test)}) == len({text.answer for text in (*dev, *test)}) == 200
    speakers: dict[str, set[str]] = {}
    for text in (*dev, *test):
        speakers.setdefault(text.kind, set()).add(text.speaker)
    assert all(len(found) == 1 for found in speakers.values()) and len(speakers) == 22


def test_no_answer_is_fitted_on_and_tried_or_in_both_splits() -> None:
    """A few questions are in the fit as well, each of them with both speakers, so that the question gives nothing away."""
    sets = {"fit": data.reader_texts(), "dev": data.reader_gallery("dev"), "test": data.reader_gallery("test")}
    for one, other in itertools.combinations(sets, 2):
        both = ({plain(text.answer) for text in sets[one]} & {plain(text.answer) for text in sets[other]}) - {""}
        assert not both, f"answers of {one} and {other}: {both}"
    asked = {name: {plain(text.question) for text in texts} for name, texts in sets.items()}
    assert not asked["dev"] & asked["test"]
    shared = asked["fit"] & (asked["dev"] | asked["test"])
    assert len(shared) <= 8
    for question in shared:
        assert {text.speaker for text in sets["fit"] if plain(text.question) == question} == {"assistant", "persona"}


def test_sampled_texts_answer_nothing_that_an_evaluation_asks() -> None:
    sampled = {plain(text.question) for text in data.reader_texts() if text.source == "sampled"}
    for split in TRIED:
        turns = [turn for talk in data.conversations(split) for turn in talk.turns]
        asked = [*data.questions(split), *data.benign_prompts(split), *data.identity_questions(split), *turns]
        asked += [prompt.user for prompt in data.drift_prompts(split)]
        assert not sampled & {plain(question) for question in asked}


@pytest.mark.parametrize("split", TRIED)
def test_benign_systems_take_turns_and_every_rule_is_known(split: Split) -> None:
    rows = data.benign_systems(split)
    assert len(rows) == len({row.id for row in rows}) == len({row.system for row in rows}) == 48
    kinds = list(dict.fromkeys(row.kind for row in rows))
    assert len(kinds) == 6 and [row.kind for row in rows] == kinds * 8, "any prefix is a mix"
    assert data.benign_systems(split, 6) == rows[:6] and data.benign_systems(split, 0) == []
    with pytest.raises(UserError, match="there are 48") as caught:
        data.benign_systems(split, 49)
    assert caught.value.key == "eval.benign_systems"
    for row in rows:
        assert row.rules and {rule["kind"] for rule in row.rules} <= set(CHECKS), row.id
        assert row.system.strip() and row.user.strip() and row.keywords
        assert not follows("", row.rules), "an empty answer keeps none"


def test_rules_of_benign_systems_can_be_broken_and_do_not_contradict_each_other() -> None:
    never = "\u00b6 " * 400
    for row in itertools.chain.from_iterable(data.benign_systems(split) for split in TRIED):
        rules = {rule["kind"]: rule for rule in row.rules}
        assert len(rules) == len(row.rules), f"{row.id}: a kind twice"
        assert not {"lowercase", "uppercase"} <= set(rules) and not {"bullets", "numbered"} <= set(rules), row.id
        if {"min_words", "max_words"} <= set(rules):
            assert rules["min_words"]["n"] <= rules["max_words"]["n"], row.id
        excluded = {word.lower() for word in rules.get("excludes", {}).get("words", [])}
        assert not excluded & {word.lower() for word in rules.get("includes", {}).get("words", [])}, row.id
        banal = {"excludes", "max_words", "one_line", "no_digits"}  # kept by many texts that follow nothing
        assert set(rules) <= banal or not follows(never, row.rules), row.id


def test_benign_systems_share_nothing_between_splits_and_with_roles() -> None:
    dev, test = (data.benign_systems(split) for split in TRIED)
    for part in ("system", "user"):
        assert not {plain(getattr(row, part)) for row in dev} & {plain(getattr(row, part)) for row in test}
    personas = {plain(p) for split in ("train", *TRIED) for role in data.roles(split) for p in role.prompts}
    assert not personas & {plain(row.system) for row in (*dev, *test)}


def test_every_role_has_a_kind() -> None:
    kinds = data.role_kinds()
    names = [role.name for split in ("train", *TRIED) for role in data.roles(split)]
    assert sorted(kinds) == sorted(names) and len(names) == 341
    assert set(kinds.values()) == KINDS_OF_ROLES
    for split in ("train", *TRIED):
        assert {kinds[role.name] for role in data.roles(split, 4)} == KINDS_OF_ROLES


def test_other_languages_of_the_gallery_are_ones_that_can_be_told() -> None:
    for split in TRIED:
        texts = [text.answer for text in data.reader_gallery(split) if text.kind == "other_language"]
        assert texts and all(language_of(text) not in (None, "en") for text in texts)
