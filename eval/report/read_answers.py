"""What the page shows of the answers that were read: a typical pair, the persona rate, the worst roles, and the table of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean, median
from typing import Any

from trimtab.eval import ids
from trimtab.eval.report.plots import ALL_ARMS
from trimtab.eval.schema import AnswerRow, Estimate, Metric, Report
from trimtab.eval.wording import number

ROLES, CONVERSATIONS = "roles", "conversations"
SUITES = {
    ROLES: "role prompt",
    CONVERSATIONS: "conversation",
    "default": "default Assistant",
    "benign": "benign request",
    "benign_systems": "benign system prompt",
}
OF_READER = {"by_kind", "by_domain", "by_turn"}  # tables of rates that stand beside the answers
WORST = 10  # rows that stand on the page without JavaScript, and roles that are named
ROWS_SHOWN = 400  # and characters: they keep the page small; report.json holds all
CHARACTERS_SHOWN = 1_500_000
WHEN = {"base": "before", "base+cap": "under the cap", "tuned": "tuned", "control": "in the control"}


@dataclass(frozen=True)
class Typical:
    """The pair of answers at the top of the page.

    Attributes:
        row: the question, with every arm's answer.
        change: of the reader's log-odds, tuned minus base.
        median: of the same over all of them.
        of: how many there are.
    """

    row: AnswerRow
    change: float
    median: float
    of: int


@dataclass(frozen=True)
class Level:
    """What the reader says of one arm's answers: how many were read, how many read as a persona, the mean log-odds."""

    n: int
    personas: int
    mean: float


@dataclass(frozen=True)
class Role:
    """The answers under one role, by arm."""

    name: str
    arms: dict[str, Level]


def typical_pair(rows: Sequence[AnswerRow]) -> Typical | None:
    """The answers under a role prompt that changed nearest the median; None where the reader read no pair.

    Neither the best nor the worst, and not picked by hand: of several that are as near, the first by id.
    """
    changes = [(row, change) for row in rows if row.suite == ROLES and (change := _change(row)) is not None]
    if not changes:
        return None
    middle = median(change for _, change in changes)
    row, change = min(changes, key=lambda found: (abs(found[1] - middle), found[0].id))
    return Typical(row, change, middle, len(changes))


def rate_sentence(metrics: Sequence[Metric]) -> str | None:
    """How many of 100 answers read as a persona, arm by arm; None where that was not measured."""
    told = [f"{number(100 * rate.value, 0)} {when}" for when, rate in _persona_rates(metrics)]
    if not told:
        return None
    count, _, when = told[0].partition(" ")
    return f"Of 100 answers under role prompts, {', '.join([f'{count} read as a persona {when}', *told[1:]])}."


def rate_intervals(metrics: Sequence[Metric]) -> str:
    """The intervals behind :func:`rate_sentence`, in its order and out of 100, and n."""
    rates = [rate for _, rate in _persona_rates(metrics)]
    ends = ", ".join(f"[{number(100 * rate.low, 0)}, {number(100 * rate.high, 0)}]" for rate in rates)
    return f"{ends}; n\u00a0=\u00a0{rates[0].n}"


def _persona_rates(metrics: Sequence[Metric]) -> list[tuple[str, Estimate]]:
    arms = next((metric.arms for metric in metrics if metric.id == ids.PERSONA_RATE), {})
    return [(when, arms[arm]) for arm, when in WHEN.items() if arm in arms]


def worst_roles(rows: Sequence[AnswerRow]) -> list[Role]:
    """The roles whose tuned answers the reader takes for a persona most, those first; not more than ``WORST``."""
    found: dict[str, list[AnswerRow]] = {}
    for row in rows:
        if row.suite == ROLES:
            found.setdefault(row.cluster, []).append(row)
    roles = [Role(name, _levels(found[name])) for name in sorted(found)]
    read = [role for role in roles if "tuned" in role.arms]
    return sorted(read, key=lambda role: -role.arms["tuned"].mean)[:WORST]


def _levels(rows: Sequence[AnswerRow]) -> dict[str, Level]:
    found = {arm: [score for row in rows if (score := _persona(row, arm)) is not None] for arm in ALL_ARMS}
    return {
        arm: Level(len(scores), sum(score > 0 for score in scores), fmean(scores))
        for arm, scores in found.items()
        if scores
    }


def _persona(row: AnswerRow, arm: str) -> float | None:
    return row.answers[arm].persona if arm in row.answers else None


def _change(row: AnswerRow) -> float | None:
    base, tuned = _persona(row, "base"), _persona(row, "tuned")
    return None if base is None or tuned is None else tuned - base


def worst_first(rows: Sequence[AnswerRow]) -> list[AnswerRow]:
    """Those first whose tuned answer the reader takes for a persona most; those last that it could not read."""
    return sorted(rows, key=lambda row: math.inf if (found := _persona(row, "tuned")) is None else -found)


def shown_answers(rows: Sequence[AnswerRow]) -> list[AnswerRow]:
    """As many rows as the page holds, taken in turn from every suite, the worst of each first."""
    suites = dict.fromkeys(row.suite for row in rows)
    columns = [[row for row in worst_first(rows) if row.suite == suite] for suite in suites]
    taken: list[AnswerRow] = []
    used = 0
    for row in (row for several in zip_longest(*columns) for row in several if row is not None):
        size = len(row.system) + len(row.question) + sum(len(answer.text) for answer in row.answers.values())
        if len(taken) < ROWS_SHOWN and (used + size <= CHARACTERS_SHOWN or not taken):
            taken.append(row)
            used += size
    return worst_first(taken)


def as_data(row: AnswerRow) -> dict[str, Any]:
    """A row for the page's script; scores rounded to what is shown."""
    return {
        **row.model_dump(exclude={"answers", "suite"}),
        "suite": SUITES.get(row.suite, row.suite),
        "answers": {
            arm: {key: round(value, 3) if isinstance(value, float) else value for key, value in answer}
            for arm, answer in row.answers.items()
        },
    }


def arms_read(report: Report) -> list[str]:
    """The arms that have answers in the table, in their order."""
    return [arm for arm in ALL_ARMS if any(arm in row.answers for row in report.answers)]
