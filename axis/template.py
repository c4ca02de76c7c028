"""A tokenizer's chat template: the one place that renders it, and where its faults become the user's.

Nothing is assumed of a template but that it renders chats. Whatever else has to be known of it is found by rendering words of
our own and looking where they come out: see :mod:`trimtab.axis.chat_format`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.axis.errors import UserError

Message = Mapping[str, Any]

KEY = "model.chat_template_kwargs"
MEND = "mend the template in the tokenizer's folder (chat_template.jinja), or use another model"
# Arguments of apply_chat_template that are not the template's own, and decide what comes back from it.
OURS = (
    "conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
# A word that is in nothing that is said, and that no template takes for anything but text.
PROBE = "templateprobe"


def probes(count: int, texts: Iterable[str] = ()) -> list[str]:
    """Words to look for in a rendering: none is part of another, and none is in ``texts``."""
    given = list(texts)
    stem = PROBE
    while any(stem in text for text in given):
        stem += "x"
    return [f"{stem}{number}y" for number in range(count)]


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class ChatTemplate:
    """Renders messages with a tokenizer's own template.

    A template that takes nothing but lists of parts, as those of vision-language models may, gets lists of one text part.

    Args:
        tokenizer: with a chat template.
        arguments: extra arguments of the template, such as ``enable_thinking: false``; ``chat_template`` names one of several.

    Raises:
        UserError: if the tokenizer has no chat template, or of several none that is called ``default`` and none is named.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        # ``name``: how errors call it
        self.name = f"the chat template of {tokenizer.name_or_path!r}"
        if taken := [key for key in OURS if key in self.arguments]:
            raise UserError(
                f"{', '.join(taken)} is not the template's to be given: trimtab sets it",
                key=KEY,
                remedy="leave it out; what the template itself reads may be given",
            )
        self.source = self._source()

    def _source(self) -> str:
        known: Any = getattr(self.tokenizer, "chat_template", None)
        named: Any = self.arguments.get("chat_template")
        if isinstance(known, Mapping):  # of names
            found = known.get(named or "default", named)
            if found is None and known:
                raise UserError(
                    f"{self.name} is one of several, and none is called default: {', '.join(known)}",
                    key=KEY,
                    remedy=f"name one: {{chat_template: {next(iter(known))}}}",
                )
        else:
            found = named or known
        if not found:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} has no chat template",
                key="model.name",
                remedy="use an instruction-tuned chat model, or set a template in the tokenizer folder (chat_template.jinja)",
            )
        return str(found)

    def reads(self, name: str) -> bool:
        """Whether a name stands anywhere in the template."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    @functools.cached_property
    def in_parts(self) -> bool:
        """True where messages have to be lists of parts: as plain text, what the user says is not in the rendering.

        Raises:
            UserError: if it is not there in either form: the template is broken, or none for chats.
        """
        word = probes(1)[0]
        refusal: UserError | None = None
        for parts in (False, True):
            try:
                if word in self._text([{"role": "user", "content": word}], parts=parts, generation=True):
                    return parts
            except UserError as error:
                refusal = refusal or error
        refusal = refusal or UserError(f"{self.name} leaves out what the user says", key="model.name", remedy=MEND)
        if not self.arguments or refusal.key == KEY:
            raise refusal
        raise UserError(
            f"with what is given to it ({', '.join(self.arguments)}), {refusal.fault}",
            key=KEY,
            remedy="correct or leave out what is given, or mend the template",
        ) from refusal

    def render(self, messages: Sequence[Message], *, generation: bool, **more: Any) -> str:
        """The chat as text.

        Args:
            messages: as the template takes them; their contents are text.
            generation: whether the model's next answer is to be begun.
            **more: arguments beside those of the whole.

        Raises:
            UserError: if the template is broken, or refuses the messages.
        """
        return self._text(messages, parts=self.in_parts, generation=generation, **more)

    def _text(self, messages: Sequence[Message], *, parts: bool, generation: bool, **more: Any) -> str:
        given = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if parts else dict(message)
            for message in messages
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                given, add_generation_prompt=generation, tokenize=False, **{**self.arguments, **more}
            )
        except ImportError:  # of jinja2
            raise
        except Exception as error:  # templates raise TemplateError or anything their jinja raises
            said = str(error) or type(error).__name__
            broken = type(error).__name__ == "TemplateSyntaxError"
            if wanted := re.fullmatch(r"'(\w+)' is undefined", said):
                raise UserError(
                    f"{self.name} reads {wanted[1]}, which is not given",
                    key=KEY,
                    remedy=f"give it: {{{wanted[1]}: ...}}",
                ) from error
            raise UserError(
                f"{self.name} is broken: {said}" if broken else f"{self.name} refuses this conversation: {said}",
                key="model.name" if broken else None,
                remedy=MEND
                if broken
                else "give the roles that it takes; most want user and assistant turns to alternate, the user first",
            ) from error
        return str(text)
