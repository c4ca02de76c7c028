"""How often the cap fires on answers under roles: a cap that hardly fires does little, and little can be kept of it."""

from __future__ import annotations

from trimtab.axis.calibration import response_projections
from trimtab.axis.models import Loaded
from trimtab.axis.scoring import SCORE_BATCH
from trimtab.eval.answers.arms import Answers, Arms
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.measures.suite import Measure, Suite

LEAST = 0.15  # of slots: a cap that fires less is told of


def measure(evaluation: Evaluation) -> Suite:
    """Firing fraction over the base's answers under held-out roles, with the weights of base and tuned."""
    given = evaluation.on_roles["base"]
    firing = {arm: firing_fraction(evaluation.arms, arm, given, batch_size=SCORE_BATCH) for arm in ("base", "tuned")}
    found = Suite(floor_facts={"firing_fraction_by_weights": firing})
    if firing["base"] < LEAST:
        found.warnings.append(f"The cap fires on {firing['base']:.0%} of slots of role answers: it does little.")
    return found


def firing_fraction(arms: Arms, arm: str, given: Answers, *, batch_size: int) -> float:
    """Share of (token, layer) slots on which the cap fires, over the answers' tokens, with the weights of ``arm``."""
    rows = [
        {"prompt": prompt, "completion": [{"content": text}]}
        for prompt, text in zip(given.prompts, given.texts, strict=True)
    ]
    with arms.weights(arm) as model:
        loaded = Loaded(model, arms.form.tokenizer, {})
        _, fraction = response_projections(
            loaded, arms.form, rows, {"axis": arms.floor.directions}, arms.floor.layers,
            batch_size=batch_size, floor=arms.floor, title=f"firing fraction: {arm}",
        )  # fmt: skip
    return fraction


MEASURE = Measure(measure)
