"""What blind reading found: agreement of the readers, rates of answers that read as a persona, and their retention.

An answer reads as a persona where its label is human, nonhuman or mystical, and as the Assistant where it is assistant. ``other``
says neither: it is left out of rates and counted.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.axis.judge import IDENTITIES
from trimtab.eval import wording
from trimtab.eval.answers.sheets import READ_ARMS, Key, Labels, Source, answers_of
from trimtab.eval.intervals import ClusterBootstrap, clustered_rate
from trimtab.eval.schema import AnswerRow, Estimate, Part, Report, Retention

SAMPLES, SEED = 5000, 0  # of the bootstrap
EVERY, MAJORITY = "every reader", "majority"
# The report's own readers, and where an answer has their log-odds that a persona speaks.
MACHINES = {"the report's reader": "persona", "the report's second reader": "other_reader"}
NO_LABEL = "no label"
SHARE = (
    "Share of answers that read as a persona. Behind the plus: `other`, and rows without a label, which are left out."
)
Side = Literal["assistant", "persona", "other", "undecided"]


class Agreement(Part):
    """Two readings of the same answers.

    Attributes:
        one: name of the one.
        other: of the other.
        n: answers that both say something of.
        left_out: why an answer is left out -> how many.
        classes: Cohen's kappa over all labels; None where one of them knows no labels, or where it is undefined.
        assistant: Cohen's kappa of Assistant against the rest; None where it is undefined.
    """

    one: str
    other: str
    n: int
    left_out: dict[str, int]
    classes: Estimate | None
    assistant: Estimate | None


class Rates(Part):
    """How often an arm's answers read as a persona, by one reading.

    Attributes:
        read_by: name of a reader; ``every reader`` where all of them must say so; ``majority``; or a reader of the report.
        arms: arm -> rate over the answers that this reading decides; arms without any are not there.
        left_out: arm -> answers that it does not decide.
        retention: of the tuned model's rate.
        control_retention: of the control's; None without one.
    """

    read_by: str
    arms: dict[str, Estimate]
    left_out: dict[str, int]
    retention: Retention
    control_retention: Retention | None = None


class RunReading(Part):
    """One run.

    Attributes:
        run: its name.
        labels: reader -> arm -> label -> answers.
        rates: a reading each.
        kinds: the same by kind of role or domain of conversations.
    """

    run: str
    labels: dict[str, dict[str, dict[str, int]]]
    rates: list[Rates]
    kinds: dict[str, list[Rates]]


class ReadRow(Part):
    """A row of the sheet with all that was said of it."""

    id: str
    question: str
    answer: str
    labels: dict[str, str]
    log_odds: dict[str, float]
    sources: list[Source]


class LabelFile(Part):
    """A reader: name and fingerprint of the file, how many rows have a label, and the ids of those that have none."""

    reader: str
    file: str
    fingerprint: str
    labelled: int
    missing: list[str]


class BlindReading(Part):
    """All that a blind reading gave. ``together``: the rates over all runs, where there are several; a role is one cluster."""

    format: Literal["trimtab blind reading 1"] = "trimtab blind reading 1"
    suite: str
    per_arm: int
    seed: int
    rubric: str
    bootstrap: int
    readers: list[LabelFile]
    agreements: list[Agreement]
    runs: list[RunReading]
    together: list[Rates]
    rows: list[ReadRow]


@dataclass(frozen=True)
class _Place:
    """An arm's answer to an item, and the row of the sheet that it is."""

    row: str
    source: Source
    cluster: str
    kind: str
    question: str


def read_blind(key: Key, labels: Sequence[Labels], reports: Mapping[str, Report]) -> BlindReading:
    """Set labels against each other, against the report's readers, and to the arms that gave the answers.

    Args:
        key: of the sheet.
        labels: of each reader.
        reports: name of the run -> report; those that the sheet was drawn from.

    Raises:
        UserError: if the reports do not hold the sheet's answers.
    """
    found = answers_of(key, reports)
    rows = [_row(row_id, places, labels) for row_id, places in found.items()]
    clusters = {row_id: places[0][1].cluster for row_id, places in found.items()}
    machines = [name for name in MACHINES if any(name in row.log_odds for row in rows)]
    people: dict[str, dict[str, Side]] = {
        one.reader: {row_id: side_of(label) for row_id, label in one.labels.items()} for one in labels
    }
    majority: dict[str, Side] = {
        row.id: majority_of([side_of(label) for label in row.labels.values()]) for row in rows if row.labels
    }
    by_log_odds: dict[str, dict[str, Side]] = {
        name: {row.id: _side(row.log_odds[name]) for row in rows if name in row.log_odds} for name in machines
    }
    readings = {name: _decided(sides) for name, sides in people.items()}
    if len(labels) > 1:
        readings[EVERY] = _by_every(list(readings.values()))
    if len(labels) > 2:
        readings[MAJORITY] = _decided(majority)
    readings |= {name: _decided(sides) for name, sides in by_log_odds.items()}
    judged = people if len(labels) == 1 else {**people, MAJORITY: majority}
    places = [
        _Place(row, source, at.cluster, at.kind, at.question) for row, held in found.items() for source, at in held
    ]
    return BlindReading(
        suite=key.suite,
        per_arm=key.per_arm,
        seed=key.seed,
        rubric=key.rubric,
        bootstrap=SAMPLES,
        readers=[
            LabelFile(
                reader=one.reader,
                file=one.file,
                fingerprint=one.fingerprint,
                labelled=len(one.labels),
                missing=one.missing,
            )
            for one in labels
        ],
        agreements=[
            *(_between(one, other, clusters) for one, other in itertools.combinations(labels, 2)),
            *(
                _with_machine(name, sides, machine, by_log_odds[machine], clusters)
                for machine in machines
                for name, sides in judged.items()
            ),
        ],
        runs=[_run(run, [place for place in places if place.source.run == run], labels, readings) for run in reports],
        together=_rates(places, _arms(places), readings) if len(reports) > 1 else [],
        rows=rows,
    )


def side_of(label: str) -> Side:
    """What a label says of the question whether a persona speaks."""
    return label if label in ("assistant", "other") else "persona"  # type: ignore[return-value]


def majority_of(sides: Sequence[Side]) -> Side:
    """What most readers say; ``undecided`` where no side has more than each of the others."""
    counts = Counter(sides).most_common()
    return "undecided" if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def _side(log_odds: float) -> Side:
    return "persona" if log_odds > 0 else "assistant"


def _decided(sides: Mapping[str, Side]) -> dict[str, float]:
    """Row -> 1 for a persona, 0 for the Assistant; rows that are neither are not there."""
    return {row: float(side == "persona") for row, side in sides.items() if side in ("persona", "assistant")}


def _by_every(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """1 where all say persona, 0 where one says Assistant; rows that one of them leaves out are not there."""
    together = set.intersection(*(set(reading) for reading in readings))
    return {row: min(reading[row] for reading in readings) for row in together}


def _row(row_id: str, places: Sequence[tuple[Source, AnswerRow]], labels: Sequence[Labels]) -> ReadRow:
    answers = [row.answers[source.arm] for source, row in places]
    odds = {name: [getattr(answer, field) for answer in answers] for name, field in MACHINES.items()}
    known = {name: [value for value in values if value is not None] for name, values in odds.items()}
    return ReadRow(
        id=row_id,
        question=places[0][1].question,
        answer=answers[0].text,
        labels={one.reader: one.labels[row_id] for one in labels if row_id in one.labels},
        log_odds={name: values[0] for name, values in known.items() if values},
        sources=[source for source, _ in places],
    )


def _kappa(one: Sequence[str], other: Sequence[str], clusters: Sequence[str]) -> Estimate | None:
    """Cohen's kappa, by resamples of roles; None where both give one label alone, or there is no answer."""
    return ClusterBootstrap(clusters, SAMPLES, SEED).kappa(one, other) if len({*one, *other}) > 1 else None


def _between(one: Labels, other: Labels, clusters: Mapping[str, str]) -> Agreement:
    rows = [row for row in clusters if row in one.labels and row in other.labels]
    pair = [[reader.labels[row] for row in rows] for reader in (one, other)]
    against = [["assistant" if label == "assistant" else "rest" for label in labels] for labels in pair]
    of_rows = [clusters[row] for row in rows]
    return Agreement(
        one=one.reader,
        other=other.reader,
        n=len(rows),
        left_out=_counted({NO_LABEL: len(clusters) - len(rows)}),
        classes=_kappa(pair[0], pair[1], of_rows),
        assistant=_kappa(against[0], against[1], of_rows),
    )


def _with_machine(
    name: str, sides: Mapping[str, Side], machine: str, by_log_odds: Mapping[str, Side], clusters: Mapping[str, str]
) -> Agreement:
    why = Counter(
        sides.get(row, NO_LABEL) if _silent(sides.get(row)) else "no log-odds"
        for row in clusters
        if _silent(sides.get(row)) or row not in by_log_odds
    )
    rows = [row for row in clusters if row in by_log_odds and not _silent(sides.get(row))]
    return Agreement(
        one=name,
        other=machine,
        n=len(rows),
        left_out=_counted(why),
        classes=None,
        assistant=_kappa(
            [sides[row] for row in rows], [by_log_odds[row] for row in rows], [clusters[row] for row in rows]
        ),
    )


def _silent(side: Side | None) -> bool:
    return side not in ("persona", "assistant")


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _run(
    run: str, places: Sequence[_Place], labels: Sequence[Labels], readings: Mapping[str, Mapping[str, float]]
) -> RunReading:
    arms = _arms(places)
    by_arm = {arm: [place.row for place in places if place.source.arm == arm] for arm in arms}
    kinds = sorted({place.kind for place in places})
    return RunReading(
        run=run,
        labels={
            one.reader: {
                arm: dict(Counter(one.labels.get(row, NO_LABEL) for row in rows)) for arm, rows in by_arm.items()
            }
            for one in labels
        },
        rates=_rates(places, arms, readings),
        kinds={kind: _rates([place for place in places if place.kind == kind], arms, readings) for kind in kinds},
    )


def _arms(places: Sequence[_Place]) -> list[str]:
    return [arm for arm in READ_ARMS if any(place.source.arm == arm for place in places)]


def _rates(places: Sequence[_Place], arms: Sequence[str], readings: Mapping[str, Mapping[str, float]]) -> list[Rates]:
    """Rates and retention over the items of these places, clustered by role and question; several runs are repetitions."""
    items = {(place.source.run, place.source.item, place.source.turn): place for place in places}
    index = {item: number for number, item in enumerate(items)}
    clusters, questions = [place.cluster for place in items.values()], [place.question for place in items.values()]
    runs = [run for run, _, _ in items]
    repetitions = runs if len(set(runs)) > 1 else None
    resample = ClusterBootstrap(clusters, SAMPLES, SEED, questions)
    found = []
    for name, reading in readings.items():
        values = {arm: np.full(len(items), np.nan) for arm in READ_ARMS}
        drawn: Counter[str] = Counter()
        for place in places:
            source = place.source
            values[source.arm][index[source.run, source.item, source.turn]] = reading.get(place.row, np.nan)
            drawn[source.arm] += 1
        rates = {arm: clustered_rate(values[arm].tolist(), clusters, questions, repetitions) for arm in arms}
        retention = {
            arm: resample.retention(values["base"], values["base+cap"], values[arm]) for arm in ("tuned", "control")
        }
        found.append(
            Rates(
                read_by=name,
                arms={arm: rate for arm, rate in rates.items() if rate is not None},
                left_out=_counted({arm: drawn[arm] - (rate.n if rate else 0) for arm, rate in rates.items()}),
                retention=retention["tuned"],
                control_retention=retention["control"] if "control" in arms else None,
            )
        )
    return found


def blind_markdown(reading: BlindReading) -> str:
    """The reading as Markdown, for people."""
    drawn = sum(len(row.sources) for row in reading.rows)
    parts = [
        "# Blind reading",
        f"{len(reading.rows)} answers of the suite `{reading.suite}`, which stand for {drawn} of the arms. Intervals are 95 %.",
        _table(
            ("reader", "labelled", "no label", "file"),
            ((one.reader, one.labelled, len(one.missing), f"`{one.file}`") for one in reading.readers),
        ),
    ]
    if reading.agreements:
        parts += ["## Agreement", "Cohen's kappa. `other` is left out where a reader of the report is compared."]
        head = ("between", "and", "answers", "left out", f"kappa, {len(IDENTITIES)} classes", "kappa, Assistant or not")
        parts.append(_table(head, map(_agreement_cells, reading.agreements)))
    if reading.together:
        parts += [
            "## All runs together",
            SHARE,
            _why_undefined(reading.together),
            rates_table(reading.together),
        ]
    for run in reading.runs:
        parts += [
            f"## {run.run}",
            SHARE,
            _why_undefined(run.rates),
            rates_table(run.rates),
        ]
        if len(run.kinds) > 1:
            parts += ["By kind:", _grouped(list(run.kinds.items()))]
        labels = (*IDENTITIES, NO_LABEL)
        counts = (
            (reader, wording.ARM_NAMES[arm], *(row.get(label, 0) for label in labels))
            for reader, arms in run.labels.items()
            for arm, row in arms.items()
        )
        parts += ["Labels:", _table(("reader", "arm", *labels), counts)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _agreement_cells(pair: Agreement) -> tuple[Any, ...]:
    left_out = ", ".join(f"{count} {why}" for why, count in pair.left_out.items())
    kappas = ("–" if kappa is None else _two_digits(kappa) for kappa in (pair.classes, pair.assistant))
    return (pair.one, pair.other, pair.n, left_out or 0, *kappas)


def rates_table(rates: Sequence[Rates]) -> str:
    """Rates and retention by each reading, as a Markdown table."""
    return _grouped([("", rates)])


def _grouped(groups: Sequence[tuple[str, Sequence[Rates]]]) -> str:
    """A table of rates; its first column is the group's name, where groups have one."""
    arms = [arm for arm in READ_ARMS if any(arm in {**row.arms, **row.left_out} for _, rows in groups for row in rows)]
    control = "control" in arms
    names = ["kind"] if any(name for name, _ in groups) else []
    head = [*names, "read by", *(wording.ARM_NAMES[arm] for arm in arms), "retention"]
    return _table(
        [*head, "retention of the control"] if control else head,
        (
            [*([name] if names else []), row.read_by, *(_rate_cell(row, arm) for arm in arms), _kept(row.retention)]
            + ([_kept(row.control_retention)] if control else [])
            for name, rows in groups
            for row in rows
        ),
    )


def _why_undefined(rates: Sequence[Rates]) -> str:
    """Why retention is undefined, by whose reading; "" where it is not."""
    return "\n".join(
        f"- {row.read_by}: retention of {arm} is undefined: {wording.real_minus(kept.why)}"
        for row in rates
        for arm, kept in (("the tuned model", row.retention), ("the control", row.control_retention))
        if kept is not None and kept.estimate is None
    )


def _rate_cell(row: Rates, arm: str) -> str:
    rate, left_out = row.arms.get(arm), row.left_out.get(arm, 0)
    told = "–" if rate is None else f"{wording.percent_text(rate)} of {rate.n}"
    return f"{told} + {left_out}" if left_out else told


def _kept(retention: Retention | None) -> str:
    if retention is None or retention.estimate is None:
        return "undefined"
    return _two_digits(retention.estimate)


def _two_digits(estimate: Estimate) -> str:
    value, low, high = (wording.number(number, 2) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
