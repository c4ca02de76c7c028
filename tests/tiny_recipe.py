"""A recipe for a tiny model that goes through every stage in seconds, and the command that trains it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import needs
import torch
import yaml
from conftest import save_model
from quick_python import quick_python
from safetensors.torch import load_file

from trimtab.cli.launch import resolve_accelerate_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "trimtab.train.sft"
PROBE = Path(__file__).resolve().parent / "engine_probe.py"
# Forked from a server that has imported everything: a start takes a fraction of a second, and each process is a fresh one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(f"trimtab.train.floor_{method}" for method in ("sft", "distill", "grpo", "dpo")),
        "trimtab.pipeline.instrument",
        "trimtab.train.rehearsal",
        "trimtab.eval.stages",
        "accelerate.commands.launch",
        "tiny_recipe",
    ]
)


def write_recipe(path: Path, model: Path, method: str = "sft", **train: Any) -> Path:
    """Write a recipe: 4 optimiser steps of 8 rows; a quarter of them benign; for SFT rollouts twice, greedy.

    Greedy, since random numbers differ between ranks: so one process and two see the same text, through the real sampling.
    """
    sampling = {"max_new_tokens": 8, "temperature": 0, "batch_size": 8}
    content = {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "axis": {
            "roles": 2,
            "held_out_roles": 1,
            "questions": 3,
            "default_repeats": 2,
            "sampling": {"max_new_tokens": 6, "batch_size": 4},
        },
        "floor": {"layers": [1, 2], "pool": 12, "drift_rows": 4, "min_firing": 0},
        "data": {"drift_prompts": 12, "conversation_turns": 2, "benign_share": 0.25},
        "method": {
            "regenerate_every": 2,
            "cap_schedule": "linear",
            "sampling": sampling,
            "floor_weight": 0.5,
            "floor_schedule": "cosine",
            "benign_kl_weight": 1.0,
            "benign_axis_weight": 0.5,
        },
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_length": 700,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            **train,
        },
    }
    if method != "sft":
        _change_method(content, method, sampling)
        content["train"] |= train
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _change_method(content: dict[str, Any], method: str, sampling: dict[str, Any]) -> None:
    """Make an SFT recipe one of another method, with answers sampled at random."""
    free = {**sampling, "temperature": 1.0}
    common = {"floor_weight": 0.5, "floor_schedule": "cosine", "benign_kl_weight": 1.0, "benign_axis_weight": 0.5}
    own: dict[str, dict[str, Any]] = {
        "distill": {
            "regenerate_every": 2, "sampling": free, "divergence": "jsd", "top_k": 40, "student_share": 0.5,
            "benign_student_share": 0.5,
        },
        "grpo": {
            "rewards": [{"name": "assistant"}, {"name": "capped_self_llr"}, {"name": "persona_llr", "weight": 0.5}],
            "ratio_limit": 1.5,
        },
        "dpo": {"sampling": free},
    }  # fmt: skip
    content["method"] = {"name": method, **common, **own[method]}
    if method != "distill":
        # a row beside each micro-batch of 4: a fraction is carried along a rank's micro-batches, which are fewer with two
        content["data"]["benign_share"] = 0.2
    if method == "grpo":
        del content["train"]["max_length"]
        content["train"] |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.02}


def save_small(folder: Path, **changes: Any) -> Path:
    """A model with no layer more than the recipe's floor needs: each costs every rank a collective for every weight."""
    return save_model(folder, num_hidden_layers=3, **changes)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a training process: offline, one thread, ninja of the venv on PATH."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": needs.path(), **extra}


def command(recipe: Path, folder: Path, *, script: str | Path = SCRIPT, launcher: Sequence[str] = ()) -> list[str]:
    """An entry script, a module or a file, on a recipe, started by :func:`quick_python` or by a launcher."""
    start = list(launcher) or [quick_python()]
    named = [str(script)] if isinstance(script, Path) else ["-m", script]
    return [*start, *named, *arguments_of(recipe, folder)]


def arguments_of(recipe: Path, folder: Path) -> list[str]:
    """What an entry script is told."""
    return ["--config", str(recipe), "--output_dir", str(folder), "--quiet"]


def launcher(config: Path, python: str | None = None) -> list[str]:
    """``accelerate launch`` with a file of its own, by :func:`quick_python` if no other is named."""
    return [python or quick_python(), "-m", "accelerate.commands.launch", "--config_file", str(config)]


def run(arguments: Sequence[str], *, timeout: float = 900, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end, output captured; a launcher that takes too long is ended together with its ranks."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(arguments, start_new_session=True, **pipes, **options)
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


@contextlib.contextmanager
def both_cores() -> Iterator[None]:
    """Held by a job of two ranks: they wait for each other by spinning, and four on two cores take five times as long as two."""
    with (Path(tempfile.gettempdir()) / f"trimtab-ranks-{os.getuid()}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of ``size`` bytes and a function that gives it another size; skips where this process may not mount."""
    needs.mount()
    folder.mkdir()

    def mount(*options: str) -> int:
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode

    if mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        needs.no_right_to_mount()
    try:
        yield lambda new: subprocess.run(["mount", "-o", f"remount,size={new}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Two processes with as many rows a step as one: 2 x 4 x 1 as 1 x 4 x 2.
TWO_PROCESSES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def launch(
    engine: str,
    method: str,
    model: Path,
    folder: Path,
    resume: bool = False,
    quantization: str | None = None,
    gpus: int = 0,
) -> tuple[Path, list[dict[str, Any]]]:
    """Train under one of the shipped accelerate files, started by accelerate with the probe around the entry script.

    Args:
        engine: name of the file; on the CPU ``cpu`` is one process, all others two.
        method: ``sft``, ``distill``, ``grpo`` or ``dpo``.
        model: folder of the model.
        folder: where the run folder, its recipe and the notes go.
        resume: go on in a run folder that is there.
        quantization: of the base: ``nf4``, ``int8`` or None.
        gpus: train on so many GPUs, a process each; 0 is the CPU.

    Returns:
        The run folder, and what each rank ran on: see ``engine_probe.py``.
    """
    name = f"{method}-{engine}"
    notes, run_folder = folder / f"{name}-notes", folder / name
    assert run_folder.exists() == resume
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    train = {} if gpus or engine == "cpu" else dict(TWO_PROCESSES)
    if gpus:  # as many rows a step as one process has, 4 x 2
        train["gradient_accumulation_steps"] = max(2 // gpus, 1)
    if gpus or engine.startswith("fsdp2"):  # with use_cpu accelerate makes DDP of it
        train["use_cpu"] = False
    recipe = write_recipe(folder / f"{name}.yaml", model, method, **train)
    if quantization is not None or gpus:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        content["model"] |= {"quantization": quantization, "device": "cuda" if gpus else "cpu"}
        recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    config = resolve_accelerate_config(engine, into=folder)
    if engine == "zero3-offload":  # no -cpu twin: on a CPU there is nothing to offload from, but it runs
        changed = {**yaml.safe_load(config.read_text(encoding="utf-8")), "use_cpu": True}
        config = folder / f"{name}-accelerate.yaml"
        config.write_text(yaml.safe_dump(changed), encoding="utf-8")
    processes = [] if engine == "cpu" else ["--num_processes", str(gpus or 2)]
    arguments = command(recipe, run_folder, script=PROBE, launcher=[*launcher(config), *processes])
    variables = {
        "TRIMTAB_PROBE": str(notes),
        "TRIMTAB_ENGINE": f"gpu-{engine}" if gpus else engine,
        "TRIMTAB_METHOD": method,
    }
    variables["TRIMTAB_QUANTIZATION"] = quantization or ""
    with both_cores() if len(processes) else contextlib.nullcontext():
        done = run(arguments, env=environment(**variables), cwd=folder)
    assert done.returncode == 0, done.stderr[-6000:]
    return run_folder, [json.loads(path.read_text(encoding="utf-8")) for path in sorted(notes.iterdir())]


def train_here(arguments: Sequence[str], log: Path, method: str = "sft") -> None:
    """The target of a forked process: the entry script's ``main``, its output in a file, its exit code the process's."""
    main = importlib.import_module(f"trimtab.train.{method}").main
    torch.set_num_threads(1)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raise SystemExit(main(arguments))


def adapter(folder: Path) -> dict[str, Any]:
    """Tensors of the adapter of a run folder."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest absolute difference between two adapters of the same names."""
    assert one.keys() == other.keys() and one
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
