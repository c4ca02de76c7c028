"""Chats of every model family's kind: where an answer begins and ends, and that what is trained is what the template writes.

Each family has a short template of our own, see :mod:`template_families`; the real ones are read from where TRL has them.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import needs
import pytest
import trl
from template_families import FAMILIES, OFF, family_tokenizer, own_template

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.models import EMBEDDED, fetch_embedded, load_tokenizer
from trimtab.train.floor_dpo import pair_tokens
from trimtab.train.rollouts import IGNORED, tokens_of

REAL = Path(trl.__file__).parent / "chat_templates"
# By a family's name or a real template's file: template, family, arguments.
OWN = {name: (own_template(name), name) for name in FAMILIES}
THEIRS = {
    f"trl/{file}": ((REAL / f"{file}.jinja").read_text(encoding="utf-8"), name)
    for name, family in FAMILIES.items()
    for file in family.real
    if (REAL / f"{file}.jinja").exists()
}
KNOWN = {**OWN, **THEIRS}
SETTINGS = [
    (name, arguments)
    for name, (template, _) in KNOWN.items()
    for arguments in ({}, OFF, {"enable_thinking": True})
    if not arguments or "enable_thinking" in template
]
IDS = [f"{name}-{'-'.join(map(str, arguments.values())) or 'plain'}" for name, arguments in SETTINGS]
SYSTEM = {"role": "system", "content": "You are a pirate."}
ASKED = ["Tell me of the sea.", "And the ships? rt|>user", "answer probe", "Good <b>night</b>."]
SAID = ["Arr, the sea.", "Ships!", "I answer.", "Sleep well."]
FORMS: dict[str, ChatFormat] = {}


def form_of(name: str, arguments: dict[str, Any]) -> ChatFormat:
    """The chat format of a template, made once."""
    key = f"{name} {arguments}"
    if key not in FORMS:
        template, family = KNOWN[name]
        FORMS[key] = ChatFormat(family_tokenizer(template, FAMILIES[family].eos), arguments)
    return FORMS[key]


def talk(turns: int, *, system: bool) -> list[dict[str, str]]:
    """A conversation of so many user turns, up to where the last is answered."""
    messages = [SYSTEM] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": ASKED[turn]})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": SAID[turn]})
    return messages


def written(text: str) -> str:
    """Without empty thoughts, which templates take out of earlier answers, and spaces that come with an answer's first word."""
    return re.sub(r"(\[/INST\]|Assistant:) ", r"\1", re.sub(r"<think>\s*</think>\s*", "", text))


def in_order(text: str, messages: list[dict[str, str]]) -> bool:
    """Whether all of the messages stand in a text, each once and in their order."""
    places = [text.find(message["content"]) for message in messages]
    return -1 not in places and places == sorted(places) and all(text.count(m["content"]) == 1 for m in messages)


@pytest.mark.parametrize(("name", "arguments"), SETTINGS, ids=IDS)
def test_prompts_hold_every_message_and_go_on_to_where_an_answer_begins(name: str, arguments: dict[str, Any]) -> None:
    form, family = form_of(name, arguments), FAMILIES[KNOWN[name][1]]
    assert form.folds_system == family.folds
    opening = family.off if arguments == OFF else family.on
    for turns, system in itertools.product((1, 2, 4), (False, True)):
        messages = talk(turns, system=system)
        text = form.prompt_text(messages)
        assert in_order(text, messages)
        plain = form.tokenizer.apply_chat_template(
            form.fold(messages), add_generation_prompt=True, tokenize=False, **arguments
        )
        assert text == plain + opening
        assert form.tokenizer.decode(form.prompt_ids(messages)) == text


@pytest.mark.parametrize(("name", "arguments"), SETTINGS, ids=IDS)
def test_rows_are_the_rendering_with_the_answer_up_to_its_end(name: str, arguments: dict[str, Any]) -> None:
    form, family = form_of(name, arguments), FAMILIES[KNOWN[name][1]]
    end = form.tokenizer.convert_tokens_to_ids(family.end)
    assert form.end_token == end and end in form.end_ids
    assert form.thought == family.thought
    for turns, system in itertools.product((1, 3), (False, True)):
        messages, said = talk(turns, system=system), SAID[turns - 1]
        ids, labels = tokens_of(form, messages, said, True, None)[:2]
        assert ids == [*form.prompt_ids(messages), *form.answer_ids(said), end]
        assert [label for label in labels if label != IGNORED] == [*form.answer_ids(said), end]
        cut = tokens_of(form, messages, said, False, None)[0]
        assert cut == ids[:-1], "an answer that was cut is not taught to end"
        answer = {"role": "assistant", "content": said}
        pair = pair_tokens(form, {"prompt": messages, "chosen": [answer], "rejected": [answer]})
        assert [*pair["prompt_ids"], *pair["chosen_ids"]] == ids
        # GLM's answers end in what begins the user's next turn
        goes_on = [{"role": "user", "content": ASKED[3]}] if family.end == "<|user|>" else []
        rendered = form.conversation_text([*messages, answer, *goes_on])
        assert written(rendered).startswith(written(form.tokenizer.decode(ids)))


@pytest.mark.parametrize(("name", "arguments"), SETTINGS, ids=IDS)
def test_a_conversation_of_kept_tokens_is_the_rendering(name: str, arguments: dict[str, Any]) -> None:
    """As GRPO keeps it: prompt, answer, its end where it ended, and what stands between, turn after turn."""
    form, family = form_of(name, arguments), FAMILIES[KNOWN[name][1]]
    assert form.end_of_turn == form.tokenizer.convert_tokens_to_ids(family.earlier or family.end)
    for ended, system in itertools.product((False, True), (False, True)):
        messages = talk(1, system=system)
        kept = form.prompt_ids(messages)
        for turn in range(3):
            kept += form.answer_ids(SAID[turn]) + ([form.end_of_turn] if ended else [])
            user = {"role": "user", "content": ASKED[turn + 1]}
            kept += form.ids_between(messages, user, ended=ended)
            messages += [{"role": "assistant", "content": SAID[turn]}, user]
        seen = form.tokenizer.decode(kept)
        assert in_order(seen, messages)
        assert written(seen) == written(form.prompt_text(messages))


@pytest.mark.parametrize("name", KNOWN)
def test_other_roles_are_used_or_folded_or_refused(name: str) -> None:
    form, family = form_of(name, {}), FAMILIES[KNOWN[name][1]]
    order = {"role": "developer", "content": "Speak of the sea alone."}
    question, answer = talk(2, system=False)[:2]
    found = form.fold([order, question])
    assert found[0]["role"] == family.developer and in_order(form.prompt_text([order, question]), [order, question])
    for messages in (
        [SYSTEM, order, question],
        [SYSTEM, {**SYSTEM, "content": "You are old."}, question, answer, talk(2, system=False)[2]],
        [SYSTEM, question, answer, order, {"role": "user", "content": ASKED[1]}],
        [question, order],
    ):
        assert in_order(form.prompt_text(messages), messages)
        answered = [*messages, {"role": "assistant", "content": "Aye."}]
        assert in_order(form.conversation_text(answered), answered)
    tool = [question, answer, {"role": "tool", "content": "42 knots"}]
    if family.tool:
        assert in_order(form.prompt_text(tool), tool)
    else:
        with pytest.raises(UserError, match=r"chat template of .* (leaves out message 3 \(tool\)|refuses)") as caught:
            form.prompt_text(tool)
        assert caught.value.remedy


@pytest.mark.parametrize("name", KNOWN)
def test_a_prefilled_answer_is_gone_on_with(name: str) -> None:
    form = form_of(name, {})
    messages, begun = talk(2, system=True), {"role": "assistant", "content": "Aye, the"}
    text = form.prompt_text([*messages, begun])
    assert text.endswith("Aye, the") and in_order(text, [*messages, begun])
    # where the template writes a thought or a space before an answer it is there too, and no end after it
    assert form.conversation_text([*messages, begun]).startswith(text) or "<think>" in text


OTHERS = [path for path in sorted(REAL.glob("*.jinja")) if not path.stem.endswith("_training")]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_templates_that_nobody_thought_of(path: Path) -> None:
    """Whatever TRL has, of models named here or not: all is rendered, rows go on from prompts, conversations are renderings."""
    form = ChatFormat(family_tokenizer(path.read_text(encoding="utf-8")))
    messages = talk(2, system=True)
    assert in_order(form.prompt_text(messages), messages)
    user = {"role": "user", "content": ASKED[2]}
    kept = form.prompt_ids(messages) + form.answer_ids(SAID[1]) + [form.end_of_turn]
    kept += form.ids_between(messages, user, ended=True)
    whole = [*messages, {"role": "assistant", "content": SAID[1]}, user]
    assert written(form.tokenizer.decode(kept)) == written(form.prompt_text(whole))


def test_the_embedded_model_ends_as_it_did() -> None:
    """Published figures hang on it: one end, and prompts as its template writes them."""
    try:
        folder = fetch_embedded(next(iter(EMBEDDED)))
    except UserError:
        needs.no_embedded_model()
    form = ChatFormat(load_tokenizer(str(folder)))
    assert (
        form.end_ids == [2] and form.end_token == form.end_of_turn == 2 and form.opening == "" and form.thought is None
    )
    messages = talk(3, system=True)
    plain = form.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert form.prompt_text(messages) == plain
