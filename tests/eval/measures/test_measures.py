"""The measures as a room: each file is registered, names nothing twice, and asks what the plan of a recipe counts."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from trimtab.eval import ids, measures
from trimtab.eval.measures import ORDER, all_measures
from trimtab.eval.measures.suite import EffectValues, Evidence, Measure, MetricValues, Suite
from trimtab.eval.report import assemble
from trimtab.eval.report.assemble import build_report, claims_of, effect_of, metric_of
from trimtab.eval.schema import Claim, Estimate, SideEffect
from trimtab.recipes.loader import load_recipe

HELPERS = {"suite", "unscored", "capability_tasks", "instruction_rules", "limits"}
ROOM = Path(str(measures.__file__)).parent


def test_every_file_of_the_room_is_registered() -> None:
    assert {path.stem for path in ROOM.glob("*.py")} - {"__init__"} - HELPERS == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_measure_takes_an_evaluation_and_returns_a_suite(name: str) -> None:
    measure = importlib.import_module(f"trimtab.eval.measures.{name}").MEASURE
    assert isinstance(measure, Measure)
    signature = inspect.signature(measure.measure)
    assert [parameter.annotation for parameter in signature.parameters.values()] == ["Evaluation"]
    assert signature.return_annotation == "Suite"


def test_claims_have_names_of_their_own_and_say_that_nothing_was_measured() -> None:
    claims = claims_of(Evidence([]))
    assert len({claim.id for claim in claims}) == len(claims) > 8
    assert all(claim.light == "grey" and claim.says and claim.rule for claim in claims)
    assert {ids.KEPT, ids.PROJECTIONS, ids.WITHSTANDS} <= {claim.id for claim in claims}


def test_a_claim_that_asks_for_a_name_that_nothing_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def misspelt(evidence: Evidence) -> Claim:
        evidence.metric("z_trainnig")
        return Claim(id="x", name="x", light="grey", says="Not measured.", rule="x")

    told: Measure = Measure(lambda _: Suite(), claims=(misspelt,))
    monkeypatch.setattr(assemble, "all_measures", lambda: [told])
    with pytest.raises(KeyError, match="z_trainnig"):
        claims_of(Evidence([]))
    own = Measure(lambda _: Suite(), claims=(misspelt,), names=("z_trainnig",))
    monkeypatch.setattr(assemble, "all_measures", lambda: [own])
    assert [claim.light for claim in claims_of(Evidence([]))] == ["grey"]


def test_two_figures_of_one_name_are_refused() -> None:
    values = {arm: [1.0, 2.0] for arm in ("base", "base+cap", "tuned")}
    twice = [MetricValues("m", "m", "sigma", "m.", "lower", ["a", "b"], values)] * 2
    facts: dict[str, Any] = {name: {} for name in ("axis", "floor", "training", "repeat")}
    with pytest.raises(ValueError, match="are called m"):
        build_report(Suite(metrics=twice), title="t", created="now", bootstrap=10, seed=0, **facts)


def test_questions_that_a_measure_names_are_resampled() -> None:
    """Twelve roles, all asked the same six questions; each moves twice as far as the one before: roles alone are too sure."""
    roles, questions = [f"r{i // 6}" for i in range(72)], [f"q{i % 6}" for i in range(72)]
    tuned = [2.0 ** (i % 6) + 0.1 * (i // 6) for i in range(72)]
    values = {"base": [0.0] * 72, "base+cap": [100.0 + i % 5 for i in range(72)], "tuned": tuned}
    crossed, alone = (
        metric_of(MetricValues("m", "m", "nat", "m.", "lower", roles, values, crossed=asked), 500, 0)
        for asked in (questions, None)
    )
    assert crossed is not None and alone is not None
    for found, old in (
        (crossed.tuned_effect, alone.tuned_effect), (crossed.retention.estimate, alone.retention.estimate),
    ):  # fmt: skip
        assert found is not None and old is not None and found.value == old.value
        assert found.high - found.low > 3 * (old.high - old.low)
    assert crossed.p_holm is not None and alone.p_holm is not None and crossed.p_holm > 100 * alone.p_holm
    assert crossed.by_cluster is not None and alone.by_cluster is not None and crossed.by_cluster.items is not None
    assert crossed.by_cluster.model_copy(update={"items": None}) == alone.by_cluster
    effect = effect_of(EffectValues("e", "e", "nat", "e.", roles, tuned, crossed=questions), 500, 0)
    assert effect is not None and effect.estimate == crossed.tuned_effect


def test_what_every_arm_is_asked_has_a_turn_for_each_conversation() -> None:
    section = load_recipe("smollm2-135m/sft").recipe.eval
    asked = [each for measure in all_measures() for each in measure.asks(section)]
    assert sum(len(each.turns) for each in asked) > 50
    for each in asked:
        assert len(each.before) == len(each.turns) and all(each.turns)


def test_a_suite_takes_over_all_that_another_found() -> None:
    one = Suite(warnings=["a"], floor_facts={"x": 1})
    estimate = Estimate(value=0.5, low=0.4, high=0.6, n=3)
    other = Suite(
        metrics=[MetricValues("m", "m", "rate", "m.", "lower", ["a"], {"base": [1.0]})],
        rates=[SideEffect(id="e", name="e", unit="rate", meaning="e.", estimate=estimate)],
        prediction={"base": estimate},
        axis_facts={"y": 2},
        floor_facts={"z": 3},
        warnings=["b"],
    )
    one.extend(other)
    assert one.metrics == other.metrics and one.rates == other.rates and one.prediction == other.prediction
    assert one.axis_facts == {"y": 2} and one.floor_facts == {"x": 1, "z": 3} and one.warnings == ["a", "b"]
