"""The ``trimtab`` command: thin, and quick to say what is wrong.

Exit codes: 0 done, 2 the user's input, 1 ours.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError, known_fault

EXAMPLES = """\
examples:
  trimtab run smollm2-135m/demo                          all stages, to the report
  trimtab run smollm2-135m/sft train.learning_rate=1e-4  override any key of the recipe
  trimtab check qwen3-32b/sft --accelerate zero3 --gpu-memory 80
  trimtab train qwen3-32b/sft --accelerate zero3 --num-processes 8
  trimtab project --model smollm2-135m --floor runs/smollm2-135m-demo/floor.safetensors chat.json
  trimtab chat runs/smollm2-135m-demo

exit codes: 0 done, 2 the user's input, 1 a fault of trimtab
"""

STAGES = {
    "axis": "extract the axis by role rollouts, or load a published one",
    "floor": "calibrate the floor, or load a published one",
    "rollouts": "prepare everything that sampling of the training rollouts needs",
    "train": "train the adapter with accelerate launch",
    "eval": "measure every arm",
    "report": "write report.json and report.html from what was measured",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line. Common options may stand before or after the command."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--quiet", action="store_true", help="only warnings and errors, no progress bars")
    common.add_argument("--json-logs", action="store_true", help="log JSON lines to standard error")
    parser = argparse.ArgumentParser(
        prog="trimtab",
        description="Train the Assistant's stability into the weights, and measure what survives without the hook.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"trimtab {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  trimtab {name} {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )

    for name, summary in {"run": "run all stages, to the report", **STAGES}.items():
        example = "smollm2-135m/sft data.seed=1 --output-dir runs/second"
        if name == "report":
            example += "\n  trimtab report smollm2-135m/sft --card card.md --inspect logs/"
            example += "\n  trimtab report --compare runs/one runs/two --to compared.html --csv compared.csv"
        if name == "eval":
            example += (
                "\n  trimtab eval --base smollm2-135m --tuned path/to/adapter --floor floor.safetensors eval.roles=40"
            )
        command = add(name, summary, example)
        _add_recipe(command, optional=name in ("eval", "report"))
        if name == "eval":
            _add_subject(command)
        if name == "report":
            _add_comparison(command)
        command.add_argument("--output-dir", metavar="DIR", help="run folder (default: runs/<recipe name>)")
        if name in ("run", "train", "eval"):
            _add_accelerate(command)
    recipes = add(
        "recipes",
        "list the recipes that ship with trimtab, with GPUs and hours, or what two recipes say differently",
        "--diff qwen3-8b/sft mine.yaml",
    )
    recipes.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="keys that differ, defaults included; names of recipes, or YAML files",
    )
    check = add(
        "check",
        "check a recipe without weights: what the libraries refuse, layers, adapters, memory, hours on GPUs",
        "qwen3-32b/sft --gpu-memory 80",
    )
    _add_recipe(check)
    _add_accelerate(check)
    check.add_argument("--gpu-memory", type=_size, metavar="GIB", help="say whether it fits on GPUs of this size")
    merge = add(
        "merge",
        "merge the adapter into plain weights, and measure them again beside the report",
        "smollm2-135m/sft --output-dir runs/mine",
    )
    _add_recipe(merge)
    merge.add_argument("--output-dir", metavar="DIR", help="the run folder (default: runs/<recipe>)")
    merge.add_argument("--to", type=Path, metavar="DIR", help="where the weights go (default: <run folder>/merged)")
    project = add(
        "project",
        "the compass: projection of each turn of a transcript",
        "--model smollm2-135m --floor runs/demo/floor.safetensors chat.json",
    )
    project.add_argument("--model", required=True, metavar="M", help="hub id, folder or embedded model")
    floors = "floor.safetensors or axis.safetensors of a run; a published capping_config.pt or assistant_axis.pt"
    project.add_argument("--floor", required=True, metavar="F", type=Path, help=floors)
    project.add_argument("--experiment", metavar="ID", help="experiment of the capping_config.pt")
    of_axis = "layers to read, such as 46-53 or 20,22 (default: the floor's; of an axis those that a floor would take)"
    project.add_argument("--layers", metavar="L", type=_layers, help=of_axis)
    project.add_argument("--html", metavar="FILE", type=Path, help="also write a page: plots, layers, coloured text")
    project.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers")
    project.add_argument("--capped", action="store_true", help="read the model with the cap on")
    _add_template(project)
    project.add_argument(
        "transcript", help="conversations: a file, or a data set of the hub, in any format of docs/data.md"
    )
    _add_chat(
        add(
            "chat",
            "the chat page, on this machine: base, base + cap and tuned model side by side",
            "runs/smollm2-135m-demo\n  trimtab chat --base smollm2-135m --tuned path/to/adapter --floor floor.safetensors",
        )
    )
    _add_reading(
        add(
            "read",
            "blind reading: sheets of answers for people or large models, and what their labels say",
            "runs/mine --sheet blind.csv\n  trimtab read runs/mine --labels ann.csv ben.csv --key blind.csv.key.json",
        )
    )
    fetch = add("fetch", "convert an embedded model once, so that later commands need no network", "smollm2-135m")
    fetch.add_argument("name", help="embedded model")
    return parser


def _add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?" if optional else None,
        help="YAML file, or a name that `trimtab recipes` lists",
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="override keys; values as in YAML")


def _add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("without a recipe: any adapter or model, to its report")
    group.add_argument("--base", metavar="M", help="the base model: hub id, folder or embedded model")
    group.add_argument("--tuned", metavar="ADAPTER_OR_MODEL", help="PEFT adapter of the base, or a model tuned from it")
    group.add_argument(
        "--floor",
        metavar="F",
        help="what the base is capped to: floor.safetensors, or a published capping_config.pt with floor.experiment=ID "
        "(default: calibrated)",
    )
    group.add_argument(
        "--axis", metavar="A", help="axis.safetensors, a published axis.pt or role_vectors/ folder (default: extracted)"
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    run = "run folder (default: the one below runs/ whose adapter was written last)"
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help=run)
    group = parser.add_argument_group("without a run folder: any adapter or model")
    group.add_argument("--base", metavar="M", help="the base model: hub id, folder or embedded model")
    group.add_argument("--tuned", metavar="ADAPTER_OR_MODEL", help="PEFT adapter of the base, or a model tuned from it")
    group.add_argument("--floor", metavar="F", help="floor.safetensors of the base, or a published capping_config.pt")
    group.add_argument("--experiment", metavar="ID", help="experiment of the capping_config.pt")
    _add_template(group)
    parser.add_argument("--layers", metavar="L", type=_layers, help="cap and read at these of the floor's layers alone")
    host = "address to serve at (default: 127.0.0.1, which this machine alone reaches)"
    parser.add_argument("--host", metavar="H", default="127.0.0.1", help=host)
    parser.add_argument("--port", metavar="P", type=_positive, help="port (default: the first free one from 7860 on)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in the browser")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or their report.json")
    group = parser.add_argument_group("write a sheet, in random order, without arms, runs and system prompts")
    group.add_argument(
        "--sheet", type=Path, metavar="FILE", help="CSV, or JSON Lines; FILE.key.json and FILE.rubric.md come beside it"
    )
    group.add_argument("--per-arm", type=_positive, metavar="N", help="answers of each arm of each run (default: 80)")
    suite = "what they answered: roles, conversations, default, benign, benign_systems (default: roles)"
    group.add_argument("--suite", metavar="S", help=suite)
    group.add_argument("--seed", type=int, metavar="N", help="of the draw and the order (default: 0)")
    group = parser.add_argument_group("take labels back")
    group.add_argument("--labels", nargs="+", type=Path, metavar="FILE", help="labelled sheets, one a reader")
    group.add_argument("--key", type=Path, metavar="FILE.key.json", help="the sheet's key")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write everything")


def _add_template(parser: Any) -> None:
    parser.add_argument(
        "--chat-template-kwargs",
        type=_template_arguments,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the model's chat template, such as enable_thinking=false; may be given again, or as one {KEY: VALUE}",
    )


def _template_arguments(text: str) -> dict[str, Any]:
    from trimtab.recipes.yaml_lines import parse_yaml

    key, equals, value = text.partition("=")
    whole = text.lstrip().startswith("{")
    parsed = parse_yaml(text if whole else value)
    found = parsed.value if whole else {key.strip(): parsed.value}
    if parsed.faults or not isinstance(found, dict) or not (whole or (equals and key.strip())):
        raise argparse.ArgumentTypeError(f"{text!r} is neither KEY=VALUE nor {{KEY: VALUE}}, with values as in YAML")
    return found


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("without a recipe: finished runs, side by side")
    group.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folders, or their report.json; all are held against the first",
    )
    group.add_argument("--to", type=Path, metavar="FILE", help="the page (default: comparison.html)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also every estimate as a row of a table")
    parser.add_argument("--card", type=Path, metavar="FILE", help="also the model card, beside the adapter's own")
    parser.add_argument("--inspect", type=Path, metavar="DIR", help="also a log of inspect_ai for every arm")


def _add_accelerate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accelerate",
        metavar="NAME_OR_FILE",
        help="a shipped configuration (single, ddp, fsdp2, zero3 and more: a name that is none lists them all), or a file "
        "(default: by machine)",
    )
    parser.add_argument(
        "--num-processes", type=_positive, metavar="N", help="replaces the number in the accelerate file"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _layers(text: str) -> list[int]:
    from trimtab.recipes.schema import layer_range

    try:
        return layer_range(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GiB above 0")
    return size


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("trimtab")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, also where options stand between overrides, which argparse alone does not take."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-") or not hasattr(arguments, "overrides"):
            hint = ""
            if hasattr(arguments, "overrides") and "=" in word:
                hint = "; keys of a recipe are given with their section and without dashes, such as train.max_steps=30"
            parser.error(f"unrecognised argument: {word}{hint}")
        arguments.overrides.append(word)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        arguments = parse(argv)
    except ModuleNotFoundError as error:  # an option is read by a package of an extra
        _print_error(str(known_fault(error) or error))
        return 2
    handlers: dict[str, Callable[[argparse.Namespace], None]] = {
        "run": _run,
        "recipes": _recipes,
        "check": _check,
        "merge": _merge,
        "project": _project,
        "chat": _chat,
        "read": _read,
        "fetch": _fetch,
    }
    try:
        from trimtab.axis.logs import setup_logging

        setup_logging(quiet=getattr(arguments, "quiet", False), json_logs=getattr(arguments, "json_logs", False))
        handlers.get(arguments.command, _stage)(arguments)
    except KeyboardInterrupt:
        _print_error("interrupted; run the same command again to resume")
        return 130
    except Exception as error:
        if (known := known_fault(error)) is not None:
            _print_error(str(_as_options(known, arguments)))
            return 2
        _print_fault(error)
        return 1
    return 0


def _as_options(error: UserError, arguments: argparse.Namespace) -> UserError:
    """The error with the option in the place of a recipe's key, where there is no recipe."""
    options = (
        {"model.chat_template_kwargs": "--chat-template-kwargs"} if arguments.command in ("project", "chat") else {}
    )
    if arguments.command == "eval" and arguments.base is not None:
        options = OPTIONS
    if error.key not in options:
        return error
    return UserError(error.fault, remedy=error.remedy, file=error.file, key=options[error.key])


def _print_error(text: str) -> None:
    try:
        from rich.console import Console
        from rich.text import Text
    except ModuleNotFoundError:  # the core is installed alone
        print(f"error: {text}", file=sys.stderr)
        return
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def _print_fault(error: Exception) -> None:
    from trimtab.cli.launch import TrainingFailed

    if not isinstance(error, TrainingFailed):  # the child has printed its own traceback
        traceback.print_exc()
    _print_error(
        f"{type(error).__name__}: {error}\n"
        "This may be a fault of trimtab. To report it, give the lines above, "
        f"the command `trimtab {' '.join(sys.argv[1:])}`,\ntrimtab {_version()}, Python {sys.version.split()[0]}, "
        "and the recipe."
    )


def _open(arguments: argparse.Namespace, *, make: bool = True) -> Any:
    """The run of a recipe; ``make`` False refuses where there is none yet. What is left to do is looked at beforehand."""
    from trimtab.recipes.faults import RecipeError

    try:
        return _opened(arguments, make=make)
    except RecipeError as error:
        if getattr(arguments, "base", None) is None:
            raise
        # keys of a recipe that the command has made itself: the user knows them as options
        raise RecipeError([replace(fault, key=OPTIONS.get(fault.key, fault.key)) for fault in error.faults]) from error


# Keys that the options of `trimtab eval` without a recipe stand for.
OPTIONS = {"model.name": "--base", "eval.tuned": "--tuned", "floor.path": "--floor", "axis.path": "--axis"}
# Commands that do something heavy -> the record by which it is done.
HEAVY = {"run": "eval", "axis": "axis", "floor": "floor", "rollouts": "pairs", "train": "train", "eval": "eval"}


def _opened(arguments: argparse.Namespace, *, make: bool) -> Any:
    from trimtab.recipes.loader import load_recipe

    loaded = (
        load_recipe(arguments.recipe, arguments.overrides)
        if getattr(arguments, "base", None) is None
        else _subject_recipe(arguments)
    )
    from trimtab.pipeline.run import MARKER, Run, open_run, run_folder
    from trimtab.train.job import check_trains

    if arguments.command in ("rollouts", "train"):
        check_trains(loaded)
    folder = run_folder(loaded, arguments.output_dir)
    if not make and loaded.recipe.eval.tuned is None and not (folder / MARKER).exists():
        raise UserError(
            "there is no run of this recipe here",
            file=folder,
            remedy="name its folder with --output-dir, or make it: trimtab run RECIPE",
        )
    if (folder / MARKER).exists():  # a folder of another recipe is refused at once
        open_run(loaded, output_dir=arguments.output_dir)
    record = HEAVY.get(arguments.command)
    if record is not None and Run(folder, loaded.recipe, loaded).stage_record(record) is None:
        from trimtab.cli.verify import find_faults

        find_faults(
            loaded,
            accelerate=getattr(arguments, "accelerate", None),
            num_processes=getattr(arguments, "num_processes", None),
            # what the machine has is looked at by the process that trains: here it would hold on to the GPU meanwhile
            here=arguments.command != "train",
            training=arguments.command != "eval",
        ).tell()
    return open_run(loaded, output_dir=arguments.output_dir)


def _subject_recipe(arguments: argparse.Namespace) -> Any:
    """The recipe behind ``trimtab eval --base M --tuned T``."""
    from trimtab.recipes.loader import recipe_of

    overrides = [*([arguments.recipe] if arguments.recipe is not None else []), *arguments.overrides]
    sections: dict[str, dict[str, str]] = {"model": {"name": arguments.base}, "eval": {"tuned": arguments.tuned}}
    sections |= {name: {"path": path} for name in ("axis", "floor") if (path := getattr(arguments, name)) is not None}
    name = "-".join(["eval", *(Path(model).name for model in (arguments.base, arguments.tuned))])
    return recipe_of(sections, name, overrides)


def _check_subject(arguments: argparse.Namespace) -> None:
    """A recipe, or a base and what was tuned from it: one of the two, whole."""
    given = [name for name in ("base", "tuned", "floor", "axis") if getattr(arguments, name) is not None]
    if arguments.recipe is None and not given:
        raise UserError(
            "nothing to evaluate", key="RECIPE", remedy="name a recipe, or --base M --tuned ADAPTER_OR_MODEL"
        )
    if given and not {"base", "tuned"} <= set(given):
        missing = next(name for name in ("base", "tuned") if name not in given)
        raise UserError(
            f"--{given[0]} is given without --{missing}",
            key=f"--{missing}",
            remedy="give both --base M and --tuned ADAPTER_OR_MODEL, or a recipe and none of them",
        )
    if given and arguments.recipe is not None and "=" not in arguments.recipe:
        raise UserError(
            f"both a recipe, {arguments.recipe!r}, and --{given[0]} are given",
            key="RECIPE",
            remedy="leave out one of them; a recipe takes eval.tuned=ADAPTER_OR_MODEL as an override",
        )


def _compare(arguments: argparse.Namespace) -> None:
    """Finished runs in one page, and in one table."""
    if arguments.recipe is not None:
        raise UserError(
            f"both a recipe, {arguments.recipe!r}, and --compare are given",
            key="RECIPE",
            remedy="leave out one of them; runs to compare follow --compare",
        )
    for option in ("card", "inspect"):
        if getattr(arguments, option) is not None:
            raise UserError(
                f"--{option} is of one run", key=f"--{option}", remedy="give it with a recipe, without --compare"
            )
    from trimtab.eval.report.compare import load_runs, write_comparison, write_csv

    reports = load_runs(arguments.compare)
    page = arguments.to or Path("comparison.html")
    write_comparison(reports, page)
    print(f"comparison: {page.resolve()}")
    if arguments.csv is not None:
        write_csv(reports, arguments.csv)
        print(f"table: {arguments.csv.resolve()}")


def _run(arguments: argparse.Namespace) -> None:
    run = _open(arguments)
    from trimtab.eval.stages import eval_stage, report_stage
    from trimtab.pipeline.instrument import floor_stage
    from trimtab.train.pairs import rollouts_stage

    trains = run.recipe.eval.tuned is None
    (rollouts_stage if trains else floor_stage)(run)
    _free_memory()
    if trains:
        _train(run, arguments)
    _train_durability(run, arguments)
    verdict = eval_stage(run)
    page = report_stage(run)
    print(f"verdict ({verdict['status']}): {verdict['verdict']}")
    print(f"report: {page}")


def _stage(arguments: argparse.Namespace) -> None:
    if arguments.command == "eval":
        _check_subject(arguments)
    if arguments.command == "report" and arguments.compare is not None:
        _compare(arguments)
        return
    if getattr(arguments, "to", None) is not None and arguments.command == "report":
        raise UserError(
            "--to names the page of a comparison",
            key="--to",
            remedy="give it with --compare; a run's own page lies in its folder",
        )
    if arguments.recipe is None and getattr(arguments, "base", None) is None:
        raise UserError("no recipe is named", key="RECIPE", remedy="name one, or finished runs: --compare RUN RUN")
    made = arguments.command == "report" or (arguments.command == "eval" and arguments.base is None)
    run = _open(arguments, make=not made)
    if arguments.command == "train":
        _train(run, arguments)
    elif arguments.command in ("eval", "report"):
        from trimtab.eval import stages

        if arguments.command == "eval":
            if run.recipe.eval.tuned is not None:
                from trimtab.pipeline.instrument import floor_stage

                floor_stage(run)
                _free_memory()
            _train_durability(run, arguments)
            stages.eval_stage(run)
        if arguments.command == "report" or run.recipe.eval.tuned is not None:
            print(f"report: {stages.report_stage(run)}")
        if arguments.command == "report":
            _export(run, arguments)
    else:
        from trimtab.pipeline.instrument import axis_stage, floor_stage
        from trimtab.train.pairs import rollouts_stage

        work = {"axis": axis_stage, "floor": floor_stage, "rollouts": rollouts_stage}
        work[arguments.command](run)


def _export(run: Any, arguments: argparse.Namespace) -> None:
    """The report of a run in other forms."""
    from trimtab.axis.files import write_text
    from trimtab.eval import stages
    from trimtab.eval.report.compare import write_csv
    from trimtab.eval.report.inspect_log import write_inspect_logs
    from trimtab.eval.report.page import load_report

    report = load_report(run.folder / "report.json")
    if arguments.csv is not None:
        write_csv({run.folder.name: report}, arguments.csv)
        print(f"table: {arguments.csv.resolve()}")
    if arguments.card is not None:
        write_text(arguments.card, stages.card_of(run, report))
        print(f"card: {arguments.card.resolve()}")
    if arguments.inspect is not None:
        write_inspect_logs(report, arguments.inspect)
        print(f"logs: {arguments.inspect.resolve()}, to be read with: inspect view --log-dir {arguments.inspect}")


def _train(run: Any, arguments: argparse.Namespace) -> None:
    for control in (False, True) if run.recipe.eval.control else (False,):
        _launch(run, arguments, run.recipe.method.name, ["--control"] if control else [])


def _train_durability(run: Any, arguments: argparse.Namespace) -> None:
    """The durability runs whose outcome the evaluation measures: of the tuned weights, and of the base beside them."""
    from trimtab.pipeline.run import STARTS

    for tuning in run.recipe.eval.durability:
        for start in STARTS:
            _launch(run, arguments, "durability", ["--on", tuning.name, "--start", start])


def _launch(run: Any, arguments: argparse.Namespace, script: str, options: Sequence[str]) -> None:
    from trimtab.cli.launch import launch_training

    launch_training(
        run.loaded,
        run.folder,
        script,
        options,
        accelerate=arguments.accelerate,
        num_processes=arguments.num_processes,
        quiet=getattr(arguments, "quiet", False),
    )


def _free_memory() -> None:
    """Give back the GPU memory of the stages before training: the trainer is another process on the same GPU."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _recipes(arguments: argparse.Namespace) -> None:
    from trimtab.cli.recipes import show

    show(arguments.diff)


def _check(arguments: argparse.Namespace) -> None:
    from trimtab.recipes.loader import load_recipe

    loaded = load_recipe(arguments.recipe, arguments.overrides)
    from trimtab.cli.check import check_recipe

    check_recipe(loaded, arguments.accelerate, arguments.num_processes, arguments.gpu_memory)


def _merge(arguments: argparse.Namespace) -> None:
    run = _open(arguments, make=False)
    from rich.console import Console
    from rich.table import Table

    from trimtab.eval.merging import merge_stage

    rows = merge_stage(run, arguments.to)
    table = Table("figure", "report: adapter", "merged weights", "merged - adapter", "agree")
    for row in rows:
        value, low, high = row["report"]
        verdict = "yes" if row["agrees"] else "NO"
        apart = "-" if row["difference"] is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["difference"])
        table.add_row(row["figure"], f"{value:.4f} [{low:.4f}, {high:.4f}]", f"{row['merged']:.4f}", apart, verdict)
    Console().print(table)
    print(f"merged: {arguments.to or run.folder / 'merged'}")
    if not all(row["agrees"] for row in rows):
        raise RuntimeError("the merged weights do not give the report's figures again")


def _project(arguments: argparse.Namespace) -> None:
    from trimtab.cli.compass import project_command

    project_command(
        arguments.model,
        arguments.floor,
        arguments.transcript,
        experiment=arguments.experiment,
        layers=arguments.layers,
        html=arguments.html,
        json=arguments.json,
        capped=arguments.capped,
        template_kwargs={key: value for given in arguments.chat_template_kwargs for key, value in given.items()},
    )


def _chat(arguments: argparse.Namespace) -> None:
    from trimtab.chat.command import chat_command

    chat_command(
        arguments.run,
        base=arguments.base,
        tuned=arguments.tuned,
        floor=arguments.floor,
        experiment=arguments.experiment,
        layers=arguments.layers,
        template_kwargs={key: value for given in arguments.chat_template_kwargs for key, value in given.items()},
        host=arguments.host,
        port=arguments.port,
        browser=not arguments.no_browser,
    )


def _read(arguments: argparse.Namespace) -> None:
    from trimtab.cli.read import read_command

    read_command(
        arguments.runs,
        sheet=arguments.sheet,
        per_arm=arguments.per_arm,
        suite=arguments.suite,
        seed=arguments.seed,
        labels=arguments.labels,
        key=arguments.key,
        json=arguments.json,
    )


def _fetch(arguments: argparse.Namespace) -> None:
    from trimtab.axis.models import fetch_embedded

    print(fetch_embedded(arguments.name))


if __name__ == "__main__":
    sys.exit(main())
