"""Grades on both sides: too little is kept, and more than anything that the default Assistant says."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.eval.grading import beyond_the_anchor, grade
from trimtab.eval.schema import ByCluster, Estimate, Metric, Retention


def estimate(value: float, half: float = 0.5) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=96)


def metric(
    tuned: float, anchor: float | None, *, toward: Any = "lower", kept: float = 0.95, capped: float = -4.0
) -> Metric:
    """Base 3, the cap at -4 unless told otherwise; turned round for ``higher``."""
    sign = 1 if toward == "lower" else -1
    arms = {"base": 3.0, "base+cap": capped, "tuned": tuned}
    return Metric(
        id="reader_score", name="Who speaks", unit="nat", meaning="m.", toward_assistant=toward,
        arms={arm: estimate(sign * value) for arm, value in arms.items()},
        cap_effect=estimate(sign * (capped - 3)), tuned_effect=estimate(sign * (tuned - 3)),
        retention=Retention(estimate=estimate(kept, 0.1)),
        by_cluster=ByCluster(clusters=[f"role {k}" for k in range(8)], counts=[2] * 8, means={}),
        anchor=None if anchor is None else estimate(sign * anchor),
    )  # fmt: skip


@pytest.mark.parametrize("toward", ["lower", "higher"])
@pytest.mark.parametrize(
    ("tuned", "anchor", "beyond"),
    [
        (-3.8, -3.0, False),  # short of the cap
        (-4.4, -3.0, False),  # beyond both, within noise
        (-4.6, -3.0, True),
        (-5.0, -6.0, False),  # beyond the cap, and not of the default Assistant
        (-6.9, -6.0, False),  # its interval [-7.4, -6.4] reaches the anchor's, [-6.5, -5.5]
        (-7.1, -6.0, True),
        (-9.0, None, False),  # nothing to hold it against
        (9.0, -6.0, False),  # the other way is another fault
    ],
)
def test_beyond_the_anchor(toward: str, tuned: float, anchor: float | None, beyond: bool) -> None:
    assert beyond_the_anchor(metric(tuned, anchor, toward=toward)) is beyond


def test_a_cap_that_goes_beyond_the_assistant_itself_may_be_followed() -> None:
    assert not beyond_the_anchor(metric(-4.4, -1.0)) and beyond_the_anchor(metric(-4.6, -1.0))
    assert not beyond_the_anchor(metric(-7.0, -1.0, capped=-7.0))


@pytest.mark.parametrize("toward", ["lower", "higher"])
def test_what_is_suppressed_is_mixed_and_never_good(toward: str) -> None:
    assert grade(metric(-3.8, -6.0, toward=toward)) == "good"
    assert grade(metric(-5.0, -6.0, toward=toward, kept=1.15)) == "good", "better than the cap, as the Assistant is"
    assert grade(metric(-9.0, -6.0, toward=toward, kept=1.7)) == "mixed"
    assert grade(metric(-9.0, None, toward=toward, kept=1.7)) == "good"


def test_the_anchor_lifts_no_grade() -> None:
    assert grade(metric(2.0, -6.0, kept=0.1)) == "bad"
    assert grade(metric(-9.0, -6.0, kept=0.1)) == "bad"
    short = metric(-3.8, -6.0)
    assert short.by_cluster is not None
    few = short.model_copy(update={"by_cluster": short.by_cluster.model_copy(update={"clusters": ["a"] * 4})})
    assert grade(few) == "unclear"
