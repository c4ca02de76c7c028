"""Schedules on optimiser steps over total steps, never on micro-batches: accumulation 1 and 4 give the same curve."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(start: float, schedule: Schedule, step: int, total: int) -> float:
    """Value at ``step`` of ``total``: constant, or annealed to 0 linearly or by a half cosine.

    Args:
        start: value at step 0.
        schedule: its shape.
        step: optimiser steps done.
        total: optimiser steps of the whole run.
    """
    progress = min(max(step / total, 0.0), 1.0) if total > 0 else 0.0
    if schedule == "linear":
        return start * (1 - progress)
    if schedule == "cosine":
        return start * 0.5 * (1 + math.cos(math.pi * progress))
    return start


def carried(times: int, rate: float) -> int:
    """How many have come after so many times, at ``rate`` a time: a fraction is carried over until it makes one more."""
    return int(times * rate + 1e-9)


class WithinStep:
    """Counts what happens several times in an optimiser step, from 0 in each, so that a resumed run counts as the first did."""

    def __init__(self) -> None:
        self._step, self._count = -1, 0

    def next(self, step: int) -> int:
        """The number of this time within the step."""
        self._count = self._count + 1 if step == self._step else 0
        self._step = step
        return self._count
