"""The figures in ``docs/measured``: README and results say what the kept reports say, and these hold what they are made of."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from trimtab.eval import ids
from trimtab.eval.intervals import clustered_rate
from trimtab.eval.report.compare import load_runs
from trimtab.eval.schema import Report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import known_bad
from methods import DEFAULT, EVERY, _method_of, standing_of, table
from write_results import MEASURED, Figures, written


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
    assert {name.replace("-", " ") for name in reports} == set(known_bad.GALLERY)
    for name, report in reports.items():
        if known_bad.GALLERY[name.replace("-", " ")].named_by:
            assert known_bad.named(name.replace("-", " "), report), name


def figures_of(*runs: Report) -> Figures:
    """The figures of these repetitions of the default."""
    figures = Figures()
    figures.__dict__["runs"] = {DEFAULT: list(runs)}
    return figures


def some() -> Report:
    """A run of the default."""
    return next(report for name, report in kept(MEASURED).items() if _method_of(name) == DEFAULT)


def test_a_rate_is_of_roles_questions_and_repetitions() -> None:
    run = some()
    rows = [row for row in run.answers if row.suite == "roles"]
    reads = [float((row.answers["base"].persona or 0) > 0) for row in rows]
    roles = clustered_rate(reads, [row.cluster for row in rows])
    low, high = map(float, figures_of(run).rate("base").partition("[")[2].rstrip("]").split(","))
    assert roles is not None and high - low > 100 * (roles.high - roles.low) + 1
    # of two repetitions, whose answers were swapped between base and tuned in one, the interval tells little
    swapped = [row.model_copy(update={"answers": {**row.answers, "base": row.answers["tuned"]}}) for row in run.answers]
    apart = figures_of(run, run.model_copy(update={"answers": swapped})).rate("base")
    assert apart.partition("[")[2] == "0, 100]"
    assert "these weights alone" in figures_of(run).of_what() and "repetitions" in figures_of(run, run).of_what()


def test_the_verdict_is_told_by_light_and_repetition() -> None:
    found = some()
    mild = [claim.model_copy(update={"light": "amber"}) if claim.light == "red" else claim for claim in found.claims]
    run = found.model_copy(update={"claims": mild})
    first, second = run.claims[:2]
    greener = run.model_copy(update={"claims": [first.model_copy(update={"light": "green"}), *run.claims[1:]]})
    redder = run.model_copy(update={"claims": [first.model_copy(update={"light": "red"}), *run.claims[1:]]})
    lines = [" ".join(line.split()) for line in figures_of(greener, redder).verdict().split("\n- ")]
    assert lines[0] == f"- **{run.verdict.status}**: {run.verdict.headline}" and len(lines) == 6
    assert [line.partition(":")[0] for line in lines[2:]] == ["Green", "Amber", "Red", "Not shown, or not measured"]
    assert f"{first.name} (1 of 2)" in lines[2] and f"{first.name} (1 of 2)" in lines[4]
    assert sum(f"; {second.name};" in f"; {line.partition(': ')[2]};" for line in lines[2:]) == 1
    assert "Red: none" in figures_of(greener).verdict()


def test_a_role_without_any_answer_is_no_fault_and_the_code_is_told_as_it_was() -> None:
    run = some()
    gone = run.answers[0].cluster
    none = {arm: answer.model_copy(update={"persona": None}) for arm, answer in run.answers[0].answers.items()}
    answers = [row.model_copy(update={"answers": none}) if row.cluster == gone else row for row in run.answers]
    repeat = {**run.repeat, "git": "aaaaaaaaaaaa-dirty", "evaluated_by": "bbbbbbbbbbbb"}
    figures = figures_of(run.model_copy(update={"answers": answers, "repeat": repeat}), run)
    alone = figures_of(figures.runs[DEFAULT][0])
    assert len(alone.worst()) == 10 and gone not in [role for role, *_ in alone.worst()]
    assert alone.made_by() == "aaaaaaaaaaaa-dirty" and alone.evaluated_by() == "bbbbbbbbbbbb"
    assert "not recorded" in figures_of(run.model_copy(update={"repeat": {"git": "c"}})).evaluated_by()
    pair = alone.pair()
    assert {"base_odds", "cap_odds", "tuned_odds", "read"} <= pair.keys() and "-" not in pair["tuned_odds"]


def test_tables_have_real_minus_signs() -> None:
    methods = {DEFAULT: [some()]}
    told = table(methods, standing_of(methods))
    assert "\u2212" in told and not re.search(r"(?<![\w-])-\d", told)
