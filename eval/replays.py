"""Conversations to replay, from files: the user's turns are asked again, each arm goes on from its own answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl
from trimtab.recipes.data import Conversation

KEYS = ("turns", "prompts", "conversation", "messages")
FORMATS = (
    "give JSON or JSON Lines: cases with `turns` or `prompts` (a list of user messages), transcripts with `conversation` or "
    "`messages` ({role, content}), or one mapping of names to lists of user messages; `id` and `domain` if wanted"
)


def load_replays(path: Path) -> list[Conversation]:
    """The conversations of a file; what an assistant said in a transcript is left out, it is every arm's own to say.

    Raises:
        UserError: if the file is none of the known formats, or a case has no user turn; it names the case.
    """
    cases = _cases(path)
    found = [_conversation(case, number, path) for number, case in enumerate(cases, start=1)]
    if not found:
        raise UserError("the file holds no conversation", file=path, key="eval.conversations_file", remedy=FORMATS)
    if twice := sorted(name for name, count in Counter(talk.id for talk in found).items() if count > 1):
        raise _fault(f"ids that are taken twice: {', '.join(twice)}", path)
    return found


def _fault(what: str, path: Path) -> UserError:
    return UserError(what, file=path, key="eval.conversations_file", remedy=FORMATS)


def _cases(path: Path) -> list[Any]:
    if path.suffix == ".jsonl":
        return list(read_jsonl(path, ours=False))
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _fault(f"not valid JSON: {error}", path) from error
    if isinstance(content, Mapping) and not any(key in content for key in KEYS):
        return [{"id": name, "turns": turns} for name, turns in content.items()]
    return content if isinstance(content, list) else [content]


def _conversation(case: Any, number: int, path: Path) -> Conversation:
    if not isinstance(case, Mapping):
        raise _fault(f"case {number} is no mapping", path)
    key = next((key for key in KEYS if isinstance(case.get(key), list)), None)
    if key is None:
        raise _fault(f"case {number} has none of {', '.join(KEYS)}", path)
    said = case[key]
    if key in ("conversation", "messages"):
        said = [message.get("content") for message in said if isinstance(message, Mapping) and _is_user(message)]
    if not said or not all(isinstance(turn, str) and turn.strip() for turn in said):
        raise _fault(f"case {number} has no user turn, or one that is no text", path)
    return Conversation(
        id=str(case.get("id") or f"{path.stem}/{number}"),
        domain=str(case.get("domain") or path.stem),
        persona=str(case.get("persona") or ""),
        topic=str(case.get("topic") or ""),
        turns=[str(turn) for turn in said],
    )


def _is_user(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "user"
