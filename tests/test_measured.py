"""The figures in ``docs/measured``: each report is whole, and the table beside them says what they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from trimtab.eval.report.compare import load_runs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from methods import COLUMNS, METHODS, by_method

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "measured"


def test_the_table_holds_every_kept_run() -> None:
    arms = by_method(load_runs(sorted(MEASURED.glob("*.json"))))
    assert sum(map(len, arms.values())) == len(list(MEASURED.glob("*.json")))
    page = (MEASURED / "README.md").read_text(encoding="utf-8")
    told = page.partition("Retention, seeds pooled:")[2].partition("They measure:")[0]
    rows = {row.split(" | ")[0].removeprefix("| "): row.rstrip(" |").split(" | ") for row in told.splitlines()}
    for arm, runs in arms.items():
        row = rows[arm]
        assert row[1] == str(len(runs))
        for key, cell in zip(COLUMNS, row[2:-1], strict=True):
            of_seeds = re.search(r"\(([^)]*)\)$", cell)
            assert of_seeds is not None, cell
            metrics = [next(metric for metric in run.metrics if metric.id == key) for run in runs]
            values = [metric.retention.estimate.value for metric in metrics if metric.retention.estimate is not None]
            assert of_seeds[1] == ", ".join(f"{value:.2f}" for value in values)
    assert set(arms) <= set(METHODS)
