"""The weights behind the arms: base, tuned, control.

An unmerged adapter is two to three times slower, and a small model is cheap to hold three times: each adapter is merged into a
copy, as a deployment would do, if it can be and there is room. Otherwise one model switches its adapters.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftModel

from trimtab.axis.adapters import can_merge, room_for_copies
from trimtab.axis.errors import UserError
from trimtab.axis.models import Loaded
from trimtab.recipes.schema import ModelSection
from trimtab.train.subject import Subject

log = logging.getLogger("trimtab")

Weights = Mapping[str, Callable[[], AbstractContextManager[Any]]]


def open_subjects(
    section: ModelSection, base: Loaded, subjects: Mapping[str, Subject], upon_tuned: Collection[str] = ()
) -> Weights:
    """The base, and the weights under evaluation: see :func:`open_weights`.

    Args:
        section: of the recipe, from which the base was loaded.
        base: the base.
        subjects: name -> weights; of these only ``tuned`` may be whole.
        upon_tuned: names of the adapters that belong upon the tuned weights where these are whole; all others upon the base.

    Raises:
        UserError: if weights can't be loaded, or are not the base's.
    """
    adapters = {name: subject.name for name, subject in subjects.items() if not subject.whole}
    tuned = subjects["tuned"]
    if not tuned.whole:
        return open_weights(base.model, adapters)
    upon = {name: adapters.pop(name) for name in upon_tuned}
    above = open_weights(tuned.load_whole(section, base), upon)
    return {**open_weights(base.model, adapters), **{name: above[name] for name in upon}, "tuned": above["base"]}


def open_weights(base: Any, adapters: Mapping[str, str | Path]) -> Weights:
    """Name -> context manager that yields a model with those weights; ``base`` is always there.

    Args:
        base: the base model.
        adapters: name -> PEFT adapter, a folder or a hub id.

    Raises:
        UserError: if an adapter does not go on the base.
    """
    if not adapters:
        return {"base": _holding(base)}
    if can_merge(base) and room_for_copies(base.parameters(), len(adapters)):
        models = {"base": base}
        for name, folder in adapters.items():
            models[name] = _merged(base, str(folder))
        return {name: _holding(model) for name, model in models.items()}
    model = base
    for name, folder in adapters.items():
        model = _with(model, str(folder), name)
    model.eval()
    return {"base": _without_adapter(model), **{name: _with_adapter(model, name) for name in adapters}}


def _with(model: Any, folder: str, name: str = "default") -> Any:
    """The model with one more adapter."""
    try:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, adapter_name=name)
        model.load_adapter(folder, adapter_name=name)
        return model
    except (RuntimeError, ValueError) as error:  # other shapes, or target modules that are not there
        raise UserError(
            f"this adapter does not go on the base model: {str(error).splitlines()[0]}",
            file=folder,
            remedy="name the base that it was trained from",
        ) from error


def _merged(base: Any, folder: str) -> Any:
    """A copy of the base with an adapter merged into it, or beside it where PEFT can't merge its kind."""
    model = _with(copy.deepcopy(base), folder)
    try:
        return model.merge_and_unload().eval()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        log.info("%s is not merged, which makes it slower: %s", folder, error)
        return _with(copy.deepcopy(base), folder).eval()  # anew: some layers are merged by now


def _holding(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: contextlib.nullcontext(model)


def _with_adapter(model: Any, name: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def switch() -> Iterator[Any]:
        model.set_adapter(name)
        yield model

    return switch


def _without_adapter(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    @contextlib.contextmanager
    def switch() -> Iterator[Any]:
        with model.disable_adapter():
            yield model

    return switch
