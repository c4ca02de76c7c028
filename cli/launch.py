"""Hand training to ``accelerate launch``, with an accelerate file chosen by name."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.axis.errors import UserError
from trimtab.axis.files import write_text
from trimtab.recipes.faults import did_you_mean
from trimtab.recipes.loader import LoadedRecipe

log = logging.getLogger("trimtab")


class TrainingFailed(RuntimeError):
    """The training process ended with an error, which it has printed itself."""


def accelerate_configs() -> dict[str, Path]:
    """Name -> file of the accelerate files that ship with trimtab."""
    import trimtab.accelerate_configs

    folder = Path(str(trimtab.accelerate_configs.__file__)).parent
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """The content of an accelerate file.

    Raises:
        UserError: if it is not a YAML mapping with a ``distributed_type``.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"not readable as YAML: {error}", file=path, remedy="mend it: accelerate config writes one"
        ) from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(
            "this is not an accelerate file: it has no distributed_type",
            file=path,
            remedy=f"name one of {', '.join(accelerate_configs())}, or a file that `accelerate config` wrote",
        )
    return content


def resolve_accelerate_config(name_or_file: str, *, into: Path | None = None) -> Path:
    """The accelerate file of a shipped name, or of a path.

    accelerate reads ``deepspeed_config_file`` relative to the working directory. Where a file names one beside itself, a copy
    with the absolute path is made and returned.

    Args:
        name_or_file: a shipped name such as ``zero3``, or a file.
        into: folder for such a copy; None makes a temporary one.

    Raises:
        UserError: if there is no such name or file, or the DeepSpeed file it names is not there.
    """
    known = accelerate_configs()
    path = known.get(name_or_file, Path(name_or_file).expanduser())
    if not path.is_file():
        raise UserError(
            f"no accelerate config {name_or_file!r}",
            key="--accelerate",
            remedy=did_you_mean(name_or_file, known, f"give a file, or one of: {', '.join(known)}"),
        )
    path = path.resolve()
    content = read_accelerate_config(path)
    named = (content.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named is None or Path(named).is_absolute():
        return path
    beside = path.parent / named
    if not beside.is_file():
        raise UserError(
            f"deepspeed_config_file {named!r} is not there",
            file=path,
            remedy="give a path relative to the accelerate file itself, or an absolute one",
        )
    content["deepspeed_config"]["deepspeed_config_file"] = str(beside)
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
    import trimtab.train

    file = Path(str(trimtab.train.__file__)).parent / f"{script}.py"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--quiet"]
    if num_processes is not None:
        launcher += ["--num_processes", str(num_processes)]
    recipe = loaded.path if loaded.path.is_file() else folder / "recipe.yaml"  # that of a command's options
    command = [*launcher, str(file), "--config", str(recipe), "--output_dir", str(folder)]
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
        UserError: for an unknown accelerate config, or more processes than GPUs.
        TrainingFailed: if training ended with an error.
    """
    if accelerate is None:
        accelerate, reason = default_accelerate(loaded.recipe.model.device)
        log.info("accelerate config %s (%s)", accelerate, reason)
    config = resolve_accelerate_config(accelerate, into=folder)
    _check_gpus(config, num_processes)
    command = training_command(loaded, folder, config, script, options, num_processes=num_processes, quiet=quiet)
    # DeepSpeed looks for ninja on PATH, and a venv that is called by its path is not on it.
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if read_accelerate_config(config)["distributed_type"] == "NO":
        # transformers would spread one process over all GPUs it sees
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    log.info("training: %s", " ".join(command))
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise TrainingFailed(
            f"training ended with exit code {code}; its own message stands above, and the same command goes on from the last "
            "whole checkpoint"
        )


def _check_gpus(config: Path, num_processes: int | None) -> None:
    content = read_accelerate_config(config)
    if content.get("use_cpu") or content.get("num_machines", 1) > 1:
        return
    import torch

    asked, there = num_processes or int(content.get("num_processes", 1)), torch.cuda.device_count()
    if asked > there:
        raise UserError(
            f"{asked} processes are asked for, and torch sees {there} GPUs",
            file=config,
            key="num_processes",
            remedy=f"pass --num-processes {there}" if there else "pass --accelerate cpu, or use a machine with GPUs",
        )
