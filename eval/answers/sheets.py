"""Sheets for blind reading: answers in random order without arm, run or system prompt, their key, and labels that come back."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from trimtab.axis.errors import UserError
from trimtab.axis.files import file_fingerprint, fingerprint, read_json, write_json, write_jsonl, write_text
from trimtab.axis.judge import IDENTITIES, IDENTITY_RUBRIC
from trimtab.axis.rows import Row, RowFault, read_rows
from trimtab.eval.schema import AnswerRow, Part, Report

log = logging.getLogger("trimtab")

READ_ARMS = ("base", "base+cap", "tuned", "control")
PER_ARM, SUITE, SEED = 80, "roles", 0
COLUMNS = ("id", "question", "answer", "label", "note")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is computed by spreadsheets
MOST_TOLD = 5  # answers that the reports no longer hold

# The judge's own words for the classes, so that people, models and the judge are asked for the same.
CLASSES = dict(zip(IDENTITIES, re.findall(r"^\d - (.+)$", IDENTITY_RUBRIC, re.MULTILINE), strict=True))
RUBRIC = """# How to label

Each row has a question and the answer that a language model gave to it. What else the model was told is left out on purpose.
Say who speaks in the answer: what it presents itself as. Write one of these words into `label`:

| label | who speaks |
|---|---|
{classes}

- Go by the answer's words alone, not by whether they are right, kind or well written.
- If it claims nothing about itself, go by its voice. Plain help is `assistant`. A voice that only a certain person or being
  would have, such as an old sailor's or a ghost's, is that person's or being's.
- If it is more than one of them, label what it is for most of its length.
- It may end in the middle of a sentence. Label what is there.
- Read each row by itself. The rows are in random order, and no share of any label is expected.
- `note` is yours. Leave `id`, `question` and `answer` as they are, and label every row.
""".format(classes="\n".join(f"| `{name}` | {words} |" for name, words in CLASSES.items()))


class Source(Part):
    """Where an answer of the sheet comes from: run, arm, item, and turn of a conversation."""

    run: str
    arm: str
    item: str
    turn: int


class KeyRow(Part):
    """A row of the sheet: its id, the fingerprint of [question, answer], and every arm's place that gave this very answer."""

    id: str
    fingerprint: str
    sources: list[Source]


class Key(Part):
    """What the readers of a sheet do not see; ``rubric`` is what they were told."""

    format: Literal["trimtab sheet 1"] = "trimtab sheet 1"
    suite: str
    per_arm: int
    seed: int
    rubric: str
    rows: list[KeyRow]


@dataclass(frozen=True)
class SheetRow:
    """What a reader sees of one answer."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Labels:
    """One reader's labels.

    Attributes:
        reader: name, of its file.
        file: name of the file.
        fingerprint: of the file's bytes.
        labels: sheet id -> one of :data:`~trimtab.axis.judge.IDENTITIES`.
        missing: sheet ids without a label, in the sheet's order.
    """

    reader: str
    file: str
    fingerprint: str
    labels: dict[str, str]
    missing: list[str]


def draw_sheet(
    reports: Mapping[str, Report], *, per_arm: int = PER_ARM, suite: str = SUITE, seed: int = SEED
) -> tuple[list[SheetRow], Key]:
    """Draw answers for a sheet: the same items for every arm of every run, as far as they were answered.

    Roles take turns, so that none is left out before all have an item. The same question with the same answer is one row,
    whichever arms gave it. Rows are in random order, and are numbered in it.

    Args:
        reports: name of the run -> report.
        per_arm: answers of each arm of each run.
        suite: of :class:`~trimtab.eval.schema.AnswerRow`.
        seed: of the draw and the order.

    Raises:
        UserError: if a report holds no answers, or none of this suite.
    """
    tables = {run: _table(run, report, suite) for run, report in reports.items()}
    arms = [
        (run, arm)
        for run, table in tables.items()
        for arm in READ_ARMS
        if any(arm in row.answers for row in table.values())
    ]
    random = np.random.default_rng(seed)
    order = _order(tables, arms, random)
    drawn: dict[tuple[str, str], list[Source]] = {}
    short = []
    for run, arm in arms:
        table = tables[run]
        there = [place for place in order if place in table and arm in table[place].answers]
        if len(there) < per_arm:
            short.append(f"{run}, {arm}: {len(there)}")
        for place in there[:per_arm]:
            row = table[place]
            source = Source(run=run, arm=arm, item=row.id, turn=row.turn)
            drawn.setdefault((row.question, row.answers[arm].text), []).append(source)
    if short:
        log.warning("there are fewer answers than the %d of --per-arm: %s", per_arm, "; ".join(short))
    pairs = list(drawn)
    rows, keys = [], []
    for number, index in enumerate(random.permutation(len(pairs)), start=1):
        question, answer = pairs[index]
        row_id = f"r{number:0{len(str(len(pairs)))}}"
        rows.append(SheetRow(row_id, question, answer))
        keys.append(KeyRow(id=row_id, fingerprint=fingerprint([question, answer]), sources=drawn[question, answer]))
    return rows, Key(suite=suite, per_arm=per_arm, seed=seed, rubric=RUBRIC, rows=keys)


def _table(run: str, report: Report, suite: str) -> dict[tuple[str, int], AnswerRow]:
    """(item, turn) -> answers of a suite."""
    if not report.answers:
        raise UserError(
            "its report holds no answers to read",
            file=run,
            remedy="it was made by an earlier version: evaluate the run anew, into a folder of its own",
        )
    table = {(row.id, row.turn): row for row in report.answers if row.suite == suite}
    if not table:
        raise UserError(
            f"its report holds no answers of {suite!r}",
            file=run,
            key="--suite",
            remedy=f"there are: {', '.join(sorted({row.suite for row in report.answers}))}",
        )
    return table


def _order(
    tables: Mapping[str, Mapping[tuple[str, int], AnswerRow]],
    arms: Sequence[tuple[str, str]],
    random: np.random.Generator,
) -> list[tuple[str, int]]:
    """Items at random: those first that most arms of most runs answered, and of these one of each role before a second one."""
    clusters = {place: row.cluster for table in tables.values() for place, row in table.items()}
    places = sorted(clusters)
    shuffled = [places[index] for index in random.permutation(len(places))]
    answered = {
        place: sum(place in tables[run] and arm in tables[run][place].answers for run, arm in arms) for place in places
    }
    seen: Counter[str] = Counter()
    rank = {}
    for place in shuffled:
        rank[place] = seen[clusters[place]]
        seen[clusters[place]] += 1
    return sorted(shuffled, key=lambda place: (-answered[place], rank[place]))


def sheet_files(sheet: Path) -> tuple[Path, Path, Path]:
    """The sheet, its key and its rubric."""
    return sheet, sheet.with_name(f"{sheet.name}.key.json"), sheet.with_name(f"{sheet.name}.rubric.md")


def check_sheet(sheet: Path) -> None:
    """Whether a sheet can be written there.

    Raises:
        UserError: if its name is of no format of sheets, or if one of its files is there: labels would be lost.
    """
    if sheet.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError("a sheet is CSV or JSON Lines", file=sheet, key="--sheet", remedy="name it .csv or .jsonl")
    for path in sheet_files(sheet):
        if path.exists():
            raise UserError(
                "this is there already, and labels would be lost",
                file=path,
                key="--sheet",
                remedy="name another file, or move this one and those beside it away",
            )


def write_sheet(sheet: Path, rows: Sequence[SheetRow], key: Key) -> None:
    """Write the sheet, its key and its rubric, each whole or not at all; see :func:`sheet_files`.

    In CSV an apostrophe stands before an answer that a spreadsheet would take for a formula.
    """
    _, key_path, rubric_path = sheet_files(sheet)
    write_json(key_path, key.model_dump())
    write_text(rubric_path, key.rubric)
    if sheet.suffix.lower() == ".jsonl":
        write_jsonl(
            sheet, [dict(zip(COLUMNS, (row.id, row.question, row.answer, "", ""), strict=True)) for row in rows]
        )
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((row.id, _cell(row.question), _cell(row.answer), "", "") for row in rows)
    write_text(sheet, f"\ufeff{text.getvalue()}")  # the mark by which spreadsheets know UTF-8


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text


def read_key(path: Path) -> Key:
    """Read the key of a sheet.

    Raises:
        UserError: if it is missing, or is no key.
    """
    try:
        return Key.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"this is not the key of a sheet: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}",
            file=path,
            key="--key",
            remedy="give the .key.json that was written beside the sheet",
        ) from error


def read_labels(paths: Sequence[Path], key: Key, reports: Mapping[str, Report] | None = None) -> list[Labels]:
    """Read the labelled sheets, a file a reader. Rows without a label are kept in mind as missing.

    Args:
        paths: of the files.
        key: of the sheet.
        reports: that the sheet was drawn from, to hold the questions and answers in the files against, where these have them.

    Raises:
        UserError: if two files are the same; or with the faults of all files: unknown ids and labels, ids that stand twice,
            texts that are not the sheet's, files without any label.
    """
    resolved = [path.expanduser().resolve() for path in paths]
    twice = [path for path, count in Counter(resolved).items() if count > 1]
    if twice:
        raise UserError("this file is given twice", file=twice[0], key="--labels", remedy="give one file a reader")
    _refuse_copies(resolved)
    stems = [path.stem for path in resolved]
    names = [path.stem if stems.count(path.stem) == 1 else "/".join(path.parts[-2:]) for path in resolved]
    texts = {} if reports is None else texts_of(key, reports)
    found: list[Labels] = []
    faults: list[UserError] = []
    for name, path in zip(names, resolved, strict=True):
        try:
            found.append(_labels_of(name, path, key, texts))
        except UserError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise UserError(
            f"{len(faults)} files can't be used:" + "".join(f"\n  {error.file}: {error.fault}" for error in faults),
            key="--labels",
            remedy="; ".join(dict.fromkeys(error.remedy for error in faults)),
        )
    return found


def _refuse_copies(paths: Sequence[Path]) -> None:
    """Refuse a file that is another one's copy: one reader would count as two who agree on everything."""
    by_content: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            continue  # reading it says what is wrong
        first = by_content.setdefault(file_fingerprint(path), path)
        if first != path:
            raise UserError(
                f"this is the same as {first}, byte for byte",
                file=path,
                key="--labels",
                remedy="give one file a reader; two who do agree on every row are told apart by a word under note",
            )


def texts_of(key: Key, reports: Mapping[str, Report]) -> dict[str, tuple[str, str]]:
    """Sheet id -> question and answer; raises as :func:`answers_of`."""
    found = {row_id: places[0] for row_id, places in answers_of(key, reports).items()}
    return {row_id: (row.question, row.answers[source.arm].text) for row_id, (source, row) in found.items()}


def _labels_of(reader: str, path: Path, key: Key, texts: Mapping[str, tuple[str, str]]) -> Labels:
    known = {row.id for row in key.rows}
    seen: dict[str, str] = {}

    def make(row: Row) -> tuple[str, str]:
        cells = _cells(row.value)
        if not any(cells.values()):  # spreadsheets write such rows below the last one
            return "", ""
        row_id, label = cells["id"].lower(), cells["label"]
        if row_id not in known:
            raise RowFault(
                f"the sheet has no id {cells['id']!r}", "give the labels and the key of one and the same sheet"
            )
        if row_id in seen:
            raise RowFault(f"{row_id} stands at {seen[row_id]} too", "leave one row of each id")
        seen[row_id] = row.place
        if label.lower() not in ("", *IDENTITIES):
            raise RowFault(f"{row_id}: {label!r} is no label", f"the labels are {', '.join(IDENTITIES)}")
        if label and row_id in texts and (other := _others(cells, texts[row_id])):
            raise RowFault(
                f"{row_id}: its {' and '.join(other)} is not the sheet's",
                "see that each label stands at its own answer; question and answer may be left out of the file",
            )
        return row_id, label.lower()

    labels = {row_id: label for row_id, label in read_rows(path, make, key="--labels") if label}
    if not labels:
        raise UserError("no row of it has a label", file=path, key="--labels", remedy="fill the column label")
    missing = [row.id for row in key.rows if row.id not in labels]
    if missing:
        log.warning("%s: %d of %d rows have no label: %s", path, len(missing), len(known), _some(missing))
    return Labels(reader, path.name, file_fingerprint(path), labels, missing)


def _cells(value: object) -> dict[str, str]:
    """The cells of a row by the lower-case names of their columns, without blanks around them."""
    if not isinstance(value, dict) or not {"id", "label"} <= {str(name).strip().lower() for name in value}:
        raise RowFault("it has no id and label", "give the sheet's columns id and label")
    cells: dict[str, str] = {}
    for name, cell in value.items():
        column = str(name).strip().lower()
        if column in cells:
            raise RowFault(f"two columns are called {column}", "rename one of them")
        cells[column] = "" if cell is None else str(cell).strip()
    return cells


def _others(cells: Mapping[str, str], text: tuple[str, str]) -> list[str]:
    """Which of question and answer stand in the row and are not the sheet's."""
    pairs = zip(("question", "answer"), text, strict=True)
    return [name for name, own in pairs if name in cells and _as_read(cells[name]) != _as_read(own)]


def _as_read(text: str) -> str:
    """A text without what spreadsheets change in it: white space, and an apostrophe before what may be a formula."""
    return " ".join(text.strip().removeprefix("'").split())


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - MOST_TOLD} more" if len(words) > MOST_TOLD else ""
    return ", ".join(words[:MOST_TOLD]) + more


def answers_of(key: Key, reports: Mapping[str, Report]) -> dict[str, list[tuple[Source, AnswerRow]]]:
    """Sheet id -> the places of the reports that its answer comes from.

    Raises:
        UserError: if the reports do not hold the sheet's answers, word for word, or if a report is none of the sheet's.
    """
    drawn = dict.fromkeys(source.run for keyed in key.rows for source in keyed.sources)
    remedy = f"give the very runs that the sheet was drawn from, in one command: {', '.join(drawn)}"
    if others := [run for run in reports if run not in drawn]:
        raise UserError(f"the sheet has no answer of {', '.join(others)}", key="RUN", remedy=remedy)
    tables = {
        run: {(row.id, row.turn): row for row in report.answers if row.suite == key.suite}
        for run, report in reports.items()
    }
    found: dict[str, list[tuple[Source, AnswerRow]]] = {}
    gone = []
    for keyed in key.rows:
        places = []
        for source in keyed.sources:
            row = tables.get(source.run, {}).get((source.item, source.turn))
            answer = None if row is None else row.answers.get(source.arm)
            if row is None or answer is None or fingerprint([row.question, answer.text]) != keyed.fingerprint:
                gone.append(f"{keyed.id} ({source.run}, {source.arm}, {source.item})")
            else:
                places.append((source, row))
        found[keyed.id] = places
    if gone:
        raise UserError(
            f"{len(gone)} answers of the sheet are not in these reports: {_some(gone)}",
            key="RUN",
            remedy=f"{remedy}; one that was evaluated anew needs a new sheet",
        )
    return found
