"""`trimtab recipes`: what ships, as a table read from the recipes' own headers, and what two recipes say differently."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.pipeline.identity import NOT_SET, flat
from trimtab.recipes.loader import FOLDER, load_recipe, shipped_recipes

NUMBERS = {"one": 1, "two": 2}
# What a recipe's header says; tests hold these figures to what `trimtab check` computes.
GPUS = re.compile(r"Hardware:\s+(\w+) GPUs? of (\d+) GB")
GPU_HOURS = re.compile(r"Estimate:\s+([\d.]+) GPU-hours")
CPU_MINUTES = re.compile(r"Hardware:\s+\w+ CPU cores\D.*?(\d+) minutes", re.DOTALL)
METHOD = re.compile(r"^method:\n(?:  .*\n)*?  name: (\w+)", re.MULTILINE)
GAP = "  "
FEWEST = 6  # characters of a description that are worth their place


@dataclass(frozen=True)
class Listed:
    """A recipe as the table tells it.

    Attributes:
        model: folder of the recipe.
        method: how it trains.
        gpus: how many GPUs, 0 on a CPU.
        memory: GB of one GPU.
        hours: GPU-hours of the whole job; on a CPU, hours.
        name: of the recipe.
        what: what it trains, in words.
    """

    model: str
    method: str
    gpus: int
    memory: int
    hours: float
    name: str
    what: str

    def cells(self) -> list[str]:
        """The row's text."""
        machine = f"{self.gpus} x {self.memory} GB" if self.gpus else "CPU"
        return [self.model, self.method, machine, f"{self.hours:5.1f}", self.name, self.what]


def listed(name: str, path: Path) -> Listed:
    """Read a shipped recipe's header; its sections are not parsed.

    Args:
        name: ``<model>/<recipe>``.
        path: its file.
    """
    text = path.read_text(encoding="utf-8")
    header = text.partition("\n\n")[0]
    first = header.partition("\n")[0].removeprefix("#").strip()
    method = _found(METHOD, text, name)[1]
    what = first.partition(": ")[2] or first
    model = name.partition("/")[0]
    if (found := GPUS.search(header)) is None:
        hours = int(_found(CPU_MINUTES, header, name)[1]) / 60
        return Listed(model, method, 0, 0, hours, name, what)
    hours = float(_found(GPU_HOURS, header, name)[1])
    number = NUMBERS.get(found[1].lower()) or int(found[1])
    return Listed(model, method, number, int(found[2]), hours, name, what)


def _found(pattern: re.Pattern[str], text: str, name: str) -> re.Match[str]:
    match = pattern.search(text)
    assert match is not None, f"{name} does not say {pattern.pattern!r}"
    return match


def table_of_recipes(width: int | None) -> str:
    """The table of all that ships.

    Args:
        width: columns of the terminal, by which descriptions are shortened; None leaves them whole.
    """
    rows = [["model", "method", "GPUs", "hours", "recipe", "what it trains"]]
    rows += [listed(name, path).cells() for name, path in shipped_recipes().items()]
    if width is not None:
        left = width - sum(max(map(len, column)) + len(GAP) for column in list(zip(*rows, strict=True))[:-1])
        rows = [[*row[:-1], _shortened(row[-1], left)] for row in rows]
    notes = (
        "hours: estimated GPU-hours of an H100, whole job; of CPU: measured on two cores",
        "memory plan and hours of any recipe: trimtab check RECIPE",
        "what two of them say differently: trimtab recipes --diff A B",
        f"files to copy and change: {FOLDER}/<recipe>.yaml",
    )
    return "\n".join([aligned(rows), "", *notes])


def _shortened(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder="…") if width >= FEWEST else ""


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as plain text, two spaces between columns: no frame, so that other programs read it too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def difference(one: str, other: str) -> str:
    """What two recipes say differently, defaults included, as a table.

    Args:
        one: a shipped recipe's name, or a YAML file.
        other: as well.

    Raises:
        RecipeError: if one of them is none, or is at fault.
    """
    first, second = (flat(load_recipe(asked).resolved) for asked in (one, other))
    keys = [*first, *(key for key in second if key not in first)]
    said = [(key, first.get(key, NOT_SET), second.get(key, NOT_SET)) for key in keys]
    differ = [row for row in said if row[1] != row[2]]
    if not differ:
        return f"nothing differs: {one} and {other} say the same, defaults included"
    rows = [["key", one, other], *([key, shown(then), shown(now)] for key, then, now in differ)]
    return f"{aligned(rows)}\n\n{len(differ)} of {len(first.keys() | second.keys())} keys differ, defaults included"


def shown(value: Any) -> str:
    """A value as a recipe writes it; neighbouring layers as their range."""
    if value is NOT_SET:
        return "not set"
    if isinstance(value, list) and len(value) > 2 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    written: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return written.removesuffix("...\n").strip()


def show(diff: Sequence[str] | None) -> None:
    """Print the table, or what differs between two recipes."""
    if diff is not None:
        print(difference(*diff))
        return
    print(table_of_recipes(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
