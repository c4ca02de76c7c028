"""Judges: what is an answer, and a real HTTP server as their endpoint, with all that may go wrong on the way."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_tokenizer, save_model
from judge_endpoint import KEY, Endpoint, completion, dripping, refusal
from pydantic import ValidationError

from trimtab.axis.addresses import address_fault, is_local, key_name_fault
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.endpoint import LARGEST_REPLY, REFUSED_AT_FIRST, _asked_to_wait
from trimtab.axis.errors import UserError
from trimtab.axis.extraction import RolloutItem
from trimtab.axis.judge import (
    assistant_judge,
    check_endpoint,
    opening_of,
    read_score,
    role_judge,
    rubric_prompt,
    scoring_judge,
)
from trimtab.axis.replies import Missing, spoken
from trimtab.axis.sampling import Answer
from trimtab.eval.stages import check_files
from trimtab.pipeline.instrument import axis_stage
from trimtab.pipeline.run import Run, open_run
from trimtab.recipes.loader import RecipeError, recipe_of
from trimtab.recipes.schema import JudgeSection, deciding
from trimtab.train.rehearsal import rehearse
from trimtab.train.rewards import Judge

ITEM = RolloutItem(role="pirate", system="You are a {pirate}.", question="Why 100%?", half=0)
CUT_THOUGHT = "<think>\n1.  **Analyze"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What the log says."""
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="trimtab"):
        yield caplog


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("3", 3), (" 0\n", 0), ("**1**", 1), ("2.", 2), ('"2"', 2), ("`1`", 1), ("“3”.", 3), ("(2)", 2), ("[0]", 0),
        ("Score: 2", 2), ("**Score:** 2", 2), ("Rating: 2.", 2), ("answer = 1", 1), ('{"score": 1}', 1), ('{"rating":0}', 0),
        ("", None), ("4", None), ("-1", None), ("+1", None), ("2.5", None), ("2,", None), ("10", None), ("02", None),
        ("3/3", None), ("1 or 2", None), ("5, not 3", None), ("three", None), ("7 of 2", None), ("²", None), ("１", None),
        ("3 - fully in the role", None), ("1.  **Analyze", None), ("1. Analyze the answer", None), ("- 2", None),
        ("1)", None), ("1\n2", None), ("1...", None), ("Rate 0 to 3: 2", None), ("It is 2", None), ("Step 1", None),
        ('{"score": 1.5}', None), ('{"score": true}', None), ('{"score": "1"}', None), ('{"score": 1, "of": 3}', None),
        ('{"score": [1]}', None), ("{1}", None), ("{", None), ('{"a":' * 100_000, None), ("*" * 100_000 + "1 x", None),
    ],
)  # fmt: skip
def test_a_score_is_a_reply_that_is_a_score_and_nothing_else(reply: str, score: int | None) -> None:
    assert read_score(reply) == score


def test_the_highest_score_has_two_digits() -> None:
    assert [read_score(reply, 10) for reply in ("10", "1", "11", "100")] == [10, 1, None, None]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("2", "2"), ("<think>It is 1.</think>\n\n2", "2"), ("<think>\n\n</think>\n\n2", "2"),
        ("It is 1, or 3.\n</think>\n2", "2"),  # the template opened it
        ("<thinking>1</thinking> 2", "2"), ("<THOUGHT>1</Thought>2", "2"), ("[THINK]1[/THINK]2", "2"),
        ("<|START_THINKING|>1<|END_THINKING|>2", "2"), ("<|begin_of_thought|>1<|end_of_thought|>2", "2"),
        ("◁think▷1◁/think▷2", "2"), ("<seed:think>1</seed:think>2", "2"), ("<reasoning>1</reasoning>2", "2"),
        ("<|channel|>analysis<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2", "2"),
        ("<|channel>thought\n1<channel|>2", "2"),
        ("<think>a<think>b</think>c</think>2", "2"), ("Yes. <think>1</think>No.", "Yes. No."),
        ("<think>1</think>a<think>2</think>b", "ab"), ("<think>1</think>", ""),
        (CUT_THOUGHT, None), ("<think>1</think>2<think>3", None), ("<|channel|>analysis<|message|>1", None),
        ("<|channel>thought\n1", None), ("[thinking] well, 2", "[thinking] well, 2"), ("I think 2", "I think 2"),
    ],
)  # fmt: skip
def test_thoughts_are_not_words(reply: str, words: str | None) -> None:
    assert spoken(reply) == words


def test_a_thought_that_the_template_opened_is_one() -> None:
    assert spoken("1. It is", "<|im_start|>assistant\n<think>\n") is None
    assert spoken("It is 1.</think>2", "<think>\n") == "2"
    assert spoken("2", "<|im_start|>assistant\n<think>\n\n</think>\n\n") == "2"
    chat = [{"role": "user", "content": "Is <think> a word? "}]
    # the chat format ends the thought that a template begins, where it knows how
    for begun, there in (("<think>\n", "<think>\n\n</think>\n\n"), ("◁think▷\n", "◁think▷\n")):
        form = ChatFormat(build_tokenizer(CHATML.replace("assistant\n", f"assistant\n{begun}")))
        assert opening_of(form, chat).endswith(f"assistant\n{there}") and "word" not in opening_of(form, chat)


def test_many_marks_take_no_time() -> None:
    before = time.monotonic()
    assert spoken("<think>" * 50_000) is None and spoken("</think>" * 50_000 + "2") == "2"
    assert time.monotonic() - before < 5


def test_the_prompt_holds_what_is_judged_and_leaves_braces_alone() -> None:
    prompt = rubric_prompt(ITEM, "Arr {ship}!")
    assert "You are a {pirate}." in prompt and "Why 100%?" in prompt and "Arr {ship}!" in prompt


def section(url: str | None, **changes: Any) -> JudgeSection:
    asked: dict[str, Any] = {"api_key_env": KEY, "timeout": 5.0, "backoff": 0.01, "retries": 2} if url else {}
    return JudgeSection(**{"endpoint": url, "model": "judge-1", **asked, **changes})


def settings(url: str | None, **changes: Any) -> dict[str, Any]:
    return section(url, **changes).model_dump()


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


@pytest.mark.slow
def test_a_local_judge_is_asked_through_its_template_s_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    seen: list[dict[str, Any]] = []

    class Seen(ChatFormat):
        def __init__(self, tokenizer: Any, template_kwargs: Any = None) -> None:
            super().__init__(tokenizer, template_kwargs)
            seen.append(self.template_kwargs)

    monkeypatch.setattr("trimtab.axis.chat_format.ChatFormat", Seen)
    local = settings(
        None, model=str(tmp_path), unreadable_retries=0, chat_template_kwargs={"enable_thinking": False}, max_tokens=4
    )
    assert scoring_judge(local, None, "eval.judge")(["one"], 3) == [Missing.UNREADABLE]
    assert seen == [{"enable_thinking": False}]


# How a reply ends, and what it says -> the score.
ENDS: list[tuple[bytes, int | Missing]] = [
    (completion("2"), 2),
    (completion("2", None), 2),  # some servers don't say why a reply ended
    (completion("<think>First, 1.</think>\n2"), 2),
    (completion("2", reasoning_content="1. Analyze"), 2),
    (completion([{"type": "thinking", "thinking": "1"}, {"type": "text", "text": "2"}]), 2),
    (completion(CUT_THOUGHT, "length"), Missing.UNREADABLE),
    (completion(CUT_THOUGHT), Missing.UNREADABLE),
    (completion("1", "length"), Missing.UNREADABLE),  # of 10, or of "1. Analyze"
    (completion("<think>1</think>1", "length"), Missing.UNREADABLE),
    (completion(None, "length", reasoning_content="1"), Missing.UNREADABLE),
    (completion("", "content_filter"), Missing.REFUSED),
]


@pytest.mark.parametrize(("body", "score"), ENDS, ids=[f"{body[24:90]!r}" for body, _ in ENDS])
def test_a_thought_and_a_cut_reply_are_no_score(endpoint: Endpoint, body: bytes, score: Any) -> None:
    endpoint.answer = lambda prompt, count: (200, body)
    judge = scoring_judge(settings(endpoint.url, unreadable_retries=1), None, "eval.judge")
    assert judge(["one"], 3) == [score]
    assert len(endpoint.asked) == (2 if score is Missing.UNREADABLE else 1)


def test_a_judge_that_is_cut_is_told_of_once_with_the_remedy(endpoint: Endpoint, said: Any) -> None:
    endpoint.answer = lambda prompt, count: (200, completion(CUT_THOUGHT, "length"))
    judge = scoring_judge(settings(endpoint.url, max_tokens=8), None, "eval.judge")
    assert judge(["one", "two"], 3) == [Missing.UNREADABLE] * 2
    assert said.text.count("was cut at 8 tokens") == 1 and "max_tokens" in said.text and "enable_thinking" in said.text
    assert {request["max_tokens"] for request in endpoint.requests} == {8}


LOCAL: list[tuple[str, bool, int | Missing]] = [
    ("2", True, 2), ("<think>1.</think>2", True, 2),
    ("2", False, Missing.UNREADABLE), (CUT_THOUGHT, True, Missing.UNREADABLE), (CUT_THOUGHT, False, Missing.UNREADABLE),
]  # fmt: skip


def test_a_local_judge_is_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    """What it samples is put in its mouth: a tiny model says no digits."""
    save_model(tmp_path)
    asked: list[float] = []

    def sampled(model: Any, form: Any, chats: Any, options: Any, **_: Any) -> list[Answer]:
        asked.append(options.temperature)
        found = [next(row for row in LOCAL if repr(row) == chat[0]["content"]) for chat in chats]
        return [Answer(i, text, [], ended) for i, (text, ended, _) in enumerate(found)]

    monkeypatch.setattr("trimtab.axis.sampling.sample_answers", sampled)
    judge = scoring_judge(settings(None, model=str(tmp_path), unreadable_retries=1), None, "eval.judge")
    assert judge([repr(row) for row in LOCAL], 3) == [score for _, _, score in LOCAL]
    assert (
        asked == [0.0, 0.7]
        and "were cut at 32 tokens" in said.text
        and "3 of 5 have no answer: unreadable" in said.text
    )


BROKEN: dict[str, tuple[int, Any]] = {
    "no json": (200, b"<html>"),
    "no choices": (200, b"{}"),
    "an error": (200, refusal("overloaded")),
    "empty choices": (200, b'{"choices": []}'),
    "a list": (200, b"[]"),
    "null choices": (200, b'{"choices": null}'),
    "nested": (200, b"[" * 100_000),
    "server error": (500, b"oops"),
    "busy": (429, b"later"),
    "conflict": (409, b""),
    "slow": (408, b""),
}
UNREADABLE: dict[str, tuple[int, Any]] = {
    "words": (200, "It is a pirate."),
    "null content": (200, b'{"choices": [{"message": {"content": null}}]}'),
    "out of range": (200, "4"),
}


@pytest.mark.parametrize("kind", [*BROKEN, *UNREADABLE])
def test_what_is_missing_is_asked_again(endpoint: Endpoint, kind: str) -> None:
    given = (BROKEN | UNREADABLE)[kind]
    endpoint.answer = lambda prompt, count: given if "muddle" in prompt and count < 3 else (200, "3")
    assert role_judge(settings(endpoint.url))([(ITEM, "clear"), (ITEM, "muddle")]) == [3, 3]
    assert sum("muddle" in prompt for prompt in endpoint.asked) == 3
    assert sum("clear" in prompt for prompt in endpoint.asked) == 1  # only what is missing is asked again


def test_not_answered_is_not_unreadable(endpoint: Endpoint, said: Any) -> None:
    endpoint.answer = lambda prompt, count: {"a": (200, "1"), "b": (503, b"full"), "c": (200, "4"), "d": (200, "0")}[
        prompt
    ]
    judge = scoring_judge(settings(endpoint.url, unreadable_retries=1), None, "eval.judge")
    assert judge(["a", "b", "c", "d"], 3) == [1, Missing.UNANSWERED, Missing.UNREADABLE, 0]
    assert [endpoint.asked.count(prompt) for prompt in "abcd"] == [1, 3, 2, 1]
    assert "1 of 4 have no answer: unreadable ('4')" in said.text
    assert "1 of 4 have no answer: not answered (503: full)" in said.text


def test_it_backs_off_longer_each_time(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (200, "3") if count == 4 else (500, b"")
    assert scoring_judge(settings(endpoint.url, backoff=0.05, retries=3), None, "eval.judge")(["x"], 3) == [3]
    gaps = [after - before for before, after in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert len(gaps) == 3
    for gap, least in zip(gaps, (0.05, 0.1, 0.2), strict=True):
        assert least * 0.95 <= gap < least + 3  # twice as long each time, and some chance upon it


def test_it_waits_as_long_as_it_is_asked_to_and_so_do_the_other_requests(endpoint: Endpoint) -> None:
    refused: list[float] = []

    def answer(prompt: str, count: int) -> tuple[Any, ...]:
        if prompt == "b" and count == 1:
            refused.append(time.monotonic())
            return 429, b"", {"Retry-After": "0.4"}
        time.sleep(0.1 if prompt == "c" else 0.0)  # until the other has heard it
        return 200, "3"

    endpoint.answer = answer
    judge = scoring_judge(settings(endpoint.url, concurrency=2), None, "eval.judge")
    assert judge([*"abcdef"], 3) == [3] * 6
    again = endpoint.times[len(endpoint.times) - 1 - endpoint.asked[::-1].index("b")]
    assert again - refused[0] >= 0.38
    assert sum(refused[0] + 0.05 < when < refused[0] + 0.38 for when in endpoint.times) == 0


def test_a_wait_may_be_a_date() -> None:
    assert _asked_to_wait("7") == 7 and _asked_to_wait("0") == 0 and _asked_to_wait("-3") == 0
    assert _asked_to_wait(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert _asked_to_wait(formatdate(time.time() - 30, usegmt=True)) == 0
    assert [_asked_to_wait(header) for header in (None, "", "soon", "nan", "inf")] == [None] * 5


def test_a_wait_that_is_too_long_stops_at_once_and_says_so(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (429, refusal("quota"), {"Retry-After": "3600"})
    with pytest.raises(UserError, match=r"asks to wait 3600 s .*quota") as caught:
        scoring_judge(settings(endpoint.url), None, "eval.judge")(["x"], 3)
    assert len(endpoint.asked) == 1 and "run the same command again" in caught.value.remedy


def test_an_endpoint_that_fails_stops_the_work_and_what_it_answered_is_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "kept.jsonl"
    prompts = [f"prompt {i}" for i in range(40)]
    endpoint.answer = lambda prompt, count: (200, "2") if len(endpoint.asked) <= 11 else (502, b"bad gateway")
    asking = settings(endpoint.url, concurrency=1, retries=1)
    with pytest.raises(
        UserError, match=r"did not answer 3 requests in a row; the last time: 502: bad gateway"
    ) as caught:
        scoring_judge(asking, cache, "eval.judge")(prompts, 3)
    assert caught.value.key == "eval.judge.endpoint" and "same command again" in caught.value.remedy
    assert len(endpoint.asked) == 11 + 3 * 2  # not one request for each of the other prompts
    endpoint.answer = lambda prompt, count: (200, "2")
    assert scoring_judge(asking, cache, "eval.judge")(prompts, 3) == [2] * 40
    assert len(endpoint.asked) == 17 + 40 - 11  # and only those are asked again


def test_an_endpoint_that_is_not_there_is_told(endpoint: Endpoint) -> None:
    endpoint.close()
    with pytest.raises(UserError, match="did not answer 3 requests in a row"):
        scoring_judge(settings(endpoint.url, retries=0), None, "eval.judge")(["a", "b", "c"], 3)


@pytest.mark.parametrize(
    ("status", "body"), [(402, b"Payment Required"), (429, refusal("Pay", code="insufficient_quota"))]
)
def test_an_account_that_is_spent_is_told_at_once(endpoint: Endpoint, status: int, body: bytes) -> None:
    endpoint.answer = lambda prompt, count: (status, body)
    with pytest.raises(UserError, match=rf"answered {status}: .*Pay") as caught:
        scoring_judge(settings(endpoint.url, retries=9), None, "eval.judge")(["a", "b"], 3)
    assert len(endpoint.asked) == 1 and "top it up" in caught.value.remedy


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refused_request_is_told_at_once_with_its_body(endpoint: Endpoint, status: int) -> None:
    endpoint.answer = lambda prompt, count: (status, refusal(f"no such thing; your key: secret {'x' * 2000}"))
    with pytest.raises(UserError, match=rf"answered {status}: .*no such thing; your key: \[the key\]") as caught:
        scoring_judge(settings(endpoint.url), None, "eval.judge")([f"prompt {i}" for i in range(30)], 3)
    assert (caught.value.key or "").startswith("eval.judge") and "secret" not in str(caught.value)
    assert len(endpoint.asked) == 1 and len(str(caught.value)) < 1000


def test_a_refusal_names_the_remedy(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (400, refusal("Unrecognized request argument: chat_template_kwargs"))
    with pytest.raises(UserError) as caught:
        scoring_judge(settings(endpoint.url, chat_template_kwargs={"a": 1}), None, "eval.judge")(["x"], 3)
    assert "remove chat_template_kwargs" in caught.value.remedy


def test_parameters_that_it_wants_otherwise_are_sent_otherwise_and_remembered(endpoint: Endpoint, said: Any) -> None:
    def answer(prompt: str, count: int) -> tuple[int, Any]:
        request = endpoint.requests[-1]
        if "max_tokens" in request:
            wanted = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return 400, refusal(f"Unsupported parameter: {wanted}", param="max_tokens")
        if "temperature" in request:
            return 400, refusal("'temperature' does not support 0.0; only 1 is supported.", param="temperature")
        return 200, "3"

    endpoint.answer = answer
    judge = scoring_judge(settings(endpoint.url, max_tokens=77, concurrency=1), None, "eval.judge")
    assert judge([*"abcd"], 3) == [3] * 4 and judge(["e"], 3) == [3]
    assert len(endpoint.asked) == 2 + 5
    assert endpoint.requests[-1]["max_completion_tokens"] == 77 and "temperature" not in endpoint.requests[-1]
    assert said.text.count("takes no temperature") == 1


def test_a_parameter_that_stays_refused_is_told(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (400, refusal("max_completion_tokens and temperature are both wrong"))
    with pytest.raises(UserError, match="both wrong"):
        scoring_judge(settings(endpoint.url), None, "eval.judge")(["x"], 3)
    assert len(endpoint.asked) == 3


def test_one_prompt_that_is_refused_does_not_stop_the_others(endpoint: Endpoint, said: Any) -> None:
    filtered = (400, refusal("The response was filtered", code="content_filter"))
    endpoint.answer = lambda prompt, count: filtered if prompt == "b" else (200, "1")
    assert scoring_judge(settings(endpoint.url), None, "eval.judge")([*"abc"], 3) == [1, Missing.REFUSED, 1]
    assert endpoint.asked.count("b") == 1 and "1 of 3 have no answer: refused (400: " in said.text
    endpoint.answer = lambda prompt, count: filtered
    with pytest.raises(UserError, match=f"refused the first {REFUSED_AT_FIRST} requests"):
        scoring_judge(settings(endpoint.url), None, "eval.judge")([f"prompt {i}" for i in range(100)], 3)


@pytest.mark.parametrize(
    "given",
    [
        (200, completion(None, refusal="I won't rate this.")),
        (200, completion(None, "content_filter")),
        (413, b"Payload Too Large"),
        (400, refusal("the request exceeds the available context size", type="exceed_context_size_error")),
        (422, refusal("prompt is too long")),
    ],
)
def test_what_is_a_matter_of_one_prompt_is_refused(endpoint: Endpoint, given: Any) -> None:
    endpoint.answer = lambda prompt, count: given if prompt == "b" else (200, "1")
    assert scoring_judge(settings(endpoint.url), None, "eval.judge")([*"abc"], 3) == [1, Missing.REFUSED, 1]
    assert endpoint.asked.count("b") == 1


@pytest.mark.parametrize("status", [200, 400])
def test_a_charset_that_the_body_is_not_in_changes_nothing(endpoint: Endpoint, status: int) -> None:
    header = {"Content-Type": "application/json; charset=utf-16"}
    filtered = refusal("filtered", code="content_filter")
    endpoint.answer = lambda prompt, count: (status, completion("1") if status == 200 else filtered, header)
    expected = 1 if status == 200 else Missing.REFUSED
    assert scoring_judge(settings(endpoint.url), None, "eval.judge")(["x"], 3) == [expected]


@pytest.mark.parametrize("limit", [1, 4])
def test_several_are_asked_at_once_up_to_a_limit(endpoint: Endpoint, limit: int) -> None:
    def answer(prompt: str, count: int) -> tuple[int, str]:
        time.sleep(0.03)
        return 200, prompt[-1]

    endpoint.answer = answer
    prompts = [f"{i}: {i % 4}" for i in range(20)]
    judge = scoring_judge(settings(endpoint.url, concurrency=limit), None, "eval.judge")
    assert judge(prompts, 3) == [i % 4 for i in range(20)]
    assert min(limit, 2) <= endpoint.most_at_once <= limit and sorted(endpoint.asked) == sorted(prompts)


def test_the_same_prompt_is_asked_once(endpoint: Endpoint) -> None:
    assert scoring_judge(settings(endpoint.url), None, "eval.judge")(["a", "b", "a", "a"], 3) == [3] * 4
    assert sorted(endpoint.asked) == ["a", "b"]


def test_a_reply_that_drips_in_is_given_up(endpoint: Endpoint, said: Any) -> None:
    endpoint.answer = lambda prompt, count: (200, dripping(completion("2") * 3, 0.02)) if prompt == "b" else (200, "1")
    before = time.monotonic()
    judge = scoring_judge(settings(endpoint.url, timeout=0.5, retries=1), None, "eval.judge")
    assert judge([*"abc"], 3) == [1, Missing.UNANSWERED, 1]
    assert time.monotonic() - before < 10 and "no whole reply within 0.5 s" in said.text
    # an error's body as well
    endpoint.answer = lambda prompt, count: (500, dripping(b"x" * 500, 0.02)) if prompt == "e" else (200, "1")
    assert judge([*"de"], 3) == [1, Missing.UNANSWERED]


@pytest.mark.parametrize("status", [200, 500, 400])
def test_a_reply_that_is_too_large_is_not_read(endpoint: Endpoint, status: int, tmp_path: Path, said: Any) -> None:
    sent: list[int] = []

    def huge() -> Iterator[bytes]:
        for _ in range(50):
            sent.append(LARGEST_REPLY)
            yield b"x" * LARGEST_REPLY

    endpoint.answer = lambda prompt, count: (status, huge()) if prompt == "b" else (200, "1")
    judge = scoring_judge(settings(endpoint.url, retries=0), tmp_path / "kept.jsonl", "eval.judge")
    assert judge([*"abc"], 3) == [1, Missing.UNANSWERED, 1]
    assert "larger than 1 MiB" in said.text and sum(sent) < 20 * LARGEST_REPLY
    assert (tmp_path / "kept.jsonl").stat().st_size < 1000


def test_long_replies_are_not_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompt, count: (
        200,
        f"<think>{'x' * 500_000}</think>2" if prompt == "a" else "y" * 500_000,
    )
    judge = scoring_judge(settings(endpoint.url, unreadable_retries=0), tmp_path / "kept.jsonl", "eval.judge")
    assert judge(["a", "b"], 3) == [2, Missing.UNREADABLE]
    (kept,) = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert json.loads(kept)["reply"] == "2"


def test_a_redirect_is_told_and_the_key_stays_here(endpoint: Endpoint) -> None:
    other = Endpoint()
    endpoint.answer = lambda prompt, count: (307, b"", {"Location": f"{other.url}/chat/completions?token=t"})
    with pytest.raises(UserError, match="redirects") as caught:
        scoring_judge(settings(endpoint.url), None, "eval.judge")(["x"], 3)
    other.close()
    assert not other.asked and "token" not in str(caught.value) and caught.value.key == "eval.judge.endpoint"


def test_a_redirect_within_the_endpoint_is_told_whole(endpoint: Endpoint) -> None:
    endpoint.answer = lambda prompt, count: (308, b"", {"Location": "/v2/chat/completions"})
    with pytest.raises(UserError, match=r"redirects \(308\) to http://127\.0\.0\.1/v2/chat/completions"):
        scoring_judge(settings(endpoint.url), None, "eval.judge")(["x"], 3)


def test_a_loop_that_runs_already_is_no_obstacle(endpoint: Endpoint) -> None:
    async def notebook() -> Any:
        return scoring_judge(settings(endpoint.url), None, "eval.judge")(["a", "b"], 3)

    assert asyncio.run(notebook()) == [3, 3]


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(UserError, match=f"{KEY} is not set") as caught:
        check_endpoint(settings("https://api.example.com/v1"), "eval.judge")
    assert caught.value.key == "eval.judge.api_key_env" and "api_key_env: null" in caught.value.remedy
    check_endpoint(settings("https://api.example.com/v1", api_key_env=None), "eval.judge")
    check_endpoint(settings("http://10.0.0.7:8000/v1"), "eval.judge")
    check_endpoint(settings(None), "eval.judge")
    check_endpoint(None, "eval.judge")


def rehearsed(run: Run) -> None:
    rehearse(run.loaded)


JUDGED = {"endpoint": "https://api.example.com/v1", "model": "j", "api_key_env": KEY}


@pytest.mark.parametrize(
    ("sections", "stage", "key"),
    [
        ({"axis": {"judge": JUDGED}}, axis_stage, "axis.judge"),
        ({"method": {"name": "grpo", "rewards": [{"name": "judge", "judge": JUDGED}]}}, rehearsed, "method.rewards.0.judge"),
        ({"eval": {"judge": JUDGED, "susceptibility_roles": 1}}, check_files, "eval.judge"),
        ({"eval": {"user": JUDGED, "simulated_users": 1}}, check_files, "eval.user"),
    ],
)  # fmt: skip
def test_a_missing_key_is_told_before_a_model_is_loaded(
    sections: dict[str, Any], stage: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Any
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr("trimtab.pipeline.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"model": {"name": str(model_folder("llama"))}, "train": {"max_steps": 1}, **sections}
    run = open_run(recipe_of(given, "r"), output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"{KEY} is not set") as caught:
        stage(run)
    assert caught.value.key == f"{key}.api_key_env"
    run.record("eval", [], {}, seconds=0.0)
    if stage is check_files:
        stage(run)  # what is done needs no key


def test_a_run_goes_on_where_a_judge_is_asked_more_patiently(tmp_path: Path) -> None:
    def opened(**changes: Any) -> Any:
        sections = {"model": {"name": "m"}, "train": {"max_steps": 1}, "axis": {"judge": {**JUDGED, **changes}}}
        return open_run(recipe_of(sections, "r"), output_dir=str(tmp_path / "run"))

    run = opened()
    run.record("axis", run.inputs("axis"), {}, seconds=0.0)
    opened(timeout=600.0, retries=20, concurrency=2, requests_per_minute=10.0, api_key_env="OTHER")
    with pytest.raises(UserError, match="max_tokens"):
        opened(max_tokens=9)


@pytest.mark.parametrize("named", [True, False])
def test_a_server_on_this_machine_needs_no_key(
    endpoint: Endpoint, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    judge = scoring_judge(settings(endpoint.url, api_key_env=KEY if named else None), None, "eval.judge")
    assert judge(["x"], 3) == [3] and endpoint.keys == {None}


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_line_s_end_is_no_part_of_a_key(endpoint: Endpoint, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, f"secret{end}")
    assert scoring_judge(settings(endpoint.url), None, "eval.judge")(["x"], 3) == [3]
    assert endpoint.keys == {"Bearer secret"}


@pytest.mark.parametrize("key", ["sec\nret", "sec\rret", "sec ret", "sécret"])
def test_a_key_that_no_header_takes_is_refused_unseen(
    endpoint: Endpoint, key: str, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UserError, match=KEY) as caught:
        scoring_judge(settings(endpoint.url), None, "eval.judge")
    assert "sec" not in str(caught.value) + said.text and "cret" not in str(caught.value) and not endpoint.asked


def test_a_missing_package_names_the_command(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trimtab.axis.endpoint")
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(UserError, match="an endpoint needs tenacity") as caught:
        scoring_judge(settings(endpoint.url), None, "eval.judge")
    assert "pip install 'trimtab[judge]'" in caught.value.remedy


ADDRESSES = {
    "https://api.openai.com/v1": "", "http://localhost:8000/v1/": "", "http://[::1]:8000": "", "http://vllm:8000/v1": "",
    "localhost:8000/v1": "is no address", "api.example.com": "is no address", "ftp://a.example/v1": "is no address",
    "http://": "is no address", "http:///v1": "is no address", "": "is no address", "http://a b/v1": "is no address",
    "http://a.example:99999/v1": "is no address", "http://a.example:x/v1": "is no address", "http://[::1/v1": "is no address",
    "https://a.example/v1/chat/completions": "goes too far", "https://a.example/v1/chat/completions/": "goes too far",
    "https://user:hunter2@a.example/v1": "password", "https://hunter2@a.example/v1": "password",
    "user:hunter2@a.example/v1": "password", "https://a.example/v1?key=hunter2": "more than an address",
    "https://a.example/v1#hunter2": "more than an address",
}  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses(address: str) -> None:
    told = address_fault(address)
    assert (told is None) == (ADDRESSES[address] == "") and ADDRESSES[address] in (told or ("",))[0]
    assert "hunter2" not in str(told)
    if told is None:
        return
    with pytest.raises(RecipeError) as caught:
        recipe_of(
            {"model": {"name": "m"}, "train": {"max_steps": 1}, "axis": {"judge": {"endpoint": address, "model": "j"}}},
            "r",
        )
    assert [fault.key for fault in caught.value.faults] == ["axis.judge.endpoint"] and "hunter2" not in str(
        caught.value
    )
    with pytest.raises(ValidationError) as alone:  # and where no recipe is: the error of the section itself
        section(address)
    assert "hunter2" not in str(alone.value)


@pytest.mark.parametrize(
    "key",
    ["sk-proj-4f9a8b7c6d5e", "sk-ant 1", "$OPENAI_API_KEY", "", "gsk_4f9a8b7c6d5e4f9a8b7c6d",
     "AIzaSyA4f9a8b7c6d5e4f9a8b", "1KEY", "ä"],
)  # fmt: skip
def test_a_key_in_the_place_of_its_variable_s_name_is_refused_unseen(key: str) -> None:
    shown = key[3:] or "nothing"
    rewards = [{"name": "judge", "judge": {"endpoint": "http://localhost/v1", "model": "j", "api_key_env": key}}]
    for sections in (
        {"eval": {"judge": rewards[0]["judge"], "susceptibility_roles": 1}},
        {"method": {"name": "grpo", "rewards": rewards}},
    ):
        with pytest.raises(RecipeError) as caught:
            recipe_of({"model": {"name": "m"}, "train": {"max_steps": 1}, **sections}, "r")
        told = str(caught.value).replace("OPENAI_API_KEY", "")
        assert "api_key_env" in told and shown.replace("NAI_API_KEY", "-") not in told
    with pytest.raises(ValidationError) as alone:
        section("http://localhost/v1", api_key_env=key)
    assert shown not in str(alone.value).replace("OPENAI_API_KEY", "")


def test_names_of_variables_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [
        key_name_fault(name) for name in ("OPENAI_API_KEY", "KEY2", "my_own_key", "a_long_name_without_any_digit")
    ] == [None] * 4
    assert key_name_fault("my_key_of_2026_that_is_long") is not None
    monkeypatch.setenv("my_key_of_2026_that_is_long", "secret")
    assert key_name_fault("my_key_of_2026_that_is_long") is None  # it is there


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("http://localhost:1/v1", True), ("http://127.0.0.1/v1", True), ("http://[::1]:8000/v1", True),
        ("http://vllm:8000", True), ("http://192.168.1.4/v1", True), ("http://10.1.2.3/v1", True), ("http://box.local/v1", True),
        ("http://host.docker.internal:8000/v1", True), ("https://api.openai.com/v1", False), ("http://8.8.8.8/v1", False),
        ("https://localhost.example.com/v1", False),
    ],
)  # fmt: skip
def test_where_no_key_is_wanted(address: str, local: bool) -> None:
    assert is_local(address) == local


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"timeout": 3.0}, "timeout"), ({"concurrency": 2}, "concurrency"), ({"api_key_env": "K"}, "api_key_env"),
        ({"price_in": 1.0}, "price_in"), ({"endpoint": "http://a", "timeout": float("inf")}, "timeout"),
        ({"endpoint": "http://a", "concurrency": 100_000}, "concurrency"),
        ({"endpoint": "http://a", "max_tokens": 0}, "max_tokens"), ({"endpoint": "http://a", "model": ""}, "model"),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_or_cannot_be_are_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of({"model": {"name": "m"}, "train": {"max_steps": 1}, "axis": {"judge": {"model": "j", **given}}}, "r")
    assert [fault.key for fault in caught.value.faults] == [f"axis.judge.{key}"]


def test_how_a_judge_is_asked_decides_nothing() -> None:
    patient = {
        "timeout": 9.0,
        "retries": 9,
        "concurrency": 2,
        "api_key_env": None,
        "price_in": 1.0,
        "unreadable_retries": 0,
    }
    one, other = settings("http://a/v1"), settings("http://a/v1") | patient
    assert deciding(one) == deciding(other) and deciding({"axis": {"judge": one}}) == deciding(
        {"axis": {"judge": other}}
    )
    assert deciding({"rewards": [{"judge": one}]}) == deciding({"rewards": [{"judge": other}]})
    assert deciding(settings("http://a/v1", max_tokens=9)) != deciding(one) != deciding(settings("http://b/v1"))
    assert deciding({"timeout": 3, "retries": 1}) == {"timeout": 3, "retries": 1}  # no judge's


CHAT = [{"role": "system", "content": "You are a ghost."}, {"role": "user", "content": "Who are you?"}]


def test_the_assistant_judge_keeps_its_replies(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompt, count: (200, "10" if "Plainly" in prompt else "2")
    rows = [(CHAT, "Plainly, a program."), (CHAT, "Boo.")]
    cache = tmp_path / "judge.jsonl"
    assert assistant_judge(settings(endpoint.url), cache)(rows) == [10, 2]
    assert "system: You are a ghost.\nuser: Who are you?" in endpoint.asked[0]
    assert assistant_judge(settings(endpoint.url, concurrency=1), cache)([*rows, (CHAT, "Hello.")]) == [10, 2, 2]
    assert len(endpoint.asked) == 3
    for number, other in enumerate(({"model": "judge-2"}, {"max_tokens": 9}), start=1):
        assert assistant_judge(settings(endpoint.url) | other, cache)(rows) == [10, 2]
        assert len(endpoint.asked) == 3 + 2 * number


def test_what_was_kept_survives_a_kill_in_a_line(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "judge.jsonl"
    scoring_judge(settings(endpoint.url, concurrency=1), cache, "eval.judge")([*"abc"], 3)
    cache.write_bytes(cache.read_bytes()[:-7])
    assert scoring_judge(settings(endpoint.url), cache, "eval.judge")([*"abcd"], 3) == [3] * 4
    assert endpoint.asked[3:] == ["c", "d"] or endpoint.asked[3:] == ["d", "c"]
    assert (
        scoring_judge(settings(endpoint.url), cache, "eval.judge")([*"abcd"], 3) == [3] * 4 and len(endpoint.asked) == 5
    )


def test_an_unreadable_reply_is_never_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda prompt, count: (200, "11" if count == 1 else "7")
    cache = tmp_path / "judge.jsonl"
    assert assistant_judge(settings(endpoint.url, unreadable_retries=0), cache)([(CHAT, "x")]) == [None]
    assert assistant_judge(settings(endpoint.url), cache)([(CHAT, "x")]) == [7]
    assert assistant_judge(settings(endpoint.url), cache)([(CHAT, "x")]) == [7] and len(endpoint.asked) == 2


def test_an_extraction_stops_where_an_answer_is_not_judged(endpoint: Endpoint, tmp_path: Path) -> None:
    """It would be left out of the axis for good; an unreadable reply is the judge's word, and is left out."""
    cache, rows = tmp_path / "judge.jsonl", [(ITEM, text) for text in ("fine", "lost", "muddle")]
    endpoint.answer = lambda prompt, count: (
        (500, b"") if "lost" in prompt else (200, "hm") if "muddle" in prompt else (200, "3")
    )
    with pytest.raises(UserError, match="did not answer on 1 of 3") as caught:
        role_judge(settings(endpoint.url), cache)(rows)
    assert caught.value.key == "axis.judge.endpoint"
    asked = len(endpoint.asked)
    endpoint.answer = lambda prompt, count: (200, "hm" if "muddle" in prompt else "2")
    assert role_judge(settings(endpoint.url, unreadable_retries=0), cache)(rows) == [3, 2, None]
    assert len(endpoint.asked) == asked + 2


def test_a_reward_without_a_score_is_none_and_several_stop_the_run(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    endpoint.answer = lambda prompt, count: (
        (500, b"") if "lost" in prompt else (200, "hm" if "muddle" in prompt else "5")
    )
    reward = Judge(settings(endpoint.url, retries=0, unreadable_retries=0, concurrency=1), tmp_path / "judge.jsonl")
    turns = [[(CHAT, text)] for text in ("fine", "lost", "muddle")]
    ids = [[([1], [2])]] * 3  # which a judge does not read
    assert reward(turns=turns, turn_ids=ids) == [0.5, None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["judge-1.jsonl"]  # each process its own
    with pytest.raises(UserError, match="in a row"):
        reward(turns=[[(CHAT, f"lost {i}")] for i in range(3)], turn_ids=ids)


def test_requests_keep_to_their_rate_and_the_cost_is_said(endpoint: Endpoint, said: Any) -> None:
    reply = {"choices": [{"message": {"content": "5"}}], "usage": {"prompt_tokens": 1000, "completion_tokens": 10}}
    endpoint.answer = lambda prompt, count: (200, json.dumps(reply).encode())
    judge = assistant_judge(settings(endpoint.url, requests_per_minute=600.0, price_in=2.0, price_out=10.0))
    assert judge([(CHAT, text) for text in "abcd"]) == [5] * 4
    assert endpoint.times[-1] - endpoint.times[0] > 0.2  # three pauses of 0.1 s
    assert "4000 + 40 tokens so far, cost so far 0.0084" in said.text
