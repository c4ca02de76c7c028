"""Prompts that the judge gave no score for: they are kept beside its replies, and asked again by the same command."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.judge import scoring_judge
from trimtab.axis.replies import Missing
from trimtab.eval.measures.pressure import REPLIES
from trimtab.eval.measures.suite import Unscored
from trimtab.pipeline.run import Run

log = logging.getLogger("trimtab")

UNSCORED = "unscored.jsonl"  # in eval/


def keep_unscored(path: Path, unscored: Sequence[Unscored]) -> None:
    """Keep what has no score beside the judge's replies: the same command asks for it again."""
    if not unscored:
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, [{**dataclasses.asdict(row), "why": row.why.value} for row in unscored])
    log.warning(
        "eval: the judge gave no score for %d prompts (%s); the report says so, and the same command asks for them again",
        len(unscored), path,
    )  # fmt: skip


def scored_since(run: Run) -> bool:
    """Whether the judge, asked again, scores an answer that had no score when the evaluation was recorded."""
    settings, path = run.recipe.eval.judge, run.folder / "eval" / UNSCORED
    if settings is None or settings.endpoint is None or not path.exists():
        return False
    rows = read_jsonl(path)
    try:
        judge = scoring_judge(settings.model_dump(), path.parent / REPLIES, "eval.judge", title="judge")
        scores = [
            score
            for highest in sorted({row["highest"] for row in rows})
            for score in judge([row["prompt"] for row in rows if row["highest"] == highest], highest)
        ]
    except UserError as error:  # what was measured stands; it is asked once more the next time
        log.warning("eval: %d answers are still without a score: %s", len(rows), error)
        return False
    found = sum(not isinstance(score, Missing) for score in scores)
    log.info("eval: %d of %d answers without a score have one now", found, len(rows))
    return found > 0
