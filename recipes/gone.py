"""Keys that have left the schema: what is always so now, and what to do about a recipe or a run folder that has them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Gone(NamedTuple):
    """A key that is no longer there.

    Attributes:
        now: the value that every run has now, in the words of the old key.
        remedy: what to do with it in a recipe.
    """

    now: Any
    remedy: str


GONE = {
    "method.floor_shape": Gone("squared", "remove it: the penalty is squared, as it was by default"),
    "floor.allow_inert": Gone(False, "remove it; floor.min_firing=0 takes a floor that never fires"),
}
