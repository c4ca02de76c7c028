"""What the cap and the reading of activations cost while text is generated.

    python benchmarks/generation_overhead.py [--json out.json] [--reference PATH]

Arms, all greedy, all of the same number of tokens:
    plain      transformers' generate, with no hooks on the model
    capped     the same with trimtab's cap                                 target <= 1.05
    means      trimtab's batched sampling with answer means at all layers,
               as axis extraction does it                                  target <= 1.15
    adapter    with --adapter: plain, and an unmerged LoRA of r = 16 on all linear layers
    merged     with --adapter: the same merged for the while, the copying of weights included
    reference  with --reference, a checkout of the published code: generate inside its ActivationSteering
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measuring import bench_floor, compare, finish, parser, positive, run_rounds, tell
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis.adapters import merged
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.models import load_model
from trimtab.axis.sampling import SamplingOptions, pad_left, sample_batch

CAP_TARGET, MEANS_TARGET = 1.05, 1.15


class Endless(ChatFormat):
    """A chat format whose answers never end, so that every arm generates the same number of tokens."""

    @property
    def end_ids(self) -> list[int]:
        """No token at all."""
        return []


def reference_class(folder: Path) -> Any:
    """The published ``ActivationSteering``, from its one file: importing its whole package would import much more."""
    path = folder / "assistant_axis" / "steering.py"
    if not path.is_file():
        raise UserError(
            "not a checkout of the published code", file=path, key="--reference", remedy="clone it with git"
        )
    spec = importlib.util.spec_from_file_location("published_steering", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ActivationSteering


def published_cap(steering: Any, model: Any, floor: Floor) -> Any:
    """The same cap in the published code's terms: an upper cap along the negated direction."""
    return steering(
        model,
        steering_vectors=list(-floor.directions),
        cap_thresholds=(-floor.tau).tolist(),
        coefficients=[1.0] * len(floor.layers),
        layer_indices=list(floor.layers),
        intervention_type="capping",
    )


def _without(wrapped: Any, arm: Callable[[], None]) -> Callable[[], None]:
    """The arm with the adapter switched off."""

    def run() -> None:
        with wrapped.disable_adapter():
            arm()

    return run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch-size", type=positive, default=32)
    options.add_argument("--prompt", type=positive, default=48, help="tokens of a prompt")
    options.add_argument("--tokens", type=positive, default=48, help="tokens of an answer")
    options.add_argument("--adapter", action="store_true", help="also time an adapter, switched on and merged")
    options.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the published code")
    arguments = options.parse_args()
    try:
        run(arguments)
    except UserError as error:
        options.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    """Time the arms and print the ratios."""
    steering = None if arguments.reference is None else reference_class(arguments.reference)
    loaded = load_model(arguments.model, device=arguments.device)
    model = loaded.model
    model.generation_config = GenerationConfig()  # the checkpoint's own would fill up whatever ours leaves open
    floor = bench_floor(model)
    vocabulary = model.config.get_text_config().vocab_size
    prompts = torch.randint(
        0, vocabulary, (arguments.batch_size, arguments.prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()
    pad: Any = loaded.tokenizer.pad_token_id
    ids, mask = pad_left(prompts, pad, next(model.parameters()).device)
    config = GenerationConfig(max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=None, pad_token_id=pad)
    form = Endless(loaded.tokenizer)
    sampling = SamplingOptions(max_new_tokens=arguments.tokens, temperature=0, batch_size=arguments.batch_size)

    def generate(context: Any = None, sampler: Any = model) -> None:
        with torch.no_grad(), context or contextlib.nullcontext():
            made = sampler.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        assert made.shape[1] == arguments.prompt + arguments.tokens, "every arm makes the same number of tokens"

    def plain() -> None:
        ActivationController.of(model).remove()
        generate()

    def capped() -> None:
        generate(ActivationController.of(model).capping(floor))

    def means() -> None:
        answers = sample_batch(
            model, form, prompts, range(len(prompts)), sampling, seeds=range(len(prompts)), means=True
        )
        assert all(len(answer.ids) == arguments.tokens for answer in answers)

    def reference() -> None:
        ActivationController.of(model).remove()
        generate(published_cap(steering, model, floor))

    with torch.no_grad(), ActivationController.of(model).capping(floor, count=True) as counter:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
    print(f"the cap acts at {len(floor.layers)} layers and fires on {counter.fraction:.0%} of the (token, layer) slots")
    arms = {"plain": plain, "capped": capped, "means": means} | ({"reference": reference} if steering else {})
    if arguments.adapter:
        lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        wrapped: Any = get_peft_model(model, lora).eval()
        arms = {name: _without(wrapped, arm) for name, arm in arms.items()}
        ActivationController.of(model).remove()
        arms["adapter"] = lambda: generate(sampler=wrapped)
        arms["merged"] = lambda: generate(merged(wrapped), sampler=wrapped)
    seconds = run_rounds(arms, arguments.rounds, arguments.seed)
    comparisons = [
        compare(seconds, "capped", "plain", CAP_TARGET),
        compare(seconds, "means", "plain", MEANS_TARGET),
    ]
    if arguments.adapter:
        comparisons += [compare(seconds, arm, "plain", None) for arm in ("adapter", "merged")]
    if steering is not None:
        comparisons += [compare(seconds, "reference", "plain", None), compare(seconds, "capped", "reference", None)]
    for comparison in comparisons:
        tell("generation", comparison)
    finish(
        arguments,
        "generation_overhead",
        {"seconds": seconds, "firing_fraction": counter.fraction, "comparisons": comparisons},
    )


if __name__ == "__main__":
    main()
