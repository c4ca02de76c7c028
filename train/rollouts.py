"""Capped rollouts on the fly: the training set whose answers are sampled while training goes on.

The order of prompts is fixed before training. A *round* is the prompts of ``regenerate_every`` optimiser steps; when its first
step begins, the whole round is sampled with the weights of that step, which are those of its checkpoint, and the cap at its
strength, and written to ``rollouts/``. accelerate's loader looks one batch ahead, so it hands out row numbers alone: the trainer
turns them into tokens when their step begins. Who samples a row is its *sampler* (see :data:`SAMPLERS`). Benign rows anchor the
model where it should not change: they are answered by the base, or by the student itself, so that it is held where its own words
lead it.

Trained is what was sampled: an answer's very tokens, since its text may become others, and the conversation as its sampler saw
it. History is text, as a server renders it anew for each turn. Where prompt and answer would outgrow ``max_length``, the oldest
turns are left out before the answer is sampled.

After a kill, rounds that lie on disk are read again instead of sampled, so a resumed run sees the same rows.

With several ranks each samples its own rows, and all of them call the model equally often: under ZeRO-3 and FSDP every forward
of ``generate`` is a collective, and a rank with fewer batches would leave the others waiting for ever. Where the trainer has a
vLLM, that samples all of it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch

from trimtab.axis import Floor, UserError
from trimtab.axis.adapters import merged_if_quicker
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.files import fingerprint, read_jsonl, write_jsonl
from trimtab.axis.playing import PlayedTurn, instructions, play, recent_turns, scripted, unanswered
from trimtab.axis.progress import progress_bar
from trimtab.axis.sampling import Answer, Sampler, SamplingOptions, sample_on_all_ranks, seed_of
from trimtab.train.schedule import Schedule, carried, scheduled

log = logging.getLogger("trimtab")

Kind = Literal["drift", "benign"]
IGNORED = -100

# Who samples: "current" weights or the "base" (adapter off), under the cap or not. SFT trains on what the current weights say
# under the cap; distillation on what the student itself says, and what its teacher, the capped self, says.
SamplerKind = Literal["capped", "student", "capped_self", "base"]
SAMPLERS: tuple[SamplerKind, ...] = ("capped", "student", "capped_self", "base")


@dataclass(frozen=True)
class TrainPrompt:
    """A prompt of the training set.

    Attributes:
        id: stable name.
        kind: ``drift`` or ``benign``.
        system: system prompt, "" for none.
        turns: user turns; the answer to the last one is trained on, those before it are sampled along the way.
        source: role or domain, for the records.
        history: (role, content) of messages between the system prompt and the first of these turns, which stand as they are.
    """

    id: str
    kind: Kind
    system: str
    turns: tuple[str, ...]
    source: str
    history: tuple[tuple[str, str], ...] = ()

    @property
    def before(self) -> list[dict[str, str]]:
        """The messages before the first of these turns."""
        return [*chat(self.system, "")[:-1], *({"role": role, "content": content} for role, content in self.history)]

    @property
    def opening(self) -> list[dict[str, str]]:
        """The messages up to the first answer that is sampled."""
        return [*self.before, {"role": "user", "content": self.turns[0]}]

    @property
    def closing(self) -> list[dict[str, str]]:
        """The messages up to the last answer, with empty ones in the place of those that are sampled along the way."""
        return unanswered(self.before, self.turns)


def training_order(
    drift: Sequence[TrainPrompt],
    benign: Sequence[TrainPrompt],
    *,
    micro_batches: int,
    ranks: int,
    batch_size: int,
    benign_share: float,
    seed: int,
) -> list[TrainPrompt]:
    """The training set's order: each list is gone through in shuffled passes, and kinds are mixed by ``benign_share``.

    Every rank's n-th micro-batch has the same number of benign rows, because benign rows take a forward of their own and under
    ZeRO-3 and FSDP all ranks must do the same forwards.

    Args:
        drift: drift prompts; not empty unless the share is 1.
        benign: benign prompts; not empty unless the share is 0.
        micro_batches: micro-batches of a rank over the whole run.
        ranks: number of processes.
        batch_size: rows a micro-batch.
        benign_share: share of benign rows.
        seed: shuffling seed.
    """
    generator = random.Random(seed)

    def passes(prompts: Sequence[TrainPrompt]) -> Iterator[TrainPrompt]:
        while True:
            shuffled = list(prompts)
            generator.shuffle(shuffled)
            yield from shuffled

    if (benign_share < 1 and not drift) or (benign_share > 0 and not benign):
        raise UserError(
            "there is nothing to train on", key="data", remedy="give drift prompts, and benign ones for a share"
        )
    of_kind: dict[str, Iterator[TrainPrompt]] = {"drift": passes(drift), "benign": passes(benign)}
    order: list[TrainPrompt] = []
    for step in range(micro_batches):
        count = carried(step + 1, batch_size * benign_share) - carried(step, batch_size * benign_share)
        for _ in range(ranks):
            order += [next(of_kind["drift"]) for _ in range(batch_size - count)]
            order += [next(of_kind["benign"]) for _ in range(count)]
    return order


@dataclass(frozen=True)
class RolloutPlan:
    """How rollouts are made.

    Attributes:
        order: the training set, row by row.
        rows_a_step: rows of one optimiser step over all ranks.
        batch_size: rows a micro-batch of one rank.
        every: optimiser steps a round.
        total_steps: optimiser steps of the run.
        strength: cap strength at the start.
        schedule: how it is annealed.
        options: sampling options.
        seed: sampling seed.
        student_share: share of drift rows that the uncapped student samples, the capped self the others; None: the current
            weights sample them all under the cap.
        benign_student_share: share of benign rows that the uncapped student answers, the base the others.
    """

    order: Sequence[TrainPrompt]
    rows_a_step: int
    batch_size: int
    every: int
    total_steps: int
    strength: float
    schedule: Schedule
    options: SamplingOptions
    seed: int
    student_share: float | None = None
    benign_student_share: float = 0.0

    @functools.cached_property
    def _samplers(self) -> list[SamplerKind]:
        turns: dict[Kind, Iterator[SamplerKind]] = {
            "drift": itertools.repeat("capped")
            if self.student_share is None
            else _in_turn(self.student_share, "capped_self"),
            "benign": _in_turn(self.benign_student_share, "base"),
        }
        # each kind by itself: benign rows sit at fixed places of a batch, and would take one sampler's turns away
        return [next(turns[prompt.kind]) for prompt in self.order]

    def sampler_of(self, row: int) -> SamplerKind:
        """Who samples a row."""
        return self._samplers[row]

    @functools.cached_property
    def _names(self) -> list[tuple[Kind, int]]:
        """Kind and number within the kind of each row: what it is on any number of ranks."""
        counts: dict[Kind, Iterator[int]] = {"drift": itertools.count(), "benign": itertools.count()}
        return [(prompt.kind, next(counts[prompt.kind])) for prompt in self.order]

    def seed_of(self, row: int, turn: int) -> int:
        """The sampling seed of a row's answer at a turn."""
        return seed_of([self.seed, *self._names[row], turn])

    def strength_at(self, step: int) -> float:
        """Cap strength of a round that begins at this optimiser step."""
        return scheduled(self.strength, self.schedule, step, self.total_steps)

    def round_of(self, row: int) -> int:
        """The round of a row."""
        return row // (self.rows_a_step * self.every)

    def rows_in(self, round_number: int) -> range:
        """The rows of a round."""
        size = self.rows_a_step * self.every
        return range(round_number * size, min((round_number + 1) * size, len(self.order)))

    def rows_of(self, round_number: int, rank: int, ranks: int) -> list[int]:
        """The rows of a round that this rank's data loader will ask for."""
        return [row for row in self.rows_in(round_number) if (row // self.batch_size) % ranks == rank]


def _in_turn(share: float, other: SamplerKind) -> Iterator[SamplerKind]:
    """The student as often as ``share`` says, spread evenly, and the other in between."""
    for count in itertools.count():
        yield "student" if carried(count + 1, share) > carried(count, share) else other


class RolloutSource:
    """Makes rows of token ids for a trainer, sampling rounds when they are first needed.

    Args:
        plan: what to sample, and when.
        form: chat format.
        floor: the cap's floor; None samples drift rows uncapped (the plain SFT control).
        folder: where rounds are written.
        max_length: longest row in tokens; None for any.
    """

    def __init__(
        self, plan: RolloutPlan, form: ChatFormat, floor: Floor | None, folder: Path, *, max_length: int | None
    ) -> None:
        self.plan = plan
        self.form = form
        self.floor = floor
        self.folder = folder
        self.max_length = max_length
        self._trainer: Any = None
        self._rows: dict[int, Row] = {}

    def bind(self, trainer: Any) -> None:
        """Give the trainer whose weights sample."""
        self._trainer = trainer

    def dataset(self) -> datasets.Dataset:
        """The numbers of all rows, for a data loader that may look ahead."""
        return datasets.Dataset.from_dict({"row": list(range(len(self.plan.order)))})

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        """Row numbers to ``input_ids``, ``labels``, ``anchor``; a round that was not needed before is sampled now."""
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "anchor": []}
        for number in batch["row"]:
            if number not in self._rows:
                self._load(self.plan.round_of(number))
            row = self._rows[number]
            columns["input_ids"].append(row.ids)
            columns["labels"].append(row.labels)
            columns["anchor"].append(self.plan.order[number].kind == "benign")
        return columns

    def _load(self, round_number: int) -> None:
        accelerator = self._trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        rows = self.plan.rows_of(round_number, rank, ranks)
        identity = fingerprint([[self.plan.order[row].id for row in self.plan.rows_in(round_number)], self.plan.seed])
        stem = f"round-{round_number:04d}-of-rank-"
        ours = [self.folder / f"{stem}{each}.jsonl" for each in range(ranks)]
        files = sorted(self.folder.glob(f"{stem}*.jsonl"))  # by whatever number of ranks they were made
        found = [record for path in files for record in read_jsonl(path)]
        known = {record["row"]: record for record in found if record["identity"] == identity}
        # A kill may have come between the files of two ranks: then all sample the round again, none of it was trained on.
        there = all(row in known for row in rows)
        absent = accelerator.reduce(torch.tensor(float(not there), device=accelerator.device), "sum")
        if float(absent) > 0:
            if rank == 0:
                for path in set(files) - set(ours):
                    path.unlink()
            self._tell_if_late(round_number, rows)
            records = self._sample(round_number, rows, identity)
            write_jsonl(ours[rank], records)
            known = {record["row"]: record for record in records}
        self._rows = {row: self._tokens(known[row]) for row in rows}
        self._tell_what_does_not_fit(round_number, [known[row] for row in rows])

    def _tokens(self, record: dict[str, Any]) -> Row:
        # a round of an older version has no ids
        answer = record.get("completion_ids", record["completion"][0]["content"])
        return tokens_of(self.form, record["prompt"], answer, record["ended"], self.max_length)

    def _tell_if_late(self, round_number: int, rows: Sequence[int]) -> None:
        """A resumed run finds its rounds on disk; where one is gone, today's weights are not those that sampled it."""
        begins, now = round_number * self.plan.every, self._trainer.state.global_step
        if begins != now and any(self.plan.sampler_of(row) in ("capped", "student") for row in rows):
            log.warning(
                "round %d began at step %d, and its file is not there: it is sampled again with the weights of step %d",
                round_number, begins, now,
            )  # fmt: skip

    def _tell_what_does_not_fit(self, round_number: int, records: Sequence[dict[str, Any]]) -> None:
        """Log over all ranks how many rows lack their oldest turns, and how many lose tokens of their answers."""
        rows = [self._rows[record["row"]] for record in records]
        dropped = [
            row.turns_dropped + record.get("turns_dropped", 0) for row, record in zip(rows, records, strict=True)
        ]
        lost = [row.tokens_lost for row in rows]
        counts = [len(rows), sum(map(bool, dropped)), sum(dropped), sum(map(bool, lost)), sum(lost)]
        accelerator = self._trainer.accelerator
        total = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
        if total[1]:
            log.info(
                "round %d: %d of %d rows are without their oldest turns (%d in all), which train.max_length=%s does not hold",
                round_number, total[1], total[0], total[2], self.max_length,
            )  # fmt: skip
        if total[3]:
            log.warning(
                "round %d: %d of %d rows lose the end of their answer (%d tokens in all), since the last turn alone is longer "
                "than train.max_length=%s: raise it, or lower method.sampling.max_new_tokens",
                round_number, total[3], total[0], total[4], self.max_length,
            )  # fmt: skip

    def _sample(self, round_number: int, rows: Sequence[int], identity: str) -> list[dict[str, Any]]:
        from trl.models.utils import unwrap_model_for_generation

        plan, trainer = self.plan, self._trainer
        annealed = plan.strength_at(round_number * plan.every)
        records: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            model = None
            if trainer.vllm is None:
                stack.enter_context(_checkpointing_kept(trainer.model))
                model = stack.enter_context(unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator))
            for kind in SAMPLERS:
                chosen = [row for row in rows if plan.sampler_of(row) == kind]
                if trainer.most(len(chosen)):
                    of_cap = {"capped": annealed, "capped_self": 1.0}
                    strength = 0.0 if self.floor is None else of_cap.get(kind, 0.0)
                    title = f"round {round_number} rollouts ({kind.replace('_', ' ')}, cap {strength:.2f})"
                    with self._sampler(model, kind, strength) as sample:
                        played = self._play(sample, chosen, title)
                    facts = {"sampler": kind, "cap_strength": strength, "round": round_number, "identity": identity}
                    records += [{**record, **facts} for record in played]
        return sorted(records, key=lambda record: record["row"])

    @contextlib.contextmanager
    def _sampler(self, model: Any, kind: SamplerKind, strength: float) -> Iterator[Sampler]:
        """What answers rows of tokens: the trainer's vLLM, or else the model."""
        plan, trainer = self.plan, self._trainer
        of_base = kind in ("base", "capped_self")
        if trainer.vllm is not None:
            step = None if of_base else trainer.state.global_step
            with trainer.vllm.sampling(step, strength, plan.options) as sample:
                yield sample
            return
        floor = self.floor if strength > 0 else None
        # the current weights merged meanwhile, where that is what makes sampling quick
        with model.disable_adapter() if of_base else merged_if_quicker(model):
            yield lambda rows, seeds: sample_on_all_ranks(
                model, self.form, rows, seeds, plan.options, most=trainer.most, floor=floor, strength=strength
            )

    def _play(self, sample: Sampler, rows: Sequence[int], title: str) -> list[dict[str, Any]]:
        """Play the conversations of these rows; all ranks play as many turns."""
        plan, prompts = self.plan, [self.plan.order[row] for row in rows]
        longest = self._trainer.most(max((len(prompt.turns) for prompt in prompts), default=0))
        room = room_of_prompt(self.max_length, plan.options)
        done: dict[int, Answer] = {}
        with progress_bar(title, len(rows)) as bar:

            def answer(turn: PlayedTurn) -> list[str]:
                for found in sample(turn.ids, [plan.seed_of(rows[i], turn.number) for i in turn.going]):
                    i = turn.going[found.index]
                    done[i] = found
                    bar.advance(turn.number + 1 == len(prompts[i].turns))
                return [done[i].text for i in turn.going]

            talks = play(
                [prompt.before for prompt in prompts],
                scripted([prompt.turns for prompt in prompts]),
                answer,
                turns=longest,
                trim=functools.partial(recent_turns, self.form, room=room),
                in_step=True,
            )
        return [
            {
                "id": prompts[i].id,
                "row": row,
                "kind": prompts[i].kind,
                "source": prompts[i].source,
                "prompt": talks[i].messages[:-1],
                "completion": talks[i].messages[-1:],
                "completion_ids": done[i].ids,
                "ended": done[i].ended,
                "turns_dropped": talks[i].turns_dropped,
                "seed": plan.seed,
            }
            for i, row in enumerate(rows)
        ]


@contextlib.contextmanager
def _checkpointing_kept(model: Any) -> Iterator[None]:
    """Give gradient checkpointing its settings back, since TRL switches it on again with the library's defaults."""
    held = [
        (module, module.gradient_checkpointing, module._gradient_checkpointing_func)
        for module in model.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    ]
    try:
        yield
    finally:
        for module, enabled, function in held:
            module.gradient_checkpointing, module._gradient_checkpointing_func = enabled, function


class Row(NamedTuple):
    """A row of the training set as tokens.

    Attributes:
        ids: prompt and answer.
        labels: the answer's ids, and :data:`IGNORED` before it.
        turns_dropped: user turns, the oldest, that were left out with their answers so that it fits.
        tokens_lost: tokens at the answer's end that don't fit even so.
    """

    ids: list[int]
    labels: list[int]
    turns_dropped: int
    tokens_lost: int


def tokens_of(
    form: ChatFormat,
    prompt: Sequence[dict[str, str]],
    answer: str | Sequence[int],
    ended: bool,
    max_length: int | None,
) -> Row:
    """Token ids and labels of a row: only the answer, and its end-of-turn token where it ended, carry labels.

    What is longer than ``max_length`` loses its oldest turns (:func:`recent_turns`). Where the last turn alone is too long, the
    answer loses its end, and with it the end-of-turn token: it is never taught to stop there.

    Args:
        form: chat format.
        prompt: messages up to the answer.
        answer: as for :func:`answer_tokens`.
        ended: whether the answer ended by itself.
        max_length: of the row; None for any.
    """
    tail = answer_tokens(form, answer, ended)
    room = None if max_length is None else max_length - len(tail)
    _, head, dropped = recent_turns(form, prompt, room)
    ids, labels = head + tail, [IGNORED] * len(head) + tail
    lost = 0 if max_length is None else min(max(len(ids) - max_length, 0), len(tail))
    return Row(ids[:max_length], labels[:max_length], dropped, lost)


def answer_tokens(form: ChatFormat, answer: str | Sequence[int], ended: bool) -> list[int]:
    """Token ids of an answer, with its end-of-turn token where it ended.

    Args:
        form: chat format.
        answer: its ids as they were sampled, without an end; or a text of which none are known.
        ended: whether it ended by itself.
    """
    ids = form.answer_ids(answer) if isinstance(answer, str) else list(answer)
    return [*ids, form.end_token] if ended else ids


def room_of_prompt(max_length: int | None, options: SamplingOptions) -> int | None:
    """Tokens that a prompt may have, so that the longest answer and its end still fit in the row; None for any number."""
    return None if max_length is None else max_length - options.max_new_tokens - 1


def _alone(prompt: TrainPrompt) -> list[dict[str, str]]:
    """The least that is left of a prompt when its oldest turns are left out."""
    return [*instructions(prompt.opening), {"role": "user", "content": prompt.turns[-1]}]


def check_lengths(
    form: ChatFormat,
    prompts: Sequence[TrainPrompt],
    max_length: int | None,
    options: SamplingOptions,
    context: int | None = None,
) -> None:
    """Check before anything is sampled that every last turn has room for its answer, and tell how many may outgrow the row.

    Args:
        form: chat format.
        prompts: of the training set.
        max_length: of a row, ``train.max_length``; None for any.
        options: how answers are sampled.
        context: tokens that the model takes at most; None for any.

    Raises:
        UserError: naming the longest prompt, if it leaves too little room in the row or in the context.
    """
    if not prompts:
        return
    if context is not None and (max_length is None or context < max_length):
        _check_context(form, prompts, max_length, options, context)
        max_length = context
    room = room_of_prompt(max_length, options)
    if room is None:
        return
    alone = [len(form.prompt_ids(_alone(prompt))) for prompt in prompts]
    if max(alone) > room:
        worst = alone.index(max(alone))
        needed = alone[worst] + options.max_new_tokens + 1
        raise UserError(
            f"{sum(length > room for length in alone)} of {len(prompts)} prompts leave no room for an answer of "
            f"{options.max_new_tokens} tokens in a row of {max_length}; the longest, {prompts[worst].id}, has {alone[worst]}",
            key="train.max_length",
            remedy=(f"set train.max_length={needed}, lower " if context is None or needed <= context else "lower ")
            + "method.sampling.max_new_tokens, or shorten the prompts",
        )
    longest = [_longest_prompt(form, prompt, options) for prompt in prompts]
    if outgrown := sum(length > room for length in longest):
        log.warning(
            "%d of %d prompts are conversations that may outgrow train.max_length=%d, the longest with %d tokens: where they "
            "do, their oldest turns are left out",
            outgrown, len(prompts), max_length, max(longest) + options.max_new_tokens + 1,
        )  # fmt: skip


def _check_context(
    form: ChatFormat, prompts: Sequence[TrainPrompt], max_length: int | None, options: SamplingOptions, context: int
) -> None:
    """Refuse rows that may outgrow the model's context, where ``max_length`` does not keep them shorter."""
    longest = [_longest_prompt(form, prompt, options) + options.max_new_tokens + 1 for prompt in prompts]
    if max(longest) > context:
        worst = longest.index(max(longest))
        raise UserError(
            f"the row of {prompts[worst].id} takes up to {longest[worst]} tokens, and the model's context holds {context}; "
            f"train.max_length is {max_length or 'null'}",
            key="train.max_length",
            remedy=f"set train.max_length={context} or less: the oldest turns of longer conversations are left out then",
        )


def _longest_prompt(form: ChatFormat, prompt: TrainPrompt, options: SamplingOptions) -> int:
    """Tokens up to the last answer where all before are as long as they may be."""
    return len(form.prompt_ids(prompt.closing)) + (len(prompt.turns) - 1) * options.max_new_tokens
