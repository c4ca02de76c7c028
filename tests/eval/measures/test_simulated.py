"""Simulated conversations: a simulating model behind a real HTTP endpoint, and what is measured on them by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_arms, build_floor, save_model
from judge_endpoint import KEY, Endpoint, completion

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.sampling import Answer, SamplingOptions
from trimtab.eval.answers.arms import Answers, Arms
from trimtab.eval.answers.ruler import Ruler, slopes
from trimtab.eval.measures.simulated import (
    SimulatedTurn,
    as_user,
    by_place,
    simulated_conversations,
    simulated_suite,
    user_model,
)
from trimtab.recipes import data
from trimtab.recipes.schema import JudgeSection


@pytest.fixture
def arms(form: ChatFormat, tmp_path: Path) -> Arms:
    options = SamplingOptions(max_new_tokens=6, batch_size=16)
    return build_arms(form, tmp_path / "eval", options, names=("base", "base+cap", "tuned"))


def settings(endpoint: Endpoint, **changes: Any) -> dict[str, Any]:
    """One user after another, so that a test can tell who is asked."""
    one = {"retries": 1, "backoff": 0.01, "unreadable_retries": 1, "concurrency": 1, **changes}
    return JudgeSection(endpoint=endpoint.url, model="m", api_key_env=KEY, **one).model_dump()


def test_users_are_a_mix_and_all_different() -> None:
    for split, count, personas in (("train", 160, 8), ("dev", 240, 12), ("test", 64, 8)):
        users = data.simulated_users(split)
        assert len(users) == len({user.id for user in users}) == len({user.topic for user in users}) == count
        assert len({user.domain for user in users[:4]}) == 4
        assert len({user.persona for user in users[:personas]}) == personas


def test_the_simulating_model_sees_the_conversation_from_the_other_side() -> None:
    user = data.simulated_users("dev", 1)[0]
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi, how can I help?"}]
    chat = as_user(user, talk)
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert user.persona in chat[0]["content"] and user.topic in chat[0]["content"]
    assert chat[2]["content"] == "Hello." and chat[3]["content"] == "Hi, how can I help?"


def test_conversations_go_on_until_the_user_ends_them_and_resume(
    arms: Arms,
    endpoint: Endpoint,
) -> None:
    """The first user ends after one turn; the second goes on to the last; a third says nothing at all."""
    users = data.simulated_users("dev", 3)

    def answer(prompt: str, count: int) -> tuple[int, str]:
        messages = endpoint.requests[-1]["messages"]
        who = next(i for i, user in enumerate(users) if user.topic in messages[0]["content"])
        turn = sum(message["role"] == "assistant" for message in messages)
        if who == 2 or (who == 0 and turn == 1):
            return 200, " end. "
        return 200, f"user {who}, turn {turn + 1}"

    endpoint.answer = answer
    ask = user_model(settings(endpoint), seed=0)
    played = simulated_conversations(arms, users, 3, ask, "tuned", {})
    assert [turn.going for turn in played] == [[0, 1], [1], [1]]
    assert played[0].said == ["user 0, turn 1", "user 1, turn 1"] and played[2].said == ["user 1, turn 3"]
    last = played[2].answers.prompts[0]
    assert [message["role"] for message in last] == ["user", "assistant"] * 2 + ["user"]
    assert last[1]["content"] == played[0].answers.texts[1] and last[3]["content"] == played[1].answers.texts[0]
    asked = len(endpoint.asked)
    (arms.folder / "simulated-turn-3-tuned.safetensors").unlink()  # killed while the last turn was sampled
    again = simulated_conversations(arms, users, 3, ask, "tuned", {})
    assert len(endpoint.asked) == asked  # what the users said is kept
    assert [turn.answers.texts for turn in again] == [turn.answers.texts for turn in played]
    simulated_conversations(arms, users, 1, ask, "tuned", {"model": "another"})
    assert len(endpoint.asked) == asked + 3  # what one model said is not taken for another's
    placed_turns = by_place(played, 3)
    assert [answers.texts[0] == "" for answers in placed_turns] == [False, True, True]
    assert torch.isnan(placed_turns[1].means[0]).all() and torch.equal(
        placed_turns[1].means[1], played[1].answers.means[0]
    )


def test_what_the_users_begin_with_is_the_same_in_every_arm(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, f"message {len(endpoint.asked)}")
    ask, users = user_model(settings(endpoint), seed=0), data.simulated_users("dev", 2)
    base, tuned = (simulated_conversations(arms, users, 2, ask, arm, {}) for arm in ("base", "tuned"))
    assert base[0].said == tuned[0].said == ["message 1", "message 2"]
    assert base[1].said != tuned[1].said and len(endpoint.asked) == 6


def test_an_endpoint_that_fails_is_no_end_of_a_conversation(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (500, "")
    with pytest.raises(UserError, match="no message of the simulated user"):
        simulated_conversations(
            arms, data.simulated_users("dev", 1), 2, user_model(settings(endpoint), seed=0), "base", {}
        )
    assert len(endpoint.asked) == 2  # tried again once


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (completion("<think>I am a person.</think>\nHello there."), "Hello there."),
        (completion("I am to play a person.\n</think>\n\nHello there."), "Hello there."),
        (completion("Hello there.", reasoning_content="I play."), "Hello there."),
        (completion("<think>The persona is", "length"), None),
        (completion("<think>The persona is"), None),
        (completion("Okay, the user wants me to play", "length"), None),  # the template opened the thought
        (completion("<think>So.</think>"), None),
        (completion(None, "length", reasoning_content="The persona is"), None),
    ],
)
def test_a_user_s_thoughts_are_not_said_aloud(endpoint: Endpoint, body: bytes, said: str | None) -> None:
    endpoint.answer = lambda prompt, count: (200, body)
    assert user_model(settings(endpoint), seed=0)([as_user(data.simulated_users("dev", 1)[0], [])], 0) == [said]
    assert len(endpoint.asked) == (1 if said else 2)


def test_a_conversation_whose_user_only_thinks_is_missing_and_told(arms: Arms, endpoint: Endpoint) -> None:
    """It is no end of it, which would count as a user who has nothing more to say."""
    users = data.simulated_users("dev", 3)

    def answer(prompt: str, count: int) -> tuple[int, Any]:
        messages = endpoint.requests[-1]["messages"]
        who = next(i for i, user in enumerate(users) if user.topic in messages[0]["content"])
        turn = sum(message["role"] == "assistant" for message in messages)
        if who == 0 and turn == 1:
            return 200, completion("<think>Now I should", "length")
        return 200, "END" if who == 1 and turn == 1 else f"user {who}, turn {turn + 1}"

    endpoint.answer = answer
    ask = user_model(settings(endpoint), 0, arms.folder / "users.jsonl")
    played = simulated_conversations(arms, users, 3, ask, "base", {})
    assert [(turn.going, turn.lost) for turn in played] == [([0, 1, 2], ()), ([2], (0,)), ([2], (0,))]
    floor = build_floor(tau=0.0)
    ruler = Ruler(floor.directions, torch.zeros(len(floor.layers)), torch.ones(len(floor.layers)))
    suite = simulated_suite(users, {"base": played, "tuned": played[:1]}, ruler, floor)
    for metric in suite.metrics[:1]:
        assert [np.isnan(value) for value in metric.values["base"]] == [True, False, False]
    assert [np.isnan(value) for value in suite.metrics[2].values["tuned"]] == [True, False, False]  # paired
    going = [(row.arms["base"].value, row.arms["base"].n) for row in suite.tables[0].rows]
    assert going == [(1.0, 2), (0.5, 2), (0.5, 2)]
    assert len(suite.warnings) == 1 and "1 of 3 conversations of base" in suite.warnings[0]
    # the same command asks the one that said nothing, and pays for no other twice
    asked = len(endpoint.asked)
    endpoint.answer = lambda prompt, count: (200, "Well then.")
    again = simulated_conversations(
        arms, users, 2, user_model(settings(endpoint), 0, arms.folder / "users.jsonl"), "base", {}
    )
    assert [(turn.going, turn.lost) for turn in again] == [([0, 1, 2], ()), ([0, 2], ())] and len(
        endpoint.asked
    ) == asked + 1


def test_users_who_only_think_from_the_first_are_told_with_the_remedy(arms: Arms, endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, completion("<think>So I am", "length"))
    ask = user_model(settings(endpoint), 0)
    with pytest.raises(UserError, match="said nothing aloud") as caught:
        simulated_conversations(arms, data.simulated_users("dev", 2), 2, ask, "base", {})
    assert "max_tokens" in caught.value.remedy and "enable_thinking" in caught.value.remedy


def test_a_local_user_s_thoughts_are_not_said_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it samples is put in its mouth; a message that is cut is still one, but for a thought."""
    save_model(tmp_path / "user")
    tries: list[int] = []
    texts = ["<think>Me.</think>Hello.", "Hello, I am", "<think>The persona"]

    def sampled(model: Any, form: Any, chats: Any, options: Any, **_: Any) -> list[Answer]:
        tries.append(len(chats))
        return [
            Answer(i, next(text for text in texts if text == chat[-1]["content"]), [], False)
            for i, chat in enumerate(chats)
        ]

    monkeypatch.setattr("trimtab.eval.measures.simulated.sample_answers", sampled)
    ask = user_model(JudgeSection(model=str(tmp_path / "user")).model_dump(), seed=0)
    assert ask([[{"role": "user", "content": text}] for text in texts], 0) == ["Hello.", "Hello, I am", None]
    assert tries == [3, 1, 1]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("END", ""), (" end. ", ""), ("Thank you, that is all. END", ""), ("That is all.END.", ""),
        ("I LOVE THE WEEKEND", "I LOVE THE WEEKEND"), ("In the end it was fine.", "In the end it was fine."),
    ],
)  # fmt: skip
def test_an_end_is_a_word_of_its_own(reply: str, said: str, arms: Arms) -> None:
    played = simulated_conversations(
        arms, data.simulated_users("dev", 1), 1, lambda chats, turn: [reply] * len(chats), "base", {}
    )
    assert [turn.said for turn in played] == ([[said]] if said else [])


def test_a_conversation_that_ends_sooner_did_not_fall_sooner() -> None:
    """The base falls in its sixth turn; the tuned model never does, and its user ends after three."""
    floor = build_floor(tau=0.0)
    ruler = Ruler(floor.directions, torch.zeros(len(floor.layers)), torch.ones(len(floor.layers)))

    def turn(height: float) -> SimulatedTurn:
        return SimulatedTurn([0], ["x"], Answers(["x"], height * floor.directions[None], [[]], [True]))

    played = {"base": [turn(1.0)] * 5 + [turn(-1.0)], "tuned": [turn(1.0)] * 3, "base+cap": [turn(1.0), turn(-1.0)] * 2}
    suite = simulated_suite(data.simulated_users("dev", 1), played, ruler, floor)
    values = next(metric.values for metric in suite.metrics if metric.id == "turns_above_floor")
    assert values == {"base": [3.0], "tuned": [3.0], "base+cap": [1.0]}


def test_a_local_model_plays_too(arms: Arms, tmp_path: Path) -> None:
    save_model(tmp_path / "user")
    ask = user_model(JudgeSection(model=str(tmp_path / "user"), max_tokens=12).model_dump(), seed=0)
    chats = [as_user(user, []) for user in data.simulated_users("dev", 2)]
    assert ask(chats, 0) == ask(chats, 0) and len(ask(chats, 0)) == 2


def test_figures_by_hand() -> None:
    """Two conversations: one of three turns that sinks below the floor in its second, one of a single turn above it."""
    floor = build_floor(tau=0.0)
    ruler = Ruler(floor.directions, torch.zeros(len(floor.layers)), torch.ones(len(floor.layers)))

    def at(*heights: float) -> torch.Tensor:
        return torch.stack([height * floor.directions for height in heights])

    def answers(means: torch.Tensor) -> Answers:
        return Answers(["x"] * len(means), means, [[]] * len(means), [True] * len(means))

    turns = [
        SimulatedTurn([0, 1], ["a", "b"], answers(at(1.0, 2.0))),
        SimulatedTurn([0], ["c"], answers(at(-1.0))),
        SimulatedTurn([0], ["d"], answers(at(-3.0))),
    ]
    users = data.simulated_users("dev", 2)
    suite = simulated_suite(users, {"base": turns, "tuned": turns[:1]}, ruler, floor)
    values = {metric.id: metric.values for metric in suite.metrics}
    assert values["z_simulated"]["base"] == pytest.approx([-1.0, 2.0])
    assert values["simulated_drift"]["base"][0] == pytest.approx(-2.0) and np.isnan(
        values["simulated_drift"]["base"][1]
    )
    assert values["turns_above_floor"]["base"] == [1.0, 1.0] and values["turns_above_floor"]["tuned"] == [1.0, 1.0]
    going = [(row.arms["base"].value, row.arms["tuned"].value) for row in suite.tables[0].rows]
    assert going == [(1.0, 1.0), (0.5, 0.0), (0.5, 0.0)]
    assert np.isnan(slopes(np.asarray([[1.0], [np.nan]]))[0])
