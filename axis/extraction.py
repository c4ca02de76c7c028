"""Extract the Assistant Axis: sample role and default rollouts, average their activations, subtract.

``axis[l] = mean(default responses) - mean over roles of (mean of the role's responses)``, + = Assistant
(Lu et al. 2026, arXiv 2601.10387). Response means are accumulated inside the hooks while the answers are sampled, in float32;
no tensor of the size [layers, batch, tokens, D] ever exists, and no second forward is needed.

Shapes: R roles, N decoder layers, D hidden size, B batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.directions import Axis, unit
from trimtab.axis.errors import UserError
from trimtab.axis.files import append_jsonl, fingerprint, load_tensors, read_jsonl, save_tensors, write_jsonl
from trimtab.axis.hooks import ActivationController
from trimtab.axis.models import Loaded
from trimtab.axis.progress import progress_bar
from trimtab.axis.sampling import Answer, SamplingOptions, batches_by_length, sample_batch, seed_of

log = logging.getLogger("trimtab")

DEFAULT = "default"
SAVE_EVERY = 4


@dataclass(frozen=True)
class Role:
    """A role and the system prompts that put a model into it."""

    name: str
    prompts: Sequence[str]


@dataclass(frozen=True)
class RolloutItem:
    """One prompt of the extraction: a role (or the default Assistant), a system prompt, a question."""

    role: str
    system: str
    question: str
    half: int


RoleJudge = Callable[[Sequence[tuple[RolloutItem, str]]], Sequence[int | None]]
"""Gives each (item, response) a role-adherence score 0-3, or None where it could not tell."""


def rollout_items(
    roles: Sequence[Role], questions: Sequence[str], defaults: Sequence[str], *, default_repeats: int
) -> list[RolloutItem]:
    """Every role and the default Assistant with every question; system prompts take turns, so each serves equally often.

    Args:
        roles: the roles.
        questions: shared by all roles.
        defaults: neutral system prompts of the default Assistant; "" is none.
        default_repeats: default rollouts a question; the system prompt differs between them.
    """
    items = [
        RolloutItem(role.name, role.prompts[i % len(role.prompts)], question, i % 2)
        for role in roles
        for i, question in enumerate(questions)
    ]
    for repeat in range(default_repeats):
        items += [
            RolloutItem(DEFAULT, defaults[(i + repeat) % len(defaults)], question, i % 2)
            for i, question in enumerate(questions)
        ]
    return items


class _Sums:
    """Sums of response means per role and question half: [R, 2, N, D] float32, with counts [R, 2]."""

    def __init__(self, names: Sequence[str], layers: int, hidden: int) -> None:
        self.names = list(names)
        self.sums = torch.zeros(len(names), 2, layers, hidden)
        self.counts = torch.zeros(len(names), 2, dtype=torch.int64)

    def add(self, item: RolloutItem, mean: Tensor) -> None:
        row = self.names.index(item.role)
        self.sums[row, item.half] += mean
        self.counts[row, item.half] += 1

    def means(self) -> Tensor:
        """Mean per role over both halves, [R, N, D]."""
        return self.sums.sum(1) / self.counts.sum(1)[:, None, None]

    def half_axis(self, half: int, default: int, roles: Sequence[int]) -> Tensor:
        """The axis from one half of the questions alone, [N, D]; each of ``roles`` and the default must have answers in it."""
        means = self.sums[:, half] / self.counts[:, half, None, None]
        return unit(means[default] - means[list(roles)].mean(0))

    def split_half(self, default: int, roles: Sequence[int]) -> list[float]:
        """Cosine between the axes of the two halves, [N], from the roles with answers in both; empty where there are none."""
        both = [row for row in roles if bool((self.counts[row] > 0).all())]
        if not both or not bool((self.counts[default] > 0).all()):
            return []
        cosines = (self.half_axis(0, default, both) * self.half_axis(1, default, both)).sum(-1)
        return [round(float(cosine), 4) for cosine in cosines]


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract` found.

    Attributes:
        axis: the axis.
        rollouts: path of the rollouts (JSON Lines).
        split_half: cosine between the axes of the two question halves, per layer, [N]; empty for a single question.
    """

    axis: Axis
    rollouts: Path
    split_half: list[float]


def extract(
    loaded: Loaded,
    form: ChatFormat,
    roles: Sequence[Role],
    questions: Sequence[str],
    defaults: Sequence[str],
    folder: Path,
    *,
    options: SamplingOptions,
    default_repeats: int,
    seed: int,
    judge: RoleJudge | None = None,
    min_per_role: int = 1,
    split: str = "train",
    title: str = "axis rollouts",
) -> Extraction:
    """Sample the rollouts and build the axis; resumable.

    Every ``SAVE_EVERY`` batches the sums are written whole; after a kill the batches since then are sampled again with the
    same seeds, so the result is the same as without the kill.

    Args:
        loaded: model and tokenizer.
        form: chat format.
        roles: the roles.
        questions: shared questions.
        defaults: neutral system prompts.
        folder: where rollouts and state go.
        options: sampling options.
        default_repeats: default rollouts a question.
        seed: sampling seed.
        judge: role-adherence judge; only score 3 counts then.
        min_per_role: a role with fewer counted responses is left out, and said so.
        split: of the roles and questions, for the axis's metadata.
        title: label of the progress bar.

    Raises:
        UserError: if ``folder`` holds rollouts of other inputs, two roles share a name, or no role is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    controller = ActivationController.of(loaded.model)
    names = [DEFAULT, *(role.name for role in roles)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"role names that are taken twice: {', '.join(twice)} ({DEFAULT!r} is the default Assistant)",
            key="axis.roles",
            remedy="give each role its own name",
        )
    items = rollout_items(roles, questions, defaults, default_repeats=default_repeats)
    prompts = [form.prompt_ids(chat(item.system, item.question)) for item in items]
    batches = batches_by_length([len(prompt) for prompt in prompts], options.batch_size)
    model_facts = [loaded.facts.get(key) for key in ("model", "revision", "dtype")]
    identity = fingerprint(
        [[asdict(item) for item in items], prompts, asdict(options), seed, model_facts, judge is not None]
    )
    state_path, rollouts_path = folder / "state.safetensors", folder / "rollouts.jsonl"
    sums, done = _resume(state_path, rollouts_path, identity, names, controller)
    with progress_bar(title, len(items), sum(len(batch) for batch in batches[:done])) as bar:
        waiting: list[dict[str, Any]] = []
        for number in range(done, len(batches)):
            batch = batches[number]
            answers = sample_batch(
                loaded.model,
                form,
                [prompts[i] for i in batch],
                batch,
                options,
                seeds=[seed_of([seed, i]) for i in batch],
                means=True,
            )
            waiting += _collect(items, answers, sums, judge, number)
            if len(waiting) and ((number + 1) % SAVE_EVERY == 0 or number + 1 == len(batches)):
                append_jsonl(rollouts_path, waiting)
                waiting = []
                _save_state(state_path, sums, number + 1, identity)
            bar.advance(len(batch))
    return _finish(sums, rollouts_path, min_per_role, {
        "split": split,
        "model": loaded.facts["model"],
        "revision": loaded.facts["revision"],
        "questions": fingerprint(list(questions)),
        "responses": len(items),
        "max_new_tokens": options.max_new_tokens,
        "judged": judge is not None,
        "seed": seed,
    })  # fmt: skip


def _collect(
    items: Sequence[RolloutItem], answers: Sequence[Answer], sums: _Sums, judge: RoleJudge | None, number: int
) -> list[dict[str, Any]]:
    scores: Sequence[int | None] = [None] * len(answers)
    if judge is not None:
        scores = judge([(items[answer.index], answer.text) for answer in answers])
    rows = []
    for answer, score in zip(answers, scores, strict=True):
        item = items[answer.index]
        empty = answer.mean is None or not torch.isfinite(answer.mean).all()
        counted = not empty and (judge is None or item.role == DEFAULT or score == 3)
        if counted:
            assert answer.mean is not None
            sums.add(item, answer.mean)
        rows.append(
            {
                "id": answer.index,
                "batch": number,
                "role": item.role,
                "prompt": chat(item.system, item.question),
                "completion": [{"role": "assistant", "content": answer.text}],
                "tokens": len(answer.ids),
                "ended": answer.ended,
                "score": score,
                "counted": counted,
            }
        )
    return rows


def _save_state(path: Path, sums: _Sums, done: int, identity: str) -> None:
    save_tensors(path, {"sums": sums.sums, "counts": sums.counts}, {"done": done, "identity": identity})


def _resume(
    state_path: Path, rollouts_path: Path, identity: str, names: Sequence[str], controller: ActivationController
) -> tuple[_Sums, int]:
    sums = _Sums(names, controller.n_layers, controller.hidden_size)
    if not state_path.exists():
        if rollouts_path.exists():
            raise UserError(
                "rollouts of unknown origin: the state that should lie beside them is missing",
                file=rollouts_path,
                remedy="choose another run folder, or delete this file if it is not needed",
            )
        _save_state(state_path, sums, 0, identity)  # before the first rollout, so that a kill never leaves them alone
        return sums, 0
    tensors, facts = load_tensors(state_path)
    if facts["identity"] != identity:
        raise UserError(
            "this folder holds the extraction of another model, role set, chat template, sampling option or seed",
            file=state_path,
            remedy="choose another run folder, or delete this one if it is not needed",
        )
    sums.sums, sums.counts = tensors["sums"], tensors["counts"]
    done = int(facts["done"])
    rows = read_jsonl(rollouts_path) if done else []  # a kill before the first batch leaves a state without rollouts
    write_jsonl(rollouts_path, [row for row in rows if row["batch"] < done])
    log.info("axis rollouts: resumed after %d batches", done)
    return sums, done


def _finish(sums: _Sums, rollouts: Path, min_per_role: int, facts: dict[str, Any]) -> Extraction:
    counts = sums.counts.sum(1)
    means = sums.means()
    few = [name for name, count in zip(sums.names, counts.tolist(), strict=True) if count < min_per_role]
    if few:
        log.warning("left out for fewer than %d counted responses: %s", min_per_role, ", ".join(few))
    kept = [row for row, name in enumerate(sums.names) if name not in (DEFAULT, *few)]
    if not kept or DEFAULT in few:
        raise UserError(
            f"no {facts['split']} role has {min_per_role} counted responses",
            key="axis",
            remedy="sample more questions a role, lower axis.min_per_role, or check the judge",
        )
    metadata = {**facts, "roles": [sums.names[i] for i in kept], "left_out": few}
    axis = Axis.from_means(means[0], means[kept], counts[kept], metadata)
    return Extraction(axis, rollouts, sums.split_half(0, kept))
