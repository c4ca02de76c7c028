"""What the vLLM job needs: a CPU build of vLLM, the embedded model, a floor whose cap acts. ``make test-vllm`` sets it up."""

from __future__ import annotations

import os
from pathlib import Path

# before vLLM is imported
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_DO_NOT_TRACK": "1", "TRIMTAB_VLLM_CAP": "1"}

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab.axis import ActivationController, Floor
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.directions import unit
from trimtab.axis.models import fetch_embedded, load_tokenizer

LAYERS = (20, 21, 22, 23)
ROLES = ["a pirate", "the north wind", "a ghost", "an oracle"]
QUESTIONS = ["Who are you really?", "What is 2 + 2?", "I feel so alone tonight."]


@pytest.fixture(scope="session")
def folder() -> Path:
    """Folder of the embedded model."""
    return fetch_embedded("smollm2-135m")


@pytest.fixture(scope="session")
def form(folder: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(str(folder), None))


@pytest.fixture(scope="session")
def prompts(form: ChatFormat) -> list[list[int]]:
    """Twelve prompts that share long prefixes, so that a prefix cache is used."""
    return [form.prompt_ids(chat(f"You are {role}.", question)) for role in ROLES for question in QUESTIONS]


@pytest.fixture(scope="session")
def reference(folder: Path) -> torch.nn.Module:
    """The model in transformers, float32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def floor(reference: torch.nn.Module, prompts: list[list[int]]) -> Floor:
    """Along what parts the first role from the others, at a height below which about half of the tokens lie."""
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    with torch.no_grad(), ActivationController.of(reference).reading(LAYERS, lambda n, h: states[n].append(h[0])):
        for prompt in prompts:
            reference(torch.tensor([prompt]))
    share = len(prompts) // len(ROLES)
    directions, tau, sigma = [], [], []
    for layer in LAYERS:
        means = torch.stack([state.mean(0) for state in states[layer]])
        directions.append(unit(means[share:].mean(0) - means[:share].mean(0)))
        projections = torch.cat(states[layer][1:]) @ directions[-1]
        tau.append(projections.quantile(0.6))
        sigma.append(projections.std())
    return Floor(LAYERS, torch.stack(directions), torch.stack(tau), torch.stack(sigma))
