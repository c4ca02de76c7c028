"""The artifacts: an axis or a floor comes back from disk exactly, and a wrong one is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import build_floor
from safetensors.torch import load_file, save_file

from trimtab.axis import Axis, Floor, UserError
from trimtab.axis.directions import check_fits, unit
from trimtab.axis.files import save_tensors


def some_axis() -> Axis:
    generator = torch.Generator().manual_seed(1)
    default, roles = torch.randn(5, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    facts = {"model": "m", "roles": ["bard", "démon", "tutor"], "nested": {"a": [1, 2.5, None]}}
    return Axis.from_means(default, roles, torch.tensor([4, 5, 6]), facts)


def test_axis_is_default_minus_roles_and_points_to_the_assistant() -> None:
    axis = some_axis()
    assert axis.default_mean is not None and axis.role_vectors is not None
    assert torch.allclose(axis.directions, unit(axis.default_mean - axis.role_vectors.mean(0)))
    assert torch.allclose(axis.directions.norm(dim=-1), torch.ones(5))
    assert (axis.n_layers, axis.hidden_size) == (5, 8)
    default, role = (axis.default_mean * axis.directions).sum(-1), (axis.role_vectors.mean(0) * axis.directions).sum(-1)
    assert (default > role).all(), "+ is Assistant"


def test_axis_round_trip_is_bitwise(tmp_path: Path) -> None:
    axis = some_axis()
    axis.save(tmp_path / "axis.safetensors")
    again = Axis.load(tmp_path / "axis.safetensors")
    for name in ("directions", "default_mean", "role_vectors", "role_counts"):
        assert torch.equal(getattr(again, name), getattr(axis, name)), name
        assert getattr(again, name).dtype == getattr(axis, name).dtype
    assert again.metadata == axis.metadata
    assert again.roles == ["bard", "démon", "tutor"]
    again.save(tmp_path / "second.safetensors")
    first, second = load_file(tmp_path / "axis.safetensors"), load_file(tmp_path / "second.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_axis_without_means_round_trips(tmp_path: Path) -> None:
    Axis(torch.eye(3)).save(tmp_path / "a.safetensors")
    again = Axis.load(tmp_path / "a.safetensors")
    assert again.default_mean is None and again.role_vectors is None and again.role_counts is None and again.roles == []


def test_floor_round_trip_is_bitwise(tmp_path: Path) -> None:
    floor = Floor(
        (1, 3), unit(torch.randn(2, 8)), torch.tensor([0.1, -2.0]), torch.tensor([1.5, 0.3]), {"percentile": 75}
    )
    floor.save(tmp_path / "floor.safetensors")
    again = Floor.load(tmp_path / "floor.safetensors")
    assert again.layers == (1, 3) and again.metadata == {"percentile": 75}
    for name in ("directions", "tau", "sigma"):
        assert torch.equal(getattr(again, name), getattr(floor, name)), name


def test_replace_directions_keeps_the_window_and_makes_unit_vectors() -> None:
    floor = build_floor((1, 2))
    other = floor.replace_directions(
        5 * torch.ones(2, 32), torch.tensor([1, 2]), torch.tensor([3, 4]), direction="random"
    )
    assert other.layers == floor.layers and other.metadata["direction"] == "random"
    assert torch.allclose(other.directions.norm(dim=-1), torch.ones(2)) and other.tau.dtype == torch.float32


@pytest.mark.parametrize(
    ("layers", "directions", "tau", "sigma", "says"),
    [
        ((), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), "ascending"),
        ((2, 1), torch.eye(2), torch.zeros(2), torch.ones(2), "ascending"),
        ((1, 1), torch.eye(2), torch.zeros(2), torch.ones(2), "distinct"),
        ((-1, 1), torch.eye(2), torch.zeros(2), torch.ones(2), "negative"),
        ((1, 2), torch.eye(3), torch.zeros(2), torch.ones(2), r"\[2, hidden\]"),
        ((1, 2), torch.eye(2), torch.zeros(3), torch.ones(2), "tau and sigma"),
        ((1, 2), torch.eye(2), torch.tensor([0.0, float("nan")]), torch.ones(2), "tau"),
        ((1, 2), torch.eye(2), torch.zeros(2), torch.tensor([1.0, 0.0]), "positive"),
        ((1, 2), 2 * torch.eye(2), torch.zeros(2), torch.ones(2), "unit length; that of layer 1 has 2. "),
        ((1, 2), torch.eye(2) * torch.tensor([1, 1.01]), torch.zeros(2), torch.ones(2), "that of layer 2 has 1.01"),
        ((1, 2), torch.zeros(2, 2), torch.zeros(2), torch.ones(2), "that of layer 1 has 0"),
        (("a",), torch.eye(1), torch.zeros(1), torch.ones(1), r"whole numbers, got \('a',\)"),
        ((1.5, 2.5), torch.eye(2), torch.zeros(2), torch.ones(2), "whole numbers"),
        ((True, 2), torch.eye(2), torch.zeros(2), torch.ones(2), "whole numbers"),
        ("12", torch.eye(2), torch.zeros(2), torch.ones(2), "whole numbers"),
        (None, torch.eye(2), torch.zeros(2), torch.ones(2), "whole numbers"),
        ((1, 2), torch.eye(2) * 1j, torch.zeros(2), torch.ones(2), "directions must be a tensor of real numbers"),
        ((1, 2), torch.eye(2), [0.0, 0.0], torch.ones(2), "tau must be a tensor of real numbers, got list"),
        (
            (1, 2),
            torch.eye(2),
            torch.full((2,), 1e300, dtype=torch.float64),
            torch.ones(2),
            "tau holds NaN or infinity",
        ),
    ],
)
def test_a_malformed_floor_is_refused(
    layers: tuple[int, ...], directions: torch.Tensor, tau: torch.Tensor, sigma: torch.Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Floor(layers, directions, tau, sigma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_read_as_the_same_floor_and_axis(tmp_path: Path, dtype: torch.dtype) -> None:
    exact = unit(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    tensors = {"directions": exact, "tau": torch.tensor([0.5, -2.0, 1.0]), "sigma": torch.tensor([1.0, 0.5, 2.0])}
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_tensors(tmp_path / "f.safetensors", stored, {"format": "trimtab floor 1", "facts": {"layers": [1, 2, 5]}})
    floor = Floor.load(tmp_path / "f.safetensors")
    assert {floor.directions.dtype, floor.tau.dtype, floor.sigma.dtype} == {torch.float32}
    assert torch.allclose(floor.directions, exact, atol=4e-3) and torch.equal(floor.tau, tensors["tau"])
    # the rounding is taken out of the length, which the height rests on
    assert torch.allclose(floor.directions.norm(dim=-1), torch.ones(3), atol=1e-6)
    save_tensors(
        tmp_path / "a.safetensors", {"axis": 3 * stored["directions"]}, {"format": "trimtab axis 1", "facts": {}}
    )
    axis = Axis.load(tmp_path / "a.safetensors")
    assert axis.directions.dtype == torch.float32 and torch.allclose(axis.directions, exact, atol=4e-3)
    assert torch.allclose(axis.directions.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_a_floor_at_some_of_its_layers() -> None:
    floor = build_floor((1, 2, 5))
    some = floor.at([5, 1])
    assert some.layers == (1, 5) and torch.equal(some.directions, floor.directions[[0, 2]])
    for layers in ([3], []):
        with pytest.raises(UserError, match=r"the floor lies at \[1, 2, 5\]"):
            floor.at(layers)


def test_a_malformed_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="layers, hidden"):
        Axis(torch.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        Axis(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ValueError, match="zero vectors at layers 1"):
        Axis(torch.tensor([[2.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"default_mean has shape \(1, 4\), the axis \(4, 4\)"):
        Axis(torch.eye(4), default_mean=torch.ones(1, 4))
    same = torch.ones(4, 4)
    with pytest.raises(UserError, match="the very same activations at layers 0, 1, 2, 3"):
        Axis.from_means(same, same.expand(2, 4, 4), torch.tensor([1, 1]), {})


def test_wrong_files_are_the_users_fault(tmp_path: Path) -> None:
    axis_file, floor_file = tmp_path / "axis.safetensors", tmp_path / "floor.safetensors"
    some_axis().save(axis_file)
    build_floor().save(floor_file)
    with pytest.raises(UserError, match="not an axis"):
        Axis.load(floor_file)
    with pytest.raises(UserError, match="not a floor"):
        Floor.load(axis_file)
    with pytest.raises(UserError, match="no such file"):
        Axis.load(tmp_path / "none.safetensors")
    foreign = tmp_path / "adapter.safetensors"
    save_file({"x": torch.zeros(1)}, foreign, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapter\.safetensors"):
        Floor.load(foreign)
    axis_file.write_bytes(axis_file.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut short"):
        Axis.load(axis_file)


def test_damaged_contents_are_the_users_fault_too(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"axis": torch.tensor([[float("nan"), 1.0]])}, {"format": "trimtab axis 1", "facts": {}})
    with pytest.raises(UserError, match="NaN"):
        Axis.load(path)
    save_tensors(path, {"axis": torch.eye(2)}, {"format": "trimtab axis 1"})
    with pytest.raises(UserError, match="facts"):
        Axis.load(path)
    whole = {"directions": torch.eye(2), "tau": torch.zeros(2), "sigma": torch.ones(2)}
    for missing in whole:
        part = {key: value for key, value in whole.items() if key != missing}
        save_tensors(path, part, {"format": "trimtab floor 1", "facts": {"layers": [0, 1]}})
        with pytest.raises(UserError, match=missing):
            Floor.load(path)
    for layers in (["a", "b"], [0.5, 1.5], {"0": 1}, "01", [True, False], 3):
        save_tensors(path, whole, {"format": "trimtab floor 1", "facts": {"layers": layers}})
        with pytest.raises(UserError, match="floor layers must be") as caught:
            Floor.load(path)
        assert caught.value.file == str(path)
    save_tensors(path, whole | {"sigma": torch.zeros(2)}, {"format": "trimtab floor 1", "facts": {"layers": [0, 1]}})
    with pytest.raises(UserError, match="sigma must be positive"):
        Floor.load(path)


def test_check_fits_names_what_differs() -> None:
    axis, floor = Axis(torch.eye(4)), build_floor((1, 5), hidden=4)
    check_fits(4, 4, axis=axis)
    check_fits(6, 4, floor=floor)
    with pytest.raises(UserError, match="4 layers of width 4, the model 5 of 4"):
        check_fits(5, 4, axis=axis)
    with pytest.raises(UserError, match="floor layer 5 is beyond the model, whose layers are 0 to 4"):
        check_fits(5, 4, floor=floor)
    with pytest.raises(UserError, match="width 4, the model 8") as caught:
        check_fits(6, 8, floor=floor, file="f.safetensors")
    assert caught.value.file == "f.safetensors" and caught.value.remedy
    with pytest.raises(UserError, match="floor layer 5 is beyond") as caught:
        check_fits(5, 4, floor=floor, file="f.safetensors")
    assert caught.value.key is None and "leave floor.layers out" not in caught.value.remedy
