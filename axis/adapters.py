"""A model with its adapter switched off, or merged into the weights for a while and the weights given back bit by bit.

An unmerged LoRA adapter makes sampling on a CPU two to three times slower. Merging rounds the adapter's delta to the weights'
dtype, as any deployment of merged weights does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer

from trimtab.axis.directions import Floor
from trimtab.axis.hooks import ActivationController


@contextlib.contextmanager
def as_base(model: Any, controller: ActivationController, floor: Floor | None = None) -> Iterator[Any]:
    """The frozen base inside the block, without gradient; under the cap of ``floor``, where one is given, the capped self.

    Args:
        model: a PeftModel, wrapped for training or not; the unwrapped one is yielded.
        controller: its hooks.
        floor: the cap's floor.
    """
    inner: Any = extract_model_from_parallel(model)
    with torch.no_grad(), inner.disable_adapter(), controller.uncapped():
        if floor is None:
            yield inner
            return
        with controller.capping(floor):
            yield inner


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Merge the active adapter of a PEFT model inside the block.

    ``unmerge_adapter`` subtracts the delta again, which in bfloat16 leaves rounding errors behind; here the weights are
    copied first and copied back, so a thousand rounds of sampling leave the base exactly as it was. The copies take the memory
    of the adapted weights.

    Args:
        model: a PeftModel whose adapted weights are whole tensors (not sharded, not quantised).
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    kept = [{name: p.detach().clone() for name, p in layer.get_base_layer().named_parameters()} for layer in layers]
    try:
        model.merge_adapter()
        yield model
    finally:
        try:
            model.unmerge_adapter()
        finally:
            with torch.no_grad():
                for layer, copies in zip(layers, kept, strict=True):
                    for name, parameter in layer.get_base_layer().named_parameters():
                        parameter.copy_(copies[name])


def merged_if_quicker(model: Any) -> contextlib.AbstractContextManager[Any]:
    """:func:`merged` where :func:`can_merge` says so, else the model as it is."""
    return merged(model) if can_merge(model) else contextlib.nullcontext(model)


def can_merge(model: Any) -> bool:
    """Whether merging for a while is possible and worth it: whole, unquantised weights on a CPU, and a place for every delta."""
    parameters = list(model.parameters())
    whole = all(not hasattr(p, "ds_id") and not hasattr(p, "full_tensor") for p in parameters)
    placed = not any(
        any(getattr(layer, "lora_bias", {}).values()) and getattr(layer.get_base_layer(), "bias", None) is None
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    )
    # 4-bit blocks are stored in a floating dtype, 8-bit ones as whole numbers
    plain = all(p.is_floating_point() and not hasattr(p, "quant_state") for p in parameters)
    return whole and placed and plain and all(p.device.type == "cpu" for p in parameters)
