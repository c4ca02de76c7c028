"""Every field of the installed PEFT's LoraConfig, tried: with the adapter off the base is untouched, or no recipe may set it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, build_model
from peft import LoraConfig, get_peft_model

from trimtab.axis import UserError
from trimtab.axis.adapters import NotMergeable, merge_in
from trimtab.axis.base_check import add_adapters, check_adapters, check_base, record_base
from trimtab.recipes.library_fields import lora_fields
from trimtab.recipes.loader import RecipeError, recipe_of
from trimtab.train.rehearsal import rehearse

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# field -> values that train an adapter above an untouched base
WORKS: dict[str, list[Any]] = {
    "r": [2],
    "target_modules": ["all-linear", ["q_proj"], r".*\.(q|v)_proj", None],
    "exclude_modules": [["q_proj"], r".*\.layers\.0\..*"],
    "lora_alpha": [3],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [True],
    "bias": ["none"],
    "use_rslora": [True],
    "modules_to_save": [None, []],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "mica"],
    "layers_to_transform": [[0, 1]],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 2}],
    "trainable_token_indices": [[5, 80], {"embed_tokens": [5]}],
    "use_dora": [True],
    "velora_config": [{"num_groups": 4}],
    "lora_bias": [True],
    "target_parameters": [["mlp.down_proj.weight"]],
    "use_bdlora": [{"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}],
}  # fmt: skip
# What else a value needs, or must not have, beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "layers_to_transform": {"target_modules": LINEAR},
    "layers_pattern": {"target_modules": LINEAR, "layers_to_transform": [0]},
    "target_parameters": {"target_modules": ["q_proj"]},
}
# field -> values that a recipe may not have
REFUSED: dict[str, list[Any]] = {
    "init_lora_weights": ["eva", "olora", "pissa", "corda", "loftq"],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["norm"], ["lm_head"], ["embed_tokens"]],
    "megatron_config": [{"a": 1}],
    "megatron_core": ["mine"],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{"rho": 1.0}],
    "corda_config": [{"cache_file": "x"}],
    "lora_ga_config": [{"direction": "ArBr"}],
    "alora_invocation_tokens": [[5, 6]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{"num_samples": 2}],
    "layer_replication": [[[0, 3], [1, 4]]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{"beta": 0.1}],
    "ensure_weight_tying": [True],
    "task_type": ["SEQ_CLS"],
    "peft_type": ["IA3"],
    "auto_mapping": [{"a": "b"}],
    "peft_version": ["0.1"],
    "base_model_name_or_path": ["elsewhere"],
    "revision": ["main"],
    "inference_mode": [True],
    "target_modules": [["q_proj", "lm_head"], ".*head"],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(field, value) for field, values in table.items() for value in values]


def test_every_field_is_tried() -> None:
    """A new one of another version of PEFT is to be added here."""
    assert WORKS.keys() | REFUSED.keys() == lora_fields().keys()


def recipe(**lora: Any) -> Any:
    sections = {"model": {"name": "x"}, "lora": lora, "train": {"max_steps": 1}}
    return recipe_of(sections, "x").recipe


@pytest.mark.parametrize(("field", "value"), cases(REFUSED))
def test_a_recipe_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"lora\.{field}.*\n?.*remedy"):
        recipe(**{field: value})


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), cases(WORKS))
def test_the_base_is_untouched_however_far_it_is_trained(field: str, value: Any) -> None:
    lora = {"r": 4, "target_modules": "all-linear", **BESIDE.get(field, {}), field: value}
    recipe(**lora)
    model = build_model("llama", num_hidden_layers=2)
    before = record_base(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = model(input_ids=IDS).logits
        adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
        check_adapters(adapted)
        check_base(adapted, before, key="lora", remedy="none")
        generator = torch.Generator().manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        tuned = adapted(input_ids=IDS).logits
        with adapted.disable_adapter():
            assert adapted(input_ids=IDS).logits.equal(wanted)
        assert float((tuned - wanted).abs().max()) > 0.1
        try:
            plain = merge_in(adapted)
        except NotMergeable:
            assert field == "lora_bias"  # this model has no biases for it
        else:
            torch.testing.assert_close(plain(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-4)


def test_what_only_the_model_tells_is_told_before_anything_is_sampled(tmp_path: Path) -> None:
    """An embedding that is the head too: known from the config, and no weight is loaded."""
    build_model("llama", tie_word_embeddings=True).config.save_pretrained(
        tmp_path / "model"
    )  # no weights, no tokenizer
    sections = {
        "model": {"name": str(tmp_path / "model")},
        "lora": {"target_modules": ["q_proj", "embed_tokens"]},
        "train": {"max_steps": 1},
    }
    with pytest.raises(UserError, match=r"lora\.target_modules: this model's embedding and head are one weight"):
        rehearse(recipe_of(sections, "x"))
    with torch.device("meta"), pytest.raises(UserError, match="PEFT refuses"):
        add_adapters(build_model("llama"), {"target_modules": ["no_such"]})
