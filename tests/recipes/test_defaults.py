"""Defaults are what was measured, and stand in the schema: recipes, trainers and losses are held to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from trimtab.axis.sampling import SamplingOptions
from trimtab.losses import axis_floor_loss, chunked_divergence
from trimtab.losses.axis_floor import axis_floor_terms
from trimtab.losses.callback import FloorCallback
from trimtab.losses.injection import FloorInjection
from trimtab.pipeline.identity import differences, flat
from trimtab.recipes.loader import load_recipe, shipped_recipes
from trimtab.recipes.methods import (
    METHODS,
    DistillMethod,
    DpoMethod,
    GrpoMethod,
    MethodSection,
    SftMethod,
)
from trimtab.recipes.sections import Sampling, Section
from trimtab.recipes.yaml_lines import parse_yaml
from trimtab.train.barrier import BarrierOptions
from trimtab.train.floor_distill import FloorDistillTrainer
from trimtab.train.floor_dpo import FloorDPOTrainer
from trimtab.train.floor_grpo import FloorGRPOTrainer, off_policy
from trimtab.train.floor_sft import FloorSFTTrainer
from trimtab.train.penalty import PenaltyOptions
from trimtab.train.rollouts import RolloutPlan

# ---- recipes ----

# Where a recipe of two lines differs from the one that was measured, and why.
OF_THE_MODEL = {"floor.layers"}  # a rule chooses the window; SmolLM2's recipes name a wider one
OF_THE_MACHINE = {
    "lora.target_modules",  # all of them; SmolLM2's recipes save time on a CPU
    "train.gradient_checkpointing", "train.max_length", "train.logging_steps", "train.save_strategy", "train.save_steps",
}  # fmt: skip
OF_SPREADING = {"train.per_device_train_batch_size", "train.gradient_accumulation_steps"}  # 16 rows a step either way
OF_THE_LIBRARY = {"train.temperature"}  # GRPO's recipe names TRL's own default
OF_THE_EVALUATION = {
    "eval.capability",
    "eval.control",
}  # lm-eval is an extra, and a control is trained as long as the adapter
# Of SFT's recipe all else is measured that the default measures; those of the other methods save minutes there.
SAVED = {f"eval.{key}" for key in ("roles", "questions", "conversations", "turns", "professional", "reextract_roles")}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_of_two_lines_trains_what_was_measured(method: str, tmp_path: Path) -> None:
    measured = load_recipe(f"smollm2-135m/{method}")
    steps = measured.recipe.train["max_steps"]
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{name: smollm2-135m}}\nmethod: {{name: {method}}}\ntrain: {{max_steps: {steps}}}\n", encoding="utf-8"
    )
    plain = load_recipe(path)
    differ = {key for key, *_ in differences(flat(measured.resolved), flat(plain.resolved))}
    allowed = (
        OF_THE_MODEL | OF_THE_MACHINE | OF_SPREADING | OF_THE_LIBRARY | {"train.learning_rate", "train.warmup_steps"}
    )
    assert differ <= allowed | (OF_THE_EVALUATION if method == "sft" else SAVED)
    rows = [train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1) for train in (
        measured.recipe.train, plain.recipe.train)]  # fmt: skip
    assert rows[0] == rows[1]
    assert measured.recipe.train["learning_rate"] == METHODS[method].learning_rates[0]
    warm = plain.recipe.train["warmup_steps"] * steps  # a share of the steps
    assert abs(math.ceil(warm) - measured.recipe.train["warmup_steps"]) <= 1


# What larger models' recipes say otherwise, none of which is measured yet: method -> key -> value.
ROOMIER = {"regenerate_every", "sampling", "sampling_batch"}  # 200 steps in the place of 30, and answers of 256 tokens
LARGER: dict[str, dict[str, Any]] = {
    "distill": {"top_k": 1000},  # a vocabulary of 150,000 words need not be compared whole
}
LARGER_TRAIN: dict[str, dict[str, Any]] = {
    # longer answers, as many generations as a GPU has room for, and a learning rate that strays less from the base by itself
    "grpo": {"max_completion_length": 256, "num_generations": 8, "beta": 0.02},
}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.startswith("smollm2")])
def test_a_larger_model_is_trained_as_was_measured(name: str) -> None:
    """All that makes the loss, and the learning rate of its size."""
    loaded = load_recipe(name)
    recipe, method = loaded.recipe, loaded.recipe.method
    plain = METHODS[method.name](name=method.name)  # type: ignore[arg-type]
    said, usual = method.model_dump(exclude=ROOMIER), plain.model_dump(exclude=ROOMIER)
    assert said == usual | LARGER.get(method.name, {})
    assert recipe.data.benign_share == method.benign_share
    train, usual = recipe.train, {**method.train_defaults, **LARGER_TRAIN.get(method.name, {})}
    warm_up = usual["warmup_steps"] * train["max_steps"]  # a share of the steps
    assert {key: train[key] for key in usual} == {**usual, "warmup_steps": warm_up}
    assert train["learning_rate"] == method.learning_rates[1]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_scales_its_adapter_alike(name: str) -> None:
    lora = parse_yaml(shipped_recipes()[name].read_text(encoding="utf-8")).value["lora"]
    assert lora["lora_alpha"] == 2 * lora["r"]


# ---- trainers and losses ----

TRAINERS: dict[Any, type[Section]] = {
    FloorSFTTrainer: SftMethod, FloorDistillTrainer: DistillMethod, FloorGRPOTrainer: GrpoMethod, FloorDPOTrainer: DpoMethod,
}  # fmt: skip
# Keys of a method that its trainer does not take by that name: the script hands them on in options, rows, rewards or pairs.
ELSEWHERE = {
    "name", "rollouts", "regenerate_every", "sampling", "student_share", "benign_student_share", "rewards",
    *(key for key in MethodSection.model_fields if key.startswith(("floor_", "benign_"))),
}  # fmt: skip
ROWS_MADE_BEFORE = {
    SftMethod: {"cap_strength", "cap_schedule"},
    DpoMethod: {"cap_strength"},
}  # by the cap that made them


def default_of(section: type[Section], key: str) -> Any:
    return section.model_fields[key].get_default(call_default_factory=True)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_by_itself_trains_as_its_recipe_does(trainer: Any) -> None:
    section = TRAINERS[trainer]
    taken = set(section.model_fields) - ELSEWHERE - ROWS_MADE_BEFORE.get(section, set())
    parameters = inspect.signature(trainer).parameters
    assert {key: parameters[key].default for key in taken} == {key: default_of(section, key) for key in taken}


def test_options_are_those_of_the_schema() -> None:
    assert PenaltyOptions() == PenaltyOptions.of(SftMethod())
    assert PenaltyOptions.of(GrpoMethod(name="grpo")).weight == default_of(GrpoMethod, "floor_weight")
    assert {field.name: field.default for field in fields(SamplingOptions)} == Sampling().model_dump()
    assert not BarrierOptions(), "a trainer by itself has no benign rows that it could hold"


# (function or class, parameter) -> (section, key)
PARAMETERS: dict[tuple[Callable[..., Any], str], tuple[type[Section], str]] = {
    **{(taker, "margin"): (MethodSection, "floor_margin") for taker in (
        axis_floor_loss, axis_floor_terms, FloorCallback, FloorInjection)},
    (chunked_divergence, "jsd_beta"): (DistillMethod, "jsd_beta"),
    (chunked_divergence, "top_k"): (DistillMethod, "top_k"),
    (off_policy, "level"): (GrpoMethod, "ratio_level"),
    (off_policy, "beyond"): (GrpoMethod, "ratio_beyond"),
    (RolloutPlan, "benign_student_share"): (SftMethod, "benign_student_share"),
}  # fmt: skip


@pytest.mark.parametrize(("taker", "parameter"), PARAMETERS)
def test_a_parameter_has_the_default_of_its_key(taker: Callable[..., Any], parameter: str) -> None:
    assert inspect.signature(taker).parameters[parameter].default == default_of(*PARAMETERS[taker, parameter])
