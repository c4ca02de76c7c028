"""Side effects: the tuned model's own benign answers are read, the worst are told beside the mean, and empty ones count."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trimtab.eval import ids
from trimtab.eval.answers.arms import Item
from trimtab.eval.measures.side_effects import MEASURE, worst_mean
from trimtab.eval.measures.suite import Evidence, Suite
from trimtab.eval.report.assemble import claims_of, effect_of
from trimtab.eval.schema import Claim

TEXTS = {
    "base": ["one two three four five six", "a b c d", "x", "fine words all of them"],
    "base+cap": ["one", "a b c d", "x", "y"],
    "tuned": ["one two three four one two three four", "  ", "x y z", "fine words all of them"],
}
NAN = float("nan")


def forced(kl: Sequence[float]) -> Any:
    return types.SimpleNamespace(kl=list(kl), nll=[1.0] * len(kl), z_shift=[0.0] * len(kl))


def found_on(texts: dict[str, list[str]], own: Sequence[float], other: Sequence[float]) -> Suite:
    n = len(own)
    items = [Item(f"benign/{i}", f"benign/{i}", []) for i in range(n)]
    answers = {arm: types.SimpleNamespace(texts=row, means=None) for arm, row in texts.items()}
    by_reader = {arm: forced(other if arm == "tuned" else [0.0] * n) for arm in texts}
    evaluation: Any = types.SimpleNamespace(
        arms=types.SimpleNamespace(names=list(texts)),
        section=types.SimpleNamespace(bootstrap=500, seed=0),
        ruler=types.SimpleNamespace(z=lambda _: [0.0] * n),
        benign=items, defaults=items, role_clusters=[item.cluster for item in items],
        on_benign=answers, on_default=answers, on_roles=answers,
        benign_forced=by_reader, default_forced=by_reader, drift_forced=by_reader,
        benign_own_forced={"tuned": forced(own), "base+cap": forced([0.001] * n)},
    )  # fmt: skip
    return MEASURE.measure(evaluation)


def test_own_benign_answers_are_measured_beside_the_base_s() -> None:
    suite = found_on(TEXTS, [0.02, NAN, 0.9, 0.01], [0.01, 0.02, 0.03, 0.04])
    effects = {effect.id: effect for effect in suite.side_effects}
    own = effects[ids.BENIGN_KL_OWN]
    assert own.limit == effects[ids.BENIGN_KL].limit == 0.05
    assert [own.values[i] for i in (0, 2, 3)] == [0.02, 0.9, 0.01] and math.isnan(own.values[1])
    assert list(effects[f"{ids.BENIGN_KL_OWN}{ids.OF_THE_CAP}"].values) == [0.001] * 4
    assert effects[f"{ids.BENIGN_KL_OWN}{ids.OF_THE_CAP}"].limit is None
    # 8 words have 5 word 4-grams, of which one comes twice
    repeated = effects["benign_repetition_change"].values
    assert repeated[0] == pytest.approx(0.2) and repeated[3] == 0.0 and math.isnan(repeated[1])
    assert list(effects["benign_length_change"].values) == [2.0, -4.0, 2.0, 0.0]
    worst = {effect.id: effect.estimate for effect in suite.rates}
    assert set(worst) == {f"{ids.BENIGN_KL}_worst", f"{ids.BENIGN_KL_OWN}_worst"}
    assert (worst["benign_kl_worst"].value, worst["benign_kl_worst"].n) == (0.04, 4)
    assert (worst["benign_kl_own_worst"].value, worst["benign_kl_own_worst"].n) == (0.9, 3)
    assert all(effect.limit is None and effect.ok is None for effect in suite.rates), "shown, not judged"


def benign_claim(own: Sequence[float], other: Sequence[float], empty: int = 0) -> Claim:
    n = len(own)
    texts = {arm: ["so many words"] * n for arm in ("base", "base+cap", "tuned")}
    texts["tuned"][:empty] = [""] * empty
    suite = found_on(texts, own, other)
    effects = [effect for given in suite.side_effects if (effect := effect_of(given, 200, 0)) is not None]
    return next(claim for claim in claims_of(Evidence([], effects)) if claim.id == "benign")


def test_ordinary_answers_stay_only_both_ways_and_where_none_is_lost() -> None:
    low, high = [0.01] * 20, [0.2] * 20
    assert benign_claim(low, low).light == "green"
    assert benign_claim(high, low).light == "red", "what the tuned model says and the base would not"
    assert benign_claim(low, high).light == "red", "what the base says and the tuned model would not"
    assert benign_claim([NAN, *low[1:]], low, empty=1).measured
    assert not benign_claim([NAN, NAN, *low[2:]], low, empty=2).measured, "what is missing may be the worst"
    assert not benign_claim([NAN] * 20, low, empty=20).measured
    assert "own benign answers 0.2" in benign_claim(high, low).says


def test_the_worst_twentieth_and_its_interval() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    found = worst_mean([*values, NAN], 4000, 0)
    assert found is not None and found.n == 60
    assert found.value == pytest.approx(np.sort(values)[-3:].mean())
    draws = np.random.default_rng(2).choice(values, (4000, 60))
    by_hand = np.percentile(np.sort(draws, 1)[:, -3:].mean(1), [2.5, 97.5])
    # widened by 3 % for 60 items, as everywhere
    assert [found.low, found.high] == pytest.approx(found.value + 1.03 * (by_hand - found.value), abs=0.1)
    assert found.low < found.value <= found.high
    assert worst_mean([NAN, NAN], 10, 0) is None
    alone = worst_mean([0.3, 0.1], 200, 0)
    assert alone is not None and alone.value == 0.3, "at least one"
