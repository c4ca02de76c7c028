"""Every engine x method on two CPU processes or on GPUs: the adapter's difference to one process, time, memory, resumption.

    python benchmarks/engines.py --folder runs/engines              # all: 32 short trainings, about ten minutes on two cores
    python benchmarks/engines.py --folder runs/engines --engines zero3-cpu fsdp2 --methods grpo
    python benchmarks/engines.py --folder runs/engines --gpu        # the shipped GPU files over NCCL, on all GPUs

A tiny random model, 4 optimiser steps, the recipes of ``tests/tiny_recipe.py``: what is measured is whether the engines agree,
not how fast they are. Time and memory are beside one process in the same run. For resumption the last checkpoint is taken away
with the adapter, and the same command is run again. The table is written to ``<folder>/engines.md``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from conftest import save_model
from tiny_recipe import adapter, largest_difference, launch

ENGINES = ("ddp-cpu", "zero2-cpu", "zero3-cpu", "fsdp2")
GPU_ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
METHODS = ("sft", "distill", "grpo", "dpo")
HEAD = ["method", "engine", "adapter - one process", "after a resume", "step time", "peak memory a rank"]


def resumed(engine: str, method: str, model: Path, folder: Path, whole: Path, gpus: int) -> float:
    """Largest difference of an adapter that was resumed from the checkpoint in the middle."""
    again = folder / "again"
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    copy = again / whole.name
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("adapter", "checkpoint-4"))
    (copy / "stages" / "train.json").unlink()
    _, notes = launch(engine, method, model, again, resume=True, gpus=gpus)
    assert all(note["from_step"] == 2 for note in notes), notes
    difference: float = largest_difference(adapter(copy), adapter(whole))
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/engines"), help="must be empty")
    parser.add_argument("--engines", nargs="+", choices=sorted({*ENGINES, *GPU_ENGINES}))
    parser.add_argument(
        "--gpu", action="store_true", help="on GPUs; where there is but one, each engine runs one process"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    given = parser.parse_args()
    gpus = torch.cuda.device_count() if given.gpu else 0
    if given.gpu and not gpus:
        parser.error("--gpu: torch sees no GPU")
    engines = given.engines or (GPU_ENGINES if given.gpu else ENGINES)
    folder = given.folder.resolve()
    folder.mkdir(parents=True)
    model = folder / "model"
    save_model(model)
    table = [HEAD, ["---"] * len(HEAD)]
    for method in given.methods:
        alone, (one,) = launch("single" if gpus else "cpu", method, model, folder, gpus=min(gpus, 1))
        for engine in engines:
            run, notes = launch(engine, method, model, folder, gpus=gpus)
            step = max(statistics.median(note["step_seconds"]) for note in notes)
            table.append([
                method, engine,
                f"{largest_difference(adapter(run), adapter(alone)):.1e}",
                f"{resumed(engine, method, model, folder, run, gpus):.1e}",
                f"{step / statistics.median(one['step_seconds']):.1f}",
                f"{max(note['peak'] for note in notes) / one['peak']:.2f}",
            ])  # fmt: skip
            (folder / "engines.md").write_text("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")
            print(*table[-1], sep="  ", flush=True)
    print(f"table: {folder / 'engines.md'}")


if __name__ == "__main__":
    main()
