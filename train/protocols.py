"""What a training job takes of TRL's configs and trainers: by these types a method plugs in. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Spread(Protocol):
    """How rows are spread over steps and processes."""

    @property
    def per_device_train_batch_size(self) -> int:
        """Rows of a micro-batch."""
        ...

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        ...

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the run."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...


class Generations(Spread, Protocol):
    """How the completions of conversations are spread over generations; TRL fills in what is None."""

    @property
    def generation_batch_size(self) -> int | None:
        """Completions of a generation, over all processes."""
        ...

    @property
    def num_generations(self) -> int | None:
        """Completions of a prompt."""
        ...


class TrainingArguments(Spread, Protocol):
    """A config of TRL's, of any method."""

    report_to: Any
    push_to_hub: bool
    torch_compile: bool
    torch_compile_backend: Any
    use_cpu: bool

    @property
    def mixed_precision(self) -> str:
        """What accelerate computes in."""
        ...


class Trainer(Protocol):
    """A trainer of TRL's or transformers' own, as a job drives it."""

    model: Any
    state: Any
    accelerator: Any
    args: Any
    is_deepspeed_enabled: Any

    def add_callback(self, callback: Any) -> None:
        """Have a callback told of the training's events."""
        ...

    def train(self, resume_from_checkpoint: Any = None) -> Any:
        """Train to the last step."""
        ...

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter."""
        ...

    def end(self) -> None:
        """Give back what it holds, the process group last."""
        ...


class Toy(NamedTuple):
    """What a rehearsal trains for a step.

    Attributes:
        kind: TRL's own trainer of the method.
        row: of its data set; words are those of the rehearsal's tokenizer.
        beside: what the trainer takes besides.
    """

    kind: Callable[..., Any]
    row: dict[str, Any]
    beside: dict[str, Any]
