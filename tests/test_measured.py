"""The figures in ``docs/measured``: README and results say what the kept reports say, and these hold what they are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trimtab.eval import ids
from trimtab.eval.report.compare import load_runs
from trimtab.eval.schema import Report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import known_bad
from methods import EVERY, _method_of
from write_results import MEASURED, written


def kept(folder: Path) -> dict[str, Report]:
    return load_runs(sorted(folder.glob("*.json.gz")))


def test_the_pages_are_written_from_the_kept_files() -> None:
    for path, text in written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python benchmarks/write_results.py"


def test_every_kept_run_is_of_a_method_on_the_test_split_and_holds_its_answers_and_its_commit() -> None:
    reports = kept(MEASURED)
    assert reports
    for name, report in reports.items():
        assert _method_of(name) in EVERY
        assert report.repeat["resolved"]["eval"]["split"] == "test"
        assert len(report.repeat["git"]) >= 12 and report.repeat["machine"]["cpu"]
        roles = [row for row in report.answers if row.suite == "roles"]
        assert len({row.cluster for row in roles}) >= 60
        assert all({"base", "base+cap", "tuned"} <= row.answers.keys() for row in roles)


def test_figures_are_those_of_the_answers_that_are_kept() -> None:
    for report in kept(MEASURED).values():
        rate = next(metric for metric in report.metrics if metric.id == ids.PERSONA_RATE)
        for arm in ("base", "base+cap", "tuned"):
            odds = [row.answers[arm].persona for row in report.answers if row.suite == "roles"]
            said = sum(1 if value is None else value > 0 for value in odds) / len(odds)
            assert rate.arms[arm].value == pytest.approx(said, abs=0.05)  # what can't be read counts as the worst


def test_no_model_that_is_known_to_be_bad_passes_unnamed() -> None:
    reports = kept(MEASURED / "known_bad")
    assert reports and {name.replace("-", " ") for name in reports} <= set(known_bad.GALLERY)
    for name, report in reports.items():
        if known_bad.GALLERY[name.replace("-", " ")].named_by:
            assert known_bad.named(name.replace("-", " "), report), name
