"""SFT on capped rollouts with the floor penalty.

    accelerate launch -m trimtab.train.sft --config recipes/smollm2-135m/sft.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml -m trimtab.train.sft --config recipes/qwen3-32b/sft.yaml
    accelerate launch -m trimtab.train.sft --config smollm2-135m/sft train.learning_rate=1e-4 --output_dir runs/lower-rate

Axis and floor are made first, by the main process alone, unless the run folder has them already. The adapter is written to
``<run folder>/adapter``, and any stack that reads PEFT adapters loads it with no trace of trimtab. Run the same command again
after an interruption, and it resumes from the last checkpoint.
"""

from __future__ import annotations

import os
import sys

# `python train/sft.py` puts train/ first on the path: nothing in it may stand in the place of a package.
if (_here := os.path.dirname(os.path.realpath(__file__))) in sys.path:
    sys.path.remove(_here)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.recipes.methods import SftMethod
from trimtab.train import job
from trimtab.train.method import Method

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from trimtab.pipeline.run import Run, Variant
    from trimtab.recipes.schema import Recipe
    from trimtab.train.protocols import Toy, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return job.main(METHOD, argv)


def training_arguments(run: Run, variant: Variant, quiet: bool) -> SFTConfig:
    """TRL's SFTConfig."""
    from trl.trainer.sft_config import SFTConfig

    from trimtab.recipes.library_fields import VLLM_KEYS
    from trimtab.train.row_trainers import ROW_ARGUMENTS

    own = {key: value for key, value in job.common_arguments(run, variant, quiet).items() if key not in VLLM_KEYS}
    return SFTConfig(**own, **ROW_ARGUMENTS)


def build_trainer(run: Run, arguments: SFTConfig, variant: Variant) -> Trainer:
    """The trainer of a run: model, adapter, floor and rollout source."""
    from trimtab.train.floor_sft import FloorSFTTrainer
    from trimtab.train.row_trainers import build_row_trainer

    method = run.recipe.method
    assert isinstance(method, SftMethod)
    return build_row_trainer(FloorSFTTrainer, run, arguments, variant, ce_weight=method.ce_weight)


def toy() -> Toy:
    """Rows of tokens, for TRL's SFTTrainer."""
    from trl.trainer.sft_trainer import SFTTrainer

    from trimtab.train.protocols import Toy

    return Toy(SFTTrainer, {"input_ids": [3, 4, 1], "labels": [-100, 4, 1]}, {})


def check_prompts(recipe: Recipe) -> None:
    """See :func:`trimtab.train.sources.check_rows`."""
    from trimtab.train.sources import check_rows

    check_rows(recipe)


METHOD = Method(SftMethod, __doc__ or "", training_arguments, build_trainer, toy, check_prompts)

if __name__ == "__main__":
    raise SystemExit(main())
