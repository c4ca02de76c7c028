"""Adapters and models from elsewhere: those that fit are loaded, switched off, merged; the others are told, without weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_floor, build_model, build_tokenizer, save_model
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trimtab.axis import UserError
from trimtab.axis.adapter_files import SUPPORTED
from trimtab.axis.models import load_model
from trimtab.chat.arms import open_arms
from trimtab.cli.main import main
from trimtab.eval.answers import weights as weights_module
from trimtab.eval.answers.weights import open_subjects, open_weights
from trimtab.pipeline.subject import check_subject, find_subject
from trimtab.recipes.schema import ModelSection

IDS = torch.tensor([[5, 80, 120, 33, 7, 254]])
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 512}
TARGETS = ["q_proj", "v_proj", "down_proj"]
# What a kind needs beside its target modules, to fit a tiny model.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10}, "IA3": {"feedforward_modules": ["down_proj"]}, "VERA": {"r": 4}, "RANDLORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20}, "MISS": {"r": 8}, "VBLORA": {"vector_length": 8, "num_vectors": 8, "topk": 2},
    "C3A": {"block_size": 8}, "ROAD": {"group_size": 8}, "WAVEFT": {"n_frequency": 20}, "PSOFT": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 80]},
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save_adapter(folder: Path, base: Any = None, kind: str = "LORA", **options: Any) -> torch.Tensor:
    """Save an adapter that does something; returns what the model says with it."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        **{"task_type": "CAUSAL_LM", "target_modules": TARGETS, **NEEDS.get(kind, {}), **options}
    )
    model: Any = get_peft_model(build_model("llama", **SMALL) if base is None else base, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and a LoRA of it."""
    found = tmp_path_factory.mktemp("subjects")
    save_model(found / "base", **SMALL)
    save_adapter(found / "good", r=4)
    return found


@pytest.fixture
def section(place: Path) -> ModelSection:
    return ModelSection(name=str(place / "base"), dtype="float32", device="cpu")


# ---- what is loaded ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_every_supported_kind_is_told_from_its_base(
    kind: str, section: ModelSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged into a copy, and beside the base, switched on and off."""
    wanted, plain = save_adapter(tmp_path / "adapter", kind=kind), logits(build_model("llama", **SMALL))
    assert float((wanted - plain).abs().max()) > 0.01
    subject = find_subject(str(tmp_path / "adapter"))
    check_subject(section, subject)
    for copies in (True, False):
        monkeypatch.setattr(weights_module, "can_merge", lambda model, copies=copies: copies)
        opened = open_weights(build_model("llama", **SMALL), {"tuned": subject.folder})
        with opened["tuned"]() as model:
            torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
        with opened["base"]() as model:
            assert logits(model).equal(plain)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 80]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"use_dora": True, "use_rslora": True},
        {"init_lora_weights": "pissa"},
    ],
)
def test_embedding_and_head_in_one_are_merged_as_the_adapter_says(options: dict[str, Any], tmp_path: Path) -> None:
    """Each of the two gets what is its own, on disk too."""
    tied = {**SMALL, "tie_word_embeddings": True}
    wanted, plain = (
        save_adapter(tmp_path / "adapter", build_model("llama", **tied), r=4, **options),
        build_model("llama", **tied),
    )
    before = logits(plain)
    opened = open_weights(plain, {"tuned": tmp_path / "adapter"})
    with opened["tuned"]() as model:
        assert not isinstance(model, PeftModel)
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), wanted, atol=1e-4, rtol=1e-4)
    with opened["base"]() as model:
        assert logits(model).equal(before)


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}])
def test_an_adapter_that_changes_the_base_has_no_place_beside_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a copy it may be merged; switched off beside the base it would leave another one."""
    changes = {**SMALL, "attention_bias": True}
    wanted = save_adapter(tmp_path / "adapter", build_model("llama", **changes), **options)
    with open_weights(build_model("llama", **changes), {"tuned": tmp_path / "adapter"})["tuned"]() as model:
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(weights_module, "can_merge", lambda model: False)
    with pytest.raises(
        UserError, match=r"no longer the base: model\.layers\.0\.self_attn\.q_proj\.(weight|bias) has changed"
    ):
        open_weights(build_model("llama", **changes), {"tuned": tmp_path / "adapter"})


# ---- what is refused ----


def renamed(folder: Path, change: Callable[[str], str | None]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = {change(name): value for name, value in load_file(path).items()}
    save_file({name: value for name, value in weights.items() if name is not None}, path, metadata={"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def several(folder: Path) -> None:
    for name in ("second", "first"):
        shutil.copytree(folder, folder / name, ignore=shutil.ignore_patterns("first", "second"))
    (folder / "adapter_config.json").unlink()


def of(**changes: Any) -> Callable[[Path], None]:
    """The adapter of another model."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder)
        save_adapter(folder, build_model("llama", **{**SMALL, **changes}))

    return make


def resized(folder: Path) -> None:
    """As ``resize_token_embeddings`` and a LoRA after it are saved: with the embedding."""
    model = build_model("llama", **SMALL)
    model.resize_token_embeddings(301)
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.weight"] = model.get_input_embeddings().weight.detach()
    weights["base_model.model.lm_head.weight"] = model.get_output_embeddings().weight.detach()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def prefix(name: str) -> str:
    return name.replace("base_model.model.model.", "base_model.model.model.language_model.")


MISFITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "names of a multimodal one": (
        lambda f: renamed(f, prefix), r"12 of its weights have no place.*first is \S+language_model\.layers\.0.*12 places.*no",
    ),
    "names without PEFT's prefix": (lambda f: renamed(f, lambda n: n.removeprefix("base_model.model.")), "12 of its weights"),
    "half of the weights": (
        lambda f: renamed(f, lambda n: None if ".layers.1." in n else n),
        r"6 places of the model get no weight, the first is \S+layers\.1\.self_attn\.q_proj",
    ),
    "a weight too many": (lambda f: renamed(f, lambda n: n.replace("q_proj", "k_proj")), "4 of its weights.*4 places"),
    "more layers": (of(num_hidden_layers=3), r"6 of its weights have no place in the model, the first is \S+layers\.2\."),
    "fewer layers": (of(num_hidden_layers=1), r"6 places of the model get no weight, the first is \S+layers\.1\."),
    "another width": (of(hidden_size=64), r"lora_A\S* is \[8, 64\], and the model's \[8, 32\]"),
    "modules that are not there": (lambda f: configured(f, target_modules=["c_attn"]), "go on the base model: Target modules"),
    "a resized vocabulary": (resized, r"vocabulary of 301, and the base's embedding has 300 [\s\S]*token_embeddings\(301\)"),
    "another rank": (lambda f: configured(f, r=8), "has rank 4, and adapter_config.json says r: 8"),
    "not finite": (not_finite, r"layers\.0\S*lora_A\.weight is not finite"),
    "cut short": (truncated, "adapter_model.safetensors: .*not a readable safetensors file"),
    "only a pickle": (pickled, "no adapter_model.safetensors, only a pickle"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors\n"),
    "empty": (lambda f: renamed(f, lambda n: None), "holds no tensors"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text('{"r": 4,'), "adapter_config.json: not valid JSON"),
    "no kind": (lambda f: (f / "adapter_config.json").write_text('{"r": 4}'), "adapter_config.json: .*names no peft_type"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "adapter_config.json: .*names no peft_type"),
    "several in one folder": (several, r"adapters do below it: first, second\n.*such as \S+first"),
    "a kind that PEFT has not": (lambda f: configured(f, peft_type="MAGIC"), "adapters of kind MAGIC are not supported"),
    "X-LoRA": (lambda f: configured(f, peft_type="XLORA"), "adapters of kind XLORA are not supported"),
    "a classifier": (lambda f: configured(f, task_type="SEQ_CLS"), "for the task SEQ_CLS"),
    "activated LoRA": (lambda f: configured(f, alora_invocation_tokens=[5]), "alora_invocation_tokens is set"),
    "a base less a random part": (lambda f: configured(f, init_lora_weights="pissa_niter_4"), "drawn at random"),
    "replicated layers": (lambda f: configured(f, layer_replication=[[0, 2]]), "layer_replication is set"),
}  # fmt: skip
for _kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"):
    MISFITS[_kind.lower()] = (lambda f, kind=_kind: configured(f, peft_type=kind), f"a {_kind} adapter puts tokens")


@pytest.mark.parametrize("what", list(MISFITS))
def test_what_does_not_fit_is_told_without_loading_weights(what: str, place: Path, tmp_path: Path) -> None:
    make, said = MISFITS[what]
    shutil.copytree(place / "good", tmp_path / "adapter")
    shutil.copytree(
        place / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")
    )  # no weights at all
    make(tmp_path / "adapter")
    with pytest.raises(UserError, match=said) as caught:
        check_subject(ModelSection(name=str(tmp_path / "base")), find_subject(str(tmp_path / "adapter")))
    assert str(tmp_path / "adapter") in str(caught.value) and (what == "no JSON" or "eval.tuned" in str(caught.value))


@pytest.mark.parametrize("what", ["names of a multimodal one", "half of the weights", "a resized vocabulary"])
@pytest.mark.parametrize("copies", [True, False])
def test_weights_that_did_not_land_are_told_after_loading_too(
    what: str, copies: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = MISFITS[what]
    shutil.copytree(place / "good", tmp_path / "adapter")
    make(tmp_path / "adapter")
    monkeypatch.setattr(weights_module, "can_merge", lambda model: copies)
    with pytest.raises(UserError, match=said):
        open_weights(build_model("llama", **SMALL), {"tuned": tmp_path / "adapter"})


def test_the_commands_say_so_before_anything_is_sampled(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "good", tmp_path / "adapter")
    renamed(tmp_path / "adapter", prefix)
    for tuned, said in (
        (tmp_path / "adapter", "12 of its weights have no place"),
        (tmp_path / "nowhere", "no such folder"),
        ("smollm2-135", "neither an adapter nor a model"),
        ("someone/no-such-model", "neither an adapter nor a model"),
    ):
        arguments = [
            "eval",
            "--base",
            str(place / "base"),
            "--tuned",
            str(tuned),
            "--output-dir",
            str(tmp_path / "run"),
        ]
        assert main([*arguments, "model.device=cpu", "--quiet"]) == 2
        printed = capsys.readouterr().err
        assert said in printed and "--tuned" in printed and not (tmp_path / "run" / "axis").exists()
    build_floor((0, 1)).save(tmp_path / "floor.safetensors")
    monkeypatch.setattr("trimtab.chat.arms.load_recipe_model", pytest.fail)
    with pytest.raises(UserError, match="12 of its weights have no place"):
        open_arms(ModelSection(name=str(place / "base")), str(tmp_path / "adapter"), tmp_path / "floor.safetensors")


def test_another_base_and_an_unknown_key_are_warned_of(
    section: ModelSection,
    place: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    shutil.copytree(place / "good", tmp_path / "adapter")
    for named, warned in (("someone/other-7b", True), ("someone/base", False), (None, False)):
        caplog.clear()
        configured(tmp_path / "adapter", base_model_name_or_path=named)
        check_subject(section, find_subject(str(tmp_path / "adapter")))
        assert ("was trained upon someone/other-7b" in caplog.text) == warned
    configured(tmp_path / "adapter", of_the_future=True)
    check_subject(section, find_subject(str(tmp_path / "adapter")))
    assert "does not know of_the_future" in caplog.text


# ---- whole weights ----


def save_whole(folder: Path, rows: int, added: dict[str, str], **changes: Any) -> Path:
    """A tuned model whose vocabulary has grown, and an embedding of so many rows."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_special_tokens(added)
    model = build_model("llama", **{**SMALL, **changes})
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[300:] = 1.0
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", [301, 320])
def test_a_model_with_one_more_token_is_compared_over_the_tokens_of_both(
    rows: int, section: ModelSection, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    subject = find_subject(str(save_whole(tmp_path / "tuned", rows, {"pad_token": "<|pad|>"})))
    check_subject(section, subject)
    assert "1 tokens that the base has not (<|pad|>)" in caplog.text
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))[..., :300]
    opened = open_subjects(section, load_model(section.name, dtype="float32", device="cpu"), {"tuned": subject})
    with opened["tuned"]() as model:
        assert logits(model).equal(wanted)
    with opened["base"]() as model:
        assert logits(model).equal(logits(build_model("llama", **SMALL)))


def test_a_head_that_was_cut_to_the_tokenizer_is_as_wide_as_the_bases(tmp_path: Path) -> None:
    """Bases have rows without a token; ``resize_token_embeddings(len(tokenizer))`` takes them away."""
    base, tuned = (save_whole(tmp_path / name, rows, {}) for name, rows in (("base", 320), ("tuned", 300)))
    section, subject = ModelSection(name=str(base), dtype="float32", device="cpu"), find_subject(str(tuned))
    check_subject(section, subject)
    opened = open_subjects(section, load_model(str(base), dtype="float32", device="cpu"), {"tuned": subject})
    for name in ("base", "tuned"):
        with opened[name]() as model:
            assert logits(model).shape[-1] == 300


@pytest.mark.parametrize(
    ("rows", "added", "changes", "said"),
    [
        (301, {"eos_token": "<|stop|>"}, {}, "ends its answers with a token that the base has not"),
        (290, {}, {}, "the smaller of the two heads has 290 rows"),
        (300, {}, {"num_hidden_layers": 3}, "num_hidden_layers is 3, the base's 2"),
        (300, {}, {"hidden_size": 64}, "hidden_size is 64, the base's 32"),
    ],
)
def test_a_model_that_can_not_be_compared_is_told_without_its_weights(
    rows: int, added: dict[str, str], changes: dict[str, Any], said: str, section: ModelSection, tmp_path: Path
) -> None:
    folder = save_whole(tmp_path / "tuned", rows, added, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=said):
        check_subject(section, find_subject(str(folder)))


def test_other_tokens_and_no_tokenizer_are_told(section: ModelSection, tmp_path: Path) -> None:
    folder = save_whole(tmp_path / "tuned", 300, {})
    path = folder / "tokenizer.json"
    kept = path.read_text()
    content = json.loads(kept)
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (250, 251)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its vocabulary is not the base's: token"):
        check_subject(section, find_subject(str(folder)))
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"a tokenizer can't be loaded[\s\S]*save the tokenizer beside"):
        check_subject(section, find_subject(str(folder)))
