"""The weights behind the arms: base, tuned, control.

An unmerged adapter is two to three times slower, and a small model is cheap to hold three times: each adapter is merged into a
copy, as a deployment would do, if it can be and there is room. Otherwise one model switches its adapters, and it is checked that
it is still the base with all of them off.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from trimtab.axis.adapter_files import MERGED, load_adapter
from trimtab.axis.adapters import NotMergeable, can_merge, merge_in, room_for_copies
from trimtab.axis.base_check import check_base, record_base
from trimtab.axis.errors import UserError
from trimtab.axis.models import Loaded
from trimtab.pipeline.subject import Subject
from trimtab.recipes.schema import ModelSection

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
        upon_tuned: names of the adapters that belong upon the tuned weights, all others upon the base. A tuned adapter is merged
            into a copy of the base for them, whether there is room for it or not: upon those weights they were trained.

    Raises:
        UserError: if weights can't be loaded, or are not the base's.
    """
    adapters = {name: subject.folder for name, subject in subjects.items() if not subject.whole}
    upon = {name: adapters.pop(name) for name in upon_tuned}
    tuned = subjects["tuned"]
    if tuned.whole:
        below = tuned.load_whole(section, base)
    elif upon:
        below = merged_copy(base.model, adapters.pop("tuned"))
    else:
        return open_weights(base.model, adapters)
    above = open_weights(below, upon)
    return {**open_weights(base.model, adapters), **{name: above[name] for name in upon}, "tuned": above["base"]}


def merged_copy(base: Any, folder: str | Path) -> Any:
    """A copy of the base with an adapter merged into it.

    Raises:
        UserError: if it does not go on the base, or can't be merged.
    """
    model = load_adapter(copy.deepcopy(base), folder)
    try:
        return merge_in(model).eval()
    except NotMergeable as error:
        raise UserError(
            f"this adapter can't be merged, and a durability run trains upon merged weights: {error}",
            file=folder,
            key="eval.durability",
            remedy="set eval.durability=[]",
        ) from error


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
    model, before = base, record_base(base)
    for name, folder in adapters.items():
        model = load_adapter(model, folder, name=name)
        check_base(model, before, file=folder, key="eval.tuned", remedy=MERGED)
    model.eval()
    return {"base": _without_adapter(model), **{name: _with_adapter(model, name) for name in adapters}}


def _merged(base: Any, folder: str) -> Any:
    """A copy of the base with an adapter merged into it, or beside it where its kind can't be merged."""
    try:
        return merge_in(load_adapter(copy.deepcopy(base), folder)).eval()
    except NotMergeable as error:
        log.info("%s is not merged, which makes it slower: %s", folder, error)
        return load_adapter(copy.deepcopy(base), folder).eval()  # anew: some layers are merged by now


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
