"""Chats to token ids: rendering, system prompts for models without a system role, and the span of the last answer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.axis.errors import UserError

Message = Mapping[str, str]


def chat(system: str, user: str) -> list[dict[str, str]]:
    """A one-turn prompt; an empty system prompt leaves the system message out."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": user}]


class ChatFormat:
    """Renders chats with a tokenizer's own template.

    Where the template has no system role (Gemma), the system prompt is put in front of the first user turn, and
    :attr:`folds_system` says so.

    Args:
        tokenizer: with a chat template.
        template_kwargs: extra arguments of the template, such as ``enable_thinking: false`` for Qwen3.

    Raises:
        UserError: if the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template",
                key="model.name",
                remedy="use an instruction-tuned chat model, or set a template in the tokenizer folder (chat_template.jinja)",
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})

    @functools.cached_property
    def folds_system(self) -> bool:
        """True where the template refuses, or leaves out, a system message."""
        probe = "system prompt probe"
        try:
            text = self._template(chat(probe, "user probe"), generation=True)
        except Exception:  # templates raise TemplateError or anything their jinja raises
            return True
        return probe not in text

    def _template(self, messages: Sequence[Message], *, generation: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=generation,
            tokenize=False,
            **self.template_kwargs,
        )
        assert isinstance(text, str)
        return text

    def fold(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Put a leading system message in front of the first user turn, where the template has no system role."""
        copied = [dict(message) for message in messages]
        if copied and copied[0]["role"] == "system" and self.folds_system:
            system = copied.pop(0)["content"]
            if not copied or copied[0]["role"] != "user":
                raise UserError(
                    "a chat must go on with a user turn after the system prompt", remedy="mend the messages"
                )
            copied[0]["content"] = f"{system}\n\n{copied[0]['content']}"
        return copied

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to where the model's next answer begins."""
        return self._template(self.fold(messages), generation=True)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The chat as token ids, up to where the model's next answer begins."""
        ids = self.tokenizer(self.prompt_text(messages), add_special_tokens=False)["input_ids"]
        return list(ids)  # type: ignore[arg-type]

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer's text alone, without the end-of-turn token."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def ids_between(self, messages: Sequence[Message], user: Message, *, ended: bool) -> list[int]:
        """Token ids from an answer's end to where the next answer begins: end of turn, the user's turn, the model's header.

        Args:
            messages: the chat up to the answer.
            user: the user turn after it.
            ended: whether the answer's tokens hold the end-of-turn token already.
        """
        marker = "answer probe"
        answered = [*messages, {"role": "assistant", "content": marker}]
        before = len(self._template(self.fold(answered), generation=False).rpartition(marker)[0])
        after = self.prompt_text([*answered, user])[before + len(marker) :]
        ids = self.answer_ids(after)
        return ids[1:] if ended and ids[:1] == [self.end_token] else ids

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        tokenizer: Any = self.tokenizer
        ids = {tokenizer.eos_token_id}
        for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
            found = self.tokenizer.convert_tokens_to_ids(token)
            if isinstance(found, int) and found != self.tokenizer.unk_token_id:
                ids.add(found)
        return sorted(i for i in ids if isinstance(i, int))

    @property
    def end_token(self) -> int:
        """The token with which the template ends an answer: the last special token of a rendered answer."""
        marker = "answer probe"
        text = self._template(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}], generation=False
        )
        after = self.answer_ids(text[text.rindex(marker) + len(marker) :])
        ends = set(self.end_ids)
        return next((token for token in after if token in ends), self.end_ids[0])
