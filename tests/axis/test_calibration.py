"""Calibration: the right layers, the right percentile on the + axis, and a floor that is proved to fire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, LAYERS, SENTENCES
from torch import Tensor

from trimtab.axis import ActivationController, Axis, Floor, UserError, find_decoder_layers
from trimtab.axis.calibration import calibrate, control_floor, evenly_chosen, response_projections, window_by_rule
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.models import Loaded

Row = dict[str, Any]


def rows(count: int, first: int = 0) -> list[Row]:
    """Conversations of all lengths, so that batches are padded."""
    text = " ".join(SENTENCES)
    return [
        {
            "prompt": chat("You are a pirate." if i % 2 else "", text[3 * i : 3 * i + 10 + 2 * i]),
            "completion": [{"role": "assistant", "content": text[5 * i : 5 * i + 12 + (7 * i) % 23]}],
        }
        for i in range(first, first + count)
    ]


@pytest.fixture
def axis() -> Axis:
    return Axis(torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(4)))


def answer_states(loaded: Loaded, form: ChatFormat, row: Row, floor: Floor | None = None) -> Tensor:
    """Decoder-layer outputs of the answer's tokens before the cap, [N, T, D]: one row, no padding, hooks of our own."""
    prompt, answer = form.prompt_ids(row["prompt"]), form.answer_ids(row["completion"][0]["content"])
    states: list[Tensor] = []

    def hook(layer: int, hidden: Tensor) -> Tensor:
        states.append(hidden[0, len(prompt) :])
        if floor is None or layer not in floor.layers:
            return hidden
        i = floor.layers.index(layer)
        v = floor.directions[i]
        return hidden + (floor.tau[i] - hidden @ v).clamp(min=0)[..., None] * v

    handles = [
        module.register_forward_hook(lambda m, a, out, layer=layer: hook(layer, out))
        for layer, module in enumerate(find_decoder_layers(loaded.model))
    ]
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([prompt + answer]))
    for handle in handles:
        handle.remove()
    assert states[0].shape[0] == len(answer)
    return torch.stack(states)


def test_window_rule() -> None:
    assert window_by_rule("llama", 80) == tuple(range(56, 72))
    assert window_by_rule("qwen3", 64) == tuple(range(46, 54))
    assert window_by_rule("llama", 30) == tuple(range(21, 27))
    for depth in range(1, 130):
        window = window_by_rule("other", depth)
        assert window and window[0] >= 0 and window[-1] < depth and window == tuple(range(window[0], window[-1] + 1))
        if depth >= 10:
            assert 0.65 <= window[0] / depth <= 0.75 and 0.8 <= (window[-1] + 1) / depth <= 0.95


def test_projections_are_those_of_single_unpadded_forwards(loaded: Loaded, form: ChatFormat, axis: Axis) -> None:
    data = rows(7)
    data[3]["completion"][0]["content"] = ""
    other = torch.eye(HIDDEN)[:2]
    heads = {"axis": axis.directions[1:3], "other": other}
    found, fraction = response_projections(loaded, form, data, heads, (1, 2), batch_size=3)
    assert fraction == 0 and found["axis"].shape == (7, 2)
    for i, row in enumerate(data):
        if i == 3:
            assert found["axis"][i].isnan().all() and found["other"][i].isnan().all()
            continue
        states = answer_states(loaded, form, row)[1:3].mean(1)
        assert torch.allclose(found["axis"][i], (states * axis.directions[1:3]).sum(-1), atol=1e-4)
        assert torch.allclose(found["other"][i], (states * other).sum(-1), atol=1e-4)


def test_tau_is_the_percentile_on_the_plus_axis(loaded: Loaded, form: ChatFormat, axis: Axis) -> None:
    pool, drift = rows(24), rows(5, first=24)
    floor = calibrate(loaded, form, axis, pool, drift, layers=[2, 1])
    assert floor.layers == (1, 2) and torch.equal(floor.directions, axis.directions[1:3])
    states = torch.stack([answer_states(loaded, form, row)[1:3].mean(1) for row in pool])
    projections = (states * axis.directions[1:3]).sum(-1)
    assert torch.allclose(floor.tau, projections.quantile(0.75, dim=0), atol=1e-4)
    assert torch.allclose(floor.sigma, projections.std(0), atol=1e-4)
    assert ((projections < floor.tau).float().mean(0) - 0.75).abs().max() < 0.05, "three quarters of the pool lie below"
    assert floor.metadata["percentile"] == 75.0 and floor.metadata["pool"] == 24 and floor.metadata["drift_rows"] == 5
    low = calibrate(loaded, form, axis, pool, drift, layers=[1, 2], percentile=25, min_firing=0)
    assert (low.tau < floor.tau).all()


def test_the_firing_fraction_is_a_hand_count(loaded: Loaded, form: ChatFormat, axis: Axis) -> None:
    """Of answer tokens alone, layer by layer, with the lower layers capped already."""
    drift = rows(7, first=24)
    drift[2]["completion"][0]["content"] = ""
    floor = calibrate(loaded, form, axis, rows(24), drift, layers=[0, 1, 3])
    fired = seen = 0
    for row in drift:
        states = answer_states(loaded, form, row, floor)
        for i, layer in enumerate(floor.layers):
            p = states[layer] @ floor.directions[i]
            assert (p - floor.tau[i]).abs().min() > 1e-5 if len(p) else True, "no token on the edge"
            fired, seen = fired + int((p < floor.tau[i]).sum()), seen + len(p)
    assert 0.15 < fired / seen < 1
    assert floor.metadata["firing_fraction"] == pytest.approx(fired / seen, abs=5e-5)


def test_an_inert_floor_is_gated_with_the_remedy_and_can_be_forced(
    loaded: Loaded, form: ChatFormat, axis: Axis
) -> None:
    pool = rows(16)
    # an axis along which answers hardly vary while its floor lies far below: nothing fires
    states = torch.stack([answer_states(loaded, form, row).mean(1) for row in pool])
    aligned = Axis(states.mean(0))
    token_lowest = min(float((answer_states(loaded, form, row)[2] @ aligned.directions[2]).min()) for row in pool)
    response_lowest = float((states[:, 2] @ aligned.directions[2]).min())
    assert token_lowest < response_lowest
    with pytest.raises(UserError, match="below 15% it does next to nothing") as caught:
        calibrate(loaded, form, aligned, pool, pool[:4], layers=[2], percentile=0, min_firing=0.15)
    assert caught.value.key == "floor.percentile"
    assert "75 on the + axis" in caught.value.remedy and "floor.min_firing=0" in caught.value.remedy
    floor = calibrate(loaded, form, aligned, pool, pool[:4], layers=[2], percentile=0, min_firing=0)
    assert floor.metadata["firing_fraction"] < 0.15


def test_faults_are_named(loaded: Loaded, form: ChatFormat, axis: Axis) -> None:
    pool = rows(8)
    with pytest.raises(UserError, match="floor layer 4 is beyond the model, whose layers are 0 to 3") as caught:
        calibrate(loaded, form, axis, pool, pool, layers=[2, LAYERS])
    assert caught.value.key == "floor.layers"
    with pytest.raises(UserError, match=r"floor.layers is empty"):
        calibrate(loaded, form, axis, pool, pool, layers=[])
    with pytest.raises(UserError, match="7 non-empty answers"):
        calibrate(loaded, form, axis, pool[:7], pool)
    blank = [*pool[:7], pool[7] | {"completion": [{"role": "assistant", "content": " \n"}]}]
    with pytest.raises(UserError, match="7 non-empty answers"):
        calibrate(loaded, form, axis, blank, pool)
    with pytest.raises(UserError, match="5 layers of width 32, the model 4 of 32"):
        calibrate(loaded, form, Axis(torch.ones(5, HIDDEN)), pool, pool)


def test_state_is_left_as_it_was(loaded: Loaded, form: ChatFormat, axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = ActivationController.of(loaded.model)
    loaded.model.train()
    found, _ = response_projections(loaded, form, rows(2), {"a": axis.directions[:1]}, (0,))
    assert loaded.model.training
    loaded.model.eval()
    monkeypatch.setattr(type(loaded.model), "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        response_projections(loaded, form, rows(2), {"a": axis.directions[:1]}, (0,))
    monkeypatch.undo()
    floor = Floor((0,), axis.directions[:1], torch.zeros(1), torch.ones(1))
    with controller.capping(floor, count=True) as counter:  # a counting mask left behind would not fit
        loaded.model(input_ids=torch.arange(3, 8)[None])
    assert counter.seen == 5 and found["a"].isfinite().all()


def test_control_floor_has_random_directions_and_the_same_percentile(
    loaded: Loaded, form: ChatFormat, axis: Axis, tmp_path: Path
) -> None:
    pool = rows(24)
    floor = calibrate(loaded, form, axis, pool, rows(4), layers=[1, 2])
    control = control_floor(loaded, form, floor, pool, seed=1)
    again, other = control_floor(loaded, form, floor, pool, seed=1), control_floor(loaded, form, floor, pool, seed=2)
    assert torch.equal(control.directions, again.directions) and not torch.equal(control.directions, other.directions)
    assert control.layers == floor.layers
    assert ((control.directions * floor.directions).sum(-1).abs() < 0.7).all()
    found, _ = response_projections(loaded, form, pool, {"random": control.directions}, control.layers)
    assert torch.allclose(control.tau, found["random"].quantile(0.75, dim=0), atol=1e-4)
    control.save(tmp_path / "floor.safetensors")
    assert "random" in Floor.load(tmp_path / "floor.safetensors").metadata["direction"]


def test_rows_are_chosen_evenly() -> None:
    data: list[Row] = [{"n": i} for i in range(10)]
    assert [row["n"] for row in evenly_chosen(data, 5)] == [0, 2, 4, 6, 8]
    assert evenly_chosen(data, 20) == data
