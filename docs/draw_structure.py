"""Say and draw how the source hangs together: folders, who imports whom, circles, the longest functions.

python docs/draw_structure.py
python docs/draw_structure.py --tree 37deda3 --svg before.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from source_tree import ROOT, Structure, UnreadableTree, read_tree, structure_of
from structure_svg import drawn


def told(structure: Structure) -> str:
    """The structure in words and figures."""
    rooms = [f"{room.name:<20}{room.modules:>4} modules{room.lines:>8} lines" for room in structure.rooms]
    total = f"{'all':<20}{sum(room.modules for room in structure.rooms):>4} modules"
    total += f"{sum(room.lines for room in structure.rooms):>8} lines"
    between = [f"{start:<20}-> {end:<20}{count:>4}" for (start, end), count in structure.between.items()]
    parts = {
        "Folders, in the order in which they import each other": [*rooms, total],
        "Arrows: how often a module of one folder imports one of another": between,
        **structure.faults(),
        "The longest functions": [f"{one.lines:>4} lines  {one.path}: {one.name}" for one in structure.longest],
        "The modules that most others import": [f"{count:>4}  {path}" for path, count in structure.leant_on],
    }
    return "\n".join(f"{title}\n{_indented(lines)}\n" for title, lines in parts.items())


def _indented(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines or ["none"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tree", default=str(ROOT), metavar="FOLDER_OR_REVISION", help="default: the tree around this file"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it as well")
    arguments = parser.parse_args(argv)
    try:
        structure = structure_of(read_tree(arguments.tree))
    except UnreadableTree as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(told(structure), end="")
    if arguments.svg is not None:
        arguments.svg.write_text(drawn(structure), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
