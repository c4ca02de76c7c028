"""Given answers read by an arm: no text is sampled, so that arms are compared on the same words.

Shapes: n answers, L floor layers, D hidden size, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.axis import ActivationController
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.compass import turn_spans
from trimtab.axis.folding import INSTRUCTIONS
from trimtab.axis.given import Given
from trimtab.axis.reader import read_states
from trimtab.axis.sampling import pad_left
from trimtab.axis.scoring import SCORE_BATCH, persona_llr
from trimtab.eval.answers.arms import Answers, Arms
from trimtab.eval.answers.ruler import Ruler
from trimtab.losses import divergence_terms


@dataclass(frozen=True)
class Forced:
    """Figures of given answers under an arm, one an answer; NaN for empty ones.

    Attributes:
        kl: mean KL(reference arm || arm) per answer token, nat.
        nll: mean negative log-likelihood per answer token under the arm, nat.
        z_shift: z under the arm minus z under the base, same text.
    """

    kl: list[float]
    nll: list[float]
    z_shift: list[float]


@torch.no_grad()
def teacher_forced(
    arms: Arms,
    given: Answers,
    arms_to_score: Sequence[str],
    reference: str,
    ruler: Ruler,
    *,
    batch_size: int,
    title: str,
) -> dict[str, Forced]:
    """Score the same texts under several arms, by forwards over prompt and answer.

    Args:
        arms: the arms.
        given: the texts.
        arms_to_score: which arms.
        reference: arm whose next-token distributions are the reference of the KL.
        ruler: for the z-shift, whose origin is the base on the same text.
        batch_size: rows a forward.
        title: label of the progress bar.
    """
    shown = {arm: _shown(arms, arm, given) for arm in ("base", reference, *arms_to_score)}
    answers = shown["base"]
    found = {arm: Forced(*([float("nan")] * len(answers) for _ in range(3))) for arm in arms_to_score}
    for batch in answers.batches(batch_size, title):
        at_base = _forward(arms, "base", answers, batch, ruler)
        at_reference = at_base if reference == "base" else _forward(arms, reference, shown[reference], batch, ruler)
        known = {"base": at_base, reference: at_reference}
        for arm in arms_to_score:
            at_arm = known.get(arm) or _forward(arms, arm, shown[arm], batch, ruler)
            for k, i in enumerate(batch):
                logits, z = at_arm[k]
                targets = torch.tensor(answers.answers[i], device=logits.device)
                found[arm].kl[i] = float(divergence_terms(logits, at_reference[k][0]).mean())
                found[arm].nll[i] = -float(torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None]).mean())
                found[arm].z_shift[i] = float((z - at_base[k][1]).mean())
    return found


def _shown(arms: Arms, arm: str, given: Answers) -> Given:
    """Given answers after what an arm is shown of their prompts."""
    return Given.of(arms.form, [arms.seen(arm, prompt) for prompt in given.prompts], given.texts)


def _forward(arms: Arms, arm: str, answers: Given, batch: Sequence[int], ruler: Ruler) -> list[tuple[Tensor, Tensor]]:
    """Per row: logits that predict the answer's tokens [T, V], and z of those tokens [T] (as the next layer sees them)."""
    counts = answers.counts(batch)
    logits, states = _read(arms, arm, answers.rows(batch), counts, logits_to_keep=max(counts) + 1)
    return [(logits[k, -count - 1 : -1], ruler.token_z(states[k])) for k, count in enumerate(counts)]


@torch.no_grad()
def read_means(arms: Arms, arm: str, given: Answers, *, batch_size: int, title: str) -> Tensor:
    """Mean activations of given answers under an arm, over the answer's tokens and as the next layer sees them, [n, L, D].

    NaN for an empty answer. The texts are read, not sampled, so that arms are compared on the same words.
    """
    return _means(arms, arm, _shown(arms, arm, given), batch_size=batch_size, title=title)


def _means(arms: Arms, arm: str, answers: Given, *, batch_size: int, title: str) -> Tensor:
    with arms.weights(arm) as model, arms.capping(model, arm):
        return read_states(
            model, arms.form.tokenizer, answers, arms.floor.layers, batch_size=batch_size, title=title, after_cap=True
        )


@torch.no_grad()
def message_embeddings(arms: Arms, messages: Sequence[str], *, batch_size: int) -> Tensor:
    """Mean activation of the base over each message's own tokens, at the floor's deepest layer, [n, D] float32."""
    before, own = [], []
    for message in messages:
        ids, (span,) = turn_spans(arms.form, [{"role": "user", "content": message}])
        before.append(ids[: span[0]])
        own.append(ids[span[0] : span[1]])
    return _means(arms, "base", Given(before, own), batch_size=batch_size, title="reading user messages")[:, -1]


def _read(
    arms: Arms,
    arm: str,
    rows: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    logits_to_keep: int,
) -> tuple[Tensor, list[list[Tensor]]]:
    """One forward over token rows: the last logits, and the states of each row's last ``counts`` tokens.

    Returns:
        Logits [B, logits_to_keep, V]; for each row one state [count, D] a floor layer, as the next layer sees it.
    """
    tokenizer: Any = arms.form.tokenizer
    states: dict[int, Tensor] = {}
    with arms.weights(arm) as model:
        controller = ActivationController.of(model)
        ids, mask = pad_left(rows, tokenizer.pad_token_id, next(model.parameters()).device)
        with (
            controller.reading(arms.floor.layers, states.__setitem__, after_cap=True),
            arms.capping(model, arm),
        ):
            logits: Tensor = model(input_ids=ids, attention_mask=mask, logits_to_keep=logits_to_keep).logits
    return logits, [[states[layer][k, -count:] for layer in arms.floor.layers] for k, count in enumerate(counts)]


@torch.no_grad()
def coloured(
    arms: Arms,
    arm: str,
    prompts: Sequence[Sequence[dict[str, str]]],
    texts: Sequence[str],
    ruler: Ruler,
    *,
    batch_size: int,
    title: str = "colouring transcripts",
) -> list[list[tuple[str, float]]]:
    """Answers in words, each with its tokens' mean z; an answer's words join to it.

    The turns of a conversation stand in the tokens of its last turn wherever the chat template only appends, so one forward
    reads them all.

    Args:
        arms: the arms.
        arm: which arm reads.
        prompts: messages before each answer.
        texts: the answers.
        ruler: what z is measured with.
        batch_size: rows a forward.
        title: label of the progress bar.
    """
    answers = Given.of(arms.form, [arms.seen(arm, prompt) for prompt in prompts], texts)
    rows = [tuple(row) for row in answers.rows(range(len(answers)))]
    inside: dict[int, list[int]] = {}  # a row to read -> the answers that stand in it
    for i in sorted((i for i, ids in enumerate(answers.answers) if ids), key=lambda i: -len(rows[i])):
        holder = next((j for j in inside if rows[j][: len(rows[i])] == rows[i]), i)
        inside.setdefault(holder, []).append(i)
    # from the first answer on: what comes before it is not coloured
    starts = {j: min(len(answers.prompts[i]) for i in held) for j, held in inside.items()}
    holders = list(inside)
    read = Given([rows[j][: starts[j]] for j in holders], [rows[j][starts[j] :] for j in holders])
    found: list[list[tuple[str, float]]] = [[] for _ in texts]
    for batch in read.batches(batch_size, title):
        states = _read(arms, arm, read.rows(batch), read.counts(batch), logits_to_keep=1)[1]
        for j, layers in zip((holders[k] for k in batch), states, strict=True):
            z = ruler.token_z(layers)
            for i in inside[j]:
                start = len(answers.prompts[i]) - starts[j]
                values = z[start : start + len(answers.answers[i])].tolist()
                found[i] = _words(arms.form, answers.answers[i], texts[i], values)
    return found


def _words(form: ChatFormat, ids: Sequence[int], text: str, z: Sequence[float]) -> list[tuple[str, float]]:
    """The text's words, each with the mean of its tokens' values."""
    pieces: list[tuple[str, list[float]]] = []
    so_far = ""
    for position, value in enumerate(z):
        whole = str(form.tokenizer.decode(list(ids[: position + 1]), skip_special_tokens=True))
        if position + 1 == len(z):
            whole = text
        elif not text.startswith(whole := whole.rstrip("\ufffd")) or len(whole) < len(so_far):
            whole = so_far  # the token ends inside a character, or the tokenizer will still tidy the spaces before it
        piece, so_far = whole[len(so_far) :], whole
        if pieces and not re.match(r"\s", piece):
            pieces[-1] = (pieces[-1][0] + piece, [*pieces[-1][1], value])
        else:
            pieces.append((piece, [value]))
    return [(piece, round(float(np.mean(values)), 3)) for piece, values in pieces]


def llr_of(arms: Arms, answers: Mapping[str, Answers]) -> dict[str, list[float]]:
    """Persona log-likelihood ratio of each arm's answers, nat a token: with the system prompt against without it.

    Arms that answer alike share one score. Scored twice, in batches of other widths, it would differ in the last digits, and
    where every answer is alike a ratio of such differences would pass for retention.
    """
    keys = {
        arm: [(json.dumps(prompt), text) for prompt, text in zip(found.prompts, found.texts, strict=True)]
        for arm, found in answers.items()
    }
    distinct = list(dict.fromkeys(key for row in keys.values() for key in row))
    prompts = [json.loads(prompt) for prompt, _ in distinct]
    if not distinct:
        return {arm: [] for arm in answers}
    with arms.weights("base") as model:
        values = persona_llr(
            model,
            arms.form,
            prompts,
            [[message for message in prompt if message["role"] not in INSTRUCTIONS] for prompt in prompts],
            [text for _, text in distinct],
            batch_size=SCORE_BATCH,
        )
    score = dict(zip(distinct, values, strict=True))
    return {arm: [score[key] for key in row] for arm, row in keys.items()}
