"""The hooks: one controller a model, registered once, switched by plain Python flags.

Shapes: B batch, T tokens, D hidden size, L recorded or capped layers.

Why it is built so (each point was measured, see docs/internals.md):

* Hooks are registered once, before ``torch.compile`` or training. Dynamo skips hook guards, so a hook that is added after
  the first compiled call is silently ignored; a flag read inside a permanent hook is not.
* Recording stores a *reference* to the raw hidden state and does no autograd operation inside the hook. Operations in the hook
  give a wrong gradient, or none, under reentrant checkpointing wherever the hook lies inside the checkpointed region.
* Directions and floors are plain tensors, neither parameters nor buffers, so ZeRO-3 and FSDP never shard them and PEFT never
  saves them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.axis.directions import Floor, check_fits
from trimtab.axis.errors import UserError
from trimtab.axis.layers import base_model_of, find_decoder_layers, stream_of, width_of, with_stream


def project(hidden: Tensor, direction: Tensor) -> Tensor:
    """Projection ``p = <h, v>`` in float32. ``hidden`` [..., D], ``direction`` [D] -> [...], units of the stream.

    In float32 inside an autocast block too, which would multiply in bfloat16: an error of 0.4 % of p.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden.float() @ direction.to(device=hidden.device, dtype=torch.float32)


def lift(hidden: Tensor, direction: Tensor, tau: float | Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """What the cap adds: ``strength * relu(tau - <h, v>) * v``, in float32.

    Args:
        hidden: [..., D].
        direction: unit direction v, [D].
        tau: floor, in units of the stream.
        strength: 0 leaves h alone, 1 lifts the projection to the floor.
    """
    direction = direction.to(device=hidden.device, dtype=torch.float32)
    shortfall = torch.relu(tau - project(hidden, direction))
    return strength * shortfall.unsqueeze(-1) * direction


def cap(hidden: Tensor, direction: Tensor, tau: float | Tensor, strength: float = 1.0) -> Tensor:
    """The cap: ``h + strength * relu(tau - <h, v>) * v``, equal to ``h - v * min(<h, v> - tau, 0)`` at strength 1.

    Computed in float32 and returned in the dtype of ``hidden``. In bfloat16 the capped projection may fall short of tau by the
    rounding of ``h`` (about 0.4 % of its largest component), so compare with a tolerance. Arguments as for :func:`lift`.
    """
    exact = hidden.float()
    return (exact + lift(exact, direction, tau, strength)).to(hidden.dtype)


@dataclass
class Recording:
    """Raw hidden states of one or more forwards: layer -> list of [B, T, D], one entry a forward, in order."""

    states: dict[int, list[Tensor]] = field(default_factory=dict)

    def last(self, layer: int, *, with_grad: bool = False) -> Tensor:
        """The last recorded state of ``layer``; with ``with_grad`` the last that takes part in autograd.

        Raises:
            RuntimeError: if no such state was recorded, which means that the hooks did not see the forward.
        """
        return self._of(reversed(self.states.get(layer, [])), layer, with_grad=with_grad)

    def first(self, layer: int) -> Tensor:
        """The first recorded state of ``layer``; RuntimeError as for :meth:`last`."""
        return self._of(iter(self.states.get(layer, [])), layer, with_grad=False)

    @staticmethod
    def _of(states: Iterator[Tensor], layer: int, *, with_grad: bool) -> Tensor:
        for hidden in states:
            if hidden.requires_grad or not with_grad:
                return hidden
        kind = "state that requires grad" if with_grad else "state"
        raise RuntimeError(
            f"no {kind} was recorded at layer {layer}: the forward did not pass the hooked layers"
            + (", or nothing below that layer is trainable" if with_grad else "")
        )


@dataclass
class CapCounter:
    """Fired and seen (token, layer) slots while the cap was on; ``fraction`` is the firing fraction."""

    fired: float = 0.0
    seen: float = 0.0

    @property
    def fraction(self) -> float:
        """Fired slots over all; 0 where nothing was seen."""
        return self.fired / self.seen if self.seen else 0.0


Reader = Callable[[int, Tensor], None]


class ActivationController:
    """Records, reads and caps the outputs of a model's decoder layers.

    Modes, each a context manager that switches itself off, whatever happens inside:

    * :meth:`capping` lifts projections to a :class:`Floor`;
    * :meth:`recording` keeps references to raw states, for a loss computed after the forward;
    * :meth:`reading` calls a function with each layer's output, for statistics gathered on the way.

    Recording sees the state *before* the cap, and so does reading unless told otherwise. ``disable_adapter()`` does not switch
    the cap off: the capped self is exactly "adapter off, cap on".

    A layer that returns anything but one residual stream [B, T, D] is a :class:`UserError` at the first forward that passes it.

    Args:
        model: any Hugging Face causal or multimodal model, PEFT-wrapped, compiled later, or not.
        layers: all decoder layers in order, where :func:`find_decoder_layers` can't find them. They decide how many there are,
            whatever the model's config counts.

    Raises:
        UserError: if the layers are not found, or ``layers`` are none, not the model's, or hold one twice.
        RuntimeError: if the model has a controller already.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module] | None = None) -> None:
        found = list(find_decoder_layers(model)) if layers is None else _given_layers(model, layers)
        self.n_layers, self.hidden_size = len(found), width_of(model)
        if self._among(found) is not None:
            raise RuntimeError("this model has a controller already; use ActivationController.of(model)")
        self._strength = 0.0
        self._cap_layers: dict[int, tuple[Tensor, float]] = {}
        self._counter: CapCounter | None = None
        self._count_mask: Tensor | None = None
        self._record: Recording | None = None
        self._record_layers: frozenset[int] = frozenset()
        self._reader: Reader | None = None
        self._reader_layers: frozenset[int] = frozenset()
        self._read_after_cap = False
        self._handles = [layer.register_forward_hook(_LayerHook(self, index)) for index, layer in enumerate(found)]

    @classmethod
    def of(cls, model: nn.Module) -> ActivationController:
        """The controller of this model, found on its layers; made, with its hooks, at the first call.

        A deep copy of a hooked model has a controller of its own, switched off.
        """
        # all modules, not find_decoder_layers: the layers may have been given by hand
        found = cls._among(base_model_of(model).modules())
        return found if found is not None else cls(model)

    @staticmethod
    def _among(modules: Iterable[nn.Module]) -> ActivationController | None:
        for module in modules:
            for hook in module._forward_hooks.values():
                if isinstance(hook, _LayerHook):
                    return hook.controller
        return None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationController:
        # A deep-copied model carries copies of our hooks. They must not be driven by the original's flags.
        clone = object.__new__(ActivationController)
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            setattr(clone, name, value)
        clone._handles = copy.deepcopy(self._handles, memo)
        clone._cap_layers, clone._record, clone._reader, clone._counter = {}, None, None, None
        clone._record_layers = clone._reader_layers = frozenset()
        clone._strength, clone._count_mask, clone._read_after_cap = 0.0, None, False
        return clone

    @property
    def cap_strength(self) -> float:
        """Strength of the cap at this moment; 0 when it is off."""
        return self._strength if self._cap_layers else 0.0

    @contextlib.contextmanager
    def capping(
        self, floor: Floor, strength: float = 1.0, *, enabled: bool = True, count: bool = False
    ) -> Iterator[CapCounter]:
        """Cap every token of every floor layer inside the block.

        Args:
            floor: the floor; it must fit the model.
            strength: see :func:`cap`.
            enabled: False makes the block do nothing, for arms with and without the cap in one loop.
            count: count fired slots (:meth:`count_tokens` sets the mask); costs a reduction a layer.

        Raises:
            UserError: if the floor does not fit the model.
            RuntimeError: if a cap is on already.
        """
        check_fits(self.n_layers, self.hidden_size, floor=floor)
        if self._cap_layers:
            raise RuntimeError("a cap is on already; caps don't nest")
        counter = CapCounter()
        if not enabled or strength == 0.0:
            yield counter
            return
        try:
            self._strength = strength
            self._cap_layers = {
                layer: (floor.directions[i], float(floor.tau[i])) for i, layer in enumerate(floor.layers)
            }
            self._counter = counter if count else None
            yield counter
        finally:
            self._cap_layers, self._strength, self._counter = {}, 0.0, None

    @contextlib.contextmanager
    def uncapped(self) -> Iterator[None]:
        """Suspend a cap inside the block (the learner's forward inside a capped loop)."""
        held = self._cap_layers, self._strength, self._counter
        self._cap_layers, self._strength, self._counter = {}, 0.0, None
        try:
            yield
        finally:
            self._cap_layers, self._strength, self._counter = held

    @contextlib.contextmanager
    def recording(self, layers: Sequence[int]) -> Iterator[Recording]:
        """Keep references to the raw outputs of ``layers`` for the forwards inside the block."""
        if self._record is not None:
            raise RuntimeError("a recording is under way already")
        recording = Recording()
        self._record, self._record_layers = recording, frozenset(layers)
        try:
            yield recording
        finally:
            self._record, self._record_layers = None, frozenset()

    @contextlib.contextmanager
    def reading(self, layers: Sequence[int], reader: Reader, *, after_cap: bool = False) -> Iterator[None]:
        """Call ``reader(layer, hidden [B, T, D])`` under no_grad at each forward inside the block.

        Args:
            layers: layers to read.
            reader: what is called.
            after_cap: give it what the next layer sees; by default it gets the layer's own output, before the cap.
        """
        if self._reader is not None:
            raise RuntimeError("a reader is set already")
        self._reader, self._reader_layers, self._read_after_cap = reader, frozenset(layers), after_cap
        try:
            yield
        finally:
            self._reader, self._reader_layers, self._read_after_cap = None, frozenset(), False

    def count_tokens(self, mask: Tensor | None) -> None:
        """Restrict the counting of fired slots to tokens where ``mask`` is true, until the next call; None counts all.

        The forwards in between must have the shape of ``mask``, [B, T]; another one raises ValueError.
        """
        self._count_mask = mask

    def _on_layer(self, index: int, output: Any) -> Any:
        hidden = stream_of(output, self.hidden_size, index)
        if self._record is not None and index in self._record_layers:
            self._record.states.setdefault(index, []).append(hidden)
        target = self._cap_layers.get(index)
        if target is None or not self._read_after_cap:
            self._read(index, hidden)
        if target is None:
            return None
        direction, tau = self._on_device(index, target, hidden.device)
        if self._counter is not None:
            self._count(hidden, direction, tau)
        capped = cap(hidden, direction, tau, self._strength)
        if self._read_after_cap:
            self._read(index, capped)
        return with_stream(output, capped)

    def _read(self, index: int, hidden: Tensor) -> None:
        if self._reader is not None and index in self._reader_layers:
            with torch.no_grad():
                self._reader(index, hidden.detach())

    def _on_device(self, index: int, target: tuple[Tensor, float], device: torch.device) -> tuple[Tensor, float]:
        if target[0].device != device:
            target = (target[0].to(device), target[1])
            self._cap_layers[index] = target
        return target

    def _count(self, hidden: Tensor, direction: Tensor, tau: float) -> None:
        assert self._counter is not None
        fired = project(hidden.detach(), direction) < tau
        mask = self._count_mask
        if mask is None:
            self._counter.seen += fired.numel()
        elif mask.shape != fired.shape:
            raise ValueError(f"the counting mask is {tuple(mask.shape)}, the forward {tuple(fired.shape)} tokens")
        else:
            fired = fired & mask.to(device=fired.device, dtype=torch.bool)
            self._counter.seen += float(mask.sum())
        self._counter.fired += float(fired.sum())


class _LayerHook:
    """A forward hook of one layer; a class, so that deepcopy of the model copies it together with its controller."""

    def __init__(self, controller: ActivationController, index: int) -> None:
        self.controller = controller
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.controller._on_layer(self.index, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _LayerHook:
        return _LayerHook(copy.deepcopy(self.controller, memo), self.index)


def _given_layers(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Layers that were given by hand; a hook on a module that the model doesn't have would never be called."""
    given, own = list(layers), set(base_model_of(model).modules())
    strangers = [i for i, layer in enumerate(given) if layer not in own]
    if not given or len(set(given)) < len(given) or strangers:
        fault = f"layer {strangers[0]} of those given is no module of it" if strangers else "none or one twice is given"
        raise UserError(
            f"these are not the decoder layers of {type(model).__name__}: {fault}",
            key="layers",
            remedy="give all decoder layers of this very model, each once, in order",
        )
    return given


def decoder_layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers: those that its controller hooks, which may have been given by hand, else those that are found.

    Raises:
        UserError: see :func:`find_decoder_layers`.
    """
    hooked = {
        hook.index: module
        for module in base_model_of(model).modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, _LayerHook)
    }
    return [hooked[index] for index in sorted(hooked)] or list(find_decoder_layers(model))
