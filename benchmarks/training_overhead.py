"""What the floor penalty costs: the same TRL SFT run with and without it, in turns, within one process.

    python benchmarks/training_overhead.py [--json out.json]

Targets: at most 1.03 times the step time and 1.01 times the peak memory of plain SFT. The plain arm has no hooks on the model and
runs TRL's own compute_loss; both arms train the same adapter on batches of the same shape.

Memory is what PyTorch's allocator gave out at the most, weights included: max_memory_allocated on a GPU, the profiler's count on
a CPU. It is the same in every run, so one block an arm is enough.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
from measuring import bench_floor, compare, finish, parser, peak_bytes, positive, run_rounds, synchronise, tell
from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from trimtab.axis import ActivationController
from trimtab.axis.models import load_model
from trimtab.train.floor_sft import FloorCollator, FloorSFTTrainer
from trimtab.train.penalty import PenaltyOptions

ARMS = ("plain", "floor")
TIME_TARGET, MEMORY_TARGET = 1.03, 1.01
MEMORY_STEPS = 2  # the optimiser's state is there from the second on


class TwoArmTrainer(FloorSFTTrainer):
    """Switches between plain SFT, without hooks, and SFT with the floor penalty."""

    arm = "floor"

    def switch(self, arm: str) -> None:
        """Take the hooks off for the plain arm, and put them on for the other."""
        self.arm = arm
        self.controller.remove()
        if arm == "floor":
            self.controller = ActivationController(self.model)
            assert self.penalty is not None
            self.penalty.controller = self.controller

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's own loss in the plain arm."""
        if self.arm == "plain":
            inputs.pop("anchor")
            return SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step, from its first forward to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop it."""
        synchronise()
        self.seconds.append(time.perf_counter() - self.started)


def build(arguments: argparse.Namespace, folder: str) -> TwoArmTrainer:
    """A trainer on random tokens: every batch has the same shape, so that steps differ by the arm alone."""
    loaded = load_model(arguments.model, device=arguments.device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, arguments.length)
    ids = torch.randint(0, loaded.model.config.get_text_config().vocab_size, shape, generator=generator)
    labels = ids.clone()
    labels[:, : arguments.length // 2] = -100  # a prompt as long as its answer
    return TwoArmTrainer(
        model=loaded.model,
        args=SFTConfig(
            output_dir=folder,
            max_steps=arguments.block,  # train_block sets it anew
            per_device_train_batch_size=arguments.batch_size,
            gradient_checkpointing=arguments.checkpointing,
            max_length=None,
            use_cpu=loaded.facts["device"] == "cpu",
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
        data_collator=FloorCollator(pad_token_id=loaded.tokenizer.pad_token_id),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        floor=bench_floor(loaded.model),
        penalty=PenaltyOptions(weight=0.5),
    )


def train_block(trainer: TwoArmTrainer, arm: str, steps: int) -> list[float]:
    """Train one block of steps in an arm; seconds of each step."""
    trainer.switch(arm)
    trainer.args.max_steps = steps
    times = StepTimes()
    trainer.add_callback(times)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(times)
    return times.seconds


def peak_memory(trainer: TwoArmTrainer, arm: str) -> int:
    """Most bytes that tensors held during a short block, weights included."""
    # parameters() gives a tied weight once, where state_dict would give it twice
    tensors = (*trainer.model.parameters(), *trainer.model.buffers())
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return weights + peak_bytes(lambda: train_block(trainer, arm, MEMORY_STEPS))


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--block", type=positive, default=6, help="steps of an arm in a round; the first is not counted"
    )
    options.add_argument("--batch-size", type=positive, default=8)
    options.add_argument("--length", type=positive, default=256, help="tokens a row")
    options.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    arguments = options.parse_args()
    if arguments.block < 2:
        options.error("--block must be at least 2: the first step of a block is not counted")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arguments, folder)

        def arm_of(arm: str) -> Callable[[], float]:
            # the first step of a block makes the optimiser's state and warms the caches
            return lambda: statistics.median(train_block(trainer, arm, arguments.block)[1:])

        seconds = run_rounds({arm: arm_of(arm) for arm in ARMS}, arguments.rounds, arguments.seed)
        peaks = {arm: [peak_memory(trainer, arm)] for arm in ARMS}
    step = compare(seconds, "floor", "plain", TIME_TARGET)
    memory = compare(peaks, "floor", "plain", MEMORY_TARGET, exact=True)
    tell("step time", step)
    tell("peak memory", memory)
    finish(
        arguments,
        "training_overhead",
        {"seconds_a_step": seconds, "time": step, "peak_bytes": peaks, "memory": memory},
    )


if __name__ == "__main__":
    main()
