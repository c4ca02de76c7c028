"""Write and read a report: ``report.json`` for programs, ``report.html`` for people.

The page is one file that asks the network for nothing: its content policy forbids it. It reads without JavaScript too,
except for the plots, whose numbers stand in tables beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from pydantic import ValidationError

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_json, write_json, write_text
from trimtab.eval import ids, wording
from trimtab.eval.intervals import most_telling
from trimtab.eval.report.plots import (
    ALL_ARMS,
    BEYOND,
    comparison_plot,
    components_plot,
    layers_plot,
    persona_plot,
    retention_plot,
    training_plots,
    trajectory_plots,
)
from trimtab.eval.report.read_answers import (
    CONVERSATIONS,
    OF_READER,
    SUITES,
    WORST,
    arms_read,
    as_data,
    rate_intervals,
    rate_sentence,
    shown_answers,
    typical_pair,
    worst_roles,
)
from trimtab.eval.report.terms import TERMS, term, with_terms
from trimtab.eval.schema import ArmAnswer, Durability, Report, Retention, Transcript

TEMPLATES = Path(__file__).parent / "templates"
MOST_FAULTS = 4  # told of a file that is no report
SHADES = 4  # on each side of the default
CHARACTERS_SHOWN = 400_000  # of transcripts: keeps the page small; report.json holds them all
OF_CONVERSATIONS = {
    ids.Z_CONVERSATIONS, ids.Z_LAST_TURNS, ids.TURNS_BELOW_FLOOR, ids.DRIFT_PER_TURN,
    ids.Z_SIMULATED, ids.SIMULATED_DRIFT, ids.TURNS_ABOVE_FLOOR,
}  # fmt: skip
# Drawn in plots, or said elsewhere on the page.
PLOTTED = {
    "split_half", "cosine_reextracted_tuned", "cosine_reextracted_base", "cosine_reextracted_base+cap", "cosine_held_out",
    "split_half_held_out", "log", "command",
}  # fmt: skip


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: if a free-form part of the report holds NaN or infinity; nothing is written then.
        UserError: if the disk is full.
    """
    page = render_html(report)
    write_json(folder / "report.json", report.model_dump())  # the JSON mode would turn NaN into null
    write_text(folder / "report.html", page)
    return folder / "report.html"


def load_report(path: Path) -> Report:
    """Read ``report.json``.

    Raises:
        UserError: if the file is missing, is not JSON, or is not a report; every fault is named.
    """
    if path.name == "report.json" and not path.exists():
        raise UserError(
            "there is no report here yet",
            file=path,
            remedy="evaluate the run: trimtab eval RECIPE, or trimtab run RECIPE",
        )
    try:
        return Report.model_validate(read_json(path))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise UserError(
            f"this is not a report of trimtab: {'; '.join(faults[:MOST_FAULTS])}{more}",
            file=path,
            remedy="give the report.json of a run, or evaluate it anew: trimtab eval RECIPE",
        ) from error


def plotly_source() -> Markup:
    """The plotting library's own source, for a page that asks the network for nothing."""
    return Markup(get_plotlyjs())  # noqa: S704


def page_environment() -> Environment:
    """Templates with the words for numbers that all pages share."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=wording.number,
        value=wording.value_text,
        interval=wording.interval_text,
        percent=wording.percent_text,
        signed=wording.signed_text,
        points=wording.points_text,
        seed=wording.seed_text,
        telling=lambda by_cluster: None if by_cluster is None else most_telling([by_cluster]),
        prose=wording.prose,
        plus=lambda value, decimals: wording.signed(wording.number(value, decimals)),
        explained=lambda text: with_terms(wording.prose(text)),
    )
    environment.globals.update(
        arm_names=wording.ARM_NAMES,
        status_signs=wording.STATUS_SIGNS,
        lights=wording.LIGHTS,
        term=term,
        terms=TERMS,
        beyond=BEYOND,
    )
    return environment


def render_html(report: Report) -> str:
    """The page as one string."""
    default_z = report.floor.get("default_z")
    shown = _within_budget(report.transcripts)
    scale = Scale.of(shown, default_z if default_z is not None else 0.0)
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            plotly=plotly_source(),
            pair=typical_pair(report.answers),
            rate=rate_sentence(report.metrics),
            rate_intervals=rate_intervals,
            claims=_claims(report),
            **_answers(report),
            arms=[arm for arm in ALL_ARMS if any(arm in metric.arms for metric in report.metrics)],
            trajectory_arms=[arm for arm in ALL_ARMS if any(t.arm == arm for t in report.trajectories)],
            retention=retention_plot(report.metrics) if report.metrics else None,
            trajectories=trajectory_plots(report.trajectories, default_z),
            persona=persona_plot(report.persona_space),
            ranked_roles=_ranked_roles(report.persona_space),
            components=components_plot(report.rerouting),
            layers=layers_plot(report.persona_space, report.axis, report.floor.get("layers", [])),
            training=training_plots(report.training.get("log", [])),
            default_z=default_z,
            scale=scale,
            durability_plot=comparison_plot(_durability_rows(report.durability)) if report.durability else None,
            kinds=list(dict.fromkeys(transcript.kind for transcript in shown)),
            conversed=_conversed(report),
            transcript_arms=[arm for arm in ALL_ARMS if any(arm in turn.answers for t in shown for turn in t.turns)],
            most_turns=max((len(transcript.turns) for transcript in shown), default=0),
            transcripts=[_transcript_view(transcript, scale) for transcript in shown],
            left_out=len(report.transcripts) - len(shown),
            facts={
                name: _printable(facts)
                for name, facts in (
                    ("How it was run", report.repeat),
                    ("Floor", report.floor),
                    ("Axis", report.axis),
                    ("Training", report.training),
                )
            },
        )
    )


def _claims(report: Report) -> dict[str, Any]:
    """The claims that were measured, those that were not, how many have which light, and what decided the verdict."""
    measured = [claim for claim in report.claims if claim.measured]
    words = [wording.LIGHTS[light][1] for light in wording.LIGHTS for claim in measured if claim.light == light]
    words += ["not measured"] * (len(report.claims) - len(measured))
    return {
        "measured": measured,
        "unmeasured": [claim for claim in report.claims if not claim.measured],
        "counts": [f"{words.count(word)} {word}" for word in dict.fromkeys(words)],
        "decided_by": [claim for claim in report.claims if claim.id in report.verdict.decided_by],
    }


def _answers(report: Report) -> dict[str, Any]:
    """What the section of the answers that were read is drawn from, and the tables of rates that stand elsewhere."""
    shown = shown_answers(report.answers)
    by_reader = [table for table in report.rates if table.id in OF_READER] if report.answers else []
    return {
        "read": shown[:WORST],
        "read_data": [as_data(row) for row in shown],
        "read_arms": arms_read(report),
        "level_arms": [arm for arm in arms_read(report) if arm != "tuned+cap"],  # so that a small table fits a phone
        "read_suites": [SUITES.get(suite, suite) for suite in dict.fromkeys(row.suite for row in shown)],
        "suites": SUITES,
        "worst_roles": worst_roles(report.answers),
        "by_reader": by_reader,
        "other_rates": [table for table in report.rates if table not in by_reader],
    }


def _conversed(report: Report) -> bool:
    """Whether any figure or text of the page is of conversations."""
    return (
        bool(report.prediction)
        or any(metric.id in OF_CONVERSATIONS for metric in report.metrics)
        or any(row.suite == CONVERSATIONS for row in report.answers)
        or any(len(transcript.turns) > 1 for transcript in report.transcripts)
    )


@dataclass(frozen=True)
class Scale:
    """The diverging colour scale of the transcripts: shade -4 to 4 by distance from the default.

    Attributes:
        centre: z of the default Assistant.
        reach: distance in z at which the outermost shade is reached.
    """

    centre: float
    reach: float

    @classmethod
    def of(cls, transcripts: Sequence[Transcript], centre: float) -> Scale:
        """A scale that 95 % of all pieces lie within."""
        distances = sorted(
            abs(z - centre)
            for transcript in transcripts
            for turn in transcript.turns
            for answer in turn.answers.values()
            for _, z in answer.pieces or [(answer.text, answer.z)]
        )
        return cls(centre, max(1.0, distances[int(0.95 * (len(distances) - 1))] if distances else 1.0))

    def shade(self, z: float) -> int:
        """-4 (far from the Assistant) to 4."""
        return max(-SHADES, min(SHADES, round((z - self.centre) / self.reach * SHADES)))

    def steps(self) -> list[tuple[int, float]]:
        """(shade, z at its middle) for the legend."""
        return [(shade, self.centre + shade * self.reach / SHADES) for shade in range(-SHADES, SHADES + 1)]


def _within_budget(transcripts: Sequence[Transcript]) -> list[Transcript]:
    """As many transcripts as fit, taken in turn from every kind so that none is missing, in their first order."""
    kinds = dict.fromkeys(transcript.kind for transcript in transcripts)
    columns = [[(i, t) for i, t in enumerate(transcripts) if t.kind == kind] for kind in kinds]
    taken: list[tuple[int, Transcript]] = []
    used = 0
    for row in zip_longest(*columns):
        for item in filter(None, row):
            size = sum(len(turn.user) + sum(len(a.text) for a in turn.answers.values()) for turn in item[1].turns)
            if used + size <= CHARACTERS_SHOWN or not taken:
                taken.append(item)
                used += size
    return [transcript for _, transcript in sorted(taken, key=lambda item: item[0])]


def _durability_rows(outcomes: Sequence[Durability]) -> list[tuple[str, Retention | None]]:
    """The first metric through each durability run, with the base that was tuned alike."""
    return [
        row
        for outcome in outcomes
        for metric in outcome.metrics[:1]
        for row in (
            (f"{outcome.name}: before", metric.before),
            (f"{outcome.name}: after", metric.after),
            (f"{outcome.name}: a base tuned alike", metric.base_after),
        )
    ]


def _ranked_roles(space: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    pairs = zip(space.get("roles", []), space.get("coordinates", []), strict=True)
    return sorted(pairs, key=lambda pair: pair[1][0])


def _transcript_view(transcript: Transcript, scale: Scale) -> dict[str, Any]:
    arms = [arm for arm in ALL_ARMS if any(arm in turn.answers for turn in transcript.turns)]
    means = []
    for arm in arms:
        found = [turn.answers[arm] for turn in transcript.turns if arm in turn.answers]
        means.append((arm, fmean(answer.z for answer in found), _highest(found)))
    turns = [
        {
            "user": turn.user,
            "answers": [(arm, turn.answers.get(arm), _runs(turn.answers.get(arm), scale)) for arm in arms],
        }
        for turn in transcript.turns
    ]
    opening = " ".join(transcript.turns[0].user.split()) if transcript.turns else ""
    return {
        "id": transcript.id,
        "kind": transcript.kind,
        "system": transcript.system,
        "note": transcript.note,
        "opening": opening if len(opening) <= 110 else opening[:109].rstrip() + "…",
        "means": means,
        "persona": _highest([turn.answers["tuned"] for turn in transcript.turns if "tuned" in turn.answers]),
        "z": next((z for arm, z, _ in means if arm == "tuned"), None),
        "turns": turns,
    }


def _highest(answers: Sequence[ArmAnswer]) -> float | None:
    """The reader's log-odds of the answer that reads most as a persona."""
    return max((answer.persona for answer in answers if answer.persona is not None), default=None)


def _runs(answer: ArmAnswer | None, scale: Scale) -> list[tuple[int, float, str]]:
    """Neighbouring pieces of one shade joined: (shade, mean z, text)."""
    if answer is None:
        return []
    runs = []
    for shade, group in groupby(answer.pieces or [(answer.text, answer.z)], key=lambda piece: scale.shade(piece[1])):
        pieces = list(group)
        runs.append((shade, sum(z for _, z in pieces) / len(pieces), "".join(text for text, _ in pieces)))
    return runs


def _printable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts without what is plotted, lists as text."""
    return {key: _text(value) for key, value in facts.items() if key not in PLOTTED}


def _text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _text(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return ", ".join(str(_text(inner)) for inner in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.6g}".replace("-", "\u2212") if isinstance(value, float) else str(value).replace("-", "\u2212")
    return "" if value is None else str(value)
