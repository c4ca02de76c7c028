"""``FloorDPOTrainer``: TRL's DPOTrainer with the floor penalty, on pairs whose chosen answer is the capped self's.

The penalty of a batch is a mean over its answers of each answer's mean over tokens, as DPO's own loss is a mean over pairs:
gradient accumulation and ranks don't change it.

Pairs become tokens as they were sampled: by the chat format with its arguments, a system prompt folded where the template has no
such role, and an end of turn only where the answer ended. TRL's own way renders every answer as ended, so that the chosen one
teaches to stop in mid-sentence.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
from typing import Any

import datasets
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from trimtab.axis import Floor
from trimtab.axis.chat import ChatFormat
from trimtab.train.barrier import BarrierOptions, BenignRows, HeldToBase
from trimtab.train.penalty import Figures, FloorPenalty, FloorTrainer, PenaltyOptions, refuse_base_target
from trimtab.train.rollouts import IGNORED, tokens_of

log = logging.getLogger("trimtab")


class FloorDPOTrainer(HeldToBase, FloorTrainer, DPOTrainer):
    """DPO with the axis-floor penalty on both answers of a pair.

    Args:
        floor: window, directions, tau and sigma.
        form: chat format, by which rows of :func:`~trimtab.train.pairs.make_pairs` become tokens; None leaves that to TRL.
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
        form: ChatFormat | None = None,
        penalty: PenaltyOptions | None = None,
        barrier: BarrierOptions | None = None,
        benign_rows: BenignRows | None = None,
        **kwargs: Any,
    ) -> None:
        self.form = form  # which the datasets are prepared with
        super().__init__(*args, **kwargs)
        self.floor = floor
        self.penalty = FloorPenalty(self.model, floor, penalty or PenaltyOptions())
        self._figures = Figures()
        refuse_base_target(self.penalty.options, "dpo")
        self.hold_to_base(floor, barrier or BarrierOptions(), benign_rows)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows of tokens, as TRL's collator takes them; a prompt that fills ``max_length`` by itself is left out, and told."""
        if self.form is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        rows = [pair_tokens(self.form, row) for row in dataset]
        longest = args.max_length if args.truncation_mode == "keep_start" else None
        kept = [row for row in rows if longest is None or len(row["prompt_ids"]) < longest]
        if len(kept) < len(rows):
            log.warning(
                "%d of %d pairs are left out: their prompts alone fill train.max_length=%d",
                len(rows) - len(kept), len(rows), args.max_length,
            )  # fmt: skip
        return datasets.Dataset.from_list(kept)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's loss plus the penalty and the barrier. The reference's forward has no gradient, so its states are never taken."""
        mask = inputs["completion_mask"]
        with self.penalty.recording() as recording:
            result = super()._compute_loss(model, inputs, return_outputs)
            states = self.penalty.states(recording, policy_first=True)
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


def pair_tokens(form: ChatFormat, row: dict[str, Any]) -> dict[str, list[int]]:
    """Tokens of a pair's prompt and of its two answers, each with its end of turn if it ended (as all do that don't say)."""
    found = {"prompt_ids": form.prompt_ids(row["prompt"])}
    for side in ("chosen", "rejected"):
        answer, ended = row[side][0]["content"], row.get(f"{side}_ended", True)
        ids, labels = tokens_of(form, row["prompt"], answer, ended, None)
        found[f"{side}_ids"] = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return found
