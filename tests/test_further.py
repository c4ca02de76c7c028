"""Further fine-tuning: which rows, from which weights, and what it leaves of them. The command is tested in test_subject."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_recipe import largest_difference, write_recipe

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.models import Loaded
from trimtab.eval.stages import _open
from trimtab.eval.subject import find_subject
from trimtab.recipes import data
from trimtab.recipes.loader import RecipeError, load_recipe
from trimtab.recipes.schema import FurtherTuning
from trimtab.train.further import rows_of, train_further
from trimtab.train.run import Run, open_run

ANSWER = [{"role": "assistant", "content": "Aye, captain!"}]


def test_a_bare_name_is_the_shipped_one() -> None:
    benign, persona = (FurtherTuning.model_validate(name) for name in ("benign", "persona"))
    assert (benign.rows, benign.epochs, benign.adversarial) == (len(data.benign_answers()), 1, False)
    assert (persona.rows, persona.epochs, persona.adversarial) == (32, 4, True)
    assert FurtherTuning.model_validate({"name": "persona", "epochs": 9}).epochs == 9
    with pytest.raises(ValueError, match="give it a file of rows"):
        FurtherTuning.model_validate("mine")


def test_every_training_prompt_has_a_written_answer() -> None:
    pairs = data.benign_answers()
    assert len({prompt for prompt, _ in pairs}) == len(pairs) == len(data.benign_prompts("train"))
    assert all(answer.strip() == answer and answer for _, answer in pairs)
    assert not {prompt for prompt, _ in pairs} & set(data.benign_prompts("held_out"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, an adapter of it, and the same weights whole."""
    found = tmp_path_factory.mktemp("further")
    for name in ("base", "whole"):
        build_model("llama", max_position_embeddings=2048).save_pretrained(found / name)
        build_tokenizer().save_pretrained(found / name)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft: Any = get_peft_model(build_model("llama", max_position_embeddings=2048), config)
    peft.save_pretrained(found / "adapter")
    peft.merge_and_unload().save_pretrained(found / "whole")
    return found


def make_run(folder: Path, place: Path, durability: list[Any]) -> Run:
    place.mkdir(exist_ok=True)
    path = write_recipe(place / "tiny.yaml", folder / "base")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**content, "eval": {"durability": durability}}), encoding="utf-8")
    return open_run(load_recipe(path), output_dir=str(place / "run"))


def test_faults_are_told_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="share a name"):
        make_run(folder, tmp_path, ["benign", "benign"])
    with pytest.raises(RecipeError, match="no such file"):
        make_run(folder, tmp_path, [{"name": "mine", "file": "nowhere.jsonl"}])
    run = make_run(folder, tmp_path, ["benign", "persona"])
    with pytest.raises(UserError, match="'mine'"):
        train_further(run, "mine", "tuned")
    with pytest.raises(UserError, match="no adapter to go on from"):
        train_further(run, "benign", "tuned")
    with pytest.raises(UserError, match="no rollouts behind the axis"):
        train_further(run, "persona", "tuned", adapter=folder / "adapter")


def test_rows_of_personas_and_of_files(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "rows.jsonl"
    user = {"role": "user", "content": "Who goes there?"}
    write_jsonl(given, [{"messages": [user, *ANSWER]}, {"prompt": [user], "completion": ANSWER}])
    run = make_run(folder, tmp_path, [{"name": "mine", "file": "rows.jsonl"}, {"name": "persona", "rows": 3}])
    mine, persona = run.recipe.eval.durability
    assert rows_of(run, mine) == [{"prompt": [user], "completion": ANSWER, "ended": True}] * 2
    run.rollouts_path.parent.mkdir()
    names = [data.roles("train")[0].name, "default", data.roles("held_out")[0].name]
    write_jsonl(run.rollouts_path, [
        {"role": names[i % 3], "prompt": [{"role": "user", "content": str(i)}], "completion": ANSWER, "ended": False}
        for i in range(30)
    ])  # fmt: skip
    rows = rows_of(run, persona)
    # evenly over the rollouts of training roles, and of those alone
    assert [row["prompt"][0]["content"] for row in rows] == ["0", "9", "18"]
    for broken in ({"messages": [user]}, {"prompt": "x", "completion": ANSWER}, {"messages": [*ANSWER, user]}):
        write_jsonl(given, [{"messages": [user, *ANSWER]}, broken])
        with pytest.raises(UserError, match="row 2"):
            rows_of(run, mine)


def test_an_adapter_goes_on_and_whole_weights_get_one(folder: Path, tmp_path: Path) -> None:
    """From the adapter itself, the untouched base, and whole weights; the sources stay as they were."""
    rows = [{"messages": [{"role": "user", "content": f"Hail {i}!"}, *ANSWER]} for i in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    tuning = {"name": "mine", "file": str(tmp_path / "rows.jsonl"), "epochs": 8, "batch_size": 3, "learning_rate": 0.02}
    run = make_run(folder, tmp_path, [tuning])
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    went_on = train_further(run, "mine", "tuned", adapter=folder / "adapter", quiet=True)
    fresh = train_further(run, "mine", "base", adapter=folder / "adapter", quiet=True)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    source = load_file(folder / "adapter" / "adapter_model.safetensors")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (went_on, fresh))
    assert one.keys() == other.keys() == source.keys()
    # steps of at most the learning rate each from the adapter itself; the base's began at a B of zeros
    assert 0 < largest_difference(one, source) < 16 * 0.02 * 1.5
    assert largest_difference(other, source) > largest_difference(one, source)
    record = json.loads((run.folder / "stages" / "durability_tuned_mine.json").read_text(encoding="utf-8"))
    assert record["facts"]["steps"] == 16
    losses = [row["loss"] for row in read_jsonl(run.further("tuned", "mine").metrics)]
    assert losses[-1] < losses[0]

    upon = make_run(folder, tmp_path / "second", [tuning])
    train_further(upon, "mine", "tuned", model=str(folder / "whole"), quiet=True)
    train_further(upon, "mine", "base", model=str(folder / "whole"), quiet=True)
    loaded = Loaded(build_model("llama", max_position_embeddings=2048), build_tokenizer(), {})
    subjects = {
        "tuned": find_subject(str(folder / "whole")),
        **{
            f"{start}-after-mine": find_subject(str(upon.further(start, "mine").adapter)) for start in ("tuned", "base")
        },
    }
    weights = _open(upon, loaded, subjects)
    logits = {}
    for name in ("base", "tuned", "tuned-after-mine", "base-after-mine"):
        with weights[name]() as model, torch.no_grad():
            logits[name] = model(input_ids=torch.arange(1, 9)[None]).logits
    assert len({tuple(found.flatten().tolist()) for found in logits.values()}) == 4
    reference = build_model("llama", max_position_embeddings=2048).from_pretrained(folder / "whole")
    with torch.no_grad():
        assert torch.allclose(logits["tuned"], reference(input_ids=torch.arange(1, 9)[None]).logits, atol=1e-5)
