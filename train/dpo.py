"""DPO on pairs of the capped self's answer against the uncapped one, with the axis-floor penalty.

    accelerate launch train/dpo.py --config recipes/smollm2-135m/dpo.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml train/dpo.py --config recipes/qwen3-32b/dpo.yaml

Axis, floor and pairs are made first, by the main process alone, unless the run folder has them. The pairs, ``pairs.jsonl``, are a
TRL preference dataset that any other trainer reads. Run the same command again after an interruption, and it resumes.
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
    """TRL's DPOConfig."""
    from trl.trainer.dpo_config import DPOConfig

    return DPOConfig(**job.common_arguments(run, variant, quiet))


def build_trainer(run: Any, arguments: Any, variant: Any) -> Any:
    """The trainer of a run: model, adapter, floor and pairs."""
    import datasets

    from trimtab.axis.files import read_jsonl
    from trimtab.train.floor_dpo import FloorDPOTrainer
    from trimtab.train.row_trainers import benign_rows

    parts = job.load_parts(run, variant)
    columns = ("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids", "chosen_ended", "rejected_ended")
    pairs = [{name: row.get(name) for name in columns} for row in read_jsonl(variant.pairs)]
    return FloorDPOTrainer(
        **parts.trainer_arguments(arguments),
        form=parts.form,
        train_dataset=datasets.Dataset.from_list(pairs),
        benign_rows=benign_rows(run, parts, arguments, variant),
    )


METHOD = Method("dpo", __doc__ or "", "pairs", training_arguments, build_trainer)

if __name__ == "__main__":
    raise SystemExit(main())
