"""The measures as a room: each file is registered, names nothing twice, and asks what the plan of a recipe counts."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from trimtab.eval import ids, measures
from trimtab.eval.measures import ORDER, all_measures
from trimtab.eval.measures.suite import Findings, Measure, MetricValues, Suite
from trimtab.eval.report.assemble import claims_of
from trimtab.eval.schema import Estimate, SideEffect
from trimtab.recipes.loader import load_recipe

HELPERS = {"suite", "unscored", "capability_tasks", "instruction_rules"}
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
    claims = claims_of(Findings([]))
    assert len({claim.id for claim in claims}) == len(claims) > 8
    assert all(claim.light == "grey" and claim.says and claim.rule for claim in claims)
    assert {ids.KEPT, ids.PROJECTIONS, ids.WITHSTANDS} <= {claim.id for claim in claims}


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
