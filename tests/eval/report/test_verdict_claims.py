"""The verdict and the claims that it rests on: good only where each of them was measured, and none is red."""

from __future__ import annotations

import pytest
from test_verdict import GOOD, estimate, metric, side_effect

from trimtab.eval import ids
from trimtab.eval.measures import all_measures
from trimtab.eval.measures.suite import Evidence
from trimtab.eval.report.verdict import make_verdict
from trimtab.eval.schema import Claim, SideEffect, Verdict

HEAD = "Uncapped inference keeps 93 % [85, 101] of the cap's effect on who speaks"


def claim(name: str, light: str = "green", *, decides: bool = True, measured: bool = True, key: str = "") -> Claim:
    return Claim.model_validate(
        {"id": key or name.lower().replace(" ", "_"), "name": name, "light": light, "says": f"{name}: so.", "rule": "r"}
        | {"decides": decides, "measured": measured}
    )


def kept(light: str = "green") -> Claim:
    return claim("The effect is kept", light, key=ids.KEPT)


ON_TOPIC, READ = claim("Answers stay on the question"), claim("Answers can be read")
NOT_MEASURED = claim("Benign system prompts are followed", "grey", measured=False)


def judged(*claims: Claim, effects: list[SideEffect] | None = None) -> Verdict:
    return make_verdict(
        [metric(GOOD, name="Who speaks")], [side_effect()] if effects is None else effects, [kept(), *claims]
    )


def test_good_where_all_that_it_rests_on_was_measured() -> None:
    verdict = judged(ON_TOPIC, READ)
    assert (verdict.status, verdict.headline, verdict.decided_by) == ("good", f"{HEAD}.", [])


def test_what_may_lie_beyond_its_limit_is_not_good() -> None:
    """Its value lies within, its interval does not."""
    verdict = judged(ON_TOPIC, claim("Answers can be read", "amber"))
    assert verdict.status == "mixed" and verdict.decided_by == [READ.id]
    assert verdict.headline == f"{HEAD}; not sure: answers can be read."


def test_what_was_asked_and_tells_nothing_is_not_shown() -> None:
    verdict = judged(ON_TOPIC, claim("Answers can be read", "grey"))
    assert verdict.status == "incomplete" and verdict.decided_by == [READ.id]
    assert verdict.headline == f"{HEAD}: good on 2 of 3; not shown: answers can be read."


@pytest.mark.parametrize("light", ["amber", "grey"])
def test_amber_and_grey_of_what_does_not_decide_leave_it_good(light: str) -> None:
    assert judged(ON_TOPIC, claim("Jailbreaks fail", light, decides=False)).status == "good"


def test_incomplete_says_on_how_many_it_is_good_and_what_was_not_measured() -> None:
    verdict = judged(ON_TOPIC, claim("Capability is kept", "amber"), NOT_MEASURED)
    assert verdict.status == "incomplete"
    assert verdict.headline == f"{HEAD}: good on 2 of 4; not shown: benign system prompts are followed."
    assert verdict.decided_by == [NOT_MEASURED.id]
    two = judged(ON_TOPIC, NOT_MEASURED, claim("Answers can be read", "grey", measured=False))
    assert two.headline.endswith("not shown: benign system prompts are followed, answers can be read.")
    assert two.decided_by == [NOT_MEASURED.id, READ.id]


def test_what_does_not_decide_need_not_be_measured() -> None:
    verdict = judged(claim("Jailbreaks fail", "grey", decides=False, measured=False))
    assert verdict.status == "good" and verdict.decided_by == []


@pytest.mark.parametrize("effects", [[], [side_effect(limit=None, ok=None)], [side_effect(ok=None)]])
def test_without_limits_it_is_incomplete(effects: list[SideEffect]) -> None:
    verdict = judged(ON_TOPIC, effects=effects)
    assert verdict.status == "incomplete" and verdict.decided_by == []
    assert verdict.headline == f"{HEAD}: good on 2 of 2; side effects were not measured against limits."


def test_a_red_claim_makes_it_mixed_and_is_named() -> None:
    red = claim("Answers can be read", "red")
    verdict = judged(ON_TOPIC, red)
    assert verdict.status == "mixed" and verdict.decided_by == [red.id]
    assert verdict.headline == f"{HEAD}; not so: answers can be read."
    assert verdict.points[0] == "Answers can be read: no. Answers can be read: so."


def test_red_comes_before_what_was_not_measured() -> None:
    verdict = judged(claim("Answers can be read", "red"), NOT_MEASURED)
    assert verdict.status == "mixed" and verdict.decided_by == ["answers_can_be_read"]


def test_a_red_claim_that_does_not_decide_is_damage_too_but_that_it_withstands_tuning_is_none() -> None:
    assert judged(claim("Jailbreaks fail", "red", decides=False)).status == "mixed"
    assert judged(claim("It lasts", "red", decides=False, key=ids.WITHSTANDS)).status == "good"


def test_a_side_effect_over_its_limit_is_mixed_even_where_its_claim_is_not_red() -> None:
    verdict = judged(ON_TOPIC, effects=[side_effect(ok=False)])
    assert verdict.status == "mixed" and verdict.headline.endswith("; over the limit: KL to base on benign text.")


@pytest.mark.parametrize(
    ("value", "light", "status"),
    [((0.1, 0.0, 0.2), "red", "bad"), ((0.6, 0.45, 0.75), "amber", "mixed"), ((0.9, 0.4, 1.4), "grey", "unclear")],
)
def test_where_the_effect_itself_is_not_kept_that_decides(
    value: tuple[float, float, float], light: str, status: str
) -> None:
    """What was not measured makes it no better: bad stays bad."""
    verdict = make_verdict([metric(estimate(*value))], [side_effect()], [kept(light), ON_TOPIC, NOT_MEASURED])
    assert (verdict.status, verdict.decided_by) == (status, [ids.KEPT])
    damaged = make_verdict(
        [metric(estimate(*value))], [side_effect()], [kept(light), claim("Answers can be read", "red")]
    )
    assert damaged.status == status and damaged.decided_by == [ids.KEPT, READ.id]
    assert "not so: answers can be read" in damaged.headline


def test_the_claims_of_an_empty_evaluation_decide_and_were_not_measured() -> None:
    found = [rule(Evidence([])) for measure in all_measures() for rule in measure.claims]
    deciding = {claim.id for claim in found if claim.decides}
    assert {ids.KEPT, ids.AXIS, "on_topic", "usable", "refusals", "benign_systems", "benign", "capability"} <= deciding
    assert not [claim.id for claim in found if claim.decides and claim.measured]
    assert ids.WITHSTANDS not in deciding and ids.PROJECTIONS not in deciding
    assert make_verdict([metric(GOOD)], [side_effect()], found).status == "incomplete"
