"""Capped rollouts on the fly: the training set whose answers are sampled while training goes on.

The order of prompts is fixed before training. A *round* is the prompts of ``regenerate_every`` optimiser steps; when the
data loader first asks for a row of a round, the whole round is sampled with the current weights and the cap at the strength
of that moment, and written to ``rollouts/``. The data loader looks one batch ahead, so the weights are those of at most one
step before. Who samples a row is its *sampler* (see :data:`SAMPLERS`). Benign rows anchor the model where it should not change:
they are answered by the base, or by the student itself, so that it is held where its own words lead it.

After a kill, rounds that lie on disk are read again instead of sampled, so a resumed run sees the same text.

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
from typing import Any, Literal

import datasets
import torch

from trimtab.axis import Floor, UserError
from trimtab.axis.adapters import merged_if_quicker
from trimtab.axis.chat import ChatFormat, chat
from trimtab.axis.files import fingerprint, read_jsonl, write_jsonl
from trimtab.axis.progress import progress_bar
from trimtab.axis.sampling import Answer, Sampler, SamplingOptions, sample_on_all_ranks, seed_of
from trimtab.train.schedule import Schedule, scheduled

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
    """

    id: str
    kind: Kind
    system: str
    turns: tuple[str, ...]
    source: str


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
        count = int((step + 1) * batch_size * benign_share + 1e-9) - int(step * batch_size * benign_share + 1e-9)
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
        yield "student" if int((count + 1) * share + 1e-9) > int(count * share + 1e-9) else other


class RolloutSource:
    """Makes rows of token ids for a TRL trainer, sampling rounds when they are first needed.

    Args:
        plan: what to sample, and when.
        form: chat format.
        floor: the cap's floor; None samples drift rows uncapped (the plain SFT control).
        folder: where rounds are written.
        max_length: longest row in tokens.
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
        self._answers: dict[int, dict[str, Any]] = {}

    def __reduce__(self) -> Any:  # datasets hashes a transform by pickling it: the model must not be in there
        return (str, (fingerprint([prompt.id for prompt in self.plan.order]),))

    def __deepcopy__(self, memo: dict[int, Any]) -> RolloutSource:
        return self

    def bind(self, trainer: Any) -> None:
        """Give the trainer whose weights sample. Until then rows are prompts without an answer."""
        self._trainer = trainer

    def dataset(self) -> datasets.Dataset:
        """A dataset of row numbers that turn into token ids when they are read."""
        rows = datasets.Dataset.from_dict({"row": list(range(len(self.plan.order)))})
        return rows.with_transform(self)

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        """The transform: row numbers to ``input_ids``, ``labels``, ``anchor``."""
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "anchor": []}
        for row in batch["row"]:
            ids, labels = self._tokens(row)
            columns["input_ids"].append(ids)
            columns["labels"].append(labels)
            columns["anchor"].append(self.plan.order[row].kind == "benign")
        return columns

    def _tokens(self, row: int) -> tuple[list[int], list[int]]:
        if self._trainer is None:
            prompt = self.plan.order[row]
            ids = self.form.prompt_ids(chat(prompt.system, prompt.turns[0]))
            return ids, [IGNORED] * len(ids)
        if row not in self._answers:
            self._load(self.plan.round_of(row))
        record = self._answers[row]
        return tokens_of(
            self.form, record["prompt"], record["completion"][0]["content"], record["ended"], self.max_length
        )

    def _load(self, round_number: int) -> None:
        if torch.utils.data.get_worker_info() is not None:
            raise UserError(
                "rollouts can't be sampled in a data loader's worker: it holds the weights as they were when it began",
                key="train.dataloader_num_workers",
                remedy="set train.dataloader_num_workers=0",
            )
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
            records = self._sample(round_number, rows, identity)
            write_jsonl(ours[rank], records)
            known = {record["row"]: record for record in records}
        self._answers = {row: known[row] for row in rows}

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
        plan = self.plan
        turns = {row: plan.order[row].turns for row in rows}
        chats = {row: chat(plan.order[row].system, turns[row][0]) for row in rows}
        done: dict[int, Answer] = {}
        with progress_bar(title, len(rows)) as bar:
            for turn in range(self._trainer.most(max(map(len, turns.values()), default=0))):
                active = [row for row in rows if len(turns[row]) > turn]
                if turn:
                    for row in active:
                        answered = {"role": "assistant", "content": done[row].text}
                        chats[row] = [*chats[row], answered, {"role": "user", "content": turns[row][turn]}]
                prompts = [self.form.prompt_ids(chats[row]) for row in active]
                for answer in sample(prompts, [plan.seed_of(row, turn) for row in active]):
                    row = active[answer.index]
                    done[row] = answer
                    bar.advance(0, turn + 1 == len(turns[row]))  # type: ignore[arg-type]
        return [
            {
                "id": plan.order[row].id,
                "row": row,
                "kind": plan.order[row].kind,
                "source": plan.order[row].source,
                "prompt": chats[row],
                "completion": [{"role": "assistant", "content": done[row].text}],
                "ended": done[row].ended,
                "seed": plan.seed,
            }
            for row in rows
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


def tokens_of(
    form: ChatFormat, prompt: Sequence[dict[str, str]], answer: str, ended: bool, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row: only the answer, and its end-of-turn token where it ended, carry labels.

    A row longer than ``max_length`` loses tokens at the end; one whose prompt alone is that long has no labels left.
    """
    head, tail = form.prompt_ids(prompt), form.answer_ids(answer)
    if ended:
        tail = [*tail, form.end_token]
    ids, labels = head + tail, [IGNORED] * len(head) + tail
    return (ids, labels) if max_length is None else (ids[:max_length], labels[:max_length])
