"""From a suite to a :class:`Report`: estimates, effects, retention, corrections, claims and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trimtab.eval import ids
from trimtab.eval.answers.arms import CONTROL
from trimtab.eval.intervals import ClusterBootstrap, bounds_of, holm
from trimtab.eval.measures import all_measures
from trimtab.eval.measures.suite import EffectValues, Evidence, MetricValues, Suite
from trimtab.eval.report.verdict import make_verdict
from trimtab.eval.schema import Claim, Metric, Report, SideEffect

MOST_MISSING = 0.05  # share of a side effect's items that may have no value, such as the KL of an empty answer
DOES_NOT_COMPARE = [
    "Retention here is relative to this floor's own cap on this model; it does not compare across floors or models.",
    "z is in standard deviations of this model's own answers, relative to its own default Assistant.",
    "The reader's log-odds depend on the model that reads: those of two bases do not compare.",
    "The persona log-likelihood ratio depends on the scoring model and on the length of answers.",
    "Projections fall where the loss pushed them; only who speaks in the answers says whether the persona changed.",
]


def build_report(
    suite: Suite,
    *,
    title: str,
    created: str,
    bootstrap: int,
    seed: int,
    axis: dict[str, Any],
    floor: dict[str, Any],
    training: dict[str, Any],
    repeat: dict[str, Any],
) -> Report:
    """Assemble the report. The arguments besides ``suite`` and those of the bootstrap are carried over as facts."""
    metrics = _corrected([metric_of(values, bootstrap, seed) for values in suite.metrics])
    effects = [effect_of(values, bootstrap, seed) for values in suite.side_effects]
    side_effects = [*(effect for effect in effects if effect is not None), *suite.rates]
    _refuse_twice([*(metric.id for metric in metrics), *(effect.id for effect in side_effects)])
    rerouting = suite.rerouting[0] if suite.rerouting else None
    evidence = Evidence(metrics, side_effects, rerouting, suite.capability, suite.durability)
    claims = claims_of(evidence)
    return Report(
        title=title,
        created=created,
        verdict=make_verdict(metrics, side_effects, claims),
        claims=claims,
        metrics=metrics,
        side_effects=side_effects,
        rates=suite.tables,
        capability=suite.capability,
        trajectories=suite.trajectories,
        prediction=suite.prediction,
        rerouting=rerouting,
        durability=suite.durability,
        persona_space=axis.get("persona_space", {}),
        axis={**{key: value for key, value in axis.items() if key != "persona_space"}, **suite.axis_facts},
        floor={**floor, **suite.floor_facts, "default_z": 0.0},
        training=training,
        transcripts=suite.transcripts,
        answers=suite.answers,
        readers=suite.readers,
        repeat=repeat,
        warnings=suite.warnings,
        does_not_compare=DOES_NOT_COMPARE,
    )


def _refuse_twice(names: Sequence[str]) -> None:
    """Two figures of one name could not be told apart by whoever reads the report."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several metrics or side effects are called {', '.join(twice)}")


def claims_of(evidence: Evidence) -> list[Claim]:
    """The claims of all measures, each by its rule.

    Raises:
        KeyError: if a rule asks for something by a name that nothing has.
    """
    measures = all_measures()
    shared = {value for name, value in vars(ids).items() if name.isupper() and isinstance(value, str)}
    names = frozenset(shared).union(*(measure.names for measure in measures))
    known = replace(evidence, names=names)
    return [rule(known) for measure in measures for rule in measure.claims]


def metric_of(given: MetricValues, bootstrap: int, seed: int) -> Metric | None:
    """One metric over the arms; None where an arm, or a pair that is compared, has no value at all."""
    arrays = {arm: np.asarray(row, dtype=float) for arm, row in given.values.items()}
    base, capped, tuned = arrays["base"], arrays["base+cap"], arrays["tuned"]
    if not all(np.isfinite(row).any() for row in (*arrays.values(), capped - base, tuned - base)):
        return None
    resample = ClusterBootstrap(given.clusters, bootstrap, seed, given.crossed)
    most = 1.0 if given.unit == "rate" else None
    return Metric(
        id=given.id,
        name=given.name,
        unit=given.unit,
        meaning=given.meaning,
        toward_assistant=given.toward,
        arms={arm: resample.estimate(row, most=most) for arm, row in arrays.items()},
        cap_effect=resample.estimate(capped - base, least=-1.0, most=most),
        tuned_effect=resample.estimate(tuned - base, least=-1.0, most=most),
        retention=resample.retention(base, capped, tuned),
        control_retention=resample.retention(base, capped, arrays[CONTROL]) if CONTROL in arrays else None,
        quality=dict(given.quality) or None,
        p_holm=resample.p_value(tuned - base),
        detectable=resample.detectable(tuned - base),
        by_cluster=resample.by_cluster({"base": base, "base+cap": capped, "tuned": tuned}),
        primary=given.primary,
        anchor=given.anchor,
    )


def effect_of(given: EffectValues, bootstrap: int, seed: int) -> SideEffect | None:
    """One side effect; None where no item has a value, as where no answer is long enough to measure it on.

    It is not judged where more than :data:`MOST_MISSING` of the items have no value: what is missing may be the worst.
    """
    resample = ClusterBootstrap(given.clusters, bootstrap, seed, given.crossed)
    array = np.asarray(given.values, dtype=float)
    least, most = bounds_of(given.id, given.unit)
    estimate = resample.estimate_if_any(array, least=least, most=most)
    if estimate is None:
        return None
    within = given.limit is None or (estimate.value if given.one_sided else abs(estimate.value)) <= given.limit
    unsure = given.limit is None or (within and bool(np.isnan(array).mean() > MOST_MISSING))
    return SideEffect(
        id=given.id,
        name=given.name,
        unit=given.unit,
        meaning=given.meaning,
        estimate=estimate,
        limit=given.limit,
        one_sided=given.one_sided,
        ok=None if unsure else within,
        by_cluster=resample.by_cluster({"value": array}),
    )


def _corrected(metrics: Sequence[Metric | None]) -> list[Metric]:
    """Those that could be measured, with their p-values corrected for their number."""
    there = [metric for metric in metrics if metric is not None]
    p_values = holm([1.0 if metric.p_holm is None else metric.p_holm for metric in there])
    return [metric.model_copy(update={"p_holm": p}) for metric, p in zip(there, p_values, strict=True)]
