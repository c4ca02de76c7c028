"""The published files: the sign and the percentile are turned the right way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.axis import Axis, Floor, UserError, cap, load_capping_config, load_published_axis, load_role_vectors
from trimtab.axis.directions import unit

LAYERS, HIDDEN = (2, 3), 16


def published_cap(hidden: Tensor, vector: Tensor, limit: float) -> Tensor:
    """The published operation, as its authors state it: an upper limit along a role - default vector of any length."""
    v = vector / vector.norm()
    excess = torch.relu(hidden @ v - limit)
    return hidden - excess.unsqueeze(-1) * v


def write_config(path: Path, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    content: dict[str, Any] = {
        "vectors": {f"axis_{i}": {"vector": 3 * torch.randn(HIDDEN, generator=generator), "layer": i} for i in LAYERS},
        "experiments": [
            {
                "id": "layers_2:4-p0.25",
                "interventions": [{"vector": "axis_3", "cap": 0.4}, {"vector": "axis_2", "cap": -0.7}],
            },
            {"id": "steer", "interventions": [{"vector": "axis_2", "coefficient": 2.0}]},
        ],
    }
    content |= changes
    torch.save(content, path)
    return content


def test_a_published_upper_cap_is_our_floor(tmp_path: Path) -> None:
    content = write_config(tmp_path / "capping_config.pt")
    floor = load_capping_config(tmp_path / "capping_config.pt", "layers_2:4-p0.25")
    assert floor.layers == LAYERS and torch.allclose(floor.tau, torch.tensor([0.7, -0.4]))
    hidden = 2 * torch.randn(4, 50, HIDDEN, generator=torch.Generator().manual_seed(1))
    for i, (layer, limit) in enumerate(zip(LAYERS, (-0.7, 0.4), strict=True)):
        vector = content["vectors"][f"axis_{layer}"]["vector"]
        theirs = published_cap(hidden, vector, limit)
        ours = cap(hidden, floor.directions[i], floor.tau[i])
        assert torch.allclose(ours, theirs, atol=1e-6)
        moved = (theirs != hidden).any(-1).float().mean()
        assert 0.1 < moved < 0.9, "the comparison must see capped and untouched tokens"
        # read with the sign left as it is, the same file does something else
        assert not torch.allclose(cap(hidden, -floor.directions[i], -floor.tau[i]), theirs, atol=1e-2)


def test_the_published_25th_percentile_is_the_75th_on_the_plus_axis() -> None:
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(401, HIDDEN, generator=generator)
    negated = unit(torch.randn(HIDDEN, generator=generator))  # role - default, as stored
    limit = torch.quantile(means @ negated, 0.25)
    tau = torch.quantile(means @ -negated, 0.75)
    assert torch.allclose(-limit, tau, atol=1e-6)
    floor = Floor((0,), -negated[None], tau[None], torch.ones(1))
    assert torch.allclose(cap(means, floor.directions[0], tau), published_cap(means, negated, float(limit)), atol=1e-6)
    fires = ((means @ floor.directions[0]) < tau).float().mean()
    inert = ((means @ floor.directions[0]) < torch.quantile(means @ -negated, 0.25)).float().mean()
    assert fires == pytest.approx(0.75, abs=0.01) and inert == pytest.approx(0.25, abs=0.01)


def test_capping_config_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "capping_config.pt"
    write_config(path)
    with pytest.raises(UserError, match=r"no experiment 'nope'; the file has 2, such as 'layers_2:4-p0\.25'"):
        load_capping_config(path, "nope")
    with pytest.raises(UserError, match="caps nothing"):
        load_capping_config(path, "steer")
    twice = [{"id": "x", "interventions": [{"vector": "axis_2", "cap": 1.0}, {"vector": "axis_2", "cap": 2.0}]}]
    write_config(path, experiments=twice)
    with pytest.raises(UserError, match="caps layer 2 twice"):
        load_capping_config(path, "x")
    write_config(path, experiments=[{"id": "x", "interventions": [{"vector": "axis_9", "cap": 1.0}]}])
    with pytest.raises(UserError, match="axis_9"):
        load_capping_config(path, "x")
    write_config(path, vectors={"axis_2": {"layer": 2}}, experiments=twice)
    with pytest.raises(UserError, match="axis_2"):
        load_capping_config(path, "x")
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match="'vectors' and 'experiments'"):
        load_capping_config(path, "x")


def test_published_axis_in_both_forms(tmp_path: Path) -> None:
    raw = 5 * torch.randn(4, HIDDEN, dtype=torch.bfloat16)
    torch.save(raw, tmp_path / "raw.pt")
    torch.save({"axis": raw, "metadata": {"model": "m"}}, tmp_path / "dict.pt")
    for name in ("raw.pt", "dict.pt"):
        axis = load_published_axis(tmp_path / name)
        assert isinstance(axis, Axis) and torch.allclose(axis.directions, unit(raw)), "its sign is + already"
    torch.save({"other": raw}, tmp_path / "wrong.pt")
    torch.save(raw[0], tmp_path / "flat.pt")
    for name in ("wrong.pt", "flat.pt"):
        with pytest.raises(UserError, match="layers, hidden"):
            load_published_axis(tmp_path / name)


def test_role_vectors_folder(tmp_path: Path) -> None:
    vectors = {name: torch.randn(4, HIDDEN) for name in ("bard", "angel", "demon")}
    torch.save(vectors["bard"], tmp_path / "bard.pt")
    torch.save({"vector": vectors["angel"], "role": "angel", "type": "pos_3"}, tmp_path / "angel.pt")
    torch.save(vectors["demon"].half(), tmp_path / "demon.pt")
    (tmp_path / "._bard.pt").write_bytes(b"what some file managers leave behind")
    names, stacked = load_role_vectors(tmp_path)
    assert names == ["angel", "bard", "demon"] and stacked.shape == (3, 4, HIDDEN) and stacked.dtype == torch.float32
    assert torch.equal(stacked[0], vectors["angel"]) and torch.equal(stacked[1], vectors["bard"])
    torch.save(torch.randn(5, HIDDEN), tmp_path / "zebra.pt")
    with pytest.raises(UserError, match=r"zebra\.pt"):
        load_role_vectors(tmp_path)
    with pytest.raises(UserError, match=r"no \.pt files"):
        load_role_vectors(tmp_path / "none")
