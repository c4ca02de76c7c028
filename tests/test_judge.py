"""The role judge: reading scores, and a real HTTP server as its endpoint."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import save_model
from judge_endpoint import KEY, Endpoint

from trimtab.axis.chat import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.extraction import RolloutItem
from trimtab.axis.judge import assistant_judge, read_score, role_judge, rubric_prompt, scoring_judge
from trimtab.recipes.schema import JudgeSection

ITEM = RolloutItem(role="pirate", system="You are a {pirate}.", question="Why 100%?", half=0)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("3", 3), (" 0\n", 0), ("Score: 2", 2), ("**1**", 1), ("3 - fully in the role", 3), ("Rating: 2.", 2),
        ("", None), ("4", None), ("-1", None), ("2.5", None), ("10", None), ("3/3", None), ("1 or 2", None),
        ("5, not 3", None), ("three", None), ("7 of 2", None),
    ],
)  # fmt: skip
def test_read_score(reply: str, score: int | None) -> None:
    assert read_score(reply) == score


def test_the_prompt_holds_what_is_judged_and_leaves_braces_alone() -> None:
    prompt = rubric_prompt(ITEM, "Arr {ship}!")
    assert "You are a {pirate}." in prompt and "Why 100%?" in prompt and "Arr {ship}!" in prompt


def settings(url: str, **changes: Any) -> dict[str, Any]:
    return JudgeSection(endpoint=url, model="judge-1", api_key_env=KEY, timeout=5.0, **changes).model_dump()


def test_scores_come_back_in_order(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, next(d for d in "0123" if f"answer {d}" in prompt))
    judge = role_judge(settings(endpoint.url + "/"))
    assert judge([(ITEM, f"answer {d}") for d in (2, 0, 3, 1)]) == [2, 0, 3, 1]
    assert endpoint.keys == {"Bearer secret"}
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "judge-1" and request["temperature"] == 0


def test_the_template_s_arguments_reach_the_endpoint_and_tell_replies_apart(endpoint: Endpoint, tmp_path: Path) -> None:
    plain = scoring_judge(settings(endpoint.url), tmp_path / "kept.jsonl", "eval.judge")
    quiet = scoring_judge(
        settings(endpoint.url, chat_template_kwargs={"enable_thinking": False}), tmp_path / "kept.jsonl", "eval.judge"
    )
    assert plain(["one"], 3) == quiet(["one"], 3) == [3]
    assert [request.get("chat_template_kwargs") for request in endpoint.requests] == [None, {"enable_thinking": False}]


def test_a_local_judge_is_asked_through_its_template_s_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    seen: list[dict[str, Any]] = []

    class Seen(ChatFormat):
        def __init__(self, tokenizer: Any, template_kwargs: Any = None) -> None:
            super().__init__(tokenizer, template_kwargs)
            seen.append(self.template_kwargs)

    monkeypatch.setattr("trimtab.axis.chat.ChatFormat", Seen)
    local = JudgeSection(model=str(tmp_path), retries=0, chat_template_kwargs={"enable_thinking": False})
    assert len(scoring_judge(local.model_dump(), None, "eval.judge")(["one"], 3)) == 1
    assert seen == [{"enable_thinking": False}]


BAD: dict[str, tuple[int, Any]] = {
    "words": (200, "It is a pirate."),
    "no json": (200, b"<html>"),
    "no choices": (200, b"{}"),
    "empty choices": (200, b'{"choices": []}'),
    "a list": (200, b"[]"),
    "null choices": (200, b'{"choices": null}'),
    "null content": (200, b'{"choices": [{"message": {"content": null}}]}'),
    "server error": (500, b"oops"),
    "busy": (429, b"later"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_an_unreadable_reply_is_asked_again(endpoint: Endpoint, kind: str) -> None:
    endpoint.answer = lambda prompt, count: BAD[kind] if "muddle" in prompt and count < 3 else (200, "3")
    assert role_judge(settings(endpoint.url, retries=3))([(ITEM, "clear"), (ITEM, "muddle")]) == [3, 3]
    assert sum("muddle" in prompt for prompt in endpoint.asked) == 3
    assert sum("clear" in prompt for prompt in endpoint.asked) == 1  # only what is missing is asked again


def test_what_stays_unreadable_is_missing_and_never_a_score(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, "4") if "muddle" in prompt else (200, "1")
    assert role_judge(settings(endpoint.url, retries=1))([(ITEM, "muddle"), (ITEM, "clear")]) == [None, 1]
    assert sum("muddle" in prompt for prompt in endpoint.asked) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_wrong_address_is_the_users(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda prompt, count: (status, b"{}")
    with pytest.raises(UserError, match=str(status)) as caught:
        role_judge(settings(endpoint.url))([(ITEM, "x")])
    assert caught.value.key == "axis.judge.endpoint" and "secret" not in str(caught.value)
    assert len(endpoint.asked) == 1


def test_an_address_without_http_is_the_users(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match="no address") as caught:
        role_judge(settings("localhost:8000/v1"))([(ITEM, "x")])
    assert "http" in caught.value.remedy


def test_a_missing_key_is_told_before_anything_is_asked(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)
    with pytest.raises(UserError, match=f"{KEY} is not set"):
        role_judge(settings(endpoint.url))
    assert not endpoint.asked


CHAT = [{"role": "system", "content": "You are a ghost."}, {"role": "user", "content": "Who are you?"}]


def test_the_assistant_judge_keeps_its_replies(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompt, count: (200, "10" if "Plainly" in prompt else "2")
    rows = [(CHAT, "Plainly, a program."), (CHAT, "Boo.")]
    cache = tmp_path / "judge.jsonl"
    assert assistant_judge(settings(endpoint.url), cache)(rows) == [10, 2]
    assert "system: You are a ghost.\nuser: Who are you?" in endpoint.asked[0]
    assert assistant_judge(settings(endpoint.url), cache)([*rows, (CHAT, "Hello.")]) == [10, 2, 2]
    assert len(endpoint.asked) == 3
    other = settings(endpoint.url) | {"model": "judge-2"}
    assert assistant_judge(other, cache)(rows) == [10, 2] and len(endpoint.asked) == 5


def test_an_unreadable_reply_that_was_kept_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompt, count: (200, "11" if count == 1 else "7")
    cache = tmp_path / "judge.jsonl"
    assert assistant_judge(settings(endpoint.url, retries=1), cache)([(CHAT, "x")]) == [7]
    assert assistant_judge(settings(endpoint.url, retries=0), cache)([(CHAT, "x")]) == [7] and len(endpoint.asked) == 2


def test_requests_keep_to_their_rate_and_the_cost_is_said(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = {"choices": [{"message": {"content": "5"}}], "usage": {"prompt_tokens": 1000, "completion_tokens": 10}}
    endpoint.answer = lambda prompt, count: (200, json.dumps(reply).encode())
    slept: list[float] = []
    monkeypatch.setattr("trimtab.axis.judge.time.sleep", slept.append)
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    judge = assistant_judge(settings(endpoint.url, requests_per_minute=60.0, price_in=2.0, price_out=10.0))
    with caplog.at_level(logging.INFO, logger="trimtab"):
        judge([(CHAT, text) for text in "abc"])
    assert len(slept) == 2 and all(0.5 < seconds <= 1.0 for seconds in slept)
    assert "3000 + 30 tokens so far, cost so far 0.0063" in caplog.text
