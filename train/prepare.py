"""The stages before training: axis, floor, and preference pairs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from trimtab.axis import Axis, Floor, UserError, load_capping_config, load_published_axis
from trimtab.axis.analysis import persona_space
from trimtab.axis.calibration import calibrate, control_floor, response_projections, spread
from trimtab.axis.chat import ChatFormat, ends_of
from trimtab.axis.extraction import DEFAULT, extract
from trimtab.axis.files import file_fingerprint, read_jsonl, write_json
from trimtab.axis.judge import check_endpoint, role_judge
from trimtab.axis.models import Loaded, generation_ends, load_model, load_tokenizer
from trimtab.axis.sampling import SamplingOptions
from trimtab.recipes import data
from trimtab.recipes.rules import row_length
from trimtab.recipes.schema import DpoMethod, GrpoMethod, ModelSection, Recipe, Sampling, deciding
from trimtab.train.pairs import make_pairs
from trimtab.train.rollouts import check_lengths
from trimtab.train.run import Run
from trimtab.train.sources import benign_sources, check_data, drift_sources

log = logging.getLogger("trimtab")


def load_section(section: ModelSection) -> Loaded:
    """Load a model for inference as a recipe's ``model`` section says."""
    return load_model(
        section.name,
        revision=section.revision,
        dtype=section.dtype,
        device=section.device,
        attn_implementation=section.attn_implementation,
        quantization=section.quantization,
    )


def load_recipe_model(section: ModelSection) -> tuple[Loaded, ChatFormat]:
    """Load the recipe's model for inference, and its chat format."""
    loaded = load_section(section)
    form = ChatFormat(loaded.tokenizer, section.chat_template_kwargs, ends_of(loaded.model))
    form.tell()
    return loaded, form


def chat_format(section: ModelSection) -> ChatFormat:
    """The chat format of a recipe's model, without its weights."""
    tokenizer = load_tokenizer(section.name, section.revision)
    ends = generation_ends(section.name, section.revision)
    return ChatFormat(tokenizer, section.chat_template_kwargs, ends)


def check_template(recipe: Recipe) -> None:
    """Hold the model's chat template against what a recipe does with it, without the model's weights.

    Raises:
        UserError: if it can't be used; or if GRPO is to train conversations, each one row of tokens, and they are none in it.
    """
    form = chat_format(recipe.model)
    form.check()
    if not isinstance(recipe.method, GrpoMethod) or recipe.eval.tuned is not None:
        return
    if talks := [prompt for prompt in drift_sources(recipe.data) if len(prompt.turns) > 1]:
        form.ids_between(talks[0].opening, {"role": "user", "content": talks[0].turns[1]}, ended=True)


def sampling_options(section: Sampling) -> SamplingOptions:
    """The recipe's sampling section as options."""
    return SamplingOptions(**section.model_dump())


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
            f"the file can't be fetched: {str(error).splitlines()[0]}",
            file=path,
            remedy="check the network and the name, or fetch the file elsewhere and give its local path",
        ) from error


class Prepared:
    """The model of a run, loaded once and only when a stage needs it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loaded: tuple[Loaded, ChatFormat] | None = None

    def __call__(self) -> tuple[Loaded, ChatFormat]:
        """Model and chat format."""
        if self._loaded is None:
            check_template(self._run.recipe)
            self._loaded = load_recipe_model(self._run.recipe.model)
        return self._loaded


def axis_stage(run: Run, prepared: Prepared | None = None) -> dict[str, Any]:
    """Extract the axis, or load a published one; writes ``axis.safetensors`` and ``axis_held_out.safetensors``."""
    recipe = run.recipe
    prepared = prepared or Prepared(run)

    def work() -> dict[str, Any]:
        section = recipe.axis
        judged = section.judge.model_dump() if section.judge else None
        check_endpoint(judged, "axis.judge")  # before a model is loaded
        loaded, form = prepared()
        judge = role_judge(judged, run.rollouts_path.parent / "judge.jsonl") if judged else None
        found = extract(
            loaded,
            form,
            data.roles("train", section.roles),
            data.roles("held_out", section.held_out_roles),
            data.questions("train", section.questions),
            data.default_prompts(),
            run.rollouts_path.parent,
            options=sampling_options(section.sampling),
            default_repeats=section.default_repeats,
            seed=section.seed,
            judge=judge,
            min_per_role=section.min_per_role,
        )
        axis = found.axis
        if section.path is not None:
            axis = load_axis_file(local_file(section.path))
            log.info("axis: %s; the rollouts made here serve calibration and the held-out axis", section.path)
        axis.save(run.axis_path)
        facts: dict[str, Any] = {"split_half": found.split_half, "roles": len(found.axis.roles)}
        if len(found.axis.roles) >= 3:
            facts["persona_space"] = persona_space(found.axis).as_json()
        if section.path is not None:
            own = (axis.directions * found.axis.directions).sum(-1)
            facts["cosine_published_own"] = [round(float(c), 4) for c in own]
        if found.held_out is not None:
            found.held_out.save(run.held_out_axis_path)
            cosine = (axis.directions * found.held_out.directions).sum(-1)
            facts["cosine_held_out"] = [round(float(c), 4) for c in cosine]
        return facts

    return run.stage("axis", deciding([recipe.model.model_dump(), recipe.axis.model_dump()]), work)


def load_axis_file(path: Path) -> Axis:
    """Load our ``.safetensors`` or a published ``.pt`` axis."""
    return load_published_axis(path) if path.suffix == ".pt" else Axis.load(path)


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
        loaded, form = prepared()
        axis = Axis.load(run.axis_path)
        train_roles = [role.name for role in data.roles("train", recipe.axis.roles)]
        rows = calibration_rows(run, train_roles)
        pool = spread(rows, section.pool)
        drift = spread([row for row in rows if row["role"] != DEFAULT], section.drift_rows)
        if section.path is not None:
            floor = _floor_from_file(
                local_file(section.path), section.experiment, loaded, form, pool, section.batch_size
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
                allow_inert=section.allow_inert,
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

    inputs = [file_fingerprint(run.axis_path), section.model_dump(), recipe.eval.control]
    return run.stage("floor", inputs, work)


def _floor_from_file(
    path: Path, experiment: str | None, loaded: Loaded, form: ChatFormat, pool: list[Any], batch_size: int
) -> Floor:
    if path.suffix != ".pt":
        return Floor.load(path)
    if experiment is None:
        raise UserError(
            "a capping_config.pt holds many experiments",
            key="floor.experiment",
            remedy="name one, e.g. layers_46:54-p0.25",
        )
    floor = load_capping_config(path, experiment)
    found, _ = response_projections(
        loaded, form, pool, {"axis": floor.directions}, floor.layers, batch_size=batch_size, title="sigma"
    )
    values = found["axis"][torch.isfinite(found["axis"]).all(1)]
    metadata = {**floor.metadata, "percentile": 100 * float((values < floor.tau).float().mean())}
    return Floor(floor.layers, floor.directions, floor.tau, values.std(0), metadata)


def rollouts_stage(run: Run, prepared: Prepared | None = None) -> None:
    """Everything that training needs: axis, floor, and DPO's pairs. The other methods' trainers sample as they go on."""
    check_data(run.recipe)
    method, longest = run.recipe.method, row_length(run.recipe)
    if isinstance(method, GrpoMethod) and run.stage_record(run.variant(False).stage_name) is None:
        for entry in method.rewards:
            check_endpoint(entry.judge.model_dump() if entry.judge else None, "method.rewards.judge")
    prepared = prepared or Prepared(run)
    if not isinstance(method, GrpoMethod) and run.recipe.eval.tuned is None:
        _check_lengths(run, sampling_options(method.sampling), longest)
    floor_stage(run, prepared)
    if not isinstance(method, DpoMethod):
        return

    def work() -> dict[str, Any]:
        loaded, form = prepared()
        found: dict[str, Any] = {}
        for control in (False, True) if run.recipe.eval.control else (False,):
            variant = run.variant(control)
            found["control" if control else "pairs"] = make_pairs(
                loaded,
                form,
                Floor.load(variant.floor_path),
                drift_sources(run.recipe.data),
                variant.pairs,
                options=sampling_options(method.sampling),
                strength=method.cap_strength,
                seed=run.recipe.data.seed,
                max_length=longest,
            )
        return found

    floor = file_fingerprint(run.variant(False).floor_path)
    inputs = [floor, method.model_dump(), run.recipe.data.model_dump(), longest]
    facts = run.stage("pairs", inputs, work)
    if facts["pairs"]["pairs"] == 0:
        raise UserError(
            "no pair is left to train on: the cap changes none of the answers",
            key="floor",
            remedy="raise floor.percentile or widen floor.layers, and see the firing fraction in floor.json",
        )


def _check_lengths(run: Run, options: SamplingOptions, longest: int | None) -> None:
    """Hold the training prompts against the longest row, by the tokenizer alone."""
    section = run.recipe.data
    benign = benign_sources(section) if section.benign_share else []
    check_lengths(chat_format(run.recipe.model), [*drift_sources(section), *benign], longest, options)
