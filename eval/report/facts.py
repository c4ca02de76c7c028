"""What a report says of how its run was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from trimtab.axis.files import file_fingerprint, read_jsonl
from trimtab.axis.machine import machine_facts
from trimtab.eval.answers.subjects import given_files, subjects_of
from trimtab.pipeline.loading import sampling_options
from trimtab.pipeline.run import Run, git_revision
from trimtab.recipes import data


def title_of(run: Run) -> str:
    """Model and recipe, such as ``smollm2-135m: sft``; of a model or a recipe that is a path, its last name."""
    model = run.recipe.model.name.rstrip("/").rpartition("/")[2]
    return f"{model}: {run.loaded.name.rpartition('/')[2]}"


def training_facts(run: Run) -> dict[str, Any]:
    """What the training recorded, and its log."""
    variant = run.variant(control=False)
    log_rows = read_jsonl(variant.metrics) if variant.metrics.exists() else []
    return {**run.facts_of(variant.stage_name), "log": log_rows}


def repeat_facts(run: Run, model_facts: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to repeat a run: command, recipe, versions, machine, hashes, seeds and times."""
    made = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    stages = {
        path.stem: json.loads(path.read_text())["seconds"] for path in sorted((run.folder / "stages").glob("*.json"))
    }
    files = {
        "axis.safetensors": run.axis_path,
        "floor.safetensors": run.variant(control=False).floor_path,
        **{path.name: path for path in sorted(data.FOLDER.iterdir()) if path.is_file()},
    }
    overrides = " ".join(run.loaded.overrides)
    return {
        "command": f"trimtab run {run.loaded.name} {overrides}".strip(),
        "recipe": run.loaded.text,
        "overrides": list(run.loaded.overrides),
        "resolved": run.loaded.resolved,
        "versions": made["versions"],
        "git": made["git"],
        "evaluated_by": git_revision(),
        "machine": {**machine_facts(), "device": model_facts["device"], "dtype": model_facts["dtype"]},
        "hashes": {
            **{name: file_fingerprint(path) for name, path in files.items()},
            **given_files(run),
            **{name: subject.fingerprint() for name, subject in subjects_of(run).items()},
        },
        "seeds": {
            "axis": run.recipe.axis.seed,
            "data": run.recipe.data.seed,
            "train": run.recipe.train.get("seed", 0),
            "eval": run.recipe.eval.seed,
        },
        "stage_seconds": stages,
        "sampling": dataclasses.asdict(sampling_options(run.recipe.eval.sampling)),
    }
