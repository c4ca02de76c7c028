"""The floor penalty and capped rollouts in a training loop of your own, with nothing but PyTorch.

python docs/examples/plain_pytorch.py runs/demo/floor.safetensors
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from trimtab.axis import ActivationController, Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import load_model
from trimtab.axis.sampling import SamplingOptions, sample_answers
from trimtab.losses import axis_floor_loss

PROMPTS = [
    chat("You are an ancient oracle.", "What will become of me?"),
    chat("You are a ship's ghost.", "Are you lonely out there?"),
]


def train(model: Any, tokenizer: Any, floor: Floor, *, steps: int = 4, weight: float = 0.1) -> list[float]:
    """Train on capped rollouts with the floor penalty; returns the losses.

    Args:
        model: a chat model with trainable weights.
        tokenizer: its tokenizer, with a chat template.
        floor: the floor.
        steps: optimiser steps.
        weight: weight of the penalty.
    """
    form = ChatFormat(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps):
        # 1. capped rollouts, from the weights as they are now
        answers = sample_answers(model, form, PROMPTS, SamplingOptions(max_new_tokens=32), seed=step, floor=floor)
        # 2. an uncapped forward, whose states at the floor's layers are recorded
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            head = form.prompt_ids(prompt)
            ids = torch.tensor([[*head, *answer.ids, form.end_token]])
            labels = ids.clone()
            labels[:, : len(head)] = -100
            with ActivationController.of(model).recording(floor.layers) as recording:
                loss = model(input_ids=ids, labels=labels).loss
            # 3. the penalty on the answer's tokens
            hidden = {layer: recording.last(layer, with_grad=True) for layer in floor.layers}
            loss = loss + weight * axis_floor_loss(hidden, floor, labels != -100)
            (loss / len(PROMPTS)).backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    loaded = load_model("smollm2-135m")
    peft = get_peft_model(loaded.model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    print(train(peft, loaded.tokenizer, Floor.load(sys.argv[1])))
