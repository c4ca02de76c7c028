"""The two artifacts of the instrument: the axis and the floor.

Shapes: N decoder layers of the model, L layers of the floor, D hidden size, R roles.
Sign: **+ is always Assistant.** Site: the output of a decoder layer, before the next layer's norm.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.errors import UserError
from trimtab.axis.files import load_tensors, save_tensors

SITE = "decoder layer output"
SIGN = "+ is Assistant"
# What rounding to bfloat16 may do to a vector's length; float32 does less than a hundred-thousandth.
ROUNDED, EXACT = 5e-3, 1e-5
# The least share of the tokens of drift text on which a floor must fire, or it holds nothing.
MIN_FIRING = 0.15
NO_SIGMA = "sigma is not known: heights are in units of the residual stream"


def unit(vectors: Tensor) -> Tensor:
    """Scale the last dimension to length 1, in float32; a zero vector stays zero."""
    vectors = vectors.float()
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(1e-12)


def _real(name: str, tensor: Any) -> Tensor:
    """A tensor of real numbers in float32, whatever float it was stored in.

    Raises:
        ValueError: if it is none, or holds NaN or infinity.
    """
    if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a tensor of real numbers, got {kind}")
    real = tensor.detach().float()
    if not torch.isfinite(real).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return real


def _as_unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length 1. What is exact already is left bit by bit as it is, so that files round-trip."""
    off = (vectors.norm(dim=-1) - 1).abs()
    return vectors if bool((off <= EXACT).all()) else unit(vectors)


def _layer_numbers(layers: Any) -> tuple[int, ...]:
    """Layer indices as plain numbers.

    Raises:
        ValueError: if they are not whole numbers, ascending, distinct and not negative, or none.
    """
    try:
        if isinstance(layers, str | bytes) or any(isinstance(layer, bool) for layer in layers):
            raise TypeError
        found = tuple(operator.index(layer) for layer in layers)
    except TypeError:
        raise ValueError(f"floor layers must be a list of whole numbers, got {layers!r}") from None
    if not found or list(found) != sorted(set(found)) or found[0] < 0:
        raise ValueError(f"floor layers must be ascending, distinct and not negative, got {found}")
    return found


@contextlib.contextmanager
def _damaged(path: str | Path, kind: str) -> Iterator[None]:
    """Turn what a file's content breaks into a fault of the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"the {kind} file lacks {error}", file=path, remedy=f"write the {kind} again") from error
    except (ValueError, TypeError) as error:
        raise UserError(str(error), file=path, remedy=f"write the {kind} again; this file is damaged") from error


def _check_sign(metadata: dict[str, Any], path: str | Path) -> None:
    """Refuse a file that says of itself that it points another way or was read at another site."""
    for key, ours in (("sign", SIGN), ("site", SITE)):
        if (told := metadata.get(key, ours)) != ours:
            raise UserError(
                f"its {key} is {told!r}, and here it is always {ours!r}",
                file=path,
                remedy="turn its vectors (and a floor's tau) and write the file again",
            )


@dataclass(frozen=True)
class Axis:
    """The Assistant Axis of one model: a unit direction per decoder layer.

    ``axis[l] = unit(mean(default) - mean(role vectors))`` (Lu et al. 2026, arXiv 2601.10387), + = Assistant.

    Attributes:
        directions: unit directions, [N, D] float32; given at any length.
        default_mean: mean activation of the default Assistant, [N, D] float32, or None for published files without it.
        role_vectors: mean activation of each role, [R, N, D] float32, or None.
        role_counts: responses behind each role vector, [R] int64, or None.
        metadata: JSON-able facts: ``model``, ``revision``, ``roles``, ``questions`` (hash), ``versions``, ...
    """

    directions: Tensor
    default_mean: Tensor | None = None
    role_vectors: Tensor | None = None
    role_counts: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        directions = _real("the axis", self.directions)
        if directions.ndim != 2:
            raise ValueError(f"axis directions must be [layers, hidden], got shape {tuple(directions.shape)}")
        if empty := (directions == 0).all(-1).nonzero().flatten().tolist():
            raise ValueError(f"axis directions are zero vectors at layers {_few(empty)}")
        object.__setattr__(self, "directions", _as_unit(directions))
        for name, dims in {"default_mean": 2, "role_vectors": 3}.items():
            if (given := getattr(self, name)) is not None:
                means = _real(f"the axis file's {name}", given)
                if means.ndim != dims or means.shape[-2:] != directions.shape:
                    raise ValueError(f"{name} has shape {tuple(means.shape)}, the axis {tuple(directions.shape)}")
                object.__setattr__(self, name, means)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers, N."""
        return self.directions.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, D."""
        return self.directions.shape[1]

    @property
    def roles(self) -> list[str]:
        """Names of the roles behind ``role_vectors``, in their order."""
        return list(self.metadata.get("roles", []))

    @classmethod
    def from_means(
        cls, default_mean: Tensor, role_vectors: Tensor, role_counts: Tensor, metadata: dict[str, Any]
    ) -> Axis:
        """Build the axis as default mean minus the mean of the role vectors; each role weighs the same.

        Raises:
            UserError: if they are the same at a layer, as where the chat template drops the role.
        """
        difference = default_mean - role_vectors.mean(0)
        if same := (difference == 0).all(-1).nonzero().flatten().tolist():
            raise UserError(
                f"the default Assistant and the roles have the very same activations at layers {_few(same)}",
                key="axis",
                remedy="see in the rollouts that the model is told its role: the chat template may leave the system prompt out",
            )
        return cls(difference, default_mean, role_vectors, role_counts, metadata)

    def save(self, path: str | Path) -> None:
        """Write ``axis.safetensors``; :meth:`load` gives back exactly the same tensors and metadata."""
        tensors = {"axis": self.directions}
        for name in ("default_mean", "role_vectors", "role_counts"):
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor
        save_tensors(path, tensors, {"format": "trimtab axis 1", "site": SITE, "sign": SIGN, "facts": self.metadata})

    @classmethod
    def load(cls, path: str | Path) -> Axis:
        """Read ``axis.safetensors``.

        Raises:
            UserError: if the file is missing, unreadable or not an axis.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != "trimtab axis 1" or "axis" not in tensors:
            raise UserError("this is not an axis file", file=path, remedy="give the axis.safetensors of a run")
        _check_sign(metadata, path)
        with _damaged(path, "axis"):
            return cls(
                tensors["axis"],
                tensors.get("default_mean"),
                tensors.get("role_vectors"),
                tensors.get("role_counts"),
                dict(metadata["facts"]),
            )


@dataclass(frozen=True)
class Floor:
    """A floor on the projection at a window of layers.

    The cap built from it is ``h + strength * relu(tau - <h, v>) * v`` at every token of every floor layer.

    Any real dtype is taken and held as float32. Directions must be of unit length but for the rounding of a short float, which is
    taken out: with a longer one it is left open whether tau is meant in units of <h, v> or of <h, v/|v|>, so it is refused.

    Attributes:
        layers: indices of the decoder layers, ascending, length L.
        directions: unit directions v, [L, D] float32, + = Assistant.
        tau: floors in units of the residual stream, [L] float32.
        sigma: standard deviation of the projection over the calibration pool, [L] float32; ``z = p / sigma``.
        metadata: model, revision, percentile, pool, firing fraction, ...
    """

    layers: tuple[int, ...]
    directions: Tensor
    tau: Tensor
    sigma: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layer_numbers(self.layers))
        count = len(self.layers)
        for name in ("directions", "tau", "sigma"):
            object.__setattr__(self, name, _real(f"the floor's {name}", getattr(self, name)))
        if self.directions.ndim != 2 or self.directions.shape[0] != count:
            raise ValueError(f"floor directions must be [{count}, hidden], got {tuple(self.directions.shape)}")
        if self.tau.shape != (count,) or self.sigma.shape != (count,):
            raise ValueError(f"tau and sigma must be [{count}], got {tuple(self.tau.shape)}, {tuple(self.sigma.shape)}")
        if (self.sigma <= 0).any():
            raise ValueError("the floor's sigma must be positive")
        lengths = self.directions.norm(dim=-1)
        if off := ((lengths - 1).abs() > ROUNDED).nonzero().flatten().tolist():
            raise ValueError(
                f"floor directions must have unit length; that of layer {self.layers[off[0]]} has {float(lengths[off[0]]):.4g}. "
                "Divide each by its length, and tau and sigma too where they are in units of <h, v>"
            )
        object.__setattr__(self, "directions", _as_unit(self.directions))

    @property
    def has_sigma(self) -> bool:
        """Whether sigma was measured; a published cap comes without, and is then read in units of the stream."""
        return self.metadata.get("sigma") != NO_SIGMA

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, D."""
        return self.directions.shape[1]

    def save(self, path: str | Path) -> None:
        """Write ``floor.safetensors``; :meth:`load` gives back exactly the same tensors and metadata."""
        facts = {"layers": list(self.layers), **self.metadata}
        tensors = {"directions": self.directions, "tau": self.tau, "sigma": self.sigma}
        save_tensors(path, tensors, {"format": "trimtab floor 1", "site": SITE, "sign": SIGN, "facts": facts})

    @classmethod
    def load(cls, path: str | Path) -> Floor:
        """Read ``floor.safetensors``.

        Raises:
            UserError: if the file is missing, unreadable or not a floor.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != "trimtab floor 1":
            raise UserError("this is not a floor file", file=path, remedy="give the floor.safetensors of a run")
        _check_sign(metadata, path)
        with _damaged(path, "floor"):
            facts = dict(metadata["facts"])
            return cls(facts.pop("layers"), tensors["directions"], tensors["tau"], tensors["sigma"], facts)

    def at(self, layers: Sequence[int]) -> Floor:
        """The floor at some of its layers alone.

        Raises:
            UserError: if it has not all of them.
        """
        window = tuple(sorted(set(layers)))
        if not window or not set(window) <= set(self.layers):
            raise UserError(
                f"layers {list(window)} are asked for, and the floor lies at {list(self.layers)}",
                key="layers",
                remedy="name some of the floor's own layers, or leave them out",
            )
        rows = [self.layers.index(layer) for layer in window]
        return Floor(window, self.directions[rows], self.tau[rows], self.sigma[rows], self.metadata)

    def replace_directions(self, directions: Tensor, tau: Tensor, sigma: Tensor, **facts: Any) -> Floor:
        """The same window along other directions (a control, a held-out axis)."""
        return Floor(self.layers, unit(directions), tau.float(), sigma.float(), {**self.metadata, **facts})


def _few(layers: Sequence[int]) -> str:
    """The first layers of a list, as text."""
    return ", ".join(map(str, layers[:4])) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")


def check_fits(
    n_layers: int,
    hidden_size: int,
    *,
    axis: Axis | None = None,
    floor: Floor | None = None,
    file: str | Path | None = None,
) -> None:
    """Check that an axis or a floor belongs to a model of this depth and width.

    Raises:
        UserError: naming what differs.
    """
    if axis is not None and (axis.n_layers, axis.hidden_size) != (n_layers, hidden_size):
        raise UserError(
            f"the axis has {axis.n_layers} layers of width {axis.hidden_size}, the model {n_layers} of {hidden_size}",
            file=file,
            remedy="use the axis of this very model, or extract one: trimtab axis RECIPE",
        )
    if floor is not None:
        if floor.hidden_size != hidden_size:
            raise UserError(
                f"the floor has width {floor.hidden_size}, the model {hidden_size}",
                file=file,
                remedy="use the floor of this very model, or calibrate one: trimtab floor RECIPE",
            )
        if floor.layers[-1] >= n_layers:
            raise UserError(
                f"floor layer {floor.layers[-1]} is beyond the model, whose layers are 0 to {n_layers - 1}",
                file=file,
                key="floor.layers" if file is None else None,
                remedy=f"choose layers below {n_layers}, or leave floor.layers out to have them chosen by rule"
                if file is None
                else "use the floor of this very model, or calibrate one: trimtab floor RECIPE",
            )
