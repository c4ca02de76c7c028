"""The instrument of a run: its axis and its floor, extracted and calibrated, or taken from files and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from trimtab.recipes.schema import Recipe

log = logging.getLogger("trimtab")

# Cosines, mean or median over layers. Axes of one model's halves agree at about 0.8, unrelated directions at 0. Mean activations
# share what every text has: 0.94 on SmolLM2-135M, where an axis had at most 0.23 with them at any layer.
OPPOSED, UNRELATED, A_MEAN = -0.3, 0.1, 0.7


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
    if axis.min_per_role > axis.questions:
        raise UserError(
            f"a role needs {axis.min_per_role} counted responses and gives {axis.questions}, one a question",
            key="axis.min_per_role",
            remedy=f"set axis.min_per_role to {axis.questions} at most, or raise axis.questions",
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
        if not run.rollouts_path.exists():  # an extraction that has sampled nothing yet holds to nothing
            (run.rollouts_path.parent / "state.safetensors").unlink(missing_ok=True)
        section = recipe.axis
        judged = section.judge.model_dump() if section.judge else None
        check_endpoint(judged, "axis.judge")  # before a model is loaded
        loaded, form = prepared()
        judge = role_judge(judged, run.rollouts_path.parent / "judge.jsonl") if judged else None
        if given is not None:
            _check_no_mean(given, loaded, form, section.path)
        if given is not None and not plays_training_roles(run.loaded.resolved):
            return _held_out_alone(run, loaded, form, given, judge)
        found = _extraction(
            run, loaded, form, data.roles("train", section.roles), data.roles("dev", section.held_out_roles), judge
        )
        axis = found.axis
        facts: dict[str, Any] = {"split_half": found.split_half, "roles": len(found.axis.roles)}
        if given is not None:
            facts["cosine_published_own"] = _compare(given, found.axis, _window(recipe, loaded), section.path)
            axis = given
            log.info("axis: %s; the rollouts made here serve calibration and the held-out axis", section.path)
        axis.save(run.axis_path)
        if len(found.axis.roles) >= 3:
            facts["persona_space"] = persona_space(found.axis).as_json()
        if found.held_out is not None:
            found.held_out.save(run.held_out_axis_path)
            cosine = (axis.directions * found.held_out.directions).sum(-1)
            facts["cosine_held_out"] = [round(float(c), 4) for c in cosine]
        return facts

    return run.stage("axis", run.inputs("axis"), work)


def _extraction(
    run: Run,
    loaded: Loaded,
    form: ChatFormat,
    roles: Sequence[Role],
    held_out_roles: Sequence[Role],
    judge: RoleJudge | None,
) -> Extraction:
    """Play these roles and the default Assistant, as the recipe's ``axis`` section says."""
    section = run.recipe.axis
    return extract(
        loaded,
        form,
        roles,
        held_out_roles,
        data.questions("train", section.questions),
        data.default_prompts(),
        run.rollouts_path.parent,
        options=sampling_options(section.sampling),
        default_repeats=section.default_repeats,
        seed=section.seed,
        judge=judge,
        min_per_role=section.min_per_role,
    )


def _held_out_alone(run: Run, loaded: Loaded, form: ChatFormat, axis: Axis, judge: RoleJudge | None) -> dict[str, Any]:
    """Where axis and floor are given: the axis of held-out roles, which every report measures on as well, or nothing."""
    axis.save(run.axis_path)
    section = run.recipe.axis
    roles = data.roles("dev", section.held_out_roles)
    count = (len(roles) + section.default_repeats) * section.questions if roles else 0
    log.info(
        "axis and floor are given: %d rollouts are sampled, for the axis of held-out roles and the probe that reads personas; "
        "axis.held_out_roles=0 leaves both out",
        count,
    )
    if not roles:
        return {}
    held_out = _extraction(run, loaded, form, roles, [], judge).axis
    dataclasses.replace(held_out, metadata={**held_out.metadata, "split": "held_out"}).save(run.held_out_axis_path)
    return {"cosine_held_out": _compare(axis, held_out, _window(run.recipe, loaded), section.path)}


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


def _compare(given: Axis, own: Axis, window: list[int], path: str | None) -> list[float]:
    """Cosine at each layer between the axis of a file and one of rollouts that were made here.

    Raises:
        UserError: if the file's points the other way at the floor's layers. The rollouts are kept.
    """
    cosines = (given.directions * own.directions).sum(-1)
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
    return [round(float(c), 4) for c in cosines]


def calibration_rows(run: Run, roles: list[str]) -> list[dict[str, Any]]:
    """Stored rollouts of these roles and of the default Assistant."""
    keep = {*roles, DEFAULT}
    return [row for row in read_jsonl(run.rollouts_path) if row["role"] in keep]


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
        if plays_training_roles(run.loaded.resolved):
            played = data.roles("train", recipe.axis.roles)
        else:
            played = data.roles("dev", recipe.axis.held_out_roles) if recipe.axis.held_out_roles else []
        rows = calibration_rows(run, [role.name for role in played]) if played else []
        pool = evenly_chosen(rows, section.pool)
        drift = evenly_chosen([row for row in rows if row["role"] != DEFAULT], section.drift_rows)
        if given is not None and not played:
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
