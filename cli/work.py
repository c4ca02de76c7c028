"""How long a recipe would take on GPUs: an estimate from what is computed and what is read, nothing that was measured.

Training counts the forwards of every method; sampling is bound by reading the weights once a token, by gathering them where they
are sharded, or by the launches of its kernels, whichever is slowest. Judges, prompts and the floor's calibration are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trimtab.eval.capability import tasks_of
from trimtab.recipes.schema import DpoMethod, GrpoMethod, Recipe

# One H100 SXM, by its data sheet: bfloat16 FLOP/s, memory B/s, NVLink B/s one way; and what share of each is reached.
FLOPS, MEMORY, LINK = 989e12, 3.35e12, 450e9
REACHED_FLOPS, REACHED_MEMORY, REACHED_LINK = 0.35, 0.6, 0.5
LAUNCH = 0.6e-3  # seconds a decoder layer and token, of a Python loop that launches its kernels
QUANTIZED = {"nf4": 0.55, "int8": 1.05}  # bytes a weight, with its scales
PROMPT = 200  # tokens of a prompt, about: a role, a question, or a conversation so far
DOCUMENTS, ANSWER = 400, 256  # of a capability task without a limit, and the tokens that it has answered


@dataclass(frozen=True)
class Work:
    """Seconds of each part of a job.

    Attributes:
        before: axis and pairs, on one GPU.
        rollouts: in training, on all.
        steps: forwards and backwards of training, on all.
        after: the evaluation, on one.
        processes: GPUs in training.
    """

    before: float
    rollouts: float
    steps: float
    after: float
    processes: int

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole job, the stages on one GPU counted as one."""
        return (self.before + self.after + (self.rollouts + self.steps) * self.processes) / 3600


def active_parameters(parameters: int, config: Any) -> float:
    """Parameters that a token passes through: of a mixture of experts, those of the chosen ones.

    Args:
        parameters: of the whole model.
        config: of the text decoder.
    """
    experts, chosen = getattr(config, "num_experts", None), getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen:
        return parameters
    each = 3 * config.hidden_size * config.moe_intermediate_size
    return float(parameters - each * (experts - chosen) * config.num_hidden_layers)


def estimate_work(recipe: Recipe, parameters: int, config: Any, *, sharded: bool, processes: int) -> Work:
    """Seconds of each part of a job on H100s.

    Args:
        recipe: the recipe.
        parameters: of the whole model.
        config: of the text decoder.
        sharded: whether training holds the weights in shards.
        processes: GPUs in training.
    """
    train, method, section = recipe.train, recipe.method, recipe.eval
    active = active_parameters(parameters, config)
    weights = parameters * QUANTIZED.get(recipe.model.quantization or "", 2)

    def sampling(answers: float, tokens: int, batch: int, *, alone: bool) -> float:
        """Seconds to sample so many answers, on one GPU with the whole model or on all."""
        ranks = 1 if alone else processes
        gathered = 0.0 if alone or not sharded else weights / (LINK * REACHED_LINK)
        read = weights / (MEMORY * REACHED_MEMORY)  # a batch of many rows meets nearly every expert
        computed = 2 * active * batch / (FLOPS * REACHED_FLOPS)
        token = max(read, gathered, computed, LAUNCH * int(config.num_hidden_layers))
        return math.ceil(answers / (batch * ranks)) * tokens * token

    axis = recipe.axis
    told = (axis.roles + axis.held_out_roles + axis.default_repeats) * axis.questions
    before = sampling(told, axis.sampling.max_new_tokens, axis.sampling.batch_size, alone=True)
    micro = int(train.get("per_device_train_batch_size", 8))
    accumulation = int(train.get("gradient_accumulation_steps", 1))
    steps = int(train.get("max_steps", 0))
    rows = micro * accumulation * processes * steps
    if isinstance(method, GrpoMethod):
        said = int(train.get("max_completion_length") or 256)
        rollouts = sampling(rows, said, min(method.sampling_batch, micro * accumulation), alone=False)
    elif isinstance(method, DpoMethod):
        said = method.sampling.max_new_tokens
        rollouts = 0.0
        prompts = recipe.data.drift_prompts + recipe.data.role_questions * axis.roles
        before += 2 * sampling(prompts, said, method.sampling.batch_size, alone=True)
    else:
        said = method.sampling.max_new_tokens
        in_round = micro * accumulation * min(method.regenerate_every, steps)
        rollouts = sampling(rows, said, min(method.sampling.batch_size, max(in_round, 1)), alone=False)
    passes = _passes(recipe)
    seconds = 2 * active * rows * (PROMPT + said) * passes / (processes * FLOPS * REACHED_FLOPS)
    if sharded:
        seconds = max(seconds, steps * accumulation * passes * weights / (LINK * REACHED_LINK))
    arms = 3 + section.tuned_cap + section.control
    answers = (
        section.roles * section.questions + section.benign + section.professional
        + section.conversations * section.turns + section.reextract_roles * section.reextract_questions
        + 3 * section.susceptibility_roles + 2 * section.boundary_probes
    )  # fmt: skip
    after = arms * sampling(answers, section.sampling.max_new_tokens, section.sampling.batch_size, alone=True)
    for task in tasks_of(section.capability, section.capability_limit):
        documents = task.limit or DOCUMENTS
        after += arms * sampling(documents, ANSWER, section.capability_batch, alone=True)
    return Work(before, rollouts, seconds, after, processes)


def _passes(recipe: Recipe) -> float:
    """Forwards a row of training costs, a backward counted as two."""
    method, train = recipe.method, recipe.train
    learner = 4.0 if train.get("gradient_checkpointing", True) else 3.0
    benign = recipe.data.benign_share if method.benign_kl_weight or method.benign_axis_weight else 0.0
    if isinstance(method, GrpoMethod):
        reference = 1.0 if train.get("beta", 0.0) else 0.0
        return learner + 2.0 + reference + 2.0 * len(method.rewards) + benign * (learner + 1.0)
    if isinstance(method, DpoMethod):  # chosen and rejected
        return 2 * (learner + 1.0) + benign * (2 * learner + 1.0)
    teacher = (1.0 - recipe.data.benign_share) if method.name == "distill" else 0.0
    return learner + teacher + benign
