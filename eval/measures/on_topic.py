"""Whether answers stay on the question, and whether they are answers at all.

A model that says one sentence to every role reads as no persona and answers nothing. So an answer is held against its own
question and three others of the set: on the question is one that is likeliest after its own, by the frozen base, and does not
just repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.axis.echo import echoes
from trimtab.eval.answers.arms import Answers
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.sets import figure_of, figures_of, sets_of
from trimtab.eval.answers.usable import faults_of
from trimtab.eval.intervals import rate_row
from trimtab.eval.measures.limits import changes_in, within
from trimtab.eval.measures.suite import EffectValues, Evidence, Measure, Suite
from trimtab.eval.schema import Claim, RateTable

OFF_TOPIC_LIMIT = 0.1  # share of answers by which the tuned model may leave the question more often than the base
UNUSABLE_LIMIT = 0.05  # share of its answers that may be none


def measure(evaluation: Evaluation) -> Suite:
    """Answers of each set that are off the question, and that are none."""
    sets = evaluation.once(sets_of)
    effects, off = changes_in(
        sets, "off_topic", "Answers off the question",
        "Share of answers that are likelier after another question than after their own, repeat it, or are none",
        lambda given: off_topic(evaluation, given.answers), OFF_TOPIC_LIMIT, control=True,
    )  # fmt: skip
    faults = []
    for given in sets:
        found = {arm: _unusable(said) for arm, said in given.answers.items()}
        effects.append(
            EffectValues(
                figure_of(given.key, "unusable", "rate"), f"Answers that are none {given.name}", "share",
                "Share of the tuned model's answers that are empty, in another language than the question or a loop.",
                given.clusters, found["tuned"], UNUSABLE_LIMIT, one_sided=True, crossed=given.crossed,
            )
        )  # fmt: skip
        faults.append(rate_row(given.name, found, given.clusters, crossed=given.crossed))
    what = "Share of answers: likelier after another question, a repetition of it, or none."
    none = "Share of answers: empty, in another language, or a loop."
    tables = [
        RateTable(id="off_topic", name="Answers off the question", meaning=what, rows=off),
        RateTable(id="unusable", name="Answers that are none", meaning=none, rows=faults),
    ]
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


OFF = figures_of("off_topic", "change")
UNUSABLE = figures_of("unusable", "rate")


def _on_topic(evidence: Evidence) -> Claim:
    return within("on_topic", "Answers stay on the question", [evidence.effect(name) for name in OFF])


def _usable(evidence: Evidence) -> Claim:
    return within("usable", "Answers can be read", [evidence.effect(name) for name in UNUSABLE])


MEASURE = Measure(measure, claims=(_on_topic, _usable), names=(*OFF, *UNUSABLE))
