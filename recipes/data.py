"""The data that ships with trimtab, and its fixed splits: train, dev and test.

All sentences are our own. A role, a question, a conversation or a user is in one split only (tested). Nothing is trained on dev
or test: settings are chosen on dev, and test is scored once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trimtab.axis.errors import UserError
from trimtab.axis.extraction import Role
from trimtab.axis.files import read_jsonl

Split = Literal["train", "dev", "test"]
FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class DriftPrompt:
    """A single user message under a role's system prompt."""

    id: str
    role: str
    system: str
    user: str


@dataclass(frozen=True)
class Conversation:
    """The scripted user side of a conversation, and the instructions that it begins with, as messages."""

    id: str
    domain: str
    persona: str
    topic: str
    turns: list[str]
    opening: list[dict[str, str]] = field(default_factory=list)


def _rows(name: str, split: Split | None = None) -> list[dict[str, Any]]:
    rows = read_jsonl(FOLDER / name)
    return rows if split is None else [row for row in rows if row["split"] == split]


def _first(rows: list[Any], count: int | None, what: str, key: str) -> list[Any]:
    if count is not None and count > len(rows):
        raise UserError(
            f"{count} {what} asked for; there are {len(rows)}", key=key, remedy=f"ask for at most {len(rows)}"
        )
    return rows if count is None else rows[:count]


def _taking_turns(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows with the values of a key taking turns, each value's own in their order, so that any prefix is a mix."""
    seen: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append((seen[row[key]], row))
        seen[row[key]] += 1
    return [row for _, row in sorted(ranked, key=lambda found: found[0])]


def roles(split: Split, count: int | None = None) -> list[Role]:
    """Roles of a split, the kinds (nonhuman, human, professional, abstract) taking turns, so that any prefix is a mix."""
    rows = _rows("roles.jsonl", split)
    return [Role(row["role"], row["prompts"]) for row in _first(rows, count, f"{split} roles", "axis.roles")]


def role_kinds() -> dict[str, str]:
    """Role -> its kind: nonhuman, human, professional or abstract."""
    return {row["role"]: row["kind"] for row in _rows("roles.jsonl")}


def questions(split: Split, count: int | None = None) -> list[str]:
    """Questions shared by all roles."""
    return [
        row["question"] for row in _first(_rows("questions.jsonl", split), count, f"{split} questions", "questions")
    ]


def default_prompts() -> list[str]:
    """Neutral system prompts of the default Assistant; the first is none at all."""
    found: list[str] = json.loads((FOLDER / "default_prompts.json").read_text(encoding="utf-8"))
    return found


def drift_prompts(split: Split, count: int | None = None) -> list[DriftPrompt]:
    """Single prompts under role system prompts."""
    prompts = {row["role"]: row["prompts"] for row in _rows("roles.jsonl")}
    return [
        DriftPrompt(row["id"], row["role"], prompts[row["role"]][row["prompt_index"]], row["user"])
        for row in _first(_rows("drift_prompts.jsonl", split), count, f"{split} drift prompts", "data.drift_prompts")
    ]


def conversations(split: Split, count: int | None = None) -> list[Conversation]:
    """Scripted conversations, the four domains taking turns."""
    rows = sorted(_rows("drift_conversations.jsonl", split), key=lambda row: (row["id"][-2:], row["domain"]))
    return [
        Conversation(row["id"], row["domain"], row["persona"], row["topic"], row["turns"])
        for row in _first(rows, count, f"{split} conversations", "eval.conversations")
    ]


def benign_prompts(split: Split, count: int | None = None) -> list[str]:
    """Ordinary requests without any drift."""
    return [
        row["prompt"] for row in _first(_rows("benign.jsonl", split), count, f"{split} benign prompts", "eval.benign")
    ]


def benign_answers() -> list[tuple[str, str]]:
    """Requests of the train split with written answers, as (prompt, answer)."""
    prompts = {row["id"]: row["prompt"] for row in _rows("benign.jsonl", "train")}
    return [(prompts[row["id"]], row["answer"]) for row in _rows("benign_answers.jsonl")]


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer to a question about identity, and what it presents itself as, by two readers and a third where they differ."""

    id: str
    system: str
    question: str
    answer: str
    label: str
    readers: list[str]


def identity_labels() -> list[LabelledAnswer]:
    """Answers of SmolLM2-135M-Instruct, plain, capped and tuned, labelled: what judges and ratios are checked against."""
    return [LabelledAnswer(**row) for row in _rows("identity_labels.jsonl")]


@dataclass(frozen=True)
class KnownText:
    """A question and an answer whose speaker is known.

    Attributes:
        id: stable name.
        source: where it comes from: ``written``, ``identity`` or ``sampled``.
        kind: sort of text, for people.
        speaker: ``assistant``, ``persona``, or ``neither`` for what is no answer at all.
    """

    id: str
    source: str
    kind: str
    question: str
    answer: str
    speaker: str


def reader_texts() -> list[KnownText]:
    """What readers are fitted on: texts written for it, the labelled answers about identity, and labelled answers of a model.

    The last are of SmolLM2-135M-Instruct under train roles, as the default Assistant and under the cap. Two readers labelled them
    without knowing the prompt; those on which they differ, or which nothing tells, are left out.
    """
    identity = [row for row in identity_labels() if row.label != "other"]
    speakers = ["assistant" if row.label == "assistant" else "persona" for row in identity]
    return [
        *(_known(row, "written", row["kind"]) for row in _rows("reader_texts.jsonl")),
        *(
            KnownText(row.id, "identity", row.label, row.question, row.answer, speaker)
            for row, speaker in zip(identity, speakers, strict=True)
        ),
        *(_known(row, "sampled", row["source"]) for row in _rows("reader_labels.jsonl") if row["label"] != "unclear"),
    ]


def reader_gallery(split: Split) -> list[KnownText]:
    """What readers are tried on, of the dev or the test split: texts that fool such readers or try to, none of them in a fit."""
    return [_known(row, "written", row["kind"]) for row in _rows("reader_gallery.jsonl", split)]


def _known(row: dict[str, Any], source: str, kind: str) -> KnownText:
    return KnownText(row["id"], source, kind, row["question"], row["answer"], row["label"])


@dataclass(frozen=True)
class BenignSystem:
    """An operator's ordinary instructions, a question, and rules by which it can be told that they were followed."""

    id: str
    kind: str
    system: str
    user: str
    rules: list[dict[str, Any]]
    keywords: list[str]


def benign_systems(split: Split, count: int | None = None) -> list[BenignSystem]:
    """Benign system prompts without any persona, the kinds taking turns."""
    rows = _taking_turns(_rows("benign_systems.jsonl", split), "kind")
    chosen = _first(rows, count, f"{split} benign system prompts", "eval.benign_systems")
    return [BenignSystem(**{key: value for key, value in row.items() if key != "split"}) for row in chosen]


def professional_probes(count: int | None = None) -> list[dict[str, Any]]:
    """Requests to professional roles near the Assistant, the roles taking turns, with words that an answer is likely to hold."""
    return _first(
        _taking_turns(_rows("professional_probes.jsonl"), "role"), count, "professional probes", "eval.professional"
    )


@dataclass(frozen=True)
class BoundaryProbe:
    """A request at a boundary, and what an answer would have to do to go along; of a harmless look-alike nothing would."""

    id: str
    category: str
    request: str
    harmful_if: str
    system: str = ""


def boundary_probes(count: int | None = None) -> list[BoundaryProbe]:
    """Mildly improper requests of our own, the categories taking turns."""
    return _probes("boundary", count, "eval.boundary_probes")


def lookalike_probes(count: int | None = None) -> list[BoundaryProbe]:
    """Harmless requests that look improper, the categories taking turns: an answer should help."""
    return _probes("benign_lookalike", count, "eval.lookalikes")


def _probes(kind: str, count: int | None, key: str) -> list[BoundaryProbe]:
    rows = [row for row in _rows("boundary_probes.jsonl") if row["kind"] == kind]
    taken = _taking_turns(rows, "category")
    return [
        BoundaryProbe(row["id"], row["category"], row["request"], row["harmful_if"])
        for row in _first(taken, count, f"{kind} probes", key)
    ]


@dataclass(frozen=True)
class Wrapper:
    """A persona that a request is wrapped in, and a first turn in which it settles."""

    id: str
    persona: str
    kind: str
    system: str
    drift_turn: str


def persona_wrappers() -> list[Wrapper]:
    """Personas that a jailbreak would use."""
    return [Wrapper(**row) for row in _rows("persona_wrappers.jsonl")]


def identity_questions(split: Split) -> list[str]:
    """Questions that make a model show who it takes itself for."""
    return [row["question"] for row in _rows("identity_questions.jsonl", split)]


@dataclass(frozen=True)
class CaseStudy:
    """User turns that are replayed word for word to every arm, to be read side by side."""

    id: str
    title: str
    system: str
    what_to_watch: str
    turns: list[str]


def case_studies(count: int | None = None) -> list[CaseStudy]:
    """Delusion reinforcement, isolation, romantic attachment and a persona jailbreak, eight turns each."""
    return [CaseStudy(**row) for row in _first(_rows("case_studies.jsonl"), count, "case studies", "eval.case_studies")]


@dataclass(frozen=True)
class SimulatedUser:
    """Who a simulating model plays, and what this user brings to the conversation."""

    id: str
    domain: str
    persona: str
    topic: str


def simulated_users(split: Split, count: int | None = None) -> list[SimulatedUser]:
    """Personas of four domains with topics; domains take turns first, then personas, then topics, so that any prefix is a mix."""
    rows = _rows("simulated_users.jsonl", split)
    rank: dict[str, int] = {}
    places = []
    for row in rows:
        rank[row["domain"]] = rank.get(row["domain"], -1) + 1
        places += [
            (number, rank[row["domain"]], row["domain"], row, topic) for number, topic in enumerate(row["topics"])
        ]
    users = [
        SimulatedUser(f"{row['id']}/{number + 1}", domain, row["persona"], topic)
        for number, _, domain, row, topic in sorted(places, key=lambda place: place[:3])
    ]
    return _first(users, count, f"{split} simulated users", "eval.simulated_users")
