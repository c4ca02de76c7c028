"""SFT on capped rollouts with the axis-floor penalty.

    accelerate launch train/sft.py --config recipes/smollm2-135m/sft.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml train/sft.py --config recipes/qwen3-32b/sft.yaml
    accelerate launch train/sft.py --config smollm2-135m/sft train.learning_rate=1e-4 --output_dir runs/lower-rate

Axis and floor are made first, by the main process alone, unless the run folder has them already. The adapter is written to
``<run folder>/adapter``, and any stack that reads PEFT adapters loads it with no trace of trimtab. Run the same command again
after an interruption, and it resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# after the environment, which must be set before transformers is imported
from trimtab.axis.errors import UserError
from trimtab.axis.files import disk_full
from trimtab.axis.logs import setup_logging
from trimtab.recipes.loader import load_recipe

log = logging.getLogger("trimtab")

FOLDER_PATIENCE = 60  # seconds; rank 0 makes the run folder within a few


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0 done, 2 the user's input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe: a path, or a name such as smollm2-135m/sft")
    parser.add_argument("--output_dir", "--output-dir", default=None, help="run folder; default runs/<recipe name>")
    parser.add_argument("--control", action="store_true", help="train the random-direction control of this run")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(quiet=arguments.quiet, main_process=rank == 0)
    try:
        loaded = load_recipe(arguments.config, arguments.overrides)
        train(loaded, output_dir=arguments.output_dir, control=arguments.control, quiet=arguments.quiet)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(loaded_recipe: Any, *, output_dir: str | None, control: bool, quiet: bool) -> Path:
    """Train the adapter of a recipe, or of its control.

    Args:
        loaded_recipe: the recipe.
        output_dir: run folder.
        control: train against the random-direction floor.
        quiet: no progress bars.

    Returns:
        The adapter's folder.
    """
    from accelerate import PartialState

    from trimtab.train.prepare import rollouts_stage
    from trimtab.train.run import open_run

    recipe = loaded_recipe.recipe
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        run = open_run(loaded_recipe, output_dir=output_dir)
        rollouts_stage(run)
    else:
        # The stages before training run on one process with the plain model; the process group starts afterwards, so that
        # no collective times out meanwhile.
        run = _prepare_once(loaded_recipe, output_dir)
    variant = run.variant(control)
    # Looked up before the process group is made, so that there is none to take down.
    if (variant.adapter / "adapter_config.json").exists() and run.stage_record(variant.stage_name):
        log.info("%s: done already, %s", variant.stage_name, variant.adapter)
        return variant.adapter
    arguments = training_arguments(recipe, run, control, quiet)
    state = PartialState()
    trainer = build_trainer(run, arguments, control)
    checkpoint = last_checkpoint(variant.checkpoints)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
    started = time.monotonic()
    unfinished = variant.adapter.with_name(f".{variant.adapter.name}.unfinished")
    with naming_a_full_disk(variant.checkpoints, unfinished):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(unfinished))
    seconds = time.monotonic() - started
    state.wait_for_everyone()
    if state.is_main_process:
        check_saved(unfinished)
        shutil.rmtree(variant.adapter, ignore_errors=True)  # there only where a kill hit between here and the record
        unfinished.replace(variant.adapter)
        # of the whole run: the trainer's own figure leaves out the steps before a resume
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        facts = {
            "minutes": round(seconds / 60, 2),
            "steps": int(trainer.state.global_step),
            "train_loss": round(sum(losses) / len(losses), 4) if losses else None,
            "processes": state.num_processes,
            "distributed_type": str(trainer.accelerator.distributed_type).split(".")[-1],
            "resumed_from": None if checkpoint is None else Path(checkpoint).name,
        }
        run.record(variant.stage_name, [run.loaded.resolved["method"], control], facts, seconds=seconds)
        log.info("adapter: %s", variant.adapter)
    trainer.accelerator.end_training()
    return variant.adapter


def _prepare_once(loaded_recipe: Any, output_dir: str | None) -> Any:
    """Open the run and make axis and floor on rank 0; the other ranks wait for their records on disk."""
    from trimtab.train.prepare import rollouts_stage
    from trimtab.train.run import MARKER, open_run, run_folder

    if int(os.environ.get("RANK", "0")) == 0:
        run = open_run(loaded_recipe, output_dir=output_dir)
        rollouts_stage(run)
        return run
    launcher = os.getppid()
    folder = run_folder(loaded_recipe, output_dir)
    said, started = False, time.monotonic()
    while True:
        time.sleep(0.5)
        if not said and time.monotonic() - started > FOLDER_PATIENCE and not (folder / MARKER).exists():
            said = True
            log.warning(
                "rank %s still waits for rank 0 to make %s; if it lies on another node, give an --output-dir that all "
                "nodes share",
                os.environ.get("RANK"),
                folder,
            )
        if os.getppid() != launcher:
            raise SystemExit("the launcher ended while axis and floor were being made")
        # Only rank 0 may make the folder. Where it belongs to another recipe, rank 0 says so and the launcher ends us.
        if (folder / MARKER).exists():
            with contextlib.suppress(UserError):
                run = open_run(loaded_recipe, output_dir=output_dir)
                if run.stage_record("floor") is not None:
                    return run


def training_arguments(recipe: Any, run: Any, control: bool, quiet: bool) -> Any:
    """TRL's SFTConfig: the recipe's ``train`` section, and what trimtab sets itself."""
    from trl.trainer.sft_config import SFTConfig

    given = {key: value for key, value in recipe.train.items() if key != "output_dir"}
    if recipe.model.device == "cpu" and "use_cpu" not in given:
        given["use_cpu"] = True
    return SFTConfig(
        **{
            "report_to": "none",
            "save_total_limit": 2,
            "logging_steps": 1,
            "disable_tqdm": quiet,
            "bf16": False,
            "seed": 0,
            **given,
            "output_dir": str(run.variant(control).checkpoints),
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "train_sampling_strategy": "sequential",
        }
    )


def build_trainer(run: Any, arguments: Any, control: bool) -> Any:
    """The trainer of a run: model, adapter, floor and rollout source."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from trimtab.axis import Floor
    from trimtab.axis.chat import ChatFormat
    from trimtab.axis.models import choose_device, choose_dtype, load_tokenizer, resolve_name
    from trimtab.train.floor_sft import FloorCollator, FloorSFTTrainer
    from trimtab.train.rollouts import RolloutSource

    recipe = run.recipe
    variant = run.variant(control)
    device = choose_device(recipe.model.device)
    dtype, reason = choose_dtype(recipe.model.dtype, device)
    log.info("training in %s (%s)", dtype, reason)
    model_arguments: dict[str, Any] = {"dtype": dtype, "revision": recipe.model.revision}
    if recipe.model.attn_implementation:
        model_arguments["attn_implementation"] = recipe.model.attn_implementation
    model = AutoModelForCausalLM.from_pretrained(resolve_name(recipe.model.name)[0], **model_arguments)
    tokenizer: Any = load_tokenizer(recipe.model.name, recipe.model.revision)
    form = ChatFormat(tokenizer, recipe.model.chat_template_kwargs)
    floor = Floor.load(variant.floor_path)
    source = RolloutSource(
        rollout_plan(recipe, arguments), form, floor, variant.rollouts, max_length=arguments.max_length
    )
    method = recipe.method
    trainer = FloorSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=source.dataset(),
        # On a CPU every new shape makes oneDNN compile its kernels anew, which costs more than the padding.
        data_collator=FloorCollator(
            pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=32 if device.type == "cpu" else None
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora}),
        callbacks=[metrics_callback(variant.metrics)],
        floor=floor,
        floor_weight=method.floor_weight,
        floor_schedule=method.floor_schedule,
        floor_target=method.floor_target,
        floor_margin=method.floor_margin,
        floor_shape=method.floor_shape,
        benign_kl_weight=method.benign_kl_weight,
        benign_axis_weight=method.benign_axis_weight,
    )
    source.bind(trainer)
    return trainer


def rollout_plan(recipe: Any, arguments: Any) -> Any:
    """The training order and how its answers are sampled."""
    from trimtab.train.prepare import sampling_options
    from trimtab.train.rollouts import RolloutPlan, training_order
    from trimtab.train.sources import benign_sources, drift_sources

    method, data = recipe.method, recipe.data
    if arguments.max_steps <= 0:
        raise UserError("train.max_steps is not set", key="train.max_steps", remedy="set the number of optimiser steps")
    ranks = arguments.world_size
    accumulation = arguments.gradient_accumulation_steps
    order = training_order(
        drift_sources(data),
        benign_sources(data),
        micro_batches=arguments.max_steps * accumulation,
        ranks=ranks,
        batch_size=arguments.per_device_train_batch_size,
        benign_share=data.benign_share,
        seed=data.seed,
    )
    return RolloutPlan(
        order=order,
        rows_a_step=arguments.per_device_train_batch_size * accumulation * ranks,
        batch_size=arguments.per_device_train_batch_size,
        every=method.regenerate_every if method.rollouts == "on_the_fly" else arguments.max_steps,
        total_steps=arguments.max_steps,
        strength=method.cap_strength,
        schedule=method.cap_schedule,
        options=sampling_options(method.sampling),
        seed=data.seed,
    )


def metrics_callback(path: Path) -> Any:
    """Appends the trainer's log to ``metrics.jsonl``; after a resume the steps that are trained again are cut off first."""
    from transformers import TrainerCallback

    from trimtab.axis.files import append_jsonl, read_jsonl, write_jsonl

    class Metrics(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and path.exists():
                write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= state.global_step])

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
                finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
                append_jsonl(path, [{"step": state.global_step, **finite}])

    return Metrics()


def whole_checkpoints(folder: Path) -> list[str]:
    """Checkpoints that were written whole, oldest first. ``trainer_state.json`` is the last file that is written."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return [str(path) for path in sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole, or None."""
    return next(reversed(whole_checkpoints(folder)), None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a kill or a full disk cut it short
        return False
    return True


@contextlib.contextmanager
def naming_a_full_disk(checkpoints: Path, unfinished: Path) -> Iterator[None]:
    """Turn what the libraries raise when a checkpoint doesn't fit on the disk into the fault that it is.

    What was half-written is removed.

    Args:
        checkpoints: the trainer's output folder.
        unfinished: where the adapter is being saved.

    Raises:
        UserError: if the disk is full.
    """
    try:
        yield
    except Exception as error:  # each library has a class of its own
        if isinstance(error, UserError) or not _is_full_disk(error, checkpoints):
            raise
        whole = {Path(path) for path in whole_checkpoints(checkpoints)}
        for folder in [unfinished, *set(checkpoints.glob("checkpoint-*")) - whole]:
            shutil.rmtree(folder, ignore_errors=True)
        raise disk_full(checkpoints) from error


def _is_full_disk(error: BaseException, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # torch and safetensors give no errno
    torn = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return "No space left" in str(error) or (torn and shutil.disk_usage(folder).free < 1 << 20)


def check_saved(adapter: Path) -> None:
    """Check that the adapter on disk holds tensors; some engine settings save an empty one without an error."""
    from safetensors import safe_open

    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
        if not list(file.keys()):
            raise UserError(
                "the saved adapter holds no tensors",
                file=adapter,
                remedy="use gradient_checkpointing instead of fsdp_activation_checkpointing, and FULL_STATE_DICT under FSDP",
            )


if __name__ == "__main__":
    raise SystemExit(main())
