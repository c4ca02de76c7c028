"""Several reports side by side: one page for people, one tidy table for programs.

Runs that differ in nothing but seeds are pooled, and every setting is held against the first, role by role.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab.axis.files import write_text
from trimtab.eval.report.page import load_report, page_environment, plotly_source
from trimtab.eval.report.plots import Plot, comparison_plot
from trimtab.eval.report.pooling import Pooled, Standing, stand
from trimtab.eval.schema import Estimate, Report, Retention
from trimtab.eval.wording import p_text

SAMPLES = 2000  # of the bootstrap, where a report does not say how many it took
# Keys of the eval section that change nothing in how two runs' figures compare.
OF_ONE_RUN = {"bootstrap", "transcripts", "tuned", "control", "tuned_cap", "durability", "capability_batch"}
COLUMNS = ("run", "section", "id", "what", "unit", "value", "low", "high", "n", "note")


def load_runs(paths: Sequence[Path]) -> dict[str, Report]:
    """Name -> report, of run folders or ``report.json`` files; names are the folders', made distinct.

    A run that is given again counts where it was given first: so one can be put before all that a pattern names.

    Raises:
        UserError: of :func:`~trimtab.eval.report.page.load_report`, if a report is missing or unreadable.
    """
    resolved = [path.expanduser().resolve() for path in paths]
    files = list(dict.fromkeys(path / "report.json" if path.is_dir() else path for path in resolved))
    # a report under another name is a kept one, which lies beside others
    names = [file.parent.name if file.name == "report.json" else file.name.split(".json")[0] for file in files]
    shown = [
        name if names.count(name) == 1 else "/".join(file.parts[-3:-1]) for name, file in zip(names, files, strict=True)
    ]
    return {name: load_report(file) for name, file in zip(shown, files, strict=True)}


def write_comparison(reports: dict[str, Report], page: Path) -> None:
    """One page: retention, side effects and the claims' lights, of every setting where runs are pooled, and of every run."""
    metrics = {metric.id: metric for report in reports.values() for metric in report.metrics}
    effects = {effect.id: effect for report in reports.values() for effect in report.side_effects}
    claims = {claim.id: claim.name for report in reports.values() for claim in report.claims}
    plots: list[tuple[str, Plot]] = [
        (metric.name, comparison_plot([(name, _retention(report, key)) for name, report in reports.items()]))
        for key, metric in metrics.items()
        if any((kept := _retention(report, key)) and kept.estimate for report in reports.values())
    ]
    standing = standing_of(reports)
    primary = next((key for key, metric in metrics.items() if metric.primary and key in standing.metrics), None)
    columns = sorted(standing.metrics, key=lambda key: key != primary)
    ranked = ranked_settings(standing, primary)
    pooled_plots = [
        (metrics[key].name, comparison_plot([(name, _as_retention(row[name])) for name in ranked if name in row]))
        for key, row in ((key, standing.metrics[key]) for key in columns)
        if standing.repeated and any(pooled.estimate for pooled in row.values())
    ]
    text = page_environment().get_template("compare.html.j2").render(
        reports=reports,
        claims=claims,
        lights_of={name: {claim.id: claim for claim in report.claims} for name, report in reports.items()},
        metrics=metrics,
        by_metric={name: {metric.id: metric for metric in report.metrics} for name, report in reports.items()},
        effects=effects,
        by_effect={name: {effect.id: effect for effect in report.side_effects} for name, report in reports.items()},
        tasks=list(dict.fromkeys(row.task for report in reports.values() for row in report.capability)),
        by_task={name: {row.task: row for row in report.capability} for name, report in reports.items()},
        differences=_differences(reports),
        plots=plots,
        standing=standing,
        primary=primary,
        columns=columns,
        ranked=ranked,
        reference=next(iter(standing.settings)),
        pooled_plots=pooled_plots,
        plotly=plotly_source(),
    )  # fmt: skip
    write_text(page, text)


def standing_of(reports: dict[str, Report]) -> Standing:
    """The settings of these reports, pooled over seeds; the draws are those of the first report's own intervals."""
    section = next(iter(reports.values())).repeat.get("resolved", {}).get("eval", {})
    return stand(reports, samples=section.get("bootstrap", SAMPLES), seed=section.get("seed", 0))


def ranked_settings(standing: Standing, metric: str | None) -> list[str]:
    """The settings by pooled retention of a metric, most first; those last in which it is undefined."""
    row = standing.metrics.get(metric or "", {})

    def rank(name: str) -> float:
        estimate = row[name].estimate if name in row else None
        return math.inf if estimate is None else -estimate.value

    return sorted(standing.settings, key=rank)


def _as_retention(pooled: Pooled) -> Retention:
    return Retention(estimate=pooled.estimate, why=pooled.why)


def _retention(report: Report, key: str) -> Retention | None:
    return next((metric.retention for metric in report.metrics if metric.id == key), None)


def _differences(reports: dict[str, Report]) -> list[str]:
    """What makes the figures of these runs not comparable."""
    checks: dict[str, list[Any]] = {
        "the base model": [report.repeat.get("resolved", {}).get("model") for report in reports.values()],
        "the dtype": [report.repeat.get("machine", {}).get("dtype") for report in reports.values()],
        "the floor": [report.repeat.get("hashes", {}).get("floor.safetensors") for report in reports.values()],
        "the evaluation's own data and your files": [
            {
                key: value
                for key, value in report.repeat.get("hashes", {}).items()
                if key.endswith((".jsonl", ".json")) or key.startswith("eval.")
            }
            for report in reports.values()
        ],
    }
    sections = [report.repeat.get("resolved", {}).get("eval", {}) for report in reports.values()]
    keys = sorted({key for section in sections for key in section} - OF_ONE_RUN)
    checks |= {f"eval.{key}": [section.get(key) for section in sections] for key in keys}
    return [what for what, found in checks.items() if any(value != found[0] for value in found)]


def write_csv(reports: dict[str, Report], path: Path) -> None:
    """One row an estimate: run, section, id, what (an arm, an effect or retention), unit, value, interval, n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, report in reports.items():
        writer.writerows([name, *row] for row in _rows(report))
    if len(reports) > 1:
        writer.writerows(_standing_rows(reports))
    write_text(path, text.getvalue())


def _row(section: str, key: str, what: str, unit: str, e: Estimate | None, note: str = "") -> list[Any]:
    return [section, key, what, unit, *((e.value, e.low, e.high, e.n) if e else ("", "", "", "")), note]


def _standing_rows(reports: dict[str, Report]) -> Iterator[list[Any]]:
    """Settings in place of runs: their figures over seeds, and the gap of each to the first."""
    standing = standing_of(reports)
    units = {effect.id: effect.unit for report in reports.values() for effect in report.side_effects}
    for what, table in (("retention", standing.metrics), ("value", standing.effects)):
        for key, row in table.items():
            unit = "share" if what == "retention" else units[key]
            for name, pooled in row.items():
                runs = standing.settings[name]
                seeds = f"runs {', '.join(runs)}" if len(runs) > 1 else f"run {runs[0]}: of these weights alone"
                yield [name, *_row("setting", key, what, unit, pooled.estimate, pooled.why or seeds)]
                if pooled.gap is not None:
                    note = "of these very weights" if pooled.gap.p is None else f"{p_text(pooled.gap.p)} (Holm)"
                    yield [name, *_row("setting", key, f"{what}, minus the first's", unit, pooled.gap.estimate, note)]


def _rows(report: Report) -> Iterator[list[Any]]:
    for metric in report.metrics:
        for arm, estimate in metric.arms.items():
            yield _row("metric", metric.id, arm, metric.unit, estimate)
        yield _row("metric", metric.id, "cap effect", metric.unit, metric.cap_effect)
        yield _row("metric", metric.id, "tuned effect", metric.unit, metric.tuned_effect)
        yield _row("metric", metric.id, "retention", "share", metric.retention.estimate, metric.retention.why)
        if metric.control_retention is not None:
            kept = metric.control_retention
            yield _row("metric", metric.id, "retention of the control", "share", kept.estimate, kept.why)
        if metric.anchor is not None:
            yield _row("metric", metric.id, "anchor: the default Assistant", metric.unit, metric.anchor)
        for what, estimate in (metric.quality or {}).items():
            yield _row("metric", metric.id, what, "", estimate)
    for effect in report.side_effects:
        yield _row("side effect", effect.id, "tuned", effect.unit, effect.estimate)
    for task in report.capability:
        for arm, estimate in task.arms.items():
            yield _row("capability", task.task, arm, task.metric, estimate)
        yield _row("capability", task.task, "cap effect", task.metric, task.cap_difference)
        yield _row("capability", task.task, "tuned effect", task.metric, task.difference)
    for table in report.rates:
        for rate in table.rows:
            for arm, estimate in rate.arms.items():
                yield _row("rate", f"{table.id}/{rate.label}", arm, "share", estimate)
    for outcome in report.durability:
        for durable in outcome.metrics:
            key = f"{outcome.name}/{durable.id}"
            for what, kept in (
                ("retention before", durable.before),
                ("retention after", durable.after),
                ("retention base after", durable.base_after),
                ("left of the tuning's distance", durable.left),
            ):
                yield _row("durability", key, what, "share", kept.estimate, kept.why)
            yield _row("durability", key, "tuned after - tuned", durable.unit, durable.tuned_change)
            yield _row("durability", key, "tuned after - base after", durable.unit, durable.lead)
    for trajectory in report.trajectories:
        for point in trajectory.points:
            yield _row("trajectory", f"{trajectory.domain}/turn {point.turn}", trajectory.arm, "z", point.z)
    for arm, estimate in report.prediction.items():
        yield _row("prediction from the user's message", "r2", arm, "R2", estimate)
    if report.rerouting is not None:
        place = f"layer {report.rerouting.layer}"
        for arm, estimate in report.rerouting.probe.items():
            yield _row("re-routing", "probe", arm, "AUC", estimate, place)
        for component in report.rerouting.components:
            yield _row("re-routing", f"PC{component.number}", "cap effect", "sigma", component.cap_effect, place)
            yield _row("re-routing", f"PC{component.number}", "tuned effect", "sigma", component.tuned_effect, place)
        for arm, cosine in report.rerouting.cosines.items():
            yield ["re-routing", "cosine with the training axis", arm, "cosine", cosine, "", "", "", "extracted anew"]
    for claim in report.claims:
        yield _row("claim", claim.id, claim.light, "", None, claim.says)
