"""The run folder: resolved recipe, versions, git revision, stage records, metrics; resumed or refused, never overwritten.

``run.json`` and ``recipe.yaml`` hold the recipe as it was last opened, and what was changed since the folder was made. Each
stage's record holds what that stage was made from, which is what it holds the run to: see :mod:`trimtab.pipeline.identity`.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.files import file_fingerprint, fingerprint, read_json, write_json, write_text
from trimtab.pipeline.identity import READS, Inputs, differences, flat, plays_training_roles, stage_inputs
from trimtab.recipes.gone import GONE
from trimtab.recipes.loader import LoadedRecipe
from trimtab.recipes.schema import Recipe

log = logging.getLogger("trimtab")

MARKER = "run.json"
BEGUN = "begun.json"  # beside what a stage has made so far: what it is made from
STARTS = ("tuned", "base")  # what a durability run may begin from
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


@functools.cache
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
        """The axis of held-out roles and questions."""
        return self.folder / "axis_held_out.safetensors"

    @property
    def rollouts_path(self) -> Path:
        """Rollouts behind the training axis."""
        return self.folder / "axis" / "rollouts.jsonl"

    @property
    def held_out_rollouts_path(self) -> Path:
        """Rollouts behind the held-out axis."""
        return self.folder / "axis_held_out" / "rollouts.jsonl"

    @property
    def played_path(self) -> Path:
        """Rollouts that calibrate the floor and that the probe reads: the held-out ones where no training role is played."""
        return self.rollouts_path if plays_training_roles(self.loaded.resolved) else self.held_out_rollouts_path

    def variant(self, control: bool) -> Variant:
        """Where the adapter of the run, or of its random-direction control, lies."""
        return Variant(self.folder / "control", "train_control") if control else Variant(self.folder, "train")

    def durability(self, start: str, name: str) -> Variant:
        """Where the adapter lies that a durability run gives.

        Args:
            start: the weights it began from, one of :data:`STARTS`.
            name: of the durability run.
        """
        return Variant(self.folder / "durability" / f"{start}-{name}", f"durability_{start}_{name}")

    def inputs(self, stage: str) -> Inputs:
        """What a stage depends on: dotted key -> value."""
        return stage_inputs(self.loaded.resolved, stage)

    def stage(
        self,
        name: str,
        inputs: Any,
        work: Callable[[], dict[str, Any]],
        *,
        made_from: Sequence[Path] = (),
        remedy: str = "choose another --output-dir, or delete the run folder if it is not needed",
    ) -> dict[str, Any]:
        """Run ``work`` unless it is recorded as done with these very inputs; record what it returns.

        Args:
            name: stage.
            inputs: everything the stage depends on, JSON-able; of the stages before training, :meth:`inputs`.
            work: returns JSON-able facts.
            made_from: files of the run that the stage reads, whose content counts too.
            remedy: for when it was done with other inputs.
        """
        path = self.folder / "stages" / f"{name}.json"
        files = {file.name: file_fingerprint(file) for file in made_from}
        if path.exists():
            record = read_json(path)
            if (other := _other_inputs(record, inputs, files)) is None:
                log.info("%s: done already, %s", name, path)
                facts: dict[str, Any] = record["facts"]
                return facts
            raise UserError(f"stage {name} was done with other inputs{other}", file=path, remedy=remedy)
        if name == "axis":  # training notes it beside its checkpoints; no other stage leaves half of itself
            begin(self.rollouts_path.parent / BEGUN, stage_inputs(self.loaded.resolved, name, portions=True))
        started = time.monotonic()
        return self.record(name, inputs, work(), files=files, seconds=time.monotonic() - started)

    def record(
        self, name: str, inputs: Any, facts: dict[str, Any], *, seconds: float, files: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Record a stage as done with these inputs; returns ``facts``."""
        write_json(self.folder / "stages" / f"{name}.json", {
            "key": fingerprint(inputs),
            "inputs": inputs if isinstance(inputs, dict) else None,
            "files": files or {},
            "recipe": self.loaded.name,
            "git": git_revision(),
            "versions": versions(),
            "seconds": round(seconds, 1),
            "finished": _now(),
            "facts": facts,
        })  # fmt: skip
        return facts

    def stage_record(self, name: str) -> dict[str, Any] | None:
        """The record of a stage, or None if it has not been done."""
        path = self.folder / "stages" / f"{name}.json"
        found: dict[str, Any] | None = read_json(path) if path.exists() else None
        return found

    def facts_of(self, name: str) -> dict[str, Any]:
        """What a stage recorded; nothing if it has not been done."""
        return dict((self.stage_record(name) or {"facts": {}})["facts"])


@dataclass(frozen=True)
class Variant:
    """A trained adapter's place: of the run itself, of its control, or of a durability run.

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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def begin(note: Path, inputs: Inputs) -> None:
    """Note what a stage is made from, before it has made anything that a kill would leave behind."""
    if not note.exists() or read_json(note)["inputs"] != inputs:
        write_json(note, {"inputs": inputs})


def _other_inputs(record: Mapping[str, Any], inputs: Any, files: Mapping[str, str]) -> str | None:
    """What differs of the inputs that a stage was done with, as words to end a sentence with; None where nothing does."""
    made_from = record.get("files") or {}
    replaced = [name for name, content in files.items() if made_from.get(name, content) != content]
    if replaced:
        return f": {', '.join(replaced)} was made again, or replaced"
    if isinstance(inputs, dict) and isinstance(made := record.get("inputs"), dict):
        return _named(found) if (found := differences(made, inputs)) else None
    return None if record["key"] == fingerprint(inputs) else ""


def _named(found: Sequence[tuple[str, Any, Any]]) -> str:
    shown = [f"{key} was {_short(then)} and is {_short(now)} now" for key, then, now in found[:3]]
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    return f": {', '.join(shown)}{more}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_run(loaded: LoadedRecipe, *, output_dir: str | None = None) -> Run:
    """Open or make the run folder of a recipe.

    The folder is ``output_dir``, else ``train.output_dir`` of the recipe, else ``runs/<recipe name>`` below the working
    directory. Of several processes the first one writes.

    Raises:
        UserError: if a stage that is done or begun there depends on something that the recipe says otherwise, or the folder is
            not empty and not a run folder.
    """
    folder = run_folder(loaded, output_dir)
    marker = folder / MARKER
    run = Run(folder, loaded.recipe, loaded)
    if marker.exists():
        made = read_json(marker)
        if not isinstance(made, dict) or not isinstance(made.get("resolved"), dict):
            raise UserError("this is no run folder's", file=marker, remedy="choose a new folder with --output-dir")
        _refuse_another_recipe(run, made["resolved"])
        if os.environ.get("RANK", "0") == "0":
            _take_up(run, made)
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
            "resolved": loaded.resolved,
            "command": " ".join(sys.argv),
            "versions": versions(),
            "git": git_revision(),
            "created": _now(),
            "changes": [],
        })  # fmt: skip
        _write_recipe(run)
    return run


def _write_recipe(run: Run) -> None:
    path = run.folder / "recipe.yaml"
    if not path.exists() or path.read_text(encoding="utf-8") != run.loaded.text:
        write_text(path, run.loaded.text)


def _take_up(run: Run, made: dict[str, Any]) -> None:
    """Have the folder say what the recipe is by now, after each record says what it was when the stage was done."""
    for path, stage in _records(run.folder).items():
        if path.exists() and (record := read_json(path)).get("inputs") is None:  # of a version that did not note it
            write_json(path, record | {"inputs": stage_inputs(made["resolved"], stage)})
    if made["resolved"] != run.loaded.resolved:
        changed = [key for key, _, _ in differences(flat(made["resolved"]), flat(run.loaded.resolved))]
        change = {"at": _now(), "recipe": run.loaded.name, "keys": changed}
        changes = [*made.get("changes", []), change]
        kept = {key: value for key, value in made.items() if key != "recipe_hash"}
        write_json(run.folder / MARKER, kept | {"resolved": run.loaded.resolved, "changes": changes})
    _write_recipe(run)


def _records(folder: Path) -> dict[Path, str]:
    """Where each stage's record lies -> what it reads, a key of :data:`READS`; the control is trained as the run's own is."""
    return {
        folder / "stages" / f"{name}.json": stage
        for name, stage in (*((s, s) for s in READS), ("train_control", "train"))
    }


def _refuse_another_recipe(run: Run, resolved: Mapping[str, Any]) -> None:
    """Hold the recipe against each stage that is done, and each that is begun.

    Args:
        run: the run.
        resolved: what the folder's last recipe said, for records that say nothing themselves.
    """
    for path, stage in _records(run.folder).items():
        portions, anew = False, ""
        if path.exists():
            made = read_json(path).get("inputs") or stage_inputs(resolved, stage)
        elif (begun := _begun(run, path.stem)) is not None:
            note, anew = begun
            portions = stage == "axis"
            made = read_json(note)["inputs"] if note.exists() else stage_inputs(resolved, stage, portions=portions)
        else:
            continue
        if found := differences(made, stage_inputs(run.loaded.resolved, stage, portions=portions)):
            what = "begun" if anew else "done"
            raise UserError(
                f"this run folder was made from another recipe: stage {path.stem} is {what} there{_named(found)}",
                file=run.folder,
                key=found[0][0],
                remedy=f"{_set_back(found)}choose another --output-dir{anew}",
            )


def _set_back(found: Sequence[tuple[str, Any, Any]]) -> str:
    """The first half of a remedy, where the recipe can say again what it said then."""
    return "" if any(key in GONE for key, _, _ in found) else "set it back, or "


def _begun(run: Run, name: str) -> tuple[Path, str] | None:
    """Where a stage that has made a part of what it makes notes what it is made from, and how to begin it anew; else None."""
    if name == "axis":
        there = [path.parent for path in (run.rollouts_path, run.held_out_rollouts_path) if path.exists()]
        anew = f", or delete {' and '.join(map(str, there))} to begin it anew"
        return (run.rollouts_path.parent / BEGUN, anew) if there else None
    if name not in ("train", "train_control"):
        return None
    variant = run.variant(name == "train_control")
    if not any(variant.checkpoints.glob("*.json")):
        return None
    return variant.checkpoints / BEGUN, (
        f", or delete {variant.checkpoints}, {variant.rollouts} and {variant.metrics} to begin it anew"
    )


def run_folder(loaded: LoadedRecipe, output_dir: str | None) -> Path:
    """The run folder of a recipe, whether it is there or not."""
    if output_dir is not None and not output_dir.strip():  # as of a variable of the shell that is not set
        raise UserError("no folder is named", key="--output-dir", remedy="name one, or leave the option out")
    chosen = output_dir or loaded.recipe.train.get("output_dir") or f"runs/{loaded.name.replace('/', '-')}"
    if (path := os.path.expanduser(chosen)).startswith("~"):
        raise UserError("there is no such home folder", file=chosen, key="--output-dir", remedy="name another folder")
    return Path(path).resolve()
