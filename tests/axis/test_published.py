"""The published files: the sign and the percentile are turned the right way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.axis import Axis, Floor, UserError, cap, load_capping_config, load_published_axis, load_role_vectors
from trimtab.axis.directions import unit
from trimtab.axis.published import axis_of_roles

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
    with pytest.raises(UserError, match=r"'experiments', found a tensor of shape \(3,\)"):
        load_capping_config(path, "x")


def capping(vector: Any = None, layer: Any = 2, cap: Any = 0.5, **entry: Any) -> dict[str, Any]:
    """A file of one experiment with one cap."""
    return {
        "vectors": {"a": {"vector": torch.arange(1.0, 5.0) if vector is None else vector, "layer": layer}},
        "experiments": [{"id": "x", "interventions": [{"vector": "a", "cap": cap}], **entry}],
    }


# what a file may hold just as well, and is read as what it means
SAME_CAPS: dict[str, dict[str, Any]] = {
    "a row of a matrix": capping(torch.arange(1.0, 5.0)[None]),
    "bfloat16": capping(torch.arange(1.0, 5.0).bfloat16()),
    "float64": capping(torch.arange(1.0, 5.0).double()),
    "tensors as numbers": capping(layer=torch.tensor(2), cap=torch.tensor([0.5])),
    "NumPy's numbers": capping(layer=np.int64(2), cap=np.float64(0.5)),
    "shorter NumPy numbers": capping(layer=np.uint8(2), cap=np.float32(0.5)),
    "an entry without an id": {**capping(), "experiments": [{"interventions": []}, *capping()["experiments"]]},
}


@pytest.mark.parametrize("content", SAME_CAPS.values(), ids=SAME_CAPS)
def test_the_same_cap_in_other_clothes(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "capping_config.pt"
    torch.save(content, path)
    floor = load_capping_config(path, "x")
    assert floor.layers == (2,) and floor.tau.tolist() == [-0.5] and floor.tau.dtype == torch.float32
    assert (
        torch.allclose(floor.directions[0], -unit(torch.arange(1.0, 5.0))) and floor.directions.dtype == torch.float32
    )
    assert not floor.has_sigma, "the file has no sigma, so heights are in units of the stream"
    assert load_capping_config(path, "x", sigma=torch.ones(1)).has_sigma


WRONG_CAPS: dict[str, tuple[Any, str]] = {
    "no experiment is named": (capping(), "none is named; the file has 1, such as 'x'"),
    "no id": ({**capping(), "experiments": [{"interventions": []}]}, "no experiment 'x'; the file has none with an id"),
    "experiments by name": ({**capping(), "experiments": {"x": {}}}, "a list 'experiments'"),
    "no interventions": (capping(interventions=None), "has no list of interventions"),
    "a cap of None": (capping(cap=None), "has a cap along 'a' that is no number: None"),
    "a cap that is a word": (capping(cap="0.5"), "that is no number: '0.5'"),
    "a cap of NaN": (capping(cap=float("nan")), "that is no number: nan"),
    "a layer of None": (capping(layer=None), "which the file does not hold with vector and layer"),
    "half a layer": (capping(layer=1.5), "which the file does not hold with vector and layer"),
    "a matrix": (capping(torch.ones(2, 4)), r"but of shape \(2, 4\)"),
    "zeros": (capping(torch.zeros(4)), "no vector of finite numbers"),
    "NaN": (capping(torch.full((4,), float("nan"))), "no vector of finite numbers"),
}


@pytest.mark.parametrize(("content", "says"), WRONG_CAPS.values(), ids=WRONG_CAPS)
def test_a_capping_config_that_is_not_as_published_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "capping_config.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=says) as caught:
        load_capping_config(path, None if "is named" in says else "x")
    assert caught.value.file == str(path) and caught.value.remedy


def test_steps_that_cap_nothing_are_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "capping_config.pt"
    steps = [{"vector": "axis_2", "cap": 1.0}, {"vector": "axis_3", "coefficient": 2.0}]
    write_config(path, experiments=[{"id": "x", "interventions": steps}])
    assert load_capping_config(path, "x").layers == (2,)
    assert "1 of the 2 interventions of x have no cap" in caplog.text


class Thing:
    """What only code can load."""


def test_what_could_run_code_is_named(tmp_path: Path) -> None:
    path = tmp_path / "axis.pt"
    torch.save({"axis": torch.ones(2, 3), "made_by": Thing()}, path)
    with pytest.raises(UserError, match=r"holds objects of \S*\.Thing, which could run code"):
        load_published_axis(path)
    torch.save({"axis": np.ones((2, 3))}, path)
    with pytest.raises(UserError, match=r"holds objects of numpy\S*_reconstruct, which could run code"):
        load_published_axis(path)
    torch.save({"axis": torch.ones(2, 3), "when": np.datetime64("2026-01-01")}, path)
    with pytest.raises(UserError, match="a NumPy M8 in it is no plain number"):
        load_published_axis(path)


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
    folder = tmp_path / "role_vectors"
    folder.mkdir()
    vectors = {name: torch.randn(4, HIDDEN) for name in ("bard", "angel", "demon")}
    torch.save(vectors["bard"], folder / "bard.pt")
    torch.save({"vector": vectors["angel"], "role": "angel", "type": "pos_3"}, folder / "angel.pt")
    torch.save(vectors["demon"].half(), folder / "demon.pt")
    (folder / "._bard.pt").write_bytes(b"what some file managers leave behind")
    names, stacked, default = load_role_vectors(folder)
    assert names == ["angel", "bard", "demon"] and stacked.shape == (3, 4, HIDDEN) and stacked.dtype == torch.float32
    assert torch.equal(stacked[0], vectors["angel"]) and torch.equal(stacked[1], vectors["bard"]) and default is None
    torch.save(torch.randn(5, HIDDEN), folder / "zebra.pt")
    with pytest.raises(UserError, match=r"zebra\.pt"):
        load_role_vectors(folder)
    with pytest.raises(UserError, match=r"no \.pt files"):
        load_role_vectors(tmp_path / "none")
    torch.save(torch.full((4, HIDDEN), float("inf")), folder / "zebra.pt")
    with pytest.raises(UserError, match="NaN or infinity"):
        load_role_vectors(folder)


@pytest.mark.parametrize("place", ["vectors/default.pt", "vectors/assistant.pt", "default_vector.pt"])
def test_the_default_is_no_role_and_the_folder_is_an_axis(tmp_path: Path, place: str) -> None:
    """As the pipeline writes ``vectors/``, and as ``role_vectors/`` is published with ``default_vector.pt`` above it."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    roles = torch.randn(2, 4, HIDDEN)
    torch.save({"vector": roles[0], "role": "bard", "type": "pos_3"}, folder / "bard.pt")
    torch.save({"vector": roles[1], "role": "ghost", "type": "pos_3"}, folder / "ghost.pt")
    with pytest.raises(UserError, match="2 role vectors, but the default Assistant's mean is not among them"):
        axis_of_roles(folder)
    default = torch.randn(4, HIDDEN)
    by_type = {"vector": default, "role": "assistant", "type": "mean"}
    torch.save(by_type if "assistant" in place else default, tmp_path / place)
    axis = axis_of_roles(folder)
    assert axis.roles == ["bard", "ghost"] and axis.role_vectors is not None and len(axis.role_vectors) == 2
    assert torch.allclose(axis.directions, unit(default - roles.mean(0)))
    assert axis.default_mean is not None and torch.equal(axis.default_mean, default)


def test_an_axis_with_its_means_beside_it_is_held_against_them(tmp_path: Path) -> None:
    default, roles = torch.randn(2, 4, HIDDEN)
    content = {"axis": default - roles, "default_mean": default, "role_mean": roles, "metadata": {"model": "m"}}
    torch.save(content, tmp_path / "axis.pt")
    assert load_published_axis(tmp_path / "axis.pt").metadata["model"] == "m"
    torch.save({**content, "axis": roles - default}, tmp_path / "axis.pt")
    with pytest.raises(UserError, match=r"points away from the Assistant: .* is -1\.00"):
        load_published_axis(tmp_path / "axis.pt")
