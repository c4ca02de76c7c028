"""What an entry script brings to the frame that all of them share, and the method of a recipe's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from trimtab.recipes.methods import MethodSection
from trimtab.recipes.schema import Recipe

if TYPE_CHECKING:
    from trimtab.pipeline.run import Run, Variant
    from trimtab.train.protocols import Toy, Trainer, TrainingArguments

A = TypeVar("A", bound="TrainingArguments")  # TRL's config of a method


@dataclass(frozen=True)
class Method(Generic[A]):
    """What an entry script brings to the frame.

    Attributes:
        section: the section of the recipes that it trains, with what is to be known of the method.
        usage: the script's docstring.
        arguments: TRL's config, given run, variant, and whether to be quiet.
        trainer: the trainer, given run, that config, and variant.
        toy: what a rehearsal trains for a step.
        check_prompts: raises what can be known to be wrong of a recipe's prompts.
        check_arguments: raises what TRL takes of its config, and the method does not; None where that is nothing.
    """

    section: type[MethodSection]
    usage: str
    arguments: Callable[[Run, Variant, bool], A]
    trainer: Callable[[Run, A, Variant], Trainer]
    toy: Callable[[], Toy]
    check_prompts: Callable[[Recipe], None]
    check_arguments: Callable[[A], None] | None = None


def method_of(recipe: Recipe) -> Method[Any]:
    """What the entry script of a recipe's method brings."""
    found: Method[Any] = importlib.import_module(f"trimtab.train.{recipe.method.title()}").METHOD
    return found
