"""``FloorSFTTrainer``: TRL's SFTTrainer with the floor penalty and the benign barrier, at its documented points.

Loss of an optimiser step, with n tokens = labelled tokens over all micro-batches and ranks (``num_items_in_batch``):

    L = w_c * CE(drift)/n + w_f * FloorPenalty(drift)/n + w_k * sum KL(base || model)(benign)/n + w_a * AxisAnchor(benign)/n

Every sum is divided by the same n as TRL's own loss and multiplied by the number of processes as TRL does, so that gradient
accumulation, packing and the number of ranks don't change it.
"""

# The trainer's attributes are typed as unions of all that transformers supports; here they are a model and a tokenizer.
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis.adapters import as_base
from trimtab.axis.head import OutputHead
from trimtab.train.barrier import BarrierOptions, BenignBarrier
from trimtab.train.penalty import Figures, FloorPenalty, FloorTrainer, PenaltyOptions
from trimtab.train.rollouts import RolloutSource

log = logging.getLogger("trimtab")


class FloorCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also carries the column ``anchor`` (true for benign rows), and the numbers of rows yet to be made."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; ``anchor`` becomes a bool tensor [B], and examples of a ``row`` number alone a tensor ``row`` [B]."""
        if "row" in examples[0]:
            return {"row": torch.tensor([example["row"] for example in examples])}
        anchors = [bool(example.pop("anchor", False)) for example in examples]
        batch: dict[str, Any] = super().torch_call(examples)
        batch["anchor"] = torch.tensor(anchors)
        return batch


@dataclass(frozen=True)
class StepTokens:
    """What sums over tokens are divided by.

    Attributes:
        count: labelled tokens of the whole optimiser step, over all micro-batches and ranks.
        ranks: number of processes, over which DDP will average the gradients.
    """

    count: Tensor
    ranks: int

    def mean(self, total: Tensor) -> Tensor:
        """A micro-batch's sum as its part of the step's mean."""
        return total * (self.ranks / self.count)


class FloorSFTTrainer(FloorTrainer, SFTTrainer):
    """SFT with the floor penalty on drift rows and a barrier to the base model on benign rows.

    Args:
        floor: the floor; its window, directions, tau and sigma. None leaves penalty and axis anchor out.
        penalty: how the floor penalty is weighed; None: as in a recipe of SFT that does not say.
        ce_weight: weight of the cross-entropy on drift rows; 0 trains on the penalty alone.
        barrier: how the benign barrier is weighed.
        rollouts: makes the rows of a dataset of row numbers, its :meth:`~trimtab.train.rollouts.RolloutSource.dataset`; None
            where the dataset holds tokens.
        **kwargs: SFTTrainer's own.

    Raises:
        UserError: if nothing that the penalty can reach is trainable, or something needs the base and there is no adapter.
    """

    def __init__(
        self,
        *args: Any,
        floor: Floor | None,
        penalty: PenaltyOptions | None = None,
        ce_weight: float = 1.0,
        barrier: BarrierOptions | None = None,
        rollouts: RolloutSource | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rollouts = rollouts
        if rollouts is not None:
            rollouts.bind(self)
        options = penalty or PenaltyOptions()
        self.floor = floor
        self.penalty = None if floor is None else FloorPenalty(self.model, floor, options)
        self.ce_weight = ce_weight
        self.controller = ActivationController.of(self.model)
        self.head = OutputHead(self.model)
        self.barrier = BenignBarrier(self.model, self.head, floor, barrier or BarrierOptions())
        self._figures = Figures()
        self._told_of_no_answer = False
        needs_base = options.target == "base" or bool(self.barrier.options)
        if needs_base and not isinstance(self.model, PeftModel):
            raise UserError(
                "the base-relative floor and the benign barrier need the base model, which is the adapter switched off",
                key="lora",
                remedy="train an adapter (lora section), or set floor_target: absolute and the benign weights to 0",
            )

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Draw the micro-batches of an optimiser step.

        Row numbers become tokens here, so that a round is sampled with the weights of the step that begins: the data loader has
        looked a batch ahead. The step's labels are counted by what this returns, so later would be too late.
        """
        if self.rollouts is not None:
            epoch_iterator = map(self._made, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _made(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The rows of these numbers as a micro-batch."""
        assert self.rollouts is not None
        columns = self.rollouts({"row": batch["row"].tolist()})
        made: dict[str, Any] = self.data_collator(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        )
        return made

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
            count = torch.as_tensor(num_items_in_batch, device=mask.device)
            if not bool(count > 0):
                raise UserError(
                    f"the rows of step {self.state.global_step} have no answer tokens at all, so there is nothing to train on",
                    key="train.max_length",
                    remedy="raise train.max_length above the longest prompt, or mend the rows without an answer",
                )
        step = StepTokens(count, ranks)
        loss: Tensor | None = None
        outputs: Any = None
        figures: dict[str, Tensor] = {}
        if drift is not None:
            result = self._drift_loss(model, drift, return_outputs, step, figures)
            loss, outputs = result if return_outputs else (result, None)
        if benign is not None:
            barrier = step.mean(self.barrier.terms(model, benign, figures))
            loss = barrier if loss is None else loss + barrier
        assert loss is not None
        self.stop_on_nan(loss, inputs["input_ids"])
        self._figures.add(self._mode, figures)
        return (loss, outputs) if return_outputs else loss

    def _drift_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool,
        step: StepTokens,
        figures: dict[str, Tensor],
    ) -> Any:
        """The method's own loss plus the weighted penalty, both as means over the step; with outputs if asked for."""
        if self.penalty is None:
            return self._objective(model, inputs, return_outputs, step, figures)
        mask = inputs["labels"].ne(-100)
        if not bool(mask.any()) and not self._told_of_no_answer:
            self._told_of_no_answer = True
            log.warning(
                "step %d: a micro-batch has no answer tokens, and trains nothing: prompts that fill train.max_length, or empty "
                "answers (told once)",
                self.state.global_step,
            )
        base = self._base_projections(model, inputs) if self.penalty.options.target == "base" else None
        with self.penalty.recording() as recording:
            result = self._objective(model, inputs, return_outputs, step, figures)
            states = self.penalty.states(recording)
        loss, outputs = result if return_outputs else (result, None)
        terms = self.penalty.terms(states, mask, figures, base=base)
        weight = self.penalty.weight_at(self.state.global_step, self.state.max_steps)
        if weight:
            loss = loss + weight * step.mean(terms)
        return (loss, outputs) if return_outputs else loss

    def _objective(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool,
        step: StepTokens,
        figures: dict[str, Tensor],
    ) -> Any:
        """Cross-entropy, as TRL computes it."""
        result = super().compute_loss(model, inputs, return_outputs, step.count)
        if self.ce_weight == 1.0:
            return result
        return (self.ce_weight * result[0], result[1]) if return_outputs else self.ce_weight * result

    def _base_projections(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        assert self.penalty is not None
        with as_base(model, self.controller), self.controller.recording(self.penalty.floor.layers) as recording:
            self.head.final_states(model, inputs)
        return self.penalty.base_projections(recording)


def _rows(inputs: dict[str, Any], keep: Tensor) -> dict[str, Any] | None:
    """The rows of a padded batch where ``keep`` [B] is true, or None where there are none."""
    if not bool(keep.any()):
        return None
    return {
        key: value[keep] if isinstance(value, Tensor) and value.shape[:1] == keep.shape else value
        for key, value in inputs.items()
    }
