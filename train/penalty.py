"""The floor penalty as a part that any trainer carries: what to record, what to add to the loss, what to log."""

# FloorTrainer stands beside a TRL trainer, whose methods its own call.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from trimtab.axis import ActivationController, Floor, Recording, UserError
from trimtab.axis.base_check import BaseRecord, check_adapters, check_base, record_base
from trimtab.axis.files import write_json
from trimtab.axis.hooks import decoder_layers_of
from trimtab.losses import axis_floor_terms, projections
from trimtab.recipes.methods import MethodSection
from trimtab.train.schedule import Schedule, scheduled
from trimtab.train.vllm_rollouts import VLLMRollouts

log = logging.getLogger("trimtab")

FLOOR_FILE = "floor.safetensors"


@dataclass(frozen=True)
class PenaltyOptions:
    """How the penalty is weighed.

    Attributes:
        weight: weight at step 0.
        schedule: how it is annealed over optimiser steps.
        target: ``absolute`` (tau), or ``base`` (the frozen base's own projection at that token).
        margin: keep this many sigma above the target.
    """

    weight: float = 0.7
    schedule: Schedule = "constant"
    target: Literal["absolute", "base"] = "absolute"
    margin: float = 0.0

    @classmethod
    def of(cls, method: MethodSection) -> PenaltyOptions:
        """How a recipe's method weighs it; of a method without keys, its defaults."""
        return cls(method.floor_weight, method.floor_schedule, method.floor_target, method.floor_margin)


class FloorPenalty:
    """The penalty of one model in training.

    Args:
        model: the model, whose hooks are put on here if it has none.
        floor: window, directions, tau and sigma.
        options: how it is weighed.

    Raises:
        UserError: if nothing that the penalty can reach is trainable.
    """

    def __init__(self, model: Any, floor: Floor, options: PenaltyOptions) -> None:
        self.floor = floor
        self.options = options
        self.controller = ActivationController.of(model)
        self._first_trained = check_reach(model, floor)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record the floor's layers in the learner's forward.

        The cap is off inside: in a capped forward the gradient along v is deleted wherever the cap fires.
        """
        with self.controller.uncapped(), self.controller.recording(self.floor.layers) as recording:
            yield recording

    def states(self, recording: Recording, *, policy_first: bool = False) -> dict[int, Tensor]:
        """The states that the penalty is computed on: the last that take part in autograd, where training can move them.

        Args:
            recording: of the forwards.
            policy_first: the policy's forward comes before the reference's. Nothing else tells them apart in evaluation, without
                gradient.
        """
        if policy_first and not torch.is_grad_enabled():
            return {layer: recording.first(layer) for layer in self.floor.layers}
        return {
            layer: recording.last(layer, with_grad=torch.is_grad_enabled() and layer >= self._first_trained)
            for layer in self.floor.layers
        }

    def base_projections(self, recording: Recording) -> Tensor:
        """Detached projections [L, B, T] of a forward of the base, recorded before."""
        return projections({layer: recording.last(layer) for layer in self.floor.layers}, self.floor)

    def weight_at(self, step: int, total: int) -> float:
        """Weight at an optimiser step."""
        return scheduled(self.options.weight, self.options.schedule, step, total)

    def terms(
        self,
        states: Mapping[int, Tensor],
        mask: Tensor,
        figures: dict[str, Tensor],
        *,
        base: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The unweighted penalty, a sum over tokens; its figures, sums over tokens too, go into ``figures``.

        Args:
            states: of :meth:`states`.
            mask: tokens that count, [B, T].
            figures: gets ``tokens``, ``floor_penalty``, ``floor_violation_rate``, ``floor_z/layer_<l>``.
            base: p0 [L, B, T] for the base-relative target.
            weights: factor of each token's penalty, [B, T], for trainers that weigh rows.
        """
        terms = axis_floor_terms(
            states, self.floor, mask, base_projections=base, margin=self.options.margin, weights=weights,
        )  # fmt: skip
        figures["tokens"] = terms.tokens.float()
        figures["floor_penalty"] = terms.unweighted
        figures["floor_violation_rate"] = terms.violations.mean()
        for i, layer in enumerate(self.floor.layers):
            figures[f"floor_z/layer_{layer}"] = terms.z_sum[i]
        return terms.penalty


class Figures:
    """Sums over tokens between two log lines, logged as means over all micro-batches and ranks.

    A figure whose name begins with ``benign`` is divided by ``benign_tokens``, any other by ``tokens``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}

    def add(self, mode: str, figures: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's sums."""
        sums = self._sums[mode]
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float()

    def flush(self, mode: str, accelerator: Any, metrics: Any) -> None:
        """Append the means to TRL's ``_metrics[mode]``, and begin anew."""
        names = sorted(self._sums[mode])  # the same on every rank, whose micro-batches are of the same kinds
        if not names:
            return
        sums = torch.stack([self._sums[mode][name].to(accelerator.device) for name in names])
        total = dict(zip(names, accelerator.reduce(sums, "sum").tolist(), strict=True))
        self._sums[mode].clear()
        for name in names:
            count = total.get("benign_tokens" if name.startswith("benign") else "tokens", 0.0)
            if name not in ("tokens", "benign_tokens") and count > 0:
                metrics[name].append(total[name] / count)


class FloorTrainer:
    """What the trainers of all methods do alike, beside TRL's class: log the floor's figures, save the floor with the adapter.

    TRL puts the adapter on. Before and after it the base is looked at: with the adapter off it must be what it was.

    A step's loss spans several forwards (the method's rows, and the benign ones). Under reentrant checkpointing each gives the
    same weights a gradient of its own, and ZeRO-3, which takes one a backward, stops at an assertion. TRL chooses reentrant for
    adapters under ZeRO-3; so non-reentrant is set again, unless ``gradient_checkpointing_kwargs`` asks for the other.
    """

    floor: Any  # a Floor; FloorSFTTrainer may have None
    vllm: VLLMRollouts | None = None  # samples the rollouts, where there is one
    _figures: Figures

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        asked = (getattr(kwargs.get("args"), "gradient_checkpointing_kwargs", None) or {}).get("use_reentrant", False)
        before = record_base(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, **kwargs)
        check_trained(self.model, before)  # type: ignore[attr-defined]
        settings = self.args.gradient_checkpointing_kwargs  # type: ignore[attr-defined]
        if settings is not None and "use_reentrant" in settings:
            settings["use_reentrant"] = asked

    @property
    def _mode(self) -> str:
        trainer: Any = self
        return "train" if trainer.model.training else "eval"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the floor's figures: means over the tokens of all micro-batches and ranks since the last log."""
        trainer: Any = self
        self._figures.flush(self._mode, trainer.accelerator, trainer._metrics[self._mode])
        if self.vllm is not None and self.vllm.distances:
            trainer._metrics[self._mode]["vllm/distance"] += self.vllm.distances
            self.vllm.distances.clear()
        super().log(logs, start_time)  # type: ignore[misc]

    def stop_on_nan(self, loss: Tensor, ids: Tensor) -> None:
        """Stop at a loss that is not finite, with the micro-batch written beside the checkpoints.

        One rank that stops ends the others too: the launcher sees to it.

        Args:
            loss: of this micro-batch.
            ids: its rows, [B, T].

        Raises:
            UserError: naming step, rank and file.
        """
        if bool(torch.isfinite(loss.detach()).all()):
            return
        trainer: Any = self
        step, rank = trainer.state.global_step, trainer.accelerator.process_index
        path = Path(trainer.args.output_dir) / f"not-finite-step-{step}-rank-{rank}.json"
        tokenizer = trainer.processing_class
        rows = [{"ids": row.tolist(), "text": tokenizer.decode(row, skip_special_tokens=True)} for row in ids]
        # NaN is no JSON
        write_json(path, {"step": step, "rank": rank, "loss": str(float(loss.detach())), "rows": rows})
        raise UserError(
            f"the loss is {float(loss.detach())} at step {step} on rank {rank}; the batch begins {rows[0]['text'][:200]!r}",
            file=path,
            key="train.learning_rate",
            remedy="lower train.learning_rate or method.floor_weight, or use dtype bfloat16 instead of float16; "
            "the batch is in the file, the last checkpoint is whole, and the same command resumes from it",
        )

    def most(self, number: int) -> int:
        """The largest of a number over all ranks, which all must call this."""
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())

    def end(self) -> None:
        """Give back what training holds beside the model: a colocated vLLM, then the process group."""
        if self.vllm is not None:
            self.vllm.close()
        trainer: Any = self
        trainer.accelerator.end_training()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        trainer: Any = self
        if trainer.args.should_save and self.floor is not None:
            self.floor.save(f"{output_dir or trainer.args.output_dir}/{FLOOR_FILE}")


def check_trained(model: Any, before: BaseRecord | None) -> None:
    """Check the adapter of a model in training, and that with it off the base is what it was; whole weights pass.

    Args:
        model: of the trainer.
        before: :func:`~trimtab.axis.base_check.record_base` of it, before the adapter was put on.

    Raises:
        UserError: naming the option or the weight.
    """
    if isinstance(model, PeftModel):
        check_adapters(model)
        check_base(model, before, key="lora", remedy="take options of lora that leave the base's weights alone")


def check_reach(model: Any, floor: Floor) -> int:
    """Check that the penalty reaches something trainable: a trainable weight at or below the deepest floor layer.

    Returns:
        The first layer whose output training can move; floor layers below it add a constant to the penalty.

    Raises:
        UserError: if all trainable weights lie above the floor.
    """
    layers = decoder_layers_of(model)
    deepest = floor.layers[-1]
    if deepest >= len(layers):
        raise UserError(
            f"floor layer {deepest} is beyond the model, whose layers are 0 to {len(layers) - 1}",
            key="floor.layers",
            remedy="use the floor of this very model",
        )
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    if not trained or trained[0] > deepest:
        raise UserError(
            f"no trainable weight lies at or below layer {deepest}, the deepest of the floor, so the penalty trains nothing",
            key="lora.layers_to_transform",
            remedy=f"include layers up to {deepest} (of {len(layers)})",
        )
    if trained[0] > floor.layers[0]:
        log.warning(
            "the adapters begin at layer %d: the floor's layers before it, from %d on, can't be moved",
            trained[0], floor.layers[0],
        )  # fmt: skip
    if trained[-1] > deepest:
        log.info(
            "the penalty's gradient ends at layer %d; adapters above it, up to layer %d, learn from the rest of the loss",
            deepest, trained[-1],
        )  # fmt: skip
    return trained[0]


def refuse_base_target(options: PenaltyOptions, method: str) -> None:
    """Refuse the base-relative target where a method has no forward of the base beside the learner's.

    Raises:
        UserError: if it is asked for.
    """
    if options.target == "base":
        raise UserError(
            f"the base-relative target is not available for {method}",
            key="method.floor_target",
            remedy="set method.floor_target=absolute",
        )
