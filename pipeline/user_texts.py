"""Texts of the user's files against the model: what its chat template renders, and what its context holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.axis.chat_format import ChatFormat, Message
from trimtab.axis.errors import UserError
from trimtab.axis.models import load_tokenizer
from trimtab.axis.rows import MOST_TOLD, RowFault, source_name, told
from trimtab.recipes.schema import ModelSection

log = logging.getLogger("trimtab")

CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")  # <think>, which few tokenizers call special, or [INST]
PLAIN = re.compile(r"(system )?user( assistant user)*")  # roles that every chat template takes, or folds


def check_rendering(
    section: ModelSection, chats: Iterable[tuple[str, Sequence[Mapping[str, str]]]], source: str, key: str
) -> None:
    """Try the model's chat template on each order of roles that is not a plain conversation's; tell control tokens in texts.

    Args:
        section: the model.
        chats: place and messages of each, up to where an answer begins.
        source: the file that they come from.
        key: the recipe's key that names it.

    Raises:
        UserError: if the template refuses one of these orders, or leaves a message out.
    """
    chats = list(chats)
    _tell_control_tokens(section, chats, source)
    unusual: dict[tuple[str, ...], str] = {}
    for place, messages in chats:
        roles = tuple(message["role"] for message in messages)
        if not PLAIN.fullmatch(" ".join(roles)):
            unusual.setdefault(roles, place)
    if not unusual:
        return
    form = ChatFormat(load_tokenizer(section.name, section.revision), section.chat_template_kwargs)
    faults = []
    for roles, place in unusual.items():
        if fault := _unrendered(form, roles):
            faults.append((place, RowFault(fault, "take such messages out, or put their text into the system prompt")))
    if faults:
        raise told(faults[:MOST_TOLD], source, key)


def _tell_control_tokens(
    section: ModelSection, chats: Sequence[tuple[str, Sequence[Mapping[str, str]]]], source: str
) -> None:
    """Every tokenizer reads the name of a control token as that token, in a user's text too, which then may end a turn."""
    try:
        known = load_tokenizer(section.name, section.revision).added_tokens_decoder.values()
    except UserError:
        return  # whoever loads the model tells it
    names = [re.escape(token.content) for token in known if token.special or CONTROL.fullmatch(token.content)]
    if not names:
        return
    any_name = re.compile("|".join(names))
    said = [
        (place, name[0])
        for place, messages in chats
        for message in messages
        if (name := any_name.search(message["content"]))
    ]
    if said:
        log.warning(
            "%s: texts hold names of control tokens (%d of them, the first is %s in %s): the model reads a name as the token, "
            "which may end or begin a turn; take it out unless that is meant",
            source_name(source), len(said), said[0][1], said[0][0],
        )  # fmt: skip


def _unrendered(form: ChatFormat, roles: Sequence[str]) -> str | None:
    """What the chat template does not do for messages in these roles; None where it renders them all."""
    try:
        form.prompt_text([{"role": role, "content": "x"} for role in roles])
    except UserError as error:
        return error.fault
    return None


def context_of(config: Any) -> int | None:
    """Tokens that a model takes at most, by its config; None where that says nothing."""
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


@dataclass(frozen=True)
class Size:
    """What a conversation takes of the context: its messages, and how many answers are still to come."""

    id: str
    messages: Sequence[Message]
    answers: int


def check_room(
    form: ChatFormat,
    config: Any,
    conversations: Sequence[Size],
    answer: int,
    *,
    key: str,
    remedy: str,
) -> None:
    """Check that each conversation fits the model's context with answers as long as they may be.

    Args:
        form: chat format.
        config: of the model.
        conversations: each with all that is said in it but the answers that are still to be given.
        answer: the longest answer, in tokens.
        key: that says how long.
        remedy: what else may be changed.

    Raises:
        UserError: naming the longest.
    """
    if not conversations or (context := context_of(config)) is None:
        return

    def tokens(conversation: Size) -> int:
        return len(form.prompt_ids(conversation.messages)) + conversation.answers * answer

    longest = max(conversations, key=tokens)
    if (needed := tokens(longest)) > context:
        raise UserError(
            f"the conversation {longest.id} takes up to {needed} tokens, {longest.answers} answers of {answer} among them, "
            f"and the model's context holds {context}",
            key=key,
            remedy=remedy,
        )
