"""Inputs that nobody would write on purpose, and that people have all the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, build_floor, build_model, build_tokenizer, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from trimtab.axis import Floor
from trimtab.axis.adapter_files import check_adapter_files, load_adapter
from trimtab.axis.chat import ChatFormat
from trimtab.axis.compass import project_command
from trimtab.axis.errors import UserError
from trimtab.axis.files import load_tensors, read_json, save_tensors
from trimtab.axis.instruments import load_instrument
from trimtab.axis.transcripts import read_talks, talk_of
from trimtab.recipes.faults import RecipeError
from trimtab.recipes.loader import load_recipe
from trimtab.train.identity import stage_inputs


@pytest.mark.parametrize("said", ["message['content']|e", "message['content'][:40]", "message['content']|lower"])
def test_template_that_changes_what_is_said_is_told(said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    ChatFormat(build_tokenizer(CHATML.replace("message['content']", said))).tell()
    assert "changes or shortens what is said" in caplog.text
    caplog.clear()
    ChatFormat(build_tokenizer()).tell()
    assert not caplog.text


def test_blank_part_of_a_row_leaves_no_blank_lines() -> None:
    for row in ({"instruction": "", "input": "Hi"}, {"instruction": "Hi", "input": "  ", "output": "Ho"}):
        assert talk_of(row).messages[0] == {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("tensor", [torch.eye(4).to_sparse(), torch.zeros(4, 4, device="meta")])
def test_tensors_without_plain_values_are_refused(tensor: Any, tmp_path: Path) -> None:
    torch.save({"axis": tensor}, tmp_path / "axis.pt")
    with pytest.raises(UserError, match="sparse, or has no values"):
        load_instrument(tmp_path / "axis.pt")


def test_weights_given_as_a_floor_are_no_damaged_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not of trimtab"):
        load_instrument(tmp_path / "model.safetensors")


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    get_peft_model(build_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"), [("rank_pattern", [1]), ("alpha_pattern", "x"), ("lora_alpha", "16"), ("target_modules", "([")]
)
def test_odd_adapter_config_is_the_users(key: str, value: Any, untrained: Path) -> None:
    path = untrained / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    def take() -> None:
        check_adapter_files(untrained)
        load_adapter(build_model("llama"), untrained)

    with pytest.raises(UserError):
        take()


def test_adapter_that_changes_nothing_is_told(untrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    check_adapter_files(untrained)
    assert "changes nothing" in caplog.text


def test_folder_of_role_vectors_is_an_axis_path(tmp_path: Path) -> None:
    folder = tmp_path / "role_vectors"
    folder.mkdir()
    torch.save(torch.randn(4, 32), folder / "pirate.pt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{name: {tmp_path}}}\naxis: {{path: {folder}}}\ntrain: {{max_steps: 1}}\n")
    loaded = load_recipe(recipe)
    assert loaded.recipe.axis.path == str(folder)
    before = stage_inputs(loaded.resolved, "axis")
    torch.save(torch.randn(4, 32), folder / "pirate.pt")
    assert stage_inputs(loaded.resolved, "axis")["axis.path"] != before["axis.path"]


def test_project_tells_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.axis.models.load_model", lambda *_: pytest.fail("weights are loaded"))
    model = save_model(tmp_path / "model")
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]))
    floor, axis = tmp_path / "floor.safetensors", tmp_path / "axis.pt"
    build_floor().save(floor)
    torch.save(torch.randn(4, 32), axis)
    with pytest.raises(UserError, match="an axis alone"):
        project_command(str(model), axis, talk, capped=True)
    with pytest.raises(UserError, match="this is a folder"):
        project_command(str(model), floor, talk, json=tmp_path)


def test_a_file_that_says_another_sign_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "floor.safetensors"
    build_floor().save(path)
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "sign": "+ is role"})
    with pytest.raises(UserError, match="its sign is"):
        Floor.load(path)


def test_what_is_no_plain_file_is_not_read() -> None:
    with pytest.raises(UserError, match="no plain file"):
        read_json("/dev/zero")


def test_one_row_of_preferences_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"chosen": said, "rejected": said}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        read_talks(str(path), lambda row, talk: talk)


def test_fp16_on_a_cpu_is_told() -> None:
    with pytest.raises(RecipeError, match="no float16 training"):
        load_recipe("smollm2-135m/sft", ["model.device=cpu", "train.fp16=true"])
