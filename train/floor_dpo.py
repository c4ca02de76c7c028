"""``FloorDPOTrainer``: TRL's DPOTrainer with the floor penalty, on pairs whose chosen answer is the capped self's.

The penalty of a batch is a mean over its answers of each answer's mean over tokens, as DPO's own loss is a mean over pairs:
gradient accumulation and ranks don't change it.

Pairs become tokens as they were sampled: by the chat format with its arguments, a system prompt folded where the template has no
such role, an answer's own tokens, and an end of turn only where it ended. TRL's own way renders every answer as ended, so that
the chosen one teaches to stop in mid-sentence, and cuts what is too long at the end.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
from typing import Any

import datasets
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from trimtab.axis import Floor, UserError
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.playing import recent_turns
from trimtab.recipes.methods import DpoMethod
from trimtab.train.barrier import BarrierOptions, BenignRows, HeldToBase
from trimtab.train.penalty import Figures, FloorPenalty, FloorTrainer, PenaltyOptions, refuse_base_target
from trimtab.train.rollouts import answer_tokens

log = logging.getLogger("trimtab")


class FloorDPOTrainer(HeldToBase, FloorTrainer, DPOTrainer):
    """DPO with the floor penalty on both answers of a pair.

    Args:
        floor: window, directions, tau and sigma.
        form: chat format, by which rows of :func:`~trimtab.train.pairs.make_pairs` become tokens; None leaves that to TRL.
        penalty: how the penalty is weighed, its target absolute; None: as in a recipe of DPO that does not say.
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
        self.penalty = FloorPenalty(self.model, floor, penalty or PenaltyOptions.of(DpoMethod(name="dpo")))
        self._figures = Figures()
        refuse_base_target(self.penalty.options, "dpo")
        self.hold_to_base(floor, barrier or BarrierOptions(), benign_rows)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows of tokens, as TRL's collator takes them, none longer than ``max_length``: its truncation would cut answers.

        Pairs whose last turn alone is too long are left out, and told.

        Raises:
            UserError: if none is left.
        """
        if self.form is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        longest = args.max_length
        rows = [pair_tokens(self.form, row, longest) for row in dataset]
        kept = [row for row in rows if longest is None or _length(row) <= longest]
        if shortened := sum(row["turns_dropped"] > 0 for row in kept):
            log.info(
                "%d of %d pairs are without their oldest turns, which train.max_length=%s does not hold",
                shortened, len(kept), longest,
            )  # fmt: skip
        if not kept:
            raise UserError(
                f"no pair fits in {longest} tokens",
                key="train.max_length",
                remedy=f"set train.max_length={max(map(_length, rows), default=0)}, and all do",
            )
        if len(kept) < len(rows):
            log.warning(
                "%d of %d pairs are left out: the last turn and an answer are longer than train.max_length=%s; %d holds all",
                len(rows) - len(kept), len(rows), longest, max(map(_length, rows)),
            )  # fmt: skip
        return datasets.Dataset.from_list(kept)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's loss plus the penalty and the barrier. The reference's forward has no gradient, so its states are never taken."""
        mask, benign = inputs["completion_mask"], self.draw_benign()
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
        if (barrier := self.benign_loss(model, benign, figures)) is not None:
            loss = loss + barrier
        self.stop_on_nan(loss, inputs["input_ids"])
        self._figures.add(self._mode, figures)
        return (loss, outputs) if return_outputs else loss


def pair_tokens(form: ChatFormat, row: dict[str, Any], max_length: int | None = None) -> dict[str, Any]:
    """Tokens of a pair's prompt and of its two answers, each with its end of turn if it ended (as all do that don't say).

    The answers' are those that were sampled, ``chosen_ids`` and ``rejected_ids`` of the row, or of their texts where it has none.
    A conversation that would be longer than ``max_length`` with either answer is without its oldest turns, ``turns_dropped`` of
    them; but not where the first may hold the system prompt, folded into it.
    """
    answers: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids, ended = row.get(f"{side}_ids"), row.get(f"{side}_ended")
        answer = row[side][0]["content"] if ids is None else ids
        answers[f"{side}_ids"] = answer_tokens(form, answer, ended is None or ended)
    prompt = row["prompt"]
    folded = form.folds_system and prompt[0]["role"] != "system"
    room = None if max_length is None or folded else max_length - max(map(len, answers.values()))
    _, ids, dropped = recent_turns(form, prompt, room)
    return {"prompt_ids": ids, **answers, "turns_dropped": dropped}


def _length(row: dict[str, Any]) -> int:
    """Tokens of a pair's longer side."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
