"""The penalty's gradient added in the backward pass, and the examples of docs/, which are run."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, build_floor, build_model, build_tokenizer
from peft import LoraConfig, get_peft_model
from test_floor_sft import Gradients, make_rows
from tiny_recipe import ROOT
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trimtab import FloorCallback
from trimtab.axis import ActivationController, UserError
from trimtab.losses import FloorInjection, axis_floor_loss, floor_gradients

FLOOR = build_floor((1, 2), tau=2.0)
IDS = torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(10) < 4, -100)
LABELS[1, 8:] = -100
EXAMPLES = ROOT / "docs" / "examples"


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_autograd(model: Any, weight: float, mask: Tensor, margin: float = 0.0) -> dict[str, Tensor]:
    """Gradients of loss plus penalty, through ``output_hidden_states``."""
    output = model(input_ids=IDS, labels=LABELS, output_hidden_states=True)
    states = {layer: output.hidden_states[layer + 1] for layer in FLOOR.layers}
    (output.loss + weight * axis_floor_loss(states, FLOOR, mask, margin=margin)).backward()
    return gradients(model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradient_is_that_of_the_loss(architecture: str, checkpointing: bool | None) -> None:
    model = build_model(architecture)
    wanted = by_autograd(model, 0.3, LABELS != -100)
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with floor_gradients(model, FLOOR, weight=0.3, accumulation=1) as penalty:
        model(input_ids=IDS, labels=LABELS).loss.backward()
    assert_same(gradients(model), wanted)
    figures = penalty.figures()
    assert figures["floor_penalty"] > 0 and 0 < figures["floor_violation_rate"] < 1
    model(input_ids=IDS, labels=LABELS).loss.backward()  # outside the block there is none
    assert penalty.figures() == {"floor_penalty": 0.0, "floor_violation_rate": 0.0}


def test_a_margin_above_the_floor() -> None:
    model = build_model("llama")
    wanted = by_autograd(model, 0.3, LABELS != -100, margin=0.5)
    with floor_gradients(model, FLOOR, weight=0.3, accumulation=1, margin=0.5):
        model(input_ids=IDS, labels=LABELS).loss.backward()
    assert_same(gradients(model), wanted)


def test_the_forward_is_left_alone_bit_by_bit() -> None:
    model = build_model("llama")
    plain = model(input_ids=IDS).logits
    with floor_gradients(model, FLOOR, weight=5.0, accumulation=1):
        assert model(input_ids=IDS).logits.equal(plain)
        with torch.no_grad():
            assert model(input_ids=IDS).logits.equal(plain)


def test_accumulated_micro_batches_and_masks() -> None:
    """Two equal micro-batches of half weight are one; without labels the attention mask counts, without either all tokens."""
    model = build_model("llama")
    with floor_gradients(model, FLOOR, weight=0.3, accumulation=1):
        model(input_ids=IDS, labels=LABELS).loss.backward()
    whole = gradients(model)
    with floor_gradients(model, FLOOR, weight=0.3, accumulation=2):
        for _ in range(2):
            (model(input_ids=IDS, labels=LABELS).loss / 2).backward()
    assert_same(gradients(model), whole)
    attention = torch.ones_like(IDS)
    attention[0, :3] = 0
    for given, mask in (({"attention_mask": attention}, attention.bool()), ({}, torch.ones_like(IDS).bool())):
        output = model(input_ids=IDS, output_hidden_states=True, **given)
        states = {layer: output.hidden_states[layer + 1] for layer in FLOOR.layers}
        (output.logits.sum() * 0 + axis_floor_loss(states, FLOOR, mask)).backward()
        wanted = gradients(model)
        with floor_gradients(model, FLOOR, weight=1.0, accumulation=1):
            (model(input_ids=IDS, **given).logits.sum() * 0).backward()
        assert_same(gradients(model), wanted)


def test_with_an_adapter() -> None:
    model = get_peft_model(build_model("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wanted = by_autograd(model, 0.3, LABELS != -100)
    injection = FloorInjection(model, FLOOR, weight=0.3, accumulation=1)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    injection.remove()
    assert_same(gradients(model), wanted)


def trainers_gradients(kind: Any, folder: Path, *, size: int, accumulation: int, by: str | None = "block") -> Any:
    """Gradients of the first optimiser step of a real trainer over the same four rows, of unlike lengths.

    The penalty comes ``by`` a block around the training, or by a callback; None leaves it out.
    """
    rows = make_rows(4, seed=5)
    settings: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "max_grad_norm": 0.0, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "remove_unused_columns": False,
    }  # fmt: skip
    gradients = Gradients()
    common = {
        "train_dataset": datasets.Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows]),
        "data_collator": DataCollatorForLanguageModeling(pad_token_id=0),
        "callbacks": [gradients, *([FloorCallback(FLOOR, weight=0.7)] if by == "callback" else [])],
    }
    model = build_model("llama")
    if kind is SFTTrainer:
        arguments = SFTConfig(
            str(folder), gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, **settings
        )
        trainer = kind(model=model, args=arguments, processing_class=build_tokenizer(), **common)
    else:
        trainer = kind(model=model, args=TrainingArguments(str(folder), **settings), **common)
    with floor_gradients(trainer, FLOOR, weight=0.7) if by == "block" else contextlib.nullcontext():
        trainer.train()
    assert "training_step" not in vars(trainer)
    return gradients.first


class PlainLoss(Trainer):
    """One whose loss is a mean over each micro-batch, as of models that take no count of tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@pytest.mark.slow
@pytest.mark.parametrize("by", ["block", "callback"])
@pytest.mark.parametrize("kind", [SFTTrainer, Trainer])
def test_accumulation_does_not_change_the_penalty(tmp_path: Path, kind: Any, by: str) -> None:
    """The penalty over all four rows in one forward, or in four, added to the trainer's own loss by autograd."""
    found = [
        trainers_gradients(kind, tmp_path, size=size, accumulation=accumulation, by=by)
        for size, accumulation in ((4, 1), (1, 4))
    ]
    without = trainers_gradients(kind, tmp_path, size=4, accumulation=1, by=None)
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(
        [{k: row[k] for k in ("input_ids", "labels")} for row in make_rows(4, seed=5)]
    )
    model = build_model("llama")
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    states = {layer: output.hidden_states[layer + 1] for layer in FLOOR.layers}
    (0.7 * axis_floor_loss(states, FLOOR, batch["labels"] != -100)).backward()
    penalty = gradients(model)
    for each in found:
        assert_same({name: each[name] - without[name] for name in penalty}, penalty)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["block", "callback"])
def test_a_trainer_without_a_count_of_tokens_gets_its_own_mean(tmp_path: Path, by: str) -> None:
    """A mean of the micro-batches' means, as that trainer's loss is one: four times in one forward are four forwards."""
    whole, parts = (trainers_gradients(PlainLoss, tmp_path, size=1, accumulation=4, by=how) for how in (by, None))
    wanted: dict[str, Tensor] = {}
    for row in make_rows(4, seed=5):
        model = build_model("llama")
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        output = model(input_ids=ids, output_hidden_states=True)
        states = {layer: output.hidden_states[layer + 1] for layer in FLOOR.layers}
        (0.7 / 4 * axis_floor_loss(states, FLOOR, labels != -100)).backward()
        wanted = {name: wanted.get(name, 0) + value for name, value in gradients(model).items()}
    assert_same({name: whole[name] - parts[name] for name in wanted}, wanted)


def test_what_a_step_is_must_be_said(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="accumulation: how many"),
        floor_gradients(build_model("llama"), FLOOR, weight=1.0),
    ):
        pass
    trainer = Trainer(model=build_model("llama"), args=TrainingArguments(str(tmp_path), use_cpu=True))
    twice = floor_gradients(trainer, FLOOR, weight=1.0, accumulation=4)
    with pytest.raises(UserError, match="the trainer says itself"), twice:
        pass
    trainer.args.fp16 = True
    with pytest.raises(UserError, match="fp16: the trainer scales"), floor_gradients(trainer, FLOOR, weight=1.0):
        pass


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuned(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.slow
def test_example_plain_pytorch() -> None:
    """The penalty on a fixed text falls by its weight; the losses are of another text each step, and go up and down with it."""
    ids = torch.arange(5, 45)[None]

    def penalty_after(steps: int, weight: float) -> float:
        model = tuned(build_model("llama", max_position_embeddings=512))
        losses = example("plain_pytorch").train(model, build_tokenizer(), FLOOR, steps=steps, weight=weight)
        assert len(losses) == 2 * steps
        with torch.no_grad(), ActivationController.of(model).recording(FLOOR.layers) as recording:
            model(input_ids=ids)
        hidden = {layer: recording.last(layer) for layer in FLOOR.layers}
        return float(axis_floor_loss(hidden, FLOOR, torch.ones_like(ids, dtype=torch.bool)))

    before, without, with_it = (penalty_after(*given) for given in ((0, 0.0), (6, 0.0), (6, 1.0)))
    assert before - with_it > 1.5 * (before - without) > 0


@pytest.mark.slow
def test_example_transformers_trainer(tmp_path: Path) -> None:
    model = tuned(build_model("llama", max_position_embeddings=512))
    losses = example("transformers_trainer").train(model, build_tokenizer(), FLOOR, str(tmp_path), steps=6)
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.slow
def test_example_unmodified_trl(tmp_path: Path) -> None:
    """The penalty falls under a trainer that knows nothing of it."""
    module = example("unmodified_trl")
    first, later = (
        module.train(
            build_model("llama", max_position_embeddings=512), build_tokenizer(), FLOOR, str(tmp_path), steps=n
        )
        for n in (1, 12)
    )
    assert later["floor_penalty"] < first["floor_penalty"]


def test_every_example_is_run_here() -> None:
    run_here = {"plain_pytorch", "transformers_trainer", "unmodified_trl"}
    elsewhere = {"llama_factory", "ms_swift", "axolotl_plugin"}  # in environments of their own: docs/beside.md
    assert {path.stem for path in EXAMPLES.glob("*.py")} == run_here | elsewhere
    for name in elsewhere:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        compile(source, name, "exec")
        assert "FloorCallback(" in source and len(source.splitlines()) < 32
