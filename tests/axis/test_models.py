"""A folder that is no model for trimtab is refused with fault and remedy, before its weights where it can be; no code runs."""

from __future__ import annotations

import builtins
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from safetensors.torch import load_file

from trimtab.axis import UserError
from trimtab.axis.models import choose_device, load_config, load_model, load_tokenizer, meta_model, model_shape

CODE = "raise SystemExit('code of the folder ran')\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt would be answered with yes, as in ``yes | trimtab check``."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_code(folder: Path) -> None:
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    configured(folder, model_type="own_kind", auto_map=own)
    (folder / "code.py").write_text(CODE)


BEFORE_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "there is no config.json in this folder"),
    "no JSON": (lambda p: (p / "config.json").write_text("{oops"), "is not a valid JSON file"),
    "no model type": (lambda p: configured(p, model_type=None), "it names no model_type"),
    "an unknown type": (lambda p: configured(p, model_type="llamma"), "transformers does not know its model_type 'llamma'"),
    "code of its own": (with_code, "needs Python code of its own, which trimtab does not run"),
    "encoder and decoder": (lambda p: configured(p, model_type="t5", architectures=None), "t5 is an encoder-decoder model"),
    "a decoder of an encoder": (lambda p: configured(p, model_type="bart", architectures=None), "bart is an encoder-decoder"),
    "eyes": (lambda p: configured(p, model_type="llava", architectures=None), "llava is a vision-language model"),
    "no language": (lambda p: configured(p, model_type="vit", architectures=None), "vit is no causal language model"),
    "a word for a number": (lambda p: configured(p, num_hidden_layers="four"), "expected int, got str"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BEFORE_WEIGHTS)
def test_what_the_config_tells_is_told_before_the_weights(kind: str, folder: Path) -> None:
    spoil, says = BEFORE_WEIGHTS[kind]
    spoil(folder)
    (folder / "model.safetensors").unlink()
    for load in (load_model, load_config, meta_model, model_shape):
        with pytest.raises(UserError, match=says) as caught:
            load(str(folder))
        assert caught.value.key == "model.name" and caught.value.remedy


def test_a_known_type_takes_no_code_from_the_folder(folder: Path) -> None:
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
    configured(folder, auto_map=own)
    (folder / "code.py").write_text(CODE)
    assert type(load_model(str(folder), dtype="float32", device="cpu").model).__name__ == "LlamaForCausalLM"


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path.cwd() / "ran"),)


def as_pickle(folder: Path, *more: Any) -> None:
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(weights | {str(i): value for i, value in enumerate(more)}, folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda p: (p / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut short": (cut, "the weights of .* are damaged"),
    "a pickle with code": (lambda p: as_pickle(p, Evil()), "are pickled objects, which could run code"),
    "too few": (lambda p: configured(p, num_hidden_layers=6), r"18 weights are missing, the first of them model\.layers\.4\."),
    "another shape": (lambda p: configured(p, intermediate_size=64), r"have another shape: .* is \[.*48.*asks for \[.*64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, says = BAD_WEIGHTS[kind]
    spoil(folder)
    with pytest.raises(UserError, match=says) as caught:
        load_model(str(folder), dtype="float32", device="cpu")
    assert caught.value.key == "model.name" and caught.value.remedy and not (tmp_path / "ran").exists()


def test_a_pickle_of_tensors_alone_is_as_good(folder: Path, sound: Path) -> None:
    as_pickle(folder)
    found = load_model(str(folder), dtype="float32", device="cpu").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(sound / "model.safetensors").items())


def test_other_slips(folder: Path) -> None:
    with pytest.raises(UserError, match="this is a file") as caught:
        load_config(str(folder / "config.json"))
    assert "the folder that it lies in" in caught.value.remedy
    with pytest.raises(UserError, match="no such device: 'gpu'") as caught:
        choose_device("gpu")
    assert caught.value.key == "model.device"
    with pytest.raises(UserError, match="is not supported") as caught:
        load_model(str(folder), device="cpu", attn_implementation="quick")
    assert caught.value.key == "model.attn_implementation"
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(UserError, match=r"the tokenizer of .* can't be loaded"):
        load_tokenizer(str(folder))


def test_the_logits_of_the_last_token_alone_do_not_copy_a_frozen_head(folder: Path) -> None:
    """As where an adapter was merged into a copy: each row of a slice would be multiplied by a head of its own."""
    model = copy.deepcopy(load_model(str(folder), dtype="float32", device="cpu").model).requires_grad_(False)
    ids = torch.arange(24).reshape(4, 6)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    with (
        torch.no_grad(),
        torch.profiler.profile(record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
    ):
        last = model(input_ids=ids, logits_to_keep=1).logits
    batched = [
        event for event in seen.events() if event.name == "aten::bmm" and [4, 32, vocabulary] in event.input_shapes
    ]
    assert not batched
    assert torch.allclose(last, model(input_ids=ids).logits[:, -1:], atol=1e-5)
