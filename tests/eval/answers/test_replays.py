"""Conversations from files, of unequal length, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_arms

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.sampling import SamplingOptions
from trimtab.eval.answers.arms import Item
from trimtab.eval.answers.items import conversation_items
from trimtab.eval.answers.replays import load_replays

SYSTEM = {"role": "system", "content": "You are a ghost."}
MESSAGES = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Said by another model."},
    {"role": "user", "content": "Go on."},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cases.json", [{"id": "a", "prompts": ["Hello.", "Go on."]}, {"turns": ["One turn."], "domain": "therapy"}]),
        ("cases.jsonl", [{"id": "a", "turns": ["Hello.", "Go on."]}, {"prompts": ["One turn."], "domain": "therapy"}]),
        ("by_name.json", {"a": ["Hello.", "Go on."], "b": ["One turn."]}),
        ("published.json", {"model": "m", "conversation": MESSAGES}),
        ("chats.jsonl", [{"id": "a", "messages": MESSAGES}, {"messages": MESSAGES[:1]}]),
    ],
)
def test_every_format(name: str, content: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = content if name.endswith("l") else [content]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    talks = load_replays(str(path))
    assert talks[0].turns == ["Hello.", "Go on."] and all(len(talk.turns) == 1 for talk in talks[1:])
    assert talks[0].domain == path.stem and len(talks) == (1 if name == "published.json" else 2)
    assert len({talk.id for talk in talks}) == len(talks)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "there is no row in it"),
        ([{"id": 0, "turns": ["x"]}, {"id": 0, "turns": ["y"]}], "row 2: the id '0' is taken by row 1"),
        ([{"turns": ["x"]}, {"turn": ["y"]}], "row 2: no conversation in here"),
        ([{"turns": [""]}], r"row 1: message 1 \(user\) is empty"),
        ([{"messages": MESSAGES[1:2]}], "row 1: it has no user turn"),
        (["x"], "row 1: a conversation can't be text"),
        ([{"messages": [*MESSAGES, {"role": "tool", "content": "3"}]}], r"row 1: message 4 \(tool\) can't be replayed"),
        ([{"messages": [*MESSAGES[:2], SYSTEM, MESSAGES[2]]}], r"row 1: message 3 \(system\) can't be replayed"),
    ],
)
def test_what_is_wrong_is_named(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        load_replays(str(path))
    assert caught.value.key == "eval.conversations_file" and caught.value.remedy
    path.write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        load_replays(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *MESSAGES]},
        {"system": SYSTEM["content"], "conversation": MESSAGES},
        {"system": SYSTEM["content"], "turns": ["Hello.", "Go on."]},
    ],
)
def test_the_system_prompt_stands_before_the_first_turn_of_every_arm(
    row: Any, tmp_path: Path, form: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with caplog.at_level("INFO", "trimtab"):
        (talk,) = load_replays(str(path))
    assert talk.turns == ["Hello.", "Go on."]
    answers = [1] if "turns" not in row else []
    assert caplog.messages == [f"chats.jsonl: {n} answers are left out: every arm gives its own" for n in answers]
    arms = build_arms(form, tmp_path / "arms", SamplingOptions(max_new_tokens=3, batch_size=1, temperature=0))
    played = arms.conversations("talks", conversation_items([talk]), [talk.turns], "base")
    assert [turn.prompts[0][0] for turn in played] == [SYSTEM, SYSTEM]
    assert played[1].prompts[0][2] == {"role": "assistant", "content": played[0].texts[0]}


def test_a_short_conversation_leaves_the_long_one_alone(form: ChatFormat, tmp_path: Path) -> None:
    """The long one is the same beside a short one as alone; the short one's later places are empty."""
    options = SamplingOptions(max_new_tokens=5, batch_size=1, temperature=0)
    items = [Item("long", "long", []), Item("short", "short", [])]
    scripts = [["Hello.", "Go on.", "And then?"], ["One turn."]]
    both = build_arms(form, tmp_path / "both", options).conversations("talks", items, scripts, "base")
    alone = build_arms(form, tmp_path / "alone", options).conversations("talks", items[:1], scripts[:1], "base")
    assert [turn.texts[0] for turn in both] == [turn.texts[0] for turn in alone]
    assert len(both) == 3 and both[0].prompts[1][-1]["content"] == "One turn."
    for turn in both[1:]:
        assert turn.texts[1] == "" and turn.prompts[1] == [] and torch.isnan(turn.means[1]).all()
    assert [message["role"] for message in both[2].prompts[0]] == ["user", "assistant"] * 2 + ["user"]
