"""Durability: what is left of the tuning's effect after somebody else has fine-tuned the weights further.

The tuned weights and the base get the same further fine-tuning. Two questions are asked of each: how much of the cap's effect on
the untouched base is kept now, and how much of the distance that the tuning had made is left against a base that was tuned alike.
The first alone could be the further rows' own doing, as any tuning on plain answers makes a model more of an Assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.schema import Durability, Outlasting, Retention
from trimtab.recipes.schema import FurtherTuning


def after(start: str, tuning: str) -> str:
    """Name of the arm that a further fine-tuning of ``tuned`` or ``base`` gives."""
    return f"{start}-after-{tuning}"


def durability(
    tuning: FurtherTuning,
    metrics: Sequence[tuple[str, str, str, Mapping[str, Sequence[float]]]],
    clusters: Sequence[str],
    *,
    facts: Mapping[str, Any],
    bootstrap: int,
    seed: int,
) -> Durability:
    """The outcome of one further fine-tuning.

    Args:
        tuning: which.
        metrics: id, name, unit, and arm -> values over the same items, for the arms base, base+cap, tuned and both that
            :func:`after` names.
        clusters: cluster of each item.
        facts: of its training record: rows, rows_a_step, steps.
        bootstrap: bootstrap samples.
        seed: of the bootstrap.
    """
    resample = ClusterBootstrap(clusters, bootstrap, seed)
    found = []
    for identifier, name, unit, values in metrics:
        base, capped, tuned, tuned_after, base_after = (
            np.asarray(values[arm], dtype=float)
            for arm in ("base", "base+cap", "tuned", after("tuned", tuning.name), after("base", tuning.name))
        )
        if not all(np.isfinite(row).any() for row in (tuned_after - base, base_after - base, tuned_after - base_after)):
            continue
        left = resample.retention(np.zeros_like(base), tuned - base, tuned_after - base_after)
        if left.estimate is None and left.why.startswith("the cap"):
            left = Retention(estimate=None, why="the tuning itself moved it within its noise")
        found.append(
            Outlasting(
                id=identifier,
                name=name,
                unit=unit,
                before=resample.retention(base, capped, tuned),
                after=resample.retention(base, capped, tuned_after),
                base_after=resample.retention(base, capped, base_after),
                left=left,
                tuned_change=resample.estimate(tuned_after - tuned),
                lead=resample.estimate(tuned_after - base_after),
            )
        )
    return Durability(
        name=tuning.name,
        meaning=f"{facts['rows']} rows, {tuning.epochs} epoch{'s' if tuning.epochs > 1 else ''}, {facts['steps']} steps of "
        f"{facts['rows_a_step']}, learning rate {tuning.learning_rate:g}",
        adversarial=tuning.adversarial,
        metrics=found,
    )
