"""The run folder: resolved recipe, versions, git revision, stage records, metrics; resumed or refused, never overwritten."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.files import fingerprint, read_json, write_json, write_text
from trimtab.recipes.loader import LoadedRecipe
from trimtab.recipes.schema import Recipe, deciding

log = logging.getLogger("trimtab")

MARKER = "run.json"
STARTS = ("tuned", "base")  # what a further fine-tuning may begin from
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "deepspeed",
    "safetensors",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Versions of Python, trimtab and the libraries that decide a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("trimtab", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_revision() -> str:
    """Revision of the checkout that trimtab runs from, with ``-dirty`` for local changes; "not a checkout" for a wheel."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
    return result.stdout.strip()


@dataclass(frozen=True)
class Run:
    """One job's folder.

    Attributes:
        folder: the run folder.
        recipe: the recipe.
        loaded: the recipe as loaded, with its text and path.
    """

    folder: Path
    recipe: Recipe
    loaded: LoadedRecipe

    @property
    def axis_path(self) -> Path:
        """The training axis."""
        return self.folder / "axis.safetensors"

    @property
    def held_out_axis_path(self) -> Path:
        """The axis of held-out roles."""
        return self.folder / "axis_held_out.safetensors"

    @property
    def rollouts_path(self) -> Path:
        """Rollouts behind the axis."""
        return self.folder / "axis" / "rollouts.jsonl"

    def variant(self, control: bool) -> Variant:
        """Where the adapter of the run, or of its random-direction control, lies."""
        return Variant(self.folder / "control", "train_control") if control else Variant(self.folder, "train")

    def further(self, start: str, tuning: str) -> Variant:
        """Where the adapter lies that a further fine-tuning gives.

        Args:
            start: the weights it began from, one of :data:`STARTS`.
            tuning: name of the fine-tuning.
        """
        return Variant(self.folder / "durability" / f"{start}-{tuning}", f"durability_{start}_{tuning}")

    def stage(
        self,
        name: str,
        inputs: Any,
        work: Callable[[], dict[str, Any]],
        *,
        remedy: str = "choose another --output-dir, or delete the run folder if it is not needed",
    ) -> dict[str, Any]:
        """Run ``work`` unless it is recorded as done with these very inputs; record what it returns.

        Args:
            name: stage.
            inputs: everything the stage depends on, JSON-able; its hash is the key of the record.
            work: returns JSON-able facts.
            remedy: for when it was done with other inputs.
        """
        path = self.folder / "stages" / f"{name}.json"
        if path.exists():
            record = read_json(path)
            if record["key"] == fingerprint(inputs):
                log.info("%s: done already, %s", name, path)
                facts: dict[str, Any] = record["facts"]
                return facts
            raise UserError(
                f"stage {name} was done with other inputs",
                file=path,
                remedy=remedy,
            )
        started = time.monotonic()
        return self.record(name, inputs, work(), seconds=time.monotonic() - started)

    def record(self, name: str, inputs: Any, facts: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """Record a stage as done with these inputs; returns ``facts``."""
        write_json(self.folder / "stages" / f"{name}.json", {
            "key": fingerprint(inputs),
            "seconds": round(seconds, 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "facts": facts,
        })  # fmt: skip
        return facts

    def stage_record(self, name: str) -> dict[str, Any] | None:
        """The record of a stage, or None if it has not been done."""
        path = self.folder / "stages" / f"{name}.json"
        found: dict[str, Any] | None = read_json(path) if path.exists() else None
        return found


@dataclass(frozen=True)
class Variant:
    """A trained adapter's place: of the run itself, of its control, or of a further fine-tuning.

    Attributes:
        folder: where it all lies.
        stage_name: name of the training stage's record.
    """

    folder: Path
    stage_name: str

    @property
    def floor_path(self) -> Path:
        """The floor that was trained against."""
        return self.folder / "floor.safetensors"

    @property
    def adapter(self) -> Path:
        """What PEFT writes."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The trainer's own output folder."""
        return self.folder / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Training rollouts."""
        return self.folder / "rollouts"

    @property
    def pairs(self) -> Path:
        """DPO's preference pairs."""
        return self.folder / "pairs.jsonl"

    @property
    def metrics(self) -> Path:
        """The trainer's log, one JSON object a line."""
        return self.folder / "metrics.jsonl"


def open_run(loaded: LoadedRecipe, *, output_dir: str | None = None) -> Run:
    """Open or make the run folder of a recipe.

    The folder is ``output_dir``, else ``train.output_dir`` of the recipe, else ``runs/<recipe name>`` below the working
    directory.

    Raises:
        UserError: if the folder was made from another recipe, or is not empty and not a run folder.
    """
    folder = run_folder(loaded, output_dir)
    identity = recipe_identity(loaded)
    marker = folder / MARKER
    if marker.exists():
        found = read_json(marker)
        if found.get("recipe_hash") != identity:
            raise UserError(
                "this run folder was made from another recipe",
                file=folder,
                remedy="choose another --output-dir, or delete the folder if it is not needed",
            )
    elif folder.exists() and any(not path.name.startswith(f".{MARKER}.") for path in folder.iterdir()):
        raise UserError(
            "this folder is not empty and is not a run folder",
            file=folder,
            remedy="choose a new folder with --output-dir",
        )
    else:
        # The marker comes first: a kill before it leaves at most its temporary file, which is no obstacle the next time.
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, {
            "recipe": loaded.name,
            "recipe_hash": identity,
            "resolved": loaded.resolved,
            "command": " ".join(sys.argv),
            "versions": versions(),
            "git": git_revision(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        })  # fmt: skip
    if not (folder / "recipe.yaml").exists():
        write_text(folder / "recipe.yaml", loaded.text)
    return Run(folder, loaded.recipe, loaded)


def run_folder(loaded: LoadedRecipe, output_dir: str | None) -> Path:
    """The run folder of a recipe, whether it is there or not."""
    chosen = output_dir or loaded.recipe.train.get("output_dir") or f"runs/{loaded.name.replace('/', '-')}"
    return Path(chosen).expanduser().resolve()


ELSEWHERE = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps")


def recipe_identity(loaded: LoadedRecipe) -> str:
    """Hash of what makes a run: the resolved recipe without the place it writes to and without what is measured.

    Measuring has a record of its own, and a trained run may be measured again in another way; whether there is a control decides
    what is trained. How the rows of a step are spread over processes and micro-batches is no part of it: training itself holds
    their number, see :func:`trimtab.train.job.check_spread`.
    """
    resolved = dict(deciding(loaded.resolved))
    resolved["train"] = {key: value for key, value in resolved.get("train", {}).items() if key not in ELSEWHERE}
    resolved["eval"] = {"control": resolved["eval"]["control"]}
    return fingerprint(resolved)
