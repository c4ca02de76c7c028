"""FloorSFTTrainer on real TRL and PEFT: its loss, its gradients, its log, its faults and what it saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import HIDDEN, VOCAB, build_floor, build_model, build_tokenizer
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.train.barrier import BarrierOptions
from trimtab.train.floor_sft import FloorCollator, FloorSFTTrainer
from trimtab.train.penalty import PenaltyOptions, check_reach
from trimtab.train.schedule import scheduled

FLOOR = build_floor((1, 2), tau=2.0)
OTHERS = {"benign_kl_weight": 0.7, "benign_axis_weight": 0.3}


def make_rows(count: int, benign: Iterable[int] = (), *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 8 to 16 tokens, of which the last 3 to 8 carry labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        length = int(torch.randint(8, 17, (), generator=generator))
        answer = int(torch.randint(3, 8, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * (length - answer) + ids[length - answer :],
                "anchor": number in set(benign),
            }
        )
    return rows


def make_trainer(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    kind: type[SFTTrainer] = FloorSFTTrainer,
    floor: Floor | None = FLOOR,
    lora: dict[str, Any] | None = None,
    model: Any = None,
    callbacks: list[Any] | None = None,
    extra: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A trainer on a tiny Llama with a LoRA; ``extra`` are FloorSFTTrainer's own arguments.

    Its ``floor_*`` are the penalty's, its ``benign_*`` the barrier's.
    """
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }
    chosen = dict(extra or {})
    penalty = {key.removeprefix("floor_"): chosen.pop(key) for key in list(chosen) if key.startswith("floor_")}
    barrier = {key.removeprefix("benign_"): chosen.pop(key) for key in list(chosen) if key.startswith("benign_")}
    own: dict[str, Any] = {}
    if issubclass(kind, FloorSFTTrainer):
        own = {"floor": floor, "penalty": PenaltyOptions(**penalty), "barrier": BarrierOptions(**barrier), **chosen}
    torch.manual_seed(11)
    return kind(
        model=build_model("llama") if model is None else model,
        args=SFTConfig(output_dir=str(folder / "out"), **{**settings, **arguments}),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=FloorCollator(pad_token_id=0),
        processing_class=build_tokenizer(),
        peft_config=None
        if lora == {}
        else LoraConfig(task_type="CAUSAL_LM", **(lora or {"r": 4, "target_modules": "all-linear"})),
        callbacks=callbacks,
        **own,
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adapter_of(trainer: Any) -> dict[str, Tensor]:
    """The adapter's weights."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Same names, and equal within ``tolerance``."""
    assert one.keys() == other.keys() and one
    assert max(float((one[n] - other[n]).abs().max()) for n in one) <= tolerance


def trained(
    folder: Path, rows: list[dict[str, Any]], **arguments: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Train; gradients of the first step, adapter, trainer."""
    gradients = Gradients()
    trainer = make_trainer(folder, rows, callbacks=[gradients], **arguments)
    trainer.train()
    return gradients.first, adapter_of(trainer), trainer


# ---- the loss ----


def wake(model: Any) -> None:
    """Make a fresh LoRA's B not zero, so that model and base differ."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def by_hand(model: Any, rows: list[dict[str, Any]], count: int, *, weight: float, target: str = "absolute") -> Tensor:
    """The formula of floor_sft.py, row by row, without padding, hooks or TRL."""
    total = torch.zeros(())
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        out = model.base_model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        with torch.no_grad(), model.disable_adapter():
            base = model.base_model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        answer = labels[0].ne(-100)
        next_is_answer = answer.roll(-1).index_fill(0, torch.tensor([len(answer) - 1]), False)
        logs = out.logits[0].log_softmax(-1)
        p = torch.stack([out.hidden_states[k + 1][0] @ FLOOR.directions[i] for i, k in enumerate(FLOOR.layers)])
        p0 = torch.stack([base.hidden_states[k + 1][0] @ FLOOR.directions[i] for i, k in enumerate(FLOOR.layers)])
        sigma = FLOOR.sigma[:, None]
        if row["anchor"]:
            base_logs = base.logits[0].log_softmax(-1)
            kl = (base_logs.exp() * (base_logs - logs)).sum(-1)[next_is_answer].sum()
            moved = (((p - p0) / sigma) ** 2)[:, answer].sum() / len(FLOOR.layers)
            total = total + OTHERS["benign_kl_weight"] * kl + OTHERS["benign_axis_weight"] * moved
        else:
            nll = -logs[next_is_answer].gather(1, ids[0][answer][:, None]).sum()
            aim = FLOOR.tau[:, None] if target == "absolute" else p0
            penalty = (torch.relu((aim - p) / sigma) ** 2)[:, answer].sum() / len(FLOOR.layers)
            total = total + nll + weight * penalty
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("target", ["absolute", "base"])
@pytest.mark.parametrize("benign", [(), (1, 3), (0, 1, 2, 3)])
def test_loss_by_hand(tmp_path: Path, benign: tuple[int, ...], target: str) -> None:
    rows = make_rows(4, benign)
    trainer = make_trainer(tmp_path, rows, extra={"floor_weight": 0.6, "floor_target": target, **OTHERS})
    wake(trainer.model)
    trainer.model.train()
    batch = trainer.data_collator([dict(row) for row in rows])
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    for count in (labelled, 3 * labelled):  # the divisor is the trainer's, over the whole accumulated batch
        found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(count))
        wanted = by_hand(trainer.model, rows, count, weight=0.6, target=target)
        assert wanted > 1e-3
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        ours = torch.autograd.grad(found, parameters, allow_unused=True)
        theirs = torch.autograd.grad(wanted, parameters, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_fresh_adapter_pays_no_barrier(tmp_path: Path) -> None:
    rows = make_rows(4, range(4))
    trainer = make_trainer(tmp_path, rows, extra=OTHERS)
    loss = trainer.compute_loss(
        trainer.model, trainer.data_collator([dict(row) for row in rows]), num_items_in_batch=20
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_evaluation_is_a_mean_over_its_batch(tmp_path: Path) -> None:
    rows = make_rows(4)
    trainer = make_trainer(tmp_path, rows, extra={"floor_weight": 0.6})
    wake(trainer.model)
    trainer.model.eval()
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    wanted = float(by_hand(trainer.model, rows, labelled, weight=0.6))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in rows]))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_the_learner_does_not_see_a_cap_that_is_on(tmp_path: Path) -> None:
    rows = make_rows(4, (1,))
    trainer = make_trainer(tmp_path, rows, extra={"floor_target": "base", **OTHERS})
    wake(trainer.model)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def step() -> tuple[Tensor, Any]:
        loss = trainer.compute_loss(
            trainer.model, trainer.data_collator([dict(row) for row in rows]), num_items_in_batch=20
        )
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    plain, gradients = step()
    ids = torch.tensor([rows[0]["input_ids"]])
    uncapped = trainer.model(input_ids=ids).logits
    with trainer.controller.capping(FLOOR):
        assert not torch.allclose(trainer.model(input_ids=ids).logits, uncapped, atol=1e-2)  # it does bite
        capped, capped_gradients = step()
        assert trainer.controller.cap_strength == 1.0  # and is on again afterwards
    assert capped.equal(plain)
    for one, other in zip(gradients, capped_gradients, strict=True):
        assert (one is None and other is None) or one.equal(other)


# ---- invariants ----


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_batch_size_change_nothing(tmp_path: Path, checkpointing: bool) -> None:
    """8 x 1, 2 x 4 and 1 x 8 are the same step, with benign rows and a schedule, checkpointed or not."""
    rows = make_rows(16, (1, 6, 9, 14))
    extra = {"floor_weight": 0.5, "floor_schedule": "linear", **OTHERS}
    reference, adapter, trainer = trained(tmp_path / "8", rows, per_device_train_batch_size=8, extra=extra)
    assert max(float(g.abs().max()) for g in reference.values()) > 1e-2
    assert trainer.state.global_step == 2
    for size, accumulation in ((2, 4), (1, 8)):
        gradients, other, _ = trained(
            tmp_path / str(size), rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            extra=extra, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        assert_close(gradients, reference, 1e-5)
        assert_close(other, adapter, 1e-4)


@pytest.mark.slow
def test_padding_to_a_multiple_changes_nothing(tmp_path: Path) -> None:
    rows = make_rows(8, (1, 6))
    reference, _, _ = trained(tmp_path / "a", rows, max_steps=1, extra=OTHERS)
    gradients = Gradients()
    trainer = make_trainer(tmp_path / "b", rows, max_steps=1, callbacks=[gradients], extra=OTHERS)
    trainer.data_collator = FloorCollator(pad_token_id=0, pad_to_multiple_of=32)
    trainer.train()
    assert_close(gradients.first, reference, 1e-5)


@pytest.mark.slow
def test_without_floor_weight_and_benign_rows_it_is_the_plain_sft_trainer_bitwise(tmp_path: Path) -> None:
    rows = make_rows(8)

    class PlainCollator(FloorCollator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            del batch["anchor"]
            return batch

    plain = make_trainer(tmp_path / "plain", rows, kind=SFTTrainer)
    plain.data_collator = PlainCollator(pad_token_id=0)
    plain.train()
    ours = make_trainer(tmp_path / "ours", rows, extra={"floor_weight": 0.0, **OTHERS})
    ours.train()
    for name, weights in adapter_of(plain).items():
        assert weights.equal(adapter_of(ours)[name]), name
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (plain, ours)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    penalised = make_trainer(tmp_path / "penalised", rows, extra={"floor_weight": 0.5})
    penalised.train()
    assert any(not weights.equal(adapter_of(plain)[name]) for name, weights in adapter_of(penalised).items())


@pytest.mark.slow
def test_training_lifts_projections_and_keeps_benign_ones(tmp_path: Path) -> None:
    rows = make_rows(8, (2, 5))
    extra = {"floor_weight": 2.0, "benign_kl_weight": 1.0, "benign_axis_weight": 1.0}
    trainer = make_trainer(tmp_path, rows, max_steps=12, per_device_train_batch_size=8, extra=extra)
    trainer.train()
    log = [row for row in trainer.state.log_history if "floor_penalty" in row]
    assert log[-1]["floor_penalty"] < 0.5 * log[0]["floor_penalty"]
    assert log[-1]["floor_z/layer_2"] > log[0]["floor_z/layer_2"]


# ---- the log ----


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_floor_s_figures_are_in_the_log(tmp_path: Path, accumulation: int) -> None:
    """Means over tokens, not over micro-batches."""
    rows = make_rows(8, (1, 6))
    trainer = make_trainer(
        tmp_path, rows, max_steps=1, per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation, extra=OTHERS,
    )  # fmt: skip
    wake(trainer.model)
    drift = [row for row in rows if not row["anchor"]]
    below = tokens = 0
    penalty = 0.0
    z = torch.zeros(2)
    with torch.no_grad():
        for row in drift:
            states = trainer.model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
            answer = torch.tensor(row["labels"]).ne(-100)
            p = torch.stack([states[k + 1][0][answer] @ FLOOR.directions[i] for i, k in enumerate(FLOOR.layers)])
            below += int((p < 2.0).sum())
            penalty += float(torch.relu(2.0 - p).square().sum()) / 2
            z += p.sum(1)
            tokens += int(answer.sum())
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["floor_violation_rate"] == pytest.approx(below / 2 / tokens, rel=1e-5)
    assert row["floor_penalty"] == pytest.approx(penalty / tokens, rel=1e-4)
    assert row["floor_z/layer_1"] == pytest.approx(float(z[0]) / tokens, rel=1e-4)
    assert row["floor_z/layer_2"] == pytest.approx(float(z[1]) / tokens, rel=1e-4)
    assert row["benign_kl"] > 0 and row["benign_axis"] > 0
    assert not {"tokens", "benign_tokens"} & row.keys()


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_schedule_runs_on_optimiser_steps(tmp_path: Path, accumulation: int) -> None:
    """The loss falls by exactly what the weight falls, at learning rate 0: 4 micro-batches don't move the schedule."""
    rows = make_rows(4) * 4
    trainer = make_trainer(
        tmp_path, rows, max_steps=4, per_device_train_batch_size=4 // accumulation, learning_rate=0.0,
        gradient_accumulation_steps=accumulation, extra={"floor_weight": 1.0, "floor_schedule": "linear"},
    )  # fmt: skip
    seen: list[tuple[int, float]] = []
    objective, whole = trainer._objective, trainer._drift_loss

    def plain(*arguments: Any) -> Any:
        trainer.plain = objective(*arguments)
        return trainer.plain

    def watch(*arguments: Any) -> Any:
        loss, (step, figures) = whole(*arguments), arguments[-2:]
        penalty = float(loss - trainer.plain) / float(step.mean(torch.ones(())))
        seen.append((trainer.state.global_step, penalty / float(figures["floor_penalty"])))
        return loss

    trainer._objective, trainer._drift_loss = plain, watch
    trainer.train()
    assert [step for step, _ in seen] == [step for step in range(4) for _ in range(accumulation)]
    for step, weight in seen:
        assert weight == pytest.approx(1 - step / 4, abs=1e-4)


def test_schedules() -> None:
    assert [scheduled(2.0, "constant", step, 4) for step in range(5)] == [2.0] * 5
    assert [scheduled(2.0, "linear", step, 4) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert [scheduled(2.0, "cosine", step, 4) for step in range(5)] == pytest.approx(
        [2.0, 1.7071, 1.0, 0.2929, 0.0], abs=1e-4
    )
    assert scheduled(2.0, "linear", 9, 4) == 0.0 and scheduled(2.0, "linear", 0, 0) == 2.0


# ---- faults ----


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_place_and_remedy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(8), extra={"floor_weight": float("inf")})
    fault = r"(?s)train.learning_rate: the loss is (inf|nan) at step 0 on rank 0.*remedy: lower"
    with pytest.raises(UserError, match=fault) as caught:
        trainer.train()
    kept = json.loads(Path(str(caught.value.file)).read_text(encoding="utf-8"))
    assert (kept["step"], kept["rank"], kept["loss"]) == (0, 0, "inf")
    assert kept["rows"] and all(row["ids"] and row["text"] for row in kept["rows"])


def test_a_batch_without_answer_tokens_is_told(tmp_path: Path) -> None:
    rows = make_rows(4)
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    trainer = make_trainer(tmp_path, rows)
    with pytest.raises(UserError, match=r"(?s)train.max_length: the rows of step 0 have no answer tokens.*remedy"):
        trainer.train()


@pytest.mark.slow
def test_one_micro_batch_without_answer_tokens_trains_nothing_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside one with answers, in one step: the adapter is that of a step of the answers alone."""
    rows = make_rows(4)
    empty = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    found = []
    for name, given, micro in (("beside", [*rows, *empty], 2), ("alone", rows, 1)):
        trainer = make_trainer(
            tmp_path / name, given, per_device_train_batch_size=4, gradient_accumulation_steps=micro, max_steps=1,
            optim="sgd",
        )  # fmt: skip
        with caplog.at_level("WARNING", "trimtab"):
            trainer.train()
        found.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n})
    assert caplog.text.count("has no answer tokens") == 1
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-7) for n in found[0])
    assert any(found[0][n].abs().sum() > 0 for n in found[0] if "lora_B" in n)


def test_adapters_above_the_floor_are_told(tmp_path: Path) -> None:
    above = {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [3]}
    with pytest.raises(
        UserError, match=r"(?s)layers_to_transform: no trainable weight.*layer 2.*remedy: include layers up to 2"
    ):
        make_trainer(tmp_path, make_rows(4), lora=above)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_floor_that_begins_below_the_adapters_trains_what_it_can(
    tmp_path: Path, checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    above = {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2, 3]}
    trainer = make_trainer(tmp_path, make_rows(8), lora=above, gradient_checkpointing=checkpointing)
    assert "begin at layer 2" in caplog.text
    trainer.train()
    log = [row for row in trainer.state.log_history if "floor_penalty" in row]
    assert len(log) == 2


def test_trainable_embeddings_reach_every_layer() -> None:
    model = build_model("llama").requires_grad_(False)
    with pytest.raises(UserError, match="trains nothing"):
        check_reach(model, FLOOR)
    model.get_input_embeddings().weight.requires_grad_(True)
    assert check_reach(model, FLOOR) == 0


def test_a_floor_of_another_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"floor.layers: floor layer 7 is beyond the model, whose layers are 0 to 3"):
        make_trainer(tmp_path, make_rows(4), floor=build_floor((2, 7)))


@pytest.mark.parametrize("extra", [{"floor_target": "base"}, {"benign_kl_weight": 1.0}, {"benign_axis_weight": 1.0}])
def test_what_needs_the_base_needs_an_adapter(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(?s)lora: .*the adapter switched off"):
        make_trainer(tmp_path, make_rows(4), lora={}, extra=extra)


# ---- what is saved ----


@pytest.mark.slow
def test_checkpoints_hold_the_floor_and_peft_alone_loads_them(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    base = model_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = make_trainer(tmp_path, make_rows(8), model=model, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = Floor.load(checkpoint / "floor.safetensors")
    assert saved.layers == FLOOR.layers and saved.tau.equal(FLOOR.tau) and saved.directions.equal(FLOOR.directions)
    assert (tmp_path / "out" / "checkpoint-1" / "floor.safetensors").exists()
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and not [key for key in config if "floor" in key]

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint).eval()
    ids = torch.tensor([make_rows(1)[0]["input_ids"]])
    with torch.no_grad():
        ours = trainer.model.eval()(input_ids=ids).logits
        assert stock(input_ids=ids).logits.equal(ours)
        with trainer.model.disable_adapter():
            assert not torch.allclose(trainer.model(input_ids=ids).logits, ours, atol=1e-3)  # it did train
        merged: Any = stock.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)


def test_the_controller_is_the_one_of_the_trained_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_rows(4))
    assert ActivationController.of(trainer.model) is trainer.controller
    assert trainer.controller.hidden_size == HIDDEN
