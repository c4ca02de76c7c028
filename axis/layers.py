"""Find the decoder layers of any Hugging Face causal or multimodal model, PEFT-wrapped or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.axis.errors import UserError


def base_model_of(model: nn.Module) -> Any:
    """The transformers model inside a PEFT, torch.compile or distributed wrapper."""
    seen: Any = model
    while True:
        if hasattr(seen, "get_base_model"):  # PEFT; a compiled PEFT model proxies it too
            return seen.get_base_model()
        inner = getattr(seen, "_orig_mod", None) or getattr(seen, "module", None)
        if not isinstance(inner, nn.Module):
            return seen
        seen = inner


def text_config_of(model: nn.Module) -> Any:
    """The configuration of the text decoder (multimodal models nest it)."""
    config = getattr(base_model_of(model), "config", None)
    if config is None:
        raise UserError(
            f"{type(model).__name__} has no config, so its depth is unknown",
            remedy="give a Hugging Face transformers model",
        )
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def shape_of_config(config: Any) -> tuple[int, int]:
    """Number of decoder layers and hidden size, (N, D), as the configuration of a text decoder tells them.

    Raises:
        UserError: if it tells one of them not, or not as a number.
    """
    return _told(config, "num_hidden_layers"), _told(config, "hidden_size")


def _told(config: Any, key: str) -> int:
    number = getattr(config, key, None)
    if not isinstance(number, int) or number < 1:
        raise UserError(
            f"{type(config).__name__} does not tell {key}: {number!r}",
            key="model.name",
            remedy="use a decoder model of transformers; for another one set that number in its config, and where the config "
            "counts otherwise than the model, pass the layers to ActivationController(model, layers=...)",
        )
    return number


def shape_of(model: nn.Module) -> tuple[int, int]:
    """Number of decoder layers and hidden size, (N, D), by the model's config; see :func:`shape_of_config`."""
    return shape_of_config(text_config_of(model))


def width_of(model: nn.Module) -> int:
    """Hidden size D by the model's config; how many layers the config counts is no matter here."""
    return _told(text_config_of(model), "hidden_size")


def stream_of(output: Any, hidden_size: int, layer: int) -> Tensor:
    """The residual stream [B, T, D] in what a decoder layer returned: the tensor, or the first of a tuple.

    Everything that hooks a layer takes the stream from here, so that no tensor of another shape is ever capped, read or recorded.

    Raises:
        UserError: if that is no tensor [B, T, ``hidden_size``].
    """
    hidden = output[0] if isinstance(output, tuple) and output else output
    if isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[-1] == hidden_size:
        return hidden
    raise _no_stream(output, hidden, hidden_size, layer)


def _no_stream(output: Any, hidden: Any, hidden_size: int, layer: int) -> UserError:
    shape = f"a tensor of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
    if isinstance(output, tuple) and output:
        shape = f"a tuple that begins with {shape}"
    several = isinstance(hidden, Tensor) and hidden.dim() == 4
    return UserError(
        f"decoder layer {layer} returns {shape}, where one residual stream [batch, tokens, {hidden_size}] is expected"
        + ("; this looks like several residual streams side by side" if several else ""),
        key="model.name",
        remedy="use a model whose layers return one residual stream; the axis and the cap are not defined on another",
    )


def with_stream(output: Any, hidden: Tensor) -> Any:
    """What a decoder layer returned, with another tensor in the place of the stream that :func:`stream_of` found in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers, in order.

    The shallowest ``ModuleList`` inside ``get_decoder()`` whose length is the text config's ``num_hidden_layers``; a vision
    tower of the same depth is outside the decoder and so never taken.

    Raises:
        UserError: if there is none, or several at the same depth; it lists every ModuleList that was looked at.
    """
    base = base_model_of(model)
    depth = shape_of(model)[0]
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    # ModernBERT's `decoder` is its vocabulary head
    if not isinstance(decoder, nn.Module) or not any(isinstance(part, nn.ModuleList) for part in decoder.modules()):
        decoder = base
    looked: list[str] = []
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList):
            looked.append(f"{name or '(root)'} [{len(module)}]")
            if len(module) == depth:
                found.append((name.count("."), name, module))
    found.sort(key=lambda entry: entry[0])
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        problem = "no list of" if not found else "more than one list of"
        raise UserError(
            f"{problem} {depth} decoder layers in {type(base).__name__}.{type(decoder).__name__}; "
            f"looked at: {', '.join(looked) or 'no ModuleList at all'}",
            remedy="use a decoder model of transformers; for another one pass its layers to "
            "ActivationController(model, layers=...)",
        )
    return found[0][2]
