"""The benign barrier beside GRPO and DPO: its loss by another route, and the rows that it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_dpo
import test_grpo
import torch
from conftest import build_floor, build_tokenizer
from test_dpo import pairs
from test_floor_sft import wake

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.sampling import SamplingOptions
from trimtab.recipes.methods import DpoMethod
from trimtab.recipes.sections import DataSection
from trimtab.train import row_trainers
from trimtab.train.barrier import BarrierOptions, BenignRows
from trimtab.train.floor_dpo import FloorDPOTrainer
from trimtab.train.penalty import PenaltyOptions
from trimtab.train.rollouts import RolloutPlan, RolloutSource, TrainPrompt, training_order

FLOOR = build_floor((1, 2), tau=2.0)
BENIGN = [TrainPrompt(f"b{i}", "benign", "", (f"request {i}",), "benign") for i in range(5)]
OPTIONS = BarrierOptions(kl_weight=0.7, axis_weight=0.3)


def benign_rows(folder: Path, *, steps: int = 4, micro_batches: int = 1, ranks: int = 1, rate: float = 2) -> BenignRows:
    rows = int(steps * micro_batches * rate)
    order = training_order([], BENIGN, micro_batches=rows, ranks=ranks, batch_size=1, benign_share=1.0, seed=0)
    plan = RolloutPlan(
        order=order, rows_a_step=ranks, batch_size=1, every=math.ceil(2 * micro_batches * rate), total_steps=steps, strength=0.0,
        schedule="constant", options=SamplingOptions(max_new_tokens=6, batch_size=4), seed=0,
    )  # fmt: skip
    source = RolloutSource(plan, ChatFormat(build_tokenizer()), None, folder, max_length=None)
    return BenignRows(source, rate=rate, micro_batches=micro_batches, pad_token_id=0, pad_to_multiple_of=None)


def grpo(folder: Path, own: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    trainer = test_grpo.make_trainer(folder, own=own)
    batch = test_grpo.one_batch(trainer) | {"num_items_in_batch": torch.tensor(24.0)}
    return trainer, lambda trainer: trainer._compute_loss(trainer.model, batch)


def dpo(folder: Path, own: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    rows = pairs(folder.parent / "pairs.jsonl")[1]
    own = {"floor": FLOOR, "penalty": PenaltyOptions(weight=0.0), **own}
    trainer = test_dpo.make_trainer(folder, rows, FloorDPOTrainer, own)
    wake(trainer.model)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer, lambda trainer: trainer.compute_loss(trainer.model, dict(batch))


def by_hand(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The barrier through logits and ``output_hidden_states``, row by row, a mean over tokens."""
    total, count = torch.zeros(()), 0
    for ids, kept, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, answer = ids[kept.bool()], labels[kept.bool()] != -100
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=ids[None], output_hidden_states=True)
        tuned = model(input_ids=ids[None], output_hidden_states=True)
        p, q = (out.logits[0, :-1][answer[1:]].log_softmax(-1) for out in (base, tuned))
        total = total + 0.7 * (p.exp() * (p - q)).sum()
        for i, layer in enumerate(FLOOR.layers):
            moved = (tuned.hidden_states[layer + 1] - base.hidden_states[layer + 1])[0, answer] @ FLOOR.directions[i]
            total = total + 0.3 * (moved / FLOOR.sigma[i]).square().sum() / len(FLOOR.layers)
        count += int(answer.sum())
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("method", [grpo, dpo])
def test_the_barrier_is_added_as_written(tmp_path: Path, method: Any) -> None:
    gradients, losses = [], []
    for name, options in (("with", OPTIONS), ("without", BarrierOptions())):
        rows = benign_rows(tmp_path / "rollouts")
        trainer, loss_of = method(tmp_path / name, {"barrier": options, "benign_rows": rows})
        loss = loss_of(trainer)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    rows = benign_rows(tmp_path / "rollouts")
    rows.bind(trainer)
    trainer.model.zero_grad()
    wanted = by_hand(trainer.model, rows.next(0, 0, 1))
    wanted.backward()
    assert wanted.detach() > 0
    torch.testing.assert_close(losses[0] - losses[1], wanted.detach(), atol=1e-5, rtol=1e-4)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[0][name] - gradients[1][name], parameter.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("method", [grpo, dpo])
def test_evaluation_has_no_barrier(tmp_path: Path, method: Any) -> None:
    trainer, _ = method(tmp_path / "x", {"barrier": OPTIONS, "benign_rows": benign_rows(tmp_path / "rollouts")})
    assert trainer.benign_loss(trainer.model, trainer.draw_benign(), {}) is not None
    trainer.model.eval()
    assert trainer.benign_loss(trainer.model, trainer.draw_benign(), {}) is None


@pytest.mark.parametrize("method", [grpo, dpo])
def test_rows_are_sampled_before_anything_is_kept_for_a_backward(tmp_path: Path, method: Any) -> None:
    """Else the cache of the sampling lies beside the activations of the method's own forward."""
    rows = tmp_path / "rollouts"
    trainer, loss_of = method(tmp_path / "x", {"barrier": OPTIONS, "benign_rows": benign_rows(rows)})
    sampled: list[bool] = []
    first = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_hook(
        lambda *_: sampled.append(any(rows.glob("*.jsonl"))) if torch.is_grad_enabled() else None
    )
    loss_of(trainer)
    assert sampled and all(sampled)


def test_rows_are_the_same_after_a_resume_and_differ_between_ranks(tmp_path: Path) -> None:
    def play(rank: int, first: int = 0) -> list[list[list[int]]]:
        rows = benign_rows(tmp_path / "rollouts", micro_batches=2, ranks=2)
        source: Any = rows._source
        trainer, _ = grpo(tmp_path / "x", {})
        accelerator = trainer.accelerator
        trainer.accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu"), state=accelerator.state,
            reduce=lambda tensor, reduction: tensor, gather=lambda tensor: tensor, unwrap_model=accelerator.unwrap_model,
        )  # fmt: skip
        source.bind(trainer)
        return [rows.next(step, rank, 2)["input_ids"].tolist() for step in range(first, 4) for _ in range(2)]

    one, other = play(0), play(1)
    assert len(one) == 8 and play(0, first=2) == one[4:]
    assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        f"round-000{number}-of-rank-{rank}.jsonl" for number in range(2) for rank in range(2)
    ]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("own", "share"), [(1, 0.25), (2, 0.5), (4, 0.3), (1, 0.9), (8, 0.05)])
def test_the_share_asked_for_is_the_share_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, share: float, ranks: int
) -> None:
    """Over the run, however few rows a micro-batch has; equally many on every rank, no row twice, and in the order laid out."""
    steps, micro_batches = 15, 2
    parts = SimpleNamespace(
        barrier=OPTIONS, form=ChatFormat(build_tokenizer()), tokenizer=build_tokenizer(), device=torch.device("cpu")
    )
    method = DpoMethod(name="dpo", benign_kl_weight=OPTIONS.kl_weight, benign_axis_weight=OPTIONS.axis_weight)
    run = SimpleNamespace(recipe=SimpleNamespace(data=DataSection(benign_share=share), method=method, train={}))
    arguments = SimpleNamespace(
        per_device_train_batch_size=own, gradient_accumulation_steps=micro_batches, world_size=ranks, max_steps=steps
    )
    asked: list[list[int]] = []

    def said(_: Any, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        asked.append(batch["row"])
        return {name: [[5]] * len(batch["row"]) for name in ("input_ids", "labels")}

    monkeypatch.setattr(RolloutSource, "__call__", said)
    drawn: list[list[int]] = []
    for rank in range(ranks):
        variant = SimpleNamespace(rollouts=tmp_path)
        rows = row_trainers.benign_rows(run, parts, arguments, variant)  # type: ignore[arg-type]
        assert rows is not None
        batches = [rows.next(step, rank, ranks) for step in range(steps) for _ in range(micro_batches)]
        drawn.append([0 if batch is None else len(batch["input_ids"]) for batch in batches])
    mine = steps * micro_batches * own
    assert all(counts == drawn[0] for counts in drawn) and max(drawn[0]) - min(drawn[0]) <= 1
    assert abs(sum(drawn[0]) - mine * share / (1 - share)) < 1
    assert sorted(row for rows in asked for row in rows) == list(range(sum(map(sum, drawn))))


@pytest.mark.parametrize("method", [grpo, dpo])
def test_every_benign_row_weighs_alike_however_few_a_micro_batch_has(tmp_path: Path, method: Any) -> None:
    """At a row in three micro-batches the one that has it carries all three: the weights mean the same for any share."""
    sums = []
    for rate in (1.0, 1 / 3):
        rows = benign_rows(tmp_path / "rollouts", steps=3, rate=rate)
        trainer, _ = method(tmp_path / str(rate), {"barrier": OPTIONS, "benign_rows": rows})
        wake(trainer.model)
        losses = []
        for step in range(3):
            trainer.state.global_step = step
            losses.append(trainer.benign_loss(trainer.model, trainer.draw_benign(), {}))
        assert [loss is None for loss in losses] == ([False] * 3 if rate == 1 else [True, True, False])
        sums.append([float(loss) for loss in losses if loss is not None])
    assert sums[0][0] > 0
    assert sums[1] == pytest.approx([3 * sums[0][0]], rel=1e-5)
