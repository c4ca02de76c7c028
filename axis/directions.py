"""The two artifacts of the instrument: the axis and the floor.

Shapes: N decoder layers of the model, L layers of the floor, D hidden size, R roles.
Sign: **+ is always Assistant.** Site: the output of a decoder layer, before the next layer's norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.axis.errors import UserError
from trimtab.axis.files import load_tensors, save_tensors

SITE = "decoder layer output"
SIGN = "+ is Assistant"


def unit(vectors: Tensor) -> Tensor:
    """Scale the last dimension to length 1, in float32; a zero vector stays zero."""
    vectors = vectors.float()
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(1e-12)


@contextlib.contextmanager
def _damaged(path: str | Path, kind: str) -> Iterator[None]:
    """Turn what a file's content breaks into a fault of the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"the {kind} file lacks {error}", file=path, remedy=f"write the {kind} again") from error
    except ValueError as error:
        raise UserError(str(error), file=path, remedy=f"write the {kind} again; this file is damaged") from error


@dataclass(frozen=True)
class Axis:
    """The Assistant Axis of one model: a unit direction per decoder layer.

    ``axis[l] = unit(mean(default) - mean(role vectors))`` (Lu et al. 2026, arXiv 2601.10387), + = Assistant.

    Attributes:
        directions: unit directions, [N, D] float32.
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
        if self.directions.ndim != 2:
            raise ValueError(f"axis directions must be [layers, hidden], got shape {tuple(self.directions.shape)}")
        object.__setattr__(self, "directions", unit(self.directions))
        if not torch.isfinite(self.directions).all():
            raise ValueError("axis directions hold NaN or infinity")

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
        """Build the axis as default mean minus the mean of the role vectors; each role weighs the same."""
        return cls(default_mean - role_vectors.mean(0), default_mean, role_vectors, role_counts, metadata)

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
        with _damaged(path, "axis"):
            loaded = cls(
                tensors["axis"],
                tensors.get("default_mean"),
                tensors.get("role_vectors"),
                tensors.get("role_counts"),
                metadata["facts"],
            )
        object.__setattr__(loaded, "directions", tensors["axis"])  # exact: do not normalise a second time
        return loaded


@dataclass(frozen=True)
class Floor:
    """A floor on the projection at a window of layers.

    The cap built from it is ``h + strength * relu(tau - <h, v>) * v`` at every token of every floor layer.

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
        count = len(self.layers)
        if count == 0 or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"floor layers must be ascending, distinct and not negative, got {self.layers}")
        if self.directions.ndim != 2 or self.directions.shape[0] != count:
            raise ValueError(f"floor directions must be [{count}, hidden], got {tuple(self.directions.shape)}")
        if self.tau.shape != (count,) or self.sigma.shape != (count,):
            raise ValueError(f"tau and sigma must be [{count}], got {tuple(self.tau.shape)}, {tuple(self.sigma.shape)}")
        for name in ("directions", "tau", "sigma"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"the floor's {name} holds NaN or infinity")
        if (self.sigma <= 0).any():
            raise ValueError("the floor's sigma must be positive")
        if not torch.allclose(self.directions.norm(dim=-1), torch.ones(count), atol=1e-4):
            raise ValueError("floor directions must have unit length")

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
        with _damaged(path, "floor"):
            facts = dict(metadata["facts"])
            layers = tuple(facts.pop("layers"))
            return cls(layers, tensors["directions"], tensors["tau"], tensors["sigma"], facts)

    def replace_directions(self, directions: Tensor, tau: Tensor, sigma: Tensor, **facts: Any) -> Floor:
        """The same window along other directions (a control, a held-out axis)."""
        return Floor(self.layers, unit(directions), tau.float(), sigma.float(), {**self.metadata, **facts})


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
                key="floor.layers",
                remedy=f"choose layers below {n_layers}, or leave floor.layers out to have them chosen by rule",
            )
