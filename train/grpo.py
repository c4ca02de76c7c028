"""GRPO on capped rollouts: the cap comes off as training goes on, and importance ratios correct for it meanwhile.

    accelerate launch -m trimtab.train.grpo --config recipes/smollm2-135m/grpo.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml -m trimtab.train.grpo --config recipes/qwen3-32b/grpo.yaml

Axis and floor are made first, by the main process alone, unless the run folder has them. Run the same command again after an
interruption, and it resumes from the last checkpoint.
"""

from __future__ import annotations

import os
import sys

# `python train/grpo.py` puts train/ first on the path: nothing in it may stand in the place of a package.
if (_here := os.path.dirname(os.path.realpath(__file__))) in sys.path:
    sys.path.remove(_here)

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.recipes.methods import GrpoMethod
from trimtab.train import job
from trimtab.train.method import Method

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

    from trimtab.pipeline.run import Run, Variant
    from trimtab.recipes.schema import Recipe
    from trimtab.train.protocols import Toy, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return job.main(METHOD, argv)


def training_arguments(run: Run, variant: Variant, quiet: bool) -> GRPOConfig:
    """TRL's GRPOConfig."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(**{**job.common_arguments(run, variant, quiet), "remove_unused_columns": False})


def dataset_rows(recipe: Recipe, at_least: int = 1) -> list[dict[str, Any]]:
    """The training set: TRL's conversational prompts, with every user turn that the policy answers.

    Args:
        recipe: the recipe.
        at_least: as of :func:`~trimtab.train.conversations.conversation_prompts`.
    """
    from trimtab.train.conversations import conversation_prompts, messages_of

    return [{"prompt": messages_of(prompt)} for prompt in conversation_prompts(recipe, at_least)]


def build_trainer(run: Run, arguments: GRPOConfig, variant: Variant) -> Trainer:
    """The trainer of a run: model, adapter, floor, rewards and prompts."""
    import datasets

    from trimtab.train.conversations import prompts_a_generation
    from trimtab.train.floor_grpo import FloorGRPOTrainer
    from trimtab.train.rewards import bind_rewards, make_rewards
    from trimtab.train.row_trainers import benign_rows

    parts, method = job.load_parts(run, variant), run.recipe.method
    assert isinstance(method, GrpoMethod)
    rewards, weights = make_rewards([entry.model_dump() for entry in method.rewards], folder=variant.folder)
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


def toy() -> Toy:
    """A prompt and a reward, for TRL's GRPOTrainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    from trimtab.train.protocols import Toy

    def counted(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(number) for number, _ in enumerate(completions)]

    return Toy(GRPOTrainer, {"prompt": [{"role": "user", "content": "a"}]}, {"reward_funcs": counted})


def check_prompts(recipe: Recipe) -> None:
    """See :func:`trimtab.train.conversations.check_prompts`."""
    from trimtab.train import conversations

    conversations.check_prompts(recipe)


def check_arguments(arguments: GRPOConfig) -> None:
    """See :func:`trimtab.train.floor_grpo.check_checkpoints`."""
    from trimtab.train.floor_grpo import check_checkpoints

    check_checkpoints(arguments)


METHOD = Method(GrpoMethod, __doc__ or "", training_arguments, build_trainer, toy, check_prompts, check_arguments)

if __name__ == "__main__":
    raise SystemExit(main())
