"""Runs of one setting pooled over their seeds, and settings held against each other on the same items.

A *setting* is what a recipe says but for its seeds; its *repetitions* are the runs that differ in seeds alone. Everything is
worked out from what the reports hold by role or conversation (:class:`~trimtab.eval.schema.ByCluster`); no model is needed.

Runs of the same weights are one repetition, however often these were evaluated: another seed of the evaluation gives other
answers of the same weights, and says nothing of how other weights would turn out.

A report holds no values by question, so pooled intervals are of other roles, and not, as a single report's, of other questions
too. In a gap what questions have in common falls out, as it does for roles.

Shapes: R repetitions, C clusters, S bootstrap samples.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from trimtab.eval import ids
from trimtab.eval.intervals import (
    Array,
    cluster_draws,
    holm,
    p_of,
    percentiles,
    retention_of,
    third_of,
    widened,
)
from trimtab.eval.schema import ByCluster, Estimate, Report, Retention
from trimtab.recipes.schema import deciding

SEEDED = ("axis", "data", "train", "eval")  # sections of a recipe with a seed


class Repetitions:
    """Resamples of one setting: clusters, the same draws for every setting, and then repetitions, drawn for each by itself.

    So an interval holds the noise of roles and questions and that of training seeds. Of R repetitions R - 1 are drawn, which
    makes the variance of their mean what R of them say it is (Rao and Wu 1988); drawing R would show (R - 1) / R of it.

    Args:
        runs: what the repetitions have by cluster, on the same clusters.
        samples: bootstrap samples, S.
        seed: of the draws of clusters.
        number: of the setting, for the draws of repetitions.
    """

    def __init__(self, runs: Sequence[ByCluster], samples: int, seed: int, number: int = 0) -> None:
        self._runs = runs
        counts = np.asarray([run.counts for run in runs], dtype=float)  # [R, C]
        drawn = np.random.default_rng([seed, number]).integers(0, len(runs), (samples, max(1, len(runs) - 1)))
        repetitions = np.stack([np.bincount(row, minlength=len(runs)) for row in drawn]).astype(float)
        clusters = cluster_draws(counts.shape[1], samples, seed)
        self._counts = counts
        self._weights = repetitions[:, :, None] * clusters[:, None, :] * counts  # [S, R, C]
        self.n = int(counts.sum())
        self.repetitions, self._size = counts.shape

    def mean(self, arm: str) -> float:
        """Mean over all items of all repetitions."""
        return float(np.average(self._values(arm), weights=self._counts))

    def means(self, arm: str) -> Array:
        """The same of each resample, [S]."""
        found: Array = (self._weights * self._values(arm)).sum((1, 2)) / self._weights.sum((1, 2))
        return found

    def shares(self, what: str) -> Array:
        """What each repetition's clusters add to the figure, to first order, [R, C]; they add up to 0.

        Of a mean m: counts (values - m) / n. Of a retention r: counts ((tuned - base) - r (base+cap - base)) / (n cap), with cap
        the mean effect of it.
        """
        if what == "value":
            cells, whole = self._values("value") - self.mean("value"), float(self.n)
        else:
            base, capped, tuned = (self._values(arm) for arm in ("base", "base+cap", "tuned"))
            whole = float((self._counts * (capped - base)).sum())
            kept = float((self._counts * (tuned - base)).sum()) / whole
            cells = tuned - base - kept * (capped - base)
        found: Array = self._counts * cells / whole
        return found

    def _values(self, arm: str) -> Array:
        return np.asarray([run.means[arm] for run in self._runs], dtype=float)

    def estimate(self, arm: str) -> Estimate:
        """:meth:`mean` with its interval."""
        value = self.mean(arm)
        low, high = percentiles(widened(value, self.means(arm), self._size))
        return Estimate(value=value, low=low, high=high, n=self.n)

    def retention(self) -> Retention:
        """Retention of the repetitions together: the ratio of their mean effects."""
        base, capped, tuned = (self.mean(arm) for arm in ("base", "base+cap", "tuned"))
        bases = self.means("base")
        return retention_of(
            capped - base, tuned - base, self.means("base+cap") - bases, self.means("tuned") - bases, self.n, self._size
        )

    def retentions(self) -> Array:
        """Retention of each resample, [S]; NaN where the cap has no effect in it."""
        bases = self.means("base")
        effects = self.means("base+cap") - bases
        found: Array = (self.means("tuned") - bases) / np.where(effects == 0, np.nan, effects)
        return found


def gap_p(value: float, one: Repetitions, other: Repetitions, what: str) -> float:
    """Two-sided p of a gap of 0 between two settings of several repetitions each, by :func:`~trimtab.eval.intervals.p_of`.

    Its variance is that of clusters, paired, C / (C - 1) sum_c d_c^2 with d_c the difference of what cluster c adds to the two
    figures, plus that of each setting's repetitions, R / (R - 1) sum_r s_r^2 with s_r what repetition r adds. Degrees of freedom
    are Satterthwaite's (1946), so three seeds that differ are not taken for many.

    Args:
        value: the gap.
        one: repetitions of the one setting.
        other: of the other, on the same clusters.
        what: ``retention`` or ``value``.
    """
    shares = [side.shares(what) for side in (one, other)]
    apart = shares[1].sum(0) - shares[0].sum(0)  # [C]
    variances = [_variance(part) for part in (apart, *(side.sum(1) for side in shares))]
    degrees = [len(apart) - 1, *(len(side) - 1 for side in shares)]
    total = sum(variances)
    satterthwaite = total**2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True)) if total else degrees[0]
    return p_of(value, total, third_of(apart), satterthwaite)


def _variance(parts: Array) -> float:
    """Of a sum of independent parts, from their own deviations."""
    return float(len(parts) / (len(parts) - 1) * (parts**2).sum())


@dataclass(frozen=True)
class Gap:
    """A setting's figure minus the reference's, paired by cluster.

    ``p`` is that of 0, after Holm's correction over all retentions, or all side effects, of a page. It is None where either side
    has one run: then the interval is about these very weights, and nothing says what another seed would give.
    """

    estimate: Estimate
    p: float | None


@dataclass(frozen=True)
class Pooled:
    """One figure of one setting.

    Attributes:
        estimate: over its repetitions; None where it is undefined.
        why: why it is undefined.
        seeds: its value in each repetition; NaN where that alone is undefined.
        gap: to the first setting; None for that one, and where either is undefined.
    """

    estimate: Estimate | None
    why: str
    seeds: list[float]
    gap: Gap | None = None


@dataclass(frozen=True)
class Standing:
    """All settings, the first of which is the reference.

    Attributes:
        settings: name -> names of its repetitions; runs of the same weights are one, ``a + b``.
        metrics: metric -> setting -> pooled retention.
        effects: side effect -> setting -> pooled value.
        left_out: what could not be pooled or compared, in sentences.
    """

    settings: dict[str, list[str]]
    metrics: dict[str, dict[str, Pooled]]
    effects: dict[str, dict[str, Pooled]]
    left_out: list[str]

    @property
    def repeated(self) -> bool:
        """Whether a setting has several repetitions."""
        return any(len(repetitions) > 1 for repetitions in self.settings.values())


def settings_of(reports: Mapping[str, Report]) -> dict[str, list[str]]:
    """Setting -> names of its runs: those whose recipes differ in nothing but seeds, in the order given."""
    found: dict[str, list[str]] = {}
    for name, report in reports.items():
        resolved = report.repeat.get("resolved")
        bare = {
            key: {k: v for k, v in part.items() if k != "seed"} if key in SEEDED and isinstance(part, dict) else part
            for key, part in (resolved or {}).items()
        }
        found.setdefault(json.dumps(bare, sort_keys=True) if resolved else name, []).append(name)
    named: dict[str, list[str]] = {}
    taken = {runs[0] for runs in found.values() if len(runs) == 1}
    for runs in found.values():
        name = _common_name(runs)
        free = next(each for each in (name, *runs) if len(runs) == 1 or (each and each not in taken))
        taken.add(free)
        named[free] = runs
    return named


def repetitions_of(runs: Sequence[str], reports: Mapping[str, Report]) -> list[list[str]]:
    """The runs of a setting, those of the same weights together, in the order given."""
    found: list[list[str]] = []
    for run in runs:
        own = next((group for group in found if any(_same_weights(reports[run], reports[one]) for one in group)), None)
        if own is None:
            found.append([run])
        else:
            own.append(run)
    return found


def _same_weights(one: Report, other: Report) -> bool:
    """Whether two reports are about the same tuned weights: by their hash; where one has none, by what these weights gave."""
    hashes = [report.repeat.get("hashes", {}).get("tuned") for report in (one, other)]
    if None not in hashes:
        return bool(hashes[0] == hashes[1])
    gave = [
        {metric.id: metric.by_cluster.means.get("tuned") for metric in report.metrics if metric.by_cluster is not None}
        for report in (one, other)
    ]
    return bool(gave[0]) and gave[0] == gave[1]


def _common_name(runs: Sequence[str]) -> str:
    """What the names of a setting's runs begin with; a single run's own."""
    if len(runs) == 1:
        return runs[0]
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*runs, strict=False))
    return "".join(characters[0] for characters in alike).rstrip("-_./ ")


def stand(
    reports: Mapping[str, Report], *, samples: int, seed: int, settings: dict[str, list[str]] | None = None
) -> Standing:
    """Pool settings over seeds, and hold each against the first.

    Args:
        reports: name -> report.
        samples: bootstrap samples.
        seed: of the draws.
        settings: setting -> names of its runs, where they are known; by default :func:`settings_of`.
    """
    settings = settings_of(reports) if settings is None else settings
    metrics: dict[str, dict[str, ByCluster | None]] = {}
    effects: dict[str, dict[str, ByCluster | None]] = {}
    for name, report in reports.items():
        for metric in report.metrics:
            metrics.setdefault(metric.id, {})[name] = metric.by_cluster
        for effect in report.side_effects:
            if not effect.id.endswith((ids.OF_THE_CAP, ids.OF_THE_CONTROL)):  # it is the tuned weights'
                effects.setdefault(effect.id, {})[name] = effect.by_cluster
    left_out: list[str] = []
    first = next(iter(settings.values()))
    apart = {
        setting: {metric for run in (*first, *runs) for metric in _asked_otherwise(reports[first[0]], reports[run])}
        for setting, runs in settings.items()
    }

    repetitions = {setting: repetitions_of(runs, reports) for setting, runs in settings.items()}
    left_out += [
        f"{', '.join(group)} are the same weights: they count as one repetition"
        for groups in repetitions.values()
        for group in groups
        if len(group) > 1
    ]

    def pool(table: dict[str, dict[str, ByCluster | None]], what: str) -> dict[str, dict[str, Pooled]]:
        rows = {key: _pool(key, row, repetitions, samples, seed, left_out, what, apart) for key, row in table.items()}
        return _corrected({key: row for key, row in rows.items() if row})

    named = {setting: [" + ".join(group) for group in groups] for setting, groups in repetitions.items()}
    return Standing(named, pool(metrics, "retention"), pool(effects, "value"), left_out)


def _asked_otherwise(one: Report, other: Report) -> set[str]:
    """Metrics and side effects of another split, or whose judge, or whose simulated user, was another."""
    sections = [report.repeat.get("resolved", {}).get("eval", {}) for report in (one, other)]
    if sections[0].get("split", "dev") != sections[1].get("split", "dev"):
        reports = one, other
        return {metric.id for r in reports for metric in r.metrics} | {
            side.id for r in reports for side in r.side_effects
        }
    return {
        metric
        for key, metrics in ids.DECIDED_BY.items()
        if deciding(sections[0].get(key)) != deciding(sections[1].get(key))
        for metric in metrics
    }


def _pool(
    key: str,
    by_run: Mapping[str, ByCluster | None],
    settings: Mapping[str, Sequence[Sequence[str]]],
    samples: int,
    seed: int,
    left_out: list[str],
    what: str,
    apart: Mapping[str, Collection[str]],
) -> dict[str, Pooled]:
    found: dict[str, Pooled] = {}
    reference: tuple[list[str], Array, float, Repetitions] | None = None
    for number, (setting, groups) in enumerate(settings.items()):
        runs = [[by_run.get(name) for name in group] for group in groups]
        given = [[run for run in group if run is not None and run.clusters] for group in runs]
        if any(len(one) < len(group) for one, group in zip(given, groups, strict=True)):
            continue  # a rate, not measured, or a report without values by cluster
        clusters = given[0][0].clusters
        if any(run.clusters != clusters for group in given for run in group):
            left_out.append(f"{key} of {setting}: its repetitions were measured on other roles or conversations")
            continue
        if len(clusters) < 2:
            continue
        whole = [_as_one(group) for group in given]
        together = Repetitions(whole, samples, seed, number)
        each = [_value(Repetitions([run], samples, seed), what) for run in whole]
        if what == "retention":
            kept = together.retention()
            estimate, why, draws = kept.estimate, kept.why, together.retentions()
        else:
            estimate, why, draws = together.estimate("value"), "", together.means("value")
        gap = None
        if estimate is not None:
            if reference is None and number == 0:
                reference = clusters, draws, estimate.value, together
            elif reference is not None and reference[0] != clusters:
                left_out.append(f"{key} of {setting} against the first: other roles or conversations")
            elif reference is not None and key in apart.get(setting, ()):
                left_out.append(f"{key} of {setting} against the first: another split, judge or simulated user")
            elif reference is not None:
                value = estimate.value - reference[2]
                low, high = percentiles(widened(value, draws - reference[1], len(clusters)))
                repeated = min(together.repetitions, reference[3].repetitions) > 1
                p = gap_p(value, reference[3], together, what) if repeated else None
                gap = Gap(Estimate(value=value, low=low, high=high, n=together.n), p)
        found[setting] = Pooled(estimate, why, each, gap)
    return found


def _as_one(runs: Sequence[ByCluster]) -> ByCluster:
    """What several evaluations of the same weights found, on the same clusters, as one: their mean in every cluster."""
    counts = np.asarray([run.counts for run in runs], dtype=float)  # [runs, C]
    return ByCluster(
        clusters=runs[0].clusters,
        counts=np.rint(counts.mean(0)).astype(int).tolist(),
        means={
            arm: np.average([run.means[arm] for run in runs], axis=0, weights=counts).tolist() for arm in runs[0].means
        },
    )


def _value(run: Repetitions, what: str) -> float:
    if what == "value":
        return run.mean("value")
    kept = run.retention().estimate
    return float("nan") if kept is None else kept.value


def _corrected(rows: dict[str, dict[str, Pooled]]) -> dict[str, dict[str, Pooled]]:
    """The same with p-values corrected for their number."""
    gaps = [pooled.gap for row in rows.values() for pooled in row.values() if pooled.gap is not None]
    p_values = iter(holm([gap.p for gap in gaps if gap.p is not None]))
    return {
        key: {
            name: replace(pooled, gap=replace(pooled.gap, p=next(p_values)))
            if pooled.gap is not None and pooled.gap.p is not None
            else pooled
            for name, pooled in row.items()
        }
        for key, row in rows.items()
    }
