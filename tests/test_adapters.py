"""Kinds of adapters under the penalty: they learn from it, they are merged for sampling, and come back bit by bit."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, VOCAB, build_floor, build_model, build_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_floor_sft import make_rows, make_trainer, wake

from trimtab.axis import ActivationController
from trimtab.axis.adapters import as_base, can_merge, merged, merged_weights
from trimtab.axis.models import load_model
from trimtab.train.floor_distill import FloorDistillTrainer
from trimtab.train.floor_sft import FloorSFTTrainer

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "window only": {"layers_to_transform": [0, 1, 2], "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


def lora(kind: str) -> dict[str, Any]:
    return {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear", **KINDS[kind]}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("trainer", [FloorSFTTrainer, FloorDistillTrainer])
def test_the_penalty_trains_it(tmp_path: Path, kind: str, trainer: Any) -> None:
    rows = make_rows(4) * 8
    made = make_trainer(
        tmp_path, rows, kind=trainer, lora=lora(kind), max_steps=8, extra={"floor_weight": 1.0, "benign_kl_weight": 0.0}
    )
    made.train()
    history = [row["floor_penalty"] for row in made.state.log_history if "floor_penalty" in row]
    assert history[-1] < 0.8 * history[0]
    made.save_model(str(tmp_path / "adapter"))
    base = build_model("llama")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        wanted = again(input_ids=IDS).logits
        plain = again.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(plain, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_for_a_while_and_given_back(kind: str) -> None:
    model = get_peft_model(build_model("llama"), LoraConfig(task_type="CAUSAL_LM", **lora(kind))).eval()
    wake(model)
    assert can_merge(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with merged(model):
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)
        assert model(input_ids=IDS).logits.equal(wanted)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [*KINDS, "another head"])
def test_weights_one_by_one_are_those_of_the_merged_model(kind: str) -> None:
    """And those of the base, which a hundred rounds leave as it was, in bfloat16 too."""
    chosen = (
        lora("lora") | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        if kind == "another head"
        else lora(kind)
    )
    plain = build_model("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(task_type="CAUSAL_LM", **chosen)).eval()
    wake(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(100):
        found = {name: weight.clone() for name, weight in merged_weights(model)}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    wanted = copy.deepcopy(model).merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], atol=0, rtol=0)
    assert sum(not found[name].equal(value) for name, value in plain.state_dict().items()) >= 4
    for name, weight in merged_weights(model, base=True):
        assert weight.equal(plain.state_dict()[name]), name


def test_experts_are_sent_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    """One weight in transformers, under two adapters, and many in the file: readers of files know them by no other name."""
    plain = build_model("qwen3_moe", moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[])
    plain.save_pretrained(tmp_path / "plain")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(plain, config).eval()
    wake(model)
    base, found = (
        {name: weight.clone() for name, weight in merged_weights(model, base=which)} for which in (True, False)
    )
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for weights, folder in ((base, "plain"), (found, "merged")):
        wanted = load_file(tmp_path / folder / "model.safetensors")
        assert weights.keys() == wanted.keys()
        assert all(weight.equal(wanted[name]) for name, weight in weights.items())
    assert sum(not found[name].equal(weight) for name, weight in base.items()) == LAYERS * (1 + 4 * 3)


def test_adapters_above_the_floor_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("trimtab"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="trimtab"):
        make_trainer(tmp_path, make_rows(4))
    assert "gradient ends at layer 2; adapters above it, up to layer 3" in caplog.text


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("trainer", [FloorSFTTrainer, FloorDistillTrainer])
def test_qlora(tmp_path: Path, quantization: str, trainer: Any) -> None:
    """bitsandbytes works on a CPU. The base stays quantised, the adapter learns, and the capped self is the quantised base."""
    # 4-bit blocks are of 64 weights
    build_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), dtype="float32", device="cpu", quantization=quantization)
    kinds = {type(module).__name__ for module in loaded.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    made = make_trainer(
        tmp_path, make_rows(4) * 8, kind=trainer, model=loaded.model, floor=build_floor((1, 2), tau=2.0, hidden=64),
        lora={"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}, max_steps=8,
        extra={"floor_weight": 1.0},
    )  # fmt: skip
    assert not can_merge(made.model)
    made.train()
    history = [row["floor_penalty"] for row in made.state.log_history if "floor_penalty" in row]
    assert history[-1] < 0.8 * history[0]
    assert {type(m).__name__ for m in made.model.modules()} & {"Linear4bit", "Linear8bitLt"}


def test_the_base_has_no_dropout_in_training() -> None:
    """Else teacher, reference and barrier would be others at every forward."""
    model: Any = get_peft_model(build_model("llama", attention_dropout=0.5), LoraConfig(r=2, target_modules=["o_proj"]))
    model.train()
    ids = torch.arange(3, 12)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with as_base(model, ActivationController.of(model)) as base:
        assert torch.equal(base(input_ids=ids).logits, base(input_ids=ids).logits)
    assert model.training and all(module.training for module in model.modules())
