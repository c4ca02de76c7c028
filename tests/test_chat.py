"""Chats become token ids by the tokenizer's own template, with and without a system role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_tokenizer
from transformers import AutoTokenizer

from trimtab.axis import UserError
from trimtab.axis.chat import ChatFormat, chat


def test_the_template_and_nothing_else(form: ChatFormat) -> None:
    messages = chat("You are a pirate.", "Tell me about é ☃.")
    assert not form.folds_system
    text = "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nTell me about é ☃.<|im_end|>\n"
    assert form.prompt_text(messages) == text + "<|im_start|>assistant\n"
    ids = form.prompt_ids(messages)
    assert form.tokenizer.decode(ids) == form.prompt_text(messages)
    assert ids.count(form.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3, "special tokens stay whole"
    assert form.tokenizer.decode(form.answer_ids("Arr, é.")) == "Arr, é."
    assert form.end_token == form.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert form.end_ids == [form.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_an_empty_system_prompt_is_left_out() -> None:
    assert chat("", "hi") == [{"role": "user", "content": "hi"}]


def test_system_prompts_are_folded_where_the_template_refuses_them(tokenizer_without_system_folder: Path) -> None:
    form = ChatFormat(AutoTokenizer.from_pretrained(tokenizer_without_system_folder))
    messages = [*chat("You are a pirate.", "Hello"), {"role": "assistant", "content": "Arr"}]
    messages.append({"role": "user", "content": "More"})
    kept = [dict(message) for message in messages]
    assert form.folds_system
    assert form.fold(messages) == [{"role": "user", "content": "You are a pirate.\n\nHello"}, *messages[2:]]
    assert messages == kept, "the caller's messages are not touched"
    assert "<|im_start|>user\nYou are a pirate.\n\nHello<|im_end|>" in form.prompt_text(messages)
    assert form.fold(messages[1:]) == messages[1:]
    with pytest.raises(UserError, match="user turn after the system prompt"):
        form.fold([messages[0], messages[2]])


def test_a_template_that_drops_the_system_prompt_silently_is_noticed() -> None:
    silent = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    form = ChatFormat(build_tokenizer(silent))
    assert form.folds_system and "You are a pirate." in form.prompt_text(chat("You are a pirate.", "Hello"))


def test_template_arguments_reach_the_template() -> None:
    template = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tokenizer: Any = build_tokenizer(template)
    assert ChatFormat(tokenizer, {"enable_thinking": False}).prompt_text(chat("", "x")).endswith("<think></think>")
    assert "think" not in ChatFormat(tokenizer).prompt_text(chat("", "x"))


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(UserError, match="no chat template") as caught:
        ChatFormat(build_tokenizer(None))
    assert caught.value.key == "model.name" and "chat_template.jinja" in caught.value.remedy


def test_end_ids_of_a_tokenizer_with_several() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert ChatFormat(tokenizer).end_ids == [0, 2]
    assert ChatFormat(tokenizer).end_token == 2, "the one that the template writes"
    bare = build_tokenizer()
    bare.add_special_tokens({"unk_token": "<|endoftext|>"})
    assert 0 not in ChatFormat(bare).end_ids, "unknown tokens are no end of an answer"


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("folds", [True, False])
def test_what_stands_between_two_answers(tokenizer_without_system_folder: Path, ended: bool, folds: bool) -> None:
    """Prompt, answer, its end where it ended, and what stands between are the tokens of the chat up to the next answer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_without_system_folder) if folds else build_tokenizer()
    form = ChatFormat(tokenizer)
    assert form.folds_system == folds
    messages, user = (
        chat("You are a pirate.", "What is an answer probe?"),
        {"role": "user", "content": "And the grass?"},
    )
    answer = form.answer_ids("Arr.") + ([form.end_token] if ended else [])
    found = form.prompt_ids(messages) + answer + form.ids_between(messages, user, ended=ended)
    assert found == form.prompt_ids([*messages, {"role": "assistant", "content": "Arr."}, user])
