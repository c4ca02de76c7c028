"""``FloorDPOTrainer``: TRL's DPOTrainer with the floor penalty, on pairs whose chosen answer is the capped self's.

The penalty of a batch is a mean over its answers of each answer's mean over tokens, as DPO's own loss is a mean over pairs:
gradient accumulation and ranks don't change it.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from trimtab.axis import Floor
from trimtab.train.barrier import BarrierOptions, BenignRows, HeldToBase
from trimtab.train.penalty import Figures, FloorPenalty, FloorTrainer, PenaltyOptions, refuse_base_target


class FloorDPOTrainer(HeldToBase, FloorTrainer, DPOTrainer):
    """DPO with the axis-floor penalty on both answers of a pair.

    Args:
        floor: window, directions, tau and sigma.
        penalty: how the penalty is weighed; the target is absolute.
        barrier: how the benign barrier is weighed.
        benign_rows: the rows that it is on; None leaves it out.
        **kwargs: DPOTrainer's own.

    Raises:
        UserError: if nothing that the penalty can reach is trainable.
    """

    def __init__(
        self,
        *args: Any,
        floor: Floor,
        penalty: PenaltyOptions | None = None,
        barrier: BarrierOptions | None = None,
        benign_rows: BenignRows | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.floor = floor
        self.penalty = FloorPenalty(self.model, floor, penalty or PenaltyOptions())
        self._figures = Figures()
        refuse_base_target(self.penalty.options, "dpo")
        self.hold_to_base(floor, barrier or BarrierOptions(), benign_rows)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's loss plus the penalty and the barrier. The reference's forward has no gradient, so its states are never taken."""
        mask = inputs["completion_mask"]
        with self.penalty.recording() as recording:
            result = super()._compute_loss(model, inputs, return_outputs)
            states = self.penalty.states(recording)
        loss, outputs = result if return_outputs else (result, None)
        figures: dict[str, Tensor] = {}
        rows = mask / (mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[0])
        terms = self.penalty.terms(states, mask, figures, weights=rows)
        weight = self.penalty.weight_at(self.state.global_step, self.state.max_steps)
        if weight:
            loss = loss + weight * terms
        if (barrier := self.benign_loss(model, figures)) is not None:
            loss = loss + barrier
        self.stop_on_nan(loss, inputs["input_ids"])
        self._figures.add(self._mode, figures)
        return (loss, outputs) if return_outputs else loss
