"""``FloorDistillTrainer``: on-policy distillation from the capped self.

Teacher: the same weights with the adapter off and the cap on, in the same process; there is no second model in memory. Student:
the adapter, uncapped. On the answer tokens of drift rows

    L = w_d * sum_t D(student_t, teacher_t)/n + w_f * FloorPenalty/n + benign barrier

with D the forward KL, the reverse KL or the generalised JSD (losses/divergence.py). Rows are sampled by the student itself, by
the capped self, or by both in a stated share (:class:`~trimtab.train.rollouts.RolloutPlan`).
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor

from trimtab.axis import Floor, UserError
from trimtab.axis.adapters import as_base
from trimtab.losses import chunked_divergence
from trimtab.losses.divergence import CHUNK, Kind
from trimtab.train.floor_sft import FloorSFTTrainer, StepTokens


class FloorDistillTrainer(FloorSFTTrainer):
    """Distillation from the capped self, with the floor penalty and the benign barrier of :class:`FloorSFTTrainer`.

    Args:
        floor: the floor that caps the teacher.
        divergence: ``forward_kl``, ``reverse_kl`` or ``jsd``.
        jsd_beta: weight of the teacher in the mixture of ``jsd``.
        top_k: compare the teacher's K likeliest tokens and the rest as one; None compares the whole vocabulary.
        distill_weight: weight of the divergence.
        chunk: tokens whose logits are in memory at a time.
        **kwargs: :class:`FloorSFTTrainer`'s.

    Raises:
        UserError: if there is no adapter to switch off.
    """

    def __init__(
        self,
        *args: Any,
        floor: Floor,
        divergence: Kind = "reverse_kl",
        jsd_beta: float = 0.5,
        top_k: int | None = None,
        distill_weight: float = 3.0,
        chunk: int = CHUNK,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, floor=floor, **kwargs)
        if not isinstance(self.model, PeftModel):
            raise UserError(
                "the teacher is the model with its adapter off and the cap on, and there is no adapter",
                key="lora",
                remedy="train an adapter (lora section)",
            )
        self.divergence: Kind = divergence
        self.jsd_beta = jsd_beta
        self.top_k = top_k
        self.distill_weight = distill_weight
        self.chunk = chunk

    def _objective(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool,
        step: StepTokens,
        figures: dict[str, Tensor],
    ) -> Any:
        # Outside the recording of the learner's states only in name: the teacher's forward has no gradient, so the penalty,
        # which takes the last states with one, never sees it.
        with as_base(model, self.controller, self.floor):
            teacher = self.head.answer_states(model, inputs)
        student = self.head.answer_states(model, inputs)
        with self.head.gathered():
            terms = chunked_divergence(
                student,
                teacher,
                self.head.logits,
                self.divergence,
                jsd_beta=self.jsd_beta,
                top_k=self.top_k,
                chunk=self.chunk,
            )
        figures["tokens"] = inputs["labels"][:, 1:].ne(-100).sum().float()
        figures[f"distill_{self.divergence}"] = terms.detach()
        loss = self.distill_weight * step.mean(terms)
        return (loss, {}) if return_outputs else loss
