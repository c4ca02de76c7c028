"""Merge a run's adapter into plain weights, and measure the merged model again: the report's uncapped figures must come back."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.axis import Floor, UserError
from trimtab.axis.adapter_files import ADAPTER_CONFIG, check_adapter_files, load_adapter
from trimtab.axis.adapters import NotMergeable, merge_in
from trimtab.axis.files import read_json, write_json
from trimtab.axis.models import (
    choose_device,
    choose_dtype,
    load_tokenizer,
    load_weights,
    pretrained_arguments,
)
from trimtab.eval import ids
from trimtab.eval.answers.arms import Arms
from trimtab.eval.answers.evaluation import Evaluation
from trimtab.eval.intervals import Array, ClusterBootstrap
from trimtab.eval.measures.side_effects import default_shift
from trimtab.eval.measures.who_speaks import scores_on_roles
from trimtab.eval.report.page import load_report
from trimtab.eval.schema import Estimate
from trimtab.pipeline.loading import Prepared, load_section, sampling_options
from trimtab.pipeline.run import Run

log = logging.getLogger("trimtab")

# p below which merged weights and adapter are called different: merging is checked often, and on three figures.
CHANCE = 0.001


def merge_adapter(run: Run, target: Path) -> Path:
    """Write the run's model with its adapter merged, a folder that transformers loads by itself.

    Raises:
        UserError: if there is no adapter, it is damaged or can't be merged, or ``target`` holds something else.
    """
    adapter = run.variant(control=False).adapter
    if not (adapter / ADAPTER_CONFIG).exists():
        raise UserError("there is no adapter to merge", file=adapter, remedy="train it first: trimtab train RECIPE")
    check_adapter_files(adapter)
    if (target / "config.json").exists():
        log.info("merged already: %s", target)
        return target
    if target.exists() and any(target.iterdir()):
        raise UserError("this folder is not empty", file=target, remedy="choose a new one with --to")
    section = run.recipe.model
    # Merged on the CPU, in the dtype that it was trained in: a quantised base is merged into the weights it was made from.
    dtype = choose_dtype(section.dtype, choose_device(section.device))[0]
    base = load_weights(
        section.name, **pretrained_arguments(dtype, section.revision, section.attn_implementation, None)
    )
    try:
        model = merge_in(load_adapter(base, adapter))
    except NotMergeable as error:
        raise UserError(
            f"this adapter can't be merged: {error}", file=adapter, remedy="load it beside its base, with PEFT"
        ) from error
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    load_tokenizer(section.name, section.revision).save_pretrained(unfinished)
    _write_old_names(unfinished)
    with contextlib.suppress(FileNotFoundError):
        target.rmdir()
    unfinished.replace(target)
    return target


def _write_old_names(folder: Path) -> None:
    """Say in transformers 4's words too what version 5 writes in its own.

    Version 4, and what is built on it, such as converters to GGUF, takes a config without ``rope_theta`` for one of 10000 and
    says nothing, so the model would be another; nor does it know version 5's tokenizer class. Version 5 reads the old names.
    """
    path = folder / "config.json"
    config = read_json(path)
    for section in (config, config.get("text_config", {})):
        theta = (section.get("rope_parameters") or {}).get("rope_theta")
        if theta is not None:
            section.setdefault("rope_theta", theta)
    write_json(path, config)
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})


def merge_stage(run: Run, target: Path | None = None) -> list[dict[str, Any]]:
    """Merge, load the plain weights anew, and measure them beside the report.

    Returns:
        Rows ``figure``; ``report`` and ``difference`` (value, low, high), the latter merged minus adapter, paired by prompt, or
        None; ``merged``; and ``agrees``: whether the merged value lies within the report's interval and the difference is not
        beyond chance (p >= 0.001). They are written to ``merged.json`` too.

    Raises:
        UserError: if there is no adapter, no report, or the evaluation's answers are gone.
    """
    report = load_report(run.folder / "report.json")
    folder = merge_adapter(run, target or run.folder / "merged")
    with_adapter, merged = _evaluations(run, folder)
    try:
        before = {"roles": with_adapter.on_roles["tuned"], "default": with_adapter.on_default["tuned"]}
    except KeyError as error:  # the adapter itself is not loaded here
        raise UserError(
            "the adapter's answers of the evaluation are not there, or are to other questions",
            file=run.folder / "eval",
            remedy="measure again: trimtab eval",
        ) from error
    scores, scores_before = (np.asarray(scores_on_roles(each)["tuned"]) for each in (merged, with_adapter))
    z, z_before = (np.asarray(merged.ruler.z(found.means)) for found in (merged.on_roles["tuned"], before["roles"]))
    shift, shift_before = default_shift(merged, "tuned"), default_shift(with_adapter, "tuned")
    found: dict[str, float] = {
        ids.READER_SCORE: float(np.nanmean(scores)),
        ids.Z_TRAINING: float(np.nanmean(z)),
        ids.BENIGN_KL: float(np.nanmean(merged.benign_forced["tuned"].kl)),
        ids.DEFAULT_Z_SHIFT: float(np.nanmean(shift)),
    }
    by_role = merged.resample(merged.role_clusters)
    by_default = merged.resample([item.cluster for item in merged.defaults])
    apart = {
        ids.READER_SCORE: (by_role, scores - scores_before),
        ids.Z_TRAINING: (by_role, z - z_before),
        ids.DEFAULT_Z_SHIFT: (by_default, shift - shift_before),
    }
    known: dict[str, Estimate] = {metric.id: metric.arms["tuned"] for metric in report.metrics}
    known |= {effect.id: effect.estimate for effect in report.side_effects}
    rows = [_row(name, known[name], value, apart.get(name)) for name, value in found.items() if name in known]
    write_json(run.folder / "merged.json", rows)
    return rows


def _evaluations(run: Run, folder: Path) -> tuple[Evaluation, Evaluation]:
    """The run's evaluation as far as its answers are kept, and one with the merged weights in the adapter's place.

    The base's answers are those of the evaluation in both; the merged model gives its own.
    """
    section, model = run.recipe.eval, run.recipe.model
    loaded, form = Prepared(run)()
    merged = load_section(model.model_copy(update={"name": str(folder), "revision": None, "quantization": None}))
    # without re-extraction: the figures that are compared need none
    recipe = run.recipe.model_copy(update={"eval": section.model_copy(update={"reextract_roles": 0, "durability": []})})
    bare = dataclasses.replace(run, recipe=recipe)
    floor, options = Floor.load(run.variant(control=False).floor_path), sampling_options(section.sampling)
    held: dict[str, Any] = {"base": loaded.model, "tuned": merged.model}
    weights = {name: (lambda held=model: contextlib.nullcontext(held)) for name, model in held.items()}
    names, kept = ["base", "tuned"], run.folder / "eval"
    arms = (
        Arms({"base": weights["base"]}, form, floor, kept, options, section.seed, names=names),
        Arms(
            weights,
            form,
            floor,
            run.folder / "merged_eval",
            options,
            section.seed,
            names=names,
            elsewhere={"base": kept},
        ),
    )
    with_adapter, anew = (Evaluation(bare, each, loaded.facts) for each in arms)
    anew.reader = with_adapter.reader  # the base's, which is fitted and kept
    return with_adapter, anew


def _row(name: str, told: Estimate, value: float, apart: tuple[ClusterBootstrap, Array] | None) -> dict[str, Any]:
    within = told.low <= value <= told.high
    difference = None
    if apart is not None:
        resample, values = apart
        estimate = resample.estimate(values)
        difference = [estimate.value, estimate.low, estimate.high]
        within = within and resample.p_value(values) >= CHANCE
    return {
        "figure": name,
        "report": [told.value, told.low, told.high],
        "merged": value,
        "difference": difference,
        "agrees": within,
    }
