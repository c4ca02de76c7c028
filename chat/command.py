"""``trimtab chat``: the chat page, on this machine, with base, base + cap and tuned model side by side."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError
from trimtab.axis.files import read_json
from trimtab.chat.serving import check_address, import_gradio, serve, stays_here
from trimtab.recipes.schema import ModelSection

log = logging.getLogger("trimtab")

RUNS = Path("runs")


@dataclass(frozen=True)
class Sources:
    """What a conversation on the chat page is held with.

    Attributes:
        base: the base model.
        tuned: PEFT adapter of the base, or a whole model.
        floor: ``floor.safetensors`` of the base, or a published ``capping_config.pt``.
        experiment: id in the latter.
    """

    base: ModelSection
    tuned: str
    floor: Path
    experiment: str | None = None


def find_sources(
    run: Path | None,
    *,
    base: str | None = None,
    tuned: str | None = None,
    floor: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    experiment: str | None = None,
) -> Sources:
    """What the command's options name.

    Args:
        run: run folder; None for the newest below ``runs/`` that has an adapter.
        base: base model; with ``tuned`` and ``floor`` it stands in the place of a run.
        tuned: adapter or model.
        floor: ``floor.safetensors`` or ``capping_config.pt``.
        template_kwargs: of the base's chat template; a run's recipe has its own.
        experiment: id in the latter.

    Raises:
        UserError: if the options don't fit together, or the run folder is none or not trained yet.
    """
    given = {"--base": base, "--tuned": tuned, "--floor": floor}
    missing = [name for name, value in given.items() if value is None]
    if run is not None and len(missing) < len(given):
        raise UserError(
            f"both a run folder, {str(run)!r}, and {next(name for name in given if name not in missing)} are given",
            key="RUN",
            remedy="leave out one of them",
        )
    if experiment is not None and floor is None:
        raise UserError(
            "--experiment names an entry of a capping_config.pt, and no --floor is given",
            key="--experiment",
            remedy="give the file with --floor, or leave the experiment out",
        )
    if base is not None and tuned is not None and floor is not None:
        section = ModelSection(name=base, chat_template_kwargs=dict(template_kwargs or {}))
        return Sources(section, tuned, Path(floor).expanduser(), experiment)
    if len(missing) < len(given):
        raise UserError(
            f"{missing[0]} is not given",
            key=missing[0],
            remedy="give all three, --base M --tuned ADAPTER_OR_MODEL --floor F, or a run folder and none of them",
        )
    if template_kwargs:
        raise UserError(
            "a run's recipe says what its chat template is given",
            key="--chat-template-kwargs",
            remedy="leave it out, or give --base M --tuned ADAPTER_OR_MODEL --floor F in the place of the run folder",
        )
    return _of_run(run.expanduser()) if run is not None else _of_run(newest_run())


def newest_run(folder: Path = RUNS) -> Path:
    """The run folder whose adapter was written last.

    Raises:
        UserError: if there is none.
    """
    from trimtab.axis.adapter_files import ADAPTER_WEIGHTS
    from trimtab.pipeline.run import MARKER, Variant

    weights = {run.parent: Variant(run.parent, "train").adapter / ADAPTER_WEIGHTS for run in folder.glob(f"*/{MARKER}")}
    trained = {run: path.stat().st_mtime_ns for run, path in weights.items() if path.exists()}
    if not trained:
        raise UserError(
            f"no run folder with an adapter lies in {folder.resolve()}",
            key="RUN",
            remedy="make one (make demo, or trimtab run smollm2-135m/demo), name a run folder, "
            "or give --base M --tuned ADAPTER_OR_MODEL --floor F",
        )
    newest = max(trained, key=lambda run: trained[run])
    log.info("run folder %s (of %d, the adapter that was written last)", newest, len(trained))
    return newest


def _of_run(folder: Path) -> Sources:
    from trimtab.axis.adapter_files import ADAPTER_WEIGHTS
    from trimtab.pipeline.run import MARKER, Variant

    marker = folder / MARKER
    if not marker.is_file():
        raise UserError(
            f"this is not a run folder: it has no {MARKER}",
            file=folder,
            key="RUN",
            remedy="name a folder that trimtab run made, or give --base M --tuned ADAPTER_OR_MODEL --floor F",
        )
    try:
        resolved = read_json(marker)["resolved"]
        base = ModelSection.model_validate(resolved["model"])
        tuned = resolved["eval"].get("tuned")
    except (ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"its resolved recipe can't be read: {error}",
            file=marker,
            remedy="give --base M --tuned ADAPTER_OR_MODEL --floor F",
        ) from error
    variant = Variant(folder, "train")
    if tuned is None and not (variant.adapter / ADAPTER_WEIGHTS).exists():
        raise UserError("this run has no adapter yet", file=variant.adapter, remedy="train it: trimtab train RECIPE")
    if not variant.floor_path.exists():
        raise UserError(
            "this run has no floor yet", file=variant.floor_path, remedy="calibrate it: trimtab floor RECIPE"
        )
    return Sources(base, tuned or str(variant.adapter), variant.floor_path)


def chat_command(
    run: Path | None,
    *,
    base: str | None,
    tuned: str | None,
    floor: str | None,
    experiment: str | None = None,
    layers: list[int] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    host: str,
    port: int | None,
    browser: bool,
) -> None:
    """The command ``trimtab chat``: serve the page until it is interrupted.

    Args:
        run: run folder; None for the newest below ``runs/`` that has an adapter.
        base: base model; with ``tuned`` and ``floor`` it stands in the place of a run.
        tuned: adapter or model.
        floor: ``floor.safetensors`` or ``capping_config.pt``.
        experiment: id in the latter.
        layers: cap and read at these of the floor's layers alone.
        template_kwargs: of the chat template.
        host: address to serve at; anything but a loopback address opens the page to the network.
        port: None for the first free one from 7860 on.
        browser: open the page in the browser.

    Raises:
        UserError: for whatever is wrong with the inputs, and where Gradio is missing or the port is taken.
    """
    # What is quickly wrong is told before the models are loaded.
    import_gradio()
    check_address(host, port)
    sources = find_sources(
        run, base=base, tuned=tuned, floor=floor, experiment=experiment, template_kwargs=template_kwargs
    )
    from trimtab.chat.arms import open_arms
    from trimtab.chat.page import build_page

    arms = open_arms(sources.base, sources.tuned, sources.floor, sources.experiment, layers)
    serve(build_page(arms, about(sources, arms.floor, host)), host, port, browser=browser)


def about(sources: Sources, floor: Any, host: str) -> str:
    """One line of HTML that says what is compared, and who can read along."""
    percentile = floor.metadata.get("percentile")
    layers = _ranges(floor.layers) + ("" if percentile is None else f", {percentile:.0f}th percentile")
    facts = {"base": sources.base.name, "tuned": sources.tuned, "floor": f"layers {layers}"}
    shown = " · ".join(f"{name}: <code>{html.escape(value)}</code>" for name, value in facts.items())
    reach = (
        "The page and what is said in it stay on this machine, and nothing is kept."
        if stays_here(host)
        else f"<b>This page is served at {html.escape(host)}: other machines can open it.</b> What is said goes nowhere else, "
        "and nothing is kept."
    )
    return f'<p class="about">{shown}<br>{reach}</p>'


def _ranges(layers: tuple[int, ...]) -> str:
    """Layers as people write them: ``14–24``, ``3, 5–7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
