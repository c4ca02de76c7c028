"""Preference pairs of the capped against the uncapped self, and DPO with the penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import CHATML, build_floor, build_model, build_tokenizer
from peft import LoraConfig
from test_floor_sft import wake
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from trimtab.axis import UserError
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.files import read_jsonl
from trimtab.axis.models import Loaded
from trimtab.axis.sampling import SamplingOptions, sample_batch, seed_of
from trimtab.train.floor_dpo import FloorDPOTrainer, pair_tokens
from trimtab.train.pairs import make_pairs
from trimtab.train.penalty import PenaltyOptions
from trimtab.train.rollouts import TrainPrompt

FLOOR = build_floor((1, 2), tau=2.0)
LOW = build_floor((1, 2), tau=-1e6)
PROMPTS = [
    TrainPrompt("a", "drift", "You are a pirate.", ("How do I bake bread?",), "pirate"),
    TrainPrompt("b", "drift", "", ("Why is the sky blue?", "And the grass?"), "talk"),
    TrainPrompt("c", "drift", "You are a ghost.", ("Who are you?",), "ghost"),
]
OPTIONS = SamplingOptions(max_new_tokens=8, batch_size=2)


def pairs(path: Path, floor: Any = FLOOR, seed: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tokenizer = build_tokenizer()
    loaded = Loaded(build_model("llama"), tokenizer, {})
    facts = make_pairs(loaded, ChatFormat(tokenizer), floor, PROMPTS, path, options=OPTIONS, strength=1.0, seed=seed)
    return facts, read_jsonl(path)


def test_pairs_are_the_capped_and_the_uncapped_answer_of_one_seed(tmp_path: Path) -> None:
    facts, rows = pairs(tmp_path / "pairs.jsonl")
    assert facts["pairs"] == len(rows) > 0 and facts["pairs"] + facts["same"] + facts["empty"] == 3
    assert all(row["chosen"] != row["rejected"] for row in rows)
    tokenizer = build_tokenizer()
    form, model = ChatFormat(tokenizer), build_model("llama")
    row = next(row for row in rows if row["id"] == "a")
    assert row["prompt"] == chat("You are a pirate.", "How do I bake bread?")
    ids = form.prompt_ids(row["prompt"])
    for floor, name in ((FLOOR, "chosen"), (None, "rejected")):
        (found,) = sample_batch(model, form, [ids], [0], OPTIONS, seeds=[seed_of([1, 0])], floor=floor)
        assert row[name][0]["content"] == found.text
        # trained are the tokens that were sampled, which the text alone would not give again
        assert form.answer_ids(found.text) != found.ids
        assert pair_tokens(form, row)[f"{name}_ids"] == found.ids + [form.end_token] * found.ended


def test_a_conversation_shares_the_turns_before(tmp_path: Path) -> None:
    row = next(row for row in pairs(tmp_path / "pairs.jsonl")[1] if row["id"] == "b")
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert row["prompt"][-1]["content"] == "And the grass?"


def test_a_conversation_is_paired_on_the_turns_that_rows_hold(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    form, path = ChatFormat(tokenizer), tmp_path / "pairs.jsonl"
    loaded = Loaded(build_model("llama"), tokenizer, {})
    last = len(form.prompt_ids(chat("", "And the grass?")))
    settings: dict[str, Any] = {"options": OPTIONS, "strength": 1.0, "seed": 1}
    facts = make_pairs(
        loaded, form, FLOOR, PROMPTS[1:2], path, max_length=last + OPTIONS.max_new_tokens + 1, **settings
    )
    (row,) = read_jsonl(path)
    assert facts["shortened"] == row["turns_dropped"] == 1
    assert row["prompt"] == chat("", "And the grass?")
    ids = form.prompt_ids(row["prompt"])
    (found,) = sample_batch(loaded.model, form, [ids], [0], OPTIONS, seeds=[seed_of([1, 0])], floor=FLOOR)
    assert row["chosen_ids"] == found.ids


@pytest.mark.parametrize("folds", [False, True])
def test_pairs_that_are_too_long_keep_their_answers(
    tokenizer_folder: Path, tokenizer_without_system_folder: Path, folds: bool
) -> None:
    """Without the oldest turns; but where the first may hold the system prompt, nothing is taken away."""
    form = ChatFormat(AutoTokenizer.from_pretrained(tokenizer_without_system_folder if folds else tokenizer_folder))
    talk = [*chat("", "first"), {"role": "assistant", "content": "so long an answer"}, *chat("", "second")]
    row = {
        "prompt": talk,
        "chosen": [{"role": "assistant", "content": "Arr."}],
        "rejected": [{"content": "Aye, captain."}],
    }
    longest = len(form.prompt_ids(talk)) + len(form.answer_ids("Aye, captain.")) + 1
    for length, dropped in ((longest, 0), (longest - 1, 0 if folds else 1)):
        found = pair_tokens(form, row, length)
        assert found["turns_dropped"] == dropped
        assert found["prompt_ids"] == form.prompt_ids(talk[2 * dropped :])
        assert found["rejected_ids"] == [*form.answer_ids("Aye, captain."), form.end_token]


def test_a_history_stands_as_it_is_and_goes_first_where_there_is_no_room(tmp_path: Path) -> None:
    history = (("user", "Ahoy!"), ("assistant", "Ahoy, matey."))
    prompts = [
        TrainPrompt(f"d{i}", "drift", "You are a pirate.", (f"Who are you {i}?",), "mine", history) for i in range(4)
    ]
    tokenizer = build_tokenizer()
    form, loaded = ChatFormat(tokenizer), Loaded(build_model("llama"), tokenizer, {})
    least = len(form.prompt_ids(chat("You are a pirate.", "Who are you 0?"))) + OPTIONS.max_new_tokens + 1
    settings: dict[str, Any] = {"options": OPTIONS, "strength": 1.0, "seed": 1}
    said = [{"role": role, "content": content} for role, content in history]
    for length, kept, dropped in ((None, said, 0), (least, [], 1)):
        make_pairs(loaded, form, FLOOR, prompts, tmp_path / "p", max_length=length, **settings)
        rows = read_jsonl(tmp_path / "p")
        assert rows
        for row in rows:
            system, user = chat("You are a pirate.", f"Who are you {row['id'][1:]}?")
            assert row["prompt"] == [system, *kept, user] and row["turns_dropped"] == dropped


def test_a_cap_that_never_fires_gives_no_pair(tmp_path: Path) -> None:
    facts, rows = pairs(tmp_path / "pairs.jsonl", LOW)
    assert rows == [] and facts["same"] + facts["empty"] == 3


def make_trainer(
    folder: Path, rows: list[dict[str, Any]], kind: Any, own: dict[str, Any], *, tokenizer: Any = None, **arguments: Any
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant",
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "seed": 0, "optim": "adamw_torch",
    }  # fmt: skip
    torch.manual_seed(11)
    return kind(
        model=build_model("llama"),
        args=DPOConfig(output_dir=str(folder / "out"), **{**settings, **arguments}),
        train_dataset=datasets.Dataset.from_list(
            [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
        ),
        processing_class=tokenizer or build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        **own,
    )


@pytest.mark.slow
def test_the_file_is_a_dataset_for_an_unmodified_trainer(tmp_path: Path) -> None:
    """And without weight ours is that trainer, bit by bit."""
    rows = pairs(tmp_path / "pairs.jsonl")[1]
    weights = []
    for kind, own in ((DPOTrainer, {}), (FloorDPOTrainer, {"floor": FLOOR, "penalty": PenaltyOptions(weight=0.0)})):
        trainer = make_trainer(tmp_path / kind.__name__, rows, kind, own)
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n})
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_the_penalty_is_a_mean_over_answers(tmp_path: Path) -> None:
    rows = pairs(tmp_path / "pairs.jsonl")[1]
    losses = {}
    for weight in (0.0, 0.7):
        own = {"floor": FLOOR, "penalty": PenaltyOptions(weight=weight)}
        trainer = make_trainer(tmp_path / str(weight), rows, FloorDPOTrainer, own)
        wake(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        losses[weight] = float(trainer.compute_loss(trainer.model, dict(batch)).detach())
    means = []
    for ids, kept, said in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        with torch.no_grad():
            states = trainer.model(input_ids=ids[kept.bool()][None], output_hidden_states=True).hidden_states
        mine = said[kept.bool()].bool()
        costs = [
            torch.relu(2.0 - states[layer + 1][0, mine] @ FLOOR.directions[i]).square().mean()
            for i, layer in enumerate(FLOOR.layers)
        ]
        means.append(float(torch.stack(costs).mean()))
    assert losses[0.7] - losses[0.0] == pytest.approx(0.7 * sum(means) / len(means), rel=1e-3)


@pytest.mark.slow
def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    rows = (pairs(tmp_path / "pairs.jsonl")[1] * 2)[:4]
    adapters = []
    for number, size in ((1, 4), (2, 2)):
        own = {"floor": FLOOR, "penalty": PenaltyOptions(weight=0.5)}
        trainer = make_trainer(
            tmp_path / str(number), rows, FloorDPOTrainer, own, max_steps=1, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=number,
        )  # fmt: skip
        wake(trainer.model)
        trainer.train()
        adapters.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n})
    for name in adapters[0]:
        torch.testing.assert_close(adapters[0][name], adapters[1][name], atol=1e-6, rtol=1e-4)


def test_the_base_relative_target_is_refused(tmp_path: Path) -> None:
    rows = pairs(tmp_path / "pairs.jsonl")[1]
    with pytest.raises(UserError, match="floor_target"):
        make_trainer(tmp_path, rows, FloorDPOTrainer, {"floor": FLOOR, "penalty": PenaltyOptions(target="base")})


def test_pairs_become_the_tokens_that_were_sampled(tokenizer_without_system_folder: Path) -> None:
    """A system prompt is folded where the template has no such role, its arguments reach it, and a cut answer has no end."""
    template = CHATML + "{% if add_generation_prompt and not thinking %}<think></think>{% endif %}"
    folded: Any = AutoTokenizer.from_pretrained(tokenizer_without_system_folder)
    for form in (
        ChatFormat(folded),
        ChatFormat(build_tokenizer(template), {"thinking": False}),
        ChatFormat(build_tokenizer(template), {"thinking": True}),
    ):
        messages = chat("You are a pirate.", "How do I bake bread?")
        row = {
            "prompt": messages,
            "chosen": [{"role": "assistant", "content": "Arr."}],
            "rejected": [{"role": "assistant", "content": "Arr, and then"}],
            "chosen_ended": True,
            "rejected_ended": False,
        }
        found = pair_tokens(form, row)
        assert found["prompt_ids"] == form.prompt_ids(messages)
        assert found["chosen_ids"] == [*form.answer_ids("Arr."), form.end_token]
        assert found["rejected_ids"] == form.answer_ids("Arr, and then")
    assert (
        pair_tokens(form, {k: row[k] for k in ("prompt", "chosen", "rejected")})["rejected_ids"][-1] == form.end_token
    )


@pytest.mark.slow
def test_the_trainer_takes_pairs_of_a_template_without_a_system_role(
    tokenizer_without_system_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL's own rendering raises there; and a prompt that fills the row by itself is left out, and told."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_without_system_folder)
    form = ChatFormat(tokenizer)
    path = tmp_path / "pairs.jsonl"
    loaded = Loaded(build_model("llama"), tokenizer, {})
    make_pairs(loaded, form, FLOOR, PROMPTS, path, options=OPTIONS, strength=1.0, seed=1)
    rows = read_jsonl(path)
    assert all(row["prompt"][0]["role"] == "user" for row in rows)  # so that any other trainer reads them too
    assert {"chosen_ended", "rejected_ended"} <= rows[0].keys()
    asked = [{**row, "prompt": chat("You are a pirate.", "How do I bake bread?")} for row in rows]
    asked.append({**rows[0], "prompt": chat("", "very long " * 60)})
    with caplog.at_level("WARNING", "trimtab"):
        trainer = make_trainer(
            tmp_path, asked, FloorDPOTrainer, {"floor": FLOOR, "form": form}, max_length=100, tokenizer=tokenizer
        )
    assert len(trainer.train_dataset) == len(rows) and "1 of" in caplog.text
    batch = next(iter(trainer.get_train_dataloader()))
    assert tokenizer.decode(batch["input_ids"][0]).count("You are a pirate.") == 1
    trainer.train()
    trainer.args.max_length = 20
    with pytest.raises(UserError, match="no pair fits in 20 tokens") as caught:
        trainer._prepare_dataset(asked, tokenizer, trainer.args, "train")
    assert caught.value.key == "train.max_length" and "train.max_length=" in str(caught.value.remedy)


def test_evaluation_reports_the_policys_figures_and_not_the_references(tmp_path: Path) -> None:
    rows = pairs(tmp_path / "pairs.jsonl")[1]
    trainer = make_trainer(tmp_path, rows, FloorDPOTrainer, {"floor": FLOOR, "penalty": PenaltyOptions(weight=1.0)})
    wake(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {key: value[:] for key, value in batch.items()}
    said = batch["completion_mask"].bool()
    trainer.model.eval()
    with torch.no_grad():
        trainer._compute_loss(trainer.model, dict(batch), False)
        states = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
    sums = trainer._figures._sums["eval"]
    for i, layer in enumerate(FLOOR.layers):
        z = (states[layer + 1][said] @ FLOOR.directions[i]) / FLOOR.sigma[i]
        assert float(sums[f"floor_z/layer_{layer}"] / sums["tokens"]) == pytest.approx(float(z.mean()), abs=1e-4)
