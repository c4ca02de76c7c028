"""Persona space: PCA of role vectors, and how the axis lies in it.

Shapes: R roles, N decoder layers, D hidden size, K components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from torch import Tensor

from trimtab.axis.directions import Axis

SHOWN = 20


@dataclass(frozen=True)
class PersonaSpace:
    """PCA of the mean-centred role vectors of one layer.

    Attributes:
        layer: decoder layer.
        variance: fraction of variance explained by each of the first components, [min(K, 20)].
        roles: names in the order of ``coordinates``; the default Assistant is last.
        coordinates: projections onto the first components, [R + 1, min(K, 3)].
        cosine_pc1: |cos(axis, PC1)| at every layer, [N].
        components_for_70: components that hold 70 % of the variance, of all there are.
    """

    layer: int
    variance: list[float]
    roles: list[str]
    coordinates: list[list[float]]
    cosine_pc1: list[float]
    components_for_70: int

    def as_json(self) -> dict[str, Any]:
        """A JSON-able form for the report."""
        return self.__dict__.copy()


def _pca(role_vectors: Tensor, layer: int) -> tuple[Any, np.ndarray[Any, Any]]:
    rows = role_vectors[:, layer].double().numpy()
    fitted = PCA(n_components=min(len(rows) - 1, rows.shape[1]), svd_solver="full").fit(rows)
    return fitted, rows


def persona_space(axis: Axis, layer: int | None = None) -> PersonaSpace:
    """PCA of the role vectors at ``layer`` (default: the middle, as in the paper), and cos(axis, PC1) at all layers.

    Raises:
        ValueError: if the axis carries fewer than 3 role vectors.
    """
    if axis.role_vectors is None or axis.default_mean is None or len(axis.role_vectors) < 3:
        raise ValueError("persona space needs an axis with at least 3 role vectors")
    layer = axis.n_layers // 2 if layer is None else layer
    cosines = []
    for index in range(axis.n_layers):
        fitted, _ = _pca(axis.role_vectors, index)
        cosines.append(round(abs(float(fitted.components_[0] @ axis.directions[index].double().numpy())), 4))
    fitted, rows = _pca(axis.role_vectors, layer)
    default = axis.default_mean[layer].double().numpy()[None]
    coordinates = np.concatenate([fitted.transform(rows), fitted.transform(default)])[:, :3]
    if coordinates[-1, 0] < coordinates[:-1, 0].mean():  # PCA leaves the sign free: put the Assistant on the + side
        coordinates[:, 0] *= -1
    variance = [round(float(v), 4) for v in fitted.explained_variance_ratio_[:SHOWN]]
    needed = int(np.searchsorted(np.cumsum(fitted.explained_variance_ratio_), 0.7)) + 1
    return PersonaSpace(
        layer,
        variance,
        [*axis.roles, "default"],
        [[round(float(c), 3) for c in row] for row in coordinates],
        cosines,
        needed,
    )
