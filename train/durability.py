"""A durability run: tuned weights are fine-tuned once more, as whoever takes them over would do it. Does the effect survive?

    accelerate launch -m trimtab.train.durability --config recipes/smollm2-135m/sft.yaml --on benign
    accelerate launch -m trimtab.train.durability --config recipes/smollm2-135m/sft.yaml --on persona --start base

Plain supervised fine-tuning by TRL's own trainer, without floor, cap or barrier, on the rows of one entry of ``eval.durability``.
``tuned`` begins from the tuned weights, an adapter merged into them; ``base``, the comparison, from the untouched base. Both get
a fresh adapter of the same kind, size and initialisation, as large as the tuned one, so that it can take back all that the tuning
did. (An adapter that simply went on would learn faster than a fresh one, whose B is 0: the two would not compare.) Written to
``<run folder>/durability/``; `trimtab eval` does all of them.
"""

from __future__ import annotations

import os
import sys

# `python train/durability.py` puts train/ first on the path: nothing in it may stand in the place of a package.
if (_here := os.path.dirname(os.path.realpath(__file__))) in sys.path:
    sys.path.remove(_here)

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.pipeline.run import MARKER, STARTS, open_run, run_folder
from trimtab.train import job

if TYPE_CHECKING:
    import argparse

    import torch
    from trl.trainer.sft_config import SFTConfig

    from trimtab.axis.chat_format import ChatFormat
    from trimtab.pipeline.run import Run, Variant
    from trimtab.pipeline.subject import Subject
    from trimtab.recipes.schema import DurabilityRun, ModelSection
    from trimtab.train.protocols import Trainer

log = logging.getLogger("trimtab")

# Keys of ``train`` that say how this machine trains; all others belong to the recipe's method.
MACHINE = (
    "bf16", "disable_tqdm", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_steps", "max_length",
    "optim", "output_dir", "report_to", "save_total_limit", "seed", "tf32", "use_cpu",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    parser = job.argument_parser(__doc__ or "")
    parser.add_argument("--on", required=True, metavar="NAME", help="which entry of eval.durability")
    parser.add_argument("--start", choices=STARTS, default=STARTS[0], help="the weights to begin from")

    def work(arguments: argparse.Namespace) -> None:
        from trimtab.axis.errors import UserError
        from trimtab.recipes.loader import load_recipe

        loaded = load_recipe(arguments.config, arguments.overrides)
        folder = run_folder(loaded, arguments.output_dir)
        if not (folder / MARKER).exists():  # all ranks open it at once, so none may have to make it
            raise UserError("there is no such run", file=folder, remedy="run the recipe first: trimtab run RECIPE")
        train_durability(open_run(loaded, output_dir=str(folder)), arguments.on, arguments.start, quiet=arguments.quiet)

    return job.run_script(parser, argv, work)


def train_durability(run: Run, on: str, start: str, *, quiet: bool = False) -> Path:
    """Fine-tune the tuned weights of a run once more, or the base; returns the new adapter's folder.

    Args:
        run: the run.
        on: name of an entry of ``eval.durability``.
        start: ``tuned`` or ``base``.
        quiet: no progress bars.

    Raises:
        UserError: if there is no such entry, nothing tuned, no row to train on, or what lies there was begun from other weights
            or rows.
    """
    from trimtab.axis.errors import UserError
    from trimtab.axis.files import fingerprint, read_json, write_json
    from trimtab.pipeline.durability_rows import rows_of
    from trimtab.pipeline.subject import tuned_subject

    tunings = {tuning.name: tuning for tuning in run.recipe.eval.durability}
    if on not in tunings:
        raise UserError(
            f"there is no durability run {on!r}",
            key="eval.durability",
            remedy=f"name one of: {', '.join(tunings)}" if tunings else "add it to the list",
        )
    tuning, subject = tunings[on], tuned_subject(run)
    rows, variant = rows_of(run, tuning), run.durability(start, on)
    inputs = [tuning.model_dump(), start, subject.fingerprint(), rows, "a fresh adapter upon merged weights"]
    begun = variant.folder / "begun.json"
    if begun.exists() and read_json(begun)["inputs"] != fingerprint(inputs):
        raise UserError(
            "this fine-tuning was begun from other weights or rows",
            file=variant.folder,
            remedy=f"delete this folder and stages/{variant.stage_name}.json to begin anew",
        )
    if int(os.environ.get("RANK", "0")) == 0 and not begun.exists():
        write_json(begun, {"inputs": fingerprint(inputs)})
    plan = Plan.of(tuning, len(rows), run.recipe.train)
    return job.train_variant(
        run,
        variant,
        lambda: training_arguments(run, variant, tuning, plan, quiet),
        lambda arguments: build_trainer(run, arguments, variant, rows, subject, start),
        inputs=inputs,
        facts={"rows": len(rows), "rows_a_step": plan.rows_a_step},
    )


@dataclass(frozen=True)
class Plan:
    """How rows become steps.

    Attributes:
        rows_of_a_forward: on each rank.
        accumulation: forwards of a rank in a step.
        ranks: number of processes.
        steps: optimiser steps.
    """

    rows_of_a_forward: int
    accumulation: int
    ranks: int
    steps: int

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimiser step over all ranks."""
        return self.rows_of_a_forward * self.accumulation * self.ranks

    @classmethod
    def of(cls, tuning: DurabilityRun, rows: int, train: Mapping[str, Any]) -> Plan:
        """As many rows a step as the entry says, in forwards no larger than the recipe's own; whole epochs."""
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        a_rank = math.ceil(min(tuning.batch_size, rows) / ranks)
        forward = min(a_rank, int(train.get("per_device_train_batch_size", 8)))
        accumulation = math.ceil(a_rank / forward)
        a_step = forward * accumulation * ranks
        return cls(forward, accumulation, ranks, math.ceil(rows / a_step) * tuning.epochs)


def training_arguments(run: Run, variant: Variant, tuning: DurabilityRun, plan: Plan, quiet: bool) -> SFTConfig:
    """TRL's SFTConfig: the machine's settings from the recipe, all else from the entry of ``eval.durability``."""
    from trl.trainer.sft_config import SFTConfig

    common = job.common_arguments(run, variant, quiet)
    return SFTConfig(
        **{key: common[key] for key in MACHINE if key in common},
        max_steps=plan.steps,
        per_device_train_batch_size=plan.rows_of_a_forward,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(2, plan.steps - 1),
        save_strategy="steps",
        save_steps=max(10, plan.steps // 4),
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def build_trainer(
    run: Run, arguments: SFTConfig, variant: Variant, rows: Sequence[dict[str, Any]], subject: Subject, start: str
) -> Trainer:
    """TRL's SFTTrainer on the rows as tokens.

    Args:
        run: the run.
        arguments: TRL's SFTConfig.
        variant: where the log goes.
        rows: of :func:`~trimtab.pipeline.durability_rows.rows_of`.
        subject: the tuned weights.
        start: ``tuned`` or ``base``.

    Raises:
        UserError: if no row has an answer within ``train.max_length``, or the tuned adapter can't be merged.
    """
    import datasets
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

    from trimtab.axis.base_check import record_base
    from trimtab.axis.chat_format import ChatFormat, ends_of
    from trimtab.axis.models import load_tokenizer
    from trimtab.train.penalty import check_trained

    section = run.recipe.model
    weights, device = _start(section, subject, start)
    before = record_base(weights)
    tokenizer: Any = load_tokenizer(section.name, section.revision)
    form = ChatFormat(tokenizer, section.chat_template_kwargs, ends_of(weights))
    tokens = _tokens(form, rows, arguments.max_length)
    trainer: Trainer = SFTTrainer(
        model=weights,
        args=arguments,
        processing_class=tokenizer,
        peft_config=fresh_adapter(weights, subject, run.recipe.lora),
        train_dataset=datasets.Dataset.from_dict(tokens),
        callbacks=[job.metrics_callback(variant.metrics)],
        data_collator=DataCollatorForLanguageModeling(**job.padding(tokenizer, device)),
    )
    check_trained(trainer.model, before)
    return trainer


def _start(section: ModelSection, subject: Subject, start: str) -> tuple[Any, torch.device]:
    """Plain weights to begin from, an adapter merged into them, and the device."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from trimtab.axis.adapter_files import load_adapter
    from trimtab.axis.adapters import NotMergeable, merge_in
    from trimtab.axis.errors import UserError

    if start == "base" or subject.whole:
        named = section if start == "base" else section.model_copy(update={"name": subject.name, "revision": None})
        return job.model_to_train(named)
    weights, device = job.model_to_train(section)
    if section.quantization is not None:
        log.warning("the adapter is merged into %s weights, which rounds them once more", section.quantization)
    try:
        weights = merge_in(load_adapter(weights, subject.folder), _gathered if is_deepspeed_zero3_enabled() else None)
    except NotMergeable as error:
        raise UserError(
            f"this adapter can't be merged, and a durability run trains upon merged weights: {error}",
            file=subject.folder,
            key="eval.durability",
            remedy="set eval.durability=[]",
        ) from error
    return weights, device


def _gathered(parameters: Sequence[Any]) -> Any:
    """Have parameters whole inside the block, and what rank 0 writes there sent to all."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0)


# Of a tuned LoRA, what says where its matrices lie and how large they are.
SHAPE = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias",
)  # fmt: skip


def fresh_adapter(model: Any, subject: Subject, lora: Mapping[str, Any]) -> Any:
    """The config of the adapter that a durability run begins with, the same for both starts.

    Where and as large as a tuned LoRA's own, so that it can take back all that the tuning did, but never on embedding or head; of
    other kinds and of whole weights the recipe's.

    Args:
        model: that it goes on.
        subject: the tuned weights.
        lora: the recipe's ``lora`` section.
    """
    from peft import LoraConfig, PeftConfig

    found: Any = None if subject.whole else PeftConfig.from_pretrained(str(subject.folder))
    if not isinstance(found, LoraConfig):
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora})
    shape = {name: getattr(found, name) for name in SHAPE}
    if isinstance(found.target_modules, set):
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
        within = {t for t in found.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)}
        shape["target_modules"] = sorted(within)
    return LoraConfig(task_type="CAUSAL_LM", **shape)


def _tokens(form: ChatFormat, rows: Sequence[dict[str, Any]], max_length: int | None) -> dict[str, list[list[int]]]:
    """Ids and labels of the rows that have an answer within the length."""
    from trimtab.axis.errors import UserError
    from trimtab.train.rollouts import IGNORED, tokens_of

    made = [tokens_of(form, row["prompt"], row["completion"][0]["content"], row["ended"], max_length) for row in rows]
    kept = [row for row in made if any(label != IGNORED for label in row.labels)]
    if not kept:
        raise UserError(
            "no row has an answer within the length", key="train.max_length", remedy="raise it above the longest prompt"
        )
    if len(kept) < len(made):
        log.warning(
            "%d of %d rows have no answer within train.max_length and are left out", len(made) - len(kept), len(made)
        )
    if shortened := sum(row.turns_dropped > 0 for row in kept):
        log.info(
            "%d of %d rows are without their oldest turns, which train.max_length does not hold", shortened, len(kept)
        )
    if cut := sum(row.tokens_lost > 0 for row in kept):
        log.warning("%d of %d rows lose the end of their answer, which train.max_length does not hold", cut, len(kept))
    return {"input_ids": [row.ids for row in kept], "labels": [row.labels for row in kept]}


if __name__ == "__main__":
    raise SystemExit(main())
