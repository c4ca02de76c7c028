"""Several reports in one page and one table."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_pooling import by_cluster, report
from test_report import Page, build_report
from tiny_recipe import ROOT

from trimtab.axis import UserError
from trimtab.axis.files import write_json
from trimtab.cli.main import main
from trimtab.eval.report.compare import COLUMNS, load_runs, ranked_settings, standing_of, write_comparison
from trimtab.eval.report.page import write_report
from trimtab.eval.report.pooling import Pooled
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
    assert read.ids("section") == ["settings", "claims", "retention", "side-effects"]
    assert read.text.index("Run by run") < read.text.index("Retention = (tuned")
    assert read.text.count("reference") == 3 and "sft reference 2 seeds" in read.text
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
    assert settings[1]["note"] == "run dpo-0: of these weights alone" and "dpo-0 1 run: of these weights" in read.text
    assert float(settings[2]["value"]) == gap.estimate.value and settings[2]["note"] == "of these very weights"


def test_settings_are_sorted_by_what_they_keep_of_the_primary_metric(tmp_path: Path) -> None:
    runs = {
        f"{name}-{seed}": report(by_cluster(seed, kept), recipe=name, seed=seed)
        for name, kept in (("dpo", 0.4), ("sft", 0.9), ("grpo", 0.1))
        for seed in (0, 1)
    }
    standing = standing_of(runs)
    assert list(standing.settings) == ["dpo", "sft", "grpo"]
    assert ranked_settings(standing, "text_llr") == ["sft", "dpo", "grpo"]
    assert ranked_settings(standing, None) == ["dpo", "sft", "grpo"]
    standing.metrics["text_llr"]["sft"] = Pooled(None, "the cap does nothing", [])
    assert ranked_settings(standing, "text_llr") == ["dpo", "grpo", "sft"]
    write_comparison(runs, tmp_path / "page.html")
    rows = re.findall(r'<tr><th scope="row">(\w+)', (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert rows[:3] == ["sft", "dpo", "grpo"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_many_runs_are_no_wider_than_their_window_and_their_names_stay(
    browser: Any, tmp_path: Path, width: int
) -> None:
    runs = {f"run-{number:02d}": build_report(transcripts=1) for number in range(24)}
    write_comparison(runs, tmp_path / "page.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    table = page.locator("#retention .scroll")
    assert "wide" in table.get_attribute("class")
    table.evaluate("box => box.scrollLeft = 1e6")
    name, box = page.locator("#retention tbody th").first.bounding_box(), table.bounding_box()
    assert abs(name["x"] - box["x"]) < 2
    last = page.locator("#retention tbody td").nth(23).bounding_box()
    assert last["x"] + last["width"] <= box["x"] + box["width"] + 1
    page.close()


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
