"""SFT on capped rollouts with the axis-floor penalty.

    accelerate launch train/sft.py --config recipes/smollm2-135m/sft.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml train/sft.py --config recipes/qwen3-32b/sft.yaml
    accelerate launch train/sft.py --config smollm2-135m/sft train.learning_rate=1e-4 --output_dir runs/lower-rate

Axis and floor are made first, by the main process alone, unless the run folder has them already. The adapter is written to
``<run folder>/adapter``, and any stack that reads PEFT adapters loads it with no trace of trimtab. Run the same command again
after an interruption, and it resumes from the last checkpoint.
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
    """TRL's SFTConfig."""
    from trl.trainer.sft_config import SFTConfig

    from trimtab.recipes.library_fields import VLLM_KEYS
    from trimtab.train.row_trainers import ROW_ARGUMENTS

    own = {key: value for key, value in job.common_arguments(run, variant, quiet).items() if key not in VLLM_KEYS}
    return SFTConfig(**own, **ROW_ARGUMENTS)


def build_trainer(run: Any, arguments: Any, variant: Any) -> Any:
    """The trainer of a run: model, adapter, floor and rollout source."""
    from trimtab.train.floor_sft import FloorSFTTrainer
    from trimtab.train.row_trainers import build_row_trainer

    return build_row_trainer(FloorSFTTrainer, run, arguments, variant, ce_weight=run.recipe.method.ce_weight)


METHOD = Method("sft", __doc__ or "", "floor", training_arguments, build_trainer)

if __name__ == "__main__":
    raise SystemExit(main())
