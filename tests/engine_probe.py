"""What accelerate launches in test_engines.py: ``train/sft.py`` itself, and a note of the engine that it really ran on.

Each rank writes ``$TRIMTAB_PROBE/rank-<n>.json`` at its first training step. A config that is silently ignored (several are, on
a CPU) shows there: in the wrapper around the model, the world size, and the parameters that are in pieces.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

from trimtab.train import floor_sft

SCRIPT = Path(__file__).resolve().parent.parent / "train" / "sft.py"


class ProbedTrainer(floor_sft.FloorSFTTrainer):
    """The trainer, which looks at what it runs on before its first step."""

    noted = False

    def training_step(self, model: Any, *arguments: Any, **settings: Any) -> Any:
        if not self.noted:
            self.noted = True
            weights = list(self.model.parameters())
            sharded = [p for p in weights if hasattr(p, "ds_status") and p.numel() == 0 and p.ds_numel > 0]
            accelerator = self.accelerator
            facts = {
                "distributed_type": accelerator.distributed_type.value,
                "processes": accelerator.num_processes,
                "wrapper": type(model).__name__,
                "zero_stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
                "weights": len(weights),
                "sharded": len(sharded),
            }
            path = Path(os.environ["TRIMTAB_PROBE"]) / f"rank-{accelerator.process_index}.json"
            path.write_text(json.dumps(facts), encoding="utf-8")
        return super().training_step(model, *arguments, **settings)


floor_sft.FloorSFTTrainer = ProbedTrainer  # type: ignore[misc]
runpy.run_path(str(SCRIPT), run_name="__main__")
