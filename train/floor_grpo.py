"""``FloorGRPOTrainer``: TRL's GRPOTrainer whose rollouts are sampled with the cap on, corrected for it.

The sampler is the capped policy mu, the learner the uncapped one pi. The gradient of the learner's expected reward is

    E_pi[ R(y) sum_t grad log pi(y_t | y_<t) ]  =  E_mu[ W(y) R(y) sum_t grad log pi(y_t | y_<t) ],
    W(y) = prod_t pi_old(y_t | y_<t) / mu(y_t | y_<t)

with the product over every token that the policy said. R reads the whole completion, so each token's term needs the ratios of
all tokens: those before it, since mu began the text, and those after it, since mu ended it. In a conversation those are the
tokens of all its answers; the user's words are given, and their ratio is 1. A product over the token's own answer would leave
out who led the conversation there, and how it went on.

``ratio_level: sequence`` multiplies a completion's advantage by W, cut or left out beyond C: right for answers of a few tokens.
W is a product of as many ratios as there are tokens, so for long answers nearly all weight falls on few completions, and the cut
takes most of that: little of the gradient is left. ``ratio_level: token`` multiplies each token's advantage by its own ratio
alone. That corrects for who chose this token, not for who wrote the text around it; it is exact for one token, and its variance
does not grow with length. docs/methods.md has the errors of both, measured. The cap's strength is annealed over the run; at 0
nothing is corrected, since nothing is off-policy.

TRL multiplies the advantages into the surrogate of every loss type; (B, T) and (B, 1) advantages are a documented input of its
``_compute_loss``. mu is scored by a forward with the very weights, cap and strength that sampled, pi_old by one without the cap.

With ``use_vllm`` the rollouts come from vLLM, capped by the plugin in it, and mu is what vLLM itself says of its tokens; the
ratio then covers its arithmetic too, at strength 0 as well, and takes the place of TRL's own correction.

Rollouts may have several user turns: the whole conversation is one completion, in which the user's tokens carry no loss.

Shapes: B completions, T tokens of the longest, F reward functions, G completions of a prompt.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis.adapters import as_base, merged_if_quicker
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.playing import PlayedTurn, play, scripted
from trimtab.axis.sampling import Sampler, SamplingOptions, sample_on_all_ranks, seed_of
from trimtab.recipes.methods import SHAPING, GrpoMethod
from trimtab.train.barrier import BarrierOptions, BenignRows, HeldToBase
from trimtab.train.conversations import prompts_a_generation
from trimtab.train.penalty import Figures, FloorPenalty, FloorTrainer, PenaltyOptions, refuse_base_target
from trimtab.train.schedule import Schedule, WithinStep, scheduled
from trimtab.train.vllm_rollouts import VLLMRollouts, before_vllm_starts

log = logging.getLogger("trimtab")

# Beyond these the batch says little about the learner: half of it is wasted, or tokens differ by a factor of e on average.
LEAST_SAMPLE_SIZE, MOST_LOG_RATIO = 0.5, 1.0
LARGEST_LOG = 300.0  # the square of a ratio beyond it is no number any more
# Tokens of an answer up to which the sequence's ratio is nearer to the learner's gradient: see docs/methods.md.
SHORT = 8

RatioLevel = Literal["token", "sequence"]
RatioBeyond = Literal["truncate", "mask"]


@dataclass(frozen=True)
class OffPolicy:
    """How far from the learner a batch was sampled.

    Attributes:
        ratio: what advantages are multiplied by: [B, T] at the level of tokens, [B, 1] at that of sequences.
        log_ratio: mean |log pi_old - log mu| over tokens.
        sample_size: Kish's effective sample size of the tokens' ratios before the limit, as a share of the tokens.
        sample_size_sequence: effective sample size of the products over a completion's tokens, as a share of the completions.
        beyond_limit: share of the ratios of this level that lay beyond the limit.
        mean_ratio: mean of the ratios of this level after the limit; 1 without one, and what is missing is gradient that is lost.
    """

    ratio: Tensor
    log_ratio: float
    sample_size: float
    sample_size_sequence: float
    beyond_limit: float
    mean_ratio: float


def off_policy(
    learner: Tensor,
    sampler: Tensor,
    mask: Tensor,
    limit: float,
    *,
    level: RatioLevel = "token",
    beyond: RatioBeyond = "truncate",
    total: Callable[[Tensor], Tensor] = torch.clone,
) -> OffPolicy:
    """Importance ratios of sampled tokens, or of sampled sequences.

    Args:
        learner: log pi_old, [B, T].
        sampler: log mu, [B, T].
        mask: tokens that count, [B, T].
        limit: C, the largest ratio.
        level: a ratio for each token, or one for all tokens of a row: their product.
        beyond: what becomes of a ratio above C: it is cut to C, or the token or row is left out.
        total: adds sums up over ranks, so that the figures are those of all tokens; by default there is no other rank.
    """
    said = mask.bool()
    difference = (learner - sampler).double().masked_fill(~said, 0.0)
    of_tokens, of_rows = (logs.clamp(max=LARGEST_LOG).exp() for logs in (difference, difference.sum(1, keepdim=True)))
    some = said.any(1, keepdim=True)
    raw, counted = (of_tokens, said) if level == "token" else (of_rows, some)
    over = raw > limit
    ratio = raw.masked_fill(over, limit if beyond == "truncate" else 0.0)
    sums = [
        difference.abs().sum(), said.sum(), of_tokens[said].sum(), of_tokens[said].square().sum(),
        some.sum(), of_rows[some].sum(), of_rows[some].square().sum(),
        counted.sum(), (over & counted).sum(), ratio[counted].sum(),
    ]  # fmt: skip
    distance, tokens, *rest = total(torch.stack([part.double() for part in sums])).tolist()
    first, second, rows, first_row, second_row, count, cut, kept = rest
    return OffPolicy(
        ratio=ratio.float(),
        log_ratio=distance / max(tokens, 1.0),
        sample_size=_effective_share(first, second, tokens),
        sample_size_sequence=_effective_share(first_row, second_row, rows),
        beyond_limit=cut / max(count, 1.0),
        mean_ratio=kept / max(count, 1.0),
    )


def _effective_share(total: float, squares: float, count: float) -> float:
    """Kish's effective sample size of weights with this sum and sum of squares, as a share of their number."""
    return total**2 / (squares * count) if squares else 0.0


class FloorGRPOTrainer(HeldToBase, FloorTrainer, GRPOTrainer):
    """GRPO on capped rollouts, with the floor penalty on the learner's forward.

    Rows of the dataset have ``prompt``: messages up to a user turn, and perhaps more user turns. The policy answers each of them.

    Args:
        floor: the floor of the cap and of the penalty.
        form: chat format of the tokenizer.
        penalty: how the penalty is weighed; None: as in a recipe of GRPO that does not say.
        barrier: how the benign barrier is weighed.
        benign_rows: the rows that it is on; None leaves it out.
        cap_strength: strength of the cap in rollouts at step 0; 0 samples uncapped.
        cap_schedule: how it is annealed.
        correct_ratio: False leaves the importance ratio out, to show what that does.
        ratio_level: whether advantages are multiplied by ratios of tokens or of sequences: see :func:`off_policy`.
        ratio_beyond: what becomes of a ratio beyond the limit: it is truncated, or the token or completion masked.
        ratio_limit: C, the limit.
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
        ratio_level: RatioLevel = "token",
        ratio_beyond: RatioBeyond = "truncate",
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
        self.penalty = FloorPenalty(self.model, floor, penalty or PenaltyOptions.of(GrpoMethod(name="grpo")))
        self.controller = ActivationController.of(self.model)
        self.cap_strength = cap_strength
        self.cap_schedule: Schedule = cap_schedule
        self.correct_ratio = correct_ratio
        self.ratio_level: RatioLevel = ratio_level
        self.ratio_beyond: RatioBeyond = ratio_beyond
        self.ratio_limit = ratio_limit
        self.sampling_batch = sampling_batch
        self._figures = Figures()
        self._told: set[str] = set()
        self._generations = WithinStep()
        _check_settings(self.args, self.penalty, ratio_level if correct_ratio else None)
        _check_enough(self.args, self.train_dataset)
        if correct_ratio and cap_strength and ratio_level == "token" and 1 < int(self.max_completion_length) <= SHORT:
            log.warning(
                "answers have at most %d tokens: for those method.ratio_level=sequence is nearer to the learner's gradient",
                self.max_completion_length,
            )
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

    @contextlib.contextmanager
    def as_learner(self) -> Iterator[Any]:
        """The model as it is now, uncapped and without gradient, for rewards."""
        inner = self.accelerator.unwrap_model(self.model)
        training = inner.training
        inner.eval()
        try:
            with torch.no_grad(), self.controller.uncapped():
                yield inner
        finally:
            inner.train(training)

    def sample_conversations(self, prompts: Sequence[Sequence[dict[str, str]]]) -> dict[str, Any]:
        """Play conversations: one completion each, from the first answer to the last, user turns in between unscored.

        Returns:
            What TRL's ``rollout_func`` returns: ``prompt_ids``, ``completion_ids``, ``logprobs`` (the sampler's own, from vLLM;
            NaN for tokens that it did not sample), ``env_mask`` (0 for the user's tokens), and for the rewards a list for each
            rollout: ``turns``, [(messages before the answer, answer)]; ``turn_ids``, [(tokens before it, its own with its end,
            and with a thought where it has one)]; ``ended``, [whether the answer ended by itself].

        Raises:
            UserError: for a prompt that can't be played.
        """
        form, first = self.form, self.accelerator.process_index * len(prompts)
        opened = [_opening(prompt) for prompt in prompts]
        chats, users = [chat for chat, _ in opened], [later for _, later in opened]
        prompt_ids = [form.prompt_ids(chat) for chat in chats]
        completion_ids: list[list[int]] = [[] for _ in prompts]
        env_mask: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        turns: list[list[tuple[list[dict[str, str]], str]]] = [[] for _ in prompts]
        turn_ids: list[list[tuple[list[int], list[int]]]] = [[] for _ in prompts]
        ended: list[list[bool]] = [[] for _ in prompts]
        step = self.state.global_step
        generation = self._generations.next(step)

        def go_on(i: int, message: dict[str, str]) -> None:
            """The user's turn as tokens, behind the last answer as it was sampled: nothing is rendered anew."""
            between = form.ids_between(turns[i][-1][0], message, ended=ended[i][-1])
            completion_ids[i] += between
            env_mask[i] += [0] * len(between)
            logprobs[i] += [math.nan] * len(between)

        def answer(turn: PlayedTurn) -> list[str]:
            for i, chat in zip(turn.going, turn.chats, strict=True):
                if turn.number:
                    go_on(i, chat[-1])
            rows = [prompt_ids[i] + completion_ids[i] for i in turn.going]
            seeds = [seed_of([self.args.seed, step, generation, first + i, turn.number]) for i in turn.going]
            for found in sample(rows, seeds):
                i = turn.going[found.index]
                # a conversation goes on as the template writes it, whatever ended the answer
                end = form.end_of_turn if len(users[i]) > turn.number else form.end_token
                ids = [*found.thought, *found.ids, *([end] if found.ended else [])]
                completion_ids[i] += ids
                env_mask[i] += [1] * len(ids)
                told = found.logprobs or [math.nan] * len(ids)
                if found.ended and end != form.end_token:
                    told = [*told[:-1], math.nan]
                logprobs[i] += told
                turns[i].append((turn.chats[found.index], found.text))
                turn_ids[i].append((rows[found.index], ids))
                ended[i].append(found.ended)
            return [turns[i][-1][1] for i in turn.going]

        script = scripted([[chat[-1], *later] for chat, later in opened])
        # all ranks play as many turns: under ZeRO-3 every forward is a collective
        longest = self.most(max(map(len, users))) + 1
        with self._sampler() as sample:
            play([chat[:-1] for chat in chats], script, answer, turns=longest, in_step=True)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": None if self.vllm is None else logprobs,
            "env_mask": env_mask,
            "turns": turns,
            "turn_ids": turn_ids,
            "ended": ended,
        }

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's own, which gets the messages as they were said; and only rewards that can be compared within a group.

        TRL gives a conversation as one message of the assistant's, the user's words and the template's among its own.

        Raises:
            UserError: if a reward is infinite, or no completion has one.
        """
        prompts = [row["turns"][0][0] for row in inputs]
        completions = [_said_after(prompt, row["turns"]) for prompt, row in zip(prompts, inputs, strict=True)]
        found: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if bool((infinite := found.isinf().any(0)).any()):
            name = self.reward_func_names[int(infinite.nonzero()[0])]
            raise UserError(
                f"the reward {name} gave infinity at step {self.state.global_step}",
                key="method.rewards",
                remedy="have it give None for what it can't score",
            )
        mode = self._mode
        group = self.num_generations if mode == "train" else self.num_generations_eval
        unscored = unscored_rows(found, self.reward_weights.to(found.device), group)
        share = float(unscored.float().mean())
        self._metrics[mode]["rewards/unscored"].append(share)
        if share == 1:
            raise UserError(
                f"no reward scored any of the {len(unscored)} completions of step {self.state.global_step}: "
                "there is nothing to learn from",
                key="method.rewards",
                remedy=f"see why {', '.join(self.reward_func_names)} gave None; the same command resumes where it stopped",
            )
        if share:
            self._warn_once(
                "unscored",
                "step %d: %.0f %% of the completions have no reward, as %s gave None where others of the same prompt were "
                "scored: they carry no policy gradient; rewards/unscored in the log counts them",
                self.state.global_step, 100 * share, " or ".join(self.reward_func_names),
            )  # fmt: skip
        return found.masked_fill(unscored[:, None], math.nan)

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
        self._leave_out_cut_answers(batch, [row["ended"] for row in inputs], mode)
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
        found = off_policy(
            learner, sampler, mask, self.ratio_limit,
            level=self.ratio_level, beyond=self.ratio_beyond, total=self._over_ranks,
        )  # fmt: skip
        self._say_how_far(found, mode)
        if self.correct_ratio:
            advantages = batch["advantages"]
            advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            batch["advantages"] = advantages * found.ratio
        return batch

    def _leave_out_cut_answers(self, batch: dict[str, Tensor], ended: Sequence[Sequence[bool]], mode: str) -> None:
        """Count answers that were cut; with ``mask_truncated_completions`` a conversation is left out for any of them.

        TRL looks at a completion's last token alone.
        """
        device = batch["completion_ids"].device
        whole = torch.tensor([all(row) for row in ended], device=device)
        counts = [sum(row.count(False) for row in ended), sum(map(len, ended)), int(whole.sum())]
        cut, said, kept = self._over_ranks(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
        self._metrics[mode]["answers/cut"].append(cut / said)
        if not self.mask_truncated_completions:
            return
        for name in ("completion_mask", "tool_mask"):
            batch[name] = batch[name] * whole[:, None]
        batch["num_items_in_batch"] = self._over_ranks((batch["completion_mask"] * batch["tool_mask"]).sum())
        if kept == 0:
            self._warn_once(
                "all cut",
                "step %d: every rollout has an answer that was cut at train.max_completion_length, and "
                "train.mask_truncated_completions leaves them all out: there is no policy gradient",
                self.state.global_step,
            )

    def _over_ranks(self, sums: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(sums, "sum")
        return total  # type: ignore[no-any-return]

    def _say_how_far(self, found: OffPolicy, mode: str) -> None:
        for name in ("log_ratio", "sample_size", "sample_size_sequence", "beyond_limit", "mean_ratio"):
            self._metrics[mode][f"off_policy/{name}"].append(getattr(found, name))
        of_tokens = self.ratio_level == "token"
        size = found.sample_size if of_tokens else found.sample_size_sequence
        if size < LEAST_SAMPLE_SIZE or found.log_ratio > MOST_LOG_RATIO:
            self._warn_once(
                "far off-policy",
                "step %d: rollouts are far off-policy (mean |log ratio| %.2f, effective sample size %.0f %% of the %s, mean "
                "ratio after the limit %.2f): lower method.cap_strength, or anneal it with method.cap_schedule%s",
                self.state.global_step, found.log_ratio, 100 * size, "tokens" if of_tokens else "completions",
                found.mean_ratio, "" if of_tokens else "; method.ratio_level=sequence is for short answers",
            )  # fmt: skip

    def _warn_once(self, what: str, text: str, *values: Any) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(text, *values)

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


def _opening(prompt: Sequence[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The messages up to the first user turn that the policy answers, and the user turns after it.

    Raises:
        UserError: if there is none, or something else comes after it.
    """
    answered = max((i for i, message in enumerate(prompt) if message["role"] == "assistant"), default=-1)
    first = next((i for i in range(answered + 1, len(prompt)) if prompt[i]["role"] == "user"), None)
    later = [] if first is None else list(prompt[first + 1 :])
    if first is None or any(message["role"] != "user" for message in later):
        roles = ", ".join(message["role"] for message in prompt)
        raise UserError(
            f"a prompt can't be played: its messages are {roles}",
            key="data.drift_file",
            remedy="give the messages up to a user turn that the policy answers, and after that one more user turns alone",
        )
    return list(prompt[: first + 1]), later


def _said_after(
    prompt: Sequence[dict[str, str]], turns: Sequence[tuple[Sequence[dict[str, str]], str]]
) -> list[dict[str, str]]:
    """What was said after the prompt, as messages: answers, and user turns between them."""
    before, answer = turns[-1]
    return [*before[len(prompt) :], {"role": "assistant", "content": answer}]


def unscored_rows(rewards: Tensor, weights: Tensor, group: int) -> Tensor:
    """Completions whose reward can't be compared with those of their group, [B].

    A reward that scored some completions of a prompt and not others would be missing from the sum of those: 0 in its place may
    well be more than what the others got. One that scored none of a group is missing from all alike.

    Args:
        rewards: of each function, [B, F]; NaN for None.
        weights: of the functions, [F]; one of weight 0 is shown alone, and neither scores nor leaves out.
        group: G, the completions of a prompt, which stand together.
    """
    scored = ~rewards.isnan().view(-1, group, len(weights))
    needed = scored.any(1, keepdim=True) & (weights != 0)
    return ~((scored | ~needed).all(2) & needed.any(2)).flatten()


def _check_settings(arguments: Any, penalty: FloorPenalty, ratio_level: RatioLevel | None) -> None:
    for name, neutral in SHAPING.items():
        if getattr(arguments, name, neutral[0]) not in neutral:
            raise UserError(
                f"{name} shapes the samples, and log-probabilities don't know of it: the importance ratio would be wrong",
                key=f"train.{name}",
                remedy=f"remove train.{name}; temperature is accounted for",
            )
    if arguments.importance_sampling_level == "sequence" and ratio_level == "token":
        raise UserError(
            "is sequence: TRL then gives all tokens of a completion one surrogate, which tokens' own ratios can't correct",
            key="train.importance_sampling_level",
            remedy="set method.ratio_level=sequence, or train.importance_sampling_level=token",
        )
    refuse_base_target(penalty.options, "grpo")
    check_checkpoints(arguments)


def _check_enough(arguments: Any, dataset: Any) -> None:
    """TRL leaves out generations that it can't fill: with too few prompts all of them, and ends at step 0 as if all were done."""
    needed = prompts_a_generation(arguments)
    if isinstance(dataset, Sized) and len(dataset) < needed:
        raise UserError(
            f"a generation has {needed} prompts, and there are {len(dataset)}: not one step would be trained",
            key="train.per_device_train_batch_size",
            remedy=f"give at least {needed} prompts, some of them repeated, or lower the batch or steps_per_generation",
        )


def check_checkpoints(arguments: Any) -> None:
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
