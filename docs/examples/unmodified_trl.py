"""The floor penalty under a trainer that is not touched at all: hooks add its gradient in the backward pass.

    python docs/examples/unmodified_trl.py runs/demo/floor.safetensors

For frameworks that hide their loss; `trimtab.losses.injection` states the limits. Any trainer reads the capped rollouts: they are
a dataset of prompts and completions.
"""

from __future__ import annotations

import sys
from typing import Any

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from trimtab.axis import Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import load_model
from trimtab.axis.sampling import SamplingOptions, sample_answers
from trimtab.losses import floor_gradients

PROMPTS = [
    chat("You are an ancient oracle.", "What will become of me?"),
    chat("You are a ship's ghost.", "Are you lonely out there?"),
]


def train(model: Any, tokenizer: Any, floor: Floor, folder: str, *, steps: int = 4) -> dict[str, float]:
    """Train; returns the penalty's figures over the whole run.

    Args:
        model: a chat model.
        tokenizer: its tokenizer, with a chat template.
        floor: the floor.
        folder: the trainer's output folder.
        steps: optimiser steps.
    """
    form = ChatFormat(tokenizer)
    answers = sample_answers(model, form, PROMPTS, SamplingOptions(max_new_tokens=32), seed=0, floor=floor)
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer.text}]}
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, bf16=False,
            report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    with floor_gradients(trainer, floor, weight=0.1) as penalty:
        trainer.train()
    return penalty.figures()


if __name__ == "__main__":
    loaded = load_model("smollm2-135m")
    print(train(loaded.model, loaded.tokenizer, Floor.load(sys.argv[1]), "runs/example"))
