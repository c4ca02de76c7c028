"""Every shipped recipe on the meta device: layers, adapters, window, and what its header says of memory and hours.

The configurations are those of the models' own ``config.json``, the figures that shape them: ``model_configs.json``.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tiny_recipe import ROOT

from trimtab.axis.layers import find_decoder_layers, text_config_of
from trimtab.cli.calls import count
from trimtab.cli.check import Structure, build_meta_model, find_structure, plan_memory, strategy_of
from trimtab.cli.launch import resolve_accelerate_config
from trimtab.cli.recipes import listed
from trimtab.cli.work import estimate_work
from trimtab.recipes.loader import load_recipe, shipped_recipes

CONFIGS: dict[str, Any] = json.loads((ROOT / "tests" / "model_configs.json").read_text(encoding="utf-8"))
# In billions, as the models' cards give them.
PARAMETERS = {
    "Qwen/Qwen3-4B-Instruct-2507": 4.0, "Qwen/Qwen3-8B": 8.2, "Qwen/Qwen3-32B": 32.8, "Qwen/Qwen3-30B-A3B-Instruct-2507": 30.5,
    "meta-llama/Llama-3.1-8B-Instruct": 8.0, "meta-llama/Llama-3.3-70B-Instruct": 70.6, "allenai/Olmo-3-7B-Instruct": 7.3,
    "google/gemma-2-27b-it": 27.2, "google/gemma-3-4b-it": 4.3,
}  # fmt: skip
NAMES = [name for name in sorted(shipped_recipes()) if not name.startswith("smollm2")]
PUBLISHED = {"Qwen/Qwen3-32B": (46, 53), "meta-llama/Llama-3.3-70B-Instruct": (56, 71)}


@pytest.fixture(scope="module")
def structure_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Structure and text configuration of a recipe's model; recipes of one model with the same adapters share them."""

    found: dict[str, tuple[Structure, Any]] = {}

    def structure(name: str) -> tuple[Structure, Any]:
        recipe = load_recipe(name).recipe
        key = json.dumps([recipe.model.name, recipe.lora, recipe.floor.model_dump()], sort_keys=True)
        if key not in found:
            folder = tmp_path_factory.mktemp("config")
            (folder / "config.json").write_text(json.dumps(CONFIGS[recipe.model.name]), encoding="utf-8")
            recipe = load_recipe(name, [f"model.name={folder}"]).recipe
            model = build_meta_model(recipe)
            config = text_config_of(model)
            decoder = find_decoder_layers(model)
            (path,) = [path for path, module in model.named_modules() if module is decoder]
            found[key] = find_structure(recipe, model), config
            trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
            assert trained and all(path in name for name in trained), f"adapters of {name} lie outside of {path}"
        return found[key]

    return structure


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_what_its_header_says(name: str, structure_of: Any) -> None:
    loaded = load_recipe(name)
    recipe = loaded.recipe
    structure, config = structure_of(name)
    assert structure.parameters / 1e9 == pytest.approx(PARAMETERS[recipe.model.name], rel=0.02)
    assert len(structure.adapted) == structure.layers and structure.adapted[0] <= structure.window[0]
    if (published := PUBLISHED.get(recipe.model.name)) is not None:
        assert (structure.window[0], structure.window[-1]) == published
    header = loaded.text.split("\n\n")[0]
    (engine,) = set(re.findall(r"--accelerate (\S+)", header))
    assert f"accelerate_configs/{engine}.yaml -m trimtab.train.{recipe.method.name} " in header
    strategy = strategy_of(resolve_accelerate_config(engine), None)
    counted = count(recipe, strategy.processes)
    plan = plan_memory(recipe, structure, config, strategy, counted)
    (memory,) = re.findall(r"--gpu-memory (\d+)", header)
    for phase in plan.phases:
        assert plan.total(phase) < float(memory), f"{name}: {phase} does not fit"
    work = estimate_work(
        recipe, counted, structure.parameters, structure.active, structure.layers,
        sharded=strategy.shards_weights, processes=strategy.processes,
    )  # fmt: skip
    (hours, dollars) = re.findall(r"Estimate:\s+([\d.]+) GPU-hours of an H100, about \$(\d+)", header)[0]
    assert float(hours) == pytest.approx(work.gpu_hours, rel=0.15), (
        f"the header's estimate is old: {work.gpu_hours:.1f}"
    )
    assert float(dollars) == pytest.approx(2.5 * float(hours), rel=0.1, abs=0.6)
    row = listed(name, loaded.path)
    assert (row.method, row.gpus, row.hours) == (recipe.method.name, strategy.processes, float(hours))
    assert row.memory >= float(memory)


def test_every_model_has_every_method() -> None:
    methods: dict[str, set[str]] = {}
    for name in NAMES:
        model, _, method = name.partition("/")
        methods.setdefault(model, set()).add(method)
    assert len(methods) == len(PARAMETERS)
    assert all(found == {"sft", "distill", "grpo", "dpo"} for found in methods.values())


@pytest.mark.slow
def test_work_scales_as_it_should(structure_of: Any) -> None:
    structure, _ = structure_of("qwen3-8b/grpo")

    def work(*overrides: str, processes: int = 1, sharded: bool = False) -> Any:
        recipe = load_recipe("qwen3-8b/grpo", list(overrides)).recipe
        counted = count(recipe, processes)
        return estimate_work(
            recipe,
            counted,
            structure.parameters,
            structure.active,
            structure.layers,
            sharded=sharded,
            processes=processes,
        )

    one, twice = work(), work("train.max_steps=400")
    assert (twice.steps, twice.rollouts) == pytest.approx((2 * one.steps, 2 * one.rollouts), rel=0.02)
    assert (twice.before, twice.after) == (one.before, one.after)
    # more GPUs take more rows a step in the same time, not less time; but more of their generations hold a conversation
    alike = [work("data.conversation_turns=0", processes=processes) for processes in (1, 8)]
    assert (alike[1].steps, alike[1].rollouts) == pytest.approx((alike[0].steps, alike[0].rollouts), rel=0.02)
    many = work(processes=8)
    assert many.rollouts > 1.5 * one.rollouts
    assert work(processes=8, sharded=True).rollouts > many.rollouts
    assert work("eval.tuned_cap=false").after < one.after
    assert work("method.rewards=[{name: assistant},{name: capped_self}]").steps > one.steps


def test_a_token_passes_the_chosen_experts(structure_of: Any) -> None:
    structure, _ = structure_of("qwen3-30b-a3b/sft")
    assert structure.active / 1e9 == pytest.approx(3.3, abs=0.1)  # its name says A3B
    structure, _ = structure_of("qwen3-8b/sft")
    assert structure.active == structure.parameters
