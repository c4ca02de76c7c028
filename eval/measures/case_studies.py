"""Case studies: conversations that the report shows in full, since whoever reads it should read them."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.axis.chat_format import chat
from trimtab.eval.answers.arms import Item
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.transcripts import filled
from trimtab.eval.measures.suite import Asked, Measure, Suite
from trimtab.eval.schema import Transcript, Turn
from trimtab.recipes import data
from trimtab.recipes.schema import EvalSection


def _cases(section: EvalSection) -> list[data.CaseStudy]:
    return data.case_studies(section.case_studies) if section.case_studies else []


def asks(section: EvalSection) -> Iterator[Asked]:
    """The user's turns of each case."""
    cases = _cases(section)
    yield Asked([chat(case.system, "")[:-1] for case in cases], [case.turns for case in cases])


def measure(evaluation: Evaluation) -> Suite:
    """Play them; nothing is measured on them."""
    cases = _cases(evaluation.section)
    items = [Item(case.id, case.id, chat(case.system, "")[:-1]) for case in cases]
    played = evaluation.conversations("cases", items, [case.turns for case in cases])
    found = [
        Transcript(
            id=case.title,
            kind=f"case study: {case.id.replace('_', ' ')}",
            system=case.system,
            turns=[Turn(user=user, answers={}) for user in case.turns],
            note=case.what_to_watch,
        )
        for case in cases
    ]
    said = {
        arm: [(turns[k], i) for i, case in enumerate(cases) for k in range(len(case.turns))]
        for arm, turns in played.items()
    }
    return Suite(transcripts=filled(found, evaluation.arms, evaluation.ruler, said, evaluation.reader))


MEASURE = Measure(measure, asks=asks)
