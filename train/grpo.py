"""GRPO on capped rollouts: the cap comes off as training goes on, and importance ratios correct for it meanwhile.

    accelerate launch train/grpo.py --config recipes/smollm2-135m/grpo.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml train/grpo.py --config recipes/qwen3-32b/grpo.yaml

Axis and floor are made first, by the main process alone, unless the run folder has them. Run the same command again after an
interruption, and it resumes from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.train import job
from trimtab.train.method import Method


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return job.main(METHOD, argv)


def training_arguments(run: Any, variant: Any, quiet: bool) -> Any:
    """TRL's GRPOConfig."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(**{**job.common_arguments(run, variant, quiet), "remove_unused_columns": False})


def dataset_rows(recipe: Any, at_least: int = 1) -> list[dict[str, Any]]:
    """The training set: TRL's conversational prompts, with every user turn that the policy answers.

    Args:
        recipe: the recipe.
        at_least: as of :func:`~trimtab.train.conversations.conversation_prompts`.
    """
    from trimtab.train.conversations import conversation_prompts, messages_of

    return [{"prompt": messages_of(prompt)} for prompt in conversation_prompts(recipe, at_least)]


def build_trainer(run: Any, arguments: Any, variant: Any) -> Any:
    """The trainer of a run: model, adapter, floor, rewards and prompts."""
    import datasets

    from trimtab.train.conversations import prompts_a_generation
    from trimtab.train.floor_grpo import FloorGRPOTrainer
    from trimtab.train.rewards import bind_rewards, make_rewards
    from trimtab.train.row_trainers import benign_rows

    parts, method = job.load_parts(run, variant), run.recipe.method
    rewards, weights = make_rewards(
        [entry.model_dump() for entry in method.rewards], cache=variant.folder / "judge.jsonl"
    )
    arguments.reward_weights = weights
    trainer = FloorGRPOTrainer(
        **parts.trainer_arguments(arguments),
        reward_funcs=rewards,
        train_dataset=datasets.Dataset.from_list(dataset_rows(run.recipe, prompts_a_generation(arguments))),
        form=parts.form,
        benign_rows=benign_rows(run, parts, arguments, variant),
        cap_strength=method.cap_strength,
        cap_schedule=method.cap_schedule,
        correct_ratio=method.correct_ratio,
        ratio_level=method.ratio_level,
        ratio_beyond=method.ratio_beyond,
        ratio_limit=method.ratio_limit,
        sampling_batch=method.sampling_batch,
    )
    bind_rewards(rewards, trainer)
    return trainer


METHOD = Method("grpo", __doc__ or "", "floor", training_arguments, build_trainer)

if __name__ == "__main__":
    raise SystemExit(main())
