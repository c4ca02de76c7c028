"""The gates of axis and floor belong to the thing, not to the route: a file meets those that an extracted axis meets.

What can be told without the model is told before it is loaded, and what can be told without rollouts before they are sampled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import HIDDEN, LAYERS, build_floor, build_model, build_tokenizer, save_model
from tiny_recipe import write_recipe

from trimtab.axis import Axis, Floor, UserError
from trimtab.axis.calibration import response_projections
from trimtab.axis.chat_format import ChatFormat
from trimtab.axis.directions import unit
from trimtab.axis.extraction import extract
from trimtab.axis.files import read_json, read_jsonl, save_tensors
from trimtab.axis.instruments import load_axis, load_floor, load_instrument
from trimtab.axis.models import load_model
from trimtab.axis.soundness import mean_states
from trimtab.cli.check import build_meta_model, find_structure
from trimtab.cli.main import main
from trimtab.pipeline.instrument import HELD_OUT, TRAIN, axis_stage, check_counts, floor_stage, played
from trimtab.pipeline.loading import Prepared, sampling_options
from trimtab.pipeline.run import Run
from trimtab.recipes import data
from trimtab.recipes.loader import load_recipe


class Untouched(Prepared):
    """A model that must not be needed."""

    def __call__(self) -> Any:
        raise AssertionError("the model was loaded, and what is wrong could be told without it")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gates") / "model")


@pytest.fixture(scope="module")
def extracted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose axis is extracted."""
    folder = tmp_path_factory.mktemp("extracted")
    axis_stage(open_here(model, folder))
    return folder / "run"


def test_the_held_out_axis_shares_nothing_with_the_training_axis(model: Path, extracted: Path, tmp_path: Path) -> None:
    """No role, no question, no answer of the default Assistant and no random number: it is an extraction of its own."""
    run = open_here(model, tmp_path, start=extracted)
    train, held_out = (read_jsonl(path) for path in (run.rollouts_path, run.held_out_rollouts_path))
    section = run.recipe.axis
    for rows, split in ((train, TRAIN), (held_out, HELD_OUT)):
        roles, questions = played(section, split)
        assert {row["role"] for row in rows} == {"default", *(role.name for role in roles)}
        assert {row["prompt"][-1]["content"] for row in rows} == set(questions)
    assert {row["role"] for row in train} & {row["role"] for row in held_out} == {"default"}
    assert not {row["prompt"][-1]["content"] for row in train} & {row["prompt"][-1]["content"] for row in held_out}
    own, other = Axis.load(run.axis_path), Axis.load(run.held_out_axis_path)
    assert (own.metadata["split"], other.metadata["split"]) == (TRAIN, HELD_OUT)
    assert other.metadata["seed"] == own.metadata["seed"] + 1
    assert own.default_mean is not None and other.default_mean is not None
    assert not torch.allclose(own.default_mean, other.default_mean, atol=1e-3)
    # the same as of the held-out roles alone, whatever was sampled before them
    loaded = load_model(str(model), dtype="float32", device="cpu")
    alone = extract(
        loaded, ChatFormat(loaded.tokenizer), *played(section, HELD_OUT), data.default_prompts(), tmp_path / "alone",
        options=sampling_options(section.sampling), default_repeats=section.default_repeats, seed=section.seed + 1,
    )  # fmt: skip
    assert torch.equal(alone.axis.directions, other.directions)
    facts = read_json(run.folder / "stages" / "axis.json")["facts"]
    assert facts["split_half_held_out"] == alone.split_half
    assert facts["cosine_held_out"] == pytest.approx((own.directions * other.directions).sum(-1).tolist(), abs=1e-4)


def test_of_held_out_questions_as_many_are_asked_as_there_are() -> None:
    there = data.questions(HELD_OUT)
    section = load_recipe("smollm2-135m/sft", [f"axis.questions={len(there) + 1}"]).recipe.axis
    assert played(section, HELD_OUT)[1] == there and len(played(section, TRAIN)[1]) == len(there) + 1
    recipe = load_recipe(
        "smollm2-135m/sft", [f"axis.questions={len(there) + 1}", f"axis.min_per_role={len(there) + 1}"]
    )
    with pytest.raises(UserError, match=f"and gives {len(there)}, one a question"):
        check_counts(recipe.recipe)


def open_here(model: Path, folder: Path, *, start: Path | None = None, **sections: dict[str, Any]) -> Run:
    """A run of a tiny recipe with some of its sections changed, from nothing or from what another run has done."""
    path = write_recipe(folder / "recipe.yaml", model)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["floor"] |= {"min_firing": 0.15}
    for name, changes in sections.items():
        content.setdefault(name, {}).update(changes)
        if "path" in changes and name == "floor":
            del content["floor"]["layers"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    loaded = load_recipe(path)
    if start is not None:
        shutil.copytree(start, folder / "run")
    return Run(folder / "run", loaded.recipe, loaded)


def capping_config(path: Path, floor: Floor) -> Path:
    """A floor as the authors publish theirs."""
    vectors = {
        f"v{layer}": {"vector": -v, "layer": layer} for layer, v in zip(floor.layers, floor.directions, strict=True)
    }
    steps = [{"vector": f"v{layer}", "cap": -float(tau)} for layer, tau in zip(floor.layers, floor.tau, strict=True)]
    torch.save({"vectors": vectors, "experiments": [{"id": "x", "interventions": steps}]}, path)
    return path


def stored(floor: Floor, path: Path, kind: str) -> dict[str, Any]:
    """The floor section that names a floor of a file."""
    if kind == "published":
        return {"path": str(capping_config(path / "capping_config.pt", floor)), "experiment": "x"}
    floor.save(path / "floor.safetensors")
    return {"path": str(path / "floor.safetensors")}


ROUTES = ["calibrated", "floor.path", "published"]


def by_route(route: str, model: Path, tmp_path: Path, extracted: Path, *, inert: bool, **more: Any) -> Run:
    """A run whose floor comes by a route, and never fires or often does."""
    if route == "calibrated":  # its lowest percentile, against a bar that it does not reach
        section = {"percentile": 0.01, "min_firing": 0.6} if inert else {}
    else:
        section = stored(build_floor(tau=-1e4 if inert else 0.0), tmp_path, route)
    return open_here(model, tmp_path, start=extracted, floor={**section, **more.pop("floor", {})}, **more)


@pytest.mark.parametrize("route", ROUTES)
def test_a_floor_that_hardly_fires_is_refused_by_every_route(
    route: str, model: Path, extracted: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"of drift token-layer slots; below .* it does next to nothing") as caught:
        floor_stage(by_route(route, model, tmp_path, extracted, inert=True))
    assert caught.value.key == ("floor.percentile" if route == "calibrated" else "floor.path")
    assert "floor.min_firing=0" in caught.value.remedy
    assert not (tmp_path / "run" / "floor.safetensors").exists()


@pytest.mark.parametrize("route", ROUTES)
def test_its_firing_is_kept_whatever_its_route_and_it_can_be_forced(
    route: str, model: Path, extracted: Path, tmp_path: Path
) -> None:
    facts = floor_stage(by_route(route, model, tmp_path, extracted, inert=True, floor={"min_firing": 0}))
    assert facts["firing_fraction"] < 0.6 and facts["drift_rows"] == 4
    (tmp_path / "acts").mkdir()
    facts = floor_stage(by_route(route, model, tmp_path / "acts", extracted, inert=False))
    assert 0.15 <= facts["firing_fraction"] <= 1
    assert (
        Floor.load(tmp_path / "acts" / "run" / "floor.safetensors").metadata["firing_fraction"]
        == facts["firing_fraction"]
    )


@pytest.mark.parametrize("route", ["floor.path", "published"])
def test_the_control_of_a_floor_from_a_file_fires_as_often_on_the_pool(
    route: str, model: Path, extracted: Path, tmp_path: Path
) -> None:
    """``Floor.save`` writes no percentile where nobody gave one, nor does a published file."""
    run = by_route(route, model, tmp_path, extracted, inert=False, eval={"control": True})
    floor_stage(run)
    floor, control = (Floor.load(run.variant(control).floor_path) for control in (False, True))
    loaded = load_model(str(model), dtype="float32", device="cpu")
    roles = Axis.load(run.axis_path).roles
    rows = [row for row in read_jsonl(run.rollouts_path) if row["role"] in ("default", *roles)][:12]
    heads = {"floor": floor.directions, "control": control.directions}
    found, _ = response_projections(loaded, ChatFormat(loaded.tokenizer), rows, heads, floor.layers)
    shares = [
        float((found[name] < tau).float().mean()) for name, tau in (("floor", floor.tau), ("control", control.tau))
    ]
    assert shares[0] == pytest.approx(floor.metadata["percentile"] / 100, abs=0.01)
    assert shares[1] == pytest.approx(shares[0], abs=0.1) and 0 < shares[0] < 1
    wanted = found["floor"].std(0) if route == "published" else torch.ones(2)
    assert torch.allclose(floor.sigma, wanted, atol=1e-3), "a published cap has no sigma, so the pool's is taken"


def test_trimtab_eval_holds_a_given_floor_to_the_same_gate(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_floor(tau=-1e4).save(tmp_path / "floor.safetensors")
    small = ["axis.roles=2", "axis.held_out_roles=1", "axis.questions=3", "axis.default_repeats=2"]
    small += ["axis.sampling.max_new_tokens=4", "model.dtype=float32", "model.device=cpu", "floor.pool=8"]
    given = ["--base", str(model), "--tuned", str(model), "--floor", str(tmp_path / "floor.safetensors")]
    assert main(["eval", *given, *small, "--output-dir", str(tmp_path / "run"), "--quiet"]) == 2
    assert "fires on 0.0% of drift" in capsys.readouterr().err


def floor_file(path: Path, **changes: Any) -> Path:
    floor = build_floor()
    tensors = {"directions": floor.directions, "tau": floor.tau, "sigma": floor.sigma}
    facts = {"layers": changes.pop("layers", [1, 2])}
    save_tensors(path, tensors | changes, {"format": "trimtab floor 1", "facts": facts})
    return path


def axis_file(path: Path, tensor: torch.Tensor, **more: torch.Tensor) -> Path:
    save_tensors(path, {"axis": tensor, **more}, {"format": "trimtab axis 1", "facts": {}})
    return path


def torch_file(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def roles_folder(path: Path) -> Path:
    path.mkdir()
    torch.save(torch.randn(LAYERS + 1, HIDDEN), path / "bard.pt")
    torch.save(torch.randn(LAYERS + 1, HIDDEN), path / "default.pt")
    return path


BAD_FLOORS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another width": (lambda p: floor_file(p / "f", directions=torch.eye(2, 16)), "width 16, the model 32"),
    "beyond the model": (lambda p: floor_file(p / "f", layers=[1, 9]), "floor layer 9 is beyond the model"),
    "letters for layers": (lambda p: floor_file(p / "f", layers=["a", "b"]), "whole numbers, got"),
    "half layers": (lambda p: floor_file(p / "f", layers=[1.5, 2.5]), "whole numbers, got"),
    "no unit vectors": (lambda p: floor_file(p / "f", directions=2 * build_floor().directions), "unit length"),
    "NaN": (lambda p: floor_file(p / "f", tau=torch.tensor([0.0, float("nan")])), "NaN or infinity"),
    "an axis": (lambda p: axis_file(p / "a", torch.eye(LAYERS, HIDDEN)), "an axis, not a floor"),
    "a published axis": (lambda p: torch_file(p / "a.pt", torch.eye(LAYERS, HIDDEN)), "an axis, not a floor"),
    "a web page": (lambda p: Path(shutil.copy(__file__, p / "f.pt")), "neither a torch archive nor a pickle"),
    "many experiments": (lambda p: capping_config(p / "c.pt", build_floor()), "none is named; the file has 1"),
    "published beyond": (lambda p: capping_config(p / "c.pt", build_floor((2, 7))), "floor layer 7 is beyond"),
}  # fmt: skip
BAD_AXES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another width": (lambda p: axis_file(p / "a", torch.eye(LAYERS, 16)), "4 layers of width 16, the model 4 of 32"),
    "another depth": (lambda p: torch_file(p / "a.pt", torch.eye(5, HIDDEN)), "5 layers of width 32, the model 4"),
    "NaN": (lambda p: torch_file(p / "a.pt", torch.full((LAYERS, HIDDEN), float("nan"))), "NaN or infinity"),
    "zero vectors": (lambda p: torch_file(p / "a.pt", torch.eye(LAYERS, HIDDEN).tril(-1)), "zero vectors at layers 0"),
    "default_vector.pt": (lambda p: torch_file(p / "default_vector.pt", torch.randn(LAYERS, HIDDEN)), "mean activation"),
    "a floor": (lambda p: floor_file(p / "f"), "a floor, not an axis"),
    "a capping_config": (lambda p: capping_config(p / "c.pt", build_floor()), "holds floors, and no axis"),
    "roles of another model": (lambda p: roles_folder(p / "role_vectors"), "5 layers of width 32, the model 4"),
    "wrong by its own means": (
        lambda p: axis_file(p / "a", -torch.eye(LAYERS, HIDDEN), default_mean=torch.eye(LAYERS, HIDDEN),
                            role_vectors=torch.zeros(3, LAYERS, HIDDEN)), "points away from the Assistant",
    ),
}  # fmt: skip
BAD = {
    **{f"floor: {kind}": ("floor", *case) for kind, case in BAD_FLOORS.items()},
    **{f"axis: {kind}": ("axis", *case) for kind, case in BAD_AXES.items()},
}


@pytest.mark.parametrize(("section", "make", "says"), BAD.values(), ids=BAD)
def test_a_bad_file_is_told_before_the_model_is_loaded(
    section: str, make: Callable[[Path], Path], says: str, model: Path, tmp_path: Path
) -> None:
    file = make(tmp_path)
    changes: dict[str, Any] = {"path": str(file)}
    if says.startswith("floor layer 7"):
        changes["experiment"] = "x"
    run = open_here(model, tmp_path, **{section: changes})
    with pytest.raises(UserError, match=says) as caught:
        axis_stage(run, Untouched(run))
    assert caught.value.file is not None and caught.value.key is not None and caught.value.remedy
    with pytest.raises(UserError, match=says):  # and by `trimtab check`
        find_structure(run.recipe, build_meta_model(run.recipe))


COUNTS: dict[str, tuple[dict[str, Any], str]] = {
    "axis.min_per_role": ({"axis": {"min_per_role": 4}}, "needs 4 counted responses and gives 3"),
    "floor.pool": ({"floor": {"pool": 7}}, "calibrated on 7 rollouts; 8 are the least"),
    "axis.questions": ({"axis": {"questions": 1}}, "calibrated on 4 rollouts; 8 are the least"),
    "floor.layers": ({"floor": {"layers": [1, 4]}}, "floor layer 4 is beyond the model"),
}


@pytest.mark.parametrize("key", COUNTS)
def test_so_are_numbers_that_can_not_be_met(key: str, model: Path, tmp_path: Path) -> None:
    sections, says = COUNTS[key]
    run = open_here(model, tmp_path, **sections)
    with pytest.raises(UserError, match=says) as caught:
        axis_stage(run, Untouched(run))
    assert caught.value.key == key


def test_a_mean_activation_is_no_axis_whatever_its_name(tmp_path: Path) -> None:
    """States of all texts lie together, as they do in real models; the file's name says nothing."""
    common = build_model("llama", max_position_embeddings=2048)
    common.model.embed_tokens.weight.data += 2.0
    folder = tmp_path / "model"
    common.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    states = mean_states(loaded, ChatFormat(loaded.tokenizer).answer_ids("An answer about ships and the sea."))
    torch.save(states, tmp_path / "mean.pt")
    run = open_here(folder, tmp_path, axis={"path": str(tmp_path / "mean.pt")})
    with pytest.raises(UserError, match=r"lies along the model's states on any text \(cosine (0\.9|1\.0)") as caught:
        axis_stage(run)
    assert caught.value.key == "axis.path" and not run.rollouts_path.exists()


def test_an_axis_that_points_away_is_told_and_the_rollouts_are_kept(
    model: Path, extracted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Axis.load(extracted / "axis.safetensors").directions
    start = tmp_path / "start"
    (start / "axis").mkdir(parents=True)
    shutil.copytree(extracted / "axis", start / "axis", dirs_exist_ok=True)  # the rollouts, without their stage
    path = torch_file(tmp_path / "axis.pt", -own)
    run = open_here(model, tmp_path, start=start, axis={"path": str(path)})
    with pytest.raises(UserError, match=r"points away from the Assistant: .* is -1\.00") as caught:
        axis_stage(run)
    assert caught.value.key == "axis.path" and "negate it" in caught.value.remedy
    assert run.rollouts_path.read_bytes() == (extracted / "axis" / "rollouts.jsonl").read_bytes()
    across = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))
    across -= (across * own).sum(-1, keepdim=True) * own
    torch.save(across, path)
    axis_stage(run)
    assert "has a cosine of" in caplog.text and "it may be another model's" in caplog.text
    assert torch.allclose(Axis.load(run.axis_path).directions, unit(across), atol=1e-6)


def test_nor_is_one_taken_where_axis_and_floor_are_given(model: Path, tmp_path: Path) -> None:
    """Held-out roles alone are played then, and theirs is the axis to hold it against."""
    build_floor().save(tmp_path / "floor.safetensors")

    def given(axis: torch.Tensor, name: str) -> Run:
        (tmp_path / name).mkdir()
        path = torch_file(tmp_path / name / "axis.pt", axis)
        floor = {"path": str(tmp_path / "floor.safetensors")}
        return open_here(model, tmp_path / name, floor=floor, axis={"path": str(path)}, eval={"tuned": str(model)})

    first = given(torch.eye(LAYERS, HIDDEN), "first")
    axis_stage(first)
    own = Axis.load(first.held_out_axis_path)
    assert own.roles and not set(own.roles) & {role.name for role in data.roles("train", 2)}
    with pytest.raises(UserError, match=r"points away from the Assistant: .* is -1\.00"):
        axis_stage(given(-own.directions, "second"))


def test_a_folder_of_role_vectors_is_an_axis_of_a_recipe(model: Path, extracted: Path, tmp_path: Path) -> None:
    own, folder = Axis.load(extracted / "axis.safetensors"), tmp_path / "role_vectors"
    folder.mkdir()
    assert own.role_vectors is not None and own.default_mean is not None
    for name, vector in zip(own.roles, own.role_vectors, strict=True):
        torch.save(vector, folder / f"{name}.pt")
    torch.save(own.default_mean, tmp_path / "default_vector.pt")
    run = open_here(model, tmp_path, axis={"path": str(folder)})
    inputs = run.inputs("axis")
    facts = axis_stage(run)
    assert facts["cosine_published_own"] == pytest.approx([1.0] * LAYERS, abs=1e-3)
    assert torch.allclose(Axis.load(run.axis_path).directions, own.directions, atol=1e-5)
    torch.save(own.default_mean + 1, tmp_path / "default_vector.pt")
    assert run.inputs("axis") != inputs, "the run folder is held to what the folder holds"


def test_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    floor, axis = build_floor(), Axis(torch.eye(LAYERS, HIDDEN))
    floor.save(tmp_path / "one")
    axis.save(tmp_path / "two.bin")
    capping_config(tmp_path / "three.pth", floor)
    torch.save(axis.directions, tmp_path / "four")
    assert load_floor(tmp_path / "one").layers == (1, 2)
    assert torch.equal(load_axis(tmp_path / "two.bin").directions, axis.directions)
    published = load_floor(tmp_path / "three.pth", "x")
    assert torch.allclose(published.directions, floor.directions) and torch.equal(published.tau, floor.tau)
    assert isinstance(load_instrument(tmp_path / "four"), Axis)
    for name in ("one", "two.bin", "four"):
        with pytest.raises(UserError, match=r"only a capping_config\.pt has experiments"):
            load_instrument(tmp_path / name, "x")
    save_tensors(tmp_path / "five", {"x": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="neither an axis nor a floor"):
        load_instrument(tmp_path / "five")


def test_the_facts_of_a_floor_from_a_file_say_where_it_is_from(model: Path, extracted: Path, tmp_path: Path) -> None:
    run = by_route("published", model, tmp_path, extracted, inert=False)
    floor_stage(run)
    facts = read_json(run.folder / "floor.json")
    assert facts["experiment"] == "x" and facts["source"].endswith("capping_config.pt") and "sigma" in facts
