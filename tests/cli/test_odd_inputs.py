"""Inputs that nobody would write on purpose, and that people have all the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CHATML, build_floor, build_model, build_tokenizer, save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_recipe import write_recipe

from trimtab.axis import Floor
from trimtab.axis.adapter_files import check_adapter_files, load_adapter
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.files import load_tensors, read_json, save_tensors
from trimtab.axis.instruments import load_instrument
from trimtab.axis.transcripts import read_talks, talk_of
from trimtab.cli.compass import project_command
from trimtab.cli.main import main
from trimtab.pipeline.identity import stage_inputs
from trimtab.recipes.faults import RecipeError
from trimtab.recipes.loader import load_recipe
from trimtab.recipes.schema import deciding


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
    ("key", "value"),
    [
        ("rank_pattern", [1]), ("alpha_pattern", "x"), ("lora_alpha", "16"), ("lora_alpha", float("nan")), ("r", True),
        ("target_modules", "(["), ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "PISSA_niter_4"), ("init_lora_weights", "nonsense"), ("init_lora_weights", 3),
    ],
)  # fmt: skip
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of 2,048 positions, its recipes, and an adapter."""
    found = tmp_path_factory.mktemp("odd")
    save_model(found / "model")
    for method in ("sft", "grpo"):
        write_recipe(found / f"{method}.yaml", found / "model", method)
    get_peft_model(build_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(found / "adapter")
    (found / "long.jsonl").write_text(json.dumps({"prompt": "word " * 9000}), encoding="utf-8")
    return found


MINE = ["data.drift_prompts=0", "data.conversation_turns=0"]
ODD = {
    "code of PEFT's that breaks": ("sft", ["lora.runtime_config={}"], "lora.runtime_config"),
    "no expression": ("sft", ["lora.exclude_modules=(["], "lora.exclude_modules: not a regular expression"),
    "no expression of a pattern": ("sft", ['lora.rank_pattern={"([": 3}'], "lora.rank_pattern: not a regular expression"),
    "a rank of 0": ("sft", ["lora.rank_pattern={q_proj: 0}"], "lora.rank_pattern: must be a number above 0"),
    "a scale below 0": ("sft", ["lora.alpha_pattern={q_proj: -1}"], "lora.alpha_pattern: must be a number above 0"),
    "a token too far": ("sft", ["lora.trainable_token_indices=[999]"], "there is no token 999: the model's embedding has 300"),
    "a token before the first": ("sft", ["lora.trainable_token_indices=[-1]"], "there is no token -1"),
    "a revision of a folder": ("sft", ["model.revision=v9"], "model.revision: has no effect"),
    "answers beyond the context": ("sft", ["axis.sampling={max_new_tokens: 100000}"], "no room in the model's context of 2048"),
    "a row beyond the context": (
        "sft", ["data.drift_file=PLACE/long.jsonl", *MINE, "train.max_length=null"], "the model's context holds 2048",
    ),
    "a benign row beyond it": (
        "grpo", ["data.benign_file=PLACE/long.jsonl"], "data.benign_file",
    ),
    "a replay beyond it": (
        "sft", ["eval.conversations_file=PLACE/long.jsonl", "eval.conversations=1"],
        "eval.sampling.max_new_tokens: the conversation",
    ),
    "a cap for an axis": ("sft", ["axis.path=PLACE/capping_config.pt"], "it holds floors, and no axis"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", list(ODD))
def test_odd_recipe_is_refused_with_its_key(what: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, given, said = ODD[what]
    vectors = {"v": {"vector": torch.randn(32), "layer": 1}}
    entry = {"id": "one", "interventions": [{"vector": "v", "cap": 0.1}]}
    torch.save({"vectors": vectors, "experiments": [entry]}, place / "capping_config.pt")
    words = [word.replace("PLACE", str(place)) for word in given]
    assert main(["check", str(place / f"{method}.yaml"), *words]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "remedy" in told


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine is a Mac")
def test_a_mac_s_gpu_is_missed_where_there_is_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "sft.yaml"), "--output-dir", str(place / "mac"), "model.device=mps"]
    assert main(["run", *words]) == 2 and "model.device: mps is asked for" in capsys.readouterr().err


@pytest.mark.slow
def test_finished_weights_are_evaluated_and_never_trained(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab.train.sft import main as train

    words = [str(place / "sft.yaml"), "--output-dir", str(place / "run"), f"eval.tuned={place / 'adapter'}", "--quiet"]
    for command in ("train", "rollouts"):
        assert main([command, *words]) == 2
        assert "eval.tuned: nothing is trained" in " ".join(capsys.readouterr().err.split())
    assert train(["--config", words[0], "--output_dir", words[2], words[3]]) == 2
    assert "nothing is trained" in capsys.readouterr().err
    content = yaml.safe_load((place / "sft.yaml").read_text(encoding="utf-8"))
    small = {
        "roles": 2,
        "questions": 1,
        "conversations": 0,
        "benign": 2,
        "professional": 0,
        "reextract_roles": 0,
        "benign_systems": 2,
        "lookalikes": 2,
    }
    content["eval"] = {**small, "capability": [], "tuned": str(place / "adapter"), "bootstrap": 200}
    (place / "tuned.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["run", str(place / "tuned.yaml"), "--output-dir", str(place / "whole"), "--quiet"]) == 0
    assert not (place / "whole" / "adapter").exists() and (place / "whole" / "report.html").exists()


def test_modules_that_are_excluded_are_not_missed(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    assert main(["check", str(place / "sft.yaml"), "lora.exclude_modules=[q_proj]"]) == 0
    assert "no adapted module" not in caplog.text


@pytest.mark.parametrize("given", ["tone=3", "chat_template=x"])
def test_what_is_given_to_a_template_is_blamed_by_its_option(
    given: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ tone + '' }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    build_floor().save(tmp_path / "floor.safetensors")
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]))
    words = ["project", "--model", str(model), "--floor", str(tmp_path / "floor.safetensors"), str(talk)]
    assert main([*words, "--chat-template-kwargs", given]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--chat-template-kwargs: with what is given to it ({given.partition('=')[0]})" in told
    assert main(words) == 2
    assert "--chat-template-kwargs" in capsys.readouterr().err


def test_a_judge_of_an_older_version_is_one_too() -> None:
    older = {"endpoint": "http://a/v1", "model": "j", "max_tokens": 9, "timeout": 3.0}
    assert deciding(older) == {"endpoint": "http://a/v1", "model": "j", "max_tokens": 9}
