"""How long a recipe would take on GPUs: an estimate from what is computed and what is read, nothing that was measured.

The calls and rows are those that the stages will make (:mod:`trimtab.cli.calls`), each answer at its greatest length. A token is
bound by reading the weights, by gathering them where they are sharded, or by the launches of its kernels, whichever is slowest.
Judges and the forwards that score finished answers are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.cli.calls import Call, Counted
from trimtab.recipes.schema import Recipe

# One H100 SXM, by its data sheet: bfloat16 FLOP/s, memory B/s, NVLink B/s one way; and what share of each is reached.
FLOPS, MEMORY, LINK = 989e12, 3.35e12, 450e9
REACHED_FLOPS, REACHED_MEMORY, REACHED_LINK = 0.35, 0.6, 0.5
LAUNCH = 0.6e-3  # seconds a decoder layer and token, of a Python loop that launches its kernels
QUANTIZED = {"nf4": 0.55, "int8": 1.05}  # bytes a weight, with its scales


@dataclass(frozen=True)
class Work:
    """Seconds of each part of a job.

    Attributes:
        before: axis and pairs, on one GPU.
        rollouts: in training, on all.
        steps: forwards and backwards of training, on all.
        after: the evaluation, on one, but for its capability tasks.
        capability: those, on one; most of their answers end long before their limit.
        processes: GPUs in training.
    """

    before: float
    rollouts: float
    steps: float
    after: float
    capability: float
    processes: int

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole job, the stages on one GPU counted as one."""
        return (self.before + self.after + self.capability + (self.rollouts + self.steps) * self.processes) / 3600


@dataclass(frozen=True)
class Speed:
    """What a model costs on one H100.

    Attributes:
        active: parameters that a token passes through.
        weights: bytes of all weights.
        layers: decoder layers.
        gathered: whether each token's weights are gathered from other GPUs.
    """

    active: float
    weights: float
    layers: int
    gathered: bool = False

    def seconds(self, calls: Iterable[Call]) -> float:
        """Seconds of calls of ``generate``, one after another."""
        return sum(self._prefill(call) + call.steps * self._token(call.rows) for call in calls)

    def _computed(self, tokens: float) -> float:
        return 2 * self.active * tokens / (FLOPS * REACHED_FLOPS)

    def _gathering(self) -> float:
        return self.weights / (LINK * REACHED_LINK) if self.gathered else 0.0

    def _prefill(self, call: Call) -> float:
        return max(self._computed(call.rows * call.prompt), self._gathering(), LAUNCH * self.layers)

    def _token(self, rows: int) -> float:
        read = self.weights / (MEMORY * REACHED_MEMORY)  # a batch of many rows meets nearly every expert
        return max(read, self._gathering(), self._computed(rows), LAUNCH * self.layers)


def estimate_work(
    recipe: Recipe, counted: Counted, parameters: int, active: float, layers: int, *, sharded: bool, processes: int
) -> Work:
    """Seconds of each part of a job on H100s.

    Args:
        recipe: the recipe.
        counted: what it calls and trains.
        parameters: of the whole model.
        active: of them those that a token passes through.
        layers: decoder layers.
        sharded: whether training holds the weights in shards.
        processes: GPUs in training.
    """
    weights = parameters * QUANTIZED.get(recipe.model.quantization or "", 2)
    alone, together = Speed(active, weights, layers), Speed(active, weights, layers, gathered=sharded)
    forwards = _forwards(recipe)
    tokens = counted.trained.tokens * forwards + counted.trained.benign * _benign_forwards(recipe)
    steps = 2 * active * tokens / (processes * FLOPS * REACHED_FLOPS)
    if sharded:
        steps = max(steps, counted.micro_batches * forwards * weights / (LINK * REACHED_LINK))
    return Work(
        alone.seconds(counted.before),
        together.seconds(counted.rollouts),
        steps,
        alone.seconds(counted.after),
        alone.seconds(counted.capability),
        processes,
    )


def _learner(recipe: Recipe) -> float:
    """Forwards of a row that is learnt from, its backward counted as two, and one more where activations are made anew."""
    return 4.0 if recipe.train.get("gradient_checkpointing", True) else 3.0


def _forwards(recipe: Recipe) -> float:
    """Forwards that a row of the method's own costs."""
    return _learner(recipe) + recipe.method.forwards_beside(recipe.train)


def _benign_forwards(recipe: Recipe) -> float:
    """Forwards that a benign row costs: the learner's, and the base's."""
    return _learner(recipe) + 1.0
