"""Durability runs: which rows, from which weights, and what it leaves of them. The command is tested in test_subject."""

from __future__ import annotations

import dataclasses
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
from tiny_recipe import write_recipe
from transformers import AutoModelForCausalLM

from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.models import Loaded
from trimtab.eval.answers.subjects import subjects_of
from trimtab.eval.answers.weights import open_subjects
from trimtab.pipeline.durability_rows import rows_of
from trimtab.pipeline.run import Run, open_run
from trimtab.pipeline.subject import Subject, tuned_subject
from trimtab.recipes import data
from trimtab.recipes.loader import RecipeError, load_recipe
from trimtab.recipes.schema import DurabilityRun
from trimtab.train.durability import (
    Plan,
    _tokens,
    build_trainer,
    fresh_adapter,
    train_durability,
    training_arguments,
)

ANSWER = [{"role": "assistant", "content": "Aye, captain!"}]


def test_a_bare_name_is_the_shipped_one() -> None:
    benign, long, persona = (DurabilityRun.model_validate(name) for name in ("benign", "long", "persona"))
    assert (benign.rows, benign.epochs, benign.adversarial) == (len(data.benign_answers()), 1, False)
    assert (long.rows, long.epochs, long.adversarial) == (benign.rows, 5, False)
    assert (persona.rows, persona.epochs, persona.adversarial) == (32, 4, True)
    assert DurabilityRun.model_validate({"name": "persona", "epochs": 9}).epochs == 9
    with pytest.raises(ValueError, match="file is missing"):
        DurabilityRun.model_validate("mine")


def test_every_training_prompt_has_a_written_answer() -> None:
    pairs = data.benign_answers()
    assert len({prompt for prompt, _ in pairs}) == len(pairs) == len(data.benign_prompts("train"))
    assert all(answer.strip() == answer and answer for _, answer in pairs)
    assert not {prompt for prompt, _ in pairs} & set(data.benign_prompts("dev") + data.benign_prompts("test"))


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
        train_durability(run, "mine", "tuned")
    with pytest.raises(UserError, match="there is no tuned adapter"):
        train_durability(run, "benign", "tuned")
    shutil.copytree(folder / "adapter", run.variant(control=False).adapter)
    with pytest.raises(UserError, match="no rollouts behind the axis"):
        train_durability(run, "persona", "tuned")


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
    names = [data.roles("train")[0].name, "default", data.roles("dev")[0].name]
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


@pytest.mark.parametrize("tuned", ["adapter", "whole"])
def test_both_starts_get_the_same_fresh_adapter(folder: Path, tmp_path: Path, tuned: str) -> None:
    """Upon the tuned weights and upon the base: what is compared differs in the weights alone."""
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Hail!"}, *ANSWER]}])
    tuning = {"name": "mine", "file": str(tmp_path / "rows.jsonl"), "epochs": 1, "batch_size": 1}
    run = make_run(folder, tmp_path, [tuning], tuned=str(folder / tuned))
    (entry,), subject = run.recipe.eval.durability, tuned_subject(run)
    rows, ids = rows_of(run, entry), torch.arange(3, 20)[None]
    plain: Any = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    adapters, wanted = [], {}
    with torch.no_grad():
        wanted["base"] = plain(input_ids=ids).logits
        wanted["tuned"] = PeftModel.from_pretrained(plain, str(folder / "adapter")).eval()(input_ids=ids).logits
    for start in ("tuned", "base"):
        variant = run.durability(start, "mine")
        arguments = training_arguments(run, variant, entry, Plan.of(entry, len(rows), run.recipe.train), quiet=True)
        model = build_trainer(run, arguments, variant, rows, subject, start).model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, wanted[start], atol=1e-4, rtol=1e-4)
        adapters.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    one, other = adapters
    assert one.keys() == other.keys() and any("lora_A" in name for name in one)
    for name, value in one.items():
        assert value.equal(other[name]) and ("lora_B" not in name or not value.any()), name


def test_a_further_fine_tuning_keeps_the_base_too(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Hail!"}, *ANSWER]}])
    run = make_run(
        folder, tmp_path, [{"name": "mine", "file": str(tmp_path / "rows.jsonl")}], tuned=str(folder / "whole")
    )
    lora = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}  # which a recipe may not say
    run = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"lora": lora}))
    with pytest.raises(UserError, match="pissa rewrites"):
        train_durability(run, "mine", "base", quiet=True)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (
            {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj"]},
            {"r": 3, "lora_alpha": 5, "use_dora": True},
        ),
        # nothing on embedding and head, no whole modules, and no initialisation that looks at weights
        (
            {
                "r": 3,
                "target_modules": ["q_proj", "embed_tokens"],
                "modules_to_save": ["lm_head"],
                "init_lora_weights": "pissa",
            },
            {"r": 3, "target_modules": {"q_proj"}, "modules_to_save": None, "init_lora_weights": True},
        ),
    ],
)
def test_a_fresh_adapter_has_the_shape_of_the_tuned_one(
    tmp_path: Path, options: dict[str, Any], shape: dict[str, Any]
) -> None:
    get_peft_model(build_model("llama"), LoraConfig(**options)).save_pretrained(tmp_path)
    found = fresh_adapter(build_model("llama"), Subject(str(tmp_path), whole=False), {})
    assert {name: getattr(found, name) for name in shape} == shape
    assert fresh_adapter(build_model("llama"), Subject("m", whole=True), {"r": 5}).r == 5


@pytest.mark.slow
def test_an_adapter_is_merged_and_whole_weights_are_taken(folder: Path, tmp_path: Path) -> None:
    """From the tuned weights, the untouched base, and whole weights; the sources stay as they were."""
    rows = [{"messages": [{"role": "user", "content": f"Hail {i}!"}, *ANSWER]} for i in range(7)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    rate = 0.02
    tuning = {"name": "mine", "file": str(tmp_path / "rows.jsonl"), "epochs": 6, "batch_size": 3, "learning_rate": rate}
    run = make_run(folder, tmp_path, [tuning], tuned=str(folder / "adapter"))
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    upon_tuned = train_durability(run, "mine", "tuned", quiet=True)
    upon_base = train_durability(run, "mine", "base", quiet=True)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    source = load_file(folder / "adapter" / "adapter_model.safetensors")
    one, other = (load_file(path / "adapter_model.safetensors") for path in (upon_tuned, upon_base))
    assert one.keys() == other.keys() == source.keys()
    facts = json.loads((run.folder / "stages" / "durability_tuned_mine.json").read_text(encoding="utf-8"))["facts"]
    # three steps an epoch, the last of one row: six whole epochs
    assert (facts["steps"], facts["rows"], facts["rows_a_step"]) == (18, 7, 3)
    # Adam moves a number by about the rate a step: both began at a B of zeros, the source's own is far from there
    for each in (one, other):
        moved = {name: float(tensor.abs().max()) for name, tensor in each.items() if "lora_B" in name}
        assert moved and all(0 < value < 18 * rate * 1.5 for value in moved.values())
    assert any(float(source[name].abs().max()) > 18 * rate * 1.5 for name in moved)
    losses = [row["loss"] for row in read_jsonl(run.durability("tuned", "mine").metrics)]
    assert losses[-1] < losses[0]

    write_jsonl(tmp_path / "rows.jsonl", rows[:5])
    with pytest.raises(UserError, match="begun from other weights or rows"):
        train_durability(run, "mine", "tuned", quiet=True)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert train_durability(run, "mine", "tuned", quiet=True) == upon_tuned  # done already

    second = make_run(folder, tmp_path / "second", [tuning], tuned=str(folder / "whole"))
    for start in ("tuned", "base"):
        train_durability(second, "mine", start, quiet=True)
    ids = torch.arange(1, 9)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    def expected(run: Run, base: Path, start: str | None) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if start is not None:
            model = PeftModel.from_pretrained(model, str(run.durability(start, "mine").adapter))
        return logits(model.eval())

    for each in (run, second):  # the same tuned weights, as an adapter and whole
        loaded = Loaded(build_model("llama", max_position_embeddings=2048), build_tokenizer(), {})
        weights = open_subjects(each.recipe.model, loaded, subjects_of(each), ["tuned-after-mine"])
        for name, reference in {
            "base": expected(each, folder / "base", None),
            "tuned": expected(each, folder / "whole", None),
            "tuned-after-mine": expected(each, folder / "whole", "tuned"),
            "base-after-mine": expected(each, folder / "base", "base"),
        }.items():
            with weights[name]() as model:
                assert torch.allclose(logits(model), reference, atol=1e-4), name
    assert not torch.allclose(
        expected(second, folder / "whole", "tuned"), expected(second, folder / "base", "base"), atol=1e-2
    )


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
    tuning = DurabilityRun(name="benign", batch_size=batch, epochs=epochs)
    found = Plan.of(tuning, rows, {"per_device_train_batch_size": own})
    assert (found.rows_of_a_forward, found.accumulation, found.steps) == plan
    assert found.steps % epochs == 0 and (found.steps // epochs) * found.rows_a_step >= rows
