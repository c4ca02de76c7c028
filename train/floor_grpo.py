"""``FloorGRPOTrainer``: TRL's GRPOTrainer whose rollouts are sampled with the cap on, corrected for it.

The sampler is the capped policy mu, the learner the uncapped one pi. Taking mu's samples for pi's own biases the gradient, so
each token's advantage is multiplied by the truncated importance ratio

    w_t = min( pi_old(y_t | y_<t) / mu(y_t | y_<t), C )

which every loss type of TRL multiplies into its own surrogate: (B, T) advantages are a documented input of ``_compute_loss``. mu
is scored by a forward with the very weights, cap and strength that sampled, pi_old by one without the cap. The cap's strength is
annealed over the run; at 0 nothing is corrected, since nothing is off-policy.

With ``use_vllm`` the rollouts come from vLLM, capped by the plugin in it, and mu is what vLLM itself says of its tokens; the
ratio then covers its arithmetic too, at strength 0 as well, and takes the place of TRL's own correction.

Rollouts may have several user turns: the whole conversation is one completion, in which the user's tokens carry no loss.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis.adapters import as_base, merged_if_quicker
from trimtab.axis.chat import ChatFormat
from trimtab.axis.sampling import Sampler, SamplingOptions, sample_on_all_ranks, seed_of
from trimtab.recipes.rules import SHAPING
from trimtab.train.barrier import BarrierOptions, BenignRows, HeldToBase
from trimtab.train.penalty import Figures, FloorPenalty, FloorTrainer, PenaltyOptions, refuse_base_target
from trimtab.train.schedule import Schedule, WithinStep, scheduled
from trimtab.train.vllm_rollouts import VLLMRollouts, before_vllm_starts

log = logging.getLogger("trimtab")

# Beyond these the batch says little about the learner: half of it is wasted, or tokens differ by a factor of e on average.
LEAST_SAMPLE_SIZE, MOST_LOG_RATIO = 0.5, 1.0


@dataclass(frozen=True)
class OffPolicy:
    """How far from the learner a batch was sampled.

    Attributes:
        ratio: truncated importance ratio, [B, T]; 1 where the mask is 0.
        log_ratio: mean |log pi_old - log mu| over tokens.
        sample_size: Kish's effective sample size over tokens, as a share, of the ratios before truncation.
        truncated: share of tokens whose ratio was cut.
    """

    ratio: Tensor
    log_ratio: float
    sample_size: float
    truncated: float


def off_policy(
    learner: Tensor, sampler: Tensor, mask: Tensor, limit: float, total: Callable[[Tensor], Tensor] = torch.clone
) -> OffPolicy:
    """Truncated importance ratios of sampled tokens.

    Args:
        learner: log pi_old, [B, T].
        sampler: log mu, [B, T].
        mask: tokens that count, [B, T].
        limit: C, the largest ratio.
        total: adds sums up over ranks, so that the figures are those of all tokens; by default there is no other rank.
    """
    kept = mask.bool()
    difference = (learner - sampler).float().masked_fill(~kept, 0.0)
    raw = difference.exp()
    weights = raw.masked_fill(~kept, 0.0)
    cut = (raw > limit) & kept
    sums = [kept.sum(), difference.abs().sum(), weights.sum(), weights.square().sum(), cut.sum()]
    count, distance, first, second, beyond = total(torch.stack([part.double() for part in sums])).tolist()
    count = max(count, 1.0)
    size = first**2 / (second * count) if second else 0.0
    return OffPolicy(raw.clamp(max=limit), distance / count, size, beyond / count)


class FloorGRPOTrainer(HeldToBase, FloorTrainer, GRPOTrainer):
    """GRPO on capped rollouts, with the floor penalty on the learner's forward.

    Rows of the dataset have ``prompt``: messages ``[system,] [history,] user, user, ...``; the policy answers each user turn that
    follows the history, whose last message is not the user's.

    Args:
        floor: the floor of the cap and of the penalty.
        form: chat format of the tokenizer.
        penalty: how the penalty is weighed.
        barrier: how the benign barrier is weighed.
        benign_rows: the rows that it is on; None leaves it out.
        cap_strength: strength of the cap in rollouts at step 0; 0 samples uncapped.
        cap_schedule: how it is annealed.
        correct_ratio: False leaves the importance ratio out, to show what that does.
        ratio_limit: C.
        sampling_batch: rollouts sampled at a time.
        **kwargs: GRPOTrainer's own.

    Raises:
        UserError: for settings under which the ratio would be wrong, or nothing that the penalty reaches is trainable.
    """

    def __init__(
        self,
        *args: Any,
        floor: Floor,
        form: ChatFormat,
        penalty: PenaltyOptions | None = None,
        barrier: BarrierOptions | None = None,
        benign_rows: BenignRows | None = None,
        cap_strength: float = 1.0,
        cap_schedule: Schedule = "linear",
        correct_ratio: bool = True,
        ratio_limit: float = 2.0,
        sampling_batch: int = 64,
        **kwargs: Any,
    ) -> None:
        if (arguments := kwargs.get("args")) is not None and arguments.use_vllm:
            arguments.vllm_importance_sampling_correction = False  # the ratio here is of the same two
            before_vllm_starts()
        super().__init__(*args, rollout_func=_rollout, **kwargs)
        self.floor = floor
        self.form = form
        self.eos_token_ids = form.ends_with(self.model)  # by which TRL tells what was cut
        self.penalty = FloorPenalty(self.model, floor, penalty or PenaltyOptions())
        self.controller = ActivationController.of(self.model)
        self.cap_strength = cap_strength
        self.cap_schedule: Schedule = cap_schedule
        self.correct_ratio = correct_ratio
        self.ratio_limit = ratio_limit
        self.sampling_batch = sampling_batch
        self._figures = Figures()
        self._warned = False
        self._generations = WithinStep()
        _check_settings(self.args, self.penalty)
        if self.use_vllm:
            self.vllm = VLLMRollouts(self.vllm_generation, form, floor, most=self.most)
        self.hold_to_base(floor, barrier or BarrierOptions(), benign_rows)

    @property
    def strength(self) -> float:
        """Strength of the cap in rollouts at this optimiser step."""
        return scheduled(self.cap_strength, self.cap_schedule, self.state.global_step, self.state.max_steps)

    @contextlib.contextmanager
    def _sampler(self) -> Iterator[Sampler]:
        """What answers rows of tokens, given their seeds, capped at this step's strength."""
        options = SamplingOptions(
            max_new_tokens=self.max_completion_length, temperature=self.temperature, top_p=1.0,
            batch_size=self.sampling_batch,
        )  # fmt: skip
        if self.vllm is not None:
            with self.vllm.sampling(self.state.global_step, self.strength, options) as sample:
                yield sample
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            merged_if_quicker(model),  # merged where that is what makes sampling quick
        ):
            yield lambda rows, seeds: sample_on_all_ranks(
                model, self.form, rows, seeds, options, most=self.most, floor=self.floor, strength=self.strength
            )

    def as_base(self, *, capped: bool = False) -> contextlib.AbstractContextManager[Any]:
        """The frozen base, without gradient, for rewards; ``capped`` makes it the capped self."""
        return as_base(self.model, self.controller, self.floor if capped else None)

    def sample_conversations(self, prompts: Sequence[Sequence[dict[str, str]]]) -> dict[str, Any]:
        """Play conversations: one completion each, from the first answer to the last, user turns in between unscored.

        Returns:
            What TRL's ``rollout_func`` returns: ``prompt_ids``, ``completion_ids``, ``logprobs`` (the sampler's own, from vLLM;
            NaN for tokens that it did not sample), ``env_mask`` (0 for the user's tokens), and for the rewards ``turns``:
            [(messages before the answer, answer)] a rollout.
        """
        form, first = self.form, self.accelerator.process_index * len(prompts)
        # what stands as it is ends where the user's turns begin that the policy answers
        fixed = [
            max((k + 1 for k, message in enumerate(prompt) if message["role"] != "user"), default=0)
            for prompt in prompts
        ]
        heads = [list(prompt[:count]) for prompt, count in zip(prompts, fixed, strict=True)]
        users = [list(prompt[count:]) for prompt, count in zip(prompts, fixed, strict=True)]
        chats = [[*head, user[0]] for head, user in zip(heads, users, strict=True)]
        prompt_ids = [form.prompt_ids(chat) for chat in chats]
        completion_ids: list[list[int]] = [[] for _ in prompts]
        env_mask: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        turns: list[list[tuple[list[dict[str, str]], str]]] = [[] for _ in prompts]
        step = self.state.global_step
        generation = self._generations.next(step)
        # all ranks play as many turns: under ZeRO-3 every forward is a collective
        longest = self.most(max(map(len, users)))
        with self._sampler() as sample:
            for turn in range(longest):
                playing = [i for i, user in enumerate(users) if len(user) > turn]
                rows = [prompt_ids[i] + completion_ids[i] for i in playing]
                seeds = [seed_of([self.args.seed, step, generation, first + i, turn]) for i in playing]
                for answer in sample(rows, seeds):
                    i = playing[answer.index]
                    # a conversation goes on as the template writes it, whatever ended the answer
                    end = form.end_of_turn if len(users[i]) > turn + 1 else form.end_token
                    ids = [*answer.thought, *answer.ids, *([end] if answer.ended else [])]
                    completion_ids[i] += ids
                    env_mask[i] += [1] * len(ids)
                    told = answer.logprobs or [math.nan] * len(ids)
                    if answer.ended and end != form.end_token:
                        told = [*told[:-1], math.nan]
                    logprobs[i] += told
                    turns[i].append((list(chats[i]), answer.text))
                    if len(users[i]) > turn + 1:
                        said = {"role": "assistant", "content": answer.text}
                        between = form.ids_between(chats[i], users[i][turn + 1], ended=answer.ended)
                        chats[i] = [*chats[i], said, users[i][turn + 1]]
                        completion_ids[i] += between
                        env_mask[i] += [0] * len(between)
                        logprobs[i] += [math.nan] * len(between)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": None if self.vllm is None else logprobs,
            "env_mask": env_mask,
            "turns": turns,
        }

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's own, and then the importance ratio folded into the advantages."""
        if self.vllm is not None:
            self._last_loaded_step = (
                self.state.global_step
            )  # TRL sends no weights: VLLMRollouts does, which knows what is held
        batch = super()._generate_and_score_completions(inputs)
        strength = self.strength
        mode = self._mode
        self._metrics[mode]["cap_strength"].append(strength)
        if strength == 0.0 and self.vllm is None:
            return batch
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        width = batch["completion_ids"].size(1)
        size = self.args.per_device_train_batch_size

        def logprobs(*, capped: bool) -> Tensor:
            inner = self.accelerator.unwrap_model(self.model)
            with (
                merged_if_quicker(inner) if capped else contextlib.nullcontext(),
                self.controller.capping(self.floor, strength, enabled=capped),
            ):
                found: Tensor = self._get_per_token_logps_and_entropies(
                    self.model, ids, attention, width, batch_size=size
                )[0]
            return found

        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            learner = batch.get("old_per_token_logps")
            learner = logprobs(capped=False) if learner is None else learner
            if self.vllm is None:
                sampler = logprobs(capped=True)
            else:
                told = batch["sampling_per_token_logps"]
                sampler = torch.where(told.isnan(), learner, told)
        batch["sampling_per_token_logps"] = sampler  # TRL's mask of far off-policy rows reads it
        found = off_policy(learner, sampler, mask, self.ratio_limit, self._over_ranks)
        self._say_how_far(found, mode)
        if self.correct_ratio:
            advantages = batch["advantages"]
            advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            batch["advantages"] = advantages * found.ratio
        return batch

    def _over_ranks(self, sums: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(sums, "sum")
        return total  # type: ignore[no-any-return]

    def _say_how_far(self, found: OffPolicy, mode: str) -> None:
        for name in ("log_ratio", "sample_size", "truncated"):
            self._metrics[mode][f"off_policy/{name}"].append(getattr(found, name))
        far = found.sample_size < LEAST_SAMPLE_SIZE or found.log_ratio > MOST_LOG_RATIO
        if far and not self._warned:
            self._warned = True
            log.warning(
                "step %d: rollouts are far off-policy (mean |log ratio| %.2f, effective sample size %.0f %%): lower "
                "method.cap_strength, or anneal it with method.cap_schedule",
                self.state.global_step, found.log_ratio, 100 * found.sample_size,
            )  # fmt: skip

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        """TRL's loss, the barrier, and the penalty on the tokens that the policy said, divided by all such tokens of the step."""
        figures: dict[str, Tensor] = {}
        benign = self.draw_benign()
        prompt_mask, completion_mask = inputs["prompt_mask"], inputs["completion_mask"]
        said = completion_mask * inputs.get("tool_mask", 1)
        mask = torch.cat([torch.zeros_like(prompt_mask), said], dim=1)
        with self.penalty.recording() as recording:
            loss: Tensor = super()._compute_loss(model, inputs)
            states = self.penalty.states(recording)
        terms = self.penalty.terms(states, mask, figures)
        mode = self._mode
        count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # num_items_in_batch spans the generation batch; TRL's dapo loss scales it the same way
            count = count * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        weight = self.penalty.weight_at(self.state.global_step, self.state.max_steps)
        if weight:
            loss = loss + weight * terms / count
        if (barrier := self.benign_loss(model, benign, figures)) is not None:
            loss = loss + barrier / self.current_gradient_accumulation_steps
        self.stop_on_nan(loss, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1))
        self._figures.add(mode, figures)
        return loss


def _rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
    found: dict[str, Any] = trainer.sample_conversations(prompts)
    return found


def _check_settings(arguments: Any, penalty: FloorPenalty) -> None:
    for name, neutral in SHAPING.items():
        if getattr(arguments, name, neutral[0]) not in neutral:
            raise UserError(
                f"{name} shapes the samples, and log-probabilities don't know of it: the importance ratio would be wrong",
                key=f"train.{name}",
                remedy=f"remove train.{name}; temperature is accounted for",
            )
    refuse_base_target(penalty.options, "grpo")
    _check_checkpoints(arguments)


def _check_checkpoints(arguments: Any) -> None:
    """A generation may serve several optimiser steps; TRL begins one anew after a resume, and would then be out of step."""
    if arguments.save_strategy != "steps" or arguments.save_steps <= 0:
        return
    # a share of the run below 1, as the Trainer takes it
    every = arguments.save_steps if arguments.save_steps >= 1 else math.ceil(arguments.save_steps * arguments.max_steps)
    served = arguments.steps_per_generation * arguments.num_iterations  # micro-batches
    if 0 < arguments.max_steps <= every or int(every) * arguments.gradient_accumulation_steps % served == 0:
        return
    whole = served // math.gcd(served, arguments.gradient_accumulation_steps)
    raise UserError(
        f"a checkpoint every {int(every)} steps falls inside a generation, which serves {served} micro-batches: a resumed run "
        "would go on with other rollouts than one that was not killed",
        key="train.save_steps",
        remedy=f"set train.save_steps to a multiple of {whole}",
    )
