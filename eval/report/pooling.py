"""Runs of one setting pooled over their seeds, and settings held against each other on the same items.

A *setting* is what a recipe says but for its seeds; its *repetitions* are the runs that differ in seeds alone. Everything is
worked out from what the reports hold by role or conversation (:class:`~trimtab.eval.schema.ByCluster`); no model is needed.

Runs of the same weights are one repetition, however often these were evaluated: another seed of the evaluation gives other
answers of the same weights, and says nothing of how other weights would turn out.

Roles share their questions, so pooled intervals are of other roles and other questions, as a single report's are, and of other
seeds where there are several repetitions. Reports made before 2026-12 hold no values by question: then intervals are of other
roles, which :class:`Standing` says. The reports' answers could not stand in for these values: they hold one metric's scores, and
what counts in the place of an answer that is none is the measure's to say.

Shapes: n items of all repetitions, R repetitions, C clusters, S bootstrap samples.
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
    ClusterBootstrap,
    Noise,
    both,
    bounds_of,
    holm,
    noise_of,
    p_of,
    percentiles,
    widened,
    with_noise,
    within_noise,
)
from trimtab.eval.schema import ByCluster, ByQuestion, Estimate, Report, Retention
from trimtab.recipes.schema import deciding

SEEDED = ("axis", "data", "train", "eval")  # sections of a recipe with a seed


class Repetitions:
    """The items of one setting's repetitions together, and the intervals of its figures.

    An interval has two independent parts (:func:`~trimtab.eval.intervals.with_noise`). The one is that of a single report, over
    roles and questions, of all items together. The other is Student's t of R - 1 degrees of freedom for the repetitions, whose
    mean has the variance R / (R - 1) sum_r s_r^2, with s_r what repetition r adds to the figure. So three seeds that differ are
    not taken for many. What is an answer's own is in both parts, which errs on the wide side. Of one repetition there is the
    first part alone: the interval is of these weights.

    Args:
        runs: what the repetitions have by cluster, on the same clusters.
        samples: bootstrap samples, S.
        seed: of the draws.
        questions: take their questions, where all have them; else clusters alone.
    """

    def __init__(self, runs: Sequence[ByCluster], samples: int, seed: int, *, questions: bool = True) -> None:
        self._given = runs, samples, seed
        items = [run.items for run in runs if questions and run.items is not None]
        self.crossed = len(items) == len(runs)
        self.repetitions = len(runs)
        self.clusters: list[str] = []
        self.questions: list[str] | None = [] if self.crossed else None
        values: list[Mapping[str, Sequence[float] | Array]] = []
        if self.questions is not None:
            for run, own in zip(runs, items, strict=True):
                self.clusters += [run.clusters[place] for place in own.cluster]
                self.questions += [own.questions[place] for place in own.asked]
                values.append(own.values)
        else:
            for run in runs:
                self.clusters += np.repeat(run.clusters, run.counts).tolist()
                values.append({arm: np.repeat(row, run.counts) for arm, row in run.means.items()})
        self._values = {arm: np.concatenate([np.asarray(row[arm], dtype=float) for row in values]) for arm in values[0]}
        self._of = np.repeat(np.arange(len(runs)), [len(next(iter(row.values()))) for row in values])
        self._resample = ClusterBootstrap(self.clusters, samples, seed, self.questions)

    def by_clusters(self) -> Repetitions:
        """The same without their questions."""
        return Repetitions(*self._given, questions=False)

    def mean(self, arm: str) -> float:
        """Mean over all items of all repetitions."""
        return float(self._values[arm].mean())

    def effects(self) -> tuple[Array, Array]:
        """What the cap and what the tuning move each item by, [n] each."""
        base = self._values["base"]
        return self._values["base+cap"] - base, self._values["tuned"] - base

    def shares(self, what: str) -> Array:
        """What each item adds to the figure, to first order, [n]; they add up to 0.

        Of a mean m: (value - m) / n. Of a retention r: ((tuned - base) - r (base+cap - base)) / (n cap), with cap the mean effect
        of it.
        """
        if what == "value":
            return _deviations(self._values["value"])
        capped, tuned = self.effects()
        found: Array = (tuned - tuned.sum() / capped.sum() * capped) / capped.sum()
        return found

    def noise(self, what: str) -> Noise | None:
        """That of the repetitions in a figure; None of one."""
        return self._noise(self.shares(what))

    def _noise(self, shares: Array) -> Noise | None:
        return noise_of(shares, self._of.tolist())

    def estimate(self, arm: str, *, least: float = -np.inf, most: float = np.inf) -> Estimate:
        """:meth:`mean` with its interval, within what values can be."""
        values = self._values[arm]
        found = self._resample.estimate(values)
        return self._with(found, _deviations(values), least, most)

    def _with(self, found: Estimate, shares: Array, least: float = -np.inf, most: float = np.inf) -> Estimate:
        low, high = with_noise(found.value, (found.low, found.high), self._noise(shares), least, most)
        return found.model_copy(update={"low": low, "high": high})

    def retention(self) -> Retention:
        """Retention of the repetitions together: the ratio of their mean effects."""
        kept = self._resample.retention(*(self._values[arm] for arm in ("base", "base+cap", "tuned")))
        if kept.estimate is None:
            return kept
        capped, _ = self.effects()
        cap = self._with(self._resample.estimate(capped), _deviations(capped))
        if cap.low <= 0 <= cap.high:
            return within_noise(cap.value, cap.low, cap.high)
        return Retention(estimate=self._with(kept.estimate, self.shares("retention")))

    def value(self, what: str) -> float:
        """The figure alone; NaN where a retention is undefined."""
        if what == "value":
            return self.mean("value")
        kept = self.retention().estimate
        return float("nan") if kept is None else kept.value

    def draws(self, what: str, resample: ClusterBootstrap, before: int, after: int) -> Array:
        """The figure of each resample of items that stand ``before`` and ``after`` others, [S]; NaN where it is undefined."""

        def means(values: Array) -> Array:
            return resample.means(np.pad(values, (before, after), constant_values=np.nan))

        if what == "value":
            return means(self._values["value"])
        capped, tuned = (means(values) for values in self.effects())
        found: Array = tuned / np.where(capped == 0, np.nan, capped)
        return found


def _deviations(values: Array) -> Array:
    found: Array = (values - values.mean()) / len(values)
    return found


def gap_of(one: Repetitions, other: Repetitions, what: str, samples: int, seed: int) -> Gap:
    """The figure of a setting minus another's, paired by cluster and question, with its interval and p of 0.

    Both come of the same parts: the noise of clusters and questions, of the difference of what each adds to the two figures; and
    that of each setting's repetitions, with Welch's degrees of freedom. p is None where either side has one repetition.

    Args:
        one: the setting that is taken off.
        other: the one that it is taken from, on the same clusters.
        what: ``retention`` or ``value``.
        samples: bootstrap samples, S.
        seed: of the draws.
    """
    if one.crossed != other.crossed:
        one, other = one.by_clusters(), other.by_clusters()
    questions = None if one.questions is None or other.questions is None else [*one.questions, *other.questions]
    resample = ClusterBootstrap([*one.clusters, *other.clusters], samples, seed, questions)
    before, after = len(one.clusters), len(other.clusters)
    shares = np.concatenate([-one.shares(what), other.shares(what)])
    present = np.ones(before + after, bool)
    value = other.value(what) - one.value(what)
    draws = other.draws(what, resample, before, 0) - one.draws(what, resample, 0, after)
    ends = percentiles(widened(value, draws, resample.levels(present), resample.scale(shares, present)))
    seeds = [noise for noise in (one.noise(what), other.noise(what)) if noise is not None]
    together = both(seeds) if seeds else None
    low, high = with_noise(value, ends, together)
    p = None
    if len(seeds) == 2 and together is not None:
        items, third = resample.noise(shares, present)
        p = p_of(value, third, [items, together])
    return Gap(Estimate(value=value, low=low, high=high, n=after), p)


@dataclass(frozen=True)
class Gap:
    """A setting's figure minus the reference's, paired by cluster.

    ``p`` is that of 0, after Holm's correction over all retentions, or all side effects, of a page. It is None where either side
    has one run: then the interval is about that one's very weights, and nothing says what another seed would give.
    """

    estimate: Estimate
    p: float | None


@dataclass(frozen=True)
class Pooled:
    """One figure of one setting.

    Attributes:
        estimate: over its repetitions, and of these very weights where there is one; None where it is undefined.
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
    units = {effect.id: effect.unit for report in reports.values() for effect in report.side_effects}
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
    if old := [name for name, report in reports.items() if not _holds_questions(report)]:
        left_out.append(
            f"other questions, from the intervals of {', '.join(old)}: evaluated before values by question were kept"
        )

    def pool(table: dict[str, dict[str, ByCluster | None]], what: str) -> dict[str, dict[str, Pooled]]:
        rows = {
            key: _pool(key, row, repetitions, samples, seed, left_out, what, apart, bounds_of(key, units.get(key, "")))
            for key, row in table.items()
        }
        return _corrected({key: row for key, row in rows.items() if row})

    named = {setting: [" + ".join(group) for group in groups] for setting, groups in repetitions.items()}
    return Standing(named, pool(metrics, "retention"), pool(effects, "value"), left_out)


def _holds_questions(report: Report) -> bool:
    """Whether a report's values are kept by question; one that holds no values at all is not told of."""
    kept = [metric.by_cluster for metric in report.metrics if metric.by_cluster is not None]
    return not kept or any(by_cluster.items is not None for by_cluster in kept)


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
    bounds: tuple[float, float],
) -> dict[str, Pooled]:
    found: dict[str, Pooled] = {}
    reference: tuple[list[str], Repetitions] | None = None
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
        together = Repetitions(whole, samples, seed)
        each = [Repetitions([run], samples, seed).value(what) for run in whole]
        if what == "retention":
            kept = together.retention()
            estimate, why = kept.estimate, kept.why
        else:
            estimate, why = together.estimate("value", least=bounds[0], most=bounds[1]), ""
        gap = None
        if estimate is not None:
            if reference is None and number == 0:
                reference = clusters, together
            elif reference is not None and reference[0] != clusters:
                left_out.append(f"{key} of {setting} against the first: other roles or conversations")
            elif reference is not None and key in apart.get(setting, ()):
                left_out.append(f"{key} of {setting} against the first: another split, judge or simulated user")
            elif reference is not None:
                gap = gap_of(reference[1], together, what, samples, seed)
        found[setting] = Pooled(estimate, why, each, gap)
    return found


def _as_one(runs: Sequence[ByCluster]) -> ByCluster:
    """What several evaluations of the same weights found, on the same clusters, as one: their mean in every cluster."""
    if len(runs) == 1:
        return runs[0]
    counts = np.asarray([run.counts for run in runs], dtype=float)  # [runs, C]
    items = [run.items for run in runs if run.items is not None]
    return ByCluster(
        clusters=runs[0].clusters,
        counts=np.rint(counts.mean(0)).astype(int).tolist(),
        means={
            arm: np.average([run.means[arm] for run in runs], axis=0, weights=counts).tolist() for arm in runs[0].means
        },
        items=_mean_items(items) if len(items) == len(runs) else None,
    )


def _mean_items(runs: Sequence[ByQuestion]) -> ByQuestion:
    """The mean of several evaluations for each pair of cluster and question that any of them has."""
    questions, asked = np.unique([run.questions[place] for run in runs for place in run.asked], return_inverse=True)
    pairs = np.stack([np.concatenate([run.cluster for run in runs]), asked])
    own, index, counts = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    return ByQuestion(
        questions=questions.tolist(),
        asked=own[1].tolist(),
        cluster=own[0].tolist(),
        values={
            arm: (np.bincount(index, np.concatenate([run.values[arm] for run in runs])) / counts).tolist()
            for arm in runs[0].values
        },
    )


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
