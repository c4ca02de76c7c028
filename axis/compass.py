"""The compass: where each turn of a conversation lies on the axis, by one forward over the whole of it.

The text is teacher-forced: the model reads the transcript, whoever wrote it. Positions are those of the turn's own tokens,
without the template's markers around them.

Shapes: T tokens of the conversation, L layers that are read, D hidden size.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trimtab.axis.calibration import check_window, window_by_rule
from trimtab.axis.chat_format import ChatFormat, Message
from trimtab.axis.directions import Axis, Floor, check_fits
from trimtab.axis.errors import UserError
from trimtab.axis.hooks import ActivationController, project
from trimtab.axis.layers import text_config_of
from trimtab.axis.soundness import not_finite
from trimtab.axis.template import common_length, probes
from trimtab.axis.transcripts import Transcript, load_transcript

__all__ = [
    "Course",
    "Transcript",
    "TurnReading",
    "load_transcript",
    "project_transcript",
    "turn_spans",
]

WIDEST_CHARACTER = 4  # tokens: the bytes of the longest UTF-8 character


@dataclass(frozen=True)
class TurnReading:
    """One message's place on the axis.

    Attributes:
        message: its number in the conversation, from 0.
        role: user, assistant, system, ...
        start: its first token in the rendered conversation.
        end: one past its last token.
        value: mean over tokens and layers, in the course's unit; None for a message of no tokens.
        layers: mean over tokens, one a layer; empty for a message of no tokens.
        below: share of (token, layer) slots under the floor; None without a floor.
        pieces: text and value of each token (of several where one character takes several), averaged over layers, for
            colouring.
    """

    message: int
    role: str
    start: int
    end: int
    value: float | None
    layers: list[float]
    below: float | None
    pieces: list[tuple[str, float]]


@dataclass(frozen=True)
class Course:
    """A whole conversation on the axis.

    Attributes:
        title: of the conversation.
        unit: ``z`` (projection / sigma) with a floor, ``projection`` (units of the residual stream) with an axis alone.
        layers: decoder layers that were read.
        floor: the floor's height in that unit, averaged over layers; None without a floor.
        capped: whether the cap was on during the forward.
        turns: the messages, in order.
    """

    title: str
    unit: str
    layers: list[int]
    floor: float | None
    capped: bool
    turns: list[TurnReading]

    @property
    def assistant(self) -> list[TurnReading]:
        """The assistant's turns that have tokens."""
        return [turn for turn in self.turns if turn.role == "assistant" and turn.value is not None]

    def as_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def turn_spans(form: ChatFormat, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a whole conversation, and the span of each message's own text in them.

    Each message in turn is replaced by a probe word and the conversation is rendered again: what stays the same before and
    after the probe is the template's and the other messages', what lies between is the message, in whatever form the template
    gives it (stripped, without its reasoning, folded into the next turn). A token that spans an edge counts as what comes after
    the edge.

    Returns:
        ids of length T, and for each message [start, end).

    Raises:
        UserError: if the template refuses the conversation, or leaves out, repeats or moves a message.
    """
    text = form.conversation_text(messages)
    probe = probes(1, (text, *(message["content"] for message in messages)))[0]
    edges: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        probed = [dict(other) for other in messages]
        probed[number]["content"] = probe
        before, *after = form.conversation_text(probed).split(probe)
        if len(after) != 1:
            raise UserError(
                f"{form.template.name} {'repeats' if after else 'leaves out'} message {number + 1} ({message['role']})",
                remedy="give the conversation as the template takes it, or mend the template",
            )
        start = common_length(text, before)
        edges.append((start, len(text) - common_length(text[start:][::-1], after[0][::-1])))
    ids, tokens_before = _tokenised(form, text)
    spans = [(tokens_before(start), tokens_before(end)) for start, end in edges]
    return ids, [(first, max(first, last)) for first, last in spans]


def _tokenised(form: ChatFormat, text: str) -> tuple[list[int], Callable[[int], int]]:
    """Token ids of a text, and a function that tells how many of its tokens lie wholly before a place in it.

    The places of the tokens come with them, but for tokenizers in Python: there the text up to a place is tokenised by itself,
    and the ids are compared.
    """
    if not form.tokenizer.is_fast:
        ids = form.answer_ids(text)
        return ids, lambda place: len(ids) if place == len(text) else common_length(ids, form.answer_ids(text[:place]))
    found = form.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    return list(found["input_ids"]), lambda place: bisect.bisect_right(ends, place)


@torch.no_grad()
def project_transcript(
    model: Any,
    form: ChatFormat,
    instrument: Floor | Axis,
    messages: Sequence[Message],
    *,
    layers: Sequence[int] | None = None,
    capped: bool = False,
    title: str = "conversation",
) -> Course:
    """Project each turn of a conversation, by one forward over all of it.

    Args:
        model: the model, with or without an adapter.
        form: chat format of its tokenizer.
        instrument: a floor, whose layers are read in units of sigma; or an axis, which has no sigma, read in units of the
            stream at the layers that a floor would take (:func:`trimtab.axis.calibration.window_by_rule`).
        messages: the conversation.
        layers: read these alone; of a floor they must be some of its own, which are the ones that are capped then.
        capped: cap to the floor meanwhile. Each layer is read before its own cap and after those of the layers below.
        title: carried over to the course.

    Raises:
        UserError: if the instrument does not fit the model, the conversation is longer than the model takes, the
            template refuses it, or the cap is asked for without a floor.
    """
    controller = ActivationController.of(model)
    if isinstance(instrument, Floor):
        check_fits(controller.n_layers, controller.hidden_size, floor=instrument)
        chosen = instrument if layers is None else instrument.at(layers)
        floor: Floor | None = chosen
        layers, directions, sigma = chosen.layers, chosen.directions, chosen.sigma
    else:
        check_fits(controller.n_layers, controller.hidden_size, axis=instrument)
        floor = None
        layers = layers or window_by_rule(text_config_of(model).model_type, controller.n_layers)
        check_window(layers, controller.n_layers)
        directions, sigma = instrument.directions[list(layers)], torch.ones(len(layers))
    if capped and floor is None:
        raise UserError("an axis alone can't cap", key="--capped", remedy="give a floor.safetensors")
    ids, spans = turn_spans(form, messages)
    _check_length(model, len(ids))
    values = torch.zeros(len(layers), len(ids))  # [L, T]

    def read(layer: int, hidden: Tensor) -> None:
        row = layers.index(layer)
        values[row] = (project(hidden[0], directions[row]) / sigma[row].to(hidden.device)).cpu()

    device = next(model.parameters()).device
    cap = contextlib.nullcontext() if floor is None else controller.capping(floor, enabled=capped)
    training = model.training
    model.eval()
    try:
        with controller.reading(layers, read), cap:
            model(input_ids=torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
    if not torch.isfinite(values).all():
        raise not_finite(model, torch.tensor([ids], device=device))
    heights = None if floor is None else floor.tau / floor.sigma
    turns = [
        _turn(form.tokenizer, number, message["role"], span, ids, values, heights)
        for number, (message, span) in enumerate(zip(messages, spans, strict=True))
    ]
    unit = "z" if floor is not None and floor.has_sigma else "projection"
    return Course(title, unit, list(layers), None if heights is None else float(heights.mean()), capped, turns)


def _check_length(model: Any, length: int) -> None:
    longest = getattr(text_config_of(model), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UserError(
            f"the conversation has {length} tokens, the model takes {longest}",
            remedy="leave out turns at the end, or split it",
        )


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    role: str,
    span: tuple[int, int],
    ids: Sequence[int],
    values: Tensor,
    heights: Tensor | None,
) -> TurnReading:
    start, end = span
    if start == end:
        return TurnReading(number, role, start, end, None, [], None, [])
    own = values[:, start:end]
    below = None if heights is None else float((own < heights[:, None]).float().mean())
    pieces = _pieces(tokenizer, ids, start, own.mean(0).tolist())
    return TurnReading(number, role, start, end, float(own.mean()), own.mean(1).tolist(), below, pieces)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, values: Sequence[float]
) -> list[tuple[str, float]]:
    """Text and value of each token; tokens that spell one character together are joined, with their mean.

    Each token is decoded behind the one before it, because some tokenizers drop a leading space at the start of a text.
    """
    pieces: list[tuple[str, float]] = []
    context, group = list(ids[max(0, start - 1) : start]), list[int]()
    for position in range(start, start + len(values)):
        group.append(ids[position])
        joined = str(tokenizer.decode([*context, *group]))
        whole = not joined.endswith("\ufffd") or len(group) == WIDEST_CHARACTER
        if whole or position + 1 == start + len(values):
            held = values[position + 1 - len(group) - start : position + 1 - start]
            pieces.append((joined[len(str(tokenizer.decode(context))) :], sum(held) / len(held)))
            context, group = group, []
    return pieces
