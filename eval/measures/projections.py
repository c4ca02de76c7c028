"""Projections: where answers under held-out roles lie on each axis, and how far an arm is from the capped self."""

from __future__ import annotations

from trimtab.eval import ids
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.grading import HALF, Light, too_few, toward_assistant
from trimtab.eval.measures.suite import Evidence, Measure, MetricValues, Suite
from trimtab.eval.schema import Claim, Metric, SideEffect
from trimtab.eval.wording import estimate_text, percent_text

# Ruler of an evaluation -> id, name, and what it lies along.
AXES = {
    "training": (ids.Z_TRAINING, "Projection, training axis", "the axis that the floor was built on"),
    "held_out": (
        ids.Z_HELD_OUT,
        "Projection, held-out-role axis",
        "an axis of its own: from roles, questions and default answers that the floor's axis does not know",
    ),
    "reextracted_tuned": (
        ids.Z_REEXTRACTED_TUNED,
        "Projection, axis of the tuned model",
        "the axis extracted anew from the tuned model",
    ),
    "reextracted_base": (
        ids.Z_REEXTRACTED_BASE,
        "Projection, axis of the base anew",
        "the base's axis extracted anew from as few answers as the tuned model's: it shows what so small an extraction loses",
    ),
}


def measure(evaluation: Evaluation) -> Suite:
    """Z of the answers along each axis, z of the base's answers under each arm, and the distance to the capped self."""
    arms, clusters, asked = evaluation.arms.names, evaluation.role_clusters, evaluation.role_questions
    metrics = []
    for key, (identifier, name, what) in AXES.items():
        if key in evaluation.rulers:
            values = {arm: evaluation.rulers[key].z(evaluation.on_roles[arm].means) for arm in arms}
            meaning = (
                f"Mean z of the same answers on {what}; 0 is the base's default Assistant. "
                "For capped arms it is what the next layer sees, after the cap."
            )
            metrics.append(MetricValues(identifier, name, "sigma", meaning, "higher", clusters, values, crossed=asked))
    metrics.append(
        MetricValues(
            ids.Z_SAME_TEXT, "Projection on the same words", "sigma",
            "Mean z, along the training axis, of the base's answers to the held-out roles as each arm reads them: what weights "
            "or cap do to the state where the words are the same; 0 is the base's default Assistant.",
            "higher", clusters, {arm: evaluation.ruler.z(means) for arm, means in evaluation.same_role_text.items()},
            crossed=asked,
        )
    )  # fmt: skip
    metrics.append(
        MetricValues(
            ids.KL_CAPPED_SELF, "Distance to the capped self", "nat/token",
            "KL(capped self || arm) per token on the capped self's own answers to the held-out roles; 0 for the capped self.",
            "lower", clusters, {arm: forced.kl for arm, forced in evaluation.drift_forced.items()}, crossed=asked,
        )
    )  # fmt: skip
    cosines = {f"cosine_reextracted_{arm}": row for arm, row in evaluation.cosines.items()}
    return Suite(metrics=metrics, axis_facts=cosines)


def _because_behaviour_did(evidence: Evidence) -> Claim:
    """Whether the projections rose because the text changed, or by a shift that changes nothing."""
    z = evidence.metric(ids.Z_TRAINING)
    neutral, in_role = evidence.effect(ids.DEFAULT_Z_SHIFT_SAME_TEXT), evidence.effect(ids.ROLE_Z_SHIFT_SAME_TEXT)
    light: Light = "grey"
    says = "Not measured."
    if z is not None and neutral is not None and in_role is not None and neutral.limit is not None:
        light, says = _judged(evidence.primary, z, neutral, in_role, neutral.limit)
        if too_few(in_role.by_cluster) or too_few(neutral.by_cluster):
            light = "grey"
    rule = (
        "Red: default text is lifted beyond its limit and at least half as far as role text (a constant shift) while the text is "
        "not shown to keep half of the effect; or the projections keep more than the text, of which less than half is kept. "
        "Green: the projections rise, and so does the text's interval above 0, the cap and the tuning both moving it toward the "
        "Assistant."
    )
    name = "Projections moved because behaviour did"
    return Claim(id=ids.PROJECTIONS, name=name, light=light, says=says, rule=rule, measured=z is not None)


def _judged(
    text: Metric | None, z: Metric, neutral: SideEffect, in_role: SideEffect, limit: float
) -> tuple[Light, str]:
    everywhere, where_due = neutral.estimate, in_role.estimate
    kept, along = text.retention.estimate if text is not None else None, z.retention.estimate
    moved = z.tuned_effect.low > 0
    shifts = (
        f"on the same words the projections rise by {estimate_text(where_due)} sigma under roles and by "
        f"{estimate_text(everywhere)} on default text"
    )
    if everywhere.low > limit and everywhere.value >= HALF * where_due.value:
        steered = kept is not None and kept.low > HALF
        what = "constant steering, always on" if steered else "it changes no behaviour that was measured"
        return "amber" if steered else "red", f"A shift of every text alike: {shifts}; {what}."
    if moved and kept is not None and along is not None and kept.high < min(HALF, along.low):
        said = f"The projections moved and the text did not: {shifts}, and the text keeps {percent_text(kept)}."
        return "red", said
    if moved:
        behaved = text is not None and kept is not None and kept.low > 0 and toward_assistant(text)
        return "green" if behaved else "amber", f"{shifts[0].upper()}{shifts[1:]}."
    return "grey", f"The projections did not rise beyond their noise; {shifts}."


MEASURE = Measure(measure, claims=(_because_behaviour_did,))
