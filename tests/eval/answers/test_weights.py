"""Adapters merged for a while, and the weights behind the arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from peft import LoraConfig, PeftModel, get_peft_model

from trimtab.axis.adapters import can_merge, merged
from trimtab.eval.answers import weights as weights_module
from trimtab.eval.answers.weights import open_weights

IDS = torch.tensor([[5, 80, 120, 33, 7, 254]])


def add_adapter(base: Any, seed: int = 0, **changes: Any) -> PeftModel:
    """A PEFT model whose adapter does something."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(base, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}])
def test_weights_come_back_bit_by_bit(dtype: torch.dtype, lora: dict[str, Any]) -> None:
    base = build_model("llama", attention_bias=bool(lora.get("lora_bias"))).to(dtype)
    model = add_adapter(base, **lora)
    before, unmerged = copies(model), logits(model)
    for _ in range(3):
        with merged(model) as inside:
            assert inside is model and not same_bits(before, copies(model))
            difference = (logits(model) - unmerged).abs().max()
            assert difference < (1e-3 if dtype == torch.float32 else 0.06 * unmerged.abs().max())
    assert same_bits(before, copies(model)) and torch.equal(logits(model), unmerged)


def test_unmerging_alone_would_not_give_them_back() -> None:
    """The reason for the copies."""
    model = add_adapter(build_model("llama").to(torch.bfloat16))
    before = copies(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert not same_bits(before, copies(model))


def test_weights_come_back_after_an_exception() -> None:
    model = add_adapter(build_model("llama").to(torch.bfloat16))
    before, unmerged = copies(model), logits(model)
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert same_bits(before, copies(model)) and torch.equal(logits(model), unmerged)


def test_weights_come_back_where_merging_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_adapter(build_model("llama").to(torch.bfloat16))
    before, unmerged = copies(model), logits(model)
    last = model.base_model.model.model.layers[-1].mlp.down_proj

    def fails(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(last, "merge", fails)
    with pytest.raises(MemoryError), merged(model):
        pytest.fail("the block must not run")
    assert same_bits(before, copies(model)) and torch.equal(logits(model), unmerged)


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    """Two adapters of the tiny Llama, saved."""
    folders = {name: tmp_path / name for name in ("tuned", "control")}
    for seed, folder in enumerate(folders.values()):
        add_adapter(build_model("llama"), seed).save_pretrained(folder)
    return folders


def arm_logits(opened: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name in opened:
        with opened[name]() as model:
            found[name] = logits(model)
    return found


def test_merged_copies_leave_the_base_alone(adapters: dict[str, Path]) -> None:
    base = build_model("llama")
    before, plain = copies(base), logits(base)
    opened = open_weights(base, adapters)
    assert list(opened) == ["base", "tuned", "control"]
    found = arm_logits(opened)
    assert same_bits(before, copies(base)) and torch.equal(found["base"], plain)
    with opened["tuned"]() as tuned:
        assert not isinstance(tuned, PeftModel)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.zero_()
    assert same_bits(before, copies(base))


def test_switching_gives_what_merging_gives(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    at_merged = arm_logits(open_weights(build_model("llama"), adapters))
    monkeypatch.setattr(weights_module, "can_merge", lambda model: False)
    opened = open_weights(build_model("llama"), adapters)
    first, again = arm_logits(opened), arm_logits(dict(reversed(opened.items())))
    for name, expected in at_merged.items():
        assert torch.allclose(first[name], expected, atol=1e-3), name
        assert torch.equal(first[name], again[name])  # whatever arm came before
    assert torch.equal(first["base"], at_merged["base"])
    assert (first["tuned"] - first["base"]).abs().max() > 0.1 < (first["tuned"] - first["control"]).abs().max()


def test_switching_survives_an_exception(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "can_merge", lambda model: False)
    opened = open_weights(build_model("llama"), adapters)
    before = arm_logits(opened)
    with pytest.raises(RuntimeError), opened["base"]():
        raise RuntimeError
    after = arm_logits(opened)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_can_merge() -> None:
    model = build_model("llama")
    assert can_merge(model) and can_merge(model.to(torch.bfloat16)) and can_merge(add_adapter(build_model("llama")))
    assert not can_merge(build_model("llama").to("meta"))
    quantised = build_model("llama")
    weight = quantised.model.layers[0].mlp.up_proj.weight
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    assert not can_merge(quantised)
    sharded = build_model("llama")
    next(sharded.parameters()).ds_id = 0  # as ZeRO-3 marks a parameter
    assert not can_merge(sharded)


def test_a_bias_without_a_place_is_left_beside_the_base(tmp_path: Path) -> None:
    """PEFT can't merge a LoRA bias into a layer that has none."""
    model = add_adapter(build_model("llama"), target_modules=["down_proj"], lora_bias=True)
    assert not can_merge(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    with open_weights(build_model("llama"), {"tuned": tmp_path})["tuned"]() as opened:
        assert torch.equal(logits(opened), logits(model))
    assert not torch.equal(logits(model), logits(build_model("llama")))
