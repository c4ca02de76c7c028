"""The core needs torch and safetensors alone: axis, floor, hooks, penalty and injection, on a model of torch's own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import high_floor, plain_model

import trimtab
from trimtab import (
    ActivationController,
    Axis,
    Floor,
    UserError,
    axis_floor_loss,
    floor_gradients,
    load_axis,
    load_floor,
)

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(7).expand(2, 7) > 2


@pytest.fixture
def floor() -> Floor:
    return high_floor()


@pytest.fixture
def plain() -> Any:
    return plain_model()


# Packages of the extras: the trainers, the recipes and the evaluation stand on them, the core on none.
BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_imports_without_any_extra() -> None:
    from trimtab.axis.errors import EXTRAS

    extras = {module for brought in EXTRAS.values() for module in brought}
    names = ", ".join(name for name in trimtab.__all__)
    python(BLOCKED.format(extras=extras) + f"from trimtab import {names}\nimport trimtab.losses, trimtab.axis as axis\n"
           "for name in axis.__all__: getattr(axis, name)")  # fmt: skip


def test_the_import_alone_takes_no_torch() -> None:
    assert python("import sys, trimtab; print('torch' in sys.modules, trimtab.__version__)").split() == [
        "False",
        trimtab.__version__,
    ]
    begun = time.perf_counter()
    python("import trimtab")
    with_it = time.perf_counter() - begun
    begun = time.perf_counter()
    python("")
    assert with_it - (time.perf_counter() - begun) < 0.3


def test_types_are_told() -> None:
    assert (Path(trimtab.__file__).parent / "py.typed").is_file()


def test_a_missing_extra_is_named() -> None:
    code = BLOCKED.format(extras={"rich", "pydantic", "transformers", "yaml"})
    code += "from trimtab.cli.main import main\nraise SystemExit(main(['check', 'smollm2-135m/sft']))"
    given = ["project", "--model", "m", "--floor", "f", "--layers", "3-4", "t.json"]
    for words in (code, code.replace("['check', 'smollm2-135m/sft']", repr(given))):
        done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "pip install 'trimtab[train]'" in done.stderr and "Traceback" not in done.stderr


def test_a_package_that_is_too_old_is_not_missing() -> None:
    from trimtab.axis.errors import known_fault

    there = known_fault(ModuleNotFoundError("No module named 'torch.of_tomorrow'", name="torch.of_tomorrow"))
    assert there is not None and "older than this part of trimtab needs" in there.fault


def test_the_cap_holds_and_the_files_come_back(plain: Any, floor: Floor, tmp_path: Path) -> None:
    seen = {}
    controller = ActivationController.of(plain)
    with controller.capping(floor), controller.recording((3,)) as recording, torch.no_grad():
        plain(IDS)
        seen["capped"] = recording.last(3)
    with controller.recording((1, 2, 3)) as recording, torch.no_grad():
        plain(IDS)
        seen["free"] = recording.last(3)
        below = [recording.last(layer) @ floor.directions[i] for i, layer in enumerate(floor.layers)]
    assert all(bool((projection < 2.0).any()) for projection in below)
    assert not seen["capped"].equal(seen["free"])
    floor.save(tmp_path / "floor.safetensors")
    again = load_floor(tmp_path / "floor.safetensors")
    assert again.layers == floor.layers and again.tau.equal(floor.tau)
    axis = Axis(torch.nn.functional.normalize(torch.randn(4, 32), dim=-1), None)
    axis.save(tmp_path / "axis.safetensors")
    torch.testing.assert_close(load_axis(tmp_path / "axis.safetensors").directions, axis.directions)
    with pytest.raises(UserError, match="no such file"):
        load_floor(tmp_path / "none.safetensors")


def test_the_gradient_of_the_penalty_by_three_routes(plain: Any, floor: Floor) -> None:
    """By recorded states, by a formula of its own over the layers run by hand, and by the injection in the backward pass."""

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
        plain.zero_grad()
        return found

    with ActivationController.of(plain).recording(floor.layers) as recording:
        plain(IDS)
    states = {layer: recording.last(layer, with_grad=True) for layer in floor.layers}
    (0.7 * axis_floor_loss(states, floor, MASK)).backward()
    recorded = gradients()

    hidden, total = plain.embed(IDS), torch.zeros(())
    for number, layer in enumerate(plain.layers):
        hidden = layer(hidden)
        if number in floor.layers:
            i = floor.layers.index(number)
            total = total + (2.0 - hidden @ floor.directions[i]).clamp(min=0)[MASK].square().sum()
    (0.7 * total / len(floor.layers) / MASK.sum()).backward()
    by_hand = gradients()

    labels = IDS.masked_fill(~MASK, -100)
    with floor_gradients(plain, floor, weight=0.7, accumulation=1):
        (plain(IDS, labels=labels).sum() * 0).backward()
    injected = gradients()
    assert len(recorded) == len(by_hand)
    for one, other in zip(recorded, by_hand, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    # the head's gradients, of the sum times 0, stand at the end
    for one, other in zip(recorded, injected, strict=False):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
