"""On-policy distillation from the capped self: the student samples uncapped, its capped self says what it should have said.

    accelerate launch train/distill.py --config recipes/smollm2-135m/distill.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml train/distill.py --config recipes/qwen3-32b/distill.yaml

The teacher is the model itself with the adapter off and the cap on: no second model in memory. Axis and floor are made first,
unless the run folder has them. Run the same command again after an interruption, and it resumes from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.train import job
from trimtab.train.method import Method
from trimtab.train.sft import training_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return job.main(METHOD, argv)


def build_trainer(run: Any, arguments: Any, variant: Any) -> Any:
    """The trainer of a run: model, adapter, floor and rollout source."""
    from trimtab.train.floor_distill import FloorDistillTrainer
    from trimtab.train.row_trainers import build_row_trainer

    method = run.recipe.method
    return build_row_trainer(
        FloorDistillTrainer,
        run,
        arguments,
        variant,
        student_share=method.student_share,
        divergence=method.divergence,
        jsd_beta=method.jsd_beta,
        top_k=method.top_k,
        distill_weight=method.distill_weight,
    )


METHOD = Method("distill", __doc__ or "", "floor", training_arguments, build_trainer)

if __name__ == "__main__":
    raise SystemExit(main())
