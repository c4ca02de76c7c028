"""Find the decoder layers of any Hugging Face causal or multimodal model, PEFT-wrapped or not."""

from __future__ import annotations

from typing import Any

from torch import nn

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


def shape_of(model: nn.Module) -> tuple[int, int]:
    """Number of decoder layers and hidden size, (N, D)."""
    config = text_config_of(model)
    return int(config.num_hidden_layers), int(config.hidden_size)


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
    if not isinstance(decoder, nn.Module):
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
