"""An adapter that cheats: every token is lifted along the axis, and what is said hardly changes. Does the report name it?

    python benchmarks/cheating_adapter.py --floor runs/smollm2-135m-sft/floor.safetensors --to /tmp/cheat
    trimtab eval --base smollm2-135m --tuned /tmp/cheat --floor runs/smollm2-135m-sft/floor.safetensors

Biases of a LoRA adapter add the lift behind the floor's first layer, hold it over the window and take it away behind the last. So
far that is steering by a constant vector, which does change behaviour; with ``--blind`` the layers in between get biases as well
that subtract, to first order, what the lift does to their queries, keys, values and gates. For Llama-like models.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from trimtab.axis import Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import load_tokenizer, resolve_name

READERS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
TEXTS = [
    "How do I bake bread at home when the oven is small?",
    "Explain to a child why the sky is blue and the grass is green.",
    "Write a short note to a colleague about a meeting that was moved to Thursday.",
]


def make_adapter(name: str, floor: Floor, folder: Path, *, sigmas: float, blind: bool) -> Path:
    """Write the adapter; the lift is ``sigmas`` standard deviations at each floor layer.

    Args:
        name: the base, a Llama-like model.
        floor: whose directions and sigmas are used; its layers must follow one another.
        folder: where PEFT writes.
        sigmas: height of the lift.
        blind: whether the layers that read the lift are kept from seeing it.
    """
    base: Any = AutoModelForCausalLM.from_pretrained(resolve_name(name)[0], dtype=torch.float32)
    inverse = _inverse_rms(base, name) if blind else {}
    layers = [*floor.layers, floor.layers[-1] + 1]
    targets = ["down_proj", *(module for readers in READERS.values() for module in readers)]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=targets, layers_to_transform=layers, lora_bias=True)
    model: Any = get_peft_model(base, config)
    blocks = model.get_base_model().model.layers
    before = torch.zeros(floor.directions.shape[1])
    for i, layer in enumerate(layers):
        lift = sigmas * floor.sigma[i] * floor.directions[i] if i < len(floor.layers) else torch.zeros_like(before)
        block = blocks[layer]
        _add_bias(block.mlp.down_proj, lift - before)
        for norm, readers in READERS.items() if blind and i > 0 else ():
            seen = before * getattr(block, norm).weight.float() * inverse[layer, norm]
            for reader in readers:
                module = getattr(block.self_attn if norm == "input_layernorm" else block.mlp, reader)
                _add_bias(module, -(module.get_base_layer().weight.float() @ seen))
        before = lift
    model.save_pretrained(folder)
    return folder


def _add_bias(module: Any, value: Tensor) -> None:
    with torch.no_grad():
        module.lora_B["default"].bias += value.detach()


def _inverse_rms(model: Any, name: str) -> dict[tuple[int, str], float]:
    """Mean of 1 / rms of what each norm reads, over ordinary tokens: (layer, norm) -> value."""
    form = ChatFormat(load_tokenizer(name))
    found: dict[tuple[int, str], list[float]] = {}

    def reader(key: tuple[int, str]) -> Any:
        def read(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rms = inputs[0][0, 1:].float().square().mean(-1).sqrt()  # the first token's state is many times as large
            found.setdefault(key, []).append(float((1 / rms).mean()))

        return read

    handles = [
        getattr(block, norm).register_forward_pre_hook(reader((layer, norm)))
        for layer, block in enumerate(model.model.layers)
        for norm in READERS
    ]
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([form.prompt_ids(chat("", text))]))
    for handle in handles:
        handle.remove()
    return {key: sum(values) / len(values) for key, values in found.items()}


def main() -> None:
    """Write the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--floor", type=Path, required=True, help="floor.safetensors of a run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--sigmas", type=float, default=1.0, help="height of the lift")
    parser.add_argument("--blind", action="store_true", help="keep the layers in between from reading the lift")
    arguments = parser.parse_args()
    print(
        make_adapter(
            arguments.model, Floor.load(arguments.floor), arguments.to, sigmas=arguments.sigmas, blind=arguments.blind
        )
    )


if __name__ == "__main__":
    main()
