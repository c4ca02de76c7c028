"""The cap inside vLLM: a plugin that vLLM loads in each of its processes.

vLLM runs its own model code, compiled and captured, in workers that may be other processes on other machines: the hooks of
:class:`trimtab.axis.hooks.ActivationController` never see it. So this plugin (entry point ``vllm.general_plugins``) gives each
decoder layer a :class:`LayerCap`, a module of three buffers and a forward hook, once its weights are loaded and before anything
is profiled, compiled or captured. The buffers are changed in place, by two worker methods that any ``collective_rpc`` reaches,
with no recompilation; at first they are 0, which adds nothing.

It does nothing unless ``TRIMTAB_VLLM_CAP=1``, so that an installed trimtab changes no vLLM that isn't asked to cap.

What a layer returns was checked in vLLM 0.32. Most (Llama, Mistral, Qwen, Gemma 2 and 3) return ``(hidden, residual)`` with the
addition left to the next norm, so the stream is their sum. Some (Cohere, EXAONE 4, Granite's hybrids, HyperCLOVA X, PhiMoE)
return the stream whole, and beside it a residual that is stale: their next layer writes over it. Which of the two is told by
the layer's own code, when the caps are laid (:func:`sums_residual`); where it can't be told, such an output is an error. Where
a layer returns the stream alone, or ``(stream, None)`` (Gemma 4, transformers' own code for OLMo), that is it. The lift always
goes onto the first tensor. Under tensor parallelism each rank holds the whole stream, and each lifts it alike; under pipeline
parallelism each rank caps the layers that it has.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import base64
import dis
import functools
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.axis.directions import Floor
from trimtab.axis.errors import UserError
from trimtab.axis.hooks import lift
from trimtab.axis.layers import find_decoder_layers, width_of

SWITCH = "TRIMTAB_VLLM_CAP"
LOAD_FLOOR, SET_STRENGTH = "trimtab_load_floor", "trimtab_set_strength"
_ATTRIBUTE = "trimtab_cap"


class LayerCap(nn.Module):
    """The cap of one decoder layer, in buffers that may change under a compiled graph.

    Buffers, not attributes: vLLM's sleep mode drops all else that lives on the device.

    Args:
        hidden_size: D.
        device: where the layer computes.
        sums: see :func:`sums_residual`.
        flat: whether tokens come flat, [T, D], as in vLLM's own layers; in others they may come as [B, T, D] too.
    """

    direction: Tensor
    tau: Tensor
    strength: Tensor

    def __init__(self, hidden_size: int, device: torch.device, *, sums: bool | None, flat: bool) -> None:
        super().__init__()
        self.sums = sums
        self.dims = (2,) if flat else (2, 3)
        for name, size in {"direction": hidden_size, "tau": 1, "strength": 1}.items():
            zeros = torch.zeros(size, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros, persistent=False)

    def forward(self, stream: Tensor) -> Tensor:
        """What the cap adds to the residual stream [..., D]; float32, 0 while the cap is off."""
        return lift(stream, self.direction, self.tau, self.strength)

    def stream_of(self, output: Any) -> tuple[Tensor, Tensor]:
        """What a layer returned: the tensor onto which the lift goes, and the residual stream, both [..., D].

        Raises:
            UserError: if it is no such thing, or it can't be told what the residual beside it is.
        """
        hidden: Any = output
        residual: Any = None
        if isinstance(output, tuple) and len(output) > 1:
            hidden, residual = output[0], output[1]
        for part in (hidden, residual):
            if part is not None and not self._fits(part):
                shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise _uncapped(f"a decoder layer returns {shape}, where one residual stream is expected")
        if residual is None or self.sums is False:
            return hidden, hidden.float()
        if self.sums is None:
            raise _uncapped(
                "a decoder layer returns two tensors, and its code does not tell whether their sum is the stream"
            )
        return hidden, hidden.float() + residual.float()

    def _fits(self, part: Any) -> bool:
        return isinstance(part, Tensor) and part.dim() in self.dims and part.shape[-1] == self.direction.shape[0]


def _uncapped(fault: str) -> UserError:
    return UserError(
        fault,
        key="train.use_vllm",
        remedy=f"sample without vLLM (train.use_vllm=false), or start vLLM without {SWITCH}=1 and don't cap in it",
    )


def sums_residual(layer: nn.Module) -> bool | None:
    """Whether a layer leaves the addition of its residual to the next: True, False, or None where its code doesn't tell.

    The layers of an architecture are alike, so what one does with the ``residual`` it gets is what the next will do with the one
    that it returns. A layer that reads it gets a part of the stream; one that first writes over it gets the stream whole.
    """
    forward = inspect.unwrap(type(layer).forward)
    if not hasattr(forward, "__code__") or "residual" not in inspect.signature(forward).parameters:
        return None
    for step in dis.get_instructions(forward):
        # one instruction may do two things since Python 3.13
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        for does, name in zip(re.findall("LOAD|STORE", step.opname), names, strict=False):
            if name == "residual":
                return bool(does == "LOAD")
    return False  # it is not used at all


def _capped(layer: nn.Module, _: Any, output: Any) -> Any:
    """Forward hook of a decoder layer."""
    own: Any = getattr(layer, _ATTRIBUTE)
    hidden, stream = own.stream_of(output)
    lifted = (hidden.float() + own(stream)).to(hidden.dtype)
    return (lifted, *output[1:]) if isinstance(output, tuple) else lifted


def _text_model(model: Any) -> Any:
    return model.get_language_model() if hasattr(model, "get_language_model") else model


def add_caps(model: nn.Module) -> int:
    """Give every decoder layer of a vLLM model that this rank holds its cap; returns how many.

    Raises:
        UserError: if the decoder layers are not found.
    """
    text = _text_model(model)
    count = 0
    for layer in find_decoder_layers(text):
        weight = next(layer.parameters(), None)
        if weight is None:  # a layer of another pipeline rank
            continue
        flat = type(layer).__module__.startswith("vllm.")
        own = LayerCap(width_of(text), weight.device, sums=sums_residual(layer), flat=flat)
        layer.add_module(_ATTRIBUTE, own)
        layer.register_forward_hook(_capped)
        count += 1
    return count


def _caps(worker: Any) -> dict[int, LayerCap]:
    """The caps on this rank, by index of the layer."""
    layers = enumerate(find_decoder_layers(_text_model(worker.get_model())))
    return {index: getattr(layer, _ATTRIBUTE) for index, layer in layers if hasattr(layer, _ATTRIBUTE)}


def _load_floor(worker: Any, payload: str) -> dict[str, Any]:
    """Worker method: take a floor (:func:`floor_payload`), its cap off. Returns the layers that this rank caps."""
    floor = json.loads(payload)
    caps = _caps(worker)
    shapes = {tuple(own.direction.shape) for own in caps.values()}
    rows = {int(layer): i for i, layer in enumerate(floor["layers"])}
    directions = torch.frombuffer(bytearray(base64.b64decode(floor["directions"])), dtype=torch.float32)
    directions = directions.view(len(rows), -1)
    if shapes and shapes != {tuple(directions.shape[1:])}:
        raise ValueError(f"the floor is {directions.shape[1]} wide, the model's stream {shapes}")
    for index, own in caps.items():
        own.strength.zero_()
        if index in rows:
            own.direction.copy_(directions[rows[index]])
            own.tau.fill_(floor["tau"][rows[index]])
        else:
            own.direction.zero_()
            own.tau.zero_()
    return {"layers": sorted(rows.keys() & caps.keys())}


def _set_strength(worker: Any, strength: str) -> dict[str, Any]:
    """Worker method: set the strength of the loaded floor's cap; 0 switches it off. Returns the strength as held."""
    held = {float(own.strength.fill_(float(strength))) for own in _caps(worker).values()}
    return {"strength": sorted(held)}


def floor_payload(floor: Floor) -> str:
    """A floor as the JSON that the worker method takes."""
    raw = floor.directions.to(dtype=torch.float32, device="cpu").contiguous().numpy().tobytes()
    content: Mapping[str, Any] = {
        "layers": list(floor.layers),
        "tau": [float(tau) for tau in floor.tau],
        "directions": base64.b64encode(raw).decode(),
    }
    return json.dumps(content)


def check_loaded(floor: Floor, answers: Sequence[Mapping[str, Any]]) -> None:
    """Check that all ranks together cap every layer of the floor.

    Raises:
        UserError: for layers that no rank caps.
    """
    missing = sorted(set(floor.layers) - {layer for answer in answers for layer in answer["layers"]})
    if missing:
        raise UserError(
            f"vLLM has no cap at the floor's layers {missing}",
            key="train.use_vllm",
            remedy=f"serve the model that the floor was made for, with {SWITCH}=1 in vLLM's environment",
        )


def asked_for() -> bool:
    """Whether this process's environment asks for caps."""
    return os.environ.get(SWITCH) == "1"


def register() -> None:
    """The entry point, run by vLLM in each of its processes; does nothing without ``TRIMTAB_VLLM_CAP=1``."""
    if not asked_for():
        return
    from vllm.config import VllmConfig
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, LOAD_FLOOR):
        return
    load_model, compute_hash = BaseModelLoader.load_model, VllmConfig.compute_hash

    @functools.wraps(load_model)
    def load_capped(loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = load_model(loader, vllm_config, model_config, *args, **kwargs)
        if model_config is not vllm_config.model_config:  # a draft model: the capped one decides what is kept
            return model
        if getattr(vllm_config.compilation_config.pass_config, "enable_sp", False):
            raise UserError(
                "sequence parallelism splits the residual stream over tokens, and the cap would meet a part of it",
                remedy="start vLLM without pass_config.enable_sp",
            )
        add_caps(model)
        return model

    @functools.wraps(compute_hash)
    def salted_hash(config: Any, *args: Any, **kwargs: Any) -> str:
        # the key of the compilation cache doesn't see plugins: a graph compiled without caps would be taken for one with them
        return f"{compute_hash(config, *args, **kwargs)}-trimtab"

    BaseModelLoader.load_model = load_capped
    VllmConfig.compute_hash = salted_hash
    setattr(WorkerBase, LOAD_FLOOR, _load_floor)
    setattr(WorkerBase, SET_STRENGTH, _set_strength)
