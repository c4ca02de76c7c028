"""Text-only behaviour: how much of the role a text carries, by the persona log-likelihood ratio of the frozen base."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trimtab.axis.scoring import SCORE_BATCH, persona_llr
from trimtab.eval import ids
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.answers.transcripts import filled, shares
from trimtab.eval.grading import LIGHTS, Light, control_keeps_as_much, grade, too_few
from trimtab.eval.intervals import most_telling
from trimtab.eval.measures.suite import Evidence, Measure, MetricValues, Suite
from trimtab.eval.schema import Claim, Estimate, Transcript, Turn
from trimtab.eval.wording import inline_name, number, percent_text

NAME = "Text-only behaviour"
UNIT = "nat/token"
TELLING = 0.1  # of retention: what a single role must move to be named
ROOM = 0.1  # nat a token that role answers should lie above default text
SEPARATES = 0.8  # AUC below which the ratio is to be read with care


def measure(evaluation: Evaluation) -> Suite:
    """The persona log-likelihood ratio of answers under held-out roles, and how well it tells them from default text."""
    ratios = {arm: evaluation.role_ratios[arm] for arm in evaluation.arms.names}
    default = _default_ratios(evaluation)
    auc = _auc(evaluation, ratios["base"], default)
    metric = MetricValues(
        ids.TEXT_LLR, NAME, UNIT,
        "Persona log-likelihood ratio of answers under held-out role prompts to held-out questions, scored by the frozen "
        "base from the text alone: how much better the role explains the text than the default Assistant does.",
        "lower", evaluation.role_clusters, ratios, {} if auc is None else {"AUC": auc}, primary=True,
        crossed=evaluation.role_questions,
    )  # fmt: skip
    return Suite(
        metrics=[metric],
        transcripts=_transcripts(evaluation),
        warnings=[*_doubts(ratios, default, auc), *_empty(evaluation)],
    )


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


def _doubts(ratios: dict[str, list[float]], default: Sequence[float], auc: Estimate | None) -> list[str]:
    """What makes the ratio weak evidence here."""
    found = []
    if any(np.isnan(row).all() for row in ratios.values()):
        found.append("An arm gave no answer at all under role prompts: text-only behaviour could not be measured.")
    elif auc is None:
        found.append("The persona log-likelihood ratio's AUC could not be measured: read it with care.")
    elif auc.value < SEPARATES:
        said = f"separates role from default text with an AUC of only {auc.value:.2f}"
        found.append(f"The persona log-likelihood ratio {said}: read it with care.")
    known = [value for value in default if not math.isnan(value)]
    if known and not np.isnan(ratios["base"]).all():
        room = float(np.nanmean(ratios["base"])) - float(np.mean(known))
        if room < ROOM:
            found.append(
                f"The base's role answers are only {room:.3f} nat/token above default text: little room to improve."
            )
    return found


def _empty(evaluation: Evaluation) -> list[str]:
    counts = {arm: sum(not text.strip() for text in found.texts) for arm, found in evaluation.on_roles.items()}
    return [
        f"{count} of {len(evaluation.roles)} answers of {arm} under role prompts are empty and left out."
        for arm, count in counts.items()
        if count
    ]


def _transcripts(evaluation: Evaluation) -> list[Transcript]:
    """Some answers under roles, chosen evenly."""
    roles = evaluation.roles
    count, _ = shares(evaluation.section.transcripts, len(roles), len(evaluation.talks))
    chosen = [k * len(roles) // count for k in range(count)]
    found = [
        Transcript(
            id=roles[i].id,
            kind="role",
            system=roles[i].prompt[0]["content"],
            turns=[Turn(user=roles[i].prompt[-1]["content"], answers={})],
        )
        for i in chosen
    ]
    said = {arm: [(answers, i) for i in chosen] for arm, answers in evaluation.on_roles.items()}
    return filled(found, evaluation.arms, evaluation.ruler, said)


def _text_keeps_it(evidence: Evidence) -> Claim:
    primary = evidence.primary
    says = "Not measured."
    light: Light = "grey"
    if primary is not None:
        light = LIGHTS[grade(primary)]
        kept = primary.retention.estimate
        says = (
            f"{percent_text(kept)} of the cap's effect on {inline_name(primary.name)} is kept, n = {kept.n}."
            if kept
            else f"Undefined: {primary.retention.why}."
        )
        if kept and primary.by_cluster and (found := most_telling([primary.by_cluster])) is not None:
            name, without = found
            if abs(without - kept.value) >= TELLING:
                says += f" One role weighs most: without {name} it is {number(100 * without, 0)} %."
    rule = (
        "Green: 80 % or more, its interval above 50 %, cap and tuning beyond their noise, the control below. Red: the interval "
        "below 50 %, or less than 30 %. Grey: the interval reaches from below 50 % to 80 %, or to 0."
    )
    name = "Uncapped inference keeps the cap's effect on the text"
    return Claim(id=ids.KEPT, name=name, light=light, says=says, rule=rule)


def _belongs_to_the_axis(evidence: Evidence) -> Claim:
    primary = evidence.primary
    light: Light = "grey"
    says = "No random-direction control was run."
    if primary is not None and primary.control_retention is not None:
        kept, control = primary.retention.estimate, primary.control_retention.estimate
        if kept is None or control is None:
            says = "Retention is undefined for the tuned model or for the control."
        else:
            light = "red" if control_keeps_as_much(primary) else "green" if control.high < kept.low else "amber"
            light = "grey" if too_few(primary.by_cluster) else light
            says = f"Trained along a random direction, the same recipe keeps {percent_text(control)}."
    rule = "Green: the control's interval lies below the tuned model's. Red: it reaches the tuned model's value. Amber: between."
    name = "The effect belongs to the axis, not to fine-tuning"
    return Claim(id="axis", name=name, light=light, says=says, rule=rule)


MEASURE = Measure(measure, claims=(_text_keeps_it, _belongs_to_the_axis))
