"""What every arm is asked: items of roles, of the default Assistant, benign ones, conversations and requests at a boundary."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trimtab.axis.chat_format import chat
from trimtab.eval.answers.arms import Item
from trimtab.eval.answers.boundary_files import load_boundary_file
from trimtab.eval.answers.replays import load_replays
from trimtab.recipes import data
from trimtab.recipes.data import BoundaryProbe, Split
from trimtab.recipes.schema import EvalSection

log = logging.getLogger("trimtab")


def role_items(split: Split, roles: int, questions: int) -> list[Item]:
    """Roles of a split, ``questions`` questions of it each; the role's system prompts take turns.

    Each role goes on in the list of questions where the one before it stopped, so that all of them are asked in the end: how much
    of a persona shows depends on the question more than on the role, and a figure from two questions would be about those two.
    """
    asked = data.questions(split)
    return [
        Item(
            f"{role.name}/{k}",
            role.name,
            chat(role.prompts[(number + k) % len(role.prompts)], asked[(number * questions + k) % len(asked)]),
        )
        for number, role in enumerate(data.roles(split, roles))
        for k in range(questions)
    ]


def default_items(split: Split, roles: int, questions: int) -> list[Item]:
    """The same questions to the default Assistant: as many as there are roles, the neutral prompts taking turns."""
    asked, neutral = data.questions(split), data.default_prompts()
    count = max(roles, questions)
    return [
        Item(f"default/{i}", f"default/{i}", chat(neutral[i % len(neutral)], asked[i % len(asked)]))
        for i in range(count)
    ]


def benign_items(split: Split, count: int) -> list[Item]:
    """Benign requests of a split, without a system prompt."""
    prompts = data.benign_prompts(split, count)
    return [Item(f"benign/{i}", f"benign/{i}", chat("", prompt)) for i, prompt in enumerate(prompts)]


def benign_system_items(section: EvalSection) -> tuple[list[Item], list[data.BenignSystem]]:
    """Requests under benign system prompts of a split, and what each is checked by."""
    rows = data.benign_systems(section.split, section.benign_systems)
    return [Item(row.id, row.id, chat(row.system, row.user)) for row in rows], rows


def conversation_items(conversations: Sequence[data.Conversation]) -> list[Item]:
    """An item a conversation, whose prompt is what stands before the first turn."""
    return [Item(talk.id, talk.id, list(talk.opening)) for talk in conversations]


def conversations_of(section: EvalSection) -> list[data.Conversation]:
    """The shipped conversations, or those of the user's file, of which what is left out is told."""
    if section.conversations_file is None:
        return data.conversations(section.split, section.conversations)
    there = load_replays(section.conversations_file)
    chosen = there[: section.conversations or None]
    longest = max(len(talk.turns) for talk in chosen)
    if len(chosen) < len(there):
        log.warning("the first %d of %d conversations are asked: raise eval.conversations", len(chosen), len(there))
    if longest > section.turns:
        log.warning("conversations go on to turn %d and are cut at eval.turns=%d", longest, section.turns)
    return chosen


def boundary_probes_of(section: EvalSection) -> tuple[list[BoundaryProbe], list[BoundaryProbe]]:
    """Requests at a boundary that should be declined, and harmless look-alikes that should be answered."""
    if section.boundary_file is not None:
        declined, answered = load_boundary_file(section.boundary_file)
        count = section.boundary_probes or None
        return declined[:count], answered[:count]
    if not section.boundary_probes:
        return [], []
    return data.boundary_probes(section.boundary_probes), data.lookalike_probes(section.boundary_probes // 2)
