"""Further fine-tuning: which rows, from which weights, and what it leaves of them. The command is tested in test_subject."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_model, build_tokenizer, save_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_recipe import largest_difference, write_recipe
from transformers import AutoModelForCausalLM

from trimtab.axis.chat import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.models import Loaded
from trimtab.eval.stages import _subjects
from trimtab.eval.weights import open_subjects
from trimtab.recipes import data
from trimtab.recipes.loader import RecipeError, load_recipe
from trimtab.recipes.schema import FurtherTuning
from trimtab.train.further import Plan, _tokens, rows_of, train_further
from trimtab.train.run import Run, open_run

ANSWER = [{"role": "assistant", "content": "Aye, captain!"}]


def test_a_bare_name_is_the_shipped_one() -> None:
    benign, long, persona = (FurtherTuning.model_validate(name) for name in ("benign", "long", "persona"))
    assert (benign.rows, benign.epochs, benign.adversarial) == (len(data.benign_answers()), 1, False)
    assert (long.rows, long.epochs, long.adversarial) == (benign.rows, 5, False)
    assert (persona.rows, persona.epochs, persona.adversarial) == (32, 4, True)
    assert FurtherTuning.model_validate({"name": "persona", "epochs": 9}).epochs == 9
    with pytest.raises(ValueError, match="file is missing"):
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
        save_model(found / name)
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft: Any = get_peft_model(build_model("llama", max_position_embeddings=2048), config)
    peft.save_pretrained(found / "adapter")
    peft.merge_and_unload().save_pretrained(found / "whole")
    return found


def make_run(folder: Path, place: Path, durability: list[Any], **section: Any) -> Run:
    place.mkdir(exist_ok=True)
    path = write_recipe(place / "tiny.yaml", folder / "base")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**content, "eval": {"durability": durability, **section}}), encoding="utf-8")
    return open_run(load_recipe(path), output_dir=str(place / "run"))


def test_faults_are_told_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="share a name"):
        make_run(folder, tmp_path, ["benign", "benign"])
    for entry, key in (
        ({"name": "benign", "epoch": 2}, r"eval\.durability\.0\.epoch: unknown key.*\n.*epochs"),
        (3, r"eval\.durability\.0: expected a section"),
        ({"name": "A.b", "file": "x"}, r"eval\.durability\.0\.name"),
        ("mine", r"eval\.durability\.0\.file: file is missing"),
        ({"file": "x"}, r"eval\.durability\.0\.name: is missing"),
    ):
        with pytest.raises(RecipeError, match=key):
            make_run(folder, tmp_path, [entry])
    with pytest.raises(RecipeError, match="no such file"):
        make_run(folder, tmp_path, [{"name": "mine", "file": "nowhere.jsonl"}])
    run = make_run(folder, tmp_path, ["benign", "persona"])
    with pytest.raises(UserError, match="'mine'"):
        train_further(run, "mine", "tuned")
    with pytest.raises(UserError, match="there is no tuned adapter"):
        train_further(run, "benign", "tuned")
    shutil.copytree(folder / "adapter", run.variant(control=False).adapter)
    with pytest.raises(UserError, match="no rollouts behind the axis"):
        train_further(run, "persona", "tuned")


def test_rows_of_personas_and_of_files(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "rows.jsonl"
    user = {"role": "user", "content": "Who goes there?"}
    write_jsonl(given, [
        {"messages": [user, *ANSWER]},
        {"prompt": [user], "completion": ANSWER},
        {"prompt": user["content"], "completion": "Aye, captain!"},
        {"conversations": [{"from": "human", "value": user["content"]}, {"from": "gpt", "value": "Aye, captain!"}]},
        {"role": "pirate", "prompt": [user], "completion": ANSWER, "ended": False},
    ])  # fmt: skip
    tunings = [{"name": "mine", "file": "rows.jsonl"}, {"name": "persona", "rows": 3}, "benign", "long"]
    run = make_run(folder, tmp_path, tunings)
    mine, persona, benign, long = run.recipe.eval.durability
    assert len(rows_of(run, long)) == 214 and rows_of(run, long) == rows_of(run, benign)
    whole = {"prompt": [user], "completion": ANSWER, "ended": True}
    assert rows_of(run, mine) == [whole] * 4 + [{**whole, "ended": False}], "an answer that was cut has no end to learn"
    run.rollouts_path.parent.mkdir()
    names = [data.roles("train")[0].name, "default", data.roles("held_out")[0].name]
    write_jsonl(run.rollouts_path, [
        {"role": names[i % 3], "prompt": [{"role": "user", "content": str(i)}], "completion": ANSWER, "ended": False}
        for i in range(30)
    ])  # fmt: skip
    rows = rows_of(run, persona)
    # evenly over the rollouts of training roles, and of those alone
    assert [row["prompt"][0]["content"] for row in rows] == ["0", "9", "18"]
    for broken in (
        {"messages": [user]},
        {"prompt": "x"},
        {"messages": [*ANSWER, user]},
        {"prompt": "x", "completion": " "},
    ):
        write_jsonl(given, [{"messages": [user, *ANSWER]}, broken])
        with pytest.raises(UserError, match="line 2"):
            rows_of(run, mine)


def test_a_conversation_keeps_its_answer_and_loses_its_oldest_turns(caplog: pytest.LogCaptureFixture) -> None:
    form = ChatFormat(build_tokenizer())
    user = {"role": "user", "content": "Who goes there?"}
    last = [*form.prompt_ids([user]), *form.answer_ids("Aye, captain!"), form.end_token]
    rows = [{"prompt": [user, *ANSWER, user], "completion": ANSWER, "ended": True}]
    with caplog.at_level("INFO", "trimtab"):
        assert _tokens(form, rows, len(last))["input_ids"] == [last]
    assert "1 of 1 rows are without their oldest turns" in caplog.text
    # an answer that the last turn leaves no room for is told, and not taught to end where it was cut
    assert _tokens(form, rows, len(last) - 1)["labels"][0][-1] != form.end_token
    assert "1 of 1 rows lose the end of their answer" in caplog.text


def test_an_adapter_goes_on_and_whole_weights_get_one(folder: Path, tmp_path: Path) -> None:
    """From the adapter itself, the untouched base, and whole weights; the sources stay as they were."""
    rows = [{"messages": [{"role": "user", "content": f"Hail {i}!"}, *ANSWER]} for i in range(7)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    rate = 0.02
    tuning = {"name": "mine", "file": str(tmp_path / "rows.jsonl"), "epochs": 6, "batch_size": 3, "learning_rate": rate}
    run = make_run(folder, tmp_path, [tuning], tuned=str(folder / "adapter"))
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    went_on = train_further(run, "mine", "tuned", quiet=True)
    fresh = train_further(run, "mine", "base", quiet=True)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    source = load_file(folder / "adapter" / "adapter_model.safetensors")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (went_on, fresh))
    assert one.keys() == other.keys() == source.keys()
    facts = json.loads((run.folder / "stages" / "durability_tuned_mine.json").read_text(encoding="utf-8"))["facts"]
    # three steps an epoch, the last of one row: six whole epochs
    assert (facts["steps"], facts["rows"], facts["rows_a_step"]) == (18, 7, 3)
    # Adam moves a number by about the rate a step: one is the source that was moved, the other began at a B of zeros, though
    # the adapter's own config says otherwise
    assert 0 < largest_difference(one, source) < 18 * rate * 1.5
    zeros = {name: tensor for name, tensor in other.items() if "lora_B" in name}
    assert zeros and all(float(tensor.abs().max()) < 18 * rate * 1.5 for tensor in zeros.values())
    assert any(float(source[name].abs().max()) > 18 * rate * 1.5 for name in zeros)
    losses = [row["loss"] for row in read_jsonl(run.further("tuned", "mine").metrics)]
    assert losses[-1] < losses[0]

    write_jsonl(tmp_path / "rows.jsonl", rows[:5])
    with pytest.raises(UserError, match="begun from other weights or rows"):
        train_further(run, "mine", "tuned", quiet=True)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert train_further(run, "mine", "tuned", quiet=True) == went_on  # done already

    upon = make_run(folder, tmp_path / "second", [tuning], tuned=str(folder / "whole"))
    for start in ("tuned", "base"):
        train_further(upon, "mine", start, quiet=True)
    loaded = Loaded(build_model("llama", max_position_embeddings=2048), build_tokenizer(), {})
    weights = open_subjects(upon.recipe.model, loaded, _subjects(upon), ["tuned-after-mine"])
    ids = torch.arange(1, 9)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    def expected(base: Path, start: str | None) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if start is not None:
            model = PeftModel.from_pretrained(model, str(upon.further(start, "mine").adapter))
        return logits(model.eval())

    for name, reference in {
        "base": expected(folder / "base", None),
        "tuned": expected(folder / "whole", None),
        "tuned-after-mine": expected(folder / "whole", "tuned"),
        "base-after-mine": expected(folder / "base", "base"),
    }.items():
        with weights[name]() as model:
            assert torch.allclose(logits(model), reference, atol=1e-4), name
    assert not torch.allclose(expected(folder / "whole", "tuned"), expected(folder / "base", "base"), atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "batch", "ranks", "own", "plan"),
    [
        (214, 16, 1, 16, (16, 1, 14)),  # the shipped benign rows
        (20, 16, 1, 4, (4, 4, 8)),  # forwards no larger than the recipe's own; four epochs of two steps
        (5, 16, 2, 8, (3, 1, 4)),
        (32, 8, 3, 8, (3, 1, 16)),
    ],
)
def test_epochs_are_whole(
    rows: int, batch: int, ranks: int, own: int, plan: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    epochs = 1 if rows == 214 else 4
    tuning = FurtherTuning(name="benign", batch_size=batch, epochs=epochs)
    found = Plan.of(tuning, rows, {"per_device_train_batch_size": own})
    assert (found.rows_of_a_forward, found.accumulation, found.steps) == plan
    assert found.steps % epochs == 0 and (found.steps // epochs) * found.rows_a_step >= rows
