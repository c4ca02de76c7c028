"""What an entry script brings to the frame that all of them share, and the method of a recipe's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """What an entry script brings to the frame.

    Attributes:
        name: ``method.name`` of the recipes that it trains.
        usage: the script's docstring.
        last_stage: name of the last stage record before training.
        arguments: TRL's config, given run, variant, and whether to be quiet.
        trainer: the trainer, given run, that config, and variant.
    """

    name: str
    usage: str
    last_stage: str
    arguments: Callable[[Any, Any, bool], Any]
    trainer: Callable[[Any, Any, Any], Any]


def method_of(name: str) -> Method:
    """What the entry script of a method brings.

    Args:
        name: ``method.name`` of a recipe.
    """
    method: Method = importlib.import_module(f"trimtab.train.{name}").METHOD
    return method
