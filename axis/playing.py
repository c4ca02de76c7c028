"""Conversations that are played: the users speak, all whose conversation goes on are answered together, and so turn after turn.

Who the users are and how a batch of chats is answered is the caller's: a script or a model, text or tokens, one process or many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.axis.chat_format import ChatFormat

Chat = list[dict[str, str]]
Users = Callable[[int, Sequence[int], Sequence[Chat]], "Sequence[Mapping[str, str] | None]"]
"""(turn, which conversations, what was said in each) -> what each user says now; None ends a conversation."""
Trim = Callable[[Chat], "tuple[Chat, list[int], int]"]
"""A chat up to an answer -> what of it is kept, its token ids, and how many turns were left out."""


@dataclass(frozen=True)
class PlayedTurn:
    """A turn that is to be answered.

    Attributes:
        number: counted from 0.
        going: which conversations go on.
        chats: the messages of each of them up to the answer.
        ids: the same as token ids, where chats are trimmed.
    """

    number: int
    going: list[int]
    chats: list[Chat] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


@dataclass
class Played:
    """A conversation.

    Attributes:
        messages: what was said and is kept.
        turns_dropped: user turns, the oldest, that were left out with their answers.
    """

    messages: Chat
    turns_dropped: int = 0

    def ask(self, message: Mapping[str, str], trim: Trim | None = None) -> list[int]:
        """The user speaks; returns the token ids up to the answer, none where nothing is trimmed."""
        self.messages = [*self.messages, dict(message)]
        if trim is None:
            return []
        self.messages, ids, dropped = trim(self.messages)
        self.turns_dropped += dropped
        return ids

    def answer(self, text: str) -> None:
        """The answer is given."""
        self.messages = [*self.messages, _answer(text)]


def play(
    begun: Sequence[Sequence[Mapping[str, str]]],
    users: Users,
    answer: Callable[[PlayedTurn], Sequence[str]],
    *,
    turns: int,
    trim: Trim | None = None,
    in_step: bool = False,
) -> list[Played]:
    """Play conversations.

    Args:
        begun: the messages before the first user turn of each, usually none or a system prompt.
        users: what the users say.
        answer: the answers to a turn, one a chat.
        turns: most turns.
        trim: applied whenever a user has spoken; None keeps all that was said.
        in_step: with other processes, which all play so many turns: ``answer`` is called even where no conversation goes on.

    Returns:
        The conversations, each up to its last answer.
    """
    talks = [Played([dict(message) for message in messages]) for messages in begun]
    going = list(range(len(talks)))
    for number in range(turns):
        said = users(number, going, [talks[i].messages for i in going])
        turn = PlayedTurn(number, [i for i, message in zip(going, said, strict=True) if message is not None])
        for i, message in zip(going, said, strict=True):
            if message is not None:
                turn.ids.append(talks[i].ask(message, trim))
                turn.chats.append(talks[i].messages)
        going = turn.going
        if not going and not in_step:
            break
        for i, text in zip(going, answer(turn), strict=True):
            talks[i].answer(text)
    return talks


def scripted(scripts: Sequence[Sequence[str | Mapping[str, str]]]) -> Users:
    """Users who say what stands in their scripts, texts or whole messages, and then no more."""
    written = [
        [{"role": "user", "content": turn} if isinstance(turn, str) else turn for turn in script] for script in scripts
    ]

    def users(number: int, going: Sequence[int], _: Sequence[Chat]) -> list[Mapping[str, str] | None]:
        return [written[i][number] if number < len(written[i]) else None for i in going]

    return users


def unanswered(before: Sequence[Mapping[str, str]], turns: Sequence[str]) -> Chat:
    """A conversation up to its last answer, with empty ones in the place of those that are given along the way.

    Args:
        before: the messages before the first of these turns.
        turns: the user's.
    """
    said = [message for turn in turns for message in ({"role": "user", "content": turn}, _answer(""))]
    return [*(dict(message) for message in before), *said[:-1]]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def recent_turns(form: ChatFormat, messages: Sequence[dict[str, str]], room: int | None) -> tuple[Chat, list[int], int]:
    """A chat without its oldest turns, as many as it takes for its prompt to have at most ``room`` tokens.

    A user turn goes together with what follows up to the next. System prompt and last user turn stay, so that what is left may
    still be longer.

    Returns:
        The messages, the prompt's token ids, and how many turns were left out.
    """
    kept, ids, dropped = list(messages), form.prompt_ids(messages), 0
    head = instructions(kept)
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    for start in users[1:]:
        if room is None or len(ids) <= room:
            break
        kept, dropped = [*head, *messages[start:]], dropped + 1
        ids = form.prompt_ids(kept)
    return kept, ids, dropped


def instructions(messages: Sequence[dict[str, str]]) -> Chat:
    """What a chat begins with before anybody speaks: the system prompt."""
    return list(itertools.takewhile(lambda message: message["role"] not in ("user", "assistant"), messages))
