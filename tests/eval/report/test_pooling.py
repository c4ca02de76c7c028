"""Settings pooled over seeds and held against each other: by definition, by what is known beforehand, and by simulation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_report import build_report

from trimtab.eval.intervals import ClusterBootstrap
from trimtab.eval.report.pooling import Repetitions, gap_of, settings_of, stand
from trimtab.eval.schema import ByCluster, Report

ROLES = [f"role{i:02d}" for i in range(24)]
CLUSTERS = [role for role in ROLES for _ in range(3)]
CAP_EFFECT = -0.13


def answers(seed: int, retention: float, *, noise: float = 0.02) -> dict[str, np.ndarray[Any, Any]]:
    """Items of three arms; base and cap are the same for every seed, as in runs that share them."""
    shared, own = np.random.default_rng(1000), np.random.default_rng(seed)
    base = np.repeat(shared.normal(0.14, 0.1, len(ROLES)), 3) + shared.normal(0, 0.05, len(CLUSTERS))
    capped = base + CAP_EFFECT + shared.normal(0, 0.05, len(CLUSTERS))
    tuned = base + retention * CAP_EFFECT + own.normal(0, noise, len(CLUSTERS))
    return {"base": base, "base+cap": capped, "tuned": tuned}


def by_cluster(seed: int, retention: float, **more: float) -> ByCluster:
    return ClusterBootstrap(CLUSTERS, 10, 0).by_cluster(answers(seed, retention, **more))


def report(by: ByCluster, *, recipe: str = "sft", seed: int = 0) -> Report:
    """A report whose primary metric has these values."""
    found = build_report(transcripts=1)
    metrics = [found.metrics[0].model_copy(update={"by_cluster": by}), *found.metrics[1:]]
    effect = ByCluster(clusters=by.clusters, counts=by.counts, means={"value": by.means["tuned"]})
    effects = [found.side_effects[0].model_copy(update={"by_cluster": effect}), *found.side_effects[1:]]
    resolved = {"method": {"name": recipe}, "data": {"seed": seed}, "train": {"seed": seed, "max_steps": 30}}
    return found.model_copy(
        update={"metrics": metrics, "side_effects": effects, "repeat": {**found.repeat, "resolved": resolved}}
    )


def test_one_run_has_the_retention_of_its_own_report() -> None:
    arrays = answers(1, 0.8)
    arrays["tuned"][4] = np.nan  # an empty answer
    alone = ClusterBootstrap(CLUSTERS, 500, 7)
    theirs = alone.retention(arrays["base"], arrays["base+cap"], arrays["tuned"]).estimate
    ours = Repetitions([alone.by_cluster(arrays)], 500, 7).retention().estimate
    assert theirs is not None and ours is not None and ours.n == theirs.n == 71
    assert ours.model_dump() == pytest.approx(theirs.model_dump(), rel=1e-4)


def test_means_by_cluster_are_of_the_items_that_all_arms_have() -> None:
    found = ClusterBootstrap(["b", "a", "a", "c"], 10, 0).by_cluster(
        {"base": [1.0, 2.0, 4.0, np.nan], "tuned": [5.0, 6.0, np.nan, 1.0]}
    )
    assert (found.clusters, found.counts) == (["a", "b"], [1, 1])  # of c nothing is whole
    assert found.means == {"base": [2.0, 1.0], "tuned": [6.0, 5.0]}


def test_repetitions_are_weighed_by_their_items() -> None:
    one = ByCluster(clusters=["a", "b"], counts=[1, 1], means={"value": [0.0, 0.0]})
    other = ByCluster(clusters=["a", "b"], counts=[3, 3], means={"value": [4.0, 4.0]})
    found = Repetitions([one, other], 10, 0)
    assert found.mean("value") == 3.0 and found.estimate("value").n == 8


def test_the_noise_of_seeds_is_that_of_their_mean_by_students_t() -> None:
    """Where clusters don't differ the interval is the textbook's, of three values."""
    values = [0.2, 0.9, 1.3]
    runs = [ByCluster(clusters=["a", "b"], counts=[2, 2], means={"value": [v, v]}) for v in values]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = Repetitions(runs, 200, 0).estimate("value")
    assert (found.low, found.high) == pytest.approx((low, high))
    assert Repetitions(runs, 200, 0).estimate("value", least=0.0, most=1.0).high == 1.0
    alone = Repetitions(runs[:1], 200, 0)
    assert alone.noise("value") is None and alone.estimate("value").low == alone.estimate("value").high


QUESTIONS = [f"q{(3 * i + k) % 18:02d}" for i in range(len(ROLES)) for k in range(3)]
SEED_SD = {1: 0.0, 3: 0.15}


def asked(trial: int, repetitions: int, kept: float = 0.8) -> list[ByCluster]:
    """Repetitions whose retention hangs on the question more than on the role, and on the seed where there are several."""
    generator = np.random.default_rng([trial, repetitions])
    _, question = np.unique(QUESTIONS, return_inverse=True)
    common, own = (generator.normal(0, sd, 18)[question] for sd in (1.0, 0.8))
    cap = -3 + common
    found = []
    for _ in range(repetitions):
        base = generator.normal(0, 0.3, len(CLUSTERS))
        tuned = kept * cap + own + 3 * generator.normal(0, SEED_SD[repetitions])
        rows = {"base": base, "base+cap": base + cap, "tuned": base + tuned + generator.normal(0, 0.3, len(CLUSTERS))}
        found.append(ClusterBootstrap(CLUSTERS, 1, 0, QUESTIONS).by_cluster(rows))
    return found


@pytest.mark.parametrize("repetitions", [1, 3])
def test_pooled_intervals_cover_what_questions_and_seeds_change(repetitions: int) -> None:
    """Draws of roles and repetitions alone cover in 61 of them, and in 88 of three seeds that differ."""
    covered = 0
    for trial in range(100):
        found = Repetitions(asked(trial, repetitions), 200, trial).retention().estimate
        covered += found is not None and found.low <= 0.8 <= found.high
    assert covered >= 92


def test_values_are_kept_by_question_where_roles_share_them() -> None:
    run = asked(0, 1)[0]
    assert run.items is not None and run.items.questions == sorted(set(QUESTIONS))
    of = [(run.clusters[c], run.items.questions[q]) for c, q in zip(run.items.cluster, run.items.asked, strict=True)]
    assert of == list(zip(CLUSTERS, QUESTIONS, strict=True))
    means = np.bincount(run.items.cluster, run.items.values["tuned"]) / run.counts
    assert means == pytest.approx(run.means["tuned"], rel=1e-4)
    assert by_cluster(1, 0.9).items is None
    # what an arm lacks is left out of both
    rows = {"value": np.where(np.arange(len(CLUSTERS)) == 4, np.nan, 1.0)}
    kept = ClusterBootstrap(CLUSTERS, 1, 0, QUESTIONS).by_cluster(rows)
    assert kept.items is not None and len(kept.items.asked) == 71 and kept.counts[1] == 2


def test_one_run_has_the_crossed_interval_of_its_own_report() -> None:
    arrays = answers(1, 0.8)
    alone = ClusterBootstrap(CLUSTERS, 500, 7, QUESTIONS)
    theirs = alone.retention(arrays["base"], arrays["base+cap"], arrays["tuned"]).estimate
    ours = Repetitions([alone.by_cluster(arrays)], 500, 7).retention().estimate
    assert theirs is not None and ours is not None
    assert ours.model_dump() == pytest.approx(theirs.model_dump(), rel=1e-4)


def test_reports_without_values_by_question_are_read_and_told() -> None:
    new, old = (report(asked(trial, 1)[0], recipe=str(trial)) for trial in (0, 1))
    by = old.metrics[0].by_cluster
    assert by is not None
    old = report(by.model_copy(update={"items": None}), recipe="1")
    standing = stand({"new": new, "old": old}, samples=200, seed=0)
    told = [line for line in standing.left_out if "question" in line]
    assert len(told) == 1 and "intervals of old:" in told[0]
    row = standing.metrics["text_llr"]
    estimates = [row[name].estimate for name in ("new", "old")]
    assert estimates[0] is not None and estimates[1] is not None and row["old"].gap is not None
    whole = stand({"new": new}, samples=200, seed=0)
    assert whole.left_out == [] and whole.metrics["text_llr"]["new"].estimate == estimates[0]


def test_evaluations_of_the_same_weights_are_averaged_pair_by_pair() -> None:
    one, other = asked(0, 1)[0], asked(1, 1)[0]
    reports = {
        name: with_hash(report(run, recipe="sft", seed=seed), "same")
        for seed, (name, run) in enumerate({"a": one, "b": other}.items())
    }
    found = stand(reports, samples=200, seed=0).metrics["text_llr"][next(iter(settings_of(reports)))]
    sums = {arm: np.mean([run.items.values[arm] for run in (one, other) if run.items is not None]) for arm in one.means}
    kept = (sums["tuned"] - sums["base"]) / (sums["base+cap"] - sums["base"])
    assert (
        found.estimate is not None and found.estimate.n == 72 and found.estimate.value == pytest.approx(kept, rel=1e-4)
    )


def test_seeds_widen_the_interval_where_they_differ_and_not_where_they_agree() -> None:
    same = [by_cluster(5, 0.9)] * 3
    alone = Repetitions(same[:1], 2000, 0).retention().estimate
    pooled = Repetitions(same, 2000, 0).retention().estimate
    assert alone is not None and pooled is not None
    assert (pooled.value, pooled.low, pooled.high) == pytest.approx((alone.value, alone.low, alone.high))
    unlike = [by_cluster(seed, kept) for seed, kept in ((5, 0.6), (6, 0.9), (7, 1.2))]
    spread = Repetitions(unlike, 2000, 0).retention().estimate
    assert spread is not None and spread.value == pytest.approx(0.9, abs=0.05)
    # three retentions 0.3 apart have a standard error of 0.3 * sqrt(2/3) / sqrt(3) = 0.14 by themselves
    assert spread.high - spread.low > alone.high - alone.low + 0.2


def test_a_cap_within_its_noise_has_no_pooled_retention() -> None:
    arrays = answers(1, 0.5)
    arrays["base+cap"] = arrays["base"] + np.random.default_rng(0).normal(0, 0.2, len(CLUSTERS))
    found = Repetitions([ClusterBootstrap(CLUSTERS, 10, 0).by_cluster(arrays)] * 2, 500, 0).retention()
    assert found.estimate is None and "within its noise" in found.why


@pytest.mark.slow
def test_a_setting_against_itself_has_no_gap_and_another_has_its_own() -> None:
    reports = {
        f"{name}-{seed}": report(by_cluster(draw + seed, kept), recipe=name, seed=seed)
        for name, draw, kept in (("first", 1, 0.9), ("twin", 1, 0.9), ("worse", 3, 0.5))
        for seed in (0, 1)
    }
    standing = stand(reports, samples=1000, seed=0)
    row = standing.metrics["text_llr"]
    assert row["first"].gap is None
    twin, worse = row["twin"].gap, row["worse"].gap
    assert twin is not None and worse is not None and twin.p is not None
    assert twin.estimate.value == 0.0 and twin.estimate.low < 0 < twin.estimate.high and twin.p > 0.5
    assert worse.estimate.value == pytest.approx(-0.4, abs=0.05) and worse.estimate.high < -0.3
    # two gaps on the page: Holm's correction doubles the lesser p, which no number of resamples bounds
    sides = [Repetitions([by_cluster(draw + k, kept) for k in (0, 1)], 1, 0) for draw, kept in ((1, 0.9), (3, 0.5))]
    assert worse.p == pytest.approx(2 * gap_of(*sides, "retention", 10, 0).p) and worse.p < 0.02
    assert stand(reports, samples=50, seed=1).metrics["text_llr"]["worse"].gap.p == worse.p
    assert standing.effects["kl_benign"]["worse"].gap is not None
    assert "shift_default" not in standing.effects  # holds no values by cluster
    assert len(standing.left_out) == 1 and "other questions" in standing.left_out[0] and standing.repeated


def test_of_one_run_the_gap_has_no_p() -> None:
    """Its interval is of roles alone: where retention varies from seed to seed by 0.1, it leaves 0 out in two of five."""
    reports = {
        "first-0": report(by_cluster(1, 0.9), recipe="sft"),
        "worse-0": report(by_cluster(2, 0.5), recipe="worse"),
        "worse-1": report(by_cluster(3, 0.5), recipe="worse", seed=1),
    }
    gap = stand(reports, samples=200, seed=0).metrics["text_llr"]["worse"].gap
    assert gap is not None and gap.p is None and gap.estimate.high < 0


def test_answers_of_two_judges_have_no_gap() -> None:
    def judged(model: str) -> Report:
        one = report(by_cluster(1, 0.9), recipe=model)
        resolved = {**one.repeat["resolved"], "eval": {"judge": {"model": model}}}
        metrics = [one.metrics[0].model_copy(update={"id": "harmful_rate"}), *one.metrics]
        return one.model_copy(update={"metrics": metrics, "repeat": {**one.repeat, "resolved": resolved}})

    standing = stand({"a": judged("a"), "b": judged("b")}, samples=100, seed=0)
    assert standing.metrics["harmful_rate"]["b"].gap is None and standing.metrics["text_llr"]["b"].gap is not None
    assert any("harmful_rate of b" in line and "judge" in line for line in standing.left_out)


def test_figures_of_two_splits_have_no_gap() -> None:
    """Benign requests and neutral prompts are numbered, so that those of another split have the same names."""

    def of(split: str | None) -> Report:
        one = report(by_cluster(1, 0.9), recipe=str(split))
        resolved = {**one.repeat["resolved"], "eval": {"split": split} if split else {}}
        return one.model_copy(update={"repeat": {**one.repeat, "resolved": resolved}})

    standing = stand({"a": of("dev"), "b": of("test"), "c": of(None)}, samples=100, seed=0)
    effect = report(by_cluster(1, 0.9)).side_effects[0].id
    for row in (standing.metrics["text_llr"], standing.effects[effect]):
        assert row["b"].gap is None and row["c"].gap is not None  # a report of before is of what is dev now
    assert any("text_llr of b" in line and "split" in line for line in standing.left_out)


def test_the_gap_is_paired_by_role() -> None:
    """What roles differ by falls out of the difference: the gap is far surer than either retention by itself."""
    reports = {
        name: report(by_cluster(seed, kept, noise=0.01), recipe=name)
        for name, seed, kept in (("a", 1, 1.0), ("b", 2, 0.9))
    }
    row = stand(reports, samples=1000, seed=0).metrics["text_llr"]
    gap, alone = row["b"].gap, row["b"].estimate
    assert gap is not None and alone is not None
    assert gap.estimate.high - gap.estimate.low < 0.5 * (alone.high - alone.low)
    assert gap.estimate.high < 0


def test_intervals_of_gaps_cover_nearly_as_often_as_they_promise() -> None:
    """Two settings of one true retention, three seeds each that vary by 0.1: far more than roles do."""
    covered = 0
    for trial in range(100):
        draws = np.random.default_rng(trial).normal(0.9, 0.1, (2, 3))
        one, other = sides(trial, draws, 200)
        gap = gap_of(one, other, "retention", 200, trial).estimate
        covered += gap.low <= 0 <= gap.high
    assert 92 <= covered <= 99


def sides(trial: int, draws: np.ndarray[Any, Any], samples: int) -> list[Repetitions]:
    """Two settings of three seeds each, of these retentions, [2, 3]."""
    return [
        Repetitions([by_cluster(1000 * trial + 10 * i + k + 1, kept) for k, kept in enumerate(row)], samples, trial)
        for i, row in enumerate(draws)
    ]


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_p_of_gaps_rejects_what_is_true_no_more_often_than_one_in_twenty(spread: float) -> None:
    """Two settings of one true retention, three seeds each."""
    rejected = 0
    for trial in range(120):
        draws = np.random.default_rng(trial).normal(0.9, spread, (2, 3))
        gap = gap_of(*sides(trial, draws, 10), "retention", 10, trial)
        assert gap.p is not None
        rejected += gap.p < 0.05
    assert rejected <= 11
    assert rejected >= (2 if spread else 0)


def test_shares_are_the_slope_of_the_figure() -> None:
    """Raise a cluster's weight a little: the figure moves by its share."""
    runs = [by_cluster(seed, 0.8) for seed in (1, 2)]
    side = Repetitions(runs, 1, 0)
    kept = side.retention().estimate
    assert kept is not None and side.shares("retention").sum() == pytest.approx(0, abs=1e-12)
    counts = [[200 * count for count in run.counts] for run in runs]
    counts[1][5] = int(counts[1][5] * 1.01)
    heavier = Repetitions([run.model_copy(update={"counts": row}) for run, row in zip(runs, counts, strict=True)], 1, 0)
    moved = heavier.retention().estimate
    assert moved is not None
    assert moved.value - kept.value == pytest.approx(0.01 * side.shares("retention")[72 + 15 : 72 + 18].sum(), rel=1e-2)


def with_hash(one: Report, tuned: str) -> Report:
    return one.model_copy(update={"repeat": {**one.repeat, "hashes": {"tuned": tuned}}})


def test_copies_are_one_repetition() -> None:
    """The same adapter under several seeds of the evaluation, or one report given twice, says nothing of other weights."""
    other = with_hash(report(by_cluster(9, 0.5), recipe="dpo"), "other")
    runs = {
        "sft-a": with_hash(report(by_cluster(1, 0.8), recipe="sft", seed=0), "same"),
        "sft-b": with_hash(report(by_cluster(2, 0.9), recipe="sft", seed=1), "same"),
        "sft-c": with_hash(report(by_cluster(3, 1.0), recipe="sft", seed=2), "same"),
    }
    standing = stand({**runs, "dpo": other, "dpo-again": other}, samples=200, seed=0)
    assert standing.settings == {"sft": ["sft-a + sft-b + sft-c"], "dpo": ["dpo + dpo-again"]} and not standing.repeated
    assert "sft-a, sft-b, sft-c are the same weights: they count as one repetition" in standing.left_out
    row = standing.metrics["text_llr"]
    each = stand({name: with_hash(run, name) for name, run in runs.items()}, samples=50, seed=0).metrics["text_llr"][
        "sft"
    ]
    assert len(each.seeds) == 3 and row["sft"].seeds == pytest.approx([np.mean(each.seeds)])
    assert row["sft"].estimate is not None
    assert row["sft"].estimate.n == 72  # three evaluations, averaged: one's weight
    assert row["dpo"].gap is not None and row["dpo"].gap.p is None
    alone = stand({"dpo": other}, samples=200, seed=0).metrics["text_llr"]["dpo"]
    assert row["dpo"].seeds == alone.seeds and alone.estimate is not None and row["dpo"].estimate is not None
    assert row["dpo"].estimate.model_dump() == pytest.approx(alone.estimate.model_dump())

    # weights of their own, of which one was evaluated twice: two repetitions
    two = {**runs, "sft-c": with_hash(runs["sft-c"], "own")}
    standing = stand(two, samples=200, seed=0)
    assert standing.settings == {"sft": ["sft-a + sft-b", "sft-c"]} and standing.repeated
    assert standing.metrics["text_llr"]["sft"].seeds == pytest.approx([np.mean(each.seeds[:2]), each.seeds[2]])


def test_where_no_hash_is_recorded_equal_figures_are_copies() -> None:
    def of(seed: int, draw: int) -> Report:
        return report(by_cluster(draw, 0.9), recipe="sft", seed=seed)

    runs = {"x-0": of(0, 1), "x-1": of(1, 1), "x-2": with_hash(of(2, 1), "a"), "x-3": with_hash(of(3, 2), "b")}
    assert stand(runs, samples=50, seed=0).settings == {"x": ["x-0 + x-1 + x-2", "x-3"]}
    # a hash outweighs figures: two adapters may answer alike
    apart = {"x-0": with_hash(of(0, 1), "a"), "x-1": with_hash(of(1, 1), "b")}
    assert stand(apart, samples=50, seed=0).settings == {"x": ["x-0", "x-1"]}


def test_runs_that_differ_in_seeds_alone_are_one_setting() -> None:
    by = by_cluster(1, 0.9)
    reports = {
        "sft-0": report(by, recipe="sft", seed=0),
        "sft-1": report(by_cluster(2, 0.9), recipe="sft", seed=1),
        "floor-0": report(by, recipe="floor", seed=0),
    }
    longer = report(by, recipe="sft", seed=2)
    resolved = copy.deepcopy(longer.repeat["resolved"])
    resolved["train"]["max_steps"] = 60
    reports["sft-longer"] = longer.model_copy(update={"repeat": {**longer.repeat, "resolved": resolved}})
    assert settings_of(reports) == {"sft": ["sft-0", "sft-1"], "floor-0": ["floor-0"], "sft-longer": ["sft-longer"]}
    pooled = stand(reports, samples=100, seed=0)
    assert pooled.repeated and len(pooled.metrics["text_llr"]["sft"].seeds) == 2
    # without a recipe nothing says that runs belong together
    bare = {name: one.model_copy(update={"repeat": {}}) for name, one in reports.items()}
    assert list(settings_of(bare)) == list(reports)
    # a name that another run has is not taken twice
    clash = {"dpo-1": reports["sft-0"], "dpo-2": reports["sft-1"], "dpo": reports["floor-0"]}
    assert settings_of(clash) == {"dpo-1": ["dpo-1", "dpo-2"], "dpo": ["dpo"]}
    # nothing in common but their recipe: the first one's name
    assert list(settings_of({"x": reports["sft-0"], "y": reports["sft-1"]})) == ["x"]


def test_other_roles_are_said_to_be_left_out() -> None:
    by = by_cluster(1, 0.9)
    others = ByCluster(clusters=[f"other {name}" for name in by.clusters], counts=by.counts, means=by.means)
    standing = stand(
        {
            "sft-0": report(by, recipe="sft", seed=0),
            "dpo-0": report(others, recipe="dpo", seed=0),
            "grpo-0": report(by, recipe="grpo", seed=0),
            "grpo-1": report(others, recipe="grpo", seed=1),
        },
        samples=100,
        seed=0,
    )
    row = standing.metrics["text_llr"]
    assert row["dpo-0"].estimate is not None and row["dpo-0"].gap is None and "grpo" not in row
    assert any("text_llr of dpo-0 against the first" in line for line in standing.left_out)
    assert any("text_llr of grpo: its repetitions" in line for line in standing.left_out)
