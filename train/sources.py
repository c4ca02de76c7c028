"""Prompts of the training set, from the data that ships with trimtab or from the user's files."""

from __future__ import annotations

from pathlib import Path

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl
from trimtab.recipes import data
from trimtab.recipes.schema import DataSection
from trimtab.train.rollouts import Kind, TrainPrompt


def drift_sources(section: DataSection) -> list[TrainPrompt]:
    """Drift prompts of the train split: single prompts under roles, roles with shared questions, conversations.

    A conversation gives one training prompt for each of its first ``conversation_turns`` turns.
    """
    if section.drift_file is not None:
        return from_file(section.drift_file, "drift")
    found = [
        TrainPrompt(f"prompt/{item.id}", "drift", item.system, (item.user,), item.role)
        for item in data.drift_prompts("train", section.drift_prompts)
    ]
    if section.role_questions:
        questions = data.questions("train")
        for number, role in enumerate(data.roles("train")):
            for k in range(section.role_questions):
                index = (number * section.role_questions + k) % len(questions)
                system = role.prompts[(number + k) % len(role.prompts)]
                found.append(TrainPrompt(f"role/{role.name}/{index}", "drift", system, (questions[index],), role.name))
    for conversation in data.conversations("train") if section.conversation_turns else []:
        for turn in range(min(section.conversation_turns, len(conversation.turns))):
            turns = tuple(conversation.turns[: turn + 1])
            found.append(TrainPrompt(f"{conversation.id}/{turn + 1}", "drift", "", turns, conversation.domain))
    return found


def benign_sources(section: DataSection) -> list[TrainPrompt]:
    """Benign prompts of the train split, without and with a neutral system prompt in turn."""
    if section.benign_file is not None:
        return from_file(section.benign_file, "benign")
    systems = data.default_prompts()
    prompts = [*data.benign_prompts("train"), *data.questions("train")]
    return [
        TrainPrompt(f"benign/{i}", "benign", systems[i % len(systems)], (prompt,), "benign")
        for i, prompt in enumerate(prompts)
    ]


def from_file(path: str, kind: Kind) -> list[TrainPrompt]:
    """Prompts of a JSON Lines file: each row has ``prompt``, as messages ``[system,] user`` in TRL's conversational format.

    Raises:
        UserError: naming the row that is not so.
    """
    found = []
    for number, row in enumerate(read_jsonl(path, ours=False), start=1):
        messages = row.get("prompt")
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise UserError(
                f"row {number} has no 'prompt' list of messages with role and content, both text",
                file=path,
                remedy="use TRL's prompt format",
            )
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = tuple(m["content"] for m in messages if m["role"] == "user")
        if not turns or not all(turn.strip() for turn in turns):
            raise UserError(
                f"row {number} has no user turn, or an empty one", file=path, remedy="give each row a user turn"
            )
        found.append(TrainPrompt(f"{Path(path).name}/{number}", kind, system, turns, str(row.get("source", kind))))
    return found


def is_message(message: object) -> bool:
    """Whether this is a message in TRL's conversational format: ``role`` and ``content``, both text."""
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
