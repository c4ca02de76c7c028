"""The benign barrier: where nothing should change, the model is held to its frozen base.

On the answer tokens of benign rows

    B = w_k * sum_t KL(base_t || model_t) + w_a * AxisAnchor

with the KL over the whole vocabulary and the two-sided anchor of projections of :func:`~trimtab.losses.axis_anchor_terms`. SFT
and distillation have benign rows in their own batches; GRPO and DPO draw theirs beside them (:class:`BenignRows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trimtab.axis import ActivationController, Floor
from trimtab.axis.adapters import as_base
from trimtab.axis.head import OutputHead
from trimtab.losses import axis_anchor_terms, chunked_divergence
from trimtab.losses.axis_floor import projections
from trimtab.train.rollouts import RolloutSource
from trimtab.train.schedule import WithinStep, carried


@dataclass(frozen=True)
class BarrierOptions:
    """How the barrier is weighed.

    Attributes:
        kl_weight: weight of KL(base || model).
        axis_weight: weight of the anchor of projections.
    """

    kl_weight: float = 0.0
    axis_weight: float = 0.0

    def __bool__(self) -> bool:
        return self.kl_weight > 0 or self.axis_weight > 0


class BenignBarrier:
    """The barrier of one model in training.

    Args:
        model: a PeftModel, whose hooks are put on here if it has none.
        head: its output head.
        floor: whose projections the anchor holds; None leaves the anchor out.
        options: how it is weighed.
    """

    def __init__(self, model: Any, head: OutputHead, floor: Floor | None, options: BarrierOptions) -> None:
        self.options = options
        self.head = head
        self.floor = floor
        self._controller = ActivationController.of(model)

    def terms(self, model: Any, inputs: dict[str, Any], figures: dict[str, Tensor]) -> Tensor:
        """The weighted barrier, a sum over the labelled tokens.

        Args:
            model: the model as the trainer calls it.
            inputs: ``input_ids``, ``attention_mask``, ``labels``, [B, T].
            figures: gets ``benign_tokens``, ``benign_kl``, ``benign_axis``, sums over tokens.
        """
        mask = inputs["labels"].ne(-100)
        layers = self.floor.layers if self.floor is not None else ()
        with as_base(model, self._controller), self._controller.recording(layers) as recording:
            teacher = self.head.answer_states(model, inputs)
        before = {layer: recording.last(layer) for layer in layers}
        with self._controller.uncapped(), self._controller.recording(layers) as recording:
            student = self.head.answer_states(model, inputs)
        with self.head.gathered():
            divergence = chunked_divergence(student, teacher, self.head.logits)
        figures["benign_tokens"] = mask[:, 1:].sum().float()
        figures["benign_kl"] = divergence.detach()
        total = self.options.kl_weight * divergence
        if self.floor is not None:
            states = {layer: recording.last(layer) for layer in layers}
            moved = axis_anchor_terms(states, projections(before, self.floor), self.floor, mask)
            figures["benign_axis"] = moved.detach()
            total = total + self.options.axis_weight * moved
        return total


class BenignRows:
    """Benign rows for a trainer whose own batches have none, in an order that is fixed.

    A micro-batch gets ``rate`` of them over the run: a fraction is carried from one to the next, so that some have a row more
    than others, or one where others have none. All ranks have equally many, since benign rows take a forward of their own.

    Args:
        source: benign rows alone, dealt to the ranks one by one (``batch_size`` 1 of its plan).
        rate: rows a micro-batch of a rank; may be below 1.
        micro_batches: micro-batches of an optimiser step.
        pad_token_id: padding.
        pad_to_multiple_of: as of TRL's collator.
    """

    def __init__(
        self,
        source: RolloutSource,
        *,
        rate: float,
        micro_batches: int,
        pad_token_id: int,
        pad_to_multiple_of: int | None,
    ) -> None:
        assert source.plan.batch_size == 1
        self._source = source
        self.rate = rate
        self._micro_batches = micro_batches
        self._collate = DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self._drawn = WithinStep()

    def bind(self, trainer: Any) -> None:
        """Give the trainer whose base answers."""
        self._source.bind(trainer)

    def next(self, step: int, rank: int, ranks: int) -> dict[str, Any] | None:
        """The rows beside the next micro-batch of an optimiser step; None where it has none.

        Counted within the step, so that a resumed run draws the same rows.
        """
        before = step * self._micro_batches + self._drawn.next(step)
        numbers = range(carried(before, self.rate), carried(before + 1, self.rate))
        if not numbers:
            return None
        rows = self._source({"row": [number * ranks + rank for number in numbers]})
        batch: dict[str, Any] = self._collate(
            [
                {"input_ids": ids, "labels": labels}
                for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
            ]
        )
        return batch


class HeldToBase:
    """For trainers without benign rows of their own, beside TRL's class: draws some a micro-batch, and holds the model there.

    ``__init__`` of the trainer calls :meth:`hold_to_base`; its loss calls :meth:`draw_benign` and adds :meth:`benign_loss`.
    """

    barrier: BenignBarrier | None = None
    _benign_rows: BenignRows | None = None

    def hold_to_base(self, floor: Floor, options: BarrierOptions, rows: BenignRows | None) -> None:
        """Set the barrier up; without rows or weights there is none."""
        trainer: Any = self
        if rows is None or not options:
            return
        self.barrier = BenignBarrier(trainer.model, OutputHead(trainer.model), floor, options)
        self._benign_rows = rows
        rows.bind(trainer)

    def draw_benign(self) -> dict[str, Tensor] | None:
        """The benign rows beside the micro-batch that begins; None where there are none, and in evaluation.

        Drawn before the method's own forward: they may have to be sampled first, which would otherwise hold the cache of the
        sampling beside that forward's activations.
        """
        trainer: Any = self
        rows = self._benign_rows
        if self.barrier is None or rows is None or not trainer.model.training:
            return None
        accelerator = trainer.accelerator
        inputs = rows.next(trainer.state.global_step, accelerator.process_index, accelerator.num_processes)
        return None if inputs is None else {key: value.to(accelerator.device) for key, value in inputs.items()}

    def benign_loss(self, model: Any, inputs: dict[str, Tensor] | None, figures: dict[str, Tensor]) -> Tensor | None:
        """The barrier on the rows of :meth:`draw_benign`; None where there are none.

        It is a mean over their tokens, times their number over the usual one: so every row of the run weighs alike, however few a
        micro-batch has, and the weights mean the same for any share.
        """
        if inputs is None:
            return None
        assert self.barrier is not None and self._benign_rows is not None
        mean = self.barrier.terms(model, inputs, figures) / figures["benign_tokens"].clamp(min=1)
        return mean * (len(inputs["input_ids"]) / self._benign_rows.rate)
