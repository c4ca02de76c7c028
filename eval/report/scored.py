"""Test is scored once: what a run folder keeps of each report on the test split, and what the report says of it."""

from __future__ import annotations

import contextlib

from trimtab.axis.errors import UserError
from trimtab.axis.files import append_jsonl, fingerprint, read_jsonl
from trimtab.eval.schema import Report
from trimtab.pipeline.run import Run, git_revision
from trimtab.pipeline.subject import Subject
from trimtab.recipes.schema import deciding

RECORD = "test_scored.jsonl"  # in the run folder, a line for each report on the test split


def scored_on_test(run: Run, report: Report, tuned: Subject) -> Report:
    """Record that weights were scored on the test split; the report with how often they have been by now in this run folder.

    The line is written before the report is: a figure that somebody may have seen is never left out.

    Args:
        run: the run.
        report: on the test split, not yet written.
        tuned: the weights that it is about.
    """
    path, weights = run.folder / RECORD, tuned.fingerprint()
    before = read_jsonl(path) if path.exists() else []
    append_jsonl(path, [
        {
            "created": report.created,
            "git": git_revision(),
            "weights": weights,
            "eval": fingerprint(deciding(run.recipe.eval.model_dump())),
            "status": report.verdict.status,
        }
    ])  # fmt: skip
    times = 1 + sum(row["weights"] == weights for row in before)
    warnings = list(report.warnings)
    says = "settings chosen between them make it a development split"
    if times > 1:
        warnings.append(f"These weights were scored on the test split {times} times: {says}.")
    if beside := _scored_beside(run, weights):
        warnings.append(f"These weights were scored on the test split in {', '.join(beside)} too: {says}.")
    return report.model_copy(update={"repeat": {**report.repeat, "test_scored": times}, "warnings": warnings})


def _scored_beside(run: Run, weights: str) -> list[str]:
    """The run folders beside this one that have scored these weights, by name; one that can't be read is passed over."""
    own, found = run.folder.resolve(), []
    for path in sorted(own.parent.glob(f"*/{RECORD}")):
        if path.parent == own:
            continue
        with contextlib.suppress(OSError, UserError):
            if any(row.get("weights") == weights for row in read_jsonl(path)):
                found.append(path.parent.name)
    return found
