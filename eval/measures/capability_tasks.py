"""The tasks of lm-eval that capability is measured by: which they are, how they are scored, and how much they ask.

Two tasks of our own need no network: ``everyday_choice`` (multiple choice by likelihood) and ``instructions`` (rules that a
program checks). ``paper`` stands for the four tasks of arXiv 2601.10387, with its metrics and sample counts; any other name is
lm-eval's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.axis.errors import UserError


@dataclass(frozen=True)
class Task:
    """One task and how it is scored.

    Attributes:
        name: lm-eval's, or one of our own.
        metric: which of the task's metrics; None takes its first.
        limit: documents, for a group of tasks in each of them; None takes all.
        chat: whether the chat template is put round the prompts.
        chance: score of guessing, or None.
        scale: highest score.
        filter: which of the task's answer filters; None takes its first.
    """

    name: str
    metric: str | None = None
    limit: int | None = None
    chat: bool = True
    chance: float | None = None
    scale: float = 1.0
    filter: str | None = None


OWN = {
    "everyday_choice": Task("everyday_choice", metric="acc", chat=False, chance=0.25),
    "instructions": Task("instructions", metric="strict_acc"),
}
# 541, 1,400, 1,000 and 171 documents, no examples in the prompt; MMLU-Pro is a group of 14 tasks.
PAPER = {
    "ifeval": Task("ifeval", metric="inst_level_strict_acc"),
    "mmlu_pro": Task("mmlu_pro", metric="exact_match", limit=100, chance=0.1),
    "gsm8k": Task("gsm8k", metric="exact_match", limit=1000, filter="flexible-extract"),
    "eq_bench": Task("eq_bench", metric="eqbench", scale=100.0),
}


@dataclass(frozen=True)
class Size:
    """How much a task asks, for the estimate of hours.

    Attributes:
        documents: how many it has.
        prompt: tokens of one, about.
        answer: most tokens of a generated answer; 0 where answers are scored by likelihood.
    """

    documents: int = 400
    prompt: int = 200
    answer: int = 256


OWN_ANSWER = 96  # most tokens of an answer to our own instructions
# As lm-eval 0.4.13 has them; another task is taken for one of the default size.
SIZES = {
    "everyday_choice": Size(240, 40, 0),
    "instructions": Size(80, 40, OWN_ANSWER),
    "ifeval": Size(541, 60, 1280),
    "mmlu_pro": Size(1400, 250, 2048),
    "gsm8k": Size(1000, 80, 256),
    "eq_bench": Size(171, 400, 80),
}
GROUPS = {"mmlu_pro": 14}  # tasks of a group, each of which has its own limit


def size_of(task: Task) -> Size:
    """How much a task asks within its limit."""
    size = SIZES.get(task.name, Size())
    if task.limit is None:
        return size
    return replace(size, documents=min(size.documents, task.limit * GROUPS.get(task.name, 1)))


def tasks_of(names: Sequence[str], limit: int | None) -> list[Task]:
    """The tasks that a recipe names.

    Args:
        names: names, or ``paper`` for the paper's four.
        limit: most documents of each task; None leaves each task's own.
    """
    found: list[Task] = []
    for name in names:
        known = [*PAPER.values()] if name == "paper" else [OWN.get(name) or PAPER.get(name) or Task(name)]
        found += [task if limit is None else replace(task, limit=min(limit, task.limit or limit)) for task in known]
    return list({task.name: task for task in found}.values())


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """Look up the tasks that are neither our own nor the paper's in lm-eval's index, which takes some seconds.

    Args:
        names: of ``eval.capability``.
        folder: lm-eval task files of the user's own.

    Raises:
        UserError: for a name that lm-eval doesn't know.
    """
    foreign = [task.name for task in tasks_of(names, None) if task.name not in {**OWN, **PAPER}]
    for name in foreign:
        index = task_manager(folder, False)
        if not index.match_tasks([name]):
            raise UserError(
                f"lm-eval has no task {name!r}",
                key="eval.capability",
                remedy=f"name a task that `lm-eval ls tasks` lists, `paper`, or {', '.join(OWN)}",
            )


@functools.cache
def task_manager(folder: Path | None, own: bool) -> Any:
    """lm-eval's index of tasks, which takes seconds to make; our own tasks need none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=not own)
