"""Hand training to ``accelerate launch``, with an accelerate file chosen by name."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_json, write_text
from trimtab.recipes.faults import did_you_mean
from trimtab.recipes.loader import LoadedRecipe
from trimtab.recipes.yaml_lines import too_much
from trimtab.train.job import FAULT_FILE

log = logging.getLogger("trimtab")


class TrainingFailed(RuntimeError):
    """The training process ended with an error, which it has printed itself."""


class TrainingRefused(UserError):
    """The training process found a fault in the user's input; ``text`` are its own words."""

    def __init__(self, text: str) -> None:
        super().__init__(text, remedy="")
        self.args = (text,)


def accelerate_configs() -> dict[str, Path]:
    """Name -> file of the accelerate files that ship with trimtab."""
    import trimtab.accelerate_configs

    folder = Path(str(trimtab.accelerate_configs.__file__)).parent
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """The content of an accelerate file, which accelerate itself can read.

    Raises:
        UserError: if it is not YAML, or accelerate refuses it, or a setting that it takes on trust is none of its own.
    """
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import PrecisionType

    remedy = f"name one of {', '.join(accelerate_configs())}, or a file that `accelerate config` wrote"
    try:
        text = path.read_text(encoding="utf-8")
        if (fault := too_much(text)) is not None:
            raise UserError(fault.fault, file=path, remedy=remedy)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"not readable as YAML: {error}", file=path, remedy="mend it: accelerate config writes one"
        ) from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError("this is not an accelerate file: it has no distributed_type", file=path, remedy=remedy)
    try:
        read = ClusterConfig.from_yaml_file(str(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"accelerate refuses it: {error}", file=path, remedy=remedy) from error
    known = [str(each.value) for each in PrecisionType]
    if read.mixed_precision not in (None, False, *known):  # False: a `no` without quotes
        raise UserError(
            f"no such precision: {read.mixed_precision!r}",
            file=path,
            key="mixed_precision",
            remedy=did_you_mean(str(read.mixed_precision), known, f"choose one of {', '.join(known)}"),
        )
    for key in ("num_processes", "num_machines"):
        value = content.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"must be a whole number above 0, got {value!r}", file=path, key=key, remedy=f"write {key}: 1"
            )
    for key in ("deepspeed_config", "fsdp_config"):
        if not isinstance(content.get(key) or {}, dict):
            raise UserError("must hold keys of its own", file=path, key=key, remedy=remedy)
    return content


def _check_deepspeed(path: Path, content: dict[str, Any]) -> None:
    """DeepSpeed's section, and its own file where there is one: JSON with a ZeRO stage that it knows."""
    if content["distributed_type"] != "DEEPSPEED":
        return
    section = content.get("deepspeed_config") or {}
    stage, where, key = section.get("zero_stage", 2), path, "deepspeed_config.zero_stage"
    if (named := section.get("deepspeed_config_file")) is not None:
        where, key = Path(str(named)), "zero_optimization.stage"
        zero = read_json(where)
        zero = zero.get("zero_optimization", {}) if isinstance(zero, dict) else None
        if not isinstance(zero, dict):
            raise UserError(
                "this is not a DeepSpeed configuration", file=where, remedy="see accelerate_configs/zero3-cpu.json"
            )
        stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"no such ZeRO stage: {stage!r}", file=where, key=key, remedy="choose 2 or 3")


def resolve_accelerate_config(name_or_file: str, *, into: Path | None = None) -> Path:
    """The accelerate file of a shipped name, or of a path.

    accelerate reads ``deepspeed_config_file`` relative to the working directory. Where a file names one beside itself, a copy
    with the absolute path is made and returned.

    Args:
        name_or_file: a shipped name such as ``zero3``, or a file.
        into: folder for such a copy; None makes a temporary one.

    Raises:
        UserError: if there is no such name or file, accelerate refuses it, or the DeepSpeed file it names is not there or none.
    """
    known = accelerate_configs()
    path = known.get(name_or_file, Path(os.path.expanduser(name_or_file)))
    if not os.path.isfile(path):
        raise UserError(
            f"no accelerate config {name_or_file!r}",
            key="--accelerate",
            remedy=did_you_mean(name_or_file, known, f"give a file, or one of: {', '.join(known)}"),
        )
    path = path.resolve()
    content = read_accelerate_config(path)
    named = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    beside = None if named is None else path.parent / str(named)  # which an absolute path is by itself
    if beside is not None:
        if not os.path.isfile(beside):
            raise UserError(
                f"deepspeed_config_file {named!r} is not there",
                file=path,
                remedy="give a path relative to the accelerate file itself, or an absolute one",
            )
        content["deepspeed_config"]["deepspeed_config_file"] = str(beside)
    _check_deepspeed(path, content)
    if beside is None or Path(str(named)).is_absolute():
        return path
    folder = into if into is not None else Path(tempfile.mkdtemp(prefix="trimtab-"))
    copy = folder / f"accelerate-{path.stem}.yaml"
    write_text(copy, yaml.safe_dump(content, sort_keys=False))
    return copy


def default_accelerate(device: str) -> tuple[str, str]:
    """The shipped config for this machine, and the reason for it.

    Args:
        device: ``model.device`` of the recipe.
    """
    import torch

    gpus = torch.cuda.device_count()
    if device == "cpu":
        return "cpu", "model.device is cpu"
    if gpus == 0:
        return "cpu", "torch sees no GPU"
    return "single", "one GPU is used unless another config is chosen" if gpus > 1 else "torch sees one GPU"


def training_command(
    loaded: LoadedRecipe,
    folder: Path,
    config: Path,
    script: str,
    options: Sequence[str] = (),
    *,
    num_processes: int | None,
    quiet: bool,
) -> list[str]:
    """The command that trains a recipe into a run folder.

    Args:
        loaded: the recipe with its overrides.
        folder: the run folder.
        config: a resolved accelerate file.
        script: name of an entry script of ``train/``.
        options: of that script.
        num_processes: replaces the file's own number.
        quiet: no progress bars.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--quiet"]
    if num_processes is not None:
        launcher += ["--num_processes", str(num_processes)]
    recipe = loaded.path if loaded.path.is_file() else folder / "recipe.yaml"  # that of a command's options
    command = [*launcher, "--module", f"trimtab.train.{script}", "--config", str(recipe), "--output_dir", str(folder)]
    return [*command, *options, *(["--quiet"] if quiet else []), *loaded.overrides]


def launch_training(
    loaded: LoadedRecipe,
    folder: Path,
    script: str,
    options: Sequence[str] = (),
    *,
    accelerate: str | None,
    num_processes: int | None = None,
    quiet: bool = False,
) -> None:
    """Run an entry script of ``train/`` on a recipe with ``accelerate launch`` in a child process.

    Args:
        loaded: the recipe with its overrides.
        folder: the run folder.
        script: such as ``sft``.
        options: of that script.
        accelerate: a shipped config's name, or a file; None chooses by machine.
        num_processes: replaces the file's own number.
        quiet: no progress bars.

    Raises:
        UserError: for an unknown accelerate config, more processes than GPUs, or whatever of the user's input the training
            process found at fault.
        TrainingFailed: if training ended with an error.
    """
    if accelerate is None:
        accelerate, reason = default_accelerate(loaded.recipe.model.device)
        log.info("accelerate config %s (%s)", accelerate, reason)
    config = resolve_accelerate_config(accelerate, into=folder)
    check_machine(config, num_processes)
    command = training_command(loaded, folder, config, script, options, num_processes=num_processes, quiet=quiet)
    # DeepSpeed looks for ninja on PATH, and a venv that is called by its path is not on it.
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONSAFEPATH": "1",  # `-m` puts the working directory first, whose files must not stand in the place of packages
    }
    if read_accelerate_config(config)["distributed_type"] == "NO":
        # transformers would spread one process over all GPUs it sees
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    log.info("training: %s", " ".join(command))
    with tempfile.TemporaryDirectory(prefix="trimtab-") as place:
        told = Path(place) / "fault.txt"
        code = subprocess.run(command, env={**environment, FAULT_FILE: str(told)}, check=False).returncode
        if code != 0 and told.exists():
            raise TrainingRefused(told.read_text(encoding="utf-8"))
    if code != 0:
        raise TrainingFailed(
            f"training ended with exit code {code}; its own message stands above, and the same command goes on from the last "
            "whole checkpoint"
        )


# What DeepSpeed's configuration says again of `train`: its key, the recipe's, and what that is where the recipe says nothing.
SAID_TWICE: tuple[tuple[str, str, Any], ...] = (
    ("gradient_accumulation_steps", "gradient_accumulation_steps", 1),
    ("gradient_clipping", "max_grad_norm", 1.0),
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", 8),
    ("bf16.enabled", "bf16", False),
    ("fp16.enabled", "fp16", False),
)


def check_pair(config: Path, train: Mapping[str, Any]) -> None:
    """Hold an accelerate file's DeepSpeed settings against the recipe's: two that differ are refused when training begins.

    Args:
        config: a resolved accelerate file.
        train: the recipe's section.

    Raises:
        UserError: naming both.
    """
    section = read_accelerate_config(config).get("deepspeed_config") or {}
    named = section.get("deepspeed_config_file")
    settings, where = (section, config) if named is None else (read_json(named), Path(named))
    for theirs, ours, default in SAID_TWICE:
        value: Any = settings
        for part in theirs.split("."):
            value = value.get(part, "auto") if isinstance(value, dict) else "auto"
        recipe = train.get(ours, default)
        if value not in ("auto", None) and value != recipe:
            raise UserError(
                f"{theirs} is {value} here, and train.{ours} of the recipe is {recipe}",
                file=where,
                key=theirs,
                remedy=f"write {theirs}: auto, or set train.{ours}={value}",
            )


def processes_of(config: Path, num_processes: int | None) -> int:
    """How many processes train.

    Args:
        config: a resolved accelerate file.
        num_processes: replaces the file's own number.

    Raises:
        UserError: for several processes of a file by which accelerate starts one, and says nothing.
    """
    content = read_accelerate_config(config)
    kind, asked = str(content["distributed_type"]), num_processes or int(content.get("num_processes", 1))
    if asked > 1 and kind in ("NO", "MULTI_CPU"):
        raise UserError(
            f"{asked} processes are asked for, and accelerate starts one where distributed_type is {kind}",
            file=config,
            key="--num-processes",
            remedy="choose a strategy of several processes: --accelerate ddp, fsdp2 or zero3, on CPUs ddp-cpu",
        )
    return asked


def check_machine(config: Path, num_processes: int | None) -> None:
    """Whether this machine has what an accelerate file asks for.

    Raises:
        UserError: for more processes than GPUs, or DeepSpeed where it is not installed.
    """
    asked, content = processes_of(config, num_processes), read_accelerate_config(config)
    if content["distributed_type"] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed", file=config, remedy="pip install 'trimtab[deepspeed]'")
    if content.get("use_cpu") or content.get("num_machines", 1) > 1:
        return
    import torch

    there = torch.cuda.device_count()
    if asked > there:
        raise UserError(
            f"{asked} processes are asked for, and torch sees {there} GPUs",
            file=config,
            key="num_processes",
            remedy=f"pass --num-processes {there}" if there else "pass --accelerate cpu, or use a machine with GPUs",
        )
