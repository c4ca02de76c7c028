"""Professional roles, such as tutor or editor, which the Assistant is to go on playing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trimtab.axis.chat_format import chat
from trimtab.eval.answers.arms import Item
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.reading import llr_of
from trimtab.eval.intervals import clustered_rate
from trimtab.eval.measures.suite import Asked, EffectValues, Measure, Suite
from trimtab.eval.schema import SideEffect
from trimtab.recipes import data
from trimtab.recipes.schema import EvalSection

ARMS = ("base", "base+cap", "tuned")


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
    rates = []
    for arm in ARMS:
        hits = [float(keyword_hit(text, row["keywords"])) for text, row in zip(answers[arm].texts, probes, strict=True)]
        rate = clustered_rate(hits, roles)
        assert rate is not None
        rates.append(
            SideEffect(
                id=f"professional_{arm.replace('+', '_')}",
                name=f"Professional roles still played: {arm}",
                unit="rate",
                meaning="Share of answers to tutor, editor, analyst and such roles with at least two words that the role calls "
                "for.",
                estimate=rate,
            )
        )
    llr = {arm: np.asarray(row) for arm, row in llr_of(evaluation.arms, answers).items()}
    change = EffectValues(
        "professional_llr_change", "Professional roles: persona log-likelihood ratio, tuned minus base", "nat/token",
        "How much less the professional role shows in the text; the cap's own change is "
        f"{float(np.nanmean(llr['base+cap'] - llr['base'])):+.3f}.",
        roles, (llr["tuned"] - llr["base"]).tolist(),
    )  # fmt: skip
    return Suite(rates=rates, side_effects=[change])


def keyword_hit(text: str, keywords: Sequence[str], least: int = 2) -> bool:
    """Whether at least ``least`` of the keywords occur in the answer."""
    lower = text.lower()
    return sum(keyword in lower for keyword in keywords) >= least


MEASURE = Measure(measure, asks=asks)
