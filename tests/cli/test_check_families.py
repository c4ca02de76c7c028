"""``trimtab check`` on the configurations that people come with: it says what would be trained, or in one sentence why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.axis.errors import UserError
from trimtab.cli.check import check_recipe
from trimtab.recipes.loader import load_recipe

MOE = {"tie_word_embeddings": False, "num_key_value_heads": 8}
# The figures that shape a model, as its config.json gives them -> billions of parameters, and of them those of a token.
FAMILIES: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral 8x7B": (
        {**MOE, "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}, 46.7, 12.9,
    ),
    "gpt-oss 20B": (
        {**MOE, "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
         "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
         "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}, 20.9, 4.2,
    ),
    "Llama 4 Scout": (
        {"model_type": "llama4", "text_config": {
            "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "num_local_experts": 16, "num_experts_per_tok": 1, "vocab_size": 202048, "interleave_moe_layer_step": 1}},
        107.8, 17.2,
    ),
    "DeepSeek-V3": (
        {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
         "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
         "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
         "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
         "vocab_size": 129280, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
         "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}, 671.0, 37.5,
    ),
    "GLM-4.5 Air": (
        {**MOE, "model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96,
         "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
         "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 151552}, 106.9, 13.4,
    ),
    "Gemma 4, heads that differ from layer to layer": ({"model_type": "gemma4"}, 5.1, 5.1),
    "Gemma 4 with experts": (
        {"model_type": "gemma4", "text_config": {
            "model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
            "moe_intermediate_size": 704, "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
            "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 262144}}, 27.4, 6.0,
    ),
    "Qwen3.5": (
        {"model_type": "qwen3_5", "text_config": {
            "model_type": "qwen3_5_text", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "vocab_size": 248320}}, 4.8, 4.8,
    ),
    "Qwen3.5 with experts": ({"model_type": "qwen3_5_moe"}, 34.7, 3.5),
    "Command R7B": (
        {"model_type": "cohere2", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 256000, "tie_word_embeddings": True}, 8.0, 8.0,
    ),
    "Phi-4": (
        {"model_type": "phi3", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
         "num_key_value_heads": 10, "intermediate_size": 17920, "vocab_size": 100352, "tie_word_embeddings": False,
         "pad_token_id": 0, "eos_token_id": 1}, 14.7, 14.7,
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a Mamba hybrid, whose adapters PEFT refuses": (
        {"model_type": "falcon_h1", "hidden_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 12,
         "num_key_value_heads": 2, "intermediate_size": 12288, "vocab_size": 1000, "mamba_d_ssm": 3072,
         "mamba_n_heads": 24, "mamba_d_head": 128}, "PEFT refuses these adapters",
    ),
    "an encoder and decoder": ({"model_type": "t5"}, "model.name"),
    "a library that is not there": ({"model_type": "gemma3n"}, "timm"),
    "a configuration that breaks its own class": ({"model_type": "hunyuan_v1_moe"}, "can't be built from its configuration"),
    "a family that nobody knows": ({"model_type": "no_such_family"}, "model.name"),
}  # fmt: skip


LISTED = "[q_proj, o_proj, q_b_proj, qkv_proj, in_proj_qkv]"


def recipe_for(folder: Path, config: dict[str, Any], targets: str = LISTED) -> Any:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name: {model}}}\nlora: {{target_modules: {targets}}}\n"
        "train: {max_steps: 10, per_device_train_batch_size: 2}\n",
        encoding="utf-8",
    )
    return load_recipe(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_understood(name: str, tmp_path: Path) -> None:
    config, billions, active = FAMILIES[name]
    structure, plan = check_recipe(recipe_for(tmp_path, config), "single", None, None)
    assert structure.parameters / 1e9 == pytest.approx(billions, abs=0.06)
    assert structure.active / 1e9 == pytest.approx(active, abs=0.06)
    assert all(plan.total(phase) > 2 * structure.parameters / 1024**3 for phase in plan.phases)


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_trained_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    config, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as error:
        check_recipe(recipe_for(tmp_path, config, "all-linear"), "single", None, None)
    assert error.value.remedy and error.value.key in ("model.name", "lora", "lora.target_modules")
