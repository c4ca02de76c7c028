"""Conversations as people have them: whatever format a row is in, its messages in order, and nothing dropped in silence.

docs/data.md has the table of formats. A row holds its conversation under one of :data:`LISTS` or :data:`SCRIPTS`, as the prompt
and answer of one of :data:`PAIRS`, or is itself a list of messages. Where it holds it twice, both must agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trimtab.axis.rows import Row, RowFault, kind_of, read_rows, source_name

log = logging.getLogger("trimtab")

T = TypeVar("T")

FORMATS = (
    'each row is {"messages": [{"role": ..., "content": ...}, ...]} (or "conversation"), a bare list of messages, ShareGPT\'s '
    '{"conversations": [{"from": ..., "value": ...}, ...]}, {"prompt": ..., "completion": ...} as text or messages, '
    '{"instruction", "input", "output"}, {"question", "answer"}, or {"turns": [...]} with user turns alone: see docs/data.md'
)
WRITE = 'write each message as {"role": "user", "content": "..."}'

# What the formats call the roles -> what chat templates call them; in any case of letters.
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
ROLE, CONTENT = ("role", "from"), ("content", "value")
LISTS = ("messages", "conversation", "conversations")
SCRIPTS = ("turns", "prompts")
# Key of what is asked, of what it is asked about, and of the answer.
PAIRS = (
    ("prompt", (), ("completion", "response")),
    ("instruction", ("input", "context"), ("output", "response")),
    ("question", (), ("answer", "response")),
)
SYSTEMS = ("system", "system_prompt")
TEXT_PARTS = ("text", "input_text", "output_text")
# Parts of a conversation that a text model's chat would lose: in a message, and in a row.
LOST_IN_MESSAGES = (
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "image", "images", "audio", "video", "videos",
)  # fmt: skip
LOST_IN_ROWS = ("tools", "functions", "history", "image", "images", "audio", "audios", "video", "videos")
# Keys of a row that say something about it, rather than something in it.
ABOUT = {"id", "source", "domain", "persona", "topic", "model", "role", "ended", "category", "turns"}


@dataclass(frozen=True)
class Talk:
    """One conversation, as a row has it.

    Attributes:
        messages: ``{"role", "content"}`` in order; a system prompt that stands beside them comes first.
        asked: how many of them are the prompt, where the row tells it from its answer; None for a whole conversation.
        row: the row itself; empty for a bare list.
        unread: its keys, and those of its messages, that nothing was made of.
    """

    messages: list[dict[str, str]]
    asked: int | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()

    def about(self, name: str) -> str | None:
        """A key that says something about the conversation, such as ``id``; None where it is no text or whole number."""
        value = self.row.get(name)
        return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None

    def says_something(self, *roles: str) -> None:
        """Refuse an empty message of these roles.

        Raises:
            RowFault: naming the message.
        """
        for number, message in enumerate(self.messages, start=1):
            if message["role"] in roles and not message["content"].strip():
                raise RowFault(f"message {number} ({message['role']}) is empty", "write it, or delete the row")


def read_talks(source: str | Path, make: Callable[[Row, Talk], T], *, key: str | None = None) -> list[T]:
    """Read the conversations of a file or of a data set of the hub, and make something of each.

    Args:
        source: see :func:`trimtab.axis.rows.read_rows`.
        make: what a conversation becomes; raises :class:`RowFault` for one that can't be used.
        key: the recipe's key that names the source, for the error.

    Raises:
        UserError: if it can't be read, holds no row, or some rows are not as they should be: it names them.
    """
    unread: set[str] = set()

    def made(row: Row) -> T:
        talk = talk_of(row.value)
        unread.update(talk.unread)
        return make(row, talk)

    found = read_rows(source, made, key=key)
    if unread:
        log.info("%s: keys that are not read: %s", source_name(source), ", ".join(sorted(unread)))
    return found


def talk_of(value: Any) -> Talk:
    """The conversation of a row.

    Raises:
        RowFault: if it holds none, two that differ, or something that the chat of a text model would lose.
    """
    if isinstance(value, list):
        messages, unread = _messages(value, "the row")
        return Talk(messages, unread=frozenset(unread))
    if not isinstance(value, Mapping):
        raise RowFault(f"a conversation can't be {kind_of(value)}", FORMATS)
    row = {name: item for name, item in value.items() if item is not None}
    for name in LOST_IN_ROWS:
        if row.get(name):
            raise RowFault(f"it has `{name}`, which a conversation of text alone would lose", "take it out of the row")
    found = list(_conversations(row))
    if not found:
        raise RowFault(f"no conversation in here; the keys are: {', '.join(map(repr, value)) or 'none'}", FORMATS)
    first, *others = found
    used = set(first.keys)
    for other in others:
        used.update(other.keys_within(first))
    messages, before = _with_system(first.messages, row)
    unread = {name for name, item in row.items() if name not in used | ABOUT | set(SYSTEMS) and item != ""}
    for name in unread & {name for _, about, _ in PAIRS for name in about}:
        raise RowFault(f"`{name}` beside `{first.keys[0]}` is no format that is known", FORMATS)
    asked = None if first.asked is None else first.asked + before
    return Talk(messages, asked, row, frozenset(unread) | first.unread)


@dataclass(frozen=True)
class _Found:
    """A conversation as one format has it, and the keys that it is under."""

    keys: tuple[str, ...]
    messages: list[dict[str, str]]
    asked: int | None = None
    unread: frozenset[str] = frozenset()

    def keys_within(self, other: _Found) -> tuple[str, ...]:
        """The keys of this one that say nothing but what the other says: all, or all but the answer's.

        Raises:
            RowFault: if what is asked differs.
        """
        if _is_within(self.messages, other.messages):
            return self.keys
        if self.asked is not None and _is_within(self.messages[: self.asked], other.messages):
            return self.keys[:-1]
        names = " and ".join(f"`{'`, `'.join(each.keys)}`" for each in (other, self))
        raise RowFault(f"{names} hold different conversations", "keep one of them")


def _conversations(row: Mapping[str, Any]) -> Iterator[_Found]:
    """Each format that a row is in."""
    for name in LISTS:
        if name in row:
            messages, unread = _messages(row[name], f"`{name}`")
            yield _Found((name,), messages, None, frozenset(unread))
    for ask, about, answers in PAIRS:
        if ask in row:
            yield _pair(row, ask, about, answers)
    for name in SCRIPTS:
        if isinstance(row.get(name), list):  # published transcripts count their turns under this name
            yield _script(row[name], name)


def _pair(row: Mapping[str, Any], ask: str, about: Sequence[str], answers: Sequence[str]) -> _Found:
    unread: set[str] = set()
    keys = [ask]
    if isinstance(row[ask], str):
        text = [_text(row[ask], f"`{ask}`")]
        for name in about:
            if row.get(name, "") != "":
                keys.append(name)
                text.append(_text(row[name], f"`{name}`"))
        messages = [{"role": "user", "content": "\n\n".join(part for part in text if part.strip())}]
    else:
        messages, unread = _messages(row[ask], f"`{ask}`")
    asked = len(messages)
    for name in answers:
        if name in row:
            keys.append(name)
            if isinstance(row[name], str):
                messages = [*messages, {"role": "assistant", "content": _text(row[name], f"`{name}`")}]
            else:
                answer, more = _messages(row[name], f"`{name}`")
                messages, unread = [*messages, *answer], unread | more
            break
    return _Found(tuple(keys), messages, asked, frozenset(unread))


def _script(items: Sequence[Any], name: str) -> _Found:
    if items and isinstance(items[0], Mapping):
        messages, unread = _messages(items, f"`{name}`")
        return _Found((name,), messages, None, frozenset(unread))
    if not items:
        raise RowFault(f"`{name}` is an empty list", FORMATS)
    turns = [_text(item, f"`{name}`, turn {number}") for number, item in enumerate(items, start=1)]
    return _Found((name,), [{"role": "user", "content": turn} for turn in turns])


def _with_system(messages: list[dict[str, str]], row: Mapping[str, Any]) -> tuple[list[dict[str, str]], int]:
    """The messages behind the system prompt that stands beside them, and how many that adds."""
    given = {
        name: _content(row[name], f"`{name}`") if isinstance(row[name], list) else _text(row[name], f"`{name}`")
        for name in SYSTEMS
        if name in row
    }
    own = [message["content"] for message in messages[:1] if message["role"] == "system"]
    texts = list(dict.fromkeys(text for text in [*given.values(), *own] if text.strip()))
    if len(texts) > 1:
        places = " and ".join([*(f"`{name}`" for name in given), *(["the messages"] if own else [])])
        raise RowFault(f"{places} hold different system prompts", "keep one of them")
    if not given or own or not texts:
        return messages, 0
    return [{"role": "system", "content": texts[0]}, *messages], 1


def _is_within(few: Sequence[dict[str, str]], many: Sequence[dict[str, str]]) -> bool:
    """Whether all of these messages stand among the others, in that order."""
    rest = iter([(message["role"], message["content"].strip()) for message in many])
    return all((message["role"], message["content"].strip()) in rest for message in few)


def _messages(value: Any, where: str) -> tuple[list[dict[str, str]], set[str]]:
    """Messages of a list, and the keys in them that are not read."""
    if isinstance(value, Mapping):  # tables may hold a list of mappings as a mapping of lists
        value = _across(value, where)
    if not isinstance(value, list):
        raise RowFault(f"{where} is {kind_of(value)}, not a list of messages", FORMATS)
    if not value:
        raise RowFault(f"{where} is an empty list", FORMATS)
    unread: set[str] = set()
    messages = [_message(item, f"message {number}", unread) for number, item in enumerate(value, start=1)]
    return messages, unread


def _across(value: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    columns = {name: column for name, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        raise RowFault(f"{where} is a mapping, not a list of messages", FORMATS)
    if len({len(column) for column in columns.values()}) > 1:
        raise RowFault(f"{where} is a mapping of lists of unlike lengths", FORMATS)
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _message(item: Any, where: str, unread: set[str]) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise RowFault(f"{where} is {kind_of(item)}", WRITE)
    role, content = item.get("role"), item.get("content")
    if len(item) == 2 and isinstance(role, str) and role in ROLES and isinstance(content, str):
        return {"role": ROLES[role], "content": _text(content, where)}  # what nearly all are: files may hold millions
    message = {name: part for name, part in item.items() if part is not None}
    for name in LOST_IN_MESSAGES:
        if message.get(name):
            raise RowFault(
                f"{where} has `{name}`, which a conversation of text alone would lose", "take it out, or the row"
            )
    role, content = (_one_of(message, names, where) for names in (ROLE, CONTENT))
    if not isinstance(role, str):
        raise RowFault(f"{where}: its role is {kind_of(role)}, not text", WRITE)
    if role.strip().lower() not in ROLES:
        raise RowFault(f"{where} has the role {role!r}, which is none of {', '.join(ROLES)}", "rename the role")
    unread |= message.keys() - {*ROLE, *CONTENT, *LOST_IN_MESSAGES}
    return {"role": ROLES[role.strip().lower()], "content": _content(content, where)}


def _one_of(message: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    there = [name for name in names if name in message]
    if len(there) > 1 and message[there[0]] != message[there[1]]:
        raise RowFault(f"{where} has both `{there[0]}` and `{there[1]}`", "keep one of them")
    if not there:
        raise RowFault(f"{where} has no {names[0]}", WRITE)
    return message[there[0]]


def _content(content: Any, where: str) -> str:
    """A message's text; of a list of parts, which must all be text, one behind another."""
    if not isinstance(content, list):
        return _text(content, f"{where}: its content")
    if not content:
        raise RowFault(f"{where}: its content is an empty list", WRITE)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
        if not isinstance(part, Mapping) or kind not in TEXT_PARTS:
            raise RowFault(f"{where} has a part that is no text: {kind}", "keep parts of the type text alone")
        texts.append(_text(part.get("text"), f"{where}: a part's text"))
    return "".join(texts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{where} is {kind_of(value)}, not text", "write it as text, in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise RowFault(
            f"{where} holds half a character, {half}", "write the character whole: cut text between characters"
        ) from error
    return value


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
    """Read the conversations of a file, or of a data set of the hub, in any format that docs/data.md lists.

    Raises:
        UserError: if it can't be read, or a conversation is in none of these formats or has no assistant turn; it names the lines
            and the messages at fault.
    """
    stem = Path(source_name(path)).stem

    def made(row: Row, talk: Talk) -> tuple[str, Transcript]:
        if not any(message["role"] == "assistant" for message in talk.messages):
            raise RowFault(
                f"no assistant turn among {len(talk.messages)} messages",
                "the compass reads the assistant's answers: give a conversation that has some",
            )
        model = talk.row.get("model")
        title = " ".join(filter(None, [stem, talk.about("id") or row.place]))
        return title, Transcript(stem, talk.messages, model if isinstance(model, str) else None)

    found = read_talks(path, made)
    if len(found) == 1:
        return [found[0][1]]
    return [Transcript(title, each.messages, each.model) for title, each in found]
