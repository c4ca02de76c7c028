"""Batched sampling with the cap on or off, and statistics of the answer's tokens gathered on the way.

Every row has a seed of its own, and the random number of a token is a function of that seed, the position in the answer and the
token (:func:`exponentials`). So what a row says does not depend on the rows beside it, the batch size, the rank that samples it
or the kind of device; and two arms that are sampled with one seed say the same until their distributions part.

Shapes: B batch, T tokens of the answer, D hidden size, N decoder layers, K candidate tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from trimtab.axis.chat_format import ChatFormat, Message
from trimtab.axis.directions import Floor
from trimtab.axis.errors import UserError
from trimtab.axis.files import fingerprint
from trimtab.axis.hooks import ActivationController
from trimtab.axis.layers import base_model_of
from trimtab.axis.progress import progress_bar
from trimtab.axis.soundness import not_finite

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
        ended: False where it was cut at ``max_new_tokens``, or is a thought that nothing ended.
        mean: mean activation over all of the answer's tokens (``ids``), [N, D] float32, where asked for; NaN where it has none.
        logprobs: the sampler's own log-probability of each token that was sampled, the thought's and the end's too; None where it
            tells none.
        thought: tokens before it that the template marks as a thought, see :meth:`ChatFormat.thought_length`: no part of the
            answer, but what it was sampled after. Mostly none, since prompts go on to where an answer begins.
    """

    index: int
    text: str
    ids: list[int]
    ended: bool
    mean: Tensor | None = None
    logprobs: list[float] | None = None
    thought: list[int] = field(default_factory=list)


def answer_of(
    form: ChatFormat, index: int, tokens: list[int], ends: Sequence[int] | None = None, **more: Any
) -> Answer:
    """The answer in a row of sampled tokens: behind a thought, if there is one, and up to the first token that ends it.

    Args:
        form: chat format.
        index: position of its prompt.
        tokens: what was sampled; anything may follow the end.
        ends: tokens that end an answer; None takes the chat format's.
        **more: further fields of the answer.
    """
    tokenizer: Any = form.tokenizer
    known = set(form.end_ids if ends is None else ends)
    end = next((i for i, token in enumerate(tokens) if token in known), None)
    said = tokens if end is None else tokens[:end]
    start = form.thought_length(said)
    thought, kept = said[:start], said[start:]
    ended = end is not None and (bool(kept) or not thought)  # a thought alone is no answer, so nothing has ended
    return Answer(index, tokenizer.decode(kept, skip_special_tokens=True), kept, ended, thought=thought, **more)


def candidates_of(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Temperature, then top-p over the likeliest candidates only.

    Returns:
        Scores of the candidates, [B, K] float32, -inf outside of the nucleus; and their token ids, [B, K] or [1, K].
    """
    scores = logits.float() / temperature
    if top_p >= 1:
        return scores, torch.arange(scores.shape[-1], device=scores.device).unsqueeze(0)
    values, tokens = scores.topk(min(NUCLEUS_CANDIDATES, scores.shape[-1]), dim=-1)
    total = scores.logsumexp(-1, keepdim=True)
    before = (values - total).exp().cumsum(-1) - (values - total).exp()
    return values.masked_fill(before >= top_p, float("-inf")), tokens


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64; int64 tensors wrap around as uint64 does."""
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


# The constants of splitmix64 (Steele, Lea and Flood 2014).
_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64: every bit of the result depends on every bit of the input."""

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # a logical shift

    bits = (bits ^ shifted(bits, 30)) * _FIRST
    bits = (bits ^ shifted(bits, 27)) * _SECOND
    return bits ^ shifted(bits, 31)


def exponentials(seeds: Tensor, position: int, tokens: Tensor) -> Tensor:
    """Exponential random numbers with mean 1, each a function of a row's seed, the position in its answer, and a token.

    Args:
        seeds: [B] int64.
        position: of the token in the answer, from 0.
        tokens: token ids, [B, K] or [1, K] int64.

    Returns:
        [B, K] float32, above 0; the smallest is 1e-10.
    """
    keys = _mixed(_mixed(seeds) + _signed((position + 1) * _GOLDEN)).unsqueeze(-1)
    bits = _mixed(keys + (tokens + 1) * _GOLDEN) & 0xFFFFFFFF
    return -torch.log1p(-(bits.float() + 0.5) * 2.0**-32)


class _RowSampler(LogitsProcessor):
    """Draws each row's next token by its own random numbers: argmax of log p - log E with E exponential is a draw from p.

    ``generate`` then has but one token to take. Processors that a caller adds run before those that ``generate`` makes of its
    config, so temperature and top-p are here too.
    """

    def __init__(self, options: SamplingOptions, seeds: Sequence[int], prompt_width: int, device: torch.device) -> None:
        self.options = options
        self.seeds = torch.tensor(list(seeds), device=device)
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept, tokens = candidates_of(scores, self.options.temperature, self.options.top_p)
        drawn = exponentials(self.seeds, input_ids.shape[1] - self.prompt_width, tokens)
        best = (kept - drawn.log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter_(-1, tokens.expand_as(kept).gather(-1, best), 0.0)


class _AnswerProgress(StoppingCriteria):
    """Keeps which rows are still inside their answer, for the hooks that read the next step.

    Attributes:
        alive: rows whose answer has not ended, [B].
        thinking: rows of which all tokens so far are a thought, [B]; None where none can be.
        step: tokens sampled so far.
    """

    def __init__(self, form: ChatFormat, end_ids: Sequence[int], rows: int, device: torch.device) -> None:
        self.end_ids = torch.tensor(list(end_ids), dtype=torch.long, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.thinking: Tensor | None = None
        self.step = 0
        self._form = form
        self._open = [] if form.thought is None else list(range(rows))  # rows that may still be in a thought

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.alive &= ~torch.isin(input_ids[:, -1], self.end_ids)
        self.step += 1
        self.thinking = self._thinking(input_ids) if self._open else None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def _thinking(self, input_ids: Tensor) -> Tensor:
        said = {row: input_ids[row, -self.step :].tolist() for row in self._open}
        inside = [row for row, ids in said.items() if self._form.thought_length(ids) == len(ids)]
        self._open = [row for row, ids in said.items() if row in inside or self._form.may_think(ids)]
        found = torch.zeros_like(self.alive)
        found[inside] = True
        return found


class _FiniteLogits(LogitsProcessor):
    """Notes whether a row's logits were ever not finite inside its answer; it is read once a batch, which keeps a GPU going."""

    def __init__(self, progress: _AnswerProgress) -> None:
        self.progress = progress
        self.broken = torch.zeros_like(progress.alive)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.broken |= self.progress.alive & ~torch.isfinite(scores.amax(-1))
        return scores


class _FirstTokens(BaseStreamer):
    """Hands a streamer the prompt and the answer's own tokens, not the one that is sampled beyond it."""

    def __init__(self, streamer: BaseStreamer, tokens: int) -> None:
        self.streamer = streamer
        self.left = tokens + 1

    def put(self, value: Tensor) -> None:
        if self.left:
            self.left -= 1
            self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


class AnswerMeans:
    """Sums of decoder-layer outputs over the answer's tokens, gathered by the hooks: [B, N, D] float32.

    They lie where the layers compute, and all layers of a token are added at once: on a GPU a copy to the CPU would stop it at
    every layer, and each operation more costs as much as one of a small model's own.
    """

    def __init__(self, layers: int, progress: _AnswerProgress) -> None:
        self.layers = layers
        self.progress = progress
        self.sums: Tensor | None = None
        self.counts = torch.zeros_like(progress.alive, dtype=torch.float32)
        self._token: dict[int, Tensor] = {}  # layer -> its state of this token, [B, D]
        self._done = 0  # step whose token is summed

    def __call__(self, layer: int, hidden: Tensor) -> None:
        """Reader of :meth:`ActivationController.reading`."""
        if self.progress.step == 0:  # the prompt
            return
        if layer in self._token or self._done == self.progress.step:
            raise UserError(
                f"decoder layer {layer} runs more than once a token, so it has no one state",
                key="model.name",
                remedy="use a model whose layers run once each",
            )
        self._token[layer] = hidden[:, -1]
        if len(self._token) < self.layers:
            return
        alive = self.progress.alive
        token = torch.stack([self._token[layer].to(alive.device) for layer in range(self.layers)], 1).float()
        token = token.masked_fill(~alive[:, None, None], 0)
        self.sums = token if self.sums is None else self.sums + token
        self.counts += alive
        if self.progress.thinking is not None:  # the answer is yet to begin
            self.sums = self.sums.masked_fill(self.progress.thinking[:, None, None], 0)
            self.counts = self.counts.masked_fill(self.progress.thinking, 0)
        self._token, self._done = {}, self.progress.step

    def means(self, hidden_size: int) -> Tensor:
        """Mean over each answer's tokens, on the CPU, [B, N, ``hidden_size``]; NaN for an answer of no tokens."""
        counts = self.counts.cpu()
        sums = torch.zeros(len(counts), self.layers, hidden_size) if self.sums is None else self.sums.cpu()
        return sums / counts[:, None, None]


def seed_of(parts: Sequence[Any]) -> int:
    """A sampling seed from what names a row: the same parts give the same seed in any process, and after a resume."""
    return int(fingerprint(list(parts)), 16) % (1 << 62)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length (shortest first), so that little is padded; the order is deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batches_on_all_ranks(lengths: Sequence[int], batch_size: int, most: Callable[[int], int] = int) -> list[list[int]]:
    """:func:`batches_by_length`, then empty batches until every rank has as many.

    Under ZeRO-3 and FSDP each forward is a collective: a rank with fewer batches would leave the others waiting for ever.

    Args:
        lengths: of this rank's rows.
        batch_size: rows a batch.
        most: gives the largest of a number over all ranks, which all call it; by default there is no other rank.
    """
    batches = batches_by_length(lengths, batch_size)
    return [*batches, *[[] for _ in range(most(len(batches)) - len(batches))]]


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
    seeds: Sequence[int],
    means: bool = False,
    floor: Floor | None = None,
    strength: float = 1.0,
    streamer: BaseStreamer | None = None,
) -> list[Answer]:
    """Sample one batch of answers.

    Args:
        model: the model, with or without an adapter.
        form: chat format of its tokenizer.
        prompts: token ids of the rows of this batch; of none, a token's answer is sampled for nothing, so that other ranks need
            not wait: see :func:`batches_on_all_ranks`.
        indices: the rows' positions, carried over to the answers.
        options: sampling options.
        seeds: a seed for each row, see :func:`seed_of`. The global random state is neither used nor changed.
        means: also return mean activations, as the next layer sees them (after the cap, where there is one). It costs one more
            token where an answer is cut: its last one has yet to pass the model, and the one that this gives is thrown away.
        floor: cap to this floor while sampling; None samples uncapped.
        strength: strength of that cap.
        streamer: of transformers, gets the tokens of a batch of one as they come.

    Raises:
        UserError: if the model's logits are not finite inside an answer.
    """
    controller = ActivationController.of(model)
    device = next(model.parameters()).device
    tokenizer: Any = form.tokenizer
    if not prompts:
        prompts, seeds = [[form.end_token]], [0]
    ids, mask = pad_left(prompts, tokenizer.pad_token_id, device)
    ends = form.ends_with(model)
    progress = _AnswerProgress(form, ends, len(prompts), device)
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens + means,
        do_sample=False,  # of the one token that the processor leaves
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    finite = _FiniteLogits(progress)
    processors: list[LogitsProcessor] = [finite]
    if options.temperature > 0:
        processors.append(_RowSampler(options, seeds, ids.shape[1], device))
    reader = AnswerMeans(controller.n_layers, progress) if means else None
    training = model.training
    model.eval()
    try:
        with (
            _no_inherited_settings(model),
            controller.capping(floor, strength) if floor is not None else contextlib.nullcontext(),
        ):
            with (
                controller.reading(range(controller.n_layers), reader, after_cap=True)
                if reader is not None
                else contextlib.nullcontext()
            ):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList(processors),
                    stopping_criteria=StoppingCriteriaList([progress]),
                    streamer=streamer if streamer is None else _FirstTokens(streamer, options.max_new_tokens),
                )
            if finite.broken.any():
                told = torch.cat([mask, torch.ones_like(output[:, ids.shape[1] :])], 1)
                raise not_finite(model, output[finite.broken], told[finite.broken])
    finally:
        model.train(training)
    all_means = reader.means(controller.hidden_size) if reader is not None else [None] * len(prompts)
    said = output[:, ids.shape[1] :][:, : options.max_new_tokens].tolist()
    return [answer_of(form, index, said[row], ends, mean=all_means[row]) for row, index in enumerate(indices)]


# Gives an answer to each row of tokens, its index the row's place, by the row's seed; all ranks call it alike.
Sampler = Callable[[Sequence[Sequence[int]], Sequence[int]], Iterable[Answer]]


def sample_on_all_ranks(
    model: Any,
    form: ChatFormat,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[int],
    options: SamplingOptions,
    *,
    most: Callable[[int], int],
    floor: Floor | None,
    strength: float,
) -> Iterator[Answer]:
    """An answer to each row of tokens, its index the row's place, as its batch is done; all ranks call the model equally often.

    Args:
        model: as for :func:`sample_batch`.
        form: chat format.
        rows: token ids up to the answers; perhaps none.
        seeds: a seed for each row.
        options: sampling options.
        most: as of :func:`batches_on_all_ranks`.
        floor: cap to this floor while sampling.
        strength: strength of that cap.
    """
    for batch in batches_on_all_ranks([len(row) for row in rows], options.batch_size, most):
        yield from sample_batch(
            model, form, [rows[k] for k in batch], batch, options,
            seeds=[seeds[k] for k in batch], floor=floor, strength=strength,
        )  # fmt: skip


def sample_answers(
    model: Any,
    form: ChatFormat,
    chats: Sequence[Sequence[Message]],
    options: SamplingOptions,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
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
        seed: of the whole, where ``seeds`` is None: a chat's own is made of it and the chat's place.
        seeds: of each chat, see :func:`seed_of`.
        means: also return mean activations: see :func:`sample_batch`.
        floor: cap to this floor while sampling.
        strength: strength of that cap.
        title: label of the progress bar.
    """
    prompts = [form.prompt_ids(messages) for messages in chats]
    own = [seed_of([seed, i]) for i in range(len(chats))] if seeds is None else seeds
    found: list[Answer] = []
    with progress_bar(title, len(prompts)) as bar:
        for batch in batches_by_length([len(prompt) for prompt in prompts], options.batch_size):
            found += sample_batch(
                model, form, [prompts[i] for i in batch], batch, options,
                seeds=[own[i] for i in batch], means=means, floor=floor, strength=strength,
            )  # fmt: skip
            bar.advance(len(batch))
    return sorted(found, key=lambda answer: answer.index)
