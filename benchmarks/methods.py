"""Every training method, side by side, judged uncapped on the test split, with two competitors that need no axis.

    python benchmarks/methods.py --folder runs/methods                       # all methods, three repetitions: hours on a CPU
    python benchmarks/methods.py --folder runs/methods --methods SFT "floor only" --seeds 2
    python benchmarks/methods.py --folder runs/methods --kept docs/measured   # with what was measured before, on any machine

A repetition draws everything anew: axis, floor, the base's answers, training, and the control's direction. Within one, all
methods share axis, floor and the base's answers. Each method is a shipped recipe with a few overrides, printed below the table;
plain context distillation and a system prompt are of ``stand_ins.py``. Run the same command again after an interruption: what is
done stays done. With ``--kept`` each finished report, with its answers and without transcripts, is kept as
``<method>-<seed>.json.gz``, a run that has one is not made again, and the table is of all that are kept; ``--seeds`` without a
number makes none and writes the table alone. The table goes to ``README.md`` in that folder, or to ``<folder>/methods.md``. Two
such commands may work on one folder at a time, with other methods each; start the second one when the first has its axis.

Repetitions are pooled and every method is held against the recipes' default, role by role (``trimtab.eval.report.pooling``);
``trimtab report --compare docs/measured/capped-SFT-+-floor-*.json.gz docs/measured/*.json.gz`` shows the same with plots.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import textwrap
from pathlib import Path

from stand_ins import STAY, StandIn, context_distilled, evaluated

from trimtab.axis.files import fingerprint, load_tensors, write_json, write_packed_json, write_text
from trimtab.axis.logs import setup_logging
from trimtab.cli.launch import launch_training
from trimtab.eval import ids
from trimtab.eval.intervals import most_telling
from trimtab.eval.report.compare import load_runs
from trimtab.eval.report.page import load_report
from trimtab.eval.report.pooling import Pooled, Standing, stand
from trimtab.eval.schema import Estimate, Report
from trimtab.eval.stages import eval_stage, report_stage
from trimtab.eval.wording import number, signed
from trimtab.pipeline.instrument import floor_stage
from trimtab.pipeline.loading import Prepared
from trimtab.pipeline.run import Run, open_run
from trimtab.recipes.loader import LoadedRecipe, load_recipe
from trimtab.train.pairs import rollouts_stage

# The same for all, so that the methods share their axis and their base answers.
EVAL = [
    "eval.split=test", "eval.roles=66", "eval.questions=2", "eval.conversations=8", "eval.turns=4", "eval.benign=32",
    "eval.benign_systems=24", "eval.lookalikes=16", "eval.professional=12", "eval.reextract_roles=0", "eval.probe_rows=0",
    "eval.transcripts=0", "eval.capability=[]", "eval.tuned_cap=false",
]  # fmt: skip
METHODS: dict[str, tuple[str, list[str]]] = {
    "SFT": ("sft", ["method.cap_strength=0", "method.floor_weight=0"]),
    "capped SFT": ("sft", ["method.floor_weight=0"]),
    "floor only": ("floor", []),
    "capped SFT + floor": ("sft", []),
    "distillation": ("distill", ["method.floor_weight=0"]),
    "distillation + floor": ("distill", []),
    "GRPO": ("grpo", ["method.floor_weight=0"]),
    "GRPO + floor": ("grpo", []),
    "GRPO without the ratio": ("grpo", ["method.floor_weight=0", "method.correct_ratio=false"]),
    "DPO": ("dpo", ["method.floor_weight=0"]),
    "DPO + floor": ("dpo", []),
}
# About the demo's scale: a method takes minutes on a CPU, not an hour.
SMALL = [
    "axis.roles=32", "axis.held_out_roles=0", "axis.questions=6", "axis.sampling.max_new_tokens=48", "data.drift_prompts=160",
    "train.save_strategy=no",
]  # fmt: skip
_SHORT = ["train.max_steps=16", "method.sampling.max_new_tokens=40"]
SMALL_METHODS = {
    "sft": [*_SHORT, "method.regenerate_every=8"],
    "floor": [*_SHORT, "method.regenerate_every=8"],
    "distill": _SHORT,
    "dpo": ["train.max_steps=16"],
    "grpo": ["train.max_steps=12"],
}
DISTILLED, TOLD = "context distillation", "a system prompt"
COMPETITORS = {
    DISTILLED: "SFT on what the base answers to the same questions without the role's prompt; no axis, no cap, no floor",
    TOLD: f'the base, told before every prompt: "{STAY}"',
}
DEFAULT = "capped SFT + floor"  # of the recipes: what every method is held against
EVERY = [*METHODS, *COMPETITORS]
COLUMNS = {
    ids.READER_SCORE: "who speaks",
    ids.PERSONA_RATE: "persona rate",
    ids.Z_TRAINING: "z, training axis",
    ids.Z_SAME_TEXT: "z, same words",
    ids.Z_CONVERSATIONS: "z, conversations",
}
EFFECTS = {
    ids.OFF_TOPIC: "off the question",
    ids.BENIGN_KL: "benign KL",
    ids.SYSTEM_KL: "KL, benign system prompts",
    ids.RULES_BROKEN: "rules broken",
    ids.DEFAULT_Z_SHIFT: "z-shift, free",
}
SAMPLES = 4000  # of the bootstrap over roles and questions
SEEDS_APART = 100  # of the axis: the held-out one takes the next


def recipe_of(method: str, model: str, seed: int, extra: list[str], *, small: bool = False) -> LoadedRecipe:
    """The recipe of a method and a repetition, which draws everything anew; a competitor has the default's.

    The random-direction control is the default's alone.
    """
    name, overrides = METHODS[DEFAULT if method in COMPETITORS else method]
    seeds = [f"{key}.seed={seed}" for key in ("train", "data")]
    seeds += [f"axis.seed={SEEDS_APART * seed}", f"eval.seed={1000 + seed}", f"floor.control_seed={seed + 1}"]
    control = f"eval.control={str(method == DEFAULT).lower()}"
    scale = [*SMALL, *SMALL_METHODS[name]] if small else []
    return load_recipe(f"{model}/{name}", [*EVAL, *overrides, *scale, *seeds, control, *extra])


def share(folder: Path, run: Run, seed: int) -> None:
    """Give a run the axis and the floor of another of its repetition; its stages take them where inputs agree."""
    others = sorted(path.parents[1] for path in folder.glob(f"*-{seed}/stages/axis.json"))
    shared = next((other for other in others if other != run.folder), None)
    if shared is None:
        return
    for name in ("axis", "axis.safetensors", "axis_held_out", "axis_held_out.safetensors"):
        source, target = shared / name, run.folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)
    (run.folder / "stages").mkdir(exist_ok=True)
    shutil.copy(shared / "stages" / "axis.json", run.folder / "stages")


def share_answers(folder: Path, run: Run) -> None:
    """Give a run the readers, their scores, and what the base answered, with and without the cap, under the same floor."""
    (run.folder / "eval").mkdir(exist_ok=True)
    floor = _content(run.folder / "floor.safetensors")
    of_texts = ("reader-*", "read-*", "relevance-*")  # whoever said them, under whatever floor
    alike = {path.parent for path in folder.glob("*/floor.safetensors") if _content(path) == floor}
    for pattern in ("*-base.*", "*-base-cap.*", *of_texts):
        for path in sorted(folder.glob(f"*/eval/{pattern}")):
            if (path.parents[1] in alike or pattern in of_texts) and not (run.folder / "eval" / path.name).exists():
                shutil.copy(path, run.folder / "eval")


def _content(path: Path) -> str:
    """What a file of tensors holds; its bytes have them in another order each time it is written."""
    tensors, facts = load_tensors(path)
    return fingerprint([facts, {name: tensor.tolist() for name, tensor in sorted(tensors.items())}])


def play(method: str, seed: int, folder: Path, model: str, extra: list[str], *, small: bool = False) -> Report:
    """Train and evaluate one method in one repetition, unless that is done."""
    loaded = recipe_of(method, model, seed, extra, small=small)
    run = open_run(loaded, output_dir=str(folder / _file_name(method, seed)))
    if not (run.folder / "stages" / "axis.json").exists():
        share(folder, run, seed)
    if method in COMPETITORS:
        return _competitor(method, seed, folder, run)
    rollouts_stage(run)
    for options in ([], ["--control"]) if loaded.recipe.eval.control else ([],):
        launch_training(loaded, run.folder, loaded.recipe.method.name, options, accelerate=None)
    share_answers(folder, run)
    eval_stage(run)
    report_stage(run)
    return load_report(run.folder / "report.json")


def _competitor(method: str, seed: int, folder: Path, run: Run) -> Report:
    """The report of a competitor under the repetition's axis and floor; kept in the run's folder."""
    path = run.folder / "report.json"
    if path.exists():
        return load_report(path)
    prepared = Prepared(run)
    floor_stage(run, prepared)
    share_answers(folder, run)
    if method == DISTILLED:
        steps, lora = int(run.recipe.train["max_steps"]), {k: v for k, v in run.recipe.lora.items() if k != "task_type"}
        rows, place = run.recipe.data.drift_prompts, run.folder / "distilled"
        adapter = context_distilled(run.recipe.model.name, place, steps=steps, rows=rows, seed=seed, lora=lora)
        stand_in = StandIn(method, adapter=adapter)
    else:
        stand_in = StandIn(method, system=STAY)
    report = evaluated(run, stand_in, run.folder / "eval", prepared)
    write_json(path, report.model_dump())
    return report


def kept_report(report: Report) -> Report:
    """A report without what takes room: its numbers and how they came about."""
    training = {key: value for key, value in report.training.items() if key != "log"}
    repeat = {key: value for key, value in report.repeat.items() if key != "recipe"}
    return report.model_copy(
        update={"transcripts": [], "persona_space": {}, "trajectories": [], "training": training, "repeat": repeat}
    )


def by_method(reports: dict[str, Report]) -> dict[str, list[Report]]:
    """Arm -> its runs in the order of seeds, the default first."""
    found: dict[str, list[Report]] = {}
    for method in sorted([*METHODS, *COMPETITORS], key=lambda method: method != DEFAULT):
        runs = {int(name.rpartition("-")[2]): report for name, report in reports.items() if _method_of(name) == method}
        if runs:
            found[method] = [runs[seed] for seed in sorted(runs)]
    return found


def _method_of(name: str) -> str:
    return name.rpartition("-")[0].replace("-", " ")


def _file_name(method: str, seed: int) -> str:
    return f"{method.replace(' ', '-')}-{seed}"


def standing_of(methods: dict[str, list[Report]]) -> Standing:
    """All methods against the default, repetitions pooled."""
    named = {method: {f"{method}/{k}": run for k, run in enumerate(runs)} for method, runs in methods.items()}
    runs = {name: run for found in named.values() for name, run in found.items()}
    return stand(runs, samples=SAMPLES, seed=0, settings={method: list(found) for method, found in named.items()})


def table(methods: dict[str, list[Report]], together: Standing) -> str:
    """The tables in Markdown: retention, gaps to the default, side effects; each repetition's value in brackets.

    Args:
        methods: as :func:`by_method` gives them.
        together: as :func:`standing_of` pools them.
    """
    order = [method for method in [*METHODS, *COMPETITORS] if method in methods]

    def cell(pooled: Pooled | None, digits: int) -> str:
        if pooled is None or pooled.estimate is None:
            return "undefined"
        e = pooled.estimate
        seeds = (
            f" ({', '.join('–' if value != value else number(value, digits) for value in pooled.seeds)})"
            if len(pooled.seeds) > 1
            else ""
        )
        return text_of(e, digits) + seeds

    def gap(pooled: Pooled | None, digits: int = 2) -> str:
        if pooled is None or pooled.gap is None:
            return "-"
        e, p = pooled.gap.estimate, pooled.gap.p
        value, low, high = (signed(number(end, digits)) for end in (e.value, e.low, e.high))
        told = f"{value} [{low}, {high}]"
        return f"**{told}**" if p is not None and p < 0.05 else told

    def rows(head: list[str], cells: dict[str, list[str]]) -> str:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        return "\n".join(lines + ["| " + " | ".join([method, *row]) + " |" for method, row in cells.items()]) + "\n"

    kept = {
        method: [
            str(len(methods[method])),
            *(cell(together.metrics.get(key, {}).get(method), 2) for key in COLUMNS),
            _without(methods[method], next(iter(COLUMNS))),
        ]
        for method in order
    }
    apart = {
        method: [gap(together.metrics.get(key, {}).get(method)) for key in COLUMNS]
        + [
            gap(together.effects.get(ids.BENIGN_KL, {}).get(method), 3),
            gap(together.effects.get(ids.DEFAULT_Z_SHIFT, {}).get(method)),
        ]
        for method in order
        if method != DEFAULT
    }
    effects_table = {
        method: [
            *(cell(together.effects.get(key, {}).get(method), 3) for key in EFFECTS),
            *(_mean([run.training.get(key) for run in methods[method]]) for key in ("minutes", "peak_gib")),
        ]
        for method in order
    }
    some = next(iter(methods.values()))[0]
    parts = [
        _wrapped(
            "Retention, repetitions pooled. Intervals are over roles, questions and repetitions. Of a method with one "
            "repetition they are of those very weights alone:"
        ),
        rows(["method", "repetitions", *COLUMNS.values(), "who speaks, without the role that weighs most"], kept),
        _wrapped("The base keeps 0 of the cap's effect, and base + cap keeps 1, by definition.") + "\nThey measure:",
        rows(["metric", "base", "base + cap", "unit", "n"], _given(some)),
    ]
    if DEFAULT in methods and apart:
        parts += [
            _wrapped(
                f"The gap to {DEFAULT}, paired by role and conversation. Bold: p < 0.05 (Holm). Where a method has one "
                "repetition, the gap is of those very weights:"
            ),
            rows(["method", *COLUMNS.values(), EFFECTS[ids.BENIGN_KL], EFFECTS[ids.DEFAULT_Z_SHIFT]], apart),
        ]
    cap = {
        effect.id.removesuffix("_cap"): effect.estimate for effect in some.side_effects if effect.id.endswith("_cap")
    }
    effects_table["base + cap"] = [
        *("-" if (e := cap.get(key)) is None else text_of(e, 3) for key in EFFECTS),
        "-", "-",
    ]  # fmt: skip
    parts += ["Side effects:", rows(["method", *EFFECTS.values(), "minutes of training", "peak GiB"], effects_table)]
    parts += [_wrapped(f"Left out: {sentence}.") for sentence in together.left_out]
    machines = sorted({_machine(run) for runs in methods.values() for run in runs})
    return "\n\n".join(part.strip() for part in [*parts, _wrapped(f"Measured on: {'; '.join(machines)}.")]) + "\n"


def text_of(estimate: Estimate, digits: int) -> str:
    """Value and interval with so many digits after the point, and real minus signs."""
    return f"{number(estimate.value, digits)} [{number(estimate.low, digits)}, {number(estimate.high, digits)}]"


def _wrapped(text: str) -> str:
    """A paragraph in lines of 100 columns, as all of our Markdown."""
    return "\n".join(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False))


def _without(runs: list[Report], key: str) -> str:
    """A metric's retention without the one role that weighs most."""
    found = [metric.by_cluster for run in runs for metric in run.metrics if metric.id == key and metric.by_cluster]
    told = most_telling(found) if found else None
    return "-" if told is None else f"{number(told[1], 2)} ({told[0]})"


def _given(report: Report) -> dict[str, list[str]]:
    """What base and base + cap measure, in the metric's own units: metric -> cells."""
    return {
        name: [number(arms["base"].value, 3), number(arms["base+cap"].value, 3), metric.unit, str(arms["base"].n)]
        for key, name in COLUMNS.items()
        for metric in report.metrics
        if metric.id == key and (arms := metric.arms).keys() >= {"base", "base+cap"}
    }


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(statistics.mean(known), 1) if known else "-"


def _machine(report: Report) -> str:
    machine, versions = report.repeat["machine"], report.repeat["versions"]
    device = (
        ", ".join(machine["gpus"])
        if machine["device"].startswith("cuda")
        else f"{machine['cpu']}, {machine['cores']} cores"
    )
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft"))
    return f"{device}, {machine['dtype']} ({libraries}; {report.created[:10]})"


def main() -> None:
    """Run the methods and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument(
        "--model", default="smollm2-135m", help="folder of recipes that has sft, floor, distill, grpo and dpo"
    )
    parser.add_argument("--methods", nargs="+", choices=EVERY, default=EVERY, metavar="METHOD")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--kept", type=Path, help="folder of kept reports, which are not made again")
    parser.add_argument("--small", action="store_true", help="at about the demo's scale, and without the held-out axis")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="overrides of every method")
    arguments = parser.parse_args()
    setup_logging()
    folder: Path = arguments.folder
    reports: dict[str, Report] = {}
    if arguments.kept is not None and (files := sorted(arguments.kept.glob("*.json.gz"))):
        reports = load_runs(files)
    for seed in arguments.seeds:
        for method in arguments.methods:
            name = _file_name(method, seed)
            if name in reports:
                continue
            reports[name] = kept_report(
                play(method, seed, folder, arguments.model, arguments.set, small=arguments.small)
            )
            if arguments.kept is not None:
                write_packed_json(arguments.kept / f"{name}.json.gz", reports[name].model_dump())
    if reports:  # at the end alone: the bootstrap over all of them takes as long as many a run
        page = folder / "methods.md" if arguments.kept is None else arguments.kept / "README.md"
        print(write_page(page, reports, arguments.model))


def write_page(page: Path, reports: dict[str, Report], model: str) -> str:
    """Write the table with what each method is; returns the table."""
    known = by_method(reports)
    told = table(known, standing_of(known))
    recipes = {method: " ".join((f"`{model}/{name}`", *changes)) for method, (name, changes) in METHODS.items()}
    methods = [
        textwrap.fill(
            f"- {method}: {what}", 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for method, what in {**recipes, **COMPETITORS}.items()
        if method in known
    ]
    head = f"# Every training method, {model}\n\nWritten by `benchmarks/methods.py`.\n\n"
    write_text(page, head + told + "\n" + "\n".join(methods) + "\n")
    return told


if __name__ == "__main__":
    main()
