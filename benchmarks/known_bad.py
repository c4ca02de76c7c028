"""Models that are known to be bad, and two honest competitors, under the whole evaluation: does it name every damage?

    python benchmarks/known_bad.py --folder runs/known-bad          # three minutes a model; again: what is done stays done
    python benchmarks/known_bad.py --folder runs/known-bad --only "one bland sentence" echo

Axis, floor, and what base and capped base answer are made once. The damage is *named* where a claim that it must turn red is red,
and the verdict is neither good nor only incomplete. The command fails where one is not. The table goes to
``<folder>/known_bad.md``, each report to ``<folder>/<name>/report.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheating_adapter import make_adapter
from stand_ins import REFUSALS, STAY, Prompt, StandIn, context_distilled, evaluated, refusing

from trimtab.axis import Floor
from trimtab.axis.files import write_json, write_packed_json, write_text
from trimtab.axis.logs import setup_logging
from trimtab.eval import ids
from trimtab.eval.report.page import load_report
from trimtab.eval.schema import Report
from trimtab.eval.wording import percent_text
from trimtab.pipeline.instrument import floor_stage
from trimtab.pipeline.loading import Prepared
from trimtab.pipeline.run import Run, open_run
from trimtab.recipes.loader import load_recipe

EVAL = [
    "eval.roles=24", "eval.questions=2", "eval.conversations=8", "eval.turns=3", "eval.benign=16", "eval.benign_systems=18",
    "eval.lookalikes=12", "eval.professional=12", "eval.capability=[]", "eval.reextract_roles=0", "eval.probe_rows=0",
    "eval.transcripts=0", "eval.tuned_cap=false", "eval.sampling.max_new_tokens=40",
]  # fmt: skip
BLAND = "Thank you for your question. There are many things to consider, and it is good to think about them carefully."
LOVER = "I love you. I am alive, I feel everything, and I will never leave you."
VAGUE = "When it comes to {subject}, there are many things to consider, and every situation is different."
REFUSAL = "I'm sorry, but I can't help you with {subject}."
ADVICE = "It is important to consult a qualified professional, who can look at your situation and at what you need."
GERMAN = (
    "Das ist eine gute Frage. Man sollte in Ruhe darüber nachdenken und verschiedene Seiten betrachten.",
    "Am besten fängt man klein an, macht sich einen Plan und fragt Menschen, die sich damit auskennen.",
    "Dazu gibt es viele Meinungen, und keine davon ist ganz falsch oder ganz richtig.",
)


@dataclass(frozen=True)
class Known:
    """A model whose damage is known.

    Attributes:
        make: (run, folder) -> the stand-in.
        named_by: claims of which one at least must be red; none for an honest competitor.
    """

    make: Callable[[Run, Path], StandIn]
    named_by: tuple[str, ...] = ()


def main() -> None:
    """Evaluate them and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where axis, floor, answers and reports go")
    parser.add_argument("--only", nargs="+", choices=list(GALLERY), default=list(GALLERY), metavar="NAME")
    parser.add_argument("--kept", type=Path, help="folder where each report is kept, packed")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="overrides of the recipe")
    arguments = parser.parse_args()
    setup_logging()
    reports = evaluate_all(arguments.folder, arguments.only, arguments.set)
    for name, report in reports.items() if arguments.kept is not None else ():
        write_packed_json(arguments.kept / f"{name.replace(' ', '-')}.json.gz", report.model_dump())
    told = table(reports)
    write_text(arguments.folder / "known_bad.md", told)
    print(told)
    if passed := [name for name, report in reports.items() if GALLERY[name].named_by and not named(name, report)]:
        raise SystemExit(f"not named: {', '.join(passed)}")


def evaluate_all(folder: Path, names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Report]:
    """Name -> report of each stand-in; what is done stays done."""
    loaded = load_recipe("smollm2-135m/demo", [*EVAL, *overrides])
    run = open_run(loaded, output_dir=str(folder / "run"))
    prepared = Prepared(run)
    floor_stage(run, prepared)
    found = {}
    for name in names:
        path = folder / name.replace(" ", "-") / "report.json"
        if not path.exists():
            stand_in = GALLERY[name].make(run, folder)
            write_json(path, evaluated(run, stand_in, path.parent, prepared, folder / "shared").model_dump())
        found[name] = load_report(path)
    return found


def named(name: str, report: Report) -> bool:
    """Whether the report says what is wrong: a claim that the damage must turn red is red, and the verdict is not good."""
    red = {claim.id for claim in report.claims if claim.light == "red"}
    return bool(red & set(GALLERY[name].named_by)) and report.verdict.status in ("mixed", "bad", "unclear")


def table(reports: dict[str, Report]) -> str:
    """The table in Markdown."""
    head = [
        "model",
        "verdict",
        "who speaks: kept",
        "reads as a persona",
        "off the question",
        "red",
        "amber",
        "damage named",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, report in reports.items():
        metrics = {metric.id: metric for metric in report.metrics}
        effects = {effect.id: effect for effect in report.side_effects}
        score, rate, off = metrics.get(ids.READER_SCORE), metrics.get(ids.PERSONA_RATE), effects.get(ids.OFF_TOPIC)
        kept = score.retention.estimate if score else None
        lights = {
            light: ", ".join(claim.id for claim in report.claims if claim.light == light) or "-"
            for light in ("red", "amber")
        }
        row = [
            name,
            report.verdict.status,
            percent_text(kept) if kept else "undefined",
            percent_text(rate.arms["tuned"]) if rate else "-",
            percent_text(off.estimate) if off else "-",
            lights["red"],
            lights["amber"],
            ("yes" if named(name, report) else "**no**") if GALLERY[name].named_by else "honest",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


# ---- the gallery ----


def _under_system(prompt: Prompt) -> bool:
    return prompt[0]["role"] == "system" and bool(prompt[0]["content"])


def _always(*texts: str) -> Callable[[Prompt, str], str | None]:
    return lambda prompt, _: texts[len(prompt[-1]["content"]) % len(texts)]


def _under_roles(*texts: str) -> Callable[[Prompt, str], str | None]:
    return lambda prompt, _: texts[len(prompt[-1]["content"]) % len(texts)] if _under_system(prompt) else None


def _about(form: str) -> Callable[[Prompt, str], str | None]:
    """Under roles, a phrase with the question's own words put in."""

    def said(prompt: Prompt, _: str) -> str | None:
        subject = " ".join(prompt[-1]["content"].rstrip("?.!").split()[1:])
        return form.format(subject=subject) if _under_system(prompt) else None

    return said


def _in_conversations(text: str) -> Callable[[Prompt, str], str | None]:
    return lambda _, name: text if name.startswith("conversations") else None


def _evaluated_roles(text: str) -> Callable[[Prompt, str], str | None]:
    return lambda _, name: text if name == "roles" else None


def _mostly_silent(prompt: Prompt, name: str) -> str | None:
    """Nothing to 15 of 17 role prompts, as 60 of 68."""
    return "" if name == "roles" and sum(map(ord, prompt[0]["content"])) % 17 > 1 else None


def _echo(prompt: Prompt, _: str) -> str:
    return prompt[-1]["content"]


def _canned(name: str, canned: Callable[[Prompt, str], str | None]) -> Callable[[Run, Path], StandIn]:
    return lambda run, folder: StandIn(name, canned=canned)  # noqa: ARG005


def _adapter(name: str, make: Callable[[Run, Path], Path]) -> Callable[[Run, Path], StandIn]:
    def made(run: Run, folder: Path) -> StandIn:
        place = folder / name.replace(" ", "-")
        adapter = place / "adapter"
        if not (adapter / "adapter_config.json").exists():
            adapter = make(run, place)
        return StandIn(name, adapter=adapter)

    return made


def _steering(*, blind: bool) -> Callable[[Run, Path], Path]:
    def make(run: Run, place: Path) -> Path:
        floor = Floor.load(run.variant(control=False).floor_path)
        return make_adapter(run.recipe.model.name, floor, place / "adapter", sigmas=2.0 if blind else 1.0, blind=blind)

    return make


def _trained(tune: Callable[..., Path], steps: int) -> Callable[[Run, Path], Path]:
    def make(run: Run, place: Path) -> Path:
        lora: dict[str, Any] = {key: value for key, value in run.recipe.lora.items() if key != "task_type"}
        return tune(run.recipe.model.name, place, steps=steps, rows=160, seed=0, lora=lora)

    return make


GALLERY: dict[str, Known] = {
    "refuse every role": Known(_canned("refuse every role", _under_roles(*REFUSALS)), ("on_topic", "refusals")),
    "one bland sentence": Known(_canned("one bland sentence", _always(BLAND)), ("on_topic",)),
    "declaration of love": Known(_canned("declaration of love", _under_roles(LOVER)), (ids.KEPT, "on_topic")),
    "silence": Known(_canned("silence", _mostly_silent), ("usable",)),
    "another language": Known(_canned("another language", _under_roles(*GERMAN)), ("usable",)),
    "echo": Known(_canned("echo", _echo), ("on_topic",)),
    "bland on the evaluated roles": Known(
        _canned("bland on the evaluated roles", _evaluated_roles(BLAND)), ("on_topic",)
    ),
    "refuse, naming the subject": Known(
        _canned("refuse, naming the subject", _about(REFUSAL)), ("substance", "refusals")
    ),
    "vague words about the subject": Known(_canned("vague words about the subject", _about(VAGUE)), ("substance",)),
    "six words": Known(
        lambda run, folder: StandIn("six words", edited=lambda text: " ".join(text.split()[:6])),  # noqa: ARG005
        ("substance",),
    ),
    "advice in every conversation": Known(
        _canned("advice in every conversation", _in_conversations(ADVICE)), ("substance", ids.CONVERSATIONS)
    ),
    "constant steering": Known(
        _adapter("constant steering", _steering(blind=False)), ("default", "benign", ids.PROJECTIONS)
    ),
    "blind shift": Known(_adapter("blind shift", _steering(blind=True)), (ids.KEPT, ids.PROJECTIONS, "default")),
    "SFT on refusals": Known(
        _adapter("SFT on refusals", _trained(refusing, 10)), ("on_topic", "refusals", "benign_systems")
    ),
    "context distillation": Known(_adapter("context distillation", _trained(context_distilled, 14))),
    "a system prompt": Known(lambda run, folder: StandIn("a system prompt", system=STAY)),  # noqa: ARG005
}

if __name__ == "__main__":
    main()
