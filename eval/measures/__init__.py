"""The measures, one file each: what it asks, its arithmetic, and what the report says of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.eval.measures.suite import Measure

# The measures in the order of the report, each a module of this folder.
ORDER = (
    "case_studies",
    "who_speaks",
    "text",
    "projections",
    "side_effects",
    "on_topic",
    "substance",
    "benign_systems",
    "refusals",
    "echo",
    "professional",
    "conversations",
    "pressure",
    "simulated",
    "capability",
    "rerouting",
    "prediction",
    "durability",
    "firing",
    "every_answer",
)


def all_measures() -> list[Measure]:
    """The measures, in that order."""
    return [importlib.import_module(f"{__name__}.{name}").MEASURE for name in ORDER]
