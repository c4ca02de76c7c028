"""On-policy distillation from the capped self: the student samples uncapped, its capped self says what it should have said.

    accelerate launch -m trimtab.train.distill --config recipes/smollm2-135m/distill.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml -m trimtab.train.distill --config recipes/qwen3-32b/distill.yaml

The teacher is the model itself with the adapter off and the cap on: no second model in memory. Axis and floor are made first,
unless the run folder has them. Run the same command again after an interruption, and it resumes from the last checkpoint.
"""

from __future__ import annotations

import os
import sys

# `python train/distill.py` puts train/ first on the path: nothing in it may stand in the place of a package.
if (_here := os.path.dirname(os.path.realpath(__file__))) in sys.path:
    sys.path.remove(_here)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.recipes.methods import DistillMethod
from trimtab.train import job
from trimtab.train.method import Method
from trimtab.train.sft import check_prompts, toy, training_arguments

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from trimtab.pipeline.run import Run, Variant
    from trimtab.train.protocols import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return job.main(METHOD, argv)


def build_trainer(run: Run, arguments: SFTConfig, variant: Variant) -> Trainer:
    """The trainer of a run: model, adapter, floor and rollout source."""
    from trimtab.train.floor_distill import FloorDistillTrainer
    from trimtab.train.row_trainers import build_row_trainer

    method = run.recipe.method
    assert isinstance(method, DistillMethod)
    return build_row_trainer(
        FloorDistillTrainer,
        run,
        arguments,
        variant,
        divergence=method.divergence,
        jsd_beta=method.jsd_beta,
        top_k=method.top_k,
        distill_weight=method.distill_weight,
    )


METHOD = Method(DistillMethod, __doc__ or "", training_arguments, build_trainer, toy, check_prompts)

if __name__ == "__main__":
    raise SystemExit(main())
