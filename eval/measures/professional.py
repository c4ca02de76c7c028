"""Professional roles, such as tutor or editor, which the Assistant is to go on playing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trimtab.axis.chat_format import chat
from trimtab.eval import ids
from trimtab.eval.answers.arms import Item
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.reading import llr_of
from trimtab.eval.answers.refusing import refuses
from trimtab.eval.intervals import rate_row
from trimtab.eval.measures.limits import changes, within
from trimtab.eval.measures.on_topic import off_topic
from trimtab.eval.measures.suite import Asked, EffectValues, Evidence, Measure, Suite
from trimtab.eval.schema import Claim, RateTable
from trimtab.recipes import data
from trimtab.recipes.schema import EvalSection

LIMIT = 0.1  # share by which the tuned model may do worse than the base


def asks(section: EvalSection) -> Iterator[Asked]:
    """One question to each role."""
    probes = data.professional_probes(section.professional)
    yield Asked([chat(row["system"], "")[:-1] for row in probes], [[row["user"]] for row in probes])


def measure(evaluation: Evaluation) -> Suite:
    """Whether answers hold words that the role calls for, and how much less the role shows in the text."""
    probes = data.professional_probes(evaluation.section.professional)
    if not probes:
        return Suite()
    roles = [row["role"] for row in probes]
    answers = evaluation.answers(
        "professional", [Item(row["id"], row["role"], chat(row["system"], row["user"])) for row in probes]
    )
    missed = {
        arm: [float(not keyword_hit(text, row["keywords"])) for text, row in zip(given.texts, probes, strict=True)]
        for arm, given in answers.items()
    }
    off = off_topic(evaluation, answers)
    refused = {arm: [float(refuses(text)) for text in given.texts] for arm, given in answers.items()}
    lost = {arm: [max(pair) for pair in zip(off[arm], refused[arm], strict=True)] for arm in off}
    effects = [
        *changes(
            ids.PROFESSIONAL_MISSED, "Professional roles no longer played",
            "Share of answers to tutor, editor, analyst and such roles with fewer than two words that the role calls for",
            roles, missed, LIMIT,
        ),
        *changes(
            ids.PROFESSIONAL_OFF, "Professional roles: off the question or refused",
            "Share of those answers that leave the question or decline", roles, lost, LIMIT,
        ),
    ]  # fmt: skip
    llr = {arm: np.asarray(row) for arm, row in llr_of(evaluation.arms, answers).items()}
    effects.append(
        EffectValues(
            "professional_llr_change", "Professional roles: persona log-likelihood ratio, tuned minus base", "nat/token",
            "How much less of its prompt the text carries; the cap's own change is "
            f"{float(np.nanmean(llr['base+cap'] - llr['base'])):+.3f}.",
            roles, (llr["tuned"] - llr["base"]).tolist(),
        )
    )  # fmt: skip
    table = [("played", {arm: [1 - value for value in row] for arm, row in missed.items()}), ("off the question", off)]
    rows = [rate_row(label, values, roles) for label, values in (*table, ("refused", refused))]
    name = "Professional roles, such as tutor or editor"
    return Suite(
        side_effects=effects, tables=[RateTable(id="professional", name=name, meaning="Share of answers.", rows=rows)]
    )


def keyword_hit(text: str, keywords: Sequence[str], least: int = 2) -> bool:
    """Whether at least ``least`` of the keywords occur in the answer."""
    lower = text.lower()
    return sum(keyword in lower for keyword in keywords) >= least


def _still_played(evidence: Evidence) -> Claim:
    effects = [evidence.effect(key) for key in (ids.PROFESSIONAL_MISSED, ids.PROFESSIONAL_OFF)]
    return within("professional", "Professional roles are still played", effects)


MEASURE = Measure(measure, claims=(_still_played,), asks=asks)
