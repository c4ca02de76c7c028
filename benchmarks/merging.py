"""What is left of the base when an adapter is merged and taken out again, as often as training sends its weights to a sampler.

    python benchmarks/merging.py                    # SmolLM2, bfloat16; about a minute on two cores

The adapter grows over the rounds as in training. Beside PEFT's own ``merge_adapter`` and ``unmerge_adapter``, which TRL calls at
every sending, stands :func:`trimtab.axis.adapters.merged_weights`, which merges a layer at a time and gives its weights back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from trimtab.axis.adapters import merged_weights
from trimtab.axis.models import resolve_name

SHOWN = (1, 10, 30, 100, 300, 1000)


def in_place(model: Any) -> None:
    """As TRL sends weights."""
    model.merge_adapter()
    model.unmerge_adapter()


def one_by_one(model: Any) -> None:
    """As trimtab sends weights."""
    for _ in merged_weights(model):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="hub id, folder or embedded model")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument(
        "--size", type=float, default=0.003, help="norm of the adapter's delta at the end, to the weights' own"
    )
    given = parser.parse_args()
    for way in (in_place, one_by_one):
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_pretrained(resolve_name(given.model)[0], dtype=torch.bfloat16)
        model: Any = get_peft_model(plain, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        kept = [layer.get_base_layer().weight.detach().float().clone() for layer in layers]
        ends = []
        for layer, weight in zip(layers, kept, strict=True):
            end = torch.randn_like(layer.lora_B["default"].weight)
            layer.lora_B["default"].weight.data.copy_(end)
            ends.append(end * (given.size * weight.norm() / layer.get_delta_weight("default").float().norm()))
        seconds = []
        for number in range(1, given.rounds + 1):
            for layer, end in zip(layers, ends, strict=True):
                layer.lora_B["default"].weight.data.copy_(end * number / given.rounds)
            begun = time.perf_counter()
            way(model)
            seconds.append(time.perf_counter() - begun)
            if number in SHOWN or number == given.rounds:
                moved = [
                    layer.get_base_layer().weight.detach().float() - w for layer, w in zip(layers, kept, strict=True)
                ]
                drift = statistics.mean(float(d.norm() / w.norm()) for d, w in zip(moved, kept, strict=True))
                changed = sum(int((d != 0).sum()) for d in moved) / sum(w.numel() for w in kept)
                print(
                    f"{way.__name__}, {number} rounds: {100 * changed:.2f} % of the weights changed, by {drift:.1e} of their "
                    f"norm ({drift / given.size:.2f} of the adapter's)",
                    flush=True,
                )
        print(f"{way.__name__}: {statistics.median(seconds):.3f} s a round")


if __name__ == "__main__":
    main()
