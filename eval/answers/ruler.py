"""Where answers lie: z along a direction, and the height above the floor.

Shapes: n answers, L floor layers, D hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.axis import Floor, project


@dataclass(frozen=True)
class Ruler:
    """Projections of answers, in sigma, relative to the base model's default Assistant: 0 = default, negative = away.

    Attributes:
        directions: unit directions at the floor's layers, [L, D].
        origin: mean projection of the base's default answers, [L].
        sigma: standard deviation over the base's answers, roles and default pooled, [L].
    """

    directions: Tensor
    origin: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, directions: Tensor, default: Tensor, pooled: Tensor) -> Ruler:
        """Make a ruler from the base's default answers' means [n, L, D] and all of the base's answers' means."""
        at_default = torch.einsum("nld,ld->nl", default, directions)
        over_pool = torch.einsum("nld,ld->nl", pooled, directions)
        return cls(directions, _nanmean(at_default), over_pool[torch.isfinite(over_pool).all(1)].std(0))

    def z(self, means: Tensor) -> list[float]:
        """Mean over layers of z of each answer, [n]; NaN for an empty answer. ``means`` [n, L, D]."""
        projections = torch.einsum("nld,ld->nl", means, self.directions)
        return [float(value) for value in ((projections - self.origin) / self.sigma).mean(1)]

    def token_z(self, states: Sequence[Tensor]) -> Tensor:
        """Mean over layers of z of each token, [T], from one state [T, D] a layer."""
        rows = [(project(state, self.directions[i]) - self.origin[i]) / self.sigma[i] for i, state in enumerate(states)]
        return torch.stack(rows).mean(0)


def above_floor_by_layer(floor: Floor, means: Tensor) -> Tensor:
    """Height of each answer's mean projection above the floor, (p - tau) / sigma, one a floor layer, [n, L].

    Args:
        floor: the floor.
        means: mean activations over each answer's tokens at the floor's layers, [n, L, D].
    """
    return (torch.einsum("nld,ld->nl", means, floor.directions) - floor.tau) / floor.sigma


def above_floor(floor: Floor, means: Tensor) -> Tensor:
    """Mean over the floor's layers of :func:`above_floor_by_layer`, in sigma, [n]: negative = below; NaN for an empty answer."""
    return above_floor_by_layer(floor, means).mean(1)


def below_floor(floor: Floor, means: Tensor) -> list[float]:
    """Whether each answer's mean projection lies below the floor, in sigma over the floor's layers: 1, 0, or NaN if empty.

    Args:
        floor: the floor.
        means: mean activations over each answer's tokens at the floor's layers, [n, L, D].
    """
    return [float("nan") if value != value else float(value < 0) for value in above_floor(floor, means).tolist()]


def slopes(table: np.ndarray[Any, Any]) -> list[float]:
    """Least-squares slope over turns of each conversation, of [turns, conversations]; NaN with fewer than 2 turns."""
    found = []
    for column in table.T:
        present = np.isfinite(column)
        enough = int(present.sum()) >= 2
        found.append(
            float(np.polyfit(np.arange(len(column))[present], column[present], 1)[0]) if enough else float("nan")
        )
    return found


def _nanmean(values: Tensor) -> Tensor:
    return values[torch.isfinite(values).all(1)].mean(0)
