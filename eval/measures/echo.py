"""Echo: answers under roles that repeat the question instead of answering it."""

from __future__ import annotations

from trimtab.axis.echo import LONGEST, echoes
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.measures.suite import EffectValues, Measure, Suite


def measure(evaluation: Evaluation) -> Suite:
    """Share of the tuned model's answers under roles that repeat the question, minus the base's."""
    questions = [item.question for item in evaluation.roles]
    tuned, base = (evaluation.on_roles[arm].texts for arm in ("tuned", "base"))
    changes = [
        float(echoes(one, question)) - float(echoes(other, question))
        for one, other, question in zip(tuned, base, questions, strict=True)
    ]
    effect = EffectValues(
        "echo_change", "Answers that repeat the question", "share",
        "Share of the tuned model's answers under held-out roles that repeat the question's first "
        f"{LONGEST} words, minus the base's.",
        evaluation.role_clusters, changes,
    )  # fmt: skip
    return Suite(side_effects=[effect])


MEASURE = Measure(measure)
