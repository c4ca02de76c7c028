"""Rows made on the fly: those of SFT and distillation, and the benign rows that GRPO and DPO draw beside their own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trimtab.pipeline.loading import sampling_options
from trimtab.pipeline.run import Run, Variant
from trimtab.recipes.methods import RowMethod
from trimtab.recipes.schema import Recipe
from trimtab.recipes.sections import DataSection
from trimtab.train import job
from trimtab.train.barrier import BarrierOptions, BenignRows
from trimtab.train.floor_sft import FloorCollator, FloorSFTTrainer
from trimtab.train.rollouts import RolloutPlan, RolloutSource, training_order
from trimtab.train.schedule import carried
from trimtab.train.sources import benign_sources, drift_sources
from trimtab.train.vllm_rollouts import open_vllm

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from trimtab.train.protocols import Spread

BENIGN_EVERY = 20  # steps whose benign rows are answered at a time, beside GRPO and DPO

# What SFTConfig must say: rows come as tokens, in an order that is fixed beforehand, with a column of their own.
ROW_ARGUMENTS = {
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "train_sampling_strategy": "sequential",
}


def build_row_trainer(
    kind: type[FloorSFTTrainer], run: Run, arguments: SFTConfig, variant: Variant, **own: Any
) -> FloorSFTTrainer:
    """Make a trainer of rollouts.

    Args:
        kind: the trainer's class.
        run: the run.
        arguments: TRL's SFTConfig.
        variant: what is trained: the run's own adapter, or its control's.
        **own: the class's own arguments.
    """
    parts = job.load_parts(run, variant)
    source = RolloutSource(
        rollout_plan(run.recipe, arguments),
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


def benign_rows(run: Run, parts: job.Parts, arguments: Spread, variant: Variant) -> BenignRows | None:
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


def _benign_rate(data: DataSection, arguments: Spread) -> float:
    """Benign rows a micro-batch of a rank, a fraction too, so that they are ``data.benign_share`` of all."""
    return float(arguments.per_device_train_batch_size * data.benign_share / (1 - data.benign_share))


def benign_plan(recipe: Recipe, arguments: Spread) -> RolloutPlan | None:
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
        options=sampling_options(method.answers(recipe.train)),
        seed=data.seed,
    )


def rollout_plan(recipe: Recipe, arguments: Spread) -> RolloutPlan:
    """The training order and how its answers are sampled."""
    method, data = recipe.method, recipe.data
    assert isinstance(method, RowMethod)
    drift = method.drift
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
        strength=drift.strength,
        schedule=drift.schedule,
        options=sampling_options(method.sampling),
        seed=data.seed,
        student_share=drift.student_share,
        benign_student_share=method.benign_student_share,
    )
