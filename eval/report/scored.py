"""Test is scored once: what a run folder keeps of each report on the test split, and what the report says of it."""

from __future__ import annotations

from trimtab.axis.files import append_jsonl, fingerprint, read_jsonl
from trimtab.eval.schema import Report
from trimtab.pipeline.run import Run, git_revision
from trimtab.pipeline.subject import Subject
from trimtab.recipes.schema import deciding

RECORD = "test_scored.jsonl"  # in the run folder, a line for each report on the test split


def scored_on_test(run: Run, report: Report, tuned: Subject) -> Report:
    """Record that weights were scored on the test split; the report with how often they have been by now.

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
    if times > 1:
        says = "settings chosen between them make it a development split"
        warnings.append(f"These weights were scored on the test split {times} times: {says}.")
    return report.model_copy(update={"repeat": {**report.repeat, "test_scored": times}, "warnings": warnings})
