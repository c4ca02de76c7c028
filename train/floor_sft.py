"""``FloorSFTTrainer``: TRL's SFTTrainer with the axis-floor penalty and the benign barrier, at its documented points.

Loss of an optimiser step, with n tokens = labelled tokens over all micro-batches and ranks (``num_items_in_batch``):

    L = CE(drift)/n + w_f * FloorPenalty(drift)/n + w_k * sum KL(base || model)(benign)/n + w_a * AxisAnchor(benign)/n

Every sum is divided by the same n as TRL's own loss and multiplied by the number of processes as TRL does, so that gradient
accumulation, packing and the number of ranks don't change it.
"""

# The trainer's attributes are typed as unions of all that transformers supports; here they are a model and a tokenizer.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis.layers import find_decoder_layers
from trimtab.losses import axis_anchor_terms, axis_floor_terms, kl_terms, projections
from trimtab.losses.axis_floor import Shape
from trimtab.train.schedule import Schedule, scheduled

log = logging.getLogger("trimtab")

FLOOR_FILE = "floor.safetensors"


class FloorCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also carries the column ``anchor`` (true for benign rows)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; ``anchor`` becomes a bool tensor [B]."""
        anchors = [bool(example.pop("anchor", False)) for example in examples]
        batch: dict[str, Any] = super().torch_call(examples)
        batch["anchor"] = torch.tensor(anchors)
        return batch


class FloorSFTTrainer(SFTTrainer):
    """SFT with the axis-floor penalty on drift rows and a barrier to the base model on benign rows.

    Args:
        floor: the floor; its window, directions, tau and sigma. None leaves the penalty out.
        floor_weight: weight of the penalty at step 0.
        floor_schedule: how the weight is annealed over optimiser steps.
        floor_target: ``absolute`` (tau), or ``base`` (the frozen base's own projection at that token).
        floor_margin: keep this many sigma above the target.
        floor_shape: ``squared`` or ``huber``.
        benign_kl_weight: weight of KL(base || model) on benign rows, over the whole vocabulary.
        benign_axis_weight: weight of the two-sided anchor of projections on benign rows.
        **kwargs: SFTTrainer's own.

    Raises:
        UserError: if nothing that the penalty can reach is trainable, or something needs the base and there is no adapter.
    """

    def __init__(
        self,
        *args: Any,
        floor: Floor | None,
        floor_weight: float = 0.5,
        floor_schedule: Schedule = "constant",
        floor_target: str = "absolute",
        floor_margin: float = 0.0,
        floor_shape: Shape = "squared",
        benign_kl_weight: float = 0.0,
        benign_axis_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.floor = floor
        self.floor_weight = floor_weight if floor is not None else 0.0
        self.floor_schedule: Schedule = floor_schedule
        self.floor_target = floor_target
        self.floor_margin = floor_margin
        self.floor_shape: Shape = floor_shape
        self.benign_kl_weight = benign_kl_weight
        self.benign_axis_weight = benign_axis_weight if floor is not None else 0.0
        self._figures: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self.controller = ActivationController.of(self.model)
        if floor is not None:
            self._first_trained = check_reach(self.model, floor)
        if not isinstance(self.model, PeftModel) and (floor_target == "base" or benign_kl_weight or benign_axis_weight):
            raise UserError(
                "the base-relative floor and the benign barrier need the base model, which is the adapter switched off",
                key="lora",
                remedy="train an adapter (lora section), or set floor_target: absolute and the benign weights to 0",
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss on drift rows, plus penalty and barrier. See the module's formula."""
        anchor = inputs.pop("anchor", None)
        mask = inputs["labels"].ne(-100)
        drift: dict[str, Any] | None = inputs
        benign: dict[str, Any] | None = None
        if anchor is not None and bool(anchor.any()):
            drift, benign = _rows(inputs, ~anchor), _rows(inputs, anchor)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if num_items_in_batch is None:
            # evaluation: a mean over this very batch, so the factor of ranks is taken out again
            count = mask[..., 1:].sum().clamp(min=1) * ranks
        else:
            count = torch.as_tensor(num_items_in_batch, device=mask.device).clamp(min=1)
        scale = ranks / count
        loss: Tensor | None = None
        outputs: Any = None
        figures: dict[str, Tensor] = {}
        if drift is not None:
            result, floor_sum = self._drift_loss(model, drift, return_outputs, count, figures)
            loss, outputs = result if return_outputs else (result, None)
            if floor_sum is not None:
                loss = loss + floor_sum * scale
        if benign is not None:
            barrier = self._benign_loss(model, benign, figures) * scale
            loss = barrier if loss is None else loss + barrier
        assert loss is not None
        self._stop_on_nan(loss, inputs)
        self._add_figures(figures)
        return (loss, outputs) if return_outputs else loss

    def _drift_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool, count: Tensor, figures: dict[str, Tensor]
    ) -> tuple[Any, Tensor | None]:
        if self.floor is None:
            return super().compute_loss(model, inputs, return_outputs, count), None
        mask = inputs["labels"].ne(-100)
        if not bool(mask.any()):
            raise UserError(
                "a batch has no answer tokens at all, so there is nothing to train on",
                key="train.max_length",
                remedy="raise train.max_length above the longest prompt, or mend the rows without an answer",
            )
        base = self._base_projections(model, inputs) if self.floor_target == "base" else None
        # The cap is off here: inside a capped forward the gradient along v is deleted wherever the cap fires.
        with self.controller.uncapped(), self.controller.recording(self.floor.layers) as recording:
            result = super().compute_loss(model, inputs, return_outputs, count)
            states = {
                layer: recording.last(layer, with_grad=torch.is_grad_enabled() and layer >= self._first_trained)
                for layer in self.floor.layers
            }
        terms = axis_floor_terms(
            states, self.floor, mask, base_projections=base, margin=self.floor_margin, shape=self.floor_shape
        )
        weight = scheduled(self.floor_weight, self.floor_schedule, self.state.global_step, self.state.max_steps)
        figures["tokens"] = terms.tokens.float()
        figures["floor_penalty"] = terms.penalty.detach()
        figures["floor_violation_rate"] = terms.violations.mean()
        for i, layer in enumerate(self.floor.layers):
            figures[f"floor_z/layer_{layer}"] = terms.z_sum[i]
        return result, weight * terms.penalty if weight else None

    def _forward(self, model: Any, inputs: dict[str, Any], positions: int) -> Tensor:
        """Logits of the last ``positions`` positions: the vocabulary is wide, and prompts need none."""
        kept = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
        logits: Tensor = model(**kept, use_cache=False, logits_to_keep=positions).logits
        return logits

    @contextlib.contextmanager
    def _as_base(self, model: Any) -> Any:
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad(), unwrapped.disable_adapter(), self.controller.uncapped():
            yield

    def _base_projections(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        assert self.floor is not None
        with self._as_base(model), self.controller.recording(self.floor.layers) as recording:
            self._forward(model, inputs, 1)
            return projections({layer: recording.last(layer) for layer in self.floor.layers}, self.floor)

    def _benign_loss(self, model: Any, inputs: dict[str, Any], figures: dict[str, Tensor]) -> Tensor:
        mask = inputs["labels"].ne(-100)
        first = int(mask.any(0).nonzero()[0]) if bool(mask.any()) else mask.shape[1] - 1
        predicted = mask[:, first:]  # the logits before position t predict token t
        positions = predicted.shape[1] + 1
        layers = self.floor.layers if self.floor is not None else ()
        with self._as_base(model), self.controller.recording(layers) as recording:
            teacher = self._forward(model, inputs, positions)[:, :-1][predicted]
            base = projections({layer: recording.last(layer) for layer in layers}, self.floor) if self.floor else None
        with self.controller.uncapped(), self.controller.recording(layers) as recording:
            student = self._forward(model, inputs, positions)[:, :-1][predicted]
            states = {layer: recording.last(layer) for layer in layers}
        divergence = kl_terms(student, teacher).sum()
        figures["benign_tokens"] = mask[:, 1:].sum().float()
        figures["benign_kl"] = divergence.detach()
        total = self.benign_kl_weight * divergence
        if self.floor is not None and base is not None:
            moved = axis_anchor_terms(states, base, self.floor, mask)
            figures["benign_axis"] = moved.detach()
            total = total + self.benign_axis_weight * moved
        return total

    def _stop_on_nan(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        if not bool(torch.isfinite(loss.detach()).all()):
            text = self.processing_class.decode(inputs["input_ids"][0], skip_special_tokens=True)[:200]
            raise UserError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step}; the batch begins {text!r}",
                key="train.learning_rate",
                remedy="lower train.learning_rate or method.floor_weight, or use dtype bfloat16 instead of float16; "
                "the last checkpoint is whole and the same command resumes from it",
            )

    def _add_figures(self, figures: dict[str, Tensor]) -> None:
        sums = self._figures["train" if self.model.training else "eval"]
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the floor's figures: means over the tokens of all micro-batches and ranks since the last log."""
        mode = "train" if self.model.training else "eval"
        names = sorted(self._figures[mode])  # the same on every rank, whose micro-batches are of the same kinds
        if names:
            sums = torch.stack([self._figures[mode][name].to(self.accelerator.device) for name in names])
            total = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
            self._figures[mode].clear()
            for name in names:
                count = total.get("benign_tokens" if name.startswith("benign") else "tokens", 0.0)
                if name not in ("tokens", "benign_tokens") and count > 0:
                    self._metrics[mode][name].append(total[name] / count)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.floor is not None:
            self.floor.save(f"{output_dir or self.args.output_dir}/{FLOOR_FILE}")


def _rows(inputs: dict[str, Any], keep: Tensor) -> dict[str, Any] | None:
    """The rows of a padded batch where ``keep`` [B] is true, or None where there are none."""
    if not bool(keep.any()):
        return None
    return {
        key: value[keep] if isinstance(value, Tensor) and value.shape[:1] == keep.shape else value
        for key, value in inputs.items()
    }


def check_reach(model: Any, floor: Floor) -> int:
    """Check that the penalty reaches something trainable: a trainable weight at or below the deepest floor layer.

    Returns:
        The first layer whose output training can move; floor layers below it add a constant to the penalty.

    Raises:
        UserError: if all trainable weights lie above the floor.
    """
    layers = find_decoder_layers(model)
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
    return trained[0]
