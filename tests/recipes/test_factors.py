"""The larger models' recipes are a model and a method: nothing in one of them is of its own."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from trimtab.cli.check import Strategy, strategy_of
from trimtab.cli.launch import resolve_accelerate_config
from trimtab.pipeline.identity import NOT_SET, flat
from trimtab.recipes.loader import load_recipe, shipped_recipes

NAMES = [name for name in shipped_recipes() if not name.startswith("smollm2")]
MODELS = sorted({name.partition("/")[0] for name in NAMES})
METHODS = sorted({name.partition("/")[2] for name in NAMES})

# What a model's four recipes share and other models' may have otherwise.
OF_THE_MODEL = {
    "model.name", "model.attn_implementation", "model.chat_template_kwargs.enable_thinking",
    "axis.path", "floor.path", "floor.experiment",  # published for three of the models
    "floor.pool",  # smaller where only sigma is measured on it
    "lora.r", "lora.lora_alpha", "lora.target_modules",
    "axis.sampling.batch_size", "eval.sampling.batch_size",  # what the memory holds
}  # fmt: skip
# What a method's nine recipes share and other methods' have otherwise, beside the section `method`, whose keys are its own.
OF_THE_METHOD = {
    "data.benign_share", "train.learning_rate", "train.beta", "train.max_length", "train.max_completion_length",
    "train.num_generations", "train.temperature",
}  # fmt: skip
# What both decide: how many rows are sampled at a time, and how the rows of a step are spread over the GPUs.
SAMPLED = ("method.sampling.batch_size", "method.sampling_batch")
SPREAD = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
ROWS_A_STEP = {"sft": 16, "distill": 16, "dpo": 16, "grpo": 64}  # over all GPUs; of GRPO 8 prompts with 8 answers each
ROWS_AT_ONCE = {  # on a GPU, as its memory holds
    "gemma-2-27b": 2, "gemma-3-4b": 8, "llama-3.1-8b": 8, "llama-3.3-70b": 1, "olmo-3-7b": 8, "qwen3-30b-a3b": 4, "qwen3-32b": 2,
    "qwen3-4b": 8, "qwen3-8b": 8,
}  # fmt: skip


@functools.cache
def keys_of(name: str) -> dict[str, Any]:
    """Dotted key -> value of a whole recipe."""
    return flat(load_recipe(name).resolved)


def strategy(name: str) -> Strategy:
    """How the recipe's own command spreads it."""
    (engine,) = set(re.findall(r"--accelerate (\S+)", load_recipe(name).text.split("\n\n")[0]))
    return strategy_of(resolve_accelerate_config(engine), None)


def of_the_method(key: str) -> bool:
    return key in OF_THE_METHOD or (key.startswith("method.") and key not in SAMPLED)


def both_decide(model: str, method: str) -> dict[str, Any]:
    """The keys that neither decides alone, by rule."""
    batch = keys_of(f"{model}/sft")["axis.sampling.batch_size"]
    one_gpu = strategy(f"{model}/sft").processes == 1
    pairs = (
        2 if method == "dpo" and one_gpu else 1
    )  # a pair is two answers; over eight GPUs the weights' shards leave the room
    at_once = ROWS_AT_ONCE[model] // pairs
    steps = ROWS_A_STEP[method] // (at_once * strategy(f"{model}/{method}").processes)
    return {SAMPLED[method == "grpo"]: batch, **dict(zip(SPREAD, (at_once, steps), strict=True))}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_a_recipe_is_its_model_and_its_method(model: str, method: str) -> None:
    """Made again from another method's recipe of the model, and another model's recipe of the method."""
    other_method = METHODS[METHODS.index(method) - 1]
    other_model = MODELS[MODELS.index(model) - 1]
    alike, likewise = keys_of(f"{model}/{other_method}"), keys_of(f"{other_model}/{method}")
    made = {key: value for key, value in likewise.items() if key not in (OF_THE_MODEL | {*SAMPLED, *SPREAD})}
    made |= {key: alike[key] for key in OF_THE_MODEL if key in alike} | both_decide(model, method)
    assert made == keys_of(f"{model}/{method}")
    of_all = {key: value for key, value in alike.items() if not of_the_method(key) and key not in (*SAMPLED, *SPREAD)}
    assert of_all == {key: made.get(key, NOT_SET) for key in of_all}


def test_all_recipes_of_a_model_are_spread_alike() -> None:
    for model in MODELS:
        assert len({strategy(f"{model}/{method}") for method in METHODS}) == 1


def test_what_is_said_to_differ_does() -> None:
    """A key that has come to be the same in all recipes leaves the lists above."""
    for key in OF_THE_MODEL:
        assert len({repr(keys_of(f"{model}/sft").get(key)) for model in MODELS}) > 1, key
    for key in OF_THE_METHOD:
        assert len({repr(keys_of(f"qwen3-8b/{method}").get(key)) for method in METHODS}) > 1, key
