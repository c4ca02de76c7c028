"""Whose answers an evaluation is about: the weights and files that it is made from, and that kept answers were given by."""

from __future__ import annotations

from pathlib import Path

from trimtab.axis.errors import UserError
from trimtab.axis.files import file_fingerprint, read_json, write_json
from trimtab.eval.answers.arms import CONTROL, durability_arm
from trimtab.pipeline.run import STARTS, Run
from trimtab.pipeline.subject import Subject, trained_subject, tuned_subject


def given_files(run: Run) -> dict[str, str]:
    """Key -> fingerprint of the user's own files that the evaluation reads."""
    section = run.recipe.eval
    named = {"eval.conversations_file": section.conversations_file, "eval.boundary_file": section.boundary_file}
    return {key: file_fingerprint(path) for key, path in named.items() if path is not None and Path(path).is_file()}


def subjects_of(run: Run) -> dict[str, Subject]:
    """The weights behind ``tuned``, behind ``control`` where there is one, and behind each durability run."""
    section = run.recipe.eval
    found = {"tuned": tuned_subject(run)}
    if section.control:
        found[CONTROL] = trained_subject(run.variant(control=True), "control adapter", "trimtab train RECIPE")
    for tuning in section.durability:
        for start in STARTS:
            what = f"adapter of the durability run {tuning.name}"
            found[durability_arm(start, tuning.name)] = trained_subject(
                run.durability(start, tuning.name), what, "trimtab eval RECIPE"
            )
    return found


def check_same_weights(run: Run, subjects: dict[str, Subject]) -> None:
    """Refuse answers that are kept from other weights or another floor: they would be mixed with new ones."""
    path = run.folder / "eval" / "weights.json"
    found = {name: subject.fingerprint() for name, subject in subjects.items()}
    found["floor"] = file_fingerprint(run.variant(control=False).floor_path)
    kept = read_json(path) if path.exists() else {}
    if all(found[name] == kept[name] for name in kept.keys() & found.keys()):
        if found.keys() - kept.keys():  # a control or a durability run may come later
            write_json(path, kept | found)
    else:
        raise UserError(
            "the answers kept here were given by other weights, or under another floor",
            file=path.parent,
            remedy="delete this folder and stages/eval.json to evaluate anew (and durability/ with its stages, if there is one)",
        )
