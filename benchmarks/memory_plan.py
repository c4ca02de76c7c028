"""The memory plan of ``trimtab check``, and its estimate of time, against what a GPU used: random weights of the real shapes.

    python benchmarks/memory_plan.py --folder runs/plan      # four methods, 4B and 8B, one GPU of 80 GB
    python benchmarks/memory_plan.py --folder /dev/shm/plan --recipes llama-3.1-8b/sft --length 1024

No weights are fetched: a model is made from the figures of its ``config.json`` (``tests/model_configs.json``), and SmolLM2's
tokenizer reads for it. Such a model never ends an answer, so the longest row is about as long as the recipe allows, as the plan
takes it.
The stages, the trainers and the adapters are the recipe's own, for a few steps. *Used* is the most that PyTorch's allocator had
given out, and had reserved, in each phase; the plan is told without the CUDA context, which the allocator does not see. The table
goes to ``<folder>/memory.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from measuring import facts_of_now
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from trimtab.axis.files import write_json, write_text
from trimtab.axis.layers import text_config_of
from trimtab.axis.models import load_tokenizer
from trimtab.cli.calls import count
from trimtab.cli.check import (
    CONTEXT,
    GIB,
    ROLLOUTS,
    TRAINING,
    build_meta_model,
    find_structure,
    plan_memory,
    strategy_of,
)
from trimtab.cli.launch import resolve_accelerate_config
from trimtab.cli.work import estimate_work
from trimtab.pipeline.run import open_run
from trimtab.recipes.loader import LoadedRecipe, load_recipe
from trimtab.train.method import method_of
from trimtab.train.pairs import rollouts_stage

CONFIGS = Path(__file__).resolve().parent.parent / "tests" / "model_configs.json"
RECIPES = ("qwen3-4b/distill", "qwen3-4b/grpo", "llama-3.1-8b/sft", "llama-3.1-8b/dpo")
# The stages before training are not what is measured.
SHORT = [
    "axis.roles=2", "axis.held_out_roles=1", "axis.questions=3", "axis.default_repeats=2", "axis.sampling.max_new_tokens=6",
    "floor.pool=12", "floor.drift_rows=4", "floor.min_firing=0", "data.drift_prompts=16", "data.role_questions=0",
    "data.conversation_turns=0", "train.save_strategy=no",
]  # fmt: skip
PROMPT = 96  # tokens of the longest prompt, about
HEAD = ["recipe", "phase", "plan, GiB", "used", "reserved", "plan / used", "seconds", "estimate / measured"]


def overrides(name: str, model: Path, length: int, steps: int) -> list[str]:
    """What a recipe is told, so that its rows have so many tokens and it ends after so many steps."""
    method = load_recipe(name).recipe.method
    own = [f"train.max_completion_length={length}"] if method.trains_conversations else [
        f"train.max_length={length}", f"method.sampling.max_new_tokens={length - PROMPT}", "method.sampling.batch_size=16",
    ]  # fmt: skip
    return [f"model.name={model}", *SHORT, *own, f"train.max_steps={steps}", "train.warmup_steps=0"]


def make_model(name: str, folder: Path) -> None:
    """Write random weights of a known model's shapes, with SmolLM2's tokenizer, unless they are there."""
    if (folder / "tokenizer.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", json.loads(CONFIGS.read_text(encoding="utf-8"))[name])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer("smollm2-135m").save_pretrained(folder)


class Phases(TrainerCallback):
    """Peak memory and seconds of rollouts and of training: answers are sampled before a step begins, but by GRPO within it."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[float]]] = {}
        self._turn()

    def _turn(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.started = time.perf_counter()

    def _end(self, phase: str) -> None:
        torch.cuda.synchronize()
        own = self.found.setdefault(phase, {"used": [], "reserved": [], "seconds": []})
        own["used"].append(torch.cuda.max_memory_allocated() / GIB)
        own["reserved"].append(torch.cuda.max_memory_reserved() / GIB)
        own["seconds"].append(time.perf_counter() - self.started)
        self._turn()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """What came before was sampling."""
        self._end(ROLLOUTS)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """What came before was training."""
        self._end(TRAINING)


def measure(loaded: LoadedRecipe, folder: Path) -> dict[str, dict[str, float]]:
    """Train the recipe in this process; the peaks of each phase, its seconds over the run."""
    method = method_of(loaded.recipe)
    run = open_run(loaded, output_dir=str(folder))
    rollouts_stage(run)
    gc.collect()
    torch.cuda.empty_cache()
    variant = run.variant(control=False)
    trainer = method.trainer(run, method.arguments(run, variant, True), variant)
    phases = Phases()
    trainer.add_callback(phases)
    trainer.train()
    return {
        phase: {"used": max(own["used"]), "reserved": max(own["reserved"]), "seconds": sum(own["seconds"])}
        for phase, own in phases.found.items()
    }


def rows_of(name: str, loaded: LoadedRecipe, measured: dict[str, dict[str, float]]) -> list[list[str]]:
    """The table's rows of a recipe."""
    recipe = loaded.recipe
    model = build_meta_model(recipe)
    structure, config = find_structure(recipe, model), text_config_of(model)
    gpu = torch.cuda.get_device_properties(0).total_memory / GIB
    strategy, counted = strategy_of(resolve_accelerate_config("single"), None), count(recipe, 1)
    plan = plan_memory(recipe, structure, config, strategy, counted, gpu)
    work = estimate_work(
        recipe, counted, structure.parameters, structure.active, structure.layers, sharded=False, processes=1
    )
    planned = {phase: plan.total(phase) - CONTEXT for phase in (TRAINING, ROLLOUTS)}
    seconds = {TRAINING: work.steps, ROLLOUTS: work.rollouts}
    if recipe.method.trains_conversations:  # both within a step
        measured = {"both": measured[TRAINING]}
        planned, seconds = {"both": max(planned.values())}, {"both": sum(seconds.values())}
    if recipe.method.makes_pairs:  # its answers are sampled before training
        measured = {TRAINING: measured[TRAINING]}
    return [
        [
            name, phase, f"{planned[phase]:.1f}", f"{own['used']:.1f}", f"{own['reserved']:.1f}",
            f"{planned[phase] / own['used']:.2f}", f"{own['seconds']:.1f}", f"{seconds[phase] / own['seconds']:.2f}",
        ]
        for phase, own in measured.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/plan"), help="models and runs go here: 25 GB for all")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="in this process; by default each recipe has its own")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    folder = given.folder.resolve()
    if not given.here:
        lines = [f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD))]
        for name in given.recipes:
            command = [sys.executable, __file__, "--here", "--folder", str(folder), "--recipes", name]
            command += ["--length", str(given.length), "--steps", str(given.steps)]
            if subprocess.run(command, check=False).returncode == 0:
                rows = json.loads((folder / name.replace("/", "-") / "memory.json").read_text(encoding="utf-8"))
                lines += [f"| {' | '.join(row)} |" for row in rows]
            else:
                lines.append(f"| {name} | failed |")
            write_text(folder / "memory.md", "\n".join(lines) + f"\n\n{facts_of_now()}\n")
        print("\n".join(lines))
        return
    (name,) = given.recipes
    model, run = folder / "models" / name.split("/")[0], folder / name.replace("/", "-")
    make_model(load_recipe(name).recipe.model.name, model)
    loaded = load_recipe(name, overrides(name, model, given.length, given.steps))
    shutil.rmtree(run, ignore_errors=True)
    rows = rows_of(name, loaded, measure(loaded, run))
    write_json(run / "memory.json", rows)


if __name__ == "__main__":
    main()
