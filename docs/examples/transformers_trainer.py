"""The floor penalty in `transformers.Trainer`: one method.

python docs/examples/transformers_trainer.py runs/demo/floor.safetensors
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from trimtab.axis import ActivationController, Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import load_model
from trimtab.axis.sampling import SamplingOptions, sample_answers
from trimtab.losses import axis_floor_loss

PROMPTS = [
    chat("You are an ancient oracle.", "What will become of me?"),
    chat("You are a ship's ghost.", "Are you lonely out there?"),
]


class FloorTrainer(Trainer):
    """A Trainer with the penalty."""

    floor: Floor
    weight = 0.1

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss plus the penalty, over the same number of tokens."""
        with ActivationController.of(model).recording(self.floor.layers) as recording:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        hidden = {layer: recording.last(layer, with_grad=model.training) for layer in self.floor.layers}
        mask = inputs["labels"] != -100
        loss = loss + self.weight * axis_floor_loss(hidden, self.floor, mask, n_tokens=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def train(model: Any, tokenizer: Any, floor: Floor, folder: str, *, steps: int = 4) -> list[float]:
    """Train on capped rollouts that were sampled once; returns the losses.

    Args:
        model: a chat model with trainable weights.
        tokenizer: its tokenizer, with a chat template.
        floor: the floor.
        folder: the trainer's output folder.
        steps: optimiser steps.
    """
    form = ChatFormat(tokenizer)
    answers = sample_answers(model, form, PROMPTS, SamplingOptions(max_new_tokens=32), seed=0, floor=floor)
    rows = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        head, tail = form.prompt_ids(prompt), [*answer.ids, form.end_token]
        rows.append({"input_ids": head + tail, "labels": [-100] * len(head) + tail})
    trainer = FloorTrainer(
        model=model,
        args=TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    trainer.floor = floor
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    loaded = load_model("smollm2-135m")
    peft = get_peft_model(loaded.model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    print(train(peft, loaded.tokenizer, Floor.load(sys.argv[1]), "runs/example"))
