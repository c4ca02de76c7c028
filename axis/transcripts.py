"""Conversations from files: published transcripts, bare lists of messages, and rollouts as JSON Lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError

FORMATS = (
    'use {"conversation": [...]}, {"messages": [...]}, a bare list of {"role", "content"}, '
    "or JSON Lines with prompt and completion as messages"
)

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Transcript:
    """One conversation.

    Attributes:
        title: the file's name, and the row's id or number where the file holds several.
        messages: ``{"role", "content"}`` in order, with at least one assistant turn.
        model: the model that wrote it, where the file says so.
    """

    title: str
    messages: list[dict[str, str]]
    model: str | None = None


def load_transcript(path: str | Path) -> list[Transcript]:
    """Read the conversations of a file.

    Four formats are told apart by their content: the published one (``{"model", "conversation": [...]}``),
    ``{"messages": [...]}``, a bare list of messages, and rows with ``prompt`` and ``completion`` as messages. Each may also
    stand as JSON Lines, one conversation a line; a last line without its newline counts.

    Raises:
        UserError: if the file is missing, is none of these, or a conversation has no assistant turn; it names the line
            and the message at fault.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError("no such file", file=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error}", file=path, remedy="save the transcript as UTF-8") from error
    if not text.strip():
        raise UserError("the file is empty", file=path, remedy=FORMATS)
    try:
        return [_transcript(json.loads(text), path, path.stem)]
    except json.JSONDecodeError as error:
        if "Extra data" not in error.msg and path.suffix != ".jsonl":
            raise UserError(f"not valid JSON: {error}", file=path, remedy="mend or re-create the file") from error
    return [_transcript(row, path, f"{path.stem} {_name(row, number)}", number) for number, row in _lines(text, path)]


def _lines(text: str, path: Path) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                fault = f"line {number} is not JSON: {error}"
                raise UserError(fault, file=path, remedy="mend or delete that line") from error
    return rows


def _name(row: Any, number: int) -> str:
    return str(row["id"]) if isinstance(row, dict) and "id" in row else f"line {number}"


def _transcript(value: Any, path: Path, title: str, line: int | None = None) -> Transcript:
    where = "" if line is None else f"line {line}: "
    found: Any = None
    if isinstance(value, list):
        key, found = "messages", value
    elif not isinstance(value, dict):
        raise UserError(f"{where}a conversation can't be a {type(value).__name__}", file=path, remedy=FORMATS)
    elif "conversation" in value or "messages" in value:
        key = "conversation" if "conversation" in value else "messages"
        found = value[key]
    elif "prompt" in value and "completion" in value:
        key = "prompt and completion"
        if isinstance(value["prompt"], list) and isinstance(value["completion"], list):
            found = [*value["prompt"], *value["completion"]]
    else:
        keys = ", ".join(map(repr, value)) or "none"
        raise UserError(f"{where}no conversation in here; the keys are: {keys}", file=path, remedy=FORMATS)
    if not isinstance(found, list):
        raise UserError(f"{where}not a list of messages", file=path, key=key, remedy=FORMATS)
    messages = [_message(message, number, where, path, key) for number, message in enumerate(found, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}no assistant turn among {len(messages)} messages",
            file=path,
            key=key,
            remedy="the compass reads the assistant's answers: give a conversation that has some",
        )
    model = value.get("model") if isinstance(value, dict) else None
    return Transcript(title, messages, model if isinstance(model, str) else None)


def _message(message: Any, number: int, where: str, path: Path, key: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        fault = f"{where}message {number} has no role and content"
    elif not isinstance(message["role"], str) or not isinstance(message["content"], str):
        fault = f"{where}message {number}: role and content must both be text"
    elif message["role"] not in ROLES:
        fault = f"{where}message {number} has the role {message['role']!r}, which is none of {', '.join(ROLES)}"
    else:
        return {"role": message["role"], "content": message["content"]}
    raise UserError(fault, file=path, key=key, remedy='write each message as {"role": "user", "content": "..."}')
