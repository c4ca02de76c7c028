"""Every way of baking, side by side: one axis, one floor, the same prompts and LoRA, about as many minutes, judged uncapped.

    python benchmarks/methods.py --folder runs/methods                      # all arms, three seeds: many hours on a CPU
    python benchmarks/methods.py --folder runs/methods --arms sft distill --seeds 1

Axis, floor and the base's answers are made once and shared. Each arm is a shipped recipe with a few overrides, printed below the
table. Run the same command again after an interruption: what is done stays done. The table is written to ``<folder>/methods.md``,
its numbers to ``methods.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from trimtab.axis.logs import setup_logging
from trimtab.cli.launch import launch_training
from trimtab.eval.report import load_report
from trimtab.eval.stages import eval_stage, report_stage
from trimtab.recipes.loader import LoadedRecipe, load_recipe
from trimtab.train.prepare import rollouts_stage
from trimtab.train.run import Run, open_run

# The same for all, so that the arms share their axis and their base answers.
EVAL = [
    "eval.roles=68", "eval.questions=3", "eval.conversations=8", "eval.turns=4", "eval.benign=48", "eval.professional=0",
    "eval.reextract_roles=0", "eval.probe_rows=0", "eval.transcripts=3", "eval.control=false", "eval.capability=[]",
    "eval.tuned_cap=false",
]  # fmt: skip
ARMS: dict[str, tuple[str, list[str]]] = {
    "SFT": ("sft", ["method.cap_strength=0", "method.floor_weight=0"]),
    "capped SFT": ("sft", ["method.floor_weight=0"]),
    "floor only": ("floor", []),
    "capped SFT + floor": ("sft", []),
    "distillation": ("distill", ["method.floor_weight=0"]),
    "distillation + floor": ("distill", []),
    "GRPO": ("grpo", ["method.floor_weight=0"]),
    "GRPO + floor": ("grpo", []),
    "GRPO without the ratio": ("grpo", ["method.floor_weight=0", "method.correct_ratio=false"]),
    "DPO": ("dpo", ["method.floor_weight=0"]),
    "DPO + floor": ("dpo", []),
}
COLUMNS = {
    "text_llr": "text-only behaviour",
    "z_held_out": "z, held-out axis",
    "z_conversations": "z, conversations",
    "kl_capped_self": "KL to the capped self",
}
EFFECTS = {
    "benign_kl": "benign KL",
    "default_z_shift": "z-shift, free",
    "default_z_shift_same_text": "z-shift, same text",
    "repetition_change": "repetition",
}


def recipe_of(arm: str, model: str, seed: int, extra: list[str]) -> LoadedRecipe:
    """The recipe of an arm and a seed."""
    name, overrides = ARMS[arm]
    seeds = [f"train.seed={seed}", f"data.seed={seed}"]
    return load_recipe(f"{model}/{name}", [*EVAL, *overrides, *seeds, *extra])


def share(shared: Run, run: Run) -> None:
    """Give a run the axis, the floor and the base's answers of another; its own stages take them where their inputs agree."""
    for name in ("axis", "axis.safetensors", "axis_held_out.safetensors", "floor.safetensors", "floor.json"):
        source, target = shared.folder / name, run.folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)
    (run.folder / "stages").mkdir(exist_ok=True)
    for stage in ("axis", "floor"):
        if not (run.folder / "stages" / f"{stage}.json").exists():
            shutil.copy(shared.folder / "stages" / f"{stage}.json", run.folder / "stages")
    (run.folder / "eval").mkdir(exist_ok=True)
    for pattern in ("*-base.*", "*-base-cap.*"):
        for path in (shared.folder / "eval").glob(pattern):
            if not (run.folder / "eval" / path.name).exists():
                shutil.copy(path, run.folder / "eval")


def play(arm: str, seed: int, folder: Path, model: str, extra: list[str], first: Run | None) -> Run:
    """Train and evaluate one arm with one seed, unless that is done."""
    loaded = recipe_of(arm, model, seed, extra)
    run = open_run(loaded, output_dir=str(folder / f"{arm.replace(' ', '-')}-{seed}"))
    if first is not None:
        share(first, run)
    rollouts_stage(run)
    launch_training(loaded, run.folder, loaded.recipe.method.name, accelerate=None)
    eval_stage(run)
    report_stage(run)
    return run


def figures_of(run: Run) -> dict[str, Any]:
    """What the table shows of a run."""
    report = load_report(run.folder / "report.json")
    metrics = {metric.id: metric for metric in report.metrics}
    effects = {effect.id: effect.estimate for effect in report.side_effects}
    training = (run.stage_record("train") or {"facts": {}})["facts"]
    kept = {key: metrics[key].retention.estimate for key in COLUMNS if key in metrics}
    return {
        "retention": {key: None if value is None else value.model_dump() for key, value in kept.items()},
        "effects": {key: effects[key].model_dump() for key in EFFECTS if key in effects},
        "minutes": training.get("minutes"),
        "peak_gib": training.get("peak_gib"),
        "steps": training.get("steps"),
    }


def _cell(values: list[dict[str, float] | None]) -> str:
    there = [value for value in values if value is not None]
    if len(there) < len(values) or not there:
        return "undefined"
    mean, low, high = (statistics.mean(value[key] for value in there) for key in ("value", "low", "high"))
    seeds = f" ({', '.join(format(value['value'], '.2f') for value in there)})" if len(there) > 1 else ""
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]{seeds}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The table in Markdown: retention and prices, means over seeds of values and interval ends, the seeds in brackets."""
    head = ["method", *(f"retention: {name}" for name in COLUMNS.values()), *EFFECTS.values(), "minutes", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, runs in results.items():
        cells = [arm]
        cells += [_cell([run["retention"].get(key) for run in runs]) for key in COLUMNS]
        for key in EFFECTS:
            values = [run["effects"].get(key) for run in runs]
            cells.append(
                "-" if None in values else f"{statistics.mean(value['value'] for value in values):+.3f}"  # type: ignore[index]
            )
        for key in ("minutes", "peak_gib"):
            known = [run[key] for run in runs if run[key] is not None]
            cells.append(f"{statistics.mean(known):.1f}" if known else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument(
        "--model", default="smollm2-135m", help="folder of recipes that has sft, floor, distill, grpo and dpo"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="overrides of every arm")
    arguments = parser.parse_args()
    setup_logging()
    folder: Path = arguments.folder
    first: Run | None = None
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for arm in arguments.arms:
            run = play(arm, seed, folder, arguments.model, arguments.set, first)
            first = first or run
            results.setdefault(arm, []).append(figures_of(run))
            (folder / "methods.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
            (folder / "methods.md").write_text(table(results), encoding="utf-8")
            print(table(results))
    for arm in arguments.arms:
        name, overrides = ARMS[arm]
        print(f"{arm}: {arguments.model}/{name} {' '.join(overrides)}")


if __name__ == "__main__":
    main()
