"""The instrument of a run: its axis and its floor, extracted and calibrated, or taken from files and checked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.axis import Axis, Floor, UserError
from trimtab.axis.analysis import persona_space
from trimtab.axis.calibration import (
    LEAST_POOL,
    calibrate,
    check_window,
    completed,
    control_floor,
    evenly_chosen,
    gate,
    window_by_rule,
)
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.directions import check_fits, unit
from trimtab.axis.errors import one_line
from trimtab.axis.extraction import DEFAULT, Extraction, Role, RoleJudge, extract
from trimtab.axis.files import read_jsonl, write_json
from trimtab.axis.instruments import load_axis, load_floor
from trimtab.axis.judge import check_endpoint, role_judge
from trimtab.axis.layers import shape_of_config
from trimtab.axis.models import Loaded, model_shape
from trimtab.axis.soundness import mean_states
from trimtab.pipeline.identity import plays_training_roles
from trimtab.pipeline.loading import Prepared, sampling_options
from trimtab.pipeline.run import Run
from trimtab.recipes import data
from trimtab.recipes.schema import AxisSection, Recipe

log = logging.getLogger("trimtab")

# Cosines, mean or median over layers. Axes of one model's halves agree at about 0.8, unrelated directions at 0. Mean activations
# share what every text has: 0.94 on SmolLM2-135M, where an axis had at most 0.23 with them at any layer.
OPPOSED, UNRELATED, A_MEAN = -0.3, 0.1, 0.7
TRAIN: data.Split = "train"
HELD_OUT: data.Split = "dev"  # of the axis that shares no role, question or answer with the training axis


def played(section: AxisSection, split: data.Split) -> tuple[list[Role], list[str]]:
    """Roles and questions that are played for an axis, ``axis.questions`` of them or all that the held-out split has."""
    if split == TRAIN:
        return data.roles(TRAIN, section.roles), data.questions(TRAIN, section.questions)
    return data.roles(HELD_OUT, section.held_out_roles), data.questions(HELD_OUT)[: section.questions]


def local_file(path: str) -> Path:
    """A local path for a recipe's path; ``hf://datasets/<owner>/<name>/<file>`` is fetched from the hub.

    Raises:
        UserError: if the hub can't be reached or has no such file.
    """
    if not path.startswith("hf://"):
        return Path(path).expanduser()
    from huggingface_hub import hf_hub_download

    parts = path.removeprefix("hf://").split("/")
    repo_type = parts.pop(0).removesuffix("s") if parts[0] in ("datasets", "models") else "model"
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type=repo_type))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"the file can't be fetched: {one_line(error)}",
            file=path,
            remedy="check the network and the name, or fetch the file elsewhere and give its local path",
        ) from error


def given_axis(recipe: Recipe, shape: tuple[int, int], *, fetch: bool = True) -> Axis | None:
    """The axis that a recipe names by file, checked against its model's shape; None where it names none.

    Args:
        recipe: the recipe.
        shape: decoder layers and hidden size of its model.
        fetch: also fetch a file from the hub; without it there is none then.

    Raises:
        UserError: if the file is no axis, damaged, or made for another model.
    """
    path = recipe.axis.path
    if path is None or (path.startswith("hf://") and not fetch):
        return None
    with _keyed("axis.path"):
        file = local_file(path)
        axis = load_axis(file)
        check_fits(*shape, axis=axis, file=file)
    _note_model(axis.metadata, path, recipe)
    return axis


def given_floor(recipe: Recipe, shape: tuple[int, int], *, fetch: bool = True) -> Floor | None:
    """The floor that a recipe names by file, checked as :func:`given_axis` checks an axis; None where it names none.

    Raises:
        UserError: also if ``floor.layers``, where there is no file, are not the model's.
    """
    section = recipe.floor
    if section.layers != "auto":
        check_window(section.layers, shape[0])
    if section.path is None or (section.path.startswith("hf://") and not fetch):
        return None
    with _keyed("floor.path"):
        file = local_file(section.path)
        floor = load_floor(file, section.experiment)
        check_fits(*shape, floor=floor, file=file)
    _note_model(floor.metadata, section.path, recipe)
    return floor


@contextlib.contextmanager
def _keyed(key: str) -> Iterator[None]:
    """Name the recipe's key in a fault of the file that it names."""
    try:
        yield
    except UserError as error:
        raise UserError(error.fault, remedy=error.remedy, file=error.file, key=error.key or key) from error


def _note_model(metadata: Mapping[str, Any], path: str, recipe: Recipe) -> None:
    made_for = metadata.get("model")
    if made_for not in (None, recipe.model.name):
        log.warning("%s was made for %s, and the model is %s", path, made_for, recipe.model.name)


def check_counts(recipe: Recipe) -> None:
    """Check that the rollouts that a recipe asks for can be enough for its own gates.

    Raises:
        UserError: if they can't.
    """
    axis, pool = recipe.axis, recipe.floor.pool
    for roles, questions in (played(axis, split) for split in (TRAIN, HELD_OUT)):
        if roles and axis.min_per_role > len(questions):
            raise UserError(
                f"a role needs {axis.min_per_role} counted responses and gives {len(questions)}, one a question",
                key="axis.min_per_role",
                remedy=f"set axis.min_per_role to {len(questions)} at most, or raise axis.questions",
            )
    rollouts = (axis.roles + axis.default_repeats) * axis.questions
    calibrates = recipe.floor.path is None or recipe.floor.experiment is not None or recipe.eval.control
    if calibrates and min(pool, rollouts) < LEAST_POOL:
        raise UserError(
            f"a floor is calibrated on {min(pool, rollouts)} rollouts; {LEAST_POOL} are the least",
            key="floor.pool" if pool < LEAST_POOL else "axis.questions",
            remedy=f"set floor.pool to {LEAST_POOL} or more, and axis.roles and axis.questions so that there are as many",
        )


def axis_stage(run: Run, prepared: Prepared | None = None) -> dict[str, Any]:
    """Extract the axis, or load a published one; writes ``axis.safetensors`` and ``axis_held_out.safetensors``."""
    recipe = run.recipe
    prepared = prepared or Prepared(run)

    def work() -> dict[str, Any]:
        # What is known without weights comes before them, and what needs them before hours of sampling.
        check_counts(recipe)
        shape = model_shape(recipe.model.name, recipe.model.revision)
        given = given_axis(recipe, shape)
        given_floor(recipe, shape)
        section = recipe.axis
        judged = section.judge.model_dump() if section.judge else None
        check_endpoint(judged, "axis.judge")  # before a model is loaded
        loaded, form = prepared()
        judge = role_judge(judged, run.rollouts_path.parent / "judge.jsonl") if judged else None
        if given is not None:
            _check_no_mean(given, loaded, form, section.path)
        alone = given is not None and not plays_training_roles(run.loaded.resolved)
        axis, facts = (given, {}) if given is not None and alone else _training_axis(run, loaded, form, given, judge)
        axis.save(run.axis_path)
        if alone:
            log.info(
                "axis and floor are given: rollouts are sampled of the held-out axis alone, and the probe for personas reads "
                "them; axis.held_out_roles=0 leaves both out"
            )
        if section.held_out_roles:
            held_out = _extraction(run, loaded, form, HELD_OUT, judge)
            held_out.axis.save(run.held_out_axis_path)
            cosines = (axis.directions * held_out.axis.directions).sum(-1)
            if alone:  # nothing else was sampled to hold the file's axis against
                _check_direction(cosines, _window(recipe, loaded), section.path)
            facts |= {"split_half_held_out": held_out.split_half, "cosine_held_out": _rounded(cosines)}
        return facts

    return run.stage("axis", run.inputs("axis"), work)


def _extraction(run: Run, loaded: Loaded, form: ChatFormat, split: data.Split, judge: RoleJudge | None) -> Extraction:
    """Play the roles of a split and the default Assistant, as the recipe's ``axis`` section says.

    The held-out axis has its own questions, its own answers of the default Assistant and its own random numbers.
    """
    section = run.recipe.axis
    roles, questions = played(section, split)
    if len(questions) < section.questions:
        log.warning("%s axis: %d questions, fewer than axis.questions=%d", split, len(questions), section.questions)
    rollouts, seed = (run.rollouts_path, 0) if split == TRAIN else (run.held_out_rollouts_path, 1)
    if not rollouts.exists():  # an extraction that has sampled nothing yet holds to nothing
        (rollouts.parent / "state.safetensors").unlink(missing_ok=True)
    return extract(
        loaded,
        form,
        roles,
        questions,
        data.default_prompts(),
        rollouts.parent,
        options=sampling_options(section.sampling),
        default_repeats=section.default_repeats,
        seed=section.seed + seed,
        judge=judge,
        min_per_role=section.min_per_role,
        split=split,
        title=f"axis rollouts, {split.replace('_', '-')} roles",
    )


def _training_axis(
    run: Run, loaded: Loaded, form: ChatFormat, given: Axis | None, judge: RoleJudge | None
) -> tuple[Axis, dict[str, Any]]:
    """Play the training roles; returns the axis of their rollouts, or the given one that is held against it, and facts."""
    found = _extraction(run, loaded, form, TRAIN, judge)
    own = found.axis
    facts: dict[str, Any] = {"split_half": found.split_half, "roles": len(own.roles)}
    if len(own.roles) >= 3:
        facts["persona_space"] = persona_space(own).as_json()
    if given is None:
        return own, facts
    path = run.recipe.axis.path
    cosines = (given.directions * own.directions).sum(-1)
    _check_direction(cosines, _window(run.recipe, loaded), path)
    log.info("axis: %s; the rollouts made here serve calibration", path)
    return given, {**facts, "cosine_published_own": _rounded(cosines)}


def _check_no_mean(axis: Axis, loaded: Loaded, form: ChatFormat, path: str | None) -> None:
    """Refuse a mean activation that was taken for an axis: it lies along the states of any text.

    Raises:
        UserError: if that is what the file holds.
    """
    states = mean_states(loaded, form.prompt_ids(chat("", data.questions("train", 1)[0])))
    cosine = float((axis.directions * unit(states)).sum(-1).median())
    if abs(cosine) > A_MEAN:
        raise UserError(
            f"this lies along the model's states on any text (cosine {cosine:.2f}), so it is a mean activation, such as "
            "default_vector.pt or a role's vector, and not the difference of two",
            file=path,
            key="axis.path",
            remedy="give assistant_axis.pt, or the role_vectors/ folder with default_vector.pt beside it",
        )


def _window(recipe: Recipe, loaded: Loaded) -> list[int]:
    """The layers at which the recipe's floor will lie, as far as that is known without its file."""
    if recipe.floor.layers != "auto":
        return recipe.floor.layers
    config = loaded.model.config.get_text_config(decoder=True)
    return list(window_by_rule(config.model_type, shape_of_config(config)[0]))


def _check_direction(cosines: Tensor, window: list[int], path: str | None) -> None:
    """Hold the axis of a file against one of rollouts that were made here, by their cosine at each layer, [N].

    Raises:
        UserError: if the file's points the other way at the floor's layers. The rollouts are kept.
    """
    there = float(cosines[window].mean())
    if there < OPPOSED:
        raise UserError(
            f"this axis points away from the Assistant: its cosine with the axis of this model's own rollouts is {there:.2f}",
            file=path,
            key="axis.path",
            remedy="negate it (+ must be Assistant), or remove axis.path to take the axis of the rollouts, which are kept",
        )
    if there < UNRELATED:
        log.warning(
            "%s has a cosine of %.2f with the axis of this model's own rollouts: it may be another model's", path, there
        )


def _rounded(cosines: Tensor) -> list[float]:
    return [round(float(cosine), 4) for cosine in cosines]


def floor_stage(run: Run, prepared: Prepared | None = None) -> dict[str, Any]:
    """Calibrate the floor, or load a published one; writes ``floor.safetensors``, for the control too if asked for."""
    recipe = run.recipe
    prepared = prepared or Prepared(run)
    axis_stage(run, prepared)
    section = recipe.floor

    def work() -> dict[str, Any]:
        given = given_floor(recipe, model_shape(recipe.model.name, recipe.model.revision))
        loaded, form = prepared()
        axis = Axis.load(run.axis_path)
        # Where axis and floor are given and nothing is trained, the held-out roles alone are played, or none.
        sampled = plays_training_roles(run.loaded.resolved) or recipe.axis.held_out_roles > 0
        rows = read_jsonl(run.played_path) if sampled else []
        pool = evenly_chosen(rows, section.pool)
        drift = evenly_chosen([row for row in rows if row["role"] != DEFAULT], section.drift_rows)
        if given is not None and not sampled:
            if not given.has_sigma:
                raise UserError(
                    "this floor has no sigma, and nothing is sampled to measure it on",
                    file=section.path,
                    key="axis.held_out_roles",
                    remedy="set it above 0",
                )
            log.warning("%s: nothing was sampled, so how often it fires was not measured", section.path)
            floor = given
        elif given is not None:
            floor = gate(
                loaded,
                form,
                completed(loaded, form, given, pool, batch_size=section.batch_size),
                drift,
                min_firing=section.min_firing,
                batch_size=section.batch_size,
                file=section.path,
            )
        else:
            floor = calibrate(
                loaded,
                form,
                axis,
                pool,
                drift,
                layers=None if section.layers == "auto" else section.layers,
                percentile=section.percentile,
                min_firing=section.min_firing,
                batch_size=section.batch_size,
            )
        floor.save(run.variant(control=False).floor_path)
        if recipe.eval.control:
            control = control_floor(loaded, form, floor, pool, seed=section.control_seed, batch_size=section.batch_size)
            control.save(run.variant(control=True).floor_path)
        facts = {
            "layers": list(floor.layers),
            "tau": [round(float(t), 4) for t in floor.tau],
            "sigma": [round(float(s), 4) for s in floor.sigma],
            **floor.metadata,
        }
        write_json(run.folder / "floor.json", facts)
        return facts

    return run.stage("floor", run.inputs("floor"), work, made_from=[run.axis_path])
