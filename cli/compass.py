"""``trimtab project``: where each turn of conversations lies on the axis, as tables, a page or numbers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.axis.calibration import check_window
from trimtab.axis.chat_format import ChatFormat, chat
from trimtab.axis.compass import Course, Transcript, load_transcript, project_transcript
from trimtab.axis.directions import Axis, Floor
from trimtab.axis.errors import UserError
from trimtab.axis.files import write_json
from trimtab.axis.instruments import check_instrument, load_instrument
from trimtab.axis.models import load_model, load_tokenizer, model_shape
from trimtab.axis.progress import track
from trimtab.axis.soundness import check_model
from trimtab.cli.compass_view import render_table, write_plot

log = logging.getLogger("trimtab")


def _check_pages(html: str | Path | None, json: str | Path | None) -> None:
    """Whether the files to write can be files, and two of them, before a model is loaded and read for them."""
    for key, path in (("--html", html), ("--json", json)):
        if path is not None and os.path.isdir(path):
            raise UserError("this is a folder, and a file is wanted", file=path, key=key, remedy="name a file")
    if html is not None and json is not None and os.path.realpath(html) == os.path.realpath(json):
        raise UserError("the page and the numbers can't be one file", file=json, key="--json", remedy="name another")


def project_command(
    model: str,
    floor: str | Path,
    transcript: str | Path,
    *,
    experiment: str | None = None,
    layers: Sequence[int] | None = None,
    html: str | Path | None = None,
    json: str | Path | None = None,
    capped: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """The command ``trimtab project``: tables on standard output, and the files that were asked for.

    A conversation that can't be read keeps nothing from the others.

    Args:
        model: hub id, folder or embedded model.
        floor: see :func:`trimtab.axis.instruments.load_instrument`.
        transcript: see :func:`load_transcript`.
        experiment: id in a published ``capping_config.pt``.
        layers: see :func:`project_transcript`.
        html: also write a page with the plots, the layers and the coloured text.
        json: also write the numbers.
        capped: read the model with the cap on.
        template_kwargs: extra arguments of the chat template.

    Returns:
        0, the exit code.

    Raises:
        UserError: for whatever is wrong with the inputs; if it is some of the conversations, after the others are shown and
            written.
    """
    _check_pages(html, json)
    conversations = load_transcript(transcript)
    instrument = _instrument(model, floor, experiment, layers, capped=capped)
    form = ChatFormat(load_tokenizer(model), template_kwargs)
    form.prompt_text(chat("", "x"))  # a template that can't be used is told before the weights load
    form.tell()
    loaded = load_model(model)
    check_model(loaded)

    def project(conversation: Transcript) -> Course:
        if conversation.model not in (None, model):
            log.info("%s: written by %s, read by %s", conversation.title, conversation.model, model)
        messages, title = conversation.messages, conversation.title
        return project_transcript(loaded.model, form, instrument, messages, layers=layers, capped=capped, title=title)

    courses, faults = _each(conversations, project)
    _show(courses, model, floor, html, json)
    if faults:
        raise UserError(
            f"{len(faults)} of {len(conversations)} conversations can't be read: "
            + "; ".join(f"{title}: {error.fault}" for title, error in faults.items()),
            file=transcript,
            remedy=" ".join(dict.fromkeys(error.remedy for error in faults.values())),
        )
    return 0


def _instrument(
    model: str, floor: str | Path, experiment: str | None, layers: Sequence[int] | None, *, capped: bool
) -> Axis | Floor:
    """What is projected on, checked against the model's shape."""
    instrument = load_instrument(floor, experiment)
    if capped and not isinstance(instrument, Floor):
        raise UserError("an axis alone can't cap", file=floor, key="--capped", remedy="give a floor.safetensors")
    shape = model_shape(model)
    check_instrument(instrument, *shape, floor)
    if layers is not None:
        check_window(layers, shape[0])
        instrument = instrument.at(layers) if isinstance(instrument, Floor) else instrument
    made_for = instrument.metadata.get("model")
    if made_for not in (None, model):
        log.warning(
            "%s was made for %s: its numbers hold for %s only if that has the same weights", floor, made_for, model
        )
    return instrument


def _each(
    conversations: Sequence[Transcript], project: Callable[[Transcript], Course]
) -> tuple[list[Course], dict[str, UserError]]:
    """The courses of those that can be read, and the faults of the others by title.

    Raises:
        UserError: if none can be read, all for one reason.
    """
    courses: list[Course] = []
    faults: dict[str, UserError] = {}
    for conversation in track(conversations, "projections"):
        try:
            courses.append(project(conversation))
        except UserError as error:
            faults[conversation.title] = error
    if not courses and len({error.fault for error in faults.values()}) == 1:
        raise next(iter(faults.values()))
    return courses, faults


def _show(
    courses: Sequence[Course], model: str, floor: str | Path, html: str | Path | None, json: str | Path | None
) -> None:
    """Print the tables, and write what was asked for."""
    answers = [turn for course in courses for turn in course.assistant]
    if answers and all(turn.below == 0 for turn in answers):
        log.warning("%s: no token of an answer lies below this floor, so its cap would do nothing here", floor)
    console = Console()
    for course in courses:
        console.print(render_table(course))
    if json is not None:
        write_json(json, {"model": model, "floor": str(floor), "courses": [course.as_json() for course in courses]})
        print(f"numbers: {Path(json).resolve()}")
    if html is not None:
        write_plot(html, courses)
        print(f"page: {Path(html).resolve()}")
