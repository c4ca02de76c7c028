"""How far GRPO's expected gradient lies from the learner's own, by the length of answers and the level of the ratio.

    python benchmarks/ratio_levels.py [--tokens 3 8 24] [--samples 8000] [--json out.json]

A tiny Llama with six words, an awake adapter and a cap; answers of one length, sampled from the capped policy mu and, for the
truth, from the uncapped learner pi; the reward is capped_self_llr. Both halves of the samples give a gradient each, so that their
noise is not counted: error and size are of the expected gradient, and "found" is the cosine that the gradient of one step of 64
completions has with it. Up to three tokens tests/train/test_grpo.py sums over every answer there is.

Shapes: B answers, T tokens.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.axis import ActivationController, Floor
from trimtab.axis.directions import unit
from trimtab.axis.files import write_json
from trimtab.train.floor_grpo import off_policy

WORDS, HIDDEN, CHUNK, STEP = 6, 32, 2000, 64
PROMPT = (1, 3, 4, 5, 3)
WAYS: dict[str, dict[str, Any]] = {
    "no ratio": {"limit": 1e9},
    "tokens, cut at 2": {"limit": 2.0},
    "sequence, cut at 2": {"limit": 2.0, "level": "sequence"},
    "sequence, left out beyond 2": {"limit": 2.0, "level": "sequence", "beyond": "mask"},
}


class Policies:
    """The learner, its capped twin mu, and the capped self, of one tiny model."""

    def __init__(self, seed: int, samples: int) -> None:
        config = AutoConfig.for_model(
            "llama", vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), lora)
        for name, weight in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        directions = unit(torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(7)))
        self.floor = Floor((1, 2), directions, torch.full((2,), 1.0), torch.ones(2))
        self.controller = ActivationController.of(self.model)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.samples = samples

    def capped(self, capped: bool) -> contextlib.AbstractContextManager[Any]:
        """The cap, or none."""
        return self.controller.capping(self.floor) if capped else contextlib.nullcontext()

    @torch.no_grad()
    def sample(self, length: int, *, capped: bool) -> Tensor:
        """Answers, [B, T]."""
        ids = torch.tensor(PROMPT).expand(self.samples, -1)
        said, cache = [], None
        with self.capped(capped):
            for _ in range(length):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                ids, cache = torch.multinomial(out.logits[:, -1].softmax(-1), 1), out.past_key_values
                said.append(ids)
        return torch.cat(said, 1)

    def logprobs(self, said: Tensor, *, capped: bool = False, base: bool = False) -> Tensor:
        """Of each token, [B, T]."""
        ids = torch.cat([torch.tensor(PROMPT).expand(len(said), -1), said], 1)
        with self.capped(capped), self.model.disable_adapter() if base else contextlib.nullcontext():
            logits = self.model(input_ids=ids).logits[:, len(PROMPT) - 1 : -1]
        found: Tensor = logits.log_softmax(-1).gather(-1, said[..., None])[..., 0]
        return found

    @torch.no_grad()
    def all_logprobs(self, said: Tensor, **how: bool) -> Tensor:
        """The same without gradient, in pieces."""
        return torch.cat([self.logprobs(part, **how) for part in said.split(CHUNK)])

    def gradients(self, said: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of weights [B, T] times grad log pi, over each half of the answers."""
        sums = []
        for half, its_weights in zip(said.chunk(2), weights.chunk(2), strict=True):
            total = torch.zeros(sum(weight.numel() for weight in self.weights))
            for part, of_part in zip(half.split(CHUNK), its_weights.split(CHUNK), strict=True):
                found = torch.autograd.grad((self.logprobs(part) * of_part).sum() / len(half), self.weights)
                total += torch.cat([gradient.flatten() for gradient in found])
            sums.append(total)
        return sums[0], sums[1]


def measure(seed: int, length: int, samples: int) -> dict[str, Any]:
    """Error, size, and what a step finds, of each way."""
    policies = Policies(seed, samples)

    def advantages(said: Tensor, learner: Tensor) -> Tensor:
        rewards = (policies.all_logprobs(said, capped=True, base=True) - learner).mean(1, keepdim=True)
        return rewards - rewards.mean()

    own = policies.sample(length, capped=False)
    truth = policies.gradients(own, advantages(own, policies.all_logprobs(own)).expand(-1, length))
    mean, square = (truth[0] + truth[1]) / 2, float(truth[0] @ truth[1])
    said = policies.sample(length, capped=True)
    learner, sampler = policies.all_logprobs(said), policies.all_logprobs(said, capped=True)
    reward = advantages(said, learner)
    result: dict[str, Any] = {"seed": seed, "tokens": length, "ways": {}}
    for name, way in WAYS.items():
        figures = off_policy(learner, sampler, torch.ones_like(said), **way)
        ratio = torch.ones_like(learner) if name == "no ratio" else figures.ratio
        one, other = policies.gradients(said, (ratio * reward).expand(-1, length))
        both, own_square, along = (one + other) / 2, float(one @ other), float((one + other) / 2 @ mean)
        noise = float((one - other).square().sum()) / 4 * samples
        result["ways"][name] = {
            "error": max(own_square - 2 * along + square, 0.0) ** 0.5 / square**0.5,
            "size": float(both.norm() / mean.norm()),
            "found": along / (square * (own_square + noise / STEP)) ** 0.5,
        }
    result |= {
        "kl": float((sampler - learner).sum(1).mean()),
        "log_ratio": figures.log_ratio,
        "sample_size": figures.sample_size,
        "sample_size_sequence": figures.sample_size_sequence,
    }
    return result


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, nargs="+", default=[3, 8, 24])
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--samples", type=int, default=8000)
    options.add_argument("--json", type=Path, metavar="FILE")
    arguments = options.parse_args()
    results = []
    for length in arguments.tokens:
        for seed in range(arguments.seeds):
            result = measure(seed, length, arguments.samples)
            results.append(result)
            print(
                f"{length} tokens, seed {seed}: mean |log ratio| {result['log_ratio']:.2f}, KL of an answer {result['kl']:.2f}, "
                f"sample size {result['sample_size']:.2f} of tokens, {result['sample_size_sequence']:.2f} of answers"
            )
            for name, way in result["ways"].items():
                print(f"  {name:28s} error {way['error']:.2f}   size {way['size']:.2f}   found {way['found']:.2f}")
    if arguments.json is not None:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
