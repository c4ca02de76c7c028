"""Rows made on the fly: those of SFT and distillation, and the benign rows that GRPO and DPO draw beside their own."""

from __future__ import annotations

import math
from typing import Any

from trimtab.axis.sampling import SamplingOptions
from trimtab.pipeline.loading import sampling_options
from trimtab.pipeline.run import Variant
from trimtab.recipes.schema import GrpoMethod
from trimtab.train import job
from trimtab.train.barrier import BarrierOptions, BenignRows
from trimtab.train.floor_sft import FloorCollator, FloorSFTTrainer
from trimtab.train.rollouts import RolloutPlan, RolloutSource, training_order
from trimtab.train.schedule import carried
from trimtab.train.sources import benign_sources, drift_sources
from trimtab.train.vllm_rollouts import open_vllm

BENIGN_EVERY = 20  # steps whose benign rows are answered at a time, beside GRPO and DPO

# What SFTConfig must say: rows come as tokens, in an order that is fixed beforehand, with a column of their own.
ROW_ARGUMENTS = {
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "train_sampling_strategy": "sequential",
}


def build_row_trainer(
    kind: type[FloorSFTTrainer],
    run: Any,
    arguments: Any,
    variant: Variant,
    *,
    student_share: float | None = None,
    **own: Any,
) -> FloorSFTTrainer:
    """Make a trainer of rollouts.

    Args:
        kind: the trainer's class.
        run: the run.
        arguments: TRL's SFTConfig.
        variant: what is trained: the run's own adapter, or its control's.
        student_share: see :class:`~trimtab.train.rollouts.RolloutPlan`.
        **own: the class's own arguments.
    """
    parts = job.load_parts(run, variant)
    source = RolloutSource(
        rollout_plan(run.recipe, arguments, student_share),
        parts.form,
        parts.floor,
        variant.rollouts,
        max_length=arguments.max_length,
    )
    trainer = kind(
        **parts.trainer_arguments(arguments),
        train_dataset=source.dataset(),
        data_collator=FloorCollator(**job.padding(parts.tokenizer, parts.device)),
        rollouts=source,
        **own,
    )
    given, options = run.recipe.train, source.plan.options
    if given.get("use_vllm"):
        trainer.vllm = open_vllm(trainer, parts.form, parts.floor, given, options.batch_size)
    return trainer


def benign_rows(run: Any, parts: job.Parts, arguments: Any, variant: Variant) -> BenignRows | None:
    """Benign rows for a trainer that has none of its own: ``data.benign_share`` of all rows of the run.

    Args:
        run: the run.
        parts: of :func:`~trimtab.train.job.load_parts`.
        arguments: TRL's config.
        variant: what is trained.
    """
    plan = benign_plan(run.recipe, arguments)
    if plan is None:
        return None
    longest = getattr(arguments, "max_length", None)  # GRPO has no longest row
    source = RolloutSource(plan, parts.form, None, variant.rollouts, max_length=longest)
    return BenignRows(
        source,
        rate=_benign_rate(run.recipe.data, arguments),
        micro_batches=arguments.gradient_accumulation_steps,
        **job.padding(parts.tokenizer, parts.device),
    )


def _benign_rate(data: Any, arguments: Any) -> float:
    """Benign rows a micro-batch of a rank, a fraction too, so that they are ``data.benign_share`` of all."""
    return float(arguments.per_device_train_batch_size * data.benign_share / (1 - data.benign_share))


def benign_plan(recipe: Any, arguments: Any) -> RolloutPlan | None:
    """The benign rows beside GRPO's or DPO's own, and how the base's answers are sampled; None where there is no barrier.

    Args:
        recipe: the recipe.
        arguments: TRL's config.
    """
    method, data = recipe.method, recipe.data
    if data.benign_share == 0 or not BarrierOptions(method.benign_kl_weight, method.benign_axis_weight):
        return None
    rate = _benign_rate(data, arguments)
    micro_batches, ranks = arguments.gradient_accumulation_steps, arguments.world_size
    order = training_order(
        [],
        benign_sources(data),
        micro_batches=carried(arguments.max_steps * micro_batches, rate),
        ranks=ranks,
        batch_size=1,
        benign_share=1.0,
        seed=data.seed,
    )
    # A rank's rows come one by one, whatever the share, so a "step" of this plan is a row of each rank. The base answers them, in
    # rounds of about so many optimiser steps.
    return RolloutPlan(
        order=order,
        rows_a_step=ranks,
        batch_size=1,
        every=math.ceil(BENIGN_EVERY * micro_batches * rate),
        total_steps=arguments.max_steps,
        strength=0.0,
        schedule="constant",
        options=_as_the_method_samples(method, arguments),
        seed=data.seed,
    )


def _as_the_method_samples(method: Any, arguments: Any) -> SamplingOptions:
    if isinstance(method, GrpoMethod):
        return SamplingOptions(max_new_tokens=arguments.max_completion_length, batch_size=method.sampling_batch)
    return sampling_options(method.sampling)


def rollout_plan(recipe: Any, arguments: Any, student_share: float | None = None) -> RolloutPlan:
    """The training order and how its answers are sampled."""
    method, data = recipe.method, recipe.data
    ranks = arguments.world_size
    accumulation = arguments.gradient_accumulation_steps
    order = training_order(
        drift_sources(data),
        benign_sources(data),
        micro_batches=arguments.max_steps * accumulation,
        ranks=ranks,
        batch_size=arguments.per_device_train_batch_size,
        benign_share=data.benign_share,
        seed=data.seed,
    )
    return RolloutPlan(
        order=order,
        rows_a_step=arguments.per_device_train_batch_size * accumulation * ranks,
        batch_size=arguments.per_device_train_batch_size,
        every=method.regenerate_every if method.rollouts == "on_the_fly" else arguments.max_steps,
        total_steps=arguments.max_steps,
        strength=getattr(method, "cap_strength", 1.0),
        schedule=getattr(method, "cap_schedule", "constant"),
        options=sampling_options(method.sampling),
        seed=data.seed,
        student_share=student_share,
        benign_student_share=method.benign_student_share,
    )
