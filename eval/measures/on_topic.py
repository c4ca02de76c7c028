"""Whether answers stay on the question, and whether they are answers at all.

A model that says one sentence to every role reads as no persona and answers nothing. So an answer is held against its own
question and three others of the set: on the question is one that is likeliest after its own, by the frozen base, and does not
just repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimtab.axis.echo import echoes
from trimtab.eval.answers.arms import Answers
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.sets import SETS, AnswerSet, figure_of, sets_of
from trimtab.eval.answers.usable import faults_of
from trimtab.eval.intervals import rate_row
from trimtab.eval.measures.limits import changes, within
from trimtab.eval.measures.suite import EffectValues, Evidence, Measure, Suite
from trimtab.eval.schema import Claim, RateTable

OFF_TOPIC_LIMIT = 0.1  # share of answers by which the tuned model may leave the question more often than the base
UNUSABLE_LIMIT = 0.05  # share of its answers that may be none


def measure(evaluation: Evaluation) -> Suite:
    """Answers of each set that are off the question, and that are none."""
    sets = evaluation.once(sets_of)
    off = {given.key: off_topic(evaluation, given.answers) for given in sets}
    faults = {given.key: {arm: _unusable(said) for arm, said in given.answers.items()} for given in sets}
    effects = []
    for given in sets:
        effects += changes(
            figure_of(given.key, "off_topic", "change"), f"Answers off the question {given.name}",
            "Share of answers that are likelier after another question than after their own, repeat it, or are none",
            given.clusters, off[given.key], OFF_TOPIC_LIMIT, crossed=given.crossed, control=True,
        )  # fmt: skip
        effects.append(
            EffectValues(
                figure_of(given.key, "unusable", "rate"), f"Answers that are none {given.name}", "share",
                "Share of the tuned model's answers that are empty, in another language than the question or a loop.",
                given.clusters, faults[given.key]["tuned"], UNUSABLE_LIMIT, one_sided=True, crossed=given.crossed,
            )
        )  # fmt: skip
    what = "likelier after another question, a repetition of it, or none"
    tables = [
        _table("off_topic", "Answers off the question", what, off, sets),
        _table("unusable", "Answers that are none", "empty, in another language, or a loop", faults, sets),
    ]  # fmt: skip
    return Suite(side_effects=effects, tables=tables)


def off_topic(evaluation: Evaluation, answers: Mapping[str, Answers]) -> dict[str, list[float]]:
    """Arm -> 1 for each answer that is off its question, else 0; NaN where one question alone was asked."""
    relevance = evaluation.relevance(answers)
    found = {}
    for arm, values in relevance.items():
        given = answers[arm]
        rows = zip(values, given.questions, given.texts, _unusable(given), strict=True)
        found[arm] = [
            1.0 if unusable or echoes(text, question) else float("nan") if value != value else float(value <= 0)
            for value, question, text, unusable in rows
        ]
    return found


def _unusable(given: Answers) -> list[float]:
    return [float(fault is not None) for fault in faults_of(given.questions, given.texts)]


def _table(
    identifier: str, name: str, what: str, found: Mapping[str, Mapping[str, Sequence[float]]], sets: Sequence[AnswerSet]
) -> RateTable:
    rows = [rate_row(given.name, found[given.key], given.clusters, crossed=given.crossed) for given in sets]
    return RateTable(id=identifier, name=name, meaning=f"Share of answers: {what}.", rows=rows)


OFF = tuple(figure_of(key, "off_topic", "change") for key in SETS)
UNUSABLE = tuple(figure_of(key, "unusable", "rate") for key in SETS)


def _on_topic(evidence: Evidence) -> Claim:
    return within("on_topic", "Answers stay on the question", [evidence.effect(name) for name in OFF])


def _usable(evidence: Evidence) -> Claim:
    return within("usable", "Answers can be read", [evidence.effect(name) for name in UNUSABLE])


MEASURE = Measure(measure, claims=(_on_topic, _usable), names=(*OFF, *UNUSABLE))
