"""DPO on pairs of the capped self's answer against the uncapped one, with the floor penalty.

    accelerate launch -m trimtab.train.dpo --config recipes/smollm2-135m/dpo.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml -m trimtab.train.dpo --config recipes/qwen3-32b/dpo.yaml

Axis, floor and pairs are made first, by the main process alone, unless the run folder has them. The pairs, ``pairs.jsonl``, are a
TRL preference dataset that any other trainer reads. Run the same command again after an interruption, and it resumes.
"""

from __future__ import annotations

import os
import sys

# `python train/dpo.py` puts train/ first on the path: nothing in it may stand in the place of a package.
if (_here := os.path.dirname(os.path.realpath(__file__))) in sys.path:
    sys.path.remove(_here)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.recipes.methods import DpoMethod
from trimtab.train import job
from trimtab.train.method import Method
from trimtab.train.sft import check_prompts

if TYPE_CHECKING:
    from trl.trainer.dpo_config import DPOConfig

    from trimtab.pipeline.run import Run, Variant
    from trimtab.train.protocols import Toy, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    return job.main(METHOD, argv)


def training_arguments(run: Run, variant: Variant, quiet: bool) -> DPOConfig:
    """TRL's DPOConfig."""
    from trl.trainer.dpo_config import DPOConfig

    return DPOConfig(**job.common_arguments(run, variant, quiet))


def build_trainer(run: Run, arguments: DPOConfig, variant: Variant) -> Trainer:
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


def toy() -> Toy:
    """Pairs of messages, for TRL's DPOTrainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    from trimtab.train.protocols import Toy

    user, good, bad = (
        [{"role": role, "content": text}] for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
    )
    return Toy(DPOTrainer, {"prompt": user, "chosen": good, "rejected": bad}, {})


METHOD = Method(DpoMethod, __doc__ or "", training_arguments, build_trainer, toy, check_prompts)

if __name__ == "__main__":
    raise SystemExit(main())
