"""``FloorCallback`` in the trainers of whatever transformers, PEFT and TRL are installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import high_floor

from trimtab import Floor, FloorCallback, UserError, axis_floor_loss, floor_gradients

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
Trainer, TrainerCallback, TrainingArguments = (
    getattr(transformers, name) for name in ("Trainer", "TrainerCallback", "TrainingArguments")
)


@pytest.fixture
def floor() -> Floor:
    return high_floor()


ROWS = [
    {"input_ids": [5, 9, 12, 40, 33, 7, 8, 2], "labels": [-100, -100, -100, 40, 33, 7, 8, 2]},
    {"input_ids": [6, 21, 13, 2], "labels": [-100, -100, 13, 2]},
    {"input_ids": [7, 30, 31, 32, 33, 2], "labels": [-100, 30, 31, 32, 33, 2]},
    {"input_ids": [8, 11, 2], "labels": [-100, 11, 2]},
]


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, **tokens, num_key_value_heads=2, max_position_embeddings=64)
    )


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in padded.items()
    }
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {**batch, "attention_mask": mask}


class Noted(TrainerCallback):
    """A callback that reports, as one of a tracking service."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def trainer(
    folder: Path, callbacks: list[Any], *, given: Any = None, kind: Any = Trainer, arguments: Any = TrainingArguments,
    size: int = 4, accumulation: int = 1, rate: float = 0.0, steps: int = 1, **own: Any,
) -> Any:  # fmt: skip
    settings = {
        "max_steps": steps, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "max_grad_norm": 0.0, "disable_tqdm": True, "logging_steps": 1,
        "remove_unused_columns": False, "learning_rate": rate, "lr_scheduler_type": "constant",
    }  # fmt: skip
    made = kind(
        model=model() if given is None else given,
        args=arguments(str(folder), **settings, **own),
        train_dataset=ROWS,
        data_collator=collate,
        callbacks=callbacks,
    )
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(ROWS)
    return made


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.first = self.first or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (1, 4), (2, 2)])
def test_the_penalty_is_a_mean_over_the_tokens_of_the_step(
    tmp_path: Path, floor: Floor, size: int, accumulation: int
) -> None:
    found = []
    for callbacks in ([FloorCallback(floor, weight=0.7)], []):
        gradients = Gradients()
        trainer(tmp_path, [*callbacks, gradients], size=size, accumulation=accumulation).train()
        found.append(gradients.first)
    plain, batch = model(), collate(ROWS)
    out = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    states = {layer: out.hidden_states[layer + 1] for layer in floor.layers}
    (0.7 * axis_floor_loss(states, floor, batch["labels"] != -100)).backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[0][name] - found[1][name], gradient, atol=1e-5, rtol=1e-3)


def penalty_by_autograd(given: Any, floor: Floor, rows: list[Any] = ROWS) -> dict[str, torch.Tensor]:
    """Gradient of 0.7 times the penalty over the labelled tokens of these rows."""
    batch = collate(rows)
    out = given(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    states = {layer: out.hidden_states[layer + 1] for layer in floor.layers}
    (0.7 * axis_floor_loss(states, floor, batch["labels"] != -100)).backward()
    return {name: p.grad.clone() for name, p in given.named_parameters() if p.grad is not None}


def assert_adds_the_penalty(folder: Path, floor: Floor, make: Any, **own: Any) -> None:
    """The trainer's gradient with the callback, less that without it, is the penalty's."""
    found = []
    for callbacks in ([FloorCallback(floor, weight=0.7)], []):
        gradients = Gradients()
        trainer(folder, [*callbacks, gradients], given=make(), **own).train()
        found.append(gradients.first)
    wanted = penalty_by_autograd(make(), floor)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[0][name] - found[1][name], gradient, atol=2e-5, rtol=1e-3)


def tuned(task: str | None = None, **own: Any) -> Any:
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type=task, **own)
    made = peft.get_peft_model(model(), lora)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2)])
def test_under_an_adapter_labelled_tokens_count(
    tmp_path: Path, floor: Floor, task: str | None, size: int, accumulation: int
) -> None:
    """PEFT before 0.21 calls the base past its hooks where the adapter has a task."""
    assert_adds_the_penalty(tmp_path, floor, lambda: tuned(task), size=size, accumulation=accumulation)


def test_labels_that_the_model_is_not_given_count_all_the_same(tmp_path: Path, floor: Floor) -> None:
    assert_adds_the_penalty(tmp_path, floor, model, label_smoothing_factor=0.1)


class LooksAgain(Trainer):
    """One that runs the model on other rows, without gradient, before the backward, as some preference losses do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            model(input_ids=inputs["input_ids"], labels=torch.full_like(inputs["input_ids"], -100))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_beside_checkpointed_layers_changes_no_mask(tmp_path: Path, floor: Floor, reentrant: bool) -> None:
    own = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}

    def make() -> Any:
        made = tuned("CAUSAL_LM")
        made.enable_input_require_grads()  # which transformers 5 does by itself
        return made

    assert_adds_the_penalty(tmp_path, floor, make, kind=LooksAgain, **own)


@pytest.mark.slow
def test_a_training_that_broke_off_leaves_nothing_that_acts(tmp_path: Path, floor: Floor) -> None:
    """The next, with a callback of its own, gets the penalty once; and without one, not at all."""

    class Breaks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    def broken() -> Any:
        given = model()
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, [FloorCallback(floor, weight=0.7), Breaks()], given=given).train()
        given.zero_grad()
        return given

    assert_adds_the_penalty(tmp_path, floor, broken)
    found = []
    for given in (broken(), model()):
        gradients = Gradients()
        trainer(tmp_path, [gradients], given=given).train()
        found.append(gradients.first)
    assert all(found[0][name].equal(gradient) for name, gradient in found[1].items())


@pytest.mark.slow
def test_two_floors_at_once_are_two_penalties(tmp_path: Path, floor: Floor) -> None:
    other = Floor((2,), floor.directions[:1], torch.tensor([1.0]), torch.tensor([0.5]))
    found = []
    for callbacks in ([FloorCallback(floor, weight=0.7), FloorCallback(other, weight=0.7)], []):
        gradients = Gradients()
        made = trainer(tmp_path, [*callbacks, gradients], given=model())
        made.train()
        assert "training_step" not in vars(made)
        found.append(gradients.first)
    first, second = penalty_by_autograd(model(), floor), penalty_by_autograd(model(), other)
    for name, gradient in first.items():
        both = gradient + second.get(name, 0)
        torch.testing.assert_close(found[0][name] - found[1][name], both, atol=2e-5, rtol=1e-3)


def test_a_first_step_without_an_answer_is_no_fault(
    tmp_path: Path, floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS[:1]]
    monkeypatch.setitem(globals(), "ROWS", [*silent, *ROWS[1:]])
    noted = Noted()
    trainer(tmp_path, [FloorCallback(floor, weight=0.7), noted], kind=Sums, size=1, steps=2).train()
    assert [row["floor_penalty"] > 0 for row in noted.rows if "loss" in row] == [False, True]


class Sums(Trainer):
    """One whose loss is 0 where there is no answer, and not 0 / 0."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).logits.float().square().mean()


def test_adapters_above_the_floor_alone_are_refused(tmp_path: Path, floor: Floor) -> None:
    given = tuned(layers_to_transform=[3])
    with pytest.raises(UserError, match=r"no weight at or below layer 2 is trained"):
        trainer(tmp_path, [FloorCallback(floor, weight=0.7)], given=given).train()


def test_its_figures_stand_in_the_log_of_every_reporter(tmp_path: Path, floor: Floor) -> None:
    noted = Noted()
    floor.save(tmp_path / "floor.safetensors")
    made = trainer(
        tmp_path / "run", [noted, FloorCallback(tmp_path / "floor.safetensors", weight=0.5)], rate=0.05, steps=8
    )
    made.train()
    rows = [row for row in noted.rows if "loss" in row]
    assert len(rows) == 8 and rows == [
        {k: v for k, v in row.items() if k != "step"} for row in made.state.log_history[:8]
    ]
    assert all(0 <= row["floor_violation_rate"] <= 1 and math.isfinite(row["floor_penalty"]) for row in rows)
    assert rows[-1]["floor_penalty"] < 0.9 * rows[0]["floor_penalty"]


def test_nothing_is_left_after_a_training(tmp_path: Path, floor: Floor) -> None:
    given = model()
    made = trainer(tmp_path, [FloorCallback(floor, weight=0.5)], given=given)
    made.train()
    assert not sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in given.modules())
    assert "training_step" not in vars(made) and not [name for name in vars(made) if "trimtab" in name]


def test_an_adapter_learns(tmp_path: Path, floor: Floor) -> None:
    given = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    noted = Noted()
    trainer(tmp_path, [FloorCallback(floor, weight=2.0), noted], given=given, rate=0.05, steps=8).train()
    rows = [row for row in noted.rows if "loss" in row]
    assert rows[-1]["floor_penalty"] < rows[0]["floor_penalty"]


@pytest.mark.slow
def test_trl_s_trainer(tmp_path: Path, floor: Floor) -> None:
    trl = pytest.importorskip("trl")
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        gradients, noted = Gradients(), Noted()
        own: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
        trainer(
            tmp_path, [FloorCallback(floor, weight=50.0), gradients, noted], kind=Sft, arguments=trl.SFTConfig,
            size=size, accumulation=accumulation, **own,
        ).train()  # fmt: skip
        found.append(gradients.first)
        assert noted.rows[0]["floor_penalty"] > 0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-3)


def Sft(**given: Any) -> Any:
    """TRL's SFTTrainer on rows that are tokens already, with a tokenizer that is never asked."""
    import datasets
    from tokenizers import Tokenizer, models
    from trl import SFTTrainer

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{number}": number for number in range(3, 64)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="<pad>", eos_token="<eos>"
    )
    given["train_dataset"] = datasets.Dataset.from_list(given["train_dataset"])
    return SFTTrainer(processing_class=tokenizer, **given)


def test_a_model_that_runs_past_the_hooks_is_refused(tmp_path: Path, floor: Floor) -> None:
    """As a framework with a fused forward does: it calls the layers' code and not the layers."""
    given = model()
    for layer in given.model.layers:
        kind = type(layer)
        layer.__class__ = type("Fused", (kind,), {"__call__": kind.forward})
    with pytest.raises(UserError, match=r"no forward has passed layers \[1, 2\] in the first step"):
        trainer(tmp_path, [FloorCallback(floor, weight=0.5)], given=given).train()


@pytest.mark.slow
def test_what_would_make_its_gradient_wrong_is_refused(tmp_path: Path, floor: Floor) -> None:
    made = trainer(tmp_path, [FloorCallback(floor, weight=0.5)])
    made.args.fp16 = True
    with pytest.raises(UserError, match="scales its loss"):
        made.train()
    made.args.fp16, made.args._n_gpu = False, 2
    with pytest.raises(UserError, match="spreads each batch over 2 GPUs"), floor_gradients(made, floor, weight=0.5):
        pass
    made.args._n_gpu = 0
    made.accelerator.state._mixed_precision = "fp16"  # as `accelerate launch --mixed_precision fp16` sets it
    with pytest.raises(UserError, match="scales its loss"):
        made.train()
    made.accelerator.state._mixed_precision = "no"
    callback = FloorCallback(Floor((9,), floor.directions[:1], floor.tau[:1], floor.sigma[:1]), weight=0.5)
    with pytest.raises(UserError, match="layer"):
        trainer(tmp_path, [callback]).train()
    with pytest.raises(UserError, match="no trainer of transformers"):
        FloorCallback(floor, weight=0.5).on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), None, None)
