"""How much of its own system prompt a text carries, by the persona log-likelihood ratio of the frozen base.

It does not say who speaks: a stock phrase, a refusal and a declaration of love carry little of a role's prompt. On labelled
answers about identity its AUC is 0.64, where :mod:`~trimtab.eval.measures.who_speaks` is the measure. Nothing is decided on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.axis.scoring import SCORE_BATCH, persona_llr
from trimtab.eval import ids
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.measures.suite import Measure, MetricValues, Suite
from trimtab.eval.schema import Estimate

NAME = "Carries its system prompt"
UNIT = "nat/token"
MOST = 1.0  # nat a token: a short answer that repeats its prompt has ten times the others' ratio, and is cut to this


def measure(evaluation: Evaluation) -> Suite:
    """The persona log-likelihood ratio of answers under held-out roles, and how well it tells them from default text."""
    ratios = {arm: clipped(evaluation.role_ratios[arm]) for arm in evaluation.arms.names}
    auc = _auc(evaluation, ratios["base"], clipped(_default_ratios(evaluation)))
    metric = MetricValues(
        ids.TEXT_LLR, NAME, UNIT,
        "Persona log-likelihood ratio of answers under held-out role prompts to held-out questions, scored by the frozen "
        f"base: how much better the prompt explains the text than none does, cut at {MOST:g} either way. It says how much of its "
        "own prompt a text carries, not who speaks.",
        "lower", evaluation.role_clusters, ratios, {} if auc is None else {"AUC by prompt": auc},
        crossed=evaluation.role_questions,
    )  # fmt: skip
    return Suite(metrics=[metric])


def clipped(ratios: Sequence[float]) -> list[float]:
    """Ratios cut at :data:`MOST` either way; NaN stays."""
    return [float(value) for value in np.clip(ratios, -MOST, MOST)]


def _default_ratios(evaluation: Evaluation) -> list[float]:
    """Ratio of the base's default answers, scored under role prompts in turn, so that both classes are scored the same way."""
    roles, defaults, arms = evaluation.roles, evaluation.defaults, evaluation.arms
    systems = [item.prompt[0] for item in roles]
    as_roles = [[systems[(i * 7) % len(systems)], item.prompt[-1]] for i, item in enumerate(defaults)]
    texts = evaluation.on_default["base"].texts
    with arms.weights("base") as model:
        return persona_llr(
            model, arms.form, as_roles, [[item.prompt[-1]] for item in defaults], texts, batch_size=SCORE_BATCH
        )


def _auc(evaluation: Evaluation, roles: Sequence[float], default: Sequence[float]) -> Estimate | None:
    """AUC of the ratio: the base's answers under roles against its default answers; None where one class is empty."""
    scored = [
        (value, item.cluster, in_role)
        for items, found, in_role in ((evaluation.roles, roles, True), (evaluation.defaults, default, False))
        for item, value in zip(items, found, strict=True)
        if not math.isnan(value)
    ]
    labels = [in_role for _, _, in_role in scored]
    if len(set(labels)) < 2:
        return None
    return evaluation.resample([cluster for _, cluster, _ in scored]).auc([value for value, _, _ in scored], labels)


MEASURE = Measure(measure)
