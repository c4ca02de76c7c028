"""What the libraries refuse of a recipe is told by key, before anything heavy, by those libraries themselves."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from tiny_recipe import write_recipe

from trimtab.pipeline.run import Run
from trimtab.recipes.faults import Fault, RecipeError
from trimtab.recipes.loader import load_recipe
from trimtab.recipes.methods import METHODS
from trimtab.train.job import common_arguments
from trimtab.train.rehearsal import rehearse

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of each method, whose model has no weights: a configuration and a tokenizer."""
    found = tmp_path_factory.mktemp("rehearsal")
    (found / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    build_tokenizer().save_pretrained(found)
    for method in METHODS:
        write_recipe(found / f"{method}.yaml", found, method)
    return found


def faults_of(folder: Path, method: str, *overrides: str, processes: int = 1, here: bool = True) -> dict[str, Fault]:
    with pytest.raises(RecipeError) as caught:
        rehearse(load_recipe(folder / f"{method}.yaml", list(overrides)), processes=processes, here=here)
    return {fault.key: fault for fault in caught.value.faults}


def test_all_that_the_libraries_refuse_is_told_at_once_by_key(folder: Path) -> None:
    found = faults_of(
        folder,
        "sft",
        "train.lr_scheduler_type=cosin",
        "train.optim=adamwww",
        "train.gradient_checkpointing_kwargs={speed: 1}",
        "train.seed=4294967296",
        "train.report_to=[wandbb, tensorboard]",
        "lora.target_modules=[query]",
        "lora.r=4096",
    )
    assert set(found) == {
        "train.lr_scheduler_type", "train.optim", "train.gradient_checkpointing_kwargs", "train.seed", "train.report_to",
        "lora.target_modules", "lora.r",
    }  # fmt: skip
    assert "did you mean 'cosine'" in found["train.lr_scheduler_type"].remedy
    assert "trl.SFTConfig refuses it" in found["train.optim"].fault
    assert (
        "PEFT refuses these adapters" in found["lora.target_modules"].fault
        and "query" in found["lora.target_modules"].fault
    )
    assert "hidden size, 32" in found["lora.r"].fault
    assert {fault.file for fault in found.values()} == {"command line"}


# method -> overrides, and key -> what is said of it
TOLD: dict[str, tuple[list[str], dict[str, str]]] = {
    "sft": (
        [
            "train.loss_type=mse", "train.optim=lomo", "train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={ends: 1}",
            "train.load_best_model_at_end=true", "axis.judge={endpoint: 'https://api.example.com/v1', model: m}",
        ],
        {
            "train.loss_type": "nll",  # which the trainer alone finds out
            "train.optim": "pip install lomo-optim",
            "train.lr_scheduler_kwargs": "ends",
            "train.load_best_model_at_end": "eval strategy",  # of keys that don't go together, one
            "axis.judge.api_key_env": "not set",
        },
    ),
    "grpo": (
        [
            "train.importance_sampling_level=word", "train.steps_per_generation=4", "train.save_steps=3",
            "method.rewards=[{name: 'no_such_module:reward'}]",
        ],
        {
            "train.importance_sampling_level": "sequence",  # which a step alone finds out
            "train.save_steps": "inside a generation",
            "method.rewards": "no_such_module",
        },
    ),
    "dpo": (
        ["train.f_divergence_type=x", "train.sync_ref_model=true"],
        {"train.f_divergence_type": "Unknown", "train.sync_ref_model": "PEFT"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", TOLD)
def test_each_fault_is_told_of_its_key(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    overrides, told = TOLD[method]
    found = faults_of(folder, method, *overrides)
    assert found.keys() == told.keys()
    for key, said in told.items():
        assert said in f"{found[key].fault} {found[key].remedy}", found[key]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_good_recipe_passes_and_leaves_the_process_as_it_was(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as a launcher sets them: a process group of two would wait for the other for ever
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    there = sorted(folder.iterdir())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    rehearse(load_recipe(folder / f"{method}.yaml"), processes=2)
    assert (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        dict(os.environ),
    ) == before
    assert not torch.distributed.is_initialized()
    assert sorted(folder.iterdir()) == there


def test_completions_are_counted_over_all_processes(folder: Path) -> None:
    overrides = [
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=1",
        "train.num_generations=4",
    ]
    assert set(faults_of(folder, "grpo", *overrides, processes=2)) == {"train.num_generations"}
    rehearse(load_recipe(folder / "grpo.yaml", overrides), processes=4)


def test_what_a_machine_hasnt_got_is_told_where_it_is_this_one(folder: Path) -> None:
    overrides = ["train.tf32=true", "model.device=cuda:7", "train.torch_compile_backend=fastest"]
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert set(faults_of(folder, "sft", *overrides)) == {key.partition("=")[0] for key in overrides}
    rehearse(load_recipe(folder / "sft.yaml", overrides), here=False)  # for planning on another


def test_a_recipe_that_says_no_learning_rate_gets_that_of_its_model_s_size(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 2048}), encoding="utf-8")
    for method, section in METHODS.items():
        for model, rate in zip((folder, tmp_path), section.learning_rates, strict=True):
            path = tmp_path / f"{method}.yaml"
            text = f"model: {{name: {model}}}\nmethod: {{name: {method}}}\ntrain: {{max_steps: 3}}\n"
            path.write_text(text, encoding="utf-8")
            loaded = load_recipe(path)
            run = Run(tmp_path, loaded.recipe, loaded)
            assert common_arguments(run, run.variant(control=False), True)["learning_rate"] == rate
            asked = loaded.recipe.model_copy(update={"train": {"learning_rate": 0.0}})  # a control
            assert (
                common_arguments(Run(tmp_path, asked, loaded), run.variant(control=False), True)["learning_rate"] == 0
            )
