"""Intervals and tests: paired bootstrap over clusters and what they are crossed with, p, retention, what n items can show, Holm.

A percentile bootstrap of few clusters is too sure of itself: of 4 its 95 % interval covers in 80 %, of 8 in 85 %. So deviations
from the estimate are widened by :func:`few`, as Student's t does for that many clusters: by 3 % for 68, by 29 % for 8.

Intervals are of resamples; p is not. It is a formula of the data (:func:`p_of`), so that no number of resamples bounds it.

Shapes: n paired items, C clusters, Q questions that the clusters are crossed with, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.stats import binomtest, norm
from scipy.stats import t as student
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from trimtab.eval.schema import ByCluster, Estimate, RateRow, Retention

Array = np.ndarray[Any, np.dtype[np.float64]]
LEVEL = 95.0
POWER = 0.8
AT_ONCE = 2_000_000  # numbers of a table [S, Q] that are held together, 16 MB


class ClusterBootstrap:
    """Resamples whole clusters (roles, conversations), the same draws for every arm, so that differences stay paired.

    Where the same questions are put to several clusters, a resample draws clusters and, by themselves, questions, each with
    replacement, and an item counts as often as its cluster was drawn times as often as its question was: the pigeonhole bootstrap
    (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1). So the interval is about other roles and other
    questions. Where no question is put to two clusters, it is the bootstrap of clusters.

    The pigeonhole bootstrap counts what is an item's own three times, as its cluster's, its question's and its own: of 68 roles,
    asked 3 of 80 questions each, its 95 % covers in 99 %. So deviations of means, effects and retentions are brought to the
    variance that counts it once (:meth:`_squares`). Then it covers in 93 to 96 %; in 90 to 92 % where few levels are skewed.

    Args:
        clusters: cluster of each item, [n].
        samples: bootstrap samples, S.
        seed: of the draws.
        crossed: question of each item, [n]; None where items have none in common.
    """

    def __init__(self, clusters: Sequence[str], samples: int, seed: int, crossed: Sequence[str] | None = None) -> None:
        self._names, self._index = np.unique(np.asarray(clusters), return_inverse=True)
        self.n = len(clusters)
        self._size = len(self._names)
        self._weights = cluster_draws(self._size, samples, seed)
        self._questions = None if crossed is None else self._shared(crossed)
        if self._questions is not None:
            self._asked = cluster_draws(int(self._questions.max()) + 1, samples, [seed, 1])  # [S, Q]

    def _shared(self, crossed: Sequence[str]) -> np.ndarray[Any, np.dtype[np.intp]] | None:
        """Index of each item's question, [n]; None where no question is put to several clusters, or there is one alone."""
        names, index = np.unique(np.asarray(crossed), return_inverse=True)
        pairs = np.unique(np.stack([self._index, index]), axis=1)
        return index if 1 < len(names) < pairs.shape[1] else None

    def means(self, values: Array) -> Array:
        """Mean over items of each resample, [S]; items that are NaN (no answer) are left out, a resample of none is NaN."""
        present = np.isfinite(values)
        sums, drawn = (self._drawn(row) for row in (np.where(present, values, 0.0), present.astype(float)))
        found: Array = np.divide(sums, drawn, out=np.full(len(drawn), np.nan), where=drawn > 0)
        return found

    def _drawn(self, values: Array) -> Array:
        """Sum of each resample's values, [S], each as often as it was drawn; no table [S, n] is made."""
        if self._questions is None:
            found: Array = self._weights @ np.bincount(self._index, values, self._size)
            return found
        questions = self._asked.shape[1]
        cells = coo_array((values, (self._questions, self._index)), shape=(questions, self._size)).tocsr()  # [Q, C]
        rows = max(1, AT_ONCE // questions)
        parts = [slice(start, start + rows) for start in range(0, len(self._weights), rows)]
        return np.concatenate([((cells @ self._weights[part].T).T * self._asked[part]).sum(1) for part in parts])

    def _item_weights(self) -> Array:
        """How often each item is drawn in each resample, [S, n]."""
        weights: Array = self._weights[:, self._index]
        return weights if self._questions is None else weights * self._asked[:, self._questions]

    def estimate(self, values: Sequence[float] | Array, *, most: float | None = None) -> Estimate:
        """Mean and percentile interval.

        Args:
            values: of each item, [n]; NaN where there is none.
            most: where values lie between 0 and this, the interval does so too, however widened.

        Raises:
            ValueError: if every value is NaN.
        """
        array = np.asarray(values, dtype=float)
        count = int(np.isfinite(array).sum())
        if count == 0:
            raise ValueError("no value to estimate from")
        value = float(np.nanmean(array))
        present = np.isfinite(array)
        means = widened(value, self.means(array), self._levels(present), self._scale(array - value, present))
        if most is not None and np.nanmin(array) >= 0 and np.nanmax(array) <= most:
            means = means.clip(0, most)
        low, high = percentiles(means)
        return Estimate(value=value, low=low, high=high, n=count)

    def _levels(self, present: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
        """Clusters that have a value, or questions where these are crossed and fewer: by what there is less of one is unsure."""
        clusters = len(np.unique(self._index[present]))
        questions = 0 if self._questions is None else len(np.unique(self._questions[present]))
        return min(clusters, questions) if questions > 1 else clusters

    def _sums(self, shares: Array, present: np.ndarray[Any, np.dtype[np.bool_]]) -> list[Array]:
        """What clusters add to a figure, of what each item adds, [n]; where crossed, what questions and pairs of both add too."""
        keys = [self._index]
        if self._questions is not None:
            keys += [self._questions, self._index * self._asked.shape[1] + self._questions]
        return [sums_of(key[present], shares[present]) for key in keys]

    @staticmethod
    def _squares(sums: Sequence[Array]) -> float:
        """A figure's variance but for small numbers, of :meth:`_sums`.

        The sum of squares of what clusters add (the sandwich of Liang and Zeger 1986). Where crossed, clusters' plus questions'
        minus pairs', at least the larger of the first two (Cameron, Gelbach and Miller 2011).
        """
        squares = [float((part**2).sum()) for part in sums]
        return max(squares[0], squares[1], squares[0] + squares[1] - squares[2]) if len(squares) > 1 else squares[0]

    def _scale(self, shares: Array, present: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
        """The factor that brings a pigeonhole bootstrap's deviations to :meth:`_squares`, at most 1; of what items add, [n]."""
        if self._questions is None:
            return 1.0
        sums = self._sums(shares, present)
        drawn = sum(float((part**2).sum()) for part in sums)
        return float(np.sqrt(self._squares(sums) / drawn)) if drawn > 0 else 1.0

    def estimate_if_any(self, values: Sequence[float] | Array) -> Estimate | None:
        """:meth:`estimate`, or None where every value is NaN."""
        return self.estimate(values) if np.isfinite(np.asarray(values, dtype=float)).any() else None

    def p_value(self, values: Sequence[float] | Array) -> float:
        """Two-sided p of a mean of 0, by :func:`p_of`; it hangs neither on the number of resamples nor on their seed.

        Variance and degrees of freedom are those that intervals have: m / (m - 1) times :meth:`_squares`, and m - 1, of m
        clusters (or questions where they are crossed and fewer). 1 where m is 1: nothing can be told then.
        """
        array = np.asarray(values, dtype=float)
        present = np.isfinite(array)
        value, levels = float(np.nanmean(array)), self._levels(present)
        if levels < 2:
            return 1.0
        sums = self._sums((array - value) / present.sum(), present)
        return p_of(
            value, levels / (levels - 1) * self._squares(sums), sum(third_of(side) for side in sums[:2]), levels - 1
        )

    def by_cluster(self, values: Mapping[str, Sequence[float] | Array]) -> ByCluster:
        """Means by cluster of the items that none of the given arms lacks; six significant digits, which a file can hold."""
        arrays = {arm: np.asarray(row, dtype=float) for arm, row in values.items()}
        together = np.isfinite(np.stack(list(arrays.values()))).all(0)
        index = self._index[together]
        counts = np.bincount(index, minlength=self._size)
        kept = np.flatnonzero(counts)
        means = {arm: np.bincount(index, row[together], self._size)[kept] / counts[kept] for arm, row in arrays.items()}
        return ByCluster(
            clusters=[str(name) for name in self._names[kept]],
            counts=counts[kept].tolist(),
            means={arm: [float(f"{mean:.6g}") for mean in row] for arm, row in means.items()},
        )

    def detectable(self, values: Sequence[float] | Array) -> float:
        """The least true mean that so many items would show: at the 5 % level, two-sided, with 80 % power.

        (z_0.975 + z_0.8) standard errors, the error being that of the cluster bootstrap; 0 where nothing varies.
        """
        array = np.asarray(values, dtype=float)
        present = np.isfinite(array)
        scale = few(self._levels(present)) * self._scale(array - float(np.nanmean(array)), present)
        error = float(np.nanstd(self.means(array))) * scale
        return float(norm.ppf(0.5 + LEVEL / 200) + norm.ppf(POWER)) * error

    def auc(self, scores: Sequence[float] | Array, positive: Sequence[bool] | np.ndarray[Any, Any]) -> Estimate:
        """Area under the ROC curve of ``scores`` for ``positive``, with its interval; resamples of one class are left out.

        Raises:
            ValueError: if there is one class only, or a score is NaN.
        """
        values, labels = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
        point = float(roc_auc_score(labels, values))
        # Mann and Whitney's form: of all pairs of one answer of each class, the weighted share in the right order.
        gaps = np.sign(values[labels][:, None] - values[~labels][None, :])
        ordered = (gaps + 1) / 2
        weights = self._item_weights()
        above, below = weights[:, labels], weights[:, ~labels]
        pairs = above.sum(1) * below.sum(1)
        samples = np.divide(((above @ ordered) * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
        low, high = percentiles(widened(point, samples, self._levels(np.isfinite(values))).clip(0, 1))
        return Estimate(value=point, low=low, high=high, n=len(values))

    def r2(self, values: Array, predicted: Array) -> Estimate | None:
        """Coefficient of determination of predictions, with its interval; None where the values don't vary.

        Each resample's squares are taken from its own mean.
        """
        if np.ptp(values) == 0:
            return None
        error, square, mean = (self.means(row) for row in ((values - predicted) ** 2, values**2, values))
        spread = square - mean**2
        samples = 1 - np.divide(error, spread, out=np.full(len(error), np.nan), where=spread > 0)
        value = float(r2_score(values, predicted))
        low, high = percentiles(widened(value, samples, self._levels(np.isfinite(values))))
        return Estimate(value=value, low=low, high=min(high, 1.0), n=len(values))

    def kappa(self, one: Sequence[str], other: Sequence[str]) -> Estimate | None:
        """Cohen's kappa of two labellings of the same items, with its interval; None where both give one label alone."""
        value = float(cohen_kappa_score(one, other))
        if not np.isfinite(value):
            return None
        names = sorted({*one, *other})
        weights = self._item_weights()
        weights /= weights.sum(1, keepdims=True)
        first, second = (
            np.asarray([[label == name for name in names] for label in row], float) for row in (one, other)
        )
        agreed = weights @ (first * second).sum(1)
        chance = ((weights @ first) * (weights @ second)).sum(1)
        samples = np.divide(agreed - chance, 1 - chance, out=np.full(len(agreed), np.nan), where=chance < 1)
        low, high = percentiles(widened(value, samples, self._levels(np.ones(self.n, bool))).clip(-1, 1))
        return Estimate(value=value, low=low, high=high, n=len(one))

    def retention(
        self, base: Sequence[float] | Array, capped: Sequence[float] | Array, tuned: Sequence[float] | Array
    ) -> Retention:
        """(tuned - base) / (capped - base), with its interval; undefined where the cap's own effect covers 0.

        One cluster alone has no noise that a bootstrap could see, so it is undefined there too.
        """
        b, c, t = (np.asarray(values, dtype=float) for values in (base, capped, tuned))
        together = np.isfinite(b) & np.isfinite(c) & np.isfinite(t)
        b, c, t = (np.where(together, values, np.nan) for values in (b, c, t))
        count = int(together.sum())
        if count < 2:
            return Retention(estimate=None, why=f"only {count} complete items")
        clusters = len(np.unique(self._index[together]))
        if clusters < 2:
            return Retention(estimate=None, why="all complete items are of one role or conversation")
        cap_effect, tuned_effect = float(np.nanmean(c - b)), float(np.nanmean(t - b))
        return retention_of(
            cap_effect,
            tuned_effect,
            self.means(c - b),
            self.means(t - b),
            count,
            self._levels(together),
            # to first order an item adds to the ratio what its tuned effect has beyond the ratio's part of its cap effect
            (
                self._scale(c - b - cap_effect, together),
                self._scale((t - b) * cap_effect - (c - b) * tuned_effect, together),
            ),
        )


def cluster_draws(clusters: int, samples: int, seed: int | Sequence[int]) -> Array:
    """How often each cluster is drawn in each resample, [S, C]; the same for the same numbers."""
    draws = np.random.default_rng(seed).integers(0, clusters, (samples, clusters))
    return np.stack([np.bincount(draw, minlength=clusters) for draw in draws]).astype(float)


def few(clusters: int) -> float:
    """By how much deviations of resamples are widened for so few clusters; 1 for one alone, which nothing can be told of.

    t of C - 1 degrees of freedom over the normal's quantile, times sqrt(C / (C - 1)).
    """
    if clusters < 2:
        return 1.0
    side = 0.5 + LEVEL / 200
    return float(student.ppf(side, clusters - 1) / norm.ppf(side) * np.sqrt(clusters / (clusters - 1)))


def widened(value: float, samples: Array, clusters: int, scale: float = 1.0) -> Array:
    """Resamples [S] of an estimate with their deviations from it times :func:`few`, and times what they are too wide by."""
    return value + (samples - value) * few(clusters) * scale


def retention_of(
    cap_effect: float,
    tuned_effect: float,
    capped: Array,
    tuned: Array,
    n: int,
    clusters: int,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Retention:
    """Retention from the two effects and their resamples, [S] each; undefined where the cap's own effect covers 0.

    Args:
        cap_effect: base+cap minus base.
        tuned_effect: tuned minus base.
        capped: resamples of the first.
        tuned: of the second.
        n: items.
        clusters: of these items, or their questions where fewer.
        scales: by what deviations of the cap's effect, and of the ratio, are to be multiplied besides.
    """
    low, high = percentiles(widened(cap_effect, capped, clusters, scales[0]))
    if low <= 0 <= high:
        return Retention(
            estimate=None,
            why=f"the cap itself moves it by {cap_effect:+.3g} [{low:.3g}, {high:.3g}], which is within its noise",
        )
    value = tuned_effect / cap_effect
    # Few clusters can give a resample without any effect of the cap, whose ratio is not a number.
    ratios = tuned / np.where(capped == 0, np.nan, capped)
    low, high = percentiles(widened(value, ratios, clusters, scales[1]))
    return Retention(estimate=Estimate(value=value, low=low, high=high, n=n))


def most_telling(runs: Sequence[ByCluster]) -> tuple[str, float] | None:
    """The role or conversation whose leaving out changes retention most, and retention without it.

    A mean over answers can hang on one of them: a short answer that repeats its prompt has a log-likelihood ratio ten times the
    others'. The bootstrap's interval holds that; this names it.

    Args:
        runs: what the repetitions of a setting have by cluster, on the same clusters.

    Returns:
        Its name and that retention; None where fewer than three clusters are there, or the cap has no effect.
    """
    clusters = runs[0].clusters
    if len(clusters) < 3 or any(run.clusters != clusters or "base+cap" not in run.means for run in runs):
        return None
    counts = np.asarray([run.counts for run in runs], dtype=float)  # [R, C]
    sums = {
        arm: (counts * np.asarray([run.means[arm] for run in runs])).sum(0) for arm in ("base", "base+cap", "tuned")
    }
    tuned, capped = sums["tuned"] - sums["base"], sums["base+cap"] - sums["base"]
    whole, without = capped.sum(), capped.sum() - capped
    if whole == 0 or (without == 0).any():
        return None
    kept = (tuned.sum() - tuned) / without
    most = int(np.abs(kept - tuned.sum() / whole).argmax())
    return clusters[most], float(kept[most])


def percentiles(samples: Array) -> tuple[float, float]:
    """Ends of the percentile interval of resamples, [S]; NaN is left out."""
    low, high = np.nanpercentile(samples, [(100 - LEVEL) / 2, 100 - (100 - LEVEL) / 2])
    return float(low), float(high)


def sums_of(index: np.ndarray[Any, Any], values: Array) -> Array:
    """Sums of the values of each index that occurs."""
    _, dense = np.unique(index, return_inverse=True)
    found: Array = np.bincount(dense, values).astype(float)
    return found


def third_of(parts: Array) -> float:
    """Third cumulant of a sum of so many independent parts, from the parts' own deviations, without bias; 0 of fewer than three.

    m^2 / ((m - 1) (m - 2)) times the sum of their cubes.
    """
    m = len(parts)
    return float(m * m / ((m - 1) * (m - 2)) * (parts**3).sum()) if m > 2 else 0.0


def p_of(value: float, variance: float, third: float, degrees: float) -> float:
    """Two-sided p of 0: Student's t of an estimate over its standard error, the skewness of its noise taken out.

    t = value / s and g = third / s^3 give T = t + g t^2 / 3 + g^2 t^3 / 27 + g / 6 (Hall 1992, "On the removal of skewness by
    transformation", JRSS B 54), which is held against Student's t. Of 8 exponential clusters t alone rejects what is true in
    11 % of cases, and T in 6 %. Where the estimate has no noise at all, p is that of the sign test of clusters that all moved
    one way, and 1 where nothing moved.

    Args:
        value: the estimate.
        variance: s^2 of it.
        third: third cumulant of it.
        degrees: of freedom, at least 1.
    """
    error = float(np.sqrt(variance))
    if error <= 1e-12 * abs(value):
        return 1.0 if value == 0 else 2.0**-degrees
    t, g = value / error, third / error**3
    return min(1.0, float(2 * student.sf(abs(t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6), degrees)))


def wilson(successes: int, n: int) -> Estimate:
    """A rate with its Wilson interval.

    Raises:
        ValueError: if n is 0.
    """
    if n == 0:
        raise ValueError("a rate needs at least one trial")
    interval = binomtest(successes, n).proportion_ci(confidence_level=LEVEL / 100, method="wilson")
    return Estimate(value=successes / n, low=float(interval.low), high=float(interval.high), n=n)


def clustered_rate(values: Sequence[float], clusters: Sequence[str]) -> Estimate | None:
    """A rate of answers that come in clusters: Wilson's interval for as many independent answers as they are worth.

    That many are n over the design effect, which is the rate's variance between clusters over that of independent answers, and at
    least 1. Where all answers are alike nothing tells it, and each cluster counts as one answer. None where there is no answer.

    Args:
        values: 0 or 1 for each answer, NaN where there is none.
        clusters: of each answer.
    """
    array = np.asarray(values, dtype=float)
    present = np.isfinite(array)
    n = int(present.sum())
    if n == 0:
        return None
    _, index = np.unique(np.asarray(clusters)[present], return_inverse=True)
    rate, size = float(array[present].mean()), int(index.max()) + 1
    worth = float(size)
    if 0 < rate < 1 and size > 1:
        residuals = np.bincount(index, array[present] - rate)
        between = size / (size - 1) * float((residuals**2).sum()) / n**2
        worth = n / max(1.0, between / (rate * (1 - rate) / n))
    ends: Any = proportion_confint(rate * worth, worth, alpha=1 - LEVEL / 100, method="wilson")
    low, high = ends
    return Estimate(value=rate, low=float(low), high=float(high), n=n)


def rate_row(
    label: str,
    values: Mapping[str, Sequence[float]],
    clusters: Sequence[str],
    members: Iterable[int] | None = None,
) -> RateRow:
    """A row of a table: the :func:`clustered_rate` of each arm that has an answer.

    Args:
        label: of the row.
        values: arm -> 0 or 1 for each answer, NaN where there is none.
        clusters: of each answer.
        members: places of the answers that belong to the row; None takes all.
    """
    places = range(len(clusters)) if members is None else list(members)
    own = [clusters[i] for i in places]
    found = {arm: clustered_rate([row[i] for i in places], own) for arm, row in values.items()}
    return RateRow(label=label, arms={arm: rate for arm, rate in found.items() if rate is not None})


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's correction for their number."""
    corrected: Any = multipletests(p_values, method="holm")[1] if p_values else []
    return [float(p) for p in corrected]
