"""Recipes: every fault with its place and its remedy, all at once, quickly."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.recipes.faults import Fault, RecipeError
from trimtab.recipes.library_fields import VLLM_KEYS, accepts, lora_fields, train_config, train_fields
from trimtab.recipes.loader import load_recipe, shipped_recipes
from trimtab.recipes.methods import METHODS
from trimtab.recipes.rules import floor_layers
from trimtab.recipes.yaml_lines import parse_yaml

GOOD = """\
model:
  name: smollm2-135m
lora:
  r: 8
  target_modules: all-linear
train:
  max_steps: 10
  learning_rate: 1e-4
  save_strategy: no
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path | str, overrides: list[str] | None = None) -> dict[str, Fault]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides or [])
    return {fault.key: fault for fault in caught.value.faults}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_explain_themselves(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.recipe.model.name
    json.dumps(loaded.resolved)
    opening = loaded.text.split("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in ("Hardware:", "Run:", "Override:", "Expect:", name):
        assert word in opening, f"{name} does not say {word}"


def test_recipe_by_path_and_by_name_are_the_same() -> None:
    by_name = load_recipe("smollm2-135m/sft")
    by_path = load_recipe(by_name.path)
    assert by_path == by_name


def test_published_windows_and_sections() -> None:
    qwen, llama = load_recipe("qwen3-32b/sft").recipe, load_recipe("llama-3.3-70b/sft").recipe
    assert qwen.floor.experiment == "layers_46:54-p0.25"
    assert qwen.model.chat_template_kwargs == {"enable_thinking": False}
    assert llama.floor.experiment == "layers_56:72-p0.25"
    assert load_recipe("gemma-2-27b/sft").recipe.floor.percentile == 75


def test_a_good_recipe_and_the_scalars_people_mean(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, GOOD))
    assert loaded.name == "recipe"
    assert loaded.text == GOOD
    assert loaded.recipe.train["learning_rate"] == pytest.approx(1e-4)
    assert loaded.recipe.train["save_strategy"] == "no"
    assert loaded.resolved["method"]["floor_weight"] == 0.7
    assert parse_yaml("a: 46:54\nb: 010\nc: yes\nd: 1.5e-3\ne:").value == {
        "a": "46:54",
        "b": 10,
        "c": "yes",
        "d": 0.0015,
        "e": None,
    }


def test_overrides_have_yaml_types_and_nest(tmp_path: Path) -> None:
    loaded = load_recipe(
        write(tmp_path, GOOD),
        [
            "train.learning_rate=5e-5",
            "axis.sampling.temperature=0.5",
            "floor.layers=20-22",
            "lora.target_modules=[q_proj, v_proj]",
            "train.gradient_checkpointing_kwargs.use_reentrant=false",
            "eval.control=true",
        ],
    )
    recipe = loaded.recipe
    assert recipe.train["learning_rate"] == pytest.approx(5e-5)
    assert recipe.axis.sampling.temperature == 0.5
    assert recipe.floor.layers == [20, 21, 22]
    assert recipe.lora["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.train["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert recipe.eval.control is True
    assert loaded.overrides[0] == "train.learning_rate=5e-5"


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("trian.learning_rate=1", "trian", "did you mean 'train'"),
        ("method.floor_shape=squared", "method.floor_shape", "remove it"),
        ("floor.allow_inert=true", "floor.allow_inert", "floor.min_firing=0"),
        ("train.learnig_rate=1e-4", "train.learnig_rate", "did you mean 'learning_rate'"),
        ("lora.target_module=all-linear", "lora.target_module", "did you mean 'target_modules'"),
        ("axis.sampling.temprature=1", "axis.sampling.temprature", "did you mean 'temperature'"),
        ("train.max_steps", "", "section.key=value"),
        ("max_steps=3", "", "section.key=value"),
        ("train.max_steps=[1", "train.max_steps", "mend the YAML"),
        ("model.name.first=1", "model.name.first", "override the key itself"),
    ],
)
def test_bad_overrides_name_the_command_line(tmp_path: Path, override: str, key: str, remedy: str) -> None:
    fault = faults_of(write(tmp_path, GOOD), [override])[key]
    assert fault.file == "command line"
    assert remedy in fault.remedy


# key -> (lines added under sections, part of the fault, part of the remedy)
SCHEMA_FAULTS = {
    "evla": ("evla: {}", "unknown section", "did you mean 'eval'"),
    "axis.role": ("axis: {role: 3}", "unknown key", "did you mean 'roles'"),
    "axis.roles": ("axis: {roles: '40'}", "expected a valid integer", "quotes"),
    "axis.seed": ("axis: {seed: true}", "expected a valid integer", "kind"),
    "axis.judge.model": ("axis: {judge: {endpoint: 'http://localhost/v1'}}", "missing", "axis.judge.model="),
    "eval.judge.model": ("eval: {judge: {endpoint: 'http://x'}, boundary_probes: 4}", "missing", "eval.judge.model="),
    "eval.user.model": ("eval: {simulated_users: 2, user: {endpoint: 'http://x'}}", "missing", "eval.user.model="),
    "method.rewards.0.judge.model": (
        "method: {name: grpo, rewards: [{name: judge, judge: {endpoint: 'http://x'}}]}",
        "missing",
        "method.rewards.0.judge.model=",
    ),
    "5": ("5: {a: b}", "unknown section", "known here"),
    "data.5": ("data: {5: {a: b}}", "unknown key", "known here"),
    "eval.durability": ("eval: {durability: 3}", "expected a valid list", "kind"),
    "axis.sampling.temperature": ("axis: {sampling: {temperature: 1e-9}}", "too small", "write 0"),
    "data.benign_file": ("data: {benign_file: .}", "this is a folder", "name a file"),
    "eval.bootstrap": ("eval: {bootstrap: 1}", "greater than or equal to 200", "range"),
    "eval.tuned": ("eval: {tuned: ''}", "must not be empty", "remove the key"),
    "data.role_questions": ("data: {role_questions: 900}", "900 questions a role", "at most"),
    "axis.default_repeats": ("axis: {default_repeats: 1000000000}", "less than or equal to 1000", "range"),
    "method.floor_weight": (
        "data: {benign_share: 0}\nmethod: {floor_weight: 0, ce_weight: 0}",
        "nothing would be trained",
        "method.ce_weight",
    ),
    "floor.percentile": ("floor: {percentile: 100}", "less than 100", "range"),
    "floor.layers": ("floor: {layers: 9-3}", "not layers", "46-53"),
    "floor.experiment": ("floor: {experiment: 'layers_46:54-p0.25'}", "capping_config", "floor.path"),
    "method.cap_schedule": ("method: {cap_schedule: linaer}", "must be", "did you mean 'linear'"),
    "eval": ("eval: 3", "expected a section", "indented"),
    "data.benign_share": ("data: {benign_share: 1.0}", "less than 1", "range"),
    "data.drift_file": ("data: {drift_file: nowhere.jsonl}", "no such file", "relative to the recipe"),
    "method.regenerate_every": ("method: {rollouts: stored, regenerate_every: 5}", "no effect", "on_the_fly"),
    "data.drift_prompts": ("data: {drift_prompts: 0}", "nothing to train on", "data.drift_prompts=220"),
    "eval.conversations": ("eval: {conversations: 999}", "999 dev conversations", "at most 16"),
    "eval.benign_systems": ("eval: {benign_systems: 49, split: test}", "49 test benign system prompts", "at most 48"),
    "eval.lookalikes": ("eval: {lookalikes: 33}", "33 look-alikes asked for; there are 32", "at most 32"),
    "eval.second_reader": ("eval: {second_reader: smollm2-135m}", "it is the base", "another family"),
    "method.benign_kl_weight": ("data: {benign_share: 0}\nmethod: {benign_kl_weight: 2.0}", "no effect", "above 0"),
}


@pytest.mark.parametrize(
    "layers", ["0-2000000", "0-999999999", "0-99999999999999999999", "0-9999,10000-19999", "1-2-3", "a-b", "²-3", "-3"]
)
def test_a_slip_in_a_range_of_layers_fills_no_memory(tmp_path: Path, layers: str) -> None:
    path = write(tmp_path, GOOD + f"floor: {{layers: '{layers}'}}\n")
    tracemalloc.start()
    try:
        found = faults_of(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6, "bytes at the most"
    finally:
        tracemalloc.stop()
    assert set(found) == {"floor.layers"} and "46-53" in found["floor.layers"].remedy


def test_ranges_of_layers_as_people_write_them(tmp_path: Path) -> None:
    for text, layers in {"20-22": [20, 21, 22], "20, 22": [20, 22], "7": [7], "3,20-21": [3, 20, 21]}.items():
        assert load_recipe(write(tmp_path, GOOD), [f"floor.layers='{text}'"]).recipe.floor.layers == layers
    path = tmp_path / "capping_config.pt"
    path.write_bytes(b"")
    sections = GOOD + f"floor: {{path: {path}, experiment: 'layers_0:999999999-p0.25'}}\n"
    assert floor_layers(load_recipe(write(tmp_path, sections)).recipe) is None, "a slip there is told by the file"


@pytest.mark.parametrize("key", SCHEMA_FAULTS)
def test_faults_of_sections(tmp_path: Path, key: str) -> None:
    text, fault, remedy = SCHEMA_FAULTS[key]
    path = write(tmp_path, GOOD + text + "\n")
    found = faults_of(path)
    assert set(found) == {key}
    assert fault in found[key].fault
    assert remedy in found[key].remedy
    assert found[key].file == str(path)
    assert found[key].line is not None and found[key].line > len(GOOD.splitlines())


# override -> (key, part of the remedy)
COMBINATIONS = {
    "method.benign_kl_weight=0 method.benign_axis_weight=0": ("data.benign_share", "data.benign_share=0"),
    "train.packing=true": ("train.packing", "train.packing=false"),
    "lora.target_modules=[q_proj, lm_head]": ("lora.target_modules", "leave lm_head out"),
    "lora.target_modules=.*head": ("lora.target_modules", "leave lm_head out"),
    "lora.target_modules='(q_proj'": ("lora.target_modules", "list of names"),
    "train.remove_unused_columns=true": ("train.remove_unused_columns", "remove it"),
    "train.dataset_kwargs={}": ("train.dataset_kwargs", "remove it"),
    "train.deepspeed=ds.json": ("train.deepspeed", "--accelerate"),
    "train.num_train_epochs=3": ("train.num_train_epochs", "train.max_steps"),
    "train.truncation_mode=keep_start": ("train.truncation_mode", "never its answer"),
    "train.max_length=60": ("train.max_length", "train.max_length=256"),
    "train.max_steps=0": ("train.max_steps", "positive"),
    "train.max_steps=-1": ("train.max_steps", "positive"),
    "train.per_device_train_batch_size=4.0": ("train.per_device_train_batch_size", "kind"),
    "train.per_device_train_batch_size=true": ("train.per_device_train_batch_size", "kind"),
    "train.learning_rate='1e-4'": ("train.learning_rate", "quotes"),
    "lora.r=eight": ("lora.r", "kind"),
    "lora.bias=some": ("lora.bias", "kind"),
    "lora.layers_to_transform=[3]": ("lora.layers_to_transform", "list the modules"),
    "floor.layers=[3, 2]": ("floor.layers", "46-53"),
    "train.vllm_mode=server": ("train.vllm_mode", "train.use_vllm=true"),
    "train.use_vllm=1": ("train.use_vllm", "kind"),
    "train.vllm_structured_outputs_regex=x": ("train.vllm_structured_outputs_regex", ""),
    "train.learning_rate=-1.0": ("train.learning_rate", "positive"),
    "train.save_only_model=true": ("train.save_only_model", "train.save_only_model=false"),
    "train.train_sampling_strategy=random": ("train.train_sampling_strategy", "data.seed"),
    "train.ignore_data_skip=true": ("train.ignore_data_skip", "remove it"),
    "lora.r=0": ("lora.r", "lora.r=16"),
    "lora.lora_dropout=5": ("lora.lora_dropout", "0.0"),
    "lora.lora_alpha=-8": ("lora.lora_alpha", "lora.lora_alpha=32"),
    "lora.lora_alpha=0": ("lora.lora_alpha", "positive"),
    "lora.target_modules=a{99999999999}": ("lora.target_modules", "list of names"),
    "model.device=gpu": ("model.device", "cuda:1"),
    'model.revision="a\\0b"': ("model.revision", "another value"),
    "data.benign_file=~no-such-user/x": ("data.benign_file", "check the path"),
    "train.warmup_steps=-1": ("train.warmup_steps", "positive"),
    "train.warmup_steps=4000": ("train.warmup_steps", "below train.max_steps"),
    "train.save_steps=-1": ("train.save_steps", "positive"),
    "train.max_length=-5": ("train.max_length", "positive"),
    "train.max_length=0": ("train.max_length", "positive"),
    "train.max_steps=1000000000000": ("train.max_steps", "200"),
    "train.per_device_train_batch_size=100000000": ("train.max_steps", "rows of a step"),
    "train.learning_rate=1e300": ("train.learning_rate", "smaller"),
    "train.learning_rate=1e999": ("train.learning_rate", "another value"),
    "train.max_steps=99999999999999999999": ("train.max_steps", "another value"),
    "train.weight_decay=-0.1": ("train.weight_decay", "positive"),
    "train.adam_beta1=1": ("train.adam_beta1", "share"),
    "train.label_smoothing_factor=2": ("train.label_smoothing_factor", "share"),
    "train.max_grad_norm=1e30": ("train.max_grad_norm", "smaller"),
    "train.ddp_backend=ncll": ("train.ddp_backend", "did you mean 'nccl'"),
    "train.log_level=loud": ("train.log_level", "passive"),
    "train.torch_compile_mode=fast": ("train.torch_compile_mode", "default"),
    "train.trust_remote_code=true": ("train.trust_remote_code", "remove it"),
    "train.resume_from_checkpoint=x": ("train.resume_from_checkpoint", "goes on"),
}
# method, override -> (key, part of the remedy)
OF_METHODS = {
    ("dpo", "train.truncation_mode=keep_end"): ("train.truncation_mode", "never its answer"),
    ("dpo", "train.max_length=48"): ("train.max_length", "train.max_length=256"),
    ("distill", "train.loss_type=dft"): ("train.loss_type", "method.divergence"),
    ("distill", "method.jsd_beta=0.3"): ("method.jsd_beta", "divergence=jsd"),
    ("grpo", "train.top_p=0.9"): ("train.top_p", "train.top_p=1"),
    ("grpo", "train.chat_template_kwargs={a: 1}"): ("train.chat_template_kwargs", "model.chat_template_kwargs"),
    ("grpo", "method.rewards=[{name: foo}]"): ("method.rewards", "persona_llr"),
    ("grpo", "method.rewards=[{name: capped_self, weight: 0}]"): ("method.rewards", "weight: 1.0"),
    ("grpo", "method.rewards=[]"): ("method.rewards", "assistant"),
    ("grpo", "method.ratio_limit=0.5"): ("method.ratio_limit", "range"),
    ("grpo", "method.ratio_level=sentence"): ("method.ratio_level", "did you mean 'sequence'"),
    ("grpo", "train.importance_sampling_level=sequence"): (
        "train.importance_sampling_level",
        "method.ratio_level=sequence",
    ),
    ("grpo", "train.max_completion_length=null"): ("train.max_completion_length", "=256"),
    ("grpo", "train.max_completion_length=0"): ("train.max_completion_length", "=1"),
}


@pytest.mark.parametrize(("method", "override"), OF_METHODS)
def test_impossible_for_a_method(method: str, override: str) -> None:
    key, remedy = OF_METHODS[method, override]
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"smollm2-135m/{method}", [override])
    assert [fault.key for fault in caught.value.faults] == [key] and remedy in caught.value.faults[0].remedy


@pytest.mark.parametrize("method", ["sft", "distill", "dpo"])
def test_a_conversation_that_rows_do_not_hold_is_told_with_what_would(method: str) -> None:
    """Turns, answers and rows are weighed together, whichever of them is changed; and every remedy that is offered works."""
    name = f"qwen3-32b/{method}"
    load_recipe(name)
    changes = [
        "train.max_length=1024", "data.conversation_turns=5", "method.sampling.max_new_tokens=300",
        "data.conversation_turns=1000000", "train.max_length=1300",
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(RecipeError) as caught:
            load_recipe(name, [change])
        (fault,) = caught.value.faults
        assert fault.key == "train.max_length" and "data.conversation_turns" in fault.fault
        for remedy in re.findall(r"(?:train|data)\.\w+=\d+", fault.remedy):
            load_recipe(name, [*(word for word in [change] if word.split("=")[0] != remedy.split("=")[0]), remedy])
    for change in ("train.max_length=null", "data.conversation_turns=0"):
        load_recipe(name, [change])
    load_recipe(name, ["train.max_length=1024", "eval.tuned=somewhere"])  # nothing is trained


def test_the_longest_row_of_the_rules_is_trls_own() -> None:
    from trl import DPOConfig, SFTConfig

    from trimtab.recipes.methods import ROW_LENGTH

    for config in (SFTConfig, DPOConfig):
        assert config.__dataclass_fields__["max_length"].default == ROW_LENGTH


def test_rewards_of_the_rules_are_those_that_ship() -> None:
    from trimtab.recipes.methods import REWARDS
    from trimtab.train.rewards import SHIPPED

    assert set(REWARDS) == {*SHIPPED, "judge"}


@pytest.mark.parametrize("override", COMBINATIONS)
def test_impossible_combinations(tmp_path: Path, override: str) -> None:
    key, remedy = COMBINATIONS[override]
    found = faults_of(write(tmp_path, GOOD), re.split(r" (?=method)", override))
    assert set(found) == {key}
    assert remedy in found[key].remedy


def test_adapters_above_the_floor(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    modules = "lora.target_modules=[q_proj, v_proj]"
    above = ["floor.layers=10-12", "lora.layers_to_transform=[13, 14]", modules]
    assert set(faults_of(path, above)) == {"lora.layers_to_transform"}
    assert load_recipe(path, ["floor.layers=10-12", "lora.layers_to_transform=[12, 14]", modules])
    caps = write(tmp_path, "", "capping_config.pt")
    # The slice leaves out 54.
    published = [f"floor.path={caps}", "floor.experiment=layers_46:54-p0.25", modules]
    assert set(faults_of(path, [*published, "lora.layers_to_transform=[54]"])) == {"lora.layers_to_transform"}
    assert load_recipe(path, [*published, "lora.layers_to_transform=[53]"])
    assert set(faults_of(path, [*published, "floor.percentile=60"])) == {"floor.percentile"}
    finished = [f"floor.path={write(tmp_path, '', 'floor.safetensors')}", published[1]]
    assert set(faults_of(path, finished)) == {"floor.experiment"}


def test_missing_keys(tmp_path: Path) -> None:
    assert set(faults_of(write(tmp_path, "train: {learning_rate: 1e-4}\n"))) == {"model", "train.max_steps"}
    assert set(faults_of(write(tmp_path, "model: {dtype: auto}\ntrain: {max_steps: 1}\n"))) == {"model.name"}
    assert "num_train_epochs" not in str(faults_of(write(tmp_path, "model: {name: x}\n"))["train.max_steps"])


def test_all_faults_at_once_in_order_of_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "modle: 3\n"
        "model:\n"
        "  name: x\n"
        "  dtype: bfloat\n"
        "floor:\n"
        "  percentile: '75'\n"
        "  experiment: e\n"
        "train:\n"
        "  learning_rate: 1e-4\n"
        "  learning_rate: 2e-4\n"
        "  epochs: 3\n"
        "  packing: true\n"
        "method: {benign_kl_weight: 0, benign_axis_weight: 0}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["eval.turn=3", "lora.rank=8"])
    places = [(fault.line, fault.key) for fault in caught.value.faults if fault.file == str(path)]
    assert places == [
        (None, "data.benign_share"),  # a default: the fault is in a combination, and the key is not in the file
        (1, "modle"),
        (4, "model.dtype"),
        (6, "floor.percentile"),
        (7, "floor.experiment"),
        (8, "train.max_steps"),
        (10, "train.learning_rate"),
        (11, "train.epochs"),
        (12, "train.packing"),
    ]
    assert {fault.key for fault in caught.value.faults if fault.file == "command line"} == {"eval.turn", "lora.rank"}
    text = str(caught.value)
    assert text.startswith(f"the recipe has {len(caught.value.faults)} faults:")
    assert text.count("remedy:") == len(caught.value.faults)
    assert f"{path}:4: model.dtype" in text
    assert "first on line 9" in text


# Each line ten times the one before: a hundred million values, if they were built.
ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("content", "line", "fault"),
    [
        ("model:\n  name: [1\n", 3, "not readable as YAML"),
        ("model:\n\tname: x\n", 2, "not readable as YAML"),
        ("", None, "empty"),
        ("- model\n", None, "mapping of sections"),
        ("a: 1\n---\nb: 2\n", 2, "not readable as YAML"),
        ("model:\n  name: !!python/object:os.system x\n", 2, "not a plain value"),
        ("model: &a\n  name: *a\n", 1, "alias"),
        ("[" * 3000 + "]" * 3000, 1, "nested deeper than 50 levels"),
        ("model: " + "{a: " * 3000 + "}" * 3000, 1, "nested deeper than 50 levels"),
        (ALIASES, 4, "more than 10,000 values"),
        ("model: {name: x, dtype: !!timestamp x}", 1, "tag"),
        ("model: {name: x, revision: !!int x}", 1, "not a plain value"),
        ("x" * (2 << 20), None, "are no recipe"),
    ],
)
def test_unreadable_yaml(tmp_path: Path, content: str, line: int | None, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, content))
    found = [each for each in caught.value.faults if fault in each.fault]
    assert found, caught.value
    assert found[0].line == line


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model: {name: caf\xe9}")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="did you mean 'smollm2-135m/sft'"):
        load_recipe("smollm2-135m/stf")


def test_a_flat_dotted_key_is_told_to_nest(tmp_path: Path) -> None:
    fault = faults_of(write(tmp_path, GOOD + "floor.percentile: 60\n"))["floor.percentile"]
    assert "nest it under `floor:`" in fault.remedy


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    path = write(tmp_path / "inside", GOOD + "data: {drift_file: mine.jsonl}\n")
    mine = write(tmp_path / "inside", "", "mine.jsonl")
    other = write(tmp_path, "", "other.jsonl")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).recipe.data.drift_file == str(mine)
    assert load_recipe(path, ["data.drift_file=other.jsonl"]).recipe.data.drift_file == str(other)
    published = "hf://datasets/someone/axes/axis.pt"
    assert load_recipe(path, [f"axis.path={published}"]).recipe.axis.path == published


def test_data_may_be_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD + "data: {drift_file: owner/name}\n")
    loaded = load_recipe(
        path, ["eval.conversations_file=hf://datasets/owner/talks:test", "data.benign_file=owner/plain:train"]
    )
    assert loaded.recipe.data.drift_file == "owner/name" and loaded.recipe.data.benign_file == "owner/plain:train"
    assert loaded.recipe.eval.conversations_file == "hf://datasets/owner/talks:test"
    assert "no such file" in faults_of(path, ["axis.path=owner/name"])["axis.path"].fault
    (tmp_path / "owner").mkdir()
    here = write(tmp_path / "owner", "", "name")
    assert load_recipe(path).recipe.data.drift_file == str(here), "a file of that name comes first"


def test_a_file_stands_in_the_place_of_the_prompts_that_ship(tmp_path: Path) -> None:
    write(tmp_path, "", "mine.jsonl")
    path = write(tmp_path, GOOD + "data: {drift_file: mine.jsonl}\n")
    assert load_recipe(path).recipe.data.drift_prompts == 0, "the default is nothing that was asked for"
    asked = ["data.drift_prompts=3", "data.role_questions=1", "data.conversation_turns=2"]
    found = faults_of(path, asked)
    assert {fault.file for fault in found.values()} == {"command line"}
    for key in ("data.drift_prompts", "data.role_questions", "data.conversation_turns"):
        assert "has no effect" in found[key].fault and f"set {key}=0" in found[key].remedy
    assert load_recipe(path, [each.partition("=")[0] + "=0" for each in asked]).recipe.data.drift_file
    assert set(faults_of(path, ["data.benign_file=mine.jsonl", "data.benign_share=0"])) >= {"data.benign_file"}


def test_library_fields_are_those_of_the_classes() -> None:
    import inspect

    from peft import LoraConfig
    from trl import DPOConfig, GRPOConfig, SFTConfig

    configs = {"sft": SFTConfig, "distill": SFTConfig, "grpo": GRPOConfig, "dpo": DPOConfig}
    owners = [(owner, train_fields(method)) for method, owner in configs.items() if method in ("grpo", "dpo")]
    vllm = {name: train_fields("grpo")[name] for name in VLLM_KEYS}
    for method in ("sft", "distill"):
        own = train_fields(method)
        assert {name: own[name] for name in vllm} == vllm
        owners.append((SFTConfig, {name: annotation for name, annotation in own.items() if name not in vllm}))
    assert configs.keys() == METHODS.keys()
    assert {method: train_config(method) for method in configs} == {m: f"trl.{c.__name__}" for m, c in configs.items()}
    for owner, fields in (*owners, (LoraConfig, lora_fields())):
        assert set(fields) == {field.name for field in dataclasses.fields(owner) if field.init}
        for name, parameter in inspect.signature(owner).parameters.items():
            default = parameter.default
            if type(default) in (int, float, str, bool, list, dict, type(None)):
                assert accepts(fields[name], default), f"{name}={default!r}"


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    bad = write(tmp_path, GOOD + "evla: {}\n")
    code = (
        "import sys\n"
        "from trimtab.axis import UserError\n"
        "from trimtab.recipes.loader import load_recipe\n"
        "load_recipe('smollm2-135m/sft')\n"
        f"try: load_recipe({str(bad)!r})\n"
        "except UserError: pass\n"
        "else: raise SystemExit('no fault was found')\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'safetensors', 'numpy', 'datasets', 'accelerate'}\n"
        "raise SystemExit(' '.join(heavy & set(sys.modules)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---- any file at all ----

ODD: list[Any] = [
    None, 0, -1, 3.5, 10**12, 1e300, "", "x", "1e-4", "auto", True, [], {}, [1, 2], ["a"], {"a": 1}, [None], [[]], [{}],
    "x" * 5000, "~no-such-user/x", "/", "\t", {5: 1}, {"model": None}, ".inf", [3, 2], "0-3", "hf://x", "a\nb", "lm_head",
    "(a+)+$",
]  # fmt: skip
ODD_KEYS = [
    "x", "judge", "user", "5", "name", "rewards", "layers", "path", "durability", "tuned", "r", "a.b", "optim", "method",
]  # fmt: skip
ODD_LETTERS = ["", "[", "{", ":", "-", " ", "\n", "&a", "*a", "!", "'", "#", "\t"]


def odd(chance: random.Random, text: str) -> str:
    """A recipe with up to six of its values, keys or letters changed into something that nobody means."""
    data = yaml.safe_load(text)
    for _ in range(chance.choice([1, 1, 2, 6])):
        place = data
        while place and isinstance(inner := place[chance.choice(list(place))], dict) and chance.random() < 0.8:
            place = inner
        key = chance.choice([*place, *ODD_KEYS, ""])
        if chance.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(chance.choice(ODD))
    letters = list(yaml.safe_dump(data))
    for _ in range(chance.choice([0, 0, 0, 3])):
        letters[chance.randrange(len(letters))] = chance.choice(ODD_LETTERS)
    return "".join(letters)


def test_an_odd_recipe_loads_or_says_why_not(tmp_path: Path) -> None:
    """Nothing but a RecipeError, and at once."""
    chance = random.Random(0)
    texts = [load_recipe(f"smollm2-135m/{method}").text for method in METHODS]
    faults: list[Fault] = []
    for number in range(60):
        path = write(tmp_path, odd(chance, texts[number % len(texts)]))
        began = time.process_time()
        try:
            load_recipe(path)
        except RecipeError as error:
            faults += error.faults
        assert time.process_time() - began < 1
    assert len(faults) > 100 and all(fault.remedy and fault.file for fault in faults)


def test_a_section_in_part_has_its_other_defaults(tmp_path: Path) -> None:
    text = "model: {name: x}\nmethod: {name: distill, sampling: {batch_size: 4}}\nlora: {r: 8}\n"
    recipe = load_recipe(write(tmp_path, text + "train: {max_steps: 5, per_device_train_batch_size: 4}\n")).recipe
    assert recipe.method.sampling.max_new_tokens == 48  # type: ignore[union-attr]
    assert recipe.axis.sampling.max_new_tokens == 64
    assert recipe.lora == {"lora_alpha": 16, "r": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    # rows a step are the recipe's own where it names one of their keys
    assert "gradient_accumulation_steps" not in recipe.train
