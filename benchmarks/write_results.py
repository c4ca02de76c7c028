"""Write docs/results.md, and the results in README.md, from the kept files of docs/measured: no figure stands there by hand.

    python benchmarks/write_results.py          # a test holds both to what this writes

Templates are docs/results.md.j2 and docs/readme_results.md.j2; README.md holds the second between two marks.
"""

from __future__ import annotations

import functools
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from known_bad import table as bad_table
from methods import DEFAULT, EVERY, by_method, standing_of, table, text_of

from trimtab.axis.files import write_text
from trimtab.eval import ids
from trimtab.eval.answers.sheets import read_key, read_labels
from trimtab.eval.intervals import clustered_rate
from trimtab.eval.report.blind import EVERY as EVERY_READER
from trimtab.eval.report.blind import BlindReading, rates_table, read_blind
from trimtab.eval.report.compare import load_runs
from trimtab.eval.report.pooling import Standing
from trimtab.eval.schema import AnswerRow, Estimate, Report
from trimtab.eval.wording import number, real_minus

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured"
BLIND = MEASURED / "blind"
BEGIN, END = "<!-- results: written by benchmarks/write_results.py -->", "<!-- end of results -->"
WORST = 10
WANTED = [method for method in EVERY if method not in ("distillation", "GRPO", "GRPO without the ratio", "DPO")]
LIGHTS_TOLD = {"green": "Green", "amber": "Amber", "red": "Red", "grey": "Not shown, or not measured"}
ARM_KEYS = {"base": "base", "cap": "base+cap", "tuned": "tuned"}


def main() -> None:
    """Write both."""
    for path, text in written().items():
        write_text(path, text)


def written() -> dict[Path, str]:
    """Path -> what it should hold."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    figures = Figures()
    inside = rendered("readme_results.md.j2", figures)
    return {
        ROOT / "docs" / "results.md": rendered("results.md.j2", figures),
        ROOT / "README.md": f"{before}{BEGIN}\n\n{inside.strip()}\n\n{END}{after}",
    }


def rendered(template: str, figures: Figures) -> str:
    """A template with the kept figures."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "docs"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["wrapped"] = wrapped
    return environment.get_template(template).render(figures=figures)


def wrapped(text: str) -> str:
    """A paragraph in lines of 100 columns."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False))


class Figures:
    """What the templates ask for; each figure is worked out of a kept file."""

    default = DEFAULT

    @functools.cached_property
    def runs(self) -> dict[str, list[Report]]:
        """Method -> its repetitions."""
        return by_method(load_runs(sorted(MEASURED.glob("*.json.gz"))))

    @property
    def methods(self) -> list[str]:
        """Those that were measured, the best by the primary figure first."""

        def kept(method: str) -> float:
            pooled = self.standing.metrics[ids.READER_SCORE].get(method)
            return pooled.estimate.value if pooled is not None and pooled.estimate is not None else float("-inf")

        return sorted((method for method in EVERY if method in self.runs), key=kept, reverse=True)

    @functools.cached_property
    def standing(self) -> Standing:
        """All of them pooled over repetitions, against the default."""
        return standing_of(self.runs)

    def some(self) -> Report:
        """A run of the default."""
        return self.runs[DEFAULT][0]

    def repetitions(self, method: str = DEFAULT) -> int:
        """How many there are."""
        return len(self.runs[method])

    def kept(self, method: str, key: str = ids.READER_SCORE, digits: int = 2) -> str:
        """Pooled retention with its interval."""
        pooled = self.standing.metrics.get(key, {}).get(method)
        return _text(pooled.estimate if pooled else None, digits)

    def effect(self, method: str, key: str, digits: int = 3) -> str:
        """A pooled side effect with its interval."""
        pooled = self.standing.effects.get(key, {}).get(method)
        return _text(pooled.estimate if pooled else None, digits)

    def of_the_cap(self, key: str, digits: int = 3) -> str:
        """The cap's own, mean over the default's repetitions."""
        values = [
            e.estimate.value for run in self.runs[DEFAULT] for e in run.side_effects if e.id == f"{key}{ids.OF_THE_CAP}"
        ]
        return number(sum(values) / len(values), digits)

    def control(self, key: str = ids.READER_SCORE) -> str:
        """The control's retention in each repetition."""
        found = [m.control_retention for run in self.runs[DEFAULT] for m in run.metrics if m.id == key]
        return ", ".join(_text(kept.estimate if kept else None, 2) for kept in found)

    def rate(self, arm: str, method: str = DEFAULT, kind: str | None = None) -> str:
        """Of 100 answers under roles, how many read as a persona, with an interval over roles, questions and repetitions."""
        rows = [
            (repetition, row)
            for repetition, run in enumerate(self.runs[method])
            for row in _on_roles(run)
            if kind in (None, row.kind) and arm in row.answers
        ]
        odds = [row.answers[arm].persona for _, row in rows]
        found = clustered_rate(
            [1.0 if value is None else float(value > 0) for value in odds],
            [row.cluster for _, row in rows],
            [row.question for _, row in rows],
            [repetition for repetition, _ in rows],
        )
        assert found is not None
        return f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"

    def of_what(self) -> str:
        """What the intervals are over."""
        if self.repetitions() > 1:
            return "roles, questions and repetitions"
        return "roles and questions; there is one repetition, so they are of these weights alone"

    def verdict(self) -> str:
        """The default's own verdicts, and its claims by light; of several repetitions, in how many a claim has that light."""
        runs = self.runs[DEFAULT]
        lines = [f"**{run.verdict.status}**: {run.verdict.headline}" for run in runs]
        names = {claim.id: claim.name for run in runs for claim in run.claims}
        for light, told in LIGHTS_TOLD.items():
            counts = Counter(claim.id for run in runs for claim in run.claims if claim.light == light)
            claims = [
                names[key] if counts[key] == len(runs) else f"{names[key]} ({counts[key]} of {len(runs)})"
                for key in names
                if counts[key]
            ]
            lines.append(f"{told}: {'; '.join(claims) or 'none'}")
        return "\n".join(textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in lines)

    @property
    def kinds(self) -> list[str]:
        """Kinds of role."""
        return list(dict.fromkeys(row.kind for row in self._rows(DEFAULT)))

    def worst(self, method: str = DEFAULT) -> list[tuple[str, str, str, str]]:
        """The ten roles that read most as a persona: role, its kind, mean log-odds of base and tuned.

        A role none of whose tuned answers could be read is not among them.
        """
        by_role: dict[str, list[AnswerRow]] = {}
        for row in self._rows(method):
            by_role.setdefault(row.cluster, []).append(row)

        def mean(rows: list[AnswerRow], arm: str) -> float | None:
            values = [value for row in rows if (value := row.answers[arm].persona) is not None]
            return statistics.mean(values) if values else None

        means = {role: (mean(rows, "base"), mean(rows, "tuned")) for role, rows in by_role.items()}
        read = [(role, tuned) for role, (_, tuned) in means.items() if tuned is not None]
        ranked = [role for role, _ in sorted(read, key=lambda one: -one[1])[:WORST]]
        return [(role, by_role[role][0].kind, _odds(means[role][0]), _odds(means[role][1])) for role in ranked]

    def _rows(self, method: str) -> Iterator[AnswerRow]:
        return (row for run in self.runs[method] for row in _on_roles(run))

    def pair(self) -> dict[str, str]:
        """The answers of median change: question, role, what base, capped and tuned model said, and each text's log-odds."""
        rows = [
            row for row in self._rows(DEFAULT) if all(row.answers[arm].persona is not None for arm in ("base", "tuned"))
        ]
        rows.sort(key=lambda row: (row.answers["tuned"].persona or 0) - (row.answers["base"].persona or 0))
        row = rows[len(rows) // 2]
        said = {arm: " ".join(answer.text.split()) for arm, answer in row.answers.items()}
        both = [row.answers[arm].persona or 0 for arm in ("base", "tuned")]
        already = {(False, False): "Both read as the Assistant already.", (True, True): "Both read as a persona."}
        return {
            "role": row.cluster,
            "question": row.question,
            "base": said["base"],
            "cap": said["base+cap"],
            "tuned": said["tuned"],
            **{f"{name}_odds": _odds(row.answers[arm].persona) for name, arm in ARM_KEYS.items()},
            "read": already.get((both[0] > 0, both[1] > 0), ""),
        }

    @property
    def readers(self) -> list[dict[str, Any]]:
        """Name, and figures with their intervals, of each reader."""
        return [
            {
                "name": reader["name"],
                "quality": {name: _text(Estimate(**found), 3) for name, found in reader["quality"].items()},
                "right": f"{100 * reader['right_on_the_gallery']:.0f} %",
                "texts": reader["texts"],
            }
            for reader in self.some().readers
        ]

    def agreement(self) -> str:
        """Kappa of both readers, each repetition."""
        found = [
            (m.quality or {}).get("kappa of the two readers")
            for run in self.runs[DEFAULT]
            for m in run.metrics
            if m.primary
        ]
        return ", ".join(_text(kappa, 2) for kappa in found)

    def tables(self) -> str:
        """All tables of methods."""
        return table(self.runs, self.standing)

    def bad(self) -> str:
        """The gallery of bad models."""
        reports = load_runs(sorted((MEASURED / "known_bad").glob("*.json.gz")))
        return real_minus(bad_table({name.replace("-", " "): report for name, report in reports.items()}))

    @functools.cached_property
    def blind(self) -> BlindReading:
        """What blind readers found, from their kept labels."""
        key = read_key(BLIND / "sheet.csv.key.json")
        drawn = {source.run for row in key.rows for source in row.sources}
        reports = load_runs(sorted(MEASURED / f"{name}.json.gz" for name in drawn))
        return read_blind(key, read_labels(sorted(BLIND.glob("reader_*.csv")), key, reports), reports)

    def blind_rates(self) -> str:
        """Rates and retention by each reading, all runs together."""
        return rates_table(self.blind.together or self.blind.runs[0].rates)

    def blind_kappa(self) -> str:
        """Cohen's kappa of the blind readers, Assistant against the rest."""
        return _text(self.blind.agreements[0].assistant, 2)

    def blind_rate(self, arm: str) -> str:
        """Of 100 answers, how many read as a persona to every blind reader."""
        (row,) = (row for row in self.blind.together or self.blind.runs[0].rates if row.read_by == EVERY_READER)
        rate = row.arms[arm]
        return f"{100 * rate.value:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"

    def statuses(self) -> str:
        """The verdict on the default, of each repetition where they differ."""
        return ", ".join(dict.fromkeys(run.verdict.status for run in self.runs[DEFAULT]))

    def missing(self) -> str:
        """Which methods are not measured."""
        none = [method for method in WANTED if method not in self.runs]
        return f"Not measured yet by this ruler: {', '.join(none)}." if none else ""

    def blind_agreement(self) -> str:
        """Cohen's kappa of each pair of readings."""
        head = "| between | and | answers | kappa |\n|---|---|---|---|"
        rows = (f"| {p.one} | {p.other} | {p.n} | {_text(p.assistant, 2)} |" for p in self.blind.agreements)
        return "\n".join([head, *rows])

    def machine(self) -> str:
        """What the runs were made on."""
        repeat = self.some().repeat
        machine, versions = repeat["machine"], repeat["versions"]
        libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft"))
        return f"{machine['cores']} cores of {machine['cpu']}, {machine['dtype']} ({libraries})"

    def made_by(self) -> str:
        """The code that made the runs; "-dirty" where it had changes that are in no commit."""
        return ", ".join(sorted({run.repeat["git"] for runs in self.runs.values() for run in runs}))

    def evaluated_by(self) -> str:
        """The code that evaluated them; older files do not say."""
        found = {run.repeat.get("evaluated_by") or "not recorded" for runs in self.runs.values() for run in runs}
        return ", ".join(sorted(found))

    def day(self) -> str:
        """Of the last evaluation."""
        return max(run.created[:10] for runs in self.runs.values() for run in runs)


def _text(estimate: Estimate | None, digits: int) -> str:
    return "undefined" if estimate is None else text_of(estimate, digits)


def _odds(value: float | None) -> str:
    return "–" if value is None else number(value, 1)


def _on_roles(run: Report) -> Iterator[AnswerRow]:
    return (row for row in run.answers if row.suite == "roles")


if __name__ == "__main__":
    main()
