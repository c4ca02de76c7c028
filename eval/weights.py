"""The weights behind the arms: base, tuned, control.

On a CPU an unmerged adapter is two to three times slower, and a small model is cheap to hold three times: there each adapter is
merged into a copy, as a deployment would do, if it can be. On a GPU one model switches its adapters.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftModel

from trimtab.axis.adapters import can_merge

log = logging.getLogger("trimtab")

Weights = Mapping[str, Callable[[], AbstractContextManager[Any]]]


def open_weights(base: Any, adapters: Mapping[str, str | Path], whole: Mapping[str, Any] | None = None) -> Weights:
    """Name -> context manager that yields a model with those weights; ``base`` is always there.

    Args:
        base: the base model.
        adapters: name -> PEFT adapter, a folder or a hub id.
        whole: name -> model with weights of its own.
    """
    held = {name: _holding(model) for name, model in (whole or {}).items()}
    if not adapters:
        return {"base": _holding(base), **held}
    if can_merge(base):
        models = {"base": base}
        for name, folder in adapters.items():
            models[name] = _merged(base, str(folder))
        return {**{name: _holding(model) for name, model in models.items()}, **held}
    model: Any = None
    for name, folder in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
    model.eval()
    return {"base": _without_adapter(model), **{name: _with_adapter(model, name) for name in adapters}, **held}


def _merged(base: Any, folder: str) -> Any:
    """A copy of the base with an adapter merged into it, or beside it where PEFT can't merge its kind."""
    try:
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload().eval()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        log.info("%s is not merged, which makes it slower: %s", folder, error)
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()  # anew: some layers are merged by now


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
