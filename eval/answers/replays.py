"""Conversations to replay, from files: the user's turns are asked again, each arm goes on from its own answers."""

from __future__ import annotations

import logging
from pathlib import Path

from trimtab.axis.folding import INSTRUCTIONS
from trimtab.axis.rows import Row, RowFault, read_once, source_name
from trimtab.axis.transcripts import Talk, read_talks
from trimtab.recipes.data import Conversation

log = logging.getLogger("trimtab")

KEY = "eval.conversations_file"


@read_once
def load_replays(source: str) -> list[Conversation]:
    """The conversations of a file, or of a data set of the hub, in any format of :mod:`trimtab.axis.transcripts`.

    The system prompt that a conversation begins with stands before the first turn of every arm. What an assistant said in it is
    left out, and told: it is every arm's own to say.

    Raises:
        UserError: if it can't be read, or some conversations can't be replayed: it names them.
    """
    stem = Path(source_name(source)).stem
    left_out = 0
    places: dict[str, str] = {}

    def made(row: Row, talk: Talk) -> Conversation:
        nonlocal left_out
        left_out += sum(message["role"] == "assistant" for message in talk.messages)
        found = _conversation(row, talk, stem)
        if found.id in places:  # their answers could not be told apart
            raise RowFault(f"the id {found.id!r} is taken by {places[found.id]}", "give each an id of its own")
        places[found.id] = row.place
        return found

    talks = read_talks(source, made, key=KEY)
    if left_out:
        log.info("%s: %d answers are left out: every arm gives its own", source_name(source), left_out)
    return talks


def _conversation(row: Row, talk: Talk, stem: str) -> Conversation:
    talk.says_something("user")
    roles = [message["role"] for message in talk.messages]
    if "user" not in roles:
        raise RowFault("it has no user turn", "give each conversation a user turn")
    first = roles.index("user")
    for number, role in enumerate(roles, start=1):
        before = number <= first
        if role not in (INSTRUCTIONS if before else ("user", "assistant")) and not (before and role == "assistant"):
            raise RowFault(
                f"message {number} ({role}) can't be replayed: it belongs to answers that every arm gives anew",
                "leave it out; instructions go before the first user turn",
            )
    return Conversation(
        id=talk.about("id") or f"{stem}/{row.number}",
        domain=talk.about("domain") or stem,
        persona=talk.about("persona") or "",
        topic=talk.about("topic") or "",
        turns=[message["content"] for message in talk.messages if message["role"] == "user"],
        opening=[
            message for message in talk.messages[:first] if message["role"] in INSTRUCTIONS and message["content"]
        ],
    )
