"""Rollouts by vLLM with the cap on: TRL's own vLLM, colocated or a server, and the plugin of ``trimtab.axis.vllm_cap`` in it.

The sampler's log-probabilities come with the answers, so that GRPO's importance ratio covers what vLLM computes unlike the
learner as well as the cap. vLLM's random numbers are its own: an answer depends on what else was in flight.

Weights are sent one layer at a time and merged on the way (:func:`~trimtab.axis.adapters.merged_weights`). TRL's own way merges
and unmerges the whole model in place, which changes the base a little each time, and under ZeRO-3 gathers all of it at once.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from trimtab.axis import ActivationController, Floor, UserError
from trimtab.axis.adapters import merged_if_quicker, merged_weights
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.sampling import Answer, Sampler, SamplingOptions, answer_of, candidates_of, pad_left
from trimtab.axis.vllm_cap import LOAD_FLOOR, SET_STRENGTH, SWITCH, check_loaded, floor_payload, register
from trimtab.recipes.library_fields import VLLM_SETTINGS

log = logging.getLogger("trimtab")

RPC_SECONDS = 600  # a worker answers when the requests before are done

# vLLM is held against transformers on so many answers a rank, the first times that it samples with a cap, and without one: the
# first, and the first with weights that were trained.
HELD_ANSWERS, HELD_TIMES = 4, 2
# Nat a token: from where on the cap shows in log-probabilities, and from where on the two differ by more than rounding.
APART, FAR = 0.02, 0.1

SERVE = (
    f"serve the base where trimtab is installed, with {SWITCH}=1 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL "
    """--weight-transfer-config '{"backend": "nccl"}' --logprobs-mode processed_logprobs --max-logprobs -1"""
)


def before_vllm_starts() -> None:
    """Have the vLLM that this process will start load the plugin; a server is told by its own environment.

    Raises:
        UserError: if vLLM is not installed.
    """
    os.environ[SWITCH] = "1"
    try:
        register()
    except ImportError as error:
        raise UserError(
            f"vLLM can't be imported: {error}",
            key="train.use_vllm",
            remedy="install it beside trimtab (docs/methods.md says which versions go together), or set train.use_vllm=false",
        ) from error


def open_vllm(trainer: Any, form: ChatFormat, floor: Floor, given: Mapping[str, Any], rows: int) -> VLLMRollouts:
    """TRL's vLLM for a trainer whose class in TRL has none.

    Args:
        trainer: the trainer.
        form: chat format.
        floor: what is capped to.
        given: keys of GRPOConfig, ``vllm_mode`` and so on; the others are at its defaults.
        rows: answers that a process samples at a time.
    """
    before_vllm_starts()
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer.grpo_config import GRPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    settings: dict[str, Any] = {name: given.get(f"vllm_{name}", defaults[f"vllm_{name}"]) for name in VLLM_SETTINGS}
    generation = VLLMGeneration(
        trainer.model,
        trainer.accelerator,
        trainer.processing_class,
        max_num_seqs=rows * settings["tensor_parallel_size"],
        trust_remote_code=False,
        **settings,
    )
    return VLLMRollouts(generation, form, floor, most=trainer.most)


class VLLMRollouts:
    """Samples through TRL's vLLM, capped.

    Args:
        generation: TRL's ``VLLMGeneration``.
        form: chat format.
        floor: what is capped to.
        most: the largest of a number over all ranks, which all call it.

    Attributes:
        distances: of vLLM's log-probabilities to transformers' of the same policy, means in nat a token, as they were found.

    Raises:
        UserError: if vLLM has no caps, or not where the floor is.
    """

    def __init__(self, generation: Any, form: ChatFormat, floor: Floor, *, most: Callable[[int], int]) -> None:
        self.generation = generation
        self.form = form
        self.floor = floor
        self.most = most
        self.distances: list[float] = []
        self._held_against: Counter[bool] = Counter()
        self._main = generation.accelerator.is_main_process
        self._base = False
        self._weights: int | str | None = None
        if isinstance(generation.model, PeftModel):
            generation._iter_named_params = self._named_weights
        # what ends an answer here ends it there
        generation.generation_kwargs = {**generation.generation_kwargs, "stop_token_ids": form.end_ids}
        if generation.mode == "server" and self._main:
            kept = generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if kept != "processed_logprobs":
                raise UserError(
                    f"the vLLM server gives {kept}, which don't know of the temperature: the importance ratio would be wrong",
                    key="train.vllm_mode",
                    remedy=SERVE,
                )
        with self._awake():
            if answers := self._call(LOAD_FLOOR, floor_payload(floor)):
                check_loaded(floor, answers)

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What TRL sends."""
        generation = self.generation
        yield from merged_weights(generation.model, base=self._base, gathered=generation._dist.gather_params)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Buffers that can be written: while a colocated vLLM sleeps, those of its caps are saved away and not mapped."""
        generation = self.generation
        asleep = generation.mode == "colocate" and generation.enable_sleep_mode and generation._llm_weights_sleeping
        if asleep:
            generation.llm.wake_up()
        try:
            yield
        finally:
            if asleep:
                generation.llm.sleep(level=2)  # the weights are gone; TRL sends them before it samples

    def _call(self, method: str, argument: str) -> list[dict[str, Any]]:
        """Run a worker method on all workers; on ranks that don't talk to the server nothing, and nothing comes back."""
        if self.generation.mode == "colocate":
            found: list[dict[str, Any]] = self.generation.llm.collective_rpc(method, args=(argument,))
            return found
        if not self._main:
            return []
        import requests  # which TRL's client needs; its own session would ask a server that does not cap six times

        client = self.generation.vllm_client
        response = requests.post(
            f"{client.base_url}/collective_rpc", json={"method": method, "args": [argument]}, timeout=RPC_SECONDS
        )
        if response.status_code != 200:
            raise UserError(
                f"the vLLM server at {client.base_url} does not cap: {method} gave HTTP {response.status_code}",
                key="train.use_vllm",
                remedy=SERVE,
            )
        answered: list[dict[str, Any]] = response.json()["results"]
        return answered

    def _set_strength(self, strength: float) -> None:
        """Set the cap's strength everywhere, and forget the prefixes that were computed with another."""
        held = {value for answer in self._call(SET_STRENGTH, str(strength)) for value in answer["strength"]}
        if any(not math.isclose(value, strength, rel_tol=1e-6) for value in held):
            raise RuntimeError(f"vLLM was told to cap with strength {strength}, and its workers hold {sorted(held)}")
        if self.generation.mode == "colocate":
            self.generation.llm.reset_prefix_cache()
        elif self._main:
            self.generation.vllm_client.reset_prefix_cache()

    @contextlib.contextmanager
    def capped(self, strength: float) -> Iterator[None]:
        """Cap with this strength inside the block, and not at all after it."""
        with self._awake():
            self._set_strength(strength)
        try:
            yield
        finally:
            with self._awake():
                self._set_strength(0.0)

    def send_weights(self, step: int | None) -> None:
        """Have vLLM sample with the weights of this optimiser step, which are the model's now; None for those of the base."""
        self._base = step is None
        wanted = "base" if step is None else step
        if self._weights != wanted:
            self.generation.sync_weights()
            self._weights = wanted

    @contextlib.contextmanager
    def sampling(self, step: int | None, strength: float, options: SamplingOptions) -> Iterator[Sampler]:
        """What answers rows of tokens inside the block; all ranks alike.

        Args:
            step: with the weights of this optimiser step, or of the base for None.
            strength: of the cap; 0 for none.
            options: sampling options. Seeds of rows are not vLLM's.
        """
        self.send_weights(step)

        def sample(rows: Sequence[Sequence[int]], _: Sequence[int]) -> list[Answer]:
            answers = self.sample(rows, options)
            if self._held_against[strength > 0] < HELD_TIMES:
                self._held_against[strength > 0] += 1
                self._hold_against(rows, answers, strength, options)
            return answers

        with self.capped(strength):
            yield sample

    def sample(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[Answer]:
        """An answer to each prompt, with the log-probabilities of its tokens; all ranks call it, some perhaps with no prompt."""
        generation = self.generation
        generation.temperature, generation.top_p = options.temperature, options.top_p
        generation.max_completion_length = options.max_new_tokens
        # TRL takes the same number from every rank
        empty = [[self.form.end_token]] * (self.most(len(prompts)) - len(prompts))
        _, tokens, logprobs, _ = generation.generate([*map(list, prompts), *empty], None, 1)
        answers = []
        for index in range(len(prompts)):
            ids = list(tokens[index])
            said = [math.nan if row[0] is None else float(row[0]) for row in logprobs[index]]
            # a conversation goes on with the template's own end, whatever ended the answer
            if ids[-1] in self.form.end_ids and ids[-1] != self.form.end_token:
                said[-1] = math.nan
            answer = answer_of(self.form, index, ids)
            told = len(answer.thought) + len(answer.ids) + answer.ended
            answers.append(dataclasses.replace(answer, logprobs=said[:told]))
        return answers

    def _hold_against(
        self, rows: Sequence[Sequence[int]], answers: Sequence[Answer], strength: float, options: SamplingOptions
    ) -> None:
        """Hold what vLLM says of its tokens against what transformers says, under the same cap and without it.

        Raises:
            UserError: if vLLM's are the uncapped policy's.
        """
        model, form = self.generation.model, self.form
        tokenizer: Any = form.tokenizer
        held = list(answers)[:HELD_ANSWERS]
        tails = [[*answer.thought, *answer.ids, *([form.end_token] if answer.ended else [])] for answer in held]
        # a rank without answers takes part: under ZeRO-3 and FSDP a forward is a collective
        whole = [[*rows[answer.index], *tail] for answer, tail in zip(held, tails, strict=True)] or [[form.end_token]]
        ids, attention = pad_left(whole, tokenizer.pad_token_id, next(model.parameters()).device)
        kept = max((len(tail) for tail in tails), default=0) + 1
        told = torch.tensor([value for answer in held for value in answer.logprobs or []], dtype=torch.float64)

        def logprobs(*, capped: bool) -> Tensor:
            own = model.disable_adapter() if self._base else merged_if_quicker(model)
            with own, ActivationController.of(model).capping(self.floor, strength, enabled=capped):
                logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=kept).logits
            found = [
                _chosen(logits[row, -len(tail) - 1 : -1], ids[row, -len(tail) :], options)
                for row, tail in enumerate(tails)
                if tail
            ]
            return torch.cat(found).double().cpu() if found else torch.zeros(0, dtype=torch.float64)

        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                capped, uncapped = logprobs(capped=True), logprobs(capped=False)
        finally:
            model.train(training)
        pairs = ((told, capped), (told, uncapped), (capped, uncapped))
        # not the ends that vLLM did not say, nor what is in one nucleus and not in another
        counted = (told + capped + uncapped).isfinite()
        distances = [(one - other)[counted].abs().sum() for one, other in pairs]
        sums = torch.stack([*distances, counted.sum()]).double()
        accelerator = self.generation.accelerator
        *totals, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        to_capped, to_uncapped, apart = (total / max(count, 1.0) for total in totals)
        self.distances.append(to_capped)
        if apart > APART and to_capped >= to_uncapped:
            raise UserError(
                f"vLLM samples as if it did not cap: its log-probabilities lie {to_capped:.3f} nat from the capped policy's "
                f"and {to_uncapped:.3f} from the uncapped one's",
                key="train.use_vllm",
                remedy="report the model's architecture, or set train.use_vllm=false",
            )
        if to_capped > FAR:
            log.warning(
                "vLLM's log-probabilities lie %.3f nat a token from transformers' of the same policy; compare dtype, "
                "quantization and attention of the two",
                to_capped,
            )

    def close(self) -> None:
        """Stop a colocated vLLM: left to the interpreter's end, it looks for process groups that are gone by then."""
        if self.generation.mode == "colocate":
            self.generation.llm.llm_engine.engine_core.shutdown()


def _chosen(logits: Tensor, said: Tensor, options: SamplingOptions) -> Tensor:
    """Log-probability of each token said, [T], as sampled from logits [T, V]; -inf where it was not to be had."""
    scores, tokens = candidates_of(logits, options.temperature or 1.0, options.top_p)
    found = torch.where(tokens == said[:, None], scores.log_softmax(-1), float("-inf"))
    return found.amax(-1)
