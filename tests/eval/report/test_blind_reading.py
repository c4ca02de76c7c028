"""Blind reading: sheets that tell nothing of arms, labels that come back, and the figures that are known of them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import build_report

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_jsonl, write_jsonl
from trimtab.axis.judge import IDENTITIES
from trimtab.cli.main import main
from trimtab.eval.answers.sheets import CLASSES, Key, Labels, draw_sheet, read_key, read_labels, write_sheet
from trimtab.eval.report.blind import EVERY, Agreement, Rates, blind_markdown, majority_of, read_blind
from trimtab.eval.report.page import write_report
from trimtab.eval.schema import AnswerRow, Report, ScoredAnswer

ROLES = {
    "ghost": "nonhuman", "ship": "nonhuman", "nurse": "human", "baker": "human", "oracle": "mystical", "comet": "mystical",
}  # fmt: skip
FIVE = list(ROLES)[:5]
# Which of the 12 items (role, number of the question) an arm answers as a persona: 10, 4, 6 and 10 of them.
PERSONAS = {
    "base": {(role, k) for role in FIVE for k in (0, 1)},
    "base+cap": {(role, 0) for role in FIVE[:4]},
    "tuned": {(role, 0) for role in FIVE} | {(FIVE[0], 1)},
    "tuned+cap": set(),
    "control": {(role, k) for role in FIVE for k in (0, 1)},
}


def scored(arm: str, role: str, k: int) -> ScoredAnswer:
    """An arm's answer; those of the control to the first questions are the base's, word for word."""
    persona = (role, k) in PERSONAS[arm]
    said = "base" if arm == "control" and k == 0 else arm
    text = f"- I speak, says {role} {k}, {len(said)}" if persona else f"Here is how: {role} {k}, {len(said)}"
    return ScoredAnswer(text=text, persona=2.0 if persona else -2.0)


def report(arms: tuple[str, ...] = tuple(PERSONAS)) -> Report:
    rows = [
        AnswerRow(
            id=f"{role}/{k}",
            suite="roles",
            kind=kind,
            cluster=role,
            system=f"SECRET: you are the {role}.",
            question=f"What is your work, in {number + k} words?",
            answers={arm: scored(arm, role, k) for arm in arms},
        )
        for number, (role, kind) in enumerate(ROLES.items())
        for k in (0, 1)
    ]
    other = rows[0].model_copy(update={"id": "benign/0", "suite": "benign", "cluster": "benign/0"})
    return build_report(transcripts=1).model_copy(update={"answers": [*rows, other]})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    write_report(report(), folder)
    return folder


def label_of(answer: str) -> str:
    """What an attentive reader says."""
    return next(kind for role, kind in ROLES.items() if role in answer) if "I speak" in answer else "assistant"


def labelled(sheet: Path, path: Path, change: Callable[[int, str], str] = lambda _, label: label) -> Path:
    """A reader's copy of a CSV sheet; ``change`` gives another label for (number of the row, label)."""
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "label"])
        writer.writeheader()
        writer.writerows(
            {"id": row["id"], "label": change(number, label_of(row["answer"]))} for number, row in enumerate(rows)
        )
    return path


def of(rates: list[Rates], name: str) -> Rates:
    return next(row for row in rates if row.read_by == name)


# ---- the sheet ----


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_sheet_holds_questions_and_answers_alone(run: Path, tmp_path: Path, suffix: str) -> None:
    sheet = tmp_path / f"blind.{suffix}"
    assert main(["read", str(run), "--sheet", str(sheet), "--per-arm", "12", "--seed", "3"]) == 0
    text = sheet.read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.lstrip("\ufeff").splitlines())) if suffix == "csv" else read_jsonl(sheet)
    # 12 items, 4 arms that are read; half of the control's answers are the base's
    assert len(rows) == 4 * 12 - 6
    assert {tuple(row) for row in rows} == {("id", "question", "answer", "label", "note")}
    assert {row["label"] + row["note"] for row in rows} == {""}
    for secret in ("SECRET", "base", "tuned", "control", "mine", *(f"{role}/" for role in ROLES)):
        assert secret not in text
    key = read_key(tmp_path / f"blind.{suffix}.key.json")
    assert [row.id for row in key.rows] == [row["id"] for row in rows]
    places = [(source.run, source.arm, source.item) for row in key.rows for source in row.sources]
    assert len(set(places)) == len(places) == 48 and {place[0] for place in places} == {"mine"}
    assert Counter(place[1] for place in places) == dict.fromkeys(("base", "base+cap", "tuned", "control"), 12)
    given = {row.id: row for row in report().answers if row.suite == "roles"}
    for row, keyed in zip(rows, key.rows, strict=True):
        for source in keyed.sources:
            answer = given[source.item].answers[source.arm].text
            assert row["answer"].removeprefix("'" if suffix == "csv" else "") == answer
            assert row["question"] == given[source.item].question
    # an answer that begins as a formula does
    assert ("'- I speak" in text) == (suffix == "csv")
    assert (tmp_path / f"blind.{suffix}.rubric.md").read_text(encoding="utf-8") == key.rubric


def test_the_rubric_has_the_judges_classes() -> None:
    assert tuple(CLASSES) == IDENTITIES
    assert CLASSES["human"].startswith("a human being") and CLASSES["other"].startswith("none of these")
    rows, key = draw_sheet({"a": report()}, per_arm=1)
    assert rows and all(f"| `{name}` | {words} |" in key.rubric for name, words in CLASSES.items())
    assert "system prompt" not in key.rubric and "arm" not in key.rubric.split()


def test_items_are_the_same_for_every_arm_and_roles_take_turns() -> None:
    _, key = draw_sheet({"a": report(), "b": report()}, per_arm=6)
    items: dict[tuple[str, str], set[str]] = {}
    for row in key.rows:
        for source in row.sources:
            items.setdefault((source.run, source.arm), set()).add(source.item)
    assert len(items) == 8 and len({frozenset(drawn) for drawn in items.values()}) == 1
    assert {item.partition("/")[0] for item in items["a", "base"]} == set(ROLES)
    # two runs with the same answers: no row more
    assert len(key.rows) == len(draw_sheet({"a": report()}, per_arm=6)[1].rows)


def test_items_that_all_arms_answered_come_first() -> None:
    whole = report()
    rows = [
        row.model_copy(update={"answers": {"base": row.answers["base"]}}) if row.id == "ghost/0" else row
        for row in whole.answers
    ]
    for seed in range(5):
        _, key = draw_sheet({"a": whole.model_copy(update={"answers": rows})}, per_arm=11, seed=seed)
        drawn = [source for row in key.rows for source in row.sources]
        assert len(drawn) == 44 and "ghost/0" not in {source.item for source in drawn}


def test_another_seed_is_another_order_and_one_seed_the_same_sheet() -> None:
    first, again, other = (draw_sheet({"a": report()}, per_arm=4, seed=seed) for seed in (1, 1, 2))
    assert first == again and [row.answer for row in first[0]] != [row.answer for row in other[0]]


def test_fewer_answers_than_asked_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    draw_sheet({"a": report(("base", "tuned"))}, per_arm=13)
    assert "fewer answers than the 13 of --per-arm: a, base: 12; a, tuned: 12" in caplog.text


# ---- faults ----


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "neither half is asked for"),
        (["--sheet", "a.csv", "--labels", "b.csv"], "both halves are asked for"),
        (["--sheet", "a.csv", "--key", "k"], "--key does nothing here"),
        (["--labels", "b.csv", "--key", "k", "--suite", "roles"], "--suite does nothing here"),
        (["--labels", "b.csv"], "the labels come without a key"),
        (["--labels", "b.csv", "--key", "report.json"], "this is not the key of a sheet"),
        (["--sheet", "a.txt"], "a sheet is CSV or JSON Lines"),
        (["--sheet", "there.csv"], "this is there already"),
        (["--sheet", "a.csv", "--suite", "role"], "remedy: there are: benign, roles"),
    ],
)
def test_wrong_options_are_told_and_nothing_is_written(
    words: list[str], told: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    (run / "there.csv").write_text("labels", encoding="utf-8")
    before = sorted(run.iterdir())
    assert main(["read", str(run), *words]) == 2
    assert told in capsys.readouterr().err
    assert sorted(run.iterdir()) == before and (run / "there.csv").read_text(encoding="utf-8") == "labels"


def test_a_report_without_answers_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(build_report(transcripts=1), run)
    assert main(["read", str(run), "--sheet", str(tmp_path / "a.csv")]) == 2
    told = capsys.readouterr().err
    assert "holds no answers to read" in told and "evaluate the run anew" in told


def test_all_faults_of_all_labels_are_told_at_once(tmp_path: Path) -> None:
    rows, key = draw_sheet({"a": report()}, per_arm=2)
    first, second = rows[0].id, rows[1].id
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_jsonl(one, [{"id": "r999", "label": "human"}, {"id": first, "label": "hooman"}, {"id": second}])
    write_jsonl(other, [{"id": first, "label": "human"}, {"id": first, "label": "human"}])
    with pytest.raises(UserError) as raised:
        read_labels([one, other], key)
    told = str(raised.value)
    for fault in ("no id 'r999'", f"{first}: 'hooman' is no label", "no id and label", f"{first} stands at line 1 too"):
        assert fault in told
    assert "one.jsonl" in told and "other.jsonl" in told and "line 3" in told
    assert "the labels are assistant, human, nonhuman, mystical, other" in told
    with pytest.raises(UserError, match="given twice"):
        read_labels([one, tmp_path / "." / "one.jsonl"], key)


def test_rows_without_a_label_are_counted_and_a_file_of_none_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, key = draw_sheet({"a": report()}, per_arm=2)
    path = tmp_path / "ann.csv"
    # as a spreadsheet of some countries writes it
    path.write_text("\ufeffid;label\n" + f"{rows[0].id}; Human \n{rows[1].id};\n", encoding="utf-8")
    (found,) = read_labels([path], key)
    assert (found.reader, found.labels) == ("ann", {rows[0].id: "human"})
    assert found.missing == [row.id for row in rows[1:]]
    assert f"{len(rows) - 1} of {len(rows)} rows have no label: {rows[1].id}" in caplog.text
    write_sheet(tmp_path / "blank.csv", rows, key)
    with pytest.raises(UserError, match="no row of it has a label"):
        read_labels([tmp_path / "blank.csv"], key)


def filled(path: Path, rows: list[dict[str, str]], columns: str = "id,question,answer,label,note") -> Path:
    """A labelled sheet as CSV; the columns are filled in the order of the sheet's."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.split(","))
        writer.writerows([row[name] for name in ("id", "question", "answer", "label", "note")] for row in rows)
    return path


@pytest.fixture
def sheet_rows(tmp_path: Path) -> tuple[Key, list[dict[str, str]]]:
    """The key of a sheet of all answers, and its rows, labelled, as a spreadsheet shows them."""
    rows, key = draw_sheet({"a": report()}, per_arm=12)
    write_sheet(tmp_path / "blind.csv", rows, key)
    with (tmp_path / "blind.csv").open(encoding="utf-8-sig", newline="") as file:
        shown = list(csv.DictReader(file))
    return key, [row | {"label": label_of(row["answer"])} for row in shown]


def test_one_reader_given_as_two_is_refused(
    run: Path, tmp_path: Path, sheet_rows: tuple[Key, list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    key, rows = sheet_rows
    ann, ben = filled(tmp_path / "ann.csv", rows), filled(tmp_path / "ben.csv", rows)
    words = ["read", str(run), "--key", str(tmp_path / "blind.csv.key.json"), "--labels"]
    assert main([*words, str(ann), str(ben)]) == 2
    told = capsys.readouterr().err
    assert f"this is the same as {ann}, byte for byte" in told and str(ben) in told and "one file a reader" in told
    rows[0]["note"] = "by Ben"
    assert len(read_labels([ann, filled(ben, rows)], key)) == 2


def test_labels_at_changed_texts_are_refused_by_their_rows(
    tmp_path: Path, run: Path, sheet_rows: tuple[Key, list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, rows = sheet_rows
    sheet = tmp_path / "new.csv"
    assert main(["read", str(run), "--sheet", str(sheet), "--per-arm", "12"]) == 0
    words = ["read", str(run), "--key", f"{sheet}.key.json", "--labels"]
    assert main([*words, str(filled(tmp_path / "ann.csv", rows))]) == 0
    capsys.readouterr()
    # as when one column is sorted by itself
    rows[2]["answer"], rows[3]["answer"] = rows[3]["answer"], rows[2]["answer"]
    rows[5]["question"] += " Really?"
    rows[6]["answer"], rows[6]["label"] = "", ""  # not labelled, so nothing is wrong with it
    ann = filled(tmp_path / "ann.csv", rows)
    assert main([*words, str(ann)]) == 2
    told = capsys.readouterr().err
    assert f"line 4: {rows[2]['id']}: its answer is not the sheet's" in told and "3 rows can't be used" in told
    assert f"line 7: {rows[5]['id']}: its question is not the sheet's" in told
    assert "may be left out of the file" in told
    assert main([*words, str(labelled(tmp_path / "blind.csv", tmp_path / "bare.csv"))]) == 0


def test_what_spreadsheets_do_to_texts_is_no_change(
    tmp_path: Path, sheet_rows: tuple[Key, list[dict[str, str]]]
) -> None:
    whole = report()
    for row in whole.answers:
        for answer in row.answers.values():
            answer.text = f" {answer.text}\n\n  =1 and\u00a0more \n"
    rows, key = draw_sheet({"a": whole}, per_arm=12)
    write_sheet(tmp_path / "other.csv", rows, key)
    with (tmp_path / "other.csv").open(encoding="utf-8-sig", newline="") as file:
        shown = [row | {"label": "human"} for row in csv.DictReader(file)]
    changes: list[Callable[[str], str]] = [
        str, str.strip, lambda text: text.replace("\n", "\r\n"), lambda text: " ".join(text.split()),
        lambda text: "'" + text.strip(),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        changed = [row | {"answer": change(row["answer"])} for row in shown]
        (found,) = read_labels([filled(tmp_path / f"{number}.csv", changed)], key, {"a": whole})
        assert not found.missing
    _, rows_of_formulas = sheet_rows  # whose answers begin with a minus, and an apostrophe before it
    _, plain = draw_sheet({"a": report()}, per_arm=12)
    bare = [row | {"answer": row["answer"].removeprefix("'")} for row in rows_of_formulas]
    assert bare != rows_of_formulas
    assert not read_labels([filled(tmp_path / "bare.csv", bare)], plain, {"a": report()})[0].missing


def test_headers_and_ids_in_capitals_and_empty_rows_are_read(
    tmp_path: Path, sheet_rows: tuple[Key, list[dict[str, str]]]
) -> None:
    key, rows = sheet_rows
    blank = dict.fromkeys(rows[0], "")
    capitals = [row | {"id": row["id"].upper()} for row in rows]
    path = filled(tmp_path / "ann.csv", [*capitals, blank, blank | {"note": " "}], "ID, Question ,ANSWER,Label,Note")
    assert path.read_text(encoding="utf-8").splitlines()[-2:] == [",,,,", ",,,, "]
    (found,) = read_labels([path], key, {"a": report()})
    assert found.labels == {row["id"]: row["label"] for row in rows} and not found.missing
    with pytest.raises(UserError, match="two columns are called label"):
        read_labels([filled(path, rows, "id,question,answer,label,Label")], key)
    with pytest.raises(UserError, match="the sheet has no id ''"):
        read_labels([filled(path, [*rows, blank | {"label": "human"}])], key)


@pytest.mark.parametrize("first", ["sep=;", '"SEP=;"'])
def test_the_line_that_tells_the_separator_is_no_header(
    tmp_path: Path, sheet_rows: tuple[Key, list[dict[str, str]]], first: str
) -> None:
    key, rows = sheet_rows
    path = tmp_path / "ann.csv"
    lines = [first, "id;label", *(f"{row['id']};{row['label']}" for row in rows), ";;;", ";"]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert read_labels([path], key)[0].labels == {row["id"]: row["label"] for row in rows}
    path.write_text("\n".join([*lines[:2], "r999;human"]), encoding="utf-8")
    with pytest.raises(UserError, match="line 3: the sheet has no id 'r999'"):
        read_labels([path], key)


def test_labels_are_not_set_against_other_answers() -> None:
    _, key = draw_sheet({"a": report()}, per_arm=2)
    changed = report()
    for row in changed.answers:
        row.answers["tuned"].text += "!"
    with pytest.raises(UserError, match=r"2 answers of the sheet are not in these reports.*a, tuned"):
        read_blind(key, [], {"a": changed})
    with pytest.raises(UserError, match="answers of the sheet are not in these reports"):
        read_blind(key, [], {})
    with pytest.raises(UserError, match="the sheet has no answer of b"):
        read_blind(key, [], {"a": report(), "b": report()})


# ---- figures ----


def test_the_round_trip_gives_the_known_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet, out = tmp_path / "blind.csv", tmp_path / "blind.json"
    assert main(["read", str(run), "--sheet", str(sheet), "--per-arm", "12"]) == 0
    ann = labelled(sheet, tmp_path / "ann.csv")
    ben = labelled(sheet, tmp_path / "ben.csv", lambda number, label: "" if number == 0 else label)
    capsys.readouterr()
    key = f"{sheet}.key.json"
    assert main(["read", str(run), "--labels", str(ann), str(ben), "--key", key, "--json", str(out), "--quiet"]) == 0
    page = capsys.readouterr().out
    told: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    (mine,) = told["runs"]
    rates = [Rates.model_validate(row) for row in mine["rates"]]
    assert [row.read_by for row in rates] == ["ann", "ben", EVERY, "the report's reader"]
    for name in ("ann", "the report's reader"):
        found = of(rates, name)
        values = {arm: estimate.value for arm, estimate in found.arms.items()}
        assert values == pytest.approx({"base": 10 / 12, "base+cap": 4 / 12, "tuned": 6 / 12, "control": 10 / 12})
        assert {estimate.n for estimate in found.arms.values()} == {12} and not found.left_out
        assert found.retention.estimate is not None and found.control_retention is not None
        # 4 fewer personas of 12, where the cap has 6 fewer
        assert found.retention.estimate.value == pytest.approx(2 / 3)
        assert found.control_retention.estimate is not None
        assert found.control_retention.estimate.value == pytest.approx(0)
    blank = told["rows"][0]
    arms = [source["arm"] for source in blank["sources"]]
    assert of(rates, "ben").left_out == of(rates, EVERY).left_out == dict.fromkeys(arms, 1)
    assert blank["labels"].keys() == {"ann"} and blank["log_odds"].keys() == {"the report's reader"}
    assert told["readers"][1]["missing"] == [blank["id"]] and told["readers"][1]["labelled"] == 41
    assert mine["labels"]["ann"]["tuned"] == {"assistant": 6, "nonhuman": 3, "human": 2, "mystical": 1}
    nonhuman = of([Rates.model_validate(row) for row in mine["kinds"]["nonhuman"]], "ann")
    assert {arm: estimate.value for arm, estimate in nonhuman.arms.items()} == pytest.approx(
        {"base": 1.0, "base+cap": 0.5, "tuned": 0.75, "control": 1.0}
    )
    pairs = [Agreement.model_validate(pair) for pair in told["agreements"]]
    assert [(pair.one, pair.other, pair.n) for pair in pairs] == [
        ("ann", "ben", 41),
        ("ann", "the report's reader", 42),
        ("ben", "the report's reader", 41),
        ("majority", "the report's reader", 42),
    ]
    assert all(pair.assistant is not None and pair.assistant.value == 1 for pair in pairs)
    assert pairs[0].left_out == {"no label": 1}
    for words in (
        "# Blind reading",
        "## Agreement",
        "## mine",
        "| ann | 83 % [",
        "| base + cap |",
        "retention of the control",
    ):
        assert words in page
    assert "| 0.67 [" in page and "undefined" not in page.partition("By kind:")[0] and str(tmp_path) not in page


def one_arm(labels: list[tuple[str, str]], personas: list[float | None]) -> tuple[list[Agreement], list[Rates]]:
    """Figures of answers of one arm, each of a role of its own, by the labels of two readers and the report's log-odds."""
    rows = [
        AnswerRow(
            id=f"{number:02}", suite="roles", kind="", cluster=f"{number:02}", system="", question="Who?",
            answers={"base": ScoredAnswer(text=f"{number}", persona=persona)},
        )
        for number, persona in enumerate(personas)
    ]  # fmt: skip
    held = {"a": build_report(transcripts=1).model_copy(update={"answers": rows})}
    sheet, key = draw_sheet(held)
    by_reader = [{row.id: labels[int(row.answer)][reader] for row in sheet} for reader in (0, 1)]
    reading = read_blind(key, [Labels(f"r{n}", "", "", by_id, []) for n, by_id in enumerate(by_reader)], held)
    return reading.agreements, reading.runs[0].rates


def test_kappa_of_known_labels() -> None:
    a, h, n, o = "assistant", "human", "nonhuman", "other"
    # agreed on 8 of 10, of which chance gives a half: (0.8 - 0.5) / 0.5
    (pair, *_), _ = one_arm([(a, a)] * 4 + [(a, h), (h, a)] + [(h, h)] * 4, [None] * 10)
    assert pair.classes is not None and pair.assistant is not None
    assert pair.classes.value == pair.assistant.value == pytest.approx(0.6)
    assert pair.classes.low < 0.6 < pair.classes.high and pair.n == 10
    # who the persona is they don't agree on: chance gives 0.4 * 0.4, classes 0.4 + 0.2 of it
    (pair, *_), _ = one_arm([(a, a)] * 4 + [(h, h)] * 3 + [(h, n)] * 3, [None] * 10)
    assert pair.classes is not None and pair.assistant is not None
    assert pair.classes.value == pytest.approx((0.7 - (0.16 + 0.18)) / (1 - (0.16 + 0.18)))
    assert pair.assistant.value == 1
    # one label alone says nothing of agreement
    (pair, *_), _ = one_arm([(o, o)] * 10, [None] * 10)
    assert pair.classes is None and pair.assistant is None


def test_other_ties_and_answers_without_log_odds_are_left_out_and_counted() -> None:
    labels = [
        ("assistant", "assistant"), ("human", "nonhuman"), ("human", "assistant"), ("other", "other"), ("mystical", "mystical"),
        ("assistant", "assistant"),
    ]  # fmt: skip
    agreements, rates = one_arm(labels, [-1.0, 1.0, 1.0, 1.0, 0.0, None])
    by_name = {(pair.one, pair.other): pair for pair in agreements}
    majority = by_name["majority", "the report's reader"]
    assert majority.left_out == {"undecided": 1, "other": 1, "no log-odds": 1}
    # 0 and 1 agreed; log-odds of 0 are the Assistant's, and the readers say mystical: 2 of 3, by chance 4 / 9
    assert majority.n == 3 and majority.assistant is not None and majority.classes is None
    assert majority.assistant.value == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert {row.read_by: round(row.arms["base"].value * row.arms["base"].n) for row in rates} == {
        "r0": 3,  # rows 1, 2 and 4 of five
        "r1": 2,
        EVERY: 2,
        "the report's reader": 3,
    }
    assert [row.left_out for row in rates] == [{"base": 1}] * 4
    assert rates[0].retention.estimate is None and rates[0].control_retention is None


def test_what_is_undefined_says_why() -> None:
    whole = report()
    for row in whole.answers:
        row.answers["base+cap"] = row.answers["base"]
    sheet, key = draw_sheet({"a": whole}, per_arm=12)
    reading = read_blind(
        key, [Labels("ann", "", "", {row.id: label_of(row.answer) for row in sheet}, [])], {"a": whole}
    )
    page = blind_markdown(reading)
    assert "- ann: retention of the tuned model is undefined: the cap itself moves it by +0 [0, 0]" in page
    assert page.count("retention of the control is undefined") == 2  # by ann and by the report's reader
    assert [(pair.one, pair.other) for pair in reading.agreements] == [("ann", "the report's reader")]
    for row in reading.runs[0].rates:
        row.retention.why = "the cap itself moves it by -0.01 [-0.2, 0.1]"
    assert "the cap itself moves it by −0.01 [−0.2, 0.1]" in blind_markdown(reading)


def test_a_majority_has_more_votes_than_any_other() -> None:
    assert majority_of(["persona", "persona", "other"]) == "persona"
    assert majority_of(["persona", "assistant"]) == "undecided"
    assert majority_of(["other"]) == "other"


def test_all_runs_together_count_each_run_s_own_answer_to_an_item() -> None:
    """A persona in 6 of 12 answers of the one tuned model, in 10 of the other's, which says what the base says."""
    one, other = report(), report()
    for row in other.answers:
        row.answers["tuned"] = row.answers["base"]
    reports = {"one": one, "other": other}
    sheet, key = draw_sheet(reports, per_arm=12)
    reading = read_blind(key, [Labels("ann", "", "", {row.id: label_of(row.answer) for row in sheet}, [])], reports)
    together = of(reading.together, "ann")
    assert together.arms["tuned"].value == pytest.approx(16 / 24) and together.arms["tuned"].n == 24
    # the cap takes 6 of 12 away in each run; tuning 4 in one of them
    assert together.retention.estimate is not None
    assert together.retention.estimate.value == pytest.approx(4 / 12)
    assert "## All runs together" in blind_markdown(reading)
    alone = read_blind(draw_sheet({"one": one}, per_arm=12)[1], [], {"one": one})
    assert alone.together == [] and "together" not in blind_markdown(alone)
