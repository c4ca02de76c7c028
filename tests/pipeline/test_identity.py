"""What a run folder is held to: a changed recipe goes on unless a stage that is done, or begun, depends on what was changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import write_recipe

from trimtab.axis.errors import UserError
from trimtab.axis.files import fingerprint, read_json, write_json, write_jsonl
from trimtab.pipeline.identity import NO_PART_OF_TRAINING, NOT_SET, differences, stage_inputs
from trimtab.pipeline.run import BEGUN, Run, begin, open_run
from trimtab.recipes.gone import GONE
from trimtab.recipes.loader import load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", tmp_path / "model")


def opened(recipe: Path, *overrides: str, folder: str = "run") -> Run:
    return open_run(load_recipe(recipe, list(overrides)), output_dir=str(recipe.parent / folder))


def made(run: Run, *stages: str) -> None:
    """Have stages done: their records are what opening reads."""
    for name in stages:
        run.record(name, run.inputs(name.removesuffix("_control")), {}, seconds=0.0)


def trained_halfway(run: Run) -> None:
    """A training that was killed after its first checkpoint."""
    begin(run.variant(control=False).checkpoints / BEGUN, run.inputs("train"))
    (run.variant(control=False).checkpoints / "checkpoint-2").mkdir()


# What is there -> changes that go on, and changes that are refused: override -> what the refusal says of it.
HELD: dict[str, tuple[list[str], dict[str, str]]] = {
    "nothing": (["axis.roles=3", "model.dtype=bfloat16", "train.learning_rate=0.5", "eval.control=true", "lora.r=8"], {}),
    "axis": (
        ["axis.sampling.batch_size=2", "model.device=auto", "floor.percentile=60", "data.seed=3", "train.max_steps=9"],
        {
            "axis.roles=3": "axis.roles was 2 and is 3 now",
            "axis.sampling.max_new_tokens=7": "axis.sampling.max_new_tokens was 6 and is 7 now",
            "model.name=other": "model.name was",
            "model.chat_template_kwargs.enable_thinking=false": "model.chat_template_kwargs.enable_thinking was not set",
        },
    ),
    "axis floor": (
        ["floor.batch_size=3", "method.floor_weight=0.1", "data.drift_prompts=5", "lora.lora_alpha=4"],
        {
            "floor.percentile=60": "stage floor is done there: floor.percentile was 75.0 and is 60.0 now",
            "eval.control=true": "eval.control was False and is True now",
            "axis.seed=4": "stage axis is done there: axis.seed was 0 and is 4 now",
        },
    ),
    "axis floor begun": (
        [
            "train.logging_steps=5", "train.save_steps=1", "train.save_total_limit=9", "train.disable_tqdm=true",
            "train.gradient_checkpointing=false", "train.per_device_train_batch_size=2", "train.run_name=again", "eval.roles=7",
            "method.sampling.batch_size=2", "train.hub_model_id=x",
        ],
        {
            "train.learning_rate=0.5": "stage train is begun there: train.learning_rate was 0.01 and is 0.5 now",
            "train.optim=sgd": "train.optim was 'adamw_torch' and is 'sgd' now",
            "train.adam_beta2=0.99": "train.adam_beta2 was not set and is 0.99 now",
            "train.max_steps=8": "train.max_steps was 4 and is 8 now",
            "method.regenerate_every=1": "method.regenerate_every was 2 and is 1 now",
            "data.seed=3": "data.seed was 0 and is 3 now",
            "lora.r=8": "lora.r was 4 and is 8 now",
        },
    ),
    "axis floor train": (
        ["eval.questions=2", "train.report_to=none", "train.output_dir=elsewhere"],
        {"train.learning_rate=0.5": "stage train is done there", "floor.pool=9": "stage floor is done there"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("there", HELD)
def test_what_a_folder_is_held_to(there: str, recipe: Path) -> None:
    goes_on, refused = HELD[there]
    run = opened(recipe)
    made(run, *(name for name in there.split() if name in ("axis", "floor", "train")))
    if "begun" in there:
        trained_halfway(run)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    for override, said in refused.items():
        with pytest.raises(UserError) as caught:
            opened(recipe, override)
        told = str(caught.value)
        assert "another recipe" in told and said in told and caught.value.key == override.partition("=")[0], told
        assert ("begin it anew" in told) == ("begun" in there and "stage train" in told)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    for override in goes_on:
        assert opened(recipe, override).folder == run.folder, override
        opened(recipe)  # and back


def test_a_mended_typo_goes_on_and_the_folder_says_what_was_changed(recipe: Path) -> None:
    run = opened(recipe, "train.optim=adamwww")
    made(run, "axis", "floor")
    axis = read_json(run.folder / "stages" / "axis.json")
    assert axis["inputs"]["axis.roles"] == 2 and axis["recipe"] == "tiny"
    assert not any(key.startswith(("train.", "lora.", "method.")) for key in axis["inputs"])
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("regenerate_every: 2", "regenerate_every: 3"))
    again = opened(recipe)
    # what is launched from here reads these
    assert (run.folder / "recipe.yaml").read_text(encoding="utf-8") == again.loaded.text
    marker = read_json(run.folder / "run.json")
    assert marker["resolved"] == again.loaded.resolved
    (change,) = marker["changes"]
    assert sorted(change["keys"]) == ["method.regenerate_every", "train.optim"]
    assert read_json(run.folder / "stages" / "axis.json") == axis
    made(again, "train")
    assert read_json(run.folder / "stages" / "train.json")["inputs"]["train.optim"] == "adamw_torch"


def test_stages_are_not_done_again_and_a_replaced_file_is_told(recipe: Path) -> None:
    run = opened(recipe)
    calls: list[str] = []

    def work(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"made": name}

    file = run.folder / "axis.safetensors"
    file.write_bytes(b"one")
    for _ in range(2):
        assert run.stage("axis", run.inputs("axis"), lambda: work("axis")) == {"made": "axis"}
        run.stage("floor", run.inputs("floor"), lambda: work("floor"), made_from=[file])
    assert calls == ["axis", "floor"]
    file.write_bytes(b"two")
    with pytest.raises(UserError, match=r"stage floor was done with other inputs: axis\.safetensors was made again"):
        run.stage("floor", run.inputs("floor"), lambda: work("floor"), made_from=[file])


def test_a_begun_axis_is_held_by_its_rollouts(recipe: Path) -> None:
    run = opened(recipe)

    def killed() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("axis", run.inputs("axis"), killed)
    opened(recipe, "axis.roles=3")  # nothing was sampled yet
    write_jsonl(run.rollouts_path, [])
    # the batches of an extraction are counted, so their size may not change within one
    for override in ("axis.roles=3", "axis.sampling.batch_size=2"):
        with pytest.raises(UserError, match="stage axis is begun there"):
            opened(recipe, override)
    assert opened(recipe, "floor.percentile=60").folder == run.folder
    # where the held-out roles alone are played, theirs are the rollouts
    run.rollouts_path.unlink()
    opened(recipe, "axis.roles=3")
    opened(recipe)
    write_jsonl(run.held_out_rollouts_path, [])
    with pytest.raises(UserError, match="stage axis is begun there") as caught:
        opened(recipe, "axis.roles=3")
    assert f"or delete {run.held_out_rollouts_path.parent} to begin" in caught.value.remedy


def test_a_file_counts_by_its_content(recipe: Path, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "Hail!"}]}]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "mine.jsonl", rows)
    here, there = (f"data.benign_file={tmp_path}/{name}/mine.jsonl" for name in ("here", "there"))
    run = opened(recipe, here)
    made(run, "axis", "floor", "train")
    assert opened(recipe, there).folder == run.folder  # a moved project
    write_jsonl(tmp_path / "there" / "mine.jsonl", rows * 2)
    with pytest.raises(UserError, match=r"data\.benign_file was 'mine\.jsonl \("):
        opened(recipe, there)


def as_before(run: Run) -> None:
    """The folder as it was written before records said what a stage was made from."""
    marker = read_json(run.folder / "run.json")
    write_json(
        run.folder / "run.json", {"recipe_hash": "0" * 16, **{k: v for k, v in marker.items() if k != "changes"}}
    )
    for name in ("axis", "floor"):
        write_json(
            run.folder / "stages" / f"{name}.json",
            {"key": "0" * 16, "seconds": 1.0, "finished": "", "facts": {"old": name}},
        )
    (run.folder / "checkpoints").mkdir()
    write_json(run.folder / "checkpoints" / "spread.json", {"rows": 8, "processes": 1})


def test_a_folder_of_an_earlier_version_opens_where_its_sections_agree(recipe: Path) -> None:
    run = opened(recipe)
    as_before(run)
    again = opened(recipe)
    assert again.stage("axis", again.inputs("axis"), dict) == {"old": "axis"}
    for override, said in (("axis.roles=3", "stage axis is done"), ("train.learning_rate=0.5", "stage train is begun")):
        with pytest.raises(UserError, match=said):
            opened(recipe, override)
    shutil.rmtree(run.folder / "checkpoints")
    moved_on = opened(recipe, "train.learning_rate=0.5")  # from here on the folder's recipe is another
    with pytest.raises(UserError, match=r"axis\.roles was 2"):
        opened(recipe, "axis.roles=3")
    assert moved_on.stage("floor", moved_on.inputs("floor"), dict) == {"old": "floor"}
    assert read_json(run.folder / "stages" / "axis.json")["inputs"] == run.inputs("axis")


def test_a_key_that_is_new_to_the_schema_counts_as_having_had_its_default(recipe: Path) -> None:
    inputs = opened(recipe).inputs("train")
    before = {key: value for key, value in inputs.items() if key not in ("axis.min_per_role", "train.optim")}
    # a library's key has no default of ours: not set is not the same
    assert [key for key, _, _ in differences(before, inputs)] == ["train.optim"]
    assert [key for key, _, _ in differences(before, {**inputs, "axis.min_per_role": 2})] == [
        "axis.min_per_role",
        "train.optim",
    ]


def test_a_key_that_has_left_the_schema_counts_where_it_said_another_thing(recipe: Path) -> None:
    inputs = opened(recipe).inputs("train")
    assert not differences({**inputs, **{key: gone.now for key, gone in GONE.items()}}, inputs)
    assert differences({**inputs, "method.floor_shape": "huber"}, inputs) == [("method.floor_shape", "huber", NOT_SET)]


def test_a_floor_that_was_allowed_never_to_fire_goes_on_where_any_firing_is_enough(recipe: Path) -> None:
    inputs = opened(recipe, "floor.min_firing=0").inputs("floor")
    assert not differences({**inputs, "floor.min_firing": 0.15, "floor.allow_inert": True}, inputs)
    stricter = {**inputs, "floor.min_firing": 0.15}
    assert [key for key, _, _ in differences({**stricter, "floor.allow_inert": True}, stricter)] == ["floor.min_firing"]


def test_what_no_recipe_can_say_any_more_is_not_to_be_set_back(recipe: Path) -> None:
    run = opened(recipe)
    run.record("train", {**run.inputs("train"), "method.floor_shape": "huber"}, {}, seconds=0.0)
    with pytest.raises(UserError, match="floor_shape was 'huber'") as caught:
        opened(recipe)
    assert caught.value.remedy.startswith("choose another --output-dir")


def test_only_the_first_process_writes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(recipe)
    made(run, "axis")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    monkeypatch.setenv("RANK", "1")
    assert opened(recipe, "train.optim=sgd").folder == run.folder
    with pytest.raises(UserError, match="another recipe"):
        opened(recipe, "axis.roles=3")
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_what_a_judge_costs_is_no_part_of_what_it_says(recipe: Path) -> None:
    judge = "{endpoint: 'http://localhost/v1', model: m, timeout: %d}"
    first, later = (load_recipe(recipe, [f"axis.judge={judge % seconds}"]).resolved for seconds in (5, 90))
    assert stage_inputs(first, "axis") == stage_inputs(later, "axis")
    other = load_recipe(recipe, ["axis.judge={endpoint: 'http://localhost/v1', model: other}"]).resolved
    assert [key for key, _, _ in differences(stage_inputs(first, "axis"), stage_inputs(other, "axis"))] == [
        "axis.judge.model"
    ]


def test_the_lists_name_keys_that_the_libraries_have() -> None:
    from trl import DPOConfig, GRPOConfig, SFTConfig

    known = {field.name for owner in (SFTConfig, GRPOConfig, DPOConfig) for field in dataclasses.fields(owner)}
    assert not NO_PART_OF_TRAINING - known
    for key in (
        "learning_rate",
        "seed",
        "bf16",
        "optim",
        "max_length",
        "beta",
        "num_generations",
        "warmup_steps",
        "use_vllm",
    ):
        assert key in known - NO_PART_OF_TRAINING


def test_the_fingerprint_of_inputs_is_of_what_json_keeps(recipe: Path) -> None:
    inputs = opened(recipe).inputs("train")
    assert fingerprint(json.loads(json.dumps(inputs))) == fingerprint(inputs)
