"""Claims that rest on limits: by the interval, on one side or both, and not measured where one effect is missing."""

from __future__ import annotations

import math

import pytest

from trimtab.eval.measures.limits import changes, within
from trimtab.eval.measures.suite import EffectValues
from trimtab.eval.report.assemble import effect_of
from trimtab.eval.schema import ByCluster, Estimate, SideEffect


def effect(
    value: float, low: float, high: float, *, limit: float | None = 0.1, one_sided: bool = False, roles: int = 8
) -> SideEffect:
    clusters = [f"role {k}" for k in range(roles)]
    by_cluster = ByCluster(clusters=clusters, counts=[2] * roles, means={"value": [value] * roles})
    ok = None if limit is None else (value if one_sided else abs(value)) <= limit
    return SideEffect(
        id="e", ok=ok, name="Answers off the question", unit="share", meaning="m.", limit=limit, one_sided=one_sided,
        estimate=Estimate(value=value, low=low, high=high, n=16), by_cluster=by_cluster,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "two_sided", "one_sided"),
    [
        ((0.05, 0.0, 0.1), "green", "green"),  # up to the limit itself
        ((0.05, 0.0, 0.11), "amber", "amber"),
        ((0.1, 0.0, 0.2), "amber", "amber"),
        ((0.11, 0.09, 0.13), "red", "red"),
        ((0.0, -0.3, 0.05), "amber", "green"),
        ((-0.05, -0.1, 0.0), "green", "green"),
        ((-0.2, -0.3, -0.15), "red", "green"),  # less of it is no harm
        ((-0.05, -0.2, 0.12), "amber", "amber"),
    ],
)
def test_the_light(numbers: tuple[float, float, float], two_sided: str, one_sided: str) -> None:
    assert within("c", "C", [effect(*numbers)]).light == two_sided
    assert within("c", "C", [effect(*numbers, one_sided=True)]).light == one_sided


def test_the_worst_of_several_counts() -> None:
    good, middling, bad = effect(0.0, 0.0, 0.05), effect(0.05, 0.0, 0.2), effect(0.2, 0.15, 0.25)
    assert within("c", "C", [good, middling]).light == "amber"
    assert within("c", "C", [good, bad, middling]).light == "red"


def test_it_is_measured_only_if_all_of_them_are() -> None:
    known = effect(0.0, 0.0, 0.05)
    assert within("c", "C", [known, known]).measured
    nothing = within("c", "C", [None])
    assert (nothing.measured, nothing.light, nothing.says) == (False, "grey", "Not measured.")
    assert nothing.decides, "the verdict rests on it all the same"
    part = within("c", "C", [known, None])
    assert not part.measured and part.light == "green"
    assert within("c", "C", [known, effect(0.0, 0.0, 0.05, limit=None)]).measured, "of one the base leaves no room"
    assert not within("c", "C", [effect(0.0, 0.0, 0.05, limit=None)]).measured, "nothing to hold it against"
    assert not within("c", "C", []).measured


def test_a_missing_one_does_not_hide_a_red_one() -> None:
    assert within("c", "C", [effect(0.2, 0.15, 0.25), None]).light == "red"


def test_of_few_roles_nothing_is_said() -> None:
    few = within("c", "C", [effect(0.3, 0.2, 0.4, roles=4)])
    assert few.light == "grey" and not few.measured
    assert within("c", "C", [effect(0.3, 0.2, 0.4, roles=5)]).light == "red"


def test_what_lacks_too_many_values_is_not_measured_and_a_value_beyond_the_limit_is_red_all_the_same() -> None:
    """As assembled: the KL of empty answers is missing, and may be the worst."""
    for value, missing, light in ((0.01, 1, "green"), (0.01, 2, "grey"), (0.5, 2, "red")):
        given = EffectValues(
            "e", "E", "nat/token", "m.", [f"r{k}" for k in range(20)], [value] * (20 - missing) + [math.nan] * missing, 0.1
        )  # fmt: skip
        found = effect_of(given, 100, 0)
        claim = within("c", "C", [found])
        assert (claim.light, claim.measured) == (light, missing == 1 or light == "red")
        assert found is not None and found.ok is (None if light == "grey" else light == "green")


def test_where_the_base_leaves_no_room_nothing_is_judged() -> None:
    """Of ten answers nine break their rule already: at most one more can."""
    base, tuned = [1.0] * 9 + [0.0], [1.0] * 10
    first, cap = changes("x", "X", "Share", list("abcdefghij"), {"base": base, "tuned": tuned, "base+cap": base}, 0.1)
    assert first.limit is None and cap.limit is None and "(so in 90% of the base's" in first.meaning
    (judged, _) = changes(
        "x", "X", "Share", list("abcdefghij"), {"base": [0.0] * 10, "tuned": tuned, "base+cap": base}, 0.1
    )
    assert judged.limit == 0.1 and judged.meaning == "Share; minus the base's."


def test_it_says_value_interval_and_limit() -> None:
    says = within("c", "C", [effect(0.05, -0.01, 0.11), effect(0.2, 0.15, 0.25, limit=0.3)]).says
    assert says.startswith("Answers off the question 0.05") and "limit 0.1" in says and "limit 0.3." in says


def test_what_is_nearest_its_limit_is_said_first_and_what_became_no_more_in_one_breath() -> None:
    some, none = effect(0.02, 0.0, 0.05, one_sided=True), effect(-0.01, -0.02, 0.0, one_sided=True)
    near = effect(0.08, 0.0, 0.3, one_sided=True).model_copy(update={"name": "Refusals"})
    says = within("c", "C", [none, some, near, none.model_copy(update={"name": "Loops"})]).says
    assert says.startswith("Refusals 0.08") and says.endswith(
        "; none, or no more than before: answers off the question, loops."
    )
    assert says.count("answers off the question 0.02") == 1
