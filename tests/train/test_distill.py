"""Distillation from the capped self: its loss and gradient by another route, and who samples its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import capped_by_hand
from test_floor_sft import FLOOR, make_rows, make_trainer, wake
from test_rollouts import make_plan
from torch import Tensor

from trimtab.axis import UserError
from trimtab.train.floor_distill import FloorDistillTrainer


def teacher_logits(model: Any, ids: Tensor) -> Tensor:
    """The capped self, by hooks of this test's own: adapter off, every floor layer's output capped."""
    with torch.no_grad(), model.disable_adapter(), capped_by_hand(model, FLOOR):
        found: Tensor = model(input_ids=ids).logits[0]
        return found


def by_hand(model: Any, rows: list[dict[str, Any]], kind: str) -> Tensor:
    """Mean divergence over labelled tokens, row by row, over whole logits."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        said = labels[1:] != -100
        teacher = teacher_logits(model, ids)[:-1][said].log_softmax(-1)
        student = model(input_ids=ids).logits[0, :-1][said].log_softmax(-1)
        p, q = (teacher, student) if kind == "forward_kl" else (student, teacher)
        total = total + (p.exp() * (p - q)).sum()
        count += int(said.sum())
    return total / count


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("chunk", [2, 256])
def test_loss_and_gradient_by_hand(tmp_path: Path, kind: str, chunk: int) -> None:
    rows = make_rows(4)
    extra = {"divergence": kind, "chunk": chunk, "floor_weight": 0.0, "distill_weight": 1.0}
    trainer = make_trainer(tmp_path, rows, kind=FloorDistillTrainer, extra=extra)
    model = trainer.model
    wake(model)
    batch = trainer.data_collator([dict(row) for row in rows])
    count = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    found = trainer.compute_loss(model, batch, num_items_in_batch=count)
    wanted = by_hand(model, rows, kind)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    weights = [p for n, p in model.named_parameters() if "lora_" in n]
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_fresh_adapter_is_as_far_from_its_capped_self_as_the_cap_moves_it(tmp_path: Path) -> None:
    """The adapter is zero at the start: student = base. Without a floor that fires, teacher and student are one."""
    rows = make_rows(4)
    low = FLOOR.__class__(FLOOR.layers, FLOOR.directions, FLOOR.tau - 1e6, FLOOR.sigma, FLOOR.metadata)
    for floor, far in ((FLOOR, True), (low, False)):
        trainer = make_trainer(
            tmp_path / str(far), rows, kind=FloorDistillTrainer, floor=floor, extra={"floor_weight": 0.0}
        )
        loss = float(trainer.compute_loss(trainer.model, trainer.data_collator([dict(r) for r in rows])))
        assert (loss > 1e-3) if far else (abs(loss) < 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_training_brings_the_student_to_its_capped_self(tmp_path: Path, kind: str) -> None:
    rows = make_rows(8)
    trainer = make_trainer(
        tmp_path, rows, kind=FloorDistillTrainer, max_steps=30, lora={"r": 8, "target_modules": "all-linear"},
        extra={"divergence": kind, "floor_weight": 0.0, "top_k": 50},
    )  # fmt: skip
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    name = f"distill_{kind}"
    assert history[-1][name] < 0.6 * history[0][name]
    assert history[-1]["floor_penalty"] < history[0]["floor_penalty"]  # it is measured, not trained on, and falls


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation_does_not_change_it(tmp_path: Path, accumulation: int) -> None:
    rows = make_rows(8, benign=range(0, 8, 4))
    trainer = make_trainer(
        tmp_path / str(accumulation), rows, kind=FloorDistillTrainer, max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        extra={"benign_kl_weight": 1.0, "floor_weight": 0.5},
    )  # fmt: skip
    wake(trainer.model)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    whole = make_trainer(
        tmp_path / "whole", rows, kind=FloorDistillTrainer, extra={"benign_kl_weight": 1.0, "floor_weight": 0.5}
    )
    wake(whole.model)
    count = sum(sum(label != -100 for label in r["labels"][1:]) for r in rows)
    batch = whole.data_collator([dict(r) for r in rows])
    loss = whole.compute_loss(whole.model, batch, num_items_in_batch=count)
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_without_an_adapter_there_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter off"):
        make_trainer(tmp_path, make_rows(4), kind=FloorDistillTrainer, lora={})


def test_who_samples_what() -> None:
    for share in (0.0, 0.25, 0.5, 1.0):
        plan = make_plan(student_share=share)
        drift = [row for row, prompt in enumerate(plan.order) if prompt.kind == "drift"]
        samplers = [plan.sampler_of(row) for row in range(len(plan.order))]
        assert all((samplers[row] != "base") == (row in drift) for row in range(len(plan.order)))
        students = sum(sampler == "student" for sampler in samplers)
        assert students == pytest.approx(share * len(drift), abs=2)
    assert {make_plan().sampler_of(row) for row in drift} == {"capped"}


def test_benign_rows_are_answered_by_the_base_and_by_the_student_in_a_stated_share() -> None:
    for share in (0.0, 0.5, 1.0):
        plan = make_plan(student_share=0.5, benign_student_share=share)
        found = [plan.sampler_of(row) for row, prompt in enumerate(plan.order) if prompt.kind == "benign"]
        assert found.count("student") == share * len(found) and set(found) <= {"student", "base"}
