"""Whether a model does what the instrument takes for granted, found out before anything is sampled.

:func:`check_model` runs one forward of a few tokens when a model is loaded. It refuses a model whose decoder layers don't pass on
one residual stream, each layer once a forward; that reads later tokens; or that gives NaN or infinity. :func:`not_finite` is the
error for the latter wherever it shows later, with the damaged weight or the layer and its dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.axis.errors import UserError, one_line
from trimtab.axis.hooks import ActivationController, decoder_layers_of
from trimtab.axis.layers import stream_of, width_of
from trimtab.axis.models import Loaded

PROBE = "How are you today, and what is the weather like?"
# Two rows that differ in their last token are computed alike before it, but for the order of sums: in float32, in shorter floats.
SAME, NEARLY_SAME = 1e-5, 1e-2


@dataclass
class _Seen:
    """What each layer got and gave in one forward: layer -> one entry a call."""

    inputs: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    outputs: dict[int, list[Any]] = field(default_factory=dict)


@contextlib.contextmanager
def _watching(layers: Sequence[nn.Module]) -> Iterator[_Seen]:
    """Keep references to what the layers get and give inside the block."""
    seen = _Seen()
    handles = []
    for index, layer in enumerate(layers):

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            values = [part for value in (*args, *kwargs.values()) for part in _parts(value)]
            seen.inputs.setdefault(index, []).append([value for value in values if isinstance(value, Tensor)])

        def after(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
            seen.outputs.setdefault(index, []).append(output)

        # before a cap's hook, so that the layer's own output is seen
        handles += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after, prepend=True),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


@torch.no_grad()
def check_model(loaded: Loaded) -> None:
    """Check by one forward of a few tokens that the instrument is defined on a model.

    Args:
        loaded: model and tokenizer.

    Raises:
        UserError: if it is not; it says what the layers do instead.
    """
    model, layers = loaded.model, decoder_layers_of(loaded.model)
    ids = _probe(loaded)
    training = model.training
    model.eval()
    try:
        with _watching(layers) as seen:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1).logits
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise UserError(
            f"a forward of {ids.shape[1]} tokens fails with {type(error).__name__}: {one_line(error)}",
            key="model.name",
            remedy="use a causal language model of transformers that runs on this machine by itself",
        ) from error
    finally:
        model.train(training)
    streams = _streams(seen, len(layers), width_of(model), ids)
    finite = [*(bool(torch.isfinite(stream).all()) for stream in streams), bool(torch.isfinite(logits).all())]
    if not all(finite):
        raise not_finite(model, layer=finite.index(False), dtype=streams[0].dtype)
    _check_chain(seen, streams)
    _check_causal(streams[-1])


@torch.no_grad()
def mean_states(loaded: Loaded, ids: Sequence[int]) -> Tensor:
    """Mean over tokens, but for the first (often a sink of attention), of each layer's output, [N, D] float32 on the CPU."""
    found: dict[int, Tensor] = {}
    controller = ActivationController.of(loaded.model)
    with controller.reading(range(controller.n_layers), lambda layer, hidden: _keep(found, layer, hidden)):
        tokens = torch.tensor([list(ids)], device=next(loaded.model.parameters()).device)
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return torch.stack([found[layer] for layer in range(controller.n_layers)])


def _keep(found: dict[int, Tensor], layer: int, hidden: Tensor) -> None:
    found[layer] = hidden[0, 1:].float().mean(0).cpu()


def _probe(loaded: Loaded) -> Tensor:
    """Two rows of the same tokens but for the last, [2, T]."""
    tokenizer: Any = loaded.tokenizer
    ids = torch.tensor(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    return torch.stack([ids, torch.cat([ids[:-1], ids[:1]])]).to(next(loaded.model.parameters()).device)


def _streams(seen: _Seen, count: int, width: int, ids: Tensor) -> list[Tensor]:
    """The residual stream after each layer, [B, T, D]."""
    for layer in range(count):
        calls = len(seen.outputs.get(layer, []))
        if calls != 1:
            raise _unfit(f"decoder layer {layer} runs {calls} times a forward, where once is expected")
    streams = [stream_of(seen.outputs[layer][0], width, layer) for layer in range(count)]
    for layer, stream in enumerate(streams):
        if stream.shape[:2] != ids.shape:
            raise _unfit(
                f"decoder layer {layer} returns {tuple(stream.shape[:2])} states for {tuple(ids.shape)} tokens, so they are "
                "several residual streams, or in another order"
            )
    return streams


def _check_chain(seen: _Seen, streams: Sequence[Tensor]) -> None:
    """Check that what each layer returns is what the next one gets: else it is no stream that a cap could hold."""
    for layer, stream in enumerate(streams[:-1]):
        following = [given for given in seen.inputs[layer + 1][0] if given.shape == stream.shape]
        if any(torch.equal(given.to(stream.device), stream) for given in following):
            continue
        others = [part for part in _parts(seen.outputs[layer][0])[1:] if isinstance(part, Tensor)]
        other = any(torch.equal(given, part) for given in following for part in others if given.shape == part.shape)
        raise _unfit(
            f"decoder layer {layer + 1} does not get the stream that layer {layer} returns"
            + ("; it gets another part of the tuple" if other else "")
        )


def _check_causal(stream: Tensor) -> None:
    """Check that no state before the last token knows of it."""
    one, other = stream[:, :-1].float()
    apart = float((one - other).norm() / one.norm().clamp_min(1e-12))
    if apart > (SAME if stream.dtype == torch.float32 else NEARLY_SAME):
        raise _unfit(f"it reads later tokens: states before the last one change with it, by {apart:.1g} of their size")


def _unfit(fault: str) -> UserError:
    return UserError(
        fault,
        key="model.name",
        remedy="use a causal decoder model whose layers pass on one residual stream; on another there is no axis and no cap",
    )


def not_finite(
    model: Any,
    ids: Tensor | None = None,
    attention: Tensor | None = None,
    *,
    layer: int | None = None,
    dtype: torch.dtype | None = None,
) -> UserError:
    """The error for a model that gives NaN or infinity: it names the damaged weight, or the first such layer and its dtype.

    Args:
        model: the model.
        ids: tokens on which it did, [B, T], to look for the layer by one more forward.
        attention: their attention mask.
        layer: the layer, where it is known; one past the last is the vocabulary head.
        dtype: of its output.
    """
    damaged = [name for name, weight in model.named_parameters() if not _is_finite(weight)]
    if damaged:
        more = f", the first of {len(damaged)} weights that do" if len(damaged) > 1 else ""
        return UserError(
            f"the model's answers are not finite: the weight {damaged[0]} holds NaN or infinity{more}",
            key="model.name",
            remedy="fetch or save the weights again: they are damaged",
        )
    if layer is None and ids is not None and _alone():
        layer, dtype = _first_not_finite(model, ids, attention)
    dtype = dtype or next(model.parameters()).dtype
    overflow = dtype == torch.float16
    last = len(decoder_layers_of(model))
    place = "" if layer is None else "the vocabulary head" if layer == last else f"decoder layer {layer}"
    return UserError(
        "the model's answers are not finite: "
        + (f"{place} is the first to give NaN or infinity, " if place else "NaN or infinity came up ")
        + f"in {str(dtype).removeprefix('torch.')}; no weight is damaged"
        + (", so a state has outgrown float16, which ends at 65504" if overflow else ""),
        key="model.dtype",
        remedy="set model.dtype=bfloat16, or float32"
        if overflow
        else "set model.dtype=float32 or model.attn_implementation=eager, and see that the model answers by itself",
    )


def _alone() -> bool:
    """Whether this process may run the model by itself: where weights are sharded, a forward waits for all ranks."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


@torch.no_grad()
def _first_not_finite(model: Any, ids: Tensor, attention: Tensor | None) -> tuple[int | None, torch.dtype | None]:
    """The first layer whose output on real tokens is not finite, one past the last for the head, and its dtype; or None."""
    layers = decoder_layers_of(model)
    with _watching(layers) as seen:
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=1).logits
    real = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
    streams = [stream_of(seen.outputs[index][0], width_of(model), index) for index in range(len(layers))]
    for index, stream in enumerate(streams):
        if not torch.isfinite(stream[real.to(stream.device)]).all():
            return index, stream.dtype
    return (None, None) if torch.isfinite(logits).all() else (len(layers), logits.dtype)


def _is_finite(weight: Tensor) -> bool:
    """Whether a weight, or this rank's part of it, is finite; packed weights, which are no floats, are."""
    own: Any = weight
    own = own.to_local() if hasattr(own, "to_local") else own  # FSDP2 shards it as a DTensor
    return not own.is_floating_point() or own.is_meta or bool(torch.isfinite(own).all())
