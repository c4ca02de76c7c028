"""A causal model's final hidden states and its vocabulary head, apart, so that logits need never exist all at once.

Shapes: B batch, T tokens, D hidden size, V vocabulary, M chosen tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.axis.errors import UserError
from trimtab.axis.layers import base_model_of, text_config_of


class OutputHead:
    """Final hidden states of a model's forwards, and the way from them to logits.

    Use it so: take :meth:`answer_states` and give them to :meth:`logits` inside :meth:`gathered`.

    One hook is registered on the model's backbone and switched by a flag, for the reasons that
    :class:`~trimtab.axis.hooks.ActivationController` gives.

    Args:
        model: any Hugging Face causal model, PEFT-wrapped or not.

    Raises:
        UserError: if the head is tuned. States alone don't say whose they are, and the base's would go through the tuned head.
    """

    def __init__(self, model: nn.Module) -> None:
        self._base: Any = base_model_of(model)
        config = text_config_of(model)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = _logit_scale(config)
        self._states: list[Tensor] | None = None
        self._head()
        self._base.get_decoder().register_forward_hook(self._on_backbone)

    def _head(self) -> Any:
        head = self._base.get_output_embeddings()
        if any(hasattr(head, name) for name in ("base_layer", "original_module")):  # what PEFT puts around a module
            raise UserError(
                "the head is tuned, and the base's states would go through it",
                key="lora",
                remedy="leave the head out of target_modules, modules_to_save and, where it is the embedding too, "
                "trainable_token_indices",
            )
        return head

    def _on_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._states is not None:
            self._states.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Keep the final hidden states [B, T, D] of the forwards inside the block, in order."""
        states: list[Tensor] = []
        self._states = states
        try:
            yield states
        finally:
            self._states = None

    def final_states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Final hidden states [B, T, D] of one forward, whose logits are not computed.

        Args:
            model: the model, as a trainer has wrapped it.
            inputs: ``input_ids``, and ``attention_mask`` and ``position_ids`` where they are there.
        """
        kept = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
        with self.capture() as states:
            model(**kept, use_cache=False, logits_to_keep=1)
        return states[-1]

    def answer_states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Final hidden states [M, D] that predict the labelled tokens: the state before position t predicts token t.

        Args:
            model: the model, as a trainer has wrapped it.
            inputs: those of :meth:`final_states`, and ``labels``, -100 where nothing is predicted.
        """
        return self.final_states(model, inputs)[:, :-1][inputs["labels"][:, 1:].ne(-100)]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Have the head's weights whole inside the block, where ZeRO-3 has sharded them."""
        weights = [p for p in self._head().parameters() if hasattr(p, "ds_id")]
        if not weights:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(weights):
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [M, V] of final hidden states [M, D], as the model itself would give them."""
        head = self._head()
        weight, bias = head.weight, head.bias
        if hasattr(weight, "full_tensor"):  # FSDP2 shards it as a DTensor
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        logits = nn.functional.linear(hidden.to(device=weight.device, dtype=weight.dtype), weight, bias)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def _logit_scale(config: Any) -> float:
    """What the logits are multiplied by: Cohere, Falcon-H1, Granite and others scale them, each under a name of its own."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    multiplies = config.model_type == "hyperclovax"  # Granite divides by it
    return scaling if multiplies else 1.0 / scaling
