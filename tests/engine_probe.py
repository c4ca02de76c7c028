"""What accelerate launches in test_engines.py: an entry script itself, and a note of the engine that it really ran on.

Each rank writes ``$TRIMTAB_PROBE/rank-<n>.json`` when training ends. A config that is silently ignored (several are, on a CPU)
shows there: in the wrapper around the model, the world size, and the parameters that are in pieces.

FSDP2 does not start on a CPU by itself: accelerate makes DDP of it, without a word. ``fsdp2...`` in ``$TRIMTAB_ENGINE`` opens a
way that only tests take: gloo under the type of several GPUs, on the CPU's tensors.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerCallback
from trl.distributed import DistributedBackend

from trimtab.axis.adapters import merged_weights
from trimtab.train.job import peak_memory

ROOM = 48 << 10  # bytes that are left on a disk which is filled, too few for a checkpoint


class Probe(TrainerCallback):
    """Looks at what the trainer runs on at its first step, and times the others."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.facts: dict[str, Any] = {}
        self.starts: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.starts.append(time.perf_counter())
        _break(self.trainer)
        if self.facts:
            return
        trainer, accelerator = self.trainer, self.trainer.accelerator
        weights = list(trainer.model.parameters())
        model = trainer.model_wrapped
        self.facts = {
            "distributed_type": accelerator.distributed_type.value,
            "processes": accelerator.num_processes,
            "wrapper": type(model).__name__,
            "zero_stage": model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None,
            "weights": len(weights),
            "sharded": sum(map(_in_pieces, weights)),
            "from_step": trainer.state.global_step,
            "checkpointing": sorted({kind for module in trainer.model.modules() for kind in _checkpointing(module)}),
        }

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.starts.append(time.perf_counter())
        steps = [later - earlier for earlier, later in zip(self.starts, self.starts[1:], strict=False)]
        peak = peak_memory()
        path = Path(os.environ["TRIMTAB_PROBE"]) / f"rank-{self.trainer.accelerator.process_index}.json"
        facts = {**self.facts, "step_seconds": steps, "peak": peak, "sent": self._sent()}
        path.write_text(json.dumps(facts), encoding="utf-8")

    def _sent(self) -> dict[str, list[float]]:
        """Sum and norm of each weight that a sampler would be sent."""
        if os.environ.get("TRIMTAB_QUANTIZATION"):
            return {}
        gathered = DistributedBackend(self.trainer.accelerator).gather_params
        weights = merged_weights(self.trainer.model, gathered=gathered)
        return {name: [float(weight.sum()), float(weight.norm())] for name, weight in weights}


def _break(trainer: Any) -> None:
    """Break one rank, or its disk, at one step as ``$TRIMTAB_BREAK`` says: ``nan``, ``kill`` or ``full``, ``:<rank>:<step>``."""
    how, rank, step = (os.environ.get("TRIMTAB_BREAK") or "no:0:0").split(":")
    if how == "no" or (trainer.accelerator.process_index, trainer.state.global_step) != (int(rank), int(step)):
        return
    (Path(os.environ["TRIMTAB_PROBE"]) / "broken").touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "full":
        folder = Path(trainer.args.output_dir)
        (folder.parent.parent / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - ROOM))
        return
    weight = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
    weight.data.fill_(float("nan"))


def _in_pieces(weight: Any) -> bool:
    """Whether this rank holds but a part: ZeRO-3 keeps none while it is not in use, FSDP2 a shard."""
    zero3 = hasattr(weight, "ds_status") and weight.numel() == 0 and weight.ds_numel > 0
    return zero3 or hasattr(weight, "device_mesh")


def _checkpointing(module: Any) -> list[str]:
    """How a module's forward is checkpointed in training, if it is."""
    if not getattr(module, "gradient_checkpointing", False):
        return []
    reentrant = module._gradient_checkpointing_func.keywords.get("use_reentrant")
    return ["reentrant" if reentrant else "non-reentrant"]


def _several_gpus_without_one() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]


def _weights_of_4_bits_as_on_a_gpu() -> None:
    """On a CPU with bfloat16 bitsandbytes packs a weight anew at its first use, in place: a sharded one doesn't outlive that."""
    import bitsandbytes.nn.modules as layers

    layers.has_avx512bf16 = lambda: False


_init = Trainer.__init__


def _probed(self: Any, *arguments: Any, **settings: Any) -> None:
    _init(self, *arguments, **settings)
    self.add_callback(Probe(self))


if __name__ == "__main__":
    Trainer.__init__ = _probed  # type: ignore[method-assign]
    if os.environ["TRIMTAB_ENGINE"].startswith("fsdp2"):
        _several_gpus_without_one()
    if os.environ.get("TRIMTAB_QUANTIZATION") == "nf4":
        _weights_of_4_bits_as_on_a_gpu()
    runpy.run_module(f"trimtab.train.{os.environ['TRIMTAB_METHOD']}", run_name="__main__", alter_sys=True)
