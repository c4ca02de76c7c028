"""Conversations are played turn by turn, whoever speaks and whoever answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from conftest import build_tokenizer

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.playing import Chat, PlayedTurn, play, recent_turns, scripted

SYSTEM = {"role": "system", "content": "be brief"}


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def numbered(turn: PlayedTurn) -> list[str]:
    """An answer that names its conversation and its turn."""
    return [f"answer {i}.{turn.number}" for i in turn.going]


def test_each_conversation_goes_on_as_far_as_its_script_and_is_answered_with_the_others() -> None:
    seen: list[tuple[list[int], list[Chat]]] = []

    def answer(turn: PlayedTurn) -> list[str]:
        seen.append((turn.going, turn.chats))
        return numbered(turn)

    named = {**says("user", "c"), "name": "Ann"}
    talks = play([[SYSTEM], []], scripted([["a"], ["b", named]]), answer, turns=5)
    assert [going for going, _ in seen] == [[0, 1], [1]]
    assert seen[1][1] == [[says("user", "b"), says("assistant", "answer 1.0"), named]]
    assert talks[0].messages == [SYSTEM, says("user", "a"), says("assistant", "answer 0.0")]
    assert talks[1].messages == [*seen[1][1][0], says("assistant", "answer 1.1")]


def test_users_hear_what_was_said_to_them_and_may_end_the_conversation() -> None:
    heard: list[tuple[int, list[int], list[Chat]]] = []

    def users(number: int, going: Sequence[int], talks: Sequence[Chat]) -> list[dict[str, str] | None]:
        heard.append((number, list(going), list(talks)))
        return [None if i == number else says("user", f"{i}.{number}") for i in going]

    talks = play([[], []], users, numbered, turns=9)
    assert [(number, going) for number, going, _ in heard] == [(0, [0, 1]), (1, [1])]
    assert heard[1][2] == [[says("user", "1.0"), says("assistant", "answer 1.0")]]
    assert [talk.messages for talk in talks] == [[], heard[1][2][0]]


def test_processes_that_play_together_answer_as_many_turns() -> None:
    turns: list[list[int]] = []

    def answer(turn: PlayedTurn) -> list[str]:
        turns.append(turn.going)
        return numbered(turn)

    play([[]], scripted([["a"]]), answer, turns=3, in_step=True)
    assert turns == [[0], [], []]


def test_a_chat_is_trimmed_whenever_its_user_has_spoken() -> None:
    form = ChatFormat(build_tokenizer())
    last = [says("system", "be brief"), says("user", "and now? " * 3)]
    room = len(form.prompt_ids(last)) + 2
    asked: list[tuple[list[Any], list[Any]]] = []

    def answer(turn: PlayedTurn) -> list[str]:
        asked.append((turn.chats, turn.ids))
        return ["well " * 20 for _ in turn.going]

    trim = functools.partial(recent_turns, form, room=room)
    (talk,) = play([[SYSTEM]], scripted([["first", "second", last[1]["content"]]]), answer, turns=3, trim=trim)
    assert talk.turns_dropped == 2 and talk.messages[:-1] == last
    for chats, ids in asked:
        assert ids == [form.prompt_ids(chat) for chat in chats] and len(ids[0]) <= room
