"""A model with its adapter switched off, or merged into the weights for a while and the weights given back bit by bit.

An unmerged LoRA adapter makes sampling two to three times slower, on a CPU by its arithmetic and on a GPU by the launches of its
kernels. Merging rounds the adapter's delta to the weights' dtype, as any deployment of merged weights does.

PEFT's ``unmerge`` subtracts the delta again, which in bfloat16 leaves rounding errors behind: over 300 merges of a growing
adapter a fifth of SmolLM2's weights changed, by half of the adapter's own norm. The base is the teacher and the yardstick of
everything here, so weights are copied before a merge and copied back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from trimtab.axis.base_check import WRAPPERS, base_name, is_tied, near, plain_module, probe_logits
from trimtab.axis.directions import Floor
from trimtab.axis.hooks import ActivationController
from trimtab.axis.layers import base_model_of

MERGED_SHARE = 0.2  # of a GPU's memory, which the copies of the adapted weights may take


@contextlib.contextmanager
def as_base(model: Any, controller: ActivationController, floor: Floor | None = None) -> Iterator[Any]:
    """The frozen base inside the block, without gradient; under the cap of ``floor``, where one is given, the capped self.

    In evaluation mode: a teacher with dropout would be another one at every forward.

    Args:
        model: a PeftModel, wrapped for training or not; the unwrapped one is yielded.
        controller: its hooks.
        floor: the cap's floor.
    """
    inner: Any = extract_model_from_parallel(model)
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad(), inner.disable_adapter(), controller.uncapped():
            if floor is None:
                yield inner
                return
            with controller.capping(floor):
                yield inner
    finally:
        inner.train(training)


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """Merge the active adapter of a PEFT model inside the block. The copies take the memory of the adapted weights.

    Args:
        model: a PeftModel whose adapted weights are whole tensors (not sharded, not quantised).
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                stack.enter_context(_merged_layer(module))
        yield model


@contextlib.contextmanager
def _merged_layer(layer: Any) -> Iterator[None]:
    """Merge the active adapter of one layer inside the block, and give the very weights back."""
    base = layer.get_base_layer()
    kept = {name: (parameter, parameter.detach().clone()) for name, parameter in base.named_parameters()}
    try:
        layer.merge()
        yield
    finally:
        try:
            layer.unmerge()
        finally:
            with torch.no_grad():
                for name, (parameter, copy) in kept.items():
                    parameter.copy_(copy)
                    if base.get_parameter(name) is not parameter:  # merging quantised weights makes new ones
                        setattr(base, name, parameter)


def merged_weights(
    model: Any,
    *,
    base: bool = False,
    gathered: Callable[[Sequence[Any]], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a PEFT model one by one, with its adapter merged in, by the names and in the form of the checkpoint.

    One layer is merged, and under ZeRO-3 gathered, at a time. A weight is valid until the next is asked for.

    Args:
        model: a PeftModel; under ZeRO-3 and FSDP2 all ranks iterate alike.
        base: leave the adapter out.
        gathered: makes sharded parameters whole inside a block (ZeRO-3).
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    for name, parameter in model.named_parameters():
        tuned_whole = ".modules_to_save." in name
        if ".original_module." in name if not base else tuned_whole:
            continue
        if base_name(model, name) is None and not tuned_whole:
            continue
        # the layer around the weight, and the layers around that one
        cuts = [found.start() for found in re.finditer(r"\.base_layer\b", name)]
        around = [layers[name[:cut]] for cut in cuts]
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(gathered([parameter, *(own for layer in around[:1] for own in layer.parameters())]))
            for layer in () if base else around:
                stack.enter_context(_merged_layer(layer))
            held = model.get_parameter(name)
            whole = held.full_tensor() if hasattr(held, "full_tensor") else held.data
            inside = re.sub(WRAPPERS, "", name.removeprefix("base_model.model."))
            # experts, one weight in transformers, are many in the checkpoint
            yield from revert_weight_conversion(model.get_base_model(), {inside: whole}).items()


class NotMergeable(RuntimeError):
    """An adapter that can't be merged, or not without changing what it does."""


def merge_in(
    model: Any, gathered: Callable[[Sequence[Any]], contextlib.AbstractContextManager[Any]] | None = None
) -> Any:
    """Merge the adapter of a PEFT model for good; returns the plain model, which says what the PEFT model said.

    Where embedding and head are one weight and an adapter is on either, they are parted first: each gets what is its own.

    Args:
        model: a PeftModel, used up.
        gathered: under ZeRO-3, makes sharded parameters whole inside a block, and keeps what was written there.

    Raises:
        NotMergeable: if PEFT has no way to merge it, or the merged model says something else.
    """
    wanted = probe_logits(model)
    quantised = any(hasattr(p, "quant_state") or not p.is_floating_point() for p in model.parameters())
    base = base_model_of(model)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if is_tied(model) and any(isinstance(module, BaseTunerLayer) for module in (head, embedding)):
        part_head(base)
    try:
        if gathered is not None:
            layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            for layer in layers:
                with gathered(list(layer.parameters())):
                    layer.merge()
        plain = model.merge_and_unload()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        raise NotMergeable(str(error)) from error
    # merged into quantised weights, which are quantised again, it is another model by as much as that rounds
    found = probe_logits(plain)
    if wanted is not None and found is not None and not quantised and not near(found, wanted):
        raise NotMergeable("the merged model says something else")
    return plain


def part_head(base: Any) -> None:
    """Give the head a weight of its own, a copy of the embedding's, where the two are one."""
    head = plain_module(base.get_output_embeddings())
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def merged_if_quicker(model: Any) -> contextlib.AbstractContextManager[Any]:
    """:func:`merged` where :func:`can_merge` says so, else the model as it is."""
    return merged(model) if can_merge(model) else contextlib.nullcontext(model)


def can_merge(model: Any) -> bool:
    """Whether merging for a while is possible and worth it: whole, unquantised weights, a place for every delta, room for copies.

    Said by sizes alone, never by what is free at the moment: within a run the answer must stay the same, since what is sampled
    merged is scored merged.
    """
    parameters = list(model.parameters())
    whole = all(not hasattr(p, "ds_id") and not hasattr(p, "full_tensor") for p in parameters)
    adapted = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    placed = not any(
        any(getattr(layer, "lora_bias", {}).values()) and getattr(layer.get_base_layer(), "bias", None) is None
        for layer in adapted
    )
    # 4-bit blocks are stored in a floating dtype, 8-bit ones as whole numbers
    plain = all(p.is_floating_point() and not hasattr(p, "quant_state") for p in parameters)
    known = all(p.device.type in ("cpu", "cuda") for p in parameters)
    own = (p for layer in adapted for p in layer.get_base_layer().parameters())
    return whole and placed and plain and known and room_for_copies(own)


def room_for_copies(parameters: Iterable[Any], times: int = 1) -> bool:
    """Whether weights may be copied where they lie: on a GPU within :data:`MERGED_SHARE` of its memory, elsewhere always.

    Args:
        parameters: the weights.
        times: how often each is copied.
    """
    sizes: dict[torch.device, int] = {}
    for p in parameters:
        sizes[p.device] = sizes.get(p.device, 0) + times * p.numel() * p.element_size()
    return all(
        size <= MERGED_SHARE * torch.cuda.get_device_properties(device).total_memory
        for device, size in sizes.items()
        if device.type == "cuda"
    )
