"""Several reports in one page and one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from test_pooling import by_cluster, report
from test_report import Page, build_report
from tiny_recipe import ROOT

from trimtab.axis import UserError
from trimtab.axis.files import write_json
from trimtab.cli.main import main
from trimtab.eval.report.compare import COLUMNS, load_runs, standing_of
from trimtab.eval.report.page import write_report
from trimtab.eval.schema import Report
from trimtab.eval.wording import p_text, percent_text, points_text

SCHEMA = ROOT / "docs" / "report.schema.json"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs; the second has a floor of its own and no capability."""
    one = build_report(transcripts=2)
    other = one.model_copy(
        update={"capability": [], "repeat": {**one.repeat, "hashes": {"floor.safetensors": "other"}}}
    )
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, written in zip(folders, (one, other), strict=True):
        folder.mkdir()
        write_report(written, folder)
    return folders


def test_page_and_table_hold_every_run(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, table = tmp_path / "out" / "page.html", tmp_path / "table.csv"
    assert main(["report", "--compare", *map(str, runs), "--to", str(page), "--csv", str(table)]) == 0
    assert str(page) in capsys.readouterr().out
    read = Page(page.read_text(encoding="utf-8"))
    assert read.ids("section") == ["claims", "retention", "side-effects"]
    assert "first" in read.text and "second" in read.text and "differ in the floor" in read.text
    assert len(read.figures) == 3  # of four metrics one has no retention anywhere
    assert "not measured" in read.text  # the second's capability
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert tuple(rows[0]) == COLUMNS and {row["run"] for row in rows} == {"first", "second"}
    first = build_report(transcripts=2)
    kept = next(row for row in rows if row["id"] == "text_llr" and row["what"] == "retention")
    estimate = first.metrics[0].retention.estimate
    assert estimate is not None and float(kept["value"]) == estimate.value and int(kept["n"]) == estimate.n
    undefined = next(row for row in rows if row["id"] == "in_role" and row["what"] == "retention")
    assert undefined["value"] == "" and "less than its noise" in undefined["note"]
    assert {row["section"] for row in rows} >= {"metric", "side effect", "capability", "trajectory", "claim"}


def test_runs_of_one_name_are_told_apart_and_one_given_twice_counts_once(runs: list[Path], tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / "first"
    twin.mkdir(parents=True)
    write_report(build_report(transcripts=1), twin)
    assert list(load_runs([runs[0], twin])) == [f"{tmp_path.name}/first", "elsewhere/first"]
    assert list(load_runs([runs[1], runs[0], runs[0] / "report.json", runs[1]])) == ["second", "first"]
    with pytest.raises(UserError, match="nowhere"):
        load_runs([tmp_path / "nowhere"])


def test_seeds_are_pooled_and_settings_held_against_the_first(tmp_path: Path) -> None:
    runs = {
        "sft-0": report(by_cluster(1, 0.9), recipe="sft", seed=0),
        "sft-1": report(by_cluster(2, 1.0), recipe="sft", seed=1),
        "dpo-0": report(by_cluster(3, 0.4), recipe="dpo", seed=0),
    }
    files = []
    for name, one in runs.items():
        files.append(tmp_path / f"{name}.json")  # kept reports, side by side in one folder
        write_json(files[-1], one.model_dump())
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    assert main(["report", "--compare", *map(str, files), "--to", str(page), "--csv", str(table)]) == 0
    read = Page(page.read_text(encoding="utf-8"))
    assert read.ids("section") == ["claims", "settings", "retention", "side-effects"]
    pooled = standing_of(runs).metrics["text_llr"]
    kept, gap = pooled["sft"].estimate, pooled["dpo-0"].gap
    assert kept is not None and gap is not None
    assert percent_text(kept).split(" [")[0] in read.text and points_text(gap.estimate) in read.text
    assert "2 seeds" in read.text and "against sft" in " ".join(read.text.split())
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    settings = [row for row in rows if row["section"] == "setting" and row["id"] == "text_llr"]
    assert [(row["run"], row["what"]) for row in settings] == [
        ("sft", "retention"), ("dpo-0", "retention"), ("dpo-0", "retention, minus the first's"),
    ]  # fmt: skip
    assert float(settings[0]["value"]) == kept.value and settings[0]["note"] == "runs sft-0, sft-1"
    assert float(settings[2]["value"]) == gap.estimate.value and settings[2]["note"] == "of these very weights"


@pytest.mark.parametrize(
    ("p", "told"),
    [(0.0, "p < 0.001"), (9.99e-4, "p < 0.001"), (0.001, "p = 0.001"), (0.01234, "p = 0.0123"), (1.0, "p = 1")],
)
def test_a_p_value_is_never_a_row_of_noughts(p: float, told: str) -> None:
    assert p_text(p) == told


@pytest.mark.parametrize("given", [["report"], ["report", "tiny/sft", "--compare", "x"]])
def test_a_recipe_or_runs_but_not_both(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert "RECIPE" in capsys.readouterr().err


def test_the_published_schema_is_the_reports_own(tmp_path: Path) -> None:
    own = Report.model_json_schema()
    fresh = tmp_path / "report.schema.json"
    write_json(fresh, own)
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == own, f"copy {fresh} to {SCHEMA}"
