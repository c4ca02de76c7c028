"""Intervals: against scipy, against formulas written here, and against what an interval promises."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score

from trimtab.eval.intervals import (
    ClusterBootstrap,
    Noise,
    bounds_of,
    clustered_rate,
    few,
    holm,
    most_telling,
    p_of,
    rate_row,
    wilson,
    with_noise,
)
from trimtab.eval.schema import ByCluster

NAN = float("nan")


def names(count: int) -> list[str]:
    return [f"c{i:03d}" for i in range(count)]


def test_without_clusters_it_is_the_ordinary_bootstrap() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=60)
    ours = ClusterBootstrap(names(60), 20_000, 0).estimate(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    interval = theirs.confidence_interval
    assert ours.value == pytest.approx(values.mean())
    width = interval.high - interval.low
    assert ours.low == pytest.approx(interval.low, abs=0.03 * width)
    assert ours.high == pytest.approx(interval.high, abs=0.03 * width)
    assert ours.n == 60


def test_clusters_move_together() -> None:
    """Copies of an item add nothing: 20 clusters of 10 equal items are as uncertain as 20 items."""
    per_cluster = np.random.default_rng(0).normal(size=20)
    repeated = np.repeat(per_cluster, 10)
    few = ClusterBootstrap(names(20), 4000, 5).estimate(per_cluster)
    many = ClusterBootstrap([name for name in names(20) for _ in range(10)], 4000, 5).estimate(repeated)
    assert (many.low, many.high) == pytest.approx((few.low, few.high))
    loose = ClusterBootstrap(names(200), 4000, 5).estimate(repeated)
    assert loose.high - loose.low < 0.5 * (many.high - many.low)


def test_clusters_of_unequal_size_weigh_by_their_items() -> None:
    bootstrap = ClusterBootstrap(["a", "b", "b", "b"], 500, 0)
    assert bootstrap.estimate([0.0, 4.0, 4.0, 4.0]).value == 3.0
    assert set(np.round(bootstrap.means(np.array([0.0, 4.0, 4.0, 4.0])), 9)) == {0.0, 3.0, 4.0}


def test_the_order_of_items_does_not_matter() -> None:
    clusters, values = ["x", "y", "z", "x", "y"], np.array([1.0, 2.0, 3.0, 4.0, NAN])
    order = [4, 2, 0, 1, 3]
    one = ClusterBootstrap(clusters, 300, 9).estimate(values)
    other = ClusterBootstrap([clusters[i] for i in order], 300, 9).estimate(values[order])
    assert one.model_dump() == pytest.approx(other.model_dump())


def test_retention_by_its_definition() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=40)
    capped = base + 1 + 0.1 * generator.normal(size=40)
    bootstrap = ClusterBootstrap(names(40), 1000, 0)

    unmoved = bootstrap.retention(base, base, capped)
    assert unmoved.estimate is None and "within its noise" in unmoved.why
    as_capped = bootstrap.retention(base, capped, capped).estimate
    assert as_capped is not None and (as_capped.value, as_capped.low, as_capped.high) == (1.0, 1.0, 1.0)
    as_base = bootstrap.retention(base, capped, base).estimate
    assert as_base is not None and (as_base.value, as_base.low, as_base.high) == (0.0, 0.0, 0.0)
    half = bootstrap.retention(base, capped, base + 0.5 * (capped - base)).estimate
    assert half is not None and (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    # the sign of the cap's effect does not matter
    down = bootstrap.retention(-base, -capped, -(base + 0.5 * (capped - base))).estimate
    assert down is not None and down.value == pytest.approx(0.5)


def test_a_cap_within_its_noise_has_no_retention() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(size=30)
    noisy = ClusterBootstrap(names(30), 1000, 0).retention(base, base + generator.normal(size=30) * 0.5, base + 1)
    assert noisy.estimate is None and noisy.why


def test_one_cluster_is_no_evidence() -> None:
    """All resamples of one cluster are equal: an interval of no width would look like certainty."""
    base = np.arange(6.0)
    found = ClusterBootstrap(["pirate"] * 6, 200, 0).retention(base, base + 1, base + 0.9)
    assert found.estimate is None and "one role" in found.why


def test_a_resample_without_any_effect_does_not_spoil_the_interval() -> None:
    base = np.zeros(5)
    capped = np.array([0.0, 1.0, 1.0, 1.0, 1.0])  # 1 resample in 3125 draws the first item alone: 0 / 0
    bootstrap = ClusterBootstrap(names(5), 20_000, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bootstrap.retention(base, capped, capped / 2)
    assert (bootstrap.means(capped) == 0).any() and found.estimate is not None
    assert (found.estimate.low, found.estimate.high) == (0.5, 0.5)


def test_missing_answers_are_left_out_of_all_arms() -> None:
    bootstrap = ClusterBootstrap(names(5), 400, 0)
    base = np.array([0.0, 1.0, 2.0, 3.0, NAN])
    capped = np.array([1.0, 2.0, NAN, 4.0, 9.0])
    tuned = np.array([0.5, NAN, 7.0, 3.5, 9.0])
    found = bootstrap.retention(base, capped, tuned).estimate
    assert found is not None and found.n == 2 and found.value == pytest.approx(0.5)
    assert bootstrap.retention(base, capped, np.full(5, NAN)).estimate is None
    estimate = bootstrap.estimate(capped)
    assert estimate.n == 4 and estimate.value == 4.0
    with pytest.raises(ValueError, match="no value"):
        bootstrap.estimate([NAN] * 5)
    assert bootstrap.estimate_if_any([NAN] * 5) is None and bootstrap.estimate_if_any(capped) == estimate


def test_a_resample_of_missing_answers_alone_is_not_a_zero() -> None:
    """Values near 100 with missing ones: no mean of them can lie far below."""
    values = np.array([100.0, 101.0, NAN, NAN, NAN])
    estimate = ClusterBootstrap(names(5), 2000, 0).estimate(values)
    assert estimate.low >= 90.0 and estimate.high <= 111.0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(11)
    clusters = [name for name in names(40) for _ in range(3)]
    covered = 0
    for trial in range(400):
        values = 1.0 + np.repeat(generator.normal(size=40), 3) + 0.5 * generator.normal(size=120)
        estimate = ClusterBootstrap(clusters, 400, trial).estimate(values)
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.91 <= covered / 400 <= 0.98


@pytest.mark.parametrize("clusters", [3, 5, 8])
def test_intervals_of_few_clusters_cover_too(clusters: int) -> None:
    """The plain percentile interval covers in 75, 83 and 86 % there."""
    generator = np.random.default_rng(clusters)
    labels = [name for name in names(clusters) for _ in range(4)]
    covered = rejected = 0
    for trial in range(300):
        values = 1.0 + np.repeat(generator.normal(size=clusters), 4) + 0.5 * generator.normal(size=4 * clusters)
        bootstrap = ClusterBootstrap(labels, 400, trial)
        estimate = bootstrap.estimate(values)
        covered += estimate.low <= 1.0 <= estimate.high
        rejected += bootstrap.p_value(values - 1.0) < 0.05
    assert covered / 300 >= 0.91 and rejected / 300 <= 0.09


def test_few_is_students_t_and_the_unbiased_variance() -> None:
    assert few(8) == pytest.approx(stats.t.ppf(0.975, 7) / stats.norm.ppf(0.975) * math.sqrt(8 / 7))
    assert few(68) == pytest.approx(1.03, abs=0.005) and few(1) == 1.0


def test_the_role_that_weighs_most_is_named_with_what_is_left_without_it() -> None:
    roles = ["a", "b", "c", "d"]
    runs = [
        ByCluster(clusters=roles, counts=[2, 1, 1, 1], means={"base": [1.0] * 4, "base+cap": [0.0] * 4, "tuned": tuned})
        for tuned in ([0.2, 0.2, 3.0, 0.0], [0.0, 0.4, 4.0, 0.2])
    ]
    found = most_telling(runs)
    assert found is not None and found[0] == "c"
    assert found[1] == pytest.approx(1 - (2 * 0.2 + 0.2 + 2 * 0.0 + 0.4 + 0.2) / 8)
    assert most_telling([run.model_copy(update={"clusters": roles[:2]}) for run in runs]) is None
    still = runs[0].model_copy(update={"means": {**runs[0].means, "base+cap": [1.0] * 4}})
    assert most_telling([still]) is None


def test_a_rate_stays_a_rate_however_few_its_clusters() -> None:
    values = [1.0, 1.0, 1.0, 0.0]
    free = ClusterBootstrap(names(4), 2000, 0).estimate(values)
    kept = ClusterBootstrap(names(4), 2000, 0).estimate(values, most=1.0)
    assert free.high > 1 and (kept.low, kept.high) == (max(free.low, 0.0), 1.0)
    beyond = [3.0, -1.0, 2.0, 0.5]  # a score that may go below 0
    assert ClusterBootstrap(names(4), 2000, 0).estimate(beyond, most=3.0).low < 0


def test_a_rate_of_clustered_answers() -> None:
    """Independent answers have Wilson's own interval; copies add nothing; where all are alike each cluster is one answer."""
    independent = [1.0, 0.0] * 30
    alone = clustered_rate(independent, names(60))
    assert alone is not None and (alone.low, alone.high) == pytest.approx(
        (wilson(30, 60).low, wilson(30, 60).high), abs=0.01
    )
    copies = clustered_rate([v for v in independent for _ in range(10)], [n for n in names(60) for _ in range(10)])
    assert copies is not None and copies.n == 600
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high), abs=1e-9)
    none = clustered_rate([0.0] * 40 + [NAN], [*[n for n in names(8) for _ in range(5)], "x"])
    assert (
        none is not None
        and none.n == 40
        and (none.low, none.high) == pytest.approx((wilson(0, 8).low, wilson(0, 8).high))
    )
    assert clustered_rate([NAN], ["a"]) is None
    generator = np.random.default_rng(0)
    labels = [name for name in names(20) for _ in range(12)]
    covered = 0
    for _ in range(300):  # rates of roles from 0 to 1: plain Wilson covers in 61 %
        by_role = generator.beta(0.5, 0.5, 20)
        found = clustered_rate((generator.random(240) < np.repeat(by_role, 12)).astype(float), labels)
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    assert covered / 300 >= 0.9


def test_the_interval_of_retention_covers_the_truth() -> None:
    generator = np.random.default_rng(12)
    covered = 0
    for trial in range(400):
        base = generator.normal(size=40)
        effect = 1 + 0.5 * generator.normal(size=40)
        tuned = base + 0.6 * effect + 0.3 * generator.normal(size=40)
        found = ClusterBootstrap(names(40), 400, trial).retention(base, base + effect, tuned).estimate
        assert found is not None
        covered += found.low <= 0.6 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (50, 180), (1, 1)])
def test_wilson_by_its_formula(successes: int, n: int) -> None:
    z = stats.norm.ppf(0.975)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(successes, n)
    assert (found.value, found.n) == (p, n)
    assert (found.low, found.high) == pytest.approx((max(centre - half, 0), min(centre + half, 1)), abs=1e-9)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_p_values_are_uniform_where_nothing_moves_and_small_where_something_does() -> None:
    generator = np.random.default_rng(5)
    clusters = [f"c{i // 2}" for i in range(80)]
    null = [ClusterBootstrap(clusters, 400, seed).p_value(generator.normal(size=80)) for seed in range(60)]
    assert 0.3 < float(np.mean(null)) < 0.7 and sum(p < 0.05 for p in null) <= 8
    assert ClusterBootstrap(clusters, 400, 0).p_value(np.zeros(80)) == 1.0


@pytest.mark.parametrize("clusters", [8, 16, 68])
def test_of_what_is_true_p_rejects_one_in_twenty(clusters: int) -> None:
    """Skewed clusters of unequal size; of 8 such clusters Student's t alone rejects in 8 %."""
    generator = np.random.default_rng(clusters)
    sizes = np.resize([2, 3, 4], clusters)
    bootstrap = ClusterBootstrap(np.repeat(names(clusters), sizes).tolist(), 1, 0)
    trials = 4000
    noise = generator.normal(scale=0.5, size=(trials, int(sizes.sum())))
    values = np.repeat(generator.gamma(2.0, size=(trials, clusters)) - 2.0, sizes, axis=1) + noise
    rejected = sum(bootstrap.p_value(row) < 0.05 for row in values)
    assert 0.035 <= rejected / trials <= 0.07


def test_p_hangs_on_the_data_alone() -> None:
    """Neither on the number of resamples nor on their seed; and it may be less than any share of them."""
    generator = np.random.default_rng(5)
    clusters = [f"c{i // 2}" for i in range(80)]
    for mean in (0.1, 0.3, 1.0):
        values = generator.normal(mean, 1.0, 80)
        few_of_them = ClusterBootstrap(clusters, 500, 0).p_value(values)
        assert ClusterBootstrap(clusters, 20_000, 1).p_value(values) == few_of_them
    assert few_of_them < 1e-6 < 2 / 20_001


def test_p_of_items_without_skewness_is_students() -> None:
    values = np.array([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    assert ClusterBootstrap(names(6), 10, 0).p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert ClusterBootstrap(names(6), 10, 0).p_value([*values[:-1], NAN]) == pytest.approx(
        stats.ttest_1samp(values[:-1], 0).pvalue
    )


def test_p_where_nothing_varies() -> None:
    """Six clusters that all moved alike are six coins that fell on one side; one alone tells nothing."""
    assert ClusterBootstrap(names(6), 10, 0).p_value(np.full(6, 0.3)) == 2 / 2**6
    assert ClusterBootstrap(["a"] * 6, 10, 0).p_value(np.arange(6.0)) == 1.0


def crossed(roles: int, questions: int, each: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Role and question of each item: each role goes on in the list of questions where the one before it stopped."""
    items = np.arange(roles * each)
    return items // each, items % questions


def named(letter: str, index: np.ndarray[Any, Any]) -> list[str]:
    return [f"{letter}{i:03d}" for i in index]


@pytest.mark.parametrize(("roles", "questions", "each"), [(20, 12, 12), (68, 80, 3)])
def test_intervals_are_about_other_questions_too(roles: int, questions: int, each: int) -> None:
    """Where the question matters more than the role, resampling roles alone covers far less than it says."""
    generator = np.random.default_rng(roles)
    role, question = crossed(roles, questions, each)
    both, roles_alone, rejected, trials = 0, 0, 0, 300
    for trial in range(trials):
        values = 0.5 * generator.normal(size=roles)[role] + 1.5 * generator.normal(size=questions)[question]
        values += generator.normal(size=len(role))
        bootstrap = ClusterBootstrap(named("r", role), 300, trial, named("q", question))
        found, old = bootstrap.estimate(values), ClusterBootstrap(named("r", role), 300, trial).estimate(values)
        both += found.low <= 0 <= found.high
        roles_alone += old.low <= 0 <= old.high
        rejected += bootstrap.p_value(values) < 0.05
    assert 0.91 <= both / trials <= 0.98 and 0.02 <= rejected / trials <= 0.09
    assert roles_alone / trials < both / trials - 0.1


def test_questions_that_do_not_matter_do_not_widen() -> None:
    """Noise of items alone is counted once, where the pigeonhole bootstrap's own deviations count it three times."""
    role, question = crossed(68, 80, 3)
    values = np.random.default_rng(0).normal(size=204)
    both = ClusterBootstrap(named("r", role), 4000, 0, named("q", question))
    alone = ClusterBootstrap(named("r", role), 4000, 0)
    crossed_width, width = (found.high - found.low for found in (both.estimate(values), alone.estimate(values)))
    assert crossed_width == pytest.approx(width, rel=0.12)
    assert np.std(both.means(values)) == pytest.approx(np.sqrt(3) * np.std(alone.means(values)), rel=0.1)
    assert both.detectable(values) == pytest.approx(alone.detectable(values), rel=0.12)
    assert both.p_value(values) == pytest.approx(alone.p_value(values), abs=0.1)


def test_a_crossed_resample_weighs_an_item_by_both_counts() -> None:
    role, question = crossed(5, 4, 3)
    values = np.random.default_rng(1).normal(size=15)
    values[6] = NAN
    bootstrap = ClusterBootstrap(named("r", role), 50, 3, named("q", question))
    weights = bootstrap._weights[:, role] * bootstrap._asked[:, question]
    present = np.isfinite(values)
    by_hand = (weights[:, present] * values[present]).sum(1) / weights[:, present].sum(1)
    assert bootstrap.means(values) == pytest.approx(by_hand)
    assert bootstrap._weights.sum(1) == pytest.approx(5) and bootstrap._asked.sum(1) == pytest.approx(4)


def test_a_crossed_retention_holds_the_noise_of_questions() -> None:
    """The tuning keeps 0.6 of the cap's effect on average, and how much hangs on the question."""
    generator = np.random.default_rng(3)
    role, question = crossed(20, 12, 12)
    covered, old, trials = 0, 0, 200
    for trial in range(trials):
        effect = 1 + 0.2 * generator.normal(size=20)[role] + 0.2 * generator.normal(size=len(role))
        tuned = effect * (0.6 + 0.3 * generator.normal(size=12)[question])
        zeros = np.zeros(len(role))
        for crossing in (named("q", question), None):
            found = ClusterBootstrap(named("r", role), 300, trial, crossing).retention(zeros, effect, tuned).estimate
            assert found is not None
            if crossing is None:
                old += found.low <= 0.6 <= found.high
            else:
                covered += found.low <= 0.6 <= found.high
    assert 0.9 <= covered / trials <= 0.99 and old / trials < 0.8


def test_questions_asked_once_are_resampled_with_their_roles() -> None:
    values, clusters = np.random.default_rng(2).normal(size=24), np.repeat(names(8), 3).tolist()
    plain = ClusterBootstrap(clusters, 200, 0)
    for questions in (
        [f"q{i}" for i in range(24)],
        ["the only one"] * 24,
        [f"{c}/{i % 2}" for i, c in enumerate(clusters)],
    ):
        found = ClusterBootstrap(clusters, 200, 0, questions)
        assert found.estimate(values) == plain.estimate(values) and found.p_value(values) == plain.p_value(values)


def test_the_smaller_number_of_levels_widens() -> None:
    """Forty roles, all asked the same four questions, are as few as four: t of three degrees of freedom."""
    role, question = crossed(40, 4, 4)
    values = np.random.default_rng(4).normal(size=4)[question]
    found = ClusterBootstrap(named("r", role), 2000, 0, named("q", question)).estimate(values)
    four = ClusterBootstrap(names(4), 2000, 1).estimate(values[:4])
    assert found.high - found.low == pytest.approx(four.high - four.low, rel=0.1)


def test_the_least_effect_that_shows_does_so_four_times_in_five() -> None:
    """Draw samples with a true mean of that size: about 80 % of the intervals leave out 0."""
    generator = np.random.default_rng(6)
    clusters = [f"c{i // 2}" for i in range(100)]
    least = float(
        np.mean([ClusterBootstrap(clusters, 300, s).detectable(generator.normal(size=100)) for s in range(20)])
    )
    assert least == pytest.approx(2.8 / 10, rel=0.1)  # independent draws: 2.8 standard errors of 1 / sqrt(100)
    shown = [ClusterBootstrap(clusters, 300, s).estimate(generator.normal(least, 1, 100)).low > 0 for s in range(200)]
    assert 0.7 < float(np.mean(shown)) < 0.9
    assert ClusterBootstrap(clusters, 50, 0).detectable(np.zeros(100)) == 0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.slow
def test_auc_with_its_interval() -> None:
    generator = np.random.default_rng(7)
    labels = [True] * 50 + [False] * 50
    scores = np.concatenate([generator.normal(1, 1, 50), generator.normal(0, 1, 50)])
    found = ClusterBootstrap([f"c{i}" for i in range(100)], 500, 0).auc(scores, labels)
    plain = ClusterBootstrap([f"c{i}" for i in range(100)], 500, 0)
    draws = [draw[plain._index] for draw in plain._weights]
    by_library = [roc_auc_score(labels, scores, sample_weight=draw) for draw in draws]
    low, high = (found.value + few(100) * (end - found.value) for end in np.percentile(by_library, [2.5, 97.5]))
    assert (found.low, found.high) == pytest.approx((low, high))
    by_pairs = np.mean([a > b for a in scores[:50] for b in scores[50:]])
    assert found.value == pytest.approx(by_pairs) and found.low < found.value < found.high and found.n == 100
    shuffled = ClusterBootstrap([f"c{i}" for i in range(100)], 500, 0).auc(generator.permutation(scores), labels)
    assert shuffled.low < 0.5 < shuffled.high


def by_hand(items: int, samples: int, seed: int, score: Any) -> tuple[float, float]:
    """Percentiles of a score over the very resamples of a bootstrap of single items, widened for so few of them."""
    draws = np.random.default_rng(seed).integers(0, items, (samples, items))
    whole = score(np.arange(items))
    low, high = (
        whole + few(items) * (end - whole) for end in np.nanpercentile([score(draw) for draw in draws], [2.5, 97.5])
    )
    return float(low), float(high)


def test_kappa_and_r2_are_sklearns_on_every_resample() -> None:
    random = np.random.default_rng(8)
    one = random.choice(["a", "b", "c"], 40)
    other = np.where(random.random(40) < 0.7, one, random.choice(["a", "b", "c"], 40))
    found = ClusterBootstrap(names(40), 300, 6).kappa(list(one), list(other))
    assert found is not None and found.value == pytest.approx(cohen_kappa_score(one, other))
    expected = by_hand(40, 300, 6, lambda draw: cohen_kappa_score(one[draw], other[draw]))
    assert (found.low, found.high) == pytest.approx(expected)
    values = random.normal(size=40)
    predicted = 0.7 * values + 0.3 * random.normal(size=40)
    fit = ClusterBootstrap(names(40), 300, 6).r2(values, predicted)
    assert fit is not None and fit.value == pytest.approx(r2_score(values, predicted))
    expected = by_hand(40, 300, 6, lambda draw: r2_score(values[draw], predicted[draw]))
    assert (fit.low, fit.high) == pytest.approx(expected)


def test_kappa_of_one_label_and_r2_of_one_value_are_undefined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ClusterBootstrap(names(3), 50, 0).kappa(["a"] * 3, ["a"] * 3) is None
    assert ClusterBootstrap(names(3), 50, 0).r2(np.ones(3), np.zeros(3)) is None


def test_a_rate_has_the_noise_of_questions_and_of_repetitions() -> None:
    """Whether an answer reads as a persona hangs on its question alone: roles tell nothing, and repetitions say the same."""
    role, question = crossed(60, 12, 3)
    labels, asked = named("r", role), named("q", question)
    covered, narrow = 0, 0
    for trial in range(200):
        by_question = np.random.default_rng(trial).random(12) < 0.4
        values = by_question[question].astype(float).tolist()
        found, alone = clustered_rate(values, labels, asked), clustered_rate(values, labels)
        assert found is not None and alone is not None
        covered += found.low <= 0.4 <= found.high
        narrow += alone.low <= 0.4 <= alone.high
        again = clustered_rate(values * 2, labels * 2, asked * 2, [0] * 180 + [1] * 180)
        assert again is not None and again.high == pytest.approx(found.high, abs=1e-6)
    assert covered >= 184 > 160 > narrow
    row = rate_row("r", {"base": values, "none": [NAN] * 180}, labels, crossed=asked)
    assert row.arms == {"base": found}
    apart = clustered_rate([1.0] * 100 + [0.0] * 80 + [1.0] * 60 + [0.0] * 120, labels * 2, None, [0] * 180 + [1] * 180)
    together = clustered_rate([1.0] * 100 + [0.0] * 80 + [1.0] * 60 + [0.0] * 120, labels * 2)
    assert apart is not None and together is not None
    assert (apart.low, apart.high) == (0.0, 1.0) and 0.3 < together.low < together.high < 0.6  # two, by t of 1 degree


def test_an_interval_stays_within_what_a_value_can_be() -> None:
    changed = np.asarray([1.0, 1.0, 1.0, 0.0])
    wide = ClusterBootstrap(names(4), 2000, 0).estimate(changed)
    kept = ClusterBootstrap(names(4), 2000, 0).estimate_if_any(changed, least=-1.0, most=1.0)
    assert kept is not None and wide.high > 1 and (kept.low, kept.high) == (wide.low, 1.0)
    assert ClusterBootstrap(names(4), 2000, 0).estimate(-changed, least=-1.0, most=1.0).low == -1.0
    assert ClusterBootstrap(names(4), 200, 0).estimate_if_any([NAN] * 4, most=1.0) is None
    assert bounds_of("professional_off_change_cap", "share") == (-1, 1) and bounds_of("unusable_rate", "share") == (
        0,
        1,
    )
    assert bounds_of("persona_rate", "rate") == (0, 1) and bounds_of("length_change", "words") == (-np.inf, np.inf)


def test_of_two_noises_each_keeps_its_own_degrees_of_freedom() -> None:
    few_, many = Noise(0.5, 2), Noise(0.3, 60)
    assert p_of(1.0, 0.0, [few_]) == pytest.approx(2 * stats.t.sf(1 / np.sqrt(0.5), 2))
    assert p_of(1.0, 0.0, [many, Noise(0.0, 2)]) == pytest.approx(p_of(1.0, 0.0, [many]))
    assert p_of(1.0, 0.0, [few_, Noise(0.3, 2)]) == pytest.approx(2 * stats.t.sf(1 / np.sqrt(0.8), 2))
    # at the end of the interval p is 0.05
    side = stats.t.ppf(0.975, 60) * np.sqrt(0.3)
    low, high = with_noise(1.0, (1.0 - side, 1.0 + side), few_)
    assert high - 1 == pytest.approx(1 - low) == pytest.approx(np.hypot(side, stats.t.ppf(0.975, 2) * np.sqrt(0.5)))
    assert p_of(high - 1, 0.0, [many, few_]) == pytest.approx(0.05)
    assert with_noise(1.0, (0.9, 1.2), None, 0.0, 1.0) == (0.9, 1.0)
    assert p_of(1e6, 0.0, [many, few_]) < 1e-9 and p_of(0.0, 0.0, [many, few_]) == pytest.approx(1.0)
