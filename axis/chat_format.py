"""Chats to token ids: how messages are given to the model's template, where an answer begins in the rendering, and where it ends.

All that is known of a template was found by rendering words of our own with it. Where it does not take the messages as they are,
instructions are put into a turn that it takes; what can't be rendered is refused. No message is dropped.

**Where an answer begins.** A template may leave it to the model to think, or to choose a channel, before it answers: then an
answer in a rendering begins later than the template's own prompt for one ends. A thought is no answer, so prompts here go on to
where the rendering has the answer's text: Qwen3 with thinking on is given its own empty thought.

**Where it ends.** The checkpoint says so: its generation config, its tokenizer, and the tokens that the template writes after an
answer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.axis.errors import UserError
from trimtab.axis.folding import Part, find_parts
from trimtab.axis.layers import base_model_of
from trimtab.axis.template import KEY, ChatTemplate, Message, probes
from trimtab.axis.thoughts import Headers, Marks, counterpart, find_marks

__all__ = ["ChatFormat", "Message", "chat", "ends_of"]

log = logging.getLogger("trimtab")

# Text in which a template that escapes, cuts or rewrites what is said shows itself.
LETTERS = 'Is "5 < 6 & 7" so? \\n {{x}} %s Ünïcode 語\n\n  - ' + "and so it goes on, " * 100 + "end."


def chat(system: str, user: str) -> list[dict[str, str]]:
    """A one-turn prompt; an empty system prompt leaves the system message out."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": user}]


def ends_of(model: Any) -> list[int]:
    """The tokens that end an answer by a model's generation config."""
    found = getattr(getattr(base_model_of(model), "generation_config", None), "eos_token_id", None)
    ids = found if isinstance(found, list | tuple) else [found]
    return [int(token) for token in ids if token is not None]


class ChatFormat:
    """Renders chats with a tokenizer's own template.

    Args:
        tokenizer: with a chat template.
        template_kwargs: extra arguments of the template, such as ``enable_thinking: false`` for Qwen3.
        ends: tokens that end an answer by the checkpoint's generation config, see :func:`ends_of`. Those of a model that samples
            through this format count without being given.

    Raises:
        UserError: if the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        self.template = ChatTemplate(tokenizer, template_kwargs)
        self.tokenizer = tokenizer
        self.template_kwargs = self.template.arguments
        self._ends = list(ends)
        self._forms: dict[tuple[str, ...], list[Part] | UserError] = {}

    def check(self) -> None:
        """Find out whether the template can be used at all, which otherwise shows when it is.

        Raises:
            UserError: if it can't, or if nothing says where an answer ends.
        """
        self.prompt_text(chat("", "x"))
        _ = self.end_token

    def tell(self) -> None:
        """Log what was found out about the template that one might not expect."""
        name = self.template.name
        if self.folds_system:
            log.info("%s has no system role: system prompts are put in front of the first user turn", name)
        begun = self._headers.parted[0]
        if self.opening.strip():
            log.warning(
                "%s leaves it to the model to think, or to choose a channel, before it answers: prompts here go on with %r, so "
                "that it answers at once",
                name, self.opening,
            )  # fmt: skip
        elif begun.strip() and not (self.thought and self.thought.of(begun)):
            log.warning("%s ends a prompt with %r, which it writes before no answer", name, begun)
        if LETTERS not in self.prompt_text(chat("", LETTERS)):
            log.warning("%s changes or shortens what is said: the model does not read the text as it was given", name)
        for key in self.template_kwargs:
            if key != "chat_template" and not self.template.reads(key):
                log.warning("%s does not read %s, which %s sets: it changes nothing", name, key, KEY)
        if self.template.reads("strftime_now"):
            log.warning(
                "%s writes today's date: what is sampled on another day is asked otherwise%s", name,
                f"; fix it with {KEY}={{date_string: ...}}" if self.template.reads("date_string") else "",
            )  # fmt: skip

    # How messages are given to the template.

    @functools.cached_property
    def folds_system(self) -> bool:
        """True where the template refuses a system message, leaves it out, or moves it as the conversation goes on."""
        return [role for role, _ in self._parts(("system", "user"))] != ["system", "user"]

    def fold(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template takes them.

        As they are, where all are in the rendering, in their order. Otherwise a developer's message becomes a system message;
        or the instructions at the beginning become one system message, and later ones a part of the user turn that follows; or
        all of them do.

        Raises:
            UserError: if the template takes them in none of these forms; it says which message is at fault.
        """
        given = list(messages)
        if not given:
            return []
        made = []
        for role, members in self._parts(tuple(str(message["role"]) for message in given)):
            own = next((given[i] for i in members if given[i]["role"] == role), given[members[0]])
            content = own["content"] if len(members) == 1 else "\n\n".join(str(given[i]["content"]) for i in members)
            made.append({**own, "role": role, "content": content})
        return made

    def _parts(self, roles: tuple[str, ...]) -> list[Part]:
        """:func:`~trimtab.axis.folding.find_parts`, once for each order of roles."""
        if roles not in self._forms:
            try:
                self._forms[roles] = find_parts(self.template, roles)
            except UserError as error:
                self._forms[roles] = error
        found = self._forms[roles]
        if isinstance(found, UserError):
            raise found
        return found

    # Where an answer begins.

    def conversation_text(self, messages: Sequence[Message]) -> str:
        """A whole conversation as text, with nothing begun after it."""
        return self.template.render(self.fold(messages), generation=False)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to where the model's next answer begins; a last message of the assistant's is its beginning."""
        given = list(messages)
        if given and given[-1]["role"] == "assistant":
            return self._before_answer(given[:-1], begun=True) + str(given[-1]["content"])
        return self._before_answer(given)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The chat as token ids, up to where the model's next answer begins."""
        return self.answer_ids(self.prompt_text(messages))

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of a text alone, such as an answer's, without the end-of-turn token."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def _before_answer(self, messages: Sequence[Message], *, begun: bool = False) -> str:
        prompt = self.template.render(self.fold(messages), generation=True)
        unsaid, header = self._headers.parted
        if self._unclosed is not None:
            return prompt + self._unclosed if prompt.endswith(unsaid) else prompt
        # a space is the model's to write, as one token with the first word
        if header.strip(" ") or (begun and header):
            word = probes(1, (str(message["content"]) for message in messages))[0]
            return self.conversation_text([*messages, {"role": "assistant", "content": word}]).partition(word)[0]
        return prompt

    @property
    def opening(self) -> str:
        """What prompts have after the template's own, so that an answer begins there, and no thought; mostly nothing."""
        header = self._headers.parted[1]
        return header if header.strip(" ") else self._unclosed or ""

    @functools.cached_property
    def _headers(self) -> Headers:
        """What the template writes between a user's text and an answer, before and after there is one."""
        asked = probes(2)[0]
        prompt = self.template.render([{"role": "user", "content": asked}], generation=True)
        header = self._answered[0]
        return Headers(prompt.partition(asked)[2], header)

    @functools.cached_property
    def _answered(self) -> tuple[str | None, str]:
        """What stands before an answer, from the user's text on, and what after it; None where the template takes no answer."""
        asked, said = probes(2)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        try:
            text = self.template.render(messages, generation=False)
        except UserError:
            text = ""
        if not -1 < text.find(asked) < text.find(said):
            return None, ""
        before, _, after = text.partition(said)
        return before.partition(asked)[2], after

    @functools.cached_property
    def thought(self) -> Marks | None:
        """How the template marks a thought; None where it shows no marks."""
        return find_marks(self.template, self._headers)

    @functools.cached_property
    def _unclosed(self) -> str | None:
        """What ends the thought that the template's prompt begins and no rendered answer has; None where it begins none."""
        begun, header = self._headers.parted
        opening = begun.strip()
        if header.strip() or not opening:
            return None
        if self.thought is not None and self.thought.of(begun) is False:
            return f"\n{self.thought.closing}\n\n"
        closing = counterpart(opening)
        return f"\n{closing}\n\n" if closing else None

    # Thoughts in what was sampled.

    def thought_length(self, ids: Sequence[int]) -> int:
        """How many of the tokens that were sampled are a thought before the answer; all of them where it has not ended."""
        marks = self.thought
        ended = None if marks is None else marks.of(self._with_marks(ids))
        if marks is None or not ended:
            return 0 if ended is None else len(ids)
        low, high = 0, len(ids)  # the fewest tokens that hold the closing mark
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if marks.of(self._with_marks(ids[:middle])) else (middle + 1, high)
        while low < len(ids) and not self._with_marks([ids[low]]).strip():
            low += 1
        return low

    def may_think(self, ids: Sequence[int]) -> bool:
        """Whether these tokens, the first that were sampled, may still become the mark of a thought."""
        text = self._with_marks(ids).strip()
        return self.thought is not None and self.thought.opening.startswith(text)

    def _with_marks(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    # Where an answer ends.

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer: of the generation config, the tokenizer's, and what the template writes after it.

        Raises:
            UserError: if nothing says where an answer ends.
        """
        earlier = self._after_earlier
        if earlier is not None and self.thought is not None and earlier in self.answer_ids(self.thought.closing):
            earlier = None  # gpt-oss ends each of a message's channels so
        return sorted({self.end_token, *self._after_last, *self._known_ends, *([] if earlier is None else [earlier])})

    @property
    def end_token(self) -> int:
        """The token that ends a last answer: what the template writes after it, or else what the checkpoint names first.

        Where a template writes nothing there, as GLM's, the token that begins the user's next turn ends an answer.

        Raises:
            UserError: if nothing says where an answer ends.
        """
        found = [*self._after_last, *([] if self._after_earlier is None else [self._after_earlier]), *self._known_ends]
        if not found:
            raise UserError(
                f"nothing says where an answer of {self.tokenizer.name_or_path!r} ends: neither a generation config nor the "
                "tokenizer, and the chat template writes no token after an answer",
                key="model.name",
                remedy="set eos_token_id in generation_config.json, or eos_token in tokenizer_config.json",
            )
        return found[0]

    @property
    def end_of_turn(self) -> int:
        """The token that ends an answer that is not the last; for some templates, such as gpt-oss's, it is another.

        Raises:
            UserError: if nothing says where an answer ends.
        """
        return self.end_token if self._after_earlier is None else self._after_earlier

    def ends_with(self, model: Any) -> list[int]:
        """:attr:`end_ids`, and those of the generation config of the model that samples; none for a format that has none."""
        more = ends_of(model)
        try:
            own = self.end_ids
        except UserError:
            if not more:
                raise
            own = more
        return sorted({*own, *more}) if own else []

    @functools.cached_property
    def _known_ends(self) -> list[int]:
        """The tokenizer's and the generation config's."""
        eos: Any = self.tokenizer.eos_token_id
        return list(dict.fromkeys(([] if eos is None else [int(eos)]) + self._ends))

    @functools.cached_property
    def _after_last(self) -> list[int]:
        """The tokens that the template writes after a last answer and that are no text, in that order."""
        return [token for token in self._ids_after(probes(2)[1], self._answered[1]) if self._is_end(token)]

    @functools.cached_property
    def _after_earlier(self) -> int | None:
        """The token that the template writes after an answer that a user turn follows; None where it goes on with text."""
        asked, said, further = probes(3)
        turns = [("user", asked), ("assistant", said), ("user", further)]
        try:
            text = self.template.render([{"role": role, "content": text} for role, text in turns], generation=True)
        except UserError:
            return None
        for token in self._ids_after(said, text.partition(said)[2].partition(further)[0]):
            if self._is_end(token):
                return token
            if self._with_marks([token]).strip():
                return None
        return None

    def _is_end(self, token: int) -> bool:
        return token in self._control or token in self._known_ends

    @functools.cached_property
    def _control(self) -> set[int]:
        """Tokens that are no piece of a text: the tokenizer's special ones, and others that were added, but for runs of space."""
        added = {token: str(value) for token, value in self.tokenizer.added_tokens_decoder.items()}
        return {*self.tokenizer.all_special_ids, *(token for token, text in added.items() if text.strip())}

    # What stands between two answers.

    def ids_between(self, messages: Sequence[Message], user: Message, *, ended: bool) -> list[int]:
        """Token ids from an answer's end to where the next answer begins: end of turn, the user's turn, the model's header.

        They are what follows the answer in one rendering of the chat with it. What a model has seen before, prompt and answer,
        and these are then a rendering too, but for what the template itself writes otherwise around an earlier answer: Qwen3
        drops an empty thought there.

        Args:
            messages: the chat up to the answer.
            user: the user turn after it.
            ended: whether the answer's tokens hold :attr:`end_of_turn` already.

        Raises:
            UserError: if the template moves, repeats or drops what was said before, as the conversation goes on, or writes no
                token after an earlier answer.
        """
        given = list(messages)
        roles = tuple(str(message["role"]) for message in given)
        expected = [*self._parts(roles), ("assistant", (len(given),)), ("user", (len(given) + 1,))]
        if self._parts((*roles, "assistant", "user")) != expected:
            raise self._no_row("gives what was said another place as the conversation goes on")
        word = probes(1, (str(message["content"]) for message in [*given, user]))[0]
        after = self.prompt_text([*given, {"role": "assistant", "content": word}, user]).partition(word)[2]
        ids = self._ids_after(word, after)
        if not ended:
            return ids
        if self._after_earlier is None:
            raise self._no_row("writes no token of its own after an earlier answer")
        return ids[ids.index(self._after_earlier) + 1 :]

    def _no_row(self, fault: str) -> UserError:
        return UserError(
            f"{self.template.name} {fault}, so that a conversation is not one row of tokens",
            key="data.conversation_turns",
            remedy="set data.conversation_turns=1, or train by another method than grpo",
        )

    def _ids_after(self, word: str, text: str) -> list[int]:
        """Token ids of a text that follows a word: some tokenizers begin a text otherwise than they go on with it."""
        head, whole = self.answer_ids(word), self.answer_ids(word + text)
        return whole[len(head) :] if whole[: len(head)] == head else self.answer_ids(text)
