"""Batched sampling with the cap on or off, and statistics of the answer's tokens gathered on the way.

Shapes: B batch, T tokens of the answer, D hidden size, N decoder layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from trimtab.axis.chat import ChatFormat, Message
from trimtab.axis.directions import Floor
from trimtab.axis.files import fingerprint
from trimtab.axis.hooks import ActivationController
from trimtab.axis.layers import base_model_of
from trimtab.axis.progress import progress_bar

# top-p needs a sort of the vocabulary, which on a CPU costs as much as the model. The nucleus of 0.9 lies inside the 256
# likeliest tokens but for near-uniform distributions, so the sort runs over those alone.
NUCLEUS_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: nucleus; 1 turns it off.
        batch_size: prompts a batch.
    """

    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    batch_size: int = 64


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        index: position of its prompt in the list that was given.
        text: decoded answer.
        ids: its tokens, without the end-of-turn token.
        ended: False where it was cut at ``max_new_tokens``.
        mean: mean activation over the answer's tokens, [N, D] float32, where asked for. The last token of a cut answer is
            sampled but never fed through the model, so it is not in the mean.
    """

    index: int
    text: str
    ids: list[int]
    ended: bool
    mean: Tensor | None = None


class _Nucleus(LogitsProcessor):
    """Temperature, then top-p over the likeliest candidates only.

    Processors that a caller adds run before those that ``generate`` makes of its config, so the temperature is here too.
    """

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self.temperature
        if self.top_p >= 1:
            return scores
        values, indices = scores.topk(min(NUCLEUS_CANDIDATES, scores.shape[-1]), dim=-1)
        total = scores.logsumexp(-1, keepdim=True)
        before = (values - total).exp().cumsum(-1) - (values - total).exp()
        kept = values.masked_fill(before >= self.top_p, float("-inf"))
        return torch.full_like(scores, float("-inf")).scatter_(-1, indices, kept)


class _AnswerProgress(StoppingCriteria):
    """Keeps which rows are still inside their answer, for the hooks that read the next step."""

    def __init__(self, end_ids: Sequence[int], rows: int) -> None:
        self.end_ids = torch.tensor(list(end_ids))
        self.alive = torch.ones(rows, dtype=torch.bool)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1].cpu()
        self.alive &= ~torch.isin(last, self.end_ids)
        self.step += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class AnswerMeans:
    """Sums of decoder-layer outputs over the answer's tokens, accumulated inside the hooks: [B, N, D] float32."""

    def __init__(self, rows: int, layers: int, hidden: int, progress: _AnswerProgress) -> None:
        self.sums = torch.zeros(rows, layers, hidden)
        self.counts = torch.zeros(rows)
        self.progress = progress

    def __call__(self, layer: int, hidden: Tensor) -> None:
        """Reader of :meth:`ActivationController.reading`."""
        if self.progress.step == 0:  # the prompt
            return
        alive = self.progress.alive
        step = hidden[:, -1].to(device="cpu", dtype=torch.float32)
        self.sums[:, layer].add_(step.masked_fill(~alive.unsqueeze(-1), 0))
        if layer == 0:
            self.counts += alive

    def means(self) -> Tensor:
        """Mean over each answer's tokens, [B, N, D]; NaN for an answer of no tokens."""
        return self.sums / self.counts[:, None, None]


def seed_of(parts: Sequence[Any]) -> int:
    """A sampling seed from what names a batch: the same parts give the same seed in any process, and after a resume."""
    return int(fingerprint(list(parts)), 16) % (1 << 62)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length (shortest first), so that little is padded; the order is deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token rows on the left. Returns ids [B, T] and attention mask [B, T]."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(list(row))
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers inside the block alone: rollouts sampled during training leave its dropout as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _no_inherited_settings(model: Any) -> Iterator[None]:
    """Keep ``generate`` from filling our settings up with the checkpoint's own, such as a repetition penalty."""
    base = base_model_of(model)
    held = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = held


@torch.no_grad()
def sample_batch(
    model: Any,
    form: ChatFormat,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    options: SamplingOptions,
    *,
    seed: int,
    means: bool = False,
    floor: Floor | None = None,
    strength: float = 1.0,
) -> list[Answer]:
    """Sample one batch of answers.

    Args:
        model: the model, with or without an adapter.
        form: chat format of its tokenizer.
        prompts: token ids of the rows of this batch.
        indices: the rows' positions, carried over to the answers.
        options: sampling options.
        seed: seed of this batch; the same seed and rows give the same random numbers in every arm. The global random state
            is left as it was.
        means: also return mean activations, as the next layer sees them (after the cap, where there is one).
        floor: cap to this floor while sampling; None samples uncapped.
        strength: strength of that cap.
    """
    controller = ActivationController.of(model)
    device = next(model.parameters()).device
    tokenizer: Any = form.tokenizer
    ids, mask = pad_left(prompts, tokenizer.pad_token_id, device)
    progress = _AnswerProgress(form.end_ids, len(prompts))
    greedy = options.temperature == 0
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=not greedy,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=form.end_ids or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    processors: list[LogitsProcessor] = [] if greedy else [_Nucleus(options.temperature, options.top_p)]
    reader = AnswerMeans(len(prompts), controller.n_layers, controller.hidden_size, progress) if means else None
    training = model.training
    model.eval()
    try:
        with (
            _seeded(seed, device),
            _no_inherited_settings(model),
            controller.capping(floor, strength) if floor is not None else contextlib.nullcontext(),
            controller.reading(range(controller.n_layers), reader, after_cap=True)
            if reader is not None
            else contextlib.nullcontext(),
        ):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([progress]),
            )
    finally:
        model.train(training)
    answers: list[Answer] = []
    all_means = reader.means() if reader is not None else None
    ends = set(form.end_ids)
    for row, index in enumerate(indices):
        tokens = output[row, ids.shape[1] :].tolist()
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[:end]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        answers.append(Answer(index, text, kept, end is not None, None if all_means is None else all_means[row]))
    return answers


def sample_answers(
    model: Any,
    form: ChatFormat,
    chats: Sequence[Sequence[Message]],
    options: SamplingOptions,
    *,
    seed: int,
    means: bool = False,
    floor: Floor | None = None,
    strength: float = 1.0,
    title: str = "sampling",
) -> list[Answer]:
    """Sample an answer to each chat, in batches of like length; in the order of ``chats``.

    Args:
        model: the model.
        form: chat format.
        chats: messages up to the answer.
        options: sampling options.
        seed: seed of the whole; equal seeds and chats give every arm the same random numbers.
        means: as for :func:`sample_batch`, and so the next two.
        floor: cap to this floor while sampling.
        strength: strength of that cap.
        title: label of the progress bar.
    """
    prompts = [form.prompt_ids(messages) for messages in chats]
    found: list[Answer] = []
    with progress_bar(title, len(prompts)) as bar:
        for number, batch in enumerate(batches_by_length([len(prompt) for prompt in prompts], options.batch_size)):
            found += sample_batch(
                model, form, [prompts[i] for i in batch], batch, options,
                seed=seed * 100_003 + number, means=means, floor=floor, strength=strength,
            )  # fmt: skip
            bar.advance(0, len(batch))  # type: ignore[arg-type]
    return sorted(found, key=lambda answer: answer.index)
