"""What the core's tests share: a model of torch alone, and a floor above it.

No conftest, since a folder above has one. They run in environments that hold other trainers too: see ``make test-core``.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import Floor

WIDTH, DEPTH, VOCABULARY = 32, 4, 64


class Block(nn.Module):
    """A decoder layer: what transformers' are to a hook, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return hidden + torch.tanh(self.mix(hidden))


class Plain(nn.Module):
    """A language model of torch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(num_hidden_layers=DEPTH, hidden_size=WIDTH)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, [B, T, V]."""
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def plain_model() -> Plain:
    """The model, with weights of a fixed seed."""
    torch.manual_seed(0)
    return Plain()


def high_floor() -> Floor:
    """A floor that a random model lies below, at layers 1 and 2."""
    directions = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))
    return Floor((1, 2), torch.nn.functional.normalize(directions, dim=-1), torch.full((2,), 2.0), torch.ones(2))
