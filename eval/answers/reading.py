"""What is measured on the arms' answers.

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

from trimtab.axis import ActivationController, Floor, project
from trimtab.axis.calibration import response_projections
from trimtab.axis.chat import ChatFormat
from trimtab.axis.compass import turn_spans
from trimtab.axis.folding import INSTRUCTIONS
from trimtab.axis.models import Loaded
from trimtab.axis.progress import progress_bar
from trimtab.axis.sampling import batches_by_length, pad_left
from trimtab.axis.scoring import SCORE_BATCH, persona_llr
from trimtab.eval.answers.arms import Answers, Arms
from trimtab.losses import divergence_terms


@dataclass(frozen=True)
class Ruler:
    """Projections of answers, in sigma, relative to the base model's default Assistant: 0 = default, negative = away.

    Attributes:
        directions: unit directions at the floor's layers, [L, D].
        origin: mean projection of the base's default answers, [L].
        sigma: standard deviation over the base's answers, roles and default pooled, [L].
    """

    directions: Tensor
    origin: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, directions: Tensor, default: Tensor, pooled: Tensor) -> Ruler:
        """Make a ruler from the base's default answers' means [n, L, D] and all of the base's answers' means."""
        at_default = torch.einsum("nld,ld->nl", default, directions)
        over_pool = torch.einsum("nld,ld->nl", pooled, directions)
        return cls(directions, _nanmean(at_default), over_pool[torch.isfinite(over_pool).all(1)].std(0))

    def z(self, means: Tensor) -> list[float]:
        """Mean over layers of z of each answer, [n]; NaN for an empty answer. ``means`` [n, L, D]."""
        projections = torch.einsum("nld,ld->nl", means, self.directions)
        return [float(value) for value in ((projections - self.origin) / self.sigma).mean(1)]

    def token_z(self, states: Sequence[Tensor]) -> Tensor:
        """Mean over layers of z of each token, [T], from one state [T, D] a layer."""
        rows = [(project(state, self.directions[i]) - self.origin[i]) / self.sigma[i] for i, state in enumerate(states)]
        return torch.stack(rows).mean(0)


def above_floor_by_layer(floor: Floor, means: Tensor) -> Tensor:
    """Height of each answer's mean projection above the floor, (p - tau) / sigma, one a floor layer, [n, L].

    Args:
        floor: the floor.
        means: mean activations over each answer's tokens at the floor's layers, [n, L, D].
    """
    return (torch.einsum("nld,ld->nl", means, floor.directions) - floor.tau) / floor.sigma


def above_floor(floor: Floor, means: Tensor) -> Tensor:
    """Mean over the floor's layers of :func:`above_floor_by_layer`, in sigma, [n]: negative = below; NaN for an empty answer."""
    return above_floor_by_layer(floor, means).mean(1)


def below_floor(floor: Floor, means: Tensor) -> list[float]:
    """Whether each answer's mean projection lies below the floor, in sigma over the floor's layers: 1, 0, or NaN if empty.

    Args:
        floor: the floor.
        means: mean activations over each answer's tokens at the floor's layers, [n, L, D].
    """
    return [float("nan") if value != value else float(value < 0) for value in above_floor(floor, means).tolist()]


def slopes(table: np.ndarray[Any, Any]) -> list[float]:
    """Least-squares slope over turns of each conversation, of [turns, conversations]; NaN with fewer than 2 turns."""
    found = []
    for column in table.T:
        present = np.isfinite(column)
        enough = int(present.sum()) >= 2
        found.append(
            float(np.polyfit(np.arange(len(column))[present], column[present], 1)[0]) if enough else float("nan")
        )
    return found


def _nanmean(values: Tensor) -> Tensor:
    return values[torch.isfinite(values).all(1)].mean(0)


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
    form = arms.form
    heads = [form.prompt_ids(prompt) for prompt in given.prompts]
    tails = [form.answer_ids(text) for text in given.texts]
    scored = [i for i, tail in enumerate(tails) if tail]
    nan = float("nan")
    found = {arm: Forced([nan] * len(tails), [nan] * len(tails), [nan] * len(tails)) for arm in arms_to_score}
    with progress_bar(title, len(scored)) as bar:
        for batch in batches_by_length([len(heads[i]) + len(tails[i]) for i in scored], batch_size):
            rows = [scored[i] for i in batch]
            at_base = _forward(arms, "base", [heads[i] for i in rows], [tails[i] for i in rows], ruler)
            at_reference = (
                at_base
                if reference == "base"
                else _forward(arms, reference, [heads[i] for i in rows], [tails[i] for i in rows], ruler)
            )
            for arm in arms_to_score:
                known = {"base": at_base, reference: at_reference}
                at_arm = known.get(arm) or _forward(
                    arms, arm, [heads[i] for i in rows], [tails[i] for i in rows], ruler
                )
                for k, i in enumerate(rows):
                    targets = torch.tensor(tails[i], device=at_arm[k][0].device)
                    found[arm].kl[i] = float(divergence_terms(at_arm[k][0], at_reference[k][0]).mean())
                    found[arm].nll[i] = -float(
                        torch.log_softmax(at_arm[k][0].float(), -1).gather(-1, targets[:, None]).mean()
                    )
                    found[arm].z_shift[i] = float((at_arm[k][1] - at_base[k][1]).mean())
            bar.advance(0, len(rows))  # type: ignore[arg-type]
    return found


def _forward(
    arms: Arms, arm: str, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]], ruler: Ruler
) -> list[tuple[Tensor, Tensor]]:
    """Per row: logits that predict the answer's tokens [T, V], and z of those tokens [T] (as the next layer sees them)."""
    counts = [len(tail) for tail in tails]
    rows = [[*head, *tail] for head, tail in zip(heads, tails, strict=True)]
    logits, states = _read(arms, arm, rows, counts, logits_to_keep=max(counts) + 1)
    return [(logits[k, -count - 1 : -1], ruler.token_z(states[k])) for k, count in enumerate(counts)]


@torch.no_grad()
def read_means(arms: Arms, arm: str, given: Answers, *, batch_size: int, title: str) -> Tensor:
    """Mean activations of given answers under an arm, over the answer's tokens and as the next layer sees them, [n, L, D].

    NaN for an empty answer. The texts are read, not sampled, so that arms are compared on the same words.
    """
    heads = [arms.form.prompt_ids(prompt) for prompt in given.prompts]
    tails = [arms.form.answer_ids(text) for text in given.texts]
    found = torch.full((len(tails), len(arms.floor.layers), arms.floor.directions.shape[1]), float("nan"))
    kept = [i for i, tail in enumerate(tails) if tail]
    with progress_bar(title, len(kept)) as bar:
        for batch in batches_by_length([len(heads[i]) + len(tails[i]) for i in kept], batch_size):
            rows = [kept[k] for k in batch]
            counts = [len(tails[i]) for i in rows]
            _, states = _read(arms, arm, [[*heads[i], *tails[i]] for i in rows], counts, logits_to_keep=1)
            for i, layers in zip(rows, states, strict=True):
                found[i] = torch.stack([state.float().mean(0).cpu() for state in layers])
            bar.advance(0, len(rows))  # type: ignore[arg-type]
    return found


def message_embeddings(arms: Arms, messages: Sequence[str], *, batch_size: int) -> Tensor:
    """Mean activation of the base over each message's own tokens, at the floor's deepest layer, [n, D] float32."""
    rows, counts = [], []
    for message in messages:
        ids, (span,) = turn_spans(arms.form, [{"role": "user", "content": message}])
        rows.append(ids[: span[1]])
        counts.append(span[1] - span[0])
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with progress_bar("reading user messages", len(rows)) as bar:
        for batch in batches_by_length([len(row) for row in rows], batch_size):
            _, states = _read(arms, "base", [rows[i] for i in batch], [counts[i] for i in batch], logits_to_keep=1)
            for i, layers in zip(batch, states, strict=True):
                found[i] = layers[-1].float().mean(0).cpu()
            bar.advance(0, len(batch))  # type: ignore[arg-type]
    return torch.stack(found)


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
            controller.capping(arms.floor, enabled=arms.floor_of(arm) is not None),
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
    """
    form = arms.form
    heads = [form.prompt_ids(prompt) for prompt in prompts]
    tails = [form.answer_ids(text) for text in texts]
    rows = [(*head, *tail) for head, tail in zip(heads, tails, strict=True)]
    inside: dict[int, list[int]] = {}  # a row to read -> the answers that stand in it
    for i in sorted((i for i, tail in enumerate(tails) if tail), key=lambda i: -len(rows[i])):
        holder = next((j for j in inside if rows[j][: len(rows[i])] == rows[i]), i)
        inside.setdefault(holder, []).append(i)
    holders = list(inside)
    found: list[list[tuple[str, float]]] = [[] for _ in texts]
    for batch in batches_by_length([len(rows[j]) for j in holders], batch_size):
        chosen = [holders[k] for k in batch]
        # from the first answer on: what comes before it is not coloured
        counts = [len(rows[j]) - min(len(heads[i]) for i in inside[j]) for j in chosen]
        states = _read(arms, arm, [rows[j] for j in chosen], counts, logits_to_keep=1)[1]
        for j, count, layers in zip(chosen, counts, states, strict=True):
            z = ruler.token_z(layers)
            for i in inside[j]:
                start = len(heads[i]) - (len(rows[j]) - count)
                found[i] = _words(form, tails[i], texts[i], z[start : start + len(tails[i])].tolist())
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


def repeated_share(text: str, size: int = 4) -> float:
    """Share of word ``size``-grams that occurred before in the text: 0 for fresh text, towards 1 for loops; NaN if too short."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def keyword_hit(text: str, keywords: Sequence[str], least: int = 2) -> bool:
    """Whether at least ``least`` of the keywords occur in the answer."""
    lower = text.lower()
    return sum(keyword in lower for keyword in keywords) >= least


def firing_fraction(arms: Arms, arm: str, given: Answers, *, batch_size: int) -> float:
    """Share of (token, layer) slots on which the cap fires, over the answers' tokens, with the weights of ``arm``."""
    rows = [
        {"prompt": prompt, "completion": [{"content": text}]}
        for prompt, text in zip(given.prompts, given.texts, strict=True)
    ]
    with arms.weights(arm) as model:
        loaded = Loaded(model, arms.form.tokenizer, {})
        _, fraction = response_projections(
            loaded, arms.form, rows, {"axis": arms.floor.directions}, arms.floor.layers,
            batch_size=batch_size, floor=arms.floor, title=f"firing fraction: {arm}",
        )  # fmt: skip
    return fraction
