"""Final hidden states and the head apart: together they are the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, build_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from trimtab.axis import UserError
from trimtab.axis.head import OutputHead

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def assert_own_logits(model: Any) -> None:
    head = OutputHead(model)
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with head.capture() as states:
            model(input_ids=IDS, logits_to_keep=1)
            model(input_ids=IDS[:1], logits_to_keep=1)
        assert [tuple(state.shape[:2]) for state in states] == [(2, 9), (1, 9)]
        with head.gathered():
            torch.testing.assert_close(head.logits(states[0][:, 3]), wanted[:, 3], atol=1e-5, rtol=1e-5)
        model(input_ids=IDS)
    assert len(states) == 2  # nothing is kept outside the block


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_models_own(architecture: str) -> None:
    """Gemma 2 caps them softly."""
    assert_own_logits(build_model(architecture).eval())


def test_scaled_logits() -> None:
    """Cohere multiplies them, Granite divides, and HyperCLOVA X multiplies by what Granite would divide by."""
    torch.manual_seed(0)
    assert_own_logits(CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval())
    assert_own_logits(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=5.0)).eval())
    assert_own_logits(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("hyperclovax", **SIZES, logits_scaling=4.0)).eval()
    )


def test_inside_peft_and_with_gradient() -> None:
    model = get_peft_model(build_model("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert_own_logits(model.eval())
    head = OutputHead(model)
    with head.capture() as states:
        model(input_ids=IDS, logits_to_keep=1)
    assert states[0].requires_grad
    head.logits(states[0][0]).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"tie_word_embeddings": True, "trainable_token_indices": [5]},
    ],
)
def test_a_tuned_head_is_refused(changes: dict[str, Any]) -> None:
    """The base's states would go through it, and a KL of 1 be one of 0."""
    options = {"r": 2, "target_modules": ["q_proj"], **changes}
    base = build_model("llama", tie_word_embeddings=options.pop("tie_word_embeddings", False))
    plain = OutputHead(base)
    model = get_peft_model(base, LoraConfig(**options))
    with pytest.raises(UserError, match="the head is tuned"):
        OutputHead(model)
    with pytest.raises(UserError, match="the head is tuned"):  # put on later
        plain.logits(torch.zeros(1, 32))
