"""``report.json``: what a report holds. The JSON Schema is ``Report.model_json_schema()``.

Retention of a metric m: (m_tuned - m_base) / (m_base+cap - m_base): 0 = nothing is kept, 1 = the hook is no longer needed.
Undefined, and said so, where the cap itself moves m by less than its noise.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

Status = Literal["good", "mixed", "bad", "unclear", "incomplete"]
ARMS = ("base", "base+cap", "tuned", "tuned+cap")


class Part(BaseModel):
    """A part of the report; unknown keys and NaN are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Estimate(Part):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


class Retention(Part):
    """Retention of one metric; ``estimate`` is None where it is undefined, and ``why`` says so."""

    estimate: Estimate | None
    why: str = ""


class ByQuestion(Part):
    """The items behind means by cluster, where several clusters are asked the same questions.

    Attributes:
        questions: sorted.
        asked: place of each item's question among them.
        cluster: place of each item's cluster among the clusters.
        values: arm -> value of each item.
    """

    questions: list[str]
    asked: list[int]
    cluster: list[int]
    values: dict[str, list[float]]


class ByCluster(Part):
    """What lies behind an estimate, by role or conversation: enough to pool runs and to hold them against each other.

    Attributes:
        clusters: names, sorted.
        counts: items that all of the arms have, a cluster.
        means: arm -> mean over those items, a cluster.
        items: the items themselves, with their questions; None where clusters have none in common, and in reports made before
            2026-12.
    """

    clusters: list[str]
    counts: list[int]
    means: dict[str, list[float]]
    items: ByQuestion | None = None


class Metric(Part):
    """One metric over the arms.

    Attributes:
        id: stable name, such as ``text_llr``.
        name: for people.
        unit: such as ``nat/token``.
        meaning: one sentence on what is measured, on which text.
        toward_assistant: whether more or less of it means more Assistant.
        arms: arm -> estimate. The control, if there is one, is the arm ``control``.
        cap_effect: base+cap minus base, paired.
        tuned_effect: tuned minus base, paired.
        retention: of the tuned model.
        control_retention: of the random-direction control, or None without one.
        quality: the metric's own quality, such as its AUC, or None.
        p_holm: p of the tuned effect being 0, after Holm's correction over the metrics of the report.
        detectable: the least tuned effect that so many items would show (5 % level, 80 % power).
        by_cluster: base, base+cap and tuned by role or conversation.
        primary: the metric that the verdict is about.
        anchor: the base's default Assistant's own level, where the metric has one: what lies beyond it is no more Assistant.
    """

    id: str
    name: str
    unit: str
    meaning: str
    toward_assistant: Literal["higher", "lower"]
    arms: dict[str, Estimate]
    cap_effect: Estimate
    tuned_effect: Estimate
    retention: Retention
    control_retention: Retention | None = None
    quality: dict[str, Estimate] | None = None
    p_holm: float | None = None
    detectable: float | None = None
    by_cluster: ByCluster | None = None
    primary: bool = False
    anchor: Estimate | None = None


class SideEffect(Part):
    """What moved that should not. ``limit`` is the allowance, ``ok`` whether the value lies within it.

    ``one_sided``: only more of it is harm.
    ``by_cluster`` has the value under the name ``value``; None where the estimate is a rate.
    """

    id: str
    name: str
    unit: str
    meaning: str
    estimate: Estimate
    limit: float | None = None
    one_sided: bool = False
    ok: bool | None = None
    by_cluster: ByCluster | None = None


class Capability(Part):
    """Scores of the arms on one task of lm-eval.

    Attributes:
        task: its name.
        metric: which of its metrics; higher is better.
        chance: score of guessing, or None.
        scale: highest score.
        arms: arm -> estimate.
        difference: tuned minus base, paired by document.
        cap_difference: base+cap minus base.
        p_holm: p of the difference being 0, after Holm's correction over the tasks.
        detectable: the least difference that so many documents would show (5 % level, 80 % power).
    """

    task: str
    metric: str
    chance: float | None
    scale: float
    arms: dict[str, Estimate]
    difference: Estimate
    cap_difference: Estimate
    p_holm: float
    detectable: float


class RateRow(Part):
    """Rates of one class or category by arm, with Wilson intervals for as many answers as those of a cluster are worth."""

    label: str
    arms: dict[str, Estimate]


class RateTable(Part):
    """Rates of a suite by class or category."""

    id: str
    name: str
    meaning: str
    rows: list[RateRow]


class TurnPoint(Part):
    """Mean z of one turn."""

    turn: int
    z: Estimate


class Trajectory(Part):
    """z over the turns of one domain's conversations in one arm."""

    domain: str
    arm: str
    points: list[TurnPoint]


class Component(Part):
    """How far the cap and the tuning move answers under roles along one persona component, in sigma of the base's answers.

    ``cosine_axis`` is the component's cosine with the axis; the component points from role answers to default ones.
    """

    number: int
    variance: float
    cosine_axis: float
    cap_effect: Estimate
    tuned_effect: Estimate


class Rerouting(Part):
    """Where the persona went: ``probe`` is arm -> AUC of a linear probe for in-character text, fitted on the arm's activations.

    Both at the floor's deepest layer, ``layer``. ``cosines``: arm -> cosine of its axis, extracted anew, with the training axis,
    mean over the floor's layers; the base's own says what so small an extraction loses, the capped base's how far the axis turns
    where the hook holds personas back.
    """

    layer: int
    probe: dict[str, Estimate]
    components: list[Component]
    cosines: dict[str, float] = {}


class DurabilityMetric(Part):
    """One metric through a durability run.

    Attributes:
        id: of the metric.
        name: for people.
        unit: such as ``nat/token``.
        before: retention of the tuned model.
        after: retention of the tuned model after the durability run, against the untouched base and its cap.
        base_after: the same of the base after that fine-tuning: what its rows do by themselves.
        left: (tuned after - base after) / (tuned - base): what of the tuning's own distance is left.
        tuned_change: tuned after minus tuned, paired.
        lead: tuned after minus base after, paired.
    """

    id: str
    name: str
    unit: str
    before: Retention
    after: Retention
    base_after: Retention
    left: Retention
    tuned_change: Estimate
    lead: Estimate


class Durability(Part):
    """Outcome of one durability run; the first metric is the primary one. ``meaning`` says on what and how long."""

    name: str
    meaning: str
    adversarial: bool
    metrics: list[DurabilityMetric]


class Claim(Part):
    """One claim of the report, with its light and the rule that set it. ``grey``: not measured, or not to be said.

    ``decides``: the verdict rests on it. ``measured``: false where nothing was asked for it.
    """

    id: str
    name: str
    light: Literal["green", "amber", "red", "grey"]
    says: str
    rule: str
    decides: bool = False
    measured: bool = True


class ArmAnswer(Part):
    """One arm's answer: text, its mean z, z per token group for colouring ([text piece, z]), and the reader's log-odds."""

    text: str
    z: float
    pieces: list[tuple[str, float]] = []
    persona: float | None = None


class Turn(Part):
    """One user turn and each arm's answer."""

    user: str
    answers: dict[str, ArmAnswer]


class ScoredAnswer(Part):
    """One arm's answer with what is known of it.

    Attributes:
        text: the answer.
        persona: the reader's log-odds that a persona is speaking; None where it could not be read.
        other_reader: the same by the second reader; None without one.
        relevance: how much likelier the answer is after its own question than after others, nat a token; None where it could not
            be told.
        z: its mean z; None where it is not kept.
    """

    text: str
    persona: float | None = None
    other_reader: float | None = None
    relevance: float | None = None
    z: float | None = None


class AnswerRow(Part):
    """One question and every arm's answer to it.

    Attributes:
        id: of the item.
        suite: what it was asked for: ``roles``, ``conversations``, ``default``, ``benign``, ``benign_systems``.
        kind: kind of role, or domain of the conversation.
        cluster: role or conversation.
        turn: of the conversation, from 1.
        system: system prompt.
        question: the user's last message.
        answers: arm -> answer.
    """

    id: str
    suite: str
    kind: str
    cluster: str
    turn: int = 1
    system: str
    question: str
    answers: dict[str, ScoredAnswer]


class Transcript(Part):
    """One prompt or conversation, side by side; ``note`` says what to watch for."""

    id: str
    kind: str
    system: str
    turns: list[Turn]
    note: str = ""


class Verdict(Part):
    """Plain words first.

    Attributes:
        status: good, mixed, bad, unclear where the noise decides, or incomplete where nothing speaks against it and not all was
            measured that it rests on.
        headline: one sentence.
        points: a few more.
        decided_by: ids of the claims that kept it from being good.
    """

    status: Status
    headline: str
    points: list[str]
    decided_by: list[str] = []


class Report(Part):
    """The whole report."""

    format: Literal["trimtab report 1"] = "trimtab report 1"
    title: str
    created: str
    verdict: Verdict
    claims: list[Claim] = []
    metrics: list[Metric]
    side_effects: list[SideEffect]
    rates: list[RateTable] = []
    capability: list[Capability] = []
    trajectories: list[Trajectory]
    # R2 of an answer's position from the message before it, by arm; reports made before 2026-12 call it otherwise
    prediction: dict[str, Estimate] = Field({}, validation_alias=AliasChoices("prediction", "foretold"))
    rerouting: Rerouting | None = None
    durability: list[Durability] = []
    persona_space: dict[str, Any]
    axis: dict[str, Any]
    floor: dict[str, Any]
    training: dict[str, Any]
    transcripts: list[Transcript]
    # every answer that was read, with its scores; the readers that read them
    answers: list[AnswerRow] = []
    readers: list[dict[str, Any]] = []
    repeat: dict[str, Any]
    warnings: list[str]
    does_not_compare: list[str]
