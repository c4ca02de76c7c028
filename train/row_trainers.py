"""Trainers whose rows are rollouts made on the fly: SFT and distillation."""

from __future__ import annotations

from typing import Any

from trimtab.train import job
from trimtab.train.floor_sft import FloorCollator, FloorSFTTrainer
from trimtab.train.prepare import sampling_options
from trimtab.train.rollouts import RolloutPlan, RolloutSource, training_order
from trimtab.train.sources import benign_sources, drift_sources

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
    control: bool,
    *,
    student_share: float | None = None,
    **own: Any,
) -> FloorSFTTrainer:
    """Make a trainer and bind the rollouts to it.

    Args:
        kind: the trainer's class.
        run: the run.
        arguments: TRL's SFTConfig.
        control: whether it is the random-direction control.
        student_share: see :class:`~trimtab.train.rollouts.RolloutPlan`.
        **own: the class's own arguments.
    """
    parts, method = job.load_parts(run, control), run.recipe.method
    source = RolloutSource(
        rollout_plan(run.recipe, arguments, student_share),
        parts.form,
        parts.floor,
        run.variant(control).rollouts,
        max_length=arguments.max_length,
    )
    trainer = kind(
        **parts.trainer_arguments(arguments),
        train_dataset=source.dataset(),
        # On a CPU every new shape makes oneDNN compile its kernels anew, which costs more than the padding.
        data_collator=FloorCollator(
            pad_token_id=parts.tokenizer.pad_token_id, pad_to_multiple_of=32 if parts.device.type == "cpu" else None
        ),
        benign_kl_weight=method.benign_kl_weight,
        benign_axis_weight=method.benign_axis_weight,
        **own,
    )
    source.bind(trainer)
    return trainer


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
    )
