"""What TRL's ``VLLMGeneration`` is to its callers, without vLLM: a model of its own that is sent its weights, caps and sleep.

vLLM itself is in tests/vllm_job, on a CPU, where it neither sleeps nor takes weights by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from conftest import build_model

from trimtab.axis import vllm_cap as plugin
from trimtab.axis.sampling import candidates_of

METHODS = {plugin.LOAD_FLOOR: plugin._load_floor, plugin.SET_STRENGTH: plugin._set_strength}


class StandIn:
    """A colocated generation and its ``llm`` in one. Asleep it has no memory: what is written to it then is an error."""

    def __init__(self, trainer: Any, *, caps: bool = True, sleeps: bool = False) -> None:
        self.model, self.accelerator = trainer.model, trainer.accelerator
        self.mode, self.enable_sleep_mode, self._llm_weights_sleeping = "colocate", sleeps, False
        self.generation_kwargs: dict[str, Any] = {}
        self.temperature, self.top_p, self.max_completion_length = 1.0, 1.0, 16
        self._dist = SimpleNamespace(gather_params=lambda parameters: contextlib.nullcontext())
        self.llm = self
        self.sent = 0
        self._caps, self._saved = caps, {}
        self._inner = build_model("llama")
        plugin.add_caps(self._inner)
        self._random = torch.Generator().manual_seed(0)
        if sleeps:
            self.sleep(level=2)

    # the llm

    def collective_rpc(self, method: str, args: tuple[str]) -> list[dict[str, Any]]:
        assert not self._saved, "a write to memory that is not mapped"
        return [METHODS[method](SimpleNamespace(get_model=lambda: self._inner), *args)]

    def reset_prefix_cache(self) -> None:
        pass

    def sleep(self, level: int) -> None:
        assert level == 2 and not self._saved
        self._saved = {name: buffer.clone() for name, buffer in self._inner.named_buffers()}
        for tensor in (*self._inner.parameters(), *self._inner.buffers()):
            tensor.data.fill_(float("nan"))
        self._llm_weights_sleeping = True

    def wake_up(self) -> None:
        for name, buffer in self._inner.named_buffers():
            buffer.data.copy_(self._saved[name])
        self._saved = {}

    # the generation

    def _iter_named_params(self) -> Any:
        raise AssertionError("TRL's own, which merges in place")

    def sync_weights(self) -> None:
        if self._llm_weights_sleeping:
            self.wake_up()
            self._llm_weights_sleeping = False
        self.sent += 1
        wanted = dict(self._inner.named_parameters())
        for name, weight in self._iter_named_params():
            wanted.pop(name).data.copy_(weight)
        assert not wanted, "weights that were not sent"

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], images: None, number: int) -> Any:
        assert images is None and number == 1
        if self._llm_weights_sleeping:
            self.sync_weights()
        caps = [module for module in self._inner.modules() if isinstance(module, plugin.LayerCap)]
        held = [cap.strength.clone() for cap in caps]
        for cap in caps if not self._caps else []:
            cap.strength.zero_()
        said = [self._answer(prompt) for prompt in prompts]
        for cap, strength in zip(caps, held, strict=True):
            cap.strength.copy_(strength)
        if self.enable_sleep_mode:
            self.sleep(level=2)
        return prompts, [ids for ids, _ in said], [told for _, told in said], None

    def _answer(self, prompt: list[int]) -> tuple[list[int], list[list[float]]]:
        ids: list[int] = []
        told: list[list[float]] = []
        while len(ids) < self.max_completion_length:
            logits = self._inner(torch.tensor([[*prompt, *ids]])).logits[:, -1]
            scores, tokens = candidates_of(logits, self.temperature or 1.0, self.top_p)
            shares = scores.log_softmax(-1)[0]
            chosen = torch.multinomial(shares.exp(), 1, generator=self._random) if self.temperature else shares.argmax()
            ids.append(int(tokens[0, chosen]))
            told.append([float(shares[chosen])])
            if ids[-1] in self.generation_kwargs["stop_token_ids"]:
                break
        return ids, told
