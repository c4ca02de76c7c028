"""Whether answers say something of their own.

A refusal that names its subject, or vague words around it, stays on the question and reads as the Assistant; so does an answer
that breaks off. *Hollow* is an answer with hardly a word that means something and is not its question's, and one that is mostly a
phrase which other answers have, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from trimtab.axis.substance import new_words, runs_beside
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.sets import AnswerSet, figures_of, sets_of
from trimtab.eval.measures.limits import changes_in, within
from trimtab.eval.measures.suite import Evidence, Measure, Suite
from trimtab.eval.schema import Claim, RateTable

LIMIT = 0.1  # share of answers by which the tuned model's may be hollow more often than the base's
FEW = 3  # fewer new words than the base's median answer has, divided by this, are too few
GRAM = 3  # words of a phrase that is looked for elsewhere
STOCK = 0.5  # share of an answer's phrases, from which it is a stock phrase


def measure(evaluation: Evaluation) -> Suite:
    """Hollow answers of each set, by arm, and by how much they became more."""
    effects, rows = changes_in(
        evaluation.once(sets_of), "hollow", "Hollow answers",
        "Share of answers with hardly a word of meaning that is not the question's, or mostly of a phrase that stands in "
        "answers to other questions", _hollow, LIMIT,
    )  # fmt: skip
    meaning = "Share of answers: hardly a word that the question has not, or a phrase of other answers."
    table = RateTable(id="hollow", name="Hollow answers", meaning=meaning, rows=rows)
    return Suite(side_effects=effects, tables=[table])


def _hollow(given: AnswerSet) -> dict[str, list[float]]:
    """Arm -> 1 for each hollow answer, else 0."""
    counts = {
        arm: [new_words(*pair) for pair in zip(said.questions, said.texts, strict=True)]
        for arm, said in given.answers.items()
    }
    fewest = max(1.0, median(counts["base"]) / FEW)
    return {
        arm: [
            float(count < fewest or share > STOCK)
            for count, share in zip(counts[arm], stock_shares(given.subjects, said.questions, said.texts), strict=True)
        ]
        for arm, said in given.answers.items()
    }


def stock_shares(subjects: Sequence[str], questions: Sequence[str], texts: Sequence[str]) -> list[float]:
    """Share of each text's phrases that stand in a text on another subject as well; 0 for one too short for a phrase.

    A phrase is three words in a row between those of the text's own question, so that a subject put into it hides none.

    Args:
        subjects: what each text is about.
        questions: what each answers.
        texts: of one arm.
    """
    phrases = [
        {tuple(run[i : i + GRAM]) for run in runs_beside(question, text) for i in range(len(run) - GRAM + 1)}
        for question, text in zip(questions, texts, strict=True)
    ]
    about: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for subject, own in zip(subjects, phrases, strict=True):
        for phrase in own:
            about[phrase].add(subject)
    return [sum(len(about[phrase]) > 1 for phrase in own) / len(own) if own else 0.0 for own in phrases]


NAMES = figures_of("hollow", "change")


def _say_something(evidence: Evidence) -> Claim:
    return within("substance", "Answers say something of their own", [evidence.effect(name) for name in NAMES])


MEASURE = Measure(measure, claims=(_say_something,), names=NAMES)
