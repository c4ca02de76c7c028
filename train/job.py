"""A training job: the frame that every entry script of ``train/`` shares.

Stages before training by one process, a resumed or fresh trainer, an adapter that is written whole or not at all, its record.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# after the environment, which must be set before transformers is imported
from trimtab.axis.errors import UserError, disk_full, known_fault
from trimtab.axis.logs import setup_logging
from trimtab.recipes.loader import LoadedRecipe, load_recipe
from trimtab.recipes.schema import ModelSection, Recipe
from trimtab.train.builds import drop_stale_locks
from trimtab.train.method import A, Method

if TYPE_CHECKING:
    import torch

    from trimtab.axis import Floor
    from trimtab.axis.chat_format import ChatFormat
    from trimtab.pipeline.run import Run, Variant
    from trimtab.train.barrier import BarrierOptions
    from trimtab.train.penalty import PenaltyOptions
    from trimtab.train.protocols import Trainer, TrainingArguments


log = logging.getLogger("trimtab")

SPREAD = "spread.json"
# Variable of the environment: the file in which a training process says what of the user's input is at fault.
FAULT_FILE = "TRIMTAB_FAULT_FILE"
# What a checkpoint holds besides the adapter.
OF_RESUMING = (
    "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "scaler*", "global_step*", "latest", "zero_to_fp32.py",
    "pytorch_model_fsdp*",
)  # fmt: skip
FOLDER_PATIENCE = 60  # seconds; rank 0 makes the run folder within a few


def main(method: Method[A], argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0 done, 2 the user's input."""
    parser = argument_parser(method.usage)
    parser.add_argument("--control", action="store_true", help="train the random-direction control of this run")

    def work(arguments: argparse.Namespace) -> None:
        loaded = load_recipe(arguments.config, arguments.overrides)
        _check_method(method, loaded)
        train(method, loaded, output_dir=arguments.output_dir, control=arguments.control, quiet=arguments.quiet)

    return run_script(parser, argv, work)


def argument_parser(usage: str) -> argparse.ArgumentParser:
    """What every entry script takes."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe: a path, or a name such as smollm2-135m/sft")
    parser.add_argument("--output_dir", "--output-dir", default=None, help="run folder; default runs/<recipe name>")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser


def run_script(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], None]
) -> int:
    """Run an entry script's work; returns the exit code: 0 done, 2 the user's input."""
    arguments = parser.parse_intermixed_args(argv)
    setup_logging(quiet=arguments.quiet, main_process=int(os.environ.get("RANK", "0")) == 0)
    try:
        work(arguments)
    except Exception as error:
        if (known := known_fault(error)) is None:
            raise
        _tell(known)
        return 2
    return 0


def _tell(error: UserError) -> None:
    """Say what is wrong: to the command that started this, which tells it once, or on standard error.

    A launcher makes 1 of every exit code, and each of its ranks may find the same fault.
    """
    if (path := os.environ.get(FAULT_FILE)) is None:
        print(f"error: {error}", file=sys.stderr)
        return
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:  # the first rank's
        file.write(str(error))


def check_trains(loaded: LoadedRecipe) -> None:
    """Refuse to train a recipe that evaluates finished weights.

    Raises:
        UserError: if it does.
    """
    if loaded.recipe.eval.tuned is not None:
        raise UserError(
            "nothing is trained: eval.tuned names finished weights, which would be evaluated in the place of the adapter",
            file=loaded.path,
            key="eval.tuned",
            remedy="remove it to train, or measure those weights: trimtab eval RECIPE",
        )


def _check_method(method: Method[A], loaded: LoadedRecipe) -> None:
    check_trains(loaded)
    if not isinstance(loaded.recipe.method, method.section):
        name = loaded.recipe.method.title()
        raise UserError(
            f"this script trains {method.section.title()}, and the recipe says {name}",
            file=loaded.path,
            key="method.name",
            remedy=f"launch trimtab.train.{name}, or `trimtab train`, which picks the script",
        )


def train(
    method: Method[A], loaded_recipe: LoadedRecipe, *, output_dir: str | None, control: bool, quiet: bool
) -> Path:
    """Train the adapter of a recipe, or of its control.

    Args:
        method: how it is trained.
        loaded_recipe: the recipe.
        output_dir: run folder.
        control: train against the random-direction floor.
        quiet: no progress bars.

    Returns:
        The adapter's folder.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        run = _prepare(loaded_recipe, output_dir, control=control, processes=1)
    else:
        # The stages before training run on one process with the plain model; the process group starts afterwards, so that
        # no collective times out meanwhile.
        run = _prepare_once(method, loaded_recipe, output_dir, control=control, processes=world)
    variant = run.variant(control)
    inputs = run.inputs("train")
    return train_variant(
        run,
        variant,
        lambda: method.arguments(run, variant, quiet),
        lambda arguments: method.trainer(run, arguments, variant),
        inputs=inputs,
        begun=inputs,
    )


def _prepare(loaded_recipe: LoadedRecipe, output_dir: str | None, *, control: bool, processes: int) -> Run:
    """Open the run, have the libraries look at the recipe where there is still something to train, make axis and floor."""
    from trimtab.pipeline.run import open_run
    from trimtab.train.pairs import rollouts_stage
    from trimtab.train.rehearsal import rehearse

    run = open_run(loaded_recipe, output_dir=output_dir)
    if run.stage_record(run.variant(control).stage_name) is None:
        rehearse(run.loaded, processes=processes)
    rollouts_stage(run)
    return run


def train_variant(
    run: Run,
    variant: Variant,
    make_arguments: Callable[[], A],
    make_trainer: Callable[[A], Trainer],
    *,
    inputs: Any,
    begun: dict[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Train one adapter, or go on where its last checkpoint stopped; nothing is done where it is done already.

    Args:
        run: the run.
        variant: where the adapter goes, and the name of its record.
        make_arguments: gives TRL's config.
        make_trainer: gives the trainer, of that config.
        inputs: what the record is keyed by.
        begun: what the checkpoints are held by, beside them; None where that is noted elsewhere.
        facts: more for the record.

    Returns:
        The adapter's folder.
    """
    from accelerate import PartialState

    from trimtab.pipeline.run import BEGUN, begin

    adapter = variant.adapter
    # Looked up before the process group is made, so that there is none to take down.
    if (adapter / "adapter_config.json").exists() and run.stage_record(variant.stage_name):
        log.info("%s: done already, %s", variant.stage_name, adapter)
        return adapter
    arguments = make_arguments()
    check_steps(arguments)
    state = PartialState()
    if state.is_local_main_process and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        drop_stale_locks()
    trainer = make_trainer(arguments)
    checkpoint = last_checkpoint(variant.checkpoints)
    check_spread(variant.checkpoints / SPREAD, trainer, resumed=checkpoint is not None)
    if begun is not None and state.is_main_process:
        begin(variant.checkpoints / BEGUN, begun)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
    started = time.monotonic()
    unfinished = adapter.with_name(f".{adapter.name}.unfinished")
    with naming_a_full_disk(variant.checkpoints, unfinished):
        if checkpoint is not None and is_finished(checkpoint, arguments.max_steps):
            take_finished(Path(checkpoint), unfinished, trainer)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model(str(unfinished))
    seconds = time.monotonic() - started
    state.wait_for_everyone()
    if state.is_main_process:
        check_saved(unfinished)
        shutil.rmtree(adapter, ignore_errors=True)  # there only where a kill hit between here and the record
        unfinished.replace(adapter)
        # of the whole run: the trainer's own figure leaves out the steps before a resume
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found = {
            "minutes": round(seconds / 60, 2),
            "steps": int(trainer.state.global_step),
            "train_loss": round(sum(losses) / len(losses), 4) if losses else None,
            "processes": state.num_processes,
            "peak_gib": round(peak_memory() / 1024**3, 2),
            "distributed_type": str(trainer.accelerator.distributed_type).split(".")[-1],
            "resumed_from": None if checkpoint is None else Path(checkpoint).name,
            **(facts or {}),
        }
        run.record(variant.stage_name, inputs, found, seconds=seconds)
        log.info("adapter: %s", adapter)
    trainer.end()
    return adapter


def _prepare_once(
    method: Method[A], loaded_recipe: LoadedRecipe, output_dir: str | None, *, control: bool, processes: int
) -> Run:
    """Open the run and make axis and floor on rank 0; the other ranks wait for their records on disk."""
    from trimtab.pipeline.run import MARKER, open_run, run_folder

    if int(os.environ.get("RANK", "0")) == 0:
        return _prepare(loaded_recipe, output_dir, control=control, processes=processes)
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
                if run.stage_record(method.section.last_stage()) is not None:
                    return run


def common_arguments(run: Run, variant: Variant, quiet: bool) -> dict[str, Any]:
    """What every TRL config gets: the recipe's ``train`` section over our defaults, and what trimtab sets itself."""
    recipe = run.recipe
    given = {key: value for key, value in recipe.train.items() if key != "output_dir"}
    if recipe.model.device == "cpu" and "use_cpu" not in given:
        given["use_cpu"] = True
    if "learning_rate" not in given:
        given["learning_rate"] = usual_learning_rate(recipe)
    return {
        "report_to": "none",
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": quiet,
        "bf16": False,
        "seed": 0,
        **given,
        "output_dir": str(variant.checkpoints),
    }


SMALL = 1024  # the hidden size from which on a model is large: SmolLM2's is below it, those of the other shipped recipes are not


def usual_learning_rate(recipe: Recipe) -> float:
    """The learning rate of a recipe that says none: small models take, and need, up to fifty times that of large ones."""
    from trimtab.axis.models import load_config

    hidden = int(load_config(recipe.model.name, recipe.model.revision).get_text_config().hidden_size)
    small, large = recipe.method.learning_rates
    rate = small if hidden < SMALL else large
    log.info(
        "learning rate %g (the recipe says none; %s is usual for a hidden size of %d)", rate, recipe.method.name, hidden
    )
    return rate


@dataclass(frozen=True)
class Parts:
    """What the trainers of all methods are made of.

    Attributes:
        model: the base model, to be wrapped by TRL.
        tokenizer: its tokenizer.
        form: its chat format.
        device: where it will train.
        lora: PEFT's LoraConfig.
        floor: the floor of the run, or of its control.
        penalty: how the floor penalty is weighed.
        barrier: how the benign barrier is weighed.
        callbacks: writes metrics.jsonl.
    """

    model: Any
    tokenizer: Any
    form: ChatFormat
    device: torch.device
    lora: Any
    floor: Floor
    penalty: PenaltyOptions
    barrier: BarrierOptions
    callbacks: list[Any]

    def trainer_arguments(self, arguments: TrainingArguments) -> dict[str, Any]:
        """What every trainer takes of these; ``arguments`` is TRL's config."""
        return {
            "model": self.model,
            "args": arguments,
            "processing_class": self.tokenizer,
            "peft_config": self.lora,
            "callbacks": self.callbacks,
            "floor": self.floor,
            "penalty": self.penalty,
            "barrier": self.barrier,
        }


def load_parts(run: Run, variant: Variant) -> Parts:
    """Load what the trainer of a run is made of."""
    from peft import LoraConfig

    from trimtab.axis import Floor
    from trimtab.axis.chat_format import ChatFormat, ends_of
    from trimtab.axis.models import load_tokenizer
    from trimtab.train.barrier import BarrierOptions
    from trimtab.train.penalty import PenaltyOptions

    recipe = run.recipe
    model, device = model_to_train(recipe.model)
    tokenizer: Any = load_tokenizer(recipe.model.name, recipe.model.revision)
    method = recipe.method
    return Parts(
        model=model,
        tokenizer=tokenizer,
        form=ChatFormat(tokenizer, recipe.model.chat_template_kwargs, ends_of(model)),
        device=device,
        lora=LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora}),
        floor=Floor.load(variant.floor_path),
        penalty=PenaltyOptions.of(method),
        barrier=BarrierOptions(method.benign_kl_weight, method.benign_axis_weight),
        callbacks=[metrics_callback(variant.metrics)],
    )


def model_to_train(section: ModelSection) -> tuple[Any, torch.device]:
    """The model of a recipe's ``model`` section, where the engine will place it, and the device it will train on."""
    from trimtab.axis.models import choose_device, choose_dtype, load_weights, pretrained_arguments

    device = choose_device(section.device)
    dtype, reason = choose_dtype(section.dtype, device)
    log.info("training in %s (%s)", dtype, reason)
    arguments = pretrained_arguments(dtype, section.revision, section.attn_implementation, section.quantization)
    return load_weights(section.name, **arguments), device


def padding(tokenizer: Any, device: torch.device) -> dict[str, Any]:
    """How TRL's collator pads."""
    # On a CPU every new shape makes oneDNN compile its kernels anew, which costs more than the padding.
    multiple = 32 if device.type == "cpu" else None
    return {"pad_token_id": tokenizer.pad_token_id, "pad_to_multiple_of": multiple}


def peak_memory() -> int:
    """The most memory this process has held, bytes: on the GPU where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_spread(path: Path, trainer: Trainer, *, resumed: bool) -> None:
    """Refuse to go on with other rows a step than the run began with; note them where it begins.

    The recipe says rows a micro-batch and micro-batches a step; how many processes there are is known only here.

    Args:
        path: the note, beside the checkpoints.
        trainer: the trainer.
        resumed: whether training goes on from a checkpoint.

    Raises:
        UserError: if the rows of a step are not as many, or the engine's checkpoints can't be read by so many processes.
    """
    from trimtab.axis.files import read_json, write_json

    arguments, accelerator = trainer.args, trainer.accelerator
    processes, micro = accelerator.num_processes, arguments.per_device_train_batch_size
    rows = processes * micro * arguments.gradient_accumulation_steps
    if resumed and path.exists():
        begun = read_json(path)
        if begun["rows"] != rows:
            per_step = f"{processes} process(es) x {micro} rows x {arguments.gradient_accumulation_steps} micro-batches"
            needed = begun["rows"] / (processes * micro)
            fits = needed >= 1 and needed == int(needed)
            raise UserError(
                f"this run was begun with {begun['rows']} rows a step, and {per_step} are {rows}",
                file=path.parent,
                key="train.gradient_accumulation_steps",
                remedy=f"set train.gradient_accumulation_steps={int(needed)}"
                if fits
                else f"choose rows and micro-batches whose product with {processes} is {begun['rows']}",
            )
        if begun["processes"] != processes and trainer.is_deepspeed_enabled:
            raise UserError(
                f"DeepSpeed's checkpoints are in {begun['processes']} parts, one for each process that wrote them, and this is "
                f"{processes}",
                file=path.parent,
                key="--num-processes",
                remedy=f"resume with --num-processes {begun['processes']}",
            )
    elif accelerator.is_main_process:
        write_json(path, {"rows": rows, "processes": processes})


def is_finished(checkpoint: str, max_steps: int) -> bool:
    """Whether a checkpoint is of the last step and holds the adapter; a kill came between it and the record.

    Resumed from there, the library's loop would train a step more wherever the last step is not the end of an epoch.
    """
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= max_steps and (Path(checkpoint) / "adapter_model.safetensors").exists()


def take_finished(checkpoint: Path, target: Path, trainer: Trainer) -> None:
    """Take the adapter of a last checkpoint for the finished one, and the trainer's record of its steps."""
    from transformers import TrainerState

    log.info("all steps are trained: %s is the adapter", checkpoint)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if trainer.accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*OF_RESUMING))


def check_steps(arguments: TrainingArguments) -> None:
    """Refuse a run without a number of steps, by which rollouts and schedules are laid out."""
    if arguments.max_steps <= 0:
        raise UserError("train.max_steps is not set", key="train.max_steps", remedy="set the number of optimiser steps")


def metrics_callback(path: Path) -> Any:
    """Appends the trainer's log to ``metrics.jsonl``; after a resume the steps that are trained again are cut off first."""
    from transformers import TrainerCallback

    from trimtab.axis.files import append_jsonl, read_jsonl, write_jsonl

    class Metrics(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # a resume takes the intervals of the checkpoint, whatever the recipe says by now
            state.compute_steps(args, state.max_steps)
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
