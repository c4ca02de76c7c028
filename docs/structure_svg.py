"""The picture of ``draw_structure.py``: rooms from above to below, an arc for the imports between two, what should not be, bars.

One column of boxes and arcs beside it, so that the same picture is read on a wide screen and on a phone.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import PurePosixPath

from source_tree import STAGES, Structure

WIDTH = 600  # in units of the picture; little enough that its letters can be read on a phone
SHOWN = 720  # pixels, where there is room
BOX = (12, 232)  # left edge of the boxes, and their width
ARCS = 586 - sum(BOX)  # room for the arcs
GAP = 12  # between two boxes
LOWEST = 48  # of a box, which two lines of text need
LINES_A_UNIT = 60  # of source, to one of a box's height
PORT = 2.5  # between two arcs at a box
LETTERS = 62  # of a line of text across the picture

STYLE = """
svg { --ground: #ffffff; --ink: #1f2733; --faint: #5b6675; --box: #e6edf7; --edge: #8aa4c8; --arc: #5f83b5; --bad: #c62f1d;
  --good: #20744a; font-family: system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ground: #14181f; --ink: #e8ecf2; --faint: #a3adbb; --box: #243145;
  --edge: #5d7ba6; --arc: #7fa3d6; --bad: #ff8a73; --good: #6fcf9b; } }
.ground { fill: var(--ground); } text { fill: var(--ink); font-size: 16px; } .faint { fill: var(--faint); font-size: 14px; }
.title { font-size: 21px; font-weight: 700; } .name { font-size: 17px; font-weight: 600; }
.box { fill: var(--box); stroke: var(--edge); } .circle { stroke: var(--bad); stroke-width: 2.5; }
.arc { fill: none; stroke: var(--arc); opacity: .6; } .tip { fill: var(--arc); } .against { stroke: var(--bad); opacity: .9; }
.tip.against { fill: var(--bad); stroke: none; } text.bad { fill: var(--bad); } text.good { fill: var(--good); }
.count { font-size: 15px; fill: var(--faint); text-anchor: middle; paint-order: stroke; stroke: var(--ground);
  stroke-width: 4px; } .count.against { fill: var(--bad); opacity: 1; } .bar { fill: var(--arc); }
"""


@dataclass(frozen=True)
class Arc:
    """The imports from one room to another."""

    start: str
    end: str
    count: int
    bad: bool

    @property
    def width(self) -> float:
        """Of its line."""
        return 1 + 1.1 * math.sqrt(self.count)


@dataclass(frozen=True)
class Box:
    """Where a room stands."""

    row: int
    top: float
    height: float


def drawn(structure: Structure) -> str:
    """The picture, an SVG that needs nothing beside it."""
    against = {(arrow.start, arrow.end) for arrow in structure.against}
    arcs = [Arc(*pair, count, pair in against) for pair, count in structure.between.items()]
    arcs.sort(key=lambda arc: (arc.bad, -arc.count))  # what should not be lies on top
    boxes = _boxes(structure, arcs)
    parts = [_text(BOX[0], 34, "How the source hangs together", "title"), *_legend(58)]
    parts += [_arc(arc, boxes, arcs) for arc in arcs]
    parts += _rooms(structure, boxes)
    bottom = max(box.top + box.height for box in boxes.values())
    judged, bottom = _judgements(structure, bottom + 44)
    bars, bottom = _bars(structure, bottom + 26)
    body = "\n".join([*parts, *judged, *bars])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:.0f}" width="{SHOWN}" role="img" '
        f'aria-label="Folders of the source, who imports whom, and the longest functions">\n<style>{STYLE}</style>\n'
        f'<rect class="ground" width="{WIDTH}" height="{bottom:.0f}"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _legend(y: float) -> list[str]:
    lines = [
        "A room may import those above it. It grows with its lines and arcs.",
        "An arc points at what is imported. Its width and number: imports.",
        "In this colour: imports against the order, rooms with a circle of files.",
    ]
    return [_text(BOX[0], y + 20 * row, line, "bad" if row == 2 else "") for row, line in enumerate(lines)]


def _boxes(structure: Structure, arcs: list[Arc]) -> dict[str, Box]:
    boxes, top = {}, 124.0
    for row, room in enumerate(structure.rooms):
        ends = [arc.width + PORT for arc in arcs if room.name in (arc.start, arc.end)]
        height = max(LOWEST, room.lines / LINES_A_UNIT, sum(ends) + PORT)
        boxes[room.name] = Box(row, top, height)
        top += height + GAP
    return boxes


def _rooms(structure: Structure, boxes: dict[str, Box]) -> list[str]:
    round_about = {name for circle in structure.room_circles for name in circle}
    round_about |= {room for room in boxes for circle in structure.file_circles for path in circle if _in(path, room)}
    parts = []
    for room in structure.rooms:
        box = boxes[room.name]
        kind = "box circle" if room.name in round_about else "box"
        parts.append(
            f'<rect class="{kind}" x="{BOX[0]}" y="{box.top:.1f}" width="{BOX[1]}" height="{box.height:.1f}" rx="7"/>'
        )
        middle = box.top + box.height / 2
        parts.append(_text(BOX[0] + 12, middle - 4, _label(room.name), "name"))
        held = f"{room.modules} {_plural(room.modules, 'module')}, {_grouped(room.lines)} {_plural(room.lines, 'line')}"
        parts.append(_text(BOX[0] + 12, middle + 15, held, "faint"))
    return parts


def _label(room: str) -> str:
    if room != "eval/stages":
        return f"{room}/"
    return "eval/: " + ", ".join(PurePosixPath(path).stem for path in STAGES)


def _in(path: str, room: str) -> bool:
    return path.rpartition("/")[0] == room


def _plural(number: int, word: str) -> str:
    return word if number == 1 else f"{word}s"


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")  # a thin space


def _arc(arc: Arc, boxes: dict[str, Box], arcs: list[Arc]) -> str:
    """An arc from the importing room to the imported one, with its number at its farthest point."""
    edge = sum(BOX)
    start, end = _port(arc, arc.start, boxes, arcs), _port(arc, arc.end, boxes, arcs)
    rows = abs(boxes[arc.start].row - boxes[arc.end].row)
    reach = 26 + (ARCS - 44) * rows / (len(boxes) - 1)
    head = 5 + arc.width / 2
    pull = edge + reach * 4 / 3  # the curve goes three quarters of the way to its control points
    path = f"M{edge} {start:.1f} C{pull:.1f} {start:.1f} {pull:.1f} {end:.1f} {edge + head:.1f} {end:.1f}"
    tip = f"M{edge} {end:.1f} l{head:.1f} {-head:.1f} v{2 * head:.1f} z"
    kind = " against" if arc.bad else ""
    title = f"<title>{arc.start} imports {arc.end}: {arc.count}</title>"
    return (
        f'<g>{title}<path class="arc{kind}" stroke-width="{arc.width:.1f}" d="{path}"/><path class="tip{kind}" d="{tip}"/>'
        f"{_text(edge + reach, (start + end) / 2 + 4, str(arc.count), f'count{kind}', 'middle')}</g>"
    )


def _port(arc: Arc, room: str, boxes: dict[str, Box], arcs: list[Arc]) -> float:
    """Where an arc meets a room's edge: those from above over those from below, and none across another."""
    row = boxes[room].row

    def turn(other: Arc) -> tuple[bool, int]:
        away = boxes[other.end if other.start == room else other.start].row - row
        # upwards the nearest first, downwards the farthest first: so they lie within each other
        return away > 0, -away

    here = sorted((other for other in arcs if room in (other.start, other.end)), key=turn)
    space = boxes[room].height - sum(other.width for other in here)
    each = space / (len(here) + 1)
    before = here[: here.index(arc)]
    return boxes[room].top + each * (len(before) + 1) + sum(other.width for other in before) + arc.width / 2


def _judgements(structure: Structure, y: float) -> tuple[list[str], float]:
    """What should not be, a line each, or that there is none of it."""
    parts = []
    for title, found in structure.faults().items():
        parts.append(_text(BOX[0], y, f"{title}: {len(found) or 'none'}", "name bad" if found else "name good"))
        y += 22
        for line in found:
            for piece in _wrapped(line):
                parts.append(_text(BOX[0] + 12, y, piece, "bad"))
                y += 20
        y += 6
    return parts, y


def _wrapped(line: str) -> list[str]:
    pieces = [""]
    for word in line.split():
        if len(pieces[-1]) + len(word) > LETTERS:
            pieces.append("")
        pieces[-1] = f"{pieces[-1]} {word}".strip()
    return pieces


def _bars(structure: Structure, y: float) -> tuple[list[str], float]:
    """The longest functions."""
    parts = [_text(BOX[0], y, "The longest functions, in lines", "name")]
    most = max((function.lines for function in structure.longest), default=1)
    y += 14
    for function in structure.longest:
        length = (WIDTH - 2 * BOX[0] - 44) * function.lines / most
        parts.append(_text(BOX[0], y + 18, f"{function.name}, {function.path}", "faint"))
        parts.append(f'<rect class="bar" x="{BOX[0]}" y="{y + 24:.1f}" width="{length:.1f}" height="9" rx="2"/>')
        parts.append(_text(BOX[0] + length + 8, y + 33, str(function.lines), "faint"))
        y += 40
    return parts, y + 16
