"""Rollouts by vLLM with the cap on: TRL's own vLLM, colocated or a server, and the plugin of ``trimtab.axis.vllm_cap`` in it.

The sampler's log-probabilities come with the answers, so that the importance ratio covers what vLLM computes unlike the learner
as well as the cap. vLLM's random numbers are its own: an answer depends on what else was in flight.
"""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trimtab.axis import Floor, UserError
from trimtab.axis.chat import ChatFormat
from trimtab.axis.sampling import Answer, answer_of
from trimtab.axis.vllm_cap import LOAD_FLOOR, SET_STRENGTH, SWITCH, check_loaded, floor_payload, register

RPC_SECONDS = 600  # a worker answers when the requests before are done

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


class VLLMRollouts:
    """Samples through TRL's vLLM, capped.

    Args:
        generation: TRL's ``VLLMGeneration``.
        form: chat format.
        floor: what is capped to.
        main: whether this process is the one that talks to a server.
        most: the largest of a number over all ranks, which all call it.

    Raises:
        UserError: if vLLM has no caps, or not where the floor is.
    """

    def __init__(
        self, generation: Any, form: ChatFormat, floor: Floor, *, main: bool, most: Callable[[int], int]
    ) -> None:
        self.generation = generation
        self.form = form
        self.most = most
        self._main = main
        # what ends an answer here ends it there
        generation.generation_kwargs = {**generation.generation_kwargs, "stop_token_ids": form.end_ids}
        if generation.mode == "server" and main:
            kept = generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if kept != "processed_logprobs":
                raise UserError(
                    f"the vLLM server gives {kept}, which don't know of the temperature: the importance ratio would be wrong",
                    key="train.vllm_mode",
                    remedy=SERVE,
                )
        if answers := self._call(LOAD_FLOOR, floor_payload(floor)):
            check_loaded(floor, answers)

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
        self._set_strength(strength)
        try:
            yield
        finally:
            self._set_strength(0.0)

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """An answer to each prompt, with the log-probabilities of its tokens; all ranks call it, some perhaps with no prompt."""
        # TRL takes the same number from every rank
        empty = [[self.form.end_token]] * (self.most(len(prompts)) - len(prompts))
        _, tokens, logprobs, _ = self.generation.generate([*map(list, prompts), *empty], None, 1)
        answers = []
        for index in range(len(prompts)):
            ids = list(tokens[index])
            said = [math.nan if row[0] is None else float(row[0]) for row in logprobs[index]]
            # a conversation goes on with the template's own end, whatever ended the answer
            if ids[-1] in self.form.end_ids and ids[-1] != self.form.end_token:
                said[-1] = math.nan
            answers.append(answer_of(self.form, index, ids, logprobs=said))
        return answers

    def close(self) -> None:
        """Stop a colocated vLLM: left to the interpreter's end, it looks for process groups that are gone by then."""
        if self.generation.mode == "colocate":
            self.generation.llm.llm_engine.engine_core.shutdown()
