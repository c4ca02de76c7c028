"""Persona space against numpy's own singular value decomposition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.axis.analysis import SHOWN, persona_space
from trimtab.axis.directions import Axis


def build_axis(roles: int, hidden: int = 40, layers: int = 3, *, scales: Tensor | None = None, seed: int = 0) -> Axis:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.2, hidden) if scales is None else scales
    vectors = torch.randn(roles, layers, hidden, generator=generator) * scales + 5
    default = vectors.mean(0) + 4 * scales * torch.randn(layers, hidden, generator=generator)
    metadata = {"roles": [f"role {i}" for i in range(roles)]}
    return Axis.from_means(default, vectors, torch.full((roles,), 8.0), metadata)


def svd(axis: Axis, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variance fractions [K], components [K, D], mean [D]."""
    assert axis.role_vectors is not None
    rows = axis.role_vectors[:, layer].double().numpy()
    mean = rows.mean(0)
    _, sizes, components = np.linalg.svd(rows - mean, full_matrices=False)
    return sizes**2 / (sizes**2).sum(), components, mean


def test_components_and_coordinates_are_those_of_an_svd() -> None:
    axis = build_axis(12)
    space = persona_space(axis)
    assert space.layer == 1
    variance, components, mean = svd(axis, 1)
    assert space.variance == pytest.approx(variance[:11], abs=1e-4)
    assert axis.role_vectors is not None and axis.default_mean is not None
    points = np.concatenate([axis.role_vectors[:, 1].double().numpy(), axis.default_mean[1][None].double().numpy()])
    expected = (points - mean) @ components[:3].T
    found = np.asarray(space.coordinates)
    assert found.shape == (13, 3)
    for k in range(3):  # a component's sign is free
        sign = np.sign(found[:, k] @ expected[:, k])
        assert found[:, k] == pytest.approx(sign * expected[:, k], abs=2e-3)
    for layer in range(3):
        direction = axis.directions[layer].double().numpy()
        assert space.cosine_pc1[layer] == pytest.approx(abs(svd(axis, layer)[1][0] @ direction), abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_assistant_is_on_the_positive_side(seed: int) -> None:
    space = persona_space(build_axis(8, seed=seed))
    assert space.roles[-1] == "default" and len(space.roles) == len(space.coordinates) == 9
    assert space.coordinates[-1][0] >= np.mean([row[0] for row in space.coordinates[:-1]]) - 1e-3


@pytest.mark.parametrize("flat", [False, True])
def test_the_number_of_components_for_70_percent(flat: bool) -> None:
    """Also where it takes more components than the report shows."""
    axis = build_axis(90, hidden=100, scales=torch.ones(100) if flat else torch.linspace(3, 0.2, 100) ** 3)
    space = persona_space(axis, layer=2)
    total = np.cumsum(svd(axis, 2)[0])
    assert total[space.components_for_70 - 1] >= 0.7 and total[space.components_for_70 - 2] < 0.7
    assert (space.components_for_70 > SHOWN) == flat
    assert len(space.variance) == SHOWN


def test_more_roles_than_dimensions_and_the_fewest_roles() -> None:
    assert len(persona_space(build_axis(30, hidden=8)).variance) == 8
    assert len(persona_space(build_axis(3)).coordinates[0]) == 2
    json.dumps(persona_space(build_axis(3)).as_json(), allow_nan=False)
    with pytest.raises(ValueError, match="at least 3 role vectors"):
        persona_space(build_axis(2))
