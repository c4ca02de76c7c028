"""Who speaks: the arithmetic from given answers, what it warns of, and the two claims that rest on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import ARMS, KnownReader, evaluation, given

from trimtab.eval import ids
from trimtab.eval.answers.arms import Answers, Item
from trimtab.eval.intervals import clustered_rate
from trimtab.eval.measures import who_speaks
from trimtab.eval.measures.suite import Evidence, MetricValues, Suite
from trimtab.eval.report.assemble import metric_of
from trimtab.eval.schema import Claim, Estimate, Metric, Retention
from trimtab.recipes import data
from trimtab.recipes.data import Conversation

# 12 answers under 6 roles: a ghost speaks in the base's first 8, an assistant in its last 4
GHOSTS = [f"I died in room {k} and nobody has heard me since." for k in range(8)]
HELPS = [f"Use {k} cups of flour and a little salt." for k in range(12)]
LOOP = "I walk the halls. " * 12
SCORES = {text: 2.0 + k for k, text in enumerate(GHOSTS)} | dict.fromkeys(HELPS, -3.0) | {LOOP: -4.0}
BASE = [*GHOSTS, *HELPS[:4]]
IN_GERMAN = "Atme vor dem Auftritt langsam aus und denke daran, dass ein wenig Aufregung ganz normal ist."


def metrics_of(suite: Suite) -> dict[str, MetricValues]:
    return {metric.id: metric for metric in suite.metrics}


def tables_of(suite: Suite) -> dict[str, Any]:
    return {table.id: {row.label: row.arms for row in table.rows} for table in suite.tables}


def said(tuned: list[str], **more: list[str]) -> dict[str, dict[str, list[str]]]:
    return {"roles": {"base": BASE, "base+cap": HELPS, "tuned": tuned, **more}}


def test_unusable_answers_count_as_the_worst_of_the_base() -> None:
    tuned = ["", "...", LOOP, IN_GERMAN, *HELPS[:8]]
    found = metrics_of(who_speaks.measure(evaluation(said(tuned), SCORES)))
    score = found[ids.READER_SCORE]
    assert score.primary and score.toward == "lower" and score.unit == "nat"
    assert score.values["tuned"] == [9.0] * 4 + [-3.0] * 8, "9 is the base's most persona-like answer"
    assert score.values["base"] == [*range(2, 10), *[-3.0] * 4] and score.values["base+cap"] == [-3.0] * 12
    rate = found[ids.PERSONA_RATE]
    assert rate.values["tuned"] == [1.0] * 4 + [0.0] * 8 and not rate.primary
    assert sum(rate.values["base"]) == 8
    assert score.clusters == [item.cluster for item in evaluation(said(tuned)).roles] and len(set(score.clusters)) == 6


def test_an_unusable_answer_of_the_base_counts_as_its_worst_too() -> None:
    base = ["", *BASE[1:]]
    values = said(HELPS) | {"roles": {"base": base, "base+cap": HELPS, "tuned": HELPS}}
    assert metrics_of(who_speaks.measure(evaluation(values, SCORES)))[ids.READER_SCORE].values["base"][0] == 9.0


def test_a_model_that_says_nothing_keeps_nothing() -> None:
    metric = metric_of(metrics_of(who_speaks.measure(evaluation(said([""] * 12), SCORES)))[ids.READER_SCORE], 200, 0)
    assert metric is not None and metric.retention.estimate is not None
    assert metric.retention.estimate.value < 0 and metric.tuned_effect.value > 0


def test_the_anchor_is_the_default_assistant_s_own_level() -> None:
    default = [HELPS[0], HELPS[1], HELPS[2], HELPS[3], GHOSTS[0], GHOSTS[1]]
    answers = said(HELPS) | {"default": {"base": default, "base+cap": HELPS[:6], "tuned": HELPS[:6]}}
    found = metrics_of(who_speaks.measure(evaluation(answers, SCORES)))
    score, rate = found[ids.READER_SCORE].anchor, found[ids.PERSONA_RATE].anchor
    assert score is not None and score.value == pytest.approx((4 * -3 + 2 + 3) / 6) and score.n == 6
    assert rate is not None and rate.value == pytest.approx(2 / 6) and rate.low > 0


def test_rates_by_kind_of_role() -> None:
    made = evaluation(said(HELPS), SCORES)
    rows = tables_of(who_speaks.measure(made))["by_kind"]
    kinds = data.role_kinds()
    assert set(rows) == {kinds[item.cluster] for item in made.roles} and len(rows) == 4
    for kind, arms in rows.items():
        places = [i for i, item in enumerate(made.roles) if kinds[item.cluster] == kind]
        clusters = [made.roles[i].cluster for i in places]
        assert arms["base"] == clustered_rate([float(i < 8) for i in places], clusters)
        assert arms["tuned"].value == 0 and arms["tuned"].n == len(places)


def talk(name: str, domain: str) -> Conversation:
    return Conversation(name, domain, "", "", ["Who are you?", "And now?"])


def test_conversations_by_domain_and_turn() -> None:
    """The tuned model falls silent in one turn, and its second conversation has ended before the last one."""
    talks = [talk("a", "therapy"), talk("b", "coding"), talk("c", "therapy")]
    items = [
        Item(t.id, t.id, [{"role": "user", "content": "Who are you, and what do you do all day long?"}]) for t in talks
    ]
    ended = Answers(["", "", HELPS[2]], torch.zeros(3, 1, 1), [items[0].prompt, [], items[2].prompt], [True] * 3)
    played = {
        "base": [given(items, GHOSTS[:3]), given(items, [HELPS[0], GHOSTS[3], GHOSTS[4]])],
        "base+cap": [given(items, HELPS[:3])] * 2,
        "tuned": [given(items, HELPS[:3]), ended],
    }
    suite = who_speaks.measure(evaluation(said(HELPS), SCORES, talks=talks, on_talks=played))
    values = metrics_of(suite)[ids.CONVERSATIONS_SCORE]
    assert values.clusters == ["a", "a", "b", "b", "c", "c"] and not values.primary
    assert values.values["base"] == [2.0, -3.0, 3.0, 5.0, 4.0, 6.0]
    tuned = values.values["tuned"]
    assert tuned[:3] == [-3.0, 6.0, -3.0] and tuned[4:] == [-3.0, -3.0], "silence is the worst of the base's turns"
    assert math.isnan(tuned[3]), "where the conversation has ended, nothing was asked"
    tables = tables_of(suite)
    assert list(tables["by_turn"]) == ["turn 1", "turn 2"] and set(tables["by_domain"]) == {"therapy", "coding"}
    assert tables["by_turn"]["turn 2"]["base"].value == pytest.approx(2 / 3)
    assert (tables["by_turn"]["turn 2"]["tuned"].value, tables["by_turn"]["turn 2"]["tuned"].n) == (0.5, 2)
    assert (tables["by_domain"]["coding"]["tuned"].value, tables["by_domain"]["coding"]["tuned"].n) == (0.0, 1)


def test_what_makes_the_reader_weak_evidence_is_told() -> None:
    def warnings(base: list[str], reader: KnownReader) -> list[str]:
        arms = {"base": base, "base+cap": HELPS, "tuned": HELPS}
        return who_speaks.measure(evaluation({"roles": arms}, reader=reader)).warnings

    assert warnings(BASE, KnownReader(SCORES)) == []
    assert "AUC on the gallery is only 0.70" in warnings(BASE, KnownReader(SCORES, auc=0.7))[0]
    assert "Only 8% of the base's answers" in warnings([GHOSTS[0], *HELPS[:11]], KnownReader(SCORES))[0]
    assert "no answer at all" in warnings([""] * 12, KnownReader(SCORES))[0]


def test_a_second_reader_reads_the_same_and_their_agreement_is_told() -> None:
    other = KnownReader({text: -score for text, score in SCORES.items()}, name="gemma3-270m")
    suite = who_speaks.measure(evaluation(said(["", *HELPS[1:]]), SCORES, second=other))
    found = metrics_of(suite)
    second = found[f"{ids.READER_SCORE}_second"]
    assert not second.primary and second.quality == other.quality and "gemma3-270m" in second.name
    assert second.values["base"][:2] == [-2.0, -3.0]
    assert second.values["tuned"][0] == 3.0, "the worst that it read in the base's answers"
    kappa = found[ids.READER_SCORE].quality["kappa of the two readers"]
    assert kappa.value < 0 and kappa.n == 35, "35 answers have words"
    assert [facts["name"] for facts in suite.readers] == ["the base", "gemma3-270m"]
    same = KnownReader(SCORES, name="again")
    quality = metrics_of(who_speaks.measure(evaluation(said(HELPS), SCORES, second=same)))[ids.READER_SCORE].quality
    assert quality["kappa of the two readers"].value == pytest.approx(1)


def test_without_a_second_reader_there_is_one() -> None:
    suite = who_speaks.measure(evaluation(said(HELPS), SCORES))
    assert set(metrics_of(suite)) == {ids.READER_SCORE, ids.PERSONA_RATE} and len(suite.readers) == 1
    assert set(metrics_of(suite)[ids.READER_SCORE].quality) == {"AUC on the gallery"}


def test_arms_of_durability_runs_count_by_the_same_rule() -> None:
    made = evaluation(said(HELPS), SCORES)
    vars(made)["on_roles_after"] = {"tuned-after-more": given(made.roles, ["", *HELPS[1:]])}
    found = made.once(who_speaks.scores_on_roles)
    assert set(found) == {*ARMS, "tuned-after-more"} and found["tuned-after-more"] == [9.0, *[-3.0] * 11]


# ---- claims ----


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=96)


def primary(
    tuned: float, *, anchor: float | None = -5.0, kept: float = 0.95, control: Retention | None = None
) -> Metric:
    arms = {"base": estimate(3, 0.5), "base+cap": estimate(-4, 0.5), "tuned": estimate(tuned, 0.5)}
    return Metric(
        id=ids.READER_SCORE, name=who_speaks.NAME, unit="nat", meaning="m.", toward_assistant="lower", arms=arms,
        cap_effect=estimate(-7, 0.5), tuned_effect=estimate(tuned - 3, 0.5),
        retention=Retention(estimate=estimate(kept, 0.05)), control_retention=control, primary=True,
        anchor=None if anchor is None else estimate(anchor, 0.5),
    )  # fmt: skip


def claims(metrics: list[Metric]) -> dict[str, Claim]:
    return {claim.id: claim for rule in who_speaks.MEASURE.claims for claim in [rule(Evidence(metrics))]}


def test_both_claims_decide_and_say_where_nothing_was_measured() -> None:
    for metrics, measured in (([], [False, False]), ([primary(-3.7)], [True, False])):
        found = claims(metrics)
        assert [found[key].measured for key in (ids.KEPT, ids.AXIS)] == measured
        assert found[ids.KEPT].decides and found[ids.AXIS].decides and found[ids.AXIS].light == "grey"
    assert claims([])[ids.KEPT].says == "Not measured."


def test_keeping_it_is_green_and_going_beyond_cap_and_assistant_is_not() -> None:
    assert claims([primary(-3.7)])[ids.KEPT].light == "green"
    far = claims([primary(-9.0, kept=1.7)])[ids.KEPT]
    assert far.light == "amber" and "suppressed, not kept" in far.says
    assert claims([primary(-9.0, anchor=None, kept=1.7)])[ids.KEPT].light == "green", "nothing to hold it against"
    assert claims([primary(2.0, kept=0.1)])[ids.KEPT].light == "red"


@pytest.mark.parametrize(("control", "light"), [(0.1, "green"), (0.85, "amber"), (0.93, "red")])
def test_the_control_says_whether_it_belongs_to_the_axis(control: float, light: str) -> None:
    found = claims([primary(-3.7, control=Retention(estimate=estimate(control, 0.05 if light != "amber" else 0.06)))])
    assert found[ids.AXIS].light == light and found[ids.AXIS].measured
    undefined = claims([primary(-3.7, control=Retention(estimate=None, why="w"))])[ids.AXIS]
    assert undefined.light == "grey" and "undefined" in undefined.says and undefined.measured


def test_one_role_that_weighs_most_is_named() -> None:
    """Seven of eight roles keep all of it, and one, on which the cap does most, nothing."""
    roles = [f"role {k}" for k in range(8) for _ in range(2)]
    base = np.array([4.0] * 2 + [2.0] * 14)
    values = {"base": base, "base+cap": base * 0, "tuned": np.where(base == 4, 4.0, 0.0)}
    rows = {arm: row.tolist() for arm, row in values.items()}
    metric = metric_of(MetricValues(ids.READER_SCORE, "n", "nat", "m.", "lower", roles, rows, primary=True), 200, 0)
    assert metric is not None and metric.retention.estimate is not None
    assert metric.retention.estimate.value == pytest.approx(14 / 18)
    assert "without role 0 it is 100 %" in claims([metric])[ids.KEPT].says
