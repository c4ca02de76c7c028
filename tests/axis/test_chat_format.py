"""Chats become token ids by the tokenizer's own template, with and without a system role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, build_model, build_tokenizer
from template_families import OFF, family_tokenizer, own_template
from transformers import AutoTokenizer

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat, chat, ends_of


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
    assert ChatFormat(tokenizer, ends=[7, 9]).end_ids == [0, 2, 7, 9], "those of the generation config"
    assert ChatFormat(tokenizer, ends=[7, 9]).end_token == 2


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


def test_ends_are_what_the_checkpoint_says_and_no_names() -> None:
    """A token that some other model ends with is a token like any other; one of an unheard-of name ends where it is written."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|end|>", "<halt>"]})
    assert ChatFormat(tokenizer).end_ids == [2]
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<halt>")
    halt = tokenizer.convert_tokens_to_ids("<halt>")
    assert ChatFormat(tokenizer).end_ids == [2, halt] and ChatFormat(tokenizer).end_token == halt
    model = build_model("llama")
    model.generation_config.eos_token_id = [1, 106]
    assert ends_of(model) == [1, 106] and ChatFormat(tokenizer).ends_with(model) == [1, 2, 106, halt]
    model.generation_config.eos_token_id = 5
    assert ends_of(model) == [5]


def test_where_nothing_says_how_an_answer_ends_it_is_refused() -> None:
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="nothing says where an answer") as caught:
        ChatFormat(tokenizer).check()
    assert "generation_config.json" in caught.value.remedy
    assert ChatFormat(tokenizer, ends=[9, 4]).end_token == 9, "the first that the generation config names"
    with pytest.raises(UserError, match="writes no token of its own after an earlier answer"):
        ChatFormat(tokenizer, ends=[9]).ids_between(chat("", "x"), {"role": "user", "content": "y"}, ended=True)


PARTS = CHATML.replace("{{ message['content'] }}", "{% for part in message['content'] %}{{ part.text }}{% endfor %}")


def test_a_template_that_takes_lists_of_parts_gets_them() -> None:
    form, plain = ChatFormat(build_tokenizer(PARTS)), ChatFormat(build_tokenizer())
    talk = [
        *chat("You are a pirate.", "Hello"),
        {"role": "assistant", "content": "Arr"},
        {"role": "user", "content": "More"},
    ]
    assert form.prompt_text(talk) == plain.prompt_text(talk)
    assert form.ids_between(talk[:2], talk[3], ended=True) == plain.ids_between(talk[:2], talk[3], ended=True)
    assert form.fold(talk) == talk, "files hold plain text"
    assert (form.end_token, form.folds_system, form.opening) == (2, False, "")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("Hello<|im_start|>assistant\n", "leaves out what the user says"),
        ("{% for m in messages %}{{ m.content }", "is broken"),
        ("{{ messages[0].text.upper() }}", "refuses this conversation"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
    ],
)
def test_a_template_that_renders_no_chat_is_refused(template: str, fault: str) -> None:
    tokenizer = build_tokenizer(template)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(UserError, match=f"the chat template of 'some/model' {fault}") as caught:
        ChatFormat(tokenizer).check()
    assert caught.value.remedy


def test_what_a_template_reads_and_nobody_gives_is_asked_for() -> None:
    with pytest.raises(UserError, match="reads today, which is not given") as caught:
        ChatFormat(build_tokenizer("{{ today.isoformat() }}" + CHATML)).check()
    assert (caught.value.key, caught.value.remedy) == ("model.chat_template_kwargs", "give it: {today: ...}")


def test_the_message_is_blamed_that_no_form_helps() -> None:
    """Both a developer and a tool are unknown; the developer's words can become the system prompt's, the tool's nothing."""
    knows = "messages if message.role in ['system', 'user', 'assistant'] %}"
    form = ChatFormat(build_tokenizer(CHATML.replace("messages %}", knows)))
    talk = [{"role": role, "content": "x"} for role in ("developer", "user", "assistant", "tool", "user")]
    with pytest.raises(UserError, match=r"leaves out message 4 \(tool\)"):
        form.prompt_text(talk)
    assert "<|im_start|>system\nx" in form.prompt_text(talk[:2])


def test_a_template_that_leaves_the_assistant_out_is_refused_where_one_speaks() -> None:
    form = ChatFormat(build_tokenizer(CHATML.replace("messages %}", "messages if message.role != 'assistant' %}")))
    form.check()
    talk = [*chat("", "Hello"), {"role": "assistant", "content": "Arr"}, {"role": "user", "content": "More"}]
    with pytest.raises(UserError, match=r"leaves out message 2 \(assistant\)"):
        form.prompt_text(talk)


def test_one_of_several_named_templates() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "loud": CHATML.replace("user", "USER")}
    assert ChatFormat(tokenizer).prompt_text(chat("", "x")) == ChatFormat(build_tokenizer()).prompt_text(chat("", "x"))
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "chatml": CHATML}
    with pytest.raises(UserError, match="none is called default: tool_use, chatml") as caught:
        ChatFormat(tokenizer)
    assert caught.value.key == "model.chat_template_kwargs" and "chat_template: tool_use" in caught.value.remedy
    form = ChatFormat(tokenizer, {"chat_template": "chatml"})
    assert form.prompt_text(chat("", "x")).endswith("x<|im_end|>\n<|im_start|>assistant\n")


def test_arguments_that_are_not_the_templates_are_refused_and_unread_ones_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match="add_generation_prompt is not the template's") as caught:
        ChatFormat(build_tokenizer(), {"add_generation_prompt": False})
    assert caught.value.key == "model.chat_template_kwargs"
    with caplog.at_level("WARNING", logger="trimtab"):
        ChatFormat(build_tokenizer(), {"enable_thinkin": False}).tell()
    assert "does not read enable_thinkin" in caplog.text


def test_a_prompt_that_goes_on_to_the_answer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = family_tokenizer(own_template("qwen3"))
    with caplog.at_level("INFO", logger="trimtab"):
        ChatFormat(tokenizer, OFF).tell()
        assert not caplog.records
        ChatFormat(tokenizer).tell()
    assert "leaves it to the model to think" in caplog.text and "</think>" in caplog.text
    caplog.clear()
    dated = ChatFormat(build_tokenizer("{{ strftime_now('%Y') }}" + CHATML))
    dated.tell()
    assert "writes today's date" in caplog.text


@pytest.mark.parametrize(
    ("name", "said", "thought"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nArr.", "<think>\nhm\n</think>\n\n"),
        ("gemma4", "<|channel>thought\nhm\n<channel|>Arr.", "<|channel>thought\nhm\n<channel|>"),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Arr.",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("smollm3", "<think>hm</think>Arr.", "<think>hm</think>"),
        ("deepseek", "<think>hm</think>\nArr.", "<think>hm</think>\n"),
        ("qwen3", "<think>\nhm, and", "<think>\nhm, and"),
        ("qwen3", "Arr. </think> is a word", ""),
        ("llama3", "<think>hm</think>Arr.", ""),
    ],
)
def test_how_much_of_what_was_sampled_is_a_thought(name: str, said: str, thought: str) -> None:
    form = ChatFormat(family_tokenizer(own_template(name)))
    ids = form.answer_ids(said)
    assert form.tokenizer.decode(ids[: form.thought_length(ids)]) == thought
